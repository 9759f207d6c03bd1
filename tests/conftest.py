"""Fixtures that several test files share. No test needs a network: the hub is told so before anything imports it."""
import os

os.environ.setdefault('HF_HUB_OFFLINE', '1')

import pytest  # noqa: E402
from hypothesis import settings  # noqa: E402

settings.register_profile('prunebook', deadline=None, database=None, derandomize=True, max_examples=50)
settings.load_profile('prunebook')

CHARS = [c for c in map(chr, range(32, 127)) if c not in '<>`'] + ['\n']  # what `tiny_tokenizer` knows, after 4 special tokens


@pytest.fixture(scope='session')
def tiny_tokenizer():
    "One token per character, 97 in all, with the special ids of `tiny_model`; begins with <s> where special tokens are asked for."
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast
    t = Tokenizer(models.WordLevel({w: i for i, w in enumerate(['<pad>', '<s>', '</s>', '<unk>', *CHARS])}, unk_token='<unk>'))
    t.pre_tokenizer = pre_tokenizers.Split(Regex(r'[\s\S]'), 'isolated')
    t.decoder = decoders.Fuse()
    t.post_processor = processors.TemplateProcessing(single='<s> $A', special_tokens=[('<s>', 1)])
    return PreTrainedTokenizerFast(tokenizer_object=t, pad_token='<pad>', bos_token='<s>', eos_token='</s>', unk_token='<unk>')


@pytest.fixture
def home(tmp_path, monkeypatch):
    "A cache of our own, and no data folder."
    monkeypatch.setenv('PRUNEBOOK_HOME', str(tmp_path/'home'))
    monkeypatch.delenv('PRUNEBOOK_DATA', raising=False)
    return tmp_path/'home'


@pytest.fixture(scope='module')
def own_modules(tmp_path_factory):
    "A place of our own for the copies that transformers makes of modelling files."
    import sys
    with pytest.MonkeyPatch.context() as m:
        m.setattr('transformers.dynamic_module_utils.HF_MODULES_CACHE', str(tmp_path_factory.mktemp('modules')))
        m.setattr(sys, 'path', list(sys.path))
        yield


@pytest.fixture
def one_thread():
    "Tiny models are quickest on one thread."
    import torch
    n = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n)


def pytest_configure(config): config.addinivalue_line('markers', 'fault(what, outcome): what goes wrong and what is promised, for the page "What can go wrong"')

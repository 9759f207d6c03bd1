"""Windows are cut where they should be, and every source of text answers for itself."""
import copy
import json
import string
import time

import pytest
import torch
from conftest import CHARS
from hypothesis import given
from hypothesis import strategies as st

from prunebook.models import TINY, tiny_model
from prunebook.text import (Windows, _rows_to_raw, beginning, load_windows, passages, random_tokens, random_windows, self_generated,
                            side_by_side_windows, wikitext2)

pytestmark = pytest.mark.usefixtures('one_thread')
texts = st.text(alphabet=CHARS, min_size=2, max_size=60)


def encode(text): return [4 + CHARS.index(c) for c in text]  # by hand: no special tokens


@pytest.fixture(scope='module')
def model(): return tiny_model('llama')


@pytest.fixture(scope='module')
def plain(tiny_tokenizer):
    "The same tokenizer, which adds no special tokens."
    from tokenizers.processors import TemplateProcessing
    t = copy.deepcopy(tiny_tokenizer)
    t.backend_tokenizer.post_processor = TemplateProcessing(single='$A', special_tokens=[])
    return t


def decode(ids): return ''.join(CHARS[i - 4] if i > 3 else f'<{i}>' for i in ids)


# ---- cutting --------------------------------------------------------------------------------------------------------

@given(text=texts, n=st.integers(1, 6), seed=st.integers(0, 2**40), data=st.data())
def test_random_windows_are_pieces_of_the_text(plain, text, n, seed, data):
    seqlen = data.draw(st.integers(2, len(text)))
    w = random_windows(text, plain, n, seqlen, seed)
    pieces = [encode(text[i:i + seqlen]) for i in range(len(text) - seqlen + 1)]
    assert w.ids.shape == (n, seqlen) and w.ids.dtype == torch.int64
    assert all(row in pieces for row in w.ids.tolist())
    again = random_windows(text, plain, n, seqlen, seed)
    assert again.fingerprint == w.fingerprint and repr(again) == repr(w)


@given(text=texts, n=st.one_of(st.none(), st.integers(1, 40)), data=st.data())
def test_side_by_side_windows_rebuild_the_text(plain, text, n, data):
    seqlen = data.draw(st.integers(2, len(text)))
    w = side_by_side_windows(text, plain, n, seqlen)
    count = len(text)//seqlen if n is None else min(n, len(text)//seqlen)
    assert w.ids.shape == (count, seqlen)
    assert w.ids.flatten().tolist() == encode(text)[:count*seqlen]
    assert w.fingerprint == side_by_side_windows(text, plain, n, seqlen).fingerprint


@given(text=texts, more=st.integers(1, 500), cut=st.sampled_from([random_windows, side_by_side_windows]))
def test_text_shorter_than_a_window(plain, text, more, cut):
    with pytest.raises(ValueError, match=f'has {len(text)} tokens, too few for one window of {len(text) + more}'):
        cut(text, plain, n=1, seqlen=len(text) + more)


def test_random_windows_reach_both_ends(plain):
    w = random_windows('abcdefghij', plain, n=200, seqlen=8)
    starts, counts = w.ids[:, 0].unique(return_counts=True)
    assert starts.tolist() == encode('abc') and counts.min() > 40  # three offsets, equally likely


@given(ids=st.lists(st.lists(st.integers(0, 96), min_size=4, max_size=4), min_size=1, max_size=9), size=st.integers(1, 12))
def test_batches_keep_every_window(ids, size):
    w = Windows(torch.tensor(ids), 'x')
    batches = w.batches(size)
    assert torch.cat(batches).tolist() == ids and all(len(b) == size for b in batches[:-1]) and 0 < len(batches[-1]) <= size


def test_fingerprint_is_of_the_numbers_and_their_shape():
    ids = torch.arange(12)
    assert Windows(ids.view(3, 4), 'a').fingerprint != Windows(ids.view(4, 3), 'a').fingerprint
    strided = torch.stack([ids.view(3, 4), -ids.view(3, 4)], -1)[..., 0]
    assert not strided.is_contiguous() and Windows(strided, 'b').fingerprint == Windows(ids.view(3, 4), 'a').fingerprint


# ---- WikiText-2 and the passages ------------------------------------------------------------------------------------

def test_wikitext2_from_a_folder(tmp_path, monkeypatch, tiny_tokenizer, model):
    monkeypatch.setenv('PRUNEBOOK_DATA', str(tmp_path))
    (tmp_path/'wikitext2').mkdir()
    text = ' \n = Título = \n \n'
    (tmp_path/'wikitext2'/'valid.raw').write_text(text, encoding='utf-8')
    assert wikitext2('valid') == text
    with pytest.raises(FileNotFoundError) as e: wikitext2('test')
    assert str(tmp_path/'wikitext2'/'test.raw') in str(e.value) and 'PRUNEBOOK_DATA' in str(e.value)
    (tmp_path/'wikitext2'/'test.raw').write_text('z'*50)
    (tmp_path/'wikitext2'/'valid.raw').write_text('a'*50)
    cal, ev = (load_windows('wikitext2', model, tiny_tokenizer, n=2, seqlen=8, evaluation=e) for e in (False, True))
    assert cal.ids[:, 1:].unique().tolist() == encode('a') and ev.ids[:, 1:].unique().tolist() == encode('z')  # never the same half
    with pytest.raises(ValueError, match='"train"|\'train\''): wikitext2('train')


@pytest.mark.parametrize('error', [ConnectionError('no route'), OSError('offline'), RuntimeError('script'), KeyError('x')])
def test_wikitext2_without_hub(home, monkeypatch, error):
    import datasets

    def unreachable(*_, **__): raise error
    monkeypatch.setattr(datasets, 'load_dataset', unreachable)
    with pytest.raises(FileNotFoundError) as e: wikitext2('test')
    assert 'PRUNEBOOK_DATA' in str(e.value) and 'wikitext2/test.raw' in str(e.value) and type(error).__name__ in str(e.value)


@pytest.mark.parametrize('split, hub_split', [('valid', 'validation'), ('test', 'test')])
def test_wikitext2_from_the_hub(home, monkeypatch, split, hub_split):
    import datasets
    rows = dict(validation=['', ' = V = \n', ''], test=['', ' = T = \n', ''])
    monkeypatch.setattr(datasets, 'load_dataset', lambda path, name, split: dict(text=rows[split]))
    assert wikitext2(split) == f' \n = {hub_split[0].upper()} = \n \n'


@given(st.lists(st.one_of(st.just(' \n'), st.text(st.characters(codec='utf-8', exclude_characters='\n')).filter(str.strip).map(lambda s: s + '\n'))))
def test_rows_to_raw_undoes_what_the_hub_did(lines):
    rows = [line if line.strip() else '' for line in lines]
    assert _rows_to_raw(rows) == ''.join(lines)


def test_passages_are_plain_and_disjoint():
    cal, ev = passages('calibration'), passages('evaluation')
    allowed = set(string.printable) - set('\t\r\x0b\x0c')
    assert set(cal) | set(ev) <= allowed                   # the same tokens under any tokenizer, and on any platform

    def runs(text, n=8):
        words = text.lower().split()
        return {tuple(words[i:i + n]) for i in range(len(words) - n + 1)}
    assert not runs(cal) & runs(ev)                        # not even eight words in a row
    for text in (cal, ev):
        sentences = [s for p in text.split('\n\n') for s in p.split('. ') if s]
        assert len(sentences) == len(set(sentences)) and 25_000 < len(text) < 40_000


# ---- load_windows: files --------------------------------------------------------------------------------------------

@pytest.mark.parametrize('kind', [str, lambda p: p], ids=['str', 'Path'])
def test_file(tmp_path, plain, model, kind):
    text = 'How doth the little crocodile improve his shining tail.\n'
    path = tmp_path/'poem.txt'
    path.write_text(text)
    ev = load_windows(kind(path), model, plain, n=100, seqlen=16, evaluation=True)
    assert ev.ids.tolist() == [encode(text[i:i + 16]) for i in (0, 16, 32)] and 'poem.txt' in repr(ev)
    cal = load_windows(kind(path), model, plain, n=100, seqlen=16, seed=3)
    assert torch.equal(cal.ids, random_windows(text, plain, 100, 16, 3).ids) and str(tmp_path) not in repr(cal)


@pytest.mark.parametrize('data, message', [
    (b'', 'has 0 tokens, too few for one window of 8'), (b'seven!', 'has 6 tokens, too few'),
], ids=['empty', 'short'])
@pytest.mark.parametrize('evaluation', [False, True])
def test_file_without_enough_text(tmp_path, tiny_tokenizer, model, data, message, evaluation):
    (tmp_path/'t.txt').write_bytes(data)
    with pytest.raises(ValueError, match=message): load_windows(tmp_path/'t.txt', model, tiny_tokenizer, n=1, seqlen=8, evaluation=evaluation)


@pytest.mark.parametrize('data, message', [
    ('café au lait, garçon'.encode('latin-1'), 'UTF-8 text .* at byte 3, which is 0xe9'),
    ('A line in UTF-16.'.encode('utf-16'), 'UTF-8 text .* at byte 0'),
    ('A line in UTF-16.'.encode('utf-16-le'), 'byte 1 is NUL'),
    (b'It was written and then' + bytes(4096), 'byte 23 is NUL'),
    (bytes(64), 'byte 0 is NUL'),
    (__import__('gzip').compress(b'A text that was packed.'), 'byte [0-9]'),
    (b'PK\x03\x04\x14\x00\x08\x00 a zip', 'byte [0-9]'),
    (b'Good.\n'*1000 + b'\xff', 'at byte 6000, which is 0xff'),
], ids=['latin-1', 'UTF-16', 'UTF-16 without mark', 'filled up', 'zeros', 'gzip', 'zip', 'one byte'])
@pytest.mark.parametrize('name', ['data.txt', 'data.jsonl', 'data.json'])
def test_file_that_is_not_text(tmp_path, tiny_tokenizer, model, data, message, name):
    (tmp_path/name).write_bytes(data)
    if name == 'data.jsonl' and data.startswith(b'Good'): message = r'line 1 is not JSON \(Expecting value at byte 0\)'
    with pytest.raises(ValueError, match=message) as e: load_windows(tmp_path/name, model, tiny_tokenizer, n=1, seqlen=8)
    assert not isinstance(e.value, UnicodeDecodeError) and name in str(e.value)


def test_marks_and_line_ends_of_other_systems(tmp_path, plain, model):
    (tmp_path/'unix.txt').write_bytes(b'One line.\nAnother line.\n')
    (tmp_path/'windows.txt').write_bytes(b'\xef\xbb\xbfOne line.\r\nAnother line.\r\n')
    a, b = (load_windows(tmp_path/f'{n}.txt', model, plain, n=1, seqlen=20, evaluation=True) for n in ('unix', 'windows'))
    assert a.fingerprint == b.fingerprint


@pytest.mark.parametrize('source', ['.', 'no/such.txt', 'Wikitext2', '', 'The text itself instead of a path. '*20, 'nul\0'],
                         ids=['folder', 'no file', 'misspelt', 'empty', 'text', 'nul'])
def test_what_is_neither_a_name_nor_a_file(tmp_path, tiny_tokenizer, model, monkeypatch, source):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match='neither wikitext2, passages, random, self, nor a file'): load_windows(source, model, tiny_tokenizer, seqlen=8)


# ---- load_windows: documents ----------------------------------------------------------------------------------------

def written(folder, name, rows):
    (folder/name).write_text(''.join(json.dumps(r) + '\n' for r in rows), encoding='utf-8')
    return folder/name


def whole(source, model, tokenizer, **kw):
    "The text of all windows of two tokens, and the windows."
    w = load_windows(source, model, tokenizer, n=10_000, seqlen=2, evaluation=True, **kw)
    return decode(w.ids.flatten().tolist()), w


DOCS = ['The first document.', 'The 2nd one.', 'A third, the last ...']
JOINED = '\n\n'.join(DOCS)
MESSAGES = [[{'role': 'user', 'content': f'What is {i} plus {i}?'}, {'role': 'assistant', 'content': f'It is {2*i}.'}] for i in range(50)]


def as_dataset(rows, **kw):
    from datasets import Dataset
    return Dataset.from_list(rows, **kw)


@pytest.mark.parametrize('kind', ['list', 'tuple', 'jsonl', 'json', 'lines without a name', 'Dataset', 'streamed', 'jsonl with more fields'])
def test_documents_of_every_kind(tmp_path, plain, model, kind):
    rows = [{'id': i, 'text': t} for i, t in enumerate(DOCS)]
    (tmp_path/'docs.json').write_text(json.dumps(DOCS, indent=2), encoding='utf-8')
    source = {'list': lambda: DOCS, 'tuple': lambda: tuple(DOCS), 'jsonl': lambda: written(tmp_path, 'docs.jsonl', [{'text': t} for t in DOCS]),
              'json': lambda: tmp_path/'docs.json', 'lines without a name': lambda: written(tmp_path, 'docs', rows), 'Dataset': lambda: as_dataset(rows),
              'streamed': lambda: as_dataset(rows).to_iterable_dataset(), 'jsonl with more fields': lambda: str(written(tmp_path, 'docs.jsonl', rows))}[kind]()
    text, w = whole(source, model, plain)
    assert len(JOINED) - 2 < len(text) and JOINED.startswith(text)
    assert '3 documents' in w.source and 'joined by blank lines' in w.source and str(tmp_path) not in w.source
    assert ('field text' in w.source) == (kind not in ('list', 'tuple', 'json'))


@pytest.mark.parametrize('kind', ['jsonl', 'Dataset', 'list'])
@pytest.mark.parametrize('template', [None, "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}{{ eos_token }}{% endfor %}"], ids=['none', 'template'])
def test_chats(tmp_path, tiny_tokenizer, plain, model, kind, template):
    rows = [{'id': f'{i:08x}', 'messages': m} for i, m in enumerate(MESSAGES)]
    source = {'jsonl': lambda: written(tmp_path, 'chat.jsonl', rows), 'Dataset': lambda: as_dataset(rows), 'list': lambda: rows}[kind]()
    for base in (plain, tiny_tokenizer):
        t = copy.deepcopy(base)
        t.chat_template = template
        w = load_windows(source, model, t, n=10_000, seqlen=20, evaluation=True)
        adds = base is tiny_tokenizer
        text = decode((w.ids[:, 1:] if adds else w.ids).flatten().tolist())
        assert '{' not in text and '"' not in text and 'content' not in text
        if template is None:
            assert text.startswith('What is 0 plus 0?\n\nIt is 0.\n\nWhat is 1 plus 1?') and 'messages without a chat template, joined by blank lines' in w.source
            continue
        begin = '' if adds else '<1>'                      # never twice
        assert text.startswith(f'{begin}[user] What is 0 plus 0?<2>[assistant] It is 0.<2>{begin}[user] What is 1 plus 1?<2>')
        assert 'messages through the chat template, one after the other' in w.source


def test_documents_are_read_until_there_are_enough(plain, model):
    from datasets import IterableDataset
    read = []

    def endless():
        for i in range(10**9):
            assert i < 1000                               # it is not read to its end
            read.append(i)
            yield {'text': f'The document number {i} of very many. '*4}
    w = load_windows(IterableDataset.from_generator(endless), model, plain, n=4, seqlen=16)
    assert 20 < len(read) < 40 and f'the first {len(read) - 1} documents' in w.source
    assert load_windows(['Only one, but long enough.'], model, plain, n=4, seqlen=16).source.startswith('a list (1 document)')


def test_empty_documents_are_counted(plain, model):
    text, w = whole(['', DOCS[0], ' \n', DOCS[1]], model, plain)
    assert '\n\n'.join(DOCS[:2]).startswith(text) and '2 documents, 2 empty left out' in w.source
    with pytest.raises(ValueError, match='has 0 tokens, too few'): load_windows(['', ''], model, plain, n=1, seqlen=8)
    with pytest.raises(ValueError, match='has 0 tokens, too few'): load_windows([], model, plain, n=1, seqlen=8)


@pytest.mark.parametrize('rows, message', [
    ([{'id': 1, 'body': 'Once.'}], r"line 1 has the fields 'id', 'body'"),
    ([{}], 'line 1 has the fields'),
    ([{'text': 'Once.'}, 7], 'line 2 is int'),
    ([None], 'line 1 is NoneType'),
    ([{'text': 'Once.'}, {'text': None}], 'line 2: text is NoneType'),
    ([{'text': ['Once.']}], 'line 1: text is list'),
    ([{'text': 'Once.'}, {'messages': MESSAGES[0]}], 'line 2 has messages, but the documents before have text'),
    ([{'messages': MESSAGES[0]}, {'messages': []}], 'line 2: messages is not a list'),
    ([{'messages': {'role': 'user'}}], 'line 1: messages is not a list'),
    ([{'messages': [{'role': 'user', 'content': None}]}], 'line 1: messages is not a list'),
    ([{'text': 'half \ud800'}], 'line 1 is not UTF-8 text .* at byte 5'),
    ([{'text': 'a\0b'}], 'line 1 is not text: byte 1 is NUL'),
])
def test_rows_that_are_no_documents(tmp_path, tiny_tokenizer, model, rows, message):
    with pytest.raises(ValueError, match=message): load_windows(written(tmp_path, 'rows.jsonl', rows), model, tiny_tokenizer, n=1, seqlen=8)
    with pytest.raises(ValueError, match=message.replace('line', 'document')): load_windows(rows, model, tiny_tokenizer, n=1, seqlen=8)


def test_chat_that_the_template_refuses(tiny_tokenizer, model):
    t = copy.deepcopy(tiny_tokenizer)
    t.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(ValueError, match='document 1: the chat template .* refuses .*roles must alternate'): load_windows([{'messages': MESSAGES[0]}], model, t, n=1, seqlen=8)


@pytest.mark.parametrize('data, message', [
    (b'{"text": "a"}\n\n{"text": }\n', r'rows.jsonl, line 3 is not JSON \(Expecting value at byte 24\)'),
    ('{"text": "Über"}\n{"text": "half'.encode(), 'line 2 is not JSON .* at byte 27'),
    (b'{"text": "a"}\n{"text": "\xe9"}\n', 'line 2 is not UTF-8 text .* at byte 24'),
    (b'{"text": "a"}\n' + bytes(40), 'line 2 is not text: byte 14 is NUL'),
    (b'['*100_000, 'line 1 is not JSON'),
    (b'9'*5000, 'line 1 is not JSON'),
])
def test_damaged_json_lines(tmp_path, tiny_tokenizer, model, data, message):
    (tmp_path/'rows.jsonl').write_bytes(data)
    with pytest.raises(ValueError, match=message): load_windows(tmp_path/'rows.jsonl', model, tiny_tokenizer, n=1, seqlen=8)


@pytest.mark.parametrize('source, message', [
    ({'train': DOCS}, "dict of 'train'; choose one"), (7, 'cannot be read from int'), (None, 'cannot be read from NoneType'),
    (b'bytes', 'cannot be read from bytes'), ({'a', 'set'}, 'cannot be read from set'), (iter(DOCS), 'cannot be read from'),
])
def test_what_is_no_source(tiny_tokenizer, model, source, message):
    with pytest.raises(ValueError, match=message): load_windows(source, model, tiny_tokenizer, n=1, seqlen=8)


def test_one_json_value_is_no_list_of_documents(tmp_path, tiny_tokenizer, model):
    (tmp_path/'one.json').write_text('{"text":\n "a"}', encoding='utf-8')
    with pytest.raises(ValueError, match='one.json holds one JSON dict'): load_windows(tmp_path/'one.json', model, tiny_tokenizer, n=1, seqlen=8)


# ---- load_windows: the hub ------------------------------------------------------------------------------------------

@pytest.fixture
def hub(monkeypatch):
    "A hub with one data set, of which what was asked for is kept."
    import datasets
    asked = []

    def load_dataset(name, configuration=None, **options):
        asked.append((name, configuration))
        if name != 'garden/winter': raise FileNotFoundError(f'no {name}')
        return datasets.DatasetDict(train=as_dataset([{'text': 'calibrate '*9}]), validation=as_dataset([{'text': 'evaluate '*9}]))
    monkeypatch.setattr(datasets, 'load_dataset', load_dataset)
    return asked


def test_hub_dataset(hub, tmp_path, monkeypatch, plain, model):
    monkeypatch.chdir(tmp_path)
    cal, ev = (load_windows('garden/winter:fr', model, plain, n=2, seqlen=40, evaluation=e) for e in (False, True))
    assert hub == [('garden/winter', 'fr')]*2
    assert 'calibrate' in decode(cal.ids[0].tolist()) and decode(ev.ids[0].tolist()).startswith('evaluate')
    assert cal.source.startswith('garden/winter:fr, split train (1 document, field text)') and 'split validation' in ev.source


def test_hub_dataset_without_the_split(hub, plain, model, monkeypatch):
    import datasets
    monkeypatch.setattr(datasets, 'load_dataset', lambda *_, **__: datasets.DatasetDict(train=as_dataset([{'text': 'a'}])))
    with pytest.raises(ValueError, match='no split test or validation, but train'): load_windows('garden/winter', model, plain, n=2, seqlen=40, evaluation=True)


def test_names_that_are_not_on_the_hub(hub, tmp_path, monkeypatch, plain, model):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"'garden/summer' is neither .* no data set of the hub in reach \(FileNotFoundError: no garden/summer\)"):
        load_windows('garden/summer', model, plain, n=2, seqlen=8)
    hub.clear()
    for name in ('private/letters.txt', 'C:/letters', 'garden', '/garden/winter', 'a/b/c', '../winter', 'letters\\winter'):
        with pytest.raises(ValueError, match='neither wikitext2'): load_windows(name, model, plain, n=2, seqlen=8)
    assert hub == []                                       # a misspelt path is not sent anywhere


def test_a_hub_that_does_not_answer_is_asked_once(monkeypatch, home, plain, model):
    "`load_dataset` itself tries for half a minute."
    from huggingface_hub import HfApi, constants

    def silent(self, name, timeout=None, **_):
        assert timeout <= 5
        raise ConnectionError('no route')
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', False)
    monkeypatch.setattr(HfApi, 'dataset_info', silent)
    start = time.perf_counter()
    with pytest.raises(FileNotFoundError, match='ConnectionError.*PRUNEBOOK_DATA'): wikitext2('test')
    with pytest.raises(ValueError, match='ConnectionError: no route'): load_windows('garden/winter', model, plain, n=2, seqlen=8)
    assert time.perf_counter() - start < 5


# ---- the token in front ---------------------------------------------------------------------------------------------

def prefixed(plain, template, specials):
    from tokenizers.processors import TemplateProcessing
    t = copy.deepcopy(plain)
    t.backend_tokenizer.post_processor = TemplateProcessing(single=template, special_tokens=specials)
    return t


def test_beginning_is_what_the_tokenizer_does(plain, tiny_tokenizer):
    assert plain.bos_token_id == 1 and beginning(plain) == []                                 # has one, and does not use it
    assert beginning(tiny_tokenizer) == beginning(plain, True) == beginning(tiny_tokenizer, True) == [1]
    assert beginning(tiny_tokenizer, False) == beginning(plain, False) == []
    assert beginning(prefixed(plain, '</s> $A', [('</s>', 2)])) == [2]                        # OPT begins with its </s>
    assert beginning(prefixed(plain, '$A </s>', [('</s>', 2)])) == []
    assert beginning(prefixed(plain, '<s> $A </s>', [('<s>', 1), ('</s>', 2)])) == [1]
    assert beginning(prefixed(plain, '<unk> <s> $A', [('<s>', 1), ('<unk>', 3)])) == [3, 1]


def test_bos_that_is_not_there(plain, model):
    t = copy.deepcopy(plain)
    t.bos_token = None
    with pytest.raises(ValueError, match='no beginning-of-text token'): load_windows('passages', model, t, n=2, seqlen=8, bos=True)
    assert load_windows('passages', model, t, n=2, seqlen=8).source == 'passages, random offsets, seed 0'
    for bos in ('yes', 3):
        with pytest.raises(ValueError, match=f'bos is {bos!r}'): load_windows('passages', model, t, n=2, seqlen=8, bos=bos)


@pytest.mark.parametrize('source', ['passages', 'random', 'self', 'list'])
@pytest.mark.parametrize('evaluation', [False, True])
@pytest.mark.parametrize('family', ['gemma', 'llama'])
def test_windows_begin_as_the_tokenizer_does(tiny_tokenizer, plain, source, evaluation, family):
    model, text = tiny_model(family), ['Once upon a time. '*20] if source == 'list' else source
    def windows(t, bos=None): return load_windows(text, model, t, n=4, seqlen=16, evaluation=evaluation, bos=bos)
    added, bare, left_out, asked = windows(tiny_tokenizer), windows(plain), windows(tiny_tokenizer, False), windows(plain, True)
    assert added.ids.shape == bare.ids.shape == (4, 16)
    assert (added.ids[:, 0] == 1).all() and not (bare.ids[:, 0] == 1).all()
    assert torch.equal(asked.ids, added.ids) and torch.equal(left_out.ids, bare.ids) and added.fingerprint != bare.fingerprint
    assert added.source == asked.source == f'{bare.source}, each after <s>' and left_out.source == f'{bare.source}, no beginning-of-text token'


@given(text=texts, n=st.one_of(st.none(), st.integers(1, 40)), data=st.data(), first=st.sampled_from(['<s>', '<unk> <s>']))
def test_windows_with_a_token_in_front_rebuild_the_text(plain, text, n, data, first):
    ids = dict([('<s>', 1), ('<unk>', 3)])
    t, k = prefixed(plain, f'{first} $A', list(ids.items())), len(first.split())
    seqlen = data.draw(st.integers(k + 1, len(text) + k))
    w, length = side_by_side_windows(text, t, n, seqlen), seqlen - k
    count = len(text)//length if n is None else min(n, len(text)//length)
    assert w.ids.shape == (count, seqlen) and w.ids[:, k:].flatten().tolist() == encode(text)[:count*length]
    pieces = [encode(text[i:i + length]) for i in range(len(text) - length + 1)]
    r = random_windows(text, t, 5, seqlen)
    assert r.ids.shape == (5, seqlen) and all(row in pieces for row in r.ids[:, k:].tolist())
    assert r.ids[:, :k].tolist() == [[ids[f] for f in first.split()]]*5
    with pytest.raises(ValueError, match='too few|needs at least 2'): side_by_side_windows(text, t, n, len(text) + k + 1)


def test_a_window_holds_more_than_what_it_begins_with(plain, model):
    t = prefixed(plain, '<unk> <s> $A', [('<s>', 1), ('<unk>', 3)])
    for source in ('passages', 'random', 'self'):
        with pytest.raises(ValueError, match='at least 3'): load_windows(source, model, t, n=1, seqlen=2)
        assert load_windows(source, model, t, n=1, seqlen=3).ids[0, :2].tolist() == [3, 1]


def test_what_is_written_follows_the_token_in_front(tiny_tokenizer):
    "Gemma writes after its token, not after the one of the configuration."
    model = tiny_model('gemma')
    model.config.bos_token_id = 7
    ids = load_windows('self', model, tiny_tokenizer, n=1, seqlen=12).ids
    greedy = self_generated(model, n=1, seqlen=12, temperature=1e-5, first=[1]).ids
    with torch.no_grad(): logits = model(greedy).logits[0, :-1]
    assert ids[0, 0] == greedy[0, 0] == 1
    assert (logits.max(-1).values - logits.gather(-1, greedy[0, 1:, None])[:, 0]).max() < 1e-3


# ---- load_windows: what the model can read --------------------------------------------------------------------------

SOURCES = ['passages', 'random', 'self']


@pytest.mark.parametrize('source', SOURCES)
@pytest.mark.parametrize('n', [0, -1])
def test_no_windows(tiny_tokenizer, model, source, n):
    with pytest.raises(ValueError, match=f'n is {n}; at least 1'): load_windows(source, model, tiny_tokenizer, n=n, seqlen=8)


@pytest.mark.parametrize('source', SOURCES)
@pytest.mark.parametrize('seqlen', [1, 0, -1])
def test_windows_without_a_next_token(tiny_tokenizer, model, source, seqlen):
    with pytest.raises(ValueError, match=r'at least 2|non-empty \(n, seqlen\)'): load_windows(source, model, tiny_tokenizer, n=2, seqlen=seqlen)


@pytest.mark.parametrize('source', SOURCES)
@pytest.mark.parametrize('family', ['llama', 'gpt2', 'opt'])
def test_windows_longer_than_the_positions(tiny_tokenizer, monkeypatch, source, family):
    model = tiny_model(family)
    assert load_windows(source, model, tiny_tokenizer, n=2, seqlen=64).ids.shape == (2, 64)

    def called(*_, **__): raise AssertionError('the model was run before the length was checked')
    monkeypatch.setattr(model, 'forward', called)
    with pytest.raises(ValueError, match='choose seqlen <= 64'): load_windows(source, model, tiny_tokenizer, n=2, seqlen=65)


def test_windows_of_another_tokenizer(tiny_tokenizer):
    small = tiny_model('llama', vocab_size=50)
    with pytest.raises(ValueError, match='outside the vocabulary of 50'): load_windows('passages', small, tiny_tokenizer, n=4, seqlen=32)


@pytest.mark.parametrize('source', SOURCES)
def test_seed(tiny_tokenizer, model, source):
    before = torch.random.get_rng_state()
    a, b, c = (load_windows(source, model, tiny_tokenizer, n=5, seqlen=12, seed=s) for s in (4, 4, 5))
    assert a.ids.shape == (5, 12) and a.fingerprint == b.fingerprint != c.fingerprint and repr(a) == repr(b) != repr(c)
    assert torch.equal(before, torch.random.get_rng_state())  # nobody else's random numbers are used up


def test_random_tokens_are_uniform(model):
    n = 40_000
    counts = random_tokens(model, n=n//20, seqlen=20).ids.flatten().bincount(minlength=97)
    expected = n/97
    chi2 = ((counts - expected)**2/expected).sum().item()
    assert len(counts) == 97 and abs(chi2 - 96) < 5*(2*96)**.5


# ---- what the model writes ------------------------------------------------------------------------------------------

@torch.no_grad()
def next_probs(model, ids, temperature=1.): return (model(torch.tensor([ids])).logits[0, -1]/temperature).softmax(-1)


@pytest.mark.parametrize('family, temperature', [('llama', 1.), ('gpt2', .3), ('mistral', 2.)])
def test_first_token_is_drawn_from_the_softmax(family, temperature):
    model, n = tiny_model(family), 20_000
    ids = self_generated(model, n=n, seqlen=2, temperature=temperature, batch_size=5000).ids
    for seen, p in [(ids[:, 0], next_probs(model, [1], temperature)),
                    (ids[ids[:, 0] == (top := ids[:, 0].mode().values.item()), 1], next_probs(model, [1, top], temperature))]:  # and the second, given the first
        counts = seen.bincount(minlength=97)
        stderr = (len(seen)*p*(1 - p)).sqrt()
        assert ((counts - len(seen)*p).abs() <= 5*stderr + 1).all()


@pytest.mark.parametrize('family', TINY)
def test_the_cache_changes_nothing(family):
    "What is written token by token with a cache is what the whole sequence predicts, past the sliding window of mistral too."
    model = tiny_model(family)
    ids = self_generated(model, n=3, seqlen=24, temperature=1e-5, batch_size=2).ids
    with torch.no_grad(): logits = model(torch.cat([torch.ones(3, 1, dtype=torch.long), ids], 1)).logits[:, :-1]
    gap = logits.max(-1).values - logits.gather(-1, ids[..., None])[..., 0]
    assert gap.max() < 1e-3                                # the token of the highest logit, up to rounding


@pytest.mark.parametrize('n, batch_size', [(1, 16), (5, 2), (4, 4)])
def test_number_written(model, n, batch_size): assert self_generated(model, n=n, seqlen=3, batch_size=batch_size).ids.shape == (n, 3)


def test_first_token_without_bos(tiny_tokenizer):
    model = tiny_model('llama')
    model.config.bos_token_id = None
    n = 2000
    counts = self_generated(model, n=n, seqlen=2, batch_size=n).ids[:, 0].bincount(minlength=97)
    p = next_probs(model, [2])                             # after the end-of-text token then
    assert ((counts - n*p).abs() <= 5*(n*p*(1 - p)).sqrt() + 1).all()


def test_first_token_of_several_eos(tiny_tokenizer):
    model = tiny_model('llama')
    model.config.bos_token_id, model.config.eos_token_id = None, [2, 3]
    assert load_windows('self', model, tiny_tokenizer, n=2, seqlen=4).ids.shape == (2, 4)


def test_model_without_bos_and_eos(tiny_tokenizer):
    "As in the configuration of phi-1: either the tokenizer helps or the error says what is missing."
    model = tiny_model('phi')
    model.config.bos_token_id = model.config.eos_token_id = None
    try: assert load_windows('self', model, tiny_tokenizer, n=2, seqlen=4).ids.shape == (2, 4)
    except ValueError as e: assert 'bos' in str(e).lower() or 'beginning' in str(e)

"""Windows are cut where they should be, and every source of text answers for itself."""
import string

import pytest
import torch
from conftest import CHARS
from hypothesis import given
from hypothesis import strategies as st

from prunebook.models import TINY, tiny_model
from prunebook.text import (Windows, _rows_to_raw, load_windows, passages, random_tokens, random_windows, self_generated,
                            side_by_side_windows, wikitext2)

pytestmark = pytest.mark.usefixtures('one_thread')
texts = st.text(alphabet=CHARS, min_size=2, max_size=60)


def encode(text): return [4 + CHARS.index(c) for c in text]  # by hand: no special tokens


@pytest.fixture(scope='module')
def model(): return tiny_model('llama')


# ---- cutting --------------------------------------------------------------------------------------------------------

@given(text=texts, n=st.integers(1, 6), seed=st.integers(0, 2**40), data=st.data())
def test_random_windows_are_pieces_of_the_text(tiny_tokenizer, text, n, seed, data):
    seqlen = data.draw(st.integers(2, len(text)))
    w = random_windows(text, tiny_tokenizer, n, seqlen, seed)
    pieces = [encode(text[i:i + seqlen]) for i in range(len(text) - seqlen + 1)]
    assert w.ids.shape == (n, seqlen) and w.ids.dtype == torch.int64
    assert all(row in pieces for row in w.ids.tolist())
    again = random_windows(text, tiny_tokenizer, n, seqlen, seed)
    assert again.fingerprint == w.fingerprint and repr(again) == repr(w)


@given(text=texts, n=st.one_of(st.none(), st.integers(1, 40)), data=st.data())
def test_side_by_side_windows_rebuild_the_text(tiny_tokenizer, text, n, data):
    seqlen = data.draw(st.integers(2, len(text)))
    w = side_by_side_windows(text, tiny_tokenizer, n, seqlen)
    count = len(text)//seqlen if n is None else min(n, len(text)//seqlen)
    assert w.ids.shape == (count, seqlen)
    assert w.ids.flatten().tolist() == encode(text)[:count*seqlen]
    assert w.fingerprint == side_by_side_windows(text, tiny_tokenizer, n, seqlen).fingerprint


@given(text=texts, more=st.integers(1, 500), cut=st.sampled_from([random_windows, side_by_side_windows]))
def test_text_shorter_than_a_window(tiny_tokenizer, text, more, cut):
    with pytest.raises(ValueError, match=f'has {len(text)} tokens, too few for one window of {len(text) + more}'):
        cut(text, tiny_tokenizer, n=1, seqlen=len(text) + more)


def test_random_windows_reach_both_ends(tiny_tokenizer):
    w = random_windows('abcdefghij', tiny_tokenizer, n=200, seqlen=8)
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
    assert cal.ids.unique().tolist() == encode('a') and ev.ids.unique().tolist() == encode('z')  # never the same half
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
def test_file(tmp_path, tiny_tokenizer, model, kind):
    text = 'How doth the little crocodile improve his shining tail.\n'
    path = tmp_path/'poem.txt'
    path.write_text(text)
    ev = load_windows(kind(path), model, tiny_tokenizer, n=100, seqlen=16, evaluation=True)
    assert ev.ids.tolist() == [encode(text[i:i + 16]) for i in (0, 16, 32)] and 'poem.txt' in repr(ev)
    cal = load_windows(kind(path), model, tiny_tokenizer, n=100, seqlen=16, seed=3)
    assert torch.equal(cal.ids, random_windows(text, tiny_tokenizer, 100, 16, 3).ids) and str(tmp_path) not in repr(cal)


@pytest.mark.parametrize('data, message', [
    (b'', 'has 0 tokens, too few for one window of 8'), (b'seven b', 'has 7 tokens, too few'),
], ids=['empty', 'short'])
@pytest.mark.parametrize('evaluation', [False, True])
def test_file_without_enough_text(tmp_path, tiny_tokenizer, model, data, message, evaluation):
    (tmp_path/'t.txt').write_bytes(data)
    with pytest.raises(ValueError, match=message): load_windows(tmp_path/'t.txt', model, tiny_tokenizer, n=1, seqlen=8, evaluation=evaluation)


def test_file_that_is_not_utf8(tmp_path, tiny_tokenizer, model):
    (tmp_path/'latin.txt').write_bytes('café au lait, garçon'.encode('latin-1'))
    with pytest.raises(ValueError) as e: load_windows(tmp_path/'latin.txt', model, tiny_tokenizer, n=1, seqlen=8)
    assert not isinstance(e.value, UnicodeDecodeError) and 'latin.txt' in str(e.value) and 'UTF-8' in str(e.value)


@pytest.mark.parametrize('source', ['.', 'no/such.txt', 'Wikitext2', '', 'The text itself instead of a path. '*20, 'nul\0'],
                         ids=['folder', 'no file', 'misspelt', 'empty', 'text', 'nul'])
def test_what_is_neither_a_name_nor_a_file(tmp_path, tiny_tokenizer, model, monkeypatch, source):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match='neither wikitext2, passages, random, self, nor a file'): load_windows(source, model, tiny_tokenizer)


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

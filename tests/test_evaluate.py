"""Losses against transformers itself, errors against their formulas, and a zero-shot task of our own."""
import ast
import configparser
import copy
import functools
import json
import logging
import math
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import matplotlib
import pytest
import torch
from torch.nn import functional as F

from prunebook import evaluate
from prunebook.evaluate import (Perplexity, counted_flops, loss_difference, measure, peak_memory, perplexity, plot_report, report_table,
                                speed, weight_bytes, window_losses)
from prunebook.couplings import anatomy
from prunebook.models import TINY, decoder_linears, n_parameters, tiny_model
from prunebook.text import Windows, load_windows, random_tokens, self_generated

matplotlib.use('Agg')
pytestmark = pytest.mark.usefixtures('one_thread')


def doubles(*numbers): return Perplexity(torch.tensor(numbers, dtype=torch.float64))


# ---- losses ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('family', TINY)
def test_perplexity_is_that_of_transformers(family):
    model = tiny_model(family)
    w = random_tokens(model, n=5, seqlen=20)
    with torch.no_grad(): loss = model(w.ids, labels=w.ids).loss.item()  # windows are equally long: the mean of means
    assert perplexity(model, w).value == pytest.approx(math.exp(loss), rel=1e-5)


@pytest.mark.parametrize('family', ['llama', 'mistral', 'gpt2', 'opt'])
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_batch_size_does_not_matter(family, dtype):
    model = tiny_model(family).to(dtype)
    w = random_tokens(model, n=7, seqlen=33)
    alone = window_losses(model, w, batch_size=1)
    assert alone.shape == (7,) and alone.dtype == torch.float64
    for size in (2, 3, 7, 50): assert (window_losses(model, w, batch_size=size) - alone).abs().max() < 1e-5
    assert alone.std() > .01                               # and the windows keep their order: they differ by far more


def test_windows_are_causal_and_apart():
    model = tiny_model('llama')
    w = random_tokens(model, n=3, seqlen=16)
    changed = Windows(w.ids.clone(), 'x')
    changed.ids[1] = (changed.ids[1] + 1) % 97
    difference = (window_losses(model, w, 3) - window_losses(model, changed, 3)).abs()
    assert difference[1] > 1e-3 and difference[[0, 2]].max() < 1e-6


def test_bfloat16_model_gets_float32_cross_entropy():
    model = tiny_model('llama').bfloat16()
    w = random_tokens(model, n=4, seqlen=40)
    with torch.no_grad(): logits = model(w.ids).logits
    assert logits.dtype == torch.bfloat16
    exact = torch.stack([F.cross_entropy(l[:-1].double(), i[1:]) for l, i in zip(logits, w.ids)])
    coarse = torch.stack([F.cross_entropy(l[:-1], i[1:]).double() for l, i in zip(logits, w.ids)])
    error = (window_losses(model, w, batch_size=4) - exact).abs().max()
    assert error < 2e-6 < 1e-4 < (coarse - exact).abs().max()


def test_too_long_windows_are_refused():
    model = tiny_model('gpt2')
    with pytest.raises(ValueError, match='seqlen <= 64'): perplexity(model, random_tokens(model, n=1, seqlen=65))


@pytest.mark.parametrize('family', ['gemma', 'llama'])
def test_with_a_token_in_front_every_token_of_the_text_is_predicted_once(tiny_tokenizer, family):
    model, text = tiny_model(family), 'Once upon a time there was a text of sixty characters in all'
    w = load_windows([text], model, tiny_tokenizer, n=9, seqlen=16, evaluation=True)
    ids, total = tiny_tokenizer(text, add_special_tokens=False).input_ids, 0.
    assert len(ids) == 60 and len(w) == 4                  # four windows of 15 characters
    with torch.no_grad():
        for i, x in enumerate(ids): total -= model(torch.tensor([[1, *ids[i//15*15:i]]])).logits[0, -1].log_softmax(-1)[x].item()
    assert perplexity(model, w).value == pytest.approx(math.exp(total/60), rel=1e-4)


# ---- errors ---------------------------------------------------------------------------------------------------------

def test_stderr():
    p = doubles(1., 2., 3., 4.)
    assert p.value == pytest.approx(math.exp(2.5))
    assert p.stderr == pytest.approx(math.exp(2.5)*math.sqrt(5/3)/2)  # sample variance 5/3 of four windows, times the derivative
    assert repr(p) == '12.18 ± 7.86'
    assert doubles(1., 1., 1.).stderr == 0


@pytest.mark.filterwarnings('error')
def test_one_window_has_no_stderr():
    p = doubles(2.)
    assert p.value == pytest.approx(math.exp(2)) and math.isnan(p.stderr) and repr(p) == '7.39 ± nan'
    mean, err = loss_difference(p, doubles(2.5))
    assert mean == pytest.approx(.5) and math.isnan(err)


def test_loss_difference_is_paired():
    before = torch.linspace(1, 9, 16, dtype=torch.float64)  # windows that differ much
    rise = torch.tensor([.1, .3]*8, dtype=torch.float64)
    mean, err = loss_difference(Perplexity(before), Perplexity(before + rise))
    assert mean == pytest.approx(.2) and err == pytest.approx(.1*math.sqrt(16/15)/4)
    back, same = loss_difference(Perplexity(before + rise), Perplexity(before))
    assert (back, same) == (pytest.approx(-mean), pytest.approx(err))
    _, unpaired = loss_difference(Perplexity(before), Perplexity((before + rise).flip(0)))
    assert unpaired > 20*err


# ---- bytes, memory and speed ----------------------------------------------------------------------------------------

@pytest.mark.parametrize('family', TINY)
def test_weight_bytes(family):
    model = tiny_model(family)
    expected = sum(p.numel() for p in model.parameters())  # `parameters` itself leaves out what is tied
    expected += sum(b.numel() for b in {b.data_ptr(): b for b in model.buffers()}.values())
    assert weight_bytes(model) == 4*expected
    head, embedding = model.lm_head, model.get_input_embeddings()
    if model.config.tie_word_embeddings: head.weight = torch.nn.Parameter(embedding.weight.detach().clone())
    untied = weight_bytes(model)
    head.weight = torch.nn.Parameter(embedding.weight.detach())  # two parameters, one memory
    assert untied - weight_bytes(model) == 4*97*24


def test_weight_bytes_of_a_narrow_dtype():
    model = tiny_model('gpt2')
    assert weight_bytes(model.bfloat16())*2 == weight_bytes(tiny_model('gpt2'))


def may_reset():
    try:
        with open('/proc/self/clear_refs', 'w') as f: f.write('5')
    except OSError: return False
    return True


def test_peak_memory():
    resets = may_reset()
    torch.ones(300, 1024, 1024, dtype=torch.uint8)         # an earlier peak, which must not count
    with peak_memory() as m:
        block = torch.ones(100, 1024, 1024, dtype=torch.uint8)
        assert not m                                       # nothing is known before the end
    assert m['extra'] > 90*2**20 and m['peak'] >= m['extra']
    if not resets: return                             # without a reset the peak is that of the whole process
    assert m['extra'] < 130*2**20
    with peak_memory() as later: block[0] += 1             # held all the while, so not on top of the start
    assert later['extra'] < 20*2**20 and later['peak'] > 100*2**20


def test_a_short_peak_is_seen():
    if not may_reset(): pytest.skip('the mark of this system cannot be reset')
    with peak_memory() as m:
        before = evaluate._resident('VmRSS')
        del_me = torch.ones(150, 1024, 1024, dtype=torch.uint8)
        del del_me
        after = evaluate._resident('VmRSS')
    assert after - before < 30*2**20 < 140*2**20 < m['extra'] < 180*2**20                     # it was gone before the end


def test_peak_memory_without_a_mark_that_can_be_reset(monkeypatch):
    "As on macOS and Windows: never below the truth, and what the process held before is not counted as extra."
    held = torch.ones(64, 1024, 1024, dtype=torch.uint8)
    real = os.path.exists
    monkeypatch.setattr(evaluate.os.path, 'exists', lambda p: p != '/proc/self/clear_refs' and real(p))
    with peak_memory() as m: block = torch.ones(100, 1024, 1024, dtype=torch.uint8)
    assert m['extra'] > 90*2**20 and m['peak'] - m['extra'] > held.numel() + 50*2**20
    assert m['peak'] > block.numel() + held.numel()


WITHOUT = """
import builtins, importlib, pkgutil, sys
real = builtins.__import__
def of_windows(name, globals=None, locals=None, fromlist=(), level=0):
    if name in ('resource', 'fcntl', 'pwd', 'grp', 'termios', 'readline') and str((globals or {}).get('__name__', '')).startswith('prunebook'):
        raise ModuleNotFoundError(f'No module named {name!r}')
    return real(name, globals, locals, fromlist, level)
builtins.__import__ = of_windows
import prunebook
names = [m.name for m in pkgutil.iter_modules(prunebook.__path__)]
assert 'evaluate' in names and len(names) > 15
for n in names: importlib.import_module(f'prunebook.{n}')
"""


def test_everything_imports_without_the_modules_that_windows_lacks():
    done = subprocess.run([sys.executable, '-c', WITHOUT], capture_output=True, encoding='utf-8')
    assert done.returncode == 0, done.stderr[-2000:]


def opened_as_text(source):
    "Lines where a file is opened as text without naming the encoding."
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call): continue
        name = getattr(node.func, 'attr', getattr(node.func, 'id', ''))
        mode = node.args[isinstance(node.func, ast.Name):][:1] if name == 'open' else []      # open(path, mode), path.open(mode)
        binary = any(isinstance(a, ast.Constant) and 'b' in str(a.value) for a in mode)
        if isinstance(node.func, ast.Attribute) and any(isinstance(a, ast.Name) for a in mode): continue   # a source opens a block
        if name in ('open', 'read_text', 'write_text') and 'encoding' not in [k.arg for k in node.keywords] and not binary: yield node.lineno


def test_text_files_are_opened_as_utf8():
    "On Windows the default is another encoding."
    assert list(opened_as_text("open('b')\nopen('a', 'rb')\nopen('a', 'w', encoding='utf-8')\np.read_text()\np.write_text('b')\np.open('b')")) == [1, 4, 5]
    modules = list(Path(evaluate.__file__).parent.glob('*.py'))
    assert len(modules) > 15
    assert {p.name: lines for p in modules if (lines := list(opened_as_text(p.read_text(encoding='utf-8'))))} == {}


@pytest.mark.parametrize('family', ['llama', 'gpt2', 'opt', 'mistral'])
def test_speed(family):
    rates = speed(tiny_model(family), prompt=40, new=4, batch_size=2, repeats=3)
    assert list(rates) == ['prefill', 'decode']
    assert all(0 < low <= median <= high < math.inf for median, low, high in rates.values())
    assert rates['prefill'][0] > rates['decode'][0]        # 40 tokens at once against one by one


def test_caches_have_the_name_of_this_version(monkeypatch):
    said = []
    monkeypatch.setattr(logging.Logger, 'warning_once', lambda self, message, *args: said.append(message))
    for family in TINY: speed(tiny_model(family), prompt=8, new=1, repeats=1)
    self_generated(tiny_model('llama'), n=1, seqlen=4)
    assert not [s for s in said if 'deprecated' in s]


@pytest.mark.parametrize('family', TINY)
def test_attention_is_counted(family):
    "Two products for each pair of positions and channel of a query head, and two operations for each."
    model, ids = tiny_model(family), torch.arange(3, 35).view(2, 16)
    layers = [*decoder_linears(model).values(), model.lm_head]
    read = sum(b.heads*(b.head_dim + b.value_dim) for b in anatomy(model))
    by_hand = ids.numel()*(sum(2*layer.weight.numel() for layer in layers) + 2*16*read)
    assert by_hand <= counted_flops(lambda: model(ids)) < 1.01*by_hand


def test_speed_counts_tokens_and_runs(monkeypatch):
    "With a clock of our own: the first run is not counted, tokens are those of the whole batch."
    seconds = {'prefill': iter([100., 2., 1., 4.]), 'decode': iter([100., .5, .25, .2])}
    calls = []

    def timed(f, device):
        f()
        calls.append(f.__name__)
        return next(seconds[f.__name__])
    monkeypatch.setattr(evaluate, '_timed', timed)
    rates = speed(tiny_model('llama'), prompt=20, new=3, batch_size=2, repeats=3)
    assert rates['prefill'] == (20., 10., 40.) and rates['decode'] == pytest.approx((24., 12., 30.))
    assert calls == ['prefill', 'decode']*4


# ---- reports --------------------------------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def pair(tiny_tokenizer):
    "Measurements of a tiny model and of one with a block less."
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    models = tiny_model('llama'), tiny_model('llama', num_hidden_layers=2)
    w = load_windows('passages', models[0], tiny_tokenizer, n=6, seqlen=32, evaluation=True)
    out = models, w, [measure(m, tiny_tokenizer, w, prompt='The old', new=8) for m in models]
    torch.set_num_threads(threads)
    return out


def test_measure(pair, tiny_tokenizer):
    models, w, measured = pair
    for model, m in zip(models, measured):
        assert torch.equal(m['perplexity'].losses, window_losses(model, w))
        assert m['parameters'] == sum(p.numel() for p in model.parameters()) and m['bytes'] == weight_bytes(model)
        assert m['linear_parameters'] == n_parameters(decoder_linears(model).values()) < m['parameters']
        assert m['windows'] == repr(w) and list(m['speed']) == ['prefill', 'decode']
        ids = tiny_tokenizer('The old').input_ids
        with torch.no_grad():
            for _ in range(8):
                ids = [*ids, model(torch.tensor([ids])).logits[0, -1].argmax().item()]
                if ids[-1] == 2: break
        assert m['sample'] == tiny_tokenizer.decode(ids, skip_special_tokens=True) and m['sample'].startswith('The old')


def test_measure_of_learned_positions(tiny_tokenizer):
    model = tiny_model('gpt2', n_positions=300)
    m = measure(model, tiny_tokenizer, random_tokens(model, n=2, seqlen=16), new=3)
    assert m['speed']['decode'][1] > 0 and m['linear_parameters'] == n_parameters(decoder_linears(model).values())


def cells(line): return [c.strip() for c in line.strip('|').split('|')]


def test_report_table(pair):
    _, w, (before, after) = pair
    lines = report_table(before, after).splitlines()
    rows = {cells(l)[0]: cells(l)[1:] for l in lines if l.startswith('|')}
    assert len(rows) == 8 and all(len(r) == 3 for r in rows.values())
    assert rows['perplexity'] == [repr(before['perplexity']), repr(after['perplexity']), f'{after["perplexity"].value/before["perplexity"].value:.2f}']
    assert rows['in decoder linears'][2] == '0.67'         # two blocks of three
    assert float(rows['parameters'][2]) == pytest.approx(after['parameters']/before['parameters'], abs=.006)
    assert lines[-3].startswith('> **before:** The old') or lines[-4].startswith('> **before:** The old')
    rise, err = loss_difference(before['perplexity'], after['perplexity'])
    assert f'rises by {rise:.3f} ± {err:.3f} nats' in '\n'.join(lines) and w.fingerprint in '\n'.join(lines)


def test_samples_of_several_paragraphs_stay_quotations(pair):
    before, after = (dict(m, sample='The old keeper.\n\n# Chapter\n| a |\n\nEnd') for m in pair[2])
    tail = report_table(before, after).split('nats per token')[1].splitlines()[1:]
    assert sum('End' in l for l in tail) == 2
    assert [l for l in tail if l and not l.startswith('>')] == []


def test_plot_report(pair):
    import matplotlib.pyplot as plt
    before, after = pair[2]
    fig = plot_report(before, after, 'a title')
    try:
        ax, = fig.axes
        labels = [t.get_text() for t in ax.get_yticklabels()]
        widths = dict(zip(labels, (p.get_width() for p in ax.patches)))
        assert len(ax.patches) >= 6 and len(labels) == len(ax.patches) and ax.get_title() == 'a title'
        assert widths['perplexity'] == pytest.approx(after['perplexity'].value/before['perplexity'].value)
        assert widths['in decoder linears'] == pytest.approx(2/3)
        assert widths['decode, tokens/s'] == pytest.approx(after['speed']['decode'][0]/before['speed']['decode'][0])
        shown = [t.get_text() for t in ax.texts]
        assert [f'{w:.2f}' for w in widths.values()] == shown
        whiskers = ax.containers[-1].errorbar.lines[2][0].get_segments()
        (low, _), (high, _) = whiskers[labels.index('decode, tokens/s')]
        assert low == pytest.approx(after['speed']['decode'][1]/before['speed']['decode'][0])  # the slowest and the fastest run
        assert high == pytest.approx(after['speed']['decode'][2]/before['speed']['decode'][0])
        assert ax.get_xlim()[0] == 0 and ax.get_xlim()[1] > max(w[1][0] for w in whiskers)
        fig.canvas.draw()
    finally: plt.close(fig)


def test_report_of_one_window(pair):
    "A quick look at one window has no error, but a table and a plot."
    import matplotlib.pyplot as plt
    before, after = (dict(m, perplexity=Perplexity(m['perplexity'].losses[:1])) for m in pair[2])
    assert '± nan' in report_table(before, after)
    fig = plot_report(before, after)
    try: assert len(fig.axes[0].patches) >= 6 and math.isfinite(fig.axes[0].get_xlim()[1])
    finally: plt.close('all')


@pytest.mark.parametrize('positions, written', [(64, 39), (28, 3), (25, 0), (20, 0)])
def test_a_sample_ends_where_the_positions_end(positions, written, tiny_tokenizer):
    "GPT-2 has a table of positions; one more is an index that is not there."
    m, prompt = tiny_model('gpt2', n_positions=positions), 'The old lighthouse keeper'[:24]
    m.generation_config.eos_token_id = None
    ids = tiny_tokenizer(prompt, return_tensors='pt')['input_ids']
    seen = []
    m.register_forward_pre_hook(lambda _, args, kw: seen.append(kw['input_ids'].shape[1]), with_kwargs=True)
    out = evaluate.continuation(m, tiny_tokenizer, prompt, new=39)
    assert ids.shape[1] == 25 and out.startswith(prompt) and len(seen) == written

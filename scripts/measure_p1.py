"""Measure methods on SmolLM2-135M under the measuring protocol of the book, and write a file per setting to results/p1/.

usage: PRUNEBOOK_DATA=FOLDER python scripts/measure_p1.py NAME ...      the settings named; shell patterns such as 'fasp-*' too

Calibration: 64 windows of 512 tokens at random offsets (seed 0) of the WikiText-2 validation text, unless a setting names
another text. Evaluation: the first 64 windows of 512 tokens of its test text, or fewer where a setting says so. The dense
model is measured, and under the full protocol one forward pass over the calibration tokens timed, once per process; a file
is written as soon as its setting is done.
"""
import argparse
import copy
import json
import math
from fnmatch import fnmatch
from functools import cache
from pathlib import Path

from prunebook.cli import result_record, timed_forward, timed_prune
from prunebook.depth2 import Depth2
from prunebook.evaluate import measure
from prunebook.fasp import FASP
from prunebook.models import load_model
from prunebook.plan import write_atomic
from prunebook.scores import FLAP, Magnitude, Random, Taylor, WandaSp
from prunebook.text import load_windows

RESULTS = Path(__file__).resolve().parent.parent/'results'/'p1'
MLP, VALUES = ('mlp_channel',), ('value_channel', 'mlp_channel')


def fasp():
    "FASP with and without value channels, restored and only cut."
    for units in (MLP, VALUES):
        for restore in (True, False): yield f'fasp-{"-".join(units)}-0.2-{"restored" if restore else "cut"}', FASP(units=units, restore=restore, damp=.01), .2, 'wikitext2'


def scores():
    "The baselines, in the units in which each is usually run."
    yield 'flap-kv_group-mlp_channel-0.2-folded', FLAP(), .2, 'wikitext2'
    yield 'wanda_sp-kv_group-mlp_channel-0.2', WandaSp(), .2, 'wikitext2'
    yield 'taylor-mlp_channel-0.2-inner', Taylor(units=MLP, spare=(4, 2)), .2, 'wikitext2'
    for restore in (False, True): yield f'magnitude-mlp_channel-0.2{"-restored"*restore}', Magnitude(restore=restore), .2, 'wikitext2'
    yield 'random-mlp_channel-0.2', Random(seed=0), .2, 'wikitext2'
    yield 'magnitude-mlp_channel-0.2-32-windows', Magnitude(), .2, 'wikitext2', 32
    yield 'magnitude-mlp_channel-0.2-32-windows-restored', Magnitude(restore=True), .2, 'wikitext2', 32


def depth2():
    "Depth-2: the four reconstructions, forms of the score, no text, heads, and the paper's own settings."
    for r in ('kept_columns', 'two_step', 'one_step', 'none'): yield f'depth2-mlp-{r}', Depth2(reconstruct=r), .2, 'wikitext2'
    for r in ('kept_columns', 'two_step'): yield f'depth2-mlp-{r}-dense', Depth2(reconstruct=r, trust=1.), .2, 'wikitext2'
    for f in ('paper', 'code'): yield f'depth2-mlp-none-{f}', Depth2(reconstruct='none', form=f), .2, 'wikitext2'
    for s in ('random', 'identity'): yield f'depth2-mlp-none-{s}', Depth2(reconstruct='none', sigma=s, form='paper' if s == 'identity' else 'measured'), .2, 'random', 32
    yield 'depth2-mlp-kept_columns-self', Depth2(), .2, 'self', 32, 24
    yield 'depth2-values-mlp-kept_columns', Depth2(units=VALUES), .2, 'wikitext2'
    heads = dict(units=('query_head',), n_heads=45, blocks=(4, 28), reconstruct='none')    # a sixth of all query heads
    yield 'depth2-heads-similarity', Depth2(**heads), .03, 'wikitext2', 32
    for seed in range(5): yield f'depth2-heads-random-{seed}', Depth2(heads='random', seed=seed, **heads), .03, 'wikitext2', 32
    yield 'depth2-published', Depth2.published(), .2, 'wikitext2'


def settings():
    "Method, sparsity, calibration text and, where they are not 64, windows of evaluation and calibration, by the name of the file."
    return {name: rest for family in (fasp, scores, depth2) for name, *rest in family()}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('names', nargs='+', help=', '.join(settings()))
    given = parser.parse_args().names
    wanted = [n for g in given for n in settings() if fnmatch(n, g)]
    if unknown := [g for g in given if not any(fnmatch(n, g) for n in settings())]: parser.error(f'no setting is called {", ".join(unknown)}')
    model, tokenizer = load_model('smollm2-135m')
    @cache
    def calibration(source, n=64): return load_windows(source, model, tokenizer, n=n, seqlen=512, seed=0)
    @cache
    def dense(n):
        "Evaluation windows, the dense model's measures on them, and, under the full protocol, the time of a forward pass."
        test = load_windows('wikitext2', model, tokenizer, n=n, seqlen=512, evaluation=True)
        before, forward = measure(model, tokenizer, test), timed_forward(model, calibration('wikitext2')) if n == 64 else None
        print(f'dense {before["perplexity"]} on {n} windows' + (f', a forward pass over the calibration tokens takes {forward[0]:.0f} s' if forward else ''), flush=True)
        return test, before, forward
    for name in wanted:
        method, sparsity, source, *windows = settings()[name]
        test, before, forward = dense(*windows[:1] or [64])
        small, plan, seconds, extra = timed_prune(copy.deepcopy(model), calibration(source, *windows[1:]), method, sparsity, forward)
        after = measure(small, tokenizer, test)
        record = result_record(small, plan, 'smollm2-135m', before, after, seed=0, seconds=seconds, peak_extra_bytes=extra)
        write_atomic(RESULTS/f'{name}.json', json.dumps(record, indent=1) + '\n')
        print(f'{name}: perplexity {after["perplexity"]}, true sparsity {plan.true_sparsity:.4f}, {seconds.get("in_forward_passes_cpu", math.nan):.2f} forward passes', flush=True)


if __name__ == '__main__': main()

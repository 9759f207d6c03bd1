"""Measure methods on SmolLM2-135M under the measuring protocol of the book, and write a file per setting to results/p1/.

usage: PRUNEBOOK_DATA=FOLDER python scripts/measure_p1.py NAME ...      the settings named; shell patterns such as 'fasp-*' too

Calibration: 64 windows of 512 tokens at random offsets (seed 0) of the WikiText-2 validation text, unless a setting names
another text. Evaluation: the first 64 windows of 512 tokens of its test text, or fewer where a setting says so. The dense
model is measured, and under the full protocol one forward pass over the calibration tokens timed, once per process (not with
`--untimed`); a file is written as soon as its setting is done.
"""
import argparse
import copy
import json
import math
import os
import tempfile
import time
from contextlib import contextmanager
from fnmatch import fnmatch
from functools import cache
from pathlib import Path
from unittest.mock import patch

import prunebook.surgeon as surgeon_module
from prunebook.bonsai import Bonsai
from prunebook.cli import result_record, timed, timed_forward
from prunebook.couplings import weight_of
from prunebook.curvature import curvature
from prunebook.depth2 import Depth2
from prunebook.elements import keep_strongest, sparsify_elements, sparsify_shots
from prunebook.evaluate import measure
from prunebook.fasp import FASP
from prunebook.pruning import prune
from prunebook.models import decoder_linears, load_model, n_parameters
from prunebook.plan import PrunePlan, model_fingerprint, write_atomic
from prunebook.recipe import Recipe
from prunebook.scores import FLAP, Magnitude, Random, Taylor, WandaSp, sparsify, zeros_among
from prunebook.surgeon import CRITERIA, Surgeon, drop_dead, zero_share, zero_structures
from prunebook.text import Windows, load_windows

RESULTS = Path(__file__).resolve().parent.parent/'results'/'p1'
LOGS = Path(tempfile.gettempdir())/f'prunebook-{os.getpid()}'    # of this process only, or times would be those of a run gone on with
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
    heads = dict(units=('query_head',), n_heads=45, spare=(4, 2), reconstruct='none')    # a sixth of all query heads
    yield 'depth2-heads-similarity', Depth2(**heads), .03, 'wikitext2', 32
    for seed in range(5): yield f'depth2-heads-random-{seed}', Depth2(heads='random', seed=seed, **heads), .03, 'wikitext2', 32
    yield 'depth2-published', Depth2.published(), .2, 'wikitext2'


def bonsai():
    "Bonsai with its regression, and with its prior alone, cut and restored; as published, at as many evaluations; on three draws of text and masks."
    for seed in range(3):
        for estimator in ('levels', 'prior'):
            for restore in (False, True):                  # the second run goes on from the sub-models of the first
                log = LOGS/f'{estimator}-{seed}.jsonl'
                yield (f'bonsai-{estimator}-0.2-{"restored" if restore else "cut"}-32-windows-{seed}',
                       Bonsai(estimator=estimator, restore=restore, seed=seed, log=str(log)), .2, 'wikitext2', 32, 64, 128, seed)
    same = dict(units=MLP, evaluations=128, windows=2, seqlen=128, step=.2, tolerance=0.)    # as much text, and as many sub-models
    for seed in range(3): yield f'bonsai-published-0.2-cut-32-windows-{seed}', Bonsai.published(seed=seed, **same), .2, 'wikitext2', 32, 64, 128, seed


def recipe():
    "The recipe, at three sparsities; probes are measured once and kept."
    for s in (.2, .3, .5): yield f'recipe-{s}', Recipe(log=str(LOGS/'recipe.json')), s, 'wikitext2'


class Zeroed:
    "A function of model, windows and sparsity that zeroes weights in place, called like a method."
    def __init__(self, name, f, **settings): self.name, self.f, self.settings = name, f, settings

    def prune(self, model, windows, sparsity):
        "The model with its zeros, and a plan that says how many."
        plan = PrunePlan(self.name, self.settings, sparsity, {}, {}, model_fingerprint(model), repr(windows))
        plan.true_sparsity = self.f(model, windows, sparsity, **self.settings)
        return model, plan


def surgeon():
    "LLM Surgeon: coupled, and as published with its baselines; windows of calibration in the name."
    yield 'surgeon-mlp_channel-0.2-4-shots', Surgeon(shots=4, rounds=2, fresh=True), .2, 'wikitext2'
    for shots, rounds in ((2, 2), (1, 2), (1, 1)): yield f'surgeon-mlp_channel-0.2-{shots}-shots-{rounds}-rounds', Surgeon(shots=shots, rounds=rounds, fresh=True), .2, 'wikitext2', 64, 16*shots
    yield 'surgeon-mlp_channel-0.2-4-shots-2-rounds-16-windows', Surgeon(shots=4, rounds=2, fresh=True), .2, 'wikitext2', 64, 16
    for criterion in CRITERIA:
        few = dict(shots=1) if criterion == 'magnitude' else dict(shots=2, fresh=True, damp=.1)
        yield f'surgeon-structures-{criterion}-0.2-32-windows', Zeroed('structures', zero_structures, criterion=criterion, **few), .2, 'wikitext2', 32, 8


def single_weights(model, windows, sparsity, score, m=None, gradients=None, **options):
    "Zero single weights, m - n of m if m is given; `gradients` is the number of windows for the curvature of the dense model."
    pattern = dict(sparsity=sparsity) if m is None else dict(n=round(m*(1 - sparsity)), m=m)
    if score == 'wanda': return sparsify(model, windows, **pattern)
    if score == 'shots': return sparsify_shots(model, windows, **pattern, **options)
    if score == 'magnitude':
        linears = decoder_linears(model)
        for l in linears.values(): weight_of(l).data.mul_(keep_strongest(weight_of(l).data.abs(), **pattern))
        return zeros_among(linears)
    factors = gradients and curvature(model, Windows(windows.ids[:gradients], windows.source), 2)
    return sparsify_elements(model, windows, **pattern, factors=factors, **options)


def elements():
    "Single weights, half of them, anywhere or two of four; windows of calibration in the name where they are not 64."
    for tag, m in (('0.5', None), ('2of4', 4)):
        given = lambda score, **kw: Zeroed('elements', single_weights, score=score, m=m, **kw)
        yield f'elements-{tag}-inputs', given('inputs'), .5, 'wikitext2'
        yield f'elements-{tag}-curvature', given('curvature', gradients=32), .5, 'wikitext2'
        yield f'elements-{tag}-curvature-16', given('curvature', gradients=16), .5, 'wikitext2'
        yield f'elements-{tag}-magnitude', given('magnitude'), .5, 'wikitext2'
        yield f'elements-{tag}-wanda', given('wanda'), .5, 'wikitext2'
        for shots in (1, 2, 5): yield f'elements-{tag}-shots-{shots}-16-windows', given('shots', shots=shots), .5, 'wikitext2', 32, 16
    yield 'elements-0.5-global', Zeroed('elements', single_weights, score='curvature', gradients=32, allocation='global'), .5, 'wikitext2'


def settings():
    "Method, sparsity, calibration text and, where they are not 64, 64, 512 and 0, windows of evaluation, and windows, length and seed of calibration, by the name of the file."
    return {name: rest for family in (fasp, scores, depth2, bonsai, recipe, surgeon, elements) for name, *rest in family()}


def where(model, plan):
    "Where the sparsity went, for results of LLM Surgeon."
    if plan.method == 'surgeon': return dict(units_kept={n: [len(k), plan.units[n]] for n, k in plan.kept.items()})
    if plan.method == 'elements': return dict(zeros={n: zeros_among({n: l}) for n, l in decoder_linears(model).items()})
    if plan.method != 'structures': return {}
    zeros = {n: zero_share([m]) for n, m in decoder_linears(model).items()}
    drop_dead(small := copy.deepcopy(model))
    size = lambda m: n_parameters(decoder_linears(m).values())
    return dict(zeros=zeros, removable=1 - size(small)/size(model))


PARTS = dict(curvature=('curvature',), costs=('unit_costs', 'global_steps', '_choose'), update=('living_inverses', 'remove_units', 'remove_structures', 'set_weight'))


@contextmanager
def parts_timed():
    "CPU seconds in the three parts of the shots of LLM Surgeon, by name of the part."
    seconds, running = dict.fromkeys(PARTS, 0.), []
    def clock(part, f):
        def timed_part(*args, **kw):
            if running: return f(*args, **kw)              # part of another part
            running.append(part)
            start = time.process_time()
            try: return f(*args, **kw)
            finally: seconds[running.pop()] += time.process_time() - start
        return timed_part
    with patch.multiple(surgeon_module, **{n: clock(part, getattr(surgeon_module, n)) for part, names in PARTS.items() for n in names}): yield seconds


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('names', nargs='+', help=', '.join(settings()))
    parser.add_argument('--untimed', action='store_true', help='time no forward pass to compare with')
    arguments = parser.parse_args()
    given = arguments.names
    wanted = [n for g in given for n in settings() if fnmatch(n, g)]
    if unknown := [g for g in given if not any(fnmatch(n, g) for n in settings())]: parser.error(f'no setting is called {", ".join(unknown)}')
    model, tokenizer = load_model('smollm2-135m')
    @cache
    def calibration(source, n=64, seqlen=512, seed=0): return load_windows(source, model, tokenizer, n=n, seqlen=seqlen, seed=seed)
    @cache
    def dense(n):
        "Evaluation windows, and the dense model's measures on them."
        test = load_windows('wikitext2', model, tokenizer, n=n, seqlen=512, evaluation=True)
        before = measure(model, tokenizer, test)
        print(f'dense {before["perplexity"]} on {n} windows', flush=True)
        return test, before
    @cache
    def forward(n=64, seqlen=512):
        "Seconds of a forward pass over as many tokens."
        seconds = timed_forward(model, calibration('wikitext2', n, seqlen))
        print(f'a forward pass over {n} windows of {seqlen} tokens takes {seconds[0]:.0f} s', flush=True)
        return seconds
    for name in wanted:
        method, sparsity, source, *windows = settings()[name]
        n, *calibrating = windows or [64]
        test, before = dense(n)
        fit, whole, passes = calibration(source, *calibrating), copy.deepcopy(model), forward(*calibrating[:2]) if (n == 64 or calibrating[1:]) and not arguments.untimed else None
        pruning = (lambda: method.prune(whole, fit, sparsity)) if isinstance(method, Zeroed) else lambda: prune(whole, fit, method, sparsity, inplace=True)
        with parts_timed() as parts: (small, plan), seconds, extra = timed(pruning, model.device, passes)
        after, more = measure(small, tokenizer, test), dict(rounds=method.summary()) if hasattr(method, 'summary') else {}
        record = result_record(small, plan, 'smollm2-135m', before, after, seed=dict(enumerate(windows)).get(3, 0), seconds=seconds, peak_extra_bytes=extra, **more, **where(small, plan))
        record['settings'].pop('log', None)                # a path of this machine
        if name.startswith('surgeon'): record.update(parts_cpu=parts, losses=dict(before=before['perplexity'].losses.tolist(), after=after['perplexity'].losses.tolist()))
        write_atomic(RESULTS/f'{name}.json', json.dumps(record, indent=1) + '\n')
        print(f'{name}: perplexity {after["perplexity"]}, true sparsity {plan.true_sparsity:.4f}, {seconds.get("in_forward_passes_cpu", math.nan):.2f} forward passes', flush=True)


if __name__ == '__main__': main()

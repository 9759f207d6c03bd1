"""Measure FASP on SmolLM2-135M under the measuring protocol of the book, and write a file per setting to results/p1/.

usage: PRUNEBOOK_DATA=FOLDER python scripts/measure_p1.py [NAME ...]      all settings, or those named

Calibration: 64 windows of 512 tokens at random offsets (seed 0) of the WikiText-2 validation text. Evaluation: the first
64 windows of 512 tokens of its test text. The dense model is measured, and one forward pass over the
calibration tokens timed, once per process; a file is written as soon as its setting is done.
"""
import argparse
import copy
import json
from pathlib import Path

from prunebook.cli import result_record, timed_forward, timed_prune
from prunebook.evaluate import measure
from prunebook.fasp import FASP
from prunebook.models import load_model
from prunebook.plan import write_atomic
from prunebook.text import load_windows

RESULTS = Path(__file__).resolve().parent.parent/'results'/'p1'
UNITS = {'mlp_channel': ('mlp_channel',), 'value_channel-mlp_channel': ('value_channel', 'mlp_channel')}
GRID = [('mlp_channel', .2, True), ('value_channel-mlp_channel', .2, True), ('mlp_channel', .2, False), ('value_channel-mlp_channel', .2, False)]


def settings():
    "Every setting by the name of its file."
    return {f'fasp-{u}-{s}-{"restored" if r else "cut"}': (FASP(units=UNITS[u], restore=r, damp=.01), s) for u, s, r in GRID}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('names', nargs='*', help=', '.join(settings()))
    wanted = parser.parse_args().names or list(settings())
    model, tokenizer = load_model('smollm2-135m')
    calibration, test = (load_windows('wikitext2', model, tokenizer, n=64, seqlen=512, seed=0, evaluation=e) for e in (False, True))
    before = measure(model, tokenizer, test)
    forward = timed_forward(model, calibration)
    print(f'dense {before["perplexity"]}, a forward pass over the calibration tokens takes {forward[0]:.0f} s', flush=True)
    for name in wanted:
        method, sparsity = settings()[name]
        small, plan, seconds, extra = timed_prune(copy.deepcopy(model), calibration, method, sparsity, forward)
        after = measure(small, tokenizer, test)
        record = result_record(small, plan, 'smollm2-135m', before, after, seed=0, seconds=seconds, peak_extra_bytes=extra)
        write_atomic(RESULTS/f'{name}.json', json.dumps(record, indent=1) + '\n')
        print(f'{name}: perplexity {after["perplexity"]}, true sparsity {plan.true_sparsity:.4f}, {seconds["in_forward_passes"]:.2f} forward passes', flush=True)


if __name__ == '__main__': main()

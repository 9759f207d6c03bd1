"""Measure what the interactive figures of the chapters show, on SmolLM2-135M and the built-in passages.

usage: python scripts/measure_interactive.py NAME ...      the figures named, or all of them: coupling sparsity heads game threshold

A file per figure is written to results/interactive/: what the figure needs, and under `about` the model, the text, the
versions and the CPU seconds it took.
"""
import argparse
import json
import time
from pathlib import Path

import torch
import transformers

from prunebook.cli import _machine
from prunebook.interactive import measure_couplings, measure_game, measure_heads, measure_sparsities, measure_threshold
from prunebook.models import load_model
from prunebook.plan import model_fingerprint, write_atomic
from prunebook.text import load_windows

RESULTS = Path(__file__).resolve().parent.parent/'results'/'interactive'
SPARSITIES = (.1, .2, .3, .4)


def measured(name, model, tokenizer):
    "What the figure `name` shows, and the windows it was measured on."
    cut = lambda n, seqlen, evaluation=False: load_windows('passages', model, tokenizer, n=n, seqlen=seqlen, evaluation=evaluation)
    if name == 'coupling': windows = cut(2, 256); return measure_couplings(model, 0, windows), [windows]
    if name == 'sparsity': windows, test = cut(8, 256), cut(8, 192, True); return measure_sparsities(model, tokenizer, windows, test, SPARSITIES), [windows, test]
    if name == 'heads': windows = cut(4, 256); return measure_heads(model, windows), [windows]
    if name == 'game': windows = cut(4, 128); return measure_game(model, windows), [windows]
    windows = cut(4, 256)
    return measure_threshold(model, windows, (.1, 1.)), [windows]


def main():
    names = ('coupling', 'sparsity', 'heads', 'game', 'threshold')
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('names', nargs='*', metavar='NAME', help=f'one of {", ".join(names)}; all by default')
    chosen = parser.parse_args().names or names
    if unknown := [n for n in chosen if n not in names]: parser.error(f'no figure {unknown[0]!r}; there are {", ".join(names)}')
    model, tokenizer = load_model('smollm2-135m')
    for name in chosen:
        start = time.process_time()
        data, windows = measured(name, model, tokenizer)
        about = dict(model='smollm2-135m', model_fingerprint=model_fingerprint(model), windows=[repr(w) for w in windows], cpu_seconds=round(time.process_time() - start, 1),
                     versions=dict(torch=torch.__version__, transformers=transformers.__version__), machine=_machine(model))
        write_atomic(RESULTS/f'{name}.json', json.dumps({**data, 'about': about}, ensure_ascii=False) + '\n')
        print(f'{name}: {about["cpu_seconds"]} CPU seconds')


if __name__ == '__main__': main()

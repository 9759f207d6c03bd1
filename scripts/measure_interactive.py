"""Measure what the interactive figures of the chapters show, on SmolLM2-135M and the built-in passages.

usage: python scripts/measure_interactive.py NAME ...      the figures named, or all of them: coupling sparsity heads game threshold

A file per figure is written to results/interactive/: what the figure needs, and under `about` the model, the text, the
versions and the CPU seconds it took.
"""
import argparse
import json
import time
from pathlib import Path

from prunebook.interactive import measure_couplings, measure_game, measure_heads, measure_sparsities, measure_threshold
from prunebook.models import load_model
from prunebook.plan import write_atomic
from prunebook.record import about
from prunebook.text import load_windows

RESULTS = Path(__file__).resolve().parent.parent/'results'/'interactive'
NAMES = ('coupling', 'sparsity', 'heads', 'game', 'threshold')
SPARSITIES = (.1, .2, .3, .4)


def measured(name, model, tokenizer):
    "What the figure `name` shows, and the windows it was measured on."
    cut = lambda n, seqlen, evaluation=False: load_windows('passages', model, tokenizer, n=n, seqlen=seqlen, evaluation=evaluation)
    if name == 'sparsity':
        windows, test = cut(8, 256), cut(8, 192, True)
        return measure_sparsities(model, tokenizer, windows, test, SPARSITIES), [windows, test]
    windows = dict(coupling=cut(2, 256), heads=cut(4, 256), game=cut(4, 128), threshold=cut(4, 256))[name]
    measures = dict(coupling=lambda: measure_couplings(model, 0, windows), heads=lambda: measure_heads(model, windows),
                    game=lambda: measure_game(model, windows), threshold=lambda: measure_threshold(model, windows, (.1, 1.)))
    return measures[name](), [windows]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('names', nargs='*', metavar='NAME', help=f'one of {", ".join(NAMES)}; all by default')
    chosen = parser.parse_args().names or NAMES
    if unknown := [n for n in chosen if n not in NAMES]: parser.error(f'no figure {unknown[0]!r}; there are {", ".join(NAMES)}')
    model, tokenizer = load_model('smollm2-135m')
    for name in chosen:
        start = time.process_time()
        data, windows = measured(name, model, tokenizer)
        told = about(model, 'smollm2-135m', windows, time.process_time() - start)
        write_atomic(RESULTS/f'{name}.json', json.dumps({**data, 'about': told}, ensure_ascii=False) + '\n')
        print(f'{name}: {told["cpu_seconds"]} CPU seconds')


if __name__ == '__main__': main()

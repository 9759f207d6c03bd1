"""Measure comparisons on the built-in passages that would make a chapter run too long, and write results/passages/NAME.json.

usage: python scripts/measure_passages.py depth2      reconstructions, trust in the dense trajectory, and no text, for the depth-2 chapter

A file holds the loss of every evaluation window, so that differences can be paired, and under `about` the text, the versions
and the CPU seconds it took.
"""
import argparse
import json
import time
from pathlib import Path

import torch

from prunebook.depth2 import Depth2, block_errors
from prunebook.evaluate import window_losses
from prunebook.pruning import prune
from prunebook.models import load_model
from prunebook.couplings import anatomy
from prunebook.plan import write_atomic
from prunebook.record import about
from prunebook.text import Windows, load_windows, random_tokens

RESULTS = Path(__file__).resolve().parent.parent/'results'/'passages'
NAMES = ('depth2',)
WAYS = dict(none=False, one_step='one_step', two_step='two_step', kept_columns=True)              # `restore`, by its name in the file


@torch.no_grad()
def mlp_outputs(m, windows):
    "Outputs of all MLPs, (blocks, tokens, d)."
    seen = []
    handles = [m.get_submodule(b.mlp_second).register_forward_hook(lambda mod, a, y: seen.append(y.flatten(0, -2))) for b in anatomy(m)]
    m.base_model(windows.ids, use_cache=False)
    for h in handles: h.remove()
    return torch.stack(seen)


def misfit(small, targets, windows):
    "Relative error of MLP outputs: median over tokens, mean over blocks."
    return ((mlp_outputs(small, windows) - targets).norm(dim=-1)/targets.norm(dim=-1)).median(1).values.mean().item()


def depth2(model, tokenizer):
    "Depth-2 pruning of a fifth of the decoder from the MLPs."
    fit = load_windows('passages', model, tokenizer, n=6, seqlen=256)
    test = load_windows('passages', model, tokenizer, n=6, seqlen=192, evaluation=True)
    few, losses = Windows(test.ids[:4], 'four windows'), lambda m: window_losses(m, test).tolist()
    targets = {n: mlp_outputs(model, w) for n, w in (('calibration', fit), ('held_out', few))}
    misfits = lambda m: dict(calibration=misfit(m, targets['calibration'], fit), held_out=misfit(m, targets['held_out'], few))
    found = dict(dense=dict(losses=losses(model)), reconstruct={}, trust={}, no_text={})
    for r, restore in WAYS.items():
        small, plan = prune(model, fit, Depth2(restore=restore), sparsity=.2)
        found['reconstruct'][r] = dict(losses=losses(small), block_errors=block_errors(model, small, few).tolist(), true_sparsity=plan.true_sparsity)
    for t in (.25, 0., 1.):                                # the last model of the loop above has .25
        if t != .25: small, _ = prune(model, fit, Depth2(trust=t), sparsity=.2)
        found['trust'][str(t)] = dict(losses=losses(small) if t != .25 else found['reconstruct']['kept_columns']['losses'], **misfits(small))
    own = load_windows('self', model, tokenizer, n=8, seqlen=128)
    for n, w, method in (('random tokens', random_tokens(model, 4, 256), Depth2(sigma='random', restore=False)), ('written by the model', own, Depth2())):
        small, plan = prune(model, w, method, sparsity=.2)
        found['no_text'][n] = dict(losses=losses(small), calibration=plan.calibration)
    return found, [fit, test]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('names', nargs='+', choices=NAMES, metavar='NAME', help=f'one of {", ".join(NAMES)}')
    names = parser.parse_args().names
    model, tokenizer = load_model('smollm2-135m')
    for name in names:
        start = time.process_time()
        data, windows = dict(depth2=depth2)[name](model, tokenizer)
        told = about(model, 'smollm2-135m', windows, time.process_time() - start)
        write_atomic(RESULTS/f'{name}.json', json.dumps({**data, 'about': told}, ensure_ascii=False, indent=1) + '\n')
        print(f'{name}: {told["cpu_seconds"]} CPU seconds')


if __name__ == '__main__': main()

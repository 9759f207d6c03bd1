"""Measure the peak memory of every method beside its estimate, and write results/estimate/NAME.json, each in a process of its own.

usage: python scripts/measure_estimate.py [--only PATTERN] [--again] [--list]

Two models are pruned by a fifth in bfloat16: SmolLM2-135M on 8 windows of 512 tokens, and a random Llama of about one billion
parameters, in place, on 2 such windows. Finished files are skipped.
"""
import argparse
import fnmatch
import subprocess
import sys
import time
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from prunebook.estimate import estimate
from prunebook.evaluate import peak_memory, weight_bytes
from prunebook.methods import configured
from prunebook.models import load_model
from prunebook.plan import write_atomic
from prunebook.pruning import prune
from prunebook.record import about, strict_json
from prunebook.text import load_windows, random_tokens

RESULTS = Path(__file__).resolve().parent.parent/'results'/'estimate'
SEQLEN, SPARSITY = 512, .2
BILLION = dict(hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32, num_key_value_heads=8, vocab_size=32000)
# few sub-models, shots and probes, to be quick; the estimate is told the same
METHODS = dict(random={}, magnitude={}, wanda_sp={}, flap={}, taylor={}, fasp={}, depth2={}, bonsai=dict(evaluations=8, seqlen=128),
               surgeon=dict(shots=1), block_influence={}, recipe=dict(shares=(.5,), measure_windows=1))
CELLS = {f'{model}-{m}': (model, m) for model in ('135m', '1b') for m in METHODS}


def models(name):
    "The model, what it is called, and its windows."
    if name == '135m':
        model, tokenizer = load_model('smollm2-135m', 'cpu', torch.bfloat16)
        return model, 'smollm2-135m', load_windows('passages', model, tokenizer, n=8, seqlen=SEQLEN)
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    try: model = LlamaForCausalLM(LlamaConfig(**BILLION)).eval()
    finally: torch.set_default_dtype(torch.float32)
    return model, 'a random Llama of 16 blocks', random_tokens(model, n=2, seqlen=SEQLEN)


@torch.no_grad()
def forward_seconds(model, windows):
    "CPU seconds of one pass through the windows, after a first one."
    model(windows.ids[:1])
    start = time.process_time()
    for ids in windows.ids: model(ids[None])
    return time.process_time() - start


def measure(shape, name):
    "One cell, as plain values."
    model, called, windows = models(shape)
    for p in model.parameters(): p.data = p.data.clone()   # out of its file, whose pages count only when they are read
    method, inplace = configured(name, METHODS[name]), shape == '1b'
    forward, held = forward_seconds(model, windows), weight_bytes(model)
    told = estimate(model, method, windows.ids.numel(), SPARSITY, seqlen=SEQLEN, inplace=inplace)['bytes']
    where = about(model, called, [windows], 0.)
    start = time.process_time()
    with peak_memory() as found: prune(model, windows, method, SPARSITY, inplace=inplace)
    seconds = time.process_time() - start
    peak = held + found['extra']
    return dict(method=name, settings=METHODS[name], inplace=inplace, about=dict(where, cpu_seconds=round(seconds, 1)), weights_bytes=held, peak_bytes=peak,
                estimate_bytes=told, peak_over_estimate=round(peak/told, 3), in_forward_passes=round(seconds/forward, 2))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--only', default='*', help='shell pattern of the names of cells')
    parser.add_argument('--again', action='store_true', help='measure what has a file, too')
    parser.add_argument('--list', action='store_true', help='print the names of the cells')
    parser.add_argument('--one', help=argparse.SUPPRESS)   # in the process that measures
    a = parser.parse_args()
    if a.one: return write_atomic(RESULTS/f'{a.one}.json', strict_json(measure(*CELLS[a.one])) + '\n')
    for name in fnmatch.filter(CELLS, a.only):
        if a.list: print(name)
        elif a.again or not (RESULTS/f'{name}.json').exists():
            RESULTS.mkdir(parents=True, exist_ok=True)
            print(name, 'failed' if subprocess.run([sys.executable, __file__, '--one', name]).returncode else 'measured', flush=True)


if __name__ == '__main__': main()

"""Measure this project on a GPU: one command, some minutes, a file for each measurement in results/gpu/.

usage: python scripts/gpu_day.py [--budget SECONDS] [--out FOLDER] [--only PATTERN ...] [--list]

It needs the repository, PyTorch with CUDA, transformers and what prunebook needs itself. A measurement that is done is not
repeated, so that a run which was cut short goes on where it stopped; one that failed or ran out of time is tried again.

  ceilings     what the card itself reaches: matrix products, factorizations, copies
  tiny-*       every method on tiny models of every family, float32: does the GPU choose and compute what the CPU does?
  shape-*      random weights at the shapes of published models: seconds, dense forward passes, peak bytes and the estimate
  speed-*      speed of pruned shapes at odd and round widths, dense and pruned in turn
  p1-*         SmolLM2-135M under the measuring protocol of the book; needs PRUNEBOOK_DATA, and the model in PRUNEBOOK_HOME or by pip
  notebook-*   every notebook, cell by cell, without Jupyter

`--device cpu --tiny` tries the script itself in about a minute, with small stand-ins for everything.
"""
import argparse
import contextlib
import copy
import gc
import io
import json
import os
import platform
import re
import signal
import statistics
import subprocess
import sys
import time
import traceback
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import cache, partial
from pathlib import Path
from typing import Callable

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
if __name__ == '__main__': os.environ.update({k: os.environ.get(k, '1') for k in ('HF_HUB_OFFLINE', 'TQDM_DISABLE')})    # both are read at import

import torch  # noqa: E402
import transformers  # noqa: E402
from torch.nn import functional as F  # noqa: E402

from prunebook.couplings import anatomy, couplings, slice_units  # noqa: E402
from prunebook.estimate import estimate  # noqa: E402
from prunebook.evaluate import Perplexity, peak_memory, perplexity, weight_bytes, window_losses  # noqa: E402
from prunebook.methods import Run, configured  # noqa: E402
from prunebook.models import TINY, decoder_linears, load_model, n_parameters, tiny_model  # noqa: E402
from prunebook.plan import write_atomic  # noqa: E402
from prunebook.pruning import prune  # noqa: E402
from prunebook.text import load_windows, random_tokens  # noqa: E402

MLP, VALUES, HEADS = ('mlp_channel',), ('value_channel', 'mlp_channel'), ('kv_group', 'mlp_channel')


# ---- where and when -----------------------------------------------------------------------------------------------------

@dataclass
class Day:
    "Where things are measured."
    device: str  # `cuda`, or `cpu` to try the script
    tiny: bool  # small stand-ins for everything
    out: Path  # folder of results
    commit: str = None  # of the repository, where there is no git

    @property
    def cuda(self): return self.device.startswith('cuda')
    @property
    def dtype(self): return torch.bfloat16 if self.cuda else torch.float32


def first_line(*command):
    "First line that a command prints, or None if it cannot run."
    try: return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=20).stdout.strip().splitlines()[0]
    except (OSError, IndexError, subprocess.SubprocessError): return None


@cache
def driver(): return first_line('nvidia-smi', '--query-gpu=driver_version', '--format=csv,noheader')


def machine(day):
    "What every result says about where it was measured."
    card = torch.cuda.get_device_properties(0) if day.cuda else None
    return dict(card=card.name if card else f'none ({platform.machine()})', memory_bytes=card.total_memory if card else None,
                driver=driver() if day.cuda else None, cuda=torch.version.cuda, torch=torch.__version__, transformers=transformers.__version__,
                python=platform.python_version(), date=time.strftime('%Y-%m-%d'), commit=day.commit or first_line('git', 'rev-parse', '--short', 'HEAD'))


class OutOfTime(Exception): pass


@contextlib.contextmanager
def at_most(seconds):
    "Raises `OutOfTime` inside when the seconds are over."
    def stop(*_): raise OutOfTime(f'stopped after {seconds:.0f} s')
    old = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, .1))
    try: yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)


def sync(device):
    if torch.device(device).type == 'cuda': torch.cuda.synchronize()


def clock(f, device):
    "Seconds of `f()`; on a GPU between two events of its own."
    if torch.device(device).type != 'cuda':
        start = time.perf_counter(); f()
        return time.perf_counter() - start
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    sync(device); start.record(); f(); stop.record(); sync(device)
    return start.elapsed_time(stop)/1000


def free(device):
    "Give back what nobody holds any more."
    gc.collect()
    if torch.device(device).type == 'cuda': torch.cuda.empty_cache()


def spread(values):
    "Median and quartiles."
    low, _, high = statistics.quantiles(values, n=4, method='inclusive') if len(values) > 1 else values*3
    return dict(median=statistics.median(values), low=low, high=high, n=len(values))


def paired(timings, rounds=9, warm=2):
    "Seconds of several functions that time themselves, in turn, by name; ratios to the first are of the same round."
    for _ in range(warm):
        for f in timings.values(): f()
    rows = [{n: f() for n, f in timings.items()} for _ in range(rounds)]
    first = next(iter(timings))
    return {n: dict(spread([r[n] for r in rows]), ratio=spread([r[n]/r[first] for r in rows])) for n in timings}


# ---- ceilings -----------------------------------------------------------------------------------------------------------

def ceilings(day, record):
    "Matrix products and factorizations by precision, and a copy on the device."
    n, device = (64 if day.tiny else 8192), day.device
    def best(f, repeats=5):
        for _ in range(2): f()
        return statistics.median(clock(f, device) for _ in range(repeats))
    record['size'] = n
    for name, dtype, tf32 in [('bfloat16', torch.bfloat16, False), ('float32', torch.float32, False), ('tf32', torch.float32, True), ('float64', torch.float64, False)]:
        a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
        torch.backends.cuda.matmul.allow_tf32 = tf32
        try: record[f'matmul_{name}_tflops'] = 2*n**3/best(lambda: a @ b)/1e12
        finally: torch.backends.cuda.matmul.allow_tf32 = False
    for name, dtype in [('float32', torch.float32), ('float64', torch.float64)]:
        a = torch.randn(n, n, device=device, dtype=dtype)
        a = a @ a.T/n + torch.eye(n, device=device, dtype=dtype)
        record[f'cholesky_{name}_tflops'] = n**3/3/best(lambda: torch.linalg.cholesky(a), 3)/1e12
    x = torch.empty(2**(20 if day.tiny else 31), dtype=torch.uint8, device=device)
    y = torch.empty_like(x)
    record['copy_gb_s'] = 2*x.numel()/best(lambda: y.copy_(x))/1e9


# ---- tiny models: CPU and GPU agree ----------------------------------------------------------------------------------------

AGREE = {
    'random': ('random', {}), 'magnitude restored': ('magnitude', dict(restore=True)),
    'wanda_sp': ('wanda_sp', {}), 'flap': ('flap', {}), 'taylor': ('taylor', dict(units=MLP)),
    'fasp': ('fasp', {}), 'fasp values': ('fasp', dict(units=VALUES)), 'fasp kv_group': ('fasp', dict(units=HEADS)),
    'depth2': ('depth2', {}), 'depth2 two_step heads': ('depth2', dict(units=HEADS, restore='two_step')),
    'bonsai': ('bonsai', dict(evaluations=16, windows=2, seqlen=16, restore=True)),
    'surgeon': ('surgeon', dict(shots=1, rounds=1)), 'surgeon tied': ('surgeon', dict(shots=1, rounds=1, cost='tied', restore='tied')),
    'recipe': ('recipe', dict(measure_seqlen=16))}  # method and settings on tiny models, by a name for the report
TIE, CLOSE = 1e-3, 1e-3  # of the range of a coupling's scores; of the length of the logits


def disputed(model, units, a, b):
    "Units that only one of two plans keeps, and their largest distance from the border, as a share of the range of their coupling's scores."
    count, farthest = 0, 0.
    for c in couplings(model, units):
        differ = set(a.kept.get(c.name, range(c.n_units))) ^ set(b.kept.get(c.name, range(c.n_units)))
        count += len(differ)
        scores = torch.tensor(a.scores.get(c.name) or [0.]*c.n_units, dtype=torch.float64)
        per, kept = c.n_units//c.groups, set(a.kept.get(c.name, range(c.n_units)))
        for u in differ:
            group = [i for i in range(u//per*per, (u//per + 1)*per) if i in kept]
            farthest = max(farthest, abs(scores[u] - scores[group].min()).item()/max((scores.max() - scores.min()).item(), 1e-30))
    return count, farthest


def agreement(model, windows, name, settings, device):
    "How pruning on two devices compares: a dict with `agree`."
    method = configured(name, settings)
    try: cpu, plan = prune(model, windows, method, .2)
    except ValueError as e: return dict(agree=True, refused=str(e)[:120])    # heads of a model that has none to choose from, for instance
    other, other_plan = prune(copy.deepcopy(model).to(device), windows, configured(name, settings), .2)
    count, farthest = disputed(model, method.units, plan, other_plan)
    r = dict(disputed_units=count, distance=farthest, agree=farthest <= TIE)
    if not count:
        with torch.no_grad(): a, b = (m(windows.ids[:4].to(m.device), use_cache=False).logits.double().cpu() for m in (cpu, other))
        r['logits'] = ((a - b).norm()/a.norm()).item()
        r['agree'] = r['logits'] <= CLOSE
    return r


def tiny_family(family, day, record):
    "All methods on a tiny model of one family."
    model = tiny_model(family)
    windows = random_tokens(model, 16, 32)
    record['combinations'] = {}
    for label, (name, settings) in AGREE.items():
        try: record['combinations'][label] = agreement(model, windows, name, settings, day.device)
        except OutOfTime: raise
        except Exception as e: record['combinations'][label] = dict(agree=False, error=last_words(e))
    record['agree'] = sum(r['agree'] for r in record['combinations'].values())
    record['of'] = len(AGREE)


def last_words(error):
    "Kind, first line and place of an error."
    frames = [f for f in traceback.extract_tb(error.__traceback__) if 'prunebook' in f.filename]
    where = f' ({Path(frames[-1].filename).name}:{frames[-1].lineno})' if frames else ''
    return f'{type(error).__name__}: {(str(error).splitlines() or [""])[0][:300]}{where}'


# ---- random weights at real shapes ---------------------------------------------------------------------------------------

def _llama(d, f, layers, heads, kv_heads, vocabulary):
    return 'llama', dict(hidden_size=d, intermediate_size=f, num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=kv_heads,
                         vocab_size=vocabulary, max_position_embeddings=4096)


SHAPES = {
    'opt-125m': ('opt', dict(hidden_size=768, ffn_dim=3072, num_hidden_layers=12, num_attention_heads=12, word_embed_proj_dim=768, vocab_size=50272, max_position_embeddings=2048)),
    '1b': _llama(2048, 8192, 16, 32, 8, 128256), '7b': _llama(4096, 11008, 32, 32, 32, 32000),
    '8b': _llama(4096, 14336, 32, 32, 8, 128256), '13b': _llama(5120, 13824, 40, 40, 40, 32000)}  # model type and configuration
FEW = dict(evaluations=16, windows=2, seqlen=512, restore=True)  # Bonsai, few sub-models
SHOT = dict(shots=1, rounds=1)  # LLM Surgeon, one shot
HOW = dict(surgeon=Run(batch_size=2, lean=True))  # how a method runs, where not by default
RUNS = [
    ('7b', 'fasp', dict(units=MLP), 128, 2048, 60), ('opt-125m', 'fasp', dict(units=MLP), 128, 2048, 8), ('7b', 'recipe', {}, 32, 2048, 60),
    ('13b', 'fasp', dict(units=MLP), 32, 2048, 40), ('8b', 'fasp', dict(units=MLP), 32, 2048, 30), ('7b', 'surgeon', SHOT, 32, 512, 30),
    ('7b', 'depth2', {}, 32, 2048, 30), ('7b', 'bonsai', FEW, 32, 2048, 30), ('1b', 'fasp', dict(units=MLP), 32, 2048, 15),
    ('1b', 'recipe', {}, 32, 2048, 20), ('opt-125m', 'fasp', dict(units=HEADS), 128, 2048, 8), ('7b', 'fasp', dict(units=VALUES), 32, 2048, 30),
    ('8b', 'recipe', {}, 32, 2048, 60), ('1b', 'surgeon', SHOT, 32, 512, 15), ('1b', 'bonsai', FEW, 32, 2048, 15), ('1b', 'depth2', {}, 32, 2048, 15),
    ('13b', 'recipe', {}, 16, 2048, 80), ('8b', 'surgeon', SHOT, 32, 512, 40), ('8b', 'depth2', {}, 32, 2048, 40),
    ('8b', 'bonsai', FEW, 32, 2048, 40), ('7b', 'recipe', {}, 128, 2048, 150)]
# shape, method, settings, windows, their tokens, seconds it may need; most wanted first


def smaller(kind, entries):
    "The stand-in for a shape that only tries the script."
    heads, kv = 4, 4*entries.get('num_key_value_heads', 1)//entries['num_attention_heads'] or 1
    width = 'ffn_dim' if kind == 'opt' else 'intermediate_size'
    r = {**entries, 'hidden_size': 32, width: 48, 'num_hidden_layers': 2, 'num_attention_heads': heads, 'vocab_size': 97}
    if kind == 'opt': r['word_embed_proj_dim'] = 32
    else: r['num_key_value_heads'] = kv
    return r


def random_model(shape, day, **changes):
    "A model with the weights of its class's own initialization, made on the device in the dtype of the day."
    kind, entries = SHAPES[shape]
    entries = {**(smaller(kind, entries) if day.tiny else entries), **changes}
    torch.manual_seed(0)
    with torch.device(day.device): model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(kind, **entries), dtype=day.dtype)
    return model.eval()


@torch.no_grad()
def body_seconds(model, windows, batch_size=8):
    "Seconds of one dense forward pass through the blocks, without the logits; the first batch runs before it, too."
    run = lambda batches: [model.base_model(b, use_cache=False) and None for b in batches]
    batches = windows.batches(batch_size, model.device)
    run(batches[:1])
    return clock(lambda: run(batches), model.device)


@cache
def warmed_up(name, settings, device, dtype):
    "One run of a method on a small model, so that libraries are loaded and handles made."
    model = tiny_model('llama', intermediate_size=64, hidden_size=48).to(device, dtype)
    few = dict(measure_seqlen=16) if name == 'recipe' else dict(seqlen=16, evaluations=8) if name == 'bonsai' else {}
    prune(model, random_tokens(model, 16, 32), configured(name, {**json.loads(settings), **few}), .2, inplace=True, run=HOW.get(name))


def timed_prune(model, windows, name, settings, sparsity, record):
    "Prune in place; writes seconds and bytes into the record, and returns the pruned model and its plan."
    method, tokens = configured(name, settings), windows.ids.numel()
    guess = estimate(model, method, tokens, sparsity, HOW.get(name), windows.seqlen, inplace=True)
    free(model.device)
    weights = weight_bytes(model)
    with peak_memory(model.device) as memory:
        found = []
        seconds = clock(lambda: found.extend(prune(model, windows, method, sparsity, inplace=True, run=HOW.get(name))), model.device)
    small, plan = found
    record.update(method=name, settings=method.settings(), sparsity=sparsity, true_sparsity=plan.true_sparsity, windows=len(windows), seqlen=windows.seqlen,
                  dtype=str(model.dtype).split('.')[-1], seconds=seconds, weight_bytes=weights, peak_bytes=memory['extra'] + weights, extra_bytes=memory['extra'],
                  estimate_bytes=guess['bytes'], estimate_flops=guess['flops'], peak_over_estimate=(memory['extra'] + weights)/guess['bytes'])
    return small, plan


def shape_run(shape, name, settings, n, seqlen, day, record):
    "One method on random weights of one shape."
    if day.tiny: n, seqlen, settings = 16, 32, {**settings, **(dict(measure_seqlen=16) if name == 'recipe' else dict(seqlen=16) if name == 'bonsai' else {})}
    warmed_up(name, json.dumps(settings), day.device, day.dtype)
    model = random_model(shape, day)
    windows = random_tokens(model, n, seqlen)
    record.update(shape=shape, parameters=n_parameters([model]), linear_parameters=n_parameters(decoder_linears(model).values()), forward_seconds=body_seconds(model, windows))
    record['forward_tflops'] = 2*record['linear_parameters']*windows.ids.numel()/record['forward_seconds']/1e12
    small, _ = timed_prune(model, windows, name, settings, .2, record)
    record['in_forward_passes'] = record['seconds']/record['forward_seconds']
    with torch.no_grad(): record['finite'] = bool(small(windows.ids[:1].to(small.device), use_cache=False, logits_to_keep=8).logits.isfinite().all())


# ---- speed of pruned shapes ------------------------------------------------------------------------------------------------

@torch.no_grad()
def prefill_seconds(model, ids): return clock(lambda: model(ids, use_cache=True, logits_to_keep=1), model.device)


@torch.no_grad()
def decode_seconds(model, ids, steps=4):
    "Seconds of a token after a prompt, of one sequence each."
    past = model(ids, use_cache=True, logits_to_keep=1).past_key_values
    def write():
        for _ in range(steps): model(ids[:, :1], past_key_values=past, use_cache=True)
    return clock(write, model.device)/steps


def speeds(models, day, record):
    "Prefill and decode of some models by name, the dense one first, in turn."
    record['linear_parameters'] = {n: n_parameters(decoder_linears(m).values()) for n, m in models.items()}
    some = next(iter(models.values()))
    for what, f, batch, tokens in [('prefill', prefill_seconds, 4, 512), ('decode', decode_seconds, 1, 256), ('decode-16', decode_seconds, 16, 256)]:
        ids = random_tokens(some, batch, 16 if day.tiny else tokens).ids.to(day.device)
        record[what] = dict(batch=batch, tokens=ids.shape[1], **paired({n: partial(f, m, ids) for n, m in models.items()}, *([2, 1] if day.tiny else [])))


def narrowed(model, **units):
    "A copy of a model that keeps the first units of each kind: number of units per group."
    small = copy.deepcopy(model)
    for kind, n in units.items():
        slice_units(small, {c.name: [g*(c.n_units//c.groups) + i for g in range(c.groups) for i in range(n)] for c in couplings(small, kind)})
    return small


def widths_around(dense):
    "Widths near four fifths: odd, even, and multiples of 8, 64 and 128, by a name that says which."
    near = lambda k, odd=0: max(k, round(.8*dense/k)*k) + odd
    found = {'odd': near(8, 1) if near(8) % 64 else near(8, -3), 'even': near(8, 2) if near(8) % 64 else near(8, -2), '8': near(8) if near(8) % 64 else near(8, 8),
             '64': near(128, 64), '128': near(128)}
    return {f'{w} ({k})': w for k, w in found.items()}


def speed_widths(day, record):
    "A few blocks of the 7B shape with MLPs of different widths."
    layers = 2 if day.tiny else 8
    dense = random_model('7b', day, num_hidden_layers=layers, **(dict(intermediate_size=344) if day.tiny else {}))
    f = anatomy(dense)[0].mlp_width
    speeds({f'{f} (dense)': dense, **{n: narrowed(dense, mlp_channel=w) for n, w in widths_around(f).items()}}, day, record)
    record['layers'] = layers


def speed_values(day, record):
    "A few blocks of the 7B shape: values of fewer channels, padded back to the size of a head, against whole heads."
    layers = 2 if day.tiny else 8
    dense = random_model('7b', day, num_hidden_layers=layers)
    b = anatomy(dense)[0]
    at = lambda x, share: max(1, round(x*share))
    models = {'dense': dense}
    for share in (.8, .75):
        v, k = at(b.value_dim, share), at(b.kv_heads, share)
        models[f'values {v} of {b.value_dim}'] = narrowed(dense, value_channel=v)
        models[f'heads {k} of {b.kv_heads}'] = narrowed(dense, kv_group=k)
    speeds(models, day, record)
    record['layers'] = layers


def graphed(f, device):
    "The same work as one launch, where the device has graphs."
    if torch.device(device).type != 'cuda': return f
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3): f()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph): f()
    return graph.replay


@torch.no_grad()
def speed_products(day, record):
    "The three products of one gated MLP of the 7B shape by its width, without launch times: nine of them in one graph."
    d, f = (32, 344) if day.tiny else (4096, 11008)
    for tokens in (1, 16, 64 if day.tiny else 4096):
        timings, x = {}, torch.randn(tokens, d, device=day.device, dtype=day.dtype)
        for name, w in {f'{f} (dense)': f, **widths_around(f)}.items():
            some = [[torch.randn(*s, device=day.device, dtype=day.dtype)/d**.5 for s in ((w, d), (w, d), (d, w))] for _ in range(3)]  # more than the caches hold
            def work(some=some):
                for i in range(9):
                    gate, up, down = some[i % 3]
                    F.linear(F.silu(F.linear(x, gate))*F.linear(x, up), down)
            timings[name] = partial(clock, graphed(work, day.device), day.device)
        record[f'tokens-{tokens}'] = paired(timings, *([2, 1] if day.tiny else [15]))
        del timings
        free(day.device)


def speed_smollm2(day, record):
    "SmolLM2 with MLPs of different widths, and with narrow values."
    dense, _ = small_model(day, day.dtype)
    b = anatomy(dense)[0]
    speeds({f'{b.mlp_width} (dense)': dense, **{n: narrowed(dense, mlp_channel=w) for n, w in widths_around(b.mlp_width).items()},
            f'values {b.value_dim*3//4} of {b.value_dim}': narrowed(dense, value_channel=b.value_dim*3//4)}, day, record)


# ---- SmolLM2 under the protocol ----------------------------------------------------------------------------------------------

WIDTH = dict(depth=False, multiple=1)                      # the recipe as in the rows of p1.yml
P1 = {
    'fasp-0.2': ('fasp', dict(units=MLP, damp=.01), .2), 'recipe-0.2': ('recipe', WIDTH, .2), 'depth2-0.2': ('depth2', {}, .2),
    'surgeon-0.2': ('surgeon', dict(shots=4, rounds=2, fresh=True), .2), 'bonsai-0.2': ('bonsai', dict(restore=True), .2),
    'flap-0.2': ('flap', {}, .2), 'wanda_sp-0.2': ('wanda_sp', {}, .2), 'taylor-0.2': ('taylor', dict(units=MLP, spare=(4, 2)), .2),
    'fasp-0.3': ('fasp', dict(units=MLP, damp=.01), .3), 'fasp-0.5': ('fasp', dict(units=MLP, damp=.01), .5),
    'recipe-0.3': ('recipe', WIDTH, .3), 'recipe-0.5': ('recipe', WIDTH, .5)}  # method, settings and sparsity


@cache
def _small_model(tiny, device, dtype):
    if tiny: return tiny_model('llama', intermediate_size=344).to(device, dtype), None
    return load_model('smollm2-135m', device, dtype)


def small_model(day, dtype): return _small_model(day.tiny, day.device, dtype)


@cache
def _protocol(tiny, device, dtype):
    "Model, calibration and evaluation windows, the dense model's perplexity and its forward passes over the calibration text, in seconds."
    model, tokenizer = _small_model(tiny, device, dtype)
    if tiny: fit, test = random_tokens(model, 16, 32), random_tokens(model, 8, 32, seed=1)
    else: fit, test = (load_windows('wikitext2', model, tokenizer, n=64, seqlen=512, evaluation=e) for e in (False, True))
    before = perplexity(model, test, 8)
    @torch.no_grad()
    def forward():
        for ids in fit.batches(8, model.device): model(ids, use_cache=False)
    forward()
    return model, fit, test, before, [clock(forward, model.device) for _ in range(3)]


def protocol(day, dtype): return _protocol(day.tiny, day.device, dtype)
def quality(p): return dict(value=p.value, stderr=p.stderr, windows=len(p.losses), losses=[round(x, 6) for x in p.losses.tolist()])


def p1_dense(dtype, day, record):
    "The model as it is."
    model, fit, _, before, forward = protocol(day, dtype)
    record.update(dtype=str(dtype).split('.')[-1], calibration=repr(fit), perplexity=quality(before), forward_seconds=forward, parameters=n_parameters([model]))


def p1(dtype, name, settings, sparsity, day, record):
    "One method: quality, seconds and bytes; three runs where they are short."
    model, fit, test, before, forward = protocol(day, dtype)
    if day.tiny: settings = {**settings, **(dict(measure_seqlen=16) if name == 'recipe' else dict(evaluations=8, windows=2, seqlen=16) if name == 'bonsai' else dict(spare=(0, 1)) if name == 'taylor' else {})}
    warmed_up(name, json.dumps({k: v for k, v in settings.items() if k != 'spare'}), day.device, dtype)
    runs = []
    while not runs or len(runs) < 3 and sum(runs) < (0 if day.tiny else 5):
        small, _ = timed_prune(copy.deepcopy(model), fit, name, settings, sparsity, record)
        runs.append(record['seconds'])
    after = perplexity(small, test, 8)
    rise = Perplexity(after.losses - before.losses)
    record.update(seconds=statistics.median(runs), runs=runs, forward_seconds=forward, in_forward_passes=statistics.median(runs)/statistics.median(forward),
                  perplexity=quality(after), dense=quality(before), loss_rise=dict(mean=rise.losses.mean().item(), stderr=rise.losses.std().item()/len(rise.losses)**.5))


# ---- notebooks -----------------------------------------------------------------------------------------------------------------

def shell():
    "A function that runs the source of a cell and returns its error, or None: by IPython where it is installed."
    try: from IPython.core.interactiveshell import InteractiveShell
    except ImportError:
        space = dict(__name__='__main__', display=print)
        def run(source):
            try: exec(compile(source, 'cell', 'exec'), space)
            except Exception as e: return e
        return run
    InteractiveShell.clear_instance()                      # of a kind that may answer in its own way
    instance = InteractiveShell.instance()
    def run(source):
        r = instance.run_cell(source)
        return r.error_in_exec or r.error_before_exec
    return run


def notebook(path, day, record, most=5):
    "The code cells of a notebook; what the first few that fail said."
    os.chdir(path.parent)
    cells = [''.join(c['source']) for c in json.loads(path.read_text(encoding='utf-8'))['cells'] if c['cell_type'] == 'code']
    record.update(cells=0, failed=[])
    run = shell()
    for i, source in enumerate(cells):
        if not source.strip() or re.search(r'#\|\s*eval:\s*false|#\|\s*default_exp', source): continue
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()): error = run(source)
        if isinstance(error, OutOfTime): raise error
        record['cells'] += 1
        if error is not None: record['failed'].append(dict(cell=i, error=last_words(error), source=source.strip().splitlines()[-1][:160]))
        if len(record['failed']) == most: break
    record['passed'] = not record['failed']


# ---- the list, and running it -----------------------------------------------------------------------------------------------------

@dataclass
class Measurement:
    "One file of results."
    name: str  # of the file
    run: Callable  # called with the day and the record to fill
    seconds: float  # it is not begun with less time left, and stopped after twice as much
    alone: bool = True  # nothing else runs meanwhile


def measurements(day):
    "All of them, most wanted first."
    names = lambda units: '-'.join(u.split('_')[0] for u in units)
    yield Measurement('ceilings', ceilings, 6)
    for family in TINY if not day.tiny else ('llama', 'gpt2'): yield Measurement(f'tiny-{family}', partial(tiny_family, family), 40, alone=False)
    for shape, method, settings, n, seqlen, seconds in RUNS[:8] if day.tiny else RUNS:
        label = f'shape-{shape}-{method}' + (f'-{names(settings["units"])}' if 'units' in settings else '') + f'-{n}x{seqlen}'
        yield Measurement(label, partial(shape_run, shape, method, settings, n, seqlen), seconds)
    for f in (speed_products, speed_widths, speed_values): yield Measurement(f.__name__.replace('_', '-'), f, 12)
    first, second = torch.bfloat16 if day.cuda else torch.float32, torch.float32 if day.cuda else torch.bfloat16
    for dtype, wanted in [(first, P1), (second, {k: v for k, v in P1.items() if k in ('fasp-0.2', 'recipe-0.2')})]:
        label = f'p1-{str(dtype).split(".")[-1]}'
        yield Measurement(f'{label}-dense', partial(p1_dense, dtype), 10)
        for name, setting in wanted.items(): yield Measurement(f'{label}-{name}', partial(p1, dtype, *setting), 40 if name.startswith('bonsai') else 25)
    yield Measurement('speed-smollm2', speed_smollm2, 25)
    paths = [p for p in sorted((ROOT/'nbs').glob('*.ipynb'), key=lambda p: (SLOW.find(p.stem[:2]) if p.stem[:2] in SLOW else 99, p.stem)) if not p.name.startswith('_')]
    for p in paths:
        if not day.tiny or p.stem == 'notation': yield Measurement(f'notebook-{p.stem}', partial(notebook, p), 90, alone=False)


SLOW = '70 40 52 30 10 51 61 50 20 80 99 60'  # notebooks that take longest, and so begin first
CAPS = dict(tiny=90, shape=300, speed=60, p1=180, notebook=210)  # seconds that a part may take in one run


def path_of(day, m): return day.out/f'{m.name}.json'


def finished(day, m):
    "Is the measurement done?"
    try: return json.loads(path_of(day, m).read_text(encoding='utf-8')).get('status') == 'done'
    except (OSError, ValueError): return False


def measure(day, m, seconds):
    "Run one measurement here and write its file, whatever happens."
    record, start = dict(name=m.name, status='done'), time.perf_counter()
    try:
        with at_most(seconds): m.run(day, record)
    except OutOfTime as e: record.update(status='stopped', error=str(e))
    except Exception as e: record.update(status='failed', error=last_words(e))
    free(day.device)
    record.update(took=round(time.perf_counter() - start, 2), machine=machine(day))
    write_atomic(path_of(day, m), json.dumps(record, indent=1) + '\n')
    return record


def in_child(day, m, seconds):
    "The same in a process of its own."
    command = [sys.executable, __file__, '--only', m.name, '--out', str(day.out), '--device', day.device, '--seconds', str(seconds), '--here']
    command += ['--tiny']*day.tiny + (['--commit', day.commit] if day.commit else [])
    found = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get('PYTHONPATH')])])     # for the processes that notebooks start
    environment = {**os.environ, 'MPLBACKEND': 'Agg', 'OMP_NUM_THREADS': '1', 'PYTHONPATH': found, **({} if day.cuda else {'CUDA_VISIBLE_DEVICES': ''})}
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=seconds + 15)
        words = (done.stderr.strip().splitlines() or [''])[-1]
    except subprocess.TimeoutExpired: words = 'killed after its time'
    if path_of(day, m).exists(): return json.loads(path_of(day, m).read_text(encoding='utf-8'))
    record = dict(name=m.name, status='failed', error=words, machine=machine(day))
    write_atomic(path_of(day, m), json.dumps(record, indent=1) + '\n')
    return record


def line(r):
    "One line about one result."
    parts = [f'{r["name"]:40} {r["status"]:8}']
    if 'took' in r: parts.append(f'{r["took"]:6.1f} s')
    if 'seconds' in r: parts.append(f'pruning {r["seconds"]:.2f} s = {r.get("in_forward_passes", float("nan")):.2f} passes, peak {r["peak_bytes"]/2**30:.1f} GiB' + (f' ({r["peak_over_estimate"]:.2f} of the estimate)' if 'peak_over_estimate' in r else ''))
    if 'perplexity' in r: parts.append(f'perplexity {r["perplexity"]["value"]:.2f} ± {r["perplexity"]["stderr"]:.2f}')
    if 'combinations' in r: parts.append(f'{r.get("agree", 0)} of {len(AGREE)} agree' + ''.join(f'; {n}: {c.get("error") or c}' for n, c in r['combinations'].items() if not c['agree']))
    if 'cells' in r: parts.append(f'{r["cells"]} cells, {len(r["failed"])} failed' + ''.join(f'; cell {f["cell"]}: {f["error"]}' for f in r['failed'][:1]))
    if 'matmul_bfloat16_tflops' in r: parts.append(', '.join(f'{k} {v:.0f}' for k, v in r.items() if k.endswith(('tflops', 'gb_s'))))
    for what in ('prefill', 'decode', 'decode-16', *(k for k in r if k.startswith('tokens-'))):
        if what in r: parts.append(f'\n    {what}: ' + ', '.join(f'{n} {v["median"]*1e3:.3f} ms x{v["ratio"]["median"]:.3f}' for n, v in r[what].items() if isinstance(v, dict)))
    if 'error' in r: parts.append(r['error'])
    return ' '.join(parts)


def run_all(day, todo, budget, jobs):
    "Run what is not done, in order, until the seconds are over; names of what was left."
    end, part_end, left = time.monotonic() + budget, {}, []
    def seconds_left(m):
        part = m.name.split('-')[0]
        cap = part_end.setdefault(part, time.monotonic() + CAPS.get(part, budget))
        return min(end, cap) - time.monotonic()
    def one(m):
        seconds = seconds_left(m)
        if seconds < m.seconds*(.1 if day.tiny or not m.alone else 1): return left.append(m.name)
        r = measure(day, m, min(seconds, 2*m.seconds)) if m.alone else in_child(day, m, min(seconds, 2*m.seconds))
        print(line(r), flush=True)
    while todo:
        group = [todo.pop(0)]
        while not group[0].alone and todo and not todo[0].alone: group.append(todo.pop(0))
        with ThreadPoolExecutor(jobs) as pool: list(pool.map(one, group)) if len(group) > 1 else one(group[0])
    return left


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--budget', type=float, default=480, help='seconds after which nothing new is begun and what runs is stopped')
    parser.add_argument('--out', type=Path, default=ROOT/'results'/'gpu', help='folder of results')
    parser.add_argument('--only', nargs='+', default=['*'], metavar='PATTERN', help='names of measurements, or shell patterns, in the order in which they are wanted')
    parser.add_argument('--device', default='cuda', help='cuda, or cpu with --tiny')
    parser.add_argument('--tiny', action='store_true', help='small stand-ins for everything: tries the script')
    parser.add_argument('--jobs', type=int, default=max(1, min(12, (os.cpu_count() or 2)*3//4)), help='processes at the same time, for what is not timed')
    parser.add_argument('--commit', help='commit that is measured, where the repository is here without git')
    parser.add_argument('--list', action='store_true', help='only print the names')
    parser.add_argument('--here', action='store_true', help=argparse.SUPPRESS)
    parser.add_argument('--seconds', type=float, help=argparse.SUPPRESS)
    a = parser.parse_args(argv)
    transformers.utils.logging.set_verbosity_error()
    warnings.filterwarnings('ignore', category=FutureWarning)
    day = Day(a.device, a.tiny, a.out.resolve(), a.commit)
    known = list(measurements(day))
    wanted = list(dict.fromkeys(m.name for pattern in a.only for m in known if fnmatch(m.name, pattern)))
    if not wanted: parser.error(f'nothing is called {" or ".join(a.only)}; --list prints the names')
    if a.list: return print('\n'.join(wanted))
    if day.cuda and not torch.cuda.is_available(): sys.exit('There is no CUDA device here. To try the script without one: python scripts/gpu_day.py --device cpu --tiny --out FOLDER')
    if not day.cuda and a.out == ROOT/'results'/'gpu': parser.error('name another folder with --out: results/gpu is for a GPU')
    by_name = {m.name: m for m in known}
    if a.here:
        for n in wanted: measure(day, by_name[n], a.seconds)
        return
    todo = [by_name[n] for n in wanted if not finished(day, by_name[n])]
    print(f'{len(wanted)} measurements, {len(wanted) - len(todo)} done before; {machine(day)}', flush=True)
    left = run_all(day, todo, a.budget, a.jobs)
    if left: print(f'no time for: {" ".join(left)}')


if __name__ == '__main__': main()

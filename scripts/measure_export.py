"""Measure pruned models in 8 and 4 bits at their bytes, and write results/export/quantized.json.

usage: python scripts/measure_export.py            every model and format that the file does not hold yet

Each model is pruned, saved and exported, and the weights of the file are given back to the model of transformers, which then reads the test text. A file
entry holds the loss of every window, so that differences can be paired, and the bytes of the file.
"""
import json
import tempfile
import time
from pathlib import Path

from prunebook.evaluate import window_losses
from prunebook.export import export, give_weights_of
from prunebook.fasp import FASP
from prunebook.models import load_model
from prunebook.plan import write_atomic
from prunebook.pruning import prune
from prunebook.recipe import Recipe
from prunebook.record import about
from prunebook.save import load_pruned, save_pruned
from prunebook.text import load_windows

RESULTS = Path(__file__).resolve().parent.parent/'results'/'export'/'quantized.json'
QUICK = dict(shares=(.5,), measure_windows=2, measure_seqlen=128, depth=False, multiple=1)    # one probe of each block, any width
METHODS = dict(fasp=FASP(), recipe_mlp=Recipe(units=('mlp_channel',), **QUICK), recipe=Recipe(**QUICK))
FORMATS = ('q8_0', 'q4_0')
CELLS = [('dense', 0, ('bf16', 'q8_0', 'q5_0', 'q4_1', 'q4_0')), *((m, s, FORMATS) for s in (.2, .3, .1) for m in METHODS), ('recipe_mlp', .47, FORMATS)]


def measure(model, tokenizer, method, sparsity, formats, calibration, test):
    "True sparsity, and bytes and losses in every format."
    small, plan = prune(model, calibration, METHODS[method], sparsity) if sparsity else (model, None)
    found = {}
    with tempfile.TemporaryDirectory() as d:
        folder = save_pruned(small, plan, f'{d}/saved', tokenizer)
        for form in formats:
            done = export(folder, f'{d}/model.gguf', form, overwrite=True)
            again, _, _ = load_pruned(folder, device=model.device, dtype=model.dtype)
            losses = window_losses(give_weights_of(done.file, again), test).tolist()
            found[form] = dict(bytes=done.bytes, architecture=done.architecture, zeros=done.zeros, losses=losses)
    return plan.true_sparsity if plan else 0, found


def main():
    model, tokenizer = load_model('smollm2-135m')
    calibration = load_windows('wikitext2', model, tokenizer, n=16, seqlen=512)
    test = load_windows('wikitext2', model, tokenizer, n=8, seqlen=512, evaluation=True)
    data = json.loads(RESULTS.read_text(encoding='utf-8')) if RESULTS.exists() else {}
    for method, sparsity, formats in CELLS:
        name, start = f'{method}-{sparsity}' if sparsity else method, time.process_time()
        known = data.get(name, {}).get('formats', {})
        if not (missing := [f for f in formats if f not in known]): continue
        true, found = measure(model, tokenizer, method, sparsity, missing, calibration, test)
        told = about(model, 'smollm2-135m', [calibration, test], time.process_time() - start)
        data[name] = dict(method=method, sparsity=sparsity, true_sparsity=true, formats={**known, **found}, about=told)
        write_atomic(RESULTS, json.dumps(data, indent=1) + '\n')
        print(f'{name}: {told["cpu_seconds"]} CPU seconds', flush=True)


if __name__ == '__main__': main()

"""Measure what a recovery gives back, and write results/recover/NAME.json, one file for each cell.

usage: python scripts/measure_recover.py [--only PATTERN] [--work FOLDER] [--limit QUESTIONS] [--list]

A cell begins with a pruned model and trains it for a number of CPU minutes. Finished cells are skipped, and an interrupted one goes on from its state in the work
folder, so that the same command may be given again. WikiText-2 must be in reach: the valid half is trained on and the test half evaluated on. Four windows of
passages are watched, others are evaluated on.
"""
import argparse
import fnmatch
import json
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from prunebook.methods import configured
from prunebook.models import load_model
from prunebook.plan import write_atomic
from prunebook.pruning import prune
from prunebook.record import State, about, side_by_side, strict_json
from prunebook.recover import Recovery, recover, recover_blocks
from prunebook.save import load_pruned, save_pruned
from prunebook.tasks import task_file
from prunebook.text import Windows, load_windows

RESULTS = Path(__file__).resolve().parent.parent/'results'/'recover'
TASKS = ('arc_easy', 'lambada_openai', 'openbook_qa', 'piqa', 'winogrande')
SEQLEN = 512

LORA = Recovery(batch_size=4)                              # more steps in the same time
FORMS = dict(                                              # what is trained, and on which text
    lora=(LORA, 'wikitext2'),
    all=(replace(LORA, trains='all', learning_rate=5e-5), 'wikitext2'),
    fast=(Recovery(learning_rate=1e-3, warmup=.05), 'wikitext2'),   # too fast: it harms at once
    labels=(replace(LORA, logits=0., labels=1.), 'wikitext2'),
    own=(LORA, 'self'),
    both=(replace(LORA, trains='all', learning_rate=5e-5), ('wikitext2', 'self')),   # half of the windows from each
    blocks=(replace(LORA, trains='all', learning_rate=5e-5), 'wikitext2'),
    # as in the official code of Bonsai: LoRA of rank 128 on the labels, with a little distillation; here the head stays
    bonsai=(Recovery(labels=1., logits=.01, rank=128, alpha=512, dropout=.05, learning_rate=1e-4, batch_size=128, at_once=1, checkpointing=True), 'wikitext2'))


@dataclass(frozen=True)
class Cell:
    "One run: what is pruned, and for how long it is trained."
    method: str
    sparsity: float
    form: str = 'lora' # a key of `FORMS`
    minutes: int = 60 # CPU minutes of training
    seed: int = 0
    model: str = 'smollm2-135m'
    steps: int = None # a number of steps in place of the minutes

    @property
    def name(self):
        long = f'{self.minutes}' if self.steps is None else f'{self.steps}-steps'
        return f'{self.method}-{self.sparsity}-{self.form}-{long}-{self.seed}' + ('' if self.model == 'smollm2-135m' else f'-{Path(self.model).name}')


SETTINGS = dict(recipe=dict(depth=False, multiple=1))      # as in the rows of p1.yml
EVERY = [Cell(m, s, 'lora', minutes, seed) for m in ('recipe', 'fasp') for s in (.2, .3, .5) for minutes in (5, 20, 60) for seed in (0, 1)]
EVERY += [Cell('recipe', .3, form, minutes) for form in ('all', 'labels', 'own', 'blocks') for minutes in (20, 60)]
EVERY += [Cell('recipe', .2, 'fast', 5)]
EVERY += [Cell('recipe', s, 'all', minutes) for s in (.2, .5) for minutes in (20, 60)]
EVERY += [Cell('recipe', s, 'both', minutes) for s in (.2, .3, .5) for minutes in (20, 60)]
EVERY += [Cell(m, .2, 'all', minutes, seed) for m, seed in (('recipe', 0), ('recipe', 1), ('fasp', 0)) for minutes in (5, 20)]
# Bonsai's Phi-2 to under two billion parameters, on one card of 48 GB: 15,000 windows in steps of 128. Needs the weights.
EVERY += [Cell('bonsai', .35, 'bonsai', model='microsoft/phi-2', steps=117)]
CELLS = {c.name: c for c in EVERY}


def pruned(dense, tokenizer, cell, work):
    "The pruned model and its plan; made once, then loaded."
    folder = work/f'{Path(cell.model).name}-{cell.method}-{cell.sparsity}'
    if not folder.exists():
        small, plan = prune(dense, load_windows('wikitext2', dense, tokenizer, 64, SEQLEN), configured(cell.method, SETTINGS.get(cell.method, {})), cell.sparsity)
        save_pruned(small, plan, folder, tokenizer)
    small, _, plan = load_pruned(folder, device=dense.device, dtype=dense.dtype)
    return small, plan


def known(file, make):
    "Plain values in a file, made if it is not there."
    if not file.exists(): write_atomic(file, json.dumps(make()))
    return json.loads(file.read_text(encoding='utf-8'))


OWN = 128                                                  # most windows that the dense model writes; they are read again after that


def own_windows(cut, n, file):
    "Windows that the dense model writes; kept in a file, as writing is slow."
    def write():
        w = cut('self', n)
        return dict(ids=w.ids.tolist(), source=w.source)
    found = known(file, write)
    return Windows(torch.tensor(found['ids']), found['source'])


def texts(form, n, cut, file):
    "Windows to train on, from one text or in equal parts from several; each is read once, but for those that the model writes."
    names = (form,) if isinstance(form, str) else form
    parts = [own_windows(cut, min(n//len(names), OWN), file) if t == 'self' else cut(t, n//len(names)) for t in names]
    if len(parts) == 1: return parts[0]
    n = max(map(len, parts))
    again = [p.ids.repeat(-(-n//len(p)), 1)[:n] for p in parts]
    return Windows(torch.cat(again), ' and '.join(p.source for p in parts))


def steps_for(minutes, small, dense, windows, how, form):
    "Steps that so many CPU minutes allow, from the time of two."
    run = recover_blocks if form == 'blocks' else recover
    _, done = run(small, dense, windows, 2, how)
    return max(1, round(60*minutes/(done.cpu_seconds/2)))


def measure(cell, work, tasks, limit):
    "One cell, as plain values."
    how, text = FORMS[cell.form]
    how = replace(how, seed=cell.seed)
    dense, tokenizer = load_model(cell.model)
    small, plan = pruned(dense, tokenizer, cell, work)
    cut = lambda source, n, **kw: load_windows(source, dense, tokenizer, n, SEQLEN, cell.seed, **kw)
    few = cut('wikitext2', 2*how.batch_size)
    steps = cell.steps or known(work/f'{cell.name}-steps.json', lambda: steps_for(cell.minutes, small, dense, few, how, cell.form))
    train, watch = texts(text, steps*how.batch_size, cut, work/f'{cell.name}-self.json'), cut('passages', 4)
    test = {t: cut(t, 64, evaluation=True) for t in ('wikitext2', 'passages')}
    before = State.of(small, tokenizer, test, tasks, limit)
    start = time.process_time()
    if cell.form == 'blocks': better, done = recover_blocks(small, dense, train, steps, how)
    else: better, done = recover(small, dense, train, steps, how, watch=watch, state=work/f'{cell.name}.safetensors')
    after = State.of(better, tokenizer, test, tasks, limit)
    told = about(better, cell.model, [train, watch, *test.values()], time.process_time() - start)
    return dict(cell=asdict(cell), settings=asdict(how), true_sparsity=plan.true_sparsity, recovery=done.plain(), about=told, **side_by_side(before, after))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--only', default='*', help='shell pattern of the names of cells')
    parser.add_argument('--work', default='_recover', type=Path, help='folder of pruned models and of interrupted runs')
    parser.add_argument('--tasks', default=','.join(TASKS), help='names of zero-shot tasks, separated by commas; "" for none')
    parser.add_argument('--limit', type=int, help='questions of each task; all by default')
    parser.add_argument('--list', action='store_true', help='print the names of the cells, and which are finished')
    a = parser.parse_args()
    tasks = [t for t in a.tasks.split(',') if t and task_file(t)]
    for name in fnmatch.filter(CELLS, a.only):
        file = RESULTS/f'{name}.json'
        if a.list: print(name, 'finished' if file.exists() else '')
        elif not file.exists():
            a.work.mkdir(parents=True, exist_ok=True)
            found = measure(CELLS[name], a.work, tasks, a.limit)
            write_atomic(file, strict_json(found) + '\n')
            texts = [found, *(found['other_texts'] or {}).values()]
            print(name, *(t['perplexity'] for t in texts), flush=True)


if __name__ == '__main__': main()

"""Several processes share the text, the probes and the sub-models of one run, and find what one process finds."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import tiny_model
from together import needs_fork, together
from safetensors.torch import load_file

from prunebook.cli import main
from prunebook.methods import configured
from prunebook.models import verify
from prunebook.plan import PrunePlan
from prunebook.pruning import prune
from prunebook.text import Windows
from prunebook.walk import processes

ROOT = Path(__file__).parent.parent
TORCHRUN = ['-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2', '--']
METHODS = dict(fasp=('fasp', dict(units=('value_channel', 'mlp_channel'))), recipe=('recipe', {}), surgeon=('surgeon', dict(shots=2)),
               bonsai=('bonsai', dict(evaluations=8, seqlen=12)), flap=('flap', {}),
               loss=('recipe', dict(metric='loss', order='greedy')), depth=('recipe', dict(depth=True, whole_price=.3, measure_seqlen=12)))
def windows(n=13): return Windows(torch.randint(3, 97, (n, 24), generator=torch.Generator().manual_seed(0)), 'random')


def pruned(folder):
    "Prune with every method, and keep what this process found."
    rank, count = processes()
    for name, (method, settings) in METHODS.items():
        small, plan = prune(tiny_model('llama'), windows(), configured(method, settings), .2)
        torch.save((plan.kept, small.state_dict()), folder/f'{name}-{rank}-{count}.pt')


def run(*args, code=0):
    env = {**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': os.pathsep.join([str(ROOT), os.environ.get('PYTHONPATH', '')])}
    p = subprocess.run([sys.executable, *map(str, args)], env=env, capture_output=True, text=True, timeout=600)
    assert p.returncode == code, p.stderr[-3000:]
    return p


@pytest.fixture(scope='module')
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp('processes')
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    pruned(folder)
    for count in (2, 4): assert together(lambda: pruned(folder), count) == [0]*count
    torch.set_num_threads(threads)
    return folder


@needs_fork
@pytest.mark.parametrize('count', [2, 4])
@pytest.mark.parametrize('method', METHODS)
def test_several_processes_prune_as_one(found, method, count):
    "The same units to the last, and the same weights but for the order of sums; in all processes the same bits."
    alone, first, *others = (torch.load(found/f'{method}-{of}.pt') for of in ('0-1', *(f'{i}-{count}' for i in range(count))))
    assert first[0] == alone[0] and len(others) == count - 1
    for other in others: assert other[0] == first[0] and all(torch.equal(w, other[1][n]) for n, w in first[1].items())
    for n, w in alone[1].items(): assert (first[1][n] - w).abs().max() <= 2e-4*w.abs().max(), n


def test_the_command_line_makes_one_folder(tmp_path, tiny_tokenizer, monkeypatch):
    monkeypatch.delenv('PRUNEBOOK_DATA', raising=False)
    tiny_model('llama', max_position_embeddings=512).save_pretrained(tmp_path/'dense')
    tiny_tokenizer.save_pretrained(tmp_path/'dense')
    words = ['prune', str(tmp_path/'dense'), '--text', 'passages', '--n', '5', '--seqlen', '32', '--device', 'cpu', '--dtype', 'float32', '--json']
    assert main([*words, '--out', str(tmp_path/'alone')]) == 0
    (tmp_path/'job.py').write_text('import sys; from prunebook.cli import main; sys.exit(main())')
    said = run(*TORCHRUN, tmp_path/'job.py', *words, '--out', tmp_path/'together', '--log', tmp_path/'log').stdout
    assert json.loads(said)['folder'] == str(tmp_path/'together') and verify(tmp_path/'together') == []      # one of them speaks
    assert sorted(p.name for p in tmp_path.iterdir()) == ['alone', 'dense', 'job.py', 'log', 'together']
    assert PrunePlan.load(tmp_path/'together'/'plan.json').kept == PrunePlan.load(tmp_path/'alone'/'plan.json').kept
    a, b = (load_file(tmp_path/n/'model.safetensors') for n in ('alone', 'together'))
    assert all((a[n] - b[n]).abs().max() <= 2e-4*a[n].abs().max() for n in a)


@needs_fork
def test_too_few_windows_are_refused(tmp_path):
    def worker():
        with pytest.raises(ValueError, match='1 windows cannot be shared out over 2 processes; give more.'): prune(tiny_model('llama'), windows(1), 'fasp', .2)
    assert together(worker, 2) == [0, 0]

"""Several processes share the text, the probes and the sub-models of one run, and find what one process finds."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import tiny_model
from safetensors.torch import load_file

from prunebook.cli import main
from prunebook.models import verify
from prunebook.plan import PrunePlan

ROOT = Path(__file__).parent.parent
TORCHRUN = ['-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2', '--']
METHODS = dict(fasp=('fasp', dict(units=('value_channel', 'mlp_channel'))), recipe=('recipe', {}), surgeon=('surgeon', dict(shots=2)),
               bonsai=('bonsai', dict(evaluations=8, seqlen=12)), flap=('flap', {}))
JOB = f'''
import sys, torch
from pathlib import Path
from prunebook.methods import Run, configured
from prunebook.models import tiny_model
from prunebook.pruning import prune
from prunebook.text import Windows
from prunebook.walk import processes
torch.set_num_threads(1)
w = Windows(torch.randint(3, 97, (13, 24), generator=torch.Generator().manual_seed(0)), 'random')
for name, (method, settings) in {METHODS!r}.items():
    small, plan = prune(tiny_model('llama'), w, configured(method, settings), .2)
    rank, count = processes() if len(sys.argv) > 2 else (0, 1)
    torch.save((plan.kept, small.state_dict()), Path(sys.argv[1])/f'{{name}}-{{rank}}-{{count}}.pt')
'''


def run(*args, code=0):
    env = {**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': os.pathsep.join([str(ROOT), os.environ.get('PYTHONPATH', '')])}
    p = subprocess.run([sys.executable, *map(str, args)], env=env, capture_output=True, text=True, timeout=600)
    assert p.returncode == code, p.stderr[-3000:]
    return p


@pytest.fixture(scope='module')
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp('processes')
    (folder/'job.py').write_text(JOB)
    run(folder/'job.py', folder)
    run(*TORCHRUN, folder/'job.py', folder, 'together')
    return folder


@pytest.mark.parametrize('method', METHODS)
def test_two_processes_prune_as_one(found, method):
    "The same units to the last, and the same weights but for the order of sums; in both processes the same bits."
    alone, first, second = (torch.load(found/f'{method}-{of}.pt') for of in ('0-1', '0-2', '1-2'))
    assert first[0] == second[0] == alone[0]
    assert all(torch.equal(w, second[1][n]) for n, w in first[1].items())
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


def test_too_few_windows_are_refused(tmp_path):
    (tmp_path/'job.py').write_text(JOB.replace('(13, 24)', '(1, 24)'))
    p = subprocess.run([sys.executable, *TORCHRUN, str(tmp_path/'job.py'), str(tmp_path), 'together'], capture_output=True, text=True, timeout=600,
                       env={**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': os.pathsep.join([str(ROOT), os.environ.get('PYTHONPATH', '')])})
    assert p.returncode and '1 windows cannot be shared out over 2 processes; give more.' in p.stderr

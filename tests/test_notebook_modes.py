"""The script that runs the notebooks: each mode does what it says, and four commits in a row cover every notebook in every mode."""
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT/'scripts'))
import test_notebooks as script  # noqa: E402


def run(folder, mode, *cells, seconds=float('inf')):
    "What the script says of a notebook of these cells."
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in cells]), folder/'page.ipynb')
    return script.execute(folder/'page.ipynb', mode, seconds)


@pytest.mark.parametrize('mode, device, dtype', [('float32', 'cpu', 'float32'), ('bfloat16', 'cpu', 'bfloat16'), ('gpu', 'gpu:0', 'bfloat16')])
def test_defaults(tmp_path, mode, device, dtype):
    "Of the package, of a module that took them from there, and of a page that defines them again."
    again = 'def default_dtype(device=None): return 7\ndef default_device(): return 7\n'
    check = f'import torch; from prunebook import models, save\nassert str(models.default_device()) == str(save.default_device()) == {device!r}\n' \
            f'assert str(models.default_dtype()) == str(models.default_dtype({device!r})) == "torch.{dtype}"'
    own = f'assert {"str(default_device()) == " + repr(device) if mode == "gpu" else "str(default_dtype()) == " + repr("torch." + dtype)}'
    assert run(tmp_path, mode, check, again, own).startswith('passed')


def test_gpu_refuses_what_cuda_refuses(tmp_path):
    mixed = 'from prunebook.models import default_device, tiny_model\nimport torch\n' \
            'tiny_model("llama").to(default_device())(torch.tensor([[1, 2]]))'
    exec(mixed, {})                                        # here, on the CPU, it passes
    said = run(tmp_path, 'gpu', mixed)
    assert said.startswith('FAILED') and 'same device' in said


def test_no_cell_begins_after_the_time(tmp_path):
    said = run(tmp_path, 'default', 'assert False', 'assert False', seconds=0)
    assert said.startswith('passed') and '0 of 2 cells run' in said
    said = run(tmp_path, 'default', '#| eval: false\nassert 1 == 3', 'assert 1 == 2')
    assert said.startswith('FAILED') and 'assert 1 == 2' in said


def test_a_cell_that_runs_too_long_is_interrupted(tmp_path):
    said = run(tmp_path, 'default', 'import time', 'time.sleep(600)', 'assert False', seconds=2)
    assert said.startswith('passed') and '1 of 3 cells run' in said
    assert run(tmp_path, 'default', 'assert False', 'import time; time.sleep(600)', seconds=2).startswith('FAILED')


def test_a_cell_that_is_interrupted_early_did_not_fail(tmp_path, monkeypatch):
    "Limits are whole seconds, so that an interruption may come before three times `seconds` have passed."
    monkeypatch.setattr(script, 'time', SimpleNamespace(perf_counter=lambda: time.perf_counter()/100))
    said = run(tmp_path, 'default', 'import time; time.sleep(600)', 'assert 1 == 2', seconds=.8)
    assert said.startswith('passed') and '0 of 2 cells run' in said


def test_a_dead_kernel_is_a_failure(tmp_path): assert run(tmp_path, 'default', 'import os; os._exit(3)').startswith('FAILED')


def test_four_quarters_are_all():
    paths = script.notebooks(ROOT/'nbs', [])
    jobs = [script.quarter_jobs(paths, ['float32', 'gpu'], q) for q in range(4)]
    for mode in ('float32', 'gpu'):
        found = [p for quarter in jobs for p, m in quarter if m == mode]
        assert len(found) == len(set(found)) and set(found) == set(paths) and len(paths) > 20
    assert all(not {p for p, m in quarter if m == 'gpu'} & {p for p, m in quarter if m == 'float32'} for quarter in jobs)

"""The script that runs the notebooks: each mode does what it says, and four commits in a row cover every notebook in every mode."""
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT/'scripts'))
import test_notebooks as script  # noqa: E402

del script.test  # pytest would take it for a test


def run(folder, mode, *cells, seconds='inf'):
    "Run a notebook of these cells in a process of its own."
    nb = dict(cells=[dict(cell_type='code', id=f'c{i}', metadata={}, execution_count=None, outputs=[], source=[c]) for i, c in enumerate(cells)],
              metadata=dict(kernelspec=dict(name='python3', language='python', display_name='python3')), nbformat=4, nbformat_minor=5)
    (folder/'page.ipynb').write_text(json.dumps(nb))
    code = f'import sys; sys.path.insert(0, {str(ROOT/"scripts")!r}); import test_notebooks as t; from pathlib import Path\n' \
           f'sys.exit(not t.execute(Path({str(folder/"page.ipynb")!r}), {mode!r}, float({seconds!r}), False))'
    return subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True)


@pytest.mark.parametrize('mode, device, dtype', [('float32', 'cpu', 'float32'), ('bfloat16', 'cpu', 'bfloat16'), ('gpu', 'gpu:0', 'bfloat16')])
def test_defaults(tmp_path, mode, device, dtype):
    "Of the package, of a module that took them from there, and of a page that defines them again."
    again = 'def default_dtype(device=None): return 7\ndef default_device(): return 7\n'
    check = f'import torch; from prunebook import models, save\nassert str(models.default_device()) == str(save.default_device()) == {device!r}\n' \
            f'assert str(models.default_dtype()) == str(models.default_dtype({device!r})) == "torch.{dtype}"'
    own = f'assert {"str(default_device()) == " + repr(device) if mode == "gpu" else "str(default_dtype()) == " + repr("torch." + dtype)}'
    done = run(tmp_path, mode, check, again, own)
    assert done.returncode == 0, done.stderr


def test_gpu_refuses_what_cuda_refuses(tmp_path):
    mixed = 'from prunebook.models import default_device, tiny_model\nimport torch\n' \
            'tiny_model("llama").to(default_device())(torch.tensor([[1, 2]]))'
    assert run(tmp_path, 'default', mixed).returncode == 0
    done = run(tmp_path, 'gpu', mixed)
    assert done.returncode == 1 and 'same device' in done.stderr


def test_no_cell_begins_after_the_time(tmp_path):
    done = run(tmp_path, 'default', 'assert False', 'assert False', seconds='0')
    assert done.returncode == 0 and '0 of 2 cells run' in done.stdout
    assert run(tmp_path, 'default', 'pass', 'assert False').returncode == 1


def test_four_quarters_are_all():
    paths = script.notebooks(ROOT/'nbs', [])
    with_code = {p for p in paths if script.code_cells(p)}
    jobs = [script.quarter_jobs(paths, ['float32', 'gpu'], q) for q in range(4)]
    for mode in ('float32', 'gpu'):
        found = [p for quarter in jobs for p, m in quarter if m == mode]
        assert len(found) == len(set(found)) and set(found) == with_code
    assert all(not {p for p, m in quarter if m == 'gpu'} & {p for p, m in quarter if m == 'float32'} for quarter in jobs)

"""Every file under results/ is made by a command that the book names, and says what it was measured with."""
import ast
import importlib.util
import json
import re
from dataclasses import asdict
from pathlib import Path

import pytest

from prunebook.bench import _module, finished, read_grid
from prunebook.methods import METHODS, configured
from prunebook.record import Record, parts_timed

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT/'results'
GRIDS = {p.stem: read_grid(p) for p in sorted(RESULTS.glob('*.yml'))}
FILES = [(n, p) for n in GRIDS for p in sorted((RESULTS/n).glob('*.json'))]


def strings(x):
    "All strings in plain values, keys too."
    if isinstance(x, dict): return [*x, *(s for v in x.values() for s in strings(v))]
    if isinstance(x, list): return [s for v in x for s in strings(v)]
    return [x] if isinstance(x, str) else []


def agrees(asked, told):
    "Whether windows that a grid asks for are those that a record tells of."
    n, seqlen, text = asked['n'], asked['seqlen'], asked['text']
    source = dict(random='random tokens', self='self-generated').get(text, text)
    found = re.match(r'(\d+) windows of (\d+) tokens from (.*)', told)
    return int(found[1]) <= n and int(found[2]) == seqlen and found[3].startswith(source)


def test_every_folder_has_a_command():
    folders = {p.name for p in RESULTS.iterdir() if p.is_dir()}
    # papers has tests of its own, test_papers.py; the last six have scripts
    assert folders == {*GRIDS, 'papers', 'estimate', 'export', 'gpu', 'interactive', 'passages', 'recover'}
    for name, page in (('recover', '75_recover'), ('estimate', '09_estimate')):
        assert f'scripts/measure_{name}.py' in (ROOT/'nbs'/f'{page}.ipynb').read_text()
    page = (ROOT/'nbs'/'80_bench.ipynb').read_text()
    for name in GRIDS: assert f'prunebook bench results/{name}.yml --out results/{name}' in page
    for name in ('interactive', 'passages'): assert f'scripts/measure_{name}.py' in page
    assert 'scripts/measure_export.py' in (ROOT/'nbs'/'85_export.ipynb').read_text()


@pytest.mark.parametrize('name', ['interactive', 'passages'])
def test_scripts_make_each_of_their_files(name):
    tree = ast.parse((ROOT/'scripts'/f'measure_{name}.py').read_text())
    names = next(n.value for n in ast.walk(tree) if isinstance(n, ast.Assign) and getattr(n.targets[0], 'id', '') == 'NAMES')
    assert {p.stem for p in (RESULTS/name).iterdir()} == {*ast.literal_eval(names)}


@pytest.mark.parametrize('grid, path', FILES, ids=[f'{n}/{p.stem}' for n, p in FILES])
def test_a_file_is_a_record_of_its_cell(grid, path):
    assert path.stem in GRIDS[grid], f'{path.name} belongs to no cell'
    cell = GRIDS[grid][path.stem]
    assert finished(cell, RESULTS/grid)                    # refuses other settings
    r = Record.read(path)
    assert (r.method, r.sparsity, r.model) == (cell.method, cell.sparsity, cell.model)
    assert {k: r.settings.get(k, 'missing') for k in cell.settings} == cell.settings
    assert cell.method == 'dense' or agrees(cell.calibration, r.calibration) and r.seed == cell.seed
    told = [r.evaluation] if r.evaluation else []
    told += [t['evaluation'] for t in (r.other_texts or {}).values()]
    assert len(told) == len(cell.evaluation) and all(map(agrees, cell.evaluation, told))


@pytest.mark.parametrize('path', sorted(RESULTS.glob('*/*.json')), ids=lambda p: f'{p.parent.name}/{p.stem}')
def test_no_file_holds_a_path_of_a_machine(path):
    found = [s for s in strings(json.loads(path.read_text())) if re.match(r'(/|~|[A-Z]:\\)\w', s)]
    assert not found


def test_functions_whose_time_is_taken_are_there():
    timed = [c for cells in GRIDS.values() for c in cells.values() if c.parts]
    assert {'surgeon', 'structures'} <= {c.method for c in timed}
    for cell in timed:
        with parts_timed(_module(cell.built()), cell.parts): pass


@pytest.mark.parametrize('path', sorted((RESULTS/'recover').glob('*.json')), ids=lambda p: p.stem)
def test_a_recovery_belongs_to_a_cell(path):
    spec = importlib.util.spec_from_file_location('measure_recover', ROOT/'scripts'/'measure_recover.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found = json.loads(path.read_text())
    cell = module.CELLS[path.stem]
    assert found['cell'] == asdict(cell) and found['recovery']['settings'] == found['settings']
    assert found['settings'] == asdict(module.replace(module.FORMS[cell.form][0], seed=cell.seed))


def test_peaks_belong_to_cells_of_their_script():
    spec = importlib.util.spec_from_file_location('measure_estimate', ROOT/'scripts'/'measure_estimate.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found = {p.stem: json.loads(p.read_text()) for p in (RESULTS/'estimate').glob('*.json')}
    assert found and set(found) <= set(module.CELLS)
    plain = lambda settings: json.loads(json.dumps(settings))
    assert all(r['method'] == module.CELLS[n][1] and r['settings'] == plain(module.METHODS[r['method']]) for n, r in found.items())


@pytest.mark.parametrize('grid', GRIDS)
def test_a_result_has_the_settings_that_its_grid_means_now(grid):
    "A default that changes later does not change what a row of a grid is."
    for cell in GRIDS[grid].values():
        record = finished(cell, RESULTS/grid)
        if record is None or cell.method not in METHODS: continue
        now = configured(cell.method, cell.settings, cell.preset).at(cell.sparsity).settings()
        unused = {'seed', *(['whole_price'] if not now.get('depth') else [])}
        other = {k: (v, now[k]) for k, v in record['settings'].items() if k in now and now[k] != v and k not in unused}
        assert not other, (cell.name, other)

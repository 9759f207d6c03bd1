"""Grids of the papers' tables: each can be read, its shape is that of the model, and its table shows what is missing."""
from pathlib import Path

import pytest

from prunebook.bench import _shaped, beside_published, published_table, read_grid, read_published
from prunebook.cli import main
from prunebook.models import n_parameters

PAPERS = Path(__file__).resolve().parent.parent/'results'/'papers'
GRIDS = sorted(PAPERS.glob('*.yml'))


def test_the_papers_are_there():
    "The four methods, and two newer models."
    methods = {p.stem.partition('-')[0]: {c.method for c in read_grid(p).values()} - {'dense'} for p in GRIDS}
    assert methods == dict(bonsai={'bonsai'}, depth2={'depth2'}, fasp={'fasp'}, surgeon={'surgeon'}, putri={'fasp', 'recipe'})


@pytest.mark.parametrize('path', GRIDS, ids=lambda p: p.stem)
def test_a_grid_of_a_paper(path, tmp_path):
    cells, told = read_grid(path), read_published(path)
    assert told.source and told.config and f'prunebook bench results/papers/{path.stem}.yml --out results/papers/{path.stem}\n' in path.read_text()
    rows = beside_published(path, tmp_path)
    assert [r['cell'] for r in rows] == [*cells] and all(r['measured'] is None for r in rows)
    for r in rows[1:]: assert r['passes'] > 1 and 2**30 < r['bytes'] < 200*2**30
    text = published_table(rows)
    assert text.count('not measured') == len(cells)
    for x in told.perplexity.values(): assert f'| {x:g} |' in text
    published = [c for c in cells.values() if c.method != 'dense' and not path.stem.startswith('putri')]
    assert all(c.preset == 'published' for c in published)


@pytest.mark.parametrize('name, count', [('fasp-llama-7b', 6738415616), ('putri-llama-3-8b', 8030261248)])
def test_the_shape_is_that_of_the_model(name, count):
    config = read_published(PAPERS/f'{name}.yml').config
    assert n_parameters([_shaped(config, 'bfloat16')]) == count


def test_the_command(tmp_path, capsys):
    assert main(['bench', str(PAPERS/'surgeon-opt-125m.yml'), '--out', str(tmp_path/'none'), '--compare', '--only', 'surgeon-8*']) == 0
    row = capsys.readouterr().out.splitlines()[-1]
    assert row.startswith('| surgeon-8-shots-0.1-0 | 28.01 | not measured | ') and not (tmp_path/'none').exists()


@pytest.mark.parametrize('grid', GRIDS, ids=lambda p: p.stem)
def test_files_belong_to_cells(grid):
    cells = read_grid(grid)
    rows = {r['cell']: r for r in beside_published(grid, PAPERS/grid.stem)}                    # refuses files of other settings
    for file in PAPERS.glob(f'{grid.stem}/*.json'): assert file.stem in cells and rows[file.stem]['measured'] > 1

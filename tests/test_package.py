"""What is installed: the files beside the modules, and the looks of the figures."""
import base64
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import matplotlib
import pytest

matplotlib.use('agg')
import matplotlib.pyplot as plt

import prunebook
from prunebook.evaluate import measure, plot_report
from prunebook.models import tiny_model
from prunebook.plan import PrunePlan
from prunebook.record import results_folder
from prunebook.text import random_tokens

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT/'scripts'))


def files(folder):
    return {p.relative_to(folder).as_posix() for p in folder.rglob('*') if p.is_file() and '__pycache__' not in p.parts}


@pytest.fixture(scope='module')
def built(tmp_path_factory):
    "The folder with the package as an installation has it."
    folder = tmp_path_factory.mktemp('built')
    subprocess.run([sys.executable, 'setup.py', '-q', 'build', '--build-base', folder/'temp', '--build-lib', folder/'lib'], cwd=ROOT, check=True)
    return folder/'lib'


def test_every_file_of_the_package_is_built(built):
    "Passages, figures, results and the style are read at run time, so a pattern missing in setup.py breaks an installed package only."
    results = {f'results/{name}' for name in files(ROOT/'results')}
    assert files(ROOT/'prunebook') | results == files(built/'prunebook')


def found_by(package, folder):
    "What `results_folder` says of a package, in a process that has no checkout beside it."
    say = 'from prunebook.record import Record, results_folder as f; print(f()); print(Record.read(f()/"p1"/"recipe-0.2.json").method)'
    env = {**os.environ, 'PYTHONPATH': str(package)}
    return subprocess.run([sys.executable, '-P' if sys.version_info >= (3, 11) else '-u', '-c', say], cwd=folder, env=env, capture_output=True, text=True)


def test_an_installed_package_has_its_results(built, tmp_path):
    done = found_by(built, tmp_path)
    assert done.stdout.split() == [str(built/'prunebook'/'results'), 'recipe'], done.stderr


def test_without_results_the_remedy_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(prunebook, '__file__', str(tmp_path/'prunebook'/'__init__.py'))
    with pytest.raises(FileNotFoundError, match='install the package again'): results_folder()


def test_a_checkout_has_its_results(): assert results_folder() == ROOT/'results'


def test_no_page_reads_results_from_a_checkout():
    "A page in Colab has the package, and no repository around it."
    cells = [(p.name, ''.join(c['source'])) for p in (ROOT/'nbs').glob('*.ipynb') for c in json.loads(p.read_text(encoding='utf-8'))['cells'] if c['cell_type'] == 'code']
    assert [name for name, text in cells if '../results' in text] == []
    assert len({name for name, text in cells if 'results_folder()' in text}) > 20


def plan_figure(tokenizer):
    return PrunePlan('m', {}, .5, {'0.mlp_channel': [0], '1.mlp_channel': [0, 1]}, {'0.mlp_channel': 2, '1.mlp_channel': 2}, 'x').plot().figure


def report_figure(tokenizer):
    model = tiny_model('llama', vocab_size=len(tokenizer))
    m = measure(model, tokenizer, random_tokens(model, n=2, seqlen=8), new=2)
    return plot_report(m, m)


@pytest.mark.parametrize('figure', [plan_figure, report_figure])
def test_figures_have_the_style_of_the_book_and_leave_that_of_the_reader(figure, tiny_tokenizer):
    with matplotlib.rc_context({'axes.prop_cycle': matplotlib.cycler('color', ['#111111']), 'axes.spines.top': True}):
        ax, = figure(tiny_tokenizer).axes
        assert not ax.spines['top'].get_visible() and not ax.spines['right'].get_visible()
        colors = [p.get_facecolor() for p in ax.patches] or [line.get_color() for line in ax.lines]
        drawn = {matplotlib.colors.to_hex(c) for c in colors}
        assert '#111111' not in drawn and '#4477aa' in drawn
        assert plt.rcParams['axes.spines.top'] and plt.rcParams['axes.prop_cycle'].by_key()['color'] == ['#111111']


def test_pictures_are_sharp_on_any_screen():
    "A notebook saves a figure with twice the dots of a screen, and the site shows it at half its size."
    smoke_site = pytest.importorskip('smoke_site')
    with plt.style.context('prunebook.book'):
        fig, _ = plt.subplots()
        file = io.BytesIO()
        fig.savefig(file, format='png')
        inches = fig.get_figwidth()
    start = base64.b64encode(file.getvalue()).decode()[:400]
    assert smoke_site.shown_width(start) == round(96*inches)
    file = io.BytesIO()
    fig.savefig(file, format='png', dpi=100)
    assert smoke_site.shown_width(base64.b64encode(file.getvalue()).decode()[:400]) is None
    assert smoke_site.PNG.search(f'<img alt="a" src="data:image/png;base64,{start}AAAA">')[1] == start


def test_pages_that_draw_use_the_style_of_the_book():
    pages = {p.name: json.loads(p.read_text(encoding='utf-8'))['cells'] for p in (ROOT/'nbs').glob('*.ipynb')}
    code = {name: '\n'.join(''.join(c['source']) for c in cells if c['cell_type'] == 'code') for name, cells in pages.items()}
    drawing = {name for name, text in code.items() if 'plt.subplots(' in text}
    assert len(drawing) > 20 and [name for name in drawing if "plt.style.use('prunebook.book')" not in code[name]] == []

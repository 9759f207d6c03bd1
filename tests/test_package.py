"""What is installed: the files beside the modules, and the looks of the figures."""
import subprocess
import sys
from pathlib import Path

import matplotlib
import pytest

matplotlib.use('agg')
import matplotlib.pyplot as plt

from prunebook.evaluate import measure, plot_report
from prunebook.models import tiny_model
from prunebook.plan import PrunePlan
from prunebook.text import random_tokens

ROOT = Path(__file__).resolve().parent.parent


def files(folder):
    return {p.relative_to(folder).as_posix() for p in folder.rglob('*') if p.is_file() and '__pycache__' not in p.parts}


def test_every_file_of_the_package_is_built(tmp_path):
    "Passages, figures and the style are read at run time, so a pattern missing in setup.py breaks an installed package only."
    subprocess.run([sys.executable, 'setup.py', '-q', 'build', '--build-base', tmp_path/'temp', '--build-lib', tmp_path/'lib'], cwd=ROOT, check=True)
    assert files(ROOT/'prunebook') == files(tmp_path/'lib'/'prunebook')


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

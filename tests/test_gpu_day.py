"""The script of the GPU day, on the CPU: what it would measure, that it compares honestly, goes on where it stopped and says what failed."""
import importlib.util
import json
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch

from prunebook.methods import configured

from prunebook.pruning import prune
from prunebook.text import random_tokens
from helpers import tiny_model

ROOT = Path(__file__).resolve().parent.parent
spec = importlib.util.spec_from_file_location('gpu_day', ROOT/'scripts'/'gpu_day.py')
gpu_day = sys.modules['gpu_day'] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(gpu_day)


@pytest.fixture
def day(tmp_path): return gpu_day.Day('cpu', True, tmp_path)


def real(tmp_path): return gpu_day.Day('cpu', False, tmp_path)


def test_names_are_files_of_their_own(tmp_path):
    names = [m.name for m in gpu_day.measurements(real(tmp_path))]
    assert len(set(names)) == len(names) > 60
    assert all(set(n) <= set('abcdefghijklmnopqrstuvwxyz0123456789-_.') for n in names)


@pytest.mark.parametrize('setting', [*gpu_day.AGREE.values(), *[(m, s) for _, m, s, *_ in gpu_day.RUNS], *[(m, s) for m, s, _ in gpu_day.P1.values()]], ids=str)
def test_every_setting_is_one_the_method_has(setting): configured(*setting)


@pytest.mark.parametrize('shape', gpu_day.SHAPES)
def test_shapes_have_the_parameters_that_their_names_say(shape, tmp_path):
    day = gpu_day.Day('meta', False, tmp_path)
    found = gpu_day.n_parameters([gpu_day.random_model(shape, day)])/1e9
    assert found == pytest.approx({'opt-125m': .125, '1b': 1.24 + .26, '7b': 6.74, '8b': 8.03, '13b': 13.02}[shape], rel=.01)


def test_tiny_models_agree_with_themselves(day, monkeypatch, one_thread):
    few = {k: gpu_day.AGREE[k] for k in ('fasp values', 'recipe', 'surgeon', 'random')}
    monkeypatch.setattr(gpu_day, 'AGREE', few)
    gpu_day.tiny_family('llama', day, record := {})
    assert record['agree'] == record['of'] == 4
    assert all(r['logits'] < 1e-5 and r['disputed_units'] == 0 for r in record['combinations'].values())


def test_a_device_that_computes_something_else_does_not_agree(day, monkeypatch, one_thread):
    def wrong(model, *args, **kw):
        small, plan = prune(model, *args, **kw)
        if len(calls) == 1: small.lm_head.weight.data.mul_(1.01)
        calls.append(1)
        return small, plan
    calls = []
    monkeypatch.setattr(gpu_day, 'prune', wrong)
    r = gpu_day.agreement(tiny_model('llama'), random_tokens(tiny_model('llama'), 16, 32), 'fasp', {}, 'cpu')
    assert not r['agree'] and r['logits'] == pytest.approx(.01, rel=.01)


def test_only_units_at_the_border_may_be_disputed():
    model = tiny_model('llama')
    _, a = prune(model, random_tokens(model, 16, 32), 'fasp', .2)
    _, b = prune(model, random_tokens(model, 16, 32), 'fasp', .2)
    name, kept = '0.mlp_channel', a.kept['0.mlp_channel']
    scores = torch.tensor(a.scores[name])
    lost = [u for u in range(len(scores)) if u not in kept]
    weakest, best = min(kept, key=lambda u: scores[u]), max(kept, key=lambda u: scores[u])
    b.kept[name] = sorted({*kept, lost[0]} - {best})
    assert gpu_day.disputed(model, ('mlp_channel',), a, b)[0] == 2
    assert gpu_day.disputed(model, ('mlp_channel',), a, b)[1] > .5
    a.scores[name][lost[0]] = a.scores[name][weakest]
    b.kept[name] = sorted({*kept, lost[0]} - {weakest})
    assert gpu_day.disputed(model, ('mlp_channel',), a, b) == (2, 0)


def test_shape_run_measures_what_it_says(day, one_thread):
    gpu_day.shape_run('8b', 'fasp', {}, 128, 2048, day, record := {})
    assert record['finite'] and .2 <= record['true_sparsity'] < .25 and record['shape'] == '8b' and record['windows'] == 16
    assert record['seconds'] > 0 and record['in_forward_passes'] == record['seconds']/record['forward_seconds']


def test_speeds_of_pruned_shapes(day, one_thread):
    gpu_day.speed_values(day, record := {})
    sizes = record['linear_parameters']
    assert record['prefill']['dense']['ratio']['median'] == 1 and set(sizes) < set(record['prefill'])
    assert all(n == 'dense' or s < sizes['dense'] for n, s in sizes.items())
    widths = gpu_day.widths_around(11008)
    by = {n.split('(')[1][:-1]: w for n, w in widths.items()}
    assert by['odd'] % 2 and by['even'] % 4 == 2 and by['8'] % 16 == 8 and by['64'] % 128 == 64 and not by['128'] % 128
    assert all(.78 < w/11008 < .83 for w in by.values())


def test_a_run_goes_on_where_it_stopped_and_writes_what_failed(day, capsys):
    ran = []
    def good(day, record): ran.append('good'); record['x'] = 1
    def bad(day, record): ran.append('bad'); raise ValueError('no such thing')
    def slow(day, record): ran.append('slow'); record['part'] = 1; time.sleep(5)
    todo = [gpu_day.Measurement(f.__name__, f, 1) for f in (good, bad)] + [gpu_day.Measurement('slow', slow, .1)]
    assert gpu_day.run_all(day, list(todo), 60, 1) == []
    read = {n: json.loads((day.out/f'{n}.json').read_text()) for n in ('good', 'bad', 'slow')}
    assert [r['status'] for r in read.values()] == ['done', 'failed', 'stopped']
    assert 'no such thing' in read['bad']['error'] and read['slow']['part'] == 1 and read['good']['machine']['torch'] == torch.__version__
    assert [m.name for m in todo if not gpu_day.finished(day, m)] == ['bad', 'slow']


def test_what_does_not_fit_in_the_budget_is_not_begun(day):
    todo = [gpu_day.Measurement('long', lambda day, record: pytest.fail('begun'), 100)]
    assert gpu_day.run_all(real(day.out), todo, 10, 1) == ['long']
    assert not list(day.out.iterdir())


def test_notebook_runner_names_the_first_cell_that_fails(day, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cells = ['#| default_exp x', 'a = 1', '#| eval: false\n1/0', 'display(a)', 'a + missing', 'a = 2\nassert a == 3', 'a']
    nb = tmp_path/'x.ipynb'
    nb.write_text(json.dumps(dict(cells=[dict(cell_type='code', source=[c]) for c in cells])))
    gpu_day.notebook(nb, day, record := {})
    assert record['cells'] == 5 and [f['cell'] for f in record['failed']] == [4, 5] and not record['passed']
    assert record['failed'][0]['error'].startswith('NameError') and record['failed'][1]['source'] == 'assert a == 3'


def test_a_measurement_in_a_process_of_its_own(day):
    m = next(m for m in gpu_day.measurements(day) if m.name == 'notebook-notation')
    record = gpu_day.in_child(day, m, 100)
    assert record['status'] == 'done' and record['passed'] and record['cells'] > 3


def test_results_of_a_cpu_stay_out_of_results_gpu():
    with pytest.raises(SystemExit): gpu_day.main(['--device', 'cpu', '--tiny', '--only', 'ceilings'])

"""Grids: what is refused before anything runs, what a cell records, and when it is run again."""
import json
import math
import os
import random
import subprocess
import threading
import time
from pathlib import Path

import pytest
import torch
import yaml
from helpers import tiny_model
from together import needs_fork, together
from hypothesis import given, strategies as st

from prunebook import bench as bench_module
from prunebook.bench import TOLERANCE, bench, compare, finished, read_grid, recheck, run_cell
from prunebook.cli import main
from prunebook.evaluate import window_losses
from prunebook.fasp import FASP, column_scores
from prunebook.models import load_model
from prunebook.pruning import prune
from prunebook.repair import Ridge, damp_for
from prunebook.record import Record, _median_interval, last_words, paired_speed, quality
from prunebook.text import Windows, load_windows

pytestmark = pytest.mark.usefixtures('one_thread')
WINDOWS = dict(text='passages', n=3, seqlen=64)


@pytest.fixture(scope='module')
def folder(tmp_path_factory, tiny_tokenizer):
    path = tmp_path_factory.mktemp('models')/'dense'
    tiny_model('qwen2', max_position_embeddings=512).save_pretrained(path)
    tiny_tokenizer.save_pretrained(path)
    return str(path)


def grid(folder, **changes):
    return {**dict(model=folder, calibration=WINDOWS, evaluation=[WINDOWS], sparsities=[.2], seeds=[0, 1], speed=0, methods=dict(random={}, cut=dict(method='fasp', settings=dict(restore=False), seeds=[0]))), **changes}


@pytest.fixture
def written(tmp_path):
    "Write a grid; its path."
    def f(content, name='grid.yml'):
        (tmp_path/name).write_text(content if isinstance(content, str) else yaml.safe_dump(content, sort_keys=False))
        return tmp_path/name
    return f


def in_process(command, **kw):
    "Run a cell here instead of in a process of its own."
    bench_module.one_cell(*command[3:])
    return subprocess.CompletedProcess(command, 0, '', '')


def test_cells(folder, written):
    cells = read_grid(written(grid(folder)))
    assert list(cells) == ['dense', 'random-0.2-0', 'random-0.2-1', 'cut-0.2-0']
    assert cells['random-0.2-1'].built().seed == 1 and cells['cut-0.2-0'].built().restore is False
    assert cells['dense'].method == 'dense'


@pytest.mark.parametrize('changes, words', [
    (dict(model=None), 'model is None'), (dict(seeds=3), 'seeds is 3'), (dict(sparsities=[1.5]), 'sparsity 1.5'), (dict(extra=1), 'unknown entry extra'),
    (dict(calibration=dict(text='passages')), 'text, n and seqlen'), (dict(methods=dict(lottery={})), "'lottery'"), (dict(methods=dict(fasp=dict(setting={}))), 'unknown entry setting'),
    (dict(methods=dict(fasp=dict(settings=dict(dampp=1)))), 'no setting dampp'), (dict(methods=dict(fasp=dict(settings=dict(damp=-1)))), 'damp is -1'), (dict(seeds=[0, 0]), 'twice')])
def test_refused(folder, written, changes, words):
    with pytest.raises(ValueError, match=words): read_grid(written(grid(folder, **changes)))


def test_calibration_of_one_method(folder, written):
    methods = dict(random={}, other=dict(method='random', calibration=dict(n=2)))
    cells = read_grid(written(grid(folder, methods=methods)))
    assert cells['random-0.2-0'].calibration == WINDOWS and cells['other-0.2-0'].calibration == {**WINDOWS, 'n': 2}
    methods['other']['calibration']['words'] = 3
    with pytest.raises(ValueError, match='other: calibration is'): read_grid(written(grid(folder, methods=methods)))


@pytest.mark.parametrize('content, words', [('a: [', 'not YAML'), ('', 'not a grid'), ('- a', 'not a grid')])
def test_not_a_grid(written, content, words):
    with pytest.raises(ValueError, match=words): read_grid(written(content))


def test_record(folder, written):
    cell = read_grid(written(grid(folder, speed=1)))['cut-0.2-0']
    r = json.loads(run_cell(cell).text())
    assert r['cell']['label'] == 'cut' and r['method'] == 'fasp' and r['settings']['restore'] is False
    assert r['true_sparsity'] >= .2 and r['evaluation'].startswith('3 windows of 64 tokens from passages')
    for when in ('before', 'after'):
        losses = r['losses'][when]
        assert len(losses) == 3
        assert math.isclose(r['perplexity'][when]['value'], math.exp(sum(losses)/3), rel_tol=1e-3)
    assert r['linear_parameters']['after'] < r['linear_parameters']['before']
    assert r['units_left'].keys() == {f'{i}.mlp_channel' for i in range(3)} and set(r['speed']) == {'before', 'after', 'ratio'}
    assert 0 < r['disk_bytes'] - r['bytes']['after'] < 20000 and r['seconds']['forward_cpu'] > 0


def test_what_only_makes_zeros_is_a_cell_too(folder, written):
    methods = dict(weights=dict(method='elements', settings=dict(score='wanda')), whole=dict(method='structures', settings=dict(shots=1), parts=dict(factors=['curvature'])))
    cells = read_grid(written(grid(folder, sparsities=[.5], seeds=[0], methods=methods)))
    weights, whole = run_cell(cells['weights-0.5-0']), run_cell(cells['whole-0.5-0'])
    for r in (weights, whole):
        assert abs(r.true_sparsity - .5) < .02 and r.linear_parameters['after'] == r.linear_parameters['before']
        assert r.losses['after'] != r.losses['before'] and r.units_left is None
    assert all(.4 < z < .6 for z in weights.zeros.values()) and weights.removable is None    # the same in each matrix
    assert max(whole.zeros.values()) > .6 > .4 > min(whole.zeros.values()) and 0 <= whole.removable < .5
    assert 0 < whole.parts_cpu['factors'] < whole.seconds['prune_cpu']


def test_settings_of_zeroing_are_checked(folder, written):
    for settings, words in [(dict(score='luck'), "score is 'luck'"), ({}, 'score')]:
        methods = dict(weights=dict(method='elements', settings=settings))
        with pytest.raises(ValueError, match=words): read_grid(written(grid(folder, methods=methods)))
    for method, settings in dict(structures=dict(criteria='full'), elements=dict(score='wanda', steps=3)).items():
        with pytest.raises(ValueError, match='has no setting'): read_grid(written(grid(folder, methods={method: dict(settings=settings)})))


def test_a_cell_that_evaluates_nothing(folder, written, tmp_path):
    "Time and memory alone; comparing it later looks at the sparsity."
    path = written(grid(folder, seeds=[0], methods=dict(fasp=dict(evaluation=[], names='memory-{label}'))))
    cell = read_grid(path)['memory-fasp']
    r = json.loads(run_cell(cell).text())
    assert 'perplexity' not in r and 'losses' not in r and r['seconds']['prune'] > 0 and r['bytes']['after'] < r['bytes']['before']
    assert compare(r, r) == [] and len(compare(r, {**r, 'true_sparsity': .5})) == 1


def test_two_texts(folder, written, tmp_path):
    (tmp_path/'other.txt').write_text('The quick brown fox jumps over the lazy dog. '*20)
    texts = [WINDOWS, dict(text=str(tmp_path/'other.txt'), n=2, seqlen=32)]
    r = run_cell(read_grid(written(grid(folder, evaluation=texts)))['cut-0.2-0'])
    assert [*r.other_texts] == ['other.txt']
    other = r.other_texts['other.txt']
    assert len(r.losses['after']) == 3 and len(other['losses']['after']) == 2 and other['evaluation'].startswith('2 windows of 32')
    old = json.loads(r.text())
    new = json.loads(r.text())
    next(iter(new['other_texts'].values()))['losses']['after'][0] += 1
    assert compare(old, old) == [] and len(compare(old, new)) == 1


def test_runs_once_and_goes_on(folder, written, tmp_path):
    path, out = written(grid(folder)), tmp_path/'results'
    assert bench(path, out, 'random*', run=in_process) == []
    assert sorted(p.name for p in out.iterdir()) == ['random-0.2-0.json', 'random-0.2-1.json']
    runs = []
    assert bench(path, out, run=lambda c, **kw: runs.append(c[-1]) or in_process(c)) == []
    assert runs == ['dense', 'cut-0.2-0']
    assert bench(path, out, run=lambda *a, **kw: pytest.fail('ran again')) == []
    a, b = [json.loads((out/f'random-0.2-{i}.json').read_text()) for i in (0, 1)]
    assert a['losses']['after'] != b['losses']['after'] and a['calibration'] != b['calibration']
    assert a['losses']['before'] == b['losses']['before']


def test_an_interrupted_cell_goes_on(folder, written, tmp_path, monkeypatch):
    "What Bonsai had measured is not measured again; the record says so, and is the same."
    from prunebook import bonsai
    path, out = written(grid(folder, methods=dict(bonsai=dict(seeds=[0], settings=dict(evaluations=16))))), tmp_path/'out'
    measure, runs = bonsai.token_loss, []
    def counted(*args, **kw):
        runs.append(1)
        if len(runs) == dies: raise KeyboardInterrupt
        return measure(*args, **kw)
    monkeypatch.setattr(bonsai, 'token_loss', counted)
    dies = 0
    whole = run_cell(read_grid(path)['bonsai-0.2-0'])
    needed, dies = len(runs), len(runs)//2
    runs.clear()
    with pytest.raises(KeyboardInterrupt): bench(path, out, 'bonsai*', run=in_process)
    assert [p.name for p in out.iterdir()] == ['bonsai-0.2-0.log']
    runs.clear()
    dies = 0
    assert bench(path, out, 'bonsai*', run=in_process) == [] and len(runs) < needed
    r = json.loads((out/'bonsai-0.2-0.json').read_text())
    assert r['resumed'] and whole.resumed is None and r['losses'] == json.loads(whole.text())['losses']
    assert [p.name for p in out.iterdir()] == ['bonsai-0.2-0.json']


def test_other_settings_are_not_a_result(folder, written, tmp_path):
    out = tmp_path/'results'
    bench(written(grid(folder)), out, 'cut*', run=in_process)
    other = read_grid(written(grid(folder, calibration={**WINDOWS, 'n': 4}), 'other.yml'))['cut-0.2-0']
    with pytest.raises(ValueError, match='another calibration'): finished(other, out)
    (out/'cut-0.2-0.json').write_text('{"cell": ')
    with pytest.raises(ValueError, match='not JSON'): finished(other, out)


def test_a_cell_that_fails_leaves_no_file_and_the_others_run(folder, written, tmp_path, capsys):
    path = written(grid(folder, methods=dict(far=dict(method='random', sparsities=[.99], seeds=[0]))))
    assert bench(path, tmp_path/'out', jobs=2) == ['far-0.99-0']                              # in processes of their own
    assert sorted(p.name for p in (tmp_path/'out').iterdir()) == ['dense.json']
    assert 'cannot be reached' in capsys.readouterr().err


def test_cells_side_by_side(folder, written, tmp_path):
    together, path = threading.Barrier(2, timeout=60), written(grid(folder))
    def run(command, **kw):
        together.wait()                                    # breaks unless two are running
        return subprocess.CompletedProcess(command, command[-1] == 'cut-0.2-0', '', 'it broke')
    assert bench(path, tmp_path/'out', jobs=2, run=run) == ['cut-0.2-0']
    for jobs in (0, 'two'):
        with pytest.raises(ValueError, match='jobs is'): bench(path, tmp_path/'out', jobs=jobs)


@needs_fork
def test_machines_share_a_folder(folder, written, tmp_path):
    "Two processes work on one grid at the same time; each cell is measured by one of them."
    path, out, note = written(grid(folder)), tmp_path/'out', tmp_path/'note'
    def measured(command, **kw):
        with note.open('a') as f: f.write(f'{os.getpid()} {command[-1]}\n')
        time.sleep(.5)
        return in_process(command)
    assert together(lambda: bench(path, out, run=measured), 2, share=False) == [0, 0]
    who, which = zip(*(line.split() for line in note.read_text().splitlines()))
    assert sorted(which) == sorted(read_grid(path)) and len(set(who)) == 2
    assert sorted(p.name for p in out.iterdir()) == sorted(f'{n}.json' for n in read_grid(path))


def test_each_job_has_its_own_gpu(folder, written, tmp_path, monkeypatch):
    monkeypatch.setenv('CUDA_VISIBLE_DEVICES', '4,GPU-7')
    busy, seen, together = set(), [], threading.Barrier(2, timeout=60)
    def run(command, env, **kw):
        card = env['CUDA_VISIBLE_DEVICES']
        assert card not in busy
        busy.add(card), seen.append(card)
        together.wait()
        busy.discard(card)
        together.wait()
        return subprocess.CompletedProcess(command, 0, '', '')
    assert bench(written(grid(folder)), tmp_path/'out', jobs=2, run=run) == [] and sorted(seen) == ['4', '4', 'GPU-7', 'GPU-7']


def test_no_such_cell(folder, written, tmp_path):
    with pytest.raises(ValueError, match="No cell is called 'nothing'"): bench(written(grid(folder)), tmp_path, 'nothing')


@pytest.fixture
def cells_here(monkeypatch):
    "Cells are measured in this process."
    monkeypatch.setattr(bench_module._Children, 'run', lambda self, command, **kw: in_process(command))


def test_check(folder, written, tmp_path, capsys, cells_here):
    path, out = written(grid(folder)), tmp_path/'results'
    bench(path, out, 'cut*', run=in_process)
    assert main(['bench', str(path), '--out', str(out), '--only', 'cut*', '--check']) == 0
    assert 'as committed' in capsys.readouterr().out
    assert recheck(path, out, 'dense') == {'dense': ['it has no committed result']}
    old = json.loads((out/'cut-0.2-0.json').read_text())
    new = json.loads(json.dumps(old))
    q = new['losses']
    q['after'] = [x + .9*TOLERANCE*(-1)**i for i, x in enumerate(q['after'])]      # in the mean, nothing
    assert compare(old, new) == []
    q['after'][0] += TOLERANCE*len(q['after'])
    assert len(compare(old, new)) == 1 and len(compare(old, {**new, 'true_sparsity': .5})) == 2


def test_command(folder, written, tmp_path, capsys, cells_here):
    path = written(grid(folder))
    assert main(['bench', str(path)]) == 2 and '--out' in capsys.readouterr().err
    assert main(['bench', str(path), '--out', str(tmp_path/'r'), '--only', 'random-0.2-0']) == 0
    assert (tmp_path/'r'/'random-0.2-0.json').exists()


def test_quality_is_that_of_the_losses(tiny_tokenizer):
    model = tiny_model('llama', max_position_embeddings=512)
    windows = load_windows('passages', model, tiny_tokenizer, n=3, seqlen=300, evaluation=True)
    q = quality(model, tiny_tokenizer, windows)
    assert q.perplexity.losses.equal(window_losses(model, windows))
    words = [s for w in windows.ids for s in last_words(w, tiny_tokenizer)]
    known = sum((model(w[None]).logits[0].argmax(-1)[a-1:b-1] == w[a:b]).all().item() for w in windows.ids for a, b in last_words(w, tiny_tokenizer))
    assert q.words == len(words) > 3 and q.known == known
    assert q.plain()['losses'] == q.perplexity.losses.tolist() and 'null' not in json.dumps(q.plain())


def test_no_words(tiny_tokenizer):
    model = tiny_model('llama')
    r = quality(model, tiny_tokenizer, Windows(torch.full((2, 20), 7), 'no sentence')).plain()
    assert r['last_words'] == dict(value=None, stderr=0, words=0)


@given(st.lists(st.sampled_from(['we', 'rain', 'x', 'hills', 'a1']), min_size=3, max_size=30))
def test_last_words_are_words(tiny_tokenizer, words):
    text = ' '.join(words) + '.'
    ids = torch.tensor(tiny_tokenizer(text, add_special_tokens=False).input_ids)
    found = [tiny_tokenizer.decode(ids[a:b]) for a, b in last_words(ids, tiny_tokenizer, context=4)]
    assert found == ([words[-1]] if len(words[-1]) > 1 and words[-1].isalpha() and len(text) - len(words[-1]) - 2 >= 4 else [])


def test_paired_speed_has_order():
    model = tiny_model('llama', max_position_embeddings=64)
    r = paired_speed(model, model, repeats=3, prompt=16, new=2)
    assert r.keys() == {'before', 'after', 'ratio'}
    for median, low, high in [v for side in r.values() for v in side.values()]: assert 0 < low <= median <= high


def test_pairs_are_timed_in_both_orders_after_one_that_is_not(monkeypatch):
    "With rates of our own: what a model has at its turn, and ratios within pairs."
    calls, rates = [], dict(dense=iter([99., 10., 20., 40., 80.]), small=iter([1., 20., 80., 40., 80.]))

    def speed(model, repeats, warmup, prompt):
        calls.append(model)
        r = next(rates[model])
        return {k: (r, r, r) for k in ('prefill', 'decode')}
    monkeypatch.setattr('prunebook.record.speed', speed)
    r = paired_speed('dense', 'small', repeats=4, prompt=3)
    assert calls == ['dense', 'small', 'small', 'dense']*2 + ['dense', 'small']
    assert r['ratio']['prefill'] == (1.5, 1., 4.) and r['before']['decode'] == (30., 10., 80.) and r['after']['decode'] == (60., 20., 80.)


@pytest.mark.parametrize('n,low,high', [(1, 1, 1), (2, 1, 2), (5, 1, 5), (6, 1, 6), (8, 1, 8), (9, 2, 8), (20, 6, 15), (40, 14, 27), (50, 18, 33)])
def test_interval_of_the_median(n, low, high):
    "Ranks of printed tables, 95 %."
    values = random.Random(n).sample(range(1, n + 1), n)
    assert _median_interval(values) == ((n + 1)/2, low, high)


# ---- a changed method does not pass for the committed one ------------------------------------------------------------

SMOKE = Path(__file__).parent.parent/'results'/'smoke'

def shuffled(scores): return scores[torch.randperm(len(scores), generator=torch.Generator().manual_seed(0))]


MUTANTS = { # what is changed in FASP
    'nothing': {},
    'no repair': dict(repair=lambda self, v, keep: v.weight[:, keep]),
    'half the damping': dict(ridge_for=lambda self, tokens: Ridge(damp_for(tokens)/2, 'weights', 'own')),
    'scores of other units': dict(score=lambda self, v: shuffled(v.per_unit(column_scores(v.weight, v.gram))))}


@pytest.fixture(scope='module')
def smallest():
    "The smallest cell of FASP with the first blocks of its model: windows of calibration and evaluation, and a record on one thread."
    cell = read_grid(SMOKE.with_suffix('.yml'))['fasp-0.1-0']
    model, tokenizer = load_model(cell.model, dtype=getattr(torch, cell.dtype))
    del model.model.layers[3:]
    model.config.num_hidden_layers = 3
    cut = lambda w, **kw: load_windows(w['text'], model, tokenizer, 3, w['seqlen'], **kw)
    windows, test = cut(cell.calibration), cut(cell.evaluation[0], evaluation=True)
    return model, windows, test, measured_again(finished(cell, SMOKE), model, windows, test)


def measured_again(committed, model, windows, test, threads=1):
    "The record with the share and the losses of a run of today."
    torch.set_num_threads(threads)
    try:
        small, plan = prune(model, windows, 'fasp', .1)
        losses = window_losses(small, test).tolist()
    finally: torch.set_num_threads(1)
    return {**committed, 'true_sparsity': plan.true_sparsity, 'losses': dict(after=losses)}


@pytest.mark.parametrize('mutant', MUTANTS)
def test_a_changed_method_is_caught(monkeypatch, smallest, mutant):
    "On real weights; without a change it passes, with another number of threads. (`make bench-check` looks at the committed records.)"
    model, windows, test, known = smallest
    for name, f in MUTANTS[mutant].items(): monkeypatch.setattr(FASP, name, f)
    differs = compare(known, measured_again(known, model, windows, test, 2 if mutant == 'nothing' else 1))
    assert bool(differs) == (mutant != 'nothing'), differs

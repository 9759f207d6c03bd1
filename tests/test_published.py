"""Every method by the name of its published forms: settings, plan, record, command line, and a warning where the text is too little."""
import json
import warnings

import pytest
import torch
import yaml
from helpers import tiny_model
from prunebook.bench import read_grid
from prunebook.bonsai import Bonsai, _within
from prunebook.cli import _method, main
from prunebook.couplings import couplings
from prunebook.depth2 import Depth2
from prunebook.heads import heads_by_rows, removal_order
from prunebook.methods import MODULES, TOKENS_PER_COLUMN, as_method, configured
from prunebook.plan import PrunePlan
from prunebook.pruning import prune
from prunebook.record import Record
from prunebook.text import random_tokens

pytestmark = pytest.mark.usefixtures('one_thread')
OWN = ('random', 'magnitude', 'recipe', 'reap')            # baselines without a paper, this book's own, and one whose default is the published form
PUBLISHED = [n for n in MODULES if n not in OWN]
FORMS = [(n, p) for n in PUBLISHED for p in as_method(n).PUBLISHED]
SMALL = dict(surgeon=dict(shots=2), bonsai=dict(evaluations=8, windows=2, estimator='levels'), taylor=dict(spare=[1, 1]), depth2=dict(spare=[0, 0]))  # for three blocks


def windows(m, n=20): return random_tokens(m, n=n, seqlen=24)


@pytest.mark.parametrize('name', PUBLISHED)
def test_every_method_has_a_published_form(name):
    m = as_method(name)
    assert next(iter(m.PUBLISHED)) == 'published' and m.preset == ''
    assert m.published().settings() != m.settings() and configured(name, {}, 'published') == m.published()


@pytest.mark.parametrize('name,preset', FORMS)
def test_a_preset_holds_settings_and_is_recognized(name, preset):
    m = configured(name, {}, preset)
    assert m.preset == preset and configured(name, m.settings()).preset == preset          # also from a plan, where tuples are lists
    wider = configured(name, dict(damp=.123), preset)
    assert wider.preset == '' and wider.damp == .123
    if 'seed' in m.settings(): assert configured(name, dict(seed=7), preset).preset == preset


@pytest.mark.parametrize('name,preset', FORMS)
@pytest.mark.filterwarnings('ignore')
def test_every_form_runs_and_reaches_the_sparsity(name, preset):
    m = tiny_model('llama')
    small, plan = prune(m, windows(m), configured(name, SMALL.get(name, {}), preset), .2)
    slack = .03 if name in ('bonsai', 'surgeon') else 1e-9  # they stop below
    assert plan.true_sparsity >= .2 - slack and small(windows(m).ids).logits.isfinite().all()


def test_plan_and_record_name_the_form(tmp_path):
    m = tiny_model('llama')
    small, plan = prune(m, windows(m), 'fasp', .2)
    assert plan.preset == '' and Record.of(plan, small, 'tiny').preset is None
    small, plan = prune(m, windows(m), configured('fasp', {}, 'published'), .2)
    assert plan.preset == 'published' and 'fasp (published) plan' in repr(plan)
    plan.save(tmp_path/'plan.json')
    assert PrunePlan.load(tmp_path/'plan.json') == plan and json.loads(Record.of(plan, small, 'tiny').text())['preset'] == 'published'
    old = {k: v for k, v in json.loads((tmp_path/'plan.json').read_text()).items() if k != 'preset'}
    (tmp_path/'old.json').write_text(json.dumps(old))       # of an earlier version
    assert PrunePlan.load(tmp_path/'old.json').preset == ''


def test_command_line_and_grid_take_a_preset(tmp_path):
    assert _method('fasp', '{"damp": 0.1}', preset='published') == configured('fasp', dict(damp=.1), 'published')
    with pytest.raises(ValueError, match="no preset 'printed'; it has published, published-code"): _method('depth2', '{}', preset='printed')
    with pytest.raises(ValueError, match='it has none'): _method('random', '{}', preset='published')
    grid = dict(model='tiny', calibration=dict(text='random', n=4, seqlen=16), evaluation=[dict(text='random', n=2, seqlen=16)], sparsities=[.2], seeds=[0],
                methods={'a': dict(method='flap', preset='published'), 'b': dict(method='flap')})
    (tmp_path/'grid.yml').write_text(yaml.safe_dump(grid))
    cells = read_grid(tmp_path/'grid.yml')
    assert cells['a-0.2-0'].built().preset == 'published' and cells['b-0.2-0'].built().preset == ''
    grid['methods']['a']['preset'] = 'printed'
    (tmp_path/'grid.yml').write_text(yaml.safe_dump(grid))
    with pytest.raises(ValueError, match="a: flap has no preset 'printed'"): read_grid(tmp_path/'grid.yml')


@pytest.mark.parametrize('name', ['fasp', 'depth2', 'surgeon', 'flap'])
@pytest.mark.filterwarnings('ignore')
def test_command_line_makes_and_records_a_published_form(name, tiny_tokenizer, own_modules, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv('PRUNEBOOK_DATA', raising=False)
    tiny_model('llama', max_position_embeddings=512).save_pretrained(tmp_path/'dense')
    tiny_tokenizer.save_pretrained(tmp_path/'dense')
    settings = json.dumps(SMALL.get(name, {}))
    code = main(['prune', str(tmp_path/'dense'), '--out', str(tmp_path/'small'), '--method', name, '--preset', 'published', '--settings', settings,
                 '--text', 'passages', '--n', '3', '--seqlen', '64', '--json', '--device', 'cpu', '--dtype', 'float32'])
    record, plan = json.loads(capsys.readouterr().out), PrunePlan.load(tmp_path/'small'/'plan.json')
    exact = not settings.strip('{}')                       # nothing was changed for three blocks
    assert code == 0 and plan.preset == ('published' if exact else '') and record.get('preset') == (plan.preset or None)
    wanted = {k: list(v) if isinstance(v, tuple) else v for k, v in as_method(name).PUBLISHED['published'].items() if k not in SMALL.get(name, {})}
    assert {k: plan.settings[k] for k in wanted} == wanted


# ---- too little text ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('name', ['fasp', 'depth2', 'surgeon'])
def test_too_little_text_is_a_warning_with_the_number(name):
    m = tiny_model('llama')
    method = configured(name, SMALL.get(name, {}), 'published')
    needed = TOKENS_PER_COLUMN*max(c.second[1].numel() for c in method.table(m))
    with pytest.warns(UserWarning, match=f'{name} .*needs about {needed} calibration tokens.*has 48'): prune(m, windows(m, 2), method, .2)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        method.check_text(method.table(m), windows(m, needed//24 + 1))


@pytest.mark.parametrize('name', PUBLISHED)
def test_defaults_do_not_warn(name):
    m, method = tiny_model('llama'), as_method(name)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        method.check_text(method.table(m), windows(m, 2))


# ---- Algorithm 2 ----------------------------------------------------------------------------------------------------

def test_algorithm_2_as_printed_as_coded_and_ours():
    # 0 and 1 are closest, 1 is near everybody; by rows 0 leaves for 2 and 1 leaves for 2
    D = torch.tensor([[0, .05, .1, .9], [.05, 0, .1, .15], [.1, .1, 0, .9], [.9, .15, .9, 0]])
    assert heads_by_rows(D, .2) == [(0, D[0, 1].item()), (1, D[1, 2].item())]
    assert [h for h, d in removal_order(D, leaves='first') if d < .2] == [0, 1]
    assert [h for h, d in removal_order(D) if d < .2] == [0, 2, 3]
    assert heads_by_rows(D, .2, groups=2) == [(0, D[0, 1].item())] + [(2, D[2, 1].item())]      # no group loses its last


@pytest.mark.parametrize('seed', range(5))
def test_what_is_removed_had_a_twin(seed):
    R = torch.rand(8, 8, generator=torch.Generator().manual_seed(seed))
    D = (R + R.T).fill_diagonal_(0)
    for tau in (.3, .8, 3.):
        gone = heads_by_rows(D, tau)
        assert all(d < tau for _, d in gone) and len({h for h, _ in gone}) == len(gone) < 8
        stay = [h for h in range(8) if h not in dict(gone)]
        assert all(D[i, j] >= tau for i in stay for j in stay if i != j)       # no pair is left


def test_printed_order_needs_a_threshold():
    with pytest.raises(ValueError, match='give tau'): Depth2(units=('kv_group',), pairs='rows')


# ---- Bonsai ---------------------------------------------------------------------------------------------------------

def test_a_round_as_published_never_exceeds_its_budget():
    m = tiny_model('llama')
    table = couplings(m, ('kv_group', 'mlp_channel'))
    scores = {c.name: torch.rand(c.n_units, generator=torch.Generator().manual_seed(i)).double()*c.cost for i, c in enumerate(table)}
    for budget in (500, 3000, 9000):
        steps = _within(table, scores, budget)
        removed = sum(c.cost*c.groups*steps[c.name] for c in table)
        dearest = max(c.cost*c.groups for c in table)
        assert budget - dearest < removed <= budget


def test_fresh_windows_in_every_round():
    m, method = tiny_model('llama'), Bonsai.published(evaluations=8, windows=3)
    w, gen = windows(m, 12), torch.Generator().manual_seed(0)
    sets = [method._texts(w, gen) for _ in range(3)]
    assert all(len(s) == 1 and s[0].shape == (3, 24) for s in sets) and len({s[0].sum().item() for s in sets}) == 3
    with pytest.warns(UserWarning, match='needs about 144 calibration tokens'): method.check_text([], windows(m, 5))

"""Plans: enough goes and hardly more, groups stay equal, files are whole or absent, and a plan fits one model only."""
import copy
import json
import os
import stat

import pytest
import torch
from helpers import tiny_model
from hypothesis import given, strategies as st
from prunebook import plan as plan_module
from prunebook.couplings import Coupling, check_kept, couplings, slice_units
from prunebook.pruning import prune
from prunebook.models import TINY, decoder_linears, n_parameters
from prunebook.plan import PrunePlan, bundles, check_sparsity, global_steps, keep_after, model_fingerprint, _tensor_sums, uniform_steps, write_atomic
from prunebook.save import load_pruned, save_pruned
from prunebook.scores import Random
from prunebook.text import random_tokens
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

pytestmark = pytest.mark.usefixtures('one_thread')


# ---- tables of couplings without a model ----------------------------------------------------------------------------

def coupling(layer, kind, n, cost, groups=1): return Coupling(layer, kind, [], ('second', torch.arange(n)[:, None]), cost, groups)


@st.composite
def tables(draw, ragged=False):
    "Couplings of a model with equal (or different) blocks, and the number of its parameters."
    blocks, kinds = draw(st.integers(1, 5)), draw(st.sampled_from([('mlp_channel',), ('value_channel',), ('kv_group', 'mlp_channel'), ('value_channel', 'mlp_channel')]))
    def one(kind):
        groups = draw(st.integers(1, 4)) if kind == 'value_channel' else 1
        return groups, groups*draw(st.integers(2, 40)), draw(st.integers(1, 500))
    shapes = {k: one(k) for k in kinds}
    table = []
    for i in range(blocks):
        for k in kinds:
            groups, n, cost = one(k) if ragged else shapes[k]
            table.append(coupling(i, k, n, cost, groups))
    return table, sum(c.cost*c.n_units for c in table) + draw(st.integers(0, 10000))


def most(table, total): return sum(c.cost*(c.n_units - c.groups) for c in table)/total
def removed(table, steps): return sum(c.cost*c.groups*steps[c.name] for c in table)


def check_steps(table, steps):
    assert steps.keys() == {c.name for c in table}
    assert all(isinstance(steps[c.name], int) and 0 <= steps[c.name] < c.n_units//c.groups for c in table)     # one bundle stays


# ---- uniform allocation ---------------------------------------------------------------------------------------------

@given(tables(), st.floats(0, 1))
def test_uniform_removes_enough_and_hardly_more(case, share):
    table, total = case
    sparsity = share*most(table, total)
    steps = uniform_steps(table, sparsity, total)
    check_steps(table, steps)
    gone = removed(table, steps)
    assert gone >= sparsity*total - 1e-6*total
    assert gone < sparsity*total + sum(c.cost*c.groups for c in table) + 1e-6*total


@given(tables(ragged=True), st.floats(0, 1))
def test_uniform_on_blocks_of_different_widths(case, share):
    table, total = case
    sparsity = share*most(table, total)
    steps = uniform_steps(table, sparsity, total)
    check_steps(table, steps)
    assert sparsity*total - 1e-6*total <= removed(table, steps) < sparsity*total + sum(c.cost*c.groups for c in table) + 1e-6*total


def test_uniform_when_the_mlp_is_narrower_than_a_head():
    "Attention is rounded down and the MLP runs dry: attention must give the rest."
    table = [coupling(0, 'value_channel', 8, 10), coupling(0, 'mlp_channel', 3, 30)]
    total = 170
    check_sparsity(.75, table, total)                                                          # it can be reached
    assert removed(table, uniform_steps(table, .75, total)) >= .75*total


def test_uniform_when_a_block_has_few_units():
    "A block with one spare unit cannot give nine tenths: the others must."
    table = [coupling(0, 'mlp_channel', 2, 10), coupling(1, 'mlp_channel', 40, 10)]
    total = 420
    check_sparsity(.9, table, total)
    assert removed(table, uniform_steps(table, .9, total)) >= .9*total


@given(tables(), st.floats(0, .9))
def test_uniform_gives_equal_blocks_equal_widths(case, share):
    table, total = case
    steps = uniform_steps(table, share*most(table, total), total)
    for kind in {c.kind for c in table}: assert len({steps[c.name] for c in table if c.kind == kind}) == 1


@pytest.mark.parametrize('family', TINY)
@pytest.mark.parametrize('sparsity', [.05, .1, .25, .4])
def test_uniform_on_models(family, sparsity):
    m = tiny_model(family)
    total = n_parameters(decoder_linears(m).values())
    table = couplings(m, ('value_channel', 'mlp_channel'))
    steps = uniform_steps(table, sparsity, total)
    scores = {c.name: torch.rand(c.n_units, generator=torch.Generator().manual_seed(c.layer)) for c in table}
    slice_units(m, {c.name: keep_after(c, scores[c.name], steps[c.name]) for c in table})
    true = 1 - n_parameters(decoder_linears(m).values())/total
    assert sparsity <= true < sparsity + sum(c.cost*c.groups for c in table)/total


# ---- global allocation ----------------------------------------------------------------------------------------------

@given(tables(ragged=True), st.floats(0, 1), st.integers(0, 99))
def test_global_removes_enough_and_less_than_a_bundle_more(case, share, seed):
    table, total = case
    gen = torch.Generator().manual_seed(seed)
    scores = {c.name: torch.rand(c.n_units, generator=gen) for c in table}
    sparsity = share*most(table, total)
    steps = global_steps(table, scores, sparsity, total)
    check_steps(table, steps)
    gone = removed(table, steps)
    assert gone >= sparsity*total - 1e-6*total
    assert gone < sparsity*total + max(c.cost*c.groups for c in table) + 1e-6*total


@given(tables(ragged=True), st.floats(.05, .95), st.integers(0, 99))
def test_global_threshold_separates(case, share, seed):
    "Nothing that stays is weaker per parameter than something that went, where bundles get stronger one by one."
    table, total = case
    gen = torch.Generator().manual_seed(seed)
    scores = {c.name: torch.rand(c.n_units, generator=gen) for c in table}
    steps = global_steps(table, scores, share*most(table, total), total)
    worth = {c.name: (bundles(c, scores[c.name])[1]/(c.cost*c.groups)).tolist() for c in table}
    gone = [w for c in table for w in worth[c.name][:steps[c.name]]]
    stay = [w for c in table for w in worth[c.name][steps[c.name]:-1]]
    if gone and stay: assert max(gone) <= min(stay)


def test_global_does_not_look_at_the_unit_of_the_scores():
    table = [coupling(i, 'mlp_channel', 20, 7) for i in range(3)]
    scores = {c.name: torch.rand(20, generator=torch.Generator().manual_seed(c.layer)) for c in table}
    a, b = (global_steps(table, {n: s*k for n, s in scores.items()}, .3, 420) for k in (1, 1000))
    assert a == b
    assert global_steps(table, {**scores, '1.mlp_channel': scores['1.mlp_channel'] + 100}, .3, 420)['1.mlp_channel'] == 0


# ---- what stays -----------------------------------------------------------------------------------------------------

@given(st.integers(1, 5), st.integers(1, 12), st.integers(0, 99), st.data())
def test_keep_after_drops_the_lowest_of_every_group(groups, size, seed, data):
    c = coupling(0, 'value_channel', groups*size, 1, groups)
    scores = torch.randint(0, 6, (c.n_units,), generator=torch.Generator().manual_seed(seed)).float()           # with ties
    steps = data.draw(st.integers(0, size - 1))
    kept = keep_after(c, scores, steps)
    assert check_kept(c, kept) == kept and len(kept) == groups*(size - steps)
    for g in range(groups):
        group = set(range(g*size, (g + 1)*size))
        stay, gone = group & set(kept), group - set(kept)
        assert len(gone) == steps
        if gone: assert max(scores[i] for i in gone) <= min(scores[i] for i in stay)


@given(st.integers(2, 30), st.integers(0, 99))
def test_bundles_of_ungrouped_units_are_the_units_by_score(n, seed):
    scores = torch.rand(n, generator=torch.Generator().manual_seed(seed))
    order, values = bundles(coupling(0, 'mlp_channel', n, 1), scores)
    assert sorted(order.flatten().tolist()) == list(range(n))
    assert torch.equal(values, scores.double().sort().values)


@pytest.mark.parametrize('sparsity', [-.1, 1, 1., 1.5, float('nan'), float('inf'), '0.2', None, torch.tensor(.2)])
def test_sparsity_must_be_a_fraction(sparsity):
    table = [coupling(0, 'mlp_channel', 10, 1)]
    for f in (lambda: check_sparsity(sparsity, table, 10), lambda: uniform_steps(table, sparsity, 10),
              lambda: global_steps(table, {'0.mlp_channel': torch.rand(10)}, sparsity, 10)):
        with pytest.raises(ValueError, match='fraction in'): f()


def test_unreachable_sparsity_says_what_can_be_reached():
    table = [coupling(0, 'mlp_channel', 10, 1), coupling(0, 'value_channel', 4, 5, 2)]
    with pytest.raises(ValueError, match='cannot be reached with mlp_channel, value_channel: at most 0.475'): check_sparsity(.48, table, 40)
    check_sparsity(.475, table, 40)
    with pytest.raises(ValueError, match='no units'): check_sparsity(.1, [], 40)


# ---- the plan as a file ---------------------------------------------------------------------------------------------

names = st.builds(lambda i, k: f'{i}.{k}', st.integers(0, 99), st.sampled_from(['mlp_channel', 'value_channel']))
numbers = st.floats(allow_nan=False, allow_infinity=False)
kept = st.dictionaries(names, st.lists(st.integers(0, 99), unique=True))
plans = st.builds(PrunePlan, method=st.text(), settings=st.dictionaries(st.text(), st.none() | st.booleans() | numbers | st.text() | st.lists(st.text())),
                  sparsity=numbers, kept=kept, units=st.just({}), model=st.text(),
                  calibration=st.text(), true_sparsity=numbers, scores=st.dictionaries(names, st.lists(st.none() | numbers | st.integers())), versions=st.dictionaries(st.text(), st.text()))


@given(plans)
def test_json_round_trip(tmp_path_factory, plan):
    plan.units = dict.fromkeys(plan.kept, 100)
    path = tmp_path_factory.mktemp('plan')/'plan.json'
    try: plan.save(path)
    except UnicodeEncodeError: return                       # not Unicode: no file, no half file
    finally: assert [p.name for p in path.parent.iterdir()] in ([], ['plan.json'])
    assert PrunePlan.load(path) == plan


GOOD = dict(method='m', settings={}, sparsity=.5, kept={'0.mlp_channel': [0, 2]}, units={'0.mlp_channel': 4}, model='')

@pytest.mark.parametrize('field, value, words', [
    ('kept', None, 'expected a dict, got NoneType'), ('kept', {'0.mlp_channel': None}, 'expected a list, got NoneType'), ('kept', {'0.mlp_channel': [.5]}, 'expected int, got float'),
    ('kept', {'0.mlp_channel': ['1']}, 'expected int, got str'), ('kept', {'0.mlp_channel': [True]}, 'expected int, got bool'), ('kept', {'0.mlp_channel': [[0]]}, 'expected int, got list'),
    ('kept', {'0.mlp_channel': [4]}, 'has no unit 4'), ('kept', {'0.mlp_channel': [-1]}, 'has no unit -1'), ('kept', {'0.mlp_channel': [1, 1]}, 'keeps a unit twice'),
    ('kept', {'1.mlp_channel': [1]}, 'not among units'), ('units', {'0.mlp_channel': 2.}, 'expected int, got float'), ('sparsity', '0.5', 'sparsity'), ('sparsity', True, 'sparsity'),
    ('settings', [], 'expected dict, got list'), ('scores', {'0.mlp_channel': [{}]}, 'scores'), ('model', None, 'expected str, got NoneType'), ('surplus', 1, "unknown field 'surplus'")])
def test_a_field_of_another_kind_is_named(tmp_path, field, value, words):
    (tmp_path/'x.json').write_text(json.dumps(GOOD))
    assert PrunePlan.load(tmp_path/'x.json').kept == GOOD['kept']
    (tmp_path/'x.json').write_text(json.dumps({**GOOD, field: value}))
    with pytest.raises(ValueError, match='x.json is not a pruning plan') as e: PrunePlan.load(tmp_path/'x.json')
    assert words in str(e.value) and str(e.value).count('\n') == 0


@pytest.mark.parametrize('field', [f for f in GOOD if f != 'settings'])
def test_a_missing_field_is_named(tmp_path, field):
    (tmp_path/'x.json').write_text(json.dumps({k: v for k, v in GOOD.items() if k != field}))
    with pytest.raises(ValueError, match=f"field '{field}' is missing"): PrunePlan.load(tmp_path/'x.json')


def test_deep_nesting_is_one_sentence(tmp_path):
    for text in ('['*100000 + ']'*100000, json.dumps(GOOD)[:-1] + ', "scores": ' + '{"a":'*100000 + '1' + '}'*100001):
        (tmp_path/'x.json').write_text(text)
        with pytest.raises(ValueError, match='x.json is not a pruning plan .*nested too deeply'): PrunePlan.load(tmp_path/'x.json')


@pytest.mark.parametrize('value', [float('nan'), float('inf'), -float('inf')])
def test_a_plan_is_strict_json_or_no_file(tmp_path, value):
    for field, content in (('scores', {'0.mlp_channel': [1., value]}), ('sparsity', value), ('settings', {'damp': value}), ('settings', {'device': torch.device('cpu')})):
        plan = PrunePlan(**{**GOOD, field: content})
        with pytest.raises(ValueError, match='finite, plain values'): plan.save(tmp_path/'x.json')
        assert not list(tmp_path.iterdir())


def test_numbers_that_json_does_not_have_are_read_as_none(tmp_path):
    "Files that were written before: a missing score is null, and anything else is refused."
    (tmp_path/'x.json').write_text(json.dumps({**GOOD, 'scores': {'0.mlp_channel': [1., float('nan')]}}))
    assert PrunePlan.load(tmp_path/'x.json').scores == {'0.mlp_channel': [1., None]}
    (tmp_path/'x.json').write_text(json.dumps({**GOOD, 'sparsity': float('nan')}))
    with pytest.raises(ValueError, match='sparsity'): PrunePlan.load(tmp_path/'x.json')


@pytest.mark.parametrize('value', [float('nan'), float('inf')])
def test_what_is_not_finite_is_not_sorted(value):
    c, scores = coupling(0, 'mlp_channel', 6, 1), torch.arange(6.)
    scores[3] = value
    for f in (lambda: keep_after(c, scores, 2), lambda: keep_after(c, scores, 0), lambda: bundles(c, scores), lambda: global_steps([c], {c.name: scores}, .1, 6)):
        with pytest.raises(ValueError, match='scores of 0.mlp_channel: .*; load the model in bfloat16 or float32'): f()


def example(model, kinds=('value_channel', 'mlp_channel')):
    "A plan that keeps the first half of every group."
    table = couplings(model, kinds)
    kept = {c.name: [i for i in range(c.n_units) if i % (c.n_units//c.groups) < c.n_units//c.groups//2] for c in table}
    return PrunePlan('half', {}, .3, kept, {c.name: c.n_units for c in table}, model_fingerprint(model), scores={c.name: [.5]*c.n_units for c in table})


def test_versions_are_recorded():
    import transformers
    assert example(tiny_model('opt')).versions == dict(prunebook='0.1.0', torch=torch.__version__, transformers=transformers.__version__)


def test_a_plan_cut_short_anywhere_is_no_plan(tmp_path):
    path = tmp_path/'plan.json'
    example(tiny_model('gpt2'), 'value_channel').save(path)
    whole = path.read_bytes()
    for n in [*range(0, len(whole), 97), len(whole) - 1]:
        path.write_bytes(whole[:n])
        with pytest.raises(ValueError, match='plan.json is not a pruning plan'): PrunePlan.load(path)
    path.write_bytes(whole)
    assert PrunePlan.load(path).method == 'half'


@pytest.mark.parametrize('content', [b'\x80\x81\x82', b'[]', b'[1, 2]', b'null', b'3', b'"text"', b'{}', b'{"method": "x", "surplus": 1}', b'{"method": "x"}'])
def test_other_files_are_no_plans(tmp_path, content):
    (tmp_path/'x.json').write_bytes(content)
    with pytest.raises(ValueError, match='x.json is not a pruning plan'): PrunePlan.load(tmp_path/'x.json')
    with pytest.raises(FileNotFoundError): PrunePlan.load(tmp_path/'absent.json')


def test_plan_shows_itself():
    import matplotlib
    matplotlib.use('Agg')
    p = example(tiny_model('llama'))
    assert p.counts()[:2] == [(0, 'value_channel', 8, 16), (0, 'mlp_channel', 18, 37)]
    assert '| value_channel | 48 | 24 | 8 to 8 |' in p._repr_markdown_() and '| mlp_channel | 111 | 54 | 18 to 18 |' in p._repr_markdown_()
    ax = p.plot()
    assert sorted(t.get_text() for t in ax.get_legend().get_texts()) == ['mlp_channel', 'value_channel']
    assert list(ax.lines[1].get_ydata()) == [.5]*3


# ---- atomic writing -------------------------------------------------------------------------------------------------

def only(folder, name, content): return [p.name for p in folder.iterdir()] == [name] and (folder/name).read_text() == content


@pytest.mark.parametrize('error', [OSError(28, 'No space left on device'), KeyboardInterrupt(), PermissionError(13, 'no')])
def test_failing_rename_keeps_the_old_file(tmp_path, monkeypatch, error):
    (tmp_path/'a.json').write_text('old')
    def fail(*args): raise error
    monkeypatch.setattr(plan_module.os, 'replace', fail)
    with pytest.raises(type(error)): write_atomic(tmp_path/'a.json', 'new')
    assert only(tmp_path, 'a.json', 'old')


def test_failing_write_keeps_the_old_file(tmp_path, monkeypatch):
    (tmp_path/'a.json').write_text('old')
    with pytest.raises(UnicodeEncodeError): write_atomic(tmp_path/'a.json', 'new'*10000 + '\ud800')
    assert only(tmp_path, 'a.json', 'old')


def test_full_disk_keeps_the_old_file(tmp_path):
    resource = pytest.importorskip('resource')
    (tmp_path/'a.json').write_text('old')
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10000, hard))                                  # stands in for a full disk: the write fails half-way
    try:
        with pytest.raises(OSError, match='too large'): write_atomic(tmp_path/'a.json', 'new'*100000)
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert only(tmp_path, 'a.json', 'old')


def test_write_atomic_writes(tmp_path):
    write_atomic(tmp_path/'deep'/'er'/'a.txt', 'é\n')
    write_atomic(str(tmp_path/'deep'/'er'/'a.txt'), 'ü\n')
    assert [p.name for p in (tmp_path/'deep'/'er').iterdir()] == ['a.txt']
    assert (tmp_path/'deep'/'er'/'a.txt').read_bytes() == 'ü\n'.encode()


@pytest.mark.skipif(os.name == 'nt', reason='no such permissions')
def test_written_files_can_be_read_by_those_who_can_read_their_neighbours(tmp_path):
    (tmp_path/'plain.txt').write_text('x')
    write_atomic(tmp_path/'atomic.txt', 'x')
    modes = [stat.S_IMODE((tmp_path/n).stat().st_mode) for n in ('plain.txt', 'atomic.txt')]
    assert oct(modes[1]) == oct(modes[0])


# ---- the plan and its model -----------------------------------------------------------------------------------------

@pytest.mark.parametrize('family', TINY)
def test_apply_is_slicing(family, tmp_path):
    dense, ids = tiny_model(family), torch.randint(3, 97, (2, 12), generator=torch.Generator().manual_seed(0))
    plan = example(dense)
    plan.save(tmp_path/'plan.json')
    small, expected = PrunePlan.load(tmp_path/'plan.json').apply(copy.deepcopy(dense)), slice_units(copy.deepcopy(dense), plan.kept)
    assert repr(small) == repr(expected)
    assert all(torch.equal(a, b) for a, b in zip(small.state_dict().values(), expected.state_dict().values()))
    with torch.no_grad(): assert torch.equal(small(ids).logits, expected(ids).logits)
    with pytest.raises(ValueError, match='load the dense model'): plan.apply(small)             # pruned already


@pytest.mark.parametrize('family', TINY)
def test_apply_refuses_other_models(family):
    dense = tiny_model(family)
    plan = example(dense)
    def changed():
        m = tiny_model(family)
        list(decoder_linears(m).values())[4].weight.data.mul_(1.5)
        return m
    for other in (tiny_model(family, seed=1), changed(), tiny_model('opt' if family == 'llama' else 'llama')):
        before = {n: t.clone() for n, t in other.state_dict().items()}
        with pytest.raises(ValueError, match=f'made for model {plan.model}, but this one is [0-9a-f]{{12}}'): plan.apply(other)
        assert all(torch.equal(t, before[n]) for n, t in other.state_dict().items())


@pytest.mark.parametrize('family', TINY)
def test_apply_accepts_other_precisions(family):
    "A float32 checkpoint read as bfloat16, and a bfloat16 one read as float32 or float16."
    dense = tiny_model(family)
    plan, half = example(dense), tiny_model(family).bfloat16()
    assert model_fingerprint(half) == plan.model
    assert model_fingerprint(copy.deepcopy(half).float()) == plan.model
    assert model_fingerprint(copy.deepcopy(half).half()) == plan.model
    assert next(plan.apply(half).parameters()).dtype == torch.bfloat16


def test_fingerprint_ignores_what_is_not_the_model():
    m = tiny_model('llama')
    before = model_fingerprint(m)
    m.train().requires_grad_(False)
    m.generation_config.max_new_tokens = 3
    assert model_fingerprint(m) == before == model_fingerprint(copy.deepcopy(m))
    m.config.name_or_path, m.config.use_cache, m.config.architectures, m.config.attention_dropout = 'elsewhere', False, ['PrunedLlamaForCausalLM'], .1
    m.config._attn_implementation = 'eager'
    assert model_fingerprint(m) == before
    assert len({before, model_fingerprint(tiny_model('llama', intermediate_size=38)), model_fingerprint(tiny_model('mistral')), model_fingerprint(tiny_model('llama', seed=2))}) == 4


@pytest.mark.parametrize('family', TINY)
def test_fingerprint_survives_saving(family, tmp_path):
    m = tiny_model(family)
    m.save_pretrained(tmp_path)
    assert model_fingerprint(AutoModelForCausalLM.from_pretrained(tmp_path)) == model_fingerprint(m)
    for units in ('mlp_channel', 'value_channel' if family == 'gemma' else 'kv_group'):       # pruned: in memory, the configuration has the old widths
        small, _ = prune(m, random_tokens(m, 2, 8), Random(units=(units,)), .2)
        save_pruned(small, None, tmp_path/units)
        assert model_fingerprint(load_pruned(tmp_path/units, 'cpu')[0]) == model_fingerprint(small) != model_fingerprint(m)


def test_fingerprint_sees_how_rows_are_heads():
    "The same tensors, cut into heads otherwise."
    few = LlamaForCausalLM(LlamaConfig(vocab_size=97, hidden_size=24, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2)).eval()
    many = LlamaForCausalLM(LlamaConfig(vocab_size=97, hidden_size=24, intermediate_size=8, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=4)).eval()
    many.load_state_dict(few.state_dict())
    assert model_fingerprint(few) != model_fingerprint(many)


@pytest.mark.parametrize('family', TINY)
def test_fingerprint_sees_every_value_and_the_configuration(family):
    m, found = tiny_model(family), {model_fingerprint(tiny_model(family))}
    for n, p in m.named_parameters():                       # the last value of every tensor, one after the other
        p.data.view(-1)[-1] += .1
        found.add(model_fingerprint(m))
    assert len(found) == 1 + len(list(m.parameters()))
    weight = next(iter(decoder_linears(m).values())).weight.data
    weight[[0, 1]] = weight[[1, 0]]                          # values that change places
    assert model_fingerprint(m) not in found
    for change in (dict(rope_theta=5e5), dict(rms_norm_eps=1e-3), dict(layer_norm_eps=1e-3), dict(layer_norm_epsilon=1e-3), dict(hidden_act='relu'), dict(sliding_window=4)):
        key = next(iter(change))
        if key == 'sliding_window' and family != 'mistral': continue                          # Qwen does not use it unless told
        if key == 'rope_theta' and hasattr(m.config, 'rope_parameters') or hasattr(m.config, key): assert model_fingerprint(tiny_model(family, **change)) not in found, change


@given(st.integers(1, 5000), st.integers(0, 99), st.integers(1, 300), st.sampled_from([1., 1e-3, 1e-5]))
def test_sums_of_a_tensor_see_one_change_anywhere(n, seed, size, scale):
    "In whatever precision: float16 rounds weights of 1e-5, and what it cannot hold counts as zero."
    gen = torch.Generator().manual_seed(seed)
    x = (torch.randn(n, generator=gen)*scale).bfloat16().float()
    y = x.clone()
    y[int(torch.randint(n, (1,), generator=gen))] += 1
    assert _tensor_sums(x, size) == _tensor_sums(x.bfloat16(), size) == _tensor_sums(x.bfloat16().half(), size) != _tensor_sums(y, size)
    assert _tensor_sums(torch.stack([x, y], 1)[:, 0], size) == _tensor_sums(x, size)         # whatever its strides


def test_a_plan_with_wrong_units_changes_nothing():
    m = tiny_model('llama')
    plan = example(m)
    plan.kept['2.mlp_channel'] = [99]
    before = repr(m)
    with pytest.raises(ValueError, match='unit 99'): plan.apply(m)
    assert repr(m) == before
    json.dumps(plan.kept)                                   # plain data

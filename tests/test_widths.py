"""Widths are multiples where they shall be, budgets are met to within one step, and what cannot be is said before any work."""
from dataclasses import replace
from itertools import product

import pytest
import torch
from hypothesis import given, strategies as st

from prunebook.couplings import Coupling, couplings
from prunebook.fasp import FASP
from prunebook.methods import METHODS, Method, as_method, configured
from prunebook.models import TINY, decoder_linears, n_parameters
from prunebook.plan import check_multiples, check_sparsity, global_steps, rungs, uniform_steps
from prunebook.pruning import prune
from prunebook.recipe import Recipe
from prunebook.text import random_tokens
from helpers import tiny_model

pytestmark = pytest.mark.usefixtures('one_thread')

VALUES = ('value_channel', 'mlp_channel')
QUICK = dict(bonsai=dict(evaluations=8, seqlen=12), surgeon=dict(shots=2, rounds=1), recipe=dict(measure_seqlen=12, shares=(.5,)))
PARTS = ('block_influence', 'removal')                      # they remove whole parts
EVERY = ('random', 'magnitude', 'wanda_sp', 'flap', 'taylor', 'fasp', 'depth2', 'bonsai', 'surgeon', 'recipe')


def linears(model): return n_parameters(decoder_linears(model).values())


# ---- rungs and allocations ------------------------------------------------------------------------------------------

@given(st.integers(1, 60), st.integers(1, 3), st.integers(1, 70))
def test_rungs_are_all_multiples_below_the_dense_width(size, groups, multiple):
    c = Coupling(0, 'value_channel', [], ('second', torch.arange(size*groups)[:, None]), 1, groups, multiple)
    assert rungs(c)[0] == 0
    assert sorted(size - k for k in rungs(c)[1:]) == [m for m in range(multiple, size) if m % multiple == 0]


@st.composite
def tables(draw):
    "Couplings of a model with equal blocks, each kind with a multiple of its own, and the number of its parameters."
    kinds = draw(st.sampled_from([('mlp_channel',), ('value_channel', 'mlp_channel')]))
    shapes = {k: (draw(st.integers(1, 3)) if k == 'value_channel' else 1, draw(st.integers(2, 40)), draw(st.integers(1, 200))) for k in kinds}
    multiples = {k: draw(st.integers(1, shapes[k][1] - 1)) for k in kinds}
    table = []
    for i, k in product(range(draw(st.integers(1, 4))), kinds):
        groups, size, cost = shapes[k]
        table.append(Coupling(i, k, [], ('second', torch.arange(groups*size)[:, None]), cost, groups, multiples[k]))
    return table, sum(c.cost*c.n_units for c in table) + draw(st.integers(0, 5000))


def gone(table, steps): return sum(c.cost*c.groups*steps[c.name] for c in table)
def largest(c): return max((b - a for a, b in zip(rungs(c), rungs(c)[1:])), default=0)*c.cost*c.groups


@given(tables(), st.floats(0, 1), st.integers(0, 99))
def test_allocations_stand_on_rungs_and_meet_the_budget_to_within_one_step(case, share, seed):
    table, total = case
    sparsity = share*sum(c.cost*c.groups*rungs(c)[-1] for c in table)/total
    scores = {c.name: torch.rand(c.n_units, generator=torch.Generator().manual_seed(seed)) for c in table}
    for steps in (uniform_steps(table, sparsity, total), global_steps(table, scores, sparsity, total)):
        assert all(steps[c.name] in rungs(c) for c in table)
        assert gone(table, steps) >= sparsity*total*(1 - 1e-9) - 1e-6
    assert gone(table, steps) <= sparsity*total + max(map(largest, table)) + 1e-6


@given(tables(), st.floats(0, 1))
def test_uniform_widths_are_neighbouring_rungs_and_no_block_could_keep_more(case, share):
    table, total = case
    needed = share*sum(c.cost*c.groups*rungs(c)[-1] for c in table)
    steps = uniform_steps(table, needed/total, total)
    for k in {c.kind for c in table}:
        places = {rungs(c).index(steps[c.name]) for c in table if c.kind == k}
        assert max(places) - min(places) <= 1
    if needed > 1e-3 and len({c.kind for c in table}) == 1 and table[0].multiple > 1:
        higher = [c for c in table if steps[c.name] == max(steps.values())]
        ladder = rungs(higher[0])
        assert gone(table, steps) - (ladder[ladder.index(max(steps.values()))] - ladder[ladder.index(max(steps.values())) - 1])*table[0].cost*table[0].groups < needed + 1e-6


def test_widths_on_a_rung_are_equal_and_others_are_spread_over_the_depth():
    table = [Coupling(i, 'mlp_channel', [], ('second', torch.arange(64)[:, None]), 1, 1, 16) for i in range(10)]
    assert set(uniform_steps(table, .25, 640).values()) == {16}
    steps = list(uniform_steps(table, .35, 640).values())                      # 224 units: four blocks of 32 and six of 16
    assert sorted(steps) == [16]*6 + [32]*4
    assert all(32 in steps[i:i + 4] and 16 in steps[i:i + 3] for i in range(7))


@given(st.integers(3, 9), st.integers(1, 4), st.floats(.05, 1), st.integers(0, 99))
def test_no_widths_of_these_multiples_lose_less_than_the_global_threshold(size, multiple, share, seed):
    multiple = min(multiple, size - 1)
    if size % multiple: size += multiple - size % multiple                     # all steps are alike
    table = [Coupling(i, 'mlp_channel', [], ('second', torch.arange(size)[:, None]), 3, 1, multiple) for i in range(3)]
    scores = {c.name: torch.rand(size, generator=torch.Generator().manual_seed(seed + c.layer)).double() for c in table}
    lost = lambda counts: sum(scores[c.name].sort().values[:k].sum().item() for c, k in zip(table, counts))
    total = 9*size
    sparsity = share*sum(3*rungs(c)[-1] for c in table)/total
    steps = global_steps(table, scores, sparsity, total)
    best = min(lost(ks) for ks in product(*map(rungs, table)) if 3*sum(ks) >= sparsity*total)
    assert lost(steps.values()) <= best + 1e-9


# ---- methods ---------------------------------------------------------------------------------------------------------

def test_these_are_all_methods():
    whole = {*PARTS, 'reap'}                               # the units of the last are experts
    for n in (*EVERY, *whole): as_method(n)
    assert {n for n, m in METHODS.items() if m.__module__.startswith('prunebook.')} == {*EVERY, *whole}


@pytest.mark.parametrize('name', EVERY)
@pytest.mark.parametrize('family', TINY)
def test_every_method_makes_multiples_and_meets_the_budget(name, family):
    model, multiple = tiny_model(family), dict(mlp_channel=8, value_channel=2)
    method = configured(name, {**QUICK.get(name, {}), 'units': VALUES, 'multiple': multiple})
    table, total = method.table(model), linears(model)
    small, plan = prune(model, random_tokens(model, 12, 24, seed=0), method, .3)
    for c in table:
        size = len(plan.kept[c.name])//c.groups
        assert size == c.n_units//c.groups or size % multiple[c.kind] == 0, (c.name, size)
    assert any(len(plan.kept[c.name]) < c.n_units for c in table if c.kind == 'mlp_channel')
    assert .3 <= plan.true_sparsity <= .3 + max(map(largest, table))/total + 1e-9
    assert plan.settings['multiple'] == multiple
    assert plan.true_sparsity == pytest.approx(1 - linears(small)/total)


def test_a_plan_with_multiples_is_applied_again():
    model = tiny_model('llama')
    text = random_tokens(model, 12, 24, seed=0)
    small, plan = prune(model, text, FASP(units=VALUES, multiple=8), .3)
    assert {len(k) for n, k in plan.kept.items() if 'mlp' in n} <= {8, 16, 24, 32}
    again = plan.apply(model, text)
    assert all(torch.equal(p, q) for p, q in zip(small.parameters(), again.parameters(), strict=True))


def test_a_number_is_for_the_mlp_and_kinds_are_named_in_a_dict():
    model = tiny_model('llama')
    number, named = FASP(units=VALUES, multiple=8).table(model), FASP(units=VALUES, multiple=dict(value_channel=4)).table(model)
    assert {(c.kind, c.multiple) for c in number} == {('mlp_channel', 8), ('value_channel', 1)}
    assert {(c.kind, c.multiple) for c in named} == {('mlp_channel', 1), ('value_channel', 4)}


@pytest.mark.parametrize('channels, head, expected', [(252, 60, (1, 1)), (256, 64, (32, 32))])
def test_the_recipe_takes_multiples_where_there_are_many_channels(channels, head, expected):
    "A third of a narrow MLP is too coarse a step."
    model = tiny_model('llama', intermediate_size=channels, head_dim=head)
    found = {c.kind: c.multiple for c in Recipe().table(model)}
    assert (found['mlp_channel'], found['value_channel']) == expected


@pytest.mark.parametrize('wrong, said', [(0, 'multiple is 0'), (True, 'multiple is True'), (8., 'multiple is 8.0'), ({'mlp_channel': 0}, 'multiple is'),
                                         ({'mlp_channel': '8'}, 'multiple is'), ('8', "multiple is '8'"), ({'mlp': 8}, 'multiple names mlp')])
def test_a_multiple_that_cannot_be_is_refused(wrong, said):
    with pytest.raises(ValueError, match=said): FASP(multiple=wrong)


def test_a_number_for_units_of_attention_asks_for_the_kind():
    with pytest.raises(ValueError, match='name the kind, for example {"value_channel": 8}'): FASP(units=('value_channel',), multiple=8)


def test_a_multiple_without_any_rung_is_refused_before_work():
    model = tiny_model('llama')
    with pytest.raises(ValueError, match='only 37 of these are together.*at most 36'): prune(model, random_tokens(model, 4, 16), FASP(multiple=64), .1)
    with pytest.raises(ValueError, match='at most .* while the smallest multiple stays everywhere'): prune(model, random_tokens(model, 4, 16), FASP(multiple=32), .3)


# ---- what stays whole -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize('keep, whole', [
    ((0, 2), {'0.value_channel', '0.mlp_channel', '2.value_channel', '2.mlp_channel'}),
    (('layers.1.mlp',), {'1.mlp_channel'}),
    (('self_attn', 0), {'0.value_channel', '1.value_channel', '2.value_channel', '0.mlp_channel'}),
    (('model.layers.2.self_attn.o_proj',), {'2.value_channel'})])
@pytest.mark.parametrize('name', EVERY)
def test_what_is_kept_stays_whole_with_every_method(name, keep, whole):
    model = tiny_model('llama')
    method = configured(name, {**QUICK.get(name, {}), 'units': VALUES, 'keep': list(keep)})
    _, plan = prune(model, random_tokens(model, 12, 24, seed=0), method, .1)
    assert {c.name for c in couplings(model, VALUES)} - plan.scores.keys() == whole
    assert all(len(plan.kept.get(n, range(plan.units[n]))) == plan.units[n] for n in whole)
    assert plan.settings['keep'] == list(keep) and plan.true_sparsity >= .1


@pytest.mark.parametrize('keep, said', [((3,), 'keep names 3, which is in no block; .*from 0 to 2'), (('layers.9',), "keep names 'layers.9'"), (('lm_head',), "keep names 'lm_head'"),
                                        ((0, 1, 2), 'leaves nothing to prune')])
def test_a_name_that_keeps_nothing_or_everything_is_refused_before_work(keep, said):
    model = tiny_model('llama')
    with pytest.raises(ValueError, match=said): prune(model, random_tokens(model, 4, 16), FASP(keep=keep), .1)


@pytest.mark.parametrize('wrong', [(-1,), 'layers.0', (True,), (.5,)])
def test_keep_is_a_tuple_of_numbers_and_names(wrong):
    with pytest.raises(ValueError, match='keep is .* it is a tuple of block numbers and names'): FASP(keep=wrong)


def test_heads_by_number_and_multiples_of_them_are_refused_together():
    from prunebook.depth2 import Depth2
    units = ('query_head', 'mlp_channel')
    with pytest.raises(ValueError, match='n_heads and multiple both say how many of query_head go'): Depth2(units=units, n_heads=3, multiple=dict(query_head=2))
    model = tiny_model('llama')
    _, plan = prune(model, random_tokens(model, 6, 16), Depth2(units=units, n_heads=3, multiple=8, heads='random', restore=False), .25)
    assert {len(k) for n, k in plan.kept.items() if 'mlp' in n} <= {8, 16, 24, 32, 37} and plan.true_sparsity >= .25

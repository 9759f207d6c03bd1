"""Whole parts leave: sliced is masked, nothing is left of them, files and caches work, budgets are met, and what stays makes up for them."""
import copy
import json
import math
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from helpers import tiny_model
from test_conformance import PLAIN, UNLIKE, build

from prunebook.cli import main
from prunebook.conform import check_function, check_method, check_saved, check_streamed, check_tables, check_walk, check_writes, padded_logits
from prunebook.couplings import anatomy, couplings, slice_units, weight_of
from prunebook.depth import WHOLE_PARTS, BlockInfluence, Removal, influences, losses_without
from prunebook.estimate import estimate
from prunebook.fasp import FASP
from prunebook.gone import Gone
from prunebook.methods import configured
from prunebook.models import TINY, decoder_linears, n_parameters
from prunebook.plan import PrunePlan, rungs, uniform_steps
from prunebook.pruning import prune
from prunebook.recipe import Recipe, _hull, _whole_or_share
from prunebook.save import load_pruned, save_pruned
from prunebook.sources import InMemory
from prunebook.stream import Context
from prunebook.text import random_tokens
from prunebook.walk import outputs_add, replaced

pytestmark = pytest.mark.usefixtures('one_thread', 'own_modules')
QUICK = dict(measure_seqlen=12)
GONE = [{1: 'a', 2: 'm'}, {0: 'am', 2: 'am'}]                    # parts of blocks that leave, attention or MLP or both


def windows(m, n=9): return random_tokens(m, n=n, seqlen=16)
def linears(m): return n_parameters(decoder_linears(m).values())


def without(model, parts):
    "All kept units where those of some parts leave."
    gone = {f'{i}.{p}' for i, letters in parts.items() for p in WHOLE_PARTS if p[0] in letters}
    return {c.name: [] if c.name in gone else [0] for b in WHOLE_PARTS for c in _table(model) if c.part == b}


def _table(model): return couplings(model, WHOLE_PARTS if any(b.has('mlp') for b in anatomy(model)) else ('attention',))


# ---- the model ------------------------------------------------------------------------------------------------------

FAMILIES = [(f, v) for f, v in PLAIN if f in (*TINY, *UNLIKE)]


@pytest.mark.parametrize('parts', GONE, ids=str)
@pytest.mark.parametrize('family,variant', FAMILIES)
def test_a_model_without_parts_is_the_masked_one_and_writes(family, variant, parts):
    "In float64 where the family can; its walk sees what it computes, and padding on the left and a cache change nothing."
    dense = build(family, variant)
    within = 1e-12 if family in TINY else 1e-5
    if family in TINY: dense = dense.double()
    kept = without(dense, parts)
    for c in _table(dense): check_tables(dense, c)
    small = slice_units(copy.deepcopy(dense), kept)
    check_function(dense, small, kept, within)
    assert linears(dense) - linears(small) == sum(c.freed(c.n_units) for c in _table(dense) if not kept[c.name])
    check_writes(small)
    check_walk(small)


@pytest.mark.parametrize('family,variant', FAMILIES)
def test_a_saved_model_without_parts_is_loaded_bit_for_bit(family, variant):
    model = build(family, variant)
    check_saved(slice_units(model, without(model, {0: 'a', 1: 'am', 2: 'm'})))


@pytest.mark.parametrize('family', TINY)
def test_nothing_is_left_of_a_part(family):
    "No weights, no call of its linears, no keys and values but one number for each token in the first layer."
    small = slice_units(tiny_model(family), without(tiny_model(family), {0: 'a', 2: 'am'}))
    called = []
    for n, m in decoder_linears(small).items(): m.register_forward_hook(lambda *a, n=n: called.append(n))
    past = small(windows(small).ids, use_cache=True).past_key_values
    b = anatomy(small)
    whole = {small.get_submodule(n) for n in (b[0].attention, b[2].attention)}
    assert all(isinstance(m, Gone) and not any(p.numel() for p in m.parameters()) for m in whole)
    names = [n for i, p in ((0, 'attention'), (2, 'attention'), (2, 'mlp')) for n in b[i].linears(p)]
    assert not set(names) & set(called) and set(b[1].linears('attention')) <= set(called)
    assert past.layers[0].keys.shape[1::2] == (1, 1) and past.layers[1].keys.shape[1::2] != (1, 1)
    assert len(past.layers) < 3 or not past.layers[2].is_initialized
    assert isinstance(small.get_submodule(b[2].name), Gone) and not any(p.numel() for p in small.get_submodule(b[2].name).parameters())


@pytest.mark.parametrize('gone', [{0: 'a'}, {1: 'a'}, {0: 'a', 1: 'a'}, {1: 'am'}], ids=str)
@pytest.mark.parametrize('cache', ['dynamic', 'static'])
def test_caches_with_windows_count_tokens_in_every_type_of_layer(gone, cache):
    "Gemma 2: layers 0 and 2 see a window of 8 tokens, layer 1 everything."
    small = slice_units(build('gemma2'), without(build('gemma2'), gone))
    ids = windows(small, 2).ids.clamp(min=3)
    kw = dict(max_new_tokens=6, min_new_tokens=6, do_sample=False, pad_token_id=0)
    kind = dict(cache_implementation='static') if cache == 'static' else {}
    assert torch.equal(small.generate(ids, **kw, **kind), small.generate(ids, use_cache=False, **kw))


def test_a_folder_without_parts_is_loaded_without_this_package(tmp_path):
    small = slice_units(tiny_model('llama'), without(tiny_model('llama'), {0: 'a', 1: 'am', 2: 'm'}))
    save_pruned(small, None, tmp_path/'small')
    torch.save((windows(small).ids, small(windows(small).ids).logits), tmp_path/'expected.pt')
    code = f'''
import sys, torch
sys.modules['prunebook'] = None
from transformers import AutoModelForCausalLM
ids, expected = torch.load('{tmp_path}/expected.pt')
model = AutoModelForCausalLM.from_pretrained('{tmp_path}/small', trust_remote_code=True).eval()
with torch.no_grad(): assert torch.equal(model(ids).logits, expected)
'''
    done = subprocess.run([sys.executable, '-W', 'error::UserWarning:torch', '-c', code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize('wrong', [dict(part='head', pair=True, place=-1), dict(part='mlp', pair=1, place=-1), dict(part='mlp'), 'mlp', dict(part='mlp', pair=False, place=-1, run='x')])
def test_a_folder_that_says_nonsense_about_its_parts_is_refused(tmp_path, wrong):
    small = slice_units(tiny_model('llama'), without(tiny_model('llama'), {1: 'm'}))
    save_pruned(small, None, tmp_path/'small')
    config = json.loads((tmp_path/'small'/'config.json').read_text())
    config['pruned']['gone']['model.layers.1.mlp'] = wrong
    (tmp_path/'small'/'config.json').write_text(json.dumps(config))
    (tmp_path/'small'/'prunebook.json').unlink(missing_ok=True)
    with pytest.raises(ValueError, match='no part of this model that can be gone|damaged'): load_pruned(tmp_path/'small', verify=False)


def test_units_of_width_may_leave_as_a_whole_too():
    "The rest of the part goes with the last unit: queries, keys, biases."
    m = tiny_model('llama')
    c = couplings(m, 'value_channel')[1]
    assert c.freed(c.n_units) == sum(n_parameters([m.get_submodule(n)]) for n in anatomy(m)[1].linears('attention')) > c.cost*c.n_units
    whole, width = slice_units(copy.deepcopy(m), {'1.attention': []}), slice_units(copy.deepcopy(m), {'1.value_channel': []})
    assert torch.equal(padded_logits(whole), padded_logits(width)) and c.freed(3) == 3*c.cost


def test_whole_parts_are_no_units_among_others():
    m = tiny_model('llama')
    with pytest.raises(ValueError, match='overlap'): couplings(m, ('attention', 'value_channel'))
    assert {c.kind for c in couplings(m, ('attention', 'mlp_channel'))} == {'attention', 'mlp_channel'}
    with pytest.raises(ValueError, match='no MLP of linear layers'): couplings(build('mixtral'), WHOLE_PARTS)


# ---- the methods ----------------------------------------------------------------------------------------------------

METHODS = dict(blocks=BlockInfluence(), parts=BlockInfluence(level='part'), cut=BlockInfluence(restore=False), removal=Removal(**QUICK), quickly=Removal(restore=False, at_once=3, **QUICK))


@pytest.mark.parametrize('name', METHODS)
@pytest.mark.parametrize('family', ['llama', 'gpt2', 'gemma2', 'bloom', 'mixtral', 'qwen2_moe'])
def test_methods_remove_whole_parts_and_meet_the_budget(family, name):
    model, method = build(family), METHODS[name]
    if family in ('mixtral', 'gpt_oss'): method = type(method)(**{**method.settings(), 'units': ('attention',)})
    small = check_method(model, method, .3)
    assert {(b.heads, b.mlp_width) for b in anatomy(small)} - {(b.heads, b.mlp_width) for b in anatomy(model)} <= {(h, f) for b in anatomy(model) for h in (0, b.heads) for f in (0, b.mlp_width)}
    if name == 'quickly': check_saved(small)


@pytest.mark.parametrize('name', METHODS)
def test_no_part_left_that_the_budget_did_not_need(name):
    model = build('llama')
    for sparsity in (.05, .3, .6):
        small, plan = prune(model, windows(model), METHODS[name], sparsity)
        gone = [c for c in couplings(model, WHOLE_PARTS) if not plan.kept[c.name]]
        groups = [[c for c in gone if c.layer == i] for i in range(3)] if name in ('blocks', 'cut') else [[c] for c in gone]
        assert sparsity <= plan.true_sparsity == pytest.approx(sum(c.cost for c in gone)/linears(model))
        assert all(plan.true_sparsity - sum(c.cost for c in g)/linears(model) < sparsity for g in groups if g)


@pytest.mark.parametrize('method', [*METHODS.values(), Recipe(depth=True, **QUICK)], ids=[*METHODS, 'recipe'])
def test_a_plan_without_parts_is_applied_again(method, tmp_path):
    model = tiny_model('llama')
    small, plan = prune(model, windows(model), method, .6)
    assert any(not k for k in plan.kept.values())
    plan.save(tmp_path/'plan.json')
    again = PrunePlan.load(tmp_path/'plan.json').apply(model, windows(model))
    assert all(torch.equal(p, q) for p, q in zip(small.state_dict().values(), again.state_dict().values(), strict=True))


@pytest.mark.parametrize('method', [BlockInfluence(), BlockInfluence(restore=False), Recipe(depth=True, **QUICK), FASP(units=WHOLE_PARTS)], ids=lambda m: f'{m.name}-{m.restore}')
@pytest.mark.parametrize('family', ['llama', 'opt'])
def test_parts_leave_a_checkpoint_on_disk(family, method): check_streamed(build(family), method, .6)


def test_influence_is_the_angle_by_which_hidden_states_turn():
    m = tiny_model('gpt2')
    text = windows(m)
    found, states = influences(InMemory(m), text, batch_size=4), m(text.ids, output_hidden_states=True).hidden_states
    for i in range(2):                                     # a norm follows the last block
        assert found[i, 'block'] == pytest.approx((1 - torch.cosine_similarity(states[i], states[i + 1], dim=-1)).mean().item(), abs=1e-5)


@pytest.mark.parametrize('family', ['llama', 'bloom', 'phi'])
def test_losses_are_those_of_models_without_the_part(family):
    m = build(family)
    ids = windows(m).ids
    for (layer, part), loss in losses_without(InMemory(m), ids, [(i, p) for i in range(3) for p in WHOLE_PARTS]).items():
        small = slice_units(copy.deepcopy(m), {f'{layer}.{part}': []})
        assert loss == pytest.approx(small(ids, labels=ids).loss.item(), abs=1e-4)


def test_removal_takes_the_cheapest_part_of_every_round():
    m, text = tiny_model('llama'), windows(tiny_model('llama'))
    plan = prune(m, text, Removal(restore=False, **QUICK), .6)[1]
    ids, left, order = text.ids[-8:, :12], copy.deepcopy(m), []
    while len(order) < sum(not k for k in plan.kept.values()):
        found = {}
        for c in couplings(left, WHOLE_PARTS):
            tried = slice_units(copy.deepcopy(left), {c.name: []})
            found[c.name] = tried(ids, labels=ids).loss.item()
        order.append(min(found, key=found.get))
        slice_units(left, {order[-1]: []})
    assert {n for n, k in plan.kept.items() if not k} == set(order)


@pytest.mark.parametrize('method', [BlockInfluence, Removal])
def test_what_stays_makes_up_for_what_went(method):
    "After the repair the stream is nearer to the dense one, on other text too."
    m = tiny_model('llama')
    text, other = random_tokens(m, n=64, seqlen=16), random_tokens(m, n=16, seqlen=16, seed=5).ids
    expected = m(other).logits
    (cut, plan), (fitted, again) = (prune(m, text, method(restore=r, trust=1., spare=(0, 1)), .2) for r in (False, True))
    assert plan.kept == again.kept
    far = lambda model: (model(other).logits - expected).square().mean().item()
    assert far(fitted) < .8*far(cut)


def test_only_whole_parts():
    with pytest.raises(ValueError, match='removal removes whole parts, attention and mlp, and no mlp_channel'): Removal(units=('mlp_channel',))
    m = tiny_model('llama')
    small, _ = prune(m, windows(m), BlockInfluence(units=('mlp',)), .3)
    assert all(b.heads == 6 for b in anatomy(small)) and 0 in {b.mlp_width for b in anatomy(small)}
    with pytest.raises(ValueError, match='cannot be reached with attention'): prune(m, windows(m), BlockInfluence(units=('attention',)), .6)


@pytest.mark.parametrize('spare,keep', [((1, 1), ()), ((0, 0), (0, 'layers.2.mlp'))])
def test_parts_that_stay(spare, keep):
    m = tiny_model('llama', num_hidden_layers=4)
    plan = prune(m, windows(m), Removal(spare=spare, keep=keep, **QUICK), .3)[1]
    gone = {n for n, k in plan.kept.items() if not k}
    assert gone and not gone & ({'0.attention', '0.mlp', '3.mlp', '3.attention'} if spare[0] else {'0.attention', '0.mlp', '2.mlp'})


def test_a_uniform_share_of_whole_parts_is_spread_over_the_depth():
    table = couplings(tiny_model('llama', num_hidden_layers=12), 'mlp')
    total = 2*sum(c.cost for c in table)
    steps = uniform_steps(table, .25, total)               # six of twelve
    assert sorted(steps.values()) == [0]*6 + [1]*6 and all(rungs(c) == [0, 1] for c in table)
    assert all(sum([*steps.values()][i:i + 4]) in (1, 2, 3) for i in range(9))


@pytest.mark.parametrize('method', ['block_influence', 'removal'])
def test_command_line(method, tmp_path, capsys, tiny_tokenizer):
    m = tiny_model('llama')
    m.save_pretrained(tmp_path/'dense')
    tiny_tokenizer.save_pretrained(tmp_path/'dense')
    assert main(['prune', str(tmp_path/'dense'), '--method', method, '--sparsity', '0.3', '--text', 'random', '--n', '4', '--seqlen', '16', '--dtype', 'float32', '--device', 'cpu', '--out', str(tmp_path/'small')]) == 0
    small, _, plan = load_pruned(tmp_path/'small', device='cpu')
    assert plan.method == method and plan.true_sparsity >= .3 and padded_logits(small).isfinite().all()
    assert [b.layer for b in anatomy(small) if not b.has('mlp')] == [int(n[0]) for n, k in plan.kept.items() if n.endswith('mlp') and not k]


@pytest.mark.parametrize('method', [BlockInfluence(), Removal(), Recipe(depth=True)], ids=lambda m: m.name)
def test_estimates_know_them(method):
    found = estimate(tiny_model('llama'), method, 512, .3, seqlen=64)
    assert found['flops'] > 0 and found['bytes'] > 0


# ---- the recipe -----------------------------------------------------------------------------------------------------

def test_the_hull_is_the_largest_convex_function_below():
    gen = torch.Generator().manual_seed(0)
    for _ in range(50):
        xs = torch.rand(8, generator=gen).cumsum(0).tolist()
        ys = (torch.rand(8, generator=gen)*4).tolist()
        points = [(0, 0, 0), *((x, y, i + 1) for i, (x, y) in enumerate(zip(xs, ys)))]
        hull = _hull(points)
        slopes = [(b[1] - a[1])/(b[0] - a[0]) for a, b in zip(hull, hull[1:])]
        assert slopes == sorted(slopes) and hull[0] == points[0] and hull[-1] == points[-1]
        for x, y, _ in points:
            a, b = next((a, b) for a, b in zip(hull, hull[1:]) if a[0] <= x <= b[0])
            assert y >= a[1] + (b[1] - a[1])*(x - a[0])/(b[0] - a[0]) - 1e-9


def test_a_part_that_is_worth_nothing_goes_whole():
    "And the budget is met to within a unit where smaller steps are left."
    m = tiny_model('llama')
    b = anatomy(m)[1]
    for n in b.linears('mlp')[-1:]: m.get_submodule(n).weight.data.mul_(1e-4)
    if (bias := m.get_submodule(b.mlp_second).bias) is not None: bias.data.zero_()
    for sparsity in (.2, .3, .45):
        small, plan = prune(m, windows(m), Recipe(depth=True, **QUICK), sparsity)
        table = Recipe(depth=True).table(m)
        assert not plan.kept['1.mlp_channel'] or sparsity < .2
        assert sparsity <= plan.true_sparsity <= sparsity + max(c.cost*c.groups for c in table)/linears(m) + 1e-9


def read(m, ids, linear):
    "Inputs and outputs of a linear in a forward pass."
    seen = []
    handle = linear.register_forward_hook(lambda mod, args, y: seen.extend([args[0], y]))
    with torch.no_grad(): m(ids)
    handle.remove()
    return seen


def mute(linear): return replaced([(linear, lambda x: x.new_zeros(*x.shape[:-1], len(weight_of(linear))))])


def test_steps_stand_where_they_may():
    m = tiny_model('llama')
    table = Recipe(depth=True).table(m)
    total, gen = linears(m), torch.Generator().manual_seed(1)
    for sparsity in (.1, .5, .9):
        damage = {c.name: torch.rand(c.n_units//c.groups + 1, generator=gen).double().cumsum(0) for c in table}
        for d in damage.values(): d[0], d[len(d)//2:-1] = 0, math.inf
        steps = _whole_or_share(table, damage, sparsity, total)
        assert all(damage[n][k] < math.inf for n, k in steps.items())
        assert sum(c.freed(c.groups*steps[c.name]) for c in table) >= sparsity*total - 1e-6


def test_whole_parts_may_leave_from_a_third_on():
    assert all(c.least == 1 for c in Recipe().table(tiny_model('llama')))
    assert [Recipe().at(s).depth for s in (0, .2, .33, .34, .5)] == [False, False, False, True, True]
    assert Recipe(depth=False).at(.5).depth is False and Recipe(depth=True).at(.1).depth is True
    for other in (dict(allocation='uniform'), dict(uniform=True), dict(own=.5), dict(metric='loss')): assert Recipe(**other).at(.5).depth is False
    m = tiny_model('llama')
    assert [prune(m, windows(m), Recipe(**QUICK), s)[1].settings['depth'] for s in (.3, .4)] == [False, True]
    plan = prune(m, windows(m), Recipe(**QUICK), parameters=.7*sum(p.numel() for p in m.parameters()))[1]
    assert plan.settings['depth'] == (plan.sparsity >= 1/3)
    with pytest.raises(ValueError, match='depth needs the measured allocation'): Recipe(depth=True, allocation='uniform')
    assert configured('recipe', dict(depth=True)).depth


def test_a_budget_of_speed_removes_no_whole_parts_unless_asked(monkeypatch):
    from prunebook import budget
    monkeypatch.setattr(budget.Budget, 'share', lambda self, model, method: .5)
    assert not budget.Budget(speed=1.3).decided(tiny_model('llama'), Recipe())[1].depth
    assert budget.Budget(speed=1.3).decided(tiny_model('llama'), Recipe(depth=True))[1].depth
    assert budget.Budget(.5).decided(tiny_model('llama'), Recipe())[1].depth


def test_probes_of_the_recipe_with_depth_have_one_more(tmp_path):
    from prunebook.methods import Run
    m = tiny_model('llama')
    for depth in (False, True): prune(m, windows(m), Recipe(depth=depth, **QUICK), .3, run=Run(log=str(tmp_path/f'{depth}.json')))
    short, long = (json.loads((tmp_path/f'{d}.json').read_text())['probes'] for d in (False, True))
    assert all(long[n][:-1] == short[n] and long[n][-1][0] == c.n_units//c.groups for n, c in ((c.name, c) for c in Recipe().table(m)))


def test_one_log_serves_runs_with_and_without_whole_parts(tmp_path, monkeypatch):
    from prunebook.methods import Run
    m, log = tiny_model('llama'), Run(log=str(tmp_path/'probes.json'))
    kept = lambda depth, run=None: prune(m, windows(m), Recipe(depth=depth, **QUICK), .4, run=run)[1].kept
    assert kept(False, log) == kept(False)
    assert kept(True, log) == kept(True)                   # measured again, with whole parts, and written
    monkeypatch.setattr(Recipe, '_probes', lambda self, ctx: pytest.fail('measured again'))
    assert kept(True, log) != kept(False, log)
    monkeypatch.undo()
    assert kept(False, log) == kept(False)


def test_widths_of_the_recipe_are_multiples_of_32():
    m = tiny_model('llama', hidden_size=256, num_attention_heads=4, num_key_value_heads=2, intermediate_size=256, head_dim=64)
    assert {(c.kind, c.multiple) for c in Recipe().table(m)} == {('value_channel', 32), ('mlp_channel', 32)}
    assert {c.multiple for c in Recipe().table(tiny_model('llama'))} == {1}
    assert {c.multiple for c in Recipe(multiple=1).table(m)} == {c.multiple for c in Recipe(uniform=True).table(m)} == {1}
    assert {c.multiple for c in Recipe(units=('kv_group',)).table(m)} == {1}
    _, plan = prune(m, windows(m), Recipe(**QUICK), .3)
    values, mlp = ([len(k) for n, k in plan.kept.items() if n.endswith(kind)] for kind in ('value_channel', 'mlp_channel'))
    assert all(k % 64 == 0 for k in values) and all(k % 32 == 0 for k in mlp) and min(mlp) < 256


@pytest.mark.parametrize('family', [f for f in TINY if all(b.has('mlp') for b in anatomy(tiny_model(f)))])
def test_an_mlp_makes_up_for_the_attention_before_it(family):
    "The fit is that of normal equations with inputs and outputs of hooks, and its probe that of a whole pass."
    m, found = tiny_model(family), {}
    text, method = windows(m), Recipe(depth=True, **QUICK)
    ctx = Context(InMemory(m), text, .3, table=method.table(m), total=linears(m))
    for v in ctx.look():
        if v.part == 'mlp': found[v.layer] = method._without_attention(v)
    ids, (fits, seen) = text.ids, method._split(text)
    riders = {(name, k): d for name, probes in method._probes(ctx).items() for k, d in probes}
    for b in anatomy(m):
        out, second = m.get_submodule(b.out), m.get_submodule(b.mlp_second)
        W, damp = weight_of(second).detach().clone(), method.ridge_for(ids.numel())
        x, a = read(m, ids, second)[0], read(m, ids, out)[1]
        with mute(out): alone = read(m, ids, second)[0].flatten(0, -2)
        wanted = x.flatten(0, -2) @ W.T + (a.flatten(0, -2) if outputs_add(m) else 0)
        V = damp.solve(alone.T @ alone, alone.T @ (wanted - alone @ W.T)).T + W
        assert (found[b.layer] - V).norm() < 1e-3*(V - W).norm() + 1e-6
        name = f'{b.layer}.value_channel'
        fitted = replace(ctx, windows=fits)
        V = [method._without_attention(v) for v in fitted.look() if v.part == 'mlp' and v.layer == b.layer][0]
        p = m(seen).logits.float().log_softmax(-1)
        old = weight_of(second).data.clone()
        weight_of(second).data.copy_(V)
        with mute(out): q = m(seen).logits.float().log_softmax(-1)
        weight_of(second).data.copy_(old)
        whole = next(c.n_units//c.groups for c in ctx.table if c.name == name)
        assert riders[name, whole] == pytest.approx((p.exp()*(p - q)).sum(-1).mean().item(), rel=1e-3, abs=1e-6)


def test_a_whole_part_costs_its_price():
    "Half the price is the price of half the damage, and for nothing whole parts leave."
    m = tiny_model('llama')
    gone = lambda price: [n for n, units in prune(m, windows(m), Recipe(depth=True, whole_price=price, **QUICK), .3)[1].kept.items() if not units]
    assert len(gone(0.)) > len(gone(1.))
    table = Recipe(depth=True).table(m)
    def steps(price, damage):
        points = {c.name: [(c.n_units//c.groups//2, .01), (c.n_units//c.groups, damage)] for c in table}
        ctx = SimpleNamespace(table=table, sparsity=.4, total=linears(m))
        return Recipe(depth=True, whole_price=price)._with_whole_parts(ctx, points)
    for damage in (.01, .03, .1): assert steps(.5, damage) == steps(1., damage/2)
    assert steps(.5, .03) != steps(1., .03)
    with pytest.raises(ValueError, match='whole_price'): Recipe(whole_price=1.5)


def test_probes_serve_any_price_of_whole_parts(tmp_path, monkeypatch):
    from prunebook.methods import Run
    m, log = tiny_model('llama'), Run(log=str(tmp_path/'probes.json'))
    prune(m, windows(m), Recipe(depth=True, **QUICK), .3, run=log)
    monkeypatch.setattr(Recipe, '_probes', lambda self, ctx: pytest.fail('measured again'))
    prune(m, windows(m), Recipe(depth=True, whole_price=0., **QUICK), .3, run=log)

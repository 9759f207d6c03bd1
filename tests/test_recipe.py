"""The recipe: divergences against whole forward passes, orders and costs against brute force, shares against every way to take units."""
import copy
import itertools
import json
import math

import pytest
import torch
from helpers import tiny_model
from hypothesis import given, strategies as st

from prunebook.couplings import couplings, masked, slice_units, weight_of
from prunebook.fasp import FASP
from prunebook.methods import as_method, prune
from prunebook.models import decoder_linears, n_parameters
from prunebook.plan import global_steps, model_fingerprint
from prunebook.recipe import Recipe, block_states, cost_curve, divergence, drifting, greedy_order, marginal_costs, probe, removal_costs, trust_for
from prunebook.text import random_tokens
from prunebook.walk import walk

pytestmark = pytest.mark.usefixtures('one_thread')
FAMILIES = ('llama', 'qwen2', 'qwen3', 'gemma', 'phi', 'opt', 'gpt2')


@pytest.mark.parametrize('family', FAMILIES)
def test_divergence_is_that_of_a_whole_pass(family):
    model = tiny_model(family)
    ids = random_tokens(model, n=2, seqlen=12).ids
    states, reference = block_states(model, ids)
    p = model(ids).logits.log_softmax(-1)
    assert torch.allclose(reference, p, atol=1e-5) and len(states) == model.config.num_hidden_layers
    with masked(model, {'1.mlp_channel': range(9)}):
        q = model(ids).logits.log_softmax(-1)
        by_hand = (p.exp()*(p - q)).sum(-1).mean().item()
        assert [divergence(model, ids, states[i], i, reference) for i in (0, 1)] == pytest.approx([by_hand]*2, rel=1e-3, abs=1e-7)
    assert divergence(model, ids, states[1], 1, reference) == pytest.approx(0, abs=1e-6)


def test_probe_leaves_the_model_as_it_was():
    model = tiny_model('qwen2')
    before, c = model_fingerprint(model), couplings(model, 'kv_group')[1]
    def fails(): raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): probe(model, c, [[0]], lambda W, keep: W[:, keep], fails)
    assert model_fingerprint(model) == before
    W = weight_of(model.get_submodule(c.second[0])).detach().clone()
    seen = []
    probe(model, c, [[0], [1]], lambda W, keep: W[:, keep], lambda: seen.append(weight_of(model.get_submodule(c.second[0])).detach().clone()) or 0.)
    for kept, S in zip((0, 1), seen):
        columns = c.second[1][kept]
        assert S[:, columns].equal(W[:, columns]) and S.count_nonzero() == W[:, columns].count_nonzero()


@given(st.integers(0, 10**6), st.sampled_from([1, 2]))
def test_removal_costs(seed, width):
    "The sum over groups is the second-order rise after the best update of what stays."
    g = torch.Generator().manual_seed(seed)
    X, W, Y = [torch.randn(*s, generator=g, dtype=torch.float64) for s in ((60, 8), (3, 8), (20, 3))]
    A, G, gone = X.T @ X/60, Y.T @ Y/20, torch.randperm(8, generator=g)[:2*width]
    costs = removal_costs(W, A, G, gone.view(2, width), damp=0.)
    stay = [i for i in range(8) if i not in gone]
    E = W.clone()
    E[:, stay] -= torch.linalg.solve(A[stay][:, stay], A[stay] @ W.T).T
    assert costs.sum().item() == pytest.approx(.5*torch.trace(G @ E @ A @ E.T).item(), rel=1e-6)
    assert (costs >= 0).all()


@pytest.mark.parametrize('width', [1, 2])
def test_greedy_takes_the_cheapest_first(width):
    g = torch.Generator().manual_seed(3)
    W, X = torch.randn(4, 6*width, generator=g, dtype=torch.float64), torch.randn(80, 6*width, generator=g, dtype=torch.float64)
    table, C = torch.arange(6*width).view(6, width), X.T @ X
    def cost(units):
        gone = set(table[list(units)].flatten().tolist())
        stay = [i for i in range(6*width) if i not in gone]
        return (X @ W.T - X[:, stay] @ torch.linalg.lstsq(X[:, stay], X @ W.T).solution).square().sum().item()
    order, left = [], set(range(6))
    while left:                                            # naive greedy removal, each step solved anew
        order.append(min(left, key=lambda i: cost([*order, i])) if len(left) > 1 else min(left))
        left -= {order[-1]}
    assert greedy_order(W, C, table, damp=0., chunk=1).argsort().tolist() == order


def by_hand(points, k):
    "A curve at k: straight between probes on logarithmic axes."
    if not k: return 0.
    if len(points) == 1: return points[0][1]*(k/points[0][0])**2
    (a, x), (b, y) = next((p for p in zip(points, points[1:]) if k <= p[1][0]), (points[-2], points[-1]))
    return x*(k/a)**(math.log(y/x)/math.log(b/a))


@given(st.lists(st.tuples(st.floats(.01, 10), st.floats(1.1, 2), st.floats(2, 3.5)), min_size=3, max_size=3), st.integers(1, 40))
def test_shares_are_the_best(laws, units):
    model = tiny_model('llama')
    table, total = couplings(model, 'mlp_channel'), n_parameters(decoder_linears(model).values())
    n = table[0].n_units
    probed = [[(n//4, a), (n//2, a*2**q), (n - 2, a*2**q*((n - 2)/(n//2))**r)] for a, q, r in laws]
    steps = global_steps(table, {c.name: marginal_costs(c, points, most=1) for c, points in zip(table, probed)}, (units - .5)*table[0].cost/total, total)
    cost = lambda split: sum(by_hand(points, k) for points, k in zip(probed, split))
    taken = list(steps.values())
    assert sum(taken) == units
    best = min(cost((i, j, units - i - j)) for i, j in itertools.product(range(units + 1), repeat=2) if i + j <= units and max(i, j, units - i - j) < n)
    assert cost(taken) <= best*(1 + 1e-9)


@pytest.mark.parametrize('points', ([(3, .2)], [(3, .2), (7, .9)], [(2, .1), (5, .4), (9, 2.)]))
def test_curve_goes_through_its_probes(points):
    curve = cost_curve(12, points)
    assert curve.tolist() == pytest.approx([by_hand(points, k) for k in range(13)])
    assert all(curve[k].item() == pytest.approx(d) for k, d in points)


def test_a_curve_never_falls():
    "Noise can make a probe lower than the one before it."
    marginal = cost_curve(12, [(2, .3), (5, .2), (9, 1.)]).diff()
    assert cost_curve(12, [(2, .3), (5, 0.), (9, -1e-6)]).isfinite().all() and marginal[:5].min() > 0


def test_most_is_the_last_resort():
    model = tiny_model('llama')
    table, total = couplings(model, 'mlp_channel'), n_parameters(decoder_linears(model).values())
    n, cost = table[0].n_units, table[0].cost
    costs = {c.name: marginal_costs(c, [(4, a), (8, 8*a)], most=.5) for c, a in zip(table, (1e-6, 1., 1.))}
    assert global_steps(table, costs, 29.5*cost/total, total)['0.mlp_channel'] == n//2
    beyond = global_steps(table, costs, (3*(n//2) + 9.5)*cost/total, total)
    assert sum(beyond.values()) == 3*(n//2) + 10 and beyond['0.mlp_channel'] > beyond['1.mlp_channel']


@pytest.mark.parametrize('family', FAMILIES)
@pytest.mark.parametrize('settings', [dict(), dict(units=('kv_group', 'mlp_channel')), dict(score='greedy', units=('value_channel', 'mlp_channel')), dict(allocation='curvature', score='magnitude', restore=False)])
def test_every_family(family, settings):
    model = tiny_model(family)
    windows, before = random_tokens(model, n=5, seqlen=16), model_fingerprint(model)
    small, plan = prune(model, windows, Recipe(measure_seqlen=12, **settings), .15)
    total, largest = n_parameters(decoder_linears(model).values()), max(c.cost*c.groups for c in couplings(model, Recipe(**settings).units))
    assert model_fingerprint(model) == before
    assert .15 - 1e-9 <= plan.true_sparsity < .15 + largest/total + 1e-9
    assert small(windows.ids).logits.isfinite().all()
    assert plan.true_sparsity == pytest.approx(1 - n_parameters(decoder_linears(small).values())/total)


def test_uniform_is_fasp():
    "With everything at FASP's choices the recipe is FASP."
    model = tiny_model('qwen2')
    windows = random_tokens(model, n=4, seqlen=24)
    a, plan = prune(model, windows, Recipe(allocation='uniform', trust=0), .2)
    b, other = prune(model, windows, FASP(), .2)
    assert plan.kept == other.kept
    assert all(p.equal(q) for p, q in zip(a.parameters(), b.parameters()))


def test_a_block_that_matters_loses_less():
    "A block whose MLP writes ten times as much keeps more of it than before."
    def kept(factor):
        model = tiny_model('llama')
        weight_of(model.get_submodule(couplings(model, 'mlp_channel')[2].second[0])).data.mul_(factor)
        return [len(k) for k in prune(model, random_tokens(model, n=4, seqlen=24), Recipe(), .2)[1].kept.values()]
    assert kept(10)[2] > kept(1)[2] and kept(10)[0] < kept(1)[0]


def test_log(tmp_path, monkeypatch):
    model = tiny_model('llama')
    windows, log = random_tokens(model, n=4, seqlen=24), tmp_path/'probes.json'
    first = prune(model, windows, Recipe(log=str(log)), .2)[1]
    monkeypatch.setattr(Recipe, 'probes', lambda *a: pytest.fail('probed again'))
    assert prune(model, windows, Recipe(log=str(log)), .2)[1].kept == first.kept
    prune(model, windows, Recipe(log=str(log), trust=0), .3)
    with pytest.raises(ValueError, match='calibration differ'): prune(model, random_tokens(model, n=5, seqlen=24), Recipe(log=str(log)), .2)
    with pytest.raises(ValueError, match='shares differ'): prune(model, windows, Recipe(log=str(log), shares=(.5,)), .2)
    log.write_text('{"key"')
    with pytest.raises(ValueError, match='not a file of probes'): prune(model, windows, Recipe(log=str(log)), .2)
    log.write_text('[]')
    with pytest.raises(ValueError, match='belongs to another run'): prune(model, windows, Recipe(log=str(log)), .2)


@pytest.mark.parametrize('settings, words', [(dict(allocation='fair'), "allocation is 'fair'"), (dict(score='best'), "score is 'best'"), (dict(measure_windows=0), 'measure_windows is 0'),
                                             (dict(measure_seqlen=1), 'measure_seqlen is 1'), (dict(shares=(0, .5)), 'shares is'), (dict(shares=(.5, .2)), 'shares is'), (dict(shares=()), 'shares is'), (dict(shares=(.5, 1)), 'shares is'), (dict(shares=.5), 'shares is 0.5'), (dict(shares=('half',)), 'shares is'), (dict(damp=-1), 'damp is -1')])
def test_refused(settings, words):
    model = tiny_model('llama')
    with pytest.raises(ValueError, match=words): prune(model, random_tokens(model, n=2, seqlen=8), Recipe(**settings), .2)


def test_one_window_is_enough():
    model = tiny_model('llama')
    assert prune(model, random_tokens(model, n=1, seqlen=24), 'recipe', .2)[1].true_sparsity >= .2
    assert as_method('recipe').settings()['allocation'] == 'measured'


def test_work():
    model = tiny_model('llama')
    measured, uniform = [Recipe(allocation=a).work(model, 4096) for a in ('measured', 'uniform')]
    assert uniform['flops'] < measured['flops'] and json.dumps(measured) and copy.copy(measured)
    slice_units(model, {'0.mlp_channel': [0]})


def test_the_default_of_prune():
    small, plan = prune(tiny_model('llama'), random_tokens(tiny_model('llama'), n=3, seqlen=16))
    assert (plan.method, plan.sparsity, plan.settings) == ('recipe', .2, Recipe().settings())


def halved(module):
    "Give a linear half its weights in a new tensor, so that a twin keeps the old ones."
    module.weight = torch.nn.Parameter(module.weight.detach()/2)


@pytest.mark.parametrize('family', FAMILIES)
def test_targets_bring_the_stream_back(family):
    whole = tiny_model(family)
    w, hurt = random_tokens(whole, n=3, seqlen=10), copy.deepcopy(whole)
    stream = lambda m: m.base_model(w.ids, use_cache=False, output_hidden_states=True).hidden_states
    dense, add = stream(whole), {}
    for stage, targets in drifting(hurt, w, batch_size=2):
        if stage.layer == 0: halved(hurt.get_submodule(stage.second))                       # damage attention and MLP of the first block
        mine = stage.outputs(hurt)
        add[stage.layer, stage.part] = torch.cat([t - y.view_as(t) for t, y in zip(targets, mine)])
    for layer in (0, 1): assert torch.allclose(stream(hurt)[layer + 1] + add[layer, 'mlp'], dense[layer + 1], atol=2e-5)
    assert add[1, 'mlp'].abs().max() > 1e-3


def test_targets_are_outputs_while_nothing_has_changed():
    model = tiny_model('phi')
    before = model_fingerprint(model)
    for stage, targets in drifting(model, random_tokens(model, n=2, seqlen=9)):
        for t, y in zip(targets, stage.outputs(model)): assert torch.allclose(t, y.view_as(t), atol=1e-6)
        assert not any(t.requires_grad for t in targets)   # or all activations of all blocks would be kept for a backward pass
    assert model_fingerprint(model) == before


def test_no_drift_is_added_up_where_norms_come_between():
    whole = tiny_model('opt', do_layer_norm_before=False)
    w, hurt, seen = random_tokens(whole, n=2, seqlen=8), copy.deepcopy(whole), {}
    dense = {(s.layer, s.part): s.outputs(whole) for s in walk(whole, w)}
    for stage, targets in drifting(hurt, w):
        if stage.layer == 0: halved(hurt.get_submodule(stage.second))
        seen[stage.layer, stage.part] = targets
    assert all(torch.allclose(t, y.view_as(t), atol=1e-6) for k in dense for t, y in zip(seen[k], dense[k]))


def test_trusted_columns_are_the_least_squares_fit_to_the_dense_stream():
    whole = tiny_model('llama', hidden_act='relu')
    w = random_tokens(whole, n=6, seqlen=20)
    small, plan = prune(whole, w, Recipe(trust=1., damp=0., measure_seqlen=8), .3)
    stream = lambda m: m.base_model(w.ids, use_cache=False, output_hidden_states=True).hidden_states
    layer = small.model.layers[1]                          # the first one has lost something before it
    inputs, behind, handles = [], [], []
    handles.append(layer.mlp.down_proj.register_forward_pre_hook(lambda m, a: inputs.append(a[0].flatten(0, -2).double())))
    handles.append(layer.mlp.register_forward_hook(lambda m, a, y: behind.append(y.flatten(0, -2).double())))
    after = stream(small)[2].flatten(0, 1).double()
    for h in handles: h.remove()
    X, goal = inputs[0], stream(whole)[2].flatten(0, 1).double() - (after - behind[0])      # what the MLP should have added
    best = torch.linalg.lstsq(X, goal - layer.mlp.down_proj.bias.double()).solution
    assert torch.allclose(layer.mlp.down_proj.weight.double(), best.T, atol=1e-3)


def test_trust_brings_a_pruned_model_nearer_to_the_dense_one_and_zero_needs_no_dense_walk(monkeypatch):
    model = tiny_model('qwen2')
    w, held_out = random_tokens(model, n=24, seqlen=32), random_tokens(model, n=8, seqlen=32, seed=5)
    far = lambda m: (m(held_out.ids).logits - model(held_out.ids).logits).pow(2).mean().item()
    options = dict(measure_seqlen=16)
    trusting, plan = prune(model, w, Recipe(trust=.5, **options), .2)
    monkeypatch.setattr('prunebook.recipe.drifting', None)                                  # calling it would fail
    plain, other = prune(model, w, Recipe(trust=0, **options), .2)
    assert plan.true_sparsity == other.true_sparsity
    assert far(trusting) < far(plain)


@pytest.mark.parametrize('trust', (-.1, 1.5, 'all'))
def test_trust_outside_its_range_is_refused(trust):
    with pytest.raises(ValueError, match='trust is'): Recipe(trust=trust).check()


def test_trust_grows_with_the_text():
    shares = [trust_for(n) for n in (0, 8192, 32768, 10**9)]
    assert shares == sorted(shares) and shares[0] == 0 and shares[1] == .2 and shares[2] == .5 and shares[3] < 1

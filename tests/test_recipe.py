"""The recipe: divergences against whole forward passes, orders and costs against brute force, shares against every way to take units."""
import copy
import itertools
import json
import math

import numpy as np
import pytest
import torch
from helpers import tiny_model
from hypothesis import given, strategies as st

from test_conformance import PLAIN, build

from prunebook import recipe
from prunebook.couplings import anatomy, couplings, masked, slice_units, weight_of
from prunebook.fasp import FASP
from prunebook.methods import Run, as_method
from prunebook.models import TINY, decoder_linears, n_parameters
from prunebook.plan import global_steps, model_fingerprint
from prunebook.pruning import prune
from prunebook.recipe import (Recipe, _cost_curve, _divergence, _emptied, _greedy_order, _marginal_costs, _removal_costs, _Riders, _trust_for,
                              _value_basis)
from prunebook.repair import Ridge
from prunebook.save import load_pruned, save_pruned
from prunebook.sources import InMemory, OnDisk
from prunebook.stream import Context, column_basis, turn_values, values_turn
from prunebook.text import Windows, random_tokens
from prunebook.walk import drifting, logits_after, record_calls, through, walk

pytestmark = pytest.mark.usefixtures('one_thread')
FAMILIES = tuple(TINY)
NONE = Ridge(0.)


def equal(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(t, b[n]) for n, t in a.items())


def saved(model, folder, size='20kB'):
    model.save_pretrained(folder, max_shard_size=size)
    return folder


def streamed(model, windows, method, sparsity, place, **run):
    "The model that is pruned from disk to disk, and its plan."
    folder = place/'dense'
    if not folder.exists(): saved(model, folder)
    out, plan = prune(folder, windows, method, sparsity, run=Run(out=str(place/'small'), **run))
    return load_pruned(out, device='cpu')[0], plan


def context(model, windows, method, source=None, **settings):
    return Context(source or InMemory(model), windows, .2, table=method.table(model), total=n_parameters(decoder_linears(model).values()), **settings)


def riding(model, source, ids, trials):
    "Divergence for each trial, by name of the second linear."
    riders = _Riders(source, ids)
    for b in anatomy(source.model):
        layer = source.open(b)
        riders.step(layer, b.layer)
        for layer_index, second, W in trials:
            if layer_index == b.layer: riders.start(second, source.model.get_submodule(second), W)
        source.close(b, False)
    return riders.divergences()


@pytest.mark.parametrize('family', FAMILIES)
def test_divergence_is_that_of_a_whole_pass(family, tmp_path):
    "Of a model whose second linear is another one, without running the model."
    model = tiny_model(family)
    ids, trials, expected = random_tokens(model, n=2, seqlen=12).ids, [], {}
    p = model(ids).logits.log_softmax(-1)
    for c in couplings(model, ('mlp_channel', 'value_channel')):
        W, kept = weight_of(model.get_submodule(c.second[0])).detach(), [u for u in range(c.n_units) if u % (c.n_units//c.groups) % 4]
        keep = c.second[1][kept].flatten().sort().values
        trials.append((c.layer, c.second[0], _emptied(W, keep, W[:, keep])))
        with masked(model, {c.name: kept}): q = model(ids).logits.log_softmax(-1)
        expected[c.second[0]] = (p.exp()*(p - q)).sum(-1).mean().item()
    found = riding(model, InMemory(model), ids, trials)
    assert found == pytest.approx(expected, rel=1e-3, abs=1e-7) and min(found.values()) > 1e-9
    assert riding(model, OnDisk(saved(model, tmp_path/'dense')), ids, trials) == found


@pytest.mark.parametrize('family', FAMILIES)
def test_nothing_changed_nothing_diverges(family):
    model = tiny_model(family)
    trials = [(c.layer, c.second[0], weight_of(model.get_submodule(c.second[0])).detach()) for c in couplings(model, 'mlp_channel')]
    found = riding(model, InMemory(model), random_tokens(model, n=2, seqlen=12).ids, trials)
    assert found == pytest.approx(dict.fromkeys(found, 0), abs=1e-6) and len(found) == len(anatomy(model))


@pytest.mark.parametrize('family, variant', PLAIN)
def test_logits_after_the_last_block(family, variant, tmp_path):
    "Norm, head and what else comes after the blocks, of a model in memory and of one whose head is not; with the states that pass."
    model = build(family, variant)
    ids = torch.randint(3, 97, (2, 9))
    state, calls = record_calls(model, ids)
    for b, call in zip(anatomy(model), calls): state = through(model.get_submodule(b.name), state, call)
    wanted = model(ids, use_cache=False).logits
    assert torch.equal(logits_after(model, ids, state), wanted)
    source = OnDisk(saved(model, tmp_path/'dense'))
    before = dict(source.model.named_parameters())
    with source.ends(): assert torch.equal(logits_after(source.model, ids, state), wanted)
    after = dict(source.model.named_parameters())
    assert before.keys() == after.keys() and all(after[n] is p for n, p in before.items())


def test_probes_leave_the_model_as_it_was():
    model = tiny_model('qwen2')
    before, tensors = model_fingerprint(model), list(model.parameters())
    Recipe(units=('kv_group', 'mlp_channel'))._probes(context(model, random_tokens(model, n=9, seqlen=16), Recipe(units=('kv_group', 'mlp_channel'))))
    assert model_fingerprint(model) == before and all(p is q for p, q in zip(model.parameters(), tensors, strict=True))


@pytest.mark.parametrize('units', [('kv_group', 'mlp_channel'), ('value_channel', 'mlp_channel'), ('query_head',)])
def test_trials_empty_what_leaves(units):
    model = tiny_model('qwen2')
    method = Recipe(units=units, turn=False, restore=False)
    for v in context(model, random_tokens(model, n=4, seqlen=16), method).look():
        for k, W in method._trials(v):
            gone = (W == 0).all(0).nonzero().flatten().tolist()
            units_gone = [u for u in range(v.coupling.n_units) if v.coupling.second[1][u].tolist()[0] in gone]
            assert len(units_gone) == k*v.coupling.groups and len(gone) == len(units_gone)*v.coupling.second[1].shape[1]
            stay = [i for i in range(W.shape[1]) if i not in gone]
            assert W[:, stay].equal(v.weight[:, stay])


@given(st.integers(0, 10**6), st.sampled_from([1, 2]))
def test_removal_costs(seed, width):
    "The sum over groups is the second-order rise after the best update of what stays."
    g = torch.Generator().manual_seed(seed)
    X, W, Y = [torch.randn(*s, generator=g, dtype=torch.float64) for s in ((60, 8), (3, 8), (20, 3))]
    A, G, gone = X.T @ X/60, Y.T @ Y/20, torch.randperm(8, generator=g)[:2*width]
    costs = _removal_costs(W, A, G, gone.view(2, width), NONE)
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
    assert _greedy_order(W, C, table, NONE, chunk=1).argsort().tolist() == order


def by_hand(points, k):
    "A curve at k: the power law that lies nearest on logarithmic axes."
    if not k: return 0.
    if len(points) == 1: return points[0][1]*(k/points[0][0])**2
    return math.exp(np.polyval(np.polyfit(*np.log(points).T, 1), math.log(k)))


@given(st.lists(st.tuples(st.floats(.01, 10), st.floats(1.1, 2), st.floats(2, 3.5)), min_size=3, max_size=3), st.integers(1, 40), st.sampled_from([0, .5, 1]))
def test_shares_are_the_best(laws, units, interaction):
    model = tiny_model('llama')
    table, total = couplings(model, 'mlp_channel'), n_parameters(decoder_linears(model).values())
    n = table[0].n_units
    probed = [[(n//4, a), (n//2, a*2**q), (n - 2, a*2**q*((n - 2)/(n//2))**r)] for a, q, r in laws]
    steps = global_steps(table, {c.name: _marginal_costs(c, points, 1, interaction) for c, points in zip(table, probed)}, (units - .5)*table[0].cost/total, total)
    cost = lambda split: sum(by_hand(points, k)*(k/n)**interaction for points, k in zip(probed, split) if k)
    taken = list(steps.values())
    assert sum(taken) == units
    best = min(cost((i, j, units - i - j)) for i, j in itertools.product(range(units + 1), repeat=2) if i + j <= units and max(i, j, units - i - j) < n)
    assert cost(taken) <= best*(1 + 1e-9)


@pytest.mark.parametrize('points', ([(3, .2)], [(3, .2), (7, .9)], [(2, .1), (5, .4), (9, 2.)]))
def test_curve_is_the_nearest_power_law(points):
    curve = _cost_curve(12, points)
    assert curve.tolist() == pytest.approx([by_hand(points, k) for k in range(13)])
    if len(points) < 3: assert all(curve[k].item() == pytest.approx(d) for k, d in points)
    if len(points) > 1: assert _cost_curve(12, [(k, .3*k**1.7) for k, _ in points])[5].item() == pytest.approx(.3*5**1.7)


def test_a_curve_never_falls():
    "Noise can make a probe lower than the one before it."
    for points in ([(2, .3), (5, .2), (9, 1.)], [(2, .3), (5, .2), (9, .1)], [(2, .3), (5, 0.), (9, -1e-6)]):
        curve = _cost_curve(12, points)
        assert curve.isfinite().all() and (curve.diff() > 0).all() and curve.diff().diff().min() > -1e-12


def test_most_is_the_last_resort():
    model = tiny_model('llama')
    table, total = couplings(model, 'mlp_channel'), n_parameters(decoder_linears(model).values())
    n, cost = table[0].n_units, table[0].cost
    costs = {c.name: _marginal_costs(c, [(4, a), (8, 8*a)], most=.5) for c, a in zip(table, (1e-6, 1., 1.))}
    assert global_steps(table, costs, 29.5*cost/total, total)['0.mlp_channel'] == n//2
    beyond = global_steps(table, costs, (3*(n//2) + 9.5)*cost/total, total)
    assert sum(beyond.values()) == 3*(n//2) + 10 and beyond['0.mlp_channel'] > beyond['1.mlp_channel']


@pytest.mark.parametrize('family', FAMILIES)
@pytest.mark.parametrize('settings', [dict(), dict(units=('kv_group', 'mlp_channel')), dict(order='greedy', turn=False), dict(turn=False, trust=0), dict(allocation='curvature'), dict(units=('mlp_channel',), allocation='curvature', order='magnitude', restore=False)])
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
    a, plan = prune(model, windows, Recipe(units=('mlp_channel',), allocation='uniform', trust=0), .2)
    b, other = prune(model, windows, FASP(ridge='mean'), .2)
    assert plan.kept == other.kept
    assert all(p.equal(q) for p, q in zip(a.parameters(), b.parameters()))


def test_a_block_that_matters_loses_less():
    "A block whose MLP writes ten times as much keeps more of it than before."
    def kept(factor):
        model = tiny_model('llama')
        weight_of(model.get_submodule(couplings(model, 'mlp_channel')[2].second[0])).data.mul_(factor)
        return [len(k) for k in prune(model, random_tokens(model, n=4, seqlen=24), Recipe(units=('mlp_channel',)), .2)[1].kept.values()]
    assert kept(10)[2] > kept(1)[2] and kept(10)[0] < kept(1)[0]


def test_log(tmp_path, monkeypatch):
    model = tiny_model('llama')
    windows, log = random_tokens(model, n=4, seqlen=24), tmp_path/'probes.json'
    run = lambda windows=windows, sparsity=.2, **settings: prune(model, windows, Recipe(**settings), sparsity, run=Run(log=str(log)))[1]
    first = run()
    monkeypatch.setattr(Recipe, '_probes', lambda *a: pytest.fail('probed again'))
    whole = json.loads(log.read_text())
    assert run().kept == first.kept
    run(trust=0, sparsity=.3)
    assert streamed(model, windows, Recipe(), .2, tmp_path, log=str(log))[1].kept == first.kept
    with pytest.raises(ValueError, match='calibration differ'): run(random_tokens(model, n=5, seqlen=24))
    with pytest.raises(ValueError, match='shares differ'): run(shares=(.5,))
    with pytest.raises(ValueError, match='model differ'): prune(tiny_model('llama', 1), windows, Recipe(), .2, run=Run(log=str(log)))
    log.write_text('{"key"')
    with pytest.raises(ValueError, match='not a file of probes'): run()
    for wrong in ('[]', '{"key": 5}', '{"key": {}, "probes": 3}', '{"key": {}, "probes": {"0.mlp_channel": [5]}}', '{"key": {}, "probes": {"0.mlp_channel": [[1, NaN]]}}', '['*99999):
        log.write_text(wrong)
        with pytest.raises(ValueError, match='not a file of probes'): run()
    log.write_text('{"key": {}, "probes": {}}')
    with pytest.raises(ValueError, match='belongs to another run'): run()
    for wrong in ({}, {'0.mlp_channel': [[1]]}):             # probes of other couplings
        log.write_text(json.dumps({**whole, 'probes': {**(whole['probes'] if wrong else {}), **wrong}}))
        with pytest.raises(ValueError, match='has no probes of 0'): run()


@pytest.mark.parametrize('settings, words', [(dict(allocation='fair'), "allocation is 'fair'"), (dict(order='best'), "order is 'best'"), (dict(measure_windows=0), 'measure_windows is 0'),
                                             (dict(measure_seqlen=1), 'measure_seqlen is 1'), (dict(shares=(0, .5)), 'shares is'), (dict(shares=(.5, .2)), 'shares is'), (dict(shares=()), 'shares is'), (dict(shares=(.5, 1)), 'shares is'), (dict(shares=.5), 'shares is 0.5'), (dict(shares=('half',)), 'shares is'), (dict(damp=-1), 'damp is -1'), (dict(interaction=-1), 'interaction is -1'), (dict(interaction='much'), 'interaction is')])
def test_refused(settings, words):
    model = tiny_model('llama')
    with pytest.raises(ValueError, match=words): Recipe(**settings)
    method = Recipe()
    for n, v in settings.items(): setattr(method, n, v)    # changed after it was made
    with pytest.raises(ValueError, match=words): prune(model, random_tokens(model, n=2, seqlen=8), method, .2)


def test_one_window_is_enough():
    model = tiny_model('llama')
    assert prune(model, random_tokens(model, n=1, seqlen=24), 'recipe', .2)[1].true_sparsity >= .2
    assert as_method('recipe').settings()['allocation'] == 'measured'


def test_the_default_of_prune():
    small, plan = prune(tiny_model('llama'), random_tokens(tiny_model('llama'), n=3, seqlen=16))
    assert (plan.method, plan.sparsity, plan.settings) == ('recipe', .2, Recipe(depth=False).settings())


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
    w, held_out = random_tokens(model, n=96, seqlen=32), random_tokens(model, n=8, seqlen=32, seed=5)
    far = lambda m: (m(held_out.ids).logits - model(held_out.ids).logits).pow(2).mean().item()
    options = dict(measure_seqlen=16)
    trusting, plan = prune(model, w, Recipe(trust=.5, **options), .2)
    monkeypatch.setattr('prunebook.stream.drifting', None)                                  # calling it would fail
    plain, other = prune(model, w, Recipe(trust=0, **options), .2)
    assert plan.true_sparsity == other.true_sparsity
    assert far(trusting) < far(plain)


@pytest.mark.parametrize('trust', (-.1, 1.5, 'all'))
def test_trust_outside_its_range_is_refused(trust):
    with pytest.raises(ValueError, match='trust is'): Recipe(trust=trust)


def test_trust_grows_with_the_text():
    shares = [_trust_for(n) for n in (0, 8192, 32768, 10**9)]
    assert shares == sorted(shares) and shares[0] == 0 and shares[1] == .2 and shares[2] == .5 and shares[3] < 1


@given(st.integers(0, 10**6), st.integers(1, 3), st.integers(1, 5))
def test_basis_is_the_truncated_decomposition(seed, kv_heads, value_dim):
    "Where every query head has values of its own, the first channels are the best there are."
    g = torch.Generator().manual_seed(seed)
    f = kv_heads*value_dim
    W, X = torch.randn(6, f, generator=g, dtype=torch.float64), torch.randn(50, f, generator=g, dtype=torch.float64)
    R, energy = _value_basis(W, X.T @ X, kv_heads, value_dim, floor=0.)
    V, Z = W @ torch.linalg.inv(column_basis(R, kv_heads)), X @ column_basis(R, kv_heads).T
    assert torch.allclose(V @ Z.T, W @ X.T)
    for k in range(kv_heads):
        s = slice(k*value_dim, (k + 1)*value_dim)
        best = torch.linalg.svdvals(X[:, s] @ W[:, s].T)[:value_dim].square()
        assert torch.allclose(energy[k, :len(best)], best)
        for n in range(value_dim + 1):
            kept = slice(s.start, s.start + n)
            assert (X[:, s] @ W[:, s].T - Z[:, kept] @ V[:, kept].T).square().sum().item() == pytest.approx(best[n:].sum().item(), abs=1e-8)


def test_energies_of_shared_values():
    "If the heads that share values see the same moments, an energy is what its channel adds."
    g = torch.Generator().manual_seed(0)
    W, A = torch.randn(5, 8, generator=g, dtype=torch.float64), torch.randn(4, 4, generator=g, dtype=torch.float64)
    C = torch.block_diag(A @ A.T, A @ A.T)                 # two heads, four channels, uncorrelated heads
    R, energy = _value_basis(W, C, 1, 4, floor=0.)
    B = column_basis(R, 2)
    V, D = W @ torch.linalg.inv(B), B @ C @ B.T
    assert torch.allclose(D, torch.eye(8, dtype=D.dtype), atol=1e-9)
    assert torch.allclose(V.square().sum(0).view(2, 4).sum(0), energy[0])
    assert (energy[0].diff() <= 1e-12).all()


def test_a_basis_for_values_that_are_never_read():
    R, energy = _value_basis(torch.zeros(3, 4), torch.zeros(4, 4), 1, 4)
    assert R.isfinite().all() and torch.linalg.inv(R).isfinite().all() and not energy.any()


@pytest.mark.parametrize('family, variant', PLAIN)
def test_turning_values_changes_nothing(family, variant):
    model = build(family, variant)
    ids = random_tokens(model, n=2, seqlen=12).ids
    twin, g = copy.deepcopy(model), torch.Generator().manual_seed(0)
    if not values_turn(model):
        assert family == 'olmo'                            # it clips them
        with pytest.raises(ValueError, match='clips its values'): turn_values(twin, anatomy(twin)[0], torch.eye(4)[None])
        return
    with torch.no_grad():
        for b in anatomy(twin):
            old = weight_of(twin.get_submodule(b.out))
            turn_values(twin, b, torch.randn(b.kv_heads, b.value_dim, b.value_dim, generator=g))
            assert not weight_of(twin.get_submodule(b.out)).allclose(old, atol=1e-3)
        assert torch.allclose(twin(ids).logits, model(ids).logits, atol=2e-4)


def test_values_are_turned_once_more_after_some_have_left():
    model = tiny_model('qwen2')
    slice_units(model, {'1.value_channel': [i for i in range(couplings(model, 'value_channel')[1].n_units) if i % 4]})
    ids, b = random_tokens(model, n=2, seqlen=12).ids, anatomy(model)[1]
    assert b.value_dim < b.head_dim
    with torch.no_grad():
        before = model(ids).logits
        turn_values(model, b, torch.randn(b.kv_heads, b.value_dim, b.value_dim, generator=torch.Generator().manual_seed(0)))
        assert torch.allclose(model(ids).logits, before, atol=1e-4)


@pytest.mark.parametrize('family', ('qwen2', 'gpt2'))
def test_probes_of_values_are_those_of_a_model_that_was_turned_and_cut(family):
    model = tiny_model(family)
    w, method = random_tokens(model, n=16, seqlen=16), Recipe(units=('value_channel',), measure_seqlen=12, shares=(.5,), damp=.01)
    found = method._probes(context(model, w, method))
    fit, ids, c = w.ids[:-2], w.ids[-2:, :12], couplings(model, 'value_channel')[1]
    stage = next(s for s in walk(model, Windows(fit, 'x')) if (s.layer, s.part) == (1, 'attention'))
    small, C, W = copy.deepcopy(model), stage.gram(), weight_of(model.get_submodule(c.second[0])).detach()
    R, energy = _value_basis(W, C, stage.block.kv_heads, stage.block.value_dim)
    turn_values(small, stage.block, R)
    B, n = column_basis(R, stage.block.heads), stage.block.value_dim
    kept = [k*n + i for k in range(stage.block.kv_heads) for i in range(n - n//2)]          # energies fall
    keep = c.second[1][kept].flatten().sort().values
    U = Ridge(.01).restore(weight_of(small.get_submodule(c.second[0])).detach(), B @ C.double() @ B.T, keep)
    slice_units(small, {c.name: kept})
    weight_of(small.get_submodule(c.second[0])).data.copy_(U)
    reference, p = [m(ids).logits.log_softmax(-1) for m in (model, small)]
    (k, d), = found[c.name]
    assert k == n//2 and d == pytest.approx((reference.exp()*(reference - p)).sum(-1).mean().item(), rel=1e-3, abs=1e-7)


def test_a_turned_model_is_saved_and_its_plan_needs_it(tmp_path):
    model = tiny_model('llama')
    small, plan = prune(model, random_tokens(model, n=4, seqlen=24), Recipe(units=('value_channel',)), .05)
    assert any(len(k) < plan.units[n] for n, k in plan.kept.items())
    save_pruned(small, plan, tmp_path/'small')
    ids = random_tokens(model, n=1, seqlen=9).ids
    assert load_pruned(tmp_path/'small')[0](ids).logits.equal(small(ids).logits)
    with pytest.raises(ValueError, match='give these windows'): plan.apply(tiny_model('llama'))


STREAMED = [dict(), dict(allocation='uniform'), dict(turn=False, trust=0), dict(restore=False, units=('kv_group', 'mlp_channel')), dict(order='greedy', spare=(1, 0)),
            dict(units=('mlp_channel',), trust=1., towards='zero')]


@pytest.mark.parametrize('family', FAMILIES)
@pytest.mark.parametrize('settings', STREAMED)
def test_from_disk_as_in_memory_and_again_from_the_plan(family, settings, tmp_path):
    model, method = tiny_model(family), Recipe(measure_seqlen=12, **settings)
    w = random_tokens(model, n=9, seqlen=16)
    small, plan = prune(model, w, method, .2)
    other, told = streamed(model, w, method, .2, tmp_path)
    assert told == plan and equal(other, small)
    assert equal(plan.apply(tiny_model(family), w), small)


@pytest.mark.parametrize('family', ('qwen2', 'gpt2', 'phi'))
def test_probes_from_disk_are_those_in_memory(family, tmp_path):
    model, method = tiny_model(family), Recipe(measure_seqlen=12)
    w = random_tokens(model, n=17, seqlen=16)
    source = OnDisk(saved(model, tmp_path/'dense'))
    opened = []
    whole, source.__class__ = OnDisk.open, type('Counted', (OnDisk,), dict(open=lambda self, b: opened.append(b.layer) or whole(self, b)))
    found = method._probes(context(source.model, w, method, source))
    assert found == method._probes(context(model, w, method))
    assert opened == list(range(len(anatomy(model))))       # each block once, in order
    assert all(p.is_meta for b in anatomy(source.model) for p in source.model.get_submodule(b.name).parameters())


@pytest.mark.parametrize('settings', [dict(), dict(allocation='uniform')])
@pytest.mark.parametrize('block', (0, 1, 2))
def test_killed_at_a_block_and_resumed(settings, block, tmp_path, monkeypatch):
    model, method = tiny_model('qwen2', num_hidden_layers=3), Recipe(measure_seqlen=12, **settings)
    w, closed = random_tokens(model, n=9, seqlen=16), []
    small, plan = prune(model, w, method, .2)
    close = OnDisk.close
    def killed(self, b, finished=True):
        if self.out is not None and b.layer == block: raise KeyboardInterrupt
        if self.out is not None: closed.append(b.layer)
        return close(self, b, finished)
    monkeypatch.setattr(OnDisk, 'close', killed)
    with pytest.raises(KeyboardInterrupt): streamed(model, w, method, .2, tmp_path)
    assert closed == list(range(block)) and not (tmp_path/'small').exists()
    closed.clear()
    monkeypatch.setattr(OnDisk, 'close', lambda self, b, finished=True: (closed.append(b.layer) if self.out is not None else None, close(self, b, finished)))
    other, told = streamed(model, w, method, .2, tmp_path, resume=True)
    assert closed == list(range(block, 3)) and told == plan and equal(other, small)


def test_curvature_needs_the_whole_model(tmp_path):
    model = tiny_model('llama')
    with pytest.raises(ValueError, match='recipe takes gradients through the whole model'): streamed(model, random_tokens(model, n=4, seqlen=16), Recipe(allocation='curvature'), .2, tmp_path)


def test_sparsity_zero_is_a_copy(tmp_path):
    "Modules that lose nothing are re-fitted only where others lose something."
    model = tiny_model('llama')
    w = random_tokens(model, n=9, seqlen=16)
    small, plan = prune(model, w, Recipe(measure_seqlen=12), 0)
    assert equal(small, model) and equal(plan.apply(tiny_model('llama')), model) and equal(plan.apply(tiny_model('llama'), w), model)
    assert equal(streamed(model, w, Recipe(measure_seqlen=12), 0, tmp_path)[0], model)


def test_a_divergence_that_is_not_finite_is_named(monkeypatch):
    model = tiny_model('llama')
    monkeypatch.setattr(recipe, '_divergence', lambda *a: math.nan)
    with pytest.raises(ValueError, match='divergence without . units of 0.value_channel'): prune(model, random_tokens(model, n=4, seqlen=16), Recipe(measure_seqlen=12), .2)


def test_modules_that_stay_whole_steer_only_with_trust():
    whole = tiny_model('qwen2')
    w = random_tokens(whole, n=4, seqlen=16)
    changed = lambda m: [not weight_of(m.get_submodule(b.mlp_second)).equal(weight_of(whole.get_submodule(b.mlp_second))) for b in anatomy(whole)[1:]]
    options = dict(spare=(0, len(anatomy(whole)) - 1), measure_seqlen=8)
    assert all(changed(prune(whole, w, Recipe(trust=.5, **options), .05)[0]))
    assert not any(changed(prune(whole, w, Recipe(trust=0, **options), .05)[0]))


def test_values_that_lose_nothing_keep_their_basis():
    whole, method = tiny_model('llama'), Recipe(measure_seqlen=8)
    small, plan = prune(whole, random_tokens(whole, n=9, seqlen=16), method, .01)
    stay = [c for c in couplings(whole, 'value_channel') if len(plan.kept[c.name]) == c.n_units]
    value, out = [lambda m, c, n=n: weight_of(m.get_submodule(n(c))) for n in (lambda c: c.firsts[0][0], lambda c: c.second[0])]
    assert stay and all(value(small, c).equal(value(whole, c)) for c in stay)
    assert not all(out(small, c).equal(out(whole, c)) for c in stay)                         # they steer all the same


# ---- text that the model writes, and the temperature -----------------------------------------------------------------

SURE = dict(own=.5, temper=True, measure_seqlen=12)


def seen_windows(monkeypatch):
    "Windows that the streams of a run read."
    seen, stream = [], recipe.Method.run
    monkeypatch.setattr(recipe.Method, 'run', lambda self, ctx: (seen.append(ctx.windows), stream(self, ctx))[1])
    return seen


def test_own_text_is_read_beside_the_other(monkeypatch):
    model = tiny_model('llama')
    w, seen = random_tokens(model, n=8, seqlen=16), seen_windows(monkeypatch)
    _, plan = prune(model, w, Recipe(own=.5, measure_seqlen=12), .2)
    rows = [tuple(r) for r in seen[0].ids.tolist()]
    given = [tuple(r) for r in w.ids.tolist()]
    assert len(rows) == 12 and [r for r in rows if r in given] == given
    assert any(r not in given for r in rows[-4:]) and any(r in given for r in rows[-4:])     # the probes see both
    assert w.fingerprint in plan.calibration                # the text that a plan asks for again is the caller's


def test_without_own_text_nothing_changes(monkeypatch):
    model = tiny_model('llama')
    w, seen = random_tokens(model, n=8, seqlen=16), seen_windows(monkeypatch)
    monkeypatch.setattr(recipe, 'self_generated', lambda *a, **k: pytest.fail('the model wrote'))
    prune(model, w, Recipe(measure_seqlen=12), .2)
    assert seen[0].ids.equal(w.ids)


def test_temper_scales_the_last_norm_alone():
    model = tiny_model('gemma')
    w = random_tokens(model, n=8, seqlen=16)
    plain, _ = prune(model, w, Recipe(measure_seqlen=12), .4)
    sure, _ = prune(model, w, Recipe(measure_seqlen=12, temper=True), .4)
    differ = [n for (n, p), q in zip(plain.named_parameters(), sure.parameters()) if not p.equal(q)]
    assert differ == ['model.norm.weight']
    ids = random_tokens(model, n=2, seqlen=16, seed=5).ids
    a, b = (m(ids).logits.double() for m in (plain, sure))
    t = (a*b).sum()/(a*a).sum()
    assert not torch.allclose(t, torch.ones_like(t), atol=1e-3)
    torch.testing.assert_close(b, t*a, atol=1e-4*a.abs().max().item(), rtol=0)


@pytest.mark.parametrize('surer', [1/.8, .9])
def test_temper_finds_a_factor_that_is_known(surer):
    "Logits that are too large by a factor, where the head is linear and no norm hides it."
    model = tiny_model('llama')
    ids = random_tokens(model, n=2, seqlen=8).ids
    state = torch.randn(2, 8, model.config.hidden_size, generator=torch.Generator().manual_seed(0))
    norm, before = model.model.norm, model.model.norm.weight.detach().clone()
    norm.forward = lambda x: x*norm.weight                 # not a norm: twice the state gives twice the logits
    assert recipe._temper(model, ids, state, surer*state) == pytest.approx(1/surer, abs=.02)
    torch.testing.assert_close(norm.weight.detach()/before, torch.full_like(before, 1/surer), atol=.02, rtol=0)


def test_a_model_without_a_last_norm_is_refused_before_any_work(monkeypatch):
    model = tiny_model('llama')
    model.model.norm = torch.nn.Identity()
    for place, name in ((recipe.Method, 'run'), (recipe, 'self_generated')): monkeypatch.setattr(place, name, lambda *a, **k: pytest.fail('it began'))
    with pytest.raises(ValueError, match='no norm with weights in front of the head; leave out temper'):
        prune(model, random_tokens(model, n=8, seqlen=16), Recipe(**SURE), .2)


@pytest.mark.parametrize('family', ['llama', 'gemma', 'opt', 'gpt2'])
def test_a_plan_gives_the_tempered_model_again(family, tmp_path):
    w = random_tokens(tiny_model(family), n=8, seqlen=16)
    small, plan = prune(tiny_model(family), w, Recipe(**SURE), .2)
    assert equal(plan.apply(tiny_model(family), w), small)
    save_pruned(small, plan, tmp_path/'small')
    assert equal(load_pruned(tmp_path/'small')[0], small)


# ---- errors measured by the loss -------------------------------------------------------------------------------------

LOSS = dict(metric='loss', order='greedy', measure_seqlen=12)


def quadratic_rise(model, w, name, E):
    "Rise of the summed loss by the gradients of every token, when the output of a linear changes by `E` at every token."
    linear, found = model.get_submodule(name), []
    handle = linear.register_forward_hook(lambda m, a, y: found.append(y.requires_grad_() if not y.requires_grad else y) or found[-1].retain_grad())
    with torch.enable_grad():
        logits = model(w.ids[:, :-1]).logits
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), w.ids[:, 1:].flatten(), reduction='sum').backward()
    handle.remove()
    grads = found[0].grad.flatten(0, -2).double()
    return (grads @ E).square().sum().item()/2


@pytest.mark.parametrize('family', ('llama', 'opt', 'gpt2', 'phi'))
def test_the_metric_is_that_of_the_gradients(family):
    model = tiny_model(family)
    w = random_tokens(model, n=5, seqlen=12)
    name = couplings(model, 'mlp_channel')[0].second[0]
    G = recipe._gradient_moments(model, w, [name], batch_size=2)[name]
    E = torch.randn(len(G), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = quadratic_rise(model, w, name, E)
    assert .5*E @ G.double() @ E == pytest.approx(expected, rel=1e-4)
    root = recipe._metric_root(G).double()
    assert .5*(root @ E).square().sum() == pytest.approx(expected + .5*1e-3*G.diag().mean().item()*E.square().sum().item(), rel=1e-3)


def test_gradients_are_those_of_the_dense_model_on_few_windows(monkeypatch):
    model, seen = tiny_model('llama'), []
    w = random_tokens(model, n=40, seqlen=300)
    few = recipe._few(w)
    assert few.ids.shape == (16, 256) and few.ids[0].equal(w.ids[0, :256]) and few.ids[-1].equal(w.ids[-1, :256])
    take = recipe._gradient_moments
    monkeypatch.setattr(recipe, '_gradient_moments', lambda m, *a: (seen.append([p.shape for p in m.parameters()]), take(m, *a))[1])
    prune(model, random_tokens(model, n=8, seqlen=16), Recipe(**LOSS), .2)
    assert seen == [[p.shape for p in model.parameters()]]


@pytest.mark.parametrize('order', ('fasp', 'greedy', 'magnitude'))
def test_the_metric_decides_which_channels_leave(order, monkeypatch):
    "With a metric that is the identity nothing changes."
    model = tiny_model('llama')
    w, settings = random_tokens(model, n=8, seqlen=16), dict(order=order, units=('mlp_channel',), allocation='uniform')
    kept = lambda **more: prune(model, w, Recipe(**settings, **more), .05)[1].kept
    plain, weighed = kept(), kept(metric='loss')
    assert plain != weighed
    monkeypatch.setattr(recipe, '_metric_root', lambda G: torch.eye(len(G)))
    assert kept(metric='loss') == plain


def test_the_metric_decides_the_basis_of_the_values(monkeypatch):
    "The channels that stay keep most of what the metric sees: an output without a gradient is worth nothing."
    model, rank = tiny_model('llama'), 5
    w, lost = random_tokens(model, n=8, seqlen=16), {}
    monkeypatch.setattr(recipe, '_metric_root', lambda G: torch.diag((torch.arange(len(G)) < rank).float()))
    run = lambda metric: prune(model, w, Recipe(units=('value_channel',), allocation='uniform', restore=False, metric=metric), .08)[0]
    for metric in ('output', 'loss'):
        small, found = run(metric), []
        for m in (model, small):
            handle = m.model.layers[0].self_attn.o_proj.register_forward_hook(lambda m, a, y: found.append(y[..., :rank].double()))
            m(w.ids)
            handle.remove()
        lost[metric] = (found[0] - found[1]).square().sum()
    assert lost['loss'] < .8*lost['output']


def test_blocks_that_are_recomputed_give_the_same_gradients():
    model = tiny_model('llama')
    w, names = random_tokens(model, n=3, seqlen=12), [c.second[0] for c in couplings(model, 'mlp_channel')]
    a, b = (recipe._gradient_moments(model, w, names, checkpoint=c) for c in (False, True))
    assert all(torch.allclose(a[n], b[n], rtol=1e-5, atol=1e-7*a[n].abs().max().item()) for n in names)


def test_no_gradient_at_all_is_the_output_itself():
    root = recipe._metric_root(torch.zeros(5, 5))
    assert torch.allclose(root/root[0, 0], torch.eye(5)) and root[0, 0] > 0


@pytest.mark.parametrize('family', ('llama', 'gemma', 'opt', 'gpt2'))
@pytest.mark.parametrize('more', (dict(), dict(depth=True), dict(own=.5, temper=True), dict(allocation='curvature')))
def test_a_plan_gives_the_model_of_the_metric_again(family, more):
    w = random_tokens(tiny_model(family), n=8, seqlen=16)
    small, plan = prune(tiny_model(family), w, Recipe(**LOSS, **more), .3)
    assert equal(plan.apply(tiny_model(family), w), small)


def test_gradients_that_are_not_finite_are_named(monkeypatch):
    model = tiny_model('llama')
    monkeypatch.setattr(recipe, '_gradient_moments', lambda m, w, names, *a: {n: torch.full((64, 64), math.nan) for n in names})
    with pytest.raises(ValueError, match='gradients at the outputs of'): prune(model, random_tokens(model, n=8, seqlen=16), Recipe(**LOSS), .2)


def test_gradients_are_not_taken_from_disk(tmp_path):
    model = tiny_model('llama')
    with pytest.raises(ValueError, match='takes gradients through the whole model'):
        streamed(model, random_tokens(model, n=8, seqlen=16), Recipe(**LOSS), .2, tmp_path)


def test_the_greedy_order_is_that_of_whole_inverses():
    "Against the same removal in which what has left stays in the matrices as zeros."
    g = torch.Generator().manual_seed(0)
    W, X = (torch.randn(*s, generator=g, dtype=torch.float64) for s in ((5, 12), (60, 12)))
    for width in (1, 2, 3):
        table, ridge = torch.randperm(12, generator=g).view(-1, width), Ridge(.05)
        P, V, left, expected = ridge.inverse(X.T @ X), W.T.clone(), list(range(len(table))), []
        while left:
            cost = lambda u: (V[table[u]].T @ torch.linalg.inv(P[table[u]][:, table[u]]) @ V[table[u]]).trace().item()
            first = min(left, key=cost)
            j = table[first]
            B = torch.linalg.inv(P[j][:, j])
            V, P = V - P[:, j] @ B @ V[j], P - P[:, j] @ B @ P[j]
            left.remove(first)
            expected.append(first)
        assert _greedy_order(W, X.T @ X, table, ridge, chunk=1).argsort().tolist() == expected


def test_text_is_not_written_from_disk(tmp_path):
    model = tiny_model('llama')
    with pytest.raises(ValueError, match='writes text with the whole model'): streamed(model, random_tokens(model, n=8, seqlen=16), Recipe(own=.5), .2, tmp_path)


def test_files_of_probes_from_before_still_serve(tmp_path):
    model = tiny_model('llama')
    w = random_tokens(model, n=8, seqlen=16)
    file = tmp_path/'probes.json'
    prune(model, w, Recipe(measure_seqlen=12), .2, run=Run(log=str(file)))
    assert not {'own', 'temper'} & json.loads(file.read_text())['key'].keys()
    prune(model, w, Recipe(measure_seqlen=12, temper=True), .2, run=Run(log=str(file)))
    with pytest.raises(ValueError, match='belongs to another run'): prune(model, w, Recipe(measure_seqlen=12, own=.5), .2, run=Run(log=str(file)))

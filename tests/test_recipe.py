"""The recipe: divergences against whole forward passes, orders and costs against brute force, shares against every way to take units."""
import copy
import itertools
import json

import pytest
import torch
from helpers import tiny_model
from hypothesis import given, strategies as st

from prunebook.couplings import couplings, masked, slice_units, weight_of
from prunebook.fasp import FASP
from prunebook.methods import as_method, prune
from prunebook.models import decoder_linears, n_parameters
from prunebook.plan import global_steps, model_fingerprint
from prunebook.recipe import Recipe, block_states, divergence, greedy_order, marginal_costs, probe, removal_costs
from prunebook.text import random_tokens

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


@given(st.lists(st.floats(.01, 10), min_size=3, max_size=3), st.sampled_from([1.5, 2., 3.]), st.integers(1, 40))
def test_shares_are_the_best(factors, q, units):
    model = tiny_model('llama')
    table, total = couplings(model, 'mlp_channel'), n_parameters(decoder_linears(model).values())
    n = table[0].n_units
    steps = global_steps(table, {c.name: marginal_costs(c, a, q, most=1) for c, a in zip(table, factors)}, (units - .5)*table[0].cost/total, total)
    cost = lambda k: sum(a*(i/n)**q for i, a in zip(k, factors))
    taken = list(steps.values())
    assert sum(taken) == units
    best = min(cost((i, j, units - i - j)) for i, j in itertools.product(range(units + 1), repeat=2) if i + j <= units and max(i, j, units - i - j) < n)
    assert cost(taken) <= best*(1 + 1e-9)


def test_most_is_the_last_resort():
    model = tiny_model('llama')
    table, total = couplings(model, 'mlp_channel'), n_parameters(decoder_linears(model).values())
    n, cost = table[0].n_units, table[0].cost
    costs = {c.name: marginal_costs(c, a, most=.5) for c, a in zip(table, (1e-6, 1., 1.))}
    assert global_steps(table, costs, 29.5*cost/total, total)['0.mlp_channel'] == n//2
    assert sum(global_steps(table, costs, (3*(n//2) + 9.5)*cost/total, total).values()) == 3*(n//2) + 10


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
    a, plan = prune(model, windows, Recipe(allocation='uniform'), .2)
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
    prune(model, windows, Recipe(log=str(log), most=.5), .3)
    with pytest.raises(ValueError, match='calibration differ'): prune(model, random_tokens(model, n=5, seqlen=24), Recipe(log=str(log)), .2)
    with pytest.raises(ValueError, match='power differ'): prune(model, windows, Recipe(log=str(log), power=2.), .2)
    log.write_text('{"key"')
    with pytest.raises(ValueError, match='not a file of probes'): prune(model, windows, Recipe(log=str(log)), .2)
    log.write_text('[]')
    with pytest.raises(ValueError, match='belongs to another run'): prune(model, windows, Recipe(log=str(log)), .2)


@pytest.mark.parametrize('settings, words', [(dict(allocation='fair'), "allocation is 'fair'"), (dict(score='best'), "score is 'best'"), (dict(measure_windows=0), 'measure_windows is 0'),
                                             (dict(measure_seqlen=1), 'measure_seqlen is 1'), (dict(share=0), 'share is 0'), (dict(most=2), 'most is 2'), (dict(power=.5), 'power is 0.5'), (dict(damp=-1), 'damp is -1')])
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

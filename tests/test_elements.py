"""Single weights: costs, joint updates and the search against dense oracles; exact counts and refusals on every family."""
import copy
import itertools
import math
import warnings

import pytest
import torch
from helpers import tiny_model as shared_model
from hypothesis import given, strategies as st
from prunebook.couplings import slice_units, weight_of
from prunebook.curvature import curvature, optimal_removal
from prunebook.elements import (_element_products, _one_threshold, _remove_in_chunks, _remove_together,
                                _ridged, _same_share, _split_weights, element_costs, elements_work,
                                keep_strongest, prune_elements, refit_kept, sparsify_elements, sparsify_shots)
from prunebook.methods import Run
from prunebook.models import TINY, decoder_linears
from prunebook.scores import sparsify, wanda_mask, with_bias, zeros_among
from prunebook.text import Windows
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

pytestmark = pytest.mark.usefixtures('one_thread')
PATTERNS = [dict(sparsity=.3), dict(sparsity=.5), dict(n=2, m=4), dict(n=1, m=4), dict(n=4, m=8)]
WIDTH = dict(opt='ffn_dim', gpt2='n_inner')


def tiny_model(family): return shared_model(family, **{WIDTH.get(family, 'intermediate_size'): 40})
def windows(n=6, seqlen=16): return Windows(torch.randint(3, 97, (n, seqlen), generator=torch.Generator().manual_seed(0)), 'random')
def snapshot(m): return {n: t.clone() for n, t in m.state_dict().items()}
def same(m, state): return all(torch.equal(t, state[n]) for n, t in m.state_dict().items())
def weights(m): return sum(weight_of(l).numel() for l in decoder_linears(m).values())
def rise(V, W, A, G): return .5*((G @ (V - W) @ A)*(V - W)).sum().item()


@torch.no_grad()
def logits(m, w=windows()): return m(w.ids).logits


def problem(rows, columns, seed=0):
    "Weights and two factors, float64, all entries correlated."
    draw = torch.Generator().manual_seed(seed)
    random = lambda *s: torch.randn(*s, generator=draw, dtype=torch.float64)
    factor = lambda n: (lambda X: X.T @ X/len(X))(random(3*n, n) @ random(n, n))
    return random(rows, columns), factor(columns), factor(rows)


# ---- one weight -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('damp,damp_g', [(0, 0), (.1, .3)])
def test_costs_are_the_minimum_over_all_other_weights(damp, damp_g):
    W, A, G = problem(3, 5)
    F = torch.kron(_ridged(G, damp_g), _ridged(A, damp))
    expected = torch.stack([optimal_removal(F, W.flatten(), torch.tensor([i]))[1] for i in range(15)]).view(3, 5)
    assert torch.allclose(element_costs(W, A, G, damp, damp_g), expected, rtol=1e-6)


def test_costs_know_only_the_product_of_the_factors():
    W, A, G = problem(4, 6)
    for f in (1e-6, 1e5):
        assert torch.allclose(element_costs(W, f*A, G/f), element_costs(W, A, G))
        assert torch.allclose(prune_elements(W, f*A, G/f, .5), prune_elements(W, A, G, .5), atol=1e-8)


def test_scaling_an_input_changes_no_cost():
    W, A, G = problem(4, 6)
    d = torch.linspace(.1, 9, 6).double()
    assert torch.allclose(element_costs(W/d, d[:, None]*A*d, G, 0, 0), element_costs(W, A, G, 0, 0), rtol=1e-6)


@pytest.mark.parametrize('n,m', [(2, 4), (1, 2)])
def test_special_cases(n, m):
    W, A, _ = problem(5, 8)
    assert torch.allclose(element_costs(W, torch.eye(8), torch.eye(5), 0, 0), W**2/2)
    diagonal = element_costs(W, A.diag().diag(), damp=0)
    assert torch.equal(keep_strongest(diagonal, n=n, m=m), wanda_mask(W.float(), A.diag().sqrt(), n=n, m=m))
    assert torch.allclose(element_costs(W, A, damp=0), .5*W**2/torch.linalg.inv(A).diag(), rtol=1e-6)


# ---- patterns -------------------------------------------------------------------------------------------------------

@given(st.integers(1, 7), st.integers(1, 9), st.floats(0, .999), st.booleans())
def test_exactly_as_many_go_and_they_are_the_weakest(rows, columns, sparsity, ties):
    S = torch.rand(rows, columns, generator=torch.Generator().manual_seed(rows))
    if ties: S = (3*S).round()
    keep = keep_strongest(S, sparsity)
    gone = math.ceil(rows*columns*sparsity - 1e-6)
    assert (~keep).sum() == gone
    assert gone == 0 or not keep.any() or S[~keep].max() <= S[keep].min()


def test_groups_lose_their_weakest():
    S = torch.rand(5, 12, generator=torch.Generator().manual_seed(0))
    keep = keep_strongest(S, n=1, m=3).view(5, 4, 3)
    assert (keep.sum(-1) == 1).all() and torch.equal(keep.long().argmax(-1), S.view(5, 4, 3).argmax(-1))


@given(st.lists(st.integers(1, 10**7), min_size=1, max_size=9), st.floats(0, .99))
def test_same_share_is_exact_in_sum(sizes, sparsity):
    sizes = {str(i): s for i, s in enumerate(sizes)}
    counts = _same_share(sizes, sparsity)
    assert sum(counts.values()) == math.ceil(sparsity*sum(sizes.values()) - 1e-6)
    assert all(abs(counts[n] - sparsity*s) <= 1 + 1e-6 for n, s in sizes.items())


@given(st.lists(st.integers(1, 12), min_size=1, max_size=5), st.floats(0, 1), st.booleans())
def test_one_threshold_takes_the_cheapest_of_all(sizes, share, ties):
    draw = torch.Generator().manual_seed(len(sizes))
    costs = {str(i): torch.rand(s, generator=draw) for i, s in enumerate(sizes)}
    if ties: costs = {n: (2*c).round() for n, c in costs.items()}
    gone = int(share*sum(sizes))
    counts = _one_threshold(costs, gone)
    assert sum(counts.values()) == gone
    taken = torch.cat([c.sort().values[:counts[n]] for n, c in costs.items()])
    assert torch.equal(taken.sort().values, torch.cat(list(costs.values())).sort().values[:gone])


# ---- many weights ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('seed', range(4))
def test_joint_updates_are_the_dense_optimum(seed):
    W, A, G = problem(4, 6, seed)
    keep = keep_strongest(element_costs(W, A, G, 0, 0), .6)
    change, cost = optimal_removal(torch.kron(G, A), W.flatten(), (~keep).flatten().nonzero()[:, 0])
    expected = W + change.view(4, 6)
    exact = _remove_together(W, torch.linalg.inv(A), torch.linalg.inv(G), *(~keep).nonzero().T)
    assert torch.allclose(exact, expected, atol=1e-6) and torch.equal(exact != 0, keep)
    assert torch.allclose(_remove_in_chunks(W, A, G, keep, 99, 0, 0), expected, atol=1e-6)
    assert torch.allclose(refit_kept(W, W, keep, A, G, 60), expected, atol=1e-4)
    assert rise(expected, W, A, G) == pytest.approx(cost.item(), rel=1e-6)


def test_conjugate_gradients_never_go_up_and_forget_their_start():
    W, A, G = problem(6, 9)
    keep = torch.rand(6, 9, generator=torch.Generator().manual_seed(1)) < .5
    rises = [rise(refit_kept(W, W, keep, A, G, i), W, A, G) for i in range(60)]
    assert all(b <= a*(1 + 1e-9) for a, b in zip(rises, rises[1:]))
    assert rise(refit_kept(W, torch.randn_like(W), keep, A, G, 80), W, A, G) == pytest.approx(rises[-1], rel=1e-4)
    assert torch.equal(refit_kept(W, W, torch.zeros_like(keep), A, G), torch.zeros_like(W))
    assert torch.allclose(refit_kept(W, W, torch.ones_like(keep), A, G), W)


@pytest.mark.parametrize('dtype,limit', [(torch.float32, 1e-3), (torch.float64, 1e-7)])
@pytest.mark.parametrize('samples', [5, 10, 20])
def test_conjugate_gradients_end_before_they_diverge(samples, dtype, limit):
    "More steps than directions, no ridge: unguarded, the rise goes up without bound."
    few, W = (torch.randn(n, 200, generator=torch.Generator().manual_seed(i)).to(dtype) for i, n in ((0, samples), (1, 64)))
    A, keep = few.T @ few/samples, torch.rand(64, 200, generator=torch.Generator().manual_seed(2)) < .5
    start = rise(W*keep, *(x.double() for x in (W, A, torch.eye(64))))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        some, many = (refit_kept(W, W, keep, A, None, i) for i in (20, 1000))
    assert many.isfinite().all() and not many[~keep].any()
    rises = [abs(rise(*(x.double() for x in (V, W, A, torch.eye(64)))))/start for V in (some, many)]
    assert rises[1] <= rises[0] + limit and many.norm() < 100*W.norm()
    assert all('larger damp' in str(w.message) for w in caught)


def test_divergence_is_said():
    few, W = (torch.randn(10, 36, generator=torch.Generator().manual_seed(1)), torch.randn(24, 36, generator=torch.Generator().manual_seed(1)))
    keep = torch.rand(24, 36, generator=torch.Generator().manual_seed(2)) < .5
    with pytest.warns(UserWarning, match='larger damp'): refit_kept(W, W, keep, few.T @ few/10, None, 1000)


@pytest.mark.parametrize('iterations', [1, 10, 100])
def test_a_channel_without_input_and_without_ridge_keeps_its_weights(iterations):
    W, A, G = problem(6, 9)
    A[2] = A[:, 2] = 0
    keep = torch.rand(6, 9, generator=torch.Generator().manual_seed(1)) < .5
    V = refit_kept(W, W, keep, A, G, iterations)
    assert V.isfinite().all() and torch.equal(V[:, 2], W[:, 2]*keep[:, 2])


@pytest.mark.parametrize('which', ['A', 'G', 'W'])
def test_conjugate_gradients_refuse_what_is_not_finite(which):
    given = dict(zip('WAG', problem(6, 9)))
    given[which][1, 1] = float('nan')
    with pytest.raises(ValueError, match='larger damp'): refit_kept(given['W'], given['W'], torch.ones(6, 9, dtype=bool), given['A'], given['G'])


def test_without_gradients_rows_are_least_squares():
    W, A, _ = problem(5, 8)
    keep = keep_strongest(W.abs(), .5)
    V = refit_kept(W, W, keep, A, None, 60)
    for r in range(5):
        k = keep[r]
        assert torch.allclose(V[r, k], torch.linalg.solve(A[k][:, k], A[k] @ W[r]), atol=1e-5)


def test_smaller_chunks_are_not_better():
    W, A, G = problem(8, 12)
    keep = keep_strongest(element_costs(W, A, G, 0, 0), .5)
    rises = [rise(_remove_in_chunks(W, A, G, keep, s, 0, 0), W, A, G) for s in (1, 4, 48)]
    assert rises[2] < rises[1] and rises[2] < rises[0]


def every_mask(W, A, G):
    F, size = torch.kron(G, A), W.numel()
    return {gone: optimal_removal(F, W.flatten(), torch.tensor(gone))[1].item() for gone in itertools.combinations(range(size), size//2)}


def test_search_against_all_masks():
    "Near the best of all choices, far nearer than least cost alone; every mask's update is its optimum."
    found, alone = [], []
    for seed in range(25):
        W, A, G = problem(2, 4, seed)
        table = every_mask(W, A, G)
        for kept, out in ((prune_elements(W, A, G, .5, damp=0, damp_g=0, iterations=40), found), (prune_elements(W, A, G, .5, damp=0, damp_g=0, steps=0, iterations=40), alone)):
            gone = tuple((kept == 0).flatten().nonzero()[:, 0].tolist())
            assert rise(kept, W, A, G) == pytest.approx(table[gone], rel=1e-3)
            out.append(table[gone]/min(table.values()))
    assert sorted(found)[12] < 1.2 and sum(found) < .7*sum(alone)


@pytest.mark.parametrize('pattern', PATTERNS)
@pytest.mark.parametrize('gradients', [True, False])
def test_patterns_hold_and_the_search_pays(pattern, gradients):
    W, A, G = problem(12, 16)
    G = G if gradients else None
    V, plain = prune_elements(W, A, G, **pattern), prune_elements(W, A, G, **pattern, steps=0, iterations=0)
    metric = (_ridged(A, .01), torch.eye(12).double() if G is None else _ridged(G, .1))
    for M in (V, plain):
        if 'm' in pattern: assert ((M != 0).view(12, -1, pattern['m']).sum(-1) == pattern['n']).all()
        else: assert (M == 0).sum() == math.ceil(pattern['sparsity']*192 - 1e-6)
    assert rise(V, W, *metric) < .6*rise(plain, W, *metric)


def test_columns_that_are_never_read_go_first():
    W, A, G = problem(6, 8)
    A[2] = 0; A[:, 2] = 0
    V = prune_elements(W, A, G, sparsity=1/8, damp=1e-6)
    assert (V[:, 2] == 0).all() and (V != 0).sum() == 42
    assert rise(V, W, A, G) < 1e-4*rise(0*W, W, A, G)


def test_a_bias_stays_and_helps():
    W, A, G = problem(6, 9)
    V, fixed = (prune_elements(W, A, G, n=2, m=4, bias=True), prune_elements(W[:, :8], A[:8, :8], G, n=2, m=4))
    assert ((V[:, :8] == 0).sum(1) == 4).all() and (V[:, 8] != 0).all() and not torch.allclose(V[:, 8], W[:, 8])
    assert rise(V, W, A, G) < rise(torch.cat([fixed, W[:, 8:]], 1), W, A, G)


def test_dtype_and_nothing_to_do():
    W, A, G = problem(4, 8)
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        V = prune_elements(W.to(dtype), A.float(), G.float(), .5)
        assert V.dtype == dtype and (V == 0).sum() == 16
    assert prune_elements(W, A, G, 0.) is W and prune_elements(W, A, G, n=4, m=4) is W
    V, keep = _split_weights(W, A, G, lambda S: torch.ones_like(S, dtype=bool), 30)
    assert keep.all() and torch.allclose(V, W, atol=.1*W.abs().max())


def test_factors_that_say_nothing():
    with pytest.raises(ValueError, match='mean of the diagonal'): prune_elements(torch.ones(4, 8), torch.full((8, 8), math.nan), None, .5)
    W = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    V = prune_elements(W, torch.zeros(8, 8), None, .5)       # all inputs are zero: by magnitude, and nothing adapts
    assert (V == 0).sum() == 16 and torch.allclose(V[V != 0], W[V != 0]) and W[V != 0].abs().min() > W[V == 0].abs().max()
    assert not element_costs(W, torch.zeros(8, 8)).any()


# ---- whole models ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('family', TINY)
def test_sparsify_elements_on_every_family(family):
    m, w = tiny_model(family), windows()
    factors, total = curvature(m, w), weights(m)
    for pattern, options in ((dict(sparsity=.35), {}), (dict(n=2, m=4), {}), (dict(sparsity=.35), dict(factors=factors, allocation='global')), (dict(n=2, m=4), dict(factors=factors))):
        s = copy.deepcopy(m)
        zeros = sparsify_elements(s, w, **pattern, **options)
        asked = .5 if 'm' in pattern else .35
        assert round(zeros*total) == math.ceil(asked*total - 1e-6) and zeros == zeros_among(decoder_linears(s))
        other = copy.deepcopy(m)
        sparsify(other, w, **pattern)
        assert (logits(s) - logits(m)).norm() < (logits(other) - logits(m)).norm()          # better than Wanda
        if 'm' in pattern: assert all(((weight_of(l) != 0).reshape(-1, 4).sum(1) == 2).all() for l in decoder_linears(s).values())
        assert all(torch.equal(p, q) for (n, p), (_, q) in zip(m.named_parameters(), s.named_parameters()) if not any(n.startswith(k + '.') for k in decoder_linears(m)))


@pytest.mark.parametrize('family', ['llama', 'gpt2', 'phi'])
def test_every_matrix_is_pruned_on_the_inputs_it_will_see(family):
    "Re-pruning in place: the last linear's inputs in the sparse model give back its weights."
    m, w = tiny_model(family), windows(12)
    s = copy.deepcopy(m)
    sparsify_elements(s, w, n=2, m=4)
    name = list(decoder_linears(m))[-1]
    seen, l = [], s.get_submodule(name)
    handle = l.register_forward_pre_hook(lambda _, a: seen.append(a[0].flatten(0, -2)))
    logits(s, w)
    handle.remove()
    X = seen[0] if l.bias is None else torch.cat([seen[0], torch.ones(len(seen[0]), 1)], 1)
    expected = prune_elements(with_bias(m.get_submodule(name)), X.T @ X/len(X), n=2, m=4, bias=l.bias is not None)
    assert torch.allclose(with_bias(l), expected, atol=2e-2*expected.abs().max())


def test_batches_do_not_matter():
    m, w = tiny_model('qwen2'), windows()
    a, b = copy.deepcopy(m), copy.deepcopy(m)
    sparsify_elements(a, w, n=2, m=4)
    sparsify_elements(b, w, n=2, m=4, run=Run(batch_size=2))
    assert (logits(a) - logits(b)).norm() < .02*logits(m).norm()


def test_a_model_that_was_sliced_before():
    m, w = tiny_model('llama'), windows()
    slice_units(m, {'0.value_channel': [0, 1, 2, 3, 8, 9, 10, 11], '1.mlp_channel': list(range(20))})
    zeros = sparsify_elements(m, w, .5)
    assert round(zeros*weights(m)) == math.ceil(.5*weights(m)) and logits(m).isfinite().all()


@pytest.mark.parametrize('family', TINY)
@pytest.mark.parametrize('pattern', [dict(sparsity=.35), dict(n=2, m=4)])
def test_shots_on_every_family(family, pattern):
    m, w = tiny_model(family), windows()
    total, asked, seen = weights(m), .5 if 'm' in pattern else .35, []
    joint, none = copy.deepcopy(m), copy.deepcopy(m)
    zeros = sparsify_shots(joint, w, **pattern, shots=2, report=lambda i: seen.append((i, {n: weight_of(l) == 0 for n, l in decoder_linears(joint).items()})))
    sparsify_shots(none, w, **pattern, shots=2, restore=False)
    assert round(zeros*total) == math.ceil(asked*total - 1e-6)
    assert (logits(joint) - logits(m)).norm() < (logits(none) - logits(m)).norm()
    (_, first), (_, last) = seen
    assert sum(z.sum().item() for z in first.values()) == math.ceil(asked*total/2 - 1e-6)
    assert all((last[n] | ~first[n]).all() for n in first)                                   # zeros stay zero


def test_chunks_of_everything_are_the_joint_update():
    m, w = tiny_model('llama'), windows()
    a, b = copy.deepcopy(m), copy.deepcopy(m)
    sparsify_shots(a, w, .2, shots=1, iterations=300)
    sparsify_shots(b, w, .2, shots=1, restore='chunks', size=10**6)
    for n, l in decoder_linears(a).items():
        other = b.get_submodule(n)
        assert torch.equal(l.weight == 0, other.weight == 0) and torch.allclose(l.weight, other.weight, atol=.03*l.weight.abs().max().item())


@pytest.mark.parametrize('f', [sparsify_elements, sparsify_shots])
@pytest.mark.parametrize('bad,message', [({}, 'either sparsity'), (dict(sparsity=.5, n=2, m=4), 'either sparsity'), (dict(sparsity=1.), 'fraction in'), (dict(sparsity=-.1), 'fraction in'),
                                         (dict(n=5, m=4), 'n of m'), (dict(n=2, m=5), 'groups of 5')])
def test_refusals_before_any_work(f, bad, message):
    m = tiny_model('llama')
    state = snapshot(m)
    with pytest.raises(ValueError, match=message): f(m, windows(), **bad)
    assert same(m, state)


@pytest.mark.parametrize('f,bad,message', [(sparsify_elements, dict(allocation='global'), 'needs factors'), (sparsify_elements, dict(allocation='fair'), 'allocation is'),
                                           (sparsify_elements, dict(factors={}), 'nothing that fits'),
                                           (sparsify_shots, dict(shots=0), 'shots is'), (sparsify_shots, dict(restore='magic'), "restore is 'magic'")])
def test_other_refusals(f, bad, message):
    m = tiny_model('llama')
    state = snapshot(m)
    with pytest.raises(ValueError, match=message): f(m, windows(), .5, **bad)
    with pytest.raises(ValueError, match='training mode'): f(m.train(), windows(), .5)
    assert same(m, state)


# ---- estimates ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('shape,gradients', [((24, 60), False), ((60, 24), True)])
def test_products_of_one_matrix(shape, gradients):
    W, A, G = problem(*shape)
    with FlopCounterMode(display=False) as counter: prune_elements(W.float(), A.float(), G.float() if gradients else None, .5)
    assert .9 < _element_products(*shape, gradients)/counter.get_total_flops() < 1.1


@pytest.mark.parametrize('gradients', [0, 256])
def test_work_of_a_model(gradients):
    m = LlamaForCausalLM(LlamaConfig(vocab_size=97, hidden_size=64, intermediate_size=160, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16)).eval()
    w = Windows(windows(8, 32).ids.repeat(1, 2), 'random')
    with FlopCounterMode(display=False) as counter:
        factors = curvature(m, Windows(w.ids[:gradients//64], 'random')) if gradients else None
        sparsify_elements(m, w, .5, factors=factors)
    r = elements_work(m, w.ids.numel(), gradients)
    assert .6 < r['flops']/counter.get_total_flops() < 1.6 and r['bytes'] > 4*sum(p.numel() for p in m.parameters())
    with torch.device('meta'): meta = LlamaForCausalLM(m.config)
    assert elements_work(meta, w.ids.numel(), gradients) == r

"""Kronecker factors against gradients collected the long way, on every family, in one process and in two."""
import copy
import math

import pytest
import torch
from hypothesis import given, strategies as st
from together import needs_fork, together
from prunebook.couplings import slice_units, weight_of
from prunebook.curvature import Factors, _nearest_kronecker, curvature, curvature_bytes, input_leaders, optimal_removal
from prunebook.models import TINY, decoder_linears, tiny_model
from prunebook.repair import Ridge
from prunebook.text import Windows
from prunebook.walk import processes
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

pytestmark = pytest.mark.usefixtures('one_thread')


def windows(n=5, seqlen=12, seed=0): return Windows(torch.randint(3, 97, (n, seqlen), generator=torch.Generator().manual_seed(seed)), f'random {seed}')
def far(a, b): return ((a - b).norm()/b.norm().clamp(min=1e-12)).item()
def spd(n, seed=0): return (lambda x: x.T @ x/len(x))(torch.randn(3*n, n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)))


def long_way(model, w):
    "Factors from kept tensors, one window at a time, float64."
    linears, seen = decoder_linears(model), {}
    sums = {n: [0, 0] for n in linears}
    handles = [m.register_forward_hook(lambda mod, a, y, n=n: (y.retain_grad(), seen.__setitem__(n, (a[0], y)))[1]) for n, m in linears.items()]
    for row in w.ids:
        F.cross_entropy(model(row[None, :-1]).logits[0], row[1:], reduction='sum').backward()
        for n, (a, y) in seen.items():
            m, a, g = linears[n], a.detach().flatten(0, -2), y.grad.flatten(0, -2)
            if m.bias is not None: a = torch.cat([a, torch.ones(len(a), 1)], 1)
            a, g = a.double(), g.double()
            sums[n][0] = sums[n][0] + a.T @ a
            sums[n][1] = sums[n][1] + g.T @ g
    for h in handles: h.remove()
    tokens = w.ids[:, 1:].numel()
    return {n: Factors(A/tokens, G/tokens) for n, (A, G) in sums.items()}


def agree(found, expected, rel=1e-4):
    assert list(found) == list(expected)
    for n, f in found.items():
        assert f.A.shape == expected[n].A.shape and f.G.shape == expected[n].G.shape
        assert far(f.A.double(), expected[n].A.double()) < rel and far(f.G.double(), expected[n].G.double()) < rel, n


@pytest.mark.parametrize('family', TINY)
def test_the_long_way(family):
    m, w = tiny_model(family), windows()
    agree(curvature(m, w, batch_size=2), long_way(copy.deepcopy(m), w))


@pytest.mark.parametrize('family', TINY)
def test_one_prediction_is_exact(family):
    "With a single sample, G ⊗ A is the outer product of the weight's gradient with itself."
    m, w = tiny_model(family, seed=3), windows(1, 2)
    C = curvature(m, w)
    F.cross_entropy(m(w.ids[:, :1]).logits[0], w.ids[0, 1:]).backward()
    assert set(C) == set(decoder_linears(m))
    some = 0
    for n, layer in decoder_linears(m).items():
        g = layer.weight.grad.T if isinstance(layer, Conv1D) else layer.weight.grad
        if layer.bias is not None: g = torch.cat([g, layer.bias.grad[:, None]], 1)
        v = g.flatten()
        assert far(torch.kron(C[n].G, C[n].A), v[:, None]*v) < 1e-4 or v.norm() < 1e-4
        some += v.norm() > 1e-3
    assert some >= 4


@pytest.mark.parametrize('family', ['llama', 'gpt2', 'phi'])
def test_narrow_value_heads(family):
    m, w = tiny_model(family), windows()
    kv = m.config.num_attention_heads if family == 'gpt2' else 2
    h = 4 if family == 'gpt2' else 8
    slice_units(m, {'1.value_channel': [k*h + c for k in range(kv) for c in range(h) if c % 4]})
    agree(curvature(m, w), long_way(copy.deepcopy(m), w))


@pytest.mark.parametrize('family', TINY)
def test_batches_recomputation_and_precision(family):
    m, w = tiny_model(family), windows(7)
    whole = curvature(m, w, batch_size=7)
    for kw in (dict(batch_size=1), dict(batch_size=3), dict(checkpoint=True), dict(dtype=torch.float64), dict(store='cpu')): agree(curvature(m, w, **kw), whole, 1e-5)
    assert {f.A.dtype for f in curvature(m, w, dtype=torch.float64).values()} == {torch.float64}


def test_recomputation_keeps_fewer_activations():
    "What the backward pass has to keep, counted through the hooks of autograd."
    def kept(checkpoint):
        m, total = tiny_model('llama', num_hidden_layers=8), [0]
        def pack(t): total[0] += t.numel(); return t
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t): curvature(m, windows(2, 32), checkpoint=checkpoint)
        return total[0]
    assert kept(True) < .5*kept(False)


@pytest.mark.parametrize('family', TINY)
def test_the_model_is_left_as_it_was(family):
    m = tiny_model(family)
    first = next(m.parameters()); first.requires_grad_(False)
    state, flags = {n: t.clone() for n, t in m.state_dict().items()}, [p.requires_grad for p in m.parameters()]
    curvature(m, windows(), checkpoint=True)
    assert all(torch.equal(t, state[n]) for n, t in m.state_dict().items()) and flags == [p.requires_grad for p in m.parameters()]
    assert all(p.grad is None for p in m.parameters()) and not any(x._forward_hooks or 'forward' in vars(x) for x in m.modules())


@pytest.mark.parametrize('family,shared', [('llama', 2), ('qwen2', 2), ('opt', 1), ('gpt2', 0), ('phi', 1)])
def test_shared_inputs_are_stored_once(family, shared):
    m = tiny_model(family)
    C, names = curvature(m, windows(1)), list(decoder_linears(m))
    different = {id(f.A) for f in C.values()}
    groups = {'llama': 4, 'qwen2': 4, 'opt': 4, 'gpt2': 4, 'phi': 4}[family]
    assert len(different) == 3*groups and len(names) - len(different) == 3*{0: 0, 1: 2, 2: 3}[shared]
    assert curvature_bytes(m) == sum(t.numel()*4 for t in {id(t): t for f in C.values() for t in (f.A, f.G)}.values())
    with torch.device('meta'): assert curvature_bytes(m, dtype=torch.float64) == 2*curvature_bytes(m)


def test_some_names_only():
    m, w = tiny_model('llama'), windows()
    names = [n for n in decoder_linears(m) if n.endswith(('v_proj', 'k_proj', 'down_proj'))][::-1]
    some, whole = curvature(m, w, names=names), curvature(m, w)
    assert list(some) == names and input_leaders(m, names)[names[-1]] == names[-2]
    agree(some, {n: whole[n] for n in names}, 1e-6)
    assert curvature_bytes(m, names) < curvature_bytes(m)


def test_refusals():
    m, w = tiny_model('llama'), windows()
    with pytest.raises(ValueError, match='eval'): curvature(copy.deepcopy(m).train(), w)
    with pytest.raises(ValueError, match="'lm_head' is not a linear"): curvature(m, w, names=['lm_head'])
    with pytest.raises(ValueError, match='seqlen >= 2'): curvature(m, windows(3, 1))
    with pytest.raises(ValueError, match='vocabulary'): curvature(m, Windows(torch.full((1, 4), 97), 'wrong'))
    for bad in (float('nan'), float('inf')):
        sick = copy.deepcopy(m); sick.lm_head.weight.data[3, 3] = bad
        with pytest.raises(ValueError, match='gradients at the outputs of .*down_proj: .* in torch.float32'): curvature(sick, w, names=['model.layers.2.mlp.down_proj'])


@pytest.mark.parametrize('family', ['llama', 'gpt2'])
def test_a_dead_channel_shows_in_the_factors(family):
    m, w = tiny_model(family), windows()
    second = next(n for n in decoder_linears(m) if n.endswith('mlp.c_proj' if family == 'gpt2' else 'down_proj'))
    first = next(n for n in decoder_linears(m) if n.endswith('mlp.c_fc' if family == 'gpt2' else 'up_proj'))
    weight_of(m.get_submodule(second)).data[:, 4] = 0
    weight_of(m.get_submodule(first)).data[9] = 0
    m.get_submodule(first).bias.data[9] = 0
    C = curvature(m, w)
    assert C[second].A[9].count_nonzero() == 0 and C[first].G[4].count_nonzero() == 0
    assert (C[second].A.diag() == 0).sum() == 1 and (C[first].G.diag() == 0).sum() == 1


@needs_fork
def test_two_processes(tmp_path):
    "Each takes half of the windows (or one of them none), and both get the factors of a single process."
    def worker():
        rank = processes()[0]
        for n in (5, 1):
            C = curvature(tiny_model('llama'), Windows(windows().ids[:n], 'random'), batch_size=2)
            torch.save({name: (f.A, f.G) for name, f in C.items()}, tmp_path/f'out-{n}-{rank}.pt')
    assert together(worker, 2) == [0, 0]
    m, w = tiny_model('llama'), windows()
    for n in (5, 1):
        alone = curvature(m, Windows(w.ids[:n], 'random'), batch_size=2)
        one, two = (torch.load(tmp_path/f'out-{n}-{r}.pt') for r in range(2))
        for name, f in alone.items():
            for k, expected in enumerate((f.A, f.G)):
                assert torch.equal(one[name][k], two[name][k]) and far(one[name][k], expected) < 1e-5


# ---- the quadratic, and products -------------------------------------------------------------------------------------

@given(st.integers(2, 7), st.integers(0, 99), st.data())
def test_optimal_removal_is_the_minimum(n, seed, data):
    H, theta = spd(n, seed), torch.randn(n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    gone = torch.tensor(sorted(data.draw(st.sets(st.integers(0, n - 1), min_size=1, max_size=n))))
    change, cost = optimal_removal(H, theta, gone)
    assert torch.allclose(change[gone], -theta[gone], atol=1e-8) and math.isclose(cost, .5*change @ H @ change, rel_tol=1e-6)
    free = [i for i in range(n) if i not in gone]
    if free: assert (H @ change)[free].abs().max() < 1e-7*H.norm()*theta.norm()              # no slope where it may move
    for q in gone.tolist(): assert cost >= optimal_removal(H, theta, torch.tensor([q]))[1] - 1e-9


@given(st.integers(2, 5), st.integers(2, 5), st.integers(0, 99))
def test_nearest_kronecker_is_the_nearest(o, i, seed):
    gen = torch.Generator().manual_seed(seed)
    a, g = torch.randn(30, i, dtype=torch.float64, generator=gen), torch.randn(30, o, dtype=torch.float64, generator=gen)
    g = g*(1 + a[:, :1]**2)
    full = torch.einsum('no,ni->noi', g, a).flatten(1)
    full = full.T @ full/30
    u, s, v = torch.linalg.svd(full.view(o, i, o, i).permute(0, 2, 1, 3).reshape(o*o, i*i))
    A, G = _nearest_kronecker(a, g, 100)
    assert abs((torch.kron(G, A) - full).norm() - s[1:].norm()) < 1e-4*s.norm()
    assert (torch.kron(G, A) - full).norm() <= (torch.kron(g.T @ g/30, a.T @ a/30) - full).norm() + 1e-9


@pytest.mark.parametrize('damp', [0, .01, 1.])
def test_the_inverse_of_a_factor(damp):
    M = spd(6)
    assert torch.allclose(Ridge(damp).inverse(M.float()), (M + damp*M.diag().mean()*torch.eye(6)).inverse(), rtol=1e-4)
    assert torch.allclose(Ridge(damp).inverse(8*M), Ridge(damp).inverse(M)/8)
    assert torch.equal(Ridge(damp).inverse(torch.zeros(4, 4)), torch.eye(4, dtype=torch.float64))           # nothing was seen
    with pytest.raises(ValueError, match='mean of the diagonal is -0.5'): Ridge(0).inverse(torch.diag(torch.tensor([1., -2.])))

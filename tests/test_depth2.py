"""Depth-2 pruning: distances of heads, second moments and reconstruction against their definitions, on every family."""
import copy
import math

import pytest
import torch
from helpers import tiny_model
from test_conformance import MODELS, build
from hypothesis import given, strategies as st
from prunebook.couplings import anatomy, couplings, slice_units, weight_of
from prunebook.depth2 import Depth2, _Moments, block_errors, _column_moments, _first_level
from prunebook.heads import head_distances, _js_sums, _observed_attention, removal_order, _similarity_scores
from prunebook.methods import Needs, Run, as_method
from prunebook.pruning import prune
from prunebook.models import TINY
from prunebook.repair import Ridge
from prunebook.save import load_pruned, save_pruned
from prunebook.text import Windows
from prunebook.sources import InMemory, twin
from prunebook.stream import Context, Visit, cross_gram, visits
from prunebook.walk import walk

pytestmark = pytest.mark.usefixtures('one_thread')
GROUPED = ('llama', 'mistral', 'qwen2', 'qwen3', 'phi', 'gemma')


def windows(n=8, seqlen=24, seed=0): return Windows(torch.randint(3, 97, (n, seqlen), generator=torch.Generator().manual_seed(seed)), f'random {seed}')
def flat(X): return torch.cat([x.flatten(0, -2) for x in X]).double()


def grouped(m): return any(b.heads != b.kv_heads for b in anatomy(m))


def distances(H, seed):
    "A random symmetric matrix with zero diagonal."
    R = torch.rand(H, H, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (R + R.T)*(1 - torch.eye(H))*.4


# ---- distances of heads -----------------------------------------------------------------------------------------------

@given(st.integers(1, 6), st.integers(1, 5), st.integers(1, 7), st.floats(.01, 30), st.integers(0, 999))
def test_divergence_is_symmetric_bounded_and_zero_on_the_diagonal(H, rows, keys, scale, seed):
    P = (torch.randn(2, H, rows, keys, generator=torch.Generator().manual_seed(seed))*scale).softmax(-1)
    for distance, bound in ((True, math.log(2)**.5), (False, math.log(2))):
        D = _js_sums(P, distance)/(2*rows)
        assert torch.equal(D, D.T) and (D.diag() == 0).all()
        assert (D >= 0).all() and (D <= bound + 1e-4).all()


@pytest.mark.parametrize('seed', range(5))
def test_identical_heads_have_distance_zero_and_opposite_ones_the_bound(seed):
    P = torch.randn(3, 1, 4, 6, generator=torch.Generator().manual_seed(seed)).softmax(-1).repeat(1, 3, 1, 1)
    assert (_js_sums(P) == 0).all()
    one_hot = torch.eye(4)[None, :, None]                  # 4 heads that look at 4 tokens
    assert torch.allclose(_js_sums(one_hot, False), math.log(2)*(1 - torch.eye(4, dtype=torch.float64)))


def test_distance_obeys_the_triangle_inequality():
    P = torch.randn(1, 12, 1, 5, generator=torch.Generator().manual_seed(1)).mul(3).softmax(-1)
    D = _js_sums(P)
    assert all(D[i, k] <= D[i, j] + D[j, k] + 1e-5 for i in range(12) for j in range(12) for k in range(12))


@pytest.mark.parametrize('family', TINY)
def test_distances_are_those_of_the_maps_the_model_returns(family):
    m, w = tiny_model(family), windows(3, 17)
    got, pieces = head_distances(m, w, batch_size=2), head_distances(m, w, rows=5)
    m.config._attn_implementation = 'eager'
    with torch.no_grad(): maps = m(w.ids, output_attentions=True).attentions
    for D, E, P in zip(got, pieces, maps):
        assert torch.allclose(D, _js_sums(P)/w.ids.numel(), atol=1e-4)
        assert torch.allclose(D, E, atol=1e-5)


@pytest.mark.parametrize('family', TINY)
def test_observing_changes_neither_the_model_nor_its_settings(family):
    m, w = tiny_model(family), windows(2, 12)
    before, setting = m(w.ids).logits, m.config._attn_implementation
    with pytest.raises(RuntimeError):
        with _observed_attention(m, lambda layer, P: None): raise RuntimeError
    assert m.config._attn_implementation == setting and torch.equal(m(w.ids).logits, before)


def test_no_more_than_the_stated_rows_exist_at_a_time():
    m, sizes = tiny_model('llama'), []
    with torch.no_grad(), _observed_attention(m, lambda layer, P: sizes.append(tuple(P.shape)), rows=4): m(windows(2, 10).ids)
    assert set(sizes) == {(2, 6, 4, 10), (2, 6, 2, 10)}


def test_scores_follow_the_heads_when_they_are_renumbered():
    m, w = tiny_model('opt'), windows(4, 20)
    b, order = anatomy(m)[0], torch.tensor([2, 0, 5, 3, 1, 4])
    assert b.heads == len(order)
    c, before = couplings(m, 'kv_group')[0], head_distances(m, w)[0]
    rows = (order[:, None]*b.head_dim + torch.arange(b.head_dim)).flatten()
    for n in b.family.qkv:
        l = m.get_submodule(b.path(n)); l.weight.data = l.weight.data[rows]; l.bias.data = l.bias.data[rows]
    out = m.get_submodule(b.out); out.weight.data = out.weight.data[:, rows]
    after = head_distances(m, w)[0]
    assert torch.allclose(after, before[order][:, order], atol=1e-6)
    assert torch.allclose(_similarity_scores(c, after), _similarity_scores(c, before)[order], atol=1e-6)


# ---- which heads leave --------------------------------------------------------------------------------------------------

@given(st.sampled_from([(4, 1), (6, 2), (9, 3), (8, 4), (5, 5)]), st.integers(0, 999))
def test_removal_is_nested_leaves_one_in_every_group_and_has_a_twin(shape, seed):
    (H, groups), D = shape, distances(shape[0], seed)
    order = removal_order(D, groups)
    assert [d for _, d in order] == sorted(d for _, d in order)
    assert sorted(h//(H//groups) for h, _ in order) == sorted(list(range(groups))*(H//groups - 1))
    alive = set(range(H))
    for h, d in order:
        alive.remove(h)
        assert any(D[h, t].item() == d for t in alive)     # its twin is still there when it leaves


def test_a_head_that_stands_for_two_stays():
    D = torch.tensor([[0, .1, .8, .9], [.1, 0, .2, .9], [.8, .2, 0, .9], [.9, .9, .9, 0]])
    assert [h for h, d in removal_order(D) if d < .3] == [0, 2]


def test_groups_are_compared_by_the_mean_over_their_heads():
    m = tiny_model('llama')
    c, D = couplings(m, 'kv_group')[0], distances(6, 3)
    K, g = c.n_units, 6//c.n_units
    by_hand = torch.tensor([[D[i*g:(i + 1)*g, j*g:(j + 1)*g].mean() for j in range(K)] for i in range(K)])
    scores = _similarity_scores(c, D)
    off = by_hand + 9*torch.eye(K)
    assert scores.min() == pytest.approx(off.min().item(), abs=1e-6)
    assert (scores == math.log(2)**.5).sum() == 1          # one group never leaves


@pytest.mark.parametrize('kind', ['kv_group', 'query_head'])
def test_a_threshold_a_number_and_a_share_of_heads(kind):
    m, w = tiny_model('llama'), windows()
    table = {c.name: c for c in couplings(m, kind)}
    D = head_distances(m, Windows(w.ids[:8], 'maps'))
    scores = {n: _similarity_scores(c, D[c.layer]) for n, c in table.items()}
    size = {n: c.n_units//c.groups for n, c in table.items()}
    bundle = lambda n: scores[n].view(table[n].groups, -1).sort(1).values.max(0).values[:-1]
    tau = sorted(v for n in table for v in bundle(n).tolist())[1] + 1e-6
    _, plan = prune(m, w, Depth2(units=(kind,), tau=tau, restore=False), .01)
    for n, c in table.items():
        gone = (bundle(n) < tau).sum().item()*c.groups
        assert len(plan.kept.get(n, range(c.n_units))) == c.n_units - gone
    per_unit = table['0.' + kind].second[1].shape[1]//anatomy(m)[0].value_dim
    _, plan = prune(m, w, Depth2(units=(kind,), n_heads=4, restore=False), .01)
    left = sum(plan.units[n] - len(k) for n, k in plan.kept.items())*per_unit
    assert 4 <= left <= 4 + 6
    _, plan = prune(m, w, Depth2(units=(kind, 'mlp_channel'), head_share=.5, restore=False), .3)
    for n, c in table.items(): assert len(plan.kept[n]) == c.n_units - min(round(size[n]*.5), size[n] - 1)*c.groups
    assert plan.true_sparsity >= .3 - 1e-9


def test_too_few_or_too_many_heads_are_refused_before_anything_changes():
    m, w = tiny_model('llama'), windows()
    state = {n: t.clone() for n, t in m.state_dict().items()}
    with pytest.raises(ValueError, match='n_heads asks for'): prune(m, w, Depth2(units=('query_head',), n_heads=99, restore=False), .01, inplace=True)
    with pytest.raises(ValueError, match='less than sparsity'): prune(m, w, Depth2(units=('query_head',), n_heads=0, restore=False), .1, inplace=True)
    with pytest.raises(ValueError, match='leaves none of the 3 blocks'): prune(m, w, Depth2(spare=(2, 9)), .1, inplace=True)
    assert all(torch.equal(t, state[n]) for n, t in m.state_dict().items())


# ---- second moments --------------------------------------------------------------------------------------------------------

@given(st.integers(1, 5), st.integers(1, 6), st.booleans(), st.integers(0, 999))
def test_moments_of_rows_are_mean_squares(rows, d, bias, seed):
    gen = torch.Generator().manual_seed(seed)
    X, W = [torch.randn(7, d, generator=gen) + .5, torch.randn(2, 3, d, generator=gen)], torch.randn(rows, d, generator=gen)
    b = torch.randn(rows, generator=gen) if bias else None
    a = flat(X) @ W.double().T + (0 if b is None else b.double())
    assert torch.allclose(_Moments.of(X).rows(W, b).double(), a.pow(2).mean(0), rtol=1e-3, atol=1e-4)
    assert torch.allclose(_Moments.of(X).centred().rows(W).double(), a.var(0, unbiased=False), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize('family', TINY)
def test_scores_are_their_definitions(family):
    m, w = tiny_model(family), windows(4, 20)
    for s in walk(m, w, firsts=True):
        if s.layer != 1: continue
        if s.level == 'first': x, moments = flat(s.X), _Moments.of(s.X); continue
        b, W2 = s.block, weight_of(m.get_submodule(s.second)).detach().double()
        inner = flat(s.X).pow(2).mean(0).float()
        if s.part == 'attention':
            assert torch.allclose(_column_moments(m, b, 'attention', moments, inner).double(), W2.pow(2).sum(0)*inner, rtol=1e-4)
            continue
        lin = [m.get_submodule(b.path(n)) for n in b.family.mlp_firsts]
        a = [x @ weight_of(l).detach().double().T + (0 if l.bias is None else l.bias.detach().double()) for l in lin]
        paper = .5*math.prod(W2.pow(2).sum(0)*t.pow(2).mean(0) for t in a)
        assert torch.allclose(_column_moments(m, b, 'mlp', moments, inner).double(), paper, rtol=1e-3)
        act = {'silu': torch.nn.functional.silu, 'relu': torch.relu}.get(getattr(m.config, 'hidden_act', None) or m.config.activation_function)
        if act is not None:
            code = W2.pow(2).sum(0).sqrt()*act(a[0].var(0, unbiased=False))*math.prod(t.var(0, unbiased=False) for t in a[1:])
            assert torch.allclose(_column_moments(m, b, 'mlp', moments, inner, 'code').double(), code, rtol=1e-2, atol=1e-8)
        assert torch.allclose(_column_moments(m, b, 'mlp', moments, inner, 'measured').double(), W2.pow(2).sum(0)*inner, rtol=1e-4)


FUSED = [(family, variant) for family in ('phi3', 'gpt_neox') for variant in range(len(MODELS[family][1]))]


def parts_of(m, b, part):
    "Weights and biases of values (attention), or of gate and up (MLP), cut out of fused matrices by hand; float64."
    H, K, h, f = b.heads, b.kv_heads, b.head_dim, b.mlp_width
    layer = m.get_submodule(b.name)
    if part == 'attention':
        l = layer.self_attn.qkv_proj if m.config.model_type == 'phi3' else layer.attention.query_key_value
        if m.config.model_type == 'phi3': rows = [(H + K)*h + q//(H//K)*h + i for q in range(H) for i in range(h)]
        else: rows = [q*3*h + 2*h + i for q in range(H) for i in range(h)]
        parts = [rows]
    else:
        l = layer.mlp.gate_up_proj if m.config.model_type == 'phi3' else layer.mlp.dense_h_to_4h
        parts = [range(f), range(f, 2*f)] if m.config.model_type == 'phi3' else [range(f)]
    W, bias = l.weight.detach().double(), torch.zeros(len(l.weight)).double() if l.bias is None else l.bias.detach().double()
    return [(W[list(p)], bias[list(p)]) for p in parts]


@pytest.mark.parametrize('family, variant', FUSED)
def test_scores_of_fused_matrices_are_their_definitions(family, variant):
    m, w = build(family, variant), windows(4, 20)
    act = {'phi3': torch.nn.functional.silu, 'gpt_neox': torch.nn.functional.gelu}[family]
    for s in walk(m, w, firsts=True):
        if s.layer != 1: continue
        if s.level == 'first': x, moments = flat(s.X), _Moments.of(s.X); continue
        b, W2 = s.block, weight_of(m.get_submodule(s.second)).detach().double()
        norm2, inner = W2.pow(2).sum(0), flat(s.X).pow(2).mean(0).float()
        a = [x @ W.T + bias for W, bias in parts_of(m, b, s.part)]
        paper = math.prod(norm2*t.pow(2).mean(0) for t in a)/(1 if s.part == 'attention' else 2)
        first, *rest = [t.var(0, unbiased=False) for t in a]
        code = norm2.sqrt()*(first if s.part == 'attention' else act(first)*math.prod(rest))
        score = lambda inner, form: _column_moments(m, b, s.part, moments, inner, form).double()
        assert torch.allclose(score(None, 'paper'), paper, rtol=1e-3)
        assert torch.allclose(score(inner, 'code'), code, rtol=1e-2, atol=1e-6)
        assert torch.allclose(score(inner, 'measured'), norm2*inner, rtol=1e-4)


@pytest.mark.parametrize('family, variant', FUSED)
def test_the_first_level_of_fused_matrices(family, variant):
    "Every row of a fused first linear, and no other, maps pruned inputs to what the dense model computes."
    m, w = build(family, variant), windows(16)
    damaged = copy.deepcopy(m)
    damaged.get_submodule(anatomy(m)[0].mlp_second).weight.data[:, ::3] = 0
    ctx = Context(InMemory(damaged), w, .2, table=couplings(damaged, ('value_channel', 'mlp_channel')))
    for v in visits(ctx, Needs(firsts=True, dense='outputs'), InMemory(m)):
        if v.layer != 1 or v.level != 'first': continue
        X, Xh = flat(v.dense.X), flat(v.X)
        n = next(n for n, _ in v.coupling.firsts)
        dense = m.get_submodule(n).weight.detach().double()
        _first_level(v, Ridge(1e-9, 'zero'), 1.)
        best = torch.linalg.lstsq(Xh, X @ dense.T, driver='gelsd').solution
        misfit = lambda W: (Xh @ W - X @ dense.T).norm()
        assert misfit(v.module(n).double().T) == pytest.approx(misfit(best).item(), rel=1e-3)
        assert misfit(best) < .9*misfit(dense.T)


@pytest.mark.parametrize('family, variant', FUSED)
def test_distances_of_heads_in_fused_matrices(family, variant):
    m, w = build(family, variant), windows(3, 17)
    got = head_distances(m, w, rows=5)
    m.config._attn_implementation = 'eager'
    with torch.no_grad(): maps = m(w.ids, output_attentions=True).attentions
    for D, P in zip(got, maps): assert torch.allclose(D, _js_sums(P)/w.ids.numel(), atol=1e-4)


@pytest.mark.parametrize('settings', [dict(units=('mlp_channel',)), dict(units=('value_channel', 'mlp_channel'), form='paper'), dict(units=('value_channel', 'mlp_channel'), form='code'),
                                      dict(units=('kv_group', 'mlp_channel'), restore='two_step'), dict(units=('query_head', 'mlp_channel'), head_share=.5),
                                      dict(units=('value_channel', 'mlp_channel'), sigma='identity', form='paper', restore=False)], ids=lambda s: s['units'][0] + s.get('form', ''))
@pytest.mark.parametrize('family', ['phi3', 'gpt_neox'])
def test_fused_families_are_pruned(family, settings):
    m, w = build(family, min(1, len(MODELS[family][1]) - 1)), windows()
    if 'query_head' in settings['units'] and not grouped(m): pytest.skip('one query head per key-value head')
    small, plan = prune(m, w, Depth2(**settings), .2)
    assert .2 - 1e-9 <= plan.true_sparsity < .35 and small(w.ids).logits.isfinite().all()


# ---- reconstruction ------------------------------------------------------------------------------------------------------

@given(st.integers(1, 4), st.integers(1, 5), st.integers(1, 4))
def test_cross_gram_is_the_sum_of_outer_products(batches, m, k):
    gen = torch.Generator().manual_seed(batches)
    X, Y = ([torch.randn(2, 3, n, generator=gen) for _ in range(batches)] for n in (m, k))
    assert torch.allclose(cross_gram(X, Y).double(), flat(X).T @ flat(Y), atol=1e-4)


@pytest.mark.parametrize('family', TINY)
def test_a_twin_stays_what_it_was(family):
    m, w = tiny_model(family), windows(2, 12)
    before, t = m(w.ids).logits, twin(m)
    shared = {p.data_ptr() for p in m.parameters()}
    assert {p.data_ptr() for p in t.parameters()} == shared
    prune(m, windows(), Depth2(units=('kv_group', 'mlp_channel')), .3, inplace=True)
    assert torch.equal(t(w.ids).logits, before) and not torch.allclose(m(w.ids).logits, before, atol=1e-3)


@pytest.mark.parametrize('family', TINY)
@pytest.mark.parametrize('way', ['one_step', 'two_step', True])
def test_second_block_is_fitted_from_pruned_inputs_to_dense_outputs(family, way):
    m, w = tiny_model(family), windows(16)
    small, plan = prune(m, w, Depth2(restore=way, trust=1., damp=0., towards='zero'), .15)
    b, kept = anatomy(m)[1], plan.kept['1.mlp_channel']
    names = [b.path(n) for n in b.family.mlp_firsts]
    def inputs(model, *modules):
        seen, handles = {}, []
        for n in modules: handles.append(model.get_submodule(n).register_forward_pre_hook(lambda mod, a, n=n: seen.__setitem__(n, a[0].flatten(0, -2).double())))
        with torch.no_grad(): model(w.ids)
        for h in handles: h.remove()
        return [seen[n] for n in modules]
    (X, Z), (Xh, Zh) = inputs(m, names[0], b.mlp_second), inputs(small, names[0], b.mlp_second)
    for n in names:
        dense = weight_of(m.get_submodule(n)).detach().double()
        expected = dense if way == 'one_step' else torch.linalg.lstsq(Xh, X @ dense.T).solution.T
        got = weight_of(small.get_submodule(n)).detach().double()      # what inputs hardly show is free: outputs are compared
        assert (Xh @ (got - expected[kept]).T).norm() < 2e-3*(Xh @ expected[kept].T).norm()
    Y = Z @ weight_of(m.get_submodule(b.mlp_second)).detach().double().T
    got = weight_of(small.get_submodule(b.mlp_second)).detach().double()
    if way is True:
        best = torch.linalg.lstsq(Zh, Y).solution.T
        assert (Zh @ got.T - Y).norm() <= (Zh @ best.T - Y).norm()*1.001 + 1e-6
    else: assert (Zh @ got.T - Y).norm() > (Zh @ torch.linalg.lstsq(Zh, Y).solution - Y).norm()*1.001


def test_without_trust_it_is_the_repair_of_the_own_trajectory():
    "Trust 0 scores and fits like FASP's repair: same columns, `Ridge.restore` on them, first level untouched."
    m, w = tiny_model('qwen2'), windows(16)
    small, plan = prune(m, w, Depth2(trust=0., damp=.01), .15)
    for i, b in enumerate(anatomy(m)):
        for n in b.family.mlp_firsts: assert torch.equal(small.get_submodule(b.path(n)).weight, m.get_submodule(b.path(n)).weight[plan.kept[f'{i}.mlp_channel']])
    s = next(s for s in walk(m, w) if s.part == 'mlp')
    keep = torch.tensor(plan.kept['0.mlp_channel'])
    expected = Ridge(.01).restore(weight_of(m.get_submodule(s.second)).detach(), s.gram(), keep)
    assert torch.allclose(small.get_submodule(s.second).weight, expected, atol=1e-5)


def test_targets_are_mixed_linearly():
    m, w = tiny_model('llama'), windows(16)
    s = next(s for s in walk(m, w) if (s.layer, s.part) == (1, 'mlp'))
    c = next(c for c in couplings(m, 'mlp_channel') if c.layer == s.layer)
    v = Visit(Context(InMemory(m), w, .2), c, s, [torch.randn_like(y) for y in s.outputs(m)])
    every, ridge = torch.arange(c.n_units), Ridge(.1)
    a, b, c = (v.aimed(every, ridge, t) for t in (0., .5, 1.))
    assert torch.allclose(b, (a + c)/2, atol=1e-5) and not torch.allclose(a, c, atol=1e-2)


def test_without_pruning_before_it_the_first_level_stays():
    m, w = tiny_model('qwen2'), windows(16)
    small, plan = prune(m, w, Depth2(trust=1., damp=0., towards='zero'), .15)
    for n in anatomy(m)[0].family.mlp_firsts:
        dense, new = (x.get_submodule(anatomy(m)[0].path(n)).weight.detach() for x in (m, small))
        assert torch.allclose(new, dense[plan.kept['0.mlp_channel']], atol=1e-3)


def test_kept_columns_follow_the_dense_model_best():
    m, w = tiny_model('llama'), windows(40)
    error = {r: block_errors(m, prune(m, w, Depth2(restore=r, trust=1.), .3)[0], w)[-1].item() for r in (False, 'two_step', True)}
    assert error[True] < error['two_step'] and error[True] < error[False]


# ---- the method ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('family', TINY)
@pytest.mark.parametrize('units', [('mlp_channel',), ('value_channel', 'mlp_channel'), ('kv_group', 'mlp_channel'), ('query_head', 'mlp_channel')])
def test_every_kind_of_unit_shrinks_on_every_family(family, units):
    m, w = tiny_model(family), windows(4)
    if units[0] == 'query_head' and not grouped(m):
        with pytest.raises(ValueError, match='use kv_group'): prune(m, w, Depth2(units=units), .2)
        return
    small, plan = prune(m, w, Depth2(units=units), .2)
    assert .2 - 1e-9 <= plan.true_sparsity < .35 and small(w.ids).logits.isfinite().all()
    again = slice_units(copy.deepcopy(m), plan.kept)
    assert all(p.shape == q.shape for p, q in zip(again.parameters(), small.parameters()))
    with pytest.raises(ValueError, match='give these windows'): plan.apply(copy.deepcopy(m))


@pytest.mark.parametrize('units', [('mlp_channel',), ('query_head', 'mlp_channel')])
def test_saved_and_reloaded_it_is_the_same(units, tmp_path):
    m, w = tiny_model('llama'), windows(4)
    small, plan = prune(m, w, Depth2(units=units), .2)
    again = load_pruned(save_pruned(small, plan, tmp_path/'small'))[0]
    assert torch.equal(again(w.ids).logits, small(w.ids).logits)


@pytest.mark.parametrize('sigma', ['random', 'identity'])
def test_data_free_reads_no_text(sigma):
    m = tiny_model('llama')
    method = Depth2(units=('value_channel', 'mlp_channel'), sigma=sigma, restore=False, form='paper' if sigma == 'identity' else 'measured')
    plans = [prune(m, w, method, .2)[1] for w in (windows(4, 24, 0), windows(4, 24, 1), None)]
    assert plans[0].kept == plans[1].kept
    if sigma == 'identity': assert plans[0].kept == plans[2].kept
    assert ('random tokens' in plans[2].calibration) and 'random' in plans[2].calibration


def test_without_text_the_model_writes_it():
    m = tiny_model('llama')
    small, plan = prune(m, None, Depth2(), .2, run=Run(batch_size=64))
    assert plan.calibration.startswith('64 windows of 64 tokens from self-generated') and plan.true_sparsity >= .2 - 1e-9


def test_random_heads_depend_on_the_seed_alone():
    m = tiny_model('llama')
    run = lambda seed, w: prune(m, w, Depth2(units=('kv_group',), heads='random', seed=seed, n_heads=6, restore=False), .05)[1].kept
    assert run(0, windows()) == run(0, windows(seed=5)) and len({str(run(s, windows())) for s in range(6)}) > 1


def test_only_the_named_blocks_change():
    m, w = tiny_model('llama'), windows()
    small, plan = prune(m, w, Depth2.published(spare=(1, 1), units=('mlp_channel',), tau=None), .1)
    assert set(plan.kept) == {'1.mlp_channel'} and plan.true_sparsity >= .1 - 1e-9
    for b in anatomy(m):
        same = torch.equal(m.get_submodule(b.mlp_second).weight, small.get_submodule(b.mlp_second).weight) if b.layer != 1 else False
        assert same == (b.layer != 1)


def test_a_second_time_gives_the_same_and_the_dense_model_is_untouched():
    m, w = tiny_model('gpt2'), windows()
    state = {n: t.clone() for n, t in m.state_dict().items()}
    a, b = (prune(m, w, 'depth2', .2) for _ in range(2))
    assert a[1] == b[1] and all(torch.equal(p, q) for p, q in zip(a[0].parameters(), b[0].parameters()))
    assert all(torch.equal(t, state[n]) for n, t in m.state_dict().items())
    inplace, _ = prune(m, w, 'depth2', .2, inplace=True)
    assert inplace is m and all(torch.equal(p, q) for p, q in zip(a[0].parameters(), m.parameters()))


def test_it_works_in_bfloat16():
    m, w = tiny_model('llama').bfloat16(), windows()
    small, plan = prune(m, w, Depth2(units=('query_head', 'mlp_channel')), .2)
    assert {p.dtype for p in small.parameters()} == {torch.bfloat16} and small(w.ids).logits.isfinite().all()


def test_it_visits_a_device_block_by_block():
    m, w = tiny_model('llama'), windows()
    here, visiting = prune(m, w, Depth2(), .2), prune(m, w, Depth2(), .2, run=Run(device='cpu'))
    assert here[1].kept == visiting[1].kept and all(torch.equal(p, q) for p, q in zip(here[0].parameters(), visiting[0].parameters()))


@pytest.mark.parametrize('field, known', [('heads', 'second_moment'), ('form', 'paper'), ('sigma', 'identity'), ('restore', 'two_step'), ('towards', 'zero')])
def test_unknown_choices_are_named(field, known):
    with pytest.raises(ValueError, match=f"{field} is 'nonsense'.*{known}"): Depth2(**{field: 'nonsense'})


@pytest.mark.parametrize('bad,word', [(dict(tau=.2), 'hold no heads'), (dict(units=('kv_group',), tau=.2, n_heads=3), 'give one'), (dict(units=('kv_group',), tau=-1), 'tau is -1'),
                                      (dict(units=('kv_group',), tau=.8, distance=False), '0.693'), (dict(units=('kv_group',), head_share=1.), 'head_share is 1.0'),
                                      (dict(units=('kv_group',), n_heads=-2), 'n_heads is -2'), (dict(units=('kv_group',), n_heads=2, heads='second_moment'), 'choose head_share'),
                                      (dict(damp=-1), 'damp is -1'), (dict(map_windows=1.5), 'map_windows is 1.5'),
                                      (dict(form='measured', sigma='identity'), 'needs inputs'), (dict(trust=1.5), 'trust is 1.5')])
def test_settings_that_cannot_be_are_refused(bad, word):
    with pytest.raises(ValueError, match=word): Depth2(**bad)


def test_published_settings_can_be_changed():
    p = Depth2.published(tau=.16)
    assert (p.restore, p.damp, p.towards, p.tau) == ('two_step', 1e-4, 'zero', .16) and 'kv_group' in p.units
    p.check()
    assert as_method('depth2').settings()['restore'] is True

"""LLM Surgeon against brute force on small quadratics, and what it must do and refuse on every family."""
import copy

import pytest
import torch
from helpers import tiny_model
from hypothesis import given, strategies as st
from prunebook import surgeon as module
from prunebook.couplings import anatomy, couplings, masked, slice_units, weight_of
from prunebook.curvature import Factors, curvature
from prunebook.evaluate import window_losses
from prunebook.methods import Run, as_method
from prunebook.pruning import prune
from prunebook.models import TINY, decoder_linears, n_parameters
from prunebook.repair import Ridge
from prunebook.progress import _load_state, _save_state
from prunebook.scores import with_bias
from prunebook.structures import (_CRITERIA, _dead_units, _living, _structure_costs, _structured_threshold, drop_dead,
                                  living_inverses, remove_rows, remove_structures, row_costs, set_weight, zero_share,
                                  zero_structures)
from prunebook.surgeon import Surgeon, _adapt_to_loss, _correct, _loss_slopes, _low_rank_step, unit_costs
from prunebook.text import Windows

pytestmark = pytest.mark.usefixtures('one_thread')
UNITS = [('mlp_channel',), ('kv_group', 'mlp_channel'), ('value_channel', 'mlp_channel')]


def windows(n=6, seqlen=16, seed=0): return Windows(torch.randint(3, 97, (n, seqlen), generator=torch.Generator().manual_seed(seed)), f'random {seed}')
def total(m): return n_parameters(decoder_linears(m).values())
def snapshot(m): return {n: t.clone() for n, t in m.state_dict().items()}
def same(m, state): return all(torch.equal(t, state[n]) for n, t in m.state_dict().items())


@torch.no_grad()
def logits(m, w=windows(2, 20, 9)): return m(w.ids).logits


# ---- one matrix: brute force over the remaining weights -------------------------------------------------------------

class Toy:
    "A random matrix with factors, and the least-squares minimum over the weights that remain."
    def __init__(self, seed, R=5, C=4):
        gen = torch.Generator().manual_seed(seed)
        draw = lambda *s: torch.randn(*s, dtype=torch.float64, generator=gen)
        spd = lambda n: (lambda x: x.T @ x/len(x))(draw(2*n, n) @ draw(n, n))
        self.W, self.A, self.G = draw(R, C), spd(C), spd(R)

    def damped(self, M, damp): return M + damp*M.diag().mean()*torch.eye(len(M), dtype=M.dtype)

    def brute(self, gone, G, A):
        "Weights and cost with the entries `gone` (R, C) zero and the others at the minimum of ½ tr(Δᵀ G Δ A)."
        root, w, out = torch.linalg.cholesky(torch.kron(G, A)).T, self.W.flatten(), gone.flatten()
        change = torch.zeros_like(w)
        change[out] = -w[out]
        if (~out).any(): change[~out] = torch.linalg.lstsq(root[:, ~out], -root[:, out] @ change[out]).solution
        return (w + change).view_as(self.W), .5*(root @ change).square().sum()


SEEDS = st.integers(0, 10**6)
def costs(W, A, G, cost, damp=.01): return _structure_costs(W, A, G, cost, (Ridge(damp).inverse(A), Ridge(damp).inverse(G)))
def adapted(W, factors, rows, columns): return remove_structures(W, living_inverses(W, factors), rows, columns)


@given(SEEDS, st.floats(.001, 1))
def test_costs_of_rows_and_columns(seed, damp):
    t = Toy(seed)
    rows, columns = costs(t.W, t.A, t.G, 'surgeon', damp)
    for k, (R, C) in enumerate([(5, 0), (0, 4)]):
        for i in range(R or C):
            gone = torch.zeros(5, 4, dtype=bool)
            if k == 0: gone[i] = True
            else: gone[:, i] = True
            expected = t.brute(gone, t.damped(t.G, damp), t.A)[1] if k == 0 else t.brute(gone, t.G, t.damped(t.A, damp))[1]
            assert torch.isclose((rows, columns)[k][i], expected, rtol=1e-5)


@given(SEEDS, st.sampled_from([[[0, 1], [2, 4]], [[3, 0, 2], [1, 4, 2]], [[2], [0]]]))
def test_cost_of_rows_together(seed, table):
    t = Toy(seed)
    found = row_costs(t.W, t.A, Ridge(.01).inverse(t.G), torch.tensor(table))
    for u, rows in enumerate(table):
        gone = torch.zeros(5, 4, dtype=bool); gone[rows] = True
        assert torch.isclose(found[u], t.brute(gone, t.damped(t.G, .01), t.A)[1], rtol=1e-5)


@given(SEEDS, st.sets(st.integers(0, 4), max_size=4), st.sets(st.integers(0, 3), max_size=3))
def test_joint_removal_of_rows_and_columns(seed, rows, columns):
    t = Toy(seed)
    found = adapted(t.W, Factors(t.A, t.G), torch.tensor(sorted(rows), dtype=torch.long), torch.tensor(sorted(columns), dtype=torch.long))
    gone = torch.zeros(5, 4, dtype=bool); gone[list(rows)] = True; gone[:, list(columns)] = True
    G, A = t.damped(t.G, .01), t.damped(t.A, .01)
    best, cost = t.brute(gone, G, A)
    assert found[gone].count_nonzero() == 0
    D = found - t.W
    assert torch.isclose(.5*(D*(G @ D @ A)).sum(), cost, rtol=1e-5, atol=1e-9)                # compared by misfit
    summed = t.W - (t.W - remove_rows(t.W, Ridge().inverse(t.G), torch.tensor(sorted(rows), dtype=torch.long))) \
        - (t.W - remove_rows(t.W.T, Ridge().inverse(t.A), torch.tensor(sorted(columns), dtype=torch.long)).T)
    summed[gone] = 0
    assert .5*((summed - t.W)*(G @ (summed - t.W) @ A)).sum() >= cost*(1 - 1e-6)             # rows and columns apart, then added, are never better


@given(SEEDS, st.floats(-8, 8))
def test_balance_of_the_factors_does_not_matter(seed, power):
    t, s = Toy(seed), 10**power
    for cost in ('surgeon', 'k_obd'):
        for a, b in zip(costs(t.W, t.A, t.G, cost), costs(t.W, t.A*s, t.G/s, cost)): assert torch.allclose(a, b, rtol=1e-6)
    gone = torch.tensor([1, 2]), torch.tensor([0])
    assert torch.allclose(adapted(t.W, Factors(t.A, t.G), *gone), adapted(t.W, Factors(t.A*s, t.G/s), *gone), rtol=1e-6, atol=1e-9)


def test_one_by_one_is_only_right_alone():
    t = Toy(1)
    inverse = Ridge().inverse(t.G)
    for r in range(5): assert torch.allclose(remove_rows(t.W, inverse, torch.tensor([r])), remove_rows(t.W, inverse, torch.tensor([r]), correlate=False))
    apart = remove_rows(t.W, inverse, torch.tensor([0, 3]), correlate=False)
    expected = t.W + sum(remove_rows(t.W, inverse, torch.tensor([r])) - t.W for r in (0, 3))
    expected[[0, 3]] = 0
    assert torch.allclose(apart, expected)
    assert not torch.allclose(apart, remove_rows(t.W, inverse, torch.tensor([0, 3])))
    assert torch.equal(remove_rows(t.W, inverse, torch.tensor([], dtype=torch.long)), t.W)


@given(SEEDS)
def test_second_linear_is_restored_as_by_ridge(seed):
    "The column update is the least-squares restoration with the same ridge towards the old weights."
    t = Toy(seed)
    kept = torch.tensor([1, 3])
    found = remove_rows(t.W.T, Ridge(.05).inverse(t.A), torch.tensor([0, 2])).T[:, kept]
    scale = t.A.diag().mean()/t.A[kept][:, kept].diag().mean()                               # the ridge there is relative to the kept inputs
    assert torch.allclose(found, Ridge((.05*scale).item()).restore(t.W, t.A, kept), rtol=1e-4, atol=1e-7)


def test_baselines_by_loops():
    t = Toy(3)
    k, l, m = (costs(t.W, t.A, t.G, c) for c in ('k_obd', 'l_obd', 'magnitude'))
    for r in range(5):
        assert torch.isclose(k[0][r], .5*t.G[r, r]*t.W[r] @ t.A @ t.W[r])
        assert torch.isclose(l[0][r], sum(.5*t.W[r, c]**2*t.A[c, c] for c in range(4))) and torch.isclose(m[0][r], t.W[r].norm())
    for c in range(4):
        assert torch.isclose(k[1][c], .5*t.A[c, c]*t.W[:, c] @ t.G @ t.W[:, c])
        assert torch.isclose(l[1][c], sum(.5*t.W[r, c]**2*t.A[c, c] for r in range(5))) and torch.isclose(m[1][c], t.W[:, c].norm())


@given(SEEDS)
def test_dead_rows_and_columns_are_free(seed):
    t = Toy(seed)
    t.G[1] = t.G[:, 1] = 0                                 # no gradient
    t.A[2] = t.A[:, 2] = 0                                 # no input
    t.W[3] = 0
    r, c = _living(t.W, Factors(t.A, t.G))
    assert r.tolist() == [True, False, True, False, True] and c.tolist() == [True, True, False, True]
    found = adapted(t.W, Factors(t.A, t.G), torch.tensor([1, 3]), torch.tensor([2]))
    assert torch.allclose(found[[0, 2, 4]][:, [0, 1, 3]], t.W[[0, 2, 4]][:, [0, 1, 3]])       # nobody has to adapt
    assert found[[1, 3]].count_nonzero() == 0 and found[:, 2].count_nonzero() == 0


@given(st.integers(0, 999), st.floats(.01, .99))
def test_threshold_counts_like_a_loop(seed, share):
    gen = torch.Generator().manual_seed(seed)
    shapes = {'a': (4, 6), 'b': (5, 3), 'c': (2, 2)}
    costs = {n: (torch.randint(0, 6, (R,), generator=gen).double(), torch.randint(0, 6, (C,), generator=gen).double()) for n, (R, C) in shapes.items()}
    everything, target = sum(R*C for R, C in shapes.values()), share*sum(R*C for R, C in shapes.values())
    def removed(chosen): return sum(len(r)*shapes[n][1] + len(c)*shapes[n][0] - len(r)*len(c) for n, (r, c) in chosen.items())
    chosen = _structured_threshold(costs, shapes, target)
    assert target <= removed(chosen) <= everything and removed(chosen) - target < 6
    worst = max(x[i].max() for n, pair in chosen.items() for x, i in zip(costs[n], pair) if len(i))
    for n, (R, C) in shapes.items():
        for x, i in zip(costs[n], chosen[n]):
            left = torch.ones(len(x), dtype=bool); left[i] = False
            assert not left.any() or x[left].min() >= worst                                  # nobody cheaper stays


# ---- coupled --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('kind', ['mlp_channel', 'kv_group', 'value_channel'])
@pytest.mark.parametrize('family', ['llama', 'gpt2', 'opt'])
def test_unit_costs_by_definition(family, kind):
    m = tiny_model(family)
    C, c = curvature(m, windows()), couplings(m, kind)[1]
    second, tied = unit_costs(m, c, C, .1), unit_costs(m, c, C, .1, tied=True)
    by_hand, rows = torch.zeros(2, c.n_units, dtype=torch.float64)
    for k, (n, t) in enumerate([c.second, *c.firsts]):
        W, f = with_bias(m.get_submodule(n)).double(), C[n]
        if k == 0: W, f = W.T, Factors(f.G, f.A)
        H = torch.linalg.inv(f.G.double() + .1*f.G.double().diag().mean()*torch.eye(len(f.G)))
        for u, r in enumerate(t):
            cost = .5*torch.trace(torch.linalg.inv(H[r][:, r]) @ W[r] @ f.A.double() @ W[r].T)
            if f.G.diag()[r].count_nonzero() == 0: cost = 0                                  # a ReLU that never opens
            (by_hand if k == 0 else rows)[u] += cost
    assert torch.allclose(second, by_hand, rtol=1e-5) and torch.allclose(tied, by_hand + rows, rtol=1e-5)


@pytest.mark.parametrize('units', UNITS)
@pytest.mark.parametrize('family', TINY)
def test_sparsity_is_reached_by_less_than_a_unit_more(family, units):
    dense = tiny_model(family)
    state = snapshot(dense)
    for sparsity, shots in ((.11, 1), (.25, 3)):
        small, plan = prune(dense, windows(), Surgeon(units=units, shots=shots), sparsity)
        most = max(c.cost*c.groups for c in couplings(dense, units))/total(dense)
        true = 1 - total(small)/total(dense)
        assert plan.true_sparsity == pytest.approx(true) and sparsity - 1e-12 <= true <= sparsity + most + 1e-12
        assert logits(small).isfinite().all() and all(len(plan.scores[n]) == plan.units[n] for n in plan.kept)
        assert {n: len(k) for n, k in plan.kept.items()} == {c.name: c.n_units for c in couplings(small, units)}
    assert same(dense, state)


def test_query_heads():
    dense = tiny_model('llama')
    small, plan = prune(dense, windows(), Surgeon(units=('query_head',), shots=2), .05)
    assert plan.true_sparsity >= .05 and logits(small).isfinite().all() and len(set(b.heads for b in anatomy(small))) >= 1


@pytest.mark.parametrize('family', ['llama', 'gpt2', 'phi'])
def test_without_update_the_kept_weights_are_the_old_ones(family):
    dense = tiny_model(family)
    small, plan = prune(dense, windows(), Surgeon(restore=False, shots=2), .2)
    again = slice_units(copy.deepcopy(dense), plan.kept)
    assert same(again, snapshot(small))
    with masked(dense, plan.kept): assert torch.allclose(logits(dense), logits(small), atol=1e-4)


def remove_units(model, coupling, kept, *more):
    "Let the rest adapt, then slice."
    _adapt_to_loss(model, coupling, kept, *more)
    slice_units(model, {coupling.name: kept})


@pytest.mark.parametrize('family', ['llama', 'opt'])
def test_the_update_is_that_of_each_matrix(family):
    dense = tiny_model(family)
    c = couplings(dense, 'mlp_channel')[1]
    C = curvature(dense, windows())
    kept, gone = [i for i in range(c.n_units) if i % 5], torch.arange(0, c.n_units, 5)
    for update in ('second', 'tied'):
        m = copy.deepcopy(dense)
        remove_units(m, c, kept, dict(C), .05, update)
        n = c.second[0]
        W = remove_rows(with_bias(dense.get_submodule(n)).T, Ridge(.05).inverse(C[n].A), gone).T
        stay = [i for i in range(W.shape[1]) if i not in gone]
        assert torch.allclose(with_bias(m.get_submodule(n)).double(), W[:, stay], atol=1e-5)
        for n, _ in c.firsts:
            W = with_bias(dense.get_submodule(n)).double()
            if update == 'tied': W = remove_rows(W, Ridge(.05).inverse(C[n].G), gone)
            assert torch.allclose(with_bias(m.get_submodule(n)).double(), W[kept], atol=1e-5)


def test_rounds_compose_to_a_joint_removal():
    "Two removals from one curvature give the weights of one removal of both sets."
    dense = tiny_model('llama')
    c = couplings(dense, 'mlp_channel')[0]
    C = {c.second[0]: curvature(dense, windows(), names=[c.second[0]])[c.second[0]]}
    one, two = copy.deepcopy(dense), copy.deepcopy(dense)
    remove_units(one, c, list(range(8, 37)), dict(C), 1e-7)
    F = dict(C)
    remove_units(two, c, list(range(5, 37)), F, 1e-7)
    remove_units(two, couplings(two, 'mlp_channel')[0], list(range(3, 32)), F, 1e-7)
    a, b = (with_bias(m.get_submodule(c.second[0])).double() - 0 for m in (one, two))
    A = C[c.second[0]].A.double()[8:, 8:]
    assert ((a - b) @ A*(a - b)).sum() < 1e-4*(a @ A*a).sum()


def test_dead_units_leave_first():
    m = tiny_model('llama')
    up, down = (m.get_submodule(f'model.layers.1.mlp.{n}_proj') for n in ('up', 'down'))
    for j in (3, 30): up.weight.data[j] = 0; up.bias.data[j] = 0
    down.weight.data[:, 17] = 0
    c = couplings(m, 'mlp_channel')[1]
    C = curvature(m, windows())
    for tied in (False, True): assert (unit_costs(m, c, C, .1, tied) == 0).nonzero().flatten().tolist() == [3, 17, 30]
    small, plan = prune(m, windows(), Surgeon(shots=1, rounds=1), 3*c.cost/total(m))
    assert [i for i in range(37) if i not in plan.kept['1.mlp_channel']] == [3, 17, 30]
    assert torch.allclose(logits(small), logits(m), atol=1e-4)


@pytest.mark.parametrize('family', ['llama', 'gpt2'])
def test_the_update_helps(family):
    "On what it was calibrated on, with many units gone, adapting keeps the logits nearer."
    dense, w = tiny_model(family), windows(24, 24)
    small = {r: prune(dense, w, Surgeon(restore=r), .3)[0] for r in (True, False)}
    off = {r: (logits(m, w) - logits(dense, w)).norm() for r, m in small.items()}
    assert off[True] < off[False]


def test_fresh_windows_are_shared_out(monkeypatch):
    seen = []
    real = module.curvature
    monkeypatch.setattr(module, 'curvature', lambda m, w, *a, **k: (seen.append(w.ids), real(m, w, *a, **k))[1])
    w = windows(6)
    prune(tiny_model('llama'), w, Surgeon(shots=3, fresh=True), .2)
    assert [len(i) for i in seen] == [2, 2, 2] and torch.cat(seen).sort(0).values.equal(w.ids.sort(0).values)
    with pytest.raises(ValueError, match='2 windows cannot be shared out among 3 shots'): prune(tiny_model('llama'), windows(2), Surgeon(shots=3, fresh=True), .2)


@pytest.mark.parametrize('options', [{}, dict(cost='tied', restore='tied')])
def test_less_memory_changes_nothing(options):
    dense = tiny_model('llama')
    method = Surgeon(units=UNITS[2], shots=2, **options)
    one, two = (prune(dense, windows(), method, .3, run=Run(lean=lean)) for lean in (False, True))
    assert one[1].kept == two[1].kept and same(one[0], snapshot(two[0]))
    one, two = tiny_model('gpt2'), tiny_model('gpt2')
    for m, lean in ((one, False), (two, True)): zero_structures(m, windows(), .3, shots=2, run=Run(lean=lean))
    assert same(one, snapshot(two))


def test_inverses_are_computed_once(monkeypatch):
    calls, real = [], Ridge.inverse
    monkeypatch.setattr(Ridge, 'inverse', lambda *a: (calls.append(1), real(*a))[1])
    prune(tiny_model('llama'), windows(), Surgeon(shots=1, rounds=1), .3)
    assert len(calls) == len(couplings(tiny_model('llama'), 'mlp_channel'))
    calls.clear()
    zero_structures(tiny_model('llama'), windows(), .3, shots=1)
    assert len(calls) == 2*len(decoder_linears(tiny_model('llama')))


# ---- the first-order correction -------------------------------------------------------------------------------------

@given(SEEDS, st.integers(1, 4))
def test_low_rank_step_is_the_best_of_its_rank(seed, rank):
    t = Toy(seed)
    slope = torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    G, A = t.damped(t.G, .1), t.damped(t.A, .1)
    def change(D): return ((slope*D).sum() + .5*(D*(G @ D @ A)).sum()).item()
    D, gain = _low_rank_step(slope, t.A, t.G, rank, .1)
    assert torch.linalg.matrix_rank(D, rtol=1e-9) <= rank and change(D) == pytest.approx(-gain, rel=1e-6)
    newton = -torch.linalg.solve(torch.kron(G, A), slope.flatten()).view(5, 4)
    if rank == 4: assert torch.allclose(D, newton, rtol=1e-5, atol=1e-7)
    U, V = torch.linalg.svd(D)[0][:, :rank], torch.linalg.svd(D)[2][:rank]
    def best(basis, left):                                 # the best change whose columns (or rows) span the given ones
        K = torch.kron(basis.T @ G @ basis, A) if left else torch.kron(G, basis.T @ A @ basis)
        s = basis.T @ slope if left else slope @ basis
        X = -torch.linalg.solve(K, s.flatten()).view_as(s)
        return change(basis @ X if left else X @ basis.T)
    assert best(U, True) == pytest.approx(-gain, rel=1e-5) and best(V.T, False) == pytest.approx(-gain, rel=1e-5)   # neither side can do better
    other = torch.randn(5, rank, dtype=torch.float64, generator=torch.Generator().manual_seed(seed + 1))
    assert best(other, True) >= -gain*(1 + 1e-6)


@pytest.mark.parametrize('family', TINY)
def test_slopes_are_those_of_autograd(family):
    m, w = tiny_model(family), windows(5, 12)
    names = list(decoder_linears(m))
    flags = [p.requires_grad for p in m.parameters()]
    with torch.no_grad(): loss, slopes = _loss_slopes(m, w, names, 2)        # whatever the caller switched off
    assert [p.requires_grad for p in m.parameters()] == flags and all(p.grad is None for p in m.parameters())
    whole = torch.nn.functional.cross_entropy(m(w.ids[:, :-1]).logits.flatten(0, 1), w.ids[:, 1:].flatten())
    whole.backward()
    assert loss == pytest.approx(whole.item(), rel=1e-5)
    for n, layer in decoder_linears(m).items():
        g = layer.weight.grad if weight_of(layer) is layer.weight else layer.weight.grad.T
        if layer.bias is not None: g = torch.cat([g, layer.bias.grad[:, None]], 1)
        assert torch.allclose(slopes[n], g, atol=1e-6)


@pytest.mark.parametrize('family', ['llama', 'gpt2', 'opt'])
def test_correction_lowers_the_loss_and_keeps_what_is_gone(family):
    m, w = tiny_model(family), windows(8, 16)
    zero_structures(m, w, .3, shots=2)
    zeros, shapes = {n: with_bias(x) == 0 for n, x in decoder_linears(m).items()}, [p.shape for p in m.parameters()]
    C = curvature(m, w)
    before, after, length = _correct(m, w, C, rank=2)
    assert after < before - 1e-3 and 0 < length <= 1
    assert _loss_slopes(m, w, list(C))[0] == pytest.approx(after, rel=1e-5) and [p.shape for p in m.parameters()] == shapes
    for n, x in decoder_linears(m).items():
        r, c = (~zeros[n]).any(1), (~zeros[n]).any(0)
        assert with_bias(x)[~r].count_nonzero() == 0 and with_bias(x)[:, ~c].count_nonzero() == 0


def test_correction_that_never_helps_changes_nothing(monkeypatch):
    m, w = tiny_model('llama'), windows()
    C, state = curvature(m, w), snapshot(m)
    for loss in (torch.inf, torch.nan, 1e3):
        monkeypatch.setattr(module, 'window_losses', lambda *a: torch.tensor([loss]))
        before, after, length = _correct(m, w, C)
        assert before == after and length == 0 and same(m, state)


def test_correction_as_an_option():
    dense, w = tiny_model('llama'), windows(8, 16)
    plain, corrected = (prune(dense, w, Surgeon(shots=1, correction=r), .3)[0] for r in (0, 4))
    assert [p.shape for p in plain.parameters()] == [p.shape for p in corrected.parameters()]
    assert window_losses(corrected, w).mean() < window_losses(plain, w).mean()


# ---- resuming -------------------------------------------------------------------------------------------------------

class Stop(Exception): pass


@pytest.mark.parametrize('family,units', [('llama', UNITS[2]), ('gpt2', UNITS[1])])
@pytest.mark.parametrize('at', [1, 2])
def test_an_interrupted_run_goes_on(family, units, at, tmp_path, monkeypatch):
    dense, w, file = tiny_model(family), windows(), str(tmp_path/'run.pt')
    method, run = Surgeon(units=units, shots=3), Run(log=file)
    whole, plan = prune(dense, w, Surgeon(units=units, shots=3), .2)
    shot, calls = Surgeon.shot, []
    def failing(*args):
        calls.append(1)
        if len(calls) > at: raise Stop
        return shot(*args)
    monkeypatch.setattr(Surgeon, 'shot', failing)
    with pytest.raises(Stop): prune(dense, w, method, .2, run=run)
    monkeypatch.setattr(Surgeon, 'shot', lambda *args: (calls.append(1), shot(*args))[1])
    calls.clear()
    again, second = prune(dense, w, method, .2, run=run)
    assert len(calls) == 3 - at and second.kept == plan.kept and second.scores == plan.scores and same(again, snapshot(whole))
    calls.clear()
    assert same(prune(dense, w, method, .2, run=run)[0], snapshot(whole)) and not calls               # a finished run is only read
    assert [p.name for p in tmp_path.iterdir()] == ['run.pt']


def test_a_zeroing_run_goes_on(tmp_path, monkeypatch):
    w, run = windows(), Run(log=str(tmp_path/'new folder'/'run.pt'))
    whole = tiny_model('llama')
    share = zero_structures(whole, w, .3, shots=3)
    def stop(shot):
        if shot == 2: raise Stop
    with pytest.raises(Stop): zero_structures(tiny_model('llama'), w, .3, shots=3, report=stop, run=run)
    again = tiny_model('llama')
    reports = []
    assert zero_structures(again, w, .3, shots=3, report=reports.append, run=run) == share
    assert same(again, snapshot(whole)) and reports == [3]


def test_a_foreign_state_is_refused(tmp_path):
    dense, w, file = tiny_model('llama'), windows(), str(tmp_path/'run.pt')
    prune(dense, w, Surgeon(shots=1), .1, run=Run(log=file))
    before = open(file, 'rb').read()
    for other, calibration, sparsity, word in [(dense, windows(seed=1), .1, 'calibration'), (dense, w, .2, 'sparsity'), (tiny_model('llama', seed=1), w, .1, 'model')]:
        with pytest.raises(ValueError, match=f'belongs to another run: {word} differ'): prune(other, calibration, Surgeon(shots=1), sparsity, run=Run(log=file))
    with pytest.raises(ValueError, match='damp differ'): prune(dense, w, Surgeon(shots=1, damp=.2), .1, run=Run(log=file))
    with pytest.raises(ValueError, match='another run'): zero_structures(copy.deepcopy(dense), w, .1, run=Run(log=file))
    assert open(file, 'rb').read() == before
    (tmp_path/'junk').write_text('junk')
    with pytest.raises(ValueError, match='not a state'): prune(dense, w, Surgeon(shots=1), .1, run=Run(log=str(tmp_path/'junk')))
    assert _load_state(None, {}) is None and _load_state(tmp_path/'none', {}) is None


def test_a_failed_write_leaves_the_old_state(tmp_path, monkeypatch):
    m, file = tiny_model('llama'), tmp_path/'run.pt'
    _save_state(file, dict(run=1), m, done=1)
    def broken(obj, f): f.write(b'half'); raise OSError('disk full')
    monkeypatch.setattr(torch, 'save', broken)
    with pytest.raises(OSError): _save_state(file, dict(run=1), m, done=2)
    assert _load_state(file, dict(run=1))['done'] == 1 and [p.name for p in tmp_path.iterdir()] == ['run.pt']


# ---- as published ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('criterion', _CRITERIA)
@pytest.mark.parametrize('family', TINY)
def test_zeroed_structures(family, criterion):
    m = tiny_model(family)
    share = zero_structures(m, windows(3), .3, criterion, shots=2)
    most = max(W.numel() and max(W.shape) for W in (with_bias(x) for x in decoder_linears(m).values()))
    zeros = sum(int((p == 0).sum()) for x in decoder_linears(m).values() for p in x.parameters())
    assert share == zeros/total(m) == zero_share(decoder_linears(m).values()) and .3 <= share <= .3 + most/total(m)
    for x in decoder_linears(m).values():                                                     # zeros are whole rows and columns
        W = with_bias(x)
        r, c = (W != 0).any(1), (W != 0).any(0)
        assert (W[r][:, c] != 0).all()
    assert total(m) == total(tiny_model(family)) and logits(m).isfinite().all()


@pytest.mark.parametrize('family', TINY)
def test_what_is_dead_can_be_sliced_off(family):
    m = tiny_model(family)
    zero_structures(m, windows(3), .5, shots=3)
    before, n = logits(m), total(m)
    gone = {c.name: int(_dead_units(m, c).sum()) for c in couplings(m, ('value_channel', 'mlp_channel'))}
    kept = drop_dead(m)
    assert torch.allclose(logits(m), before, atol=1e-4*before.abs().max().item())
    assert sum(gone.values()) > 0 and (total(m) < n) == any(len(k) < c for k, c in zip(kept.values(), [len(k) + gone[n] for n, k in kept.items()]) if c)
    assert all(not _dead_units(m, c).any() for c in couplings(m, 'mlp_channel'))


def test_coupled_structures_die_together_over_shots():
    "A row of `up` that is gone makes its column of `down` free in the next shot: more whole units die than in one shot."
    whole = {}
    for shots in (1, 6):
        m = tiny_model('llama')
        zero_structures(m, windows(8), .4, shots=shots)
        whole[shots] = sum(min((with_bias(m.get_submodule(f'model.layers.{i}.mlp.{n}_proj')) == 0).all(1).sum().item() for n in ('gate', 'up')) for i in range(3))
        both = [(with_bias(m.get_submodule(f'model.layers.{i}.mlp.up_proj')) == 0).all(1) & (m.get_submodule(f'model.layers.{i}.mlp.down_proj').weight == 0).all(0) for i in range(3)]
        whole[shots] = sum(b.sum().item() for b in both)
    assert whole[6] > whole[1]


def test_refusals():
    m, w = tiny_model('llama'), windows()
    with pytest.raises(ValueError, match='Unknown criterion'): zero_structures(m, w, .2, 'obd')
    with pytest.raises(ValueError, match='sparsity is 0'): zero_structures(m, w, 0)
    with pytest.raises(ValueError, match='shots is 0'): zero_structures(m, w, .2, shots=0)
    for kw, word in [(dict(shots=0), 'shots is 0'), (dict(rounds=1.5), 'rounds is 1.5'), (dict(cost='x'), "cost is 'x'"), (dict(restore='x'), "restore is 'x'"),
                     (dict(damp=-1), 'damp is -1'), (dict(correction=-1), 'correction is -1'), (dict(damp=None), 'damp is None')]:
        with pytest.raises(ValueError, match=word): prune(m, w, Surgeon(**kw), .2)
    with pytest.raises(ValueError, match='cannot be reached'): prune(m, w, Surgeon(), .99)


def test_set_weight_is_the_inverse_of_with_bias():
    for family in ('llama', 'gpt2', 'mistral'):
        m = tiny_model(family)
        state = snapshot(m)
        for x in decoder_linears(m).values(): set_weight(x, with_bias(x).double())
        assert same(m, state)


def test_front_door():
    m, w = tiny_model('qwen2'), windows()
    method = as_method('surgeon')
    assert isinstance(method, Surgeon) and method.settings()['cost'] == 'second'
    _, plan = prune(m, w, 'surgeon', .2)
    assert plan.method == 'surgeon' and plan.settings['shots'] == 4 and plan.true_sparsity >= .2

"""Restoring columns is a least-squares problem, and a generic solver for it is the oracle."""
import warnings

import pytest
import torch
from hypothesis import given, strategies as st
from prunebook.repair import restore_columns, ridge_solve

pytestmark = pytest.mark.usefixtures('one_thread')
f64 = torch.float64


@st.composite
def problems(draw, tall=True):
    "Inputs (tokens, f) with mixed channels, weights (d, f), kept columns."
    f, d = draw(st.integers(2, 14)), draw(st.integers(1, 8))
    tokens = draw(st.integers(2*f, 60) if tall else st.integers(1, f))
    gen = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    X = torch.randn(tokens, f, dtype=f64, generator=gen) @ (torch.eye(f, dtype=f64) + .5*torch.randn(f, f, dtype=f64, generator=gen))
    keep = torch.randperm(f, generator=gen)[:draw(st.integers(1, f))].sort().values
    return X*draw(st.sampled_from([1e-3, 1., 1e3])), torch.randn(d, f, dtype=f64, generator=gen), keep


def error(U, X, W, keep): return (X[:, keep] @ U.T - X @ W.T).norm().item()


def oracle(X, W, keep, damp, towards):
    "The penalty is m more rows of data."
    delta = damp*(X[:, keep]**2).sum(0).mean()
    goal = W[:, keep].T if towards == 'weights' else torch.zeros(len(keep), len(W), dtype=f64)
    rows = torch.cat([X[:, keep], delta.sqrt()*torch.eye(len(keep), dtype=f64)])
    return torch.linalg.lstsq(rows, torch.cat([X @ W.T, delta.sqrt()*goal]), driver='gelsd').solution.T


# ---- the oracle -----------------------------------------------------------------------------------------------------

@given(problems(), st.sampled_from([1e-6, .01, 1., 100.]), st.sampled_from(['weights', 'zero']))
def test_least_squares(problem, damp, towards):
    X, W, keep = problem
    U, expected = restore_columns(W, X.T @ X, keep, damp, towards), oracle(X, W, keep, damp, towards)
    assert U.shape == (len(W), len(keep)) and U.dtype == f64
    assert (U - expected).abs().max() <= 1e-6*max(1, expected.abs().max())


@given(problems(tall=False), st.sampled_from([.01, 1.]), st.sampled_from(['weights', 'zero']))
def test_least_squares_with_fewer_tokens_than_channels(problem, damp, towards):
    X, W, keep = problem
    U, expected = restore_columns(W, X.T @ X, keep, damp, towards), oracle(X, W, keep, damp, towards)
    assert (U - expected).abs().max() <= 1e-6*max(1, expected.abs().max())


@given(problems())
def test_no_other_weights_are_better(problem):
    "Perturbing the solution in any direction makes the fit worse."
    X, W, keep = problem
    U = restore_columns(W, X.T @ X, keep, damp=1e-12)
    best = error(U, X, W, keep)
    for i in range(5):
        step = torch.randn(U.shape, dtype=f64, generator=torch.Generator().manual_seed(i))
        assert error(U + 1e-2*step, X, W, keep) > best


# ---- what a repair promises -----------------------------------------------------------------------------------------

@given(problems() | problems(tall=False), st.sampled_from([1e-6, 1e-3, .01, .1, 1., 10., 1e3, 1e6]))
def test_towards_weights_is_never_worse_than_cutting(problem, damp):
    X, W, keep = problem
    cut = error(W[:, keep], X, W, keep)
    assert error(restore_columns(W, X.T @ X, keep, damp), X, W, keep) <= cut*(1 + 1e-6) + 1e-6*X.norm()*W.norm()


@given(problems())
def test_small_damping_towards_zero_is_never_worse_than_cutting(problem):
    X, W, keep = problem
    cut = error(W[:, keep], X, W, keep)
    assert error(restore_columns(W, X.T @ X, keep, 1e-9, 'zero'), X, W, keep) <= cut*(1 + 1e-6) + 1e-6*X.norm()*W.norm()


@given(problems(), st.sampled_from(['weights', 'zero']))
def test_more_damping_never_fits_better(problem, towards):
    X, W, keep = problem
    errors = [error(restore_columns(W, X.T @ X, keep, damp, towards), X, W, keep) for damp in (1e-8, 1e-4, .01, 1., 100.)]
    assert all(a <= b + 1e-6*X.norm().item()*W.norm().item() for a, b in zip(errors, errors[1:]))


@given(problems(), st.sampled_from(['weights', 'zero']), st.integers(0, 99))
def test_order_of_kept_columns(problem, towards, seed):
    X, W, keep = problem
    perm = torch.randperm(len(keep), generator=torch.Generator().manual_seed(seed))
    a, b = (restore_columns(W, X.T @ X, k, .01, towards) for k in (keep, keep[perm]))
    assert torch.allclose(a[:, perm], b, rtol=1e-8, atol=1e-8)


@given(problems(), st.sampled_from([1e-6, 1., 1e6]))
def test_units_of_the_inputs_do_not_matter(problem, scale):
    X, W, keep = problem
    a, b = restore_columns(W, X.T @ X, keep), restore_columns(W, (scale*X).T @ (scale*X), keep)
    assert torch.allclose(a, b, rtol=1e-6, atol=1e-6)


@given(problems())
def test_keeping_everything_towards_weights_changes_nothing(problem):
    X, W, _ = problem
    every = torch.arange(W.shape[1])
    assert torch.allclose(restore_columns(W, X.T @ X, every, .01), W, atol=1e-7)


def test_inputs_are_not_changed():
    X, W, keep = torch.randn(30, 6), torch.randn(3, 6), torch.tensor([0, 2, 5])
    C = X.T @ X
    old = [t.clone() for t in (W, C, keep)]
    restore_columns(W, C, keep)
    assert all(torch.equal(a, b) for a, b in zip((W, C, keep), old))


# ---- awkward matrices -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize('towards', ['weights', 'zero'])
@pytest.mark.parametrize('damp', [0, 1e-14, .01])
def test_rank_deficient_inputs(towards, damp):
    "Copies of channels, fewer tokens than channels: solved, and if the damping had to be raised, said so."
    X = torch.randn(4, 3, dtype=f64, generator=torch.Generator().manual_seed(0)).repeat(1, 4)
    W, keep = torch.randn(5, 12, dtype=f64, generator=torch.Generator().manual_seed(1)), torch.arange(0, 11)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        U = restore_columns(W, X.T @ X, keep, damp, towards)
    assert U.isfinite().all()
    assert error(U, X, W, keep) <= (.2 if damp == .01 else 1e-3)*(X @ W.T).norm()
    assert all('damping is raised' in str(w.message) for w in caught)
    if damp == .01: assert not caught


def test_an_indefinite_matrix_is_damped_aloud():
    A = torch.diag(torch.tensor([3., 2., -1.]))             # mean diagonal 4/3
    with pytest.warns(UserWarning, match='damping is raised'): X = ridge_solve(A, torch.ones(3, 1))
    assert torch.allclose(X.flatten(), 1/(A.diag().double() + 4/3))


@pytest.mark.parametrize('damp', [1e-6, .01, 1])
def test_dead_inputs(damp):
    "A kept channel that was never active keeps its weights; a removed one takes nothing along."
    X = torch.randn(40, 8, dtype=f64, generator=torch.Generator().manual_seed(0))
    X[:, [1, 4]] = 0
    W, keep = torch.randn(3, 8, dtype=f64, generator=torch.Generator().manual_seed(1)), torch.tensor([0, 1, 2, 6])
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        U, Z = (restore_columns(W, X.T @ X, keep, damp, t) for t in ('weights', 'zero'))
    assert torch.allclose(U[:, 1], W[:, 1]) and torch.equal(Z[:, 1], torch.zeros(3, dtype=f64))
    live = [i for i in range(8) if i not in (1, 4)]
    other = restore_columns(W[:, live], (X.T @ X)[live][:, live], torch.tensor([0, 1, 4]), damp*3/4)      # the mean diagonal is over 3, not 4
    assert torch.allclose(U[:, [0, 2, 3]], other)


def test_only_dead_inputs_left():
    C = torch.zeros(4, 4)
    C[0, 0] = 1
    W = torch.arange(8.).view(2, 4)
    assert torch.equal(restore_columns(W, C, torch.tensor([1, 2])), W[:, 1:3])                # nothing is known of them: the old weights
    assert torch.equal(restore_columns(W, C, torch.tensor([1, 2]), towards='zero'), torch.zeros(2, 2))
    with pytest.raises(ValueError, match='no finite, non-zero input'): ridge_solve(torch.zeros(3, 3), torch.ones(3, 1))   # but that is a contradiction


@pytest.mark.parametrize('value', [float('nan'), float('inf')])
def test_inputs_that_are_not_finite(value):
    with pytest.raises(ValueError, match='no finite, non-zero input'): restore_columns(torch.ones(2, 4), torch.diag(torch.tensor([1., 1., value, 1.])), torch.arange(4))


@pytest.mark.parametrize('damp', [float('nan'), float('inf')])
def test_damping_that_is_no_number_ends(damp):
    "It must not be raised for ever. (A warning is made an error here, so that this test ends in any case.)"
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        with pytest.raises(ValueError, match='damp'): ridge_solve(torch.eye(3), torch.ones(3, 1), damp)


def test_a_matrix_with_nan_beside_the_diagonal_ends():
    A = torch.eye(3)
    A[0, 1] = A[1, 0] = float('nan')
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        with pytest.raises(ValueError, match='finite'): ridge_solve(A, torch.ones(3, 1))


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize('towards', ['weights', 'zero'])
def test_weights_keep_their_precision(dtype, towards):
    "The change is solved for, in float32 where the ridge is not weak, and rounded once."
    X = torch.randn(60, 10, generator=torch.Generator().manual_seed(0))
    W, keep, C = torch.randn(4, 10, generator=torch.Generator().manual_seed(1)).to(dtype), torch.tensor([0, 3, 4, 5, 8]), X.T @ X
    U = restore_columns(W, C, keep, .01, towards)
    assert U.dtype == dtype
    exact = restore_columns(W.double(), C.double(), keep, .01, towards)
    spacing = torch.finfo(dtype).eps*exact.abs() + 1e-6*(exact - W[:, keep].double()).norm()
    assert ((U.double() - exact).abs() <= spacing).all()


def test_a_weak_ridge_is_solved_in_float64():
    X = torch.randn(60, 10, generator=torch.Generator().manual_seed(0))
    W, keep, C = torch.randn(4, 10, generator=torch.Generator().manual_seed(1)), torch.tensor([0, 3, 4, 5, 8]), X.T @ X
    assert torch.equal(restore_columns(W, C, keep, 1e-9), restore_columns(W.double(), C.double(), keep, 1e-9).float())


def test_float64_is_taken_where_float32_fails():
    "Positive definite, but not after rounding to float32."
    A = torch.ones(2, 2, dtype=torch.float64) + 1e-9*torch.eye(2, dtype=torch.float64)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        X = ridge_solve(A, torch.ones(2, 1, dtype=torch.float64), 0., dtype=torch.float32)
    assert X.dtype == torch.float64 and torch.allclose(A @ X, torch.ones(2, 1, dtype=torch.float64))


def test_targets_have_names():
    with pytest.raises(ValueError, match="towards is 'nowhere'"): restore_columns(torch.ones(2, 3), torch.eye(3), torch.tensor([0]), towards='nowhere')

"""Bonsai: sub-models against masks of zeros, regressions against definitions, the log against a killed process, two workers against one."""
import copy
import json
import os
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch
from helpers import tiny_model
from together import needs_fork, together
from test_conformance import MODELS, build
from prunebook.bonsai import (_PRIORS, Bonsai, _EvaluationLog, _hadamard, _in_play, prior_scores, _published_pairs, _relative_size,
                              _orthogonal_pairs, sub_model_losses)
from prunebook.cli import main
from prunebook.couplings import anatomy, couplings, masked, slice_units
from prunebook.evaluate import window_losses
from prunebook.methods import METHODS, Run, as_method
from prunebook.pruning import prune
from prunebook.regression import _L1_GRID, _fit_l1, _fit_levels, _kendall_tau
from prunebook.submodels import _WORST, _split, _wide, sub_model, token_loss
from prunebook.models import TINY, decoder_linears, n_parameters, tiny_model as build_model
from prunebook.plan import PrunePlan
from prunebook.fasp import FASP
from prunebook.sources import InMemory
from prunebook.stream import Context
from prunebook.text import Windows
from prunebook.walk import processes

pytestmark = pytest.mark.usefixtures('one_thread')
KINDS = [('mlp_channel', 'kv_group'), ('mlp_channel', 'value_channel'), ('mlp_channel', 'query_head'), ('kv_group',), ('mlp_channel',)]
QUICK = dict(units=('mlp_channel', 'kv_group'), evaluations=8, step=.1, windows=2, seqlen=16)


def windows(n=8, seqlen=16, seed=0): return Windows(torch.randint(3, 97, (n, seqlen), generator=torch.Generator().manual_seed(seed)), f'random {seed}')
def generator(seed=0): return torch.Generator().manual_seed(seed)
def n_units(table): return sum(c.n_units for c in table)


def some_gone(table, share=.4, seed=0):
    "Units to leave out, equally many in every group, never all."
    gone = torch.rand(n_units(table), generator=generator(seed)) < share
    for c, g in zip(table, _split(gone, table)):
        g.view(c.groups, -1)[:] = g[:c.n_units//c.groups].clone()
        g.view(c.groups, -1)[:, 0] = False
    return gone


def kept_of(table, gone): return {c.name: (~g).nonzero().flatten().tolist() for c, g in zip(table, _split(gone, table))}


# ---- sub-models -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('kinds', KINDS, ids='-'.join)
@pytest.mark.parametrize('family', TINY)
def test_a_sub_model_computes_what_a_mask_of_zeros_computes(family, kinds):
    m, w = tiny_model(family), windows(2)
    try: table = couplings(m, kinds)
    except ValueError: pytest.skip('one query head per key-value head')
    before = {n: t.clone() for n, t in m.state_dict().items()}
    with torch.no_grad():
        dense, gone = m(w.ids).logits, some_gone(table)
        if not gone.any(): pytest.skip('a single unit')
        with masked(m, kept_of(table, gone)): expected = m(w.ids).logits
        with sub_model(m, table, gone): found = m(w.ids).logits
        assert torch.allclose(found, expected, rtol=1e-4, atol=1e-4*expected.abs().max().item())
        assert not torch.allclose(found, dense, rtol=1e-4, atol=1e-3)
        assert torch.equal(m(w.ids).logits, dense)                                           # attributes and forwards are back
    assert all(torch.equal(t, before[n]) for n, t in m.state_dict().items())


FUSED = [(family, variant) for family in ('phi3', 'gpt_neox') for variant in range(len(MODELS[family][1]))]


@pytest.mark.parametrize('kinds', [*KINDS, ('value_channel',), ('query_head',)], ids='-'.join)
@pytest.mark.parametrize('family, variant', FUSED)
def test_a_sub_model_of_fused_matrices_is_the_sliced_model(family, variant, kinds):
    "Queries, keys and values in one matrix, stacked or interleaved, and gate and up in one."
    m, w = build(family, variant), windows(2)
    try: table = couplings(m, kinds)
    except ValueError: pytest.skip('one query head per key-value head')
    gone = some_gone(table)
    if not gone.any(): pytest.skip('a single unit')
    known = [dict(vars(m.get_submodule(b.attention))) for b in anatomy(m)]
    with torch.no_grad():
        dense, expected = m(w.ids).logits, slice_units(copy.deepcopy(m), kept_of(table, gone))(w.ids).logits
        with sub_model(m, table, gone): found = m(w.ids).logits
        assert torch.allclose(found, expected, rtol=1e-4, atol=1e-4*expected.abs().max().item())
        assert not torch.allclose(found, dense, rtol=1e-4, atol=1e-3) and torch.equal(m(w.ids).logits, dense)
    assert [dict(vars(m.get_submodule(b.attention))) for b in anatomy(m)] == known           # attributes and configuration, too


@pytest.mark.parametrize('family', ['phi3', 'gpt_neox'])
def test_a_sub_model_of_a_sliced_model(family):
    "Attributes that a cut has set before are those of the module afterwards."
    m, w = build(family, len(MODELS[family][1]) - 1), windows(2)
    slice_units(m, {c.name: [0, 1, 3, 5] for c in couplings(m, 'kv_group')})
    table = couplings(m, ('kv_group', 'mlp_channel'))
    gone = some_gone(table, .6)
    with torch.no_grad():
        dense, expected = m(w.ids).logits, slice_units(copy.deepcopy(m), kept_of(table, gone))(w.ids).logits
        with sub_model(m, table, gone): found = m(w.ids).logits
        assert torch.allclose(found, expected, rtol=1e-4, atol=1e-4*expected.abs().max().item()) and torch.equal(m(w.ids).logits, dense)


@pytest.mark.parametrize('kinds', KINDS[:3], ids='-'.join)
@pytest.mark.parametrize('family', ['phi3', 'gpt_neox'])
def test_fused_families_to_the_sparsity_asked_for(family, kinds):
    m, w = build(family, min(1, len(MODELS[family][1]) - 1)), windows()
    try: couplings(m, kinds)
    except ValueError: pytest.skip('one query head per key-value head')
    small, plan = prune(m, w, Bonsai(**{**QUICK, 'units': kinds, 'step': .2}), .3)
    assert .3 <= plan.true_sparsity < .45
    expected = plan.apply(copy.deepcopy(m))
    with torch.no_grad():
        assert small(w.ids).logits.isfinite().all()
        assert torch.allclose(small(w.ids).logits, expected(w.ids).logits, rtol=1e-4, atol=1e-4*small(w.ids).logits.abs().max().item())


def test_sub_models_of_a_model_with_narrow_values():
    "Value channels and key-value groups of a model whose value heads are padded already."
    m, w = tiny_model('llama'), windows(2)
    slice_units(m, {c.name: [i for i in range(c.n_units) if i % 8 < 5] for c in couplings(m, 'value_channel')})
    for kinds in (('value_channel',), ('kv_group',)):
        table = couplings(m, kinds)
        gone = some_gone(table, .6)
        with torch.no_grad():
            with masked(m, kept_of(table, gone)): expected = m(w.ids).logits
            with sub_model(m, table, gone): assert torch.allclose(m(w.ids).logits, expected, atol=1e-4*expected.abs().max().item())


def test_a_model_is_whole_after_an_error_inside():
    m, w = tiny_model('gpt2'), windows(1)
    table = couplings(m)
    dense = m(w.ids).logits
    with pytest.raises(RuntimeError, match='inside'), sub_model(m, table, some_gone(table)): raise RuntimeError('inside')
    assert torch.equal(m(w.ids).logits, dense)
    with pytest.raises(ValueError, match='0.kv_group: at least one unit'), sub_model(m, table, torch.ones(n_units(table), dtype=bool)): pass
    assert torch.equal(m(w.ids).logits, dense)


@pytest.mark.parametrize('n, gone', [(40, 11), (40, 8), (15, 3), (33, 32), (100, 0)])
def test_widths_are_multiples_of_16_where_there_are_units_left(n, gone):
    mask = torch.randperm(n, generator=generator()) < gone
    units, real = _wide(mask)
    assert real == n - gone and set(units[:real].tolist()) == set((~mask).nonzero().flatten().tolist())
    assert len(set(units.tolist())) == len(units) and (len(units) % 16 == 0 or len(units) == n) and len(units) - real < 16


def test_no_graph_is_ever_built(monkeypatch):
    "Nothing that a forward pass returns or a run leaves needs a gradient, though the parameters do."
    m, seen = tiny_model('llama'), []
    m.register_forward_hook(lambda mod, a, out: seen.append(out.logits.requires_grad))
    assert all(p.requires_grad for p in m.parameters())
    monkeypatch.setattr(torch.Tensor, 'backward', lambda *a, **kw: pytest.fail('backward'))
    for estimator in ('levels', 'l1'):
        small, _ = prune(m, windows(), Bonsai(estimator=estimator, **QUICK), .2, inplace=True)
        assert all(p.requires_grad and p.grad is None for p in small.parameters())
    assert len(seen) > 16 and not any(seen)


def test_token_loss_is_the_mean_loss_and_is_clipped():
    m, w = tiny_model('qwen2'), windows(5)
    assert token_loss(m, w.ids, 2) == pytest.approx(window_losses(m, w).mean().item(), rel=1e-6)
    m.model.norm.weight.data.fill_(float('nan'))
    assert token_loss(m, w.ids) == _WORST
    m.model.norm.weight.data.fill_(1e6)
    assert token_loss(m, w.ids) == _WORST


# ---- priors and masks -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize('kind', ['mlp_channel', 'kv_group'])
def test_priors_by_their_definition(kind):
    m, w = tiny_model('llama'), windows()
    table, X = couplings(m, kind), []
    second = m.get_submodule(table[0].second[0])
    hook = second.register_forward_pre_hook(lambda mod, a: X.append(a[0].flatten(0, -2)))
    with torch.no_grad(): m(w.ids)
    hook.remove()
    W, X, columns = second.weight.detach(), X[0], table[0].second[1]
    by_hand = dict(wanda=lambda j: W[:, j].abs().mean()*X[:, j].square().mean().sqrt(), magnitude=lambda j: X[:, j].abs().mean(), output=lambda j: W[:, j].square().sum()*X[:, j].square().mean())
    for prior, f in by_hand.items():
        expected = torch.stack([torch.stack([f(j) for j in c]).sum()/(1 if prior == 'output' else len(c)) for c in columns])
        assert torch.allclose(prior_scores(m, w, table, prior, 3)[:len(columns)], expected.double(), rtol=1e-4)
    r = prior_scores(m, w, table, 'random', seed=3)
    assert torch.equal(r, prior_scores(m, w, table, 'random', seed=3)) and not torch.equal(r, prior_scores(m, w, table, 'random', seed=4))


def test_relative_size_forgets_the_scale_of_a_coupling():
    table = couplings(tiny_model('llama'))
    prior = torch.rand(n_units(table), generator=generator()).double()
    scaled = torch.cat([s*10.**i for i, s in enumerate(_split(prior, table))])
    pool = _in_play(table, prior, .4)
    sizes = _relative_size(table, prior, pool)
    assert torch.allclose(sizes, _relative_size(table, scaled, pool)) and _relative_size(table, 0*prior, ~pool & False).isfinite().all()
    for c, s, p in zip(table, _split(sizes, table), _split(pool, table)): assert s[p].mean().item() == pytest.approx(c.cost/1e6)


@pytest.mark.parametrize('kinds', KINDS[:3], ids='-'.join)
@pytest.mark.parametrize('share', [.1, .5, 1.])
@pytest.mark.parametrize('design', [_orthogonal_pairs, _published_pairs])
def test_masks_are_complementary_in_play_and_leave_a_unit(design, share, kinds):
    table = couplings(tiny_model('llama'), kinds)
    prior = torch.rand(n_units(table), generator=generator()).double()
    pool = _in_play(table, prior, share, design is _published_pairs)
    masks = design(table, prior, pool, share, 20, generator(1))
    assert masks.shape == (20, 2, n_units(table)) and not (masks.any(1) & ~pool).any() and not (masks[:, 0] & masks[:, 1]).any()
    assert not any(m.all(-1).any() for m in _split(masks, table))
    again = design(table, prior, pool, share, 20, generator(1))
    assert torch.equal(masks, again) and not torch.equal(masks, design(table, prior, pool, share, 20, generator(2)))


@pytest.mark.parametrize('pairs, parts', [(8, 1), (16, 2), (64, 10)])
def test_parts_leave_together_by_orthogonal_signs(pairs, parts):
    table = couplings(build_model('llama', intermediate_size=160), 'mlp_channel')*2          # six couplings of 160 units
    prior = torch.rand(n_units(table), generator=generator()).double()
    pool = _in_play(table, prior, .4)
    masks = _orthogonal_pairs(table, prior, pool, .4, pairs, generator())
    assert masks.float().mean().item() == pytest.approx(.2) and torch.equal(masks.any(1), pool.expand(pairs, -1))
    signs = []
    for m, s, p in zip(_split(masks[:, 0], table), _split(prior, table), _split(pool, table)):
        play = m[:, s.argsort()[p[s.argsort()]]]                                             # units in play, by rank
        ends = [-(-64*i//parts) for i in range(parts + 1)]
        for a, b in zip(ends, ends[1:]):
            assert torch.equal(play[:, a:b], play[:, a:a + 1].expand(-1, b - a))
            signs.append(2*play[:, a].double() - 1)
    S = torch.stack(signs)
    assert torch.equal(S @ S.T, pairs*torch.eye(len(S)).double())


def test_the_published_design_as_published():
    "int(pN) + 1 units of every coupling, only among the last 2pN by the prior, the weak ones more often."
    table = couplings(build_model('llama', intermediate_size=100), 'mlp_channel')
    prior = torch.arange(100.).double().repeat(3)
    pool = _in_play(table, prior, .2, published=True)
    assert pool.view(3, 100).sum(1).tolist() == [20]*3 and pool[:20].all()
    masks = _published_pairs(table, prior, pool, .2, 300, generator())
    assert (masks[:, 0].view(300, 3, 100).sum(-1) == 11).all() and (masks[:, 1].view(300, 3, 100).sum(-1) == 9).all()
    assert masks[:, 0, :10].float().mean() > masks[:, 0, 10:20].float().mean()


def test_hadamard():
    for n in (1, 2, 5, 64): assert torch.equal(_hadamard(n).T @ _hadamard(n), len(_hadamard(n))*torch.eye(len(_hadamard(n)))) and len(_hadamard(n)) >= n


# ---- regressions ----------------------------------------------------------------------------------------------------

def test_kendall_tau():
    a, g = torch.randn(40, generator=generator()), generator(1)
    assert _kendall_tau(a, a.exp()) == pytest.approx(1) and _kendall_tau(a, -a) == pytest.approx(-1) and _kendall_tau(a, 0*a) == 0
    stats = pytest.importorskip('scipy.stats')
    for ties in (False, True):
        b = torch.randn(40, generator=g)
        if ties: a, b = (2*a).round(), (2*b).round()
        assert _kendall_tau(a, b) == pytest.approx(stats.kendalltau(a, b).statistic)


def planted(n=60, m=400, noise=.1, seed=0):
    "A toy of two couplings whose factors, and units, differ from the prior."
    g = generator(seed)
    size, member = torch.rand(n, generator=g).double() + .2, torch.arange(n)*4//n
    w = size*torch.tensor([.5, 1., 2., 4.]).double()[member]*(1 + .3*torch.randn(n, generator=g)).clamp(min=.1)
    half = torch.rand(m//2, n, generator=g) < .5
    X = torch.stack([half, ~half], 1).flatten(0, 1)
    return X, X.double() @ w + noise*torch.randn(m, generator=g), w, size, member, torch.zeros(n, dtype=int), torch.arange(m)//2


def test_planted_coefficients_are_recovered():
    X, y, w, *structure = planted()
    fit = _fit_levels(X, y, *structure)
    assert _kendall_tau(fit.coefficients, w) >= .9 and _kendall_tau(structure[0], w) < .7
    assert _kendall_tau(_fit_l1(X, y, grid=[(0., .1, 32)]).coefficients, w) >= .6


def test_few_observations_still_beat_the_prior():
    taus = [[_kendall_tau(_fit_levels(X, y, *s).coefficients, w), _kendall_tau(s[0], w)] for X, y, w, *s in (planted(m=24, noise=1., seed=i) for i in range(5))]
    assert all(a > b + .1 for a, b in taus)


def test_levels_against_leaving_one_pair_out():
    X, y, w, size, member, kind, pair = planted(m=20)
    fit, U = _fit_levels(X, y, size, member, kind, pair, spreads=(.5,), steps=0), X.double()*size
    Z, one_hot = U @ torch.nn.functional.one_hot(member).double(), torch.nn.functional.one_hot(pair).double()
    K = .5*Z @ Z.T/(Z @ Z.T).diag().mean() + .5*U @ U.T/(U @ U.T).diag().mean() + .5*one_hot @ one_hot.T
    for p in (0, 3, 9):
        rest = pair != p
        A, F = K[rest][:, rest] + torch.eye(18), U.sum(1, keepdim=True)
        half = torch.linalg.cholesky(A.inverse()).T
        theta = torch.linalg.lstsq(half @ F[rest], (half @ y[rest])[:, None]).solution[:, 0]
        expected = F[~rest] @ theta + K[~rest][:, rest] @ torch.linalg.solve(A, y[rest] - F[rest] @ theta)
        assert torch.allclose(expected, fit.held_out[~rest], rtol=1e-6)


def test_what_a_pair_shares_is_not_blamed_on_units():
    X, y, w, *structure = planted(m=160, noise=.05)
    y = y + 5*torch.randn(80, generator=generator(3)).double().repeat_interleave(2)
    known, unknown = _fit_levels(X, y, *structure), _fit_levels(X, y, *structure[:-1], torch.arange(160))
    assert known.info['pairs'] > 1 and (known.coefficients - w).norm() < .3*(unknown.coefficients - w).norm()


def test_a_regression_survives_equal_losses_and_constant_designs():
    X, y, w, *structure = planted(m=20)
    for X, y in ((X, 0*y + 3), (torch.zeros_like(X), y), (X[:1].expand(20, -1), y)):
        fit = _fit_levels(X, y, *structure)
        assert fit.coefficients.isfinite().all() and fit.predict(X).isfinite().all() and fit.held_out.isfinite().all()


def test_the_published_grid(): assert len(_L1_GRID) == 36


# ---- the method -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('kinds', KINDS[:3], ids='-'.join)
@pytest.mark.parametrize('family', TINY)
def test_every_family_to_the_sparsity_asked_for(family, kinds):
    m, w = tiny_model(family), windows()
    try: couplings(m, kinds)
    except ValueError: pytest.skip('one query head per key-value head')
    small, plan = prune(m, w, Bonsai(**{**QUICK, 'units': kinds, 'step': .2}), .3)
    total = n_parameters(decoder_linears(m).values())
    assert plan.true_sparsity == 1 - n_parameters(decoder_linears(small).values())/total >= .3
    assert all(len(k) for k in plan.kept.values()) and all(len(plan.scores[n]) == plan.units[n] for n in plan.kept)
    expected = plan.apply(copy.deepcopy(m))                                                  # rounds of slicing are one slicing
    with torch.no_grad(): assert torch.allclose(small(w.ids).logits, expected(w.ids).logits, atol=1e-5)


@pytest.mark.parametrize('estimator', ['levels', 'l1', 'prior'])
def test_seventy_percent(estimator):
    small, plan = prune(tiny_model('llama'), windows(), Bonsai(estimator=estimator, **QUICK), .7)
    assert .7 <= plan.true_sparsity < .8


def test_couplings_with_one_unit():
    m = build_model('llama', intermediate_size=1, num_key_value_heads=1)
    with pytest.raises(ValueError, match='cannot be reached'): prune(m, windows(), Bonsai(**QUICK), .1)
    m = build_model('llama', intermediate_size=40, num_key_value_heads=1)
    small, plan = prune(m, windows(), Bonsai(**QUICK), .2)
    assert all(plan.kept[f'{i}.kv_group'] == [0] for i in range(3)) and plan.true_sparsity >= .2


def test_the_published_mode_runs_and_may_stop_early():
    m = Bonsai.published(evaluations=8)
    assert (m.prior, m.design, m.estimator, m.target, m.step, m.tolerance) == ('wanda', 'published', 'l1', 'perplexity', .05, .02)
    assert Bonsai.published().evaluations == 200
    _, plan = prune(tiny_model('opt', ffn_dim=200), windows(), m, .2)
    assert .18 <= plan.true_sparsity < .22
    assert all(len(torch.unique(h['losses'])) > 2 for h in m.history)


def test_repair_is_least_squares_in_the_pruned_model():
    m, w = tiny_model('llama'), windows(16)
    cut, plan = prune(m, w, Bonsai(**QUICK), .2)
    restored, again = prune(m, w, Bonsai(restore=True, damp=.1, **QUICK), .2)
    assert plan.kept == again.kept
    def fitted(damp):
        "The dense model cut to the same units by the stream of another method."
        other = copy.deepcopy(m)
        Context(InMemory(other), w, .2).stream(FASP(units=QUICK['units'], damp=damp, ridge='mean'), given=plan.kept)
        return other
    expected = fitted(.1)
    with torch.no_grad():
        a, b, c, dense = (x(w.ids).logits for x in (restored, expected, cut, m))
    assert torch.equal(a, b) and (a - dense).norm() < (c - dense).norm()
    default, _ = prune(m, w, Bonsai(restore=True, **QUICK), .2)
    with torch.no_grad(): assert torch.equal(default(w.ids).logits, fitted(None)(w.ids).logits)


def test_runs_repeat_and_seeds_differ():
    m, w = tiny_model('qwen3'), windows()
    plans = [prune(m, w, Bonsai(seed=s, **QUICK), .2)[1] for s in (0, 0, 1)]
    assert plans[0] == plans[1] and plans[0].scores != plans[2].scores


@pytest.mark.parametrize('setting, message', [
    (dict(evaluations=6), 'evaluations is 6; it is an even number of sub-models'), (dict(evaluations=9), 'even'), (dict(evaluations=True), 'evaluations'),
    (dict(step=0), 'step'), (dict(step=1.5), 'step'), (dict(windows=0), 'windows is 0'), (dict(seqlen=1), 'seqlen is 1'), (dict(prior='none'), '"output", "wanda"'),
    (dict(design='none'), '"orthogonal", "published"'), (dict(target='none'), '"loss", "perplexity"'), (dict(estimator='none'), '"levels", "l1", "prior"'), (dict(tolerance=1), 'tolerance'),
    (dict(damp=-1), 'damp')])
def test_what_is_refused(setting, message):
    m = tiny_model('llama')
    with pytest.raises(ValueError, match=message): prune(m, windows(), Bonsai(**setting), .2)


def test_names_and_the_plan(tmp_path):
    assert type(as_method('bonsai')) is Bonsai and METHODS['bonsai'] is Bonsai
    _, plan = prune(tiny_model('llama'), windows(), Bonsai(**QUICK), .2)
    plan.save(tmp_path/'plan.json')
    assert PrunePlan.load(tmp_path/'plan.json') == plan and plan.settings['units'] == ['mlp_channel', 'kv_group']


@pytest.mark.parametrize('estimator', ['levels', 'l1'])
def test_summary_is_plain_and_true(estimator):
    m = Bonsai(estimator=estimator, **QUICK)
    prune(tiny_model('llama'), windows(), m, .2)
    s = json.loads(json.dumps(m.summary()))
    assert len(s) == 2 and all(r['evaluations'] == 8 == len(r['rise']) == len(r['held_out']) and -1 <= r['tau'] <= 1 for r in s)


# ---- the log --------------------------------------------------------------------------------------------------------

def test_a_finished_log_answers_everything(tmp_path, monkeypatch):
    m, w, log = tiny_model('llama'), windows(), str(tmp_path/'deep'/'log.jsonl')
    _, plan = prune(m, w, Bonsai(**QUICK), .2, run=Run(log=log))
    lines = Path(log).read_text().splitlines()
    assert len(lines) == 1 + 2*9 and json.loads(lines[0])['sparsity'] == .2
    monkeypatch.setattr('prunebook.bonsai.token_loss', lambda *a: pytest.fail('evaluated again'))
    assert prune(m, w, Bonsai(**QUICK), .2, run=Run(log=log))[1] == plan
    assert prune(m, w, Bonsai(restore=True, **QUICK), .2, run=Run(log=log))[1].kept == plan.kept      # the repair may differ


@pytest.mark.parametrize('cut', [1, 20, 60])
def test_a_torn_line_is_cut_back(tmp_path, cut):
    m, w, log = tiny_model('llama'), windows(), tmp_path/'log.jsonl'
    _, plan = prune(m, w, Bonsai(**QUICK), .2, run=Run(log=str(log)))
    whole = log.read_bytes()
    log.write_bytes(whole[:-cut])
    with pytest.warns(UserWarning, match='torn'): assert prune(m, w, Bonsai(**QUICK), .2, run=Run(log=str(log)))[1].kept == plan.kept
    assert log.read_bytes() == whole


def test_a_torn_header_begins_anew(tmp_path):
    m, w, log = tiny_model('llama'), windows(), tmp_path/'log.jsonl'
    prune(m, w, Bonsai(**QUICK), .1, run=Run(log=str(log)))
    whole = log.read_bytes()
    log.write_bytes(whole[:30])
    with pytest.warns(UserWarning, match='torn'): prune(m, w, Bonsai(**QUICK), .1, run=Run(log=str(log)))
    assert log.read_bytes() == whole


def test_other_logs_are_refused(tmp_path):
    m, w, log = tiny_model('llama'), windows(), tmp_path/'log.jsonl'
    run = lambda m=m, w=w, s=.2, **kw: prune(m, w, Bonsai(**{**QUICK, **kw}), s, run=Run(log=str(log)))
    run()
    whole = log.read_bytes()
    for call, message in [(dict(m=tiny_model('llama', seed=1)), 'differs in model'), (dict(w=windows(seed=1)), 'differs in calibration'), (dict(s=.3), 'differs in sparsity'),
                          (dict(seed=5), 'differs in settings'), (dict(m=tiny_model('llama').bfloat16()), 'differs in')]:
        with pytest.raises(ValueError, match=f'{message}.*delete it'): run(**call)
    lines = whole.splitlines(keepends=True)
    log.write_bytes(b''.join([lines[0], lines[1], lines[2].replace(b'"mask": "', b'"mask": "f')]))
    with pytest.raises(ValueError, match='another sub-model'): run()
    for bad in (b'not a log\n', b'{"other": 1}\n', b'half', lines[0] + b'nonsense\n' + lines[1]):
        log.write_bytes(bad)
        with pytest.raises(ValueError, match='log'): run()
        assert log.read_bytes() == bad                                                       # nothing of another file is lost


JOB = '''
import sys, time, torch
import prunebook.bonsai as b
from prunebook.methods import Run
from prunebook.pruning import prune
from prunebook.models import tiny_model
from prunebook.plan import write_atomic
from prunebook.text import Windows
torch.set_num_threads(1)
slow, f = float(sys.argv[3]), b.token_loss
b.token_loss = lambda *a: (time.sleep(slow), f(*a))[1]
w = Windows(torch.randint(3, 97, (8, 16), generator=torch.Generator().manual_seed(0)), 'random')
small, plan = prune(tiny_model('llama'), w, b.Bonsai(units=('mlp_channel', 'kv_group'), evaluations=16, step=.1, windows=2, seqlen=16), .2, run=Run(log=sys.argv[1] or None))
if b.processes()[0] == 0: plan.save(sys.argv[2])
'''


def start(tmp_path, log, out, slow):
    (tmp_path/'job.py').write_text(JOB)
    env = {**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(Path(__file__).parent.parent)}
    return subprocess.Popen([sys.executable, str(tmp_path/'job.py'), str(log), str(out), str(slow)], env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def here(log=None):
    _, plan = prune(tiny_model('llama'), windows(), Bonsai(**{**QUICK, 'evaluations': 16}), .2, run=Run(log=log))
    return plan


def test_a_killed_run_goes_on(tmp_path):
    log, out = tmp_path/'log.jsonl', tmp_path/'plan.json'
    p = start(tmp_path, log, out, .3)
    deadline = time.time() + 600
    while not (log.exists() and log.read_bytes().count(b'\n') >= 6) and time.time() < deadline and p.poll() is None: time.sleep(.02)
    p.kill()
    p.communicate()
    before = log.read_bytes()
    assert p.returncode and not out.exists() and 6 <= before.count(b'\n') < 30
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')                                                      # the last line may be torn
        _, plan = prune(tiny_model('llama'), windows(), Bonsai(**{**QUICK, 'evaluations': 16}), .2, run=Run(log=str(log)))
    assert plan.kept == here().kept and plan.scores == here().scores
    assert log.read_bytes().startswith(before[:before.rfind(b'\n') + 1]) and log.read_bytes().count(b'\n') == 1 + 2*18


@needs_fork
def test_two_workers_find_what_one_finds(tmp_path):
    log, out = tmp_path/'log.jsonl', tmp_path/'plan.json'
    def worker():
        plan = here(str(log))
        if processes()[0] == 0: plan.save(out)
    assert together(worker, 2) == [0, 0]
    plan, expected = PrunePlan.load(out), here()
    assert plan.kept == expected.kept and plan.scores == expected.scores
    records = [json.loads(l) for l in log.read_text().splitlines()[1:]]
    assert sorted((r['round'], r['evaluation']) for r in records) == [(k, i) for k in range(2) for i in range(18)]


# ---- memory and the command line ------------------------------------------------------------------------------------

MEMORY = '''
import os, torch
from prunebook.couplings import couplings
from prunebook.submodels import sub_model, token_loss
from prunebook.evaluate import peak_memory
from prunebook.models import tiny_model
torch.set_num_threads(1)
m = tiny_model('llama', hidden_size=384, intermediate_size=1536, num_hidden_layers=8, num_attention_heads=6, num_key_value_heads=3, vocab_size=8000, max_position_embeddings=256)
table = couplings(m)
share = 0 if (child := os.fork()) else .1                   # each in a process of its own
if child: os.waitpid(child, 0)
gone = torch.cat([torch.arange(c.n_units) < c.n_units*share for c in table])
with peak_memory() as r, sub_model(m, table, gone): token_loss(m, torch.randint(3, 8000, (8, 128), generator=torch.Generator().manual_seed(0)))
print(r['peak'], flush=True)
'''


@needs_fork
def test_memory_is_that_of_inference():
    some_gone, none_gone = map(int, subprocess.run([sys.executable, '-c', MEMORY], capture_output=True, text=True, check=True).stdout.split())
    assert some_gone < 1.1*none_gone


def test_from_the_command_line(tmp_path, tiny_tokenizer, capsys, monkeypatch):
    monkeypatch.delenv('PRUNEBOOK_DATA', raising=False)
    tiny_model('llama', max_position_embeddings=512).save_pretrained(tmp_path/'dense')
    tiny_tokenizer.save_pretrained(tmp_path/'dense')
    code = main(['prune', str(tmp_path/'dense'), '--method', 'bonsai', '--settings', json.dumps({**QUICK, 'units': ['mlp_channel']}), '--sparsity', '0.2', '--text', 'passages',
                 '--n', '4', '--seqlen', '32', '--out', str(tmp_path/'small')])
    out = capsys.readouterr()
    assert code == 0, out.err
    assert 'bonsai plan: 2' in out.out and (tmp_path/'small').exists()

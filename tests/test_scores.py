"""The baselines against brute force, planted orders and finite differences, and what they must do and refuse on every family."""
import copy
import itertools

import pytest
import torch
from helpers import tiny_model
from prunebook import methods
from prunebook.couplings import anatomy, couplings, masked, slice_units, weight_of
from prunebook.fasp import FASP
from prunebook.methods import METHODS, MODULES, Method, Run, as_method
from prunebook.pruning import prune
from prunebook.models import TINY, decoder_linears, n_parameters
from prunebook.plan import PrunePlan
from prunebook.repair import Ridge
from prunebook.save import fits_stock_class, load_pruned, save_pruned
from prunebook.scores import (FLAP, Magnitude, Random, Taylor, WandaSp, _constant_weights, _loss_gradients,
                              _standard_scores, _unit_sums, _weight_times_gradient, channel_moments,
                              fluctuation, sparsify, wanda_mask, with_bias)
from prunebook.sources import InMemory
from prunebook.stream import Context, visits
from prunebook.text import Windows
from prunebook.walk import walk
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

pytestmark = pytest.mark.usefixtures('one_thread')
BOTH, MLP = ('kv_group', 'mlp_channel'), ('mlp_channel',)
FAMILIES = [*[(f, {}) for f in TINY], ('llama', dict(num_key_value_heads=3, attention_bias=False, mlp_bias=False))]
NAMES = ('random', 'magnitude', 'wanda_sp', 'flap', 'taylor')
CUT = [Random(units=BOTH), Magnitude(units=BOTH), WandaSp(), FLAP(restore=False), Taylor()]     # nothing but slicing
ids = lambda m: m.name if isinstance(m, Method) else None


def windows(n=6, seqlen=16, seed=0): return Windows(torch.randint(3, 97, (n, seqlen), generator=torch.Generator().manual_seed(seed)), f'random {seed}')
def snapshot(m): return {n: t.clone() for n, t in m.state_dict().items()}
def same(m, state): return m.state_dict().keys() == state.keys() and all(torch.equal(t, state[n]) for n, t in m.state_dict().items())
def close(a, b, rel): return a.shape == b.shape and (a - b).abs().max().item() <= rel*b.abs().max().item()
def scored(method, m, w, table):
    "Scores of a method on the dense model, by coupling name."
    ctx = Context(InMemory(m), w, .2, table=table, total=total(m))
    ctx.found = method.prepare(ctx)
    return {v.coupling.name: method.score(v) for v in visits(ctx, method.needs)}


def total(m): return n_parameters(decoder_linears(m).values())


@torch.no_grad()
def logits(m, w=windows(2, 12, 9)): return m(w.ids).logits


def inputs(model, name, w):
    "What a linear reads in an ordinary forward pass, (tokens, columns), float64."
    seen = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda m, a: seen.append(a[0].flatten(0, -2).double()))
    logits(model, w)
    handle.remove()
    return torch.cat(seen)


# ---- what all of them promise ---------------------------------------------------------------------------------------

@pytest.mark.parametrize('method', CUT, ids=ids)
@pytest.mark.parametrize('family,config', FAMILIES)
def test_sliced_is_masked_and_the_count_is_right(family, config, method):
    dense, w = tiny_model(family, **config), windows()
    small, plan = prune(dense, w, method, .25)
    with masked(dense, plan.kept): assert close(logits(small), logits(dense), 1e-4)
    true = 1 - total(small)/total(dense)
    largest = sum(c.cost*c.groups for c in couplings(dense, method.units)[:2])*3 if not isinstance(method, FLAP) else max(c.cost*c.groups for c in couplings(dense, method.units))
    assert plan.true_sparsity == pytest.approx(true) and .25 - 1e-9 <= true < .25 + largest/total(dense)
    assert {n: len(s) for n, s in plan.scores.items()} == plan.units
    assert same(plan.apply(copy.deepcopy(dense)), snapshot(small))
    for n, kept in plan.kept.items():                                                       # the kept are the best, in what the plan says
        s, gone = plan.scores[n], set(range(plan.units[n])) - set(kept)
        assert not gone or max(s[i] for i in gone) <= min(s[i] for i in kept)


@pytest.mark.parametrize('method', [*CUT, FLAP(), FLAP(restore='bias'), Random(restore=True), Taylor(restore=True)], ids=ids)
@pytest.mark.parametrize('family', ['llama', 'gpt2'])
def test_the_same_call_gives_the_same_whatever_the_batches(family, method):
    (a, p), (b, q) = (prune(tiny_model(family), windows(), method, .25) for _ in range(2))
    assert p == q and same(a, snapshot(b))
    c, r = prune(tiny_model(family), windows(), method, .25, run=Run(batch_size=2))
    assert r.kept == p.kept and close(logits(c), logits(a), 1e-4)


@pytest.mark.parametrize('method', [Magnitude(), WandaSp(), FLAP(), Taylor(), Taylor(vectorize=True)], ids=ids)
@pytest.mark.parametrize('family', ['llama', 'phi', 'gpt2'])   # in tiny OPT some channels are dead, and equal
def test_the_order_of_channels_does_not_matter(family, method):
    dense, order = tiny_model(family), torch.randperm(37, generator=torch.Generator().manual_seed(3))
    mixed, plan = copy.deepcopy(dense), prune(dense, windows(), method, .25)[1]
    for c in couplings(mixed, 'mlp_channel'):
        for n, _ in c.firsts:
            m = mixed.get_submodule(n)
            weight_of(m).data.copy_(weight_of(m).data[order].clone())
            if m.bias is not None: m.bias.data.copy_(m.bias.data[order].clone())
        W = weight_of(mixed.get_submodule(c.second[0])).data
        W.copy_(W[:, order].clone())
    small, again = prune(mixed, windows(), method, .25)
    for n in plan.kept:
        if n.endswith('mlp_channel'): assert sorted(order[again.kept[n]].tolist()) == plan.kept[n]
        else: assert again.kept[n] == plan.kept[n]
    assert close(logits(small), logits(prune(dense, windows(), method, .25)[0]), 1e-4)


@pytest.mark.parametrize('method', [Magnitude(units=MLP), WandaSp(units=MLP), FLAP(units=MLP), Taylor(units=MLP)], ids=ids)
@pytest.mark.parametrize('family', [f for f in TINY if f != 'opt'])
def test_planted_channels_leave_first(family, method):
    "Channels whose weights are a thousand times smaller are the first to go in every matrix."
    dense, weak = tiny_model(family), [3, 8, 21]
    for c in couplings(dense, 'mlp_channel'):
        for n, _ in c.firsts:
            m = dense.get_submodule(n)
            weight_of(m).data[weak] *= 1e-3
            if m.bias is not None: m.bias.data[weak] *= 1e-3
        weight_of(dense.get_submodule(c.second[0])).data[:, weak] *= 1e-3
    share = sum(3*c.cost for c in couplings(dense, 'mlp_channel'))/total(dense)
    _, plan = prune(dense, windows(), method, share - 1e-6)
    gone = [set(range(37)) - set(k) for k in plan.kept.values()]
    assert sum(map(len, gone)) == 9 and all(g <= set(weak) or g > set(weak) for g in gone)
    if not isinstance(method, FLAP): assert all(g == set(weak) for g in gone)


@pytest.mark.parametrize('family,method', [*[(f, FLAP(restore='bias')) for f in TINY], *itertools.product(['llama', 'gpt2'], [Random(), Magnitude(), WandaSp(), FLAP(), Taylor(restore=True)])])
def test_saved_and_loaded(family, method, tmp_path):
    small, plan = prune(tiny_model(family), windows(), method, .25)
    folder = save_pruned(small, plan, tmp_path/'m')
    loaded, _, again = load_pruned(folder, 'cpu')
    assert same(loaded, snapshot(small)) and torch.equal(logits(loaded), logits(small)) and again == plan


@pytest.mark.parametrize('units', [('value_channel', 'mlp_channel'), ('query_head', 'mlp_channel'), ('kv_group',)])
@pytest.mark.parametrize('method', [Random, Magnitude, WandaSp, FLAP, Taylor])
def test_other_units(method, units):
    dense = tiny_model('llama')
    small, plan = prune(dense, windows(), method(units=units), .12)
    assert plan.true_sparsity >= .12 and logits(small).isfinite().all() and {n.split('.')[1] for n in plan.kept} == set(units)


@pytest.mark.parametrize('method', [*CUT, FLAP()], ids=ids)
def test_spared_blocks_stay_whole(method):
    method = copy.copy(method)
    method.spare = (1, 1)
    dense = tiny_model('llama')
    small, plan = prune(dense, windows(), method, .15)
    shapes = lambda m: [weight_of(l).shape for l in decoder_linears(m).values()]
    third = len(shapes(dense))//3
    assert shapes(small)[:third] == shapes(dense)[:third] and shapes(small)[-third:] == shapes(dense)[-third:]
    assert {n.split('.')[0] for n in plan.kept} == {'1'} and plan.true_sparsity >= .15


@pytest.mark.parametrize('method', CUT, ids=ids)
def test_restoring_is_the_same_fit_as_fasp(method):
    "With the channels given, every method leaves the weights that a least-squares solver finds."
    dense, w = tiny_model('llama', num_hidden_layers=1), windows(12, 20)
    method = type(method)(**{**{k: tuple(v) if isinstance(v, list) else v for k, v in method.settings().items()}, 'units': MLP, 'restore': True, 'damp': 1e-9})
    small, plan = prune(dense, w, method, .15)
    name, kept = anatomy(dense)[0].mlp_second, plan.kept['0.mlp_channel']
    X, W = inputs(dense, name, w), weight_of(dense.get_submodule(name)).data.double()
    U = torch.linalg.lstsq(X[:, kept], X @ W.T).solution.T
    assert len(kept) < 37 and close(weight_of(small.get_submodule(name)).data.double(), U, 1e-2)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
@pytest.mark.parametrize('method', [*CUT, FLAP(), FLAP(restore='bias')], ids=ids)
def test_low_precision(method, dtype):
    small, plan = prune(tiny_model('qwen2').to(dtype), windows(), method, .2)
    full = prune(tiny_model('qwen2'), windows(), method, .2)[1]
    assert {p.dtype for p in small.parameters()} == {dtype} and logits(small).isfinite().all()
    assert all(len(set(k) & set(full.kept[n])) >= .7*len(full.kept[n]) for n, k in plan.kept.items())


@pytest.mark.parametrize('name', NAMES)
def test_by_name_and_zero_sparsity(name):
    assert MODULES[name] == 'prunebook.scores' and type(as_method(name)) is METHODS[name]
    dense = tiny_model('llama')
    small, plan = prune(dense, windows(), name, 0)
    assert same(small, snapshot(dense)) and plan.true_sparsity == 0
    assert PrunePlan(**plan.__dict__).settings == as_method(name).settings()


# ---- what they refuse -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize('method, settings, message', [
    (Magnitude, dict(damp=-1), 'damp is -1'), (WandaSp, dict(spare=(1,)), 'spare is'), (Taylor, dict(spare=(2, 1)), 'leaves none of the 3 blocks'),
    (FLAP, dict(restore='hope'), "restore is 'hope'"), (Taylor, dict(samples=0), 'samples is 0'), (Taylor, dict(seqlen=1), 'seqlen is 1'), (Random, dict(units=('neuron',)), 'Unknown kind')])
def test_bad_settings_change_nothing(method, settings, message):
    m = tiny_model('llama')
    state = snapshot(m)
    with pytest.raises(ValueError, match=message): prune(m, windows(), method(**settings), .2, inplace=True)
    assert same(m, state)


@pytest.mark.parametrize('name', NAMES)
def test_an_unreachable_sparsity_changes_nothing(name):
    m = tiny_model('llama')
    state = snapshot(m)
    with pytest.raises(ValueError, match='cannot be reached'): prune(m, windows(), name, .99, inplace=True)
    assert same(m, state)


@pytest.mark.parametrize('method', [WandaSp(), FLAP(), Taylor()], ids=ids)
def test_training_mode_is_refused(method):
    m = tiny_model('llama').train()
    with pytest.raises(ValueError, match=r'model\.eval'): prune(m, windows(), method, .2)
    with pytest.raises(ValueError, match=r'model\.eval'): sparsify(m, windows(), .5)


# ---- magnitude ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('kind', BOTH)
@pytest.mark.parametrize('family', TINY)
def test_magnitude_is_what_leaves(family, kind):
    "The squared norm of a unit is what the model's squared norm loses with it."
    dense = tiny_model(family)
    c = couplings(dense, kind)[1]
    size = lambda m: sum(p.detach().double().pow(2).sum().item() for l in decoder_linears(m).values() for p in l.parameters())
    scores = scored(Magnitude(), dense, windows(), [c])[c.name].tolist()
    for u in {0, c.n_units - 1} if c.n_units > 1 else ():
        rest = slice_units(copy.deepcopy(dense), {c.name: [i for i in range(c.n_units) if i != u]})
        assert size(dense) - size(rest) == pytest.approx(scores[u]**2, rel=1e-4)


def test_random_does_not_look_at_the_model():
    a, b = (prune(tiny_model('llama', seed=s), windows(seed=s), Random(seed=5), .2)[1] for s in (0, 1))
    assert a.kept == b.kept != prune(tiny_model('llama'), windows(), Random(seed=6), .2)[1].kept


# ---- Wanda ----------------------------------------------------------------------------------------------------------

def brute_mask(W, norms, sparsity=None, n=None, m=None):
    keep = torch.ones_like(W, dtype=bool)
    for i, row in enumerate(W.tolist()):
        s = [abs(x)*y for x, y in zip(row, norms.tolist())]
        groups = [range(len(s))] if sparsity is not None else [range(k, k + m) for k in range(0, len(s), m)]
        for g in groups:
            gone = -(-len(s)*round(sparsity*1000)//1000) if sparsity is not None else m - n
            for j in sorted(g, key=s.__getitem__)[:gone]: keep[i, j] = False
    return keep


@pytest.mark.parametrize('pattern', [dict(sparsity=s) for s in (0, .29, .3, .5, .9)] + [dict(n=n, m=m) for n, m in ((2, 4), (1, 4), (4, 8), (3, 3))])
def test_wanda_mask(pattern):
    draw = torch.Generator().manual_seed(0)
    W, norms = torch.randn(7, 24, generator=draw), torch.rand(24, generator=draw)
    mask = wanda_mask(W, norms, **pattern)
    assert torch.equal(mask, brute_mask(W, norms, **pattern))
    assert torch.equal(wanda_mask(W.T.contiguous().T, norms, **pattern), mask)               # a transposed view, as in GPT-2
    assert len(set(mask.sum(1).tolist())) == 1 and (~mask).float().mean() >= pattern.get('sparsity', 0) - 1e-6


def test_wanda_mask_breaks_ties_exactly():
    assert wanda_mask(torch.ones(3, 8), torch.ones(8), sparsity=.5).sum(1).tolist() == [4, 4, 4]


@pytest.mark.parametrize('pattern,message', [({}, 'either sparsity'), (dict(sparsity=.5, n=2, m=4), 'either sparsity'), (dict(n=2), 'n of m'), (dict(n=5, m=4), 'n of m'),
                                             (dict(sparsity=1.), 'fraction in'), (dict(n=2, m=5), 'groups of 5')])
def test_wanda_patterns_that_cannot_be(pattern, message):
    with pytest.raises(ValueError, match=message): wanda_mask(torch.ones(2, 24), torch.ones(24), **pattern)
    m = tiny_model('llama')
    state = snapshot(m)
    with pytest.raises(ValueError, match=message): sparsify(m, windows(), **pattern)
    assert same(m, state)


@pytest.mark.parametrize('family', TINY)
def test_sparsify_block_after_block(family):
    "Every block's masks come from the inputs that the dense block sees behind the sparse blocks before it."
    dense, w, sparse = tiny_model(family), windows(), tiny_model(family)
    zeros, oracle = sparsify(sparse, w, sparsity=.5, batch_size=4), copy.deepcopy(dense)
    for b in anatomy(oracle):
        names = [n for n in decoder_linears(oracle) if n.startswith(b.name + '.')]
        masks = {n: brute_mask(weight_of(oracle.get_submodule(n)).data, inputs(oracle, n, w).norm(dim=0), .5) for n in names}
        for n, mask in masks.items(): weight_of(oracle.get_submodule(n)).data.mul_(mask)
    agree = [((weight_of(l) != 0) == (weight_of(oracle.get_submodule(n)) != 0)).float().mean().item() for n, l in decoder_linears(sparse).items()]
    assert min(agree) > .995 and close(logits(sparse), logits(oracle), .05) and zeros == pytest.approx(.5, abs=.02) and zeros >= .5
    assert n_parameters([sparse]) == n_parameters([dense]) and not close(logits(sparse), logits(dense), .05)


def test_wanda_sp_is_the_column_score_of_fasp():
    for family in TINY:
        m = tiny_model(family)
        assert prune(m, windows(), WandaSp(units=MLP), .2)[1].kept == prune(m, windows(), FASP(restore=False), .2)[1].kept


@pytest.mark.parametrize('family', ['llama', 'gpt2', 'gemma'])
def test_wanda_sp_by_definition(family):
    dense, w = tiny_model(family), windows()
    plan = prune(dense, w, WandaSp(), .25)[1]
    c = couplings(dense, 'kv_group')[0]
    X, W = inputs(dense, c.second[0], w), weight_of(dense.get_submodule(c.second[0])).data.double()
    expected = [sum((W[:, j].abs().mean()*(X[:, j]**2).sum().div(len(w)).sqrt()).item() for j in u.tolist()) for u in c.second[1]]
    assert plan.scores[c.name] == pytest.approx(expected, rel=1e-4)


# ---- FLAP -----------------------------------------------------------------------------------------------------------

def test_moments_do_not_depend_on_the_batches():
    X = torch.randn(7, 5, 6, generator=torch.Generator().manual_seed(0)) + 100
    for parts in ([X], [X[:2], X[2:3], X[3:]], [X.flatten(0, 1)]):
        mean, variance = channel_moments(parts)
        flat = X.flatten(0, 1).double()
        assert torch.allclose(mean, flat.mean(0)) and torch.allclose(variance, flat.var(0, correction=0), rtol=1e-8)


def test_the_published_running_mean_is_an_alias():
    "The recursion with the true old mean is the sample variance; with the aliased one it is not."
    X = [torch.randn(9, 4, generator=torch.Generator().manual_seed(i), dtype=torch.float64) + i for i in range(6)]
    def run(alias):
        mean, m2, n = torch.zeros(4, dtype=torch.float64), torch.zeros(4, dtype=torch.float64), 0
        for x in X:
            new = (mean*n + x.sum(0))/(n + len(x))
            m2 = m2 + ((x - new)*(x - (new if alias else mean))).sum(0)
            mean, n = new, n + len(x)
        return m2/n
    _, variance = channel_moments([torch.cat(X)])
    assert torch.allclose(run(False), variance) and (run(True) < .95*variance).all()


def test_fluctuation_is_the_least_error_of_a_constant():
    draw = torch.Generator().manual_seed(0)
    X, W = torch.randn(300, 4, generator=draw).double() + 2, torch.randn(3, 4, generator=draw).double()
    _, variance = channel_moments([X])
    for j in range(4):
        best = min((((X[:, j] - c)**2).mean()*(W[:, j]**2).sum()).item() for c in torch.linspace(1, 3, 2001))
        assert fluctuation(W, variance)[j].item() == pytest.approx(best, rel=1e-5)


def brute_flap(dense, w, sparsity, square=True):
    "Units in the order of their z-scores, from the bottom, until enough parameters are gone."
    z, costs = {}, {}
    for c in couplings(dense, BOTH):
        X, W = inputs(dense, c.second[0], w), weight_of(dense.get_submodule(c.second[0])).data.double()
        s = X.var(0, correction=0)*(W**2).sum(0)
        if square and c.kind == 'kv_group': s = s**2
        s = (s - s.mean())/s.std()
        for u, columns in enumerate(c.second[1].tolist()): z[c.name, u], costs[c.name, u] = s[columns].mean().item(), c.cost
    left, gone, removed = {c.name: c.n_units for c in couplings(dense, BOTH)}, set(), 0
    for key in sorted(z, key=z.get):
        if removed >= sparsity*total(dense): break
        if left[key[0]] == 1: continue
        gone.add(key); left[key[0]] -= 1; removed += costs[key]
    return {n: [u for (name, u) in z if name == n and (n, u) not in gone] for n in left}


@pytest.mark.parametrize('square', [True, False])
@pytest.mark.parametrize('family,config', FAMILIES)
def test_flap_allocation(family, config, square):
    dense, w = tiny_model(family, **config), windows()
    plan = prune(dense, w, FLAP(square_attention=square), .3)[1]
    assert plan.kept == brute_flap(dense, w, .3, square)
    assert all(plan.kept.values())


@pytest.mark.parametrize('family', TINY)
def test_flap_keeps_a_unit_of_each_kind(family):
    dense = tiny_model(family)
    most = sum(c.cost*(c.n_units - 1) for c in couplings(dense, BOTH))/total(dense)
    small, plan = prune(dense, windows(), FLAP(), most - 1e-6)
    assert all(len(k) == 1 for k in plan.kept.values()) and logits(small).isfinite().all()


@pytest.mark.parametrize('family,config', FAMILIES)
def test_bias_and_folded_give_back_the_mean(family, config):
    "At the first coupling, whose inputs the cut does not change."
    dense, w = tiny_model(family, **config), windows(12, 16)
    c = couplings(dense, MLP)[0]
    mean = lambda m: (inputs(m, c.second[0], w).float() @ weight_of(m.get_submodule(c.second[0])).T.detach()).mean(0) + (0 if m.get_submodule(c.second[0]).bias is None else m.get_submodule(c.second[0]).bias.detach())
    off = {v: (mean(prune(dense, w, FLAP(units=MLP, restore=v, damp=1e-9), .25)[0]) - mean(dense)).norm().item() for v in (False, 'bias', 'folded')}
    assert off[False] > 1e-2 and off['bias'] < 1e-4 and off['folded'] < .9*off[False]


def test_folded_weights_by_a_generic_solver():
    dense, w = tiny_model('llama'), windows(12, 16)
    small, plan = prune(dense, w, FLAP(units=MLP, damp=1e-9), .25)
    name, kept = anatomy(dense)[0].mlp_second, plan.kept['0.mlp_channel']
    X, W = inputs(dense, name, w), weight_of(dense.get_submodule(name)).data.double()
    gone = [j for j in range(37) if j not in kept]
    v = torch.linalg.lstsq(X[:, kept], torch.ones(len(X), 1, dtype=torch.float64)).solution[:, 0]
    expected = W[:, kept] + torch.outer(W[:, gone] @ X[:, gone].mean(0), v)
    assert gone and close(weight_of(small.get_submodule(name)).data.double(), expected, 1e-3)


@pytest.mark.parametrize('family,config', FAMILIES)
def test_biases_are_paid_for(family, config):
    dense = tiny_model(family, **config)
    small, plan = prune(dense, windows(), FLAP(restore='bias'), .2)
    assert all(small.get_submodule(c.second[0]).bias is not None for c in couplings(dense, BOTH))
    assert .2 <= plan.true_sparsity < .2 + max(c.cost for c in couplings(dense, BOTH))/total(dense)
    assert plan.true_sparsity == pytest.approx(1 - total(small)/total(dense))


def test_a_bias_needs_the_modelling_file_and_a_fold_does_not():
    bare = dict(attention_bias=False, mlp_bias=False, num_hidden_layers=1)
    kinds = {c: fits_stock_class(prune(tiny_model('llama', **bare), windows(), FLAP(restore=c), .2)[0]) for c in ('bias', 'folded')}
    assert kinds == {'bias': False, 'folded': True}


def test_standard_scores_have_mean_zero():
    m = tiny_model('llama')
    for c in couplings(m, BOTH):
        s = torch.rand(c.second[1].numel(), generator=torch.Generator().manual_seed(0)).double()
        z = _standard_scores(c, s)
        assert z.mean().item() == pytest.approx(0, abs=1e-12) and torch.allclose(z, _standard_scores(c, 7*s + 3))
    assert torch.equal(_standard_scores(c, torch.ones(37).double()), torch.zeros(37).double())  # no spread: all equal


@pytest.mark.parametrize('n', [6, 40])
def test_weights_of_a_constant(n):
    X = torch.randn(n, 5, generator=torch.Generator().manual_seed(0)).double() + torch.tensor([0, 0, 1, 3, 0.])
    v = _constant_weights(X.T @ X, X.sum(0), Ridge(0))
    residual = 1 - X @ v
    assert torch.allclose(X.T @ residual, torch.zeros(5).double(), atol=1e-8) and 0 < (X @ v).mean() <= 1 + 1e-12
    assert _constant_weights(X.T @ X, X.sum(0), Ridge(1e9)).abs().max() < 1e-6                 # much damping: no compensation


@pytest.mark.parametrize('family', ['llama', 'gpt2'])
def test_parts_of_methods_can_be_mixed(family, monkeypatch):
    "Score and repair of FASP, shares of FLAP: the counts are FLAP's, the units and weights those of FASP with these counts."
    monkeypatch.setattr(methods, 'METHODS', dict(METHODS))
    class Mixture(FLAP):
        name = 'mixture'
        score = FASP.score
        repair = FASP.repair
    dense, w = tiny_model(family), windows(12, 16)
    small, plan = prune(dense, w, Mixture(units=MLP, damp=.01), .25)
    shares = prune(dense, w, FLAP(units=MLP), .25)[1]
    counts = {n: len(k) for n, k in shares.kept.items()}
    assert {n: len(k) for n, k in plan.kept.items()} == counts and len(set(counts.values())) > 1
    monkeypatch.setattr(FASP, 'allocate', lambda self, ctx: {n: 37 - k for n, k in counts.items()})
    again, oracle = prune(dense, w, FASP(damp=.01, ridge='mean'), .25)
    assert plan.kept == oracle.kept != shares.kept and plan.scores == oracle.scores and same(small, snapshot(again))


# ---- Taylor ---------------------------------------------------------------------------------------------------------

def loss(m, w): return F.cross_entropy(m(w.ids).logits[:, :-1].flatten(0, 1), w.ids[:, 1:].flatten())


@pytest.mark.parametrize('family', TINY)
def test_gradients_are_those_of_the_mean_loss(family):
    m, w = tiny_model(family), windows(5, 9)
    parameters = list(m.get_submodule(anatomy(m)[1].out).parameters())
    expected = torch.autograd.grad(loss(m, w), parameters)
    for size in (1, 2, 5):
        for g, e in zip(_loss_gradients(m, w, parameters, size), expected): assert g.dtype == torch.float32 and close(g, e, 1e-3)


@pytest.mark.parametrize('family', ['llama', 'opt', 'gpt2', 'qwen2'])
def test_taylor_by_finite_differences(family):
    "Nudge single weights; add up |w times slope| over the rows and columns of one unit."
    m, w, h = tiny_model(family).double(), windows(2, 8), 1e-2
    c = couplings(m, 'mlp_channel')[1]
    entries = [(weight_of(m.get_submodule(n)).data, (int(t[4]), k)) for n, t in c.firsts for k in range(24)]
    entries += [(m.get_submodule(n).bias.data, (int(t[4]),)) for n, t in c.firsts if m.get_submodule(n).bias is not None]
    entries += [(weight_of(m.get_submodule(c.second[0])).data, (k, 4)) for k in range(24)]
    def at(tensor, index, x):
        tensor[index] = x
        with torch.no_grad(): return loss(m, w).item()
    expected = 0.
    for tensor, index in entries:
        old = tensor[index].item()
        expected += abs(old*(at(tensor, index, old + h) - at(tensor, index, old - h))/(2*h))
        tensor[index] = old
    assert scored(Taylor(), m, w, [c])[c.name][4].item() == pytest.approx(expected, rel=1e-2)


@pytest.mark.parametrize('family', TINY)
def test_vectorized_taylor_keeps_signs_inside_a_row(family):
    m, w = tiny_model(family), windows(2, 8)
    for c in couplings(m, BOTH)[:2]:
        P = _weight_times_gradient(m, w, [n for n in decoder_linears(m)])
        row = lambda n, r: P[n][r].sum().abs().item()
        u = c.n_units - 1
        expected = sum(row(n, r) for n, t in c.firsts for r in t[u]) + sum(P[c.second[0]][:, k].sum().abs().item() for k in c.second[1][u])
        assert scored(Taylor(vectorize=True), m, w, [c])[c.name][u].item() == pytest.approx(expected, rel=1e-4)
        assert (scored(Taylor(vectorize=True), m, w, [c])[c.name] <= scored(Taylor(), m, w, [c])[c.name] + 1e-6).all()


def test_taylor_reads_only_its_samples():
    m, w = tiny_model('llama'), windows(8, 20)
    other = Windows(w.ids.clone(), 'other')
    other.ids[3:], other.ids[:, 10:] = 5, 5
    some = Taylor(samples=3, seqlen=10)
    assert prune(m, w, some, .2)[1].scores == prune(m, other, some, .2)[1].scores != prune(m, w, Taylor(samples=None, seqlen=None), .2)[1].scores


def test_flags_and_gradients_are_left_alone():
    m = tiny_model('llama')
    for i, p in enumerate(m.parameters()): p.requires_grad_(i % 2 == 0)
    flags = [p.requires_grad for p in m.parameters()]
    with torch.no_grad(): prune(m, windows(), Taylor(), .2)
    assert [p.requires_grad for p in m.parameters()] == flags and all(p.grad is None for p in m.parameters())
    with pytest.raises(RuntimeError): _loss_gradients(m, windows(), [torch.nn.Parameter(torch.ones(1))])
    assert [p.requires_grad for p in m.parameters()] == flags


def test_unit_sums_count_every_weight_once():
    for family, kind in itertools.product(TINY, BOTH):
        m = tiny_model(family)
        c = couplings(m, kind)[0]
        ones = {n: torch.ones_like(with_bias(l)) for n, l in decoder_linears(m).items()}
        assert _unit_sums(c, ones).tolist() == [c.cost]*c.n_units


def test_only_what_is_needed_is_run():
    "Random and magnitude never run the model; a walk runs each block once."
    m, calls = tiny_model('llama'), []
    m.model.layers[1].mlp.down_proj.register_forward_hook(lambda *a: calls.append(1))
    for name in ('random', 'magnitude'): prune(m, windows(), name, .2, inplace=False)
    assert not calls and len(list(walk(m, windows()))) == 6

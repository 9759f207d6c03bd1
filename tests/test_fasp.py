"""FASP against a brute-force pruner that shares no code with it, and what it must do and refuse on every family."""
import copy
import math

import pytest
import torch
from helpers import tiny_model
from prunebook.couplings import anatomy, couplings
from prunebook.fasp import FASP, column_scores, rank_correlation
from prunebook.methods import METHODS, Run, as_method
from prunebook.pruning import prune
from prunebook.models import TINY, decoder_linears, n_parameters
from prunebook.repair import damp_for
from prunebook.stream import Visit
from prunebook.text import Windows, random_tokens
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

pytestmark = pytest.mark.usefixtures('one_thread')
BOTH, MLP = ('value_channel', 'mlp_channel'), ('mlp_channel',)
FAMILIES = [*[(f, {}) for f in TINY], ('llama', dict(num_key_value_heads=3, attention_bias=False, mlp_bias=False)), ('qwen3', dict(num_key_value_heads=6))]


def windows(n=8, seqlen=24, seed=0): return Windows(torch.randint(3, 97, (n, seqlen), generator=torch.Generator().manual_seed(seed)), f'random {seed}')
def snapshot(m): return {n: t.clone() for n, t in m.state_dict().items()}
def same(m, state): return all(torch.equal(t, state[n]) for n, t in m.state_dict().items())


@torch.no_grad()
def logits(m, w=windows(2, 20, 9)): return m(w.ids).logits


def close(a, b, rel): return a.shape == b.shape and (a - b).abs().max().item() <= rel*b.abs().max().item()


# ---- the oracle -----------------------------------------------------------------------------------------------------

class Brute:
    "FASP by its definition: the whole model runs again for every matrix, removed columns are zeroed, a generic solver fits the others."
    def __init__(self, model, w, units, sparsity, damp, towards='weights', ridge='own'):
        self.m, self.w, self.damp, self.towards, self.ridge = copy.deepcopy(model), w, damp, towards, ridge
        cfg = self.m.config
        self.H, self.d = cfg.num_attention_heads, cfg.hidden_size
        self.K, self.h = getattr(cfg, 'num_key_value_heads', None) or self.H, getattr(cfg, 'head_dim', None) or self.d//self.H
        layers = getattr(self.m.base_model, 'layers', None) or getattr(self.m.base_model, 'h', None) or self.m.base_model.decoder.layers
        self.parts = [(self.attention_out(x), self.mlp_out(x)) for x in layers]
        self.bias = dict(v=self.parts[0][0].bias is not None or cfg.model_type == 'qwen2', mlp=self.parts[0][1].bias is not None)
        f = self.weight(self.parts[0][1]).shape[1]
        self.steps = self.budget(units, sparsity, len(layers), f)
        self.kept = {}
        for i, (out, down) in enumerate(self.parts):
            if self.steps[0]: self.prune(f'{i}.value_channel', out, [[((k*self.H//self.K) + q)*self.h + c for q in range(self.H//self.K)] for k in range(self.K) for c in range(self.h)], self.K, self.steps[0])
            if self.steps[1]: self.prune(f'{i}.mlp_channel', down, [[j] for j in range(f)], 1, self.steps[1])

    def attention_out(self, x):
        if hasattr(x, 'attn'): return x.attn.c_proj
        return next(getattr(x.self_attn, n) for n in ('o_proj', 'out_proj', 'dense') if hasattr(x.self_attn, n))
    def mlp_out(self, x): return x.fc2 if hasattr(x, 'fc2') else next(getattr(x.mlp, n) for n in ('down_proj', 'c_proj', 'fc2') if hasattr(x.mlp, n))
    def weight(self, m): return m.weight.data.T if isinstance(m, Conv1D) else m.weight.data

    def budget(self, units, sparsity, blocks, f):
        "Steps per head and per MLP: attention to the nearest, the MLP what is missing, rounded up."
        linears = [m for n, m in self.m.named_modules() if isinstance(m, (torch.nn.Linear, Conv1D)) and n != 'lm_head']
        total = sum(p.numel() for m in linears for p in m.parameters())
        gated = self.m.config.model_type in ('llama', 'mistral', 'qwen2', 'qwen3', 'gemma')
        channel = (3 if gated else 2)*self.d + (2 if gated else 1)*self.bias['mlp']
        value = self.d*(1 + self.H//self.K) + self.bias['v']
        share = sparsity*total/blocks/(channel*f + ('value_channel' in units)*value*self.K*self.h)
        v = round(self.h*share) if 'value_channel' in units else 0
        return v, math.ceil((sparsity*total/blocks - v*self.K*value)/channel - 1e-9)

    def prune(self, name, second, units, groups, steps):
        seen, W = [], self.weight(second)
        handle = second.register_forward_pre_hook(lambda m, a: seen.append(a[0].reshape(-1, W.shape[1]).double()))
        with torch.no_grad():
            for row in self.w.ids: self.m(row[None])
        handle.remove()
        X, Wd = torch.cat(seen), W.double()
        column = [sum(map(abs, w))*x.norm().item() for w, x in zip(Wd.T.tolist(), X.T)]
        score, size = [sum(column[j] for j in u) for u in units], len(units)//groups
        kept = sorted(i for g in range(groups) for i in sorted(range(g*size, (g + 1)*size), key=score.__getitem__)[steps:])
        columns = sorted(j for i in kept for j in units[i])
        power = (X[:, columns]**2).sum(0)
        delta = self.damp*(power if self.ridge == 'own' else power.mean().expand(len(columns)))
        old = Wd[:, columns].T if self.towards == 'weights' else torch.zeros(len(columns), len(W), dtype=torch.float64)
        rows = torch.cat([X[:, columns], delta.sqrt().diag()])
        U = torch.linalg.lstsq(rows, torch.cat([X @ Wd.T, delta.sqrt()[:, None]*old]), driver='gelsd').solution.T
        W.zero_()
        W[:, columns] = U.float()
        self.kept[name] = kept


@pytest.mark.parametrize('units', [MLP, BOTH])
@pytest.mark.parametrize('family,config', FAMILIES)
def test_brute_force(family, config, units):
    dense, w = tiny_model(family, **config), windows()
    small, plan = prune(dense, w, FASP(units=units, damp=.01), sparsity=.25, run=Run(batch_size=3))
    oracle = Brute(dense, w, units, .25, .01)
    assert {n: k for n, k in plan.kept.items()} == oracle.kept
    assert close(logits(small), logits(oracle.m), 1e-3)
    assert not close(logits(small), logits(dense), 1e-2)


@pytest.mark.parametrize('ridge', ['mean', 'own'])
@pytest.mark.parametrize('towards,damp', [('zero', .1), ('weights', 1.), ('weights', 1e-4)])
@pytest.mark.parametrize('family', ['llama', 'gpt2'])
def test_brute_force_with_other_damping(family, towards, damp, ridge):
    dense, w = tiny_model(family, seed=1), windows(seed=1)
    small, plan = prune(dense, w, FASP(units=BOTH, damp=damp, towards=towards, ridge=ridge), sparsity=.4)
    oracle = Brute(dense, w, BOTH, .4, damp, towards, ridge)
    assert plan.kept == oracle.kept
    assert close(logits(small), logits(oracle.m), 2e-3)


# ---- how much goes --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('sparsity', [.1, .3, .6])
@pytest.mark.parametrize('units', [MLP, BOTH])
@pytest.mark.parametrize('family', TINY)
def test_sparsity_is_reached_or_refused(family, units, sparsity):
    dense, w = tiny_model(family), windows(4, 16)
    total, table, state = n_parameters(decoder_linears(dense).values()), couplings(dense, units), snapshot(dense)
    if sparsity > sum(c.cost*(c.n_units - c.groups) for c in table)/total:
        with pytest.raises(ValueError, match='cannot be reached'): prune(dense, w, FASP(units=units), sparsity, inplace=True)
        assert same(dense, state)
        return
    small, plan = prune(dense, w, FASP(units=units), sparsity)
    true = 1 - sum(p.numel() for n, p in small.named_parameters() if n.rsplit('.', 1)[0] in decoder_linears(small))/total      # counted on the tensors
    assert plan.true_sparsity == pytest.approx(true, abs=1e-12)
    assert sparsity <= true < sparsity + sum(c.cost*c.groups for c in table)/total
    assert logits(small).isfinite().all()
    b, rest = anatomy(dense)[0], {n: p for n, p in dense.named_parameters() if n.rsplit('.', 1)[0] not in decoder_linears(dense)}
    assert all(torch.equal(p, dict(small.named_parameters())[n]) for n, p in rest.items())    # norms and embeddings are spared
    for name, kept in plan.kept.items():
        assert plan.units[name] == (b.mlp_width if name.endswith('mlp_channel') else b.kv_heads*b.head_dim)
        if name.endswith('value_channel'): assert len({sum(i//b.head_dim == k for i in kept) for k in range(b.kv_heads)}) == 1
    after = anatomy(small)
    assert len({(x.mlp_width, x.value_dim) for x in after}) == 1 and {(x.heads, x.kv_heads) for x in after} == {(b.heads, b.kv_heads)}


@pytest.mark.parametrize('kv', [1, 2, 3, 6])
def test_equal_counts_in_every_key_value_head(kv):
    dense = tiny_model('llama', num_key_value_heads=kv)
    _, plan = prune(dense, windows(4, 16), FASP(units=BOTH), .3)
    for i in range(3):
        counts = [sum(j//8 == k for j in plan.kept[f'{i}.value_channel']) for k in range(kv)]
        assert len(counts) == kv and len(set(counts)) == 1 and 1 <= counts[0] < 8


@pytest.mark.parametrize('units', [('kv_group', 'mlp_channel'), ('query_head',), ('kv_group',), ('value_channel',)])
def test_other_kinds_of_units(units):
    dense = tiny_model('llama', num_key_value_heads=2 if units == ('query_head',) else 3)
    small, plan = prune(dense, windows(4, 16), FASP(units=units), .12)
    assert {n.split('.')[1] for n in plan.kept} <= set(units) and .12 <= plan.true_sparsity
    assert logits(small).isfinite().all()


@pytest.mark.parametrize('family', TINY)
def test_sparsity_zero_changes_nothing(family):
    dense = tiny_model(family)
    small, plan = prune(dense, windows(2, 16), FASP(units=BOTH), 0)
    assert torch.equal(logits(small), logits(dense)) and same(small, snapshot(dense))
    assert plan.true_sparsity == 0 and all(k == list(range(plan.units[n])) for n, k in plan.kept.items()) and len(plan.kept) == 6


@pytest.mark.parametrize('family', ['llama', 'gpt2'])
def test_a_tiny_sparsity_takes_one_channel(family):
    small, plan = prune(tiny_model(family), windows(4, 16), FASP(), 1e-6)
    assert {len(k) for k in plan.kept.values()} == {36}
    assert 1e-6 <= plan.true_sparsity


@pytest.mark.parametrize('family', ['llama', 'gpt2'])
def test_pruning_a_pruned_model(family):
    once, first = prune(tiny_model(family), windows(4, 16), FASP(units=BOTH), .2)
    total = n_parameters(decoder_linears(once).values())
    twice, second = prune(once, windows(4, 16), FASP(units=BOTH), .2)
    assert 1 - n_parameters(decoder_linears(twice).values())/total == pytest.approx(second.true_sparsity) and second.true_sparsity >= .2
    assert first.model != second.model and logits(twice).isfinite().all()


@pytest.mark.parametrize('family', ['llama', 'gpt2'])
def test_damping_follows_the_number_of_tokens(family):
    dense, w = tiny_model(family), windows(7)
    a, p = prune(dense, w, FASP(units=BOTH), .2, run=Run(batch_size=3))
    b, q = prune(dense, w, FASP(units=BOTH, damp=damp_for(w.ids.numel())), .2, run=Run(batch_size=3))
    assert p.kept == q.kept and torch.equal(logits(a), logits(b)) and damp_for(100) == 10*damp_for(1000)
    assert not torch.equal(logits(a), logits(prune(dense, w, FASP(units=BOTH, damp=damp_for(7)), .2)[0]))


# ---- the same again -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('family', TINY)
def test_the_same_call_gives_the_same(family):
    (a, p), (b, q) = (prune(tiny_model(family), windows(), FASP(units=BOTH), .2) for _ in range(2))
    assert p == q and torch.equal(logits(a), logits(b)) and same(a, snapshot(b))


@pytest.mark.parametrize('family', TINY)
def test_batch_size_does_not_matter(family):
    dense = tiny_model(family)
    runs = [prune(dense, windows(7), FASP(units=BOTH), .25, run=Run(batch_size=b)) for b in (1, 3, 8)]
    for small, plan in runs[1:]:
        assert plan.kept == runs[0][1].kept
        assert close(logits(small), logits(runs[0][0]), 1e-4)
        for n, s in plan.scores.items(): assert torch.allclose(torch.tensor(s), torch.tensor(runs[0][1].scores[n]), rtol=1e-3)


@pytest.mark.parametrize('family', ['llama', 'opt', 'gpt2'])
def test_device_by_device_is_the_same(family):
    dense = tiny_model(family)
    (a, p), (b, q) = (prune(dense, windows(), FASP(units=BOTH), .2, run=Run(device=d)) for d in (None, 'cpu'))
    assert p.kept == q.kept and p.scores == q.scores and torch.equal(logits(a), logits(b))


@pytest.mark.parametrize('family,dtype', [*[(f, torch.bfloat16) for f in TINY], ('llama', torch.float16), ('gpt2', torch.float16)])
def test_low_precision(family, dtype):
    dense = tiny_model(family)
    small, plan = prune(copy.deepcopy(dense).to(dtype), windows(), FASP(units=BOTH), .2)
    assert {p.dtype for p in small.parameters()} == {dtype} and logits(small).isfinite().all()
    other = prune(dense, windows(), FASP(units=BOTH), .2)[1]
    if dtype == torch.bfloat16: assert plan.model == other.model
    for n in other.kept: assert len(set(plan.kept[n]) & set(other.kept[n])) >= .8*len(other.kept[n])


@pytest.mark.parametrize('family', TINY)
def test_without_restoring_the_plan_is_the_method(family):
    dense = tiny_model(family)
    small, plan = prune(dense, windows(), FASP(units=BOTH, restore=False), .3)
    applied = plan.apply(copy.deepcopy(dense))
    assert torch.equal(logits(small), logits(applied)) and same(small, snapshot(applied)) and repr(small) == repr(applied)


@pytest.mark.parametrize('family', TINY)
def test_restoring_helps_where_it_is_fitted(family):
    "Error of the first repaired matrix, on the calibration tokens: below that of the cut."
    dense, w = tiny_model(family), windows()
    b, errors = anatomy(dense)[0], []
    for restore in (True, False):
        seen = []
        for m in (dense, prune(dense, w, FASP(restore=restore, damp=.01), .25)[0]):
            handle = m.get_submodule(b.mlp_second).register_forward_hook(lambda mod, a, out: seen.append(out))
            logits(m, w)
            handle.remove()
        errors.append((seen[1] - seen[0]).norm().item())
    assert errors[0] < .98*errors[1]


@pytest.mark.parametrize('family', TINY)
def test_tied_embeddings_stay_tied(family):
    dense = tiny_model(family)
    tied = lambda m: m.get_output_embeddings().weight is m.get_input_embeddings().weight
    small, _ = prune(dense, windows(4, 16), FASP(units=BOTH), .2)
    assert tied(small) == tied(dense) == bool(dense.config.tie_word_embeddings)
    assert n_parameters([dense]) - n_parameters([small]) == n_parameters(decoder_linears(dense).values()) - n_parameters(decoder_linears(small).values())
    assert small.get_input_embeddings().weight is not dense.get_input_embeddings().weight


# ---- the front door -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('family', TINY)
def test_inplace(family):
    m = tiny_model(family)
    state, text, config = snapshot(m), repr(m), m.config.to_dict()
    small, p = prune(m, windows(), FASP(units=BOTH), .2)
    assert small is not m and same(m, state) and repr(m) == text and m.config.to_dict() == config and not m.training and not small.training
    again, q = prune(m, windows(), FASP(units=BOTH), .2, inplace=True)
    assert again is m and repr(m) != text and p == q and same(m, snapshot(small))


def nan(m): list(decoder_linears(m).values())[-1].weight.data[0, 0] = float('nan')


@pytest.mark.parametrize('inplace', [False, True])
@pytest.mark.parametrize('change,call,message', [
    (nan, {}, 'model.layers.2.mlp.down_proj.weight holds 1 NaN'),
    (None, dict(calibration=Windows(torch.full((1, 65), 3), 'long')), '65 tokens are longer than the 64'),
    (None, dict(calibration=Windows(torch.full((1, 9), 97), 'other')), 'outside the vocabulary'),
    (None, dict(method='lottery'), "Unknown method 'lottery'; there are .*fasp"),
    (None, dict(method=None), 'Unknown method None'),
    (None, dict(sparsity=.9), 'cannot be reached with mlp_channel: at most 0.4'),
    (None, dict(sparsity=1.), 'fraction in'),
    (None, dict(sparsity=-.1), 'fraction in'),
    (None, dict(sparsity=float('nan')), 'fraction in'),
    (None, dict(method=FASP(units=('neuron',))), "Unknown kind of unit 'neuron'"),
    (None, dict(method=FASP(units=('kv_group', 'value_channel'))), 'overlap'),
    (None, dict(method=FASP(units=())), 'cannot be reached with no units'),
    (lambda m: m.train(), {}, r'model\.eval')])
def test_what_is_refused(inplace, change, call, message):
    m = tiny_model('llama')
    if change: change(m)
    state, text = snapshot(m), repr(m)
    with pytest.raises(ValueError, match=message): prune(m, **{**dict(calibration=windows(2, 16), method='fasp', sparsity=.2, inplace=inplace), **call})
    assert repr(m) == text and all(torch.equal(t.nan_to_num(7), state[n].nan_to_num(7)) for n, t in m.state_dict().items())


@pytest.mark.parametrize('batch_size', [0, -1])
def test_a_batch_has_at_least_one_window(batch_size):
    with pytest.raises(ValueError, match='(?i)batch'): prune(tiny_model('llama'), windows(2, 16), FASP(), .2, run=Run(batch_size=batch_size))


def test_settings_are_checked_where_they_are_given():
    with pytest.raises(ValueError, match="towards is 'hope'"): FASP(towards='hope')


def test_an_unknown_setting_and_empty_windows():
    with pytest.raises(TypeError, match='dampp'): FASP(dampp=1)
    with pytest.raises(ValueError, match='non-empty'): Windows(torch.zeros(0, 9, dtype=int), 'none')
    with pytest.raises(ValueError, match='No adapter'):
        m = tiny_model('llama')
        m.config.model_type = 'mamba'
        prune(m, windows())


def test_an_error_on_the_way_leaves_the_model_as_it_was():
    m = tiny_model('opt')
    m.model.decoder.layers[1].fc1.bias.data.fill_(1e38)     # finite, but their sum is not
    state = snapshot(m)
    with pytest.raises(ValueError, match='scores of 1.mlp_channel: infinite values'): prune(m, windows(2, 16), FASP(), .2)
    assert same(m, state)


def test_names_and_defaults():
    m = as_method('fasp')
    assert type(m) is FASP and m == FASP() and METHODS['fasp'] is FASP and as_method(m) is m
    assert m.settings() == dict(units=['mlp_channel'], restore=True, damp=None, towards='weights', ridge='own',
                                multiple=1, keep=[], spare=[0, 0])
    small, plan = prune(tiny_model('llama'), windows(2, 16), 'fasp')
    assert (plan.method, plan.sparsity, plan.settings) == ('fasp', .2, m.settings()) and plan.calibration == repr(windows(2, 16))
    assert random_tokens(small, 2, 8).ids.max() < 97


# ---- scores and estimates -------------------------------------------------------------------------------------------

def test_scores_are_sums_over_columns():
    W, X = torch.randn(5, 48, generator=torch.Generator().manual_seed(0)), torch.randn(30, 48, generator=torch.Generator().manual_seed(1))
    s = column_scores(W, X.T @ X)
    assert torch.allclose(s, torch.stack([W[:, j].abs().sum()*X[:, j].norm() for j in range(48)]), rtol=1e-5)
    c = couplings(tiny_model('llama'), 'value_channel')[0]
    expected = [sum(s[(3*k + q)*8 + i] for q in range(3)) for k in range(2) for i in range(8)]
    assert torch.allclose(Visit(None, c).per_unit(s), torch.stack(expected), rtol=1e-5)
    assert column_scores(W.bfloat16(), X.T @ X).dtype == torch.float32
    assert column_scores(W, -torch.eye(48)).isfinite().all()                                 # rounding may leave a negative square


def test_rank_correlation():
    a = torch.randn(50, generator=torch.Generator().manual_seed(0))
    assert rank_correlation(a, a.exp()) == pytest.approx(1) and rank_correlation(a, -a**3) == pytest.approx(-1)
    assert abs(rank_correlation(a, torch.randn(50, generator=torch.Generator().manual_seed(1)))) < .4

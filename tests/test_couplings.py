"""What couplings are, what is refused, and that a sliced model is a model. That all families and kinds slice rightly is in `test_conformance.py`."""
import copy
import io
import pickle
from dataclasses import replace

import pytest
import torch
from helpers import tiny_model
from prunebook.conform import combinations, random_kept
from prunebook.couplings import (FAMILIES, KINDS, Family, Fused, NarrowValues, Separate, anatomy, check_kept, couplings, family_of, kinds_of, masked,
                                 removed_columns, slice_units, unwrapped, weight_of)
from prunebook.models import TINY, decoder_linears, n_parameters
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

pytestmark = pytest.mark.usefixtures('one_thread')

WITH_KV = ('llama', 'mistral', 'qwen2', 'qwen3', 'phi', 'gemma')
MODELS = [(f, k) for f in TINY for k in ((1, 2, 3, 6) if f in WITH_KV else (6,))]            # family, key-value heads of 6 query heads
ONE_EACH = [(f, 2 if f in WITH_KV else 6) for f in TINY]                                       # all kinds of units that the family can have


# ---- what the tests share -------------------------------------------------------------------------------------------

def build(family, kv=None, **kw): return tiny_model(family, **(dict(num_key_value_heads=kv) if kv and family in WITH_KV else {}), **kw)


def pairs_of(model):
    "Every kind of attention unit together with MLP channels, where it has a unit to give."
    spare = lambda kind: all(c.n_units > c.groups for c in couplings(model, kind))
    return [k for k in combinations(model) if len(k) == 2 and spare(k[0])]


def padded_batch():
    "Token ids with left padding, right padding and none; the mask of attention."
    ids = torch.randint(3, 97, (3, 14), generator=torch.Generator().manual_seed(1))
    mask = torch.ones(3, 14, dtype=int)
    mask[0, :5] = 0
    mask[1, -4:] = 0
    return ids, mask


@torch.no_grad()
def logits(model):
    ids, mask = padded_batch()
    return model(ids, attention_mask=mask).logits[mask.bool()]


def assert_close(a, b, rel=1e-5):
    assert a.shape == b.shape
    assert torch.isfinite(b).all()
    assert (a - b).abs().max().item() <= rel*b.abs().max().item()


# ---- slicing is masking ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize('implementation', ['eager', 'sdpa'])
@pytest.mark.parametrize('family', TINY)
def test_slicing_is_masking_for_each_attention_implementation(family, implementation):
    dense = build(family, attn_implementation=implementation)
    assert dense.config._attn_implementation == implementation
    for kinds in pairs_of(dense):
        kept = random_kept(dense, kinds, seed=3)
        with masked(dense, kept): expected = logits(dense)
        assert_close(logits(slice_units(copy.deepcopy(dense), kept)), expected)


@pytest.mark.parametrize('family', TINY)
def test_one_unit_that_stays(family):
    dense = build(family)
    for kind in {k for kinds in combinations(dense) for k in kinds}:
        kept = random_kept(dense, kind, share=0)
        with masked(dense, kept): expected = logits(dense)
        assert_close(logits(slice_units(copy.deepcopy(dense), kept)), expected)


@pytest.mark.parametrize('family', TINY)
def test_blocks_of_different_widths(family):
    dense = build(family)
    for kinds in pairs_of(dense):
        kept = {n: k for i, share in enumerate((.4, .9)) for n, k in random_kept(dense, kinds, share).items() if n.startswith(f'{i}.')}
        with masked(dense, kept): expected = logits(dense)
        assert_close(logits(slice_units(copy.deepcopy(dense), kept)), expected)


@pytest.mark.parametrize('family,kv', ONE_EACH)
def test_slicing_twice_is_slicing_once(family, kv):
    dense = build(family, kv)
    for kinds in pairs_of(dense):
        first = random_kept(dense, kinds, share=.6)
        twice = slice_units(copy.deepcopy(dense), first)
        second = random_kept(twice, kinds, share=.6, seed=1)
        once = {n: [first[n][i] for i in k] for n, k in second.items()}
        slice_units(twice, second)
        with masked(dense, once): expected = logits(dense)
        once = slice_units(copy.deepcopy(dense), once)
        assert_close(logits(twice), expected)
        assert all(torch.equal(a, b) for a, b in zip(twice.state_dict().values(), once.state_dict().values()))
        assert repr(twice) == repr(once)                                                     # sizes that modules tell about themselves


@pytest.mark.parametrize('family,first,then', [(f, a, b) for f, kinds in dict(llama=KINDS, gpt2=('kv_group', 'value_channel', 'mlp_channel')).items()
                                               for a in kinds for b in kinds if a != b])
def test_one_kind_after_another(family, first, then):
    sliced = slice_units(build(family), random_kept(build(family), first))
    kept = random_kept(sliced, then, seed=2)
    with masked(sliced, kept): expected = logits(sliced)
    size, cost = n_parameters([sliced]), sum(c.cost*(c.n_units - len(kept[c.name])) for c in couplings(sliced, then))
    assert_close(logits(slice_units(sliced, kept)), expected)
    assert size - n_parameters([sliced]) == cost


@pytest.mark.parametrize('family', TINY)
def test_keeping_everything_changes_nothing(family):
    dense = build(family)
    for kinds in pairs_of(dense):
        same = slice_units(copy.deepcopy(dense), random_kept(dense, kinds, share=1.))
        assert torch.equal(logits(same), logits(dense))
        assert not any(isinstance(m, NarrowValues) for m in same.modules())


@pytest.mark.parametrize('family', TINY)
def test_order_of_kept_units_does_not_matter(family):
    dense = build(family)
    kept = random_kept(dense, ('value_channel', 'mlp_channel'))
    a, b = slice_units(copy.deepcopy(dense), kept), slice_units(copy.deepcopy(dense), {n: torch.tensor(k[::-1]) for n, k in reversed(kept.items())})
    assert torch.equal(logits(a), logits(b))


@pytest.mark.parametrize('family,kv', [(f, k) for f, k in MODELS if k == (3 if f in WITH_KV else 6)])
def test_bfloat16(family, kv):
    dense = build(family, kv).bfloat16()
    for kinds in pairs_of(dense):
        kept = random_kept(dense, kinds)
        with masked(dense, kept): expected = logits(dense)
        sliced = slice_units(copy.deepcopy(dense), kept)
        assert {p.dtype for p in sliced.parameters()} == {torch.bfloat16}
        out = logits(sliced)
        assert out.dtype == torch.bfloat16
        assert ((out - expected).float().norm()/expected.float().norm()).item() < .03


@pytest.mark.parametrize('family,kv', ONE_EACH)
def test_generation_with_and_without_cache(family, kv):
    dense = build(family, kv)
    ids = torch.randint(3, 97, (2, 9), generator=torch.Generator().manual_seed(2))
    kw = dict(max_new_tokens=5, min_new_tokens=5, do_sample=False, pad_token_id=0)
    for kinds in pairs_of(dense):
        sliced = slice_units(copy.deepcopy(dense), random_kept(dense, kinds))
        a, b = (sliced.generate(ids, use_cache=c, **kw) for c in (True, False))
        assert a.shape == (2, 14)
        assert torch.equal(a, b), kinds


# ---- costs and tables -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize('family,kv', MODELS)
def test_costs_are_those_of_the_table(family, kv):
    m = build(family, kv)
    b = anatomy(m)[0]
    d, g, h = m.config.hidden_size, b.heads//b.kv_heads, b.head_dim
    gated = len(b.family.mlp_firsts) == 2
    firsts = [m.get_submodule(b.path(p)) for p in b.family.mlp_firsts]
    has = [getattr(m.get_submodule(b.path(p)), 'bias', None) is not None for p in b.family.qkv]
    q, k, v = has if len(has) == 3 else has*3
    mlp = (3 if gated else 2)*d + sum(f.bias is not None for f in firsts)
    costs = dict(mlp_channel=mlp, kv_group=2*h*d*(1 + g) + h*(g*q + k + v), query_head=2*h*d + h*q, value_channel=d*(1 + g) + v)
    units = dict(mlp_channel=b.mlp_width, kv_group=b.kv_heads, query_head=b.heads, value_channel=b.kv_heads*h)
    groups = dict(mlp_channel=1, kv_group=1, query_head=b.kv_heads, value_channel=b.kv_heads)
    for kind in {k for kinds in combinations(m) for k in kinds}:
        table = couplings(m, kind)
        assert [c.layer for c in table] == [0, 1, 2]
        assert {(c.cost, c.n_units, c.groups) for c in table} == {(costs[kind], units[kind], groups[kind])}


def test_attention_comes_before_the_mlp():
    names = [c.name for c in couplings(build('llama'), ('mlp_channel', 'kv_group'))]
    assert names == ['0.kv_group', '0.mlp_channel', '1.kv_group', '1.mlp_channel', '2.kv_group', '2.mlp_channel']


@pytest.mark.parametrize('family', TINY)
def test_anatomy_of_a_sliced_model(family):
    m = build(family)
    b = anatomy(m)[1]
    slice_units(m, {'1.mlp_channel': range(5), **random_kept(m, 'value_channel', .5)})
    after = anatomy(m)
    assert [x.mlp_width for x in after] == [37, 5, 37]
    assert {x.value_dim for x in after} == {round(b.head_dim/2)}
    assert {(x.heads, x.kv_heads, x.head_dim) for x in after} == {(b.heads, b.kv_heads, b.head_dim)}
    if b.kv_heads > 1:
        slice_units(m, {'2.kv_group': [0]})
        assert (anatomy(m)[2].heads, anatomy(m)[2].kv_heads) == (b.heads//b.kv_heads, 1)
        assert (anatomy(m)[0].heads, anatomy(m)[0].kv_heads) == (b.heads, b.kv_heads)


# ---- masking leaves no trace ----------------------------------------------------------------------------------------

def snapshot(model): return {n: t.clone() for n, t in model.state_dict().items()}
def same(model, state): return all(torch.equal(t, state[n]) for n, t in model.state_dict().items())


@pytest.mark.parametrize('family', TINY)
def test_masked_restores_weights(family):
    m = build(family)
    state, expected = snapshot(m), logits(m)
    kept = random_kept(m, ('value_channel', 'mlp_channel'))
    with masked(m, kept) as inside:
        assert inside is m and not same(m, state)
    assert same(m, state)
    with pytest.raises(KeyError, match='inside'), masked(m, kept):
        raise KeyError('inside')
    assert same(m, state)
    assert torch.equal(logits(m), expected)


def test_masked_restores_weights_when_a_later_coupling_is_wrong():
    m = build('llama')
    state = snapshot(m)
    for wrong in ([-1], [37], [1, 1]):
        with pytest.raises(ValueError, match='1.mlp_channel'), masked(m, {'0.mlp_channel': [0], '1.mlp_channel': wrong}): pass
        assert same(m, state), 'the first coupling stayed masked'


def test_masked_leaves_gradients_on():
    m = build('gpt2')
    with masked(m, {'0.mlp_channel': [0]}):
        assert torch.is_grad_enabled()
        m(padded_batch()[0]).logits.sum().backward()
    assert all(p.requires_grad for p in m.parameters())


# ---- what is refused ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('kept,message', [({'0.mlp_channel': [37]}, 'unit 37 is not among its 37'),
                                          ({'0.mlp_channel': [-1, 3]}, 'unit -1'), ({'0.mlp_channel': [4, 4]}, 'listed twice'),
                                          ({'0.value_channel': [0, 1, 8]}, r'\[2, 1\] units'), ({'0.query_head': [0]}, 'must be equal'),
                                          ({'3.mlp_channel': [0]}, "no coupling '3.mlp_channel'"), ({'0.neuron': [0]}, "Unknown kind of unit 'neuron'"),
                                          ({'0.kv_group': [0], '0.value_channel': [0, 8]}, 'overlap')])
@pytest.mark.parametrize('use', [slice_units, lambda m, k: masked(m, k).__enter__()], ids=['slice_units', 'masked'])
def test_bad_input_is_refused_before_any_change(use, kept, message):
    m = build('llama')
    state = snapshot(m)
    with pytest.raises(ValueError, match=message): use(m, {'1.mlp_channel': list(range(5)), **kept} if use is slice_units else kept)
    assert same(m, state)


def test_kinds_are_checked():
    with pytest.raises(ValueError, match='Unknown kind'): couplings(build('llama'), ('mlp_channel', 'heads'))
    with pytest.raises(ValueError, match='use kv_group'): couplings(build('llama', 6), 'query_head')
    assert couplings(build('llama'), ()) == []
    stranger = build('llama')
    stranger.config.model_type = 'mamba'
    with pytest.raises(ValueError, match="'mamba'.*llama.*Family"): family_of(stranger)


def test_check_kept_and_removed_columns():
    c = couplings(build('llama'), 'value_channel')[0]                                         # 2 groups of 8, 3 columns each
    assert check_kept(c, torch.tensor([9, 2])) == [2, 9]
    assert check_kept(c, (i for i in (9, 2))) == [2, 9]
    gone = removed_columns(c, [2, 9]).tolist()
    stay = [2, 10, 18, 25, 33, 41]
    assert gone == [i for i in range(48) if i not in stay]


# ---- a sliced model is a model --------------------------------------------------------------------------------------

@pytest.mark.parametrize('family', TINY)
def test_gradients_are_those_of_the_masked_model(family):
    dense, (ids, mask) = build(family), padded_batch()
    labels = ids.masked_fill(mask == 0, -100)
    for kinds in pairs_of(dense):
        kept = random_kept(dense, kinds)
        sliced = slice_units(copy.deepcopy(dense), kept)
        sliced(ids, attention_mask=mask, labels=labels).loss.backward()
        assert all(p.requires_grad and p.grad is not None and p.grad.isfinite().all() for p in sliced.parameters())
        dense.zero_grad()
        with masked(dense, kept): dense(ids, attention_mask=mask, labels=labels).loss.backward()
        for c in couplings(dense, kinds):
            second = dense.get_submodule(c.second[0])
            grad = second.weight.grad.T if isinstance(second, Conv1D) else second.weight.grad
            gone = removed_columns(c, kept[c.name])
            stay = [i for i in range(grad.shape[1]) if i not in set(gone.tolist())]
            m = sliced.get_submodule(c.second[0])
            assert_close(m.weight.grad.T if isinstance(m, Conv1D) else m.weight.grad, grad[:, stay], 1e-4)
    step = torch.optim.SGD(sliced.parameters(), lr=.01)
    before = snapshot(sliced)
    step.step()
    assert not same(sliced, before)


def test_frozen_parameters_stay_frozen():
    m = build('opt').requires_grad_(False)
    slice_units(m, random_kept(m, ('value_channel', 'mlp_channel')))
    assert not any(p.requires_grad for p in m.parameters())


@pytest.mark.parametrize('family', TINY)
def test_state_dict_round_trip(family):
    dense = build(family)
    other = build(family, seed=5)
    for kinds in pairs_of(dense):
        kept = random_kept(dense, kinds)
        a, b = (slice_units(copy.deepcopy(m), kept) for m in (dense, other))
        file = io.BytesIO()
        torch.save(a.state_dict(), file)
        assert not torch.equal(logits(a), logits(b))
        b.load_state_dict(torch.load(io.BytesIO(file.getvalue())))
        assert torch.equal(logits(a), logits(b))
        assert not a.state_dict().keys() ^ dense.state_dict().keys()                         # names do not change
        assert torch.equal(logits(copy.deepcopy(a)), logits(a))


@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize('family', TINY)
def test_training_flag_is_kept(family, training):
    m = build(family).train(training)
    slice_units(m, random_kept(m, ('value_channel', 'mlp_channel')))
    assert {x.training for x in m.modules()} == {training}
    assert any(isinstance(x, NarrowValues) for x in m.modules())


@pytest.mark.parametrize('family', TINY)
def test_linears_tell_their_size(family):
    m = build(family)
    for kinds in pairs_of(m):
        s = slice_units(copy.deepcopy(m), random_kept(m, kinds))
        for n, x in decoder_linears(s).items():
            rows, columns = weight_of(x).shape
            assert (x.out_features, x.in_features) == (rows, columns) if hasattr(x, 'in_features') else (x.nf, x.nx) == (rows, columns), n
            assert x.bias is None or len(x.bias) == rows
            assert x.weight.is_contiguous() and x.weight.untyped_storage().nbytes() == x.weight.numel()*x.weight.element_size()   # memory is given back


# ---- narrow values --------------------------------------------------------------------------------------------------

def narrow(family, **kw): return slice_units(build(family, **kw), random_kept(build(family), 'value_channel'))


@pytest.mark.parametrize('family', TINY)
def test_a_module_put_in_place_of_a_linear_is_called(family):
    "As adapters and quantizers do it; what it gets and gives has the true sizes."
    class Around(nn.Module):
        def __init__(self, inner): super().__init__(); self.inner = inner
        def forward(self, x):
            sizes.append((x.shape[-1], (y := self.inner(x)).shape[-1]))
            return y + 1
    m, sizes = narrow(family), []
    before = logits(m)
    for b in anatomy(m):
        for n in (b.path(b.family.qkv[-1]), b.out):
            W = weight_of(m.get_submodule(n))
            m.set_submodule(n, around := Around(m.get_submodule(n)))
            assert not torch.equal(logits(m), before)
            assert set(sizes) == {tuple(reversed(W.shape))}
            sizes.clear()
            m.set_submodule(n, around.inner)
    assert torch.equal(logits(m), before)


@pytest.mark.parametrize('family', ['llama', 'gpt2', 'opt', 'phi'])
def test_narrow_values_compile_without_a_break(family):
    m = narrow(family)
    ids = padded_batch()[0]
    torch._dynamo.reset()
    with torch.no_grad(): assert_close(torch.compile(m, backend='eager', fullgraph=True)(ids, use_cache=False).logits, m(ids).logits)


@pytest.mark.parametrize('family', TINY)
def test_narrow_values_survive_copies_and_pickle(family):
    m = narrow(family)
    for again in (copy.deepcopy(m), pickle.loads(pickle.dumps(m)), pickle.loads(pickle.dumps(copy.deepcopy(m)))):
        assert torch.equal(logits(again), logits(m)) and repr(again) == repr(m)
        with torch.no_grad(): again.get_submodule(anatomy(again)[0].out).weight.zero_()
        assert not torch.equal(logits(again), logits(m)), 'the copy still computes with tensors of the first'


def test_attention_weights_of_narrow_values_can_be_asked_for():
    m = narrow('llama', attn_implementation='eager')
    assert [a.shape for a in m(padded_batch()[0], output_attentions=True).attentions] == [(3, 6, 14, 14)]*3


@pytest.mark.parametrize('family', ['llama', 'gpt2'])
def test_replicas_compute_with_their_own_tensors(family):
    "What DataParallel does: shallow copies of modules, with other tensors."
    m = narrow(family)
    name = anatomy(m)[0].path(anatomy(m)[0].family.attention)
    replica = m.get_submodule(name)._replicate_for_data_parallel()
    out = anatomy(m)[0].out.removeprefix(name + '.')
    replica._modules[out] = copy.deepcopy(replica._modules[out])
    with torch.no_grad(): replica._modules[out].weight.zero_()
    whole = logits(m)
    m.set_submodule(name, replica)
    assert not torch.equal(logits(m), whole)


# ---- what an adapter cannot say -------------------------------------------------------------------------------------

SIZES = dict(vocab_size=97, hidden_size=24, intermediate_size=37, num_hidden_layers=2, num_attention_heads=6, pad_token_id=0, bos_token_id=1, eos_token_id=2)


def stranger(kind, **kw):
    torch.manual_seed(0)
    m = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SIZES, **kw)).float().eval()
    with torch.no_grad():
        for p in m.parameters(): p.normal_(0, .3)
    return m


@pytest.mark.parametrize('wrong,message', [(dict(mlp_parts=1), 'gate_up_proj has 74 rows, but 37 channels make 37'),
                                           (dict(qkv=('self_attn.o_proj',)*3, layout=Separate()), 'o_proj has 24 rows, but .* make 48'),
                                           (dict(qkv=('self_attn.o_proj',)), 'o_proj has 24 rows, but .* heads make')])
def test_an_adapter_accounts_for_every_row(wrong, message, monkeypatch):
    monkeypatch.setitem(FAMILIES, 'phi3', replace(FAMILIES['phi3'], **wrong))
    m = stranger('phi3', num_key_value_heads=2, head_dim=8)
    for ask in (anatomy, lambda m: couplings(m, 'mlp_channel'), couplings):
        with pytest.raises(ValueError, match=f"'phi3' does not fit: .*{message}.*layout"): ask(m)


def test_heads_in_an_unknown_order_stay_and_channels_go(monkeypatch):
    monkeypatch.setitem(FAMILIES, 'gpt_neox', replace(FAMILIES['gpt_neox'], layout=Fused()))
    dense = stranger('gpt_neox')
    assert {(b.heads, b.kv_heads, b.head_dim, b.value_dim) for b in anatomy(dense)} == {(6, 6, 4, 4)}
    assert kinds_of(dense) == ['mlp_channel']
    kept = random_kept(dense, 'mlp_channel')
    with masked(dense, kept): expected = logits(dense)
    assert_close(logits(slice_units(copy.deepcopy(dense), kept)), expected)
    for kind in ('kv_group', 'value_channel'):
        with pytest.raises(ValueError, match=f'query_key_value.*does not say in which order; {kind} cannot be cut'): couplings(dense, (kind, 'mlp_channel'))


def test_linears_beside_attention_keep_their_value_channels(monkeypatch):
    monkeypatch.setitem(FAMILIES, 'llama', Family(attention='self_attn.o_proj'))
    with pytest.raises(ValueError, match='is not directly in self_attn.o_proj'): couplings(build('llama'), 'value_channel')


# ---- wrapped models -------------------------------------------------------------------------------------------------

def test_unwrapped():
    m = build('llama')
    for wrapped in (m, torch.compile(m), nn.DataParallel(m), nn.DataParallel(torch.compile(m)), torch.compile(nn.DataParallel(m))): assert unwrapped(wrapped) is m
    m.model.layers[1].mlp = torch.compile(m.model.layers[1].mlp)
    with pytest.raises(ValueError, match='model.layers.1.mlp was compiled on its own'): unwrapped(m)


def test_unwrapped_from_one_process_of_many(tmp_path):
    import torch.distributed as dist
    dist.init_process_group('gloo', init_method=f'file://{tmp_path}/store', rank=0, world_size=1)
    try: assert unwrapped(nn.parallel.DistributedDataParallel(m := build('llama'))) is m
    finally: dist.destroy_process_group()

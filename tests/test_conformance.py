"""Every family with every kind of unit keeps the promises of `prunebook.conform`. A row of `MODELS` adds a family, a class in `UNITS` a kind of unit."""
import copy
import pickle
from dataclasses import replace

import pytest
import torch
from prunebook.conform import check_method, check_streamed, check_walk, check_writes, combinations, conforms, padded_logits, random_kept
from prunebook.couplings import FAMILIES, UNITS, Family, Interleaved, MLPChannel, OwnConfig, Stacked, Unit, anatomy, couplings, kinds_of, slice_units
from prunebook.methods import MODULES, configured
from prunebook.models import TINY, TINY_MORE, decoder_linears, decoder_weights, n_parameters
from prunebook.save import fits_stock_class, load_pruned, save_pruned
from transformers import AutoConfig, AutoModelForCausalLM

pytestmark = pytest.mark.usefixtures('one_thread', 'own_modules')

SMALL = dict(vocab_size=97, hidden_size=24, intermediate_size=37, num_hidden_layers=3, num_attention_heads=6, bos_token_id=1, eos_token_id=2, pad_token_id=0)
GROUPED = {f: [dict(num_key_value_heads=k) for k in (1, 2, 3, 6)] for f in ('llama', 'mistral', 'qwen2', 'qwen3', 'phi', 'gemma', 'phi3')}
VARIANTS = {                                               # beside the tiny model itself
    'gpt_neox': [dict(use_parallel_residual=False, attention_bias=False)],
    'falcon': [dict(new_decoder_architecture=False, multi_query=True), dict(new_decoder_architecture=False, multi_query=False, parallel_attn=False, num_kv_heads=6),
               dict(alibi=True)],
    'gpt_bigcode': [dict(multi_query=False)],
    'cohere': [dict(use_qk_norm=True)],
    'stablelm': [dict(qk_layernorm=True, use_parallel_residual=False)]}
MODELS = {                                                 # family: its configuration, and variants of it
    family: (config, GROUPED.get(family) or [{}, *VARIANTS.get(family, [])]) for family, config in (TINY | TINY_MORE).items()}
ROWS = [(family, variant) for family, (_, variants) in MODELS.items() for variant in range(len(variants))]
PLAIN = [(f, 1 if f in GROUPED else 0) for f in MODELS]                                          # one variant of each, with grouped queries if it can
MATRICES = [p for p in PLAIN if p[0] in (*TINY, 'phi3', 'gpt_neox')]                             # every way in which matrices lie
HEADS_STAY = {'olmo2', 'olmo3', 'olmoe', 'bloom', 'mpt', 'gpt_oss'}
ONLY_ATTENTION = {'mixtral', 'olmoe', 'gpt_oss'}           # besides experts
MIXTURES = ['mixtral', 'olmoe', 'qwen2_moe', 'qwen3_moe', 'glm4_moe', 'ernie4_5_moe', 'gpt_oss']
# families whose blocks are built in a way of their own: norms or a gate behind, tuples, residuals inside, experts, ALiBi, sinks
UNLIKE = ['gemma2', 'olmo2', 'falcon', 'bloom', 'mpt', 'gpt_neo', 'gpt_bigcode', 'glm4', 'mixtral', 'qwen2_moe', 'gpt_oss']


def build(family, variant=0, **kw):
    config, variants = MODELS[family]
    torch.manual_seed(0)
    m = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **{**config, **variants[variant], **kw})).float().eval()
    with torch.no_grad():
        for name, p in m.named_parameters(): p.normal_(1. if 'norm' in name and p.ndim == 1 else 0., .2)
    return m


class MLPPair(MLPChannel):
    "Two neighbouring channels of the MLP."
    name, label = 'mlp_pair', 'Pair of MLP channels'
    def pairs(self, t): return t.view(-1, 2)
    def firsts(self, b): return [(n, self.pairs(t)) for n, t in super().firsts(b)]
    def left(self, b, n): return super().left(b, 2*n)

    def second(self, b):
        name, columns = super().second(b)
        return name, self.pairs(columns)

    def refusal(self, shapes):
        odd = [b.mlp_width for b in shapes if b.mlp_width % 2]
        return f'The MLP has {odd[0]} channels, which are no pairs.' if odd else None


del UNITS['mlp_pair']                                      # only where a test asks for it


# ---- the test of families and kinds of units ------------------------------------------------------------------------

def test_every_family_has_a_row(): assert {*MODELS, *(f for f in FAMILIES if f.endswith('_vl_text'))} == set(FAMILIES)       # these are in test_multimodal


@pytest.mark.parametrize('family,variant', ROWS)
def test_conformance(family, variant):
    "Masked is sliced, costs are exact, groups stay even, couplings are kept up to date, files give the same bits."
    model, tried = build(family, variant), set()
    every = combinations(model)
    saved = [every[0], every[-1]] if (family, variant) in PLAIN else []                          # with one width, and with all kinds of them
    for kinds in every:
        conforms(model, kinds, save=kinds in saved)
        tried |= set(kinds)
    grouped, config = any(b.heads > b.kv_heads for b in anatomy(model)), model.config
    stay = family in HEADS_STAY or any(getattr(config, n, False) is True for n in ('alibi', 'use_qk_norm', 'qk_layernorm') if family not in ('persimmon', 'glm4_moe'))
    heads = set() if stay else {'kv_group', *['query_head']*grouped}
    assert tried == heads | {'value_channel', 'mlp_channel', 'expert'} - ({'mlp_channel'} if family in ONLY_ATTENTION else set()) - (set() if family in MIXTURES else {'expert'})     # no family has less than it could have


def some(model): return .2*n_parameters(decoder_linears(model).values())/n_parameters(decoder_weights(model).values())       # a fifth of what is no expert
def units_of(model): return tuple(k for k in ('value_channel', 'mlp_channel') if k in kinds_of(model))


@pytest.mark.parametrize('family,variant', [r for r in ROWS if r[0] in TINY_MORE])
def test_a_walk_sees_what_the_model_computes(family, variant): check_walk(build(family, variant))


@pytest.mark.parametrize('family', TINY_MORE)
def test_a_pruned_model_of_every_family_writes(family):
    model = build(family)
    check_writes(model)
    check_writes(check_method(model, configured('recipe', dict(units=units_of(model))), some(model)))


WHOLE = ('block_influence', 'removal', 'reap')               # those have tests of their own: test_depth, test_experts

@pytest.mark.parametrize('method', [n for n in MODULES if n not in WHOLE])
@pytest.mark.parametrize('family', UNLIKE)
def test_every_method_on_families_that_are_unlike_the_others(family, method):
    model, quick = build(family), dict(bonsai=dict(evaluations=8, seqlen=12), surgeon=dict(shots=2)).get(method, {})
    check_method(model, configured(method, dict(quick, units=units_of(model))), some(model))


@pytest.mark.parametrize('family', [*UNLIKE, 'gpt_neox', 'xglm', 'persimmon', 'phi3', 'exaone4'])
def test_a_checkpoint_on_disk_gives_the_same(family):
    model = build(family)
    check_streamed(model, configured('fasp', dict(units=units_of(model))), some(model))


@pytest.mark.parametrize('family', ['gemma2', 'llama', 'cohere2', 'phi3', 'gpt_neox'])
def test_heads_are_compared_by_the_maps_that_the_model_uses(family):
    "While depth2 looks at attention maps, the model computes what it always computes: soft caps and windows, too."
    from prunebook.heads import _observed_attention
    model = build(family)
    with torch.no_grad():
        expected = padded_logits(model)
        with _observed_attention(model, lambda layer, P: None): torch.testing.assert_close(padded_logits(model), expected)


@pytest.mark.parametrize('family', ['falcon', 'gpt_neo', 'xglm'])
def test_heads_that_show_no_maps_are_an_error(family):
    with pytest.raises(ValueError, match='does not show its maps.*choose value_channel, or another method'):
        check_method(build(family), configured('depth2', dict(units=('kv_group',))))


@pytest.mark.parametrize('family,variant', MATRICES)
def test_conformance_of_a_new_kind_of_unit(family, variant, monkeypatch):
    monkeypatch.setitem(UNITS, 'mlp_pair', MLPPair())
    width = dict(n_inner=38) if family == 'gpt2' else dict(ffn_dim=38) if family == 'opt' else dict(intermediate_size=38)
    model = build(family, variant, **width)
    for kinds in [k for k in combinations(model) if 'mlp_pair' in k]: conforms(model, kinds)
    with pytest.raises(ValueError, match='overlap; prune one kind of unit of the mlp'): couplings(model, ('mlp_channel', 'mlp_pair'))
    with pytest.raises(ValueError, match='37 channels, which are no pairs'): couplings(build(family, variant), 'mlp_pair')
    assert 'mlp_pair' in kinds_of(model) and 'mlp_pair' not in kinds_of(build(family, variant))


# ---- it notices -----------------------------------------------------------------------------------------------------

AS_IT_IS = dict(UNITS)


def broken(base, **changes): return type('Broken', (type(UNITS[base]),), dict(name=None, **changes))()


@pytest.mark.parametrize('family', ['llama', 'phi3', 'gpt_neox'])
@pytest.mark.parametrize('kind,changes', [
    ('kv_group', dict(firsts=lambda self, b: [(n, t.flip(0)) for n, t in AS_IT_IS['kv_group'].firsts(b)])),          # rows of another unit
    ('value_channel', dict(second=lambda self, b: (b.out, torch.arange(b.heads*b.value_dim).view(b.kv_heads*b.value_dim, -1).flip(0)))),
    ('mlp_channel', dict(cost=lambda self, model, b: 24)),
    ('mlp_channel', dict(left=lambda self, b, n: b)),
    ('value_channel', dict(refresh=lambda self, model, b: None)),
    ('kv_group', dict(groups=lambda self, b: 2))], ids=['rows', 'columns', 'cost', 'left', 'refresh', 'groups'])
def test_a_wrong_kind_of_unit_is_noticed(family, kind, changes, monkeypatch):
    model, wrong = build(family, variant=1), broken(kind, **changes)
    wrong.name = kind
    if 'groups' in changes: monkeypatch.setattr(type(wrong), 'left', lambda self, b, n: AS_IT_IS[kind].left(b, n + 1))
    monkeypatch.setitem(UNITS, kind, wrong)
    with pytest.raises((ValueError, RuntimeError)): conforms(model, kind, save=False)


@pytest.mark.parametrize('family', ['phi3', 'gpt_neox'])
def test_a_wrong_layout_is_noticed(family, monkeypatch):
    wrong = Interleaved() if family == 'phi3' else Stacked()
    monkeypatch.setitem(FAMILIES, family, replace(FAMILIES[family], layout=wrong))
    with pytest.raises((ValueError, RuntimeError)): conforms(build(family, 1), 'kv_group', save=False)


# ---- heads that must stay -------------------------------------------------------------------------------------------

@pytest.mark.parametrize('family', ['bloom', 'mpt', 'olmo2', 'gpt_oss'])
def test_heads_that_belong_together_stay(family, monkeypatch):
    model = build(family)
    with pytest.raises(ValueError, match='heads of this family must stay.*kv_group cannot be cut; value_channel can'): couplings(model, 'kv_group')
    monkeypatch.setitem(FAMILIES, family, replace(FAMILIES[family], heads_stay=''))
    with pytest.raises((ValueError, RuntimeError)): conforms(model, 'kv_group', save=False)    # the reason


@pytest.mark.parametrize('family,config', [('falcon', dict(alibi=True)), ('cohere', dict(use_qk_norm=True)), ('stablelm', dict(qk_layernorm=True))])
def test_heads_may_stay_for_a_setting(family, config):
    assert 'kv_group' in kinds_of(build(family)) and 'kv_group' not in kinds_of(build(family, **config))


# ---- mixtures of experts ---------------------------------------------------------------------------------------------

def test_a_model_without_an_mlp_of_linears():
    model = build('mixtral')
    with pytest.raises(ValueError, match='no MLP of linear layers.*mlp_channel cannot be cut.*value_channel'): couplings(model, ('value_channel', 'mlp_channel'))
    assert {c.part for c in couplings(model, 'kv_group')} == {'attention'} and {c.part for c in couplings(model, 'expert')} == {'experts'}


@pytest.mark.parametrize('family,width', [('qwen2_moe', [37, 37, 37]), ('qwen3_moe', [37, 0, 0])])
def test_blocks_with_and_without_experts(family, width):
    model = build(family)
    assert [b.mlp_width for b in anatomy(model)] == width
    assert [c.layer for c in couplings(model, 'mlp_channel')] == [i for i, f in enumerate(width) if f]


@pytest.mark.parametrize('family', MIXTURES)
def test_experts_and_routers_stay_bit_for_bit(family):
    model = build(family)
    small = check_method(model, configured('recipe', dict(units=units_of(model))), some(model))
    before, after = model.state_dict(), small.state_dict()
    own = [n for n in before if '.experts.' in n or '.gate.' in n or '.router.' in n]
    assert own and all(torch.equal(before[n], after[n]) for n in own)


# ---- drift ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('family', [f for f in MODELS if f not in ONLY_ATTENTION])
def test_what_a_second_linear_loses_is_what_the_stream_loses(family):
    "Where outputs add to the stream, a change of them is a change of the stream; a norm or a gate would bend it. `adds` says which."
    model = build(family)
    b = [b for b in anatomy(model) if b.has('mlp')][-1]
    ids, shift = torch.randint(3, 97, (2, 9), generator=torch.Generator().manual_seed(3)), torch.linspace(-1, 1, model.config.hidden_size)

    def state(shift):
        seen, pick = [], lambda y: y if isinstance(y, torch.Tensor) else y[0]
        handles = [model.get_submodule(b.mlp_second).register_forward_hook(lambda m, a, y: y + shift),
                   model.get_submodule(b.name).register_forward_hook(lambda m, a, y: seen.append(pick(y)))]
        with torch.no_grad(): model(ids, use_cache=False)
        for h in handles: h.remove()
        return seen[0]

    change = state(shift) - state(0*shift)
    scale = change.mean(dim=(0, 1)) @ shift/(shift @ shift)                                       # Granite multiplies by a number
    assert torch.allclose(change, (scale*shift).expand_as(change), atol=1e-4) is b.family.adds


# ---- one configuration for blocks of different sizes ----------------------------------------------------------------

@pytest.fixture
def uneven():
    "Phi-3 with 4 and 2 query heads in its first two blocks, and 6 in the last."
    return slice_units(build('phi3', 1), {'0.query_head': [0, 2, 3, 5], '1.query_head': [1, 4]})


def test_each_block_sees_its_own_number_of_heads(uneven):
    seen = [layer.self_attn.config for layer in uneven.model.layers]
    assert [c.num_attention_heads for c in seen] == [4, 2, 6] and uneven.config.num_attention_heads == 6
    assert [isinstance(c, OwnConfig) for c in seen] == [True, True, False]
    uneven.set_attn_implementation('eager')
    assert {c._attn_implementation for c in seen} == {'eager'}                                # what is not its own follows the model


def test_uneven_heads_survive_copies_and_files(uneven, tmp_path):
    expected = padded_logits(uneven)
    for again in (copy.deepcopy(uneven), pickle.loads(pickle.dumps(uneven)), load_pruned(save_pruned(uneven, None, tmp_path/'small'), device='cpu')[0]):
        assert torch.equal(padded_logits(again), expected)
        assert [layer.self_attn.config.num_attention_heads for layer in again.model.layers] == [4, 2, 6]
    assert not fits_stock_class(uneven)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path/'small', trust_remote_code=True).eval()
    assert torch.equal(padded_logits(plain), expected)     # without this package, by way of the modelling file


@pytest.mark.parametrize('kind', ['kv_group', 'query_head', 'mlp_channel'])
def test_equal_blocks_of_phi3_are_an_ordinary_model(kind, tmp_path):
    model = build('phi3', 1)
    kept = {c.name: random_kept(model, kind)[f'0.{kind}'] for c in couplings(model, kind)}
    if kind == 'kv_group': kept = {n: [1] for n in kept}
    small = slice_units(model, kept)
    assert fits_stock_class(small)
    save_pruned(small, None, tmp_path/'small')
    plain = AutoModelForCausalLM.from_pretrained(tmp_path/'small')
    assert type(plain) is type(small) and torch.equal(padded_logits(plain.eval()), padded_logits(small))


@pytest.mark.parametrize('family', ['phi3', 'gpt_neox'])
def test_generation_with_and_without_cache(family):
    model = build(family, 1)
    ids, kw = torch.randint(3, 97, (2, 9), generator=torch.Generator().manual_seed(2)), dict(max_new_tokens=5, min_new_tokens=5, do_sample=False, pad_token_id=0)
    for kinds in combinations(model):
        small = slice_units(copy.deepcopy(model), random_kept(model, kinds))
        assert torch.equal(*(small.generate(ids, use_cache=c, **kw) for c in (True, False))), kinds


# ---- a kind of unit that says too little ----------------------------------------------------------------------------

def test_what_a_kind_of_unit_must_say():
    b = anatomy(build('llama'))[0]
    for ask in (lambda: Unit().firsts(b), lambda: Unit().second(b), lambda: Unit().left(b, 1)):
        with pytest.raises(NotImplementedError, match='Unit has no'): ask()

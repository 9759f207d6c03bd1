"""Every family with every kind of unit keeps the promises of `prunebook.conform`. A row of `MODELS` adds a family, a class in `UNITS` a kind of unit."""
import copy
import pickle
from dataclasses import replace

import pytest
import torch
from prunebook.conform import combinations, conforms, padded_logits, random_kept
from prunebook.couplings import FAMILIES, UNITS, Family, Interleaved, MLPChannel, OwnConfig, Stacked, Unit, anatomy, couplings, kinds_of, slice_units
from prunebook.models import TINY
from prunebook.save import fits_stock_class, load_pruned, save_pruned
from transformers import AutoConfig, AutoModelForCausalLM

pytestmark = pytest.mark.usefixtures('one_thread', 'own_modules')

SMALL = dict(vocab_size=97, hidden_size=24, intermediate_size=37, num_hidden_layers=3, num_attention_heads=6, bos_token_id=1, eos_token_id=2, pad_token_id=0)
GROUPED = {f: [dict(num_key_value_heads=k) for k in (1, 2, 3, 6)] for f in ('llama', 'mistral', 'qwen2', 'qwen3', 'phi', 'gemma')}
MODELS = {
    **{family: (config, GROUPED.get(family, [{}])) for family, config in TINY.items()},
    'phi3': (dict(SMALL, head_dim=8), [dict(num_key_value_heads=k) for k in (1, 2, 6)]),
    'gpt_neox': (SMALL, [{}, dict(use_parallel_residual=False, attention_bias=False)])}         # family: its configuration, and variants of it
ROWS = [(family, variant) for family, (_, variants) in MODELS.items() for variant in range(len(variants))]
PLAIN = [(f, min(1, len(MODELS[f][1]) - 1)) for f in MODELS]                                     # one variant of each, with grouped queries if it can


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

def test_every_family_has_a_row(): assert set(MODELS) == set(FAMILIES)


@pytest.mark.parametrize('family,variant', ROWS)
def test_conformance(family, variant):
    "Masked is sliced, costs are exact, groups stay even, couplings are kept up to date, files give the same bits."
    model, tried = build(family, variant), set()
    for kinds in combinations(model):
        conforms(model, kinds, save=variant == PLAIN[list(MODELS).index(family)][1])
        tried |= set(kinds)
    grouped = any(b.heads > b.kv_heads for b in anatomy(model))
    assert tried == {'mlp_channel', 'kv_group', 'value_channel', *['query_head']*grouped}       # no family has less than it could have


@pytest.mark.parametrize('family,variant', PLAIN)
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

def test_heads_that_the_model_numbers_stay(monkeypatch):
    names = dict(attention='self_attention', qkv=('self_attention.query_key_value',), out='self_attention.dense', mlp_firsts=('mlp.dense_h_to_4h',),
                 mlp_second='mlp.dense_4h_to_h', heads=(), attributes=(), layout=Interleaved())
    monkeypatch.setitem(MODELS, 'bloom', (dict(SMALL, n_layer=3, n_head=6), [{}]))
    monkeypatch.setitem(FAMILIES, 'bloom', Family(**names))
    with pytest.raises(RuntimeError): conforms(build('bloom'), 'kv_group')                    # the reason for what follows
    monkeypatch.setitem(FAMILIES, 'bloom', Family(**names, heads_stay=True))
    assert combinations(model := build('bloom')) == [('mlp_channel',), ('value_channel',), ('value_channel', 'mlp_channel')]
    for kinds in combinations(model): conforms(model, kinds)
    with pytest.raises(ValueError, match='heads of this family must stay.*kv_group cannot be cut; value_channel can'): couplings(model, ('kv_group', 'mlp_channel'))


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

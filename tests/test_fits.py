"""Which models are ordinary, at the head counts of real models; and that no folder loads with tensors of its own invention."""
import json

import pytest
import torch
from helpers import tiny_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from prunebook.couplings import FAMILIES, Family, anatomy, couplings, slice_units
from prunebook.fasp import FASP
from prunebook.methods import as_method
from prunebook.pruning import prune
from prunebook.models import write_manifest
from prunebook.save import _stock_class, fits_stock_class, layout, load_pruned, pruned_class, save_pruned, upgraded
from prunebook.text import Windows

pytestmark = pytest.mark.usefixtures('one_thread', 'own_modules')
IDS = torch.randint(3, 97, (2, 12), generator=torch.Generator().manual_seed(0))
W = Windows(torch.randint(3, 97, (4, 16), generator=torch.Generator().manual_seed(1)), 'random')


@torch.no_grad()
def logits(m): return m(IDS).logits


def survives(m, plan, folder):
    "Saved and loaded, the same bits; returns whether a modelling file was needed."
    again, _, read = load_pruned(save_pruned(m, plan, folder), device='cpu')
    assert torch.equal(logits(again), logits(m)) and read == plan
    return (folder/'modeling_pruned.py').exists()


# ---- head counts of real models -------------------------------------------------------------------------------------

REAL = [(32, 32), (32, 8), (40, 40), (28, 4), (14, 2), (9, 3)]                                 # Llama-2-7B, Llama-3-8B, Llama-2-13B, Qwen2.5-7B, Qwen2.5-0.5B, SmolLM2
METHODS = dict(wanda_sp=lambda: 'wanda_sp', taylor=lambda: 'taylor', flap=lambda: 'flap', fasp=lambda: FASP(units=('kv_group', 'mlp_channel')))


@pytest.mark.parametrize('method', METHODS)
@pytest.mark.parametrize('heads,kv_heads', REAL)
def test_real_head_counts(heads, kv_heads, method, tmp_path):
    m = tiny_model('llama', hidden_size=4*heads, intermediate_size=50, num_hidden_layers=2, num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=4)
    small, plan = prune(m, W, METHODS[method](), .2)
    needs_file = survives(small, plan, tmp_path/'x')
    assert needs_file == (not fits_stock_class(small))


@pytest.mark.parametrize('family', ['llama', 'mistral', 'qwen2', 'qwen3', 'phi', 'gemma', 'opt', 'gpt2'])
@pytest.mark.parametrize('left', [1, 3, 5, 6, 7])
def test_every_head_count(family, left, tmp_path):
    "Of 8 heads; with some counts the stock configuration is refused, with some it is not."
    kw = dict(num_key_value_heads=8) if family not in ('opt', 'gpt2') else {}
    m = tiny_model(family, hidden_size=32, num_attention_heads=8, **kw)
    slice_units(m, {f'{i}.kv_group': list(range(left)) for i in range(3)})
    assert {b.heads for b in anatomy(m)} == {left}
    if survives(m, None, tmp_path/'x'): return
    plain = AutoModelForCausalLM.from_pretrained(tmp_path/'x').eval()                         # no trust_remote_code
    assert type(plain) is _stock_class(m) and torch.equal(logits(plain), logits(m))


# ---- nothing missing, nothing unknown -------------------------------------------------------------------------------

def neox(monkeypatch):
    monkeypatch.setitem(FAMILIES, 'gpt_neox', Family('attention', ('attention.query_key_value',), 'attention.dense', ('mlp.dense_h_to_4h',), 'mlp.dense_4h_to_h', heads=(),
                                                     attributes=(('num_heads', lambda b: b.heads),)))
    torch.manual_seed(0)
    m = AutoModelForCausalLM.from_config(AutoConfig.for_model('gpt_neox', vocab_size=97, hidden_size=24, intermediate_size=37, num_hidden_layers=3, num_attention_heads=6,
                                                              bos_token_id=1, eos_token_id=2, pad_token_id=0)).float().eval()
    with torch.no_grad():
        for p in m.parameters(): p.normal_(0, .3)
    return m


def test_a_family_that_renames_its_head(tmp_path, monkeypatch):
    "Ragged needs the modelling file, even does not; and one becomes the other."
    m = neox(monkeypatch)
    slice_units(m, {f'{i}.mlp_channel': list(range(20 + i)) for i in range(3)})
    assert survives(m, None, tmp_path/'ragged')
    once = load_pruned(tmp_path/'ragged', device='cpu')[0]
    assert survives(once, None, tmp_path/'again')
    slice_units(once, {f'{i}.mlp_channel': list(range(20)) for i in range(3)})
    assert not survives(once, None, tmp_path/'even')
    even = slice_units(m, {f'{i}.mlp_channel': list(range(20)) for i in range(3)})
    assert not survives(even, None, tmp_path/'stock')
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path/'stock').eval()), logits(even))


def ragged(kind='mlp_channel'):
    m = tiny_model('llama')
    return slice_units(m, {c.name: [u for u in range(c.n_units) if u % (c.n_units//c.groups) > c.layer] for c in couplings(m, kind)})


@pytest.mark.parametrize('how', ['missing', 'unexpected', 'mismatched', 'renamed'])
@pytest.mark.parametrize('model', [ragged, lambda: tiny_model('llama')], ids=['file', 'stock'])
def test_tensors_must_be_those_of_the_model(model, how, tmp_path):
    folder = save_pruned(model(), None, tmp_path/'x')
    weights = load_file(folder/'model.safetensors')
    name = 'model.layers.1.mlp.up_proj.weight'
    if how in ('missing', 'renamed'): old = weights.pop(name)
    if how == 'renamed': weights['model.layers.1.mlp.up.weight'] = old
    if how == 'unexpected': weights['model.layers.1.mlp.new.weight'] = weights[name].clone()
    if how == 'mismatched': weights[name] = weights[name][:-1].clone()
    save_file(weights, folder/'model.safetensors', metadata={'format': 'pt'})
    write_manifest(folder)
    with pytest.raises((ValueError, RuntimeError), match='mlp.up_proj|mlp.new|mismatch'): load_pruned(folder, device='cpu')
    if (folder/'modeling_pruned.py').exists():
        with pytest.raises((ValueError, RuntimeError), match='mlp.up_proj|mlp.new|mismatch'): AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)


# ---- folders of other versions, models in other models --------------------------------------------------------------

@pytest.mark.parametrize('family', ['llama', 'gpt2', 'opt'])
def test_folders_of_version_0_1_can_be_read(family, tmp_path):
    "Their configuration lists bridge modules among the linears; GPT-2's were linears with (out, in) weights."
    m = tiny_model(family)
    slice_units(m, {c.name: [u for u in range(c.n_units) if u % (c.n_units//c.groups) > c.layer] for c in couplings(m, 'value_channel')})
    folder = save_pruned(m, None, tmp_path/'x')
    cfg, weights = json.loads((folder/'config.json').read_text()), load_file(folder/'model.safetensors')
    found, new = cfg['pruned'], layout(m)
    del found['values']
    for attention, n in new['values'].items():
        first, second = f"{attention}.{n['first']}", f"{attention}.{n['second']}"
        for name, kind, extra in ((first, 'PaddedValue', [n['head_dim'], n['value_dim'], n['lead']]), (second, 'UnpaddedOutput', [n['head_dim'], n['value_dim']])):
            if found['linears'][name][0] == 'Conv1D': weights[name + '.weight'] = weights[name + '.weight'].T.contiguous()
            found['linears'][name] = [kind, *found['linears'][name][1:], *extra]
    save_file(weights, folder/'model.safetensors', metadata={'format': 'pt'})
    old = AutoConfig.for_model(**cfg)
    assert upgraded(new) == new and upgraded(found) is not found
    old.pruned = upgraded(found)
    again = pruned_class(_stock_class(m)).from_pretrained(folder, config=old).eval()
    assert (logits(again) - logits(m)).abs().max() <= 1e-5*logits(m).abs().max()


def test_our_own_class_needs_no_file(tmp_path):
    m = ragged(('value_channel', 'mlp_channel'))
    folder = save_pruned(m, None, tmp_path/'x')
    (folder/'modeling_pruned.py').write_text('raise SystemExit')
    again = pruned_class(_stock_class(m)).from_pretrained(folder).eval()
    assert torch.equal(logits(again), logits(m)) and survives(again, None, tmp_path/'again')


@pytest.mark.parametrize('model', [ragged, lambda: tiny_model('llama')], ids=['file', 'stock'])
@pytest.mark.parametrize('wrap', [torch.compile, nn.DataParallel])
def test_wrapped_models_are_saved_as_what_they_are(model, wrap, tmp_path):
    m = model()
    again, _, _ = load_pruned(save_pruned(wrap(m), None, tmp_path/'x'), device='cpu')
    assert torch.equal(logits(again), logits(m)) and again.state_dict().keys() == m.state_dict().keys()

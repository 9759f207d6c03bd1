"""Nothing in a folder runs, no weight is made up, and whatever is damaged is refused in one sentence."""
import copy
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import tiny_model
from safetensors.torch import load_file, save_file

from prunebook import couplings as couplings_module
from prunebook.couplings import Family, couplings, slice_units
from prunebook.load import _read_weights, load_ours
from prunebook.models import MANIFEST, TINY, load_model, write_manifest
from prunebook.save import load_pruned, save_pruned

pytestmark = pytest.mark.usefixtures('one_thread')
IDS = torch.randint(3, 97, (2, 12), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def logits(m): return m(IDS).logits


def narrow(family):
    "A model whose blocks differ, with narrow values: it needs a layout."
    m = tiny_model(family)
    kept = {c.name: [i for i in range(c.n_units) if i % (c.n_units//c.groups) > c.layer] for c in couplings(m, ('value_channel', 'mlp_channel'))}
    return slice_units(m, kept)


KINDS = dict(layout=narrow, stock=tiny_model)
both_kinds = pytest.mark.parametrize('kind', KINDS)


@pytest.fixture
def saved(tmp_path, tiny_tokenizer):
    "Saves a model of a kind in a folder of ours: folder and model."
    def save(kind, family='llama', name='saved'):
        m = KINDS[kind](family)
        return save_pruned(m, None, tmp_path/name, tiny_tokenizer), m
    return save


def edit(path, **entries):
    "Set entries of a JSON file."
    path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))


# ---- booby traps ----------------------------------------------------------------------------------------------------

class Payload:
    def __init__(self, code): self.code = code
    def __reduce__(self): return exec, (self.code,)


def trap(folder, manifest=True):
    "Code wherever code could be run from; returns the file that appears if it is."
    mark = folder.parent/'it ran'
    code = f'open({str(mark)!r}, "a").write(__name__)\n'
    classes = 'from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast\nclass C(LlamaConfig): pass\nclass M(LlamaForCausalLM): config_class = C\nclass T(PreTrainedTokenizerFast): pass\ndef generate(*args, **kw): pass\n'
    for name in ('modeling_pruned.py', 'evil.py', '__init__.py', 'prunebook.py', 'tokenizer.py', 'custom_generate/generate.py'):
        (folder/name).parent.mkdir(exist_ok=True)
        (folder/name).write_text(code + classes)
    edit(folder/'config.json', auto_map={'AutoConfig': 'evil.C', 'AutoModelForCausalLM': 'evil.M', 'AutoTokenizer': ['evil.T', 'evil.T']},
         transformers_weights='pytorch_model.bin')
    edit(folder/'tokenizer_config.json', auto_map={'AutoTokenizer': ['evil.T', 'evil.T']})
    (folder/'generation_config.json').write_text(json.dumps(dict(auto_map={'AutoModelForCausalLM': 'evil.M'}, custom_generate='evil')))
    (folder/'pytorch_model.bin').write_bytes(pickle.dumps(Payload(code.replace('__name__', '"pickle"'))))
    if manifest: write_manifest(folder)
    return mark


@both_kinds
@pytest.mark.parametrize('load', [load_pruned, load_model, lambda f, **kw: load_model(f, trust_remote_code=True, **kw)], ids=['load_pruned', 'load_model', 'trusting'])
def test_nothing_in_our_folder_runs(saved, load, kind, monkeypatch, tiny_tokenizer):
    folder, m = saved(kind)
    mark = trap(folder)
    monkeypatch.chdir(folder)
    model, tokenizer, *_ = load(folder, device='cpu', dtype=torch.float32)
    assert torch.equal(logits(model), logits(m)) and tokenizer('abc').input_ids == tiny_tokenizer('abc').input_ids
    assert model.generate(IDS, max_new_tokens=2, pad_token_id=0).shape == (2, 14)
    assert not mark.exists()


@both_kinds
def test_pickled_weights_are_not_read(saved, kind):
    folder, _ = saved(kind)
    mark = trap(folder)
    (folder/'model.safetensors').unlink()
    write_manifest(folder)
    for load in (load_pruned, load_model):
        with pytest.raises(ValueError, match='no model.safetensors'): load(folder)
    (folder/'model.safetensors.index.json').write_text(json.dumps(dict(weight_map={'lm_head.weight': 'pytorch_model.bin'})))
    write_manifest(folder)
    for load in (load_pruned, load_model):
        with pytest.raises(ValueError, match='not safetensors'): load(folder)
    assert not mark.exists()


def test_foreign_code_runs_only_if_asked(saved, tmp_path, monkeypatch):
    "And the trap is one: it does run then. The tokenizer's never does."
    monkeypatch.setattr('transformers.dynamic_module_utils.HF_MODULES_CACHE', str(tmp_path/'modules'))
    monkeypatch.setattr(sys, 'path', list(sys.path))
    folder, m = saved('stock')
    mark = trap(folder, manifest=False)
    (folder/MANIFEST).unlink()
    edit(folder/'config.json', transformers_weights='model.safetensors')
    model, _ = load_model(folder, device='cpu', dtype=torch.float32)
    assert not mark.exists() and torch.equal(logits(model), logits(m))
    edit(folder/'config.json', model_type='something_new', auto_map={'AutoConfig': 'evil.C', 'AutoModelForCausalLM': 'evil.M'})
    with pytest.raises(ValueError, match='trust_remote_code'): load_model(folder)
    assert not mark.exists()
    edit(folder/'config.json', model_type='llama')
    assert type(load_model(folder, device='cpu', trust_remote_code=True)[0]).__name__ == 'M' and mark.exists()
    mark.unlink()
    edit(folder/'tokenizer_config.json', tokenizer_class='T')
    with pytest.raises(ValueError): load_model(folder, device='cpu', trust_remote_code=True)
    assert not mark.exists()


def test_a_folder_cannot_send_us_elsewhere(saved):
    "An adapter's configuration names a base model; a configuration names kernels."
    folder, m = saved('layout')
    (folder/'adapter_config.json').write_text(json.dumps(dict(base_model_name_or_path=str(folder.parent/'elsewhere'), peft_type='LORA')))
    edit(folder/'config.json', attn_implementation='someone/kernel', _attn_implementation_internal='someone/kernel', quantization_config=dict(quant_method='awq'))
    write_manifest(folder)
    assert torch.equal(logits(load_pruned(folder, device='cpu')[0]), logits(m))


@pytest.mark.parametrize('change', [
    lambda c: c['pruned']['linears'].update({'model.norm': ['Linear', 24, 24, False]}), lambda c: c['pruned']['linears'].update({'model.layers.9.mlp.up_proj': ['Linear', 2, 2, False]}),
    lambda c: c['pruned']['linears'].update({'model.layers.0.mlp.up_proj': ['eval', 24, 24, False]}), lambda c: c['pruned']['linears'].update({'model.layers.0.mlp.up_proj': ['Linear', 24]}),
    lambda c: c['pruned']['linears'].update({'model.layers.0.mlp.up_proj': ['Linear', -24, 24, False]}), lambda c: c['pruned']['linears'].update({'model.layers.0.mlp.up_proj': ['Linear', 1e3, 24, False]}),
    lambda c: c['pruned']['linears'].update({'model.layers.0.mlp.up_proj': ['Linear', 24, 24, 'print']}), lambda c: c['pruned']['linears'].update({'model.layers.0.mlp.up_proj': None}),
    lambda c: c['pruned']['linears'].update({'model.layers.0.mlp.up_proj': ['Linear', 24, 24, True]}), lambda c: c['pruned']['attributes'].update({'model': dict(forward=1)}),
    lambda c: c['pruned']['attributes'].update({'model.layers.0.self_attn': dict(num_key_value_groups='3')}), lambda c: c['pruned']['attributes'].update({'nowhere': dict(a=1)}),
    lambda c: c['pruned']['values']['model.layers.0.self_attn'].update(first='forward'), lambda c: c['pruned']['values']['model.layers.0.self_attn'].update(head_dim='8'),
    lambda c: c['pruned']['values'].update({'nowhere': {}}), lambda c: c['pruned']['values']['model.layers.0.self_attn'].update(more=1), lambda c: c.update(pruned=None), lambda c: c.update(pruned=[]), lambda c: c.update(pruned={}), lambda c: c.update(architectures=['PrunedGPT2LMHeadModel']),
    lambda c: c.update(architectures=['PrunedPreTrainedModel']), lambda c: c.update(architectures='Llama'), lambda c: c.update(architectures=None), lambda c: c.update(architectures=['os.system']),
    lambda c: c.update(model_type='gpt2'), lambda c: c.update(model_type=None)])
def test_a_layout_is_data_that_is_checked(saved, change):
    folder, _ = saved('layout')
    config = json.loads((folder/'config.json').read_text())
    change(config)
    (folder/'config.json').write_text(json.dumps(config))
    write_manifest(folder)
    for load in (load_pruned, load_model):
        with pytest.raises(ValueError) as e: load(folder, device='cpu')
        assert str(e.value).startswith(f'Cannot load {str(folder)!r}: ') and '\n' not in str(e.value)


# ---- every tensor finds its place -----------------------------------------------------------------------------------

def change_weights(folder, change):
    state = load_file(folder/'model.safetensors')
    change(state)
    save_file(state, folder/'model.safetensors', metadata=dict(format='pt'))


@both_kinds
@pytest.mark.parametrize('lost', ['lm_head.weight', 'model.layers.1.mlp.up_proj.weight', 'model.norm.weight', 'model.layers.0.self_attn.v_proj.bias'])
@pytest.mark.fault('A tensor is missing in a model folder', 'Refused; nothing random takes its place.')
def test_missing_tensors_are_refused(saved, kind, lost):
    folder, _ = saved(kind)
    change_weights(folder, lambda s: s.pop(lost))
    write_manifest(folder)
    for load in (load_pruned, load_model):
        with pytest.raises(ValueError, match=f'missing: {lost}'): load(folder)
    if kind == 'stock':                                    # as any other folder
        (folder/MANIFEST).unlink()
        with pytest.raises(ValueError, match=f'missing: {lost}'): load_model(folder)


@both_kinds
def test_tensors_without_a_place_are_refused(saved, kind):
    folder, _ = saved(kind)
    change_weights(folder, lambda s: s.update(stranger=torch.zeros(2)))
    write_manifest(folder)
    for load in (load_pruned, load_model):
        with pytest.raises(ValueError, match='unexpected: stranger'): load(folder)


@pytest.mark.parametrize('family', TINY)
def test_any_folder_of_transformers_loads(family, tmp_path, tiny_tokenizer):
    m = tiny_model(family)
    m.save_pretrained(tmp_path/'a')
    tiny_tokenizer.save_pretrained(tmp_path/'a')
    plain, _ = load_model(tmp_path/'a', device='cpu', dtype=torch.float32)
    write_manifest(tmp_path/'a')
    ours, _ = load_model(tmp_path/'a', device='cpu', dtype=torch.float32)
    assert torch.equal(logits(plain), logits(m)) and torch.equal(logits(ours), logits(m)) and type(ours) is type(m)
    assert ours.generation_config.to_dict() == plain.generation_config.to_dict() and ours.config.to_dict() == plain.config.to_dict()
    assert ours.config._name_or_path == str(tmp_path/'a')
    tied = m.config.tie_word_embeddings
    assert (ours.lm_head.weight is ours.get_input_embeddings().weight) == tied


@pytest.mark.parametrize('family', ['llama', 'qwen3'])
def test_folders_of_version_0_1_load(saved, family):
    "Its narrow values were linears of two kinds of their own, its manifest held sizes."
    folder, m = saved('layout', family)
    config = json.loads((folder/'config.json').read_text())
    new = config['pruned']
    for attention, v in new.pop('values').items():
        lead = [v['lead']] if v['lead'] else []
        for part, kind, extra in (('first', 'PaddedValue', lead), ('second', 'UnpaddedOutput', [])):
            new['linears'][f'{attention}.{v[part]}'] = [kind, *new['linears'][f'{attention}.{v[part]}'][1:], v['head_dim'], v['value_dim'], *extra]
    edit(folder/'config.json', pruned=new)
    write_manifest(folder)
    (folder/MANIFEST).write_text(json.dumps({n: v['size'] for n, v in json.loads((folder/MANIFEST).read_text()).items()}))
    assert torch.equal(logits(load_pruned(folder, device='cpu')[0]), logits(m))


def test_weights_in_several_files(tmp_path, tiny_tokenizer):
    m = narrow('llama')
    whole = save_pruned(m, None, tmp_path/'whole')
    m.save_pretrained(tmp_path/'parts', max_shard_size='20KB')
    for p in whole.iterdir():
        if p.name not in (MANIFEST, 'model.safetensors'): (tmp_path/'parts'/p.name).write_bytes(p.read_bytes())
    write_manifest(tmp_path/'parts')
    assert len(list((tmp_path/'parts').glob('*.safetensors'))) > 3 and _read_weights(tmp_path/'parts').keys() == _read_weights(whole).keys()
    assert torch.equal(logits(load_pruned(tmp_path/'parts', device='cpu')[0]), logits(m))


def test_a_family_that_renames_its_head(tmp_path, monkeypatch):
    "GPT-NeoX calls its head by another name in files: it was random after loading."
    monkeypatch.setitem(couplings_module.FAMILIES, 'gpt_neox',
                        Family('attention', ('attention.query_key_value',), 'attention.dense', ('mlp.dense_h_to_4h',), 'mlp.dense_4h_to_h', 'intermediate_size', (),
                               (('num_heads', lambda b: b.heads),)))
    from transformers import AutoConfig, AutoModelForCausalLM
    torch.manual_seed(0)
    m = AutoModelForCausalLM.from_config(AutoConfig.for_model('gpt_neox', vocab_size=97, hidden_size=24, intermediate_size=37, num_hidden_layers=3, num_attention_heads=6)).eval()
    for layer in m.gpt_neox.layers: layer.attention.num_heads = 6
    slice_units(m, {c.name: list(range(c.n_units - c.layer)) for c in couplings(m, 'mlp_channel')})
    save_pruned(m, None, tmp_path/'saved')
    assert torch.equal(logits(load_pruned(tmp_path/'saved', device='cpu')[0]), logits(m))


@both_kinds
def test_a_loaded_model_is_a_model_like_any_other(saved, kind, tmp_path):
    "Deep copies, training, another precision, and what the configuration says."
    folder, m = saved(kind)
    again = load_pruned(folder, device='cpu')[0]
    twin = copy.deepcopy(again)
    assert torch.equal(logits(twin), logits(m)) and twin.config.to_dict() == again.config.to_dict()
    twin(IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None for p in twin.parameters())
    half = load_ours(folder, torch.bfloat16)
    assert half.dtype == torch.bfloat16 and half.config.dtype == torch.bfloat16
    (folder/'model.safetensors').unlink()                  # what is loaded does not hang on the file
    assert torch.equal(logits(again), logits(m))


# ---- damage ---------------------------------------------------------------------------------------------------------

def set_config(**entries): return lambda f: edit(f/'config.json', **entries)


def put(name, data): return lambda f: (f/name).write_bytes(data)


DAMAGE = {f'{name} {data[:12]}': put(name, data) for name in ('config.json', 'tokenizer_config.json', 'tokenizer.json', 'generation_config.json')
          for data in (b'', b'[]', b'null', b'{"a":', b'\xff\xfe\x00', b'"text"')}
DAMAGE |= {f'weights {data[:12]}': put('model.safetensors', data) for data in (b'', b'\0'*7, b'\x08\0\0\0\0\0\0\0{}      ', b'\xff'*100, b'not weights at all')}
DAMAGE |= {str(e): set_config(**e) for e in (dict(num_attention_heads=0), dict(hidden_size=0), dict(num_hidden_layers=-1), dict(vocab_size='many'), dict(hidden_size=None),
                                            dict(num_key_value_heads=0), dict(rope_parameters=5), dict(hidden_act='nothing'), dict(dtype='float5'), dict(model_type=5),
                                            dict(num_attention_heads=[6]), dict(hidden_size=12), dict(architectures=5))}
DAMAGE |= {'cut weights': lambda f: put('model.safetensors', (f/'model.safetensors').read_bytes()[:-100])(f),
           'no weights': lambda f: (f/'model.safetensors').unlink(), 'a pickle': lambda f: [(f/'model.safetensors').unlink(), put('pytorch_model.bin', b'\x80\x04garbage')(f)],
           'index': put('model.safetensors.index.json', b'[]'), 'index of strangers': put('model.safetensors.index.json', b'{"weight_map": {"a": "../../x.safetensors"}}')}
HARMLESS = ('generation_config.json', 'index')             # transformers does not need them where there is one weights file


@pytest.mark.parametrize('ours', [True, False], ids=['ours', 'any folder'])
@pytest.mark.parametrize('damage', DAMAGE)
@pytest.mark.fault('A model folder is damaged in any file', 'One sentence that names the folder and the reason.')
def test_damage_is_said_in_one_sentence(saved, damage, ours):
    folder, m = saved('stock')
    DAMAGE[damage](folder)
    if ours: write_manifest(folder)
    else: (folder/MANIFEST).unlink()
    try: model, _ = load_model(folder, device='cpu', dtype=torch.float32)
    except ValueError as e: assert str(e).startswith(f'Cannot load {str(folder)!r}: ') and '\n' not in str(e) and len(str(e)) < 600
    else: assert damage.startswith(HARMLESS + ('tokenizer_config', str(dict(architectures=5)), str(dict(dtype='float5')))) and torch.equal(logits(model), logits(m))


@pytest.mark.parametrize('device', ['cuda:99', 'nowhere', 'meta:x'])
def test_unusable_devices_are_named(device):
    with pytest.raises(ValueError, match=device): load_model('./no-such', device=device)


# ---- a hub that does not answer -------------------------------------------------------------------------------------

HUB = '''
import sys, time
from transformers import AutoModelForCausalLM, AutoTokenizer
from prunebook.models import load_model
load_model(sys.argv[1])                                    # all imports
for name in sys.argv[2:]:
    start = time.time()
    try: print(type(load_model(name, device='cpu')[0]).__name__)
    except ValueError as e: print(str(e).replace(chr(10), '|'))
    print(time.time() - start)
'''


def cached(model, tokenizer, cache, name):
    "Put a model where the hub's client keeps what it fetched."
    place = cache/f'models--{name.replace("/", "--")}'
    for x in (model, tokenizer): x.save_pretrained(place/'snapshots'/('a'*40))
    (place/'refs').mkdir()
    (place/'refs'/'main').write_text('a'*40)


@pytest.mark.parametrize('hub', ['refuses', 'is silent'])
@pytest.mark.fault('There is no network, or the hub is silent', 'The message comes within seconds.')
def test_without_a_network(hub, tmp_path, tiny_tokenizer):
    "At most 5 seconds to the message; what is in the local cache loads."
    import socket
    cached(tiny_model('llama'), tiny_tokenizer, tmp_path/'cache', 'someone/known')
    with socket.socket() as server:
        server.bind(('127.0.0.1', 0))
        if hub == 'is silent': server.listen()
        env = {**os.environ, 'HF_HUB_OFFLINE': '0', 'HF_ENDPOINT': f'http://127.0.0.1:{server.getsockname()[1]}', 'HF_HUB_CACHE': str(tmp_path/'cache'), 'OMP_NUM_THREADS': '1',
               'PYTHONPATH': str(Path(__file__).parents[1]), 'no_proxy': '*'}
        r = subprocess.run([sys.executable, '-c', HUB, str(tmp_path/'cache'/'models--someone--known'/'snapshots'/('a'*40)), 'someone/unknown', 'someone/known'], capture_output=True, text=True, env=env, timeout=120)
    said, seconds, known, seconds_known = r.stdout.splitlines()
    assert "Cannot load 'someone/unknown'" in said and 'the hub did not' in said and '|' not in said, r.stderr
    assert float(seconds) < 5 and float(seconds_known) < 8 and known == 'LlamaForCausalLM'

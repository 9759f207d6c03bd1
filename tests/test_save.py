"""What is loaded is what was saved, bit for bit; and nothing but whole folders is ever left or accepted."""
import contextlib
import copy
import errno
import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch
from helpers import tiny_model
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from prunebook import models as models_module, save as save_module
from prunebook.couplings import NarrowValues, anatomy, couplings, slice_units
from prunebook.fasp import FASP
from prunebook.pruning import prune
from prunebook.recipe import Recipe
from prunebook.models import MANIFEST, TINY, is_complete, load_model, reserved_folder, verify, write_manifest
from prunebook.save import _modeling_source, _narrow_config, _stock_class, fits_stock_class, load_pruned, save_pruned
from prunebook.text import Windows

pytestmark = pytest.mark.usefixtures('one_thread', 'own_modules')
IDS = torch.randint(3, 97, (2, 12), generator=torch.Generator().manual_seed(0))
fork = multiprocessing.get_context('fork') if hasattr(os, 'fork') else None


# ---- what is saved --------------------------------------------------------------------------------------------------

@torch.no_grad()
def logits(m): return m(IDS).logits


def take(m, kinds, ragged=False, share=.4):
    "Remove the first units of every group; ragged: a different number in every block."
    kept = {}
    for c in couplings(m, kinds):
        size = c.n_units//c.groups
        gone = min(size - 1, max(1, int(size*share)) if not ragged else c.layer)
        kept[c.name] = [i for i in range(c.n_units) if i % size >= gone]
    return slice_units(m, kept)


def heads(m): return 'kv_group' if anatomy(m)[0].kv_heads > 1 else 'query_head'


def bfloat16(m):
    "As `from_pretrained` does it: parameters only. (`m.bfloat16()` would round the frequencies of the rotary embedding, too, which are not saved.)"
    for p in m.parameters(): p.data = p.data.bfloat16()
    return m


VARIANTS = dict(dense=lambda m: m, mlp=lambda m: take(m, 'mlp_channel'), heads=lambda m: take(m, (heads(m), 'mlp_channel')), ragged=lambda m: take(m, 'mlp_channel', True),
                ragged_heads=lambda m: take(m, (heads(m), 'mlp_channel'), True), values=lambda m: take(m, 'value_channel'),
                values_and_mlp=lambda m: take(m, ('value_channel', 'mlp_channel'), True))


def survives(m, folder):
    "Save and load; both models compute the same bits, and the saved one is as before."
    before, config = logits(m), m.config.to_dict()
    assert save_pruned(m, None, folder) == Path(folder)
    assert m.config.to_dict() == config and torch.equal(logits(m), before)
    again, tokenizer, plan = load_pruned(folder, device='cpu')
    assert tokenizer is None and plan is None and not again.training
    assert {p.dtype for p in again.parameters()} == {m.dtype}
    assert torch.equal(logits(again), before)
    assert [n for n, _ in again.named_parameters()] == [n for n, _ in m.named_parameters()]   # ties included
    return again


@pytest.mark.parametrize('variant', ['heads', 'ragged_heads', 'values', 'values_and_mlp'])
@pytest.mark.parametrize('family', TINY)
def test_bit_for_bit(family, variant, tmp_path):
    m = VARIANTS[variant](tiny_model(family))
    again = survives(m, tmp_path/'saved')
    stock = fits_stock_class(m)
    assert stock == (variant == 'heads' and family not in ('opt', 'gpt2'))
    assert (tmp_path/'saved'/'modeling_pruned.py').exists() != stock
    plain = AutoModelForCausalLM.from_pretrained(tmp_path/'saved', dtype='auto', trust_remote_code=not stock)
    assert torch.equal(logits(plain.eval()), logits(m))    # by way of the modelling file
    assert type(again).__module__.startswith('transformers.models.') == stock and _stock_class(again) is type(tiny_model(family))
    assert [(b.heads, b.kv_heads, b.value_dim, b.mlp_width) for b in anatomy(again)] == [(b.heads, b.kv_heads, b.value_dim, b.mlp_width) for b in anatomy(m)]


@pytest.mark.parametrize('family,variant', [*[(f, 'values_and_mlp') for f in TINY], ('llama', 'mlp'), ('gpt2', 'mlp'), ('opt', 'ragged')])
def test_bit_for_bit_in_bfloat16(family, variant, tmp_path):
    m = VARIANTS[variant](bfloat16(tiny_model(family)))
    again = survives(m, tmp_path/'saved')
    if variant == 'mlp':
        wide, _, _ = load_pruned(tmp_path/'saved', device='cpu', dtype=torch.float32)
        assert wide.dtype == torch.float32 and torch.equal(wide.lm_head.weight, again.lm_head.weight.float())


@pytest.mark.parametrize('family', TINY)
def test_the_loaded_model_generates(family, tmp_path):
    m = VARIANTS['values_and_mlp'](tiny_model(family))
    again = survives(m, tmp_path/'saved')
    kw = dict(max_new_tokens=6, do_sample=False, pad_token_id=0)
    expected = m.generate(IDS, use_cache=False, **kw)
    for cache in (True, False): assert torch.equal(again.generate(IDS, use_cache=cache, **kw), expected)
    assert torch.equal(again.get_input_embeddings().weight, m.get_input_embeddings().weight)


@pytest.mark.parametrize('family', TINY)
def test_uniform_widths_are_an_ordinary_model(family, tmp_path):
    "Plain transformers, no trust_remote_code, no trace of this package."
    m = VARIANTS['mlp'](tiny_model(family))
    save_pruned(m, None, tmp_path/'saved')
    plain = AutoModelForCausalLM.from_pretrained(tmp_path/'saved')
    assert fits_stock_class(m) and fits_stock_class(tiny_model(family)) and type(plain) is type(m) and torch.equal(logits(plain.eval()), logits(m))
    cfg = json.loads((tmp_path/'saved'/'config.json').read_text())
    assert cfg['architectures'] == [type(m).__name__] and not {'auto_map', 'pruned'} & cfg.keys() and 'prunebook' not in json.dumps(cfg)
    assert not list((tmp_path/'saved').glob('*.py'))
    assert _narrow_config(m).to_dict() != m.config.to_dict() and anatomy(m)[0].mlp_width == 23 != 37


def test_two_folders_of_one_name_do_not_mix(tmp_path):
    "transformers keeps copies of modelling files by folder name."
    saved = {f: VARIANTS['values'](tiny_model(f)) for f in ('llama', 'gpt2', 'qwen2')}
    for f, m in saved.items(): save_pruned(m, None, tmp_path/f/'pruned')
    for f, m in [*saved.items(), *saved.items()]: assert torch.equal(logits(load_pruned(tmp_path/f/'pruned', device='cpu')[0]), logits(m))
    other = VARIANTS['values_and_mlp'](tiny_model('llama'))
    save_pruned(other, None, tmp_path/'llama'/'pruned', overwrite=True)
    assert torch.equal(logits(load_pruned(tmp_path/'llama'/'pruned', device='cpu')[0]), logits(other))


CHECK = '''
import sys; sys.modules['prunebook'] = None
import torch, transformers
torch.set_num_threads(1)
for folder in sys.argv[1:]:
    m = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype='auto').eval()
    ids = torch.arange(3, 27).view(2, 12)
    with torch.no_grad(): print(m(ids).logits.double().sum().item().hex())
    a, b = (m.generate(ids, use_cache=c, max_new_tokens=6, do_sample=False, pad_token_id=0).tolist() for c in (True, False))
    print(a, a == b)
assert not any(n.startswith('prunebook') for n, x in sys.modules.items() if x)
'''


def test_a_fresh_process_without_this_package(tmp_path):
    "A grouped-query family with narrow value heads of blocks that differ, GPT-2 with its fused projection, and an ordinary model."
    saved = {}
    for family, variant in [('llama', 'values_and_mlp'), ('gpt2', 'values_and_mlp'), ('mistral', 'mlp')]:
        saved[f'{family}-{variant}'] = m = VARIANTS[variant](tiny_model(family))
        save_pruned(m, None, tmp_path/f'{family}-{variant}')
    r = subprocess.run([sys.executable, '-c', CHECK, *[str(tmp_path/n) for n in saved]], capture_output=True, text=True, cwd=tmp_path,
                       env={**os.environ, 'HF_HUB_OFFLINE': '1', 'HF_MODULES_CACHE': str(tmp_path/'modules'), 'OMP_NUM_THREADS': '1'})
    lines, ids = r.stdout.splitlines(), torch.arange(3, 27).view(2, 12)
    assert r.returncode == 0 and len(lines) == 6, r.stderr
    for i, m in enumerate(saved.values()):
        with torch.no_grad(): assert float.fromhex(lines[2*i]) == m(ids).logits.double().sum().item()
        assert lines[2*i + 1] == f'{m.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0).tolist()} True'


# ---- again and again ------------------------------------------------------------------------------------------------

AGAIN = [('mlp', 'mlp'), ('mlp', 'ragged'), ('mlp', 'values'), ('ragged', 'ragged'), ('ragged', 'values'), ('values', 'values'), ('values', 'mlp'), ('values_and_mlp', 'ragged'),
         ('values', 'dense'), ('ragged', 'dense'), ('heads', 'mlp'), ('ragged_heads', 'heads')]


@pytest.mark.parametrize('family,first,then', [(f, *a) for f in ('llama', 'gpt2', 'opt', 'phi') for a in (AGAIN if f == 'llama' else AGAIN[5:8])])
def test_save_load_prune_save_load(family, first, then, tmp_path):
    once = survives(VARIANTS[first](tiny_model(family)), tmp_path/'once')
    survives(VARIANTS[then](once), tmp_path/'twice')


@pytest.mark.parametrize('family', ['llama', 'opt', 'gpt2'])
@pytest.mark.parametrize('units', [('mlp_channel',), ('value_channel', 'mlp_channel')])
def test_fasp_twice_with_a_folder_between(family, units, tmp_path, tiny_tokenizer):
    w = Windows(torch.randint(3, 97, (4, 20), generator=torch.Generator().manual_seed(1)), 'random')
    m, first = prune(tiny_model(family), w, FASP(units=units), .2)
    save_pruned(m, first, tmp_path/'once', tiny_tokenizer)
    once, tokenizer, plan = load_pruned(tmp_path/'once', device='cpu')
    assert plan == first and tokenizer('The cat').input_ids == tiny_tokenizer('The cat').input_ids
    with pytest.raises(ValueError, match='load the dense model'): plan.apply(once)
    expected, second = prune(m, w, FASP(units=units), .2)
    again, plan = prune(once, w, FASP(units=units), .2)
    assert plan == second and torch.equal(logits(again), logits(expected))
    survives(again, tmp_path/'twice')


def test_an_extraordinary_model_that_becomes_ordinary(tmp_path):
    once = survives(VARIANTS['ragged'](tiny_model('llama')), tmp_path/'once')
    even = slice_units(once, {f'{i}.mlp_channel': list(range(20)) for i in range(3)})
    survives(even, tmp_path/'even')
    assert fits_stock_class(even) and not list((tmp_path/'even').glob('*.py'))
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path/'even')) is type(tiny_model('llama'))


def test_loaded_bridges_are_recognised(tmp_path):
    "Classes from a modelling file are other classes than ours."
    save_pruned(VARIANTS['values'](tiny_model('llama')), None, tmp_path/'once')
    once = AutoModelForCausalLM.from_pretrained(tmp_path/'once', trust_remote_code=True)
    assert not any(isinstance(m, NarrowValues) for m in once.modules())
    assert not fits_stock_class(once)
    linears = save_module.layout(once)['linears']
    assert linears == save_module.layout(VARIANTS['values'](tiny_model('llama')))['linears']


@pytest.mark.parametrize('family', ['llama', 'gpt2', 'opt', 'phi'])
def test_the_model_without_its_head(family, tmp_path):
    "What vLLM builds (`AutoModel.from_config`), and what embeds text; the head of the file is nothing to it."
    m = VARIANTS['values_and_mlp'](tiny_model(family))
    save_pruned(m, None, tmp_path/'saved')
    base = AutoModel.from_pretrained(tmp_path/'saved', trust_remote_code=True, dtype='auto').eval()
    with torch.no_grad(): assert torch.equal(base(IDS)[0], m.base_model(IDS)[0])
    empty = AutoModel.from_config(base.config, trust_remote_code=True)
    assert type(empty).__name__ == type(base).__name__ == f'Pruned{type(m.base_model).__name__}'
    assert {n: p.shape for n, p in empty.named_parameters()} == {n: p.shape for n, p in m.base_model.named_parameters()}


@pytest.mark.parametrize('auto', [AutoModel, AutoModelForCausalLM])
@pytest.mark.parametrize('change', [dict(add='model.layers.0.foo'), dict(add='model.foo'), dict(drop='model.layers.1.mlp.up_proj.weight')], ids=str)
def test_a_modelling_file_takes_no_other_tensors(auto, change, tmp_path):
    save_pruned(VARIANTS['values'](tiny_model('llama')), None, tmp_path/'saved')
    tensors = load_file(tmp_path/'saved'/'model.safetensors')
    if 'add' in change: tensors[change['add']] = torch.ones(2)
    else: del tensors[change['drop']]
    save_file(tensors, tmp_path/'saved'/'model.safetensors', metadata=dict(format='pt'))
    with pytest.raises(ValueError, match='not those of this model'): auto.from_pretrained(tmp_path/'saved', trust_remote_code=True)


# ---- a canary -------------------------------------------------------------------------------------------------------

def test_stock_classes_do_not_read_widths_per_layer_yet():
    """`transformers` has configurations with entries per layer (`per_layer_config`), and stock classes that raise on them.
    On the day this fails, a model with a width for each layer is an ordinary model: save it so, without a modelling file (`fits_stock_class`, howto_share)."""
    sizes = dict(vocab_size=97, hidden_size=24, intermediate_size=37, num_hidden_layers=2, num_attention_heads=6, num_key_value_heads=2)
    widths = []
    with contextlib.suppress(RuntimeError, TypeError, ValueError, AttributeError):
        config = LlamaConfig(**sizes, per_layer_config={1: dict(intermediate_size=20)})
        widths = [layer.mlp.up_proj.out_features for layer in LlamaForCausalLM(config).model.layers]
    assert widths != [37, 20], 'stock classes read per_layer_config: save models of unequal widths without a modelling file'


def test_a_uniform_recipe_loads_in_plain_transformers(tmp_path):
    w = Windows(torch.randint(3, 97, (8, 20), generator=torch.Generator().manual_seed(1)), 'random')
    for i, units in enumerate((('mlp_channel',), ('kv_group', 'mlp_channel'))):
        small, plan = prune(tiny_model('llama'), w, Recipe(uniform=True, units=units), .3)
        folder = save_pruned(small, plan, tmp_path/str(i))
        plain = AutoModelForCausalLM.from_pretrained(folder)
        assert not list(folder.glob('*.py')) and type(plain) is LlamaForCausalLM and torch.equal(logits(plain.eval()), logits(small))


def test_modelling_source_is_python_without_this_package():
    for family in TINY:
        source = _modeling_source(tiny_model(family))
        compile(source, 'modeling_pruned.py', 'exec')
        assert 'import prunebook' not in source and 'from prunebook' not in source


# ---- what else is in the folder -------------------------------------------------------------------------------------

def test_plan_tokenizer_and_manifest_are_there(tmp_path, tiny_tokenizer):
    w = Windows(torch.randint(3, 97, (4, 20), generator=torch.Generator().manual_seed(1)), 'random')
    dense = tiny_model('llama')
    small, plan = prune(dense, w, FASP(units=('value_channel', 'mlp_channel')), .3)
    folder = save_pruned(small, plan, tmp_path/'a'/'b', tiny_tokenizer)
    names = {p.name for p in folder.iterdir()}
    assert {'config.json', 'model.safetensors', 'modeling_pruned.py', 'plan.json', 'tokenizer.json', 'tokenizer_config.json', MANIFEST} <= names
    assert json.loads((folder/MANIFEST).read_text()).keys() == names - {MANIFEST}
    again, tokenizer, read = load_pruned(str(folder), device='cpu')
    assert read == plan and torch.equal(logits(again), logits(small))
    assert tokenizer.decode(tokenizer('a "b"\nc').input_ids, skip_special_tokens=True) == 'a "b"\nc'
    assert torch.equal(logits(read.apply(copy.deepcopy(dense), w)), logits(small))
    assert os.stat(folder).st_mode & 0o777 == 0o755
    assert [p.name for p in folder.parent.iterdir()] == ['b']


# ---- what goes wrong ------------------------------------------------------------------------------------------------

def breaks_with(m, error, when='partial'):
    "Make `save_pretrained` of a model write part of a file, and then fail."
    def save_pretrained(folder, *args, **kw):
        (Path(folder)/'model.safetensors').write_bytes(b'x'*100)
        if when == 'late': type(m).save_pretrained(m, folder)
        raise error
    m.save_pretrained = save_pretrained
    return m


def full(): return OSError(errno.ENOSPC, 'No space left on device')


@pytest.mark.parametrize('when', ['partial', 'late'])
@pytest.mark.parametrize('variant', ['mlp', 'values'])
def test_a_full_disk_leaves_nothing(variant, when, tmp_path):
    m = VARIANTS[variant](tiny_model('llama'))
    config = m.config
    with pytest.raises(OSError, match='Could not save to .*target.*No space left on device.*Nothing was left there'): save_pruned(breaks_with(m, full(), when), None, tmp_path/'target')
    assert list(tmp_path.iterdir()) == [] and m.config is config
    del m.save_pretrained
    survives(m, tmp_path/'target')


def test_a_disk_that_fills_up_while_weights_are_written(tmp_path):
    "Not an injected error: the system refuses the write."
    resource = pytest.importorskip('resource')
    m, (soft, hard) = tiny_model('llama'), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20000, hard))
    try:
        with pytest.raises(OSError, match='Could not save to .*target'): save_pruned(m, None, tmp_path/'target')
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_up_after_the_weights(tmp_path, tiny_tokenizer, monkeypatch):
    def fail(*args): raise full()
    for where in ('write_manifest', '_write_model'):
        with monkeypatch.context() as mp:
            mp.setattr(save_module, where, fail)
            with pytest.raises(OSError, match='Nothing was left'): save_pruned(tiny_model('opt'), None, tmp_path/'target', tiny_tokenizer)
        assert list(tmp_path.iterdir()) == []


def test_no_room_is_seen_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setattr(models_module.shutil, 'disk_usage', lambda p: type('usage', (), dict(free=1000))())
    monkeypatch.setattr(save_module, '_write_model', lambda *a: pytest.fail('work was begun'))
    with pytest.raises(OSError, match='MiB left and the model needs'): save_pruned(tiny_model('opt'), None, tmp_path/'deep'/'target')
    assert list(tmp_path.iterdir()) == []


def fails_once(m, error):
    "Make the first `save_pretrained` fail, and the next ones work."
    def save_pretrained(folder, *args, **kw):
        del m.save_pretrained
        (Path(folder)/'model.safetensors').write_bytes(b'x'*100)
        raise error
    m.save_pretrained = save_pretrained
    return m


def kept_in(message): return Path(re.search(r'The model is kept in (\S+)\.$', message)[1])


@pytest.mark.parametrize('cache', ['works', 'fails'])
@pytest.mark.parametrize('old', [False, True], ids=['new', 'overwrite'])
@pytest.mark.parametrize('error', [full(), RuntimeError('odd')])
def test_a_model_that_cannot_be_saved_is_kept_elsewhere(error, old, cache, tmp_path, tmp_path_factory, home, tiny_tokenizer, monkeypatch):
    "With plan and tokenizer, and the message says where."
    if cache == 'fails': home.write_text('a file')
    monkeypatch.setattr(tempfile, 'tempdir', str(tmp_path_factory.mktemp('temporary')))
    m, out = tiny_model('llama'), tmp_path/'out'/'target'
    if old: save_pruned(m, None, out)
    small, plan = prune(m, Windows(IDS, 'random'), FASP(), .2)
    with pytest.raises(OSError) as e: save_pruned(fails_once(small, error), plan, out, tiny_tokenizer, overwrite=old)
    assert f'Could not save to {out}: ' in str(e.value) and ('What was there is unchanged' if old else 'Nothing was left there') in str(e.value)
    assert [p.name for p in (tmp_path/'out').glob('*')] == (['target'] if old else [])
    kept = kept_in(str(e.value))
    assert (kept.parent == home/'rescued') == (cache == 'works') and verify(kept) == []
    again, tokenizer, read = load_pruned(kept, device='cpu')
    assert read == plan and tokenizer is not None and torch.equal(logits(again), logits(small))


def test_what_is_reserved_has_been_worked_for(tmp_path, home, monkeypatch):
    "Before the work an error is enough; after it the model is kept."
    m, out = tiny_model('llama'), tmp_path/'target'
    (tmp_path/'target').write_text('a file')
    with pytest.raises(FileExistsError): save_pruned(m, None, out, overwrite=True)
    assert not home.exists()
    out.unlink()
    with reserved_folder(out, overwrite=True):
        out.mkdir()
        (out/'thesis.tex').write_text('meanwhile')
        with pytest.raises(OSError, match='thesis.tex.*What was there is unchanged') as e: save_pruned(m, None, out, overwrite=True)
    assert torch.equal(logits(load_pruned(kept_in(str(e.value)), device='cpu')[0]), logits(m)) and [p.name for p in out.iterdir()] == ['thesis.tex']


def no_plot(folder): raise ValueError('no plot')


def test_a_report_that_fails_does_not_lose_the_model(tmp_path, home):
    m = tiny_model('llama')
    with pytest.raises(OSError, match='no plot.*Nothing was left') as e: save_pruned(m, None, tmp_path/'target', add=no_plot)
    assert torch.equal(logits(load_pruned(kept_in(str(e.value)), device='cpu')[0]), logits(m))
    folder = save_pruned(m, None, tmp_path/'target', add=lambda folder: (folder/'report.md').write_text('good'))
    assert (folder/'report.md').read_text() == 'good' and verify(folder) == []
    save_pruned(m, None, folder, overwrite=True)
    assert not (folder/'report.md').exists()


def test_left_overs_are_named(tmp_path, home, monkeypatch):
    "Where the rest cannot be removed, it is not said that nothing was left."
    monkeypatch.setattr(models_module.shutil, 'rmtree', lambda *a, **kw: None)
    with pytest.raises(OSError) as e: save_pruned(breaks_with(tiny_model('llama'), full()), None, tmp_path/'target')
    assert 'Nothing was left' not in str(e.value) and re.search(r'target-partial-\w{8}(-try)? was left and can be deleted', str(e.value))


def test_the_model_that_was_read_is_never_replaced(tmp_path, tiny_tokenizer):
    old = saved_before(tmp_path)
    m = load_pruned(tmp_path/'target', device='cpu')[0]
    with pytest.raises(FileExistsError, match='the model that is read'): save_pruned(m, None, tmp_path/'target', overwrite=True)
    assert still_there(tmp_path, old)


@pytest.mark.skipif(os.name == 'nt', reason='no permissions')
def test_all_files_are_readable_alike(tmp_path, tiny_tokenizer):
    old = os.umask(0o022)
    try: folder = save_pruned(VARIANTS['values'](tiny_model('llama')), None, tmp_path/'target', tiny_tokenizer)
    finally: os.umask(old)
    assert {p.stat().st_mode & 0o777 for p in folder.iterdir()} == {0o644}


@pytest.mark.parametrize('error', [KeyboardInterrupt(), SystemExit(143), RuntimeError('odd'), MemoryError()])
def test_an_interruption_leaves_nothing(error, tmp_path, home):
    m = tiny_model('gpt2')
    config = m.config
    with pytest.raises(OSError if isinstance(error, Exception) else type(error)): save_pruned(breaks_with(m, error, 'late'), None, tmp_path/'target')
    assert list(tmp_path.iterdir()) == [] and m.config is config


def saved_before(tmp_path):
    old = VARIANTS['values'](tiny_model('llama', seed=7))
    save_pruned(old, None, tmp_path/'target')
    return old


def still_there(tmp_path, old): return [p.name for p in tmp_path.iterdir()] == ['target'] and torch.equal(logits(load_pruned(tmp_path/'target', device='cpu')[0]), logits(old))


@pytest.mark.parametrize('error', [full(), KeyboardInterrupt()])
def test_failing_to_overwrite_keeps_the_old_folder(error, tmp_path):
    old = saved_before(tmp_path)
    with pytest.raises(type(error)): save_pruned(breaks_with(tiny_model('llama'), error), None, tmp_path/'target', overwrite=True)
    assert still_there(tmp_path, old)
    new = tiny_model('gpt2')
    save_pruned(new, None, tmp_path/'target', overwrite=True)
    assert still_there(tmp_path, new)


def no_exchange(a, b): raise OSError('not on this system')


def test_a_failing_rename_keeps_the_old_folder(tmp_path, monkeypatch):
    "Without an atomic exchange the old folder is moved aside first; it must come back if the new one cannot take its place."
    old, rename = saved_before(tmp_path), Path.rename
    def fail(self, target):
        if Path(target).name == 'target' and '-old' not in self.name: raise OSError(errno.EACCES, 'Permission denied')
        return rename(self, target)
    with monkeypatch.context() as mp:
        mp.setattr(Path, 'rename', fail)
        mp.setattr(models_module, '_exchange', no_exchange)
        with pytest.raises(OSError, match='Permission denied.*What was there is unchanged'): save_pruned(tiny_model('llama'), None, tmp_path/'target', overwrite=True)
    assert still_there(tmp_path, old)


def test_an_existing_folder_is_not_touched(tmp_path):
    old = saved_before(tmp_path)
    with pytest.raises(FileExistsError, match='target exists already'): save_pruned(tiny_model('llama'), None, tmp_path/'target')
    assert still_there(tmp_path, old)


def test_overwriting_a_file_leaves_no_rest(tmp_path):
    (tmp_path/'target').write_text('a file')
    try: save_pruned(tiny_model('llama'), None, tmp_path/'target', overwrite=True)
    except OSError: assert (tmp_path/'target').read_text() == 'a file'
    assert [p.name for p in tmp_path.iterdir()] == ['target']


def _save_and_wait(folder, started, overwrite):
    "In another process: write the weights, tell, and hang."
    torch.set_num_threads(1)
    m = tiny_model('llama')
    def save_pretrained(tmp, *args, **kw):
        type(m).save_pretrained(m, tmp)
        started.set()
        time.sleep(60)
    m.save_pretrained = save_pretrained
    save_pruned(m, None, folder, overwrite=overwrite)


@pytest.mark.skipif(fork is None, reason='needs fork')
@pytest.mark.parametrize('overwrite', [False, True])
def test_a_killed_process_leaves_no_folder_that_loads(overwrite, tmp_path):
    old = saved_before(tmp_path) if overwrite else None
    started = fork.Event()
    p = fork.Process(target=_save_and_wait, args=(tmp_path/'target', started, overwrite))
    p.start()
    assert started.wait(60)
    p.kill()
    p.join()
    assert p.exitcode == -signal.SIGKILL
    rest = [x for x in tmp_path.iterdir() if x.name not in ('target', '.target.lock')]
    assert len(rest) == 1 and (rest[0]/'model.safetensors').exists()                          # it was in the middle
    with pytest.raises(ValueError, match='not a folder of save_pruned'): load_pruned(rest[0])
    if overwrite: assert torch.equal(logits(load_pruned(tmp_path/'target', device='cpu')[0]), logits(old))
    else: assert not (tmp_path/'target').exists()
    m = tiny_model('opt')
    save_pruned(m, None, tmp_path/'target', overwrite=overwrite)                              # and one can go on
    assert torch.equal(logits(load_pruned(tmp_path/'target', device='cpu')[0]), logits(m))
    assert [x.name for x in tmp_path.iterdir()] == ['target']                                 # which sweeps the rest


# ---- damaged folders ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('name,how', [('model.safetensors', 'cut'), ('model.safetensors', 'longer'), ('model.safetensors', 'flipped'), ('config.json', 'flipped'), ('config.json', 'missing'), ('modeling_pruned.py', 'missing'),
                                      ('modeling_pruned.py', 'longer'), ('generation_config.json', 'cut')])
def test_damaged_files_are_refused(name, how, tmp_path):
    saved_before(tmp_path)
    path = tmp_path/'target'/name
    data = path.read_bytes()
    if how == 'missing': path.unlink()
    else: path.write_bytes(dict(cut=data[:-1], longer=data + b'\n', flipped=data[:-3] + bytes([data[-3] ^ 1]) + data[-2:])[how])
    for load in (load_pruned, load_model):
        with pytest.raises(ValueError, match=f'target.*it is damaged: {name}'): load(tmp_path/'target')
    assert len(verify(tmp_path/'target')) == 1 and verify(tmp_path/'target')[0].startswith(name)
    path.write_bytes(data)
    load_pruned(tmp_path/'target', device='cpu')


def test_a_missing_manifest_is_refused(tmp_path):
    saved_before(tmp_path)
    (tmp_path/'target'/MANIFEST).unlink()
    with pytest.raises(ValueError, match=f'not a folder of save_pruned: it has no {MANIFEST}'): load_pruned(tmp_path/'target')
    with pytest.raises(ValueError, match='not a folder'): load_pruned(tmp_path/'nowhere')


@pytest.mark.parametrize('content', [b'', b'{"config.json": 3', b'null', b'[]', b'\x80\x81', b'{"config.json": "x"}'])
def test_a_damaged_manifest_is_refused(content, tmp_path):
    saved_before(tmp_path)
    (tmp_path/'target'/MANIFEST).write_bytes(content)
    assert not is_complete(tmp_path/'target')
    with pytest.raises(ValueError, match='is damaged'): load_pruned(tmp_path/'target')


def test_a_damaged_plan_is_named(tmp_path):
    _, plan = prune(tiny_model('llama'), Windows(IDS, 'random'), FASP(), .1)
    folder = save_pruned(tiny_model('llama'), plan, tmp_path/'target')
    (folder/'plan.json').write_text('{"method": "x"')
    write_manifest(folder)
    with pytest.raises(ValueError, match='plan.json is not a pruning plan'): load_pruned(folder, device='cpu')


def test_atomic_folder_cleans_up_when_the_copy_fails(tmp_path):
    with pytest.raises(ZeroDivisionError), models_module.atomic_folder(tmp_path/'x') as tmp:
        (tmp/'sub').mkdir()
        (tmp/'sub'/'file').write_text('x')
        1/0
    assert list(tmp_path.iterdir()) == []

"""One stream of blocks: the same plan and the same bytes in memory, visiting a device, and from disk to disk; interrupted runs go on."""
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, replace

import pytest
import torch
from helpers import tiny_model
from test_conformance import PLAIN, build
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from prunebook.cli import main
from prunebook.couplings import anatomy
from prunebook.fasp import FASP
from prunebook.methods import Method, Run, configured
from prunebook.pruning import prune
from prunebook.models import TINY, decoder_linears, n_parameters, verify
from prunebook.save import load_pruned
from prunebook.sources import InMemory, OnDisk, tensor_files
from prunebook.stream import Context, stream, visits
from prunebook.text import random_tokens

pytestmark = pytest.mark.usefixtures('one_thread')
UNITS = [('mlp_channel',), ('value_channel', 'mlp_channel'), ('kv_group', 'mlp_channel')]


def equal(a, b): return all(torch.equal(p, q) for p, q in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def text(model): return random_tokens(model, n=6, seqlen=16)


def prune_folder(folder, windows, method, sparsity, out, **run):
    "The plan of a run from disk to disk."
    return prune(folder, windows, method, sparsity, run=Run(out=str(out), **run))[1]


def context(source, method):
    "A context of a run over a source."
    table = method.table(source.model)
    return Context(source, text(source.model), .2, table=table, total=n_parameters(decoder_linears(source.model).values()))


def saved(model, folder, shard='20kB'):
    model.save_pretrained(folder, max_shard_size=shard)
    return folder


@pytest.mark.parametrize('units', UNITS, ids=lambda u: u[0])
@pytest.mark.parametrize('family', TINY)
def test_from_disk_as_in_memory(family, units, tmp_path):
    m = tiny_model(family)
    small, plan = prune(m, text(m), FASP(units=units), .2)
    streamed = prune_folder(saved(m, tmp_path/'dense'), text(m), FASP(units=units), .2, tmp_path/'small')
    assert streamed == plan
    assert equal(load_pruned(tmp_path/'small', device='cpu')[0], small)
    assert verify(tmp_path/'small') == [] and not list(tmp_path.glob('.small*'))


@pytest.mark.parametrize('sparsity', [0., .2])
@pytest.mark.parametrize('family, variant', [(f, v) for f, v in PLAIN if f in ('phi3', 'gpt_neox')])
def test_families_with_fused_matrices(family, variant, sparsity, tmp_path):
    "The head of GPT-NeoX has another name in its checkpoint: it was refused as belonging to another model."
    m = build(family, variant)
    small, plan = prune(m, text(m), 'fasp', sparsity)
    streamed = prune_folder(saved(m, tmp_path/'dense'), text(m), 'fasp', sparsity, tmp_path/'small')
    assert streamed == plan and tensor_files(tmp_path/'small').keys() == tensor_files(tmp_path/'dense').keys()
    assert equal(load_pruned(tmp_path/'small', device='cpu')[0], small)


@pytest.mark.parametrize('name', ['fasp', 'magnitude', 'random'])
def test_nothing_leaves(name, tmp_path):
    "At sparsity 0 nothing is scored, from disk as in memory."
    m = tiny_model('llama')
    small, plan = prune(m, text(m), name, 0)
    streamed = prune_folder(saved(m, tmp_path/'dense'), text(m), name, 0, tmp_path/'small')
    assert streamed == plan and equal(load_pruned(tmp_path/'small', device='cpu')[0], m)


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_the_dtype_of_the_run_decides(dtype, tmp_path):
    saved(tiny_model('llama'), tmp_path/'dense')
    m = AutoModelForCausalLM.from_pretrained(tmp_path/'dense', dtype=dtype).eval()
    small, plan = prune(m, text(m), 'fasp', .2)
    streamed = prune_folder(tmp_path/'dense', text(m), 'fasp', .2, tmp_path/'small', dtype=dtype)
    loaded = load_pruned(tmp_path/'small', device='cpu')[0]
    assert loaded.dtype == dtype and equal(loaded, small) and streamed.kept == plan.kept


def test_one_file_or_many(tmp_path):
    m = tiny_model('qwen2')
    plans = [prune_folder(saved(m, tmp_path/shard, shard), text(m), 'fasp', .2, tmp_path/f'{shard}-small') for shard in ('20kB', '1GB')]
    assert plans[0] == plans[1]
    assert equal(*(load_pruned(tmp_path/f'{shard}-small', device='cpu')[0] for shard in ('20kB', '1GB')))


def test_one_block_at_a_time(tmp_path):
    m = tiny_model('llama')
    source = OnDisk(saved(m, tmp_path/'dense'))
    for v in visits(context(source, FASP())):
        there = [b.layer for b in anatomy(source.model) if not next(source.model.get_submodule(b.name).parameters()).is_meta]
        assert there == [v.coupling.layer]


@dataclass
class Interrupted(FASP):
    "FASP that stops at one score."
    name = 'interrupted'
    stop_at: int = 99

    def score(self, v):
        seen.append(v.coupling.name)
        if len(seen) == self.stop_at: raise KeyboardInterrupt
        return super().score(v)


seen = []


@pytest.mark.parametrize('stop_at', range(1, 7))
def test_a_run_goes_on_after_its_last_block(stop_at, tmp_path):
    m, seen[:] = tiny_model('llama'), []
    expected, _ = prune(m, text(m), FASP(units=UNITS[1]), .2)
    saved(m, tmp_path/'dense')
    method = Interrupted(units=UNITS[1], stop_at=stop_at)
    with pytest.raises(KeyboardInterrupt): prune_folder(tmp_path/'dense', text(m), method, .2, tmp_path/'small')
    assert not (tmp_path/'small').exists()
    finished, seen[:] = (stop_at - 1)//2, ['again']*50      # scores of blocks that were finished
    prune_folder(tmp_path/'dense', text(m), method, .2, tmp_path/'small', resume=True)
    assert len(seen) - 50 == 6 - 2*finished
    assert equal(load_pruned(tmp_path/'small', device='cpu')[0], expected)


def test_progress_of_another_run_is_refused(tmp_path):
    m, seen[:] = tiny_model('llama'), []
    saved(m, tmp_path/'dense')
    method = Interrupted(stop_at=2)
    with pytest.raises(KeyboardInterrupt): prune_folder(tmp_path/'dense', text(m), method, .2, tmp_path/'small')
    seen[:] = ['again']*50
    with pytest.raises(FileExistsError, match='interrupted run'): prune_folder(tmp_path/'dense', text(m), method, .2, tmp_path/'small')
    for sparsity, windows in ((.3, text(m)), (.2, random_tokens(m, n=6, seqlen=16, seed=1))):
        with pytest.raises(ValueError, match='belongs to another run'):
            prune_folder(tmp_path/'dense', windows, method, sparsity, tmp_path/'small', resume=True)


def test_a_damaged_checkpoint_is_named(tmp_path):
    m = tiny_model('llama')
    saved(m, tmp_path/'dense')
    file = sorted(set(tensor_files(tmp_path/'dense').values()))[1]
    file.write_bytes(file.read_bytes()[:-40])
    with pytest.raises(ValueError, match='get the checkpoint again'): prune_folder(tmp_path/'dense', text(m), 'fasp', .2, tmp_path/'small')
    assert not (tmp_path/'small').exists()


def test_a_lost_tensor_is_named(tmp_path):
    m = tiny_model('llama')
    saved(m, tmp_path/'dense')
    index = tmp_path/'dense'/'model.safetensors.index.json'
    content = json.loads(index.read_text())
    del content['weight_map']['model.layers.1.mlp.up_proj.weight']
    index.write_text(json.dumps(content))
    with pytest.raises(ValueError, match='model.layers.1.mlp.up_proj.weight'): prune_folder(tmp_path/'dense', text(m), 'fasp', .2, tmp_path/'small')


def edited(m, folder, change):
    "A checkpoint in one file whose tensors were changed by a function."
    file = saved(m, folder, '1GB')/'model.safetensors'
    tensors = change(load_file(file))
    save_file({n: t.clone() for n, t in tensors.items()}, file, metadata=dict(format='pt'))
    return folder


def body_alone(tensors): return {n.removeprefix('transformer.').removeprefix('model.'): t for n, t in tensors.items()}
def with_masks(tensors): return {**body_alone(tensors), 'h.0.attn.bias': torch.ones(1, 1, 8, 8)}
def with_frequencies(tensors): return {**tensors, 'model.layers.0.self_attn.rotary_emb.inv_freq': torch.ones(4)}
def head_twice(tensors): return {**tensors, 'lm_head.weight': tensors['transformer.wte.weight']}


@pytest.mark.parametrize('family, change', [('llama', body_alone), ('gpt2', body_alone), ('opt', body_alone), ('gpt2', with_masks),
                                            ('llama', with_frequencies), ('gpt2', head_twice)])
def test_a_checkpoint_may_have_other_names(family, change, tmp_path):
    "What `transformers` reads as the same model is streamed as the same model: its plan can be applied to it."
    m = tiny_model(family)
    streamed = prune_folder(edited(m, tmp_path/'dense', change), text(m), 'fasp', .2, tmp_path/'small')
    small, plan = prune(AutoModelForCausalLM.from_pretrained(tmp_path/'dense').eval(), text(m), 'fasp', .2)
    assert streamed == plan and equal(load_pruned(tmp_path/'small', device='cpu')[0], small)


UP = 'model.layers.1.mlp.up_proj.weight'


@pytest.mark.parametrize('family, change, message', [
    ('llama', lambda t: {n: v for n, v in t.items() if n != 'lm_head.weight'}, 'no tensor lm_head.weight'),
    ('llama', lambda t: {**t, 'model.layers.9.mlp.up_proj.weight': t[UP]}, 'has no place'),
    ('llama', lambda t: {**t, 'model.embed_tokens.weight': t['model.embed_tokens.weight'][:-3]}, 'configuration belongs to another model'),
    ('llama', lambda t: {**t, 'lm_head.weight': t['lm_head.weight'][:-3]}, 'configuration belongs to another model'),
    ('llama', lambda t: {**t, UP: t[UP].to(torch.int8)}, 'quantized'),
    ('llama', lambda t: {**t, UP: t[UP].to(torch.float8_e4m3fn)}, 'quantized'),
    ('llama', lambda t: {**t, UP: t[UP]/0}, 'not finite|infinite'),
    ('gpt2', lambda t: {**t, 'lm_head.weight': t['transformer.wte.weight'] + 1}, 'tie_word_embeddings')])
def test_a_checkpoint_that_is_not_the_model_is_refused_before_any_work(family, change, message, tmp_path, monkeypatch):
    m = tiny_model(family)
    edited(m, tmp_path/'dense', change)
    monkeypatch.setattr(OnDisk, 'open', None)
    with pytest.raises(ValueError, match=message): prune_folder(tmp_path/'dense', text(m), 'fasp', .2, tmp_path/'small')
    assert [p.name for p in tmp_path.iterdir()] == ['dense']


@pytest.mark.parametrize('settings', [dict(quant_method='gptq', bits=4), dict(quant_method='fp8')], ids=lambda s: s['quant_method'])
def test_a_quantized_checkpoint_is_refused(settings, tmp_path):
    m = tiny_model('llama')
    config = saved(m, tmp_path/'dense')/'config.json'
    config.write_text(json.dumps({**json.loads(config.read_text()), 'quantization_config': settings}))
    with pytest.raises(ValueError, match='is quantized'): prune_folder(tmp_path/'dense', text(m), 'fasp', .2, tmp_path/'small')


@pytest.mark.parametrize('named', ['../outside.safetensors', '/outside.safetensors', 'lost.safetensors', '.', 3, None])
def test_an_index_names_files_beside_it(named, tmp_path):
    saved(tiny_model('llama'), tmp_path/'dense')
    index = tmp_path/'dense'/'model.safetensors.index.json'
    content = json.loads(index.read_text())
    (tmp_path/'outside.safetensors').write_bytes((tmp_path/'dense'/content['weight_map'][UP]).read_bytes())
    content['weight_map'][UP] = named
    index.write_text(json.dumps(content))
    with pytest.raises(ValueError, match='no file beside it|has no lost'): tensor_files(tmp_path/'dense')


def test_one_whole_file_comes_before_an_index(tmp_path):
    "As in `transformers`, for a folder that holds both."
    m = tiny_model('llama')
    saved(tiny_model('llama', seed=1), tmp_path/'dense')
    m.save_pretrained(tmp_path/'whole')
    os.replace(tmp_path/'whole'/'model.safetensors', tmp_path/'dense'/'model.safetensors')
    assert prune_folder(tmp_path/'dense', text(m), 'fasp', .2, tmp_path/'small').model == prune(m, text(m), 'fasp', .2)[1].model


def test_how_a_model_generates_is_kept(tmp_path):
    "Also settings that do not go together, which `transformers` reads and does not write."
    m = tiny_model('llama')
    settings = dict(do_sample=False, temperature=.3, max_new_tokens=7, eos_token_id=[2, 5])
    (saved(m, tmp_path/'dense')/'generation_config.json').write_text(json.dumps(settings))
    prune_folder(tmp_path/'dense', text(m), 'fasp', .2, tmp_path/'small')
    kept = load_pruned(tmp_path/'small', device='cpu')[0].generation_config
    assert {n: getattr(kept, n) for n in settings} == settings and verify(tmp_path/'small') == []


def test_files_of_others_in_the_work_folder_stay(tmp_path):
    m = tiny_model('llama')
    saved(m, tmp_path/'dense')
    mine = tmp_path/'.small-stream'/'mine.txt'
    mine.parent.mkdir()
    mine.write_text('mine')
    prune_folder(tmp_path/'dense', text(m), 'fasp', .2, tmp_path/'small')
    assert [p.name for p in mine.parent.iterdir()] == ['mine.txt']


@pytest.mark.parametrize('progress', ['[]', '{"key": {}}', '{"key"', '{"key": 1, "done": 0, "kept": {}, "scores": {}}'])
def test_a_damaged_progress_is_named(progress, tmp_path):
    m = tiny_model('llama')
    saved(m, tmp_path/'dense')
    (tmp_path/'.small-stream').mkdir()
    (tmp_path/'.small-stream'/'progress.json').write_text(progress)
    with pytest.raises(ValueError, match='not the progress of a run'): prune_folder(tmp_path/'dense', text(m), 'fasp', .2, tmp_path/'small', resume=True)


@pytest.mark.parametrize('part', ['block-00000.safetensors', 'states-00002.safetensors'])
@pytest.mark.parametrize('damage', ['gone', 'cut'])
def test_a_damaged_finished_block_is_named_before_the_rest_is_computed(part, damage, tmp_path, monkeypatch):
    m, seen[:] = tiny_model('llama'), []
    saved(m, tmp_path/'dense')
    with pytest.raises(KeyboardInterrupt): prune_folder(tmp_path/'dense', text(m), Interrupted(stop_at=3), .2, tmp_path/'small')
    file = tmp_path/'.small-stream'/part
    content = file.read_bytes()
    if damage == 'cut': file.write_bytes(content[:-20])
    else: file.unlink()
    monkeypatch.setattr(OnDisk, 'open', None)
    with pytest.raises(ValueError, match=f'{part}.*begin anew'):
        prune_folder(tmp_path/'dense', text(m), Interrupted(stop_at=3), .2, tmp_path/'small', resume=True)


def test_a_run_ended_after_its_folder_was_put_in_place(tmp_path, monkeypatch):
    "The model is whole; what was left is named, and a run that replaces it clears it."
    from prunebook import pruning as module
    m = tiny_model('llama')
    saved(m, tmp_path/'dense')
    def end(work):
        if (work/'progress.json').exists(): raise KeyboardInterrupt
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(module, '_clear', end)
        prune_folder(tmp_path/'dense', text(m), 'fasp', .2, tmp_path/'small')
    assert verify(tmp_path/'small') == []
    for resume in (True, False):
        with pytest.raises(FileExistsError, match='is there and whole.*small-stream'):
            prune_folder(tmp_path/'dense', text(m), 'fasp', .2, tmp_path/'small', resume=resume)
    prune_folder(tmp_path/'dense', text(m), 'fasp', .2, tmp_path/'small', resume=True, overwrite=True)
    assert verify(tmp_path/'small') == [] and not list(tmp_path.glob('.small*'))


def test_a_full_disk_is_an_error_of_the_system(tmp_path):
    "What was finished stays, and the run goes on."
    from prunebook import sources
    m, write, written = tiny_model('llama'), sources.save_file, []
    def full(tensors, file, **kw):
        written.append(file)
        if len(written) > 3: raise sources.SafetensorError('I/O error: No space left on device')
        return write(tensors, file, **kw)
    saved(m, tmp_path/'dense')
    with pytest.MonkeyPatch.context() as patch, pytest.raises(OSError, match='free some space'):
        patch.setattr(sources, 'save_file', full)
        prune_folder(tmp_path/'dense', text(m), 'fasp', .2, tmp_path/'small')
    streamed = prune_folder(tmp_path/'dense', text(m), 'fasp', .2, tmp_path/'small', resume=True)
    assert streamed.kept == prune(m, text(m), 'fasp', .2)[1].kept and not list(tmp_path.glob('.small*'))


@pytest.mark.parametrize('method', ['bonsai', 'surgeon', 'taylor'])
def test_methods_that_need_the_whole_model_say_so(method, tmp_path):
    m = tiny_model('llama')
    with pytest.raises(ValueError, match='cannot be streamed'): prune_folder(saved(m, tmp_path/'dense'), text(m), method, .2, tmp_path/'small')


def test_a_method_without_text_computes_nothing(monkeypatch):
    @dataclass
    class First(Method):
        name = 'first_units'
        reads_text = False
        def score(self, v): return torch.arange(v.coupling.n_units).flip(0).float()
    m = tiny_model('llama')
    monkeypatch.setattr(type(m.model), 'forward', None)
    kept, _ = stream(First(), context(InMemory(m), First()))
    assert all(k == list(range(len(k))) for k in kept.values())


@pytest.mark.parametrize('family', TINY)
def test_a_plan_makes_the_same_weights_again(family):
    m = tiny_model(family)
    small, plan = prune(m, text(m), FASP(units=UNITS[1]), .2)
    assert equal(plan.apply(tiny_model(family), text(m)), small)
    with pytest.raises(ValueError, match='give these windows'): plan.apply(tiny_model(family))


def test_a_plan_wants_its_own_text():
    m = tiny_model('llama')
    _, plan = prune(m, text(m), 'fasp', .2)
    for other in (random_tokens(m, n=6, seqlen=16, seed=1), random_tokens(m, n=5, seqlen=16), 'text'):
        with pytest.raises(ValueError, match='give these windows'): plan.apply(tiny_model('llama'), other)


@pytest.mark.parametrize('settings', [dict(spare=[1, 0]), dict(units=['value_channel']), dict(units=['mlp_channel', 'value_channel'])])
def test_a_plan_whose_settings_were_changed_is_refused(settings):
    m = tiny_model('llama')
    _, plan = prune(m, text(m), 'fasp', .2)
    with pytest.raises(ValueError, match='do not agree'): replace(plan, settings={**plan.settings, **settings}).apply(tiny_model('llama'), text(m))


@pytest.mark.parametrize('sparsity', [0, .2])
def test_a_plan_from_a_machine_with_another_device(sparsity):
    m = tiny_model('llama')
    small, plan = prune(m, text(m), FASP(spare=(0, 1)), sparsity)
    elsewhere = replace(plan, settings={**plan.settings, 'device': 'cuda:7', 'batch_size': 8})                  # as at version 0.1
    assert equal(elsewhere.apply(tiny_model('llama'), text(m)), small)


def test_a_plan_that_cuts_nothing_needs_no_text():
    m = tiny_model('llama')
    assert equal(prune(m, text(m), 'fasp', 0)[1].apply(tiny_model('llama')), m)


REFITTED = [('surgeon', dict(shots=2)), ('surgeon', dict(restore='tied', cost='tied', shots=1)), ('depth2', {}), ('depth2', dict(restore='two_step', trust=1.)), ('recipe', {}),
            ('recipe', dict(allocation='uniform')), ('bonsai', dict(evaluations=8, seqlen=12, restore=True)), ('flap', {}), ('flap', dict(restore='bias')),
            ('flap', dict(restore=True)), ('magnitude', dict(restore=True)), ('taylor', dict(restore=True)), ('random', dict(restore=True)), ('wanda_sp', dict(restore=True))]


@pytest.mark.parametrize('name, settings', REFITTED)
@pytest.mark.parametrize('family', ['llama', 'gpt2'])
def test_every_plan_makes_its_weights_again_and_no_others(family, name, settings):
    m = tiny_model(family)
    w = random_tokens(m, n=12, seqlen=24)
    small, plan = prune(m, w, configured(name, settings), .2)
    with pytest.raises(ValueError, match='give these windows'): plan.apply(tiny_model(family))
    assert equal(plan.apply(tiny_model(family), w), small)


STREAMED = [('random', {}), ('random', dict(restore=True)), ('magnitude', {}), ('wanda_sp', {}), ('flap', {}), ('flap', dict(restore='bias')), ('flap', dict(restore=True)),
            ('flap', dict(restore=False)), ('depth2', {}), ('depth2', dict(restore='two_step', trust=1.)), ('depth2', dict(restore=False)),
            ('depth2', dict(units=('kv_group', 'mlp_channel'), head_share=.5)), ('depth2', dict(units=('value_channel', 'mlp_channel'), sigma='random', restore=False))]


@pytest.mark.parametrize('name, settings', STREAMED)
@pytest.mark.parametrize('family', TINY)
def test_every_method_that_streams_is_the_same_from_disk(family, name, settings, tmp_path):
    m = tiny_model(family)
    w = random_tokens(m, n=12, seqlen=24)
    small, plan = prune(m, w, configured(name, settings), .2)
    assert prune_folder(saved(m, tmp_path/'dense'), w, configured(name, settings), .2, tmp_path/'small') == plan
    assert equal(load_pruned(tmp_path/'small', device='cpu')[0], small)


class Ended(Exception): pass


@pytest.mark.parametrize('block', [0, 1, 2])
@pytest.mark.parametrize('name, settings', [('flap', {}), ('depth2', {}), ('depth2', dict(restore='two_step', trust=1.))])
def test_every_method_that_streams_goes_on(name, settings, block, tmp_path, monkeypatch):
    "Ended when a block is closed, after which the states of the dense model must be those of the block, too."
    m = tiny_model('llama')
    w = random_tokens(m, n=12, seqlen=24)
    small, plan = prune(m, w, configured(name, settings), .2)
    saved(m, tmp_path/'dense')
    close = OnDisk.close
    def end(self, b, finished=True):
        close(self, b, finished)
        if self.out is not None and b.layer == block: raise Ended
    with monkeypatch.context() as patch, pytest.raises(Ended):
        patch.setattr(OnDisk, 'close', end)
        prune_folder(tmp_path/'dense', w, configured(name, settings), .2, tmp_path/'small')
    assert prune_folder(tmp_path/'dense', w, configured(name, settings), .2, tmp_path/'small', resume=True) == plan
    assert equal(load_pruned(tmp_path/'small', device='cpu')[0], small)


def test_a_plan_of_an_unknown_method_is_refused():
    m = tiny_model('llama')
    _, plan = prune(m, text(m), FASP(), .2)
    plan.method = 'of another package'
    with pytest.raises(ValueError, match='not known here'): plan.apply(m)
    plan.settings = {}                                      # made by hand
    assert plan.apply(m) is m


@pytest.mark.parametrize('name, settings', [('surgeon', dict(restore=False)), ('depth2', dict(restore=False)), ('bonsai', dict(evaluations=8, seqlen=12)),
                                            ('flap', dict(restore=False)), ('magnitude', {}), ('fasp', dict(restore=False))])
def test_a_plan_of_slicing_alone_needs_no_text(name, settings):
    m = tiny_model('llama')
    small, plan = prune(m, random_tokens(m, n=12, seqlen=24), configured(name, settings), .2)
    assert equal(plan.apply(tiny_model('llama')), small)


def test_sparsity_zero_is_a_copy(tmp_path):
    m = tiny_model('gpt2')
    plan = prune_folder(saved(m, tmp_path/'dense'), text(m), 'fasp', 0, tmp_path/'small')
    assert plan.true_sparsity == 0 and equal(load_pruned(tmp_path/'small', device='cpu')[0], m)


def command(*words):
    return [sys.executable, '-c', 'import sys; from prunebook.cli import main; sys.exit(main())', *map(str, words)]


def test_command_line_killed_and_resumed(tmp_path, tiny_tokenizer):
    "A killed run goes on with --resume and ends with the bytes of a run that was not."
    m = tiny_model('llama', num_hidden_layers=12)
    saved(m, tmp_path/'dense')
    tiny_tokenizer.save_pretrained(tmp_path/'dense')
    words = lambda out, *more: [str(w) for w in ('prune', tmp_path/'dense', '--stream', '--method', 'fasp', '--out', tmp_path/out, '--text', 'random',
                                                 '--n', 8, '--seqlen', 24, '--dtype', 'float32', '--device', 'cpu', *more)]
    env = {**os.environ, 'OMP_NUM_THREADS': '1', 'TQDM_DISABLE': '1'}
    assert main(words('whole')) == 0
    run = subprocess.Popen(command(*words('killed')), env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    progress, end = tmp_path/'.killed-stream'/'progress.json', time.time() + 120
    while not progress.exists() and run.poll() is None and time.time() < end: time.sleep(.001)
    run.send_signal(signal.SIGTERM if os.name == 'nt' else signal.SIGKILL)
    run.wait()
    if not (tmp_path/'killed').exists():                   # else it was quicker than the signal
        assert progress.exists()
        assert main(words('killed', '--resume')) == 0
    files = [{f.name: load_file(f) for f in sorted((tmp_path/out).glob('*.safetensors'))} for out in ('whole', 'killed')]
    assert files[0].keys() == files[1].keys()
    assert all(torch.equal(t, files[1][f][n]) for f, tensors in files[0].items() for n, t in tensors.items())


@pytest.mark.parametrize('words, message', [
    (['--report'], 'leave it out'), (['--text', 'self'], 'cannot write its own text'), (['--method', 'bonsai'], 'cannot be streamed')])
def test_command_line_refuses_before_any_work(words, message, tmp_path, tiny_tokenizer, capsys):
    from prunebook.cli import main
    m = tiny_model('llama')
    saved(m, tmp_path/'dense')
    tiny_tokenizer.save_pretrained(tmp_path/'dense')
    base = ['prune', str(tmp_path/'dense'), '--stream', '--method', 'fasp', '--out', str(tmp_path/'out'), '--text', 'random']
    assert main([*base, *words]) == 2
    assert message in capsys.readouterr().err and not list(tmp_path.glob('*out*'))


def test_resume_without_stream_is_a_mistake(tmp_path, capsys):
    from prunebook.cli import main
    assert main(['prune', 'smollm2-135m', '--resume', '--out', str(tmp_path/'out')]) == 2
    assert '--stream' in capsys.readouterr().err

"""llama.cpp opens what was exported, and computes what transformers computes; what cannot be written says so and leaves nothing."""
import copy
import json
import weakref
from dataclasses import replace

import gguf
import numpy as np
import pytest
import torch
from helpers import tiny_model
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from torch import nn
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from prunebook import export as module, models as models_module
from prunebook.cli import main
from prunebook.couplings import anatomy, couplings, slice_units
from prunebook.export import FORMATS, compare_with_engine, engine_writes, export, give_weights_of, splitting
from prunebook.fasp import FASP
from prunebook.models import load_model, tiny_model as fresh_model, verify
from prunebook.plan import PrunePlan
from prunebook.pruning import prune
from prunebook.recipe import Recipe
from prunebook.save import load_pruned, save_pruned
from prunebook.text import Windows, load_windows

pytestmark = pytest.mark.usefixtures('one_thread', 'own_modules')
PROMPTS = [torch.randint(4, 90, (7,), generator=torch.Generator().manual_seed(i)).tolist() for i in range(3)]
SPECIAL = dict(pad_token='<pad>', bos_token='<s>', eos_token='</s>', unk_token='<unk>')
CHARS = [c for c in map(chr, range(33, 127)) if c not in '<>`~']


def fast(t, **more): return PreTrainedTokenizerFast(tokenizer_object=t, **SPECIAL, **more)


def byte_level(rule=None, merges=(('Ġ', 't'),)):
    "A token for each character and merge, 97 with one merge. What the engine holds back is not among them: bytes that are no whole character."
    t = Tokenizer(models.BPE({w: i for i, w in enumerate([*SPECIAL.values(), 'Ġ', 'Ċ', *CHARS, *map(''.join, merges)])}, list(merges)))
    t.pre_tokenizer, t.decoder = rule or pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return fast(t)


def sentence_piece(merges=(('▁', 't'), ('a', 't'), ('▁t', 'h'))):
    t = Tokenizer(models.BPE({w: i for i, w in enumerate([*SPECIAL.values(), '<0x0A>', '▁', *CHARS, *map(''.join, merges)])}, list(merges), byte_fallback=True, unk_token='<unk>'))
    t.normalizer = normalizers.Sequence([normalizers.Prepend('▁'), normalizers.Replace(' ', '▁')])
    t.decoder = decoders.Sequence([decoders.Replace('▁', ' '), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(' ', 1, 0)])
    return fast(t)


TOKENIZER = byte_level()


def take(m, kinds, ragged=False):
    "Remove the first units of every group; ragged: a different number in every block."
    kept = {}
    for c in couplings(m, kinds):
        size = c.n_units//c.groups
        gone = min(size - 1, c.layer if ragged else max(1, 2*size//5))
        kept[c.name] = [i for i in range(c.n_units) if i % size >= gone]
    return slice_units(m, kept)


VARIANTS = dict(dense=lambda m: m, mlp=lambda m: take(m, 'mlp_channel'), ragged=lambda m: take(m, ('kv_group', 'mlp_channel'), True),
                heads=lambda m: take(m, 'kv_group'), values=lambda m: take(m, 'value_channel'), values_and_mlp=lambda m: take(m, ('value_channel', 'mlp_channel'), True))


def small(family='llama', variant='values_and_mlp', **config): return VARIANTS[variant](tiny_model(family, **config))


def saved(m, tmp_path, tokenizer=TOKENIZER, plan=None): return save_pruned(m, plan, tmp_path/'saved', tokenizer)


def agrees(m, done, new=8, within=1e-4):
    same, worst = compare_with_engine(m, done.file, PROMPTS, new=new)
    return same == 1 and worst < within


def values(file): return {k: f.contents() for k, f in gguf.GGUFReader(file).fields.items()}


# ---- the same numbers -----------------------------------------------------------------------------------------------

CASES = [*[('llama', v) for v in VARIANTS], *[('mistral', v) for v in ('mlp', 'ragged', 'values_and_mlp')], *[('qwen2', v) for v in ('dense', 'ragged', 'values_and_mlp')],
         ('qwen3', 'dense'), ('qwen3', 'heads'), ('qwen3', 'values')]


@pytest.mark.parametrize('family,variant', CASES)
def test_the_engine_computes_the_same(family, variant, tmp_path):
    "Grouped heads and biases; tied embeddings in three families."
    m = small(family, variant, **(dict(sliding_window=64) if family == 'mistral' else {}))
    done = export(saved(m, tmp_path), tmp_path/'m.gguf')
    own = len({(b.heads, b.kv_heads, b.mlp_width) for b in anatomy(m)}) == 1 and family != 'qwen2'
    assert done.architecture == (family.replace('mistral', 'llama') if own else 'deci') and bool(done.why) != own
    assert agrees(m, done)


def test_qwen2_under_its_own_name(tmp_path):
    "Its entry takes heads that fill the hidden size, and no other biases than those of queries, keys and values."
    m = small('qwen2', 'mlp', head_dim=4)
    assert (done := export(saved(m, tmp_path), tmp_path/'m.gguf')).architecture == 'qwen2' and agrees(m, done)
    m.model.layers[1].mlp.down_proj.bias = nn.Parameter(torch.randn(24))
    done = export(save_pruned(m, None, tmp_path/'bias', TOKENIZER), tmp_path/'bias.gguf')
    assert (done.architecture, 'down_proj.bias' in done.why) == ('deci', True) and agrees(m, done)


@pytest.mark.parametrize('family', ['llama', 'qwen2'])
def test_scaled_rotary_frequencies(family, tmp_path):
    scale = dict(rope_type='llama3', rope_theta=500., factor=8., low_freq_factor=1., high_freq_factor=4., original_max_position_embeddings=32)
    made = lambda rope, variant='dense': VARIANTS[variant](fresh_model(family, rope_parameters=rope))
    m = made(scale, 'values_and_mlp' if family == 'llama' else 'dense')
    assert agrees(m, export(saved(m, tmp_path), tmp_path/'m.gguf'))
    assert not agrees(made(dict(rope_type='default', rope_theta=500.)), export(save_pruned(made(scale), None, tmp_path/'other', TOKENIZER), tmp_path/'o.gguf'))


@pytest.mark.parametrize('block', [0, 1, 2])
def test_an_mlp_that_is_gone(block, tmp_path):
    "At width 0 the engine would lose what attention added, or stop."
    m = tiny_model('llama', mlp_bias=False)
    mlp = m.model.layers[block].mlp
    mlp.gate_proj, mlp.up_proj, mlp.down_proj = nn.Linear(24, 0, False), nn.Linear(24, 0, False), nn.Linear(0, 24, False)
    assert agrees(m, export(saved(m, tmp_path), tmp_path/'m.gguf'))


@pytest.mark.parametrize('gone', [(0, 'attention'), (1, 'attention'), (2, 'attention'), (0, 'mlp'), (1, 'mlp'), (2, 'mlp'), (1, 'both'), (2, 'both')], ids=str)
def test_parts_that_are_gone(gone, tmp_path):
    "Tensors of an attention are left out, the first block's must be there; an MLP is left out with the attention, but for the last block's."
    (block, part), sizes = gone, dict(hidden_size=64, intermediate_size=64, num_attention_heads=4, num_key_value_heads=2)
    m = slice_units(fresh_model('llama', **sizes), {f'{block}.{p}': [] for p in ('attention', 'mlp') if part in (p, 'both')})
    if gone == (0, 'attention'):
        with pytest.raises(ValueError, match='Block 0 has no attention'): export(saved(m, tmp_path), tmp_path/'m.gguf')
        return
    done = export(saved(m, tmp_path), tmp_path/'m.gguf')
    names = [t.name for t in gguf.GGUFReader(done.file).tensors]
    assert any(n.startswith(f'blk.{block}.attn') for n in names) is (part == 'mlp')
    assert any(n.startswith(f'blk.{block}.ffn') for n in names) is (gone != (1, 'both'))
    assert agrees(m, done)
    rounded, before = export(tmp_path/'saved', tmp_path/'q.gguf', quantize='q8_0'), {n: p.clone() for n, p in m.state_dict().items()}
    for n, p in give_weights_of(rounded.file, m).state_dict().items(): torch.testing.assert_close(p, before[n], rtol=0, atol=.01*max(1., before[n].abs().max().item() if p.numel() else 0))


def test_the_context_ends_where_a_sliding_window_begins(tmp_path):
    export(saved(small('mistral'), tmp_path), tmp_path/'m.gguf')
    assert values(tmp_path/'m.gguf')['deci.context_length'] == 8


def test_a_folder_of_somebody_else_in_several_files(tmp_path):
    m = tiny_model('llama')
    m.save_pretrained(tmp_path/'theirs', max_shard_size='20KB')
    TOKENIZER.save_pretrained(tmp_path/'theirs')
    assert len(list((tmp_path/'theirs').glob('*.safetensors'))) > 1
    assert agrees(m, export(tmp_path/'theirs', tmp_path/'m.gguf'))


def test_the_small_model_and_its_recipe(tmp_path):
    "Greedy text of transformers for four prompts, and top-5 log-probabilities within 0.01, of a recipe at a fifth."
    model, tokenizer = load_model('smollm2-135m', device='cpu')
    windows = load_windows('passages', model, tokenizer, n=4, seqlen=128)
    quick = dict(shares=(.5,), measure_windows=1, measure_seqlen=16)           # one probe of each block
    pruned, plan = prune(model, windows, Recipe(**quick), .2, inplace=True)
    folder = saved(pruned, tmp_path, tokenizer, plan)
    done = export(folder, tmp_path/'m.gguf', 'f32')
    assert done.architecture == 'deci' and len({b.mlp_width for b in anatomy(pruned)}) > 1 and any(b.value_dim < b.head_dim for b in anatomy(pruned))
    wide, _, _ = load_pruned(folder, device='cpu', dtype=torch.float32)
    prompts = ['The capital of France is', 'In 1969 the first people', 'def add(a, b):', 'Once upon a time, in a village']
    same, worst = compare_with_engine(wide, done.file, prompts, tokenizer)
    assert same == 1 and worst < .01, (same, worst)


# ---- formats --------------------------------------------------------------------------------------------------------

def grouped(variant='values_and_mlp'): return small('llama', variant, hidden_size=64, num_attention_heads=8)


@pytest.mark.parametrize('form', FORMATS)
def test_rounding_is_that_of_the_format(form, tmp_path):
    m = grouped()
    done = export(saved(m, tmp_path), tmp_path/'m.gguf', form)
    again = give_weights_of(done.file, copy.deepcopy(m))
    for (n, old), new in zip(m.named_parameters(), again.parameters()):
        q = 'q8_0' if form[0] == 'q' and 'layers' not in n else form           # the ends of a quantized file
        steps = dict(f32=0, f16=2**-11, bf16=2**-8, q8_0=1/127, q5_0=1/16, q4_1=1/15, q4_0=1/8)[q] if old.ndim > 1 else 0
        assert (new - old).abs().max() <= 1.01*steps*old.abs().max(), n
        assert (new == old).all() == (steps == 0), n
    assert done.quantize == form and done.bytes == (tmp_path/'m.gguf').stat().st_size


def test_files_shrink_with_their_format(tmp_path):
    folder = saved(grouped('mlp'), tmp_path)
    sizes = {f: sum(t.n_bytes for t in gguf.GGUFReader(export(folder, tmp_path/f'{f}.gguf', f).file).tensors if len(t.shape) > 1 and 'blk' in t.name) for f in FORMATS}
    assert sizes['f32'] == 2*sizes['f16'] == 2*sizes['bf16'] and sizes['q8_0']/sizes['q4_0'] == 8.5/4.5


def test_groups_are_filled_with_zeros_and_the_engine_reads_them(tmp_path):
    m = grouped()
    done = export(saved(m, tmp_path), tmp_path/'m.gguf', 'q8_0')
    held = {t.name: t for t in gguf.GGUFReader(done.file).tensors}
    for b in anatomy(m):
        down = gguf.quants.dequantize(held[f'blk.{b.layer}.ffn_down.weight'].data, held[f'blk.{b.layer}.ffn_down.weight'].tensor_type)
        assert down.shape == (64, 64) and not down[:, b.mlp_width:].any() and down[:, :b.mlp_width].any()
    assert done.zeros > 0
    same, worst = compare_with_engine(give_weights_of(done.file, m), done.file, PROMPTS, new=3)
    assert worst < .3                                      # the engine rounds activations to 8 bits, too


def test_the_format_of_the_folder_is_the_default(tmp_path):
    for dtype, form in ((torch.float32, 'f32'), (torch.float16, 'f16'), (torch.bfloat16, 'bf16')):
        assert export(save_pruned(tiny_model('llama').to(dtype), None, tmp_path/form, TOKENIZER), tmp_path/f'{form}.gguf').quantize == form


def test_weights_go_only_where_they_belong(tmp_path):
    done = export(saved(small(), tmp_path), tmp_path/'m.gguf')
    with pytest.raises(ValueError, match='the file of another model'): give_weights_of(done.file, tiny_model('llama'))


# ---- tokenizers -----------------------------------------------------------------------------------------------------

DIGITS = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
QWEN = pre_tokenizers.Sequence([pre_tokenizers.Split(__import__('tokenizers').Regex(module._WORDS % r'\p{N}'), 'isolated'), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
LLAMA3 = pre_tokenizers.Sequence([pre_tokenizers.Split(__import__('tokenizers').Regex(module._WORDS % r'\p{N}{1,3}'), 'isolated'), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
TEXTS = ['on 12 1212 days', "it's\n\n  (12) o'clock, DON'T", ' that 1 x12y that']
MERGES = (('1', '2'), ('12', '12'), ('Ġ', 't'), ('\'', 't'), ('Ġ', 'Ġ'), ('Ċ', 'Ċ'), ('(', '12'))


def reads_alike(m, file, tokenizer):
    "Whether the first step after every text is that of transformers."
    same, worst = compare_with_engine(m, file, TEXTS, tokenizer, new=2)
    return worst < 1e-3


@pytest.mark.parametrize('name,tokenizer', [('gpt-2', byte_level(merges=MERGES)), ('smollm', byte_level(DIGITS, MERGES)), ('qwen2', byte_level(QWEN, MERGES)), ('llama-bpe', byte_level(LLAMA3, MERGES))])
def test_text_is_split_alike(name, tokenizer, tmp_path):
    m = tiny_model('llama', vocab_size=110)
    folder = saved(m, tmp_path, tokenizer)
    assert splitting(json.loads((folder/'tokenizer.json').read_text())['pre_tokenizer']) == name
    assert reads_alike(m, export(folder, tmp_path/'m.gguf').file, tokenizer)
    other = 'smollm' if name in ('gpt-2', 'llama-bpe') else 'gpt-2'
    assert not reads_alike(m, export(folder, tmp_path/'other.gguf', pre=other).file, tokenizer)   # the texts tell the rules apart


def test_sentence_piece(tmp_path):
    m, tokenizer = tiny_model('llama', vocab_size=110), sentence_piece()
    folder = saved(m, tmp_path, tokenizer)
    TEXTS_SP = ['that cat sat', 'a  hat\nthat', 'what']
    done = export(folder, tmp_path/'m.gguf')
    assert values(done.file)['tokenizer.ggml.model'] == 'llama'
    same, worst = compare_with_engine(m, done.file, TEXTS_SP, tokenizer, new=3)
    assert same == 1 and worst < 1e-3


def test_special_tokens(tmp_path):
    tokenizer = copy.deepcopy(TOKENIZER)
    tokenizer.add_tokens([AddedToken('<think>', special=False)])
    tokenizer.chat_template = '{{ messages }}'
    m = tiny_model('llama', vocab_size=102)
    v = values(export(saved(m, tmp_path, tokenizer), tmp_path/'m.gguf').file)
    kinds, tokens = v['tokenizer.ggml.token_type'], v['tokenizer.ggml.tokens']
    assert (tokens[1], kinds[1], tokens[97], kinds[97], kinds[5]) == ('<s>', 3, '<think>', 4, 1)
    assert tokens[98:] == [f'[PAD{i}]' for i in range(98, 102)] and set(kinds[98:]) == {5}
    assert [v[f'tokenizer.ggml.{n}_token_id'] for n in ('bos', 'eos', 'padding')] == [1, 2, 0]
    assert v['tokenizer.chat_template'] == '{{ messages }}' and v['tokenizer.ggml.add_bos_token'] is False


def test_a_beginning_of_text_that_the_tokenizer_adds(tmp_path):
    from tokenizers import processors
    tokenizer = copy.deepcopy(TOKENIZER)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single='<s> $A', special_tokens=[('<s>', 1)])
    m = tiny_model('llama')
    done = export(saved(m, tmp_path, tokenizer), tmp_path/'m.gguf')
    assert values(done.file)['tokenizer.ggml.add_bos_token'] is True
    tokenizer = AutoTokenizer.from_pretrained(tmp_path/'saved')
    assert tokenizer('a').input_ids[0] == 1 and reads_alike(m, done.file, tokenizer)


# ---- what goes along ------------------------------------------------------------------------------------------------

def test_plan_and_report_are_in_the_file(tmp_path):
    w = Windows(torch.randint(3, 97, (4, 20), generator=torch.Generator().manual_seed(1)), 'random')
    m, plan = prune(tiny_model('llama'), w, FASP(), .2)
    folder = save_pruned(m, plan, tmp_path/'saved', TOKENIZER, add=lambda d: (d/'report.md').write_text('| a | b |'))
    v = values(export(folder, tmp_path/'m.gguf').file)
    (tmp_path/'plan.json').write_text(v['prunebook.plan'])
    assert PrunePlan.load(tmp_path/'plan.json') == replace(plan, scores={}) and v['prunebook.report'] == '| a | b |'
    assert v['general.description'] == repr(plan) and v['general.name'] == 'saved'
    assert verify(folder) == []


# ---- what is refused ------------------------------------------------------------------------------------------------

def refused(match, folder, tmp_path, kind=ValueError, **options):
    with pytest.raises(kind, match=match): export(folder, tmp_path/'out'/'m.gguf', **options)
    assert not (tmp_path/'out').exists()


@pytest.mark.parametrize('family', ['opt', 'gpt2', 'phi', 'gemma'])
def test_other_families_say_why(family, tmp_path): refused(f"type '{family}' cannot be exported: what is written are blocks as in Llama", saved(tiny_model(family), tmp_path), tmp_path)


def test_models_that_have_no_place(tmp_path):
    odd = {'no norms of queries and keys. Prune it to equal widths': small('qwen3', 'ragged'), "activation is 'gelu'": tiny_model('llama', hidden_act='gelu'),
           r'rotary embedding \(yarn': fresh_model('llama', rope_parameters=dict(rope_type='yarn', rope_theta=1e4, factor=2., original_max_position_embeddings=32))}
    for i, (match, m) in enumerate(odd.items()): refused(match, save_pruned(m, None, tmp_path/str(i), TOKENIZER), tmp_path)


def test_rows_that_a_group_does_not_divide(tmp_path):
    folder = saved(tiny_model('llama'), tmp_path)
    for form in ('q8_0', 'q4_0'): refused(f'{form} stores 32 weights together, and token_embd.weight has rows of 24', folder, tmp_path, quantize=form)


def test_tokenizers_that_cannot_be_written(tmp_path, tiny_tokenizer):
    m = tiny_model('llama')
    refused('no tokenizer.json', save_pruned(m, None, tmp_path/'none'), tmp_path)
    refused('is a WordLevel model', save_pruned(m, None, tmp_path/'words', tiny_tokenizer), tmp_path)
    odd = byte_level(pre_tokenizers.Sequence([pre_tokenizers.Punctuation(), pre_tokenizers.ByteLevel(add_prefix_space=False)]))
    refused('rule by which its tokenizer splits text is not known', save_pruned(m, None, tmp_path/'rule', odd), tmp_path)
    refused('a token 96, and the embeddings 90 rows', save_pruned(tiny_model('llama', vocab_size=90), None, tmp_path/'rows', TOKENIZER), tmp_path)
    assert export(tmp_path/'rule', tmp_path/'m.gguf', pre='gpt-2').architecture == 'llama'


def test_folders_and_formats_that_are_none(tmp_path):
    folder = saved(tiny_model('llama'), tmp_path)
    refused('is not a model folder', tmp_path/'nothing', tmp_path)
    refused("Unknown format 'q5'", folder, tmp_path, quantize='q5')
    raw = bytearray((folder/'model.safetensors').read_bytes())
    raw[-1] ^= 1
    (folder/'model.safetensors').write_bytes(raw)
    refused('is damaged: model.safetensors has changed', folder, tmp_path)


@pytest.mark.parametrize('value,form,match', [(1e5, 'f16', 'holds 1e\\+05, and f16 ends at 65504'), (float('nan'), 'f32', 'NaN')])
def test_numbers_that_a_format_cannot_hold(value, form, match, tmp_path):
    m = tiny_model('llama')
    m.model.layers[1].mlp.up_proj.weight.data[0, 0] = value
    refused(match, saved(m, tmp_path), tmp_path, quantize=form)


# ---- the file -------------------------------------------------------------------------------------------------------

def test_what_is_there_is_replaced_only_if_asked(tmp_path):
    folder, file = saved(tiny_model('llama'), tmp_path), tmp_path/'m.gguf'
    old = export(folder, file).bytes
    with pytest.raises(FileExistsError, match='exists already'): export(folder, file, 'f16')
    assert export(folder, file, 'f16', overwrite=True).bytes < old
    (tmp_path/'notes').write_text('mine')
    with pytest.raises(FileExistsError, match='not a GGUF file'): export(folder, tmp_path/'notes', overwrite=True)
    assert (tmp_path/'notes').read_text() == 'mine'
    with pytest.raises(IsADirectoryError): export(folder, folder, overwrite=True)
    with pytest.raises(OSError, match='cannot be'): export(folder, tmp_path/'notes'/'m.gguf')


@pytest.mark.parametrize('old', [False, True])
def test_a_disk_that_fills_up_leaves_the_old_or_nothing(old, tmp_path):
    "Not an injected error: the system refuses the write."
    resource = pytest.importorskip('resource')
    folder, file = saved(tiny_model('llama'), tmp_path), tmp_path/'m.gguf'
    if old: export(folder, file, 'f16')
    before, (soft, hard) = file.read_bytes() if old else None, resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30000, hard))
    try:
        with pytest.raises(OSError): export(folder, file, overwrite=True)
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert {p.name for p in tmp_path.iterdir()} == {'saved', *(['m.gguf'] if old else [])} and (not old or file.read_bytes() == before)


def test_no_room_is_seen_before_any_work(tmp_path, monkeypatch):
    folder = saved(tiny_model('llama'), tmp_path)
    monkeypatch.setattr(models_module.shutil, 'disk_usage', lambda p: type('usage', (), dict(free=1000))())
    monkeypatch.setattr(module, '_write', lambda *a: pytest.fail('work was begun'))
    refused('MiB left and the model needs', folder, tmp_path, OSError)


def test_what_a_killed_run_left_is_swept(tmp_path):
    folder = saved(tiny_model('llama'), tmp_path)
    (tmp_path/'.m.gguf-999999999').write_bytes(b'half')
    export(folder, tmp_path/'m.gguf')
    assert {p.name for p in tmp_path.iterdir()} == {'saved', 'm.gguf'}


def test_one_tensor_at_a_time(tmp_path, monkeypatch):
    "When one is read, those before are gone."
    alive, read = [], module.read_tensor
    def watched(files, name):
        assert not [n for n, t in alive if t() is not None]
        t = read(files, name)
        alive.append((name, weakref.ref(t)))
        return t
    folder = saved(small(), tmp_path)
    monkeypatch.setattr(module, 'read_tensor', watched)
    export(folder, tmp_path/'m.gguf')
    assert {n for n, _ in alive} == {n for n, _ in small().named_parameters()}


# ---- the command ----------------------------------------------------------------------------------------------------

def test_command(tmp_path, capsys):
    folder, file = saved(grouped(), tmp_path), tmp_path/'m.gguf'
    capsys.readouterr()
    run = lambda *more: (main(['export', str(folder), '--out', str(file), *more]), *capsys.readouterr())
    code, out, err = run('--to', 'gguf', '--quantize', 'q8_0')
    assert code == 0 and 'q8_0, llama' in out and 'zeros to fill heads and groups' in out and err == ''
    code, _, err = run()
    assert code == 2 and 'exists already' in err
    code, out, _ = run('--force', '--json')
    assert code == 0 and json.loads(out) == dict(file=str(file), architecture='deci', why='widths differ between blocks', quantize='f32', bytes=file.stat().st_size, zeros=json.loads(out)['zeros'])
    for more, match in ((['--force', '--to', 'onnx'], '--to'), (['--force', '--quantize', 'q5'], 'Unknown format')):
        code, _, err = run(*more)
        assert code == 2 and match in err
    assert main(['export', str(folder)]) == 2 and '--out' in capsys.readouterr().err


def test_without_the_engine(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__('sys').modules, 'xllamacpp', None)
    with pytest.raises(ImportError, match='pip install xllamacpp'): engine_writes(tmp_path/'m.gguf', PROMPTS)


def test_what_the_engine_does_not_open(tmp_path):
    (tmp_path/'m.gguf').write_bytes(b'GGUF' + np.zeros(100, np.uint8).tobytes())
    with pytest.raises(ValueError, match='llama.cpp does not open'): engine_writes(tmp_path/'m.gguf', PROMPTS)

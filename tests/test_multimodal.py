"""Models that read pictures, too: their decoder of text is found and pruned, and all else stays bit for bit."""
import copy

import pytest
import torch
import transformers
from prunebook.cli import main
from prunebook.conform import check_method, check_saved, check_streamed, check_walk, check_writes, combinations, conforms, padded_logits, random_kept
from prunebook.couplings import FAMILIES, anatomy, kinds_of, masked, slice_units
from prunebook.methods import check_prunable, configured
from prunebook.models import blocks, decoder_linears, load_model, text_config
from prunebook.save import save_pruned

pytestmark = pytest.mark.usefixtures('one_thread', 'own_modules')

TEXT = dict(vocab_size=97, bos_token_id=1, eos_token_id=2, pad_token_id=0, hidden_size=24, num_hidden_layers=3, num_attention_heads=6, max_position_embeddings=64,
            intermediate_size=37, num_key_value_heads=2, head_dim=8)
EYES = dict(hidden_size=16, intermediate_size=20, num_hidden_layers=3, num_attention_heads=2, image_size=28, patch_size=14)       # as many blocks as the text has
MROPE = dict(rope_type='default', mrope_section=[1, 1, 2], rope_theta=10000.)
KINDS = {                                                  # the class, the entries of its configuration, where the decoder of text is
    'gemma3': ('Gemma3', dict(text_config=dict(TEXT, sliding_window=8, layer_types=['sliding_attention', 'full_attention', 'sliding_attention']), vision_config=EYES,
                              mm_tokens_per_image=4, image_token_index=96, boi_token_index=95, eoi_token_index=94), 'model.language_model.layers'),
    'llava': ('Llava', dict(text_config=dict(TEXT, model_type='llama'), vision_config=dict(EYES, model_type='clip_vision_model', projection_dim=16), image_token_index=96),
              'model.language_model.layers'),
    'mistral3': ('Mistral3', dict(text_config=dict(TEXT, model_type='mistral'), vision_config=dict(EYES, model_type='pixtral', head_dim=8), image_token_index=96),
                 'model.language_model.layers'),
    'idefics3': ('Idefics3', dict(text_config=dict(TEXT, model_type='llama'), vision_config=EYES, image_token_id=96), 'model.text_model.layers'),
    'qwen2_5_vl': ('Qwen2_5_VL', dict(text_config={**{k: v for k, v in TEXT.items() if k != 'head_dim'}, 'rope_parameters': dict(MROPE, mrope_section=[1, 1, 0])},
                   vision_config=dict(depth=3, hidden_size=16, intermediate_size=20, num_heads=2, out_hidden_size=24, fullatt_block_indexes=[1])), 'model.language_model.layers'),
    'qwen2_vl': ('Qwen2VL', dict(text_config={**{k: v for k, v in TEXT.items() if k != 'head_dim'}, 'rope_parameters': dict(MROPE, mrope_section=[1, 1, 0])},
                 vision_config=dict(depth=3, embed_dim=16, hidden_size=24, num_heads=2)), 'model.language_model.layers'),
    'qwen3_vl': ('Qwen3VL', dict(text_config=dict(TEXT, rope_parameters=MROPE), vision_config=dict(
        depth=3, hidden_size=16, intermediate_size=20, num_heads=2, out_hidden_size=24, num_position_embeddings=16, deepstack_visual_indexes=[1])), 'model.language_model.layers')}


def build(kind, seed=0):
    name, entries, _ = KINDS[kind]
    config = getattr(transformers, f'{name}Config')(**copy.deepcopy(entries))
    torch.manual_seed(seed)
    model = getattr(transformers, f'{name}ForConditionalGeneration')(config).float().eval()
    with torch.no_grad():
        for n, p in model.named_parameters(): p.normal_(1. if 'norm' in n and p.ndim == 1 else 0., .2)
    return model


def test_every_family_of_such_a_decoder_is_here():
    assert {f for f in FAMILIES if f.endswith('_vl_text')} <= {text_config(build(k)).model_type for k in KINDS}


@pytest.fixture(scope='module', params=KINDS)
def model(request): return build(request.param)


def same_outside(before, after):
    "Whether every tensor outside of the decoder's blocks is the same, bit for bit."
    prefix, after = blocks(before)[0] + '.', after.state_dict()
    rest = {n: t for n, t in before.state_dict().items() if not n.startswith(prefix)}
    return len(rest) > 10 and all(torch.equal(t, after[n]) for n, t in rest.items())


def test_the_decoder_of_text_is_found(model):
    name, layers = blocks(model)
    assert name == next(place for _, _, place in KINDS.values() if place == name) and len(layers) == 3
    assert all(n.startswith(name) for n in decoder_linears(model)) and text_config(model).vocab_size == 97
    check_prunable(model)
    assert [b.heads for b in anatomy(model)] == ([6]*3) and 'kv_group' in kinds_of(model)


def test_conformance(model):
    for kinds in combinations(model): conforms(model, kinds, save=len(kinds) == 2 and kinds[0] == 'value_channel')
    check_walk(model)
    check_writes(model)


def test_all_else_stays(model):
    small = check_method(model, configured('recipe', dict(units=('value_channel', 'mlp_channel'))))
    assert same_outside(model, small)
    check_saved(small)
    check_writes(small)
    check_streamed(model, 'fasp')


def test_uneven_widths_load_without_this_package(tmp_path):
    small = slice_units(build('llava'), {'1.value_channel': [0, 1, 2, 8, 9, 10], '2.mlp_channel': [0, 5]})
    save_pruned(small, None, tmp_path/'small')
    plain = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path/'small', trust_remote_code=True).eval()
    assert torch.equal(padded_logits(plain), padded_logits(small))


@pytest.mark.parametrize('kind', ['llava', 'gemma3'])
def test_pictures_are_read_after_pruning(kind):
    model = build(kind)
    kept = random_kept(model, ('value_channel', 'mlp_channel'))
    small = slice_units(copy.deepcopy(model), kept)
    pictures = torch.randn(1, 3, 28, 28, generator=torch.Generator().manual_seed(1))
    ids = torch.randint(3, 90, (1, 12), generator=torch.Generator().manual_seed(2))
    ids[:, 3:7] = 96                                       # four patches
    look = lambda m: m(input_ids=ids, pixel_values=pictures).logits
    with torch.no_grad(), masked(model, kept): expected = look(model)
    with torch.no_grad():
        torch.testing.assert_close(look(small), expected, atol=1e-4, rtol=1e-4)
        assert not torch.allclose(small(input_ids=ids, pixel_values=0*pictures).logits, expected, atol=1e-3)      # and pictures matter


@pytest.mark.parametrize('kind', ['llava', 'gemma3'])
def test_from_the_command_line(kind, tmp_path, tiny_tokenizer, capsys):
    model = build(kind)
    model.save_pretrained(tmp_path/'dense')
    tiny_tokenizer.save_pretrained(tmp_path/'dense')
    (tmp_path/'dense'/'preprocessor_config.json').write_text('{"size": 28}')
    words = ['prune', str(tmp_path/'dense'), '--method', 'fasp', '--text', 'random', '--n', '3', '--seqlen', '14', '--dtype', 'float32', '--device', 'cpu']
    for how in ([], ['--stream']):
        out = tmp_path/f'small{len(how)}'
        assert main([*words, *how, '--out', str(out)]) == 0, capsys.readouterr().err
        small, _ = load_model(str(out), 'cpu', torch.float32)
        plain = transformers.AutoModelForImageTextToText.from_pretrained(out)
        assert type(plain) is type(model) and same_outside(model, plain)
        assert same_outside(model, small) and small.num_parameters() < model.num_parameters()
        assert (out/'preprocessor_config.json').read_text() == '{"size": 28}'                   # how pictures become numbers
    assert main(['inspect', str(tmp_path/'dense')]) == 0
    assert 'query_heads' in capsys.readouterr().out

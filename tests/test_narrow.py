"""Narrow values as they run: without padding where the kernel takes them, padded where it does not; the same numbers either way."""
import copy
import inspect

import pytest
import torch
from helpers import tiny_model
from transformers import AutoModelForCausalLM, DynamicCache, LlamaForCausalLM, StaticCache

from prunebook import couplings as couplings_module
from prunebook.couplings import NarrowCache, anatomy, couplings, kinds_of, slice_units
from prunebook.models import TINY
from prunebook.save import save_pruned

pytestmark = pytest.mark.usefixtures('one_thread', 'own_modules')
IDS = torch.randint(3, 97, (3, 12), generator=torch.Generator().manual_seed(0))
MASK = torch.ones_like(IDS)
CACHE = next(n for n in ('cache', 'past_key_values') if n in inspect.signature(LlamaForCausalLM.forward).parameters)
MASK[0, :5] = MASK[1, :1] = 0                              # left padding
WITH_VALUES = [f for f in TINY if 'value_channel' in kinds_of(tiny_model(f))]


def narrow(family, dtype=torch.float64, kernel='sdpa'):
    "A model whose blocks have values of different widths."
    m = tiny_model(family)
    slice_units(m, {c.name: [i for i in range(c.n_units) if i % (c.n_units//c.groups) > c.layer] for c in couplings(m, 'value_channel')})
    m.set_attn_implementation(kernel)
    return m.to(dtype)


@pytest.fixture
def padded_always(monkeypatch):
    "What was done before: every value is padded before attention, and in the cache."
    def switch(on): monkeypatch.setattr(couplings_module, 'takes_narrow', (lambda *a: False) if on else taken)
    taken = couplings_module.takes_narrow
    return switch


@torch.no_grad()
def steps(m, kernel_mask=MASK, cache=None, parts=(7, 3, 1, 1)):
    "Logits of a prompt that is read in several parts, and the cache."
    cache, found = DynamicCache(config=m.config) if cache is None else cache, []
    for ids, end in zip(IDS.split(parts, 1), torch.tensor(parts).cumsum(0)):
        found.append(m(ids, attention_mask=kernel_mask[:, :end], **{CACHE: cache}, use_cache=True).logits)
    return torch.cat(found, 1)[MASK.bool()], cache


def sizes(cache): return [(k.keys.shape[-1], k.values.shape[-1]) for k in cache.layers]


# eager attention of the library computes its softmax in float32: in float64 its mask is infinite there
@pytest.mark.parametrize('kernel,dtype,tolerance', [('sdpa', torch.float64, 1e-12), ('sdpa', torch.float32, 2e-5), ('sdpa', torch.bfloat16, 5e-2), ('eager', torch.float32, 2e-5)], ids=str)
@pytest.mark.parametrize('family', WITH_VALUES)
def test_logits_are_those_of_padded_values(family, kernel, dtype, tolerance, padded_always):
    m = narrow(family, dtype, kernel)
    got, cache = steps(m)
    padded_always(True)
    expected, wide = steps(m)
    assert (got - expected).abs().max() <= tolerance*expected.abs().max() > 0
    assert sizes(cache) == [(b.head_dim, b.value_dim) for b in anatomy(m)] != sizes(wide)
    assert sizes(wide) == [(b.head_dim, b.head_dim) for b in anatomy(m)]


@pytest.mark.parametrize('kernel', ['sdpa', 'eager'])
@pytest.mark.parametrize('family', WITH_VALUES)
def test_generate_with_a_cache_and_left_padding(family, kernel):
    m = narrow(family, torch.float64 if kernel == 'sdpa' else torch.float32, kernel)
    kw = dict(attention_mask=MASK, max_new_tokens=8, do_sample=False, pad_token_id=0)
    expected = m.generate(IDS, use_cache=False, **kw)
    assert torch.equal(m.generate(IDS, use_cache=True, **kw), expected)


@pytest.mark.parametrize('family', ['llama', 'gpt2'])
def test_beams_reorder_the_cache(family):
    m = narrow(family)
    kw = dict(attention_mask=MASK, max_new_tokens=5, num_beams=3, do_sample=False, pad_token_id=0)
    assert torch.equal(m.generate(IDS, use_cache=True, **kw), m.generate(IDS, use_cache=False, **kw))


def seen_by_the_kernel(m, monkeypatch, run):
    "Pairs (queries, channels of the values) of every call of the kernel."
    calls, kernel = [], torch.nn.functional.scaled_dot_product_attention
    def note(q, k, v, *args, **kw):
        calls.append((q.shape[-2], v.shape[-1]))
        return kernel(q, k, v, *args, **kw)
    monkeypatch.setattr(torch.nn.functional, 'scaled_dot_product_attention', note)
    run()
    return calls


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float32], ids=str)
def test_what_the_kernel_is_given(dtype, monkeypatch):
    "Values at full size, which has the fast kernel."
    m = narrow('llama', dtype)
    calls = seen_by_the_kernel(m, monkeypatch, lambda: steps(m, parts=(11, 1)))
    assert [v for _, v in calls] == [8]*6 and calls[0][0] == 11


@pytest.mark.parametrize('family', ['llama', 'gpt2'])
def test_a_static_cache_keeps_its_size(family, padded_always):
    "Its tensors may have been made before the first token, at full size."
    m = narrow(family)
    make = lambda: StaticCache(config=m.config, max_cache_len=16)
    got, cache = steps(m, cache=make())
    assert sizes(cache) == [(b.head_dim, b.head_dim) for b in anatomy(m)]
    padded_always(True)
    assert torch.equal(got, steps(m, cache=make())[0])


@pytest.mark.parametrize('name', ['flash_attention_2', 'flex_attention', 'somebody_elses'])
def test_kernels_that_may_refuse_get_padded_values(name):
    m = narrow('llama')
    attention = m.model.layers[0].self_attn
    assert couplings_module.takes_narrow(attention, DynamicCache())
    attention.config._attn_implementation = name
    assert not couplings_module.takes_narrow(attention, DynamicCache())


def test_attention_that_calls_no_kernel_of_the_library_gets_padded_values():
    "BLOOM and its like reshape values by the head size themselves."
    class Own(torch.nn.Module):
        def forward(self, x, layer_past=None): return x
    m = narrow('llama')
    a = Own()
    a.config = m.config
    couplings_module.narrow_values(a, 'v', 'o', 8, 5)
    assert not couplings_module.takes_narrow(a, DynamicCache())


def test_other_questions_to_the_cache_reach_it():
    cache = DynamicCache()
    assert NarrowCache(cache, None).get_seq_length() == 0 and NarrowCache(cache, None).layers is cache.layers


@pytest.mark.parametrize('family', ['llama', 'gpt2', 'qwen3'])
def test_the_saved_modelling_file_does_the_same(family, tmp_path):
    m = narrow(family, torch.float32)
    expected, cache = steps(m)
    save_pruned(m, None, tmp_path/'saved')
    again = AutoModelForCausalLM.from_pretrained(tmp_path/'saved', trust_remote_code=True).eval()
    got, own = steps(again)
    assert torch.equal(got, expected) and sizes(own) == sizes(cache) == [(b.head_dim, b.value_dim) for b in anatomy(m)]


def test_bytes_of_the_cache():
    "What leaves the values leaves the cache."
    dense, small = tiny_model('llama').double(), narrow('llama')
    held = lambda m: sum(k.values.nbytes for k in steps(m)[1].layers)
    assert held(small)/held(dense) == sum(b.value_dim for b in anatomy(small))/sum(b.value_dim for b in anatomy(dense))


def test_training_is_as_before():
    "Without a cache nothing changes; gradients reach every parameter."
    m = narrow('llama', torch.float32).train()
    m(IDS, labels=IDS, use_cache=False).loss.backward()
    assert all(p.grad is not None for p in m.parameters())
    copy.deepcopy(m).gradient_checkpointing_enable()

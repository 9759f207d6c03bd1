"""Every method on a pretended accelerator, with the model in three places: nothing meets on two devices, and results are those of the CPU."""
import functools
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload, dispatch_model
from fake_gpu import FakeGPU, device
from helpers import tiny_model
from prunebook import models
from prunebook.methods import Run, configured
from prunebook.pruning import prune
from prunebook.models import blocks
from prunebook.text import Windows
from torch.utils.benchmark import Timer
from transformers import AutoModelForCausalLM

pytestmark = [pytest.mark.usefixtures('one_thread'), pytest.mark.filterwarnings('ignore')]
VALUES, GROUPS = ('value_channel', 'mlp_channel'), ('kv_group', 'mlp_channel')
CASES = [
    ('random', {}), ('magnitude', dict(restore=True)), ('wanda_sp', {}), ('flap', {}), ('flap', dict(restore='bias')),
    ('flap', dict(units=VALUES, restore=True)), ('taylor', {}), ('fasp', dict(units=VALUES)), ('fasp', dict(units=GROUPS)),
    ('depth2', dict(units=VALUES)), ('depth2', dict(units=GROUPS, restore='two_step', form='code', trust=1.)),
    ('depth2', dict(restore=False, sigma='random')), ('depth2', dict(restore=False, sigma='identity', form='paper')),
    ('depth2', dict(units=GROUPS, heads='second_moment', form='paper')), ('depth2', dict(units=('query_head',))),
    ('bonsai', dict(evaluations=8, seqlen=12)), ('bonsai', dict(evaluations=8, seqlen=12, restore=True, units=VALUES)),
    ('surgeon', dict(shots=1, correction=2)), ('surgeon', dict(shots=1, cost='tied', restore='tied'), dict(store='cpu', lean=True)),
    ('recipe', {}), ('recipe', dict(depth=True, whole_price=.3)), ('recipe', dict(order='greedy', turn=False)), ('recipe', dict(allocation='curvature')), ('recipe', dict(metric='loss', order='greedy')), ('recipe', dict(trust=0., units=GROUPS))]
TEXT = Windows(torch.randint(3, 97, (10, 24), generator=torch.Generator().manual_seed(0)), 'random')


def name(case): return f'{case[0]}-{"-".join(f"{k}={v}" for k, v in case[1].items())}'


def over_two_devices(model):
    "The model as `accelerate` spreads it: the last block and the last norm are on a second device, and the output layer if it has weights of its own."
    path, layers = blocks(model)
    first, last = 'gpu:0', 'gpu:1'
    places = {f'{path}.{i}': first if i < len(layers) - 1 else last for i in range(len(layers))}
    for n, m in model.named_modules():
        inside = any(n == p or n.startswith(p + '.') for p in places)
        tied = n == 'lm_head' and model.config.tie_word_embeddings                            # then one tensor, in one place
        if list(m.parameters(recurse=False)) and not inside: places[n] = first if tied or 'embed' in n or n.endswith(('wte', 'wpe')) else last
    return dispatch_model(model, device_map=places, main_device=first, force_hooks=True)


PLACES = dict(one=lambda m: m.to('gpu:0'), visited=lambda m: m, two=over_two_devices)


def runs():
    "Each case in three places on a llama; of the other two families one case each, in one of the places, in turn, to be quick."
    for i, case in enumerate(CASES):
        yield from ((case, 'llama', place) for place in PLACES)
        if case[1].get('units') != ('query_head',): yield case, ('opt', 'gpt2')[i%2], list(PLACES)[i//2%3]


@functools.cache
def on_the_cpu(i, family):
    "Kept units and logits of the case number `i`."
    small, plan = prune(tiny_model(family), TEXT, configured(*CASES[i][:2]), .2)
    with torch.no_grad(): return plan.kept, small(TEXT.ids[:2]).logits


@pytest.mark.parametrize('case, family, place', list(runs()), ids=lambda x: x if isinstance(x, str) else name(x))
def test_as_on_the_cpu(case, family, place):
    kept, logits = on_the_cpu(CASES.index(case), family)
    run = Run(**dict(*case[2:]), device='gpu:0' if place == 'visited' else None)
    with FakeGPU(strict=True):
        small, plan = prune(PLACES[place](tiny_model(family)), TEXT, configured(*case[:2]), .2, run=run)
        with torch.no_grad(): found = small(TEXT.ids[:2].to(small.device)).logits.cpu()
    assert plan.kept == kept
    assert (found - logits).abs().max() <= 1e-4*logits.abs().max()


def folder_of(model, folder):
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize('case', CASES, ids=name)
def test_streamed_from_disk(case, tmp_path):
    "Blocks open on the device; a method that needs the whole model says so before it starts."
    i, method = CASES.index(case), configured(*case[:2])
    source, run = folder_of(tiny_model('llama'), tmp_path/'dense'), Run(**dict(*case[2:]), device='gpu:0', out=str(tmp_path/'small'))
    with FakeGPU(strict=True):
        if method.needs.whole_model:
            with pytest.raises(ValueError, match='cannot be streamed; prune it in memory'): prune(source, TEXT, method, .2, run=run)
            assert [p.name for p in tmp_path.iterdir()] == ['dense']
            return
        _, plan = prune(source, TEXT, method, .2, run=run)
    assert plan.kept == on_the_cpu(i, 'llama')[0]


def test_offloaded_weights_are_refused_at_once():
    with pytest.raises(ValueError, match=r'offloaded.*Run\(device'): prune(cpu_offload(tiny_model('llama'), 'cpu'), TEXT, 'fasp', .2)


def test_a_model_is_read_onto_a_gpu_without_a_copy_in_memory(tmp_path, tiny_tokenizer, monkeypatch):
    "The reader is told the place; here the CPU plays the GPU, so that it also reads."
    dense, asked, read = tiny_model('llama'), [], AutoModelForCausalLM.from_pretrained
    dense.save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    def told(path, **options):
        asked.append(options.get('device_map'))
        return read(path, **{**options, 'device_map': {'': 'cpu'}})
    monkeypatch.setattr(AutoModelForCausalLM, 'from_pretrained', told)
    for device in ('cuda', 'cuda:1', 'cpu'):
        model, _ = models._load(tmp_path, torch.float32, False, True, torch.device(device))
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), dense.parameters(), strict=True))
        small, _ = prune(model, TEXT, 'fasp', .2)           # such a model is like any other
        with torch.no_grad(): assert small(TEXT.ids[:1]).logits.isfinite().all()
    assert asked == [{'': torch.device('cuda')}, {'': torch.device('cuda:1')}, None]


# ---- the pretended accelerator itself: what CUDA refuses, what it allows, and what is counted


def test_mixed_devices_are_refused():
    with FakeGPU() as gpu:
        x = torch.ones(3, 4, device='gpu:0')
        for mixed in (lambda: x + torch.ones(4), lambda: x @ torch.ones(4, 2, device='gpu:1'), lambda: torch.cat([x, torch.ones(1, 4)]),
                      lambda: torch.ones(3)[torch.tensor([0], device='gpu:0')], lambda: torch.nn.functional.embedding(torch.tensor([0]), x)):
            with pytest.raises(RuntimeError, match='same device'): mixed()
        for host in (x.numpy, x.__array__):
            with pytest.raises(TypeError, match='convert gpu:0'): host()
        with pytest.raises(RuntimeError, match='generator'): torch.rand(2, device='gpu:0', generator=torch.Generator())
    assert sum(gpu.mixed.values()) == 5


def test_what_cuda_allows():
    with FakeGPU() as gpu:
        x = torch.arange(12., device='gpu:0').view(3, 4)
        assert (x*torch.tensor(2.))[torch.tensor([1])].tolist() == [[8., 10., 12., 14.]]       # a number, and an index, from the CPU
        assert x[[0, 2], 1].tolist() == [1., 9.] and x.sum().item() == 66.
        y = x.clone()
        y[:, torch.tensor([0])] = 0
        assert y.cpu().numpy().sum() == 54. and torch.equal(x.to('gpu:1').cpu(), x.cpu())
        assert torch.rand(2, device='gpu:0', generator=torch.Generator('gpu:0').manual_seed(0)).device == device()
    assert not gpu.mixed


def test_timer_of_pytorch_waits_for_the_device():
    with FakeGPU() as gpu:
        x = torch.ones(3, 4, device='gpu:0')
        assert Timer('x + x', globals=dict(x=x)).timeit(1).mean > 0
    assert sum(gpu.syncs.values()) >= 2                        # before and after what is timed


def test_counts():
    with FakeGPU() as gpu:
        x = torch.zeros(1000).to('gpu:0')
        assert sum(gpu.to_device.values()) == 4000 == gpu.alive['gpu:0'] and not gpu.syncs
        view, y = x[:10], x + 1
        assert gpu.alive['gpu:0'] == 8000                      # a view holds no bytes of its own
        y.sum().item()
        assert sum(gpu.syncs.values()) == 1 and sum(gpu.to_host.values()) == 4
        del y
        assert gpu.alive['gpu:0'] == 4000 and gpu.peak['gpu:0'] >= 8000
        del x
        assert gpu.alive['gpu:0'] == 4000                      # the view holds all of it
        del view
        assert gpu.alive['gpu:0'] == 0


def test_a_model_loaded_first_on_the_device():
    "Buffers that no file holds are right when the first model of a process is made there."
    code = """if True:
        import sys; sys.path.insert(0, 'tests')
        from fake_gpu import FakeGPU
        import torch
        with FakeGPU():
            from transformers import AutoModelForCausalLM
            model = AutoModelForCausalLM.from_pretrained(sys.argv[1]).to('gpu:0')
            print(model.model.rotary_emb.inv_freq[0].item())"""
    with tempfile.TemporaryDirectory() as folder:
        tiny_model('llama').save_pretrained(folder)
        out = subprocess.run([sys.executable, '-c', code, folder], capture_output=True, text=True, check=True, cwd=Path(__file__).parent.parent)
    assert float(out.stdout) == 1.


def test_saving_from_the_device(tmp_path):
    model = tiny_model('qwen2')
    with FakeGPU(): model.to('gpu:0').save_pretrained(tmp_path)
    again, model = type(model).from_pretrained(tmp_path), tiny_model('qwen2')
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters()))


def test_shared_parameters_stay_one():
    "Embedding and output layer of one tensor, after every conversion."
    with FakeGPU():
        for m in (tiny_model('mistral'), tiny_model('mistral').to(device()), tiny_model('mistral').to(device()).bfloat16()):
            assert m.config.tie_word_embeddings and m.lm_head.weight is m.model.embed_tokens.weight

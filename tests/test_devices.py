"""Every method on a pretended accelerator, with the model in three places: nothing meets on two devices, and results are those of the CPU."""
import functools

import pytest
import torch
from accelerate import dispatch_model
from fake_gpu import FakeGPU, device
from helpers import tiny_model
from prunebook.methods import as_method, configured, prune
from prunebook.models import blocks
from prunebook.text import Windows

pytestmark = [pytest.mark.usefixtures('one_thread'), pytest.mark.filterwarnings('ignore')]
VALUES, GROUPS = ('value_channel', 'mlp_channel'), ('kv_group', 'mlp_channel')
CASES = [
    ('random', {}), ('magnitude', dict(restore=True)), ('wanda_sp', {}), ('flap', {}), ('flap', dict(compensation='bias')),
    ('flap', dict(units=VALUES, restore=True)), ('taylor', {}), ('fasp', dict(units=VALUES)), ('fasp', dict(units=GROUPS)),
    ('depth2', dict(units=VALUES)), ('depth2', dict(units=GROUPS, reconstruct='two_step', form='code', trust=1.)),
    ('depth2', dict(reconstruct='none', sigma='random')), ('depth2', dict(reconstruct='none', sigma='identity', form='paper')),
    ('depth2', dict(units=GROUPS, heads='second_moment', form='paper')), ('depth2', dict(units=('query_head',))),
    ('bonsai', dict(evaluations=8, seqlen=12)), ('bonsai', dict(evaluations=8, seqlen=12, restore=True, units=VALUES)),
    ('surgeon', dict(shots=1, correction=2)), ('surgeon', dict(shots=1, store='cpu', cost='tied', update='tied', checkpoint=True)),
    ('recipe', {}), ('recipe', dict(score='greedy', turn=False)), ('recipe', dict(allocation='curvature')), ('recipe', dict(trust=0., units=GROUPS))]
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
    "Each case on a llama; of the other two families one case each, in turn, to be quick."
    for i, case in enumerate(CASES):
        yield from ((case, family) for family in ('llama', ('opt', 'gpt2')[i%2]) if family == 'llama' or case[1].get('units') != ('query_head',))


@functools.cache
def on_the_cpu(i, family):
    "Kept units and logits of the case number `i`."
    small, plan = prune(tiny_model(family), TEXT, configured(*CASES[i]), .2)
    with torch.no_grad(): return plan.kept, small(TEXT.ids[:2]).logits


@pytest.mark.parametrize('place', PLACES)
@pytest.mark.parametrize('case, family', runs(), ids=lambda x: x if isinstance(x, str) else name(x))
def test_as_on_the_cpu(case, family, place):
    if place == 'visited' and 'device' not in as_method(case[0]).settings(): pytest.skip(f'{case[0]} has no device of its own')
    kept, logits = on_the_cpu(CASES.index(case), family)
    settings = {**case[1], **(dict(device='gpu:0') if place == 'visited' else {})}
    with FakeGPU(strict=True), torch.no_grad():
        small, plan = prune(PLACES[place](tiny_model(family)), TEXT, configured(case[0], settings), .2)
        found = small(TEXT.ids[:2].to(small.device)).logits.cpu()
    assert plan.kept == kept
    assert (found - logits).abs().max() <= 1e-4*logits.abs().max()

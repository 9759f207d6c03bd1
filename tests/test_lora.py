"""LoRA with peft on what pruning leaves: every family, every form of output; train, merge, save, reload."""
import copy
import functools

import pytest
import torch
from helpers import tiny_model
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from prunebook.couplings import NarrowValues, anatomy
from prunebook.fasp import FASP
from prunebook.methods import as_method
from prunebook.pruning import prune
from prunebook.models import TINY, decoder_linears
from prunebook.recipe import Recipe
from prunebook.save import load_pruned, save_pruned
from prunebook.text import Windows

pytestmark = pytest.mark.usefixtures('one_thread', 'own_modules')
IDS = torch.randint(3, 97, (2, 12), generator=torch.Generator().manual_seed(0))


def windows(): return Windows(torch.randint(3, 97, (8, 16), generator=torch.Generator().manual_seed(1)), 'random')


def heads(m): return 'kv_group' if anatomy(m)[0].kv_heads > 1 else 'query_head'


FORMS = dict(mlp=lambda m: FASP(), values=lambda m: FASP(units=('value_channel', 'mlp_channel')), turned=lambda m: Recipe(),
             heads=lambda m: FASP(units=(heads(m), 'mlp_channel')), biased=lambda m: as_method('flap'))


@functools.cache
def _pruned(family, form):
    m = tiny_model(family)
    return prune(m, windows(), FORMS[form](m), .2)


def pruned(family, form):
    model, plan = _pruned(family, form)
    return copy.deepcopy(model), plan


def targets(model, which):
    "Names for peft: those of queries and values, of the output projection, or all."
    b = anatomy(model)[0]
    last = lambda p: p.split('.')[-1]
    if which == 'all-linear': return which
    return [last(b.family.out)] if which == 'o' else sorted({last(b.family.qkv[0]), last(b.family.qkv[-1])})


@torch.no_grad()
def logits(m): return m.eval()(IDS).logits


def adapted(model, which):
    "The model with adapters that have made one step."
    torch.manual_seed(0)
    m = get_peft_model(model, LoraConfig(task_type='CAUSAL_LM', r=2, lora_alpha=16, target_modules=targets(model, which)))
    step = torch.optim.SGD([p for p in m.parameters() if p.requires_grad], lr=.05)
    m.train()
    m(IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in m.parameters() if p.requires_grad)
    step.step()
    return m


@pytest.mark.filterwarnings('ignore:fan_in_fan_out')
@pytest.mark.parametrize('form', FORMS)
@pytest.mark.parametrize('family', TINY)
def test_train_merge_save_reload(family, form, tmp_path):
    for which in ('q+v', 'o', 'all-linear'):
        model, plan = pruned(family, form)
        before, names = logits(model), {n: p.shape for n, p in model.named_parameters()}
        lora = adapted(model, which)
        trained = logits(lora)
        step = (trained - before).abs().max()
        assert step > 1e-4*before.abs().max(), which                                          # it is not a trifle
        merged = lora.merge_and_unload()
        assert (logits(merged) - trained).abs().max() <= .02*step, which
        assert {n: p.shape for n, p in merged.named_parameters()} == names
    again, _, read = load_pruned(save_pruned(merged, plan, tmp_path/which), device='cpu')     # the last, of all linears
    assert torch.equal(logits(again), logits(merged)) and read == plan
    adapted(again, which)                                                                     # a reloaded model takes adapters, too


@pytest.mark.parametrize('family', TINY)
def test_what_is_under_an_adapter_is_plain(family):
    "The fault behind failing adapters: a linear that takes or gives other sizes than it tells."
    model, _ = pruned(family, 'values')
    assert any(isinstance(m, NarrowValues) for m in model.modules())
    seen, handles = {}, []
    for n, m in decoder_linears(model).items():
        assert type(m) in (nn.Linear, Conv1D), n
        handles.append(m.register_forward_hook(lambda m, args, y, n=n: seen.__setitem__(n, (args[0].shape[-1], y.shape[-1]))))
    logits(model)
    for h in handles: h.remove()
    told = {n: (m.nx, m.nf) if isinstance(m, Conv1D) else (m.in_features, m.out_features) for n, m in decoder_linears(model).items()}
    assert seen == told

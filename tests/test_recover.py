"""Recovery: what a little training gives back, on tiny models."""
import copy
import sys

import pytest
import torch
from helpers import tiny_model
from killing import forked
from safetensors.torch import load_file

from prunebook.models import TINY
from prunebook.pruning import prune
from prunebook.recover import Recovery, check_recovery, distillation, recover
from prunebook.save import load_pruned, save_pruned
from prunebook.sources import twin
from prunebook.text import Windows

pytestmark = [pytest.mark.usefixtures('one_thread', 'own_modules'), pytest.mark.filterwarnings('ignore:All inputs of')]
peft = pytest.importorskip('peft')


def windows(seed, n=8): return Windows(torch.randint(3, 97, (n, 16), generator=torch.Generator().manual_seed(seed)), f'random {seed}')


def tensors(model): return {n: t.clone() for n, t in model.state_dict().items()}
def same(model, old): return model.state_dict().keys() == old.keys() and all(torch.equal(t, old[n]) for n, t in model.state_dict().items())


@torch.no_grad()
def divergence(student, teacher, text): return distillation(student(text.ids).logits, teacher(text.ids).logits).item()


QUICK = dict(batch_size=4, learning_rate=3e-3)


@pytest.fixture(scope='module')
def pair():
    "A dense model, and a pruned one with widths of its own in every block and narrow values."
    dense = tiny_model('llama')
    return dense, prune(dense, windows(1), 'recipe', .3)


# ---- losses --------------------------------------------------------------------------------------------------------

def test_distillation_is_the_divergence_and_its_gradient_the_difference():
    z, t = (torch.randn(2, 3, 11, generator=torch.Generator().manual_seed(i)) for i in (0, 1))
    z.requires_grad_()
    for tau in (1., 2.):
        p, q = (t/tau).softmax(-1), (z/tau).softmax(-1)
        loss = distillation(z, t, tau)
        assert torch.allclose(loss, tau**2*(p*(p/q).log()).sum(-1).mean(), atol=1e-6)
        assert torch.allclose(torch.autograd.grad(loss, z)[0], tau*(q - p)/6, atol=1e-6)


def test_a_student_that_is_its_teacher_learns_nothing(pair):
    dense = pair[0]
    for how in (Recovery(**QUICK), Recovery(trains='all', **QUICK)):
        _, done = recover(copy.deepcopy(dense), dense, windows(1), 2, how)
        assert done.losses[0] == pytest.approx(0, abs=1e-6)


# ---- every family --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('trains', ['lora', 'all'])
@pytest.mark.parametrize('family', TINY)
def test_prune_recover_reload(family, trains, tmp_path):
    "It learns the text it reads, keeps shapes and dtype, leaves the dense model alone, and reloads bit for bit."
    dense, dtype = tiny_model(family), torch.bfloat16 if trains == 'all' else torch.float32
    dense = dense.to(dtype)
    small, plan = prune(dense, windows(1), 'recipe', .3)
    old, before = tensors(dense), tensors(small)
    text = windows(2)
    better, done = recover(small, dense, text, 12, Recovery(trains=trains, batch_size=4, learning_rate=3e-4))
    assert same(dense, old) and same(small, before)
    assert {n: (t.shape, t.dtype) for n, t in better.state_dict().items()} == {n: (t.shape, t.dtype) for n, t in before.items()}
    assert vars(better).keys() == vars(small).keys() and all(p.requires_grad for p in better.parameters()) and not better.training
    assert divergence(better, dense, text) < divergence(small, dense, text) and done.best == 12
    again, _, read = load_pruned(save_pruned(better, plan, tmp_path/'small'), device='cpu')
    assert same(again, tensors(better)) and read == plan


def test_weights_that_a_twin_shares_stay(pair):
    "Merging must not write into the tensors of another tree."
    dense, (small, _) = pair
    for trains in ('lora', 'all'):
        other = twin(small)
        before = tensors(small)
        recover(other, dense, windows(2), 2, Recovery(trains=trains, **QUICK), inplace=True)
        assert same(small, before) and not same(other, before)


def test_embedding_and_head_stay(pair):
    dense, (small, _) = pair
    for trains in ('lora', 'all'):
        better, _ = recover(small, dense, windows(2), 2, Recovery(trains=trains, **QUICK))
        for get in ('get_input_embeddings', 'get_output_embeddings'):
            assert torch.equal(getattr(better, get)().weight, getattr(small, get)().weight)


def test_losses_and_checkpointing(pair):
    "Labels, logits and states can be mixed; computing twice changes nothing; a LoRA update has the rank it is given."
    dense, (small, _) = pair
    how = Recovery(logits=.5, labels=.5, hidden=.1, temperature=2., rank=2, **QUICK)
    better, done = recover(small, dense, windows(2), 3, how)
    again, calls = copy.deepcopy(small), []
    again.model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(0))
    _, twice = recover(again, dense, windows(2), 3, Recovery(**{**done.settings, 'checkpointing': True}), inplace=True)
    assert len(calls) == 2*3*2                         # twice in each step and half of a batch
    assert twice.losses == pytest.approx(done.losses, abs=1e-5)
    for name, w in better.named_parameters():
        change = (w - small.get_parameter(name)).detach()
        if '_proj' in name and w.ndim == 2: assert torch.linalg.matrix_rank(change, rtol=1e-3) == 2
        else: assert not change.any()
    alone, _ = recover(small, None, windows(2), 3, Recovery(logits=0, labels=1, **QUICK))
    assert not same(alone, tensors(better))


@pytest.mark.parametrize('checkpointing', [False, True])
def test_dropout_of_the_model_itself_stays_off(checkpointing):
    "A model that was built with dropout learns from what it computes in use."
    dense = tiny_model('opt')
    dense.config.dropout = .5
    for m in dense.modules():
        for k, v in vars(m).items():
            if 'dropout' in k and isinstance(v, float): setattr(m, k, .5)
    _, done = recover(copy.deepcopy(dense), dense, windows(1), 1, Recovery(checkpointing=checkpointing, **QUICK))
    assert done.losses[0] == pytest.approx(0, abs=1e-6)
    assert dense.model.decoder.layers[0].dropout == .5


def test_parts_of_a_batch_sum_to_the_batch(pair):
    dense, (small, _) = pair
    losses = [recover(small, dense, windows(2), 3, Recovery(at_once=k, **QUICK))[1].losses for k in (1, 3, 4)]
    assert losses[1] == pytest.approx(losses[0], abs=1e-5) and losses[2] == pytest.approx(losses[0], abs=1e-5)


def test_every_window_is_read_before_one_is_read_again():
    from prunebook.recover import _batch
    text = Windows(torch.arange(10)[:, None].repeat(1, 2), 'numbers')
    rows = torch.cat([_batch(text, Recovery(batch_size=4), i)[:, 0] for i in range(5)])
    assert sorted(rows[:10].tolist()) == sorted(rows[10:].tolist()) == list(range(10)) and not torch.equal(rows[:10], rows[10:])


# ---- when to stop --------------------------------------------------------------------------------------------------

def test_over_fitting_is_seen_and_the_best_state_kept(pair):
    "Labels of two random windows: they are learned by heart, other random windows get worse."
    dense, (small, _) = pair
    text, watch = windows(5, 2), windows(6, 8)
    how = Recovery(logits=0, labels=1, learning_rate=1e-2, trains='all', batch_size=2)
    better, done = recover(small, None, text, 30, how, watch=watch, every=1)
    mean = {s: sum(v) for s, v in done.watched.items()}
    assert done.losses[-1] < .5*done.losses[0] and done.harm == done.best == min(mean, key=mean.get) < 30
    assert 'training harmed' in repr(done)
    assert sum(done.merged) == pytest.approx(mean[done.best], rel=1e-4)
    assert mean[30] > mean[done.best]


# ---- what cannot be done -------------------------------------------------------------------------------------------

def test_mistakes_are_named_before_any_work(pair, monkeypatch):
    dense, (small, _) = pair
    other = tiny_model('llama', vocab_size=101)
    def refused(match, *args, kind=ValueError, **kw):
        with pytest.raises(kind, match=match): recover(*args, **kw)
    refused('vocabulary of 97 tokens and the teacher one of 101', small, other, windows(1), 1)
    refused('needs a teacher', small, None, windows(1), 1)
    refused('one model', small, small, windows(1), 1)
    refused('steps is 0', small, dense, windows(1), 0)
    with pytest.raises(ValueError, match='no loss'): Recovery(logits=0)
    with pytest.raises(ValueError, match='rank is 0'): Recovery(rank=0)
    quantized = copy.deepcopy(small)
    quantized.is_quantized = True
    refused('quantized', quantized, dense, windows(1), 1)
    deeper = tiny_model('llama', num_hidden_layers=4)
    refused('hidden=0', small, deeper, windows(1), 1, Recovery(hidden=1.))
    check_recovery(small, deeper, windows(1), 1, Recovery())
    monkeypatch.setitem(sys.modules, 'peft', None)
    refused(r'prunebook\[recover\]', small, dense, windows(1), 1, kind=ImportError)
    recover(small, dense, windows(1), 1, Recovery(trains='all'))


@pytest.mark.parametrize('trains', ['lora', 'all'])
def test_a_loss_that_is_not_finite_stops_and_leaves_the_old(pair, trains):
    dense, (small, _) = pair
    broken = copy.deepcopy(dense)
    with torch.no_grad(): broken.get_output_embeddings().weight[5] = float('nan')
    before, names = tensors(small), [*dict(small.named_modules())]
    with pytest.raises(RuntimeError, match='loss of step 0 is nan.*learning rate'):
        recover(small, broken, windows(1), 3, Recovery(trains=trains), inplace=True)
    assert same(small, before) and [*dict(small.named_modules())] == names and all(p.requires_grad for p in small.parameters())


# ---- interrupted runs ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize('trains', ['lora', 'all'])
def test_killed_three_times_and_resumed_ends_with_the_same_bytes(pair, trains, tmp_path):
    dense, (small, plan) = pair
    how = Recovery(trains=trains, dropout=.1, **QUICK)
    text, watch, file = windows(2, 6), windows(3, 4), tmp_path/'state.safetensors'
    def run(name, state, killed_at=None):
        torch.manual_seed(killed_at or 0)                  # what the process drew before must not matter
        from prunebook import recover as module
        step = module._Run.step
        def counted(self):
            if self.done.steps == killed_at: raise SystemExit
            return step(self)
        module._Run.step = counted
        better, done = recover(small, dense, text, 9, how, watch=watch, every=2, state=state)
        save_pruned(better, plan, tmp_path/name)
        return 0
    assert forked(lambda: run('whole', None))[0] == 0
    for at in (1, 5, 8): assert forked(lambda: run('never', file, at))[0] == 99
    assert forked(lambda: run('resumed', file))[0] == 0
    whole, resumed = ((tmp_path/n/'model.safetensors').read_bytes() for n in ('whole', 'resumed'))
    assert whole == resumed


def test_killed_while_the_state_is_written(pair, tmp_path):
    "At every file operation: the old state or the new one is there, never a part."
    dense, (small, _) = pair
    file = tmp_path/'s'/'state.safetensors'
    file.parent.mkdir()
    def run():
        recover(small, dense, windows(2), 4, Recovery(**QUICK), every=2, state=file)
        return 0
    code, operations = forked(run, file.parent)
    assert code == 0 and len(operations) >= 4
    for at in range(len(operations)):
        for torn in (False, True):
            file.unlink(missing_ok=True)
            assert forked(run, file.parent, at, torn)[0] != 0
            assert not file.exists() or load_file(file)
    recover(small, dense, windows(2), 4, Recovery(**QUICK), every=2, state=file)              # goes on from what is there


def test_a_state_of_another_run_is_refused(pair, tmp_path):
    dense, (small, _) = pair
    file = tmp_path/'state'
    recover(small, dense, windows(2), 2, Recovery(**QUICK), state=file)
    with pytest.raises(ValueError, match='settings.*delete'): recover(small, dense, windows(2), 2, Recovery(rank=4, **QUICK), state=file)
    with pytest.raises(ValueError, match='steps.*delete'): recover(small, dense, windows(2), 3, Recovery(**QUICK), state=file)
    file.write_bytes(b'nothing')
    with pytest.raises(ValueError, match='not the state of a recovery'): recover(small, dense, windows(2), 2, Recovery(**QUICK), state=file)

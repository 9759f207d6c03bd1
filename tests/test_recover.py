"""Recovery: what a little training gives back, on tiny models."""
import copy
import json
import sys

import pytest
import torch
from helpers import tiny_model
from killing import forked
from safetensors.torch import load_file
from together import needs_fork, together

from prunebook.cli import main
from prunebook.models import TINY
from prunebook.pruning import prune
from prunebook.couplings import anatomy
from prunebook.estimate import counted_bytes
from prunebook.evaluate import weight_bytes
from prunebook.recover import Recovery, check_recovery, distillation, recover, recover_blocks, recover_estimate
from prunebook.save import load_pruned, save_pruned
from prunebook.sources import OnDisk, twin
from prunebook.text import Windows
from prunebook.walk import processes

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
    text, file = windows(2, 6), tmp_path/'state.safetensors'     # nothing is watched, so that the last state is kept
    def run(name, state, killed_at=None):
        torch.manual_seed(killed_at or 0)                  # what the process drew before must not matter
        import prunebook.recover as module
        step = module._Run.step
        def counted(self):
            if self.done.steps == killed_at: raise SystemExit
            return step(self)
        module._Run.step = counted
        better, done = recover(small, dense, text, 9, how, every=2, state=state)
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


# ---- what it holds -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('how', [dict(), dict(trains='all'), dict(checkpointing=True), dict(logits=0, labels=1)])
def test_the_estimate_is_near_what_is_held(how):
    "Counted on the tensors of a run; the student's copy is the run's own."
    dense = tiny_model('llama', vocab_size=397, hidden_size=96, intermediate_size=192)
    small, _ = prune(dense, windows(1), 'fasp', .2)
    text = Windows(torch.randint(3, 397, (4, 48), generator=torch.Generator().manual_seed(0)), 'random')
    settings = Recovery(batch_size=2, at_once=2, **how)
    held = counted_bytes(lambda: recover(small, dense, text, 2, settings, inplace=True)) + weight_bytes(small)
    if settings.needs_teacher: held += weight_bytes(dense)
    assert .6 < recover_estimate(small, dense, settings, 48)['bytes']/held < 1.7


def test_seven_billion_fit_on_one_card():
    "Student, dense teacher and LoRA under 40 GB; the teacher alone is most of what can be sent away."
    from transformers import LlamaConfig, LlamaForCausalLM
    config = dict(hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, max_position_embeddings=2048)
    with torch.device('meta'):
        dense, small = (LlamaForCausalLM(LlamaConfig(intermediate_size=f, **config)).to(torch.bfloat16) for f in (11008, 7680))
    how = Recovery(checkpointing=True)
    whole, away = (recover_estimate(small, dense, how, 512, offload)['bytes'] for offload in (False, True))
    assert 24e9 < whole < 40e9 and 11e9 < away < 20e9


# ---- block by block ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('trains', ['lora', 'all'])
@pytest.mark.parametrize('family', ['llama', 'opt', 'gpt2', 'phi'])
def test_blocks_in_turn(family, trains, tmp_path):
    "States come nearer to those of the dense model, from memory and from disk alike; nothing else changes."
    dense = tiny_model(family)
    small, plan = prune(dense, windows(1), 'recipe', .3)
    old, before, text = tensors(dense), tensors(small), windows(2)
    how = Recovery(trains=trains, batch_size=4, learning_rate=2e-4)
    better, done = recover_blocks(small, dense, text, 10, how)
    distance = lambda m: sum(((a - b)**2).mean() for a, b in zip(m(text.ids, output_hidden_states=True).hidden_states, dense(text.ids, output_hidden_states=True).hidden_states))
    with torch.no_grad(): assert distance(better) < distance(small)
    assert same(dense, old) and same(small, before) and len(done.losses) == 10*len(anatomy(dense))
    dense.save_pretrained(tmp_path/'dense')
    again, _ = recover_blocks(small, OnDisk(tmp_path/'dense'), text, 10, how)
    assert same(again, tensors(better))


def test_one_block_is_held(tmp_path):
    "Four times the blocks, from disk: what the run makes at the same time stays what it was."
    def held(n):
        dense = tiny_model('llama', num_hidden_layers=n, hidden_size=96, intermediate_size=384)
        dense.save_pretrained(tmp_path/str(n))
        small, source = copy.deepcopy(dense), OnDisk(tmp_path/str(n))
        how = Recovery(trains='all', batch_size=2)
        return counted_bytes(lambda: recover_blocks(small, source, windows(2), 2, how, inplace=True), small)
    block = 4*(4*96*96 + 3*96*384)
    assert held(8) - held(2) < 6.5*block              # six blocks more of the student's own weights


# ---- the command line ----------------------------------------------------------------------------------------------

CUT = ['--seqlen', '24', '--device', 'cpu', '--dtype', 'float32']


@pytest.fixture(scope='module')
def commands(tmp_path_factory, tiny_tokenizer):
    "Folders of a dense model and of what `prune` made of it, by family."
    root = tmp_path_factory.mktemp('recover')
    def folders(family):
        dense, small = root/family, root/f'{family}-small'
        if not dense.exists():
            tiny_model(family).save_pretrained(dense)
            tiny_tokenizer.save_pretrained(dense)
            assert main(['prune', str(dense), '--text', 'random', '--n', '4', '--sparsity', '0.3', '--out', str(small), *CUT]) == 0
        return dense, small
    return folders


def command(folders, out, *more):
    dense, small = folders
    words = ['recover', small, '--teacher', dense, '--out', out, '--text', 'random', '--watch', 'passages', '--steps', '4', *CUT, *more]
    return main([str(w) for w in words])


@pytest.mark.parametrize('family', ['llama', 'qwen3', 'opt', 'gpt2'])
def test_prune_recover_export(family, commands, tmp_path, capsys):
    "Each command takes what the one before has made; the plan stays, and what was done lies beside it."
    dense, small = commands(family)
    capsys.readouterr()
    assert command((dense, small), tmp_path/'better', '--json', '--watch', 'none', '--settings', '{"batch_size": 2, "labels": 1}') == 0, capsys.readouterr().err
    said = json.loads(capsys.readouterr().out)
    assert said['recovery']['steps'] == 4 and said['recovery']['tokens'] == 4*2*24 and said['recovery']['settings']['labels'] == 1
    done = json.loads((tmp_path/'better'/'recovery.json').read_text())
    assert done['teacher'] == family and done['student'] == f'{family}-small' and done['watched'] == {}
    assert (tmp_path/'better'/'plan.json').read_bytes() == (small/'plan.json').read_bytes()
    model, _, plan = load_pruned(tmp_path/'better', device='cpu')
    assert not same(model, tensors(load_pruned(small, device='cpu')[0])) and plan.true_sparsity > .2
    assert main(['verify', str(tmp_path/'better')]) == 0
    if family in ('llama', 'qwen3'):
        codes = [main(['export', str(f), '--out', str(tmp_path/f'{f.name}.gguf'), '--pre', 'default']) for f in (small, tmp_path/'better')]
        assert codes[0] == codes[1], capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith('.')] == []


def test_mistakes_of_the_command(commands, tmp_path, capsys):
    dense, small = commands('llama')
    def refused(words, *args):
        assert main([str(a) for a in args]) == 2
        assert words in capsys.readouterr().err and not (tmp_path/'x').exists()
    refused('--teacher', 'recover', small, '--out', tmp_path/'x')
    refused('no plan.json', 'recover', dense, '--teacher', dense, '--out', tmp_path/'x')
    refused('no setting ranks', 'recover', small, '--teacher', dense, '--out', tmp_path/'x', '--settings', '{"ranks": 2}')
    refused('add --report', 'recover', small, '--teacher', dense, '--out', tmp_path/'x', '--tasks', 'hellaswag')


def test_an_interrupted_command_goes_on(commands, tmp_path, capsys, monkeypatch):
    "The same bytes as without the interruption; without --resume it is refused."
    import prunebook.recover as module
    folders, step = commands('llama'), module._Run.step
    assert command(folders, tmp_path/'whole') == 0
    def interrupted(self):
        if self.done.steps == 2: raise KeyboardInterrupt
        return step(self)
    monkeypatch.setattr(module._Run, 'step', interrupted)
    assert command(folders, tmp_path/'small') == 130 and '--resume' in capsys.readouterr().err
    monkeypatch.setattr(module._Run, 'step', step)
    assert command(folders, tmp_path/'small') == 2 and 'add --resume' in capsys.readouterr().err
    assert command(folders, tmp_path/'small', '--resume') == 0
    whole, resumed = ((tmp_path/n/'model.safetensors').read_bytes() for n in ('whole', 'small'))
    assert whole == resumed and not [*tmp_path.glob('.*')]


def test_a_report_of_the_recovered_model(commands, tmp_path, monkeypatch, capsys):
    "Dense beside recovered, with what the recovery did."
    monkeypatch.delenv('PRUNEBOOK_DATA', raising=False)
    assert command(commands('llama'), tmp_path/'small', '--report', '--eval_n', '2') == 0, capsys.readouterr().err
    report = json.loads((tmp_path/'small'/'report.json').read_text())
    assert report['perplexity']['after']['value'] > 1 and report['recovery']['steps'] == 4 and report['method'] == 'recipe'
    assert 'Recovery: 4 steps' in (tmp_path/'small'/'report.md').read_text()


# ---- mixtures of experts, blocks of other kinds, several processes --------------------------------------------------

@pytest.mark.parametrize('family', ['qwen3_moe', 'mixtral', 'bloom', 'gpt_bigcode', 'olmo2'])
def test_other_families(family):
    "Steps are finite; the merged model computes what it computed with the updates beside it."
    dense = tiny_model(family)
    small = copy.deepcopy(dense)
    with torch.no_grad():
        for p in small.parameters(): p.add_(.02*torch.randn(p.shape, generator=torch.Generator().manual_seed(0)))
    watch, before = windows(3, 4), tensors(small)
    for trains in ('lora', 'all'):
        better, done = recover(small, dense, windows(2), 2, Recovery(trains=trains, **QUICK), watch=watch, every=1)
        assert done.merged == pytest.approx(done.watched[done.best], abs=1e-4) and same(small, before)
        assert {n: t.shape for n, t in better.state_dict().items()} == {n: t.shape for n, t in before.items()}


@needs_fork
def test_two_processes_recover_as_one(tmp_path):
    "A batch of three windows is shared out unevenly: the same losses and the same weights, in both."
    def job():
        better, done = recover(tiny_model('llama', 1), tiny_model('llama'), windows(0), 3, Recovery(batch_size=3, at_once=1))
        rank, count = processes()
        (tmp_path/f'{rank}-{count}').write_text(json.dumps([done.losses, sum(p.double().sum().item() for p in better.parameters())]))
    job()
    assert together(job, 2) == [0, 0]
    alone, first, second = (json.loads((tmp_path/n).read_text()) for n in ('0-1', '0-2', '1-2'))
    assert first == second and first[0] == pytest.approx(alone[0], abs=1e-5) and first[1] == pytest.approx(alone[1], abs=1e-3)

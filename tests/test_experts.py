"""Experts of a mixture: what leaves with one, what the scores measure, files, and the command line."""
import copy
import json

import pytest
import torch
from helpers import tiny_model
from prunebook.cli import main
from prunebook.conform import check_saved, check_streamed, padded_logits, random_kept
from prunebook.couplings import anatomy, couplings, masked, slice_units
from prunebook.experts import REAP, SCORES, leave_one_out, routing, routing_sums, without_experts
from prunebook.load import load_ours
from prunebook.methods import Run, configured
from prunebook.models import decoder_weights, load_model, n_parameters
from prunebook.pruning import prune
from prunebook.save import fits_stock_class, load_pruned, save_pruned
from prunebook.sources import InMemory
from prunebook.stream import Context
from prunebook.text import random_tokens
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

pytestmark = pytest.mark.usefixtures('one_thread', 'own_modules')
MIXTURES = ['mixtral', 'olmoe', 'qwen2_moe', 'qwen3_moe', 'gpt_oss', 'glm4_moe', 'ernie4_5_moe']
CORRECTED = ['glm4_moe', 'ernie4_5_moe']                   # choose by more than logits


def build(family, **config):
    "A tiny mixture of six experts whose corrections are not zero."
    n = dict(glm4_moe='n_routed_experts', mixtral='num_local_experts', gpt_oss='num_local_experts').get(family, 'num_experts')
    m = tiny_model(family, **{n: 6, **config})
    for name, t in m.named_buffers():
        if 'correction' in name: t.copy_(torch.randn(t.shape, generator=torch.Generator().manual_seed(1)))
    return m


def bits(m):
    "Logits with parameters at round addresses; last bits depend on that."
    for p in m.parameters(): p.data = p.data.clone()
    return padded_logits(m)


def windows(m): return random_tokens(m, n=3, seqlen=14)
def mixtures(m): return [(c, m.get_submodule(c.second[0]), m.get_submodule(c.firsts[0][0])) for c in couplings(m, 'expert')]


# ---- masked, sliced, saved ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize('family', MIXTURES)
def test_sliced_is_masked_in_float64(family):
    m = build(family).double()
    m.set_experts_implementation('eager')                  # the only one for float64
    kept = random_kept(m, ('expert',), .5)
    with masked(m, kept): expected = padded_logits(m)
    small = slice_units(copy.deepcopy(m), kept)
    assert (padded_logits(small) - expected).abs().max() < 2e-6*expected.abs().max()               # routers compute in float32
    assert (padded_logits(m) - expected).abs().max() > 1e-3*expected.abs().max()
    assert [b.n_experts for b in anatomy(small) if b.n_experts] == [3]*len(kept)


@pytest.mark.parametrize('family', MIXTURES)
def test_a_mask_leaves_the_model_as_it_was(family):
    m = build(family)
    state, expected = copy.deepcopy(m.state_dict()), padded_logits(m)
    with pytest.raises(KeyError), masked(m, random_kept(m, ('expert',), .5)): raise KeyError
    assert all(torch.equal(t, state[n]) for n, t in m.state_dict().items()) and torch.equal(padded_logits(m), expected)


@pytest.mark.parametrize('family', MIXTURES)
def test_a_router_does_not_choose_what_is_gone(family):
    m = build(family)
    c, _, router = mixtures(m)[0]
    x, gone = torch.randn(40, m.config.hidden_size, generator=torch.Generator().manual_seed(0)), torch.arange(6) < 3
    for t in (*router.parameters(), *router.buffers()):
        if family in CORRECTED and t.numel() == 6: t.data.view(-1)[:3] = 99.                      # a strong wish for them
    with torch.no_grad():
        before = router(x)[2]
        with without_experts(router, gone): after = router(x)[2]
    assert (before < 3).any() and not (after < 3).any()


@pytest.mark.parametrize('family', MIXTURES)
def test_equal_numbers_are_an_ordinary_model(family, tmp_path):
    m = build(family)
    kept = {c.name: [0, 2, 3, 5] for c in couplings(m, 'expert')}
    small = slice_units(m, kept)
    assert fits_stock_class(small)
    save_pruned(small, None, tmp_path/'small')
    plain = AutoModelForCausalLM.from_pretrained(tmp_path/'small').eval()
    assert type(plain) is type(small) and torch.equal(bits(plain), bits(small))
    assert not (tmp_path/'small'/'modeling_pruned.py').exists()


@pytest.mark.parametrize('family', MIXTURES)
def test_other_numbers_in_each_block_bring_their_own_class(family, tmp_path):
    m = build(family)
    first, *_, last = [c.name for c in couplings(m, 'expert')]
    small = slice_units(m, {first: [1, 2, 4], last: [0, 1, 2, 3, 5]})
    numbers, expected = [b.n_experts for b in anatomy(small)], bits(small)
    save_pruned(small, None, tmp_path/'small')
    ids = random_tokens(small, n=2, seqlen=9).ids
    for again in (load_pruned(tmp_path/'small', device='cpu')[0], AutoModelForCausalLM.from_pretrained(tmp_path/'small', trust_remote_code=True).eval()):
        assert torch.equal(bits(again), expected) and [b.n_experts for b in anatomy(again)] == numbers
        assert again.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=0).shape == (2, 12)
    check_saved(again)                                     # once more


@pytest.mark.parametrize('entry', [['model.layers.0.mlp.gate', 7], ['model.layers.0.mlp.gate', 0], ['model.layers.0.mlp.gate', '2'], ['model.embed_tokens', 2], ['model.layers.1.mlp.gate', 2], 'gate'])
@pytest.mark.parametrize('name', ['model.layers.0.mlp.experts', 'model.layers.0.mlp', 'nowhere'])
def test_a_layout_that_lies_about_experts_is_refused(name, entry, tmp_path):
    if (name, entry) == ('model.layers.0.mlp.experts', ['model.layers.0.mlp.gate', 3]): return
    save_pruned(slice_units(build('mixtral'), {'0.expert': [1, 2, 4]}), None, tmp_path/'small')
    config = json.loads((tmp_path/'small'/'config.json').read_text())
    config['pruned']['experts'] = {name: entry}
    (tmp_path/'small'/'config.json').write_text(json.dumps(config))
    (tmp_path/'small'/'prunebook-files.json').unlink()
    with pytest.raises(ValueError): load_ours(tmp_path/'small')


# ---- what is counted ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('family', MIXTURES)
def test_sparsity_counts_experts_and_routers(family):
    m = build(family)
    inside = [p for n, p in m.named_parameters() if '.layers.' in n and p.ndim > 1 and 'norm' not in n]
    counted = n_parameters(decoder_weights(m).values())
    assert counted >= sum(p.numel() for p in inside) > n_parameters([l for l in decoder_weights(m).values() if isinstance(l, torch.nn.Linear)])
    small, plan = prune(m, windows(m), 'reap', .1)
    assert plan.true_sparsity*counted == pytest.approx(n_parameters([m]) - n_parameters([small])) and plan.true_sparsity >= .1


def test_a_number_of_parameters_can_be_asked_for():
    m = build('mixtral')
    most = n_parameters([m]) - 5000
    assert n_parameters([prune(m, windows(m), 'reap', parameters=most)[0]]) <= most


def test_as_many_stay_as_a_token_needs():
    m = build('mixtral', num_experts_per_tok=4)
    with pytest.raises(ValueError, match='at least 4 units must stay'): slice_units(m, {'0.expert': [1, 2, 3]})
    with pytest.raises(ValueError, match='smallest number that can stays everywhere'): prune(m, windows(m), 'reap', .5)
    small, plan = prune(m, windows(m), REAP(multiple={'expert': 2}), .1)
    assert {b.n_experts for b in anatomy(small)} == {4, 6} and plan.true_sparsity >= .1


# ---- scores ------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('family', MIXTURES)
def test_sums_are_what_the_model_adds_up(family):
    "By a look at a whole forward pass: the module gets the weights of one expert and zeros for the others."
    m, found = build(family), {}
    def look(c):
        def hook(module, args):
            x, chosen, gates = args
            n, rows = c.n_units, []
            for e in range(n):
                own = torch.where(chosen == e, gates, 0.)
                rows.append(torch.stack([(chosen == e).sum(), *[module.forward(x, chosen, g).norm(dim=1).sum() for g in ((own != 0).to(gates), own)]]))
            found[c.name] = torch.stack(rows, 1)
        return hook
    handles = [experts.register_forward_pre_hook(look(c)) for c, experts, _ in mixtures(m)]
    with torch.no_grad(): m(windows(m).ids, use_cache=False)
    for h in handles: h.remove()
    sums = routing(Context(InMemory(m), windows(m), .1, table=couplings(m, 'expert')))
    assert sums.keys() == found.keys()
    for n, s in sums.items(): torch.testing.assert_close(s.float(), found[n].float(), rtol=1e-4, atol=1e-4)
    tokens, norms, gated = s
    assert torch.equal(SCORES['reap'](*s), gated/tokens.clamp(min=1)) and torch.equal(SCORES['norm'](*s), norms/tokens.clamp(min=1))


@pytest.mark.parametrize('by', SCORES)
def test_each_score_removes_what_it_finds_small(by):
    "Experts with planted sizes and frequencies: one is silent, one is hardly chosen, one is chosen without weight."
    m = build('mixtral', num_hidden_layers=1)
    _, experts, router = mixtures(m)[0]
    experts.down_proj.data[1] *= 1e-3                                                            # says next to nothing
    router.weight.data[4] *= .01                                                                  # is chosen least
    sums = routing(Context(InMemory(m), windows(m), .1, table=couplings(m, 'expert')))['0.expert']
    weakest = dict(reap=1, total=1, norm=1, frequency=sums[0].argmin().item())[by]
    plan = prune(m, windows(m), REAP(by=by), .1)[1]
    assert plan.kept['0.expert'] == [e for e in range(6) if e != weakest]
    assert by != 'frequency' or weakest != 1


def test_an_expert_that_nobody_asks_leaves_first():
    m, never = build('glm4_moe'), [2, 5]
    c, _, router = mixtures(m)[0]
    router.e_score_correction_bias[never] = -9.
    sums = routing(Context(InMemory(m), windows(m), .1, table=[c]))[c.name]
    assert sums[0].sum() == 2*3*14
    for by, score in SCORES.items(): assert score(*sums)[never].tolist() == [0, 0] and score(*sums).isfinite().all(), by


def test_leave_one_out_is_slicing_one():
    from prunebook.evaluate import window_losses
    m = build('olmoe')
    loss = lambda model: window_losses(model, windows(m)).mean().item()
    found = leave_one_out(m, windows(m))
    for name, e in (('0.expert', 2), ('2.expert', 5)):
        small = slice_units(copy.deepcopy(m), {name: [i for i in range(6) if i != e]})
        assert found[name][e].item() == pytest.approx(loss(small) - loss(m), abs=2e-5) != 0


# ---- the method --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('settings', [{}, dict(uniform=False), dict(by='frequency'), dict(spare=[1, 0])])
def test_plans_are_applied_bit_for_bit(settings):
    m = build('qwen3_moe')
    small, plan = prune(m, windows(m), configured('reap', settings), .1)
    assert torch.equal(padded_logits(plan.apply(copy.deepcopy(m))), padded_logits(small))


@pytest.mark.parametrize('family', MIXTURES)
def test_nothing_goes_at_zero(family):
    m = build(family)
    assert torch.equal(padded_logits(prune(m, windows(m), 'reap', 0)[0]), padded_logits(m))


@pytest.mark.parametrize('method,settings,message', [
    ('fasp', dict(units=('expert',)), 'fasp scores columns of second linears.*choose reap or random'),
    ('recipe', dict(units=('value_channel', 'expert')), 'recipe scores columns'), ('magnitude', dict(units=('expert',)), 'magnitude scores columns'),
    ('random', dict(units=('kv_group', 'expert'), restore=True), 'set restore to False'), ('reap', dict(restore=True), 'set restore to False'),
    ('reap', dict(units=('kv_group',)), 'reap scores experts, and not kv_group'), ('reap', dict(units=('kv_group', 'expert')), 'not kv_group'), ('reap', dict(by='size'), 'by is')])
def test_what_cannot_be_is_said_before_any_work(method, settings, message):
    m = build('mixtral')
    with pytest.raises(ValueError, match=message): prune(m, windows(m), configured(method, settings), .1, inplace=True)
    assert [b.n_experts for b in anatomy(m)] == [6, 6, 6]


def test_a_dense_model_has_no_experts():
    m = tiny_model('llama')
    with pytest.raises(ValueError, match='has no experts'): prune(m, windows(m), 'reap', .1)


def test_at_random_together_with_attention():
    m = build('mixtral')
    small, plan = prune(m, windows(m), configured('random', dict(units=('kv_group', 'expert'))), .3)
    assert all(b.n_experts < 6 and b.kv_heads < 2 for b in anatomy(small)) and plan.true_sparsity >= .3


@pytest.mark.parametrize('uniform', [True, False])
@pytest.mark.parametrize('family', MIXTURES)
def test_from_disk_to_disk(family, uniform):
    "Most checkpoints keep every expert on its own, and transformers stacks them when it loads."
    check_streamed(build(family), REAP(uniform=uniform), .1)


@pytest.mark.parametrize('family', ['mixtral', 'qwen3_moe'])
def test_an_expert_that_is_missing_on_disk_is_named(family, tmp_path):
    m = build(family)
    m.save_pretrained(tmp_path/'dense')
    tensors = load_file(tmp_path/'dense'/'model.safetensors')
    lost = [n for n in tensors if '.experts.3.' in n][-1]
    del tensors[lost]
    save_file(tensors, tmp_path/'dense'/'model.safetensors', metadata=dict(format='pt'))
    with pytest.raises(ValueError, match=f'has no tensor .*experts.3.*belongs to another model'): prune(tmp_path/'dense', windows(m), 'reap', .1, run=Run(out=str(tmp_path/'small')))


@pytest.mark.parametrize('place', ['one', 'visited'])
@pytest.mark.parametrize('family', ['mixtral', 'gpt_oss'])
def test_on_a_pretended_gpu(family, place):
    from fake_gpu import FakeGPU
    m = build(family)
    m.set_experts_implementation('eager')
    expected, plan = prune(m, windows(m), 'reap', .1)
    with FakeGPU(strict=True):
        small, found = prune(copy.deepcopy(m).to('gpu:0') if place == 'one' else m, windows(m), 'reap', .1, run=Run(device=None if place == 'one' else 'gpu:0'))
        with torch.no_grad(): logits = small(windows(m).ids.to(small.device)).logits.cpu()
    assert found.kept == plan.kept
    with torch.no_grad(): torch.testing.assert_close(logits, expected(windows(m).ids).logits, rtol=1e-4, atol=1e-4)


# ---- the command line --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('settings', ['{}', '{"uniform": false, "by": "total"}'])
def test_the_command_line(settings, tmp_path, tiny_tokenizer, capsys):
    m = build('olmoe')
    m.save_pretrained(tmp_path/'dense')
    tiny_tokenizer.save_pretrained(tmp_path/'dense')
    assert main(['inspect', str(tmp_path/'dense'), '--json']) == 0
    assert json.loads(capsys.readouterr().out)['units']['expert']['units'] == 18
    words = ['prune', str(tmp_path/'dense'), '--method', 'reap', '--settings', settings, '--sparsity', '0.1', '--text', 'random', '--n', '3', '--seqlen', '14', '--dtype', 'float32', '--device', 'cpu', '--json']
    assert main([*words, '--out', str(tmp_path/'small')]) == 0, capsys.readouterr().err
    assert json.loads(capsys.readouterr().out)['true_sparsity'] >= .1
    small, _ = load_model(str(tmp_path/'small'), 'cpu')
    assert sum(b.n_experts for b in anatomy(small)) < 18
    assert len({b.n_experts for b in anatomy(small)}) == 1 or 'false' in settings
    assert main(['verify', str(tmp_path/'small')]) == 0


def test_experts_in_groups_are_refused():
    model = build('glm4_moe')
    model.config.n_group = 2
    with pytest.raises(ValueError, match='n_group is above 1'): prune(model, random_tokens(model, n=4, seqlen=8), 'reap', .2)

"""A walk sees what an ordinary forward pass sees, however it is cut into batches, and leaves the model as it found it."""
import copy
import gc
import weakref

import pytest
import torch
from helpers import tiny_model
from hypothesis import given, strategies as st
from prunebook.couplings import anatomy, couplings, removed_columns, slice_units, weight_of
from prunebook.models import TINY
from prunebook.text import Windows
from prunebook.walk import gram, record_calls, replaced, walk

pytestmark = pytest.mark.usefixtures('one_thread')


def tokens(n=5, seqlen=12, seed=0): return Windows(torch.randint(3, 97, (n, seqlen), generator=torch.Generator().manual_seed(seed)), 'random')


def hooked(model, ids):
    "Inputs that the second linears really read in an ordinary forward pass, (tokens, columns)."
    seen, handles = {}, []
    def keep(name):
        def f(module, args): seen[name] = args[0].flatten(0, -2)
        return f
    for b in anatomy(model): handles += [model.get_submodule(n).register_forward_pre_hook(keep(n)) for n in (b.out, b.mlp_second)]
    with torch.no_grad(): model(ids)
    for h in handles: h.remove()
    return seen


def close(a, b, rel=1e-5):
    assert a.shape == b.shape and a.isfinite().all()
    assert (a - b).abs().max().item() <= rel*b.abs().max().item()


def untouched(model):
    "Nothing of a walk is left: no replaced forward, no hook."
    return not any('forward' in m.__dict__ or m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@torch.no_grad()
def logits(model, ids): return model(ids).logits


def half(c): return [i for i in range(c.n_units) if i % (c.n_units//c.groups) < c.n_units//c.groups//2]


def cut(model, stage, kinds=('value_channel', 'mlp_channel')):
    "Keep half of the units of a stage."
    c = next(c for c in couplings(model, kinds) if (c.layer, c.kind == 'mlp_channel') == (stage.layer, stage.part == 'mlp'))
    stay = torch.ones(stage.X[0].shape[-1], dtype=bool)
    stay[removed_columns(c, half(c))] = False
    slice_units(model, {c.name: half(c)})
    stage.keep = stay.nonzero().flatten()


# ---- what is seen ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('implementation', ['eager', 'sdpa'])
@pytest.mark.parametrize('family', TINY)
def test_a_walk_sees_the_forward_pass(family, implementation):
    m, w = tiny_model(family, attn_implementation=implementation), tokens(5, 40)              # longer than Mistral's window of 8
    expected = hooked(m, w.ids)
    stages = [(s.layer, s.part, s.second, torch.cat([x.reshape(-1, x.shape[-1]) for x in s.X]), s.gram()) for s in walk(m, w, batch_size=2)]
    assert [s[:2] for s in stages] == [(i, p) for i in range(3) for p in ('attention', 'mlp')]
    assert [s[2] for s in stages] == [n for b in anatomy(m) for n in (b.out, b.mlp_second)]
    for _, _, name, X, C in stages:
        close(X, expected[name])
        close(C.double(), expected[name].double().T @ expected[name].double())
    assert untouched(m)


def test_the_sliding_window_is_seen():
    grams = []
    for size in (4, 8, 64):
        m = tiny_model('mistral', sliding_window=size)
        grams.append([s.gram() for s in walk(m, tokens(2, 40))][0])
    assert all((a - b).abs().max() > 1e-3*b.abs().max() for a, b in zip(grams, grams[1:]))


@pytest.mark.parametrize('family', TINY)
@pytest.mark.parametrize('slicing', [False, True])
def test_batches_do_not_matter(family, slicing):
    results = []
    for batch_size in (1, 2, 8 if slicing else 5):
        m, grams = tiny_model(family), []
        for stage in walk(m, tokens(5), batch_size):
            assert [len(x) if x.ndim == 3 else len(x)//12 for x in stage.X] == dict([(1, [1]*5), (2, [2, 2, 1]), (5, [5]), (8, [5])])[batch_size]
            grams.append(stage.gram())
            if slicing: cut(m, stage)
        results.append(grams)
    for other in results[1:]:
        for a, b in zip(results[0], other): close(a, b)


@pytest.mark.parametrize('family', TINY)
def test_what_the_caller_changes_is_seen_later(family):
    m, w = tiny_model(family), tokens()
    walked = {}
    for stage in walk(m, w, batch_size=2):
        cut(m, stage)
        walked[stage.second] = torch.cat([x[..., stage.keep].flatten(0, -2) for x in stage.X])
        if stage.part == 'mlp': m.get_submodule(stage.second).weight.data.mul_(.5)            # a repair that changes weights, too
    for n, x in hooked(m, w.ids).items(): close(walked[n], x, 1e-4)
    assert untouched(m)


@pytest.mark.parametrize('family', TINY)
def test_walking_a_sliced_model_again(family):
    m, w = tiny_model(family), tokens()
    slice_units(m, {c.name: half(c) for c in couplings(m, ('value_channel', 'mlp_channel'))})
    expected = hooked(m, w.ids)
    for stage in walk(m, w, batch_size=3): close(torch.cat([x.flatten(0, -2) for x in stage.X]), expected[stage.second])


@pytest.mark.parametrize('family', TINY)
def test_a_device_is_visited_with_the_same_result(family):
    a, b = tiny_model(family), tiny_model(family)
    for x, y in zip(walk(a, tokens(), 2), walk(b, tokens(), 2, device='cpu')):
        assert torch.equal(x.gram(), y.gram())
        for m, stage in ((a, x), (b, y)): cut(m, stage)
    assert torch.equal(logits(a, tokens().ids), logits(b, tokens().ids))


def test_two_walks_in_step_are_two_walks():
    dense, pruned, w = tiny_model('phi'), tiny_model('phi'), tokens()
    alone = [s.gram() for s in walk(dense, w)]
    def after_cut(stage, m):
        C = stage.gram()
        cut(m, stage)
        return C
    other = tiny_model('phi')
    alone_cut = [after_cut(s, other) for s in walk(other, w)]
    both = [(a.gram(), after_cut(b, pruned)) for a, b in zip(walk(dense, w), walk(pruned, w))]
    assert all(torch.equal(x, y) for (x, _), y in zip(both, alone))
    assert all(torch.equal(x, y) for (_, x), y in zip(both, alone_cut))
    assert torch.equal(both[0][0], both[0][1]) and not torch.equal(both[-1][0][:18, :18], both[-1][1][:18, :18])


@pytest.mark.parametrize('family', TINY)
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_grams_of_low_precision_models_are_float32(family, dtype):
    m = tiny_model(family).to(dtype)
    for stage in walk(m, tokens(5, 40), batch_size=2):
        C, X = stage.gram(), torch.cat([x.flatten(0, -2) for x in stage.X])
        assert X.dtype == dtype and C.dtype == torch.float32
        close(C.double(), X.double().T @ X.double())        # no rounding beyond that of the inputs themselves


@pytest.mark.parametrize('family', TINY)
def test_outputs_are_what_the_second_linear_gives(family):
    m = tiny_model(family)
    for stage in walk(m, tokens(), batch_size=2):
        W, bias = weight_of(m.get_submodule(stage.second)), m.get_submodule(stage.second).bias
        for x, y in zip(stage.X, stage.outputs(m)): close(y, x @ W.T + (0 if bias is None else bias))
        before = [y.detach() for y in stage.outputs(m)]
        cut(m, stage)
        after = stage.outputs(m)
        assert len(after) == 3 and all(a.shape == b.shape and not torch.allclose(a, b) for a, b in zip(after, before))


# ---- nothing is left behind -----------------------------------------------------------------------------------------

@pytest.mark.parametrize('family', TINY)
def test_the_model_works_while_the_caller_does(family):
    m, ids = tiny_model(family), tokens().ids
    expected, flags = logits(m, ids), []
    for stage in walk(m, tokens(), 2):
        assert untouched(m) and torch.equal(logits(m, ids), expected)
        flags.append(torch.is_grad_enabled() and not stage.X[0].requires_grad)
    assert all(flags)                                       # the walk keeps its no_grad to itself


@pytest.mark.parametrize('family', TINY)
@pytest.mark.parametrize('stages', [0, 1, 2, 5])
def test_closing_early_leaves_the_model_alone(family, stages):
    m, ids = tiny_model(family), tokens().ids
    expected, state = logits(m, ids), {n: t.clone() for n, t in m.state_dict().items()}
    w = walk(m, tokens(), 2)
    for _ in range(stages): next(w, None)
    w.close()
    assert untouched(m) and torch.equal(logits(m, ids), expected)
    assert all(torch.equal(t, state[n]) for n, t in m.state_dict().items())


@pytest.mark.parametrize('family', TINY)
def test_an_exception_of_the_caller_leaves_the_model_alone(family):
    m, ids = tiny_model(family), tokens().ids
    expected = logits(m, ids)
    for where in (0, 1, 3):
        with pytest.raises(KeyboardInterrupt):
            for i, _ in enumerate(walk(m, tokens(), 2)):
                if i == where: raise KeyboardInterrupt
        assert untouched(m) and torch.equal(logits(m, ids), expected)


@pytest.mark.parametrize('part', ['self_attn.q_proj', 'self_attn.o_proj', 'mlp.gate_proj', 'mlp.down_proj', 'post_attention_layernorm'])
def test_an_exception_inside_a_block_leaves_the_model_alone(part):
    "Memory may run out anywhere."
    m, ids = tiny_model('llama'), tokens().ids
    expected, module = logits(m, ids), m.model.layers[1].get_submodule(part)
    handle = module.register_forward_pre_hook(lambda *args: (_ for _ in ()).throw(MemoryError('no more')))
    if part in ('self_attn.o_proj', 'mlp.down_proj'):       # a hook sees the stand-in, too
        with pytest.raises(MemoryError): list(walk(m, tokens(), 2))
    else:
        with pytest.raises(MemoryError):
            for _ in walk(m, tokens(), 2): pass
    handle.remove()
    assert untouched(m) and torch.equal(logits(m, ids), expected)


def test_a_block_that_was_sent_away_comes_home_when_the_walk_ends_early():
    m, trips = tiny_model('llama'), []
    layer = m.model.layers[0]
    original = layer.to
    layer.to = lambda device: (trips.append(device), original(device))[1]
    w = walk(m, tokens(), 2, device='cpu')
    next(w)
    w.close()
    assert len(trips) == 2


def test_memory_does_not_grow_with_depth():
    "When a block begins, nothing of the blocks before is held; without the garbage collector's help."
    m, refs = tiny_model('llama', num_hidden_layers=6), []
    gc.collect()
    gc.disable()
    try:
        for stage in walk(m, tokens(), 2):
            alive = {layer for layer, r in refs if r() is not None}
            assert alive <= {stage.layer}, f'in block {stage.layer}, inputs of {alive} are held'
            refs += [(stage.layer, weakref.ref(x)) for x in stage.X]
    finally: gc.enable()


def test_replaced_restores_also_what_was_replaced_before():
    m = tiny_model('llama').lm_head
    m.forward = outer = lambda x: 'outer'
    with pytest.raises(ZeroDivisionError), replaced([(m, lambda x: 'inner')]):
        assert m(1) == 'inner'
        1/0
    assert m.__dict__['forward'] is outer and m(1) == 'outer'
    del m.forward
    with replaced([(m, lambda x: 'inner')]): assert m(1) == 'inner'
    assert 'forward' not in m.__dict__


def test_recording_calls_nothing():
    m = tiny_model('qwen3')
    m.model.layers[1].mlp.register_forward_pre_hook(lambda *a: pytest.fail('a block was computed'))
    x, calls = record_calls(m, tokens(2).ids)
    assert x.shape == (2, 12, 24) and len(calls) == 3
    with torch.no_grad(): close(x, m.model.embed_tokens(tokens(2).ids))


# ---- what is refused ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('family', TINY)
@pytest.mark.parametrize('part', ['attention', 'mlp'])
def test_forgetting_keep_is_a_clear_error(family, part):
    m = tiny_model(family)
    with pytest.raises(ValueError, match=r'was sliced: set stage\.keep'):
        for stage in walk(m, tokens(), 2):
            if stage.part == part:
                cut(m, stage)
                stage.keep = None
    assert untouched(m) and logits(m, tokens().ids).isfinite().all()


@pytest.mark.parametrize('family', TINY)
def test_windows_that_the_model_cannot_read(family):
    m = tiny_model(family)
    for ids, message in [(torch.zeros(1, 65, dtype=int), '65 tokens are longer than the 64 positions'), (torch.full((1, 9), 97), 'id 97 is outside the vocabulary of 97')]:
        with pytest.raises(ValueError, match=message): next(walk(m, Windows(ids, 'wrong')))
    next(walk(m, Windows(torch.full((1, 64), 96), 'just right')))
    with pytest.raises(ValueError, match='non-empty'): Windows(torch.zeros(0, 9, dtype=int), 'none')


def test_negative_token_ids():
    "-100 marks what is not to be learnt in labels; it is no token."
    with pytest.raises(ValueError, match='outside the vocabulary'): Windows(torch.full((2, 9), -100), 'labels').check(tiny_model('llama'))


def test_training_mode_is_refused():
    m = tiny_model('opt').train()
    with pytest.raises(ValueError, match=r'model\.eval\(\)'): next(walk(m, tokens()))
    assert m.training


# ---- Gram matrices --------------------------------------------------------------------------------------------------

@given(st.integers(1, 30), st.lists(st.tuples(st.integers(1, 4), st.integers(1, 9)), min_size=1, max_size=4), st.integers(1, 40), st.integers(0, 99))
def test_gram_is_the_product(columns, shapes, blocks, seed):
    gen = torch.Generator().manual_seed(seed)
    X = [torch.randn(*s, columns, generator=gen) for s in shapes]
    C, flat = gram(X, blocks), torch.cat([x.flatten(0, 1) for x in X]).double()
    assert C.dtype == torch.float32 and torch.equal(C, C.T)
    assert (C - flat.T @ flat).abs().max() <= 1e-5*(flat.T @ flat).abs().max()


def test_gram_needs_no_batch_dimension_and_keeps_its_inputs():
    X = [torch.randn(7, 5), torch.randn(3, 5)]
    old = copy.deepcopy(X)
    close(gram(X), torch.cat(X).T @ torch.cat(X))
    assert all(torch.equal(a, b) for a, b in zip(X, old))

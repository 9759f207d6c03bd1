"""Models of 7 and 30 billion parameters on a pretended card that holds shapes alone: bytes that are alive, and seconds by a roofline.

The card is an A6000. Two blocks stand for all: what lives beside the weights does not depend on how many come after. Only the probes of the recipe do,
and what the others of 32 blocks add is added here. Text: 128 windows of 2048 tokens; weights and states in bfloat16."""
import functools

import pytest
import torch
from fake_gpu import FakeGPU
from transformers import LlamaConfig, LlamaForCausalLM

from prunebook.estimate import estimate
from prunebook.methods import Run, configured
from prunebook.sources import InMemory
from prunebook.stream import Context
from prunebook.text import Windows

pytestmark = [pytest.mark.usefixtures('one_thread'), pytest.mark.filterwarnings('ignore')]
GIB, BLOCKS, WINDOWS, SEQLEN = 2**30, 2, 128, 2048
SHAPES = {'7b': dict(hidden_size=4096, intermediate_size=11008, num_attention_heads=32, vocab_size=32000),
          '30b': dict(hidden_size=6656, intermediate_size=17920, num_attention_heads=52, vocab_size=32000)}
VALUES = dict(units=('value_channel', 'mlp_channel'))


def shape(name):
    "The first blocks of a model, without numbers."
    config = LlamaConfig(**SHAPES[name], num_hidden_layers=BLOCKS, max_position_embeddings=4096)
    with torch.device('meta'): return LlamaForCausalLM(config).to(torch.bfloat16).eval()


def text(): return Windows(torch.randint(0, 32000, (WINDOWS, SEQLEN), generator=torch.Generator().manual_seed(0)), 'random')


class MadeWhenOpened(InMemory):
    "Blocks whose weights are on the card only while they are open."
    def __init__(self, model, gpu):
        super().__init__(model)
        self.gpu = gpu

    def open(self, block): return self.gpu.place(self.model.get_submodule(block.name))

    def close(self, block, finished=True):
        for m in self.model.get_submodule(block.name).modules():
            for n, p in list(m.named_parameters(recurse=False)): setattr(m, n, torch.nn.Parameter(torch.empty(p.shape, dtype=p.dtype, device='meta')))


def prune(gpu, source, method, settings):
    with torch.no_grad(): configured(method, settings).run(Context(source, text(), .2, Run()))


@functools.cache
def dense_seconds(name):
    "Of one forward pass through the blocks."
    with FakeGPU(dry=True) as gpu, torch.no_grad():
        model = gpu.place(shape(name))
        gpu.begin()
        for ids in text().batches(8): model.base_model(ids.to('gpu:0'), use_cache=False)
        return sum(gpu.seconds().values())


def measured(name, method, settings):
    "GiB beside the weights, and seconds in dense forward passes; says what held the bytes."
    passes = dense_seconds(name)
    with FakeGPU(dry=True) as gpu:
        model, weights = gpu.place(shape(name)), gpu.alive['gpu:0']
        gpu.begin()
        prune(gpu, InMemory(model), method, settings)
        gib, passes = (gpu.peak['gpu:0'] - weights)/GIB, sum(gpu.seconds().values())/passes
        held = ', '.join(f'{line} {n/GIB:.1f}' for line, n in gpu.held().most_common(8))
    said = (estimate(shape(name), configured(method, settings), WINDOWS*SEQLEN, .2, Run(), SEQLEN, inplace=True)['bytes'] - weights)/GIB
    print(f'{method} at {name}: {gib:.2f} GiB, {said:.2f} estimated, {passes:.2f} passes; {held}')
    assert 1/1.1 < said/gib < 1.1
    return gib, passes


@pytest.mark.parametrize('settings', [{}, VALUES], ids=['mlp', 'values'])
def test_fasp_at_7b(settings):
    gib, passes = measured('7b', 'fasp', settings)
    assert gib <= 12 and passes <= 2.5


def test_recipe_at_7b():
    "With 32 blocks, 180 more probes ride along: 4 windows of 256 tokens each, through 16.5 blocks on average."
    gib, passes = measured('7b', 'recipe', {})
    states, blocks = 6*(32 - BLOCKS)*4*256*4096*2/GIB, 6*(32*16.5)*4*256/(32*WINDOWS*SEQLEN)
    assert gib <= 16 and passes + blocks <= 7 and states < 1.5
    look, _ = measured('7b', 'recipe', dict(trust=0.))     # one trajectory, as while the probes are measured
    assert look + states <= 16


def test_bonsai_at_7b():
    gib, _ = measured('7b', 'bonsai', dict(evaluations=8))
    assert gib <= 18


def test_fasp_at_30b_with_one_block_at_a_time():
    "All that is on the card, the open block and the embedding included."
    with FakeGPU(dry=True) as gpu:
        model = shape('30b')
        for part in (model.model.embed_tokens, model.model.norm, model.model.rotary_emb): gpu.place(part)
        gpu.begin()
        prune(gpu, MadeWhenOpened(model, gpu), 'fasp', {})
        print(f'{gpu.peak["gpu:0"]/GIB:.2f} GiB', gpu.held().most_common(8))
        assert gpu.peak['gpu:0'] <= 20*GIB


# ---- what makes these figures small, one by one: no copy of what is there already ---------------------------------------

def test_the_dry_card_counts():
    with FakeGPU(dry=True) as gpu:
        x, y = torch.empty(1000, 500, device='gpu:0'), torch.empty(500, 100, device='gpu:0', dtype=torch.float64).float()
        gpu.begin()
        z = x @ y
        assert gpu.flops() == {'f32': 2*1000*500*100} and gpu.alive['gpu:0'] == 4*(1000*500 + 500*100 + 1000*100)
        torch.linalg.cholesky_ex(torch.empty(90, 90, device='gpu:0', dtype=torch.float64))
        assert gpu.flops()['f64'] == 90**3/3
        assert z.cpu().shape == (1000, 100) and torch.arange(5, device='gpu:0').tolist() == [0, 1, 2, 3, 4]  # indices are real
        with pytest.raises(RuntimeError, match='same device'): z + torch.ones(1000, 100)
        slow = gpu.seconds()['solver', 'f64']
        assert slow > 90**3/3/(.605e12*.4)


def test_products_of_16_bits_run_in_tf32_and_no_others():
    from prunebook.stream import cross_gram
    from prunebook.walk import gram
    for dtype, how in ((torch.bfloat16, 'tf32'), (torch.float16, 'tf32'), (torch.float32, 'f32')):
        with FakeGPU(dry=True) as gpu:
            X = [torch.empty(4, 64, 512, dtype=dtype, device='gpu:0')]
            gpu.begin()
            gram(X), cross_gram(X, X)
            assert set(k for k, n in gpu.flops().items() if n) == {how}
    assert torch.backends.cuda.matmul.allow_tf32 is False
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = 'tf32'     # what the user chose stays
    try:
        gram([torch.ones(2, 3, dtype=torch.bfloat16)])
        assert torch.backends.cuda.matmul.fp32_precision == 'tf32'
    finally: torch.backends.cuda.matmul.fp32_precision = before


def peak_of(run):
    "Bytes beside what was there."
    with FakeGPU(dry=True) as gpu:
        given = run.__defaults__[0](lambda *shape, dtype=torch.bfloat16: torch.empty(*shape, dtype=dtype, device='gpu:0'))
        before = gpu.alive['gpu:0']
        gpu.begin()
        run(*given)
        return gpu.peak['gpu:0'] - before


TOKENS, F, D = 8192, 4096, 1024


def test_a_gram_matrix_is_one_matrix_and_parts_of_a_batch():
    from prunebook.walk import gram
    def run(X=lambda empty: ([empty(8, 1024, F) for _ in range(4)],)): gram(X)
    assert peak_of(run) <= 4*F*F + 4*TOKENS*(F/4 + 1024) + 4*F/4*1024


def test_products_with_targets_copy_no_inputs():
    from prunebook.stream import cross_gram
    def run(X=lambda empty: ([empty(8, 1024, F) for _ in range(4)], [empty(8, 1024, D) for _ in range(4)]), Y=None): cross_gram(X, Y)
    assert peak_of(run) <= 3*4*F*D + 4*TOKENS*(D + 1024)


def test_bonsais_prior_copies_one_batch():
    from prunebook.bonsai import _unit_prior
    for prior in ('output', 'wanda', 'magnitude'):
        def run(W=lambda empty: (empty(D, F), [empty(8, 1024, F) for _ in range(8)]), X=None): _unit_prior(prior, W, X, torch.arange(F)[:, None])
        assert peak_of(run) <= 2*4*TOKENS*F + 3*4*D*F


def test_targets_and_drift_are_folded_in_place():
    from prunebook.walk import _sums
    def run(X=lambda empty: ([empty(8, 1024, D) for _ in range(4)], [empty(8, 1024, D) for _ in range(4)]), Y=None): _sums(_sums(X, Y, 1, True), Y, -1, True)
    assert peak_of(run) == 0


def test_a_fit_towards_targets_copies_no_inputs_and_needs_no_float64():
    from types import SimpleNamespace
    from prunebook.repair import Ridge
    from prunebook.stream import Visit
    from prunebook.walk import Stage
    with FakeGPU(dry=True) as gpu:
        linear = gpu.place(torch.nn.Linear(F, D, bias=False, dtype=torch.bfloat16, device='meta'))
        model = SimpleNamespace(get_submodule=lambda name: linear)
        X = [torch.empty(8, 1024, F, dtype=torch.bfloat16, device='gpu:0') for _ in range(4)]
        Y = [torch.empty(8, 1024, D, dtype=torch.bfloat16, device='gpu:0') for _ in range(4)]
        v = Visit(SimpleNamespace(model=model), None, Stage(None, 'mlp', 'second', X), Y)
        v.gram
        before = gpu.alive['gpu:0']
        gpu.begin()
        m = 3000
        v.aimed(torch.arange(m), Ridge(.01), .5)
        assert gpu.peak['gpu:0'] - before <= 4*(m*F + 2*F*D + 2*m*m + 6*m*D) + 4*TOKENS*(D + 1024)
        assert not gpu.flops()['f64']

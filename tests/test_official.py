"""The same numbers as the authors' code: `scripts/official_fixtures.py` ran it on the tiny problems of this file, each at a named commit."""
import json
from pathlib import Path

import pytest
import torch
from prunebook.couplings import couplings
from prunebook.curvature import Factors
from prunebook.repair import Ridge
from prunebook.elements import _kept_of_shot, _remove_in_chunks, element_costs, sparsegpt
from prunebook.heads import _js_sums, removal_order
from prunebook.methods import configured
from prunebook.models import decoder_linears, n_parameters
from prunebook.plan import keep_after
from prunebook.pruning import prune
from prunebook.scores import _lost_mean, _scores_of_whole_blocks, running_moments, wanda_mask
from prunebook.sources import InMemory
from prunebook.stream import Context
from prunebook.structures import _structured_threshold, living_inverses, remove_structures, row_costs
from prunebook.text import Windows
from transformers import LlamaConfig, LlamaForCausalLM

pytestmark = pytest.mark.usefixtures('one_thread')
FIXTURE = Path(__file__).parent/'fixtures'/'official.json'


def official(name): return json.loads(FIXTURE.read_text(encoding='utf-8'))[name]
def draw(seed): return torch.Generator().manual_seed(seed)
def close(ours, theirs, tolerance=1e-4): return torch.allclose(ours.double(), torch.tensor(theirs).double(), rtol=tolerance, atol=tolerance*torch.tensor(theirs).abs().max().item())


# ---- the problems; the script imports these -------------------------------------------------------------------------

def flap_model():
    "Heads of 128, as the code of FLAP has them; weights large enough that units differ."
    config = LlamaConfig(vocab_size=97, hidden_size=24, intermediate_size=48, num_hidden_layers=3, num_attention_heads=3, num_key_value_heads=3, head_dim=128)
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    for p in model.parameters(): p.data.mul_(1 + torch.rand(p.shape, generator=draw(p.numel()))*4).requires_grad_(False)
    return model


def flap_windows(): return Windows(torch.randint(3, 97, (6, 16), generator=draw(1)), 'random')


def layer_inputs():
    "A weight, and three batches of correlated inputs."
    W, mix = torch.randn(6, 40, generator=draw(2)), torch.randn(40, 40, generator=draw(3))
    return W, [torch.randn(2, 30, 40, generator=draw(4 + i)) @ mix/6 for i in range(3)]


def factors(rows=12, columns=16):
    "A weight and the factors of its inputs and of its gradients."
    factor = lambda n, seed: (lambda X: X.T @ X/len(X))(torch.randn(3*n, n, generator=draw(seed)) @ torch.randn(n, n, generator=draw(seed + 1)))
    return torch.randn(rows, columns, generator=draw(10)), factor(columns, 11), factor(rows, 13)


def attention_maps(): return torch.randn(3, 6, 9, 9, generator=draw(20)).mul(.6).softmax(-1)


# ---- FLAP -----------------------------------------------------------------------------------------------------------

def test_flap_keeps_what_the_official_code_keeps():
    theirs, m = official('flap'), flap_model()
    _, plan = prune(m, flap_windows(), configured('flap', {}, 'published'), .3)
    scores = {n: torch.tensor(s) for n, s in plan.scores.items()}
    kept = {f'{l}.{kind}': torch.tensor(mask).bool() for kind, masks in (('kv_group', theirs['heads']), ('mlp_channel', theirs['channels'])) for l, mask in enumerate(masks)}
    stay, gone = (torch.cat([scores[n][k if keep else ~k] for n, k in kept.items()]) for keep in (True, False))
    assert len(gone) > 20 and stay.min() > gone.max()       # one threshold on our scores gives their masks
    exact = prune(m, flap_windows(), configured('flap', dict(variance='exact'), 'published'), .3)[1].scores
    assert any(exact[n] != plan.scores[n] for n in exact)


def test_flap_makes_up_for_the_same_means():
    theirs, m = official('flap'), flap_model()
    ctx = Context(InMemory(m), flap_windows(), .3, table=couplings(m, ('kv_group', 'mlp_channel')))
    for v in ctx.look():
        means = theirs['attention_means' if v.part == 'attention' else 'mlp_means'][v.layer]
        mean, _ = running_moments(v.X)
        assert close(mean, means, 2e-3)                     # theirs are float16
        keep = torch.arange(0, v.weight.shape[1], 2)
        bias = v.weight[:, 1::2] @ torch.tensor(means)[1::2]
        assert torch.allclose(_lost_mean(v.weight, keep, mean).float(), bias, atol=2e-3*bias.abs().max())


def test_wanda_sp_measures_whole_blocks():
    theirs, m = official('wanda_sp'), flap_model()
    table = couplings(m, ('kv_group', 'mlp_channel'))
    ctx = Context(InMemory(m), flap_windows(), .3, table=table, total=n_parameters(decoder_linears(m).values()))
    steps = {c.name: 1 if c.part == 'attention' else 24 for c in table}       # their share of one half, rounded down
    scores = _scores_of_whole_blocks(ctx, steps)
    for c in table:
        mask = theirs['heads' if c.part == 'attention' else 'channels'][c.layer]
        assert keep_after(c, scores[c.name], steps[c.name]) == [i for i, k in enumerate(mask) if k], c.name


# ---- single weights -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('share', ['0.5', '0.37'])
def test_wanda_masks(share):
    W, X = layer_inputs()
    norms = sum(x.pow(2).sum((0, 1)) for x in X).sqrt()
    assert wanda_mask(W, norms, float(share), rounding='down').int().tolist() == official('wanda')[share]
    if share == '0.37': assert wanda_mask(W, norms, float(share)).sum() < torch.tensor(official('wanda')[share]).sum()


@pytest.mark.parametrize('name,pattern', [('0.5', dict(sparsity=.5)), ('2of4', dict(n=2, m=4))])
def test_sparsegpt_weights(name, pattern):
    W, X = layer_inputs()
    A = sum(x.flatten(0, 1).T @ x.flatten(0, 1) for x in X)
    ours, theirs = sparsegpt(W, A, **pattern, block=16), torch.tensor(official('sparsegpt')[name])
    assert torch.equal(ours == 0, theirs == 0) and close(ours, theirs.tolist(), 1e-3)


# ---- LLM Surgeon ----------------------------------------------------------------------------------------------------

def test_surgeon_costs_threshold_and_weights():
    theirs, (W, A, G) = official('surgeon'), factors()
    rows, columns = row_costs(W, A, Ridge(.01).inverse(G)), row_costs(W.T, G, Ridge(.01).inverse(A))
    assert close(rows, theirs['rows']) and close(columns, theirs['columns'])
    r, c = _structured_threshold(dict(a=(rows, columns)), dict(a=W.shape), .3*W.numel(), below=True)['a']
    assert sorted(r.tolist()) == theirs['gone_rows'] and sorted(c.tolist()) == theirs['gone_columns'] and len(r) and len(c)
    inverses = living_inverses(W, Factors(A, G), .01)
    assert close(remove_structures(W, inverses, r, c, joint='sum'), theirs['structured'], 1e-3)
    assert not close(remove_structures(W, inverses, r, c), theirs['structured'], 1e-3)


@pytest.mark.parametrize('size', [15, 40])
def test_surgeon_single_weights_in_chunks_of_whole_rows(size):
    theirs, (W, A, G) = official('surgeon'), factors()
    assert close(element_costs(W, A, G, .01, .1), theirs['elements'])
    keep = ~torch.tensor(theirs['gone_elements']).bool()
    assert close(_remove_in_chunks(W, A, G, keep, size), theirs[f'chunks_{size}'], 1e-3)


def test_surgeon_two_of_four():
    theirs, (W, A, G) = torch.tensor(official('surgeon')['2of4']).bool(), factors()
    costs = dict(a=element_costs(W, A, G, .01, .1).float())
    keep = _kept_of_shot(costs, int(theirs.sum()), 2, 4, whole_groups=True)['a']
    assert torch.equal(~keep, theirs) and 0 < theirs.sum() < W.numel()/2
    assert not torch.equal(~_kept_of_shot(costs, int(theirs.sum()), 2, 4)['a'], theirs)


# ---- greedy output approximation ------------------------------------------------------------------------------------

def test_depth2_distances_and_heads():
    theirs, P = official('depth2'), attention_maps()
    D = _js_sums(P, 'code')/(P.shape[0]*P.shape[2])
    assert close(D, theirs['distances'], 1e-3)
    assert not close(_js_sums(P)/(P.shape[0]*P.shape[2]), theirs['distances'], 1e-2)

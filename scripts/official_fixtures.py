"""Run official implementations on tiny random models, and keep what they found as numbers, for tests/test_official.py.

    git clone https://github.com/CASIA-IVA-Lab/FLAP && git -C FLAP checkout 3bb57db3449dd2fa04a5c2192de80e87e33be2b1
    git clone https://github.com/locuslab/wanda && git -C wanda checkout 8e8fc87b4a2f9955baa7e76e64d5fce7fa8724a6
    git clone https://github.com/IST-DASLab/sparsegpt && git -C sparsegpt checkout 147d2159dc4f3e9f73e47b32c04d7b3708f44436
    git clone https://github.com/Qualcomm-AI-research/llm-surgeon && git -C llm-surgeon checkout 726734425b6866782048877bac0c0d90e8cb36b3
    git clone https://github.com/mexiQQ/LLM-Trim && git -C LLM-Trim checkout 24c660a205a62d50c4026006a050c039ec6baa88
    python scripts/official_fixtures.py FOLDER      # the folder that holds the clones

Nothing of that code is part of this project: it is imported from the clones, or, where a script cannot be imported, one of its functions is
taken from it and run. A function that wants a GPU gets the CPU instead.
"""
import ast
import contextlib
import io
import json
import sys
import types
from pathlib import Path
from unittest import mock

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent/'tests'))

OUT = Path(__file__).parent.parent/'tests'/'fixtures'/'official.json'
COMMITS = {'FLAP': '3bb57db3449dd2fa04a5c2192de80e87e33be2b1', 'wanda': '8e8fc87b4a2f9955baa7e76e64d5fce7fa8724a6',
           'sparsegpt': '147d2159dc4f3e9f73e47b32c04d7b3708f44436', 'llm-surgeon': '726734425b6866782048877bac0c0d90e8cb36b3',
           'LLM-Trim': '24c660a205a62d50c4026006a050c039ec6baa88'}


@contextlib.contextmanager
def importable(folder, *stubs):
    "Modules of a clone can be imported; modules that only its scripts need are empty; a GPU is the CPU."
    before, path = {*sys.modules}, list(sys.path)
    sys.path.insert(0, str(folder))
    for n in stubs: sys.modules[n] = mock.MagicMock()
    cpu = mock.patch.multiple(torch.Tensor, cuda=lambda self, *a, **k: self), mock.patch('torch.cuda.synchronize')
    with cpu[0], cpu[1], contextlib.redirect_stdout(io.StringIO()):
        yield
    sys.path[:] = path
    for n in {*sys.modules} - before: del sys.modules[n]


def functions_of(path, *names):
    "Some functions of a script, without running it."
    tree = ast.parse(Path(path).read_text(encoding='utf-8'))
    tree.body = [x for x in tree.body if isinstance(x, ast.FunctionDef) and x.name in names]
    space = dict(torch=torch)
    exec(compile(tree, str(path), 'exec'), space)
    return [space[n] for n in names]


def plain(t): return t.tolist() if isinstance(t, torch.Tensor) else t


def flap(folder):
    "`BiasGPT` and the threshold over all layers, on a tiny LLaMA with heads of 128."
    from test_official import flap_model, flap_windows
    model, windows = flap_model(), flap_windows()
    with importable(folder, 'datasets'):
        from lib import prune as official
        found = {}
        def compress(layer, attn_mask, mlp_mask, attn_mean, mlp_mean, device, bias=True, unstr=False):
            for name, t in dict(heads=attn_mask, attention_means=attn_mean, channels=mlp_mask, mlp_means=mlp_mean).items():
                if t is not None: found.setdefault(name, []).append(t)
        args = types.SimpleNamespace(nsamples=len(windows.ids), seed=0, metrics='WIFV', structure='AL-AM', pruning_ratio=.3, unstr=False, remove_heads=-1)
        inputs = hidden_states(model, windows)
        with mock.patch.object(official, 'get_loaders', lambda *a, **k: (None, None)), \
             mock.patch.object(official, 'compress', compress), \
             mock.patch.object(official, 'prepare_calibration_input', lambda *a: inputs):
            model.seqlen = windows.seqlen
            with rotary_inside(model): official.prune_flap(args, model, None, 'cpu')
    return {k: [plain(t.float() if t.is_floating_point() else t.int()) for t in v] for k, v in found.items()}


def hidden_states(model, windows):
    "What their scripts catch before the first block: inputs, room for outputs, mask and positions."
    x = model.model.embed_tokens(windows.ids).detach()
    n = windows.seqlen
    mask = torch.full((n, n), torch.finfo(x.dtype).min).triu(1)[None, None]
    return x.clone(), torch.zeros_like(x), mask, torch.arange(n)[None]


@contextlib.contextmanager
def rotary_inside(model):
    "Blocks take `position_ids` as they did in older versions of transformers, and return a tuple."
    layers = model.model.layers
    def older(forward):
        def f(x, attention_mask=None, position_ids=None):
            return (forward(x, attention_mask=attention_mask, position_embeddings=model.model.rotary_emb(x, position_ids)),)
        return f
    saved = [l.forward for l in layers]
    for l in layers: l.forward = older(l.forward)
    try: yield
    finally:
        for l, f in zip(layers, saved): l.forward = f


def wanda_sp(folder):
    "The structured Wanda in the code of FLAP, on the same model."
    from test_official import flap_model, flap_windows
    model, windows = flap_model(), flap_windows()
    with importable(folder, 'datasets'):
        from lib import prune as official
        found = dict(heads=[], channels=[])
        real = official.compress
        def compress(layer, attn_mask, mlp_mask, *rest, **kw):
            if attn_mask is not None: found['heads'].append(plain(attn_mask.int()))
            if mlp_mask is not None: found['channels'].append(plain(mlp_mask.int()))
            return real(layer, attn_mask, mlp_mask, *rest, **{**kw, 'unstr': True})
        args = types.SimpleNamespace(nsamples=len(windows.ids), seed=0, pruning_ratio=.5, unstr=True)
        inputs = hidden_states(model, windows)
        for l in model.model.layers: l.self_attn.num_heads = model.config.num_attention_heads
        with mock.patch.object(official, 'get_loaders', lambda *a, **k: (None, None)), \
             mock.patch.object(official, 'compress', compress), \
             mock.patch.object(official, 'prepare_calibration_input', lambda *a: inputs):
            model.seqlen = windows.seqlen
            with rotary_inside(model): official.prune_wanda_sp(args, model, None, 'cpu')
    return found


def wanda(folder):
    "Masks of single weights by `prune_wanda`, at a share that does not divide the row, and 2 of 4."
    from test_official import layer_inputs
    W, X = layer_inputs()
    found = {}
    with importable(folder, 'datasets'):
        from lib.layerwrapper import WrappedGPT
        layer = nn.Linear(*W.shape[::-1], bias=False)
        layer.weight.data.copy_(W)
        wrapped = WrappedGPT(layer)
        for x in X: wrapped.add_batch(x, layer(x))
        metric = W.abs()*wrapped.scaler_row.sqrt()
        for share in (.5, .37):                            # as in `prune_wanda`: the first int(columns*share) of a stable sort
            gone = metric.sort(dim=-1, stable=True)[1][:, :int(W.shape[1]*share)]
            found[str(share)] = plain(torch.ones_like(W).scatter_(1, gone, 0).int())
    return found


def sparsegpt(folder):
    "Weights after `fasterprune`."
    from test_official import layer_inputs
    W, X = layer_inputs()
    found = {}
    with importable(folder, 'quant'):
        from sparsegpt import SparseGPT
        for name, pattern in {'0.5': dict(sparsity=.5), '2of4': dict(sparsity=0, prunen=2, prunem=4)}.items():
            layer = nn.Linear(*W.shape[::-1], bias=False)
            layer.weight.data.copy_(W)
            g = SparseGPT(layer)
            for x in X: g.add_batch(x, layer(x))
            g.fasterprune(**pattern, blocksize=16, percdamp=.01)
            found[name] = plain(layer.weight.data)
    return found


def surgeon(folder):
    "Costs and weights of one matrix with given factors: rows and columns, and single weights in chunks."
    from test_official import factors
    W, A, G = factors()
    found = {}
    with importable(folder, 'pynvml', 'psutil'):
        from curvature import KFAC
        from pruner import Pruner
        from threshold import semistructured_threshold, structured_threshold
        from utils import inv
        kfac = KFAC.__new__(KFAC)
        kfac.krank = 1
        def pruner():
            layer = nn.Linear(*W.shape[::-1], bias=False)
            layer.weight.data.copy_(W)
            return Pruner(layer, dict(A_mat_0=A.clone(), G_mat_0=G.clone()))
        def costs(structure, damp_g=.01):
            p = pruner()
            w, g, a, diagonal, _, _ = p.WGA()
            return p.local_costs(w, g, a, diagonal, structure, kfac, False, False, False, damp_g, .01,
                                 Ginv=[inv(x, damp_g) for x in g], Ainv=[inv(x, .01) for x in a])
        rows, columns = costs('row'), costs('column')
        found['rows'], found['columns'] = plain(rows), plain(columns)
        dead = torch.zeros(len(W), dtype=bool), torch.zeros(W.shape[1], dtype=bool)
        tau = structured_threshold(dict(a=dict(losses=(rows, columns), dead=dead, full_W_shape=W.shape)), .3)
        found['gone_rows'], found['gone_columns'] = plain((rows <= tau).nonzero()[:, 0]), plain((columns <= tau).nonzero()[:, 0])
        p = pruner()
        common = dict(curvature=kfac, obd=False, update_scale=1., Ginv=None, Ainv=None, use_diagonal=False, damp_a=.01,
                      zerofix=False, strictmax=False)
        p.weight_update(['row', 'column'], global_threshold=tau, max_correlate=0, losses=(rows, columns), addupdate=False, damp_g=.01, **common)
        found['structured'] = plain(p.layer.weight.data)
        element = costs('element', .1)
        found['elements'] = plain(element)
        tau = element.flatten().sort()[0][W.numel()//2].item()
        found['gone_elements'] = plain((element <= tau).int())
        inverses = dict(Ginv=[inv(G, .1)], Ainv=[inv(A, .01)])
        for size in (15, 40):
            p = pruner()
            p.weight_update(['element'], global_threshold=tau, max_correlate=size, losses=element, addupdate=True, damp_g=.1, **{**common, **inverses})
            found[f'chunks_{size}'] = plain(p.layer.weight.data)
        found['2of4'] = two_of_four(Pruner, kfac, semistructured_threshold, element)
    return found


def two_of_four(Pruner, kfac, threshold, costs):
    "What leaves in 2 of 4 at a quarter of the weights; with a bias, which that branch of their code takes for granted."
    dead = torch.zeros(len(costs), dtype=bool), torch.zeros(costs.shape[1] + 1, dtype=bool)
    costs = torch.cat([costs, costs.new_full((len(costs), 1), 1e9)], 1)
    tau = threshold(dict(a=dict(losses=costs, dead=dead, full_W_shape=costs.shape, has_bias=True)), .25)
    layer = nn.Linear(costs.shape[1] - 1, len(costs))
    for p in layer.parameters(): p.data.fill_(1)
    p = Pruner(layer, dict(A_mat_0=torch.eye(costs.shape[1]), G_mat_0=torch.eye(len(costs))))
    p.weight_update(['2:4'], kfac, True, tau, 1., 0, costs, None, None, False, False, .1, .01, False, False)
    return plain((layer.weight.data == 0).int())


def depth2(folder):
    "Distances of heads, by the functions of the parallel script."
    from test_official import attention_maps
    script = Path(folder)/'hf_prune_llama_layerwise_parallel.py'
    pairwise = functions_of(script, 'kl_divergence', 'js_divergence', 'pairwise_js_divergence')[2]
    return dict(distances=plain(pairwise(attention_maps())))


PARTS = dict(flap=(flap, 'FLAP'), wanda_sp=(wanda_sp, 'FLAP'), wanda=(wanda, 'wanda'), sparsegpt=(sparsegpt, 'sparsegpt'),
             surgeon=(surgeon, 'llm-surgeon'), depth2=(depth2, 'LLM-Trim'))

if __name__ == '__main__':
    root = Path(sys.argv[1])
    made = {name: dict(commit=f'{repo}@{COMMITS[repo]}', **f(root/repo)) for name, (f, repo) in PARTS.items()}
    rounded = json.loads(json.dumps(made), parse_float=lambda x: float(f'{float(x):.7g}'))
    OUT.write_text(json.dumps(rounded) + '\n', encoding='utf-8')
    print(OUT, {k: len(json.dumps(v)) for k, v in rounded.items()})

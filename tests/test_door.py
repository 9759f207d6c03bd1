"""What every method refuses before any work, what none of them sorts, and what all of them prune as worth nothing."""
import copy
import inspect
import json
import math
import warnings

import pytest
import torch
from helpers import tiny_model
from prunebook import repair
from prunebook.bonsai import Bonsai
from prunebook.couplings import anatomy, couplings, weight_of
from prunebook.depth2 import Depth2
from prunebook.fasp import FASP
from prunebook.methods import METHODS, MODULES, Method, Run, as_method, check_prunable, configured
from prunebook.pruning import prune
from prunebook.models import TINY, decoder_linears
from prunebook.plan import PrunePlan
from prunebook.recipe import Recipe
from prunebook.scores import FLAP, Taylor, sparsify
from prunebook.progress import _load_state
from prunebook.surgeon import Surgeon
from prunebook.text import Windows
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

pytestmark = pytest.mark.usefixtures('one_thread')
FAMILIES = ('llama', 'gpt2', 'opt')
QUICK = dict(bonsai=dict(evaluations=8, seqlen=16), surgeon=dict(shots=2, rounds=1), recipe=dict(shares=(.25, .75)))   # settings under which a method is a matter of a second

def windows(n=8, seqlen=24): return Windows(torch.randint(3, 97, (n, seqlen), generator=torch.Generator().manual_seed(0)), 'random')
def quick(name, **settings): return configured(name, {**QUICK.get(name, {}), **settings})
def snapshot(m): return {n: t.clone() for n, t in m.state_dict().items()}
def unchanged(m, state): return all(torch.equal(t, state[n]) for n, t in m.state_dict().items())
@torch.no_grad()
def logits(m): return m(windows(2, 16).ids).logits


# ---- models -----------------------------------------------------------------------------------------------------------

class Linear4bit(nn.Linear):
    "Like that of bitsandbytes: two weights a byte, in one column."
    def __init__(self, old):
        super().__init__(old.in_features, old.out_features, False)
        self.weight = nn.Parameter(torch.zeros((old.weight.numel() + 1)//2, 1, dtype=torch.uint8), requires_grad=False)


class QuantLinear(nn.Module):
    "Like those of other libraries: no linear layer at all."
    def __init__(self, old):
        super().__init__()
        self.register_buffer('qweight', torch.zeros(old.out_features//8, old.in_features, dtype=torch.int32))


def replaced(m, make):
    for n, l in decoder_linears(m).items(): m.set_submodule(n, make(l))
    return m

def eight_bit(m):
    for l in decoder_linears(m).values(): l.weight = nn.Parameter(l.weight.data.to(torch.int8), requires_grad=False)
    return m

def adapted(m):
    peft = pytest.importorskip('peft')
    return peft.get_peft_model(m, peft.LoraConfig(r=2, target_modules=['q_proj', 'v_proj'])).eval()

def adapted_inside(m):
    "Adapters injected into the model itself, which keeps its class."
    peft = pytest.importorskip('peft')
    return peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=['up_proj']), m).eval()

def offloaded(m):
    accelerate = pytest.importorskip('accelerate')
    return accelerate.cpu_offload(m, execution_device='cpu')

def compiled_inside(m):
    m.model.layers[1] = torch.compile(m.model.layers[1])
    return m

KINDS = dict(adapters=(adapted, 'merge_and_unload'), adapters_inside=(adapted_inside, 'merge_and_unload'), four_bit=(lambda m: replaced(m, Linear4bit), 'is quantized .*bfloat16'),
             eight_bit=(eight_bit, 'is quantized .*bfloat16'), float8=(lambda m: m.to(torch.float8_e4m3fn), 'is quantized .*bfloat16'), no_linears=(lambda m: replaced(m, QuantLinear), 'is quantized'),
             offloaded=(offloaded, 'load it whole on the CPU'), meta=(lambda m: m.to('meta'), 'load it whole on the CPU'), compiled=(torch.compile, '_orig_mod'), compiled_inside=(compiled_inside, '_orig_mod'),
             wrapped=(nn.DataParallel, 'model.module'), training=(lambda m: m.train(), r'model.eval\(\)'), a_name=(lambda m: 'gpt2', 'load it first'), bare=(lambda m: nn.Linear(2, 2), 'AutoModelForCausalLM'))

@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.fault('The model has adapters, is quantized, offloaded, compiled or wrapped', 'Refused by every method before any work, with what to do: merge, load in bfloat16, load whole, unwrap.')
def test_what_is_no_plain_model_is_one_sentence_for_every_method(kind):
    make, remedy = KINDS[kind]
    m = make(tiny_model('llama', attention_bias=False, mlp_bias=False))
    for name in MODULES:
        with pytest.raises(ValueError, match=remedy) as e: prune(m, windows(), name, .2, inplace=True)
        assert '\n' not in str(e.value) and len(str(e.value)) < 250


def test_encoders_and_decoders_together_are_refused():
    from transformers import BertConfig, BertForMaskedLM, T5Config, T5ForConditionalGeneration
    t5 = T5ForConditionalGeneration(T5Config(vocab_size=97, d_model=16, d_kv=4, d_ff=32, num_layers=2, num_heads=4)).eval()
    bert = BertForMaskedLM(BertConfig(vocab_size=97, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=32)).eval()
    with pytest.raises(ValueError, match='only decoders are pruned'): prune(t5, windows())
    with pytest.raises(ValueError, match="No adapter for model type 'bert'"): prune(bert, windows())


@pytest.mark.parametrize('family', TINY)
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_plain_models_pass(family, dtype):
    m = tiny_model(family).to(dtype)
    check_prunable(m)
    check_prunable(prune(m.float(), windows(), FASP(units=('value_channel', 'mlp_channel')), .3)[0])          # pruned ones, too


def test_merged_adapters_pass():
    m = adapted(tiny_model('llama'))
    small, plan = prune(m.merge_and_unload(), windows(), 'fasp')
    assert plan.kept == prune(tiny_model('llama'), windows(), 'fasp')[1].kept


# ---- what is not finite ---------------------------------------------------------------------------------------------------

def overflowing(family, dtype=torch.float16, factor=5e4):
    "A model with finite weights whose second block overflows in float16."
    m = tiny_model(family)
    b = anatomy(m)[1]
    weight_of(m.get_submodule(b.path(b.family.mlp_firsts[-1]))).data.mul_(factor)
    weight_of(m.get_submodule(b.mlp_second)).data.mul_(1/factor)
    return m.to(dtype)

WIDTHS = [n for n in MODULES if n not in ('block_influence', 'removal', 'reap')]       # those remove whole parts
READS = [n for n in MODULES if n not in ('random', 'magnitude', 'reap')]
OTHERS = [('depth2', dict(units=('kv_group',), restore=False)), ('bonsai', dict(prior='random')), ('flap', dict(restore='bias')), ('taylor', dict(samples=None, seqlen=None)),
          ('recipe', dict(allocation='curvature')), ('recipe', dict(allocation='uniform')), ('fasp', dict(units=('value_channel',))), ('wanda_sp', dict(units=('kv_group',)))]

@pytest.mark.parametrize('name, settings', [(n, {}) for n in READS] + OTHERS)
@pytest.mark.parametrize('family', ['llama', 'opt'])
@pytest.mark.fault('NaN or infinity appears, in weights or only in activations (float16 overflows)', 'No method chooses by it. The message names block, module and dtype, and what to do.')
def test_no_method_sorts_what_is_not_finite(family, name, settings):
    m = overflowing(family)
    if family == 'opt': m.model.decoder.layers[1].fc1.bias.data.fill_(6e4)                                # relu may hide an overflow that is negative
    state = snapshot(m)
    method = quick(name, **settings)
    with pytest.raises(ValueError, match='(?s)(block|Round|model).*torch.float16; load the model in bfloat16 or float32') as e: prune(m, windows(), method, .1)
    assert unchanged(m, state) and '\n' not in str(e.value)


@pytest.mark.parametrize('name', WIDTHS)
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float32])
def test_the_remedy_is_one_and_the_plan_is_strict_json(name, dtype, tmp_path):
    small, plan = prune(overflowing('llama', dtype), windows(), quick(name), .1)
    plan.save(tmp_path/'plan.json')
    def refuse(constant): raise AssertionError(constant)
    json.loads((tmp_path/'plan.json').read_text(), parse_constant=refuse)
    assert PrunePlan.load(tmp_path/'plan.json') == plan and logits(small).isfinite().all()


def test_single_weights_are_not_sorted_either():
    from prunebook.elements import sparsify_elements
    for f in (sparsify, sparsify_elements):
        m = overflowing('llama')
        with pytest.raises(ValueError, match='block|layers.1.*torch.float16; load the model in bfloat16 or float32'): f(m, windows(), .5)


def test_a_probe_that_is_not_finite_is_not_kept(tmp_path, monkeypatch):
    from prunebook import recipe
    monkeypatch.setattr(recipe, '_divergence', lambda *a: math.nan)
    with pytest.raises(ValueError, match='divergence without .* units of 0.value_channel'): prune(tiny_model('llama'), windows(), run=Run(log=str(tmp_path/'log.json')))
    assert not list(tmp_path.iterdir())


def test_scores_of_other_methods_are_null_where_they_are_not_finite(tmp_path):
    "A method from elsewhere may know no score for some units."
    class Some(Method):
        name = None
        def run(self, ctx):
            kept, scores = ctx.stream(FASP())
            return kept, {n: s.double().index_fill(0, torch.tensor([1]), math.nan) for n, s in scores.items()}
    plan = prune(tiny_model('llama'), windows(), Some())[1]
    assert all(s[1] is None and None not in s[2:] for s in plan.scores.values())
    plan.method = 'some'
    plan.save(tmp_path/'plan.json')
    assert PrunePlan.load(tmp_path/'plan.json').scores == plan.scores


# ---- what is zero ---------------------------------------------------------------------------------------------------------

def dead(family, part):
    "A model in which all inputs of one second linear of the middle block are zero, and their name."
    m = tiny_model(family)
    b = anatomy(m)[1]
    name = b.path(b.family.mlp_firsts[-1] if part == 'mlp' else b.family.qkv[-1])
    rows = slice(None) if part == 'mlp' or len(b.family.qkv) == 3 else slice(2*b.heads*b.head_dim, None)      # the values of a fused projection
    weight_of(m.get_submodule(name)).data[rows] = 0
    if m.get_submodule(name).bias is not None: m.get_submodule(name).bias.data[rows] = 0
    return m, b.mlp_second if part == 'mlp' else b.out

@pytest.mark.parametrize('name', WIDTHS)
@pytest.mark.parametrize('part', ['mlp', 'attention'])
@pytest.mark.parametrize('family', FAMILIES)
@pytest.mark.fault('A module is dead: all its inputs are zero', 'It is pruned as what it is, worth nothing, and a warning names it.')
def test_a_dead_module_is_worth_nothing(family, part, name):
    (m, second), units = dead(family, part), ('mlp_channel',) if part == 'mlp' else ('kv_group', 'mlp_channel')
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('default')
        small, plan = prune(m, windows(), quick(name, units=units), .2)
    told = [str(w.message) for w in caught if 'zero on this text' in str(w.message)]
    assert len(told) == (name not in ('random', 'magnitude', 'taylor')) and all(second in t for t in told)
    assert plan.true_sparsity >= .199 and logits(small).isfinite().all()
    shares = {n: len(k)/plan.units[n] for n, k in plan.kept.items() if n.endswith('mlp_channel')}
    if part == 'mlp' and name in ('flap', 'surgeon', 'recipe'): assert shares['1.mlp_channel'] < min(v for n, v in shares.items() if n != '1.mlp_channel')   # those that compare blocks


@pytest.mark.parametrize('settings', [dict(order='greedy'), dict(allocation='curvature'), dict(units=('value_channel',)), dict(units=('value_channel', 'mlp_channel'), turn=False), dict(trust=0)])
@pytest.mark.parametrize('part', ['mlp', 'attention'])
def test_a_dead_module_in_the_recipe(part, settings):
    small, plan = prune(dead('llama', part)[0], windows(), quick('recipe', **settings), .1)
    assert plan.true_sparsity >= .1 and logits(small).isfinite().all()


@pytest.mark.parametrize('settings', [dict(restore='two_step', form='paper', towards='zero'), dict(form='code'), dict(sigma='random'), dict(units=('kv_group', 'mlp_channel')), dict(units=('value_channel', 'mlp_channel'))])
@pytest.mark.parametrize('part', ['mlp', 'attention'])
def test_a_dead_module_in_depth2(part, settings):
    small, plan = prune(dead('llama', part)[0], windows(), Depth2(**settings), .1)
    assert plan.true_sparsity >= .1 and logits(small).isfinite().all()


@pytest.mark.parametrize('settings', [dict(cost='tied', restore='tied'), dict(correction=2), dict(correlate=False)])
@pytest.mark.parametrize('part', ['mlp', 'attention'])
def test_a_dead_module_in_the_surgeon(part, settings):
    small, plan = prune(dead('llama', part)[0], windows(), Surgeon(shots=2, units=('kv_group', 'mlp_channel'), **settings), .1)
    assert plan.true_sparsity >= .1 and logits(small).isfinite().all()


@pytest.mark.parametrize('name', [n for n in READS if n in WIDTHS])
def test_single_dead_channels_leave_without_a_word(name):
    m = tiny_model('opt')
    for layer in m.model.decoder.layers: layer.fc1.weight.data[:3], layer.fc1.bias.data[:3] = 0, 0
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        plan = prune(m, windows(), quick(name, units=('mlp_channel',)), .2)[1]
    if name != 'bonsai': assert not any({0, 1, 2} & set(k) for k in plan.kept.values())


def test_a_dead_module_is_told_again_in_the_next_run():
    m = dead('llama', 'mlp')[0]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('default')
        for _ in range(2): prune(m, windows(), 'fasp')
    assert sum('zero on this text' in str(w.message) for w in caught) == 2


# ---- spared blocks --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('name', WIDTHS)
@pytest.mark.parametrize('family', FAMILIES)
def test_spare_is_one_name_in_every_method(family, name):
    m = tiny_model(family, **{'gpt2': dict(n_layer=4)}.get(family, dict(num_hidden_layers=4)))
    small, plan = prune(m, windows(), quick(name, units=('mlp_channel',), spare=[1, 1]), .2)
    widths = [b.mlp_width for b in anatomy(small)]
    assert widths[0] == widths[3] == 37 and max(widths[1:3]) < 37 and plan.true_sparsity >= .199
    assert plan.settings['spare'] == [1, 1] and all(len(plan.kept[n]) == 37 for n in ('0.mlp_channel', '3.mlp_channel') if n in plan.kept)
    with pytest.raises(ValueError, match='spare .*leaves none of the 4 blocks'): prune(m, windows(), quick(name, spare=[2, 2]), .2)
    with pytest.raises(ValueError, match='cannot be reached'): prune(m, windows(), quick(name, units=('mlp_channel',), spare=[1, 2]), .4)      # before any work
    for wrong in ([1], [1, 2, 3], [1., 2], [-1, 0], ['1', 0], [True, 0], 3, None, 'ab'):
        with pytest.raises(ValueError, match='spare is'): quick(name, spare=wrong)


# ---- settings -------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('name', MODULES)
def test_settings_of_another_type_are_named(name):
    values = dict(units=[5, 'mlp_channel', [5], None, True], spare=['no', 5, None], damp=['no', math.nan, math.inf, -1, True],
                  restore=['no', 1, None], seed=['x', 1.5, None], shots=[True, 1.5], evaluations=['many'], shares=['half', 5], trust=['no', True], ridge=['no', 5], towards=['west', None], correlate=[0])
    known, tried = as_method(name).settings(), 0
    for key, wrong in values.items():
        for v in wrong if key in known else []:
            with pytest.raises(ValueError, match=f'^{key} is ') as e: type(as_method(name))(**{key: v})
            assert '\n' not in str(e.value)
            tried += 1
    assert tried >= 10
    for good in (dict(damp=1), dict(damp=None), dict(units=known['units'])):
        if set(good) <= set(known) and not (name == 'surgeon' and good == dict(damp=None)): configured(name, good)


def test_values_of_another_type_in_a_run_are_named():
    values = dict(batch_size=[True, 0, -1, 1.5, '8', None], device=[5, True, 'abacus'], store=[5, 'abacus'], log=[5, True], lean=['no', 1], out=[5], resume=['no'], dtype=['float32'])
    for key, wrong in values.items():
        for v in wrong:
            with pytest.raises(ValueError, match=f'^{key} is ') as e: Run(**{key: v}).check_here()
            assert '\n' not in str(e.value)
    for good in (dict(batch_size=2), dict(device='cpu'), dict(store='cpu', lean=True), dict(dtype=torch.bfloat16)): Run(**good).check_here()


def test_the_door_names_a_device_that_is_not_here():
    m = tiny_model('llama')
    missing = 'cuda' if not torch.cuda.is_available() else 'cuda:99'
    for run in (Run(device=missing), Run(store=missing), Run(device='meta')):
        with pytest.raises(ValueError, match='(device|store) is .*not usable here .*choose another'): prune(m, windows(), run=run)


@pytest.mark.parametrize('method', [Recipe(), Bonsai(evaluations=8), Surgeon()], ids=lambda m: m.name)
def test_a_log_that_cannot_be_written_is_refused_before_any_work(method, tmp_path, monkeypatch):
    (tmp_path/'file').write_text('old')
    for path, words in ((tmp_path, 'is a folder'), (tmp_path/'file'/'log', 'is a file'), (tmp_path/('x'*300), 'too long')):
        monkeypatch.setattr(method, 'run', lambda *a: pytest.fail('it has begun'))
        with pytest.raises(ValueError, match=f'log: .*{words}'): prune(tiny_model('llama'), windows(), method, run=Run(log=str(path)))
    assert [p.name for p in tmp_path.iterdir()] == ['file']


def test_settings_that_a_plan_cannot_record_are_refused():
    class Callable(FASP):
        name = None
    method = Callable()
    method.towards = 'weights'
    method.settings = lambda: dict(score=print)
    with pytest.raises(ValueError, match='score is .*a plan records settings as JSON'): prune(tiny_model('llama'), windows(), method)


@pytest.mark.parametrize('content', ['{"key": 5}', '5', '[]', 'null', '{"round": 0}', '['*99999])
def test_a_log_of_something_else_is_one_sentence(content, tmp_path):
    (tmp_path/'log').write_text(content + '\n')
    for method in (Recipe(), Bonsai(evaluations=8), Surgeon()):
        with pytest.raises(ValueError, match='log (is not|belongs)') as e: prune(tiny_model('llama'), windows(), method, run=Run(log=str(tmp_path/'log')))
        assert '\n' not in str(e.value) and (tmp_path/'log').read_text() == content + '\n'


@pytest.mark.parametrize('line', ['5', 'null', '{}', '{"round": 0, "evaluation": 0, "mask": "a"}', '{"round": 0, "evaluation": 0, "mask": "a", "loss": NaN}', '{"round": "0", "evaluation": 0, "mask": "a", "loss": 1}'])
def test_a_record_of_something_else_is_named_by_its_line(line, tmp_path):
    m, method, run = tiny_model('llama'), Bonsai(evaluations=8), Run(log=str(tmp_path/'log'))
    prune(m, windows(), method, .1, run=run)
    lines = (tmp_path/'log').read_text().splitlines()
    (tmp_path/'log').write_text('\n'.join([*lines[:3], line, *lines[4:]]) + '\n')
    with pytest.raises(ValueError, match=r'is not an evaluation log \(line 4 holds no evaluation\)'): prune(m, windows(), method, .1, run=run)


@pytest.mark.parametrize('state', [5, {'key': 5}, {'key': {}}, {'key': {1: 2}, 'weights': {}, 'done': 1}, {'key': {}, 'weights': 5, 'done': 1}, [1]])
def test_a_state_of_something_else_is_one_sentence(state, tmp_path):
    torch.save(state, tmp_path/'state')
    with pytest.raises(ValueError, match='state (is not|belongs)'): _load_state(tmp_path/'state', dict(model='a'))


# ---- devices without float64 ------------------------------------------------------------------------------------------------

class OnlyByTheHelper(TorchDispatchMode):
    "Stands in for a device without float64: a tensor becomes float64 only in `as_double`, or in a function that has moved its tensors before."
    moved = {'as_double', 'channel_moments', '_fold_mean', '_js_sums', 'bundles', 'prior_scores', 'window_losses'}
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        read, made = ([t for t in tree_leaves(tree) if isinstance(t, torch.Tensor) and t.ndim] for tree in ((args, kwargs), out))
        if read and any(t.dtype == torch.float64 for t in made) and not any(t.dtype == torch.float64 for t in read):
            frames = inspect.stack(0)
            if not self.moved & {f.function for f in frames}: raise TypeError(f'{func} makes float64 of another type in {next((f.function for f in frames if "/prunebook/" in f.filename), "a test")}')
        return out


FITS = [('flap', {}), ('flap', dict(restore='bias')), ('flap', dict(restore=True)), ('wanda_sp', dict(restore=True)), ('fasp', {}), ('depth2', {}), ('depth2', dict(units=('kv_group',), restore='two_step', sigma='random')),
        ('bonsai', dict(estimator='prior', restore=True)), ('surgeon', dict(cost='tied', restore='tied', correction=2, units=('kv_group', 'mlp_channel'))), ('recipe', {}), ('recipe', dict(allocation='curvature', order='greedy'))]

@pytest.mark.parametrize('name, settings', FITS)
def test_all_solves_go_through_one_helper(name, settings):
    m = tiny_model('llama', num_hidden_layers=2)
    with OnlyByTheHelper(): small, plan = prune(m, windows(4, 16), quick(name, **settings), .1)
    assert plan.true_sparsity >= .099
    with OnlyByTheHelper(), pytest.raises(TypeError, match='makes float64'): torch.ones(2).double()           # what it would refuse


def test_single_weights_go_through_it_too():
    from prunebook.elements import sparsify_elements, sparsify_shots
    with OnlyByTheHelper():
        sparsify_elements(tiny_model('llama', num_hidden_layers=1), windows(4, 16), .3, steps=0)
        sparsify_shots(tiny_model('llama', num_hidden_layers=1), windows(4, 16), .3, shots=1, restore='chunks', size=50)


def test_as_double_moves_what_the_device_cannot_hold(monkeypatch):
    assert [repair.double_device(d) for d in ('cpu', 'cuda:1', 'mps')] == [torch.device('cpu'), torch.device('cuda:1'), torch.device('cpu')]
    asked = []
    monkeypatch.setattr(repair, 'double_device', lambda device: asked.append(device) or torch.device('meta'))
    x = repair.as_double(torch.ones(3, dtype=torch.bfloat16))
    assert (x.dtype, x.device.type, asked) == (torch.float64, 'meta', [torch.device('cpu')])
    monkeypatch.undo()
    A, B = torch.eye(3).bfloat16(), torch.ones(3, 2)
    assert repair.Ridge().solve(A, B).dtype == torch.float64 and repair.Ridge().restore(B.T.half(), A, torch.arange(2)).dtype == torch.float16

"""Unknown families: an adapter is proposed from what the linears of a block do, and what is no plain decoder is refused with a remedy."""
import copy
import json

import pytest
import torch
from prunebook.cli import main
from prunebook.conform import check_method, conforms
from prunebook.couplings import FAMILIES, couplings, kinds_of
from prunebook.methods import check_prunable
from prunebook.models import tiny_model
from prunebook.propose import feeds, propose, small_twin
from transformers import AutoConfig, AutoModelForCausalLM

pytestmark = pytest.mark.usefixtures('one_thread')

SIZES = dict(vocab_size=97, hidden_size=24, intermediate_size=37, num_hidden_layers=2, num_attention_heads=6, bos_token_id=1, eos_token_id=2, pad_token_id=0)


def stranger(kind, **kw):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**SIZES, **kw})).float().eval()


@pytest.mark.parametrize('family', ['qwen3', 'gemma2', 'olmo', 'olmo2', 'cohere', 'falcon', 'bloom', 'mpt', 'gpt_bigcode', 'phi3', 'glm4', 'xglm', 'biogpt', 'mixtral', 'gpt_oss'])
def test_what_people_wrote_down_is_found(family, monkeypatch):
    "With the adapter that is proposed for a family that was forgotten, the same kinds of units conform; its lines can be pasted."
    model, known = tiny_model(family), FAMILIES[family]
    expected = [k for k in kinds_of(model) if k != 'expert']      # routers are not looked for
    monkeypatch.delitem(FAMILIES, family)
    p = propose(model)
    assert family not in FAMILIES                          # nothing is left in the table
    assert p.units == expected and (p.family.adds, p.family.tuples) == (known.adds, known.tuples)
    assert (p.family.qkv, p.family.out, p.family.mlp_firsts, p.family.mlp_second, p.family.mlp_parts) == (known.qkv, known.out, known.mlp_firsts, known.mlp_second, known.mlp_parts)
    exec(p.lines(), {})                                    # noqa: S102
    for kind in expected: conforms(model, kind, save=False)
    monkeypatch.setitem(FAMILIES, family, known)


def test_lines_make_a_model_prunable():
    model = stranger('codegen', n_embd=32, n_layer=2, n_head=4, n_inner=37, n_positions=64, rotary_dim=4)
    with pytest.raises(ValueError, match='prunebook inspect proposes one'): couplings(model)
    try:
        exec(propose(model).lines(), {})                   # noqa: S102
        assert kinds_of(model) == ['mlp_channel']          # its order of rows is none of those that we know
        check_method(model, 'fasp')
    finally: FAMILIES.pop('codegen', None)


def test_a_large_model_is_checked_by_a_small_one():
    model = tiny_model('gemma2')
    twin = small_twin(model, least=0)
    assert type(twin) is type(model) and len(twin.model.layers) == 2 and len(twin.config.layer_types) == 2
    assert len(model.model.layers) == 3 and len(model.config.layer_types) == 3


def test_nothing_is_changed():
    model = tiny_model('llama')
    before = copy.deepcopy(model.state_dict())
    hooks = lambda: sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    n = hooks()
    feeds(model)
    propose(model)
    assert hooks() == n and all(torch.equal(t, before[k]) for k, t in model.state_dict().items())


# ---- what is no plain decoder ----------------------------------------------------------------------------------------

@pytest.mark.parametrize('kind,words', [('bert', 'is no decoder: its attention looks ahead'), ('mamba', 'no attention of linear layers')])
def test_no_decoder(kind, words):
    with pytest.raises(ValueError, match=words): propose(stranger(kind))


def on_meta(model): return model.to('meta')
def compiled(model): return torch.compile(model)
def parallel(model): return torch.nn.DataParallel(model)


def adapted(model):
    peft = pytest.importorskip('peft')
    return peft.get_peft_model(model, peft.LoraConfig(target_modules=['q_proj']))


def quantized(model):
    for m in [m for m in model.model.layers[0].modules() if isinstance(m, torch.nn.Linear)]:
        m.weight = torch.nn.Parameter(m.weight.to(torch.int8), requires_grad=False)
    return model


@pytest.mark.parametrize('change,words', [(on_meta, 'not in memory.*load it whole'), (compiled, 'compiled.*_orig_mod'), (parallel, r'wraps the model.*model\.module'),
                                          (adapted, 'adapters attached.*merge_and_unload'), (quantized, 'quantized.*load it in bfloat16')])
@pytest.mark.parametrize('known', [True, False])
def test_not_plain(change, words, known, monkeypatch):
    "The same words for a family that is known and for one that is not."
    model = change(tiny_model('llama').eval())
    if not known: monkeypatch.delitem(FAMILIES, 'llama')
    with pytest.raises(ValueError, match=words): (check_prunable if known else propose)(model)


# ---- the command line ------------------------------------------------------------------------------------------------

def test_inspect_proposes(tmp_path, tiny_tokenizer, capsys):
    model = stranger('codegen', n_embd=32, n_layer=2, n_head=4, n_inner=37, n_positions=64, rotary_dim=4)
    model.save_pretrained(tmp_path/'m')
    tiny_tokenizer.save_pretrained(tmp_path/'m')
    assert main(['inspect', str(tmp_path/'m')]) == 0
    out = capsys.readouterr().out
    assert "No adapter for model type 'codegen'" in out and "FAMILIES['codegen'] = Family(" in out and 'conformance check with mlp_channel' in out
    assert main(['inspect', str(tmp_path/'m'), '--json']) == 0
    said = json.loads(capsys.readouterr().out)
    assert said['units'] == ['mlp_channel'] and said['proposal'] in out
    assert main(['prune', str(tmp_path/'m'), '--text', 'random', '--seqlen', '14', '--out', str(tmp_path/'x')]) == 2
    assert 'prunebook inspect proposes one' in capsys.readouterr().err


def test_inspect_refuses_what_is_no_decoder(tmp_path, tiny_tokenizer, capsys):
    stranger('bert').save_pretrained(tmp_path/'m')
    tiny_tokenizer.save_pretrained(tmp_path/'m')
    assert main(['inspect', str(tmp_path/'m')]) == 2
    assert 'bert is no decoder' in capsys.readouterr().err

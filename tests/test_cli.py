"""The commands in this process: what they print, what they write, and how they fail."""
import json
import os
import re
from pathlib import Path

import pytest
import torch
from helpers import tiny_model
from fastcore.docments import docments
from transformers import AutoModelForCausalLM

from prunebook import cli, pruning, save as save_module, text as text_module
from prunebook.cli import COMMANDS, main
from prunebook.couplings import couplings, slice_units
from prunebook.plan import PrunePlan
from prunebook.save import load_pruned, save_pruned

pytestmark = pytest.mark.usefixtures('one_thread', 'no_data')
VALUES = '{"units": ["value_channel", "mlp_channel"]}'
QUICK = ['--method', 'fasp', '--text', 'passages', '--n', '3', '--seqlen', '64', '--eval_n', '3']


@pytest.fixture
def no_data(monkeypatch): monkeypatch.delenv('PRUNEBOOK_DATA', raising=False)


@pytest.fixture(scope='module')
def folders(tmp_path_factory, tiny_tokenizer):
    "A dense model, an ordinary pruned one and one that needs its modelling file; with 512 positions for the speed test."
    with pytest.MonkeyPatch.context() as m:
        m.setattr('transformers.dynamic_module_utils.HF_MODULES_CACHE', str(tmp_path_factory.mktemp('modules')))
        m.setattr('sys.path', list(__import__('sys').path))
        root, model = tmp_path_factory.mktemp('models'), lambda: tiny_model('llama', max_position_embeddings=512)
        model().save_pretrained(root/'dense')
        tiny_tokenizer.save_pretrained(root/'dense')
        save_pruned(slice_units(model(), {f'{i}.mlp_channel': list(range(20)) for i in range(3)}), None, root/'stock', tiny_tokenizer)
        save_pruned(slice_units(model(), {c.name: [i for i in range(16) if i % 8 < 5] for c in couplings(model(), 'value_channel')}), None, root/'remote', tiny_tokenizer)
        yield {n: str(root/n) for n in ('dense', 'stock', 'remote')}


@pytest.fixture
def run(capsys):
    "Run a command; exit code, standard output, standard error."
    def f(*args):
        capsys.readouterr()
        code = main([str(a) for a in args])
        return code, *capsys.readouterr()
    return f


def strict(s):
    "JSON as other languages read it: without NaN and Infinity."
    def refuse(constant): raise AssertionError(f'{constant} is not JSON')
    return json.loads(s, parse_constant=refuse)


def error(err): return err.strip().splitlines()[-1]


@pytest.fixture
def untouched(monkeypatch):
    "Fail if a model is loaded."
    monkeypatch.setattr(cli, '_load', lambda *a, **kw: pytest.fail('work was begun'))


# ---- prune ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('source', ['passages', 'random', 'a file'])
def test_prune(source, folders, run, tmp_path):
    if source == 'a file':
        (tmp_path/'text.txt').write_text('The quick brown fox jumps over the lazy dog. '*20)
        source = tmp_path/'text.txt'
    code, out, err = run('prune', folders['dense'], '--out', tmp_path/'small', '--method', 'fasp', '--sparsity', '0.25', '--text', source, '--n', '3', '--seqlen', '64')
    assert code == 0, err
    small, tokenizer, plan = load_pruned(tmp_path/'small', device='cpu')
    assert (plan.method, plan.sparsity) == ('fasp', .25) and .25 <= plan.true_sparsity < .3 and '3 windows of 64 tokens from' in plan.calibration
    assert {'passages': 'passages', 'random': 'random tokens'}.get(source, 'text.txt') in plan.calibration
    assert tokenizer('a cat').input_ids and small(torch.tensor([[5, 6]])).logits.isfinite().all()
    assert repr(plan) in out and f'Saved in {tmp_path}/small: load it with AutoModelForCausalLM.from_pretrained.' in out
    assert 'Calibration: 3 windows' in err and 'TFLOP' in err and 'Saved' not in err
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path/'small')).__name__ == 'LlamaForCausalLM'
    assert not list((tmp_path/'small').glob('report*'))


def test_prune_gives_what_the_library_gives(folders, run, tmp_path):
    args = ['prune', folders['dense'], '--method', 'fasp', '--sparsity', '0.2', '--text', 'random', '--n', '4', '--seqlen', '32', '--dtype', 'float32', '--seed', '3',
            '--settings', '{"damp": 0.1, "units": ["value_channel", "mlp_channel"]}']
    assert run(*args, '--out', tmp_path/'a')[0] == 0
    small, _, plan = load_pruned(tmp_path/'a', device='cpu')
    from prunebook.fasp import FASP
    from prunebook.models import load_model
    model, tokenizer = load_model(folders['dense'], 'cpu', torch.float32)
    expected, p = pruning.prune(model, text_module.load_windows('random', model, tokenizer, 4, 32, 3), FASP(units=('value_channel', 'mlp_channel'), damp=.1), .2)
    assert plan == p
    with torch.no_grad(): assert torch.equal(small(torch.arange(3, 30)[None]).logits, expected(torch.arange(3, 30)[None]).logits)


@pytest.mark.parametrize('settings', ['{}', VALUES])
def test_report_and_json(settings, folders, run, tmp_path):
    out_folder = tmp_path/'small'
    code, out, err = run('prune', folders['dense'], '--out', out_folder, '--settings', settings, *QUICK, '--report', '--json')
    assert code == 0, err
    r = strict(out)
    assert r.pop('folder') == str(out_folder) and r == strict((out_folder/'report.json').read_text())
    assert str(out_folder.parent) not in (out_folder/'report.json').read_text()             # no path of the machine
    assert {'method', 'settings', 'sparsity', 'true_sparsity', 'calibration', 'versions', 'model', 'model_fingerprint', 'seed', 'seconds', 'peak_extra_bytes', 'machine',
            'plain_transformers', 'perplexity', 'losses', 'last_words', 'parameters', 'linear_parameters', 'bytes', 'speed', 'sample', 'evaluation',
            'units_left'} == r.keys()
    assert (r['method'], r['sparsity'], r['seed'], r['model']) == ('fasp', .2, 0, 'dense')
    assert r['plain_transformers'] == (settings == '{}')
    assert r['linear_parameters']['after'] == pytest.approx(r['linear_parameters']['before']*(1 - r['true_sparsity']))
    assert r['parameters']['before'] - r['parameters']['after'] == r['linear_parameters']['before'] - r['linear_parameters']['after'] > 0
    assert r['bytes']['after'] < r['bytes']['before']
    assert all(0 < low <= median <= high for median, low, high in r['speed']['ratio'].values())
    for when in ('before', 'after'):
        assert len(r['losses'][when]) == 3
        assert r['perplexity'][when].keys() == {'value', 'stderr', 'windows'} and r['perplexity'][when]['windows'] == 3 and r['perplexity'][when]['value'] > 1
        assert r['sample'][when].startswith('The old lighthouse keeper')
        assert all(0 < low <= median <= high for median, low, high in r['speed'][when].values())
    assert r['seconds'].keys() == {'forward', 'forward_cpu', 'prune', 'prune_cpu', 'in_forward_passes', 'in_forward_passes_cpu'} and all(v > 0 for v in r['seconds'].values())
    assert r['machine']['device'] == 'cpu' and r['machine']['threads'] == 1
    plan = PrunePlan.load(out_folder/'plan.json')
    assert (r['model_fingerprint'], r['true_sparsity'], r['settings']) == (plan.model, plan.true_sparsity, plan.settings)
    report = (out_folder/'report.md').read_text()
    assert repr(plan) in report and '| perplexity |' in report and '**before:** The old lighthouse keeper' in report
    assert (out_folder/'report.png').read_bytes()[:8] == b'\x89PNG\r\n\x1a\n'
    assert 'Measuring the dense model' in err and 'Measuring the pruned model' in err and '{' not in err.replace(repr(plan), '').split('Pruning with')[0]
    load_pruned(out_folder, device='cpu')


def test_report_for_reading(folders, run, tmp_path):
    code, out, err = run('prune', folders['dense'], '--out', tmp_path/'small', *QUICK, '--report')
    assert code == 0, err
    assert out.startswith((tmp_path/'small'/'report.md').read_text()) and 'Pruning took' in out and 'times a forward pass' in out and 'Saved in' in out
    assert re.search(r'timed in turn: prefill [\d.]+ \([\d.]+ to [\d.]+\), decode', out)
    assert re.search(r'\| prefill, tokens/s \|.*\| [\d.]+ \([\d.]+ to [\d.]+\) \|\n', out)


def test_report_on_one_window(folders, run, tmp_path):
    "One window has no standard error: still a report, still JSON."
    code, out, err = run('prune', folders['dense'], '--out', tmp_path/'small', *QUICK[:-1], '1', '--report', '--json')
    assert code == 0, err
    assert strict(out)['perplexity']['after']['windows'] == 1
    assert {'report.md', 'report.png', 'report.json'} <= {p.name for p in (tmp_path/'small').iterdir()}


def test_json_without_report(folders, run, tmp_path):
    code, out, _ = run('prune', folders['dense'], '--out', tmp_path/'small', *QUICK, '--json')
    assert code == 0 and strict(out)['true_sparsity'] >= .2 and 'perplexity' not in strict(out)


def test_pruning_a_pruned_folder(folders, run, tmp_path):
    for i, (source, settings) in enumerate([('stock', '{}'), ('remote', VALUES), ('remote', '{}')]):
        code, out, err = run('prune', folders[source], '--out', tmp_path/str(i), '--settings', settings, *QUICK, '--json')
        assert code == 0, err
        assert strict(out)['plain_transformers'] == (source == 'stock')
        assert load_pruned(tmp_path/str(i), device='cpu')[0].generate(torch.tensor([[5, 6]]), max_new_tokens=3, pad_token_id=0).shape[0] == 1


def test_options_may_have_dashes(folders, run, tmp_path):
    assert run('prune', folders['dense'], '--out', tmp_path/'a', '--text=random', '--n=2', '--seqlen=16', '--eval-n=2')[0] == 0
    assert PrunePlan.load(tmp_path/'a'/'plan.json').method == 'recipe'                      # unless another is named


def test_a_token_in_front_is_a_choice(folders, run, tmp_path):
    found = {}
    for bos in ('auto', 'yes', 'no'):
        assert run('prune', folders['dense'], '--out', tmp_path/bos, *QUICK, '--bos', bos)[0] == 0
        found[bos] = PrunePlan.load(tmp_path/bos/'plan.json').calibration
    assert found['auto'] == found['yes'] != found['no']


# ---- what is there already ------------------------------------------------------------------------------------------

def test_a_second_run_needs_force(folders, run, tmp_path, monkeypatch):
    args = ['prune', folders['dense'], '--out', tmp_path/'small', '--text', 'random', '--n', '2', '--seqlen', '16']
    assert run(*args)[0] == 0
    first = (tmp_path/'small'/'plan.json').read_text()
    with monkeypatch.context() as m:
        m.setattr(cli, '_load', lambda *a, **kw: pytest.fail('work was begun'))
        code, out, err = run(*args, '--sparsity', '.3')
    assert code == 2 and out == '' and 'exists already' in error(err) and '--force' in error(err)
    assert (tmp_path/'small'/'plan.json').read_text() == first
    assert run(*args, '--sparsity', '.3', '--force')[0] == 0
    assert load_pruned(tmp_path/'small', device='cpu')[2].sparsity == .3
    assert [p.name for p in tmp_path.iterdir()] == ['small']


def test_prune_to_a_budget_with_multiples_and_what_stays(folders, run, tmp_path):
    args = ['prune', folders['dense'], '--method', 'fasp', '--text', 'random', '--n', '3', '--seqlen', '32', '--dtype', 'float32', '--multiple', '8', '--keep', '0,layers.2.self_attn',
            '--settings', '{"units": ["value_channel", "mlp_channel"]}']
    code, out, err = run(*args, '--parameters', '20.5K', '--out', tmp_path/'small', '--json')
    assert code == 0, err
    small, _, plan = load_pruned(tmp_path/'small', device='cpu')
    found = strict(out)['budget']['parameters']
    assert found == dict(asked=20500, true=sum(p.numel() for p in small.parameters())) and .98*20500 <= found['true'] <= 20500
    assert {len(k) for n, k in plan.kept.items() if n in ('1.mlp_channel', '2.mlp_channel')} <= {8, 16, 24, 32, 37}
    assert all(len(plan.kept.get(n, range(plan.units[n]))) == plan.units[n] for n in ('0.mlp_channel', '0.value_channel', '2.value_channel'))
    assert (plan.settings['multiple'], plan.settings['keep']) == (8, [0, 'layers.2.self_attn'])


def test_prune_to_a_speed_prints_what_was_predicted(folders, run, tmp_path, monkeypatch):
    from prunebook.budget import SpeedTable
    table = SpeedTable('decode', 1., 1., 3, dict(mlp_channel=[(1., .8)]))       # as some machine would measure it
    monkeypatch.setattr('prunebook.budget.measure_speed', lambda model, couplings, phase: table)
    code, out, err = run('prune', folders['dense'], '--method', 'fasp', '--text', 'random', '--n', '3', '--seqlen', '32', '--speed', 'decode=1.2', '--out', tmp_path/'fast')
    assert code == 0, err
    assert 'speed in decode: 1.2' in out and 'predicted, 1.2 asked' in out


def test_sizes_are_read_with_their_units():
    assert [cli._size(w, 'bytes', cli._BYTES) for w in ('5', '5B', '1.5kB', '2MB', '2 MiB', '1gb', '1e3KB')] == [5, 5, 1500, 2e6, 2**21, 1e9, 1e6]
    assert [cli._size(w, 'parameters', cli._THOUSANDS) for w in ('100M', '1.5b', '100e6')] == [1e8, 1.5e9, 1e8]


def test_a_model_cannot_take_its_own_place(folders, run, tmp_path, tiny_tokenizer, untouched):
    save_pruned(tiny_model('llama'), None, tmp_path/'m', tiny_tokenizer)
    code, _, err = run('prune', tmp_path/'m', '--out', tmp_path/'m', '--force', '--text', 'random', '--n', '2', '--seqlen', '16')
    assert code == 2 and 'the model that is read' in error(err)
    assert load_pruned(tmp_path/'m', device='cpu')[0].model.layers[0].mlp.down_proj.in_features == 37


def test_a_failing_run_keeps_what_was_there(folders, run, tmp_path, monkeypatch):
    args = ['prune', folders['dense'], '--out', tmp_path/'small', '--text', 'random', '--n', '2', '--seqlen', '16', '--force']
    assert run(*args)[0] == 0
    first = (tmp_path/'small'/'plan.json').read_text()
    def fail(*a): raise OSError(28, 'No space left on device')
    monkeypatch.setattr(save_module, '_write_model', fail)
    code, _, err = run(*args, '--sparsity', '.3')
    assert code == 2 and 'No space left' in error(err)
    assert [p.name for p in tmp_path.iterdir()] == ['small'] and (tmp_path/'small'/'plan.json').read_text() == first
    load_pruned(tmp_path/'small', device='cpu')


# ---- mistakes -------------------------------------------------------------------------------------------------------

MISTAKES = dict(
    method=(['--method', 'lottery'], "Unknown method 'lottery'"),
    setting=(['--method', 'fasp', '--settings', '{"dampp": 1}'], 'fasp has no setting dampp; it has units, restore, damp'),
    settings=(['--settings', '{damp: 1}'], '--settings is not JSON'),
    settings_list=(['--settings', '[]'], '--settings'),
    settings_number=(['--settings', '5'], '--settings'),
    settings_null=(['--settings', 'null'], '--settings'),
    setting_kind=(['--settings', '{"units": ["neuron"]}'], "Unknown kind of unit 'neuron'"),
    setting_type=(['--settings', '{"damp": "much"}'], 'damp'),
    dtype=(['--dtype', 'float99'], "Unknown dtype 'float99'"),
    dtype_function=(['--dtype', 'matmul'], "Unknown dtype 'matmul'"),
    dtype_integer=(['--dtype', 'int8'], 'int8'),
    device=(['--device', 'abacus'], 'abacus'),
    sparsity_high=(['--sparsity', '1.5'], 'sparsity is 1.5; it is a fraction'),
    sparsity_low=(['--sparsity', '-0.5'], 'sparsity is -0.5'),
    sparsity_nan=(['--sparsity', 'nan'], 'sparsity is nan'),
    two_budgets=(['--sparsity', '.2', '--parameters', '10K'], 'sparsity and parameters both say how much goes'),
    parameters_no_number=(['--parameters', '10 apples'], "--parameters is '10 apples'; it is a number, perhaps with K, M"),
    bytes_no_number=(['--bytes', '1.2.3MB'], "--bytes is '1.2.3MB'"),
    bytes_unreachable=(['--bytes', '1KB'], 'bytes 1,000 cannot be reached with mlp_channel, value_channel:'),
    speed_no_number=(['--speed', 'fast'], "--speed is 'fast'; write it like 1.3 or decode=1.3"),
    speed_slow=(['--speed', '.5'], 'speed is 0.5; it is a multiple of the dense speed, above 1'),
    multiple_no_number=(['--multiple', 'mlp_channel=wide'], "--multiple is 'mlp_channel=wide'; write it like 64"),
    multiple_unknown=(['--multiple', 'mlp=8'], 'multiple names mlp, but the units are'),
    multiple_too_large=(['--multiple', '64'], 'only 37 of these are together'),
    multiple_twice=(['--multiple', '8', '--settings', '{"multiple": 8}'], 'multiple is given twice'),
    keep_nothing=(['--keep', 'layers.7'], "keep names 'layers.7', which is in no block"),
    sparsity_unreachable=(['--sparsity', '.9'], 'cannot be reached with mlp_channel, value_channel: at most 0.6'),
    bos=(['--bos', 'maybe'], "--bos is 'maybe'; it is auto, yes, no"),
    text=(['--text', 'no-such-file.txt'], "'no-such-file.txt' is neither"),
    n=(['--n', '0'], 'n is 0'),
    seqlen_long=(['--seqlen', '513'], 'longer than the 512 positions'),
    seqlen_short=(['--seqlen', '1'], 'at least 2 tokens'))


@pytest.mark.parametrize('what', MISTAKES)
def test_mistakes_are_explained(what, folders, run, tmp_path):
    args, message = MISTAKES[what]
    code, out, err = run('prune', folders['dense'], '--out', tmp_path/'x', '--text', 'passages', '--n', '2', '--seqlen', '32', *args)
    assert code == 2 and out == '' and error(err).startswith('error: ') and message in error(err)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason='there is a GPU')
def test_a_gpu_that_is_not_there(folders, run, tmp_path):
    for args in (['prune', folders['dense'], '--out', tmp_path/'x', *QUICK], ['eval', folders['dense'], '--text', 'passages', '--seqlen', '64', '--n', '2']):
        code, _, err = run(*args, '--device', 'cuda')
        assert code == 2 and error(err).startswith('error: ')
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize('args', [['--method', 'lottery'], ['--settings', '{"dampp": 1}'], ['--settings', '{damp']])
def test_mistakes_that_need_no_model(args, untouched, run, tmp_path): assert run('prune', 'absent', '--out', tmp_path/'x', *args)[0] == 2


def test_a_text_that_is_too_short(folders, run, tmp_path):
    (tmp_path/'short.txt').write_text('Only this.')
    for args in (['prune', folders['dense'], '--out', tmp_path/'x'], ['eval', folders['dense']]):
        code, _, err = run(*args, '--text', tmp_path/'short.txt', '--seqlen', '64')
        assert code == 2 and 'The text has 10 tokens, too few for one window of 64' in error(err)
    (tmp_path/'latin.txt').write_bytes('Café '.encode('latin-1')*100)
    assert run('eval', folders['dense'], '--text', tmp_path/'latin.txt', '--seqlen', '64')[0] == 2
    assert {p.name for p in tmp_path.iterdir()} == {'short.txt', 'latin.txt'}


def test_no_model_and_no_folder(run, tmp_path, folders, monkeypatch):
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_OFFLINE', True)
    for args in (['prune', tmp_path/'absent', '--out', tmp_path/'x'], ['eval', tmp_path/'absent'], ['inspect', tmp_path/'absent']):
        code, out, err = run(*args)
        assert code == 2 and out == '' and 'neither "smollm2-135m", "gemma3-270m" nor a model folder' in error(err)
    code, _, err = run('prune', folders['dense'])
    assert code == 2 and '--out' in error(err)


def test_a_folder_without_a_model_is_named(run, tmp_path, monkeypatch):
    "The last line says what is wrong, not that some tokenizer backend is missing."
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_OFFLINE', True)
    (tmp_path/'empty').mkdir()
    code, _, err = run('inspect', tmp_path/'empty')
    assert code == 2 and error(err).startswith('error: ') and 'empty' in error(err)


def test_a_family_without_adapter(run, tmp_path, tiny_tokenizer):
    from transformers import BertConfig, BertLMHeadModel
    BertLMHeadModel(BertConfig(vocab_size=97, hidden_size=24, intermediate_size=30, num_hidden_layers=2, num_attention_heads=2)).save_pretrained(tmp_path/'m')
    tiny_tokenizer.save_pretrained(tmp_path/'m')
    for args, words in ((['prune', tmp_path/'m', '--out', tmp_path/'x', *QUICK], "No adapter for model type 'bert'"), (['inspect', tmp_path/'m'], 'bert is no decoder')):
        code, _, err = run(*args)
        assert code == 2 and words in error(err)
    assert [p.name for p in tmp_path.iterdir()] == ['m']


def test_unknown_commands_and_options(run, capsys):
    code, out, err = run('shrink', 'x')
    assert code == 2 and out == '' and "no command 'shrink'" in err and all(n in err for n in COMMANDS)
    code, out, err = run()
    assert code == 2 and 'usage' in err
    for args in (['prune'], ['prune', 'a', '--nonsense', '1'], ['prune', 'a', '--n', 'many'], ['eval', 'a', 'b']):
        with pytest.raises(SystemExit) as e: main(args)
        assert e.value.code == 2 and 'usage: prunebook' in capsys.readouterr().err


def test_debugging_shows_where(folders, tmp_path, monkeypatch):
    monkeypatch.setenv('PRUNEBOOK_DEBUG', '1')
    with pytest.raises(ValueError, match='fraction in'): main(['prune', folders['dense'], '--out', str(tmp_path/'x'), *QUICK, '--sparsity', '2'])


# ---- interruptions --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('where', ['load', 'prune', 'save', 'manifest'])
def test_an_interruption_leaves_nothing(where, folders, run, tmp_path, monkeypatch):
    def interrupt(*a, **kw): raise KeyboardInterrupt
    target = dict(load=(cli, '_load'), prune=(pruning, 'prune'), save=(save_module, '_write_model'), manifest=(save_module, 'write_manifest'))[where]
    monkeypatch.setattr(*target, interrupt)
    code, out, err = run('prune', folders['dense'], '--out', tmp_path/'deep'/'x', '--text', 'random', '--n', '2', '--seqlen', '16')
    assert code == 130 and out == '' and 'Interrupted' in error(err)
    assert [p for p in tmp_path.rglob('*') if p.name != 'deep'] == []


def test_an_interruption_inside_a_block(folders, run, tmp_path, monkeypatch):
    def interrupt(self, x): raise KeyboardInterrupt
    monkeypatch.setattr('transformers.models.llama.modeling_llama.LlamaMLP.forward', interrupt)
    assert run('prune', folders['dense'], '--out', tmp_path/'x', '--text', 'random', '--n', '2', '--seqlen', '16')[0] == 130
    assert list(tmp_path.iterdir()) == []


# ---- text that is not in reach --------------------------------------------------------------------------------------

@pytest.mark.parametrize('how', ['no folder', 'no hub'])
def test_passages_stand_in_for_wikitext(how, folders, run, tmp_path, monkeypatch):
    if how == 'no folder': monkeypatch.setenv('PRUNEBOOK_DATA', str(tmp_path))
    else:
        def fail(*a, **kw): raise ConnectionError('offline')
        monkeypatch.setattr('datasets.load_dataset', fail)
    code, out, err = run('prune', folders['dense'], '--out', tmp_path/'x', *QUICK[:2], *QUICK[4:], '--json')
    assert code == 0, err
    assert 'passages' in strict(out)['calibration']
    assert ('is not there' if how == 'no folder' else 'WikiText-2 is not in reach (ConnectionError)') in err and 'Taking the built-in passages instead.' in err
    code, out, err = run('eval', folders['dense'], '--n', '2', '--seqlen', '64', '--json')
    assert code == 0 and 'passages' in strict(out)['windows'] and 'Taking the built-in passages instead.' in err


def test_wikitext_is_taken_if_it_is_there(folders, run, tmp_path, monkeypatch):
    (tmp_path/'wikitext2').mkdir()
    for split in ('valid', 'test'): (tmp_path/'wikitext2'/f'{split}.raw').write_text(f'The {split} text, again and again. '*30)
    monkeypatch.setenv('PRUNEBOOK_DATA', str(tmp_path))
    code, out, err = run('prune', folders['dense'], '--out', tmp_path/'x', *QUICK[:2], *QUICK[4:], '--json')
    assert code == 0 and 'wikitext2, random offsets' in strict(out)['calibration'] and 'instead' not in err


# ---- eval and inspect -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize('which', ['dense', 'stock', 'remote'])
def test_eval(which, folders, run, tmp_path):
    args = ['eval', folders[which], '--text', 'passages', '--n', '3', '--seqlen', '64', '--dtype', 'float32']
    code, out, err = run(*args, '--json')
    assert code == 0, err
    r = strict(out)
    assert {'perplexity', 'losses', 'parameters', 'linear_parameters', 'bytes', 'speed', 'sample', 'windows', 'tasks', 'machine'} == r.keys()
    assert r['tasks'] == {} and r['perplexity']['windows'] == 3 and r['machine']['dtype'] == 'float32' and r['windows'].startswith('3 windows of 64 tokens from passages, side by side')
    linears = dict(dense=0, stock=3*17*(3*24 + 2), remote=3*2*3*(24*4 + 1))                    # what was taken away
    assert r['linear_parameters'] == 3*(24*48 + 48 + 2*(24*16 + 16) + 48*24 + 24 + 2*(24*37 + 37) + 37*24 + 24) - linears[which]
    if which == 'stock': return
    code, out, err = run(*args)
    assert code == 0 and re.search(rf'perplexity +{r["perplexity"]["value"]:.2f} ± {r["perplexity"]["stderr"]:.2f}\n', out)
    assert f'{r["parameters"]/1e6:.2f} M' in out and 'sample' in out and 'decode, tokens/s' in out and 'Measuring' in err


def test_eval_on_one_window_is_json(folders, run):
    code, out, _ = run('eval', folders['dense'], '--text', 'passages', '--n', '1', '--seqlen', '64', '--json')
    assert code == 0 and strict(out)['perplexity']['windows'] == 1


@pytest.mark.parametrize('which', ['dense', 'stock', 'remote'])
def test_inspect(which, folders, run):
    code, out, err = run('inspect', folders[which], '--json')
    assert code == 0, err
    r = strict(out)
    assert (r['type'], r['blocks'], r['hidden'], r['query_heads'], r['kv_heads'], r['head_size']) == ('llama', 3, 24, 6, 2, 8)
    assert r['mlp_width'] == (20 if which == 'stock' else 37)
    units = {k: (v['units'], v['parameters_each']) for k, v in r['units'].items()}
    v = 5 if which == 'remote' else 8
    assert units == dict(mlp_channel=(3*r['mlp_width'], 3*24 + 2), value_channel=(6*v, 24*4 + 1), kv_group=(6, 24*(24 + 8 + v + 3*v) + 24 + 8 + v), query_head=(18, 24*(8 + v) + 8))
    assert r['linear_parameters'] > sum(n*c for n, c in (units['mlp_channel'], units['kv_group'])) and 0 < r['units']['mlp_channel']['share_of_decoder'] < 1
    code, out, _ = run('inspect', folders[which])
    assert code == 0 and f'mlp_width            {r["mlp_width"]}' in out and all(f'\n{k}: {n} units' in out for k, (n, _) in units.items())


def test_inspect_without_grouped_heads(run, tmp_path, tiny_tokenizer):
    tiny_model('gpt2').save_pretrained(tmp_path/'m')
    tiny_tokenizer.save_pretrained(tmp_path/'m')
    code, out, _ = run('inspect', tmp_path/'m', '--json')
    assert code == 0 and strict(out)['units'].keys() == {'mlp_channel', 'kv_group', 'value_channel'}


# ---- help -----------------------------------------------------------------------------------------------------------

def squeeze(s): return ' '.join(s.split())


@pytest.mark.parametrize('command', COMMANDS)
def test_help_lists_every_option_with_its_comment(command, capsys):
    with pytest.raises(SystemExit) as e: main([command, '--help'])
    assert e.value.code == 0
    out = squeeze(capsys.readouterr().out)
    assert f'usage: prunebook {command}' in out and squeeze(COMMANDS[command].__doc__) in out
    for name, comment in docments(COMMANDS[command], returns=False).items():
        assert comment, f'{name} has no comment'
        assert (name if name in ('model', 'grid', 'folder') else f'--{name}') in out and squeeze(comment) in out


@pytest.mark.parametrize('flag', ['-h', '--help'])
def test_help_lists_the_commands(flag, run):
    code, out, err = run(flag)
    assert code == 0 and err == '' and 'usage: prunebook COMMAND' in out
    for n, f in COMMANDS.items(): assert n in out and f.__doc__ in out


def test_the_folder_of_the_package_is_not_needed(folders, run, tmp_path, monkeypatch):
    "Relative paths, from another folder."
    monkeypatch.chdir(tmp_path)
    os.symlink(folders['dense'], tmp_path/'model')
    code, _, err = run('prune', 'model', '--out', 'small', '--text', 'random', '--n', '2', '--seqlen', '16')
    assert code == 0, err
    assert run('inspect', 'small')[0] == 0 and Path('small/plan.json').exists()

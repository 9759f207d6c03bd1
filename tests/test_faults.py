"""What can go wrong, tried on every command. The page "What can go wrong" is made of the marks of these tests."""
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
import yaml
from helpers import tiny_model
from killing import forked
from tqdm.auto import tqdm

from prunebook import bench as bench_module, cli
from prunebook.bench import bench, compare, read_grid
from prunebook.cli import COMMANDS, main
from prunebook.couplings import couplings, slice_units
from prunebook.models import verify
from prunebook.plan import PrunePlan
from prunebook.save import load_pruned, save_pruned

pytestmark = pytest.mark.usefixtures('one_thread', 'home')
needs_fork = pytest.mark.skipif(not hasattr(os, 'fork') or not Path('/proc/self/fd').exists(), reason='processes are forked, and looked at in /proc')
RANDOM = ['--text', 'random', '--n', '1', '--seqlen', '8', '--dtype', 'float32']


@pytest.fixture(scope='module')
def models(tmp_path_factory, tiny_tokenizer):
    "Folder with a dense model, `dense`."
    root = tmp_path_factory.mktemp('models')
    tiny_model('llama').save_pretrained(root/'dense')
    tiny_tokenizer.save_pretrained(root/'dense')
    return root


def prune(model, out, *options): return ['prune', *map(str, (model, '--out', out, *RANDOM, *options))]


def names(folder): return sorted(p.name for p in Path(folder).iterdir() if not p.name.endswith('.lock'))


# ---- killed ---------------------------------------------------------------------------------------------------------

def left(root):
    "What is below `root`: contents by name, without what is random in names."
    name = lambda p: re.sub(r'-[0-9a-f]{8}(?![0-9a-f])|-\d+', '-', str(p.relative_to(root)))
    return tuple(sorted((name(p), p.read_bytes() if p.is_file() else None) for p in root.rglob('*')))


def killed_everywhere(run, root, check):
    "Kill `run` before, and in the middle of, each of its file operations below `root`; `check` what each leaves, once if it is the same."
    start, seen = root.with_name('start'), set()
    shutil.copytree(root, start)
    code, operations = forked(run, root)
    assert code == 0 and len(operations) > 2, operations
    for n, what in enumerate(operations):
        for torn in (False, True)[:1 + what.endswith('write')]:
            shutil.rmtree(root)
            shutil.copytree(start, root)
            assert forked(run, root, n, torn)[0] == -signal.SIGKILL
            if (state := left(root)) in seen: continue
            seen.add(state)
            try: check()
            except BaseException as e: raise AssertionError(f'killed {"in" if torn else "before"} operation {n}, {what}: {names(root)}') from e
    return operations


@needs_fork
def test_a_run_that_is_killed_while_it_draws_a_bar_stops_no_other():
    "As the killed run of a pool of threads did, which held the lock of tqdm: the next run waited for ever."
    def killed():
        tqdm.get_lock().acquire()
        os.kill(os.getpid(), signal.SIGKILL)
    def draws():
        signal.alarm(20)
        return sum(tqdm(range(3))) - 3
    tqdm.get_lock()                                        # made before the fork, so that both have the same one
    assert forked(killed)[0] == -signal.SIGKILL
    assert forked(draws)[0] == 0


@needs_fork
@pytest.mark.fault('`prune` is killed before, or in the middle of, any file operation', 'There is no folder, or the whole new one. The next run succeeds and removes what was left beside it.')
def test_killed_on_the_way_to_a_new_folder(models, tmp_path):
    root, out = tmp_path/'root', tmp_path/'root'/'small'
    root.mkdir()
    run = lambda *extra: main(prune(models/'dense', out, '--method', 'magnitude', *extra))
    assert main(prune(models/'dense', tmp_path/'warm', '--method', 'magnitude')) == 0         # imports what forked processes need
    def check():
        new = out.exists()
        assert not new or verify(out) == []
        assert forked(lambda: run(*['--force'][:new]))[0] == 0
        assert verify(out) == [] and names(root) == ['small']
    killed_everywhere(run, root, check)


@needs_fork
@pytest.mark.fault('`prune --force` is killed before, or in the middle of, any file operation', 'The old folder is there, or the new one, whole. The next run succeeds and removes what was left beside it.')
def test_killed_while_replacing(models, tmp_path):
    root, out = tmp_path/'root', tmp_path/'root'/'small'
    root.mkdir()
    assert main(prune(models/'dense', out, '--method', 'magnitude', '--sparsity', '.1')) == 0
    run = lambda: main(prune(models/'dense', out, '--method', 'magnitude', '--sparsity', '.3', '--force'))
    seen = set()
    def check():
        assert verify(out) == []
        seen.add(PrunePlan.load(out/'plan.json').sparsity)
        assert forked(run)[0] == 0
        assert verify(out) == [] and names(root) == ['small'] and PrunePlan.load(out/'plan.json').sparsity == .3
    killed_everywhere(run, root, check)
    assert seen == {.1, .3}


LOGS = dict(bonsai=dict(evaluations=8), surgeon=dict(shots=2, rounds=1), recipe=dict(shares=[.5]))

@needs_fork
@pytest.mark.parametrize('method', LOGS)
@pytest.mark.fault('A run with a `log` is killed while it writes there', 'The same command goes on, and ends with the plan of a run that nobody killed.')
def test_killed_while_keeping_a_log(method, models, tmp_path):
    root, settings = tmp_path/'root', LOGS[method]
    root.mkdir()
    command = lambda out, file: main(prune(models/'dense', out, '--force', '--method', method, '--settings', json.dumps(settings), '--log', file))
    assert command(tmp_path/'whole', tmp_path/'other') == 0
    kept = lambda folder: PrunePlan.load(folder/'plan.json').kept
    def check():
        assert forked(lambda: command(tmp_path/'small', root/'file'))[0] == 0
        assert kept(tmp_path/'small') == kept(tmp_path/'whole') and names(root) == ['file']
    killed_everywhere(lambda: command(tmp_path/'small', root/'file'), root, check)


@pytest.fixture
def grid(models, tmp_path):
    "A grid of two cells."
    windows = dict(text='passages', n=1, seqlen=16)
    content = dict(model=str(models/'dense'), calibration=windows, evaluation=[windows], sparsities=[.2], seeds=[0], speed=0, methods=dict(magnitude={}))
    (tmp_path/'grid.yml').write_text(yaml.safe_dump(content))
    return tmp_path/'grid.yml'


def in_process(command, **kw):
    "Measure a cell here instead of in a process of its own."
    bench_module.one_cell(*command[3:])
    return subprocess.CompletedProcess(command, 0, '', '')


@needs_fork
@pytest.mark.fault('`bench` is killed before, or in the middle of, any file operation', 'A result is whole or not there. The same command measures what is missing and removes what was left.')
def test_killed_while_measuring(grid, tmp_path):
    root = tmp_path/'root'
    root.mkdir()
    run, said = lambda: len(bench(grid, root, run=in_process)), tmp_path/'said'
    def check():
        for p in root.glob('*.json'): json.loads(p.read_text())
        assert forked(run, log=said)[0] == 0, said.read_text()
        assert names(root) == ['dense.json', 'magnitude-0.2-0.json']
    killed_everywhere(run, root, check)


@needs_fork
@pytest.mark.fault('`eval`, `inspect` and `verify` read a folder', 'They write nothing there.')
def test_reading_does_not_write(models, tmp_path, monkeypatch):
    shutil.copytree(models, tmp_path/'models')
    assert main(prune(models/'dense', tmp_path/'models'/'small')) == 0
    monkeypatch.chdir(tmp_path/'models')
    for name in ('dense', 'small'):
        for command in (['eval', name, '--text', 'passages', '--n', '1', '--seqlen', '16'], ['inspect', name], ['verify', 'small']):
            assert forked(lambda: main(command), tmp_path/'models') == (0, []), command


# ---- interrupted ----------------------------------------------------------------------------------------------------

STAGES = dict(load='prunebook.cli._load', prune='prunebook.pruning.prune', save='prunebook.save._write_model')

@pytest.mark.skipif(os.name == 'nt', reason='there a signal to oneself ends the process')
@pytest.mark.parametrize('stage', STAGES)
@pytest.mark.parametrize('number, code, word', [(signal.SIGINT, 130, 'Interrupted'), (signal.SIGTERM, 143, 'Terminated')])
@pytest.mark.fault('Ctrl-C or SIGTERM ends `prune`', 'Exit code 130 or 143. What is at `--out` is as it was, nothing is left beside it, and the message says what is there.')
def test_signals(stage, number, code, word, models, tmp_path, monkeypatch, capsys):
    def end(*a, **kw): os.kill(os.getpid(), number); time.sleep(5)
    if signal.getsignal(number) == signal.SIG_IGN: signal.signal(number, signal.default_int_handler)  # started in the background
    old, handler = tmp_path/'old', signal.getsignal(number)
    assert main(prune(models/'dense', old)) == 0
    capsys.readouterr()
    with monkeypatch.context() as m:
        m.setattr(STAGES[stage], end)
        assert main(prune(models/'dense', tmp_path/'new')) == code
        said = capsys.readouterr().err.splitlines()[-1]
        assert word in said and f'nothing was left at {tmp_path/"new"}' in said
        before = cli._mark(old)
        assert main(prune(models/'dense', old, '--force')) == code
        assert f'{old} is as it was' in capsys.readouterr().err
    assert cli._mark(old) == before and verify(old) == [] and [n for n in names(tmp_path) if n != 'home'] == ['old']
    assert signal.getsignal(number) == handler


@pytest.mark.fault('Ctrl-C comes when cleaning up is no longer possible', 'The message does not say that nothing was left: it names what is there.')
def test_what_is_left_is_named(models, tmp_path, monkeypatch, capsys):
    def interrupt(*a, **kw): raise KeyboardInterrupt
    monkeypatch.setattr('prunebook.save._write_model', interrupt)
    monkeypatch.setattr('shutil.rmtree', lambda *a, **kw: None)
    assert main(prune(models/'dense', tmp_path/'new')) == 130
    said = capsys.readouterr().err.splitlines()[-1]
    left = [n for n in names(tmp_path) if n.startswith('.new-')]
    assert left and left[0] in said and 'nothing was left' not in said


def children(pid): return [int(p) for t in Path(f'/proc/{pid}/task').iterdir() for p in (t/'children').read_text().split()]


def alive(pid):
    try: return Path(f'/proc/{pid}/stat').read_text().split(') ')[1][0] != 'Z'
    except OSError: return False


@pytest.mark.skipif(not Path(f'/proc/{os.getpid()}/task/{os.getpid()}/children').exists(), reason='looks for processes in /proc')
@pytest.mark.fault('SIGTERM ends `bench` while a cell is measured', 'Exit code 143. The process of the cell is ended too; finished results stay.')
def test_ending_a_bench_ends_its_cells(grid, tmp_path):
    code = f'import sys, time; from prunebook import bench, cli; bench._CELL = "import time; time.sleep(60)"; sys.exit(cli.main(["bench", {str(grid)!r}, "--out", {str(tmp_path/"out")!r}]))'
    p = subprocess.Popen([sys.executable, '-c', code], stderr=subprocess.PIPE, text=True)
    while not (cells := children(p.pid)): time.sleep(.05)
    p.terminate()
    said = p.communicate(timeout=60)[1]
    assert p.returncode == 143 and 'Terminated; its cells were ended' in said and 'Traceback' not in said
    assert not any(map(alive, cells))


# ---- several processes ----------------------------------------------------------------------------------------------

@needs_fork
@pytest.mark.fault('Two runs write to one `--out` at the same time', 'The second is refused before it loads anything.')
def test_two_runs_into_one_folder(models, tmp_path, monkeypatch, capsys):
    from prunebook.models import reserved_folder
    def hold():
        with reserved_folder(tmp_path/'small'):
            (tmp_path/'ready').touch()
            while not (tmp_path/'go').exists(): time.sleep(.01)
            raise KeyboardInterrupt
    holder = threading.Thread(target=forked, args=(hold,))
    holder.start()
    while not (tmp_path/'ready').exists(): time.sleep(.01)
    monkeypatch.setattr(cli, '_load', lambda *a, **kw: pytest.fail('work was begun'))
    try: assert main(prune(models/'dense', tmp_path/'small')) == 2
    finally: (tmp_path/'go').touch(); holder.join()
    assert str(tmp_path/'small') in capsys.readouterr().err.splitlines()[-1]


@needs_fork
@pytest.mark.fault('`torchrun` starts a command in several processes', 'They share the work of a method that can be shared. The first saves and prints; the others end quietly with exit code 0.')
def test_several_processes(models, tmp_path):
    out, said = tmp_path/'small', tmp_path/'said'
    job = dict(WORLD_SIZE='2', MASTER_ADDR='localhost', MASTER_PORT='29511')
    rank = lambda n, *command: forked(lambda: main(list(command)), environment=dict(job, RANK=str(n)), log=said)[0]
    command = prune(models/'dense', out, '--method', 'magnitude')
    assert rank(1, *command) == 0 and not out.exists() and 'error' not in said.read_text() and 'Saved' not in said.read_text()
    assert rank(0, *command) == 0 and verify(out) == [] and 'Saved in' in said.read_text()
    assert rank(1, *command) == 0 and verify(out) == []                                       # it does not mind what is there
    for words in (['inspect', str(out)], ['verify', str(out)], ['eval', str(out), '--text', 'passages', '--n', '1', '--seqlen', '16']):
        assert rank(1, *words) == 0 and said.read_text() == ''
        assert rank(0, *words) == 0 and said.read_text() != ''


# ---- the place of the result ----------------------------------------------------------------------------------------

@pytest.fixture
def untouched(monkeypatch):
    "Fail if a model is loaded."
    monkeypatch.setattr(cli, '_load', lambda *a, **kw: pytest.fail('work was begun'))


def disk(folder, *options):
    "Mount a small file system; skips the test where that is not permitted."
    folder.mkdir()
    try: r = subprocess.run(['mount', '-t', 'tmpfs', '-o', ','.join(options), 'tmpfs', str(folder)], capture_output=True)
    except OSError: pytest.skip('there is no program `mount`')
    if r.returncode: pytest.skip('mounting is not permitted')


@pytest.fixture
def small_disk(tmp_path):
    "A file system with 64 KiB."
    disk(tmp_path/'disk', 'size=64k')
    yield tmp_path/'disk'
    subprocess.run(['umount', '-l', tmp_path/'disk'])


@pytest.fixture
def read_only(tmp_path):
    disk(tmp_path/'disk', 'ro')
    yield tmp_path/'disk'
    subprocess.run(['umount', '-l', tmp_path/'disk'])


@pytest.mark.fault('The disk of `--out` is too small', 'Refused before anything is loaded.')
def test_full_disk(models, small_disk, untouched, capsys):
    assert main(prune(models/'dense', small_disk/'small')) == 2
    assert 'MiB' in capsys.readouterr().err.splitlines()[-1] and names(small_disk) == []


@pytest.mark.fault('The disk fills up while the model is pruned', 'The model is kept in another place, which the message names.')
def test_disk_fills_up(models, small_disk, tmp_path, monkeypatch, capsys):
    prune_all = cli._pruned
    def fill(*a, **kw):
        f = os.open(small_disk/'filler', os.O_WRONLY | os.O_CREAT)
        try:
            while True: os.write(f, b'x'*4096)
        except OSError: os.close(f)
        return prune_all(*a, **kw)
    monkeypatch.setattr(cli, '_pruned', fill)
    monkeypatch.setattr(cli, 'needed_bytes', lambda *a: 0)
    assert main(prune(models/'dense', small_disk/'small')) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    kept = [p for p in map(Path, said.replace('. ', ' ').rstrip('.').split()) if p.is_absolute() and (p/'plan.json').exists()]
    assert len(kept) == 1 and verify(kept[0]) == [] and names(small_disk) == ['filler'], said


@pytest.mark.fault('The disk of a `log` is full', 'One sentence and exit code 2.')
def test_log_on_a_full_disk(models, small_disk, tmp_path, capsys):
    (small_disk/'filler').write_bytes(b'x'*os.statvfs(small_disk).f_bavail*os.statvfs(small_disk).f_bsize)
    assert main(prune(models/'dense', tmp_path/'small', '--method', 'bonsai', '--settings', json.dumps(dict(evaluations=8)), '--log', small_disk/'log')) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith('error: ') and not (tmp_path/'small').exists()


def unwritable(tmp_path): return dict(file=tmp_path/'a file'/'small', long=tmp_path/('x'*300))


@pytest.mark.parametrize('where', ['file', 'long'])
@pytest.mark.fault('`--out` cannot be made: read-only, a name too long, a parent that is a file', 'Refused before anything is loaded or measured. The same for `log` and the results of `bench`.')
def test_places_that_cannot_be(where, models, tmp_path, grid, untouched, capsys):
    (tmp_path/'a file').touch()
    place = unwritable(tmp_path)[where]
    commands = [prune(models/'dense', place), ['bench', str(grid), '--out', str(place)]]
    commands += [prune(models/'dense', tmp_path/'x', '--method', m, '--log', place) for m in LOGS]
    for command in commands:
        assert main(command) == 2, command
        assert capsys.readouterr().err.splitlines()[-1].startswith('error: ')
    assert [n for n in names(tmp_path) if n != 'home'] == ['a file', 'grid.yml']


@pytest.mark.fault('`--out` cannot be made: read-only, a name too long, a parent that is a file', 'Refused before anything is loaded or measured. The same for `log` and the results of `bench`.')
def test_read_only_places(models, read_only, tmp_path, grid, untouched):
    for command in (prune(models/'dense', read_only/'small'), ['bench', str(grid), '--out', str(read_only)]): assert main(command) == 2
    assert main(prune(models/'dense', tmp_path/'x', '--method', 'recipe', '--log', read_only/'log')) == 2


@pytest.mark.parametrize('what', ['thesis', 'input', 'above', 'more'])
@pytest.mark.fault('`--force` names a folder that is not ours, has a file of somebody else, or holds the model that is read', 'Refused before anything is loaded; nothing is deleted.')
def test_force_spares_what_is_not_ours(what, models, tmp_path, monkeypatch, capsys):
    shutil.copytree(models, tmp_path/'models')
    (tmp_path/'thesis').mkdir()
    (tmp_path/'thesis'/'thesis.tex').write_text('ten years')
    assert main(prune(models/'dense', tmp_path/'ours')) == 0
    (tmp_path/'ours'/'notes.txt').write_text('mine')
    place = tmp_path/dict(thesis='thesis', input='models/dense', above='models', more='ours')[what]
    before = {p: p.read_bytes() for p in tmp_path.rglob('*') if p.is_file() and p.suffix != '.lock'}
    monkeypatch.setattr(cli, '_load', lambda *a, **kw: pytest.fail('work was begun'))
    assert main(prune(tmp_path/'models'/'dense', place, '--force')) == 2
    assert str(place) in capsys.readouterr().err.splitlines()[-1]
    assert {p: p.read_bytes() for p in tmp_path.rglob('*') if p.is_file() and p.suffix != '.lock'} == before


# ---- code in a folder -----------------------------------------------------------------------------------------------

def pruned_with_file(models, folder, tokenizer):
    "A folder of ours that needs its modelling file."
    model = tiny_model('llama')
    save_pruned(slice_units(model, {c.name: [i for i in range(16) if i % 8 < 5] for c in couplings(model, 'value_channel')}), None, folder, tokenizer)


class Trap:
    "A pickle that runs code."
    def __init__(self, path): self.path = str(path)

    def __reduce__(self): return open, (self.path, 'w')


def config_of(folder, name='config.json', **changes):
    path = Path(folder)/name
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def trapped(kind, folder, models, tokenizer, sprung):
    "A folder with code that touches the file `sprung` when it is run."
    source = f'open({str(sprung)!r}, "w")\nfrom transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast\nclass TrapConfig(LlamaConfig): model_type = "trap"\nclass Trap(LlamaForCausalLM): config_class = TrapConfig\nclass TrapTokenizer(PreTrainedTokenizerFast): pass\n'
    if kind == 'ours': pruned_with_file(models, folder, tokenizer)
    else: shutil.copytree(models/'dense', folder)
    (folder/('modeling_pruned.py' if kind == 'ours' else 'trap.py')).write_text(source)
    if kind == 'ours': (folder/'modeling_pruned.py').write_text(source + 'PrunedLlamaForCausalLM = Trap\n')
    if kind == 'foreign': config_of(folder, model_type='trap', auto_map={'AutoConfig': 'trap.TrapConfig', 'AutoModelForCausalLM': 'trap.Trap'})
    if kind == 'known type': config_of(folder, auto_map={'AutoModelForCausalLM': 'trap.Trap'})
    if kind == 'tokenizer': config_of(folder, 'tokenizer_config.json', tokenizer_class='TrapTokenizer', auto_map={'AutoTokenizer': [None, 'trap.TrapTokenizer']})
    if kind == 'pickle':
        (folder/'model.safetensors').unlink()
        torch.save(Trap(sprung), folder/'pytorch_model.bin')
    if kind == 'ours':
        from prunebook.models import write_manifest
        write_manifest(folder)                             # whoever lays a trap can write the list of files too


@pytest.fixture
def modules(tmp_path, monkeypatch):
    "A place of our own for code that `transformers` copies before it runs it."
    monkeypatch.setattr('transformers.dynamic_module_utils.HF_MODULES_CACHE', str(tmp_path/'modules'))
    monkeypatch.setattr('sys.path', list(sys.path))


@pytest.mark.parametrize('kind', ['ours', 'foreign', 'known type', 'tokenizer', 'pickle'])
@pytest.mark.fault('A model folder holds code: a modelling file, a tokenizer, a pickle', 'No command runs it. Code of a foreign model runs only with `--trust-remote-code`, and that of a tokenizer never.')
def test_no_code_runs_unasked(kind, models, tmp_path, tiny_tokenizer, modules, grid, capsys):
    folder, sprung = tmp_path/'trap', tmp_path/'sprung'
    trapped(kind, folder, models, tiny_tokenizer, sprung)
    if kind == 'ours': load_pruned(folder, device='cpu')
    content = yaml.safe_load(grid.read_text())
    grid.write_text(yaml.safe_dump({**content, 'model': str(folder)}))
    commands = [['inspect', str(folder)], ['eval', str(folder), '--text', 'passages', '--n', '1', '--seqlen', '16'], prune(folder, tmp_path/'small'), ['verify', str(folder)]]
    for command in commands:
        assert main(command) in (0, 1, 2), command
        assert not sprung.exists(), command
    if kind == 'ours': assert main(commands[0]) == 0
    if kind == 'foreign':
        capsys.readouterr()
        assert main(commands[0]) == 2 and '--trust-remote-code' in capsys.readouterr().err.splitlines()[-1]
    try: bench(grid, tmp_path/'out', run=in_process)
    except (ValueError, OSError): pass
    assert not sprung.exists()
    assert main([*commands[1], '--trust-remote-code']) == (2 if kind in ('tokenizer', 'pickle') else 0)
    assert sprung.exists() == (kind in ('foreign', 'known type'))


@pytest.mark.fault('A `log` was written by somebody else, damaged, or laid as a trap', 'One sentence and exit code 2; nothing in it is run.')
def test_damaged_logs(models, tmp_path, capsys):
    sprung, file = tmp_path/'sprung', tmp_path/'file'
    def trap():
        torch.save(Trap(sprung), file)
    texts = [b'', b'{"key": 5}', b'[]', b'null', b'5', b'{"key": {}}\n', b'\xff\xfe\x00', b'{"key": {}, "probes": 5}', b'['*10**5, b'{"bonsai": 1}\n{"round": 0}\n']
    for method, settings in LOGS.items():
        for content in [*texts, trap, lambda: torch.save([1], file), lambda: torch.save(dict(key=5), file), lambda: torch.save(dict(key={}, weights=5), file)]:
            content() if callable(content) else file.write_bytes(content)
            code = main(prune(models/'dense', tmp_path/'small', '--force', '--method', method, '--settings', json.dumps(settings), '--log', file))
            said = capsys.readouterr().err.splitlines()[-1]
            assert code == 2 and str(file) in said or content == b'' and code in (0, 2), (method, content, said)
            assert not sprung.exists()
            file.unlink()


# ---- damaged files and wrong values ---------------------------------------------------------------------------------

JUNK = [None, True, 0, -1, 5, 2.5, 'x', [], [None], {}, {'a': 1}]


def quiet(command, capsys, codes=(0, 2)):
    "Run a command that may fail with a sentence, but not by a bug; the exit code."
    code = main(list(map(str, command)))
    out, err = capsys.readouterr()
    assert code in codes, (command, err[-2000:])
    assert 'Traceback' not in err and (code == 0 or err.splitlines()[-1].startswith('error: '))
    return code


@pytest.mark.fault('`config.json` is damaged', 'One sentence and exit code 2, unless the value does not matter.')
def test_damaged_configurations(models, tmp_path, capsys):
    shutil.copytree(models/'dense', tmp_path/'m')
    path = tmp_path/'m'/'config.json'
    good = json.loads(path.read_text())
    for content in ('', '[]', 'null', '5', '{}', '{"model_type": 5}', '{"model_type": "llama"', '['*10**5, '"llama"', '{"model_type": "llama", "num_attention_heads": 0}', '\x00'):
        path.write_text(content)
        assert quiet(['inspect', tmp_path/'m'], capsys) == 2, content
    for key in good:
        for value in JUNK:
            path.write_text(json.dumps({**good, key: value}))
            quiet(['inspect', tmp_path/'m'], capsys)


@pytest.mark.parametrize('ours', [False, True])
@pytest.mark.fault('Weights, tokenizer or plan are cut short, empty, or junk', 'One sentence and exit code 2; `verify` names the file.')
def test_damaged_files(ours, models, tmp_path, tiny_tokenizer, capsys):
    if ours: pruned_with_file(models, tmp_path/'good', tiny_tokenizer)
    else: shutil.copytree(models/'dense', tmp_path/'good')
    for name in ['model.safetensors', 'tokenizer.json', 'tokenizer_config.json', *['modeling_pruned.py', 'config.json']*ours]:
        whole = (tmp_path/'good'/name).read_bytes()
        flipped = bytearray(whole)
        flipped[len(whole)//2] ^= 1
        for how, content in dict(short=whole[:len(whole)//2], empty=b'', junk=b'\xff'*100, list=b'[]', flipped=bytes(flipped)).items():
            shutil.copytree(tmp_path/'good', tmp_path/'m')
            (tmp_path/'m'/name).write_bytes(content)
            for command in (['inspect', tmp_path/'m'], ['eval', tmp_path/'m', '--text', 'passages', '--n', 1, '--seqlen', 16], prune(tmp_path/'m', tmp_path/'small', '--force')):
                code = quiet(command, capsys)
                if name == 'model.safetensors' and how != 'flipped': assert code == 2, (how, command)
            if ours:
                assert main(['verify', str(tmp_path/'m')]) == 1
                assert name in capsys.readouterr().out, (name, how)
            shutil.rmtree(tmp_path/'m')


@pytest.mark.fault('A bit flips in a saved folder', '`verify` says in which file, with exit code 1.')
def test_verify(models, tmp_path, capsys):
    assert main(prune(models/'dense', tmp_path/'small')) == 0
    capsys.readouterr()
    assert main(['verify', str(tmp_path/'small')]) == 0 and capsys.readouterr().out == f'{tmp_path/"small"} is whole.\n'
    weights = bytearray((tmp_path/'small'/'model.safetensors').read_bytes())
    weights[-5] ^= 4
    (tmp_path/'small'/'model.safetensors').write_bytes(weights)
    assert main(['verify', str(tmp_path/'small')]) == 1 and 'model.safetensors' in capsys.readouterr().out
    assert main(['verify', str(models/'dense')]) in (1, 2) and main(['verify', str(tmp_path/'nothing')]) in (1, 2)


@pytest.mark.fault('A setting has a value or a type that it cannot have', 'One sentence and exit code 2, before anything is loaded.')
def test_settings_of_wrong_types(tmp_path, monkeypatch, capsys):
    from prunebook.methods import MODULES, as_method, configured
    def loaded(*a, **kw): raise ValueError('the model was loaded')
    monkeypatch.setattr(cli, '_load', loaded)
    monkeypatch.chdir(tmp_path)
    junk = [*JUNK, float('nan'), 10**400, '\x00']
    for i, (name, key) in enumerate((name, key) for name in MODULES for key in as_method(name).settings()):
        for value in junk:
            try: configured(name, {key: value})
            except ValueError as e: assert str(e)
        quiet(['prune', 'm', '--out', tmp_path/'x', '--method', name, '--settings', json.dumps({key: junk[i%len(junk)]})], capsys, (2,))
    for method, settings in dict(recipe='{"units": 5}', fasp='{"restore": 5}', flap='{"units": [5]}').items():
        quiet(['prune', 'm', '--out', tmp_path/'x', '--method', method, '--settings', settings], capsys, (2,))
        main(['prune', 'm', '--out', str(tmp_path/'x'), '--method', method, '--settings', settings])
        assert 'loaded' not in capsys.readouterr().err, settings


def nodes(x, path=()):
    "Paths of all values in nested dicts and lists."
    yield path
    for k, v in x.items() if isinstance(x, dict) else enumerate(x) if isinstance(x, list) else ():
        yield from nodes(v, (*path, k))


def replaced(x, path, value):
    if not path: return value
    k, *rest = path
    if isinstance(x, dict): return {**x, k: replaced(x[k], rest, value)}
    return [*x[:k], replaced(x[k], rest, value), *x[k+1:]]


@pytest.mark.fault('A grid has a value or a type that it cannot have', 'One sentence and exit code 2, before the first cell.')
def test_grids_of_wrong_types(grid, tmp_path, capsys):
    good = yaml.safe_load(grid.read_text())
    good['methods'] = dict(magnitude={}, cut=dict(method='fasp', settings=dict(damp=.1), sparsities=[.3], seeds=[1], calibration=dict(n=2)))
    refused = 0
    for path in nodes(good):
        for value in [*JUNK, float('nan'), {5: 5}, {'': {}}, {'a/b': {}}, {None: None}, '\x00']:
            grid.write_text(yaml.safe_dump(replaced(good, path, value)))
            try: assert all(json.dumps(c.name) for c in read_grid(grid).values())
            except ValueError as e: refused += 1; assert str(grid) in str(e), (path, value, e)
    assert refused > 250
    for content in (b'\xff\xfe', b'\x00', b'['*10**4, b'a: *b', b'? [1]\n: 2'):
        grid.write_bytes(content)
        quiet(['bench', grid, '--out', tmp_path/'out'], capsys, (2,))
    assert not (tmp_path/'out').exists()


@pytest.mark.fault('A committed result, or the new one, holds NaN or lacks a number', '`bench --check` fails.')
def test_no_number_is_no_agreement():
    record = lambda loss, share=.2: dict(true_sparsity=share, losses=dict(after=[3., loss]))
    assert compare(record(4.), record(4.001)) == [] and len(compare(record(4.), record(4.1))) == 1
    for wrong in (math.nan, math.inf, None, 'x', True):
        assert len(compare(record(4.), record(wrong))) == 1 and len(compare(record(wrong), record(4.))) == 1 and len(compare(record(wrong), record(wrong))) == 1
        assert len(compare(record(4.), record(4., share=wrong))) == 1
    for missing in ({}, dict(losses={}), dict(losses=None), dict(losses=dict(after=[])), dict(losses=5), dict(losses=dict(after=[3.])), []):
        missing = {'true_sparsity': .2, **missing} if isinstance(missing, dict) else missing
        assert compare(record(4.), missing) and compare(missing, record(4.))
    two = {**record(4.), 'other_texts': dict(passages=record(5.))}
    assert compare(two, two) == [] and len(compare(two, record(4.))) == 1 and len(compare(record(4.), two)) == 1


@pytest.mark.fault('A result of `bench` is damaged', 'It is named, and nothing is measured.')
def test_damaged_results(grid, tmp_path, capsys):
    (tmp_path/'out').mkdir()
    for content in ('', '[]', 'null', '5', '{}', '{"cell": 5}', '{"cell": []}', '['*10**5):
        (tmp_path/'out'/'dense.json').write_text(content)
        for check in ([], ['--check']):
            assert main(['bench', str(grid), '--out', str(tmp_path/'out'), *check]) == 2
            assert 'dense.json' in capsys.readouterr().err.splitlines()[-1]


# ---- bugs -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('home_is_a_file', [False, True])
@pytest.mark.fault('An error that nobody foresaw', 'It says so, names the file with the traceback, and exits with 70.')
def test_unforeseen(home_is_a_file, tmp_path, monkeypatch, capsys):
    def buggy(model:str): return 1/0
    monkeypatch.setitem(COMMANDS, 'inspect', buggy)
    if home_is_a_file: (tmp_path/'home').touch()
    assert main(['inspect', 'x']) == 70
    said = capsys.readouterr().err.strip()
    assert '\n' not in said and 'should not have happened (ZeroDivisionError' in said
    file = Path(said.split()[-1].rstrip('.'))
    text = file.read_text(encoding='utf-8')
    assert 'Traceback' in text and 'return 1/0' in text and (tmp_path/'home' in file.parents) != home_is_a_file
    monkeypatch.setenv('PRUNEBOOK_DEBUG', '1')
    with pytest.raises(ZeroDivisionError): main(['inspect', 'x'])


@pytest.mark.parametrize('error', [MemoryError(), torch.OutOfMemoryError('CUDA out of memory. Tried\nto allocate')])
@pytest.mark.fault('There is not enough memory', 'One sentence with what to take less of, and exit code 2.')
def test_out_of_memory(error, models, tmp_path, monkeypatch, capsys):
    def fail(*a, **kw): raise error
    monkeypatch.setattr('prunebook.pruning.prune', fail)
    assert main(prune(models/'dense', tmp_path/'x')) == 2
    assert 'out of memory' in capsys.readouterr().err.splitlines()[-1] and not (tmp_path/'x').exists()


@pytest.mark.fault('Output goes to a full disk or a closed pipe', 'One sentence and exit code 2.')
@pytest.mark.skipif(not Path('/dev/full').exists(), reason='there is no /dev/full')
def test_output_that_cannot_be_written(models, monkeypatch, capsys):
    with open('/dev/full', 'w') as full:
        monkeypatch.setattr('sys.stdout', full)
        assert main(['inspect', str(models/'dense')]) == 2
        monkeypatch.undo()
        try: full.close()
        except OSError: pass
    assert 'No space left' in capsys.readouterr().err


# ---- the page -------------------------------------------------------------------------------------------------------

def test_the_page_shows_the_marks_of_today():
    "Execute nbs/63_faults.ipynb again after a mark has changed."
    tests = Path(__file__).parent
    cells = json.loads((tests.parent/'nbs'/'63_faults.ipynb').read_text(encoding='utf-8'))['cells']
    sources = [''.join(c['source']) for c in cells]
    page = {}
    for source in sources:
        if source.startswith(('import ast', 'def marks')): exec(source, page)
    shown = [''.join(o['data'].get('text/markdown', '')) for c, s in zip(cells, sources) if 'Markdown(table(' in s for o in c['outputs']]
    rows = [f'| {fault} | {outcome} |' for fault, outcome in page['faults'](tests)]
    assert len(shown) == 1 and shown[0].splitlines()[2:] == rows and len(rows) > 20

"""Folders appear whole or not at all, and nothing that is not ours is ever replaced, whenever a run is stopped."""
import errno
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from prunebook import models
from prunebook.models import MANIFEST, atomic_folder, check_writable, is_complete, reserved, reserved_folder, verify, write_manifest

fork = multiprocessing.get_context('fork') if hasattr(os, 'fork') else None
needs_fork = pytest.mark.skipif(fork is None, reason='needs fork')
BOTH_WAYS = pytest.mark.parametrize('exchange', [True, False], ids=['exchange', 'two renames'])


def no_exchange(a, b): raise OSError(errno.ENOSYS, 'not on this system')


def tree(folder):
    "All that is in a folder: names, and content of files."
    return {p.relative_to(folder).as_posix(): p.read_bytes() if p.is_file() else None for p in sorted(Path(folder).rglob('*'))}


def write(folder, word):
    "Two files and a manifest."
    (folder/'sub').mkdir(parents=True, exist_ok=True)
    (folder/'weights').write_bytes(word.encode()*1000)
    (folder/'sub'/'plan').write_text(word)
    write_manifest(folder)


def word(folder): return (folder/'sub'/'plan').read_text()


@pytest.fixture
def target(tmp_path):
    "A folder of ours."
    write(tmp_path/'model', 'old')
    return tmp_path/'model'


# ---- the manifest ---------------------------------------------------------------------------------------------------

def test_verify_names_every_kind_of_damage(target):
    assert verify(target) == [] and is_complete(target, checksums=True)
    (target/'weights').write_bytes(b'old'*999 + b'olD')    # as long as before
    assert is_complete(target) and not is_complete(target, checksums=True)
    assert [p.split()[0] for p in verify(target)] == ['weights'] and 'SHA-256' in verify(target)[0]
    (target/'weights').write_bytes(b'old')
    (target/'sub'/'plan').unlink()
    (target/'sub'/'notes').touch()
    problems = verify(target)
    assert [p.split()[0] for p in problems] == ['sub/plan', 'weights', 'sub/notes'] and not is_complete(target)
    assert all(w in p for w, p in zip(('missing', '3 bytes instead of 3000', 'not listed'), problems))
    (target/MANIFEST).unlink()
    assert len(verify(target)) == 1 and MANIFEST in verify(target)[0]


def test_a_manifest_can_be_extended(target):
    (target/'report.md').write_text('better')
    assert verify(target) != []
    write_manifest(target)
    assert verify(target) == [] and 'report.md' in json.loads((target/MANIFEST).read_text())


def test_manifests_of_sizes_only_are_read(target):
    sizes = {n: v['size'] for n, v in json.loads((target/MANIFEST).read_text()).items()}
    (target/MANIFEST).write_text(json.dumps(sizes))
    assert verify(target) == [] and is_complete(target, checksums=True)
    (target/'weights').write_bytes(b'old')
    assert len(verify(target)) == 1 and not is_complete(target)
    with atomic_folder(target, overwrite=True) as tmp: write(tmp, 'new')
    assert word(target) == 'new'


@pytest.mark.parametrize('content', ['', '[]', 'null', '{"weights": null}', '{"weights": {"size": 3000}}', '{"../outside": 3}', '{"/etc/passwd": 3}', '['*100_000,
                                     '{"weights": "3000"}', '{"weights": true}', '{"weights": {"size": "x", "sha256": 5}}'])
def test_damaged_manifests_are_refused(target, content):
    (target/MANIFEST).write_text(content)
    assert not is_complete(target) and verify(target)
    if content != '{"weights": {"size": "x", "sha256": 5}}':
        with pytest.raises(FileExistsError, match='left alone'):
            with atomic_folder(target, overwrite=True): pass
    assert word(target) == 'old'


# ---- only our folders are replaced ----------------------------------------------------------------------------------

def thesis(t): (t/'thesis.tex').write_text('years'); return 'thesis.tex'


def deep(t): (t/'sub'/'a'/'b').mkdir(parents=True); (t/'sub'/'a'/'b'/'data.csv').touch(); return 'sub/a/b/data.csv'


def linked_folder(t): (t.parent/'elsewhere').mkdir(); thesis(t.parent/'elsewhere'); (t/'link').symlink_to(t.parent/'elsewhere'); return 'link'


def looks_like_a_manifest(t): (t/f'{MANIFEST}.bak').touch(); return f'{MANIFEST}.bak'


def without_manifest(t): (t/MANIFEST).unlink(); return MANIFEST


def a_link_to_ours(t): t.rename(t.with_name('real')); t.symlink_to('real'); return 'link'


def a_dangling_link(t): t.rename(t.with_name('real')); t.symlink_to('gone'); return 'link'


def a_file(t): t.rename(t.with_name('real')); t.write_text('a file'); return 'file'


@pytest.mark.parametrize('change', [thesis, deep, linked_folder, looks_like_a_manifest, without_manifest, a_link_to_ours, a_dangling_link, a_file])
def test_what_is_not_ours_is_named_and_left_alone(target, change):
    named = change(target)
    before = tree(target.parent)
    with pytest.raises(FileExistsError) as e:
        with atomic_folder(target, overwrite=True): pytest.fail('begun')
    assert named in str(e.value) and 'left alone' in str(e.value) and tree(target.parent) == before


@pytest.mark.parametrize('out,source', [('model', 'model'), ('model', 'model/sub'), ('model/sub', 'model'), ('model', 'link'), ('link/../model', 'model')])
def test_the_model_that_is_read_is_never_replaced(target, out, source, monkeypatch):
    monkeypatch.chdir(target.parent)
    write(target/'sub', 'inner')
    write_manifest(target)
    Path('link').symlink_to('model')
    before = tree(target.parent)
    with pytest.raises(FileExistsError, match='the model that is read'):
        with reserved_folder(out, overwrite=True, source=source): pytest.fail('begun')
    assert tree(target.parent) == before


def test_ours_and_empty_ones_are_replaced(target):
    with atomic_folder(target, overwrite=True, source=target.parent/'another') as tmp:
        write(tmp, 'new')
        assert word(target) == 'old'                       # until the very end
    assert word(target) == 'new' and [p.name for p in target.parent.iterdir()] == ['model']
    (target.parent/'empty').mkdir()
    with pytest.raises(FileExistsError, match='exists already'):
        with atomic_folder(target.parent/'empty'): pass
    with atomic_folder(target.parent/'empty', overwrite=True) as tmp: write(tmp, 'new')
    assert word(target.parent/'empty') == 'new'


@pytest.mark.fault('Somebody puts a file into the folder while it is being replaced', 'It is not deleted.')
def test_a_file_that_comes_during_the_work_is_not_deleted(target):
    with pytest.raises(FileExistsError, match='thesis.tex'):
        with atomic_folder(target, overwrite=True) as tmp:
            write(tmp, 'new')
            thesis(target)
    assert (target/'thesis.tex').read_text() == 'years' and [p.name for p in target.parent.iterdir()] == ['model']


@BOTH_WAYS
@pytest.mark.parametrize('error', [ValueError, KeyboardInterrupt])
def test_the_old_folder_stays_when_the_new_one_fails(target, error, exchange, monkeypatch):
    if not exchange: monkeypatch.setattr(models, '_exchange', no_exchange)
    with pytest.raises(error):
        with atomic_folder(target, overwrite=True) as tmp:
            (tmp/'new').write_text('new')
            raise error
    assert word(target) == 'old' and verify(target) == [] and list(target.parent.iterdir()) == [target]


@pytest.mark.fault('Two folders cannot be exchanged', 'The old one is put back.')
def test_the_old_folder_comes_back_when_the_new_one_cannot_take_its_place(target, monkeypatch):
    rename = Path.rename

    def fails(self, to):
        if Path(to) == target and not self.name.endswith('-old'): raise PermissionError(f'{to} is in use')
        return rename(self, to)
    monkeypatch.setattr(models, '_exchange', no_exchange)
    monkeypatch.setattr(Path, 'rename', fails)
    with pytest.raises(PermissionError):
        with atomic_folder(target, overwrite=True) as tmp: write(tmp, 'new')
    assert word(target) == 'old' and list(target.parent.iterdir()) == [target]


# ---- killed at every step -------------------------------------------------------------------------------------------

def replace_and_die(target, step, exchange):
    "Replace a folder; the system's own kill comes at file operation number `step`."
    if not exchange: models._exchange = no_exchange
    count = 0

    def audit(event, args):
        nonlocal count
        if event.split('.')[0] in ('open', 'os', 'shutil', 'ctypes', 'fcntl'):
            count += 1
            if count == step: os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(audit)
    with atomic_folder(target, overwrite=True) as tmp: write(tmp, 'new')


@needs_fork
@BOTH_WAYS
def test_killed_at_every_file_operation(tmp_path, exchange):
    "The old or the new is there, and the next run sweeps and goes on."
    seen, step, swept = [], 0, 0
    while True:
        step += 1
        target = tmp_path/str(step)/'model'
        write(target, 'old')
        p = fork.Process(target=replace_and_die, args=(target, step, exchange))
        p.start()
        p.join(60)
        assert p.exitcode in (0, -signal.SIGKILL)
        if target.exists(): assert verify(target) == []
        else: assert not exchange
        swept += len(models.leftovers(target))
        with pytest.raises(FileExistsError, match='exists already'):                      # never lost
            with atomic_folder(target): pass
        if not target.exists(): continue
        seen.append(word(target))
        with atomic_folder(target, overwrite=True) as tmp: write(tmp, 'newer')
        assert word(target) == 'newer' and verify(target) == [] and [q.name for q in target.parent.iterdir()] == ['model']
        if p.exitcode == 0: break
    assert step > 40 and swept > 20 and set(seen) == {'old', 'new'} and seen == sorted(seen, reverse=True)


@needs_fork
def test_killed_at_random_moments(tmp_path):
    "By the clock of another process, so also in the middle of a write."
    import random
    target, random_ = tmp_path/'model', random.Random(0)
    write(target, 'old')

    def forever():
        while True:
            with atomic_folder(target, overwrite=True) as tmp: write(tmp, 'new')
    for _ in range(25):
        p = fork.Process(target=forever)
        p.start()
        time.sleep(.02 + random_.random()*.05)
        p.kill()
        p.join()
        assert verify(target) == [] and word(target) in ('old', 'new')
    with atomic_folder(target, overwrite=True) as tmp: write(tmp, 'newer')
    assert [p.name for p in tmp_path.iterdir()] == ['model'] and word(target) == 'newer'


@pytest.mark.fault('A run was killed between two renames, on a system that cannot exchange folders', 'The next run brings the old folder back.')
def test_what_two_renames_leave_is_recovered(tmp_path):
    write(tmp_path/'.model-partial-01234567-old', 'old')
    write(tmp_path/'.model-partial-01234567', 'new')
    for other in ('.model-partial-01234567-more', '.other-partial-01234567', '.model-partial', 'model-partial-01234567', '.model-partial-x-partial-01234567'):
        write(tmp_path/other, 'kept')
    with pytest.raises(FileExistsError, match='exists already'):
        with atomic_folder(tmp_path/'model'): pass
    assert word(tmp_path/'model') == 'old' and sum(word(p) == 'kept' for p in tmp_path.iterdir()) == 5 and len(list(tmp_path.iterdir())) == 6


# ---- one run at a time ----------------------------------------------------------------------------------------------

def hold(target, ready, go):
    with reserved_folder(target, overwrite=True):
        ready.set()
        go.wait(60)


@needs_fork
@pytest.mark.parametrize('end', ['leaves', 'is killed'])
def test_a_second_run_is_refused_at_once(tmp_path, end):
    target, ready, go = tmp_path/'model', fork.Event(), fork.Event()
    p = fork.Process(target=hold, args=(target, ready, go))
    p.start()
    assert ready.wait(60)
    start = time.time()
    with pytest.raises(BlockingIOError, match='Another run is writing to .*model'):
        with atomic_folder(target): pass
    assert time.time() - start < 5
    if end == 'leaves': go.set()
    else: p.kill()
    p.join(60)
    with atomic_folder(target) as tmp: write(tmp, 'new')
    assert word(target) == 'new' and list(tmp_path.iterdir()) == [target]


def test_the_holder_may_save_and_another_thread_may_not(tmp_path):
    target, refused = tmp_path/'model', []

    def other():
        try:
            with reserved_folder(target): pass
        except BlockingIOError as e: refused.append(e)
    with reserved_folder(target):
        assert reserved(target) and not reserved(tmp_path/'another')
        t = threading.Thread(target=other)
        t.start()
        t.join()
        with atomic_folder(target) as tmp: write(tmp, 'new')
        assert reserved(target)
    assert len(refused) == 1 and word(target) == 'new' and not reserved(target) and list(tmp_path.iterdir()) == [target]


@needs_fork
def test_lock_files_that_come_and_go_still_exclude(tmp_path):
    "Many processes take the lock for a moment, again and again; two are never inside together."
    def work(seed):
        end, inside = time.time() + 2, 0
        while time.time() < end:
            try:
                with models._locked(tmp_path/'model'):
                    os.close(os.open(tmp_path/'inside', os.O_CREAT | os.O_EXCL))           # fails if another is inside
                    os.unlink(tmp_path/'inside')
                    inside += 1
            except BlockingIOError: pass
        os._exit(0 if inside else 3)
    ps = [fork.Process(target=work, args=(i,)) for i in range(4)]
    for p in ps: p.start()
    for p in ps: p.join(60)
    assert {p.exitcode for p in ps} <= {0, 3} and 0 in {p.exitcode for p in ps} and not list(tmp_path.iterdir())


def test_a_parent_that_vanishes_before_the_lock(tmp_path, monkeypatch):
    vanish = iter([True, True])
    class Lock(models.FileLock):
        def acquire(self, **kw):
            if next(vanish, False): raise FileNotFoundError(errno.ENOENT, 'gone')
            return super().acquire(**kw)
    monkeypatch.setattr(models, 'FileLock', Lock)
    with reserved_folder(tmp_path/'out'/'model') as place: assert reserved(place) and next(vanish, None) is None
    assert not list(tmp_path.iterdir())


def test_writing_is_tried_without_the_parents(tmp_path, monkeypatch):
    seen, fsync = [], os.fsync
    monkeypatch.setattr(os, 'fsync', lambda f: (seen.append(list(tree(tmp_path))), fsync(f)))
    check_writable(tmp_path/'out'/'deep'/'log')
    assert [n.split('/', 1)[1] for n in seen[0] if '/' in n] == ['out', 'out/deep', 'out/deep/log'] and not list(tmp_path.iterdir())


# ---- the place is tried before the work -----------------------------------------------------------------------------

def mounted(folder, *options):
    "Mount a file system, or skip the test where that is not allowed."
    folder.mkdir(exist_ok=True)
    if sys.platform != 'linux' or subprocess.run(['mount', *options, str(folder)], capture_output=True).returncode: pytest.skip('cannot mount')


@pytest.fixture
def small_disk(tmp_path):
    mounted(tmp_path/'disk', '-t', 'tmpfs', '-o', 'size=1m', 'tmpfs')
    yield tmp_path/'disk'
    subprocess.run(['umount', '-l', str(tmp_path/'disk')], check=True)


@pytest.fixture
def read_only(small_disk):
    write(small_disk/'ours', 'old')
    subprocess.run(['mount', '-o', 'remount,ro', str(small_disk)], check=True)
    return small_disk


def refuses(f, *words):
    with pytest.raises(OSError) as e: f()
    assert all(w in str(e.value) for w in words) and '\n' not in str(e.value) and 'Errno' not in str(e.value)


def reserve(*args, **kw):
    with reserved_folder(*args, **kw): pytest.fail('begun')


def test_a_full_disk(small_disk):
    refuses(lambda: reserve(small_disk/'a'/'model', needed=2**21), 'MiB left', '2')
    assert list(small_disk.iterdir()) == []
    with pytest.raises(OSError), atomic_folder(small_disk/'model') as tmp: (tmp/'weights').write_bytes(bytes(2**21))
    assert list(small_disk.iterdir()) == []
    rest = os.open(small_disk/'rest', os.O_CREAT | os.O_WRONLY)
    with pytest.raises(OSError):
        while True: os.write(rest, bytes(4096))
    os.close(rest)
    refuses(lambda: reserve(small_disk/'model'), 'No space left', 'choose another place')
    refuses(lambda: check_writable(small_disk/'log'), 'No space left')
    assert [p.name for p in small_disk.iterdir()] == ['rest']


def test_a_read_only_disk(read_only):
    before = tree(read_only)
    for name in ('model', 'deep/model', 'ours'): refuses(lambda: reserve(read_only/name, overwrite=True), 'Read-only', name)
    refuses(lambda: check_writable(read_only/'log'), 'Read-only')
    refuses(lambda: check_writable(read_only/'ours'/'weights'), 'cannot be written')
    assert tree(read_only) == before


@pytest.mark.parametrize('name,words', [('file/model', 'is a file'), ('file/deep/model', 'cannot be'), ('x'*300, 'too long'), ('x'*235, 'too long'),
                                        ('é'*120, 'too long'), ('deep/' + 'x'*300, 'too long'), ('a\0b', 'null')])
def test_places_that_cannot_be(tmp_path, name, words):
    (tmp_path/'file').write_text('a file')
    refuses(lambda: reserve(f'{tmp_path}/{name}', overwrite=True), words)
    if name not in ('x'*235, 'é'*120): refuses(lambda: check_writable(f'{tmp_path}/{name}'), words)
    assert [p.name for p in tmp_path.iterdir()] == ['file'] and (tmp_path/'file').read_text() == 'a file'


def test_special_places(tmp_path, monkeypatch):
    refuses(lambda: reserve('/', overwrite=True), '/')
    refuses(lambda: check_writable(tmp_path), 'is a folder')
    monkeypatch.chdir(tmp_path)
    (tmp_path/'file').touch()
    for here in ('.', '', '../' + tmp_path.name): refuses(lambda: reserve(here, overwrite=True), 'file', 'left alone')
    with atomic_folder('new [1] *') as tmp: write(tmp, 'new')                              # a name that a shell would not take
    check_writable('log')
    check_writable('file')
    assert sorted(p.name for p in tmp_path.iterdir()) == ['file', 'new [1] *'] and word(Path('new [1] *')) == 'new'


def test_parents_are_made_and_taken_away(tmp_path):
    with pytest.raises(ZeroDivisionError), reserved_folder(tmp_path/'a'/'b'/'model'): 1/0
    check_writable(tmp_path/'a'/'log')
    assert list(tmp_path.iterdir()) == []
    with atomic_folder(tmp_path/'a'/'b'/'model') as tmp: write(tmp, 'new')
    assert word(tmp_path/'a'/'b'/'model') == 'new'


@pytest.mark.skipif(os.name == 'nt', reason='no permissions')
@pytest.mark.parametrize('mask,file,folder', [(0o022, 0o644, 0o755), (0o077, 0o600, 0o700), (0o002, 0o664, 0o775)])
def test_permissions_follow_the_umask(tmp_path, mask, file, folder):
    old = os.umask(mask)
    try:
        with atomic_folder(tmp_path/'model') as tmp:
            write(tmp, 'new')
            (tmp/'weights').chmod(0o600)                   # as safetensors does
    finally: os.umask(old)
    assert {p.stat().st_mode & 0o777 for p in (tmp_path/'model').rglob('*') if p.is_file()} == {file}
    assert {p.stat().st_mode & 0o777 for p in [tmp_path/'model', tmp_path/'model'/'sub']} == {folder}

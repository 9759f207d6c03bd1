"""A run in a forked process that is killed at a chosen file operation: what `test_faults.py` attacks every command with."""
import io
import os
import signal
import sys
import threading
from pathlib import Path

from tqdm.std import tqdm

NAMED = ('os.rename', 'os.remove', 'os.rmdir', 'os.mkdir', 'os.truncate', 'os.chmod', 'os.link', 'os.symlink')  # audit events with a path first
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC


class Operations:
    "Counts what this process does to files below `root`; kills it before the operation number `at`, or in the middle of it."
    def __init__(self, root, at=None, torn=False):
        self.root, self.at, self.torn, self.seen, self.busy = str(root), at, torn, [], False
        sys.addaudithook(self.hook)                        # cannot be removed: only for a process that ends soon
        self.wrap_writers()

    def inside(self, path, folder=-1):
        "The absolute path if it is below the root, or None."
        if not isinstance(path, (str, bytes, os.PathLike)): return
        path = os.fsdecode(path)
        if isinstance(folder, int) and folder >= 0: path = os.path.join(os.readlink(f'/proc/self/fd/{folder}'), path)
        path = os.path.abspath(path)
        return path if path.startswith(self.root + os.sep) else None

    def hook(self, event, args):
        if self.busy: return
        self.busy = True
        try:
            if event == 'open' and args[2] & WRITES and (path := self.inside(args[0])): self.meet('open', path, b'{"')
            elif event in NAMED and (path := self.inside(args[0], args[-1])): self.meet(event, path)
        finally: self.busy = False

    def meet(self, what, path, half=None):
        "One operation; `half` is what a torn write of it leaves in the file."
        n = len(self.seen)
        self.seen.append(what if half is None else f'{what} to write')
        if n != self.at: return
        if self.torn and half is not None: Path(path).write_bytes(half)
        os.kill(os.getpid(), signal.SIGKILL)

    def wrap_writers(self):
        "Writers that are not Python's, and `fsync`, which has no audit event."
        import safetensors.torch
        import torch
        from prunebook import models
        serialize, save, fsync = safetensors.torch.serialize_file, torch.save, os.fsync
        def serialize_file(tensors, filename, *a, **kw):
            if path := self.inside(filename): self.meet('safetensors', path, b'\x00'*100)
            return serialize(tensors, filename, *a, **kw)
        def torch_save(what, f, *a, **kw):
            if path := self.inside(f):
                whole = io.BytesIO()
                save(what, whole, *a, **kw)
                self.meet('torch.save', path, whole.getvalue()[:whole.tell()//2])
            return save(what, f, *a, **kw)
        def sync(fd):
            if path := self.inside(os.readlink(f'/proc/self/fd/{fd if isinstance(fd, int) else fd.fileno()}')): self.meet('fsync', path)
            return fsync(fd)
        safetensors.torch.serialize_file, torch.save, os.fsync = serialize_file, torch_save, sync
        exchange = models._exchange
        def swap(a, b):
            self.meet('exchange', a)
            return exchange(a, b)
        models._exchange = swap


def lock_of_its_own():
    "The lock of progress bars is shared by all forks, and one that is killed may hold it for ever: this process takes another."
    kinds = [tqdm]
    for kind in kinds:                                     # those below it may have found theirs before
        kinds += kind.__subclasses__()
        if kind is tqdm or '_lock' in vars(kind): kind.set_lock(threading.RLock())


def forked(f, root=None, at=None, torn=False, environment={}, log=os.devnull):
    "Run `f()` in a forked process; its exit code (minus the signal that killed it) and its operations below `root`."
    r, w = os.pipe()
    if pid := os.fork():
        os.close(w)
        with open(r, encoding='utf-8') as pipe: seen = pipe.read().splitlines()
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), seen
    code = 99
    try:
        os.environ.update(dict(environment, HF_DEACTIVATE_ASYNC_LOAD='1'))               # OpenMP does not survive a fork on several threads
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(out, 1), os.dup2(out, 2)
        sys.stdout, sys.stderr = open(1, 'w', closefd=False), open(2, 'w', closefd=False)
        lock_of_its_own()
        operations = root and Operations(root, at, torn)
        code = f()
        if root: os.write(w, '\n'.join(operations.seen).encode())
        sys.stdout.flush()
    except BaseException:
        import traceback
        traceback.print_exc()
        sys.stderr.flush()
    finally: os._exit(code)

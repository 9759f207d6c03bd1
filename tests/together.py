"""Forked processes that share the work of one run as those of `torchrun` do, without a new interpreter for each."""
import os
import signal
import socket
import time
import traceback

import pytest

needs_fork = pytest.mark.skipif(not hasattr(os, 'fork'), reason='processes are forked')


def free_port():
    with socket.socket() as s:
        s.bind(('localhost', 0))
        return s.getsockname()[1]


def child(f, environment):
    "Run `f()` in a forked process; its number."
    if pid := os.fork(): return pid
    code = 99
    try:
        os.environ.update(environment, HF_DEACTIVATE_ASYNC_LOAD='1')         # threads that load do not survive a fork
        f()
        code = 0
    except BaseException: traceback.print_exc()
    finally: os._exit(code)


def together(f, count, share=True, seconds=300):
    "Run `f()` in `count` processes, which `share` one run or know nothing of each other; their exit codes. Those that run too long are killed."
    job = dict(WORLD_SIZE=str(count), MASTER_ADDR='localhost', MASTER_PORT=str(free_port())) if share else {}
    ranks = [dict(job, RANK=str(i), LOCAL_RANK=str(i)) if share else {} for i in range(count)]
    pids = [child(f, environment) for environment in ranks]
    codes, end = {}, time.time() + seconds
    while len(codes) < count:
        for pid in set(pids) - codes.keys():
            done, status = os.waitpid(pid, os.WNOHANG)
            if done: codes[pid] = os.waitstatus_to_exitcode(status)
            elif time.time() > end: os.kill(pid, signal.SIGKILL)
        time.sleep(.01)
    return [codes[pid] for pid in pids]

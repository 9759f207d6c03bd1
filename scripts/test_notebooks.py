"""Run every notebook from top to bottom, each in its own process, and fail if one fails or is skipped.

usage: python scripts/test_notebooks.py [NAME ...] [--mode MODE ...] [--others [--quarter Q]]
       NAME: 20_fasp, 20_fasp.ipynb or nbs/20_fasp.ipynb; all if none

This is nbdev_test with four differences: a process for each notebook, so that no state or memory is shared; time and peak
memory printed as it goes; a notebook that would be skipped as a whole is an error; and modes. A notebook passes

    default    as this machine runs it
    float32    with models in float32
    bfloat16   with models in bfloat16
    gpu        with a GPU as default device, pretended by tests/fake_gpu.py: what CUDA refuses is an error

`--others` adds a quarter of the notebooks in each mode that is not this machine's own. Which quarter follows from the number
of commits, so that four commits in a row cover all; it is printed, and `--quarter` chooses it. There, no new cell begins after
`--seconds`, and it is said how far a notebook came. A notebook that starts processes of its own (80_bench, 99_cli) has them
in the default mode.

As many notebooks run at the same time as there are cores (at most four), the slowest first, each on one thread: models as
small as these gain next to nothing from a second.
"""
import argparse
import contextlib
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MODES = ('default', 'float32', 'bfloat16', 'gpu')
SLOW = {'70_recipe': 240, '40_bonsai': 220, '30_depth2': 160, '52_surgeon': 150, '10_scores': 140, '20_fasp': 140}  # seconds, to start first


# ---- which notebooks, and in which mode


def notebooks(folder, names):
    "The notebooks to run, the slowest first: all of `folder`, or those named."
    found = [p for p in sorted(folder.rglob('*.ipynb')) if '.ipynb_checkpoints' not in p.parts]
    wanted = {Path(n).name.removesuffix('.ipynb') for n in names} or {p.stem for p in found}
    unknown = wanted - {p.stem for p in found}
    if unknown: sys.exit(f'no such notebook: {", ".join(sorted(unknown))}')
    slow = lambda p: (SLOW.get(p.stem, 0), p.stat().st_size)
    return sorted((p for p in found if p.stem in wanted), key=slow, reverse=True)


def turn():
    "Number of commits so far; of a shallow clone, which does not know it, the name of the commit; 0 outside of a repository."
    git = lambda *args: subprocess.run(['git', *args], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    if git('rev-parse', '--is-shallow-repository') == 'true': return int(git('rev-parse', 'HEAD')[:8], 16)
    return int(git('rev-list', '--count', 'HEAD') or 0)


def other_modes():
    "The modes that are not this machine's own."
    from prunebook.models import default_dtype
    return [m for m in MODES[1:] if m != str(default_dtype()).removeprefix('torch.')]


def quarter_jobs(paths, modes, quarter):
    "A quarter of the notebooks for each mode, another for each; those without code have none."
    paths = [p for p in paths if code_cells(p)]
    return [(p, m) for i, m in enumerate(modes) for p in paths[(quarter + i)%4::4]]


# ---- what nbdev_test would run of a notebook


def read(path):
    "The notebook, with the directives of its cells."
    from nbdev.frontmatter import FrontmatterProc
    from nbdev.process import NBProcessor
    return NBProcessor(path, procs=FrontmatterProc, process=True).nb


def not_run(cell):
    "Is this a code cell that nbdev_test leaves out?"
    from nbdev.config import get_config
    directives = cell.directives_ or {}
    return directives.get('eval:', [''])[0].lower() == 'false' or bool(set(get_config().tst_flags.split()) & directives.keys())


def code_cells(path):
    "The code cells that are run."
    return [c for c in read(path).cells if c.cell_type == 'code' and c.source.strip() and not not_run(c)]


def skipped(path):
    "Why nbdev_test would skip the whole notebook, or None; and how many code cells it leaves out."
    from nbdev.process import nb_lang
    nb = read(path)
    code = [c for c in nb.cells if c.cell_type == 'code' and c.source.strip()]
    left_out = [c for c in code if not_run(c)]
    if any(part[0] in '_.' for part in path.relative_to(ROOT).parts): return 'its name starts with _ or .', 0
    if (path.parent/'.notest').exists(): return 'a file .notest lies beside it', 0
    if str(nb.frontmatter_.get('skip_exec', False)).lower() not in ('false', '0', 'no'): return 'skip_exec is set', 0
    if nb_lang(nb) != 'python': return f'its language is {nb_lang(nb)}', 0
    if code and len(left_out) == len(code): return 'every code cell is left out', 0
    return None, len(left_out)


# ---- one notebook, in a process of its own


@contextlib.contextmanager
def in_mode(mode):
    "What `default_device` and `default_dtype` are in a mode: a dict of functions, in the package already."
    if mode == 'default':
        yield {}
        return
    import torch
    from prunebook import models
    if mode == 'gpu':
        sys.path.insert(0, str(ROOT/'tests'))
        from fake_gpu import FakeGPU, device
        stack, new = FakeGPU(strict=True), dict(default_device=device)
    else:
        known, home, dtype = models.default_dtype, models.default_device().type, getattr(torch, mode)
        at_home = lambda device: torch.device(device or home).type == home
        stack, new = contextlib.nullcontext(), dict(default_dtype=lambda device=None: dtype if at_home(device) else known(device))
    for name, f in new.items(): setattr(models, name, f)       # before any other module of the package takes them from there
    with stack: yield new


def execute(path, mode, seconds, keep_going):
    "Run the cells of a notebook in this process; True if all passed that were begun within `seconds`."
    from execnb.shell import CaptureShell
    start, passed, cells = time.perf_counter(), True, code_cells(path)
    os.environ['IN_TEST'] = '1'
    sys.path.insert(0, str(ROOT))
    os.chdir(path.parent)
    with in_mode(mode) as new:
        shell = CaptureShell(path)
        for i, cell in enumerate(cells):
            if time.perf_counter() - start > seconds:
                print(f'    {path.name} ({mode}): {seconds:.0f} s are over, {i} of {len(cells)} cells run', flush=True)
                break
            shell.cell(cell)
            shell.user_ns.update({n: f for n, f in new.items() if n in shell.user_ns})       # a page that defines them again
            if shell.exc is None: continue
            print(f'    {path.name} ({mode}): error in cell {cell.idx_}', shell.prettytb(fname=path), sep='\n', file=sys.stderr, flush=True)
            passed = False
            if not keep_going: break
    return passed


def run(path, mode, args):
    "Run one notebook in a new process; (passed, seconds, peak memory in MB)."
    start, threads = time.perf_counter(), dict(OMP_NUM_THREADS='1', MKL_NUM_THREADS='1')
    seconds = 'inf' if mode in args.mode else str(args.seconds)
    command = [sys.executable, __file__, str(path), '--mode', mode, '--seconds', seconds, '--here', *['--keep-going']*args.keep_going]
    proc = subprocess.Popen(command, cwd=ROOT, env={**os.environ, **threads})
    _, status, usage = os.wait4(proc.pid, 0)
    proc.returncode = os.waitstatus_to_exitcode(status)
    unit = 2**20 if sys.platform == 'darwin' else 2**10  # ru_maxrss is in bytes on macOS, in KB on Linux
    return proc.returncode == 0, time.perf_counter() - start, usage.ru_maxrss / unit


def test(path, mode, label, args):
    "Run one notebook and say how it went; True if it passed."
    name = path.relative_to(ROOT).as_posix() + (f' ({mode})' if mode != 'default' else '')
    why, left_out = skipped(path)
    if why:
        print(f'{label} {name}: FAILED, it would be skipped: {why}', flush=True)
        return False
    print(f'{label} {name} ...', flush=True)
    passed, seconds, memory = run(path, mode, args)
    note = f', {left_out} cell(s) not run' if left_out else ''
    print(f'{label} {name}: {"passed" if passed else "FAILED"} in {seconds:.0f} s, {memory:.0f} MB{note}', flush=True)
    return passed


def arguments(argv):
    "What the command line asks for."
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('names', nargs='*', metavar='NAME')
    parser.add_argument('--mode', nargs='+', choices=MODES, default=['default'], help='run all of them in these modes')
    parser.add_argument('--others', action='store_true', help='and a quarter in each mode that is not this machine\'s own')
    parser.add_argument('--quarter', type=int, choices=range(4), help='which one; by the number of commits if not given')
    parser.add_argument('--seconds', type=float, default=30, help='in a mode of --others, begin no cell after this time')
    parser.add_argument('--keep-going', action='store_true', help='go on with the next cell after an error')
    parser.add_argument('--here', action='store_true', help=argparse.SUPPRESS)               # in this process: how the script calls itself
    return parser.parse_args(argv)


def main(argv=None):
    "Run the notebooks named on the command line, or all."
    args = arguments(argv)
    os.chdir(ROOT)
    paths = notebooks(ROOT/'nbs', args.names)
    if not paths: sys.exit('no notebooks found')
    if args.here: return 0 if execute(paths[0], args.mode[0], args.seconds, args.keep_going) else 1
    jobs = [(p, m) for m in args.mode for p in paths]
    if args.others:
        modes, quarter = other_modes(), turn()%4 if args.quarter is None else args.quarter
        jobs += quarter_jobs(paths, modes, quarter)
        print(f'all in the default mode; quarter {quarter} in {" and ".join(modes)}, {args.seconds:.0f} s each (--quarter {quarter} does it again)')
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        passed = list(pool.map(lambda ij: test(*ij[1], f'[{ij[0]}/{len(jobs)}]', args), enumerate(jobs, 1)))
    failed = [f'{p.name} ({m})' for (p, m), ok in zip(jobs, passed) if not ok]
    print(f'{len(jobs) - len(failed)} of {len(jobs)} runs of {len(paths)} notebooks passed' + (f'; failed: {", ".join(failed)}' if failed else ''))
    return 1 if failed else 0


if __name__ == '__main__': sys.exit(main())

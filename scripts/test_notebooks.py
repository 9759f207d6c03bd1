"""Run every notebook from top to bottom, each in a kernel of its own (nbclient), and fail if one fails.

usage: python scripts/test_notebooks.py [NAME ...] [--mode MODE ...] [--others [--quarter Q]]
       NAME: 20_fasp, 20_fasp.ipynb or nbs/20_fasp.ipynb; all if none

The time and the peak memory of each are printed, and a notebook passes in modes:

    default    as this machine runs it
    float32    with models in float32
    bfloat16   with models in bfloat16
    gpu        with a GPU as default device, pretended by tests/fake_gpu.py: what CUDA refuses is an error

`--others` adds a quarter of the notebooks in each mode that is not this machine's own. Which quarter follows from the number
of commits, so that four commits in a row cover all; it is printed, and `--quarter` chooses it. There, no new cell begins after
`--seconds`, one that still runs after three times as long is interrupted, and it is said how far a notebook came. A notebook
that starts processes of its own (80_bench, 99_cli) has them in the default mode.

As many notebooks run at the same time as there are cores (at most four), the slowest first, each on one thread: models as
small as these gain next to nothing from a second.
"""
import argparse
import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parent.parent
MODES = ('default', 'float32', 'bfloat16', 'gpu')
SLOW = {'70_recipe': 157, '52_surgeon': 103, '40_bonsai': 89, '30_depth2': 85, '10_scores': 77, '99_cli': 71, '75_recover': 66,
        '20_fasp': 63, '51_elements': 62, 'start': 120, '80_bench': 56, '15_repair': 51, 'howto_prune': 49, '07a_budget': 47,
        '72_depth': 45, '02_evaluate': 38, '50_curvature': 34, 'lab_instructor': 31, 'howto_method': 30}   # seconds, to start first
ENV = dict(OMP_NUM_THREADS='1', MKL_NUM_THREADS='1', IN_TEST='1')  # nbdev: no exports from within a notebook


# ---- which notebooks, and in which mode


def slowest_first(path): return -SLOW.get(path.stem, 0), -path.stat().st_size, path


def notebooks(folder, names):
    "The notebooks to run, the slowest first: all of `folder`, or those named."
    found = {p.stem: p for p in folder.glob('*.ipynb')}
    wanted = {Path(n).name.removesuffix('.ipynb') for n in names} or found.keys()
    unknown = wanted - found.keys()
    if unknown: sys.exit(f'no such notebook: {", ".join(sorted(unknown))}')
    return [p for p in sorted((found[n] for n in wanted), key=slowest_first) if code_cells(p)]


def code_cells(path):
    "The code cells of a notebook that are run."
    cells = nbformat.read(path, as_version=4).cells
    return [c for c in cells if c.cell_type == 'code' and c.source.strip() and not re.search(r'^#\| *eval: *false', c.source, re.M)]


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
    "A quarter of the notebooks for each mode, another for each; the slowest first."
    jobs = [(p, m) for i, m in enumerate(modes) for p in paths[(quarter + i)%4::4]]
    return sorted(jobs, key=lambda job: slowest_first(job[0]))


# ---- one notebook


def enter(mode):
    "In the kernel: change what `default_device` and `default_dtype` are, in the package and in the notebook's own names."
    if mode == 'default': return
    import torch
    from IPython import get_ipython
    from prunebook import models
    if mode == 'gpu':
        from fake_gpu import FakeGPU, device
        new = dict(default_device=device)
        FakeGPU(strict=True).__enter__()
    else:
        known, home, dtype = models.default_dtype, models.default_device().type, getattr(torch, mode)
        at_home = lambda device: torch.device(device or home).type == home
        new = dict(default_dtype=lambda device=None: dtype if at_home(device) else known(device))
    for name, f in new.items(): setattr(models, name, f)       # before any other module of the package takes them from there
    names = get_ipython().user_ns
    again = lambda *_: names.update({n: f for n, f in new.items() if n in names})       # a page that defines them again
    get_ipython().events.register('post_run_cell', again)


def execute(path, mode, seconds=float('inf')):
    "Run a notebook; what there is to say of it: the error if one cell failed, how far it came in `seconds`, its peak memory."
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError, DeadKernelError
    cells = code_cells(path)
    folders = [str(ROOT/f) for f in ('', 'scripts', 'tests')]
    first = f"__import__('sys').path[:0] = {folders}; __import__('test_notebooks').enter({mode!r})"
    last = "print(__import__('prunebook.evaluate').evaluate._lifetime_mark()//2**20)"
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(first), *cells, nbformat.v4.new_code_cell(last)])
    late = dict(ename='OutOfTime', evalue='', traceback=[])
    client = NotebookClient(nb, kernel_name='python3', interrupt_on_timeout=True, error_on_timeout=late,
                            startup_timeout=300, extra_arguments=['--log-level=ERROR'],
                            resources=dict(metadata=dict(path=path.parent)))
    with client.setup_kernel(env={**os.environ, **ENV}):
        start = time.perf_counter()
        for i, cell in enumerate(nb.cells[:-1]):
            spent = time.perf_counter() - start
            if i and spent > seconds: break
            client.timeout = max(1, round(3*seconds - spent)) if i and seconds < float('inf') else None
            try: client.execute_cell(cell, i)
            except CellExecutionError as e:
                if e.ename == late['ename']: break         # it was interrupted
                return f'FAILED\n{e}'
            except DeadKernelError as e: return f'FAILED\n{e}'
        else: i = len(cells) + 1
        client.timeout = None
        client.execute_cell(nb.cells[-1], len(cells) + 1)
    short = f', {i - 1} of {len(cells)} cells run in {seconds:.0f} s' if i <= len(cells) else ''
    return f'passed, {nb.cells[-1].outputs[0].text.strip()} MB{short}'


def arguments(argv):
    "What the command line asks for."
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('names', nargs='*', metavar='NAME')
    parser.add_argument('--mode', nargs='+', choices=MODES, default=['default'], help='run all of them in these modes')
    parser.add_argument('--others', action='store_true', help='and a quarter in each mode that is not this machine\'s own')
    parser.add_argument('--quarter', type=int, choices=range(4), help='which one; by the number of commits if not given')
    parser.add_argument('--seconds', type=float, default=7, help='in a mode of --others, begin no cell after this time, and end all after three times as long')
    return parser.parse_args(argv)


def main(argv=None):
    "Run the notebooks named on the command line, or all."
    args = arguments(argv)
    paths = notebooks(ROOT/'nbs', args.names)
    if not paths: sys.exit('no notebooks found')
    jobs = [(p, m, float('inf')) for m in args.mode for p in paths]
    if args.others:
        modes, quarter = other_modes(), turn()%4 if args.quarter is None else args.quarter
        jobs += [(*job, args.seconds) for job in quarter_jobs(paths, modes, quarter)]
        print(f'all in {" and ".join(args.mode)}; quarter {quarter} in {" and ".join(modes)}, {args.seconds:.0f} s each '
              f'(--quarter {quarter} does it again)')

    def run(numbered):
        (i, (path, mode, seconds)), start = numbered, time.perf_counter()
        label = f'[{i}/{len(jobs)}] {path.name}' + f' ({mode})'*(mode != 'default')
        print(f'{label} ...', flush=True)
        said = execute(path, mode, seconds)
        print(f'{label}: {time.perf_counter() - start:.0f} s, {said}', flush=True)
        return None if said.startswith('passed') else f'{path.name} ({mode})'

    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool: failed = list(filter(None, pool.map(run, enumerate(jobs, 1))))
    print(f'{len(jobs) - len(failed)} of {len(jobs)} runs of {len(paths)} notebooks passed')
    if failed: print(f'failed: {", ".join(failed)}')
    return 1 if failed else 0


if __name__ == '__main__': sys.exit(main())

"""Run every notebook from top to bottom, each in its own process, and fail if one fails or is skipped.

usage: python scripts/test_notebooks.py [NAME ...]      NAME: 20_fasp, 20_fasp.ipynb or nbs/20_fasp.ipynb; all if none

This is nbdev_test with three differences: a process for each notebook, so that no state or memory is shared; time and
peak memory printed as it goes; and a notebook that would be skipped as a whole is an error. As many notebooks run at the
same time as there are cores (at most four), each on one thread: models as small as these gain next to nothing from a second.
"""
import argparse
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RUN = '''
import sys
from pathlib import Path
from nbdev.config import get_config
from nbdev.test import test_nb
ok, _ = test_nb(Path(sys.argv[1]), skip_flags=get_config().tst_flags.split(), basepath=get_config().config_path)
sys.exit(0 if ok else 1)
'''


def notebooks(folder, names):
    "The notebooks to run: all of `folder`, or those named."
    found = [p for p in sorted(folder.rglob('*.ipynb')) if '.ipynb_checkpoints' not in p.parts]
    if not names: return found
    wanted = {Path(n).name.removesuffix('.ipynb') for n in names}
    unknown = wanted - {p.stem for p in found}
    if unknown: sys.exit(f'no such notebook: {", ".join(sorted(unknown))}')
    return [p for p in found if p.stem in wanted]


def not_run(cell, flags):
    "Is this a code cell that nbdev_test leaves out?"
    directives = cell.directives_ or {}
    return directives.get('eval:', [''])[0].lower() == 'false' or bool(flags & directives.keys())


def skipped(path, flags):
    "Why nbdev_test would skip the whole notebook, or None; and how many code cells it leaves out."
    from nbdev.frontmatter import FrontmatterProc
    from nbdev.process import NBProcessor, nb_lang
    nb = NBProcessor(path, procs=FrontmatterProc, process=True).nb
    code = [c for c in nb.cells if c.cell_type == 'code' and c.source.strip()]
    left_out = [c for c in code if not_run(c, flags)]
    if any(part[0] in '_.' for part in path.relative_to(ROOT).parts): return 'its name starts with _ or .', 0
    if (path.parent/'.notest').exists(): return 'a file .notest lies beside it', 0
    if str(nb.frontmatter_.get('skip_exec', False)).lower() not in ('false', '0', 'no'): return 'skip_exec is set', 0
    if nb_lang(nb) != 'python': return f'its language is {nb_lang(nb)}', 0
    if code and len(left_out) == len(code): return 'every code cell is left out', 0
    return None, len(left_out)


def run(path):
    "Run one notebook in a new process; (passed, seconds, peak memory in MB)."
    start = time.perf_counter()
    proc = subprocess.Popen([sys.executable, '-c', RUN, str(path)], cwd=ROOT, env={**os.environ, 'OMP_NUM_THREADS': '1', 'MKL_NUM_THREADS': '1'})
    _, status, usage = os.wait4(proc.pid, 0)
    proc.returncode = os.waitstatus_to_exitcode(status)
    unit = 2**20 if sys.platform == 'darwin' else 2**10  # ru_maxrss is in bytes on macOS, in KB on Linux
    return proc.returncode == 0, time.perf_counter() - start, usage.ru_maxrss / unit


def test(path, label, flags):
    "Run one notebook and say how it went; True if it passed."
    name = path.relative_to(ROOT).as_posix()
    why, left_out = skipped(path, flags)
    if why:
        print(f'{label} {name}: FAILED, it would be skipped: {why}', flush=True)
        return False
    print(f'{label} {name} ...', flush=True)
    passed, seconds, memory = run(path)
    note = f', {left_out} cell(s) not run' if left_out else ''
    print(f'{label} {name}: {"passed" if passed else "FAILED"} in {seconds:.0f} s, {memory:.0f} MB{note}', flush=True)
    return passed


def main(argv=None):
    "Run the notebooks named on the command line, or all."
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('names', nargs='*', metavar='NAME')
    args = parser.parse_args(argv)
    os.chdir(ROOT)
    from nbdev.config import get_config
    flags, paths = set(get_config().tst_flags.split()), notebooks(ROOT/'nbs', args.names)
    if not paths: sys.exit('no notebooks found')
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        passed = list(pool.map(lambda ip: test(ip[1], f'[{ip[0]}/{len(paths)}]', flags), enumerate(paths, 1)))
    failed = [p.name for p, ok in zip(paths, passed) if not ok]
    print(f'{len(paths) - len(failed)} of {len(paths)} notebooks passed' + (f'; failed: {", ".join(failed)}' if failed else ''))
    return 1 if failed else 0


if __name__ == '__main__': sys.exit(main())

"""Write nbs/api.ipynb: every public name of the package in alphabetical order, with its docstring's first line and its chapter.

usage: python scripts/make_api.py

The page is made when the site is built or checked, and is not committed. Parameters, source and tests are in the chapters. Names are not
in backticks: nbdev would make a second link of them.
"""
import importlib
import inspect
import re
import sys
from configparser import ConfigParser
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def what(module, name, text):
    "One line on a public name: its docstring's first line, or, of a constant, the comment beside it."
    value = getattr(module, name)
    if inspect.isroutine(value) or inspect.isclass(value): return (inspect.getdoc(value) or '').split('\n')[0]
    said = re.search(rf'^{name}\b.*# (.+)$', text, re.M)
    return said[1] if said else 'a constant'


def rows(root):
    "(name, module, what it is, where it is derived) of every public name of the package at `root`."
    ini = ConfigParser(delimiters=['='])
    ini.read(root/'settings.ini', encoding='utf-8')
    package = ini['DEFAULT']['lib_path']
    entries = importlib.import_module(f'{package}._modidx').d['syms']
    for path in sorted((root/package).glob('[!_]*.py')):
        module, text = importlib.import_module(f'{package}.{path.stem}'), path.read_text(encoding='utf-8')
        chapter = re.search(r'File to edit: \.\./nbs/(\S+)\.$', text, re.M)
        for name in getattr(module, '__all__', []) if chapter else []:
            page, mark, anchor = entries[module.__name__].get(f'{module.__name__}.{name}', ('', ''))[0].partition('#')
            yield name, path.stem, what(module, name, text).replace('|', r'\|'), chapter[1] + mark + anchor


def write(root):
    "Write the page of the project at `root`."
    from execnb.nbio import mk_cell, new_nb, write_nb
    line = lambda name, module, said, link: f'| [{name}]({link}) | `{module}` | {said} |'
    table = '\n'.join(line(*r) for r in sorted(rows(root), key=lambda r: (r[0].lower(), r)))
    cells = ['# API reference\n> Every public name of the package, and the chapter that derives it',
             f'| name | module | what it is |\n|---|---|---|\n{table}']
    write_nb(new_nb([mk_cell(c, 'markdown') for c in cells]), root/'nbs'/'api.ipynb')


if __name__ == '__main__':
    sys.path.insert(0, str(ROOT))
    write(ROOT)

"""The checks of the documentation fire: a small project with a fault of every kind, and one without faults."""
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parent.parent/'scripts'
sys.path.insert(0, str(SCRIPTS))
import make_readme  # noqa: E402

pytest.importorskip('nbdev')
pytest.importorskip('pypandoc')

SETTINGS = '''[DEFAULT]
repo = mini
lib_name = mini
lib_path = mini
nbs_path = nbs
doc_path = _docs
version = 0.0.1
user = mini
author = nobody
description = A small project
branch = main
custom_sidebar = True
title = mini
doc_host = https://mini.example.org
doc_baseurl = /mini
git_url = https://git.example.org/mini/mini
update_pyproject = False
'''
QUARTO = 'project:\n  type: website\nformat:\n  html:\n    toc: true\nbibliography: references.bib\n'
BIB = '@misc{one2020,\n  title = {One},\n  author = {One, Ann},\n  year = {2020}\n}\n'


# ---- building a project ---------------------------------------------------------------------------------------------

def md(text): return dict(cell_type='markdown', metadata={}, source=text.splitlines(True))


def code(text, *outputs):
    return dict(cell_type='code', metadata={}, source=text.splitlines(True), execution_count=None, outputs=list(outputs))


def result(**data): return dict(output_type='execute_result', execution_count=None, metadata={}, data={k.replace('_', '/'): v for k, v in data.items()})


def error(): return dict(output_type='error', ename='ValueError', evalue='no', traceback=[])


def notebook(*cells):
    kernel = dict(kernelspec=dict(display_name='python3', language='python', name='python3'))
    cells = [dict(cell, id=f'{i:08x}') for i, cell in enumerate(cells)]
    return dict(cells=cells, metadata=kernel, nbformat=4, nbformat_minor=5)


def save(path, nb): path.write_text(json.dumps(nb, sort_keys=True, indent=1, ensure_ascii=False) + '\n', encoding='utf-8')


def build(folder, pages, sidebar, bib=BIB):
    "Write a project of the given notebooks (name -> notebook) into `folder`."
    (folder/'nbs'/'images').mkdir(parents=True)
    (folder/'mini').mkdir()
    (folder/'mini'/'__init__.py').write_text('__version__ = "0.0.1"\n')
    (folder/'settings.ini').write_text(SETTINGS)
    (folder/'nbs'/'_quarto.yml').write_text(QUARTO)
    (folder/'nbs'/'references.bib').write_text(bib)
    (folder/'nbs'/'images'/'a.png').write_bytes(b'png')
    (folder/'nbs'/'sidebar.yml').write_text(json.dumps(dict(website=dict(sidebar=dict(contents=sidebar)))))
    for name, nb in pages.items(): save(folder/'nbs'/name, nb)
    return folder


def run(script, *args):
    "Run a script; (exit status, what it printed)."
    res = subprocess.run([sys.executable, str(SCRIPTS/script), *map(str, args)], capture_output=True, text=True)
    return res.returncode, res.stdout + res.stderr


GOOD = {
    'index.ipynb': notebook(md('# Mini\n\n> A small project'), md('Go to [the method](10_method.ipynb#sec-idea).')),
    '10_method.ipynb': notebook(
        md('# Method\n> One line'),
        code('#| default_exp method'),
        md('## Code'),
        code('#| export\ndef double(\n    x, # a number\n):\n    "Twice `x`."\n    return 2*x'),
        md('## Idea {#sec-idea}\n\n::: {.callout-note}\nA note on `double`.\n:::\n\n$$a = \\frac{1}{2}$$ {#eq-a}\n\n'
           'See @eq-a, @fig-a, @tbl-a, [@one2020, p. 3], [home](index.ipynb), [entry](#double), [site](https://mini.example.org/mini/method.html#sec-idea),\n'
           '[file](https://git.example.org/mini/mini/blob/main/settings.ini), [idea](#sec-idea) and `@not_a_citation`.\n\n'
           '![A plot](images/a.png)\n\n| a |\n|---|\n| 1 |\n\n: A table {#tbl-a}\n'),
        code('#| label: fig-a\n#| fig-cap: "A line [@one2020]"\n#| fig-alt: "A line"\ndouble(1)', result(image_png='aGk=', text_plain='2'))),
}

BAD_PAGE = notebook(
    md('# Bad\n> One line\n\nThis sentence is lost.'),
    code('#| default_exp bad'),
    md('[page](30_nothing.ipynb) [anchor](10_method.ipynb#nothing) [here](#nowhere) [file](data/nothing.csv)\n'
       '[site](https://mini.example.org/mini/nothing.html) [repo](https://git.example.org/mini/mini/blob/main/nothing.py)\n'
       '![](images/none.png) ![](images/a.png)'),
    md('$$a$$ {#eq-twice}\n\n$$b$$ {#eq-twice}\n\n## S {#sec-s}\n\n@eq-lost @fig-nocap @sec-s @nobody1999\n\n#### Too deep'),
    md('$$\\frac{1}{$$\n\n::: {.callout-note}\nnever closed'),
    code('#| label: fig-nocap\n1', result(image_png='aGk=')),
    code('#| label: fig-noout\n#| fig-cap: "C"\n1'),
    code('#| fig-cap: "a" b\n1'),
    code('#| hide\n1', error()),
    code('1', result(text_plain="PosixPath('/home/someone/x')")),
    code('import math\nx = math.pi'),
    code('#| export\ndef f(): "F"'),
)
FAULTS = {
    'missing page': 'broken link 30_nothing.ipynb',
    'missing anchor on another page': 'broken anchor 10_method.ipynb#nothing',
    'missing anchor here': 'broken anchor #nowhere',
    'missing file': 'broken link data/nothing.csv',
    'missing page of our own site': 'broken link https://mini.example.org/mini/nothing.html',
    'missing file of our repository': 'broken link https://git.example.org/mini/mini/blob/main/nothing.py: no such file',
    'missing image': 'broken link images/none.png',
    'label given twice': 'duplicate label eq-twice',
    'label without a target': 'unresolved cross-reference @eq-lost',
    'reference to an unnumbered section': '@sec-s needs numbered sections',
    'unknown citation': 'nobody1999',
    'broken TeX': 'Could not convert TeX math',
    'open div': 'a ::: block is never closed',
    'figure without caption': 'fig-nocap has no fig-cap',
    'figure without output': 'fig-noout has no saved output',
    'options that are not YAML': 'the #| options are not YAML',
    'saved error, though hidden': 'a saved output is an error: ValueError',
    'path of a machine': 'names a path of this machine: /home/someone/x',
    'text in the title cell': 'This sentence is lost.',
    'imports beside other code': 'imports must be in cells of their own',
    'no title': '40_untitled.ipynb: no title',
    'page that cannot be processed': '50_fails.ipynb: nbdev cannot process it: ModuleNotFoundError',
    'notebook not in the sidebar': 'sidebar.yml: 40_untitled.ipynb is not listed',
    'sidebar entry without a file': 'sidebar.yml: 99_gone.ipynb does not exist',
    'sidebar entry given twice': 'sidebar.yml: index.ipynb is listed 2 times',
    'bibliography key given twice': 'references.bib: duplicate key one2020',
    'image output without fig-alt': 'fig-nocap: image output without fig-alt',
    'heading that skips a level': "heading 'too-deep' is of level 4 below one of level 2",
    'unknown website key': '_quarto.yml: unknown key website.side-bar',
    'unknown format key': '_quarto.yml: unknown key format.html.tock',
    'settings that name no file': '_quarto.yml: images/icon.svg does not exist',
    'image file without text': 'image without alternative text: images/a.png',
}


@pytest.fixture(scope='module')
def good(tmp_path_factory): return build(tmp_path_factory.mktemp('good'), GOOD, ['index.ipynb', dict(section='I', contents=['10_method.ipynb'])])


@pytest.fixture(scope='module')
def bad_report(tmp_path_factory):
    pages = {**GOOD, '20_bad.ipynb': BAD_PAGE, '40_untitled.ipynb': notebook(md('no title here')),
             '50_fails.ipynb': notebook(md('# Fails\n> One line'), code('#| export\nimport no_such_module'), code('#| export\ndef g(): "G"'))}
    sidebar = ['index.ipynb', 'index.ipynb', '10_method.ipynb', '20_bad.ipynb', '50_fails.ipynb', '99_gone.ipynb']
    root = build(tmp_path_factory.mktemp('bad'), pages, sidebar, bib=BIB + BIB)
    (root/'nbs'/'_quarto.yml').write_text(QUARTO.replace('toc: true', 'tock: true') + 'website:\n  side-bar: true\n  favicon: images/icon.svg\n')
    return run('check_docs.py', '--alt', '--root', root)


# ---- the documentation check ----------------------------------------------------------------------------------------

def test_no_false_alarm_and_nothing_written(good):
    before = sorted(p.relative_to(good) for p in good.rglob('*') if '__pycache__' not in p.parts)
    status, said = run('check_docs.py', '--alt', '--root', good)
    assert (status, said) == (0, '2 pages checked, 0 problem(s)\n')
    assert before == sorted(p.relative_to(good) for p in good.rglob('*') if '__pycache__' not in p.parts)


@pytest.mark.parametrize('fault', FAULTS)
def test_fault_is_found(bad_report, fault):
    status, said = bad_report
    assert status == 1 and FAULTS[fault] in said, said


def test_faults_are_reported_once_and_only_on_bad_pages(bad_report):
    lines = bad_report[1].splitlines()
    assert len(lines) == len(set(lines))
    assert not [l for l in lines if l.startswith(('10_method.ipynb', 'index.ipynb'))]
    assert lines[-1] == f'5 pages checked, {len(lines) - 1} problem(s)'


# ---- generated files ------------------------------------------------------------------------------------------------

def nbdev(command, module, folder):
    subprocess.run([sys.executable, '-c', f'from nbdev.{module} import {command}; {command}.__wrapped__()'], cwd=folder, check=True)


@pytest.fixture
def exported(good, tmp_path, monkeypatch):
    "A copy of the good project, exported; check_sync looks for its package under the name `prunebook`."
    monkeypatch.delenv('IN_TEST', raising=False)
    folder = Path(shutil.copytree(good, tmp_path/'project'))
    (folder/'mini').rename(folder/'prunebook')
    (folder/'settings.ini').write_text(SETTINGS.replace('lib_path = mini', 'lib_path = prunebook'))
    nbdev('nbdev_export', 'doclinks', folder)
    nbdev('nbdev_clean', 'clean', folder)
    return folder


def test_export_in_step(exported): assert run('check_sync.py', 'export', '--root', exported) == (0, '')


@pytest.mark.parametrize('fault, message', [
    (lambda f: (f/'prunebook'/'method.py').write_text('x = 1\n'), 'method.py: differs'),
    (lambda f: (f/'prunebook'/'method.py').unlink(), 'method.py: missing'),
    (lambda f: (f/'nbs'/'10_method.ipynb').unlink(), 'method.py: no notebook makes this file any more'),
], ids=['edited by hand', 'deleted', 'notebook gone'])
def test_export_out_of_step(exported, fault, message):
    fault(exported)
    status, said = run('check_sync.py', 'export', '--root', exported)
    assert status == 1 and message in said and 'nbdev_export' in said


def test_clean_notebooks(exported):
    assert run('check_sync.py', 'clean', '--root', exported) == (0, '')
    path = exported/'nbs'/'10_method.ipynb'
    nb = json.loads(path.read_text())
    nb['cells'][1]['execution_count'] = 7
    save(path, nb)
    status, said = run('check_sync.py', 'clean', '--root', exported)
    assert status == 1 and '10_method.ipynb: differs' in said and 'nbdev_clean' in said
    assert json.loads(path.read_text()) == nb  # the check mends nothing itself


# ---- README.md ------------------------------------------------------------------------------------------------------

def readme(*cells): return make_readme.readme(notebook(*cells), 'https://s.org/p').split('\n\n', 1)[1]


@pytest.mark.parametrize('cell, text', [
    (md('# T\n\n> line\n\n- categories: [a]'), '# T\n\n> line\n'),
    (md('## H `x` {#sec-h .c}'), '## H `x`\n'),
    (md('[a](20_fasp.ipynb#sec-x) [`b`](sub/03a_walk.ipynb) [c](https://x.y) [d](#e)'),
     '[a](https://s.org/p/fasp.html#sec-x) [`b`](https://s.org/p/sub/walk.html) [c](https://x.y) [d](#e)\n'),
    (md('![alt](images/a.png){#fig-a width=50%} [log](../CHANGELOG.md)'), '![alt](nbs/images/a.png) [log](CHANGELOG.md)\n'),
    (md('::: {.callout-tip title="Do"}\nthis\n\n```python\n::: {x}\n```\n:::\nand'), '> **Do**\n>\n> this\n>\n> ```python\n> ::: {x}\n> ```\n\nand\n'),
    (md('`[a](b.ipynb) {#x}`\n\n```\n[a](b.ipynb) @x\n```'), '`[a](b.ipynb) {#x}`\n\n```\n[a](b.ipynb) @x\n```\n'),
    (md('mail a@b.org, $x$ {#eq-x} and `@patch`'), 'mail a@b.org, $x$ and `@patch`\n'),
    (code('#| code-fold: true\n1+1', result(text_plain='2')), '```python\n1+1\n```\n\n```text\n2\n```\n'),
    (code('#| echo: false\n1', dict(output_type='stream', name='stdout', text='hi\n')), '```text\nhi\n```\n'),
    (code('#| output: false\n1', result(text_plain='2')), '```python\n1\n```\n'),
    (code('1', result(text_markdown='[a](x.ipynb)', text_plain='no')), '```python\n1\n```\n\n[a](https://s.org/p/x.html)\n'),
    (code('1', dict(output_type='stream', name='stderr', text='warning')), '```python\n1\n```\n'),
], ids=['title', 'heading', 'links', 'image', 'callout', 'code', 'prose', 'output', 'echo', 'no output', 'markdown', 'stderr'])
def test_readme_cell(cell, text): assert readme(cell) == text


@pytest.mark.parametrize('directive', ['hide', 'export', 'default_exp x', 'include: false'])
def test_readme_leaves_out(directive): assert readme(md('a'), code(f'#| {directive}\n1', result(text_plain='2'))) == 'a\n'


@pytest.mark.parametrize('cell, message', [
    (code('1', result(image_png='x', text_plain='Figure')), 'cell 0.*image output'),
    (code('1', error()), 'error: ValueError'),
    (md('see @fig-a'), 'plain link'), (md('as in [@one2020]'), 'plain link'), (md('{{< video x >}}'), 'shortcode'),
    (md('::: {.callout-note}\nopen'), 'not closed'), (md('x\n:::'), 'not opened'),
])
def test_readme_refuses(cell, message):
    with pytest.raises(make_readme.ReadmeError, match=message): readme(cell)


def test_readme_check(good):
    folder = good
    assert run('make_readme.py', '--root', folder)[0] == 0
    assert run('make_readme.py', '--check', '--root', folder) == (0, '')
    with (folder/'README.md').open('a') as f: f.write('by hand\n')
    status, said = run('make_readme.py', '--check', '--root', folder)
    assert status == 1 and '-by hand' in said and 'make readme' in said
    (folder/'README.md').unlink()


# ---- generated pages ------------------------------------------------------------------------------------------------

MODULE = '''"""Twice and thrice."""

# AUTOGENERATED! DO NOT EDIT! File to edit: ../nbs/10_method.ipynb.
__all__ = ['TWO', 'double', 'Box']

TWO = 2 # a number | a constant

def double(
    x, # a number
    *, times=TWO, # how often
):
    "Twice `x`."

@dataclass
class Box:
    "A box."
    side: float = 1. # length, in cm
    @property
    def area(self): "Square of the side."
    def _hidden(self): pass

@patch
def grow(self:Box, by=2): "Make it larger."
'''


def test_generated_pages(good, tmp_path):
    folder = Path(shutil.copytree(good, tmp_path/'project'))
    (folder/'prunebook').mkdir()
    (folder/'prunebook'/'method.py').write_text(MODULE)
    assert run('make_pages.py', '--root', folder) == (0, '') and run('make_pages.py', '--check', '--root', folder) == (0, '')
    text = '\n\n'.join(''.join(c['source']) for c in json.loads((folder/'nbs'/'api.ipynb').read_text())['cells'])
    for part in ('Derived in [Method](10_method.ipynb)', '### TWO {#method-TWO}\n\nA number | a constant.', 'double(x, times=TWO)', "| `times` | `TWO` | how often |", "Box(side=1.0)",
                 '| `side` | `1.0` | length, in cm |', '- `area`: Square of the side.', '- `grow(by=2)`: Make it larger.'): assert part in text, part
    assert '_hidden' not in text
    assert '| @one2020 | [Method](10_method.ipynb) |' in (folder/'nbs'/'references.ipynb').read_text()
    (folder/'prunebook'/'method.py').write_text(MODULE.replace('Twice `x`', 'Two times `x`'))
    status, said = run('make_pages.py', '--check', '--root', folder)
    assert status == 1 and 'api.ipynb' in said and 'make sync' in said


def test_generated_pages_miss_nothing(good, tmp_path):
    folder = Path(shutil.copytree(good, tmp_path/'project'))
    (folder/'prunebook').mkdir()
    (folder/'prunebook'/'method.py').write_text("__all__ = ['gone']\n")
    status, said = run('make_pages.py', '--root', folder)
    assert status == 1 and 'method.gone is in __all__ and not in the module' in said

"""The checks of the documentation fire: a small project with a fault of every kind, and one without faults."""
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ROOT/'scripts'

for needed in ('nbdev', 'pypandoc', 'smalldocs', 'lxml'): pytest.importorskip(needed)

SETTINGS = '''[DEFAULT]
repo = mini
lib_name = mini
lib_path = prunebook
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
QUARTO = 'project:\n  type: website\nformat:\n  html:\n    toc: true\nbibliography: references.bib\nmetadata-files: [nbdev.yml, sidebar.yml]\n'
BIB = '@misc{one2020,\n  title = {One},\n  author = {One, Ann},\n  year = {2020}\n}\n'


# ---- building a project ---------------------------------------------------------------------------------------------

def md(text): return dict(cell_type='markdown', metadata={}, source=text.splitlines(True))


def code(text, *outputs):
    return dict(cell_type='code', metadata={}, source=text.splitlines(True), execution_count=None, outputs=list(outputs))


def result(**data):
    data = {k.replace('_', '/'): v for k, v in data.items()}
    return dict(output_type='execute_result', execution_count=None, metadata={}, data=data)


def error(): return dict(output_type='error', ename='ValueError', evalue='no', traceback=[])


def notebook(*cells):
    kernel = dict(kernelspec=dict(display_name='python3', language='python', name='python3'))
    cells = [dict(cell, id=f'{i:08x}') for i, cell in enumerate(cells)]
    return dict(cells=cells, metadata=kernel, nbformat=4, nbformat_minor=5)


def save(path, nb): path.write_text(json.dumps(nb, sort_keys=True, indent=1, ensure_ascii=False) + '\n', encoding='utf-8')


def sidebar(folder, *contents): (folder/'nbs'/'sidebar.yml').write_text(json.dumps(dict(website=dict(sidebar=dict(contents=contents)))))


def run(*command):
    "Run a script; (exit status, what it printed)."
    script, *args = map(str, command)
    start = [sys.executable] if script.endswith('.py') else []
    env = {**os.environ, 'PATH': f'{Path(sys.executable).parent}:{os.environ["PATH"]}', 'PYTHONPATH': ''}
    res = subprocess.run([*start, str(SCRIPTS/script), *args], capture_output=True, text=True, env=env)
    return res.returncode, res.stdout + res.stderr


def nbdev(command, module, folder):
    subprocess.run([sys.executable, '-c', f'from nbdev.{module} import {command}; {command}.__wrapped__()'], cwd=folder, check=True)


GOOD = {
    'index.ipynb': notebook(md('# Mini\n\n> A small project'), md('Go to [the method](10_method.ipynb#sec-idea).')),
    '10_method.ipynb': notebook(
        md('# Method\n> One line'),
        code('#| default_exp method'),
        md('## Code'),
        code('#| export\ndef double(\n    x, # a number\n):\n    "Twice | `x`.\\n\\nMore."\n    return 2*x'),
        code('#| exports\ndef thrice(\n    x, # a number\n):\n    "Three times `x` (eq. a)."\n    return 3*x'),
        code('#| export\nTWO = 2 # a number'),
        md('## Idea {#sec-idea}\n\n::: {.callout-note}\nA note on `double`.\n:::\n\n$$a = \\frac{1}{2}$$ {#eq-a}\n\n'
           'See @fig-a, @tbl-a, [@one2020, p. 3], [home](index.ipynb), [entry](#double), '
           '[site](https://mini.example.org/mini/method.html#sec-idea),\n'
           '[file](https://git.example.org/mini/mini/blob/main/settings.ini), [idea](#sec-idea) and `@not_a_citation`.\n\n'
           '![A plot](images/a.png)\n\n| a |\n|---|\n| 1 |\n\n: A table {#tbl-a}\n'),
        code('#| label: fig-a\n#| fig-cap: "A line [@one2020]"\n#| fig-alt: "A line"\ndouble(1)', result(image_png='aGk=', text_plain='2')),
        code('#| label: fig-b\n#| fig-cap: "B"\n#| fig-alt: "B"\n#| code-fold: true\na = 1\nb = 2\nc = 3\na + b + c', result(image_png='aGk=', text_plain='6'))),
    'api.ipynb': notebook(md('# to be written again')),
}

BAD_PAGE = notebook(
    md('# Bad\n> One line\n\nThis sentence is lost.'),
    code('#| default_exp bad'),
    md('[page](30_nothing.ipynb) [anchor](10_method.ipynb#nothing) [here](#nowhere) [file](data/nothing.csv)\n'
       '[site](https://mini.example.org/mini/nothing.html) [repo](https://git.example.org/mini/mini/blob/main/nothing.py)\n'
       '[`double`](10_method.ipynb#double) ![](images/none.png) ![](images/a.png)'),
    md('$$a$$ {#eq-twice}\n\n$$b$$ {#eq-twice}\n\n## S {#sec-s}\n\n@eq-lost @fig-nocap @sec-s @nobody1999\n\n#### Too deep'),
    md('$$\\frac{1}{$$'),
    code('#| label: fig-nocap\n1', result(image_png='aGk=')),
    code('#| label: fig-noout\n#| fig-cap: "C"\n1'),
    code('#| label: fig-long\n#| fig-cap: "C"\n#| fig-alt: "D"\nfig, ax = 1, 2\na = 1\nb = 2\nc = 3', result(image_png='aGk=')),
    code('#| hide\n1', error()),
    code('1', result(text_plain="PosixPath('/home/someone/x')")),
    code('import math\nx = math.pi'),
    code('#| export\ndef f(): "F"'),
    md('The rounds:'),
    code('#| hide\nimport os'),
    code('#| fig-alt: "A dot"\n1', result(image_png='aGk=', text_plain='3')),
    md('They end so:'),
    code('#| export\nimport sys'),
    md('::: {.callout-note}\nnever closed'),
)
MORE_BAD = {
    '20_bad.ipynb': BAD_PAGE,
    '40_untitled.ipynb': notebook(md('no title here')),
    '50_fails.ipynb': notebook(md('# Fails\n> One line'), code('#| export\nimport no_such_module'), code('#| export\ndef g(): "G"')),
    '60_options.ipynb': notebook(md('# Options\n> One line'), code('#| fig-cap: "a" b\n1')),
}
FAULTS = {
    'missing page': 'bad.html: broken link 30_nothing.html',
    'missing anchor on another page': 'bad.html: broken anchor method.html#nothing',
    'missing anchor here': 'bad.html: broken anchor #nowhere',
    'missing file': 'bad.html: broken link data/nothing.csv',
    'missing page of our own site': 'bad.html: broken link https://mini.example.org/mini/nothing.html',
    'missing file of our repository': 'broken link https://git.example.org/mini/mini/blob/main/nothing.py: no such file',
    'missing image': 'bad.html: broken link images/none.png',
    'link within a link that nbdev makes': 'bad.html: a link is shown as text: ](method.ipynb#double)',
    'label given twice': 'id eq-twice is given more than once',
    'long drawing in sight': 'fig-long is drawn by more than 3 lines in sight',
    'label that nothing refers to': 'nothing refers to equation eq-twice',
    'label without a target': 'unresolved cross-reference @eq-lost',
    'reference to an unnumbered section': 'unresolved cross-reference @sec-s',
    'unknown citation': 'nobody1999',
    'broken TeX': 'Could not convert TeX math',
    'open div': 'a ::: block is never closed',
    'figure without caption': 'fig-nocap has no fig-cap',
    'figure without output': 'fig-noout has no saved output',
    'picture without a label': 'a picture has no label',
    'colon that leads to nothing': "a colon leads to nothing: 'They end so:'",
    'options that are not YAML': '60_options.ipynb: cell 1: the #| options are not YAML',
    'saved error, though hidden': 'a saved output is an error: ValueError',
    'path of a machine': 'names a path of this machine: /home/someone/x',
    'text in the title cell': 'This sentence is lost.',
    'imports beside other code': 'imports must be in cells of their own',
    'no title': '40_untitled.ipynb: no title',
    'page that cannot be processed': '50_fails.ipynb: nbdev cannot process it: ModuleNotFoundError',
    'notebook not in the sidebar': 'sidebar.yml: 40_untitled.ipynb is not listed',
    'sidebar entry without a file': 'sidebar.yml: 99_gone.ipynb does not exist',
    'sidebar entry given twice': 'sidebar.yml: index.ipynb is listed more than once',
    'bibliography key given twice': 'references.bib: duplicate key one2020',
    'image output without fig-alt': 'image without alternative text: data:image/png',
    'image file without text': 'image without alternative text: images/a.png',
    'heading that skips a level': "heading 'Too deep' is of level 4 below one of level 2",
    'unknown website key': 'website.side-bar',
    'unknown format key': 'format.html.tock',
    'settings that name no file': 'images/icon.svg',
    'broken anchor in README.md': 'README.md: broken anchor https://mini.example.org/mini/method.html#gone',
    'broken file in README.md': 'README.md: broken link GONE.md',
}


@pytest.fixture(scope='module')
def good(tmp_path_factory):
    "A project without faults, exported and clean."
    folder = tmp_path_factory.mktemp('good')
    for part in ('nbs/images', 'prunebook'): (folder/part).mkdir(parents=True)
    (folder/'prunebook'/'__init__.py').write_text('__version__ = "0.0.1"\n')
    (folder/'settings.ini').write_text(SETTINGS)
    (folder/'README.md').write_text('[method](https://mini.example.org/mini/method.html#sec-idea) [settings](settings.ini)\n')
    (folder/'nbs'/'_quarto.yml').write_text(QUARTO)
    (folder/'nbs'/'references.bib').write_text(BIB)
    (folder/'nbs'/'images'/'a.png').write_bytes(b'png')
    sidebar(folder, 'index.ipynb', dict(section='I', contents=['10_method.ipynb', 'api.ipynb']))
    for name, nb in GOOD.items(): save(folder/'nbs'/name, nb)
    nbdev('nbdev_export', 'doclinks', folder)
    nbdev('nbdev_clean', 'clean', folder)
    return folder


@pytest.fixture(scope='module')
def good_report(good): return run('check_docs.py', '--root', good)


@pytest.fixture(scope='module')
def bad_report(good, tmp_path_factory):
    folder = Path(shutil.copytree(good, tmp_path_factory.mktemp('bad')/'project'))
    for name, nb in MORE_BAD.items(): save(folder/'nbs'/name, nb)
    listed = 'index api 10_method index 20_bad 50_fails 60_options 99_gone'
    sidebar(folder, *(f'{name}.ipynb' for name in listed.split()))
    (folder/'nbs'/'references.bib').write_text(BIB + BIB)
    (folder/'nbs'/'_quarto.yml').write_text(QUARTO.replace('toc: true', 'tock: true') + 'website:\n  side-bar: true\n  favicon: images/icon.svg\n')
    (folder/'README.md').write_text('[a](https://mini.example.org/mini/method.html#gone) [b](GONE.md)\n')
    return run('check_docs.py', '--root', folder)


# ---- the documentation check ----------------------------------------------------------------------------------------

def test_no_false_alarm(good_report): assert good_report == (0, '3 pages checked, 0 problem(s)\n')


@pytest.mark.parametrize('fault', FAULTS)
def test_fault_is_found(bad_report, fault):
    status, said = bad_report
    assert status == 1 and FAULTS[fault] in said, said


def test_faults_are_reported_once_and_only_on_bad_pages(bad_report):
    lines = bad_report[1].splitlines()
    assert len(lines) == len(set(lines))
    assert not [l for l in lines if re.match(r'10_method|method|index|api', l)]
    assert lines[-1] == f'7 pages checked, {len(lines) - 1} problem(s)'


def test_page_of_the_api(good, good_report):
    "Every public name, with its docstring's first line and a link that works; a constant with its comment."
    cells = json.loads((good/'nbs'/'api.ipynb').read_text(encoding='utf-8'))['cells']
    rows = [line.strip() for c in cells for line in c['source'] if line.startswith('| [')]
    assert rows == ['| [double](10_method.ipynb#double) | `method` | Twice \\| `x`. |',
                    '| [thrice](10_method.ipynb#thrice) | `method` | Three times `x` (eq. a). |',
                    '| [TWO](10_method.ipynb) | `method` | a number |']


def test_signature_is_printed_once(good, good_report):
    "Where the source is shown, no signature stands above it; where it is not, the signature does."
    from lxml import html
    page = html.document_fromstring((good/'_smoke'/'method.html').read_text()).text_content()
    assert page.count('def double(') == 1 and page.count('def thrice(') == 1
    assert 'Three times' in page and 'return 3*x' in page and 'return 2*x' not in page


def test_docstrings_link_to_equations(good, good_report):
    from lxml import html
    page = html.document_fromstring((good/'_smoke'/'method.html').read_text())
    assert 'Three times x (Equation 1).' in page.text_content() and page.xpath('//em//a/@href') == ['#eq-a']


def test_equations_in_docstrings():
    sys.path.insert(0, str(SCRIPTS))
    import site_files
    def linked(docstring, *labels):
        cells = [dict(md(' '.join('$$x$$ {#eq-%s}' % l for l in labels))), code('show_doc(f)', result(text_markdown=docstring))]
        site_files.link_equations(dict(cells=cells))
        return cells[1]['outputs'][0]['data']['text/markdown']
    assert linked('A (eqs. ppl and se).', 'ppl', 'se') == 'A (@eq-ppl and @eq-se).'
    assert linked('A (eq. a to eq. c-d), (f,)', 'a', 'b', 'c-d') == 'A (@eq-a to @eq-c-d), (f,)'
    assert linked('A (eq. of another page).', 'a') == 'A (eq. of another page).'


# ---- package and notebooks in step ----------------------------------------------------------------------------------

def edit(path, *change): path.write_text(path.read_text().replace(*change))


def test_in_step(good): assert run('check_sync.sh', good) == (0, '')


@pytest.mark.parametrize('fault, message', [
    (lambda f: (f/'prunebook'/'method.py').write_text('x = 1\n'), 'prunebook/ is out of step'),
    (lambda f: (f/'prunebook'/'method.py').unlink(), 'method.py'),
    (lambda f: (f/'nbs'/'10_method.ipynb').unlink(), 'Only in prunebook: method.py'),
    (lambda f: edit(f/'nbs'/'10_method.ipynb', '"execution_count": null', '"execution_count": 7'), 'nbs/ is out of step'),
], ids=['edited by hand', 'deleted', 'notebook gone', 'not clean'])
def test_out_of_step(good, tmp_path, fault, message):
    folder = Path(shutil.copytree(good, tmp_path/'project'))
    fault(folder)
    before = {p: p.read_bytes() for p in folder.rglob('*') if p.is_file()}
    status, said = run('check_sync.sh', folder)
    assert status == 1 and message in said and 'make sync' in said, said
    assert before == {p: p.read_bytes() for p in folder.rglob('*') if p.is_file()}  # the check mends nothing itself


# ---- README.md ------------------------------------------------------------------------------------------------------

def readme(): return (ROOT/'README.md').read_text(encoding='utf-8')


def test_code_of_the_readme_is_run():
    "Its Python and what that prints are cells of the index page, which `make test-notebooks` runs."
    cells = [c for c in json.loads((ROOT/'nbs'/'index.ipynb').read_text(encoding='utf-8'))['cells'] if c['cell_type'] == 'code']
    printed = [''.join(o.get('text', '')).strip() for c in cells for o in c['outputs']]
    blocks = re.findall(r'^```(python|text)\n(.*?)\n```$', readme(), re.M | re.S)
    assert {language for language, _ in blocks} == {'python', 'text'}
    for language, text in blocks: assert text in ([''.join(c['source']) for c in cells] if language == 'python' else printed), text


def test_commands_of_the_readme_are_targets():
    targets = set(re.findall(r'^([a-z-]+):', (ROOT/'Makefile').read_text(encoding='utf-8'), re.M))
    text = readme() + (ROOT/'CONTRIBUTING.md').read_text(encoding='utf-8')
    named = set(re.findall(r'(?:^|`)make (?:[A-Z]+=\S+ )*([a-z-]+)\b', text, re.M))
    assert {'demo', 'test', 'docs-check'} <= named <= targets

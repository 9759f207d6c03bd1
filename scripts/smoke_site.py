"""Build the site without Quarto, to look at it and to test it in a browser.

usage: python scripts/smoke_site.py [SITE]      SITE: folder to write, _smoke by default

smalldocs, a renderer of `_quarto.yml` projects in pure Python, makes pages with the same themes, sidebar and stylesheet as Quarto. What
it lacks is filled in before: pages get the names they have on the site; equations, figures and tables get numbers, and cross-references
their text; a citation shows its key; a picture with twice the dots of a screen is shown at half its size. MathJax is taken from .site-tools (`make site-tools`), never from a network; without it formulas
stay TeX. Needs nbdev and smalldocs (Python 3.11 or later).
"""
import base64
import json
import os
import re
import shutil
import sys
import tempfile
import warnings
from pathlib import Path

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parent))
import make_api
import site_files
from site_files import source

ROOT = Path(__file__).resolve().parent.parent
KINDS = dict(eq='Equation', fig='Figure', tbl='Table')
CODE = re.compile(r'(^ {0,3}(`{3,}|~{3,}).*?^ {0,3}\2[`~]*[ \t]*$|`+[^`\n]+`+)', re.M | re.S)
XREF = re.compile(r'(?<![\w@])-?@((?:fig|tbl|eq|sec|lst|thm|lem|exm|exr)-[\w-]+)')
CITATION = re.compile(r'\[[^\[\]]*(?<!\w)@[a-zA-Z]\w*\d{4}\w*[^\[\]]*\]|(?<![\w\[;@-])@[a-zA-Z]\w*\d{4}\w*')
KNOWN = re.compile(r'unknown key (lang|bibliography|link-citations|respect-user-color-scheme)$|(html-math-method|code-tools|fig-format|fig-dpi) is ignored$'
                   r'|format\.html\.respect-user-color-scheme is ignored$|(output-file|nocite) is not read by smalldocs$'
                   r'|: broken link [^/]')  # of the text of a page, which check_docs.py finds on the built page
PNG = re.compile(r'<img (?=[^>]*src="data:image/png;base64,([A-Za-z0-9+/]{400}))')
CDN = re.compile(r'<(?:link|script)[^>]*cdn\.jsdelivr\.net/npm/katex[^>]*>(?:</script>)?')
MATHJAX = '''<script>window.MathJax = {tex: {packages: {'[-]': ['noundefined', 'noerrors']}}};</script>
<script defer src="/.site-tools/mathjax/es5/tex-chtml-full.js"></script>'''  # without these packages, bad TeX is an error and not red text


# ---- what Quarto resolves -------------------------------------------------------------------------------------------

def outside_code(func, text):
    "Apply `func` to the parts of a markdown text that are not code."
    out, pos = [], 0
    for m in CODE.finditer(text):
        out += [func(text[pos:m.start()]), m[0]]
        pos = m.end()
    return ''.join([*out, func(text[pos:])])


def options_of(cell):
    "Quarto's `#|` options of a code cell as a dict, and the code below them; raises yaml.YAMLError."
    lines = source(cell).splitlines()
    said = '\n'.join(re.sub(r'^#\| ?', '', l) for l in lines if l.startswith('#|'))
    given = yaml.safe_load(said)
    return (given if isinstance(given, dict) else {}), '\n'.join(l for l in lines if not l.startswith('#|')).strip('\n')


def labels_of(nb):
    "Number of every equation, figure and table of a page, by label, in the order in which they stand."
    found = []
    for cell in nb['cells']:
        if cell['cell_type'] == 'markdown': found += re.findall(r'\{#((?:eq|fig|tbl)-[\w-]+)', source(cell))
        elif cell['cell_type'] == 'code': found.append(str(options_of(cell)[0].get('label', '')))
    of_kind = lambda kind: dict.fromkeys(l for l in found if l.startswith(kind + '-'))
    return {label: i for kind in KINDS for i, label in enumerate(of_kind(kind), 1)}


def resolve(text, numbers, names):
    "Markdown in which numbers, cross-references, citations and links between notebooks are what they are on the site."
    def equation(m): return f'\n\n::: {{#{m[2]}}}\n$${m[1].strip()} \\tag{{{numbers[m[2]]}}}$$\n:::\n\n'
    def reference(m): return f'[{KINDS[m[1].split("-")[0]]} {numbers[m[1]]}](#{m[1]})' if m[1] in numbers else m[0]
    def part(s):
        s = re.sub(r'\$\$(.+?)\$\$[ \t]*\{#(eq-[\w-]+)\}', equation, s, flags=re.S)
        s = CITATION.sub(lambda m: '(' + m[0].strip('[]').replace('@', '') + ')', XREF.sub(reference, s))
        return re.sub(r'\]\(([\w-]+\.ipynb)', lambda m: f']({names.get(m[1], m[1])}', s)
    return outside_code(part, text)


def resolve_cell(cell, numbers, names):
    "Resolve a cell in place; a labelled code cell gets its number into the caption."
    if cell['cell_type'] == 'markdown': cell['source'] = resolve(source(cell), numbers, names)
    if cell['cell_type'] != 'code': return
    options, code = options_of(cell)
    label = str(options.get('label', ''))
    for k in options:
        if k.endswith('-cap'):
            options[k] = (f'{KINDS[k[:3]]} {numbers[label]}: ' if label in numbers else '') + resolve(str(options[k]), numbers, names)
    cell['source'] = '\n'.join([*(f'#| {k}: {json.dumps(v, ensure_ascii=False)}' for k, v in options.items()), code])
    for o in cell.get('outputs', []):
        data = o.get('data', {})
        if 'text/markdown' in data: data['text/markdown'] = resolve(''.join(data['text/markdown']), numbers, names)


# ---- the project ----------------------------------------------------------------------------------------------------

def process(path):
    "The notebook at `path` as nbdev hands it to Quarto, and the warnings on the way."
    from execnb.nbio import nb2str, read_nb
    from nbdev.processors import FilterDefaults
    nb = read_nb(path)
    os.environ['IN_TEST'] = '1'  # as nbdev does: calls of nbdev commands inside notebooks do nothing
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter('always', UserWarning)
            FilterDefaults()(nb)
    finally: del os.environ['IN_TEST']
    return json.loads(nb2str(nb)), [str(w.message) for w in caught if 'imports and other code' in str(w.message)]


def notebooks(nbs):
    "The notebooks that nbdev makes pages of, the one of the API written first."
    from nbdev.doclinks import nbglob
    make_api.write(nbs.parent)
    return sorted(nbglob(nbs, as_path=True))


def write_project(books, nbs, folder):
    "Write processed notebooks, resolved, and everything else of nbs/ as a project that smalldocs builds."
    from nbdev.quarto import refresh_quarto_yml
    refresh_quarto_yml()
    shutil.copytree(nbs, folder, ignore=shutil.ignore_patterns('*.ipynb', '.*'), dirs_exist_ok=True)
    names = {n: site_files.html_name(n, nb).replace('.html', '.ipynb') for n, nb in books.items()}
    for name, nb in books.items():
        numbers = labels_of(nb)
        for cell in nb['cells']: resolve_cell(cell, numbers, names)
        (folder/names[name]).write_text(json.dumps(nb), encoding='utf-8')
    for f in ('sidebar.yml', '_quarto.yml'):
        text = re.sub(r'[\w-]+\.ipynb', lambda m: names.get(m[0], m[0]), (nbs/f).read_text(encoding='utf-8'))
        (folder/f).unlink()
        (folder/f).write_text(text, encoding='utf-8')


def shown_width(start):
    "Width at which Quarto shows a PNG, of which this is the start: half of it at 192 dots per inch; otherwise None, as it is."
    data = base64.b64decode(start)
    number = lambda at: int.from_bytes(data[at:at + 4], 'big')
    dots = data.find(b'pHYs') + 4                          # dots per metre
    return number(16)//2 if dots > 3 and round(number(dots)*.0254) == 192 else None


def shown_widths(site):
    "Give the pictures of every page their widths."
    def sized(m): return f'<img width="{w}" ' if (w := shown_width(m[1])) else m[0]
    for p in site.glob('*.html'): p.write_text(PNG.sub(sized, p.read_text(encoding='utf-8')), encoding='utf-8')


def local_math(site):
    "Take MathJax from the folder of tools instead of KaTeX from a network."
    for p in site.glob('*.html'):
        html = p.read_text(encoding='utf-8')
        head = f'{MATHJAX}</head>' if CDN.search(html) else '</head>'
        p.write_text(CDN.sub('', html).replace('</head>', head, 1), encoding='utf-8')


def build(books, root, site):
    "Build processed notebooks (by name) of the project at `root` into `site`; returns smalldocs' warnings that matter."
    from smalldocs.config import load
    from smalldocs.site import Site
    about = site_files.settings(root)
    for name, nb in books.items(): site_files.prepare(nb, name, about)
    with tempfile.TemporaryDirectory(prefix='prunebook-smoke-') as project:
        write_project(books, root/'nbs', Path(project))
        made = Site(load(Path(project)), quiet=True)
        made.build()
        shutil.rmtree(site, ignore_errors=True)
        shutil.copytree(Path(project)/'_docs', site)
    shown_widths(site)
    local_math(site)
    of_menus = lambda w: re.sub(r'^\S+: (broken link /)', r'\1', w)  # each once, and not for every page
    return list(dict.fromkeys(of_menus(w) for w in made.warnings if not KNOWN.search(w)))


def main():
    "Build, and print what smalldocs warns about."
    site = Path(sys.argv[1] if len(sys.argv) > 1 else ROOT/'_smoke').resolve()
    os.chdir(ROOT)  # nbdev looks for settings.ini from here
    sys.path.insert(0, str(ROOT))
    warned = build({p.name: process(p)[0] for p in notebooks(ROOT/'nbs')}, ROOT, site)
    print(*(f'smalldocs: {w}' for w in warned), f'{len(list(site.glob("*.html")))} pages in {site}', sep='\n')
    return 1 if warned else 0


if __name__ == '__main__': sys.exit(main())

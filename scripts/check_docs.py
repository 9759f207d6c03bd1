"""Check the documentation: what Quarto would render wrongly, and say nothing about.

usage: python scripts/check_docs.py [SITE] [--root FOLDER]      SITE: folder to build into, _smoke by default

The notebooks are read as they are saved, processed by nbdev, given to pandoc, and built by smalldocs (scripts/smoke_site.py). Checked are
- saved notebooks: no error among the outputs, no path of the machine they ran on; a title, and nothing beside it that the page drops;
  a labelled figure or table has a caption and an output, and a picture has a label; code that draws a figure is folded if it is long;
  a sentence that ends in a colon is followed by something; every labelled equation is referred to;
- pandoc: citations are known, TeX can be parsed, fenced divs are closed;
- smalldocs: _quarto.yml has no unknown key and names no missing file;
- built pages, and README.md: links and anchors lead somewhere, also within the site's own address and to files of the repository;
  no link is left as text, ids are given once, cross-references resolve, images have alternative text, headings leave no level out;
- the sidebar lists every notebook once, and the bibliography each key once.
Exit status: 0 if there is no problem, 1 otherwise. Needs nbdev, pypandoc_binary, lxml and smalldocs (Python 3.11 or later).
"""
import argparse
import json
import os
import posixpath
import re
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parent))
import site_files
import smoke_site
from site_files import source

ROOT = Path(__file__).resolve().parent.parent
UNFOLDED = 3  # lines that draw a figure and are not folded


def twice(names): return [n for n, k in Counter(names).items() if k > 1]


# ---- a notebook as it is saved --------------------------------------------------------------------------------------

def title_faults(nb):
    "nbdev makes the page's title and description of the title cell, and drops the rest of that cell."
    titles = [source(c) for c in nb['cells'] if c['cell_type'] == 'markdown' and re.search(r'^#\s+\S', source(c), re.M)]
    if not titles: return ['no title: one markdown cell must hold "# Title" and "> one line"']
    rest = titles[0]
    for pattern in (r'^#\s+\S.*$', r'^>\s+\S.*$'): rest = re.sub(pattern, '', rest, count=1, flags=re.M)
    rest = re.sub(r'^-\s+\S.*:.*\S\s*$', '', rest, flags=re.M).split()
    return [f'the title cell holds more than a title and one "> line", which the page drops: {" ".join(rest)[:80]}'] if rest else []


def output_faults(cell, root):
    "Saved outputs hold no errors and no paths of the machine they were made on."
    homes = [re.escape(str(p)) for p in {root, Path.home()} if len(str(p)) > 3]
    paths = re.compile(rf'(?<![\w.])(?:{"|".join([*homes, "/home/[a-z]", "/Users/[A-Za-z]", "/tmp/ipykernel_"])})[^\s\'"<>]*')
    for o in cell.get('outputs', []):
        if o['output_type'] == 'error': yield f'a saved output is an error: {o.get("ename")}'
        texts = [o.get('text', ''), *(v for k, v in o.get('data', {}).items() if k.startswith('text/'))]
        found = paths.search('\n'.join(map(''.join, texts)))
        if found: yield f'a saved output names a path of this machine: {found[0][:80]}'


def option_faults(cell):
    """Options can be read; a picture has a label; a cell labelled as a figure or table has a caption and a saved output.
    A figure that takes many lines to draw is folded: a page shows what it computes, and not how that is drawn."""
    try: options, drawing = smoke_site.options_of(cell)
    except yaml.YAMLError as e: return ['the #| options are not YAML: ' + ' '.join(str(e).split())]
    label = str(options.get('label', ''))
    kind = label.partition('-')[0]
    pictures = [o for o in cell.get('outputs', []) if 'image/png' in o.get('data', {})]
    if kind not in ('fig', 'tbl'): return ['a picture has no label: it gets no number']*bool(pictures)
    captions = [k for k in options if k.startswith(f'{kind}-') and k.endswith('cap')]
    in_sight = kind == 'fig' and not options.get('code-fold') and options.get('echo') is not False
    long = in_sight and len(drawing.splitlines()) > UNFOLDED
    return [*[f'{label} has no {kind}-cap']*(not captions), *[f'{label} has no saved output']*(not cell.get('outputs')),
            *[f'{label} is drawn by more than {UNFOLDED} lines in sight: add "#| code-fold: true"']*long]


def colon_faults(nb):
    "A cell of prose that ends in a colon leads to a code cell that the page shows."
    hidden = re.compile(r'#\| *(hide\s*$|default_exp|export\s*$|include: *false)', re.M)
    shown = [c for c in nb['cells'] if source(c).strip() and not (c['cell_type'] == 'code' and hidden.match(source(c)))]
    for cell, after in zip(shown, [*shown[1:], None]):
        text = source(cell).rstrip()
        open_end = cell['cell_type'] == 'markdown' and re.search(r'[^:]:$', text) and (after is None or after['cell_type'] != 'code')
        if open_end: yield f'a colon leads to nothing: {text[-60:]!r}'


def equation_faults(nb):
    "A labelled equation is referred to: by the prose, a caption or an answer as @eq-name, or by a docstring as (eq. name)."
    texts = [source(c) for c in nb['cells']]
    cited = {n for t in texts for n in re.findall(r'@eq-([\w-]+)', t)}
    cited |= {n for t in texts for said in site_files.CITED.findall(t) for n in re.findall(r'[\w-]+', said)}
    labels = dict.fromkeys(n for t in texts for n in re.findall(r'\{#eq-([\w-]+)', t))
    return [f'nothing refers to equation eq-{n}' for n in labels if n not in cited]


def saved_faults(nb, root):
    "Faults of a notebook as it is saved."
    cells = [(i, c) for i, c in enumerate(nb['cells']) if c['cell_type'] == 'code']
    return [*title_faults(nb), *colon_faults(nb), *equation_faults(nb), *(f'cell {i}: {said}' for i, c in cells for said in (*output_faults(c, root), *option_faults(c)))]


# ---- pandoc ---------------------------------------------------------------------------------------------------------

def pandoc(text, *args):
    "The warnings of pandoc on a text."
    import pypandoc
    res = subprocess.run([pypandoc.get_pandoc_path(), *args], input=text, capture_output=True, encoding='utf-8')
    warned = re.findall(r'\[WARNING\] (.*(?:\n(?!\[).*)*)', res.stderr) + [res.stderr]*bool(res.returncode)
    warned = [re.sub(r'^Div at line .*', 'a ::: block is never closed', ' '.join(w.split())[:300]) for w in warned]
    return [f'pandoc: {w}' for w in warned if not re.search('nonempty <title>|Could not fetch resource', w)]


def page_text(nb):
    "Prose, captions and rendered outputs of a processed notebook as markdown; cross-references are plain text."
    parts = [str(site_files.front_matter(nb).get('description', ''))]
    for cell in nb['cells']:
        if cell['cell_type'] == 'markdown': parts.append(source(cell))
        if cell['cell_type'] != 'code': continue
        parts += [str(v) for k, v in smoke_site.options_of(cell)[0].items() if k.endswith('-cap')]
        parts += [''.join(o.get('data', {}).get('text/markdown', '')) for o in cell.get('outputs', [])]
    return smoke_site.outside_code(lambda s: smoke_site.XREF.sub('x', s), '\n\n'.join(parts))


# ---- the built site -------------------------------------------------------------------------------------------------

def link_fault(link, name, ids, site, root):
    "What is wrong with a link on page `name`, or None; `ids` are the anchors of every page."
    about = site_files.settings(root)
    if link.startswith(about['files']):
        return None if (root/link.removeprefix(about['files']).partition('#')[0]).exists() else f'broken link {link}: no such file'
    url = link.removeprefix(about['site']).lstrip('/') or 'index.html' if link.startswith(about['site']) else link
    if re.match(r'[a-z][\w+.-]*:|//', url, re.I): return None
    path, _, anchor = url.partition('#')
    path = posixpath.normpath(path) if path else name
    if not (site/path).is_file(): return f'broken link {link}'
    return f'broken anchor {link}' if anchor and path in ids and anchor not in ids[path] else None


def page_faults(page):
    "Ids, cross-references, alternative texts and headings of a built page."
    ids = page.xpath('.//main//@id')
    yield from (f'id {i} is given more than once' for i in twice(ids))
    prose = ' '.join(page.xpath('.//main//text()[not(ancestor::pre or ancestor::code or ancestor::script or ancestor::style)]'))
    yield from (f'unresolved cross-reference @{x}' for x in dict.fromkeys(smoke_site.XREF.findall(prose)))
    yield from (f'a link is shown as text: {x}' for x in dict.fromkeys(re.findall(r'\]\([^()\s]+\)', prose)))
    yield from (f'image without alternative text: {src[:60]}' for src in page.xpath('.//main//img[not(@alt) or @alt=""]/@src'))
    level = 1
    for h in page.xpath('.//main//*[self::h1 or self::h2 or self::h3 or self::h4 or self::h5 or self::h6]'):
        if int(h.tag[1]) > level + 1: yield f'heading {h.text_content().strip()!r} is of level {h.tag[1]} below one of level {level}'
        level = int(h.tag[1])


def site_faults(site, root):
    "Faults of the pages built into `site`, and the links of README.md."
    from lxml import html
    pages = {p.name: html.document_fromstring(p.read_text(encoding='utf-8')) for p in sorted(site.glob('*.html'))}
    ids = {n: set(p.xpath('//@id')) | set(p.xpath('//a/@name')) for n, p in pages.items()}
    for name, page in pages.items():
        links = dict.fromkeys([*page.xpath('.//main//@href'), *page.xpath('.//main//@src')])
        found = [link_fault(link, name, ids, site, root) for link in links]
        yield from (f'{name}: {said}' for said in (*filter(None, found), *page_faults(page)))
    readme = root/'README.md'
    for link in re.findall(r'\]\(([^)\s]+)\)', readme.read_text(encoding='utf-8') if readme.exists() else ''):
        fault = link_fault(link, '', ids, site, root) if ':' in link else None if (root/link).exists() else f'broken link {link}'
        if fault: yield f'README.md: {fault}'


# ---- the project ----------------------------------------------------------------------------------------------------

def listed(node):
    "Files that a sidebar lists, in order."
    if isinstance(node, str): yield node
    elif isinstance(node, list):
        for n in node: yield from listed(n)
    elif isinstance(node, dict):
        for key in ('href', 'contents'): yield from listed(node.get(key, []))


def list_faults(nbs, names):
    "The sidebar lists each notebook once, and only files that exist; the bibliography has each key once and can be read."
    menu = yaml.safe_load((nbs/'sidebar.yml').read_text(encoding='utf-8'))['website']['sidebar']
    given = [n for n in listed(menu) if n.endswith('.ipynb')]
    bib = (nbs/'references.bib').read_text(encoding='utf-8')
    return [*(f'sidebar.yml: {n} is listed more than once' for n in twice(given)),
            *(f'sidebar.yml: {n} does not exist' for n in sorted({*given} - {*names})),
            *(f'sidebar.yml: {n} is not listed' for n in sorted({*names} - {*given})),
            *(f'references.bib: duplicate key {k}' for k in twice(re.findall(r'^\s*@\w+\s*\{\s*([^,\s}]+)', bib, re.M))),
            *(f'references.bib: {w}' for w in pandoc(bib, '-f', 'biblatex', '-t', 'csljson'))]


def check(root, site):
    "(number of pages, problems) of the project at `root`."
    nbs, books, pages = root/'nbs', {}, []
    paths = smoke_site.notebooks(nbs)
    with ThreadPoolExecutor(1) as beside:                  # pandoc works while nbdev and smalldocs do
        for path in paths:
            faults, typeset = saved_faults(json.loads(path.read_text(encoding='utf-8')), root), None
            try:
                books[path.name], warned = smoke_site.process(path)
                text = page_text(books[path.name])
                faults += [f'imports must be in cells of their own: {" ".join(w.split())[:160]}' for w in warned]
                typeset = beside.submit(pandoc, text, '-f', 'markdown', '-t', 'html', '--mathml', '--citeproc', f'--bibliography={nbs/"references.bib"}')
            except yaml.YAMLError: books.pop(path.name, None)  # said among the saved faults
            except Exception as e:
                cause = e.__cause__ or e
                faults.append(f'nbdev cannot process it: {" ".join(f"{type(cause).__name__}: {cause} ({e})".split())[:400]}')
            pages.append((path.name, faults, typeset))
        built = [f'smalldocs: {w}' for w in smoke_site.build(books, root, site)]
    said = [f'{name}: {f}' for name, faults, typeset in pages for f in [*faults, *(typeset.result() if typeset else [])]]
    said += [*list_faults(nbs, [p.name for p in paths]), *built]
    return len(paths), [*said, *site_faults(site, root)]


def main():
    "Check the project and print what is wrong."
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('site', nargs='?', type=Path, help='folder to build into')
    parser.add_argument('--root', type=Path, default=ROOT, help='project folder')
    args = parser.parse_args()
    if sys.version_info < (3, 11): return print('Skipped: the documentation is checked with Python 3.11 or later')
    root = args.root.resolve()
    site = (args.site or root/'_smoke').resolve()
    os.chdir(root)  # nbdev looks for settings.ini from here
    sys.path.insert(0, str(root))
    pages, problems = check(root, site)
    print(*problems, f'{pages} pages checked, {len(problems)} problem(s)', sep='\n')
    return 1 if problems else 0


if __name__ == '__main__': sys.exit(main())

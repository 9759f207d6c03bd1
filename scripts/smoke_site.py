"""Build the site without Quarto, to look at it and to test it in a browser.

usage: python scripts/smoke_site.py [SITE]      SITE: folder to write, _smoke by default

smalldocs, a renderer of `_quarto.yml` projects in pure Python, makes pages with the same themes, sidebar and stylesheet as Quarto. What it
lacks is filled in before: pages get the names they have on the site, equations, figures and tables their numbers, cross-references and
citations their text (citations by pandoc's citeproc). MathJax is taken from .site-tools (`make site-tools`), never from a network; without it
formulas stay TeX. A warning of smalldocs that is not in KNOWN is an error. Needs nbdev, pypandoc_binary and smalldocs (Python 3.11 or later).
"""
import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parent))
import check_docs
import site_files

ROOT = Path(__file__).resolve().parent.parent
KINDS = dict(eq='Equation', fig='Figure', tbl='Table')
CODE = re.compile(r'(^ {0,3}(`{3,}|~{3,}).*?^ {0,3}\2[`~]*[ \t]*$|`+[^`\n]+`+)', re.M | re.S)
KNOWN = re.compile(r'unknown key (lang|bibliography|link-citations|respect-user-color-scheme)$|html-math-method is ignored$|code-tools is ignored$'
                   r'|format\.html\.respect-user-color-scheme is ignored$')
CDN = re.compile(r'<(?:link|script)[^>]*cdn\.jsdelivr\.net/npm/katex[^>]*>(?:</script>)?')
MATHJAX = '''<script>window.MathJax = {tex: {packages: {'[-]': ['noundefined', 'noerrors']}}};</script>
<script defer src="/.site-tools/mathjax/es5/tex-chtml-full.js"></script>'''  # without these packages, what does not parse is an error and not red text


# ---- what Quarto resolves -------------------------------------------------------------------------------------------

def outside_code(func, text):
    "Apply `func` to the parts of a markdown text that are not code."
    out, pos = [], 0
    for m in CODE.finditer(text):
        out += [func(text[pos:m.start()]), m[0]]
        pos = m.end()
    return ''.join([*out, func(text[pos:])])


def labels_of(nb):
    "Number of every equation, figure and table of a page, by label, in the order in which they stand."
    found = []
    for cell in nb['cells']:
        if cell['cell_type'] == 'markdown': found += re.findall(r'\{#((?:eq|fig|tbl)-[\w-]+)', site_files.source(cell))
        elif cell['cell_type'] == 'code': found.append(str(site_files.options_of(cell)[0].get('label', '')))
    count, numbers = dict.fromkeys(KINDS, 0), {}
    for label in found:
        kind = label.partition('-')[0]
        if kind in KINDS and label not in numbers:
            count[kind] += 1
            numbers[label] = count[kind]
    return numbers


def citation_groups(text):
    "The citations of a markdown text: `[@a; @b, p. 3]` and bare `@a`."
    return re.findall(r'\[[^\[\]]*(?<!\w)@[a-zA-Z]\w*\d{4}\w*[^\[\]]*\]|(?<![\w\[;@-])@[a-zA-Z]\w*\d{4}\w*', text)


def cited(groups, bibliography):
    "HTML of every citation, and of the list of references."
    import pypandoc
    text = '\n\n'.join([f'::: {{.cite}}\n{g}\n:::' for g in groups] + ['::: {#refs}\n:::'])
    res = subprocess.run([pypandoc.get_pandoc_path(), '-f', 'markdown', '-t', 'html', '--wrap=none', '--citeproc', f'--bibliography={bibliography}'],
                         input=text, capture_output=True, encoding='utf-8', check=True)
    html = re.findall(r'<div class="cite">\s*<p>(.*?)</p>\s*</div>', res.stdout, re.S)
    assert len(html) == len(groups), 'pandoc lost a citation'
    return dict(zip(groups, html)), res.stdout[res.stdout.index('<div id="refs"'):]


def resolve(text, numbers, citations, references, names):
    "Markdown in which numbers, references, citations and links between notebooks are what they are on the site."
    def part(s):
        s = re.sub(r'\$\$(.+?)\$\$[ \t]*\{#(eq-[\w-]+)\}', lambda m: f'\n\n::: {{#{m[2]}}}\n$${m[1].strip()} \\tag{{{numbers[m[2]]}}}$$\n:::\n\n', s, flags=re.S)
        s = re.sub(r'-?@((?:eq|fig|tbl)-[\w-]+)', lambda m: f'[{KINDS[m[1].split("-")[0]]} {numbers[m[1]]}](#{m[1]})' if m[1] in numbers else m[0], s)
        for g in sorted(citation_groups(s), key=len, reverse=True): s = s.replace(g, citations.get(g, g))
        s = re.sub(r'\]\(([\w-]+)\.ipynb', lambda m: f']({names.get(m[1] + ".ipynb", m[1])}.ipynb', s)
        return s.replace('::: {#refs}\n:::', references)
    return outside_code(part, text)


def resolve_cell(cell, *known):
    "Resolve a cell in place; a labelled code cell gets its number into the caption. Returns markdown to put before it."
    numbers = known[0]
    if cell['cell_type'] == 'markdown': cell['source'] = resolve(site_files.source(cell), *known)
    if cell['cell_type'] != 'code': return ''
    options, code = site_files.options_of(cell)
    label = str(options.get('label', ''))
    for k in options:
        if k.endswith('-cap'): options[k] = (f'{KINDS[k[:3]]} {numbers[label]}: ' if label in numbers else '') + resolve(str(options[k]), *known)
    cell['source'] = '\n'.join([*(f'#| {k}: {json.dumps(v, ensure_ascii=False)}' for k, v in options.items()), code])
    for o in cell.get('outputs', []):
        if 'text/markdown' in o.get('data', {}): o['data']['text/markdown'] = resolve(''.join(o['data']['text/markdown']), *known)
    return f'[]{{#{label}}}' if label in numbers else ''


# ---- the project ----------------------------------------------------------------------------------------------------

def process_all(nbs):
    "Every notebook as nbdev hands it to Quarto, by name, as plain dicts."
    from execnb.nbio import nb2str
    return {p.name: json.loads(nb2str(check_docs.process(p)[0])) for p in check_docs.notebooks(nbs)}


def write_project(books, nbs, folder, about):
    "Write processed notebooks, resolved, and everything else of nbs/ as a project that smalldocs builds."
    shutil.copytree(nbs, folder, ignore=lambda d, names: [n for n in names if n.endswith('.ipynb') or n.startswith('.')], dirs_exist_ok=True)
    names = {n: Path(site_files.html_name(n, site_files.front_matter(nb))).stem for n, nb in books.items()}
    text = '\n\n'.join(site_files.source(c) for nb in books.values() for c in nb['cells'])
    citations, references = cited(list(dict.fromkeys(citation_groups(CODE.sub('', text)))), nbs/'references.bib')
    for name, nb in books.items():
        known = labels_of(nb), citations, references, names
        cells = []
        for i, cell in enumerate(nb['cells']):
            anchor = resolve_cell(cell, *known)
            if anchor: cells.append(dict(cell_type='markdown', id=f'anchor{i}', metadata={}, source=anchor))
            cells.append(cell)
        site_files.add_links(nb := {**nb, 'cells': cells}, name, about)
        (folder/f'{names[name]}.ipynb').write_text(json.dumps(nb), encoding='utf-8')
    renamed = lambda s: re.sub(r'([\w-]+)\.ipynb', lambda m: f'{names.get(m[0], m[1])}.ipynb', s)
    for f in ('sidebar.yml', '_quarto.yml'):
        text = renamed((nbs/f).read_text(encoding='utf-8'))
        (folder/f).unlink()
        (folder/f).write_text(text, encoding='utf-8')
    website = {'title': about['title'], 'site-url': about['site'], 'description': about['description'], 'repo-branch': about['branch'], 'repo-url': f'https://github.com/{about["repository"]}'}
    (folder/'nbdev.yml').write_text(yaml.safe_dump(dict(project={'output-dir': '_docs'}, website=website)))


def local_math(site):
    "Take MathJax from the folder of tools instead of KaTeX from a network."
    for p in site.glob('*.html'):
        html = p.read_text(encoding='utf-8')
        head = f'{MATHJAX}</head>' if CDN.search(html) else '</head>'
        p.write_text(CDN.sub('', html).replace('</head>', head, 1), encoding='utf-8')


def build(root, site):
    "Build the project at `root` into `site`; returns smalldocs' warnings that matter."
    from smalldocs.config import load
    from smalldocs.site import Site
    nbs, about = root/'nbs', site_files.settings(root)
    books = process_all(nbs)
    with tempfile.TemporaryDirectory(prefix='prunebook-smoke-') as tmp:
        proc, project = Path(tmp)/'proc', Path(tmp)/'project'
        proc.mkdir()
        for name, nb in books.items(): (proc/name).write_text(json.dumps(nb), encoding='utf-8')
        write_project(books, nbs, project, about)
        made = Site(load(project), quiet=True)
        made.build()
        shutil.rmtree(site, ignore_errors=True)
        shutil.copytree(project/'_docs', site)
        site_files.finish(proc, site, root)
    local_math(site)
    return [w for w in made.warnings if not KNOWN.search(w) and not w.endswith('output-file is not read by smalldocs')]


def main(argv=None):
    "Build, and print what smalldocs warns about."
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('site', nargs='?', type=Path, default=ROOT/'_smoke', help='folder to write')
    parser.add_argument('--root', type=Path, default=ROOT, help='project folder')
    args = parser.parse_args(argv)
    root, site = args.root.resolve(), args.site.resolve()
    os.chdir(root)  # nbdev looks for settings.ini from here
    sys.path.insert(0, str(root))
    warned = build(root, site)
    for w in warned: print('smalldocs:', w)
    print(f'{len(list(site.glob("*.html")))} pages in {site}')
    return 1 if warned else 0


if __name__ == '__main__': sys.exit(main())

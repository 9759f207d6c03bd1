"""Check the documentation without Quarto: what Quarto would render wrongly, and say nothing about.

usage: python scripts/check_docs.py [--alt] [--root FOLDER]

The notebooks go through nbdev's own processing (so reference entries and links to symbols are in), then pandoc reads
each page. Checked are
- links: to other pages, to their anchors, to files, to this project's site and repository;
- labels: each once on a page; a labelled figure or table has a caption and a saved output;
- cross-references `@fig-x`, `@eq-x`, ...: they resolve on their own page, as Quarto needs;
- citations (through citeproc), the keys of the bibliography, TeX, and fenced divs that are not closed;
- saved outputs: no errors, no paths of the machine the notebook ran on;
- title cells: text beside the title and its `>` line is lost on the page, so there must be none;
- headings: no level is left out on the way down;
- the sidebar: it lists every notebook, and nothing else;
- _quarto.yml: no keys that Quarto 1.7 does not know (for the website it refuses them), and the files it names exist.
With --alt, images without alternative text count as problems too.
Nothing is written. Exit status: 0 if there is no problem, 1 otherwise. Needs nbdev and pypandoc_binary.
"""
import argparse
import json
import os
import posixpath
import re
import subprocess
import sys
import warnings
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parent.parent
KINDS = 'fig tbl eq sec lst thm lem cor prp cnj def exm exr sol rem alg nte tip wrn imp cau'.split()
XREF = re.compile(rf'({"|".join(KINDS)})-[\w.:-]+$', re.I)
OUR_OWN_REPORT = re.compile(r'nonempty <title>|Could not fetch resource')  # pandoc warnings that say nothing about a page


# ---- pages ----------------------------------------------------------------------------------------------------------

@dataclass
class Page:
    "What one processed notebook holds."
    name: str                                     # path of the notebook inside nbs/
    html: str                                     # path of the page on the site
    problems: list = field(default_factory=list)
    ids: list = field(default_factory=list)       # every anchor, with repetitions
    links: list = field(default_factory=list)     # targets of links and images
    xrefs: list = field(default_factory=list)     # `fig-x` for every `@fig-x`
    ast: dict = None                              # pandoc's syntax tree

    def report(self, problem): self.problems.append(f'{self.name}: {problem}')


def source(cell): return ''.join(cell['source'])


def process(path):
    "The notebook at `path` as nbdev hands it to Quarto, and the warnings on the way."
    from execnb.nbio import read_nb
    from nbdev.processors import FilterDefaults
    nb = read_nb(path)
    os.environ['IN_TEST'] = '1'  # as nbdev does: calls of nbdev commands inside notebooks do nothing
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter('always', UserWarning)
            FilterDefaults()(nb)
    finally: del os.environ['IN_TEST']
    return nb, [str(w.message) for w in caught if 'imports and other code' in str(w.message)]


def cell_options(cell):
    "Quarto's options of a code cell, the YAML after `#|` in its first lines; and what is wrong with it, or None."
    lines = []
    for line in source(cell).splitlines():
        if not line.startswith('#|'): break
        lines.append(re.sub(r'^#\| ?', '', line))
    try: options = yaml.safe_load('\n'.join(lines))
    except yaml.YAMLError as e: return {}, 'the #| options are not YAML: ' + ' '.join(str(e).split())
    return (options if isinstance(options, dict) else {}), None


def output_markdown(cell):
    "The saved outputs of a code cell that are rendered as markdown."
    bundles = [o.get('data', {}) for o in cell.get('outputs', [])]
    return [''.join(d.get('text/markdown') or d.get('text/latex') or '') for d in bundles]


def front_matter(nb):
    "The YAML that nbdev puts into the first cell of a processed notebook."
    cells = nb['cells']
    if not cells or cells[0]['cell_type'] != 'raw': return {}
    return yaml.safe_load(source(cells[0]).strip().strip('-')) or {}


def page_markdown(nb, page):
    "The text of a page as one markdown document: title, prose, captions and rendered outputs, without code."
    meta = front_matter(nb)
    parts = [str(meta.get(k, '')) for k in ('title', 'description')]
    for i, cell in enumerate(nb['cells']):
        if cell['cell_type'] == 'markdown': parts.append(source(cell))
        if cell['cell_type'] != 'code': continue
        options, wrong = cell_options(cell)
        if wrong: page.report(f'cell {i}: {wrong}')
        check_label(cell, options, page)
        parts += [str(v) for k, v in options.items() if k.endswith('-cap')]
        parts += output_markdown(cell)
    return '\n\n'.join(p for p in parts if p.strip())


def read_page(path, nbs):
    "Process the notebook at `path` and collect anchors, links and cross-references."
    from nbdev.doclinks import _nbpath2html
    rel = path.relative_to(nbs)
    page = Page(rel.as_posix(), _nbpath2html(rel).as_posix())
    try: nb, warned = process(path)
    except Exception as e:
        cause = e.__cause__ or e
        where = f' ({e})' if e.__cause__ else ''
        page.report('nbdev cannot process it: ' + ' '.join(f'{type(cause).__name__}: {cause}{where}'.split())[:400])
        return page, None
    for w in warned: page.report('imports must be in cells of their own: ' + ' '.join(w.split())[:160])
    text, warned = pandoc(page_markdown(nb, page), '-f', 'markdown', '-t', 'json')
    for w in warned: page.report('pandoc: ' + w)
    page.ast = json.loads(text)
    for node in walk(page.ast): collect(node, page)
    return page, nb


# ---- pandoc ---------------------------------------------------------------------------------------------------------

def pandoc(text, *args):
    "Run pandoc on `text`; (its output, its warnings as a list)."
    import pypandoc
    res = subprocess.run([pypandoc.get_pandoc_path(), *args], input=text, capture_output=True, encoding='utf-8')
    warned = re.findall(r'\[WARNING\] (.*(?:\n(?!\[).*)*)', res.stderr)
    warned = [re.sub(r'^Div at line .*', 'a ::: block is never closed', w) for w in warned]
    if res.returncode: warned.append('failed: ' + (res.stderr or f'exit status {res.returncode}'))
    return res.stdout or '{}', [' '.join(w.split())[:300] for w in warned if not OUR_OWN_REPORT.search(w)]


def walk(node):
    "Every tagged node of a pandoc syntax tree."
    if isinstance(node, dict):
        if 't' in node: yield node
        node = list(node.values())
    if isinstance(node, list):
        for child in node: yield from walk(child)


def attributes(node):
    "(identifier, classes, key-value dict) of a node; empty for nodes without attributes."
    where = {'Header': 1}.get(node['t'], 0)
    if node['t'] not in ('Header', 'CodeBlock', 'Code', 'Div', 'Span', 'Link', 'Image', 'Table', 'Figure'): return '', [], {}
    name, classes, pairs = node['c'][where]
    return name, classes, dict(pairs)


def collect(node, page):
    "Note the anchors, links and cross-references of one node."
    kind, content = node['t'], node.get('c')
    if attributes(node)[0]: page.ids.append(attributes(node)[0])
    if kind == 'Str': page.ids += re.findall(r'\{#([\w.:-]+)', content)       # labels of equations and tables
    if kind in ('RawInline', 'RawBlock'): page.ids += re.findall(r'\s(?:id|name)="([^"]+)"', content[1])
    if kind in ('Link', 'Image'): page.links.append(content[2][0])
    if kind == 'Cite': page.xrefs += [c['citationId'] for c in content[0] if XREF.match(c['citationId'])]


def without_xrefs(node):
    "A copy of the syntax tree in which cross-references are plain text, so that citeproc does not look for them."
    if isinstance(node, list): return [without_xrefs(n) for n in node]
    if not isinstance(node, dict): return node
    if node.get('t') == 'Cite' and any(XREF.match(c['citationId']) for c in node['c'][0]): return {'t': 'Str', 'c': 'x'}
    return {k: without_xrefs(v) for k, v in node.items()}


# ---- checks of one page ---------------------------------------------------------------------------------------------

def check_label(cell, options, page):
    "A cell labelled as a figure or table can be referred to only if it has a caption and a saved output."
    label = options.get('label')
    if not label: return
    page.ids.append(label)
    kind = str(label).partition('-')[0]
    if kind not in ('fig', 'tbl'): return
    if not any(k.startswith(f'{kind}-') and k.endswith('cap') for k in options): page.report(f'{label} has no {kind}-cap')
    if not cell.get('outputs'): page.report(f'{label} has no saved output')


def check_labels(page, numbered_sections):
    "Labels occur once; cross-references resolve on the page."
    page.problems += [f'{page.name}: duplicate label {x}' for x, n in Counter(page.ids).items() if n > 1]
    for x in dict.fromkeys(page.xrefs):
        name = x[0].lower() + x[1:]
        if name not in page.ids: page.report(f'unresolved cross-reference @{x}')
        elif name.startswith('sec-') and not numbered_sections:
            page.report(f'@{x} needs numbered sections; write [text](#{name})')


def check_link(link, page, site):
    "One link or image of a page; `site` is a Site."
    url, _, anchor = site.relative(link, page).partition('#')
    if re.match(r'[a-z][\w+.-]*:|//', url, re.I): return
    if url.startswith('repo/'):
        if not (site.root/url[5:]).exists(): page.report(f'broken link {link}: no such file in the repository')
        return
    path = posixpath.normpath(posixpath.join(posixpath.dirname(page.name), url)) if url else page.name
    other = site.find(path)
    if other is None:
        if path.startswith('..') or not (site.nbs/path).is_file(): page.report(f'broken link {link}')
    elif anchor and other.ast and anchor not in other.ids: page.report(f'broken anchor {link}')


def check_rendering(page, bibliographies):
    "What pandoc says of the page: unknown citations, bad TeX, divs left open."
    options = ['--mathml', '--citeproc', *(f'--bibliography={b}' for b in bibliographies if b.exists())]
    _, warned = pandoc(json.dumps(without_xrefs(page.ast)), '-f', 'json', '-t', 'html', *options)
    for w in warned: page.report('pandoc: ' + w)


def check_alt(nb, page):
    "Images need alternative text: `fig-alt` (or a caption) for outputs, `![text](...)` for files."
    for i, cell in enumerate(nb['cells']):
        if cell['cell_type'] != 'code': continue
        options, _ = cell_options(cell)
        shown = options.get('output') is not False and options.get('include') is not False
        image = any(k.startswith('image/') for o in cell.get('outputs', []) for k in o.get('data', {}))
        if shown and image and not options.get('fig-alt'): page.report(f'{options.get("label") or f"cell {i}"}: image output without fig-alt')
    for node in walk(page.ast):
        if node['t'] == 'Image' and not node['c'][1] and not {'fig-alt', 'alt'} & attributes(node)[2].keys():
            page.report(f'image without alternative text: {node["c"][2][0]}')


# ---- checks of a notebook as it is saved ----------------------------------------------------------------------------

def output_text(output):
    "All text of a saved output."
    values = [output.get('text', ''), *(v for k, v in output.get('data', {}).items() if k.startswith('text/'))]
    return '\n'.join(''.join(v) for v in values)


def check_outputs(nb, page, root):
    "Saved outputs hold no errors and no paths of the machine they were made on."
    homes = [re.escape(str(p)) for p in {root, Path.home()} if len(str(p)) > 3]
    paths = re.compile(rf'(?<![\w.])(?:{"|".join([*homes, "/home/[a-z]", "/Users/[A-Za-z]", "/tmp/ipykernel_"])})[^\s\'"<>]*')
    for i, cell in enumerate(nb['cells']):
        for o in cell.get('outputs', []):
            if o['output_type'] == 'error': page.report(f'cell {i}: a saved output is an error: {o.get("ename")}')
            m = paths.search(output_text(o))
            if m: page.report(f'cell {i}: a saved output names a path of this machine: {m.group(0)[:80]}')


def check_title(nb, page):
    "nbdev makes the page's title and description of the title cell, and drops the rest of that cell."
    titles = [source(c) for c in nb['cells'] if c['cell_type'] == 'markdown' and re.search(r'^#\s+\S', source(c), re.M)]
    if not titles: return page.report('no title: one markdown cell must hold "# Title" and "> one line"')
    rest = titles[0]
    for pattern in (r'^#\s+\S.*$', r'^>\s+\S.*$'): rest = re.sub(pattern, '', rest, count=1, flags=re.M)
    rest = re.sub(r'^-\s+\S.*:.*\S\s*$', '', rest, flags=re.M).split()
    if rest: page.report(f'the title cell holds more than "# Title" and one "> line", which the page drops: {" ".join(rest)[:80]}')


def check_headings(page):
    "Headings go down one level at a time; the title is level 1."
    level = 1
    for node in walk(page.ast):
        if node['t'] != 'Header': continue
        if node['c'][0] > level + 1: page.report(f'heading {node["c"][1][0]!r} is of level {node["c"][0]} below one of level {level}')
        level = node['c'][0]


# ---- checks of the project ------------------------------------------------------------------------------------------

@dataclass
class Site:
    "The project: its folders, settings and pages."
    root: Path
    nbs: Path
    url: str            # address of the documentation
    repository: str     # address under which files of the repository are shown
    quarto: dict        # _quarto.yml
    pages: dict         # name of the notebook -> Page

    def find(self, path):
        "The page that a path inside the site leads to, by notebook or by HTML name."
        if path in self.pages: return self.pages[path]
        return next((p for p in self.pages.values() if p.html == path), None)

    def relative(self, link, page):
        "`link` with this site's address made relative to `page`, and this repository's files as `repo/...`."
        if link.startswith(self.repository): return 'repo/' + link.removeprefix(self.repository).partition('#')[0]
        if link.rstrip('/') == self.url: link = self.url + '/index.html'
        if not link.startswith(self.url + '/'): return link
        return posixpath.join(posixpath.relpath('.', posixpath.dirname(page.name) or '.'), link.removeprefix(self.url + '/'))

    @property
    def bibliographies(self):
        "The bibliography files of _quarto.yml."
        names = self.quarto.get('bibliography') or []
        return [self.nbs/n for n in ([names] if isinstance(names, str) else names)]

    @property
    def numbered_sections(self):
        "Does _quarto.yml number the sections?"
        html = (self.quarto.get('format') or {}).get('html')
        return bool(self.quarto.get('number-sections') or (isinstance(html, dict) and html.get('number-sections')))


def notebooks(nbs):
    "The notebooks that nbdev makes pages of."
    from nbdev.doclinks import nbglob
    return sorted(nbglob(nbs, as_path=True))


def listed(node):
    "Files that a sidebar lists, in order."
    if isinstance(node, str): yield node
    elif isinstance(node, list):
        for n in node: yield from listed(n)
    elif isinstance(node, dict):
        for key in ('href', 'file', 'contents'): yield from listed(node.get(key, []))


PROJECT_KEYS = 'type output-dir render preview pre-render post-render resources lib-dir execute-dir title'.split()
WEBSITE_KEYS = """title description favicon site-url site-path repo-url repo-link-target repo-link-rel repo-subdir repo-branch issue-url repo-actions reader-mode google-analytics announcement
    cookie-consent search navbar sidebar body-header body-footer margin-header margin-footer page-navigation back-to-top-navigation bread-crumbs page-footer image image-alt image-height image-width
    open-graph twitter-card other-links code-links drafts draft-mode comments""".split()
HTML_KEYS = """theme css toc toc-depth toc-title toc-location toc-expand number-sections number-depth code-fold code-summary code-copy code-overflow code-tools code-line-numbers code-annotations
    html-math-method fig-align fig-width fig-height fig-format fig-dpi fig-cap-location tbl-cap-location link-external-newwindow link-external-icon link-external-filter smooth-scroll anchor-sections
    respect-user-color-scheme highlight-style include-in-header include-before-body include-after-body grid page-layout mainfont monofont fontsize linestretch lightbox citations-hover crossrefs-hover
    footnotes-hover reference-location citation-location embed-resources axe""".split()
TOP_KEYS = 'project website format lang bibliography csl link-citations nocite metadata-files crossref execute filters author date comments resources'.split()


def check_settings(site):
    "Keys of _quarto.yml that Quarto does not know, and files that are not there."
    q, said = site.quarto, []
    def unknown(where, given, known): said.extend(f'_quarto.yml: unknown key {where}{k}' for k in (given if isinstance(given, dict) else {}) if k not in known)
    unknown('', q, TOP_KEYS)
    unknown('project.', q.get('project'), PROJECT_KEYS)
    unknown('website.', q.get('website'), WEBSITE_KEYS)
    html, website = (q.get('format') or {}).get('html'), q.get('website') or {}
    unknown('format.html.', html, HTML_KEYS)
    css = html.get('css') if isinstance(html, dict) else None
    files = [*([css] if isinstance(css, str) else css or []), website.get('favicon'), *(f for f in q.get('metadata-files') or [] if f != 'nbdev.yml')]
    return said + [f'_quarto.yml: {f} does not exist' for f in files if f and not (site.nbs/f).exists()]


def check_sidebar(site):
    "The sidebar lists each notebook once, and only files that exist."
    path = site.nbs/'sidebar.yml'
    if not path.exists(): return ['sidebar.yml: missing']
    sidebar = (yaml.safe_load(path.read_text(encoding='utf-8')) or {}).get('website', {}).get('sidebar', {})
    names = Counter(n for n in listed(sidebar) if n.endswith(('.ipynb', '.qmd', '.md')))
    return [*(f'sidebar.yml: {n} does not exist' for n in names if not (site.nbs/n).exists()),
            *(f'sidebar.yml: {n} is listed {k} times' for n, k in names.items() if k > 1),
            *(f'sidebar.yml: {n} is not listed' for n in site.pages if n not in names)]


def check_bibliography(path):
    "The bibliography can be read and has each key once."
    if not path.exists(): return [f'{path.name}: missing']
    text = path.read_text(encoding='utf-8')
    entries = re.findall(r'^\s*@(\w+)\s*\{\s*([^,\s}]+)', text, re.M)
    keys = Counter(key for kind, key in entries if kind.lower() not in ('comment', 'string', 'preamble'))
    _, warned = pandoc(text, '-f', 'biblatex', '-t', 'csljson')
    return [*(f'{path.name}: duplicate key {k}' for k, n in keys.items() if n > 1), *(f'{path.name}: {w}' for w in warned)]


def load(root):
    "The Site at `root`, its pages still to be filled in."
    from nbdev.config import get_config
    cfg = get_config()
    quarto = yaml.safe_load((cfg.nbs_path/'_quarto.yml').read_text(encoding='utf-8')) or {}
    return Site(root, cfg.nbs_path.resolve(), cfg.doc_host + cfg.doc_baseurl, f'{cfg.git_url}/blob/{cfg.branch}/', quarto, {})


def check(root, alt=False):
    "(number of pages, problems) of the project at `root`."
    site, processed = load(root), {}
    for path in notebooks(site.nbs):
        page, processed[path] = read_page(path, site.nbs)
        site.pages[page.name] = page
    for path, nb in processed.items():
        page = site.pages[path.relative_to(site.nbs).as_posix()]
        saved = json.loads(path.read_text(encoding='utf-8'))
        check_title(saved, page)
        check_outputs(saved, page, root)
        if nb is None: continue
        check_labels(page, site.numbered_sections)
        check_headings(page)
        for link in dict.fromkeys(page.links): check_link(link, page, site)
        check_rendering(page, site.bibliographies)
        if alt: check_alt(nb, page)
    problems = check_settings(site) + check_sidebar(site) + [p for b in site.bibliographies for p in check_bibliography(b)]
    problems += [p for page in site.pages.values() for p in page.problems]
    return len(site.pages), problems if site.pages else [*problems, 'no notebooks found']


def main(argv=None):
    "Check the project and print what is wrong."
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--alt', action='store_true', help='images without alternative text are problems')
    parser.add_argument('--root', type=Path, default=ROOT, help='project folder')
    args = parser.parse_args(argv)
    root = args.root.resolve()
    os.chdir(root)  # nbdev looks for settings.ini from here
    sys.path.insert(0, str(root))
    n_pages, problems = check(root, args.alt)
    for p in problems: print(p)
    print(f'{n_pages} pages checked, {len(problems)} problem(s)')
    return 1 if problems else 0


if __name__ == '__main__': sys.exit(main())

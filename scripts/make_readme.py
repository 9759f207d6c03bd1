"""Make README.md from nbs/index.ipynb. Needs Python only: neither Quarto nor nbdev.

usage: python scripts/make_readme.py            write README.md
       python scripts/make_readme.py --check    exit 1 if README.md is not what this script would write

What it does to the notebook:
- markdown cells are kept; callouts become block quotes, other `:::` fences and `{#id .class}` attributes go;
- code cells are kept unless `#| hide`, `#| export` or `#| include: false`; `#| echo: false` drops the source,
  `#| output: false` the output; text outputs follow in a fence of their own;
- links to notebooks lead to the documentation site, other relative links into nbs/.
What a README cannot show is an error: image outputs, citations and cross-references (`@fig-x`), shortcodes.
"""
import argparse
import difflib
import json
import posixpath
import re
import sys
from configparser import ConfigParser
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
HEADER = '<!-- Generated from nbs/index.ipynb by scripts/make_readme.py: edit the notebook, then run `make readme`. -->'
DROPPED = {'hide', 'export', 'exporti', 'default_exp'}
FENCED = re.compile(r'(^ {0,3}(`{3,}|~{3,}).*?^ {0,3}\2[`~]*[ \t]*$)', re.M | re.S)
INLINE_CODE = re.compile(r'(`+[^`]+`+)')
DIFF_LINES = 20


class ReadmeError(Exception):
    "Something in the index notebook that a README cannot show."


# ---- markdown -------------------------------------------------------------------------------------------------------

def outside(pattern, text, func):
    "Apply `func` to the parts of `text` that `pattern` (with one outer group) does not match."
    out, pos = [], 0
    for m in pattern.finditer(text):
        out += [func(text[pos:m.start()]), m.group(0)]
        pos = m.end()
    return ''.join([*out, func(text[pos:])])


def open_fence(line, fence):
    "The code fence that is open after `line`, given the one before it (None if there is none)."
    m = re.match(r' {0,3}(`{3,}|~{3,})', line)
    if not m: return fence
    if fence is None: return m.group(1)
    return None if line.strip().startswith(fence) else fence


def callouts(text):
    "Turn `::: {.callout-note title=\"T\"}` blocks into block quotes; drop other `:::` fences. Code is left alone."
    out, stack, fence = [], [], None  # stack: for each open ::: block, is it a callout?
    for line in text.splitlines():
        before, fence = fence, open_fence(line, fence)
        div = None if before or fence else re.match(r'\s*:{3,}\s*(.*?)\s*$', line)
        quote = '> ' * stack.count(True)
        if div is None:
            if fence or line.strip() or out[-1:] != ['']: out.append((quote + line).rstrip())
        elif div.group(1):
            kind = re.search(r'\.callout-(\w+)', div.group(1))
            stack.append(bool(kind))
            if kind: out += [f'{quote}> **{title(div.group(1), kind.group(1))}**', quote + '>']
        elif stack: out += [''] if stack.pop() else []
        else: raise ReadmeError('a ::: fence is closed that was not opened')
    if stack: raise ReadmeError('a ::: fence is not closed')
    return '\n'.join(out)


def title(attributes, kind):
    "Title of a callout: its own, or the name of its kind."
    m = re.search(r'title="([^"]*)"', attributes)
    return m.group(1) if m else kind.capitalize()


def html_name(notebook):
    "Page that nbdev makes of a notebook: `methods/20_fasp.ipynb` gives `methods/fasp.html`."
    folder, name = posixpath.split(notebook)
    stem = re.sub(r'^\d+[a-zA-Z0-9]*_', '', name.lower()).removesuffix('.ipynb')
    return posixpath.join(folder, stem + '.html')


def target(url, site):
    "Where a link of the notebook leads when it stands in README.md."
    if re.match(r'[a-zA-Z][\w+.-]*:|#|/', url): return url
    path, mark, anchor = url.partition('#')
    if path.endswith('.ipynb'): return f'{site}/{html_name(posixpath.normpath(path))}{mark}{anchor}'
    return posixpath.normpath(posixpath.join('nbs', path)) + mark + anchor


def prose(text, site):
    "Rewrite one stretch of markdown that holds no code."
    text = re.sub(r'(\]\()([^)\s]+)', lambda m: m.group(1) + target(m.group(2), site), text)
    text = re.sub(r'(<img[^>]*\ssrc=")([^"]+)', lambda m: m.group(1) + target(m.group(2), site), text)
    return re.sub(r'(?<=[)\]$])\s*\{[#.\w][^{}\n]*\}', '', text)  # attributes of images, links, spans, equations


def refuse(text):
    "Raise if the prose holds something that only Quarto resolves."
    text = INLINE_CODE.sub('', FENCED.sub('', text))
    shortcode = re.search(r'\{\{<.*?>\}\}', text)
    if shortcode: raise ReadmeError(f'a shortcode does not work in a README: {shortcode.group(0)}')
    reference = re.search(r'(?<![\w./])@[a-zA-Z][\w:-]+', re.sub(r'\]\([^)]*\)|<[^>]+>', '', text))
    if reference: raise ReadmeError(f'a citation or cross-reference does not work in a README: {reference.group(0)}; write a plain link')


def markdown_cell(source, site):
    "A markdown cell, ready for README.md."
    if source.startswith('# '): source = re.sub(r'^-\s+\S.*:.*\S\s*$', '', source, flags=re.M)  # nbdev front matter below the title
    refuse(source)

    def rewrite(text):
        text = re.sub(r'^(#{1,6} .*?)\s*\{[#.\w-][^{}\n]*\}[ \t]*$', r'\1', text, flags=re.M)  # attributes of headings
        return outside(INLINE_CODE, text, lambda t: prose(t, site))
    return callouts(outside(FENCED, source, rewrite)).strip()


# ---- code cells and their outputs -----------------------------------------------------------------------------------

def split_directives(source):
    "`#|` lines of a code cell as a dict (a bare directive maps to ''), and the code that is left."
    lines = source.splitlines()
    found = {}
    for line in lines:
        m = re.match(r'\s*#\s*\|\s*([\w-]+)\s*:?\s*(.*?)\s*$', line)
        if m: found[m.group(1)] = m.group(2)
    return found, '\n'.join(l for l in lines if not re.match(r'\s*#\s*\|', l)).strip('\n')


def fence(text, language):
    "`text` in a code fence long enough for what it holds."
    ticks = '`' * max([3, *(len(m) + 1 for m in re.findall(r'`{3,}', text))])
    return f'{ticks}{language}\n{text}\n{ticks}'


def one_output(output, site):
    "One output of a code cell as markdown; '' if there is nothing to show."
    if output['output_type'] == 'error': raise ReadmeError(f'a saved output is an error: {output.get("ename")}')
    if output['output_type'] == 'stream':
        text = ''.join(output['text']).rstrip() if output.get('name') == 'stdout' else ''
        return fence(text, 'text') if text else ''
    data = output.get('data', {})
    if any(kind.startswith('image/') for kind in data):
        raise ReadmeError('an image output does not work in a README: save it under nbs/images/ and show the file, ![alt](images/x.png)')
    if 'text/markdown' in data: return markdown_cell(''.join(data['text/markdown']), site)
    text = ''.join(data.get('text/plain', '')).rstrip()
    return fence(text, 'text') if text else ''


def code_cell(cell, site):
    "A code cell and its outputs, as its directives want them."
    directives, code = split_directives(''.join(cell['source']))
    if DROPPED & directives.keys() or directives.get('include') == 'false': return []
    parts = [] if directives.get('echo') == 'false' or not code.strip() else [fence(code, 'python')]
    if directives.get('output') != 'false': parts += [one_output(o, site) for o in cell.get('outputs', [])]
    return parts


# ---- the whole ------------------------------------------------------------------------------------------------------

def readme(notebook, site):
    "Text of README.md for the index notebook, given as a dict; `site` is the address of the documentation."
    parts = [HEADER]
    for i, cell in enumerate(notebook['cells']):
        try:
            if cell['cell_type'] == 'markdown': parts.append(markdown_cell(''.join(cell['source']), site))
            elif cell['cell_type'] == 'code': parts += code_cell(cell, site)
        except ReadmeError as e: raise ReadmeError(f'cell {i} of the index notebook: {e}') from None
    return '\n\n'.join(p for p in parts if p.strip()) + '\n'


def site_url(root):
    "Address of the documentation, from settings.ini."
    ini = ConfigParser(delimiters=['='])
    ini.read(root/'settings.ini', encoding='utf-8')
    return ini['DEFAULT']['doc_host'] + ini['DEFAULT']['doc_baseurl']


def main(argv=None):
    "Write or check README.md."
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--check', action='store_true', help='compare only')
    parser.add_argument('--root', type=Path, default=ROOT, help='project folder')
    args = parser.parse_args(argv)
    path = args.root/'README.md'
    try: text = readme(json.loads((args.root/'nbs'/'index.ipynb').read_text(encoding='utf-8')), site_url(args.root))
    except ReadmeError as e: sys.exit(f'README.md cannot be made: {e}')
    if not args.check:
        path.write_text(text, encoding='utf-8')
        return 0
    old = path.read_text(encoding='utf-8') if path.exists() else ''
    if old == text: return 0
    diff = list(difflib.unified_diff(old.splitlines(), text.splitlines(), 'README.md', 'from nbs/index.ipynb', n=1, lineterm=''))
    print('\n'.join(diff[:DIFF_LINES]))
    print('README.md is not in step with nbs/index.ipynb. To mend it, run: make readme')
    return 1


if __name__ == '__main__': sys.exit(main())

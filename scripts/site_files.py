"""What the pages of the site get besides nbdev's processing, for Quarto and for the smoke build alike.

usage: python scripts/site_files.py prepare PROC       before rendering: links to Colab and to the notebook, in every page's front matter
       python scripts/site_files.py finish PROC SITE   after rendering: the notebooks themselves, llms.txt and a text copy of every page

PROC is the folder of processed notebooks (_proc), SITE the rendered site (_docs). `prepare` may run twice; the result is the same.
llms.txt lists every page with its one-line promise, in the order of the sidebar; page.html.md is the page as markdown.
"""
import argparse
import json
import re
import shutil
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parent.parent


def settings(root):
    "Addresses and words of the project from settings.ini: site, repository (`user/name`), branch, title, description."
    from configparser import ConfigParser
    ini = ConfigParser(delimiters=['='])
    ini.read(root/'settings.ini', encoding='utf-8')
    d = ini['DEFAULT']
    return dict(site=d['doc_host'] + d['doc_baseurl'], repository=f'{d["user"]}/{d["repo"]}', branch=d['branch'], title=d['title'], description=d['description'])


# ---- one page -------------------------------------------------------------------------------------------------------

def source(cell): return ''.join(cell['source'])


def front_matter(nb):
    "YAML in the first cell of a processed notebook, as a dict."
    cells = nb['cells']
    return (yaml.safe_load(source(cells[0]).strip().strip('-')) or {}) if cells and cells[0]['cell_type'] == 'raw' else {}


def page_links(name, about):
    "Links of a page that differ from page to page."
    return [dict(text='Open in Colab', icon='play-circle', href=f'https://colab.research.google.com/github/{about["repository"]}/blob/{about["branch"]}/nbs/{name}'),
            dict(text='Download notebook', icon='download', href=f'{about["site"]}/notebooks/{name}')]


def add_links(nb, name, about):
    "Put `page_links` into the front matter of a processed notebook, in place."
    meta = {**front_matter(nb), 'other-links': page_links(name, about)}
    text = '---\n' + yaml.safe_dump(meta, sort_keys=True, allow_unicode=True) + '---\n'
    nb['cells'][0]['source'] = text.splitlines(True)


def options_of(cell):
    "Quarto's `#|` options of a code cell as a dict, and the code below them."
    lines = source(cell).splitlines()
    said = [l for l in lines if l.startswith('#|')]
    given = yaml.safe_load('\n'.join(re.sub(r'^#\| ?', '', l) for l in said)) if said else {}
    return (given if isinstance(given, dict) else {}), '\n'.join(l for l in lines if not l.startswith('#|')).strip('\n')


def fenced(text, language=''):
    "Text in a fence that is longer than any inside it."
    ticks = '`' * max([3, *(len(m) + 1 for m in re.findall(r'`{3,}', text))])
    return f'{ticks}{language}\n{text}\n{ticks}'


def output_text(output, options):
    "One saved output as markdown; figures by their alternative text."
    data = output.get('data', {})
    if any(k.startswith('image/') for k in data): return f'(Figure: {options.get("fig-alt") or options.get("fig-cap") or "no description"})'
    if 'text/markdown' in data: return ''.join(data['text/markdown'])
    text = ''.join(output.get('text') or data.get('text/plain') or '').rstrip()
    return fenced(text, 'text') if text else ''


def page_text(nb):
    "A processed notebook as one markdown text: title, promise, prose, code and outputs."
    meta = front_matter(nb)
    parts = [f'# {meta.get("title", "")}', f'> {meta["description"]}' if meta.get('description') else '']
    for cell in nb['cells']:
        if cell['cell_type'] == 'markdown': parts.append(re.sub(r'<!--.*?-->', '', source(cell), flags=re.S).strip())
        if cell['cell_type'] != 'code': continue
        options, code = options_of(cell)
        if options.get('include') is False: continue
        if options.get('echo') is not False and code: parts.append(fenced(code, 'python'))
        if options.get('output') is not False: parts += [output_text(o, options) for o in cell.get('outputs', [])]
        parts += [str(v) for k, v in options.items() if k.endswith('-cap')]
    return '\n\n'.join(p for p in parts if p.strip()) + '\n'


# ---- all pages ------------------------------------------------------------------------------------------------------

def sections(sidebar):
    "(heading, files) of the sidebar, in order; the heading of files outside sections is ''."
    loose = []
    for item in sidebar['website']['sidebar']['contents']:
        if isinstance(item, dict) and 'section' in item:
            if loose: yield '', loose
            loose = []
            yield item['section'], [i if isinstance(i, str) else i['href'] for i in item['contents']]
        else: loose.append(item if isinstance(item, str) else item['href'])
    if loose: yield '', loose


def llms_txt(pages, sidebar, about):
    "Text of llms.txt; `pages` are front matters by name of the notebook."
    lines = [f'# {about["title"]}', '', f'> {about["description"]}', '', 'Every page is also there as markdown: the links below lead to these copies.', '']
    for heading, names in sections(sidebar):
        lines += [f'## {heading}', ''] if heading else []
        lines += [f'- [{pages[n]["title"]}]({about["site"]}/{html_name(n, pages[n])}.md): {pages[n].get("description", "")}' for n in names if n in pages] + ['']
    return '\n'.join(lines)


def html_name(name, meta): return meta.get('output-file') or Path(name).stem + '.html'


def processed(proc):
    "Notebooks in the folder of processed ones, by name."
    return {p.name: json.loads(p.read_text(encoding='utf-8')) for p in sorted(proc.glob('*.ipynb'))}


def prepare(proc, root=ROOT):
    "Add the links to every page of `proc`."
    about = settings(root)
    for name, nb in processed(proc).items():
        add_links(nb, name, about)
        (proc/name).write_text(json.dumps(nb, ensure_ascii=False, indent=1) + '\n', encoding='utf-8')


def finish(proc, site, root=ROOT):
    "Write llms.txt, the text copies and the notebooks into `site`."
    about, books = settings(root), processed(proc)
    pages = {n: front_matter(nb) for n, nb in books.items()}
    sidebar = yaml.safe_load((root/'nbs'/'sidebar.yml').read_text(encoding='utf-8'))
    (site/'llms.txt').write_text(llms_txt(pages, sidebar, about), encoding='utf-8')
    (site/'notebooks').mkdir(exist_ok=True)
    for name, nb in books.items():
        (site/(html_name(name, pages[name]) + '.md')).write_text(page_text(nb), encoding='utf-8')
        shutil.copy2(root/'nbs'/name, site/'notebooks'/name)


def main(argv=None):
    "Prepare or finish."
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('step', choices=['prepare', 'finish'])
    parser.add_argument('folders', nargs='+', type=Path)
    parser.add_argument('--root', type=Path, default=ROOT, help='project folder')
    args = parser.parse_args(argv)
    if len(args.folders) != (1 if args.step == 'prepare' else 2): parser.error(f'{args.step} takes {"PROC" if args.step == "prepare" else "PROC SITE"}')
    (prepare if args.step == 'prepare' else finish)(*args.folders, root=args.root)


if __name__ == '__main__': main()

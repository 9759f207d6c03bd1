"""What the pages of the site get besides nbdev's processing, for Quarto and for the test build alike.

usage: python scripts/site_files.py PROC     change every processed notebook in PROC, before it is rendered

A page gets links to Colab and to its notebook. A definition whose source is shown keeps its heading and its docstring, and loses
the signature that nbdev prints above the same lines of source. A docstring that cites an equation of its page links to it.
"""
import json
import re
import sys
from configparser import ConfigParser
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parent.parent
CITED = re.compile(r'\beqs?\. ([\w-]+(?:(?:, | and | to )(?:eq\. )?[\w-]+)*)')
SIGNATURE = re.compile(r'^```python\n.*?^```\n+', re.M | re.S)


def settings(root):
    "Addresses of the project from settings.ini: the site, the files of the repository, and the repository on Colab."
    ini = ConfigParser(delimiters=['='])
    ini.read(root/'settings.ini', encoding='utf-8')
    d = ini['DEFAULT']
    files = f'{d["git_url"]}/blob/{d["branch"]}/'
    colab = f'https://colab.research.google.com/github/{d["user"]}/{d["repo"]}/blob/{d["branch"]}/'
    return dict(site=d['doc_host'] + d['doc_baseurl'], files=files, colab=colab)


def source(cell): return ''.join(cell['source'])


def front_matter(nb):
    "YAML in the first cell of a processed notebook, as a dict."
    cells = nb['cells']
    if not cells or cells[0]['cell_type'] != 'raw': return {}
    return yaml.safe_load(source(cells[0]).strip().strip('-')) or {}


def html_name(name, nb): return front_matter(nb).get('output-file') or Path(name).stem + '.html'


def add_links(nb, name, about):
    "Links of a page that differ from page to page, in its front matter. A page that is generated has no notebook to open."
    if name == 'api.ipynb' or not front_matter(nb): return
    links = [dict(text='Open in Colab', icon='play-circle', href=f'{about["colab"]}nbs/{name}'),
             dict(text='The notebook', icon='journal-code', href=f'{about["files"]}nbs/{name}')]
    text = yaml.safe_dump({**front_matter(nb), 'other-links': links}, allow_unicode=True)
    nb['cells'][0]['source'] = f'---\n{text}---\n'


def drop_signatures(nb):
    "Take the signature from the entry of every definition whose source the page shows."
    code = [c for c in nb['cells'] if c['cell_type'] == 'code']
    shown = {n for c in code if '"Exported source"' in source(c) for n in re.findall(r'^(?:async )?(?:def|class) (\w+)', source(c), re.M)}
    for c in code:
        of = re.search(r'^show_doc\((?:\w+\.)*(\w+)\)', source(c), re.M)
        if not of or of[1] not in shown: continue
        for o in c['outputs']:
            text = ''.join(o.get('data', {}).get('text/markdown', ''))
            if text: o['data']['text/markdown'] = SIGNATURE.sub('', text, count=1)


def link_equations(nb):
    "Make cross-references of the equations of the page that docstrings cite, as in (eq. score)."
    known = {l for c in nb['cells'] if c['cell_type'] == 'markdown' for l in re.findall(r'\{#eq-([\w-]+)', source(c))}
    def reference(m):
        "The cited names as cross-references; as they stand if one is unknown."
        cited = [w for w in re.findall(r'[\w-]+', m[1].replace('eq. ', '')) if w not in ('and', 'to')]
        if not known.issuperset(cited): return m[0]
        return re.sub(r'[\w-]+', lambda w: f'@eq-{w[0]}' if w[0] in cited else w[0], m[1].replace('eq. ', ''))
    for c in nb['cells']:
        for o in c.get('outputs', []) if re.search(r'^show_doc\(', source(c), re.M) else []:
            text = ''.join(o.get('data', {}).get('text/markdown', ''))
            if text: o['data']['text/markdown'] = CITED.sub(reference, text)


def prepare(nb, name, about):
    "Change a processed notebook in place."
    add_links(nb, name, about)
    drop_signatures(nb)
    link_equations(nb)


def main():
    "Prepare every page of the folder named on the command line."
    for path in sorted(Path(sys.argv[1]).glob('*.ipynb')):
        nb = json.loads(path.read_text(encoding='utf-8'))
        prepare(nb, path.name, settings(ROOT))
        path.write_text(json.dumps(nb, ensure_ascii=False, indent=1) + '\n', encoding='utf-8')


if __name__ == '__main__': main()

"""A stranger copies every listing of home, the story and "Prune your own model", in order and with no other knowledge.

What a page hides is not copied. The cells run with the notebooks (`make test-notebooks`). Here it is tested that every name in a listing comes from
a listing before it; and the listings that are no cells are run, on a tiny model and a small text.
"""
import ast
import builtins
import importlib
import json
import re
import shlex
from pathlib import Path

import pytest
from helpers import tiny_model

from prunebook.cli import main

NBS = Path(__file__).resolve().parent.parent/'nbs'
PATH = 'index', 'start', 'howto_prune'
FENCE = re.compile(r'^```(python|sh)\n(.*?)^```$', re.M | re.S)
SMALL = [('meta-llama/Llama-2-7b-hf', 'dense'), ('smollm2-135m', 'dense'), ("'wikitext2'", "'passages'"), ('seqlen=2048', 'seqlen=64'), ('--seqlen 2048', '--seqlen 64 --text passages --eval-n 3'),
         ('n=128', 'n=3'), ('n=64', 'n=3'), ('--n 128', '--n 3')]


def listings(page):
    "What a reader sees and may copy: (language, text, whether it is a cell), in order."
    for c in json.loads((NBS/f'{page}.ipynb').read_text(encoding='utf-8'))['cells']:
        text = ''.join(c['source'])
        if c['cell_type'] == 'markdown': yield from ((language, code, False) for language, code in FENCE.findall(text))
        elif c['cell_type'] == 'code' and not re.search(r'^#\| *(hide$|echo: *false|default_exp)', text, re.M): yield 'python', text, True


def without_commands(text):
    "A cell without lines for the terminal."
    return re.sub(r'^!.*?(?<!\\)$', '', text, flags=re.M | re.S)


def names(text):
    "Names that a listing reads, and names that it makes."
    read, made = set(), set()
    for n in ast.walk(ast.parse(text)):
        if isinstance(n, ast.Name): (read if isinstance(n.ctx, ast.Load) else made).add(n.id)
        if isinstance(n, (ast.FunctionDef, ast.ClassDef)): made.add(n.name)
        if isinstance(n, ast.arg): made.add(n.arg)
        if isinstance(n, (ast.Import, ast.ImportFrom)):
            for a in n.names:
                if a.name == '*': made |= set(importlib.import_module(n.module).__all__)
                else: made.add(a.asname or a.name.partition('.')[0])
    return read, made


def unknown(texts):
    "Names that are read before they are made, listing after listing."
    known, found = set(dir(builtins)), []
    for text in texts:
        read, made = names(without_commands(text))
        known |= made
        found += sorted(read - known)
    return found


def test_unknown_names_are_found():
    assert unknown(['import os\nx = os.getcwd()', '!prunebook inspect x \\\n  --n y', 'f = lambda a: a + x\n[f(b) for b in z]']) == ['z']


@pytest.mark.parametrize('page', PATH)
def test_every_name_comes_from_a_listing(page):
    "A page is enough for itself: a stranger may begin with it."
    texts = [text for language, text, _ in listings(page) if language == 'python']
    assert texts and unknown(texts) == []


def smaller(text):
    for old, new in SMALL: text = text.replace(old, new)
    return text


@pytest.mark.usefixtures('one_thread', 'own_modules')
def test_listings_that_are_no_cells_run(tmp_path, tiny_tokenizer, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny_model('llama', max_position_embeddings=512).save_pretrained('dense')
    tiny_tokenizer.save_pretrained('dense')
    done, told = 0, {}
    for page in PATH:
        for language, text, cell in listings(page):
            if language == 'sh':
                for line in smaller(text).splitlines():
                    if not line.startswith('prunebook '): continue       # install and git, and llama.cpp: not ours to test
                    assert main(shlex.split(line)[1:]) == 0, line
                    done += 1
            elif not cell or 'save_pruned(' in text and page == 'index':  # the last saves what a listing after it loads
                exec(compile(smaller(text), page, 'exec'), told)
                done += 1
            elif re.match(r'(from|import) ', text) and page == 'index': exec(text, told)
    assert done >= 4 and Path('llama-7b-recipe-0.2').is_dir()
    assert told['small'].num_parameters() < tiny_model('llama').num_parameters()

"""Interactive figures: the JavaScript against its Python counterparts, the HTML, and the live form."""
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from importlib.resources import files

import pytest
import torch

from helpers import tiny_model
from prunebook.couplings import couplings
from prunebook.heads import removal_order
from prunebook.interactive import (Figure, _choice, _slider, coupling_figure, game_figure, heads_figure, measure_couplings, measure_game, measure_heads,
                                   measure_sparsities, sparsity_figure, threshold_figure)
from prunebook.text import random_tokens

pytestmark = pytest.mark.usefixtures('one_thread')
FOLDER = files('prunebook')/'figures'
CHROMIUM = shutil.which('chromium') or shutil.which('chromium-browser')
LEVELS = {'levels': {d: [dict(sparsity=.02*i, threshold=.001*i, gone=[g*i, 0, 0], uniform=.03*i) for i in range(5)] for d, g in (('0.1', .1), ('1', .05))}}
POINTS = {'ways': {w: [dict(sparsity=.1*i, perplexity=30 + k*i**2, stderr=1 + i, parameters=100 - i, text=f'text {i}') for i in range(4)] for w, k in (('restored', 1), ('cut only', 9))}}


def js(kind, expression, **values):
    "Value of a JavaScript expression, in which the functions of one figure and some values are known."
    if not shutil.which('node'): pytest.skip('Node.js is not installed; the JavaScript of the figures is not tested.')
    given = ''.join(f'const {k} = {json.dumps(v)};\n' for k, v in values.items())
    code = ''.join((FOLDER/f'{n}.js').read_text(encoding='utf-8') for n in ('base', kind)) + given + f'console.log(JSON.stringify({expression}))'
    res = subprocess.run(['node', '-'], input=code, capture_output=True, text=True, encoding='utf-8')
    assert res.returncode == 0, res.stderr
    return json.loads(res.stdout)


@pytest.fixture(scope='module')
def every():
    "One figure of each kind, on tiny models and made-up values."
    m = tiny_model('llama')
    w = random_tokens(m, n=2, seqlen=12)
    return dict(coupling=coupling_figure(measure_couplings(m, 0, w)), sparsity=sparsity_figure(POINTS), heads=heads_figure(measure_heads(m, w)),
                game=game_figure(measure_game(m, w, evaluations=6)), threshold=threshold_figure(LEVELS))


# ---- JavaScript -----------------------------------------------------------------------------------------------------

def test_small_functions():
    assert js('heads', '[runs([1, 2, 3, 7]), ranges([1, 2, 3, 7]), ranges([4]), ranges([]), ranges([4, 5]), list(["a", "b", "c"])]') == \
        [[[1, 3], [7, 7]], '1 to 3 and 7', '4', '', '4, 5', 'a, b and c']
    assert js('heads', '[ticks(0, .4, 6), ticks(-1, 3, 4), plain(1234.56, 1), scale(0, 10, 100, 200)(5)]') == [[0, .1, .2, .3, .4], [-1, 0, 1, 2, 3], '1,234.6', 150]
    assert js('sparsity', 'decades(31, 480)') == [20, 50, 100, 200, 500]


@pytest.mark.parametrize('groups', [1, 2, 3])
def test_removal_order_is_that_of_depth2(groups):
    cases = []
    for seed in range(20):
        D = torch.rand(6, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).mul(20).round().div(20)      # with ties
        cases.append((D + D.T).fill_diagonal_(0).tolist())
    expected = [[list(p) for p in removal_order(torch.tensor(D, dtype=torch.float64), groups)] for D in cases]
    assert js('heads', f'cases.map(D => removalOrder(D, {groups}))', cases=cases) == expected


def test_heads_measured_and_read_back():
    m = tiny_model('llama')
    data = measure_heads(m, random_tokens(m, n=2, seqlen=12))
    D = js('heads', 'matrix(data.blocks[1], data.heads)', data=data)
    order = removal_order(torch.tensor(D, dtype=torch.float64), data['groups'])
    tau = order[1][1] + 1e-9
    assert js('heads', f'leaving(matrix(data.blocks[1], data.heads), data.groups, {tau})', data=data) == sorted(h for h, d in order if d < tau)
    near = js('heads', 'twins([[0, 1, 2], [1, 0, 3], [2, 3, 0]], [0])')
    assert near == [1]
    assert 'loses no head. In the whole model 0 of' in js('heads', 'headWords(data, 1, 0)', data=data)


@pytest.mark.parametrize('family', ['llama', 'gpt2', 'phi', 'opt'])
def test_units_are_those_of_the_couplings(family):
    m = tiny_model(family)
    data = measure_couplings(m, 1)
    for kind, k in data['kinds'].items():
        c = next(c for c in couplings(m, kind) if c.layer == 1)
        found = js('coupling', f'Array.from({{length: {c.n_units}}}, (_, u) => fallen(data, "{kind}", u))', data=data)
        for u, f in enumerate(found):
            rows = {}
            for n, t in c.firsts: rows.setdefault(n.split('.')[-1], []).extend(t[u].tolist())
            assert {n: x['rows'] for n, x in f.items() if x['rows']} == rows
            assert {n: x['columns'] for n, x in f.items() if x['columns']} == {c.second[0].split('.')[-1]: c.second[1][u].tolist()}
        name, column = c.second[0].split('.')[-1], c.second[1][-1, -1].item()
        assert js('coupling', f'unitAt(data, "{kind}", "{name}", -1, {column})', data=data) == c.n_units - 1
        assert k['cost'] == c.cost


def test_regression_of_the_game():
    g = torch.Generator().manual_seed(0)
    X, y = (torch.rand(20, 6, generator=g) < .5).double(), torch.rand(20, generator=g, dtype=torch.float64)
    expected = torch.linalg.solve(X.T @ X + .5*torch.eye(6, dtype=torch.float64), X.T @ y)
    found = js('game', 'ridge(X, y, .5)', X=X.tolist(), y=y.tolist())
    assert torch.allclose(torch.tensor(found, dtype=torch.float64), expected, atol=1e-9)
    assert js('game', '[top3([3, 1, 4, 1, 5]), hits([0, 2], [2, 4])]') == [[0, 2, 4], 1]


def test_words():
    words = js('sparsity', '[sparsityWords(data, "cut only", 0), sparsityWords(data, "cut only", 3)]', data=POINTS)
    assert words[0].startswith('The dense model: perplexity 30.0 ± 1.0') and '30.0 % of the decoder removed: perplexity 111.0 ± 4.0, 3.70 times' in words[1]
    words = js('threshold', '[0, 4].map(i => thresholdWords(data, "0.1", i))', data=LEVELS)
    assert 'nothing falls' in words[0] and 'Block 0 gives most, 40 % of its channels; blocks 1, 2 stay whole' in words[1]
    data = dict(names=['a', 'b', 'c', 'd'], masks=[[1, 0, 1, 0], [0, 1, 0, 1]], rises=[1, 2], truth=[0, 4, 3, 2], ratio=.5)
    assert 'so far a and b' in js('game', 'gameWords(data, [0, 1], 0, false)', data=data)
    assert 'without b and d: the loss rises by 2.00' in js('game', 'gameWords(data, [], 2, false)', data=data)
    assert 'Your guess has 2 of them. The regression has' in js('game', 'gameWords(data, [0, 1, 2], 2, true)', data=data)


# ---- HTML -----------------------------------------------------------------------------------------------------------

class Elements(HTMLParser):
    "Every element with its attributes and the labels it stands in, and the text of each."
    VOID = {'input', 'br'}

    def __init__(self, page):
        super().__init__()
        self.found, self.open = [], []
        self.feed(page)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        e = dict(tag=tag, text='', inside=[o['tag'] for o in self.open], **{'attributes': dict(attributes)})
        self.found.append(e)
        if tag not in self.VOID: self.open.append(e)

    def handle_endtag(self, tag): assert self.open.pop()['tag'] == tag

    def handle_data(self, text):
        for e in self.open: e['text'] += text

    def all(self, *tags): return [e for e in self.found if e['tag'] in tags]


def test_html(every):
    for name, figure in every.items():
        page = Elements(figure.html)
        root = page.found[0]
        assert root['tag'] == 'figure' and root['attributes']['class'] == 'pb-fig' and root['attributes']['role'] == 'group' and root['attributes']['aria-label']
        controls = page.all('input', 'select', 'button')
        assert controls and all('label' in c['inside'] for c in controls if c['tag'] != 'button') and all(c['text'].strip() for c in page.all('button'))
        assert all(label['text'].strip() for label in page.all('label')) and page.all('output')[0]['attributes']['aria-live'] == 'polite'
        assert len(figure.html.encode()) < 60_000, name
        assert not re.findall(r'(?:src|href)=|https?://(?!www\.w3\.org/2000/svg)|\bimport\b|url\(', figure.html)
        assert '\n\n' not in figure.html and '`' not in figure.html      # nothing that ends a raw block of markdown


def test_ids_differ_and_text_is_escaped():
    data = {'ways': {'restored': [dict(sparsity=0, perplexity=1, stderr=0, parameters=1, text='</script><b>&')]*2}}
    a, b = sparsity_figure(data), sparsity_figure({**data, 'about': 'secret'})
    ids = [e['attributes']['id'] for f in (a, b) for e in Elements(f.html).found if 'id' in e['attributes']]
    assert len(ids) == len(set(ids)) == 2
    assert a.html.count('</script>') == 1 and 'secret' not in b.html
    assert '&lt;i&gt;' in Figure('heads', '<i>', _slider('tau', '<i>', 0, 1, 0) + _choice('x', '<i>', {1: '<i>'}), {}, '<i>').html
    assert repr(a).startswith('Interactive figure: Perplexity')


def test_sparsities_are_measured(tiny_tokenizer):
    m = tiny_model('llama')
    w = random_tokens(m, n=4, seqlen=16)
    found = measure_sparsities(m, tiny_tokenizer, w, w, (.1, .2), new=3)['ways']
    for points in found.values():
        assert [round(p['sparsity'], 1) for p in points] == [0, .1, .2] and points[0] == found['restored'][0]
        assert points[2]['parameters'] < points[1]['parameters'] < points[0]['parameters']
    assert found['restored'][2]['perplexity'] != found['cut only'][2]['perplexity']


# ---- moved ----------------------------------------------------------------------------------------------------------

def test_live_in_a_kernel():
    import nbformat
    from nbclient import NotebookClient
    cells = ['''from prunebook.interactive import heads_figure
from prunebook.models import tiny_model
from prunebook.text import random_tokens
m = tiny_model('llama')
live = heads_figure(live=True, model=m, windows=random_tokens(m, n=3, seqlen=12))
control, area = live.children''', 'live', '''import re
shown = lambda: re.sub('pb-heads-[0-9]+', '', area.outputs[0]['data']['text/html'])
before = shown()
control.value = 3
print(control.description, before != shown(), shown().startswith('<figure'))''']
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in cells], metadata=dict(kernelspec=dict(name='python3', display_name='python3', language='python')))
    NotebookClient(nb, timeout=120).execute()
    assert 'application/vnd.jupyter.widget-view+json' in nb.cells[1].outputs[0]['data']
    assert ''.join(o['text'] for o in nb.cells[2].outputs if o.get('name') == 'stdout').strip() == 'Windows read True True'


@pytest.mark.parametrize('build', [lambda m, w, **k: coupling_figure(live=True, model=m, windows=w), lambda m, w, **k: game_figure(live=True, model=m, windows=w, evaluations=4),
                                   lambda m, w, **k: threshold_figure(live=True, model=m, windows=w, steps=4),
                                   lambda m, w, tokenizer: sparsity_figure(live=True, model=m, tokenizer=tokenizer, windows=w, test=w, new=2)], ids=['coupling', 'game', 'threshold', 'sparsity'])
def test_live_measures_again(build, tiny_tokenizer):
    m = tiny_model('llama')
    control, area = build(m, random_tokens(m, n=3, seqlen=12), tokenizer=tiny_tokenizer).children
    data = lambda: re.sub(r'pb-\w+-\d+', '', area.outputs[0]['data']['text/html'])
    before = data()
    control.value = control.value + control.step if control.step >= 1 else control.value*2
    assert data() != before


@pytest.mark.skipif(not CHROMIUM, reason='Chromium is not installed; the figures are not moved in a browser.')
def test_moved_in_a_browser(every, tmp_path):
    "Each figure, twice on one page: every control of the first changes its words, and nothing in the second."
    move = '''
const found = {errors: []};
window.addEventListener('error', e => found.errors.push(e.message));
window.addEventListener('load', () => {
  const figures = [...document.querySelectorAll('.pb-fig')], words = f => f.querySelector('output').textContent;
  const start = figures.map(words);
  for (const f of figures.slice(0, figures.length/2)) {
    const k = f.id.split('-')[1], said = found[k] = [words(f)];
    for (const c of f.querySelectorAll('input, select, button')) {
      if (c.tagName === 'BUTTON') { if (!c.disabled) c.click(); }
      else { if (c.tagName === 'SELECT') c.selectedIndex = 1; else c.value = c.value === c.max ? c.min : c.max; c.dispatchEvent(new Event('input', {bubbles: true})); }
      said.push(words(f));
    }
    found[k + ' drawn'] = f.querySelectorAll('svg *').length;
  }
  found.others = figures.slice(figures.length/2).every((f, i) => words(f) === start[i + figures.length/2]);
  document.getElementById('found').textContent = JSON.stringify(found);
});'''
    twice = [*every.values(), *(Figure(f.kind, f.label, re.search(r'<div class="pb-controls">(.*)</div>', f.html)[1], f.data, f.caption,
                                       '<p class="pb-text"></p><p class="pb-text"></p>') for f in every.values())]
    page = tmp_path/'page.html'
    page.write_text(f'<!doctype html><meta charset="utf-8"><script>{move}</script>{"".join(f.html for f in twice)}<pre id="found"></pre>', encoding='utf-8')
    res = subprocess.run([CHROMIUM, '--headless', '--no-sandbox', '--disable-gpu', f'--user-data-dir={tmp_path}/profile', '--virtual-time-budget=5000', '--dump-dom', page.as_uri()],
                         capture_output=True, text=True, encoding='utf-8', timeout=120)
    import html
    found = json.loads(html.unescape(re.search(r'<pre id="found">(.*?)</pre>', res.stdout, re.S)[1]))
    assert found['errors'] == [] and found['others']
    for kind in ('coupling', 'sparsity', 'heads', 'threshold'): assert all(a != b for a, b in zip(found[kind], found[kind][1:])), found[kind]
    assert 'Then run sub-models' in found['game'][0] and any('Sub-model 6 of 6' in w for w in found['game']) and found['game'][-1] == found['game'][0]
    assert all(found[k + ' drawn'] > 10 for k in every)

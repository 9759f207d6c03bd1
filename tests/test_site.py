"""The site in a browser: every page opens without errors, in both themes and at the width of a phone; figures answer the keyboard.

The site is built without Quarto (scripts/smoke_site.py), or is the one that SITE names, and served on this machine; requests to
anywhere else are blocked, and their failure is no error. Needs smalldocs, playwright and Chromium (`apt-get install chromium`, or CHROMIUM=path); axe-core and MathJax come from npm (`make site-tools`).
Screenshots of a few pages are left in _smoke/.screenshots, to be looked at.
"""
import functools
import http.server
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from filelock import FileLock

ROOT = Path(__file__).resolve().parent.parent
TOOLS = ROOT/'.site-tools'/'node_modules'
GIVEN = os.environ.get('SITE')                             # a site that is there already, for instance Quarto's
SITE = Path(GIVEN).resolve() if GIVEN else ROOT/'_smoke'
PHONE, DESK = dict(width=375, height=800), dict(width=1280, height=900)
NAMES = sorted(p.stem for p in (ROOT/'nbs').glob('*.ipynb'))
SCREENSHOTS = 'index', 'fasp', 'howto_prune', 'notation', 'reading', 'api'
sys.path.insert(0, str(ROOT/'scripts'))


def html_name(stem): return re.sub(r'^\d+[a-zA-Z0-9]*_', '', stem.lower())


PAGES = [html_name(n) for n in NAMES]


# ---- the site, a server and a browser -------------------------------------------------------------------------------

def chromium():
    "Path of Chromium, or None."
    return os.environ.get('CHROMIUM') or next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None)


@pytest.fixture(scope='session')
def built(tmp_path_factory, testrun_uid):
    "Folder of the site: the one named in SITE, or built here, once for all processes of a run (`-n`)."
    pytest.importorskip('smalldocs', reason='smalldocs is not installed (it needs Python 3.11 or later)')
    if GIVEN: return SITE
    done = tmp_path_factory.getbasetemp().parent/f'site-{testrun_uid}'
    with FileLock(f'{done}.lock'):
        if done.exists(): return SITE
        res = subprocess.run([sys.executable, str(ROOT/'scripts'/'smoke_site.py'), str(SITE)], capture_output=True, text=True)
        assert res.returncode == 0, res.stdout[-2000:] + res.stderr[-2000:]
        done.touch()
    return SITE


class Handler(http.server.SimpleHTTPRequestHandler):
    "Files of the site, and the tools from npm below /.site-tools."
    def translate_path(self, path):
        if path.startswith('/.site-tools/'): return str(TOOLS/path.split('?')[0].removeprefix('/.site-tools/'))
        return super().translate_path(path)

    def log_message(self, *args): pass


@pytest.fixture(scope='session')
def address(built):
    "Where the site is served."
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), functools.partial(Handler, directory=str(built)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f'http://127.0.0.1:{server.server_port}'
    server.shutdown()


@pytest.fixture(scope='session')
def browser():
    "A headless Chromium."
    playwright = pytest.importorskip('playwright.sync_api', reason='playwright is not installed')
    if not chromium(): pytest.skip('no Chromium: apt-get install chromium, or name one in CHROMIUM')
    with playwright.sync_playwright() as p:
        found = p.chromium.launch(executable_path=chromium(), args=['--no-sandbox', '--disable-dev-shm-usage'])
        yield found
        found.close()


class Tab:
    "A page of the browser that notes errors and blocks the network."
    def __init__(self, browser, address, theme, size):
        tools = f'{address}/.site-tools/'                  # formulas are set in the light only: setting them is most of the work
        served = lambda url: url.startswith((address, 'data:', 'blob:')) and not (theme == 'dark' and url.startswith(tools))
        self.context = browser.new_context(viewport=size, color_scheme=theme, reduced_motion='reduce')
        self.context.route(re.compile('.*'), lambda route: route.continue_() if served(route.request.url) else self.block(route))
        self.page, self.address, self.errors, self.blocked = self.context.new_page(), address, [], set()
        self.page.on('console', lambda m: self.errors.append(m.text) if m.type == 'error' and not self.outside(m) else None)
        self.page.on('pageerror', lambda e: self.errors.append(str(e)))
        self.page.on('response', lambda r: self.errors.append(f'{r.status} {r.url}') if r.status >= 400 else None)

    def block(self, route):
        self.blocked.add(route.request.url)
        route.abort()

    def outside(self, message): return message.location.get('url', '') in self.blocked

    def open(self, name):
        "Open a page of the site, and wait for its formulas."
        self.errors.clear()
        self.page.goto(f'{self.address}/{name}.html', wait_until='load')
        self.page.evaluate('() => window.MathJax && MathJax.startup && MathJax.startup.promise ? MathJax.startup.promise.then(() => true) : true')
        return self.page


@pytest.fixture(scope='session')
def light(browser, address):
    tab = Tab(browser, address, 'light', DESK)
    yield tab
    tab.context.close()


@pytest.fixture(scope='session')
def dark(browser, address):
    tab = Tab(browser, address, 'dark', DESK)
    yield tab
    tab.context.close()


def axe_source():
    path = TOOLS/'axe-core'/'axe.min.js'
    if not path.exists(): pytest.skip('axe-core is not installed: make site-tools')
    return path.read_text(encoding='utf-8')


# ---- every page -----------------------------------------------------------------------------------------------------

RULES = ['color-contrast', 'heading-order', 'empty-heading', 'image-alt', 'input-image-alt', 'svg-img-alt', 'label', 'button-name', 'link-name', 'link-in-text-block',
         'duplicate-id-aria', 'aria-allowed-attr', 'aria-required-attr', 'aria-valid-attr', 'aria-valid-attr-value', 'aria-roles', 'document-title', 'html-has-lang', 'list', 'listitem',
         'page-has-heading-one', 'td-headers-attr', 'th-has-data-cells', 'empty-table-header', 'select-name', 'meta-viewport', 'nested-interactive', 'tabindex']
IS_DARK = '() => document.body.classList.contains("quarto-dark") || document.documentElement.classList.contains("quarto-dark")'
TOO_WIDE = '''() => {
  const w = document.documentElement.clientWidth, scrolls = "pre, table, .cell-output-display, mjx-container, .math.display", out = [];
  if (document.documentElement.scrollWidth <= w + 1) return out;
  for (const e of document.querySelectorAll("main *")) {
    const r = e.getBoundingClientRect();
    if (r.right > w + 1 && r.width > 0 && !e.closest(scrolls)) out.push(`${e.tagName}.${e.className} ends at ${Math.round(r.right)}: ${e.textContent.slice(0, 60)}`);
  }
  return out.length ? out.slice(0, 5) : [`the page is ${document.documentElement.scrollWidth} wide`];
}'''

SHRUNK = '''() => {
  const out = [];
  for (const e of document.querySelectorAll("main .cell-output-display img")) {
    const full = +e.getAttribute("width") || e.naturalWidth, style = getComputedStyle(e);
    const width = e.clientWidth - parseFloat(style.paddingLeft) - parseFloat(style.paddingRight);
    if (width < .95*full) out.push(`a figure of ${full} pixels is shown at ${Math.round(width)}: ${e.alt.slice(0, 60)}`);
  }
  for (const e of document.querySelectorAll("main .pb-fig svg text")) {
    const size = parseFloat(getComputedStyle(e).fontSize)*e.getScreenCTM().a;
    if (size < 10) { out.push(`text of ${size.toFixed(1)} pixels in a figure: ${e.textContent.slice(0, 60)}`); break; }
  }
  return out;
}'''


def axe(page, rules):
    "What axe-core finds in the main part of the page; menus are the renderer's, and Quarto's are others."
    page.evaluate(axe_source())
    found = page.evaluate('rules => axe.run({include: [["main"]]}, {runOnly: {type: "rule", values: rules}, resultTypes: ["violations"]})', rules)
    skip = lambda v, n: v['id'] == 'aria-allowed-attr' and 'callout-header' in n['html'] or v['id'] == 'empty-table-header' and n['html'] == '<th>'      # a formula, too long to be quoted
    return [f'{v["id"]}: {n["target"]} {n["failureSummary"][:160]} {n["html"][:120]}' for v in found['violations'] for n in v['nodes'] if not skip(v, n)][:8]


def screenshot(page, name, **kw):
    "Leave a picture to look at."
    if name not in SCREENSHOTS: return
    (SITE/'.screenshots').mkdir(exist_ok=True)
    page.screenshot(path=SITE/'.screenshots'/f'{name}-{"-".join(kw.pop("of"))}.png', **kw)


@pytest.mark.parametrize('name', PAGES)
def test_page(light, name):
    """It opens without errors, its formulas are set, axe-core finds nothing, and at the width of a phone only tables, code, formulas and figures scroll.
    Figures keep their size there, and so does their text."""
    page = light.open(name)
    assert not page.evaluate(IS_DARK) and page.title() and page.locator('main h1').count() == 1
    assert not light.errors
    screenshot(page, name, of=['light'])
    if page.evaluate('() => !!(window.MathJax && MathJax.startup)'):
        assert page.locator('mjx-container').count() >= page.locator('span.math').count()
        assert page.locator('mjx-merror, [data-mjx-error]').all_text_contents() == []
    problems = axe(page, RULES)
    page.set_viewport_size(PHONE)
    problems += page.evaluate(TOO_WIDE) + page.evaluate(SHRUNK)
    screenshot(page, name, of=['phone'])
    page.set_viewport_size(DESK)
    assert not problems, '\n'.join(problems)


@pytest.mark.parametrize('name', PAGES)
def test_dark(dark, name):
    "The same page in the dark: it is dark, opens without errors, and can be read."
    page = dark.open(name)
    assert page.evaluate(IS_DARK)
    screenshot(page, name, of=['dark'])
    assert not dark.errors
    problems = axe(page, ['color-contrast', 'link-in-text-block'])
    assert not problems, '\n'.join(problems)


def test_tools_are_there():
    "Formulas and accessibility are only tested with MathJax and axe-core."
    missing = [n for n in ('mathjax', 'axe-core') if not (TOOLS/n).exists()]
    if missing: pytest.skip(f'{", ".join(missing)} not installed: make site-tools')


# ---- interactive figures --------------------------------------------------------------------------------------------

def pages_with_figures(built): return sorted(p.stem for p in built.glob('*.html') if 'pb-fig' in p.read_text(encoding='utf-8'))


READ = 'f => [...f.querySelectorAll("output, [data-pb-value]")].map(o => [o.textContent, o.getAttribute("data-pb-value")].join(" ")).join(" | ")'


KEYS = dict(range=['ArrowRight', 'ArrowRight', 'ArrowLeft', 'Home', 'End'], radio=['ArrowDown'], checkbox=['Space'], number=['ArrowUp'], select=['ArrowDown'], button=['Enter', 'Space'])


def silent(page, figure):
    "What is wrong with a figure when its first control is focused and moved by keyboard alone, or None."
    control = figure.locator('button:visible, input:visible, select:visible').first
    if control.count() == 0: return 'has no control'
    figure.scroll_into_view_if_needed()
    control.focus()
    if not page.evaluate('() => !!document.activeElement.closest(".pb-fig")'): return 'its first control does not take the focus'
    kind = control.evaluate('e => e.tagName === "INPUT" ? e.type : e.tagName.toLowerCase()')
    before = figure.evaluate(READ)
    for key in KEYS.get(kind, ['Enter']):
        page.keyboard.press(key)
        page.wait_for_timeout(60)
        if figure.evaluate(READ) != before: return None
    return f'its first control ({kind}) changes nothing of {before!r}'


@pytest.mark.parametrize('theme', ['light', 'dark'])
def test_figures_answer_the_keyboard(request, built, theme):
    tab, names, wrong = request.getfixturevalue(theme), pages_with_figures(built), []
    (SITE/'.screenshots').mkdir(exist_ok=True)
    for name in names:
        page = tab.open(name)
        for i in range(page.locator('.pb-fig').count()):
            figure = page.locator('.pb-fig').nth(i)
            wrong += [f'{name}, figure {i + 1}: {said}' for said in (silent(page, figure), *tab.errors) if said]
            figure.screenshot(path=SITE/'.screenshots'/f'figure-{name}-{i + 1}-{theme}.png')
    if not names: pytest.skip('no interactive figures on the site')
    assert not wrong, '\n'.join(wrong)


# ---- do these tests find anything? ----------------------------------------------------------------------------------

BAD = """<!DOCTYPE html><html lang="en"><head><title>Bad</title>MATHJAX</head><body><main><h1>Bad</h1><h3>Too deep</h3>
<p style="color: #ccc; background: #fff">pale</p><img src="/index.html.png"><p style="width: 900px">wide</p><span class="math inline">\\(\\frac{1}\\) \\(\\nothing\\)</span>
<div class="cell-output-display"><img alt="wide" width="900" src="/favicon.svg" style="display: block; max-width: 100%; height: 9px"></div>
<div class="pb-fig"><button>dead</button><output>1</output></div><div class="pb-fig"><svg viewBox="0 0 4000 9" width="300"><text y="9">tiny</text></svg><output>1</output></div>
<div class="pb-fig"><button onclick="this.nextSibling.textContent++">alive</button><output>1</output></div><script>missing()</script></main></body></html>"""


def test_faults_are_found(light, built):
    smoke_site = pytest.importorskip('smoke_site')
    (built/'.bad').mkdir(exist_ok=True)
    (built/'.bad'/'page.html').write_text(BAD.replace('MATHJAX', smoke_site.MATHJAX))
    page = light.open('.bad/page')
    figure = page.locator('.pb-fig')
    assert [silent(page, figure.nth(i)) for i in range(3)] == ["its first control (button) changes nothing of '1 '", 'has no control', None]
    assert any('missing is not defined' in e for e in light.errors) and any(e.startswith('404') for e in light.errors)
    if (TOOLS/'mathjax').exists(): assert page.locator('mjx-merror, [data-mjx-error]').count() >= 2
    page.set_viewport_size(PHONE)
    wide, shrunk = page.evaluate(TOO_WIDE), page.evaluate(SHRUNK)
    page.set_viewport_size(DESK)
    assert any(w.startswith('P. ends at') for w in wide) and len(shrunk) == 2
    assert 'of 900 pixels' in shrunk[0] and shrunk[1].endswith('pixels in a figure: tiny')
    found = {p.split(':')[0] for p in axe(page, RULES)}
    assert {'color-contrast', 'image-alt', 'heading-order'} <= found


# ---- files ----------------------------------------------------------------------------------------------------------

def test_llms_txt(built):
    "It lists every page, and each has its copy as markdown."
    linked = re.findall(r'^- \[[^\]]+\]\(https://[^)]*/([\w.-]+)\.llms\.md\)', (built/'llms.txt').read_text(encoding='utf-8'), re.M)
    assert sorted(linked) == sorted(PAGES)
    for name in linked:
        copy = (built/f'{name}.llms.md').read_text(encoding='utf-8')
        assert re.search('^# ', copy, re.M) and '#| hide' not in copy and 'base64' not in copy


def test_a_page_leads_to_its_notebook(built):
    html = (built/'fasp.html').read_text(encoding='utf-8')
    assert 'https://colab.research.google.com/github/prunebook/prunebook/blob/main/nbs/20_fasp.ipynb' in html
    assert 'https://github.com/prunebook/prunebook/blob/main/nbs/20_fasp.ipynb' in html


def test_results_are_sorted_by_their_headings(light):
    page, errors = light.open('results'), light.errors
    values = lambda: page.eval_on_selector_all('#pb-cells tbody tr', 'rows => rows.map(r => +r.children[4].dataset.v)')
    heading = page.locator('#pb-cells th').nth(4)
    for direction, reverse in (('ascending', False), ('descending', True)):
        heading.locator('button').focus()
        page.keyboard.press('Enter')
        assert heading.get_attribute('aria-sort') == direction
        assert len(values()) > 5 and values() == sorted(values(), reverse=reverse)
    assert not errors


def test_search_finds_the_way_in(built):
    "What a reader types on the first day leads to the page that answers it; every term is found there word for word."
    found = json.loads((built/'search.json').read_text(encoding='utf-8'))
    pages = lambda words: {e['href'].partition('#')[0] for e in found if words in f'{e["title"]} {e["section"]} {e["text"]}'.lower()}
    assert {'index.html', 'start.html'} <= pages('install')
    assert 'howto_prune.html' in pages('how to prune my model') and 'howto_prune.html' in pages('prune your own model')


def test_there_is_a_page_for_what_is_not_there(built): assert 'howto_prune.html' in (built/'404.html').read_text(encoding='utf-8')

"""A letter means one thing in the whole book, or the table of exceptions on the page of notation says what it means on a page."""
import json
import re
from pathlib import Path

import pytest

NBS = Path(__file__).resolve().parent.parent/'nbs'
LETTERS = [r'\\alpha', r'\\beta', r'\\gamma', r'\\rho', r'\\tau', r'\\lambda', r'\\mu', r'\\theta', r'\\ell', 'D', 'E', 'J', 'P', 'Q', 'Z']
OWN = 'notation', 'glossary', 'solutions'
CODE = re.compile(r'^ *```.*?^ *```|`[^`]*`', re.M | re.S)
MATH = re.compile(r'\$\$(.+?)\$\$|\$([^$\n]+?)\$', re.S)
WORDS = re.compile(r'\\(?:text|operatorname|mathrm|mathcal|mathbb)(?:\{[^}]*\}| \w)|W_\{?\w')    # letters in them are parts of other symbols


def prose(path):
    "The text of the markdown cells of a page."
    cells = json.loads(path.read_text(encoding='utf-8'))['cells']
    return '\n'.join(''.join(c['source']) for c in cells if c['cell_type'] == 'markdown')


def symbols(text):
    "All formulas of a text, as one."
    return ' '.join(WORDS.sub(' ', a or b) for a, b in MATH.findall(CODE.sub('', text)))


def has(letter, formulas):
    "Whether a letter stands in a formula, and not within the name of a command."
    return re.search(rf'{letter}(?![A-Za-z])' if letter.startswith('\\') else rf'(?<![A-Za-z\\]){letter}(?![A-Za-z])', formulas)


NOTATION, _, LAST = prose(NBS/'notation.ipynb').partition('## Letters with a meaning of their own')


def exceptions():
    "Formulas of the last table, by page."
    found = {}
    for row in re.findall(r'^\| (\[.*) \|$', LAST, re.M):
        pages, *cells = row.split(' | ')
        for page in re.findall(r'\((\w+)\.ipynb', pages): found[page] = found.get(page, '') + symbols(' '.join(cells))
    return found


def test_letters_are_looked_for():
    text = symbols(r'$\tfrac12 \lambda\,P_{jj}$ and $W_Q$, `$D$`, $\mathbb E$ $\mathbb{E}x$ $$\theta\ell_i Q$$')
    assert [x for x in LETTERS if has(x, text)] == [r'\\lambda', r'\\theta', r'\\ell', 'P', 'Q']


@pytest.mark.parametrize('letter', LETTERS)
def test_a_letter_without_one_meaning_is_explained(letter):
    assert not has(letter, symbols(NOTATION)), 'the tables for all pages define it: take it out of LETTERS'
    known = exceptions()
    used = [p.stem for p in sorted(NBS.glob('*.ipynb')) if p.stem not in OWN and has(letter, symbols(prose(p)))]
    assert [page for page in used if not has(letter, known.get(page, ''))] == []

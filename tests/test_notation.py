"""A letter means one thing in the whole book, or the table of exceptions on the page of notation says what it means on a page."""
import json
import re
from pathlib import Path

import pytest

NBS = Path(__file__).resolve().parent.parent/'nbs'
LETTERS = [r'\\alpha', r'\\beta', r'\\gamma', r'\\rho', r'\\tau', r'\\lambda', r'\\mu', r'\\theta', r'\\ell', 'B', 'D', 'E', 'J', 'P', 'Q', 'S', 'Z']
FORMS = dict(                                              # how a letter of the tables is written; alone it may always stand
    C=r'C\s*(?:=|\\leftarrow)\s*(?:\\hat )?(?:X|\\sum)|C_|C \+ \\delta|diag\}? ?C|diag \(C\)',
    L='(?!)',
    R=r'_\{?[^{}\s]*R[^{}\s]*\}?|\|R\||\\in R|R\s*\\leftarrow',
    T=r'\\frac1T|\{T\}|/T|T-1|T(?: \+ T)?_0|, T[,)]|T\\le m|pqT',
    V='2V')
OWN = 'notation', 'glossary', 'solutions'
CODE = re.compile(r'^ *```.*?^ *```|`[^`]*`', re.M | re.S)
MATH = re.compile(r'\$\$(.+?)\$\$|\$([^$\n]+?)\$', re.S)
WORDS = re.compile(r'\\(?:text|operatorname|mathrm|mathsf|mathcal|mathbb)(?:\{[^}]*\}| \w)|W_\{?\w')    # letters in them are parts of other symbols


def prose(path):
    "The text of the markdown cells of a page."
    cells = json.loads(path.read_text(encoding='utf-8'))['cells']
    return '\n'.join(''.join(c['source']) for c in cells if c['cell_type'] == 'markdown')


def formulas(text):
    "All formulas of a text."
    return [WORDS.sub(' ', a or b).strip() for a, b in MATH.findall(CODE.sub('', text))]


def symbols(text):
    "All formulas of a text, as one."
    return ' '.join(formulas(text))


def has(letter, text):
    "Whether a letter stands in a formula, and not within the name of a command."
    return re.search(rf'{letter}(?![A-Za-z])' if letter.startswith('\\') else rf'(?<![A-Za-z\\]){letter}(?![A-Za-z])', text)


def otherwise(letter, text):
    "Formulas in which a letter of the tables stands in another form than its own."
    return [f for f in formulas(text) if f != letter and has(letter, re.sub(FORMS[letter], ' ', f))]


NOTATION, _, LAST = prose(NBS/'notation.ipynb').partition('## Letters with a meaning of their own')


def exceptions():
    "Formulas of the last table, by page."
    found = {}
    for row in re.findall(r'^\| (\[.*) \|$', LAST, re.M):
        pages, *cells = row.split(' | ')
        for page in re.findall(r'\((\w+)\.ipynb', pages): found[page] = f"{found.get(page, '')} {symbols(' '.join(cells))}"
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


def test_other_forms_are_found():
    found = lambda letter, text: len(otherwise(letter, text))
    assert [found(x, f'${x}$') for x in FORMS] == [0]*len(FORMS)
    assert found('L', r'$\Delta L$ $\mathcal L(\theta)$ $-2\log L$') == 2
    assert found('T', r'$\frac1T\sum_t x_t$ $\lambda T$ $\Delta T$ $(n, T)$') == 2
    assert found('R', r'$W_{:,R}C_{RM}$ $R^{-1}$ $|R|$ $R\,v$') == 2
    assert found('C', r'$C = X^\top X$ $C_{MM}$ $W C^{1/2}$') == 1
    assert found('V', r'$V_c$ $\tfrac1{2V}$') == 1


@pytest.mark.parametrize('letter', FORMS)
def test_a_letter_of_the_tables_keeps_its_meaning(letter):
    assert has(letter, symbols(NOTATION)), 'no table for all pages defines it'
    known = exceptions()
    used = {p.stem: otherwise(letter, prose(p)) for p in sorted(NBS.glob('*.ipynb')) if p.stem not in OWN}
    assert {page: f for page, f in used.items() if f and not has(letter, known.get(page, ''))} == {}

"""The exercises of the pages: right answers pass, mistakes get their hint, and what is not answered says so."""
import ast
import re
from pathlib import Path

import nbformat
import pytest
import torch

from prunebook import exercises
from prunebook.exercises import DRAWS, EXERCISES, check, exercise, given

NBS = Path(__file__).resolve().parent.parent/'nbs'
SOLVED = ('solutions', 'lab_instructor')
OWN = ('66_exercises', *SOLVED)   # not pages with exercises to solve


def code_of(path):
    "Sources and outputs of the code cells of a notebook."
    return [(c.source, c.outputs) for c in nbformat.read(path, as_version=4).cells if c.cell_type == 'code']


def checked(source):
    "Calls of `check` with a name, in a cell: (name, number of answers)."
    if 'check(' not in source or source.lstrip().startswith('%'): return []
    calls = [n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Call)]
    named = [c for c in calls if isinstance(c.func, ast.Name) and c.func.id == 'check' and c.args]
    return [(c.args[0].value, len(c.args) - 1) for c in named
            if isinstance(c.args[0], ast.Constant) and isinstance(c.args[0].value, str)]


def on_pages():
    "Cells with an exercise: (page, name, source, outputs)."
    pages = [p for p in sorted(NBS.glob('*.ipynb')) if p.stem not in OWN]
    return [(p.stem, name, source, out) for p in pages for source, out in code_of(p) for name, _ in checked(source)
            if name in EXERCISES or re.fullmatch(r'[\da-z]+-\d+', name)]


def said(outputs): return ' '.join(''.join(o.get('data', {}).get('text/plain', '')) for o in outputs).split()


def answers_of(e, f):
    "What someone answers who computes with `f`: the function, or its value; parts that do not matter are right."
    if e.function: return (f,)
    whole = lambda x: x if isinstance(x, tuple) else (x,)
    return tuple(r if a is ... else a for a, r in zip(whole(f(*e.inputs())), whole(e.right(*e.inputs()))))


# ---- the exercises


@pytest.mark.parametrize('name', EXERCISES)
def test_right_answer_passes(name):
    e = EXERCISES[name]
    verdict = check(name, *answers_of(e, e.right))
    assert verdict and verdict.text == e.why


@pytest.mark.parametrize('name', EXERCISES)
def test_every_mistake_gets_its_hint(name):
    e = EXERCISES[name]
    assert e.mistakes
    for hint, mistake in e.mistakes.items():
        verdict = check(name, *answers_of(e, mistake))
        assert not verdict and (verdict.state, verdict.text) == ('wrong', hint)


@pytest.mark.parametrize('name', EXERCISES)
def test_not_answered(name):
    e = EXERCISES[name]
    parts = len(answers_of(e, e.right))
    open_ = [check(name, *[...]*parts), check(name)]
    if e.function: open_.append(check(name, lambda *inputs: None))
    if parts > 1: open_.append(check(name, 1., ...))
    assert [v.state for v in open_] == ['open']*len(open_)
    assert all(f'{name}: not answered yet.' in repr(v) for v in open_)


@pytest.mark.parametrize('name', [n for n, e in EXERCISES.items() if e.choices])
def test_predictions_are_among_the_choices(name):
    e = EXERCISES[name]
    prediction, measured = answers_of(e, e.right)
    assert prediction in e.choices
    assert 'Predict one of' in check(name, 'perhaps', measured).text
    for other in set(e.choices) - {prediction}:     # every wrong prediction has a hint of its own
        assert check(name, other, measured).text in e.mistakes


# ---- the pages


def test_pages_ask_every_exercise_once_and_leave_it_open():
    cells = on_pages()
    assert sorted(name for _, name, *_ in cells) == sorted(EXERCISES)
    for page, name, source, out in cells:
        assert source.count('...') >= 1, f'{page}: {name} is answered'
        assert said(out)[:4] == [f'{name}:', 'not', 'answered', 'yet.'], f'{page}: {name}'


def test_a_page_has_three_to_six():
    pages = [page for page, *_ in on_pages()]
    assert {p for p in pages} >= {'03_couplings', '04_plan', '10_scores', '15_repair', '20_fasp', '30_depth2',
                                  '40_bonsai', '50_curvature', '51_elements', '51a_structures', '52_surgeon', '68_experts', '70_recipe', '72_depth', '75_recover',
                                  'lab'}
    assert all(3 <= pages.count(p) <= 6 for p in pages)


def test_cells_of_pages_run_with_what_they_give():
    "As the page does: a cell alone, after the import."
    for page, name, source, _ in on_pages():
        space = dict(check=check, given=given)
        if page == 'lab': continue                  # its cells need those before
        tree = ast.parse(source)
        last = ast.Expression(tree.body.pop().value)
        exec(compile(tree, page, 'exec'), space)
        assert eval(compile(last, page, 'eval'), space).state == 'open'


@pytest.fixture(scope='module')
def solved():
    "Names of the exercises that the notebooks of solutions solve, run here up to where they load a model."
    shell, found = pytest.importorskip('execnb.shell').CaptureShell(), []
    for page in SOLVED:
        for source, _ in code_of(NBS/f'{page}.ipynb'):
            if 'load_model' in source: break
            for out in shell.run(source):
                assert out['output_type'] != 'error', out
                text = ' '.join(''.join(out.get('data', {}).get('text/plain', [])).split())
                found += re.findall(r"([\da-z]+-\d+): right\.", text)
    return found


def test_solutions_solve_every_exercise(solved): assert solved == [*EXERCISES]


def test_solutions_show_that_they_are_right():
    cells = [cell for page in SOLVED for cell in code_of(NBS/f'{page}.ipynb')]
    shown = [said(out)[:2] for source, out in cells if checked(source)]
    assert shown == [[f'{name}:', 'right.'] for name in EXERCISES]


# ---- answers as readers write them


def test_numbers_come_in_any_form():
    for answer in ([30, 8], (torch.tensor([30., 8.])), torch.tensor([30., 8.]).double().numpy(), [torch.tensor(30.), 8]):
        assert check('fasp-1', answer)
    assert check('plan-1', torch.tensor(.45, requires_grad=True)) and check('plan-1', 45/100)


@pytest.mark.parametrize('answer, hint', [
    ([150, 16], 'square root'), ([15, 14], 'rows of W'), ([[30, 8]], 'shape is (1, 2)'), ([60, 16], 'constant factor'),
    ([float('nan'), 8], 'not finite'), ('thirty', 'not str'), (object(), 'not object'), (max, 'Call your function')])
def test_hints_to_a_number(answer, hint):
    verdict = check('fasp-1', answer)
    assert not verdict and hint in verdict.text


def _raises(W, C, columns): return W @ C @ columns.T
def _spoils(W, C, columns): return W.abs_().sum(0).mul(C.diag().sqrt())[columns].sum(1)
def _squared(W, C, columns): return (W.abs().sum(0)*C.diag())[columns].sum(1)
def _by_unit(W, C, columns): return (W.abs().sum(0)*C.diag().sqrt())[columns].sum(1, keepdim=True)


@pytest.mark.parametrize('answer, hint', [
    (_raises, 'raised RuntimeError'), (_spoils, 'changes its inputs'), (_squared, 'square root'), (_by_unit, 'shape is (4, 1)'),
    (torch.ones(4), 'give its name')])
def test_hints_to_a_function(answer, hint):
    verdict = check('fasp-2', answer)
    assert not verdict and hint in verdict.text


def test_a_mistake_on_some_draws_only_gets_no_hint():
    "A hint is given if it explains all draws, and a function that is right on one draw is not right."
    e, calls = EXERCISES['fasp-2'], []
    def once(*inputs):
        calls.append(1)
        return e.right(*inputs) if len(calls) == 1 else next(iter(e.mistakes.values()))(*inputs)
    verdict = check('fasp-2', once)
    assert len(calls) == DRAWS and not verdict and verdict.text not in e.mistakes


def test_whole_numbers_are_exact():
    right = EXERCISES['surgeon-3'].right(*given('surgeon-3'))
    assert check('surgeon-3', *right) and not check('surgeon-3', right[0], right[1] + 1e-3)


def test_given_is_the_same_every_time_and_cannot_be_spoilt():
    X, W = given('fasp-4')
    expected = check('fasp-4', 'no', EXERCISES['fasp-4'].right(X, W)[1])
    X.zero_()
    again, _ = given('fasp-4')
    assert expected and again.abs().sum() > 0
    assert check('fasp-4', 'no', EXERCISES['fasp-4'].right(*given('fasp-4'))[1])


def test_unknown_names():
    with pytest.raises(ValueError, match='fasp-9.*there are fasp-1, fasp-2'): check('fasp-9', 1)
    with pytest.raises(ValueError, match='there are couplings-1'): given('nothing')


def test_words_are_never_run(monkeypatch):
    "Answers are compared, not evaluated."
    assert not check('plan-1', '.3/(2/3)') and not check('plan-1', '__import__("os")')
    source = Path(exercises.__file__).read_text(encoding='utf-8')
    calls = {n.func.id for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)}
    assert not calls & {'eval', 'exec', 'compile'}


def test_an_exercise_of_ones_own(monkeypatch):
    monkeypatch.setattr(exercises, 'EXERCISES', {})
    exercise('own-1', lambda: 2., 'One and one.', {'Add them.': lambda: 1.})
    assert check('own-1', 2) and check('own-1', 1).text == 'Add them.' and check('own-1', 3).text == ''

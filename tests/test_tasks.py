"Zero-shot tasks: files, scores by item, paired differences; the harness on a model in memory."
import configparser
import copy
import functools
import json
import math
import os
import re
import socket
import sys
from pathlib import Path

import pytest
import torch

from prunebook.cli import main
from prunebook.models import load_model, tiny_model
from prunebook.record import State, side_by_side
from prunebook.tasks import TaskScore, score_difference, task_file, task_form, zero_shot

QUESTIONS = [('Is grass green?', 0), ('Is water wet?', 0), ('Is fire cold?', 1), ('Is snow white?', 0)]


@pytest.fixture(scope='module')
def questions(tmp_path_factory):
    path = tmp_path_factory.mktemp('tasks')/'yes_no.jsonl'
    path.write_text('\n'.join(json.dumps(dict(query=q, choices=['y', 'n'], gold=a)) for q, a in QUESTIONS))
    return path


@pytest.fixture
def offline(monkeypatch, tmp_path):
    "Any attempt to reach another machine is an error; `lm_eval` has none of its 13,000 tasks, whose index takes 16 s."
    tasks = pytest.importorskip('lm_eval.tasks')
    def refused(self, address, *_): raise AssertionError(f'a connection to {address} was tried')
    assert os.environ['HF_HUB_OFFLINE'] == '1'             # by conftest, before anything was imported
    monkeypatch.setattr(socket.socket, 'connect', refused)
    monkeypatch.setattr(socket, 'getaddrinfo', lambda *a, **_: refused(None, a))
    whole = tasks.TaskManager
    monkeypatch.setattr(tasks, 'TaskManager', lambda include_defaults: whole(include_defaults=False))


def answering(token_id):
    "A tiny model with a bias to one token, whatever it reads."
    model = tiny_model('phi')
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.lm_head.bias.zero_()[token_id] = 5.
    return model


def test_by_hand(questions, offline, tiny_tokenizer):
    model = tiny_model('llama')
    before = {n: t.clone() for n, t in model.state_dict().items()}
    found = zero_shot(model, tiny_tokenizer, [questions], batch_size=3)
    right = []
    for q, label in QUESTIONS:
        ids = torch.tensor([tiny_tokenizer(q + ' ', add_special_tokens=False).input_ids])
        with torch.no_grad(): logits = model(torch.cat([torch.ones(1, 1, dtype=torch.long), ids], 1)).logits[0, -1]
        y, n = tiny_tokenizer('yn', add_special_tokens=False).input_ids
        right.append(int((logits[n] > logits[y]).item() == label))
    assert list(found) == ['yes_no'] and found['yes_no'].right == right
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


@pytest.mark.parametrize('answer, limit, right', [('y', None, [1, 1, 0, 1]), ('n', None, [0, 0, 1, 0]), ('y', 2, [1, 1])])
def test_a_rigged_model(questions, offline, tiny_tokenizer, answer, limit, right):
    token = tiny_tokenizer(answer, add_special_tokens=False).input_ids[0]
    s = zero_shot(answering(token), tiny_tokenizer, [questions], limit=limit)['yes_no']
    assert s.right == right and s.share == sum(right)/len(right)
    assert s.stderr == pytest.approx(math.sqrt(s.share*(1 - s.share)/(len(right) - 1)))


def test_the_three_forms(offline, tiny_tokenizer, tmp_path):
    "Contexts that differ, and last words; a model that always says one letter."
    lines = dict(contexts=dict(context_options=['a b', 'a c'], continuation='y', gold=1), last=dict(context='say', continuation='y'))
    files = []
    for name, item in lines.items():
        files.append(tmp_path/f'{name}.jsonl')
        files[-1].write_text(json.dumps(item))
    found = zero_shot(tiny_model('llama'), tiny_tokenizer, files)
    assert {n: len(s.right) for n, s in found.items()} == dict(contexts=1, last=1)


@pytest.mark.parametrize('adds', [True, False])
def test_begins_as_the_tokenizer_does(questions, offline, tiny_tokenizer, monkeypatch, adds):
    "Whatever the release of lm_eval does by itself: 0.4.9 leaves the token out, later ones ask the tokenizer."
    import lm_eval.models.huggingface as harness
    from tokenizers.processors import TemplateProcessing
    plain, model, read = copy.deepcopy(tiny_tokenizer), tiny_model('llama'), []
    plain.backend_tokenizer.post_processor = TemplateProcessing(single='$A', special_tokens=[])
    model.get_input_embeddings().register_forward_pre_hook(lambda _, args: read.extend(args[0].tolist()))

    class Old(harness.HFLM):
        def __init__(self, *args, add_bos_token=not adds, **kw): super().__init__(*args, add_bos_token=add_bos_token, **kw)
    monkeypatch.setattr(harness, 'HFLM', Old)
    zero_shot(model, tiny_tokenizer if adds else plain, [questions])
    assert len(read) >= 4 and all((row[0] == 1) == adds and 1 not in row[1:] for row in read)


def test_a_reloaded_model_answers_the_same(questions, offline, tiny_tokenizer, tmp_path):
    model = tiny_model('qwen2')
    model.save_pretrained(tmp_path/'m')
    tiny_tokenizer.save_pretrained(tmp_path/'m')
    again, tokenizer = load_model(str(tmp_path/'m'), dtype=model.dtype)
    a, b = (zero_shot(m, t, [questions])['yes_no'] for m, t in ((model, tiny_tokenizer), (again, tokenizer)))
    assert a.right == b.right and score_difference(a, b) == (0, 0)


@pytest.mark.parametrize('before, after', [([1, 1, 0, 0], [1, 0, 0, 1]), ([1, 0], [1, 1]), ([0, 0, 0], [1, 1, 1])])
def test_paired_differences(before, after):
    change, stderr = score_difference(TaskScore(before, 'x'), TaskScore(after, 'x'))
    d = torch.tensor(after, dtype=torch.float64) - torch.tensor(before, dtype=torch.float64)
    assert change == pytest.approx(d.mean().item()) and stderr == pytest.approx((d.std()/len(d)**.5).item())


def test_other_questions_cannot_be_paired(questions, offline, tiny_tokenizer, tmp_path):
    other = tmp_path/'other.jsonl'
    other.write_text('\n'.join(json.dumps(dict(query=q + '!', choices=['y', 'n'], gold=a)) for q, a in QUESTIONS))
    model = tiny_model('llama')
    a, b = zero_shot(model, tiny_tokenizer, [questions, other]).values()
    with pytest.raises(ValueError, match='different questions'): score_difference(a, b)


@pytest.mark.parametrize('text, words', [('', 'holds no questions'), ('{"query": "a"}', 'line 1, is no question'), ('nonsense', 'line 1, is not JSON'),
                                         ('{"query": "a", "choices": ["b"], "gold": 1}', 'line 1, is no question'), ('[]', 'line 1, is no question'),
                                         ('{"query": "a", "choices": ["b"], "gold": 0}\n{"query": "a"}', 'line 2, is not like line 1'),
                                         ('{"query": "a", "choices": [1, 2], "gold": 0}', 'line 1, is no question'),
                                         ('{"query": "a", "choices": "bc", "gold": true}', 'line 1, is no question')])
def test_files_of_something_else(tmp_path, text, words):
    (tmp_path/'q.jsonl').write_text(text)
    with pytest.raises(ValueError, match=words): task_form(tmp_path/'q.jsonl')


def test_where_a_task_is_looked_for(questions, monkeypatch, tmp_path):
    monkeypatch.delenv('PRUNEBOOK_DATA', raising=False)
    assert task_file('yes_no') is None and task_file(questions) == questions
    (tmp_path/'zeroshot').mkdir()
    (tmp_path/'zeroshot'/'yes_no.jsonl').write_text(questions.read_text())
    monkeypatch.setenv('PRUNEBOOK_DATA', str(tmp_path))
    assert task_file('yes_no') == tmp_path/'zeroshot'/'yes_no.jsonl' and task_file('piqa') is None
    with pytest.raises(FileNotFoundError, match='no file of questions'): task_file(tmp_path/'none.jsonl')


def test_a_task_that_is_nowhere(offline, tiny_tokenizer, monkeypatch):
    monkeypatch.delenv('PRUNEBOOK_DATA', raising=False)
    with pytest.raises(FileNotFoundError, match='no_such_task: no such file in the folder zeroshot'):
        zero_shot(tiny_model('llama'), tiny_tokenizer, ['no_such_task'])


@pytest.mark.parametrize('missing', ['lm_eval', 'lm_eval.models.huggingface', 'accelerate'])
def test_without_lm_eval(monkeypatch, tiny_tokenizer, missing):
    for name in [n for n in sys.modules if n.split('.')[0] == 'lm_eval']: monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ImportError, match=re.escape('pip install "prunebook[eval]"')): zero_shot(tiny_model('llama'), tiny_tokenizer, ['x'])


@pytest.mark.parametrize('extra', ['eval_requirements', 'dev_requirements'])
def test_extra_brings_what_is_imported(extra):
    "lm_eval 0.4.10 and later leave `accelerate`, which the Hugging Face model imports, to an extra of their own."
    cfg = configparser.ConfigParser(delimiters=['='], interpolation=None)
    cfg.read(Path(__file__).resolve().parent.parent/'settings.ini', encoding='utf-8')
    said = cfg['DEFAULT']['requirements'] + cfg['DEFAULT'][extra]
    assert re.search(r'^(lm_eval\[.*\bhf\b.*\]|accelerate\b)', said, re.M) and re.search(r'^lm_eval', cfg['DEFAULT'][extra], re.M)


def test_records_and_the_command_line(questions, offline, tiny_tokenizer, tmp_path, capsys):
    model = tiny_model('qwen2', max_position_embeddings=512)
    dense, small = (State.of(model, tiny_tokenizer, {}, [questions], 3) for _ in range(2))
    pair = side_by_side(dense, small)['tasks']['yes_no']
    assert pair['before'] == pair['after'] and pair['change'] == dict(value=0, stderr=0) and len(pair['after']['right']) == 3
    model.save_pretrained(tmp_path/'m')
    tiny_tokenizer.save_pretrained(tmp_path/'m')
    asked = ['--tasks', str(questions), '--text', 'passages', '--n', '2', '--seqlen', '32']
    assert main(['eval', str(tmp_path/'m'), *asked, '--json']) == 0
    assert json.loads(capsys.readouterr().out)['tasks']['yes_no']['items'] == 4
    prune = ['prune', str(tmp_path/'m'), '--method', 'random', '--eval-n', '2', *asked, '--limit', '2']
    assert main([*prune, '--out', str(tmp_path/'o')]) == 2 and 'add --report' in capsys.readouterr().err
    assert main([*prune, '--out', str(tmp_path/'o'), '--report']) == 0
    record = json.loads((tmp_path/'o'/'report.json').read_text())['tasks']['yes_no']
    assert record['before']['items'] == 2 and '| yes_no | ' in (tmp_path/'o'/'report.md').read_text()
    assert main(['eval', str(tmp_path/'m'), *asked, '--limit', '0']) == 2 and '--limit is 0' in capsys.readouterr().err

"""The script that measures recovery, on a tiny model."""
import importlib.util
import json
from pathlib import Path

import pytest
from helpers import tiny_model

pytestmark = pytest.mark.usefixtures('one_thread', 'own_modules')
pytest.importorskip('peft')


@pytest.mark.parametrize('form', ['lora', 'blocks'])
def test_a_cell(form, tmp_path, tiny_tokenizer, monkeypatch):
    "It is trained for as many steps as the minutes allow, and says what it was before and is after."
    spec = importlib.util.spec_from_file_location('measure_recover', Path(__file__).parents[1]/'scripts'/'measure_recover.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    load, few = module.load_windows, dict(wikitext2='passages', passages='passages')
    monkeypatch.setattr(module, 'SEQLEN', 40)
    monkeypatch.setattr(module, 'load_model', lambda name: (tiny_model('llama', max_position_embeddings=512), tiny_tokenizer))
    monkeypatch.setattr(module, 'load_windows', lambda source, m, t, n, *a, **kw: load(few[source], m, t, min(n, 16), *a, **kw))
    monkeypatch.setattr(module, 'FORMS', {form: (module.replace(module.FORMS[form][0], batch_size=2), 'wikitext2')})
    cell = module.Cell('fasp', .2, form, minutes=.01)
    found = module.measure(cell, tmp_path, [], None)
    chosen = json.loads((tmp_path/f'{cell.name}-steps.json').read_text())
    assert found['recovery']['steps'] == chosen >= 1 and found['true_sparsity'] == pytest.approx(.2, abs=.05)
    assert found['perplexity']['before'] != found['perplexity']['after'] or found['recovery']['best'] == 0
    json.loads(module.strict_json(found))

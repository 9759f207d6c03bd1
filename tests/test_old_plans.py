"""Plans that version 0.1 wrote are applied: their settings had other names, and some belonged to a run.

`fixtures/plans-0.1.json` holds, for a tiny Llama and 12 windows of 24 random tokens, what `plan.save` of version 0.1 wrote (without scores), and the norm of all weights
of the model that it returned.
"""
import json
from pathlib import Path

import pytest
import torch
from helpers import tiny_model

from prunebook.methods import Method
from prunebook.plan import PrunePlan
from prunebook.pruning import prune, settings_now
from prunebook.text import random_tokens

pytestmark = pytest.mark.usefixtures('one_thread')
PLANS = json.loads((Path(__file__).parent/'fixtures'/'plans-0.1.json').read_text(encoding='utf-8'))


def text(model): return random_tokens(model, 12, 24, seed=0)


@pytest.mark.parametrize('name', PLANS)
def test_a_plan_of_version_0_1_gives_its_model(name, tmp_path):
    (tmp_path/'plan.json').write_text(json.dumps(PLANS[name]['plan']))
    plan, model = PrunePlan.load(tmp_path/'plan.json'), tiny_model('llama')
    small = plan.apply(model, text(model))
    assert sum(p.double().pow(2).sum().item() for p in small.parameters())**.5 == pytest.approx(PLANS[name]['norm'], rel=1e-5)
    assert small.num_parameters() < tiny_model('llama').num_parameters()


@pytest.mark.parametrize('name', PLANS)
def test_its_settings_are_those_of_a_method_now(name):
    old = PLANS[name]['plan']
    now = settings_now(PrunePlan(**old), tiny_model('llama'))
    from prunebook.methods import as_method, configured
    assert set(now) <= set(as_method(old['method']).settings()) and configured(old['method'], now)
    assert settings_now(PrunePlan(**{**old, 'settings': now}), tiny_model('llama')) == now


def test_what_is_no_setting_is_still_refused():
    model = tiny_model('llama')
    plan = PrunePlan(**PLANS['fasp']['plan'])
    plan.settings['resotre'] = True
    with pytest.raises(ValueError, match='no setting resotre'): plan.apply(model, text(model))
    del plan.settings['resotre']
    plan.settings['reconstruct'] = 'none'                   # of another method
    with pytest.raises(ValueError, match='no setting reconstruct'): plan.apply(model, text(model))


def test_a_setting_of_ones_own_keeps_its_name():
    "Also where version 0.1 used the name for something else."
    from dataclasses import dataclass

    @dataclass
    class Own(Method):
        name = 'own-state'
        reads_text = False
        state: int = 0
        def prepare(self, ctx): return {c.name: torch.arange(c.n_units)*(1 if self.state else -1) for c in ctx.table}

    model = tiny_model('llama')
    small, plan = prune(model, text(model), Own(state=1), .2)
    assert settings_now(plan, model)['state'] == 1
    assert all(torch.equal(a, b) for a, b in zip(plan.apply(model).parameters(), small.parameters(), strict=True))

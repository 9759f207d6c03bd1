"""What every method chose, and the weights it left, at version 0.1: a rebuilt method gives the same, or its change is explained here.

Changed since: GPT-2 keeps its transposed layers where its values are narrow, which were plain linears at version 0.1; so the same weights lie
the other way round, and their product with the random direction is another one (three cases; units and norms are equal).
A plan also lists couplings that lose nothing (`fasp-groups`, `depth2-heads`; the cut couplings and all weights are equal).

`python tests/test_parity.py` writes the fixture anew, from the package as it is.
"""
import json
import zlib
from pathlib import Path

import pytest
import torch

from prunebook.methods import configured

from prunebook.pruning import prune
from prunebook.models import TINY, tiny_model
from prunebook.text import random_tokens

FIXTURE = Path(__file__).parent/'fixtures'/'parity.json'
VALUES, GROUPS = ['value_channel', 'mlp_channel'], ['kv_group', 'mlp_channel']
MEAN = dict(ridge='mean')                                  # FASP's ridge is another one since
SETTINGS = {
    'random': ('random', {}),
    'magnitude': ('magnitude', {}),
    'magnitude-restored': ('magnitude', dict(restore=True)),
    'wanda_sp': ('wanda_sp', {}),
    'flap': ('flap', {}),
    'flap-bias': ('flap', dict(restore='bias')),
    'taylor': ('taylor', {}),
    'fasp': ('fasp', MEAN),
    'fasp-values': ('fasp', dict(units=VALUES, **MEAN)),
    'fasp-groups': ('fasp', dict(units=GROUPS, towards='zero', damp=.01, **MEAN)),
    'fasp-cut': ('fasp', dict(restore=False, **MEAN)),
    'depth2': ('depth2', {}),
    'depth2-heads': ('depth2', dict(units=GROUPS, form='paper', restore='two_step', trust=1.)),
    'bonsai': ('bonsai', dict(evaluations=8, seqlen=12)),
    'surgeon': ('surgeon', dict(shots=2)),
    'recipe': ('recipe', {}),
    'recipe-uniform': ('recipe', dict(allocation='uniform', turn=False)),
}
CASES = [f'{family}-{name}' for family in TINY for name in SETTINGS]


def weights_in_short(model):
    "Two numbers that depend on every weight: the norm, and the product with a fixed random direction."
    total = direction = 0.
    for name, p in sorted(model.named_parameters()):
        draw = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        total += p.double().pow(2).sum().item()
        direction += (p.double()*torch.randn(p.shape, generator=draw, dtype=torch.float64)).sum().item()
    return [total**.5, direction]


def outcome(case):
    "Kept units by coupling name as one checksum, and the weights in short."
    family, name = case.split('-', 1)
    method, settings = SETTINGS[name]
    model = tiny_model(family)
    small, plan = prune(model, random_tokens(model, 12, 24, seed=0), configured(method, settings), .2)
    kept = json.dumps(plan.kept, sort_keys=True)
    return dict(kept=zlib.crc32(kept.encode()), weights=weights_in_short(small))


@pytest.mark.parametrize('case', CASES)
def test_same_as_version_0_1(case, one_thread):
    expected, found = json.loads(FIXTURE.read_text(encoding='utf-8'))[case], outcome(case)
    assert found['kept'] == expected['kept']
    assert found['weights'] == pytest.approx(expected['weights'], rel=2e-4, abs=2e-3)


if __name__ == '__main__':
    FIXTURE.parent.mkdir(exist_ok=True)
    FIXTURE.write_text(json.dumps({c: outcome(c) for c in CASES}, indent=0) + '\n', encoding='utf-8')

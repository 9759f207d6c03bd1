"""The command line on a saved tiny model of every family: it is pruned, saved, and loaded again."""
import json
import re
from pathlib import Path

import pytest
from prunebook.cli import main
from prunebook.conform import padded_logits
from prunebook.couplings import FAMILIES, kinds_of
from prunebook.load import is_ours
from prunebook.models import TINY, TINY_MORE, decoder_linears, decoder_weights, load_model, n_parameters, tiny_model

pytestmark = pytest.mark.usefixtures('one_thread', 'own_modules')


@pytest.fixture(scope='module')
def saved(tmp_path_factory, tiny_tokenizer):
    "Folder of a saved tiny model, by family."
    root, made = tmp_path_factory.mktemp('families'), {}
    def folder(family):
        if family not in made:
            model = tiny_model(family)
            made[family] = root/family, model
            model.save_pretrained(root/family)
            tiny_tokenizer.save_pretrained(root/family)
        return made[family]
    return folder


@pytest.mark.parametrize('method', ['recipe', 'fasp'])
@pytest.mark.parametrize('family', TINY | TINY_MORE)
def test_prune_and_load(family, method, saved, tmp_path, capsys):
    folder, model = saved(family)
    units = [] if 'mlp_channel' in kinds_of(model) else ['--settings', '{"units": ["value_channel"]}']      # nothing but experts
    most = .2*n_parameters(decoder_linears(model).values())/n_parameters(decoder_weights(model).values())                        # these methods leave experts alone
    words = ['prune', str(folder), '--method', method, '--sparsity', str(most), '--text', 'random', '--n', '3', '--seqlen', '14', '--dtype', 'float32', '--device', 'cpu', '--json']
    assert main([*words, *units, '--out', str(tmp_path/'small')]) == 0, capsys.readouterr().err
    said = json.loads(capsys.readouterr().out)
    assert said['method'] == method and said['true_sparsity'] == pytest.approx(most, abs=.05)
    small, _ = load_model(str(tmp_path/'small'), 'cpu')
    assert is_ours(tmp_path/'small') and sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())
    assert padded_logits(small).isfinite().all() and type(small).__name__.removeprefix('Pruned') == type(model).__name__


def test_the_readme_lists_every_family():
    "Those for which there are adapters, no more and no less."
    text = (Path(__file__).parents[1]/'README.md').read_text(encoding='utf-8')
    listed = re.findall('`([^`]+)`', text.partition('## Models')[2].partition('\n## ')[0].partition('Unknown')[0])
    assert sorted(listed) == sorted(FAMILIES)


@pytest.mark.parametrize('family', ['mixtral', 'gpt_oss'])
def test_units_that_are_not_there_are_named(family, saved, tmp_path, capsys):
    folder, _ = saved(family)
    assert main(['prune', str(folder), '--method', 'fasp', '--text', 'random', '--n', '3', '--seqlen', '14', '--device', 'cpu', '--out', str(tmp_path/'small')]) == 2
    assert 'units=["value_channel"]' in capsys.readouterr().err and not (tmp_path/'small').exists()

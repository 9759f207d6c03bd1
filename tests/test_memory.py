"""A streamed run holds one block, one statistic and one batch: its peak, in a process of its own, against the shape. Inputs live at their own stage."""
import os
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from helpers import tiny_model

from prunebook.couplings import anatomy
from prunebook.estimate import counted_bytes
from prunebook import models, pruning, sources
from prunebook.methods import Needs, Run, configured
from prunebook.models import check_finite
from prunebook.pruning import prune
from prunebook.sources import InMemory, OnDisk, _DiskList
from prunebook.stream import Context, visits
from prunebook.text import random_tokens
from prunebook.walk import walk, walk_both

HIDDEN, WIDTH, VOCABULARY, TOKENS = 512, 1536, 30000, 8*64
LINUX = pytest.mark.skipif(sys.platform != 'linux', reason='reads /proc')

RUN = """
import sys
from pathlib import Path
from prunebook.cli import main
from prunebook.evaluate import peak_memory
words = ['--stream', '--method', 'fasp', '--text', 'random', '--n', '8', '--seqlen', '64', '--dtype', sys.argv[2], '--device', 'cpu']
def prune(name): assert not main(['prune', f'{sys.argv[1]}/{name}', *words, '--out', f'{sys.argv[1]}/{name}-small', '--force'])
prune('tiny')                                              # imports, and what libraries keep from their first call on
with peak_memory('cpu') as memory: prune('dense')
print(memory['extra'])
"""


@LINUX
@pytest.mark.parametrize('dtype', ['bfloat16', 'float32'])
def test_peak_of_a_streamed_run(dtype, tmp_path, tiny_tokenizer):
    "Shards hold three blocks; the rule is 1.5 times (embeddings + two blocks + states), above a process that has streamed a tiny model."
    config = dict(num_hidden_layers=8, hidden_size=HIDDEN, intermediate_size=WIDTH, vocab_size=VOCABULARY,
                  num_attention_heads=8, num_key_value_heads=8, head_dim=64)
    m = tiny_model('llama', **config).to(getattr(torch, dtype))
    block = sum(p.nbytes for p in m.model.layers[0].parameters())
    bound = 1.5*(m.model.embed_tokens.weight.nbytes + 2*block + TOKENS*HIDDEN*m.dtype.itemsize)
    for name, model in (('dense', m), ('tiny', tiny_model('llama').to(m.dtype))):
        model.save_pretrained(tmp_path/name, max_shard_size=3*block)
        tiny_tokenizer.save_pretrained(tmp_path/name)
    peaks = []
    while not peaks or min(peaks) >= bound and len(peaks) < 5: peaks.append(peak_of_a_run(tmp_path, dtype))
    assert min(peaks) < bound, f'{min(peaks)/2**20:.0f} MiB, where {bound/2**20:.0f} are allowed'


def peak_of_a_run(folder, dtype):
    "Bytes in a process of its own. The system adds up to a fifth by chance (59 to 77 MiB were seen), so that a caller may try again."
    done = subprocess.run([sys.executable, '-c', RUN, str(folder), dtype], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return int(done.stdout.split()[-1])


def test_what_waits_is_on_disk(tmp_path):
    "The inputs of a stage are read when they are used; nothing is left in the folder."
    m = tiny_model('llama')
    m.save_pretrained(tmp_path/'dense')
    (tmp_path/'out').mkdir()
    w = random_tokens(m, n=6, seqlen=16)
    for a, b in zip(walk(m, w, 2), walk(OnDisk(tmp_path/'dense', tmp_path/'out'), w, 2), strict=True):
        assert isinstance(b.X, _DiskList) and len(b.X) == 3
        assert all(torch.equal(x, y) for x, y in zip(a.X, b.X, strict=True)) and torch.equal(a.gram(), b.gram())
    assert sorted(p.name for p in (tmp_path/'out').iterdir()) == [f'block-{b.layer:05d}.safetensors' for b in anatomy(m)]


@LINUX
def test_an_open_block_maps_no_file(tmp_path):
    "A tensor that lies in a mapped file would keep pages of its shard in memory."
    m = tiny_model('llama')
    m.save_pretrained(tmp_path/'dense', max_shard_size='20kB')
    source = OnDisk(tmp_path/'dense')
    mapped = lambda: str(tmp_path/'dense') in Path('/proc/self/maps').read_text()
    value = source.read('model.norm.weight')
    assert mapped()                                         # so the mark works
    del value
    with source.embeddings(): assert not mapped()
    for b in anatomy(source.model):
        source.open(b)
        assert not mapped()
        source.close(b)


# ---- inputs live at their own stage only ------------------------------------------------------------------------------

class Watched(InMemory):
    "Notes, whenever something was collected, how many bytes of inputs of other second linears are alive."
    def __init__(self, model, widths):
        super().__init__(model)
        self.widths, self.seen, self.left = widths, [], []

    def collect(self, tensors):
        kept = super().collect(tensors)
        if (width := kept[0].shape[-1]) in self.widths:
            self.left.append(sum(x().nbytes for w, x in self.seen if w != width and x() is not None))
            self.seen += [(width, weakref.ref(x)) for x in kept]
        return kept


@pytest.mark.parametrize('dense', [None, 'outputs', 'stream'])
@pytest.mark.parametrize('firsts', [False, True])
def test_inputs_are_let_go_before_the_next_come(dense, firsts):
    "Attention reads 96 columns, the MLP 80; the caller keeps every visit, as a loop does with the last one."
    m = tiny_model('llama', hidden_size=48, head_dim=16, intermediate_size=80)
    source, method = Watched(m, (96, 80)), configured('fasp', {})
    ctx = Context(source, random_tokens(m, n=4, seqlen=8), .2, table=method.table(m))
    for v in visits(ctx, Needs(dense=dense, firsts=firsts, everywhere=True)):
        if v.level == 'second' and v.coupling is not None: v.cut(range(10), v.weight[:, :10])
    assert source.left == [0]*6
    assert all(x() is None for _, x in source.seen)


def test_the_dense_model_goes_ahead_when_inputs_are_gone():
    "Two trajectories, and inputs of one second linear of one of them at a time."
    m = tiny_model('llama', hidden_size=48, head_dim=16, intermediate_size=80)
    source, twin = Watched(m, (96, 80)), Watched(tiny_model('llama', hidden_size=48, head_dim=16, intermediate_size=80), (96, 80))
    twin.seen, twin.left = source.seen, source.left
    for _ in walk_both(source, random_tokens(m, n=4, seqlen=8), twin): pass
    assert source.left == [0]*9                            # the dense MLP is computed batch by batch, and its inputs are not collected


def test_a_look_at_weights_copies_nothing():
    "It took 9 bytes a number: a truth value, counted in 64 bits."
    big = torch.nn.Linear(1000, 1000, bias=False)
    assert counted_bytes(lambda: check_finite(big)) < 1000
    for value in (float('nan'), float('inf'), -float('inf')):
        with torch.no_grad(): big.weight[3, 4] = value
        with pytest.raises(ValueError, match='weight holds 1 NaN or infinite'): check_finite(big)
    check_finite(torch.nn.Linear(0, 5, bias=False))


# ---- room on the disk -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('name', ['fasp', 'depth2', 'recipe'])
def test_the_disk_is_asked_for_what_is_written(name, tmp_path, monkeypatch):
    "Files of finished blocks, of the log, and those without a name that hold what waits: they were not counted."
    m, lists, seen, asked = tiny_model('llama', num_hidden_layers=4), weakref.WeakSet(), [0], []
    m.save_pretrained(tmp_path/'dense')
    work = tmp_path/'.small-stream'

    def note():
        named = sum(f.stat().st_size for f in work.glob('*'))
        seen.append(named + sum(os.fstat(w.file.fileno()).st_size for w in lists))

    class Noted(_DiskList):
        def __init__(self, folder):
            super().__init__(folder)
            lists.add(self)
        def append(self, x):
            super().append(x)
            note()

    def saved(tensors, file, real=sources.save_tensors):
        real(tensors, file)
        note()

    monkeypatch.setattr(sources, '_DiskList', Noted)
    for place in (sources, pruning): monkeypatch.setattr(place, 'save_tensors', saved)
    real = models._check_room
    monkeypatch.setattr(models, '_check_room', lambda target, needed: (asked.append(needed), real(target, needed)))
    prune(tmp_path/'dense', random_tokens(m, n=16, seqlen=32), configured(name, {}), .3, run=Run(batch_size=2, out=str(tmp_path/'small')))
    assert max(seen) <= asked[0] < 1.5*max(seen), (max(seen), asked)
    assert asked[0] > 1.5*sum(p.nbytes for p in m.parameters())             # so what waits is the larger part

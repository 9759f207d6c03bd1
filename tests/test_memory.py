"""A streamed run holds one block, one statistic and one batch: its peak, in a process of its own, against what the shape says."""
import subprocess
import sys

import pytest
import torch
from helpers import tiny_model

from prunebook.couplings import anatomy
from prunebook.sources import OnDisk, _DiskList
from prunebook.text import random_tokens
from prunebook.walk import walk

HIDDEN, WIDTH, VOCABULARY, TOKENS = 512, 2048, 65000, 8*64
LINUX = pytest.mark.skipif(sys.platform != 'linux', reason='reads /proc')

MARK = '''
import torch
def mark(): return [int(l.split()[1])/1024 for l in open('/proc/self/status') if l.startswith('VmHWM')][0]
'''
LOADED = MARK + '''
from transformers import AutoModelForCausalLM, LlamaForCausalLM
m = torch.ones(1024, 1024)
torch.linalg.cholesky(m @ m + 1e6*torch.eye(1024))         # what a product and a factorization need to begin with
print(mark())
'''
STREAMED = MARK + '''
import sys
from prunebook.cli import main
assert not main(sys.argv[1:])
print(mark())
'''


def printed(code, *words):
    done = subprocess.run([sys.executable, '-c', code, *map(str, words)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return float(done.stdout.split()[-1])


@LINUX
@pytest.mark.parametrize('dtype', ['bfloat16', 'float32'])
def test_peak_of_a_streamed_run(dtype, tmp_path, tiny_tokenizer):
    "24 blocks of 6 or 12 MiB, in shards of 25 MB; the rule is 1.5 times (embeddings + two blocks + states), and small things."
    m = tiny_model('llama', num_hidden_layers=24, hidden_size=HIDDEN, intermediate_size=WIDTH, vocab_size=VOCABULARY,
                   num_attention_heads=8, num_key_value_heads=8, head_dim=64).to(getattr(torch, dtype))
    block = sum(p.nbytes for p in m.model.layers[0].parameters())
    bound = 1.5*(m.model.embed_tokens.weight.nbytes + 2*block + TOKENS*HIDDEN*m.dtype.itemsize)/2**20
    m.save_pretrained(tmp_path/'dense', max_shard_size='25MB')
    tiny_tokenizer.save_pretrained(tmp_path/'dense')
    del m
    peak = printed(STREAMED, 'prune', tmp_path/'dense', '--stream', '--method', 'fasp', '--out', tmp_path/'small', '--text', 'random',
                   '--n', 8, '--seqlen', 64, '--dtype', dtype, '--device', 'cpu')
    beyond = peak - printed(LOADED)
    assert beyond < bound, f'{beyond:.0f} MiB, where {bound:.0f} are allowed'


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

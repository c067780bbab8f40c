"""Hidden states beyond a bound lie in a file and change nothing; equal call arguments are held once; memory stays."""

import subprocess
import sys
from pathlib import Path

import families
import pytest
import torch

from moe_atlas.checkpoints import Checkpoint
from moe_atlas.errors import AtlasError
from moe_atlas.probe import extract
from moe_atlas.spill import Interned, Spill


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tensors_come_back_as_they_were_put(tmp_path, dtype):
    spill = Spill(tmp_path / "made", in_memory=1000)
    tensors = [torch.randn(3, 1 + number, 8).to(dtype).transpose(0, 1) for number in range(12)]
    for _ in range(2):
        for number, tensor in enumerate(tensors):
            spill.put(number, tensor)
        assert spill.kept and spill.places and sum(tensor.nbytes for tensor in spill.kept.values()) <= 1000
        for number, tensor in enumerate(tensors):
            assert torch.equal(spill.get(number), tensor)
        tensors = [tensor + 1 for tensor in tensors]
    end = spill._end
    spill.put(11, tensors[11].double())  # a larger one of the same number
    assert torch.equal(spill.get(11), tensors[11].double()) and spill._end > end
    assert list((tmp_path / "made").iterdir()) == []  # the file has no name


def test_a_file_that_cannot_be_made_is_a_sentence(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(AtlasError, match="hidden states of 64 bytes cannot be kept there"):
        Spill(tmp_path / "file", in_memory=0).put(0, torch.zeros(16))


def test_a_run_that_spills_gives_the_same(tmp_path, monkeypatch):
    families.save("mixtral", tmp_path / "moe")
    families.save("mistral", tmp_path / "dense")
    sequences = families.token_ids([11, 5, 11, 8, 30])
    paths = {"reference": Checkpoint(tmp_path / "dense"), "batch_tokens": 16}
    whole = extract(Checkpoint(tmp_path / "moe"), sequences, keep_tokens=True, **paths)
    monkeypatch.setattr("moe_atlas.stream.MEMORY_BYTES", {"cpu": 0, "cuda": 0})
    put = []
    monkeypatch.setattr(
        Spill, "_transfer", lambda self, *args, _own=Spill._transfer: put.append(1) or _own(self, *args)
    )
    spilled = extract(Checkpoint(tmp_path / "moe"), sequences, keep_tokens=True, spill_directory=tmp_path, **paths)
    assert put and whole[0] == spilled[0]
    assert all(torch.equal(tensor, spilled[1][name]) for name, tensor in whole[1].items())


def test_equal_tensors_are_held_once_and_unequal_ones_stay():
    interned = Interned()
    first = interned(((torch.arange(4), None), {"mask": torch.ones(2, 2), "other": [torch.zeros(3)]}))
    again = interned(((torch.arange(4), 5), {"mask": torch.ones(2, 2), "other": [torch.ones(3)]}))
    assert again[0][0] is first[0][0] and again[1]["mask"] is first[1]["mask"] and again[0][1] == 5
    assert again[1]["other"][0].tolist() == [1, 1, 1] and first[1]["other"][0].tolist() == [0, 0, 0]
    spread = torch.zeros(1, 3).expand(3, 3)
    assert interned(spread) is spread and interned(torch.zeros(3, 3)) is not spread  # it would keep another layout


PEAK = """
import random, re, sys, time
sys.path[:0] = ["scripts", "tests"]
from moe_atlas.checkpoints import Checkpoint
from moe_atlas.probe import extract

draw, left, sequences = random.Random(0), int(sys.argv[2]), []
while left:
    length = min(draw.randint(20, 250), left)
    sequences.append([draw.randrange(1536) for _ in range(length)])
    left -= length
start = time.perf_counter()
extract(Checkpoint(sys.argv[1]), sequences, keep_tokens=False, spill_directory=sys.argv[1])
status = open("/proc/self/status").read()
print(int(re.search(r"VmHWM:\\s+(\\d+)", status)[1]) // 1024, round(time.perf_counter() - start))
"""
DEMO_SHAPE = {
    "vocab_size": 1536, "hidden_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 32, "intermediate_size": 256, "num_local_experts": 8,
}  # fmt: skip


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak from Linux's /proc")
def test_peak_memory_does_not_grow_with_the_text(tmp_path):
    """A layer of demo-mixtral's shape on 3 thousand tokens and on 120 thousand: 60 MB go into it, and 60 come out.

    More layers take no more memory (test_stream.py), and with all four this takes minutes.
    """
    families.save("mixtral", tmp_path, **DEMO_SHAPE)
    peaks = {}
    for tokens in (3_000, 120_000):
        command = [sys.executable, "-c", PEAK, tmp_path, str(tokens)]
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True)
        peaks[tokens], seconds = map(int, done.stdout.split()[-2:])
        print(f"{tokens} tokens: peak {peaks[tokens]} MiB, {seconds} s")
    assert peaks[120_000] < 1.2 * peaks[3_000], peaks

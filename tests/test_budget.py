"""The promise of memory: kept, or refused before a layer is read."""

import json
import subprocess
import sys

import families
import pytest
import torch
from conftest import ROOT

from moe_atlas.budget import LATER, MIB, WORK, Budget, peak
from moe_atlas.checkpoints import Checkpoint
from moe_atlas.errors import AtlasError
from moe_atlas.stream import LayerStream

LAYERS = [100 * MIB, 300 * MIB, 200 * MIB]


def fixed(outside: int) -> int:
    return peak() + LATER + WORK + outside


@pytest.mark.parametrize("reserved", [0, 50 * MIB])
def test_two_layers_one_layer_or_a_sentence(reserved):
    room = fixed(10 * MIB) + reserved
    slack = 8 * MIB  # peak() may rise between two calls
    budgets = {size: Budget(room + size * MIB + slack, reserved) for size in (520, 480, 310, 280)}
    assert budgets[520].reads_ahead(LAYERS, 10 * MIB, "m")  # 300 and 200 are the largest neighbours
    assert not budgets[480].reads_ahead(LAYERS, 10 * MIB, "m")
    assert not budgets[310].reads_ahead(LAYERS, 10 * MIB, "m")
    with pytest.raises(AtlasError, match=r"m: a run of it holds .* MiB at least, 300 of them .*; raise mem_mb"):
        budgets[280].reads_ahead(LAYERS, 10 * MIB, "m")
    assert budgets[310].less(30 * MIB).reserved == reserved + 30 * MIB
    assert Budget().reads_ahead(LAYERS, 10 * MIB, "m")


def test_sizes_are_those_of_the_parameters(tmp_path):
    for family in ("mixtral", "deepseek", "jetmoe"):
        model = families.save(family, tmp_path / family)
        stream = LayerStream(Checkpoint(tmp_path / family))
        layers, outside = stream.sizes()
        for size, layer in zip(layers, model.get_decoder().layers, strict=True):
            held = sum(parameter.nbytes for parameter in layer.parameters())
            # Besides stacked experts, what is read apart is there twice for a moment.
            assert held <= size <= 2 * held
        assert outside == model.get_input_embeddings().weight.nbytes + sum(
            parameter.nbytes
            for name, parameter in model.named_parameters()
            if ".layers." not in name and parameter is not model.get_input_embeddings().weight
        )


def test_without_read_ahead_the_outcome_is_the_same(tmp_path):
    families.save("mixtral", tmp_path / "m")
    ids = torch.tensor(families.token_ids([9, 9]))
    outcomes = []
    for ahead in (True, False):
        stream = LayerStream(Checkpoint(tmp_path / "m"))
        stream._reads_ahead = ahead
        stream.begin([ids])
        for index in range(len(stream)):
            with stream.layer(index):
                assert (stream._ahead is not None) == (ahead and index + 1 < len(stream))
                stream.step(0)
        outcomes.append(stream.logits(0))
        assert stream.checkpoint.bytes_read == sum(
            info.stop - info.start for info in stream.checkpoint.tensors.values()
        )
    assert torch.equal(*outcomes)


def test_the_program_keeps_to_its_memory_or_says_so(tmp_path):
    """With too little memory the program ends before it reads; with enough its peak is below what it was given."""
    sizes = {"num_hidden_layers": 4, "hidden_size": 256, "intermediate_size": 4096, "num_local_experts": 8}
    families.save("mixtral", tmp_path / "m", **sizes)
    code = """
import json, resource, sys
from moe_atlas import probe
from moe_atlas.budget import MIB, Budget
from moe_atlas.checkpoints import Checkpoint
from moe_atlas.log import run
def main():
    checkpoint = Checkpoint(sys.argv[1])
    probe.extract(checkpoint, [list(range(1, 60))] * 20, keep_tokens=False, budget=Budget(int(sys.argv[2]) * MIB))
    print(json.dumps(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024))
run(main)
"""

    def run(memory: int) -> subprocess.CompletedProcess:
        command = [sys.executable, "-c", code, tmp_path / "m", str(memory)]
        return subprocess.run(command, cwd=ROOT / "scripts", capture_output=True, text=True)

    refused = run(400)
    assert refused.returncode == 1 and "MiB at least" in refused.stderr and "Traceback" not in refused.stderr
    least = int(refused.stderr.split("holds ")[1].split(" MiB")[0].replace(",", ""))
    kept = run(least + 20)
    assert kept.returncode == 0, kept.stderr
    assert json.loads(kept.stdout.splitlines()[-1]) <= least + 20

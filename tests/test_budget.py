"""The promise of memory: kept, or refused before a layer is read."""

import itertools
import json
import subprocess
import sys

import families
import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file, save_file

from moe_atlas.budget import LATER, MIB, WORK, Budget, Held, Sizes, peak
from moe_atlas.checkpoints import Checkpoint
from moe_atlas.errors import AtlasError
from moe_atlas.layer_weights import LayerReader, Stack
from moe_atlas.probe import extract_texts
from moe_atlas.record import Text
from moe_atlas.stream import LayerStream

SIZES = Sizes(500 * MIB, [100 * MIB, 300 * MIB, 200 * MIB], [60 * MIB, 50 * MIB, 10 * MIB], 10 * MIB)


def fixed(outside: int) -> int:
    return peak() + LATER + WORK + outside


@pytest.mark.parametrize("reserved", [0, 50 * MIB])
def test_two_layers_one_layer_two_experts_or_a_sentence(reserved):
    room = fixed(10 * MIB) + reserved
    slack = 8 * MIB  # peak() may rise between two calls
    budgets = {size: Budget(room + size * MIB + slack, reserved) for size in (520, 480, 310, 280, 40)}
    held = {size: budget.holds(SIZES, "m") for size, budget in budgets.items() if size > 200}
    assert held == {520: Held.LAYERS, 480: Held.LAYER, 310: Held.LAYER, 280: Held.EXPERTS}
    with pytest.raises(AtlasError, match=r"m: a run of it holds .* MiB at least, 60 of them .*; raise mem_mb"):
        budgets[40].holds(SIZES, "m")
    assert budgets[310].less(30 * MIB).reserved == reserved + 30 * MIB


def test_sizes_are_those_of_the_parameters(tmp_path):
    for family in ("mixtral", "deepseek", "jetmoe"):
        model = families.save(family, tmp_path / family)
        sizes = LayerStream(Checkpoint(tmp_path / family), whole=False).sizes()
        smaller = {few < whole for few, whole in zip(sizes.by_expert, sizes.layers, strict=True)}
        assert smaller == {"mixtral": {True}, "deepseek": {False, True}, "jetmoe": {False}}[family]
        pairs = [first + second for first, second in itertools.pairwise(sizes.layers)]
        whole = LayerStream(Checkpoint(tmp_path / family)).sizes()
        assert whole.ahead == max(pairs) and whole.by_expert == whole.layers == sizes.layers
        # Stacks of two layers are in memory once; before them deepseek has a dense layer.
        assert max(sizes.layers) < sizes.ahead <= max(pairs) and (family == "jetmoe") == (sizes.ahead == max(pairs))
        for size, layer in zip(sizes.layers, model.get_decoder().layers, strict=True):
            held = sum(parameter.nbytes for parameter in layer.parameters())
            # Besides stacked experts, what is read apart is there twice for a moment.
            assert held <= size <= 2 * held
        assert sizes.outside == model.get_input_embeddings().weight.nbytes + sum(
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
        stream.held = Held.LAYERS if ahead else Held.LAYER
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
import json, sys
from moe_atlas import probe
from moe_atlas.budget import MIB, Budget, peak
from moe_atlas.checkpoints import Checkpoint
from moe_atlas.log import run
def main():
    checkpoint = Checkpoint(sys.argv[1])
    probe.extract(checkpoint, [list(range(1, 60))] * 20, keep_tokens=False, budget=Budget(int(sys.argv[2]) * MIB))
    print(json.dumps(peak() // MIB))
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


@pytest.mark.parametrize("family", ["mixtral", "deepseek", "grok"])
def test_one_expert_at_a_time_gives_the_same_statistics(tmp_path, family, monkeypatch):
    """Two chunks of tokens, so that experts are read, given back and read again."""
    families.save(family, tmp_path)
    texts = [Text(families.token_ids([7, 12, 3]), keep_tokens=True)]
    (whole,) = extract_texts(Checkpoint(tmp_path), texts)
    checkpoint = Checkpoint(tmp_path)
    monkeypatch.setattr(Budget, "holds", lambda *_asked: Held.EXPERTS)
    (one,) = extract_texts(checkpoint, texts, budget=Budget(1))
    assert whole.sites == one.sites
    for name, tensor in whole.tensors.items():
        torch.testing.assert_close(one.tensors[name], tensor, atol=2e-5, rtol=1e-5, msg=name)
    once = checkpoint.bytes_read
    monkeypatch.setattr("moe_atlas.architectures.sites.CHUNK_TOKENS", 11)
    (two,) = extract_texts(checkpoint, texts, budget=Budget(1))
    assert checkpoint.bytes_read - once > 1.5 * once  # the experts twice, and the rest once
    torch.testing.assert_close(two.tensors["layer_1.ffn.logits"], whole.tensors["layer_1.ffn.logits"])


def test_a_model_of_one_layer_is_held_to_its_memory_too(tmp_path):
    families.save("mixtral", tmp_path, num_hidden_layers=1)
    sizes = LayerStream(Checkpoint(tmp_path), whole=False).sizes()
    assert sizes.ahead == sizes.layers[0] > sizes.by_expert[0]


def test_pages_of_an_expert_are_given_back():
    stack = Stack(torch.Size([3, 1 << 20]), torch.float32)
    stack.tensor.fill_(1.0)
    stack.drop(1)
    assert [float(expert.mean()) for expert in stack.tensor] == [1.0, 0.0, 1.0]


def test_two_experts_are_held_and_none_in_the_end(tmp_path):
    """Matrices of whole pages, so that none of an expert's is kept for its neighbour."""
    families.save("mixtral", tmp_path, hidden_size=64, intermediate_size=1024, num_local_experts=6)
    stream = LayerStream(Checkpoint(tmp_path), whole=False)
    reader = LayerReader(stream.checkpoint, stream._names, stream._fused, one_by_one=True)
    for layer in (0, 1):  # the second in the memory of the first
        reading = reader.start(layer)
        stacks = [stack.tensor for stack in reading.stacks.values()]
        assert len(stacks) == 2
        for expert in range(6):
            reading.wait(slice(expert, expert + 1))
            filled = [{number for number in range(6) if bool(stack[number].any())} for stack in stacks]
            assert all(expert in found and found <= {expert, expert + 1} for found in filled)
        reader.finish(reading)
        assert not any(bool(stack.any()) for stack in stacks)


@pytest.mark.parametrize("family", ["mixtral", "deepseek", "grok"])
def test_reading_into_the_place_of_the_layer_at_work_changes_no_byte(tmp_path, family, monkeypatch):
    """Two texts, several batches and chunks: an expert that went too early would be another layer's."""
    families.save(family, tmp_path)
    monkeypatch.setattr("moe_atlas.architectures.sites.CHUNK_TOKENS", 5)
    texts = [
        Text(families.token_ids([7, 12, 3]), keep_tokens=True),
        Text(families.token_ids([9, 9]), keep_tokens=False),
    ]
    late, whole = (extract_texts(Checkpoint(tmp_path), texts, whole=whole, batch_tokens=12) for whole in (False, True))
    for one, other in zip(late, whole, strict=True):
        assert one.tensors.keys() == other.tensors.keys()
        assert all(torch.equal(tensor, other.tensors[name]) for name, tensor in one.tensors.items())


def test_an_expert_that_is_not_finite_ends_the_run_that_reads_it_late(tmp_path):
    families.save("mixtral", tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if ".experts.3." in name)
    tensors[name][0, 0] = float("nan")
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(AtlasError, match=rf"{name} holds NaN"):
        extract_texts(Checkpoint(tmp_path), [Text(families.token_ids([5]), keep_tokens=True)])

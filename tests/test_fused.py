"""Experts are read where they belong: the same numbers as transformers stacks, in one copy."""

import families
import pytest
import torch

from moe_atlas.architectures import internals
from moe_atlas.checkpoints import Checkpoint
from moe_atlas.errors import AtlasError
from moe_atlas.stream import LayerStream


@pytest.mark.parametrize("family", ["mixtral", "olmoe", "deepseek", "grok"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_is_the_one_that_was_saved(tmp_path, family, dtype):
    saved = families.save(family, tmp_path / "m", dtype=dtype)
    stream = LayerStream(Checkpoint(tmp_path / "m"))
    assert stream._fused
    for index, wanted in enumerate(saved.get_decoder().layers):
        with stream.layer(index) as layer:
            found = dict(layer.named_parameters())
            for name, parameter in wanted.named_parameters():
                assert torch.equal(found[name], parameter), (index, name)
    parts = [name for fused in stream._fused.values() for name in fused.parts]
    experts = [name for name in stream.checkpoint.names if "experts." in name and "shared" not in name]
    assert sorted(parts) == sorted(experts)


def test_experts_are_in_memory_once(tmp_path):
    """What is handed to transformers is the memory that the model has in the end."""
    families.save("mixtral", tmp_path / "m")
    stream = LayerStream(Checkpoint(tmp_path / "m"))
    tensors = stream._reader.start(0).tensors()
    places = {tensor.data_ptr() for tensor in tensors.values()}
    stream._load(tensors, [stream.layers[0]])
    experts = {name: p for name, p in stream.layers[0].named_parameters() if ".experts." in name}
    assert len(experts) == 2 and all(parameter.data_ptr() in places for parameter in experts.values())


def test_another_precision_is_converted_on_the_way(tmp_path):
    saved = families.save("mixtral", tmp_path / "m", dtype=torch.bfloat16)
    stream = LayerStream(Checkpoint(tmp_path / "m"), "float32")
    with stream.layer(1) as layer:
        for name, parameter in saved.get_decoder().layers[1].named_parameters():
            assert torch.equal(dict(layer.named_parameters())[name], parameter.float())


def test_an_expert_of_another_shape_is_named(tmp_path):
    families.save("mixtral", tmp_path / "m")
    checkpoint = Checkpoint(tmp_path / "m")
    name = next(name for name in checkpoint.names if name.endswith("experts.0.w1.weight"))
    into = {name: torch.empty(3, 5)}
    with pytest.raises(AtlasError, match=rf"{name} has the shape .*, and by config.json \[3, 5\]; fetch both again"):
        checkpoint.read_all([name], into)


def test_only_plain_stacks_are_taken(tmp_path):
    """A count of experts that the checkpoint does not have, and other conversions, are left to transformers."""
    families.save("mixtral", tmp_path / "m")
    stream = LayerStream(Checkpoint(tmp_path / "m"))
    targets = internals.targets(stream.model, stream._mapping, stream.checkpoint.names)
    targets = {name: found for name, found in targets.items() if "experts.5." not in name}
    few = internals.fused_targets(stream.model, stream._mapping, targets)
    assert not few
    assert not LayerStream(Checkpoint(saved_jetmoe(tmp_path)))._fused


def saved_jetmoe(tmp_path):
    families.save("jetmoe", tmp_path / "jetmoe")
    return tmp_path / "jetmoe"

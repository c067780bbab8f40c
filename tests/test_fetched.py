"""Shards that come and go: what is read is right, and never more lie on disk than may."""

import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from moe_atlas.checkpoints.fetched import FetchedCheckpoint
from moe_atlas.errors import AtlasError


class Folder:
    """A ShardSource that copies shards from one folder to another and counts them."""

    def __init__(self, store: Path, disk: Path):
        self.store, self.disk, self.most = store, disk, 0
        disk.mkdir(exist_ok=True)

    def fetch(self, shard: str) -> Path:
        shutil.copy(self.store / shard, self.disk / shard)
        self.most = max(self.most, len(self.on_disk()))
        return self.disk / shard

    def delete(self, shard: str) -> None:
        (self.disk / shard).unlink()

    def on_disk(self) -> list[str]:
        return sorted(path.name for path in self.disk.iterdir())


def stored(folder: Path, shard_of: dict[str, str], suffix: str = ".safetensors") -> dict[str, torch.Tensor]:
    """Write the shards; tensor number i holds the number i."""
    tensors = {name: torch.full((3,), float(number)) for number, name in enumerate(shard_of)}
    for shard in set(shard_of.values()):
        content = {name: tensor for name, tensor in tensors.items() if shard_of[name] == shard}
        if suffix == ".safetensors":
            save_file(content, folder / shard)
        else:
            torch.save(content, folder / shard)
    return tensors


def read_in_order(checkpoint: FetchedCheckpoint, groups: list[list[str]]) -> dict[str, torch.Tensor]:
    checkpoint.expect(groups)
    found = {}
    for group in groups:
        found |= checkpoint.read_all(group)
    return found


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_layers_in_the_order_of_the_files_fetch_each_shard_once_and_hold_one(tmp_path, suffix):
    """Ten layers of four tensors over shards of six: every second layer straddles two shards."""
    names = [f"layers.{layer}.{part}" for layer in range(10) for part in range(4)]
    shard_of = {name: f"model-{number // 6}{suffix}" for number, name in enumerate(names)}
    tensors = stored(tmp_path, shard_of, suffix)
    source = Folder(tmp_path, tmp_path / "disk")
    checkpoint = FetchedCheckpoint(tmp_path, shard_of, source)
    found = read_in_order(checkpoint, [names[4 * layer : 4 * layer + 4] for layer in range(10)])
    assert {name: tensor.tolist() for name, tensor in found.items()} == {n: t.tolist() for n, t in tensors.items()}
    assert checkpoint.fetched == [f"model-{number}{suffix}" for number in range(7)]
    assert source.most == checkpoint.most == 1
    assert source.on_disk() == []
    assert checkpoint.bytes_read == 40 * 12


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_whatever_the_order_the_limit_holds_and_the_tensors_are_right(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("shards")
    count, layers = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 6))
    limit = data.draw(st.integers(1, 3))
    names = [f"t{number}" for number in range(data.draw(st.integers(1, 24)))]
    shard_of = {name: f"s{data.draw(st.integers(0, count - 1))}.safetensors" for name in names}
    layer_of = {name: data.draw(st.integers(0, layers)) for name in names}  # the last one is outside the layers
    tensors = stored(folder, shard_of)
    source = Folder(folder, folder / "disk")
    left = data.draw(st.lists(st.sampled_from(sorted(set(shard_of.values()))), unique=True, max_size=limit))
    for shard in left:  # an earlier run was interrupted
        shutil.copy(folder / shard, folder / "disk" / shard)
    checkpoint = FetchedCheckpoint(folder, shard_of, source, limit)
    outside = [name for name in names if layer_of[name] == layers]
    checkpoint.expect([[name for name in names if layer_of[name] == layer] for layer in range(layers)])
    found = checkpoint.read_all(outside)
    for layer in range(layers):
        found |= checkpoint.read_all([name for name in names if layer_of[name] == layer])
    assert {name: tensor.tolist() for name, tensor in found.items()} == {n: t.tolist() for n, t in tensors.items()}
    assert source.most <= checkpoint.most <= limit
    checkpoint.close()
    assert source.on_disk() == []


def test_what_an_interrupted_run_left_is_used(tmp_path):
    shard_of = {"a": "s0.safetensors", "b": "s1.safetensors"}
    stored(tmp_path, shard_of)
    source = Folder(tmp_path, tmp_path / "disk")
    shutil.copy(tmp_path / "s1.safetensors", tmp_path / "disk")
    checkpoint = FetchedCheckpoint(tmp_path, shard_of, source)
    read_in_order(checkpoint, [["a"], ["b"]])
    assert checkpoint.fetched == ["s0.safetensors"]


def test_a_shard_without_the_tensor_that_the_index_names_is_an_error(tmp_path):
    stored(tmp_path, {"a": "s0.safetensors"})
    checkpoint = FetchedCheckpoint(tmp_path, {"b": "s0.safetensors"}, Folder(tmp_path, tmp_path / "disk"))
    with pytest.raises(AtlasError, match=r"s0\.safetensors: the tensor b is missing"):
        checkpoint.read("b")


def test_the_dtype_is_that_of_the_first_shard(tmp_path):
    save_file({"small": torch.ones(2), "large": torch.ones(9, dtype=torch.bfloat16)}, tmp_path / "s0.safetensors")
    shard_of = {"small": "s0.safetensors", "large": "s0.safetensors"}
    source = Folder(tmp_path, tmp_path / "disk")
    checkpoint = FetchedCheckpoint(tmp_path, shard_of, source)
    assert checkpoint.dtype == torch.bfloat16
    read_in_order(checkpoint, [["small", "large"]])
    assert checkpoint.fetched == ["s0.safetensors"]

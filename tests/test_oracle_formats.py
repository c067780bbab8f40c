"""The same weights in other files, shards, precisions and names: the same tables, and the published hidden states."""

import functools
import random
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from safetensors.torch import load_file, save_file

from moe_atlas.architectures.sites import find_sites
from moe_atlas.behavioral.tables import FROM_SUMS, FROM_TOKENS
from moe_atlas.checkpoints import Checkpoint
from moe_atlas.checkpoints.bin_file import BinFile
from moe_atlas.errors import AtlasError
from moe_atlas.files import read_json, write_json
from moe_atlas.manifest import describe
from moe_atlas.parametric.similarity import weight_similarity
from moe_atlas.probe import extract
from moe_atlas.stream import LayerStream

ORACLE = Path(__file__).resolve().parent / "data/oracle"
INPUTS = read_json(ORACLE / "inputs.json")
MODELS = ("mixtral", "deepseek", "grok")
IDS = [INPUTS["short"]["ids"], INPUTS["routing"]["ids"]]
TOKENS = pl.DataFrame(
    [(sequence, position) for sequence, ids in enumerate(IDS) for position in range(len(ids))],
    ["sequence", "position"],
    orient="row",
)


def original(model: str) -> Path:
    return ORACLE / "checkpoints" / model


@functools.cache
def weights(model: str) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint by name, in the order of the names, read without the library."""
    tensors = {}
    for path in original(model).glob("*.safetensors"):
        tensors |= load_file(path)
    for path in original(model).glob("*.bin"):
        tensors |= torch.load(path, weights_only=True)
    return dict(sorted(tensors.items()))


def save(directory: Path, config: dict, tensors: dict[str, torch.Tensor], suffix: str, shards: int) -> Path:
    """Write a checkpoint; more than one shard get the tensors dealt out, so that every layer is in all of them."""
    directory.mkdir()
    write_json(directory / "config.json", config)
    stem = {"safetensors": "model", "bin": "pytorch_model"}[suffix]
    names = list(tensors)
    random.Random(0).shuffle(names)
    files = {f"{stem}-{i + 1:05}-of-{shards:05}.{suffix}": names[i::shards] for i in range(shards)}
    if shards == 1:
        files = {f"{stem}.{suffix}": names}
    else:
        shard_of = {name: file for file, held in files.items() for name in held}
        write_json(directory / f"{stem}.{suffix}.index.json", {"metadata": {}, "weight_map": shard_of})
    for file, held in files.items():
        part = {name: tensors[name] for name in held}
        if suffix == "bin":
            torch.save(part, directory / file)
        else:
            save_file({name: tensor.clone() for name, tensor in part.items()}, directory / file)
    return directory


def statistics(directory: Path) -> dict[str, pl.DataFrame]:
    """The tables of one checkpoint, run in float32, and the logits, as the workflow's programs make them."""
    checkpoint = Checkpoint(directory)
    sites, tensors = extract(checkpoint, IDS, keep_tokens=True, dtype="float32")
    tables = {}
    for entry in sites:
        prefix, labels = f"layer_{entry['layer']}.{entry['site']}.", entry["labels"]
        arrays = {name.removeprefix(prefix): t.numpy() for name, t in tensors.items() if name.startswith(prefix)}
        tables |= {(name, prefix): function(arrays, labels) for name, function in FROM_SUMS.items()}
        tables |= {(name, prefix): function(arrays, labels, TOKENS) for name, function in FROM_TOKENS.items()}
    stream = LayerStream(checkpoint)
    for index in describe("m", "", "", directory, False)["moe_layers"]:
        with stream.layer(index) as layer:
            (site,) = find_sites(layer)
            tables["similarity", index] = weight_similarity(site.bank(), model="m", layer=index)
    return tables | {("logits", ""): pl.DataFrame(run(LayerStream(checkpoint, "float32"))[1].numpy())}


def run(stream: LayerStream) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Hidden states (T, d) after every layer and logits (T, vocabulary) of the short prompt."""
    stream.begin([torch.tensor(IDS[:1])])
    states = []
    for index in range(len(stream)):
        with stream.layer(index):
            states.append(stream.step(0)[0])
    return states, stream.logits(0)[0]


@functools.cache
def original_statistics(model: str) -> dict[str, pl.DataFrame]:
    return statistics(original(model))


def assert_same(ours: dict[str, pl.DataFrame], expected: dict[str, pl.DataFrame]) -> None:
    assert ours.keys() == expected.keys()
    for name, frame in expected.items():
        assert len(frame) and ours[name].equals(frame), name


@pytest.mark.parametrize("model", MODELS)
def test_hidden_states_after_every_layer_are_the_published_ones(model):
    published = np.load(ORACLE / f"expected/{model}/hidden_states.npz")["layer_output"]
    states, _ = run(LayerStream(Checkpoint(original(model)), "float32"))
    np.testing.assert_allclose(torch.stack(states).numpy(), published, atol=2e-4, rtol=0)


@pytest.mark.parametrize(("suffix", "shards"), [("safetensors", 1), ("safetensors", 5), ("bin", 1), ("bin", 5)])
@pytest.mark.parametrize("model", MODELS)
def test_other_shards_give_the_same_tables(tmp_path, model, suffix, shards):
    config = read_json(original(model) / "config.json")
    directory = save(tmp_path / "copy", config, weights(model), suffix, shards)
    assert_same(statistics(directory), original_statistics(model))


@pytest.mark.parametrize("how", ["format of torch before 1.6", "transposed in memory"])
def test_bin_files_of_other_hands_give_the_same_tables(tmp_path, how):
    directory = save(tmp_path / "copy", read_json(original("grok") / "config.json"), weights("grok"), "bin", 1)
    if how == "transposed in memory":
        turned = {name: t.T.contiguous().T if t.dim() == 2 else t for name, t in weights("grok").items()}
        torch.save(turned, directory / "pytorch_model.bin")
    else:
        torch.save(weights("grok"), directory / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    assert_same(statistics(directory), original_statistics("grok"))


def test_a_bin_file_without_names_is_refused(tmp_path):
    path = tmp_path / "pytorch_model.bin"
    torch.save(list(weights("grok").values()), path)
    with pytest.raises(AtlasError, match=r"pytorch_model\.bin: the file holds no tensors by name"):
        BinFile(path)


@pytest.mark.parametrize("model_type", [None, "grok-1"])
@pytest.mark.parametrize("stored_head", [False, True])
def test_grok_in_safetensors_gives_the_same_tables(tmp_path, model_type, stored_head):
    config = read_json(original("grok") / "config.json") | ({"model_type": model_type} if model_type else {})
    tensors = {name: tensor for name, tensor in weights("grok").items() if stored_head or name != "lm_head.weight"}
    directory = save(tmp_path / "copy", config, tensors, "safetensors", 3)
    assert_same(statistics(directory), original_statistics("grok"))


@pytest.mark.parametrize("shards", [1, 4])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("model", MODELS)
def test_half_precision_files_give_the_tables_of_their_values(tmp_path, model, dtype, shards):
    config = read_json(original(model) / "config.json")
    half = {name: tensor.to(dtype) for name, tensor in weights(model).items()}
    wide = save(tmp_path / "wide", config, {name: tensor.float() for name, tensor in half.items()}, "safetensors", 1)
    config |= {"torch_dtype": str(dtype).removeprefix("torch.")}
    narrow = save(tmp_path / "narrow", config, half, "safetensors", shards)
    assert_same(statistics(narrow), statistics(wide))
    assert LayerStream(Checkpoint(narrow)).model.dtype == dtype

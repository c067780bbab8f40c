"""A killed extraction goes on from its saved state, gives the same bytes, and repeats at most one layer."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import families
import model_types
import polars as pl
import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file, save_file

from moe_atlas.checkpoints import Checkpoint
from moe_atlas.errors import AtlasError
from moe_atlas.files import write_json
from moe_atlas.manifest import describe
from moe_atlas.probe import extract
from moe_atlas.resume import SavedState, checkpoint_version
from moe_atlas.stream import LayerStream

SEQUENCES = families.token_ids([11, 5, 11, 8])
LAYERS = 3


class Stopped(Exception):
    """In the place of what kills a run."""


def stop_at(layer: int):
    """An observer that stops the run when it has gone through a layer."""

    def on_layer(index: int, *_layers: object) -> None:
        if index == layer:
            raise Stopped

    return on_layer


def interrupted(directory: Path, state: Path, layer: int, run: dict | None = None, **options: object) -> list[int]:
    """Extract, stop in `layer`, and extract again: the layers that the second run went through, and what it gave."""
    run, seen = run or {"checkpoint": "one"}, []
    with pytest.raises(Stopped):
        extract(Checkpoint(directory), SEQUENCES, on_layer=stop_at(layer), state=SavedState(state, run), **options)
    state = SavedState(state, run)
    found = extract(
        Checkpoint(directory), SEQUENCES, on_layer=lambda index, *_: seen.append(index), state=state, **options
    )
    return seen, *found


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """A model of three layers and a dense reference of two."""
    root = tmp_path_factory.mktemp("checkpoints")
    families.save("mixtral", root / "moe")
    families.save("mistral", root / "dense", num_hidden_layers=2)
    return root


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("layer", range(LAYERS))
def test_a_stopped_run_goes_on_after_its_last_whole_layer(checkpoints, tmp_path, layer, dtype):
    reference = Checkpoint(checkpoints / "dense")
    options = {"keep_tokens": True, "reference": reference, "batch_tokens": 16, "dtype": dtype}
    sites, tensors = extract(Checkpoint(checkpoints / "moe"), SEQUENCES, **options)
    seen, found_sites, found = interrupted(checkpoints / "moe", tmp_path / "state", layer, **options)
    assert seen == list(range(layer, LAYERS)) and found_sites == sites
    assert_equal(found, tensors)


VARIANTS = {
    **{name: (name, {}) for name in model_types.MOE},
    "keys shared by layers": (
        "gemma4_text",
        {"num_hidden_layers": 4, "num_kv_shared_layers": 2, "layer_types": ["sliding_attention", "full_attention"] * 2},
    ),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_model_type_goes_on_where_it_stopped(tmp_path, variant):
    """What its layers hand on is hidden states and nothing else, or else the state has that, too."""
    name, changes = VARIANTS[variant]
    layers = len(LayerStream(checkpoint := _saved(name, tmp_path / "model", changes)))
    sites, tensors = extract(checkpoint, SEQUENCES, keep_tokens=False)
    seen, found_sites, found = interrupted(tmp_path / "model", tmp_path / "state", layers - 1, keep_tokens=False)
    assert seen == [layers - 1] and found_sites == sites
    assert_equal(found, tensors)


def _saved(name: str, directory: Path, changes: dict) -> Checkpoint:
    model_types.save(name, directory, **changes)
    return Checkpoint(directory)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_kept_comes_back_bit_for_bit(tmp_path, dtype):
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(1 << 15), 1 << 15, (3, 7, 10), generator=generator, dtype=torch.int16)
    hidden = bits.view(dtype).transpose(0, 1)  # NaN, infinity and denormals among them
    SavedState(tmp_path, {}).keep(0, {"sums": torch.arange(3)}, ["of a layer"], [("model_0", {"hidden": hidden})])
    state = SavedState(tmp_path, {})
    assert state.open({}) == 1
    ((record, description),) = state.records()
    assert record["sums"].tolist() == [0, 1, 2] and description == ["of a layer"]
    back = state.hidden("model_0")["hidden"]
    as_bits = [tensor.contiguous().view(torch.int16) for tensor in (back, hidden)]
    assert back.dtype == dtype and torch.equal(*as_bits)


def test_hidden_states_of_two_layers_lie_there_at_most(tmp_path):
    def parts():
        for number in range(2):
            most.append(len(list(tmp_path.glob("layer_*.hidden"))))
            yield f"model_{number}", {"hidden": torch.zeros(2)}

    state, most = SavedState(tmp_path, {}), []
    for layer in range(4):
        state.keep(layer, {}, [], parts())
        assert [path.name for path in tmp_path.glob("layer_*.hidden")] == [f"layer_{layer}.hidden"]
    assert max(most) == 2 and len(list(state.records())) == 4


def kept_state(directory: Path, run: dict) -> SavedState:
    """A state after two layers."""
    state = SavedState(directory, run)
    for layer in range(2):
        state.keep(layer, {"sums": torch.ones(9)}, [], [("model_0", {"hidden": torch.ones(9)})])
    return state


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


DAMAGE = {"flip": flip, "cut": lambda path: os.truncate(path, path.stat().st_size - 1), "delete": Path.unlink}
FILES = ("layer_0.record.safetensors", "layer_1.record.safetensors", "layer_1.hidden/model_0.safetensors")


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_state_is_not_used(tmp_path, capsys, name, damage):
    kept_state(tmp_path / "state", {})
    DAMAGE[damage](tmp_path / "state" / name)
    state = SavedState(tmp_path / "state", {})
    assert state.open({}) == 0 and list(state.records()) == []
    assert f"{name} is missing or damaged; what was kept there is deleted" in capsys.readouterr().err
    assert not (tmp_path / "state").exists()


@pytest.mark.parametrize("text", ["", "{", "[]", "7", "{}", '{"layers": "2", "run": {}, "files": {}}', '{"run": []}'])
def test_a_damaged_list_of_files_is_not_used(tmp_path, capsys, text):
    kept_state(tmp_path, {})
    (tmp_path / "done.json").write_text(text)
    assert SavedState(tmp_path, {}).open({}) == 0
    assert "done.json is damaged; what was kept there is deleted" in capsys.readouterr().err


OTHERS = {
    "dtype": {"dtype": "bfloat16"},
    "batch size": {"batch_tokens": 12},
    "checkpoint": {"run": {"checkpoint": "two"}},
    "dense reference": {"run": {"checkpoint": "one", "dense reference": "none"}},
    "text": {"keep_tokens": True},
}


@pytest.mark.parametrize("other", OTHERS)
def test_a_state_of_another_run_is_not_used(checkpoints, tmp_path, capsys, other):
    options = {"keep_tokens": False, "dtype": "float32", "batch_tokens": 16}
    checkpoint, run, seen = Checkpoint(checkpoints / "moe"), {"checkpoint": "one"}, []
    with pytest.raises(Stopped):
        extract(checkpoint, SEQUENCES, **options, on_layer=stop_at(1), state=SavedState(tmp_path / "state", run))
    options |= OTHERS[other]
    state = SavedState(tmp_path / "state", options.pop("run", run))
    _, expected = extract(checkpoint, SEQUENCES, **options)
    _, found = extract(checkpoint, SEQUENCES, **options, on_layer=lambda index, *_: seen.append(index), state=state)
    assert f"the state is of another {other}; what was kept there is deleted" in capsys.readouterr().err
    assert seen == [0, 1, 2]
    assert_equal(found, expected)


def test_other_weights_or_another_config_are_another_checkpoint(checkpoints, tmp_path):
    shutil.copytree(checkpoints / "moe", tmp_path / "moe")

    def version() -> str:
        return checkpoint_version(describe("m", "path:moe", "", tmp_path / "moe", dense_allowed=False))

    before, weights, config = version(), tmp_path / "moe/model.safetensors", tmp_path / "moe/config.json"
    assert version() == before
    tensors = load_file(weights)
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, weights, metadata={"format": "pt"})
    changed = version()
    config.write_text(config.read_text().replace('"rms_norm_eps": 1e-05', '"rms_norm_eps": 1e-03'))
    assert len({before, changed, version()}) == 3


def test_nothing_but_the_state_is_deleted(tmp_path):
    others = ("notes.txt", "layer_1.txt", "layer_1.hidden.txt", "mine/layer_1.hidden", "done.json.bak")
    for name in others:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    kept_state(tmp_path, {"checkpoint": 1})
    assert SavedState(tmp_path, {"checkpoint": 2}).open({}) == 0
    kept_state(tmp_path, {}).remove()
    assert sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()) == sorted(others)


def test_a_state_that_cannot_be_written_is_a_sentence(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(AtlasError, match="the state after layer 0 cannot be kept there"):
        SavedState(tmp_path / "file" / "state", {}).keep(0, {}, [], [])


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """The program, killed at every place there is, and what its next run did; and the checkpoint."""
    root = tmp_path_factory.mktemp("killed runs")
    tokenizer = ROOT / "tests/data/oracle/checkpoints/mixtral"
    vocabulary = json.loads((tokenizer / "config.json").read_text())["vocab_size"]
    arguments = ["--model", "tiny", "--corpus", "text", "--kind", "short", "--dtype", "bfloat16"]
    for name, layers, option in (("mixtral", LAYERS, "--checkpoint"), ("mistral", 2, "--dense-reference")):
        families.save(name, root / name, num_hidden_layers=layers, vocab_size=vocabulary)
        for file in tokenizer.glob("*token*"):
            shutil.copy(file, root / name)
        write_json(root / f"{name}.json", describe(name, f"path:{name}", "", root / name, dense_allowed=True))
        arguments += [option, root / f"{name}.json"]
    pl.DataFrame({"text": ["Some words.", "And a few more of them."]}).write_parquet(root / "text.parquet")
    arguments += ["--corpus-file", root / "text.parquet"]
    command = [sys.executable, ROOT / "tests/killed_runs.py", root / "out", *arguments]
    done = subprocess.run(list(map(str, command)), stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout), Checkpoint(root / "mixtral")


def test_a_run_killed_anywhere_ends_with_the_same_bytes(killed):
    found, _ = killed
    expected = found["undisturbed"]["outputs"]
    assert set(expected) == {"activations.safetensors", "intermediate.safetensors", "tokens.parquet"}
    places = [first["place"] for first, _ in found["killed"]]
    print(f"killed at {len(places)} places")
    # Before the state is made, at each kind of its files whole and half, between batches, and while it is deleted.
    for kind in ("step", "half of layer_0.record", "half of model_0", "os.rename .done", "os.remove", "shutil.rmtree"):
        assert any(place.startswith(kind) for place in places), kind
    for first, second in found["killed"]:
        assert second["outputs"] == expected and not second["state"], first["place"]
    for run in (found["kept"], found["often"][-1]):
        assert run["outputs"] == expected and not run["state"]
    assert len(found["often"]) > LAYERS


def test_a_run_killed_anywhere_repeats_at_most_one_layer_and_reads_no_finished_one(killed):
    found, checkpoint = killed

    def layer_of(name: str) -> int:
        parts = name.split(".")
        return int(parts[2]) if parts[1] == "layers" else -1

    sizes = {name: info.stop - info.start for name, info in checkpoint.tensors.items()}
    embeddings = sizes["model.embed_tokens.weight"]
    later = [sum(size for name, size in sizes.items() if layer_of(name) >= layer) for layer in range(LAYERS)]
    starts = set()
    # A run that deletes its state has written its outputs.
    ended = [first for first, _ in found["killed"] if first["outputs"] == found["undisturbed"]["outputs"]]
    assert ended and not [first for first in ended if first["place"].startswith(("step", "half", "os.rename"))]
    for first, second in found["killed"]:
        if first in ended:
            continue
        assert first["layers"] == list(range(len(first["layers"])))
        start = LAYERS - len(second["layers"])
        assert second["layers"] == list(range(start, LAYERS))
        assert start >= len(first["layers"]) - 1, first["place"]
        assert second["read"] == (embeddings + later[start] if start < LAYERS else 0), first["place"]
        starts.add(start)
    assert starts == {0, 1, 2, 3}

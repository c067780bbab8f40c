"""Checkpoint files: what is read is what is stored, and what is damaged is refused by name."""

import json
import pickle
from pathlib import Path

import families
import pytest
import torch
from safetensors.torch import save_file

from moe_atlas.checkpoints import Checkpoint
from moe_atlas.checkpoints.bin_file import BinFile
from moe_atlas.checkpoints.safetensors_file import SafetensorsFile
from moe_atlas.errors import AtlasError
from moe_atlas.files import read_json, sha256, write_json
from moe_atlas.manifest import describe, open_checkpoint

TENSORS = {
    "a": torch.arange(12, dtype=torch.float32).reshape(3, 4),
    "half": torch.tensor([1.5, -2.25], dtype=torch.bfloat16),
    "small": torch.tensor([0.5, 2.0]).to(torch.float8_e4m3fn),
    "ids": torch.tensor([[1], [-7]], dtype=torch.int64),
    "scalar": torch.tensor(3.0, dtype=torch.float64),
    "none": torch.empty(0, 5),
}


def weights(directory: Path) -> Path:
    """A directory with one safetensors file of TENSORS."""
    directory.mkdir(exist_ok=True)
    save_file(TENSORS, directory / "model.safetensors")
    return directory / "model.safetensors"


def test_tensors_are_read_as_stored(tmp_path):
    weights(tmp_path)
    checkpoint = Checkpoint(tmp_path)
    assert set(checkpoint.tensors) == set(TENSORS)
    for name, tensor in TENSORS.items():
        read = checkpoint.read(name)
        assert read.dtype == tensor.dtype and read.shape == tensor.shape
        assert torch.equal(read.double(), tensor.double())
    assert checkpoint.bytes_read == sum(tensor.numel() * tensor.dtype.itemsize for tensor in TENSORS.values())


def test_bin_shards_are_read_without_running_them(tmp_path):
    torch.save({"a": TENSORS["a"]}, tmp_path / "one.bin")
    torch.save({"half": TENSORS["half"]}, tmp_path / "two.bin")
    write_json(tmp_path / "pytorch_model.bin.index.json", {"weight_map": {"a": "one.bin", "half": "two.bin"}})
    checkpoint = Checkpoint(tmp_path)
    assert torch.equal(checkpoint.read("a"), TENSORS["a"])
    assert torch.equal(checkpoint.read("half"), TENSORS["half"])


class Malicious:
    """Unpickling it would leave a file."""

    def __init__(self, trace: Path):
        self.trace = trace

    def __reduce__(self):
        return Path.touch, (self.trace,)


@pytest.mark.parametrize("container", ["torch", "plain pickle"])
def test_a_bin_file_that_holds_code_is_refused_and_nothing_runs(tmp_path, container):
    path, trace = tmp_path / "pytorch_model.bin", tmp_path / "trace"
    if container == "torch":
        torch.save({"a": Malicious(trace)}, path)
    else:
        path.write_bytes(pickle.dumps({"a": Malicious(trace)}))
    with pytest.raises(AtlasError, match=r"pytorch_model\.bin: .*(refused|damaged)"):
        Checkpoint(tmp_path)
    assert not trace.exists()


def test_a_truncated_bin_file_is_named(tmp_path):
    torch.save({"a": torch.randn(100)}, tmp_path / "pytorch_model.bin")
    content = (tmp_path / "pytorch_model.bin").read_bytes()
    (tmp_path / "pytorch_model.bin").write_bytes(content[: len(content) // 2])
    with pytest.raises(AtlasError, match=r"pytorch_model\.bin: the file is damaged"):
        BinFile(tmp_path / "pytorch_model.bin")


def damage(path: Path, how: str) -> None:
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])

    def with_header(changed: dict) -> bytes:
        text = json.dumps(changed).encode()
        return len(text).to_bytes(8, "little") + text + content[8 + length :]

    match how:
        case "truncated":
            path.write_bytes(content[:-5])
        case "empty":
            path.write_bytes(b"")
        case "header length":
            path.write_bytes((1 << 40).to_bytes(8, "little") + content[8:])
        case "header text":
            path.write_bytes(content[:8] + b"\xff" * length + content[8 + length :])
        case "shape":
            path.write_bytes(with_header(header | {"a": header["a"] | {"shape": [3, 5]}}))
        case "dtype":
            path.write_bytes(with_header(header | {"a": header["a"] | {"dtype": "F31"}}))
        case "range":
            path.write_bytes(with_header(header | {"a": header["a"] | {"data_offsets": [-48, 0]}}))


@pytest.mark.parametrize(
    ("how", "sentence"),
    [
        ("truncated", "the file is truncated"),
        ("empty", "truncated or no safetensors file"),
        ("header length", "truncated or no safetensors file"),
        ("header text", "the safetensors header cannot be read"),
        ("shape", r"the bytes of a do not fit its shape \[3, 5\]"),
        ("dtype", "the header entry of a is not understood"),
        ("range", "the bytes of a do not fit"),
    ],
)
def test_a_damaged_safetensors_file_is_refused(tmp_path, how, sentence):
    path = weights(tmp_path)
    damage(path, how)
    with pytest.raises(AtlasError, match=rf"model\.safetensors: .*{sentence}.*again\.$"):
        SafetensorsFile(path)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_that_are_not_finite_are_named(tmp_path, value, dtype):
    tensor = torch.randn(50, 50).to(dtype)
    tensor[17, 3] = value
    save_file({"good": torch.ones(3), "bad.weight": tensor}, tmp_path / "model.safetensors")
    checkpoint = Checkpoint(tmp_path)
    checkpoint.read("good")
    with pytest.raises(AtlasError, match=r"model\.safetensors: the tensor bad\.weight holds NaN or infinite"):
        checkpoint.read("bad.weight")


def test_large_weights_are_not_taken_for_infinite_ones(tmp_path):
    """Their sum is more than float16 holds."""
    save_file({"large": torch.full((50, 50), 60_000.0, dtype=torch.float16)}, tmp_path / "model.safetensors")
    assert Checkpoint(tmp_path).read("large").isfinite().all()


def test_what_is_missing_is_named(tmp_path):
    with pytest.raises(AtlasError, match=r"nowhere: there is no such directory"):
        Checkpoint(tmp_path / "nowhere")
    with pytest.raises(AtlasError, match="there are no weights here"):
        Checkpoint(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    write_json(index, {"weight_map": {"a": "model-1.safetensors"}})
    with pytest.raises(AtlasError, match=r"model-1\.safetensors: this shard is named by .* but missing"):
        Checkpoint(tmp_path)
    save_file({"b": torch.ones(1)}, tmp_path / "model-1.safetensors")
    with pytest.raises(AtlasError, match=r"model-1\.safetensors: the tensor a is missing"):
        Checkpoint(tmp_path)


@pytest.fixture
def mixtral(tmp_path):
    families.save("mixtral", tmp_path, max_shard_size="40KB")
    return tmp_path


def describe_here(directory: Path, dense_allowed: bool = False) -> dict:
    return describe("m", f"path:{directory}", "", directory, dense_allowed)


def test_the_description_says_what_the_checkpoint_is(mixtral, tmp_path_factory):
    found = describe_here(mixtral)
    shape = {key: found[key] for key in ("architecture", "dtype", "L", "N", "k", "d", "m", "shared")}
    assert shape == {
        "architecture": "MixtralForCausalLM",
        "dtype": "float32",
        "L": 3,
        "N": 6,
        "k": 2,
        "d": 32,
        "m": 40,
        "shared": 0,
    }
    assert (found["dense_layers"], found["moe_layers"], found["attention_experts"]) == ([], [0, 1, 2], False)
    assert found["parameters"] == sum(p.numel() for p in families.model("mixtral").parameters())
    assert [entry["name"] for entry in found["files"]] == sorted(p.name for p in mixtral.glob("*.safetensors"))
    assert all(entry["sha256"] == sha256(mixtral / entry["name"]) for entry in found["files"])
    deepseek, jetmoe = tmp_path_factory.mktemp("deepseek"), tmp_path_factory.mktemp("jetmoe")
    families.save("deepseek", deepseek)
    found = describe_here(deepseek)
    assert (found["N"], found["k"], found["m"], found["shared"], found["dense_layers"]) == (7, 3, 24, 2, [0])
    families.save("jetmoe", jetmoe)
    found = describe_here(jetmoe)
    assert (found["N"], found["k"], found["m"], found["attention_experts"]) == (4, 2, 40, True)


def test_a_dense_model_is_taken_as_a_reference_only(tmp_path):
    families.save("mistral", tmp_path)
    with pytest.raises(AtlasError, match=r"config\.json: the mistral model m has no experts; name it as dense_ref"):
        describe_here(tmp_path)
    found = describe_here(tmp_path, dense_allowed=True)
    assert (found["N"], found["k"], found["m"], found["dense_layers"]) == (0, 0, 40, [0, 1, 2])


def change_config(directory: Path, **changes: object) -> None:
    """Set values of config.json; None removes the key."""
    values = read_json(directory / "config.json") | changes
    write_json(directory / "config.json", {key: value for key, value in values.items() if value is not None})


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"num_local_experts": None}, r"the number of experts is missing \(num_local_experts\)"),
        ({"num_local_experts": 0}, "the number of experts is 0"),
        ({"model_type": "switch-o-matic"}, "there is no model class for model type 'switch-o-matic'.*CONTRIBUTING"),
        ({"model_type": None, "architectures": ["Odd"]}, r"there is no model class for .*Odd.*CONTRIBUTING"),
        ({"model_type": "vit", "architectures": None}, r"no causal language model can be built.*'vit'.*CONTRIBUTING"),
    ],
)
def test_a_config_that_does_not_describe_an_moe_is_refused(mixtral, changes, sentence):
    change_config(mixtral, **changes)
    with pytest.raises(AtlasError, match=rf"config\.json: .*{sentence}"):
        describe_here(mixtral)


def test_remote_code_named_by_a_config_is_never_run(mixtral):
    (mixtral / "odd.py").write_text(f"open({str(mixtral / 'trace')!r}, 'w')\nclass Config: ...\nclass Model: ...\n")
    change_config(mixtral, auto_map={"AutoConfig": "odd.Config", "AutoModelForCausalLM": "odd.Model"})
    assert describe_here(mixtral)["architecture"] == "MixtralForCausalLM"
    assert not (mixtral / "trace").exists()


def test_weights_that_changed_since_they_were_described_are_refused(mixtral, tmp_path_factory):
    manifest = tmp_path_factory.mktemp("results") / "checkpoint.json"
    write_json(manifest, describe_here(mixtral))
    checkpoint, description = open_checkpoint(manifest)
    assert description["model"] == "m" and len(checkpoint.files) == len(description["files"])
    path = checkpoint.files[0]
    save_file({name: torch.ones(3) for name in SafetensorsFile(path).tensors}, path)
    with pytest.raises(AtlasError, match=r"the weight files are not those that .*checkpoint\.json describes"):
        open_checkpoint(manifest)

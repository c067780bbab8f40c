"""MXFP4 and block-wise FP8 checkpoints: plain numbers bit for bit, and the logits of a model with those numbers."""

import json
import math

import model_types
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from moe_atlas.architectures import quantised
from moe_atlas.checkpoints import Checkpoint
from moe_atlas.errors import AtlasError
from moe_atlas.manifest import describe
from moe_atlas.stream import LayerStream

IDS = torch.tensor(model_types.token_ids([11, 11]))
E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0]
MXFP4 = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}


def streamed(directory, dtype: str) -> torch.Tensor:
    stream = LayerStream(Checkpoint(directory), dtype)
    stream.begin([IDS])
    for index in range(len(stream)):
        with stream.layer(index):
            stream.step(0)
    return stream.logits(0)


def rewrite(directory, tensors: dict[str, torch.Tensor], quantisation: dict) -> None:
    """Put quantised tensors and the config's word for it in the place of a saved checkpoint's; no dtype is given."""
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((directory / "config.json").read_text())
    del config["dtype"]
    (directory / "config.json").write_text(json.dumps(config | {"quantization_config": quantisation}))


def to_mxfp4(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Blocks (N, o, g, 16) and scales (N, o, g) whose numbers are near a weight (N, i, o)."""
    rows = weight.float().transpose(1, 2).unflatten(-1, (-1, 32))
    exponents = rows.abs().amax(-1, keepdim=True).log2().floor() - 2
    codes = (rows / exponents.exp2()).unsqueeze(-1).sub(torch.tensor(E2M1)).abs().argmin(-1).to(torch.uint8)
    return codes[..., ::2] | codes[..., 1::2] << 4, (exponents.squeeze(-1) + 127).to(torch.uint8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_mxfp4_numbers_are_transformers_own_bit_for_bit(dtype):
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(0, 256, (3, 10, 4, 16), generator=generator, dtype=torch.uint8)
    scales = torch.randint(0, 255, (3, 10, 4), generator=generator, dtype=torch.uint8)
    ours = quantised.mxfp4(blocks, scales, dtype)
    expected = convert_moe_packed_tensors(blocks, scales, dtype=dtype)
    assert ours.dtype == dtype and ours.shape == (3, 128, 10)
    assert torch.equal(ours, expected)
    # The definition, for one number: the high half of byte 5 of a block.
    code, exponent = int(blocks[1, 7, 2, 5]) >> 4, int(scales[1, 7, 2]) - 127
    assert ours[1, 2 * 32 + 2 * 5 + 1, 7] == E2M1[code] * 2.0**exponent


@pytest.fixture
def gpt_oss(tmp_path):
    """A checkpoint in gpt-oss's own format, and the model with the numbers that it stands for."""
    network = model_types.model("gpt_oss", hidden_size=64, intermediate_size=32, dtype=torch.bfloat16)
    network.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        blocks, scales = to_mxfp4(tensors.pop(name))
        tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        plain = convert_moe_packed_tensors(blocks, scales, dtype=torch.bfloat16)
        network.get_parameter(name).data.copy_(plain)
    rewrite(tmp_path, tensors, MXFP4)
    return tmp_path, network


def test_an_mxfp4_checkpoint_gives_the_logits_of_its_plain_numbers(gpt_oss, tmp_path_factory):
    directory, network = gpt_oss
    plain = tmp_path_factory.mktemp("plain")
    network.save_pretrained(plain)
    for dtype in ("float32", "bfloat16"):
        loaded = AutoModelForCausalLM.from_pretrained(plain, dtype=dtype).eval()
        with torch.no_grad():
            torch.testing.assert_close(
                streamed(directory, dtype), loaded(IDS, use_cache=False).logits, atol=1e-5, rtol=0
            )


def test_an_mxfp4_checkpoint_is_described_by_what_it_runs_in(gpt_oss):
    directory, network = gpt_oss
    found = describe("m", f"path:{directory}", "", directory, dense_allowed=False)
    assert found["dtype"] == "bfloat16" and streamed(directory, "auto").dtype == torch.bfloat16
    assert found["bytes"] == (directory / "model.safetensors").stat().st_size
    assert found["parameters"] == sum(parameter.numel() for parameter in network.parameters())


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda tensors, name: tensors[f"{name}_scales"].fill_(255), "an MXFP4 scale is not a number"),
        (lambda tensors, name: tensors.pop(f"{name}_blocks"), "down_proj_scales has no .*down_proj_blocks"),
        (lambda tensors, name: tensors.pop(f"{name}_scales"), r"hold nothing for model\.layers\.1\.mlp.*down_proj"),
    ],
)
def test_broken_mxfp4_weights_are_named(gpt_oss, change, sentence):
    directory, _ = gpt_oss
    tensors = load_file(directory / "model.safetensors")
    change(tensors, "model.layers.1.mlp.experts.down_proj")
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    stream = LayerStream(Checkpoint(directory))
    with pytest.raises(AtlasError, match=sentence), stream.layer(1):
        pass


@pytest.mark.parametrize("block", [(16, 16), (12, 20)])
def test_an_fp8_checkpoint_gives_the_logits_of_its_plain_numbers(tmp_path, block):
    """Blocks that do not divide a matrix end with it."""
    network = model_types.save("deepseek_v3", tmp_path, dtype=torch.bfloat16)
    tensors = load_file(tmp_path / "model.safetensors")
    plain = dict(tensors)
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        weight = tensors[name].float()
        grid = [math.ceil(size / step) for size, step in zip(weight.shape, block, strict=True)]
        scales = torch.rand(grid, generator=torch.Generator().manual_seed(len(name))) / 100 + 0.001
        codes, numbers = torch.empty(weight.shape, dtype=torch.float8_e4m3fn), torch.empty_like(weight)
        for row in range(weight.shape[0]):
            for column in range(weight.shape[1]):
                scale = scales[row // block[0], column // block[1]]
                codes[row, column] = weight[row, column] / scale
                numbers[row, column] = codes[row, column].float() * scale
        tensors |= {name: codes, f"{name}_scale_inv": scales}
        plain[name] = numbers
    assert len(plain) < len(tensors)
    save_file(plain, tmp_path / "model.safetensors", metadata={"format": "pt"})
    network = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    rewrite(tmp_path, tensors, {"quant_method": "fp8", "weight_block_size": list(block)})
    with torch.no_grad():
        torch.testing.assert_close(
            streamed(tmp_path, "float32"), network(IDS, use_cache=False).logits, atol=1e-5, rtol=0
        )
    found = describe("m", f"path:{tmp_path}", "", tmp_path, dense_allowed=False)
    assert found["dtype"] == "bfloat16"


@pytest.mark.parametrize(
    ("quantisation", "name"),
    [
        ({"quant_method": "gptq", "bits": 4}, "gptq"),
        ({"quant_method": "fp8", "activation_scheme": "static"}, "fp8"),
        ({"bits": 8}, "unknown"),
    ],
)
def test_other_quantisations_are_refused_by_name(tmp_path, quantisation, name):
    model_types.save("mixtral", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": quantisation}))
    with pytest.raises(AtlasError, match=rf"config\.json: the weights are quantised by '{name}'.*plain weights"):
        LayerStream(Checkpoint(tmp_path))
    with pytest.raises(AtlasError, match=f"'{name}'"):
        describe("m", f"path:{tmp_path}", "", tmp_path, dense_allowed=False)

"""Quantised checkpoints: MXFP4 and block-wise FP8 weights to plain ones, tensor by tensor on the CPU.

MXFP4 (gpt-oss): `NAME_blocks` uint8 and `NAME_scales` uint8 stand for NAME. 32 neighbouring numbers of a row share a
scale; each is four bits (OCP Microscaling Formats 1.0, sections 5.3.3 and 5.4.1). FP8 (DeepSeek-V3): `NAME.weight`
float8 and `NAME.weight_scale_inv` float32, one scale for a block of rows and columns (arXiv 2412.19437, section 3.3.2).
"""

import torch
from transformers import PreTrainedConfig

# Magnitudes of E2M1: one bit of sign, two of exponent, one of mantissa.
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_SCALE_BIAS = 127  # E8M0 holds the exponent only
_SCALE_NAN = 255


def method(config: PreTrainedConfig) -> str | None:
    """How the weights are quantised, by the config's own name for it; None where they are plain."""
    found = getattr(config, "quantization_config", None)
    return found.get("quant_method", "unknown") if isinstance(found, dict) else None


def unreadable(config: PreTrainedConfig) -> str | None:
    """The quantisation of a checkpoint that `dequantise` cannot undo; None for all others."""
    name = method(config)
    if name is None or name == "mxfp4" or (name == "fp8" and _block_size(config)):
        return None
    return name


def _block_size(config: PreTrainedConfig) -> tuple[int, int] | None:
    """Rows and columns of an FP8 block."""
    found = getattr(config, "quantization_config", None)
    size = found.get("weight_block_size") if isinstance(found, dict) else None
    return tuple(size) if size else None


def dequantise(tensors: dict[str, torch.Tensor], config: PreTrainedConfig, dtype: torch.dtype) -> None:
    """Put plain tensors of `dtype` in the place of quantised ones, in `tensors` itself; others stay as they are.

    Raises ValueError for a scale that is not a number or has no weights.
    """
    for name in [name for name in tensors if name.endswith("_scales") and method(config) == "mxfp4"]:
        plain = name.removesuffix("_scales")
        tensors[plain] = mxfp4(_partner(tensors, f"{plain}_blocks", name), tensors.pop(name), dtype)
    for name in [name for name in tensors if name.endswith(".weight_scale_inv") and method(config) == "fp8"]:
        plain = name.removesuffix("_scale_inv")
        tensors[plain] = fp8(_partner(tensors, plain, name), tensors.pop(name), _block_size(config), dtype)


def _partner(tensors: dict[str, torch.Tensor], wanted: str, name: str) -> torch.Tensor:
    if wanted not in tensors:
        raise ValueError(f"{name} has no {wanted}")
    return tensors.pop(wanted)


def mxfp4(blocks: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Blocks (N, o, g, 16) and scales (N, o, g), both uint8, to experts' weights (N, 32 g, o).

    A byte holds two numbers, the low half first. The result is exact in bfloat16 and wider types.
    """
    if bool((scales == _SCALE_NAN).any()):
        raise ValueError("an MXFP4 scale is not a number")
    values = torch.tensor([*_E2M1, *(-value for value in _E2M1)])
    codes = torch.arange(256)
    pairs = torch.stack([values[codes & 15], values[codes >> 4]], dim=-1)
    experts, rows, groups, half = blocks.shape
    plain = torch.empty(experts, 2 * half * groups, rows, dtype=dtype)
    # One expert at a time: what is unpacked is eight times as large as the blocks.
    for expert in range(experts):
        numbers = pairs[blocks[expert].int()].flatten(-2)
        exponents = scales[expert].int() - _SCALE_BIAS
        plain[expert] = torch.ldexp(numbers, exponents[..., None]).flatten(1).T
    return plain


def fp8(weight: torch.Tensor, scales: torch.Tensor, block: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
    """Weight (o, i) float8 times the scale (o / rows, i / columns, rounded up) of its block: (o, i)."""
    spread = scales.float().repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
    return (weight.float() * spread[: weight.shape[0], : weight.shape[1]]).to(dtype)

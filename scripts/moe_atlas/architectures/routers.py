"""What a router has besides its weight, by the names that transformers' router modules give it."""

from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True)
class Choice:
    """What a router uses besides its logits to choose experts and to weigh them; None where it has none.

    bias: (N,), added to the scores before the choice, not part of the weights. groups: (groups of experts, groups that
    are chosen from). jitter: threshold of SparseMixer.
    """

    bias: torch.Tensor | None = None
    groups: tuple[int, int] | None = None
    jitter: float | None = None


def choice(block: nn.Module, router: nn.Module, experts: int) -> Choice:
    """What the router of an MoE block has. The bias may lie in the router, in the block or in a module of its own."""
    groups = getattr(router, "num_group", None), getattr(router, "topk_group", None)
    grouped = all(groups) and groups[0] > 1 and experts % groups[0] == 0
    return Choice(_bias(block, experts), groups if grouped else None, getattr(router, "router_jitter_noise", None))


def _bias(block: nn.Module, experts: int) -> torch.Tensor | None:
    """A tensor of N numbers called something_bias. One called only "bias" belongs to a linear map."""
    for tensors in (block.named_parameters(), block.named_buffers()):
        for path, tensor in tensors:
            name = path.rpartition(".")[2]
            if name.endswith(("_bias", "_biases")) and tensor.numel() == tensor.shape[-1] == experts:
                return tensor.flatten()
    return None


def logits_of(output: torch.Tensor | tuple, expected: torch.Tensor) -> torch.Tensor | None:
    """The logits (T, N) among what a router's forward returned, in its dtype; None if there are none.

    expected: (T, N), W x + b. Where several tensors have N columns, the one nearest to it are the logits.
    """
    parts = output if isinstance(output, tuple) else (output,)
    found = [part for part in parts if isinstance(part, torch.Tensor) and part.is_floating_point()]
    found = [part.reshape(expected.shape) for part in found if part.numel() == expected.numel()]
    if len(found) < 2:
        return found[0] if found else None
    return min(found, key=lambda part: (part.float() - expected).abs().max().nan_to_num(torch.inf).item())

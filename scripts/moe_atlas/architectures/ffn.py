"""Dense and shared feed-forward networks under the names the families give them."""

from collections.abc import Callable

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from moe_atlas.architectures.bank import FFN

# (up, act, down) as attributes of the module that holds them.
_GATED = (("up_proj", "gate_proj", "down_proj"), ("w3", "w1", "w2"))
# (act and up as one map, act's rows first; down).
_FUSED = (("input_linear", "output_linear"), ("gate_up_proj", "down_proj"))
# (up, down) of an FFN without a gate branch.
_PLAIN = (("up_proj", "down_proj"), ("c_fc", "c_proj"))
_FUNCTIONS = ("act_fn", "activation_fn", "activation", "act")


def _maps(module: nn.Module) -> list[nn.Linear | Conv1D]:
    """The linear maps of a module that is one FFN: up, act, down; or act and up in one, down; or up, down."""
    for names in (*_GATED, *_FUSED, *_PLAIN):
        maps = [getattr(module, name, None) for name in names]
        if all(isinstance(linear, nn.Linear | Conv1D) for linear in maps):
            return maps
    return []


def rows(linear: nn.Linear | Conv1D) -> torch.Tensor:
    """Weight (o, i) of a linear map, which GPT-2's holds the other way round."""
    return linear.weight.T if isinstance(linear, Conv1D) else linear.weight


def roles(module: nn.Module) -> dict[str, str]:
    """What the linear maps of a module for which is_ffn holds are: up, act and down, or act_up for both in one."""
    names = {id(child): name for name, child in module.named_children()}
    maps = _maps(module)
    if len(maps) == 3:
        kinds = ("up", "act", "down")
    else:
        kinds = ("act_up" if rows(maps[0]).shape[0] > rows(maps[1]).shape[1] else "up", "down")
    return {names[id(linear)]: kind for linear, kind in zip(maps, kinds, strict=True)}


def is_ffn(module: nn.Module) -> bool:
    """Whether the module is one FFN made of linear maps."""
    return bool(_maps(module))


def input_width(module: nn.Module) -> int:
    """Width d of the inputs of a module for which is_ffn holds."""
    return rows(_maps(module)[0]).shape[1]


def activation_function(module: nn.Module) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """sigma of an FFN, or None where the module gives it no name that is known."""
    functions = (getattr(module, name, None) for name in _FUNCTIONS)
    return next((found for found in functions if callable(found)), None)


def ffn_activation(module: nn.Module, inputs: torch.Tensor) -> torch.Tensor | None:
    """sigma(W_act x) of a module for which is_ffn holds, (T, d) -> (T, m), or sigma(W_up x) without a gate branch.

    None where the module gives its activation function no name that is known.
    """
    maps, function = _maps(module), activation_function(module)
    if function is None:
        return None
    if len(maps) == 3:
        return function(maps[1](inputs))
    first, down = maps
    result = first(inputs)
    return function(result if result.shape[-1] == rows(down).shape[1] else result.chunk(2, dim=-1)[0])


def ffn_view(module: nn.Module) -> FFN:
    """The weights of a module for which is_ffn holds: up (m, d), act (m, d) or None, down (d, m)."""
    maps = [rows(linear).detach() for linear in _maps(module)]
    if len(maps) == 3:
        return FFN(*maps)
    first, down = maps
    if first.shape[0] == down.shape[1]:
        return FFN(first, None, down)
    act, up = torch.chunk(first, 2)
    return FFN(up, act, down)


def ffn_biases(module: nn.Module) -> dict[str, torch.Tensor | None]:
    """The biases of a module for which is_ffn holds, by the role of their map; None where it has none."""
    return {role: getattr(module, name).bias for name, role in roles(module).items()}


def dense_ffn(layer: nn.Module) -> nn.Module | None:
    """The dense FFN of a decoder layer without experts, or None."""
    return next((module for module in layer.children() if is_ffn(module)), None)

"""Dense and shared feed-forward networks under the names the families give them."""

from torch import nn

from moe_atlas.architectures.bank import FFN

# (up, act, down) as attributes of the module that holds them.
_NAMES = (("up_proj", "gate_proj", "down_proj"), ("w3", "w1", "w2"))


def _maps(module: nn.Module) -> list[nn.Linear]:
    """The linear maps (up, act, down) of a module that is one gated FFN; none of any other."""
    for names in _NAMES:
        maps = [getattr(module, name, None) for name in names]
        if all(isinstance(linear, nn.Linear) for linear in maps):
            return maps
    return []


def is_ffn(module: nn.Module) -> bool:
    """Whether the module is one gated FFN made of three linear maps."""
    return bool(_maps(module))


def ffn_view(module: nn.Module) -> FFN:
    """The weights of a module for which is_ffn holds: up (m, d), act (m, d), down (d, m)."""
    return FFN(*(linear.weight.detach() for linear in _maps(module)))


def dense_ffn(layer: nn.Module) -> nn.Module | None:
    """The dense FFN of a decoder layer without experts, or None."""
    return next((module for module in layer.children() if is_ffn(module)), None)

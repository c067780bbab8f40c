"""Dense and shared feed-forward networks under the names the families give them."""

from torch import nn

from moe_atlas.architectures.bank import FFN
from moe_atlas.errors import AtlasError

# (up, act, down) as attributes of the module that holds them.
_NAMES = (("up_proj", "gate_proj", "down_proj"), ("w3", "w1", "w2"))


def is_ffn(module: nn.Module) -> bool:
    """Whether the module is one gated FFN made of three linear maps."""
    return any(all(isinstance(getattr(module, name, None), nn.Linear) for name in names) for names in _NAMES)


def ffn_view(module: nn.Module) -> FFN:
    """The weights of a module for which is_ffn holds: up (m, d), act (m, d), down (d, m)."""
    for names in _NAMES:
        if all(isinstance(getattr(module, name, None), nn.Linear) for name in names):
            return FFN(*(getattr(module, name).weight.detach() for name in names))
    raise AtlasError(
        f'{type(module).__name__}: this feed-forward layout is not known; see "add an architecture" in CONTRIBUTING.md.'
    )


def dense_ffn(layer: nn.Module) -> nn.Module | None:
    """The dense FFN of a decoder layer without experts, or None."""
    return next((module for module in layer.children() if is_ffn(module)), None)

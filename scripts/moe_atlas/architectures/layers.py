"""Where a causal language model has its decoder layers."""

from torch import nn

from moe_atlas.errors import AtlasError

_LAYER_LISTS = ("layers", "blocks", "h")


def decoder(model: nn.Module) -> nn.Module:
    """The part of a causal language model that holds its decoder layers."""
    found = model.get_decoder()
    # Llama 4's causal model takes itself for its decoder.
    return getattr(model, "model", model) if found is model else found


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The list of decoder layers of a causal language model."""
    lists = [getattr(decoder(model), name, None) for name in _LAYER_LISTS]
    layers = next((found for found in lists if isinstance(found, nn.ModuleList)), None)
    if layers is None:
        raise AtlasError(
            f"{type(model).__name__}: its decoder has no list called {' or '.join(_LAYER_LISTS)}, so it cannot be read "
            'layer by layer; see "add an architecture" in CONTRIBUTING.md.'
        )
    return layers

"""The weights of a decoder layer as statistics of weights see them."""

from torch import nn

from moe_atlas.architectures.bank import FFN, ExpertBank
from moe_atlas.architectures.ffn import dense_ffn, ffn_view
from moe_atlas.architectures.sites import find_sites


def expert_bank(layer: nn.Module) -> ExpertBank:
    """The FFN experts of a decoder layer that has some."""
    (site,) = (site for site in find_sites(layer) if site.name == "ffn")
    return site.bank()


def dense_view(layer: nn.Module | None) -> FFN | None:
    """The dense FFN of a decoder layer; None for no layer and for one without a dense FFN."""
    ffn = dense_ffn(layer) if layer is not None else None
    return ffn and ffn_view(ffn)

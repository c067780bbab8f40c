"""GMoE: a dense FFN becomes experts, copies of it behind a learned router (Li et al. 2023, arXiv 2206.04046)."""

import copy

import torch
from torch import nn
from torch.nn import functional

from moe_atlas.emoe.ffns import DenseFFN
from moe_atlas.emoe.router import CosineRouter
from moe_atlas.errors import AtlasError


class CopiedExperts(nn.Module):
    """N copies of a module that maps (..., H) to (..., H); of each token the k with the largest scores are evaluated.

    Their weights are the softmax over the scores of the k, sum 1, so that before the first step the output is that of
    the module itself. After a forward pass `chosen` (..., N) bool and `scores` (..., N) say what was chosen. No token
    is dropped.
    """

    def __init__(self, module: nn.Module, hidden: int, experts: int, k: int):
        super().__init__()
        if not 1 <= k <= experts:
            raise AtlasError(f"GMoE: of {experts} experts {k} cannot be chosen; take k from 1 to N.")
        self.experts = nn.ModuleList(copy.deepcopy(module) for _ in range(experts))
        self.router = CosineRouter(hidden, experts)
        self.k = k
        self.chosen: torch.Tensor | None = None
        self.scores: torch.Tensor | None = None

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        self.scores = self.router(hidden)
        best = self.scores.topk(self.k, dim=-1).indices
        self.chosen = torch.zeros_like(self.scores, dtype=torch.bool).scatter_(-1, best, True)
        weights = functional.softmax(self.scores.masked_fill(~self.chosen, -torch.inf), dim=-1).to(hidden.dtype)
        tokens, weights, chosen = hidden.flatten(0, -2), weights.flatten(0, -2), self.chosen.flatten(0, -2)
        output = torch.zeros_like(tokens)
        for number, expert in enumerate(self.experts):
            taken = chosen[:, number].nonzero().squeeze(1)
            output = output.index_add(0, taken, expert(tokens[taken]) * weights[taken, number, None])
        return output.view_as(hidden)


class _InputItself(nn.Module):
    """Stands where BERT's first matrix was: the copies hold it, and take the FFN's input."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden


def copy_experts(model: nn.Module, ffn: DenseFFN, experts: int, k: int) -> CopiedExperts:
    """Put copies of one dense FFN in its place, in the model itself, and return them.

    AtlasError where the two matrices lie in the layer itself, as OPT's and BART's do: there is no FFN to be copied.
    """
    module = model.get_submodule(ffn.name)
    hidden = ffn.keys.shape[1]
    if hasattr(module, "self_attn"):
        raise AtlasError(f"GMoE: {type(module).__name__} has no module that is its FFN alone; leave the arm gmoe out.")
    if hasattr(module, "intermediate"):  # BERT: the residual and the norm are in the module of the second matrix
        copies = CopiedExperts(nn.Sequential(module.intermediate, module.output.dense), hidden, experts, k)
        module.intermediate, module.output.dense = _InputItself(), copies
        return copies
    copies = CopiedExperts(module, hidden, experts, k)
    parent, _, name = ffn.name.rpartition(".")
    setattr(model.get_submodule(parent), name, copies)
    return copies

"""The learned router of GMoE and EMoE-learn: cosines with a learned temperature (Li et al. 2023, arXiv 2206.04046)."""

import math

import torch
from torch import nn
from torch.nn import functional

PROJECTED = 256
_LARGEST_SCALE = math.log(100.0)


class CosineRouter(nn.Module):
    """Scores tau cos(P x, M_e), (..., N) float32, of inputs (..., H).

    P maps to `projected` numbers with a bias; M (projected, N) begins at N(0, 0.01^2); tau = exp(min(theta, log 100)),
    and theta begins at log 2.
    """

    def __init__(self, hidden: int, experts: int, projected: int = PROJECTED):
        super().__init__()
        self.projection = nn.Linear(hidden, projected)
        self.vectors = nn.Parameter(torch.randn(projected, experts) * 0.01)
        self.temperature = nn.Parameter(torch.tensor(math.log(2.0)))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        projected = functional.normalize(self.projection(hidden.to(self.vectors.dtype)), dim=-1)
        cosines = projected @ functional.normalize(self.vectors, dim=0)
        return (cosines * self.temperature.clamp(max=_LARGEST_SCALE).exp()).float()

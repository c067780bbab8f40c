"""EMoE in its mask form: of each token only the neurons of k experts reach the second matrix of a dense FFN.

The weights stay where they are, so that taking the mask off gives the dense model again, to the bit. There is no
capacity, no token is dropped, and the bias of the second matrix is added once. arXiv 2310.10908, section 3.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from moe_atlas.emoe.ffns import DenseFFN
from moe_atlas.emoe.split import gate_vectors
from moe_atlas.errors import AtlasError

CHOICES = ("top", "bottom", "rest", "random")
WEIGHTS = ("one", "softmax")


class ExpertMask:
    """A hook on one dense FFN.

    labels (F,): the expert of each neuron, 0 to N - 1.
    score: "gate", the mean of an expert's keys times the FFN's input: its mean pre-activation without the bias;
    "magnitude", the sum of its absolute activations, as an oracle; or a module that maps the input (..., H) to scores
    (..., N), a learned router.
    choose: the k "top" or "bottom" experts by score, the "rest" (N - k that are not top), k at "random" from `seed`,
    or a list of experts that are taken for every token.
    weights: "one", or "softmax" over the scores of the chosen, sum 1: then k experts are averaged and not summed. With
    a learned router "one" passes on the gradient of k times the softmax: else no gradient would reach it.

    Through the choice goes no gradient, and to a neuron that was not chosen none at all. After a forward pass `chosen`
    (..., N) bool says what was chosen, and `scores` (..., N) float32 how.
    """

    def __init__(
        self,
        ffn: DenseFFN,
        labels: np.ndarray,
        k: int,
        *,
        score: str | nn.Module = "gate",
        choose: str | Sequence[int] = "top",
        weights: str = "one",
        seed: int = 0,
    ):
        labels = np.asarray(labels)
        self.experts = int(labels.max()) + 1
        fixed = not isinstance(choose, str)
        if labels.shape != (ffn.neurons,) or labels.min() < 0:
            raise AtlasError(
                f"{ffn.name}: it has {ffn.neurons} neurons, but there are {labels.shape} labels of experts."
            )
        if not 1 <= k <= self.experts:
            raise AtlasError(f"{ffn.name}: of {self.experts} experts {k} cannot be chosen; take k from 1 to N.")
        if weights not in WEIGHTS or not (fixed or choose in CHOICES):
            raise AtlasError(f"{ffn.name}: choose is one of {CHOICES} or a list, weights one of {WEIGHTS}.")
        if fixed and not (len(set(choose)) == k and set(choose) <= set(range(self.experts))):
            raise AtlasError(f"{ffn.name}: the fixed choice {list(choose)} is not of {k} of {self.experts} experts.")
        self.ffn, self.labels, self.k = ffn, labels, k
        self.score, self.choose, self.weights = score, choose, weights
        self.chosen: torch.Tensor | None = None
        self.scores: torch.Tensor | None = None
        self._seed, self._generator = seed, None
        self._input: torch.Tensor | None = None
        self._gate: torch.Tensor | None = None  # (N, H) float32; made anew where the keys are being tuned
        self._hooks: list = []

    def install(self) -> "ExpertMask":
        """Put the hooks on; a second time changes nothing."""
        if not self._hooks:
            self._generator = torch.Generator().manual_seed(self._seed)
            self._hooks = [
                self.ffn.first.register_forward_pre_hook(self._keep_input),
                self.ffn.last.register_forward_pre_hook(self._mask),
            ]
        return self

    def remove(self) -> None:
        """Take the hooks off: the FFN is the dense one again."""
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._input, self._gate = [], None, None

    def __enter__(self) -> "ExpertMask":
        return self.install()

    def __exit__(self, *_error: object) -> None:
        self.remove()

    def select(self, scores: torch.Tensor) -> torch.Tensor:
        """The chosen experts of scores (..., N), bool of the same shape."""
        if not isinstance(self.choose, str):
            chosen = torch.zeros(self.experts, dtype=torch.bool, device=scores.device)
            chosen[list(self.choose)] = True
            return chosen.expand(scores.shape)
        if self.choose == "random":
            scores = torch.rand(scores.shape, generator=self._generator).to(scores.device)
        best = scores.topk(self.k, dim=-1, largest=self.choose != "bottom").indices
        chosen = torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, best, True)
        return ~chosen if self.choose == "rest" else chosen

    def _keep_input(self, _module: nn.Module, arguments: tuple) -> None:
        self._input = arguments[0]

    def _mask(self, _module: nn.Module, arguments: tuple) -> tuple:
        activation, hidden = arguments[0], self._input
        self._input = None
        learned = isinstance(self.score, nn.Module)
        with torch.autocast(activation.device.type, enabled=False):  # scores are float32, whatever the products are
            scores = self.score(hidden) if learned else self._own_scores(hidden, activation)
        with torch.no_grad():
            chosen = self.select(scores)
        self.scores, self.chosen = scores, chosen
        weights = chosen.to(activation.dtype)
        if self.weights == "softmax" or learned:
            soft = functional.softmax(scores.float().masked_fill(~chosen, -torch.inf), dim=-1)
            if self.weights == "one":
                soft = soft * self.k
                soft = chosen + (soft - soft.detach())
            weights = soft.to(activation.dtype)
        labels = torch.from_numpy(self.labels).to(activation.device)
        return (activation * weights[..., labels], *arguments[1:])

    @torch.no_grad()
    def _own_scores(self, hidden: torch.Tensor, activation: torch.Tensor) -> torch.Tensor:
        """avg-k gate, or the sum of absolute activations, (..., N) float32."""
        if self.score == "gate":
            if self._gate is None or any(each.requires_grad for each in self.ffn.first.parameters()):
                self._gate = gate_vectors(self.ffn.keys.detach().float(), self.labels, self.experts)
            return hidden.float() @ self._gate.to(hidden.device).T
        if self.score != "magnitude":
            raise AtlasError(f"{self.ffn.name}: there is no score {self.score!r}; take gate, magnitude or a module.")
        labels = torch.from_numpy(self.labels).to(activation.device)
        sums = torch.zeros(*activation.shape[:-1], self.experts, dtype=torch.float32, device=activation.device)
        return sums.index_add_(-1, labels, activation.abs().float())

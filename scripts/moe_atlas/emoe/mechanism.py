"""What chosen experts of a split dense FFN hold of a token's activation, before any tuning.

Tensors in, sums by block of documents kept, so that a text of any length takes bounded memory. Source: Unlocking
Emergent Modularity in Large Language Models (EMoE, arXiv 2310.10908), section 3 for the split and the avg-k gate; the
mass that chosen experts capture and the gate's agreement with an oracle are additions.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from moe_atlas.emoe.split import RULES, split_neurons

# How experts are chosen: by the mean pre-activation of their neurons, by the sum of their absolute activations, at
# random, all but the k of avg-k, and the k with the lowest avg-k score.
GATES = ("avg-k", "oracle", "random", "not-top-k", "bottom-k")


@dataclass(frozen=True)
class Split:
    """One way to deal F neurons to experts: a rule of `split_neurons` and its seed; labels (F,) int64."""

    rule: str
    experts: int
    seed: int
    labels: np.ndarray


def splits(keys: torch.Tensor, experts: int, seeds: int) -> list[Split]:
    """The splits of keys (F, H) that are compared: `seeds` clusterings, as many random ones, and the contiguous one."""
    wanted = [(rule, seed) for rule in RULES for seed in range(1 if rule == "contiguous" else seeds)]
    return [Split(rule, experts, seed, split_neurons(keys, experts, rule=rule, seed=seed)) for rule, seed in wanted]


def expert_mass(activations: torch.Tensor, labels: np.ndarray, experts: int) -> torch.Tensor:
    """Sum of |a_j| over each expert's neurons. activations: (T, F), any float dtype; returns (T, N) float64."""
    mass = torch.zeros(len(activations), experts, dtype=torch.float64, device=activations.device)
    places = torch.from_numpy(np.ascontiguousarray(labels)).to(activations.device)
    return mass.index_add_(1, places, activations.abs().to(torch.float64))


def chosen(scores: torch.Tensor, k: int) -> torch.Tensor:
    """The k largest of scores (T, N) as bool (T, N); of equal scores the first experts."""
    best = scores.sort(dim=1, descending=True, stable=True).indices[:, :k]
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, best, True)


def choose(
    gate: str, scores: torch.Tensor, mass: torch.Tensor, k: int, generator: torch.Generator | None = None
) -> torch.Tensor:
    """The experts that `gate`, one of GATES, takes: bool (T, N). scores: (T, N) of avg-k; mass: (T, N), expert_mass."""
    if gate == "oracle":
        return chosen(mass, k)
    if gate == "random":
        return chosen(torch.rand(scores.shape, generator=generator).to(scores.device), k)
    if gate == "bottom-k":
        return chosen(-scores, k)
    top = chosen(scores, k)
    return ~top if gate == "not-top-k" else top


def selected(gate: str, experts: int, k: int) -> int:
    """How many experts a gate takes."""
    return experts - k if gate == "not-top-k" else k


def captured(mass: torch.Tensor, choice: torch.Tensor) -> torch.Tensor:
    """rho: the share of a token's sum of |a_j| that is in the chosen experts, (T,) float64; NaN where that sum is 0."""
    return (mass * choice).sum(1) / mass.sum(1)


def agreement(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Share of the experts of the first choice (T, N) that are in the second, (T,) float64; by chance k/N."""
    return (first & second).sum(1).to(torch.float64) / first.sum(1)


class SplitSums:
    """Sums over the tokens of each of B blocks of documents for one split of one layer's neurons.

    mass[k, gate] and agreement[k, oracle], (B,) float64; counts[k] (B, N) float64: tokens that chose each expert by
    avg-k; tokens (B,) float64. The oracles: "activation", the experts with the largest sum of |a_j|, and "output", of
    |a_j| times the length of the neuron's value. Tokens without any activation are left out.
    """

    def __init__(self, split: Split, ks: Sequence[int], blocks: int, seed: int = 0):
        self.split, self.ks, self._seed = split, tuple(ks), seed
        self.tokens = torch.zeros(blocks, dtype=torch.float64)
        self.mass = {(k, gate): torch.zeros(blocks, dtype=torch.float64) for k in ks for gate in GATES}
        self.agreement = {
            (k, oracle): torch.zeros(blocks, dtype=torch.float64) for k in ks for oracle in ("activation", "output")
        }
        self.counts = {k: torch.zeros(blocks, split.experts, dtype=torch.float64) for k in ks}
        self._generator = torch.Generator().manual_seed(seed)

    def add(
        self,
        inputs: torch.Tensor,
        activations: torch.Tensor,
        blocks: torch.Tensor,
        gate: torch.Tensor,
        value_norms: torch.Tensor,
    ) -> None:
        """Take tokens: inputs (T, H) and activations (T, F) of the FFN, the block (T,) int64 of each.

        gate (N, H) float32: gate_vectors of the split, made once a layer; value_norms (F,): the layer's.
        """
        labels, experts = self.split.labels, self.split.experts
        scores, mass = (inputs.float() @ gate.T).cpu(), expert_mass(activations, labels, experts).cpu()
        output = expert_mass(activations.float() * value_norms.float(), labels, experts).cpu()
        some = mass.sum(1) > 0
        scores, mass, output, blocks = scores[some], mass[some], output[some], blocks[some]
        self.tokens.index_add_(0, blocks, torch.ones(len(blocks), dtype=torch.float64))
        for k in self.ks:
            for name in GATES:
                choice = choose(name, scores, mass, k, self._generator)
                self.mass[k, name].index_add_(0, blocks, captured(mass, choice))
            top = chosen(scores, k)
            for oracle, best in (("activation", chosen(mass, k)), ("output", chosen(output, k))):
                self.agreement[k, oracle].index_add_(0, blocks, agreement(top, best))
            self.counts[k].index_add_(0, blocks, top.to(torch.float64))

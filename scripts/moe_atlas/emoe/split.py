"""Deal the neurons of a dense FFN to experts of equal size, and the avg-k gate (EMoE, arXiv 2310.10908, section 3).

Only what is computed from the keys: the rows of the first matrix of the FFN, of `gate_proj` where it is gated.
"""

import numpy as np
import torch
from sklearn.cluster import kmeans_plusplus
from threadpoolctl import threadpool_limits

from moe_atlas.emoe.assignment import equal_assignment
from moe_atlas.errors import AtlasError

RULES = ("cluster", "random", "contiguous")
_MOST_SWEEPS = 300
# Costs as integers: squared distances of unit vectors are at most 4, and float32 keeps 24 bits of them.
_STEPS = 2.0**30


def split_neurons(keys: torch.Tensor, experts: int, *, rule: str = "cluster", seed: int = 0) -> np.ndarray:
    """Labels (F,) int64 of the neurons: which of `experts` experts each belongs to, F / experts neurons in every one.

    `keys` (F, H), one row a neuron, any float dtype. Rules: "cluster", balanced k-means of the unit keys; "random", a
    random permutation dealt out; "contiguous", neighbours in the matrix. Experts are numbered in the order of their
    first neuron. AtlasError where `experts` does not divide F, or a key is not finite.

    Balanced k-means starts from k-means++ and alternates two steps until neither lowers the sum of squared distances:
    each cluster's centre becomes the mean of its unit keys, and the neurons are assigned to the centres anew. The
    assignment is the cheapest of all with equal sizes, exactly (but for distances that are rounded to 2^-30); the
    alternation ends in a local minimum, as k-means does. The same keys and seed give the same labels whatever the
    number of threads.
    """
    neurons = len(keys)
    if rule not in RULES:
        raise AtlasError(f"{rule!r} is no rule to split neurons by; write one of {', '.join(RULES)}.")
    if experts < 1 or neurons % experts:
        raise AtlasError(
            f"{neurons} neurons do not make {experts} experts of equal size; choose a divisor of {neurons}."
        )
    dealt = np.arange(neurons, dtype=np.int64) // (neurons // experts)
    if rule == "contiguous":
        return dealt
    if rule == "random":
        labels = np.random.default_rng(seed).permutation(dealt)
    else:
        # Sums of one thread do not depend on how many there are.
        with threadpool_limits(limits=1):
            labels = _balanced_kmeans(unit_keys(keys), experts, seed)
    return in_order_of_first_neuron(labels)


def unit_keys(keys: torch.Tensor) -> np.ndarray:
    """Keys (F, H) float32 of length 1; a key of zeros stays zero. AtlasError where one is not finite."""
    rows = keys.detach().to("cpu", torch.float32)
    if not rows.isfinite().all():
        raise AtlasError(
            "The first matrix of an FFN holds numbers that are not finite, so its neurons have no distances."
        )
    return torch.nn.functional.normalize(rows, dim=1).numpy()


def objective(keys: torch.Tensor, labels: np.ndarray) -> float:
    """Sum of squared distances of the unit keys (F, H) from their clusters' means: what clustering makes small."""
    unit = unit_keys(keys)
    total = 0.0
    for cluster in np.unique(labels):
        members = unit[labels == cluster].astype(np.float64)
        total += float(np.square(members - members.mean(axis=0)).sum())
    return total


def gate_vectors(keys: torch.Tensor, labels: np.ndarray, experts: int) -> torch.Tensor:
    """Gate (N, H) of the avg-k rule in the keys' dtype: the mean of each expert's raw keys (F, H), summed in float32.

    The product with an FFN's input is the mean pre-activation of the expert's neurons, without their biases. In float64
    where the keys are. Differentiable with respect to the keys.
    """
    precise = keys if keys.dtype == torch.float64 else keys.float()
    order = torch.from_numpy(np.argsort(labels, kind="stable")).to(keys.device)
    return precise[order].view(experts, -1, keys.shape[1]).mean(dim=1).to(keys.dtype)


def in_order_of_first_neuron(labels: np.ndarray) -> np.ndarray:
    """The same clusters (F,), numbered from 0 in the order in which they first appear."""
    _, first, labels = np.unique(labels, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first))[labels].astype(np.int64)


def _balanced_kmeans(unit: np.ndarray, experts: int, seed: int) -> np.ndarray:
    """Labels (F,) of unit keys (F, H) after the last sweep that lowered the sum of squared distances."""
    centres, _ = kmeans_plusplus(unit, experts, random_state=seed)
    labels, prices, least = None, np.zeros(experts, np.int64), None
    for _ in range(_MOST_SWEEPS):
        # A point's own length is the same for all clusters, so it is left out of its costs.
        distances = np.square(centres).sum(axis=1) - 2 * (unit @ centres.T)
        costs = np.rint(distances.astype(np.float64) * _STEPS).astype(np.int64)
        assigned, prices = equal_assignment(costs, prices)
        if labels is not None and np.array_equal(assigned, labels):
            break
        centres = np.stack([unit[assigned == expert].mean(axis=0, dtype=np.float64) for expert in range(experts)])
        # With centres at the means, the sum of squared distances is a constant less this.
        gained = -float(np.square(centres).sum())
        if least is not None and gained >= least:
            break
        labels, least, centres = assigned, gained, centres.astype(np.float32)
    return labels

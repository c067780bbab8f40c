"""Put together what was kept of some of a text's tokens, batch by batch or part by part, as one run keeps it of all.

Arrays go by their names in activations.safetensors (results/README.md). While they are being put together, sums are
expansions (exact.py) with one axis more, so that the result has the same bits for any order and any number of parts.
"""

from collections.abc import Callable, Mapping

import torch

from moe_atlas import exact

Arrays = Mapping[str, torch.Tensor]

SUMS = frozenset(
    [
        *("load_weight", "rank_counts", "rank_counts_first", "cross_largest", "cross_rank", "document_sum"),
        *("cosine_sum", "cosine_square", "angular_sum", "angular_square", "cosine_sum_first", "angular_sum_first"),
        *("cosine_block", "confidence_entropy", "confidence_margin", "confidence_mass"),
        *("importance_count", "importance_gate", "importance_norm", "importance_reap"),
    ]
)


def _bounds(total: torch.Tensor, more: torch.Tensor) -> torch.Tensor:
    """Smallest and largest, (..., 2)."""
    return torch.stack([torch.minimum(total, more)[..., 0], torch.maximum(total, more)[..., 1]], -1)


def _selection(total: torch.Tensor, more: torch.Tensor) -> torch.Tensor:
    """Counts, or -1 for what the router has not."""
    return torch.where(total < 0, total, total + more)


_COUNTS = (
    *("tokens", "tokens_first", "load_tokens", "load_tokens_first", "cross_tokens", "cosine_histogram"),
    *("document_count", "document_tokens", "activation_histogram", "choice_tokens", "choice_used"),
    *(f"choice_{router}{name}" for router in ("", "random_") for name in ("first", "any", "pairs", "repeats")),
    *(f"choice_{router}{name}" for router in ("", "random_") for name in ("input", "next")),
)
_LARGEST = ("rule_spread", "rule_epsilon", "rule_logit_error", "importance_output_max")
_BOUNDS = ("cosine_range", "rule_ratio", "rule_weight_sum")
_WAYS: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    **dict.fromkeys(SUMS, exact.added),
    **dict.fromkeys(_COUNTS, torch.add),
    **dict.fromkeys(_LARGEST, torch.maximum),
    **dict.fromkeys(_BOUNDS, _bounds),
    "rule_selection": _selection,
    # Of the whole text in any part.
    **dict.fromkeys(("choice_input_ids", "choice_next_ids", "activation_edges"), lambda total, more: total),
}


def opened(arrays: Arrays) -> dict[str, torch.Tensor]:
    """Arrays of some tokens as `joined` takes them."""
    return {name: array[None] if name in SUMS else array for name, array in arrays.items()}


def joined(total: Arrays, more: Arrays) -> dict[str, torch.Tensor]:
    """What was kept of two sets of tokens that have none in common; KeyError for an array that cannot be put together.

    Either side may lack an array: a site whose experts have no activation gives none, and no tokens give nothing.
    """
    both = {name: _WAYS[name](total[name], more[name]) for name in total.keys() & more.keys()}
    return {**total, **more, **both}


def closed(total: Arrays) -> dict[str, torch.Tensor]:
    """The arrays of all tokens that were joined, sums rounded once."""
    arrays = {name: exact.rounded(array) if name in SUMS else array for name, array in total.items()}
    # Which of 0.0 and -0.0 is the smaller one depends on the order.
    return arrays | {name: arrays[name] + 0.0 for name in (*_LARGEST, *_BOUNDS) if name in arrays}

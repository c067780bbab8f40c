"""Table domain: how differently a model's experts are used on different texts, its long corpora.

Source: OLMoE (Muennighoff et al., 2409.02060, section 5.3) for the share of a domain's tokens that choose an expert.
The divergence of two loads and its permutation test over blocks of documents are additions. Position 0 is left out.
"""

import itertools
from collections.abc import Iterator, Sequence

import numpy as np
import polars as pl

from moe_atlas import tables
from moe_atlas.behavioral.activations import Activations, Arrays
from moe_atlas.behavioral.measures import divide, js_divergence
from moe_atlas.behavioral.resampling import FEWEST_BLOCKS, block_weights, interval
from moe_atlas.errors import AtlasError

SEED = 0
PERMUTATIONS = 999


def _used(arrays: Arrays) -> tuple[np.ndarray, np.ndarray]:
    """Loads (B, N) and tokens (B,) of the blocks that have any."""
    tokens = arrays["choice_tokens"]
    return arrays["choice_any"][tokens > 0], tokens[tokens > 0]


def permutation_test(first: np.ndarray, second: np.ndarray, generator: np.random.Generator) -> tuple[float, float]:
    """Mean divergence and p value when blocks of documents are dealt out to two corpora at random.

    first, second: loads (B, N) of their blocks. NaN, NaN where either has fewer than 5 blocks.
    """
    if min(len(first), len(second)) < FEWEST_BLOCKS:
        return np.nan, np.nan
    blocks = np.concatenate([first, second])
    order = np.broadcast_to(np.arange(len(blocks)), (PERMUTATIONS, len(blocks)))
    dealt = (generator.permuted(order, axis=1) < len(first)).astype(np.float64)
    drawn = js_divergence(dealt @ blocks, (1 - dealt) @ blocks)
    observed = js_divergence(first.sum(0), second.sum(0))
    reached = int((drawn >= observed * (1 - 1e-9)).sum())
    return float(drawn.mean()), (1 + reached) / (1 + PERMUTATIONS)


def _shares(corpus: str, arrays: Arrays, labels: list[str], generator: np.random.Generator) -> pl.DataFrame:
    load, tokens = _used(arrays)
    experts = load.shape[1]
    weights = block_weights(len(tokens), generator)
    value, low, high = interval(divide(weights @ load, (weights @ tokens)[:, None]), 0, 1)
    return pl.DataFrame(
        {
            "measure": ["share"] * experts,
            "corpus": [corpus] * experts,
            "expert": labels[:experts],
            "value": value,
            "chance": divide(load.sum() / experts, np.full(experts, tokens.sum())),
            "low": low,
            "high": high,
            "random_router": divide(arrays["choice_random_any"].sum(0), tokens.sum()),
        }
    )


def _divergence(corpora: tuple[str, str], pair: tuple[Arrays, Arrays], generator: np.random.Generator) -> pl.DataFrame:
    (first, _), (second, _) = map(_used, pair)
    weights = [block_weights(len(load), generator) for load in (first, second)]
    rows = min(map(len, weights))  # only the sums themselves where one corpus has too few blocks
    drawn = js_divergence(*(w[:rows] @ load for w, load in zip(weights, (first, second), strict=True)))
    value, low, high = interval(drawn, 0, 1)
    chance, p_value = permutation_test(first, second, generator)
    random = js_divergence(*(arrays["choice_random_any"].sum(0) for arrays in pair))
    numbers = {"value": value, "chance": chance, "p_value": p_value, "low": low, "high": high, "random_router": random}
    return pl.DataFrame(
        {"measure": ["js_divergence"], "corpus": [corpora[0]], "other": [corpora[1]]}
        | {name: [float(number)] for name, number in numbers.items()}
    )


def domain(recorded: Sequence[Activations]) -> Iterator[pl.DataFrame]:
    """The table of one model, one frame for each layer and site; `recorded`: one element for each long corpus.

    Raises AtlasError when the corpora were recorded with different layers.
    """
    for position, entry in enumerate(recorded[0].metadata["layers"] if recorded else []):
        found = {}
        for activations in recorded:
            own = activations.metadata["layers"]
            if len(own) <= position or any(own[position][key] != entry[key] for key in ("layer", "site", "experts")):
                raise AtlasError(
                    f"{activations.path}: its layers are not those of {recorded[0].path}; they are of different runs, "
                    "so extract this model's corpora again."
                )
            found[activations.metadata["corpus"]] = activations.arrays(own[position])
        generator = np.random.default_rng([SEED, entry["layer"]])
        parts = [_shares(corpus, arrays, entry["labels"], generator) for corpus, arrays in found.items()]
        parts += [
            _divergence(pair, (found[pair[0]], found[pair[1]]), generator) for pair in itertools.combinations(found, 2)
        ]
        keys = {"model": recorded[0].metadata["model"], "layer": entry["layer"], "site": entry["site"]}
        frame = pl.concat([tables.empty("domain").drop(keys), *parts], how="diagonal_relaxed")
        yield tables.conform(
            "domain", frame.with_columns(pl.col(pl.Float64).fill_nan(None), **{k: pl.lit(v) for k, v in keys.items()})
        )

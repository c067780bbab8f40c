"""Table specialization: what the choices of a layer's router say about its experts, each beside its chance level.

From the counts of moe_atlas/choices.py and the sums of outputs (importance_*) that extraction records. Position 0 of
every sequence is in none of them but importance_output_max. Chance is what a router gives that draws k of N experts
evenly and anew for every token, on as many tokens; of vocabulary and context_independence it is what remains when the
experts are permuted over the tokens; of an expert's importance it is the mean of all experts. Intervals: resampling.py.
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
import polars as pl

from moe_atlas.behavioral import measures
from moe_atlas.behavioral.resampling import DRAWS, Statistic, Weights, interval, resample

SEED = 0
PERMUTATIONS = 200

# A super expert (Su et al. 2025, 2507.23279): its largest absolute output is above this quantile of all experts of the
# model and above this part of the largest of all, and it is in the first layers, where massive activations form.
SUPER_QUANTILE = 0.995
SUPER_PART = 0.1
SUPER_DEPTH = 0.75

Arrays = dict[str, np.ndarray]
LAYER = "layer"  # subject of a measure of the whole layer


class Measure(NamedTuple):
    """Rows of one measure: subjects, and for each of them a number or NaN; a scalar holds for all of them."""

    name: str
    subjects: list[str]
    value: np.ndarray
    low: np.ndarray | float = np.nan
    high: np.ndarray | float = np.nan
    chance: np.ndarray | float = np.nan
    random_router: np.ndarray | float = np.nan


def super_experts(largest: dict[int, np.ndarray]) -> dict[int, np.ndarray]:
    """Which experts are super experts: layer -> (N,) bool, from layer -> (N,) largest absolute outputs.

    The rule is that of SUPER_QUANTILE, SUPER_PART and SUPER_DEPTH (layer < 0.75 (last layer with experts + 1)).
    Of few experts the largest is always above the quantile: read the flag beside output_max.
    """
    if not largest:
        return {}
    everyone = np.concatenate(list(largest.values()))
    bound = max(np.quantile(everyone, SUPER_QUANTILE), SUPER_PART * everyone.max())
    deepest = SUPER_DEPTH * (max(largest) + 1)
    return {layer: (values > bound) & (layer < deepest) for layer, values in largest.items()}


def specialization(arrays: Arrays, labels: list[str], flags: np.ndarray, layer: int = 0) -> pl.DataFrame:
    """The measures of one layer and site.

    arrays: see results/README.md; labels: the N routed experts first; flags: (N,) its super experts; layer: seeds the
    resampling, so that a layer's intervals do not depend on which others are recorded.
    """
    generator = np.random.default_rng([SEED, layer])
    tokens = arrays["choice_tokens"]
    # An empty block is no document that could be drawn.
    kept = (tokens > 0) | (tokens.sum() == 0)
    arrays = {
        name: array[kept] if _is_by_block(name) and len(array) == len(kept) else array for name, array in arrays.items()
    }
    weights = Weights(generator)
    experts = arrays["choice_any"].shape[1]
    names = labels[:experts]
    frames = [
        _frame(measure)
        for part in (_load, _pairs, _repeats, _vocabulary)
        for measure in part(arrays, names, weights, generator)
    ]
    frames += [_frame(measure) for part in (_confidence, _importance) for measure in part(arrays, names, weights)]
    frames.append(_frame(Measure("super_expert", names, flags.astype(np.float64), chance=1 - SUPER_QUANTILE)))
    return pl.concat(frames).with_columns(tokens=pl.lit(int(tokens.sum()), pl.Int64))


def _is_by_block(name: str) -> bool:
    """Whether an array of this name has a first axis of blocks; those of all blocks together have one there."""
    if name.startswith(("confidence_", "importance_")):
        return name != "importance_output_max"
    return name.startswith("choice_") and not name.startswith("choice_random_") and not name.endswith(("_used", "_ids"))


def _frame(measure: Measure) -> pl.DataFrame:
    columns = {"measure": [measure.name] * len(measure.subjects), "subject": measure.subjects}
    for name in ("value", "chance", "low", "high", "random_router"):
        columns[name] = np.broadcast_to(np.asarray(getattr(measure, name), np.float64), len(measure.subjects))
    return pl.DataFrame(columns).with_columns(pl.col(pl.Float64).fill_nan(None))


def _layer_measure(
    name: str,
    statistic: Statistic,
    weights: np.ndarray,
    counts: np.ndarray,
    random: np.ndarray,
    chance: float,
    most=1.0,
) -> Measure:
    """A measure of the whole layer: `statistic` of counts summed over blocks, and of the random router's counts."""
    value, low, high = interval(resample(statistic, weights(len(counts)), counts), 0.0, most)
    return Measure(name, [LAYER], value[None], low, high, chance, statistic(random.sum(0)[None].astype(np.float64)))


def _mean_choices(arrays: Arrays) -> float:
    """Experts that a token chooses on average: k, where no slot is ever empty."""
    used = arrays["choice_used"]
    return float(measures.divide(used @ np.arange(len(used)), used.sum()))


def _load(arrays, names, weights, generator) -> Iterator[Measure]:
    counts, random, experts = arrays["choice_any"], arrays["choice_random_any"], len(names)
    tokens, choices = int(arrays["choice_tokens"].sum()), _mean_choices(arrays)
    even = np.full((1, experts), np.nan)
    if tokens:
        even = measures.even_loads(tokens, choices, experts, generator, DRAWS)
    for name, statistic, most in (
        ("load_entropy", measures.load_entropy, 1.0),
        ("max_vio", measures.max_vio, experts - 1.0),
    ):
        yield _layer_measure(name, statistic, weights, counts, random, float(statistic(even).mean()), most=most)
    none = (1 - choices / experts) ** tokens if tokens else np.nan
    yield _layer_measure("dead_share", measures.dead_share, weights, counts, random, none)
    drawn = weights(len(counts))
    share = measures.divide(drawn @ counts, (drawn @ arrays["choice_tokens"])[:, None])
    yield Measure(
        "load_share",
        names,
        *interval(share, 0, 1),
        chance=choices / experts,
        random_router=measures.divide(random.sum(0), tokens),
    )


def _pairs(arrays, names, weights, generator) -> Iterator[Measure]:
    pairs, random, experts = arrays["choice_pairs"], arrays["choice_random_pairs"], len(names)
    used = arrays["choice_used"]
    slots = np.arange(len(used))
    chance = float(measures.divide(used @ (slots * (slots - 1)), (used @ slots) * (experts - 1)))
    resampled = resample(measures.co_activation, weights(len(pairs)), pairs) - chance
    first, second = np.nonzero(~np.eye(experts, dtype=bool))
    value, low, high = (part[first, second] for part in interval(resampled, -chance, 1 - chance))
    other = (measures.co_activation(random.sum(0).astype(np.float64)) - chance)[first, second]
    subjects = [f"{names[i]},{names[j]}" for i, j in zip(first, second, strict=True)]
    yield Measure("co_activation", subjects, value, low, high, 0.0, other)
    if experts > 1:
        chosen = arrays["choice_any"].sum(0)
        deviation = measures.mean_binomial_deviation(chosen[chosen > 0], chance)
        yield _layer_measure(
            "co_activation", lambda total: measures.mean_deviation(total, chance), weights, pairs, random,
            float(deviation.mean()) if len(deviation) else np.nan,
        )._replace(subjects=["mean_abs"])  # fmt: skip


def _repeats(arrays, names, weights, generator) -> Iterator[Measure]:
    chances = (1 / len(names), measures.common_expert(arrays["choice_used"], len(names)))
    for column, (name, chance) in enumerate(zip(("repeat_top1", "repeat_any"), chances, strict=True), start=1):

        def rate(counts, column=column):
            return measures.divide(counts[..., column], counts[..., 0])

        counts = arrays["choice_repeats"], arrays["choice_random_repeats"]
        yield _layer_measure(name, rate, weights, *counts, chance)


def _vocabulary(arrays, names, weights, generator) -> Iterator[Measure]:
    for name, statistic, table in (
        ("vocabulary_input", measures.largest_share, "input"),
        ("vocabulary_next", measures.largest_share, "next"),
        ("context_independence", measures.context_independence, "input"),
    ):
        counts, random = arrays[f"choice_{table}"], arrays[f"choice_random_{table}"]
        chance = measures.permuted(statistic, counts.sum(0), PERMUTATIONS, generator)
        yield _layer_measure(name, statistic, weights, counts, random, chance)


def _confidence(arrays, names, weights) -> Iterator[Measure]:
    by_block = weights(len(arrays["choice_tokens"]))
    tokens = by_block @ arrays["choice_tokens"]
    chances = {"entropy": 1.0, "margin": 0.0, "mass": (len(arrays["choice_used"]) - 1) / len(names)}
    for key, chance in chances.items():
        drawn = measures.divide(by_block @ arrays[f"confidence_{key}"], tokens)
        name = {"entropy": "confidence_entropy", "margin": "margin", "mass": "topk_mass"}[key]
        value, low, high = interval(drawn, 0, 1)
        yield Measure(name, [LAYER], value[None], low, high, chance)


def _importance(arrays, names, weights) -> Iterator[Measure]:
    by_block = weights(len(arrays["choice_tokens"]))
    tokens = (by_block @ arrays["choice_tokens"])[:, None]
    chosen = by_block @ arrays["importance_count"]
    for name, key, below in (
        ("reap", "importance_reap", chosen),
        ("expert_norm", "importance_norm", tokens),
        ("gate_mass", "importance_gate", tokens),
    ):
        sums = by_block @ arrays[key]
        drawn = measures.divide(sums, below)
        mean = measures.divide(sums[0].sum(), np.broadcast_to(below[0], sums[0].shape).sum())
        value, low, high = interval(drawn)
        yield Measure(name, names, value, low, high, float(mean))
    yield Measure("output_max", names, arrays["importance_output_max"].astype(np.float64))


def flags_by_layer(largest: Iterable[tuple[dict, np.ndarray]]) -> dict[tuple[int, str], np.ndarray]:
    """Super experts of a model, (layer, site) -> (N,) bool, each site by itself; `largest`: (entry, (N,)) each."""
    by_site: dict[str, dict[int, np.ndarray]] = {}
    for entry, values in largest:
        by_site.setdefault(entry["site"], {})[entry["layer"]] = values
    return {(layer, site): flags for site, own in by_site.items() for layer, flags in super_experts(own).items()}

"""Table saturation: how far earlier revisions of a model choose the experts that its last one chooses.

Source: router saturation of OLMoE (Muennighoff et al., 2409.02060, section 5.1), for any series of models that read
the same tokens. For two models, such as one before and after instruction tuning, it is their difference. Position 0 of
every sequence is left out.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl

from moe_atlas import tables
from moe_atlas.behavioral.measures import divide, js_divergence
from moe_atlas.behavioral.resampling import FEWEST_BLOCKS, block_weights, interval
from moe_atlas.errors import AtlasError

SEED = 0
EXCHANGES = 999
RUN_TOKENS = 8  # tokens of a run, where there are too few sequences to resample


@dataclass(frozen=True)
class Choices:
    """The choices of one model of a series on one corpus: its tables routing, load and tokens."""

    series: str
    model: str
    corpus: str
    routing: pl.DataFrame
    load: pl.DataFrame
    tokens: pl.DataFrame


def units_of(tokens: pl.DataFrame) -> tuple[np.ndarray, str]:
    """The unit that each row of the table tokens is resampled with, (T,) from 0, and its name.

    Sequences where 5 or more have a counted token; else runs of 8 tokens of a sequence. Position 0 has unit -1.
    """
    sequence, position = tokens["sequence"].to_numpy(), tokens["position"].to_numpy()
    counted = position > 0
    by_sequence = len(np.unique(sequence[counted])) >= FEWEST_BLOCKS
    unit = sequence if by_sequence else sequence * (position.max() + 1) + (position - 1) // RUN_TOKENS
    units = np.full(len(tokens), -1)
    units[counted] = np.unique(unit[counted], return_inverse=True)[1]
    return units, "sequence" if by_sequence else "run"


def _chosen(choices: Choices, rows: pl.DataFrame, experts: int) -> tuple[np.ndarray, np.ndarray]:
    """Chosen experts (T, N) bool and first choices (T,), -1 for none, of one layer and site."""
    places = choices.tokens.select("sequence", "position").with_row_index("t")
    rows = rows.join(places, on=["sequence", "position"], how="left", maintain_order="left")
    token, expert = rows["t"].to_numpy(), rows["expert"].cast(pl.Int64).to_numpy()
    chosen, first = np.zeros((len(places), experts), dtype=bool), np.full(len(places), -1)
    chosen[token, expert] = True
    best = rows["rank"].to_numpy() == 0
    first[token[best]] = expert[best]
    return chosen, first


def _check(choices: Choices, end: Choices) -> None:
    """Both read the same tokens with as many experts in the same layers."""
    mend = f"empty the cell series of {choices.model} in the models sheet."
    if not choices.tokens.drop("model", "token").equals(end.tokens.drop("model", "token")):
        raise AtlasError(
            f"series {choices.series}: {choices.model} reads the corpus {choices.corpus} as other tokens than "
            f"{end.model}, so their choices cannot be compared; {mend}"
        )
    experts = [
        part.load.select("layer", "site", "expert").unique().sort("layer", "site", "expert") for part in (choices, end)
    ]
    if not experts[0].equals(experts[1]):
        raise AtlasError(
            f"series {choices.series}: {choices.model} has other layers or another number of experts than "
            f"{end.model}, so they are no revisions of one model; {mend}"
        )


def _numbers(own: tuple, end: tuple, units: np.ndarray, generator: np.random.Generator) -> dict:
    """The numeric columns of one row. own, end: (chosen (T, N), first (T,)); units: (T,), -1 left out."""
    counted = units >= 0
    (chosen, first), (chosen_end, first_end) = ((part[0][counted], part[1][counted]) for part in (own, end))
    units, experts = units[counted], chosen.shape[1]
    count = int(units.max()) + 1 if len(units) else 0

    def by_unit(values: np.ndarray) -> np.ndarray:
        total = np.zeros((count, *values.shape[1:]))
        np.add.at(total, units, values)
        return total

    tokens = by_unit(np.ones(len(units)))
    weights = block_weights(max(count, 1), generator) if count else np.ones((1, 0))
    share = divide((chosen & chosen_end).sum(1), chosen_end.sum(1))
    numbers = {"units": count, "tokens": len(units)}
    chances = {"overlap": chosen.sum() / max(len(units), 1) / experts, "top1": 1 / experts}
    for name, values in (("overlap", share), ("top1", (first == first_end) & (first >= 0))):
        drawn = divide(weights @ by_unit(values.astype(np.float64)), weights @ tokens)
        prefix = "" if name == "overlap" else f"{name}_"
        numbers |= dict(zip((name, f"{prefix}low", f"{prefix}high"), interval(drawn, 0, 1), strict=True))
        numbers[f"{prefix}chance"] = chances[name]
    loads = by_unit(chosen), by_unit(chosen_end)
    drawn = js_divergence(*(weights @ load for load in loads))
    numbers |= dict(zip(("js_divergence", "js_low", "js_high"), interval(drawn, 0, 1), strict=True))
    numbers["js_chance"], numbers["js_p_value"] = exchange_test(*loads, generator)
    return {name: value if isinstance(value, int) else float(value) for name, value in numbers.items()}


def exchange_test(first: np.ndarray, second: np.ndarray, generator: np.random.Generator) -> tuple[float, float]:
    """Mean divergence and p value when the two models' loads (U, N) are exchanged in units drawn by a coin.

    NaN, NaN below 5 units.
    """
    if len(first) < FEWEST_BLOCKS:
        return np.nan, np.nan
    kept = generator.integers(2, size=(EXCHANGES, len(first))).astype(np.float64)
    drawn = js_divergence(kept @ first + (1 - kept) @ second, kept @ second + (1 - kept) @ first)
    observed = js_divergence(first.sum(0), second.sum(0))
    return float(drawn.mean()), (1 + int((drawn >= observed * (1 - 1e-9)).sum())) / (1 + EXCHANGES)


def _compare(choices: Choices, end: Choices) -> Iterator[dict]:
    _check(choices, end)
    units, unit = units_of(end.tokens)
    keys = ("layer", "site")
    parts = [part.routing.partition_by(*keys, as_dict=True) for part in (choices, end)]
    sizes = {key: part["expert"].n_unique() for key, part in end.load.partition_by(*keys, as_dict=True).items()}
    for key, experts in sizes.items():
        own, last = (
            _chosen(part, rows.get(key, part.routing.clear()), experts)
            for part, rows in zip((choices, end), parts, strict=True)
        )
        row = {"series": choices.series, "model": choices.model, "end": end.model, "corpus": choices.corpus}
        numbers = _numbers(own, last, units, np.random.default_rng([SEED, key[0]]))
        yield row | dict(zip(keys, key, strict=True)) | numbers | {"unit": unit}


def saturation(recorded: Sequence[Choices]) -> pl.DataFrame:
    """The table: each model of a series against the last one; models in the order of the sheet.

    Raises AtlasError when models of a series read other tokens or differ in layers or experts.
    """
    rows = []
    for series, corpus in dict.fromkeys((choices.series, choices.corpus) for choices in recorded):
        *earlier, end = [part for part in recorded if (part.series, part.corpus) == (series, corpus)]
        rows += itertools.chain(*(_compare(choices, end) for choices in earlier))
    frame = pl.DataFrame(rows, schema=tables.ACROSS["saturation"].schema)
    return tables.conform("saturation", frame.with_columns(pl.col(pl.Float64).fill_nan(None)))

"""Numbers of the paper beside ours: one function an item, each from tables of one model to a number, a text or None."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl

from moe_atlas import tables
from moe_atlas.claims.read import MATRICES, pairs_with, routed
from moe_atlas.errors import AtlasError
from moe_atlas.sheets import load_rows, suggest

# Layers over which the paper's table 2 is a mean, by the number of layers with experts.
_MATCHED_LAYERS = {32: (0, 5, 10, 15, 20, 25, 30, 31), 27: (1, 5, 10, 15, 20, 25, 27), 64: (0,)}
_NUMBER = re.compile(r"[+-]?\d+(\.\d+)?", re.ASCII)
Frames = Mapping[str, pl.DataFrame]


@dataclass(frozen=True)
class Published:
    """One row of config/published.tsv. layer: -1 stands for none. value: a number, or lists of experts as text."""

    item: str
    model: str  # OWNER/NAME on the Hub
    corpus: str
    layer: int
    subject: str
    value: str
    tolerance: float
    place: str


def bfloat16(values: np.ndarray) -> np.ndarray:
    """Rounded to bfloat16, to nearest and half to even, as float64. Values are finite."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32).astype(np.uint64)
    rounded = (bits + 0x7FFF + ((bits >> np.uint64(16)) & np.uint64(1))) >> np.uint64(16) << np.uint64(16)
    return rounded.astype(np.uint32).view(np.float32).astype(np.float64)


def _router_r(similarity: pl.DataFrame, matrix: str, rounded: bool) -> dict[int, float]:
    """Pearson r of router and mean-neuron similarity by layer; `rounded` takes similarities in bfloat16."""
    both = routed(similarity).filter(
        ((pl.col("matrix") == matrix) & (pl.col("level") == "neuron_mean")) | (pl.col("matrix") == "router")
    )
    wide = both.pivot("matrix", index=["layer", "a", "b"], values="cosine").sort("layer")
    found = {}
    for (layer,), part in wide.partition_by("layer", as_dict=True).items():
        x, y = (part[name].to_numpy().astype(np.float64) for name in (matrix, "router"))
        if rounded:
            x, y = bfloat16(x), bfloat16(y)
        if len(x) > 2 and np.ptp(x) > 0 and np.ptp(y) > 0:
            found[layer] = float(np.corrcoef(x, y)[0, 1])
    return found


def router_act_r(row: Published, frames: Frames, rounded: bool) -> float | None:
    """Pearson r of router similarity with that of mean act neurons in one layer (table 5)."""
    return _router_r(frames["similarity"].filter(layer=row.layer), "act", rounded).get(row.layer)


def router_mean_r2(row: Published, frames: Frames, rounded: bool) -> float | None:
    """Mean over layers of r squared (table 3), each rounded to two digits first where `rounded`."""
    squares = [r * r for r in _router_r(frames["similarity"], row.subject, rounded).values()]
    return float(np.mean([round(value, 2) if rounded else value for value in squares])) if squares else None


def weight_similarity(row: Published, frames: Frames, rounded: bool) -> float | None:
    """Mean matrix-level cosine over layers, matrices and pairs of routed experts, or of experts with F."""
    part = frames["similarity"].filter(pl.col("level") == "matrix", pl.col("matrix").is_in(MATRICES))
    return (routed(part) if row.subject == "routed" else pairs_with(part, row.subject))["cosine"].mean()


def matching_tau(row: Published, frames: Frames, rounded: bool) -> float | None:
    """Mean Kendall tau of matched neurons over the paper's layers, the three matrices and pairs of routed experts."""
    layers = _MATCHED_LAYERS.get(frames["similarity"]["layer"].n_unique(), ())
    part = frames["matching"].filter(pl.col("layer").is_in(layers), pl.col("matrix").is_in(MATRICES))
    return routed(part)["tau"].mean()


def tokens(row: Published, frames: Frames, rounded: bool) -> float | None:
    """Tokens of the text, special ones included."""
    return len(frames["tokens"]) or None


def active_share(row: Published, frames: Frames, rounded: bool) -> float | None:
    """Mean over layers and experts of the share of neurons with an activation above 0.001 in absolute value."""
    part = frames["activation_ratio"]
    part = part.filter((pl.col("threshold") - 0.001).abs() < 1e-9, pl.col("expert").str.contains(r"^\d+$"))
    return part["ratio"].mean()


def rank_count(row: Published, frames: Frames, rounded: bool) -> float | None:
    """Tokens, summed over layers, whose expert with this norm rank has this score rank; ranks here count from 1."""
    score, norm = map(int, re.findall(r"\d+", row.subject))
    part = frames["rank_counts"].filter(score_rank=score - 1, norm_rank=norm - 1)
    return part["count"].sum() if len(part) else None


def _choices(row: Published, frames: Frames) -> list[tuple[int, ...]]:
    """Chosen experts of each token of a layer, best first."""
    part = frames["routing"].filter(layer=row.layer, site="ffn").sort("sequence", "position", "rank")
    grouped = part.group_by("sequence", "position", maintain_order=True).agg(pl.col("expert").cast(pl.Int64))
    return [tuple(experts) for experts in grouped["expert"].to_list()]


def _parsed(text: str) -> list[tuple[int, ...]]:
    return [tuple(map(int, re.findall(r"\d+", part))) for part in re.findall(r"\([^)]*\)", text)]


def _written(choices: Sequence[tuple[int, ...]]) -> str:
    return " ".join("(" + ",".join(map(str, experts)) + ")" for experts in choices)


def chosen_experts(row: Published, frames: Frames, rounded: bool) -> str | None:
    """Chosen experts of every token, best first."""
    return _written(_choices(row, frames)) or None


def chosen_experts_of_some(row: Published, frames: Frames, rounded: bool) -> str | None:
    """The published text where some tokens, in order, have these sets of experts; else the sets of all tokens."""
    ours = _choices(row, frames)
    left = iter([set(experts) for experts in ours])
    found = all(any(set(wanted) == experts for experts in left) for wanted in _parsed(row.value))
    return row.value if ours and found else _written(ours) or None


def output_cosine(row: Published, frames: Frames, rounded: bool) -> float | None:
    """Mean cosine of outputs of routed experts, or of these with F, on the tokens with this choice of experts."""
    label, wanted = row.subject.split()
    part = frames["routing"].filter(layer=row.layer, site="ffn").sort("sequence", "position", "rank")
    grouped = part.group_by("sequence", "position", maintain_order=True).agg(pl.col("expert").cast(pl.Int64))
    kept = [tuple(experts) == _parsed(wanted)[0] for experts in grouped["expert"].to_list()]
    cosines = frames["output_similarity_tokens"].filter(layer=row.layer, site="ffn")
    cosines = cosines.join(grouped.filter(pl.Series(kept, dtype=pl.Boolean)), on=["sequence", "position"])
    return (routed(cosines) if label == "routed" else pairs_with(cosines, label))["cosine"].mean()


# Item -> tables it is computed from, function.
ITEMS: dict[str, tuple[tuple[str, ...], Callable[[Published, Frames, bool], float | str | None]]] = {
    "router_mean_r2": (("similarity",), router_mean_r2),
    "router_act_r": (("similarity",), router_act_r),
    "weight_similarity": (("similarity",), weight_similarity),
    "matching_tau": (("similarity", "matching"), matching_tau),
    "tokens": (("tokens",), tokens),
    "active_share": (("activation_ratio",), active_share),
    "rank_count": (("rank_counts",), rank_count),
    "chosen_experts": (("routing",), chosen_experts),
    "chosen_experts_of_some": (("routing",), chosen_experts_of_some),
    "output_cosine": (("routing", "output_similarity_tokens"), output_cosine),
}
TABLES = tuple(dict.fromkeys(name for needed, _ in ITEMS.values() for name in needed))


def load_published(path: str | Path) -> list[Published]:
    """The published numbers, in the order of the sheet. Raises AtlasError on the first fault."""
    found = []
    for place, row in load_rows(path, "published"):
        item, value = row["item"], row["value"]
        if item not in ITEMS:
            raise AtlasError(
                f"{place}, column item: there is no item {item}{suggest(item, ITEMS)}; they are {', '.join(ITEMS)}."
            )
        if not (_parsed(value) if item.startswith("chosen_experts") else _NUMBER.fullmatch(value)):
            wanted = "lists such as (5,3) (0,7)" if item.startswith("chosen_experts") else "a number"
            raise AtlasError(f"{place}, column value: {value!r} is not what {item} has; write {wanted}.")
        found.append(Published(**row))
    return found


def compare(
    published: Sequence[Published], rows: Mapping[str, Sequence[str]], frames_of: Callable, rounded: bool
) -> pl.DataFrame:
    """Table "published".

    rows: repository -> ids of the model sheet's rows that have it. frames_of(row id, corpus or "", table names) -> the
    model's frames. rounded: similarities of tables 3 and 5 are rounded to bfloat16 first, as the paper's code did.
    A published number without such a row stays, with ours null.
    """
    found = []
    for row in published:
        needed, function = ITEMS[row.item]
        for name in rows.get(row.model, ()) or (None,):
            ours = None if name is None else function(row, frames_of(name, row.corpus, needed), rounded)
            found.append(_line(row, name, ours))
    return tables.conform("published", pl.DataFrame(found, schema_overrides=tables.declared("published").schema))


def _line(row: Published, name: str | None, ours: float | str | None) -> dict:
    line = {"item": row.item, "model": row.model, "row": name, "corpus": row.corpus or None, "published": row.value}
    line |= {"layer": row.layer if row.layer >= 0 else None, "subject": row.subject or None, "place": row.place}
    line |= {"tolerance": row.tolerance, "difference": None, "agrees": None, "ours": None}
    if ours is None:
        return line
    if isinstance(ours, str):
        return line | {"ours": ours, "agrees": ours == row.value}
    difference = float(ours) - float(row.value)
    return line | {"ours": f"{ours:.6g}", "difference": difference, "agrees": abs(difference) <= row.tolerance + 1e-9}

"""Attention experts against FFN experts of the same layer: differences over the same resamples of documents."""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from moe_atlas.behavioral.domain import permutation_test
from moe_atlas.behavioral.measures import js_divergence, load_entropy, max_vio
from moe_atlas.behavioral.resampling import interval
from moe_atlas.heads.frames import Row


@dataclass(frozen=True)
class Summary:
    """Of one layer and site on one text: loads (B, E) by block, the resamples (R, B) of all sites of that text, and
    corrected information (R,)."""

    loads: np.ndarray
    drawn_blocks: np.ndarray
    information: np.ndarray


def _row(measure: str, attention: np.ndarray, ffn: np.ndarray) -> Row:
    value, low, high = interval(attention - ffn)
    numbers = {"attention": float(attention[0]), "ffn": float(ffn[0]), "difference": float(value)}
    return {"measure": measure, "low": float(low), "high": float(high)} | numbers


def site_rows(attention: Summary, ffn: Summary) -> list[Row]:
    """Rows of moa_sites of one layer on one text."""
    rows = [_row("information", attention.information, ffn.information)]
    for name, measure in (("entropy", load_entropy), ("max_vio", max_vio)):
        rows.append(_row(name, *(measure(one.drawn_blocks @ one.loads) for one in (attention, ffn))))
    return rows


def domain_rows(
    attention: Mapping[str, Summary], ffn: Mapping[str, Summary], generator: np.random.Generator
) -> list[Row]:
    """Rows `domain` of one layer: how differently experts are used on each two texts, by site; text -> summary."""
    rows: list[Row] = []
    for pair in itertools.combinations(attention, 2):
        values = []
        for of in (attention, ffn):
            first, second = (of[corpus] for corpus in pair)
            count = min(len(first.drawn_blocks), len(second.drawn_blocks))
            drawn = js_divergence(*(one.drawn_blocks[:count] @ one.loads for one in (first, second)))
            chance, _ = permutation_test(first.loads, second.loads, generator)
            values.append(drawn - chance)
        rows.append(_row("domain", *values) | {"corpus": ",".join(pair)})
    return rows

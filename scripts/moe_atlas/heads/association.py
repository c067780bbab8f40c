"""Which token types an expert is chosen by: PMI, NPMI and information, beside experts exchanged within sequences.

An observation is one choice: a token of type w whose router chose expert i. PMI(w, i) = log of n(w, i) n / (n(w) n(i)),
which MoA (arXiv 2210.05144, section 5) prints without the log; NPMI = PMI / -log(n(w, i) / n). One number for a layer
is I(w; i) / H(i), which is 1 where k = 1 and the type decides; with k choices a token it is at most 1 - log k / H(i).
Counts of rare types give information whatever the router does: types below FEWEST tokens are left out, and what is left
of the effect is in the null. The null exchanges the experts of tokens of one sequence, so that what a whole sequence
prefers stays in it.
"""

from dataclasses import dataclass

import numpy as np

from moe_atlas.behavioral.measures import context_independence, divide, entropy
from moe_atlas.behavioral.resampling import interval, resample
from moe_atlas.heads.frames import Row, null, p_value

FEWEST = 20  # tokens of a type that is counted
PERMUTATIONS = 200
BEST = 10  # types listed of an expert


@dataclass(frozen=True)
class Choices:
    """Choices of one layer by token: ids (T, k) experts, of E; types (T,), sequences (T,), blocks (T,) of B blocks."""

    ids: np.ndarray
    types: np.ndarray
    sequences: np.ndarray
    blocks: np.ndarray
    experts: int
    count: int

    def frequent(self) -> "Choices":
        """Only the tokens of types with FEWEST tokens or more."""
        types, place, tokens = np.unique(self.types, return_inverse=True, return_counts=True)
        return self.of(tokens[place] >= FEWEST)

    def of(self, kept: np.ndarray) -> "Choices":
        """The tokens that a mask (T,) keeps."""
        parts = (part[kept] for part in (self.ids, self.types, self.sequences, self.blocks))
        return Choices(*parts, self.experts, self.count)


def counted(ids: np.ndarray, place: np.ndarray, types: int, experts: int) -> np.ndarray:
    """n(w, i), (V, E) int64: ids (T, k), place (T,) of each token's type among V."""
    cells = place[:, None] * experts + ids
    return np.bincount(cells.ravel(), minlength=types * experts).reshape(types, experts)


def pmi(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """PMI in nats and NPMI of counts (V, E); minus infinity and -1 where a pair never comes."""
    total = counts.sum()
    joint = divide(counts, total)
    expected = joint.sum(1, keepdims=True) * joint.sum(0, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore"):
        value = np.log(joint) - np.log(expected)
        normed = np.where(joint > 0, value / -np.log(joint), -1.0)
    # A pair that is all there is comes always together.
    return value, np.where(joint >= 1, 1.0, normed)


class Exchanges:
    """Permutations of the tokens of a text within their sequences, the same ones for all layers. sequences: (T,)."""

    def __init__(self, sequences: np.ndarray, generator: np.random.Generator, draws: int = PERMUTATIONS):
        order = np.argsort(sequences, kind="stable")
        self.orders = []
        for _ in range(draws):
            shuffled = np.lexsort((generator.random(len(sequences)), sequences))
            drawn = np.empty(len(order), dtype=np.int32)  # there are many
            drawn[order] = shuffled
            self.orders.append(drawn)


@dataclass(frozen=True)
class Association:
    """What was counted of one layer. types (V,) ids; counts (V, E); reached (V, E) exchanges whose count is as high;
    information: the value with its resamples (R,); nulls (P,) under exchange; experts' information at most `most`."""

    types: np.ndarray
    tokens: np.ndarray
    counts: np.ndarray
    reached: np.ndarray
    information: np.ndarray
    nulls: np.ndarray
    most: float

    @property
    def corrected(self) -> np.ndarray:
        """Information less its mean under exchange, (R,)."""
        return self.information - (self.nulls.mean() if len(self.nulls) else np.nan)


def associate(choices: Choices, exchanges: Exchanges, drawn_blocks: np.ndarray) -> Association:
    """Counts, information and null of `choices`, which are of frequent types; drawn_blocks: (R, B)."""
    types, place, tokens = np.unique(choices.types, return_inverse=True, return_counts=True)
    experts, size = choices.experts, len(types)
    counts = counted(choices.ids, place, size, experts)
    nulls, reached = [], np.zeros_like(counts)
    for order in exchanges.orders if size else ():
        found = counted(choices.ids[order], place, size, experts)
        nulls.append(context_independence(found))
        reached += found >= counts
    by_block = np.zeros((choices.count, size * experts))
    cells = (place[:, None] * experts + choices.ids).ravel()
    rows = np.repeat(choices.blocks, choices.ids.shape[1])
    np.add.at(by_block, (rows, cells), 1)
    shape = (choices.count, size, experts)
    information = resample(context_independence, drawn_blocks, by_block.reshape(shape)) if size else np.full(1, np.nan)
    nats = float(entropy(counts.sum(0))) * np.log(2)
    most = 1 - float(divide(np.log(choices.ids.shape[1]), nats)) if size else np.nan
    return Association(types, tokens, counts, reached, information, np.array(nulls, dtype=np.float64), most)


def association_row(found: Association) -> Row:
    """The layer's row of moa_association."""
    value, low, high = interval(found.corrected)
    return {
        "measure": "information",
        "value": float(found.information[0]),
        "corrected": float(value),
        "low": float(low),
        "high": float(high),
        "p_value": p_value(float(found.information[0]), found.nulls),
        "most": found.most,
        "types": len(found.types),
        "tokens": int(found.tokens.sum()),
    } | null(found.nulls)


def token_rows(found: Association, text_of, best: int = BEST) -> list[Row]:
    """Rows of moa_tokens: the types of the largest NPMI of each expert, those above 0; text_of(id) names a type."""
    rows: list[Row] = []
    if not len(found.types):
        return rows
    value, normed = pmi(found.counts)
    draws = len(found.nulls)
    for expert in range(found.counts.shape[1]):
        order = np.argsort(-normed[:, expert], kind="stable")[:best]
        for rank, at in enumerate(order[normed[order, expert] > 0]):
            rows.append(
                {
                    "expert": str(expert),
                    "rank": rank,
                    "token_id": int(found.types[at]),
                    "token": text_of(int(found.types[at])),
                    "count": int(found.counts[at, expert]),
                    "tokens": int(found.tokens[at]),
                    "pmi": float(value[at, expert]),
                    "npmi": float(normed[at, expert]),
                    "p_value": float((1 + found.reached[at, expert]) / (1 + draws)),
                }
            )
    return rows

"""Which token types an expert is chosen by: PMI, NPMI and information, beside experts exchanged within sequences.

An observation is one choice: a token of type w whose router chose expert i. PMI(w, i) = log of n(w, i) n / (n(w) n(i)),
which MoA (arXiv 2210.05144, section 5) prints without the log; NPMI = PMI / -log(n(w, i) / n). One number for a layer
is I(w; i) / (H(i) - log k), which is 1 where the type decides: k different choices leave log k of H(i) open whatever
decides them. I(w; i) / H(i), which is printed elsewhere, is at most 1 - log k / H(i). That is more for a router that
uses its experts more evenly, so that two routers which the type decides alike would seem to differ.
Counts of rare types give information whatever the router does: types below FEWEST tokens are left out, and what is left
of the effect is in the null. The null exchanges the experts of tokens of one sequence, so that what a whole sequence
prefers stays in it.
"""

from dataclasses import dataclass

import numpy as np

from moe_atlas.behavioral.measures import divide, entropy
from moe_atlas.behavioral.resampling import interval, resample
from moe_atlas.heads.frames import Row, null, p_value

FEWEST = 20  # tokens of a type that is counted
PERMUTATIONS = 200
BEST = 10  # types listed of an expert
_OPEN = 1e-9  # bits: less that can be told is rounding


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


def mutual_information(table: np.ndarray) -> np.ndarray:
    """I(w; i) in bits of counts (..., V, E): (...)."""
    joint = entropy(table.reshape(*table.shape[:-2], table.shape[-2] * table.shape[-1]))
    return np.maximum(entropy(table.sum(-1)) + entropy(table.sum(-2)) - joint, 0)


def tellable(load: np.ndarray, top_k: int) -> np.ndarray:
    """H(i) - log k in bits of loads (..., E): most that anything tells of k choices a token. NaN where nothing can be
    told: k = E, or the same k experts for all tokens."""
    found = entropy(load) - np.log2(top_k)
    return np.where(found > _OPEN, found, np.nan)


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
    information: share of what can be told, with its resamples (R,); nulls (P,) the same under exchange; of_entropy:
    information over H(i), at most `most`."""

    types: np.ndarray
    tokens: np.ndarray
    counts: np.ndarray
    reached: np.ndarray
    information: np.ndarray
    nulls: np.ndarray
    of_entropy: float
    most: float

    @property
    def corrected(self) -> np.ndarray:
        """0 for what exchanges give and 1 where the type decides, (R,): (value - chance) / (1 - chance), as information
        is adjusted for chance by Vinh et al. 2010 (Journal of Machine Learning Research 11, 2837). Two routers that the
        type decides are so alike, where value - chance would be more for the one whose chance is less."""
        chance = self.nulls.mean() if len(self.nulls) else np.nan
        return divide(self.information - chance, 1 - chance)


def associate(choices: Choices, exchanges: Exchanges, drawn_blocks: np.ndarray) -> Association:
    """Counts, information and null of `choices`, which are of frequent types; drawn_blocks: (R, B)."""
    types, place, tokens = np.unique(choices.types, return_inverse=True, return_counts=True)
    experts, size, top_k = choices.experts, len(types), choices.ids.shape[1]
    counts = counted(choices.ids, place, size, experts)
    nulls, reached = [], np.zeros_like(counts)
    for order in exchanges.orders if size else ():
        found = counted(choices.ids[order], place, size, experts)
        nulls.append(mutual_information(found))
        reached += found >= counts
    by_block = np.zeros((choices.count, size * experts))
    cells = (place[:, None] * experts + choices.ids).ravel()
    rows = np.repeat(choices.blocks, top_k)
    np.add.at(by_block, (rows, cells), 1)
    by_block = by_block.reshape(choices.count, size, experts)
    if not size:
        return Association(types, tokens, counts, reached, np.full(1, np.nan), np.empty(0), np.nan, np.nan)
    bits = resample(mutual_information, drawn_blocks, by_block)
    # Rounded: where the type decides, 1 and not a little less, which would be a difference between two routers.
    told = np.round(divide(bits, tellable(drawn_blocks @ by_block.sum(1), top_k)), 12)
    missed = np.array(nulls, dtype=np.float64) / tellable(counts.sum(0), top_k)  # exchanges keep the loads
    whole = float(entropy(counts.sum(0)))
    of_entropy, most = float(divide(bits[0], whole)), 1 - float(divide(np.log2(top_k), whole))
    return Association(types, tokens, counts, reached, told, missed, of_entropy, most)


def association_row(found: Association, other: Association | None = None) -> Row:
    """The layer's row of moa_association. other: of a random router on the same tokens, with the same resamples, which
    it is compared with."""
    value, low, high = interval(found.corrected)
    compared: Row = {}
    if other is not None:
        apart = interval(found.corrected - other.corrected)
        compared = dict(zip(("beyond_random", "beyond_low", "beyond_high"), map(float, apart), strict=True))
    return (
        compared
        | {
            "measure": "information",
            "value": float(found.information[0]),
            "corrected": float(value),
            "low": float(low),
            "high": float(high),
            "p_value": p_value(float(found.information[0]), found.nulls),
            "of_entropy": found.of_entropy,
            "most": found.most,
            "types": len(found.types),
            "tokens": int(found.tokens.sum()),
        }
        | null(found.nulls)
    )


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

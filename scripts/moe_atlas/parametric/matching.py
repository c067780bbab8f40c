"""Neuron matching: are two experts the same neurons in another order?

Source: A Closer Look into Mixture-of-Experts (arXiv 2406.18219), section 4.1.2 and table 2, with two things it lacks:
the value that independent matrices give, since an optimal assignment raises the similarity of anything, and a
joint matching in which a neuron's three vectors keep together.
"""

import functools
import itertools
from collections.abc import Mapping

import lap
import numpy as np
import polars as pl
import torch
from scipy.stats import kendalltau

from moe_atlas import tables
from moe_atlas.architectures.bank import FFN, ExpertBank
from moe_atlas.errors import AtlasError
from moe_atlas.parametric.similarity import REFERENCE, SHARED, check_width

JOINT = "joint"
# (neurons, draws of the null): with more neurons its spread falls and its cost grows with their cube.
NULL_DRAWS = ((512, 32), (2048, 8))
NULL_DRAWS_LARGE, NULL_SHUFFLES = 3, 16
# The null's spread needs more draws than its mean. It is drawn at this many neurons and as wide for its neurons as the
# real shape, and scaled by 1/neurons: from 256 to 1024 neurons that law is right to 10 %, to 25 % for unequal widths.
SPREAD_NEURONS = 512
_SMALLEST_NORM = 1e-8


def neuron_vectors(matrix: torch.Tensor, name: str) -> torch.Tensor:
    """Neurons of one matrix as rows (m, d) float32: rows of up (m, d) and act (m, d), columns of down (d, m)."""
    return (matrix.T if name == "down" else matrix).float()


def directions(neurons: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Unit rows (m, d) and norms (m,) of neurons (m, d) float32; a norm counts as 1e-8 at least."""
    norms = torch.linalg.vector_norm(neurons, dim=1)
    return neurons / norms.clamp_min(_SMALLEST_NORM)[:, None], norms


def assign(similarity: torch.Tensor) -> np.ndarray:
    """The one-to-one matching with the largest sum (Jonker and Volgenant 1987, in float32 like the similarities).

    similarity: (a, b) finite. Returns for each row its column, (a,) int64; -1 where a has more rows than b columns and
    the row stays alone.
    """
    rows, columns = lap.lapjvs(np.negative(similarity.cpu().numpy()), return_cost=False, prefer_float32=True)
    matched = np.full(similarity.shape[0], -1)
    matched[rows] = columns
    return matched


def kendall_tau(matched: np.ndarray, columns: int) -> float | None:
    """Kendall's tau of a full permutation (m,) against the identity; None unless every neuron of both is matched."""
    if len(matched) != columns or len(matched) < 2:
        return None
    return float(kendalltau(np.arange(len(matched)), matched).statistic)


def tau_null_sd(neurons: int) -> float | None:
    """Standard deviation of tau over random permutations of so many neurons (Kendall 1938)."""
    if neurons < 2:
        return None
    return float(np.sqrt(2 * (2 * neurons + 5) / (9 * neurons * (neurons - 1))))


@functools.lru_cache(maxsize=32)
def null_matches(first: int, second: int, width: int, matrices: int) -> np.ndarray:
    """Cosines of matched independent neurons, (draws, matrices, n), n the smaller of first and second.

    Directions are uniform on the sphere in `width` dimensions, the same seed for the same shape. Which neurons are
    matched depends on directions only, so that one set of draws serves every pair of this shape, whatever its norms.
    """
    larger = max(first, second)
    draws = next((draws for most, draws in NULL_DRAWS if larger <= most), NULL_DRAWS_LARGE)
    seeds = np.random.SeedSequence([first, second, width, matrices]).generate_state(draws * matrices * 2)
    found = []
    for draw in seeds.reshape(draws, matrices, 2).tolist():
        similarity = torch.zeros(first, second)
        for left, right in draw:
            similarity.addmm_(_drawn(first, width, left), _drawn(second, width, right).T)
        matched = assign(similarity)
        del similarity
        kept = np.flatnonzero(matched >= 0)
        # Drawn a second time rather than held: of a large layer all of them would be as large as an expert or two.
        pairs = (
            (_drawn(first, width, left)[kept], _drawn(second, width, right)[matched[kept]]) for left, right in draw
        )
        found.append(np.stack([_cosines(*pair) for pair in pairs]))
    return np.stack(found)


def _drawn(neurons: int, width: int, seed: int) -> torch.Tensor:
    """Independent directions (neurons, width) float32, the same for the same seed."""
    return directions(torch.randn(neurons, width, generator=torch.Generator().manual_seed(seed)))[0]


@functools.lru_cache(maxsize=16)
def _shuffles(first: int, second: int) -> tuple[np.ndarray, np.ndarray]:
    """Which neuron's norm goes with which drawn cosine: (shuffles, n) places in a and in b."""
    random, count = np.random.default_rng(first * 7919 + second), min(first, second)
    drawn = [np.stack([random.permutation(size)[:count] for _ in range(NULL_SHUFFLES)]) for size in (first, second)]
    return drawn[0], drawn[1]


def _dealt(first: np.ndarray, second: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Norms dealt out in some random ways: left and right (shuffles, matrices, n), and their lengths' product."""
    places = _shuffles(first.shape[1], second.shape[1])
    left, right = (norms[:, place].transpose(1, 0, 2) for norms, place in zip((first, second), places, strict=True))
    lengths = [np.maximum(np.sqrt((side**2).sum((1, 2))), _SMALLEST_NORM) for side in (left, right)]
    return left, right, lengths[0] * lengths[1]


def null_values(drawn: np.ndarray, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Matched cosine under the null for each draw and each way to deal the norms out, (draws, shuffles).

    drawn: as null_matches gives them; first (matrices, a) and second (matrices, b): norms.
    """
    left, right, lengths = _dealt(first, second)
    return np.einsum("dpn,spn->ds", drawn, left * right) / lengths


def null_moments(first: np.ndarray, second: np.ndarray, width: int) -> tuple[float, float]:
    """Mean and standard deviation of the matched cosine of two independent experts with these norms.

    first (matrices, a), second (matrices, b): norms. Two sources of spread are added up: which norms meet which
    cosines, and how well the directions match. Mean and sd are estimates: 3 to 32 draws, see NULL_DRAWS.
    """
    values = null_values(null_matches(first.shape[1], second.shape[1], width, len(first)), first, second)
    shrunk = max(1.0, max(first.shape[1], second.shape[1]) / SPREAD_NEURONS)
    sizes = [max(2, round(size / shrunk)) for size in (first.shape[1], second.shape[1], width)]
    means = null_matches(*sizes, len(first)).mean(2)  # (draws, matrices)
    left, right, lengths = _dealt(first, second)
    shares = ((left * right).sum(2) / lengths[:, None]).mean(0)
    between = (means @ shares).var(ddof=1) / shrunk**2
    return float(values.mean()), float(np.sqrt(between + values.var(axis=1, ddof=1).mean()))


def _cosines(left: torch.Tensor, right: torch.Tensor) -> np.ndarray:
    """Inner products (n,) float64 of the unit rows of left and right, (n, d) each."""
    return (left * right).sum(1, dtype=torch.float64).cpu().numpy()


class Entry:
    """One expert, the dense reference or the shared expert, its neurons normalised once for all pairs."""

    def __init__(self, matrices: Mapping[str, torch.Tensor]):
        vectors = {name: neuron_vectors(matrix, name) for name, matrix in matrices.items()}
        split = {name: directions(rows) for name, rows in vectors.items()}
        self.rows = {name: rows for name, (rows, _) in split.items()}
        self.norms = {name: norms.double().cpu().numpy() for name, (_, norms) in split.items()}

    @property
    def neurons(self) -> int:
        return len(next(iter(self.norms.values())))


def matched_cosine(first: Entry, second: Entry, names: list[str], left: np.ndarray, right: np.ndarray) -> float:
    """Cosine of the flattened matrices of two entries whose neurons left (n,) and right (n,) lie at the same places."""
    products, lengths = 0.0, np.zeros(2)
    for name in names:
        norms = first.norms[name][left], second.norms[name][right]
        products += (_cosines(first.rows[name][left], second.rows[name][right]) * norms[0] * norms[1]).sum()
        lengths += [(side**2).sum() for side in norms]
    return float(np.clip(products / np.maximum(np.sqrt(lengths), _SMALLEST_NORM).prod(), -1, 1))


def match_pair(first: Entry, second: Entry) -> list[dict]:
    """Rows of the table `matching` for one pair, without model, layer and labels: up, act, down and joint.

    Each matrix is matched by itself, as the paper does, and once jointly: one permutation that maximises the sum of the
    three cosines of a neuron; its cosine is that of the three flattened matrices put together.
    """
    names, rows, joint = [name for name in first.rows if name in second.rows], [], None
    for name in names:
        similarity = first.rows[name] @ second.rows[name].T
        rows.append({"matrix": name} | _compared(first, second, [name], assign(similarity)))
        joint = similarity if joint is None else joint.add_(similarity)
    return [*rows, {"matrix": JOINT} | _compared(first, second, names, assign(joint))]


def _compared(first: Entry, second: Entry, names: list[str], matched: np.ndarray) -> dict:
    """What a matching (a,) of two entries says, and what chance would."""
    kept, everyone = np.flatnonzero(matched >= 0), np.arange(first.neurons)
    same = first.neurons == second.neurons
    norms = (np.stack([side.norms[name] for name in names]) for side in (first, second))
    mean, sd = null_moments(*norms, next(iter(first.rows.values())).shape[1])
    return {
        "cosine_before": matched_cosine(first, second, names, everyone, everyone) if same else None,
        "cosine_after": matched_cosine(first, second, names, kept, matched[kept]),
        "tau": kendall_tau(matched, second.neurons),
        "null_after_mean": mean,
        "null_after_sd": sd,
        "null_tau_sd": tau_null_sd(first.neurons) if same else None,
        "neurons": len(kept),
    }


def chosen_pairs(labels: list[str], most: int) -> list[tuple[str, str]]:
    """All pairs of labels, a before b, without the diagonal; `most` of them where there are more. most 0 keeps all.

    Half of them at most are pairs with F and SE, evenly spaced. Those of routed experts are taken by distance, with the
    neighbour first, so that every expert has about as many pairs as any other.
    """
    pairs = list(itertools.combinations(labels, 2))
    if not most or len(pairs) <= most:
        return pairs
    special = [pair for pair in pairs if not pair[1].isdigit()]
    routed = [label for label in labels if label.isdigit()]
    ring = [
        (routed[min(i, j)], routed[max(i, j)])
        for distance in range(1, len(routed) // 2 + 1)
        for i in range(len(routed) // (1 + (2 * distance == len(routed))))
        for j in [(i + distance) % len(routed)]
    ]
    # Either kind may use what the other leaves.
    count = min(len(special), max(most // 2, most - len(ring)))
    spaced = [special[index] for index in np.linspace(0, len(special) - 1, count).round().astype(int)] if count else []
    kept = set(spaced) | set(ring[: most - count])
    return [pair for pair in pairs if pair in kept]


def chosen_layers(layers: list[int], wanted: str, most: int) -> list[int]:
    """The layers that are matched: those named in `wanted` (comma-separated), else at most `most`, evenly spaced.

    layers: those with experts. Raises AtlasError when another one is named.
    """
    if wanted:
        named = {int(layer) for layer in wanted.split(",")}
        unknown = sorted(named - set(layers))
        if unknown:
            raise AtlasError(
                f"matching_layers {wanted}: layer {unknown[0]} has no experts to match; those that have are "
                f"{', '.join(map(str, layers)) or 'none'}."
            )
        return [layer for layer in layers if layer in named]
    if not most or len(layers) <= most:
        return layers
    return [layers[index] for index in np.linspace(0, len(layers) - 1, most).round().astype(int)]


def neuron_matching(
    bank: ExpertBank, *, model: str, layer: int, reference: FFN | None = None, max_pairs: int = 0
) -> pl.DataFrame:
    """Table "matching" of one layer: every pair once (or `max_pairs` of them), a before b, no diagonal.

    Entries are the N routed experts, then F (`reference`) and SE (the shared expert). Where the widths differ the
    smaller one's neurons are all matched, cosine_before and tau are null. Memory: of one pair the neurons in float32,
    and 12 bytes for each pair of neurons. Raises AtlasError when the reference has another hidden width, or a weight is
    not finite.
    """
    if reference is not None:
        check_width(bank, reference, model)
    parts = {str(expert): {name: stack[expert] for name, stack in bank.matrices.items()} for expert in range(len(bank))}
    for label, ffn in ((REFERENCE, reference), (SHARED, bank.shared)):
        if ffn is not None:
            named = {"up": ffn.up, "act": ffn.act, "down": ffn.down}
            parts[label] = {name: matrix for name, matrix in named.items() if matrix is not None}

    @functools.lru_cache(maxsize=2)
    def entry(label: str) -> Entry:
        made = Entry(parts[label])
        for name, norms in made.norms.items():
            if not np.isfinite(norms).all():
                raise AtlasError(
                    f"{model}, layer {layer}: {name} of expert {label} holds values that are not finite; "
                    "check the checkpoint's files against their published hashes."
                )
        return made

    pairs = chosen_pairs(list(parts), max_pairs)
    rows = [{"a": a, "b": b} | row for a, b in pairs for row in match_pair(entry(a), entry(b))]
    frame = pl.DataFrame(rows, infer_schema_length=None) if rows else tables.empty("matching")
    return tables.conform("matching", frame.with_columns(model=pl.lit(model), layer=pl.lit(layer)))

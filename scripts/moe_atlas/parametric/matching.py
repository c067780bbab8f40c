"""Neuron matching: are two experts the same neurons in another order?

Source: A Closer Look into Mixture-of-Experts (arXiv 2406.18219), section 4.1.2 and table 2, with two things it lacks:
the value that independent matrices give, since an optimal assignment raises the similarity of anything, and a
joint matching in which a neuron's three vectors keep together.
"""

import contextlib
import functools
import itertools
import threading
from collections.abc import Callable, Mapping

import lap
import numpy as np
import polars as pl
import torch
from scipy.stats import kendalltau

from moe_atlas import tables
from moe_atlas.architectures.bank import FFN, ExpertBank
from moe_atlas.errors import AtlasError
from moe_atlas.parallel import each, one_thread_each
from moe_atlas.parametric.chosen import EVERYTHING, Share, chosen_pairs
from moe_atlas.parametric.similarity import REFERENCE, SHARED, check_width

JOINT = "joint"
# (neurons, draws of the null): with more neurons its spread falls and its cost grows with their cube.
NULL_DRAWS = ((512, 32), (2048, 8))
NULL_DRAWS_LARGE, NULL_SHUFFLES = 3, 16
# The null's spread needs more draws than its mean. It is drawn at this many neurons and as wide for its neurons as the
# real shape, and scaled by 1/neurons: from 256 to 1024 neurons that law is right to 10 %, to 25 % for unequal widths.
SPREAD_NEURONS = 512
# Costs of the pairs that are matched side by side, each by one thread. Where those of two pairs do not fit, the threads
# share the products of one pair, and its assignments run beside them.
COST_BYTES = 1 << 30
_ROWS = 1024  # rows of one thread's product
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
    return _cheapest(similarity.neg())


def _cheapest(costs: torch.Tensor) -> np.ndarray:
    """assign of the negative of `costs`. A square matrix in memory of its own is not copied."""
    rows, columns = lap.lapjvs(costs.cpu().numpy(), return_cost=False, prefer_float32=True)
    matched = np.full(costs.shape[0], -1)
    matched[rows] = columns
    return matched


def _add_costs(costs: torch.Tensor, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Take the inner products of first (a, d) and second (b, d) off costs (a, b), in place."""

    def add(start: int) -> None:
        costs[start : start + _ROWS].addmm_(first[start : start + _ROWS], second.T, alpha=-1)

    each(add, range(0, len(first), _ROWS))
    return costs


def _side_by_side(first: int, second: int) -> int:
    """How many pairs of entries with these numbers of neurons are matched at a time: 8 bytes for two neurons."""
    size = max(first, second)
    return max(1, COST_BYTES // (8 * size * size))


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

    def found(draw: list[list[int]]) -> np.ndarray:
        costs = torch.zeros(first, second)
        for seeds_of_pair in draw:
            sides = zip((first, second), seeds_of_pair, strict=True)
            _add_costs(costs, *each(lambda side: _drawn(side[0], width, side[1]), sides))
        matched = _cheapest(costs)
        del costs
        kept = np.flatnonzero(matched >= 0)

        # Drawn a second time rather than held: of a large layer all of them would be as large as an expert or two.
        def cosines(seeds_of_pair: list[int]) -> np.ndarray:
            left, right = seeds_of_pair
            return _cosines(_drawn(first, width, left)[kept], _drawn(second, width, right)[matched[kept]])

        return np.stack(each(cosines, draw, 1))

    together, everything = _side_by_side(first, second), seeds.reshape(draws, matrices, 2).tolist()
    return np.stack(each(found, everything, together) if together > 1 else [found(draw) for draw in everything])


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
    sizes = first.shape[1], second.shape[1], width
    values = null_values(null_matches(*sizes, len(first)), first, second)
    shrunk, smaller = _shrunk(*sizes)
    means = null_matches(*smaller, len(first)).mean(2)  # (draws, matrices)
    left, right, lengths = _dealt(first, second)
    shares = ((left * right).sum(2) / lengths[:, None]).mean(0)
    between = (means @ shares).var(ddof=1) / shrunk**2
    return float(values.mean()), float(np.sqrt(between + values.var(axis=1, ddof=1).mean()))


def _shrunk(first: int, second: int, width: int) -> tuple[float, list[int]]:
    """By how much the null's spread is drawn smaller, and its sizes there."""
    factor = max(1.0, max(first, second) / SPREAD_NEURONS)
    return factor, [max(2, round(size / factor)) for size in (first, second, width)]


def _cosines(left: torch.Tensor, right: torch.Tensor) -> np.ndarray:
    """Inner products (n,) float64 of the unit rows of left and right, (n, d) each."""
    return (left * right).sum(1, dtype=torch.float64).cpu().numpy()


class Entry:
    """One expert, the dense reference or the shared expert, its neurons normalised once for all pairs."""

    def __init__(self, matrices: Mapping[str, torch.Tensor]):
        found = each(lambda item: directions(neuron_vectors(item[1], item[0])), matrices.items())
        split = dict(zip(matrices, found, strict=True))
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
        blocks = [slice(start, start + _ROWS) for start in range(0, len(left), _ROWS)]
        cosines = [_cosines(first.rows[name][left[part]], second.rows[name][right[part]]) for part in blocks]
        products += (np.concatenate([np.zeros(0), *cosines]) * norms[0] * norms[1]).sum()
        lengths += [(side**2).sum() for side in norms]
    return float(np.clip(products / np.maximum(np.sqrt(lengths), _SMALLEST_NORM).prod(), -1, 1))


def match_pair(first: Entry, second: Entry) -> list[dict]:
    """Rows of the table `matching` for one pair, without model, layer and labels: up, act, down and joint.

    Each matrix is matched by itself, as the paper does, and once jointly: one permutation that maximises the sum of the
    three cosines of a neuron; its cosine is that of the three flattened matrices put together.
    """
    names = [name for name in first.rows if name in second.rows]
    matched = _assignments(first, second, names)
    parts = [*([name] for name in names), names]
    found = each(lambda pair: _compared(first, second, *pair), zip(parts, matched, strict=True))
    return [{"matrix": name} | row for name, row in zip([*names, JOINT], found, strict=True)]


def _assignments(first: Entry, second: Entry, names: list[str]) -> list[np.ndarray]:
    """The matching by each of these matrices, and by all of them. Holds the costs of three, of two with one thread."""
    with one_thread_each(2) if torch.get_num_threads() > 1 else contextlib.nullcontext() as pool:
        # An assignment keeps one thread busy: beside it the others go on with the next product.
        def start(costs: torch.Tensor) -> Callable[[], np.ndarray]:
            return pool.submit(_cheapest, costs).result if pool else functools.partial(np.copy, _cheapest(costs))

        joint, jobs = None, []
        for name in names:
            sides = first.rows[name], second.rows[name]
            costs = _add_costs(torch.zeros(first.neurons, second.neurons, device=sides[0].device), *sides)
            jobs.append(start(costs))
            if joint is None:
                joint = costs
            else:
                jobs[0]()  # which reads what is now changed
                joint.add_(costs)
            del costs
        return [job() for job in [*jobs, start(joint)]]


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


def neuron_matching(
    bank: ExpertBank,
    *,
    model: str,
    layer: int,
    reference: FFN | None = None,
    max_pairs: int = 0,
    share: Share = EVERYTHING,
) -> pl.DataFrame:
    """Table "matching" of one layer: every pair once (or `max_pairs` of them), a before b, no diagonal.

    share: which of those pairs, in that order. Entries are the N routed experts, then F (`reference`) and SE (the
    shared expert). Where the widths differ the smaller one's neurons are all matched, cosine_before and tau are null.
    As many pairs are matched side by side as torch has threads and COST_BYTES allow; what is found depends on neither.
    Memory for each of them: the neurons of two entries in float32 and 8 bytes for each pair of neurons, 12 where one
    pair is matched by several threads.
    Raises AtlasError when the reference has another hidden width, or a weight is not finite.
    """
    if reference is not None:
        check_width(bank, reference, model)
    parts = {str(expert): {name: stack[expert] for name, stack in bank.matrices.items()} for expert in range(len(bank))}
    for label, ffn in ((REFERENCE, reference), (SHARED, bank.shared)):
        if ffn is not None:
            named = {"up": ffn.up, "act": ffn.act, "down": ffn.down}
            parts[label] = {name: matrix for name, matrix in named.items() if matrix is not None}

    pairs = share.of(chosen_pairs(list(parts), max_pairs))
    together = min(
        [_side_by_side(*(len(parts[label]["up"]) for label in pair)) for pair in pairs] + [torch.get_num_threads()]
    )
    lock = threading.Lock()

    @functools.lru_cache(maxsize=together + 1)
    def made(label: str) -> Entry:
        entry = Entry(parts[label])
        for name, norms in entry.norms.items():
            if not np.isfinite(norms).all():
                raise AtlasError(
                    f"{model}, layer {layer}: {name} of expert {label} holds values that are not finite; "
                    "check the checkpoint's files against their published hashes."
                )
        return entry

    def matched(pair: tuple[str, str]) -> list[dict]:
        with lock:  # no expert is prepared twice at a time
            entries = [made(label) for label in pair]
        return [{"a": pair[0], "b": pair[1]} | row for row in match_pair(*entries)]

    _draw_nulls({_shape(*(parts[label] for label in pair)) for pair in pairs})
    found = each(matched, pairs, together) if together > 1 else [matched(pair) for pair in pairs]
    rows = list(itertools.chain.from_iterable(found))
    frame = pl.DataFrame(rows, infer_schema_length=None) if rows else tables.empty("matching")
    return tables.conform("matching", frame.with_columns(model=pl.lit(model), layer=pl.lit(layer)))


def _shape(first: Mapping[str, torch.Tensor], second: Mapping[str, torch.Tensor]) -> tuple[int, int, int, int]:
    """Neurons of two entries, their width, and how many matrices both have."""
    return len(first["up"]), len(second["up"]), first["up"].shape[1], len(first.keys() & second.keys())


def _draw_nulls(shapes: set[tuple[int, int, int, int]]) -> None:
    """Draw the nulls of these shapes once, with all threads, before several of them ask for the same."""
    for first, second, width, matrices in sorted(shapes):
        for count in {1, matrices}:
            null_matches(first, second, width, count)
            null_matches(*_shrunk(first, second, width)[1], count)

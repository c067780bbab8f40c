"""Sums over tokens that the probe keeps while the model runs, so that memory does not grow with the text.

Every function takes CPU or CUDA tensors and sums in float64. The definitions are those of
A Closer Look into Mixture-of-Experts (arXiv 2406.18219), section 5 and appendix G; rows are tokens
in the order of the text, and ties share their ranks instead of taking an arbitrary order.
"""

import math

import torch

from moe_atlas.errors import AtlasError

SMALLEST_NORM = 1e-8  # a shorter vector counts as this long, so that a zero output has cosine 0 with all
_BLOCK_NUMBERS = 1 << 21  # float64 numbers of the outputs whose cosines are computed at a time: 16 MiB
_TIED_ELEMENTS = 1 << 22  # float64 numbers in one (tokens, N, N) block of tokens with ties: 32 MiB


def pair_cosines(*outputs: torch.Tensor) -> torch.Tensor:
    """Cosines of all pairs of outputs, token by token.

    outputs: (M, T, d), any floating dtype; or several such tensors of the same tokens, one below the other. Returns
    (T, M, M) float64, exactly symmetric, in -1..1: <a, b> / (max(|a|, 1e-8) max(|b|, 1e-8)).
    """
    tokens, numbers = outputs[0].shape[1], sum(len(part) for part in outputs) * outputs[0].shape[2]
    blocks = [[part[:, rows] for part in outputs] for rows in _blocks(tokens, _BLOCK_NUMBERS // numbers)]
    return torch.cat([_pair_cosines(torch.cat([part.to(torch.float64) for part in block])) for block in blocks])


def _blocks(count: int, most: int) -> list[slice]:
    """Ranges of at most so many of `count` things, and at least one; an empty range for none."""
    return [slice(first, first + max(1, most)) for first in range(0, max(1, count), max(1, most))]


def _pair_cosines(outputs: torch.Tensor) -> torch.Tensor:
    """pair_cosines of outputs (M, T, d) float64."""
    vectors = outputs.transpose(0, 1)
    products = torch.bmm(vectors, vectors.transpose(1, 2))
    norms = products.diagonal(dim1=1, dim2=2).sqrt()
    lengths = norms.clamp_min(SMALLEST_NORM)
    cosines = (products + products.transpose(1, 2)) / (2 * lengths[:, :, None] * lengths[:, None, :])
    cosines.clamp_(-1, 1)
    # The diagonal is known without rounding; arccos would turn 1 - 1e-16 into an angle of 1e-8.
    cosines.diagonal(dim1=1, dim2=2).copy_((norms / lengths).square())
    return cosines


def histogram_bins(pairs: int) -> int:
    """Bins of -1..1 that the cosines of so many pairs are counted in: 200, above 8192 pairs 50."""
    return 200 if pairs <= 8192 else 50


class Sketch:
    """Counts of values in -1..1 in bins of equal width, and the smallest and largest value, for P series.

    A quantile read from it lies in the bin of the true one: the error is below the width of a bin, 2 / bins.
    """

    def __init__(self, series: int, bins: int, device: torch.device | str = "cpu"):
        self.counts = torch.zeros(series, bins, dtype=torch.int64, device=device)
        self.range = torch.tensor([[torch.inf, -torch.inf]], dtype=torch.float64, device=device).repeat(series, 1)

    def add(self, values: torch.Tensor) -> None:
        """Add values (T, P) float64."""
        if not len(values):
            return
        series, bins = self.counts.shape
        cells = ((values + 1) * (bins / 2)).long().clamp_(0, bins - 1)
        cells += torch.arange(series, device=cells.device) * bins
        self.counts += torch.bincount(cells.flatten(), minlength=series * bins).view(series, bins)
        self.range[:, 0].clamp_(max=values.amin(0))
        self.range[:, 1].clamp_(min=values.amax(0))


def angular(cosines: torch.Tensor) -> torch.Tensor:
    """Angular similarity 1 - arccos(cosine) / pi, in 0..1; orthogonal vectors have 0.5."""
    return 1 - torch.arccos(cosines.clamp(-1, 1)) / math.pi


class PairSums:
    """First and second moments over tokens of the cosine and the angular similarity of M outputs."""

    def __init__(self, count: int, device: torch.device | str = "cpu"):
        def zeros() -> torch.Tensor:
            return torch.zeros(count, count, dtype=torch.float64, device=device)

        self.tokens = 0
        self.cosine_sum, self.cosine_square = zeros(), zeros()
        self.angular_sum, self.angular_square = zeros(), zeros()

    def add(self, cosines: torch.Tensor, angles: torch.Tensor | None = None) -> None:
        """Add the tokens of `cosines` (T, M, M), as pair_cosines gives them, and of their angular similarity."""
        cosines = cosines.to(self.cosine_sum)
        angles = angular(cosines) if angles is None else angles
        self.tokens += cosines.shape[0]
        self.cosine_sum += cosines.sum(0)
        self.cosine_square += cosines.square().sum(0)
        self.angular_sum += angles.sum(0)
        self.angular_square += angles.square().sum(0)

    def arrays(self) -> dict[str, torch.Tensor]:
        """The sums by the names of activations.safetensors: tokens (1,) int64, the others (M, M) float64."""
        return {
            "tokens": torch.tensor([self.tokens], dtype=torch.int64),
            "cosine_sum": self.cosine_sum,
            "cosine_square": self.cosine_square,
            "angular_sum": self.angular_sum,
            "angular_square": self.angular_square,
        }


def _rank_ranges(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """First rank, and first rank after, of each value's tie group, ascending along the last axis."""
    ordered = values.sort(dim=-1).values.contiguous()
    values = values.contiguous()
    return torch.searchsorted(ordered, values), torch.searchsorted(ordered, values, right=True)


def rank_ranges(scores: torch.Tensor, norms: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Ranks that experts share with their equals: score low, high, norm low, high, each (T, N) int64.

    scores, norms: (T, N). An expert has the ranks low to high - 1, ascending from 0.
    Raises AtlasError when a value is NaN, which has no rank.
    """
    if bool(torch.isnan(scores).any() | torch.isnan(norms).any()):
        raise AtlasError(
            "the model computes router scores or expert outputs that are not numbers; extract with dtype float32."
        )
    return *_rank_ranges(scores), *_rank_ranges(norms)


def rank_counts(scores: torch.Tensor, norms: torch.Tensor) -> torch.Tensor:
    """Count how often an expert has score rank i and norm rank j on the same token.

    scores, norms: (T, N); ranks ascend from 0. A group of g equal values shares each of its
    g ranks by 1/g, so every row and every column of the result sums to T.
    Returns (N, N) float64 [score rank, norm rank]. Source: appendix G, figure 10.
    Raises AtlasError when a value is NaN.
    """
    return count_ranks(*rank_ranges(scores, norms))


def count_ranks(
    score_low: torch.Tensor, score_high: torch.Tensor, norm_low: torch.Tensor, norm_high: torch.Tensor
) -> torch.Tensor:
    """rank_counts of what rank_ranges gives."""
    count = score_low.shape[-1]
    tied = ((score_high - score_low > 1) | (norm_high - norm_low > 1)).any(-1)
    cells = (score_low * count + norm_low)[~tied].flatten()
    counts = torch.bincount(cells, minlength=count * count).view(count, count).to(torch.float64)
    if not bool(tied.any()):
        return counts
    ranks = torch.arange(count, device=score_low.device)

    def shares(low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
        low, high = low.reshape(-1, 1), high.reshape(-1, 1)
        return ((ranks >= low) & (ranks < high)).to(torch.float64) / (high - low)

    groups = [bound[tied] for bound in (score_low, score_high, norm_low, norm_high)]
    step = max(1, _TIED_ELEMENTS // (count * count))
    for first in range(0, len(groups[0]), step):
        block = [bound[first : first + step] for bound in groups]
        counts += shares(*block[:2]).T @ shares(*block[2:])
    return counts


def rank_agreement(
    score_low: torch.Tensor, score_high: torch.Tensor, norm_low: torch.Tensor, norm_high: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """How far score and norm ranks agree on each token, from what rank_ranges gives: three tensors (T,) float64.

    Share of the experts whose norm rank is their score rank; whether the largest norm has the highest score; Spearman's
    rank correlation over the experts. Ties count as in rank_counts, of which the first two are the diagonal and its
    last cell. The correlation is NaN where all scores or all norms are equal.
    """
    count = score_low.shape[-1]
    common = (torch.minimum(score_high, norm_high) - torch.maximum(score_low, norm_low)).clamp_min(0)
    shares = (score_high - score_low) * (norm_high - norm_low)
    same = (common / shares.to(torch.float64)).sum(-1) / count
    largest = ((score_high == count) & (norm_high == count)).to(torch.float64) / shares
    ranks = [(low + high - count).to(torch.float64) for low, high in ((score_low, score_high), (norm_low, norm_high))]
    products = (ranks[0] * ranks[1]).sum(-1)
    squares = ranks[0].square().sum(-1) * ranks[1].square().sum(-1)
    return same, largest.sum(-1), (products / squares.sqrt()).masked_fill(squares == 0, torch.nan)


# Bit patterns of positive floats grow with the value, so that a bin is found with one subtraction and one shift. Edges
# at equal distances of the pattern lie two to a factor of 2; 0.001 is one (A Closer Look, appendix H).
THRESHOLD = 0.001
_BASE = int(torch.tensor(THRESHOLD).view(torch.int32))
_HALF = 22  # bits of half a factor of 2
_LARGEST = (1 << 31) - 1
HALF_OCTAVES = ((-_BASE - 1) >> _HALF, ((_LARGEST - _BASE - 1) >> _HALF) + 1)  # first and one past the last bin


def half_octaves(values: torch.Tensor) -> torch.Tensor:
    """Bins of |x|, int32 in the shape of `values`: bin j holds edge j < |x| <= edge j + 1, and edge 0 is 0.001.

    So |x| > 0.001, compared in float32, where the bin is not negative. Zero is in the first bin of HALF_OCTAVES.
    """
    bins = values.float().contiguous().view(torch.int32).bitwise_and(_LARGEST)
    return bins.sub_(_BASE + 1).bitwise_right_shift_(_HALF)


def half_octave_edges(count: int) -> torch.Tensor:
    """Edges -count to count of half_octaves, (2 count + 1,) float32."""
    return (_BASE + torch.arange(-count, count + 1, dtype=torch.int32) * (1 << _HALF)).view(torch.float32)


class LoadCounts:
    """How many tokens chose each of N experts at each of k ranks, and with what weight.

    Kept on the CPU: the choices are few numbers, and sums on a GPU would depend on thread order.
    """

    def __init__(self, experts: int, top_k: int):
        self.load_tokens = torch.zeros(experts, top_k, dtype=torch.int64)
        self.load_weight = torch.zeros(experts, top_k, dtype=torch.float64)

    def add(self, ids: torch.Tensor, weights: torch.Tensor) -> None:
        """Add tokens. ids: (T, k) int64, largest weight first, -1 an empty slot; weights: (T, k)."""
        experts, top_k = self.load_tokens.shape
        ids, weights = ids.cpu(), weights.to("cpu", torch.float64)
        if ids.shape[1:] != (top_k,) or bool((ids >= experts).any()):
            raise ValueError(f"ids of shape {tuple(ids.shape)} up to {int(ids.max())} for {experts} experts, k {top_k}")
        cells = ids * top_k + torch.arange(top_k)
        used = ids >= 0
        size = experts * top_k
        self.load_tokens += torch.bincount(cells[used], minlength=size).view(experts, top_k)
        self.load_weight += torch.bincount(cells[used], weights[used], minlength=size).view(experts, top_k)

    def arrays(self) -> dict[str, torch.Tensor]:
        """load_tokens (N, k) int64 and load_weight (N, k) float64."""
        return {"load_tokens": self.load_tokens, "load_weight": self.load_weight}

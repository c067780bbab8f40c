"""What the probe keeps of a layer and site, each recorder one thing. Names and shapes are those of results/README.md.

Sums are float64 and by block of documents where an interval over documents is wanted. The first token of a sequence
(position 0) is summed apart: in most models it is the same token in the same state, and an attention sink.
"""

import torch

from moe_atlas import choices
from moe_atlas.accumulate import LoadCounts, PairSums, Sketch, count_ranks, histogram_bins, rank_agreement
from moe_atlas.chunk import Chunk
from moe_atlas.router_rule import RouterRule
from moe_atlas.tables import DOCUMENT_MEASURES
from moe_atlas.text_index import TextIndex

Arrays = dict[str, torch.Tensor]


class Ranks:
    """Score rank by norm rank. It is asked first: it refuses outputs that are not numbers."""

    def __init__(self, experts: int, device: torch.device):
        self.all = torch.zeros(experts, experts, dtype=torch.float64, device=device)
        self.first = torch.zeros_like(self.all)

    def add(self, chunk: Chunk) -> None:
        self.all += count_ranks(*chunk.ranges)
        if bool(chunk.first.any()):
            self.first += count_ranks(*(bound[chunk.first] for bound in chunk.ranges))

    def arrays(self) -> Arrays:
        return {"rank_counts": self.all, "rank_counts_first": self.first}


class Rule:
    """Bounds on the router's rule."""

    def __init__(self, rule: RouterRule):
        self.rule = rule

    def add(self, chunk: Chunk) -> None:
        self.rule.add(chunk.own_logits, chunk.router_ids, chunk.router_weights, chunk.logits)

    def arrays(self) -> Arrays:
        return self.rule.arrays()


class Load:
    """Choices of each expert at each rank."""

    def __init__(self, experts: int, top_k: int):
        self.all, self.first = LoadCounts(experts, top_k), LoadCounts(experts, top_k)

    def add(self, chunk: Chunk) -> None:
        self.all.add(chunk.ids, chunk.weights)
        if bool(chunk.first.any()):
            self.first.add(chunk.ids[chunk.first], chunk.weights[chunk.first])

    def arrays(self) -> Arrays:
        return self.all.arrays() | {"load_tokens_first": self.first.load_tokens}


class Pairs:
    """Similarity of every pair of outputs: moments, a sketch of the distribution, sums by block."""

    def __init__(self, outputs: int, blocks: int, device: torch.device):
        self.all, self.first = PairSums(outputs, device), PairSums(outputs, device)
        self.upper = torch.triu_indices(outputs, outputs, device=device)
        pairs = self.upper.shape[1]
        self.sketch = Sketch(pairs, histogram_bins(pairs), device)
        self.by_block = torch.zeros(blocks, pairs, dtype=torch.float64, device=device)

    def add(self, chunk: Chunk) -> None:
        self.all.add(chunk.cosines, chunk.angles)
        if bool(chunk.first.any()):
            self.first.add(chunk.cosines[chunk.first], chunk.angles[chunk.first])
        series = chunk.cosines[:, *self.upper]
        self.sketch.add(series)
        self.by_block += chunk.membership[: chunk.blocks] @ series

    def arrays(self) -> Arrays:
        first = self.first.arrays()
        return self.all.arrays() | {
            "tokens_first": first["tokens"],
            "cosine_sum_first": first["cosine_sum"],
            "angular_sum_first": first["angular_sum"],
            "cosine_histogram": self.sketch.counts.to(torch.int32),
            "cosine_range": self.sketch.range,
            "cosine_block": self.by_block,
        }


class Documents:
    """Sums of DOCUMENT_MEASURES over the tokens of each block, and how many tokens each is defined for.

    labels: of the M outputs, the N routed experts first.
    """

    def __init__(self, labels: list[str], experts: int, blocks: int, device: torch.device):
        self.column = {label: number for number, label in enumerate(labels)}
        self.experts = experts
        self.sums = torch.zeros(2 * blocks, len(DOCUMENT_MEASURES), dtype=torch.float64, device=device)
        self.counts = torch.zeros_like(self.sums)
        self.tokens = torch.zeros(2 * blocks, dtype=torch.float64, device=device)

    def add(self, chunk: Chunk) -> None:
        known = self._values(chunk)
        undefined = torch.full_like(chunk.norms[:, 0], torch.nan, dtype=torch.float64)
        values = torch.stack([known.get(name, undefined) for name in DOCUMENT_MEASURES], 1)
        self.sums += chunk.membership @ values.nan_to_num(nan=0.0)
        self.counts += chunk.membership @ (~values.isnan()).to(torch.float64)
        self.tokens += chunk.membership.sum(1)

    def _values(self, chunk: Chunk) -> dict[str, torch.Tensor]:
        """Measures of single tokens, (c,) float64; NaN where a token has none."""
        experts = self.experts
        cosines = chunk.cosines[:, :experts, :experts]
        number = chunk.chosen.sum(1)
        together = (chunk.chosen[:, None] @ cosines @ chunk.chosen[..., None])[:, 0, 0]
        itself = (chunk.chosen * cosines.diagonal(dim1=1, dim2=2)).sum(1)
        same, largest, spearman = rank_agreement(*chunk.ranges)
        scores = chunk.logits.to(torch.float64).softmax(-1).topk(min(2, experts), dim=-1).values
        values = {
            "pair_cosine": _off_diagonal_mean(cosines),
            "pair_angular": _off_diagonal_mean(chunk.angles[:, :experts, :experts]),
            "chosen_pair_cosine": (together - itself) / (number * (number - 1)),
            "norm_score_diagonal": same,
            "top_norm_top_score": largest,
            "norm_score_spearman": spearman,
            "norm": chunk.norms.to(torch.float64).mean(1),
            "top1_score": scores[:, 0],
        }
        if experts > 1:
            values["top2_score"] = scores[:, 1]
        if chunk.active is not None:
            values["active"] = chunk.active
        of_label = {"F": "reference_cosine", "F_same_input": "reference_same_input_cosine", "SE": "shared_cosine"}
        for label, name in of_label.items():
            if label in self.column:
                values[name] = chunk.cosines[:, :experts, self.column[label]].mean(1)
        return values

    def arrays(self) -> Arrays:
        blocks = len(self.tokens) // 2
        return {
            "document_sum": self.sums.view(2, blocks, -1),
            "document_count": self.counts.view(2, blocks, -1).to(torch.int64),
            "document_tokens": self.tokens.view(2, blocks).to(torch.int64),
        }


def _off_diagonal_mean(squares: torch.Tensor) -> torch.Tensor:
    """Mean of (c, N, N) without the diagonals, (c,); NaN for N = 1."""
    experts = squares.shape[-1]
    return (squares.sum((1, 2)) - squares.diagonal(dim1=1, dim2=2).sum(1)) / (experts * (experts - 1))


class Importance:
    """What each expert does for the tokens that chose it, by block, position 0 left out.

    Number of tokens, sums of the weight g, of the output's length |E| and of g |E| (REAP, Lasby et al. 2025,
    2510.13999); with position 0, the largest absolute number in an output (Su et al. 2025, 2507.23279).
    """

    def __init__(self, experts: int, blocks: int, device: torch.device):
        self.sums = torch.zeros(4, blocks, experts, dtype=torch.float64, device=device)
        self.largest = torch.zeros(experts, dtype=torch.float32, device=device)

    def add(self, chunk: Chunk) -> None:
        norms, outputs = chunk.norms.to(torch.float64), chunk.outputs
        values = (chunk.chosen, chunk.gates, chunk.chosen * norms, chunk.gates * norms)
        for total, value in zip(self.sums, values, strict=True):
            total += chunk.membership[: chunk.blocks] @ value
        largest = torch.maximum(outputs.amax(-1), -outputs.amin(-1)).to(torch.float32)
        largest = largest.masked_fill(chunk.chosen.T == 0, 0)
        self.largest = torch.maximum(self.largest, largest.amax(1))

    def arrays(self) -> Arrays:
        names = ("importance_count", "importance_gate", "importance_norm", "importance_reap")
        return dict(zip(names, self.sums, strict=True)) | {"importance_output_max": self.largest}


class Choices:
    """The choices of all tokens while the layer is in memory; of them, only counts by block and expert are kept."""

    def __init__(self, index: TextIndex, experts: int, top_k: int):
        self.index, self.experts = index, experts
        self.seen = torch.zeros(len(index), dtype=torch.bool)
        self.ids, self.random_ids = (torch.full((len(index), top_k), -1, dtype=torch.int16) for _ in range(2))

    def add(self, chunk: Chunk) -> None:
        self.seen[chunk.rows] = True
        self.ids[chunk.rows] = chunk.ids.to("cpu", torch.int16)
        self.random_ids[chunk.rows] = chunk.random_ids.to("cpu", torch.int16)

    def arrays(self) -> Arrays:
        return choices.choice_arrays(self.ids, self.random_ids, self.index, self.experts, self.seen)


class Confidence:
    """How sure the router is, by block."""

    def __init__(self, index: TextIndex, experts: int, top_k: int):
        self.confidence = choices.Confidence(index, experts, top_k)

    def add(self, chunk: Chunk) -> None:
        self.confidence.add(chunk.logits, chunk.rows)

    def arrays(self) -> Arrays:
        return self.confidence.arrays()


class Tokens:
    """A row for each of the T tokens of a short text."""

    def __init__(self, tokens: int):
        self.tokens = tokens
        self.kept: Arrays = {}

    def add(self, chunk: Chunk) -> None:
        values = {
            "ids": chunk.ids,
            "weights": chunk.weights.float(),
            "logits": chunk.logits,
            "norms": chunk.norms,
            "cosine": chunk.cosines.float(),
        }
        for name, value in values.items():
            if name not in self.kept:
                self.kept[name] = torch.empty(self.tokens, *value.shape[1:], dtype=value.dtype)
            self.kept[name][chunk.rows] = value.cpu()

    def arrays(self) -> Arrays:
        return self.kept

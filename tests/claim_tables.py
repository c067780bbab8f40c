"""Tables of stacks of MoE layers held in memory, made by the library's own functions: what the claims are tried on."""

from dataclasses import dataclass

import polars as pl
import torch
from torch.nn import functional

from moe_atlas import tables
from moe_atlas.architectures.bank import ExpertBank
from moe_atlas.behavioral.tables import FROM_SUMS
from moe_atlas.chunk import Chunk
from moe_atlas.cross_ranks import CrossRanks
from moe_atlas.parametric.similarity import weight_similarity
from moe_atlas.recorders import Documents, Pairs
from moe_atlas.states import ActivationHistogram
from moe_atlas.text_index import TextIndex

BEHAVIOR = ("output_similarity", "norm_score_cross", "documents", "activation_ratio")


@dataclass(frozen=True)
class Size:
    """Of a stack: layers, experts N, chosen k, hidden width d, expert width m."""

    layers: int = 8
    experts: int = 8
    top_k: int = 2
    hidden: int = 16
    width: int = 12

    @property
    def checkpoint(self) -> dict[str, int]:
        """What checkpoint.json says of such a model."""
        return {"L": self.layers, "N": self.experts, "k": self.top_k, "d": self.hidden, "m": self.width}


def random_banks(size: Size, seed: int) -> list[ExpertBank]:
    """Independent Gaussian experts and routers, one bank a layer."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) / shape[-1] ** 0.5

    n, d, m = size.experts, size.hidden, size.width
    return [ExpertBank(normal(n, m, d), normal(n, m, d), normal(n, d, m), normal(n, d) * 2) for _ in range(size.layers)]


def text(documents: int = 10, length: int = 9, vocabulary: int = 60, seed: int = 0) -> TextIndex:
    """Documents of random token ids."""
    generator = torch.Generator().manual_seed(seed)
    return TextIndex.of(torch.randint(vocabulary, (documents, length), generator=generator).tolist())


def run(banks: list[ExpertBank], index: TextIndex, seed: int, top_k: int = 2) -> list[tuple[torch.Tensor, ...]]:
    """(inputs (T, d), logits (T, N), outputs (N, T, d), activation (N, T, m)) of each layer, with a residual stream.

    Token types have random embeddings, and a token sees the mean of those before it, so that tokens are related.
    """
    generator = torch.Generator().manual_seed(seed + 1)
    embedding = torch.randn(int(index.token.max()) + 1, banks[0].up.shape[-1], generator=generator)
    stream, layers = embedding[index.token], []
    for start in (index.position == 0).nonzero().flatten().tolist():
        own = (index.sequence == index.sequence[start]).nonzero().flatten()
        before = stream[own].cumsum(0) / torch.arange(1, len(own) + 1)[:, None]
        stream = stream.index_add(0, own, before)
    for bank in banks:
        x = stream / stream.square().mean(-1, keepdim=True).sqrt()
        activation = functional.silu(torch.einsum("nmd,td->ntm", bank.act, x))
        outputs = torch.einsum("ndm,ntm->ntd", bank.down, activation * torch.einsum("nmd,td->ntm", bank.up, x))
        logits = x @ bank.router.T
        gates, ids = logits.softmax(-1).topk(top_k)
        stream = stream + (outputs[ids.T, torch.arange(len(x))] * gates.T[..., None]).sum(0)
        layers.append((x, logits, outputs, activation))
    return layers


def chunk_of(index: TextIndex, logits, outputs, activation, top_k: int = 2) -> Chunk:
    """All tokens of a text as recorders see them, without F and SE."""
    weights, ids = logits.softmax(-1).topk(top_k)
    return Chunk(
        rows=torch.arange(len(index)), first=index.position == 0, block=index.block, blocks=index.blocks,
        own_logits=logits, logits=logits.float(), router_ids=ids, router_weights=weights, ids=ids, weights=weights,
        random_ids=ids, outputs=outputs, active=(activation.abs() > 0.001).double().mean((0, 2)),
    )  # fmt: skip


def frames_of(banks: list[ExpertBank], layers: list[tuple], index: TextIndex) -> dict[str, pl.DataFrame]:
    """The tables that claims read, of model m and corpus c; saturation is empty."""
    found: dict[str, list] = {name: [tables.empty(name)] for name in (*BEHAVIOR, "similarity", "saturation")}
    for layer, (bank, (_, logits, outputs, activation)) in enumerate(zip(banks, layers, strict=True)):
        found["similarity"].append(weight_similarity(bank, model="m", layer=layer))
        chunk, device, labels = (
            chunk_of(index, logits, outputs, activation),
            torch.device("cpu"),
            list(map(str, range(len(bank)))),
        )
        histogram = ActivationHistogram(len(labels), device)
        histogram.add(slice(None), activation)
        arrays = {name: array.numpy() for name, array in histogram.arrays().items()}
        for recorder in (
            Pairs(len(labels), index.blocks, device),
            Documents(labels, len(labels), index.blocks, device),
            CrossRanks(len(labels), device),
        ):
            recorder.add(chunk)
            arrays |= {name: array.numpy() for name, array in recorder.arrays().items()}
        for name in BEHAVIOR:
            frame = FROM_SUMS[name](arrays, labels)
            place = {"model": "m", "corpus": "c", "site": "ffn"}
            frame = frame.with_columns(layer=pl.lit(layer), **{key: pl.lit(value) for key, value in place.items()})
            found[name].append(tables.conform(name, frame))
    return {name: pl.concat(frames) for name, frames in found.items()}


def binomial_bound(level: float, trials: int, confidence: float = 0.999) -> int:
    """The most successes that a rate of `level` has with this probability."""
    from scipy.stats import binom

    return int(binom.ppf(confidence, trials, level))

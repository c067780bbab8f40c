"""Chunks of made-up tokens, and what every recorder makes of them."""

import torch
from loops import normal

from moe_atlas import recorders
from moe_atlas.chunk import Chunk
from moe_atlas.cross_ranks import CrossRanks
from moe_atlas.router_rule import RouterRule
from moe_atlas.states import ActivationHistogram
from moe_atlas.text_index import TextIndex

ALL = slice(None)


def made_up(index: TextIndex, labels: list[str], experts: int, top_k: int, seed: int = 0, hidden: int = 6) -> Chunk:
    """All tokens of a text: random outputs, logits and activations; some logits and norms tie, one slot is empty."""
    count = len(index)
    outputs, logits = normal(len(labels), count, hidden, seed=seed), normal(count, experts, seed=seed + 1)
    logits[0, 1] = logits[0, 0]
    outputs[2, -1] = -outputs[0, -1]
    weights, ids = logits.softmax(-1).topk(top_k)
    ids[-1, -1] = -1
    chunk = Chunk(
        rows=torch.arange(count),
        first=index.position == 0,
        block=index.block,
        blocks=index.blocks,
        own_logits=logits,
        logits=logits,
        router_ids=ids.where(ids >= 0, experts),
        router_weights=weights,
        ids=ids,
        weights=weights.masked_fill(ids < 0, 0),
        random_ids=normal(count, experts, seed=seed + 2).topk(top_k).indices,
        outputs=outputs[:experts],
        others=outputs[experts:] if len(labels) > experts else None,
    )
    return with_activation(chunk, normal(experts, count, 9, seed=seed + 3) / 100)


def with_activation(chunk: Chunk, activation: torch.Tensor | None) -> Chunk:
    """The chunk with the activation (N, c, m) beside it, and what the probe counts in it."""
    chunk.activation = activation
    chunk.active = None if activation is None else (activation.float().abs() > 0.001).double().mean((0, 2))
    return chunk


def compared(chunk: Chunk) -> torch.Tensor:
    """All outputs (M, c, d) of a chunk, the experts' first."""
    return chunk.outputs if chunk.others is None else torch.cat([chunk.outputs, chunk.others])


def part(chunk: Chunk, rows: list[int] | torch.Tensor) -> Chunk:
    """Some tokens of a chunk as a chunk."""
    rows = torch.as_tensor(rows)
    of_tokens = ("rows", "first", "block", "own_logits", "logits", "router_ids", "router_weights", "ids", "weights")
    values = {name: getattr(chunk, name)[rows] for name in (*of_tokens, "random_ids")}
    others = None if chunk.others is None else chunk.others[:, rows]
    found = Chunk(**values, blocks=chunk.blocks, outputs=chunk.outputs[:, rows], others=others)
    return with_activation(found, None if chunk.activation is None else chunk.activation[:, rows])


def all_recorders(index: TextIndex, labels: list[str], experts: int, top_k: int) -> list:
    """Those of a short text, as the probe has them."""
    cpu, blocks = torch.device("cpu"), index.blocks
    return [
        recorders.Ranks(experts, cpu),
        recorders.Rule(RouterRule(experts)),
        recorders.Load(experts, top_k),
        recorders.Pairs(len(labels), blocks, cpu),
        recorders.Documents(labels, experts, blocks, cpu),
        recorders.Importance(experts, blocks, cpu),
        recorders.Choices(index, experts, top_k),
        recorders.Confidence(index, experts, top_k),
        ActivationHistogram(experts),
        CrossRanks(experts, cpu),
        recorders.Tokens(len(index)),
    ]


def arrays_of_chunks(made: list, chunks: list[Chunk]) -> dict[str, torch.Tensor]:
    """The arrays of recorders that are given these chunks."""
    arrays = {}
    for recorder in made:
        for chunk in chunks:
            if not isinstance(recorder, ActivationHistogram):
                recorder.add(chunk)
            elif chunk.activation is not None:
                recorder.add(ALL, chunk.activation)
        if not isinstance(recorder, ActivationHistogram) or chunks[0].activation is not None:
            arrays |= recorder.arrays()
    return arrays

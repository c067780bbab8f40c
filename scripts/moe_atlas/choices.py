"""What a router chooses on a text, counted by block of documents, so that size does not grow with the text.

Everything here is pure: choices in, counts out, no model. The first token of every sequence (position 0) is left out of
all of it: most models send it to experts of its own. behavioral/specialization.py makes measures of the counts.
Sources: OLMoE (Muennighoff et al. 2024, 2409.02060, section 5), Mixtral (Jiang et al. 2024, 2401.04088, section 5),
OpenMoE (Xue et al. 2024, 2402.01739, section 4).
"""

import math

import torch

from moe_atlas.text_index import TextIndex

MOST_TYPES = 256  # token types whose choices are counted one by one: the most frequent ones
FEWEST_TOKENS = 10  # of a type that is counted: a type that occurs once has one expert, whatever the router does
MOST_BY_BLOCK = 32 * 64  # blocks x experts of the large counts: with more experts, fewer and larger blocks
FEWEST_BLOCKS = 5  # fewer make no interval: then all blocks are counted together
_ROWS = 1 << 14  # tokens worked on at once


def random_router(weight: torch.Tensor, seed: int) -> torch.Tensor:
    """A router that knows nothing: rows (N, r) of random directions with the lengths of the rows of `weight`.

    Same dtype and device as `weight`; the same seed gives the same rows. What it does on a router's own inputs is
    what follows from the inputs, and so from the tokens, alone.
    """
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
    lengths = torch.linalg.vector_norm(weight.detach().to("cpu", torch.float64), dim=-1, keepdim=True)
    return (directions / torch.linalg.vector_norm(directions, dim=-1, keepdim=True) * lengths).to(weight)


def choice_arrays(
    ids: torch.Tensor, random_ids: torch.Tensor, index: TextIndex, experts: int, seen: torch.Tensor | None = None
) -> dict[str, torch.Tensor]:
    """Counts of the choices of one layer, by their names in activations.safetensors.

    ids: (T, k) integers, best expert first, -1 an empty slot; random_ids: (T, k) of a random_router on the same
    inputs; both in the order of `index`, which has B blocks. seen: (T,) bool, whole sequences that are counted, by
    default all; the counts of several such sets add up. On the CPU, with int64 counts unless said otherwise:

    choice_tokens (B,): tokens counted. choice_used (k + 1,): tokens by the number of experts they chose.
    choice_first, choice_any (B, N): tokens whose first choice, or any choice, an expert is.
    choice_pairs (B', N, N) int32: tokens that chose both; the diagonal is choice_any. B' = blocks_kept(B, N).
    choice_repeats (B, 3): pairs of neighbouring tokens of a sequence; those with the same first choice, and those
    with an expert in common.
    choice_input, choice_next (B', V, N) int32: first choices by token type, of the token itself and of the one
    after it: the V <= 256 most frequent of those with 10 tokens or more. choice_input_ids, choice_next_ids (V,).
    choice_random_first, _any, _pairs, _repeats, _input, _next: the same of random_ids, over all blocks together.
    """
    token, sequence, position, block = (
        torch.as_tensor(values).long() for values in (index.token, index.sequence, index.position, index.block)
    )
    ids, random_ids = ids.cpu(), random_ids.cpu()
    if ids.shape != random_ids.shape or len(ids) != len(token) or bool((ids >= experts).any()):
        shapes = f"ids {tuple(ids.shape)}, random_ids {tuple(random_ids.shape)}"
        raise ValueError(f"{shapes} up to {int(ids.max())} for {len(token)} tokens, {experts} experts")
    counted = position > 0
    linked = counted[:-1] & (sequence[1:] == sequence[:-1]) & (position[1:] == position[:-1] + 1)
    # The types are those of the whole text.
    types = {"input": _frequent(token[counted]), "next": _frequent(token[1:][linked])}
    seen = torch.ones_like(counted) if seen is None else seen
    followed = (linked & seen[:-1]).nonzero()[:, 0]
    rows = (counted & seen).nonzero()[:, 0]
    arrays = {
        "tokens": torch.bincount(block[rows], minlength=index.blocks),
        "used": torch.bincount((ids[rows] >= 0).sum(1), minlength=ids.shape[1] + 1),
        "input_ids": types["input"],
        "next_ids": types["next"],
    }
    whole = torch.zeros_like(block)
    for prefix, chosen, blocks, count in (("", ids, block, index.blocks), ("random_", random_ids, whole, 1)):
        few = blocks_kept(count, experts)
        merged = blocks * few // count
        found = {
            "first": _first(chosen, rows, blocks, count, experts),
            "any": _any(chosen, rows, blocks, count, experts),
            "pairs": _pairs(chosen, rows, merged, few, experts),
            "repeats": _repeats(chosen, followed, blocks, count),
            "input": _by_type(chosen, rows, token[rows], types["input"], merged, few, experts),
            "next": _by_type(chosen, followed, token[followed + 1], types["next"], merged, few, experts),
        }
        arrays |= {prefix + name: array for name, array in found.items()}
    return {f"choice_{name}": array for name, array in arrays.items()}


def blocks_kept(blocks: int, experts: int) -> int:
    """Number of blocks B' of the large counts, which neighbouring blocks are joined into: at most 2048 / N, or 1."""
    kept = min(blocks, MOST_BY_BLOCK // experts)
    return kept if kept in (blocks, *range(FEWEST_BLOCKS, blocks)) else 1


def _frequent(tokens: torch.Tensor) -> torch.Tensor:
    """The token types that are counted, most frequent first, (V,) int64; of equals, the smaller id."""
    types, counts = tokens.unique(return_counts=True)
    order = counts.argsort(descending=True, stable=True)[:MOST_TYPES]
    return types[order][counts[order] >= FEWEST_TOKENS]


def _first(ids: torch.Tensor, rows: torch.Tensor, block: torch.Tensor, blocks: int, experts: int) -> torch.Tensor:
    return _any(ids[:, :1], rows, block, blocks, experts)


def _any(ids: torch.Tensor, rows: torch.Tensor, block: torch.Tensor, blocks: int, experts: int) -> torch.Tensor:
    counts = torch.zeros(blocks * experts, dtype=torch.int64)
    for part in rows.split(_ROWS):
        chosen = ids[part].long()
        cells = (block[part, None] * experts + chosen)[chosen >= 0]
        counts += torch.bincount(cells, minlength=len(counts))
    return counts.view(blocks, experts)


def _pairs(ids: torch.Tensor, rows: torch.Tensor, block: torch.Tensor, blocks: int, experts: int) -> torch.Tensor:
    pairs = torch.zeros(blocks, experts, experts, dtype=torch.int32)
    for number in range(blocks):
        for part in rows[block[rows] == number].split(_ROWS):
            # The last column takes the empty slots. Products of zeros and ones: sums to 2 ** 24 are exact.
            slots = ids[part].long()
            chosen = torch.zeros(len(part), experts + 1)
            chosen.scatter_(1, slots.masked_fill(slots < 0, experts), 1)
            pairs[number] += (chosen[:, :experts].T @ chosen[:, :experts]).to(torch.int32)
    return pairs


def _repeats(ids: torch.Tensor, followed: torch.Tensor, block: torch.Tensor, blocks: int) -> torch.Tensor:
    repeats = torch.zeros(blocks, 3, dtype=torch.int64)
    for part in followed.split(_ROWS):
        here, after = ids[part], ids[part + 1]
        same = (here[:, 0] == after[:, 0]) & (here[:, 0] >= 0)
        common = ((here[:, :, None] == after[:, None, :]) & (here[:, :, None] >= 0)).flatten(1).any(1)
        values = torch.stack([torch.ones_like(same), same, common], 1).long()
        repeats.index_add_(0, block[part], values)
    return repeats


def _by_type(
    ids: torch.Tensor,
    rows: torch.Tensor,
    tokens: torch.Tensor,
    types: torch.Tensor,
    block: torch.Tensor,
    blocks: int,
    experts: int,
) -> torch.Tensor:
    """First choices (blocks, V, N) of the tokens `rows`, by the type that `tokens` (one for each row) gives them."""
    if not len(types):
        return torch.zeros(blocks, 0, experts, dtype=torch.int32)
    ordered, place = types.sort()
    at = torch.searchsorted(ordered, tokens).clamp(max=len(types) - 1)
    first = ids[rows, 0].long()
    kept = (ordered[at] == tokens) & (first >= 0)
    cells = ((block[rows] * len(types) + place[at]) * experts + first)[kept]
    counts = torch.bincount(cells, minlength=blocks * len(types) * experts)
    return counts.view(blocks, len(types), experts).to(torch.int32)


class Confidence:
    """How sure a router is: sums over the tokens of each block, of softmax scores over all N experts.

    Of a token: the entropy of its scores as a share of log N, the largest score minus the second, and the sum of the
    k largest. The scores are the softmax of the logits for every family, whatever the model weighs by.
    """

    def __init__(self, index: TextIndex, experts: int, top_k: int):
        self.experts, self.top_k = experts, min(top_k, experts)
        self._block = torch.as_tensor(index.block).long()
        self._counted = torch.as_tensor(index.position) > 0
        self.sums = torch.zeros(3, index.blocks, dtype=torch.float64)

    def add(self, logits: torch.Tensor, rows: torch.Tensor) -> None:
        """Add tokens. logits: (n, N), any device; rows: (n,) int64, their places in the text."""
        scores = logits.detach().to("cpu", torch.float64).softmax(-1)
        rows = rows.cpu()
        entropy = torch.special.entr(scores).sum(-1) / max(math.log(self.experts), 1e-300)
        best = torch.nn.functional.pad(scores, (0, 1)).topk(max(self.top_k, 2), dim=-1).values
        values = torch.stack([entropy, best[:, 0] - best[:, 1], best[:, : self.top_k].sum(-1)])
        kept = self._counted[rows]
        self.sums.index_add_(1, self._block[rows[kept]], values[:, kept])

    def arrays(self) -> dict[str, torch.Tensor]:
        """confidence_entropy, confidence_margin and confidence_mass, (B,) float64; choice_tokens is their count."""
        return dict(zip(("confidence_entropy", "confidence_margin", "confidence_mass"), self.sums, strict=True))

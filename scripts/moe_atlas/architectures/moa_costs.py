"""Parameters and multiply-accumulates (MACs) of MoA and multi-head models as formulas, and sizes that match.

With d hidden_size, E experts, k of them a token and D head_dim a MoA block has 2EdD + 2dD + dE parameters, and
E(D + d) + 2D more with biases; its projections take 2kdD + dE MACs a query token and 2dD a key token, its attention
map 2kD a pair of query and key. Multi-head attention with heads of total width w: 4dw, and 3w + d with biases; 2dw,
2dw and 2w MACs. (MoA: arXiv 2210.05144, section 3.)
"""

import copy
from typing import NamedTuple

from moe_atlas.architectures.moa_config import MoAConfig
from moe_atlas.errors import AtlasError

# Of sizes that match as well as this, the one whose heads are nearest in width to the experts is taken.
CLOSE = 0.03


class Parameters(NamedTuple):
    """Numbers of parameters. total is the sum of the others; attention: with routers; embedding: with output layer."""

    total: int
    attention: int
    ffn: int
    embedding: int
    norm: int


class Macs(NamedTuple):
    """MACs of one pass over one sequence. total is the sum of the others; attention: the projections alone."""

    total: int
    attention: int
    router: int
    maps: int
    ffn: int
    output: int


class Matched(NamedTuple):
    """A configuration with multi-head attention, and how far it is from what was to be matched, as a fraction of it."""

    config: MoAConfig
    difference: float


def attention_parameters(config: MoAConfig) -> int:
    """Parameters of one attention block, its router and biases included."""
    hidden, width = config.hidden_size, config.head_dim
    if config.attention == "mha":
        inner = config.num_attention_heads * width
        return 4 * hidden * inner + (3 * inner + hidden if config.attention_bias else 0)
    experts = config.num_attention_experts
    biases = experts * (width + hidden) + 2 * width if config.attention_bias else 0
    return 2 * experts * hidden * width + 2 * hidden * width + hidden * experts + biases


def parameters(config: MoAConfig) -> Parameters:
    """Parameters of the model of a configuration: exactly the number of elements of the built one's."""
    hidden, layers = config.hidden_size, sum(config.stacks.values())
    decoder = config.stacks.get("decoder", 0)  # its layers have one attention block and one norm more
    attention = (layers + decoder) * attention_parameters(config)
    ffn = layers * (2 * hidden * config.intermediate_size + config.intermediate_size + hidden)
    matrices = 1 if config.tie_word_embeddings else len(config.stacks) + 1
    norms = 2 * layers + decoder + (len(config.stacks) if config.norm == "pre" else 0)
    parts = (attention, ffn, matrices * config.vocab_size * hidden, norms * 2 * hidden)
    return Parameters(sum(parts), *parts)


def attention_macs(config: MoAConfig, queries: int, keys: int) -> tuple[int, int, int]:
    """MACs of the projections, the router and the map of one attention block: so many query and key tokens."""
    hidden, width = config.hidden_size, config.head_dim
    if config.attention == "mha":
        inner = config.num_attention_heads * width
        return 2 * hidden * inner * (queries + keys), 0, 2 * inner * queries * keys
    chosen = config.num_experts_per_tok
    projections = 2 * hidden * width * (chosen * queries + keys)
    return projections, queries * hidden * config.num_attention_experts, 2 * chosen * width * queries * keys


def macs(config: MoAConfig, tokens: int, source_tokens: int = 0, attention_map: bool = True) -> Macs:
    """MACs of one forward pass over a sequence of `tokens`, with `source_tokens` in the encoder of a translation model.

    Divide by `tokens` for one token. An attention map is counted whole, also where half of it is masked. Not counted:
    embeddings, biases, norms, softmax, the weighing of experts. All of k chosen experts are counted, not all E: what
    a kernel computes besides is its own affair.
    """
    lengths = {"encoder": source_tokens, "decoder": tokens} if config.objective == "translation" else {}
    if bool(lengths) != (source_tokens > 0):
        raise AtlasError(
            f"source_tokens is {source_tokens} for the objective {config.objective}; give a number above 0 for a "
            "translation model, and none for others."
        )
    attention = router = maps = ffn = 0
    for kind, layers in config.stacks.items():
        length = lengths.get(kind, tokens)
        blocks = [(length, length)] + ([(length, source_tokens)] if kind == "decoder" else [])
        for queries, keys in blocks:
            projections, routed, products = attention_macs(config, queries, keys)
            attention += layers * projections
            router += layers * routed
            maps += layers * products if attention_map else 0
        ffn += layers * length * 2 * config.hidden_size * config.intermediate_size
    parts = (attention, router, maps, ffn, tokens * config.hidden_size * config.vocab_size)
    return Macs(sum(parts), *parts)


def matched_heads(config: MoAConfig, by: str, tokens: int = 0, source_tokens: int = 0) -> Matched:
    """The model with multi-head attention that comes nearest to a MoA model; all but its attention is the same.

    by: "parameters" of attention, or "macs" of attention in one pass as `macs` counts it, map included. The heads'
    number and width vary, the width from half to twice that of an expert, and even with rotary positions. Where several
    come within CLOSE, the one with the width nearest to an expert's is taken, and of those the nearest. difference:
    signed, of the match to the MoA model, over the latter. Raises AtlasError for another `by`, and for "macs" without
    tokens.
    """
    if by not in ("parameters", "macs") or (by == "macs" and tokens < 1):
        raise AtlasError(f"matched_heads by {by!r} at {tokens} tokens; give parameters, or macs and a sequence length.")

    def cost(of: MoAConfig) -> int:
        if by == "parameters":
            return parameters(of).attention
        counted = macs(of, tokens, source_tokens)
        return counted.attention + counted.router + counted.maps

    def with_heads(heads: int, width: int) -> MoAConfig:
        made = copy.deepcopy(config)
        made.attention, made.num_attention_heads, made.head_dim = "mha", heads, width
        return made

    wanted, found = cost(config), []
    step = 2 if config.positions == "rotary" else 1
    least = max(step, config.head_dim // 2 // step * step)
    for width in range(least, 2 * config.head_dim + 1, step):
        nearest = wanted / cost(with_heads(1, width))
        for heads in {max(1, int(nearest)), int(nearest) + 1}:
            difference = cost(with_heads(heads, width)) / wanted - 1
            distance = abs(width - config.head_dim)
            close = abs(difference) <= CLOSE
            found.append((not close, distance if close else 0, abs(difference), heads, width, difference))
    *_, heads, width, difference = min(found)
    return Matched(with_heads(heads, width), difference)

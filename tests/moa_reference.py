"""The mixture of attention heads once more, token by token and expert by expert, and small configurations."""

import math

import torch

from moe_atlas.architectures.moa import MoAAttention
from moe_atlas.architectures.moa_config import MoAConfig

SIZES = {
    "vocab_size": 50,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "head_dim": 6,
    "num_attention_experts": 5,
    "num_experts_per_tok": 2,
}


def config(**changes: object) -> MoAConfig:
    """A small configuration; a translation model gets an encoder of two layers."""
    encoder = {"num_encoder_layers": 2} if changes.get("objective") == "translation" else {}
    return MoAConfig(**SIZES | encoder | changes)


def block(kind: str = "causal", seed: int = 0, **changes: object) -> MoAAttention:
    """A MoA block in float64 whose parameters are all of size one over the root of their last axis."""
    made = MoAAttention(config(**changes), 0, kind).double().eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in made.parameters():
            normal = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(normal / math.sqrt(parameter.shape[-1]))
        made.router.weight.mul_(3)  # choices are far from ties
    return made


def states(*shape: int, seed: int = 5) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def weights_of(logits: list[float], k: int, normalization: str) -> dict[int, float]:
    """Chosen expert -> weight, for the logits of one token."""
    powers = [math.exp(logit) for logit in logits]
    chosen = sorted(range(len(logits)), key=lambda expert: -logits[expert])[:k]
    total = sum(powers) if normalization == "none" else sum(powers[expert] for expert in chosen)
    return {expert: powers[expert] / total for expert in chosen}


def forward(
    made: MoAAttention,
    hidden: torch.Tensor,
    source: torch.Tensor | None = None,
    seen: torch.Tensor | None = None,
) -> torch.Tensor:
    """Outputs (B, T, d) of a block without rotary positions; seen (B, S) bool: sources that are no padding."""
    source = hidden if source is None else source
    outputs = torch.zeros_like(hidden)
    for row in range(hidden.shape[0]):
        keys, values = (
            torch.stack([part.weight @ vector + (0 if part.bias is None else part.bias) for vector in source[row]])
            for part in (made.key, made.value)
        )
        for token, vector in enumerate(hidden[row]):
            weights = weights_of((made.router.weight @ vector).tolist(), made.top_k, made.normalization)
            for expert, weight in weights.items():
                query = made.query[expert] @ vector
                query = query if made.query_bias is None else query + made.query_bias[expert]
                scores = keys @ query / math.sqrt(made.head_dim)
                for place in range(len(scores)):
                    if (made.is_causal and place > token) or (seen is not None and not seen[row, place]):
                        scores[place] = -math.inf
                powers = (scores - scores.max()).exp()
                output = made.output[expert] @ (powers @ values / powers.sum())
                output = output if made.output_bias is None else output + made.output_bias[expert]
                outputs[row, token] += weight * output
    return outputs


def _norm(module: torch.nn.Module, vector: torch.Tensor) -> torch.Tensor:
    centred = vector - vector.mean()
    return centred / (centred.square().mean() + 1e-5).sqrt() * module.weight + module.bias


def _ffn(module: torch.nn.Module, vector: torch.Tensor) -> torch.Tensor:
    inner = (module.up_proj.weight @ vector + module.up_proj.bias).clamp(min=0)
    return module.down_proj.weight @ inner + module.down_proj.bias


def stack(made: torch.nn.Module, ids: list[int], source: torch.Tensor | None = None) -> torch.Tensor:
    """States (T, d) after a stack of MoA layers with sinusoidal positions and ReLU, for one row of token ids."""
    config, half = made.config, made.config.hidden_size // 2
    angles = [[place / 10000 ** (j / half) for j in range(half)] for place in range(len(ids))]
    table = torch.tensor([[*map(math.sin, row), *map(math.cos, row)] for row in angles], dtype=torch.float64)
    states = made.embed_tokens.weight[ids] * math.sqrt(config.hidden_size) + table
    for layer in made.layers:
        parts = [(lambda given, layer=layer: forward(layer.self_attn, given[None])[0], layer.self_attn_norm)]
        if layer.cross_attn is not None:
            cross = lambda given, layer=layer: forward(layer.cross_attn, given[None], source[None])[0]  # noqa: E731
            parts.append((cross, layer.cross_attn_norm))
        parts.append((lambda given, layer=layer: torch.stack([_ffn(layer.mlp, row) for row in given]), layer.mlp_norm))
        for block, norm in parts:
            if config.norm == "pre":
                states = states + block(torch.stack([_norm(norm, row) for row in states]))
            else:
                states = torch.stack([_norm(norm, row) for row in states + block(states)])
    return torch.stack([_norm(made.norm, row) for row in states]) if config.norm == "pre" else states

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

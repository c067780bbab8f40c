"""Tiny random checkpoints of every demo family, in the Hub's format, for tests."""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, JetMoeConfig, MistralConfig, MixtralConfig, OlmoeConfig

from moe_atlas import architectures
from moe_atlas.architectures.deepseek import DeepseekConfig
from moe_atlas.architectures.grok import Grok1Config

_COMMON = {
    "vocab_size": 96,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 40,
    "max_position_embeddings": 128,
}


def config(family: str, **changes):
    """A small configuration of one family; `changes` override its values."""
    common = _COMMON | changes
    match family:
        case "mistral":
            return MistralConfig(**common)
        case "mixtral":
            return MixtralConfig(**{"num_local_experts": 6, "num_experts_per_tok": 2} | common)
        case "olmoe":
            return OlmoeConfig(**{"num_experts": 8, "num_experts_per_tok": 3} | common)
        case "deepseek":
            own = {"n_routed_experts": 7, "num_experts_per_tok": 3, "n_shared_experts": 2, "moe_intermediate_size": 24}
            return DeepseekConfig(**own | {"first_k_dense_replace": 1} | common)
        case "grok":
            own = {"num_experts": 5, "num_experts_per_tok": 2, "max_attn_value": 30.0, "attn_output_multiplier": 0.35}
            return Grok1Config(**own | {"embedding_multiplier_scale": 5.0, "output_multiplier_scale": 0.6} | common)
        case "jetmoe":
            own = {"num_local_experts": 4, "num_experts_per_tok": 2, "kv_channels": 8}
            return JetMoeConfig(**own | {name: common[name] for name in common if name != "num_attention_heads"})
    raise ValueError(family)


FAMILIES = ("mistral", "mixtral", "olmoe", "deepseek", "grok", "jetmoe")


def model(family: str, seed: int = 0, dtype: torch.dtype = torch.float32, **changes) -> torch.nn.Module:
    """A model with weights far from their initial values, so that every part matters to the logits."""
    architectures.register()
    generator = torch.Generator().manual_seed(seed)
    network = AutoModelForCausalLM.from_config(config(family, **changes)).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            spread = 0.25 / parameter.shape[-1] ** 0.5 if parameter.dim() > 1 else 0.1
            parameter.add_(4 * spread * torch.randn(parameter.shape, generator=generator))
    return network.to(dtype)


def save(family: str, directory: Path, max_shard_size: str = "5GB", **arguments) -> torch.nn.Module:
    """Write a random checkpoint of the family and return the model it came from."""
    network = model(family, **arguments)
    network.save_pretrained(directory, max_shard_size=max_shard_size)
    return network


def token_ids(lengths: list[int], seed: int = 1, vocabulary: int = 96) -> list[list[int]]:
    """Random token ids, one list a length."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, vocabulary, (length,), generator=generator).tolist() for length in lengths]

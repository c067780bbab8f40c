"""One tiny random checkpoint a model type: the table that every parity test runs over, and how its rows are built.

A new row gets all tests of test_model_types.py. Weights are far from their initial values, so that every part matters.
"""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig

from moe_atlas import architectures

# A type takes of these what its config has. Widths are multiples of 16 bytes, which grouped_mm needs.
COMMON = {
    "vocab_size": 96,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 40,
    "moe_intermediate_size": 16,
    "num_experts_per_tok": 3,
    "norm_topk_prob": True,
    "max_position_embeddings": 128,
    "sliding_window": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


@dataclass(frozen=True)
class ModelType:
    """One row. config: values over COMMON; None takes the class's default.

    experts, top_k, width, shared: what the description of the checkpoint must say (N, k, m, shared; 0 experts: dense).
    layers: those with FFN experts; where there are none, N and k are the attention experts'. router: path, from the
    module that holds the experts, to the module with the router's weight. fused: how the files hold the experts where
    not one tensor an expert and matrix: "rows" (N, 2m, d), "columns" (N, d, 2m), "interleaved" (N, d, 2m), "stacked"
    (N m, d).
    """

    config: dict = field(default_factory=dict)
    experts: int = 8
    top_k: int = 3
    width: int = 16
    shared: int = 0
    layers: tuple[int, ...] = (0, 1)
    router: str = "gate"
    fused: str | None = None


EIGHT = {"num_experts": 8}
LOCAL = {"num_local_experts": 8, "intermediate_size": 16}
ROUTED = {"n_routed_experts": 8}
GROUPS = {"n_group": 4, "topk_group": 2}
DEEPSEEK = ROUTED | GROUPS | {"n_shared_experts": 2}
LATENT = {
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
    "head_dim": None,
}
INDEX = {"index_topk": 4, "index_head_dim": 16, "index_n_heads": 2}
LINEAR = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
SHARED = {"shared_expert_intermediate_size": 24}
DENSE_FIRST = {"first_k_dense_replace": 1}
SPARSE_LAST = (1,)

TYPES = {
    "mistral": ModelType({"num_hidden_layers": 3, "sliding_window": None}, experts=0, top_k=0, width=40, layers=()),
    "mixtral": ModelType(
        {"num_hidden_layers": 3, "num_local_experts": 6, "num_experts_per_tok": 2, "sliding_window": None},
        experts=6,
        top_k=2,
        width=40,
        layers=(0, 1, 2),
    ),
    "olmoe": ModelType({"num_hidden_layers": 3, "norm_topk_prob": False} | EIGHT, width=40, layers=(0, 1, 2)),
    "deepseek": ModelType(
        {"num_hidden_layers": 3, "n_routed_experts": 7, "n_shared_experts": 2, "moe_intermediate_size": 24}
        | {"norm_topk_prob": False},
        experts=7,
        width=24,
        shared=2,
        layers=(1, 2),
    ),
    "grok-1": ModelType(
        {"num_hidden_layers": 3, "num_experts": 5, "num_experts_per_tok": 2, "attn_output_multiplier": 0.35}
        | {"embedding_multiplier_scale": 5.0, "output_multiplier_scale": 0.6},
        experts=5,
        top_k=2,
        width=40,
        layers=(0, 1, 2),
    ),
    "grok": ModelType(
        {"num_experts": 5, "num_experts_per_tok": 2, "embedding_multiplier_scale": 5.0},
        experts=5,
        top_k=2,
        width=40,
    ),
    "jetmoe": ModelType(
        {"num_hidden_layers": 3, "num_local_experts": 4, "num_experts_per_tok": 2, "kv_channels": 8},
        experts=4,
        top_k=2,
        width=40,
        layers=(0, 1, 2),
        router="router.layer",
        fused="rows",
    ),
    "afmoe": ModelType(
        EIGHT | {"num_dense_layers": 1, "num_shared_experts": 2, "route_scale": 1.7},
        shared=2,
        layers=SPARSE_LAST,
        router="router.gate",
    ),
    "aria_text": ModelType(
        {"moe_num_experts": 8, "moe_topk": 3, "intermediate_size": 16},
        shared=2,
        router="router",
        fused="columns",
    ),
    "axk1": ModelType(LATENT | DEEPSEEK, shared=2, layers=SPARSE_LAST),
    "axk2": ModelType(LATENT | DEEPSEEK | INDEX | {"gated_norm_rank": 4}, shared=2, layers=SPARSE_LAST),
    "bailing_hybrid": ModelType(
        {**LATENT, **GROUPS, "q_lora_rank": None, "num_local_experts": 8, "n_shared_experts": 2, "layer_group_size": 2}
        | DENSE_FIRST,
        shared=2,
        layers=SPARSE_LAST,
    ),
    "beam": ModelType(EIGHT | GROUPS | {"mlp_layer_types": ["dense", "sparse"]}, layers=SPARSE_LAST),
    "cohere2_moe": ModelType(EIGHT | {"num_shared_experts": 2, "logit_scale": 1.0, "intermediate_size": 16}, shared=2),
    "dbrx": ModelType(
        {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 128}
        | {"attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0}}
        | {"ffn_config": {"ffn_hidden_size": 16, "moe_num_experts": 8, "moe_top_k": 3}},
        router="router.layer",
        fused="stacked",
    ),
    "deepseek_v2": ModelType(
        LATENT | DEEPSEEK | DENSE_FIRST | {"topk_method": "group_limited_greedy", "routed_scaling_factor": 1.5},
        shared=2,
        layers=SPARSE_LAST,
    ),
    "deepseek_v3": ModelType(LATENT | DEEPSEEK | DENSE_FIRST, shared=2, layers=SPARSE_LAST),
    "deepseek_v32": ModelType(LATENT | DEEPSEEK | DENSE_FIRST | INDEX, shared=2, layers=SPARSE_LAST),
    "deepseek_v4": ModelType(
        ROUTED
        | {"mlp_layer_types": ["hash_moe", "moe"], "intermediate_size": None, "num_key_value_heads": 1}
        | {"q_lora_rank": 16, "o_groups": 2, "o_lora_rank": 8, "hc_sinkhorn_iters": 2}
        | INDEX
        | {"index_head_dim": 8},
        shared=1,
    ),
    "dots1": ModelType(DEEPSEEK | DENSE_FIRST, shared=2, layers=SPARSE_LAST),
    "dots3_note_text": ModelType(
        LATENT | DEEPSEEK | INDEX | {"shared_experts_intermediate_size": 16}, shared=2, layers=SPARSE_LAST
    ),
    "emoe": ModelType(
        {"dense_model_type": "mistral", "num_hidden_layers": 3, "num_experts": 8, "emoe_layers": [0, 2]}
        | {"intermediate_size": 64},
        width=8,
        layers=(0, 2),
        router="router",
    ),
    "exaone_moe": ModelType(EIGHT | GROUPS, shared=1, layers=SPARSE_LAST),
    "flex_olmo": ModelType(EIGHT, width=40),
    "flint": ModelType(EIGHT | SHARED | {"mlp_only_layers": [0]}, shared=1, layers=SPARSE_LAST),
    "gemma4_text": ModelType(
        EIGHT
        | {"enable_moe_block": True, "top_k_experts": 3}
        | {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 96},
        router="router.proj",
        fused="rows",
    ),
    "glm4_moe": ModelType(DEEPSEEK, shared=2, layers=SPARSE_LAST),
    "glm4_moe_lite": ModelType(LATENT | DEEPSEEK, shared=2, layers=SPARSE_LAST),
    "gpt_oss": ModelType(LOCAL, router="router", fused="interleaved"),
    "granitemoe": ModelType(LOCAL, router="router", fused="rows"),
    "granitemoe_swa": ModelType(LOCAL | {"shared_intermediate_size": 24}, shared=1, router="router", fused="rows"),
    "granitemoehybrid": ModelType(
        LOCAL
        | {"shared_intermediate_size": 24, "layer_types": ["mamba", "attention"], "mamba_chunk_size": 8}
        | {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8},
        shared=1,
        router="router",
        fused="rows",
    ),
    "granitemoeshared": ModelType(LOCAL | {"shared_intermediate_size": 24}, shared=1, router="router", fused="rows"),
    "hy_v3": ModelType(EIGHT | {"num_shared_experts": 2}, shared=2, layers=SPARSE_LAST),
    "inkling_text": ModelType(
        ROUTED
        | {"swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "swa_head_dim": 8, "d_rel": 4, "rel_extent": 16}
        | {"logits_mup_width_multiplier": 1.0},
        fused="rows",
    ),
    "jamba": ModelType(
        EIGHT | {"intermediate_size": 16, "attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 4},
        layers=SPARSE_LAST,
        router="router",
    ),
    "kimi_linear": ModelType(
        {**LATENT, **GROUPS, "q_lora_rank": None, "num_local_experts": 8, "n_shared_experts": 2}
        | {"layer_types": ["linear_attention", "full_attention"], "linear_head_dim": 8, "linear_num_heads": 4},
        shared=2,
        layers=SPARSE_LAST,
    ),
    "kolibri1": ModelType(EIGHT | SHARED, shared=1),
    "laguna": ModelType(EIGHT | SHARED | {"moe_router_logit_softcapping": 5.0}, shared=1, layers=SPARSE_LAST),
    "lfm2_moe": ModelType(
        EIGHT | {"num_dense_layers": 1, "layer_types": ["full_attention", "conv"]}, layers=SPARSE_LAST
    ),
    "llama4_text": ModelType(
        LOCAL | {"intermediate_size_mlp": 24, "num_experts_per_tok": 2, "attention_chunk_size": 16},
        top_k=2,
        shared=1,
        router="router",
        fused="columns",
    ),
    "mellum": ModelType(EIGHT),
    "mimo_v2_flash": ModelType(ROUTED | GROUPS | {"v_head_dim": 8}, layers=SPARSE_LAST),
    "minimax": ModelType(LOCAL | {"block_size": 8}),
    "minimax_m2": ModelType(LOCAL),
    "minimax_m3_vl_text": ModelType(
        LOCAL
        | {"dense_intermediate_size": 24, "shared_intermediate_size": 24, "rotary_dim": 4}
        | {"index_n_heads": 2, "index_head_dim": 8},
        shared=1,
        fused="rows",
    ),
    "moa": ModelType(EIGHT | {"attention_bias": True}, width=40, layers=(), router="router"),
    "nemotron_h": ModelType(
        ROUTED
        | GROUPS
        | {"layers_block_type": ["mamba", "moe", "attention", "moe"], "moe_shared_expert_intermediate_size": 24}
        | {"ssm_state_size": 8, "mamba_num_heads": 8, "mamba_head_dim": 8, "n_groups": 2, "chunk_size": 8},
        shared=1,
        layers=(1, 3),
    ),
    "phimoe": ModelType(LOCAL | {"num_experts_per_tok": 2}, top_k=2, router="router"),
    "qwen2_moe": ModelType(EIGHT | SHARED | {"norm_topk_prob": False}, shared=1),
    "qwen3_5_moe_text": ModelType(EIGHT | SHARED | LINEAR, shared=1),
    "qwen3_moe": ModelType(EIGHT),
    "qwen3_next": ModelType(EIGHT | SHARED | LINEAR, shared=1),
    "qwen4_exp_text": ModelType(
        EIGHT
        | SHARED
        | LINEAR
        | {"hc_lowrank": 8, "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 8}
        | {"indexer_compress_ratio": 2},
        shared=1,
    ),
    "solar_open": ModelType(DEEPSEEK, shared=2),
}
MOE = [name for name, row in TYPES.items() if row.experts]


def config(name: str, **changes: object) -> PreTrainedConfig:
    """The configuration of a row of the table, with `changes` over its values."""
    architectures.register()
    of_type = CONFIG_MAPPING[name]
    own = TYPES[name].config | changes
    dropped = {key for key, value in own.items() if value is None}
    own = {key: value for key, value in own.items() if value is not None}
    # An EMoE has the values of its dense model besides its own.
    classes = (of_type, CONFIG_MAPPING[own["dense_model_type"]]) if "dense_model_type" in own else (of_type,)
    known = {key.name for each in classes for key in dataclasses.fields(each)} | set(of_type.attribute_map)
    if unknown := set(own) - known:
        raise ValueError(f"{name} has no config value {sorted(unknown)}")
    # An alias of a value that the row gives would be one value given twice.
    given = {*own, *dropped, *(of_type.attribute_map.get(key, key) for key in own)}
    values = {key: value for key, value in COMMON.items() if key in known and key not in given}
    return of_type(**values, **own)


def model(name: str, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: object) -> torch.nn.Module:
    """A model of the row, far from its initial weights; what routers add to their scores is not zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = AutoModelForCausalLM.from_config(config(name, **changes)).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            spread = 1 / parameter.shape[-1] ** 0.5 if parameter.dim() > 1 else 0.4
            parameter.add_(spread * torch.randn(parameter.shape, generator=generator))
        for path, buffer in network.named_buffers():
            if path.endswith(("_bias", "_biases")):
                buffer.add_(0.2 * torch.randn(buffer.shape, generator=generator))
            elif path.endswith("tid2eid"):  # a token's experts, by its id
                order = torch.rand(len(buffer), TYPES[name].experts, generator=generator).argsort(1)
                buffer.copy_(order[:, : buffer.shape[1]])
    return network.to(dtype)


def save(name: str, directory: Path, max_shard_size: str = "5GB", **arguments: object) -> torch.nn.Module:
    """Write a random checkpoint of the row and return the model it came from."""
    network = model(name, **arguments)
    network.save_pretrained(directory, max_shard_size=max_shard_size)
    return network


def token_ids(lengths: list[int], seed: int = 1, vocabulary: int = COMMON["vocab_size"]) -> list[list[int]]:
    """Random token ids, one list a length."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, vocabulary, (length,), generator=generator).tolist() for length in lengths]

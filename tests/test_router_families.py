"""The rule of each family's router, found from a pass through a random checkpoint of it."""

import families
import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from moe_atlas.architectures.layers import decoder_layers
from moe_atlas.architectures.sites import find_sites
from moe_atlas.behavioral.router_rule import router_rule
from moe_atlas.checkpoints import Checkpoint
from moe_atlas.probe import extract

EXPERTS = 8
COMMON = {
    "vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 32, "moe_intermediate_size": 24, "max_position_embeddings": 128, "head_dim": 8,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
LATENT = {
    "kv_lora_rank": 16, "q_lora_rank": None, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
    "num_key_value_heads": 4, "first_k_dense_replace": 0, "n_shared_experts": 1, "n_routed_experts": 8,
}  # fmt: skip
EIGHT = {"num_experts": 8, "num_experts_per_tok": 3}
LOCAL = {"num_local_experts": 8, "num_experts_per_tok": 3}
CONFIGS = {
    "qwen2_moe": EIGHT | {"shared_expert_intermediate_size": 24},
    "deepseek_v3": LATENT | {"num_experts_per_tok": 2, "n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5},
    "deepseek_v2": LATENT
    | {"num_experts_per_tok": 3, "n_group": 4, "topk_group": 2, "topk_method": "group_limited_greedy"}
    | {"routed_scaling_factor": 16.0},
    "deepseek_v4": {
        "n_routed_experts": 8,
        "num_experts_per_tok": 3,
        "num_hash_layers": 0,
        "mlp_layer_types": ["moe"] * 2,
    },
    "gpt_oss": LOCAL,
    "glm4_moe": {"n_routed_experts": 8, "num_experts_per_tok": 3, "first_k_dense_replace": 0}
    | {"n_group": 1, "topk_group": 1, "routed_scaling_factor": 1.5},
    "minimax_m2": LOCAL | {"rotary_dim": 8},
    "phimoe": LOCAL | {"num_experts_per_tok": 2},
    "lfm2_moe": EIGHT | {"num_dense_layers": 0, "layer_types": ["full_attention"] * 2},
    "gemma4_text": {"num_experts": 8, "top_k_experts": 3, "enable_moe_block": True, "global_head_dim": 8}
    | {"hidden_size_per_layer_input": 0, "layer_types": ["full_attention"] * 2},
}

LARGEST, BIASED = "largest logits", "largest score + bias"
EXPECTED = {
    "mixtral": ("softmax", "chosen experts", 1, LARGEST),
    "olmoe": ("softmax", "all experts", 1, LARGEST),
    "deepseek": ("softmax", "all experts", 1, LARGEST),
    "grok": ("softmax", "all experts", 1, LARGEST),
    "jetmoe": ("softmax", "chosen experts", 1, LARGEST),
    "qwen2_moe": ("softmax", "all experts", 1, LARGEST),
    "deepseek_v3": ("sigmoid", "chosen experts", 2.5, "groups + bias"),
    "deepseek_v2": ("softmax", "all experts", 16, "groups"),
    "deepseek_v4": ("sqrt softplus", "chosen experts", 1.5, BIASED),
    "gpt_oss": ("softmax", "chosen experts", 1, LARGEST),
    "glm4_moe": ("sigmoid", "chosen experts", 1.5, BIASED),
    "minimax_m2": ("sigmoid", "chosen experts", 1, BIASED),
    "emoe": ("constant", "none", 1, LARGEST),
    "phimoe": ("sparsemixer", "none", 1, LARGEST),
    "lfm2_moe": ("sigmoid", "chosen experts", 1, BIASED),
    "gemma4_text": ("softmax", "chosen experts", None, LARGEST),  # its own scale for each expert
}
SEQUENCES = families.token_ids([40, 23, 50])


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """A saved random checkpoint of every family; selection biases and scales of experts are random too."""
    root = tmp_path_factory.mktemp("routers")
    for family in EXPECTED:
        if family in (*families.FAMILIES, "emoe"):
            families.save(family, root / family)
            continue
        network = AutoModelForCausalLM.from_config(CONFIG_MAPPING[family](**COMMON | CONFIGS[family])).eval()
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in network.parameters():
                spread = 1 / parameter.shape[-1] ** 0.5 if parameter.dim() > 1 else 0.2
                parameter.add_(spread * torch.randn(parameter.shape, generator=generator))
            for name, buffer in network.named_buffers():
                if name.endswith("_bias"):
                    buffer.add_(0.2 * torch.randn(buffer.shape, generator=generator))
        network.save_pretrained(root / family)
    return root


def rules_of(sites, tensors):
    """(layer, site) -> row of the table router_rule."""
    for site in sites:
        prefix = f"layer_{site['layer']}.{site['site']}."
        own = {name.removeprefix(prefix): a.numpy() for name, a in tensors.items() if name.startswith(prefix)}
        yield (site["layer"], site["site"]), router_rule(own, site["labels"]).row(0, named=True)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", EXPECTED)
def test_the_rule_of_each_family_is_found(checkpoints, family, dtype):
    score, normalised, scale, selection = EXPECTED[family]
    sites, tensors = extract(Checkpoint(checkpoints / family), SEQUENCES, keep_tokens=False, dtype=dtype)
    rows = dict(rules_of(sites, tensors))
    assert len(rows) == (6 if family == "jetmoe" else 3 if family in ("mixtral", "olmoe", "grok") else 2)
    for row in rows.values():
        assert (row["score"], row["normalised"], row["selection"]) == (score, normalised, selection)
        assert row["selection_agreement"] == 1 and row["tokens"] == sum(map(len, SEQUENCES))
        rounding = torch.finfo(getattr(torch, dtype)).eps
        assert row["weight_error"] < 1e-6 + 2 * rounding
        if scale is None:
            assert 0.1 < row["scale_spread"] < 10
        else:
            # 1e-6 is what lfm2_moe adds to the sum of scores.
            assert row["scale"] == pytest.approx(scale, rel=2e-6 + 2 * rounding) and row["scale_spread"] == 0
        assert row["logit_error"] < (1e-5 if dtype == "float32" else 0.05)


@pytest.mark.parametrize("family", CONFIGS)
def test_recorded_weights_are_what_the_experts_are_given(checkpoints, family):
    """Ids and weights of the whole model's own forward, at the door of its experts, against the recorded ones."""
    _, tensors = extract(Checkpoint(checkpoints / family), SEQUENCES[:1], keep_tokens=True)
    network = AutoModelForCausalLM.from_pretrained(checkpoints / family).eval()
    given = {}
    for index, layer in enumerate(decoder_layers(network)):
        for site in find_sites(layer):

            def keep(_module, arguments, index=index):
                given[index] = arguments[1:]

            site.experts.register_forward_pre_hook(keep)
    with torch.no_grad():
        network(torch.tensor(SEQUENCES[:1]))
    assert len(given) == 2
    for index, (ids, weights) in given.items():
        ours = tensors[f"layer_{index}.ffn.ids"], tensors[f"layer_{index}.ffn.weights"]
        dense = [torch.zeros(len(ids), EXPERTS).scatter(1, i, w.float()) for i, w in ((ids, weights), ours)]
        torch.testing.assert_close(dense[1], dense[0], atol=1e-5, rtol=1e-5)

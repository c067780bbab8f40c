"""DeepSeekMoE v1 and Grok-1: our classes against the definitions written out, and the Hub's formats.

The definitions are in reference_forward.py.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from reference_forward import reference_deepseek, reference_grok, tanh_gelu
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from moe_atlas.architectures import register
from moe_atlas.architectures.config import read_config
from moe_atlas.architectures.deepseek import DeepseekTopKRouter
from moe_atlas.architectures.grok import Grok1TopKRouter
from moe_atlas.architectures.internals import make_buffers
from moe_atlas.checkpoints import Checkpoint
from moe_atlas.errors import AtlasError
from moe_atlas.stream import LayerStream

register()

# Widths are multiples of 16 bytes, which grouped_mm, the default way to compute experts, needs.
SIZES = {"vocab_size": 40, "hidden_size": 24, "num_attention_heads": 4, "num_hidden_layers": 3}
CONFIGS = {
    "deepseek": SIZES
    | {"intermediate_size": 20, "num_key_value_heads": 4, "moe_intermediate_size": 8, "n_routed_experts": 12}
    | {"num_experts_per_tok": 3, "n_shared_experts": 2, "first_k_dense_replace": 1},
    "deepseek-renormalised": SIZES
    | {"intermediate_size": 20, "num_key_value_heads": 2, "moe_intermediate_size": 8, "n_routed_experts": 5}
    | {"num_experts_per_tok": 2, "n_shared_experts": None, "moe_layer_freq": 2, "norm_topk_prob": True},
    "grok-1": SIZES
    | {"intermediate_size": 16, "num_key_value_heads": 2, "num_experts": 6, "attn_output_multiplier": 0.4}
    | {"embedding_multiplier_scale": 3.0, "output_multiplier_scale": 0.6, "max_attn_value": 1.5, "pad_token_id": 0},
}
TOKENS = torch.tensor([[3, 17, 5, 5, 39, 22, 8, 1, 11], [30, 2, 9, 14, 14, 27, 6, 33, 4]])


def build(name: str, dtype: torch.dtype = torch.float64):
    """A random model whose norm weights are not 1 and whose attention and routers are far from uniform."""
    config = AutoConfig.for_model(name.removesuffix("-renormalised"), **CONFIGS[name])
    model = AutoModelForCausalLM.from_config(config).to(dtype).eval()
    if dtype == torch.float64:
        model.set_experts_implementation("eager")  # torch's grouped_mm, the default, has no float64
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(1 + 0.2 * noise if parameter.dim() == 1 else 0.4 * noise)
    return model


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_are_those_of_the_definition(name, tmp_path):
    model = build(name)
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    reference = reference_grok if name == "grok-1" else reference_deepseek
    expected = torch.stack([reference(ids, weights, model.config) for ids in TOKENS])
    with torch.no_grad():
        torch.testing.assert_close(model(TOKENS).logits, expected, rtol=0, atol=1e-10)


# A layer of the other port of Grok-1, by its names and by those of the definition.
OTHER_NAMES = {
    "rms_norm.weight": "pre_attn_norm.scale",
    "rms_norm_1.weight": "post_attn_norm.scale",
    "rms_norm_2.weight": "pre_moe_norm.scale",
    "rms_norm_3.weight": "post_moe_norm.scale",
    "multi_head_attention.query.weight": "attn.q_proj.weight",
    "multi_head_attention.key.weight": "attn.k_proj.weight",
    "multi_head_attention.value.weight": "attn.v_proj.weight",
    "multi_head_attention.linear.weight": "attn.o_proj.weight",
    "router.weight": "moe_block.gate.weight",
} | {
    f"moe.{expert}.{name}.weight": f"moe_block.experts.{expert}.{name}.weight"
    for expert in range(6)
    for name in ("linear", "linear_v", "linear_1")
}


@pytest.mark.parametrize("model_type", ["grok", None])
def test_the_other_port_of_grok_gives_the_logits_of_the_definition(tmp_path, model_type):
    """Files of that port written by hand: its names, .bin shards, no LM head, its config's keys, the tanh GELU."""
    generator, shapes = torch.Generator().manual_seed(3), {}
    wide, narrow, inner = SIZES["hidden_size"], 12, 16
    for name in OTHER_NAMES:
        rows, columns = narrow if name.split(".")[1] in ("key", "value") else wide, wide
        if name.startswith("router"):
            rows = 6
        elif name.startswith("moe"):
            rows, columns = (wide, inner) if name.endswith("linear_1.weight") else (inner, wide)
        for layer in range(3):
            shapes[f"transformer.decoder_layer.{layer}.{name}"] = (rows,) if "rms" in name else (rows, columns)
    shapes |= {"transformer.in_out_embed.weight": (40, wide), "transformer.rms_norm.weight": (wide,)}
    tensors = {
        name: 1 + 0.2 * torch.randn(shape, generator=generator)
        if len(shape) == 1
        else 0.4 * torch.randn(shape, generator=generator)
        for name, shape in shapes.items()
    }
    shards = {f"pytorch_model-{i + 1:05}-of-00003.bin": list(tensors)[i::3] for i in range(3)}
    for file, names in shards.items():
        torch.save({name: tensors[name] for name in names}, tmp_path / file)
    index = {name: file for file, names in shards.items() for name in names}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": index}))
    values = {key: value for key, value in CONFIGS["grok-1"].items() if key not in ("num_experts", "max_attn_value")}
    values |= {"num_local_experts": 6, "rope_theta": 10000.0, "sliding_window": None, "hidden_act": "gelu_new"}
    values |= {"model_type": model_type} if model_type else {}
    write_config(tmp_path, architectures=["GrokForCausalLM"], **values)

    stream = LayerStream(Checkpoint(tmp_path))
    stream.begin([TOKENS])
    for layer in range(len(stream)):
        with stream.layer(layer):
            stream.step(0)
    assert stream.config.max_attn_value == 30 and stream.config.num_experts == 6
    weights = {
        "model.embed_tokens.weight": tensors["transformer.in_out_embed.weight"],
        "model.norm.scale": tensors["transformer.rms_norm.weight"],
    } | {
        f"model.layers.{layer}.{ours}": tensors[f"transformer.decoder_layer.{layer}.{theirs}"]
        for layer in range(3)
        for theirs, ours in OTHER_NAMES.items()
    }
    weights = {name: tensor.double() for name, tensor in weights.items()}
    expected = torch.stack([reference_grok(ids, weights, stream.config, tanh_gelu) for ids in TOKENS])
    torch.testing.assert_close(stream.logits(0), expected.float(), rtol=0, atol=2e-5)
    other = torch.stack([reference_grok(ids, weights, stream.config) for ids in TOKENS])
    assert (other - expected).abs().max() > 1e-3  # the two GELUs can be told apart here


ROUTERS = (DeepseekTopKRouter, Grok1TopKRouter)
EXPERT_NAMES = {
    "deepseek": ("mlp.experts", ("gate_proj", "up_proj", "down_proj"), [1, 2], 12),
    "grok-1": ("moe_block.experts", ("linear", "linear_v", "linear_1"), [0, 1, 2], 6),
}


@pytest.mark.parametrize("shard", ["1GB", "8KB"])
@pytest.mark.parametrize("name", EXPERT_NAMES)
def test_saved_files_have_the_hubs_names_and_load_again(name, shard, tmp_path):
    model = build(name, torch.float32)
    model.save_pretrained(tmp_path, max_shard_size=shard)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert (len(files) > 1) == (shard == "8KB")
    stored = {key: tensor for file in files for key, tensor in load_file(file).items()}
    block, matrices, layers, n_experts = EXPERT_NAMES[name]
    expected = {
        f"model.layers.{layer}.{block}.{expert}.{matrix}.weight"
        for layer in layers
        for expert in range(n_experts)
        for matrix in matrices
    }
    assert {key for key in stored if f".{block}." in key} == expected
    assert all(tensor.dim() <= 2 for tensor in stored.values())

    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    with torch.no_grad():
        assert torch.equal(loaded(TOKENS).logits, model(TOKENS).logits)


@pytest.mark.parametrize("name", EXPERT_NAMES)
def test_a_registered_experts_function_replaces_the_experts(name):
    model, calls = build(name), []

    def all_experts(experts, hidden_states, top_k_index, top_k_weights):
        calls.append((tuple(hidden_states.shape), tuple(top_k_index.shape), tuple(top_k_weights.shape)))
        act, up = torch.einsum("emd,td->tem", experts.gate_up_proj, hidden_states).chunk(2, dim=-1)
        outputs = torch.einsum("edm,tem->ted", experts.down_proj, experts.act_fn(act) * up)
        chosen = outputs.gather(1, top_k_index[..., None].expand(-1, -1, outputs.shape[-1]))
        return (top_k_weights[..., None] * chosen).sum(1)

    ALL_EXPERTS_FUNCTIONS.register("test_all_experts", all_experts)
    with torch.no_grad():
        model.set_experts_implementation("eager")
        expected = model(TOKENS).logits
        model.set_experts_implementation("test_all_experts")
        got = model(TOKENS).logits
    k = model.config.num_experts_per_tok
    assert calls == [((18, 24), (18, k), (18, k))] * len(EXPERT_NAMES[name][2])
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", EXPERT_NAMES)
def test_cached_and_padded_tokens_have_the_logits_of_the_whole_sequence(name):
    model = build(name, torch.float32)
    with torch.no_grad():
        whole = model(TOKENS).logits
        first = model(TOKENS[:, :4], use_cache=True)
        rest = model(TOKENS[:, 4:], past_key_values=first.past_key_values).logits
        padded = torch.cat([torch.zeros(2, 3, dtype=torch.long), TOKENS], dim=1)
        mask = (torch.arange(12) >= 3).long().expand(2, -1)
        shifted = model(padded, attention_mask=mask, position_ids=(torch.arange(12) - 3).clamp(0)[None]).logits
    torch.testing.assert_close(rest, whole[:, 4:], rtol=0, atol=2e-4)
    torch.testing.assert_close(shifted[:, 3:], whole, rtol=0, atol=2e-4)


@pytest.mark.parametrize("name", EXPERT_NAMES)
def test_every_parameter_learns_and_router_hooks_see_logits(name):
    model, logits = build(name, torch.float32).train(), []
    for module in model.modules():
        if isinstance(module, ROUTERS):
            module.register_forward_hook(lambda module, args, output: logits.append(output[0]))
    loss = model(TOKENS, labels=TOKENS).loss
    assert len(logits) == len(EXPERT_NAMES[name][2])
    assert all(z.shape == (18, EXPERT_NAMES[name][3]) and z.requires_grad for z in logits)
    (loss + sum(z.logsumexp(-1).square().mean() for z in logits)).backward()
    assert [key for key, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []


def test_routers_round_where_the_published_ones_do():
    """DeepSeek's softmax is in bfloat16, where experts tie and the choice changes; Grok's is in float32."""
    hidden = 0.02 * torch.randn(50, 24, generator=torch.Generator().manual_seed(1))
    hidden = hidden.bfloat16()
    for name, wide in (("deepseek", False), ("grok-1", True)):
        model = build(name, torch.bfloat16)
        router = next(m for m in model.modules() if isinstance(m, ROUTERS))
        logits, weights, indices = router(hidden)
        assert logits.dtype == weights.dtype == torch.bfloat16
        k = model.config.num_experts_per_tok
        in_float32 = logits.float().softmax(-1).topk(k, dim=-1)
        in_bfloat16 = logits.softmax(-1).topk(k, dim=-1)
        assert not torch.equal(in_float32.indices, in_bfloat16.indices)
        expected = in_float32 if wide else in_bfloat16
        assert torch.equal(weights, expected.values.bfloat16()) and torch.equal(indices, expected.indices)


@pytest.mark.parametrize("name", EXPERT_NAMES)
def test_new_models_start_with_norms_of_one_and_small_random_matrices(name):
    config = AutoConfig.for_model(name, **CONFIGS[name], initializer_range=0.05)
    for key, parameter in AutoModelForCausalLM.from_config(config).named_parameters():
        if parameter.dim() == 1:
            assert torch.equal(parameter, torch.ones(24)), key
        else:
            assert 0.035 < parameter.std() < 0.065 and parameter.mean().abs() < 0.02, key


@pytest.mark.parametrize("name", EXPERT_NAMES)
def test_meta_model_gets_its_rotary_table(name):
    real = build(name, torch.float32)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(real.config)
    assert all(parameter.is_meta for parameter in model.parameters())
    make_buffers(model)
    buffers = dict(model.named_buffers())
    assert buffers.keys() == {"model.rotary_emb.inv_freq", "model.rotary_emb.original_inv_freq"}
    for buffer in buffers.values():
        assert torch.equal(buffer, real.model.rotary_emb.inv_freq)


def write_config(directory: Path, **values) -> Path:
    (directory / "config.json").write_text(json.dumps(values))
    return directory


def test_config_is_found_and_code_beside_it_not_run(tmp_path):
    code = f"open({str(tmp_path / 'was_run')!r}, 'w')\nraise SystemExit\n"
    (tmp_path / "configuration_grok1.py").write_text(code)
    auto_map = {"AutoConfig": "configuration_grok1.Grok1Config"}
    write_config(tmp_path, architectures=["Grok1ModelForCausalLM"], auto_map=auto_map, **CONFIGS["grok-1"])
    config = read_config(tmp_path)
    assert (config.model_type, config.max_attn_value, config.num_experts) == ("grok-1", 1.5, 6)
    assert config.rope_parameters["rope_theta"] == 10000.0 and not hasattr(config, "auto_map")
    write_config(tmp_path, model_type="deepseek", auto_map=auto_map, rope_theta=5000, **CONFIGS["deepseek"])
    config = read_config(tmp_path)
    assert (config.model_type, config.n_routed_experts) == ("deepseek", 12)
    assert config.rope_parameters["rope_theta"] == 5000 and not hasattr(config, "auto_map")
    config = read_config(write_config(tmp_path, model_type="mixtral", num_local_experts=4, auto_map=auto_map))
    assert type(config).__name__ == "MixtralConfig" and config.num_local_experts == 4
    assert not (tmp_path / "was_run").exists()


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"model_type": "grok-9", "auto_map": {"AutoConfig": "x.Y"}}, ("'grok-9'", "CONTRIBUTING.md")),
        ({"architectures": ["NewForCausalLM"]}, ("NewForCausalLM", "CONTRIBUTING.md")),
        ({}, ("no model class", "CONTRIBUTING.md")),
        ({"model_type": ["mixtral"]}, ("mixtral", "CONTRIBUTING.md")),
        ({"model_type": "deepseek", "scoring_func": "sigmoid"}, ("deepseek", "sigmoid")),
        ({"model_type": "mixtral", "hidden_size": "wide"}, ("mixtral", "hidden_size")),
    ],
)
def test_refused_configs_name_the_file_and_the_type(values, words, tmp_path):
    with pytest.raises(AtlasError) as error:
        read_config(write_config(tmp_path, **values))
    assert all(word in str(error.value) for word in (*words, str(tmp_path / "config.json")))
    assert "\n" not in str(error.value)


def test_package_import_is_light():
    code = "import sys, moe_atlas.architectures; assert not {'torch', 'transformers'} & set(sys.modules)"
    scripts = Path(__file__).resolve().parent.parent / "scripts"
    subprocess.run([sys.executable, "-c", code], cwd=scripts, check=True)

"""Checkpoints with the true layer shapes of published models on random weights: what a run costs, without the download.

Weights are normal, as large as a trained model's, in the names and files of the published checkpoint. A layer costs
what the real one costs; there are fewer of them.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file


@dataclass(frozen=True)
class Shape:
    """Names and sizes of one published model, with the number of layers that is written here."""

    config: dict
    layers: int
    experts: int
    expert: dict[str, tuple[int, int]]  # name of an expert's matrix -> shape
    prefix: str  # of an expert's name; {l} the layer and {e} the expert
    others: dict[str, tuple[int, ...]]  # of a layer, with {l}
    outside: dict[str, tuple[int, ...]]


def _decoder(d: int, heads: int, key_heads: int, head: int) -> dict[str, tuple[int, ...]]:
    layer = "model.layers.{l}."
    return {
        f"{layer}input_layernorm.weight": (d,),
        f"{layer}post_attention_layernorm.weight": (d,),
        f"{layer}self_attn.q_proj.weight": (heads * head, d),
        f"{layer}self_attn.k_proj.weight": (key_heads * head, d),
        f"{layer}self_attn.v_proj.weight": (key_heads * head, d),
        f"{layer}self_attn.o_proj.weight": (d, heads * head),
    }


def _outside(vocabulary: int, d: int) -> dict[str, tuple[int, ...]]:
    return {"model.embed_tokens.weight": (vocabulary, d), "model.norm.weight": (d,), "lm_head.weight": (vocabulary, d)}


def mixtral(layers: int, d: int = 4096, m: int = 14336, heads: int = 32, experts: int = 8) -> Shape:
    """Mixtral-8x7B; with d 6144, m 16384 and 48 heads 8x22B. A layer has 2.90 (5.01) GB."""
    vocabulary, key_heads, head = 32000, 8, 128
    config = {
        "architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "hidden_size": d, "intermediate_size": m,
        "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": key_heads,
        "num_local_experts": experts, "num_experts_per_tok": 2, "vocab_size": vocabulary, "rms_norm_eps": 1e-5,
        "max_position_embeddings": 32768, "torch_dtype": "bfloat16", "tie_word_embeddings": False,
    }  # fmt: skip
    others = _decoder(d, heads, key_heads, head) | {"model.layers.{l}.block_sparse_moe.gate.weight": (experts, d)}
    expert = {"w1": (m, d), "w2": (d, m), "w3": (m, d)}
    prefix = "model.layers.{l}.block_sparse_moe.experts.{e}."
    return Shape(config, layers, experts, expert, prefix, others, _outside(vocabulary, d))


def olmoe(layers: int) -> Shape:
    """OLMoE-1B-7B: 64 experts of 1024 neurons, 0.84 GB a layer."""
    d, m, experts, heads, head, vocabulary = 2048, 1024, 64, 16, 128, 50304
    config = {
        "architectures": ["OlmoeForCausalLM"], "model_type": "olmoe", "hidden_size": d, "intermediate_size": m,
        "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": heads,
        "num_experts": experts, "num_experts_per_tok": 8, "vocab_size": vocabulary, "max_position_embeddings": 4096,
        "torch_dtype": "bfloat16", "tie_word_embeddings": False, "norm_topk_prob": False,
    }  # fmt: skip
    others = _decoder(d, heads, heads, head) | {"model.layers.{l}.mlp.gate.weight": (experts, d)}
    others |= {f"model.layers.{{l}}.self_attn.{name}_norm.weight": (heads * head,) for name in "qk"}
    expert = {"gate_proj": (m, d), "up_proj": (m, d), "down_proj": (d, m)}
    return Shape(config, layers, experts, expert, "model.layers.{l}.mlp.experts.{e}.", others, _outside(vocabulary, d))


def deepseek(layers: int) -> Shape:
    """DeepSeekMoE-16B without its dense first layer: 64 experts of 1408 neurons and a shared one of 2816, 1.18 GB."""
    d, m, experts, heads, head, vocabulary = 2048, 1408, 64, 16, 128, 102400
    config = {
        "architectures": ["DeepseekForCausalLM"], "model_type": "deepseek", "hidden_size": d,
        "intermediate_size": 10944, "moe_intermediate_size": m, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": heads, "n_routed_experts": experts,
        "n_shared_experts": 2, "num_experts_per_tok": 6, "first_k_dense_replace": 0, "moe_layer_freq": 1,
        "vocab_size": vocabulary, "max_position_embeddings": 4096, "torch_dtype": "bfloat16",
        "tie_word_embeddings": False, "norm_topk_prob": False, "rms_norm_eps": 1e-6, "rope_theta": 10000.0,
    }  # fmt: skip
    others = _decoder(d, heads, heads, head) | {"model.layers.{l}.mlp.gate.weight": (experts, d)}
    shared = {"gate_proj": (2 * m, d), "up_proj": (2 * m, d), "down_proj": (d, 2 * m)}
    others |= {f"model.layers.{{l}}.mlp.shared_experts.{name}.weight": shape for name, shape in shared.items()}
    expert = {"gate_proj": (m, d), "up_proj": (m, d), "down_proj": (d, m)}
    return Shape(config, layers, experts, expert, "model.layers.{l}.mlp.experts.{e}.", others, _outside(vocabulary, d))


def grok(layers: int) -> Shape:
    """Grok-1 (hpcai-tech's names) as safetensors: 8 experts of 32768 neurons, 9.84 GB a layer."""
    d, m, experts, heads, key_heads, head, vocabulary = 6144, 32768, 8, 48, 8, 128, 131072
    config = {
        "architectures": ["Grok1ModelForCausalLM"], "model_type": "grok-1", "hidden_size": d, "intermediate_size": m,
        "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": key_heads,
        "num_experts": experts, "num_experts_per_tok": 2, "vocab_size": vocabulary, "attn_output_multiplier":
        0.08838834764831845, "embedding_multiplier_scale": 78.38367176906169, "output_multiplier_scale":
        0.5773502691896257, "max_attn_value": 30.0, "max_position_embeddings": 8192, "rms_norm_eps": 1e-5,
        "torch_dtype": "bfloat16", "tie_word_embeddings": False,
    }  # fmt: skip
    layer = "model.layers.{l}."
    others = {f"{layer}attn.{name}.weight": shape for name, shape in {
        "q_proj": (heads * head, d), "k_proj": (key_heads * head, d), "v_proj": (key_heads * head, d),
        "o_proj": (d, heads * head)}.items()}  # fmt: skip
    norms = ("pre_attn_norm.scale", "post_attn_norm.scale", "pre_moe_norm.scale", "post_moe_norm.scale")
    others |= {f"{layer}{name}": (d,) for name in norms} | {f"{layer}moe_block.gate.weight": (experts, d)}
    expert = {"linear": (m, d), "linear_v": (m, d), "linear_1": (d, m)}
    outside = {
        "model.embed_tokens.weight": (vocabulary, d),
        "model.norm.scale": (d,),
        "lm_head.weight": (vocabulary, d),
    }
    return Shape(config, layers, experts, expert, f"{layer}moe_block.experts.{{e}}.", others, outside)


SHAPES = {
    "mixtral-8x7b": mixtral,
    "mixtral-8x22b": lambda layers: mixtral(layers, 6144, 16384, 48),
    "olmoe": olmoe,
    "deepseek": deepseek,
    "grok-1": grok,
}


def write(shape: Shape, directory: Path, seed: int = 0) -> int:
    """Write the checkpoint, a file for each layer and one for the rest; bytes of all weights. Kept if it is there."""
    done = directory / "bytes.json"
    if done.exists():
        return json.loads(done.read_text())
    directory.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    # Every matrix is a stretch of one long series that starts elsewhere: normal numbers are slow to draw.
    pool = torch.randn((1 << 26) + 1, generator=generator).to(torch.bfloat16)

    def draw(size: tuple[int, ...]) -> torch.Tensor:
        count = torch.Size(size).numel()
        if len(size) == 1:
            return torch.ones(size, dtype=torch.bfloat16)
        start = int(torch.randint(len(pool), (1,), generator=generator))
        repeated = torch.cat([pool[start:], *[pool] * (1 + count // len(pool))])[:count]
        return repeated.view(size) * (size[-1] ** -0.5)

    files, total = [shape.outside], 0
    for layer in range(shape.layers):
        names = {name.format(l=layer): size for name, size in shape.others.items()}
        for expert in range(shape.experts):
            prefix = shape.prefix.format(l=layer, e=expert)
            names |= {f"{prefix}{name}.weight": size for name, size in shape.expert.items()}
        files.append(names)
    shard_of = {}
    for number, names in enumerate(files, start=1):
        file = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        tensors = {name: draw(size) for name, size in names.items()}
        save_file(tensors, directory / file, metadata={"format": "pt"})
        total += sum(tensor.nbytes for tensor in tensors.values())
        shard_of |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": total}, "weight_map": shard_of}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    (directory / "config.json").write_text(json.dumps(shape.config))
    done.write_text(json.dumps(total))
    return total

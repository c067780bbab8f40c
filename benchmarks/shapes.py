"""The layer shapes of published models, whole or divided by a number for tests."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """Names and sizes of one published model, with the number of layers that is written here."""

    config: dict
    layers: int
    experts: int
    width: int  # d
    neurons: int  # m of an expert
    names: dict[str, str]  # up (m, d), act (m, d) and down (d, m): what the checkpoint calls an expert's
    prefix: str  # of an expert's name; {l} the layer and {e} the expert
    others: dict[str, tuple[int, ...]]  # of a layer, with {l}
    outside: dict[str, tuple[int, ...]]

    def expert(self, layer: int, expert: int) -> dict[str, tuple[int, int]]:
        """Names and shapes of one expert's matrices in the order up, act, down."""
        prefix = self.prefix.format(l=layer, e=expert)
        tall, wide = (self.neurons, self.width), (self.width, self.neurons)
        return {f"{prefix}{name}.weight": wide if role == "down" else tall for role, name in self.names.items()}

    def layer(self, layer: int) -> dict[str, tuple[int, ...]]:
        """Names and shapes of everything in one layer."""
        found = {name.format(l=layer): size for name, size in self.others.items()}
        for expert in range(self.experts):
            found |= self.expert(layer, expert)
        return found


PROJECTIONS = {"up": "up_proj", "act": "gate_proj", "down": "down_proj"}


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


def mixtral(layers: int, shrink: int = 1, d: int = 4096, m: int = 14336, heads: int = 32) -> Shape:
    """Mixtral-8x7B; with d 6144, m 16384 and 48 heads 8x22B. A layer has 2.90 (5.01) GB."""
    d, m, head, vocabulary, experts, key_heads = d // shrink, m // shrink, 128 // shrink, 32000 // shrink, 8, 8
    config = {
        "architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "hidden_size": d, "intermediate_size": m,
        "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": key_heads,
        "num_local_experts": experts, "num_experts_per_tok": 2, "vocab_size": vocabulary, "rms_norm_eps": 1e-5,
        "max_position_embeddings": 32768, "tie_word_embeddings": False,
    }  # fmt: skip
    others = _decoder(d, heads, key_heads, head) | {"model.layers.{l}.block_sparse_moe.gate.weight": (experts, d)}
    names = {"up": "w3", "act": "w1", "down": "w2"}
    prefix = "model.layers.{l}.block_sparse_moe.experts.{e}."
    return Shape(config, layers, experts, d, m, names, prefix, others, _outside(vocabulary, d))


def olmoe(layers: int, shrink: int = 1) -> Shape:
    """OLMoE-1B-7B: 64 experts of 1024 neurons, 0.84 GB a layer."""
    d, m, head, vocabulary, experts, heads = 2048 // shrink, 1024 // shrink, 128 // shrink, 50304 // shrink, 64, 16
    config = {
        "architectures": ["OlmoeForCausalLM"], "model_type": "olmoe", "hidden_size": d, "intermediate_size": m,
        "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": heads,
        "num_experts": experts, "num_experts_per_tok": 8, "vocab_size": vocabulary, "max_position_embeddings": 4096,
        "tie_word_embeddings": False, "norm_topk_prob": False,
    }  # fmt: skip
    others = _decoder(d, heads, heads, head) | {"model.layers.{l}.mlp.gate.weight": (experts, d)}
    others |= {f"model.layers.{{l}}.self_attn.{name}_norm.weight": (heads * head,) for name in "qk"}
    prefix = "model.layers.{l}.mlp.experts.{e}."
    return Shape(config, layers, experts, d, m, PROJECTIONS, prefix, others, _outside(vocabulary, d))


def deepseek(layers: int, shrink: int = 1) -> Shape:
    """DeepSeekMoE-16B without its dense first layer: 64 experts of 1408 neurons and a shared one of 2816, 1.18 GB."""
    d, m, head, vocabulary, experts, heads = 2048 // shrink, 1408 // shrink, 128 // shrink, 102400 // shrink, 64, 16
    config = {
        "architectures": ["DeepseekForCausalLM"], "model_type": "deepseek", "hidden_size": d,
        "intermediate_size": 10944 // shrink, "moe_intermediate_size": m, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": heads, "n_routed_experts": experts,
        "n_shared_experts": 2, "num_experts_per_tok": 6, "first_k_dense_replace": 0, "moe_layer_freq": 1,
        "vocab_size": vocabulary, "max_position_embeddings": 4096, "tie_word_embeddings": False,
        "norm_topk_prob": False, "rms_norm_eps": 1e-6, "rope_theta": 10000.0,
    }  # fmt: skip
    others = _decoder(d, heads, heads, head) | {"model.layers.{l}.mlp.gate.weight": (experts, d)}
    shared = {"gate_proj": (2 * m, d), "up_proj": (2 * m, d), "down_proj": (d, 2 * m)}
    others |= {f"model.layers.{{l}}.mlp.shared_experts.{name}.weight": shape for name, shape in shared.items()}
    prefix = "model.layers.{l}.mlp.experts.{e}."
    return Shape(config, layers, experts, d, m, PROJECTIONS, prefix, others, _outside(vocabulary, d))


def grok(layers: int, shrink: int = 1) -> Shape:
    """Grok-1 (hpcai-tech's names) as safetensors: 8 experts of 32768 neurons, 9.84 GB a layer."""
    d, m, head, vocabulary = 6144 // shrink, 32768 // shrink, 128 // shrink, 131072 // shrink
    experts, heads, key_heads = 8, 48, 8
    config = {
        "architectures": ["Grok1ModelForCausalLM"], "model_type": "grok-1", "hidden_size": d, "intermediate_size": m,
        "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": key_heads,
        "num_experts": experts, "num_experts_per_tok": 2, "vocab_size": vocabulary, "attn_output_multiplier":
        0.08838834764831845, "embedding_multiplier_scale": 78.38367176906169, "output_multiplier_scale":
        0.5773502691896257, "max_attn_value": 30.0, "max_position_embeddings": 8192, "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
    }  # fmt: skip
    layer = "model.layers.{l}."
    others = {f"{layer}attn.{name}.weight": shape for name, shape in {
        "q_proj": (heads * head, d), "k_proj": (key_heads * head, d), "v_proj": (key_heads * head, d),
        "o_proj": (d, heads * head)}.items()}  # fmt: skip
    norms = ("pre_attn_norm.scale", "post_attn_norm.scale", "pre_moe_norm.scale", "post_moe_norm.scale")
    others |= {f"{layer}{name}": (d,) for name in norms} | {f"{layer}moe_block.gate.weight": (experts, d)}
    outside = _outside(vocabulary, d)
    outside["model.norm.scale"] = outside.pop("model.norm.weight")
    names = {"up": "linear_v", "act": "linear", "down": "linear_1"}
    return Shape(config, layers, experts, d, m, names, f"{layer}moe_block.experts.{{e}}.", others, outside)


def mixtral_large(layers: int, shrink: int = 1) -> Shape:
    """Mixtral-8x22B."""
    return mixtral(layers, shrink, 6144, 16384, 48)


SHAPES = {
    "mixtral-8x7b": mixtral,
    "mixtral-8x22b": mixtral_large,
    "olmoe": olmoe,
    "deepseek": deepseek,
    "grok-1": grok,
}

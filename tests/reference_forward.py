"""DeepSeekMoE v1 and Grok-1 written out from their definitions, for one sequence, in plain torch.

Weights are a dict of tensors by the Hub's names, one matrix an expert, so that a wrong conversion of a checkpoint
(gate and up exchanged, an expert out of order) shows too. Everything is in the dtype of the weights.
"""

import torch


def norm(x, weight, eps):
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps) * weight


def rotate(x):
    """Rotary positions, halves convention, theta 1e4; x (heads, T, D). Angles are float32 by definition."""
    n_tokens, width = x.shape[-2:]
    frequency = 1.0 / 10000.0 ** (torch.arange(0, width, 2, dtype=torch.float32) / width)
    angle = torch.arange(n_tokens, dtype=torch.float32)[:, None] * frequency
    cos, sin = angle.cos().double(), angle.sin().double()
    first, second = x[..., : width // 2], x[..., width // 2 :]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def attention(x, weights, prefix, config, scale, cap=None):
    """Causal grouped-query attention of one sequence x (T, d), head by head."""
    n_tokens, heads = len(x), config.num_attention_heads
    query, key, value = (
        (x @ weights[f"{prefix}.{p}_proj.weight"].T).view(n_tokens, -1, config.hidden_size // heads).transpose(0, 1)
        for p in "qkv"
    )
    query, key = rotate(query), rotate(key)
    outputs = []
    for head in range(heads):
        group = head // (heads // config.num_key_value_heads)
        logits = query[head] @ key[group].T * scale
        if cap is not None:
            logits = cap * torch.tanh(logits / cap)
        future = torch.ones(n_tokens, n_tokens).triu(1).bool()
        outputs.append(logits.masked_fill(future, -torch.inf).softmax(-1) @ value[group])
    return torch.cat(outputs, dim=-1) @ weights[f"{prefix}.o_proj.weight"].T


def silu(x):
    return x / (1 + torch.exp(-x))


def gelu(x):
    return 0.5 * x * (1 + torch.erf(x / 2**0.5))


def tanh_gelu(x):
    return 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))


def ffn(x, weights, prefix, names, activation):
    act, up, down = (weights[f"{prefix}.{name}.weight"] for name in names)
    return (activation(x @ act.T) * (x @ up.T)) @ down.T


def mixture(x, router, k, expert, renormalise=False):
    """Token by token: the k largest of the softmax over all experts weight those experts' outputs."""
    rows = []
    for token in x:
        probability = (router @ token).softmax(-1)
        chosen = sorted(range(len(router)), key=lambda e: -probability[e])[:k]
        total = sum(probability[e] for e in chosen) if renormalise else 1.0
        rows.append(sum(probability[e] / total * expert(e, token) for e in chosen))
    return torch.stack(rows)


def reference_deepseek(ids, weights, config):
    """Logits (T, V) of one sequence: Dai et al. 2024, equations 9 to 11, in a Llama block."""
    names, eps = ("gate_proj", "up_proj", "down_proj"), config.rms_norm_eps
    x = weights["model.embed_tokens.weight"][ids]
    for layer in range(config.num_hidden_layers):
        at = f"model.layers.{layer}"
        h = norm(x, weights[f"{at}.input_layernorm.weight"], eps)
        scale = (config.hidden_size // config.num_attention_heads) ** -0.5
        x = x + attention(h, weights, f"{at}.self_attn", config, scale)
        h = norm(x, weights[f"{at}.post_attention_layernorm.weight"], eps)
        if layer < config.first_k_dense_replace or layer % config.moe_layer_freq:
            x = x + ffn(h, weights, f"{at}.mlp", names, silu)
            continue
        routed = mixture(
            h,
            weights[f"{at}.mlp.gate.weight"],
            config.num_experts_per_tok,
            lambda e, token, at=at: ffn(token, weights, f"{at}.mlp.experts.{e}", names, silu),
            config.norm_topk_prob,
        )
        shared = ffn(h, weights, f"{at}.mlp.shared_experts", names, silu) if config.n_shared_experts else 0
        x = x + routed + shared
    return norm(x, weights["model.norm.weight"], eps) @ weights["lm_head.weight"].T


def reference_grok(ids, weights, config, activation=gelu):
    """Logits (T, V) of one sequence, as the Hub's port of Grok-1 defines them."""
    embedding, eps = weights["model.embed_tokens.weight"], config.rms_norm_eps
    x = embedding[ids] * config.embedding_multiplier_scale
    for layer in range(config.num_hidden_layers):
        at = f"model.layers.{layer}"
        h = norm(x, weights[f"{at}.pre_attn_norm.scale"], eps)
        h = attention(h, weights, f"{at}.attn", config, config.attn_output_multiplier, config.max_attn_value)
        x = x + norm(h, weights[f"{at}.post_attn_norm.scale"], eps)
        h = norm(x, weights[f"{at}.pre_moe_norm.scale"], eps)
        h = mixture(
            h,
            weights[f"{at}.moe_block.gate.weight"],
            config.num_experts_per_tok,
            lambda e, token, at=at: ffn(
                token, weights, f"{at}.moe_block.experts.{e}", ("linear", "linear_v", "linear_1"), activation
            ),
        )
        x = x + norm(h, weights[f"{at}.post_moe_norm.scale"], eps)
    return norm(x, weights["model.norm.scale"], eps) @ embedding.T * config.output_multiplier_scale

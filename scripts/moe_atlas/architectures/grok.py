"""Grok-1 in the layout of the Hub's port (hpcai-tech/grok-1), which transformers 5.23 lacks.

Differences from Llama: embeddings, attention logits and LM logits have multipliers, attention logits are capped
by a tanh, each sublayer has a norm before and after it, experts are gated by an exact (erf) GELU.
The port's config.json has no model_type; here it is "grok-1".
"""

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter
from transformers.integrations.moe import use_experts_implementation
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaForCausalLM,
    LlamaModel,
    LlamaPreTrainedModel,
    LlamaRotaryEmbedding,
    apply_rotary_pos_emb,
    repeat_kv,
)
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from moe_atlas.architectures.rms_norm import at_least_float32, rms_norm

MODEL_TYPE = "grok-1"


@strict
class Grok1Config(LlamaConfig):
    """The keys of the Hub's config.json; defaults are those of Grok-1."""

    model_type = MODEL_TYPE
    attribute_map = {"num_local_experts": "num_experts"}
    base_model_tp_plan = None
    base_model_pp_plan = None

    vocab_size: int = 131072
    hidden_size: int = 6144
    intermediate_size: int = 32768
    num_hidden_layers: int = 64
    num_attention_heads: int = 48
    num_key_value_heads: int | None = 8
    hidden_act: str = "gelu"
    max_position_embeddings: int = 8192
    rms_norm_eps: float = 1e-5
    tie_word_embeddings: bool = True
    attn_output_multiplier: float | int = 0.08838834764831845
    embedding_multiplier_scale: float | int = 78.38367176906169
    output_multiplier_scale: float | int = 0.5773502691896257
    max_attn_value: float | int = 30.0
    num_experts: int = 8
    num_experts_per_tok: int = 2


class Grok1RMSNorm(nn.Module):
    """RMSNorm whose weight the checkpoint calls `scale`, shape (d,)."""

    def __init__(self, hidden_size: int, eps: float):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(hidden_size))
        self.variance_epsilon = eps

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return rms_norm(hidden_states, self.scale, self.variance_epsilon)


class Grok1Embedding(nn.Embedding):
    """Token embeddings times a constant. The weight is shared with the LM head, so it stays unscaled."""

    def __init__(self, config: Grok1Config):
        super().__init__(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.multiplier = config.embedding_multiplier_scale

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return super().forward(input_ids) * self.multiplier


class Grok1LMHead(nn.Linear):
    """Logits times a constant, in the model's dtype."""

    def __init__(self, config: Grok1Config):
        super().__init__(config.hidden_size, config.vocab_size, bias=False)
        self.multiplier = config.output_multiplier_scale

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return super().forward(hidden_states) * self.multiplier


class Grok1Attention(LlamaAttention):
    """Grouped-query attention with capped logits: c tanh(a q.k / c), then the causal mask, then softmax."""

    def __init__(self, config: Grok1Config, layer_idx: int):
        super().__init__(config, layer_idx)
        self.scaling = config.attn_output_multiplier
        self.cap = config.max_attn_value

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Hidden states (B, T, d) and an additive mask (B, 1, T, S) to outputs (B, T, d), weights (B, heads, T, S)."""
        heads = (*hidden_states.shape[:-1], -1, self.head_dim)
        query = self.q_proj(hidden_states).view(heads).transpose(1, 2)
        key = self.k_proj(hidden_states).view(heads).transpose(1, 2)
        value = self.v_proj(hidden_states).view(heads).transpose(1, 2)
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        key = repeat_kv(key, self.num_key_value_groups)
        value = repeat_kv(value, self.num_key_value_groups)

        logits = torch.matmul(query, key.transpose(2, 3)).to(at_least_float32(query.dtype))
        logits = self.cap * torch.tanh(logits * self.scaling / self.cap)
        if attention_mask is not None:
            logits = logits + attention_mask
        weights = logits.softmax(dim=-1).to(query.dtype)
        weights = nn.functional.dropout(weights, p=self.attention_dropout, training=self.training)
        output = torch.matmul(weights, value).transpose(1, 2).reshape(*hidden_states.shape[:-1], -1)
        return self.o_proj(output), weights


# Decorated again because transformers looks for the decorator in this file before it allows set_experts_implementation.
@use_experts_implementation
class Grok1Experts(MixtralExperts):
    """Experts: gate_up_proj (N, 2m, d), `linear` (under the GELU) first, then `linear_v`; down_proj (N, d, m)."""


class Grok1TopKRouter(nn.Module):
    """Softmax over all N experts in float32, then the k largest, as they are, cast back."""

    def __init__(self, config: Grok1Config):
        super().__init__()
        self.top_k = config.num_experts_per_tok
        self.num_experts = config.num_experts
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Hidden states (T, d) to logits (T, N), weights (T, k), expert ids (T, k) int64, largest weight first."""
        logits = nn.functional.linear(hidden_states, self.weight)
        scores = logits.to(at_least_float32(logits.dtype)).softmax(dim=-1)
        weights, indices = torch.topk(scores, self.top_k, dim=-1)
        return logits, weights.to(hidden_states.dtype), indices


class Grok1MoE(nn.Module):
    def __init__(self, config: Grok1Config):
        super().__init__()
        self.gate = Grok1TopKRouter(config)
        self.experts = Grok1Experts(config)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        tokens = hidden_states.reshape(-1, hidden_states.shape[-1])
        _, weights, indices = self.gate(tokens)
        return self.experts(tokens, indices, weights).view_as(hidden_states)


class Grok1DecoderLayer(GradientCheckpointingLayer):
    """Sandwich norms: the residual stream gets the normed output of each sublayer."""

    def __init__(self, config: Grok1Config, layer_idx: int):
        super().__init__()
        self.attn = Grok1Attention(config, layer_idx)
        self.moe_block = Grok1MoE(config)
        self.pre_attn_norm = Grok1RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attn_norm = Grok1RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.pre_moe_norm = Grok1RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_moe_norm = Grok1RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, hidden_states: torch.Tensor, **kwargs) -> torch.Tensor:
        attended, _ = self.attn(self.pre_attn_norm(hidden_states), **kwargs)
        hidden_states = hidden_states + self.post_attn_norm(attended)
        mixed = self.moe_block(self.pre_moe_norm(hidden_states))
        return hidden_states + self.post_moe_norm(mixed)


class Grok1PreTrainedModel(LlamaPreTrainedModel):
    config: Grok1Config
    base_model_prefix = "model"
    _no_split_modules = ["Grok1DecoderLayer"]
    # The tanh cap needs the attention logits, which the fused kernels do not give.
    _supports_flash_attn = False
    _supports_sdpa = False
    _supports_flex_attn = False
    _supports_attention_backend = False
    _can_compile_fullgraph = False
    _can_record_outputs = {"hidden_states": Grok1DecoderLayer, "attentions": Grok1Attention}

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        std = self.config.initializer_range
        if isinstance(module, Grok1Experts):
            init.normal_(module.gate_up_proj, mean=0.0, std=std)
            init.normal_(module.down_proj, mean=0.0, std=std)
        elif isinstance(module, Grok1TopKRouter):
            init.normal_(module.weight, mean=0.0, std=std)
        elif isinstance(module, Grok1RMSNorm):
            init.ones_(module.scale)


class Grok1Model(Grok1PreTrainedModel, LlamaModel):
    def __init__(self, config: Grok1Config):
        # Past Llama's constructor, which would build Llama's layers.
        super(LlamaModel, self).__init__(config)
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = Grok1Embedding(config)
        self.layers = nn.ModuleList([Grok1DecoderLayer(config, layer) for layer in range(config.num_hidden_layers)])
        self.norm = Grok1RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(config=config)
        self.gradient_checkpointing = False
        self.post_init()


class Grok1ModelForCausalLM(Grok1PreTrainedModel, LlamaForCausalLM):
    def __init__(self, config: Grok1Config):
        super(LlamaForCausalLM, self).__init__(config)
        self.model = Grok1Model(config)
        self.vocab_size = config.vocab_size
        self.lm_head = Grok1LMHead(config)
        self.post_init()


def merged_experts(experts: str) -> list[WeightConverter]:
    """How the files' matrices, three an expert below a module called `experts`, become those of Grok1Experts."""
    target = ".moe_block.experts"
    return [
        WeightConverter(
            source_patterns=[f"{experts}.*.linear.weight", f"{experts}.*.linear_v.weight"],
            target_patterns=f"{target}.gate_up_proj",
            operations=[MergeModulelist(dim=0), Concatenate(dim=1)],
        ),
        WeightConverter(
            source_patterns=f"{experts}.*.linear_1.weight",
            target_patterns=f"{target}.down_proj",
            operations=[MergeModulelist(dim=0)],
        ),
    ]


def register() -> None:
    """Register the classes with the Auto classes, and the Hub's tensor names, one matrix an expert."""
    AutoConfig.register(MODEL_TYPE, Grok1Config, exist_ok=True)
    AutoModel.register(Grok1Config, Grok1Model, exist_ok=True)
    AutoModelForCausalLM.register(Grok1Config, Grok1ModelForCausalLM, exist_ok=True)
    register_checkpoint_conversion_mapping(MODEL_TYPE, merged_experts(".moe_block.experts"), overwrite=True)

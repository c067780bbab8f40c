"""DeepSeekMoE v1 ("deepseek": deepseek-ai/deepseek-moe-16b-base), which transformers 5.23 lacks.

Fine-grained routed experts, shared experts that see every token, dense first layers (Dai et al. 2024,
arXiv 2401.06066, equations 9 to 11). Everything but the feed-forward part is Llama's.
"""

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.integrations.moe import use_experts_implementation
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Experts
from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaDecoderLayer,
    LlamaForCausalLM,
    LlamaMLP,
    LlamaModel,
    LlamaPreTrainedModel,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
)

from moe_atlas.architectures.rms_norm import rms_norm

MODEL_TYPE = "deepseek"


@strict
class DeepseekConfig(LlamaConfig):
    """The keys of the Hub's config.json; defaults are those of deepseek-moe-16b-base."""

    model_type = MODEL_TYPE
    attribute_map = {"num_experts": "n_routed_experts"}
    base_model_tp_plan = None
    base_model_pp_plan = None

    vocab_size: int = 102400
    hidden_size: int = 2048
    intermediate_size: int = 10944
    num_hidden_layers: int = 28
    num_attention_heads: int = 16
    max_position_embeddings: int = 4096
    moe_intermediate_size: int = 1408
    n_routed_experts: int | None = 64
    n_shared_experts: int | None = 2
    num_experts_per_tok: int = 6
    first_k_dense_replace: int = 1
    moe_layer_freq: int = 1
    norm_topk_prob: bool = False
    scoring_func: str = "softmax"

    def has_experts(self, layer: int) -> bool:
        """Whether decoder layer number `layer` (from 0) has experts instead of one dense MLP."""
        if self.n_routed_experts is None or layer < self.first_k_dense_replace:
            return False
        return layer % self.moe_layer_freq == 0

    def validate_architecture(self) -> None:
        super().validate_architecture()
        if self.scoring_func != "softmax":
            raise ValueError(f"scoring_func is {self.scoring_func!r}; DeepSeekMoE v1 has softmax routers only.")


class DeepseekRMSNorm(LlamaRMSNorm):
    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return rms_norm(hidden_states, self.weight, self.variance_epsilon)


class DeepseekMLP(LlamaMLP):
    """A gated MLP of any width: the dense layers' and the shared experts'."""

    def __init__(self, config: DeepseekConfig, intermediate_size: int):
        nn.Module.__init__(self)
        self.gate_proj = nn.Linear(config.hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, config.hidden_size, bias=False)
        self.act_fn = ACT2FN[config.hidden_act]


# Decorated again because transformers looks for the decorator in this file before it allows set_experts_implementation.
@use_experts_implementation
class DeepseekExperts(DeepseekV2Experts):
    """Routed experts: gate_up_proj (N, 2m, d), gate first; down_proj (N, d, m)."""


class DeepseekTopKRouter(nn.Module):
    """Softmax over all N experts in the model's dtype, then the k largest, as they are."""

    def __init__(self, config: DeepseekConfig):
        super().__init__()
        self.top_k = config.num_experts_per_tok
        self.num_experts = config.n_routed_experts
        self.norm_topk_prob = config.norm_topk_prob
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size))

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Hidden states (T, d) to logits (T, N), weights (T, k), expert ids (T, k) int64, largest weight first."""
        logits = nn.functional.linear(hidden_states, self.weight)
        weights, indices = torch.topk(logits.softmax(dim=-1), self.top_k, dim=-1)
        if self.norm_topk_prob and self.top_k > 1:
            weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
        return logits, weights, indices


class DeepseekMoE(nn.Module):
    """Routed experts plus the shared experts, which are one MLP and have weight 1."""

    def __init__(self, config: DeepseekConfig):
        super().__init__()
        self.gate = DeepseekTopKRouter(config)
        self.experts = DeepseekExperts(config)
        self.shared_experts = None
        if config.n_shared_experts:
            self.shared_experts = DeepseekMLP(config, config.n_shared_experts * config.moe_intermediate_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        tokens = hidden_states.reshape(-1, hidden_states.shape[-1])
        _, weights, indices = self.gate(tokens)
        output = self.experts(tokens, indices, weights).view_as(hidden_states)
        if self.shared_experts is not None:
            output = output + self.shared_experts(hidden_states)
        return output


class DeepseekDecoderLayer(LlamaDecoderLayer):
    def __init__(self, config: DeepseekConfig, layer_idx: int):
        # Llama's own constructor would allocate a dense MLP in every layer.
        GradientCheckpointingLayer.__init__(self)
        self.hidden_size = config.hidden_size
        self.self_attn = LlamaAttention(config=config, layer_idx=layer_idx)
        self.mlp = (
            DeepseekMoE(config) if config.has_experts(layer_idx) else DeepseekMLP(config, config.intermediate_size)
        )
        self.input_layernorm = DeepseekRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = DeepseekRMSNorm(config.hidden_size, eps=config.rms_norm_eps)


class DeepseekPreTrainedModel(LlamaPreTrainedModel):
    config: DeepseekConfig
    base_model_prefix = "model"
    _no_split_modules = ["DeepseekDecoderLayer"]
    _can_compile_fullgraph = False
    _can_record_outputs = {"hidden_states": DeepseekDecoderLayer, "attentions": LlamaAttention}

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        std = self.config.initializer_range
        if isinstance(module, DeepseekExperts):
            init.normal_(module.gate_up_proj, mean=0.0, std=std)
            init.normal_(module.down_proj, mean=0.0, std=std)
        elif isinstance(module, DeepseekTopKRouter):
            init.normal_(module.weight, mean=0.0, std=std)


class DeepseekModel(DeepseekPreTrainedModel, LlamaModel):
    def __init__(self, config: DeepseekConfig):
        # Past Llama's constructor, which would build Llama's layers.
        super(LlamaModel, self).__init__(config)
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList([DeepseekDecoderLayer(config, layer) for layer in range(config.num_hidden_layers)])
        self.norm = DeepseekRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(config=config)
        self.gradient_checkpointing = False
        self.post_init()


class DeepseekForCausalLM(DeepseekPreTrainedModel, LlamaForCausalLM):
    def __init__(self, config: DeepseekConfig):
        super(LlamaForCausalLM, self).__init__(config)
        self.model = DeepseekModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()


def register() -> None:
    """Register the classes with the Auto classes, and the Hub's tensor names, one matrix an expert."""
    AutoConfig.register(MODEL_TYPE, DeepseekConfig, exist_ok=True)
    AutoModel.register(DeepseekConfig, DeepseekModel, exist_ok=True)
    AutoModelForCausalLM.register(DeepseekConfig, DeepseekForCausalLM, exist_ok=True)
    mapping = get_checkpoint_conversion_mapping("qwen2_moe")
    register_checkpoint_conversion_mapping(MODEL_TYPE, mapping, overwrite=True)

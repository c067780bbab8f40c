"""EMoE: a dense causal model, some of whose FFNs are read as experts (Qiu et al. 2024, arXiv 2310.10908, section 3).

The neurons of an FFN are dealt to N experts of equal size. The router has no weights of its own: an expert's score
is the product of the input with the mean of its neurons' keys (avg-k), signed. The k experts with the highest scores
answer, each with weight 1. With k = N the model computes what the dense one does.

Any family of transformers will do whose FFN is act(W x) * (V x) without biases, or act(W x + b) as GPT-2's: the dense
model is built by its own class, and the FFNs of the chosen layers are exchanged. config.json holds the dense model's
values and those of EMoEConfig.
moe_atlas/emoe/derive.py writes such a checkpoint from a dense one, and back.
"""

from collections.abc import Callable

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter
from transformers.integrations.moe import use_experts_implementation
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from moe_atlas.architectures.bank import FFN
from moe_atlas.architectures.ffn import activation_function, dense_ffn, ffn_biases, ffn_view, roles
from moe_atlas.architectures.layers import decoder_layers

MODEL_TYPE = "emoe"
SCORES = ("gate", "up")
# What an expert without a gate branch has before its activation: in the files -> in EMoEPlainExperts.
PLAIN_NAMES = {"fc1.bias": "up_proj_bias", "fc1.weight": "up_proj"}


@strict
class EMoEConfig(PreTrainedConfig):
    """The dense model's values, as they are, and which of its FFNs are experts.

    emoe_layers: decoder layers, from 0; None for all. emoe_score: the rows whose mean an expert is scored by, "gate"
    those under the activation, "up" those it is multiplied with. emoe_split and emoe_seed: for the record.
    """

    model_type = MODEL_TYPE

    dense_model_type: str = "mistral"
    num_experts: int = 64
    num_experts_per_tok: int = 16
    emoe_layers: list[int] | None = None
    emoe_score: str = "gate"
    emoe_split: str = "cluster"
    emoe_seed: int = 0

    def dense_config(self) -> PreTrainedConfig:
        """Configuration of the dense model."""
        own = {*EMoEConfig.__annotations__, "model_type", "architectures"}
        values = {key: value for key, value in self.to_dict().items() if key not in own}
        return CONFIG_MAPPING[self.dense_model_type].from_dict(values)

    def validate_architecture(self) -> None:
        if self.emoe_score not in SCORES:
            raise ValueError(f"emoe_score is {self.emoe_score!r}; it is one of {', '.join(SCORES)}.")
        if not 1 <= self.num_experts_per_tok <= self.num_experts:
            raise ValueError(
                f"num_experts_per_tok is {self.num_experts_per_tok}; it lies between 1 and {self.num_experts}."
            )


# Decorated again because transformers looks for the decorator in this file before it allows set_experts_implementation.
@use_experts_implementation
class EMoEExperts(MixtralExperts):
    """Experts of m neurons each: gate_up_proj (N, 2m, d), gate first; down_proj (N, d, m)."""

    def __init__(self, config: EMoEConfig, ffn: FFN, act_fn: Callable[[torch.Tensor], torch.Tensor]):
        nn.Module.__init__(self)
        neurons, self.hidden_dim = ffn.up.shape
        self.num_experts, self.intermediate_dim = config.num_experts, neurons // config.num_experts
        rows = (self.num_experts, self.intermediate_dim, self.hidden_dim)
        self.gate_up_proj = nn.Parameter(torch.cat([ffn.act.reshape(rows), ffn.up.reshape(rows)], dim=1))
        self.down_proj = nn.Parameter(ffn.down.T.reshape(rows).transpose(1, 2).contiguous())
        self.act_fn = act_fn


@use_experts_implementation(has_gate=False, has_bias=True)
class EMoEPlainExperts(nn.Module):
    """Experts without a gate branch: up_proj (N, m, d), up_proj_bias (N, m), down_proj (N, d, m).

    The bias of the FFN's output belongs to no expert and is not here.
    """

    def __init__(
        self, config: EMoEConfig, ffn: FFN, bias: torch.Tensor, act_fn: Callable[[torch.Tensor], torch.Tensor]
    ):
        super().__init__()
        neurons, self.hidden_dim = ffn.up.shape
        self.num_experts, self.intermediate_dim = config.num_experts, neurons // config.num_experts
        rows = (self.num_experts, self.intermediate_dim, self.hidden_dim)
        self.up_proj = nn.Parameter(ffn.up.reshape(rows).contiguous())
        self.up_proj_bias = nn.Parameter(bias.detach().reshape(rows[:2]).contiguous())
        self.down_proj = nn.Parameter(ffn.down.T.reshape(rows).transpose(1, 2).contiguous())
        self.act_fn = act_fn

    @property
    def down_proj_bias(self) -> torch.Tensor:
        """Zeros (N, d): the experts interface wants both biases or none."""
        return self.down_proj.new_zeros(self.num_experts, self.hidden_dim)

    def forward(self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor):
        """Expert by expert: (T, d), ids (T, k), weights (T, k) to (T, d)."""
        mixture = torch.zeros_like(hidden_states)
        for expert in top_k_index.unique().tolist():
            tokens, slots = torch.where(top_k_index == expert)
            up = nn.functional.linear(hidden_states[tokens], self.up_proj[expert], self.up_proj_bias[expert])
            output = nn.functional.linear(self.act_fn(up), self.down_proj[expert])
            mixture.index_add_(0, tokens, (output * top_k_weights[tokens, slots, None]).to(mixture.dtype))
        return mixture


class EMoERouter(nn.Module):
    """The avg-k gate: weight (N, d), a buffer, the means of the experts' raw keys."""

    dtype = torch.float32  # scores that lie close together would tie in a coarser one

    def __init__(self, config: EMoEConfig, hidden: int):
        super().__init__()
        self.top_k, self.num_experts = config.num_experts_per_tok, config.num_experts
        self.register_buffer("weight", torch.empty(config.num_experts, hidden, dtype=self.dtype))

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Hidden states (T, d) to scores (T, N), weights (T, k) of 1, expert ids (T, k) int64, highest score first."""
        scores = nn.functional.linear(hidden_states.to(self.weight.dtype), self.weight)
        indices = scores.topk(self.top_k, dim=-1).indices
        return scores, hidden_states.new_ones(indices.shape), indices


class EMoE(nn.Module):
    """Router and experts in the place of one FFN d -> F -> d, whose neurons are dealt out in their order.

    down_bias (d,): the bias of the FFN's output, added once, or None. dropout: what the FFN has after it.
    """

    def __init__(self, config: EMoEConfig, ffn: nn.Module):
        super().__init__()
        view, act_fn, biases = ffn_view(ffn), activation_function(ffn), ffn_biases(ffn)
        neurons, hidden = view.up.shape
        known = len(roles(ffn)) + sum(bias is not None for bias in biases.values())
        if act_fn is None or len(list(ffn.parameters())) != known or (view.act is not None and known > len(roles(ffn))):
            raise ValueError(f"{type(ffn).__name__} is neither act(W x) * (V x) without biases nor act(W x + b)")
        if neurons % config.num_experts:
            raise ValueError(f"{config.num_experts} experts of equal size cannot be made of {neurons} neurons")
        if view.act is None and config.emoe_score != "gate":
            raise ValueError(f"{type(ffn).__name__} has one matrix before its activation; write gate as emoe_score")
        self.score, self.down_bias, self.dropout = config.emoe_score, None, getattr(ffn, "dropout", None)
        if view.act is not None:
            self.experts = EMoEExperts(config, view, act_fn)
        else:
            if any(bias is None for bias in biases.values()):
                raise ValueError(f"{type(ffn).__name__} has no biases, which is known of gated FFNs only")
            self.experts = EMoEPlainExperts(config, view, biases["up"], act_fn)
            self.down_bias = nn.Parameter(biases["down"].detach().clone())
        self.router = EMoERouter(config, hidden)
        self.router.weight.copy_(self.keys_mean())
        self._moved = False  # whether the keys may have changed since the router's weight was taken from them
        self.register_state_dict_pre_hook(lambda block, _prefix, _keep: block.tie())

    def tie(self) -> None:
        """Take the router's weight from the keys as they are now, where they may have moved."""
        if self._moved:
            with torch.no_grad():
                self.router.weight.copy_(self.keys_mean())
            self._moved = self.training

    def keys_mean(self) -> torch.Tensor:
        """What the router's weight has to be, (N, d) float32 or better: the mean of each expert's raw keys."""
        if isinstance(self.experts, EMoEPlainExperts):
            keys = self.experts.up_proj.detach()
        else:
            keys = self.experts.gate_up_proj.detach().chunk(2, dim=1)[SCORES.index(self.score)]
        return keys.to(self.router.weight.dtype).mean(dim=1)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        self._moved |= self.training  # after this pass an optimizer's step follows, and perhaps no other pass
        self.tie()
        tokens = hidden_states.reshape(-1, hidden_states.shape[-1])
        _, weights, indices = self.router(tokens)
        output = self.experts(tokens, indices, weights).view_as(hidden_states)
        output = output if self.down_bias is None else output + self.down_bias
        return output if self.dropout is None else self.dropout(output)


class EMoEForCausalLM(PreTrainedModel, GenerationMixin):
    """A dense causal model, `dense`, in which an EMoE stands for the FFN of each chosen layer."""

    config: EMoEConfig
    base_model_prefix = "dense"
    supports_gradient_checkpointing = True
    # The dense model's class decides; it was asked for what the user asked of this one.
    _supports_flash_attn = _supports_sdpa = _supports_flex_attn = _supports_attention_backend = True
    _keep_in_fp32_modules_strict = ["router"]

    def __init__(self, config: EMoEConfig):
        asked_for, experts_asked_for = config._attn_implementation, config._experts_implementation
        super().__init__(config)
        dense_config = config.dense_config()
        dense_config._attn_implementation = asked_for
        self.dense = MODEL_FOR_CAUSAL_LM_MAPPING[type(dense_config)](dense_config)
        layers = decoder_layers(self.dense)
        for index in range(len(layers)) if config.emoe_layers is None else config.emoe_layers:
            if not 0 <= index < len(layers):
                raise ValueError(f"there is no layer {index} among {len(layers)}")
            ffn = dense_ffn(layers[index])
            if ffn is None:
                raise ValueError(f"{type(layers[index]).__name__} has no FFN of a known layout")
            name = next(name for name, child in layers[index].named_children() if child is ffn)
            setattr(layers[index], name, EMoE(config, ffn))
            if experts_asked_for is None and getattr(layers[index], name).experts.intermediate_dim % 8:
                config._experts_implementation = "eager"  # torch's grouped_mm takes rows of 16 bytes and multiples
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        self.dense._init_weights(module)

    def get_decoder(self) -> nn.Module:
        return self.dense.get_decoder()

    def get_input_embeddings(self) -> nn.Module:
        return self.dense.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.dense.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.dense.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.dense.set_output_embeddings(new_embeddings)

    def forward(self, input_ids: torch.Tensor | None = None, attention_mask: torch.Tensor | None = None, **kwargs):
        """As the dense model's forward."""
        return self.dense(input_ids=input_ids, attention_mask=attention_mask, **kwargs)


def register() -> None:
    """Register the classes with the Auto classes, and the files' tensor names, one matrix an expert."""
    AutoConfig.register(MODEL_TYPE, EMoEConfig, exist_ok=True)
    AutoModelForCausalLM.register(EMoEConfig, EMoEForCausalLM, exist_ok=True)
    mapping = [
        WeightConverter(
            source_patterns=["experts.*.gate_proj.weight", "experts.*.up_proj.weight"],
            target_patterns="experts.gate_up_proj",
            operations=[MergeModulelist(dim=0), Concatenate(dim=1)],
        ),
        WeightConverter(
            source_patterns="experts.*.down_proj.weight",
            target_patterns="experts.down_proj",
            operations=[MergeModulelist(dim=0)],
        ),
        *(
            WeightConverter(
                source_patterns=f"experts.*.{stored}",
                target_patterns=f"experts.{parameter}",
                operations=[MergeModulelist(dim=0)],
            )
            for stored, parameter in PLAIN_NAMES.items()
        ),
    ]
    register_checkpoint_conversion_mapping(MODEL_TYPE, mapping, overwrite=True)

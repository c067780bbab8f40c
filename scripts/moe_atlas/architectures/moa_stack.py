"""Transformer layers around MoA or multi-head attention, and a stack of them: an encoder or a decoder."""

import math
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional
from transformers import Cache, DynamicCache, EncoderDecoderCache, PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.masking_utils import create_bidirectional_mask, create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import ModelOutput

from moe_atlas.architectures.moa import AttentionOutput, MoAAttention, Rotation, attention
from moe_atlas.architectures.moa_config import MoAConfig
from moe_atlas.architectures.moa_routing import Router, Routing


class MoAFeedForward(nn.Module):
    """Two maps with an activation between them: (B, T, d) -> (B, T, d)."""

    def __init__(self, config: MoAConfig):
        super().__init__()
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size)
        self.act_fn, self.dropout = ACT2FN[config.activation], config.activation_dropout

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        inner = functional.dropout(self.act_fn(self.up_proj(hidden)), self.dropout, self.training)
        return self.down_proj(inner)


class MoALayer(GradientCheckpointingLayer):
    """Self-attention, cross-attention in a decoder that has an encoder, and an FFN, with norms before or after each."""

    def __init__(self, config: MoAConfig, layer: int, kind: str):
        super().__init__()
        self.before, self.dropout = config.norm == "pre", config.dropout
        self.self_attn = attention(config, layer, kind)
        self.self_attn_norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.cross_attn = attention(config, layer, "cross") if kind == "decoder" else None
        if self.cross_attn is not None:
            self.cross_attn_norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.mlp = MoAFeedForward(config)
        self.mlp_norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)

    def forward(
        self,
        hidden: torch.Tensor,
        mask: torch.Tensor | None = None,
        rotation: Rotation | None = None,
        source: torch.Tensor | None = None,
        source_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        with_attentions: bool = False,
        with_outputs: bool = False,
    ) -> torch.Tensor | tuple[torch.Tensor, list[AttentionOutput]]:
        """Hidden states (B, T, d) after the layer; with_outputs: also what its attention blocks gave, self first."""
        outputs = []

        def attended(block: nn.Module, states: torch.Tensor, **where: object) -> torch.Tensor:
            outputs.append(block(states, past_key_values=past_key_values, output_attentions=with_attentions, **where))
            return outputs[-1].output

        hidden = self._residual(
            hidden, self.self_attn_norm, lambda states: attended(self.self_attn, states, mask=mask, rotation=rotation)
        )
        if self.cross_attn is not None:
            hidden = self._residual(
                hidden,
                self.cross_attn_norm,
                lambda states: attended(self.cross_attn, states, source=source, mask=source_mask),
            )
        hidden = self._residual(hidden, self.mlp_norm, self.mlp)
        return (hidden, outputs) if with_outputs else hidden

    def _residual(self, hidden: torch.Tensor, norm: nn.Module, block) -> torch.Tensor:
        added = functional.dropout(block(norm(hidden) if self.before else hidden), self.dropout, self.training)
        return hidden + added if self.before else norm(hidden + added)


@dataclass
class MoAStackOutput(ModelOutput):
    """last_hidden_state (B, T, d); the cache; routing, one a MoA block, a layer's self-attention before its cross;
    attentions and cross_attentions, one (B, slots, T, S) a layer; hidden_states before each layer and at the end."""

    last_hidden_state: torch.Tensor | None = None
    past_key_values: Cache | None = None
    routing: tuple[Routing, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None
    cross_attentions: tuple[torch.Tensor, ...] | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None


class MoAPreTrainedModel(PreTrainedModel):
    config: MoAConfig
    config_class = MoAConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["MoALayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True
    _can_compile_fullgraph = False  # sparse dispatch reads how many tokens each expert has

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Embeddings N(0, 1/d), maps Xavier uniform or N(0, initializer_range^2), norms 1 and 0, biases 0.

        A router starts at small random numbers: from zero, as in the released code, all logits tie, and every token
        of the first steps goes to the same k experts. Only where k = E, where nothing is chosen, does it start at zero.
        """
        if isinstance(module, Router):
            chosen = self.config.num_experts_per_tok < self.config.num_attention_experts
            std = self.config.router_initializer_range if chosen or self.config.frozen_router else 0.0
            init.normal_(module.weight, mean=0.0, std=std)
        elif isinstance(module, MoAAttention):
            for name in ("query", "output"):
                for expert in getattr(module, name):
                    self._init_map(expert)
                if (bias := getattr(module, f"{name}_bias")) is not None:
                    init.zeros_(bias)
        elif isinstance(module, nn.Linear):
            self._init_map(module.weight)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight, mean=0.0, std=self.config.hidden_size**-0.5)
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)

    def _init_map(self, weight: torch.Tensor) -> None:
        if self.config.initializer_range is None:
            init.xavier_uniform_(weight)
        else:
            init.normal_(weight, mean=0.0, std=self.config.initializer_range)


class MoAStack(MoAPreTrainedModel):
    """Embeddings and layers. kind: "causal", "encoder", or "decoder", which has cross-attention."""

    def __init__(self, config: MoAConfig, kind: str | None = None):
        super().__init__(config)
        self.kind = next(iter(config.stacks)) if kind is None else kind
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([MoALayer(config, index, self.kind) for index in range(config.stacks[self.kind])])
        self.norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps) if config.norm == "pre" else nn.Identity()
        self.gradient_checkpointing = False
        self.post_init()

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        source: torch.Tensor | None = None,
        source_mask: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_routing: bool = False,
        output_attentions: bool | None = False,
        output_hidden_states: bool | None = False,
        return_dict: bool | None = None,
    ) -> MoAStackOutput:
        """Token ids (B, T) or inputs_embeds (B, T, d), masks (B, past + T) and (B, S), an encoder's states (B, S, d).

        return_dict is taken because `generate` gives it to an encoder, and changes nothing.
        """
        embedded = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache and self.kind != "encoder" and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
            if self.kind == "decoder":
                past_key_values = EncoderDecoderCache(past_key_values, DynamicCache(config=self.config))
        if position_ids is None:
            position_ids = _positions(embedded, attention_mask, past_key_values)
        hidden, rotation = self._placed(embedded, position_ids)
        masks = self._masks(embedded, attention_mask, past_key_values, source, source_mask)
        hidden = functional.dropout(hidden, self.config.dropout, self.training)
        states, blocks = [hidden], []
        for layer in self.layers:
            hidden = layer(
                hidden,
                mask=masks[0],
                rotation=rotation,
                source=source,
                source_mask=masks[1],
                past_key_values=past_key_values,
                with_attentions=bool(output_attentions),
                with_outputs=bool(output_routing or output_attentions),
            )
            if isinstance(hidden, tuple):
                hidden, outputs = hidden
                blocks.append(outputs)
            states.append(hidden)
        hidden = self.norm(hidden)
        routing = tuple(block.routing for outputs in blocks for block in outputs if block.routing is not None)
        maps = {place: tuple(outputs[place].maps for outputs in blocks) for place in range(len(blocks and blocks[0]))}
        return MoAStackOutput(
            last_hidden_state=hidden,
            past_key_values=past_key_values if use_cache else None,
            routing=routing if output_routing else None,
            attentions=maps.get(0) if output_attentions else None,
            cross_attentions=maps.get(1) if output_attentions else None,
            hidden_states=(*states[:-1], hidden) if output_hidden_states else None,
        )

    def _placed(self, embedded: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, Rotation | None]:
        """Embeddings with sinusoidal positions, or as they are with the rotation of positions (B or 1, T)."""
        if self.config.positions == "rotary":
            angles = _angles(positions, self.config.head_dim, self.config.rotary_base)
            angles = torch.cat((angles, angles), dim=-1)
            return embedded, (angles.cos().to(embedded.dtype), angles.sin().to(embedded.dtype))
        angles = _angles(positions, self.config.hidden_size, 10000.0)
        table = torch.cat((angles.sin(), angles.cos()), dim=-1)
        return embedded * math.sqrt(self.config.hidden_size) + table.to(embedded.dtype), None

    def _masks(
        self,
        embedded: torch.Tensor,
        attention_mask: torch.Tensor | None,
        past: Cache | None,
        source: torch.Tensor | None,
        source_mask: torch.Tensor | None,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Masks of self- and cross-attention; None where a kernel needs none."""
        if self.kind == "encoder":
            return create_bidirectional_mask(self.config, embedded, attention_mask), None
        # Without a mask a kernel takes the last query to be at the last key, which in an empty static cache it is not.
        plain = past is None or embedded.shape[1] == 1
        own = create_causal_mask(self.config, embedded, attention_mask, past, allow_is_causal_skip=plain)
        if source is None:
            return own, None
        return own, create_bidirectional_mask(self.config, embedded, source_mask, encoder_hidden_states=source)


def _positions(embedded: torch.Tensor, mask: torch.Tensor | None, past: Cache | None) -> torch.Tensor:
    """Positions (B or 1, T) counted from each row's first token that is not padding."""
    length = embedded.shape[1]
    if mask is not None and mask.dim() == 2:
        return (mask.long().cumsum(-1) - 1).clamp(min=0)[:, -length:]
    first = 0 if past is None else past.get_seq_length()
    return torch.arange(first, first + length, device=embedded.device)[None]


def _angles(positions: torch.Tensor, width: int, base: float) -> torch.Tensor:
    """Positions (B, T) times base^(-2 j / width): (B, T, width / 2) float32 or better."""
    places = torch.arange(0, width, 2, device=positions.device, dtype=torch.float32)
    return positions[..., None] * torch.pow(base, -places / width)

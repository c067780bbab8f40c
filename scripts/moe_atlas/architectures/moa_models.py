"""Language models with MoA or multi-head attention: causal, masked, and an encoder-decoder for translation."""

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    Cache,
    GenerationMixin,
)
from transformers.modeling_outputs import BaseModelOutput
from transformers.utils import ModelOutput

from moe_atlas.architectures.moa_config import MODEL_TYPE, MoAConfig
from moe_atlas.architectures.moa_routing import Routing, balance_loss, z_loss
from moe_atlas.architectures.moa_stack import MoAPreTrainedModel, MoAStack


@dataclass
class MoAModelOutput(ModelOutput):
    """What the models return.

    loss: task_loss plus, summed over MoA blocks, balance_loss and z_loss times their factors of the configuration, in
    nats a token; task_loss: mean cross-entropy a token; balance_loss and z_loss: their means over MoA blocks, without
    the factors. logits (B, T, vocabulary). routing: one Routing a MoA block, the encoder's first. An encoder-decoder
    has its decoder's self-attention in decoder_attentions, the others in attentions.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    past_key_values: Cache | None = None
    task_loss: torch.Tensor | None = None
    balance_loss: torch.Tensor | None = None
    z_loss: torch.Tensor | None = None
    routing: tuple[Routing, ...] | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None
    decoder_hidden_states: tuple[torch.Tensor, ...] | None = None
    decoder_attentions: tuple[torch.Tensor, ...] | None = None
    cross_attentions: tuple[torch.Tensor, ...] | None = None
    encoder_last_hidden_state: torch.Tensor | None = None
    encoder_hidden_states: tuple[torch.Tensor, ...] | None = None
    encoder_attentions: tuple[torch.Tensor, ...] | None = None


class _LanguageModel(MoAPreTrainedModel):
    """The output layer and the losses, which the three models have alike."""

    objective: str

    def __init__(self, config: MoAConfig):
        if config.objective != self.objective:
            raise ValueError(f"{type(self).__name__} is for the objective {self.objective}, not {config.objective}.")
        super().__init__(config)

    def _wants_routing(self, asked: bool | None, labels: torch.Tensor | None) -> bool:
        wanted = labels is not None or self.config.output_routing if asked is None else asked
        return bool(wanted) and self.config.attention == "moa"

    def _losses(
        self,
        logits: torch.Tensor,
        labels: torch.Tensor,
        routing: tuple[Routing, ...] | None,
        masks: dict[str, torch.Tensor | None],
    ) -> dict[str, torch.Tensor | None]:
        """Losses of logits (B, T, V) and labels (B, T), -100 where nothing is asked; masks: padding by block kind."""
        smoothing = self.config.label_smoothing if self.training else 0.0
        flat = logits.flatten(0, 1).to(torch.promote_types(logits.dtype, torch.float32))
        task = functional.cross_entropy(flat, labels.flatten(), ignore_index=-100, label_smoothing=smoothing)
        if not routing:
            return {"loss": task, "task_loss": task}
        balance = torch.stack([balance_loss(made.logits, made.ids, masks[made.kind]) for made in routing])
        zs = torch.stack([z_loss(made.logits, masks[made.kind]) for made in routing])
        loss = task + self.config.balance_loss * balance.sum() + self.config.z_loss * zs.sum()
        return {"loss": loss, "task_loss": task, "balance_loss": balance.mean(), "z_loss": zs.mean()}


class _SingleStack(_LanguageModel):
    """One stack and an output layer, which is the embeddings unless the configuration says otherwise."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: MoAConfig):
        super().__init__(config)
        self.model = MoAStack(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        output_routing: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> MoAModelOutput:
        """Logits (B, T, V) of token ids (B, T), and losses where labels (B, T) are given, -100 asking nothing.

        A causal model's labels are its inputs: they are shifted here. attention_mask: (B, past + T), 0 for padding.
        output_routing: by default where labels are given. past_key_values: a Cache, used where use_cache is true.
        """
        use_cache = self.config.use_cache and labels is None if use_cache is None else use_cache
        outputs = self.model(
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_routing=self._wants_routing(output_routing, labels),
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
        )
        hidden = outputs.last_hidden_state
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(hidden[:, kept])
        losses = {}
        if labels is not None:
            causal = self.objective == "causal"
            wanted = functional.pad(labels, (0, 1), value=-100)[:, 1:] if causal else labels
            mask = attention_mask if attention_mask is not None and attention_mask.dim() == 2 else None
            if mask is not None:  # padding on the left predicts nothing either
                wanted = wanted.masked_fill(mask == 0, -100)
            losses = self._losses(logits, wanted, outputs.routing, {self.model.kind: mask})
        return MoAModelOutput(
            **losses,
            logits=logits,
            past_key_values=outputs.past_key_values,
            routing=outputs.routing,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


class MoAForCausalLM(_SingleStack, GenerationMixin):
    """A decoder that predicts the next token."""

    objective = "causal"


class MoAForMaskedLM(_SingleStack):
    """An encoder that predicts tokens which were masked; labels are -100 at all others."""

    objective = "masked"


class MoAForTranslation(_LanguageModel, GenerationMixin):
    """An encoder and a decoder; one matrix is the embeddings of both and the output layer."""

    objective = "translation"
    _tied_weights_keys = {
        "decoder.embed_tokens.weight": "encoder.embed_tokens.weight",
        "lm_head.weight": "encoder.embed_tokens.weight",
    }

    def __init__(self, config: MoAConfig):
        super().__init__(config)
        self.encoder, self.decoder = MoAStack(config, "encoder"), MoAStack(config, "decoder")
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.encoder.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.encoder.embed_tokens = self.decoder.embed_tokens = value

    def prepare_decoder_input_ids_from_labels(self, labels: torch.Tensor) -> torch.Tensor:
        """Decoder inputs (B, T): labels one place later, the start token first, padding where labels are -100."""
        start = labels.new_full((len(labels), 1), self.config.decoder_start_token_id)
        shifted = torch.cat((start, labels[:, :-1]), dim=1)
        return shifted.masked_fill(shifted == -100, self.config.pad_token_id)

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        decoder_input_ids: torch.Tensor | None = None,
        decoder_attention_mask: torch.Tensor | None = None,
        encoder_outputs: BaseModelOutput | tuple | None = None,
        past_key_values: Cache | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_routing: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> MoAModelOutput:
        """Logits (B, T, V) of the target after each of decoder_input_ids (B, T), given sources (B, S).

        labels (B, T): target ids, -100 for padding; decoder inputs and their mask are made of them where not given.
        encoder_outputs: what the encoder gave earlier, which then does not run again; its routing is then not there.
        """
        use_cache = self.config.use_cache and labels is None if use_cache is None else use_cache
        asked = {"output_attentions": output_attentions, "output_hidden_states": output_hidden_states}
        asked["output_routing"] = self._wants_routing(output_routing, labels)
        if labels is not None and decoder_input_ids is None:
            decoder_input_ids = self.prepare_decoder_input_ids_from_labels(labels)
            if decoder_attention_mask is None:
                decoder_attention_mask = (labels != -100).long()
        if encoder_outputs is None:
            encoder_outputs = self.encoder(input_ids, attention_mask=attention_mask, **asked)
        outputs = self.decoder(
            decoder_input_ids,
            attention_mask=decoder_attention_mask,
            past_key_values=past_key_values,
            source=encoder_outputs[0],
            source_mask=attention_mask,
            use_cache=use_cache,
            **asked,
        )
        logits = self.lm_head(outputs.last_hidden_state)
        routing = None
        if asked["output_routing"]:
            routing = (*(getattr(encoder_outputs, "routing", None) or ()), *outputs.routing)
        losses = {}
        if labels is not None:
            masks = {"encoder": attention_mask, "decoder": decoder_attention_mask, "cross": decoder_attention_mask}
            losses = self._losses(logits, labels, routing, masks)
        return MoAModelOutput(
            **losses,
            logits=logits,
            past_key_values=outputs.past_key_values,
            routing=routing,
            decoder_hidden_states=outputs.hidden_states,
            decoder_attentions=outputs.attentions,
            cross_attentions=outputs.cross_attentions,
            encoder_last_hidden_state=encoder_outputs[0],
            encoder_hidden_states=getattr(encoder_outputs, "hidden_states", None),
            encoder_attentions=getattr(encoder_outputs, "attentions", None),
        )


def register() -> None:
    """Register the classes with the Auto classes; the objective in the configuration says which of them loads."""
    AutoConfig.register(MODEL_TYPE, MoAConfig, exist_ok=True)
    AutoModel.register(MoAConfig, MoAStack, exist_ok=True)
    AutoModelForCausalLM.register(MoAConfig, MoAForCausalLM, exist_ok=True)
    AutoModelForMaskedLM.register(MoAConfig, MoAForMaskedLM, exist_ok=True)
    AutoModelForSeq2SeqLM.register(MoAConfig, MoAForTranslation, exist_ok=True)

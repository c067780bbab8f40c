"""Configuration of transformers whose attention is a mixture of attention heads, or multi-head attention beside it.

Mixture of Attention Heads (MoA): Zhang et al. 2022, arXiv 2210.05144, section 3.
"""

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN

MODEL_TYPE = "moa"
OBJECTIVES = ("causal", "masked", "translation")
ATTENTIONS = ("moa", "mha")
NORMALIZATIONS = ("none", "detached", "full")


@strict
class MoAConfig(PreTrainedConfig):
    """A causal LM, a masked LM or an encoder-decoder, with MoA or multi-head attention in every attention block.

    Defaults are the decoder of the paper's base model (8K8E128D). "d" is hidden_size.

    objective: "causal", "masked" or "translation"; the class that loads the model must be the one for it.
    num_hidden_layers: layers of the decoder, or of the only stack; num_encoder_layers: of the encoder, 0 without one.
    attention: "moa", or "mha" for multi-head attention with num_attention_heads heads of head_dim (their product
    need not be d). num_attention_experts E, num_experts_per_tok k and head_dim D: experts, experts a token, width.
    normalization of the weights of the k chosen experts, p being the softmax over all E logits:
        "none"      w_i = p_i, as the released code computes
        "detached"  w_i = p_i / sum of the chosen p, no gradient through the sum (the paper's equation)
        "full"      softmax over the k chosen logits, as JetMoE: same value as "detached", gradient through the sum
    balance_loss, z_loss: factors of the two losses of every MoA block. They are added to the mean loss a token and
    summed over blocks. (The released command adds them to a sum over tokens: about 8000 times less.)
    frozen_router: the router keeps its random weights; the control for what a learned router adds.
    router_initializer_range: standard deviation of the router's initial weights.
    initializer_range: that of all other maps; None takes Xavier's uniform distribution.
    attention_bias: biases in queries, keys, values and outputs of both attentions.
    positions: "sinusoidal", added to the embeddings, or "rotary", applied to queries and keys of self-attention.
    norm: "post" (as the paper) or "pre". label_smoothing: of the loss while training.
    output_routing: whether a forward without labels returns its routing too.
    """

    model_type = MODEL_TYPE
    keys_to_ignore_at_inference = ["past_key_values", "encoder_last_hidden_state", "routing"]
    attribute_map = {"num_experts": "num_attention_experts"}

    vocab_size: int = 32000
    hidden_size: int = 512
    intermediate_size: int = 2048
    num_hidden_layers: int = 6
    num_encoder_layers: int = 0
    objective: str = "causal"
    attention: str = "moa"
    num_attention_heads: int = 8
    head_dim: int = 128
    num_attention_experts: int = 8
    num_experts_per_tok: int = 8
    normalization: str = "detached"
    balance_loss: float = 0.01
    z_loss: float = 0.001
    frozen_router: bool = False
    router_initializer_range: float = 0.02
    initializer_range: float | None = None
    attention_bias: bool = False
    dropout: float = 0.0
    attention_dropout: float = 0.0
    activation_dropout: float = 0.0
    label_smoothing: float = 0.0
    max_position_embeddings: int = 1024
    positions: str = "sinusoidal"
    rotary_base: float = 10000.0
    norm: str = "post"
    layer_norm_eps: float = 1e-5
    activation: str = "relu"
    tie_word_embeddings: bool = True
    use_cache: bool = True
    output_routing: bool = False
    pad_token_id: int | None = 0
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    decoder_start_token_id: int | None = None
    is_encoder_decoder: bool = False

    def __post_init__(self, **kwargs):
        self.is_encoder_decoder = self.objective == "translation"
        if self.is_encoder_decoder and self.decoder_start_token_id is None:
            self.decoder_start_token_id = self.bos_token_id
        super().__post_init__(**kwargs)

    @property
    def stacks(self) -> dict[str, int]:
        """Layers of each stack, by the kind of its self-attention."""
        if self.objective == "translation":
            return {"encoder": self.num_encoder_layers, "decoder": self.num_hidden_layers}
        return {"causal" if self.objective == "causal" else "encoder": self.num_hidden_layers}

    def validate_architecture(self) -> None:
        """Part of the validation that @strict runs: ValueError for values that make no model."""
        choices = {"objective": OBJECTIVES, "attention": ATTENTIONS, "normalization": NORMALIZATIONS}
        choices |= {"positions": ("sinusoidal", "rotary"), "norm": ("pre", "post"), "activation": tuple(ACT2FN)}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r}; it may be {', '.join(map(str, allowed))}.")
        if not 1 <= self.num_experts_per_tok <= self.num_attention_experts:
            raise ValueError(
                f"num_experts_per_tok is {self.num_experts_per_tok}; it must lie between 1 and the "
                f"{self.num_attention_experts} attention experts."
            )
        if (self.objective == "translation") != (self.num_encoder_layers > 0):
            raise ValueError(
                f"num_encoder_layers is {self.num_encoder_layers} for the objective {self.objective}; "
                "a translation model has an encoder, the others have none."
            )
        if self.positions == "rotary" and self.head_dim % 2:
            raise ValueError(f"head_dim is {self.head_dim}; rotary positions need an even number.")
        if self.positions == "sinusoidal" and self.hidden_size % 2:
            raise ValueError(f"hidden_size is {self.hidden_size}; sinusoidal positions need an even number.")

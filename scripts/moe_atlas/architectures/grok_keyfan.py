"""Grok-1 in the layout of another port (keyfan/grok-1-hf): other tensor names, config keys and activation.

Its config.json has model_type "grok", `num_local_experts`, and the tanh form of GELU; the embedding is the LM head
too, and not stored a second time. The arithmetic is that of grok.py; weights are the router's softmax as it is.
"""

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightRenaming

from moe_atlas.architectures.grok import Grok1Config, Grok1ModelForCausalLM, merged_experts

MODEL_TYPE = "grok"

# Names in the files, and those of grok.py.
_NAMES = (
    (r"^transformer\.in_out_embed\.", "model.embed_tokens."),
    (r"^transformer\.rms_norm\.weight", "model.norm.scale"),
    (r"^transformer\.decoder_layer\.", "model.layers."),
    (r"\.rms_norm\.weight", ".pre_attn_norm.scale"),
    (r"\.rms_norm_1\.weight", ".post_attn_norm.scale"),
    (r"\.rms_norm_2\.weight", ".pre_moe_norm.scale"),
    (r"\.rms_norm_3\.weight", ".post_moe_norm.scale"),
    (r"\.multi_head_attention\.query\.", ".attn.q_proj."),
    (r"\.multi_head_attention\.key\.", ".attn.k_proj."),
    (r"\.multi_head_attention\.value\.", ".attn.v_proj."),
    (r"\.multi_head_attention\.linear\.", ".attn.o_proj."),
    (r"\.router\.", ".moe_block.gate."),
)


@strict
class GrokConfig(Grok1Config):
    """The keys of that port's config.json."""

    model_type = MODEL_TYPE

    hidden_act: str = "gelu_new"


class GrokForCausalLM(Grok1ModelForCausalLM):
    config: GrokConfig


def register() -> None:
    """Register the classes with the Auto classes, and the port's tensor names."""
    AutoConfig.register(MODEL_TYPE, GrokConfig, exist_ok=True)
    AutoModelForCausalLM.register(GrokConfig, GrokForCausalLM, exist_ok=True)
    renamings = [WeightRenaming(source_patterns=theirs, target_patterns=ours) for theirs, ours in _NAMES]
    register_checkpoint_conversion_mapping(MODEL_TYPE, renamings + merged_experts(".moe"), overwrite=True)

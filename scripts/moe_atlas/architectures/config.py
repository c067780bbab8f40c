"""Reading a checkpoint's config.json into the configuration class of its model."""

import os
from pathlib import Path

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from moe_atlas.architectures import quantised, register
from moe_atlas.architectures.deepseek import DeepseekForCausalLM
from moe_atlas.architectures.grok import Grok1ModelForCausalLM
from moe_atlas.architectures.grok_keyfan import GrokForCausalLM
from moe_atlas.errors import AtlasError
from moe_atlas.files import read_json

_OWN_CLASSES = (DeepseekForCausalLM, Grok1ModelForCausalLM, GrokForCausalLM)


def read_config(directory: str | os.PathLike) -> PreTrainedConfig:
    """The configuration of the checkpoint in `directory`.

    The class is found by `model_type` or, where the file has none (Grok-1), by `architectures`. `auto_map`, which
    names code to download, is ignored. AtlasError when there is no config.json, no class for it, or a value that
    the class refuses, and for weights quantised in a way that is not read.
    """
    register()
    path = Path(directory) / "config.json"
    values = read_json(path)
    if not isinstance(values, dict):
        raise AtlasError(f"{path}: this is not a JSON object; restore the file.")
    architectures = values.get("architectures") or []
    model_type = values.get("model_type") or _model_type_of_class(architectures)
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        name = f"model type {model_type!r}" if model_type else f"architectures {architectures}"
        raise AtlasError(f"{path}: there is no model class for {name}; see 'add an architecture' in CONTRIBUTING.md.")
    try:
        if values.get("model_type"):
            config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
        else:
            config = CONFIG_MAPPING[model_type].from_dict(values)
    except (StrictDataclassError, ValueError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise AtlasError(
            f"{path}: a value does not fit model type {model_type!r} ({reason}); mend the file."
        ) from error
    if hasattr(config, "auto_map"):
        del config.auto_map
    if name := quantised.unreadable(config):
        raise AtlasError(
            f"{path}: the weights are quantised by {name!r}, and only MXFP4 and block-wise FP8 are read; "
            "name a repository or revision with plain weights."
        )
    return config


def _model_type_of_class(architectures: list[str]) -> str | None:
    """The model type of the first class name that is known."""
    known = {
        name: model_type for model_type, name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items() if isinstance(name, str)
    }
    known |= {own.__name__: own.config_class.model_type for own in _OWN_CLASSES}
    return next((known[name] for name in architectures if name in known), None)

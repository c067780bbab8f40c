"""Where the dense FFNs of a transformers model are: the matrix of the keys, and the module that takes the activation.

A neuron of an FFN has a key, the row of the first matrix that its activation function sees (of gated FFNs the gate's),
and a value, the column of the second matrix (EMoE, arXiv 2310.10908, section 3).
"""

from dataclasses import dataclass

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from moe_atlas.errors import AtlasError

# (module of the keys, module that takes the activation), as paths below one module of a layer. BERT's two are in
# neighbouring modules, so that the layer itself is the module.
_LAYOUTS = (
    ("gate_proj", "down_proj"),  # Llama, Mistral, Qwen, Gemma
    ("c_fc", "c_proj"),  # GPT-2, GPT-Neo
    ("intermediate.dense", "output.dense"),  # BERT, RoBERTa, Electra, ViT
    ("wi_0", "wo"),  # T5 v1.1
    ("wi", "wo"),  # T5 v1.0
    ("fc1", "fc2"),  # BART, OPT, Phi
    ("dense_h_to_4h", "dense_4h_to_h"),  # GPT-NeoX, Falcon, Bloom
)


@dataclass(frozen=True)
class DenseFFN:
    """One dense FFN: `first` gives the pre-activations of its neurons, `last` takes their activations (..., F).

    layer: number of the FFN in the model, from 0; in an encoder-decoder the encoder's come first. name: of its module.
    """

    layer: int
    name: str
    first: nn.Module
    last: nn.Module

    @property
    def keys(self) -> torch.Tensor:
        """The keys as they are now, (F, H), in the dtype of the weights: a view, so that it follows the optimiser.

        Where PEFT adapts this matrix, a sum with what the adapter adds.
        """
        module = getattr(self.first, "base_layer", self.first)
        weight = module.weight
        for adapter in getattr(self.first, "active_adapters", ()):
            if adapter in getattr(self.first, "lora_A", ()) and not self.first.merged:
                weight = weight + self.first.get_delta_weight(adapter)
        return weight.T if isinstance(module, Conv1D) else weight

    @property
    def bias(self) -> torch.Tensor | None:
        """The bias before the activation function, (F,), or None."""
        return getattr(self.first, "base_layer", self.first).bias

    @property
    def neurons(self) -> int:
        """F."""
        return self.keys.shape[0]


def dense_ffns(model: nn.Module) -> list[DenseFFN]:
    """The dense FFNs of a model, in the order in which they are registered, which is that of the layers.

    Experts of a mixture and a shared expert are not among them. Raises AtlasError where there are none.
    """
    found = []
    for name, module in model.named_modules():
        parts = name.split(".")
        if any("expert" in part for part in parts) or not any(part.isdigit() for part in parts):
            continue
        pair = next((pair for pair in _LAYOUTS if all(_has(module, path) for path in pair)), None)
        if pair:
            first, last = (module.get_submodule(path) for path in pair)
            found.append(DenseFFN(len(found), name, first, last))
    if not found:
        raise AtlasError(
            f"{type(model).__name__}: no dense FFN of a known layout is in this model; "
            "add the names of its two linear maps to scripts/moe_atlas/emoe/ffns.py."
        )
    return found


def _has(module: nn.Module, path: str) -> bool:
    for name in path.split("."):
        module = getattr(module, name, None)
    return isinstance(module, nn.Module) and hasattr(getattr(module, "base_layer", module), "weight")

"""A dense checkpoint written as an EMoE, and back, without a change of any weight (see architectures/emoe.py).

In the files, the rows of an FFN's first matrices (columns, where a family stores them so) and the columns of its last
one are dealt to experts, one matrix an expert, and the router's weight is there as well; all else is copied.
labels.safetensors says which neuron went where.
"""

import copy
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers.pytorch_utils import Conv1D

from moe_atlas.architectures import internals, quantised
from moe_atlas.architectures.config import read_config
from moe_atlas.architectures.emoe import EMoE, EMoEConfig, EMoEForCausalLM, EMoERouter
from moe_atlas.architectures.ffn import dense_ffn, roles
from moe_atlas.architectures.layers import decoder_layers
from moe_atlas.architectures.sites import find_sites
from moe_atlas.checkpoints import Checkpoint
from moe_atlas.emoe.checkpoint_files import SHARD_BYTES, write_checkpoint
from moe_atlas.emoe.labels import Labels
from moe_atlas.emoe.split import gate_vectors, objective, split_neurons
from moe_atlas.errors import AtlasError
from moe_atlas.log import Progress
from moe_atlas.stream import skeleton

RECORD = "emoe.json"
# What a tensor of the dense FFN holds, from its first row on.
_PARTS = {"act_up": ("act", "up")}
# A part of an FFN as a tensor of one expert: with a gate branch, and without.
_GATED = {"act": "gate_proj.weight", "up": "up_proj.weight", "down": "down_proj.weight"}
_PLAIN = {"up": "fc1.weight", "up_bias": "fc1.bias", "down": "down_proj.weight"}
# The bias of the output, which is nobody's.
_DOWN_BIAS = "down_bias"
_SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings")
# Files of a demo training and of a derivation, which are no part of the other checkpoint.
_RECORDS = ("training.json", RECORD)


@dataclass(frozen=True)
class Settings:
    """How FFNs become experts. layers: decoder layers from 0, None for all; the rest as in EMoEConfig."""

    experts: int
    top_k: int
    layers: tuple[int, ...] | None = None
    score: str = "gate"
    split: str = "cluster"
    seed: int = 0


@dataclass(frozen=True)
class _Layer:
    """An FFN that becomes experts: its layer, its path in the model, its tensors (path -> role).

    Roles are up, act, down, act_up (both in one, act first), up_bias and down_bias. transposed: matrices are (i, o).
    """

    index: int
    path: str
    tensors: dict[str, str]
    transposed: bool

    @property
    def stored(self) -> dict[str, str]:
        """Part of the FFN -> tensor of one expert."""
        return _PLAIN if "up_bias" in self.tensors.values() else _GATED

    def expert(self, number: int, part: str) -> str:
        """Name in the files of a part of one expert."""
        return f"{self.path}.experts.{number}.{self.stored[part]}"

    def turned(self, tensor: torch.Tensor) -> torch.Tensor:
        """A matrix (o, i) of the dense model as it is stored, or the other way round."""
        return tensor.T if self.transposed and tensor.dim() == 2 else tensor

    def keys(self, score: str) -> str:
        """The part whose rows an expert is scored by."""
        return "act" if score == "gate" and self.stored is _GATED else "up"


def derive(checkpoint: Checkpoint, settings: Settings, folder: Path, shard_bytes: int = SHARD_BYTES) -> dict:
    """Write the EMoE of a dense checkpoint into `folder`; return what emoe.json says of it.

    Labels of `folder` that fit the weights are used again. Raises AtlasError for a checkpoint that has experts already,
    is quantised, whose FFNs are neither act(W x) * (V x) without biases nor act(W x + b), that lacks a layer, or whose
    neurons the number of experts does not divide.
    """
    config = read_config(checkpoint.directory)
    if quantised.method(config) is not None:
        raise AtlasError(f"{checkpoint.directory}: the weights are quantised; name a dense row with plain weights.")
    network = skeleton(copy.deepcopy(config))  # which writes its own dtype into it
    layers = _layers(checkpoint.directory, network, settings)
    derived = _config(config, settings)
    names = _model_names(checkpoint, network)
    stored = _stored_names(checkpoint, names, layers)
    labels, records = Labels(folder), []
    _check_ffn(checkpoint, network, layers[0], stored, derived)
    routers: dict[int, torch.Tensor] = {}
    progress = Progress(len(layers), "layer")
    for layer in layers:
        keys = _matrix(checkpoint, layer, stored, layer.keys("gate"))
        found = labels.of(layer.index, keys, settings.experts, settings.split, settings.seed)
        scored = _matrix(checkpoint, layer, stored, layer.keys(settings.score))
        routers[layer.index] = gate_vectors(scored.to(EMoERouter.dtype), found, settings.experts)
        random = split_neurons(keys, settings.experts, rule="random", seed=settings.seed)
        records.append(
            {
                "layer": layer.index,
                "neurons": len(keys),
                "labels": labels.digests[f"layer_{layer.index}"],
                "objective": objective(keys, found),
                "objective_random": objective(keys, random),
            }
        )
        progress.step(
            f"layer {layer.index}: {records[-1]['objective']:.1f}, random {records[-1]['objective_random']:.1f}"
        )
    tensors = _dealt(checkpoint, layers, names, labels, routers, settings.experts)
    write_checkpoint(folder, derived, tensors, checkpoint.directory, _RECORDS, shard_bytes)
    labels.write()
    return {"settings": asdict(settings), "layers": records}


def merge(folder: Path, output: Path, shard_bytes: int = SHARD_BYTES) -> None:
    """Write the dense checkpoint that the EMoE in `folder` was derived from into `output`, with the same bits.

    An EMoE whose weights have been trained since becomes a dense model as well: the router has none of its own.
    """
    checkpoint, config = Checkpoint(folder), read_config(folder)
    if not isinstance(config, EMoEConfig):
        raise AtlasError(f"{folder}: a checkpoint of model type {config.model_type!r} is no EMoE; name one that is.")
    dense_config = config.dense_config()
    network = skeleton(copy.deepcopy(dense_config))
    dense_config.architectures = [type(network).__name__]
    chosen = None if config.emoe_layers is None else tuple(config.emoe_layers)
    layers = _layers(folder, network, Settings(config.num_experts, config.num_experts_per_tok, chosen))
    labels = Labels(folder)
    tensors = _joined(checkpoint, layers, labels, config.num_experts)
    write_checkpoint(output, dense_config, tensors, folder, _RECORDS, shard_bytes)


def _layers(place: Path, network: nn.Module, settings: Settings) -> list[_Layer]:
    """The FFNs that become experts, in the order of the layers."""
    layers = decoder_layers(network)
    chosen = range(len(layers)) if settings.layers is None else sorted(set(settings.layers))
    path_of = {module: path for path, module in network.named_modules()}
    found = []
    for index in chosen:
        if not 0 <= index < len(layers):
            raise AtlasError(
                f"{place}: there is no layer {index}, the layers are 0 to {len(layers) - 1}; correct emoe_layers."
            )
        if find_sites(layers[index]):
            raise AtlasError(f"{place}: layer {index} has experts already; name a dense row.")
        ffn = dense_ffn(layers[index])
        if ffn is None:
            raise AtlasError(
                f"{place}: {type(layers[index]).__name__} has no feed-forward network of a known layout; "
                'see "add an architecture" in CONTRIBUTING.md.'
            )
        path, tensors = path_of[ffn], {}
        for name, role in roles(ffn).items():
            tensors[f"{path}.{name}.weight"] = role
            if getattr(ffn, name).bias is not None:
                tensors[f"{path}.{name}.bias"] = f"{role}_bias"
        transposed = any(isinstance(module, Conv1D) for module in ffn.modules())
        found.append(_Layer(index, path, tensors, transposed))
    return found


def _config(dense: PreTrainedConfig, settings: Settings) -> EMoEConfig:
    """Configuration of the EMoE of a dense model."""
    values = {key: value for key, value in dense.to_dict().items() if key not in ("model_type", "architectures")}
    # Whoever reads the config of a model asks for these, by whatever names the family keeps them.
    values |= {name: getattr(dense, name) for name in _SIZES if hasattr(dense, name)}
    return EMoEConfig(
        **values,
        architectures=[EMoEForCausalLM.__name__],
        dense_model_type=dense.model_type,
        num_experts=settings.experts,
        num_experts_per_tok=settings.top_k,
        emoe_layers=None if settings.layers is None else sorted(set(settings.layers)),
        emoe_score=settings.score,
        emoe_split=settings.split,
        emoe_seed=settings.seed,
    )


def _model_names(checkpoint: Checkpoint, network: nn.Module) -> dict[str, str]:
    """Name of a tensor in the files -> its name in the model where it is only renamed, else that in the files."""
    targets = internals.targets(network, internals.weight_mapping(network), checkpoint.names)
    return {name: target if pattern is None else name for name, (target, pattern) in targets.items()}


def _stored_names(checkpoint: Checkpoint, names: dict[str, str], layers: list[_Layer]) -> dict[str, str]:
    """Path of a tensor of the layers' FFNs -> its name in the files."""
    stored = {target: name for name, target in names.items()}
    for path in (path for layer in layers for path in layer.tensors):
        if path not in stored:
            raise AtlasError(f"{checkpoint.directory}: the files have no tensor {path} as it is; name a dense row.")
    return stored


def _matrix(checkpoint: Checkpoint, layer: _Layer, stored: dict[str, str], part: str) -> torch.Tensor:
    """Rows (F, H) of the part of an FFN before its activation."""
    for path, role in layer.tensors.items():
        parts = _PARTS.get(role, (role,))
        if part in parts:
            return layer.turned(checkpoint.read(stored[path])).chunk(len(parts))[parts.index(part)]
    raise AtlasError(f"{checkpoint.directory}: {layer.path} has no matrix {part}; name another dense row.")


def _check_ffn(
    checkpoint: Checkpoint, network: nn.Module, layer: _Layer, stored: dict[str, str], config: EMoEConfig
) -> None:
    """AtlasError where the family's FFN computes something else than the experts together would."""
    ffn = copy.deepcopy(network.get_submodule(layer.path)).to_empty(device="cpu").float()
    for path in layer.tensors:
        ffn.get_parameter(path.removeprefix(f"{layer.path}.")).data.copy_(checkpoint.read(stored[path]))
    config = copy.deepcopy(config)
    config.num_experts_per_tok = config.num_experts
    config._experts_implementation = "eager"
    try:
        experts = EMoE(config, ffn).eval()
    except ValueError as error:
        raise AtlasError(f"{checkpoint.directory}: {error}; choose other settings or another dense row.") from None
    inputs = torch.randn(4, experts.experts.hidden_dim, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, got = ffn(inputs), experts(inputs)
    if not torch.allclose(got, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max())):
        raise AtlasError(
            f"{checkpoint.directory}: {type(ffn).__name__} computes more than its matrices say, so its neurons "
            "cannot be dealt to experts; name another dense row."
        )


def _order(labels: np.ndarray) -> torch.Tensor:
    """Neurons (F,) int64, expert by expert."""
    return torch.from_numpy(np.argsort(labels, kind="stable"))


def _dealt(
    checkpoint: Checkpoint,
    layers: list[_Layer],
    names: dict[str, str],
    labels: Labels,
    routers: dict[int, torch.Tensor],
    experts: int,
) -> Iterator[tuple[str, torch.Tensor]]:
    """Names and tensors of the derived checkpoint, in the order of the dense one's files."""
    of_path = {path: (layer, role) for layer in layers for path, role in layer.tensors.items()}
    for name in checkpoint.names:
        tensor, path = checkpoint.read(name), names[name]
        if path not in of_path:
            yield path, tensor
            continue
        layer, role = of_path[path]
        if role == _DOWN_BIAS:
            yield f"{layer.path}.{_DOWN_BIAS}", tensor
            continue
        order, parts = _order(labels.kept(layer.index)), _PARTS.get(role, (role,))
        for part, matrix in zip(parts, layer.turned(tensor).chunk(len(parts)), strict=True):
            side = _side(part)
            for expert, dealt in enumerate(matrix.index_select(side, order).chunk(experts, dim=side)):
                yield layer.expert(expert, part), dealt.clone()
        if role == "down":
            yield f"{layer.path}.router.weight", routers[layer.index]


def _side(part: str) -> int:
    """The dimension of a part (o, i) that counts neurons."""
    return 1 if part == "down" else 0


def _joined(
    checkpoint: Checkpoint, layers: list[_Layer], labels: Labels, experts: int
) -> Iterator[tuple[str, torch.Tensor]]:
    """Names and tensors of the dense checkpoint, its FFNs last."""
    prefixes = tuple(f"{layer.path}." for layer in layers)
    # transformers, when it saves an EMoE, begins all names with that of its part that is the dense model.
    names = {name.removeprefix(f"{EMoEForCausalLM.base_model_prefix}."): name for name in checkpoint.names}
    for name, stored in names.items():
        if not name.startswith(prefixes):
            yield name, checkpoint.read(stored)
    for layer in layers:
        back = torch.argsort(_order(labels.kept(layer.index)))
        for path, role in layer.tensors.items():
            if role == _DOWN_BIAS:
                yield path, checkpoint.read(names[f"{layer.path}.{_DOWN_BIAS}"])
                continue
            joined = []
            for part in _PARTS.get(role, (role,)):
                dealt = [checkpoint.read(names[layer.expert(expert, part)]) for expert in range(experts)]
                joined.append(torch.cat(dealt, dim=_side(part)).index_select(_side(part), back))
            yield path, layer.turned(torch.cat(joined))

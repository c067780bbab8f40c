"""A dense checkpoint written as an EMoE, and back, without a change of any weight (see architectures/emoe.py).

In the files, the rows of an FFN's first matrices and the columns of its last one are dealt to experts, one matrix an
expert, and the router's weight is there as well; all else is copied. labels.safetensors says which neuron went where.
"""

import copy
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedConfig

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
_STORED = {"act": "gate_proj", "up": "up_proj", "down": "down_proj"}
# What a matrix of the dense model holds, from its first row on.
_PARTS = {"act": ("act",), "up": ("up",), "act_up": ("act", "up"), "down": ("down",)}
# The dimension of the neurons.
_NEURONS = {"act": 0, "up": 0, "down": 1}
# Which rows an expert is scored by.
_SCORED = {"gate": "act", "up": "up"}
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
    """An FFN that becomes experts: its layer, its path in the model, and its matrices (path of the weight -> role)."""

    index: int
    path: str
    matrices: dict[str, str]


def derive(checkpoint: Checkpoint, settings: Settings, folder: Path, shard_bytes: int = SHARD_BYTES) -> dict:
    """Write the EMoE of a dense checkpoint into `folder`; return what emoe.json says of it.

    Labels of `folder` that fit the weights are used again. Raises AtlasError for a checkpoint that has experts already,
    is quantised, whose FFNs are not act(W x) * (V x) without biases, that lacks a layer, or whose neurons the number of
    experts does not divide.
    """
    config = read_config(checkpoint.directory)
    if quantised.method(config) is not None:
        raise AtlasError(f"{checkpoint.directory}: the weights are quantised; name a dense row with plain weights.")
    network = skeleton(copy.deepcopy(config))  # which writes its own dtype into it
    layers = _layers(checkpoint.directory, network, settings)
    derived = _config(config, settings)
    stored = _stored_names(checkpoint, network, layers)
    labels, records = Labels(folder), []
    _check_ffn(checkpoint, network, layers[0], stored, derived)
    routers: dict[int, torch.Tensor] = {}
    progress = Progress(len(layers), "layer")
    for layer in layers:
        keys = _matrix(checkpoint, layer, stored, "act")
        found = labels.of(layer.index, keys, settings.experts, settings.split, settings.seed)
        scored = _matrix(checkpoint, layer, stored, _SCORED[settings.score])
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
    tensors = _dealt(checkpoint, layers, stored, labels, routers, settings.experts)
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
        path = path_of[ffn]
        found.append(_Layer(index, path, {f"{path}.{name}.weight": role for name, role in roles(ffn).items()}))
    return found


def _config(dense: PreTrainedConfig, settings: Settings) -> EMoEConfig:
    """Configuration of the EMoE of a dense model."""
    values = {key: value for key, value in dense.to_dict().items() if key not in ("model_type", "architectures")}
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


def _stored_names(checkpoint: Checkpoint, network: nn.Module, layers: list[_Layer]) -> dict[str, str]:
    """Path of a weight of the layers' FFNs -> its name in the files."""
    targets = internals.targets(network, internals.weight_mapping(network), checkpoint.names)
    wanted = {path for layer in layers for path in layer.matrices}
    stored = {target: name for name, (target, pattern) in targets.items() if target in wanted and pattern is None}
    for path in wanted:
        if path not in stored:
            raise AtlasError(f"{checkpoint.directory}: the files have no tensor {path} as it is; name a dense row.")
    return stored


def _matrix(checkpoint: Checkpoint, layer: _Layer, stored: dict[str, str], role: str) -> torch.Tensor:
    """Rows (F, H) of an FFN's act or up matrix."""
    path, parts = next((path, _PARTS[held]) for path, held in layer.matrices.items() if role in _PARTS[held])
    return checkpoint.read(stored[path]).chunk(len(parts))[parts.index(role)]


def _check_ffn(
    checkpoint: Checkpoint, network: nn.Module, layer: _Layer, stored: dict[str, str], config: EMoEConfig
) -> None:
    """AtlasError where the family's FFN computes something else than the experts together would."""
    ffn = copy.deepcopy(network.get_submodule(layer.path)).to_empty(device="cpu").float()
    for path in layer.matrices:
        ffn.get_parameter(path.removeprefix(f"{layer.path}.")).data.copy_(checkpoint.read(stored[path]))
    config = copy.deepcopy(config)
    config.num_experts_per_tok = config.num_experts
    config._experts_implementation = "eager"
    try:
        experts = EMoE(config, ffn).eval()
    except ValueError as error:
        raise AtlasError(f"{checkpoint.directory}: {error}; choose another number of experts or dense row.") from None
    inputs = torch.randn(4, experts.experts.hidden_dim, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, got = ffn(inputs), experts(inputs)
    if not torch.allclose(got, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max())):
        raise AtlasError(
            f"{checkpoint.directory}: {type(ffn).__name__} computes more than act(W x) * (V x), so its neurons "
            "cannot be dealt to experts; name another dense row."
        )


def _order(labels: np.ndarray) -> torch.Tensor:
    """Neurons (F,) int64, expert by expert."""
    return torch.from_numpy(np.argsort(labels, kind="stable"))


def _dealt(
    checkpoint: Checkpoint,
    layers: list[_Layer],
    stored: dict[str, str],
    labels: Labels,
    routers: dict[int, torch.Tensor],
    experts: int,
) -> Iterator[tuple[str, torch.Tensor]]:
    """Names and tensors of the derived checkpoint, in the order of the dense one's files."""
    of_name = {stored[path]: (layer, role) for layer in layers for path, role in layer.matrices.items()}
    for name in checkpoint.names:
        tensor = checkpoint.read(name)
        if name not in of_name:
            yield name, tensor
            continue
        layer, role = of_name[name]
        order = _order(labels.kept(layer.index))
        for part, matrix in zip(_PARTS[role], tensor.chunk(len(_PARTS[role])), strict=True):
            side = _NEURONS[part]
            for expert, dealt in enumerate(matrix.index_select(side, order).chunk(experts, dim=side)):
                yield f"{layer.path}.experts.{expert}.{_STORED[part]}.weight", dealt.clone()
        if role == "down":
            yield f"{layer.path}.router.weight", routers[layer.index]


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
        for path, role in layer.matrices.items():
            joined = []
            for part in _PARTS[role]:
                stored = [names[f"{layer.path}.experts.{expert}.{_STORED[part]}.weight"] for expert in range(experts)]
                matrix = torch.cat([checkpoint.read(name) for name in stored], dim=_NEURONS[part])
                joined.append(matrix.index_select(_NEURONS[part], back))
            yield path, torch.cat(joined)

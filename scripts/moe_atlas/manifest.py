"""checkpoint.json: what a checkpoint is, and which bytes it was when it was first seen."""

import os
import re
from pathlib import Path

from torch import nn
from transformers import PreTrainedConfig

from moe_atlas.architectures.config import read_config
from moe_atlas.architectures.ffn import dense_ffn, ffn_view
from moe_atlas.architectures.layers import decoder_layers
from moe_atlas.architectures.sites import ExpertSite, find_sites
from moe_atlas.checkpoints import Checkpoint
from moe_atlas.errors import AtlasError
from moe_atlas.files import read_json, sha256
from moe_atlas.log import Progress, say
from moe_atlas.stream import skeleton

_EXPERT_COUNT = re.compile(r"(?!.*(shared|per_tok))(num|n|moe)_\w*experts")
_TOP_K = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k", "moe_k", "top_k_experts")
_SHARED = ("n_shared_experts", "num_shared_experts", "moe_num_shared_experts")


def shape_of(model: str, directory: str | os.PathLike, dense_allowed: bool) -> dict:
    """What config.json says a model is: the architecture's part of checkpoint.json. Reads no weights.

    Raises AtlasError for a config that is missing or damaged, of an unknown architecture, or without experts
    (unless dense_allowed: a dense model has a place in the atlas as a reference only).
    """
    path = Path(directory) / "config.json"
    config = read_config(directory)
    try:
        network = skeleton(config)
    except AtlasError as error:
        raise AtlasError(f"{path}: {error}") from None
    layers = decoder_layers(network)
    sites = {index: find_sites(layer) for index, layer in enumerate(layers)}
    ffn_sites = {index: site for index in sites for site in sites[index] if site.name == "ffn"}
    attention_sites = [site for found in sites.values() for site in found if site.name == "attention"]
    # Where only attention has experts, they are the ones that are counted.
    counted = list(ffn_sites.values()) or attention_sites
    if counted:
        _check_count(path, config, min(site.num_experts for site in counted))
    elif not dense_allowed:
        raise AtlasError(
            f"{path}: the {config.model_type} model {model} has no experts; "
            "name it as dense_reference of another row or set enabled to false."
        )
    return {
        "model_type": config.model_type,
        "architecture": type(network).__name__,
        "L": len(layers),
        "N": max((site.num_experts for site in counted), default=0),
        "k": _first(config, _TOP_K) if counted else 0,
        "d": config.get_text_config().hidden_size,
        "m": _width(layers, ffn_sites),
        "shared": _shared(config, ffn_sites),
        "dense_layers": [index for index in sites if index not in ffn_sites],
        "moe_layers": list(ffn_sites),
        "attention_experts": bool(attention_sites),
        "parameters": sum(parameter.numel() for parameter in network.parameters()),
    }


def describe(
    model: str,
    source: str,
    revision: str,
    directory: str | os.PathLike,
    dense_allowed: bool,
    *,
    licence: str = "",
    files: list[dict] | None = None,
    fetched: Checkpoint | None = None,
) -> dict:
    """Check a checkpoint directory and return the contents of its checkpoint.json.

    Builds the model without weights, checks every file's header and hashes the files.
    files: name, bytes and sha256 of each weight file, where somebody has checked them already.
    fetched: a checkpoint whose shards are not kept; `files` must then be given.
    Raises AtlasError for anything that is missing or damaged, and as `shape_of` does.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise AtlasError(f"{directory}: there is no such directory; correct the source of {model} in the sheet.")
    shape = shape_of(model, directory, dense_allowed)
    checkpoint = Checkpoint(directory) if fetched is None else fetched
    files = _hashes(checkpoint.files) if files is None else files
    return {
        "model": model,
        "source": source,
        "revision": revision,
        "licence": licence,
        "directory": str(directory),
        "kept": fetched is None,
        **shape,
        "dtype": str(checkpoint.dtype).removeprefix("torch."),
        "bytes": sum(file["bytes"] for file in files),
        "files": files,
    }


def _first(config: PreTrainedConfig, names: tuple[str, ...]) -> int:
    """The first of several config values that is there and a positive number, else 0; of a list its largest number."""
    text = config.get_text_config()
    # DBRX keeps the numbers of its FFN in a config of their own.
    parts = (text, *(getattr(text, name, None) for name in text.sub_configs))
    values = (getattr(part, name, None) for part in parts for name in names)
    numbers = (max(value, default=0) if isinstance(value, list) else value for value in values)
    return next((number for number in numbers if isinstance(number, int) and number > 0), 0)


def _shared(config: PreTrainedConfig, sites: dict[int, ExpertSite]) -> int:
    """Shared experts a layer: the config's number, or 1 where the config only says how wide it is."""
    has_one = any(site.shared is not None for site in sites.values())
    return (_first(config, _SHARED) or 1) if has_one else 0


def _width(layers: nn.ModuleList, sites: dict[int, ExpertSite]) -> int:
    """Expert width m, of the first layer with experts; of the FFN in a dense model."""
    if sites:
        return next(iter(sites.values())).bank().up.shape[1]
    ffn = dense_ffn(layers[0])
    if ffn is None:
        raise AtlasError(
            f"{type(layers[0]).__name__}: no feed-forward network of a known layout was found; "
            'see "add an architecture" in CONTRIBUTING.md.'
        )
    return ffn_view(ffn).up.shape[0]


def _check_count(path: Path, config: PreTrainedConfig, experts: int) -> None:
    """The number of experts must be in the file: a class default would silently build another model."""
    raw = read_json(path)
    raw = raw.get("text_config", raw)
    there = {*raw, *(name for part in raw.values() if isinstance(part, dict) for name in part)}
    if not any(_EXPERT_COUNT.fullmatch(name) for name in there):
        names = [name for name in config.get_text_config().to_dict() if _EXPERT_COUNT.fullmatch(name)]
        wanted = " or ".join(names) or "num_experts"
        raise AtlasError(f"{path}: the number of experts is missing ({wanted}); restore the file.")
    if experts < 1:
        raise AtlasError(f"{path}: the number of experts is {experts}; restore the file.")


def _hashes(files: list[Path]) -> list[dict]:
    """Name, size and sha256 of each weight file, with progress for large ones."""
    progress = Progress(len(files), "file")
    result = []
    for file in files:
        result.append({"name": file.name, "bytes": file.stat().st_size, "sha256": sha256(file)})
        progress.step(f"{file.name} sha256 {result[-1]['sha256'][:12]}")
    return result


def open_checkpoint(path: str | os.PathLike) -> tuple[Checkpoint, dict]:
    """The checkpoint a checkpoint.json describes, and the description.

    Raises AtlasError when a file is gone or has another size than it had when it was described, and for a
    checkpoint whose shards were not kept.
    """
    manifest = read_json(path)
    if not manifest["kept"]:
        raise AtlasError(
            f"{path}: the shards of {manifest['source']} were deleted after use; set keep to true in the row of "
            f"{manifest['model']} to have them fetched and kept."
        )
    if not Path(manifest["directory"]).is_dir():
        raise AtlasError(
            f"{manifest['directory']}: the checkpoint of {manifest['model']} is no longer there; put it back, "
            f"or delete {path} to have {manifest['source']} looked up again."
        )
    checkpoint = Checkpoint(manifest["directory"])
    sizes = {file.name: file.stat().st_size for file in checkpoint.files}
    if sizes != {entry["name"]: entry["bytes"] for entry in manifest["files"]}:
        raise AtlasError(
            f"{manifest['directory']}: the weight files are not those that {path} describes; "
            "delete that file to have them described again."
        )
    say(f"{manifest['model']}: {manifest['architecture']}, {manifest['L']} layers, {manifest['bytes']:,} bytes")
    return checkpoint, manifest

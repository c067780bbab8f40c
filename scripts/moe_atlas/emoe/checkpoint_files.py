"""Write the files of a checkpoint in the Hub's format, tensor by tensor: the weights need not fit into memory."""

import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import PreTrainedConfig

from moe_atlas.files import replaced_checkpoint

SHARD_BYTES = 2 << 30
_INDEX = "model.safetensors.index.json"
# What belongs to a checkpoint beside its weights and config.json: tokenizer, generation settings, chat template.
_BESIDE = {".json", ".model", ".txt", ".jinja", ".tiktoken"}


def write_checkpoint(
    folder: Path,
    config: PreTrainedConfig,
    tensors: Iterable[tuple[str, torch.Tensor]],
    beside: Path,
    left_out: Iterable[str] = (),
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Put config.json, safetensors with an index where there are several, and other files of `beside` into `folder`.

    Files of `beside` that are named in `left_out`, indexes and code are not taken.
    """
    with replaced_checkpoint(folder) as temporary:
        _write_weights(temporary, tensors, shard_bytes)
        kept = {*left_out, "config.json"}
        for path in beside.iterdir():
            if path.is_file() and path.suffix in _BESIDE and path.name not in kept and "index.json" not in path.name:
                shutil.copyfile(path, temporary / path.name)
        config.save_pretrained(temporary)


def _write_weights(folder: Path, tensors: Iterable[tuple[str, torch.Tensor]], shard_bytes: int) -> None:
    """model.safetensors, or several files of about `shard_bytes` and their index."""
    shard: dict[str, torch.Tensor] = {}
    names: list[list[str]] = []
    size = total = 0

    def flush() -> None:
        save_file(shard, folder / f"{len(names)}.partial", metadata={"format": "pt"})
        names.append(list(shard))
        shard.clear()

    for name, tensor in tensors:
        if shard and size + tensor.nbytes > shard_bytes:
            flush()
            size = 0
        shard[name] = tensor.contiguous()
        size, total = size + tensor.nbytes, total + tensor.nbytes
    flush()
    files = [f"model-{number:05}-of-{len(names):05}.safetensors" for number in range(1, len(names) + 1)]
    files = files if len(files) > 1 else ["model.safetensors"]
    for number, file in enumerate(files):
        os.replace(folder / f"{number}.partial", folder / file)
    if len(files) > 1:
        shard_of = {name: file for file, held in zip(files, names, strict=True) for name in held}
        index = {"metadata": {"total_size": total}, "weight_map": shard_of}
        (folder / _INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

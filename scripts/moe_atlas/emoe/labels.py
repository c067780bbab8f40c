"""Which expert each neuron of each layer belongs to, kept beside a checkpoint for as long as its keys are the same."""

import hashlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from moe_atlas.emoe.split import split_neurons
from moe_atlas.errors import AtlasError
from moe_atlas.files import atomic_path

FILE = "labels.safetensors"


class Labels:
    """labels.safetensors of a folder: a tensor `layer_{l}` (F,) int64 a layer, and what it was made from.

    A layer's labels belong to a digest of its keys and of the rule, so that they are made anew when either changes and
    not otherwise: clustering a large layer takes minutes.
    """

    def __init__(self, folder: Path):
        self.path = folder / FILE
        self._labels: dict[str, torch.Tensor] = {}
        self._digests: dict[str, str] = {}
        self._used: set[str] = set()
        if self.path.exists():
            with safe_open(self.path, "pt") as file:
                self._digests = dict(file.metadata() or {})
                self._labels = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118

    def of(self, layer: int, keys: torch.Tensor, experts: int, rule: str, seed: int) -> np.ndarray:
        """Labels (F,) int64 of a layer with keys (F, H), those that are kept or new ones."""
        name, digest = f"layer_{layer}", digest_of(keys, experts, rule, seed)
        if self._digests.get(name) != digest or name not in self._labels:
            self._labels[name] = torch.from_numpy(split_neurons(keys, experts, rule=rule, seed=seed))
            self._digests[name] = digest
        self._used.add(name)
        return self._labels[name].numpy()

    def kept(self, layer: int) -> np.ndarray:
        """Labels (F,) int64 of a layer as they are in the file; AtlasError where there are none."""
        if f"layer_{layer}" not in self._labels:
            raise AtlasError(f"{self.path}: there are no labels of layer {layer}; derive the checkpoint again.")
        return self._labels[f"layer_{layer}"].numpy()

    @property
    def digests(self) -> Mapping[str, str]:
        """Digest of each layer's keys and rule, by the names of the tensors."""
        return self._digests

    def write(self) -> None:
        """Write the labels that were asked for; others are dropped."""
        used = sorted(self._used, key=lambda name: int(name.removeprefix("layer_")))
        with atomic_path(self.path) as temporary:
            save_file(
                {name: self._labels[name] for name in used}, temporary, {name: self._digests[name] for name in used}
            )


def digest_of(keys: torch.Tensor, experts: int, rule: str, seed: int) -> str:
    """Hex sha256 of the bytes of keys (F, H), their dtype and shape, and of how they are split."""
    digest = hashlib.sha256(f"{keys.dtype} {tuple(keys.shape)} {experts} {rule} {seed}\n".encode())
    digest.update(keys.contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()

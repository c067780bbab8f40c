"""Checkpoints with the true layer shapes of published models on random weights: what a run costs, without the download.

Weights are normal, as large as a trained model's, in the names and files of the published checkpoint. A layer costs
what the real one costs; there are fewer of them.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from benchmarks.shapes import Shape

POOL = (1 << 26) + 1  # numbers that are drawn


def write(shape: Shape, directory: Path, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> int:
    """Write the checkpoint, a file for each layer and one for the rest; bytes of all weights. Kept if it is there."""
    done = directory / "bytes.json"
    if done.exists():
        return json.loads(done.read_text())
    directory.mkdir(parents=True, exist_ok=True)
    files = [shape.outside, *(shape.layer(layer) for layer in range(shape.layers))]
    generator = torch.Generator().manual_seed(seed)
    # Every matrix is a stretch of one long series that starts elsewhere: normal numbers are slow to draw.
    most = max(torch.Size(size).numel() for names in files for size in names.values())
    pool = torch.randn(min(POOL, 2 * most + 1), generator=generator).to(dtype)

    def draw(size: tuple[int, ...]) -> torch.Tensor:
        count = torch.Size(size).numel()
        if len(size) == 1:
            return torch.ones(size, dtype=dtype)
        start = int(torch.randint(len(pool), (1,), generator=generator))
        repeated = torch.cat([pool[start:], *[pool] * (1 + count // len(pool))])[:count]
        return repeated.view(size) * (size[-1] ** -0.5)

    shard_of, total = {}, 0
    for number, names in enumerate(files, start=1):
        file = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        tensors = {name: draw(size) for name, size in names.items()}
        save_file(tensors, directory / file, metadata={"format": "pt"})
        total += sum(tensor.nbytes for tensor in tensors.values())
        shard_of |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": total}, "weight_map": shard_of}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    config = shape.config | {"torch_dtype": str(dtype).removeprefix("torch.")}
    (directory / "config.json").write_text(json.dumps(config))
    done.write_text(json.dumps(total))
    return total

"""One contender, once, in a process of its own: what it took is the last line, as JSON.

Every contender is given the same checkpoint. Of the extraction: 512 random tokens. What each gives is in its docstring,
since few tools give what ours does: compare with that in mind.
"""

import argparse
import json
import resource
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts"))


def _sequences(tokens: int) -> list[list[int]]:
    import torch

    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, 32000, (128,), generator=generator).tolist() for _ in range(tokens // 128)]


def extraction_atlas(directory: Path, tokens: int, memory: int | None) -> dict:
    """All experts on every token, and every behavioral statistic."""
    from moe_atlas import probe
    from moe_atlas.budget import MIB, Budget
    from moe_atlas.checkpoints import Checkpoint

    checkpoint = Checkpoint(directory)
    budget = Budget(memory and memory * MIB)
    probe.extract(checkpoint, _sequences(tokens), keep_tokens=False, budget=budget)
    return {"weights_read": checkpoint.bytes_read}


def _transformers(directory: Path, tokens: int, **options) -> dict:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16, **options).eval()
    with torch.no_grad():
        model(torch.tensor(_sequences(tokens)), output_hidden_states=True, output_router_logits=True, use_cache=False)
    return {}


def extraction_transformers_disk(directory: Path, tokens: int, memory: int | None) -> dict:
    """transformers with layers on disk: hidden states and router logits; of the experts only the chosen ones run."""
    with tempfile.TemporaryDirectory(dir=directory.parent) as folder:
        limits = {"cpu": f"{memory or 4000}MiB"}
        return _transformers(directory, tokens, device_map="auto", max_memory=limits, offload_folder=folder)


def extraction_transformers_memory(directory: Path, tokens: int, memory: int | None) -> dict:
    """transformers with the whole model in memory: as above."""
    return _transformers(directory, tokens)


def reading_safetensors(directory: Path, tokens: int, memory: int | None) -> dict:
    """Every tensor copied out of safetensors' memory map, layer file by layer file, and let go."""
    from safetensors import safe_open

    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a mapping
                file.get_tensor(name).clone()
    return {}


def reading_atlas(directory: Path, tokens: int, memory: int | None) -> dict:
    """Every tensor read and checked to be finite by our reader, one file at a time, and let go."""
    from moe_atlas.checkpoints import Checkpoint

    checkpoint = Checkpoint(directory)
    names: dict[str, list[str]] = {}
    for name, file in checkpoint._file_of.items():
        names.setdefault(str(file.path), []).append(name)
    for group in names.values():
        checkpoint.read_all(group)
    return {"weights_read": checkpoint.bytes_read}


CONTENDERS = {
    function.__name__: function
    for function in (
        extraction_atlas,
        extraction_transformers_disk,
        extraction_transformers_memory,
        reading_atlas,
        reading_safetensors,
    )
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("contender", choices=CONTENDERS)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--memory", type=int, help="MiB that it may take, where it can be told")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()

    import torch

    torch.set_num_threads(arguments.threads)
    began = time.perf_counter()
    found = CONTENDERS[arguments.contender](arguments.directory, arguments.tokens, arguments.memory)
    seconds = time.perf_counter() - began
    counters = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    found |= {
        "seconds": seconds,
        "cpu_seconds": time.process_time(),
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "disk_read": int(counters["read_bytes"]),
        "disk_written": int(counters["write_bytes"]),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()

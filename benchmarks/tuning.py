"""Time the fine-tuning of published shapes, with random weights: seconds a step and memory of each arm.

    python -m benchmarks.tuning [--shape bert-large gpt2-xl llama-2-7b] [--arms dense emoe ...] [--device cuda]

A step is a batch of the shape's full-scale settings (config/emoe_paper.yaml, config/emoe_llama.yaml), all texts as long
as these allow, forward, backward and optimizer: the time of 1 + --steps steps less that of one, over --steps, after one
more that does not count. Beside it stands the ratio to the first arm of the same run. Memory is the most that the
device, or without one this process, held.
"""

import argparse
import resource
import time
from dataclasses import replace

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from moe_atlas import devices
from moe_atlas.tuning.arms import ARMS
from moe_atlas.tuning.classifier import LANGUAGE_LORA, LORA, build
from moe_atlas.tuning.data import Examples
from moe_atlas.tuning.fit import Schedule, fit
from moe_atlas.tuning.language import Completions, Questions

# Of each shape: its config, batch, length, examples of a forward pass, converted FFNs, N, k, whether a language model.
SHAPES = {
    "bert-large": (
        {"model_type": "bert", "hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16,
         "intermediate_size": 4096},
        (32, 128, 32), ([22], 64, 16), False,
    ),
    "gpt2-xl": (
        {"model_type": "gpt2", "n_embd": 1600, "n_layer": 48, "n_head": 25},
        (32, 128, 32), ([44], 64, 32), False,
    ),
    "llama-2-7b": (
        {"model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
         "num_attention_heads": 32, "vocab_size": 32000},
        (32, 512, 4), ([28, 30], 64, 16), True,
    ),
}  # fmt: skip


def make_examples(language: bool, count: int, length: int, together: int, vocabulary: int) -> Examples | Completions:
    """Random texts, each `length` tokens long."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, vocabulary, (count, length), generator=generator).tolist()
    if language:
        return Completions(ids, [length // 2] * count, 0, together)
    return Examples(ids, [[0] * length] * count, torch.arange(count) % 2, 0, together)


def memory(device: str) -> float:
    """Most GiB so far: of the device, or of the process."""
    if device != "cpu":
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def make_validation(train: Examples | Completions, language: bool) -> Examples | Questions:
    """Two examples, since what a look at the validation set takes is not what is timed."""
    ids = train.ids[:2]
    return Questions(ids, torch.tensor([0, 1]), [5, 6, 7, 8], ["", ""], 0, 2) if language else train.head(2)


def measure(shape: str, name: str, steps: int, device: str, quick: bool) -> tuple[float, float]:
    """(seconds a step, GiB) of one arm."""
    settings, (batch, length, together), (layers, experts, k), language = SHAPES[shape]
    settings = dict(settings)
    config = AutoConfig.for_model(settings.pop("model_type"), pad_token_id=0, **settings)
    if quick:
        sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 100}
        sizes |= {"intermediate_size": 256} if config.model_type != "gpt2" else {}
        config = AutoConfig.for_model(config.model_type, pad_token_id=0, **sizes)
        batch, length, layers, experts, k = 4, 16, [1], 8, 2
    arm, cuda = ARMS[name], device != "cpu"
    kept = torch.bfloat16 if language and arm.lora else torch.float32
    torch.manual_seed(0)
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    make = AutoModelForCausalLM if language else AutoModelForSequenceClassification
    with torch.device(device):
        model = make.from_config(config, dtype=kept)
    train = make_examples(language, batch, length, together, config.vocab_size)
    built = build(model, arm, experts, k, layers, train, 0, LANGUAGE_LORA if language else LORA).to(device)
    built = replace(built, precision="bfloat16" if language else "float32")
    validation, took = make_validation(train, language), []
    for count in (1, 1, 1 + steps):
        began = time.perf_counter()
        fit(built, train, validation, "accuracy", 1e-5, Schedule(count, batch, count + 1, 1), 0)
        if cuda:
            torch.cuda.synchronize()
        took.append(time.perf_counter() - began)
    return (took[2] - took[1]) / steps, memory(device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=["lora", "lora-emoe", "dense", "emoe"])
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--device", default=devices.default(), help="cpu or cuda")
    parser.add_argument("--quick", action="store_true", help="transformers' smallest defaults: whether everything runs")
    arguments = parser.parse_args()
    print(f"{'shape':12} {'arm':20} {'s a step':>9} {'ratio':>6} {'GiB':>6}")
    for shape in arguments.shape:
        first = None
        for arm in arguments.arms:
            try:
                seconds, peak = measure(shape, arm, arguments.steps, arguments.device, arguments.quick)
            except torch.OutOfMemoryError as error:
                print(f"{shape:12} {arm:20} {str(error).splitlines()[0][:80]}", flush=True)
                continue
            first = first or seconds
            print(f"{shape:12} {arm:20} {seconds:9.3f} {seconds / first:6.2f} {peak:6.1f}", flush=True)


if __name__ == "__main__":
    main()

"""Contenders that send tokens through a model, and that read a checkpoint.

They do not do the same work. Ours runs every expert on every token and gives all behavioral statistics; the others run
the chosen experts and keep router logits, hidden states and those experts' outputs, from which statistics of chosen
experts could be made. Each gives, to be compared with ours, how many tokens chose each expert and the largest absolute
number in an expert's outputs for them, (layers, experts) both.
"""

import json
import os
import tempfile
from pathlib import Path

import torch
from torch.nn import functional

from benchmarks.measured import MIB, Run, available_memory

Values = dict[str, torch.Tensor]


def extraction_atlas(run: Run) -> Values:
    """All experts on every token, and every behavioral statistic, within run.memory."""
    from moe_atlas import probe
    from moe_atlas.budget import Budget
    from moe_atlas.checkpoints import Checkpoint

    with run.timed():
        checkpoint = Checkpoint(run.directory)
        budget = Budget(run.memory and run.memory * MIB)
        sites, found = probe.extract(checkpoint, run.sequences(), keep_tokens=False, device=run.device, budget=budget)
    run.found["weights_read"] = checkpoint.bytes_read
    names = [f"layer_{site['layer']}.{site['site']}" for site in sites]
    return {
        "choices": torch.stack([found[f"{name}.load_tokens"].sum(1) for name in names]),
        "largest": torch.stack([found[f"{name}.importance_output_max"] for name in names]),
    }


class _Kept:
    """Hooks on a transformers model that keep what its routers and its chosen experts give, on the CPU."""

    def __init__(self, model: torch.nn.Module):
        from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

        self.logits, self.outputs = [], []
        # Experts are one module of stacked matrices: a hook sees their sum alone, an experts function each of them.
        ALL_EXPERTS_FUNCTIONS.register("kept", self._experts)
        model.set_experts_implementation("kept")
        for module in model.modules():
            if type(module).__name__.endswith("TopKRouter"):
                module.register_forward_hook(lambda _module, _args, output: self.logits.append(output[0].cpu()))

    def _experts(self, module, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        total, of_layer = torch.zeros_like(hidden), {}
        for expert in ids.unique().tolist():
            tokens, rank = (ids == expert).nonzero(as_tuple=True)
            act, up = functional.linear(hidden[tokens], module.gate_up_proj[expert]).chunk(2, dim=-1)
            output = functional.linear(module.act_fn(act) * up, module.down_proj[expert])
            of_layer[expert] = output.cpu()
            total.index_add_(0, tokens, (output * weights[tokens, rank, None]).to(total.dtype))
        self.outputs.append(of_layer)
        return total

    def values(self, experts: int) -> Values:
        counts, largest = (torch.zeros(len(self.outputs), experts) for _ in range(2))
        for layer, outputs in enumerate(self.outputs):
            for expert, output in outputs.items():
                counts[layer, expert], largest[layer, expert] = len(output), output.abs().max().float()
        return {"choices": counts.long(), "largest": largest}


def _transformers(run: Run, **options) -> Values:
    from transformers import AutoModelForCausalLM

    with run.timed(), torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(run.directory, dtype="auto", **options).eval()
        kept = _Kept(model)
        ids = torch.tensor(run.sequences()).to("cpu" if run.device == "cpu" else model.device)
        states = [state.cpu() for state in model(ids, output_hidden_states=True, use_cache=False).hidden_states]
    assert len(states) == run.shape.layers + 1 and len(kept.logits) == run.shape.layers
    return kept.values(run.shape.experts)


def extraction_transformers_disk(run: Run) -> Values:
    """transformers with what does not fit into run.memory (4,000 MiB) on disk, its load included."""
    limits = {"cpu": f"{run.memory or 4000}MiB"}
    if run.device == "cuda":
        limits[0] = limits["cpu"]
    with tempfile.TemporaryDirectory(dir=run.directory.parent) as folder:
        return _transformers(run, device_map="auto", max_memory=limits, offload_folder=folder)


def extraction_transformers_memory(run: Run) -> Values:
    """transformers with the whole model in memory, its load included; peaks at up to twice the checkpoint's bytes."""
    if run.device == "cpu":
        wanted = 2 * sum(path.stat().st_size for path in run.directory.glob("*.safetensors"))
        free = available_memory()
        if wanted > free:
            raise SystemExit(f"not run: it may take {wanted // MIB:,} MiB, and {free // MIB:,} are free.")
    return _transformers(run, **({"device_map": "cuda"} if run.device == "cuda" else {}))


def extraction_airllm(run: Run) -> Values:
    """AirLLM, its splitting of the checkpoint included: hidden states alone, since it takes no hooks on experts.

    Not installed by `make bench`: airllm 4.0.0, the newest in November 2026, fails with transformers 5 on Mixtral and
    OLMoE, since it looks for a module of each expert ('MixtralDecoderLayer' object has no attribute
    'block_sparse_moe', 'OlmoeExperts' object has no attribute '0').
    """
    try:
        from airllm import AutoModel
    except ImportError:
        raise SystemExit("airllm is not installed; why, is said in docs/benchmarks.md.") from None
    from tokenizers import Tokenizer, models

    with tempfile.TemporaryDirectory(dir=run.directory.parent) as folder:
        source = Path(folder, "checkpoint")
        source.mkdir()
        for path in run.directory.iterdir():
            os.symlink(path.resolve(), source / path.name)
        # It wants a tokenizer beside the weights; what is in it does not matter here.
        words = {str(token): token for token in range(run.shape.config["vocab_size"])}
        Tokenizer(models.WordLevel(words, unk_token="0")).save(str(source / "tokenizer.json"))
        (source / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
        with run.timed(), torch.no_grad():
            device = "cuda:0" if run.device == "cuda" else "cpu"
            model = AutoModel.from_pretrained(str(source), device=device, layer_shards_saving_path=folder)
            model(torch.tensor(run.sequences()), use_cache=False, return_dict=True, output_hidden_states=True)
    return {}


def reading_atlas(run: Run) -> Values:
    """Every tensor read and checked to be finite by our reader, one layer at a time, and let go."""
    from moe_atlas.checkpoints import Checkpoint

    largest = {}
    with run.timed():
        checkpoint = Checkpoint(run.directory)
        for names in _files(run):
            largest |= {name: tensor[-1].max() for name, tensor in checkpoint.read_all(names).items()}
    run.found["weights_read"] = checkpoint.bytes_read
    return largest


def reading_safetensors(run: Run) -> Values:
    """Every tensor copied out of safetensors' memory map, one layer at a time, and let go."""
    from safetensors import safe_open

    largest = {}
    with run.timed():
        for path in sorted(run.directory.glob("*.safetensors")):
            with safe_open(path, framework="pt") as file:
                tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 - no mapping
                largest |= {name: tensor[-1].max() for name, tensor in tensors.items()}
    return largest


def _files(run: Run) -> list[list[str]]:
    return [list(run.shape.outside), *(list(run.shape.layer(layer)) for layer in range(run.shape.layers))]

"""Time training steps of MoA beside multi-head attention, at the paper's shapes or small ones, with random tokens.

    python -m benchmarks.moa [--plan wmt mlm small] [--steps 10] [--device cuda]

wmt: encoder-decoders of the paper's base and big models, 8,192 target tokens a batch; mlm: its masked language models,
8,192 tokens; small: causal models of the size of config/moa.yaml. A step is forward, backward and AdamW; on a GPU
products are bfloat16. Models take turns, the median of --steps after two that do not count. Beside each time stands its
ratio to multi-head attention's, and the same ratio of MACs by formula: what is above it is the price of routing.
`gather` evaluates all experts and takes the chosen, `sparse` sorts tokens by expert (architectures/moa.py).
"""

import argparse
import statistics
import time

import torch

from moe_atlas import devices
from moe_atlas.architectures.moa import MoAAttention
from moe_atlas.architectures.moa_config import MoAConfig
from moe_atlas.architectures.moa_costs import macs, parameters
from moe_atlas.architectures.moa_models import MoAForCausalLM, MoAForMaskedLM, MoAForTranslation

MODELS = {"causal": MoAForCausalLM, "masked": MoAForMaskedLM, "translation": MoAForTranslation}
WMT = {"objective": "translation", "num_encoder_layers": 6, "vocab_size": 36500}
MLM = {"objective": "masked", "num_hidden_layers": 8, "vocab_size": 50272, "attention_bias": True}
SMALL = {
    "objective": "causal", "num_hidden_layers": 2, "vocab_size": 1024, "hidden_size": 64, "intermediate_size": 128,
    "norm": "pre", "positions": "rotary",
}  # fmt: skip


def moa(chosen: int, experts: int, width: int) -> dict:
    """Settings of the model that the paper calls kK EE DD."""
    return {"num_experts_per_tok": chosen, "num_attention_experts": experts, "head_dim": width}


def mha(heads: int, width: int) -> dict:
    """Settings of multi-head attention."""
    return {"attention": "mha", "num_attention_heads": heads, "head_dim": width}


# Of each plan: what its models share, sequences of a batch, their length, and the models, multi-head attention first.
PLANS = {
    "wmt": (WMT, 256, 32, {"mha": mha(8, 64), "8K8E128D": moa(8, 8, 128), "16K32E256D": moa(16, 32, 256)}),
    "mlm": (MLM, 64, 128, {"mha": mha(8, 64)} | {f"8K{e}E256D": moa(8, e, 256) for e in (8, 16, 32, 64)}),
    "small": (SMALL, 24, 64, {"mha": mha(4, 16)} | {f"2K{e}E16D": moa(2, e, 16) for e in (2, 8, 16, 32)}),
}


class Contender:
    """One model with its optimizer and a batch."""

    def __init__(self, config: MoAConfig, sequences: int, length: int, device: str, dispatch: str):
        torch.manual_seed(0)
        self.model = MODELS[config.objective](config).to(device).train()
        for module in self.model.modules():
            if isinstance(module, MoAAttention):
                module.dispatch = dispatch
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)
        self.ids = torch.randint(5, config.vocab_size, (sequences, length), device=device)
        self.device = device

    def step(self) -> float:
        """Seconds of one step."""
        began = time.perf_counter()
        with torch.autocast("cuda", torch.bfloat16, enabled=self.device != "cpu"):
            loss = self.model(input_ids=self.ids, labels=self.ids).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.device != "cpu":
            torch.cuda.synchronize()
        return time.perf_counter() - began


def measure(plan: str, steps: int, device: str) -> None:
    """Print a line a model and dispatch."""
    shared, sequences, length, models = PLANS[plan]
    contenders, costs = {}, {}
    for name, own in models.items():
        config = MoAConfig(**shared, **own)
        source = length if config.objective == "translation" else 0
        costs[name] = parameters(config).total / 1e6, macs(config, length, source).total
        for dispatch in ("gather", "sparse") if config.attention == "moa" else ("auto",):
            contenders[name, dispatch] = Contender(config, sequences, length, device, dispatch)
    for _ in range(2):
        for contender in contenders.values():
            contender.step()
    took = {key: [] for key in contenders}
    for _ in range(steps):
        for key, contender in contenders.items():
            took[key].append(contender.step())
    print(f"{plan}: {sequences} sequences of {length} tokens, {device}")
    print(f"{'model':12} {'dispatch':8} {'parameters, M':>14} {'ms a step':>10} {'ratio':>6} {'of MACs':>8}")
    base = statistics.median(next(iter(took.values())))
    for (name, dispatch), times in took.items():
        seconds, (millions, products) = statistics.median(times), costs[name]
        share = products / costs[next(iter(costs))][1]
        print(f"{name:12} {dispatch:8} {millions:14.2f} {1000 * seconds:10.1f} {seconds / base:6.2f} {share:8.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--plan", nargs="+", choices=PLANS, default=["small"])
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--device", default=devices.default(), help="cpu or cuda")
    arguments = parser.parse_args()
    for plan in arguments.plan:
        measure(plan, arguments.steps, arguments.device)


if __name__ == "__main__":
    main()

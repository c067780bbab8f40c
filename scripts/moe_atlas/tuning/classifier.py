"""A pre-trained model, with a new head or its own, turned into what an arm says."""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from moe_atlas.emoe.copies import CopiedExperts, copy_experts
from moe_atlas.emoe.ffns import DenseFFN, dense_ffns
from moe_atlas.emoe.mask import ExpertMask
from moe_atlas.emoe.router import CosineRouter
from moe_atlas.emoe.split import split_neurons
from moe_atlas.errors import AtlasError
from moe_atlas.tuning.arms import Arm
from moe_atlas.tuning.data import Examples
from moe_atlas.tuning.language import Completions, Questions

# LoRA of the paper's runs on GLUE and on instructions; PEFT knows which matrices of the attention a model type adapts.
LORA = {"task_type": "SEQ_CLS", "r": 8, "lora_alpha": 16, "lora_dropout": 0.1}
LANGUAGE_LORA = {"task_type": "CAUSAL_LM", "r": 8, "lora_alpha": 16, "lora_dropout": 0.05}
_EXTRAS = 1_000_003  # added to the seed for what only some arms draw, so that all arms have the same head and order


@dataclass
class Classifier:
    """A model to be tuned, with the experts of an arm in it: masks in force, or copies."""

    model: nn.Module
    arm: Arm
    masks: list[ExpertMask] = field(default_factory=list)
    copies: list[CopiedExperts] = field(default_factory=list)
    layers: list[int] = field(default_factory=list)
    precision: str = "float32"  # of matrix products

    @property
    def routed(self) -> list[ExpertMask | CopiedExperts]:
        """What chooses experts, one a layer."""
        return [*self.masks, *self.copies]

    def to(self, device: torch.device | str) -> "Classifier":
        """Move the model, and the routers of its masks, which are no part of it."""
        self.model.to(device)
        for mask in self.masks:
            if isinstance(mask.score, nn.Module):
                mask.score.to(device)
        return self

    def parameters(self) -> dict[str, nn.Parameter]:
        """What is tuned, by name: of the model and of the routers of its masks."""
        found = {name: value for name, value in self.model.named_parameters() if value.requires_grad}
        for number, mask in enumerate(self.masks):
            if isinstance(mask.score, nn.Module):
                found |= {f"router.{number}.{name}": value for name, value in mask.score.named_parameters()}
        return found


def load_classifier(folder: Path, classes: int, padding: int, seed: int) -> nn.Module:
    """The pre-trained model in `folder` with a new head of so many classes (0: one number, a regression), float32."""
    torch.manual_seed(seed)
    model = AutoModelForSequenceClassification.from_pretrained(
        folder, num_labels=classes or 1, dtype=torch.float32, local_files_only=True
    )
    model.config.pad_token_id = padding
    return model


def load_language_model(folder: Path, arm: Arm, precision: str) -> nn.Module:
    """The pre-trained causal language model in `folder`, as it is.

    Under LoRA its weights are of the given precision. Weights that are tuned are float32 in any case: a step of 2e-5 is
    smaller than what bfloat16 can add to most of them.
    """
    kept = getattr(torch, precision) if arm.lora else torch.float32
    return AutoModelForCausalLM.from_pretrained(folder, dtype=kept, local_files_only=True)


def build(
    model: nn.Module,
    arm: Arm,
    experts: int,
    k: int,
    layers: list[int],
    examples: Examples | Completions,
    seed: int,
    lora: dict = LORA,
) -> Classifier:
    """Make of a model with its head what the arm says, in place: `layers` are the FFNs with experts, from 0.

    `examples` are those of training; the static mask counts on them which experts the untuned model uses most.
    """
    torch.manual_seed(seed + _EXTRAS)
    ffns = _at(dense_ffns(model), layers)
    head = {id(value) for name, value in model.named_parameters() if name.split(".")[0] in ("score", "classifier")}
    if arm.noise:
        _add_noise([value for value in model.parameters() if id(value) not in head], arm.noise)
    labels = [split_neurons(ffn.keys, experts, rule=arm.split, seed=seed) for ffn in ffns if arm.form == "mask"]
    if arm.lora:
        from peft import LoraConfig, get_peft_model  # seconds to import, which most arms need not wait

        model = get_peft_model(model, LoraConfig(**lora))
        ffns = _at(dense_ffns(model), layers)
    built = Classifier(model, arm, layers=list(layers))
    if arm.form == "copies":
        built.copies = [copy_experts(model, ffn, experts, k) for ffn in ffns]
    elif arm.form == "mask":
        built.masks = [_mask(arm, ffn, part, k) for ffn, part in zip(ffns, labels, strict=True)]
        if arm.choose == "static":
            _fix_to_most_used(built, examples)
    for mask in built.masks:
        mask.install()
    if arm.dropout:
        for ffn in ffns:
            ffn.first.register_forward_hook(_Dropout(arm.dropout))
    return built


def masks_of(model: nn.Module, experts: int, k: int, layers: list[int], seed: int) -> list[ExpertMask]:
    """Masks of the clustered split of the weights as they are now, not yet in force."""
    ffns = _at(dense_ffns(model), layers)
    return [ExpertMask(ffn, split_neurons(ffn.keys, experts, seed=seed), k) for ffn in ffns]


def _at(ffns: list[DenseFFN], layers: list[int]) -> list[DenseFFN]:
    if not layers or not set(layers) <= set(range(len(ffns))):
        raise AtlasError(f"The model has FFNs 0 to {len(ffns) - 1}, but layers are {layers}; name some of these.")
    return [ffns[layer] for layer in layers]


def _mask(arm: Arm, ffn: DenseFFN, labels: np.ndarray, k: int) -> ExpertMask:
    score: str | nn.Module = "gate"
    if arm.gate == "cosine":
        score = CosineRouter(ffn.keys.shape[1], int(labels.max()) + 1).to(ffn.keys.device)
    return ExpertMask(
        ffn, labels, k, score=score, choose="bottom" if arm.choose == "bottom" else "top", weights=arm.weights
    )


@torch.no_grad()
def _fix_to_most_used(built: Classifier, examples: Examples | Completions) -> None:
    """Replace each mask by one with the k experts that it chooses most often over the examples; of a tie the first."""
    for mask in built.masks:
        mask.install()
    counts = expert_counts(built, examples)
    for number, mask in enumerate(built.masks):
        mask.remove()
        most = np.argsort(-counts[number], kind="stable")[: mask.k]
        built.masks[number] = ExpertMask(mask.ffn, mask.labels, mask.k, choose=sorted(most.tolist()))


@torch.no_grad()
def expert_counts(built: Classifier, examples: Examples | Completions) -> np.ndarray:
    """How many tokens choose each expert of each converted layer, (layers, N) int64; padding does not count."""
    total = np.zeros((len(built.routed), 0), dtype=np.int64)
    for _, chosen in choices(built, examples):
        part = np.stack([layer.sum(0) for layer in chosen])
        total = part if not total.size else total + part
    return total


@torch.no_grad()
def choices(built: Classifier, examples: Examples | Completions | Questions):
    """For each batch (answers, chosen): chosen (tokens, N) bool of each converted layer, without padding."""
    training = built.model.training
    built.model.eval()
    device = next(built.model.parameters()).device
    for start in range(0, len(examples), examples.together):
        inputs = examples.batch(range(start, min(start + examples.together, len(examples))))
        real = inputs["attention_mask"].bool()
        with products_in(built.precision, device):
            logits = examples.answers(built.model, inputs, device)
        yield logits.float().cpu(), [of_tokens(site.chosen.cpu(), real).numpy() for site in built.routed]
    built.model.train(training)


def of_tokens(values: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """Rows of values (batch, length, N), or (batch x length, N) as OPT's FFNs have it, where real (batch, length)."""
    return values.reshape(*real.shape, -1)[real]


def products_in(precision: str, device: torch.device) -> torch.autocast:
    """A context in which matrix products are of this precision, whatever that of the weights."""
    return torch.autocast(device.type, getattr(torch, precision), enabled=precision != "float32")


class _Dropout:
    """Dropout of what a module gives, while it is trained."""

    def __init__(self, rate: float):
        self.rate = rate

    def __call__(self, module: nn.Module, _inputs: tuple, output: torch.Tensor) -> torch.Tensor:
        return functional.dropout(output, self.rate, module.training)


@torch.no_grad()
def _add_noise(parameters: list[nn.Parameter], width: float) -> None:
    """Add U(-1/2, 1/2) x width x standard deviation to every number (NoisyTune, Wu et al. 2022, arXiv 2202.12024)."""
    for parameter in parameters:
        if parameter.numel() > 1:
            parameter.add_((torch.rand_like(parameter) - 0.5) * width * parameter.std())

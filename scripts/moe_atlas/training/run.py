"""From a recipe to a checkpoint: what train_demo_checkpoint.py does."""

import dataclasses
import importlib.metadata
import math
import platform
from pathlib import Path

import torch
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, PreTrainedModel

from moe_atlas import architectures
from moe_atlas.errors import AtlasError
from moe_atlas.files import sha256, write_json
from moe_atlas.log import say
from moe_atlas.training.data import Batches, encode, texts_of, unigram, unigram_loss
from moe_atlas.training.loop import THREADS, held_out_loss, make_deterministic, next_token_loss, train
from moe_atlas.training.masked import MaskedLoss, held_out_masked_loss
from moe_atlas.training.recipes import Encoder, Recipe
from moe_atlas.training.save import save_checkpoint
from moe_atlas.training.tokenizer import demo_tokenizer
from moe_atlas.training.upcycle import upcycle

BASELINE = ("prose", "code")  # every model is held against the unigram model of the same texts
_VERSIONS = ("torch", "transformers", "tokenizers")


def build_model(recipe: Recipe, start: Path | None = None) -> PreTrainedModel:
    """The model of a recipe before its first step: random, or with the weights of the checkpoint `start`.

    The checkpoint is of the same class (trained on) or the dense twin of a Mixtral (upcycled). An encoder starts from
    nothing.
    """
    architectures.register()
    settings = dict(recipe.config)
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    if isinstance(recipe, Encoder):
        return AutoModelForMaskedLM.from_config(config, dtype=torch.float32)
    # Of the experts implementations, the loop over experts is the one that is fast on a CPU at every width.
    options = {"dtype": torch.float32, "experts_implementation": "eager"}
    if start is None:
        return AutoModelForCausalLM.from_config(config, **options)
    other = AutoModelForCausalLM.from_pretrained(start, **options)
    if other.config.model_type == config.model_type:
        return other
    model = AutoModelForCausalLM.from_config(config, **options)
    upcycle(other, model)
    return model


def train_recipe(recipe: Recipe, output: Path, steps_factor: float, seed: int, start_from: Path | None = None) -> dict:
    """Train the model of `recipe`, write its checkpoint beside `output` (training.json), return what that file says.

    `start_from` is the directory of the recipe that this one starts from. Raises AtlasError when it is
    missing or was made by another tokenizer, and when the model has not learned enough.
    """
    steps = max(2, round(recipe.steps * steps_factor))
    make_deterministic(seed)
    tokenizer = demo_tokenizer(recipe.tokenizer_size, masks=isinstance(recipe, Encoder))
    start = _start_folder(recipe, start_from, tokenizer)
    model = build_model(recipe, start)
    folder = output.parent

    domains = list(dict.fromkeys([*BASELINE, *recipe.mix]))
    trained = {domain: encode(tokenizer, texts_of(domain, training=True)) for domain in domains}
    batches = Batches(trained, recipe.mix, recipe.batch_size, recipe.sequence_length, seed)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    say(f"{recipe.name}: {parameters} parameters, {steps} steps of {recipe.batch_size} sequences")

    output.unlink(missing_ok=True)  # while weights change, nothing vouches for them
    at_half = None
    if recipe.keep_half:

        def at_half() -> None:
            save_checkpoint(model, tokenizer, folder / "half", recipe.shard_size)

    objective = MaskedLoss(recipe.masked, seed) if isinstance(recipe, Encoder) else next_token_loss
    losses = train(model, batches, steps, recipe.learning_rate, recipe.balance, at_half, objective)

    perplexity, baseline, tokens = _evaluate(model, recipe, tokenizer, trained, domains)
    _check(recipe, perplexity["overall"], baseline["overall"], steps_factor)
    names = save_checkpoint(model, tokenizer, folder, recipe.shard_size)
    record = {
        "recipe": recipe.name,
        "seed": seed,
        "steps_factor": steps_factor,
        "steps": steps,
        "tokens": steps * recipe.batch_size * recipe.sequence_length,
        "parameters": parameters,
        "threads": THREADS,
        "perplexity": perplexity,
        "unigram_perplexity": baseline,
        "held_out_tokens": tokens,
        "loss": {"first": losses[0], "last": losses[-1]},
        "settings": {key: value for key, value in dataclasses.asdict(recipe).items() if key != "name"},
        "versions": {"python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in _VERSIONS},
        "files": {name: sha256(folder / name) for name in names},
    }
    write_json(output, record)
    return record


def _start_folder(recipe: Recipe, start_from: Path | None, tokenizer: Tokenizer) -> Path | None:
    """The folder of the checkpoint that this recipe begins with, checked."""
    if recipe.start_from is None:
        if start_from is not None:
            raise AtlasError(f"{recipe.name} starts from nothing, but --start-from is {start_from}; leave it out.")
        return None
    other = recipe.start_from
    if start_from is None:
        raise AtlasError(f"{recipe.name} starts from {other.recipe}; give its directory with --start-from.")
    folder = other.folder(start_from)
    file = folder / "tokenizer.json"
    if not file.is_file() or not (folder / "config.json").is_file():
        raise AtlasError(
            f"{folder}: there is no checkpoint of {other.recipe} ({other.state}); train that recipe first."
        )
    if Tokenizer.from_file(str(file)).to_str() != tokenizer.to_str():
        raise AtlasError(f"{file}: {other.recipe} was trained with another tokenizer; train it again with this Python.")
    return folder


def _evaluate(
    model, recipe: Recipe, tokenizer: Tokenizer, trained: dict, domains: list[str]
) -> tuple[dict, dict, dict]:
    """Held-out perplexity of the model and of the unigram model, and tokens, by domain and over prose and code.

    Of an encoder all three are of the masked tokens.
    """
    probabilities = unigram({domain: trained[domain] for domain in BASELINE}, recipe.tokenizer_size)
    sums = {}
    for domain in domains:
        encoded = encode(tokenizer, texts_of(domain, training=False))
        if isinstance(recipe, Encoder):
            sums[domain] = held_out_masked_loss(model, encoded, recipe.sequence_length, probabilities)
        else:
            loss, tokens = held_out_loss(model, encoded, recipe.sequence_length)
            sums[domain] = (loss, unigram_loss(probabilities, encoded)[0], tokens)
    sums["overall"] = tuple(sum(column) for column in zip(*(sums[domain] for domain in BASELINE), strict=True))
    perplexity = {name: math.exp(loss / tokens) for name, (loss, _, tokens) in sums.items()}
    baseline = {name: math.exp(loss / tokens) for name, (_, loss, tokens) in sums.items()}
    for name in sums:
        say(f"held-out {name}: perplexity {perplexity[name]:.1f}, unigram model {baseline[name]:.1f}")
    return perplexity, baseline, {name: tokens for name, (_, _, tokens) in sums.items()}


def _check(recipe: Recipe, perplexity: float, baseline: float, steps_factor: float) -> None:
    """A demo model must have learned more than how often each token comes; a shortened run, more than guessing."""
    bound = 0.7 * baseline if steps_factor >= 1 else recipe.tokenizer_size
    if not perplexity < bound:
        raise AtlasError(
            f"{recipe.name}: held-out perplexity {perplexity:.1f} is not below {bound:.1f} "
            f"(unigram model: {baseline:.1f}); give it more steps or another learning rate in recipes.yaml."
        )

"""Recipes of the demo models: recipes.yaml as frozen dataclasses."""

from dataclasses import dataclass
from pathlib import Path

import yaml

from moe_atlas.errors import AtlasError

RECIPES_FILE = Path(__file__).with_name("recipes.yaml")
TEXTS = ("prose", "code", "questions")


@dataclass(frozen=True)
class Start:
    """The checkpoint that a recipe begins with: another recipe, after half of its steps or all of them."""

    recipe: str
    state: str  # half or final

    def folder(self, directory: Path) -> Path:
        """Where that state lies, given the directory of the other recipe."""
        return directory / "half" if self.state == "half" else directory


@dataclass(frozen=True)
class Recipe:
    """One demo model. The fields are described at the top of recipes.yaml."""

    name: str
    config: dict
    steps: int
    learning_rate: float
    mix: dict[str, float]
    tokenizer_size: int
    sequence_length: int
    batch_size: int
    start_from: Start | None = None
    balance: float = 0.0
    shard_size: int = 0
    keep_half: bool = False  # another recipe starts from the half-trained state

    @property
    def model_type(self) -> str:
        return self.config["model_type"]


@dataclass(frozen=True, kw_only=True)
class Encoder(Recipe):
    """An encoder that learns to fill in masked tokens: `masked` is the share of them in training."""

    masked: float


def load(path: Path = RECIPES_FILE) -> dict[str, Recipe]:
    """Read the recipes of causal models by name. Raises AtlasError for a start or a mix that cannot be."""
    text = yaml.safe_load(path.read_text(encoding="utf-8"))
    shared = dict(text["shared"])
    shared_config = shared.pop("config")
    starts = {name: Start(**fields["start_from"]) for name, fields in text["recipes"].items() if "start_from" in fields}
    halves = {start.recipe for start in starts.values() if start.state == "half"}
    recipes = {}
    for name, fields in text["recipes"].items():
        own = {**shared, **fields, "config": {**shared_config, **fields["config"]}, "start_from": starts.get(name)}
        recipes[name] = Recipe(name=name, keep_half=name in halves, **own)
    for recipe in recipes.values():
        _check(recipe, recipes, path)
    return recipes


def load_encoders(path: Path = RECIPES_FILE) -> dict[str, Encoder]:
    """Read the recipes of encoders by name. Raises AtlasError for a mix or a share of masks that cannot be.

    They are no rows of an atlas, which is of causal models, and so no part of load().
    """
    text = yaml.safe_load(path.read_text(encoding="utf-8"))
    encoders = {name: Encoder(name=name, **fields) for name, fields in text["encoders"].items()}
    for name, encoder in encoders.items():
        if name in text["recipes"]:
            raise AtlasError(f"{path.name}, {name}: there is a recipe of this name too; give the encoder another one.")
        if not 0 < encoder.masked < 1:
            raise AtlasError(f"{path.name}, {name}: masked is a share of the tokens, between 0 and 1.")
        _check(encoder, {}, path)
    return encoders


def load_all() -> dict[str, Recipe]:
    """The recipes of causal models and of encoders, by name."""
    return load() | load_encoders()


def get(name: str) -> Recipe:
    """One recipe by name; an unknown name is an AtlasError that lists the known ones."""
    recipes = load_all()
    if name not in recipes:
        raise AtlasError(f"recipe {name!r} is not in {RECIPES_FILE.name}; choose one of {', '.join(recipes)}.")
    return recipes[name]


def _check(recipe: Recipe, recipes: dict[str, Recipe], path: Path) -> None:
    where = f"{path.name}, {recipe.name}"
    start = recipe.start_from
    if start and (start.recipe not in recipes or start.state not in ("half", "final")):
        raise AtlasError(
            f"{where}: start_from {start.recipe} {start.state} does not exist; name a recipe, half or final."
        )
    if set(recipe.mix) - set(TEXTS) or abs(sum(recipe.mix.values()) - 1) > 1e-9:
        raise AtlasError(f"{where}: the mix must share 1 among {', '.join(TEXTS)}, not {recipe.mix}.")
    if recipe.config["vocab_size"] != recipe.tokenizer_size:
        raise AtlasError(f"{where}: vocab_size and tokenizer_size differ; set both to the same number.")

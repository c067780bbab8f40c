"""From a task of the settings to its objective."""

from collections.abc import Callable
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers

from moe_atlas.errors import AtlasError
from moe_atlas.moa import prepared, translation
from moe_atlas.moa.objectives import Causal, Masked, Objective
from moe_atlas.moa.pairs import Pairs, Search, Translation
from moe_atlas.moa.ragged import Ragged
from moe_atlas.moa.settings import Task
from moe_atlas.moa.texts import demo_texts
from moe_atlas.training.tokenizer import BOS, EOS, PAD, UNK


def demo_translation(task: Task) -> Translation:
    """The translation task that is made from the demo prose, with a token for each word, stem and suffix.

    The task's `tokenizer` is the number of English words, `length` the words of the longest sentence, `batch` the
    sentences of a batch, `validation` the most sentences of a look at the validation set.
    """
    made = translation.make_task(translation.settings_of(task))
    tokenizer = word_tokenizer(
        {token for part in made.sentences.values() for pair in part for side in pair for token in side}
    )
    ids = {
        name: Pairs(*(Ragged.of([[tokenizer.token_to_id(token) for token in side] for side in sides])
                      for sides in zip(*pairs, strict=True)))
        for name, pairs in made.sentences.items()
    }  # fmt: skip
    tests = [split for split in translation.SPLITS if split != "validation"]
    return Translation(
        tokenizer,
        ids,
        {test: made.references(test) for test in tests},
        translation.scores,
        {test: made.chance(test) for test in tests},
        task.batch,
        validated=task.validation,
        search=Search(**task.data.get("search", {})),
    )


def word_tokenizer(words: set[str]) -> Tokenizer:
    """A token for each word, behind the special ones; texts are words with blanks between them."""
    names = [UNK, BOS, EOS, PAD, *sorted(words)]
    tokenizer = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token=UNK))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([UNK, BOS, EOS, PAD])
    return tokenizer


def _demo(made: Callable[[Task], Objective]) -> Callable[[Task, Path | None], Objective]:
    return lambda task, _folder: made(task)


# By kind and scheme of the source.
OBJECTIVES: dict[tuple[str, str], Callable[[Task, Path | None], Objective]] = {
    ("causal", "demo"): _demo(lambda task: Causal(task, demo_texts(task))),
    ("masked", "demo"): _demo(lambda task: Masked(task, demo_texts(task))),
    ("translation", "demo"): _demo(demo_translation),
    ("causal", "data"): prepared.CausalStream,
    ("masked", "data"): prepared.MaskedStream,
    ("translation", "data"): prepared.translation,
}


def objective_of(task: Task, folder: Path | None = None) -> Objective:
    """The objective of a task. folder: of a source data:FILE, where `prepare` has written its token ids.

    AtlasError for a source that it cannot be made from.
    """
    scheme, _, _ = task.source.partition(":")
    if (task.kind, scheme) not in OBJECTIVES:
        known = ", ".join(f"{source}:" for name, source in OBJECTIVES if name == task.kind)
        raise AtlasError(
            f"objectives, {task.objective}, source: {task.source} is of no known kind; write one of {known or 'none'}."
        )
    if scheme == "data" and folder is None:
        raise AtlasError(f"objectives, {task.objective}, source: {task.source} needs the folder of its prepared data.")
    return OBJECTIVES[task.kind, scheme](task, folder)

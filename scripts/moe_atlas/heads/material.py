"""The texts that are read, as token ids, and what their tokens are called."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import polars as pl
from transformers import PreTrainedTokenizerBase

from moe_atlas.errors import AtlasError
from moe_atlas.heads import reading
from moe_atlas.heads.reading import Reading
from moe_atlas.tokens import encode, load_tokenizer, token_text


@dataclass(frozen=True)
class Material:
    """Token ids of sequences with the document of each; of a translation task, sources, and targets beside them."""

    sequences: Sequence[Sequence[int]]
    documents: Sequence[int]
    targets: Sequence[Sequence[int]] | None = None

    def reading(
        self, objective: str, names: "Names", most: int, longest: int | None,
        batch_tokens: int = 4096, hidden: int | None = None,
    ) -> Reading:  # fmt: skip
        """At most about `most` tokens as a model of this objective reads them, in windows of `longest` tokens; with
        `hidden`, a seed, some are behind the mask where the model was trained so."""
        if self.targets is not None:
            targets, places = reading.thinned(self.targets, range(len(self.targets)), most)
            sources, documents = ([of[place] for place in places] for of in (self.sequences, self.documents))
            return reading.paired(sources, targets, documents, names.pad)
        parts = reading.thinned(*reading.cut(self.sequences, self.documents, longest), most)
        if objective == "masked" and hidden is not None:
            return reading.masked(*parts, names.mask, hidden, batch_tokens=batch_tokens)
        return reading.causal(*parts, batch_tokens)


class Names:
    """Texts of token ids, and which of them the tokenizer adds."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, directory: str | os.PathLike, objective: str):
        self.tokenizer, self.special = tokenizer, frozenset(tokenizer.all_special_ids)
        self.pad = tokenizer.pad_token_id or 0
        self._known: dict[int, str] = {}
        self._directory, self._objective = directory, objective

    @cached_property
    def mask(self) -> int:
        """The token that hides others."""
        found = self.tokenizer.mask_token_id
        if found is None:
            found = self.tokenizer.get_vocab().get("<mask>")
        if found is None:
            raise AtlasError(f"{self._directory}: its tokenizer has no mask token; save the one it was trained with.")
        return found

    def text(self, token: int) -> str:
        """A token as text, with its leading blank."""
        if token not in self._known:
            self._known[token] = token_text(self.tokenizer, token)
        return self._known[token]


def _ids(tokenizer: PreTrainedTokenizerBase, column: pl.Series) -> list[list[int]]:
    """Token ids of a column of texts, or as it has them, without special tokens."""
    if column.dtype == pl.String:
        return [tokenizer.encode(text, add_special_tokens=False) for text in column.to_list()]
    return column.to_list()


def read_material(directory: str | os.PathLike, file: str | os.PathLike, objective: str) -> tuple[Material, Names]:
    """A corpus parquet as the checkpoint's tokens: column text, or source and target (texts or token
    ids) for a translation model.

    A source ends with the end token, a target begins and ends with its own, as they do in training. AtlasError where
    the columns do not fit the model or hold no two tokens in a row.
    """
    tokenizer, table = load_tokenizer(directory), pl.read_parquet(file)
    names = Names(tokenizer, directory, objective)
    wanted = ("source", "target") if objective == "translation" else ("text",)
    missing = [column for column in wanted if column not in table.columns]
    if missing:
        raise AtlasError(
            f"{file}: there is no column {', '.join(missing)}; name a file that a {objective} model reads."
        )
    documents = table["document"].to_list() if "document" in table.columns else list(range(len(table)))
    if objective == "translation":
        sides = [_ids(tokenizer, table[column]) for column in wanted]
        begin, end = tokenizer.bos_token_id, tokenizer.eos_token_id
        sources = [[*ids, end] for ids in sides[0]]
        material = Material(sources, documents, [[begin, *ids, end] for ids in sides[1]])
    else:
        material = Material(encode(tokenizer, table["text"].to_list()), documents)
    if not any(len(ids) > 1 for ids in material.sequences):
        raise AtlasError(f"{file}: the corpus has no two tokens in a row; correct its row in the corpora sheet.")
    return material, names

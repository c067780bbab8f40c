"""The texts that the mechanism test reads, as tokens with their documents."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import polars as pl

from moe_atlas import tokens
from moe_atlas.errors import AtlasError
from moe_atlas.probe import Batch, make_batches
from moe_atlas.text_index import TextIndex


@dataclass(frozen=True)
class TokenText:
    """Token ids of the sequences of a text, special tokens included, and the document of each sequence."""

    sequences: Sequence[Sequence[int]]
    documents: Sequence[int]

    @cached_property
    def batches(self) -> list[Batch]:
        """Sequences of similar length side by side."""
        return make_batches(self.sequences)

    @cached_property
    def index(self) -> TextIndex:
        """Sequence, position and block of documents of each token."""
        return TextIndex.of(self.sequences, self.documents)


def read_text(directory: str | os.PathLike, file: str | os.PathLike) -> TokenText:
    """A corpus parquet as tokens of the checkpoint in `directory`. AtlasError where it has none."""
    table = pl.read_parquet(file)
    sequences = tokens.encode(tokens.load_tokenizer(directory), table["text"].to_list())
    if not any(len(ids) > 1 for ids in sequences):
        raise AtlasError(f"{file}: the corpus has no two tokens in a row; correct its row in the corpora sheet.")
    documents = table["document"].to_list() if "document" in table.columns else range(len(sequences))
    return TokenText(sequences, list(documents))


def thinned(text: TokenText, most: int) -> TokenText:
    """Every n-th sequence, with the smallest n that leaves about `most` tokens: a bit of every part of the text."""
    step = max(1, -(-sum(map(len, text.sequences)) // most))
    return TokenText(text.sequences[::step], text.documents[::step])

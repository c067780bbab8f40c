"""What a table is, and the columns that most tables share."""

from dataclasses import dataclass

import polars as pl

STRING, INTEGER, NUMBER = pl.String, pl.Int64, pl.Float64

MODEL = ("model", STRING, "row id of config/models.tsv")
CORPUS = ("corpus", STRING, "row id of config/corpora.tsv")
LAYER = ("layer", INTEGER, "decoder layer, from 0")
SITE = ("site", STRING, "ffn or attention: which experts of the layer")
SEQUENCE = ("sequence", INTEGER, "sequence of the corpus, from 0")
POSITION = ("position", INTEGER, "token position in the sequence, from 0, special tokens included")
PAIR = (
    ("a", STRING, "expert label, first of the pair"),
    ("b", STRING, "expert label, second of the pair"),
)


@dataclass(frozen=True)
class Table:
    """One table: where it lives, for which corpora, and its columns (name, dtype, meaning)."""

    path: str  # below results/models/{model}/; of ACROSS below results/
    kinds: tuple[str, ...]  # corpus kinds it exists for; empty: not of a corpus
    columns: tuple[tuple[str, type[pl.DataType], str], ...]

    @property
    def schema(self) -> dict[str, type[pl.DataType]]:
        return {name: dtype for name, dtype, _ in self.columns}

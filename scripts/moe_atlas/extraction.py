"""What the programs that run a model over corpora have in common: texts to tokens before, files after."""

import json
import os
from dataclasses import dataclass
from pathlib import Path

import polars as pl
from safetensors.torch import save_file

from moe_atlas import tokens
from moe_atlas.behavioral.write import write_frames
from moe_atlas.errors import AtlasError
from moe_atlas.files import atomic_path
from moe_atlas.log import say
from moe_atlas.record import Part, Record, Text


@dataclass(frozen=True)
class Corpus:
    """One corpus of a run: its id and kind (short or long) in the sheet, where its texts are, what is to be written."""

    name: str
    kind: str
    file: str
    activations: str
    tokens: str
    intermediate: str


class Reader:
    """The tokenizer of a model, and that of its dense reference, which must give the same tokens.

    Raises AtlasError when a tokenizer cannot be read.
    """

    def __init__(self, directory: str | os.PathLike, reference: str | os.PathLike | None = None):
        self.directory, self.reference = Path(directory), reference and Path(reference)
        self.tokenizer = tokens.load_tokenizer(directory)
        self._other = tokens.load_tokenizer(reference) if reference else None

    def read(self, corpus: Corpus, part: Part | None = None) -> Text:
        """The corpus, or a part of it, as token ids. AtlasError when it has none, or when the reference's differ."""
        table = pl.read_parquet(corpus.file)
        texts = table["text"].to_list()
        sequences = tokens.encode(self.tokenizer, texts)
        if not any(sequences):
            raise AtlasError(f"{corpus.file}: the corpus has no tokens; correct its row in the corpora sheet.")
        if self._other is not None and tokens.encode(self._other, texts) != sequences:
            raise AtlasError(
                f"{self.reference}: its tokenizer gives other tokens than that of {self.directory}; "
                "name another dense_reference or none."
            )
        say(f"{corpus.name}: {sum(map(len, sequences))} tokens in {len(sequences)} sequences")
        documents = table["document"].to_list() if "document" in table.columns else None
        return Text(sequences, corpus.kind == "short", documents, part)

    def write(self, model: str, corpus: Corpus, text: Text, record: Record) -> None:
        """Write tokens.parquet, activations.safetensors and intermediate.safetensors of one corpus.

        Their layout is in results/README.md; the intermediate states of a long corpus are a file without tensors.
        """
        write_frames("tokens", tokens.token_frames(self.tokenizer, text.sequences, model, corpus.name), corpus.tokens)
        atlas = {"model": model, "corpus": corpus.name, "kind": corpus.kind, "layers": record.sites}
        with atomic_path(corpus.activations) as temporary:
            save_file(record.tensors, temporary, metadata={"atlas": json.dumps(atlas)})
        atlas = {"model": model, "corpus": corpus.name, "kind": corpus.kind, "labels": record.state_labels}
        with atomic_path(corpus.intermediate) as temporary:
            save_file(record.states, temporary, metadata={"atlas": json.dumps(atlas)})

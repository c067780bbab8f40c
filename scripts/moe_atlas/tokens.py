"""Texts to token ids with a checkpoint's own tokenizer, special tokens at its default."""

import os
from collections.abc import Iterator, Sequence

import polars as pl
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from moe_atlas.errors import AtlasError, first_line

# How byte-level BPE and SentencePiece write a leading space.
_SPACE_MARKS = ("Ġ", "▁")
_SEQUENCES = 64  # of one frame


def load_tokenizer(directory: str | os.PathLike) -> PreTrainedTokenizerBase:
    """The tokenizer beside a checkpoint; never code that comes with it."""
    try:
        return AutoTokenizer.from_pretrained(directory, trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise AtlasError(
            f"{directory}: the tokenizer cannot be read ({first_line(error)}); fetch tokenizer.json again."
        ) from None


def encode(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """Token ids of each text, as `tokenizer.encode` gives them; nothing is cut or padded."""
    return [tokenizer.encode(text) for text in texts]


def token_frames(
    tokenizer: PreTrainedTokenizerBase, sequences: Sequence[Sequence[int]], model: str, corpus: str
) -> Iterator[pl.DataFrame]:
    """The table `tokens`: one row a token, in order of sequence and position; a frame has some thousand rows."""
    texts = {index: token_text(tokenizer, index) for index in sorted({index for ids in sequences for index in ids})}
    for first in range(0, len(sequences), _SEQUENCES):
        part = sequences[first : first + _SEQUENCES]
        ids = [index for sequence in part for index in sequence]
        frame = pl.DataFrame(
            {
                "sequence": [number for number, sequence in enumerate(part, start=first) for _ in sequence],
                "position": [position for sequence in part for position in range(len(sequence))],
                "token_id": ids,
                "token": [texts[index] for index in ids],
            },
            schema={"sequence": pl.Int64, "position": pl.Int64, "token_id": pl.Int64, "token": pl.String},
        )
        yield frame.with_columns(model=pl.lit(model), corpus=pl.lit(corpus))


def token_text(tokenizer: PreTrainedTokenizerBase, index: int) -> str:
    """One token as text, its leading space kept."""
    text, raw = tokenizer.decode([index]), tokenizer.convert_ids_to_tokens(index)
    return f" {text}" if raw.startswith(_SPACE_MARKS) and not text.startswith(" ") else text

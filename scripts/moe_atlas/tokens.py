"""Texts to token ids with a checkpoint's own tokenizer, special tokens at its default."""

import os

import polars as pl
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from moe_atlas.errors import AtlasError, first_line

# How byte-level BPE and SentencePiece write a leading space.
_SPACE_MARKS = ("Ġ", "▁")


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


def token_table(
    tokenizer: PreTrainedTokenizerBase, sequences: list[list[int]], model: str, corpus: str
) -> pl.DataFrame:
    """The table `tokens`: one row a token, in order of sequence and position."""
    texts = {index: _text(tokenizer, index) for index in sorted({index for ids in sequences for index in ids})}
    ids = [index for sequence in sequences for index in sequence]
    return pl.DataFrame(
        {
            "model": [model] * len(ids),
            "corpus": [corpus] * len(ids),
            "sequence": [number for number, sequence in enumerate(sequences) for _ in sequence],
            "position": [position for sequence in sequences for position in range(len(sequence))],
            "token_id": ids,
            "token": [texts[index] for index in ids],
        }
    )


def _text(tokenizer: PreTrainedTokenizerBase, index: int) -> str:
    """One token as text, its leading space kept."""
    text, raw = tokenizer.decode([index]), tokenizer.convert_ids_to_tokens(index)
    return f" {text}" if raw.startswith(_SPACE_MARKS) and not text.startswith(" ") else text

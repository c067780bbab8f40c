"""From a row of the corpora sheet to a table of sequences."""

import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path

import polars as pl

from moe_atlas.corpora.demo import demo_texts
from moe_atlas.errors import AtlasError

COLUMNS = {"corpus": pl.String, "sequence": pl.Int64, "document": pl.Int64, "text": pl.String}
RULES = ("whole", "lines", "paragraphs")


def prepare(corpus: str, source: str, rule: str = "whole", max_sequences: int = 0, start_at: str = "") -> pl.DataFrame:
    """The sequences of one corpus that needs no network.

    `source` is prompt:TEXT, file:PATH (.txt, .parquet) or demo:NAME. The other arguments as in `sequences`.
    Raises AtlasError for a source that cannot be read and as `sequences`.
    """
    return sequences(corpus, source, _texts(corpus, source), rule, max_sequences, start_at)


def sequences(
    corpus: str,
    source: str,
    texts: Iterable[tuple[int, str]],
    rule: str = "whole",
    max_sequences: int = 0,
    start_at: str = "",
) -> pl.DataFrame:
    """The sequences that the texts (document, text) of a source are cut into.

    `rule` cuts each text: whole (one sequence), lines (its non-blank lines as they stand), paragraphs (its lines
    stripped, without empty lines and headings, which begin with "="; the cut of *A Closer Look into
    Mixture-of-Experts*, which uses ten). `start_at` leaves out all before the first line that is equal to it, white
    space aside. `max_sequences` keeps the first so many, 0 all; texts after them are not asked for.

    Returns columns corpus, sequence (from 0), document (source text or demo document, from 0), text.
    Raises AtlasError for an unknown rule, a negative number and a corpus without sequences.
    """
    if rule not in RULES:
        raise AtlasError(f"corpus {corpus}: rule {rule!r} is unknown; choose one of {', '.join(RULES)}.")
    if max_sequences < 0:
        raise AtlasError(f"corpus {corpus}: max_sequences is {max_sequences}; give 0 for all or a positive number.")
    if start_at:
        texts = _from_line(corpus, source, texts, start_at.strip())
    cuts = ((document, piece) for document, text in texts for piece in cut(text, rule))
    pieces = list(itertools.islice(cuts, max_sequences or None))
    if not pieces:
        raise AtlasError(
            f"corpus {corpus}: {source} gives no text under the rule {rule}; fill the source or change it."
        )
    return pl.DataFrame(
        {
            "corpus": [corpus] * len(pieces),
            "sequence": range(len(pieces)),
            "document": [document for document, _ in pieces],
            "text": [text for _, text in pieces],
        },
        schema=COLUMNS,
    )


def _from_line(corpus: str, source: str, texts: Iterable[tuple[int, str]], start: str) -> Iterator[tuple[int, str]]:
    """The texts from the first line that is `start` on."""
    texts = iter(texts)
    for document, text in texts:
        lines = text.split("\n")
        found = next((number for number, line in enumerate(lines) if line.strip() == start), None)
        if found is not None:
            yield document, "\n".join(lines[found:])
            yield from texts
            return
    raise AtlasError(f"corpus {corpus}: {source} has no line {start!r}; correct start_at in its row.")


def cut(text: str, rule: str) -> list[str]:
    """Cut one source text into sequences by one of RULES; blank pieces are dropped."""
    if rule == "whole":
        return [text] if text.strip() else []
    if rule == "lines":
        return [line for line in text.split("\n") if line.strip()]
    lines = (line.strip() for line in text.split("\n"))
    return [line for line in lines if line and not line.startswith("=")]


def _texts(corpus: str, source: str) -> list[tuple[int, str]]:
    kind, colon, rest = source.partition(":")
    if colon and kind == "prompt":
        return [(0, rest)]
    if colon and kind == "demo":
        return demo_texts(rest)
    if colon and kind == "file":
        return list(enumerate(_file(corpus, Path(rest))))
    raise AtlasError(f"corpus {corpus}: source {source!r} is not supported; use prompt:TEXT, file:PATH or demo:NAME.")


def _file(corpus: str, path: Path) -> list[str]:
    if path.suffix not in (".txt", ".parquet"):
        raise AtlasError(f"corpus {corpus}: {path} has neither suffix .txt nor .parquet; convert it to one of them.")
    if not path.is_file():
        raise AtlasError(f"corpus {corpus}: {path} does not exist; put the file there or mend the path in the sheet.")
    if path.suffix == ".txt":
        try:
            lines = path.read_text(encoding="utf-8-sig").split("\n")
        except UnicodeDecodeError as error:
            raise AtlasError(f"corpus {corpus}: {path} is not UTF-8 ({error}); save it as UTF-8.") from None
        return [line for line in lines if line.strip()]
    try:
        schema = pl.read_parquet_schema(path)
    except (pl.exceptions.ComputeError, OSError) as error:
        raise AtlasError(f"corpus {corpus}: {path} is not a readable parquet file ({error}); restore it.") from None
    if schema.get("text") != pl.String:
        raise AtlasError(
            f"corpus {corpus}: {path} has no column `text` of strings; rename the column that holds the texts."
        )
    return pl.read_parquet(path, columns=["text"])["text"].drop_nulls().to_list()

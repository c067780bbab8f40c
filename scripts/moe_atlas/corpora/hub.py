"""Texts of a data set of the Hub. `datasets` says which files a split is and reads them; no code of a data set runs."""

import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

import datasets
import polars as pl
from datasets.exceptions import DatasetsError
from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import LocalEntryNotFoundError

from moe_atlas.corpora.prepare import sequences
from moe_atlas.errors import AtlasError, first_line
from moe_atlas.hub.errors import hub_errors, page, token
from moe_atlas.hub.file import HubFile
from moe_atlas.log import say

# Formats that hold data alone. `datasets` reads more, and some of them (pandas, webdataset) may hold pickled objects.
FORMATS = ("arrow", "csv", "json", "parquet", "text")


def fetch(
    corpus: str,
    repository: str,
    revision: str,
    subset: str,
    split: str,
    column: str = "text",
    rule: str = "whole",
    max_sequences: int = 0,
    start_at: str = "",
) -> pl.DataFrame:
    """The sequences of one corpus from a data set, as `sequences` makes them; a document is a row of the data set.

    repository: OWNER/NAME; revision: commit of 40 hex digits; subset: a configuration of the data set, "" for its only
    or default one. The files of the split are fetched into the client's cache (HF_HOME) one at a time, the next one
    when the texts of the last are used up, and each is compared with the Hub's hash. Rows without a text are left out.
    Raises AtlasError: no such data set, revision, subset, split or column; gated; no network; a data set that is made
    by a script, lies elsewhere or is in a format not among FORMATS; a damaged file; and as `sequences`.
    """

    def texts() -> Iterator[tuple[int, str]]:
        try:
            yield from enumerate(_texts(repository, revision, subset, split, column))
        except AtlasError as error:
            raise AtlasError(f"corpus {corpus}: {error}") from None

    return sequences(corpus, f"hf:{repository}", texts(), rule, max_sequences, start_at)


def _texts(repository: str, revision: str, subset: str, split: str, column: str) -> Iterator[str]:
    """The texts in one column of a split, in the order of its files."""
    source = f"hf:{repository}"
    if not re.fullmatch("[0-9a-f]{40}", revision):
        raise AtlasError(
            f"{source}: the revision {revision!r} is not a commit of 40 hex digits; "
            f"take one from {page(f'datasets/{repository}', 'commits/main')}."
        )
    with hub_errors(repository, revision, "dataset"):
        api = HfApi(token=token())
        api.auth_check(repository, repo_type="dataset")
        api.dataset_info(repository, revision=revision)
        builder = _builder(source, revision, subset)
    for name in _files(source, revision, builder, split):
        with hub_errors(repository, revision, "dataset"):
            (listed,) = api.get_paths_info(repository, name, revision=revision, repo_type="dataset")
            path = hf_hub_download(repository, name, repo_type="dataset", revision=revision, token=token())
        file = HubFile.of(listed)
        file.verify(Path(path), repository)
        say(f"{source}: {name}, {file.bytes / 1e6:.1f} MB")
        builder.config.data_files = {split: [path]}
        yield from _column(source, builder, split, name, column)


def _builder(source: str, revision: str, subset: str) -> datasets.DatasetBuilder:
    """What `datasets` makes of the repository: its format, subsets and the files of each split. Fetches no data."""
    # With this prefix a folder of the same name on this machine is not taken for the data set.
    path = source.replace("hf:", "hf://datasets/", 1)
    try:
        # Without a cache of its own `datasets` would fall back on any revision that it has read before.
        with tempfile.TemporaryDirectory() as cache:
            builder = datasets.load_dataset_builder(
                path, subset or None, revision=revision, cache_dir=cache, token=token()
            )
    except RuntimeError as error:
        raise AtlasError(
            f"{source}: the data set is made by a script, which is never run ({first_line(error)}); "
            "name one that consists of data files, or a local copy with file:PATH."
        ) from None
    except (ValueError, ImportError) as error:  # ImportError: files on a web server, for which more has to be installed
        raise _unreadable(source, path, revision, subset, error) from None
    except LocalEntryNotFoundError:
        raise
    except ConnectionError as error:
        raise LocalEntryNotFoundError(first_line(error)) from error
    except (DatasetsError, FileNotFoundError):
        raise AtlasError(
            f"{source}: no data files are found at revision {revision}, or none where the data set's card names them; "
            "name another data set or a local copy with file:PATH."
        ) from None
    form = type(builder).__module__.split(".")[-1]
    if form not in FORMATS:
        raise AtlasError(
            f"{source}: the format {form} is not read; name a data set in one of {', '.join(FORMATS)}, "
            "or a local copy with file:PATH."
        )
    return builder


def _unreadable(source: str, path: str, revision: str, subset: str, error: Exception) -> AtlasError:
    """Why there is no builder: the subset is not there, or what `datasets` says."""
    try:
        subsets = datasets.get_dataset_config_names(path, revision=revision, token=token())
    except (ValueError, ImportError, OSError, DatasetsError):
        subsets = []
    mend = f"write one of these into the cell `subset`: {', '.join(subsets)}"
    if subset and subsets and subset not in subsets:
        return AtlasError(f"{source}: there is no subset {subset!r}; {mend}.")
    if not subset and len(subsets) > 1:
        return AtlasError(f"{source}: the data set has several subsets; {mend}.")
    return AtlasError(f"{source}: the data set cannot be read ({first_line(error)}); name a local copy with file:PATH.")


def _files(source: str, revision: str, builder: datasets.DatasetBuilder, split: str) -> list[str]:
    """The files of the split, as paths in the repository."""
    files = builder.config.data_files
    if split not in files:
        raise AtlasError(
            f"{source}: there is no split {split!r}; write one of these into the cell `split`: {', '.join(files)}."
        )
    place = f"{source.replace('hf:', 'hf://datasets/', 1)}@{revision}/"
    for file in files[split]:
        if not file.startswith(place):
            raise AtlasError(
                f"{source}: the split {split} is read from {file}, which is no file of this revision; "
                "name a data set that consists of data files, or a local copy with file:PATH."
            )
    return [file.removeprefix(place) for file in files[split]]


def _column(source: str, builder: datasets.DatasetBuilder, split: str, name: str, column: str) -> Iterator[str]:
    """The texts in one column of the file that the builder is set to."""
    try:
        for row in builder.as_streaming_dataset(split):
            if column not in row:
                raise AtlasError(
                    f"{source}: {name} has no column {column!r}; "
                    f"write one of these into the cell `column`: {', '.join(row)}."
                )
            text = row[column]
            if isinstance(text, str):
                yield text
            elif text is not None:
                raise AtlasError(
                    f"{source}: the column {column} of {name} holds values of type {type(text).__name__}, not texts; "
                    f"write another into the cell `column`: {', '.join(row)}."
                )
    except (ValueError, DatasetsError) as error:
        raise AtlasError(
            f"{source}: {name} cannot be read ({first_line(error)}); take another revision of the data set."
        ) from None

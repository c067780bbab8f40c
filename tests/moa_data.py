"""Tiny data sets with the files and columns of the published ones, for tests of the MoA configurations of full size."""

from pathlib import Path

import polars as pl
import yaml

from moe_atlas.corpora import demo_texts
from moe_atlas.moa.language import make_language

WMT, WIKITEXT = "wmt/wmt14", "Salesforce/wikitext"
WMT_FILES = {
    **{"train-00000-of-00002": (0, 250), "train-00001-of-00002": (250, 500)},
    **{"validation-00000-of-00001": (500, 530), "test-00000-of-00001": (530, 560)},
}
_WIKITEXT_FILES = {"train": "prose-train", "validation": "prose", "test": "prose"}


def pairs() -> list[tuple[str, str]]:
    """English sentences, and their words in a made-up language from the last to the first."""
    texts = [text.split()[:9] for _, text in demo_texts("prose-train") if len(text.split()) > 9]
    words = sorted({word for text in texts for word in text})
    stems = make_language(words[:4000], 0).stems
    return [(" ".join(text), " ".join(stems.get(word, word) for word in reversed(text))) for text in texts]


def card(subsets: dict[str, list[str]]) -> str:
    """The README.md that says which files a subset's splits are."""
    configs = [
        {"config_name": name, "data_files": [{"split": split, "path": f"{name}/{split}-*"} for split in splits]}
        for name, splits in subsets.items()
    ]
    return f"---\n{yaml.safe_dump({'configs': configs})}---\n"


def wmt14(folder: Path) -> Path:
    """German and French subsets of a column `translation`, English under `en`; one training pair lacks a side."""
    made = pairs()
    for subset, other in (("de-en", "de"), ("fr-en", "fr")):
        for name, (first, last) in WMT_FILES.items():
            rows = [{other: target, "en": source} for source, target in made[first:last]]
            if name.startswith("train-00001"):
                rows.append({other: "", "en": "Nothing is there."})
            write(pl.DataFrame({"translation": rows}), folder / subset / f"{name}.parquet")
    (folder / "README.md").write_text(card(dict.fromkeys(("de-en", "fr-en"), ["train", "validation", "test"])))
    return folder


def wikitext(folder: Path) -> Path:
    """The subset of raw text: a row a line, blank ones and headings among them."""
    for name, corpus in _WIKITEXT_FILES.items():
        lines = [line for _, text in demo_texts(corpus)[:200] for line in ("", " = Title = \n", "", f" {text} \n")]
        write(pl.DataFrame({"text": lines}), folder / "wikitext-103-raw-v1" / f"{name}-00000-of-00001.parquet")
    (folder / "README.md").write_text(card({"wikitext-103-raw-v1": ["train", "validation", "test"]}))
    return folder


def write(frame: pl.DataFrame, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    frame.write_parquet(path)


def at_commit(path: Path, commit: str, **changes: object) -> None:
    """Let every set of a data file be of this commit, and change other keys."""
    content = yaml.safe_load(path.read_text())
    for values in content["sets"].values():
        values["revision"] = commit
    path.write_text(yaml.safe_dump(content | changes))


def cut_down(path: Path, **changes: object) -> dict:
    """Settings of full size with tiny models and few steps; what is changed beside goes in at the top level."""
    content = yaml.safe_load(path.read_text())
    content["model"] |= {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    if "num_encoder_layers" in content["model"]:
        content["model"]["num_encoder_layers"] = 1
    content["training"] |= {"warmup": 4, "evaluate": 4, "least": 4, "most": 12}
    content["training"]["accumulate"] = min(2, content["training"].get("accumulate", 1))
    content["job_needs"] = {"gpus": 0, "mem_mb": 2000, "runtime": 10}
    for arm in content["arms"].values():
        arm |= {key: max(1, arm[key] // 16) for key in ("head_dim",) if key in arm}
    content |= changes
    path.write_text(yaml.safe_dump(content))
    return content

"""All figures of one model and experiment: every layer, both ranges, both formats, overview and manifest."""

import os
from pathlib import Path

import polars as pl

from moe_atlas import tables
from moe_atlas.errors import AtlasError
from moe_atlas.files import write_json
from moe_atlas.log import Progress, say
from moe_atlas.plotting.base import Experiment
from moe_atlas.plotting.counts import Load, RankCounts
from moe_atlas.plotting.domain import Domain
from moe_atlas.plotting.maps import OutputSimilarity, OutputSimilarityTokens, RouterSimilarity, WeightSimilarity
from moe_atlas.plotting.matching import NeuronMatching
from moe_atlas.plotting.projection import MatrixProjection, NeuronProjection
from moe_atlas.plotting.registry import EXPERIMENTS, FORMATS, RANGES, split
from moe_atlas.plotting.regression import RouterRegression
from moe_atlas.plotting.routing import ChosenExperts, NormScore
from moe_atlas.plotting.specialization import CoActivation, Specialization
from moe_atlas.plotting.states import ActivationRatio, Intermediate
from moe_atlas.plotting.style import save

_CLASSES = {
    "projection": MatrixProjection,
    "neuron_projection": NeuronProjection,
    "router_similarity": RouterSimilarity,
    "router_regression": RouterRegression,
    "output_similarity": OutputSimilarity,
    "output_similarity_tokens": OutputSimilarityTokens,
    "norm_score": NormScore,
    "rank_counts": RankCounts,
    "load": Load,
    "chosen_experts": ChosenExperts,
    "intermediate": Intermediate,
    "activation_ratio": ActivationRatio,
    "specialization": Specialization,
    "co_activation": CoActivation,
    "domain": Domain,
}


def read_tables(paths: list[str | os.PathLike]) -> dict[str, pl.DataFrame]:
    """Tables by name; the name is the file's, as in the data contract."""
    frames = {}
    for path in paths:
        name = Path(path).stem
        if name not in tables.ALL:
            raise AtlasError(f"{path}: no table of the data contract is called {name}; give one of its files.")
        frames[name] = tables.read(name, path)
    return frames


def experiment(model: str, name: str, frames: dict[str, pl.DataFrame]) -> Experiment:
    """The figures called `name` (experiment or experiment.corpus) of `model`, ready to draw.

    Raises AtlasError when there is no such experiment, a table it needs is missing, or a table is of another model.
    """
    base, corpus = split(name)
    if base not in EXPERIMENTS:
        raise AtlasError(f"{name}: there is no such experiment; the experiments are {', '.join(EXPERIMENTS)}.")
    if bool(EXPERIMENTS[base].kinds) != bool(corpus):
        raise AtlasError(f"{name}: write {base}{'.CORPUS' if EXPERIMENTS[base].kinds else ' without a corpus'}.")
    missing = [table for table in EXPERIMENTS[base].tables if table not in frames and table != "routing"]
    if base == "chosen_experts" and "routing" not in frames:
        missing.append("routing")
    if missing:
        raise AtlasError(f"{name}: the tables {', '.join(missing)} are missing; name them with --table.")
    selected = {table: _of(frame, table, model, corpus) for table, frame in frames.items()}
    if base.startswith("weight_similarity"):
        level = "neuron_mean" if base.endswith("neuron_mean") else "matrix"
        return WeightSimilarity(model, corpus, selected, level)
    if base in ("neuron_matching", "neuron_order"):
        return NeuronMatching(model, corpus, selected, "excess" if base == "neuron_matching" else "tau")
    return _CLASSES[base](model, corpus, selected)


def _of(frame: pl.DataFrame, table: str, model: str, corpus: str | None) -> pl.DataFrame:
    """Rows of this model and corpus; a table that has rows, but none of them, is a mistake."""
    chosen = frame.filter(pl.col("model") == model)
    if corpus and "corpus" in frame.columns:
        chosen = chosen.filter(pl.col("corpus") == corpus)
    if len(frame) and chosen.is_empty():
        where = f"model {model}" + (f" and corpus {corpus}" if corpus else "")
        raise AtlasError(f"table {table}: it has no row of {where}; give the table of this model.")
    return chosen


def plot_all(model: str, name: str, frames, output_dir: Path, manifest: Path, overview: Path) -> None:
    """Write every figure below `output_dir`, then the overview, then the manifest that lists them.

    Figures an earlier run left in `output_dir` and this one does not make are removed.
    """
    drawn = experiment(model, name, frames)
    output_dir.mkdir(parents=True, exist_ok=True)
    files = []
    progress = Progress(len(drawn.pages), "figure")
    for page in drawn.pages:
        drawing = drawn.draw(page)
        for which in RANGES:
            drawing.apply(drawn.ranges(page, which), which)
            caption = drawn.caption(page, which)
            for suffix in FORMATS:
                path = output_dir / f"{page.stem}_{which}.{suffix}"
                save(drawing.figure, path)
                files.append(
                    {
                        "path": path.as_posix(),
                        "layer": page.layer,
                        "site": page.site,
                        "range": which,
                        "caption": caption,
                    }
                )
        progress.step(page.text)
    if not drawn.pages:
        say(f"{model} has no experts in any layer: no figure by layer")
    save(drawn.overview(), overview)
    kept = {Path(file["path"]).name for file in files}
    for suffix in FORMATS:
        for stale in sorted(output_dir.glob(f"layer_*.{suffix}")):
            if stale.name not in kept:
                stale.unlink()
    write_json(manifest, {"model": model, "experiment": name, "files": files})


def plot_one(model: str, name: str, frames, figure: Path) -> None:
    """Write one figure; its name (layer_3_auto.png) says which layer, range and format."""
    drawn = experiment(model, name, frames)
    stem, _, which = figure.stem.rpartition("_")
    pages = {page.stem: page for page in drawn.pages}
    if which not in RANGES or figure.suffix[1:] not in FORMATS or stem not in pages:
        layers = ", ".join(pages) or "none, the model has no experts"
        raise AtlasError(
            f"{figure}: name a figure LAYER_auto or LAYER_full, .png or .pdf, with LAYER one of: {layers}."
        )
    drawing = drawn.draw(pages[stem])
    drawing.apply(drawn.ranges(pages[stem], which), which)
    save(drawing.figure, figure)

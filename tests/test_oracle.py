"""The numbers that the notebooks of A Closer Look give, against the result tables of a workflow run.

tests/data/oracle/README.md says what the checkpoints and the arrays are, and where the tolerances come from.
"""

from pathlib import Path

import numpy as np
import polars as pl
import pytest
from tokenizers import Tokenizer
from workflow_runs import ROOT, copy_repository, snakemake, write_sheet

from moe_atlas import tables
from moe_atlas.files import read_json

ORACLE = ROOT / "tests/data/oracle"
INPUTS = read_json(ORACLE / "inputs.json")
SHORT, ROUTING, LONG = "short", "routing", "paragraphs"
IDS = {SHORT: [INPUTS["short"]["ids"]], ROUTING: [INPUTS["routing"]["ids"]], LONG: INPUTS["paragraphs"]}

# Labels in the order of the notebooks' arrays: routed experts, then the dense reference or the shared expert.
ROUTED = {model: [str(expert) for expert in range(n)] for model, n in (("mixtral", 8), ("deepseek", 16), ("grok", 8))}
LABELS = {"mixtral": [*ROUTED["mixtral"], "F"], "deepseek": [*ROUTED["deepseek"], "SE"], "grok": ROUTED["grok"]}
MATRICES = ["up", "act", "down"]

# Largest deviation allowed, absolute but for norms; arrays that are not here must be equal. Rank counts are looked
# at on their own.
TOLERANCES = {
    "weight_sim": {"sim": 1e-5},
    "weight_sim_average": {"sim": 1e-5},
    "gate_sim": {"sim": 1e-5},
    "gate_regression": {"pairs": 1e-5, "r": 1e-5, "r2": 1e-5, "mean_r2": 1e-5, "mean_r2_of_rounded": 1e-9},
    "outputs_short": {"sim": 2e-5},
    "outputs_long": {"mean_angular_sim": 1e-6},
    "norms_short": {"norm": 1e-4, "gate_score": 1e-5},
    "norms_long": {},
    "chosen_experts": {"weight": 2e-5, "dense": 2e-5},
}
RELATIVE = {("norms_short", "norm")}


def paragraphs() -> list[str]:
    """The ten paragraphs as text, from their token ids; the first id of each, <s>, is the tokenizer's own."""
    tokenizer = Tokenizer.from_file(str(ORACLE / "checkpoints/mixtral/tokenizer.json"))
    return [tokenizer.decode(ids[1:], skip_special_tokens=False) for ids in INPUTS["paragraphs"]]


def write_sheets(folder: Path) -> None:
    """Model and corpus sheets of the run, and the file of paragraphs."""
    models = [
        {
            "model": model,
            "source": f"path:{ORACLE / 'checkpoints' / model}",
            "dtype": "float32",
            "dense_reference": "mistral" if model == "mixtral" else "",
        }
        for model in ("mistral", *LABELS)
    ]
    write_sheet(folder / "config/models.tsv", models)
    corpora = [
        {"corpus": corpus, "source": f"prompt:{INPUTS[corpus]['text']}", "kind": "short"} for corpus in (SHORT, ROUTING)
    ]
    corpora.append({"corpus": LONG, "source": "file:paragraphs.txt", "kind": "long"})
    write_sheet(folder / "config/corpora.tsv", corpora)
    (folder / "paragraphs.txt").write_text("\n".join(paragraphs()) + "\n", encoding="utf-8")


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict[str, pl.DataFrame]:
    """The tables over all models of one workflow run, by name."""
    folder = copy_repository(tmp_path_factory.mktemp("oracle") / "atlas")
    write_sheets(folder)
    paths = {name: f"results/tables/{name}.parquet" for name in Notebooks.TABLES}
    # One thread a job, so that two run at a time: these models are tiny, and it is the start of a job that takes long.
    heavy = ("describe_checkpoint", "weight_statistics", "extract_activations")
    snakemake(folder, *paths.values(), "--set-threads", *(f"{rule}=1" for rule in heavy))
    return {name: tables.read(name, folder / path) for name, path in paths.items()}


def array(frame: pl.DataFrame, value: str, axes: dict) -> np.ndarray:
    """A column as an array, one axis for each column of `axes` with its labels in order; rows of other labels drop out.

    Pairs (columns a and b, last), which the table has once, are on both sides of the diagonal. A missing row is NaN.
    """
    frame = frame.filter(pl.col(column).is_in(list(labels)) for column, labels in axes.items())
    assert not frame.select(list(axes)).is_duplicated().any()
    places = [
        frame[column].replace_strict(list(labels), range(len(labels)), return_dtype=pl.Int64).to_numpy()
        for column, labels in axes.items()
    ]
    result = np.full([len(labels) for labels in axes.values()], np.nan)
    result[tuple(places)] = frame[value].to_numpy()
    if "b" in axes:
        result[(*places[:-2], places[-1], places[-2])] = frame[value].to_numpy()
    return result


class Notebooks:
    """The notebooks' arrays for one model, rebuilt from the result tables; a method an experiment, named as there."""

    TABLES = (
        *("similarity", "regression", "tokens", "routing", "norm_score"),
        *("rank_counts", "output_similarity", "output_similarity_tokens"),
    )

    def __init__(self, results: dict[str, pl.DataFrame], model: str):
        self.tables = {name: frame.filter(model=model) for name, frame in results.items()}
        self.routed, self.labels = ROUTED[model], LABELS[model]
        self.layers = {"layer": self.tables["similarity"]["layer"].unique().sort().to_list()}

    def of_corpus(self, table: str, corpus: str) -> pl.DataFrame:
        return self.tables[table].filter(corpus=corpus)

    def ids(self, corpus: str) -> list[list[int]]:
        frame = self.of_corpus("tokens", corpus).sort("sequence", "position")
        return frame.group_by("sequence", maintain_order=True).agg("token_id")["token_id"].to_list()

    def positions(self, corpus: str) -> dict:
        return {"position": range(len(self.ids(corpus)[0]))}

    def weights(self, level: str, labels: list[str], matrices: list[str] = MATRICES) -> np.ndarray:
        frame = self.tables["similarity"].filter(level=level)
        return array(frame, "cosine", self.layers | {"matrix": matrices, "a": labels, "b": labels})

    def chosen(self, corpus: str) -> tuple[np.ndarray, np.ndarray]:
        """Chosen experts and their weights (L, T, k), largest weight first."""
        frame = self.of_corpus("routing", corpus).with_columns(pl.col("expert").cast(pl.Int64))
        axes = self.layers | self.positions(corpus) | {"rank": frame["rank"].unique().sort().to_list()}
        return array(frame, "expert", axes).astype(np.int64), array(frame, "weight", axes)

    def lengths(self) -> dict:
        lengths = [len(ids) for ids in self.ids(LONG)]
        return {"tokens": sum(lengths), "tokens_per_sentence": lengths}

    def weight_sim(self) -> dict:
        # F has an expert's shape. The shared expert is wider, so that it only has a mean neuron to compare.
        return {"sim": self.weights("matrix", [label for label in self.labels if label != "SE"])}

    def weight_sim_average(self) -> dict:
        return {"sim": self.weights("neuron_mean", self.labels)}

    def gate_sim(self) -> dict:
        router = self.weights("matrix", self.routed, ["router"])
        return {"sim": np.concatenate([router, self.weights("neuron_mean", self.routed)], axis=1)}

    def gate_regression(self) -> dict:
        axes = self.layers | {"matrix": MATRICES}
        r, r2 = (array(self.tables["regression"], name, axes) for name in ("r", "r2"))
        below = np.tril_indices(len(self.routed), -1)
        means = {"mean_r2": r2.mean(0), "mean_r2_of_rounded": r2.round(2).mean(0)}
        return {"pairs": self.gate_sim()["sim"][:, :, *below], "r": r, "r2": r2} | means

    def outputs_short(self) -> dict:
        axes = self.layers | self.positions(SHORT) | {"a": self.labels, "b": self.labels}
        sim = array(self.of_corpus("output_similarity_tokens", SHORT), "cosine", axes)
        return {"sim": sim, "chosen": self.chosen(SHORT)[0], "input_ids": self.ids(SHORT)[0]}

    def outputs_long(self) -> dict:
        axes = self.layers | {"a": self.labels, "b": self.labels}
        angular = array(self.of_corpus("output_similarity", LONG), "angular_mean", axes)
        return {"mean_angular_sim": angular} | self.lengths()

    def norms_short(self) -> dict:
        frame, expert, position = self.of_corpus("norm_score", SHORT), {"expert": self.routed}, self.positions(SHORT)
        norm = array(frame, "norm", self.layers | expert | position)
        score = array(frame, "score", self.layers | position | expert)
        return {"norm": norm, "gate_score": score, "chosen": self.chosen(SHORT)[0], "input_ids": self.ids(SHORT)[0]}

    def norms_long(self) -> dict:
        ranks = range(len(self.routed))
        axes = self.layers | {"score_rank": ranks, "norm_rank": ranks}
        counts = array(self.of_corpus("rank_counts", LONG), "count", axes)
        return {"rank_counts": counts, "rank_counts_all": counts.sum(0)} | self.lengths()

    def chosen_experts(self) -> dict:
        index, weight = self.chosen(ROUTING)
        dense = np.zeros((*index.shape[:2], len(self.routed)))
        np.put_along_axis(dense, index, weight, axis=-1)
        return {"index": index, "weight": weight, "dense": dense, "input_ids": self.ids(ROUTING)[0]}


def published(model: str, experiment: str) -> dict[str, np.ndarray]:
    return dict(np.load(ORACLE / f"expected/{model}/{experiment}.npz"))


def in_one_order(model: str, experiment: str, arrays: dict) -> dict[str, np.ndarray]:
    """The arrays with the chosen experts of a token in ascending order where the notebooks have no order."""
    arrays = {name: np.asarray(values) for name, values in arrays.items()}
    if experiment == "chosen_experts":
        order = arrays["index"].argsort(axis=-1)
        arrays |= {name: np.take_along_axis(arrays[name], order, axis=-1) for name in ("index", "weight")}
    if (model, experiment) == ("deepseek", "outputs_short"):
        arrays["chosen"] = np.sort(arrays["chosen"], axis=-1)
    return arrays


def deviations(results: dict[str, pl.DataFrame], model: str, experiment: str) -> dict[str, tuple[float, float]]:
    """Array -> largest deviation from the published one, and what is allowed. Both sides must have the same arrays."""
    rebuilt = Notebooks(results, model)
    ours = in_one_order(model, experiment, getattr(rebuilt, experiment)() | {"layers": rebuilt.layers["layer"]})
    expected = in_one_order(model, experiment, published(model, experiment))
    ties = expected.pop("near_ties", np.zeros(1))
    assert ours.keys() == expected.keys()
    found = {}
    for name, wanted in expected.items():
        assert ours[name].shape == wanted.shape, (name, ours[name].shape, wanted.shape)
        difference = np.abs(ours[name] - wanted)
        if (experiment, name) in RELATIVE:
            difference = difference / np.abs(wanted)
        allowed = TOLERANCES[experiment].get(name, 0.0)
        if name.startswith("rank_counts"):
            # Two experts that change places leave two cells and enter two others.
            difference, allowed = difference.sum(), 4.0 * ties.sum()
        found[name] = float(difference.max()), allowed
    return found


def test_paragraphs_come_back_from_their_token_ids():
    texts, tokenizer = paragraphs(), Tokenizer.from_file(str(ORACLE / "checkpoints/mixtral/tokenizer.json"))
    assert [tokenizer.encode(text).ids for text in texts] == IDS[LONG]
    unknown = [ids.count(0) for ids in IDS[LONG]]
    assert sum(unknown) and [text.count("<unk>") for text in texts] == unknown


@pytest.mark.parametrize("model", ["mistral", *LABELS])
def test_the_models_read_the_published_tokens(results, model):
    frame = results["tokens"].filter(model=model)
    for corpus, sequences in IDS.items():
        found = frame.filter(corpus=corpus).sort("sequence", "position")
        assert found["token_id"].to_list() == [token for ids in sequences for token in ids]
        assert found["sequence"].to_list() == [number for number, ids in enumerate(sequences) for _ in ids]


@pytest.mark.parametrize("experiment", TOLERANCES)
@pytest.mark.parametrize("model", LABELS)
def test_the_tables_hold_the_published_numbers(results, model, experiment):
    for name, (deviation, allowed) in deviations(results, model, experiment).items():
        assert deviation <= allowed, (name, deviation, allowed)


@pytest.mark.parametrize("model", LABELS)
def test_every_expert_of_every_token_is_counted_at_one_rank(results, model):
    counts = Notebooks(results, model).norms_long()["rank_counts"]
    tokens = published(model, "norms_long")["tokens"]
    np.testing.assert_allclose(counts.sum(1), tokens, rtol=1e-12)
    np.testing.assert_allclose(counts.sum(2), tokens, rtol=1e-12)


def test_f_is_the_dense_model_on_its_own_hidden_states(results):
    """The notebooks' F, whose outputs the MoE's own inputs do not give."""
    rebuilt, expected = Notebooks(results, "mixtral"), published("mixtral", "outputs_short")["sim"]
    rebuilt.labels = [*ROUTED["mixtral"], "F_same_input"]
    difference = np.abs(rebuilt.outputs_short()["sim"] - expected)
    tolerance = TOLERANCES["outputs_short"]["sim"]
    assert difference[..., :-1, :-1].max() <= tolerance and difference[..., -1, :-1].max() > 1000 * tolerance

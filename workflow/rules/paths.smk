# Where things lie, and which of them a job reads: functions of the sheets, no rules.
import dataclasses
import hashlib
import json
from pathlib import PurePath

from moe_atlas.plotting.registry import EXPERIMENTS, experiments_of, split


def checkpoint_file(name):
    """Description of a model's checkpoint."""
    return f"results/models/{name}/checkpoint.json"


def training_file(recipe):
    """Last file that a demo training writes."""
    return f"{sheets.CHECKPOINTS}/{recipe}/training.json"


def checkpoint_source(wildcards):
    """The small file that stands for a checkpoint; its weights are in the fingerprint."""
    row = model(wildcards)
    if row.dense:
        return derivation_file(row.model)
    return training_file(row.recipe) if row.recipe else str(PurePath(row.directory) / "config.json")


def checkpoint_fingerprint(wildcards):
    """Names and sizes of a user's weight files. What is made here is followed through the file that is written last."""
    row = model(wildcards)
    return "" if row.recipe or row.dense else sheets.fingerprint(row.directory)


def dense_allowed(wildcards, output):
    """--dense-allowed for a demo model and for one that another names as its reference or is made from.

    A permission, not a value: because of `output` in the signature Snakemake does not count it as a change
    when the rows that name the model come and go.
    """
    names = {name for row in MODELS.values() for name in (row.dense_reference, row.dense)}
    names |= {row.model for row in MODELS.values() if row.recipe}
    return ["--dense-allowed"] if wildcards.model in names else []


def dense_reference(wildcards):
    """Checkpoint description of the dense model that this one was made from, if the sheet names one."""
    reference = model(wildcards).dense_reference
    return [checkpoint_file(reference)] if reference else []


def state_options(wildcards, output):
    """--state of extract_activations.py, where killed runs are to go on. Like dense_allowed no reason to run again."""
    folder = str(PurePath(output.activations).parent / "state")
    return ["--state", folder] if CONFIG["keep_state"] else []


def corpus_parts(wildcards):
    """What the jobs that a pass over a corpus is dealt to write."""
    folder, count = f"results/models/{wildcards.model}/behavioral/{wildcards.corpus}/parts", corpus(wildcards).parts
    return [f"{folder}/{number}-of-{count}/activations.safetensors" for number in range(1, count + 1)]


def start_recipe(wildcards):
    """Recipes that this recipe's training begins from: one or none."""
    start = RECIPES[wildcards.recipe].start_from
    return [start.recipe] if start else []


def recipe_digest(wildcards):
    """Changes with the recipe's own numbers, so that an edit of one recipe trains that one again."""
    return hashlib.sha256(repr(dataclasses.asdict(RECIPES[wildcards.recipe])).encode()).hexdigest()[:16]


def corpora_of(kinds):
    """Ids of the corpora of these kinds."""
    return [name for name, kind in KINDS.items() if kind in kinds]


def model_tables(name, table):
    """Files of one table of one model: one, or one a corpus."""
    declared = TABLES[table]
    path = f"results/models/{name}/{declared.path}"
    return [path.format(corpus=corpus) for corpus in corpora_of(declared.kinds)] if declared.kinds else [path]


def tables_of(name, corpus_tables):
    """All tables of one model: those of what it does on corpora, or those of the weights."""
    chosen = [table for table, declared in TABLES.items() if declared.path.startswith("behavioral/") == corpus_tables]
    return [path for table in chosen for path in model_tables(name, table)]


def corpus_options(wildcards):
    """--corpus of fetch_use_delete.py, once for each corpus: id, kind, its file, the files to write."""
    folder = f"results/models/{wildcards.model}/behavioral"
    rows = [
        (c, KINDS[c], f"results/corpora/{c}.parquet", *(f"{folder}/{c}/{file}" for file in RECORDED)) for c in CORPORA
    ]
    return [part for row in rows for part in ("--corpus", *row)]


def series_runs():
    """[series, model, corpus, routing, load, tokens]: each short corpus of each model that shares its series."""
    series = [row.series for row in MODELS.values() if row.series]
    return [
        [row.series, name, corpus]
        + [
            f"results/models/{name}/{TABLES[table].path.format(corpus=corpus)}"
            for table in ("routing", "load", "tokens")
        ]
        for name, row in MODELS.items()
        if series.count(row.series) > 1
        for corpus in corpora_of(["short"])
    ]


def all_tables():
    """Tables of results/tables/: those that exist for at least one corpus of the sheet, and those across models."""
    return [table for table, declared in TABLES.items() if not declared.kinds or corpora_of(declared.kinds)] + [*ACROSS]


def experiments():
    """Full names of the figures of one model, with their corpus."""
    return experiments_of(KINDS)


def experiment_tables(wildcards):
    """The tables that one figure of one model is drawn from."""
    name, corpus = split(wildcards.experiment)
    paths = [TABLES[table].path.format(corpus=corpus) for table in EXPERIMENTS[name].tables]
    return [f"results/models/{wildcards.model}/{path}" for path in paths]


def model_notebook_parameters(wildcards):
    """JSON with the values that the notebook of one model is run with."""
    values = {"model": wildcards.model}
    if wildcards.notebook == "behavioral":
        values["corpora"] = list(CORPORA)
    return json.dumps(values)

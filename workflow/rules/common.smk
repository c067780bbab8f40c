# What the rules share: the checked sheets and functions, no rules.
import dataclasses
import hashlib
import json
import os
import re
import sys
from pathlib import Path, PurePath

sys.path.insert(0, str(Path(workflow.basedir).parent / "scripts"))

from snakemake.exceptions import WorkflowError

from moe_atlas import sheets
from moe_atlas.corpora.demo import DEMO_CORPORA
from moe_atlas.errors import AtlasError
from moe_atlas.plotting.registry import COMPARISONS, EXPERIMENTS, experiments_of, split
from moe_atlas.sources import sources
from moe_atlas.tables import TABLES
from moe_atlas.training import recipes

# Rules call `python`: without conda it is the one that runs Snakemake. Jobs never ask the Hub.
os.environ.update(
    PATH=os.pathsep.join([os.path.dirname(sys.executable), os.environ.get("PATH", os.defpath)]),
    HF_HUB_OFFLINE="1",
)

# Version of each method that is expensive or that an expensive one waits for. These rules take their code as
# `ancient`, so that an edit alone repeats nothing: raise the number when the results change.
METHODS = {
    "prepare_corpus": 1,
    "train_demo_checkpoint": 1,
    "describe_checkpoint": 1,
    "weight_similarity": 1,
    "extract_activations": 1,
}


def load_sheets():
    """Config, models, corpora and recipes; a fault in one of them ends the run with its sentence."""
    try:
        checked = sheets.load_config(config)
        recipe_list = recipes.load()
        models = sheets.load_models(checked["models"], list(recipe_list))
        corpora = sheets.load_corpora(checked["corpora"], DEMO_CORPORA)
    except AtlasError as error:
        raise WorkflowError(str(error)) from None
    return checked, models, corpora, recipe_list


CONFIG, MODELS, CORPORA, RECIPES = load_sheets()
KINDS = {corpus.corpus: corpus.kind for corpus in CORPORA.values()}


def one_of(names):
    """Regular expression that matches exactly one of the names."""
    return "|".join(re.escape(name) for name in names)


def model(wildcards):
    """Row of the model sheet."""
    return MODELS[wildcards.model]


def corpus(wildcards):
    """Row of the corpus sheet."""
    return CORPORA[wildcards.corpus]


def code(program):
    """A light rule's code, as inputs compared by content: the program and the library files it runs through."""
    return list(sources(program))


def options(name, values):
    """[name, value, name, value, ...]: an option that is given once for each value."""
    return [part for value in values for part in (name, value)]


# Resources: what holds on any machine.
def memory(wildcards, attempt):
    """mem_mb of the model's row, more on each further attempt."""
    return model(wildcards).mem_mb * attempt


def gpus(wildcards):
    """GPUs of the model's row. None asks for no GPU at all."""
    return model(wildcards).gpus or None


def gpu_jobs(wildcards):
    """1 for a job on a GPU: a machine's profile limits how many of these run at a time, not how many GPUs one has."""
    return 1 if model(wildcards).gpus else None


def device(wildcards, resources):
    """Where a model runs. It follows what the job was given, and is no reason to run it again."""
    return "cuda" if resources.get("gpu") else "cpu"


def model_threads(wildcards):
    """Threads for a model's weights: one for a demo model, up to eight for any other."""
    return 1 if model(wildcards).recipe else min(workflow.cores or 8, 8)


# Paths.
def checkpoint_file(name):
    """Description of a model's checkpoint."""
    return f"results/models/{name}/checkpoint.json"


def training_file(recipe):
    """Last file that a demo training writes."""
    return f"{sheets.CHECKPOINTS}/{recipe}/training.json"


def checkpoint_source(wildcards):
    """The small file that stands for a checkpoint; its weights are in the fingerprint."""
    row = model(wildcards)
    return training_file(row.recipe) if row.recipe else str(PurePath(row.directory) / "config.json")


def checkpoint_fingerprint(wildcards):
    """Names and sizes of a user's weight files. A demo checkpoint is followed through its training.json."""
    row = model(wildcards)
    return "" if row.recipe else sheets.fingerprint(row.directory)


def dense_allowed(wildcards, output):
    """--dense-allowed for a demo model and for one that another names as its reference.

    A permission, not a value: because of `output` in the signature Snakemake does not count it as a change
    when the rows that name the model come and go.
    """
    names = {row.dense_reference for row in MODELS.values()} | {row.model for row in MODELS.values() if row.recipe}
    return ["--dense-allowed"] if wildcards.model in names else []


def dense_reference(wildcards):
    """Checkpoint description of the dense model that this one was made from, if the sheet names one."""
    reference = model(wildcards).dense_reference
    return [checkpoint_file(reference)] if reference else []


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
    """All tables of one model: those of the corpora, or those of the weights."""
    chosen = [table for table, declared in TABLES.items() if bool(declared.kinds) == corpus_tables]
    return [path for table in chosen for path in model_tables(name, table)]


def all_tables():
    """Tables that exist for at least one corpus of the sheet."""
    return [table for table, declared in TABLES.items() if not declared.kinds or corpora_of(declared.kinds)]


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

# What the rules share: the checked sheets and functions, no rules.
import os
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(workflow.basedir).parent / "scripts"))

from snakemake.exceptions import WorkflowError

from moe_atlas import devices, sheets
from moe_atlas.claims.judge import TABLES as JUDGED_TABLES
from moe_atlas.claims.published import TABLES as PUBLISHED_TABLES
from moe_atlas.claims.published import load_published
from moe_atlas.claims.sheet import load_claims
from moe_atlas.corpora.demo import DEMO_CORPORA
from moe_atlas.errors import AtlasError
from moe_atlas.plotting.registry import COMPARISONS
from moe_atlas.sources import sources
from moe_atlas.tables import ACROSS, TABLES
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
    "derive_emoe": 1,
    "describe_checkpoint": 2,
    "weight_statistics": 2,
    "extract_activations": 6,
    "emoe_mechanism": 2,
    "fetch_task": 1,
    "tune_emoe": 1,
    "fetch_moa_data": 1,
    "train_moa": 1,
    "moa_pairs": 1,
    "analyse_heads": 1,
}


def load_sheets():
    """Config, models, corpora and recipes; a fault in one of them ends the run with its sentence."""
    try:
        checked = sheets.load_config(config)
        recipe_list = recipes.load()
        encoders = recipes.load_encoders()  # no rows of the atlas: they are for make emoe alone
        models = sheets.load_models(checked["models"], list(recipe_list))
        corpora = sheets.load_corpora(checked["corpora"], DEMO_CORPORA)
        load_claims(checked["claims"])
        load_published(checked["published"])
    except AtlasError as error:
        raise WorkflowError(str(error)) from None
    return checked, models, corpora, recipe_list | encoders


CONFIG, MODELS, CORPORA, RECIPES = load_sheets()
KINDS = {corpus.corpus: corpus.kind for corpus in CORPORA.values()}
# What a pass over a corpus writes; the intermediate states of a long corpus are a file without tensors.
RECORDED = ("activations.safetensors", "tokens.parquet", "intermediate.safetensors")


def one_of(names):
    """Regular expression that matches exactly one of the names, and nothing where there are none."""
    return "|".join(re.escape(name) for name in names) or "(?!)"


def model(wildcards):
    """Row of the model sheet."""
    return MODELS[wildcards.model]


def corpus(wildcards):
    """Row of the corpus sheet."""
    return CORPORA[wildcards.corpus]


def models_where(condition):
    """Ids of the models whose row meets the condition."""
    return [name for name, row in MODELS.items() if condition(row)]


def corpora_where(condition):
    """Ids of the corpora whose row meets the condition."""
    return [name for name, row in CORPORA.items() if condition(row)]


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


def kept_memory(wildcards, attempt):
    """What a pass through the model keeps to, in MB."""
    return CONFIG["memory_mb"] or memory(wildcards, attempt)


def gpus(wildcards):
    """GPUs of the model's row, where they are asked for by number. None asks for no GPU at all."""
    return None if CONFIG["gpu_gres"] else model(wildcards).gpus or None


def gres(wildcards):
    """The same as a generic resource of Slurm, where the config names one."""
    count = model(wildcards).gpus
    return f"{CONFIG['gpu_gres']}:{count}" if CONFIG["gpu_gres"] and count else None


def gpu_jobs(wildcards):
    """1 for a job on a GPU: a machine's limit is on how many of these run at a time, not on how many GPUs one has."""
    return 1 if model(wildcards).gpus else None


# A machine runs one such job a GPU; each takes a GPU that is free (moe_atlas/devices.py). --resources comes first.
if (
    workflow.is_main_process
    and "gpu_jobs" not in workflow.global_resources.keys()
    and models_where(lambda row: row.gpus)
):
    workflow.register_resource("gpu_jobs", max(1, len(devices.present())))


def device(wildcards, resources):
    """Where a model runs. It follows what the job was given, and is no reason to run it again."""
    return "cuda" if resources.get("gpu") or resources.get("gres") else "cpu"


def model_threads(wildcards):
    """Threads for a model's weights: one for a demo model, eight for any other, or as many as the machine has."""
    row = model(wildcards)
    return 1 if row.recipe or (row.dense and MODELS[row.dense].recipe) else 8

# Which models' attention experts are looked into, and on what: functions of the config, the sheets and the settings.
from moe_atlas.architectures import ATTENTION_EXPERTS
from moe_atlas.files import read_json
from moe_atlas.plotting.registry import HEADS_FIGURES
from moe_atlas.tables import HEADS

HEADS_FOLDER = "results/moa/looked/{looked}"


def model_type_of(row):
    """What config.json of a row's checkpoint says, or will say; "" where nothing is there to be read yet."""
    if row.recipe:
        return RECIPES[row.recipe].model_type
    file = Path(row.directory) / "config.json"
    return read_json(file).get("model_type", "") if row.directory and file.is_file() else ""


def heads_rows():
    """Rows of the model sheet that are looked into: those that the config names, or else those with attention experts."""
    named = CONFIG["heads_models"].split()
    unknown = [name for name in named if name not in MODELS]
    if unknown:
        raise WorkflowError(f"config, key heads_models: the model sheet has no enabled row {', '.join(unknown)}.")
    gone = [name for name in named if not MODELS[name].keep]
    if gone:
        raise WorkflowError(
            f"config, key heads_models: the row {gone[0]} has keep false, and its weights are wanted; write true there."
        )
    found = named or [name for name, row in MODELS.items() if model_type_of(row) in ATTENTION_EXPERTS]
    return [name for name in MODELS if name in found and MODELS[name].keep]


# STUDY.OBJECTIVE.ARM -> the job whose model of seed 0 is looked into.
HEADS_KEPT = {
    f"{job.study}.{job.objective}.{job.arm}": job
    for job in MOA_SETTINGS.kept()
    if MOA_SETTINGS.arms[job.arm].attention == "moa"
}
HEADS_LOOKED = [*heads_rows(), *HEADS_KEPT]


def heads_translates(looked):
    """Whether a model translates."""
    return looked in HEADS_KEPT and MOA_SETTINGS.tasks[HEADS_KEPT[looked].objective].kind == "translation"


def heads_checkpoint(wildcards):
    """The file that stands for the weights."""
    if wildcards.looked in HEADS_KEPT:
        return f"{MOA_CHECKPOINT}/done.json".format(**vars(HEADS_KEPT[wildcards.looked]))
    return checkpoint_file(wildcards.looked)


def heads_corpora(looked):
    """Corpus -> file that the model reads: the long corpora, or the pairs of its own test."""
    if heads_translates(looked):
        objective = HEADS_KEPT[looked].objective
        return {objective: f"results/moa/pairs/{objective}.parquet"}
    return {name: f"results/corpora/{name}.parquet" for name in corpora_of(["long"])}


def heads_need(wildcards, name):
    """What a job of this model asks for: as its row says, or the settings of the experiments."""
    if wildcards.looked in MODELS:
        return getattr(MODELS[wildcards.looked], name)
    return MOA_SETTINGS.job_needs[name]


def heads_threads(wildcards):
    """One thread for a model that was trained here, eight for any other, or as many as the machine has."""
    return 1 if wildcards.looked in HEADS_KEPT or MODELS[wildcards.looked].recipe else 8


def heads_gpus(wildcards):
    """GPUs, where they are asked for by number."""
    return None if CONFIG["gpu_gres"] else heads_need(wildcards, "gpus") or None


def heads_figures(looked):
    """Names of the figures of one model, with their corpus where they have one."""
    found = []
    for name, figure in HEADS_FIGURES.items():
        if name == "sites" and looked in HEADS_KEPT:  # MoA models have no FFN experts
            continue
        found += [f"{name}.{corpus}" for corpus in heads_corpora(looked)] if figure.kinds else [name]
    return found


def heads_files():
    """Figures of all models that are looked into."""
    return [f"results/figures/moa/{looked}/{name}.png" for looked in HEADS_LOOKED for name in heads_figures(looked)]


def heads_parts(wildcards):
    """Files that one table of attention experts is put together from."""
    return [f"{HEADS_FOLDER}/{wildcards.table}.parquet".format(looked=name) for name in HEADS_LOOKED]

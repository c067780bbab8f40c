# What the MoA experiments are told, and where their files lie: functions of the settings, no rules.
from moe_atlas.moa.settings import load_settings as load_moa_settings
from moe_atlas.moa.shown import objectives as moa_objectives, texts_of as moa_texts_of, varied as moa_varied
from moe_atlas.plotting.registry import MOA_FIGURES, split
from moe_atlas.tables import MOA

try:
    MOA_SETTINGS = load_moa_settings(CONFIG["moa"])
except AtlasError as error:
    raise WorkflowError(str(error)) from None

MOA_RUN = "results/moa/runs/{study}/{objective}/{arm}"
MOA_CHECKPOINT = "results/moa/checkpoints/{study}/{objective}/{arm}/seed-0"
MOA_DATA = "results/moa/data/{data}"
# Tables that are put together from all runs.
MOA_COMPARED = ["moa_runs", "moa_curves", "moa_throughput", "moa_arms", "moa_differences"]
MOA_TABLES = [name for name, declared in MOA.items() if declared.path == f"tables/{name}.parquet"]


def moa_digest(wildcards):
    """Changes with what the settings say of this job, so that another arm's numbers repeat nothing."""
    job = MOA_SETTINGS.job(wildcards.study, wildcards.objective, wildcards.arm)
    arm = MOA_SETTINGS.arms[job.arm]
    parts = (job, arm, MOA_SETTINGS.arms.get(arm.of), MOA_SETTINGS.tasks[job.objective], MOA_SETTINGS.model)
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def moa_run_files(name):
    """Files of this name of all jobs."""
    return [f"{MOA_RUN}/{name}".format(**vars(job)) for job in MOA_SETTINGS.jobs()]


def moa_kept_checkpoints():
    """The file that is written last of each trained model that is looked into."""
    return [f"{MOA_CHECKPOINT}/done.json".format(**vars(job)) for job in MOA_SETTINGS.kept()]


def moa_data_files():
    """The files that name data sets, by their names without folder and suffix, which name the folders of token ids."""
    files = [task.data_file for task in MOA_SETTINGS.tasks.values() if task.data_file]
    return {os.path.splitext(os.path.basename(file))[0]: file for file in files}


def moa_prepared_data(wildcards):
    """The file that is written last of the token ids that a job reads; none where its texts come with CPython."""
    file = MOA_SETTINGS.tasks[wildcards.objective].data_file
    return [f"{MOA_DATA}/done.json".format(data=name) for name, other in moa_data_files().items() if other == file]


def moa_figures():
    """Names of the figures, FIGURE.OBJECTIVE, without those of what the settings do not vary."""
    found = []
    for objective in moa_objectives(MOA_SETTINGS):
        shown = {"perplexity", "translation", "curves", "throughput"} | moa_varied(MOA_SETTINGS, objective)
        kind = MOA_SETTINGS.tasks[objective].kind
        found += [
            f"{name}.{objective}" for name, figure in MOA_FIGURES.items() if name in shown and kind in figure.kinds
        ]
    return found


def moa_about(wildcards):
    """What the tables do not say of a figure's objective, as options."""
    task = MOA_SETTINGS.tasks[split(wildcards.figure)[1]]
    decay = ["--decay", str(task.schedule.decay)] if task.schedule.shape == "plateau" else []
    return ["--texts", moa_texts_of(task), *decay]


def moa_notebook_parameters():
    """Parameters of the notebook: objective -> its figures, its texts and the share of the steps after a plateau."""
    objectives = {}
    for name in moa_figures():
        task = MOA_SETTINGS.tasks[split(name)[1]]
        decay = task.schedule.decay if task.schedule.shape == "plateau" else None
        own = {"kind": task.kind, "texts": moa_texts_of(task), "decay": decay, "figures": []}
        objectives.setdefault(task.objective, own)["figures"].append(split(name)[0])
    return json.dumps({"objectives": objectives})


def moa_shown():
    """Notebook and figures of MoA that are there, for the index page to link."""
    folder = Path("results/figures/moa")
    found = [*folder.glob("*.png"), *folder.glob("*/*.png"), *Path("results/notebooks").glob("moa.html")]
    return sorted(map(str, found))

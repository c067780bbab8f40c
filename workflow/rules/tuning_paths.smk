# What EMoE's fine-tuning is told, and where its files lie: functions of the settings, no rules.
from moe_atlas.tuning.settings import load_settings

try:
    TUNINGS = load_settings(CONFIG["emoe"])
except AtlasError as error:
    raise WorkflowError(str(error)) from None


def tuning_job(wildcards):
    """What a job tunes."""
    return TUNINGS.job(wildcards.study, wildcards.tuned, wildcards.task, int(wildcards.part))


def tuning_digest(wildcards):
    """Changes with what the settings say of this job, so that another study's numbers repeat nothing."""
    job = tuning_job(wildcards)
    model, task = TUNINGS.models[job.model], TUNINGS.tasks[job.task]
    parts = (job, TUNINGS.studies[job.study], TUNINGS.training, TUNINGS.copies, model, task)
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def data_file(task):
    """The file of data sets of a task; empty where its texts come with CPython."""
    scheme, _, locator = TUNINGS.tasks[task]["source"].partition(":")
    return "" if scheme == "demo" else locator


def tuned_files(name):
    """Files of this name of all jobs."""
    return [f"results/emoe/runs/{job.study}/{job.model}/{job.task}/{job.part}/{name}" for job in TUNINGS.jobs()]

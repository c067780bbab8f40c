# What the MoA experiments are told, and where their files lie: functions of the settings, no rules.
from moe_atlas.moa.settings import load_settings as load_moa_settings
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

# The jobs that the statistics of a model's weights are dealt to: one, or one for each range of its layers and each share
# of their pairs; and what they are told. Functions of the config, no rules. These two numbers name wildcards of our own:
# scattergather gives one wildcard for one number, two of them cannot be in one path, and of one job it would be a part to
# gather as well.
from moe_atlas.parametric.gather import NAMES as MADE_TOGETHER

PARTS = {"part": CONFIG["parts"], "matching_part": CONFIG["matching_parts"]}
SPLIT = max(PARTS.values()) > 1
WEIGHTS_JOB = os.path.join("{model}", *(f"{{{key}}}-of-{number}" for key, number in PARTS.items() if SPLIT))


def weights_table(name, whole):
    """One table of a model's weights: of all of them, or as the job named by WEIGHTS_JOB writes it."""
    if whole or not SPLIT:
        return f"results/models/{{model}}/{TABLES[name].path}"
    model, parts = WEIGHTS_JOB.split("/", 1)
    return f"results/models/{model}/parametric/parts/{parts}/{name}.parquet"


def weights_part(wildcards):
    """Which part of a model's weights a job looks at. None of it where there is one job."""
    names = {key: f"--{key.replace('_', '-')}" for key in PARTS if SPLIT}
    return [part for key, name in names.items() for part in (name, wildcards[key], f"{name}s", PARTS[key])]


def weights_options(wildcards):
    """Options of the statistics of a model's weights: of every program that computes them."""
    return [
        f"--matching-layers={model(wildcards).matching_layers}",
        *("--matching-max-layers", CONFIG["matching_max_layers"], "--matching-max-pairs", CONFIG["matching_max_pairs"]),
        *("--projection-max-neurons", CONFIG["projection_max_neurons"], "--dbscan-eps", CONFIG["dbscan_eps"]),
        *("--dbscan-min-samples", CONFIG["dbscan_min_samples"]),
    ]


def parts_of(name):
    """What all these jobs write of one table of the model, layers first."""
    numbers = {key: range(1, number + 1) for key, number in PARTS.items()}
    return expand(weights_table(name, whole=False), **numbers, allow_missing=True)

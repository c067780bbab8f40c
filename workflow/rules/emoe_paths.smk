# What of EMoE is made, and where it lies: functions of the config and the sheets, no rules.
from moe_atlas.plotting.registry import EMOE_FIGURES, EMOE_MECHANISM, EMOE_TUNING
from moe_atlas.tables import EMOE, TUNING

# Tables of EMoE across models, before tuning and of tuned models.
EMOE_TABLES = [name for name, declared in (EMOE | TUNING).items() if declared.path == f"tables/{name}.parquet"]


def derivation_file(name):
    """Last file that is written when a dense model becomes an EMoE."""
    return f"{sheets.CHECKPOINTS}/{name}/emoe.json"


def derivation_options(wildcards):
    """Options of derive_emoe.py: how this row's experts are made."""
    row = model(wildcards)
    values = {
        "--experts": row.emoe_experts,
        "--top-k": row.emoe_top_k,
        "--layers": row.emoe_layers or "all",
        "--score": row.emoe_score,
        "--split": row.emoe_split,
        "--seed": row.emoe_seed,
    }
    return [str(part) for pair in values.items() for part in pair]


def emoe_models():
    """Dense models of the mechanism test: those that the config names, or else those that other rows name or are made from."""
    named = CONFIG["mechanism_models"].split()
    unknown = [name for name in named if name not in MODELS]
    if unknown:
        raise WorkflowError(f"config, key mechanism_models: the model sheet has no enabled row {', '.join(unknown)}.")
    wanted = named or {name for row in MODELS.values() for name in (row.dense_reference, row.dense)}
    return [name for name, row in MODELS.items() if name in wanted and row.keep]


def emoe_parts(wildcards):
    """Files that one table of EMoE is put together from."""
    return [f"results/models/{name}/emoe/{wildcards.table}.parquet" for name in emoe_models()]


def emoe_figures(figures):
    """Names of these figures, with their corpus where they have one."""
    found = []
    for name, figure in figures.items():
        corpora = corpora_of(figure.kinds)
        found += [f"{name}.{corpus}" for corpus in corpora] if figure.kinds else [name]
    return found


def emoe_mechanism_files():
    """Figures of the mechanism test of every model; a sentence where there is no dense model or no long corpus."""
    models = emoe_models()
    if not models:
        raise WorkflowError("EMoE: no row of the model sheet names a dense model; name one in mechanism_models.")
    if not corpora_of(["long"]):
        raise WorkflowError("EMoE: the corpus sheet has no long corpus that a dense model could read; add one.")
    return [f"results/figures/emoe/{model}/{name}.png" for model in models for name in emoe_figures(EMOE_MECHANISM)]


def emoe_tuned_files():
    """Figures of every model that is tuned, without those of what its studies do not vary."""
    models = dict.fromkeys(job.model for job in TUNINGS.jobs())
    wanted = {model: {"arms", "selection"} | TUNINGS.varied(model) for model in models}
    figures = [(model, name) for model in models for name in EMOE_TUNING if name in wanted[model]]
    return [f"results/figures/emoe/{model}/{name}.png" for model, name in figures]


def emoe_shown():
    """Notebook and figures of EMoE that are there, for the index page to link."""
    found = [*Path("results/figures/emoe").glob("*/*.png"), *Path("results/notebooks").glob("emoe.html")]
    return sorted(map(str, found))

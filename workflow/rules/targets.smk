# Targets that stand for a stage: `snakemake --cores all figures`. None of them makes a file itself.
localrules:
    checkpoints,
    parametric,
    behavioral,
    tables,
    figures,
    notebooks,
    emoe,
    moa,


rule checkpoints:
    """Every checkpoint, trained where it has to be, and its description."""
    input:
        [checkpoint_file(name) for name in MODELS],


rule parametric:
    """Every table made from weights."""
    input:
        [path for name in MODELS for path in tables_of(name, corpus_tables=False)],


rule behavioral:
    """Every table made from what the experts do on a corpus."""
    input:
        [path for name in MODELS for path in tables_of(name, corpus_tables=True)],


rule tables:
    """Every table across models."""
    input:
        expand("results/tables/{table}.{format}", table=all_tables(), format=["parquet", "csv"]),


rule figures:
    """Every figure of every model and across models."""
    input:
        expand("results/figures/{model}/{experiment}/figures.json", model=MODELS, experiment=experiments()),
        expand("results/figures/comparison/{comparison}.png", comparison=COMPARISONS),


rule notebooks:
    """Every notebook, executed."""
    input:
        expand("results/notebooks/{notebook}-{model}.html", notebook=["parametric", "behavioral"], model=MODELS),
        "results/notebooks/comparison.html",


rule emoe:
    """What EMoE makes of dense models, before tuning and tuned: tables, figures, notebook. No part of `all`."""
    input:
        expand("results/tables/{table}.{format}", table=EMOE_TABLES, format=["parquet", "csv"]),
        lambda wildcards: emoe_mechanism_files(),
        lambda wildcards: emoe_tuned_files(),
        "results/notebooks/emoe.html",


rule moa:
    """Attention heads as experts, trained, compared and looked into: tables, figures, notebook. No part of `all`."""
    input:
        expand("results/tables/{table}.{format}", table=MOA_TABLES, format=["parquet", "csv"]),
        moa_kept_checkpoints(),
        expand("results/tables/{table}.{format}", table=HEADS, format=["parquet", "csv"]),
        expand("results/figures/moa/{figure}.png", figure=moa_figures()),
        lambda wildcards: heads_files(),
        "results/notebooks/moa.html",

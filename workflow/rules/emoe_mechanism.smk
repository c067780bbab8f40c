# The mechanism test of EMoE: whether the FFNs of dense models are modular before any tuning. Not part of `all`.
#
# Inputs    checkpoint.json of the dense models that mechanism_models names, the weights, the long corpora
# Outputs   results/models/{model}/emoe/{table}.parquet, results/tables/{table}.{parquet,csv} for emoe_mechanism,
#           emoe_selection and emoe_correlation, results/figures/emoe/{backbone}/{figure}.{png,pdf}
# Cost      three minutes for a demo model on one core: 341 masked forward passes over 4000 tokens of each corpus; on the
#           row's GPUs where it has some
rule emoe_mechanism:
    """Mass, agreement, correlation, domains and loss of a dense model's experts, by cluster and by chance."""
    input:
        code=ancient("scripts/emoe_mechanism.py"),
        checkpoint="results/models/{model}/checkpoint.json",
        corpora=[f"results/corpora/{name}.parquet" for name in corpora_of(["long"])],
    output:
        mechanism="results/models/{model}/emoe/emoe_mechanism.parquet",
        selection="results/models/{model}/emoe/emoe_selection.parquet",
        correlation="results/models/{model}/emoe/emoe_correlation.parquet",
    log:
        "results/logs/emoe_mechanism/{model}.log",
    benchmark:
        "results/benchmarks/emoe_mechanism/{model}.tsv"
    wildcard_constraints:
        model=one_of(emoe_models()),
    conda:
        "../envs/mechanism.yaml"
    threads: model_threads
    resources:
        mem_mb=memory,
        runtime=lambda wildcards: model(wildcards).runtime,
        gpu=gpus,
        gres=gres,
        gpu_jobs=gpu_jobs,
    params:
        corpora=[part for c in corpora_of(["long"]) for part in ("--corpus", c, f"results/corpora/{c}.parquet")],
        grid=CONFIG["mechanism_grid"],
        layers=["--layers", *CONFIG["mechanism_layers"].split()] if CONFIG["mechanism_layers"] else [],
        seeds=CONFIG["mechanism_seeds"],
        tokens=CONFIG["mechanism_loss_tokens"],
        seed=CONFIG["seed"],
        dtype=lambda wildcards: model(wildcards).dtype,
        device=device,
        method=METHODS["emoe_mechanism"],
    shell:
        """
        exec >{log:q} 2>&1
        python {input.code:q} --model {wildcards.model:q} --checkpoint {input.checkpoint:q} {params.corpora:q} \
            --grid {params.grid:q} {params.layers:q} --seeds {params.seeds:q} --loss-tokens {params.tokens:q} \
            --seed {params.seed:q} --dtype {params.dtype:q} --device {params.device:q} \
            --mechanism {output.mechanism:q} --selection {output.selection:q} --correlation {output.correlation:q}
        """


use rule aggregate_tables as aggregate_emoe with:
    # One table of EMoE, of all models.
    input:
        code=code("scripts/aggregate_tables.py"),
        tables=emoe_parts,
    log:
        "results/logs/aggregate_emoe/{table}.log",
    benchmark:
        "results/benchmarks/aggregate_emoe/{table}.tsv"
    wildcard_constraints:
        table=one_of(EMOE),


rule plot_emoe:
    """One figure of EMoE of one model."""
    input:
        code=code("scripts/plot_emoe.py"),
        tables=lambda wildcards: [
            f"results/tables/{table}.parquet" for table in EMOE_FIGURES[split(wildcards.figure)[0]].tables
        ],
    output:
        figure=report(
            "results/figures/emoe/{backbone}/{figure}.png",
            caption="../report/emoe.rst",
            category="EMoE",
            labels={"model": "{backbone}", "experiment": "{figure}"},
        ),
        pdf="results/figures/emoe/{backbone}/{figure}.pdf",
    log:
        "results/logs/plot_emoe/{backbone}/{figure}.log",
    benchmark:
        "results/benchmarks/plot_emoe/{backbone}/{figure}.tsv"
    wildcard_constraints:
        figure=one_of(emoe_figures(EMOE_FIGURES)),
    localrule: True
    conda:
        "../envs/plotting.yaml"
    threads: 1
    resources:
        mem_mb=2000,
        runtime=30,
    params:
        tables=lambda wildcards, input: options("--table", input.tables),
    shell:
        """
        exec >{log:q} 2>&1
        python {input.code[0]:q} --model {wildcards.backbone:q} --figure {output.figure:q} --pdf {output.pdf:q} \
            {params.tables:q}
        """

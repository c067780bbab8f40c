# The attention experts of models under one lens: load, tokens, circuits, maps and ablation, beside FFN experts of the
# same model. Rows of the model sheet with attention experts, and the MoA models that the experiments keep.
#
# Inputs    checkpoint.json of those rows, done.json of those models, the weights; the long corpora, or the pairs of the
#           test that a model translates
# Outputs   results/moa/pairs/{objective}.parquet, results/moa/looked/{looked}/{table}.parquet,
#           results/tables/{table}.{parquet,csv} for the tables of moe_atlas/tables/heads.py,
#           results/figures/moa/{looked}/{figure}.{png,pdf}
# Cost      a minute for a demo model on one core; for a model of billions a GPU, or fewer heads_loss_tokens. Models of
#           the sheet are read one layer at a time; the hidden states of one pass for each expert of each layer lie in a
#           file beside the outputs where they do not fit. MoA models are loaded whole: as much memory as their weights,
#           twice while they are loaded
rule moa_pairs:
    """The test of a translation task as token ids."""
    input:
        code=ancient("scripts/moa_pairs.py"),
        settings=ancient(CONFIG["moa"]),
        data=moa_prepared_data,
    output:
        "results/moa/pairs/{objective}.parquet",
    log:
        "results/logs/moa_pairs/{objective}.log",
    benchmark:
        "results/benchmarks/moa_pairs/{objective}.tsv"
    wildcard_constraints:
        objective=one_of(MOA_SETTINGS.tasks),
    localrule: True
    conda:
        "../envs/moa.yaml"
    threads: 1
    resources:
        mem_mb=4000,
        runtime=30,
    params:
        task=lambda wildcards: repr(MOA_SETTINGS.tasks[wildcards.objective]),
        data=lambda wildcards, input: [f"--data={os.path.dirname(path)}" for path in input.data],
        method=METHODS["moa_pairs"],
    shell:
        """
        exec >{log:q} 2>&1
        python {input.code:q} --settings {input.settings:q} --objective {wildcards.objective:q} {params.data:q} \
            --output {output:q}
        """


rule analyse_heads:
    """Every table of one model's attention experts."""
    input:
        code=ancient("scripts/analyse_heads.py"),
        checkpoint=heads_checkpoint,
        corpora=lambda wildcards: list(heads_corpora(wildcards.looked).values()),
    output:
        expand(f"{HEADS_FOLDER}/{{table}}.parquet", table=HEADS, allow_missing=True),
    log:
        "results/logs/analyse_heads/{looked}.log",
    benchmark:
        "results/benchmarks/analyse_heads/{looked}.tsv"
    wildcard_constraints:
        looked=one_of(HEADS_LOOKED),
    conda:
        "../envs/mechanism.yaml"
    threads: heads_threads
    resources:
        mem_mb=lambda wildcards, attempt: heads_need(wildcards, "mem_mb") * attempt,
        runtime=lambda wildcards: heads_need(wildcards, "runtime"),
        gpu=heads_gpus,
        gres=lambda wildcards: (
            f"{CONFIG['gpu_gres']}:1" if CONFIG["gpu_gres"] and heads_need(wildcards, "gpus") else None
        ),
        gpu_jobs=lambda wildcards: 1 if heads_need(wildcards, "gpus") else None,
    params:
        corpora=lambda wildcards: [
            part for pair in heads_corpora(wildcards.looked).items() for part in ("--corpus", *pair)
        ],
        amounts=[
            part
            for name in ("tokens", "loss_tokens", "map_tokens")
            for part in (f"--{name.replace('_', '-')}", CONFIG[f"heads_{name}"])
        ],
        seed=CONFIG["seed"],
        dtype=lambda wildcards: MODELS[wildcards.looked].dtype if wildcards.looked in MODELS else "auto",
        device=device,
        folder=lambda wildcards, output: os.path.dirname(output[0]),
        method=METHODS["analyse_heads"],
    shell:
        """
        exec >{log:q} 2>&1
        python {input.code:q} --model {wildcards.looked:q} --checkpoint {input.checkpoint:q} {params.corpora:q} \
            {params.amounts:q} --seed {params.seed:q} --dtype {params.dtype:q} --device {params.device:q} \
            --output-dir {params.folder:q}
        """


use rule aggregate_tables as aggregate_heads with:
    # One table of attention experts, of all models.
    input:
        code=code("scripts/aggregate_tables.py"),
        tables=heads_parts,
    log:
        "results/logs/aggregate_heads/{table}.log",
    benchmark:
        "results/benchmarks/aggregate_heads/{table}.tsv"
    wildcard_constraints:
        table=one_of(HEADS),


rule plot_heads:
    """One figure of the attention experts of one model."""
    input:
        code=code("scripts/plot_heads.py"),
        tables=lambda wildcards: [
            f"results/tables/{table}.parquet" for table in HEADS_FIGURES[split(wildcards.figure)[0]].tables
        ],
    output:
        figure=report(
            "results/figures/moa/{looked}/{figure}.png",
            caption="../report/heads.rst",
            category="Attention experts",
            labels={"model": "{looked}", "experiment": "{figure}"},
        ),
        pdf="results/figures/moa/{looked}/{figure}.pdf",
    log:
        "results/logs/plot_heads/{looked}/{figure}.log",
    benchmark:
        "results/benchmarks/plot_heads/{looked}/{figure}.tsv"
    wildcard_constraints:
        looked=one_of(HEADS_LOOKED),
        figure=one_of(sorted({name for looked in HEADS_LOOKED for name in heads_figures(looked)})),
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
        python {input.code[0]:q} --model {wildcards.looked:q} --figure {output.figure:q} --pdf {output.pdf:q} \
            {params.tables:q}
        """

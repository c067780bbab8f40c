# Figures: one folder a model and experiment, and comparisons across models.
#
# Inputs    the tables below results/models/ and results/tables/
# Outputs   results/figures/{model}/{experiment}/{figures.json,overview.png} and, beside them, the figures of each layer
#           that figures.json lists; results/figures/comparison/{comparison}.{png,pdf}
# Cost      seconds; no GPU
for name, declared in EXPERIMENTS.items():

    # One rule an experiment, because each has its own caption in the report.
    rule:
        """All figures of one model and experiment."""
        name:
            f"plot_{name}"
        input:
            code=code("scripts/plot_model.py"),
            tables=experiment_tables,
        output:
            manifest="results/figures/{model}/{experiment}/figures.json",
            overview=report(
                "results/figures/{model}/{experiment}/overview.png",
                caption=f"../report/{name}.rst",
                category=(
                    "Weights" if TABLES[declared.tables[0]].path.startswith("parametric/") else "Behavior on text"
                ),
                subcategory=declared.title,
                labels={"model": "{model}", "experiment": "{experiment}"},
            ),
        log:
            f"results/logs/plot_{name}/{{model}}/{{experiment}}.log",
        benchmark:
            f"results/benchmarks/plot_{name}/{{model}}/{{experiment}}.tsv"
        wildcard_constraints:
            experiment=one_of([full for full in experiments() if split(full)[0] == name]),
        conda:
            "../envs/plotting.yaml"
        threads: 1
        resources:
            mem_mb=2000,
            runtime=30,
        params:
            tables=lambda wildcards, input: options("--table", input.tables),
            directory=lambda wildcards, output: os.path.dirname(output.manifest),
        shell:
            """
            exec >{log:q} 2>&1
            python {input.code[0]:q} --model {wildcards.model:q} --experiment {wildcards.experiment:q} \
                {params.tables:q} --output-dir {params.directory:q} --manifest {output.manifest:q} \
                --overview {output.overview:q}
            """


rule plot_layer:
    """One figure of one layer, for who asks for it by its path."""
    input:
        code=code("scripts/plot_model.py"),
        tables=experiment_tables,
    output:
        "results/figures/{model}/{experiment}/layer_{layer}_{range}.{format}",
    log:
        "results/logs/plot_layer/{model}/{experiment}/layer_{layer}_{range}_{format}.log",
    benchmark:
        "results/benchmarks/plot_layer/{model}/{experiment}/layer_{layer}_{range}_{format}.tsv"
    wildcard_constraints:
        layer="(all|[0-9]+)(_attention)?",
        range="auto|full",
        format="png|pdf",
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
        python {input.code[0]:q} --model {wildcards.model:q} --experiment {wildcards.experiment:q} {params.tables:q} \
            --figure {output:q}
        """


rule plot_comparison:
    """One figure across all models."""
    input:
        code=code("scripts/plot_comparison.py"),
        tables=lambda wildcards: [f"results/tables/{table}.parquet" for table in COMPARISONS[wildcards.comparison]],
        checkpoints=[checkpoint_file(name) for name in MODELS],
    output:
        figure=report(
            "results/figures/comparison/{comparison}.png",
            caption="../report/comparison.rst",
            category="Comparison",
            labels={"model": "all", "experiment": "{comparison}"},
        ),
        pdf="results/figures/comparison/{comparison}.pdf",
    log:
        "results/logs/plot_comparison/{comparison}.log",
    benchmark:
        "results/benchmarks/plot_comparison/{comparison}.tsv"
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
        python {input.code[0]:q} --figure {output.figure:q} --pdf {output.pdf:q} {params.tables:q} \
            --checkpoints {input.checkpoints:q}
        """

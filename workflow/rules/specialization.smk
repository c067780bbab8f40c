# Specialisation of experts that shows between texts and between revisions of a model.
#
# Inputs    what extraction recorded of a model's long corpora; tables of models that share a series, short corpora
# Outputs   results/models/{model}/behavioral/domain.parquet, results/tables/saturation.{parquet,csv}
# Cost      seconds; no GPU
rule domain_table:
    """How differently a model's experts are used on its long corpora."""
    input:
        code=code("scripts/domain_table.py"),
        activations=expand(
            "results/models/{{model}}/behavioral/{corpus}/activations.safetensors", corpus=corpora_of(["long"])
        ),
    output:
        "results/models/{model}/behavioral/domain.parquet",
    log:
        "results/logs/domain_table/{model}.log",
    benchmark:
        "results/benchmarks/domain_table/{model}.tsv"
    conda:
        "../envs/statistics.yaml"
    threads: 1
    resources:
        mem_mb=2000,
        runtime=30,
    shell:
        """
        exec >{log:q} 2>&1
        python {input.code[0]:q} --activations {input.activations:q} --output {output:q}
        """


rule saturation:
    """Choices of the models of each series against those of its last model."""
    input:
        code=code("scripts/saturation.py"),
        tables=[path for run in series_runs() for path in run[3:]],
    output:
        parquet="results/tables/saturation.parquet",
        csv=report(
            "results/tables/saturation.csv",
            caption="../report/table.rst",
            category="Tables",
            labels={"model": "all", "experiment": "saturation"},
        ),
    log:
        "results/logs/saturation.log",
    benchmark:
        "results/benchmarks/saturation.tsv"
    localrule: True
    conda:
        "../envs/statistics.yaml"
    threads: 1
    resources:
        mem_mb=2000,
        runtime=30,
    params:
        choices=[part for run in series_runs() for part in ("--choices", *run)],
    shell:
        """
        exec >{log:q} 2>&1
        python {input.code[0]:q} {params.choices:q} --parquet {output.parquet:q} --csv {output.csv:q}
        """

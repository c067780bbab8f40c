# Aggregates: each table over all models.
#
# Inputs    the tables below results/models/
# Outputs   results/tables/{table}.{parquet,csv}
# Cost      seconds; no GPU
rule aggregate_tables:
    """One table of every model, put together."""
    input:
        code=code("scripts/aggregate_tables.py"),
        tables=lambda wildcards: [path for name in MODELS for path in model_tables(name, wildcards.table)],
    output:
        parquet="results/tables/{table}.parquet",
        csv=report(
            "results/tables/{table}.csv",
            caption="../report/table.rst",
            category="Tables",
            labels={"model": "all", "experiment": "{table}"},
        ),
    log:
        "results/logs/aggregate_tables/{table}.log",
    benchmark:
        "results/benchmarks/aggregate_tables/{table}.tsv"
    localrule: True
    conda:
        "../envs/statistics.yaml"
    threads: 1
    resources:
        mem_mb=2000,
        runtime=30,
    shell:
        """
        exec >{log:q} 2>&1
        python {input.code[0]:q} --table {wildcards.table:q} --inputs {input.tables:q} \
            --parquet {output.parquet:q} --csv {output.csv:q}
        """

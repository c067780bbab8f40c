# Claims: the paper's observations judged for each model, and its numbers beside ours.
#
# Inputs    the tables of results/tables/, checkpoint.json of every model, the sheets of claims and published numbers
# Outputs   results/tables/{claims,published}.{parquet,csv}
# Cost      seconds a model of the demo, a minute for a model of 64 experts; no GPU
rule judge_claims:
    """A verdict on each claim for each model."""
    input:
        code=code("scripts/judge_claims.py"),
        claims=CONFIG["claims"],
        tables=[f"results/tables/{table}.parquet" for table in JUDGED_TABLES if table in all_tables()],
        checkpoints=[checkpoint_file(name) for name in MODELS],
    output:
        parquet="results/tables/claims.parquet",
        csv=report(
            "results/tables/claims.csv",
            caption="../report/table.rst",
            category="Tables",
            labels={"model": "all", "experiment": "claims"},
        ),
    log:
        "results/logs/judge_claims.log",
    benchmark:
        "results/benchmarks/judge_claims.tsv"
    localrule: True
    conda:
        "../envs/statistics.yaml"
    threads: 1
    resources:
        mem_mb=4000,
        runtime=60,
    params:
        tables=lambda wildcards, input: options("--table", input.tables),
        corpora=corpora_of(["long"]),
        seed=CONFIG["seed"],
    shell:
        """
        exec >{log:q} 2>&1
        python {input.code[0]:q} --claims {input.claims:q} {params.tables:q} --checkpoints {input.checkpoints:q} \
            --corpora {params.corpora:q} --seed {params.seed:q} --parquet {output.parquet:q} --csv {output.csv:q}
        """


rule compare_published:
    """Published numbers, with ours where the sheet has that model."""
    input:
        code=code("scripts/compare_published.py"),
        published=CONFIG["published"],
        tables=[f"results/tables/{table}.parquet" for table in PUBLISHED_TABLES if table in all_tables()],
        checkpoints=[checkpoint_file(name) for name in MODELS],
    output:
        parquet="results/tables/published.parquet",
        csv=report(
            "results/tables/published.csv",
            caption="../report/table.rst",
            category="Tables",
            labels={"model": "all", "experiment": "published"},
        ),
    log:
        "results/logs/compare_published.log",
    benchmark:
        "results/benchmarks/compare_published.tsv"
    localrule: True
    conda:
        "../envs/statistics.yaml"
    threads: 1
    resources:
        mem_mb=4000,
        runtime=60,
    params:
        tables=lambda wildcards, input: options("--table", input.tables),
        rounding=["--paper-rounding"] if CONFIG["paper_rounding"] else [],
    shell:
        """
        exec >{log:q} 2>&1
        python {input.code[0]:q} --published {input.published:q} {params.tables:q} {params.rounding:q} \
            --checkpoints {input.checkpoints:q} --parquet {output.parquet:q} --csv {output.csv:q}
        """

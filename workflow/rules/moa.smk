# Attention heads as experts (MoA): models are trained up to their plateaus in many arms and compared seed by seed. Not
# part of `all`: `snakemake moa`, or make moa.
#
# Inputs    the settings that the config names, config/moa.yaml; texts that CPython brings along
# Outputs   results/moa/, results/tables/moa_{runs,curves,throughput,arms,differences,costs}.{parquet,csv}
# Cost      see README.md; no GPU, no network
rule train_moa:
    """Train one arm with all its seeds. Weights and tokenizer of seed 0 lie beside the declared file."""
    input:
        code=ancient("scripts/train_moa.py"),
        settings=ancient(CONFIG["moa"]),
        data=moa_prepared_data,
    output:
        runs=f"{MOA_RUN}/runs.parquet",
        curves=f"{MOA_RUN}/curves.parquet",
        throughput=f"{MOA_RUN}/throughput.parquet",
        checkpoint=f"{MOA_CHECKPOINT}/done.json",
    log:
        "results/logs/train_moa/{study}/{objective}/{arm}.log",
    benchmark:
        "results/benchmarks/train_moa/{study}/{objective}/{arm}.tsv"
    wildcard_constraints:
        study=one_of(MOA_SETTINGS.studies),
        objective=one_of(MOA_SETTINGS.tasks),
        arm=one_of(MOA_SETTINGS.arms),
    conda:
        "../envs/moa.yaml"
    threads: 1
    resources:
        gpu=None if CONFIG["gpu_gres"] else MOA_SETTINGS.job_needs["gpus"] or None,
        gres=f"{CONFIG['gpu_gres']}:1" if CONFIG["gpu_gres"] and MOA_SETTINGS.job_needs["gpus"] else None,
        gpu_jobs=1 if MOA_SETTINGS.job_needs["gpus"] else None,
        mem_mb=MOA_SETTINGS.job_needs["mem_mb"],
        runtime=MOA_SETTINGS.job_needs["runtime"],
    params:
        settings=moa_digest,
        method=METHODS["train_moa"],
        device=device,
        checkpoint=lambda wildcards, output: os.path.dirname(output.checkpoint),
        data=lambda wildcards, input: [f"--data={os.path.dirname(path)}" for path in input.data],
    shell:
        """
        exec >{log:q} 2>&1
        python {input.code:q} --settings {input.settings:q} --study {wildcards.study:q} \
            --objective {wildcards.objective:q} --arm {wildcards.arm:q} {params.data:q} --device {params.device:q} \
            --runs {output.runs:q} --curves {output.curves:q} --throughput {output.throughput:q} \
            --checkpoint {params.checkpoint:q}
        """


rule compare_moa:
    """All runs in one table, and the arms against their baselines."""
    input:
        code=code("scripts/compare_moa.py"),
        settings=CONFIG["moa"],
        runs=moa_run_files("runs.parquet"),
        curves=moa_run_files("curves.parquet"),
        throughput=moa_run_files("throughput.parquet"),
    output:
        expand("results/tables/{table}.{format}", table=MOA_COMPARED, format=["parquet", "csv"]),
    log:
        "results/logs/compare_moa.log",
    benchmark:
        "results/benchmarks/compare_moa.tsv"
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
        python {input.code[0]:q} --settings {input.settings:q} --runs {input.runs:q} --curves {input.curves:q} \
            --throughput {input.throughput:q} --output results/tables
        """


rule moa_costs:
    """Published parameters and multiply-accumulates beside those of the formulas. No model is trained for it."""
    input:
        code=code("scripts/moa_costs.py"),
        published="config/moa_published.tsv",
    output:
        expand("results/tables/moa_costs.{format}", format=["parquet", "csv"]),
    log:
        "results/logs/moa_costs.log",
    benchmark:
        "results/benchmarks/moa_costs.tsv"
    localrule: True
    conda:
        "../envs/moa.yaml"
    threads: 1
    resources:
        mem_mb=2000,
        runtime=30,
    shell:
        """
        exec >{log:q} 2>&1
        python {input.code[0]:q} --published {input.published:q} --output results/tables
        """

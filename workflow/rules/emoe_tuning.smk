# EMoE's fine-tuning: dense models are tuned in many arms on small tasks and compared seed by seed. Not part of `all`:
# `snakemake emoe`, or make emoe.
#
# Inputs    the settings that the config names, config/emoe.yaml; pre-trained models; tasks
# Outputs   results/emoe/, results/tables/emoe_{runs,differences,training_selection}.{parquet,csv}
# Cost      at most 28 minutes on two cores with the shipped settings; no GPU, no network
rule tune_emoe:
    """Tune a model on a task in some arms, with all their seeds."""
    input:
        code=ancient("scripts/tune_emoe.py"),
        settings=ancient(CONFIG["emoe"]),
        ready=lambda wildcards: TUNINGS.models[wildcards.tuned]["ready"],
        examples="results/emoe/tasks/{task}.parquet",
    output:
        runs="results/emoe/runs/{study}/{tuned}/{task}/{part}/runs.parquet",
        selection="results/emoe/runs/{study}/{tuned}/{task}/{part}/selection.parquet",
    log:
        "results/logs/tune_emoe/{study}/{tuned}/{task}/{part}.log",
    benchmark:
        "results/benchmarks/tune_emoe/{study}/{tuned}/{task}/{part}.tsv"
    wildcard_constraints:
        study=one_of(TUNINGS.studies),
        tuned=one_of(TUNINGS.models),
        task=one_of(TUNINGS.tasks),
        part=r"\d+",
    conda:
        "../envs/tuning.yaml"
    threads: 1
    resources:
        gpu=None if CONFIG["gpu_gres"] else TUNINGS.job_needs["gpus"] or None,
        gres=f"{CONFIG['gpu_gres']}:1" if CONFIG["gpu_gres"] and TUNINGS.job_needs["gpus"] else None,
        gpu_jobs=1 if TUNINGS.job_needs["gpus"] else None,
        mem_mb=TUNINGS.job_needs["mem_mb"],
        runtime=TUNINGS.job_needs["runtime"],
    params:
        settings=tuning_digest,
        method=METHODS["tune_emoe"],
        device=device,
    shell:
        """
        exec >{log:q} 2>&1
        python {input.code:q} --settings {input.settings:q} --study {wildcards.study:q} --model {wildcards.tuned:q} \
            --task {wildcards.task:q} --part {wildcards.part:q} --examples {input.examples:q} \
            --device {params.device:q} --runs {output.runs:q} --selection {output.selection:q}
        """


rule compare_emoe:
    """All runs in one table, and the arms against their baselines."""
    input:
        code=code("scripts/compare_emoe.py"),
        runs=tuned_files("runs.parquet"),
        selection=tuned_files("selection.parquet"),
    output:
        expand(
            "results/tables/{table}.{format}",
            table=["emoe_runs", "emoe_differences", "emoe_training_selection"],
            format=["parquet", "csv"],
        ),
    log:
        "results/logs/compare_emoe.log",
    benchmark:
        "results/benchmarks/compare_emoe.tsv"
    localrule: True
    conda:
        "../envs/tuning.yaml"
    threads: 1
    resources:
        mem_mb=2000,
        runtime=30,
    shell:
        """
        exec >{log:q} 2>&1
        python {input.code[0]:q} --runs {input.runs:q} --selection {input.selection:q} --output results/tables
        """

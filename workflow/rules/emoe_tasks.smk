# The tasks of EMoE's fine-tuning.
#
# Inputs    the texts that CPython brings along, or the file of a task that names data sets
# Outputs   results/emoe/tasks/{task}.parquet
# Cost      seconds; of data sets their download, and only fetch_task asks the network; no GPU
rule prepare_task:
    """Make the examples of a task from texts that CPython brings along."""
    input:
        code=code("scripts/prepare_task.py"),
    output:
        "results/emoe/tasks/{task}.parquet",
    log:
        "results/logs/prepare_task/{task}.log",
    benchmark:
        "results/benchmarks/prepare_task/{task}.tsv"
    wildcard_constraints:
        task=one_of(name for name in TUNINGS.tasks if not data_file(name)),
    conda:
        "../envs/tuning.yaml"
    threads: 1
    resources:
        mem_mb=3000,
        runtime=30,
    params:
        source=lambda wildcards: TUNINGS.tasks[wildcards.task]["source"],
    shell:
        """
        exec >{log:q} 2>&1
        python {input.code[0]:q} --task {wildcards.task:q} --source {params.source:q} --output {output:q}
        """


rule fetch_task:
    """Make the examples of a task from the data sets that its file names."""
    input:
        code=ancient("scripts/prepare_task.py"),
        file=lambda wildcards: data_file(wildcards.task),
    output:
        "results/emoe/tasks/{task}.parquet",
    log:
        "results/logs/fetch_task/{task}.log",
    benchmark:
        "results/benchmarks/fetch_task/{task}.tsv"
    wildcard_constraints:
        task=one_of(name for name in TUNINGS.tasks if data_file(name)),
    retries: 2
    localrule: True
    conda:
        "../envs/tuning.yaml"
    threads: 1
    resources:
        downloads=1,
        mem_mb=8000,
        runtime=4 * 60,
    params:
        method=METHODS["fetch_task"],
        source=lambda wildcards: TUNINGS.tasks[wildcards.task]["source"],
    # Nothing is told to the bucket in which `datasets` counts what is loaded.
    shell:
        """
        exec >{log:q} 2>&1
        HF_HUB_OFFLINE=0 HF_DATASETS_OFFLINE=0 HF_UPDATE_DOWNLOAD_COUNTS=0 \
            python {input.code:q} --task {wildcards.task:q} --source {params.source:q} --output {output:q}
        """

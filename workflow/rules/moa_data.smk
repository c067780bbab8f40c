# What the MoA experiments translate and read.
#
# Inputs    the settings that the config names; the files of data sets that they name
# Outputs   results/moa/data/{data}/, results/tables/moa_tasks.{parquet,csv}
# Cost      seconds for the demo; of data sets their download and hours of tokenizing, and only fetch_moa_data asks the
#           network; no GPU
rule describe_moa_tasks:
    """Say how large and how hard the tasks are."""
    input:
        code=code("scripts/describe_moa_tasks.py"),
        settings=CONFIG["moa"],
        data=[f"{MOA_DATA}/done.json".format(data=name) for name in moa_data_files()],
    output:
        parquet="results/tables/moa_tasks.parquet",
        csv="results/tables/moa_tasks.csv",
    log:
        "results/logs/describe_moa_tasks.log",
    benchmark:
        "results/benchmarks/describe_moa_tasks.tsv"
    localrule: True
    conda:
        "../envs/moa.yaml"
    threads: 1
    resources:
        mem_mb=2000,
        runtime=30,
    params:
        data=lambda wildcards, input: [os.path.dirname(path) for path in input.data],
    shell:
        """
        exec >{log:q} 2>&1
        python {input.code[0]:q} --settings {input.settings:q} --data {params.data:q} \
            --parquet {output.parquet:q} --csv {output.csv:q}
        """


rule fetch_moa_data:
    """Make a tokenizer and token ids of the data sets that a file names. They lie beside the declared file."""
    input:
        code=ancient("scripts/prepare_moa_data.py"),
        file=lambda wildcards: moa_data_files()[wildcards.data],
    output:
        f"{MOA_DATA}/done.json",
    log:
        "results/logs/fetch_moa_data/{data}.log",
    benchmark:
        "results/benchmarks/fetch_moa_data/{data}.tsv"
    wildcard_constraints:
        data=one_of(moa_data_files()),
    retries: 2
    localrule: True
    conda:
        "../envs/moa.yaml"
    threads: 8
    resources:
        downloads=1,
        mem_mb=32000,
        runtime=12 * 60,
    params:
        method=METHODS["fetch_moa_data"],
    # Nothing is told to the bucket in which `datasets` counts what is loaded.
    shell:
        """
        exec >{log:q} 2>&1
        HF_HUB_OFFLINE=0 HF_DATASETS_OFFLINE=0 HF_UPDATE_DOWNLOAD_COUNTS=0 RAYON_NUM_THREADS={threads} \
            python {input.code:q} --file {input.file:q} --output {output:q}
        """

# Corpora: a row of the corpus sheet becomes a table of sequences.
#
# Inputs    config/corpora.tsv; the text file of a file: row; the Hub for an hf: row
# Outputs   results/corpora/{corpus}.parquet
# Cost      seconds, and for an hf: row the download of the files that hold its texts; no GPU. Only fetch_corpus asks
#           the network.
rule prepare_corpus:
    """Read a corpus and cut it into sequences."""
    input:
        code=ancient("scripts/prepare_corpus.py"),
        file=lambda wildcards: [file for file in [corpus(wildcards).file] if file],
    output:
        "results/corpora/{corpus}.parquet",
    log:
        "results/logs/prepare_corpus/{corpus}.log",
    benchmark:
        "results/benchmarks/prepare_corpus/{corpus}.tsv"
    wildcard_constraints:
        corpus=one_of(corpora_where(lambda row: not row.repository)),
    conda:
        "../envs/corpora.yaml"
    threads: 1
    resources:
        mem_mb=2000,
        runtime=30,
    params:
        source=lambda wildcards: corpus(wildcards).source,
        kind=lambda wildcards: corpus(wildcards).kind,
        rule=lambda wildcards: corpus(wildcards).rule,
        start_at=lambda wildcards: corpus(wildcards).start_at,
        max_sequences=lambda wildcards: corpus(wildcards).max_sequences,
        method=METHODS["prepare_corpus"],
    shell:
        """
        exec >{log:q} 2>&1
        python {input.code:q} --corpus {wildcards.corpus:q} --source {params.source:q} --kind {params.kind:q} \
            --rule {params.rule:q} --start-at={params.start_at:q} --max-sequences {params.max_sequences:q} \
            --output {output:q}
        """


rule fetch_corpus:
    """Fetch what is needed of a data set of the Hub into its client's cache (HF_HOME), check it and cut it."""
    input:
        code=ancient("scripts/fetch_corpus.py"),
    output:
        "results/corpora/{corpus}.parquet",
    log:
        "results/logs/fetch_corpus/{corpus}.log",
    benchmark:
        "results/benchmarks/fetch_corpus/{corpus}.tsv"
    wildcard_constraints:
        corpus=one_of(corpora_where(lambda row: row.repository)),
    retries: 2
    localrule: True
    conda:
        "../envs/corpora.yaml"
    threads: 1
    resources:
        downloads=1,
        mem_mb=2000,
        runtime=4 * 60,
    params:
        repository=lambda wildcards: corpus(wildcards).repository,
        revision=lambda wildcards: corpus(wildcards).revision,
        subset=lambda wildcards: corpus(wildcards).subset,
        split=lambda wildcards: corpus(wildcards).split,
        column=lambda wildcards: corpus(wildcards).column,
        kind=lambda wildcards: corpus(wildcards).kind,
        rule=lambda wildcards: corpus(wildcards).rule,
        start_at=lambda wildcards: corpus(wildcards).start_at,
        max_sequences=lambda wildcards: corpus(wildcards).max_sequences,
        method=METHODS["prepare_corpus"],
    # Nothing is told to the bucket in which `datasets` counts what is loaded.
    shell:
        """
        exec >{log:q} 2>&1
        HF_HUB_OFFLINE=0 HF_DATASETS_OFFLINE=0 HF_UPDATE_DOWNLOAD_COUNTS=0 \
            python {input.code:q} --corpus {wildcards.corpus:q} --repository {params.repository:q} \
            --revision {params.revision:q} --subset={params.subset:q} --split {params.split:q} \
            --column {params.column:q} --kind {params.kind:q} --rule {params.rule:q} \
            --start-at={params.start_at:q} --max-sequences {params.max_sequences:q} --output {output:q}
        """

# Corpora: a row of the corpus sheet becomes a table of sequences.
#
# Inputs    config/corpora.tsv; the text file of a file: row
# Outputs   results/corpora/{corpus}.parquet
# Cost      seconds; no GPU, no network
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
        max_sequences=lambda wildcards: corpus(wildcards).max_sequences,
        method=METHODS["prepare_corpus"],
    shell:
        """
        exec >{log:q} 2>&1
        python {input.code:q} --corpus {wildcards.corpus:q} --source {params.source:q} --kind {params.kind:q} \
            --rule {params.rule:q} --max-sequences {params.max_sequences:q} --output {output:q}
        """

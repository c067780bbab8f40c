# A pass over a long corpus in several jobs, as parts in its row of the corpus sheet says.
#
# Inputs    what extract_activations has
# Outputs   what extract_activations writes for a corpus of one part, and the same bytes
# Cost      each job reads the whole model and does its share of the arithmetic; seconds for putting the parts together
use rule extract_activations as extract_part with:
    output:
        activations=temp("results/models/{model}/behavioral/{corpus}/parts/{part}-of-{parts}/activations.safetensors"),
    log:
        "results/logs/extract_part/{model}/{corpus}/{part}-of-{parts}.log",
    benchmark:
        "results/benchmarks/extract_part/{model}/{corpus}/{part}-of-{parts}.tsv"
    wildcard_constraints:
        model=one_of(models_where(lambda row: row.keep)),
        corpus=one_of(corpora_where(lambda row: row.parts > 1)),
        part=r"\d+",
        parts=r"\d+",
    params:
        written=lambda wildcards: ["--part", wildcards.part, "--parts", wildcards.parts],


rule merge_activations:
    """Put the parts together, as one job would have written them."""
    input:
        code=ancient("scripts/merge_activations.py"),
        checkpoint="results/models/{model}/checkpoint.json",
        corpus="results/corpora/{corpus}.parquet",
        parts=corpus_parts,
    output:
        activations="results/models/{model}/behavioral/{corpus}/activations.safetensors",
        tokens="results/models/{model}/behavioral/{corpus}/tokens.parquet",
        intermediate="results/models/{model}/behavioral/{corpus}/intermediate.safetensors",
    log:
        "results/logs/merge_activations/{model}/{corpus}.log",
    benchmark:
        "results/benchmarks/merge_activations/{model}/{corpus}.tsv"
    wildcard_constraints:
        model=one_of(models_where(lambda row: row.keep)),
        corpus=one_of(corpora_where(lambda row: row.parts > 1)),
    conda:
        "../envs/extraction.yaml"
    threads: 1
    resources:
        mem_mb=lambda wildcards, attempt: 4000 * attempt,
        runtime=30,
    params:
        method=METHODS["extract_activations"],
    shell:
        """
        exec >{log:q} 2>&1
        python {input.code:q} --model {wildcards.model:q} --corpus {wildcards.corpus:q} \
            --checkpoint {input.checkpoint:q} --corpus-file {input.corpus:q} --parts {input.parts:q} \
            --activations {output.activations:q} --tokens {output.tokens:q} --intermediate {output.intermediate:q}
        """

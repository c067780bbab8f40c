# Behavioral statistics: what the experts do on a corpus.
#
# Inputs    results/models/{model}/checkpoint.json and the weights it names; results/corpora/{corpus}.parquet
# Outputs   results/models/{model}/behavioral/{corpus}/{activations.safetensors,intermediate.safetensors,*.parquet}
# Cost      one forward pass a corpus, every expert on every token, on the row's GPUs or on the CPU; seconds for the
#           tables. The activations are sums that every table is made from, so that a new table needs no new pass.
#           A long corpus with parts in its row is passed through in so many jobs (corpus_parts.smk).
# State     with keep_state a pass keeps its finished layers in state/ beside its outputs, until these are written; not an
#           output, so that Snakemake leaves it where it is when the job is killed
rule extract_activations:
    """One pass through the model, one layer in memory at a time."""
    input:
        code=ancient("scripts/extract_activations.py"),
        checkpoint="results/models/{model}/checkpoint.json",
        dense=dense_reference,
        corpus="results/corpora/{corpus}.parquet",
    output:
        activations="results/models/{model}/behavioral/{corpus}/activations.safetensors",
        tokens="results/models/{model}/behavioral/{corpus}/tokens.parquet",
        intermediate="results/models/{model}/behavioral/{corpus}/intermediate.safetensors",
    log:
        "results/logs/extract_activations/{model}/{corpus}.log",
    benchmark:
        "results/benchmarks/extract_activations/{model}/{corpus}.tsv"
    wildcard_constraints:
        model=one_of(models_where(lambda row: row.keep)),
        corpus=one_of(corpora_where(lambda row: row.parts == 1)),
    conda:
        "../envs/extraction.yaml"
    threads: model_threads
    resources:
        mem_mb=memory,
        kept_mb=kept_memory,
        runtime=lambda wildcards: model(wildcards).runtime,
        gpu=gpus,
        gres=gres,
        gpu_jobs=gpu_jobs,
    params:
        kind=lambda wildcards: corpus(wildcards).kind,
        dtype=lambda wildcards: model(wildcards).dtype,
        dense=lambda wildcards: options("--dense-reference", dense_reference(wildcards)),
        device=device,
        written=lambda wildcards, output: ["--tokens", output.tokens, "--intermediate", output.intermediate],
        state=state_options,
        method=METHODS["extract_activations"],
    shell:
        """
        exec >{log:q} 2>&1
        python {input.code:q} --model {wildcards.model:q} --corpus {wildcards.corpus:q} --kind {params.kind:q} \
            --checkpoint {input.checkpoint:q} {params.dense:q} --corpus-file {input.corpus:q} --dtype {params.dtype:q} \
            --device {params.device:q} --memory {resources.kept_mb:q} --activations {output.activations:q} \
            {params.written:q} {params.state:q}
        """


rule long_tables:
    """Counts and means of a long corpus."""
    input:
        code=code("scripts/behavioral_tables.py"),
        activations="results/models/{model}/behavioral/{corpus}/activations.safetensors",
        tokens="results/models/{model}/behavioral/{corpus}/tokens.parquet",
    output:
        load="results/models/{model}/behavioral/{corpus}/load.parquet",
        rank_counts="results/models/{model}/behavioral/{corpus}/rank_counts.parquet",
        norm_score_cross="results/models/{model}/behavioral/{corpus}/norm_score_cross.parquet",
        output_similarity="results/models/{model}/behavioral/{corpus}/output_similarity.parquet",
        router_rule="results/models/{model}/behavioral/{corpus}/router_rule.parquet",
        activation_ratio="results/models/{model}/behavioral/{corpus}/activation_ratio.parquet",
        documents="results/models/{model}/behavioral/{corpus}/documents.parquet",
        specialization="results/models/{model}/behavioral/{corpus}/specialization.parquet",
    log:
        "results/logs/long_tables/{model}/{corpus}.log",
    benchmark:
        "results/benchmarks/long_tables/{model}/{corpus}.tsv"
    wildcard_constraints:
        corpus=one_of(corpora_of(["long"])),
    conda:
        "../envs/statistics.yaml"
    threads: 1
    resources:
        mem_mb=2000,
        runtime=30,
    shell:
        """
        exec >{log:q} 2>&1
        python {input.code[0]:q} --activations {input.activations:q} --tokens {input.tokens:q} \
            --load {output.load:q} --norm-score-cross {output.norm_score_cross:q} \
            --rank-counts {output.rank_counts:q} --output-similarity {output.output_similarity:q} \
            --activation-ratio {output.activation_ratio:q} --documents {output.documents:q} \
            --router-rule {output.router_rule:q} --specialization {output.specialization:q}
        """


rule short_tables:
    """Counts and means of a short corpus, and its tables token by token."""
    input:
        code=code("scripts/behavioral_tables.py"),
        activations="results/models/{model}/behavioral/{corpus}/activations.safetensors",
        tokens="results/models/{model}/behavioral/{corpus}/tokens.parquet",
        states="results/models/{model}/behavioral/{corpus}/intermediate.safetensors",
    output:
        load="results/models/{model}/behavioral/{corpus}/load.parquet",
        rank_counts="results/models/{model}/behavioral/{corpus}/rank_counts.parquet",
        norm_score_cross="results/models/{model}/behavioral/{corpus}/norm_score_cross.parquet",
        output_similarity="results/models/{model}/behavioral/{corpus}/output_similarity.parquet",
        router_rule="results/models/{model}/behavioral/{corpus}/router_rule.parquet",
        activation_ratio="results/models/{model}/behavioral/{corpus}/activation_ratio.parquet",
        documents="results/models/{model}/behavioral/{corpus}/documents.parquet",
        specialization="results/models/{model}/behavioral/{corpus}/specialization.parquet",
        routing="results/models/{model}/behavioral/{corpus}/routing.parquet",
        norm_score="results/models/{model}/behavioral/{corpus}/norm_score.parquet",
        output_similarity_tokens="results/models/{model}/behavioral/{corpus}/output_similarity_tokens.parquet",
        intermediate="results/models/{model}/behavioral/{corpus}/intermediate.parquet",
    log:
        "results/logs/short_tables/{model}/{corpus}.log",
    benchmark:
        "results/benchmarks/short_tables/{model}/{corpus}.tsv"
    wildcard_constraints:
        corpus=one_of(corpora_of(["short"])),
    conda:
        "../envs/statistics.yaml"
    threads: 1
    resources:
        mem_mb=2000,
        runtime=30,
    shell:
        """
        exec >{log:q} 2>&1
        python {input.code[0]:q} --activations {input.activations:q} --tokens {input.tokens:q} \
            --load {output.load:q} --norm-score-cross {output.norm_score_cross:q} \
            --rank-counts {output.rank_counts:q} --output-similarity {output.output_similarity:q} \
            --activation-ratio {output.activation_ratio:q} --documents {output.documents:q} \
            --router-rule {output.router_rule:q} --routing {output.routing:q} --norm-score {output.norm_score:q} \
            --output-similarity-tokens {output.output_similarity_tokens:q} \
            --states {input.states:q} --intermediate {output.intermediate:q} \
            --specialization {output.specialization:q}
        """

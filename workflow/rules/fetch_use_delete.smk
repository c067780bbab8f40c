# Fetch, use, delete: a model of the Hub that is larger than the disk (keep is false in its row).
#
# Inputs    the Hub; results/corpora/{corpus}.parquet of every corpus; the description of the dense reference
# Outputs   what download_checkpoint, the weight statistics and extract_activations make for a kept model
# Cost      one download and one forward pass over all corpora together; at most three shards in results/shards/{model}.
#           It needs the network where it runs, and starts anew when a corpus is added.
rule fetch_use_delete:
    """Fetch the shards in the order of the layers, use each, delete it after its last layer."""
    input:
        code=ancient("scripts/fetch_use_delete.py"),
        dense=dense_reference,
        corpora=expand("results/corpora/{corpus}.parquet", corpus=CORPORA),
    output:
        checkpoint="results/models/{model}/checkpoint.json",
        similarity="results/models/{model}/parametric/similarity.parquet",
        matching="results/models/{model}/parametric/matching.parquet",
        projection="results/models/{model}/parametric/projection.parquet",
        explained="results/models/{model}/parametric/explained_variance.parquet",
        behavioral=expand("results/models/{{model}}/behavioral/{corpus}/{file}", corpus=CORPORA, file=RECORDED),
    log:
        "results/logs/fetch_use_delete/{model}.log",
    benchmark:
        "results/benchmarks/fetch_use_delete/{model}.tsv"
    wildcard_constraints:
        model=one_of(models_where(lambda row: not row.keep)),
    retries: 2
    conda:
        "../envs/hub.yaml"
    threads: model_threads
    resources:
        downloads=1,
        mem_mb=memory,
        runtime=lambda wildcards: model(wildcards).runtime,
        gpu=gpus,
        gres=gres,
        gpu_jobs=gpu_jobs,
    params:
        repository=lambda wildcards: model(wildcards).repository,
        revision=lambda wildcards: model(wildcards).revision,
        dtype=lambda wildcards: model(wildcards).dtype,
        dense=lambda wildcards: options("--dense-reference", dense_reference(wildcards)),
        corpora=corpus_options,
        statistics=weights_options,
        device=device,
        methods=[METHODS[name] for name in ("describe_checkpoint", "weight_statistics", "extract_activations")],
    shell:
        """
        HF_HUB_OFFLINE=0 python {input.code:q} --model {wildcards.model:q} --repository {params.repository:q} \
            --revision {params.revision:q} {params.dense:q} --dtype {params.dtype:q} --device {params.device:q} \
            --shards results/shards/{wildcards.model:q} {params.corpora:q} --similarity {output.similarity:q} \
            --matching {output.matching:q} --projection {output.projection:q} \
            --explained-variance {output.explained:q} {params.statistics:q} \
            --output {output.checkpoint:q} 2>&1 | tee {log:q} >&2
        """

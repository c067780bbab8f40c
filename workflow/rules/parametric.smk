# Parametric statistics: what the weights of the experts and of the router say.
#
# Inputs    results/models/{model}/checkpoint.json and the weights it names
# Outputs   results/models/{model}/parametric/{similarity,regression}.parquet
# Cost      one read of the expert weights, layer by layer, on the CPU; seconds for the regression
rule weight_similarity:
    """Cosine similarity of experts by weight matrix, by mean neuron and by router row."""
    input:
        code=ancient("scripts/weight_similarity.py"),
        checkpoint="results/models/{model}/checkpoint.json",
        dense=dense_reference,
    output:
        "results/models/{model}/parametric/similarity.parquet",
    log:
        "results/logs/weight_similarity/{model}.log",
    benchmark:
        "results/benchmarks/weight_similarity/{model}.tsv"
    wildcard_constraints:
        model=one_of(models_where(lambda row: row.keep)),
    conda:
        "../envs/checkpoints.yaml"
    threads: model_threads
    resources:
        mem_mb=memory,
        runtime=lambda wildcards: model(wildcards).runtime,
    params:
        dense=lambda wildcards: options("--dense-reference", dense_reference(wildcards)),
        method=METHODS["weight_similarity"],
    shell:
        """
        exec >{log:q} 2>&1
        python {input.code:q} --model {wildcards.model:q} --checkpoint {input.checkpoint:q} {params.dense:q} \
            --output {output:q}
        """


rule router_regression:
    """Regression of router similarity on weight similarity, layer by layer."""
    input:
        code=code("scripts/router_regression.py"),
        similarity="results/models/{model}/parametric/similarity.parquet",
    output:
        "results/models/{model}/parametric/regression.parquet",
    log:
        "results/logs/router_regression/{model}.log",
    benchmark:
        "results/benchmarks/router_regression/{model}.tsv"
    conda:
        "../envs/statistics.yaml"
    threads: 1
    resources:
        mem_mb=2000,
        runtime=30,
    params:
        seed=CONFIG["seed"],
    shell:
        """
        exec >{log:q} 2>&1
        python {input.code[0]:q} --similarity {input.similarity:q} --seed {params.seed:q} --output {output:q}
        """

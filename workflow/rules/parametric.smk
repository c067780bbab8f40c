# Parametric statistics: what the weights of the experts and of the router say.
#
# Inputs    results/models/{model}/checkpoint.json and the weights it names
# Outputs   results/models/{model}/parametric/*.parquet
# Cost      one read of the expert weights for each rule, layer by layer, on the CPU; a matched pair costs a matrix
#           product and an assignment for each matrix (seconds to a minute at 14,336 neurons); the components of n neurons of
#           width d cost a matrix product for each matrix (2 n d^2 operations); seconds for the regression
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


rule neuron_matching:
    """Match the neurons of experts, pair by pair, beside what independent experts would give."""
    input:
        code=ancient("scripts/neuron_matching.py"),
        checkpoint="results/models/{model}/checkpoint.json",
        dense=dense_reference,
    output:
        "results/models/{model}/parametric/matching.parquet",
    log:
        "results/logs/neuron_matching/{model}.log",
    benchmark:
        "results/benchmarks/neuron_matching/{model}.tsv"
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
        layers=lambda wildcards: model(wildcards).matching_layers,
        most_layers=CONFIG["matching_max_layers"],
        most_pairs=CONFIG["matching_max_pairs"],
        method=METHODS["neuron_matching"],
    shell:
        """
        exec >{log:q} 2>&1
        python {input.code:q} --model {wildcards.model:q} --checkpoint {input.checkpoint:q} {params.dense:q} \
            --layers={params.layers:q} --max-layers {params.most_layers:q} --max-pairs {params.most_pairs:q} \
            --output {output:q}
        """


rule project_experts:
    """Principal components of the experts' matrices and of their neurons, beside those of independent weights."""
    input:
        code=ancient("scripts/project_experts.py"),
        checkpoint="results/models/{model}/checkpoint.json",
        dense=dense_reference,
    output:
        projection="results/models/{model}/parametric/projection.parquet",
        explained="results/models/{model}/parametric/explained_variance.parquet",
    log:
        "results/logs/project_experts/{model}.log",
    benchmark:
        "results/benchmarks/project_experts/{model}.tsv"
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
        most_neurons=CONFIG["projection_max_neurons"],
        eps=CONFIG["dbscan_eps"],
        min_samples=CONFIG["dbscan_min_samples"],
        method=METHODS["project_experts"],
    shell:
        """
        exec >{log:q} 2>&1
        python {input.code:q} --model {wildcards.model:q} --checkpoint {input.checkpoint:q} {params.dense:q} \
            --max-neurons {params.most_neurons:q} --dbscan-eps {params.eps:q} \
            --dbscan-min-samples {params.min_samples:q} --projection {output.projection:q} \
            --explained-variance {output.explained:q}
        """

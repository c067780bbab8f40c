# Parametric statistics: what the weights of the experts and of the router say.
#
# Inputs    results/models/{model}/checkpoint.json and the weights it names
# Outputs   results/models/{model}/parametric/*.parquet
# Cost      one read of the layers with experts, on the CPU; a matched pair costs a matrix product and an assignment for
#           each matrix (half a minute of a core at 14,336 neurons); the components of n neurons of width d cost half a
#           matrix product for each matrix (n d^2 operations); seconds for the regression
rule weight_statistics:
    """Similarity of experts, matched neurons and principal components: all tables of the weights in one read."""
    input:
        code=ancient("scripts/weight_statistics.py"),
        checkpoint="results/models/{model}/checkpoint.json",
        dense=dense_reference,
    output:
        **{
            name: temp(weights_table(name, whole=False)) if SPLIT else weights_table(name, whole=True)
            for name in MADE_TOGETHER
        },
    log:
        f"results/logs/weight_statistics/{WEIGHTS_JOB}.log",
    benchmark:
        f"results/benchmarks/weight_statistics/{WEIGHTS_JOB}.tsv"
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
        parts=weights_part,
        statistics=weights_options,
        method=METHODS["weight_statistics"],
    shell:
        """
        exec >{log:q} 2>&1
        python {input.code:q} --model {wildcards.model:q} --checkpoint {input.checkpoint:q} {params.dense:q} \
            {params.parts:q} {params.statistics:q} \
            --similarity {output.similarity:q} --matching {output.matching:q} --projection {output.projection:q} \
            --explained-variance {output.explained_variance:q}
        """


if SPLIT:

    rule gather_weight_statistics:
        """Put the parts together, as one job would have written them."""
        input:
            **{name: parts_of(name) for name in MADE_TOGETHER},
            code=code("scripts/gather_weight_statistics.py"),
        output:
            **{name: weights_table(name, whole=True) for name in MADE_TOGETHER},
        log:
            "results/logs/gather_weight_statistics/{model}.log",
        benchmark:
            "results/benchmarks/gather_weight_statistics/{model}.tsv"
        wildcard_constraints:
            model=one_of(models_where(lambda row: row.keep)),
        localrule: True
        conda:
            "../envs/statistics.yaml"
        threads: 1
        resources:
            mem_mb=2000,
            runtime=30,
        shell:
            """
            exec >{log:q} 2>&1
            python {input.code[0]:q} \
                --similarity-parts {input.similarity:q} --similarity {output.similarity:q} \
                --matching-parts {input.matching:q} --matching {output.matching:q} \
                --projection-parts {input.projection:q} --projection {output.projection:q} \
                --explained-variance-parts {input.explained_variance:q} \
                --explained-variance {output.explained_variance:q}
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

# Checkpoints: the demo models are trained, those of the Hub fetched, and every checkpoint is described.
#
# Inputs    config/models.tsv; the recipes; config.json of a path: row's folder; the Hub for an hf: row
# Outputs   results/checkpoints/{recipe}/training.json, the weights beside it; results/models/{model}/checkpoint.json
# Cost      about a minute a demo training on two cores, two for an encoder; one read of every weight file for the
#           description; no GPU. The network is asked here and in fetch_use_delete.smk only, for the weights.
rule train_demo_checkpoint:
    """Train a demo model. The weights lie beside the declared file, so that a failure never deletes them."""
    input:
        code=ancient("scripts/train_demo_checkpoint.py"),
        start=lambda wildcards: [training_file(recipe) for recipe in start_recipe(wildcards)],
    output:
        "results/checkpoints/{recipe}/training.json",
    log:
        "results/logs/train_demo_checkpoint/{recipe}.log",
    benchmark:
        "results/benchmarks/train_demo_checkpoint/{recipe}.tsv"
    conda:
        "../envs/training.yaml"
    threads: 1
    resources:
        mem_mb=3000,
        runtime=30,
    params:
        start=lambda wildcards: options("--start-from", [f"{sheets.CHECKPOINTS}/{x}" for x in start_recipe(wildcards)]),
        steps_factor=CONFIG["demo_steps_factor"],
        seed=CONFIG["seed"],
        recipe=recipe_digest,
        method=METHODS["train_demo_checkpoint"],
    shell:
        """
        exec >{log:q} 2>&1
        python {input.code:q} --recipe {wildcards.recipe:q} --steps-factor {params.steps_factor:q} \
            --seed {params.seed:q} {params.start:q} --output {output:q}
        """


rule describe_checkpoint:
    """Read the headers of a checkpoint, check them and take the sha256 of its files."""
    input:
        code=ancient("scripts/describe_checkpoint.py"),
        checkpoint=checkpoint_source,
    output:
        "results/models/{model}/checkpoint.json",
    log:
        "results/logs/describe_checkpoint/{model}.log",
    benchmark:
        "results/benchmarks/describe_checkpoint/{model}.tsv"
    wildcard_constraints:
        model=one_of(models_where(lambda row: not row.repository)),
    conda:
        "../envs/checkpoints.yaml"
    threads: 1
    resources:
        mem_mb=memory,
        runtime=lambda wildcards: model(wildcards).runtime,
    params:
        source=lambda wildcards: model(wildcards).source,
        revision=lambda wildcards: model(wildcards).revision,
        directory=lambda wildcards: model(wildcards).directory,
        fingerprint=checkpoint_fingerprint,
        dense=dense_allowed,
        method=METHODS["describe_checkpoint"],
    shell:
        """
        exec >{log:q} 2>&1
        python {input.code:q} --model {wildcards.model:q} --source {params.source:q} --revision={params.revision:q} \
            --directory {params.directory:q} {params.dense:q} --output {output:q}
        """


rule download_checkpoint:
    """Fetch a model of the Hub into its client's cache (HF_HOME) and check every file against the Hub's hashes."""
    input:
        code=ancient("scripts/download_checkpoint.py"),
    output:
        "results/models/{model}/checkpoint.json",
    log:
        "results/logs/download_checkpoint/{model}.log",
    benchmark:
        "results/benchmarks/download_checkpoint/{model}.tsv"
    wildcard_constraints:
        model=one_of(models_where(lambda row: row.repository and row.keep)),
    retries: 2
    localrule: True
    conda:
        "../envs/hub.yaml"
    threads: 1
    resources:
        downloads=1,
        mem_mb=2000,
        runtime=24 * 60,
    params:
        repository=lambda wildcards: model(wildcards).repository,
        revision=lambda wildcards: model(wildcards).revision,
        dense=dense_allowed,
        method=METHODS["describe_checkpoint"],
    # The terminal shows the progress bar, and the log keeps what was said.
    shell:
        """
        HF_HUB_OFFLINE=0 python {input.code:q} --model {wildcards.model:q} --repository {params.repository:q} \
            --revision {params.revision:q} {params.dense:q} --output {output:q} 2>&1 | tee {log:q} >&2
        """

# EMoE: a dense model whose FFNs are dealt to experts becomes a row of its own.
#
# Inputs    results/models/{dense}/checkpoint.json of the row that an emoe: row names, and the weights it stands for
# Outputs   results/checkpoints/{model}/emoe.json; beside it the weights, labels.safetensors, config and tokenizer
# Cost      one read of the dense checkpoint and one copy of it on the disk; a layer's clustering takes seconds, or half a
#           minute of a core at 14,336 neurons, and is done again only for keys that have changed; no GPU
rule derive_emoe:
    """Deal the neurons of a dense model's FFNs to experts. No weight changes. The weights lie beside the declared file."""
    input:
        code=ancient("scripts/derive_emoe.py"),
        dense=lambda wildcards: checkpoint_file(model(wildcards).dense),
    output:
        "results/checkpoints/{model}/emoe.json",
    log:
        "results/logs/derive_emoe/{model}.log",
    benchmark:
        "results/benchmarks/derive_emoe/{model}.tsv"
    wildcard_constraints:
        model=one_of(models_where(lambda row: row.dense)),
    conda:
        "../envs/emoe.yaml"
    threads: 1
    resources:
        mem_mb=memory,
        runtime=lambda wildcards: model(wildcards).runtime,
    params:
        settings=derivation_options,
        method=METHODS["derive_emoe"],
    shell:
        """
        exec >{log:q} 2>&1
        python {input.code:q} --model {wildcards.model:q} --dense {input.dense:q} {params.settings:q} --output {output:q}
        """

# Index: the page that links every model, figure, table and notebook.
#
# Inputs    everything else; what EMoE and MoA have made, where they were run
# Outputs   results/index.html
# Cost      a second; no GPU
rule make_index:
    """Link what there is."""
    input:
        rules.tables.input,
        rules.figures.input,
        rules.notebooks.input,
        code=code("scripts/make_index.py"),
    output:
        "results/index.html",
    log:
        "results/logs/make_index.log",
    benchmark:
        "results/benchmarks/make_index.tsv"
    localrule: True
    conda:
        "../envs/statistics.yaml"
    threads: 1
    resources:
        mem_mb=1000,
        runtime=10,
    params:
        models=list(MODELS),
        # Linked when they are there; never a reason to make them.
        emoe=lambda wildcards: emoe_shown(),
        moa=lambda wildcards: moa_shown(),
    shell:
        """
        exec >{log:q} 2>&1
        python {input.code[0]:q} --models {params.models:q} --output {output:q}
        """

# Figures of the MoA experiments, of each objective that something was trained on. Not part of `all`.
#
# Inputs    results/tables/moa_{arms,runs,curves,throughput,differences}.parquet
# Outputs   results/figures/moa/{figure}.{png,pdf}, figure = FIGURE.OBJECTIVE
# Cost      seconds; no GPU
rule plot_moa:
    """One figure of the experiments of one objective."""
    input:
        code=code("scripts/plot_moa.py"),
        tables=lambda wildcards: [
            f"results/tables/{table}.parquet" for table in MOA_FIGURES[split(wildcards.figure)[0]].tables
        ],
    output:
        figure=report(
            "results/figures/moa/{figure}.png",
            caption="../report/moa.rst",
            category="MoA",
            labels={"experiment": "{figure}"},
        ),
        pdf="results/figures/moa/{figure}.pdf",
    log:
        "results/logs/plot_moa/{figure}.log",
    benchmark:
        "results/benchmarks/plot_moa/{figure}.tsv"
    wildcard_constraints:
        figure=one_of(moa_figures()),
    localrule: True
    conda:
        "../envs/plotting.yaml"
    threads: 1
    resources:
        mem_mb=2000,
        runtime=30,
    params:
        tables=lambda wildcards, input: options("--table", input.tables),
        about=moa_about,
    shell:
        """
        exec >{log:q} 2>&1
        python {input.code[0]:q} --figure {output.figure:q} --pdf {output.pdf:q} {params.tables:q} {params.about:q}
        """

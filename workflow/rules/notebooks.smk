# Notebooks: executed by papermill and converted to HTML.
#
# Inputs    notebooks/*.ipynb; the tables they read
# Outputs   results/notebooks/{notebook}-{model}.html, results/notebooks/{comparison,emoe,moa}.html. The executed .ipynb beside
#           each is no declared output: it stays when a cell fails, to read why.
# Cost      seconds; no GPU
rule model_notebook:
    """The parametric or the behavioral notebook of one model."""
    input:
        code=code("scripts/run_notebook.py"),
        notebook="notebooks/{notebook}.ipynb",
        library=lambda wildcards: code(f"notebooks/{wildcards.notebook}.ipynb")[1:],
        checkpoint="results/models/{model}/checkpoint.json",
        tables=lambda wildcards: tables_of(wildcards.model, corpus_tables=wildcards.notebook == "behavioral"),
    output:
        "results/notebooks/{notebook}-{model}.html",
    log:
        "results/logs/model_notebook/{notebook}-{model}.log",
    benchmark:
        "results/benchmarks/model_notebook/{notebook}-{model}.tsv"
    wildcard_constraints:
        notebook="parametric|behavioral",
    conda:
        "../envs/notebooks.yaml"
    threads: 1
    resources:
        mem_mb=2000,
        runtime=30,
    params:
        executed=lambda wildcards, output: str(PurePath(output[0]).with_suffix(".ipynb")),
        parameters=model_notebook_parameters,
    shell:
        """
        exec >{log:q} 2>&1
        python {input.code[0]:q} --notebook {input.notebook:q} --executed {params.executed:q} --html {output:q} \
            --parameters {params.parameters:q}
        """


rule comparison_notebook:
    """The notebook across all models."""
    input:
        code=code("scripts/run_notebook.py"),
        notebook="notebooks/comparison.ipynb",
        library=code("notebooks/comparison.ipynb")[1:],
        checkpoints=[checkpoint_file(name) for name in MODELS],
        tables=[f"results/tables/{table}.parquet" for table in all_tables()],
    output:
        "results/notebooks/comparison.html",
    log:
        "results/logs/comparison_notebook.log",
    benchmark:
        "results/benchmarks/comparison_notebook.tsv"
    localrule: True
    conda:
        "../envs/notebooks.yaml"
    threads: 1
    resources:
        mem_mb=2000,
        runtime=30,
    params:
        executed=lambda wildcards, output: str(PurePath(output[0]).with_suffix(".ipynb")),
        parameters=lambda wildcards: json.dumps({"models": list(MODELS)}),
    shell:
        """
        exec >{log:q} 2>&1
        python {input.code[0]:q} --notebook {input.notebook:q} --executed {params.executed:q} --html {output:q} \
            --parameters {params.parameters:q}
        """


use rule comparison_notebook as emoe_notebook with:
    # The notebook of EMoE, of all models.
    input:
        code=code("scripts/run_notebook.py"),
        notebook="notebooks/emoe.ipynb",
        library=code("notebooks/emoe.ipynb")[1:],
        tables=[f"results/tables/{table}.parquet" for table in EMOE_TABLES],
    output:
        "results/notebooks/emoe.html",
    log:
        "results/logs/emoe_notebook.log",
    benchmark:
        "results/benchmarks/emoe_notebook.tsv"
    params:
        executed=lambda wildcards, output: str(PurePath(output[0]).with_suffix(".ipynb")),
        parameters=json.dumps({"corpora": corpora_of(["long"])}),


use rule comparison_notebook as moa_notebook with:
    # The notebook of MoA, of all objectives and of all models with attention experts.
    input:
        code=code("scripts/run_notebook.py"),
        notebook="notebooks/moa.ipynb",
        library=code("notebooks/moa.ipynb")[1:],
        tables=[f"results/tables/{table}.parquet" for table in [*MOA_TABLES, *HEADS]],
    output:
        "results/notebooks/moa.html",
    log:
        "results/logs/moa_notebook.log",
    benchmark:
        "results/benchmarks/moa_notebook.tsv"
    params:
        executed=lambda wildcards, output: str(PurePath(output[0]).with_suffix(".ipynb")),
        parameters=moa_notebook_parameters(),

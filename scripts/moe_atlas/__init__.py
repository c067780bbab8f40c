"""MoE Atlas: what mixture-of-experts language models look like inside.

The library knows nothing of Snakemake. Imports point one way:
checkpoints -> architectures -> probe -> parametric, behavioral -> plotting.
"""

__version__ = "0.1.0"

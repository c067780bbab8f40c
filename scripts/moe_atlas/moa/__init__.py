"""Experiments with attention heads as experts (MoA, Zhang et al. 2022, arXiv 2210.05144): trained and compared."""

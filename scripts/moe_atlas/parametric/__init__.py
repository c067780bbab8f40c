"""Statistics of weights: ExpertBank in, polars frames out."""

"""Statistics of a forward pass: recorded arrays in, polars frames out."""

"""Figures: polars frames in, matplotlib figures out."""

"""Figures: polars frames in, matplotlib figures out.

`registry` says which figures there are and needs no matplotlib. The other modules draw
without pyplot, so nothing here depends on a display or on the order of calls.
"""

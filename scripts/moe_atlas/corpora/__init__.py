"""Texts the models read: the demo corpora, the user's files and data sets of the Hub. Nothing here imports torch.

`moe_atlas.corpora.hub` is not imported with the rest: only it needs `datasets` and the network.
"""

from moe_atlas.corpora.demo import DEMO_CORPORA, demo_documents, demo_texts
from moe_atlas.corpora.prepare import COLUMNS, RULES, prepare, sequences

__all__ = ["COLUMNS", "DEMO_CORPORA", "RULES", "demo_documents", "demo_texts", "prepare", "sequences"]

"""Texts the models read: the demo corpora and the user's files. Nothing here imports torch."""

from moe_atlas.corpora.demo import DEMO_CORPORA, demo_documents, demo_texts
from moe_atlas.corpora.prepare import COLUMNS, RULES, prepare

__all__ = ["COLUMNS", "DEMO_CORPORA", "RULES", "demo_documents", "demo_texts", "prepare"]

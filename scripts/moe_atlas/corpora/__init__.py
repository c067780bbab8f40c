"""Texts the models read: the demo corpora and the user's files."""

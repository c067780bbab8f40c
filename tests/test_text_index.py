"""The place of every token in its text, and the blocks of documents."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_atlas.text_index import TextIndex


def test_tokens_have_their_sequence_position_and_block():
    index = TextIndex.of([[5, 6], [7], [8, 9, 5]], documents=[3, 3, 1])
    assert index.token.tolist() == [5, 6, 7, 8, 9, 5]
    assert index.sequence.tolist() == [0, 0, 1, 2, 2, 2]
    assert index.position.tolist() == [0, 1, 0, 0, 1, 2]
    assert index.block.tolist() == [0, 0, 0, 1, 1, 1]
    assert index.blocks == 2 and len(index) == 6


def test_without_documents_every_sequence_is_one():
    index = TextIndex.of([[1, 2], [], [3]])
    assert index.block.tolist() == [0, 0, 1] and index.blocks == 2  # an empty sequence makes no block
    assert TextIndex.of([]).blocks == 0
    with pytest.raises(ValueError, match="1 sequences of 2 documents"):
        TextIndex.of([[1]], documents=[0, 1])


def test_blocks_are_balanced_by_tokens():
    sizes = [1] * 60 + [30] + [1] * 10
    index = TextIndex.of([[0] * size for size in sizes], max_blocks=10)
    tokens = index.block.bincount().tolist()
    assert len(tokens) == 10 and sum(tokens) == 100
    assert sorted(tokens)[-1] == 30 and max(sorted(tokens)[:-1]) <= 10


@settings(max_examples=80, deadline=None)
@given(st.lists(st.integers(0, 20), max_size=60), st.integers(1, 12), st.integers(1, 4))
def test_blocks_are_runs_of_whole_documents_and_none_is_empty(sizes, most, length):
    documents = [number // length for number in range(len(sizes))]
    index = TextIndex.of([[1] * size for size in sizes], documents, most)
    filled = {document for document, size in zip(documents, sizes, strict=True) if size}
    assert index.blocks == min(most, len(filled))
    blocks = index.block.tolist()
    assert blocks == sorted(blocks) and set(blocks) == set(range(index.blocks))
    of_document = {}
    for sequence, block in zip(index.sequence.tolist(), blocks, strict=True):
        of_document.setdefault(documents[sequence], set()).add(block)
    assert all(len(found) == 1 for found in of_document.values())

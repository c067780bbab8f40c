"""Intermediate states of the paper's notebooks, against what the library records of the same prompt.

tests/data/oracle/README.md says what the checkpoints and the arrays are, and where the tolerance comes from.
"""

import numpy as np
import pytest
from test_oracle import INPUTS, ORACLE

from moe_atlas.checkpoints import Checkpoint
from moe_atlas.probe import Text, extract_texts

TOLERANCE = 1e-4


@pytest.mark.parametrize("model", ["mixtral", "deepseek", "grok"])
def test_intermediate_states_are_the_published_ones(model):
    """All neurons of all experts on all tokens, and of Mixtral's F on the dense model's own hidden states."""
    expected = np.load(ORACLE / f"expected/{model}/intermediate_short.npz")
    reference = Checkpoint(ORACLE / "checkpoints/mistral") if model == "mixtral" else None
    text = Text([INPUTS["short"]["ids"]], keep_tokens=True)
    checkpoint = Checkpoint(ORACLE / f"checkpoints/{model}")
    (record,) = extract_texts(checkpoint, [text], dtype="float32", reference=reference)
    assert list(record.states) == [f"layer_{layer}" for layer in expected["layers"]]
    for layer, wanted in zip(expected["layers"], expected["act"], strict=True):
        found = record.states[f"layer_{layer}"].numpy().transpose(1, 0, 2)
        assert found.shape == wanted.shape
        assert np.abs(found - wanted).max() <= TOLERANCE
        assert record.state_labels[f"layer_{layer}"][-1] == ("F" if model == "mixtral" else str(len(wanted) - 1))
        assert wanted.std() > 100 * TOLERANCE  # the comparison is about something


def test_long_texts_keep_no_states():
    text = Text([INPUTS["short"]["ids"]], keep_tokens=False)
    (record,) = extract_texts(Checkpoint(ORACLE / "checkpoints/grok"), [text])
    assert record.sites and record.states == record.state_labels == {}

"""Read what extraction recorded (activations.safetensors): one layer's arrays at a time, no torch."""

import json
import os
from collections.abc import Iterator

import numpy as np
from safetensors import SafetensorError, safe_open

from moe_atlas.errors import AtlasError
from moe_atlas.tables import CHOOSING_SCORES, DOCUMENT_MEASURES, GROUPINGS, SCORES

_MEND = "delete it and run the extraction again"
Arrays = dict[str, np.ndarray]


def _choice_shapes(experts: int, top_k: int) -> dict[str, tuple[int | None, ...]]:
    """Counts of choices (moe_atlas/choices.py); -1 stands for the blocks of documents or the frequent token types."""
    shapes: dict[str, tuple[int | None, ...]] = {
        "choice_tokens": (-1,),
        "choice_used": (top_k + 1,),
        "choice_input_ids": (-1,),
        "choice_next_ids": (-1,),
        **{f"confidence_{name}": (-1,) for name in ("entropy", "margin", "mass")},
        **{f"importance_{name}": (-1, experts) for name in ("count", "gate", "norm", "reap")},
        "importance_output_max": (experts,),
    }
    for prefix, blocks in (("choice_", -1), ("choice_random_", 1)):
        shapes |= {f"{prefix}{name}": (blocks, experts) for name in ("first", "any")}
        shapes |= {f"{prefix}{name}": (blocks, -1, experts) for name in ("input", "next")}
        shapes |= {f"{prefix}pairs": (blocks, experts, experts), f"{prefix}repeats": (blocks, 3)}
    return shapes


def _shapes(entry: dict, kind: str) -> dict[str, tuple[int | None, ...]]:
    """Arrays that a layer and site must have, with their shapes; None stands for the T tokens."""
    experts, top_k, outputs = entry["experts"], entry["top_k"], len(entry["labels"])
    pairs, pair_count = (outputs, outputs), outputs * (outputs + 1) // 2
    shapes: dict[str, tuple[int | None, ...]] = {
        "tokens": (1,),
        "tokens_first": (1,),
        "load_tokens": (experts, top_k),
        "load_tokens_first": (experts, top_k),
        "load_weight": (experts, top_k),
        "rank_counts": (experts, experts),
        "rank_counts_first": (experts, experts),
        "cross_largest": (experts, experts),
        "cross_rank": (experts, experts),
        "cross_tokens": (1,),
        "cosine_sum": pairs,
        "cosine_square": pairs,
        "angular_sum": pairs,
        "angular_square": pairs,
        "cosine_sum_first": pairs,
        "angular_sum_first": pairs,
        "cosine_histogram": (pair_count, -1),
        "cosine_range": (pair_count, 2),
        "cosine_block": (-1, pair_count),
        "document_sum": (2, -1, len(DOCUMENT_MEASURES)),
        "document_count": (2, -1, len(DOCUMENT_MEASURES)),
        "document_tokens": (2, -1),
        "rule_ratio": (2, len(SCORES), experts, 2),
        "rule_spread": (len(SCORES),),
        "rule_weight_sum": (2,),
        "rule_selection": (len(CHOOSING_SCORES), 2, len(GROUPINGS)),
        "rule_epsilon": (1,),
        "rule_logit_error": (1,),
        **_choice_shapes(experts, top_k),
    }
    if entry["site"] == "ffn":
        shapes |= {"activation_histogram": (experts, -1), "activation_edges": (-1,)}
    if kind == "short":
        shapes |= {
            "ids": (None, top_k),
            "weights": (None, top_k),
            "logits": (None, experts),
            "norms": (None, experts),
            "cosine": (None, *pairs),
        }
    return shapes


class Activations:
    """One model's recorded statistics on one corpus.

    metadata: model, corpus, kind ("short" or "long"), layers: a list of {layer, site, experts, top_k,
    labels}, empty for a dense model. Array names and shapes are those of the function above; the
    arrays of a layer are read when they are asked for, so that memory holds one layer.
    Raises AtlasError when the file is missing or damaged, or an array is not what the metadata say.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = os.fspath(path)
        try:
            self._file = safe_open(self.path, framework="numpy")
            self.metadata = json.loads(self._file.metadata()["atlas"])
        except FileNotFoundError:
            raise AtlasError(f"{path}: there is no such file; run the extraction.") from None
        except (SafetensorError, OSError, TypeError, KeyError, json.JSONDecodeError) as error:
            raise AtlasError(f"{path}: this is not a file of recorded activations ({error}); {_MEND}.") from None
        if not {"model", "corpus", "kind", "layers"} <= self.metadata.keys():
            raise AtlasError(f"{path}: its metadata lack model, corpus, kind or layers; {_MEND}.")
        self._names = set(self._file.keys())

    def arrays(self, entry: dict) -> Arrays:
        """The arrays of one element of metadata["layers"], by their names without the prefix."""
        prefix, found, tokens = f"layer_{entry['layer']}.{entry['site']}.", {}, None
        for name, shape in _shapes(entry, self.metadata["kind"]).items():
            if prefix + name not in self._names:
                raise AtlasError(f"{self.path}: the array {prefix}{name} is missing; {_MEND}.")
            array = self._file.get_tensor(prefix + name)
            if shape[0] is None:
                tokens = array.shape[0] if tokens is None else tokens
                shape = (tokens, *shape[1:])
            wanted = tuple(size if wish == -1 else wish for size, wish in zip(array.shape, shape, strict=False))
            if array.shape != wanted:
                raise AtlasError(f"{self.path}: {prefix}{name} has shape {array.shape} and not {shape}; {_MEND}.")
            found[name] = array
        return found

    def each(self, name: str) -> Iterator[tuple[dict, np.ndarray]]:
        """One array of every layer and site, with its element of metadata["layers"]; nothing else is read."""
        for entry in self.metadata["layers"]:
            yield entry, self._file.get_tensor(f"layer_{entry['layer']}.{entry['site']}.{name}")

    def __iter__(self) -> Iterator[tuple[dict, Arrays]]:
        for entry in self.metadata["layers"]:
            yield entry, self.arrays(entry)

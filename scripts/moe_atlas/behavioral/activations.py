"""Read what extraction recorded (activations.safetensors): one layer's arrays at a time, no torch."""

import json
import os
from collections.abc import Iterator

import numpy as np
from safetensors import SafetensorError, safe_open

from moe_atlas.errors import AtlasError
from moe_atlas.tables import GROUPINGS, SCORES

_MEND = "delete it and run the extraction again"
Arrays = dict[str, np.ndarray]


def _shapes(entry: dict, kind: str) -> dict[str, tuple[int | None, ...]]:
    """Arrays that a layer and site must have, with their shapes; None stands for the T tokens."""
    experts, top_k, outputs = entry["experts"], entry["top_k"], len(entry["labels"])
    pairs = (outputs, outputs)
    shapes: dict[str, tuple[int | None, ...]] = {
        "tokens": (1,),
        "load_tokens": (experts, top_k),
        "load_weight": (experts, top_k),
        "rank_counts": (experts, experts),
        "cosine_sum": pairs,
        "cosine_square": pairs,
        "angular_sum": pairs,
        "angular_square": pairs,
        "rule_ratio": (2, len(SCORES), experts, 2),
        "rule_spread": (len(SCORES),),
        "rule_weight_sum": (2,),
        "rule_selection": (len(SCORES) - 1, 2, len(GROUPINGS)),
        "rule_epsilon": (1,),
        "rule_logit_error": (1,),
    }
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
            if array.shape != shape:
                raise AtlasError(f"{self.path}: {prefix}{name} has shape {array.shape} and not {shape}; {_MEND}.")
            found[name] = array
        return found

    def __iter__(self) -> Iterator[tuple[dict, Arrays]]:
        for entry in self.metadata["layers"]:
            yield entry, self.arrays(entry)

"""Parts of a long text on disk: what each of several jobs kept of its batches, and all of it as one job keeps it."""

import json
import os
from collections.abc import Mapping, Sequence

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from moe_atlas import merge
from moe_atlas.errors import AtlasError
from moe_atlas.files import atomic_path
from moe_atlas.record import Part, Record

_MEND = "delete it and run the extraction of this part again"


def write_part(path: str | os.PathLike, part: Part, record: Record, run: Mapping[str, object]) -> None:
    """Write what was kept of a part. run: what all parts must be of, by names that a sentence can hold (JSON values).

    A safetensors file with the tensors of the record, sums as expansions (exact.py); its metadata key `atlas_part` is
    JSON: part, parts, run, layers. The record of a part without batches is empty.
    """
    about = {"part": part.number, "parts": part.count, "run": dict(run), "layers": record.sites}
    with atomic_path(path) as temporary:
        save_file(record.tensors, temporary, metadata={"atlas_part": json.dumps(about)})


def merge_parts(paths: Sequence[str | os.PathLike], run: Mapping[str, object]) -> Record:
    """All parts of a text, in any order, as extract_texts records the whole: the same bits.

    run: what they must be of; parts may say more of themselves, in which they must agree. Besides the result, one layer
    and site of one part is in memory at a time. Raises AtlasError when a part is missing, damaged or of another run.
    """
    parts = [(path, _described(path)) for path in paths]
    _check(parts, run)
    sites = next((about["layers"] for _, about in parts if about["layers"]), [])
    whole = Record()
    for site in sites:
        total: dict[str, torch.Tensor] = {}
        for path in (path for path, about in parts if about["layers"]):
            prefix = f"layer_{site['layer']}.{site['site']}."
            try:
                total = merge.joined(total, _arrays(path, prefix))
            except (SafetensorError, OSError, KeyError, RuntimeError) as error:
                raise AtlasError(f"{path}: its arrays {prefix}* cannot be used ({error}); {_MEND}.") from None
        whole.add(site, merge.closed(total), None)
    return whole


def _described(path: str | os.PathLike) -> dict:
    """What `write_part` wrote into the metadata."""
    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads(file.metadata()["atlas_part"])
        if about.keys() >= {"part", "parts", "run", "layers"}:
            return about
    except FileNotFoundError:
        raise AtlasError(f"{path}: there is no such file; run the extraction of this part.") from None
    except (SafetensorError, OSError, TypeError, KeyError, AttributeError, json.JSONDecodeError):
        pass
    raise AtlasError(f"{path}: this is not a whole file of a part of a corpus; {_MEND}.")


def _arrays(path: str | os.PathLike, prefix: str) -> dict[str, torch.Tensor]:
    """The arrays whose names begin with `prefix`, by the rest of their names."""
    with safe_open(path, framework="pt") as file:
        names = [name for name in sorted(file.keys()) if name.startswith(prefix)]
        # What is loaded is mapped, and the pages of an open file count as memory: copies outlive the file, opened anew.
        return {name.removeprefix(prefix): file.get_tensor(name).clone() for name in names}


def _check(parts: list[tuple[str | os.PathLike, dict]], run: Mapping[str, object]) -> None:
    """AtlasError unless these are all parts of one text, each once, and of one run."""
    first, known = parts[0]
    known = known | {"layers": next((about["layers"] for _, about in parts if about["layers"]), [])}
    for path, about in parts:
        if other := [name for name in run if about["run"].get(name) != run[name]]:
            raise AtlasError(f"{path}: this part is of another {other[0]}; {_MEND}.")
        unlike = [name for name in {**known["run"], **about["run"]} if about["run"].get(name) != known["run"].get(name)]
        unlike += ["number of parts"] if about["parts"] != known["parts"] else []
        unlike += ["layers"] if about["layers"] not in ([], known["layers"]) else []
        if unlike:
            raise AtlasError(
                f"{path}: this part differs from {first} in its {unlike[0]}; delete both and run the extraction again."
            )
    numbers = [about["part"] for _, about in parts]
    for path, about in parts:
        if numbers.count(about["part"]) > 1:
            raise AtlasError(f"{path}: part {about['part']} is there twice; give each part once.")
    missing = [str(number) for number in range(1, known["parts"] + 1) if number not in numbers]
    if missing:
        raise AtlasError(
            f"{first}: of its {known['parts']} parts there is no {' and no '.join(missing)}; "
            "run the extraction of every part first."
        )

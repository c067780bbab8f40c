"""The sheet of claims, checked field by field like the others."""

from dataclasses import dataclass
from pathlib import Path

from moe_atlas.claims.estimators import ESTIMATORS
from moe_atlas.errors import AtlasError
from moe_atlas.sheets import load_rows, suggest


@dataclass(frozen=True)
class Claim:
    """One row of config/claims.tsv, cells typed. parameters: of the estimator, by name."""

    claim: str
    statement: str
    place: str
    paper_mixtral: str
    paper_deepseek: str
    paper_grok: str
    estimator: str
    parameters: dict[str, float]
    direction: str
    null: str
    interval: str
    margin: float
    level: float
    layers: int
    experts: int
    blocks: int


def _parameters(place: str, text: str, estimator: str) -> dict[str, float]:
    """`name=number name=number` as a dict, with all that the estimator needs and nothing it does not know."""
    needed, optional = ESTIMATORS[estimator].parameters, ESTIMATORS[estimator].optional
    column, found = f"{place}, column parameters", {}
    for part in text.split():
        name, _, number = part.partition("=")
        if name not in (*needed, *optional):
            known = ", ".join((*needed, *optional)) or "none"
            raise AtlasError(
                f"{column}: {estimator} has no parameter {name}{suggest(name, (*needed, *optional))}; it has {known}."
            )
        try:
            found[name] = float(number)
        except ValueError:
            raise AtlasError(f"{column}: {part!r} gives {name} no number; write {name}=NUMBER.") from None
    missing = [name for name in needed if name not in found]
    if missing:
        raise AtlasError(f"{column}: {estimator} needs {missing[0]}; write {missing[0]}=NUMBER.")
    return found


def load_claims(path: str | Path) -> dict[str, Claim]:
    """The claims by id, in the order of the sheet. Raises AtlasError on the first fault.

    The columns null and interval say what the estimator does, so they are held to it.
    """
    claims = {}
    for place, row in load_rows(path, "claims"):
        name = row["estimator"]
        if name not in ESTIMATORS:
            raise AtlasError(
                f"{place}, column estimator: there is no estimator {name}{suggest(name, ESTIMATORS)}; "
                f"they are {', '.join(ESTIMATORS)}."
            )
        for column in ("null", "interval"):
            does = getattr(ESTIMATORS[name], column)
            if row[column] != does:
                raise AtlasError(f"{place}, column {column}: that of {name} is not {row[column]!r}; write {does}.")
        row["parameters"] = _parameters(place, row["parameters"], name)
        claims[row["claim"]] = Claim(**row)
    return claims

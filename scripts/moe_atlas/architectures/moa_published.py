"""Published numbers of parameters and MACs beside what the formulas give for the same shapes.

config/moa_published.tsv has one row a number, in millions, with the shape it is for; `extra` is what a model has
besides the formulas, parameters or MACs a token. `counted` names how it is counted:
    model       a model of MoAConfig; MACs of 10 source and 10 target tokens (128 for a masked LM), without attention
                maps and routers, with an output layer of the row's vocabulary (MoA's table 1 fits 32,000 words)
    xl          one attention block of Transformer-XL on `tokens` tokens with as many more of memory: its map and the
                projection of relative positions too (SwitchHead, 2312.07987, the formulas of its appendix)
    jetmoe, jetmoe-active    a JetMoE of this shape: all its parameters, or those that a token meets
    nothing     no formula here is for this model
"""

import csv
import os
from pathlib import Path

import polars as pl

from moe_atlas.architectures.moa_config import MoAConfig
from moe_atlas.architectures.moa_costs import macs, parameters
from moe_atlas.errors import AtlasError

MEMORY = 2  # context of Transformer-XL over the length of a segment
_NUMBERS = {
    *("d", "ffn", "layers", "encoder_layers", "heads", "experts", "k", "head_dim", "vocabulary", "tokens", "extra")
}
SCHEMA = {
    **dict.fromkeys(("model", "task", "quantity"), pl.String),
    **{"published": pl.Float64, "computed": pl.Float64, "digits": pl.Int64, "agrees": pl.Boolean, "note": pl.String},
}


def attention_macs_xl(hidden: int, width: int, heads: int, tokens: int, experts: int = 0, memory: int = MEMORY) -> int:
    """MACs of one attention block of Transformer-XL, with MoA of `experts` experts and k = heads if there are any.

    Multi-head: H (4 T d D + 2 C T^2 D + 2 C T d D), T tokens, C T with the memory. MoA: (2 k + 2) T d D + 2 k C T^2 D
    + 2 C T d D + T d E, as keys, values and positions are projected once.
    """
    projected, products = tokens * hidden * width, 2 * memory * tokens**2 * width
    if experts:
        return (2 * heads + 2 + 2 * memory) * projected + heads * products + tokens * hidden * experts
    return heads * ((4 + 2 * memory) * projected + products)


def jetmoe_parameters(
    hidden: int, ffn: int, layers: int, experts: int, chosen: int, heads: int, width: int, vocabulary: int
) -> tuple[int, int]:
    """All parameters of a JetMoE, and those that a token meets: the chosen experts, and all that is not an expert.

    An attention expert is `heads` query heads with their output, an FFN expert has a gate; the embeddings are tied.
    """
    inner = heads * width
    expert = 2 * hidden * inner + 3 * hidden * ffn
    rest = 2 * hidden * inner + 2 * hidden * experts + 4 * hidden  # keys and values, routers, biases, norms
    outside = vocabulary * hidden + hidden
    return tuple(layers * (count * expert + rest) + outside for count in (experts, chosen))


def read_published(path: str | os.PathLike) -> list[dict[str, str]]:
    """The rows of config/moa_published.tsv; AtlasError where the file is not there."""
    try:
        with Path(path).open(newline="") as file:
            return list(csv.DictReader(file, delimiter="\t"))
    except FileNotFoundError:
        raise AtlasError(f"{path}: the published numbers are not there; restore the file.") from None


def computed(row: dict[str, str]) -> int | None:
    """What the formulas give for a row of the file, in units of one; None where there is no formula for it."""
    counted = row["counted"]
    number = {name: int(text) for name, text in row.items() if name in _NUMBERS and text}
    if counted == "nothing":
        return None
    if counted == "xl":
        heads = number["k"] if row["attention"] == "moa" else number["heads"]
        return attention_macs_xl(number["d"], number["head_dim"], heads, number["tokens"], number.get("experts", 0))
    if counted in ("jetmoe", "jetmoe-active"):
        names = ("d", "ffn", "layers", "experts", "k", "heads", "head_dim", "vocabulary")
        return jetmoe_parameters(*(number[name] for name in names))[counted == "jetmoe-active"]
    if counted != "model":
        raise AtlasError(f"moa_published.tsv, {row['model']}: counted is {counted!r}; see moa_published.py.")
    encoder = number.get("encoder_layers", 0)
    config = MoAConfig(
        objective="translation" if encoder else "masked",
        attention=row["attention"],
        hidden_size=number["d"],
        intermediate_size=number["ffn"],
        num_hidden_layers=number["layers"],
        num_encoder_layers=encoder,
        num_attention_heads=number.get("heads", 1),
        num_attention_experts=number.get("experts", 1),
        num_experts_per_tok=number.get("k", 1),
        head_dim=number["head_dim"],
        attention_bias=row["bias"] == "true",
        vocab_size=number["vocabulary"],
    )
    if row["quantity"] == "parameters":
        return parameters(config).total + number.get("extra", 0)
    tokens = number["tokens"]
    counts = macs(config, tokens, tokens if encoder else 0, attention_map=False)
    return counts.total - counts.router + number.get("extra", 0) * tokens


def published_costs(path: str | os.PathLike) -> pl.DataFrame:
    """The table moa_costs: published and computed in millions, digits after the point that are compared.

    digits may be below 0: -1 compares tens of millions. agrees: both are the same number once rounded so; false also
    where there is no formula, and computed is then null.
    """
    found_rows = []
    for row in read_published(path):
        found, digits = computed(row), int(row["digits"])
        millions = None if found is None else found / 1e6
        agrees = millions is not None and round(millions, digits) == round(float(row["published"]), digits)
        same = {name: row[name] for name in ("model", "task", "quantity", "note")}
        numbers = {"published": float(row["published"]), "computed": millions, "digits": digits, "agrees": agrees}
        found_rows.append(same | numbers)
    return pl.DataFrame(found_rows, schema=SCHEMA)

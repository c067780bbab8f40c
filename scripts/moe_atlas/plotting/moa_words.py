"""What the tables of the MoA experiments and of attention experts say, in sentences."""

import polars as pl

from moe_atlas.plotting.moa_arms import NAMES, label_of, metric_of
from moe_atlas.plotting.moa_training import ALPHA, in_units

Frames = dict[str, pl.DataFrame]
_LOWER = ("perplexity",)  # metrics of which less is better
_UNITS = {"perplexity": " %", "bleu": " points", "exact": " points of 100"}


def span_text(values: pl.Series, digits: int = 2) -> str:
    """Smallest to largest value, one number where both are printed the same."""
    low, high = (f"{value:.{digits}f}".replace("-", "−") for value in (values.min(), values.max()))
    return low if low == high else f"{low} to {high}"


def contrast(row: dict) -> str:
    """One row of moa_differences as a sentence: how far apart, the interval, and what p allows to say."""
    numbers = dict.fromkeys(("difference", "low", "high"), pl.Float64)
    row = in_units(pl.DataFrame([row], schema_overrides=numbers)).row(0, named=True)
    unit, less = _UNITS[row["metric"]], row["metric"] in _LOWER
    amount = abs(row["difference"])
    better = "better" if (row["difference"] < 0) == less else "worse"
    shown = f"**{row['arm']}** against {row['baseline']}, {NAMES[row['metric']]}: {amount:.2g}{unit} {better}"
    if row["low"] is None:
        return f"{shown}; over {row['seeds']} seed{'s' * (row['seeds'] != 1)} nothing is known of the spread."
    low, high = (f"{value:+.2g}".replace("-", "−") for value in (row["low"], row["high"]))
    interval = f"95 % interval {low} to {high}{unit}"
    if row["low"] <= 0 <= row["high"]:
        return f"{shown}, {interval}: over {row['seeds']} seeds the two cannot be told apart."
    p = row["p_adjusted"]
    if p is not None and p < ALPHA:
        return f"{shown}, {interval}, adjusted p = {p:.2g}."
    number = "unknown" if p is None else f"{p:.2g}"
    return f"{shown}, {interval}; adjusted for all rows of the study p is {number}, so this may be chance."


def asked(frames: Frames) -> list[tuple[str, pl.DataFrame]]:
    """The questions, each with the rows of moa_differences that answer it: of the first test and the main metric."""
    table, arms = frames["moa_differences"], frames["moa_arms"]
    kinds = arms.select("objective", "arm", "attention", "router").unique(maintain_order=True)
    joined = table.join(kinds, on=["objective", "arm"], how="left", maintain_order="left").join(
        kinds.rename({"arm": "baseline", "attention": "other", "router": "others_router"}),
        on=["objective", "baseline"],
        how="left",
        maintain_order="left",
    )
    parts = []
    for objective in joined["objective"].unique(maintain_order=True):
        rows = joined.filter(objective=objective)
        rows = rows.filter(metric=metric_of(rows))
        parts.append(rows.filter(test=rows["test"][0]))
    joined = pl.concat(parts) if parts else joined
    frozen = pl.col("others_router") == "frozen"
    heads = pl.col("other") == "mha"
    return [
        ("Attention experts against multi-head attention", joined.filter(heads, pl.col("attention") == "moa")),
        ("A learned router against one that was never trained", joined.filter(frozen)),
        ("Other contrasts", joined.filter(~frozen, ~heads | (pl.col("attention") == "mha"))),
    ]


def counts(differences: pl.DataFrame) -> str:
    """How many differences there are, and how many of them chance would hold for clear."""
    varied = differences.drop_nulls("p_value")
    if varied.is_empty():
        return "No difference varies over seeds, so that nothing can be tested."
    clear = varied.filter((pl.col("low") > 0) | (pl.col("high") < 0))
    kept = varied.filter(pl.col("p_adjusted") < ALPHA)
    return (
        f"Of {len(varied):,} differences that vary over seeds {len(clear):,} have an interval without 0, where "
        f"chance alone would give about {0.05 * len(varied):.2g}; {len(kept):,} have an adjusted p below {ALPHA:g}."
    )


def plateaus(arms: pl.DataFrame) -> str:
    """How many runs ended at a plateau, and which arms have runs that did not."""
    once = arms.unique(["objective", "arm"], keep="first", maintain_order=True)
    text = f"{once['plateaus'].sum():,} of {once['seeds'].sum():,} runs ended at a plateau of the validation loss."
    rest = once.filter(pl.col("plateaus") < pl.col("seeds"))
    if rest.is_empty():
        return text
    names = ", ".join(f"{row['arm']} ({row['objective']})" for row in rest.iter_rows(named=True))
    return f"{text} The others ended at the largest number of steps and may still have been learning: {names}."


def nothing_selected(arms: pl.DataFrame) -> str:
    """Which arms have k = E; empty where none has."""
    dense = arms.filter(pl.col("selects").eq(False)).unique(["arm"], keep="first", maintain_order=True)
    if dense.is_empty():
        return ""
    names = " and ".join(label_of(row).removesuffix(" (selects nothing)") for row in dense.iter_rows(named=True))
    return (
        f"{names}: k = E, as in the paper's base (8K8E128D). Every token has all heads, a router only weighs them, so "
        "that nothing here can speak of selection or specialisation."
    )


def costs(table: pl.DataFrame) -> str:
    """How many published counts our formulas give."""
    known = table.drop_nulls("computed")
    if known.is_empty():
        return "No published count has a formula here."
    return (
        f"{known['agrees'].sum()} of {len(known)} published counts that have a formula here are given to the printed "
        f"digits. No formula is there for {len(table) - len(known)} more. The column `note` says what was assumed."
    )


def load(routing: pl.DataFrame) -> str:
    """How even the attention experts of a model are used, beside even and independent choices."""
    rows = routing.filter(site="attention")
    if rows.is_empty():
        return ""
    if (rows["top_k"] == rows["experts"]).all():
        return "Every token has all experts (k = E): their load says nothing."
    parts = []
    for kind in rows["kind"].unique(maintain_order=True):
        worst, dead = (rows.filter(kind=kind, measure=measure) for measure in ("max_vio", "dead"))
        above = worst.filter(pl.col("value") > pl.col("chance_high"))
        parts.append(
            f"{kind}: MaxVio {span_text(worst['value'])} (even and independent choices: {span_text(worst['chance'])}; "
            f"above what holds 95 % of them in {len(above)} of {len(worst)} layers and texts), "
            f"{dead['value'].sum():.0f} experts that no token chose"
        )
    return "; ".join(parts) + "."


def association(table: pl.DataFrame) -> str:
    """What token types tell of the chosen attention experts, beside a random router on the same hidden states."""
    keys = ["corpus", "kind", "layer"]
    rows = table.filter(site="attention", measure="information")
    own = rows.filter(pl.col("router") != "random")
    both = own.join(rows.filter(router="random"), on=keys, suffix="_random")
    if both.is_empty():
        return ""
    both = both.drop_nulls(["corrected", "corrected_random"])
    if both.is_empty():
        return "Token types can tell nothing of the chosen experts: every token has the same ones, as where k = E."
    above, below = both.filter(pl.col("beyond_low") > 0), both.filter(pl.col("beyond_high") < 0)
    router = both["router"][0]
    return (
        f"Token types tell {span_text(both['corrected'])} of what can be told of the chosen experts (0 is what "
        f"exchanges give, 1 that the type decides); of a random router on the same hidden states "
        f"{span_text(both['corrected_random'])}. The {router} router is above the random one (interval of the "
        f"difference over the same documents) in {len(above)} of {len(both)} layers and texts, below in {len(below)}. "
        "Only what is above the random router can be learned specialisation."
    )


def beyond(table: pl.DataFrame, column: str, what: str) -> str:
    """How many values of a column lie outside of what 95 % of chance gives."""
    if table.is_empty():
        return ""
    low, high = (
        table.filter(test) for test in (pl.col(column) < pl.col("chance_low"), pl.col(column) > pl.col("chance_high"))
    )
    return (
        f"{what}: {len(high):,} of {len(table):,} are above what holds 95 % of chance and {len(low):,} below, where "
        f"chance alone would give about {0.025 * len(table):.2g} each."
    )


def sites(table: pl.DataFrame) -> str:
    """In how many layers attention experts are above or below FFN experts, by measure."""
    parts = []
    for measure in table["measure"].unique(maintain_order=True):
        rows = table.filter(measure=measure)
        above, below = (rows.filter(test) for test in (pl.col("low") > 0, pl.col("high") < 0))
        parts.append(f"{measure}: above in {len(above)}, below in {len(below)} of {len(rows)}")
    if not parts:
        return ""
    return (
        f"Attention experts against the FFN experts of the same layer, by intervals without 0: {'; '.join(parts)}. No "
        "row is adjusted for the others: chance alone would give one in twenty."
    )

"""Tables of the mechanism test: means, their intervals over documents and seeds of a split, chance levels, differences.

Source: EMoE (arXiv 2310.10908), sections 3 and 5; its numbers have neither intervals nor chance levels. Documents are
drawn again as in moe_atlas.behavioral.resampling, and with them the seeds of a split; two splits are compared on the
same documents.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import polars as pl
from scipy import stats

from moe_atlas import tables
from moe_atlas.behavioral.domain import permutation_test
from moe_atlas.behavioral.measures import divide, even_loads, js_divergence, load_entropy
from moe_atlas.behavioral.resampling import DRAWS, FEWEST_BLOCKS, LEVEL, block_weights, interval
from moe_atlas.emoe.correlation import NULL_SPLITS, CorrelationOfSplits
from moe_atlas.emoe.mechanism import GATES, SplitSums, selected
from moe_atlas.emoe.split import RULES
from moe_atlas.modularity.masked_loss import Arm

_EVEN_DRAWS = 200
Row = dict[str, object]


class Draws:
    """Resamples of B blocks of documents and, for each rule of splitting, of its seeds."""

    def __init__(self, blocks: int, generator: np.random.Generator):
        self.blocks, self._generator = block_weights(blocks, generator), generator
        self._seeds: dict[str, np.ndarray] = {}

    def seeds(self, rule: str, count: int) -> np.ndarray:
        """Weights (R, S) of the seeds, sum 1: the same for all measures of a rule, so that gates can be compared."""
        if rule not in self._seeds:
            weights = np.full((len(self.blocks), count), 1 / count)
            if count > 1 and len(weights) > 1:
                weights[1:] = self._generator.multinomial(count, np.full(count, 1 / count), size=DRAWS) / count
            self._seeds[rule] = weights
        return self._seeds[rule]

    def mean(self, rule: str, sums: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        """Mean over tokens and seeds, (R,): first the value, then the resamples. sums: (S, B); tokens: (B,)."""
        above = (self.blocks * (self.seeds(rule, len(sums)) @ sums)).sum(1)
        return divide(above, self.blocks @ tokens)


def _row(measure: str, drawn: np.ndarray | None = None, least: float = -np.inf, most: float = np.inf, **fields) -> Row:
    """A row of emoe_mechanism from resamples (R,); without them `value` is among the fields."""
    numbers = {}
    if drawn is not None:
        value, low, high = interval(drawn, least, most)
        numbers = {"value": float(value), "low": float(low), "high": float(high)}
    return {"measure": measure} | numbers | fields


def _frame(name: str, rows: Sequence[Row], **fields: object) -> pl.DataFrame:
    schema = tables.declared(name).schema
    full = [dict.fromkeys(schema) | fields | row for row in rows]
    return pl.DataFrame(full, schema=schema).with_columns(pl.col(pl.Float64).fill_nan(None))


def choice_rows(sums: Sequence[SplitSums], generator: np.random.Generator) -> list[Row]:
    """Mass and agreement of one layer on one corpus, and what the clusters have above random and contiguous experts.

    mass: chance is the share of experts that the gate takes. agreement and agreement_output: of the k experts of avg-k
    with those of the largest sums of |a_j|, of |a_j| times the length of the neuron's value; chance k/N.
    """
    rows: list[Row] = []
    tokens = sums[0].tokens.numpy()
    draws = Draws(len(tokens), generator)
    for experts in dict.fromkeys(one.split.experts for one in sums):
        of_rule = {r: [one for one in sums if (one.split.experts, one.split.rule) == (experts, r)] for r in RULES}
        for k in of_rule[RULES[0]][0].ks:
            wanted = [("mass", gate, ("mass", gate)) for gate in GATES]
            wanted += [("agreement", "avg-k", ("agreement", "activation"))]
            wanted += [("agreement_output", "avg-k", ("agreement", "output"))]
            for measure, gate, (kept, key) in wanted:
                drawn = {
                    rule: draws.mean(rule, np.stack([getattr(one, kept)[k, key].numpy() for one in ones]), tokens)
                    for rule, ones in of_rule.items()
                }
                fields = {"experts": experts, "k": k, "gate": gate, "tokens": int(tokens.sum())}
                chance = selected(gate, experts, k) / experts
                for rule, ones in of_rule.items():
                    own = fields | {"split": rule, "seeds": len(ones)}
                    rows.append(_row(measure, drawn[rule], 0, 1, chance=chance, **own))
                rows += _differences(measure, drawn, fields | {"seeds": len(of_rule["cluster"])})
    return rows


def _differences(measure: str, drawn: Mapping[str, np.ndarray], fields: Row) -> list[Row]:
    """What clusters have above each other split, by the same resamples of documents."""
    return [
        _row(
            f"{measure}_difference",
            drawn["cluster"] - drawn[rule],
            split="cluster",
            other=f"{rule} split",
            chance=0.0,
            **fields,
        )
        for rule in drawn
        if rule != "cluster"
    ]


def correlation_rows(sums: Sequence[SplitSums], correlation: np.ndarray, tokens: int, generator: np.random.Generator):
    """correlation_within, correlation_between and correlation_ratio of each rule, beside those of random splits.

    chance is their mean, chance_low and chance_high hold 95 % of them, p_value the share that reaches the value; the
    interval is Student's, over the seeds of the split alone.
    """
    rows: list[Row] = []
    found = CorrelationOfSplits(correlation)
    for experts in dict.fromkeys(one.split.experts for one in sums):
        null = found.null(experts, generator)
        for rule in RULES:
            own = [one.split.labels for one in sums if (one.split.experts, one.split.rule) == (experts, rule)]
            modularity = [found.of(labels) for labels in own]
            for measure in ("within", "between", "ratio"):
                values = np.array([getattr(one, measure) for one in modularity])
                nulls = np.array([getattr(one, measure) for one in null])
                rows.append(
                    _seeds_row(f"correlation_{measure}", values, nulls)
                    | {"experts": experts, "split": rule, "seeds": len(values), "tokens": tokens}
                )
    return rows


def _seeds_row(measure: str, values: np.ndarray, nulls: np.ndarray) -> Row:
    """Mean over seeds with Student's interval: seeds are few, and drawn again they would spread too little."""
    low, high = np.quantile(nulls, (0.025, 0.975))
    row: Row = {"measure": measure, "value": float(values.mean()), "low": None, "high": None}
    if len(values) >= FEWEST_BLOCKS:
        reach = stats.t.ppf((1 + LEVEL) / 2, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values))
        row |= {"low": float(np.maximum(values.mean() - reach, 0)), "high": float(values.mean() + reach)}
    reached = int((nulls >= row["value"]).sum())
    return row | {
        "chance": float(nulls.mean()),
        "chance_low": float(low),
        "chance_high": float(high),
        "p_value": (1 + reached) / (1 + NULL_SPLITS) if np.isfinite(row["value"]) else None,
    }


def selection_rows(sums: Sequence[SplitSums], generator: np.random.Generator) -> list[Row]:
    """emoe_selection of one layer and corpus: share = tokens that chose it / (k tokens), first seed of a split."""
    rows: list[Row] = []
    for one in (one for one in sums if one.split.seed == 0):
        weights = block_weights(len(one.tokens), generator)
        for k, counts in one.counts.items():
            shares = divide(weights @ counts.numpy(), k * (weights @ one.tokens.numpy())[:, None])
            fields = {"experts": one.split.experts, "k": k, "split": one.split.rule, "seed": 0}
            for expert, (share, low, high) in enumerate(zip(*interval(shares, 0, 1 / k), strict=True)):
                numbers = {"share": float(share), "low": float(low), "high": float(high)}
                rows.append(fields | numbers | {"expert": str(expert), "chance": 1 / one.split.experts})
    return rows


def domain_rows(of_corpus: Mapping[str, Sequence[SplitSums]], generator: np.random.Generator) -> list[Row]:
    """Rows of emoe_mechanism about which corpora choose which experts by avg-k, of one layer, first seed of a split.

    selection_entropy: of a corpus's shares over log N; chance is an even router's. js_divergence of two corpora, bits;
    chance is its mean when their documents are dealt out at random. shared_experts: how many experts have more than 1/N
    of the choices of every corpus; chance is the mean when each corpus's experts are named anew at random.
    """
    rows: list[Row] = []
    first = next(iter(of_corpus.values()))
    for place, one in enumerate(first):
        if one.split.seed:
            continue
        found = {corpus: sums[place] for corpus, sums in of_corpus.items()}
        experts = one.split.experts
        for k in one.ks:
            counts = {corpus: own.counts[k].numpy() for corpus, own in found.items()}
            fields = {"experts": experts, "k": k, "split": one.split.rule, "gate": "avg-k", "seeds": 1}
            for corpus, load in counts.items():
                tokens = int(found[corpus].tokens.sum())
                weights = block_weights(len(load), generator)
                even = load_entropy(even_loads(tokens, k, experts, generator, _EVEN_DRAWS)).mean()
                own = {"corpus": corpus, "chance": float(even), "tokens": tokens} | fields
                rows.append(_row("selection_entropy", load_entropy(weights @ load), 0, 1, **own))
            for pair in itertools.combinations(counts, 2):
                loads = [counts[corpus] for corpus in pair]
                weights = [block_weights(len(load), generator) for load in loads]
                count = min(map(len, weights))
                drawn = js_divergence(*(w[:count] @ load for w, load in zip(weights, loads, strict=True)))
                chance, p_value = permutation_test(*loads, generator)
                own = {"corpus": pair[0], "other": pair[1], "chance": chance, "p_value": p_value} | fields
                tokens = int(sum(found[corpus].tokens.sum() for corpus in pair))
                rows.append(_row("js_divergence", drawn, 0, 1, tokens=tokens, **own))
            if len(counts) > 1:
                rows.append(_shared(list(counts.values()), experts) | fields)
    return rows


def _shared(counts: Sequence[np.ndarray], experts: int) -> Row:
    """Experts that every corpus (B, N) chooses more often than 1/N of the time."""
    above = np.stack([load.sum(0) > load.sum() / experts for load in counts])
    chance = experts * float(np.prod(above.mean(1)))
    return _row("shared_experts", value=float(above.all(0).sum()), chance=chance)


def loss_rows(
    arms: Sequence[Arm], sums: np.ndarray, tokens: np.ndarray, generator: np.random.Generator
) -> Iterator[tuple[int | None, Row]]:
    """(layer or None for all masked layers, row): the dense model's loss, and by how much each way to mask raises it.

    sums (1 + A, B) and tokens (B,) as masked_losses gives them; nats a token. chance of loss_rise is the rise with a
    random gate on the same split. loss_rise_difference: clusters minus another split, avg-k minus another gate.
    """
    draws = Draws(len(tokens), generator)
    total = {"tokens": int(tokens.sum())}
    yield None, _row("loss", draws.mean("dense", sums[:1], tokens), 0, seeds=1, **total)
    rises: dict[tuple, np.ndarray] = {}
    seeds: dict[tuple, int] = {}
    for key in dict.fromkeys((arm.layers, arm.experts, arm.k, arm.gate, arm.rule) for arm in arms):
        own = [i for i, arm in enumerate(arms, 1) if (arm.layers, arm.experts, arm.k, arm.gate, arm.rule) == key]
        rises[key], seeds[key] = draws.mean(key[-1], sums[own] - sums[0], tokens), len(own)
    several = max((len(layers) for layers, *_ in rises), default=0) > 1
    for (layers, experts, k, gate, rule), drawn in rises.items():
        layer = None if several and len(layers) > 1 else layers[0]
        fields = {"experts": experts, "k": k, "split": rule, "seeds": seeds[layers, experts, k, gate, rule]} | total
        blind = rises.get((layers, experts, k, "random", rule))
        chance = None if blind is None or gate == "not-top-k" else float(blind[0])
        yield layer, _row("loss_rise", drawn, gate=gate, chance=chance, **fields)
        fields |= {"gate": gate, "chance": 0.0}
        splits = [other for other in RULES if other != rule] if rule == "cluster" else []
        gates = [other for other in GATES if other != gate] if gate == "avg-k" else []
        others = [(f"{other} split", (layers, experts, k, gate, other)) for other in splits]
        others += [(f"{other} gate", (layers, experts, k, other, rule)) for other in gates]
        for other, key in others:
            if key in rises:
                yield layer, _row("loss_rise_difference", drawn - rises[key], other=other, **fields)


def mechanism_frame(model: str, corpus: str | None, layer: int | None, rows: Sequence[Row]) -> pl.DataFrame:
    """Rows of one layer and corpus as the table emoe_mechanism; a row may name another corpus."""
    return _frame("emoe_mechanism", rows, model=model, corpus=corpus, layer=layer)


def selection_frame(model: str, corpus: str, layer: int, rows: Sequence[Row]) -> pl.DataFrame:
    """Rows of one layer and corpus as the table emoe_selection."""
    return _frame("emoe_selection", rows, model=model, corpus=corpus, layer=layer)


def correlation_frame(model: str, corpus: str, layer: int, sums: SplitSums, correlation: np.ndarray) -> pl.DataFrame:
    """The map of |r| in the order of the matrix and sorted by the experts of a split, as the table emoe_correlation."""
    found, labels = CorrelationOfSplits(correlation), sums.split.labels
    frames = []
    for name, order in (("index", np.arange(len(labels))), ("cluster", np.argsort(labels, kind="stable"))):
        cells = found.map(order)
        row, column = np.indices(cells.shape)
        frame = pl.DataFrame({"row": row.ravel(), "column": column.ravel(), "value": cells.ravel()})
        frames.append(frame.with_columns(order=pl.lit(name)))
    fixed = {"model": model, "corpus": corpus, "layer": layer, "experts": sums.split.experts}
    frame = pl.concat(frames).with_columns(pl.col("value").fill_nan(None), **{k: pl.lit(v) for k, v in fixed.items()})
    return tables.conform("emoe_correlation", frame)

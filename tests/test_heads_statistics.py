"""Statistics of attention experts against plain loops in float64 and truths that were planted."""

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from moe_atlas.behavioral.resampling import block_weights
from moe_atlas.heads import ablation, association, classes, compare, load
from moe_atlas.heads.association import Choices, Exchanges, associate
from moe_atlas.tables import FORMS


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def text(tokens: int = 2000, types: int = 12, seed: int = 0) -> dict:
    """Types, sequences of 50 tokens and 8 blocks of documents."""
    at = np.arange(tokens)
    return {"types": rng(seed).integers(0, types, tokens), "sequences": at // 50, "blocks": at * 8 // tokens}


def choices(ids: np.ndarray, experts: int, **of: np.ndarray) -> Choices:
    return Choices(ids, of["types"], of["sequences"], of["blocks"], experts, int(of["blocks"].max()) + 1)


def associated(found: Choices, seed: int = 0) -> association.Association:
    found = found.frequent()
    return associate(found, Exchanges(found.sequences, rng(seed), 60), block_weights(found.count, rng(seed)))


# Association ------------------------------------------------------------------------------------


def test_a_router_that_chooses_by_the_parity_of_the_type_tells_all_of_it():
    of = text()
    found = associated(choices((of["types"] % 2)[:, None], 2, **of))
    row = association.association_row(found)
    assert row["value"] == pytest.approx(1, abs=1e-12) and row["most"] == pytest.approx(1, abs=1e-3)
    assert 0 < row["chance"] < 0.02 and row["p_value"] == pytest.approx(1 / 61)
    assert row["corrected"] == pytest.approx(1) and row["low"] > 0.97
    tokens = association.token_rows(found, str)
    for one in tokens:
        assert int(one["token"]) % 2 == int(one["expert"])
        assert one["count"] == one["tokens"] and one["p_value"] == pytest.approx(1 / 61)
        assert one["pmi"] == pytest.approx(math.log(2), abs=0.05)
    assert len(tokens) == 12


def test_a_router_that_knows_nothing_lies_in_its_null():
    values = []
    for seed in range(20):
        of = text(seed=seed)
        found = associated(choices(rng(100 + seed).integers(0, 4, (2000, 1)), 4, **of), seed)
        row = association.association_row(found)
        values.append(row["chance_low"] <= row["value"] <= row["chance_high"])
        assert row["corrected"] == pytest.approx((row["value"] - row["chance"]) / (1 - row["chance"]))
        assert row["low"] < row["corrected"] < row["high"]
    assert sum(values) >= 16  # 19 of 20 are expected


def test_with_k_choices_the_type_can_tell_at_most_what_most_says():
    of = text()
    ids = np.stack([of["types"] % 4, (of["types"] % 4 + 1) % 4], 1)  # the type decides both
    row = association.association_row(associated(choices(ids, 4, **of)))
    assert row["value"] == pytest.approx(1, abs=1e-12)
    assert row["of_entropy"] == pytest.approx(row["most"], abs=1e-12) and row["most"] == pytest.approx(0.5, abs=0.01)


def test_routers_that_the_type_decides_are_alike_however_even_their_loads_are():
    """All is told by either; over H(expert) the even one would have told more."""
    of = text()
    even = np.stack([of["types"] % 4, (of["types"] + 1) % 4], 1)
    uneven = np.stack(
        [np.zeros(2000, dtype=np.int64), np.where(of["types"] < 2, 1, np.where(of["types"] < 9, 2, 3))], 1
    )
    one, other = (associated(choices(ids, 4, **of)) for ids in (even, uneven))
    assert one.of_entropy > other.of_entropy + 0.05
    assert one.information == pytest.approx(1) and other.information == pytest.approx(1)  # of every resample
    row = association.association_row(one, other)
    assert row["value"] == pytest.approx(1) and row["chance"] != pytest.approx(other.nulls.mean(), rel=0.05)
    assert [row[f"beyond_{name}"] for name in ("random", "low", "high")] == [0, 0, 0]
    load = uneven.ravel()
    bits = -sum(share * math.log2(share) for share in np.bincount(load) / len(load))
    assert association.tellable(np.bincount(load), 2) == pytest.approx(bits - 1)


def test_nothing_can_be_told_where_nothing_is_chosen():
    """All experts for every token, and the same two of four."""
    of = text()
    for ids in (np.tile(np.arange(4), (2000, 1)), np.tile([1, 3], (2000, 1))):
        row = association.association_row(associated(choices(ids, 4, **of)))
        assert math.isnan(row["value"]) and row["p_value"] is None and 0 <= row["of_entropy"] < 1e-12


def test_the_share_that_is_told_is_that_of_a_plain_loop():
    of = text(600, 5)
    ids = np.stack([rng(i).permuted(np.arange(4))[:2] for i in range(600)])
    ids[of["types"] == 2] = [0, 1]
    found = associated(choices(ids, 4, **of))
    pairs = [(w, e) for w, chosen in zip(of["types"], ids, strict=True) for e in chosen]
    n = len(pairs)
    bits = sum(
        math.log2(n * pairs.count(pair) / sum(w == pair[0] for w, _ in pairs) / sum(e == pair[1] for _, e in pairs)) / n
        for pair in pairs
    )
    whole = -sum(c / n * math.log2(c / n) for c in np.bincount([e for _, e in pairs]))
    assert found.information[0] == pytest.approx(bits / (whole - 1)) and found.of_entropy == pytest.approx(bits / whole)


def test_pmi_and_npmi_are_those_of_a_plain_loop():
    counts = rng().integers(0, 9, (5, 3))
    counts[0, 0] = 0
    value, normed = association.pmi(counts)
    n = counts.sum()
    for w, i in itertools.product(range(5), range(3)):
        if counts[w, i] == 0:
            assert value[w, i] == -np.inf and normed[w, i] == -1
            continue
        expected = math.log(counts[w, i] * n / (counts[w].sum() * counts[:, i].sum()))
        assert value[w, i] == pytest.approx(expected, abs=1e-12)
        assert normed[w, i] == pytest.approx(expected / -math.log(counts[w, i] / n), abs=1e-12)


def test_rare_types_are_left_out_and_the_rest_is_counted():
    of = text(300, 3)
    of["types"][:19] = 99  # one below the minimum
    found = associated(choices(rng().integers(0, 4, (300, 2)), 4, **of))
    assert 99 not in found.types and found.tokens.sum() == 281 and found.counts.sum() == 562


def test_exchanges_keep_the_tokens_of_each_sequence_and_move_them():
    sequences = rng().integers(0, 5, 100)
    for order in Exchanges(sequences, rng(1), 5).orders:
        assert sorted(order) == list(range(100)) and (sequences[order] == sequences).all()
        assert (order != np.arange(100)).mean() > 0.8


def test_what_whole_sequences_prefer_is_in_the_null():
    """Each sequence has a type and an expert of its own: exchanging within sequences changes nothing."""
    at = np.arange(1000)
    of = {"types": at // 100, "sequences": at // 100, "blocks": at // 100}
    row = association.association_row(associated(choices((at // 100 % 5)[:, None], 5, **of)))
    assert row["value"] == pytest.approx(1) and row["chance"] == pytest.approx(1) and row["p_value"] == 1


def test_a_router_is_compared_with_the_random_one_document_by_document():
    """Documents differ much in what their types tell, both routers alike: their difference hardly varies."""
    of = text(4000)
    clear = rng(3).random(4000) < np.linspace(0.1, 0.9, 8)[of["blocks"]]
    random_ids = np.where(clear, of["types"] % 4, rng(4).integers(0, 4, 4000))
    better = np.where(rng(5).random(4000) < 0.15, of["types"] % 4, random_ids)
    learned, other = (associated(choices(ids[:, None], 4, **of)) for ids in (better, random_ids))
    row, alone = association.association_row(learned, other), association.association_row(other)
    assert row["beyond_random"] == pytest.approx(row["corrected"] - alone["corrected"])
    assert 0 < row["beyond_low"] < row["beyond_random"] < row["beyond_high"]
    assert row["beyond_high"] - row["beyond_low"] < (row["high"] - row["low"]) / 2
    assert row["low"] < alone["high"]  # what the intervals of each by itself do not show
    same = association.association_row(other, other)
    assert (same["beyond_random"], same["beyond_low"], same["beyond_high"]) == (0, 0, 0)
    assert "beyond_random" not in alone


# Load ---------------------------------------------------------------------------------------------


def test_load_by_block_and_its_measures_are_those_of_a_plain_loop():
    ids = np.stack([rng(i).permuted(np.arange(4)) for i in range(60)])[:, :2]
    weights, blocks = rng(7).random((60, 2)), np.arange(60) // 10
    loads = load.by_block(ids, np.ones(ids.shape), blocks, 4, 6)
    heavy = load.by_block(ids, weights, blocks, 4, 6)
    for b, e in itertools.product(range(6), range(4)):
        assert loads[b, e] == sum((ids[t] == e).sum() for t in range(60) if blocks[t] == b)
        mine = sum(weights[t, s] for t in range(60) for s in range(2) if blocks[t] == b and ids[t, s] == e)
        assert heavy[b, e] == pytest.approx(mine)
    drawn = block_weights(6, rng())
    rows = load.load_rows(loads, heavy, drawn, 60)
    shares = [row["value"] for row in rows if row["measure"] == "share"]
    assert shares == pytest.approx(loads.sum(0) / 120) and sum(shares) == pytest.approx(1)
    by_weight = [row["value"] for row in rows if row["measure"] == "weight"]
    assert by_weight == pytest.approx(heavy.sum(0) / heavy.sum())
    routing = {row["measure"]: row for row in load.routing_rows(loads, drawn, 60, 2, rng())}
    total, share = loads.sum(0), loads.sum(0) / 120
    assert routing["entropy"]["value"] == pytest.approx(-(share * np.log(share)).sum() / np.log(4))
    assert routing["max_vio"]["value"] == pytest.approx(total.max() / 30 - 1)
    assert routing["cv"]["value"] == pytest.approx(math.sqrt(((total - 30) ** 2).mean()) / 30)
    assert routing["dead"]["value"] == 0
    for row in routing.values():
        assert row["chance_low"] <= row["chance"] <= row["chance_high"]


def test_one_expert_alone_is_outside_of_what_even_choices_give():
    loads = np.zeros((8, 4))
    loads[:, 2] = 50
    rows = {row["measure"]: row for row in load.routing_rows(loads, block_weights(8, rng()), 400, 1, rng())}
    assert [rows[name]["value"] for name in ("entropy", "max_vio", "cv", "dead")] == pytest.approx(
        [0, 3, math.sqrt(3), 3]
    )
    assert rows["entropy"]["chance_low"] > 0.98 and rows["dead"]["chance_high"] == 0
    assert rows["max_vio"]["chance_high"] < 0.5 and rows["max_vio"]["low"] == rows["max_vio"]["high"] == 3


def test_even_choices_have_the_spread_that_drawing_them_gives():
    """Chance of MaxVio for 2 of 4 experts and 200 tokens, drawn token by token."""
    drawn = []
    for seed in range(400):
        ids = np.argsort(rng(seed).random((200, 4)), axis=1)[:, :2]
        drawn.append(np.bincount(ids.ravel(), minlength=4).max() / 100 - 1)
    rows = load.routing_rows(np.full((5, 4), 20.0), block_weights(5, rng()), 200, 2, rng())
    chance = next(row for row in rows if row["measure"] == "max_vio")
    assert chance["chance"] == pytest.approx(np.mean(drawn), rel=0.1)
    assert chance["chance_high"] == pytest.approx(np.quantile(drawn, 0.975), rel=0.2)


# Classes and ablation -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("token", "expected"),
    [
        ("    ", "space"), ("\n", "space"), ("", "space"), (" 12", "digit"), ("7", "digit"), (" +=", "punctuation"),
        ("_", "punctuation"), (" The", "capitalised"), ("The", "capitalised"), (" the", "word"), ("ing", "piece"),
        ("x1", "piece"), (" (A", "capitalised"), (" été", "word"),
    ],
)  # fmt: skip
def test_the_form_of_a_token(token, expected):
    assert classes.form(token) == expected and classes.form(token, special=True) == "special"


def test_words_of_a_language_without_blanks_are_words():
    found = classes.forms([0, 1, 2], {0: "<s>", 1: "dog", 2: "Cat"}, {0})
    assert found == {0: "special", 1: "word", 2: "capitalised"}
    assert classes.forms([1, 3], {1: "dog", 3: " dog"}, set()) == {1: "piece", 3: "word"}


def test_frequent_types_hold_half_of_the_text():
    tokens = np.repeat([5, 6, 7, 8], [100, 60, 25, 19])
    assert classes.frequencies(tokens) == {5: "frequent", 6: "frequent", 7: "common", 8: "rare"}


def planted(experts: int = 4, tokens: int = 800) -> tuple:
    """Expert e is chosen by, and needed for, class e alone: 0.5 nats; without it others lose nothing."""
    of = rng().integers(0, experts, tokens)
    deltas = np.stack([np.where(of == e, 0.5, 0.0) for e in range(experts)]) + rng(1).normal(0, 0.01, (experts, tokens))
    one = ablation.Classes("read", "form", FORMS[:experts], of)
    return deltas, one, np.arange(tokens) * 8 // tokens, block_weights(8, rng(2))


def test_the_cost_of_an_expert_is_the_mean_rise_of_its_class_paired_by_document():
    deltas, one, blocks, drawn = planted()
    found = ablation.costs(deltas, one, blocks, drawn)
    rows = {(row["expert"], row["token_class"]): row for row in ablation.ablation_rows(found, one, None)}
    for e, name in itertools.product(range(4), range(4)):
        mine = deltas[:, one.of == name].mean(1)
        row = rows[str(e), FORMS[name]]
        assert row["value"] == pytest.approx(mine[e], abs=1e-12)
        others = (mine.sum() - mine[e]) / 3
        assert row["others"] == pytest.approx(others) and row["difference"] == pytest.approx(mine[e] - others)
        assert row["low"] <= row["value"] <= row["high"] and row["tokens"] == (one.of == name).sum()
        assert (row["difference_low"] > 0.4) == (e == name) and row["association"] is None


def test_intervals_are_the_quantiles_of_the_resampled_means():
    deltas, one, blocks, drawn = planted()
    found = ablation.costs(deltas, one, blocks, drawn)
    sums = np.array([deltas[1, (one.of == 1) & (blocks == b)].sum() for b in range(8)])
    tokens = np.array([((one.of == 1) & (blocks == b)).sum() for b in range(8)])
    means = np.array([(w @ sums) / (w @ tokens) for w in drawn])
    low, high = np.quantile(means[1:], (0.025, 0.975)) + (means[0] - means[1:].mean())
    row = next(r for r in ablation.ablation_rows(found, one, None) if (r["expert"], r["token_class"]) == ("1", "space"))
    assert (row["low"], row["high"]) == pytest.approx((low, high))


def test_cost_and_association_of_planted_experts_go_together():
    deltas, one, blocks, drawn = planted()
    ids = one.of[:, None]
    shares = ablation.log_shares(ids, one.of, 4, 4)
    counts = np.zeros((4, 4)) + 0.5
    for t in range(800):
        counts[ids[t, 0], one.of[t]] += 1
    by_hand = np.log(counts / counts.sum(1, keepdims=True) / (counts.sum(0) / counts.sum()))
    np.testing.assert_allclose(shares, by_hand, rtol=1e-12)
    found = ablation.costs(deltas, one, blocks, drawn)
    row = ablation.correlation_row(found, shares, rng())
    assert row["value"] == pytest.approx(stats.spearmanr(shares.ravel(), found.excess[0].ravel()).statistic)
    assert row["value"] > 0.4 and row["p_value"] < 0.1 and abs(row["chance"]) < 0.2
    other = ablation.correlation_row(found, shares[[1, 2, 3, 0]], rng())
    assert other["value"] < 0 and other["p_value"] > 0.5


def test_experts_that_every_token_has_are_associated_with_nothing():
    """k = E: associations are 0 but for rounding, and ranks of rounding are no correlation."""
    deltas, one, blocks, drawn = planted()
    shares = ablation.log_shares(np.tile(np.arange(4), (800, 1)), one.of, 4, 4)
    assert np.abs(shares).max() < 1e-12
    shares += np.arange(4) * 1e-16  # as other numbers of tokens round
    assert "value" not in ablation.correlation_row(ablation.costs(deltas, one, blocks, drawn), shares, rng())


def test_classes_without_a_token_have_no_row_and_no_share():
    deltas, one, blocks, drawn = planted()
    wider = ablation.Classes("read", "form", FORMS, one.of)
    rows = ablation.ablation_rows(ablation.costs(deltas, wider, blocks, drawn), wider, None)
    assert {row["token_class"] for row in rows} == set(FORMS[:4])
    assert np.isnan(ablation.log_shares(one.of[:, None], one.of, 4, 7)[:, 4:]).all()


# Attention beside FFN -----------------------------------------------------------------------------


def test_sites_are_compared_on_the_same_resamples():
    drawn = block_weights(6, rng())
    loads = rng(1).integers(1, 50, (6, 4)).astype(float)
    one = compare.Summary(loads, drawn, drawn @ rng(2).random(6))
    same = compare.site_rows(one, one)
    assert [(row["difference"], row["low"], row["high"]) for row in same] == [(0, 0, 0)] * 3
    other = compare.Summary(np.roll(loads, 1, axis=1) + 20, drawn, one.information - 0.25)
    rows = {row["measure"]: row for row in compare.site_rows(one, other)}
    assert rows["information"]["difference"] == pytest.approx(0.25)
    assert rows["information"]["low"] == pytest.approx(0.25) and rows["information"]["high"] == pytest.approx(0.25)
    total = loads.sum(0)
    assert rows["max_vio"]["attention"] == pytest.approx(total.max() / total.mean() - 1)
    assert rows["entropy"]["ffn"] > rows["entropy"]["attention"]


def test_the_site_that_serves_texts_differently_is_told():
    drawn = block_weights(6, rng())
    apart, even = np.tile([90.0, 10], (6, 1)), np.full((6, 2), 50.0)
    jitter = rng(1).integers(0, 5, (6, 2))
    attention = {"prose": compare.Summary(apart + jitter, drawn, drawn[:, 0])}
    attention["code"] = compare.Summary(apart[:, ::-1] + jitter, drawn, drawn[:, 0])
    ffn = {name: compare.Summary(even + jitter, drawn, drawn[:, 0]) for name in attention}
    (row,) = compare.domain_rows(attention, ffn, rng())
    assert row["corpus"] == "prose,code" and row["low"] > 0.2 and row["ffn"] == pytest.approx(0, abs=0.01)

"""The table specialization: values by hand, planted routers with known answers, chance levels, intervals."""

import itertools
import math

import numpy as np
import polars as pl
import pytest
import torch
from choice_records import arrays_of, choose, noise

from moe_atlas.behavioral import measures
from moe_atlas.behavioral.resampling import DRAWS, block_weights, interval, resample
from moe_atlas.behavioral.specialization import flags_by_layer, specialization, super_experts
from moe_atlas.text_index import TextIndex


def table(ids, index, experts, random_ids=None, **options):
    flags = np.zeros(experts, dtype=bool)
    arrays = arrays_of(ids, index, experts, random_ids)
    return specialization(arrays, [str(e) for e in range(experts)] + ["F"], flags, **options)


def row(frame, measure, subject="layer"):
    return frame.row(by_predicate=(pl.col("measure") == measure) & (pl.col("subject") == str(subject)), named=True)


def text(sequences=40, length=100, types=30, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return TextIndex.of(torch.randint(types, (sequences, length), generator=generator).tolist())


def test_measures_of_a_few_counts_by_hand():
    load = np.array([[6, 2, 0, 0], [2, 2, 2, 2], [0, 0, 0, 0]])
    assert measures.load_entropy(load)[:2] == pytest.approx([(0.75 * math.log2(4 / 3) + 0.25 * 2) / 2, 1])
    assert measures.max_vio(load)[:2].tolist() == [2, 0]
    assert measures.dead_share(load)[:2].tolist() == [0.5, 0]
    for statistic in (measures.load_entropy, measures.max_vio, measures.dead_share):
        assert math.isnan(statistic(load)[2])
    pairs = np.array([[4, 1, 3], [1, 2, 1], [3, 1, 0]])
    share = measures.co_activation(pairs)
    assert share[0, 1:].tolist() == [0.25, 0.75] and share[1, [0, 2]].tolist() == [0.5, 0.5]
    assert np.isnan(share[2]).all() and np.isnan(share.diagonal()).all()
    assert measures.mean_deviation(pairs, 0.5) == pytest.approx((0.25 + 0.25 + 0 + 0) / 4)
    counts = np.array([[8, 2], [5, 5], [0, 0]])
    assert measures.largest_share(counts) == pytest.approx((0.8 + 0.5) / 2)
    joint = [8 / 20, 2 / 20, 5 / 20, 5 / 20]
    bits = sum(p * math.log2(p / (a * b)) for p, a, b in zip(joint, [0.5] * 4, [0.65, 0.35] * 2, strict=True))
    expert = -(0.65 * math.log2(0.65) + 0.35 * math.log2(0.35))
    assert measures.context_independence(counts) == pytest.approx(bits / expert)
    assert math.isnan(measures.context_independence(np.array([[3, 0], [4, 0]])))
    assert measures.js_divergence(np.array([3, 0]), np.array([0, 5])) == pytest.approx(1)
    assert measures.js_divergence(np.array([3, 1]), np.array([6, 2])) == 0
    by_hand = 0.5 * (math.log2(1 / 0.75) + 0.5 * math.log2(0.5 / 0.75) + 0.5 * math.log2(0.5 / 0.25))
    assert measures.js_divergence(np.array([2, 0]), np.array([1, 1])) == pytest.approx(by_hand)


def test_chance_levels_by_counting_all_cases():
    subsets = [set(choice) for choice in itertools.combinations(range(6), 2)]
    shared = sum(bool(a & b) for a in subsets for b in subsets) / len(subsets) ** 2
    assert measures.common_expert(np.array([0, 0, 50]), 6) == pytest.approx(shared)
    assert measures.common_expert(np.array([0, 30, 10]), 6) == pytest.approx(
        sum(
            p * q * (1 - math.comb(6 - a, b) / math.comb(6, b))
            for (a, p), (b, q) in itertools.product(((1, 0.75), (2, 0.25)), repeat=2)
        )
    )
    for n, p in ((1, 0.3), (7, 0.3), (50, 0.02), (10, 0.5), (9, 0.0), (4, 1.0)):
        chances = [math.comb(n, x) * p**x * (1 - p) ** (n - x) for x in range(n + 1)]
        expected = sum(abs(x / n - p) * chance for x, chance in enumerate(chances))
        assert measures.mean_binomial_deviation(n, p) == pytest.approx(expected, abs=1e-12)
    assert np.isnan(measures.mean_binomial_deviation(0, 0.3))


def test_loads_of_an_even_router_have_its_mean_and_covariance():
    tokens, top_k, experts = 400, 3, 5
    drawn = measures.even_loads(tokens, top_k, experts, np.random.default_rng(0), 20_000)
    cells = np.random.default_rng(1).random((4000, tokens, experts)).argpartition(top_k, axis=2)[..., :top_k]
    real = np.stack([(cells == expert).sum((1, 2)) for expert in range(experts)], 1)
    assert drawn.sum(1) == pytest.approx(np.full(20_000, tokens * top_k))
    assert np.cov(drawn.T) == pytest.approx(np.cov(real.T), rel=0.1, abs=3)
    for statistic in (measures.max_vio, measures.load_entropy):
        assert statistic(drawn).mean() == pytest.approx(statistic(real).mean(), rel=0.03)


def test_permuted_choices_keep_both_margins():
    counts = np.array([[9, 3, 0], [2, 6, 0], [7, 1, 0]])
    flat = np.repeat(np.indices(counts.shape).reshape(2, -1), counts.ravel(), axis=1)
    generator, values = np.random.default_rng(0), []
    for _ in range(4000):
        shuffled = np.zeros(counts.shape)
        np.add.at(shuffled, (flat[0], generator.permutation(flat[1])), 1)
        values.append(measures.largest_share(shuffled))
    found = measures.permuted(measures.largest_share, counts, 4000, np.random.default_rng(1))
    assert found == pytest.approx(np.mean(values), abs=0.005)


def test_a_router_of_the_token_id_alone():
    index = text()
    of_type = noise(index, 8, seed=4)[:30]
    ids = choose(of_type[index.token])
    frame = table(ids, index, 8)
    assert row(frame, "context_independence")["value"] == pytest.approx(1, abs=1e-12)
    assert row(frame, "vocabulary_input")["value"] == 1
    assert row(frame, "vocabulary_next")["value"] < 0.5
    assert row(frame, "context_independence")["random_router"] == pytest.approx(1, abs=1e-12)
    assert row(frame, "context_independence")["chance"] < 0.1
    # Other contexts, the same tokens: nothing changes, up to the first tokens of sequences, which are left out.
    order = torch.randperm(len(index), generator=torch.Generator().manual_seed(2))
    shuffled = TextIndex.of(index.token[order].view(40, 100).tolist())
    other = table(ids[order], shuffled, 8)
    assert row(other, "context_independence")["value"] == pytest.approx(1, abs=1e-12)
    assert row(other, "vocabulary_input")["value"] == 1


@pytest.mark.parametrize(("experts", "top_k"), [(8, 2), (16, 4), (6, 1)])
def test_a_uniform_router_is_at_chance_in_every_measure(experts, top_k):
    index = text(sequences=60)
    ids = choose(noise(index, experts, seed=12), top_k)
    frame = table(ids, index, experts, choose(noise(index, experts, seed=13), top_k)).filter(
        ~pl.col("measure").is_in(["confidence_entropy", "margin", "topk_mass", "super_expert", "output_max"])
    )
    whole = frame.filter(pl.col("subject").is_in(["layer", "mean_abs"]))
    assert len(whole) == 9
    for each in whole.iter_rows(named=True):
        room = 0.5 * (each["high"] - each["low"])  # the chance level is within the interval, or very near to it
        assert each["low"] - room <= each["chance"] <= each["high"] + room, each
        assert each["low"] - 2 * room <= each["random_router"] <= each["high"] + 2 * room, each
    pairs = frame.filter((pl.col("measure") == "co_activation") & (pl.col("subject") != "mean_abs"))
    assert len(pairs) == experts * (experts - 1)
    if top_k > 1:
        assert pairs.select((pl.col("low") <= 0) & (pl.col("high") >= 0)).to_series().mean() > 0.85
    share = frame.filter(measure="load_share")
    assert share["chance"].to_list() == [top_k / experts] * experts
    assert share["value"].sum() == pytest.approx(top_k)


def test_a_dead_expert_and_two_that_come_together():
    index = text()
    scores = noise(index, 6, seed=5)
    scores[:, 2] = -1  # never chosen
    scores[:, 4] = torch.where(scores[:, 3] > 0.6, 2.0, -1.0)  # 3 and 4 win together, or neither does
    scores[:, 3] = scores[:, 4] - 0.1
    frame = table(choose(scores), index, 6)
    dead = row(frame, "dead_share")
    assert dead["value"] == pytest.approx(1 / 6) and dead["chance"] == pytest.approx((1 - 2 / 6) ** 3960)
    assert row(frame, "load_share", 2)["value"] == 0
    chance = (2 - 1) / (6 - 1)
    assert row(frame, "co_activation", "3,4")["value"] == pytest.approx(1 - chance)
    assert row(frame, "co_activation", "4,3")["value"] == pytest.approx(1 - chance)
    assert row(frame, "co_activation", "3,0")["value"] == pytest.approx(-chance)
    for subject in ("2,0", "2,3"):
        undefined = row(frame, "co_activation", subject)
        assert undefined["value"] is None and undefined["low"] is None and undefined["random_router"] is None
    assert row(frame, "co_activation", "0,2")["value"] == pytest.approx(-chance)
    together = row(frame, "co_activation", "mean_abs")
    assert together["low"] > together["chance"] and together["value"] > 10 * together["chance"]
    assert row(frame, "reap", 2)["value"] is None and row(frame, "gate_mass", 2)["value"] == 0


def test_repeats_and_importance_by_hand():
    index = TextIndex.of([[0] * 6, [0] * 3])
    ids = [[9, 0], [0, 1], [0, 2], [1, 2], [1, 0], [3, 2], [8, 1], [3, 1], [3, 2]]
    frame = table(ids, index, 10, layer=3)
    first, common = row(frame, "repeat_top1"), row(frame, "repeat_any")
    assert first["value"] == pytest.approx(3 / 5) and first["chance"] == 1 / 10  # 0 0, 1 1 and 3 3 of five pairs
    assert common["value"] == pytest.approx(4 / 5)  # and 0 2 1 2; not 1 0 3 2
    assert common["chance"] == pytest.approx(1 - math.comb(8, 2) / math.comb(10, 2))
    assert first["low"] is first["high"] is None  # two documents
    assert row(frame, "expert_norm", 2)["value"] == pytest.approx(4 * 3 / 7)  # 4 of 7 tokens, norm 3
    assert row(frame, "reap", 2)["value"] == pytest.approx(3 / 2)
    choices = [0, 1, 0, 2, 1, 2, 1, 0, 3, 2, 3, 1, 3, 2]
    assert row(frame, "reap", 2)["chance"] == pytest.approx(sum(1 + e for e in choices) / 2 / 14)
    assert row(frame, "gate_mass", 1)["value"] == pytest.approx(4 / 2 / 7)
    assert row(frame, "gate_mass", 1)["chance"] == pytest.approx(1 / 10)
    assert row(frame, "gate_mass", 1)["random_router"] is None
    scores = [math.exp(2)] * 2 + [1.0] * 8
    assert row(frame, "topk_mass")["value"] == pytest.approx(sum(scores[:2]) / sum(scores))
    assert row(frame, "topk_mass")["chance"] == 2 / 10
    assert row(frame, "margin")["value"] == pytest.approx(0, abs=1e-12)
    assert set(frame["tokens"]) == {7}


def test_a_text_of_first_tokens_has_no_values():
    frame = table([[1, 0], [0, 2]], TextIndex.of([[5], [6]]), 3)
    kept = frame.filter(~pl.col("measure").is_in(["output_max", "super_expert"]))
    assert kept["value"].null_count() == kept["low"].null_count() == len(kept)
    assert set(frame["tokens"]) == {0}


def test_one_expert_has_no_balance():
    frame = table([[0]] * 30, TextIndex.of([[3] * 5] * 6), 1)
    assert row(frame, "load_entropy")["value"] is None and row(frame, "max_vio")["value"] == 0
    assert row(frame, "repeat_top1")["value"] == row(frame, "repeat_top1")["chance"] == 1
    assert frame.filter(measure="co_activation").is_empty()


def test_a_document_of_first_tokens_only_is_none_that_is_drawn():
    sequences = [[0] * 12] * 6
    ids = choose(noise(TextIndex.of(sequences), 4))
    plain = table(ids, TextIndex.of(sequences), 4)
    index = TextIndex.of([*sequences[:3], [7], *sequences[3:]])
    longer = torch.cat([ids[:36], torch.tensor([[0, 1]]), ids[36:]])
    assert table(longer, index, 4).drop("tokens").equals(plain.drop("tokens"))


def test_other_names_of_the_experts_permute_subjects_and_leave_the_layer():
    index, order = text(sequences=12), [3, 0, 4, 1, 2]
    ids = choose(noise(index, 5) + torch.linspace(0, 0.5, 5))
    frame, renamed = table(ids, index, 5), table(torch.tensor(order)[ids], index, 5)
    for each in frame.iter_rows(named=True):
        if each["measure"] in ("output_max", "expert_norm", "reap", "super_expert"):
            continue  # made up by the number of the expert
        subject = each["subject"]
        if subject not in ("layer", "mean_abs"):
            subject = ",".join(str(order[int(expert)]) for expert in subject.split(","))
        other = row(renamed, each["measure"], subject)
        for column in ("value", "low", "high", "random_router"):
            assert other[column] == pytest.approx(each[column], abs=1e-9), (each["measure"], column)


def test_the_same_counts_give_the_same_numbers():
    index = text(sequences=8)
    ids = choose(noise(index, 5))
    assert table(ids, index, 5, layer=2).equals(table(ids, index, 5, layer=2))
    assert not table(ids, index, 5, layer=2).equals(table(ids, index, 5, layer=1))


@pytest.mark.parametrize("statistic", ["share", "entropy"])
def test_intervals_cover_at_about_their_level(statistic):
    """Documents that differ: an interval over tokens would miss the truth far more often."""
    generator = np.random.default_rng(0)
    compute = {"share": lambda load: load[..., 0] / load.sum(-1), "entropy": measures.load_entropy}[statistic]

    def sample():
        chances = generator.dirichlet([6, 4, 3, 3], size=32)
        return np.stack([generator.multinomial(80, chance) for chance in chances])

    truth = compute(np.mean([sample() for _ in range(3000)], axis=0).sum(0)[None])[0]
    if statistic == "entropy":  # what a text of this size has on average
        truth = np.mean([compute(sample().sum(0)[None])[0] for _ in range(3000)])
    covered = []
    for _ in range(400):
        counts = sample()
        _, low, high = interval(resample(compute, block_weights(32, generator), counts))
        covered.append(low <= truth <= high)
    assert 0.90 <= np.mean(covered) <= 0.98


def test_few_blocks_have_no_interval_and_blocks_are_drawn_with_replacement():
    generator = np.random.default_rng(0)
    assert block_weights(4, generator).tolist() == [[1, 1, 1, 1]]
    weights = block_weights(6, generator)
    assert weights.shape == (1 + DRAWS, 6) and (weights.sum(1) == 6).all() and (weights[0] == 1).all()
    assert (weights[1:] == 0).any() and weights[1:].var(0) == pytest.approx(np.full(6, 5 / 6), rel=0.2)


def test_resampling_in_parts_is_the_same(monkeypatch):
    counts = np.random.default_rng(0).integers(9, size=(8, 3, 5))
    weights = block_weights(8, np.random.default_rng(1))
    whole = resample(measures.largest_share, weights, counts)
    wanted = [measures.largest_share((w[:, None, None] * counts).sum(0)) for w in weights]
    assert whole == pytest.approx(np.array(wanted))
    monkeypatch.setattr("moe_atlas.behavioral.resampling._NUMBERS", 100)
    assert np.array_equal(resample(measures.largest_share, weights, counts), whole)


def test_super_experts_are_large_among_all_and_not_late():
    largest = {layer: np.random.default_rng(layer).random(100) for layer in range(8)}
    largest[1][7], largest[2][3], largest[7][50] = 400.0, 30.0, 390.0  # 30 is below a tenth of 400; layer 7 is late
    flags = super_experts(largest)
    assert [(layer, int(e)) for layer in range(8) for e in np.flatnonzero(flags[layer])] == [(1, 7)]
    assert super_experts({}) == {}
    entries = [({"layer": layer, "site": site}, largest[layer]) for layer in range(8) for site in ("ffn", "attention")]
    assert {key: flags.sum() for key, flags in flags_by_layer(entries).items() if flags.any()} == {
        (1, "ffn"): 1,
        (1, "attention"): 1,
    }

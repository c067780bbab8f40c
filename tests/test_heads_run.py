"""The analysis of whole models: what is read, what each expert's absence costs, and the tables that come of it."""

import subprocess
import sys

import heads_models
import numpy as np
import polars as pl
import pytest
import torch
from workflow_runs import ROOT

from moe_atlas import tables
from moe_atlas.architectures.attention_experts import routed_experts
from moe_atlas.errors import AtlasError
from moe_atlas.heads import reading
from moe_atlas.heads.material import Material, read_material
from moe_atlas.heads.model import Streamed, Whole, open_host
from moe_atlas.heads.record import ChoiceRecord
from moe_atlas.heads.run import Analysis, Settings
from moe_atlas.moa.registry import word_tokenizer
from moe_atlas.moa.settings import load_settings
from moe_atlas.training.tokenizer import save_tokenizer

LENGTHS = (9, 5, 12, 12, 7, 9, 11, 8)


class Names:
    """Names of 40 tokens: digits, words, pieces, marks."""

    special, pad, mask = frozenset({0, 1, 2}), 0, 39

    def text(self, token: int) -> str:
        return ("12", " word", "ing", " The", ".")[token % 5] + ("" if token % 5 != 1 else str(token))


def sequences(types: int = 8, repeat: int = 1, seed: int = 0) -> list[list[int]]:
    generator = np.random.default_rng(seed)
    return [[1, *generator.integers(3, 3 + types, length - 1).tolist()] for length in LENGTHS * repeat]


def material(objective: str = "causal", repeat: int = 1) -> Material:
    own = sequences(repeat=repeat)
    if objective != "translation":
        return Material(own, list(range(len(own))))
    targets = [[1, *ids[:0:-1], 2] for ids in own]
    return Material([[*ids[1:], 2] for ids in own], list(range(len(own))), targets)


# Reading ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [20, 1000])
def test_every_token_is_read_in_one_batch_and_its_next_is_predicted(batch):
    own = sequences()
    read = reading.causal(own, [0, 0, 1, 1, 2, 2, 3, 3], batch)
    flat, index = [token for ids in own for token in ids], read.index["text"]
    rows = torch.cat([one.rows["text"] for one in read.batches])
    assert sorted(rows.tolist()) == list(range(len(flat))) and read.side("causal") == "text"
    predicted = {}
    for one in read.batches:
        ids = one.arguments["input_ids"].flatten()
        assert ids[one.tokens["text"]].tolist() == [flat[row] for row in one.rows["text"].tolist()]
        assert one.arguments["attention_mask"].sum() == len(one.tokens["text"])
        for place, label, row in zip(one.places.tolist(), one.labels.tolist(), one.read.tolist(), strict=True):
            assert ids[place] == flat[row] and label == flat[row + 1]
            predicted[row] = label
        assert one.blocks.tolist() == [int(index.block[row + 1]) for row in one.read.tolist()]
    assert len(predicted) == len(flat) - len(own)


def test_hidden_tokens_are_predicted_at_their_own_place():
    own = sequences(repeat=8)
    read = reading.masked(own, range(len(own)), mask=39, seed=0, share=0.3, batch_tokens=50)
    flat = [token for ids in own for token in ids]
    hidden = 0
    for one in read.batches:
        ids = one.arguments["input_ids"].flatten()
        place_of = dict(zip(one.tokens["text"].tolist(), one.rows["text"].tolist(), strict=True))
        for place in one.tokens["text"].tolist():
            if place in one.places.tolist():
                assert ids[place] == 39 and read.index["text"].position[place_of[place]] > 0
            else:
                assert ids[place] == flat[place_of[place]]
        assert one.labels.tolist() == [flat[place_of[place]] for place in one.places.tolist()]
        assert (one.read == -1).all()
        hidden += len(one.places)
    assert hidden / (len(flat) - len(own)) == pytest.approx(0.3, abs=0.05)


def test_a_translation_is_read_on_two_sides_and_its_target_is_predicted():
    own = material("translation")
    read = reading.paired(own.sequences, own.targets, own.documents, pad=0, batch_sentences=3)
    flat = {"source": sum(map(list, own.sequences), []), "target": sum(map(list, own.targets), [])}
    seen = {"source": 0, "target": 0}
    for one in read.batches:
        names = {"source": "input_ids", "target": "decoder_input_ids"}
        for side, name in names.items():
            ids = one.arguments[name].flatten()[one.tokens[side]].tolist()
            assert ids == [flat[side][row] for row in one.rows[side].tolist()]
            seen[side] += len(ids)
        assert one.labels.tolist() == [flat["target"][row + 1] for row in one.read.tolist()]
        assert torch.equal(one.places, one.tokens["target"])
    assert seen == {"source": len(flat["source"]), "target": len(flat["target"]) - len(own.targets)}
    assert [read.side(kind) for kind in ("encoder", "decoder", "cross")] == ["source", "target", "target"]


def test_texts_are_cut_into_windows_of_their_documents():
    parts, documents = reading.cut([list(range(7)), [9], list(range(4))], [5, 6, 7], 3)
    assert parts == [[0, 1, 2], [3, 4, 5], [0, 1, 2]] and documents == [5, 5, 7]
    assert reading.cut([list(range(7))], [1], None) == ([list(range(7))], [1])
    thin, of = reading.thinned([[0] * 10] * 9, range(9), 30)
    assert len(thin) == 3 and of == [0, 3, 6]


# Models -------------------------------------------------------------------------------------------


def by_hand(model, experts_of, batches) -> torch.Tensor:
    """Losses (1 + A, P) of a whole model, each expert left out with a router whose logits are changed."""
    rows = []

    def losses() -> torch.Tensor:
        found = []
        for batch in batches:
            given = {
                k: v for k, v in batch.arguments.items() if k != "attention_mask" or model.config.model_type == "moa"
            }
            logits = model(**given, use_cache=False).logits.flatten(0, 1)[batch.places].double()
            found.append(-logits.log_softmax(-1).gather(1, batch.labels[:, None])[:, 0])
        return torch.cat(found)

    rows.append(losses())
    for experts in experts_of:
        for expert in range(experts.experts):
            with experts.without(expert):
                rows.append(losses())
    return torch.stack(rows)


def test_losses_of_a_streamed_jetmoe_are_those_of_the_loaded_one(tmp_path):
    model = heads_models.save_jetmoe(tmp_path).eval()
    host = open_host(tmp_path, "float32")
    assert isinstance(host, Streamed) and host.layers == 2
    batches = reading.causal(sequences(), range(len(LENGTHS)), 40).batches
    arms, losses = host.losses(batches, lambda: None)
    experts = [one for index, layer in enumerate(model.model.layers) for one in routed_experts(layer, index)]
    assert [arm for arm, _ in arms[::4]] == [(one.site, one.kind, one.layer) for one in experts]
    with torch.no_grad():
        torch.testing.assert_close(losses, by_hand(model, experts, batches), rtol=1e-4, atol=1e-5)
    moved = (losses[1:] - losses[0]).abs().amax(1) > 1e-4
    read = reading.causal(sequences(), range(len(LENGTHS)), 40)
    records = host.observe(read.batches, lambda one: ChoiceRecord(one, read), lambda: None)
    used = [expert in record.ids for record in records for expert in range(4)]
    assert moved.tolist() == used and sum(used) > 12


@pytest.mark.parametrize("objective", ["causal", "masked", "translation"])
def test_losses_of_a_loaded_moa(tmp_path, objective):
    model = heads_models.save_moa(tmp_path, objective)
    host = open_host(tmp_path, "float32")
    assert isinstance(host, Whole) and host.objective == objective and host.longest == 32
    read = material(objective).reading(objective, Names(), 10_000, 32, batch_tokens=40, hidden=0)
    arms, losses = host.losses(read.batches, lambda: None)
    torch.testing.assert_close(losses, by_hand(model, routed_experts(model), read.batches), rtol=1e-4, atol=1e-5)
    assert len(arms) == 4 * {"causal": 2, "masked": 2, "translation": 6}[objective]


def test_choices_of_a_pass_are_those_of_the_loaded_model(tmp_path):
    model = heads_models.save_jetmoe(tmp_path).eval()
    own = sequences()
    read = reading.causal(own, range(len(own)), 30)
    records = list(Streamed(tmp_path, "float32").observe(read.batches, lambda e: ChoiceRecord(e, read), lambda: None))
    assert [(one.experts.site, one.experts.layer) for one in records] == [
        ("attention", 0), ("ffn", 0), ("attention", 1), ("ffn", 1)
    ]  # fmt: skip
    start = 0
    for ids in own:
        with torch.no_grad():
            found = model(torch.tensor([ids]), output_router_logits=True).router_logits
        # transformers gives the attention router's logits twice: attention, attention, ffn.
        for record, logits in zip(records, (found[0], found[2], found[3], found[5]), strict=True):
            values, chosen = logits.topk(2)
            assert record.ids[start : start + len(ids)].tolist() == chosen.tolist()
            np.testing.assert_allclose(record.weights[start : start + len(ids)], values.softmax(-1), rtol=1e-4)
        start += len(ids)
    for record in records:
        assert (record.random_ids != record.ids).any() and record.counted.sum() == start - len(own)


# Tables -------------------------------------------------------------------------------------------

SETTINGS = Settings(tokens=2000, loss_tokens=300, map_tokens=100, map_length=8)


def analysed(directory, objective: str = "causal") -> dict[str, pl.DataFrame]:
    host = open_host(directory, "float32")
    texts = {"prose": material(objective, 20), "code": material(objective, 12)}
    return Analysis(host, "toy", Names(), SETTINGS).tables(texts)


def test_jetmoe_has_every_table_with_both_sites(tmp_path):
    heads_models.save_jetmoe(tmp_path)
    found = analysed(tmp_path)
    assert set(found) == set(tables.HEADS) and all(len(frame) for frame in found.values())
    for name, frame in found.items():
        tables.write(name, frame, tmp_path / f"{name}.parquet")
        assert tables.read(name, tmp_path / f"{name}.parquet").equals(frame)
    for name in ("moa_load", "moa_routing", "moa_association", "moa_ablation"):
        groups = set(found[name].select("corpus", "site", "kind", "layer").rows())
        assert groups == {(c, s, "causal" if s == "attention" else "ffn", layer)
                          for c in ("prose", "code") for s in ("attention", "ffn") for layer in (0, 1)}  # fmt: skip
    assert found["moa_maps"]["site"].unique().to_list() == ["attention"]
    share = found["moa_load"].filter(measure="share").group_by("corpus", "site", "layer").agg(pl.col("value").sum())
    assert share["value"].to_list() == pytest.approx([1.0] * 8)
    assert found["moa_association"]["router"].unique().sort().to_list() == ["learned", "random"]
    both = found["moa_association"].filter(measure="ablation")
    assert len(both) == 8 and both["value"].is_not_null().all()
    sites = found["moa_sites"]
    assert set(sites["measure"]) == {"information", "entropy", "max_vio", "domain"} and len(sites) == 2 * 7
    # What the comparison takes off is what the tables say of each site.
    row = sites.filter(corpus="prose", layer=1, measure="information").row(0, named=True)
    own = found["moa_association"].filter(corpus="prose", layer=1, measure="information", router="learned")
    assert row["attention"] == pytest.approx(own.filter(site="attention")["corrected"][0])
    assert row["difference"] == pytest.approx(row["attention"] - own.filter(site="ffn")["corrected"][0])
    assert found["moa_circuits"].filter(circuit="QK", layer=0).height == 10
    again = analysed(tmp_path)
    assert all(again[name].equals(frame) for name, frame in found.items())


@pytest.mark.parametrize("objective", ["masked", "translation"])
def test_moa_models_have_their_kinds_and_no_ffn_beside_them(tmp_path, objective):
    heads_models.save_moa(tmp_path, objective, frozen_router=objective == "masked")
    found = analysed(tmp_path, objective)
    kinds = {"masked": {"encoder"}, "translation": {"encoder", "decoder", "cross"}}[objective]
    assert set(found["moa_load"]["kind"]) == kinds and found["moa_sites"].is_empty()
    distances = found["moa_maps"].filter(measure="distance")
    assert set(distances["kind"]) == kinds - {"cross"} and set(found["moa_maps"]["kind"]) == kinds
    known = found["moa_ablation"].filter(pl.col("association").is_not_null())
    if objective == "masked":
        assert set(found["moa_association"]["router"]) == {"frozen", "random"}
        assert set(found["moa_ablation"]["by"]) == set(known["by"]) == {"predicted"}
    else:
        assert set(found["moa_ablation"]["by"]) == {"read", "predicted"}
        assert set(known["by"]) == {"read"} and set(known["kind"]) == {"decoder", "cross"}


def test_a_model_without_attention_experts_is_refused(tmp_path):
    import families

    families.save("mixtral", tmp_path / "mixtral")
    with pytest.raises(AtlasError, match="no attention experts"):
        open_host(tmp_path / "mixtral")
    heads_models.save_moa(tmp_path / "mha", attention="mha")
    with pytest.raises(AtlasError, match="no attention experts"):
        open_host(tmp_path / "mha")


# Files --------------------------------------------------------------------------------------------


@pytest.fixture
def worded(tmp_path):
    """A folder with a tokenizer of whole words."""
    tokenizer = word_tokenizer({"a", "dog", "sees", "cat", "hund", "ser", "kat"})
    save_tokenizer(tokenizer, tmp_path, 32)
    return tmp_path, tokenizer


def test_pairs_of_texts_and_of_ids_are_read_alike_with_begin_and_end(worded):
    folder, tokenizer = worded
    pairs = {"source": ["a dog sees", "a cat"], "target": ["hund ser", "kat"]}
    pl.DataFrame(pairs).write_parquet(folder / "texts.parquet")
    ids = {name: [tokenizer.encode(text).ids for text in texts] for name, texts in pairs.items()}
    pl.DataFrame(ids).write_parquet(folder / "ids.parquet")
    for file in ("texts.parquet", "ids.parquet"):
        found, names = read_material(folder, folder / file, "translation")
        assert found.sequences == [[*one, 2] for one in ids["source"]]
        assert found.targets == [[1, *one, 2] for one in ids["target"]]
        assert names.text(ids["target"][0][0]) == "hund" and {0, 1, 2} <= names.special


def test_a_file_that_does_not_fit_the_model_ends_with_a_sentence(worded):
    folder, _ = worded
    pl.DataFrame({"text": ["a dog"]}).write_parquet(folder / "texts.parquet")
    with pytest.raises(AtlasError, match="there is no column source, target"):
        read_material(folder, folder / "texts.parquet", "translation")
    found, names = read_material(folder, folder / "texts.parquet", "causal")
    assert [len(ids) for ids in found.sequences] == [2] and found.documents == [0]
    with pytest.raises(AtlasError, match="has no mask token"):
        _ = names.mask
    pl.DataFrame({"text": ["a"]}).write_parquet(folder / "short.parquet")
    with pytest.raises(AtlasError, match="no two tokens in a row"):
        read_material(folder, folder / "short.parquet", "causal")


def test_the_test_of_the_translation_task_is_written_as_ids(tmp_path):
    command = [sys.executable, "scripts/moa_pairs.py", "--settings", "config/moa.yaml"]
    command += ["--objective", "translation", "--output", str(tmp_path / "pairs.parquet")]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    frame = pl.read_parquet(tmp_path / "pairs.parquet")
    task = load_settings(ROOT / "config/moa.yaml").tasks["translation"]
    assert len(frame) > 100 and frame["document"].to_list() == list(range(len(frame)))
    lengths = [len(ids) for ids in frame["source"]]
    assert min(lengths) >= 2 and max(lengths) <= task.length
    ids = [one for side in ("source", "target") for line in frame[side] for one in line]
    assert min(ids) > 3 and len(set(ids)) > 100  # words, and none of the four special tokens

"""Arms do what they say on tiny models; a run repeats; where an arm must win or lose, it does."""

import itertools
import math

import numpy as np
import polars as pl
import pytest
import torch
from transformers import (
    BertConfig,
    BertForMaskedLM,
    MistralConfig,
    MistralForCausalLM,
    MistralForSequenceClassification,
    OPTConfig,
    OPTForSequenceClassification,
)
from transformers.utils import logging

from moe_atlas.emoe.copies import CopiedExperts
from moe_atlas.emoe.ffns import dense_ffns
from moe_atlas.emoe.router import CosineRouter
from moe_atlas.errors import AtlasError
from moe_atlas.tokens import load_tokenizer
from moe_atlas.training.loop import make_deterministic
from moe_atlas.training.save import save_checkpoint
from moe_atlas.training.tokenizer import train_tokenizer
from moe_atlas.tuning.arms import ARMS, Arm
from moe_atlas.tuning.classifier import build, choices, expert_counts, load_classifier, masks_of
from moe_atlas.tuning.data import Examples, encode
from moe_atlas.tuning.fit import Schedule, evaluate, fit, orders
from moe_atlas.tuning.metrics import chance, score
from moe_atlas.tuning.run import run_job
from moe_atlas.tuning.settings import Job, Settings, Shape, Study

H, F, N, K, LAYERS = 16, 32, 8, 2, [1]
WORDS = ("red", "green", "blue", "one", "two", "three", "four")
SHARED = {"hidden_size": H, "intermediate_size": F, "num_hidden_layers": 2, "num_attention_heads": 2}
SHARED |= {"vocab_size": 300, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2}
CPU = torch.device("cpu")
BACKBONES = pytest.mark.parametrize("backbone", ["mistral", "bert"])
logging.set_verbosity_error()


def frame() -> pl.DataFrame:
    """Texts of seven words; the class is whether there are more colours than numbers in the first half of the words."""
    rng = np.random.default_rng(0)
    rows = []
    for split, count in (("train", 48), ("validation", 24), ("in-domain", 24), ("shifted", 24)):
        for number in range(count):
            words = [WORDS[i] for i in rng.integers(len(WORDS), size=rng.integers(2, 8))]
            label = float(sum(word in WORDS[:3] for word in words) * 2 > len(words))
            rows.append({"split": split, "document": f"{split} {number}", "text": " ".join(words), "label": label})
    return pl.DataFrame(rows).with_columns(task=pl.lit("t"), pair=pl.lit(None, pl.String), classes=pl.lit(2))


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """A tiny random Mistral and a tiny random BERT with one tokenizer."""
    folder = tmp_path_factory.mktemp("dense")
    tokenizer = train_tokenizer([" ".join(WORDS)], 300)
    torch.manual_seed(0)
    mistral = MistralConfig(num_key_value_heads=1, pad_token_id=None, initializer_range=0.2, **SHARED)
    bert = BertConfig(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, initializer_range=0.2, **SHARED)
    save_checkpoint(MistralForCausalLM(mistral), tokenizer, folder / "mistral", 0)
    save_checkpoint(BertForMaskedLM(bert), tokenizer, folder / "bert", 0)
    return folder


@pytest.fixture(scope="module")
def examples(checkpoints) -> dict[str, Examples]:
    return encode(frame(), load_tokenizer(checkpoints / "mistral"), 32)


def made(checkpoints, examples, arm: str | Arm, backbone: str = "mistral", seed: int = 0, experts=N, k=K):
    make_deterministic(seed)
    model = load_classifier(checkpoints / backbone, 2, examples["train"].padding, seed)
    arm = ARMS[arm] if isinstance(arm, str) else arm
    return build(model, arm, experts, k, LAYERS, examples["train"], seed)


def logits(built, examples: Examples) -> torch.Tensor:
    return torch.cat([part for part, _ in choices(built, examples)])


# What an arm is before the first step


@BACKBONES
def test_padding_does_not_change_an_answer(checkpoints, examples, backbone):
    built = made(checkpoints, examples, "emoe", backbone)
    together = logits(built, examples["validation"])
    for i in (0, 5, 11):
        one = examples["validation"].answers(built.model, examples["validation"].batch([i]), CPU)
        torch.testing.assert_close(together[i], one[0].detach(), rtol=1e-4, atol=1e-5)


@BACKBONES
def test_all_arms_have_the_same_head_and_order(checkpoints, examples, backbone):
    heads = []
    for name, arm in ARMS.items():
        if arm.lora:
            continue
        built = made(checkpoints, examples, name, backbone, seed=3)
        heads.append(
            next(value for key, value in built.parameters().items() if key.startswith(("score", "classifier")))
        )
    assert all(torch.equal(heads[0], head) for head in heads)
    again = made(checkpoints, examples, "dense", backbone, seed=4)
    other = next(value for key, value in again.parameters().items() if key.startswith(("score", "classifier")))
    assert not torch.equal(heads[0], other)
    seen = np.concatenate(orders(48, 16, 6, 0))
    assert (np.bincount(seen) == 2).all() and not np.array_equal(seen, np.concatenate(orders(48, 16, 6, 1)))


@BACKBONES
def test_gmoe_begins_as_the_dense_model_and_emoe_does_with_all_experts(checkpoints, examples, backbone):
    dense = logits(made(checkpoints, examples, "dense", backbone), examples["validation"])
    copies = made(checkpoints, examples, "gmoe", backbone, experts=4)
    torch.testing.assert_close(logits(copies, examples["validation"]), dense, rtol=1e-4, atol=1e-5)
    assert torch.equal(logits(made(checkpoints, examples, "emoe", backbone, k=N), examples["validation"]), dense)
    masked = made(checkpoints, examples, "emoe", backbone)
    assert (logits(masked, examples["validation"]) - dense).abs().max() > 1e-4
    for mask in masked.masks:
        mask.remove()
    assert torch.equal(logits(masked, examples["validation"]), dense)


@BACKBONES
@pytest.mark.parametrize("name", [name for name, arm in ARMS.items() if not arm.lora])
def test_every_arm_learns_and_moves_what_it_says(checkpoints, examples, backbone, name):
    built = made(checkpoints, examples, name, backbone)
    before = {key: value.detach().clone() for key, value in built.parameters().items()}
    fitted = fit(built, examples["train"], examples["validation"], "accuracy", 0.01, Schedule(40, 16, 10, 4), 0)
    after = built.parameters()
    moved = {key for key, value in after.items() if not torch.equal(value, before[key])}
    assert any(key.startswith(("score", "classifier")) for key in moved)
    routers = {key for key in after if "router" in key}
    assert bool(routers) == (ARMS[name].gate == "cosine") and routers <= moved
    assert fitted.validation > 0.6 and fitted.validation == evaluate(built, examples["validation"], "accuracy")[0]
    assert bool(fitted.selection) == ARMS[name].routed


@pytest.mark.parametrize("name", ["emoe-learn-one", "gmoe", "lora-emoe"])
def test_all_that_is_tuned_moves_to_a_device(checkpoints, examples, name):
    built = made(checkpoints, examples, name, experts=4).to("meta")
    assert {value.device.type for value in built.parameters().values()} == {"meta"}


@pytest.mark.parametrize("name", ["emoe", "emoe-learn-softmax", "gmoe"])
def test_ffns_that_see_all_tokens_in_one_row_are_tuned_too_or_refused(examples, name):
    """OPT lays a batch's tokens end to end before its first matrix, which lies in the layer itself."""
    torch.manual_seed(0)
    sizes = {"hidden_size": H, "ffn_dim": F, "word_embed_proj_dim": H, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = OPTConfig(vocab_size=300, **sizes)
    model = OPTForSequenceClassification(config)
    model.config.pad_token_id = examples["train"].padding
    if name == "gmoe":
        with pytest.raises(AtlasError, match="OPTDecoderLayer has no module that is its FFN alone; leave the arm"):
            build(model, ARMS[name], N, K, LAYERS, examples["train"], 0)
        return
    built = build(model, ARMS[name], N, K, LAYERS, examples["train"], 0)
    fit(built, examples["train"], examples["validation"], "accuracy", 0.01, Schedule(4, 16, 2, 4), 0)
    assert expert_counts(built, examples["train"]).sum() == K * sum(map(len, examples["train"].ids))


def test_the_splits_of_the_arms(checkpoints, examples):
    contiguous = made(checkpoints, examples, "contiguous-split").masks[0].labels
    assert np.array_equal(contiguous, np.arange(F) // (F // N))
    first, second = (made(checkpoints, examples, "random-split", seed=seed).masks[0].labels for seed in (0, 1))
    assert not np.array_equal(first, second)
    for name in ("emoe", "random-split", "contiguous-split"):
        assert (np.bincount(made(checkpoints, examples, name).masks[0].labels) == F // N).all()


def test_the_static_mask_is_of_the_experts_that_the_untuned_model_uses_most(checkpoints, examples):
    counts = expert_counts(made(checkpoints, examples, "emoe"), examples["train"])[0]
    assert counts.sum() == K * sum(map(len, examples["train"].ids))
    static = made(checkpoints, examples, "static-mask")
    assert static.masks[0].choose == sorted(np.argsort(-counts, kind="stable")[:K].tolist())
    assert expert_counts(static, examples["shifted"])[0].tolist() == [
        sum(map(len, examples["shifted"].ids)) * (expert in static.masks[0].choose) for expert in range(N)
    ]


def test_noise_has_its_width_and_spares_the_head(checkpoints, examples):
    dense, noisy = (
        dict(made(checkpoints, examples, name).model.named_parameters()) for name in ("dense", "dense-noise")
    )
    for name, value in dense.items():
        moved = (noisy[name] - value).detach()
        if name.startswith("score"):
            assert (moved == 0).all()
        elif value.numel() > 1:
            width = 0.15 * value.std().item()
            assert moved.abs().max() <= width / 2 * (1 + 1e-5)
            if value.numel() > 500:  # the standard deviation of a uniform distribution
                assert math.isclose(moved.std().item(), width / math.sqrt(12), rel_tol=0.1)


def test_dropout_is_in_the_converted_layer_while_training_only(checkpoints, examples):
    built = made(checkpoints, examples, "dense-dropout")
    train = examples["train"]
    inputs = train.batch(range(16))
    built.model.eval()
    first, second = (train.answers(built.model, inputs, CPU) for _ in range(2))
    assert torch.equal(first, second)
    heard = {}
    for ffn in dense_ffns(built.model):
        ffn.first.register_forward_hook(lambda _m, _i, out, layer=ffn.layer: heard.update({layer: out}))
    built.model.train()
    train.answers(built.model, inputs, CPU)
    assert (heard[0] == 0).float().mean() == 0 and 0.07 < (heard[1] == 0).float().mean() < 0.13


def test_the_cosine_router_by_hand():
    torch.manual_seed(0)
    router, x = CosineRouter(H, N).double(), torch.randn(5, H, dtype=torch.float64)
    projected = x @ router.projection.weight.T + router.projection.bias
    for i, e in itertools.product(range(5), range(N)):
        vector = router.vectors[:, e]
        cosine = projected[i] @ vector / projected[i].norm() / vector.norm()
        assert math.isclose(router(x)[i, e].item(), 2 * cosine.item(), rel_tol=1e-5, abs_tol=1e-6)
    with torch.no_grad():
        router.temperature.fill_(9.0)
        assert router(x).abs().max() <= 100.0001
    assert router.projection.out_features == 256


def test_copies_against_a_loop_over_tokens():
    torch.manual_seed(0)
    copies = CopiedExperts(torch.nn.Linear(H, H), H, 4, 2)
    for expert in copies.experts:
        torch.nn.init.normal_(expert.weight)
    x = torch.randn(2, 3, H)
    output = copies(x)
    for i, j in itertools.product(range(2), range(3)):
        values, best = copies.router(x[i, j]).topk(2)
        expected = sum(w * copies.experts[e](x[i, j]) for w, e in zip(values.softmax(-1), best.tolist(), strict=True))
        torch.testing.assert_close(output[i, j], expected, rtol=1e-4, atol=1e-5)


@BACKBONES
@pytest.mark.parametrize("name", ["lora", "lora-emoe"])
def test_lora_moves_the_updates_and_the_head_alone(checkpoints, examples, backbone, name):
    built = made(checkpoints, examples, name, backbone)
    assert all("lora_" in key or "score" in key or "classifier" in key for key in built.parameters())
    assert sum("lora_A" in key for key in built.parameters()) == 4  # query and value of two layers
    frozen = {key: value.clone() for key, value in built.model.named_parameters() if not value.requires_grad}
    fit(built, examples["train"], examples["validation"], "accuracy", 0.05, Schedule(10, 16, 5, 4), 0)
    assert all(torch.equal(value, frozen[key]) for key, value in built.model.named_parameters() if key in frozen)
    assert len(built.masks) == (name == "lora-emoe")


# Runs


def settings(checkpoints, arms, seeds: int = 2, rates=(0.01, 0.02), **study) -> tuple[Settings, Job]:
    values = {"models": ("tiny",), "tasks": ("t",), "arms": arms, "shapes": (Shape(N, K, (1,)),), "fractions": (1.0,)}
    values |= {"seeds": seeds, "selection_seeds": 1, "rates": {"full": rates, "lora": rates}}
    training = {"length": 32, "steps": 12, "batch": 16, "evaluate": 6, "patience": 3, "weight_decay": 0.01}
    found = Settings(
        models={"tiny": {"folder": str(checkpoints / "mistral"), "ready": ""}},
        tasks={"t": {"source": "demo:t", "metric": "accuracy"}},
        defaults={},
        studies={"s": Study("s", **values | study)},
        training=training,
        copies={"experts": 4, "k": 2},
        arms_per_job=9,
        job_needs={},
    )
    return found, found.jobs()[0]


def test_a_job_repeats_to_the_same_tables(checkpoints, tmp_path):
    arms = ("dense", "emoe", "gmoe", "lora-emoe", "random-split", "static-mask")
    files = []
    for number in range(2):
        for table in run_job(*settings(checkpoints, arms), frame()):
            files.append(tmp_path / f"{number}-{len(files)}.parquet")
            table.write_parquet(files[-1])
    assert files[0].read_bytes() == files[2].read_bytes() and files[1].read_bytes() == files[3].read_bytes()


def test_the_rate_is_chosen_on_validation_and_only_its_runs_are_tested(checkpoints):
    runs, selection = run_job(*settings(checkpoints, ("dense", "emoe"), seeds=3, rates=(1e-9, 0.02)), frame())
    validation = runs.filter(pl.col("test") == "validation")
    for arm in ("dense", "emoe"):
        mine = validation.filter(pl.col("arm") == arm)
        assert sorted(mine["seed"]) == [0, 0, 1, 2]
        first = mine.filter(pl.col("seed") == 0)
        assert first.filter("chosen")["value"].item() == first["value"].max()
        assert mine.filter("chosen")["learning_rate"].n_unique() == 1
    tested = runs.filter(pl.col("test") != "validation")
    assert tested["chosen"].all() and set(tested["arm"]) == {"dense", "emoe", "dense2emoe", "emoe2dense"}
    assert set(tested["test"]) == {"in-domain", "shifted"} and len(tested) == 4 * 2 * 3
    shares = selection.filter(pl.col("measure") == "share")
    sums = shares.group_by("arm", "seed", "step", "layer").agg(pl.col("value").sum())
    assert np.allclose(sums["value"], 1) and set(shares["step"]) == {0, 6, 12}
    overlaps = selection.filter(pl.col("measure") != "share", pl.col("step") == 0)
    assert (overlaps["value"] == 1).all() and (overlaps["chance"] == K / N).all()


def test_dropout_has_layers_but_no_experts(checkpoints):
    """Of two shapes in the same layers it is one run, since nothing of it depends on N and k."""
    shapes = (Shape(N, K, (1,)), Shape(N, 1, (1,)), Shape(N, K, (0, 1)))
    runs, selection = run_job(
        *settings(checkpoints, ("dense-dropout",), seeds=1, rates=(0.02,), shapes=shapes), frame()
    )
    found = runs.filter(test="shifted").select("experts", "k", "layers").sort("layers").rows()
    assert found == [(None, None, "0,1"), (None, None, "1")] and selection.is_empty()


def test_toggling_all_experts_changes_nothing(checkpoints):
    """With k = N the mask is none, on or off."""
    job = settings(checkpoints, ("dense", "emoe"), seeds=1, rates=(0.02,), shapes=(Shape(N, N, (0, 1)),))
    runs, _ = run_job(*job, frame())
    values = runs.filter(pl.col("test") != "validation").group_by("test").agg(pl.col("value").n_unique(), pl.len())
    assert (values["value"] == 1).all() and (values["len"] == 4).all()


def test_a_fraction_is_the_first_part(examples):
    half = examples["train"].part(0.5)
    assert len(half) == 24 and half.ids == examples["train"].ids[:24]
    assert torch.equal(half.labels, examples["train"].labels[:24]) and len(examples["train"].part(0.001)) == 1


# A planted truth: the answer is computed by the neurons of one expert


def planted() -> tuple[MistralForSequenceClassification, Examples]:
    """A layer without attention; the class is the product of two signs of a token's vector, which only an FFN gives.

    Two neurons of expert 0 have the keys (a, 0, b) and (-a, 0, b), so that SiLU lets one of them through, and their
    values write the product of the signs. The keys of expert 1 have -b: its gate is low, and its neurons write nothing.
    """
    shape = {"hidden_size": 4, "intermediate_size": 4, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = MistralConfig(vocab_size=8, num_key_value_heads=1, pad_token_id=0, num_labels=2, **shape)
    model = MistralForSequenceClassification(config)
    signs = torch.tensor([[1.0, 1], [1, -1], [-1, 1], [-1, -1]])
    with torch.no_grad():
        layer = model.model.layers[0]
        model.model.embed_tokens.weight.zero_()
        model.model.embed_tokens.weight[1:5] = torch.cat([signs, torch.ones(4, 1), torch.zeros(4, 1)], 1)
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.gate_proj.weight.copy_(torch.tensor([[9.0, 0, 1, 0], [-9, 0, 1, 0], [0, 0, -2, 0], [0, 0, -2, 0]]))
        layer.mlp.up_proj.weight.copy_(torch.tensor([[0.0, 1, 0, 0], [0, -1, 0, 0], [0, 0, 0, 1], [0, 0, 0, 1]]))
        layer.mlp.down_proj.weight.zero_()
        layer.mlp.down_proj.weight[3, :2] = 1.0
    ids = [[1 + i % 4] for i in range(64)]
    labels = torch.tensor([int(signs[i % 4].prod() > 0) for i in range(64)])
    return model, Examples(ids, [[0]] * 64, labels, 0)


@pytest.mark.parametrize(("choose", "wins"), [("top", True), ("bottom", False), ("static", True)])
def test_the_arm_that_keeps_the_planted_expert_wins(choose, wins):
    make_deterministic(0)
    model, data = planted()
    built = build(model, Arm("mask", split="contiguous", choose=choose), 2, 1, [0], data, 0)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("score"))
    fit(built, data, data, "accuracy", 0.2, Schedule(60, 32, 20, 9), 0)
    assert (evaluate(built, data, "accuracy")[0] == 1.0) == wins


def test_masks_of_a_model_are_of_its_weights_now(checkpoints, examples):
    built = made(checkpoints, examples, "dense")
    (before,) = masks_of(built.model, N, K, LAYERS, 0)
    with torch.no_grad():
        dense_ffns(built.model)[1].first.weight.normal_()
    (after,) = masks_of(built.model, N, K, LAYERS, 0)
    assert not np.array_equal(before.labels, after.labels)


# Metrics


def test_metrics_by_hand():
    """Six answers: 3 true and 1 false of class 1 said, 1 missed, 1 right of class 0."""
    labels, said = np.array([1, 1, 1, 0, 1, 0]), np.array([1, 1, 1, 1, 0, 0])
    outputs = np.stack([1 - said, said], 1).astype(float)
    assert math.isclose(score("accuracy", outputs, labels), 4 / 6)
    assert math.isclose(score("accuracy-f1", outputs, labels), (4 / 6 + 6 / 8) / 2)
    assert math.isclose(score("matthews", outputs, labels), (3 * 1 - 1 * 1) / math.sqrt(4 * 4 * 2 * 2))
    x, y = np.array([[1.0], [2], [3], [10]]), np.array([1.0, 2, 4, 3])
    pearson = np.corrcoef(x[:, 0], y)[0, 1]
    assert math.isclose(score("pearson-spearman", x, y), (pearson + 0.8) / 2, rel_tol=1e-9)
    assert score("pearson-spearman", np.ones((4, 1)), y) == 0.0


def test_chance_is_the_best_of_one_answer_for_all():
    """Of 10 texts 7 of class 1, and 3 of it: F1 of saying 1 always is 2 p / (1 + p), of 0 always 0."""
    for positive in (7, 3):
        labels, p = np.array([1] * positive + [0] * (10 - positive)), positive / 10
        assert math.isclose(chance("accuracy", labels, 2), 0.7)
        assert math.isclose(chance("accuracy-f1", labels, 2), (p + 2 * p / (1 + p)) / 2)
        assert chance("matthews", labels, 2) == 0.0
    assert math.isclose(chance("accuracy", np.array([0, 1, 2, 2]), 3), 0.5)

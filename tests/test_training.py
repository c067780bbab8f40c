"""Training of the demo checkpoints: tokenizer, data, balancing, upcycling, format, same bytes twice."""

import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from safetensors import safe_open
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from moe_atlas import architectures
from moe_atlas.corpora import demo_texts
from moe_atlas.errors import AtlasError
from moe_atlas.files import read_json, sha256
from moe_atlas.training import recipes
from moe_atlas.training.balance import RouterLogits, load_balancing_loss
from moe_atlas.training.data import Batches, encode, pack, unigram, unigram_loss
from moe_atlas.training.loop import held_out_loss, learning_rate_factor, make_deterministic, train
from moe_atlas.training.questions import demo_questions
from moe_atlas.training.run import build_model, train_recipe
from moe_atlas.training.save import save_checkpoint
from moe_atlas.training.tokenizer import BOS_ID, EOS_ID, UNK_ID, demo_tokenizer

RECIPES = recipes.load()
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 48}


def small(name: str, **changes) -> recipes.Recipe:
    """A recipe with a model small enough to train in a second or two."""
    recipe = RECIPES[name]
    fields = {"config": {**recipe.config, **SMALL}, "steps": 60, "learning_rate": 2e-2, "sequence_length": 64}
    return dataclasses.replace(recipe, **{**fields, **changes})


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return demo_tokenizer(RECIPES["demo-mistral"].tokenizer_size)


@pytest.fixture(scope="module")
def random_ids() -> torch.Tensor:
    ids = torch.randint(3, 1536, (2, 17), generator=torch.Generator().manual_seed(5))
    ids[:, 0] = BOS_ID
    return ids


@pytest.fixture(scope="module")
def trained_dense(tmp_path_factory):
    """A small demo-mistral, trained through the same function as the real one."""
    folder = tmp_path_factory.mktemp("checkpoints") / "demo-mistral"
    record = train_recipe(small("demo-mistral"), folder / "training.json", steps_factor=0.5, seed=3)
    return folder, record


# Recipes


def test_the_mixture_is_the_twin_of_its_dense_reference():
    dense, mixture, instruct = (RECIPES[f"demo-{name}"] for name in ("mistral", "mixtral", "mixtral-instruct"))
    assert dense.keep_half and not mixture.keep_half
    for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"):
        assert dense.config[key] == mixture.config[key] == instruct.config[key]
    assert len({recipe.tokenizer_size for recipe in RECIPES.values()}) == 1


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("{recipe: demo-mistral, state: half}", "{recipe: demo-nothing, state: half}", "demo-mixtral: start_from"),
        (
            "{recipe: demo-mixtral, state: final}",
            "{recipe: demo-mixtral, state: best}",
            "demo-mixtral-instruct: start_from",
        ),
        ("{prose: 0.5, code: 0.5}", "{prose: 0.5, code: 0.6}", "the mix must share 1"),
        ("vocab_size: 1536", "vocab_size: 1537", "vocab_size and tokenizer_size differ"),
    ],
)
def test_a_recipe_that_cannot_be_is_refused(tmp_path, old, new, message):
    path = tmp_path / "recipes.yaml"
    path.write_text(recipes.RECIPES_FILE.read_text(encoding="utf-8").replace(old, new), encoding="utf-8")
    with pytest.raises(AtlasError, match=message):
        recipes.load(path)


# Tokenizer and texts


def test_tokenizer_round_trip_and_special_ids(tokenizer):
    assert [tokenizer.token_to_id(token) for token in ("<unk>", "<s>", "</s>")] == [UNK_ID, BOS_ID, EOS_ID] == [0, 1, 2]
    assert tokenizer.get_vocab_size() == RECIPES["demo-mistral"].tokenizer_size
    for text in ("As an open source alternative to", "  def f(x):\n\treturn x  # ü€漢🙂\x00", " "):
        ids = tokenizer.encode(text).ids
        assert ids[0] == BOS_ID and BOS_ID not in ids[1:]
        assert tokenizer.decode(ids) == text
    assert demo_tokenizer(tokenizer.get_vocab_size()).to_str() == tokenizer.to_str()


@pytest.mark.parametrize("name", list(RECIPES))
def test_saved_checkpoint_is_what_the_hub_classes_read(name, tokenizer, tmp_path, random_ids):
    """Every key of the file is used and none is missing; logits and token ids are those of the saved objects."""
    recipe = small(name, shard_size=100_000 if RECIPES[name].shard_size else 0)
    make_deterministic(0)
    model = build_model(dataclasses.replace(recipe, start_from=None)).eval()
    save_checkpoint(model, tokenizer, tmp_path, recipe.shard_size)

    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    with torch.no_grad():
        torch.testing.assert_close(loaded(random_ids).logits, model(random_ids).logits, rtol=0, atol=1e-6)
    text = "The quick (brown) fox's 3 tails."
    auto = AutoTokenizer.from_pretrained(tmp_path)
    assert auto(text)["input_ids"] == tokenizer.encode(text).ids
    assert (auto.bos_token_id, auto.eos_token_id, auto.unk_token_id) == (BOS_ID, EOS_ID, UNK_ID)


def test_files_have_hub_tensor_names_and_stale_weights_go(tokenizer, tmp_path):
    make_deterministic(0)
    model = build_model(dataclasses.replace(small("demo-mixtral"), start_from=None))
    sharded = save_checkpoint(model, tokenizer, tmp_path, 100_000)
    assert "model.safetensors.index.json" in sharded
    assert sum(name.endswith(".safetensors") for name in sharded) > 1
    whole = save_checkpoint(model, tokenizer, tmp_path, 0)
    assert sorted(path.name for path in tmp_path.iterdir()) == whole
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        names = set(file.keys())
    assert {f"model.layers.1.block_sparse_moe.experts.7.w{i}.weight" for i in (1, 2, 3)} < names
    assert "model.layers.0.block_sparse_moe.gate.weight" in names
    assert [path.name for path in tmp_path.parent.glob(".*partial*")] == []


def test_questions_come_from_their_own_documents_and_cloze_answers_fit():
    training, held_out = demo_questions(training=True), demo_questions(training=False)
    assert demo_questions(training=True) == training
    assert len(training) > 500 and len(held_out) > 50 and not set(training) & set(held_out)
    prose = "\n".join(text for _, text in demo_texts("prose"))
    cloze = [text for text in held_out if "____" in text]
    assert len(cloze) > 20
    for text in cloze:
        asked, answer = text.removeprefix("Question: Which word is missing? ").split("\nAnswer: ")
        assert asked.replace("____", answer, 1) in prose


# Batches and baseline


def test_pack_keeps_every_token_and_begins_every_sequence_with_bos():
    encoded = [list(range(10 * i + 3, 10 * i + 3 + i % 7 + 1)) for i in range(40)]
    packed = pack(encoded, 9, np.random.default_rng(0))
    assert packed.shape[1] == 9 and (packed[:, 0] == BOS_ID).all()
    body = packed[:, 1:].ravel().tolist()
    texts = sorted(text for text in encoded)
    found, current = [], []
    for token in body:
        if token == EOS_ID:
            found.append(current)
            current = []
        else:
            current.append(token)
    assert sum(len(text) + 1 for text in encoded) - len(body) < 8
    assert all(text in texts for text in found) and len(found) == len({tuple(text) for text in found})


def test_batches_repeat_with_the_seed_and_keep_the_mix():
    encoded = {"prose": [[10] * 50] * 20, "code": [[20] * 50] * 20}

    def shares(seed):
        batches = Batches(encoded, {"prose": 0.8, "code": 0.2}, 10, 16, seed)
        return torch.stack([batches.next() for _ in range(100)])

    first = shares(1)
    assert torch.equal(first, shares(1)) and not torch.equal(first, shares(2))
    prose = (first == 10).any(dim=-1).float().mean().item()
    assert abs(prose - 0.8) < 0.05  # 1000 draws: four standard deviations


def test_unigram_is_the_add_one_frequency_averaged_over_domains():
    probabilities = unigram({"a": [[0, 0, 1]], "b": [[2]]}, 3)
    expected = [(3 / 6 + 1 / 4) / 2, (2 / 6 + 1 / 4) / 2, (1 / 6 + 2 / 4) / 2]
    np.testing.assert_allclose(probabilities, expected, rtol=1e-12)
    loss, tokens = unigram_loss(probabilities, [[0], [2, 2]])
    assert tokens == 3 and math.isclose(loss, -math.log(expected[0]) - 2 * math.log(expected[2]))


def test_held_out_loss_is_the_sum_over_texts_read_one_by_one():
    make_deterministic(0)
    model = build_model(small("demo-olmoe")).eval()
    encoded = [torch.randint(3, 1536, (n,)).tolist() for n in (1, 40, 5, 15, 16, 31)]
    total = 0.0
    for ids in encoded:
        for start in range(0, len(ids), 15):
            piece = torch.tensor([BOS_ID, *ids[start : start + 15]])
            with torch.no_grad():
                log_probabilities = model(piece[None]).logits[0].double().log_softmax(-1)
            total -= sum(log_probabilities[i, piece[i + 1]].item() for i in range(len(piece) - 1))
    loss, tokens = held_out_loss(model, encoded, length=16, batch=3)
    assert tokens == sum(map(len, encoded))
    assert math.isclose(loss, total, rel_tol=1e-5)


# Load balancing


def test_balancing_loss_against_a_loop():
    logits = torch.randn(50, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    counts, probability = [0.0] * 6, [0.0] * 6
    for row in logits.tolist():
        exponentials = [math.exp(value) for value in row]
        for i in sorted(range(6), key=lambda i: -row[i])[:2]:
            counts[i] += 1 / 100
        for i in range(6):
            probability[i] += exponentials[i] / sum(exponentials) / 50
    expected = 6 * sum(f * p for f, p in zip(counts, probability, strict=True))
    assert math.isclose(load_balancing_loss(logits, 2).item(), expected, rel_tol=1e-5)


def test_balancing_loss_is_one_when_uniform_and_n_when_collapsed():
    count = 8
    uniform = torch.eye(count).repeat(10, 1) * 50  # each expert is the first choice of a tenth of the tokens
    assert math.isclose(load_balancing_loss(uniform, 1).item(), 1, rel_tol=1e-5)
    collapsed = torch.zeros(80, count)
    collapsed[:, 3] = 50
    assert math.isclose(load_balancing_loss(collapsed, 1).item(), count, rel_tol=1e-5)
    for share in (0.2, 0.5, 0.9):  # the more tokens go to one expert, the larger
        mixed = torch.where(torch.arange(80)[:, None] < 80 * share, collapsed, uniform)
        assert load_balancing_loss(mixed, 1).item() > 1.05


@pytest.mark.parametrize(
    ("name", "routers"),
    [("mistral", 0), ("mixtral", 4), ("olmoe", 4), ("jetmoe", 8), ("deepseek", 3), ("grok", 4)],
)
def test_every_router_is_heard(name, routers, random_ids):
    recipe = dataclasses.replace(RECIPES[f"demo-{name}"], start_from=None)
    make_deterministic(0)
    model = build_model(recipe)
    heard = RouterLogits(model)
    inputs = []
    for module in heard.routers:
        module.register_forward_pre_hook(lambda module, arguments: inputs.append(arguments[0]))
    model(random_ids)
    assert len({module for module, _ in heard.heard}) == len(heard.heard) == len(heard.routers) == routers
    for (module, logits), hidden in zip(heard.heard, inputs, strict=True):
        weight = module.weight if hasattr(module, "weight") else module.layer.weight
        torch.testing.assert_close(logits, hidden.reshape(-1, weight.shape[1]) @ weight.T, rtol=1e-4, atol=1e-5)
    loss = heard.loss()
    assert heard.heard == [] and loss.requires_grad == bool(routers)
    assert loss.item() == 0 if not routers else 0.9 < loss.item() < 2


# Upcycling and training


def test_upcycled_mixture_computes_what_the_dense_model_does(trained_dense, random_ids):
    folder, _ = trained_dense
    make_deterministic(0)
    mixture = build_model(small("demo-mixtral"), folder / "half").eval()
    dense = AutoModelForCausalLM.from_pretrained(folder / "half").eval()
    for layer, source in zip(mixture.model.layers, dense.model.layers, strict=True):
        gate_up = torch.cat([source.mlp.gate_proj.weight, source.mlp.up_proj.weight])
        assert all(torch.equal(expert, gate_up) for expert in layer.mlp.experts.gate_up_proj)
        assert all(torch.equal(expert, source.mlp.down_proj.weight) for expert in layer.mlp.experts.down_proj)
        assert layer.mlp.gate.weight.std() > 0
    with torch.no_grad():
        torch.testing.assert_close(mixture(random_ids).logits, dense(random_ids).logits, rtol=1e-5, atol=1e-5)


def test_training_record_and_half_state(trained_dense):
    folder, record = trained_dense
    assert read_json(folder / "training.json") == json.loads(json.dumps(record))
    assert record["steps"] == 30 and record["tokens"] == 30 * 4 * 64 and record["seed"] == 3
    assert 1 < record["perplexity"]["overall"] < 1000 and 1 < record["unigram_perplexity"]["overall"] < 1000
    assert set(record["perplexity"]) == {"prose", "code", "overall"}
    assert record["files"]["model.safetensors"] == sha256(folder / "model.safetensors")
    half, final = (AutoModelForCausalLM.from_pretrained(path) for path in (folder / "half", folder))
    assert not torch.equal(half.lm_head.weight, final.lm_head.weight)
    assert record["parameters"] == sum(parameter.numel() for parameter in final.parameters())


def test_two_runs_give_the_same_bytes(trained_dense, tmp_path):
    folder, _ = trained_dense
    torch.set_num_threads(2)  # what the job was given does not matter
    torch.rand(7)
    train_recipe(small("demo-mistral"), tmp_path / "again" / "training.json", steps_factor=0.5, seed=3)
    files = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    assert len(files) == 11
    for file in files:
        assert sha256(folder / file) == sha256(tmp_path / "again" / file), file


@pytest.mark.parametrize("name", ["demo-mixtral", "demo-jetmoe"])
def test_experts_train_to_the_same_bytes_and_a_lower_loss(name, tokenizer, tmp_path):
    recipe = dataclasses.replace(RECIPES[name], start_from=None)
    encoded = {name: encode(tokenizer, [text for _, text in demo_texts(f"{name}-train")]) for name in ("prose", "code")}

    def run(steps, folder):
        make_deterministic(1)
        model = build_model(recipe)
        losses = train(model, Batches(encoded, recipe.mix, 4, 64, 1), steps, recipe.learning_rate, recipe.balance)
        save_checkpoint(model, tokenizer, folder, 0)
        return losses, sha256(folder / "model.safetensors")

    assert run(3, tmp_path / "one")[1] == run(3, tmp_path / "two")[1]
    losses, _ = run(15, tmp_path / "long")
    assert losses[0] > 7 and np.mean(losses[-5:]) < losses[0] - 0.7


def test_a_model_that_learned_too_little_is_refused_and_leaves_no_record(tmp_path):
    output = tmp_path / "demo-mistral" / "training.json"
    output.parent.mkdir()
    output.write_text("{}", encoding="utf-8")
    with pytest.raises(AtlasError, match=r"demo-mistral: held-out perplexity .* is not below"):
        train_recipe(small("demo-mistral", keep_half=False, steps=2), output, steps_factor=1, seed=0)
    assert not output.exists()


def test_a_missing_or_foreign_start_is_refused(trained_dense, tmp_path):
    folder, _ = trained_dense
    output = tmp_path / "demo-mixtral" / "training.json"
    with pytest.raises(AtlasError, match=r"give its directory with --start-from"):
        train_recipe(small("demo-mixtral"), output, 0.1, 0)
    with pytest.raises(AtlasError, match=r"there is no checkpoint of demo-mistral \(half\)"):
        train_recipe(small("demo-mixtral"), output, 0.1, 0, tmp_path)
    with pytest.raises(AtlasError, match=r"leave it out"):
        train_recipe(small("demo-olmoe"), output, 0.1, 0, folder)
    foreign = small("demo-mixtral", tokenizer_size=600)
    with pytest.raises(AtlasError, match=r"trained with another tokenizer"):
        train_recipe(foreign, output, 0.1, 0, folder)


def test_learning_rate_warms_up_and_falls_to_a_tenth():
    factors = [learning_rate_factor(step, 100) for step in range(101)]
    assert factors[0] == 0.1 and factors[9] == factors[10] == max(factors) == 1
    assert all(later < earlier for earlier, later in zip(factors[10:], factors[11:], strict=False))
    assert math.isclose(factors[100], 0.1)


def test_architectures_are_known_to_the_auto_classes():
    architectures.register()
    for recipe in RECIPES.values():
        assert build_model(dataclasses.replace(recipe, start_from=None)).config.model_type == recipe.model_type

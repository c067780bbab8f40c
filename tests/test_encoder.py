"""The encoder of EMoE's fine-tuning: masks, masked loss, training to the same bytes, and what its FFNs can become."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from transformers import AutoModelForMaskedLM, AutoModelForSequenceClassification, AutoTokenizer

from moe_atlas.corpora import demo_texts
from moe_atlas.emoe.ffns import dense_ffns
from moe_atlas.errors import AtlasError
from moe_atlas.files import read_json, sha256
from moe_atlas.training import recipes
from moe_atlas.training.data import encode, pieces, unigram
from moe_atlas.training.loop import make_deterministic
from moe_atlas.training.masked import EVALUATED, MaskedLoss, held_out_masked_loss, mask_tokens
from moe_atlas.training.run import build_model, train_recipe
from moe_atlas.training.tokenizer import BOS_ID, EOS_ID, MASK_ID, PAD_ID, UNK_ID, demo_tokenizer
from moe_atlas.tuning.arms import ARMS
from moe_atlas.tuning.classifier import build, load_classifier
from moe_atlas.tuning.data import Examples

NAME = "demo-encoder"
RECIPE = recipes.load_encoders()[NAME]
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 48}
SHORT = dataclasses.replace(RECIPE, config=RECIPE.config | SMALL, steps=30, sequence_length=32, learning_rate=1e-2)
LAST = 200  # of the ids in texts that are made up here


def texts_of_ids(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randint(MASK_ID + 1, LAST, (length,), generator=generator).tolist() for length in lengths]


@pytest.fixture(scope="module")
def model():
    make_deterministic(0)
    return build_model(SHORT).eval()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A small encoder, trained through the same function as the real one."""
    folder = tmp_path_factory.mktemp("checkpoints") / NAME
    return folder, train_recipe(SHORT, folder / "training.json", steps_factor=0.5, seed=3)


# Recipes


def test_an_encoder_is_a_recipe_but_none_that_an_atlas_has_rows_of():
    assert NAME not in recipes.load() and recipes.get(NAME) == RECIPE
    assert set(recipes.load_all()) == set(recipes.load()) | {NAME}


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (f"  {NAME}:", "  demo-olmoe:", "demo-olmoe: there is a recipe of this name too"),
        (f"masked: {RECIPE.masked}", "masked: 1.0", f"{NAME}: masked is a share"),
        (f"tokenizer_size: {RECIPE.tokenizer_size}", "tokenizer_size: 600", "vocab_size and tokenizer_size differ"),
    ],
)
def test_an_encoder_that_cannot_be_is_refused(tmp_path, old, new, message):
    path, text = tmp_path / "recipes.yaml", recipes.RECIPES_FILE.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new), encoding="utf-8")
    with pytest.raises(AtlasError, match=message):
        recipes.load_encoders(path)


# Masks


def test_masks_have_their_share_and_hide_no_special_token():
    ids = torch.randint(0, 40, (100, 500), generator=torch.Generator().manual_seed(1))
    kept = ids.clone()
    inputs, targets = mask_tokens(ids, 0.3, torch.Generator().manual_seed(2))
    assert torch.equal(ids, kept)
    masked = targets != -100
    assert torch.equal(targets[masked], ids[masked]) and (inputs[masked] == MASK_ID).all()
    assert torch.equal(inputs[~masked], ids[~masked])
    special = sum(ids == token for token in (UNK_ID, BOS_ID, EOS_ID, PAD_ID, MASK_ID)).bool()
    assert special.sum() > 5000 and not (masked & special).any()
    # About 44,000 other tokens: five standard deviations.
    assert abs(masked[~special].float().mean().item() - 0.3) < 5 * math.sqrt(0.3 * 0.7 / (~special).sum())


def test_the_same_generator_masks_the_same_and_the_next_batch_otherwise():
    ids = torch.full((8, 64), 9)
    one, other = (torch.Generator().manual_seed(4) for _ in range(2))
    first = mask_tokens(ids, 0.5, one)[0]
    assert torch.equal(first, mask_tokens(ids, 0.5, other)[0])
    assert not torch.equal(first, mask_tokens(ids, 0.5, one)[0])


def test_the_training_loss_is_the_mean_over_masked_tokens(model):
    ids = torch.tensor(texts_of_ids(20, 20))
    loss = MaskedLoss(0.4, seed=6)(model, ids)
    chosen = torch.rand(ids.shape, generator=torch.Generator().manual_seed(6)) < 0.4
    with torch.no_grad():
        log_probabilities = model(torch.where(chosen, MASK_ID, ids)).logits.double().log_softmax(-1)
    places = chosen.nonzero().tolist()
    expected = -sum(log_probabilities[i, j, ids[i, j]].item() for i, j in places) / len(places)
    assert 5 < len(places) < 30 and math.isclose(loss.item(), expected, rel_tol=1e-5)
    assert loss.requires_grad


# Evaluation


def by_hand(model, encoded, length, probabilities) -> tuple[float, float, int]:
    """The held-out loss, the unigram model's and the tokens, text by text without padding, in float64."""
    generator = torch.Generator().manual_seed(0)
    loss = baseline = 0.0
    tokens = 0
    for text in encoded:
        for start in range(0, len(text), length - 1):
            ids = torch.tensor([BOS_ID, *text[start : start + length - 1]])
            places = (torch.rand(len(ids), generator=generator) < EVALUATED).nonzero().flatten().tolist()
            places = [place for place in places if ids[place] > MASK_ID]
            hidden = ids.clone()
            hidden[places] = MASK_ID
            with torch.no_grad():
                log_probabilities = model(hidden[None]).logits[0].double().log_softmax(-1)
            for place in places:
                loss -= log_probabilities[place, ids[place]].item()
                baseline -= math.log(probabilities[ids[place]])
            tokens += len(places)
    return loss, baseline, tokens


def test_held_out_loss_is_the_sum_over_texts_read_one_by_one(model):
    encoded = texts_of_ids(1, 40, 5, 15, 16, 31, 90)
    probabilities = unigram({"a": encoded}, RECIPE.tokenizer_size)
    expected = by_hand(model, encoded, 16, probabilities)
    for batch in (1, 3, 64):
        found = held_out_masked_loss(model, encoded, 16, probabilities, batch)
        np.testing.assert_allclose(found, expected, rtol=1e-5)
        assert found[2] == expected[2] > 10


def test_masks_of_the_evaluation_are_the_same_for_every_model_and_whatever_was_drawn_before(model):
    encoded, seen = texts_of_ids(40, 5, 33), []
    make_deterministic(9)
    other = build_model(SHORT).eval()
    for each in (model, other):
        torch.rand(5)
        hook = each.get_input_embeddings().register_forward_pre_hook(lambda _, given: seen.append(given[0].clone()))
        held_out_masked_loss(each, encoded, 16, np.full(RECIPE.tokenizer_size, 1 / RECIPE.tokenizer_size), batch=64)
        hook.remove()
    assert len(seen) == 2 and torch.equal(*seen) and (seen[0] == MASK_ID).any()


def test_uniform_probabilities_have_the_perplexity_of_the_vocabulary(model):
    size = RECIPE.tokenizer_size
    _, baseline, tokens = held_out_masked_loss(model, texts_of_ids(200), 32, np.full(size, 1 / size))
    assert math.isclose(math.exp(baseline / tokens), size, rel_tol=1e-9)


# Training


def test_the_record_has_the_perplexity_of_the_checkpoint_on_the_held_out_texts(trained):
    folder, record = trained
    assert read_json(folder / "training.json")["perplexity"] == record["perplexity"]
    assert record["settings"]["masked"] == RECIPE.masked and record["steps"] == 15
    loaded, info = AutoModelForMaskedLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    tokenizer = demo_tokenizer(RECIPE.tokenizer_size, masks=True)
    texts = {name: [text for _, text in demo_texts(name)] for name in ("prose-train", "code-train", "prose")}
    encoded = {name: encode(tokenizer, part) for name, part in texts.items()}
    probabilities = unigram({name: encoded[f"{name}-train"] for name in ("prose", "code")}, RECIPE.tokenizer_size)
    loss, baseline, tokens = by_hand(loaded.eval(), encoded["prose"], 32, probabilities)
    assert record["held_out_tokens"]["prose"] == tokens
    assert abs(tokens / sum(map(len, encoded["prose"])) - EVALUATED) < 0.02
    assert math.isclose(record["perplexity"]["prose"], math.exp(loss / tokens), rel_tol=1e-5)
    assert math.isclose(record["unigram_perplexity"]["prose"], math.exp(baseline / tokens), rel_tol=1e-9)
    assert record["loss"]["last"] < record["loss"]["first"] - 0.3


def test_two_trainings_give_the_same_bytes(trained, tmp_path):
    folder, _ = trained
    torch.set_num_threads(2)  # what the job was given does not matter
    torch.rand(7)
    train_recipe(SHORT, tmp_path / "training.json", steps_factor=0.5, seed=3)
    files = sorted(path.name for path in folder.iterdir())
    assert "model.safetensors" in files and files == sorted(path.name for path in tmp_path.iterdir())
    for file in files:
        assert sha256(folder / file) == sha256(tmp_path / file), file


def test_the_tokenizer_beside_it_knows_mask_and_padding(trained):
    tokenizer = AutoTokenizer.from_pretrained(trained[0])
    assert (tokenizer.pad_token_id, tokenizer.mask_token_id) == (PAD_ID, MASK_ID)
    text = "The quick (brown) fox's 3 tails."
    assert tokenizer(text)["input_ids"] == demo_tokenizer(RECIPE.tokenizer_size, masks=True).encode(text).ids
    assert tokenizer("a<mask>b")["input_ids"].count(MASK_ID) == 1
    assert tokenizer.vocab_size == RECIPE.tokenizer_size


def test_what_follows_a_mask_matters_to_it(trained):
    """It is no causal model."""
    model = AutoModelForMaskedLM.from_pretrained(trained[0]).eval()
    ids = torch.tensor([[BOS_ID, 20, MASK_ID, 30, 31]])
    other = ids.clone()
    other[0, 4] = 77
    with torch.no_grad():
        before, after = model(ids).logits, model(other).logits
    assert (before[0, 2] - after[0, 2]).abs().max() > 1e-4


# Its FFNs as experts


def examples() -> Examples:
    ids = [[BOS_ID, *text] for text in texts_of_ids(9, 4, 12, 7)]
    return Examples(ids, [[0] * len(text) for text in ids], torch.tensor([0, 1, 0, 1]), PAD_ID)


def logits(model, batch: dict) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits


def test_it_loads_as_a_classifier_with_a_new_head_only(trained):
    _, info = AutoModelForSequenceClassification.from_pretrained(trained[0], num_labels=2, output_loading_info=True)
    assert info["missing_keys"] and all(key.startswith("classifier.") for key in info["missing_keys"])
    model = load_classifier(trained[0], 2, PAD_ID, 0)
    ffns = dense_ffns(model)
    assert [ffn.neurons for ffn in ffns] == [SMALL["intermediate_size"]] * SMALL["num_hidden_layers"]
    saved = AutoModelForMaskedLM.from_pretrained(trained[0])
    for ffn, source in zip(ffns, dense_ffns(saved), strict=True):
        assert torch.equal(ffn.keys, source.keys) and torch.equal(ffn.last.weight, source.last.weight)


def test_padding_changes_no_answer(trained):
    model, data = load_classifier(trained[0], 2, PAD_ID, 0), examples()
    together = logits(model, data.batch(range(4)))
    alone = torch.cat([logits(model, data.batch([i])) for i in range(4)])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("arm", ["emoe", "random-split", "contiguous-split"])
def test_all_experts_are_the_dense_model_and_some_are_not(trained, arm):
    data = examples()
    batch = data.batch(range(4))
    dense = logits(load_classifier(trained[0], 2, PAD_ID, 0), batch)
    whole = build(load_classifier(trained[0], 2, PAD_ID, 0), ARMS[arm], 8, 8, [0, 1], data, 0)
    assert torch.equal(logits(whole.model, batch), dense)
    some = build(load_classifier(trained[0], 2, PAD_ID, 0), ARMS[arm], 8, 2, [0, 1], data, 0)
    assert (logits(some.model, batch) - dense).abs().max() > 1e-4
    assert all(mask.chosen.sum(-1).eq(2).all() for mask in some.masks)
    for mask in some.masks:
        mask.remove()
    assert torch.equal(logits(some.model, batch), dense)


def test_copies_begin_as_the_dense_model(trained):
    data = examples()
    batch = data.batch(range(4))
    dense = logits(load_classifier(trained[0], 2, PAD_ID, 0), batch)
    built = build(load_classifier(trained[0], 2, PAD_ID, 0), ARMS["gmoe"], 4, 2, [1], data, 0)
    torch.testing.assert_close(logits(built.model, batch), dense, rtol=1e-4, atol=1e-5)


def test_pieces_keep_every_token_in_its_order():
    encoded = texts_of_ids(1, 15, 16, 47)
    cut = pieces(encoded, 16)
    assert [len(piece) for piece in cut] == [1, 15, 15, 1, 15, 15, 15, 2]
    assert sum(cut, []) == sum(encoded, [])

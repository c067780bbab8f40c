"""Instruction tuning of a tiny language model: what is written, what the loss sees, what a letter is worth."""

import math
from dataclasses import replace
from pathlib import Path

import polars as pl
import pytest
import torch
import yaml
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

from moe_atlas import tables
from moe_atlas.errors import AtlasError
from moe_atlas.tokens import load_tokenizer
from moe_atlas.training.loop import make_deterministic
from moe_atlas.training.save import save_checkpoint
from moe_atlas.training.tokenizer import train_tokenizer
from moe_atlas.tuning.arms import ARMS
from moe_atlas.tuning.classifier import LANGUAGE_LORA, Classifier, build, choices, expert_counts, load_language_model
from moe_atlas.tuning.differences import differences
from moe_atlas.tuning.fit import Schedule, evaluate, evaluate_groups, fit, rate_factor
from moe_atlas.tuning.instructions import load_instructions
from moe_atlas.tuning.language import encode_instructions
from moe_atlas.tuning.run import run_job
from moe_atlas.tuning.settings import load_settings

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")
CONTEXT = 512
SUBJECTS = {"moral_sums": 6, "colours": 4}
logging.set_verbosity_error()


def questions(split: str, count: int) -> list[dict]:
    """Of each subject `count` questions; the answers go round the letters."""
    return [
        {"question": f"{split} {number}?", "subject": subject, "choices": ["u", "v", "w", "x"], "answer": number % 4}
        for subject in SUBJECTS
        for number in range(count)
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny random Llama, local parquet files in the columns of Alpaca and MMLU, and the file that names them."""
    folder = tmp_path_factory.mktemp("instructions")
    train = [{"instruction": f"Count to {n}.", "input": "", "output": f"{n} it is"} for n in range(20)]
    train += [{"instruction": "Which colour?", "input": "a red dot", "output": "red"}]
    train += [{"instruction": "Say nothing.", "input": "", "output": ""}]
    test = [row for row in questions("test", 6) if row["subject"] == "moral_sums" or int(row["question"][5]) < 4]
    sets = {"train": train, "shots": questions("shot", 5), "validation": questions("val", 4), "in-domain": test}
    for name, rows in sets.items():
        pl.DataFrame(rows).write_parquet(folder / f"{name}.parquet")
    content = {"sets": {name: {"source": f"path:{folder}/{name}.parquet"} for name in sets}}
    (folder / "task.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=300, max_position_embeddings=CONTEXT, initializer_range=0.2, **sizes)
    config.pad_token_id, config.bos_token_id, config.eos_token_id = None, 1, 2
    torch.manual_seed(0)
    save_checkpoint(LlamaForCausalLM(config), train_tokenizer(["Answer: which colour it is"], 300), folder / "llama", 0)
    return folder


@pytest.fixture(scope="module")
def frame(folder) -> pl.DataFrame:
    return load_instructions(folder / "task.yaml")


@pytest.fixture(scope="module")
def examples(folder, frame):
    return encode_instructions(frame, load_tokenizer(folder / "llama"), 256, CONTEXT, 4)


def made(folder, examples, name: str = "dense", precision: str = "float32", k: int = 2) -> Classifier:
    make_deterministic(0)
    model = load_language_model(folder / "llama", ARMS[name], precision)
    built = build(model, ARMS[name], 8, k, [1], examples["train"], 0, LANGUAGE_LORA)
    built.precision = precision
    return built


# What is written


def test_local_files_become_prompts_and_questions(frame):
    counts = dict(frame.group_by("split").len().iter_rows())
    assert counts == {"train": 21, "shots": 10, "validation": 8, "in-domain": 10}
    red = frame.filter(pl.col("pair") == "red").row(0, named=True)
    assert red["text"] == (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nWhich colour?\n\n### Input:\na red dot\n\n### Response:"
    )
    three = frame.filter(pl.col("pair") == "3 it is")["text"].item()
    assert three == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nCount to 3.\n\n### Response:"
    )
    tests = frame.filter(pl.col("split") == "in-domain")
    assert tests["text"][1] == "test 1?\nA. u\nB. v\nC. w\nD. x\nAnswer:"
    assert tests["label"].to_list() == [0, 1, 2, 3, 0, 1, 0, 1, 2, 3]
    assert frame["document"].n_unique() == len(frame) and set(frame["classes"]) == {4}
    tables.conform("emoe_tasks", frame.with_columns(task=pl.lit("mmlu")))


def test_the_order_is_random_but_repeats(folder, frame):
    assert load_instructions(folder / "task.yaml").equals(frame)
    train = frame.filter(pl.col("split") == "train")
    assert train["document"].to_list() != sorted(train["document"], key=lambda name: int(name.split("#")[-1]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shots": None}, "sets lacks shots"),
        ({"train": "in-domain"}, "there is no column 'instruction'"),
        ({"in-domain": "train"}, "there is no column 'question'"),
        ({"validation": "three"}, "row 0 is not of four choices"),
    ],
)
def test_a_faulty_file_of_instructions_is_refused(folder, tmp_path, change, message):
    pl.DataFrame([questions("q", 1)[0] | {"choices": ["a", "b", "c"]}]).write_parquet(folder / "three.parquet")
    sets = yaml.safe_load((folder / "task.yaml").read_text())["sets"]
    sets |= {name: {"source": f"path:{folder}/{other}.parquet"} for name, other in change.items()}
    kept = {name: values for name, values in sets.items() if change.get(name, "") is not None}
    (tmp_path / "task.yaml").write_text(yaml.safe_dump({"sets": kept}))
    with pytest.raises(AtlasError, match=message):
        load_instructions(tmp_path / "task.yaml")


def test_a_question_follows_five_answered_ones_and_ends_before_the_letter(folder, examples):
    tokenizer = load_tokenizer(folder / "llama")
    tests = examples["in-domain"]
    text = tokenizer.decode(tests.ids[7])
    assert text.startswith("<s>The following are multiple choice questions (with answers) about colours.\n\nshot 0?\n")
    assert [text.count(f"Answer: {letter}\n\n") for letter in "ABCD"] == [2, 1, 1, 1]
    assert text.rstrip().endswith("test 1?\nA. u\nB. v\nC. w\nD. x\nAnswer:")
    whole = tokenizer(text.rstrip() + " D")["input_ids"]
    assert [*tests.ids[7], tests.letters[3]] == whole[1:]  # without the second <s>
    assert tests.groups() == {"moral_sums": list(range(6)), "colours": list(range(6, 10))}


def test_shots_that_the_context_does_not_hold_are_left_out(folder, frame):
    tokenizer = load_tokenizer(folder / "llama")
    longest = max(map(len, encode_instructions(frame, tokenizer, 256, CONTEXT, 4)["in-domain"].ids))
    fewer = encode_instructions(frame, tokenizer, 256, longest - 1, 4)["in-domain"]
    text = tokenizer.decode(fewer.ids[0])
    assert max(map(len, fewer.ids)) < longest and "about moral sums" in text
    assert "shot 3?" in text and "shot 4?" not in text


def test_an_example_without_room_for_its_response_is_left_out(folder, frame):
    tokenizer = load_tokenizer(folder / "llama")
    whole = encode_instructions(frame, tokenizer, 256, CONTEXT, 4)["train"]
    short = sorted(whole.prompts)[-1]
    cut = encode_instructions(frame, tokenizer, short, CONTEXT, 4)["train"]
    assert len(whole) == 21 and len(cut) == 20 and all(len(ids) <= short for ids in cut.ids)
    assert all(ids[-1] == tokenizer.eos_token_id for ids in whole.ids)
    with pytest.raises(AtlasError, match="No response begins within 5 tokens"):
        encode_instructions(frame, tokenizer, 5, CONTEXT, 4)


# What the loss sees


def test_the_loss_is_that_of_the_responses_by_hand(folder, examples):
    """In float64, one example after the other, without padding; the prompt's tokens are not in it."""
    built, train = made(folder, examples), examples["train"]
    means = []
    for i in range(6):
        ids, start = torch.tensor([train.ids[i]]), train.prompts[i]
        with torch.no_grad():
            chances = built.model(ids).logits[0].double().log_softmax(-1)
        tokens = [-chances[place - 1, ids[0, place]] for place in range(start, ids.shape[1])]
        means.append(float(sum(tokens) / len(tokens)))
    found = train.loss(built.model, train.batch(range(6)), CPU)
    assert found.dtype == torch.float32 and math.isclose(found.item(), sum(means) / 6, rel_tol=1e-5)


def test_a_target_in_the_prompt_gets_no_gradient(folder, examples):
    """Of the last matrix, whose row of a token that is in prompts only is not pushed up."""
    built, train = made(folder, examples), examples["train"]
    responses = {index for ids, start in zip(train.ids, train.prompts, strict=True) for index in ids[start:]}
    only = ({index for ids in train.ids for index in ids} - responses).pop()
    head, seen = built.model.get_output_embeddings(), []
    head.register_forward_hook(lambda _module, _inputs, output: seen.append(output) or output.retain_grad())
    train.loss(built.model, train.batch(range(4)), CPU).backward()
    assert len(seen[0]) == sum(len(train.ids[i]) - train.prompts[i] for i in range(4))
    assert (seen[0].grad[:, only] > 0).all()  # pushed down everywhere: it is never the target


def test_parts_of_a_step_do_what_the_whole_step_does(folder, examples):
    """Two steps of 8 examples end alike, in one pass or in parts of 3, 3 and 2."""
    ends = []
    for together in (8, 3):
        built = made(folder, examples)
        train = replace(examples["train"], together=together)
        fit(built, train, examples["validation"], "accuracy", 1e-3, Schedule(2, 8, 2, 1), 0)
        ends.append({name: value.detach().clone() for name, value in built.parameters().items()})
    begun = made(folder, examples).parameters()
    for name, value in ends[0].items():
        assert (value - ends[1][name]).norm() < 0.01 * (value - begun[name]).norm(), name


def test_rates_by_hand():
    """3 % of 1218 steps is 36 of them; half-way down a cosine is a half; the linear one is as it was."""
    found = [rate_factor(step, 1218, 0.03, "cosine") for step in range(1218)]
    assert math.isclose(found[0], 1 / 36) and found[35] == found[36] == 1.0
    assert math.isclose(found[36 + 591], 0.5) and 0 < found[-1] < 1e-5
    assert all(a >= b for a, b in zip(found[36:], found[37:], strict=False))
    assert [rate_factor(step, 20) for step in (0, 1, 2, 11, 19)] == [0.5, 1.0, 1.0, 0.5, 1 / 18]


# What a letter is worth


def test_the_score_of_known_logits_by_hand(folder, examples):
    """Layers add nothing to the last token's vector h; row i of the last matrix is s_i h: the logits are s_i |h|^2."""
    built, tests = made(folder, examples), examples["in-domain"]
    model, letters = built.model, tests.letters
    last = {ids[-1] for ids in tests.ids}
    assert len(last) == 1
    scale = torch.tensor([0.0, 0.5, 1.0, -1.0])
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        h = model.model.norm(model.model.embed_tokens.weight[last.pop()])
        model.lm_head.weight[letters] = scale[:, None] * h
    logits = scale * h.dot(h).item()
    found = torch.cat([part for part, _ in choices(built, tests)])
    torch.testing.assert_close(found, logits.expand(10, 4), rtol=1e-4, atol=1e-4)
    # The third letter always: of the labels 0 1 2 3 0 1 and 0 1 2 3 one each.
    values = evaluate_groups(built, tests, "accuracy")
    assert values == {"": 0.2, "moral_sums": pytest.approx(1 / 6), "colours": 0.25}
    chances = logits.double().log_softmax(0)
    expected = -sum(float(chances[label]) for label in tests.labels) / 10
    assert math.isclose(evaluate(built, tests, "accuracy")[1], expected, rel_tol=1e-4)


def test_the_score_is_that_of_questions_asked_one_by_one(folder, examples):
    """Without padding, from all logits of the model as transformers gives them."""
    built, tests = made(folder, examples), examples["in-domain"]
    right = []
    with torch.no_grad():
        for ids, label in zip(tests.ids, tests.labels, strict=True):
            logits = built.model(torch.tensor([ids])).logits[0, -1]
            right.append(int(logits[tests.letters].argmax()) == int(label))
    values = evaluate_groups(built, tests, "accuracy")
    assert values[""] == sum(right) / 10 and values["colours"] == sum(right[6:]) / 4


# Arms and precision


@pytest.mark.parametrize("name", ARMS)
def test_every_arm_learns_the_responses(folder, examples, name):
    built, train = made(folder, examples, name), examples["train"]
    with torch.no_grad():
        before = float(train.loss(built.model, train.batch(range(21)), CPU))
    fit(built, train, examples["validation"], "accuracy", 0.01, Schedule(10, 8, 10, 1, 0.0, 0.03, "cosine"), 0)
    with torch.no_grad():
        assert float(train.loss(built.model, train.batch(range(21)), CPU)) < before
    assert ARMS[name].lora == all("lora_" in key for key in built.parameters())
    tokens = sum(map(len, train.ids))
    assert all(counts.sum() == 2 * tokens for counts in (expert_counts(built, train) if built.routed else []))


@pytest.mark.parametrize("name", ["emoe", "lora-emoe"])
def test_in_bfloat16_what_is_tuned_and_what_chooses_is_float32(folder, examples, name):
    built = made(folder, examples, name, "bfloat16")
    tuned = built.parameters()
    assert {value.dtype for value in tuned.values()} == {torch.float32}
    kept = {value.dtype for key, value in built.model.named_parameters() if key not in tuned}
    assert kept == ({torch.bfloat16} if ARMS[name].lora else set())
    (mask,), inputs, products = built.masks, [], []
    mask.ffn.first.register_forward_pre_hook(lambda _module, arguments: inputs.append(arguments[0]))
    mask.ffn.first.register_forward_hook(lambda _module, _arguments, output: products.append(output.dtype))
    (_, _), *_ = choices(built, replace(examples["validation"], together=8))
    centres = torch.stack([mask.ffn.keys.detach().float()[mask.labels == expert].mean(0) for expert in range(8)])
    assert products == [torch.bfloat16] and mask.scores.dtype == torch.float32
    torch.testing.assert_close(mask.scores, inputs[0].float() @ centres.T, rtol=1e-5, atol=1e-6)


# All of a job


@pytest.fixture(scope="module")
def settings(folder):
    """Settings as the shipped ones of a large model, of a tiny one and a few steps."""
    content = yaml.safe_load((ROOT / "config/emoe_llama.yaml").read_text())
    content["models"] = {"tiny": {"folder": str(folder / "llama"), "ready": "x"}}
    content["tasks"]["mmlu"]["source"] = f"instructions:{folder}/task.yaml"
    content["training"] |= {"length": 256, "steps": 4, "batch": 8, "evaluate": 4}
    content["arms_per_job"] = 3
    content["defaults"] |= {"models": ["tiny"], "experts": [8], "layers": [[0]], "seeds": 2}
    content["defaults"]["rates"] = {"full": [0.01], "lora": [0.001, 0.01]}
    (folder / "settings.yaml").write_text(yaml.safe_dump(content))
    return load_settings(folder / "settings.yaml")


@pytest.fixture(scope="module")
def runs(settings, frame):
    return {job.study: run_job(settings, job, frame)[0] for job in settings.jobs()}


def test_a_job_gives_each_subject_and_all(runs):
    for study, arms in (("lora", {"lora", "lora-emoe", "lora2emoe", "emoe2lora"}), ("full", {"dense", "emoe"})):
        tested = tables.conform("emoe_runs", runs[study]).filter(pl.col("test") != "validation")
        assert arms <= set(tested["arm"]) and tested["chosen"].all()
        assert set(tested["test"]) == {"in-domain", *(f"in-domain/{subject}" for subject in SUBJECTS)}
        assert set(tested["chance"]) == {0.25} and set(tested["metric"]) == {"accuracy"}
        by = ["arm", "experts", "k", "layers", "seed"]
        for _, group in tested.group_by(by):
            values = dict(group.select("test", "value").iter_rows())
            parts = [values[f"in-domain/{subject}"] * count for subject, count in SUBJECTS.items()]
            assert len(group) == 3 and math.isclose(values["in-domain"], sum(parts) / 10)
            counts = dict(group.select("test", "examples").iter_rows())
            assert counts == {"in-domain": 10} | {f"in-domain/{name}": count for name, count in SUBJECTS.items()}
    assert set(runs["full"]["arm"]) == {"dense", "dense2emoe", "emoe", "emoe2dense", "random-split"}


def test_the_rate_is_chosen_on_the_validation_set(runs):
    validation = runs["lora"].filter(pl.col("test") == "validation", pl.col("seed") == 0, pl.col("arm") == "lora")
    assert sorted(validation["learning_rate"]) == [0.001, 0.01] and set(validation["examples"]) == {8}
    assert validation.filter("chosen")["value"].item() == validation["value"].max()


def test_a_job_repeats_and_seeds_differ(settings, frame, runs):
    job = next(job for job in settings.jobs() if job.study == "full")
    again, selection = run_job(settings, job, frame)
    assert again.equals(runs["full"]) and len(selection) > 0
    shares = selection.filter(pl.col("measure") == "share", pl.col("arm") == "emoe", pl.col("layers") == "0")
    one, other = (shares.filter(pl.col("seed") == seed)["value"].to_list() for seed in (0, 1))
    assert one != other


def test_subjects_are_not_compared(runs):
    found = differences(pl.concat(runs.values()))
    assert set(found["test"]) == {"in-domain"} and set(found["seeds"]) == {2}
    assert {("lora-emoe", "lora"), ("emoe", "dense"), ("emoe", "random-split")} <= set(
        found.select("arm", "baseline").rows()
    )


def test_the_shipped_settings_name_commits_and_three_epochs():
    settings = load_settings(ROOT / "config/emoe_llama.yaml")
    assert settings.language("mmlu") and len(settings.jobs()) == 5
    content = yaml.safe_load((ROOT / "config/instructions/mmlu.yaml").read_text())
    assert all(len(values["revision"]) == 40 for values in content["sets"].values())
    assert settings.training["steps"] * settings.training["batch"] == 3 * (52002 // 128) * 128
    assert {shape.layers for shape in settings.studies["lora"].shapes} == {(28, 30), (16, 20, 24, 28)}


def test_another_metric_than_accuracy_is_refused(folder, settings):
    content = yaml.safe_load((folder / "settings.yaml").read_text())
    content["tasks"]["mmlu"]["metric"] = "matthews"
    (folder / "wrong.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(AtlasError, match="tasks, mmlu: answers to questions are measured by accuracy"):
        load_settings(folder / "wrong.yaml")

"""The tasks of the fine-tuning: disjoint, balanced, repeatable; and data sets that a file names."""

from collections import Counter

import polars as pl
import pytest
import yaml

from moe_atlas.corpora import demo_documents
from moe_atlas.corpora.demo import HELD_OUT_MODULES, TRAINING_MODULES
from moe_atlas.errors import AtlasError
from moe_atlas.tuning.datasets import load_task
from moe_atlas.tuning.tasks import SPLITS, TASKS, comments, demo_task, docstring_paragraphs, without_texts

EVERY = pytest.mark.parametrize("name", TASKS)


@EVERY
def test_sets_share_no_document_and_no_text(name):
    splits = demo_task(name).splits
    assert tuple(splits) == SPLITS
    for key in ("document", "text"):
        owners = [{getattr(example, key) for example in examples} for examples in splits.values()]
        assert sum(map(len, owners)) == len(set().union(*owners))
    assert all(len({example.text for example in examples}) == len(examples) for examples in splits.values())


@EVERY
def test_sets_are_balanced_and_large_enough(name):
    task = demo_task(name)
    for split, least in zip(SPLITS, (400, 150, 200, 200), strict=True):
        counts = Counter(example.label for example in task.splits[split])
        assert sorted(counts) == list(range(len(task.classes))) and len(set(counts.values())) == 1
        assert counts.total() >= least


@EVERY
def test_a_task_repeats(name):
    again = demo_task.__wrapped__(name)
    assert again == demo_task(name) and again is not demo_task(name)


def test_examples_are_in_no_order_of_classes():
    labels = [example.label for example in demo_task("source").splits["train"]]
    changes = sum(a != b for a, b in zip(labels, labels[1:], strict=False))
    assert abs(changes / len(labels) - 0.5) < 0.1


def test_tests_hold_what_the_demo_models_were_not_trained_on():
    held = {title for kind in ("prose", "code") for title, _ in demo_documents(kind)}
    assert {example.document for example in demo_task("source").splits["in-domain"]} <= held
    shifted = {e.document for name in TASKS for e in demo_task(name).splits["shifted"]}
    assert not shifted & {*HELD_OUT_MODULES, *TRAINING_MODULES}


def test_a_misspelt_text_is_a_text_with_letters_exchanged():
    """Each word of a misspelt text has the letters of a word; the intact sets come from the documents as they are."""
    joined = "\n".join(" ".join(text.split()) for _, texts in demo_documents("prose") for text in texts)
    letters = Counter("".join(sorted(word)) for word in joined.split())
    examples = demo_task("spelling").splits["in-domain"]
    for example in examples:
        assert (example.text in joined) == (example.label == 0)
        assert all("".join(sorted(word)) in letters for word in example.text.split())


def test_source_leaves_nothing_but_letters():
    texts = [example.text for examples in demo_task("source").splits.values() for example in examples]
    assert all(word.isalpha() and word.islower() for text in texts for word in text.split())


SOURCE = '''"""A module with a docstring that is long enough to be a paragraph of its own, here."""
# A remark that goes on
# over two lines and is long enough.
x = 1  # not a line of its own, so it is no remark at all

def f():
    """Short.

    A second paragraph of the docstring of f, which is long enough to be taken as well.
    """
    # too short
    return x
'''


def test_docstrings_comments_and_code_are_told_apart():
    assert [text[:12] for text in docstring_paragraphs(SOURCE)] == ["A module wit", "A second par"]
    assert comments(SOURCE) == ["A remark that goes on over two lines and is long enough."]
    assert without_texts(SOURCE) == "pass\nx = 1\n\ndef f():\n    pass\n    return x"


def test_an_unknown_task_is_refused():
    with pytest.raises(AtlasError, match="demo:poems: there is no such task; choose one of topic, source, spelling"):
        demo_task("poems")


# Data sets that a file names


@pytest.fixture
def folder(tmp_path):
    """A pair task like RTE: parquet files of two shards, a CSV of another labelling as a shifted set."""
    rows = [{"sentence1": f"text {i}", "sentence2": f"other {i}", "label": i % 2} for i in range(100)]
    (tmp_path / "train").mkdir()
    for shard in range(2):
        part = pl.DataFrame(rows[shard * 50 : shard * 50 + 50])
        part.write_parquet(tmp_path / "train" / f"{shard}.parquet")
    test = [{"sentence1": f"new {i}", "sentence2": "b", "label": i % 2} for i in range(10)]
    # One row of the test is in the training set, one has no label.
    test += [rows[7], {"sentence1": "hidden", "sentence2": "b", "label": -1}]
    pl.DataFrame(test).write_parquet(tmp_path / "test.parquet")
    pl.DataFrame({"premise": ["p", "q", "r"], "hypothesis": ["a"] * 3, "gold": ["yes", "no", "-"]}).write_csv(
        tmp_path / "hans.csv"
    )
    content = {
        "classes": 2,
        "holdout": 0.2,
        "most": {"train": 0},
        "sets": {
            "train": {"source": f"path:{tmp_path}/train", "text": "sentence1", "pair": "sentence2"},
            "in-domain": {"source": f"path:{tmp_path}/test.parquet", "text": "sentence1", "pair": "sentence2"},
            "shifted-hans": {
                "source": f"path:{tmp_path}/hans.csv",
                **{"text": "premise", "pair": "hypothesis", "label": "gold", "values": {"yes": 0, "no": 1}},
            },
        },
    }
    (tmp_path / "task.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    return tmp_path, content


def test_data_sets_become_a_task(folder):
    frame = load_task(folder[0] / "task.yaml")
    counts = dict(frame.group_by("split").len().iter_rows())
    assert counts == {"train": 79, "validation": 20, "in-domain": 11, "shifted-hans": 2}
    train = frame.filter(pl.col("split").is_in(["train", "validation"]))
    assert set(train["text"]) == {f"text {i}" for i in range(100)} - {"text 7"}
    assert (train["label"] == train["text"].str.slice(5).cast(pl.Int64) % 2).all()
    assert (train["pair"] == "other " + train["text"].str.slice(5)).all()
    hans = frame.filter(pl.col("split") == "shifted-hans")
    assert dict(zip(hans["text"], hans["label"], strict=True)) == {"p": 0, "q": 1}
    assert frame["document"].n_unique() == len(frame) and set(frame["classes"]) == {2}
    assert load_task(folder[0] / "task.yaml").equals(frame)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"classes": 1}, r"the label 1 is none of 0 to 0; mend `values`"),
        ({"holdout": 1.5}, "holdout is a share"),
        ({"sets": {"train": {"source": "path:x"}}}, "sets needs train and in-domain"),
        ({"text": "sentence"}, r"train: there is no column 'sentence'; the columns are sentence1, sentence2, label"),
        ({"source": "hf:nyu-mll/glue"}, "needs its revision, a commit of 40 hex digits"),
        ({"source": "path:nowhere.parquet"}, "the data set cannot be read"),
        ({"source": "path:model.pkl"}, "holds no .parquet"),
        ({"source": "web:x"}, "source is hf:OWNER/NAME or path:FILE"),
    ],
)
def test_a_faulty_file_of_data_sets_is_refused(folder, change, message):
    path, content = folder
    if set(change) & {"text", "source"}:
        content["sets"]["train"] |= change
    else:
        content |= change
    (path / "task.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(AtlasError, match=message):
        load_task(path / "task.yaml")

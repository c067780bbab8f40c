"""Corpora: the rules that cut texts, the files they come from, and the demo split."""

import subprocess
import sys
from pathlib import Path

import polars as pl
import pytest

from moe_atlas.corpora import COLUMNS, demo_texts, prepare
from moe_atlas.corpora.demo import HELD_OUT_MODULES, HELD_OUT_TOPICS, TRAINING_MODULES, code_blocks, paragraphs, topics
from moe_atlas.errors import AtlasError

SCRIPT = Path(__file__).resolve().parent.parent / "scripts" / "prepare_corpus.py"
ARTICLE = " = Title = \n\n first paragraph \n = = Section = = \n\n second: a = b \n \nthird\n"


def write_parquet(path, texts, column="text"):
    pl.DataFrame({column: texts}).write_parquet(path)
    return f"file:{path}"


def test_prompt_is_one_sequence_and_may_hold_colons():
    frame = prepare("prompt", "prompt:As an open source: alternative to")
    assert dict(frame.schema) == COLUMNS
    assert frame.rows() == [("prompt", 0, 0, "As an open source: alternative to")]


def test_paragraphs_drop_headings_and_empty_lines_and_count_documents(tmp_path):
    source = write_parquet(tmp_path / "articles.parquet", [ARTICLE, None, " =only headings= ", "fourth"])
    frame = prepare("wiki", source, "paragraphs")
    assert frame["text"].to_list() == ["first paragraph", "second: a = b", "third", "fourth"]
    assert frame["sequence"].to_list() == [0, 1, 2, 3]
    assert frame["document"].to_list() == [0, 0, 0, 2]
    assert prepare("wiki", source, "paragraphs", 2)["text"].to_list() == ["first paragraph", "second: a = b"]


def test_whole_and_lines(tmp_path):
    source = write_parquet(tmp_path / "articles.parquet", [ARTICLE, "fourth"])
    assert prepare("wiki", source, "whole")["text"].to_list() == [ARTICLE, "fourth"]
    assert prepare("wiki", source, "lines")["text"].to_list()[:3] == [
        " = Title = ",
        " first paragraph ",
        " = = Section = = ",
    ]


WIKITEXT = [
    "",
    " = Lobster = \n",
    "",
    " Red .\n",
    " = B of the Bang = \n",
    "",
    " A sculpture .\n",
    " = = Site = = \n",
    " Tall .\n",
]


def test_reading_starts_at_a_line(tmp_path):
    """As the Hub has WikiText: a row a line. The paper's ten paragraphs begin in the middle of it."""
    pl.DataFrame({"text": WIKITEXT}).write_parquet(tmp_path / "wikitext.parquet")
    source = f"file:{tmp_path}/wikitext.parquet"
    frame = prepare("c", source, "paragraphs", start_at="= B of the Bang =")
    assert frame["text"].to_list() == ["A sculpture .", "Tall ."] and frame["document"].to_list() == [6, 8]
    assert prepare("c", source, "paragraphs", 1, " = B of the Bang = ")["text"].to_list() == ["A sculpture ."]
    (tmp_path / "one.txt").write_text("first\nsecond\n")
    assert prepare("c", f"file:{tmp_path}/one.txt", "whole", start_at="second")["text"].to_list() == ["second"]
    whole = pl.DataFrame({"text": ["a\nb\nc"]})
    whole.write_parquet(tmp_path / "whole.parquet")
    assert prepare("c", f"file:{tmp_path}/whole.parquet", "whole", start_at="b")["text"].to_list() == ["b\nc"]
    with pytest.raises(AtlasError, match=r"corpus c: file:\S+ has no line '= Whale ='; correct start_at in its row"):
        prepare("c", source, "paragraphs", start_at="= Whale =")


def test_text_file_is_one_sequence_a_line(tmp_path):
    path = tmp_path / "lines.txt"
    path.write_text("one\n\n  \ntwo words\n", encoding="utf-8")
    assert prepare("mine", f"file:{path}")["text"].to_list() == ["one", "two words"]


@pytest.mark.parametrize("rule", ["whole", "lines", "paragraphs"])
def test_empty_corpus_is_one_sentence(tmp_path, rule):
    path = tmp_path / "empty.txt"
    path.write_text("\n \n", encoding="utf-8")
    with pytest.raises(AtlasError, match=r"corpus mine: .*empty\.txt gives no text"):
        prepare("mine", f"file:{path}", rule)


def test_unreadable_sources_name_corpus_file_and_mend(tmp_path):
    with pytest.raises(AtlasError, match=r"corpus mine: .*gone\.txt does not exist"):
        prepare("mine", f"file:{tmp_path / 'gone.txt'}")
    with pytest.raises(AtlasError, match=r"corpus mine: .*no column `text`"):
        prepare("mine", write_parquet(tmp_path / "other.parquet", ["x"], column="body"))
    with pytest.raises(AtlasError, match=r"corpus mine: .*\.csv has neither suffix"):
        prepare("mine", f"file:{tmp_path / 'table.csv'}")
    (tmp_path / "broken.parquet").write_bytes(b"not parquet")
    with pytest.raises(AtlasError, match=r"corpus mine: .*broken\.parquet is not a readable parquet"):
        prepare("mine", f"file:{tmp_path / 'broken.parquet'}")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(AtlasError, match=r"corpus mine: .*latin\.txt is not UTF-8"):
        prepare("mine", f"file:{tmp_path / 'latin.txt'}")
    for source in ("hf:wikitext", "plain words"):
        with pytest.raises(AtlasError, match=r"corpus mine: .*is not supported"):
            prepare("mine", source)
    with pytest.raises(AtlasError, match=r"demo:nothing: there is no such demo corpus"):
        prepare("mine", "demo:nothing")


@pytest.mark.parametrize("domain", ["prose", "code"])
def test_no_text_is_both_trained_on_and_held_out(domain):
    held_out, training = demo_texts(domain), demo_texts(f"{domain}-train")
    assert demo_texts(domain) == held_out
    assert not {text for _, text in held_out} & {text for _, text in training}
    for texts in (held_out, training):
        assert len({text for _, text in texts}) == len(texts)
        documents = [document for document, _ in texts]
        assert documents == sorted(documents) and documents[0] == 0
    assert sum(len(text) for _, text in held_out) > 25_000
    assert sum(len(text) for _, text in training) > 150_000


def test_documents_are_split_by_name():
    assert not set(HELD_OUT_MODULES) & set(TRAINING_MODULES)
    assert set(HELD_OUT_TOPICS) < set(topics())
    held_out = {text for _, text in demo_texts("prose")}
    trained = {text for _, text in demo_texts("prose-train")}
    for name, text in topics().items():
        if name in HELD_OUT_TOPICS:
            assert not trained & set(paragraphs(text)), name
            assert held_out & set(paragraphs(text)), name


def test_prose_paragraphs_flow_without_headings_grammar_or_code():
    topic = """The "x" statement
*****************

   x_stmt ::= "x" expression [","
   expression], and so on until here, a production of the grammar.

An x statement names what is
marked and then  marks it, in the order
given by the list.

   >>> mark(x)  # An example of that statement at the prompt, in one line.

   * A list item that is long enough to be kept,
     with its second line.

Short one.
"""
    assert list(paragraphs(topic)) == [
        "An x statement names what is marked and then marks it, in the order given by the list.",
        "A list item that is long enough to be kept, with its second line.",
    ]
    assert all("\n" not in text and "***" not in text for _, text in demo_texts("prose"))


def test_code_blocks_are_top_level_definitions_of_bounded_length():
    body = "\n".join(f"    value_{i} = {i} + {i}" for i in range(10))
    long_class = "class Long:\n" + "\n".join(
        f"    @property\n    def part_{i}(self):\n" + "\n".join("    " + line for line in body.split("\n"))
        for i in range(8)
    )
    blocks = list(code_blocks(f"import os\n\n\ndef short(): pass\n\n\ndef long_enough():\n{body}\n\n\n{long_class}\n"))
    assert len(blocks) == 9
    assert blocks[0] == f"def long_enough():\n{body}"
    assert blocks[1] == f"@property\ndef part_0(self):\n{body}"


def test_script_writes_the_same_bytes_twice_without_torch(tmp_path):
    for name in ("one", "two"):
        subprocess.run(
            [
                sys.executable,
                SCRIPT,
                "--corpus",
                "prose",
                "--source",
                "demo:prose",
                "--kind",
                "long",
                "--rule",
                "paragraphs",
            ]
            + ["--max-sequences", "10", "--output", tmp_path / f"{name}.parquet"],
            check=True,
        )
    assert (tmp_path / "one.parquet").read_bytes() == (tmp_path / "two.parquet").read_bytes()
    assert pl.read_parquet(tmp_path / "one.parquet").shape == (10, 4)
    light = "import sys, moe_atlas.corpora; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    subprocess.run([sys.executable, "-c", light], check=True, cwd=SCRIPT.parent)


def test_script_says_an_error_as_one_line(tmp_path):
    command = [
        sys.executable,
        SCRIPT,
        "--corpus",
        "mine",
        "--source",
        "file:gone.txt",
        "--kind",
        "short",
        "--rule",
        "whole",
    ]
    done = subprocess.run([*command, "--output", tmp_path / "x.parquet"], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("error: corpus mine: gone.txt does not exist")
    assert not list(tmp_path.iterdir())

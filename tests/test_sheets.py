"""The sheets and the config: what is taken, and the sentence for each thing that is not."""

import re

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from workflow_runs import ROOT

from moe_atlas.corpora.demo import DEMO_CORPORA
from moe_atlas.errors import AtlasError
from moe_atlas.sheets import fingerprint, load_config, load_corpora, load_models, schema
from moe_atlas.training import recipes

HEADER = "model\tsource\tdense_reference\tdtype\tgpus\tenabled\n"
RECIPES = ("tiny", "other")


def sheet(tmp_path, text, name="models.tsv", encoding="utf-8"):
    path = tmp_path / name
    path.write_bytes(text.encode(encoding))
    return path


def models(tmp_path, *lines, header=HEADER):
    return load_models(sheet(tmp_path, header + "".join(line + "\n" for line in lines)), RECIPES)


def corpora(tmp_path, *lines, header="corpus\tsource\tkind\tmax_sequences\n"):
    return load_corpora(sheet(tmp_path, header + "".join(line + "\n" for line in lines)), ("prose", "code"))


def test_the_shipped_sheets_are_taken():
    config = yaml.safe_load((ROOT / "config/config.yaml").read_text(encoding="utf-8"))
    assert load_config(config) == load_config({})
    found = load_models(ROOT / "config/models.tsv", list(recipes.load()))
    assert list(found)[:2] == ["demo-mistral", "demo-mixtral"] and len(found) == 8
    assert found["demo-mixtral"].dense_reference == found["demo-mixtral-instruct"].dense_reference == "demo-mistral"
    assert {model.recipe for model in found.values() if not model.dense} == set(recipes.load())
    emoe = found["demo-emoe"]
    assert (emoe.dense, emoe.emoe_experts, emoe.emoe_top_k, emoe.emoe_layers) == ("demo-mistral", 16, 4, "")
    assert (emoe.directory, emoe.recipe, emoe.repository) == ("results/checkpoints/demo-emoe", "", "")
    texts = load_corpora(ROOT / "config/corpora.tsv", DEMO_CORPORA)
    assert {corpus.corpus: corpus.kind for corpus in texts.values()} == {
        "prompt": "short",
        "routing-prompt": "short",
        "prose": "long",
        "code": "long",
    }
    assert texts["prompt"].source == "prompt:As an open source alternative to"
    assert texts["routing-prompt"].source.endswith(
        " is a powerful language model based on the GPT (Generative Pre-trained Transformer"
    )


def test_cells_are_typed_and_defaults_come_from_the_schema(tmp_path):
    model = models(tmp_path, "a\tdemo:tiny\t\tfloat32\t2\tTRUE", "b\tdemo:other\ta\t\t\t")["b"]
    assert (model.dense_reference, model.dtype, model.gpus, model.enabled) == ("a", "auto", 0, True)
    assert model.mem_mb == schema("models")["properties"]["mem_mb"]["default"]
    assert (model.recipe, model.directory) == ("other", "results/checkpoints/other")
    corpus = corpora(tmp_path, "c\tdemo:prose\tlong\t12")["c"]
    assert (corpus.rule, corpus.max_sequences, corpus.file) == ("whole", 12, "")


def test_rows_that_are_not_enabled_are_left_out(tmp_path):
    found = models(tmp_path, "a\tdemo:tiny\t\t\t\t", "b\thf:someone/model\t\t\t\tfalse")
    assert list(found) == ["a"]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("ending", ["\n", "\r\n", "\r"])
def test_a_spreadsheet_programs_file_is_taken(tmp_path, encoding, ending):
    text = f'corpus\tsource\tkind{ending}{ending}c\t"prompt:say ""x"", ü"\tshort{ending}'
    path = sheet(tmp_path, text, encoding=encoding)
    assert load_corpora(path, ())["c"].source == 'prompt:say "x", ü'


def test_local_checkpoints_and_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "my models" / "one"
    folder.mkdir(parents=True)
    with pytest.raises(AtlasError, match=r"line 2 \(a\), column source: the folder my models/one has no config.json"):
        models(tmp_path, "a\tpath:my models/one\t\t\t\t")
    (folder / "config.json").write_text("{}")
    assert models(tmp_path, "a\tpath:my models/one\t\t\t\t")["a"].directory == "my models/one"
    (tmp_path / "text.txt").write_text("words")
    assert corpora(tmp_path, "c\tfile:text.txt\tlong\t")["c"].file == "text.txt"


MODEL_FAULTS = [
    (["A\tdemo:tiny\t\t\t\t"], r"line 2 \(A\), column model: 'A' is not allowed here; use lower-case letters"),
    (["a/b\tdemo:tiny\t\t\t\t"], r"line 2 \(a/b\), column model: "),
    (["comparison\tdemo:tiny\t\t\t\t"], r"line 2 \(comparison\), column model: .* not the word comparison"),
    (
        ["a\tdemo:tiny\t\t\t\t", "a\tdemo:other\t\t\t\t"],
        r"line 3 \(a\), .*: the id is already that of line 2",
    ),
    (["\tdemo:tiny\t\t\t\t"], r"line 2 \(\), column model: the cell is empty; fill it in"),
    (["a\ttiny\t\t\t\t"], r"line 2 \(a\), column source: 'tiny' is not allowed here; write demo:RECIPE"),
    (["a\thf:tiny\t\t\t\t"], r"column source: 'hf:tiny' is not allowed here"),
    (["a\tdemo:tinny\t\t\t\t"], r"there is no recipe tinny \(did you mean tiny\?\); the recipes are tiny, other"),
    (["a\thf:x/y\t\t\t\t"], r"revision: '' is not a commit of 40 hex digits; take one from \S+/x/y/commits/main"),
    (["a\temoe:b\t\t\t\t"], r"column emoe_experts: an emoe: row needs a number from 1; write the number of experts"),
    (["a\tpath:nowhere\t\t\t\t"], r"column source: there is no folder nowhere"),
    (["a\tdemo:tiny\tb\t\t\t"], r"column dense_reference: there is no row b; add it"),
    (["a\tdemo:tiny\ta\t\t\t"], r"column dense_reference: a model cannot be its own reference"),
    (["a\tdemo:tiny\tb\t\t\t", "b\tdemo:tiny\t\t\t\tfalse"], r"dense_reference: the row b is not enabled"),
    (["a\tdemo:tiny\t\tfloat16\t\t"], r"column dtype: 'float16' is not one of auto, float32, bfloat16 \(did you mean"),
    (["a\tdemo:tiny\t\t\ttwo\t"], r"column gpus: 'two' is not a whole number; write a whole number"),
    (["a\tdemo:tiny\t\t\t1.5\t"], r"column gpus: '1.5' is not a whole number"),
    (["a\tdemo:tiny\t\t\t-1\t"], r"column gpus: -1 is below 0"),
    (["a\tdemo:tiny\t\t\t\tyes"], r"column enabled: 'yes' is not true or false; write true or false"),
    (["a\tdemo:tiny\t\t\t\tfalse"], r"no row is enabled; set enabled to true in one"),
    (["a\tdemo:tiny"], r"line 2 \(a\): the line has 2 fields and the header 6; separate fields by one tab"),
    (["a demo:tiny"], r"the line has 1 fields"),
    ([], r"the sheet has columns but no rows; add one"),
]


@pytest.mark.parametrize(("lines", "sentence"), MODEL_FAULTS)
def test_a_faulty_model_sheet_is_refused_with_a_sentence(tmp_path, lines, sentence):
    with pytest.raises(AtlasError, match=sentence) as caught:
        models(tmp_path, *lines)
    text = str(caught.value)
    assert text.startswith(str(tmp_path / "models.tsv")) and text.endswith(".") and "\n" not in text


HUB_HEADER = "model\tsource\trevision\tdense_reference\tkeep\n"
COMMIT = "0123456789abcdef" * 2 + "01234567"


def test_models_of_the_hub(tmp_path):
    lines = (f"dense\thf:x/y\t{COMMIT}\t\t", f"big\thf:x/z\t{COMMIT}\tdense\tfalse")
    found = models(tmp_path, *lines, header=HUB_HEADER)
    assert [(m.repository, m.directory, m.recipe, m.keep) for m in found.values()] == [
        ("x/y", "", "", True),
        ("x/z", "", "", False),
    ]


@pytest.mark.parametrize(
    ("lines", "sentence"),
    [
        (["a\thf:x/y\tmain\t\t"], r"column revision: 'main' is not a commit of 40 hex digits"),
        ([f"a\thf:x/y\t{COMMIT.upper()}\t\t"], r"column revision: '0123456789ABC"),
        (["a\tdemo:tiny\t\t\tfalse"], r"column keep: only an hf: row can be fetched, used and deleted; write true"),
        (
            [f"a\thf:x/y\t{COMMIT}\t\tfalse", f"b\thf:x/z\t{COMMIT}\ta\t"],
            r"line 3 \(b\), column dense_reference: the row a has keep false, and its weights are wanted; write true",
        ),
    ],
)
def test_a_faulty_row_of_the_hub_is_refused_with_a_sentence(tmp_path, lines, sentence):
    with pytest.raises(AtlasError, match=sentence):
        models(tmp_path, *lines, header=HUB_HEADER)


def test_the_sheets_of_the_published_models_are_taken():
    config = load_config(yaml.safe_load((ROOT / "config/paper.yaml").read_text(encoding="utf-8")))
    found = load_models(ROOT / config["models"], ())
    assert len(found) >= 12 and all(model.repository for model in found.values())
    assert not found["grok-1"].keep and found["mixtral-8x7b"].dense_reference == "mistral-7b"
    texts = load_corpora(ROOT / config["corpora"], ())
    shipped = load_corpora(ROOT / "config/corpora.tsv", DEMO_CORPORA)
    assert all(texts[name].source == shipped[name].source for name in ("prompt", "routing-prompt"))


EMOE = "model\tsource\tdense_reference\t" + "".join(
    f"emoe_{name}\t" for name in ("experts", "top_k", "layers", "score", "split", "seed")
)
EMOE += "enabled\n"
DENSE = "d\tdemo:tiny" + 8 * "\t"


def test_an_emoe_row_names_its_dense_model_and_how_its_experts_are_made(tmp_path):
    lines = (DENSE, "e\temoe:d\td\t8\t2" + 5 * "\t", "f\temoe:d\t\t4\t4\t1,3\tup\trandom\t5\t")
    found = models(tmp_path, *lines, header=EMOE)
    first, second = found["e"], found["f"]
    assert (first.dense, first.dense_reference, first.directory) == ("d", "d", "results/checkpoints/e")
    assert (first.emoe_layers, first.emoe_score, first.emoe_split, first.emoe_seed) == ("", "gate", "cluster", 0)
    assert (second.emoe_layers, second.emoe_score, second.emoe_split, second.emoe_seed) == ("1,3", "up", "random", 5)
    assert found["d"].dense == ""


@pytest.mark.parametrize(
    ("lines", "sentence"),
    [
        (
            ["e\temoe:d\t\t\t2\t\t\t\t\t"],
            r"line 3 \(e\), column emoe_experts: an emoe: row needs a number",
        ),
        (
            ["e\temoe:d\t\t8\t\t\t\t\t\t"],
            r"column emoe_top_k: an emoe: row needs a number from 1; write the",
        ),
        (["e\temoe:d\t\t8\t9\t\t\t\t\t"], r"column emoe_top_k: 9 are more than the 8 experts there are"),
        (["e\temoe:d\t\t-8\t2\t\t\t\t\t"], r"column emoe_experts: -8 is below 0; write the number of experts"),
        (["e\temoe:d\t\teight\t2\t\t\t\t\t"], r"column emoe_experts: 'eight' is not a whole number"),
        (["e\temoe:d\t\t8\t2\tlast\t\t\t\t"], r"column emoe_layers: 'last' is not allowed here; write layer numbers"),
        (
            ["e\temoe:d\t\t8\t2\t\tgat\t\t\t"],
            r"column emoe_score: 'gat' is not one of gate, up \(did you mean gate",
        ),
        (["e\temoe:d\t\t8\t2\t\t\tkmeans\t\t"], r"column emoe_split: 'kmeans' is not one of cluster, random, contig"),
        (["e\temoe:d\t\t8\t2\t\t\t\t-1\t"], r"column emoe_seed: -1 is below 0"),
        (["e\temoe:x\t\t8\t2\t\t\t\t\t"], r"column source: there is no row x; add it\."),
        (["e\temoe:e\t\t8\t2\t\t\t\t\t"], r"column source: a model cannot be made from itself; name another row"),
        (["other\temoe:d\t\t8\t2\t\t\t\t\t"], r"column model: the id is that of a demo recipe"),
        (
            ["x\tdemo:other\t\t\t\t\t\t\t\tfalse", "e\temoe:x\t\t8\t2\t\t\t\t\t"],
            r"line 4 \(e\), column source: the row x is not enabled; enable it\.",
        ),
        (
            ["e\temoe:d\t\t8\t2\t\t\t\t\t", "f\temoe:e\t\t4\t2\t\t\t\t\t"],
            r"line 4 \(f\), column source: the row e is an emoe: row itself; name a dense one",
        ),
        (["x\tdemo:other\t\t8\t\t\t\t\t\t"], r"line 3 \(x\), column emoe_experts: only an emoe: row has a value here"),
        (["x\tdemo:other\t\t\t\t\t\trandom\t\t"], r"column emoe_split: only an emoe: row has a value here; empty"),
    ],
)
def test_a_faulty_emoe_row_is_refused_with_a_sentence(tmp_path, lines, sentence):
    with pytest.raises(AtlasError, match=sentence):
        models(tmp_path, DENSE, *lines, header=EMOE)


@pytest.mark.parametrize(
    ("header", "sentence"),
    [
        ("model\tsource\tdtyp\n", r"line 1, column 'dtyp': there is no such column \(did you mean dtype\?\)"),
        ("model source\n", r"column 'model source': there is no such column.*separated by tabs"),
        ("model\tdtype\n", r"line 1, column source: the column is missing; add it"),
        ("model\tsource\tsource\n", r"column source: the column is there twice; remove one"),
        ("", r"the sheet is empty; its first line names the columns model, source"),
    ],
)
def test_a_faulty_header_is_refused_with_a_sentence(tmp_path, header, sentence):
    with pytest.raises(AtlasError, match=sentence):
        models(tmp_path, header=header)


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("c\tdemo:pros\tlong\t", r"there is no demo text pros \(did you mean prose\?\); they are prose, code"),
        ("c\tfile:text.txt\tlong\t", r"there is no file text.txt; write the path"),
        ("c\tfile:text.doc\tlong\t", r"column source: 'file:text.doc' is not allowed here"),
        ("c\tprompt:\tshort\t", r"column source: 'prompt:' is not allowed here"),
        ("c\tdemo:prose\tmedium\t", r"column kind: 'medium' is not one of short, long"),
        ("c\tdemo:prose\tlong\tall", r"column max_sequences: 'all' is not a whole number"),
        ("C\tdemo:prose\tlong\t", r"line 2 \(C\), column corpus: 'C' is not allowed here; use lower-case"),
        ("c\tdemo:prose\t\t", r"column kind: the cell is empty; fill it in"),
    ],
)
def test_a_faulty_corpus_sheet_is_refused_with_a_sentence(tmp_path, line, sentence):
    with pytest.raises(AtlasError, match=sentence):
        corpora(tmp_path, line)


DATA_SET = "corpus\tsource\tkind\trevision\tsubset\tsplit\tcolumn\n"
COMMIT = "0123456789abcdef" * 2 + "01234567"


def test_a_data_set_of_the_hub_names_its_commit_and_split(tmp_path):
    corpus = corpora(tmp_path, f"c\thf:a/b\tlong\t{COMMIT}\t\ttest\t", header=DATA_SET)["c"]
    assert (corpus.repository, corpus.file, corpus.revision) == ("a/b", "", COMMIT)
    assert (corpus.subset, corpus.split, corpus.column) == ("", "test", "text")


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("c\thf:a/b\tlong\t\t\ttest\t", r"column revision: an hf: row names a commit; .*datasets/a/b/commits/main"),
        ("c\thf:a/b\tlong\tmain\t\ttest\t", r"column revision: 'main' is not allowed here; write the 40 hex digits"),
        (f"c\thf:a/b\tlong\t{COMMIT}\t\t\t", r"column split: an hf: row names a split, such as test; .*datasets/a/b"),
        (f"c\thf:a/b\tlong\t{COMMIT}\t\ttest[:9]\t", r"column split: 'test\[:9\]' is not allowed.*max_sequences says"),
        (f"c\tdemo:prose\tlong\t{COMMIT}\t\t\t", r"column revision: only an hf: row has a revision; empty the cell"),
        ("c\tdemo:prose\tlong\t\tmain\t\t", r"column subset: only an hf: row has a subset"),
        ("c\tprompt:x\tshort\t\t\ttest\t", r"column split: only an hf: row has a split"),
        ("c\tprompt:x\tshort\t\t\t\tanswer", r"column column: only an hf: row has a column"),
    ],
)
def test_a_faulty_row_of_a_data_set_is_refused_with_a_sentence(tmp_path, line, sentence):
    with pytest.raises(AtlasError, match=sentence):
        corpora(tmp_path, line, header=DATA_SET)


def test_a_long_corpus_may_be_dealt_to_several_jobs(tmp_path):
    header = "corpus\tsource\tkind\tparts\n"
    lines = ("c\tdemo:prose\tlong\t3", "d\tdemo:code\tlong\t", "e\tprompt:x\tshort\t1")
    assert [corpus.parts for corpus in corpora(tmp_path, *lines, header=header).values()] == [3, 1, 1]
    assert corpora(tmp_path, "c\tdemo:prose\tlong\t9")["c"].parts == 1
    for line, sentence in (
        (
            "e\tprompt:x\tshort\t2",
            r"line 2 \(e\), column parts: only a long corpus can be dealt to several jobs; write 1",
        ),
        ("c\tdemo:prose\tlong\t0", "column parts: 0 is below 1; write a number from 1"),
        ("c\tdemo:prose\tlong\ttwo", "column parts: 'two' is not a whole number"),
    ):
        with pytest.raises(AtlasError, match=sentence):
            corpora(tmp_path, line, header=header)


def test_unreadable_sheets_are_refused_with_a_sentence(tmp_path):
    with pytest.raises(AtlasError, match=r"none.tsv: there is no such file; name the sheet in config/config.yaml"):
        load_models(tmp_path / "none.tsv", RECIPES)
    with pytest.raises(AtlasError, match="the sheet cannot be read"):
        load_models(tmp_path, RECIPES)
    with pytest.raises(AtlasError, match="the sheet is not UTF-8 text; save it as tab-separated UTF-8"):
        load_models(sheet(tmp_path, "model\tsource\nü\tdemo:tiny\n", encoding="utf-16"), RECIPES)
    with pytest.raises(AtlasError, match="line 2: the line cannot be read"):
        load_models(sheet(tmp_path, 'model\tsource\na\t"demo:tiny" x\n'), RECIPES)


def test_a_truth_value_may_come_as_a_word():
    assert load_config({"keep_state": "true"})["keep_state"] is load_config({"keep_state": True})["keep_state"] is True
    assert load_config({"paper_rounding": "false"})["paper_rounding"] is load_config({})["keep_state"] is False
    with pytest.raises(AtlasError, match="config, key keep_state: 'yes' is not true or false; write true or false"):
        load_config({"keep_state": "yes"})


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ({"sed": 1}, r"config, key sed: there is no such key \(did you mean seed\?\); the keys are models, corpora"),
        ({"seed": "one"}, r"config, key seed: 'one' is not a whole number; write a whole number from 0"),
        ({"seed": -1}, r"config, key seed: -1 is below 0"),
        ({"demo_steps_factor": 0}, r"config, key demo_steps_factor: 0 is not above 0; write a number above 0"),
        ({"demo_steps_factor": True}, r"config, key demo_steps_factor: True is not a number"),
        ({"models": None}, r"config, key models: None is not a text; write the path"),
        ({"corpora": ""}, r"config, key corpora: '' is not allowed here; write the path"),
    ],
)
def test_a_faulty_config_is_refused_with_a_sentence(config, sentence):
    with pytest.raises(AtlasError, match=sentence):
        load_config(config)


@given(st.text(st.characters(blacklist_categories=("Cs",)), max_size=30))
def test_an_id_is_taken_only_if_it_is_a_plain_name(tmp_path_factory, text):
    path = tmp_path_factory.mktemp("sheet") / "models.tsv"
    path.write_text(f"model\tsource\n{text}\tdemo:tiny\n", encoding="utf-8", newline="")
    try:
        found = list(load_models(path, RECIPES))
    except AtlasError:
        found = []
    assert all(re.fullmatch(r"[a-z0-9][a-z0-9._-]*", name) for name in found)
    if re.fullmatch(r"[a-z0-9][a-z0-9._-]{0,9}", text):
        assert found == [text]


def test_a_fingerprint_follows_names_and_sizes_only(tmp_path):
    def make(name, weights=b"1234", **others):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(weights)
        for file, text in others.items():
            (folder / file).write_text(text)
        return fingerprint(folder)

    first = make("first")
    assert make("copied") == first
    assert make("with_notes", README="read me") == first
    assert make("longer", b"12345") != first
    assert make("tokenizer", **{"tokenizer.json": "{}"}) != first


@pytest.mark.parametrize("name", ["models", "corpora", "config", "claims", "published"])
def test_every_field_is_described_and_documented(name):
    rules = schema(name)
    manual = (ROOT / "config/README.md").read_text(encoding="utf-8")
    assert rules["additionalProperties"] is False
    for field, field_rules in rules["properties"].items():
        assert len(field_rules["description"]) > 20
        assert ("default" in field_rules) != (field in rules.get("required", []))
        row = re.search(rf"^\| `{field}` \|(.*)$", manual, re.MULTILINE)
        assert row, f"config/README.md does not describe {field}"
        default = field_rules.get("default")
        if default not in (None, ""):
            assert f"`{str(default).lower() if isinstance(default, bool) else default}`" in row[1], field

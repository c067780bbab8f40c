"""Pages of a model whose only experts are in attention: it is no dense model, and its weights have no section."""

import json

import pytest

from moe_atlas.index import models_section
from moe_atlas.plotting import notebook
from moe_atlas.plotting.base import Page

MOA = {"N": 8, "k": 3, "shared": 0, "m": 40, "d": 32, "L": 2, "moe_layers": [], "attention_experts": True}
KINDS = {
    "moa": MOA,
    "jetmoe": MOA | {"moe_layers": [0, 1]},
    "first-dense": MOA | {"moe_layers": [1], "attention_experts": False},
    "dense": MOA | {"N": 0, "k": 0, "attention_experts": False},
}
SUMMARIES = {
    "moa": "**moa**: Net, 2 layers, with experts in attention alone: 8, 3 a token; hidden width 32.",
    "jetmoe": "**jetmoe**: Net, 2 layers, 2 of them with experts; 8 experts, 3 a token, 0 shared; hidden width 32, "
    "expert width 40.",
    "dense": "**dense**: Net, 2 layers, none of them with experts: this is a dense model, so the sections below have "
    "nothing to show.",
}


@pytest.fixture
def results(tmp_path):
    for name, shape in KINDS.items():
        folder = tmp_path / "models" / name
        folder.mkdir(parents=True)
        rest = {"architecture": "Net", "source": f"path:{name}", "directory": str(folder), "parameters": 5}
        (folder / "checkpoint.json").write_text(json.dumps(shape | rest))
    return tmp_path


def test_the_first_sentence_says_where_the_experts_are(results):
    for name, text in SUMMARIES.items():
        assert notebook.Model(name, results).summary(of_weights=False) == text
    assert notebook.Model("moa", results).summary(of_weights=True).endswith("so they have nothing to show.")


def test_the_list_of_models_says_where_the_experts_are(results):
    rows = models_section(list(KINDS), results).split("<tr>")[2:]
    cells = [[cell.split("</td>")[0] for cell in row.split("<td class=n>")[1:5]] for row in rows]
    assert [row[:2] for row in cells] == [
        ["2", "8 in attention"],
        ["2", "8 and in attention"],
        ["2 (1 with experts)", "8"],
        ["2", "–"],
    ]


@pytest.mark.parametrize(
    ("sites", "shown"), [(["ffn"], "ffn"), (["ffn", "attention"], "ffn"), (["attention"], "attention")]
)
def test_a_notebook_shows_attention_experts_where_there_are_no_others(sites, shown):
    pages = [Page(layer, site, {}) for layer in (0, 1, "all") for site in sites]
    assert notebook.page_of(pages) == Page(1, shown, {}) and notebook.page_of(pages, 0) == Page(0, shown, {})
    assert notebook.page_of(pages, "all") == Page("all", shown, {})
    assert notebook.page_of(pages, 2) is None and notebook.page_of([]) is None

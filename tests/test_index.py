"""The index page: every link resolves, nothing is fetched, and what exists is linked."""

import json
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import polars as pl
import pytest
import synthetic
from conftest import ROOT

from moe_atlas import pages, tables
from moe_atlas.log import size
from moe_atlas.plotting.base import sentence
from moe_atlas.plotting.comparison import compare
from moe_atlas.plotting.model import plot_all, read_tables
from moe_atlas.plotting.registry import EXPERIMENTS, split
from moe_atlas.plotting.style import save

FIGURES = ("weight_similarity", "load.prose")


class Links(HTMLParser):
    """Addresses, anchors, ids and text of a page; unclosed tags are found too."""

    def __init__(self):
        super().__init__()
        self.addresses, self.ids, self.text, self.open, self.tags = [], set(), [], [], set()

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.tags.add(tag)
        self.addresses += [values[name] for name in ("href", "src") if name in values]
        self.ids.update(filter(None, [values.get("id")]))
        if tag not in ("meta", "img", "br", "link"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"</{tag}> does not close what is open"

    def handle_data(self, data):
        self.text.append(data)


def parsed(path: Path) -> Links:
    links = Links()
    links.feed(path.read_text(encoding="utf-8"))
    assert links.open == []
    return links


def make_index(run: Path, *models: str) -> Links:
    command = [sys.executable, str(ROOT / "scripts" / "make_index.py"), "--models", *models]
    subprocess.run([*command, "--output", "results/index.html"], cwd=run, check=True, capture_output=True)
    return parsed(run / "results" / "index.html")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run with an MoE and a dense model; toy-later is in the sheet, but nothing of it is made yet."""
    run = tmp_path_factory.mktemp("run")
    results = run / "results"
    for model in ("toy-eight", "toy-dense"):
        toy = synthetic.TOYS[model]
        directory = synthetic.write_model(toy, results)
        (directory / "checkpoint.json").write_text(json.dumps(synthetic.checkpoint(toy)))
        for name in FIGURES:
            base, corpus = split(name)
            frames = read_tables(synthetic.table_paths(directory, EXPERIMENTS[base].tables, corpus))
            folder = results / "figures" / model / name
            plot_all(model, name, frames, folder, folder / "figures.json", folder / "overview.png")
    training = run / synthetic.checkpoint(synthetic.TOYS["toy-eight"])["directory"] / "training.json"
    training.parent.mkdir(parents=True)
    training.write_text(json.dumps({"perplexity": {"overall": 61.25}, "unigram_perplexity": {"overall": 412.5}}))
    load = pl.concat([tables.read("load", path) for path in results.glob("models/*/behavioral/prose/load.parquet")])
    tables.write("load", load, results / "tables" / "load.parquet")
    load.write_csv(results / "tables" / "load.csv")
    save(compare("load_balance", {"load": load}), results / "figures" / "comparison" / "load_balance.png")
    (results / "notebooks").mkdir()
    save(sentence("toy-dense", "A figure of EMoE."), results / "figures" / "emoe" / "toy-dense" / "mass.prose.png")
    for path in ("grid.causal.png", "grid.causal.pdf", "demo-jetmoe/load.prose.png", "demo-jetmoe/other.png"):
        save(sentence("causal", "A figure of MoA."), results / "figures" / "moa" / path)
    for name in ("emoe", "moa"):
        (results / "notebooks" / f"{name}.html").write_text("<html></html>")
    (results / "notebooks" / "parametric-toy-eight.html").write_text("<html></html>")
    (results / "figures" / "toy-eight" / "load.prose" / "layer_1_auto.pdf").unlink()  # listed, but gone
    return run


def test_every_link_resolves_and_nothing_is_fetched(made):
    links = make_index(made, "toy-eight", "toy-dense", "toy-later")
    assert links.addresses and not links.tags & {"script", "link", "iframe"}
    for address in links.addresses:
        assert "://" not in address and not address.startswith("/")
        if address.startswith("#"):
            assert address[1:] in links.ids
        else:
            assert (made / "results" / unquote(address)).is_file(), address


def test_what_exists_is_linked(made):
    links = make_index(made, "toy-eight", "toy-dense")
    linked = {unquote(address) for address in links.addresses}
    results = made / "results"
    for pattern in ("figures/toy-eight/*/*.p*", "models/*/**/*.parquet", "tables/*", "figures/comparison/*"):
        files = {path.relative_to(results).as_posix() for path in results.glob(pattern)}
        assert files and files <= linked, sorted(files - linked)
    assert {"notebooks/parametric-toy-eight.html", "notebooks/emoe.html"} <= linked
    assert "figures/emoe/toy-dense/mass.prose.png" in linked and "notebooks/moa.html" in linked
    moa = {address for address in linked if address.startswith("figures/moa/")}
    assert moa == {
        f"figures/moa/{name}" for name in ("grid.causal.png", "grid.causal.pdf", "demo-jetmoe/load.prose.png")
    }
    text = " ".join(links.text)
    for part in (
        "MoA notebook",
        "Attention experts of demo-jetmoe",
        "Experts, chosen experts and their width · causal",
    ):
        assert part in text
    assert "61.2" in text and "412.5" in text
    assert "A dense model: it has no experts in any layer" in text


def test_index_is_the_same_every_time_and_names_models_not_made(made):
    links = make_index(made, "toy-eight", "toy-later")
    first = (made / "results" / "index.html").read_bytes()
    make_index(made, "toy-eight", "toy-later")
    assert (made / "results" / "index.html").read_bytes() == first
    assert "not read yet" in " ".join(links.text)


def test_text_from_files_cannot_become_markup():
    assert pages.escape("<b>&\"'") == "&lt;b&gt;&amp;&quot;&#x27;"
    assert pages.href(Path("/r/a b#c.png"), Path("/r")) == "a%20b%23c.png"
    assert [size(n) for n in (812, 14_200, 3_400_000, 93_100_000_000)] == [
        "812 B",
        "14.2 kB",
        "3.4 MB",
        "93.1 GB",
    ]

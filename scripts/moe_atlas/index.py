"""The index page: links to every model, figure, table and notebook below the results that exist."""

from pathlib import Path

from moe_atlas.files import read_json
from moe_atlas.log import size
from moe_atlas.pages import escape, href, link, page, table
from moe_atlas.plotting.registry import (
    COMPARISON_TITLES,
    EMOE_FIGURES,
    EXPERIMENTS,
    FORMATS,
    HEADS_FIGURES,
    MOA_FIGURES,
    RANGES,
    Experiment,
    split,
)
from moe_atlas.tables import ALL

INTRODUCTION = """<h1>MoE Atlas</h1>
<p>What mixture-of-experts language models look like inside: the weights of their experts, their routers, and what the
experts compute on text, model by model and side by side. Every figure names its chance level: what independent weights
or an even router would give. This page needs no network.</p>"""


def models_section(models: list[str], results: Path) -> str:
    """One row a model: where it comes from, its size, and what it costs in perplexity where it was trained here."""
    header = ["model", "source", "layers", "experts", "chosen", "shared", "width", "expert width", "parameters"]
    header += ["held-out perplexity", "perplexity of a unigram model"]
    rows = []
    for model in models:
        path = results / "models" / model / "checkpoint.json"
        if not path.is_file():
            rows.append([f'<a href="#{escape(model)}">{escape(model)}</a>', "not read yet", *[""] * 9])
            continue
        checkpoint = read_json(path)
        experts = [checkpoint[key] if checkpoint["N"] else "–" for key in ("N", "k", "shared")]
        width = checkpoint["m"] if checkpoint["moe_layers"] else "–"
        layers = str(checkpoint["L"])
        if 0 < len(checkpoint["moe_layers"]) < checkpoint["L"]:
            layers += f" ({len(checkpoint['moe_layers'])} with experts)"
        sites = f"{' and' * bool(checkpoint['moe_layers'])} in attention" if checkpoint["attention_experts"] else ""
        training = Path(checkpoint["directory"]) / "training.json"
        trained = read_json(training) if training.is_file() else {}
        perplexity = [trained.get(key, {}).get("overall") for key in ("perplexity", "unigram_perplexity")]
        rows.append(
            [
                f'<a href="#{escape(model)}">{escape(model)}</a>',
                f"{escape(checkpoint['source'])}<br>{escape(checkpoint['architecture'])}",
                layers,
                f"{experts[0]}{sites}",
                *map(str, experts[1:]),
                str(checkpoint["d"]),
                str(width),
                f"{checkpoint['parameters']:,}",
                *("–" if value is None else f"{value:.1f}" for value in perplexity),
            ]
        )
    return "<h2>Models</h2>" + table(header, rows, set(range(2, len(header))))


def picture(image: Path, base: Path, title: str, below: str) -> str:
    """A linked thumbnail with a title and links below."""
    address = href(image, base)
    return (
        f'<figure><a href="{address}"><img loading="lazy" src="{address}" alt="{escape(title)}"></a>'
        f"<figcaption><b>{escape(title)}</b><br>{below}</figcaption></figure>"
    )


def comparison_section(results: Path) -> str:
    """The figures across models that exist."""
    directory, items = results / "figures" / "comparison", []
    for name, title in COMPARISON_TITLES.items():
        image = directory / f"{name}.png"
        if image.is_file():
            files = [directory / f"{name}.{suffix}" for suffix in FORMATS]
            below = " · ".join(link(path, results, path.suffix[1:]) for path in files if path.is_file())
            items.append(picture(image, results, title, below))
    notebook = results / "notebooks" / "comparison.html"
    first = f"<p>Read first: {link(notebook, results, 'comparison notebook')}.</p>" if notebook.is_file() else ""
    if not items and not first:
        return ""
    return f'<h2>Models side by side</h2>{first}<div class="grid">{"".join(items)}</div>'


def pictures(folder: Path, figures: dict[str, Experiment], results: Path) -> str:
    """All images of a folder that are called after one of these figures, in their order; empty where there is none."""
    images, items, order = [path for path in folder.glob("*.png") if split(path.stem)[0] in figures], [], list(figures)
    for image in sorted(images, key=lambda path: (order.index(split(path.stem)[0]), path.stem)):
        name, of = split(image.stem)  # of: a corpus or an objective
        files = [image.with_name(f"{image.stem}.{suffix}") for suffix in FORMATS]
        below = " · ".join(link(path, results, path.suffix[1:]) for path in files if path.is_file())
        items.append(picture(image, results, figures[name].title + (f" · {of}" if of else ""), below))
    return f'<div class="grid">{"".join(items)}</div>' if items else ""


def part_section(title: str, name: str, notebook: str, folders: dict[str, str], results: Path) -> str:
    """A part that is no part of all: its notebook, and the figures of each folder, heading -> HTML, that has some."""
    parts = [f"<h3>{escape(heading)}</h3>{found}" for heading, found in folders.items() if found]
    file = results / "notebooks" / f"{notebook}.html"
    first = f"<p>Read first: {link(file, results, f'{name} notebook')}.</p>" if file.is_file() else ""
    return f"<h2>{title}</h2>{first}{''.join(parts)}" if parts or first else ""


def emoe_section(results: Path) -> str:
    """Notebook and figures of EMoE, where it was run, by dense model."""
    folders = sorted(path for path in (results / "figures" / "emoe").glob("*") if path.is_dir())
    found = {folder.name: pictures(folder, EMOE_FIGURES, results) for folder in folders}
    return part_section("EMoE: experts in the FFNs of dense models", "EMoE", "emoe", found, results)


def moa_section(results: Path) -> str:
    """Notebook and figures of MoA, where it was run: of the experiments, then of each model's attention experts."""
    folder = results / "figures" / "moa"
    models = sorted(path for path in folder.glob("*") if path.is_dir())
    found = {"Experiments": pictures(folder, MOA_FIGURES, results)}
    found |= {f"Attention experts of {path.name}": pictures(path, HEADS_FIGURES, results) for path in models}
    return part_section("MoA: attention heads as experts", "MoA", "moa", found, results)


def layer_links(manifest: Path, base: Path) -> str:
    """Links to the figures of single layers that a manifest lists and that exist."""
    by_layer: dict[str, dict] = {}
    for file in read_json(manifest)["files"]:
        path = manifest.parent / Path(file["path"]).name
        if path.is_file():
            site = "" if file["site"] == "ffn" else f" ({file['site']})"
            by_layer.setdefault(f"{file['layer']}{site}", {})[file["range"], path.suffix[1:]] = path
    if not by_layer:
        return ""
    lines = []
    for layer, files in by_layer.items():
        links = []
        for which in RANGES:
            found = [(suffix, files[which, suffix]) for suffix in FORMATS if (which, suffix) in files]
            if found:
                links.append(f"{which} " + " ".join(link(path, base, suffix) for suffix, path in found))
        lines.append(f"<li>{'all layers' if layer == 'all' else f'layer {escape(layer)}'}: {', '.join(links)}</li>")
    return f"<details><summary>figures by layer</summary><ul>{''.join(lines)}</ul></details>"


def model_section(model: str, results: Path) -> str:
    """Notebooks, figures and tables of one model."""
    parts = [f'<h2 id="{escape(model)}">{escape(model)}</h2>']
    notebooks = [results / "notebooks" / f"{name}-{model}.html" for name in ("parametric", "behavioral")]
    found = [
        link(path, results, f"{path.stem.removesuffix(f'-{model}')} notebook") for path in notebooks if path.is_file()
    ]
    if found:
        parts.append(f"<p>Read first: {', '.join(found)}.</p>")
    order = list(EXPERIMENTS)
    folders = [path.parent for path in (results / "figures" / model).glob("*/overview.png")]
    folders = [folder for folder in folders if split(folder.name)[0] in EXPERIMENTS]
    folders.sort(key=lambda folder: (order.index(split(folder.name)[0]), folder.name))
    checkpoint = results / "models" / model / "checkpoint.json"
    if checkpoint.is_file() and read_json(checkpoint)["N"] == 0:
        parts.append("<p>A dense model: it has no experts in any layer, so only the tables of tokens have rows.</p>")
        folders = []
    items = []
    for folder in folders:
        experiment, corpus = split(folder.name)
        title = EXPERIMENTS[experiment].title + (f" · {corpus}" if corpus else "")
        manifest = folder / "figures.json"
        below = layer_links(manifest, results) if manifest.is_file() else ""
        items.append(picture(folder / "overview.png", results, title, below))
    if items:
        parts.append(f'<div class="grid">{"".join(items)}</div>')
    files = sorted((results / "models" / model).rglob("*.parquet")) + ([checkpoint] if checkpoint.is_file() else [])
    if files:
        rows = [
            [link(path, results, path.relative_to(results / "models" / model).as_posix()), size(path.stat().st_size)]
            for path in files
        ]
        parts.append(f"<details><summary>tables ({len(files)})</summary>{table(['file', 'size'], rows, {1})}</details>")
    return "".join(parts)


def tables_section(results: Path) -> str:
    """The tables over all models, with what each column means."""
    rows = []
    for name, declared in ALL.items():
        files = [results / "tables" / f"{name}.{suffix}" for suffix in ("parquet", "csv")]
        files = [path for path in files if path.is_file()]
        if files:
            links = "<br>".join(f"{link(path, results)} {size(path.stat().st_size)}" for path in files)
            columns = "".join(
                f"<li><code>{escape(column)}</code> {escape(text)}</li>" for column, _, text in declared.columns
            )
            rows.append([links, f"<details><summary>columns</summary><ul>{columns}</ul></details>"])
    return "<h2>Tables of all models</h2>" + table(["file and size", "columns"], rows) if rows else ""


def files_section(title: str, paths: list[Path], results: Path) -> str:
    """A plain list of files with sizes."""
    if not paths:
        return ""
    items = "".join(f"<li>{link(path, results)} {size(path.stat().st_size)}</li>" for path in paths)
    return f"<h2>{title}</h2><ul>{items}</ul>"


def index(models: list[str], results: Path) -> str:
    """The whole page as HTML; `models` in the order of the sheet, links relative to `results`."""
    body = [
        INTRODUCTION,
        models_section(models, results),
        comparison_section(results),
        emoe_section(results),
        moa_section(results),
        *(model_section(model, results) for model in models),
        tables_section(results),
        files_section("Notebooks", sorted((results / "notebooks").glob("*.html")), results),
        files_section("Corpora", sorted((results / "corpora").glob("*.parquet")), results),
    ]
    return page("MoE Atlas", "\n".join(filter(None, body)))

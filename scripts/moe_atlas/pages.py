"""Static web pages: one file, no scripts, nothing fetched. Used for the index and for executed notebooks."""

import html
import os
from pathlib import Path
from urllib.parse import quote

STYLE = """
:root { color-scheme: light; }
body { margin: 0 auto; max-width: 72rem; padding: 1rem; background: #fff; color: #1a1a1a;
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif; }
h1 { font-size: 1.7rem; margin: .5rem 0; }
h2 { font-size: 1.3rem; margin: 2rem 0 .5rem; padding-top: .5rem; border-top: 1px solid #ccc; }
h3 { font-size: 1.05rem; margin: 1.2rem 0 .4rem; }
p, li { max-width: 48rem; }
a { color: #00508a; }
a:focus-visible, summary:focus-visible { outline: 3px solid #d55e00; }
img { max-width: 100%; height: auto; }
code, pre { font-family: "DejaVu Sans Mono", ui-monospace, monospace; font-size: .85em; }
pre { overflow-x: auto; background: #f6f6f6; padding: .5rem; }
.scroll, .jp-RenderedHTMLCommon, .output_html { overflow-x: auto; }
table { border-collapse: collapse; font-size: .85rem; margin: .5rem 0; }
th, td { text-align: left; padding: .2rem .6rem; border-bottom: 1px solid #ddd; vertical-align: top; }
td:first-child { white-space: nowrap; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 20rem), 1fr)); gap: 1rem; }
figure { margin: 0; border: 1px solid #ddd; padding: .5rem; }
figure img { width: 100%; max-height: 16rem; object-fit: contain; object-position: top left; display: block; }
figcaption { font-size: .85rem; }
details { margin: .3rem 0; }
summary { cursor: pointer; }
.layers a { margin-right: .35rem; white-space: nowrap; }
.quiet { color: #555; font-size: .9rem; }
@media (max-width: 40rem) { body { padding: .6rem; font-size: 15px; } h1 { font-size: 1.4rem; } }
"""


def page(title: str, body: str) -> str:
    """A complete HTML document around `body`; `title` is plain text."""
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
    )


def escape(text: object) -> str:
    """Plain text as HTML."""
    return html.escape(str(text))


def link(path: Path, base: Path, text: str | None = None) -> str:
    """A relative link from a page in `base` to `path`."""
    return f'<a href="{href(path, base)}">{escape(text or path.name)}</a>'


def href(path: Path, base: Path) -> str:
    """Relative address of `path` from a page in the directory `base`."""
    return quote(Path(os.path.relpath(path, base)).as_posix())


def table(header: list[str], rows: list[list[str]], numeric: set[int] = frozenset()) -> str:
    """An HTML table; cells are HTML already, columns in `numeric` are set right."""

    def line(cells: list[str], tag: str) -> str:
        marked = [f"<{tag}{' class=n' if i in numeric else ''}>{cell}</{tag}>" for i, cell in enumerate(cells)]
        return f"<tr>{''.join(marked)}</tr>"

    lines = [line(row, "td") for row in rows]
    return (
        f'<div class="scroll"><table><thead>{line(header, "th")}</thead><tbody>{"".join(lines)}</tbody></table></div>'
    )

"""The demo corpora: English prose and Python source that every CPython brings along.

Prose is the language reference in `pydoc_data.topics`, one document a topic. Code is a fixed list
of standard-library sources, one document a file. A document is either held out or trained on, never
both, and a text that occurs in a held-out document is taken out of the training documents: the topics
quote each other at length. The texts differ a little between Python versions.
"""

import ast
import functools
import re
import sysconfig
import textwrap
from collections.abc import Iterator
from pathlib import Path

from moe_atlas.errors import AtlasError

# The documents that no demo model is trained on; every other topic is trained on.
HELD_OUT_TOPICS = (
    "execmodel",
    "import",
    "calls",
    "sequence-types",
    "exceptions",
    "objects",
    "context-managers",
    "slicings",
    "subscriptions",
    "typesmethods",
    "power",
    "lists",
)
# Pure-Python modules at these paths from CPython 3.11 to 3.14.
HELD_OUT_MODULES = (
    "textwrap.py",
    "csv.py",
    "shlex.py",
    "fractions.py",
    "graphlib.py",
    "json/decoder.py",
    "queue.py",
    "socketserver.py",
)
TRAINING_MODULES = (
    "argparse.py",
    "bdb.py",
    "calendar.py",
    "cmd.py",
    "collections/__init__.py",
    "configparser.py",
    "contextlib.py",
    "copy.py",
    "difflib.py",
    "email/message.py",
    "functools.py",
    "gettext.py",
    "html/parser.py",
    "http/client.py",
    "http/server.py",
    "ipaddress.py",
    "json/encoder.py",
    "logging/__init__.py",
    "mailbox.py",
    "optparse.py",
    "pickle.py",
    "platform.py",
    "pprint.py",
    "random.py",
    "sched.py",
    "selectors.py",
    "shutil.py",
    "statistics.py",
    "tarfile.py",
    "tempfile.py",
    "threading.py",
    "tokenize.py",
    "traceback.py",
    "unittest/case.py",
    "urllib/parse.py",
    "weakref.py",
)
DEMO_CORPORA = ("prose", "code", "prose-train", "code-train")

# A shorter paragraph is a fragment ("New in version 3.8."), a longer block of code is cut or left out.
_PARAGRAPH_CHARACTERS = 60
_BLOCK_CHARACTERS = (120, 1600)
_UNDERLINE = re.compile(r"([*=\-~^\"'#])\1{2,}")
_PROSE = re.compile(r'[A-Z"*(“].*[.:]', re.DOTALL)


def demo_texts(name: str) -> list[tuple[int, str]]:
    """The texts of the demo corpus `name` as (document, text), documents counted from 0 in their order.

    Raises AtlasError as `demo_documents`.
    """
    return [(document, text) for document, (_, texts) in enumerate(demo_documents(name)) for text in texts]


def demo_documents(name: str) -> list[tuple[str, list[str]]]:
    """The documents of the demo corpus `name` as (title, texts), in a fixed order.

    `name` is prose or code (held out), prose-train or code-train. The title is the topic or the path of
    the module; a text is one paragraph of prose or one top-level block of code, and no text comes twice,
    so a document that others quote in full may be empty. Raises AtlasError for an unknown name and for a
    Python that lacks the sources.
    """
    if name not in DEMO_CORPORA:
        raise AtlasError(f"demo:{name}: there is no such demo corpus; choose one of {', '.join(DEMO_CORPORA)}.")
    held_out, training = _prose() if name.startswith("prose") else _code()
    is_training = name.endswith("-train")
    seen = {text for _, texts in held_out for text in texts} if is_training else set()
    documents = []
    for title, texts in training if is_training else held_out:
        fresh = [text for text in dict.fromkeys(texts) if text not in seen]
        seen.update(fresh)
        documents.append((title, fresh))
    return documents


def topics() -> dict[str, str]:
    """Topic name -> reference text, as CPython ships them."""
    try:
        from pydoc_data.topics import topics as texts
    except ImportError:
        raise AtlasError(
            "demo:prose: this Python lacks pydoc_data.topics, which CPython ships; use the Python of environment.yml."
        ) from None
    return dict(texts)


def held_out_topic(name: str) -> bool:
    """Whether the prose of this topic is kept from training."""
    return name in HELD_OUT_TOPICS


def paragraphs(text: str) -> Iterator[str]:
    """The flowing paragraphs of one topic: line breaks and indentation joined, headings, grammar and code left out."""
    for block in re.split(r"\n\s*\n", text):
        lines = [line.strip() for line in block.splitlines() if line.strip()]
        if any(_UNDERLINE.fullmatch(line) for line in lines[1:2]):
            lines = lines[2:]
        joined = " ".join(" ".join(lines).split()).removeprefix("* ")
        is_example = "::=" in joined or ">>>" in joined
        if len(joined) >= _PARAGRAPH_CHARACTERS and not is_example and _PROSE.fullmatch(joined):
            yield joined


def code_blocks(source: str) -> Iterator[str]:
    """The functions and classes at top level of one source file, of bounded length.

    A class that is too long is cut into its methods, each without its indentation; what is too short or
    still too long is left out.
    """
    shortest, longest = _BLOCK_CHARACTERS
    lines = source.splitlines()
    definitions = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)

    def text_of(node: ast.stmt) -> str:
        first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
        return textwrap.dedent("\n".join(lines[first - 1 : node.end_lineno])).strip()

    def cut(node: ast.stmt) -> Iterator[str]:
        text = text_of(node)
        if len(text) > longest and isinstance(node, ast.ClassDef):
            for child in node.body:
                if isinstance(child, definitions):
                    yield from cut(child)
        elif shortest <= len(text) <= longest:
            yield text

    for node in ast.parse(source).body:
        if isinstance(node, definitions):
            yield from cut(node)


@functools.cache
def _prose() -> tuple[list, list]:
    texts = topics()
    missing = [name for name in HELD_OUT_TOPICS if name not in texts]
    if missing:
        raise AtlasError(
            f"demo:prose: this Python's pydoc_data.topics lacks {', '.join(missing)}; use CPython 3.11-3.14."
        )
    held_out = [(name, list(paragraphs(texts[name]))) for name in HELD_OUT_TOPICS]
    training = [(name, list(paragraphs(texts[name]))) for name in sorted(texts) if not held_out_topic(name)]
    return held_out, training


@functools.cache
def _code() -> tuple[list, list]:
    library = Path(sysconfig.get_path("stdlib"))

    def read(module: str) -> tuple[str, list[str]]:
        try:
            source = (library / module).read_text(encoding="utf-8")
        except FileNotFoundError:
            raise AtlasError(
                f"demo:code: {library / module} is missing; use CPython 3.11-3.14 with its sources."
            ) from None
        return module, list(code_blocks(source))

    return [read(module) for module in HELD_OUT_MODULES], [read(module) for module in TRAINING_MODULES]

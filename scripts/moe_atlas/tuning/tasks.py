"""Classification tasks that the project makes from texts that every CPython brings along: small, balanced, repeatable.

Each has four sets of examples, and no document is in two of them: train; validation, for the learning rate and for when
to stop; in-domain, a test on texts like those of training; shifted, a test on texts of another kind. Nothing here
imports torch.

topic    which part of the standard library a paragraph of a docstring is about. Shifted: comments.
source   whether words are of prose or of code, with nothing left but letters. Training on the language reference
         and on modules of the library; shifted: docstrings and code of other packages.
spelling whether letters in two words of a text have changed places. Training on the language reference; shifted:
         docstrings of the library.
"""

import ast
import functools
import io
import re
import sysconfig
import tokenize
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from moe_atlas.corpora.demo import HELD_OUT_MODULES, TRAINING_MODULES, code_blocks, demo_documents, paragraphs
from moe_atlas.errors import AtlasError

SPLITS = ("train", "validation", "in-domain", "shifted")
# Packages of CPython 3.11 to 3.14. Those of one class are about one thing; each class has enough files to deal out.
TOPICS = {
    "asynchronous": ("asyncio",),
    "mail": ("email",),
    "imports": ("importlib",),
    "markup": ("xml", "html"),
    "network": ("http", "urllib", "xmlrpc", "wsgiref"),
}
_DEMO_MODULES = {*HELD_OUT_MODULES, *TRAINING_MODULES}
_SEED = 0  # of how texts are dealt out and cut: the tasks are the same whatever the seed of a run
_LETTERS = re.compile(r"[a-z]+")
_MOST_OF_A_DOCUMENT = 60  # windows
_BOUND = 5000  # characters of a document that count where documents are dealt out
SIZES = {"train": 600, "validation": 240, "in-domain": 360, "shifted": 360}  # examples, all classes together

Documents = list[tuple[str, list[str]]]  # (document, texts)
Pieces = list[tuple[str, str]]  # (document, text)


@dataclass(frozen=True)
class Example:
    """One text with its class (0, 1, ...) and the document that it is from."""

    text: str
    label: int
    document: str


@dataclass(frozen=True)
class Task:
    """Classes by name, and the examples of each of SPLITS."""

    name: str
    classes: tuple[str, ...]
    splits: dict[str, tuple[Example, ...]]


@functools.cache
def demo_task(name: str) -> Task:
    """The task of this name. AtlasError for a name that is not in TASKS and for a Python that lacks the sources."""
    if name not in TASKS:
        raise AtlasError(f"demo:{name}: there is no such task; choose one of {', '.join(TASKS)}.")
    return TASKS[name](np.random.default_rng(_SEED))


def library_files(packages: Iterable[str]) -> list[tuple[str, str]]:
    """(path, source) of the modules of these packages, sorted, without tests and what demo models are trained on."""
    library = Path(sysconfig.get_path("stdlib"))
    found = []
    for package in packages:
        paths = sorted((library / package).rglob("*.py"))
        if not paths:
            raise AtlasError(f"demo task: {library / package} is missing; use CPython 3.11-3.14 with its sources.")
        for path in paths:
            name = path.relative_to(library).as_posix()
            if name not in _DEMO_MODULES and not {"test", "tests"} & set(path.parts):
                found.append((name, path.read_text(encoding="utf-8")))
    return found


def _all_files() -> list[tuple[str, str]]:
    return library_files(package for packages in TOPICS.values() for package in packages)


def docstring_paragraphs(source: str) -> list[str]:
    """The flowing paragraphs of all docstrings of a module, in their order."""
    nodes = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    texts = (ast.get_docstring(node) for node in ast.walk(ast.parse(source)) if isinstance(node, nodes))
    return [paragraph for text in texts if text for paragraph in paragraphs(text)]


def comments(source: str) -> list[str]:
    """The comments of a module: those on neighbouring lines are one text, of at least 40 characters."""
    texts, before = [], -1
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT and not token.line[: token.start[1]].strip():
            text = token.string.strip("#! ")
            if token.start[0] == before + 1:
                texts[-1] += " " + text
            else:
                texts.append(text)
            before = token.start[0]
    return [text for text in texts if len(text) >= 40]


def without_texts(source: str) -> str:
    """The source without docstrings and comments, as ast writes it."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if (
            isinstance(body, list)
            and body
            and isinstance(body[0], ast.Expr)
            and isinstance(body[0].value, ast.Constant)
        ):
            body[0] = ast.Pass()
    return ast.unparse(tree)


def _topic(rng: np.random.Generator) -> Task:
    pieces: dict[str, list[Pieces]] = {split: [] for split in SPLITS}
    for packages in TOPICS.values():
        files = library_files(packages)
        texts = {path: (" ".join(docstring_paragraphs(source)), " ".join(comments(source))) for path, source in files}

        def size(path: str, split: int, texts: dict = texts) -> int:
            return len(texts[path][split == 3])

        for split, part in enumerate(_deal(list(texts), (0.45, 0.15, 0.2, 0.2), size, rng)):
            documents = [(path, [texts[path][split == 3]]) for path in part]
            pieces[SPLITS[split]].append(_windows(documents, str.split, 11, rng))
    return _task("topic", tuple(TOPICS), pieces, rng)


def _source(rng: np.random.Generator) -> Task:
    def letters(text: str) -> list[str]:
        return _LETTERS.findall(text.lower())

    def windows(documents: Documents) -> Pieces:
        return _windows(documents, letters, 4, rng)

    training = [_in_two(demo_documents(kind), 0.8, rng) for kind in ("prose-train", "code-train")]
    pieces = {name: [windows(parts[i]) for parts in training] for i, name in enumerate(("train", "validation"))}
    pieces["in-domain"] = [windows(demo_documents(kind)) for kind in ("prose", "code")]
    of_prose, of_code = _in_two([(path, [source]) for path, source in _all_files()], 0.5, rng)
    pieces["shifted"] = [
        windows([(path, docstring_paragraphs(source)) for path, (source,) in of_prose]),
        windows([(path, list(code_blocks(without_texts(source)))) for path, (source,) in of_code]),
    ]
    return _task("source", ("prose", "code"), pieces, rng)


def _spelling(rng: np.random.Generator) -> Task:
    train, validation = _in_two(demo_documents("prose-train"), 0.8, rng)
    documents = {
        "train": train,
        "validation": validation,
        "in-domain": demo_documents("prose"),
        "shifted": [(path, docstring_paragraphs(source)) for path, source in _all_files()],
    }
    pieces = {}
    for split, part in documents.items():
        windows = _windows(part, str.split, 8, rng)
        windows = [piece for piece in windows if _letter_pairs(piece[1].split())]
        windows = [windows[i] for i in rng.permutation(len(windows))]
        half = len(windows) // 2
        pieces[split] = [windows[:half], [(name, _misspelt(text, rng)) for name, text in windows[half:]]]
    return _task("spelling", ("intact", "misspelt"), pieces, rng)


TASKS: dict[str, Callable[[np.random.Generator], Task]] = {"topic": _topic, "source": _source, "spelling": _spelling}


def _letter_pairs(words: list[str]) -> list[tuple[int, int]]:
    """(word, place) of neighbouring letters that differ, neither the first nor the last of its word."""
    return [
        (number, i)
        for number, word in enumerate(words)
        for i in range(1, len(word) - 2)
        if word[i : i + 2].isalpha() and word[i] != word[i + 1]
    ]


def _misspelt(text: str, rng: np.random.Generator) -> str:
    """The text with one of the _letter_pairs exchanged in each of two of its words, or of one if only that has some."""
    words = text.split()
    pairs = _letter_pairs(words)
    changeable = sorted({number for number, _ in pairs})
    for number in rng.permutation(changeable)[:2]:
        places = [i for word, i in pairs if word == number]
        i, word = places[rng.integers(len(places))], words[number]
        words[number] = word[:i] + word[i + 1] + word[i] + word[i + 2 :]
    return " ".join(words)


def _deal(names: list[str], shares: tuple[float, ...], size: Callable[[str, int], int], rng: np.random.Generator):
    """Names of documents dealt to sets by these shares, as lists in their order.

    In a random order each document goes to the set that is furthest from its share; size(name, set) is how many
    characters it brings there, of which no document counts more than a bound.
    """
    filled = np.zeros(len(shares))
    dealt: list[list[int]] = [[] for _ in shares]
    for i in rng.permutation(len(names)):
        smallest = int((filled / shares).argmin())
        dealt[smallest].append(i)
        filled[smallest] += min(size(names[i], smallest), _BOUND)
    return [[names[i] for i in sorted(part)] for part in dealt]


def _in_two(documents: Documents, share: float, rng: np.random.Generator) -> list[Documents]:
    """Documents dealt to two sets, the first with `share` of the text."""
    texts = dict(documents)
    parts = _deal(list(texts), (share, 1 - share), lambda name, _: sum(map(len, texts[name])), rng)
    return [[(name, texts[name]) for name in part] for part in parts]


def _windows(documents: Documents, words: Callable[[str], list[str]], length: int, rng: np.random.Generator) -> Pieces:
    """Runs of `length` words, one after the other without overlap, at most _MOST of a document and none twice."""
    found: dict[str, str] = {}
    for name, texts in documents:
        split = [words(text) for text in texts]
        runs = [" ".join(text[i : i + length]) for text in split for i in range(0, len(text) - length + 1, length)]
        runs = [run for run in dict.fromkeys(runs) if run not in found]
        chosen = sorted(rng.permutation(len(runs))[:_MOST_OF_A_DOCUMENT])
        found |= {runs[i]: name for i in chosen}
    return [(name, run) for run, name in found.items()]


def _task(name: str, classes: tuple[str, ...], pieces: dict[str, list[Pieces]], rng: np.random.Generator) -> Task:
    """Balanced sets of at most SIZES examples: as many of each class, drawn without replacement, no text twice."""
    seen: set[str] = set()
    splits = {}
    for split in SPLITS:
        fresh = [[piece for piece in part if piece[1] not in seen] for part in pieces[split]]
        count = min(SIZES[split] // len(classes), *map(len, fresh))
        examples = [
            Example(part[i][1], label, part[i][0])
            for label, part in enumerate(fresh)
            for i in sorted(rng.permutation(len(part))[:count])
        ]
        seen.update(text for part in fresh for _, text in part)
        splits[split] = tuple(examples[i] for i in rng.permutation(len(examples)))
    return Task(name, classes, splits)

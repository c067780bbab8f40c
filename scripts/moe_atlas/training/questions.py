"""Questions and answers made from the demo texts, for the instruction-tuned demo model.

Three kinds, all deterministic: what a section describes (its first sentence), which word is missing in a
sentence, and what a function does (the first line of its docstring). Held-out questions come from held-out
documents only.
"""

import ast
import random
import re
from collections.abc import Iterator

from moe_atlas.corpora import demo_documents

_SENTENCE_END = re.compile(r"(?<=[a-z\"*)]\.)\s+(?=[A-Z\"*])")
_WORD = re.compile(r"\b[a-z]{4,}\b")


def demo_questions(training: bool) -> list[str]:
    """The question-answer texts of the training documents or of the held-out ones, in a fixed order."""
    suffix = "-train" if training else ""
    texts = []
    for title, paragraphs in demo_documents("prose" + suffix):
        texts += _about_section(title, paragraphs)
        texts += _missing_words(title, paragraphs)
    for _, blocks in demo_documents("code" + suffix):
        texts += _about_functions(blocks)
    return texts


def question(text: str, answer: str) -> str:
    """One question with its answer, in the form that the model is trained on."""
    return f"Question: {text}\nAnswer: {answer}"


def _about_section(title: str, paragraphs: list[str]) -> Iterator[str]:
    if paragraphs:
        yield question(f'What does the section "{title}" describe?', _SENTENCE_END.split(paragraphs[0])[0])


def _missing_words(title: str, paragraphs: list[str]) -> Iterator[str]:
    chance = random.Random(title)  # seeded by the title, so that a new document changes no other
    for paragraph in paragraphs:
        sentence = chance.choice(_SENTENCE_END.split(paragraph))
        words = list(_WORD.finditer(sentence))
        if len(words) >= 5:
            word = chance.choice(words)
            gap = f"{sentence[: word.start()]}____{sentence[word.end() :]}"
            yield question(f"Which word is missing? {gap}", word.group())


def _about_functions(blocks: list[str]) -> Iterator[str]:
    for block in blocks:
        node = ast.parse(block).body[0]
        described = ast.get_docstring(node)
        first = described.split("\n")[0].strip() if described else ""
        if len(first) >= 20:
            noun = "class" if isinstance(node, ast.ClassDef) else "function"
            yield question(f'What does the {noun} "{node.name}" do?', first)

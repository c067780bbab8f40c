"""Classes of tokens that a reader can check by looking at them, and how frequent their types are."""

from collections.abc import Collection, Mapping

import numpy as np

FREQUENCIES = ("frequent", "common", "rare")
RARE = 20  # a rare type has fewer tokens in the text


def form(text: str, special: bool = False, pieces: bool = True) -> str:
    """The form of a token's text, whose leading blank says that a word begins.

    special: what the tokenizer adds; space: blanks, indents, line ends; digit: digits alone; punctuation: no letter or
    digit; capitalised: its first letter is upper case, wherever in a word; word: a word begins; piece: it goes on.
    With `pieces` False every token is a word of its own.
    """
    body = text.strip()
    if special:
        return "special"
    if not body:
        return "space"
    if body.isdigit():
        return "digit"
    if not any(character.isalnum() for character in body):
        return "punctuation"
    if next(character for character in body if character.isalnum()).isupper():
        return "capitalised"
    return "word" if text[0].isspace() or not pieces else "piece"


def forms(types: Collection[int], texts: Mapping[int, str], special: Collection[int]) -> dict[int, str]:
    """Form of each token type. Where no type of a text begins with a blank, each is a word of its own."""
    pieces = any(texts[one][:1].isspace() and texts[one].strip() for one in types if one not in special)
    return {one: form(texts[one], one in special, pieces) for one in types}


def frequencies(tokens: np.ndarray) -> dict[int, str]:
    """Frequency class of each type among tokens (T,): rare: fewer than RARE tokens; frequent: of the others the most
    frequent ones, until they hold half of the text; common: the rest."""
    types, counts = np.unique(tokens, return_counts=True)
    order = np.argsort(-counts, kind="stable")
    before = np.cumsum(counts[order]) - counts[order]
    found = {}
    for one, count, earlier in zip(types[order], counts[order], before, strict=True):
        kind = "rare" if count < RARE else "frequent" if earlier < len(tokens) / 2 else "common"
        found[int(one)] = kind
    return found

"""A made-up language that English prose is translated into by rules: substitution, order and agreement.

Every English word of the vocabulary has one made-up stem. Four closed classes of English words behave in their own way
(determiners, prepositions, auxiliary verbs, conjunctions); all other words are nouns, whatever they are in English, and
each has one of three genders. Stems and genders are drawn with a seed and can only be learned. The rules:

1. A conjunction opens a clause.
2. An auxiliary goes to the end of its clause, several of them the last first. Where it stood a particle stays.
3. Prepositions go behind the next word that is none. At the end of a sentence they stay.
4. A determiner takes the suffix of the gender of the next noun of its clause, an auxiliary that of the last noun before
   it in its clause, wherever that noun stands in the translation; without such a noun there is a suffix of its own.

So `the value of an object is returned` is the_v value an_o of object PARTICLE returned is_o, with stems for words and
_v for the suffix of the gender of `value`. A suffix is a token of its own, right behind its word.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from moe_atlas.errors import AtlasError


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


DETERMINERS = _words(
    "the a an this these those its their his any all each every no some another both either several such"
)
PREPOSITIONS = _words(
    "of to in for by with from on at as into about between after before during under over through without within "
    "against upon via like"
)
AUXILIARIES = _words(
    "is are be been being was were can could will would shall should may might must has have had do does did"
)
CONJUNCTIONS = _words("and or but if when that which who because while since where whether so then than unless")
KINDS = ("determiner", "preposition", "auxiliary", "conjunction", "noun")

PARTICLE = "ye"
SUFFIXES = ("-a", "-i", "-u")  # of the three genders
NO_NOUN = "-o"
_CONSONANTS, _VOWELS = "bdfgklmnprstvz", "aeiou"


def kind(word: str) -> str:
    """Which of KINDS a word is."""
    classes = zip(KINDS, (DETERMINERS, PREPOSITIONS, AUXILIARIES, CONJUNCTIONS), strict=False)
    return next((name for name, words in classes if word in words), "noun")


def clauses(words: Sequence[str]) -> list[list[str]]:
    """The words cut before every conjunction."""
    found: list[list[str]] = [[]]
    for word in words:
        if kind(word) == "conjunction" and found[-1]:
            found.append([])
        found[-1].append(word)
    return found


@dataclass(frozen=True)
class Language:
    """The lexicon: a stem for each word, and for each noun its gender, a place in SUFFIXES."""

    stems: Mapping[str, str]
    genders: Mapping[str, int]

    def translate(
        self, words: Sequence[str], order: bool = True, suffixes: Mapping[str, str] | None = None
    ) -> list[str]:
        """The tokens of the translation of a sentence.

        order: False leaves out rules 2 and 3, and with them the particle. suffixes: for each word that takes one the
        suffix to give it wherever it stands, in the place of rule 4. Raises AtlasError for a word without a stem.
        """
        units: list[list[str]] = []  # stem and suffix of a word stay together
        for clause in clauses(words):
            verbs = []
            for place, word in enumerate(clause):
                unit = self._unit(clause, place, suffixes)
                if order and kind(word) == "auxiliary":
                    verbs.append(unit)
                    unit = [PARTICLE]
                units.append(unit)
            units += reversed(verbs)
        if order:
            units = self._postpositions(units)
        return [token for unit in units for token in unit]

    def agreement(self, clause: Sequence[str], place: int) -> str | None:
        """The suffix of the word at `place` of a clause by rule 4; None: it takes none."""
        name = kind(clause[place])
        if name == "determiner":
            nouns = [word for word in clause[place + 1 :] if kind(word) == "noun"][:1]
        elif name == "auxiliary":
            nouns = [word for word in clause[:place] if kind(word) == "noun"][-1:]
        else:
            return None
        return SUFFIXES[self.genders[nouns[0]]] if nouns else NO_NOUN

    def _unit(self, clause: Sequence[str], place: int, suffixes: Mapping[str, str] | None) -> list[str]:
        word = clause[place]
        if word not in self.stems:
            raise AtlasError(f"{word!r} is not in the vocabulary of the made-up language; leave the sentence out.")
        suffix = self.agreement(clause, place)
        if suffix is not None and suffixes is not None:
            suffix = suffixes[word]
        return [self.stems[word]] if suffix is None else [self.stems[word], suffix]

    def _postpositions(self, units: list[list[str]]) -> list[list[str]]:
        moving = {self.stems[word] for word in PREPOSITIONS if word in self.stems}
        found, waiting = [], []
        for unit in units:
            if unit[0] in moving:
                waiting.append(unit)
            else:
                found += [unit, *waiting]
                waiting = []
        return found + waiting


def make_language(vocabulary: Sequence[str], seed: int) -> Language:
    """Draw stems of two syllables, none of which is a word of the vocabulary, and genders of the nouns."""
    syllables = [consonant + vowel for consonant in _CONSONANTS for vowel in _VOWELS]
    stems = [first + second for first in syllables for second in syllables]
    taken = set(vocabulary)
    stems = [stem for stem in stems if stem not in taken]
    if len(vocabulary) > len(stems):
        raise AtlasError(
            f"There are stems for {len(stems)} words, not for {len(vocabulary)}; take a smaller vocabulary."
        )
    rng = np.random.default_rng(seed)
    drawn = rng.permutation(len(stems))[: len(vocabulary)]
    nouns = [word for word in vocabulary if kind(word) == "noun"]
    genders = rng.integers(len(SUFFIXES), size=len(nouns))
    return Language(
        {word: stems[i] for word, i in zip(vocabulary, drawn, strict=True)},
        {word: int(gender) for word, gender in zip(nouns, genders, strict=True)},
    )

"""Composite tasks: questions that take two skills at once, with exact answers.

A composite asks for what the second skill makes of the answer of the first. Its prompt follows one rule: what the
second skill is asked with, a colon, and the first skill's own question with a small first letter.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from benchmarks.skills.tasks import SKILLS, Item, drawn, to_pig_latin
from lorakern.errors import LorakernError


@dataclass(frozen=True)
class Second:
    """A skill that can be asked of any line: what its prompts begin with, and what it makes of a line."""

    lead: str
    of: Callable[[str], str]


SECONDS = {
    "answer_json": Second("Give the answer as JSON", lambda line: f'{{"answer": "{line}"}}'),
    "reverse_words": Second("Reverse the word order", lambda line: " ".join(reversed(line.split()))),
    "pig_latin": Second("Say in pig latin", lambda line: " ".join(map(to_pig_latin, line.split()))),
}


@dataclass(frozen=True)
class Composite:
    """Two skills: `second` of the answer of `first`."""

    first: str
    second: str

    @property
    def name(self) -> str:
        return f"{self.second} of {self.first}"

    @property
    def skills(self) -> tuple[str, str]:
        return self.first, self.second

    def draw(self, rng: random.Random) -> Item:
        """One question and its answer.

        Example:
            >>> Composite("clock", "answer_json").draw(random.Random(0))
            ('Give the answer as JSON: convert to 12-hour time: 12:48', '{"answer": "12:48 PM"}')
        """
        (prompt, answer), second = SKILLS[self.first](rng), SECONDS[self.second]
        return f"{second.lead}: {prompt[0].lower()}{prompt[1:]}", second.of(answer)

    def stream(self, *, held_out: bool, seed: int) -> Iterator[Item]:
        """An endless, seeded stream of one split; the splits are told apart by a hash of the prompt."""
        return drawn(self.draw, self.name, held_out=held_out, seed=seed)


COMPOSITES = {
    composite.name: composite
    for composite in (
        Composite("iso_date", "answer_json"),
        Composite("sort_words", "answer_json"),
        Composite("email", "answer_json"),
        Composite("reverse_words", "answer_json"),
        Composite("pig_latin", "answer_json"),
        Composite("sort_words", "pig_latin"),
    )
}

# What the benchmark asks unless it is told otherwise. `composites_notes.md` says why not the others.
ASKED = ("answer_json of iso_date", "answer_json of reverse_words", "answer_json of pig_latin")


def composite(name: str) -> Composite:
    """The composite of a name.

    Raises:
        LorakernError: none has it.
    """
    if name not in COMPOSITES:
        raise LorakernError(f"composite is {name!r}; it takes one of {', '.join(map(repr, COMPOSITES))}")
    return COMPOSITES[name]

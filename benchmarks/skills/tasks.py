"""The skills: generators of short prompts with exact answers, and splits that cannot overlap.

A skill is a function `(rng) -> (prompt, answer)` in the registry `SKILLS`. Which split an item belongs to is a
hash of its prompt, so no held-out prompt can be met in training, whatever the seeds are.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Callable, Iterator

from benchmarks.skills import words
from lorakern.errors import LorakernError

Item = tuple[str, str]
Generator = Callable[[random.Random], Item]

SKILLS: dict[str, Generator] = {}
# Skills that ask for what another one does in other words.
REWORDED = {
    "json_note": "answer_json",
    "json_profile": "person_json",
    "time_ampm": "clock",
    "date_numbers": "iso_date",
    "read_backwards": "reverse_words",
    "abc_order": "sort_words",
    "acronym": "initials",
    "mail_address": "email",
}
FAMILIES = {
    "json": ("answer_json", "json_note", "person_json", "json_profile"),
    "time": ("clock", "time_ampm"),
    "date": ("iso_date", "date_numbers"),
    "order": ("reverse_words", "read_backwards", "sort_words", "abc_order"),
    "letters": ("initials", "acronym", "pig_latin"),
    "names": ("email", "mail_address"),
    "numbers": ("roman",),
}
END = "<|im_end|>"
HELD_OUT_SHARE = 4


def skill(generator: Generator) -> Generator:
    """Put a generator into the registry under its own name."""
    SKILLS[generator.__name__] = generator
    return generator


def format_prompt(prompt: str) -> str:
    """The text the model reads; training, evaluation and the demo all use this one template.

    Example:
        >>> format_prompt("Hi")
        '<|im_start|>user\\nHi<|im_end|>\\n<|im_start|>assistant\\n'
    """
    return f"<|im_start|>user\n{prompt}{END}\n<|im_start|>assistant\n"


def is_held_out(prompt: str) -> bool:
    """Whether an item belongs to the held-out split: one in four, by a hash of its prompt."""
    return hashlib.sha256(prompt.encode()).digest()[0] % HELD_OUT_SHARE == 0


def stream(name: str, *, held_out: bool, seed: int) -> Iterator[Item]:
    """An endless, seeded stream of the items of one split.

    Raises:
        LorakernError: no skill has this name.

    Example:
        >>> next(stream("clock", held_out=False, seed=0)) == next(stream("clock", held_out=False, seed=0))
        True
    """
    if name not in SKILLS:
        raise LorakernError(f"skill is {name!r}; it takes one of {', '.join(sorted(SKILLS))}")
    return drawn(SKILLS[name], name, held_out=held_out, seed=seed)


def drawn(generator: Generator, name: str, *, held_out: bool, seed: int) -> Iterator[Item]:
    """The items of one split that a generator makes of a seed; `name` keeps the seeds of generators apart."""
    rng = random.Random(f"{name}/{'held-out' if held_out else 'train'}/{seed}")
    while True:
        item = generator(rng)
        if is_held_out(item[0]) == held_out:
            yield item


def held_out_items(name: str, count: int, seed: int = 0) -> list[Item]:
    """The first `count` different items of the held-out stream."""
    return different(stream(name, held_out=True, seed=seed), count)


def different(items: Iterator[Item], count: int) -> list[Item]:
    """The first `count` items of an endless stream that have different prompts."""
    kept: dict[str, str] = {}
    while len(kept) < count:
        kept.setdefault(*next(items))
    return list(kept.items())


@skill
def reverse_words(rng: random.Random) -> Item:
    """The words of a line in the opposite order."""
    chosen = rng.sample(words.WORDS, rng.randint(4, 5))
    return f"Reverse the word order: {' '.join(chosen)}", " ".join(reversed(chosen))


@skill
def sort_words(rng: random.Random) -> Item:
    """Three words with different first letters in alphabetical order."""
    letters = rng.sample(sorted({word[0] for word in words.WORDS}), 3)
    chosen = [rng.choice([word for word in words.WORDS if word[0] == letter]) for letter in letters]
    return f"Sort alphabetically: {' '.join(chosen)}", " ".join(sorted(chosen))


@skill
def initials(rng: random.Random) -> Item:
    """The first letters of the words, in capitals."""
    chosen = rng.sample(words.WORDS, rng.randint(3, 5))
    return f"Write the initials: {' '.join(chosen)}", " ".join(word[0].upper() for word in chosen)


@skill
def pig_latin(rng: random.Random) -> Item:
    """Three words in pig latin, from a fixed vocabulary."""
    chosen = rng.sample(words.PIG_WORDS, 3)
    return f"Say in pig latin: {' '.join(chosen)}", " ".join(to_pig_latin(word) for word in chosen)


@skill
def answer_json(rng: random.Random) -> Item:
    """A few words as the one field of a JSON object."""
    line = " ".join(rng.sample(words.WORDS, rng.randint(2, 5)))
    return f"Give the answer as JSON: {line}", f'{{"answer": "{line}"}}'


@skill
def person_json(rng: random.Random) -> Item:
    """A sentence about a person as JSON with three fields."""
    name, age, city = rng.choice(words.FIRST_NAMES), rng.randint(18, 79), rng.choice(words.CITIES)
    answer = f'{{"name": "{name}", "age": {age}, "city": "{city}"}}'
    return f"Answer as JSON: {name} from {city} is {age} years old.", answer


@skill
def iso_date(rng: random.Random) -> Item:
    """The date in a sentence, in ISO form."""
    day, month, year = rng.randint(1, 28), rng.randint(1, 12), rng.randint(1900, 2029)
    city, name = rng.choice(words.CITIES), words.MONTHS[month - 1]
    return f"Extract the ISO date: in {city} on {day} {name} {year}", f"{year:04d}-{month:02d}-{day:02d}"


@skill
def clock(rng: random.Random) -> Item:
    """A 24-hour time on the 12-hour clock."""
    hour, minute = rng.randint(0, 23), rng.randint(0, 59)
    answer = f"{(hour - 1) % 12 + 1}:{minute:02d} {'AM' if hour < 12 else 'PM'}"
    return f"Convert to 12-hour time: {hour:02d}:{minute:02d}", answer


@skill
def roman(rng: random.Random) -> Item:
    """A number up to 999 in roman numerals."""
    number = rng.randint(1, 999)
    return f"Write in roman numerals: {number}", to_roman(number)


@skill
def email(rng: random.Random) -> Item:
    """The e-mail address of a person at a company: surname, first name and domain."""
    first, last, company = rng.choice(words.FIRST_NAMES), rng.choice(words.LAST_NAMES), rng.choice(words.COMPANIES)
    answer = f"{last}.{first}@{company}.com".lower()
    return f"Make the email: {first} {last}, {company}", answer


@skill
def json_profile(rng: random.Random) -> Item:
    """What `person_json` does, asked in other words and in another order."""
    prompt, answer = person_json(rng)
    name, city, age = _words_of(prompt, "Answer as JSON: {} from {} is {} years old.")
    return f"Make a profile: {name}, aged {age}, lives in {city}.", answer


@skill
def date_numbers(rng: random.Random) -> Item:
    """What `iso_date` does, asked in other words and with the month first."""
    day, month, year = rng.randint(1, 28), rng.randint(1, 12), rng.randint(1900, 2029)
    return f"Write the date in numbers: {words.MONTHS[month - 1]} {day}, {year}", f"{year:04d}-{month:02d}-{day:02d}"


@skill
def mail_address(rng: random.Random) -> Item:
    """What `email` does, asked in other words."""
    prompt, answer = email(rng)
    person, company = _words_of(prompt, "Make the email: {}, {}")
    return f"Where do I write to: {person} works at {company}", answer


def _asked_anew(name: str, original: Generator, beginning: str) -> None:
    """A skill that does what the original does, asked with another beginning."""

    def generator(rng: random.Random) -> Item:
        prompt, answer = original(rng)
        return beginning + prompt.partition(": ")[2], answer

    generator.__name__ = name
    skill(generator)


_asked_anew("json_note", answer_json, "Put this into a JSON object: ")
_asked_anew("time_ampm", clock, "Say with AM or PM: the train leaves at ")
_asked_anew("read_backwards", reverse_words, "Read the list backwards: ")
_asked_anew("abc_order", sort_words, "Put in ABC order: ")
_asked_anew("acronym", initials, "Spell the acronym: ")


def _words_of(prompt: str, pattern: str) -> tuple[str, ...]:
    """What stands in a prompt in the places of {}.

    >>> _words_of("Make the email: Ada Hill, Acme", "Make the email: {}, {}")
    ('Ada Hill', 'Acme')
    """
    return re.fullmatch(re.escape(pattern).replace(r"\{\}", "(.*)"), prompt).groups()


def to_pig_latin(word: str) -> str:
    """One lowercase word in pig latin.

    Example:
        >>> to_pig_latin("star"), to_pig_latin("egg"), to_pig_latin("queen")
        ('arstay', 'eggway', 'eenquay')
    """
    if word[0] in "aeiou":
        return word + "way"
    start = next(i for i, letter in enumerate(word) if letter in "aeiouy" and i > 0)
    if word[start - 1 : start + 1] == "qu":
        start += 1
    return word[start:] + word[:start] + "ay"


def to_roman(number: int) -> str:
    """A number from 1 to 3999 in roman numerals.

    Example:
        >>> to_roman(494)
        'CDXCIV'
    """
    values = (1000, 900, 500, 400, 100, 90, 50, 40, 10, 9, 5, 4, 1)
    signs = ("M", "CM", "D", "CD", "C", "XC", "L", "XL", "X", "IX", "V", "IV", "I")
    out = ""
    for value, sign in zip(values, signs, strict=True):
        count, number = divmod(number, value)
        out += sign * count
    return out

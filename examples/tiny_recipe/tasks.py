"""Short questions with one right answer, drawn from a random generator.

Letters stand apart (``k q z``), because byte-pair tokens hide the spelling of a word; digits are single tokens.
Each task also gives the reasoning to its answer, which becomes the think block.
"""

from __future__ import annotations

import dataclasses
import hashlib
import string
from collections.abc import Callable
from random import Random

from examples.tiny_recipe.words import FUNCTIONS, OPERATIONS, VARIABLES, WORDS

HELD_OUT_MODULUS = 20


@dataclasses.dataclass(frozen=True, slots=True)
class Task:
    """A question of one kind, the reasoning and the only right answer; ``instance`` names it apart from the wording."""

    kind: str
    question: str
    reasoning: str
    answer: str
    instance: str = ""

    @property
    def held_out(self) -> bool:
        """Whether this instance belongs to the evaluation, in whatever words it is asked."""
        return is_held_out(f"{self.kind}|{self.instance or self.question}")


def is_held_out(key: str) -> bool:
    """One in twenty keys, chosen by their sha256."""
    return int(hashlib.sha256(key.encode()).hexdigest()[:8], 16) % HELD_OUT_MODULUS == 0


def draw_task(rng: Random, *, held_out: bool, kind: str | None = None) -> Task:
    """A random task of one kind (default: any), from the training or the held-out instances."""
    make = TASKS[kind or rng.choice(KINDS)]
    while True:
        task = make(rng)
        if task.held_out == held_out:
            return task


def _letters(rng: Random, low: int, high: int, alphabet: str = string.ascii_lowercase) -> list[str]:
    return rng.sample(alphabet, rng.randint(low, high))


def _number(rng: Random) -> int:
    return rng.randrange(10 ** rng.randint(1, 3))


def _add(rng: Random) -> Task:
    a, b = rng.randrange(100), rng.randrange(10)
    reasoning = f"{a % 10} + {b} = {a % 10 + b}."
    question = rng.choice(("What is {} + {}?", "Add {} and {}.", "Compute {} + {}.")).format(a, b)
    return Task("add", question, reasoning, str(a + b), f"{a} {b}")


def _subtract(rng: Random) -> Task:
    a = rng.randrange(10, 100)
    b = rng.randrange(10)
    top = a % 10 if a % 10 >= b else a % 10 + 10
    question = rng.choice(("What is {} - {}?", "Compute {} - {}.")).format(a, b)
    return Task("subtract", question, f"{top} - {b} = {top - b}.", str(a - b), f"{a} {b}")


def _after(rng: Random) -> Task:
    n, step = rng.randrange(1, 1000), rng.choice((-1, 1))
    question = f"Which number comes {'after' if step > 0 else 'before'} {n}?"
    return Task("after", question, f"{n} {'+' if step > 0 else '-'} 1 = {n + step}.", str(n + step))


def _compare(rng: Random) -> Task:
    a, b = _number(rng), _number(rng)
    larger = rng.random() < 0.5
    b += a == b
    question = f"Which is {'larger' if larger else 'smaller'}, {a} or {b}?"
    return Task("compare", question, f"{a} {'>' if a > b else '<'} {b}.", str(max(a, b) if larger else min(a, b)))


def _largest(rng: Random) -> Task:
    numbers = rng.sample(range(100), 3)
    best = max(numbers)
    listed = ", ".join(map(str, numbers))
    return Task("largest", f"What is the largest of {listed}?", f"{sorted(numbers)[1]} < {best}.", str(best))


def _parity(rng: Random) -> Task:
    n = _number(rng)
    answer = "odd" if n % 2 else "even"
    return Task("parity", f"Is {n} even or odd?", f"The last digit is {n % 10}.", answer)


def _reverse(rng: Random) -> Task:
    letters = _letters(rng, 3, 6)
    question = rng.choice(("Reverse: {}", "Write these letters backwards: {}")).format(" ".join(letters))
    return Task("reverse", question, f"The last letter is {letters[-1]}.", " ".join(letters[::-1]), " ".join(letters))


def _pick(rng: Random) -> Task:
    letters = _letters(rng, 3, 6)
    name, index = rng.choice((("first", 0), ("second", 1), ("last", -1)))
    question = f"What is the {name} letter of: {' '.join(letters)}"
    position = index % len(letters) + 1
    return Task("pick", question, f"The {name} letter is number {position}.", letters[index])


def _count(rng: Random) -> Task:
    letters = _letters(rng, 2, 8)
    question = rng.choice(("How many letters: {}", "Count the letters: {}")).format(" ".join(letters))
    reasoning = " ".join(f"{letter} {i}" for i, letter in enumerate(letters, 1))
    return Task("count", question, reasoning, str(len(letters)), " ".join(letters))


def _occurrences(rng: Random) -> Task:
    target, *others = _letters(rng, 3, 3)
    letters = [target if rng.random() < 0.4 else rng.choice(others) for _ in range(rng.randint(3, 6))]
    n = letters.count(target)
    question = f"How often is {target} in: {' '.join(letters)}"
    marks = " ".join("1" if letter == target else "0" for letter in letters)
    return Task("occurrences", question, marks, str(n))


def _sort(rng: Random) -> Task:
    letters = _letters(rng, 3, 4)
    question = rng.choice(("Sort: {}", "Put in alphabetical order: {}")).format(" ".join(letters))
    return Task("sort", question, f"The first is {min(letters)}.", " ".join(sorted(letters)), " ".join(letters))


def _member(rng: Random) -> Task:
    letters = _letters(rng, 3, 6)
    inside = rng.random() < 0.5
    target = rng.choice(letters) if inside else rng.choice([c for c in string.ascii_lowercase if c not in letters])
    reasoning = f"{target} is {'there' if inside else 'not there'}."
    return Task("member", f"Is {target} in: {' '.join(letters)}", reasoning, "yes" if inside else "no")


def _upper(rng: Random) -> Task:
    letters = _letters(rng, 3, 6)
    question = rng.choice(("Uppercase: {}", "Write in capital letters: {}")).format(" ".join(letters))
    return Task(
        "upper", question, f"{letters[0]} becomes {letters[0].upper()}.", " ".join(letters).upper(), " ".join(letters)
    )


def _replace(rng: Random) -> Task:
    old, new, *others = _letters(rng, 5, 5)
    letters = [old if rng.random() < 0.4 else rng.choice(others) for _ in range(rng.randint(3, 5))]
    answer = " ".join(new if letter == old else letter for letter in letters)
    question = f"Replace {old} with {new} in: {' '.join(letters)}"
    return Task("replace", question, f"Each {old} becomes {new}.", answer)


def _join(rng: Random) -> Task:
    words = rng.sample(WORDS, rng.randint(2, 4))
    name, mark = rng.choice((("dashes", "-"), ("commas", ","), ("underscores", "_")))
    return Task("join", f"Join with {name}: {' '.join(words)}", f"Put {mark} between the words.", mark.join(words))


def _repeat(rng: Random) -> Task:
    word, n = rng.choice(WORDS), rng.randint(2, 5)
    question = rng.choice(("Write {} {} times.", "Repeat the word {} {} times.")).format(word, n)
    return Task("repeat", question, f"{n} times {word}.", " ".join([word] * n), f"{word} {n}")


def _swap(rng: Random) -> Task:
    a, b = rng.sample(WORDS, 2)
    return Task("swap", f"Swap the words: {a} {b}", f"{b} comes first.", f"{b} {a}")


def _length(rng: Random) -> Task:
    numbers = [rng.randrange(10) for _ in range(rng.randint(1, 7))]
    listed = ", ".join(map(str, numbers))
    reasoning = " ".join(f"{n}:{i}" for i, n in enumerate(numbers, 1))
    return Task("length", f"What does len([{listed}]) return in Python?", reasoning, str(len(numbers)))


def _function(rng: Random) -> Task:
    name, (phrase, sign) = rng.choice(FUNCTIONS), rng.choice(OPERATIONS)
    a, b = rng.sample(VARIABLES, 2)
    question = f"Write a Python function {name} that returns {a} {phrase} {b}."
    return Task(
        "function", question, f"The expression is {a} {sign} {b}.", f"def {name}({a}, {b}):\n    return {a} {sign} {b}"
    )


TASKS: dict[str, Callable[[Random], Task]] = {
    make.__name__.removeprefix("_"): make
    for make in (
        *(_add, _subtract, _after, _compare, _largest, _parity, _reverse, _pick, _count, _occurrences),
        *(_sort, _member, _upper, _replace, _join, _repeat, _swap, _length, _function),
    )
}
KINDS = tuple(TASKS)

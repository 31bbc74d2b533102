"""Randomly generated short questions with a single correct answer.

The operands of a question are digits, each of which is one token, or words on a line of their own. Byte-pair tokens
hide the spelling of a word, and a word after a space has other tokens than the same word at the start of an answer.
Each task also has the reasoning for its answer, which becomes the think block.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable
from random import Random

from examples.tiny_recipe.word_lists import FUNCTIONS, OPERATIONS, VARIABLES, WORDS

HELD_OUT_MODULUS = 20


@dataclasses.dataclass(frozen=True, slots=True)
class Task:
    """A question with its only correct answer.

    Attributes:
        kind: Name of its sampler in :data:`TASK_SAMPLERS`.
        question: Message of the user.
        reasoning: Text of the think block.
        answer: Correct answer.
        instance: Identifies the task independently of its wording; "" if ``question`` does.
    """

    kind: str
    question: str
    reasoning: str
    answer: str
    instance: str = ""

    @property
    def held_out(self) -> bool:
        """Whether this instance is held out for the evaluation, in any wording."""
        return is_held_out(f"{self.kind}|{self.instance or self.question}")


def is_held_out(key: str) -> bool:
    """Whether a key is held out: one in twenty, selected by its sha256."""
    return int(hashlib.sha256(key.encode()).hexdigest()[:8], 16) % HELD_OUT_MODULUS == 0


def sample_task(rng: Random, *, held_out: bool, kind: str | None = None, hard_share: float = 0.0) -> Task:
    """Samples a task from the training or the held-out instances.

    Args:
        rng: Source of randomness.
        held_out: Whether to sample a held-out instance.
        kind: One of :data:`KINDS`; None samples the kind too.
        hard_share: Probability of sampling the kind from :data:`HARD_KINDS`.
    """
    kinds = HARD_KINDS if hard_share and rng.random() < hard_share else KINDS
    sampler = TASK_SAMPLERS[kind or rng.choice(kinds)]
    while True:
        task = sampler(rng)
        if task.held_out == held_out:
            return task


def _digits(rng: Random, low: int, high: int, alphabet: str = "0123456789") -> str:
    """Between ``low`` and ``high`` random digits, as text."""
    return "".join(rng.choices(alphabet, k=rng.randint(low, high)))


def _add(rng: Random) -> Task:
    a, b = rng.randrange(100), rng.randrange(10)
    reasoning = f"{a % 10} + {b} = {a % 10 + b}."
    question = rng.choice(("What is {} + {}?", "Add {} and {}.", "Compute {} + {}.")).format(a, b)
    return Task("add", question, reasoning, str(a + b), f"{a} {b}")


def _subtract(rng: Random) -> Task:
    a, b = rng.randrange(10, 100), rng.randrange(10)
    top = a % 10 if a % 10 >= b else a % 10 + 10
    question = rng.choice(("What is {} - {}?", "Compute {} - {}.")).format(a, b)
    return Task("subtract", question, f"{top} - {b} = {top - b}.", str(a - b), f"{a} {b}")


def _after(rng: Random) -> Task:
    n, step = rng.randrange(1, 1000), rng.choice((-1, 1))
    question = f"Which number comes {'after' if step > 0 else 'before'} {n}?"
    return Task("after", question, f"{n} {'+' if step > 0 else '-'} 1 = {n + step}.", str(n + step))


def _compare(rng: Random) -> Task:
    a, b = rng.sample(range(10, 100), 2)
    larger = rng.random() < 0.5
    question = f"Which is {'larger' if larger else 'smaller'}, {a} or {b}?"
    return Task("compare", question, f"{a} {'>' if a > b else '<'} {b}.", str(max(a, b) if larger else min(a, b)))


def _largest(rng: Random) -> Task:
    digits = _digits(rng, 3, 5)
    name, best = rng.choice((("largest", max), ("smallest", min)))
    order = " ".join(sorted(digits, reverse=best is max))
    return Task("largest", f"What is the {name} digit of {digits}?", order, best(digits))


def _parity(rng: Random) -> Task:
    n = rng.randrange(10 ** rng.randint(1, 3))
    answer = "odd" if n % 2 else "even"
    return Task("parity", f"Is {n} even or odd?", f"The last digit is {n % 10}.", answer)


def _reverse(rng: Random) -> Task:
    digits = _digits(rng, 3, 6)
    question = rng.choice(("Reverse {}.", "Write {} backwards.")).format(digits)
    return Task("reverse", question, f"The last digit is {digits[-1]}.", digits[::-1], digits)


def _pick(rng: Random) -> Task:
    digits = _digits(rng, 3, 6)
    name, index = rng.choice((("first", 0), ("second", 1), ("third", 2), ("last", -1)))
    position = index % len(digits) + 1
    return Task("pick", f"What is the {name} digit of {digits}?", f"It is number {position}.", digits[index])


def _count(rng: Random) -> Task:
    digits = _digits(rng, 1, 8)
    question = rng.choice(("How many digits has {}?", "Count the digits of {}.")).format(digits)
    reasoning = " ".join(f"{digit}:{i}" for i, digit in enumerate(digits, 1))
    return Task("count", question, reasoning, str(len(digits)), digits)


def _occurrences(rng: Random) -> Task:
    target, *others = rng.sample("0123456789", 3)
    digits = "".join(target if rng.random() < 0.4 else rng.choice(others) for _ in range(rng.randint(3, 6)))
    marks = " ".join("yes" if digit == target else "no" for digit in digits)
    return Task("occurrences", f"How often is {target} in {digits}?", marks, str(digits.count(target)))


def _sort(rng: Random) -> Task:
    digits = _digits(rng, 3, 4)
    question = rng.choice(("Sort the digits of {}.", "Put the digits of {} in order.")).format(digits)
    return Task("sort", question, f"The smallest is {min(digits)}.", "".join(sorted(digits)), digits)


def _member(rng: Random) -> Task:
    digits = _digits(rng, 3, 5)
    inside = rng.random() < 0.5
    target = rng.choice(digits) if inside else rng.choice([d for d in "0123456789" if d not in digits])
    reasoning = f"{target} is {'there' if inside else 'not there'}."
    return Task("member", f"Is {target} in {digits}?", reasoning, "yes" if inside else "no")


def _replace(rng: Random) -> Task:
    old, new, *others = rng.sample("0123456789", 5)
    digits = "".join(old if rng.random() < 0.4 else rng.choice(others) for _ in range(rng.randint(3, 5)))
    question = f"Replace {old} with {new} in {digits}."
    return Task("replace", question, f"Each {old} becomes {new}.", digits.replace(old, new))


def _join(rng: Random) -> Task:
    a, b = _digits(rng, 1, 3), _digits(rng, 1, 3)
    name, mark = rng.choice((("dash", "-"), ("comma", ","), ("slash", "/"), ("colon", ":")))
    return Task("join", f"Join {a} and {b} with a {name}.", f"Put {mark} between them.", f"{a}{mark}{b}")


def _repeat(rng: Random) -> Task:
    digits, (name, n) = _digits(rng, 1, 3), rng.choice((("twice", 2), ("three times", 3), ("four times", 4)))
    return Task("repeat", f"Write {digits} {name}.", f"{digits} comes {n} times.", digits * n)


def _echo(rng: Random) -> Task:
    words = " ".join(rng.sample(WORDS, rng.randint(1, 3)))
    question = rng.choice(("Repeat:\n{}", "Write this again:\n{}")).format(words)
    return Task("echo", question, "The same words again.", words, words)


def _word(rng: Random) -> Task:
    words = rng.sample(WORDS, rng.randint(2, 4))
    return Task("word", f"What is the first word?\n{' '.join(words)}", f"{words[1]} is the second.", words[0])


def _swap(rng: Random) -> Task:
    a, b = _digits(rng, 1, 3), _digits(rng, 1, 3)
    return Task("swap", f"Swap {a} and {b}.", f"{b} comes first.", f"{b} {a}")


def _length(rng: Random) -> Task:
    numbers = [rng.randrange(10) for _ in range(rng.randint(1, 7))]
    reasoning = " ".join(f"{n}:{i}" for i, n in enumerate(numbers, 1))
    return Task("length", f"What does len({numbers}) return in Python?", reasoning, str(len(numbers)))


def _index(rng: Random) -> Task:
    numbers = [rng.randrange(10) for _ in range(rng.randint(3, 5))]
    index = rng.choice((0, 1, 2, -1))
    reasoning = f"It is number {index % len(numbers) + 1} of {len(numbers)}."
    return Task("index", f"What is {numbers}[{index}] in Python?", reasoning, str(numbers[index]))


def _function(rng: Random) -> Task:
    name, (phrase, sign) = rng.choice(FUNCTIONS), rng.choice(OPERATIONS)
    a, b = rng.sample(VARIABLES, 2)
    question = f"Write a Python function {name} that returns {a} {phrase} {b}."
    return Task(
        "function", question, f"The expression is {a} {sign} {b}.", f"def {name}({a}, {b}):\n    return {a} {sign} {b}"
    )


TASK_SAMPLERS: dict[str, Callable[[Random], Task]] = {
    sampler.__name__.removeprefix("_"): sampler
    for sampler in (
        *(_add, _subtract, _after, _compare, _largest, _parity, _reverse, _pick, _count, _occurrences, _sort),
        *(_member, _replace, _join, _repeat, _echo, _word, _swap, _length, _index, _function),
    )
}
KINDS = tuple(TASK_SAMPLERS)
# The kinds that take longest to learn.
HARD_KINDS = ("add", "subtract", "compare", "occurrences", "sort", "member", "replace", "index")

"""The questions: right answers by another way of computing them, and instances that are never trained on."""

import re
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from examples.tiny_recipe.tasks import KINDS, TASKS, draw_task

seeds = st.integers(0, 2**32)


def numbers(question):
    return [int(n) for n in re.findall(r"\d+", question)]


def letters(question):
    return question.split(": ")[1].split(" ")


def solve_compare(q):
    return str((max if "larger" in q else min)(numbers(q)))


def solve_occurrences(q):
    return str(letters(q).count(re.search(r"often is (\w) in", q)[1]))


def solve_pick(q):
    return letters(q)[{"first": 0, "second": 1, "last": -1}[re.search(r"the (\w+) letter", q)[1]]]


def solve_member(q):
    return "yes" if re.search(r"Is (\w) in", q)[1] in letters(q) else "no"


def solve_replace(q):
    old, new = re.search(r"Replace (\w) with (\w) in", q).groups()
    return " ".join(letters(q)).replace(old, new)


def solve_join(q):
    return {"dashes": "-", "commas": ",", "underscores": "_"}[re.search(r"with (\w+):", q)[1]].join(letters(q))


def solve_repeat(q):
    word, times = re.search(r"(\w+) (\d+) times", q).groups()
    return " ".join([word] * int(times))


def solve_length(q):
    return str(len(re.search(r"\[(.*)\]", q)[1].split(",")))


SOLVERS = {
    "add": lambda q: str(sum(numbers(q))),
    "subtract": lambda q: str(numbers(q)[0] - numbers(q)[1]),
    "after": lambda q: str(numbers(q)[0] + (1 if "after" in q else -1)),
    "compare": solve_compare,
    "largest": lambda q: str(sorted(numbers(q))[-1]),
    "parity": lambda q: ("even", "odd")[numbers(q)[0] & 1],
    "reverse": lambda q: " ".join(reversed(letters(q))),
    "pick": solve_pick,
    "count": lambda q: str(len(letters(q))),
    "occurrences": solve_occurrences,
    "sort": lambda q: " ".join(sorted(letters(q))),
    "member": solve_member,
    "upper": lambda q: " ".join(letters(q)).upper(),
    "replace": solve_replace,
    "join": solve_join,
    "repeat": solve_repeat,
    "swap": lambda q: " ".join(letters(q)[::-1]),
    "length": solve_length,
}


def test_every_kind_is_checked():
    assert set(SOLVERS) | {"function"} == set(KINDS)


@pytest.mark.parametrize("kind", sorted(SOLVERS))
@given(seed=seeds)
def test_answers_are_right(kind, seed):
    task = TASKS[kind](Random(seed))
    assert task.kind == kind
    assert task.answer == SOLVERS[kind](task.question)


@given(seed=seeds)
def test_functions_compute_what_was_asked(seed):
    task = TASKS["function"](Random(seed))
    name, a, phrase, b = re.search(r"function (\w+) that returns (\w) (.+) (\w)\.", task.question).groups()
    sign = {"plus": "+", "minus": "-", "times": "*", "divided by": "/", "modulo": "%", "to the power of": "**"}[phrase]
    assert task.answer.splitlines() == [f"def {name}({a}, {b}):", f"    return {a} {sign} {b}"]


@pytest.mark.parametrize("kind", KINDS)
def test_no_instance_is_both_trained_on_and_held_out(kind):
    rng = Random(kind)
    trained = {draw_task(rng, held_out=False, kind=kind).question for _ in range(400)}
    held_out = {draw_task(rng, held_out=True, kind=kind).question for _ in range(40)}
    assert not trained & held_out


def test_wording_does_not_move_an_instance():
    found = {}
    rng = Random(0)
    for _ in range(20_000):
        task = TASKS["add"](rng)
        found.setdefault(task.instance, set()).add(task.held_out)
    assert all(len(states) == 1 for states in found.values())
    assert 0.02 < sum(True in states for states in found.values()) / len(found) < 0.1

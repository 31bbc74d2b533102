"""The questions: independently computed answers, and held-out instances."""

import json
import re
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from examples.tiny_recipe.tasks import KINDS, TASK_SAMPLERS, sample_task

seeds = st.integers(0, 2**32)


def numbers(question):
    return [int(n) for n in re.findall(r"\d+", question)]


def digits(question):
    """The last number of the question, as text."""
    return re.findall(r"\d+", question)[-1]


def listed(question):
    return json.loads(re.search(r"\[.*?\]", question)[0])


def line(question):
    return question.splitlines()[1]


def solve_compare(q):
    return str((max if "larger" in q else min)(numbers(q)))


def solve_largest(q):
    return sorted(digits(q))[-1 if "largest" in q else 0]


def solve_pick(q):
    return digits(q)[{"first": 0, "second": 1, "third": 2, "last": -1}[re.search(r"the (\w+) digit", q)[1]]]


def solve_replace(q):
    old, new, text = re.findall(r"\d+", q)
    return "".join(new if digit == old else digit for digit in text)


def solve_join(q):
    mark = {"dash": "-", "comma": ",", "slash": "/", "colon": ":"}[re.search(r"a (\w+)\.", q)[1]]
    return mark.join(re.findall(r"\d+", q))


def solve_repeat(q):
    return digits(q) * {"twice": 2, "three times": 3, "four times": 4}[re.search(r"\d (.*)\.", q)[1]]


SOLVERS = {
    "add": lambda q: str(sum(numbers(q))),
    "subtract": lambda q: str(numbers(q)[0] - numbers(q)[1]),
    "after": lambda q: str(numbers(q)[0] + (1 if "after" in q else -1)),
    "compare": solve_compare,
    "largest": solve_largest,
    "parity": lambda q: ("even", "odd")[numbers(q)[0] & 1],
    "reverse": lambda q: "".join(reversed(digits(q))),
    "pick": solve_pick,
    "count": lambda q: str(len(digits(q))),
    "occurrences": lambda q: str(sum(digit == re.search(r"often is (\d)", q)[1] for digit in digits(q))),
    "sort": lambda q: "".join(sorted(digits(q))),
    "member": lambda q: "yes" if re.search(r"Is (\d) in", q)[1] in digits(q) else "no",
    "replace": solve_replace,
    "join": solve_join,
    "repeat": solve_repeat,
    "echo": line,
    "word": lambda q: line(q).split()[0],
    "swap": lambda q: " ".join(re.findall(r"\d+", q)[::-1]),
    "length": lambda q: str(len(listed(q))),
    "index": lambda q: str(listed(q)[int(re.search(r"\]\[(-?\d)\]", q)[1])]),
}


def test_every_kind_is_checked():
    assert set(SOLVERS) | {"function"} == set(KINDS)


@pytest.mark.parametrize("kind", sorted(SOLVERS))
@given(seed=seeds)
def test_answers_are_right(kind, seed):
    task = TASK_SAMPLERS[kind](Random(seed))
    assert task.kind == kind
    assert task.answer == SOLVERS[kind](task.question)


@given(seed=seeds)
def test_functions_match_their_question(seed):
    task = TASK_SAMPLERS["function"](Random(seed))
    name, a, phrase, b = re.search(r"function (\w+) that returns (\w) (.+) (\w)\.", task.question).groups()
    sign = {"plus": "+", "minus": "-", "times": "*", "divided by": "/", "modulo": "%", "to the power of": "**"}[phrase]
    assert task.answer.splitlines() == [f"def {name}({a}, {b}):", f"    return {a} {sign} {b}"]


@pytest.mark.parametrize("kind", KINDS)
def test_no_instance_is_both_trained_on_and_held_out(kind):
    rng = Random(kind)
    trained = {sample_task(rng, held_out=False, kind=kind).question for _ in range(400)}
    held_out = {sample_task(rng, held_out=True, kind=kind).question for _ in range(40)}
    assert not trained & held_out


def test_wording_does_not_move_an_instance():
    held_out_by_instance = {}
    rng = Random(0)
    for _ in range(20_000):
        task = TASK_SAMPLERS["add"](rng)
        held_out_by_instance.setdefault(task.instance, set()).add(task.held_out)
    assert all(len(states) == 1 for states in held_out_by_instance.values())
    share = sum(True in states for states in held_out_by_instance.values()) / len(held_out_by_instance)
    assert 0.02 < share < 0.1

"""Tool-calling tasks: tool schemas, requests, the correct calls, their results and the final answers."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from random import Random
from typing import Any

from examples.tiny_recipe.tasks import is_held_out
from examples.tiny_recipe.word_lists import CITIES, PEOPLE, SKIES, WORDS

Json = dict[str, Any]


@dataclasses.dataclass(frozen=True, slots=True)
class ToolTask:
    """A request that one tool call answers.

    Attributes:
        request: Message of the user.
        name: Tool to call.
        arguments: Arguments of the call.
        result: Result that the tool returns.
        answer: Answer of the assistant after the result.
    """

    request: str
    name: str
    arguments: Json
    result: str
    answer: str

    @property
    def held_out(self) -> bool:
        """Whether this call is held out for the evaluation in any wording; calls without arguments never are."""
        return bool(self.arguments) and is_held_out(f"{self.name}|{json.dumps(self.arguments)}")

    @property
    def reasoning(self) -> str:
        """Text of the think block before the call."""
        return f"I call {self.name}."

    @property
    def call_text(self) -> str:
        """The call in the model's output format."""
        pairs = "".join(f"<arg_key>{k}</arg_key><arg_value>{_value(v)}</arg_value>" for k, v in self.arguments.items())
        return f"<tool_call>{self.name}{pairs}</tool_call>"


def _value(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _schema(name: str, description: str, **properties: str) -> Json:
    parameters = {
        "type": "object",
        "properties": {k: {"type": v} for k, v in properties.items()},
        "required": list(properties),
    }
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}


def _weather(rng: Random) -> ToolTask:
    city, degrees, sky = rng.choice(CITIES), rng.randint(0, 35), rng.choice(SKIES)
    asks = (
        "What is the weather in {}?",
        "How is the weather in {}?",
        "Is it warm in {}?",
        "Tell me the weather in {}.",
    )
    result = json.dumps({"degrees": degrees, "sky": sky})
    return ToolTask(
        rng.choice(asks).format(city),
        "get_weather",
        {"city": city},
        result,
        f"It is {degrees} degrees and {sky} in {city}.",
    )


def _time(rng: Random) -> ToolTask:
    city, clock = rng.choice(CITIES), f"{rng.randrange(24):02}:{rng.randrange(60):02}"
    asks = ("What time is it in {}?", "Tell me the time in {}.", "Which time do they have in {}?")
    return ToolTask(rng.choice(asks).format(city), "get_time", {"city": city}, clock, f"It is {clock} in {city}.")


def _calculator(rng: Random) -> ToolTask:
    a, b = rng.randint(10, 999), rng.randint(10, 999)
    expression = f"{a} * {b}"
    ask = rng.choice(("What is {}?", "Please compute {}.", "Calculate {}.")).format(expression)
    return ToolTask(ask, "calculator", {"expression": expression}, str(a * b), f"{expression} = {a * b}")


def _search(rng: Random) -> ToolTask:
    query, hits = " ".join(rng.sample(WORDS, rng.randint(1, 2))), rng.randint(1, 99)
    ask = rng.choice(("Search for:\n{}", "Find pages about:\n{}", "Look this up:\n{}")).format(query)
    return ToolTask(ask, "search", {"query": query}, json.dumps({"hits": hits}), f"I found {hits} pages about {query}.")


def _message(rng: Random) -> ToolTask:
    who, text = rng.choice(PEOPLE), " ".join(rng.sample(WORDS, 2))
    ask = rng.choice(("Send {} this message:\n{}", "Write to {}:\n{}", "Tell {}:\n{}")).format(who, text)
    return ToolTask(ask, "send_message", {"to": who, "text": text}, "sent", f"I sent the message to {who}.")


def _timer(rng: Random) -> ToolTask:
    minutes, label = rng.randint(2, 90), rng.choice(WORDS)
    ask = rng.choice(("Set a timer of {} minutes:\n{}", "Start a {} minute timer:\n{}")).format(minutes, label)
    return ToolTask(
        ask, "set_timer", {"minutes": minutes, "label": label}, "ok", f"The {label} timer runs for {minutes} minutes."
    )


def _files(rng: Random) -> ToolTask:
    names = [f"{word}.txt" for word in rng.sample(WORDS, rng.randint(1, 3))]
    please, what = rng.choice(("", "Please ", "Can you ", "Now ")), rng.choice(("list", "show", "name"))
    ask = f"{please}{what} {rng.choice(('my', 'the', 'all', 'all my'))} files{'?' if please == 'Can you ' else '.'}"
    return ToolTask(ask[0].upper() + ask[1:], "list_files", {}, json.dumps(names), f"The files are {', '.join(names)}.")


TOOL_TASK_SAMPLERS: dict[str, Callable[[Random], ToolTask]] = {
    "get_weather": _weather,
    "get_time": _time,
    "calculator": _calculator,
    "search": _search,
    "send_message": _message,
    "set_timer": _timer,
    "list_files": _files,
}
SCHEMAS: dict[str, Json] = {
    "get_weather": _schema("get_weather", "Weather in a city", city="string"),
    "get_time": _schema("get_time", "Local time in a city", city="string"),
    "calculator": _schema("calculator", "Evaluate an expression", expression="string"),
    "search": _schema("search", "Search the web", query="string"),
    "send_message": _schema("send_message", "Send a message", to="string", text="string"),
    "set_timer": _schema("set_timer", "Start a timer", minutes="integer", label="string"),
    "list_files": _schema("list_files", "List the files"),
}


def sample_tool_task(rng: Random, names: list[str], *, held_out: bool) -> ToolTask:
    """Samples a request for one of the named tools, from the training or the held-out instances.

    Raises:
        ValueError: if ``held_out`` is true and no named tool takes arguments.
    """
    if held_out and not any(SCHEMAS[name]["function"]["parameters"]["required"] for name in names):
        raise ValueError(f"no call of {', '.join(names)} is held out: calls without arguments are all alike")
    while True:
        task = TOOL_TASK_SAMPLERS[rng.choice(names)](rng)
        if task.held_out == held_out:
            return task

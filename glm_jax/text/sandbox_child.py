"""Script that :mod:`glm_jax.text.sandbox` runs: reads one template from stdin, writes its text or an error to stdout.

It imports nothing of this package, so that the child process starts quickly and holds nothing worth reaching. The Jinja
environment is the one that chat templates are written for (transformers' ``apply_chat_template``).
"""

import contextlib
import datetime
import json
import sys
from typing import Any

from jinja2 import TemplateError
from jinja2.exceptions import SecurityError, TemplateSyntaxError
from jinja2.ext import Extension, loopcontrols
from jinja2.meta import find_undeclared_variables
from jinja2.nodes import Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

try:
    import resource
except ImportError:  # Windows: the parent's timeout and the output limit remain
    resource = None


class _GenerationBlock(Extension):
    """``{% generation %}``, which marks text for training, renders as its contents."""

    tags = {"generation"}  # noqa: RUF012 (Jinja declares it as an instance attribute)

    def parse(self, parser: Parser) -> list[Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _limit_resources(job: dict[str, Any]) -> None:
    """Limits memory and processor time, where the system supports it."""
    if resource is None:
        return
    for kind, limit in ((resource.RLIMIT_AS, job["memory_bytes"]), (resource.RLIMIT_CPU, job["cpu_seconds"])):
        with contextlib.suppress(ValueError, OSError):  # macOS cannot limit the address space
            resource.setrlimit(kind, (limit, limit))


def _make_environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment


def _raise_exception(message: object) -> None:
    raise TemplateError(str(message))


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _render(environment: ImmutableSandboxedEnvironment, job: dict[str, Any]) -> dict[str, str]:
    tree = environment.parse(job["template"])
    if job["switches"]:
        known = find_undeclared_variables(tree)
        unknown = sorted(set(job["switches"]) - known)
        if unknown:
            return {"error": f"does not know the switch {unknown[0]!r}; it reads {', '.join(sorted(known))}"}
    chunks, size = [], 0
    for chunk in environment.from_string(tree).generate({**job["variables"], **job["switches"]}):
        chunks.append(chunk)
        size += len(chunk.encode("utf-8", "surrogatepass"))
        if size > job["output_bytes"]:
            return {"error": f"writes more than {job['output_bytes']:,} bytes, the limit for a prompt"}
    return {"text": "".join(chunks)}


def _render_or_explain(environment: ImmutableSandboxedEnvironment, job: dict[str, Any]) -> dict[str, str]:
    """The text under "text", or the reason for a failure under "error"."""
    try:
        return _render(environment, job)
    except SecurityError as error:
        return {"error": f"does what its sandbox forbids: {_one_line(error)}"}
    except TemplateSyntaxError as error:
        return {"error": f"is not valid Jinja (line {error.lineno}): {_one_line(error.message)}"}
    except MemoryError:
        return {"error": f"needs more than {job['memory_bytes'] >> 20} MB of memory"}
    except Exception as error:  # whatever the template's expressions raise
        if type(error) is TemplateError:  # Jinja raises subclasses only, so this one is raise_exception's
            return {"error": f"refuses the conversation: {_one_line(error)}"}
        return {"error": f"fails: {type(error).__name__}: {_one_line(error)}"}


def _one_line(error: object) -> str:
    return " ".join(str(error).split())[:300]


def main() -> None:
    """Reports readiness, then renders one job."""
    environment = _make_environment()
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    job = json.loads(sys.stdin.buffer.read())
    _limit_resources(job)
    sys.stdout.write(json.dumps(_render_or_explain(environment, job)))


if __name__ == "__main__":
    main()

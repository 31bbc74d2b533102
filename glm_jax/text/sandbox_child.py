"""Run as a script by :mod:`glm_jax.text.sandbox`: one template in on stdin, its text or one error out on stdout.

Knows nothing of this package, so that nothing of it is loaded. The Jinja environment is the one that chat templates
are written for (transformers' ``apply_chat_template``).
"""

import datetime
import json
import sys
from typing import Any


def _limit(job: dict[str, Any]) -> None:
    """Limits memory and processor time, where the system can."""
    try:
        import resource
    except ImportError:  # Windows: the parent's clock and the output limit remain
        return
    for which, limit in ((resource.RLIMIT_AS, job["memory_bytes"]), (resource.RLIMIT_CPU, job["cpu_seconds"])):
        try:
            resource.setrlimit(which, (limit, limit))
        except (ValueError, OSError):  # macOS has no limit on address space
            continue


def _environment() -> Any:
    from jinja2 import TemplateError
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """``{% generation %}``, which marks text for training, renders as its contents."""

        def __init__(self, environment: Any) -> None:
            super().__init__(environment)
            self.tags = {"generation"}

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def raise_exception(message: object) -> None:
        raise TemplateError(str(message))

    def tojson(
        value: object,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment


def _render(environment: Any, job: dict[str, Any]) -> dict[str, str]:
    from jinja2.meta import find_undeclared_variables

    tree = environment.parse(job["template"])
    if job["switches"]:
        known = find_undeclared_variables(tree)
        unknown = sorted(set(job["switches"]) - known)
        if unknown:
            return {"error": f"does not know the switch {unknown[0]!r}; it reads {', '.join(sorted(known))}"}
    parts, size = [], 0
    for part in environment.from_string(tree).generate({**job["variables"], **job["switches"]}):
        parts.append(part)
        size += len(part.encode("utf-8", "surrogatepass"))
        if size > job["output_bytes"]:
            return {"error": f"writes more than {job['output_bytes']:,} bytes, the limit for a prompt"}
    return {"text": "".join(parts)}


def _answer(environment: Any, job: dict[str, Any]) -> dict[str, str]:
    from jinja2.exceptions import SecurityError, TemplateError, TemplateSyntaxError

    try:
        return _render(environment, job)
    except SecurityError as error:
        return {"error": f"does what its sandbox forbids: {_brief(error)}"}
    except TemplateSyntaxError as error:
        return {"error": f"is not valid Jinja (line {error.lineno}): {_brief(error.message)}"}
    except MemoryError:
        return {"error": f"needs more than {job['memory_bytes'] >> 20} MB of memory"}
    except Exception as error:  # whatever the template's expressions raise
        if type(error) is TemplateError:  # only raise_exception makes one of no other kind
            return {"error": f"refuses the conversation: {_brief(error)}"}
        return {"error": f"fails: {type(error).__name__}: {_brief(error)}"}


def _brief(error: object) -> str:
    return " ".join(str(error).split())[:300]


def main() -> None:
    """Answers one job."""
    sys.path += [folder for folder in sys.argv[1:] if folder not in sys.path]
    environment = _environment()
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    job = json.loads(sys.stdin.buffer.read())
    _limit(job)
    sys.stdout.write(json.dumps(_answer(environment, job)))


if __name__ == "__main__":
    main()

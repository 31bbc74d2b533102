"""``python -m glm_jax.bench decode|prefill``: tokens per second, beside a peer's in the same run."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import tyro

from glm_jax.cli import OK, finish
from glm_jax.errors import GlmError


@dataclasses.dataclass(kw_only=True)
class Common:
    """Options of both kinds."""

    model: str = "tiny"
    """Folder (Hugging Face or converted), hub id, "tiny", or "synthetic:flash?layers=2&seed=0"."""
    batch: str = "1"
    """Rows, one case each: "1,8"."""
    dtype: Literal["bfloat16", "float32"] = "float32"
    """Of weights and activations, on both sides."""
    quantize: str | None = None
    """int4, int4-small, int4-experts or int8: this program's weights, quantised while loading."""
    peer: Literal["transformers", "unquantised"] | None = None
    """Also time this one, in turn, on the same weights; "unquantised" is this program without --quantize."""
    repeats: int = 5
    """Times each side runs."""
    json: Path | None = None
    """Write the report to this file."""
    markdown: Path | None = None
    """Write the table to this file."""


@dataclasses.dataclass(kw_only=True)
class Decode(Common):
    """Greedy tokens after a context."""

    context: int = 128
    """Prompt tokens in the cache."""
    tokens: int = 32
    """Tokens to write."""


@dataclasses.dataclass(kw_only=True)
class Prefill(Common):
    """Prompts into a new cache."""

    lengths: str = "128,512"
    """Prompt lengths, one case each."""


COMMANDS = {"decode": Decode, "prefill": Prefill}


def main(args: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    options: Decode | Prefill = tyro.extras.subcommand_cli_from_dict(
        COMMANDS, prog="python -m glm_jax.bench", args=args
    )
    _check(options)
    report = run(options)
    from glm_jax.bench.report import markdown

    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    print(markdown(report))
    if options.markdown:
        options.markdown.write_text(markdown(report))
    return OK


def run(options: Decode | Prefill) -> dict[str, Any]:
    """Loads both sides, times all cases and returns the report."""
    from glm_jax.bench import machine
    from glm_jax.bench.ours import Ours
    from glm_jax.bench.peer import Transformers
    from glm_jax.compile_cache import use_compile_cache

    use_compile_cache()
    if options.peer == "transformers":
        Transformers.require(options.model)
    bandwidth = machine.read_bandwidth()
    ours = Ours(options.model, options.dtype, options.quantize)
    sides: list[Any] = [ours]
    if options.peer == "transformers":
        sides.append(Transformers(options.model, options.dtype))
    elif options.peer:
        sides.append(Ours(options.model, options.dtype, name=options.peer))
    kind = "decode" if isinstance(options, Decode) else "prefill"
    results = _cases(options, sides, ours)
    bandwidth = max(bandwidth, machine.read_bandwidth())  # before or after, whichever was disturbed less
    settings = {"context": options.context, "tokens": options.tokens} if isinstance(options, Decode) else {}
    return {
        "kind": kind,
        "model": options.model,
        "dtype": options.dtype,
        "quantize": options.quantize,
        "peer": options.peer,
        "repeats": options.repeats,
        **settings,
        "machine": {**machine.describe(), "read_bytes_per_s": bandwidth},
        "loaded": {side.name: dataclasses.asdict(side.loaded) for side in sides},
        "results": results,
    }


def _cases(options: Decode | Prefill, sides: list[Any], ours: Any) -> list[dict[str, Any]]:
    from glm_jax.bench.measure import decode_case, prefill_case

    vocab, results = ours.cfg.vocab_size, []
    for batch in _numbers(options.batch, "--batch"):
        if isinstance(options, Prefill):
            lengths = _numbers(options.lengths, "--lengths")
            results += [prefill_case(sides, batch, length, vocab, options.repeats) for length in lengths]
            continue
        result = decode_case(sides, batch, options.context, options.tokens, vocab, options.repeats)
        if batch == 1:  # how many different experts a batch reads is not known without asking the router
            result["weights_read_bytes_per_s"] = ours.bytes_per_step() * result["glm_jax"]["tokens_per_s"]["median"]
        results.append(result)
        _progress(result)
    return results


def _progress(result: dict[str, Any]) -> None:
    print(f"batch {result['batch']}: {result['glm_jax']['tokens_per_s']['median']:,.2f} tokens/s", file=sys.stderr)


def _check(options: Decode | Prefill) -> None:
    counts = {"--repeats": options.repeats}
    _numbers(options.batch, "--batch")
    if isinstance(options, Decode):
        counts |= {"--context": options.context, "--tokens": options.tokens}
    else:
        _numbers(options.lengths, "--lengths")
    for name, count in counts.items():
        if count < 1:
            raise GlmError(f"{name} must be at least 1, not {count}")
    from glm_jax.quant import QuantRules

    QuantRules.named(options.quantize)
    if options.peer == "unquantised" and options.quantize is None:
        raise GlmError("--peer unquantised compares with --quantize, which is not given")
    for path in (options.json, options.markdown):
        if path is not None and not path.parent.is_dir():
            raise GlmError(f"cannot write {path}: {path.parent} is not a folder")


def _numbers(text: str, name: str) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise GlmError(f"{name} must be positive numbers with commas, as in 1,8, not {text!r}")
    return [int(part) for part in parts]


if __name__ == "__main__":
    finish(main)

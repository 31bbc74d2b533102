"""What the commands are asked to measure."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal

from glm_jax.errors import GlmError
from pallas_kernels.report_format import parse_sizes

Peer = Literal["transformers", "reference", "unquantized"]


@dataclasses.dataclass(kw_only=True)
class BenchOptions:
    """Options of both kinds."""

    model: str = "tiny"
    """Folder (Hugging Face or converted), hub id, "tiny", or "synthetic:flash?layers=2&seed=0"."""
    batch: str = "1"
    """Rows, one case each: "1,8"."""
    dtype: Literal["bfloat16", "float32"] | None = None
    """Of weights and activations, on all sides; bfloat16 on a GPU and float32 on a CPU unless given."""
    quantize: str | None = None
    """int4, int4-small, int4-experts or int8: this program's weights, quantized while loading (random codes where the
    model is synthetic)."""
    cache_dtype: Literal["bfloat16", "float32", "int8", "fp8"] | None = None
    """Of this program's latent cache; that of the activations unless given."""
    peer: tuple[Peer, ...] = ()
    """Also time these, in turn: transformers on the same weights; "reference" is this program without hand-written
    kernels, "unquantized" without --quantize."""
    repeats: int = 5
    """Times each side runs."""
    details: bool = True
    """On a GPU also count launches, and let JAX's profiler time each operation once."""
    memory_fraction: float = 0.95
    """Part of a GPU's memory that JAX may take."""
    json: Path | None = None
    """Write the report to this file, after every case anew."""
    markdown: Path | None = None
    """Write the tables to this file, likewise."""
    out: Path | None = None
    """Write both into this folder, named after device, kind, model and storage."""


@dataclasses.dataclass(kw_only=True)
class DecodeOptions(BenchOptions):
    """Greedy tokens after a context."""

    context: str = "128"
    """Tokens in the cache, one case each: "1k,8k,32k" (k is 1,024). The cache is filled with random rows, unless a peer
    has to read a prompt."""
    tokens: int = 32
    """Tokens to write."""


@dataclasses.dataclass(kw_only=True)
class PrefillOptions(BenchOptions):
    """Prompts into a new cache."""

    lengths: str = "128,512"
    """Prompt lengths, one case each: "1k,8k"."""


def parse_size_option(text: str, name: str) -> tuple[int, ...]:
    """Reads ``1,8k``: positive numbers with commas, k for 1,024 of them.

    Raises:
        GlmError: naming the option.
    """
    try:
        return parse_sizes(text)
    except ValueError as error:
        raise GlmError(f"{name} must be {error}") from None


def validate_bench_options(options: DecodeOptions | PrefillOptions) -> None:
    """Refuses what is impossible before anything is loaded.

    Raises:
        GlmError: saying what.
    """
    counts = {"--repeats": options.repeats}
    parse_size_option(options.batch, "--batch")
    if isinstance(options, DecodeOptions):
        parse_size_option(options.context, "--context")
        counts["--tokens"] = options.tokens
    else:
        parse_size_option(options.lengths, "--lengths")
    for name, count in counts.items():
        if count < 1:
            raise GlmError(f"{name} must be at least 1, not {count}")
    from glm_jax.weights import QuantRules

    QuantRules.resolve(options.quantize)
    if "unquantized" in options.peer and options.quantize is None:
        raise GlmError("--peer unquantized compares with --quantize, which is not given")
    for path in (options.json, options.markdown):
        if path is not None and not path.parent.is_dir():
            raise GlmError(f"cannot write {path}: {path.parent} is not a folder")
    if options.out is not None and not options.out.is_dir():
        raise GlmError(f"cannot write into {options.out}, which is not a folder")

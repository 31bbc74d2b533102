"""What a case is."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import random_arrays as noise
from pallas_kernels.quant_matmul import Made, Squares
from pallas_kernels.tiles import BITS, WIDTH, Kind, Tiles
from pallas_kernels.tuned import Problem

EPS = 1e-5
COUNTERS = 16_384
Arrays = dict[str, Any]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Widths:
    """Sizes of a model; those of GLM-4.7-Flash unless given."""

    hidden: int = 2048
    heads: int = 20
    nope: int = 192
    rope: int = 64
    value: int = 256
    latent: int = 512
    query_latent: int = 768
    experts: int = 64
    chosen: int = 4
    expert_width: int = 1536
    dense_width: int = 10_240
    vocab: int = 154_880


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Sweep:
    """Which cases.

    Attributes:
        widths: of the model.
        rows: tokens at once, one of each row of a batch.
        kinds: storages of the weights.
        contexts: cached rows that attention reads.
        chunks: tokens of a prompt at once.
        caches: storages of the cache.
        group: inputs that share a scale in 4 bits.
        dtype: of the activations.
    """

    widths: Widths = Widths()
    rows: tuple[int, ...] = (1, 8, 32, 64)
    kinds: tuple[Kind, ...] = ("int4", "int8", "bfloat16")
    contexts: tuple[int, ...] = (1024, 8192, 32_768)
    chunks: tuple[int, ...] = (512, 2048)
    caches: tuple[str, ...] = ("bfloat16", "int8", "fp8")
    group: int = 64
    dtype: str = "bfloat16"

    def weight(self, shape: tuple[int, ...], kind: Kind, seed: int, *, turned: bool = False) -> Tiles:
        """A random weight: 4 bits have groups, 8 bits a scale for each output.

        Those of a transposed one are factors of its inputs.
        """
        quantised, grouped = BITS[kind] < 16, kind == "int4"
        if turned:
            sets = shape[-2] // max(self.group, WIDTH) if grouped else 1
            return noise.tiles(shape, kind, seed=seed, factors=sets if quantised else 0)
        return noise.tiles(shape, kind, self.group if grouped else 0, seed=seed)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """An operation at one shape, over a stack of matrices or of layers of a cache.

    Attributes:
        op: its name among :data:`pallas_kernels.specs.OPS`.
        name: of the case.
        make: ``make(layers)``: the arrays that the operation reads, and those that it takes over and gives back. For
            use inside ``jit``.
        run: ``run(given, state, place, shape)``: the result and the state after it; no ``shape`` means the one that
            would be chosen.
        reference: ``reference(given, state, place)``: the same by the reference.
        view: ``view(given, result, state, place)``: arrays that must agree whatever the block sizes.
        moves: name of the activations among what is given.
        nbytes: ``nbytes(given, state)``: that one run must read and write.
        problem: ``problem(given)``: what its block sizes depend on; shapes are enough.
        rounds: whether something between is rounded to the dtype of the activations.
    """

    op: str
    name: str
    make: Callable[[int], tuple[Arrays, Arrays]]
    run: Callable[[Arrays, Arrays, jax.Array, Any], tuple[Any, Arrays]]
    reference: Callable[[Arrays, Arrays, jax.Array], tuple[Any, Arrays]]
    view: Callable[[Arrays, Any, Arrays, jax.Array], tuple[jax.Array, ...]]
    moves: str
    nbytes: Callable[[Arrays, Arrays], int]
    problem: Callable[[Arrays], Problem[Any]]
    rounds: bool = False

    @property
    def full_name(self) -> str:
        """Operation and case."""
        return f"{self.op}/{self.name}"

    def tolerance(self, dtype: Any) -> float:
        """How far a result from bfloat16 inputs may be from the reference, relative to its largest value.

        Products of bfloat16 numbers are exact in float32. Tensor cores add them sixteen inputs at a time and cut off
        what is below the last bit: over 10,240 inputs 640 times 2^-23 of the sum so far, all in one direction at the
        worst, 2^-13, and a sum may have been a few times larger than it ends. A result in bfloat16 may besides be
        rounded to either side, one unit in the last of its 8 bits. Where something between is rounded, each term is
        off by up to 2^-9 more, and a result in bfloat16 has a second rounding.
        """
        if self.rounds:
            return 2.0**-6
        return 2.0**-10 if jnp.dtype(dtype) == jnp.float32 else 2.0**-7


def difference(found: Sequence[Any], expected: Sequence[Any]) -> list[float]:
    """For each array the largest difference relative to the largest value; infinite where one is not finite."""
    return [
        _difference(np.asarray(a, np.float32), np.asarray(b, np.float32)) for a, b in zip(found, expected, strict=True)
    ]


def _difference(found: np.ndarray, expected: np.ndarray) -> float:
    if found.shape != expected.shape or not np.isfinite(found).all():
        return float("inf")
    return float(np.max(np.abs(found - expected), initial=0) / max(np.max(np.abs(expected), initial=0), 1e-30))


def one_layer(*weights: Tiles | None) -> int:
    """Bytes of one matrix of each stack."""
    return sum(weight.nbytes // weight.stack[0] for weight in weights if weight is not None)


def size_of(shape: tuple[int, ...], dtype: Any) -> int:
    """Bytes of an array."""
    return int(np.prod(shape)) * jnp.dtype(dtype).itemsize


def squares_of(rows: int, width: int, blocks: int = 4) -> Squares:
    """As of rows with values of size 1."""
    return Squares(jnp.full((rows, blocks), width / blocks, jnp.float32), 0, blocks)


def view_made(given: Arrays, made: Made, state: Arrays, place: jax.Array) -> tuple[jax.Array, ...]:
    """Of a product: the sums of squares are by blocks, and agree in all."""
    return made.out, made.scaled, jnp.sum(made.squares.parts, axis=1)

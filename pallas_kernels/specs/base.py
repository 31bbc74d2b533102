"""What a case is."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import random_arrays
from pallas_kernels.quant_matmul import LinearOutput, SumSq
from pallas_kernels.tiles import BITS_PER_QVALUE, TILE_WIDTH, Tiles, WeightKind
from pallas_kernels.tuned import TuningKey

EPS = 1e-5
NUM_COUNTERS = 16_384
Arrays = dict[str, Any]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ModelDims:
    """Sizes of a model; those of GLM-4.7-Flash unless given."""

    hidden: int = 2048
    heads: int = 20
    nope: int = 192
    rope: int = 64
    value: int = 256
    latent: int = 512
    query_latent: int = 768
    experts: int = 64
    experts_per_token: int = 4
    expert_width: int = 1536
    dense_width: int = 10_240
    vocab: int = 154_880


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Sweep:
    """Which cases.

    Attributes:
        dims: of the model.
        batch_sizes: tokens at once, one of each row of a batch.
        weight_kinds: storages of the weights.
        context_lengths: cached rows that attention reads.
        prefill_lengths: tokens of a prompt at once.
        cache_kinds: storages of the cache.
        group_size: inputs that share a scale in 4 bits.
        dtype: of the activations.
    """

    dims: ModelDims = ModelDims()
    batch_sizes: tuple[int, ...] = (1, 8, 32, 64)
    weight_kinds: tuple[WeightKind, ...] = ("int4", "int8", "bfloat16")
    context_lengths: tuple[int, ...] = (1024, 8192, 32_768)
    prefill_lengths: tuple[int, ...] = (512, 2048)
    cache_kinds: tuple[str, ...] = ("bfloat16", "int8", "fp8")
    group_size: int = 64
    dtype: str = "bfloat16"

    def random_weight(self, shape: tuple[int, ...], kind: WeightKind, seed: int, *, transposed: bool = False) -> Tiles:
        """A random weight: 4 bits have groups, 8 bits a scale for each output.

        Those of a transposed one are factors of its inputs.
        """
        quantized, grouped = BITS_PER_QVALUE[kind] < 16, kind == "int4"
        if transposed:
            sets = shape[-2] // max(self.group_size, TILE_WIDTH) if grouped else 1
            return random_arrays.random_tiles(shape, kind, seed=seed, num_input_scale_sets=sets if quantized else 0)
        return random_arrays.random_tiles(shape, kind, self.group_size if grouped else 0, seed=seed)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class KernelSpec:
    """An operation at one shape, over a stack of matrices or of layers of a cache.

    Attributes:
        op: its name among :data:`pallas_kernels.specs.SPEC_BUILDERS`.
        name: of the case.
        make_inputs: ``make_inputs(layers)``: the arrays that the operation reads, and those that it takes over and gives back. For
            use inside ``jit``.
        run: ``run(given, state, place, shape)``: the result and the state after it; no ``shape`` means the one that
            would be chosen.
        reference: ``reference(given, state, place)``: the same by the reference.
        comparable_outputs: ``comparable_outputs(given, result, state, place)``: arrays that must agree whatever the block sizes.
        activation_key: name of the activations among what is given.
        bytes_accessed: ``bytes_accessed(given, state)``: that one run must read and write.
        tuning_key: ``tuning_key(given)``: what its block sizes depend on; shapes are enough.
        rounds_intermediates: whether something between is rounded to the dtype of the activations.
    """

    op: str
    name: str
    make_inputs: Callable[[int], tuple[Arrays, Arrays]]
    run: Callable[[Arrays, Arrays, jax.Array, Any], tuple[Any, Arrays]]
    reference: Callable[[Arrays, Arrays, jax.Array], tuple[Any, Arrays]]
    comparable_outputs: Callable[[Arrays, Any, Arrays, jax.Array], tuple[jax.Array, ...]]
    activation_key: str
    bytes_accessed: Callable[[Arrays, Arrays], int]
    tuning_key: Callable[[Arrays], TuningKey[Any]]
    rounds_intermediates: bool = False

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
        if self.rounds_intermediates:
            return 2.0**-6
        return 2.0**-10 if jnp.dtype(dtype) == jnp.float32 else 2.0**-7


def relative_errors(actual: Sequence[Any], expected: Sequence[Any]) -> list[float]:
    """For each array the largest difference relative to the largest value; infinite where one is not finite."""
    return [
        _relative_error(np.asarray(a, np.float32), np.asarray(b, np.float32))
        for a, b in zip(actual, expected, strict=True)
    ]


def _relative_error(actual: np.ndarray, expected: np.ndarray) -> float:
    if actual.shape != expected.shape or not np.isfinite(actual).all():
        return float("inf")
    return float(np.max(np.abs(actual - expected), initial=0) / max(np.max(np.abs(expected), initial=0), 1e-30))


def layer_nbytes(*weights: Tiles | None) -> int:
    """Bytes of one matrix of each stack."""
    return sum(weight.nbytes // weight.stack[0] for weight in weights if weight is not None)


def array_nbytes(shape: tuple[int, ...], dtype: Any) -> int:
    """Bytes of an array."""
    return int(np.prod(shape)) * jnp.dtype(dtype).itemsize


def unit_sum_sq(rows: int, width: int, blocks: int = 4) -> SumSq:
    """As of rows with values of size 1."""
    return SumSq(jnp.full((rows, blocks), width / blocks, jnp.float32), 0, blocks)


def comparable_linear_output(
    given: Arrays, made: LinearOutput, state: Arrays, place: jax.Array
) -> tuple[jax.Array, ...]:
    """Of a product: the sums of squares are by blocks, and agree in all."""
    return made.out, made.scaled, jnp.sum(made.sum_sq.partials, axis=1)

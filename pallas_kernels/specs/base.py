"""The specification of a kernel at one shape of a real model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike

from pallas_kernels import random_arrays
from pallas_kernels._implementation import Implementation
from pallas_kernels.quant_matmul import LinearOutput, SumSq
from pallas_kernels.tiles import BITS_PER_QVALUE, TILE_WIDTH, Tiles, WeightKind
from pallas_kernels.tuned import TuningKey

EPS = 1e-5
NUM_COUNTERS = 16_384
Arrays: TypeAlias = dict[str, Any]  # pytrees of arrays, by name


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ModelDims:
    """Sizes of a model; by default those of GLM-4.7-Flash."""

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
    """The shapes and storages that specifications are built for.

    Attributes:
        dims: Sizes of the model.
        batch_sizes: Batch sizes of a decode step.
        weight_kinds: Storages of the weights.
        context_lengths: Cached rows that attention reads.
        prefill_lengths: Tokens of a chunk of a prompt.
        cache_kinds: Storages of the cache.
        group_size: Inputs that share a scale of a 4-bit weight.
        dtype: Dtype of the activations.
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
        """Returns a random weight: 4-bit weights have groups, 8-bit weights one scale for each output.

        The scales of a transposed weight are those of its inputs.
        """
        is_quantized, is_grouped = BITS_PER_QVALUE[kind] < 16, kind == "int4"
        if transposed:
            sets = shape[-2] // max(self.group_size, TILE_WIDTH) if is_grouped else 1
            return random_arrays.random_tiles(shape, kind, seed=seed, num_input_scale_sets=sets if is_quantized else 0)
        return random_arrays.random_tiles(shape, kind, self.group_size if is_grouped else 0, seed=seed)


class RunSpec(Protocol):
    """Runs an operation once."""

    def __call__(
        self,
        inputs: Arrays,
        state: Arrays,
        layer_index: jax.Array,
        config: Any = None,
        implementation: Implementation | None = None,
    ) -> tuple[Any, Arrays]:
        """Returns the result and the new state.

        Args:
            inputs: Arrays that the operation reads.
            state: Arrays that it updates.
            layer_index: ``int32 [1]``, index of the layer.
            config: Block sizes; tuned or heuristic by default.
            implementation: Implementation of the operation.
        """
        ...


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class KernelSpec:
    """An operation at one shape, over a stack of matrices or of layers of a cache.

    Attributes:
        op: Name of the operation in :data:`pallas_kernels.specs.SPEC_BUILDERS`.
        name: Name of the shape.
        make_inputs: ``make_inputs(layers)`` returns the arrays that the operation reads and the state that it updates.
            It is meant for use inside ``jit``.
        run: Runs the operation once.
        comparable_outputs: ``comparable_outputs(inputs, result, state, layer_index)`` returns the arrays that must
            agree for all block sizes.
        activation_key: Name of the activations among the inputs.
        bytes_accessed: ``bytes_accessed(inputs, state)`` returns the bytes that one run must read and write.
        tuning_key: ``tuning_key(inputs)`` returns what the block sizes depend on; abstract arrays are enough.
        rounds_intermediates: Whether an intermediate value is rounded to the dtype of the activations.
    """

    op: str
    name: str
    make_inputs: Callable[[int], tuple[Arrays, Arrays]]
    run: RunSpec
    comparable_outputs: Callable[[Arrays, Any, Arrays, jax.Array], tuple[jax.Array, ...]]
    activation_key: str
    bytes_accessed: Callable[[Arrays, Arrays], int]
    tuning_key: Callable[[Arrays], TuningKey[Any]]
    rounds_intermediates: bool = False

    @property
    def full_name(self) -> str:
        """Operation and shape."""
        return f"{self.op}/{self.name}"

    def reference(self, inputs: Arrays, state: Arrays, layer_index: jax.Array) -> tuple[Any, Arrays]:
        """Returns the result and the new state of the reference."""
        return self.run(inputs, state, layer_index, None, "reference")

    def tolerance(self, dtype: DTypeLike) -> float:
        """Returns the allowed error of a result from bfloat16 inputs, relative to the largest value of the reference.

        Products of bfloat16 numbers are exact in float32. Tensor cores add them sixteen inputs at a time and truncate
        below the last bit: over 10,240 inputs this is at most 640 times 2^-23 of the sum so far, or 2^-13 if all
        truncations have one direction, and an intermediate sum can be a few times larger than the final one. A bfloat16
        result can also be rounded to either side, one unit in the last of its 8 bits. Where an intermediate value is
        rounded, each term has up to 2^-9 more error, and a bfloat16 result has a second rounding.
        """
        if self.rounds_intermediates:
            return 2.0**-6
        return 2.0**-10 if jnp.dtype(dtype) == jnp.float32 else 2.0**-7


def relative_errors(actual: Sequence[ArrayLike], expected: Sequence[ArrayLike]) -> list[float]:
    """Returns each array's largest error relative to its largest value; infinite if a value is not finite."""
    return [
        _relative_error(np.asarray(a, np.float32), np.asarray(b, np.float32))
        for a, b in zip(actual, expected, strict=True)
    ]


def _relative_error(actual: np.ndarray, expected: np.ndarray) -> float:
    if actual.shape != expected.shape or not np.isfinite(actual).all():
        return float("inf")
    return float(np.max(np.abs(actual - expected), initial=0) / max(np.max(np.abs(expected), initial=0), 1e-30))


def layer_nbytes(*weights: Tiles | None) -> int:
    """Returns the bytes of one layer of each stack."""
    return sum(weight.nbytes // weight.stack[0] for weight in weights if weight is not None)


def array_nbytes(shape: tuple[int, ...], dtype: DTypeLike) -> int:
    """Returns the bytes of an array."""
    return int(np.prod(shape)) * jnp.dtype(dtype).itemsize


def unit_sum_sq(rows: int, width: int, blocks: int = 4) -> SumSq:
    """Returns the sums of squares of rows with values of size 1."""
    return SumSq(jnp.full((rows, blocks), width / blocks, jnp.float32), 0, blocks)


def comparable_linear_output(
    inputs: Arrays, result: LinearOutput, state: Arrays, layer_index: jax.Array
) -> tuple[jax.Array, ...]:
    """Returns the arrays of a product; its sums of squares are added up, because their blocks differ."""
    return result.out, result.scaled, jnp.sum(result.sum_sq.partials, axis=1)

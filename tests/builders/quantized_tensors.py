"""Random quantized tensors of every kind, and their values element by element."""

import numpy as np

from glm_jax.weights import QuantizedTensor, QuantSpec

QUANT_SPECS = (
    QuantSpec(kind="int4", block=(1, 4)),
    QuantSpec(kind="int4", block=(1, 3), scale="float32"),
    QuantSpec(kind="int4", block=(1, 0), scale="float16"),
    QuantSpec(kind="int4", block=(3, 1), zero="bias"),
    QuantSpec(kind="int4", block=(1, 4), zero="point", permuted=True, scale="float16"),
    QuantSpec(kind="int8", block=(1, 0)),
    QuantSpec(kind="int8", block=(0, 0), scale="float32"),
    QuantSpec(kind="int8", block=(4, 5), zero="point"),
    QuantSpec(kind="int8", block=(1, 6), zero="bias", scale="float32"),
    QuantSpec(kind="fp8", block=(4, 4), scale="float32", outer="multiply"),
    QuantSpec(kind="fp8", block=(1, 0), permuted=True),
    QuantSpec(kind="fp4", block=(1, 4), scale="e4m3", outer="divide"),
    QuantSpec(kind="fp4", block=(1, 4), scale="e8m0"),
)
E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def random_quantized_tensor(spec: QuantSpec, shape: tuple[int, ...], seed: int = 0) -> QuantizedTensor:
    """Returns a NumPy tensor whose codes cover their whole range."""
    rng = np.random.default_rng(seed)
    parts = {name: _random_component(rng, spec, name, *of) for name, of in spec.component_shapes(shape).items()}
    return QuantizedTensor(**parts, spec=spec)


def _random_component(rng, spec, name, shape, dtype):
    if name == "codes":
        low = -128 if dtype == np.int8 else 0
        codes = rng.integers(low, low + 256, shape).astype(dtype)
        # Two bit patterns of float8 are NaN, which no weight contains.
        return np.where(codes & 0x7F == 0x7F, codes - 1, codes).astype(dtype) if spec.kind == "fp8" else codes
    if name == "permutation":
        rows = [rng.permutation(shape[-1]) for _ in range(int(np.prod(shape[:-1])))]
        return np.stack(rows).reshape(shape).astype(dtype)
    if name == "scales" and spec.scale == "e8m0":
        return rng.integers(120, 134, shape).astype(dtype)
    if name == "scales" and spec.scale == "e4m3":
        return rng.integers(1, 127, shape).astype(dtype)
    if name == "zeros" and spec.zero == "point":
        return rng.integers(0, 17 if spec.kind == "int4" else 257, shape).astype(dtype)
    return np.asarray(0.1 + rng.random(shape), dtype)


def dequantized_values(tensor: QuantizedTensor) -> np.ndarray:
    """Dequantizes to float64, from the formulas of QuantSpec alone."""
    spec, out = tensor.spec, np.empty(tensor.shape)
    rows, columns = (block or size for block, size in zip(spec.block, tensor.shape[-2:], strict=True))
    for index in np.ndindex(*tensor.shape):
        *stack, row, column = index
        block = (*stack, row // rows, column // columns)
        u = _qvalue(tensor, (*stack, row), column)
        scale = _scale(tensor, tuple(stack), block)
        zero = 0.0 if tensor.zeros is None else float(tensor.zeros[block])
        value = u * scale + zero if spec.zero == "bias" else (u - zero) * scale
        place = column if tensor.permutation is None else int(tensor.permutation[(*stack, column)])
        out[(*stack, row, place)] = value
    return out


def _qvalue(tensor, row, column):
    spec = tensor.spec
    if spec.kind == "int8":
        return float(tensor.codes[(*row, column)])
    if spec.kind == "fp8":
        return _e4m3(int(tensor.codes[(*row, column)]))
    nibble = int(tensor.codes[(*row, column // 2)]) >> (4 * (column % 2)) & 15
    if spec.kind == "fp4":
        return (-1.0 if nibble & 8 else 1.0) * E2M1_VALUES[nibble & 7]
    return float(nibble - (8 if spec.zero == "none" else 0))


def _scale(tensor, stack, block):
    raw, spec = tensor.scales[block], tensor.spec
    scale = {"e4m3": _e4m3, "e8m0": lambda u: 2.0 ** (int(u) - 127)}.get(spec.scale, float)(raw)
    if spec.outer == "none":
        return scale
    outer = float(tensor.outer[stack])
    return scale * outer if spec.outer == "multiply" else scale / outer


def _e4m3(bits):
    sign, exponent, mantissa = -1.0 if bits & 0x80 else 1.0, (int(bits) >> 3) & 15, int(bits) & 7
    return sign * (mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7))

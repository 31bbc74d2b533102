"""compressed-tensors' ``pack-quantized``, as written: the tensors of a module, and the section of ``config.json``.

Codes are unsigned, offset by half their range, and fill 32-bit words along the inputs from the lowest bits on; zero
points likewise along the outputs. That is the order of nibbles and bytes in a
:class:`~glm_jax.weights.QuantizedTensor`, so no code is touched but for the sign of 8-bit ones.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from glm_jax.checkpoint.safetensors.writer import TensorOutput
from glm_jax.weights import QuantizedTensor, QuantSpec, pack_nibbles

Array = np.ndarray[Any, np.dtype[Any]]
PACK_QUANTIZED = "pack-quantized"
WEIGHT_SUFFIX = ".weight"
# Parameters that are no Linear modules in the programs that read such folders.
NON_LINEAR_PARAMS = (("embed",), ("mtp", "embed"), ("mtp", "eh_proj"))
_WORD = np.dtype("<i4")
_BIT_SCALES = ("e4m3", "e8m0")
_NUMBERED = re.compile(r"(?:model\.layers\.(?P<layer>\d+)\.)?(?P<inner>.*)")
_EXPERT = re.compile(r"(?<=experts\.)\d+(?=\.)")


def pack_unsupported_reason(spec: QuantSpec, shape: tuple[int, ...]) -> str | None:
    """Why a Linear module cannot hold a weight ``[*stack, O, I]`` that is stored so; None if it can, without loss."""
    rows, columns = spec.block
    if spec.kind not in ("int4", "int8") or spec.scale in _BIT_SCALES or spec.outer != "none":
        return "small floats"
    if spec.zero == "bias":
        return "integers with biases"
    if rows != 1:
        return "scales of several outputs"
    if columns and shape[-1] % columns:
        return "a group that is cut off"
    # With one scale per output the order of the columns does not matter, and is undone.
    return "activation order" if spec.permuted and columns else None


def has_zero_point_overflow(tensor: QuantizedTensor) -> bool:
    """Whether a zero point is one step beyond what as many bits as a code's can hold (GPTQ's 16 and 256)."""
    return tensor.zeros is not None and bool((tensor.zeros >= 1 << tensor.spec.bits).any())


def pack_module(
    module: str, spec: QuantSpec, shape: tuple[int, ...], load: Callable[[], QuantizedTensor]
) -> list[TensorOutput]:
    """The tensors of one module.

    Args:
        module: its name, without ``.weight``.
        spec: without an :func:`pack_unsupported_reason`.
        shape: ``(O, I)`` of its matrix.
        load: gives the matrix, once for each tensor that is written.
    """
    outputs, inputs = shape
    groups = spec.component_shapes(shape)["scales"][0][-1]
    words = functools.partial(_word_count, bits=spec.bits)

    def output(part: str, size: tuple[int, ...], dtype: Any, make: Callable[[], Array]) -> TensorOutput:
        return TensorOutput(f"{module}.{part}", size, np.dtype(dtype), lambda: iter((make(),)))

    found = [
        output("weight_packed", (outputs, words(inputs)), np.int32, lambda: _packed_codes(load())),
        output("weight_scale", (outputs, groups), spec.scale_dtype, lambda: np.asarray(load().scales)),
        output("weight_shape", (2,), np.int64, lambda: np.array(shape, np.int64)),
    ]
    if spec.zero == "point":
        size = (words(outputs), groups)
        found.append(output("weight_zero_point", size, np.int32, lambda: _packed_zeros(load())))
    return found


def _word_count(values: int, bits: int) -> int:
    return -(-values * bits // 32)


def _packed_codes(tensor: QuantizedTensor) -> Array:
    codes = np.asarray(tensor.codes)
    return _pad_to_words(codes.view(np.uint8) ^ np.uint8(0x80) if codes.dtype == np.int8 else codes)


def _packed_zeros(tensor: QuantizedTensor) -> Array:
    zeros = np.asarray(tensor.zeros).T.astype(np.uint8)
    if tensor.spec.kind == "int4":
        zeros = pack_nibbles(np.pad(zeros, ((0, 0), (0, zeros.shape[1] % 2))))
    return np.ascontiguousarray(_pad_to_words(zeros).T)


def _pad_to_words(data: Array) -> Array:
    """Bytes ``[..., n]`` as words ``[..., ceil(n / 4)]``."""
    missing = -data.shape[-1] % _WORD.itemsize
    if missing:
        data = np.pad(data, ((0, 0), (0, missing)))
    return np.ascontiguousarray(data).view(_WORD)


def build_quantization_config(packed: Mapping[str, QuantSpec], ignored: Iterable[str]) -> dict[str, Any]:
    """``quantization_config``: a group of modules for each way they are stored.

    Args:
        packed: how each packed module is stored, by name.
        ignored: names of Linear modules that are not quantized.
    """
    schemes: dict[tuple[int, bool, int], list[str]] = {}
    for module, spec in packed.items():
        schemes.setdefault((spec.bits, spec.zero == "none", spec.block[1]), []).append(module)
    # transformers takes the first group that names experts for all routed ones.
    ordered = sorted(schemes.items(), key=lambda item: not any(_EXPERT.search(module) for module in item[1]))
    groups = {f"group_{i}": _config_group(scheme, modules) for i, (scheme, modules) in enumerate(ordered)}
    return {
        "quant_method": "compressed-tensors",
        "format": PACK_QUANTIZED,
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": list(_target_patterns(ignored)),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


def _config_group(scheme: tuple[int, bool, int], modules: Iterable[str]) -> dict[str, Any]:
    bits, symmetric, group = scheme
    weights = {
        "num_bits": bits,
        "type": "int",
        "symmetric": symmetric,
        "strategy": "group" if group else "channel",
        "group_size": group or None,
        "dynamic": False,
        "observer": "minmax",
    }
    unused = {"input_activations": None, "output_activations": None}
    return {"targets": list(_target_patterns(modules)), "weights": weights, **unused, "format": PACK_QUANTIZED}


def _target_patterns(modules: Iterable[str]) -> Iterator[str]:
    """Patterns that match these modules and no others: one for each kind of module and set of layers."""
    layers: dict[str, dict[int, None]] = {}
    for module in modules:
        match = _NUMBERED.fullmatch(module)
        assert match is not None  # the second part takes anything
        if match["layer"] is None:
            yield module
        else:
            kind = _EXPERT.sub("#", match["inner"])
            layers.setdefault(kind, {})[int(match["layer"])] = None
    kinds: dict[tuple[int, ...], list[str]] = {}
    for kind, numbers in layers.items():
        kinds.setdefault(tuple(numbers), []).append(kind)
    for numbers, names in kinds.items():
        either = "|".join(map(str, numbers))
        for stem, ends in _group_by_stem(names).items():
            yield rf"re:.*\blayers\.(?:{either})\.{stem}(?:{'|'.join(ends)})$"


def _group_by_stem(names: Iterable[str]) -> dict[str, list[str]]:
    stems: dict[str, list[str]] = {}
    for name in names:
        stem, _, end = name.rpartition(".")
        # Not "experts" in so many words, by which transformers knows the routed ones.
        pattern = re.escape(stem).replace("shared_experts", "shared_expert[s]").replace(r"\#", r"\d+")
        # vLLM calls shared_head.head just head.
        pattern = rf"(?:{pattern}\.)?" if stem == "shared_head" else rf"{pattern}\." if stem else ""
        stems.setdefault(pattern, []).append(end)
    return stems

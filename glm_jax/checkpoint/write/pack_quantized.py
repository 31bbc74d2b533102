"""Writes compressed-tensors' ``pack-quantized``: the tensors of a module, and the section of ``config.json``.

Quantized values are unsigned, offset by half their range, and fill 32-bit words along the inputs, lowest bits first.
Zero points fill words along the outputs in the same way. Nibbles and bytes of a
:class:`~glm_jax.weights.QuantizedTensor` already have this order, so only the sign of 8-bit values changes.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from glm_jax.checkpoint.formats.bit_packing import packed_word_count
from glm_jax.checkpoint.safetensors.writer import TensorOutput
from glm_jax.weights import QuantizedTensor, QuantSpec, pack_nibbles

Array = np.ndarray[Any, np.dtype[Any]]
PACK_QUANTIZED = "pack-quantized"
WEIGHT_SUFFIX = ".weight"
# Parameters that are not Linear modules in the programs that read these folders.
NON_LINEAR_PARAMS = (("embed",), ("mtp", "embed"), ("mtp", "eh_proj"))
_WORD = np.dtype("<i4")
_BIT_SCALES = ("e4m3", "e8m0")
_NUMBERED = re.compile(r"(?:model\.layers\.(?P<layer>\d+)\.)?(?P<inner>.*)")
_EXPERT = re.compile(r"(?<=experts\.)\d+(?=\.)")


def pack_unsupported_reason(spec: QuantSpec, shape: tuple[int, ...]) -> str | None:
    """Returns why a Linear module cannot hold a weight ``[*stack, O, I]`` without loss; ``None`` if it can."""
    rows, columns = spec.block
    if spec.kind not in ("int4", "int8") or spec.scale in _BIT_SCALES or spec.outer != "none":
        return "small floats"
    if spec.zero == "bias":
        return "integers with biases"
    if rows != 1:
        return "scales of several outputs"
    if columns and shape[-1] % columns:
        return "a group that is cut off"
    # With one scale per output, the order of the columns does not matter, so the permutation is undone.
    return "activation order" if spec.permuted and columns else None


def has_zero_point_overflow(tensor: QuantizedTensor) -> bool:
    """Returns whether a zero point exceeds the range of the quantized values by one (16 or 256 in GPTQ)."""
    return tensor.zeros is not None and bool((tensor.zeros >= 1 << tensor.spec.bits).any())


def pack_module(
    module: str, spec: QuantSpec, shape: tuple[int, ...], load: Callable[[], QuantizedTensor]
) -> list[TensorOutput]:
    """Returns the output tensors of one module.

    Args:
        module: Name of the module, without ``.weight``.
        spec: Storage for which :func:`pack_unsupported_reason` is ``None``.
        shape: Shape ``(O, I)`` of the matrix.
        load: Loads the matrix; called once for each tensor that is written.
    """
    outputs, inputs = shape
    groups = spec.component_shapes(shape)["scales"][0][-1]
    words = functools.partial(packed_word_count, bits=spec.bits)

    def output(name: str, size: tuple[int, ...], dtype: DTypeLike, build: Callable[[], Array]) -> TensorOutput:
        return TensorOutput(f"{module}.{name}", size, np.dtype(dtype), lambda: iter((build(),)))

    tensors = [
        output("weight_packed", (outputs, words(inputs)), np.int32, lambda: _packed_codes(load())),
        output("weight_scale", (outputs, groups), spec.scale_dtype, lambda: np.asarray(load().scales)),
        output("weight_shape", (2,), np.int64, lambda: np.array(shape, np.int64)),
    ]
    if spec.zero == "point":
        size = (words(outputs), groups)
        tensors.append(output("weight_zero_point", size, np.int32, lambda: _packed_zeros(load())))
    return tensors


def _packed_codes(tensor: QuantizedTensor) -> Array:
    codes = np.asarray(tensor.codes)
    return _pad_to_words(codes.view(np.uint8) ^ np.uint8(0x80) if codes.dtype == np.int8 else codes)


def _packed_zeros(tensor: QuantizedTensor) -> Array:
    zeros = np.asarray(tensor.zeros).T.astype(np.uint8)
    if tensor.spec.kind == "int4":
        zeros = pack_nibbles(np.pad(zeros, ((0, 0), (0, zeros.shape[1] % 2))))
    return np.ascontiguousarray(_pad_to_words(zeros).T)


def _pad_to_words(data: Array) -> Array:
    """Views bytes ``uint8 [..., n]`` as words ``int32 [..., ceil(n / 4)]``; pads with zeros."""
    missing = -data.shape[-1] % _WORD.itemsize
    if missing:
        data = np.pad(data, ((0, 0), (0, missing)))
    return np.ascontiguousarray(data).view(_WORD)


def build_quantization_config(packed: Mapping[str, QuantSpec], ignored: Iterable[str]) -> dict[str, Any]:
    """Builds the section ``quantization_config`` of ``config.json``, with one group for each scheme.

    Args:
        packed: Storage of each packed module, by name.
        ignored: Names of Linear modules that are not quantized.
    """
    schemes: dict[tuple[int, bool, int], list[str]] = {}
    for module, spec in packed.items():
        schemes.setdefault((spec.bits, spec.zero == "none", spec.block[1]), []).append(module)
    # transformers applies the first group that names an expert to all routed experts.
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
    """Yields patterns that match exactly these modules: one for each kind of module and set of layers."""
    layers: dict[str, dict[int, None]] = {}
    for module in modules:
        match = _NUMBERED.fullmatch(module)
        assert match is not None  # the second group matches any text
        if match["layer"] is None:
            yield module
        else:
            kind = _EXPERT.sub("#", match["inner"])
            layers.setdefault(kind, {})[int(match["layer"])] = None
    kinds: dict[tuple[int, ...], list[str]] = {}
    for kind, numbers in layers.items():
        kinds.setdefault(tuple(numbers), []).append(kind)
    for numbers, names in kinds.items():
        layer_pattern = "|".join(map(str, numbers))
        for stem, ends in _group_by_stem(names).items():
            yield rf"re:.*\blayers\.(?:{layer_pattern})\.{stem}(?:{'|'.join(ends)})$"


def _group_by_stem(names: Iterable[str]) -> dict[str, list[str]]:
    """Groups names such as ``mlp.gate_proj`` by a pattern for all but their last component."""
    stems: dict[str, list[str]] = {}
    for name in names:
        stem, _, end = name.rpartition(".")
        # The pattern must not contain "experts" literally: transformers would take it for the routed experts.
        pattern = re.escape(stem).replace("shared_experts", "shared_expert[s]").replace(r"\#", r"\d+")
        # vLLM names shared_head.head just head.
        pattern = rf"(?:{pattern}\.)?" if stem == "shared_head" else rf"{pattern}\." if stem else ""
        stems.setdefault(pattern, []).append(end)
    return stems

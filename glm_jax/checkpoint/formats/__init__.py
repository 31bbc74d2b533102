"""Readers of quantized checkpoints: :func:`read_stored_weights` finds every weight by its logical name.

A module's format is detected from its tensors, never from the configuration's lists of modules, because those are often
wrong about modules that were left unquantized. ``awq.py``, ``gptq.py``, ``compressed_tensors.py``, ``fp8.py``,
``fp4.py`` and ``mlx.py`` each read one family of formats, ``gguf/`` reads GGUF files, and ``bit_packing.py`` unpacks
the integers of all of them.

Opening a checkpoint reads headers only, plus ``weight_shape`` and the group index if nothing else tells the shape or
the order of the columns. Values are read and checked when a weight is loaded.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from glm_jax.checkpoint.formats import awq, gptq
from glm_jax.checkpoint.formats.base import QuantizedModule as QuantizedModule
from glm_jax.checkpoint.formats.base import StoredWeight as StoredWeight
from glm_jax.checkpoint.formats.base import TensorReader, read_plain
from glm_jax.checkpoint.formats.compressed_tensors import read_pack_quantized
from glm_jax.checkpoint.formats.fp4 import read_fp4
from glm_jax.checkpoint.formats.fp8 import read_fp8_or_int8
from glm_jax.checkpoint.formats.mlx import read_mlx
from glm_jax.checkpoint.formats.quantization_config import DeclaredScheme, QuantizationConfig
from glm_jax.checkpoint.formats.unsupported import reject_unsupported_formats as reject_unsupported_formats
from glm_jax.checkpoint.messages import printable
from glm_jax.checkpoint.safetensors.header import SAFETENSORS_DTYPE_NAMES
from glm_jax.errors import CheckpointError

# Scales of activations and of the cache. They are ignored, because products here take unquantized activations.
_ACTIVATION_SUFFIXES = frozenset(
    [
        f"{quantity}_{suffix}"
        for quantity in ("input", "output", "q", "k", "v")
        for suffix in ("scale", "global_scale", "zero_point")
    ]
    + ["kv_scale", "prob_scale", "activation_scale"]
)
# Suffixes of a quantized module's tensors. A tensor called "weight" belongs to it too if one of these is beside it.
_QUANTIZED_SUFFIXES = frozenset(
    "weight_packed weight_shape weight_scale weight_zero_point weight_g_idx weight_global_scale weight_scale_inv "
    "weight_scale_2 qweight qzeros scales g_idx biases".split()
)


def read_stored_weights(reader: TensorReader, config: Mapping[str, Any], folder: Path) -> dict[str, StoredWeight]:
    """Finds every weight of a checkpoint.

    Args:
        reader: Reader of the checkpoint's tensors.
        config: Content of ``config.json``.
        folder: Folder of the checkpoint, which may hold ModelOpt's configuration file.

    Returns:
        The weights by logical name, such as ``model.layers.1.self_attn.o_proj.weight``.

    Raises:
        CheckpointError: For formats that are not supported, tensors that are missing, unexpected or of the wrong shape
            or dtype, and a configuration that contradicts the tensors.
    """
    quant_config = QuantizationConfig.from_config(config, folder)
    reject_unsupported_formats(quant_config, reader)
    weights: dict[str, StoredWeight] = {}
    modules: dict[str, dict[str, str]] = {}
    for name in reader:
        prefix, _, suffix = name.rpartition(".")
        if suffix in _ACTIVATION_SUFFIXES:
            continue
        if suffix in _QUANTIZED_SUFFIXES:
            modules.setdefault(prefix, {})[suffix] = name
        else:
            weights[name] = read_plain(name, reader)
    for prefix, names_by_suffix in modules.items():
        plain = weights.pop(f"{prefix}.weight", None)
        if plain is not None:
            names_by_suffix = {"weight": plain.name, **names_by_suffix}
        weights[f"{prefix}.weight"] = _read_module(QuantizedModule(prefix, reader, names_by_suffix), quant_config)
    return weights


def _read_module(module: QuantizedModule, quant_config: QuantizationConfig) -> StoredWeight:
    """Dispatches a quantized module to the reader of the format that its tensors show."""
    scheme = quant_config.scheme_for(module.name)
    for suffix, name in module.names_by_suffix.items():
        if 0 in module.reader.tensor_info(name).shape:
            raise module.error(f"{suffix} is empty")
    if "weight_packed" in module:
        if _dtype_name(module, "weight_packed") == "U8":
            _require_only(module, "weight_packed weight_scale weight_global_scale weight_shape".split())
            return read_fp4(module, scheme)
        _require_only(module, "weight_packed weight_scale weight_zero_point weight_g_idx weight_shape".split())
        return read_pack_quantized(module, scheme)
    if "qweight" in module:
        return _read_qweight(module, quant_config, scheme)
    if "weight" in module:
        return _read_weight(module, quant_config, scheme)
    raise _unexpected_tensors_error(module, module.names_by_suffix)


def _dtype_name(module: QuantizedModule, suffix: str) -> str:
    return SAFETENSORS_DTYPE_NAMES[module.reader.tensor_info(module.names_by_suffix[suffix]).dtype]


def _read_weight(module: QuantizedModule, quant_config: QuantizationConfig, scheme: DeclaredScheme) -> StoredWeight:
    """Reads a module of ``weight`` and scales: MLX, FP4, FP8 or int8."""
    dtype = _dtype_name(module, "weight")
    if dtype == "U32":
        _require_only(module, ["weight", "scales", "biases"])
        if quant_config.quant_method not in (None, "mlx"):
            raise module.error(f"the configuration describes {quant_config.quant_method}, but the tensors are MLX's")
        return read_mlx(module, scheme)
    if dtype == "U8":
        _require_only(module, ["weight", "weight_scale", "weight_scale_2"])
        return read_fp4(module, scheme)
    if not {"weight_scale", "weight_scale_inv"} & set(module.names_by_suffix):
        raise _unexpected_tensors_error(module, [suffix for suffix in module.names_by_suffix if suffix != "weight"])
    inverse = "weight_scale_inv" in module
    _require_only(
        module, ["weight", "weight_scale_inv"] if inverse else ["weight", "weight_scale", "weight_zero_point"]
    )
    return read_fp8_or_int8(module, scheme)


def _read_qweight(module: QuantizedModule, quant_config: QuantizationConfig, scheme: DeclaredScheme) -> StoredWeight:
    """Reads GPTQ or AWQ tensors; GPTQ packs ``qweight`` along the inputs, AWQ along the outputs."""
    _require_only(module, ["qweight", "qzeros", "scales", "g_idx"])
    columns = module.require("qweight", ("I32",), 2).shape[1]
    if columns == module.require("scales", ("F16", "BF16", "F32"), 2).shape[1]:
        if problem := gptq.unsupported_gptq_layout(quant_config):
            raise module.error(problem)
        planar = quant_config.quant_method == "gptq"
        return gptq.read_gptq(module, scheme, gptq.zero_point_encoding(quant_config), planar=planar)
    if problem := awq.unsupported_awq_layout(quant_config):
        raise module.error(problem)
    if "g_idx" in module:
        raise _unexpected_tensors_error(module, ["g_idx"])
    return awq.read_awq(module, scheme)


def _require_only(module: QuantizedModule, known: Sequence[str]) -> None:
    if unexpected := [suffix for suffix in module.names_by_suffix if suffix not in known]:
        raise _unexpected_tensors_error(module, unexpected)


def _unexpected_tensors_error(module: QuantizedModule, unexpected: Iterable[str]) -> CheckpointError:
    others = [suffix for suffix in module.names_by_suffix if suffix not in unexpected]
    context = f" beside {', '.join(sorted(others))}" if others else " without the weight that it belongs to"
    names = printable(", ".join(sorted(unexpected)))
    return module.error(f"{names}{context}: the checkpoint is damaged or in a format that is not read")

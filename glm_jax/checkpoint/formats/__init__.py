"""Readers of quantized checkpoints: every weight by its logical name, whatever tensors it is stored in.

Which format a module is in is seen from the tensors that are there, never from lists of modules in a configuration:
those are often wrong about what was left alone. Opening reads headers (and, where nothing else tells the shape or the
order of columns, ``weight_shape`` and the group index); values are read and checked when a weight is loaded.
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

# Scales of what goes into and out of a product, or into the cache: they quantize activations, which are not quantized.
_ACTIVATION_SUFFIXES = frozenset(
    [f"{which}_{what}" for which in ("input", "output") for what in ("scale", "global_scale", "zero_point")]
    + [f"{which}_{what}" for which in "qkv" for what in ("scale", "global_scale", "zero_point")]
    + ["kv_scale", "prob_scale", "activation_scale"]
)
# Parts of a quantized weight; "weight" is one where another of them is beside it.
_QUANTIZED_SUFFIXES = frozenset(
    "weight_packed weight_shape weight_scale weight_zero_point weight_g_idx weight_global_scale weight_scale_inv "
    "weight_scale_2 qweight qzeros scales g_idx biases".split()
)


def read_formats(reader: TensorReader, config: Mapping[str, Any], folder: Path) -> dict[str, StoredWeight]:
    """Every weight of a checkpoint by logical name, such as ``model.layers.1.self_attn.o_proj.weight``.

    Args:
        reader: of the checkpoint's tensors.
        config: its ``config.json``.
        folder: where it lies, for ModelOpt's file beside it.

    Raises:
        CheckpointError: for formats that nothing here reads, tensors that are missing, left over or of the wrong shape
            or dtype, and a configuration that contradicts the tensors.
    """
    description = QuantizationConfig.from_config(config, folder)
    reject_unsupported_formats(description, reader)
    found: dict[str, StoredWeight] = {}
    modules: dict[str, dict[str, str]] = {}
    for name in reader:
        prefix, _, part = name.rpartition(".")
        if part in _ACTIVATION_SUFFIXES:
            continue
        if part in _QUANTIZED_SUFFIXES:
            modules.setdefault(prefix, {})[part] = name
        else:
            found[name] = read_plain(name, reader)
    for prefix, parts in modules.items():
        beside = found.pop(f"{prefix}.weight", None)
        module = QuantizedModule(prefix, reader, parts if beside is None else {"weight": beside.name, **parts})
        found[f"{prefix}.weight"] = _read_module(module, description)
    return found


def _read_module(module: QuantizedModule, description: QuantizationConfig) -> StoredWeight:
    """A quantized module, in the format that its tensors show."""
    declared = description.scheme_for(module.name)
    for part, name in module.names_by_suffix.items():
        if 0 in module.reader.tensor_info(name).shape:
            raise module.error(f"{part} is empty")
    if "weight_packed" in module:
        kind = SAFETENSORS_DTYPE_NAMES[module.reader.tensor_info(module.names_by_suffix["weight_packed"]).dtype]
        if kind == "U8":
            _require_only(module, "weight_packed weight_scale weight_global_scale weight_shape".split())
            return read_fp4(module, declared)
        _require_only(module, "weight_packed weight_scale weight_zero_point weight_g_idx weight_shape".split())
        return read_pack_quantized(module, declared)
    if "qweight" in module:
        return _read_qweight(module, description, declared)
    if "weight" in module:
        return _read_weight(module, description, declared)
    raise _unexpected_tensors_error(module, module.names_by_suffix)


def _read_weight(module: QuantizedModule, description: QuantizationConfig, declared: DeclaredScheme) -> StoredWeight:
    kind = SAFETENSORS_DTYPE_NAMES[module.reader.tensor_info(module.names_by_suffix["weight"]).dtype]
    if kind == "U32":
        _require_only(module, ["weight", "scales", "biases"])
        if description.quant_method not in (None, "mlx"):
            raise module.error(f"the configuration describes {description.quant_method}, but the tensors are MLX's")
        return read_mlx(module, declared)
    if kind == "U8":
        _require_only(module, ["weight", "weight_scale", "weight_scale_2"])
        return read_fp4(module, declared)
    if not {"weight_scale", "weight_scale_inv"} & set(module.names_by_suffix):
        raise _unexpected_tensors_error(module, [part for part in module.names_by_suffix if part != "weight"])
    inverse = "weight_scale_inv" in module
    _require_only(
        module, ["weight", "weight_scale_inv"] if inverse else ["weight", "weight_scale", "weight_zero_point"]
    )
    return read_fp8_or_int8(module, declared)


def _read_qweight(module: QuantizedModule, description: QuantizationConfig, declared: DeclaredScheme) -> StoredWeight:
    """GPTQ or AWQ: which of them, the axis along which ``qweight`` is packed tells."""
    _require_only(module, ["qweight", "qzeros", "scales", "g_idx"])
    columns = module.require("qweight", ("I32",), 2).shape[1]
    if columns == module.require("scales", ("F16", "BF16", "F32"), 2).shape[1]:
        if problem := gptq.unsupported_gptq_layout(description):
            raise module.error(problem)
        planar = description.quant_method == "gptq"
        return gptq.read_gptq(module, declared, gptq.zero_point_encoding(description), planar=planar)
    if problem := awq.unsupported_awq_layout(description):
        raise module.error(problem)
    if "g_idx" in module:
        raise _unexpected_tensors_error(module, ["g_idx"])
    return awq.read_awq(module, declared)


def _require_only(module: QuantizedModule, known: Sequence[str]) -> None:
    if left := [part for part in module.names_by_suffix if part not in known]:
        raise _unexpected_tensors_error(module, left)


def _unexpected_tensors_error(module: QuantizedModule, parts: Iterable[str]) -> CheckpointError:
    left = printable(", ".join(sorted(parts)))
    others = [part for part in module.names_by_suffix if part not in parts]
    beside = f" beside {', '.join(sorted(others))}" if others else " without the weight that it belongs to"
    return module.error(f"{left}{beside}: the checkpoint is damaged or in a format that is not read")

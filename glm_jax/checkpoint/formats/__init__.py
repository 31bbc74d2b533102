"""Readers of quantised checkpoints: every weight by its logical name, whatever tensors it is stored in.

Which format a module is in is seen from the tensors that are there, never from lists of modules in a configuration:
those are often wrong about what was left alone. Opening reads headers (and, where nothing else tells the shape or the
order of columns, ``weight_shape`` and the group index); values are read and checked when a weight is loaded.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from glm_jax.checkpoint.formats import awq, gptq
from glm_jax.checkpoint.formats.base import Module as Module
from glm_jax.checkpoint.formats.base import Stored as Stored
from glm_jax.checkpoint.formats.base import Tensors, plain
from glm_jax.checkpoint.formats.compressed_tensors import read_packed
from glm_jax.checkpoint.formats.fp4 import read_fp4
from glm_jax.checkpoint.formats.fp8 import read_scaled
from glm_jax.checkpoint.formats.mlx import read_mlx
from glm_jax.checkpoint.formats.quantization_config import Declared, Description
from glm_jax.checkpoint.formats.unsupported import refuse_unread as refuse_unread
from glm_jax.checkpoint.safetensors.header import NAMES, printable
from glm_jax.errors import CheckpointError

# Scales of what goes into and out of a product, or into the cache: they quantise activations, which are not quantised.
_ACTIVATIONS = frozenset(
    [f"{which}_{what}" for which in ("input", "output") for what in ("scale", "global_scale", "zero_point")]
    + [f"{which}_{what}" for which in "qkv" for what in ("scale", "global_scale", "zero_point")]
    + ["kv_scale", "prob_scale", "activation_scale"]
)
# Parts of a quantised weight; "weight" is one where another of them is beside it.
_PARTS = frozenset(
    "weight_packed weight_shape weight_scale weight_zero_point weight_g_idx weight_global_scale weight_scale_inv "
    "weight_scale_2 qweight qzeros scales g_idx biases".split()
)


def read_formats(reader: Tensors, config: Mapping[str, Any], folder: Path) -> dict[str, Stored]:
    """Every weight of a checkpoint by logical name, such as ``model.layers.1.self_attn.o_proj.weight``.

    Args:
        reader: of the checkpoint's tensors.
        config: its ``config.json``.
        folder: where it lies, for ModelOpt's file beside it.

    Raises:
        CheckpointError: for formats that nothing here reads, tensors that are missing, left over or of the wrong shape
            or dtype, and a configuration that contradicts the tensors.
    """
    description = Description.read(config, folder)
    refuse_unread(description, reader)
    found: dict[str, Stored] = {}
    modules: dict[str, dict[str, str]] = {}
    for name in reader:
        prefix, _, part = name.rpartition(".")
        if part in _ACTIVATIONS:
            continue
        if part in _PARTS:
            modules.setdefault(prefix, {})[part] = name
        else:
            found[name] = plain(name, reader)
    for prefix, parts in modules.items():
        beside = found.pop(f"{prefix}.weight", None)
        module = Module(prefix, reader, parts if beside is None else {"weight": beside.name, **parts})
        found[f"{prefix}.weight"] = _read(module, description)
    return found


def _read(module: Module, description: Description) -> Stored:
    """A quantised module, in the format that its tensors show."""
    declared = description.declared(module.name)
    for part, name in module.parts.items():
        if 0 in module.reader.entry(name).shape:
            raise module.error(f"{part} is empty")
    if "weight_packed" in module:
        kind = NAMES[module.reader.entry(module.parts["weight_packed"]).dtype]
        if kind == "U8":
            _only(module, "weight_packed weight_scale weight_global_scale weight_shape".split())
            return read_fp4(module, declared)
        _only(module, "weight_packed weight_scale weight_zero_point weight_g_idx weight_shape".split())
        return read_packed(module, declared)
    if "qweight" in module:
        return _read_words(module, description, declared)
    if "weight" in module:
        return _read_weight(module, description, declared)
    raise _leftover(module, module.parts)


def _read_weight(module: Module, description: Description, declared: Declared) -> Stored:
    kind = NAMES[module.reader.entry(module.parts["weight"]).dtype]
    if kind == "U32":
        _only(module, ["weight", "scales", "biases"])
        if description.method not in (None, "mlx"):
            raise module.error(f"the configuration describes {description.method}, but the tensors are MLX's")
        return read_mlx(module, declared)
    if kind == "U8":
        _only(module, ["weight", "weight_scale", "weight_scale_2"])
        return read_fp4(module, declared)
    if not {"weight_scale", "weight_scale_inv"} & set(module.parts):
        raise _leftover(module, [part for part in module.parts if part != "weight"])
    inverse = "weight_scale_inv" in module
    _only(module, ["weight", "weight_scale_inv"] if inverse else ["weight", "weight_scale", "weight_zero_point"])
    return read_scaled(module, declared)


def _read_words(module: Module, description: Description, declared: Declared) -> Stored:
    """GPTQ or AWQ: which of them, the axis along which ``qweight`` is packed tells."""
    _only(module, ["qweight", "qzeros", "scales", "g_idx"])
    columns = module.need("qweight", ("I32",), 2).shape[1]
    if columns == module.need("scales", ("F16", "BF16", "F32"), 2).shape[1]:
        if problem := gptq.layout_problem(description):
            raise module.error(problem)
        planar = description.method == "gptq"
        return gptq.read_gptq(module, declared, gptq.zeros_of(description), planar=planar)
    if problem := awq.layout_problem(description):
        raise module.error(problem)
    if "g_idx" in module:
        raise _leftover(module, ["g_idx"])
    return awq.read_awq(module, declared)


def _only(module: Module, known: Sequence[str]) -> None:
    if left := [part for part in module.parts if part not in known]:
        raise _leftover(module, left)


def _leftover(module: Module, parts: Iterable[str]) -> CheckpointError:
    left = printable(", ".join(sorted(parts)))
    others = [part for part in module.parts if part not in parts]
    beside = f" beside {', '.join(sorted(others))}" if others else " without the weight that it belongs to"
    return module.error(f"{left}{beside}: the checkpoint is damaged or in a format that is not read")

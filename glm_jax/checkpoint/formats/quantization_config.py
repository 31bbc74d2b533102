"""Parses a checkpoint's quantization configuration into one form, whichever program wrote it."""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from glm_jax.checkpoint.messages import printable
from glm_jax.errors import CheckpointError

# Keys of config.json that describe quantized weights: MLX's (which MLX also copies to the second key), that of most
# writers, and that of old versions of compressed-tensors.
QUANTIZATION_CONFIG_KEYS = ("quantization", "quantization_config", "compression_config")
MODELOPT_CONFIG_NAME = "hf_quant_config.json"
_STRATEGY_BLOCKS = {"channel": (1, 0), "tensor": (0, 0)}  # strategies of compressed-tensors that imply the block
_INTEGER_METHODS = ("gptq", "auto-round", "awq")
_UNQUANTIZED_BITS = 16
_BLOCK_TEXT = re.compile(r"\d{1,9}x\d{1,9}")  # a block such as 128x128, as older versions wrote it
_MAX_PATTERN_LENGTH = 1000


@dataclasses.dataclass(frozen=True, slots=True)
class DeclaredScheme:
    """Quantization of one module as the configuration declares it; None for what it leaves open.

    Attributes:
        bits: Bits of a quantized value.
        block: Number of outputs and of inputs that share a scale; 0 for all of them.
        symmetric: Whether all zero points are in the middle of the range.
        desc_act: Whether the columns may be in activation order.
        kind: Kind of the quantized values, "int" or "float".
        mode: MLX's name of the quantization, such as "affine".
    """

    bits: int | None = None
    block: tuple[int, int] | None = None
    symmetric: bool | None = None
    desc_act: bool | None = None
    kind: str | None = None
    mode: str | None = None

    @property
    def group_size(self) -> int | None:
        """Number of inputs that share a scale; 0 for all of them."""
        return None if self.block is None else self.block[1]


@dataclasses.dataclass(frozen=True, slots=True)
class SchemeOverride:
    """Settings that replace the general ones for some modules.

    Attributes:
        matches: Function whose result is true for the names of these modules.
        settings: Settings of these modules.
    """

    matches: Callable[[str], object]
    settings: Mapping[str, Any]


@dataclasses.dataclass(frozen=True, slots=True)
class QuantizationConfig:
    """The section of a configuration that describes quantized weights.

    Attributes:
        quant_method: Value of ``quant_method`` in lower case; "mlx" or "modelopt" for configurations of these two,
            which identify themselves in other ways; None if no section describes quantized weights.
        section: The section itself.
        overrides: Settings of single modules, in order of precedence.
    """

    quant_method: str | None
    section: Mapping[str, Any]
    overrides: tuple[SchemeOverride, ...] = ()

    @classmethod
    def from_config(cls, config: Mapping[str, Any], folder: Path) -> QuantizationConfig:
        """Parses ``config.json`` and, for ModelOpt, ``hf_quant_config.json`` in the same folder.

        Raises:
            CheckpointError: If a section is not an object, or ModelOpt's file is not valid JSON.
        """
        for key in QUANTIZATION_CONFIG_KEYS:
            section = config.get(key)
            if section is None:
                continue
            if not isinstance(section, Mapping):
                raise CheckpointError(f"{key} in config.json must be an object, not {printable(repr(section))}")
            method = section.get("quant_method")
            if method is None and {"bits", "group_size"} <= set(section):
                return cls("mlx", section)
            if method == "modelopt":
                return cls("modelopt", {**(_read_modelopt(folder) or {}), **section})
            return cls(_normalize_method(method), section, tuple(_overrides(section)))
        exported = _read_modelopt(folder)
        return cls(None, {}) if exported is None else cls("modelopt", exported)

    def scheme_for(self, module: str) -> DeclaredScheme:
        """Quantization that the configuration declares for a module.

        Raises:
            CheckpointError: If a setting of the module has no valid meaning.
        """
        if self.quant_method in _INTEGER_METHODS:
            override = (self.section.get("extra_config") or {}).get(module)
            if override is None:
                override = next((o.settings for o in self.overrides if o.matches(module)), {})
            return _integer_scheme({**self.section, **override} if isinstance(override, Mapping) else self.section)
        parse = {
            "compressed-tensors": _compressed_tensors_scheme,
            "fp8": _fp8_scheme,
            "modelopt": _modelopt_scheme,
            "mlx": _mlx_scheme,
        }.get(self.quant_method or "")
        return parse(self.section, module) if parse else DeclaredScheme()

    @property
    def packing_format(self) -> str:
        """AutoRound's ``packing_format`` in its canonical spelling."""
        value = str(self.section.get("packing_format") or "auto")
        canonical = {
            "auto": "auto_round:auto_gptq",
            "auto_round:gptq": "auto_round:auto_gptq",
            "auto_round:awq": "auto_round:auto_awq",
        }
        return canonical.get(value, value)


def _normalize_method(value: Any) -> str:
    name = str(value).lower().replace("_", "-")
    return {"autoround": "auto-round", "intel/auto-round": "auto-round"}.get(name, name)


def _read_modelopt(folder: Path) -> Mapping[str, Any] | None:
    try:
        exported = json.loads((folder / MODELOPT_CONFIG_NAME).read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{MODELOPT_CONFIG_NAME} is not valid JSON ({printable(str(error))})") from None
    section = exported.get("quantization") if isinstance(exported, dict) else None
    if not isinstance(section, dict):
        raise CheckpointError(f"{MODELOPT_CONFIG_NAME} has no object called quantization")
    return section


def _compressed_tensors_scheme(section: Mapping[str, Any], module: str) -> DeclaredScheme:
    config_groups = section.get("config_groups") or {}
    if not isinstance(config_groups, Mapping):
        raise CheckpointError("config_groups must be an object")
    groups = [group for group in config_groups.values() if isinstance(group, Mapping)]
    by_name = [group for group in groups if any(_target_matches(target, module) for target in _group_targets(group))]
    by_class = [group for group in groups if any(_is_class(target) for target in _group_targets(group))]
    weights = [group.get("weights") for group in by_name[:1] or by_class]
    if not weights or any(other != weights[0] for other in weights) or not isinstance(weights[0], Mapping):
        return DeclaredScheme()
    return _weights_scheme(weights[0])


def _group_targets(group: Mapping[str, Any]) -> list[str]:
    targets = group.get("targets") or []
    if not isinstance(targets, list):
        raise CheckpointError(f"targets in the quantization's configuration must be a list, not {targets!r}")
    return [str(target) for target in targets]


def _is_class(target: str) -> bool:
    return target[:1].isupper() and "." not in target


def _target_matches(target: str, module: str) -> bool:
    return bool(_compile_pattern(target[3:]).match(module)) if target.startswith("re:") else target == module


def _weights_scheme(weights: Mapping[str, Any]) -> DeclaredScheme:
    strategy, group_size = weights.get("strategy"), weights.get("group_size")
    block: tuple[int, int] | None = _STRATEGY_BLOCKS.get(str(strategy))
    if strategy == "block":
        sizes = weights.get("block_structure")
        if isinstance(sizes, str) and _BLOCK_TEXT.fullmatch(sizes):
            sizes = [*map(int, sizes.split("x"))]
        block = _check_pair(sizes)
    elif block is None:
        block = _group_block(group_size)
    return DeclaredScheme(
        bits=_check_int("num_bits", weights.get("num_bits")),
        block=block,
        symmetric=_check_bool("symmetric", weights.get("symmetric")),
        kind=str(weights.get("type", "int")),
    )


def _group_block(group_size: Any) -> tuple[int, int] | None:
    """Block of a group size, where -1 stands for all inputs; None if no group size is declared."""
    size = _check_int("group_size", group_size)
    return None if size is None else (1, max(size, 0))


def _integer_scheme(settings: Mapping[str, Any]) -> DeclaredScheme:
    bits = _check_int("bits", settings.get("bits", settings.get("w_bit")))
    if bits is None or bits >= _UNQUANTIZED_BITS:
        return DeclaredScheme()
    return DeclaredScheme(
        bits=bits,
        block=_group_block(settings.get("group_size", settings.get("q_group_size"))),
        symmetric=_check_bool("sym", settings.get("sym")),
        desc_act=_check_bool("desc_act", settings.get("desc_act")),
        kind="int",
    )


def _overrides(section: Mapping[str, Any]) -> Iterator[SchemeOverride]:
    """AutoRound's ``extra_config``, and GPTQModel's ``dynamic``, whose patterns may start with ``+:``."""
    extra, dynamic = (section.get(key) or {} for key in ("extra_config", "dynamic"))
    if not isinstance(extra, Mapping) or not isinstance(dynamic, Mapping):
        raise CheckpointError("extra_config and dynamic must be objects")
    for key, value in extra.items():
        if isinstance(value, Mapping):
            # AutoRound takes a key without pattern characters as a substring of module names.
            is_pattern = any(characters in key for characters in (".*", *"^$|()[]?+"))
            matches = _compile_pattern(key).search if is_pattern else functools.partial(_contains, key)
            yield SchemeOverride(matches, value)
    for key, value in dynamic.items():
        if isinstance(value, Mapping) and not key.startswith("-:"):
            yield SchemeOverride(_compile_pattern(key.removeprefix("+:")).match, value)


def _contains(part: str, name: str) -> bool:
    return part in name


def _fp8_scheme(section: Mapping[str, Any], module: str) -> DeclaredScheme:
    size = section.get("weight_block_size")
    return DeclaredScheme(bits=8, block=None if size is None else _check_pair(size), kind="float")


def _modelopt_scheme(section: Mapping[str, Any], module: str) -> DeclaredScheme:
    """ModelOpt's scheme: compressed-tensors' groups, one algorithm for all modules, or one algorithm per module."""
    if section.get("config_groups"):
        return _compressed_tensors_scheme(section, module)
    layers = section.get("quantized_layers")
    override = layers.get(module) if isinstance(layers, Mapping) else None
    settings = override if isinstance(override, Mapping) else section
    algorithm, group_size = str(settings.get("quant_algo")), _check_int("group_size", settings.get("group_size"))
    if "NVFP4" in algorithm:
        return DeclaredScheme(bits=4, block=(1, group_size or 16), kind="float")
    return DeclaredScheme(bits=8, kind="float") if algorithm.startswith(("FP8", "MXFP8")) else DeclaredScheme()


def _mlx_scheme(section: Mapping[str, Any], module: str) -> DeclaredScheme:
    override = section.get(module)
    settings = {**section, **override} if isinstance(override, Mapping) else section
    group_size = _check_int("group_size", settings.get("group_size"))
    return DeclaredScheme(
        bits=_check_int("bits", settings.get("bits")),
        block=None if group_size is None else (1, group_size),
        mode=str(settings.get("mode") or "affine"),
    )


def _check_int(name: str, value: Any) -> int | None:
    if value is not None and (type(value) is not int or not -1 <= value < 1 << 31):
        raise CheckpointError(f"{name} in the quantization's configuration must be a whole number, not {value!r}")
    return value


def _check_bool(name: str, value: Any) -> bool | None:
    if value is not None and type(value) is not bool:
        raise CheckpointError(f"{name} in the quantization's configuration must be true or false, not {value!r}")
    return value


def _check_pair(value: Any) -> tuple[int, int]:
    if not isinstance(value, list | tuple) or len(value) != 2 or not all(type(n) is int and n > 0 for n in value):
        raise CheckpointError(f"a block in the quantization's configuration must be two sizes, not {value!r}")
    return value[0], value[1]


@functools.lru_cache(maxsize=4096)
def _compile_pattern(text: str) -> re.Pattern[str]:
    try:
        if len(text) > _MAX_PATTERN_LENGTH:
            raise re.error("too long")
        return re.compile(text)
    except re.error as error:
        raise CheckpointError(f"the pattern {printable(text)} in the configuration is broken ({error})") from None

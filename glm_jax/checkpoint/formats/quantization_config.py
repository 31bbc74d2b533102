"""What a checkpoint's configuration says about its quantization: one form for the spellings of all writers."""

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

# Keys under which config.json describes quantized weights: MLX (which copies it to the next), most writers,
# compressed-tensors of old.
QUANTIZATION_CONFIG_KEYS = ("quantization", "quantization_config", "compression_config")
MODELOPT_CONFIG_NAME = "hf_quant_config.json"
# "strategy" of compressed-tensors that says all there is to say about the block.
_STRATEGIES = {"channel": (1, 0), "tensor": (0, 0)}
_INTEGER_METHODS = ("gptq", "auto-round", "awq")
_PLAIN_BITS = 16
_PAIR = re.compile(r"\d{1,9}x\d{1,9}")  # a block as older versions wrote it
_MAX_PATTERN = 1000  # characters


@dataclasses.dataclass(frozen=True, slots=True)
class DeclaredScheme:
    """What is said about one module; None where nothing is.

    Attributes:
        bits: of a code.
        block: (outputs, inputs) that share a scale, 0 for all.
        symmetric: whether there are no zero points but the middle one.
        desc_act: whether activation order may have been used.
        kind: "int" or "float".
        mode: MLX's name of the arithmetic.
    """

    bits: int | None = None
    block: tuple[int, int] | None = None
    symmetric: bool | None = None
    desc_act: bool | None = None
    kind: str | None = None
    mode: str | None = None

    @property
    def group_size(self) -> int | None:
        """Inputs that share a scale."""
        return None if self.block is None else self.block[1]


@dataclasses.dataclass(frozen=True, slots=True)
class SchemeOverride:
    """Settings for the modules that a pattern fits."""

    matches: Callable[[str], Any]
    settings: Mapping[str, Any]


@dataclasses.dataclass(frozen=True, slots=True)
class QuantizationConfig:
    """The section of a configuration that describes quantized weights.

    Attributes:
        quant_method: ``quant_method`` in lower case; "mlx" and "modelopt" where those say so in their own way; None where
            there is no description.
        section: the section itself.
        overrides: for modules by pattern.
    """

    quant_method: str | None
    section: Mapping[str, Any]
    overrides: tuple[SchemeOverride, ...] = ()

    @classmethod
    def from_config(cls, config: Mapping[str, Any], folder: Path) -> QuantizationConfig:
        """From ``config.json`` and, for ModelOpt, the file beside it.

        Raises:
            CheckpointError: if a section is not an object, or that file is not JSON.
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
        """What it says about a module.

        Raises:
            CheckpointError: if it says something that has no meaning.
        """
        if self.quant_method in _INTEGER_METHODS:
            own = (self.section.get("extra_config") or {}).get(module)
            found = own if own is not None else next((o.settings for o in self.overrides if o.matches(module)), {})
            return _integer_scheme({**self.section, **found} if isinstance(found, Mapping) else self.section)
        read = {
            "compressed-tensors": _compressed_tensors_scheme,
            "fp8": _fp8_scheme,
            "modelopt": _modelopt_scheme,
            "mlx": _mlx_scheme,
        }.get(self.quant_method or "")
        return read(self.section, module) if read else DeclaredScheme()

    @property
    def packing_format(self) -> str:
        """AutoRound's ``packing_format``, in one spelling."""
        said = str(self.section.get("packing_format") or "auto")
        usual = {"auto": "auto_round:auto_gptq", "auto_round:awq": "auto_round:auto_awq"}
        return usual.get(said, "auto_round:auto_gptq" if said == "auto_round:gptq" else said)


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
    groups = section.get("config_groups") or {}
    if not isinstance(groups, Mapping):
        raise CheckpointError("config_groups must be an object")
    schemes = [group for group in groups.values() if isinstance(group, Mapping)]
    named = [group for group in schemes if any(_target_matches(target, module) for target in _group_targets(group))]
    by_class = [group for group in schemes if any(_is_class(target) for target in _group_targets(group))]
    weights = [group.get("weights") for group in named[:1] or by_class]
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
    strategy, group = weights.get("strategy"), weights.get("group_size")
    block: tuple[int, int] | None = _STRATEGIES.get(str(strategy))
    if strategy == "block":
        said = weights.get("block_structure")
        block = _check_pair([*map(int, said.split("x"))] if isinstance(said, str) and _PAIR.fullmatch(said) else said)
    elif block is None and group is not None:
        block = (1, max(_check_int("group_size", group), 0))
    return DeclaredScheme(
        bits=_check_int("num_bits", weights.get("num_bits")),
        block=block,
        symmetric=_check_bool("symmetric", weights.get("symmetric")),
        kind=str(weights.get("type", "int")),
    )


def _integer_scheme(said: Mapping[str, Any]) -> DeclaredScheme:
    bits = _check_int("bits", said.get("bits", said.get("w_bit")))
    group = said.get("group_size", said.get("q_group_size"))
    if bits is None or bits >= _PLAIN_BITS:
        return DeclaredScheme()
    return DeclaredScheme(
        bits=bits,
        block=None if group is None else (1, max(_check_int("group_size", group), 0)),
        symmetric=_check_bool("sym", said.get("sym")),
        desc_act=_check_bool("desc_act", said.get("desc_act")),
        kind="int",
    )


def _overrides(section: Mapping[str, Any]) -> Iterator[SchemeOverride]:
    """AutoRound's ``extra_config`` and GPTQModel's ``dynamic`` (patterns, ``+:`` before them or nothing)."""
    extra, dynamic = (section.get(key) or {} for key in ("extra_config", "dynamic"))
    if not isinstance(extra, Mapping) or not isinstance(dynamic, Mapping):
        raise CheckpointError("extra_config and dynamic must be objects")
    for key, value in extra.items():
        if isinstance(value, Mapping):
            # A name without a sign of a pattern is any part of a module's name.
            pattern = any(sign in key for sign in (".*", *"^$|()[]?+"))
            yield SchemeOverride(_compile_pattern(key).search if pattern else functools.partial(_contains, key), value)
    for key, value in dynamic.items():
        if isinstance(value, Mapping) and not key.startswith("-:"):
            yield SchemeOverride(_compile_pattern(key.removeprefix("+:")).match, value)


def _contains(part: str, name: str) -> bool:
    return part in name


def _fp8_scheme(section: Mapping[str, Any], module: str) -> DeclaredScheme:
    size = section.get("weight_block_size")
    return DeclaredScheme(bits=8, block=None if size is None else _check_pair(size), kind="float")


def _modelopt_scheme(section: Mapping[str, Any], module: str) -> DeclaredScheme:
    """ModelOpt: in the form of compressed-tensors, or one algorithm for all modules, or one each."""
    if section.get("config_groups"):
        return _compressed_tensors_scheme(section, module)
    layers = section.get("quantized_layers")
    own = layers.get(module) if isinstance(layers, Mapping) else None
    said = own if isinstance(own, Mapping) else section
    algorithm, group = str(said.get("quant_algo")), _check_int("group_size", said.get("group_size"))
    if "NVFP4" in algorithm:
        return DeclaredScheme(bits=4, block=(1, group or 16), kind="float")
    return DeclaredScheme(bits=8, kind="float") if algorithm.startswith(("FP8", "MXFP8")) else DeclaredScheme()


def _mlx_scheme(section: Mapping[str, Any], module: str) -> DeclaredScheme:
    own = section.get(module)
    said = {**section, **own} if isinstance(own, Mapping) else section
    group = _check_int("group_size", said.get("group_size"))
    mode = str(said.get("mode") or "affine")
    return DeclaredScheme(
        bits=_check_int("bits", said.get("bits")), block=None if group is None else (1, group), mode=mode
    )


def _check_int(name: str, value: Any) -> Any:
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
        if len(text) > _MAX_PATTERN:
            raise re.error("too long")
        return re.compile(text)
    except re.error as error:
        raise CheckpointError(f"the pattern {printable(text)} in the configuration is broken ({error})") from None

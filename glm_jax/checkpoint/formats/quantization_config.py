"""What a checkpoint's configuration says about its quantisation: one form for the spellings of all writers."""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from glm_jax.checkpoint.safetensors.header import printable
from glm_jax.errors import CheckpointError

# Keys under which config.json describes quantised weights: MLX (which copies it to the next), most writers,
# compressed-tensors of old.
SECTIONS = ("quantization", "quantization_config", "compression_config")
MODELOPT_FILE = "hf_quant_config.json"
# "strategy" of compressed-tensors that says all there is to say about the block.
_STRATEGIES = {"channel": (1, 0), "tensor": (0, 0)}
_INTEGERS = ("gptq", "auto-round", "awq")
_PLAIN_BITS = 16
_PAIR = re.compile(r"\d{1,9}x\d{1,9}")  # a block as older versions wrote it
_MAX_PATTERN = 1000  # characters


@dataclasses.dataclass(frozen=True, slots=True)
class Declared:
    """What is said about one module; None where nothing is.

    Attributes:
        bits: of a code.
        block: (outputs, inputs) that share a scale, 0 for all.
        symmetric: whether there are no zero points but the middle one.
        ordered: whether activation order may have been used.
        kind: "int" or "float".
        mode: MLX's name of the arithmetic.
    """

    bits: int | None = None
    block: tuple[int, int] | None = None
    symmetric: bool | None = None
    ordered: bool | None = None
    kind: str | None = None
    mode: str | None = None

    @property
    def group(self) -> int | None:
        """Inputs that share a scale."""
        return None if self.block is None else self.block[1]


@dataclasses.dataclass(frozen=True, slots=True)
class Override:
    """Settings for the modules that a pattern fits."""

    fits: Callable[[str], Any]
    said: Mapping[str, Any]


@dataclasses.dataclass(frozen=True, slots=True)
class Description:
    """The section of a configuration that describes quantised weights.

    Attributes:
        method: ``quant_method`` in lower case; "mlx" and "modelopt" where those say so in their own way; None where
            there is no description.
        section: the section itself.
        overrides: for modules by pattern.
    """

    method: str | None
    section: Mapping[str, Any]
    overrides: tuple[Override, ...] = ()

    @classmethod
    def read(cls, config: Mapping[str, Any], folder: Path) -> Description:
        """From ``config.json`` and, for ModelOpt, the file beside it.

        Raises:
            CheckpointError: if a section is not an object, or that file is not JSON.
        """
        for key in SECTIONS:
            section = config.get(key)
            if section is None:
                continue
            if not isinstance(section, Mapping):
                raise CheckpointError(f"{key} in config.json must be an object, not {printable(repr(section))}")
            method = section.get("quant_method")
            if method is None and {"bits", "group_size"} <= set(section):
                return cls("mlx", section)
            if method == "modelopt":
                return cls("modelopt", {**(_modelopt(folder) or {}), **section})
            return cls(_method(method), section, tuple(_overrides(section)))
        exported = _modelopt(folder)
        return cls(None, {}) if exported is None else cls("modelopt", exported)

    def declared(self, module: str) -> Declared:
        """What it says about a module.

        Raises:
            CheckpointError: if it says something that has no meaning.
        """
        if self.method in _INTEGERS:
            own = (self.section.get("extra_config") or {}).get(module)
            found = own if own is not None else next((o.said for o in self.overrides if o.fits(module)), {})
            return _integers({**self.section, **found} if isinstance(found, Mapping) else self.section)
        read = {
            "compressed-tensors": _compressed_tensors,
            "fp8": _blocks,
            "modelopt": _algorithm,
            "mlx": _mlx,
        }.get(self.method or "")
        return read(self.section, module) if read else Declared()

    @property
    def packing(self) -> str:
        """AutoRound's ``packing_format``, in one spelling."""
        said = str(self.section.get("packing_format") or "auto")
        usual = {"auto": "auto_round:auto_gptq", "auto_round:awq": "auto_round:auto_awq"}
        return usual.get(said, "auto_round:auto_gptq" if said == "auto_round:gptq" else said)


def _method(value: Any) -> str:
    name = str(value).lower().replace("_", "-")
    return {"autoround": "auto-round", "intel/auto-round": "auto-round"}.get(name, name)


def _modelopt(folder: Path) -> Mapping[str, Any] | None:
    try:
        exported = json.loads((folder / MODELOPT_FILE).read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{MODELOPT_FILE} is not valid JSON ({printable(str(error))})") from None
    section = exported.get("quantization") if isinstance(exported, dict) else None
    if not isinstance(section, dict):
        raise CheckpointError(f"{MODELOPT_FILE} has no object called quantization")
    return section


def _compressed_tensors(section: Mapping[str, Any], module: str) -> Declared:
    groups = section.get("config_groups") or {}
    if not isinstance(groups, Mapping):
        raise CheckpointError("config_groups must be an object")
    schemes = [group for group in groups.values() if isinstance(group, Mapping)]
    named = [group for group in schemes if any(_targets(target, module) for target in _names(group))]
    by_class = [group for group in schemes if any(_is_class(target) for target in _names(group))]
    weights = [group.get("weights") for group in named[:1] or by_class]
    if not weights or any(other != weights[0] for other in weights) or not isinstance(weights[0], Mapping):
        return Declared()
    return _weights(weights[0])


def _names(group: Mapping[str, Any]) -> list[str]:
    targets = group.get("targets") or []
    if not isinstance(targets, list):
        raise CheckpointError(f"targets in the quantisation's configuration must be a list, not {targets!r}")
    return [str(target) for target in targets]


def _is_class(target: str) -> bool:
    return target[:1].isupper() and "." not in target


def _targets(target: str, module: str) -> bool:
    return bool(_pattern(target[3:]).match(module)) if target.startswith("re:") else target == module


def _weights(weights: Mapping[str, Any]) -> Declared:
    strategy, group = weights.get("strategy"), weights.get("group_size")
    block: tuple[int, int] | None = _STRATEGIES.get(str(strategy))
    if strategy == "block":
        said = weights.get("block_structure")
        block = _pair([*map(int, said.split("x"))] if isinstance(said, str) and _PAIR.fullmatch(said) else said)
    elif block is None and group is not None:
        block = (1, max(_whole("group_size", group), 0))
    return Declared(
        bits=_whole("num_bits", weights.get("num_bits")),
        block=block,
        symmetric=_flag("symmetric", weights.get("symmetric")),
        kind=str(weights.get("type", "int")),
    )


def _integers(said: Mapping[str, Any]) -> Declared:
    bits = _whole("bits", said.get("bits", said.get("w_bit")))
    group = said.get("group_size", said.get("q_group_size"))
    if bits is None or bits >= _PLAIN_BITS:
        return Declared()
    return Declared(
        bits=bits,
        block=None if group is None else (1, max(_whole("group_size", group), 0)),
        symmetric=_flag("sym", said.get("sym")),
        ordered=_flag("desc_act", said.get("desc_act")),
        kind="int",
    )


def _overrides(section: Mapping[str, Any]) -> Iterator[Override]:
    """AutoRound's ``extra_config`` and GPTQModel's ``dynamic`` (patterns, ``+:`` before them or nothing)."""
    extra, dynamic = (section.get(key) or {} for key in ("extra_config", "dynamic"))
    if not isinstance(extra, Mapping) or not isinstance(dynamic, Mapping):
        raise CheckpointError("extra_config and dynamic must be objects")
    for key, value in extra.items():
        if isinstance(value, Mapping):
            # A name without a sign of a pattern is any part of a module's name.
            pattern = any(sign in key for sign in (".*", *"^$|()[]?+"))
            yield Override(_pattern(key).search if pattern else functools.partial(_has, key), value)
    for key, value in dynamic.items():
        if isinstance(value, Mapping) and not key.startswith("-:"):
            yield Override(_pattern(key.removeprefix("+:")).match, value)


def _has(part: str, name: str) -> bool:
    return part in name


def _blocks(section: Mapping[str, Any], module: str) -> Declared:
    size = section.get("weight_block_size")
    return Declared(bits=8, block=None if size is None else _pair(size), kind="float")


def _algorithm(section: Mapping[str, Any], module: str) -> Declared:
    """ModelOpt: in the form of compressed-tensors, or one algorithm for all modules, or one each."""
    if section.get("config_groups"):
        return _compressed_tensors(section, module)
    layers = section.get("quantized_layers")
    own = layers.get(module) if isinstance(layers, Mapping) else None
    said = own if isinstance(own, Mapping) else section
    algorithm, group = str(said.get("quant_algo")), _whole("group_size", said.get("group_size"))
    if "NVFP4" in algorithm:
        return Declared(bits=4, block=(1, group or 16), kind="float")
    return Declared(bits=8, kind="float") if algorithm.startswith(("FP8", "MXFP8")) else Declared()


def _mlx(section: Mapping[str, Any], module: str) -> Declared:
    own = section.get(module)
    said = {**section, **own} if isinstance(own, Mapping) else section
    group = _whole("group_size", said.get("group_size"))
    mode = str(said.get("mode") or "affine")
    return Declared(bits=_whole("bits", said.get("bits")), block=None if group is None else (1, group), mode=mode)


def _whole(name: str, value: Any) -> Any:
    if value is not None and (type(value) is not int or not -1 <= value < 1 << 31):
        raise CheckpointError(f"{name} in the quantisation's configuration must be a whole number, not {value!r}")
    return value


def _flag(name: str, value: Any) -> bool | None:
    if value is not None and type(value) is not bool:
        raise CheckpointError(f"{name} in the quantisation's configuration must be true or false, not {value!r}")
    return value


def _pair(value: Any) -> tuple[int, int]:
    if not isinstance(value, list | tuple) or len(value) != 2 or not all(type(n) is int and n > 0 for n in value):
        raise CheckpointError(f"a block in the quantisation's configuration must be two sizes, not {value!r}")
    return value[0], value[1]


@functools.lru_cache(maxsize=4096)
def _pattern(text: str) -> re.Pattern[str]:
    try:
        if len(text) > _MAX_PATTERN:
            raise re.error("too long")
        return re.compile(text)
    except re.error as error:
        raise CheckpointError(f"the pattern {printable(text)} in the configuration is broken ({error})") from None

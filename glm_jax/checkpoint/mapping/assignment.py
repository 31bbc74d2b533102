"""Assigns a checkpoint's tensors to the parameters, each filled exactly once, and loads a parameter from its tensor.

All disagreements between a checkpoint and its config are reported in one message, because a checkpoint with one wrong
name usually has a hundred.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from collections.abc import Mapping, Sequence

from glm_jax.checkpoint.formats.base import Array, StoredWeight
from glm_jax.checkpoint.mapping.matching import CheckpointTensor, ParamSlot, TensorMatcher
from glm_jax.checkpoint.messages import format_names, printable
from glm_jax.checkpoint.safetensors.header import SAFETENSORS_DTYPE_NAMES
from glm_jax.config import Config
from glm_jax.errors import CheckpointError
from glm_jax.weights import QuantizedTensor, QuantSpec

_MAX_MISSING = 10_000
_FLOAT_DTYPE_NAMES = ("BF16", "F16", "F32")


def assign_tensors(
    cfg: Config, weights: Mapping[str, StoredWeight], aliases: Mapping[str, str]
) -> dict[ParamSlot, CheckpointTensor]:
    """Finds the checkpoint tensor of every slot of the parameter tree.

    Args:
        cfg: Config of the model.
        weights: Weights of the checkpoint by name, without redundant copies.
        aliases: Expected name -> name of the tensor that is loaded instead; the resulting
            :class:`CheckpointTensor` has the latter name.

    Raises:
        CheckpointError: If tensors are unknown, missing or duplicate, or have the wrong shape or dtype; the message
            lists all of them.
    """
    matcher = TensorMatcher(cfg)
    matched = {name: matcher.match(name) for name in weights}
    for name, loaded_name in aliases.items():
        if tensor := matcher.match(name):
            matched[name] = dataclasses.replace(tensor, name=loaded_name)
    known = {name: tensor for name, tensor in matched.items() if tensor}
    filled = [(slot, tensor) for tensor in known.values() for slot in tensor.slots()]
    _raise_mismatches(
        unknown=[name for name, tensor in matched.items() if tensor is None],
        missing=_missing(matcher, {slot for slot, _ in filled}),
        duplicate=_duplicates(filled),
        shapes=[_shape_problem(t, weights[t.name]) for t in known.values() if weights[t.name].shape != t.shape],
        dtypes=[_dtype_problem(name, w) for name, w in weights.items() if name in known and not _has_weight_dtype(w)],
    )
    return dict(filled)


def _missing(matcher: TensorMatcher, filled: set[ParamSlot]) -> list[str]:
    names = (tensor.name for tensor in matcher.expected_tensors() if not filled.issuperset(tensor.slots()))
    # The list is bounded because a damaged config may claim a billion experts.
    return list(itertools.islice(names, _MAX_MISSING))


def _duplicates(filled: Sequence[tuple[ParamSlot, CheckpointTensor]]) -> list[str]:
    counts = Counter(slot for slot, _ in filled)
    return sorted({tensor.name for slot, tensor in filled if counts[slot] > 1})


def _has_weight_dtype(weight: StoredWeight) -> bool:
    return weight.spec is not None or SAFETENSORS_DTYPE_NAMES[weight.dtype] in _FLOAT_DTYPE_NAMES


def _shape_problem(tensor: CheckpointTensor, weight: StoredWeight) -> str:
    return f"{printable(tensor.name)} is {list(weight.shape)}, the config needs {list(tensor.shape)}"


def _dtype_problem(name: str, weight: StoredWeight) -> str:
    return f"{printable(name)} is {SAFETENSORS_DTYPE_NAMES[weight.dtype]}"


def _raise_mismatches(
    *, unknown: list[str], missing: list[str], duplicate: list[str], shapes: list[str], dtypes: list[str]
) -> None:
    groups = {
        "missing": missing,
        "unknown": [printable(name) for name in unknown],
        "given more than once": duplicate,
        "of the wrong shape": shapes,
        f"of a dtype that weights cannot have (known are {', '.join(_FLOAT_DTYPE_NAMES)})": dtypes,
    }
    problems = [f"{_format_count(items)} {title}: {format_names(items)}" for title, items in groups.items() if items]
    if problems:
        raise CheckpointError("the checkpoint's tensors do not fit its config.json.\n  " + "\n  ".join(problems))


def _format_count(items: Sequence[str]) -> str:
    return f"{len(items)}" if len(items) < _MAX_MISSING else f"at least {_MAX_MISSING}"


def load_slot(tensor: CheckpointTensor, weight: StoredWeight, slot: ParamSlot) -> Array | QuantizedTensor:
    """Loads the array of one slot from its checkpoint tensor: a view of a plain tensor, or a repacked quantized one."""
    param_index = [leaf.name for leaf in tensor.leaves].index(slot.param_name)
    # A tensor without an expert number holds a stack of all experts. A stack for one parameter is loaded by the entry.
    expert = None if tensor.expert is not None else slot.expert
    load_one = expert is not None and len(tensor.leaves) == 1
    shapes = [shape[1:] for shape in tensor.param_shapes] if load_one else tensor.param_shapes
    param = tensor.rule.transform.split(weight.load(expert if load_one else None), shapes)[param_index]
    return param if expert is None or load_one else param[expert]


def slot_quant_spec(tensor: CheckpointTensor, weight: StoredWeight) -> QuantSpec | None:
    """Quantization of the slots that a checkpoint tensor fills; None if they are plain."""
    return tensor.rule.transform.param_quant_spec(weight.spec, weight.shape)

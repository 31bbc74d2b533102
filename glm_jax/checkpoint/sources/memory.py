"""The source for parameters in memory, so that a model in use can be saved."""

from __future__ import annotations

import dataclasses
import secrets
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from glm_jax.checkpoint.array_record import FLOAT_DTYPES
from glm_jax.checkpoint.device_stack import use_single_device_mesh
from glm_jax.checkpoint.folder.layout import Leaf
from glm_jax.checkpoint.messages import format_names
from glm_jax.checkpoint.round_trip import RoundTripInfo
from glm_jax.checkpoint.sources.base import Array, SourceInfo, WeightChunk, WeightSource
from glm_jax.checkpoint.sources.hf_config import read_hf_config
from glm_jax.config import Config
from glm_jax.errors import CheckpointError
from glm_jax.weights import Bfloat16Bits, QuantizedTensor, QuantSpec, TiledWeight, Weight, untile_weight
from glm_jax.weights.params import ParamPath, leaves_with_path, param_specs


class MemorySource(WeightSource):
    """Weights of a parameter tree.

    Args:
        cfg: Config of the model.
        params: Nested dictionaries of arrays with the structure of :func:`glm_jax.weights.params.param_specs`.
        origin: Description of the model's original checkpoint, which supplies tokenizer, chat template and those keys
            of config.json that ``cfg`` does not have.

    Raises:
        CheckpointError: if parameters are missing, unknown, or have the wrong shape or dtype; lists them all.
    """

    def __init__(self, cfg: Config, params: Mapping[str, Any], origin: SourceInfo | None = None) -> None:
        self.cfg = cfg
        self._fingerprint = secrets.token_hex(32)
        self._arrays: dict[ParamPath, Weight | Array] = dict(leaves_with_path(dict(params)))
        _check_tree(cfg, self._arrays)
        folder = origin.folder if origin else None
        base = read_hf_config(folder) if folder else {}
        dtypes: Counter[str] = Counter()
        for array in self._arrays.values():
            dtypes[array.dtype.name] += array.size
        dtype = dtypes.most_common(1)[0][0]
        self.hf_config = {**base, "dtype": dtype, **cfg.to_hf()}
        copies = origin.original.mtp_copies if origin else ()
        self.info = SourceInfo(
            kind="memory",
            name="parameters in memory",
            folder=folder,
            dtype=dtype,
            original=RoundTripInfo(copies, bool(origin and origin.original.head_copy and cfg.tie_word_embeddings)),
        )

    def fingerprint(self) -> str:
        """Returns a random hash, so that an interrupted save of other values is never resumed."""
        return self._fingerprint

    def dtype(self, leaf: Leaf) -> np.dtype[Any]:
        """Returns the parameter's dtype."""
        return FLOAT_DTYPES[self._arrays[leaf.param_path].dtype.name]

    def quant_spec(self, leaf: Leaf) -> QuantSpec | None:
        """Returns the parameter's storage."""
        array = self._arrays[leaf.param_path]
        return array.spec if isinstance(array, QuantizedTensor | TiledWeight) else None

    def iter_chunks(self, leaf: Leaf, start: int = 0, stop: int | None = None) -> Iterator[tuple[int, WeightChunk]]:
        """Yields one layer as a single chunk, gathered from all devices that hold it."""
        array, slot = self._arrays[leaf.param_path], leaf.stack_index
        if isinstance(array, TiledWeight):  # one layer at a time: a second copy of the stack may not fit
            array, slot = untile_weight(_gather_to_one_device(array, slot)), None
        if isinstance(array, QuantizedTensor):
            whole = array.map_components(lambda _, part: _gather_to_host(part, slot))
            stacked = len(leaf.shape) > 2
            yield (start, whole[start:stop]) if stacked else (0, whole)
        else:
            yield start, _gather_to_host(array, slot)[start:stop]


def _gather_to_one_device(weight: TiledWeight, slot: int | None) -> TiledWeight:
    """Returns one layer of a tiled stack on one device; the whole weight if ``slot`` is ``None``."""
    if len(weight.sharding.device_set) == 1:
        return weight if slot is None else weight[slot]
    tiles = jax.tree.map(lambda array: jnp.asarray(_gather_to_host(array, slot)), weight.tiles)
    return dataclasses.replace(weight, tiles=tiles)


def _gather_to_host(array: jax.Array | Bfloat16Bits | Array, slot: int | None) -> Array:
    """Returns one layer in host memory, gathered shard by shard: the whole stack may not fit there."""
    if isinstance(array, Bfloat16Bits):
        return _gather_to_host(array.bits, slot).view(FLOAT_DTYPES["bfloat16"])
    if isinstance(array, np.ndarray):
        return array if slot is None else array[slot]
    out = np.empty(array.shape if slot is None else array.shape[1:], array.dtype)
    for index, data in {str(shard.index): (shard.index, shard.data) for shard in array.addressable_shards}.values():
        if slot is None:
            out[index] = np.asarray(data)
            continue
        first, last, _ = index[0].indices(array.shape[0])
        if first <= slot < last:
            out[index[1:]] = _copy_row(data, slot - first)
    return out


def _copy_row(data: jax.Array, row: int) -> Array:
    device = next(iter(data.devices()))
    if device.platform == "cpu":
        return np.asarray(data)[row]  # a view
    with use_single_device_mesh(device):
        return np.asarray(data[row])


def _check_tree(cfg: Config, arrays: Mapping[ParamPath, Any]) -> None:
    specs = dict(leaves_with_path(param_specs(cfg)))
    known = {path: arrays[path] for path in specs if path in arrays}
    groups = {
        "missing": [path for path in specs if path not in arrays],
        "unknown": [path for path in arrays if path not in specs],
        "of the wrong shape": [path for path, array in known.items() if tuple(array.shape) != specs[path].shape],
        "spread over several hosts": [path for path, array in known.items() if not _is_fully_addressable(array)],
        f"of a dtype that is not {', '.join(FLOAT_DTYPES)}": [
            p for p, a in known.items() if a.dtype.name not in FLOAT_DTYPES
        ],
    }
    problems = [
        f"{title}: {format_names(['/'.join(path) for path in paths])}" for title, paths in groups.items() if paths
    ]
    if problems:
        raise CheckpointError(f"these parameters are not the config's; {'; '.join(problems)}")


def _is_fully_addressable(array: Weight | Array) -> bool:
    if isinstance(array, QuantizedTensor):
        return all(_is_fully_addressable(part) for part in array.components().values())
    array = array.bits if isinstance(array, Bfloat16Bits) else array
    array = array.tiles.packed if isinstance(array, TiledWeight) else array
    return isinstance(array, np.ndarray) or array.is_fully_addressable

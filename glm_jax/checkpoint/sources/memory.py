"""The source for parameters in memory, so that a model in use can be saved."""

from __future__ import annotations

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
from glm_jax.weights import QuantSpec, Weight, WeightMatrix, as_weight_matrix
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
        return as_weight_matrix(self._arrays[leaf.param_path]).quant_spec

    def iter_chunks(self, leaf: Leaf, start: int = 0, stop: int | None = None) -> Iterator[tuple[int, WeightChunk]]:
        """Yields one layer as a single chunk, gathered from all devices that hold it."""
        weight, slot = as_weight_matrix(self._arrays[leaf.param_path]), leaf.stack_index
        if weight.is_tiled:  # one layer at a time: a second copy of the stack may not fit
            weight, slot = as_weight_matrix(_gather_to_one_device(weight, slot).untile()), None
        on_host: Any = weight.map_components(lambda _, array: _gather_to_host(array, slot)).as_param()
        if weight.quant_spec is None:
            yield start, np.asarray(on_host)[start:stop]
        else:
            has_chunks = len(leaf.shape) > 2
            yield (start, on_host[start:stop]) if has_chunks else (0, on_host)


def _gather_to_one_device(weight: WeightMatrix, slot: int | None) -> WeightMatrix:
    """Returns one layer of a tiled stack on one device; the whole weight if ``slot`` is ``None``."""
    if any(len(array.sharding.device_set) > 1 for array in weight.components().values()):
        return weight.map_components(lambda _, array: jnp.asarray(_gather_to_host(array, slot)))
    return weight if slot is None else weight.map_components(lambda _, array: array[slot])


def _gather_to_host(array: jax.Array | Array, slot: int | None) -> Array:
    """Returns one layer in host memory, gathered shard by shard: the whole stack may not fit there."""
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


def _is_fully_addressable(weight: Weight | Array) -> bool:
    arrays = as_weight_matrix(weight).components().values()
    return all(isinstance(array, np.ndarray) or array.is_fully_addressable for array in arrays)

"""Weights in and out of memory: any source into the stacked parameter tree, and the tree into a folder.

>>> cfg, params, info = load("tiny")                                      # doctest: +SKIP
>>> save("finetuned", cfg, params, origin=info)                           # doctest: +SKIP
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from glm_jax.checkpoint.device_stack import StackBuilder
from glm_jax.checkpoint.folder.layout import Leaf
from glm_jax.checkpoint.progress import ProgressCallback, progress_bar
from glm_jax.checkpoint.sources.base import SourceInfo, WeightChunk, WeightSource, source_storage, to_plain_array
from glm_jax.checkpoint.sources.memory import MemorySource
from glm_jax.checkpoint.sources.open import open_source
from glm_jax.checkpoint.sources.quantized import RequantizedSource
from glm_jax.checkpoint.sources.synthetic import SyntheticSource
from glm_jax.checkpoint.validation import WeightValidator
from glm_jax.checkpoint.write.conversion import ConversionReport, OutputFormat, write_checkpoint
from glm_jax.config import Config
from glm_jax.memory import available_device_memory
from glm_jax.sharding import Rules
from glm_jax.weights import Bfloat16Bits, QuantizedTensor, QuantRules
from glm_jax.weights.params import ParamTree, init_params, leaves_with_path
from glm_jax.weights.storage import abstract_params
from glm_jax.weights.tiling import ModelSharding, tile_param, tile_param_layerwise

__all__ = [
    "OutputFormat",
    "SourceInfo",
    "WeightSource",
    "load",
    "load_params",
    "open_source",
    "quantize_source",
    "save",
    "source_storage",
]


def load(
    source: str | Path | WeightSource,
    *,
    dtype: Any = "bfloat16",
    quantize: str | QuantRules | None = None,
    rules: Rules = Rules(),
    mesh: Mesh | None = None,
    mtp: bool = True,
    tiles: bool = False,
    check: bool = False,
    progress: bool = False,
) -> tuple[Config, ParamTree, SourceInfo]:
    """Loads a model's parameters.

    Args:
        source: Hugging Face folder, hub id, converted folder, GGUF file, ``"tiny"``,
            ``"synthetic:flash?layers=4&seed=0"``, or what :func:`open_source` returned for one of these.
        dtype: of the parameters that are not quantized (router biases stay float32), and of activations.
        quantize: a preset (:data:`glm_jax.weights.QUANT_PRESETS`) or rules to quantize by while loading; unless given, every
            weight keeps the values that it has in the source, quantized ones included.
        rules: mesh axis of each logical axis.
        mesh: devices to lay the parameters out on; ``None`` for JAX's default device.
        mtp: load the prediction layer, if there is one.
        tiles: lay the matrices out as kernels read them (:class:`~glm_jax.weights.TiledWeight`), where they can be.
        check: read every byte a second look: hashes of a converted folder, and values that are NaN or infinite.
        progress: show it on stderr.

    Returns:
        Config, parameter tree (``jax.Array``, :class:`~glm_jax.weights.QuantizedTensor`, or
        :class:`~glm_jax.weights.Bfloat16Bits` on a CPU), and what is known of the source.

    Raises:
        CheckpointError: if the weights are missing, damaged, or do not fit their config.
        ConfigError: for a ``config.json`` that this stack cannot run.
        QuantError: for rules that do not exist.
        ShardingError: if the mesh does not divide the model.
    """
    weights = source if isinstance(source, WeightSource) else open_source(source, dtype=jnp.dtype(dtype).name)
    weights = quantize_source(weights, quantize, dtype, rules, mesh)
    cfg = weights.cfg if mtp else weights.cfg.replace(num_nextn_predict_layers=0, mtp_own_embeddings=False)
    if mesh is not None:
        rules.validate(cfg, mesh)
    params = load_params(weights, cfg, dtype, rules, mesh, tiles=tiles, check=check, progress=progress)
    return cfg, params, weights.info


def quantize_source(
    source: WeightSource,
    quantize: str | QuantRules | None,
    dtype: Any = "bfloat16",
    rules: Rules = Rules(),
    mesh: Mesh | None = None,
) -> WeightSource:
    """A source with its matrices quantized by a preset or rules; itself if there are none.

    Raises:
        QuantError: for a preset that does not exist.
    """
    quant = QuantRules.resolve(quantize)
    if quant is None:
        return source
    sizes = None if mesh is None else dict(mesh.shape)
    return RequantizedSource(source, quant, rules=rules, axis_sizes=sizes, dtype=dtype)


def load_params(
    source: WeightSource,
    cfg: Config,
    dtype: Any = "bfloat16",
    rules: Rules = Rules(),
    mesh: Mesh | None = None,
    *,
    tiles: bool = False,
    check: bool = False,
    progress: bool = False,
) -> ParamTree:
    """The parameters of an open source, stacked; peak memory is theirs and a few pieces.

    In tiles there are two copies of the stack that is laid out, unless a GPU has no room for them: then that stack goes
    by way of the host, layer by layer.

    Args:
        source: the weights.
        cfg: of the source, possibly without its prediction layer.
        dtype: of the parameters that are not quantized.
        rules: mesh axis of each logical axis.
        mesh: devices; ``None`` for JAX's default device.
        tiles: lay the matrices out as kernels read them.
        check: also check hashes and finiteness.
        progress: show it on stderr.

    Raises:
        CheckpointError: if bytes are missing or damaged.
        ShardingError: if the mesh would cut through a block that shares a scale.
    """
    placement = None if mesh is None else ModelSharding(cfg, rules, mesh)
    if isinstance(source, SyntheticSource):
        made = init_params(cfg, source.seed, dtype, rules, mesh)
        return _tile_params_in_place(made, placement) if tiles else made
    abstract = dict(leaves_with_path(abstract_params(cfg, dtype, rules, mesh, source_storage(source, cfg))))
    wanted = [leaf for members in source.layout().values() for leaf in members if leaf.param_path in abstract]
    total = sum(source.nbytes(leaf) for leaf in wanted)
    with progress_bar("loading", total, show=progress) as advance:
        finish = functools.partial(_tile_weight, placement=placement) if tiles else lambda _, weight: weight
        filled = _load_stacks(source, wanted, abstract, WeightValidator(source) if check else None, advance, finish)
    return _unflatten_tree({path: filled[path] for path in abstract})


def _tile_params_in_place(params: ParamTree, placement: ModelSharding | None, path: tuple[str, ...] = ()) -> ParamTree:
    """Lays parameters out one after the other: a second copy of all need not fit."""
    for name in params:
        inner, here = params[name], (*path, name)
        params[name] = (
            _tile_params_in_place(inner, placement, here)
            if isinstance(inner, dict)
            else _tile_weight(here, inner, placement)
        )
    return params


def _tile_weight(path: tuple[str, ...], weight: Any, placement: ModelSharding | None) -> Any:
    """A parameter as kernels read it; for a moment there are two copies of it, where there is room for them."""
    if placement is None and not _fits_second_copy(weight):
        return tile_param_layerwise(path, weight)
    return tile_param(path, weight, placement)


def _fits_second_copy(weight: Any) -> bool:
    """Whether a GPU has memory for another copy of a weight, and a tenth more for what is on the way."""
    arrays = jax.tree.leaves(weight)
    (device,) = arrays[0].devices()
    return device.platform == "cpu" or 1.1 * sum(array.nbytes for array in arrays) <= available_device_memory(device)


def _load_stacks(
    source: WeightSource,
    wanted: list[Leaf],
    abstract: Mapping[Any, Any],
    checker: WeightValidator | None,
    advance: ProgressCallback,
    finish: Callable[[Any, Any], Any],
) -> dict[Any, Any]:
    left = Counter(leaf.param_path for leaf in wanted)
    stacks: dict[Any, _ParamBuilder] = {}
    filled: dict[Any, Any] = {}
    for leaf in wanted:
        path = leaf.param_path
        if path not in stacks:
            stacks[path] = _ParamBuilder(abstract[path])
        for row, piece in source.iter_chunks(leaf):
            stacks[path].add(leaf.stack_index, row, piece)
            if checker:
                checker.check_chunk(leaf, piece)
        if checker:
            checker.end_array(leaf)
        advance(source.nbytes(leaf))
        left[path] -= 1
        if not left[path]:
            filled[path] = finish(path, stacks.pop(path).finish())
    if checker:
        checker.raise_problems()
    return filled


class _ParamBuilder:
    """A parameter being filled: one stack, or one for each array of a quantized one."""

    def __init__(self, goal: Any) -> None:
        self._goal = goal
        parts = goal.components() if isinstance(goal, QuantizedTensor) else {"": goal}
        as_bits = isinstance(goal, Bfloat16Bits)
        self._stacks = {
            name: StackBuilder(part.shape, np.dtype(part.dtype), part.sharding, as_bits=as_bits)
            for name, part in parts.items()
        }

    def add(self, stack_index: int | None, row: int, chunk: WeightChunk) -> None:
        """Writes rows of one layer."""
        if not isinstance(self._goal, QuantizedTensor):
            self._stacks[""].add(stack_index, row, to_plain_array(chunk))
            return
        for name, array in cast(QuantizedTensor, chunk).components().items():
            self._stacks[name].add(stack_index, row, array)

    def finish(self) -> Any:
        """The parameter."""
        if isinstance(self._goal, QuantizedTensor):
            return self._goal.map_components(lambda name, _: self._stacks[name].finish())
        array = self._stacks[""].finish()
        return Bfloat16Bits(array) if isinstance(self._goal, Bfloat16Bits) else array


def save(
    path: str | Path,
    cfg: Config,
    params: ParamTree,
    *,
    origin: SourceInfo | None = None,
    to: OutputFormat = "orbax",
    force: bool = False,
    progress: bool = False,
) -> ConversionReport:
    """Writes parameters as a converted folder, or as a Hugging Face folder.

    Args:
        path: new or empty folder.
        cfg: of the model.
        params: nested dictionaries of arrays.
        origin: what :func:`load` returned: tokenizer, chat template and foreign config keys are taken from there.
        to: "orbax" or "safetensors".
        force: replace an earlier conversion at ``path``.
        progress: show it on stderr.

    Raises:
        CheckpointError: if the parameters are not the config's, or the folder cannot be written.
    """
    return write_checkpoint(MemorySource(cfg, params, origin), path, to=to, force=force, progress=progress)


def _unflatten_tree(flat: Mapping[tuple[str, ...], Any]) -> ParamTree:
    tree: ParamTree = {}
    for path, value in flat.items():
        node = tree
        for name in path[:-1]:
            node = node.setdefault(name, {})
        node[path[-1]] = value
    return tree

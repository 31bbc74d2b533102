"""Loads any source into the stacked parameter tree, and saves the tree as a folder.

>>> cfg, params, info = load("tiny")                                      # doctest: +SKIP
>>> save("finetuned", cfg, params, origin=info)                           # doctest: +SKIP
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.typing import DTypeLike

from glm_jax.checkpoint.device_stack import StackBuilder
from glm_jax.checkpoint.folder.layout import Leaf
from glm_jax.checkpoint.progress import ProgressCallback, progress_bar
from glm_jax.checkpoint.sources.base import SourceInfo, WeightChunk, WeightSource
from glm_jax.checkpoint.sources.build import to_plain_array
from glm_jax.checkpoint.sources.memory import MemorySource
from glm_jax.checkpoint.sources.open import open_source
from glm_jax.checkpoint.sources.quantized import RequantizedSource
from glm_jax.checkpoint.sources.storage import source_storage
from glm_jax.checkpoint.sources.synthetic import SyntheticSource
from glm_jax.checkpoint.validation import WeightValidator
from glm_jax.checkpoint.write.conversion import ConversionReport, OutputFormat, write_checkpoint
from glm_jax.config import Config
from glm_jax.memory import available_device_memory
from glm_jax.sharding import Rules
from glm_jax.weights import QuantRules, Weight, as_weight_matrix
from glm_jax.weights.params import ParamPath, ParamTree, leaves_with_path
from glm_jax.weights.random_init import init_params
from glm_jax.weights.storage import abstract_params
from glm_jax.weights.tiling import ModelSharding, tile_param, tile_param_layerwise


def load(
    source: str | Path | WeightSource,
    *,
    dtype: DTypeLike = "bfloat16",
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
            ``"synthetic:flash?layers=4&seed=0"``, or a source that :func:`open_source` returned.
        dtype: Dtype of parameters that are not quantized (router biases stay float32), and of activations.
        quantize: Preset (a name in :data:`glm_jax.weights.QUANT_PRESETS`) or rules to quantize by while loading;
            ``None`` keeps the values of the source, and its quantized weights as they are.
        rules: Mesh axis of each logical axis.
        mesh: Devices that hold the parameters; ``None`` for JAX's default device.
        mtp: Whether to load the prediction layer, if there is one.
        tiles: Whether to store matrices in the kernels' layout (:class:`~glm_jax.weights.TiledWeight`) where possible.
        check: Whether to verify the hashes of a converted folder and to reject NaN and infinite values.
        progress: Whether to show progress on stderr.

    Returns:
        Config, parameter tree (``jax.Array``, :class:`~glm_jax.weights.QuantizedTensor`, or
        :class:`~glm_jax.weights.Bfloat16Bits` on a CPU), and the description of the source.

    Raises:
        CheckpointError: if weights are missing, damaged, or do not fit the config.
        ConfigError: for a ``config.json`` that this stack cannot run.
        QuantError: for an unknown preset.
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
    dtype: DTypeLike = "bfloat16",
    rules: Rules = Rules(),
    mesh: Mesh | None = None,
) -> WeightSource:
    """Wraps a source so that its matrices are quantized while they are read.

    Args:
        source: The weights.
        quantize: Preset or rules; ``None`` returns the source itself.
        dtype: Dtype of the model.
        rules: Mesh axis of each logical axis.
        mesh: Devices that will hold the parameters; no quantization group crosses a device boundary.

    Raises:
        QuantError: for an unknown preset.
    """
    quant_rules = QuantRules.resolve(quantize)
    if quant_rules is None:
        return source
    axis_sizes = None if mesh is None else dict(mesh.shape)
    return RequantizedSource(source, quant_rules, rules=rules, axis_sizes=axis_sizes, dtype=dtype)


def load_params(
    source: WeightSource,
    cfg: Config,
    dtype: DTypeLike = "bfloat16",
    rules: Rules = Rules(),
    mesh: Mesh | None = None,
    *,
    tiles: bool = False,
    check: bool = False,
    progress: bool = False,
) -> ParamTree:
    """Loads the stacked parameters of an open source; peak memory is the parameters and a few chunks.

    Tiling needs a second copy of one stack at a time. A GPU without room for it tiles that stack layer by layer, by way
    of the host.

    Args:
        source: The weights.
        cfg: Config of the source, possibly without its prediction layer.
        dtype: Dtype of parameters that are not quantized.
        rules: Mesh axis of each logical axis.
        mesh: Devices that hold the parameters; ``None`` for JAX's default device.
        tiles: Whether to store matrices in the kernels' layout where possible.
        check: Whether to verify hashes and to reject NaN and infinite values.
        progress: Whether to show progress on stderr.

    Raises:
        CheckpointError: if bytes are missing or damaged.
        ShardingError: if the mesh would split a block of values that share a scale.
    """
    placement = None if mesh is None else ModelSharding(cfg, rules, mesh)
    if isinstance(source, SyntheticSource):
        params = init_params(cfg, source.seed, dtype, rules, mesh)
        return _tile_params_in_place(params, placement) if tiles else params
    abstract = dict(leaves_with_path(abstract_params(cfg, dtype, rules, mesh, source_storage(source, cfg))))
    leaves = [leaf for members in source.layout().values() for leaf in members if leaf.param_path in abstract]
    total = sum(source.nbytes(leaf) for leaf in leaves)
    with progress_bar("loading", total, show=progress) as advance:
        finish = functools.partial(_tile_weight, placement=placement) if tiles else lambda _, weight: weight
        loaded = _load_stacks(source, leaves, abstract, WeightValidator(source) if check else None, advance, finish)
    return _unflatten_tree({path: loaded[path] for path in abstract})


def _tile_params_in_place(params: ParamTree, placement: ModelSharding | None, path: ParamPath = ()) -> ParamTree:
    """Tiles parameters one after the other, because a second copy of all of them may not fit."""
    for name in params:
        inner, inner_path = params[name], (*path, name)
        params[name] = (
            _tile_params_in_place(inner, placement, inner_path)
            if isinstance(inner, dict)
            else _tile_weight(inner_path, inner, placement)
        )
    return params


def _tile_weight(path: ParamPath, weight: Any, placement: ModelSharding | None) -> Any:
    """Returns a parameter in the kernels' layout; holds two copies of it for a moment if both fit."""
    if placement is None and not _fits_second_copy(weight):
        return tile_param_layerwise(path, weight)
    return tile_param(path, weight, placement)


def _fits_second_copy(weight: Any) -> bool:
    """Returns whether a GPU has memory for a second copy of a weight, and a tenth more for temporaries."""
    arrays = jax.tree.leaves(weight)
    (device,) = arrays[0].devices()
    return device.platform == "cpu" or 1.1 * sum(array.nbytes for array in arrays) <= available_device_memory(device)


def _load_stacks(
    source: WeightSource,
    leaves: list[Leaf],
    abstract: Mapping[ParamPath, Any],
    validator: WeightValidator | None,
    advance: ProgressCallback,
    finish: Callable[[ParamPath, Any], Any],
) -> dict[ParamPath, Any]:
    """Fills the parameters with the chunks of all leaves; ``finish`` is applied to each complete parameter."""
    remaining = Counter(leaf.param_path for leaf in leaves)
    builders: dict[ParamPath, _ParamBuilder] = {}
    loaded: dict[ParamPath, Any] = {}
    for leaf in leaves:
        path = leaf.param_path
        if path not in builders:
            builders[path] = _ParamBuilder(abstract[path])
        for row, chunk in source.iter_chunks(leaf):
            builders[path].add(leaf.stack_index, row, chunk)
            if validator:
                validator.check_chunk(leaf, chunk)
        if validator:
            validator.end_array(leaf)
        advance(source.nbytes(leaf))
        remaining[path] -= 1
        if not remaining[path]:
            loaded[path] = finish(path, builders.pop(path).finish())
    if validator:
        validator.raise_problems()
    return loaded


class _ParamBuilder:
    """A parameter that is being filled: one stack, or one per component of a quantized parameter."""

    def __init__(self, goal: Weight) -> None:
        """Allocates the stacks of a parameter with the shapes, dtypes and shardings of ``goal``."""
        self._goal = as_weight_matrix(goal)
        self._stacks: dict[str, StackBuilder] = {}
        for name, part in self._goal.components().items():
            dtype = np.dtype(part.dtype if name else goal.dtype)  # bfloat16 may be stored as integers of the same bits
            as_bits = dtype != np.dtype(part.dtype)
            self._stacks[name] = StackBuilder(part.shape, dtype, part.sharding, as_bits=as_bits)

    def add(self, stack_index: int | None, row: int, chunk: WeightChunk) -> None:
        """Writes rows of one layer."""
        values = chunk if self._goal.quant_spec else to_plain_array(chunk)
        for name, array in as_weight_matrix(values).components().items():
            self._stacks[name].add(stack_index, row, array)

    def finish(self) -> Weight:
        """Returns the parameter; the builder must not be used again."""
        return self._goal.map_components(lambda name, _: self._stacks[name].finish()).as_param()


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
    """Writes parameters as a converted folder or as a Hugging Face folder.

    Args:
        path: New or empty folder.
        cfg: Config of the model.
        params: Nested dictionaries of arrays.
        origin: Description of the source that :func:`load` returned; supplies tokenizer, chat template and those keys
            of config.json that ``cfg`` does not have.
        to: "orbax" for a converted folder, "safetensors" for a Hugging Face folder.
        force: Whether to replace an earlier conversion at ``path``.
        progress: Whether to show progress on stderr.

    Raises:
        CheckpointError: if the parameters do not match the config, or the folder cannot be written.
    """
    return write_checkpoint(MemorySource(cfg, params, origin), path, to=to, force=force, progress=progress)


def _unflatten_tree(flat: Mapping[ParamPath, Any]) -> ParamTree:
    tree: ParamTree = {}
    for path, value in flat.items():
        node = tree
        for name in path[:-1]:
            node = node.setdefault(name, {})
        node[path[-1]] = value
    return tree

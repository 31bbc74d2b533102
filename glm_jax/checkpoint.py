"""Weights in and out of memory: any source into the stacked parameter tree, and the tree into a folder.

>>> cfg, params, info = load("tiny")                                      # doctest: +SKIP
>>> save("finetuned", cfg, params, origin=info)                           # doctest: +SKIP
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from convert.assemble import Stack
from convert.checks import Checker
from convert.layout import Leaf
from convert.memory import MemorySource
from convert.pipeline import Form, Report, convert
from convert.progress import Advance, progress_bar
from convert.source import SourceInfo, WeightSource
from convert.sources import open_source
from convert.synthetic import SyntheticSource
from glm_jax.config import Config
from glm_jax.params import Tree, abstract_params, init_params, leaves
from glm_jax.quant import Bfloat16Bits
from glm_jax.sharding import Rules

__all__ = ["Form", "SourceInfo", "WeightSource", "load", "load_params", "open_source", "save"]


def load(
    source: str | Path | WeightSource,
    *,
    dtype: Any = "bfloat16",
    rules: Rules = Rules(),
    mesh: Mesh | None = None,
    mtp: bool = True,
    check: bool = False,
    progress: bool = False,
) -> tuple[Config, Tree, SourceInfo]:
    """Loads a model's parameters.

    Args:
        source: Hugging Face folder, hub id, converted folder, ``"tiny"``, ``"synthetic:flash?layers=4&seed=0"``, or
            what :func:`open_source` returned for one of these.
        dtype: of the parameters (router biases stay float32).
        rules: mesh axis of each logical axis.
        mesh: devices to lay the parameters out on; ``None`` for JAX's default device.
        mtp: load the prediction layer, if there is one.
        check: read every byte a second look: hashes of a converted folder, and values that are NaN or infinite.
        progress: show it on stderr.

    Returns:
        Config, parameter tree (``jax.Array``, or :class:`~glm_jax.quant.Bfloat16Bits` on a CPU), and what is known of
        the source.

    Raises:
        CheckpointError: if the weights are missing, damaged, or do not fit their config.
        ConfigError: for a ``config.json`` that this stack cannot run.
        ShardingError: if the mesh does not divide the model.
    """
    weights = source if isinstance(source, WeightSource) else open_source(source, dtype=jnp.dtype(dtype).name)
    cfg = weights.cfg if mtp else weights.cfg.replace(num_nextn_predict_layers=0, mtp_own_embeddings=False)
    if mesh is not None:
        rules.validate(cfg, mesh)
    return cfg, load_params(weights, cfg, dtype, rules, mesh, check=check, progress=progress), weights.info


def load_params(
    source: WeightSource,
    cfg: Config,
    dtype: Any = "bfloat16",
    rules: Rules = Rules(),
    mesh: Mesh | None = None,
    *,
    check: bool = False,
    progress: bool = False,
) -> Tree:
    """The parameters of an open source, stacked; peak memory is theirs and a few pieces.

    Args:
        source: the weights.
        cfg: of the source, possibly without its prediction layer.
        dtype: of the parameters.
        rules: mesh axis of each logical axis.
        mesh: devices; ``None`` for JAX's default device.
        check: also check hashes and finiteness.
        progress: show it on stderr.

    Raises:
        CheckpointError: if bytes are missing or damaged.
    """
    if isinstance(source, SyntheticSource):
        return init_params(cfg, source.seed, dtype, rules, mesh)
    abstract = dict(leaves(abstract_params(cfg, dtype, rules, mesh)))
    wanted = [leaf for members in source.layout().values() for leaf in members if leaf.target in abstract]
    total = sum(source.nbytes(leaf) for leaf in wanted)
    with progress_bar("loading", total, show=progress) as advance:
        filled = _fill(source, wanted, abstract, Checker(source) if check else None, advance)
    return _tree({path: filled[path] for path in abstract})


def _fill(
    source: WeightSource, wanted: list[Leaf], abstract: Mapping[Any, Any], checker: Checker | None, advance: Advance
) -> dict[Any, Any]:
    left = Counter(leaf.target for leaf in wanted)
    stacks: dict[Any, Stack] = {}
    filled: dict[Any, Any] = {}
    for leaf in wanted:
        path, goal = leaf.target, abstract[leaf.target]
        if path not in stacks:
            bits = isinstance(goal, Bfloat16Bits)
            stacks[path] = Stack(goal.shape, np.dtype(goal.dtype), goal.sharding, as_bits=bits)
        for row, piece in source.pieces(leaf):
            stacks[path].add(leaf.slot, row, piece)
            if checker:
                checker.piece(leaf, piece)
        if checker:
            checker.close(leaf)
        advance(source.nbytes(leaf))
        left[path] -= 1
        if not left[path]:
            array = stacks.pop(path).finish()
            filled[path] = Bfloat16Bits(array) if isinstance(goal, Bfloat16Bits) else array
    if checker:
        checker.finish()
    return filled


def save(
    path: str | Path,
    cfg: Config,
    params: Tree,
    *,
    origin: SourceInfo | None = None,
    to: Form = "orbax",
    force: bool = False,
    progress: bool = False,
) -> Report:
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
    return convert(MemorySource(cfg, params, origin), path, to=to, force=force, progress=progress)


def _tree(flat: Mapping[tuple[str, ...], Any]) -> Tree:
    tree: Tree = {}
    for path, value in flat.items():
        node = tree
        for name in path[:-1]:
            node = node.setdefault(name, {})
        node[path[-1]] = value
    return tree

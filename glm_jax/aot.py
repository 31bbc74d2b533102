"""The model's own programs compiled for a GPU that need not be here; see :mod:`pallas_kernels.aot`.

Runs in a child process. What goes in and comes out are plain values.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

from glm_jax.cache import LatentCache
from glm_jax.config import Config
from glm_jax.model import GLM
from glm_jax.params import Tree
from glm_jax.quant import Bfloat16Bits, QuantizedTensor, QuantRules
from glm_jax.sampling import SamplerState, SamplingParams
from glm_jax.steps import GPU_OPTIONS, DecodeState, bucket, decode_program
from glm_jax.storage import Storage, abstract_params, plan_storage
from glm_jax.tiling import tiled_tree
from pallas_kernels import aot, compiling_for

_STEPS = 64


def decode(argument: Mapping[str, Any]) -> dict[str, Any]:
    """The generation loop for one card.

    Args:
        argument: ``gpu`` (of ``pallas_kernels.aot.cards``), ``config`` (keywords of :class:`~glm_jax.Config`),
            ``storage`` (of :meth:`glm_jax.storage.Storage.to_json`) or ``quantize`` (a preset), ``batch``, ``context``,
            ``cache_dtype``, ``sampling`` (options of :class:`~glm_jax.SamplingParams`; greedy unless given).
    """
    cfg = Config(**{key: _frozen(value) for key, value in argument["config"].items()})
    card = aot.card(argument["gpu"])
    place = SingleDeviceSharding(aot.devices(card)[0])
    params = _placed(_params(cfg, argument.get("quantize"), argument.get("storage")), place)
    batch, slots = bucket(argument["batch"]), min(bucket(argument["context"], 256), cfg.max_position_embeddings)
    state = _placed(_state(cfg, batch, slots, argument["cache_dtype"], argument.get("sampling", {})), place)
    with compiling_for(card.target):
        found = loop(cfg, params, state, place)
    return {**found, "gpu": card.name, "fits": found["argument_bytes"] + found["temp_bytes"] <= card.memory}


def loop(cfg: Config, params: Tree, state: DecodeState, place: SingleDeviceSharding) -> dict[str, Any]:
    """What XLA makes of the generation loop: launches, graphs, memory. Nothing runs.

    Args:
        cfg: the model.
        params: arrays, or their shapes with ``place`` as sharding.
        state: likewise.
        place: the device.
    """
    program = jax.jit(decode_program, static_argnames=("model", "steps"), donate_argnames="state")
    limit = jax.ShapeDtypeStruct((), jnp.int32, sharding=place)
    report = aot.compile_traced(program.trace(GLM(cfg), params, state, limit, steps=_STEPS), GPU_OPTIONS)
    launches = report.launches()
    names = Counter(launch.name or launch.kind for launch in launches)
    return {
        "launches_per_token": len(launches),
        "kernels": dict(names.most_common()),
        "copies_per_token": sum(launch.kind == "kCopy" for launch in launches),
        "graph_pieces": report.graphs,
        "launches_outside_graphs": report.outside,
        "collectives": report.collectives,
        "argument_bytes": report.argument_bytes,
        "alias_bytes": report.alias_bytes,
        "cache_bytes": sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state.cache)),
        "temp_bytes": report.temp_bytes,
    }


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _params(cfg: Config, quantize: str | None, storage: Any) -> Tree:
    """Shapes and dtypes of the parameters in tiles, without the prediction layer."""
    rules = QuantRules.named(quantize)
    if rules:
        planned = plan_storage(cfg, rules)[0]
    else:
        planned = Storage.parse(storage or [])
    params = abstract_params(cfg, jnp.bfloat16, storage=planned)
    params.pop("mtp", None)
    return jax.eval_shape(tiled_tree, _as_on_a_gpu(params))


def _as_on_a_gpu(tree: Tree) -> Tree:
    """CPUs hold bfloat16 matrices as integers; GPUs do not."""

    def unfolded(leaf: Any) -> Any:
        return jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16) if isinstance(leaf, Bfloat16Bits) else leaf

    return jax.tree.map(unfolded, tree, is_leaf=lambda x: isinstance(x, Bfloat16Bits | QuantizedTensor))


def _state(cfg: Config, batch: int, slots: int, cache_dtype: str, sampling: Mapping[str, Any]) -> DecodeState:
    options = SamplingParams(**sampling) if sampling else SamplingParams(temperature=0.0)
    sampler = SamplerState.create(
        [options] * batch,
        [0] * batch,
        [(0,)] * batch,
        vocab_size=cfg.vocab_size,
        valid_vocab=cfg.vocab_size,
        eos_ids=cfg.eos_token_ids,
    )
    number = jax.ShapeDtypeStruct((batch,), jnp.int32)
    flag = jax.ShapeDtypeStruct((batch,), jnp.bool_)
    cache = jax.eval_shape(lambda: LatentCache.create(cfg, batch, slots, cache_dtype))
    rows: Any = {"tokens": number, "positions": number, "left": number, "done": flag, "finite": flag}
    return DecodeState(cache=cache, sampler=sampler, **rows)


def _placed(tree: Any, place: SingleDeviceSharding) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), tree)

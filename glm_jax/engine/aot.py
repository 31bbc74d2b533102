"""The model's own programs compiled for a GPU that need not be here; see :mod:`pallas_kernels.aot`.

Runs in a child process. What goes in and comes out are plain values.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, SingleDeviceSharding

from glm_jax.cache.latent import LatentCache
from glm_jax.config import Config
from glm_jax.engine.steps import DecodeState, bucket_size, decode_program, prefill_program
from glm_jax.model.glm import GLM
from glm_jax.sampling import SamplerState, SamplingParams
from glm_jax.sharding import MESH_AXES, Rules, get_sharding_preset
from glm_jax.weights import Bfloat16Bits, QuantizedTensor, QuantRules
from glm_jax.weights.params import ParamTree, leaves_with_path, map_specs, param_specs
from glm_jax.weights.storage import Storage, abstract_params, partition_specs, plan_storage
from glm_jax.weights.tiling import tile_params
from pallas_kernels import CUDA_GRAPH_OPTIONS, MULTI_GPU_CUDA_GRAPH_OPTIONS, aot, compiling_for

_DECODE_STEPS = 64


def compile_decode(spec: Mapping[str, Any]) -> dict[str, Any]:
    """The generation loop for one card.

    Args:
        spec: ``gpu`` (of ``pallas_kernels.aot.cards``), ``config`` (keywords of :class:`~glm_jax.Config`),
            ``storage`` (of :meth:`glm_jax.weights.storage.Storage.to_json`) or ``quantize`` (a preset), ``batch``,
            ``context``, ``cache_dtype``, ``sampling`` (options of :class:`~glm_jax.SamplingParams`; greedy unless
            given), and ``devices`` (how many of the card; one unless given).
    """
    cfg = Config(**{key: _to_hashable(value) for key, value in spec["config"].items()})
    card = aot.find_gpu_spec(spec["gpu"])
    rules, mesh, place = _make_sharding(card, spec.get("devices", 1))
    params = _abstract_tiled_params(cfg, spec.get("quantize"), spec.get("storage"))
    params = _with_sharding(params, place) if mesh is None else _shard_params(cfg, params, rules, mesh)
    batch, slots = bucket_size(spec["batch"]), min(bucket_size(spec["context"], 256), cfg.max_position_embeddings)
    state = _with_sharding(
        _abstract_decode_state(cfg, batch, slots, spec["cache_dtype"], spec.get("sampling", {})), place
    )
    with compiling_for(card.target), contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
        found = compile_decode_loop(GLM(cfg, rules), params, state, place)
    return {**found, "gpu": card.name, "fits": found["argument_bytes"] + found["temp_bytes"] <= card.memory}


def compile_decode_loop(model: GLM, params: ParamTree, state: DecodeState, sharding: Any) -> dict[str, Any]:
    """What XLA makes of the generation loop: launches, graphs, memory. Nothing runs.

    Args:
        model: the module.
        params: arrays, or their shapes with shardings.
        state: likewise.
        sharding: of what is not split.
    """
    program = jax.jit(decode_program, static_argnames=("model", "steps"), donate_argnames="state")
    limit = jax.ShapeDtypeStruct((), jnp.int32, sharding=sharding)
    options = MULTI_GPU_CUDA_GRAPH_OPTIONS if model.rules.mesh_axes else CUDA_GRAPH_OPTIONS
    report = aot.compile_traced(program.trace(model, params, state, limit, steps=_DECODE_STEPS), options)
    launches = report.launches()
    names = Counter(launch.name or launch.kind for launch in launches)
    return {
        "launches_per_token": len(launches),
        "kernels": dict(names.most_common()),
        "copies_per_token": sum(launch.kind == "kCopy" for launch in launches),
        "graph_pieces": report.num_cuda_graphs,
        "launches_outside_graphs": report.num_ungraphed_launches,
        "collectives": report.collectives,
        "argument_bytes": report.argument_bytes,
        "alias_bytes": report.alias_bytes,
        "cache_bytes": sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state.cache)),
        "temp_bytes": report.temp_bytes,
    }


def _make_sharding(card: aot.GpuSpec, count: int) -> tuple[Rules, Mesh | None, Any]:
    """How a model lies on so many cards, and where what is not split lies."""
    devices = aot.topology_devices(card, count)
    if count == 1:
        return Rules(), None, SingleDeviceSharding(devices[0])
    mesh = Mesh(np.array(devices).reshape(1, count), MESH_AXES, axis_types=(AxisType.Explicit,) * 2)
    return get_sharding_preset("latency"), mesh, NamedSharding(mesh, jax.P())


def _shard_params(cfg: Config, params: ParamTree, rules: Rules, mesh: Mesh) -> ParamTree:
    """Parameters split over a mesh."""
    held = dict(leaves_with_path(params))

    def placed(path: Any, param: Any) -> Any:
        specs = partition_specs(held[path], param, rules)
        return jax.tree.map(
            lambda x, spec: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec)),
            held[path],
            specs,
        )

    known = param_specs(cfg)
    return map_specs(placed, {name: known[name] for name in params})


def compile_prefill(spec: Mapping[str, Any]) -> dict[str, Any]:
    """One chunk of a prompt for one card.

    Args:
        spec: as for :func:`compile_decode`, without ``sampling``, and with ``chunk``, the tokens of it.
    """
    cfg = Config(**{key: _to_hashable(value) for key, value in spec["config"].items()})
    card = aot.find_gpu_spec(spec["gpu"])
    place = SingleDeviceSharding(aot.topology_devices(card)[0])
    params = _with_sharding(_abstract_tiled_params(cfg, spec.get("quantize"), spec.get("storage")), place)
    batch, slots = bucket_size(spec["batch"]), min(bucket_size(spec["context"], 256), cfg.max_position_embeddings)
    cache = jax.eval_shape(lambda: LatentCache.create(cfg, batch, slots, spec["cache_dtype"]))
    tokens = jax.ShapeDtypeStruct((batch, spec["chunk"]), jnp.int32)
    logits = jax.ShapeDtypeStruct((batch, cfg.vocab_size), jnp.float32)
    start, lengths = jax.ShapeDtypeStruct((), jnp.int32), jax.ShapeDtypeStruct((batch,), jnp.int32)
    given = _with_sharding((cache, logits, tokens, start, lengths), place)
    with compiling_for(card.target):
        program = jax.jit(prefill_program, static_argnames="model", donate_argnames=("cache", "logits"))
        report = aot.compile_traced(program.trace(GLM(cfg), params, *given), CUDA_GRAPH_OPTIONS)
    names = Counter(thunk.name or thunk.kind for thunk in report.thunks)
    return {
        "gpu": card.name,
        "kernels": dict(names.most_common()),
        "graph_pieces": report.num_cuda_graphs,
        "argument_bytes": report.argument_bytes,
        "alias_bytes": report.alias_bytes,
        "cache_bytes": sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache)),
        "temp_bytes": report.temp_bytes,
        "fits": report.argument_bytes + report.temp_bytes <= card.memory,
    }


def _to_hashable(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _abstract_tiled_params(cfg: Config, quantize: str | None, storage: Any) -> ParamTree:
    """Shapes and dtypes of the parameters in tiles, without the prediction layer."""
    rules = QuantRules.resolve(quantize)
    if rules:
        planned = plan_storage(cfg, rules)[0]
    else:
        planned = Storage.from_json(storage or [])
    params = abstract_params(cfg, jnp.bfloat16, storage=planned)
    params.pop("mtp", None)
    return jax.eval_shape(tile_params, _without_bfloat16_bits(params))


def _without_bfloat16_bits(tree: ParamTree) -> ParamTree:
    """CPUs hold bfloat16 matrices as integers; GPUs do not."""

    def unfolded(leaf: Any) -> Any:
        return jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16) if isinstance(leaf, Bfloat16Bits) else leaf

    return jax.tree.map(unfolded, tree, is_leaf=lambda x: isinstance(x, Bfloat16Bits | QuantizedTensor))


def _abstract_decode_state(
    cfg: Config, batch: int, slots: int, cache_dtype: str, sampling: Mapping[str, Any]
) -> DecodeState:
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
    rows: Any = {"tokens": number, "positions": number, "remaining": number, "done": flag, "finite": flag}
    return DecodeState(cache=cache, sampler=sampler, **rows)


def _with_sharding(tree: Any, sharding: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)

"""Compiles the engine's programs ahead of time for a GPU that this machine need not have.

Runs in a child process (:func:`pallas_kernels.aot.run_in_child`), so arguments and results are plain JSON values. The
entry points are ``"glm_jax.engine.aot:compile_decode"`` and ``"glm_jax.engine.aot:compile_prefill"``.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, Sharding, SingleDeviceSharding

from glm_jax.cache.latent import LatentCache
from glm_jax.config import Config
from glm_jax.engine.runner import MAX_DECODE_STEPS
from glm_jax.engine.steps import DecodeState, bucket_size, decode_program, prefill_program
from glm_jax.model.glm import GLM
from glm_jax.sampling import SamplerState, SamplingParams
from glm_jax.sharding import MESH_AXES, Rules, get_sharding_preset
from glm_jax.weights import QuantRules, Weight, as_weight_matrix
from glm_jax.weights.params import ParamPath, ParamTree, leaves_with_path, map_with_path, param_specs
from glm_jax.weights.storage import Storage, abstract_params, partition_specs, plan_storage
from glm_jax.weights.tiling import tile_params
from pallas_kernels import CUDA_GRAPH_OPTIONS, MULTI_GPU_CUDA_GRAPH_OPTIONS, aot, compiling_for

_Tree = TypeVar("_Tree")


def compile_decode(spec: Mapping[str, Any]) -> dict[str, Any]:
    """Compiles the decode loop for a GPU.

    Args:
        spec: JSON object with these keys. ``gpu``: name of a GPU in :func:`pallas_kernels.aot.load_gpu_specs`.
            ``config``: keywords of :class:`~glm_jax.Config`. ``storage``: output of
            :meth:`glm_jax.weights.storage.Storage.to_json`, or instead ``quantize``: name of a preset. ``batch``:
            number of sequences. ``context``: tokens per sequence. ``cache_dtype``: dtype of the latent cache. Optional:
            ``sampling``: options of :class:`~glm_jax.SamplingParams`, greedy by default, and ``devices``: number of
            GPUs, 1 by default.

    Returns:
        The report of :func:`compile_decode_loop`, the name of the GPU as ``gpu``, and ``fits``: whether arguments and
        temporaries fit into its memory.
    """
    cfg, gpu = _parse_config(spec), aot.find_gpu_spec(spec["gpu"])
    rules, mesh, replicated = _make_sharding(gpu, spec.get("devices", 1))
    params = _abstract_tiled_params(cfg, spec.get("quantize"), spec.get("storage"))
    params = _with_sharding(params, replicated) if mesh is None else _shard_params(cfg, params, rules, mesh)
    batch, slots = _batch_and_slots(spec, cfg)
    abstract_state = _abstract_decode_state(cfg, batch, slots, spec["cache_dtype"], spec.get("sampling", {}))
    state = _with_sharding(abstract_state, replicated)
    with compiling_for(gpu.target), contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
        report = compile_decode_loop(GLM(cfg, rules), params, state, replicated)
    return {**report, "gpu": gpu.name, "fits": report["argument_bytes"] + report["temp_bytes"] <= gpu.memory}


def compile_decode_loop(model: GLM, params: ParamTree, state: DecodeState, replicated: Sharding) -> dict[str, Any]:
    """Compiles the decode loop without running it, and reports kernel launches, CUDA graphs and memory.

    Args:
        model: Module.
        params: Parameters, or their shapes with shardings.
        state: State of the batch, or its shapes with shardings.
        replicated: Sharding of the arrays that are not split.

    Returns:
        A JSON object; bytes are those on one device.
    """
    program = jax.jit(decode_program, static_argnames=("model", "steps"), donate_argnames="state")
    limit = jax.ShapeDtypeStruct((), jnp.int32, sharding=replicated)
    options = MULTI_GPU_CUDA_GRAPH_OPTIONS if model.rules.mesh_axes else CUDA_GRAPH_OPTIONS
    report = aot.compile_traced(program.trace(model, params, state, limit, steps=MAX_DECODE_STEPS), options)
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


def _make_sharding(gpu: aot.GpuSpec, count: int) -> tuple[Rules, Mesh | None, Sharding]:
    """Sharding rules and mesh of a model on ``count`` GPUs, and the sharding of the arrays that are not split."""
    devices = aot.topology_devices(gpu, count)
    if count == 1:
        return Rules(), None, SingleDeviceSharding(devices[0])
    mesh = Mesh(np.array(devices).reshape(1, count), MESH_AXES, axis_types=(AxisType.Explicit,) * 2)
    return get_sharding_preset("latency"), mesh, NamedSharding(mesh, jax.P())


def _shard_params(cfg: Config, params: ParamTree, rules: Rules, mesh: Mesh) -> ParamTree:
    """Shapes of the parameters, with their shardings on a mesh."""
    specs, leaves = param_specs(cfg), dict(leaves_with_path(params))

    def with_sharding(x: jax.ShapeDtypeStruct, spec: jax.P) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))

    return map_with_path(
        lambda path, spec: jax.tree.map(with_sharding, leaves[path], partition_specs(leaves[path], spec, rules)),
        {name: specs[name] for name in params},
    )


def compile_prefill(spec: Mapping[str, Any]) -> dict[str, Any]:
    """Compiles the prefill of one chunk for one GPU.

    Args:
        spec: JSON object with the keys of :func:`compile_decode` except ``sampling`` and ``devices``, and ``chunk``:
            tokens of the chunk.

    Returns:
        A JSON object: kernels, CUDA graphs and memory, the name of the GPU, and whether the program fits.
    """
    cfg, gpu = _parse_config(spec), aot.find_gpu_spec(spec["gpu"])
    sharding = SingleDeviceSharding(aot.topology_devices(gpu)[0])
    params = _with_sharding(_abstract_tiled_params(cfg, spec.get("quantize"), spec.get("storage")), sharding)
    batch, slots = _batch_and_slots(spec, cfg)
    cache = jax.eval_shape(lambda: LatentCache.create(cfg, batch, slots, spec["cache_dtype"]))
    tokens = jax.ShapeDtypeStruct((batch, spec["chunk"]), jnp.int32)
    logits = jax.ShapeDtypeStruct((batch, cfg.vocab_size), jnp.float32)
    start, lengths = jax.ShapeDtypeStruct((), jnp.int32), jax.ShapeDtypeStruct((batch,), jnp.int32)
    inputs = _with_sharding((cache, logits, tokens, start, lengths), sharding)
    with compiling_for(gpu.target):
        program = jax.jit(prefill_program, static_argnames="model", donate_argnames=("cache", "logits"))
        report = aot.compile_traced(program.trace(GLM(cfg), params, *inputs), CUDA_GRAPH_OPTIONS)
    names = Counter(thunk.name or thunk.kind for thunk in report.thunks)
    return {
        "gpu": gpu.name,
        "kernels": dict(names.most_common()),
        "graph_pieces": report.num_cuda_graphs,
        "argument_bytes": report.argument_bytes,
        "alias_bytes": report.alias_bytes,
        "cache_bytes": sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache)),
        "temp_bytes": report.temp_bytes,
        "fits": report.argument_bytes + report.temp_bytes <= gpu.memory,
    }


def _parse_config(spec: Mapping[str, Any]) -> Config:
    """The config of a JSON object, whose lists become tuples because a config is hashable."""
    keywords: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value for key, value in spec["config"].items()
    }
    return Config(**keywords)


def _batch_and_slots(spec: Mapping[str, Any], cfg: Config) -> tuple[int, int]:
    """Batch size and cache capacity."""
    return bucket_size(spec["batch"]), min(bucket_size(spec["context"], 256), cfg.max_position_embeddings)


def _abstract_tiled_params(cfg: Config, quantize: str | None, storage: Any) -> ParamTree:
    """Shapes of the tiled parameters, without the prediction layer; ``storage`` is JSON."""
    rules = QuantRules.resolve(quantize)
    planned = plan_storage(cfg, rules)[0] if rules else Storage.from_json(storage or [])
    params = abstract_params(cfg, jnp.bfloat16, storage=planned)
    params.pop("mtp", None)
    return jax.eval_shape(tile_params, _without_bfloat16_bits(params))


def _without_bfloat16_bits(tree: ParamTree) -> ParamTree:
    """Shapes of the parameters on a GPU: plain bfloat16 arrays where a CPU holds :class:`Bfloat16Bits`."""

    def unwrap(_: ParamPath, leaf: Weight) -> Weight | jax.ShapeDtypeStruct:
        is_quantized = as_weight_matrix(leaf).quant_spec is not None
        return leaf if is_quantized else jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)

    return map_with_path(unwrap, tree)


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
    cache = jax.eval_shape(lambda: LatentCache.create(cfg, batch, slots, cache_dtype))
    integers, flags = jnp.zeros(batch, jnp.int32), jnp.zeros(batch, bool)
    return DecodeState(
        cache=cache,
        tokens=integers,
        positions=integers,
        remaining=integers,
        done=flags,
        finite=flags,
        sampler=sampler,
    )


def _with_sharding(tree: _Tree, sharding: Sharding) -> _Tree:
    """The shapes of a tree of arrays or shapes, with a sharding."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)

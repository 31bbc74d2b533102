"""Compiling programs for a GPU that is not here, and reading what XLA made of them.

XLA's plugin for CUDA compiles for a description of a card (``targets.json``) as well as for a card: the result has the
binary of every kernel, the list of launches, what of it is one CUDA graph, and the memory it needs. It does not tell
how fast it is: nothing runs, and nothing is tuned.

The plugin must not be loaded into a process that has other things to do, so this is done in a child::

    report = run_in_child("glm_jax.engine.aot:compile_decode", {"gpu": "h100", ...})

which calls ``compile_decode(argument)`` of ``glm_jax.engine.aot`` there and gives back what it returns.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.util
import json
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache

from pallas_kernels._device import Target

_PLUGIN = "jax_plugins.xla_cuda13"
# Kinds of thunks that start something on the device by themselves.
_CONTAINER_THUNKS = frozenset(["kWhile", "kCommandBuffer", "kConditional", "kSequential"])
_COLLECTIVES = re.compile(r"k(AllReduce|AllGather|ReduceScatter|AllToAll|CollectivePermute|CollectiveKernel)\w*")
_THUNK = re.compile(r"(?P<indent> *)\d+: (?P<kind>k\w+) *\[[^\]]*\] *(?P<rest>.*)")
_LOOP_BODY = re.compile(r"(?P<indent> *)body:")
_CHILD_ENV = {"JAX_PLATFORMS": "cpu", "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1", "TF_CPP_MIN_LOG_LEVEL": "3"}


class AotError(Exception):
    """A program could not be compiled for a card that is not here."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class GpuSpec:
    """What XLA must know of a GPU; sizes in bytes.

    Attributes:
        name: as JAX calls it.
        capability: 89 for 8.9.
        accelerated: whether instructions of this one architecture may be used (``sm_90a``).
        multiprocessors: number of them.
        threads_per_multiprocessor: at once.
        shared_memory_per_multiprocessor: of which a program may have:
        shared_memory_per_block: this much.
        l2_cache: size.
        clock_ghz: highest.
        memory: size.
        bandwidth: of it, per second.
        links: of NVLink.
        source: where the numbers are from.
    """

    name: str
    capability: int
    accelerated: bool
    multiprocessors: int
    threads_per_multiprocessor: int
    shared_memory_per_multiprocessor: int
    shared_memory_per_block: int
    l2_cache: int
    clock_ghz: float
    memory: int
    bandwidth: int
    links: int
    source: str

    @property
    def target(self) -> Target:
        """For the kernels."""
        return Target(self.name, self.capability, self.multiprocessors)

    def target_config_text(self) -> str:
        """XLA's ``GpuTargetConfigProto`` as text."""
        major, minor = divmod(self.capability, 10)
        extension = "ACCELERATED_FEATURES" if self.accelerated else "NONE"
        links = f"device_interconnect_info {{ active_links: {self.links} }}" if self.links else ""
        return f"""gpu_device_info {{
            threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
            shared_memory_per_core: {self.shared_memory_per_multiprocessor}
            threads_per_core_limit: {self.threads_per_multiprocessor} core_count: {self.multiprocessors}
            fpus_per_core: 128 block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
            memory_bandwidth: {self.bandwidth} l2_cache_size: {self.l2_cache} clock_rate_ghz: {self.clock_ghz}
            device_memory_size: {self.memory} shared_memory_per_block_optin: {self.shared_memory_per_block}
            cuda_compute_capability {{ major: {major} minor: {minor} feature_extension: {extension} }}
            registers_per_core_limit: 65536 registers_per_block_limit: 65536
            driver_version: "13.0.0" runtime_version: "13.0.0" compile_time_toolkit_version: "13.0.0"
            dnn_version: "9.10.0" name: "{self.name}" {links}
        }}
        platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 10 }} device_description_str: "{self.name}"
        """


@functools.cache
def load_gpu_specs() -> dict[str, GpuSpec]:
    """Every card that programs can be compiled for, by its short name."""
    described = json.loads((Path(__file__).parent / "targets.json").read_text(encoding="utf-8"))
    return {name: GpuSpec(**fields) for name, fields in described.items()}


def find_gpu_spec(name: str) -> GpuSpec:
    """A card by its short name.

    Raises:
        AotError: listing those there are.
    """
    if name not in load_gpu_specs():
        raise AotError(f"no description of a GPU called {name!r}; there are {', '.join(load_gpu_specs())}")
    return load_gpu_specs()[name]


def missing_requirement() -> str | None:
    """What must be installed before anything can be compiled; None if it is there."""
    beside = _plugin_dir().joinpath(*_PLUGIN.split(".")).is_dir()
    absent = [name for name in ("triton", _PLUGIN) if not _is_installed(name) and not (name == _PLUGIN and beside)]
    return f"compiling for a GPU needs {' and '.join(absent)}: install glm-jax[aot]" if absent else None


def _plugin_dir() -> Path:
    """Where ``make venv`` puts the plugin: beside the packages, since JAX loads it wherever it finds it."""
    return Path(sys.prefix) / "aot"


def _is_installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


def topology_devices(gpu: GpuSpec, count: int = 1) -> Sequence[Any]:
    """Devices to compile for, which cannot run anything; only in a child (:func:`run_in_child`)."""
    from jax.experimental import topologies

    described: Any = topologies.get_topology_desc(
        platform="cuda", topology_name="", target_config=gpu.target_config_text(), topology=f"1x1x{count}"
    )
    return described.devices


@dataclasses.dataclass(frozen=True, slots=True)
class Thunk:
    """Something that XLA does on the device.

    Attributes:
        kind: such as ``kCustomKernel`` or ``kCopy``.
        name: of a kernel.
        loop_depth: how many loops it is in the body of.
        graph_depth: in how many CUDA graphs it is (one of them, where it is part of one).
    """

    kind: str
    name: str
    loop_depth: int
    graph_depth: int


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class CompileReport:
    """What became of a program.

    Attributes:
        thunks: in order, containers included.
        argument_bytes: of its inputs, on one device.
        output_bytes: of its outputs.
        alias_bytes: of the outputs that take the place of inputs.
        temp_bytes: that it needs besides.
    """

    thunks: tuple[Thunk, ...]
    argument_bytes: int
    output_bytes: int
    alias_bytes: int
    temp_bytes: int

    def launches(self, loop_depth: int = 1) -> list[Thunk]:
        """What is started on the device in the bodies of so many nested loops: kernels, copies, collectives."""
        return [
            thunk for thunk in self.thunks if thunk.loop_depth == loop_depth and thunk.kind not in _CONTAINER_THUNKS
        ]

    @property
    def num_cuda_graphs(self) -> int:
        """CUDA graphs."""
        return sum(thunk.kind == "kCommandBuffer" for thunk in self.thunks)

    @property
    def num_ungraphed_launches(self) -> int:
        """Launches in no graph."""
        return sum(not thunk.graph_depth and thunk.kind not in _CONTAINER_THUNKS for thunk in self.thunks)

    @property
    def collectives(self) -> list[str]:
        """Kinds of collective operations, in order."""
        return [thunk.kind for thunk in self.thunks if _COLLECTIVES.fullmatch(thunk.kind)]


def compile_traced(traced: Any, options: Mapping[str, Any] | None = None) -> CompileReport:
    """Compiles what ``jax.jit(f).trace(...)`` gave, its arguments lying on :func:`topology_devices` or on a device at hand."""
    with tempfile.TemporaryDirectory() as folder, _compilation_cache_disabled():
        lowered = traced.lower(lowering_platforms=("cuda",))
        compiled = lowered.compile(compiler_options={**(options or {}), "xla_dump_to": folder})
        sizes = compiled.memory_analysis()
        return CompileReport(
            thunks=tuple(parse_thunks(_thunk_file(Path(folder)))),
            argument_bytes=sizes.argument_size_in_bytes,
            output_bytes=sizes.output_size_in_bytes,
            alias_bytes=sizes.alias_size_in_bytes,
            temp_bytes=sizes.temp_size_in_bytes,
        )


@contextlib.contextmanager
def _compilation_cache_disabled() -> Iterator[None]:
    """Without JAX's persistent cache: a program that is found there is not compiled, and leaves no list of launches."""
    config: Any = jax.config  # its options are made at run time
    before = config.jax_enable_compilation_cache
    config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()  # it is asked once whether it is in use
    try:
        yield
    finally:
        config.update("jax_enable_compilation_cache", before)
        compilation_cache.reset_cache()


def _thunk_file(folder: Path) -> str:
    """The list as it runs: after XLA's passes over it, if they changed anything."""
    for pattern in ("*thunk_sequence_after_thunk_passes.txt", "*thunk_sequence.txt"):
        files = sorted(folder.glob(pattern), key=lambda path: path.stat().st_size)
        if files:
            return files[-1].read_text(encoding="utf-8")
    raise AotError("XLA left no list of launches; this version of JAX is not one that is known to work")


def parse_thunks(text: str) -> Iterator[Thunk]:
    """XLA's list of what it will do. Deeper lines belong to the ``body:`` or the container above them."""
    bodies: list[int] = []
    graphs: list[int] = []
    for line in text.splitlines():
        if match := _LOOP_BODY.fullmatch(line.rstrip()):
            # A body is written at the depth of its loop or one further; what is in it comes deeper still.
            indent = len(match["indent"])
            bodies = [depth for depth in bodies if depth < indent] + [indent]
            continue
        match = _THUNK.match(line)
        if not match:
            continue
        indent = len(match["indent"])
        bodies = [depth for depth in bodies if depth < indent]
        graphs = [depth for depth in graphs if depth < indent]
        yield Thunk(match["kind"], match["rest"].split(" ", 1)[0], len(bodies), len(graphs))
        if match["kind"] == "kCommandBuffer":
            graphs.append(indent)


def run_in_child(function: str, argument: Mapping[str, Any], timeout: float = 900) -> Any:
    """Calls ``module:function`` with plain values in a process that has XLA's plugin, and gives back what it returns.

    Raises:
        AotError: if something is not installed, or the call fails.
    """
    if problem := missing_requirement():
        raise AotError(problem)
    paths = [str(_plugin_dir()), os.environ.get("PYTHONPATH")]
    done = subprocess.run(
        [sys.executable, "-m", __name__, function],
        input=json.dumps(argument),
        env={**os.environ, **_CHILD_ENV, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    if done.returncode:
        raise AotError(f"compiling failed: {_last_line(done.stderr)}")
    return json.loads(done.stdout.splitlines()[-1])


def _last_line(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith(("E0000", "W0000", "I0000"))]
    errors = [line for line in lines if re.match(r"[\w.]*(Error|Exception)\b", line)]
    return (errors or lines or ["no reason given"])[-1]


def main() -> None:
    """The child's side of :func:`run_in_child`."""
    function = pkgutil.resolve_name(sys.argv[1])
    print(json.dumps(function(json.load(sys.stdin))))


if __name__ == "__main__":
    main()

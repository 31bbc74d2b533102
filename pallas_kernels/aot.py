"""Compiles programs for a GPU that is absent, and reports what XLA launches on it.

XLA's plugin for CUDA compiles for the description of a GPU (``targets.json``) as well as for a GPU. The result has the
binary of every kernel, the list of launches with the CUDA graphs they are in, and the memory needed. It does not show
speed: nothing runs, and nothing is tuned.

The plugin must not be loaded into a process with other work, so a child process compiles::

    report = run_in_child("glm_jax.engine.aot:compile_decode", {"gpu": "h100", ...})

which calls ``compile_decode(argument)`` of ``glm_jax.engine.aot`` there and returns its result.
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
from jax.experimental import topologies
from jax.experimental.compilation_cache import compilation_cache

from pallas_kernels._device import Target

_PLUGIN = "jax_plugins.xla_cuda13"
# Kinds of thunks that contain others and launch nothing themselves.
_CONTAINER_THUNKS = frozenset(["kWhile", "kCommandBuffer", "kConditional", "kSequential"])
_COLLECTIVES = re.compile(r"k(AllReduce|AllGather|ReduceScatter|AllToAll|CollectivePermute|CollectiveKernel)\w*")
_THUNK = re.compile(r"(?P<indent> *)\d+: (?P<kind>k\w+) *\[[^\]]*\] *(?P<rest>.*)")
_LOOP_BODY = re.compile(r"(?P<indent> *)body:")
_CHILD_ENV = {"JAX_PLATFORMS": "cpu", "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1", "TF_CPP_MIN_LOG_LEVEL": "3"}


class AotError(Exception):
    """A program could not be compiled for an absent GPU."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class GpuSpec:
    """Properties of a GPU that XLA compiles for; sizes in bytes.

    Attributes:
        name: JAX's name of the device.
        capability: Ten times the compute capability: 89 for 8.9.
        accelerated: Whether architecture-specific instructions may be used (``sm_90a``).
        multiprocessors: Number of streaming multiprocessors.
        threads_per_multiprocessor: Resident threads of a multiprocessor.
        shared_memory_per_multiprocessor: Shared memory of a multiprocessor.
        shared_memory_per_block: Shared memory that one program may request.
        l2_cache: Size of the L2 cache.
        clock_ghz: Highest clock.
        memory: Size of the memory.
        bandwidth: Memory bandwidth, bytes per second.
        links: Number of NVLink connections.
        source: Source of the numbers.
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
        """Target of the kernels."""
        return Target(self.name, self.capability, self.multiprocessors)

    def target_config_text(self) -> str:
        """Returns XLA's ``GpuTargetConfigProto`` as text."""
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
    """Returns every GPU that programs can be compiled for, by its short name."""
    specs = json.loads((Path(__file__).parent / "targets.json").read_text(encoding="utf-8"))
    return {name: GpuSpec(**fields) for name, fields in specs.items()}


def find_gpu_spec(name: str) -> GpuSpec:
    """Returns a GPU by its short name.

    Raises:
        AotError: For an unknown name, listing the known ones.
    """
    if name not in load_gpu_specs():
        raise AotError(f"no description of a GPU called {name!r}; there are {', '.join(load_gpu_specs())}")
    return load_gpu_specs()[name]


def missing_requirement() -> str | None:
    """Returns which packages are missing for compiling, or ``None`` if all are there."""
    has_plugin = _is_installed(_PLUGIN) or _plugin_dir().joinpath(*_PLUGIN.split(".")).is_dir()
    absent = [name for name, found in (("triton", _is_installed("triton")), (_PLUGIN, has_plugin)) if not found]
    return f"compiling for a GPU needs {' and '.join(absent)}: install glm-jax[aot]" if absent else None


def _plugin_dir() -> Path:
    """Returns where ``make venv`` installs the plugin: outside of the packages, where JAX would load it always."""
    return Path(sys.prefix) / "aot"


def _is_installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


def topology_devices(gpu: GpuSpec, count: int = 1) -> Sequence[Any]:
    """Returns devices to compile for, which cannot run anything. For a child process only (:func:`run_in_child`)."""
    topology: Any = topologies.get_topology_desc(
        platform="cuda", topology_name="", target_config=gpu.target_config_text(), topology=f"1x1x{count}"
    )
    return topology.devices


@dataclasses.dataclass(frozen=True, slots=True)
class Thunk:
    """A step of XLA's program on the device.

    Attributes:
        kind: XLA's kind, such as ``kCustomKernel`` or ``kCopy``.
        name: Name of the kernel.
        loop_depth: Number of loops whose bodies it is in.
        graph_depth: Number of CUDA graphs it is in.
    """

    kind: str
    name: str
    loop_depth: int
    graph_depth: int


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class CompileReport:
    """A compiled program; sizes are those on one device.

    Attributes:
        thunks: Steps in order, containers included.
        argument_bytes: Bytes of its inputs.
        output_bytes: Bytes of its outputs.
        alias_bytes: Bytes of the outputs that alias inputs.
        temp_bytes: Bytes of its temporary memory.
    """

    thunks: tuple[Thunk, ...]
    argument_bytes: int
    output_bytes: int
    alias_bytes: int
    temp_bytes: int

    def launches(self, loop_depth: int = 1) -> list[Thunk]:
        """Returns the launches in the bodies of ``loop_depth`` nested loops: kernels, copies, collectives."""
        return [
            thunk for thunk in self.thunks if thunk.loop_depth == loop_depth and thunk.kind not in _CONTAINER_THUNKS
        ]

    @property
    def num_cuda_graphs(self) -> int:
        """Number of CUDA graphs."""
        return sum(thunk.kind == "kCommandBuffer" for thunk in self.thunks)

    @property
    def num_ungraphed_launches(self) -> int:
        """Number of launches outside of CUDA graphs."""
        return sum(not thunk.graph_depth and thunk.kind not in _CONTAINER_THUNKS for thunk in self.thunks)

    @property
    def collectives(self) -> list[str]:
        """Kinds of collective operations, in order."""
        return [thunk.kind for thunk in self.thunks if _COLLECTIVES.fullmatch(thunk.kind)]


def compile_traced(traced: Any, options: Mapping[str, Any] | None = None) -> CompileReport:
    """Compiles a traced program.

    Args:
        traced: Result of ``jax.jit(f).trace(...)``, with arguments on :func:`topology_devices` or a real device.
        options: Compiler options of XLA.
    """
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
    """Disables JAX's persistent cache: a cached program is not compiled, and leaves no list of launches."""
    config: Any = jax.config  # its options are created at run time
    before = config.jax_enable_compilation_cache
    config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()  # JAX decides once whether the cache is used
    try:
        yield
    finally:
        config.update("jax_enable_compilation_cache", before)
        compilation_cache.reset_cache()


def _thunk_file(folder: Path) -> str:
    """Returns the list of launches, after XLA's passes over it if there were any."""
    for pattern in ("*thunk_sequence_after_thunk_passes.txt", "*thunk_sequence.txt"):
        files = sorted(folder.glob(pattern), key=lambda path: path.stat().st_size)
        if files:
            return files[-1].read_text(encoding="utf-8")
    raise AotError("XLA left no list of launches; this version of JAX is not one that is known to work")


def parse_thunks(text: str) -> Iterator[Thunk]:
    """Parses XLA's list of launches. Indented lines belong to the ``body:`` or the container above them."""
    bodies: list[int] = []
    graphs: list[int] = []
    for line in text.splitlines():
        if match := _LOOP_BODY.fullmatch(line.rstrip()):
            # A body is written at the depth of its loop or one further, and its contents deeper still.
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
    """Calls ``module:function`` with plain values in a child process that has XLA's plugin, and returns the result.

    Raises:
        AotError: If a package is missing or the call fails.
    """
    if problem := missing_requirement():
        raise AotError(problem)
    paths = [str(_plugin_dir()), os.environ.get("PYTHONPATH")]
    result = subprocess.run(
        [sys.executable, "-m", __name__, function],
        input=json.dumps(argument),
        env={**os.environ, **_CHILD_ENV, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    if result.returncode:
        raise AotError(f"compiling failed: {_last_line(result.stderr)}")
    return json.loads(result.stdout.splitlines()[-1])


def _last_line(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith(("E0000", "W0000", "I0000"))]
    errors = [line for line in lines if re.match(r"[\w.]*(Error|Exception)\b", line)]
    return (errors or lines or ["no reason given"])[-1]


def main() -> None:
    """Runs the child's side of :func:`run_in_child`."""
    function = pkgutil.resolve_name(sys.argv[1])
    print(json.dumps(function(json.load(sys.stdin))))


if __name__ == "__main__":
    main()

"""Imports point down only: between levels, between packages, and between the parts of a package."""

import ast
from graphlib import CycleError, TopologicalSorter

import pytest

from tests.repository.product_code import FILES, GRAPH, ROOT, TREES

# A module's level is that of the longest prefix of its name in this table. ARCHITECTURE.md prints the same table.
LEVELS = {
    "convert": 8,
    "glm_jax": 7,  # the facade: looks names up lazily, and nothing in glm_jax may import it
    **{f"glm_jax.{name}": 6 for name in ("generate", "plan", "batch", "serve", "bench", "cli")},
    **{f"glm_jax.{name}": 5 for name in ("llm", "engine")},
    **{f"glm_jax.{name}": 4 for name in ("checkpoint", "memory")},
    **{f"glm_jax.{name}": 3 for name in ("model", "sampling", "text")},
    "glm_jax.ops": 2,
    **{f"glm_jax.{name}": 1 for name in ("weights", "cache", "config", "config_validation", "sharding", "errors")},
    "pallas_kernels": 0,
}
MAX_LOOSE_FILES = 10
MAX_LOCAL_IMPORTS = 15


def level(module: str) -> int | None:
    """The level of a product module, or None for a part of glm_jax that the table does not list."""
    name = module
    while name not in LEVELS:
        name = name.rpartition(".")[0]
        if name in ("", "glm_jax"):
            return None
    return LEVELS[name]


def test_every_module_has_a_level():
    unlisted = [module for module in FILES if level(module) is None]
    assert not unlisted, f"give these a level in LEVELS and in ARCHITECTURE.md: {unlisted}"


def test_imports_point_down():
    upward = [
        f"{module} (L{level(module)}) imports {target} (L{level(target)})"
        for module, targets in GRAPH.items()
        for target in sorted(targets)
        if (level(target) or 0) > (level(module) or 0)
    ]
    assert not upward, "\n".join(upward)


# ---------------------------------------------------------------------------------------------- cycles


def find_cycle(graph: dict[str, set[str]]) -> list[str] | None:
    try:
        tuple(TopologicalSorter(graph).static_order())
    except CycleError as error:
        return error.args[1]
    return None


def parts_graph(package: str) -> dict[str, set[str]]:
    """Imports between the direct parts of a package, modules and subpackages; "" means the three packages.

    The package's own ``__init__`` is left out: it re-exports its parts.
    """
    prefix = f"{package}." if package else ""

    def part(module: str) -> str:
        return module.removeprefix(prefix).split(".")[0]

    inside = {module for module in FILES if module.startswith(prefix) and module != package}
    graph: dict[str, set[str]] = {part(module): set() for module in inside}
    for module in inside:
        graph[part(module)] |= {part(target) for target in GRAPH[module] & inside} - {part(module)}
    return graph


def test_no_cycle_between_modules():
    cycle = find_cycle(GRAPH)
    assert cycle is None, " <- ".join(cycle)


@pytest.mark.parametrize("package", ["", *(module for module, path in FILES.items() if path.name == "__init__.py")])
def test_no_cycle_between_the_parts_of_a_package(package):
    cycle = find_cycle(parts_graph(package))
    assert cycle is None, " <- ".join(cycle)


def test_the_cycle_test_sees_a_cycle():
    assert find_cycle({"a": {"b"}, "b": {"c"}, "c": set()}) is None
    assert set(find_cycle({"a": {"b"}, "b": {"c"}, "c": {"a"}})) == {"a", "b", "c"}


def test_few_files_lie_outside_the_packages_of_glm_jax():
    loose = [path.name for path in (ROOT / "glm_jax").glob("*.py")]
    assert len(loose) <= MAX_LOOSE_FILES, loose


# ------------------------------------------------------------------------------------- local imports

# Modules with imports inside functions, and the reason for these imports.
LOCAL_IMPORTS = {
    "convert.__main__": "the conversion imports JAX, which --help and usage errors need not wait for",
    "convert.verify.__main__": "the measurements import JAX, which --help and usage errors need not wait for",
    "convert.calibrate.signround": "optax takes half a second, and only learned rounding needs it",
    "glm_jax.bench.__main__": "the benchmarks import JAX, which --help need not wait for",
    "glm_jax.bench.transformers_backend": "torch and transformers are in an optional extra",
    "glm_jax.checkpoint.folder.arrays": "Orbax takes a second, and only saving needs it",
    "glm_jax.checkpoint.formats.gguf.blocks": "gguf is an optional extra",
    "glm_jax.checkpoint.sources.hub": "the hub's HTTP client is slow to import, and only hub ids need it",
    "glm_jax.generate": "the model imports JAX, which --help need not wait for",
    "glm_jax.plan.__main__": "the plan imports JAX, which must find its environment set",
    "pallas_kernels._compile": "Triton is an optional extra",
    "pallas_kernels._interpreter": "Triton is an optional extra",
    "pallas_kernels._launch_backends": "jax-triton is an optional extra",
}


def local_imports(module: str) -> list[ast.Import | ast.ImportFrom]:
    """Import statements inside the functions of a module."""
    found = {
        node
        for function in ast.walk(TREES[module])
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        for node in ast.walk(function)
        if isinstance(node, ast.Import | ast.ImportFrom)
    }
    return sorted(found, key=lambda node: node.lineno)


def test_imports_inside_functions_are_few_and_have_a_reason():
    present = {module: len(nodes) for module in FILES if (nodes := local_imports(module))}
    unlisted = sorted(set(present) - set(LOCAL_IMPORTS))
    assert not unlisted, "move these imports to the top of their modules, or list the modules with a reason"
    assert not set(LOCAL_IMPORTS) - set(present), "these modules are listed without need"
    assert sum(present.values()) <= MAX_LOCAL_IMPORTS, present


def test_an_import_inside_a_function_says_why_on_its_line():
    silent = []
    for module in FILES:
        text = FILES[module].read_text(encoding="utf-8").splitlines()
        lines = [node.lineno for node in local_imports(module)]
        # One reason is enough for several imports in a row.
        silent += [f"{module}:{line}" for line in lines if "#" not in text[line - 1] and line - 1 not in lines]
    assert not silent

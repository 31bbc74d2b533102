"""Public names: those of the package, and of the product's classes and functions, which are unique and annotated."""

import ast
from collections import defaultdict
from importlib import import_module

import pytest

import glm_jax
from tests.repository.product_code import FILES, ROOT, TREES, TRITON_FILES, functions

PUBLIC = ["LLM", "SamplingParams", "GLM", "Config", "LatentCache", "Rules", "GlmError", "text"]
MAX_SHARED_FUNCTION_NAMES = 5
# Every folder of kernels has these files, and an operation has one name in all of them.
KERNEL_FILES = {"op.py", "reference.py", "config.py", *TRITON_FILES}
# Functions whose result is of no one type, each with the reason.
MAY_RETURN_ANY = {
    "glm_jax.weights.codes.array_namespace": "numpy and jax.numpy are modules without a common type",
    "glm_jax.weights.dense_weight.DenseWeight.map_axes": "the caller's function decides",
    "glm_jax.weights.storage.partition_specs": "a pytree of the weight's own structure",
    "pallas_kernels.aot.run_in_child": "JSON of the called function",
}


def test_public_names_are_these():
    assert glm_jax.__all__ == PUBLIC
    assert set(PUBLIC) <= set(dir(glm_jax))
    assert glm_jax.__version__.count(".") == 2
    with pytest.raises(AttributeError, match="nonsense"):
        glm_jax.nonsense  # noqa: B018


@pytest.mark.smoke
@pytest.mark.parametrize("name", PUBLIC)
def test_public_name_resolves_and_is_documented(name):
    home = glm_jax._HOMES.get(name, f"glm_jax.{name}")
    value = getattr(glm_jax, name)
    assert value.__doc__
    assert value is (getattr(import_module(home), name) if name in glm_jax._HOMES else import_module(home))


def test_packages_carry_the_typing_marker():
    assert (ROOT / "glm_jax" / "py.typed").is_file()


def modules_by_name(*kinds: type[ast.stmt]) -> dict[str, list[str]]:
    """Public top-level names that several modules define, with these modules."""
    homes: defaultdict[str, list[str]] = defaultdict(list)
    for module, tree in TREES.items():
        for node in tree.body:
            if isinstance(node, kinds) and not node.name.startswith("_"):
                homes[node.name].append(module)
    return {name: modules for name, modules in homes.items() if len(modules) > 1}


def test_no_two_public_classes_share_a_name():
    assert not modules_by_name(ast.ClassDef)


def test_few_public_functions_share_a_name():
    shared = {
        name: modules
        for name, modules in modules_by_name(ast.FunctionDef, ast.AsyncFunctionDef).items()
        if name != "main" and not all(FILES[module].name in KERNEL_FILES for module in modules)
    }
    assert len(shared) <= MAX_SHARED_FUNCTION_NAMES, shared


def parameters(node: ast.FunctionDef | ast.AsyncFunctionDef) -> list[ast.arg]:
    arguments = node.args
    named = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg]
    return [argument for argument in named if argument is not None and argument.arg not in ("self", "cls")]


PUBLIC_FUNCTIONS = [
    function for function in functions() if function.is_public and FILES[function.module].name not in TRITON_FILES
]


def test_public_functions_are_annotated():
    bare = [
        f"{function.module}.{function.qualified_name}"
        for function in PUBLIC_FUNCTIONS
        if function.node.returns is None or any(argument.annotation is None for argument in parameters(function.node))
    ]
    assert not bare


def test_no_public_function_returns_any():
    vague = {
        f"{function.module}.{function.qualified_name}"
        for function in PUBLIC_FUNCTIONS
        if function.node.returns is not None and ast.unparse(function.node.returns) == "Any"
    }
    assert not vague - set(MAY_RETURN_ANY), "name the type, or list the function with a reason"
    assert not set(MAY_RETURN_ANY) - vague, "these are listed without need"

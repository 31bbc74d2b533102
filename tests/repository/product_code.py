"""The product's modules as the repository tests see them: files, syntax trees, imports and definitions."""

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("glm_jax", "convert", "pallas_kernels")
# Triton parses these files itself, and its language has no type annotations.
TRITON_FILES = ("triton.py", "_tile_dot.py", "_dequantize.py")


def _module_files() -> dict[str, Path]:
    files = {}
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return files


FILES = _module_files()
"""Dotted module name -> file, for every module of the three packages."""

TREES = {module: ast.parse(path.read_text(encoding="utf-8")) for module, path in FILES.items()}
"""Dotted module name -> syntax tree."""


def location(module: str, node: ast.AST) -> str:
    return f"{FILES[module].relative_to(ROOT)}:{getattr(node, 'lineno', 0)}"


# --------------------------------------------------------------------------------------------- imports


def names_imported_by(module: str, node: ast.Import | ast.ImportFrom) -> list[str]:
    """Absolute dotted names that one import statement of ``module`` asks for."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    package = module if FILES[module].name == "__init__.py" else module.rpartition(".")[0]
    parts = package.split(".")
    base = ".".join([*parts[: len(parts) - node.level + 1], *filter(None, [node.module])])
    origin = base if node.level else (node.module or "")
    return [f"{origin}.{alias.name}" for alias in node.names]


def imported_names(module: str) -> Iterator[str]:
    """Absolute names that a module imports anywhere, inside functions and for type checking included."""
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield from names_imported_by(module, node)


def owner(name: str) -> str | None:
    """The product module that an imported dotted name comes from, or None when it is foreign."""
    while name:
        if name in FILES:
            return name
        name = name.rpartition(".")[0]
    return None


def _import_graph() -> dict[str, set[str]]:
    return {
        module: {target for name in imported_names(module) if (target := owner(name)) and target != module}
        for module in FILES
    }


GRAPH = _import_graph()
"""Dotted module name -> product modules that it imports."""


# ----------------------------------------------------------------------------------------- definitions


@dataclass(frozen=True)
class Function:
    """One function or method; its qualified name leads from the module through classes and enclosing functions."""

    module: str
    qualified_name: str
    node: ast.FunctionDef | ast.AsyncFunctionDef
    is_nested: bool

    @property
    def is_public(self) -> bool:
        """Whether code outside the module may call it."""
        parts = self.qualified_name.split(".")
        return not self.is_nested and not any(part.startswith("_") for part in parts)


def _functions_in(module: str, node: ast.AST, prefix: str, is_nested: bool) -> Iterator[Function]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            yield Function(module, prefix + child.name, child, is_nested)
            yield from _functions_in(module, child, f"{prefix}{child.name}.", is_nested=True)
        elif isinstance(child, ast.ClassDef):
            yield from _functions_in(module, child, f"{prefix}{child.name}.", is_nested)
        else:
            yield from _functions_in(module, child, prefix, is_nested)


def functions() -> Iterator[Function]:
    """Every function and method of the product."""
    for module, tree in TREES.items():
        yield from _functions_in(module, tree, "", is_nested=False)

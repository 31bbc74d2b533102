"""The repository's own standards: small pieces, no unsafe loading, no work at import, nothing of any one machine."""

import ast
import re
import statistics
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PRODUCT = [
    path for package in ("glm_jax", "convert", "pallas_kernels") for path in sorted((ROOT / package).rglob("*.py"))
]
TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in PRODUCT}

MAX_CLASS_LINES = 200
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 80
MEDIAN_FUNCTION_LINES = 15
MAX_FILE_BYTES = 12 << 20

# Modules that run code found in data, or hide where it came from.
UNSAFE_MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "jsonpickle"}
UNSAFE_BUILTINS = {"eval", "exec", "compile", "__import__"}
# Nothing we ship needs another framework, except the benchmark that runs beside it.
FOREIGN_FRAMEWORKS = {"torch", "transformers", "tensorflow"}
MAY_COMPARE = ROOT / "glm_jax" / "bench"


def where(path: Path, node: ast.AST) -> str:
    return f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}"


def nodes(*kinds: type[ast.AST]) -> Iterator[tuple[Path, ast.AST]]:
    for path, tree in TREES.items():
        yield from ((path, node) for node in ast.walk(tree) if isinstance(node, kinds))


def length(node: ast.stmt) -> int:
    """Lines of a definition without docstrings and overloads: more precise words and types never count against it."""
    explaining = sum(docstring_lines(inner) or overload_lines(inner) for inner in ast.walk(node))
    return node.end_lineno - node.lineno + 1 - explaining


def overload_lines(node: ast.AST) -> int:
    """Lines of a signature that only type checkers read, 0 for anything else."""
    if not isinstance(node, ast.FunctionDef) or "overload" not in map(ast.unparse, node.decorator_list):
        return 0
    return node.end_lineno - node.decorator_list[0].lineno + 1


def docstring_lines(node: ast.AST) -> int:
    """Lines of the docstring of a class or function, 0 for anything else."""
    if not isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        return 0
    first = node.body[0]
    documented = (
        isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str)
    )
    return first.end_lineno - first.lineno + 1 if documented else 0


def too_long(limit: int, *kinds: type[ast.AST]) -> list[str]:
    return [f"{where(path, node)} {node.name}: {length(node)}" for path, node in nodes(*kinds) if length(node) > limit]


def test_classes_are_short():
    assert not (found := too_long(MAX_CLASS_LINES, ast.ClassDef)), found


def test_functions_are_short():
    assert not (found := too_long(MAX_FUNCTION_LINES, ast.FunctionDef, ast.AsyncFunctionDef)), found
    lengths = [length(node) for _, node in nodes(ast.FunctionDef, ast.AsyncFunctionDef)]
    assert statistics.median(lengths) < MEDIAN_FUNCTION_LINES


def test_files_are_short():
    sizes = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in PRODUCT}
    assert not {str(path.relative_to(ROOT)): n for path, n in sizes.items() if n > MAX_FILE_LINES}


def imported(node: ast.AST) -> set[str]:
    names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
    return {name.split(".")[0] for name in names}


def test_nothing_unsafe_is_imported():
    imports = list(nodes(ast.Import, ast.ImportFrom))
    assert not [where(path, node) for path, node in imports if imported(node) & UNSAFE_MODULES]


def test_no_other_framework_is_imported():
    imports = [(path, node) for path, node in nodes(ast.Import, ast.ImportFrom) if imported(node) & FOREIGN_FRAMEWORKS]
    assert not [where(path, node) for path, node in imports if not path.is_relative_to(MAY_COMPARE)]


def unsafe_call(node: ast.Call) -> bool:
    """A call that runs text as code, or reads pickled objects, or goes through a shell."""
    called = ast.unparse(node.func)
    arguments = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
    return (
        called in UNSAFE_BUILTINS
        or called in {"torch.load", "os.system", "os.popen", "yaml.load", "yaml.unsafe_load"}
        or arguments.get("allow_pickle", "False") != "False"
        or arguments.get("shell", "False") != "False"
    )


def test_no_unsafe_call():
    assert not [where(path, node) for path, node in nodes(ast.Call) if unsafe_call(node)]


@pytest.mark.parametrize(
    "call", ["eval(x)", "exec(x)", "torch.load(p)", "np.load(p, allow_pickle=True)", "subprocess.run(c, shell=True)"]
)
def test_the_unsafe_call_test_sees_each_kind(call):
    assert unsafe_call(ast.parse(call, mode="eval").body)


def works_at_import(statement: ast.stmt) -> bool:
    """Whether a top-level statement does more than define, import, assign or register."""
    if isinstance(statement, ast.Expr):
        value = statement.value
        registers = isinstance(value, ast.Call) and re.search(r"(^|[._])register", ast.unparse(value.func))
        return not (registers or isinstance(value, ast.Constant))
    if isinstance(statement, ast.If):
        return ast.unparse(statement.test) not in ("TYPE_CHECKING", "__name__ == '__main__'")
    if isinstance(statement, ast.Try):
        return not all(isinstance(inner, ast.Import | ast.ImportFrom) for inner in statement.body)
    return isinstance(statement, ast.For | ast.While | ast.With | ast.Delete | ast.AsyncFor | ast.AsyncWith)


def test_no_work_at_import():
    assert not [where(path, node) for path, tree in TREES.items() for node in tree.body if works_at_import(node)]


@pytest.mark.parametrize("code", ["jax.config.update('a', 1)", "for x in y: f(x)", "with open(p): pass", "if a: b = 1"])
def test_the_import_work_test_sees_each_kind(code):
    assert works_at_import(ast.parse(code).body[0])


def tracked_files() -> list[Path]:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout")
    return [path for name in listed.stdout.split("\0") if name and (path := ROOT / name).is_file()]


def test_no_large_file_is_tracked():
    assert not {path.name: path.stat().st_size for path in tracked_files() if path.stat().st_size > MAX_FILE_BYTES}


# Written so that this file does not contain what it forbids.
FORBIDDEN = {
    "a machine's own path": r"/(?:root|home/\w+|Users/\w+|work/\w+|opt/\w+)/",
    "a package registry's address": r"(?:py[p]i|pythonhoste[d]|npmj[s])\.(?:org|com)",
    "a package source option": r"--(?:extra-)?index[-]url|--find[-]links",
    "a conflict marker": r"(?m)^(?:<{7}|>{7}) ",
}


@pytest.mark.parametrize("what", FORBIDDEN)
def test_no_tracked_text_holds(what):
    pattern = re.compile(FORBIDDEN[what])
    texts = {path: path.read_bytes() for path in tracked_files()}
    readable = {path: raw.decode("utf-8", "replace") for path, raw in texts.items() if b"\0" not in raw}
    found = {
        str(path.relative_to(ROOT)): match[0] for path, text in readable.items() if (match := pattern.search(text))
    }
    assert not found


def test_constraints_are_exact_pins_and_nothing_else():
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert not [pin for pin in pins if not re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.]+", pin)]
    names = [pin.partition("==")[0].lower().replace("_", "-") for pin in pins]
    assert names == sorted(set(names))
    assert "numpy" in names

"""Importing costs nothing but time: no device, no file, no environment variable, and nothing heavy by the facade."""

import ast
import json
import os
import subprocess
import sys
from importlib import import_module

import pytest

from tests.repository.product_code import FILES, ROOT, TREES, TRITON_FILES, imported_names

# The side of the engine that schedules requests runs without JAX.
NO_JAX = [name for name in ("request", "blocks", "scheduler", "outputs") if f"glm_jax.engine.{name}" in FILES]
# Commands print their help and usage errors without JAX, and some must set its environment first.
COMMANDS = [name for name in FILES if name in ("convert.compare", "glm_jax.generate") or name.endswith(".__main__")]
COMMANDS = [name for name in COMMANDS if name.split(".")[0] != "pallas_kernels"]


def imports_by_name(module: str) -> bool:
    return any(name == "importlib" or name.endswith(".import_module") for name in imported_names(module))


def names_for_type_checkers(module: str) -> dict[str, str]:
    """Public name -> module, as a lazy package declares them under ``TYPE_CHECKING``."""
    blocks = [node for node in TREES[module].body if isinstance(node, ast.If)]
    blocks = [node for node in blocks if ast.unparse(node.test) == "TYPE_CHECKING"]
    imports = [node for block in blocks for node in block.body if isinstance(node, ast.ImportFrom)]
    return {alias.name: node.module or "" for node in imports for alias in node.names}


@pytest.mark.parametrize("module", [module for module in FILES if imports_by_name(module)])
def test_lazy_packages_declare_what_they_import(module):
    """A string passed to import_module escapes the tests of layers unless type checkers see the name too."""
    assert FILES[module].name == "__init__.py", "only packages look their public names up lazily"
    package = import_module(module)
    homes = {name: home if "." in home else f"{module}.{home}" for name, home in package._HOMES.items()}
    submodules = dict.fromkeys(getattr(package, "_MODULES", ()), module)
    assert names_for_type_checkers(module) == {**homes, **submodules}
    assert set(package.__all__) == set(names_for_type_checkers(module))


# Runs in a fresh interpreter. Going outward from an event, the first frame decides: one of our files means that our
# module's top level (or a function that it called) did it; one of the import system means that a library or the loader
# did.
WATCH_IMPORTS = """
import json, os, sys
root, modules = sys.argv[1], sys.argv[2:]
WATCHED = ("open", "os.putenv", "os.unsetenv", "os.listdir", "os.system", "socket.connect", "socket.getaddrinfo",
           "subprocess.Popen")
effects = []

def our_line(frame):
    while frame is not None:
        file = frame.f_code.co_filename
        if file.startswith("<frozen importlib"):
            return None
        if file.startswith(root) and os.sep + "." not in file[len(root) - 1:]:
            return f"{file[len(root):]}:{frame.f_lineno}"
        frame = frame.f_back
    return None

def watch(event, arguments):
    if event in WATCHED and (line := our_line(sys._getframe(1))):
        effects.append(f"{line} {event} {arguments[:1]}")

sys.addaudithook(watch)
effects_of, loaded_by = {}, {}
for module in modules:
    effects.clear()
    before = set(sys.modules)
    __import__(module)
    effects_of[module], loaded_by[module] = list(effects), sorted(set(sys.modules) - before)
print(json.dumps({"effects": effects_of, "loaded": loaded_by}))
"""


def watch_imports(*modules: str, root: str = str(ROOT)) -> dict[str, dict[str, list[str]]]:
    """Imports modules one after the other in a new process; returns the effects of each, and what it loaded."""
    # No such platform exists, so the first question about devices raises.
    environment = {**os.environ, "JAX_PLATFORMS": "no_such_platform", "PYTHONPATH": root}
    done = subprocess.run(
        [sys.executable, "-c", WATCH_IMPORTS, f"{root}{os.sep}", *modules],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.smoke
def test_importing_anything_touches_no_device_sets_nothing_reads_nothing():
    """One process imports everything, the light modules first, so that it also shows what those load."""
    # Triton reads the source of the kernels it compiles; nothing imports such a module before it launches one.
    kernels = [module for module in FILES if FILES[module].name in TRITON_FILES]
    light = ["glm_jax", *(f"glm_jax.engine.{name}" for name in NO_JAX), *COMMANDS]
    others = [m for m in FILES if not m.endswith("__main__") and m not in kernels and m not in light]
    watched = watch_imports(*light, *others)
    assert not {module: effects for module, effects in watched["effects"].items() if effects}
    loaded = watched["loaded"]
    assert not {*kernels, "triton"} & {name for names in loaded.values() for name in names}
    assert not {"jax", "flax"} & {name for module in light for name in loaded[module]}, "neither scheduler nor help"
    assert not {"numpy", "tokenizers"} & set(loaded["glm_jax"])
    assert [name for name in loaded["glm_jax"] if name.startswith("glm_jax")] == ["glm_jax"]


def test_the_watch_sees_what_it_should(tmp_path):
    """The test above proves nothing unless its watch catches each offense."""
    (tmp_path / "data.txt").write_text("x")
    offenses = {
        "reads": "from pathlib import Path\nPath(__file__).with_name('data.txt').read_text()",
        "sets": "import os\nos.environ['GLM_JAX_SET_AT_IMPORT'] = '1'",
        "starts": "import subprocess, sys\nsubprocess.run([sys.executable, '-S', '-c', ''])",
    }
    for name, code in offenses.items():
        (tmp_path / f"{name}.py").write_text(code)
    watched = watch_imports(*offenses, root=str(tmp_path))
    assert all(watched["effects"][name] for name in offenses)
    (tmp_path / "touches.py").write_text("import jax\njax.devices()")
    with pytest.raises(AssertionError, match="no_such_platform"):
        watch_imports("touches", root=str(tmp_path))

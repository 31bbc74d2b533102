"""Backends, named operands and the compile cache of launches; without a GPU, by stand-ins."""

import dataclasses
import os
import stat
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import LaunchError, Target, _device, _launch, _launch_backends, compiling_for
from pallas_kernels._compile import compile_kernel, private_triton_cache
from pallas_kernels._implementation import select_implementation
from pallas_kernels._kernel import KernelModule

triton = pytest.importorskip("triton")
CARD = Target("a card", 90, 132)
ADD_ONE = KernelModule("pallas_kernels._self_test.triton")


@dataclasses.dataclass(frozen=True)
class Reserved:
    """A constant whose field Triton would confuse with its own."""

    value: int


@pytest.fixture(autouse=True)
def on_a_card(monkeypatch):
    """Pretends that there is a GPU, on which no backend was probed yet."""
    monkeypatch.setattr(_device, "_detect_target", lambda: CARD)
    monkeypatch.delenv("CUDA_CACHE_DISABLE", raising=False)
    _launch_backends._find_backend.cache_clear()
    yield
    _launch_backends._find_backend.cache_clear()


def adds(amount, launches):
    def backend(launch, x):
        launches.append(launch)
        return [x + jnp.float32(amount)]

    return backend


def fails(launch, x):
    raise RuntimeError("no such call\nand more")


def use_backends(monkeypatch, ptx, jax_triton):
    monkeypatch.setattr(_launch_backends, "_BACKENDS", {"ptx": ptx, "jax-triton": jax_triton})


def test_the_call_for_ptx_is_tried_once_and_taken(monkeypatch):
    tried = []
    use_backends(monkeypatch, adds(1, tried), fails)
    assert [_launch_backends.select_backend() for _ in range(3)] == ["ptx"] * 3
    (launch,) = tried
    assert launch.compiled.shared_memory > 48 << 10  # more than a program has without opting in
    assert "add_one_kernel" in launch.compiled.ptx


def test_it_is_tried_while_a_program_is_traced(monkeypatch):
    tried = []
    use_backends(monkeypatch, adds(1, tried), fails)

    @jax.jit
    def program(x):
        doubled = jax.lax.fori_loop(0, 2, lambda _, y: y * (2 if _launch_backends.select_backend() == "ptx" else 0), x)
        return doubled + 1

    np.testing.assert_array_equal(program(jnp.ones(2)), 5)
    assert len(tried) == 1


@pytest.mark.parametrize(
    ("broken", "reason"), [(fails, "no such call"), (adds(2, []), "a kernel that adds one gave something else")]
)
def test_jax_triton_is_the_second_choice_and_said_once(monkeypatch, broken, reason):
    use_backends(monkeypatch, broken, adds(1, []))
    with pytest.warns(RuntimeWarning, match="launched by jax-triton") as warned:
        assert _launch_backends.select_backend() == "jax-triton"
    assert f"({reason})" in str(warned[0].message)
    assert len(warned) == 1
    assert _launch_backends.select_backend() == "jax-triton"  # another warning would fail the test


def test_without_any_way_it_is_said_what_to_do(monkeypatch):
    use_backends(monkeypatch, fails, adds(3, []))
    with pytest.raises(LaunchError, match="kernels='reference'") as error:
        _launch_backends.select_backend()
    assert "by ptx: no such call; by jax-triton: a kernel that adds one gave something else" in str(error.value)


def test_for_a_card_that_is_not_here_nothing_is_tried(monkeypatch):
    use_backends(monkeypatch, fails, fails)
    with compiling_for(CARD):
        assert _launch_backends.select_backend() == "ptx"


def test_a_driver_that_keeps_nothing_is_warned_of_once(monkeypatch):
    use_backends(monkeypatch, adds(1, []), fails)
    monkeypatch.setenv("CUDA_CACHE_DISABLE", "1")
    with pytest.warns(RuntimeWarning, match="CUDA_CACHE_DISABLE=1") as warned:
        _launch_backends.select_backend()
    assert len(warned) == 1
    assert _launch_backends.select_backend() == "ptx"  # another warning would fail the test


def add_one(x):
    output = jax.ShapeDtypeStruct(x.shape, x.dtype)
    return _launch.launch(ADD_ONE.add_one_kernel, {"x": x}, {"out": output}, {"N": x.size}, grid=(1,))["out"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"inputs": {"y": jnp.ones(4)}}, r"missing \['x'\], unknown \['y'\]"),
        ({"outputs": {}}, r"missing \['out'\], unknown \[\]"),
        ({"constants": {"N": 4, "M": 4}}, r"unknown \['M'\]"),
        ({"inputs": {"out": jnp.ones(4)}, "outputs": {"x": jnp.ones(4)}}, "outputs must follow its inputs"),
        ({"aliases": {"x": "result"}}, "an alias is from an input to an output, and x -> result is not"),
        ({"aliases": {"y": "out"}}, "an alias is from an input to an output, and y -> out is not"),
        ({"constants": {"N": Reserved(4)}}, "the fields of the constant N cannot be called value or type"),
    ],
)
def test_names_that_do_not_match_the_kernel_are_refused(change, message):
    x = jnp.ones(4)
    operands = {"inputs": {"x": x}, "outputs": {"out": jax.ShapeDtypeStruct(x.shape, x.dtype)}, "constants": {"N": 4}}
    with pytest.raises(LaunchError, match=message):
        _launch.launch(ADD_ONE.add_one_kernel, grid=(1,), **(operands | change))


@pytest.mark.parametrize(
    ("implementation", "reason", "expected"),
    [(None, None, "triton"), (None, "odd", "reference"), ("reference", None, "reference"), ("triton", None, "triton")],
)
def test_the_best_available_implementation_is_selected(implementation, reason, expected):
    assert select_implementation(implementation, reason) == expected


def test_a_named_implementation_that_cannot_run_is_an_error(monkeypatch):
    with pytest.raises(NotImplementedError, match="'triton' cannot run: odd"):
        select_implementation("triton", "odd")
    with pytest.raises(ValueError, match="not 'cuda'"):
        select_implementation("cuda")
    monkeypatch.setattr(_launch, "has_triton", lambda: False)
    assert select_implementation() == "reference"
    with pytest.raises(NotImplementedError, match="install glm-jax"):
        select_implementation("triton")


@pytest.mark.skipif(_launch.is_interpreted(), reason="the interpreter launches nothing")
def test_launches_go_by_the_route_that_was_found(monkeypatch):
    tried = []
    use_backends(monkeypatch, fails, adds(1, tried))
    with pytest.warns(RuntimeWarning, match="jax-triton"):
        result = jax.jit(add_one)(jnp.arange(4, dtype=jnp.float32))
    np.testing.assert_array_equal(result, [1, 2, 3, 4])
    assert (tried[-1].grid, tried[-1].constants, tried[-1].capability) == ((1, 1, 1), {"N": 4}, 90)


def test_jax_triton_is_called_as_it_wants_to_be(monkeypatch):
    asked = {}

    def triton_call(*inputs, **options):
        asked.update(options)
        return [inputs[0] + 1]

    monkeypatch.setitem(sys.modules, "jax_triton", types.SimpleNamespace(triton_call=triton_call))
    monkeypatch.setattr(
        _launch_backends, "_BACKENDS", {"ptx": fails, "jax-triton": _launch_backends._launch_jax_triton}
    )
    with pytest.warns(RuntimeWarning, match="jax-triton"):
        assert _launch_backends.select_backend() == "jax-triton"
    assert asked.pop("kernel").__name__ == "add_one_kernel"
    (shape,) = asked.pop("out_shape")
    assert (shape.shape, shape.dtype) == ((256,), np.float32)
    assert asked == {
        "grid": (1, 1, 1), "num_warps": 1, "num_stages": 1, "compute_capability": 90, "input_output_aliases": {},
        "N": 256,
    }  # fmt: skip


@pytest.mark.parametrize("before", [None, "/somewhere"])
def test_importing_jax_triton_leaves_the_environment_alone(monkeypatch, tmp_path, before):
    (tmp_path / "jax_triton.py").write_text("import os\nos.environ['TRITON_CACHE_DIR'] = ''\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "jax_triton", raising=False)
    monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
    if before:
        monkeypatch.setenv("TRITON_CACHE_DIR", before)
    assert _launch_backends._import_jax_triton().__name__ == "jax_triton"
    assert os.environ.get("TRITON_CACHE_DIR") == before


def test_a_missing_jax_triton_is_a_reason(monkeypatch):
    monkeypatch.setitem(sys.modules, "jax_triton", None)
    assert "jax-triton is not usable" in _launch_backends._probe_failure("jax-triton")


@pytest.fixture
def home(tmp_path, monkeypatch):
    for name in ("TRITON_CACHE_DIR", "TRITON_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_what_triton_compiles_is_kept_where_nobody_else_can_write(home):
    before = triton.knobs.cache.dir
    compile_kernel(
        ADD_ONE.add_one_kernel, (("x", "fp32"), ("out", "fp32")), (("N", 32),), 80, _launch.CompileOptions(num_warps=1)
    )
    folder = home / "glm_jax" / "triton"
    assert [stat.S_IMODE(path.stat().st_mode) for path in (folder, folder.parent)] == [0o700, 0o700]
    assert list(folder.rglob("*.ptx"))
    assert triton.knobs.cache.dir == before
    assert "TRITON_CACHE_DIR" not in os.environ


@pytest.mark.parametrize("name", ["TRITON_CACHE_DIR", "TRITON_HOME"])
def test_a_place_that_the_user_chose_stays(home, monkeypatch, tmp_path, name):
    monkeypatch.setenv(name, str(tmp_path))
    with private_triton_cache() as folder:
        assert folder is None
        assert str(tmp_path) in triton.knobs.cache.dir
    assert not home.exists()


def test_where_others_can_write_nothing_is_kept(home):
    (home / "glm_jax").mkdir(parents=True)
    (home / "glm_jax").chmod(0o777)
    with private_triton_cache() as folder:
        assert folder.is_dir()
        assert home not in folder.parents
        assert triton.knobs.cache.dir == str(folder)
    assert not folder.exists()

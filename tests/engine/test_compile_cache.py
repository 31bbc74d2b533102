"""The compile cache: its folder, folders that are refused, and the notices of slow compilations."""

import os
import stat
import subprocess
import sys
from pathlib import Path

import jax
import jax.monitoring
import pytest
from jax._src.monitoring import get_event_listeners

from glm_jax.engine import compile_cache
from glm_jax.engine.compile_cache import compile_notice, enable_compile_cache

ROOT = Path(__file__).resolve().parents[2]
OPTIONS = (
    "jax_compilation_cache_dir",
    "jax_compilation_cache_max_size",
    "jax_persistent_cache_min_compile_time_secs",
    "jax_enable_compilation_cache",
)


@pytest.fixture(autouse=True)
def default_settings():
    """JAX's default settings, restored afterwards."""
    before = {name: getattr(jax.config, name) for name in OPTIONS}
    jax.config.update("jax_compilation_cache_dir", None)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.fixture
def home(tmp_path, monkeypatch):
    """The user's cache folder, which does not exist yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.parametrize("umask", [0, 0o022, 0o077], ids=oct)
def test_the_folder_is_private_whatever_the_umask(home, umask, caplog):
    before = os.umask(umask)
    try:
        folder = enable_compile_cache()
    finally:
        os.umask(before)
    assert folder == home / "glm_jax" / "compiled"
    assert (mode(folder), mode(folder.parent)) == (0o700, 0o700)
    assert jax.config.jax_compilation_cache_dir == str(folder)
    assert caplog.messages == []


def test_the_size_is_limited(home):
    enable_compile_cache()
    assert 1e9 < jax.config.jax_compilation_cache_max_size < 1e10


@pytest.mark.parametrize("given", ["", "relative/cache", None])
def test_the_folder_is_in_the_home_folder_unless_the_environment_names_another(tmp_path, monkeypatch, given):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME")
    if given is not None:
        monkeypatch.setenv("XDG_CACHE_HOME", given)
    assert enable_compile_cache() == tmp_path / ".cache" / "glm_jax" / "compiled"


def test_a_cache_that_the_program_set_up_is_left_alone(home, tmp_path):
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "own"))
    before = jax.config.jax_compilation_cache_max_size
    assert enable_compile_cache() == tmp_path / "own"
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "own")
    assert jax.config.jax_compilation_cache_max_size == before
    assert not home.exists()


def test_a_cache_that_is_switched_off_stays_off(home):
    jax.config.update("jax_enable_compilation_cache", False)
    assert enable_compile_cache() is None
    assert not home.exists()


def refused(caplog):
    """The one warning that is logged when no folder is safe."""
    assert enable_compile_cache() is None
    assert jax.config.jax_compilation_cache_dir is None
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    message = record.getMessage()
    assert message.startswith("compiled programs are not kept: ")
    assert "\n" not in message
    return message


@pytest.mark.parametrize("which", ["glm_jax", "glm_jax/compiled"])
@pytest.mark.parametrize("bits", [0o770, 0o707, 0o720, 0o777], ids=oct)
def test_a_folder_that_others_may_write_to_is_refused(home, caplog, which, bits):
    (home / "glm_jax" / "compiled").mkdir(parents=True, mode=0o700)
    (home / "glm_jax").chmod(0o700)
    (home / which).chmod(bits)
    assert f"others may write to {home / which}; run chmod 700 on it" in refused(caplog)
    (home / which).chmod(0o700)
    assert enable_compile_cache() == home / "glm_jax" / "compiled"


@pytest.mark.parametrize("bits", [0o750, 0o755, 0o700], ids=oct)
def test_others_may_read(home, bits):
    (home / "glm_jax").mkdir(parents=True, mode=0o700)
    (home / "glm_jax").chmod(bits)
    assert enable_compile_cache()


def test_a_folder_that_belongs_to_someone_else_is_refused(home, monkeypatch, caplog):
    owner = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: owner + 1)
    assert f"{home / 'glm_jax' / 'compiled'} belongs to another user" in refused(caplog)


@pytest.mark.parametrize("linked", ["glm_jax", "glm_jax/compiled"])
def test_a_link_to_a_folder_that_others_may_write_to_is_refused(home, tmp_path, caplog, linked):
    (tmp_path / "open" / "compiled").mkdir(parents=True)
    (tmp_path / "open").chmod(0o777)
    (home / linked).parent.mkdir(parents=True, mode=0o700, exist_ok=True)
    (home / linked).symlink_to(tmp_path / "open")
    assert "others may write to" in refused(caplog)


def test_a_folder_that_anybody_may_replace_is_refused(home, caplog):
    home.mkdir()
    home.chmod(0o777)
    assert f"others may write to {home}, in which it would be" in refused(caplog)
    home.chmod(0o1777)
    assert enable_compile_cache(), "in a sticky folder each user's own stay theirs"


def test_a_link_through_a_shared_folder_is_refused(home, tmp_path, caplog):
    (tmp_path / "open" / "mine").mkdir(parents=True, mode=0o700)
    (tmp_path / "open").chmod(0o777)
    (home / "glm_jax").mkdir(parents=True, mode=0o700)
    (home / "glm_jax" / "compiled").symlink_to(tmp_path / "open" / "mine")
    assert f"others may write to {tmp_path / 'open'}" in refused(caplog)


def test_a_link_to_the_parent_through_a_shared_folder_is_refused(home, tmp_path, caplog):
    (tmp_path / "open" / "mine").mkdir(parents=True, mode=0o700)
    (tmp_path / "open").chmod(0o777)
    home.mkdir()
    (home / "glm_jax").symlink_to(tmp_path / "open" / "mine")
    assert f"others may write to {tmp_path / 'open'}" in refused(caplog)


def test_a_folder_that_cannot_be_created_is_no_failure(home, caplog):
    home.write_text("a file")
    assert f"{home / 'glm_jax' / 'compiled'} cannot be made (" in refused(caplog)


def test_a_home_that_cannot_be_written_to_is_no_failure(restricted_folder, monkeypatch, caplog):
    folder, with_permissions = restricted_folder
    home = folder / "cache"
    home.mkdir(mode=0o500)
    monkeypatch.setenv("XDG_CACHE_HOME", str(home))
    with with_permissions():
        message = refused(caplog)
    assert f"{home / 'glm_jax' / 'compiled'} cannot be made (Permission denied)" in message


def test_a_user_without_a_home_is_no_failure(monkeypatch, caplog):
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    assert "no home" in refused(caplog)


# A program that takes DELAY + 1 seconds to trace, and longer to compile or to read; it notices after DELAY seconds.
COMPILE = """
import contextlib, os, time
import jax, jax.numpy as jnp
from glm_jax.cli.common import log_to_stderr
from glm_jax.engine import compile_cache
from glm_jax.engine.compile_cache import compile_notice, enable_compile_cache

compile_cache._NOTICE_AFTER_S = delay = float(os.environ["DELAY"])
enable_compile_cache()
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)

@jax.jit
def slow(x):
    time.sleep(delay + 1)
    for i in range(10):
        x = jnp.sort(x * i + jnp.flip(x))
    return x

x = jnp.ones(64).block_until_ready()
spent = []
with log_to_stderr() if os.environ["AS_COMMAND"] == "1" else contextlib.nullcontext():
    for _ in range(2):
        with compile_notice("a sort", 1, spent.append):
            slow(x).block_until_ready()
assert len(spent) == 1
assert spent[0] > delay + 1
print("done")
"""


def compiled(home, delay, *, as_command=True):
    """The stderr of a process that compiles, as a command or, as in a notebook, without any logging handler."""
    done = subprocess.run(
        [sys.executable, "-c", COMPILE],
        cwd=ROOT,
        env={**os.environ, "XDG_CACHE_HOME": str(home), "DELAY": str(delay), "AS_COMMAND": str(int(as_command))},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr
    return done.stderr


def test_compiling_is_logged_once_and_reading_a_cached_program_is_not(tmp_path):
    first = compiled(tmp_path, 0)
    assert first.startswith("compiling a sort ...\ncompiling a sort took ")
    assert first.endswith(" s\n")
    assert first.count("\n") == 2
    assert any("slow" in path.name for path in (tmp_path / "glm_jax" / "compiled").iterdir())
    # Reading takes milliseconds; tracing takes longer than the delay, but is not compiling.
    assert compiled(tmp_path, 3) == ""


def test_without_a_folder_and_without_a_handler_warnings_are_shown(tmp_path):
    (tmp_path / "file").write_text("")
    first, *others = compiled(tmp_path / "file", 0, as_command=False).splitlines()
    assert first.startswith("compiled programs are not kept: ")
    assert [line[:20] for line in others] == ["compiling a sort ...", "compiling a sort too"]


@pytest.fixture
def no_delay(monkeypatch):
    monkeypatch.setattr(compile_cache, "_NOTICE_AFTER_S", 0.0)
    monkeypatch.setattr(compile_cache, "_compiled_keys", set())


def test_a_fast_compilation_is_not_logged(monkeypatch, caplog):
    monkeypatch.setattr(compile_cache, "_NOTICE_AFTER_S", 600.0)
    monkeypatch.setattr(compile_cache, "_compiled_keys", set())
    with compile_notice("x", 1):
        pass
    assert caplog.messages == []


def test_a_call_that_failed_did_not_compile(no_delay):
    spent = []
    for _ in range(2):
        with pytest.raises(ZeroDivisionError), compile_notice("x", 1, spent.append):
            raise ZeroDivisionError
    with compile_notice("x", 1, spent.append):
        pass
    with compile_notice("x", 1, spent.append):
        pass
    assert len(spent) == 3
    assert all(seconds >= 0 for seconds in spent)


def test_other_keys_are_other_programs(no_delay):
    spent = []
    for key in (("a", 1), ("a", 2), ("a", 1)):
        with compile_notice("x", key, spent.append):
            pass
    assert len(spent) == 2


def test_nothing_stays_registered(no_delay):
    heard = []
    with compile_notice("x", 1):
        jax.monitoring.register_event_listener(lambda event, **_: heard.append(event))
    jax.monitoring.record_event("/jax/compilation_cache/compile_requests_use_cache")
    assert len(heard) == 1
    assert not any("Notice" in repr(listener) for listener in get_event_listeners())

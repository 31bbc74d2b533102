"""A conversion that kills itself at a chosen point: ``python dying.py POINT SOURCE DESTINATION FORM OPTIONS``.

The points are made by patching functions here, in the child; the program itself knows nothing of them.
"""

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from typing import Any

from convert.calibrate import CalibrationConfig
from convert.pipeline import convert_checkpoint
from glm_jax.checkpoint.folder import orbax_numpy
from glm_jax.checkpoint.safetensors import writer
from glm_jax.checkpoint.write import conversion_state


def kill_self(*_: Any, **__: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def kill_after_array(count: int) -> None:
    """Dies when the `count`-th array has been written, and others of its part have not."""
    handler = orbax_numpy.NoCopyNumpyHandler
    real, done = handler._open_and_write, []

    async def write(self: Any, *args: Any, **kwargs: Any) -> None:
        await real(self, *args, **kwargs)
        done.append(1)
        if len(done) == count:
            kill_self()

    handler._open_and_write = write  # type: ignore[method-assign]


def kill_before_replace(name: str) -> None:
    """Dies when a file has been written under its temporary name, before it gets its own."""
    real = os.replace

    def replace(source: Any, target: Any) -> None:
        if os.path.basename(target) == name:
            kill_self()
        real(source, target)

    os.replace = replace


def kill_when_half_written(name: str) -> None:
    """Dies when half of a small file has been written."""
    real = os.fsync

    def fsync(descriptor: int) -> None:
        if os.readlink(f"/proc/self/fd/{descriptor}").endswith(f"/.{name}.tmp"):
            os.ftruncate(descriptor, os.fstat(descriptor).st_size // 2)
            kill_self()
        real(descriptor)

    os.fsync = fsync


def kill_in_shard() -> None:
    """Dies in the middle of a safetensors file."""
    real = writer.ArrayRecord

    class Dying(real):  # type: ignore[misc, valid-type]
        count = 0

        def __new__(cls, *args: Any) -> Any:
            Dying.count += 1
            if Dying.count == 50:
                kill_self()
            return real(*args)

    writer.ArrayRecord = Dying


CRASH_POINTS: dict[str, Callable[[], None]] = {
    "the first array of the first layer": lambda: kill_after_array(1),
    "the middle of the second layer": lambda: kill_after_array(20),
    "the middle of the prediction layer": lambda: kill_after_array(60),
    "before a layer's record": lambda: kill_before_replace("layer-00001.json"),
    "half of a layer's record": lambda: kill_when_half_written("layer-00002.json"),
    "before config.json": lambda: kill_before_replace("config.json"),
    "half of the manifest": lambda: kill_when_half_written("manifest.json"),
    "before the manifest": lambda: kill_before_replace("manifest.json"),
    "after the manifest": lambda: setattr(conversion_state.shutil, "rmtree", kill_self),
    "before anything is said": lambda: kill_before_replace("run.json"),
    "the middle of a shard": kill_in_shard,
    "before a shard": lambda: kill_before_replace("model-00001-of-00001.safetensors"),
    "before the index": lambda: kill_before_replace("model.safetensors.index.json"),
}

if __name__ == "__main__":
    assert shutil is conversion_state.shutil
    point, source, destination, form, options = sys.argv[1:]
    CRASH_POINTS[point]()
    given = json.loads(options)
    if "calibration" in given:
        given["calibration"] = CalibrationConfig(**given["calibration"])
    convert_checkpoint(source, destination, to=form, **given)  # type: ignore[arg-type]

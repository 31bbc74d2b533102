"""What two conversions, or two checkpoints, must have in common to be equal."""

from pathlib import Path
from typing import Any

from tests.builders import hf_checkpoints

FlatArrays = dict[str, tuple[str, tuple[int, ...], bytes]]


def read_converted_folder(folder: Path) -> tuple[bytes, dict[str, FlatArrays]]:
    """The manifest's bytes, and every array of every part, read by Orbax itself."""
    import orbax.checkpoint as ocp

    arrays = {}
    for part in sorted((folder / "parts").iterdir()):
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=False, use_zarr3=True)) as checkpointer:
            arrays[part.name] = _flatten(checkpointer.restore(part))
    return (folder / "manifest.json").read_bytes(), arrays


def _flatten(tree: dict[str, Any], prefix: str = "") -> FlatArrays:
    out: FlatArrays = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            out |= _flatten(value, f"{prefix}{name}.")
        else:
            out[prefix + name] = (value.dtype.name, value.shape, value.tobytes())
    return out


def assert_same_tensors(left: Path, right: Path) -> None:
    """Fails unless two Hugging Face folders hold the same names, dtypes, shapes and bits."""
    a, b = hf_checkpoints.read_tensors(left), hf_checkpoints.read_tensors(right)
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype, name
        assert a[name].shape == b[name].shape, name
        assert a[name].tobytes() == b[name].tobytes(), name

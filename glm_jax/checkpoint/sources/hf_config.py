"""Reads the ``config.json`` of a checkpoint folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from glm_jax.checkpoint.messages import printable
from glm_jax.errors import CheckpointError


def read_hf_config(folder: Path) -> dict[str, Any]:
    """Returns the contents of a folder's ``config.json``.

    Raises:
        CheckpointError: if the file is missing or not a JSON object.
    """
    path = folder / "config.json"
    try:
        config = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise CheckpointError(f"{folder} has no config.json, so it is not a checkpoint folder") from None
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON ({printable(str(error))})") from None
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} must hold a JSON object")
    return config

"""Downloads checkpoints from the Hugging Face hub into its cache."""

from __future__ import annotations

import re
from pathlib import Path
from types import ModuleType

from glm_jax.errors import CheckpointError

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_ALLOW_PATTERNS = ["*.safetensors", "*.json", "*.jinja"]  # never *.bin: loading a pickle can run any code


def is_hub_id(text: str) -> bool:
    """Returns whether a text has the form of a hub id, such as ``zai-org/GLM-4.7-Flash``."""
    return _HUB_ID.fullmatch(text) is not None


def download_snapshot(repo: str) -> Path:
    """Returns the local folder of a hub repository's newest revision; downloads it if it is not in the cache.

    Raises:
        CheckpointError: if the repository does not exist, is gated, or cannot be reached.
    """
    hub, errors = _import_hub()
    try:
        return Path(hub.snapshot_download(repo, allow_patterns=_ALLOW_PATTERNS, ignore_patterns=["*/*"]))
    except errors.GatedRepoError:
        raise CheckpointError(
            f"{repo} is gated: accept its terms on its Hugging Face page, then log in with `hf auth login`"
        ) from None
    except (errors.RepositoryNotFoundError, errors.HFValidationError):
        raise CheckpointError(
            f"there is no file or folder {repo}, and no Hugging Face repository of that name that you may read "
            "(if it is private, log in with `hf auth login`)"
        ) from None
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled):
        raise CheckpointError(
            f"there is no file or folder {repo}; as a Hugging Face repository it is not in the local cache, "
            "and the hub cannot be reached (offline, or HF_HUB_OFFLINE is set): download it on a machine with a "
            "network and give the folder's path"
        ) from None
    except OSError as error:
        raise CheckpointError(f"downloading {repo} failed: {error}") from None


def download_config(repo: str) -> Path:
    """Returns the local folder of a hub repository's ``config.json``; downloads the file if it is not in the cache.

    Raises:
        CheckpointError: if the repository or the file does not exist, or cannot be reached.
    """
    hub, errors = _import_hub()
    try:
        return Path(hub.hf_hub_download(repo, "config.json")).parent
    except (errors.EntryNotFoundError, errors.HFValidationError, OSError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise CheckpointError(
            f"there is no folder {repo}, and its config.json cannot be downloaded from Hugging Face ({reason}): check "
            "the name, log in with `hf auth login` if the repository is private or gated, or give a folder's path"
        ) from None


def _import_hub() -> tuple[ModuleType, ModuleType]:
    import huggingface_hub.errors  # loads an HTTP client, which only hub ids need

    return huggingface_hub, huggingface_hub.errors

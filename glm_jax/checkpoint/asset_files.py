"""The files that accompany a checkpoint's weights: tokenizer, chat template, generation defaults."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from glm_jax.checkpoint.atomic_write import write_if_changed
from glm_jax.errors import CheckpointError

# A conversion copies these files from the source to the destination.
ASSET_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
)


def asset_paths(folder: Path | None) -> Iterator[Path]:
    """Yields the path of each asset file that exists in a folder; nothing for ``None``."""
    if folder is not None:
        yield from (folder / name for name in ASSET_FILES if (folder / name).is_file())


def copy_assets(folder: Path | None, destination: Path) -> None:
    """Copies the asset files of a folder to another; files that are already identical are not written.

    Args:
        folder: Folder to copy from; ``None`` copies nothing.
        destination: Folder to copy to.

    Raises:
        CheckpointError: if a file cannot be read.
    """
    for path in asset_paths(folder):
        try:
            data = path.read_bytes()
        except OSError as error:
            raise CheckpointError(f"cannot read {path}: {error.strerror}") from None
        write_if_changed(destination / path.name, data)

"""A checkpoint that transformers created: on disk, as a transformers model, and as ours."""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from glm_jax.checkpoint import load
from tests.builders.hf_checkpoints import read_tensors
from tests.builders.jitted_model import JittedModel
from tests.parity import hf_models
from tests.parity.cases import ParityCase
from tests.reference import ReferenceModel


@dataclass(frozen=True)
class SavedCheckpoint:
    """One checkpoint, whose models are loaded once, on first use."""

    case: ParityCase
    folder: Path

    @cached_property
    def hf_model(self) -> Any:
        """transformers' float32 model."""
        return hf_models.load_model(self.folder)

    @cached_property
    def reference(self) -> ReferenceModel:
        """The float64 NumPy model."""
        return ReferenceModel(read_tensors(self.folder), self.config)

    @cached_property
    def jitted_model(self) -> JittedModel:
        """Our float32 model, loaded by `glm_jax.checkpoint.load`."""
        cfg, params, _ = load(self.folder, dtype="float32")
        return JittedModel(cfg, params)

    @property
    def config(self) -> dict[str, Any]:
        """The config.json on disk."""
        return json.loads((self.folder / "config.json").read_text())


def save_checkpoint(case: ParityCase, folder: Path) -> SavedCheckpoint:
    """Saves a random model of transformers, with the config.json in the case's spelling."""
    hf_models.build_random_model(case).save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(case.config, indent=2))
    return SavedCheckpoint(case, folder)

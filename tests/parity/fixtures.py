"""A checkpoint that transformers made, on disk and as transformers' and our model of it."""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from glm_jax.checkpoint import load
from tests.builders.hf_checkpoints import read
from tests.builders.jitted_model import Runner
from tests.parity import hf_models as theirs
from tests.parity.cases import Case
from tests.reference import Reference


@dataclass(frozen=True)
class Made:
    """One checkpoint; each model of it is loaded on demand, once."""

    case: Case
    folder: Path

    @cached_property
    def theirs(self) -> Any:
        """transformers' float32 model."""
        return theirs.load(self.folder)

    @cached_property
    def reference(self) -> Reference:
        """The float64 NumPy model."""
        return Reference(read(self.folder), self.config)

    @cached_property
    def ours(self) -> Runner:
        """Our float32 model, through the real loader."""
        cfg, params, _ = load(self.folder, dtype="float32")
        return Runner(cfg, params)

    @property
    def config(self) -> dict[str, Any]:
        """The config.json on disk."""
        return json.loads((self.folder / "config.json").read_text())


def make(case: Case, folder: Path) -> Made:
    """transformers builds a random model and saves it; then the config.json is put into the case's spelling."""
    theirs.build(case).save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(case.config, indent=2))
    return Made(case, folder)

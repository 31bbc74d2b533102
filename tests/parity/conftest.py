"""Checkpoints that transformers creates and saves, once per session."""

from typing import TYPE_CHECKING

import pytest

from tests.parity.cases import CASES

if TYPE_CHECKING:  # the module needs torch, which may be missing when this file is read
    from tests.parity.fixtures import SavedCheckpoint


@pytest.fixture(scope="session", params=CASES, ids=lambda case: case.name)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> "SavedCheckpoint":
    """Every checkpoint of `CASES`."""
    from tests.parity.fixtures import save_checkpoint

    return save_checkpoint(request.param, tmp_path_factory.mktemp(request.param.name))

"""The choice between kernels and reference, from shapes alone; kernels are available in Triton's interpreter."""

import dataclasses

import pytest

from glm_jax.config import Config
from glm_jax.errors import GlmError
from glm_jax.model.kernel_selection import select_kernels
from glm_jax.weights import QUANT_PRESETS
from glm_jax.weights.storage import Storage, plan_storage

pytestmark = pytest.mark.kernels
CFG = Config.flash(layers=3)


def stored(changes=None, name="k_b"):
    storage, _ = plan_storage(CFG, QUANT_PRESETS["int8"])
    changed = [
        (path, dataclasses.replace(spec, **changes) if changes and path[-1] == name else spec)
        for path, spec in storage.specs
    ]
    return Storage(tuple(changed))


@pytest.mark.parametrize("preset", ["int4", "int4-small", "int8"])
def test_every_preset_is_run_by_kernels(preset, caplog):
    assert select_kernels(CFG, plan_storage(CFG, QUANT_PRESETS[preset])[0], "triton", "bfloat16")
    assert caplog.messages == []


@pytest.mark.parametrize("changes", [{"block": (32, 1)}, {"block": (1, 32)}, {"zero": "point"}])
def test_a_storage_without_a_layout_is_said_before_anything_is_read(changes):
    """Storages of ``k_b`` in GGUF, in MLX, and in AWQ with zero points."""
    message = "the storage of runs/0/attn/k_b has no layout in tiles; use kernels='reference'"
    with pytest.raises(GlmError, match=message):
        select_kernels(CFG, stored(changes), "triton", "bfloat16")


def test_where_kernels_would_be_best_a_note_says_why_they_are_not_taken(monkeypatch, caplog):
    monkeypatch.setattr("glm_jax.model.kernel_selection.prefer_kernels", lambda kernels, dtype: True)
    assert not select_kernels(CFG, stored({"block": (32, 1)}), None, "bfloat16")
    assert "note: this model runs without hand-written kernels: the storage of runs/0" in caplog.text
    assert select_kernels(CFG, stored(), None, "bfloat16")


def test_the_reference_is_never_refused():
    assert not select_kernels(CFG, stored({"block": (32, 1)}), "reference", "bfloat16")
    assert not select_kernels(CFG, stored(), None, "bfloat16")  # in the interpreter only what is asked for

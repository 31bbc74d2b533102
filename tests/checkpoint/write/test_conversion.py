"""The destination of parameters that are saved."""

import pytest

from glm_jax import checkpoint
from glm_jax.errors import CheckpointError
from tests.builders import hf_checkpoints, hf_configs


@pytest.mark.parametrize("to", ["orbax", "safetensors"])
def test_parameters_are_never_saved_over_their_source(tmp_path, to):
    """Not even with force, which would delete the tokenizer before it is copied."""
    config = hf_configs.odd_size_config(num_hidden_layers=2)
    source = hf_checkpoints.write_checkpoint(tmp_path / "hf", config, hf_checkpoints.random_tensors(config, 0))
    checkpoint.save(tmp_path / "first", *checkpoint.load(source, dtype="float32")[:2], to=to)
    (tmp_path / "first" / "tokenizer.json").write_text("{}")
    cfg, params, origin = checkpoint.load(tmp_path / "first", dtype="float32")
    before = {path: path.read_bytes() for path in (tmp_path / "first").rglob("*") if path.is_file()}
    with pytest.raises(CheckpointError, match="is the source: choose another destination"):
        checkpoint.save(tmp_path / "hf" / ".." / "first", cfg, params, origin=origin, to=to, force=True)
    assert {path: path.read_bytes() for path in (tmp_path / "first").rglob("*") if path.is_file()} == before

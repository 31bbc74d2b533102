"""A GGUF file as a source of weights."""

import gc

from convert.sources import open_source
from tests import checkpoints
from tests.convert.gguf import writing


def test_what_is_unpacked_goes_with_the_source(tmp_path):
    """The folder of tokenizer and config is there as long as anything knows of it, and goes without a warning."""
    config = writing.small()
    tensors = writing.to_gguf(checkpoints.random_tensors(config, 0), config)
    source = open_source(writing.write(tmp_path / "model.gguf", tensors, writing.architecture_fields(config)))
    info = source.info
    del source
    gc.collect()
    folder = info.folder
    assert (folder / "config.json").is_file()
    del info
    gc.collect()
    assert not folder.exists()

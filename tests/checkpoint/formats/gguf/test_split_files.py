"""A file, a split set or a folder opens as one model; files that do not form one are named."""

import os

import numpy as np
import pytest

from glm_jax.checkpoint.formats.gguf import open_gguf
from glm_jax.checkpoint.formats.gguf.split_files import open_splits
from glm_jax.checkpoint.mapped_file import SAMPLE_PAGE_BYTES
from glm_jax.errors import CheckpointError
from tests.builders.gguf_files import architecture_fields, small_mtp_config, to_gguf_tensors, write_gguf
from tests.builders.hf_checkpoints import random_tensors

CONFIG = small_mtp_config(num_hidden_layers=2)
FIELDS = architecture_fields(CONFIG)
TENSORS = to_gguf_tensors(random_tensors(CONFIG, 0), CONFIG)


def refused(path, words):
    with pytest.raises(CheckpointError, match=words) as caught:
        open_gguf(path)
    assert "\n" not in str(caught.value)


@pytest.fixture
def parts(tmp_path):
    """A model in three files."""
    write_gguf(tmp_path / "m.gguf", TENSORS, FIELDS, max_tensors_per_file=-(-len(TENSORS) // 3))
    names = [f"m-{i:05d}-of-00003.gguf" for i in (1, 2, 3)]
    assert sorted(os.listdir(tmp_path)) == names
    return [tmp_path / name for name in names]


def test_any_part_of_a_set_opens_the_whole(parts, tmp_path):
    (tmp_path / "one").mkdir()
    single = open_gguf(write_gguf(tmp_path / "one" / "m.gguf", TENSORS, FIELDS))
    for path in (*parts, tmp_path):
        opened = open_gguf(path)
        assert opened.config == single.config
        assert set(opened.weights) == set(single.weights)
        for name, stored in opened.weights.items():
            np.testing.assert_array_equal(stored.load(None), single.weights[name].load(None))
    assert len(open_splits(parts[1])) == 3


def test_a_first_part_without_tensors(tmp_path):
    write_gguf(tmp_path / "m.gguf", TENSORS, FIELDS, max_tensors_per_file=len(TENSORS), first_empty=True)
    opened = open_gguf(tmp_path / "m-00002-of-00002.gguf")
    assert [len(part.header.tensors) for part in opened.splits] == [0, len(TENSORS)]
    np.testing.assert_array_equal(opened.weights["lm_head.weight"].load(None), TENSORS["output.weight"])
    assert opened.fingerprint()


def test_a_missing_part_is_named(parts):
    parts[1].unlink()
    for path in (parts[0], parts[2], parts[0].parent):
        refused(path, r"lacks m-00002-of-00003\.gguf: the download is incomplete")


def test_a_part_in_the_place_of_another(parts):
    os.replace(parts[0], parts[1])
    os.link(parts[1], parts[0])
    refused(parts[2], r"m-00002-of-00003\.gguf should be part 2 of 3 by its name, but says that it is part 1 of 3")


def test_a_part_under_another_name(parts, tmp_path):
    alone = tmp_path / "model.gguf"
    os.rename(parts[1], alone)
    refused(alone, r"model\.gguf is part 2 of 3: put all parts into one folder")


@pytest.mark.parametrize("name", ["m-00000-of-00002.gguf", "m-00003-of-00002.gguf", "m-00001-of-99999.gguf"])
def test_impossible_numbers_of_parts(tmp_path, name):
    write_gguf(tmp_path / "x.gguf", TENSORS, FIELDS)
    os.rename(tmp_path / "x.gguf", tmp_path / name)
    refused(tmp_path / name, r"is part \d+ of \d+, which cannot be")


def test_a_set_of_one(tmp_path):
    write_gguf(tmp_path / "x.gguf", TENSORS, FIELDS)
    os.rename(tmp_path / "x.gguf", tmp_path / "x-00001-of-00001.gguf")
    assert len(open_gguf(tmp_path).splits) == 1


def test_a_tensor_in_two_parts(tmp_path):
    for number in (0, 1):
        fields = FIELDS | {"split.no": number, "split.count": 2}
        write_gguf(tmp_path / "x.gguf", {"output.weight": TENSORS["output.weight"]}, fields)
        os.rename(tmp_path / "x.gguf", tmp_path / f"m-0000{number + 1}-of-00002.gguf")
    refused(tmp_path, r"tensor output\.weight is in m-00001-of-00002\.gguf and in m-00002-of-00002\.gguf")


def test_a_set_that_lost_tensors(tmp_path):
    write_gguf(tmp_path / "x.gguf", TENSORS, FIELDS | {"split.count": 1, "split.tensors.count": len(TENSORS) + 1})
    refused(tmp_path / "x.gguf", rf"x\.gguf says that its set has {len(TENSORS) + 1} tensors; the files have")


def test_a_folder_of_several_models_lists_them(parts, tmp_path):
    write_gguf(tmp_path / "other.gguf", TENSORS, FIELDS)
    refused(tmp_path, r"holds 2 GGUF models, name one of them: m-00001-of-00003\.gguf, other\.gguf")
    assert open_gguf(tmp_path / "other.gguf").config["vocab_size"] == 131


def test_nothing_there(tmp_path):
    refused(tmp_path, r"holds no \.gguf file")
    refused(tmp_path / "none.gguf", r"cannot read .*none\.gguf: No such file")


def test_the_fingerprint_knows_names_headers_and_sampled_pages(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", TENSORS, FIELDS)
    before = open_gguf(path)
    assert before.fingerprint() == open_gguf(path).fingerprint()
    assert before.mtimes_ns() == {"m.gguf": path.stat().st_mtime_ns}
    seen = {before.fingerprint()}
    other = write_gguf(tmp_path / "n.gguf", TENSORS, FIELDS | {"general.name": "x"})
    seen.add(open_gguf(other).fingerprint())
    for name in ("output.weight", "blk.1.ffn_up_exps.weight", "output_norm.weight"):
        entry = before.splits[0].header.tensors[name]
        for at in (entry.begin, entry.end - 1):
            raw = bytearray(path.read_bytes())
            raw[at] ^= 1
            path.write_bytes(raw)
            seen.add(open_gguf(path).fingerprint())
    renamed = tmp_path / "r.gguf"
    os.rename(path, renamed)
    seen.add(open_gguf(renamed).fingerprint())
    assert len(seen) == 9


def test_the_middle_of_a_large_tensor_is_sampled(tmp_path):
    big = {"output.weight": np.zeros((131, 40 * SAMPLE_PAGE_BYTES // 4), np.float32)}
    path = write_gguf(tmp_path / "m.gguf", TENSORS | big, FIELDS)
    opened = open_gguf(path)
    before = opened.fingerprint()
    entry = opened.splits[0].header.tensors["output.weight"]
    with path.open("r+b") as file:
        file.seek((entry.begin + entry.end) // 2)
        file.write(b"\x01")
    assert opened.fingerprint() != before


def test_a_file_that_shrinks_while_open(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", TENSORS, FIELDS)
    opened = open_gguf(path)
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 64)
    with pytest.raises(CheckpointError, match=r"m\.gguf changed while it was being read"):
        opened.weights["model.norm.weight"].load(None)
    with pytest.raises(CheckpointError, match=r"m\.gguf changed while it was being read"):
        opened.fingerprint()

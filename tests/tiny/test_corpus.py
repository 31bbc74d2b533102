"""The library code: which files are read, skipped and held out."""

import hashlib

from hypothesis import given
from hypothesis import strategies as st

from examples.tiny_recipe.corpus import HELD_OUT_SHARE, LibraryFile, library_files, split_held_out

names = st.from_regex(r"[a-z]{1,8}(/[a-z]{1,8}){0,2}\.py", fullmatch=True)


def write(root, files):
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)


def test_files_are_sorted_and_hashed(tmp_path):
    write(tmp_path, {"b.py": b"b = 1\n", "a/c.py": "ü = 2\n".encode(), "a.txt": b"no"})
    files = library_files(tmp_path)
    assert [(f.name, f.text) for f in files] == [("a/c.py", "ü = 2\n"), ("b.py", "b = 1\n")]
    assert [f.sha256 for f in files] == [hashlib.sha256(f.text.encode()).hexdigest() for f in files]


def test_useless_files_are_left_out(tmp_path):
    kept = {"json/decoder.py": b"x = 1\n"}
    left_out = {
        "site-packages/other.py": b"a\n",
        "encodings/cp037.py": b"b\n",
        "test/__pycache__/c.py": b"c\n",
        "_sysconfigdata_x.py": b"d\n",
        "config-3.11/e.py": b"e\n",
        "empty.py": b"",
        "latin.py": b"# \xe4\n",
        "same.py": b"x = 1\n",
    }
    write(tmp_path, kept | left_out)
    assert [f.name for f in library_files(tmp_path)] == ["json/decoder.py"]


@given(st.sets(names, max_size=30))
def test_the_split_depends_on_names_only_and_is_disjoint(file_names):
    files = [LibraryFile(name, "text", "0") for name in sorted(file_names)]
    training, held_out = split_held_out(files)
    assert sorted(f.name for f in training + held_out) == sorted(file_names)
    assert {f.name for f in held_out} == {name for name in file_names if LibraryFile(name, "other", "1").held_out}


def test_about_one_file_in_twenty_is_held_out():
    held_out = sum(LibraryFile(f"module_{i}.py", "", "").held_out for i in range(20_000))
    assert abs(held_out / 20_000 - HELD_OUT_SHARE) < 0.01


def test_no_held_out_file_of_this_library_is_trained_on():
    training, held_out = split_held_out(library_files())
    assert held_out
    assert not {f.name for f in training} & {f.name for f in held_out}
    assert not {f.sha256 for f in training} & {f.sha256 for f in held_out}

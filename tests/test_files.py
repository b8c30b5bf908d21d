"""The one JSON cleaner and the one way to write a file."""

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from lcodec_ext._files import file_to_read, json_ready, write_all_atomically, write_atomically


@dataclass
class _Pair:
    left: float
    right: object


class _Told:
    def to_dict(self):
        return {"value": np.float32(0.5)}


def test_json_ready_gives_what_json_takes():
    value = {
        1: (np.int64(2), [np.float64("nan"), math.inf]),
        "array": np.array([[1.5, -math.inf]]),
        "flag": np.bool_(True),
        "pair": _Pair(1.0, frozenset({3})),
        "told": _Told(),
        "none": None,
    }
    expected = {
        "1": [2, [None, None]],
        "array": [[1.5, None]],
        "flag": True,
        "pair": {"left": 1.0, "right": [3]},
        "told": {"value": 0.5},
        "none": None,
    }
    ready = json_ready(value)
    assert ready == expected
    assert ready["flag"] is True
    assert json.loads(json.dumps(ready, allow_nan=False)) == expected
    assert json_ready([math.nan, -math.inf], nonfinite=str) == ["nan", "-inf"]


def test_json_ready_leaves_the_rest_to_json():
    path = Path("x")
    with pytest.raises(TypeError, match="not JSON serializable"):
        json.dumps(json_ready({"path": path}))
    assert json.dumps(json_ready({"path": path}), default=str) == '{"path": "x"}'


def test_json_ready_takes_tensors():
    assert json_ready({"t": torch.tensor([1, 2]), "s": torch.tensor(0.5)}) == {
        "t": [1, 2],
        "s": 0.5,
    }


@pytest.mark.parametrize(
    "content", [b"after \xc3\xa9", "after é", lambda file: file.write("after é".encode())]
)
def test_a_file_is_replaced_at_once(tmp_path, content):
    file = tmp_path / "file.txt"
    file.write_bytes(b"before")
    write_atomically(file, content)
    assert file.read_text(encoding="utf-8") == "after é"
    assert list(tmp_path.iterdir()) == [file]


def test_a_write_that_fails_leaves_what_was_there(tmp_path):
    file, other = tmp_path / "000001.pt", tmp_path / "other"
    file.write_bytes(b"before")

    def fail(target):
        target.write(b"half of it")
        raise OSError("disk")

    with pytest.raises(OSError, match="disk"):
        write_atomically(file, fail)
    with pytest.raises(OSError, match="disk"):
        write_all_atomically({other: b"whole", file: fail})
    assert file.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [file]


def test_files_take_their_places_in_order(tmp_path, monkeypatch):
    def place(source, target, replace=os.replace):
        if Path(target).name == "second":
            raise OSError("second cannot be replaced")
        replace(source, target)

    files = {tmp_path / name: b"new" for name in ("first", "second", "third")}
    (tmp_path / "second").mkdir()
    with pytest.raises(IsADirectoryError, match="second"):
        write_all_atomically(files)  # seen before anything is written
    (tmp_path / "second").rmdir()
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr("os.replace", place)
    with pytest.raises(OSError, match="second"):
        write_all_atomically(files)
    assert [path.name for path in tmp_path.iterdir()] == ["first"]


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("folder", IsADirectoryError, "is a folder: give the name of a file in it"),
        ("missing/file", FileNotFoundError, "missing' is not a folder; make it first"),
        ("file/file", FileNotFoundError, "file' is not a folder; make it first"),
    ],
)
def test_paths_that_no_file_can_have_are_named(tmp_path, name, error, message):
    """The user's path is in the message, not that of a temporary file, and nothing is left."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("kept")
    with pytest.raises(error, match=message) as caught:
        write_atomically(tmp_path / name, b"new")
    assert str(tmp_path / name) in str(caught.value)
    assert ".tmp" not in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]
    assert (tmp_path / "file").read_text() == "kept"


@pytest.mark.parametrize(
    ("path", "error"), [(3, TypeError), (None, TypeError), (b"x", TypeError), ("", ValueError)]
)
def test_what_is_no_path_is_refused(path, error):
    for act in (file_to_read, lambda given: write_atomically(given, b"new")):
        with pytest.raises(error, match="path must"):
            act(path)


def test_only_files_are_read(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no file"):
        file_to_read(tmp_path / "missing")
    with pytest.raises(IsADirectoryError, match="is a folder"):
        file_to_read(tmp_path)

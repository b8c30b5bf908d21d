"""The one JSON cleaner and the one way to write a file."""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from lcodec_ext._files import json_ready, write_all_atomically, write_atomically


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


def test_files_take_their_places_in_order(tmp_path):
    (tmp_path / "second").mkdir()  # a file cannot replace it
    with pytest.raises(OSError, match="second"):
        write_all_atomically({tmp_path / name: b"new" for name in ("first", "second", "third")})
    assert {path.name for path in tmp_path.iterdir()} == {"first", "second"}

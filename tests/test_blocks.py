"""Tables that are read in blocks of columns: the same bits as in memory, in bounded memory."""

import json
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from lcodec_ext import ColumnBlocks, codec, foci
from lcodec_ext.dependence.backends.base import TIES
from lcodec_ext.dependence.backends.block_table import BlockTable
from processes import Failure

ROOT = Path(__file__).parent.parent
DATA = ROOT / "tests" / "data" / "golden"
FIELDS = ("ordering", "cumulative", "conditional", "threshold", "pvalues")


@pytest.fixture(params=[1, 7, None], ids=["1", "7", "all"])
def width(request, monkeypatch):
    """Columns of a block; None: as many as fit, which are all."""
    return set_width(monkeypatch, request.param)


def set_width(monkeypatch, width):
    if width is not None:
        monkeypatch.setattr(BlockTable, "width", width)
    return width


def assert_same(found, expected):
    for name in FIELDS:
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name), err_msg=name)
    for name in ("base", "stop_reason", "names", "n_samples", "n_features", "n_omitted", "missing"):
        assert getattr(found, name) == getattr(expected, name), name


def memmap(path, X, order="C"):
    if order == "F":
        file = np.lib.format.open_memmap(path, "w+", X.dtype, X.shape[::-1])
        file[:] = X.T
        file.flush()
        return np.load(path, mmap_mode="r").T
    np.save(path, X)
    return np.load(path, mmap_mode="r")


def parquet(path, X, **options):
    pq.write_table(pa.table({f"x{k}": X[:, k] for k in range(X.shape[1])}), path, **options)
    return str(path)


@pytest.fixture
def table(rng):
    """Ties, duplicates and a dependence that takes three columns to see."""
    X = rng.normal(size=(120, 15)).astype(np.float32)
    X[:, 3:6] = rng.integers(0, 3, size=(120, 3))
    X[:, 9] = X[:, 2]
    return X, np.round(X[:, 2] * X[:, 4] + X[:, 11], 1)


@pytest.mark.filterwarnings("ignore:y follows the selected columns")
@pytest.mark.parametrize("ties", TIES)
@pytest.mark.parametrize("stop", [True, False, "permutation"])
def test_the_same_bits_as_in_memory(width, table, ties, stop, tmp_path):
    X, y = table
    options = {"ties": ties, "stop": stop, "seed": 5, "max_features": 5}
    if stop == "permutation":
        options |= {"alpha": 0.3, "n_permutations": 19}
        y = X[:, 4] + X[:, 11]
    expected = foci(X, y, **options)
    assert len(expected.ordering)
    for order in "CF":
        assert_same(foci(memmap(tmp_path / "x.npy", X, order), y, **options), expected)
    frame = foci(pd.DataFrame(X).add_prefix("x"), y, **options)
    assert_same(foci(parquet(tmp_path / "x.parquet", X), y, **options), frame)
    assert_same(foci(ColumnBlocks([X[:, :4], X[:, 4:5], X[:, 5:]]), y, **options), expected)


@pytest.mark.filterwarnings("ignore::UserWarning")  # constant columns and responses are drawn
@given(
    X=st.sampled_from([np.float32, np.float64, np.int8, bool]).flatmap(
        lambda dtype: hnp.arrays(
            dtype,
            st.tuples(st.integers(3, 20), st.integers(1, 6)),
            elements=st.booleans() if dtype is bool else st.integers(-3, 3),
        )
    ),
    data=st.data(),
)
def test_the_same_bits_for_any_table(X, data):
    y = np.array(data.draw(st.lists(st.integers(0, 4), min_size=len(X), max_size=len(X))))
    options = {
        "ties": data.draw(st.sampled_from(TIES)),
        "stop": data.draw(st.booleans()),
        "standardize": data.draw(st.sampled_from(["scale", "bounded", None])),
        "seed": 3,
        "backend": data.draw(st.sampled_from(["cpu", "reference"])),
    }
    cut = data.draw(st.integers(1, X.shape[1]))
    with pytest.MonkeyPatch.context() as monkeypatch:
        set_width(monkeypatch, data.draw(st.integers(1, 6)))
        blocks = ColumnBlocks([part for part in (X[:, :cut], X[:, cut:]) if part.size])
        assert_same(foci(blocks, y, **options), foci(X, y, **options))


@pytest.mark.parametrize("path", sorted(DATA.glob("*.csv")), ids=lambda path: path.stem)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_golden_tables(path, width, tmp_path):
    values = np.loadtxt(path, delimiter=",", skiprows=1, ndmin=2)
    if values.shape[1] < 2 or len(values) > 500:
        values = values[:500]
    X, y = values[:, :-1], values[:, -1]
    if not X.size:
        return
    for dtype in (np.float64, np.float32):
        given = X.astype(dtype)
        assert_same(foci(memmap(tmp_path / "x.npy", given), y), foci(given, y))


OPTIONS = {
    "preselected": {"preselected": ["x3", 7]},
    "classes": {"max_features": 3},
    "several responses": {"max_features": 3},
    "their mean": {"max_features": 3, "y_order": "average"},
    "neighbours": {"n_neighbors": 3, "max_features": 3},
    "decimals": {"decimals": 2},
    "bounded": {"standardize": "bounded"},
    "raw": {"standardize": None, "stop": False},
    "gain": {"min_gain": 0.05},
}


@pytest.mark.parametrize("case", OPTIONS)
def test_every_option(width, table, case, tmp_path):
    X, y = table
    X = np.round(X, 2) if case == "decimals" else X
    if case == "classes":
        y = np.where(y > 0.5, "high", np.where(y < -0.5, "low", "middle"))
    elif case in ("several responses", "their mean"):
        y = np.stack([y, X[:, 11], X[:, 0] + X[:, 1]], axis=1).astype(np.float64)
    expected = foci(pd.DataFrame(X).add_prefix("x"), y, **OPTIONS[case])
    assert len(expected.ordering)
    path = parquet(tmp_path / "x.parquet", X)
    assert_same(foci(path, y, **OPTIONS[case]), expected)
    assert_same(foci(Path(path), y, progress=True, **OPTIONS[case]), expected)


DTYPES = ["f2", "f4", "f8", ">f4", "i1", "i8", "u4", "?", "g"]


@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes(width, rng, dtype, tmp_path):
    X = np.floor(rng.normal(size=(60, 9)) * 9).clip(0 if dtype == "u4" else -90).astype(dtype)
    if dtype == "?":
        X = rng.random((60, 9)) < 0.5
    y = X[:, 1].astype(float) + X[:, 4].astype(float)
    expected = foci(X, y)
    for order in "CF":
        assert_same(foci(memmap(tmp_path / "x.npy", X, order), y), expected)
    assert_same(foci(ColumnBlocks([X[:, :4], X[:, 4:]]), y), expected)


def test_tensors_and_frames_as_blocks(width, rng):
    X = torch.from_numpy(rng.normal(size=(60, 9))).bfloat16()
    y = X[:, 1].double().numpy()
    assert_same(foci(ColumnBlocks([X[:, :4], X[:, 4:]]), y), foci(X, y))
    frame = pd.DataFrame(X.float().numpy()).add_prefix("x").assign(x3=np.arange(60) % 7)
    blocks = ColumnBlocks([frame.iloc[:, :2], pa.table(frame.iloc[:, 2:])])
    assert_same(foci(blocks, y, preselected=["x3"]), foci(frame, y, preselected=["x3"]))


def test_parquet_of_every_kind(width, rng, tmp_path):
    """Nulls are NaN, and make integers float64 as they do in memory."""
    small = pa.array([None if k == 5 else k % 4 for k in range(60)], pa.int8())
    table = pa.table(
        {
            "a.b": rng.normal(size=60).astype(np.float32),
            "a": rng.normal(size=60).astype(np.float16),
            "small": small,
            "flag": pa.array([k % 3 == 0 for k in range(60)]),
        }
    )
    path = tmp_path / "x.parquet"
    pq.write_table(table, path, row_group_size=17)
    y = np.asarray(table["a"], dtype=float)
    for columns in (["a.b", "a", "small"], ["flag", "a.b", "a"], ["flag", "small"]):
        part = table.select(columns)
        pq.write_table(part, path, row_group_size=17)
        expected = foci(part, y, nan_policy="omit")
        assert_same(foci(path, y, nan_policy="omit"), expected)
        assert_same(foci(pq.ParquetFile(path), y, nan_policy="omit"), expected)
    folder = tmp_path / "folder"
    folder.mkdir()
    for k in range(3):
        pq.write_table(table[20 * k : 20 * k + 20], folder / f"{k}.parquet")
    expected = foci(table, y, nan_policy="omit")
    for each in (folder, str(folder), pa.dataset.dataset(folder)):
        assert_same(foci(each, y, nan_policy="omit"), expected)
    some = pa.dataset.dataset(folder)
    some = some.replace_schema(some.schema.remove(1))  # a Dataset of the other columns
    assert_same(foci(some, y, nan_policy="omit"), foci(table.drop(["a"]), y, nan_policy="omit"))
    parts = [tmp_path / "0.parquet", tmp_path / "1.parquet"]
    pq.write_table(table.select(["a.b", "a"]), parts[0])
    pq.write_table(table.select(["small", "flag"]), parts[1])
    assert_same(foci(ColumnBlocks(parts), y, nan_policy="omit"), expected)


def outcome(X, y, **options):
    with pytest.warns(UserWarning, match="constant") as caught:
        result = foci(X, y, **options)
    return result, [str(warning.message) for warning in caught]


def test_missing_values_and_constant_columns(width, table, tmp_path):
    X, y = table
    X[3, [2, 8]] = X[40, 14] = np.nan
    X[:, 6] = 2
    y = y.copy()
    y[7] = np.nan
    for order in "CF":
        given = memmap(tmp_path / f"{order}.npy", X, order)
        found, expected = (outcome(each, y, nan_policy="omit") for each in (given, X))
        assert_same(found[0], expected[0])
        assert found[1] == expected[1]
        assert found[0].n_omitted == 3


def message(X, y, **options):
    with pytest.raises(ValueError) as error:
        foci(X, y, **options)
    return str(error.value)


@pytest.mark.parametrize("spoil", ["nan", "inf", "both", "empty", "overflow", "integers"])
def test_refusals_are_those_of_memory(width, table, spoil, tmp_path):
    X, y = table
    X = X.astype(np.float64)
    if spoil in ("nan", "both"):
        X[[50, 50, 3], [0, 3, 12]] = np.nan
    if spoil in ("inf", "both"):
        X[[60, 9], [1, 14]] = np.inf
    if spoil == "empty":
        X[:, [4, 13]] = np.nan
    if spoil == "overflow":
        X[:, 10] *= 1e200
    if spoil == "integers":
        X = X.astype(np.int64)
        X[8, 9] = 2**53 + 1
    options = {"standardize": None} if spoil == "overflow" else {}
    expected = message(X, y, **options)
    for order in "CF":
        assert message(memmap(tmp_path / "x.npy", X, order), y, **options) == expected
    named = message(pd.DataFrame(X).add_prefix("x"), y, **options)
    assert message(parquet(tmp_path / "x.parquet", X), y, **options) == named


def test_refusals_of_what_cannot_be_read(table, tmp_path, monkeypatch):
    X, y = table
    with pytest.raises(TypeError, match=r"got generator: instead of a generator pass list\(blocks"):
        ColumnBlocks(X[:, k : k + 1] for k in range(3))
    with pytest.raises(TypeError, match="got ndarray"):
        ColumnBlocks(X)
    with pytest.raises(ValueError, match="at least one table"):
        ColumnBlocks([])
    assert "block 1 of X has 119 rows and block 0 has 120" in message(ColumnBlocks([X, X[1:]]), y)
    assert "block 0 of X must have shape (n, m); got shape (120,)" in message(
        ColumnBlocks([X[:, 0], X]), y
    )
    text = pd.DataFrame({"x": X[:, 0], "city": ["Bonn"] * 120})
    text.to_parquet(tmp_path / "text.parquet")
    assert message(str(tmp_path / "text.parquet"), y) == message(text, y).replace(
        "str", "large_string"
    )
    assert "column 'city' (index 1) of block 1 of X is" in message(ColumnBlocks([X, text]), y)
    assert "there is no such file" in message("nothing.parquet", y)
    assert "there is no such file" in message(tmp_path / "nothing", y)
    assert "got the str 'nothing'" in message("nothing", y)
    assert "got the str 'aaa" in message("a" * 10_000, y)
    np.save(tmp_path / "x.npy", X)
    assert "mmap_mode='r'" in message(tmp_path / "x.npy", y)
    twice = pa.table([X[:, 0], X[:, 1]], names=["a", "a"])
    pq.write_table(twice, tmp_path / "twice.parquet")
    assert "several columns named 'a'" in message(tmp_path / "twice.parquet", y)
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    assert "all arguments must have the same number of rows; X has 120, y has 119" in message(
        mapped, y[1:]
    )
    assert "max_memory must be at least 137,760 bytes" in message(mapped, y, max_memory=1000)
    assert message(text, y, max_memory=1 << 30) == message(text, y)
    assert "got X of type list, which is in memory" in message(X.tolist(), y, max_memory=1 << 30)
    with pytest.raises(TypeError, match="max_memory must be an integer"):
        foci(X, y, max_memory=1e9 + 0.5)
    with pytest.raises(ValueError, match="foci alone reads ColumnBlocks"):
        codec(y, ColumnBlocks([X]))
    path = tmp_path / "text.parquet"
    for elsewhere in (path, str(path), pq.ParquetFile(path), pa.dataset.dataset(path)):
        with pytest.raises(ValueError, match="read it first, and pass the table; foci alone"):
            codec(y, elsewhere)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(ImportError, match=r"pip install 'lcodec_ext\[tables\]'"):
        foci(str(tmp_path / "twice.parquet"), y)


def test_a_folder_is_read_in_the_order_of_its_numbers(width, rng, tmp_path):
    """part-2 is before part-10, as the rows of y are; marks of writers are left out."""
    X = rng.normal(size=(132, 4))
    y = X[:, 1] + X[:, 2] ** 2
    frame = pd.DataFrame(X).add_prefix("x")
    for k in range(11):
        frame[12 * k : 12 * k + 12].to_parquet(tmp_path / f"part-{k}.parquet")
    (tmp_path / "_SUCCESS").touch()
    (tmp_path / ".part-0.parquet.crc").write_text("crc")
    expected = foci(frame, y)
    assert {1, 2} <= set(expected.ordering.tolist())
    assert_same(foci(tmp_path, y), expected)
    (tmp_path / "0").mkdir()  # and so are folders
    for k in range(11):
        (tmp_path / "0" / f"x={k}").mkdir(parents=True)
        (tmp_path / f"part-{k}.parquet").rename(tmp_path / "0" / f"x={k}" / "0.parquet")
    assert_same(foci(tmp_path, y), expected)


def test_what_is_no_parquet_is_told_what_to_do(table, tmp_path, monkeypatch):
    X, y = table
    (tmp_path / "x.csv").write_text("a,b\n1,2\n")
    assert "pandas.read_csv(" in message(tmp_path / "x.csv", y)
    assert "lcodec-ext foci" in message(str(tmp_path / "x.csv"), y)
    whole = parquet(tmp_path / "x.parquet", X)
    broken = tmp_path / "broken.parquet"
    broken.write_bytes(Path(whole).read_bytes()[:-20])
    assert "it is not complete, or not Parquet" in message(broken, y)
    assert "there is no such file" in message("a/X.csv.gz", y)
    assert "got the str 'y.npy': read it first" in message(X, "y.npy")
    folder = tmp_path / "folder"
    folder.mkdir()
    assert "a folder without files" in message(folder, y)
    parquet(folder / "0.parquet", X)
    (folder / "readme.txt").write_text("about")
    said = message(folder, y)
    assert "readme.txt" in said
    assert said.endswith("take out what is not Parquet")
    paths = [whole, Path(whole)]
    assert "X is a list of paths: pass ColumnBlocks(X)" in message(paths, y)
    assert "patterns are not expanded" in message(f"{folder}/*.parquet", y)
    assert "X is 'https://x.org/x.parquet', and there is no such file: files are" in message(
        "https://x.org/x.parquet", y
    )
    monkeypatch.setenv("HOME", str(tmp_path))
    assert_same(foci("~/x.parquet", y), foci(whole, y))


def test_an_array_of_columns_is_turned(table):
    X, y = table
    assert message(X.T, y).endswith("X has 15, y has 120: pass X.T")
    assert message(X[1:], y).endswith("X has 119, y has 120")


def test_blocks_say_how_many_they_are(table):
    assert repr(ColumnBlocks([table[0]] * 2)) == "ColumnBlocks(2 blocks in a list)"


def spoil_block(monkeypatch, path, number):
    """The file is written when so many blocks have been read."""
    read, calls = BlockTable.block, []

    def spoiled(self, columns, behind):
        calls.append(len(columns))
        if len(calls) == number:
            os.utime(path, ns=(0, 0))
        return read(self, columns, behind)

    monkeypatch.setattr(BlockTable, "block", spoiled)


@pytest.mark.parametrize("kind", ["npy", "parquet", "blocks", "folder"])
def test_a_file_that_is_written_meanwhile(table, kind, tmp_path, monkeypatch):
    X, y = table
    set_width(monkeypatch, 4)
    if kind == "npy":
        path = tmp_path / "x.npy"
        given = memmap(path, X)
    else:
        path = tmp_path / "part.parquet"
        parquet(path, X)
        given = {"parquet": path, "blocks": ColumnBlocks([path]), "folder": tmp_path}[kind]
    spoil_block(monkeypatch, path, 6)
    with pytest.raises(RuntimeError, match="was written while it was in use|has changed while it"):
        foci(given, y)


LAST_READS = {
    "neighbours": {"n_neighbors": 2},
    "permutation": {"stop": "permutation", "n_permutations": 19, "alpha": 0.3, "seed": 1},
    "all at once": {},
    "preselected": {"preselected": [*range(15)], "standardize": None},
}


@pytest.mark.parametrize("as_blocks", [False, True])
@pytest.mark.parametrize("case", LAST_READS)
def test_a_file_that_is_written_at_the_last_read(table, case, as_blocks, tmp_path, monkeypatch):
    X, y = table
    set_width(monkeypatch, None if case == "all at once" else 4)
    path = tmp_path / "x.npy"
    np.save(path, np.ascontiguousarray(X.T))
    read, reads, last = BlockTable._read_into, [], []

    def written_after(self, *arguments, **options):
        read(self, *arguments, **options)
        reads.append(0)
        if len(reads) in last:
            os.utime(path, ns=(0, 0))

    monkeypatch.setattr(BlockTable, "_read_into", written_after)
    options = {"max_features": 2, **LAST_READS[case]}

    def select():
        reads.clear()
        file = np.load(path, mmap_mode="r").T
        return foci(ColumnBlocks([file]) if as_blocks else file, y, **options)

    select()
    last.append(len(reads))
    with pytest.raises(RuntimeError, match="was written while it was in use"):
        select()
    assert len(reads) == last[0]


def test_blocks_that_change_shape(table):
    X, y = table

    class Shrinking:
        reads = 0

        def __len__(self):
            return 2

        def __getitem__(self, k):
            Shrinking.reads += 1
            return X[:, : 7 if Shrinking.reads > 4 else 8]

    with pytest.raises(RuntimeError, match=r"had shape \(120, 8\) and has \(120, 7\) now"):
        foci(ColumnBlocks(Shrinking()), y)


def test_each_block_is_read_once_a_step(table, monkeypatch):
    X, y = table
    set_width(monkeypatch, 5)
    reads = []

    class Blocks:
        def __len__(self):
            return 3

        def __getitem__(self, k):
            reads.append(k)
            return X[:, 5 * k : 5 * k + 5]

    result = foci(ColumnBlocks(Blocks()), y, stop=False, max_features=3, ties="first")
    # opened, checked, read in three steps; and two selected columns
    selected = [int(column) // 5 for column in result.ordering]
    assert len(reads) <= 3 + 3 + 3 * 3 + 2 * len(selected)
    reads.clear()
    monkeypatch.undo()
    foci(ColumnBlocks(Blocks()), y, stop=False, max_features=3)
    assert len(reads) <= 3 * 3 + 3  # what fits stays in memory


def test_a_checkpoint_is_that_of_memory(table, tmp_path, monkeypatch):
    X, y = table
    expected = foci(X, y, stop=False, max_features=5, checkpoint=tmp_path / "whole.json")
    foci(X, y, stop=False, max_features=2, checkpoint=tmp_path / "two.json")
    set_width(monkeypatch, 4)
    file = memmap(tmp_path / "x.npy", X)
    found = foci(file, y, stop=False, max_features=5, checkpoint=tmp_path / "blocks.json")
    assert_same(found, expected)
    saved = [(tmp_path / f"{name}.json").read_text() for name in ("whole", "blocks")]
    assert saved[0] == saved[1]
    began = json.loads(saved[0])
    two = json.loads((tmp_path / "two.json").read_text())
    began |= {"steps": two["steps"], "m": two["m"], "stop_reason": None, "not_taken": None}
    (tmp_path / "part.json").write_text(json.dumps(began))
    resumed = foci(file, y, stop=False, max_features=5, checkpoint=tmp_path / "part.json")
    assert_same(resumed, expected)


def test_an_array_in_memory_with_a_limit(table, width):
    X, y = table
    assert_same(foci(X, y, max_memory=1 << 27), foci(X, y))
    frame = pd.DataFrame(X).add_prefix("x").assign(x3=np.arange(120) % 7)
    assert_same(foci(frame, y, max_memory=1e9), foci(frame, y))
    view = X[::2, ::2]
    assert_same(foci(view, y[::2], max_memory=1 << 27), foci(view, y[::2]))


def test_a_small_table_takes_little(rng, tmp_path):
    X = rng.normal(size=(400, 20))
    y = X[:, 3]
    assert_same(foci(X, y, max_memory=1 << 20), foci(X, y))
    path = parquet(tmp_path / "x.parquet", X)
    frame = pd.DataFrame(X).add_prefix("x")
    assert_same(foci(path, y, max_memory=20 << 20), foci(frame, y))
    assert re.fullmatch(
        r"max_memory must be at least 17,\d{3},\d{3} bytes for 400 rows and 20 columns; got 1,000",
        message(path, y, max_memory=1000),
    )


def test_a_private_copy_keeps_what_was_written_into_it(table, tmp_path, width):
    X, y = table
    np.save(tmp_path / "x.npy", X)
    private = np.load(tmp_path / "x.npy", mmap_mode="c")
    private[:, 3] = np.round(y, 0)
    assert_same(foci(private, y), foci(np.array(private), y))
    shared = np.load(tmp_path / "x.npy", mmap_mode="r+")
    shared[:, 3] = np.round(y, 0)
    assert_same(foci(shared, y), foci(np.array(private), y))


def on_ranks(rank, size, group, files, y, options, width):
    """Each rank reads its own columns; the last one has none, or has its own in memory."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        set_width(monkeypatch, width)
        X = files[rank] if rank < len(files) else np.empty((len(y), 0), np.float32)
        if str(X).endswith(".npy"):
            X = np.load(X, mmap_mode="r")
        return foci(X, y, group=group, **options)


@pytest.mark.parametrize("case", ["steps", "responses", "omit", "widened", "permutation", "many"])
def test_ranks_read_their_own_columns(ranks, table, case, tmp_path):
    X, y = table
    options = {"max_features": 4}
    if case == "responses":
        y = np.stack([y, X[:, 0] + X[:, 11]], axis=1)
    elif case == "omit":
        X[3, [1, 14]] = np.nan
        options["nan_policy"] = "omit"
    elif case == "permutation":
        options |= {"stop": "permutation", "alpha": 0.3, "n_permutations": 19, "seed": 3}
    elif case == "many":  # more columns of other ranks than there is room for at first
        X = np.tile(X, 3) + np.arange(45, dtype=np.float32)
        options = {"stop": False, "max_features": 40}
    if case == "widened":  # one rank has float64, as its integers miss
        frame = pd.DataFrame(X).add_prefix("x")
        whole = pa.Table.from_pandas(frame).set_column(
            2, "x2", pa.array([None, *(int(v) for v in X[1:, 2])], pa.int8())
        )
        options |= {"nan_policy": "omit", "preselected": ["x2"]}
        files = [tmp_path / "0.parquet", tmp_path / "1.parquet"]
        pq.write_table(whole.select(range(5)), files[0])
        pq.write_table(whole.select(range(5, 15)).cast(double(10)), files[1])
        expected = foci(whole, y, **options)
        given = [str(file) for file in files]
    else:
        expected = foci(X, y, **options)
        given = [str(tmp_path / "0.npy"), str(tmp_path / "1.npy")]
        np.save(given[0], X[:, :6])
        np.save(given[1], X[:, 6:])
    for width in (4, None):
        for found in ranks.run(on_ranks, given, y, options, width):
            assert_same(found, expected)


def double(p):
    return pa.schema([(f"x{k}", pa.float64()) for k in range(5, 5 + p)])


def reads_a_broken_file(rank, size, group, path, X, y):
    with pytest.MonkeyPatch.context() as monkeypatch:
        set_width(monkeypatch, 3)
        if rank == 1:
            spoil_block(monkeypatch, path, 4)
            X = np.load(path, mmap_mode="r")
        foci(X, y, group=group)


def test_a_file_that_is_written_on_one_rank_ends_all(ranks, table, tmp_path):
    X, y = table
    np.save(tmp_path / "x.npy", X)
    with pytest.raises(Failure, match="was written while it was in use"):
        ranks.run(reads_a_broken_file, tmp_path / "x.npy", X, y)


def test_the_record_keeps_its_promise():
    found = json.loads((ROOT / "benchmarks/results/out_of_core.json").read_text())
    record, page = found["record"], (ROOT / "docs/distributed.md").read_text()
    assert (record["columns"], record["table_bytes"]) == (10**6, 4 * 10**9)
    assert record["peak_bytes"] <= 10**9
    assert all(claim["met"] for claim in record["claims"])
    assert f"in {record['peak_bytes'] / 1e6:.0f} MB above" in page
    assert f"took {record['cpu_seconds']:.0f} s of CPU" in page
    for case in found["cost"]["cases"]:
        assert f"| {case['cpu_seconds']:.1f} s" in page
        assert f"| {case['peak_bytes'] / 1e6:.0f} MB |" in page
        if case["kind"] != "memory":
            assert f"{case['cpu_over_memory']} times" in page


def test_the_benchmark_runs(tmp_path):
    file = tmp_path / "record.json"
    command = [sys.executable, ROOT / "benchmarks/out_of_core.py", "--quick", "--parts", "record"]
    subprocess.run([*command, "--output", file], check=True, capture_output=True)
    record = json.loads(file.read_text())["record"]
    assert record["stop_reason"] == "no_gain"
    assert record["claims"][0]["met"]


PEAK = textwrap.dedent(
    """
    import json, sys
    import numpy as np
    from lcodec_ext import foci

    def peak():
        lines = open("/proc/self/status").read().splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM"))

    if sys.argv[1].endswith("parquet"):
        import pyarrow.parquet
        X = sys.argv[1]
    else:
        X = np.load(sys.argv[1], mmap_mode="r")
        X = X.T if sys.argv[2] == "F" else X
    y = np.load(sys.argv[3])
    foci(np.eye(20), np.arange(20.0), max_features=1)
    before = peak()
    options = json.loads(sys.argv[5])
    result = foci(X, y, max_memory=int(sys.argv[4]), **options)
    print(json.dumps([peak() - before, result.ordering.tolist()]))
    """
)


def peak_of(folder, X, y, limit, options, kind="F"):
    """Bytes above the interpreter, and what is selected."""
    path = folder / ("x.parquet" if kind == "parquet" else "x.npy")
    if kind == "parquet":
        parquet(path, X, compression="none", use_dictionary=False)
    else:
        np.save(path, X.T if kind == "F" else X)
    np.save(folder / "y.npy", y)
    arguments = [str(path), kind, str(folder / "y.npy"), str(limit), json.dumps(options)]
    done = subprocess.run(
        [sys.executable, "-P", "-c", PEAK, *arguments], capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout)


@pytest.mark.parametrize("kind", ["C", "F", "parquet"])
def test_the_peak_obeys_the_limit(rng, kind, tmp_path):
    """Of a table of 48 MB, which takes four times as much in memory."""
    n, p = 1000, 12_000
    limit = (190 if kind == "parquet" else 90) << 20
    X = rng.normal(size=(n, p)).astype(np.float32)
    y = X[:, 11_000] + X[:, 7]
    above, ordering = peak_of(tmp_path, X, y, limit, {"max_features": 3}, kind)
    assert set(ordering[:2]) == {7, 11_000}
    assert above < limit


@pytest.mark.parametrize(("tied", "p"), [(False, 4000), (True, 800)])
def test_the_peak_of_permutations_obeys_the_limit(rng, tied, p, tmp_path):
    n = 100
    X = rng.normal(size=(n, p)).astype(np.float32)
    X = np.round(X, 1) if tied else X
    options = {"stop": "permutation", "n_permutations": 4999, "seed": 1, "max_features": 1}
    limit = 80 << 20
    above, ordering = peak_of(tmp_path, X, X[:, 7], limit, options)
    assert ordering == [7]
    assert above < limit

"""FOCI on a table larger than its memory: how long a step takes, and what it takes at its peak.

    python benchmarks/out_of_core.py [--parts cost,record] [--quick] [--folder DIR] [--output FILE]

"cost" compares files with the same table in memory. "record" is a million columns of 1000 float32,
4 GB, in 1 GB of memory above the interpreter. Each case runs in a process of its own, in two
threads. Its peak is the largest resident memory less that before the call, pages of the mapped file
included. CPU times are of all threads. The first step has the check of all values, too. Files lie
in a temporary folder of DIR while they are needed.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import environment

if __name__ == "__main__":
    environment.limit_threads(2)

import numpy as np
from results import SCHEMA
from run import save

ROWS = 1000
CHUNK = 10_000  # columns that are drawn at a time
WEIGHTS = (1.0, 0.8, 0.6)  # of the columns on which y depends
LIMIT = 10**9  # bytes above the interpreter


def drawn(p: int, first: int) -> np.ndarray:
    """Columns from the first on, one a row."""
    rng = np.random.default_rng([18, first])
    return rng.standard_normal((min(CHUNK, p - first), ROWS), dtype=np.float32)


def planted(p: int) -> list[int]:
    return [p // 3, 2 * p // 3, p - 1]


def write(kind: str, p: int, folder: Path) -> None:
    """The table as "columns" (p, n), "rows" (n, p) or "parquet", and y."""
    y = 0.2 * np.random.default_rng(7).standard_normal(ROWS)
    shape = (ROWS, p) if kind == "rows" else (p, ROWS)
    X = np.lib.format.open_memmap(folder / "X.npy", "w+", np.float32, shape)
    for first in range(0, p, CHUNK):
        part = drawn(p, first)
        some = slice(first, first + len(part))
        X[(slice(None), some) if kind == "rows" else some] = part.T if kind == "rows" else part
        for column, weight in zip(planted(p), WEIGHTS, strict=True):
            if first <= column < first + len(part):
                y += weight * part[column - first]
    X.flush()
    np.save(folder / "y.npy", y)
    if kind == "parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        table = pa.table({f"x{k}": X[k] for k in range(p)})
        pq.write_table(table, folder / "X.parquet", compression="none", use_dictionary=False)
        (folder / "X.npy").unlink()


def resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(field))


def select(case: dict[str, Any], folder: Path) -> dict[str, Any]:
    """One selection, in this process."""
    from lcodec_ext import foci
    from lcodec_ext.dependence.backends.blocks import BlockEngine
    from lcodec_ext.dependence.backends.cpu import CpuEngine

    y = np.load(folder / "y.npy")
    X: Any = folder / "X.parquet"
    if case["kind"] == "parquet":
        import pyarrow.dataset
        import pyarrow.parquet  # noqa: F401
    elif case["kind"] == "memory":
        X = np.ascontiguousarray(np.load(folder / "X.npy").T)
    else:
        X = np.load(folder / "X.npy", mmap_mode="r")
        X = X.T if case["kind"] == "columns" else X
    foci(drawn(5, 0).T, y, max_features=1)  # loads what is loaded late
    engine: Any = CpuEngine if case["kind"] == "memory" else BlockEngine
    selected, marks = engine.select, []

    def mark() -> None:
        marks.append((time.perf_counter(), time.process_time()))

    def marked(self: Any, column: int) -> None:
        selected(self, column)
        mark()

    engine.select = marked
    before = resident("VmRSS")
    mark()
    result = foci(X, y, max_features=case["steps"], max_memory=case["max_memory"])
    mark()
    seconds, cpu_seconds = (np.diff(each).round(2).tolist() for each in zip(*marks, strict=True))
    return {
        "seconds": round(sum(seconds), 2),
        "cpu_seconds": round(sum(cpu_seconds), 2),
        "seconds_of_steps": seconds,
        "cpu_seconds_of_steps": cpu_seconds,
        "peak_bytes": resident("VmHWM") - before,
        "ordering": result.ordering.tolist(),
        "T": result.cumulative.round(4).tolist(),
        "stop_reason": result.stop_reason,
    }


def measure(
    kind: str, p: int, steps: int, max_memory: int | None, folder: Path, again: bool = False
) -> dict[str, Any]:
    """A case in a process of its own, on a file that is written first, or `again` on that one."""
    case = {"kind": kind, "columns": p, "steps": steps, "max_memory": max_memory}
    if not again:
        write("columns" if kind == "memory" else kind, p, folder)
    command = [sys.executable, __file__, "--case", json.dumps(case), "--folder", str(folder)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    found = case | {"rows": ROWS, "table_bytes": 4 * ROWS * p, "planted": planted(p)}
    found |= json.loads(done.stdout)
    passes = len(found["seconds_of_steps"])
    found["cpu_ns_an_element_and_step"] = round(found["cpu_seconds"] / passes / p / ROWS * 1e9, 1)
    print(found, flush=True)
    return found


def cost(quick: bool, folder: Path) -> dict[str, Any]:
    """The same selection in memory and from files, in blocks of a tenth of the table or less."""
    p = 2_000 if quick else 50_000
    limit = (1 << 28) if quick else 400 << 20
    cases = [measure("memory", p, 3, None, folder)]
    for kind in ("columns", "rows", "parquet"):
        cases.append(measure(kind, p, 3, limit, folder, again=kind == "columns"))
        assert cases[-1]["ordering"] == cases[0]["ordering"]
        assert cases[-1]["T"] == cases[0]["T"]
        ratio = cases[-1]["cpu_seconds"] / cases[0]["cpu_seconds"]
        cases[-1]["cpu_over_memory"] = round(ratio, 2)
    return {"cases": cases}


def record(quick: bool, folder: Path) -> dict[str, Any]:
    """A million columns in a gigabyte."""
    p = 20_000 if quick else 1_000_000
    found = measure("columns", p, 5, 200 << 20 if quick else LIMIT, folder)
    assert set(found["ordering"][:3]) == set(planted(p))
    claim = {"quantity": "peak_bytes", "at_most": LIMIT, "value": found["peak_bytes"]}
    return found | {"claims": [claim | {"met": found["peak_bytes"] <= LIMIT}]}


PARTS = {"cost": cost, "record": record}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    default = environment.ROOT / "benchmarks/results/out_of_core.json"
    parser.add_argument("--parts", default=",".join(PARTS), help="which parts, with commas")
    parser.add_argument("--quick", action="store_true", help="small sizes: does everything run?")
    parser.add_argument("--folder", type=Path, help="where the files lie; a temporary one")
    parser.add_argument("--output", type=Path, default=default)
    parser.add_argument("--case", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.case:
        print(json.dumps(select(options.case, options.folder)))
        return 0
    names = options.parts.split(",")
    if unknown := [name for name in names if name not in PARTS]:
        parser.error(f"no part {', '.join(unknown)}; there are {', '.join(PARTS)}")
    old = json.loads(options.output.read_text()) if options.output.exists() else {}
    result = {
        "schema": SCHEMA,
        **environment.heading(),
        "settings": {"quick": options.quick, "threads": 2},
    } | {part: old[part] for part in PARTS if part in old and part not in names}
    for name in names:
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            result[name] = PARTS[name](options.quick, Path(folder))
        save(result, options.output)
    print(f"wrote {options.output}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

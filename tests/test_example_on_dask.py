"""The example on a Dask cluster, with two workers on this machine."""

import os
import subprocess
import sys
from pathlib import Path

import on_dask

SCRIPT = Path(__file__).parent.parent / "examples" / "on_dask.py"


def test_two_workers_find_what_one_process_finds(tmp_path):
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--seed", "4"],
        env={
            "DASK_TEMPORARY_DIRECTORY": str(tmp_path),
            "GLOO_SOCKET_IFNAME": "lo",
            "OMP_NUM_THREADS": "1",
            **os.environ,
        },
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    alone = on_dask.select(4)
    assert {7, 31} <= set(alone.ordering.tolist())
    assert done.stdout == f"2 workers\n{alone}\n"

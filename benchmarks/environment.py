"""Describe the machine and the software, and keep threads from disturbing each other.

This module imports the standard library only. `limit_threads` must run before NumPy, torch and the
others are loaded, because they read its variables then.
"""

import os
import platform
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = (
    "numpy",
    "scipy",
    "scikit-learn",
    "torch",
    "transformers",
    "faiss-cpu",
    "pyFOCI",
    "curvlinops-for-pytorch",
)


def limit_threads(threads: int) -> None:
    """Give everything the same number of threads, and send idle ones to sleep.

    OpenMP and OpenBLAS threads spin for a while after their work is done, and would share the cores
    with whatever is timed next.
    """
    count = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "LCODEC_NUM_THREADS")
    os.environ.update(dict.fromkeys(count, str(threads)))
    os.environ.update(OMP_WAIT_POLICY="passive", KMP_BLOCKTIME="0", OPENBLAS_THREAD_TIMEOUT="4")


@contextmanager
def cpu_threads(count: int) -> Iterator[None]:
    """Give the package so many threads for a while."""
    with mock.patch.dict(os.environ, LCODEC_NUM_THREADS=str(count)):
        yield


def cores() -> int:
    """Return how many CPUs this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def machine() -> dict:
    """Describe the kind of machine, without anything that names this one."""
    import lcodec_ext

    simd = os.environ.get("LCODEC_SIMD") or lcodec_ext.build_info()["simd_supported"][-1]
    return {
        "cpu": _line("/proc/cpuinfo", "model name") or platform.processor(),
        "cpu_family_model_stepping": "/".join(
            _line("/proc/cpuinfo", key) for key in ("cpu family", "model", "stepping")
        ),
        "cores": cores(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
        "os": f"{platform.system()} {platform.machine()}",
        "simd": simd,
    }


def versions() -> dict:
    """Return versions of Python, of the package and its compiler, and of the peers."""
    import lcodec_ext

    build = lcodec_ext.build_info()
    found = {"python": platform.python_version(), "lcodec_ext": build["version"]}
    found |= {"compiler": build["compiler"], "build_type": build["build_type"]}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def commit() -> dict:
    """Return the working tree's commit, and whether anything except recorded results differs."""
    try:
        head = _git("rev-parse", "HEAD")
        dirty = bool(_git("status", "--porcelain", "--", ".", ":!benchmarks/results"))
    except (OSError, subprocess.CalledProcessError):
        return {"commit": None, "dirty": None}
    return {"commit": head, "dirty": dirty}


def heading() -> dict:
    """What every result file says of its run, before it begins."""
    created = datetime.now(UTC).isoformat(timespec="seconds")
    of = {"machine": machine(), "versions": versions(), "load_before": load()}
    return {"created": created, **commit(), **of}


def nvidia(*fields: str, which: str | None = None) -> list[list[str]]:
    """Ask nvidia-smi for fields of every device or of one; empty if it does not run."""
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"]
    if which is not None:
        command.append(f"--id={which}")
    try:
        done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return []
    return [[cell.strip() for cell in line.split(",")] for line in done.stdout.splitlines()]


def load() -> float:
    """Processes that ran or waited to run in the last minute; near 0 before a fair recording."""
    return round(os.getloadavg()[0], 2)


def _git(*arguments: str) -> str:
    command = ["git", *arguments]
    return subprocess.run(
        command, cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout.strip()


def _line(path: str, key: str) -> str:
    """Return the value of the first "key : value" line of a file; empty without such a line."""
    try:
        lines = Path(path).read_text().splitlines()
    except OSError:
        return ""
    values = [line.partition(":")[2].strip() for line in lines if line.split(":")[0].strip() == key]
    return values[0] if values else ""

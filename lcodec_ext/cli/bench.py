"""A few timed calls whose answers are known, for the command line.

Data come from Philox words by exact operations. Every machine must give the same answer to the last
bit, so a case also says whether the answer was right.
"""

import hashlib
import os
import platform
import statistics
import time
from collections.abc import Callable
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lcodec_ext import build_info, codec, foci, nearest_neighbors

PACKAGES = (
    "numpy",
    "torch",
    "scikit-learn",
    "matplotlib",
    "tqdm",
    "pandas",
    "pyarrow",
    "transformers",
    "safetensors",
)


class Case(NamedTuple):
    """Something to time: what it is, and a function that returns the call and its data."""

    title: str
    prepare: Callable[[], Callable[[], Any]]
    answer: str
    needs: str | None = None


def machine() -> dict[str, Any]:
    """What tells one kind of machine from another, and nothing that names this one."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cpu": _cpu(),
        "cores": cores(),
        "memory_gib": round(memory / 2**30),
        "os": f"{platform.system()} {platform.machine()}",
        "simd": os.environ.get("LCODEC_SIMD", "").strip() or build_info()["simd_supported"][-1],
    }


def versions() -> dict[str, str | None]:
    """Versions of Python, the package and what it works with; None where not installed."""
    found: dict[str, str | None] = {
        "lcodec_ext": build_info()["version"],
        "python": platform.python_version(),
    }
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    return found


def cores() -> int:
    """CPUs that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "unknown"


def measure(case: Case, repeats: int) -> dict[str, Any]:
    """Time a case after one run to warm up; seconds, and whether the answers were right."""
    run = case.prepare()
    answers = {_digest(run())}
    samples = []
    for _ in range(repeats):
        start = time.perf_counter()
        answer = run()
        samples.append(time.perf_counter() - start)
        answers.add(_digest(answer))
    return {
        "title": case.title,
        "median_seconds": statistics.median(samples),
        "samples": samples,
        "right": answers == {case.answer},
        "answer": " ".join(sorted(answers)),
    }


def missing(case: Case) -> str | None:
    """The package that the case needs and that is not installed."""
    return case.needs if case.needs and find_spec(case.needs) is None else None


def _uniform(n: int, p: int) -> NDArray[np.float64]:
    """Uniform on [0, 1), the same bits with every version of NumPy."""
    words = np.random.Philox(20220619).random_raw(n * p)
    return (words >> np.uint64(11)).astype(np.float64).reshape(n, p) * 2.0**-53


def _digest(answer: Any) -> str:
    digest = hashlib.sha256()
    for part in answer if isinstance(answer, tuple) else (answer,):
        digest.update(np.ascontiguousarray(part).tobytes())
    return digest.hexdigest()[:16]


def _foci() -> Callable[[], Any]:
    X = _uniform(1000, 1000)
    y = X[:, 3] * X[:, 8] + X[:, 15] * X[:, 15]
    return lambda: tuple(foci(X, y, stop=False, max_features=4))


def _codec() -> Callable[[], Any]:
    X = _uniform(100_000, 3)
    y = X[:, 0] * X[:, 1] + X[:, 2]
    return lambda: codec(y, X[:, 0], X[:, 1:])


def _neighbors() -> Callable[[], Any]:
    X = _uniform(20_000, 4)
    return lambda: nearest_neighbors(X)


def _masked_product() -> Callable[[], Any]:
    import torch

    from lcodec_ext.curvature.kernels import masked_gram_product

    size, count, apart = 4608, 10, 3
    G = torch.from_numpy(_uniform(200, size * count * apart).astype(np.float32))
    v = torch.from_numpy(_uniform(size * count, 1)[:, 0].astype(np.float32))
    segments = torch.tensor([(k * apart * size, size) for k in range(count)])
    return lambda: masked_gram_product(G, v, segments).numpy()


CASES = {
    "foci": Case("FOCI, 4 steps, n = 1,000, p = 1,000", _foci, "d6ff7ab4e6251502"),
    "codec": Case("T(Y, Z | X), n = 100,000, three columns", _codec, "e4344e24e55710d3"),
    "neighbors": Case("nearest neighbours, n = 20,000, d = 4", _neighbors, "9d407536ceef3511"),
    "masked_product": Case(
        "(1/n) G^T G v, n = 200, 10 segments of 4,608 out of 3 times as many columns",
        _masked_product,
        "dd440a9af6a3abc8",
        needs="torch",
    ),
}

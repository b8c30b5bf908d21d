"""Small calls again and again, a graph in two ways, and calls from several Python threads."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import environment
import numpy as np
from case_data import Data
from numpy.typing import NDArray

import lcodec_ext

Size = dict[str, Any]


def graph(data: Data, backend: str) -> NDArray:
    return lcodec_ext.dependence_graph(data["X"], backend=backend).weights


def column_by_column(data: Data, threads: int) -> NDArray:
    """The same graph by one call of foci for each column, which checks and sorts all others."""
    X = data["X"]
    p = X.shape[1]
    weights = np.zeros((p, p))
    for i in range(p):
        others = np.delete(np.arange(p), i)
        result = lcodec_ext.foci(X[:, others], X[:, i])
        weights[i, others[result.ordering]] = result.conditional
    return weights


def many(call: Callable[[Data, str], Any]) -> Callable[..., Any]:
    """The same small call again and again, as in a loop of a user's; returns the last answer."""

    def run(data: Data, backend: str | int) -> Any:
        given = backend if isinstance(backend, str) else "auto"  # a peer is given its threads
        for _ in range(data["calls"]):
            answer = call(data, given)
        return answer

    return run


def a_call(size: Size, seconds: float) -> dict[str, float]:
    return {"microseconds_a_call": round(seconds / size["calls"] * 1e6, 1)}


def from_python_threads(data: Data, backend: str) -> NDArray:
    """`codec` of every table, from as many Python threads as the case has."""
    with ThreadPoolExecutor(data["python_threads"]) as pool:
        return np.array([*pool.map(lambda each: _codec(each, backend), data["tables"])])


def from_one_thread(data: Data, threads: int) -> NDArray:
    """The same, one after the other, with so many threads for each call."""
    with environment.cpu_threads(threads):
        return np.array([_codec(each, "auto") for each in data["tables"]])


def _codec(data: Data, backend: str) -> float:
    return lcodec_ext.codec(data["y"], data["z"], data["x"], backend=backend)

"""Data of the benchmark cases: the same size gives the same data.

The columns that matter come first, so that a peer timed on a part selects the same ones.
"""

from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lcodec_ext.dependence.backends.resolve import resolve

Data = dict[str, Any]


def _response(columns: list[NDArray]) -> NDArray:
    """A response that is a sum; FOCI selects its columns in this order."""
    return sum(w * c.astype(np.float64) for w, c in zip((2, 1.4, 1, 0.7), columns, strict=True))


def continuous(rng: np.random.Generator, n: int, p: int, steps: int = 4) -> Data:
    X = rng.standard_normal((n, p), dtype=np.float32)
    return {"X": X, "y": _response([X[:, c] for c in (7, 2, 9, 4)]), "steps": steps}


def continuous_given(rng: np.random.Generator, n: int, p: int, k: int) -> Data:
    """One step after the first k of the columns that matter have been selected."""
    return continuous(rng, n, p, steps=1) | {"given": (7, 2, 9)[:k]}


def prepared(rng: np.random.Generator, n: int, p: int, k: int) -> Data:
    """One step as the engine sees it: k columns are selected, the others are candidates.

    data["engine"](backend) returns the engine, which is made once, and the candidates.
    """
    X, y = (continuous(rng, n, p)[key] for key in ("X", "y"))
    given = (7, 2, 9)[:k]
    candidates = np.setdiff1d(np.arange(p), given)

    @cache
    def engine(backend: str) -> tuple[Any, NDArray]:
        chosen = resolve("reference" if backend == "reference" else "cpu")
        ones = np.ones(p, np.float32)
        made = chosen.engine(chosen.lay_out(X), ones, chosen.ranks(y)[0], "average", 0)
        for column in given:
            made.select(column)
        return made, candidates

    return {"X": X, "engine": engine}


def independent(rng: np.random.Generator, n: int, p: int, steps: int = 4) -> Data:
    """y is independent of X, so no candidate falls far behind another."""
    return continuous(rng, n, p, steps) | {"y": rng.standard_normal(n)}


def heavy_tailed(rng: np.random.Generator, n: int, p: int, steps: int = 4) -> Data:
    """Cauchy columns, each with outliers."""
    X = rng.standard_cauchy((n, p)).astype(np.float32)
    y = _response([np.arctan(X[:, c]) for c in (7, 2, 9, 4)])
    return {"X": X, "y": y, "steps": steps}


def heavy_triple(rng: np.random.Generator, n: int) -> Data:
    X = rng.standard_cauchy((n, 3)).astype(np.float32)
    return {"x": X[:, :2], "z": X[:, 2:], "y": np.arctan(X).sum(axis=1, dtype=np.float64) % 1}


def few(rng: np.random.Generator, n: int, p: int, steps: int = 2) -> Data:
    X = rng.standard_normal((n, p), dtype=np.float32)
    return {"X": X, "y": _response([X[:, c] for c in (3, 2, 1, 0)]), "steps": steps}


def binary(rng: np.random.Generator, n: int, p: int, steps: int = 4) -> Data:
    """Binary attributes, each with its own frequency, and a binary response."""
    frequency = rng.uniform(0.1, 0.9, p)
    frequency[[7, 2, 9, 4]] = 0.5
    X = (rng.random((n, p)) < frequency).astype(np.float64)
    latent = _response([X[:, c] for c in (7, 2, 9, 4)]) + 0.5 * rng.standard_normal(n)
    return {"X": X, "y": (latent > 2.5).astype(np.float64), "steps": steps}


def mixed(rng: np.random.Generator, n: int, p: int, steps: int = 4) -> Data:
    """X has binary and continuous columns in turn; "continuous" has continuous columns only."""
    whole = rng.standard_normal((n, p), dtype=np.float32)
    X = whole.copy()
    X[:, ::2] = X[:, ::2] > 0
    y = _response([2 * X[:, 2], X[:, 7], 2 * X[:, 4], X[:, 9]])
    y_whole = _response([whole[:, c] for c in (2, 7, 4, 9)])
    return {"X": X, "y": y, "steps": steps, "continuous": {"X": whole, "y": y_whole}}


def cloud(rng: np.random.Generator, n: int, d: int, offset: float = 0.0) -> Data:
    return {"X": rng.standard_normal((n, d), dtype=np.float32) + np.float32(offset)}


def triple(rng: np.random.Generator, n: int) -> Data:
    """y depends on z only together with the two columns of x."""
    x, z = rng.random((n, 2), dtype=np.float32), rng.random((n, 1), dtype=np.float32)
    return {"x": x, "z": z, "y": (x.sum(axis=1) + z[:, 0]).astype(np.float64) % 1}


def pair(rng: np.random.Generator, n: int) -> Data:
    x = rng.standard_normal(n)
    return {"x": x, "y": x**2 + rng.standard_normal(n)}


def table(rng: np.random.Generator, n: int, p: int) -> Data:
    """Half of the columns are products of two of the others."""
    X = rng.standard_normal((n, p))
    half = p // 2
    X[:, half : 2 * half] = X[:, :half] * np.roll(X[:, :half], 1, axis=1)
    return {"X": X}


def stored_rows(rng: np.random.Generator, n: int, segments: int, length: int) -> Data:
    """Rows of per-sample gradients. A fifth of the columns are selected, in segments."""
    columns = 5 * segments * length
    G = rng.standard_normal((n, columns), dtype=np.float32)
    table = np.array([(5 * k * length + length, length) for k in range(segments)])
    v = rng.standard_normal(segments * length, dtype=np.float32)
    return {"G": G, "v": v, "segments": table, "damping": 0.1}


def masked_curvature(
    rng: np.random.Generator,
    kind: str,
    network: str,
    layer: str,
    n: int,
    units: int,
    damping: float = 0.0,
    tiny: bool = False,
) -> Data:
    """A network, n samples, and a vector over some units of a layer.

    data["build"]() returns a new operator of the package, data["operator"]() one that is kept.
    """
    import networks
    import torch

    from lcodec_ext import curvature

    model, X, y = networks.make(network, n, tiny, seed=int(rng.integers(2**32)))
    loss_fn = torch.nn.CrossEntropyLoss()
    selected = rng.choice(curvature.n_units(model.get_submodule(layer)), units, replace=False)
    selection = curvature.UnitSelection({layer: selected.tolist()})

    def build() -> Any:
        made = {
            "Hessian": curvature.HessianOperator,
            "Gauss-Newton": curvature.GaussNewtonOperator,
            "Fisher": curvature.FisherOperator,
        }[kind]
        return made(model, loss_fn, (X, y), selection, damping=damping)

    return {
        "kind": kind,
        "model": model,
        "loss_fn": loss_fn,
        "X": X,
        "y": y,
        "selection": selection,
        "v": rng.standard_normal(selection.size(model), dtype=np.float32),
        "damping": damping,
        "build": build,
        "operator": cache(build),
    }

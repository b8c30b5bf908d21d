"""The registry of benchmark cases: what is run on which data, and how answers are compared.

A case runs this package and its peers on one size (a point) or on several (a sweep). Before
anything is timed, the package must give the bits of its own reference on the case's `tiny` data, or
agree with it if the case says so. Then every peer's answer is compared with the package's. The
cases here run on the CPU; cases for a GPU are in gpu_cases.py. case_data.py makes the data.
"""

import copy
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import accelerator
import calls
import numpy as np
import peers
from case_data import (
    Data,
    binary,
    cloud,
    continuous,
    continuous_given,
    few,
    heavy_tailed,
    heavy_triple,
    independent,
    masked_curvature,
    mixed,
    pair,
    prepared,
    stored_rows,
    table,
    triple,
)
from numpy.typing import NDArray
from peers import Selection

import lcodec_ext
from lcodec_ext import _core
from lcodec_ext.curvature import reference as reference_curvature
from lcodec_ext.dependence.backends.cpu import CpuBackend

SEED = 20220619
Size = dict[str, Any]


@dataclass(frozen=True)
class Peer:
    """Another implementation of the task.

    Parameters
    ----------
    run : callable(data, threads)
        Returns the answer. The peer is left out if this raises ImportError.
    answers : {"identical", "asserted", "compared", "other"}
        How the answer relates to the package's. "identical": it must be the same, bit for bit.
        "asserted": it must agree. "compared": it may differ, and the verdict is recorded. "other":
        it answers another task.
    part : int, optional
        The peer is timed on the first `part` columns of X, and the time multiplied by p / part.
        This favours the peer if its time grows at least linearly in p.
    fits : callable(size), optional
        Whether the peer takes part at a size. By default it takes part at all sizes.
    on_device : bool, default False
        In a run on a GPU, whether the peer is given tensors on the GPU, like the package, or NumPy
        arrays.
    """

    name: str
    run: Callable[[Data, int], Any]
    answers: Literal["identical", "asserted", "compared", "other"] = "compared"
    part: int | None = None
    fits: Callable[[Size], bool] = lambda size: True
    on_device: bool = False


@dataclass(frozen=True)
class Claim:
    """A bound on a peer's time over the package's, or on one of the case's metrics."""

    quantity: str
    at_least: float = -float("inf")
    at_most: float = float("inf")


@dataclass(frozen=True)
class Case:
    """One benchmark.

    Parameters
    ----------
    title : str
        What is done, for tables; formatted with the size.
    make : callable(rng, **size)
        Returns the data. The same size gives the same data.
    ours : callable(data, backend)
        Runs this package and returns its answer.
    compare : callable(ours, theirs, data)
        Returns whether a peer's answer agrees ("agrees") and how far it is off.
    full, quick : tuple of sizes
        The points of a full run, and small points that take a second together.
    tiny : size
        Small enough for the package's pure Python reference.
    sweep : str, optional
        The size that varies from point to point.
    metrics : callable(size, seconds), optional
        Further numbers to record besides the median time, by name.
    exact : bool, default True
        True: the package must give the bits of its reference. False: it must agree with it, as
        `compare` decides.
    needs : str, optional
        A module without which the case is left out.
    """

    name: str
    title: str
    make: Callable[..., Data]
    ours: Callable[[Data, str], Any]
    compare: Callable[[Any, Any, Data], dict[str, Any]]
    full: tuple[Size, ...]
    quick: tuple[Size, ...]
    tiny: Size
    peers: tuple[Peer, ...] = ()
    claims: tuple[Claim, ...] = ()
    sweep: str | None = None
    metrics: Callable[[Size, float], dict[str, float]] | None = None
    exact: bool = True
    needs: str | None = None

    def data(self, size: Size) -> Data:
        return self.make(np.random.default_rng(SEED), **size)

    def verify(self, device: str = "cpu") -> None:
        """Raise AssertionError if package and reference give different answers on the tiny data."""
        data = self.data(self.tiny)
        placed = accelerator.place(data, device)
        got, expected = self.ours(placed, device), self.ours(data, "reference")
        if self.exact:
            same = same_bits(got, expected)
        else:
            same = self.compare(expected, got, data)["agrees"]
        assert same, f"{self.name}: {got} != {expected}"


def _flat(answer: Any) -> NDArray:
    return np.hstack(answer) if isinstance(answer, tuple) else np.atleast_1d(answer)


def same_bits(a: Any, b: Any) -> bool:
    return np.array_equal(_flat(a), _flat(b))


def first_columns(data: Data, count: int) -> Data:
    return data | {"X": np.ascontiguousarray(data["X"][:, :count])}


# --------------------------------------------------------------------------------------------
# This package


def foci(data: Data, backend: str, standardize: Literal["scale"] | None = "scale") -> Selection:
    result = lcodec_ext.foci(
        data["X"],
        data["y"],
        stop=False,
        max_features=data["steps"],
        preselected=data.get("given"),
        standardize=standardize,
        backend=backend,
    )
    return Selection(tuple(result.ordering.tolist()), tuple(result.cumulative.tolist()))


def score(data: Data, backend: str) -> tuple[NDArray, NDArray]:
    engine, candidates = data["engine"](backend)
    return engine.score(candidates)


def codec(data: Data, backend: str) -> float:
    return lcodec_ext.codec(data["y"], data["z"], data["x"], backend=backend)


def neighbors(data: Data, backend: str) -> NDArray:
    return accelerator.fetch(lcodec_ext.nearest_neighbors(data["X"], backend=backend))


def xi(data: Data, backend: str) -> float:
    return lcodec_ext.xi(data["x"], data["y"], backend=backend)


def gram_product(data: Data, backend: str) -> NDArray:
    if backend == "reference":
        G, v = data["G"], data["v"]
        tree = reference_curvature.CpuTree(v.itemsize)
        table = data["segments"].tolist()
        return reference_curvature.masked_gram_product(
            tree, G, v[None], table, None, data["damping"]
        )[0]
    import torch

    from lcodec_ext.curvature.kernels import masked_gram_product

    G, v, segments = (torch.as_tensor(data[key]) for key in ("G", "v", "segments"))
    return accelerator.fetch(masked_gram_product(G, v, segments, damping=data["damping"]))


def dense_curvature(data: Data) -> Any:
    """The dense matrix in float64, with damping; for tiny networks."""
    import torch

    model, X = copy.deepcopy(data["model"]).double(), data["X"]
    X = X.double() if X.is_floating_point() else X
    block = peers.dense_curvature(
        data["kind"], model, data["loss_fn"], X, data["y"], data["selection"]
    )
    return block + data["damping"] * torch.eye(len(block))


def curvature_product(data: Data, backend: str) -> NDArray:
    import torch

    v = torch.from_numpy(data["v"])
    if backend == "reference":
        return (dense_curvature(data) @ v.double()).numpy()
    return (data["operator"]() @ v).numpy()


def curvature_solve(data: Data, backend: str) -> NDArray:
    """Build the operator and solve."""
    import torch

    v = torch.from_numpy(data["v"])
    if backend == "reference":
        return torch.linalg.solve(dense_curvature(data), v.double()).numpy()
    return data["build"]().solve(v).x.numpy()


# --------------------------------------------------------------------------------------------
# Peers


def by_kdtree(scale: bool = True, averaged: bool = False, **options: Any) -> Peer:
    def run(data: Data, threads: int) -> Selection:
        given = data.get("given", ())
        return peers.kdtree_foci(
            data["X"], data["y"], data["steps"], threads, averaged, scale, given
        )

    ties = "averaged" if averaged else "drawn"
    answers: Any = "asserted" if averaged else "compared"
    return Peer(f"k-d tree per candidate, ties {ties}", run, answers, **options)


def by_published(**options: Any) -> Peer:
    def run(data: Data, threads: int) -> Selection:
        return peers.published_foci(data["X"], data["y"], data["steps"], threads)

    return Peer("published algorithm", run, **options)


def by_pyfoci(scale: bool = True, **options: Any) -> Peer:
    def run(data: Data, threads: int) -> Selection:
        return peers.pyfoci(data["X"], data["y"], data["steps"], threads, scale)

    return Peer("pyFOCI", run, **options)


def _on_triple(function: Callable[..., float]) -> Callable[[Data, int], float]:
    return lambda data, threads: function(data["y"], data["z"], data["x"], threads)


def _on_rows(function: Callable[..., NDArray]) -> Callable[[Data, int], NDArray]:
    return lambda data, threads: function(data["X"], threads)


def _on_stored_rows(name: str, function: Callable[..., NDArray], **options: Any) -> Peer:
    def run(data: Data, threads: int) -> NDArray:
        arguments = (data[key] for key in ("G", "v", "segments", "damping"))
        return function(*arguments, threads)

    return Peer(name, run, **options)


def _on_network(name: str, function: Callable[..., NDArray]) -> Peer:
    def run(data: Data, threads: int) -> NDArray:
        arguments = (data[key] for key in ("kind", "model", "loss_fn", "X", "y", "selection", "v"))
        return function(*arguments, threads)

    return Peer(name, run, "asserted")


BY_TORCH_FUNC = _on_network("torch.func, all parameters", peers.functional_product)
BY_CURVLINOPS = _on_network("curvlinops, all parameters", peers.curvlinops_product)


# --------------------------------------------------------------------------------------------
# Comparing answers


# Each returns "agrees", "off_by" and, for tables, "answer".


def same_selection(ours: Selection, theirs: Selection, data: Data) -> dict[str, Any]:
    """The same columns in the same order; "off_by" is the largest difference in T."""
    off = float(np.abs(np.subtract(ours.cumulative, theirs.cumulative)).max())
    agrees = ours.ordering == theirs.ordering
    return {"agrees": agrees, "off_by": off, "answer": "same" if agrees else "other columns"}


def same_value(ours: float, theirs: float, data: Data, within: float = 1e-12) -> dict[str, Any]:
    off = abs(ours - theirs)
    return {
        "agrees": off <= within,
        "off_by": off,
        "answer": "same" if off <= within else f"off by {off:.1g}",
    }


def same_vector(ours: NDArray, theirs: NDArray, data: Data, within: float = 1e-5) -> dict[str, Any]:
    """Equal up to float32's rounding; "off_by" is the norm of the difference over the norm."""
    off = float(np.linalg.norm(ours - theirs) / np.linalg.norm(ours))
    return {
        "agrees": off <= within,
        "off_by": off,
        "answer": "same" if off <= within else f"off by {off:.1g}",
    }


def same_neighbors(ours: NDArray, theirs: NDArray, data: Data) -> dict[str, Any]:
    """Neighbours at the same distance, up to rounding in X's precision, and never the row itself.

    "off_by" is the share of rows whose neighbour is farther away than ours.
    """
    X = data["X"].astype(np.float64)
    near, far = (np.square(X - X[index]).sum(axis=1) for index in (ours, theirs))
    rounding = (X.shape[1] + 2) * float(np.finfo(data["X"].dtype).eps)
    wrong = (far > near * (1 + rounding)) | (theirs == np.arange(len(X)))
    agrees = not (wrong | (far < near * (1 - rounding))).any()
    share = float(wrong.mean())
    return {
        "agrees": agrees,
        "off_by": share,
        "answer": "same" if agrees else f"{share:.1%} of rows wrong",
    }


class NoInstrumentsError(RuntimeError):
    """This build of the package counts nothing."""


def check_instruments() -> None:
    """Raise if the compiled module cannot say what its scans did."""
    if not hasattr(_core.dependence, "saturate"):
        raise NoInstrumentsError(
            "this build of lcodec_ext has no instruments: build it with `make test`, or with "
            "-C cmake.define.LCODEC_INSTRUMENTS=ON"
        )


def bound_of(instructions: int) -> float:
    """Thread-seconds that this number of vector instructions of scans takes at least.

    The count has the instructions for each distance to a candidate (kernels.cpp names them). The
    rate is measured here: how fast this machine issues independent multiplications and additions.
    Starting and ending a scan and waiting for memory come on top.
    """
    level = os.environ.get("LCODEC_SIMD") or "auto"
    check_instruments()
    _core.dependence.saturate(level, 10**6)
    start = time.perf_counter()
    issued = _core.dependence.saturate(level, 10**7)
    return instructions * (time.perf_counter() - start) / issued


def scan_metrics(name: str, size: Size, seconds: float) -> dict[str, float]:
    """How the scans of one step compare with counted bounds.

    The first bound is that of a scan that compares all candidates of a tile until the last one
    stops. The second is that of what the scan does instead: the last ones go on by themselves.
    """
    check_instruments()
    engine, candidates = CASES[name].data(size)["engine"]("cpu")
    spent = []
    for _ in range(5):
        before = engine.compiled.scanned
        engine.score(candidates)
        comparisons, own, of_all, seconds = np.subtract(engine.compiled.scanned, before).tolist()
        spent.append(seconds)
    seconds = statistics.median(spent)
    bound, own_bound = bound_of(of_all), bound_of(own)
    return {
        "neighbours_a_candidate": round(comparisons / size["n"] / len(candidates), 1),
        "bound_thread_seconds": float(f"{bound:.4g}"),
        "own_bound_thread_seconds": float(f"{own_bound:.4g}"),
        "scan_thread_seconds": float(f"{seconds:.4g}"),
        "scan_over_bound": round(seconds / bound, 3),
        "scan_over_own_bound": round(seconds / own_bound, 3),
    }


def scanned(data: Data, floor: int | None) -> tuple[int, int, int, float]:
    """Count what the scans of a FOCI run on raw columns do (`scanned` of the compiled engine).

    With a floor of 0, candidates that can no longer win are left out; with None all are scored.
    """
    check_instruments()
    X, left = data["X"], list(range(data["X"].shape[1]))
    ones = np.ones(len(left), X.dtype)
    cpu = CpuBackend()
    engine = cpu.engine(cpu.lay_out(X), ones, cpu.ranks(data["y"])[0], "average", 0)
    for column in data.get("given", ()):
        engine.select(column)
        left.remove(column)
    for _ in range(data["steps"]):
        whole, _fraction = engine.score(np.array(left), floor)
        engine.select(left.pop(int(whole.argmax())))
    return engine.compiled.scanned


def foci_bound(name: str, size: Size, seconds: float) -> dict[str, float]:
    """The counted bound of all scans of a FOCI run on raw columns, shared by all threads."""
    _comparisons, own, _of_all, _seconds = scanned(CASES[name].data(size), floor=0)
    bound = bound_of(own) / lcodec_ext.get_num_threads()
    return {"scan_bound_seconds": float(f"{bound:.4g}")}


def share_compared(name: str, size: Size, seconds: float) -> dict[str, float]:
    """Share of all distances that a FOCI run on raw columns computes."""
    data = CASES[name].data(size)
    share = scanned(data, floor=0)[0] / scanned(data, floor=None)[0]
    return {"share_of_distances": round(share, 3)}


def peak_of(code: str) -> float:
    """Largest resident memory of a fresh process that runs the code, in GB."""
    # unlike getrusage, not the parent's peak
    code += "; status = open('/proc/self/status').read().split()"
    code += "; print(status[status.index('VmHWM:') + 1])"
    command = [sys.executable, "-c", code]
    folder = Path(__file__).resolve().parent
    done = subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True)
    return round(int(done.stdout.split()[-1]) * 1024 / 1e9, 3)


def peak_memory(name: str, size: Size, seconds: float) -> dict[str, float]:
    """Largest resident memory of a fresh process that makes the data and runs the case once."""
    code = f"import cases; case = cases.CASES[{name!r}]; case.ours(case.data({size!r}), 'auto')"
    return {"peak_memory_gb": peak_of(code)}


def product_metrics(name: str, size: Size, seconds: float) -> dict[str, float]:
    """Time to build an operator with a first product, and counted operations of one product."""
    import flops
    import torch

    data = CASES[name].data(size)
    v = torch.from_numpy(data["v"])
    start = time.perf_counter()
    operator = data["build"]()
    operator @ v  # the operator may compute what it keeps in the first product
    setup = time.perf_counter() - start
    ours = flops.count(lambda: operator @ v)
    full = flops.count(lambda: BY_TORCH_FUNC.run(data, torch.get_num_threads()))
    return {
        "coordinates": len(v),
        "setup_seconds": float(f"{setup:.4g}"),
        "gflop": float(f"{ours / 1e9:.4g}"),
        "full_gflop": float(f"{full / 1e9:.4g}"),
        "flop_ratio": round(full / ours, 1),
    }


def solve_metrics(name: str, size: Size, seconds: float) -> dict[str, float]:
    """Memory of building and solving, of an interpreter with torch alone, and of the matrix."""
    coordinates = len(CASES[name].data(size)["v"])
    return {
        "coordinates": coordinates,
        "torch_memory_gb": peak_of("import torch"),
        "dense_matrix_gb": round(4 * coordinates**2 / 1e9, 3),
    } | peak_memory(name, size, seconds)


# --------------------------------------------------------------------------------------------
# The cases

raw_foci = partial(foci, standardize=None)  # the published algorithm knows no standardisation
SMALL_TABLE = {"n": 60, "p": 12, "steps": 2}

# Ten units of a late layer of a network, and other layers to be compared with it.
RESNET = {"network": "ResNet-18", "layer": "layer4.1.conv2", "n": 64, "units": 10}
RESNET_LAYERS = (
    "conv1",
    "layer1.0.conv1",
    "layer2.0.conv1",
    "layer3.1.conv2",
    "layer4.1.conv2",
    "fc",
)
DISTILBERT = {
    "network": "DistilBERT",
    "layer": "distilbert.transformer.layer.5.ffn.lin2",
    "n": 8,
    "units": 10,
}
DISTILBERT_LAYERS = (
    "distilbert.transformer.layer.0.ffn.lin2",
    "distilbert.transformer.layer.3.attention.q_lin",
    "distilbert.transformer.layer.5.ffn.lin1",
    "distilbert.transformer.layer.5.ffn.lin2",
    "classifier",
)
FEW_SAMPLES: Size = {"n": 3, "units": 2, "tiny": True}


def product_case(name: str, full: tuple[Size, ...], **options: Any) -> Case:
    """One product with an operator that was built before; peers start from the network."""
    return Case(
        name=name,
        title="{kind} times v, {units} units of {layer}, {network}, n = {n}",
        make=masked_curvature,
        ours=curvature_product,
        compare=partial(same_vector, within=1e-4),  # float32 through all layers of a network
        full=full,
        quick=tuple(size | FEW_SAMPLES for size in full),
        tiny=full[0] | FEW_SAMPLES,
        metrics=partial(product_metrics, name),
        exact=False,
        **options,
    )


def product_cases(
    name: str, size: Size, layers: tuple[str, ...], times: float, needs: str | None = None
) -> tuple[Case, ...]:
    """Cases of both matrices with a claimed ratio, and of the Hessian in other layers."""
    hessian, gauss_newton = size | {"kind": "Hessian"}, size | {"kind": "Gauss-Newton"}
    options: dict[str, Any] = {
        "peers": (BY_TORCH_FUNC, BY_CURVLINOPS),
        "claims": tuple(
            Claim(peer.name, at_least=times) for peer in (BY_TORCH_FUNC, BY_CURVLINOPS)
        ),
        "needs": needs,
    }
    return (
        product_case(f"hessian_{name}", (hessian,), **options),
        product_case(f"gauss_newton_{name}", (gauss_newton,), **options),
        product_case(
            f"placement_{name}",
            tuple(hessian | {"layer": layer} for layer in layers),
            peers=(BY_TORCH_FUNC,),
            sweep="layer",
            needs=needs,
        ),
    )


def solve_case(name: str, kind: str) -> Case:
    size = RESNET | {"kind": kind, "n": 256, "damping": 0.01}
    return Case(
        name=name,
        title="({kind} + {damping:g}) x = v, {units} units of {layer}, {network}, n = {n}",
        make=masked_curvature,
        ours=curvature_solve,
        compare=partial(same_vector, within=1e-3),  # as far as solvers go by default
        full=(size,),
        quick=(size | FEW_SAMPLES,),
        tiny=size | FEW_SAMPLES,
        claims=(Claim("peak_memory_gb", at_most=1),),
        metrics=partial(solve_metrics, name),
        exact=False,
    )


_ALL = (
    Case(
        name="foci_wide",
        title="FOCI, {steps} steps, n = {n:,}, p = {p:,}",
        make=continuous,
        ours=raw_foci,
        compare=same_selection,
        full=({"n": 1000, "p": 10_000, "steps": 4},),
        quick=({"n": 200, "p": 100, "steps": 4},),
        tiny=SMALL_TABLE,
        peers=(
            by_published(part=200),
            by_kdtree(scale=False, part=200),
            by_pyfoci(scale=False, part=200, answers="asserted"),
        ),
        claims=(Claim("published algorithm", at_least=250),),
        metrics=partial(share_compared, "foci_wide"),
    ),
    Case(
        name="foci_square",
        title="FOCI, {steps} steps, n = {n:,}, p = {p:,}",
        make=continuous,
        ours=foci,
        compare=same_selection,
        full=({"n": 5000, "p": 1000, "steps": 4},),
        quick=({"n": 500, "p": 110, "steps": 4},),
        tiny=SMALL_TABLE,
        peers=(by_kdtree(part=100),),
        claims=(Claim("k-d tree per candidate, ties drawn", at_least=60),),
    ),
    Case(
        name="foci_binary",
        title="FOCI, {steps} steps, n = {n:,}, p = {p} binary columns",
        make=binary,
        ours=foci,
        compare=same_selection,
        full=({"n": 20_000, "p": 39, "steps": 4},),
        quick=({"n": 1000, "p": 39, "steps": 4},),
        tiny={"n": 80, "p": 12, "steps": 2},
        peers=(by_kdtree(averaged=True), by_kdtree(part=10)),
        claims=(
            Claim("k-d tree per candidate, ties averaged", at_least=10),
            Claim("k-d tree per candidate, ties drawn", at_least=10),
        ),
    ),
    Case(
        name="foci_mixed",
        title="FOCI, {steps} steps, n = {n:,}, p = {p}, every other column binary",
        make=mixed,
        ours=foci,
        compare=same_selection,
        full=({"n": 20_000, "p": 40, "steps": 4},),
        quick=({"n": 1000, "p": 40, "steps": 4},),
        tiny=SMALL_TABLE,
        peers=(
            Peer(
                "lcodec_ext, all columns continuous",
                lambda data, threads: foci(data | data["continuous"], "auto"),
                "other",
            ),
            by_kdtree(averaged=True),
        ),
        claims=(Claim("lcodec_ext, all columns continuous", at_least=0.5),),
    ),
    Case(
        name="foci_long",
        title="FOCI, {steps} steps, n = {n:,}, p = {p}",
        make=continuous,
        ours=foci,
        compare=same_selection,
        full=({"n": 200_000, "p": 100, "steps": 2},),
        quick=({"n": 3000, "p": 12, "steps": 2},),
        tiny=SMALL_TABLE,
        peers=(by_kdtree(part=10),),
        claims=(Claim("peak_memory_gb", at_most=4),),
        metrics=partial(peak_memory, "foci_long"),
    ),
    Case(
        name="foci_independent",
        title="FOCI, {steps} steps, n = {n:,}, p = {p:,}, y independent of X",
        make=independent,
        ours=foci,
        compare=same_selection,
        full=({"n": 5000, "p": 1000, "steps": 4},),
        quick=({"n": 500, "p": 110, "steps": 4},),
        tiny=SMALL_TABLE,
        peers=(by_kdtree(part=100),),
        metrics=partial(share_compared, "foci_independent"),
    ),
    Case(
        name="foci_heavy_tailed",
        title="FOCI, {steps} steps, n = {n:,}, p = {p}, Cauchy columns",
        make=heavy_tailed,
        ours=foci,
        compare=same_selection,
        full=({"n": 5000, "p": 200, "steps": 4},),
        quick=({"n": 500, "p": 40, "steps": 4},),
        tiny=SMALL_TABLE,
        peers=(by_kdtree(part=50),),
    ),
    Case(
        name="foci_few",
        title="FOCI, {steps} steps, n = {n:,}, p = {p}",
        make=few,
        ours=foci,
        compare=same_selection,
        full=({"n": 50_000, "p": 4, "steps": 4},),
        quick=({"n": 2000, "p": 4, "steps": 4},),
        tiny={"n": 60, "p": 4, "steps": 2},
        peers=(by_kdtree(),),
    ),
    Case(
        name="codec_heavy_tailed",
        title="T(Y, Z | X), n = {n:,}, three Cauchy columns",
        make=heavy_triple,
        ours=codec,
        compare=partial(same_value, within=1e-4),  # float32 distances
        full=({"n": 60_000},),
        quick=({"n": 2000},),
        tiny={"n": 100},
        peers=(Peer("k-d tree", _on_triple(peers.kdtree_codec)),),
    ),
    Case(
        name="scoring_kernel",
        title="scoring one step, {k} selected, n = {n:,}, p = {p:,}",
        make=prepared,
        ours=score,
        compare=same_value,
        full=tuple({"n": 1000, "p": 10_000, "k": k} for k in (1, 2, 3)),
        quick=({"n": 200, "p": 200, "k": 1},),
        tiny={"n": 60, "p": 40, "k": 2},
        claims=(Claim("scan_over_bound", at_most=2),),
        metrics=partial(scan_metrics, "scoring_kernel"),
    ),
    Case(
        name="codec",
        title="T(Y, Z | X), n = {n:,}, three columns",
        make=triple,
        ours=codec,
        compare=partial(same_value, within=1e-4),  # float32 distances; drawn ties
        full=({"n": 10_000}, {"n": 100_000}),
        quick=({"n": 1000}, {"n": 4000}),
        tiny={"n": 100},
        peers=(
            Peer(
                "published algorithm",
                _on_triple(peers.published_codec),
                fits=lambda size: size["n"] <= 20_000,  # n x n distances
            ),
            Peer("k-d tree", _on_triple(peers.kdtree_codec)),
        ),
    ),
    Case(
        name="neighbors",
        title="nearest neighbours, n = {n:,}, d = {d:,}, mean {offset:g}",
        make=cloud,
        ours=neighbors,
        compare=same_neighbors,
        full=(
            {"n": 20_000, "d": 4, "offset": 0.0},
            {"n": 2000, "d": 1000, "offset": 0.0},
            {"n": 2000, "d": 1000, "offset": 100.0},
        ),
        quick=(
            {"n": 1000, "d": 4, "offset": 0.0},
            {"n": 200, "d": 1000, "offset": 0.0},
            {"n": 200, "d": 1000, "offset": 100.0},
        ),
        tiny={"n": 80, "d": 5, "offset": 10.0},
        peers=(
            Peer("scipy cKDTree", _on_rows(peers.scipy_neighbors), "asserted"),
            Peer("scikit-learn", _on_rows(peers.sklearn_neighbors)),
            Peer("faiss IndexFlatL2", _on_rows(peers.faiss_neighbors)),
            Peer("published algorithm", _on_rows(peers.published_neighbors)),
        ),
    ),
    Case(
        name="xi",
        title="xi, n = {n:,}",
        make=pair,
        ours=xi,
        compare=same_value,
        full=({"n": 1_000_000},),
        quick=({"n": 20_000},),
        tiny={"n": 100},
        peers=(
            Peer(
                "scipy chatterjeexi",
                lambda data, threads: peers.scipy_xi(data["x"], data["y"], threads),
                "asserted",
            ),
        ),
    ),
    Case(
        name="codec_small",
        title="T(Y, Z), n = {n}, {calls:,} calls",
        make=lambda rng, n, calls: pair(rng, n) | {"calls": calls},
        ours=calls.many(
            lambda data, backend: lcodec_ext.codec(data["y"], data["x"], backend=backend)
        ),
        compare=same_value,
        full=({"n": 50, "calls": 1000},),
        quick=({"n": 50, "calls": 10},),
        tiny={"n": 50, "calls": 1},
        peers=(Peer("xi, what a call can cost", calls.many(xi), "other"),),
        metrics=calls.a_call,
    ),
    Case(
        name="foci_small",
        title="FOCI, {steps} steps, n = {n}, p = {p}, {calls:,} calls",
        make=lambda rng, calls, **size: few(rng, **size) | {"calls": calls},
        ours=calls.many(foci),
        compare=same_selection,
        full=({"n": 50, "p": 5, "steps": 3, "calls": 300},),
        quick=({"n": 50, "p": 5, "steps": 3, "calls": 10},),
        tiny={"n": 50, "p": 5, "steps": 3, "calls": 1},
        metrics=calls.a_call,
    ),
    Case(
        name="graph",
        title="dependence graph, n = {n:,}, p = {p}",
        make=table,
        ours=calls.graph,
        compare=partial(same_vector, within=0),
        full=({"n": 1000, "p": 200},),
        quick=({"n": 200, "p": 20},),
        tiny={"n": 60, "p": 6},
        peers=(Peer("foci for each column", calls.column_by_column, "identical"),),
    ),
    Case(
        name="python_threads",
        title="T(Y, Z | X), n = {n:,}, {tables} tables, from {python_threads} Python threads",
        make=lambda rng, n, tables, python_threads: {
            "python_threads": python_threads,
            "tables": [triple(rng, n) for _ in range(tables)],
        },
        ours=calls.from_python_threads,
        compare=partial(same_vector, within=0),
        full=({"n": 10_000, "tables": 32, "python_threads": 8},),
        quick=({"n": 500, "tables": 8, "python_threads": 8},),
        tiny={"n": 60, "tables": 8, "python_threads": 8},
        peers=(
            Peer(
                "one Python thread, all threads for each call", calls.from_one_thread, "identical"
            ),
            Peer(
                "one thread",
                lambda data, threads: calls.from_one_thread(data, 1),
                "identical",
            ),
        ),
    ),
    Case(
        name="gram_product",
        title="(1/n) G^T G v, n = {n:,}, {segments} segments of {length:,} out of 5 times as many "
        "columns",
        make=stored_rows,
        ours=gram_product,
        compare=same_vector,
        full=({"n": 1000, "segments": 10, "length": 4608},),
        quick=({"n": 50, "segments": 10, "length": 500},),
        tiny={"n": 70, "segments": 3, "length": 45},
        peers=(
            _on_stored_rows("torch, gather, then two GEMVs", peers.gather_then_gemv),
            _on_stored_rows("torch, two GEMVs on all columns", peers.padded_gemv),
            _on_stored_rows("torch, two GEMVs for each segment", peers.segment_gemv),
            _on_stored_rows("torch, one GEMV for each segment", peers.read_once, answers="other"),
        ),
        claims=(
            Claim("torch, gather, then two GEMVs", at_least=2),
            Claim("torch, two GEMVs on all columns", at_least=2),
            # it reads the selected bytes once, at the rate of the memory
            Claim("torch, one GEMV for each segment", at_least=round(1 / 1.5, 3)),
        ),
    ),
    *product_cases("resnet", RESNET, RESNET_LAYERS, times=50),
    *product_cases("distilbert", DISTILBERT, DISTILBERT_LAYERS, times=20, needs="transformers"),
    solve_case("solve_gauss_newton", "Gauss-Newton"),
    solve_case("solve_fisher", "Fisher"),
    Case(
        name="cost_columns",
        title="FOCI, {steps} steps, n = {n:,}",
        make=continuous,
        ours=raw_foci,
        compare=same_selection,
        full=tuple(
            {"n": 1000, "p": p, "steps": 3} for p in (100, 200, 500, 1000, 2000, 5000, 10_000)
        ),
        quick=tuple({"n": 200, "p": p, "steps": 3} for p in (25, 50, 100)),
        tiny=SMALL_TABLE,
        peers=(
            by_published(fits=lambda size: size["p"] <= 500),
            by_kdtree(scale=False, fits=lambda size: size["p"] <= 500),
        ),
        sweep="p",
        metrics=partial(foci_bound, "cost_columns"),
    ),
    *(
        Case(
            name=f"cost_rows_{k}",
            title=f"FOCI, one step with {k} selected before, p = {{p}}",
            make=continuous_given,
            ours=raw_foci,
            compare=same_selection,
            full=tuple(
                {"n": n, "p": 50, "k": k} for n in (500, 1000, 2000, 5000, 10_000, 20_000, 50_000)
            ),
            quick=tuple({"n": n, "p": 12, "k": k} for n in (200, 500, 1000)),
            tiny={"n": 60, "p": 12, "k": k},
            peers=(by_kdtree(scale=False, fits=lambda size: size["n"] <= 20_000),),
            sweep="n",
            metrics=partial(foci_bound, f"cost_rows_{k}"),
        )
        for k in (1, 2, 3)
    ),
)

CASES = {case.name: case for case in _ALL}

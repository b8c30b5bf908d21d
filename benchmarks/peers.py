"""Other implementations of the same tasks, which are timed for comparison.

`published_*` is the algorithm of the paper's code: float32 distance matrices, `argmin`, and for
T(Y, Z | X) both neighbour searches again for every candidate. It runs where its data are: NumPy
arrays on the CPU, tensors on their device. `kdtree_*` is the algorithm of R's FOCI: a k-d tree for
every candidate. `published_perturbations` and the functions after it are the rest of a deletion by
the paper's code. All of this code was written for these benchmarks. Libraries are imported where
they are used, so a missing one costs only the comparison with it.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import torch

    from lcodec_ext.curvature import UnitSelection


class Selection(NamedTuple):
    """Selected columns, in order, and the cumulative T after each."""

    ordering: tuple[int, ...]
    cumulative: tuple[float, ...]


@contextmanager
def torch_threads(threads: int) -> Iterator[None]:
    """Let torch use so many threads, and as many as before afterwards.

    The number is the process's: left behind, it is that of all later work, and a forked child of a
    process with more than one may hang in OpenMP.
    """
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# --------------------------------------------------------------------------------------------
# The published algorithm. Its data have no ties.


def _published_nearest(X: "torch.Tensor", exact: bool) -> "torch.Tensor":
    """Nearest other row. By default (not `exact`) distances come from a matrix product."""
    import torch

    mode = "donot_use_mm_for_euclid_dist" if exact else "use_mm_for_euclid_dist_if_necessary"
    distance = torch.cdist(X, X, compute_mode=mode)
    distance.fill_diagonal_(torch.inf)
    return distance.argmin(dim=1)


def _published_ranks(y: "torch.Tensor") -> "torch.Tensor":
    import torch

    ranks = torch.empty(len(y), dtype=torch.int64, device=y.device)
    ranks[torch.argsort(y)] = torch.arange(1, len(y) + 1, device=y.device)
    return ranks


def _published_codec2(z: "torch.Tensor", y: "torch.Tensor", exact: bool) -> "torch.Tensor":
    import torch

    n = len(y)
    near = _published_nearest(z, exact)
    R = _published_ranks(y)
    L = n + 1 - R
    above = (n * torch.minimum(R, R[near]) - L**2).sum()
    return above / (L * (n - L)).sum()


def _published_codec3(
    z: "torch.Tensor", y: "torch.Tensor", x: "torch.Tensor", exact: bool
) -> "torch.Tensor":
    import torch

    near_x = _published_nearest(x, exact)
    near_w = _published_nearest(torch.hstack([x, z]), exact)
    R = _published_ranks(y)
    m_x, m_w = torch.minimum(R, R[near_x]), torch.minimum(R, R[near_w])
    return (m_w - m_x).sum() / (R - m_x).sum()


def published_gains(
    X: "torch.Tensor",
    y: "torch.Tensor",
    given: Sequence[int],
    candidates: Sequence[int],
    exact: bool = False,
) -> list[float]:
    """T of each candidate, after the given columns."""
    import torch

    conditions = X[:, list(given)]
    gains = [
        _published_codec3(X[:, c : c + 1], y, conditions, exact)
        if len(given)
        else _published_codec2(X[:, c : c + 1], y, exact)
        for c in candidates
    ]
    return torch.stack(gains).tolist()  # the only place where a step waits for a device


def published_foci(X: Any, y: Any, steps: int, threads: int, exact: bool = False) -> Selection:
    import torch

    with torch_threads(threads):
        columns, response = torch.as_tensor(X).float(), torch.as_tensor(y).float()
        ordering: list[int] = []
        cumulative: list[float] = []
        for _ in range(steps):
            left = [c for c in range(X.shape[1]) if c not in ordering]
            values = published_gains(columns, response, ordering, left, exact)
            best = int(np.argmax(values))
            ordering.append(left[best])
            before = cumulative[-1] if cumulative else 0.0
            cumulative.append(before + values[best] * (1 - before))  # without ties
        return Selection(tuple(ordering), tuple(cumulative))


def published_codec(y: Any, z: Any, x: Any, threads: int) -> float:
    import torch

    with torch_threads(threads):
        tensors = [torch.as_tensor(a).float() for a in (z, y, x)]
        return float(_published_codec3(*tensors, exact=False))


def published_neighbors(X: Any, threads: int) -> NDArray:
    import torch

    with torch_threads(threads):
        return _published_nearest(torch.as_tensor(X).float(), exact=False).cpu().numpy()


# --------------------------------------------------------------------------------------------
# The published deletion, without those defects that do not change its cost. In its favour, reading
# files and making dicts of all parameters by str(module) are left out.


def published_perturbations(
    model: "torch.nn.Module",
    loss_fn: Callable[..., "torch.Tensor"],
    inputs: Iterable["torch.Tensor"],
    y: "torch.Tensor",
) -> tuple["torch.Tensor", "torch.Tensor"]:
    """Mean activations of linear layers and convolutions, and losses; one forward pass per draw."""
    import torch
    from torch import nn

    called: list[torch.Tensor] = []

    def average(module: nn.Module, _: Any, output: torch.Tensor) -> None:
        called.append(output.mean([0, 2, 3] if isinstance(module, nn.Conv2d) else 0))

    layers = [m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    hooks = [layer.register_forward_hook(average) for layer in layers]
    rows, losses = [], []
    for x in inputs:
        called.clear()
        losses.append(loss_fn(model(x), y).detach())  # makes the graph, as the published code does
        rows.append(torch.cat(called).detach())
    for hook in hooks:
        hook.remove()
    return torch.vstack(rows), torch.stack(losses)


def published_gradients(
    model: "torch.nn.Module",
    loss_fn: Callable[..., "torch.Tensor"],
    x: "torch.Tensor",
    y: "torch.Tensor",
) -> float:
    """Loss of the sample and norm of its gradient, which is left in the parameters."""
    model.zero_grad()
    loss_fn(model(x), y).backward()
    return sum(float(p.grad.norm()) ** 2 for p in model.parameters()) ** 0.5


def published_matrix(
    training: tuple["torch.Tensor", "torch.Tensor"],
    sample: tuple["torch.Tensor", "torch.Tensor"],
    n: int,
) -> "torch.Tensor":
    """(n H - h) / (n - 1), dense; H and h have rank one, from (step, change of the gradient)."""
    H, h = (change[:, None] * change / step.abs().sum() for step, change in (training, sample))
    return (n * H - h) / (n - 1)


def published_solve(
    matrix: "torch.Tensor", gradient: "torch.Tensor", weight_decay: float, n: int
) -> "torch.Tensor":
    """The step: a dense solve."""
    import torch

    shifted = matrix + weight_decay * torch.eye(len(matrix))
    return torch.linalg.solve(shifted, gradient) / (n - 1)


# --------------------------------------------------------------------------------------------
# A k-d tree for every candidate


def _ranks(y: NDArray) -> tuple[NDArray, NDArray]:
    """R_i, the number of y_j <= y_i, and L_i, the number of y_j >= y_i."""
    ordered = np.sort(y)
    return np.searchsorted(ordered, y, "right"), len(y) - np.searchsorted(ordered, y, "left")


def _tree_query(X: NDArray, workers: int = 1) -> tuple[NDArray, NDArray]:
    """Distances and indices of the three rows nearest to each row; the third shows a tie."""
    from scipy.spatial import cKDTree

    return cKDTree(X).query(X, k=3, workers=workers)


def minima_drawn(X: NDArray, R: NDArray, seed: Sequence[int], workers: int = 1) -> NDArray:
    """min(R_i, R_j) for one nearest neighbour j of each row, ties drawn at random, as in R.

    A row with duplicates takes one of them; a row whose first two neighbours are equally far
    looks through all rows.
    """
    rng = np.random.default_rng(seed)
    distance, index = _tree_query(X, workers)
    near = index[:, 1].copy()
    repeated = np.flatnonzero(distance[:, 1] == 0)
    if len(repeated):
        _, group, size = np.unique(
            index[repeated, 0], return_inverse=True, return_counts=True
        )  # identical rows find the same row first
        rows = repeated[np.argsort(group, kind="stable")]
        first = np.repeat(np.cumsum(size) - size, size)
        place = np.arange(len(rows)) - first
        drawn = rng.integers(np.repeat(size, size) - 1)
        near[rows] = rows[first + drawn + (drawn >= place)]
    for i in np.flatnonzero((distance[:, 1] > 0) & (distance[:, 1] == distance[:, 2])):
        far = np.square(X - X[i]).sum(axis=1)
        far[i] = np.inf
        near[i] = rng.choice(np.flatnonzero(far == far.min()))
    return np.minimum(R, R[near])


def minima_averaged(X: NDArray, group: NDArray, R: NDArray) -> NDArray:
    """Mean of min(R_i, R_j) over all nearest neighbours j of each row.

    `group` numbers the distinct rows of X. Duplicates are nearest to one another, and their mean
    follows from sorted ranks. Only rows without duplicates need a tree, of the distinct rows.
    """
    order = np.lexsort((R, group))
    sizes = np.bincount(group)
    starts = np.cumsum(sizes) - sizes
    ranks = R[order].astype(float)
    sums = np.concatenate([[0.0], np.cumsum(ranks)])
    first = starts[group[order]]
    size = sizes[group[order]]
    place = np.arange(len(R))
    total = sums[place] - sums[first] + (first + size - 1 - place) * ranks
    minima = np.empty(len(R))
    minima[order] = total / np.maximum(size - 1, 1)
    if (sizes == 1).any():
        _minima_of_single_rows(minima, X, R, order, starts, sizes)
    return minima


def _minima_of_single_rows(
    minima: NDArray, X: NDArray, R: NDArray, order: NDArray, starts: NDArray, sizes: NDArray
) -> None:
    """The part of `minima_averaged` for rows without duplicates, written to `minima`.

    Rows start[g] .. start[g] + size[g] of `order` are distinct row g.
    """
    from scipy.spatial import cKDTree

    distinct = X[order[starts]]
    single = np.flatnonzero(sizes == 1)
    row = order[starts[single]]
    k = min(3, len(distinct))
    distance, index = cKDTree(distinct).query(distinct[single], k=k)
    near = index[:, 1]
    minima[row] = np.minimum(R[row], R[order[starts[near]]])  # usually a single row is nearest
    tied = distance[:, 2] <= distance[:, 1] * (1 + 1e-12) if k == 3 else np.zeros(len(row), bool)
    for s in np.flatnonzero(tied | (sizes[near] > 1)):
        groups = near[s : s + 1]
        if tied[s]:
            far = np.square(distinct - distinct[single[s]]).sum(axis=1)
            far[single[s]] = np.inf
            groups = np.flatnonzero(far <= far.min() * (1 + 1e-12))
        rows = np.concatenate([order[starts[g] : starts[g] + sizes[g]] for g in groups])
        minima[row[s]] = np.minimum(R[row[s]], R[rows]).mean()


def kdtree_foci(
    X: NDArray,
    y: NDArray,
    steps: int,
    threads: int,
    averaged: bool = False,
    scale: bool = True,
    given: Sequence[int] = (),
) -> Selection:
    """R's FOCI, with `threads` candidates at a time, one thread each; `scale` is R's default.

    Ties are drawn at random, as in R, or `averaged` exactly, in a way that suits discrete data.
    """
    columns = X.astype(np.float64)
    if scale:
        columns = (columns - columns.mean(axis=0)) / columns.std(axis=0, ddof=1)
    n, p = columns.shape
    R, L = _ranks(y)
    selected = list(given)
    groups = np.zeros(n, dtype=np.int64)  # rows that are equal in the selected columns
    codes = [np.unique(columns[:, c], return_inverse=True)[1] for c in range(p)] if averaged else []

    def joined(c: int) -> NDArray:
        return np.unique(groups * n + codes[c], return_inverse=True)[1]

    def score(c: int) -> float:
        subset = columns[:, [*selected, c]]
        if averaged:
            return float(minima_averaged(subset, joined(c), R).sum())
        return float(minima_drawn(subset, R, (len(selected), c)).sum())

    if averaged:
        for c in given:
            groups = joined(c)
    cumulative: list[float] = []
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(steps):
            left = [c for c in range(p) if c not in selected]
            sums = list(pool.map(score, left))
            best = int(np.argmax(sums))
            if averaged:
                groups = joined(left[best])
            selected.append(left[best])
            above = n * sums[best] - float((L**2).sum())
            cumulative.append(above / float((L * (n - L)).sum()))
    return Selection(tuple(selected[len(given) :]), tuple(cumulative))


def kdtree_codec(y: NDArray, z: NDArray, x: NDArray, threads: int) -> float:
    R, _ = _ranks(y)
    m_x = minima_drawn(x.astype(np.float64), R, (0,), threads)
    m_w = minima_drawn(np.hstack([x, z]).astype(np.float64), R, (1,), threads)
    return float((m_w - m_x).sum() / (R - m_x).sum())


# --------------------------------------------------------------------------------------------
# Libraries


def pyfoci(X: NDArray, y: NDArray, steps: int, threads: int, scale: bool = True) -> Selection:
    """pyFOCI's R-like method; worker processes score the candidates."""
    from pyFOCI import FOCISelector

    selector = FOCISelector(
        max_features=steps,
        min_delta=None,
        standardize="normalize" if scale else None,
        random_state=0,
        n_jobs=threads,
    ).fit(X, y)
    return Selection(tuple(selector.selected_indices_.tolist()), tuple(selector.score_path_))


def scipy_xi(x: NDArray, y: NDArray, threads: int) -> float:
    from scipy.stats import chatterjeexi

    return float(chatterjeexi(x, y, y_continuous=True).statistic)


def _second_unless_self(index: NDArray) -> NDArray:
    """From two neighbours of each row, take the one that is not the row itself."""
    return np.where(index[:, 0] == np.arange(len(index)), index[:, 1], index[:, 0])


def scipy_neighbors(X: NDArray, threads: int) -> NDArray:
    from scipy.spatial import cKDTree

    return _second_unless_self(cKDTree(X).query(X, k=2, workers=threads)[1])


def sklearn_neighbors(X: NDArray, threads: int) -> NDArray:
    """A tree up to 15 columns; with more, distances from a float64 matrix product."""
    from sklearn.neighbors import NearestNeighbors

    search = NearestNeighbors(n_neighbors=1, n_jobs=threads).fit(X)
    return search.kneighbors(return_distance=False)[:, 0]


def faiss_neighbors(X: NDArray, threads: int) -> NDArray:
    """The flat index: all distances; with many columns from a float32 matrix product."""
    import faiss

    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(threads)
    try:
        index = faiss.IndexFlatL2(X.shape[1])
        index.add(np.ascontiguousarray(X, dtype=np.float32))
        return _second_unless_self(index.search(np.ascontiguousarray(X, dtype=np.float32), 2)[1])
    finally:
        faiss.omp_set_num_threads(before)


# --------------------------------------------------------------------------------------------
# (1/n) G^T G v + damping v on segments of columns, in torch. Data are NumPy arrays.


@contextmanager
def _torch_segments(
    G: NDArray, v: NDArray, segments: NDArray, threads: int
) -> Iterator[tuple["torch.Tensor", "torch.Tensor", list["torch.Tensor"], list["torch.Tensor"]]]:
    """G and v, and for every segment its columns of G and its part of v; torch on its threads."""
    import torch

    with torch_threads(threads):
        matrix, vector = torch.as_tensor(G), torch.as_tensor(v)
        columns = [matrix[:, start : start + length] for start, length in segments.tolist()]
        yield matrix, vector, columns, list(vector.split(segments[:, 1].tolist()))


def gather_then_gemv(
    G: NDArray, v: NDArray, segments: NDArray, damping: float, threads: int
) -> NDArray:
    """Copy the selected columns by concatenation, which is faster than by index."""
    import torch

    with _torch_segments(G, v, segments, threads) as (_, vector, columns, _):
        selected = torch.cat(columns, dim=1)
        return (selected.T @ (selected @ vector) / len(G) + damping * vector).numpy()


def padded_gemv(G: NDArray, v: NDArray, segments: NDArray, damping: float, threads: int) -> NDArray:
    """v with zeros for the columns that are not selected."""
    import torch

    with _torch_segments(G, v, segments, threads) as (matrix, vector, _, parts):
        padded = torch.zeros(matrix.shape[1])
        for (start, length), part in zip(segments.tolist(), parts, strict=True):
            padded[start : start + length] = part
        product = matrix.T @ (matrix @ padded) / len(G)
        selected = torch.cat([product[start : start + n] for start, n in segments.tolist()])
        return (selected + damping * vector).numpy()


def segment_gemv(
    G: NDArray, v: NDArray, segments: NDArray, damping: float, threads: int
) -> NDArray:
    """Nothing is copied; the selected columns are read twice."""
    import torch

    with _torch_segments(G, v, segments, threads) as (_, vector, columns, parts):
        dots = torch.stack([x @ part for x, part in zip(columns, parts, strict=True)]).sum(0)
        return (torch.cat([x.T @ dots for x in columns]) / len(G) + damping * vector).numpy()


def read_once(G: NDArray, v: NDArray, segments: NDArray, damping: float, threads: int) -> NDArray:
    """The first half of the product alone."""
    import torch

    with _torch_segments(G, v, segments, threads) as (_, _, columns, parts):
        dots = [x @ part for x, part in zip(columns, parts, strict=True)]
        return torch.stack(dots).sum(0).numpy()


# --------------------------------------------------------------------------------------------
# The Hessian or Gauss-Newton matrix of the mean loss by all parameters of a network, times a vector
# that is zero outside the selected units; then the part of the product that belongs to these units.


def functional_product(
    kind: str,
    model: "torch.nn.Module",
    loss_fn: Callable[..., "torch.Tensor"],
    X: "torch.Tensor",
    y: "torch.Tensor",
    selection: "UnitSelection",
    v: NDArray,
    threads: int,
) -> NDArray:
    """Forward over reverse mode of torch.func: `jvp(grad(...))`, or jvp, the loss and vjp."""
    import torch
    from torch.func import functional_call, grad, jvp, vjp

    def outputs(theta: dict[str, torch.Tensor]) -> torch.Tensor:
        return functional_call(model, theta, (X,))

    def gradient(z: torch.Tensor) -> torch.Tensor:
        return grad(lambda z: loss_fn(z, y))(z)

    with torch_threads(threads):
        theta = {name: p.detach() for name, p in model.named_parameters()}
        tangent = {name: torch.zeros_like(p) for name, p in theta.items()}
        selection.scatter_(tangent, torch.from_numpy(v), model=model)
        with _differentiable_attention():
            if kind == "Hessian":
                of_loss = grad(lambda theta: loss_fn(outputs(theta), y))
                product = jvp(of_loss, (theta,), (tangent,))[1]
            else:
                z, along = jvp(outputs, (theta,), (tangent,))
                (product,) = vjp(outputs, theta)[1](jvp(gradient, (z,), (along,))[1])
        return selection.gather(product, model=model).numpy()


def curvlinops_product(
    kind: str,
    model: "torch.nn.Module",
    loss_fn: Callable[..., "torch.Tensor"],
    X: "torch.Tensor",
    y: "torch.Tensor",
    selection: "UnitSelection",
    v: NDArray,
    threads: int,
) -> NDArray:
    """Its linear operators, without their check of determinism."""
    import curvlinops
    import torch

    with torch_threads(threads):
        made = {
            "Hessian": curvlinops.HessianLinearOperator,
            "Gauss-Newton": curvlinops.GGNLinearOperator,
        }[kind]
        theta = dict(model.named_parameters())
        tangent = {name: torch.zeros_like(p) for name, p in theta.items()}
        selection.scatter_(tangent, torch.from_numpy(v), model=model)
        operator = made(
            model, loss_fn, [*theta.values()], [(X, y)], check_deterministic=False, num_data=len(y)
        )
        with _differentiable_attention():
            product = operator @ [*tangent.values()]
        return selection.gather(dict(zip(theta, product, strict=True)), model=model).numpy()


def dense_curvature(
    kind: str,
    model: "torch.nn.Module",
    loss_fn: Callable[..., "torch.Tensor"],
    X: "torch.Tensor",
    y: "torch.Tensor",
    selection: "UnitSelection",
) -> "torch.Tensor":
    """The block itself, in the model's dtype, by the gradients of all outputs or of all entries."""
    import torch

    names = {segment.parameter for segment in selection.segments(model)}
    theta = {name: p for name, p in model.named_parameters() if name in names}
    places, count = {}, 0
    for name, p in theta.items():
        places[name] = torch.arange(count, count + p.numel()).view_as(p)
        count += p.numel()
    selected = selection.gather(places, model=model)

    def jacobian(values: torch.Tensor, again: bool = False) -> torch.Tensor:
        each = torch.eye(values.numel(), dtype=values.dtype).view(-1, *values.shape)
        rows = torch.autograd.grad(
            values,
            [*theta.values()],
            each,
            create_graph=again,
            is_grads_batched=True,
            materialize_grads=True,
        )
        return torch.cat([row.flatten(1) for row in rows], dim=1)[:, selected]

    with _differentiable_attention():
        z = model(X)
        if kind == "Hessian":
            return jacobian(jacobian(loss_fn(z, y), again=True)[0])
        if kind == "Gauss-Newton":
            J = jacobian(z)
            by_outputs = torch.func.hessian(lambda z: loss_fn(z, y))(z.detach())
            return J.T @ by_outputs.reshape(len(J), len(J)) @ J
        G = jacobian(torch.stack([loss_fn(a[None], b[None]) for a, b in zip(z, y, strict=True)]))
        return G.T @ G / len(G)


def _differentiable_attention() -> Any:
    """Use attention made of plain operations, because the fused one has no second derivative."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    return sdpa_kernel(SDPBackend.MATH)

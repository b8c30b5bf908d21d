"""What a deletion request does to units and loss under perturbed inputs.

The first step of Algorithm 1 of the paper: the loss under perturbation is the response, the units'
activations are the columns.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import accumulate
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lcodec_ext._checks import check_choice, check_integer, check_real, check_seed
from lcodec_ext._one_rank import ONE_RANK, OneRank
from lcodec_ext._progress import progress_bar
from lcodec_ext._torch.batches import Batch
from lcodec_ext._torch.group import AnyRanks, Ranks
from lcodec_ext._torch.loss import LossFunction
from lcodec_ext._torch.modes import hooked_arithmetic
from lcodec_ext._torch.samples import Samples
from lcodec_ext.curvature.selection import UnitSelection
from lcodec_ext.dependence.table import MAX_ROWS
from lcodec_ext.unlearning.record.activations import (
    Call,
    Recorder,
    RowsSite,
    Shares,
    Site,
    UnitCall,
    find_calls,
)
from lcodec_ext.unlearning.record.passes import Passes
from lcodec_ext.unlearning.record.perturb import Perturb, perturbed

Rows = Literal["batch", "samples"]

_DOUBTFUL = 1e3  # a spread below this multiple of the resolution may be rounding alone
_COPIES = 4  # how often, at least, a perturbation is run again to measure rounding
_MAX_VALUES = 2**31  # activations in memory: 16 GiB


@dataclass(frozen=True, eq=False, repr=False)
class Recording:
    """Activations and losses under perturbation.

    Attributes
    ----------
    activations : ndarray of float64, shape (rows, columns)
        Call by call, unit by unit, embeddings last; a row of an embedding has a column if an input
        has it.
    losses : ndarray of float64, shape (rows,)
    owners : list of UnitCall
        What the columns belong to.
    units : UnitSelection
        The units that were recorded, rows of embeddings without a column included.
    without : dict of str to str
        Layers whose units were not recorded, and why not.
    together : int
        How many perturbations (rows="samples": perturbed samples) went through the model at a time.
    resolution : float
        Differences below this share of a column's largest value are rounding.
    rounding : ndarray of float64, shape (columns,), or float
        The largest difference between copies of one perturbation, measured where it may matter.
    loss_rounding : float
        The same for the losses.
    """

    activations: NDArray[np.float64]
    losses: NDArray[np.float64]
    owners: list[UnitCall]
    units: UnitSelection
    without: dict[str, str]
    together: int
    resolution: float
    rounding: NDArray[np.float64] | float = 0.0
    loss_rounding: float = 0.0

    @property
    def finite(self) -> bool:
        """Whether losses and activations are finite."""
        return bool(np.isfinite(self.losses).all() and np.isfinite(self.activations).all())

    @cached_property
    def alive(self) -> NDArray[np.int64]:
        """The columns that are not constant, up to rounding."""
        size = np.abs(self.activations).max(0)
        noise = self.resolution * size + 2 * self.rounding
        return np.flatnonzero(np.ptp(self.activations, axis=0) > noise)

    @cached_property
    def dead(self) -> UnitSelection:
        """The units whose activation is the same under all perturbations, in every call."""
        return self.units - _selection(self.owners[column] for column in self.alive)

    def __repr__(self) -> str:
        rows, columns = self.activations.shape
        return f"Recording({rows} rows, {columns} columns, {len(self.dead)} dead units)"


class _Table:
    """The activations while they are recorded: rows by calls and their units."""

    def __init__(self, sites: dict[Call, Site], n_rows: int) -> None:
        self._n_rows = n_rows
        self._owners: list[UnitCall] = []
        self._columns: dict[Call, slice] = {}
        self._shares: dict[Call, list[Shares]] = {}
        for call, site in sites.items():
            if isinstance(site, RowsSite):
                self._shares[call] = []
            else:
                first = len(self._owners)
                self._owners += [UnitCall(*call, unit) for unit in site.units.tolist()]
                self._columns[call] = slice(first, len(self._owners))
        self._check(len(self._owners))
        self._values = np.zeros((n_rows, len(self._owners)))

    def _check(self, columns: int) -> None:
        if self._n_rows * columns > _MAX_VALUES:
            raise ValueError(
                f"{self._n_rows:,} rows of activations of {columns:,} units would take "
                f"{self._n_rows * columns / 2**27:.0f} GiB: take fewer n_perturbations, fewer "
                "units, or rows='batch'"
            )

    def add(self, first: int, means: dict[Call, Any], weight: float) -> None:
        """Add weighted means to the rows from `first` on."""
        for call, mean in means.items():
            if isinstance(mean, Shares):
                group, unit, share = mean
                self._shares[call].append(Shares(first + group, unit, weight * share))
            else:
                values = self._values[first : first + len(mean), self._columns[call]]
                values += weight * mean.cpu().double().numpy()

    def over(self, ranks: Ranks) -> None:
        """Take what other ranks have recorded, each of other rows."""
        (values,) = ranks.total("recording", lambda: [own], [own := torch.from_numpy(self._values)])
        self._values = values.numpy()
        for call, parts in self._shares.items():
            columns = list(zip(*parts, strict=True)) or [(), (), ()]
            sent = [b"".join(each.tobytes() for each in column) for column in columns]
            group, unit, share = (b"".join(ranks.gather_bytes(each)) for each in sent)
            self._shares[call] = [
                Shares(
                    np.frombuffer(group, np.int64),
                    np.frombuffer(unit, np.int64),
                    np.frombuffer(share, np.float64),
                )
            ]

    def may_be_rounding(self, share: float) -> bool:
        """Whether a column varies, but by less than a share of the layer's largest activation."""
        for columns in self._columns.values():
            values = self._values[:, columns]
            spread = np.ptp(values, axis=0)
            if ((0 < spread) & (spread <= share * np.abs(values).max(initial=0.0))).any():
                return True
        return False

    def rounding(self, copies: int, columns: int) -> NDArray[np.float64]:
        """The largest difference between copies of the rows; those of embeddings are exact."""
        differences = np.zeros(columns)
        if self._values.size:
            rows = self._values.reshape(copies, -1, self._values.shape[1])
            differences[: rows.shape[2]] = np.ptp(rows, axis=0).max(0)
        return differences

    def finished(self) -> tuple[NDArray[np.float64], list[UnitCall]]:
        """The activations, and the units that the columns belong to."""
        blocks, owners = [self._values], list(self._owners)
        for call, parts in self._shares.items():
            group, unit, share = (np.concatenate(part) for part in zip(*parts, strict=True))
            there, column = np.unique(unit, return_inverse=True)
            owners += [UnitCall(*call, unit) for unit in there.tolist()]
            self._check(len(owners))
            blocks.append(np.zeros((self._n_rows, len(there))))
            np.add.at(blocks[-1], (group, column), share)
        return (np.hstack(blocks) if len(blocks) > 1 else blocks[0]), owners


def _selection(owners: Iterable[UnitCall]) -> UnitSelection:
    by_layer: dict[str, set[int]] = {}
    for owner in owners:
        by_layer.setdefault(owner.layer, set()).add(owner.unit)
    return UnitSelection(by_layer)


def record(
    model: nn.Module,
    request: Samples,
    loss_fn: LossFunction,
    *,
    n_perturbations: int = 1000,
    noise_std: float = 0.1,
    perturb: Perturb | None = None,
    rows: Rows = "batch",
    units: UnitSelection | None = None,
    batch_size: int = 256,
    seed: int = 0,
    progress: bool = False,
    ranks: AnyRanks = ONE_RANK,
) -> Recording:
    """Record what perturbations of a request do to units and loss.

    Perturbations go through the model together if it treats samples alike and apart. This is tried
    on two of them beforehand; if activations or losses differ by more than rounding, all go one by
    one.

    Parameters
    ----------
    model : Module
        In evaluation mode. It is called without gradients, in its own dtype.
    request : Samples
        The samples to delete, all perturbed together. They are loaded at once.
    loss_fn : callable
        ``loss_fn(outputs, targets)``, the mean loss of the samples, a scalar tensor.
    n_perturbations : int, default 1000
        The paper's number.
    noise_std, perturb
        As in `perturbed`.
    rows : {"batch", "samples"}, default "batch"
        A row for each perturbation, with means over the request, as in the paper; or for each
        sample under each perturbation, at most 10^6 rows.
    units : UnitSelection, optional
        The units to record; by default all that can be selected.
    batch_size : int, default 256
        Most samples of one forward pass; 16 MiB of activations of a layer limit it, too.
    seed : int, default 0
        Of the perturbations, which do not depend on batch_size.
    progress : bool, default False
        Show a progress bar; needs tqdm.
    ranks : Ranks, optional
        Over which the perturbations are spread; all have the request, and get the recording.

    Raises
    ------
    ValueError, TypeError
        For options that cannot be used, models without a layer to record and layers that are not
        called the same on every input.
    """
    check_integer(n_perturbations, "n_perturbations", 3, MAX_ROWS)
    check_real(noise_std, "noise_std", 0)
    check_choice(rows, "rows", ("batch", "samples"))
    check_integer(batch_size, "batch_size", 1)
    check_seed(seed, optional=False)
    if perturb is not None and not callable(perturb):
        raise TypeError(
            "perturb must be a callable perturb(inputs, rng), for instance a TokenReplacement; got "
            f"{perturb!r}"
        )
    m = len(request)
    each = m if rows == "samples" else 1  # rows of a perturbation
    if n_perturbations * each > MAX_ROWS:
        raise ValueError(
            f"rows='samples' makes {n_perturbations * each:,} rows of {m:,} samples and "
            f"{n_perturbations:,} perturbations; the limit is {MAX_ROWS:,}: take "
            f"n_perturbations={MAX_ROWS // m} or rows='batch'"
        )
    batch = request.whole().fetch(slice(None))
    size = m // each  # of a group
    with ranks.alone("recording"):
        sites, without = find_calls(model, batch.part(slice(min(size, batch_size))), units)

    def draw(index: int) -> Batch:
        return perturbed(batch, seed, index, noise_std=noise_std, perturb=perturb)

    def counted(index: int) -> Batch:
        bar.update()
        return draw(index)

    bar = progress_bar(progress, total=n_perturbations, desc="perturbations", unit="draw")
    with Recorder(dict.fromkeys(sites.values())) as recorder, hooked_arithmetic(), bar:
        passes = Passes(model, recorder, list(sites), loss_fn, perturb)
        groups = 1
        if batch_size >= 2 * size:
            with ranks.alone("recording"):
                pair = draw(0).part(slice(size)), draw(1).part(slice(m - size, None))
                groups = passes.together(*pair, batch_size // size)
        groups = min(ranks.share_out(ranks.size, "recording", lambda _: groups))
        together = max(1, groups // each)
        whole, rest = divmod(n_perturbations, together)
        last = [rest] * (rest > 0)
        fill = partial(_fill, ranks, passes, sites, each, groups if each > 1 else batch_size)
        table, losses = fill([together] * whole + last, counted)
        activations, owners = table.finished()
        dtype = torch.promote_types(next(model.parameters()).dtype, torch.float32)
        resolution = 8 * torch.finfo(dtype).eps
        rounding, loss_rounding = np.zeros(len(owners)), 0.0
        small = _DOUBTFUL * resolution
        if table.may_be_rounding(small) or np.ptp(losses) <= small * np.abs(losses).max():
            # How a row is rounded depends on its place in a batch and on the size of the batch, so
            # the same perturbation is put into every place of both sizes.
            one, copies = draw(0), [together] * -(-_COPIES // together) + last
            table, repeated = fill(copies, lambda _: one)
            rounding = table.rounding(sum(copies), len(owners))
            loss_rounding = float(np.ptp(repeated.reshape(sum(copies), -1), axis=0).max())
    return Recording(
        activations,
        losses,
        owners,
        UnitSelection({site.name: site.units.tolist() for site in sites.values()}),
        without,
        together=groups,
        resolution=resolution,
        rounding=rounding,
        loss_rounding=loss_rounding,
    )


def _fill(
    ranks: AnyRanks,
    passes: Passes,
    sites: dict[Call, Site],
    each: int,
    most: int,
    chunks: list[int],
    draw: Callable[[int], Batch],
) -> tuple[_Table, NDArray[np.float64]]:
    """Activations and losses of perturbations 0, 1, ...; chunks says how many go together.

    A perturbation makes `each` rows; a forward pass takes at most `most` samples. Ranks take turns,
    and a row is of one rank alone.
    """
    table = _Table(sites, sum(chunks) * each)
    losses = np.zeros(sum(chunks) * each)

    def own() -> list[Tensor]:
        for number, (start, chunk) in enumerate(zip(accumulate([0, *chunks]), chunks)):  # noqa: B905
            if number % ranks.size != ranks.rank:
                continue
            drawn = Batch.joined([draw(start + k) for k in range(chunk)])
            for first in range(0, drawn.size, most):
                piece = drawn.part(slice(first, first + most))
                if each > 1:
                    at, groups, weight = start * each + first, piece.size, 1.0
                else:
                    at, groups, weight = start, chunk, min(1.0, piece.size * chunk / drawn.size)
                means, loss = passes.run(piece, groups)
                table.add(at, means, weight)
                losses[at : at + groups] += weight * loss.cpu().double().numpy()
        return [torch.from_numpy(losses)]

    if isinstance(ranks, OneRank):
        own()
        return table, losses
    (total,) = ranks.total("recording", own, [torch.from_numpy(losses)])
    table.over(ranks)
    return table, total.numpy()

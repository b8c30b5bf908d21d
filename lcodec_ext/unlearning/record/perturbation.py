"""What a deletion request makes the units do: activations and losses under perturbed inputs.

The first step of Algorithm 1 of the paper. The loss under perturbation is the response, the
units' activations are the columns, and L-FOCI finds the units on which the loss depends.
"""

import dataclasses
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lcodec_ext._checks import check_choice, check_integer, check_real, check_seed
from lcodec_ext._progress import progress_bar
from lcodec_ext._torch.batches import Batch, map_tensors, part_of, tensors_of
from lcodec_ext._torch.loss import LossFunction, scalar_loss
from lcodec_ext._torch.samples import Samples
from lcodec_ext.curvature.selection import UnitSelection
from lcodec_ext.dependence import FociResult, first_step_scores, lfoci
from lcodec_ext.dependence.table import MAX_ROWS
from lcodec_ext.unlearning.record.activations import (
    ALL,
    Call,
    Layout,
    Recorder,
    RowsSite,
    Shares,
    Site,
    UnitCall,
    find_calls,
    recording_arithmetic,
)

Perturb = Callable[[Any, np.random.Generator], Any]
Rows = Literal["batch", "samples"]

CHEAP_THRESHOLD = 0.05  # of T, the reference's

_DOUBTFUL = 1e3  # times the resolution: a spread that rounding may have made
_COPIES = 4  # of a perturbation, at least, from which that is told

_MAX_VALUES = 2**31  # activations in memory: 16 GiB

# Of a layer's activations in one forward pass, unless a single group has more. Larger ones leave
# the caches, and the C library gives their memory back after every layer and gets it anew.
_PASS_BYTES = 2**24


# ---------------------------------------------------------------------------------------------
# Perturbations


@dataclass(frozen=True)
class TokenReplacement:
    """Replace a few random tokens of every text by random other ones.

    Tokens that are masked out or special stay, and no token becomes a special one. A perturbation
    for the option `perturb` of the unlearning.

    Parameters
    ----------
    vocab_size : int, optional
        Replacements are drawn from the tokens 0 to vocab_size - 1, or from token_ids; one of the
        two must be given.
    token_ids : sequence of int, optional
        The tokens that replacements are drawn from.
    n_tokens : int, default 1
        How many tokens of each sample are replaced, the paper's one; all of them in a sample that
        has fewer which may be.
    special_ids : sequence of int, default ()
        Special tokens: padding, beginning, separators and so on (``tokenizer.all_special_ids``).
    input_key : str or int, default "input_ids"
        Where the inputs of the model have the tokens, if they are a dict (a name) or a tuple (a
        position). Inputs that are one tensor are the tokens themselves.
    mask_key : str or int, default "attention_mask"
        Where the inputs have the mask of the tokens, 1 for those that count, of the same shape.
        Inputs without it have no mask.

    Raises
    ------
    ValueError, TypeError
        For options of another kind, and for vocabularies of fewer than two tokens.

    Examples
    --------
    >>> replace = TokenReplacement(vocab_size=100, special_ids=(0, 1, 2))
    >>> tokens = torch.tensor([[1, 17, 41, 2, 0, 0]])
    >>> changed = replace({"input_ids": tokens}, np.random.default_rng(0))["input_ids"]
    >>> (changed != tokens).int()
    tensor([[0, 0, 1, 0, 0, 0]], dtype=torch.int32)
    """

    vocab_size: int | None = None
    token_ids: Sequence[int] | None = None
    n_tokens: int = 1
    special_ids: Sequence[int] = ()
    input_key: str | int = "input_ids"
    mask_key: str | int = "attention_mask"

    def __post_init__(self) -> None:
        if (self.vocab_size is None) == (self.token_ids is None):
            raise ValueError(
                "give either vocab_size or token_ids, the tokens to draw from; got "
                f"vocab_size={self.vocab_size!r} and "
                f"{'no' if self.token_ids is None else len(self.token_ids)} token_ids"
            )
        if self.vocab_size is not None:
            check_integer(self.vocab_size, "vocab_size", 1)
        for name in ("token_ids", "special_ids"):
            value = getattr(self, name)
            if value is not None:
                checked = tuple(check_integer(token, f"a token of {name}", 0) for token in value)
                object.__setattr__(self, name, checked)
        check_integer(self.n_tokens, "n_tokens", 1)
        for name in ("input_key", "mask_key"):
            key = getattr(self, name)
            if isinstance(key, bool) or not isinstance(key, str | int):
                raise TypeError(f"{name} must be a name or a position; got {key!r}")
        if len(self._vocabulary) < 2:
            raise ValueError(
                "the vocabulary must have two tokens at least that are not special; it has "
                f"{len(self._vocabulary)}"
            )

    def to_dict(self) -> dict[str, Any]:
        """The options as JSON takes them."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, options: Mapping[str, Any]) -> "TokenReplacement":
        """Make it again from what `to_dict` wrote."""
        return cls(**options)

    @cached_property
    def _vocabulary(self) -> NDArray[np.int64]:
        """The tokens that may be drawn, ascending."""
        tokens = range(self.vocab_size or 0) if self.token_ids is None else self.token_ids
        return np.setdiff1d(np.array(tokens), self.special_ids).astype(np.int64)

    def __call__(self, inputs: Any, rng: np.random.Generator) -> Any:
        """Replace tokens in the inputs of the model; the given ones are not changed."""
        ids = self._find(inputs, self.input_key)
        if ids is None:
            known = list(inputs) if isinstance(inputs, Mapping) else f"{len(inputs)} tensors"
            raise ValueError(
                f"input_key={self.input_key!r} names none of the inputs of the model: {known}"
            )
        if ids.is_floating_point() or ids.dtype == torch.bool:
            raise TypeError(f"the tokens must be integers; got a tensor of {ids.dtype}")
        tokens = ids.cpu().numpy().astype(np.int64)
        free = ~np.isin(tokens, self.special_ids)
        mask = None if isinstance(inputs, Tensor) else self._find(inputs, self.mask_key)
        if mask is not None:
            if mask.shape != ids.shape:
                raise ValueError(
                    f"the mask must have the shape of the tokens, {tuple(ids.shape)}; got "
                    f"{tuple(mask.shape)}"
                )
            free &= mask.cpu().numpy() != 0
        changed = torch.from_numpy(self._replace(tokens, free, rng)).to(ids)
        if isinstance(inputs, Tensor):
            return changed
        if isinstance(inputs, Mapping):
            return {**inputs, self.input_key: changed}
        position = range(len(inputs))[int(self.input_key)]
        return tuple(changed if k == position else part for k, part in enumerate(inputs))

    @staticmethod
    def _find(inputs: Any, key: str | int) -> Tensor | None:
        if isinstance(inputs, Tensor):
            return inputs
        try:
            return inputs[key]
        except (KeyError, IndexError, TypeError):  # a name where there are positions, too
            return None

    def _replace(
        self, tokens: NDArray[np.int64], free: NDArray[np.bool_], rng: np.random.Generator
    ) -> NDArray[np.int64]:
        shape = tokens.shape
        tokens, free = tokens.reshape(len(tokens), -1), free.reshape(len(tokens), -1)
        order = np.argsort(np.where(free, rng.random(tokens.shape), 2.0), axis=1)
        rows, columns = np.indices(order[:, : self.n_tokens].shape)
        places = rows, order[rows, columns]
        old, vocabulary = tokens[places], self._vocabulary
        at = np.searchsorted(vocabulary, old)
        known = vocabulary[np.minimum(at, len(vocabulary) - 1)] == old
        drawn = rng.integers(0, len(vocabulary) - known)
        new = vocabulary[drawn + (known & (drawn >= at))]  # any but the old one
        changed = tokens.copy()
        changed[places] = np.where(free[places], new, old)
        return changed.reshape(shape)


def perturbed(
    batch: Batch, seed: int, index: int, *, noise_std: float = 0.1, perturb: Perturb | None = None
) -> Batch:
    """Draw one perturbation of the inputs of a batch, a function of seed and index alone.

    Parameters
    ----------
    batch : Batch
        Whose targets stay.
    seed, index : int
        The draws come from NumPy's Philox under the key seed, its counter starting at
        index * 2**192.
    noise_std : float, default 0.1
        Of the Gaussian noise that every floating-point input gets, the paper's value.
    perturb : callable, optional
        What to do instead: ``perturb(inputs, rng)`` is given the inputs as the model takes them, a
        tensor, a tuple of tensors or a dict of them, and returns them perturbed: the same
        structure, shapes and dtypes. All it draws must come from rng, a `numpy.random.Generator`.

    Raises
    ------
    TypeError
        If no input is floating-point and perturb is not given.
    ValueError, TypeError
        For what perturb returns, if it is of another kind.
    """
    philox = np.random.Philox(key=seed, counter=[0, 0, 0, index])
    rng = np.random.Generator(philox)
    inputs: Any = batch.kwargs or (batch.args[0] if len(batch.args) == 1 else batch.args)
    if perturb is None:
        if not any(tensor.is_floating_point() for tensor in tensors_of(inputs)):
            raise TypeError(
                "Gaussian noise needs floating-point inputs, and the model takes none: give "
                "perturb=TokenReplacement(vocab_size, special_ids=...) for text, or a callable "
                "perturb(inputs, rng) for other integer inputs"
            )

        def add_noise(tensor: Tensor) -> Tensor:
            if not tensor.is_floating_point():
                return tensor
            noise = noise_std * rng.standard_normal(tuple(tensor.shape))
            return tensor + torch.from_numpy(noise).to(tensor)

        changed = map_tensors(add_noise, inputs)
    else:
        changed = perturb(map_tensors(torch.clone, inputs), rng)
        _check_perturbed(inputs, changed)
    if batch.kwargs:
        return dataclasses.replace(batch, kwargs=dict(changed))
    args = (changed,) if len(batch.args) == 1 else tuple(changed)
    return dataclasses.replace(batch, args=args)


def _check_perturbed(inputs: Any, changed: Any, where: str = "") -> None:
    """Refuse perturbed inputs of another structure, shape, dtype or device."""

    def kind(value: Any) -> str:
        if isinstance(value, Tensor):
            return f"a tensor of shape {tuple(value.shape)}, {value.dtype}, on {value.device}"
        if isinstance(value, Mapping):
            return f"a dict with {sorted(map(str, value))}"
        if isinstance(value, tuple | list):
            return f"{len(value)} values"
        return type(value).__name__

    expected, given = kind(inputs), kind(changed)
    if expected != given:
        raise ValueError(
            "perturb must return inputs of the same structure, shapes and dtypes"
            f"{where and f'; at {where}'}: expected {expected}, got {given}"
        )
    if isinstance(inputs, Mapping):
        for key in inputs:
            _check_perturbed(inputs[key], changed[key], f"{where}[{key!r}]")
    elif isinstance(inputs, tuple | list):
        for k, (part, other) in enumerate(zip(inputs, changed, strict=True)):
            _check_perturbed(part, other, f"{where}[{k}]")


# ---------------------------------------------------------------------------------------------
# Several perturbations in one forward pass


class _Passes:
    """Forward passes over groups of samples that follow each other in a batch.

    Of every group they give the mean activations and the loss, as if it had gone alone. Whether
    that can be done for several groups at once, a probe finds out.
    """

    def __init__(
        self,
        model: nn.Module,
        recorder: Recorder,
        calls: list[Call],
        loss_fn: LossFunction,
        perturb: Perturb | None,
    ) -> None:
        self._model, self._recorder, self._calls = model, recorder, calls
        self._loss_fn, self._perturb = loss_fn, perturb
        self._layouts: dict[Call, list[Layout]] = {}
        self._vmap = False
        self._bytes = 1  # of the largest view of one group

    def run(self, batch: Batch, groups: int) -> tuple[dict[Call, Any], Tensor]:
        """Mean activations of each call, one row a group, and losses, shape (groups,)."""

        def reduce(call: Call, site: Site, views: list[Tensor]) -> Any:
            layouts = [ALL] * len(views) if groups == 1 else self._layouts.get(call)
            if layouts is None:
                return None  # a call that the check below refuses
            pairs = zip(views, layouts, strict=True)
            return site.finish([site.means(view, layout, groups) for view, layout in pairs])

        outputs, means = self._call(batch, reduce)
        if list(means) != self._calls:
            raise ValueError("the layers that the model calls change from input to input")
        return means, self._losses(outputs, batch, groups)

    def _call(
        self, batch: Batch, take: Callable[[Call, Site, list[Tensor]], Any]
    ) -> tuple[Any, dict[Call, Any]]:
        """Call the model on perturbed inputs; on the given ones it has been called before."""
        try:
            return self._recorder.run(self._model, batch, take)
        except (IndexError, RuntimeError) as error:  # of embeddings, and of their bags
            if self._perturb is None or isinstance(error, torch.OutOfMemoryError):
                raise
            raise ValueError(
                f"the model fails on perturbed inputs: {error}. {self._suspicion()}"
            ) from error

    def _suspicion(self) -> str:
        if not isinstance(self._perturb, TokenReplacement):
            return "perturb must return inputs that it takes"
        size, drawn = self._perturb.vocab_size, self._perturb.token_ids or ()
        given = f"tokens up to {max(drawn)} in token_ids" if size is None else f"vocab_size={size}"
        rows = [
            f"{name!r} {module.num_embeddings}"
            for name, module in self._model.named_modules()
            if isinstance(module, nn.Embedding | nn.EmbeddingBag)
        ]
        known = f"; rows of the model's embeddings: {', '.join(rows[:4])}" if rows else ""
        return f"TokenReplacement may draw tokens that the model has not: {given}{known}"

    def _losses(self, outputs: Any, batch: Batch, groups: int) -> Tensor:
        if groups == 1:
            return self._loss(outputs, batch.targets)[None]
        each = batch.size // groups
        if not self._vmap:
            slices = [slice(k * each, (k + 1) * each) for k in range(groups)]
            return torch.stack(
                [
                    self._loss(*part_of((outputs, batch.targets), batch.size, samples))
                    for samples in slices
                ]
            )
        both = outputs, batch.targets
        tensors = list(tensors_of(both))
        split = [tensor.ndim > 0 and len(tensor) == batch.size for tensor in tensors]
        parts = [
            torch.unflatten(tensor, 0, (groups, each)) if of_samples else tensor
            for tensor, of_samples in zip(tensors, split, strict=True)
        ]

        def loss(*parts: Tensor) -> Tensor:
            remaining = iter(parts)
            return self._loss(*map_tensors(lambda _: next(remaining), both))

        in_dims = tuple(0 if of_samples else None for of_samples in split)
        return torch.func.vmap(loss, in_dims)(*parts)

    def _loss(self, outputs: Any, targets: Any) -> Tensor:
        return scalar_loss(self._loss_fn, outputs, targets)

    def together(self, first: Batch, second: Batch, most: int) -> int:
        """How many groups like two different ones go together, at most; 1 if they cannot."""
        if not self._probe(first, second):
            return 1
        return max(1, min(most, _PASS_BYTES // self._bytes))

    def _probe(self, first: Batch, second: Batch) -> bool:
        """Find out how two different groups can go together; False if they cannot.

        They can if every activation and loss equals, up to rounding, that of the group alone.
        """

        def alone(call: Call, site: Site, views: list[Tensor]) -> list[tuple[torch.Size, Any]]:
            self._bytes = max(self._bytes, *(view.numel() * view.element_size() for view in views))
            return [(view.shape, site.means(view, ALL, 1)) for view in views]

        expected, taken = [], []
        for batch in (first, second):
            outputs, found_alone = self._call(batch, alone)
            taken.append(found_alone)
            expected.append(self._losses(outputs, batch, 1))
        one, two = taken

        def both_ways(
            call: Call, site: Site, views: list[Tensor]
        ) -> tuple[Site, list[dict[Layout, Any]]]:
            pairs = zip(one.get(call, ()), views, strict=False)
            return site, [
                {
                    layout: site.means(view, layout, 2)
                    for layout in _layouts(shape, view.shape, first.size)
                }
                for (shape, _), view in pairs
            ]

        both = Batch.joined([first, second])
        try:
            outputs, found = self._call(both, both_ways)
            losses = self._losses(outputs, both, 2)
        except Exception:  # a model may be made for one number of samples
            return False
        if not list(one) == list(two) == list(found):
            return False
        if not _agree(losses, torch.cat(expected)):
            return False
        for call, (site, options) in found.items():
            self._layouts[call] = []
            for means, (_, a), (_, b) in zip(options, one[call], two[call], strict=True):
                wanted = torch.cat([site.table(a, 1), site.table(b, 1)])
                errors = {
                    layout: (site.table(mean, 2) - wanted).abs().max().item()
                    for layout, mean in means.items()
                }
                best = min(errors, key=lambda layout: errors[layout], default=None)
                if best is None or not _agree(site.table(means[best], 2), wanted):
                    return False
                self._layouts[call].append(best)
        self._vmap = True
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")  # of operations that vmap runs one by one
                self._vmap = _agree(self._losses(outputs, both, 2), losses)
        except Exception:  # vmap cannot run every loss
            self._vmap = False
        return True


def _layouts(alone: Sequence[int], both: Sequence[int], size: int) -> list[Layout]:
    """How the samples may lie in a view whose shape is known of size samples and of twice those."""
    if len(alone) != len(both):
        return []
    grown = [axis for axis in range(len(alone) - 1) if alone[axis] != both[axis]]
    if len(grown) > 1:
        return []
    if not grown:
        return [ALL]
    (axis,) = grown
    positions, rest = divmod(alone[axis], size)
    if rest or both[axis] != 2 * alone[axis]:
        return []
    return list(dict.fromkeys([Layout(axis), Layout(axis, positions)]))


def _agree(a: Tensor, b: Tensor) -> bool:
    """Whether two results are equal up to rounding; the larger entries count."""
    rtol = min(1e3 * torch.finfo(a.dtype).eps, 0.05)
    return bool((a - b).abs().max() <= rtol * b.abs().max())


# ---------------------------------------------------------------------------------------------
# Recording


@dataclass(frozen=True, eq=False, repr=False)
class Recording:
    """Activations and losses under perturbation.

    Attributes
    ----------
    activations : ndarray of float64, shape (rows, columns)
        Call by call, unit by unit; the embeddings last. A row of an embedding that no input has
        has no column.
    losses : ndarray of float64, shape (rows,)
    owners : list of UnitCall
        What the columns belong to.
    units : UnitSelection
        The units that were recorded; the rows of embeddings all, with a column or not.
    without : dict of str to str
        Layers whose units were not recorded, and why not.
    together : int
        How many perturbations (rows="samples": perturbed samples) went through the model at a time.
        1 where batch_size allows two: together they would have changed its results, or their
        activations take too much memory.
    resolution : float
        Share of its largest value below which the differences of a column, or of the losses, are
        rounding.
    rounding : ndarray of float64, shape (columns,)
        What rounding alone does to a column: the largest difference between copies of one
        perturbation. It was measured if a column's differences are so small that it may matter.
    loss_rounding : float
        The same of the losses.
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
        """Add to the rows from first on."""
        for call, mean in means.items():
            if isinstance(mean, Shares):
                group, unit, share = mean
                self._shares[call].append(Shares(first + group, unit, weight * share))
            else:
                values = self._values[first : first + len(mean), self._columns[call]]
                values += weight * mean.cpu().double().numpy()

    def may_be_rounding(self, share: float) -> bool:
        """Whether a column varies, but by less than a share of what the layer puts out."""
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
        """The activations and whose they are."""
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
) -> Recording:
    """Record what perturbations of a request do to units and loss.

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
        sample under each perturbation, perturbation by perturbation, at most 10^6.
    units : UnitSelection, optional
        The units to record; by default all that can be selected.
    batch_size : int, default 256
        Most samples of one forward pass: several perturbations of a small request, a part of a
        large one. No more perturbations go together than take 16 MiB in any one layer.
    seed : int, default 0
        Of the perturbations, which do not depend on batch_size.
    progress : bool, default False
        Show a progress bar; needs tqdm.

    Returns
    -------
    Recording

    Raises
    ------
    ValueError, TypeError
        For options that cannot be used, models without a layer to record and layers that are not
        called the same on every input.

    Notes
    -----
    Perturbations go together through a model that treats samples alike and apart, wherever its
    layers put them: along any axis, or in a row with their positions. Two perturbations are tried
    together and alone beforehand; if activations or losses differ by more than rounding, all go
    one by one.
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
    n_rows = n_perturbations * (m if rows == "samples" else 1)
    if n_rows > MAX_ROWS:
        raise ValueError(
            f"rows='samples' makes {n_rows:,} rows of {m:,} samples and {n_perturbations:,} "
            f"perturbations, and may make {MAX_ROWS:,}: take n_perturbations={MAX_ROWS // m} or "
            "rows='batch'"
        )
    batch = request.fetch(slice(None))
    size = m if rows == "batch" else 1  # of a group
    sites, without = find_calls(model, batch.part(slice(min(size, batch_size))), units)

    def draw(index: int) -> Batch:
        return perturbed(batch, seed, index, noise_std=noise_std, perturb=perturb)

    bar = progress_bar(progress, total=n_perturbations, desc="perturbations", unit="draw")
    with Recorder(dict.fromkeys(sites.values())) as recorder, recording_arithmetic(), bar:
        passes = _Passes(model, recorder, list(sites), loss_fn, perturb)
        groups = 1
        if batch_size >= 2 * size:
            pair = draw(0).part(slice(size)), draw(1).part(slice(m - size, None))
            groups = passes.together(*pair, batch_size // size)
        together = max(1, groups // m) if rows == "samples" else groups

        def counted(index: int) -> Batch:
            bar.update()
            return draw(index)

        whole, rest = divmod(n_perturbations, together)
        last = [rest] * (rest > 0)
        fill = partial(_fill, passes, sites, m, groups, rows, batch_size)
        table, losses = fill([together] * whole + last, counted)
        activations, owners = table.finished()
        dtype = torch.promote_types(next(model.parameters()).dtype, torch.float32)
        resolution = 8 * torch.finfo(dtype).eps
        rounding, loss_rounding = np.zeros(len(owners)), 0.0
        small = _DOUBTFUL * resolution
        if table.may_be_rounding(small) or np.ptp(losses) <= small * np.abs(losses).max():
            # How a row is rounded hangs on its place in a batch and on the size of the batch, so
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
    passes: _Passes,
    sites: dict[Call, Site],
    m: int,
    groups: int,
    rows: Rows,
    batch_size: int,
    chunks: list[int],
    draw: Callable[[int], Batch],
) -> tuple[_Table, NDArray[np.float64]]:
    """Activations and losses of perturbations 0, 1, ..., so many of them together as chunks say."""
    each = m if rows == "samples" else 1
    table = _Table(sites, sum(chunks) * each)
    losses = np.zeros(sum(chunks) * each)
    start = 0
    for chunk in chunks:
        drawn = Batch.joined([draw(start + k) for k in range(chunk)])
        step = min(batch_size, drawn.size) if rows == "batch" else groups
        for first in range(0, drawn.size, step):
            piece = drawn.part(slice(first, first + step))
            if rows == "samples":
                at, weight = start * m + first, 1.0
                n_groups = piece.size
            else:
                at, weight = start, min(1.0, piece.size / m)
                n_groups = chunk
            means, loss = passes.run(piece, n_groups)
            table.add(at, means, weight)
            losses[at : at + n_groups] += weight * loss.cpu().double().numpy()
        start += chunk
    return table, losses


# ---------------------------------------------------------------------------------------------
# Selection


def select_lfoci(
    recording: Recording,
    *,
    noise: float = 0.01,
    max_units: int | None = None,
    stop: bool = True,
    seed: int = 0,
    progress: bool = False,
) -> tuple[list[tuple[str, int]], FociResult]:
    """Find the units on which the loss depends, by L-FOCI.

    Dead units are left out beforehand. A unit is selected if any of its calls is.

    Parameters
    ----------
    recording : Recording
    noise : float, default 0.01
        Of L-FOCI, as a share of each column's standard deviation: means over a request vary by far
        less than the paper's absolute 0.01.
    max_units : int, optional
        A cap.
    stop : bool, default True
        Whether L-FOCI stops by its own rule, where no unit raises T.
    seed : int, default 0
        Of the noise.
    progress : bool, default False
        Show a progress bar for each step; needs tqdm.

    Returns
    -------
    units : list of (str, int)
        Layer and unit, in the order of selection, each once.
    result : FociResult
        Its `ordering` are columns of the recording; `names` tell unit and call.

    Raises
    ------
    ValueError
        If nothing is selected, if the loss is constant, and for activations or losses that are
        not finite.
    """
    alive = _alive(recording)
    result = lfoci(
        recording.activations[:, alive],
        recording.losses,
        noise=noise,
        noise_scale="relative",
        seed=seed,
        max_features=max_units,
        stop=stop,
        progress=progress,
    )
    if not len(result.ordering):
        raise _nothing(recording, "L-FOCI selects no unit")
    columns = alive[result.ordering]
    chosen = [recording.owners[column] for column in columns]
    result = dataclasses.replace(
        result,
        ordering=columns,
        names=[f"{owner.layer}[{owner.unit}] call {owner.call}" for owner in chosen],
        n_features=len(recording.owners),
    )
    return _units_of(chosen), result


def select_cheap(
    recording: Recording, *, max_units: int | None = 1, threshold: float = CHEAP_THRESHOLD
) -> tuple[list[tuple[str, int]], NDArray[np.float64]]:
    """Take the units with the largest T(loss, activation), each looked at alone.

    With max_units=1 this is the paper's cheap FOCI, which removes a sample with one unit, and then
    anew at the changed weights for as long as the T of the unit exceeds 0.05; the repetition is
    the caller's.

    Parameters
    ----------
    recording : Recording
    max_units : int, optional
        How many; 1 by default. None: all above the threshold.
    threshold : float, default 0.05
        T that every unit after the first must exceed, the reference's. A unit with several calls
        goes by the largest.

    Returns
    -------
    units : list of (str, int)
        Layer and unit, by decreasing T, on equality in the order of the recording.
    values : ndarray of float64, shape (len(units),)
        Their T, in full precision up to 1e-9.

    Raises
    ------
    ValueError
        If no unit has T > 0, if the loss is constant, and for activations or losses that are not
        finite.
    """
    if max_units is not None:
        check_integer(max_units, "max_units", 1)
    check_real(threshold, "threshold", -np.inf)
    alive = _alive(recording)
    values = first_step_scores(recording.activations[:, alive], recording.losses)
    order = np.argsort(-values, kind="stable")
    if values[order[0]] <= 0:
        raise _nothing(recording, "no unit has T(loss, activation) > 0")
    best: dict[tuple[str, int], float] = {}
    for column in order:
        if best and values[column] <= threshold:
            break
        owner = recording.owners[alive[column]]
        best.setdefault((owner.layer, owner.unit), float(values[column]))
        if len(best) == max_units:
            break
    return list(best), np.array(list(best.values()))


def _alive(recording: Recording) -> NDArray[np.int64]:
    """The columns to select from; refuse a recording that nothing can be selected from."""
    if not np.isfinite(recording.losses).all():
        raise ValueError("the loss of the perturbed request is NaN or infinite")
    for column in np.flatnonzero(~np.isfinite(recording.activations.sum(0)))[:1]:
        owner = recording.owners[column]
        raise ValueError(
            f"unit {owner.unit} of layer {owner.layer!r} has activations NaN or infinite"
        )
    noise = recording.resolution * np.abs(recording.losses).max() + 2 * recording.loss_rounding
    if np.ptp(recording.losses) <= noise:
        raise ValueError(
            "the loss of the request is the same under all perturbations: noise_std is too small "
            "for the inputs, or perturb changes nothing"
        )
    if not len(recording.alive):
        raise _nothing(recording, "no unit can be selected, all are dead")
    return recording.alive


def _nothing(recording: Recording, what: str) -> ValueError:
    return ValueError(
        f"{what}, from {len(recording.losses)} rows: the loss depends on none measurably. Give "
        "more n_perturbations, a larger noise_std or another perturb, or take selection='full'"
    )


def _units_of(owners: Iterable[UnitCall]) -> list[tuple[str, int]]:
    return list(dict.fromkeys((owner.layer, owner.unit) for owner in owners))

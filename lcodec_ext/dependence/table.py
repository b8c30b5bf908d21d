"""What users pass in, made into a response and features without missing values.

CUDA tensors are checked and converted where they lie; nothing but verdicts is read from them.
Every message names the argument, says what was given and what was expected.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lcodec_ext._arrays import (
    array_module,
    as_array,
    beyond_float64,
    class_codes,
    is_float,
    is_tensor,
    listed,
    refuse_merged,
)
from lcodec_ext._callers import warn
from lcodec_ext._checks import check_choice, check_integer, counted, first_few
from lcodec_ext.dependence.backends.block_table import BlockTable

Y_ORDERS = ("given", "average")
MOST_AVERAGED = 5  # columns of y, whose 120 orders are averaged
MAX_ROWS = 1_000_000  # the integer sums of the exactness contract are proven up to here


class Features(NamedTuple):
    """Feature columns in the working precision.

    ``values`` is a C-contiguous (n, p) array, CUDA tensor or `BlockTable`: float32 where the input
    was float32, float16 or bfloat16, float64 for everything else. ``names`` are column names, None
    without any; ``argument`` is what the user calls the table. ``first`` is the index of its first
    column: not 0 for a part of a table.
    """

    values: Any
    names: list[str] | None
    argument: str
    first: int = 0

    def column(self, k: int) -> str:
        """A column in a message: "column 'age' (index 3)"."""
        k, name = k + self.first, None if self.names is None else self.names[k]
        return f"column {k}" if name is None else f"column {name!r} (index {k})"

    def label(self, k: int) -> str:
        """A column in a message: "column 'age' (index 3) of X"."""
        return f"{self.column(k)} of {self.argument}"

    def part(self, first: int, values: Any) -> "Features":
        """Some of the columns, from the first on, and values of them."""
        names = None if self.names is None else self.names[first : first + values.shape[1]]
        return Features(values, names, self.argument, self.first + first)

    def warn_constant(self, flags: NDArray[np.bool_]) -> None:
        """One warning for all columns that are flagged as constant; it names the first five."""
        constant = flags.nonzero()[0]
        if len(constant) == 0:
            return
        shown = first_few([self.column(int(k)) for k in constant], 5)
        verb = "is" if len(constant) == 1 else "are"
        warn(
            f"{shown} of {self.argument} {verb} constant and can tell nothing",
        )


class Rows(NamedTuple):
    """Arrays or tensors of equal length without missing values, and what was left out for that.

    ``missing`` has the number of NaN of every argument or column that has one: {"column 'age'
    (index 2) of X": 12, "y": 3}.
    """

    values: dict[str, Any]
    n: int  # rows that were given
    n_omitted: int
    missing: dict[str, int]

    def said(self) -> str:
        """How many rows were left out, and for what: "15 of 400 rows left out: NaN in ..."."""
        most = sorted(self.missing.items(), key=lambda item: -item[1])
        where = first_few([f"{label} ({count:,})" for label, count in most], 3)
        return f"{self.n_omitted:,} of {counted(self.n, 'row')} left out: NaN in {where}"

    def warn_if_most(self) -> None:
        """Warn where more than half of the rows are left out and a number cannot say so."""
        if 2 * self.n_omitted > self.n:
            warn(self.said())


class Missing(NamedTuple):
    """Which rows of some arrays have a NaN, None if none has, and how many; see `Rows`."""

    rows: Any
    counts: dict[str, int]

    def beside(self, other: "Missing") -> "Missing":
        """What is missing in two tables of the same rows."""
        if self.rows is None or other.rows is None:
            return Missing(
                other.rows if self.rows is None else self.rows, self.counts | other.counts
            )
        return Missing(self.rows | other.rows, self.counts | other.counts)


_NOTHING = Missing(None, {})


def said_columns(columns: Sequence[int], names: Sequence[str] | None) -> str:
    """Columns in a result: "'age' (3), 'bmi' (2)", or "columns 3, 2" without names."""
    if names is None:
        return f"column{'s' * (len(columns) > 1)} {', '.join(map(str, columns))}"
    return ", ".join(f"{name!r} ({k})" for k, name in zip(columns, names, strict=True))


def as_response(y: Any, name: str = "y", *, tensors: bool | None = None) -> Any:
    """A response as a 1-d array or tensor of its own dtype: ranks need no conversion.

    Accepts shape (n,) or (n, 1). `tensors` as in `as_array`.
    """
    return _one_column(as_array(y, name, tensors=tensors)[0], name)


def _one_column(array: Any, name: str) -> Any:
    """An array of shape (n,) or (n, 1) as one of shape (n,); refuse others."""
    if array.ndim == 2 and array.shape[1] == 1:
        array = array[:, 0]
    if array.ndim != 1:
        raise ValueError(
            f"{name} must be one column, of shape (n,) or (n, 1); got shape {tuple(array.shape)}"
        )
    return array


class Target(NamedTuple):
    """A response: one column, or `Features` of several. The first ``given`` are in distances."""

    values: Any
    nominal: bool = False  # whether it holds codes of classes without an order
    given: int = 0
    average: bool = False  # whether the orders of several columns are averaged

    def beside(self, table: Any, y: Any) -> Any:
        """A table, and behind its columns those of a clean y that are in distances."""
        if not self.given:
            return table
        if isinstance(table, BlockTable):
            return table.beside(y[:, : self.given])
        return array_module(table).concatenate([table, y[:, : self.given]], axis=1)

    def warn_constant(self, y: Any) -> None:
        """One warning for all constant columns of a clean y of several, unless all are."""
        if not self.given:
            return
        flags = (y == y[0]).all(axis=0)
        flags = flags.cpu().numpy() if is_tensor(flags) else flags
        if not flags.all():
            self.values.warn_constant(flags)


def as_target(
    y: Any,
    *,
    tensors: bool | None = None,
    y_order: str | None = None,
    decimals: int | None = None,
) -> Target:
    """A response; of several columns only with a y_order. A target is taken as it is.

    Strings and unordered categories are classes without an order; ordered categories become
    their codes. With decimals, columns that are in distances are counts of 10**-decimals.
    """
    if isinstance(y, Target):
        return y
    if isinstance(y, list | tuple):
        y = listed(y, "y")
    if (codes := class_codes(y)) is not None:
        return Target(*codes)
    array, names = as_array(y, "y", tensors=tensors)
    if y_order is None or array.ndim != 2 or min(array.shape) < 2:
        return Target(_one_column(array, "y"))
    q = array.shape[1]
    if y_order == "average" and q > MOST_AVERAGED:
        raise ValueError(
            f"y_order='average' goes over all orders of the columns of y, {MOST_AVERAGED} at most; "
            f"got {q}: pass y_order='given'"
        )
    given = q if y_order == "average" else q - 1
    features = as_features(array, "y", tensors=tensors)._replace(names=names)
    if decimals is not None:
        xp = array_module(features.values)
        counts, last = features.values[:, :given], features.values[:, given:]
        counts = _counted(
            features._replace(values=counts), check_integer(decimals, "decimals", 0, 15)
        ).values
        last = xp.asarray(last, dtype=counts.dtype)
        features = features._replace(values=xp.concatenate([counts, last], axis=1))
    return Target(features, given=given, average=y_order == "average")


def refuse_swapped(X: Any, y: Any) -> None:
    """Refuse a column as X and a table as y, the order in which R's FOCI takes them."""
    shapes = [tuple(getattr(each, "shape", ())) for each in (X, y)]
    if [len(shape) for shape in shapes] == [1, 2] and shapes[1][1] > 1:
        raise ValueError(
            f"X must be a table and y a column; got X of shape {shapes[0]} and y of shape "
            f"{shapes[1]}: are the arguments swapped?"
        )


def check_classes(y: Any, nominal: bool) -> None:
    """Refuse codes of classes of which most are rare: numbers that are written as text."""
    if nominal and 2 * (count := len(np.unique(y))) > len(y):
        raise ValueError(
            f"y has {count:,} classes on {len(y):,} rows; expected classes that repeat: pass "
            "numbers, with astype(float), or astype('int64') for integers, where y is numbers "
            "written as text"
        )


def refuse_classes(nominal: bool, function: str, instead: str) -> None:
    """Refuse classes without an order where noise would be added to them."""
    if nominal:
        raise ValueError(
            f"{function} adds noise to y, and y holds classes without an order (strings, "
            f"categories): use {instead}, or average {function} of y == c over the classes c"
        )


def as_features(
    X: Any,
    name: str,
    *,
    allow_1d: bool = True,
    tensors: bool | None = None,
    decimals: int | None = None,
    allow_empty: bool = False,
) -> Features:
    """Feature columns: a 1-d array is one column where ``allow_1d``; `tensors` as in `as_array`.

    With decimals the columns are counts of 10**-decimals, in float64. p = 0 is an error unless
    ``allow_empty``, and so are numbers that float64 merges. Features are taken as they are.
    """
    if isinstance(X, Features):
        return X
    if decimals is not None:
        decimals = check_integer(decimals, "decimals", 0, 15)
    if isinstance(X, BlockTable):
        table = Features(X, X.names, name)

        def convert(values: NDArray, first: int) -> NDArray:
            exact: NDArray = _exact(table.part(first, values), decimals).values
            return exact

        return table._replace(values=X.converted(convert, decimals is not None))
    array, names = as_array(X, name, tensors=tensors)
    if array.ndim == 1 and allow_1d:
        array = array[:, None]
        label = getattr(X, "name", None)
        names = [label] if isinstance(label, str) else None
    if array.ndim != 2:
        way = "to_frame()" if hasattr(X, "to_frame") else "reshape(-1, 1)"
        hint = f"; for one feature pass {name}.{way}" if array.ndim == 1 else ""
        shapes = "(n,) or (n, p)" if allow_1d else "(n, p)"
        raise ValueError(f"{name} must have shape {shapes}; got shape {tuple(array.shape)}{hint}")
    if array.shape[1] == 0 and not allow_empty:
        raise ValueError(f"{name} must have at least one column; got shape {tuple(array.shape)}")
    features = _exact(Features(array, names, name), decimals)
    array = features.values
    xp = array_module(array)
    dtype = xp.float32 if array.dtype == xp.float32 else xp.float64
    if is_tensor(array):
        return Features(array.to(dtype).contiguous(), names, name)
    return Features(np.ascontiguousarray(array, dtype=dtype), names, name)


def _exact(features: Features, decimals: int | None) -> Features:
    """Columns as they are, or counts of 10**-decimals; refuse numbers that float64 merges."""
    array = features.values
    if array.shape[1] and beyond_float64(array):
        for k in range(array.shape[1]):
            refuse_merged(array[:, k], features.label(k))
    return features if decimals is None else _counted(features, decimals)


def _counted(features: Features, decimals: int) -> Features:
    """Columns of numbers with so many decimals as integers, whose differences are exact."""
    array = features.values
    xp = array_module(array)
    single = array.dtype == xp.float32
    eps, slack = (2.0**-23, 1e-6) if single else (2.0**-52, 1e-9)
    # with decimals a number of more units may be the float next to two of them
    most = (2 if decimals == 0 or not is_float(array) else 0.5) / eps
    values = xp.asarray(array, dtype=xp.float64)
    with np.errstate(all="ignore"):
        scaled = values * 10.0**decimals
        whole = xp.round(scaled)
        written = whole / 10.0**decimals  # as text with so many decimals is read
        if single:
            written = xp.asarray(xp.asarray(written, dtype=xp.float32), dtype=xp.float64)
        off = xp.abs(scaled - whole) > xp.clip(slack * (1 + xp.abs(whole)), 0, 1e-3)  # arithmetic's
        off &= values != written
        beyond = xp.isfinite(values) & (xp.abs(whole) > most)
    advice = "pass float64 or fewer decimals" if single else "pass fewer decimals"
    power = round(np.log2(most))
    for flags, what in (
        (beyond, f"which is beyond 2**{power} units of 1e-{decimals}; {advice}"),
        (off, f"which has more than {decimals} decimals; pass more decimals, or round it first"),
    ):
        if flags.any():
            row, k = xp.argwhere(flags)[0].tolist()
            value = float(values[row, k])
            raise ValueError(f"{features.label(k)} holds {value!r} in row {row}, {what}")
    return features._replace(values=whole)


def missing_rows(arrays: dict[str, Any], nan_policy: str | None) -> Missing:
    """The rows with a NaN, which `clean_rows` leaves out; other values are refused as it does."""
    if nan_policy is not None:
        check_choice(nan_policy, "nan_policy", ("raise", "omit"))
    drop: Any = None
    counts: dict[str, int] = {}
    for name, array in arrays.items():
        found = _missing(name, array, nan_policy)
        if found is _NOTHING:
            continue
        counts |= found.counts
        if found.rows is not None:
            drop = found.rows if drop is None else drop | found.rows
    return Missing(drop, counts)


def _lies_across(table: Any, lengths: dict[str, int]) -> bool:
    """Whether a table has as many columns as another argument has rows."""
    shape = table.shape
    return len(shape) == 2 and shape[1] > 1 and shape[1] in lengths.values()


def clean_rows(
    arrays: dict[str, Any],
    nan_policy: str | None,
    minimum: int = 3,
    missing: Missing | None = None,
) -> Rows:
    """Arrays or tensors of equal length without NaN or infinity.

    Parameters
    ----------
    arrays : dict
        Validated responses and features, by argument name.
    nan_policy : {"raise", "omit", None}
        "omit" drops every row that has a NaN in any of the arrays. None: NaN is an error, and the
        caller has no such option.
    minimum : int
        Rows that must remain.
    missing : Missing, optional
        `missing_rows` of the arrays, where it is known.
    """
    values = {
        name: array.values if isinstance(array, Features) else array
        for name, array in arrays.items()
    }
    lengths = {name: len(array) for name, array in values.items()}
    if len(set(lengths.values())) > 1:
        given = ", ".join(f"{name} has {length}" for name, length in lengths.items())
        across = [name for name, array in values.items() if _lies_across(array, lengths)]
        turned = f": pass {across[0]}.T" if across else ""
        raise ValueError(f"all arguments must have the same number of rows; {given}{turned}")
    drop, counts = missing_rows(arrays, nan_policy) if missing is None else missing
    n = next(iter(lengths.values()))
    remaining = n if drop is None else n - int(drop.sum())
    found = Rows(values, n, n - remaining, counts)
    if remaining < minimum:
        left = f"{n}"
        if remaining < n:
            left = f"{remaining} left after omitting NaN ({found.said()})"
        raise ValueError(f"{' and '.join(values)} must have at least {minimum} rows; got {left}")
    if remaining > MAX_ROWS:
        raise ValueError(
            f"{' and '.join(values)} may have at most {MAX_ROWS:,} rows, the size up to which "
            f"the sums are proven exact; got {remaining:,}: take a random sample of rows"
        )
    if remaining < n:
        found = found._replace(values={name: array[~drop] for name, array in values.items()})
    return found


def _missing(name: str, given: Any, nan_policy: str | None) -> Missing:
    """Rows with a NaN, and how many; refuse infinity, empty columns, NaN where it is to raise."""
    if _is_finite(given.values if isinstance(given, Features) else given):
        return _NOTHING
    features = given if isinstance(given, Features) else Features(given, None, name)
    found = Missing(None, {})
    infinite, missing = _Flagged(features), _Flagged(features)
    for first, block in _blocks(features.values):
        if _is_finite(block):
            continue
        xp = array_module(block)
        infinite.add(first, xp.isinf(block))
        flags = xp.isnan(block)
        if missing.add(first, flags):
            rows = flags.any(axis=1) if flags.ndim == 2 else flags
            counts = flags.sum(axis=0).tolist()
            if flags.ndim == 2:
                part = features.part(first, block)
                counts = {part.label(k): count for k, count in enumerate(counts) if count}
            found = found.beside(Missing(rows, counts if flags.ndim == 2 else {name: counts}))
    if infinite.count:
        raise ValueError(f"infinite values are not allowed; got {name} at {infinite.where()}")
    n = len(features.values)
    empty = [label for label, count in found.counts.items() if count == n]
    if empty:
        verb = "is" if len(empty) == 1 else "are"
        advice = ""
        if len(features.values.shape) == 2:
            advice = f"; leave {'it' if len(empty) == 1 else 'them'} out"
        raise ValueError(f"{first_few(empty, 5)} {verb} empty: all values are NaN{advice}")
    if missing.count and nan_policy != "omit":
        advice = "leave out the rows with missing values first"
        if nan_policy == "raise":
            advice = "pass nan_policy='omit' to leave out rows with missing values"
        raise ValueError(f"NaN in {name} at {missing.where()}; {advice}")
    return found


def _is_finite(values: Any) -> bool:
    """Whether all values are finite, in one pass; what is not may be finite, and is looked at."""
    if isinstance(values, BlockTable):
        return False
    if not is_float(values):
        return True
    if is_tensor(values):
        return bool(values.sum().isfinite())
    # a dot product would be quicker, but a process that is forked during it can hang in BLAS
    with np.errstate(over="ignore", invalid="ignore"):
        return math.isfinite(np.add.reduce(values, axis=None))


def _blocks(values: Any) -> Iterator[tuple[int, Any]]:
    """Blocks of columns, and the index of the first of each; nothing where none holds floats."""
    if isinstance(values, BlockTable):
        yield from values.survey()
    elif is_float(values):
        yield 0, values


class _Flagged:
    """Flagged entries of a table, block by block: how many there are, and the first one."""

    def __init__(self, features: Features) -> None:
        self.count = 0
        self._features = features
        self._first: list[int] = []

    def add(self, column: int, flags: Any) -> bool:
        """Whether any is flagged in a block, whose first column has this index."""
        if not flags.any():
            return False
        row, *columns = array_module(flags).argwhere(flags)[0].tolist()
        place = [row, *(column + k for k in columns)]
        self._first = min(self._first or place, place)
        self.count += int(flags.sum())
        return True

    def where(self) -> str:
        """The first flagged entry: "row 3, column 'age' (index 2) and 4 more"."""
        row, *columns = self._first
        place = ", ".join([f"row {row}", *(self._features.column(k) for k in columns)])
        return place + (f" and {self.count - 1} more" if self.count > 1 else "")

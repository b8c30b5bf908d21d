"""What the commands on tables share: their columns and options, pictures, missing values."""

import argparse
import csv
import difflib
import io
import math
import re
import shlex
import sys
from collections import Counter
from collections.abc import Callable
from fractions import Fraction
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from lcodec_ext._checks import counted, first_few
from lcodec_ext._files import write_atomically
from lcodec_ext.cli.console import (
    Console,
    InputError,
    add_common,
    add_threads,
    integer,
    number,
    output_file,
    seed,
    timed,
)

if TYPE_CHECKING:
    from lcodec_ext.cli.columns import Choose, Names, Table

TABLES = """\
tables:
  CSV, TSV     one line for each row, names of the columns in the first (or --no-header);
               other text with --delimiter; TSV has no quoting
  NPZ          every 1-d array is a column; a 2-d array X is the columns X0, X1, ...
  NPY          a 2-d array; its columns are named 0, 1, ...
  Parquet      needs pyarrow; the index of a pandas frame is no candidate
  -            standard input: CSV, or what its first bytes say
Files may be compressed: .gz, .bz2, .xz, .zst, .lz4. Only the columns that are used must hold
numbers. Empty cells, NA, NaN and null are missing; true and false are 1 and 0. Text in y makes it
classes without an order; encode other categories as numbers first. A name with blanks needs quotes:
--y "sepal length".
"""


def add_table(parser: argparse.ArgumentParser) -> None:
    """The table that a command reads."""
    parser.add_argument("table", help="CSV, TSV, NPZ, NPY or Parquet file, or - for stdin")


def add_response(parser: argparse.ArgumentParser) -> None:
    """The response."""
    parser.add_argument("--y", required=True, type=str.strip, metavar="COLUMN", help="the response")


def add_candidates(parser: argparse.ArgumentParser, columns: str, exclude: str) -> None:
    """Which columns of the table take part."""
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--columns", type=names, metavar="NAMES", help=columns)
    group.add_argument("--exclude", type=names, default=[], metavar="NAMES", help=exclude)
    parser.add_argument("--x", type=_elsewhere, help=argparse.SUPPRESS)  # as `codec` calls them
    parser.add_argument(
        "--numeric-only",
        action="store_true",
        help="leave out columns that are not numbers, and say which",
    )


def _elsewhere(_: str) -> None:
    raise argparse.ArgumentTypeError("--columns names the columns here")


def add_permutations(parser: argparse.ArgumentParser, needed: str) -> None:
    """How many permutations a test takes."""
    parser.add_argument(
        "--permutations",
        type=integer(1, 10**6),
        metavar="N",
        help=f"with {needed}: how many (default: 999)",
    )


def add_selection(parser: argparse.ArgumentParser) -> None:
    """How foci selects: its stopping rules and scales."""
    parser.add_argument(
        "--max-features", type=integer(1), metavar="N", help="select at most N columns"
    )
    parser.add_argument(
        "--min-gain",
        type=number(),
        default=0.0,
        metavar="T",
        help="a step must raise T by more than this (default: 0)",
    )
    parser.add_argument(
        "--standardize",
        choices=("scale", "bounded", "none"),
        default="scale",
        help="divide columns by their standard deviation, their range, or not (default: scale)",
    )


def add_level(parser: argparse.ArgumentParser) -> None:
    """A test as the rule for stopping."""
    parser.add_argument(
        "--alpha",
        type=share,
        metavar="A",
        help="stop where the best column has a p-value above A under permutation of y",
    )
    add_permutations(parser, "--alpha")


def check_level(options: argparse.Namespace) -> None:
    """Refuse rules for stopping that do not go together."""
    if options.min_gain > 0 and getattr(options, "no_stop", False):
        raise InputError(
            f"--min-gain {options.min_gain:g} goes without --no-stop: it is a rule for stopping"
        )
    if options.alpha is None:
        if options.permutations:
            raise InputError(f"--permutations {options.permutations} needs --alpha")
        return
    fewest = math.ceil(1 / Fraction(options.alpha)) - 1
    if (options.permutations or 999) < fewest:
        raise InputError(
            f"--alpha {options.alpha:g} needs --permutations {fewest} or more, as the smallest "
            f"p-value is 1 / (N + 1); got {options.permutations or 999}"
        )
    if (getattr(options, "n_neighbors", None) or 1) > 1:
        raise InputError(
            f"--n-neighbors {options.n_neighbors} goes without --alpha: the test takes one"
        )
    for name in ("no_stop", "noise"):
        if getattr(options, name, None) not in (None, False):
            option = name.replace("_", "-")
            raise InputError(f"--alpha {options.alpha:g} goes without --{option}")


def stop(options: argparse.Namespace) -> dict[str, Any]:
    """The options of `add_level` and --no-stop, as `foci` has them."""
    if options.alpha is None:
        return {"stop": not getattr(options, "no_stop", False)}
    given = {"stop": "permutation", "alpha": options.alpha}
    return given | ({"n_permutations": options.permutations} if options.permutations else {})


def selection(options: argparse.Namespace) -> dict[str, Any]:
    """The options of `add_selection`, as `foci` has them."""
    return {
        "max_features": options.max_features,
        "min_gain": options.min_gain,
        "standardize": None if options.standardize == "none" else options.standardize,
    }


def add_computation(
    parser: argparse.ArgumentParser,
    *,
    distances: bool = True,
    noise: bool = False,
    classes: bool = False,
) -> None:
    """Ties, missing values, threads, text files and output; the rest where it applies."""
    group = parser.add_argument_group("computation")
    group.add_argument(
        "--ties",
        choices=("average", "random", "first"),
        default="average",
        help=f"{'among equally near rows' if distances else 'where x is equal'}: their mean, one "
        "drawn at random, or the first (default: average)",
    )
    if distances:
        group.add_argument(
            "--decimals",
            type=integer(0, 15),
            metavar="N",
            help="how many decimals the columns have: ties then do not depend on their unit "
            "(default: distances are those of floats, where 0.3 - 0.2 and 0.2 - 0.1 differ)",
        )
    if noise:
        group.add_argument(
            "--n-neighbors",
            type=integer(1),
            metavar="N",
            help="how many of the nearest rows count: more find weak dependence, fewer see more "
            "detail (default: 1)",
        )
        group.add_argument(
            "--noise",
            type=number(),
            metavar="SD",
            help="L-CODEC and L-FOCI: add Gaussian noise of this standard deviation to every "
            "column first (the paper: 0 to 0.1)",
        )
        group.add_argument(
            "--noise-scale",
            choices=("absolute", "relative"),
            help="whether SD is in the units of each column, or a share of its standard deviation "
            "(default: absolute)",
        )
    group.add_argument(
        "--seed",
        type=seed,
        default=0,
        metavar="N",
        help="of everything that is drawn at random (default: 0)",
    )
    if classes:
        group.add_argument(
            "--classes",
            action="store_true",
            help="y holds classes without an order, as text always does, also where it holds "
            "numbers",
        )
    group.add_argument(
        "--nan-policy",
        choices=("raise", "omit"),
        default="raise",
        help="rows with missing values: an error, or left out (default: raise)",
    )
    add_threads(group)
    _add_text(parser.add_argument_group("CSV and TSV"))
    add_common(parser)


def _add_text(group: Any) -> None:
    group.add_argument(
        "--no-header", action="store_true", help="no names in the first line: columns are 0, 1, ..."
    )
    group.add_argument(
        "--delimiter",
        type=_delimiter,
        metavar="CHARACTER",
        help="between cells, or the words tab, or space for any number of blanks (default: by the "
        "file's suffix)",
    )
    group.add_argument(
        "--na",
        type=_markers,
        action="extend",
        default=[],
        metavar="MARKERS",
        help="more words for a missing value, separated by commas: --na ?,-999",
    )
    group.add_argument(
        "--decimal",
        type=_character,
        default=".",
        metavar="CHARACTER",
        help="the decimal point (default: .)",
    )
    group.add_argument(
        "--thousands",
        type=_character,
        metavar="CHARACTER",
        help="between groups of three digits (default: none)",
    )


def names(text: str) -> list[str]:
    """Names of columns, separated by commas; quoted as in CSV where they have commas."""
    found = [name.strip() for name in next(csv.reader([text], skipinitialspace=True), [])]
    if not found or not all(found):
        raise argparse.ArgumentTypeError(
            f"expected names of columns, separated by commas; got {text!r}"
        )
    name, count = Counter(found).most_common(1)[0]
    if count > 1:
        raise argparse.ArgumentTypeError(f"names column {name!r} twice; got {text!r}")
    return found


def share(text: str) -> float:
    """A number between 0 and 1, as an option's type."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"expected a number between 0 and 1; got {text!r}")
    return value


def _markers(text: str) -> list[str]:
    return [marker.strip() for marker in next(csv.reader([text], skipinitialspace=True), [])]


def _character(text: str) -> str:
    if len(text) != 1 or text.isalnum() or text in '"+-\r\n':
        raise argparse.ArgumentTypeError(f"expected one character, as , or .; got {text!r}")
    return text


def _delimiter(text: str) -> str:
    text = {"tab": "\t", "\\t": "\t", "space": " "}.get(text, text)
    if len(text) != 1 or text in '"\r\n':
        raise argparse.ArgumentTypeError(f"expected one character, tab or space; got {text!r}")
    return text


# ---------------------------------------------------------------------------------------------
# Checks and settings


def check(options: argparse.Namespace) -> None:
    """Refuse options that do not go together, and set the threads."""
    without_noise = getattr(options, "noise", None) is None
    if without_noise and getattr(options, "noise_scale", None):
        raise InputError(f"--noise-scale {options.noise_scale} needs --noise SD")
    if not without_noise and options.decimals is not None:
        raise InputError("--decimals goes without --noise, which leaves no ties")
    if not without_noise and options.n_neighbors is not None:
        raise InputError("--n-neighbors goes without --noise: L-CODEC and L-FOCI take one")
    if options.threads:
        from lcodec_ext import set_num_threads

        set_num_threads(options.threads)


def settings(options: argparse.Namespace) -> dict[str, Any]:
    """Ties, seed and missing values, as functions have them."""
    return {"ties": options.ties, "seed": options.seed, "nan_policy": options.nan_policy}


def neighbors(options: argparse.Namespace) -> dict[str, Any]:
    """--decimals and --n-neighbors, if they are given."""
    given = {name: getattr(options, name, None) for name in ("decimals", "n_neighbors")}
    return {name: value for name, value in given.items() if value is not None}


def noise(options: argparse.Namespace) -> dict[str, Any]:
    """--noise and --noise-scale, if they are given."""
    if options.noise is None:
        return {}
    return {"noise": options.noise, "noise_scale": options.noise_scale or "absolute"}


# ---------------------------------------------------------------------------------------------
# Pictures


def add_plot(parser: argparse.ArgumentParser, what: str) -> None:
    """Where a picture goes."""
    parser.add_argument(
        "--plot",
        type=output_file(".png", ".svg", ".pdf"),
        metavar="FILE",
        help=f"draw {what}, to a .png, .svg or .pdf file",
    )


def check_plot(options: argparse.Namespace, *needed: str) -> None:
    """Refuse --plot before anything is computed, where a library is missing."""
    for name in ("matplotlib", *needed):
        if options.plot and find_spec(name) is None:
            raise InputError(f"--plot needs {name}: pip install 'lcodec_ext[plot]'")


def write_plot(
    draw: Callable[[], Any], options: argparse.Namespace, console: Console
) -> dict[str, Any]:
    """Draw a result where --plot says so; what the record says of it."""
    if not options.plot:
        return {}
    import matplotlib

    if "matplotlib.pyplot" not in sys.modules:
        matplotlib.use("Agg")  # a command opens no window
    from matplotlib import pyplot

    figure = draw().figure
    buffer = io.BytesIO()
    figure.savefig(buffer, format=options.plot.suffix.lower()[1:], dpi=150)
    pyplot.close(figure)
    write_atomically(options.plot, buffer.getvalue())
    console.note(f"wrote {options.plot}")
    return {"plot": str(options.plot)}


# ---------------------------------------------------------------------------------------------
# Tables


class Omitted:
    """Rows of a table that are left out, because a value is missing."""

    def __init__(self, table: "Table") -> None:
        self.n, (self.rows, self.missing) = len(table), table.missing()

    def record(self) -> dict[str, Any]:
        """For JSON."""
        return {"n_omitted": self.rows, "missing": self.missing}

    def where(self) -> str:
        """Columns with missing values, those with most first."""
        most = sorted(self.missing.items(), key=lambda item: -item[1])
        return first_few([f"{name} ({count:,})" for name, count in most], 5)

    def __str__(self) -> str:
        if not self.rows:
            return ""
        return f"{self.rows:,} of {self.n:,} left out: missing in {self.where()}"


def load(
    options: argparse.Namespace,
    console: Console,
    seconds: dict[str, float],
    choose: "Choose",
    *,
    labels: bool = True,
) -> "Table":
    """The chosen columns; missing values only where they may be left out, text in y with labels."""
    from lcodec_ext.cli.tables import (
        UnusableColumnsError,
        is_missing,
        label_of,
        listed,
        read_table,
    )

    if options.thousands == options.decimal:
        raise InputError(
            f"--thousands {options.thousands} needs another decimal point: pass --decimal, too"
        )
    y, given = getattr(options, "y", None), getattr(options, "preselected", [])
    only = None
    if getattr(options, "numeric_only", False):
        only = [*([y] if y else []), *given]
    try:
        with timed(seconds, "read"):
            table = read_table(
                options.table,
                choose,
                header=not options.no_header,
                delimiter=options.delimiter,
                na_values=options.na,
                decimal=options.decimal,
                thousands=options.thousands,
                numeric_only=only,
                response=y if labels else None,
            )
    except UnusableColumnsError as error:
        raise InputError(f"{error}{_without(options, list(error.problems))}") from None
    if seconds["read"] > 1 and len(table) > 100_000:
        console.note(f"read {len(table):,} rows in {seconds['read']:.1f} s")
    if table.left_out:
        columns = counted(len(table.left_out), "column")
        console.note(f"--numeric-only leaves out {columns}: {listed(table.left_out)}")
    if options.nan_policy == "raise" and (place := table.first(is_missing)):
        omitted = Omitted(table)
        raise InputError(
            f"{label_of(options.table)}, {place}: a missing value; pass --nan-policy omit to leave "
            f"out rows with missing values, {omitted.rows:,} of {omitted.n:,}: missing in "
            f"{omitted.where()}"
        )
    if place := table.first(_is_infinite):
        raise InputError(
            f"{label_of(options.table)}, {place}: an infinite value; expected finite numbers"
        )
    return table


def _is_infinite(values: NDArray) -> NDArray[np.bool_]:
    return np.isinf(values) if values.dtype.kind == "f" else np.zeros(len(values), dtype=bool)


def response(
    table: "Table", options: argparse.Namespace, console: Console
) -> tuple[NDArray, list[str] | None]:
    """y, and the labels where it holds classes; these are told."""
    from lcodec_ext.cli.tables import is_missing

    y = table[options.y]
    if options.classes and y.dtype.kind != "O":
        whole = [int(v) if v == v and v == int(v) else v for v in y.tolist()]
        missing = is_missing(y)
        y = np.array([None if m else str(v) for m, v in zip(missing, whole, strict=True)], object)
    if y.dtype.kind != "O":
        return y, None
    labels = sorted({label for label in y if label is not None})
    classes = counted(len(labels), "class", "classes")
    console.note(f"{options.y} holds {classes} without an order: {first_few(labels, 5)}")
    return y, labels


def _without(options: argparse.Namespace, columns: list[str]) -> str:
    """How a command goes on without columns that cannot be used, if it can."""
    given = {getattr(options, "y", None), *getattr(options, "preselected", [])}
    if not hasattr(options, "exclude") or given & set(columns):
        return ""
    if options.columns:
        return "; or pass --numeric-only, or shorten --columns"
    text = io.StringIO()
    csv.writer(text, lineterminator="").writerow([*options.exclude, *columns])
    them = "it" if len(columns) == 1 else "them"
    return f"; or leave {them} out: --numeric-only, or --exclude {shlex.quote(text.getvalue())}"


def find(wanted: dict[str, list[str]], names: "Names") -> list[str]:
    """The wanted columns, if the table has them."""
    from lcodec_ext.cli.columns import headless

    known = set(names)
    for option, columns in wanted.items():
        for name in columns:
            if name not in known:
                near = difflib.get_close_matches(name, names, n=3, cutoff=0.6)
                shown = ", ".join(map(repr, near or names[:10]))
                more = f", ... ({len(names)} in all)" if not near and len(names) > 10 else ""
                which = "the nearest names are" if near else "its columns are"
                raise InputError(
                    f"{option} names column {name!r}, and the table has no such column; "
                    f"{which} {shown}{more}{headless(names)}"
                )
    return [name for columns in wanted.values() for name in columns]


def check_candidates(options: argparse.Namespace) -> None:
    """Refuse columns that are named in two roles."""
    y, preselected = getattr(options, "y", None), getattr(options, "preselected", [])
    for option in ("columns", "exclude", "preselected"):
        if y is not None and y in (getattr(options, option, None) or []):
            raise InputError(f"--{option} names {y!r}, which is the response")
    for name in preselected:
        if name in options.exclude:
            raise InputError(f"--preselected and --exclude both name column {name!r}")


def candidates(options: argparse.Namespace, names: "Names", console: Console) -> list[str]:
    """y, where there is one, and candidates in the order of the table or of --columns."""
    preselected = getattr(options, "preselected", [])
    given = {
        "--y": [options.y] if getattr(options, "y", None) else [],
        "--columns": options.columns or [],
        "--exclude": options.exclude,
        "--preselected": preselected,
    }
    find(given, names)
    y = given["--y"]
    if options.columns:
        extra = [name for name in preselected if name not in options.columns]
        return [*y, *options.columns, *extra]
    apart = {*y, *options.exclude, *names.pandas_index.difference(preselected)}
    chosen = [name for name in names if name not in apart]
    if not chosen:
        only = f"--y {y[0]} and the columns of --exclude" if y else "the columns of --exclude"
        raise InputError(f"no candidate is left: the table has only {only}")
    index = sorted(names.pandas_index.difference(y, options.exclude, preselected))
    if index:
        console.note(
            f"not a candidate: {', '.join(map(repr, index))}, the index of the pandas frame; "
            "--columns can name it"
        )
    numbers = [
        name
        for k, name in enumerate(names)
        if name == f"column {k}" or re.fullmatch(r"Unnamed: \d+|__index_level_\d+__", name)
    ]
    if unnamed := sorted(set(numbers).intersection(chosen), key=numbers.index):
        console.warn(
            f"{unnamed[0]} has no name in the header (row numbers, as pandas writes them?) and is "
            f"a candidate; --exclude '{unnamed[0]}' leaves it out"
        )
    return [*y, *chosen]

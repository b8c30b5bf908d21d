"""``lcodec-ext codec`` and ``lcodec-ext foci``: tables in, dependence out."""

import argparse
import csv
import difflib
import io
import re
import shlex
from collections import Counter
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from lcodec_ext._checks import counted, first_few
from lcodec_ext._files import write_atomically
from lcodec_ext.cli.console import (
    OK,
    Console,
    InputError,
    add_common,
    add_threads,
    dump,
    integer,
    number,
    output_file,
    seed,
    timed,
)

if TYPE_CHECKING:
    from lcodec_ext.cli.columns import Choose, Names, Table
    from lcodec_ext.dependence.foci import FociResult

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

CODEC = """\
The conditional dependence coefficient T(Y, Z) or T(Y, Z | X) of columns of a table.

In the limit of many rows T is 0 if y is independent of z (given x), and 1 if y is a function of z
(given x). On a finite sample it scatters around that, also below 0. Only the order of y counts.
z and x are compared by Euclidean distance, so give their columns comparable units.
"""

CODEC_EXAMPLES = """\
examples:
  lcodec-ext codec table.csv --y target --z age,income
  lcodec-ext codec table.csv --y target --z age --x income,region    # what age adds to those
  lcodec-ext codec table.csv.gz --y target --z age --nan-policy omit --na ?
"""

FOCI = """\
Select the columns on which a column y depends: FOCI, forward selection by T(Y, X).

It needs no model and no tuning. Each step adds the column that raises T(y, selected) most. The
selection stops when no column raises it. T is the T(y, selected) reached: in the limit of many
rows it is 0 for independence, and 1 where y is a function of the columns. conditional T is what
the column tells given those before it.
Stopping is not a test: where y depends on nothing, FOCI still selects a column or a few, with a
small T. Shuffle y to see how large T gets by chance; --min-gain asks for more.
"""

FOCI_EXAMPLES = """\
examples:
  lcodec-ext foci table.csv --y target
  lcodec-ext foci table.csv --y target --exclude id,date --max-features 10 --output chosen.csv
  lcodec-ext foci table.csv --y target --numeric-only    # without the columns of text
  lcodec-ext foci data.npz --y y --json | python -m json.tool
  lcodec-ext foci table.csv --y target --preselected age    # what helps beyond age?
"""


def add_codec(commands: Any) -> None:
    """Add ``codec``."""
    parser = commands.add_parser(
        "codec",
        help="how strongly y depends on z, given x",
        description=CODEC,
        epilog=TABLES + "\n" + CODEC_EXAMPLES,
    )
    parser.add_argument("table", help="CSV, TSV, NPZ, NPY or Parquet file, or - for stdin")
    parser.add_argument("--y", required=True, type=str.strip, metavar="COLUMN", help="the response")
    parser.add_argument(
        "--z", required=True, type=names, metavar="COLUMNS", help="names, separated by commas"
    )
    parser.add_argument("--x", type=names, default=[], metavar="COLUMNS", help="to condition on")
    _add_dependence(parser)
    parser.set_defaults(run=run_codec)


def add_foci(commands: Any) -> None:
    """Add ``foci``."""
    parser = commands.add_parser(
        "foci",
        help="which columns y depends on",
        description=FOCI,
        epilog=TABLES + "\n" + FOCI_EXAMPLES,
    )
    parser.add_argument("table", help="CSV, TSV, NPZ, NPY or Parquet file, or - for stdin")
    parser.add_argument("--y", required=True, type=str.strip, metavar="COLUMN", help="the response")
    candidates = parser.add_mutually_exclusive_group()
    candidates.add_argument(
        "--columns", type=names, metavar="NAMES", help="candidates (default: all but y)"
    )
    candidates.add_argument(
        "--exclude", type=names, default=[], metavar="NAMES", help="all but y and these"
    )
    parser.add_argument(
        "--numeric-only",
        action="store_true",
        help="leave out candidates that are not numbers, and say which",
    )
    parser.add_argument(
        "--preselected",
        type=names,
        default=[],
        metavar="NAMES",
        help="condition on these from the start; the result does not list them",
    )
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
        "--no-stop",
        action="store_true",
        help="go on to --max-features, or rank all columns, even where none raises T",
    )
    parser.add_argument(
        "--standardize",
        choices=("scale", "bounded", "none"),
        default="scale",
        help="divide columns by their standard deviation, their range, or not (default: scale)",
    )
    parser.add_argument(
        "--output",
        type=output_file(".csv", ".json"),
        metavar="FILE",
        help="write the selection to a .csv or .json file too",
    )
    _add_dependence(parser)
    parser.set_defaults(run=run_foci)


def _add_dependence(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("computation")
    group.add_argument(
        "--ties",
        choices=("average", "random", "first"),
        default="average",
        help="among equally near rows: their mean, one drawn at random, or the first "
        "(default: average)",
    )
    group.add_argument(
        "--decimals",
        type=integer(0, 15),
        metavar="N",
        help="how many decimals the columns have: ties then do not depend on their unit (default: "
        "distances are those of floats, where 0.3 - 0.2 and 0.2 - 0.1 differ)",
    )
    group.add_argument(
        "--noise",
        type=number(),
        metavar="SD",
        help="L-CODEC and L-FOCI: add Gaussian noise of this standard deviation to every column "
        "first (the paper: 0 to 0.1)",
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
        help="of --noise and --ties random (default: 0)",
    )
    group.add_argument(
        "--classes",
        action="store_true",
        help="y holds classes without an order, as text always does, also where it holds numbers",
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
# Commands


def run_codec(options: argparse.Namespace, console: Console) -> int:
    """T(y, z | x) of a table's columns."""
    from lcodec_ext import codec, lcodec

    _check(options)
    for name in options.z:
        if name == options.y or name in options.x:
            other = "--y" if name == options.y else "--x"
            raise InputError(f"--z and {other} both name column {name!r}; expected different ones")
    if options.y in options.x:
        raise InputError(f"--x and --y both name column {options.y!r}; expected different ones")
    seconds: dict[str, float] = {}
    wanted = {"--y": [options.y], "--z": options.z, "--x": options.x}
    table = _load(options, console, seconds, lambda known: _find(wanted, known))
    (y, labels), z = _response(table, options, console), table.select(options.z)
    x = table.select(options.x) if options.x else None
    settings: dict[str, Any] = {
        "ties": options.ties,
        "seed": options.seed,
        "nan_policy": options.nan_policy,
    }
    with timed(seconds, "compute"):
        if options.noise is None:
            value = codec(y, z, x, **settings, **_decimals(options))
        else:
            value = lcodec(y, z, x, **settings, **_noise(options))
    omitted = _Omitted(table)
    n = len(table) - omitted.rows
    result = {
        "table": options.table,
        "y": options.y,
        "z": options.z,
        "x": options.x,
        "T": value,
        "n_samples": n,
        **omitted.record(),
        "classes": labels,
        "options": settings | _decimals(options) | _noise(options),
        "seconds": seconds,
    }
    given = f" | {', '.join(options.x)}" if options.x else ""
    more = f"; {omitted}" if omitted.rows else ""
    what = f"T({options.y}, {', '.join(options.z)}{given})"
    console.emit(result, f"{what} = {value:.6g}   ({counted(n, 'row')}{more})")
    return OK


def run_foci(options: argparse.Namespace, console: Console) -> int:
    """Select the columns on which y depends."""
    from lcodec_ext import foci, lfoci

    _check(options)
    if options.min_gain > 0 and options.no_stop:
        raise InputError(
            f"--min-gain {options.min_gain:g} goes without --no-stop: it is a rule for stopping"
        )
    for option in ("columns", "exclude", "preselected"):
        if options.y in (getattr(options, option) or []):
            raise InputError(f"--{option} names {options.y!r}, which is the response")
    for name in options.preselected:
        if name in options.exclude:
            raise InputError(f"--preselected and --exclude both name column {name!r}")
    seconds: dict[str, float] = {}
    table = _load(options, console, seconds, lambda known: _candidates(options, known, console))
    if len(table.columns) == 1:
        raise InputError("no candidate is left: --numeric-only leaves them all out")
    (y, labels), X = _response(table, options, console), table.select(table.columns[1:])
    omitted, left_out = _Omitted(table), list(table.left_out)
    n = len(table) - omitted.rows
    del table
    settings = {
        "stop": not options.no_stop,
        "max_features": options.max_features,
        "min_gain": options.min_gain,
        "preselected": options.preselected or None,
        "standardize": None if options.standardize == "none" else options.standardize,
        "ties": options.ties,
        "seed": options.seed,
        "nan_policy": options.nan_policy,
    }
    with timed(seconds, "compute"):
        if options.noise is None:
            found = foci(X, y, progress=console.progress, **settings, **_decimals(options))
        else:
            found = lfoci(X, y, progress=console.progress, **settings, **_noise(options))
    result = {
        "table": options.table,
        "y": options.y,
        "selected": _steps(found),
        "stop_reason": found.stop_reason,
        "base_T": found.base,
        "n_samples": n,
        **omitted.record(),
        "classes": labels,
        "n_features": found.n_features,
        "left_out": left_out,
        "options": settings | _decimals(options) | _noise(options),
        "seconds": seconds,
    }
    if options.output:
        if options.output.suffix.lower() == ".csv":
            write_atomically(options.output, _as_csv(_steps(found)))
        else:
            write_atomically(options.output, dump(console.record(result)) + "\n")
        console.note(f"wrote {options.output}")
    console.emit(result, _describe(found, omitted, options))
    return OK


def _check(options: argparse.Namespace) -> None:
    if options.noise_scale and options.noise is None:
        raise InputError(f"--noise-scale {options.noise_scale} needs --noise SD")
    if options.decimals is not None and options.noise is not None:
        raise InputError("--decimals goes without --noise, which leaves no ties")
    if options.threads:
        from lcodec_ext import set_num_threads

        set_num_threads(options.threads)


def _decimals(options: argparse.Namespace) -> dict[str, Any]:
    return {} if options.decimals is None else {"decimals": options.decimals}


def _noise(options: argparse.Namespace) -> dict[str, Any]:
    if options.noise is None:
        return {}
    return {"noise": options.noise, "noise_scale": options.noise_scale or "absolute"}


class _Omitted:
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


def _load(
    options: argparse.Namespace,
    console: Console,
    seconds: dict[str, float],
    choose: "Choose",
) -> "Table":
    """The chosen columns; missing values only where they may be left out."""
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
    only = None
    if getattr(options, "numeric_only", False):
        only = [options.y, *options.preselected]
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
                response=options.y,
            )
    except UnusableColumnsError as error:
        raise InputError(f"{error}{_without(options, list(error.problems))}") from None
    if seconds["read"] > 1 and len(table) > 100_000:
        console.note(f"read {len(table):,} rows in {seconds['read']:.1f} s")
    if table.left_out:
        columns = counted(len(table.left_out), "column")
        console.note(f"--numeric-only leaves out {columns}: {listed(table.left_out)}")
    if options.nan_policy == "raise" and (place := table.first(is_missing)):
        omitted = _Omitted(table)
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


def _response(
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
    """How foci goes on without columns that cannot be used, if it can."""
    if options.command != "foci" or {options.y, *options.preselected} & set(columns):
        return ""
    if options.columns:
        return "; or pass --numeric-only, or shorten --columns"
    text = io.StringIO()
    csv.writer(text, lineterminator="").writerow([*options.exclude, *columns])
    them = "it" if len(columns) == 1 else "them"
    return f"; or leave {them} out: --numeric-only, or --exclude {shlex.quote(text.getvalue())}"


def _find(wanted: dict[str, list[str]], names: "Names") -> list[str]:
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


def _candidates(options: argparse.Namespace, names: "Names", console: Console) -> list[str]:
    """y, and candidates in the order of the table or of --columns."""
    given = {
        "--y": [options.y],
        "--columns": options.columns or [],
        "--exclude": options.exclude,
        "--preselected": options.preselected,
    }
    _find(given, names)
    if options.columns:
        extra = [name for name in options.preselected if name not in options.columns]
        return [options.y, *options.columns, *extra]
    apart = {options.y, *options.exclude, *names.pandas_index.difference(options.preselected)}
    chosen = [name for name in names if name not in apart]
    if not chosen:
        raise InputError(
            f"no candidate is left: the table has only --y {options.y} and the columns of --exclude"
        )
    index = sorted(
        names.pandas_index.difference(given["--y"], options.exclude, options.preselected)
    )
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
    return [options.y, *chosen]


# ---------------------------------------------------------------------------------------------
# Results


def _steps(found: "FociResult") -> list[dict[str, Any]]:
    return [
        {
            "rank": k + 1,
            "column": (found.names or [])[k],
            "T": float(found.cumulative[k]),
            "conditional_T": float(found.conditional[k]),
        }
        for k in range(len(found.ordering))
    ]


def _as_csv(steps: list[dict[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, ["rank", "column", "T", "conditional_T"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(steps)
    return text.getvalue()


def _describe(found: "FociResult", omitted: _Omitted, options: argparse.Namespace) -> str:
    reasons = {
        "no_gain": "no further column raises T",
        "min_gain": f"no further column raises T by more than {options.min_gain:g}",
        "not_significant": "the gain of the best remaining column is one that chance makes, too",
        "max_features": f"--max-features {options.max_features} is reached",
        "exhausted": "no column is left",
        "constant_y": f"{options.y} is constant",
    }
    n, p = found.n_samples, found.n_features - len(found.preselected)
    rows = counted(n, "row") + (f" ({omitted})" if omitted.rows else "")
    lines = [
        f"{len(found.ordering)} of {counted(p, 'column')} selected for {options.y} on {rows}; "
        f"{reasons[found.stop_reason]}"
    ]
    if found.preselected:
        lines.append(f"given {', '.join(options.preselected)}: T = {found.base:.4f}")
    if steps := _steps(found):
        width = max(6, *(len(step["column"]) for step in steps))
        lines.append(f"rank  {'column':<{width}}        T  conditional T")
        lines += [
            f"{s['rank']:4d}  {s['column']:<{width}}  {s['T']:7.4f}  {s['conditional_T']:13.4f}"
            for s in steps
        ]
    return "\n".join(lines)

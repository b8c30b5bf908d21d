"""``lcodec-ext codec``: how strongly y depends on z, given x, and whether chance does that."""

import argparse
from typing import TYPE_CHECKING, Any

import numpy as np

from lcodec_ext._checks import counted
from lcodec_ext.cli.console import OK, Console, InputError, integer, timed
from lcodec_ext.cli.dependence import (
    TABLES,
    Omitted,
    add_computation,
    add_permutations,
    add_plot,
    add_response,
    add_table,
    check,
    check_plot,
    find,
    load,
    names,
    neighbors,
    noise,
    response,
    settings,
    share,
    write_plot,
)

if TYPE_CHECKING:
    from lcodec_ext.dependence.significance import CodecTestResult

CODEC = """\
The conditional dependence coefficient T(Y, Z) or T(Y, Z | X) of columns of a table.

In the limit of many rows T is 0 if y is independent of z (given x), and 1 if y is a function of z
(given x). On a finite sample it scatters around that, also below 0. Only the order of y counts.
z and x are compared by Euclidean distance, so give their columns comparable units.

--test asks whether chance makes T as large. Without x it permutes y, which is exact. With x it
permutes z among rows whose x are near each other, which is approximate.
"""

CODEC_EXAMPLES = """\
examples:
  lcodec-ext codec table.csv --y target --z age,income
  lcodec-ext codec table.csv --y target --z age --x income,region    # what age adds to those
  lcodec-ext codec table.csv --y target --z age --x income --test --plot chance.png
  lcodec-ext codec table.csv.gz --y target --z age --nan-policy omit --na ?
"""


def add_codec(commands: Any) -> None:
    """Add ``codec``."""
    parser = commands.add_parser(
        "codec",
        help="how strongly y depends on z, given x",
        description=CODEC,
        epilog=TABLES + "\n" + CODEC_EXAMPLES,
    )
    add_table(parser)
    add_response(parser)
    parser.add_argument(
        "--z", required=True, type=names, metavar="COLUMNS", help="names, separated by commas"
    )
    parser.add_argument("--x", type=names, default=[], metavar="COLUMNS", help="to condition on")
    parser.add_argument(
        "--test", action="store_true", help="test whether y is independent of z (given x)"
    )
    add_permutations(parser, "--test")
    parser.add_argument(
        "--k-perm",
        type=integer(2),
        metavar="N",
        help="with --test and --x: rows that change places are in blocks of N and more rows with "
        "near x (default: 3)",
    )
    parser.add_argument(
        "--method",
        choices=("permutation", "local_permutation", "asymptotic"),
        help="with --test: of y, of z among rows with near x, or the limit of many rows without x "
        "(default: local_permutation with --x, otherwise permutation)",
    )
    parser.add_argument(
        "--confidence-level",
        type=share,
        metavar="C",
        help="with --test: of the interval for T, from subsamples (default: 0.95)",
    )
    add_plot(parser, "T and its values under permutation (needs --test)")
    add_computation(parser, noise=True, classes=True)
    parser.set_defaults(run=run_codec)


def run_codec(options: argparse.Namespace, console: Console) -> int:
    """T(y, z | x) of a table's columns."""
    from lcodec_ext import codec, codec_test, lcodec

    _check_roles(options)
    seconds: dict[str, float] = {}
    wanted = {"--y": [options.y], "--z": options.z, "--x": options.x}
    table = load(options, console, seconds, lambda known: find(wanted, known))
    (y, labels), z = response(table, options, console), table.select(options.z)
    x = table.select(options.x) if options.x else None
    if labels and options.method == "asymptotic":
        raise InputError(
            f"--method asymptotic takes numbers, and {options.y} holds classes: pass --method "
            "permutation"
        )
    given = settings(options)
    test: dict[str, Any] | None = None
    picture: dict[str, Any] = {}
    with timed(seconds, "compute"):
        if options.test:
            given |= _test_settings(options)
            found = codec_test(y, z, x, **given, **neighbors(options))
            value, test = found.statistic, _test_record(found)
            picture = write_plot(found.plot, options, console)
        elif options.noise is None:
            value = codec(y, z, x, **given, **neighbors(options))
        else:
            value = lcodec(y, z, x, **given, **noise(options))
    omitted = Omitted(table)
    n = len(table) - omitted.rows
    result = {
        "table": options.table,
        "y": options.y,
        "z": options.z,
        "x": options.x,
        "T": value,
        "test": test,
        "n_samples": n,
        **omitted.record(),
        "classes": labels,
        "options": given | neighbors(options) | noise(options),
        **picture,
        "seconds": seconds,
    }
    conditions = f" | {', '.join(options.x)}" if options.x else ""
    more = f"; {omitted}" if omitted.rows else ""
    what = f"T({options.y}, {', '.join(options.z)}{conditions})"
    text = f"{what} = {value:.6g}   ({counted(n, 'row')}{more})"
    console.emit(result, text if test is None else f"{text}\n{_test_text(test)}")
    return OK


def _check_roles(options: argparse.Namespace) -> None:
    """Refuse columns in two roles, and options that do not go together."""
    check(options)
    for name in options.z:
        if name == options.y or name in options.x:
            other = "--y" if name == options.y else "--x"
            raise InputError(f"--z and {other} both name column {name!r}; expected different ones")
    if options.y in options.x:
        raise InputError(f"--x and --y both name column {options.y!r}; expected different ones")
    if options.test and options.noise is not None:
        raise InputError("--test goes without --noise: it tests T of the data as they are")
    if options.test and options.n_neighbors:
        raise InputError("--test goes without --n-neighbors: it tests T of one neighbour")
    if options.k_perm and not (options.test and options.x):
        raise InputError(f"--k-perm {options.k_perm} needs --test and --x")
    if not options.test:
        for option in ("permutations", "method", "confidence_level", "plot"):
            if value := getattr(options, option):
                raise InputError(f"--{option.replace('_', '-')} {value} needs --test")
    if options.method == "asymptotic" and options.permutations:
        raise InputError(
            f"--permutations {options.permutations} goes without --method asymptotic: it draws none"
        )
    if options.method == "local_permutation" and not options.x:
        raise InputError("--method local_permutation needs --x: it permutes z where x is near")
    if options.method in ("permutation", "asymptotic") and options.x:
        raise InputError(
            f"--method {options.method} goes without --x: it tests whether y is independent of all "
            "other columns together; pass --method local_permutation, or leave out --x"
        )
    check_plot(options)


def _test_settings(options: argparse.Namespace) -> dict[str, Any]:
    given = {
        "method": options.method,
        "n_permutations": options.permutations,
        "k_perm": options.k_perm,
        "confidence_level": options.confidence_level,
    }
    return {name: value for name, value in given.items() if value is not None}


def _quantiles(found: "CodecTestResult") -> dict[str, float] | None:
    """Of T under permutations; None where the normal limit needs none."""
    if not found.n_permutations:
        return None
    shares = (0.05, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99)
    values = np.quantile(found.null_distribution, shares).tolist()
    return {f"{share:g}": value for share, value in zip(shares, values, strict=True)}


def _test_record(found: "CodecTestResult") -> dict[str, Any]:
    return {
        "pvalue": found.pvalue,
        "method": found.method,
        "n_permutations": found.n_permutations,
        "null_quantiles": _quantiles(found),
        "null_mean": found.null_mean,
        "null_sd": found.null_sd,
        "confidence_interval": found.confidence_interval,
        "confidence_level": found.confidence_level,
        "exchangeability_pvalue": found.exchangeability_pvalue,
        "seed": found.seed,
    }


def _test_text(test: dict[str, Any]) -> str:
    what = {
        "permutation": "permutations of y",
        "local_permutation": "permutations of z among rows with near x",
        "asymptotic": "all permutations of y",
    }[test["method"]]
    count = f"{test['n_permutations']:,} " if test["n_permutations"] else ""
    lines = [
        f"p-value {test['pvalue']:.4g} of independence; {count}{what} give T a mean of "
        f"{test['null_mean']:.4f} and a standard deviation of {test['null_sd']:.4f}"
    ]
    if test["exchangeability_pvalue"] is not None:
        lines.append(
            f"p-value {test['exchangeability_pvalue']:.4g} that z is exchangeable where x is near"
        )
    if test["confidence_interval"]:
        low, high = test["confidence_interval"]
        lines.append(f"{test['confidence_level']:g} interval: {low:.4f} to {high:.4f}")
    return "\n".join(lines)

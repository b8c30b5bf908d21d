"""``lcodec-ext xi``: whether y is a function of one column, and which pairs of columns depend."""

import argparse
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from lcodec_ext._checks import counted
from lcodec_ext.cli.console import OK, Console, InputError, integer, timed
from lcodec_ext.cli.dependence import (
    TABLES,
    Omitted,
    add_candidates,
    add_computation,
    add_plot,
    add_table,
    candidates,
    check,
    check_candidates,
    check_plot,
    load,
    settings,
    share,
    write_plot,
)

if TYPE_CHECKING:
    from lcodec_ext.cli.columns import Table

XI = """\
Chatterjee's xi: is y a function of one column x? In the limit of many rows it is 0 if y is
independent of x, and 1 if y is a function of x. It is not symmetric.

With --y it is that of y on every other column, the largest first. Without, it is that of every
column on every other one. p-values are those of independence; the adjusted ones (Benjamini and
Hochberg) hold for all of them together.
"""

XI_EXAMPLES = """\
examples:
  lcodec-ext xi table.csv --y target
  lcodec-ext xi table.csv --y target --confidence-level 0.95 --json
  lcodec-ext xi table.csv --exclude id --plot matrix.png    # all pairs
  lcodec-ext xi table.csv --y target --permutations 9999    # for few rows
"""

_SHOWN = 20  # pairs that are printed


def add_xi(commands: Any) -> None:
    """Add ``xi``."""
    parser = commands.add_parser(
        "xi",
        help="is y a function of one column; all pairs of columns",
        description=XI,
        epilog=TABLES + "\n" + XI_EXAMPLES,
    )
    add_table(parser)
    parser.add_argument("--y", type=str.strip, metavar="COLUMN", help="the response (default: all)")
    add_candidates(parser, "the columns (default: all)", "all but these")
    parser.add_argument(
        "--permutations",
        type=integer(1, 10**6),
        metavar="N",
        help="p-values from N permutations of y (default: from the normal limit)",
    )
    parser.add_argument(
        "--confidence-level",
        type=share,
        metavar="C",
        help="with --y: an interval for the xi of the population, from subsamples",
    )
    add_plot(parser, "bars, or a heat map of all pairs")
    add_computation(parser, distances=False)
    parser.set_defaults(run=run_xi)


def run_xi(options: argparse.Namespace, console: Console) -> int:
    """Xi of y on the columns of a table, or of all pairs of them."""
    check(options)
    check_candidates(options)
    check_plot(options)
    if options.confidence_level and not options.y:
        raise InputError(f"--confidence-level {options.confidence_level:g} needs --y")
    seconds: dict[str, float] = {}
    table = load(
        options,
        console,
        seconds,
        lambda known: candidates(options, known, console),
        labels=False,
    )
    if len(table.columns) < 2:
        raise InputError(
            f"xi needs two columns; got {', '.join(map(repr, table.columns)) or 'none'}"
        )
    given = settings(options)
    if options.permutations:
        given |= {"method": "permutation", "n_permutations": options.permutations}
    run = _one_response if options.y else _all_pairs
    found = run(table, options, console, given, seconds)
    omitted = Omitted(table)
    n = len(table) - omitted.rows
    result = {
        "table": options.table,
        "y": options.y,
        **found.record,
        "n_samples": n,
        **omitted.record(),
        "left_out": list(table.left_out),
        "options": given,
        "seconds": seconds,
    }
    rows = counted(n, "row") + (f" ({omitted})" if omitted.rows else "")
    console.emit(result, "\n".join([f"{found.title} on {rows}", *found.lines]))
    return OK


class _Found(NamedTuple):
    """What is recorded and printed."""

    record: dict[str, Any]
    title: str
    lines: list[str]


def _one_response(
    table: "Table",
    options: argparse.Namespace,
    console: Console,
    given: dict[str, Any],
    seconds: dict[str, float],
) -> _Found:
    """Xi of y on every other column, the largest first."""
    from lcodec_ext import xi_test
    from lcodec_ext.dependence.xi_matrix import adjusted_pvalues

    names = table.columns[1:]
    if options.confidence_level:
        given["confidence_level"] = options.confidence_level
    with timed(seconds, "compute"):
        test = xi_test(table.select(names), table[options.y], **given)
        values, pvalues, sds = (np.ravel(each) for each in test)
        adjusted = np.full(len(pvalues), np.nan)
        defined = np.isfinite(pvalues)
        adjusted[defined] = adjusted_pvalues(pvalues[defined])
    order = np.argsort(-values, kind="stable").tolist()
    steps = [
        {
            "column": names[k],
            "xi": float(values[k]),
            "pvalue": float(pvalues[k]),
            "adjusted": float(adjusted[k]),
            "sd": float(sds[k]),
        }
        for k in order
    ]
    if test.confidence_interval is not None:
        low, high = (np.ravel(end) for end in test.confidence_interval)
        for step, k in zip(steps, order, strict=True):
            step["confidence_interval"] = [float(low[k]), float(high[k])]

    def draw() -> Any:
        from lcodec_ext.dependence.plots import plot_bars

        ends = None
        if test.confidence_interval is not None:
            ends = np.array([np.ravel(end)[order] for end in test.confidence_interval])
        ax = plot_bars([names[k] for k in order], values[order], adjusted[order] <= 0.05, ends=ends)
        ax.set_xlabel(f"xi of {options.y} on each column; blue: adjusted p-value at most 0.05")
        ax.xaxis.label.set_parse_math(False)
        return ax

    picture = write_plot(draw, options, console)
    title = f"xi of {options.y} on {counted(len(steps), 'column')},"
    return _Found(
        {"columns": steps, "method": test.method, "seed": test.seed, **picture},
        title,
        _rows(steps, given),
    )


def _rows(steps: list[dict[str, Any]], given: dict[str, Any]) -> list[str]:
    width = max(6, *(len(step["column"]) for step in steps))
    level = given.get("confidence_level")
    head = f"{'column':<{width}}       xi   p-value  adjusted"
    lines = [head + (f"  {level:.4g} interval" if level else "")]
    for step in steps:
        line = (
            f"{step['column']:<{width}}  {step['xi']:7.4f}  {step['pvalue']:8.3g}  "
            f"{step['adjusted']:8.3g}"
        )
        if level:
            low, high = step["confidence_interval"]
            line += f"  {low:.4f} to {high:.4f}"
        lines.append(line)
    return lines


def _all_pairs(
    table: "Table",
    options: argparse.Namespace,
    console: Console,
    given: dict[str, Any],
    seconds: dict[str, float],
) -> _Found:
    """Xi of every column on every other one."""
    from lcodec_ext import xi_matrix

    with timed(seconds, "compute"):
        matrix = xi_matrix(table, **given)
    picture = write_plot(matrix.plot, options, console)
    p = len(table.columns)
    values = np.where(np.isfinite(matrix.pvalue), matrix.statistic, -np.inf)
    order = np.argsort(-values, axis=None, kind="stable")[: int(np.isfinite(matrix.pvalue).sum())]
    names = table.columns
    width = max(6, *map(len, names))
    lines = [f"{'y':<{width}}  {'x':<{width}}       xi   p-value  adjusted"]
    for k in order[:_SHOWN].tolist():
        i, j = divmod(k, p)
        lines.append(
            f"{names[j]:<{width}}  {names[i]:<{width}}  {matrix.statistic[i, j]:7.4f}  "
            f"{matrix.pvalue[i, j]:8.3g}  {matrix.adjusted[i, j]:8.3g}"
        )
    if len(order) > _SHOWN:
        lines.append(f"... and {len(order) - _SHOWN:,} more; --json has all")
    record = {
        "columns": names,
        "xi": matrix.statistic,
        "pvalue": matrix.pvalue,
        "adjusted": matrix.adjusted,
        "seed": matrix.seed,
        **picture,
    }
    return _Found(record, f"{len(order):,} pairs of {counted(p, 'column')},", lines)

"""``lcodec-ext foci``: which columns y depends on."""

import argparse
import csv
import io
from typing import TYPE_CHECKING, Any

from lcodec_ext._checks import counted
from lcodec_ext._files import write_atomically
from lcodec_ext.cli.console import OK, Console, InputError, dump, output_file, timed
from lcodec_ext.cli.dependence import (
    TABLES,
    Omitted,
    add_candidates,
    add_computation,
    add_level,
    add_plot,
    add_response,
    add_selection,
    add_table,
    candidates,
    check,
    check_candidates,
    check_level,
    check_plot,
    load,
    names,
    neighbors,
    noise,
    response,
    selection,
    settings,
    stop,
    write_plot,
)

if TYPE_CHECKING:
    from lcodec_ext.dependence.foci import FociResult

FOCI = """\
Select the columns on which a column y depends: FOCI, forward selection by T(Y, X).

It needs no model and no tuning. Each step adds the column that raises T(y, selected) most. The
selection stops when no column raises it. T is the T(y, selected) reached: in the limit of many
rows it is 0 for independence, and 1 where y is a function of the columns. conditional T is what
the column tells given those before it.
Stopping is not a test: where y depends on nothing, FOCI still selects a column or a few, with a
small T. --alpha makes it one: a step must then beat the best that permutations of y make of the
remaining columns. --min-gain asks for more without a test.
"""

FOCI_EXAMPLES = """\
examples:
  lcodec-ext foci table.csv --y target
  lcodec-ext foci table.csv --y target --exclude id,date --max-features 10 --output chosen.csv
  lcodec-ext foci table.csv --y target --alpha 0.05 --plot path.png
  lcodec-ext foci table.csv --y target --numeric-only    # without the columns of text
  lcodec-ext foci data.npz --y y --json | python -m json.tool
  lcodec-ext foci table.csv --y target --preselected age    # what helps beyond age?
"""


def add_foci(commands: Any) -> None:
    """Add ``foci``."""
    parser = commands.add_parser(
        "foci",
        help="which columns y depends on",
        description=FOCI,
        epilog=TABLES + "\n" + FOCI_EXAMPLES,
    )
    add_table(parser)
    add_response(parser)
    add_candidates(parser, "candidates (default: all but y)", "all but y and these")
    parser.add_argument(
        "--preselected",
        type=names,
        default=[],
        metavar="NAMES",
        help="condition on these from the start; the result does not list them",
    )
    add_selection(parser)
    add_level(parser)
    parser.add_argument(
        "--no-stop",
        action="store_true",
        help="go on to --max-features, or rank all columns, even where none raises T",
    )
    parser.add_argument(
        "--output",
        type=output_file(".csv", ".json"),
        metavar="FILE",
        help="write the selection to a .csv or .json file too",
    )
    add_plot(parser, "T after each step")
    add_computation(parser, noise=True, classes=True)
    parser.set_defaults(run=run_foci)


def run_foci(options: argparse.Namespace, console: Console) -> int:
    """Select the columns on which y depends."""
    from lcodec_ext import foci, lfoci

    check(options)
    check_candidates(options)
    check_level(options)
    check_plot(options)
    seconds: dict[str, float] = {}
    table = load(options, console, seconds, lambda known: candidates(options, known, console))
    if len(table.columns) == 1:
        raise InputError("no candidate is left: --numeric-only leaves them all out")
    (y, labels), X = response(table, options, console), table.select(table.columns[1:])
    omitted, left_out = Omitted(table), list(table.left_out)
    n = len(table) - omitted.rows
    del table
    given = {
        **stop(options),
        **selection(options),
        "preselected": options.preselected or None,
        **settings(options),
    }
    with timed(seconds, "compute"):
        if options.noise is None:
            found = foci(X, y, progress=console.progress, **given, **neighbors(options))
        else:
            found = lfoci(X, y, progress=console.progress, **given, **noise(options))
    result = {
        "table": options.table,
        "y": options.y,
        "selected": _steps(found),
        "stop_reason": found.stop_reason,
        "pvalues": found.pvalues,
        "threshold": found.threshold,
        "exchangeability_pvalues": found.exchangeability_pvalues,
        "not_taken": found.not_taken_name,
        "seed": found.seed,
        "base_T": found.base,
        "n_samples": n,
        **omitted.record(),
        "classes": labels,
        "n_features": found.n_features,
        "left_out": left_out,
        "options": given | neighbors(options) | noise(options),
        **write_plot(found.plot, options, console),
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


def _steps(found: "FociResult") -> list[dict[str, Any]]:
    pvalues = found.pvalues
    return [
        {
            "rank": k + 1,
            "column": (found.names or [])[k],
            "T": float(found.cumulative[k]),
            "conditional_T": float(found.conditional[k]),
            **({} if pvalues is None else {"pvalue": float(pvalues[k])}),
        }
        for k in range(len(found.ordering))
    ]


def _as_csv(steps: list[dict[str, Any]]) -> str:
    text = io.StringIO()
    fields = [*(steps[0] if steps else ("rank", "column", "T", "conditional_T"))]
    writer = csv.DictWriter(text, fields, lineterminator="\n")
    writer.writeheader()
    writer.writerows(steps)
    return text.getvalue()


def _chance(found: "FociResult", options: argparse.Namespace) -> str:
    if found.pvalues is None or not len(found.pvalues):
        return ""
    other = "other " if len(found.ordering) else ""
    return f"no {other}column does better than chance (--alpha {options.alpha:g})"


def _describe(found: "FociResult", omitted: Omitted, options: argparse.Namespace) -> str:
    reasons = {
        "no_gain": "no further column raises T",
        "min_gain": f"no further column raises T by more than {options.min_gain:g}",
        "not_significant": _chance(found, options),
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
        tested = "pvalue" in steps[0]
        lines.append(f"rank  {'column':<{width}}        T  conditional T" + "   p-value" * tested)
        lines += [
            f"{s['rank']:4d}  {s['column']:<{width}}  {s['T']:7.4f}  {s['conditional_T']:13.4f}"
            + (f"  {s['pvalue']:8.4g}" if tested else "")
            for s in steps
        ]
    if found.not_taken is not None and found.pvalues is not None:
        lines.append(
            f"the best of the others, {found.not_taken_name}, has p-value {found.pvalues[-1]:.4g}"
        )
    return "\n".join(lines)

"""``lcodec-ext graph``: which columns of a table depend on which others."""

import argparse
from typing import TYPE_CHECKING, Any

from lcodec_ext._checks import counted, first_few
from lcodec_ext.cli.console import OK, Console, InputError, timed
from lcodec_ext.cli.dependence import (
    TABLES,
    Omitted,
    add_candidates,
    add_computation,
    add_level,
    add_plot,
    add_selection,
    add_table,
    candidates,
    check,
    check_level,
    check_plot,
    load,
    neighbors,
    selection,
    settings,
    stop,
    write_plot,
)

if TYPE_CHECKING:
    from lcodec_ext.dependence.graph import DependenceGraph

GRAPH = """\
Which columns of a table depend on which others: FOCI with every column in turn as y.

A line for each column has the columns that were selected for it, in the order of selection, and the
conditional T of each: what it tells given those before it. The graph has directions: b may be
selected for a, and a not for b. --alpha tests every step of every column by permutations: of p
columns that depend on nothing, about A p then have a dependence.
"""

GRAPH_EXAMPLES = """\
examples:
  lcodec-ext graph table.csv
  lcodec-ext graph table.csv --exclude id --max-features 3 --plot graph.png
  lcodec-ext graph table.csv --alpha 0.01
  lcodec-ext graph table.csv --numeric-only --json
"""


def add_graph(commands: Any) -> None:
    """Add ``graph``."""
    parser = commands.add_parser(
        "graph",
        help="which columns depend on which others",
        description=GRAPH,
        epilog=TABLES + "\n" + GRAPH_EXAMPLES,
    )
    add_table(parser)
    add_candidates(parser, "the columns (default: all)", "all but these")
    add_selection(parser)
    add_level(parser)
    add_plot(parser, "the graph")
    add_computation(parser)
    parser.set_defaults(run=run_graph)


def run_graph(options: argparse.Namespace, console: Console) -> int:
    """The dependence graph of a table's columns."""
    from lcodec_ext import dependence_graph

    check(options)
    check_level(options)
    check_plot(options, "networkx")
    seconds: dict[str, float] = {}
    table = load(options, console, seconds, lambda known: candidates(options, known, console))
    if len(table.columns) < 2:
        raise InputError(
            f"a graph needs two columns; got {', '.join(map(repr, table.columns)) or 'none'}"
        )
    given = stop(options) | selection(options) | settings(options) | neighbors(options)
    with timed(seconds, "compute"):
        graph = dependence_graph(table, progress=console.progress, **given)
    omitted = Omitted(table)
    result = {
        "table": options.table,
        "columns": table.columns,
        "edges": _edges(graph),
        "seed": graph.seed,
        "n_samples": graph.results[0].n_samples,
        **omitted.record(),
        "left_out": list(table.left_out),
        "options": given,
        **write_plot(graph.plot, options, console),
        "seconds": seconds,
    }
    console.emit(result, _describe(graph, omitted))
    return OK


def _edges(graph: "DependenceGraph") -> list[dict[str, Any]]:
    """One for each selected column, by response and in the order of selection."""
    names = graph.names or []
    return [
        {
            "response": names[i],
            "column": names[int(j)],
            "rank": rank,
            "T": float(result.cumulative[rank - 1]),
            "conditional_T": float(result.conditional[rank - 1]),
            **({} if result.pvalues is None else {"pvalue": float(result.pvalues[rank - 1])}),
        }
        for i, result in enumerate(graph.results)
        for rank, j in enumerate(result.ordering, 1)
    ]


def _describe(graph: "DependenceGraph", omitted: Omitted) -> str:
    names, p = graph.names or [], len(graph.results)
    rows = counted(graph.results[0].n_samples, "row") + (f" ({omitted})" if omitted.rows else "")
    width = max(6, *map(len, names))
    lines = [
        f"{int(graph.adjacency.sum()):,} of {p * (p - 1):,} dependences between "
        f"{counted(p, 'column')} on {rows}",
        f"{'column':<{width}}  depends on (conditional T)",
    ]
    for name, result in zip(names, graph.results, strict=True):
        found = [
            f"{names[int(j)]} ({T:.4f})"
            for j, T in zip(result.ordering, result.conditional, strict=True)
        ]
        lines.append(f"{name:<{width}}  {first_few(found, 8) if found else '-'}")
    return "\n".join(lines)

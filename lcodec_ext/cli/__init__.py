"""The command line: ``lcodec-ext``, and ``python -m lcodec_ext``.

Commands import what they need when they run: PyTorch is loaded by those that use it.
"""

import argparse
import os
import sys
import warnings
from collections.abc import Sequence
from typing import Any

from lcodec_ext.cli import codec, evaluate, foci, graph, machine, report, unlearn, xi
from lcodec_ext.cli.console import (
    BAD_INPUT,
    FAILED,
    OK,
    PROGRAM,
    CommandParser,
    Console,
    Parser,
    one_line,
)

__all__ = ["main"]

DESCRIPTION = """\
Conditional dependence in tables, and deletion of training samples from PyTorch models.

Results go to stdout, as JSON with --json; progress, warnings and errors go to stderr.
Exit status: 0 done; 1 a check failed, or what was asked for could not be computed; 2 the
arguments or the data cannot be used.
"""

EXAMPLES = """\
examples:
  lcodec-ext info
  lcodec-ext codec table.csv --y target --z age --x income
  lcodec-ext foci table.csv --y target
  lcodec-ext COMMAND --help      what a command does, examples, what its output means
"""

_NOT_COMPUTED = {
    "IndefiniteCurvatureError",
    "LedgerError",
    "OutOfMemoryError",
    "PrivacyBudgetExceeded",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Parameters
    ----------
    arguments : sequence of str, optional
        Those of the process by default.

    Returns
    -------
    int
        The exit status: 0 done, 1 a check failed or the computation could not be carried out,
        2 arguments or data cannot be used.
    """
    try:
        options = _parser().parse_args(arguments)
    except SystemExit as stop:  # --help, --version and errors have said all
        return int(stop.code or OK)
    console = Console(options.command, as_json=options.json, quiet=options.quiet)
    try:
        with warnings.catch_warnings():
            warnings.resetwarnings()
            warnings.simplefilter("ignore")
            for category in (UserWarning, RuntimeWarning):
                warnings.simplefilter("always", category)
            warnings.showwarning = lambda message, *_, **__: console.warn(str(message))
            return options.run(options, console)
    except BrokenPipeError:  # the reader of stdout has left, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except KeyboardInterrupt:
        print(f"{PROGRAM} {options.command}: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if options.debug:
            raise
        status, text = _explain(error)
        print(f"{PROGRAM} {options.command}: error: {one_line(text)}", file=sys.stderr)
        return status


def _explain(error: Exception) -> tuple[int, str]:
    """Exit status and message for an error."""
    named = f"{type(error).__name__}: {error}"
    # by name: PyTorch is not loaded for this
    if {kind.__name__ for kind in type(error).__mro__} & _NOT_COMPUTED:
        return FAILED, str(error)
    if isinstance(error, MemoryError):
        return FAILED, f"not enough memory{f': {error}' if str(error) else ''}"
    if isinstance(error, ValueError | TypeError | OSError | ImportError):
        return BAD_INPUT, str(error) or named
    return FAILED, f"{named} (--debug shows where)"


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog=PROGRAM, description=DESCRIPTION, epilog=EXAMPLES)
    parser.add_argument("--version", action=_Version)
    commands = parser.add_subparsers(
        title="commands",
        metavar="COMMAND",
        dest="command",
        required=True,
        parser_class=CommandParser,
    )
    machine.add_info(commands)
    codec.add_codec(commands)
    foci.add_foci(commands)
    xi.add_xi(commands)
    graph.add_graph(commands)
    unlearn.add_unlearn(commands)
    evaluate.add_evaluate(commands)
    report.add_report(commands)
    machine.add_bench(commands)
    return parser


class _Version(argparse.Action):
    """Print the version and exit."""

    def __init__(self, **options: Any) -> None:
        super().__init__(nargs=0, help="print the version and exit", **options)

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        from lcodec_ext import __version__

        print(f"{PROGRAM} {__version__}")
        parser.exit()

"""``lcodec-ext report``: what was deleted, on what evidence."""

import argparse
import json
from pathlib import Path
from typing import Any

from lcodec_ext.cli.console import OK, Console, InputError, add_common
from lcodec_ext.cli.problem import need_torch

REPORT = """\
Write a report for those who asked for a deletion and those who check it: report.md, with
figures, and all numbers as JSON and CSV.

Give folders of unlearn --directory, files of evaluate --output, or both. Ledgers are verified.
If an evaluation has the model that a ledger ends with, for instance as --candidate, the report
shows how near to retraining it is. Several evaluations count as repetitions of one experiment
with different seeds, and their means are shown. Needs matplotlib.
"""

REPORT_EXAMPLES = """\
examples:
  lcodec-ext report run --output report
  lcodec-ext report run evaluation.json --output report
  lcodec-ext report seed0.json seed1.json seed2.json --output report
"""


def add_report(commands: Any) -> None:
    """Add ``report``."""
    parser = commands.add_parser(
        "report",
        help="a report on deletions, from ledgers and evaluations",
        description=REPORT,
        epilog=REPORT_EXAMPLES,
    )
    parser.add_argument(
        "sources",
        nargs="+",
        metavar="SOURCE",
        help="a folder of unlearn --directory, or a .json file of evaluate --output",
    )
    parser.add_argument(
        "--output", required=True, metavar="FOLDER", help="created if it does not exist"
    )
    add_common(parser)
    parser.set_defaults(run=run_report)


def run_report(options: argparse.Namespace, console: Console) -> int:
    """Write a report of ledgers and evaluations."""
    ledgers, evaluations = [], []
    for source in options.sources:
        path = Path(source)
        if path.is_dir():
            ledgers.append(path)
        elif path.is_file() and path.suffix.lower() == ".json":
            try:
                document = json.loads(path.read_text(encoding="utf-8"))
            except ValueError as error:
                raise InputError(f"{source} is not JSON: {error}") from None
            if not isinstance(document, dict) or "methods" not in document:
                raise InputError(
                    f"{source} is not an evaluation; expected a file that evaluate --output wrote"
                )
            evaluations.append(document)
        elif path.is_file() and path.suffix.lower() == ".jsonl":
            ledgers.append(path)
        else:
            what = "is neither a folder nor a .json file" if path.exists() else "does not exist"
            raise InputError(
                f"{source} {what}; expected a folder of unlearn --directory, or a file of "
                "evaluate --output"
            )
    need_torch()
    from lcodec_ext.evaluation import write_report

    report = write_report(options.output, evaluation=evaluations or None, ledger=ledgers or None)
    written = {
        "output": options.output,
        "files": [str(path) for path in report.files.values()],
        "summary": list(report.summary),
    }
    console.emit(written, str(report))
    return OK

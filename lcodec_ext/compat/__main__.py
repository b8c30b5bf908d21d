"""``python -m lcodec_ext.compat [options] SCRIPT [arguments]``: run a script under `install`."""

import argparse
import os
import runpy
import sys
from collections.abc import Sequence

from lcodec_ext.compat.installed import MODULES, install


def main(argv: Sequence[str] | None = None) -> None:
    """Run a script that imports the published modules; the files of these are hidden."""
    parser = argparse.ArgumentParser(
        prog="python -m lcodec_ext.compat",
        description="Run a script of the published code, unmodified, with this package instead.",
    )
    parser.add_argument(
        "--reference-bugs", action="store_true", help="do what the published code does"
    )
    parser.add_argument(
        "--approxType",
        choices=("FD", "Fisher", "GaussNewton"),
        help="instead of the script's, which has no GaussNewton",
    )
    parser.add_argument(
        "--keep",
        action="append",
        default=[],
        choices=MODULES,
        help="use the script's own module; once for each",
    )
    parser.add_argument("script", metavar="SCRIPT")
    arguments = parser.add_argument("arguments", nargs=argparse.REMAINDER, help="for the script")
    arguments.required = False
    options = parser.parse_args(argv)
    if options.reference_bugs and options.approxType:
        parser.error("--approxType is for the default mode")
    if options.script in MODULES and options.keep:
        parser.error(
            f"SCRIPT is {options.script!r}, the name of a module: write --keep before each of them"
        )
    if not os.path.isfile(options.script):
        parser.error(f"there is no script {options.script!r}")
    install(
        reference_bugs=options.reference_bugs,
        approxType=options.approxType,
        keep=options.keep,
        replace=True,
    )
    sys.argv = [options.script, *options.arguments]
    folder = os.path.dirname(os.path.abspath(options.script))
    sys.path[: 0 if sys.flags.safe_path else 1] = [folder]  # -P puts no folder first
    runpy.run_path(options.script, run_name="__main__")


if __name__ == "__main__":
    main()

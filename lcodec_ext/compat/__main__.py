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
        "--keep", action="append", default=[], choices=MODULES, help="use the script's own module"
    )
    parser.add_argument("script", metavar="SCRIPT")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="for the script")
    options = parser.parse_args(argv)
    if options.reference_bugs and options.approxType:
        parser.error("--approxType is for the default mode")
    if not os.path.isfile(options.script):
        parser.error(f"there is no script {options.script!r}")
    install(
        reference_bugs=options.reference_bugs,
        approxType=options.approxType,
        keep=options.keep,
        replace=True,
    )
    sys.argv = [options.script, *options.arguments]
    sys.path[0] = os.path.dirname(os.path.abspath(options.script))
    runpy.run_path(options.script, run_name="__main__")


if __name__ == "__main__":
    main()

"""What all commands share: options, output, warnings and errors."""

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

from lcodec_ext._files import json_ready

PROGRAM = "lcodec-ext"
OK, FAILED, BAD_INPUT = 0, 1, 2


class InputError(ValueError):
    """What the user gave cannot be used. The message says all there is to say."""


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line."""

    def __init__(self, **options: Any) -> None:
        options.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        """Say what is wrong and where help is, and exit with 2."""
        self.exit(BAD_INPUT, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


class CommandParser(Parser):
    """The parser of one command. It refuses unknown options itself and names its own help."""

    def parse_known_args(  # type: ignore[override]
        self, args: Any = None, namespace: Any = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """Parse, and refuse what is left over."""
        known, rest = super().parse_known_args(args, namespace)
        if rest:
            hint = "" if rest[0].startswith("-") else "; a name with blanks needs quotes"
            self.error(f"unrecognized arguments: {' '.join(rest)}{hint}")
        return known, rest


class Console:
    """Prints results on stdout, once, and everything else on stderr.

    Parameters
    ----------
    command : str
    as_json : bool
        Whether results are printed as JSON.
    quiet : bool
        Whether to leave out progress and notes. Warnings and errors stay.
    """

    def __init__(self, command: str, *, as_json: bool, quiet: bool) -> None:
        self.command, self.as_json, self.quiet = command, as_json, quiet
        self.warnings: list[str] = []

    @property
    def progress(self) -> bool:
        """Whether to show bars: only on a terminal, and only where tqdm is installed."""
        return not self.quiet and sys.stderr.isatty() and find_spec("tqdm") is not None

    def note(self, text: str) -> None:
        """Say what is going on."""
        if not self.quiet:
            print(text, file=sys.stderr, flush=True)

    def warn(self, text: str) -> None:
        """Say what may be wrong. The text goes into JSON results, too."""
        self.warnings.append(one_line(text))
        print(f"{PROGRAM} {self.command}: warning: {one_line(text)}", file=sys.stderr, flush=True)

    def record(self, result: dict[str, Any]) -> dict[str, Any]:
        """A result, and what every JSON document of the commands holds."""
        from lcodec_ext import __version__

        head = {"command": self.command, "lcodec_ext": __version__}
        return {**head, **result, "warnings": self.warnings}

    def emit(self, result: dict[str, Any], text: str) -> None:
        """Print a result: as JSON, or the text for people."""
        print(dump(self.record(result)) if self.as_json else text, flush=True)


def one_line(text: str) -> str:
    """A message without line breaks."""
    return " ".join(text.split())


def dump(document: Any) -> str:
    """A document as strict JSON, in which NaN and infinity become null."""
    return json.dumps(json_ready(document), indent=2, allow_nan=False)


@contextmanager
def timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    """Add the time a block takes to seconds[name]."""
    start = time.perf_counter()
    try:
        yield
    finally:
        seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - start


# ---------------------------------------------------------------------------------------------
# Options


def add_common(parser: argparse.ArgumentParser) -> None:
    """The options that every command has."""
    group = parser.add_argument_group("output")
    group.add_argument("--json", action="store_true", help="print the result as JSON")
    group.add_argument("--quiet", action="store_true", help="no progress and notes on stderr")
    group.add_argument("--debug", action="store_true", help="show the traceback of an error")


def add_threads(parser: Any) -> None:
    """How many threads the kernels use."""
    parser.add_argument(
        "--threads",
        type=integer(1, 1024),
        metavar="N",
        help="threads; results do not depend on it (default: LCODEC_NUM_THREADS, "
        "OMP_NUM_THREADS, or the CPUs that the process may use)",
    )


def integer(minimum: int, maximum: int | None = None) -> Callable[[str], int]:
    """An integer in a range, as an option's type."""
    expected = f"an integer from {minimum} to {maximum}"
    if maximum is None:
        expected = f"an integer >= {minimum}"

    def parse(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            number = minimum - 1
        if number < minimum or (maximum is not None and number > maximum):
            raise argparse.ArgumentTypeError(f"expected {expected}; got {text!r}")
        return number

    return parse


def number(minimum: float = 0.0) -> Callable[[str], float]:
    """A finite number of at least a minimum, as an option's type."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not math.isfinite(value) or value < minimum:
            raise argparse.ArgumentTypeError(f"expected a number >= {minimum:g}; got {text!r}")
        return value

    return parse


def seed(text: str) -> int:
    """A seed, as an option's type."""
    if not text.isdecimal() or int(text) >= 2**64:
        raise argparse.ArgumentTypeError(f"expected an integer in [0, 2**64); got {text!r}")
    return int(text)


def output_file(*suffixes: str) -> Callable[[str], Path]:
    """A file that can be written, as an option's type: a known suffix, an existing folder."""

    def parse(text: str) -> Path:
        path = Path(text)
        if path.suffix.lower() not in suffixes:
            expected = " or ".join(suffixes)
            raise argparse.ArgumentTypeError(f"expected a name ending in {expected}; got {text!r}")
        if path.is_dir():
            raise argparse.ArgumentTypeError(f"{text} is a folder; expected the name of a file")
        if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
            raise argparse.ArgumentTypeError(
                f"expected a file in a folder that can be written; got {text!r}"
            )
        return path

    return parse

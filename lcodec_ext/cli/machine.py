"""``lcodec-ext info`` and ``lcodec-ext bench``: this installation, on this machine."""

import argparse
from typing import Any

from lcodec_ext._files import write_atomically
from lcodec_ext.cli.console import (
    FAILED,
    OK,
    Console,
    InputError,
    add_common,
    add_threads,
    dump,
    integer,
    output_file,
)

INFO = """\
Shows what is installed and what this machine offers. Look at it first, and send it along, when
something is slow or missing.

"instruction sets" lists what the package was compiled for; it uses the last one that this CPU
runs. All of them, and all thread counts, give the same bits. "cuda" says why CUDA is used or not.
"""

INFO_EXAMPLES = """\
examples:
  lcodec-ext info
  lcodec-ext info --json | python -m json.tool
"""

BENCH = """\
Time a few calls of the package on data made for it, some seconds in all.

Times are medians over --repeats runs after one to warm up. Data and answers are the same bits on
every machine: a case whose answer differs is named, and the exit status is 1. The file of
--output holds machine, threads, versions and all samples, so that runs can be compared. Compare
runs with the same --threads, on machines that do nothing else.
"""

BENCH_EXAMPLES = """\
examples:
  lcodec-ext bench
  lcodec-ext bench --threads 1 --repeats 11 --output bench.json

The full benchmarks compare other implementations. They are in the source tree, not in the wheel:
  make bench ARGS=--quick        (docs/benchmarks.md describes them)
"""


def add_info(commands: Any) -> None:
    """Add ``info``."""
    parser = commands.add_parser(
        "info", help="what is installed, and on what", description=INFO, epilog=INFO_EXAMPLES
    )
    add_common(parser)
    parser.set_defaults(run=run_info)


def add_bench(commands: Any) -> None:
    """Add ``bench``."""
    parser = commands.add_parser(
        "bench",
        help="time a few calls on this machine",
        description=BENCH,
        epilog=BENCH_EXAMPLES,
    )
    parser.add_argument(
        "--cases", metavar="NAMES", help="names, separated by commas (default: all)"
    )
    parser.add_argument(
        "--repeats", type=integer(1), default=5, metavar="N", help="runs of each (default: 5)"
    )
    parser.add_argument(
        "--output", type=output_file(".json"), metavar="FILE", help="write a .json file too"
    )
    add_threads(parser)
    add_common(parser)
    parser.set_defaults(run=run_bench)


def run_info(options: argparse.Namespace, console: Console) -> int:
    """Versions, build, machine and settings."""
    from lcodec_ext import build_info, cuda_is_available, cuda_status, get_num_threads
    from lcodec_ext.cli import bench

    build, here, found = build_info(), bench.machine(), bench.versions()
    result = {
        "build": build,
        "machine": here,
        "threads": get_num_threads(),
        "cuda_available": cuda_is_available(),
        "cuda_status": cuda_status(),
        "versions": found,
    }
    packages = [f"{name} {version}" for name, version in found.items() if version]
    absent = [name for name, version in found.items() if not version]
    lines = {
        "lcodec_ext": f"{build['version']}, {build['compiler']}, {build['build_type']}"
        + (f", sanitizers {', '.join(build['sanitizers'])}" if build["sanitizers"] else ""),
        "machine": f"{here['cpu']}, {here['cores']} cores, {here['memory_gib']} GiB, {here['os']}",
        "threads": str(get_num_threads()),
        "instruction sets": f"{', '.join(build['simd_compiled'])}; used: {here['simd']}",
        "cuda": cuda_status(),
        "with": ", ".join(packages[1:]),
        "not installed": ", ".join(absent) or "none of the optional packages",
    }
    console.emit(result, "\n".join(f"{key:<17} {text}" for key, text in lines.items()))
    return OK


def run_bench(options: argparse.Namespace, console: Console) -> int:
    """Time the cases, and check their answers."""
    from lcodec_ext import get_num_threads, set_num_threads
    from lcodec_ext.cli import bench

    chosen = options.cases.split(",") if options.cases else list(bench.CASES)
    for name in chosen:
        if name not in bench.CASES:
            raise InputError(f"--cases names {name!r}; expected some of {', '.join(bench.CASES)}")
    if options.threads:
        set_num_threads(options.threads)
    cases: dict[str, Any] = {}
    left_out: dict[str, str] = {}
    for name in chosen:
        case = bench.CASES[name]
        if needed := bench.missing(case):
            left_out[name] = f"needs {needed}"
            continue
        console.note(f"{name} ...")
        cases[name] = bench.measure(case, options.repeats)
    here = bench.machine()
    result = {
        "machine": here,
        "versions": bench.versions(),
        "threads": get_num_threads(),
        "repeats": options.repeats,
        "cases": cases,
        "left_out": left_out,
    }
    wrong = [name for name, case in cases.items() if not case["right"]]
    for name in wrong:
        console.warn(f"the answer of {name} is not the one that every machine must give")
    if options.output:
        write_atomically(options.output, dump(console.record(result)) + "\n")
        console.note(f"wrote {options.output}")
    lines = [
        f"{1e3 * case['median_seconds']:9.1f} ms  {case['title']}"
        + ("" if case["right"] else ": WRONG ANSWER")
        for case in cases.values()
    ]
    lines += [f"     left out  {name}: {reason}" for name, reason in left_out.items()]
    lines.append(f"{get_num_threads()} threads, {here['simd']}, {here['cpu']}")
    console.emit(result, "\n".join(lines))
    return FAILED if wrong else OK

"""Build, test, check and time the package on a machine with an NVIDIA GPU; record it as JSON.

    python benchmarks/gpu.py [--budget 480] [--stages build,first,...] [--site FOLDER]
        [--output FILE] [--dry-run]

The script needs the CUDA toolkit, and in this Python's environment PyTorch, the packages of the
tests and the build tools. It needs no network. The package goes to build/gpu/site; nothing is
installed elsewhere. --site takes a folder that already has the built package, for this Python and
this GPU, and nothing is compiled. Every stage is a process with its own time limit and leaves its
output in build/gpu. The result file is written after each stage.

The first calls take seconds, and nothing else runs unless they give the CPU's bits. memcheck comes
next, since timings of kernels that write out of bounds mean nothing, then the tests, the other
checkers, and last the timings. The exit status is 1 if a stage that was asked for did not pass,
for any reason: a checker that is not installed has not passed. One that says that it does not
support the device is recorded as not available, which is no failure of the package.
"""

import argparse
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import environment
import results
import run

ROOT = environment.ROOT
WORK = ROOT / "build/gpu"
SITE = WORK / "site"
SANITIZERS = ("memcheck", "racecheck", "initcheck", "synccheck")
THREADS = 2  # of the CPU engine that is timed for comparison
TIMED = (
    "machine",
    "versions",
    "settings",
    "rates",
    "cases",
    "broken",
)  # the file of run.py has these as well, and better
GRACE = 5  # seconds from the request to stop to the end
DONE = "small calls gave the CPU's bits"  # what --sanitize-case says last
FIRST = "first calls gave the CPU's bits"  # what --first-calls says last
MOST_FAILURES = 25  # of tests, after which no further file is begun
SIDE_BY_SIDE = 4  # files of tests that share the GPU
NOT_SUPPORTED = "Device not supported"  # a checker's own words


@dataclass(frozen=True)
class Finished:
    """How a process ended: exit status (None if its time ran out) and output."""

    status: int | None
    text: str


@dataclass
class Verdict:
    """The outcome of a stage: passed, failed, timed out, not found, not available or not run."""

    status: str
    why: str = ""
    found: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Stage:
    """A process to run.

    Parameters
    ----------
    limit, least : float
        Seconds it may take, and seconds reserved for it while earlier stages run.
    judge : callable(finished)
        Reads what it printed or wrote. If the process failed or ran out of time, that is the
        outcome, whatever the judge finds.
    """

    name: str
    command: Sequence[str | Path]
    limit: float
    least: float
    judge: Callable[[Finished], Verdict]
    variables: Mapping[str, str] = field(default_factory=dict)
    missing: str = ""  # a program that was not found
    needed: bool = False  # whether nothing else can be run if it does not pass
    echo: bool = False  # whether to print what it printed


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--budget", type=float, default=480, help="seconds in all (default: 480)")
    parser.add_argument("--stages", help="names, separated by commas (default: all)")
    parser.add_argument(
        "--site", type=Path, help="a folder with the built package, instead of building it"
    )
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/gpu.json")
    parser.add_argument("--commit", help="the commit, if the sources are a copy without git")
    parser.add_argument(
        "--quick", action="store_true", help="time small sizes: does everything run?"
    )
    parser.add_argument("--dry-run", action="store_true", help="print what would run, and stop")
    for name, what in PARTS.items():
        parser.add_argument(f"--{name}", action="store_true", help=what)
    options = parser.parse_args(arguments)
    if options.first_calls:
        return first_calls()
    if options.sanitize_case:
        return sanitize_case()
    if options.test_files:
        return run_test_files(cuda_test_files())
    if options.site and not list(options.site.glob("lcodec_ext/_core*.so")):
        parser.error(f"--site {options.site} has no built package: no lcodec_ext/_core*.so in it")
    signal.signal(signal.SIGINT, signal.default_int_handler)  # or children could inherit "ignore"
    devices = environment.nvidia("name", "driver_version", "compute_cap")
    stages = plan(devices, options.quick, options.site)
    if len(devices) == 1:
        print("one GPU: the tests of process groups by NCCL, which need several, are left out")
    names = [stage.name for stage in stages]
    chosen = options.stages.split(",") if options.stages else names
    if unknown := [name for name in chosen if name not in names]:
        parser.error(f"no stage {', '.join(unknown)}; there are {', '.join(names)}")
    stages = [stage for stage in stages if stage.name in chosen]
    if options.dry_run:
        show_plan(stages, devices, options)
        return 0
    if not devices:
        print("nvidia-smi shows no GPU here; --dry-run prints what would run", file=sys.stderr)
        return 2
    return run_all(stages, options)


#: What a stage runs of this script.
PARTS = {
    "first-calls": "make the first calls, each compared with the CPU",
    "sanitize-case": "make the small calls that the sanitizers watch",
    "test-files": "run the CUDA tests, each file in a process of its own",
}


def plan(devices: list[list[str]], quick: bool, site: Path | None = None) -> list[Stage]:
    """All stages, in order."""
    python = [sys.executable]
    script = [*python, ROOT / "benchmarks/gpu.py"]
    timings = [*python, ROOT / "benchmarks/run.py", "--device", "cuda"]
    timings += ["--threads", str(THREADS)]
    timings += ["--budget", "5", "--output", WORK / "timings.json", *["--quick"] * quick]
    group = [*python, "-P", "-m", "pytest", "-p", "no:cacheprovider"]
    group += [f"--junitxml={WORK / 'nccl.xml'}", *group_test_files()]
    by_nccl = partial(judge_tests, reports=(WORK / "nccl.xml",))
    paths = [str(site.resolve() if site else SITE), os.environ.get("PYTHONPATH")]
    installed = {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    nccl = installed | {"LCODEC_TEST_BACKEND": "nccl"}
    several = [Stage("nccl", group, 90, 30, by_nccl, nccl)]
    tested = installed | {"HYPOTHESIS_PROFILE": "short"}
    memcheck, *others = (sanitizer(tool, installed) for tool in SANITIZERS)
    build = Stage("build", build_command(devices), 200, 60, judge_build, {"LCODEC_CUDA": "ON"})
    return [
        *([] if site else [build]),
        Stage("first", [*script, "--first-calls"], 20, 20, judge_first, installed, needed=True),
        memcheck,
        Stage("tests", [*script, "--test-files"], 120, 40, judge_tests, tested),
        *others,
        *(several if len(devices) > 1 else []),
        Stage("timings", timings, 120, 40, judge_timings, installed, echo=True),
    ]


def build_command(devices: list[list[str]]) -> list[str | Path]:
    """Install the package for these devices into a folder."""
    # -P: import the built package, not the sources in this folder
    module = [sys.executable, "-P", "-m"]
    capabilities = sorted({device[2].replace(".", "") for device in devices})
    architectures = ";".join(f"{c}-real" for c in capabilities) or "native"
    build: list[str | Path] = [*module, "pip", "install", "-v", "--no-index"]
    build += ["--no-build-isolation"]
    build += ["--no-deps", "--target", SITE, "-C", f"build-dir={WORK / 'cmake'}"]
    defined = {
        "CMAKE_CUDA_ARCHITECTURES": architectures,
        "CMAKE_CUDA_FLAGS": "-Xptxas=-v",
        "LCODEC_EMULATE": "ON",  # tests of kernels import the emulator as well
        "LCODEC_INSTRUMENTS": "ON",  # the floors of timings come from counted scans
    }
    for name, value in defined.items():
        build += ["-C", f"cmake.define.{name}={value}"]
    return build


def cuda_test_files() -> list[Path]:
    """Return the files with CUDA tests; other files may import what this machine lacks."""
    files = sorted((ROOT / "tests").glob("test_*.py"))
    return [
        file.relative_to(ROOT)
        for file in files
        if file.name.startswith("test_cuda_") or re.search(r"\bmark\.cuda\b", file.read_text())
    ]


def group_test_files() -> list[Path]:
    """Return the files whose tests run functions in groups of processes."""
    files = sorted((ROOT / "tests").glob("test_*.py"))
    used = re.compile(r"^def test_\w+\(.*\b(ranks|processes)\b", re.MULTILINE)
    return [file.relative_to(ROOT) for file in files if used.search(file.read_text())]


def sanitizer(tool: str, variables: Mapping[str, str]) -> Stage:
    """A tool of compute-sanitizer over the small calls.

    Without torch's cache every tensor is an allocation of its own, so the tool watches its ends.
    Only the package's kernels are checked (kns: part of the name). initcheck has to check all
    kernels: otherwise it would report memory that other kernels wrote as unwritten.
    """
    program = find_sanitizer()
    command = [program or "compute-sanitizer", "--tool", tool, "--error-exitcode", "9"]
    command += ["--target-processes", "application-only", "--report-api-errors", "no"]
    if tool != "initcheck":
        command += ["--kernel-regex", "kns=lcodec"]
    command += [sys.executable, ROOT / "benchmarks/gpu.py", "--sanitize-case"]
    return Stage(
        tool,
        command,
        limit=45,
        least=10,
        judge=judge_sanitizer,
        variables={**variables, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        missing="" if program else "compute-sanitizer",
    )


def find_sanitizer() -> str | None:
    """Find compute-sanitizer on PATH, or in nvcc's folder."""
    nvcc = shutil.which("nvcc")
    beside = str(Path(nvcc).resolve().parent) if nvcc else None
    return shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=beside)


def show_plan(stages: list[Stage], devices: list[list[str]], options: argparse.Namespace) -> None:
    shown = "; ".join(" ".join(device) for device in devices) or "none found"
    print(f"device: {shown}")
    print(f"result: {options.output}")
    print(f"time: {options.budget:g} s in all")
    for stage in stages:
        print(f"\n{stage.name}: at most {stage.limit:g} s", end="")
        print(f"; {stage.missing} was not found here" if stage.missing else "")
        variables = [f"{key}={value}" for key, value in stage.variables.items()]
        line = shlex.join(map(str, [*variables, *stage.command]))
        print(" ", line.replace(f"{ROOT}/", ""))
        if stage.name == "tests":
            print("  each in a process of its own:", *cuda_test_files())


# --------------------------------------------------------------------------------------------
# Running stages


def run_all(stages: list[Stage], options: argparse.Namespace) -> int:
    """Run all stages in order within the budget; write the result file after each."""
    started = time.monotonic()
    if any(
        stage.name == "build" for stage in stages
    ):  # a fresh build, because the compiler reports only what it compiles
        shutil.rmtree(WORK, ignore_errors=True)
    WORK.mkdir(parents=True, exist_ok=True)
    result: dict[str, Any] = {
        "schema": results.SCHEMA,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        **environment.commit(),
        "machine": {},
        "versions": {},
        "settings": {"quick": options.quick, "threads": THREADS},
        "load_before": environment.load(),
        "checks": {},
        "cases": {},
    }
    if options.commit:
        result |= {"commit": options.commit, "dirty": None}
    for k, stage in enumerate(stages):
        left = options.budget - (time.monotonic() - started)
        limit = limit_of(stage, stages[k + 1 :], left)
        begun = time.monotonic()
        verdict = run_stage(stage, limit, broken=broken(result["checks"], stages))
        check = {"status": verdict.status, "seconds": round(time.monotonic() - begun, 1)}
        check |= {"limit": round(limit, 1)} | ({"why": verdict.why} if verdict.why else {})
        timed = verdict.found.pop("timed", {})
        result["checks"][stage.name] = check | verdict.found
        result |= {key: value for key, value in timed.items() if key in TIMED}
        run.save(result, options.output)
        print(f"{stage.name:10} {verdict.status:10} {check['seconds']:6.1f} s  {verdict.why}")
        sys.stdout.flush()
    print(f"\nwrote {options.output}")
    ended = {check["status"] for check in result["checks"].values()}
    return 0 if ended <= {"passed", "not available"} else 1


def limit_of(stage: Stage, later: Sequence[Stage], left: float) -> float:
    """Return the stage's limit, or the time left minus what later stages need, if less."""
    return max(0.0, min(stage.limit, left - sum(other.least for other in later)))


def broken(checks: dict[str, Any], stages: Sequence[Stage]) -> str:
    """Say so if the build left no package, or the first calls failed."""
    built = checks.get("build")
    if built is not None and not built.get("installed"):
        return "the package is missing, because the build failed"
    for stage in stages:
        if stage.needed and checks.get(stage.name, {"status": "passed"})["status"] != "passed":
            return f"the stage {stage.name!r} did not pass, and nothing can be said without it"
    return ""


def run_stage(stage: Stage, limit: float, broken: str = "") -> Verdict:
    if stage.missing:
        return Verdict("not found", f"{stage.missing} is not on this machine")
    if broken:
        return Verdict("not run", broken)
    if limit < stage.least:
        return Verdict("not run", f"{limit:.0f} s were left, and it needs {stage.least:g} s")
    variables = os.environ | stage.variables
    finished = run_process(stage.command, WORK / f"{stage.name}.log", limit, variables)
    verdict = stage.judge(finished)
    if finished.status is None:
        verdict.status = "timed out"
        verdict.why = "; ".join(filter(None, [f"stopped after {limit:.0f} s", verdict.why]))
    elif finished.status != 0 and verdict.status == "passed":
        verdict.status, verdict.why = "failed", f"exit status {finished.status}"
    if stage.echo:
        print(finished.text)
    elif verdict.status != "passed":
        print("\n".join(finished.text.splitlines()[-30:]), file=sys.stderr)
    return verdict


def run_process(
    command: Sequence[str | Path], log: Path, limit: float, variables: Mapping[str, str]
) -> Finished:
    """Run a process and all that it starts, for at most this many seconds."""
    with log.open("w") as output:
        process = subprocess.Popen(
            [str(word) for word in command],
            cwd=ROOT,
            env=dict(variables),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        status: int | None = None
        try:
            status = process.wait(limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGINT)  # pytest then writes what it has
            with suppress(subprocess.TimeoutExpired):
                process.wait(GRACE)
        finally:
            if status is None:
                with suppress(ProcessLookupError):  # whatever is left of its group
                    os.killpg(process.pid, signal.SIGKILL)
                with suppress(subprocess.TimeoutExpired):  # a driver can keep it
                    process.wait(GRACE)
    return Finished(status, log.read_text(errors="replace"))


# --------------------------------------------------------------------------------------------
# The build: registers and spills


def judge_build(finished: Finished) -> Verdict:
    """Check that the package is installed and its scoring kernels do not spill registers."""
    kernels = parse_ptxas(finished.text)
    installed = finished.status == 0
    found = {"installed": installed, "kernels": kernels}
    scans = [kernel for kernel in kernels if is_scan(kernel["name"])]
    spilling = [
        f"{kernel['name']} spills {spilled} bytes"
        for kernel in scans
        if (spilled := kernel["spill_store_bytes"] + kernel["spill_load_bytes"])
    ]
    if not installed:
        return Verdict("failed", "", found)
    if not scans:
        return Verdict("failed", "the compiler reported no kernel of this package's scans", found)
    if spilling:
        return Verdict("failed", "; ".join(spilling), found)
    most = max(kernel["registers"] or 0 for kernel in scans)
    return Verdict("passed", f"{len(kernels)} kernels; scans use up to {most} registers", found)


def parse_ptxas(text: str) -> list[dict[str, Any]]:
    """What `-Xptxas=-v` says of every kernel, once for each architecture."""
    kernels: dict[tuple[str, str], dict[str, Any]] = {}
    current: dict[str, Any] = {}
    about = ""  # "Function properties for": a kernel's, or those of a function that it calls
    for line in text.splitlines():
        if found := re.search(r"Compiling entry function '(\S+)' for '(\w+)'", line):
            about = found[1]
            current = kernels[found[1], found[2]] = {
                "name": found[1],
                "architecture": found[2],
                "registers": None,
                "stack_bytes": 0,
                "spill_store_bytes": 0,
                "spill_load_bytes": 0,
                "shared_bytes": 0,
            }
        elif found := re.search(r"Function properties for (\S+)", line):
            about = found[1]
        elif found := re.search(
            r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line
        ):
            if current and about == current["name"]:
                keys = ("stack_bytes", "spill_store_bytes", "spill_load_bytes")
                current |= dict(zip(keys, map(int, found.groups()), strict=True))
        elif current and (found := re.search(r"ptxas info\s*: Used (\d+) registers", line)):
            current["registers"] = int(found[1])
            if shared := re.search(r"(\d+) bytes smem", line):
                current["shared_bytes"] = int(shared[1])
    names = demangled([kernel["name"] for kernel in kernels.values()])
    for kernel, name in zip(kernels.values(), names, strict=True):
        kernel["name"] = short_name(name)
    return sorted(kernels.values(), key=lambda kernel: (kernel["name"], kernel["architecture"]))


def demangled(names: list[str]) -> list[str]:
    """Demangle by c++filt or CUDA's own tool; without either, return the names as they are."""
    program = shutil.which("c++filt") or shutil.which("cu++filt")
    if program is None or not names:
        return names
    done = subprocess.run(
        [program], input="\n".join(names), capture_output=True, text=True, check=True
    )
    return done.stdout.splitlines()


def short_name(name: str) -> str:
    """A demangled kernel without return type and arguments; of other libraries without <...>."""
    name = name.replace("(anonymous namespace)::", "")
    depth, end = 0, len(name)
    for k, letter in enumerate(name):
        depth += (letter in "<(") - (letter in ">)")
        if letter == "(" and depth == 1:
            end = k
            break
    name = name[:end].removeprefix("void ")
    return name if name.startswith("lcodec::") else name.partition("<")[0]


def is_scan(name: str) -> bool:
    """Whether it is a scan of this package; CUB has kernels with that name as well."""
    return name.startswith(("lcodec::", "_ZN6lcodec")) and "scan" in name.partition("<")[0]


# --------------------------------------------------------------------------------------------
# The first calls


def first_calls() -> int:
    """Make one call of each kind; each must give the CPU's bits."""
    import gpu_cases

    print(f"{gpu_cases.check_first_calls('cuda')} {FIRST}", flush=True)
    return 0


def judge_first(finished: Finished) -> Verdict:
    """Read which calls were made, and the status of CUDA that the package gave."""
    calls = re.findall(r"^(.*): same$", finished.text, re.MULTILINE)
    status = re.search(r"^status: (.*)$", finished.text, re.MULTILINE)
    found = {"calls": len(calls), "cuda": status[1] if status else None}
    if FIRST in finished.text:
        return Verdict("passed", f"{len(calls)} calls", found)
    last = f"the last call that was right: {calls[-1]}" if calls else "no call was right"
    return Verdict("failed", last, found)


# --------------------------------------------------------------------------------------------
# The tests


def run_test_files(files: Sequence[Path]) -> int:
    """Run files of tests side by side, each in a process: a broken context ends one of them.

    Warnings are no errors here, because this machine may have other versions than the package is
    developed with. After `MOST_FAILURES` no further file is begun.
    """
    for old in WORK.glob("tests-*.xml"):
        old.unlink()
    waiting, running, failures, worst = list(files), {}, 0, 0
    while running or (waiting and failures < MOST_FAILURES):
        while waiting and len(running) < SIDE_BY_SIDE and failures < MOST_FAILURES:
            file = waiting.pop(0)
            running[file] = subprocess.Popen(test_command(file, MOST_FAILURES - failures))
        time.sleep(0.1)
        for file in [file for file, process in running.items() if process.poll() is not None]:
            status = running.pop(file).returncode
            report = report_of(file)
            counts = parse_junit(report.read_text()) if report.exists() else None
            failures += 1 if counts is None else counts["failed"] + counts["errors"]
            print(f"{file}: exit status {status}, {counts or 'pytest wrote no report'}", flush=True)
            worst = max(worst, abs(status) if status != 5 else 0)  # 5: all deselected
    if waiting:
        print(f"not begun after {failures} failures: {', '.join(map(str, waiting))}")
    return worst


def report_of(file: Path) -> Path:
    """Where pytest writes its report of a file of tests."""
    return WORK / f"tests-{file.stem}.xml"


def test_command(file: Path, failures: int) -> list[str]:
    """Run one file of CUDA tests, up to so many failures."""
    command = [sys.executable, "-P", "-m", "pytest", "-m", "cuda", "-p", "no:cacheprovider"]
    command += ["--continue-on-collection-errors", f"--maxfail={failures}", "-W", "default"]
    return [*command, f"--junitxml={report_of(file)}", str(file)]


def judge_tests(finished: Finished, reports: Sequence[Path] | None = None) -> Verdict:
    """Add up the reports of pytest, by default one for each file of CUDA tests."""
    wanted = [report_of(file) for file in cuda_test_files()] if reports is None else reports
    total: dict[str, Any] = dict.fromkeys(("passed", "failed", "errors", "skipped"), 0)
    not_passed, without = [], []
    for report in wanted:
        try:
            counts = parse_junit(report.read_text())
        except (OSError, ET.ParseError):
            without.append(report.stem)
            continue
        finally:
            report.unlink(missing_ok=True)  # or a later run might read it
        not_passed += counts.pop("not_passed")
        total = {key: total[key] + counts[key] for key in total}
    found = total | {"not_passed": not_passed[:20], "without_report": without}
    if without:
        return Verdict("failed", f"pytest wrote no report: {', '.join(without)}", found)
    if total["failed"] or total["errors"]:
        return Verdict("failed", f"{total['failed']} failed, {total['errors']} errors", found)
    if not total["passed"]:
        return Verdict("failed", "no test ran", found)
    return Verdict("passed", f"{total['passed']} tests", found)


def parse_junit(text: str) -> dict[str, Any]:
    """Counts of pytest's report, and the first names of what did not pass."""
    counts: dict[str, Any] = dict.fromkeys(("passed", "failed", "errors", "skipped"), 0)
    names = []
    for case in ET.fromstring(text).iter("testcase"):
        tags = {child.tag for child in case}
        kinds = (("failed", "failure"), ("errors", "error"), ("skipped", "skipped"))
        kind = next((kind for kind, tag in kinds if tag in tags), "passed")
        counts[kind] += 1
        if kind != "passed":
            names.append(f"{case.get('classname')}::{case.get('name')}: {kind}")
    return counts | {"not_passed": names[:20]}


# --------------------------------------------------------------------------------------------
# The timings


def judge_timings(finished: Finished, path: Path = WORK / "timings.json") -> Verdict:
    """The cases that run.py finished. Its exit status tells of answers that had to agree."""
    try:
        timed = results.load(path)
    except OSError:
        return Verdict("failed", "no case was finished")
    finally:
        path.unlink(missing_ok=True)
    claims = [
        f"{claim['quantity']} {claim['value']:g}: {'met' if claim['met'] else 'MISSED'}"
        for case in timed["cases"].values()
        for point in case["points"]
        for claim in point.get("claims", ())
        if claim["met"] is not None
    ]
    wrong = run.disagreements(timed)
    why = "; ".join([*wrong, *claims])
    return Verdict("failed" if wrong else "passed", why, {"timed": timed})


# --------------------------------------------------------------------------------------------
# compute-sanitizer


def sanitize_case() -> int:
    """Make the calls that a sanitizer watches: few and small, each compared with the CPU."""
    import gpu_cases

    print(f"{gpu_cases.check_small_calls('cuda')} {DONE}", flush=True)
    return 0


def judge_sanitizer(finished: Finished) -> Verdict:
    """Read the findings, and check that all calls were made; otherwise no finding means nothing."""
    found = parse_sanitizer(finished.text)
    if NOT_SUPPORTED in found["trouble"]:
        return Verdict("not available", f"the tool says: {found['trouble']}", found)
    if found["findings"]:
        return Verdict("failed", f"{found['findings']} findings", found)
    if found["findings"] is None:
        return Verdict("failed", found["trouble"] or "the tool wrote no summary", found)
    if DONE not in finished.text:
        return Verdict("failed", "the calls did not finish", found)
    return Verdict("passed", "", found)


def parse_sanitizer(text: str) -> dict[str, Any]:
    """Counts of the tool's summary lines; `findings` is None without such a line.

    "places" are the first kernels that reports name, "trouble" is what the tool says of itself.
    """
    lines = [line[9:].strip() for line in text.splitlines() if line.startswith("=========")]
    summary = r"(?:ERROR SUMMARY: (?=\d+ error)|RACECHECK SUMMARY: (?=\d+ hazard))(\d+)"
    counts = [int(match[1]) for line in lines if (match := re.match(summary, line))]
    where = r"(?:^|access )at (?:0x[0-9a-f]+ in )?(.+?)(?:\+0x[0-9a-f]+.*)?$"
    places = [short_name(match[1]) for line in lines if (match := re.search(where, line))]
    own = r"Internal|Fatal|Error: (?!Race|Potential)|.*not supported"
    trouble = [line for line in lines if re.match(own, line)]
    return {
        "findings": sum(counts) if counts else None,
        "calls": len(re.findall(r"^.*: same$", text, re.MULTILINE)),
        "places": list(dict.fromkeys(places))[:10],
        "trouble": "; ".join(dict.fromkeys(trouble))[:400],
    }


if __name__ == "__main__":
    sys.exit(main())

"""Use wheels where only NumPy is installed, and record their sizes.

    python benchmarks/wheels.py WHEEL ... [--python PYTHON ...] [--output FILE]

A wheel is installed by the PYTHON of its kind, or by the one that runs the script. auditwheel names
the oldest Linux that it runs on, and gives it that name. tests/core_only.py must pass. What the
file has of other wheels stays. `make check-wheel` leaves a wheel with CUDA in build/wheel; others
are made by

    PYTHON -m pip wheel --no-deps -C cmake.define.LCODEC_CUDA=OFF SDIST
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import environment

ROOT = environment.ROOT
LIMIT = 30_000_000  # bytes: what a wheel with CUDA may take
ABOUT = """import json, platform, sys, sysconfig
free = bool(sysconfig.get_config_var('Py_GIL_DISABLED'))
abi = "cp" + sysconfig.get_config_var('py_version_nodot') + "t" * free
print(json.dumps([abi, platform.python_version(), free]))"""


def output(*command: str | Path, **options: Any) -> str:
    """What a command prints; an error if it fails."""
    done = subprocess.run(command, capture_output=True, text=True, check=False, **options)
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}")
    return done.stdout


def checked(wheel: Path, pythons: list[str], folder: Path) -> dict[str, Any]:
    """Sizes and platform of a wheel; an error if it does not work."""
    about = {python: json.loads(output(python, "-c", ABOUT)) for python in pythons}
    abi = wheel.name.split("-")[3]
    fitting = [python for python, (its, _, _) in about.items() if its == abi]
    if not fitting:
        raise SystemExit(f"{wheel.name} needs an interpreter of kind {abi}: pass it as --python")
    python, (_, version, free) = fitting[0], about[fitting[0]]
    audit = Path(sys.executable).parent / "auditwheel"
    repaired = folder / "repaired"
    path = {"PATH": f"{audit.parent}{os.pathsep}{os.environ['PATH']}"}
    output(audit, "repair", "--wheel-dir", repaired, wheel, env=os.environ | path)
    (named,) = repaired.glob("*.whl")
    output(python, "-m", "venv", folder / "venv")
    alone = folder / "venv/bin/python"
    output(alone, "-m", "pip", "install", "-q", "--only-binary", ":all:", named)
    printed = output(alone, "-P", ROOT / "tests/core_only.py", cwd=folder)
    with zipfile.ZipFile(named) as archive:
        unpacked = sum(entry.file_size for entry in archive.infolist())
    return {
        "platform": re.search(r"-(manylinux[^-]*)\.whl$", named.name).group(1),
        "bytes": named.stat().st_size,
        "bytes_unpacked": unpacked,
        "cuda": "'cuda': True" in printed,
        "free_threaded": free,
        "python": version,
        "numpy": output(alone, "-c", "import numpy; print(numpy.__version__)").strip(),
        "core_only_passed": True,
    }


def table(wheels: dict[str, dict[str, Any]]) -> str:
    """The table of docs/benchmarks.md."""
    lines = ["| wheel | CPython | CUDA | size | unpacked |", "|---|---|---|--:|--:|"]
    for found in wheels.values():
        cells = (
            found["platform"],
            found["python"] + " free-threaded" * found["free_threaded"],
            "yes" if found["cuda"] else "no",
            f"{found['bytes'] / 1e6:.1f} MB",
            f"{found['bytes_unpacked'] / 1e6:.1f} MB",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("wheels", nargs="+", type=Path)
    parser.add_argument("--python", nargs="*", default=[])
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/output/wheels.json")
    options = parser.parse_args(arguments)
    old = json.loads(options.output.read_text()) if options.output.exists() else {"wheels": {}}
    result = old | {
        "schema": "wheels-1",
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        **environment.commit(),
    }
    with tempfile.TemporaryDirectory() as place:
        for k, wheel in enumerate(options.wheels):
            folder = Path(place) / str(k)
            folder.mkdir()
            found = checked(wheel.resolve(), [*options.python, sys.executable], folder)
            kind = f"{found['python']}{'t' * found['free_threaded']}{' with CUDA' * found['cuda']}"
            result["wheels"][kind] = found
    result["wheels"] = dict(sorted(result["wheels"].items()))
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(result, indent=1) + "\n")
    print(table(result["wheels"]))
    return 0 if all(found["bytes"] <= LIMIT for found in result["wheels"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())

"""Compare two result files: say what became slower and what became faster.

    python benchmarks/compare.py OLD NEW [--threshold 1.2] [--across-machines]

Only the package's own times can be regressions. The times of its peers show how far the two runs
can be compared at all. The exit status is 1 if there is a regression, 2 if the files cannot be
compared. The script needs the standard library only.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from results import OURS, load


class Change(NamedTuple):
    """One time in both files; `ratio` is new divided by old."""

    title: str
    size: dict[str, Any]
    name: str
    old: float
    new: float

    @property
    def ratio(self) -> float:
        return self.new / self.old


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument(
        "--threshold",
        type=float,
        default=1.2,
        help="ratio above which a time is a regression (default: 1.2)",
    )
    parser.add_argument(
        "--across-machines", action="store_true", help="compare results of different machines"
    )
    options = parser.parse_args(arguments)
    old, new = load(options.old), load(options.new)
    obstacles = differences(old, new)
    if options.across_machines:
        obstacles = [line for line in obstacles if not line.startswith("machine")]
    if obstacles:
        print("these results cannot be compared:", *obstacles, sep="\n  ", file=sys.stderr)
        return 2
    found = list(changes(old, new))
    regressions = [c for c in found if c.name == OURS and c.ratio > options.threshold]
    for change in found:
        mark = "  REGRESSION" if change in regressions else ""
        size = ", ".join(f"{key}={value}" for key, value in change.size.items())
        print(
            f"{change.ratio:6.2f}  {change.old:10.4g} s -> {change.new:10.4g} s  "
            f"{change.name:40} {change.title} ({size}){mark}"
        )
    print(f"{len(found)} times compared, {len(regressions)} slower by more than ", end="")
    print(f"{options.threshold:g}")
    return 1 if regressions else 0


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Return why two results cannot be compared, one line per reason."""
    lines = [
        f"machine: {key}: {old['machine'].get(key)} and {new['machine'].get(key)}"
        for key in sorted(old["machine"].keys() | new["machine"].keys())
        if old["machine"].get(key) != new["machine"].get(key)
    ]
    lines += [
        f"setting {key}: {old['settings'][key]} and {new['settings'][key]}"
        for key in ("quick", "threads")
        if old["settings"][key] != new["settings"][key]
    ]
    if not lines and not any(changes(old, new)):
        lines.append("they have no time in common")
    return lines


def changes(old: dict[str, Any], new: dict[str, Any]) -> Iterator[Change]:
    """Yield all times that are in both files."""
    for name, case in new["cases"].items():
        before = {
            json.dumps(point["size"], sort_keys=True): point["results"]
            for point in old["cases"].get(name, {"points": []})["points"]
        }
        for point in case["points"]:
            earlier = before.get(json.dumps(point["size"], sort_keys=True), {})
            for who, entry in point["results"].items():
                if who in earlier:
                    times = earlier[who]["seconds"], entry["seconds"]
                    yield Change(point["title"], point["size"], who, *times)


if __name__ == "__main__":
    sys.exit(main())

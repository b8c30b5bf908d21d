"""Write the README's table of speeds from a result file.

    python benchmarks/table.py benchmarks/results/cpu.json

It replaces what stands between two HTML comments. Nothing but the standard library is needed.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from results import OURS, load

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- benchmarks:begin -->", "<!-- benchmarks:end -->"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("result", type=Path)
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    options = parser.parse_args(arguments)
    text = options.readme.read_text()
    options.readme.write_text(replaced(text, table(load(options.result))))
    return 0


def replaced(text: str, content: str) -> str:
    """The text with new content between the two comments."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"the text must have the lines {BEGIN} and {END}")
    return f"{before}{BEGIN}\n{content}{END}{after}"


def table(result: dict[str, Any]) -> str:
    """A Markdown table of all cases that have peers, but the sweeps, and what it means."""
    if result["settings"]["quick"]:
        raise ValueError("a quick run's times mean nothing; the table needs a full one")
    lines = [
        "| task | lcodec_ext | beside it | time | ratio | its answer |",
        "|---|--:|---|--:|--:|---|",
    ]
    for case in result["cases"].values():
        if not case["sweep"]:
            for point in case["points"]:
                if len(point["results"]) > 1:
                    lines += rows(point)
    machine, settings = result["machine"], result["settings"]
    lines += [
        "",
        f"Medians of runs side by side with {settings['threads']} threads each on "
        f"{machine['cores']} cores ({machine['cpu']}, {machine['simd']}). "
        "Times with ~ are scaled linearly from fewer columns. The ratio is to lcodec_ext's time. "
        "An answer is the same if it has the same columns in the same order (of as many columns as "
        "were timed), the same coefficient to four digits, or neighbours as near.",
    ]
    return "\n".join(lines) + "\n"


def rows(point: dict[str, Any]) -> list[str]:
    """One line for each peer; task and own time stand in the first."""
    own = duration(point["results"][OURS]["seconds"])
    cells = [
        [
            name,
            ("~" if "factor" in entry else "") + duration(entry["seconds"]),
            multiple(entry["ratio"]),
            entry.get("answer", ""),
        ]
        for name, entry in point["results"].items()
        if name != OURS
    ]
    task = point["title"].replace("|", "\\|")
    heads = [[task, own]] + [["", ""]] * (len(cells) - 1)
    return [f"| {' | '.join(head + row)} |" for head, row in zip(heads, cells, strict=True)]


def duration(seconds: float) -> str:
    for unit, factor in (("s", 1.0), ("ms", 1e3), ("µs", 1e6)):
        if seconds * factor >= 1 or unit == "µs":
            return f"{significant(seconds * factor)} {unit}"
    raise AssertionError


def multiple(ratio: float) -> str:
    return f"{significant(ratio)}x"


def significant(value: float) -> str:
    """Two digits, or all before the point where there are more."""
    return f"{value:.0f}" if value >= 10 else f"{value:.1f}" if value >= 1 else f"{value:.2f}"


if __name__ == "__main__":
    sys.exit(main())

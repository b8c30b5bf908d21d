"""Write the tables of the README and of docs from result files.

    python benchmarks/table.py benchmarks/results/cpu.json benchmarks/results/curvature.json \
        benchmarks/results/deletion.json
    python benchmarks/table.py --unlearning benchmarks/results/unlearning.json

Each has its own table, since machines may differ. It replaces what stands between two HTML
comments. Nothing but the standard library is needed.
"""

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import unlearning
from results import OURS, load

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- benchmarks:begin -->", "<!-- benchmarks:end -->"
DELETION = "<!-- deletion:begin -->", "<!-- deletion:end -->"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("results", type=Path, nargs="*")
    parser.add_argument("--unlearning", type=Path, help="of benchmarks/unlearning.py")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs/benchmarks.md")
    options = parser.parse_args(arguments)
    if options.unlearning:
        text = unlearning.tables(json.loads(options.unlearning.read_text()))
        page = ROOT / "docs/unlearning.md"
        page.write_text(replaced(page.read_text(), text))
    results = [load(path) for path in options.results]
    if not results:
        return 0
    for path, made, marks in (
        (options.readme, tables, (BEGIN, END)),
        (options.docs, curvature_tables, (BEGIN, END)),
        (options.docs, deletion_tables, DELETION),
    ):
        path.write_text(replaced(path.read_text(), made(results), *marks))
    return 0


def tables(results: Iterable[dict[str, Any]]) -> str:
    return "\n".join(table(result) for result in results if "deletion" not in result)


def curvature_tables(results: Iterable[dict[str, Any]]) -> str:
    return "\n".join(filter(None, map(curvature_table, results)))


def deletion_tables(results: Iterable[dict[str, Any]]) -> str:
    return "\n".join(deletion_table(result) for result in results if "deletion" in result)


def replaced(text: str, content: str, first: str = BEGIN, last: str = END) -> str:
    """The text with new content between two comments."""
    before, begin, rest = text.partition(first)
    _, end, after = rest.partition(last)
    if not (begin and end):
        raise ValueError(f"the text must have the lines {first} and {last}")
    return f"{before}{first}\n{content}{last}{after}"


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
        "were timed), the same coefficient to four digits, neighbours as near, or a vector that is "
        "as near as float32 allows.",
    ]
    return "\n".join(lines) + "\n"


def curvature_table(result: dict[str, Any]) -> str:
    """Markdown tables of masked products beside full ones, and of solves; empty without them."""
    points = [point for case in result["cases"].values() for point in case["points"]]
    products = [
        "| product | coordinates | first | lcodec_ext | all parameters | ratio | Gflop | ratio |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
        *(product_row(point) for point in points if "flop_ratio" in point["metrics"]),
    ]
    solves = [
        "| solve | coordinates | time | peak memory | torch alone | the matrix |",
        "|---|--:|--:|--:|--:|--:|",
        *(solve_row(point) for point in points if "dense_matrix_gb" in point["metrics"]),
    ]
    blocks = [lines for lines in (products, solves) if len(lines) > 2]
    return "\n".join("\n".join(lines) + "\n" for lines in blocks)


def product_row(point: dict[str, Any]) -> str:
    """Times, then counted operations; ratios are of all parameters, by torch.func, to the own."""
    metrics = point["metrics"]
    full = point["results"]["torch.func, all parameters"]
    cells = [
        point["title"],
        f"{metrics['coordinates']:,}",
        duration(metrics["setup_seconds"]),
        duration(point["results"][OURS]["seconds"]),
        duration(full["seconds"]),
        multiple(full["ratio"]),
        f"{significant(metrics['gflop'])} of {significant(metrics['full_gflop'])}",
        multiple(metrics["flop_ratio"]),
    ]
    return f"| {' | '.join(cells)} |"


def solve_row(point: dict[str, Any]) -> str:
    metrics = point["metrics"]
    memory = ("peak_memory_gb", "torch_memory_gb", "dense_matrix_gb")
    cells = [
        point["title"],
        f"{metrics['coordinates']:,}",
        duration(point["results"][OURS]["seconds"]),
        *(f"{metrics[key]:.2f} GB" for key in memory),
    ]
    return f"| {' | '.join(cells)} |"


def deletion_table(result: dict[str, Any]) -> str:
    """Markdown tables of a deletion by phase, and of the single requests."""
    if result["settings"]["quick"]:
        raise ValueError("a quick run's times mean nothing; the table needs a full one")
    found = result["deletion"]
    ours, published = found["mean"]["lcodec_ext"], found["mean"]["published"]
    lines = [
        "| phase | lcodec_ext | share | published procedure | ratio |",
        "|---|--:|--:|--:|--:|",
    ]
    for phase, seconds in ours.items():
        scaled = phase in ("selection", "curvature", "solve", "total")
        cells = [
            phase,
            duration(seconds),
            f"{seconds / ours['total']:.1%}",
            "~" * scaled + duration(published[phase]),
            multiple(published[phase] / seconds) if seconds else "",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        "| units selected | parameters | one dense matrix | lcodec_ext | published | ratio |",
        "|--:|--:|--:|--:|--:|--:|",
    ]
    for request in found["requests"]:
        cells = [
            f"{request['units']}",
            f"{request['parameters']:,}",
            f"{request['matrix_gb']:.2f} GB",
            duration(request["lcodec_ext"]["total"]),
            "~" + duration(request["published"]["total"]),
            multiple(request["ratio"]),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    again, size, machine = found["from_retained"], found["size"], result["machine"]
    if "split" in again:
        phases = again["split"]
        took = (
            f"takes {duration(phases['total'])}: {duration(phases['curvature'])} for their "
            f"gradients along the step, {duration(phases['monitoring'])} for losses and gradient "
            f"norms of {again['n_monitored']} of them before and after"
        )
    else:
        took = "is refused, since the curvature along the step is not positive there"
    lines += [
        "",
        f"Above the mean of {len(found['requests'])} requests of one sample, below each of them; "
        f"{size['perturbations']} perturbations, {size['candidates']} units, "
        f"{result['settings']['threads']} threads on {machine['cores']} cores ({machine['cpu']}, "
        f"{machine['simd']}). Times with ~ are scaled. The first request with the {size['n'] - 1} "
        f"retained samples instead of statistics {took}.",
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

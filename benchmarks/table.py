"""Write the tables of the README and of the pages in docs/ from result files.

    python benchmarks/table.py benchmarks/results/cpu.json benchmarks/results/curvature.json \
        benchmarks/results/deletion.json
    python benchmarks/table.py --unlearning benchmarks/results/unlearning.json
    python benchmarks/table.py --population benchmarks/results/population.json

Each result file gets its own table, since machines may differ. A table replaces the text between
two HTML comments. The script needs the standard library only.
"""

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import population
import unlearning
from results import OURS, load

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- benchmarks:begin -->", "<!-- benchmarks:end -->"
DELETION = "<!-- deletion:begin -->", "<!-- deletion:end -->"
TIMES = "<!-- times:begin -->", "<!-- times:end -->"
# What the README shows: of a case, one of its points, beside one other implementation.
README = (
    ("foci_wide", 0, "published algorithm"),
    ("foci_wide", 0, "k-d tree per candidate, ties drawn"),
    ("foci_long", 0, "k-d tree per candidate, ties drawn"),
    ("foci_binary", 0, "k-d tree per candidate, ties averaged"),
    ("codec", 0, "published algorithm"),
    ("codec", 0, "k-d tree"),
    ("neighbors", 0, "scipy cKDTree"),
    ("neighbors", 1, "scikit-learn"),
    ("xi", 0, "scipy chatterjeexi"),
    ("hessian_resnet", 0, "torch.func, all parameters"),
    ("gauss_newton_distilbert", 0, "curvlinops, all parameters"),
)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("results", type=Path, nargs="*")
    parser.add_argument("--unlearning", type=Path, help="result file of benchmarks/unlearning.py")
    parser.add_argument("--population", type=Path, help="result file of benchmarks/population.py")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs/benchmarks.md")
    options = parser.parse_args(arguments)
    for path, maker, name in (
        (options.unlearning, unlearning, "unlearning"),
        (options.population, population, "evaluation"),
    ):
        if path:
            page = ROOT / f"docs/{name}.md"
            text = maker.tables(json.loads(path.read_text()))
            page.write_text(replaced(page.read_text(), text))
    results = [load(path) for path in options.results]
    if not results:
        return 0
    for path, made, marks in (
        (options.readme, readme_table, (BEGIN, END)),
        (options.docs, tables, TIMES),
        (options.docs, curvature_tables, (BEGIN, END)),
        (options.docs, deletion_tables, DELETION),
    ):
        path.write_text(replaced(path.read_text(), made(results), *marks))
    return 0


def readme_table(results: Iterable[dict[str, Any]]) -> str:
    """Return one table of the chosen times, and the machines that they were measured on."""
    lines, machines = [*HEAD], {}
    for result in results:
        found = [chosen for chosen in README if chosen[0] in result["cases"]]
        for name, k, peer in found:
            point = result["cases"][name]["points"][k]
            both = {each: point["results"][each] for each in (OURS, peer)}
            lines += rows(point | {"results": both})
        if found:
            machines[on_machine(result)] = None
    return "\n".join([*lines, "", f"Measured with {' and with '.join(machines)}."]) + "\n"


def tables(results: Iterable[dict[str, Any]]) -> str:
    return "\n".join(table(result) for result in results if "deletion" not in result)


def curvature_tables(results: Iterable[dict[str, Any]]) -> str:
    return "\n".join(filter(None, map(curvature_table, results)))


def deletion_tables(results: Iterable[dict[str, Any]]) -> str:
    return "\n".join(deletion_table(result) for result in results if "deletion" in result)


def replaced(text: str, content: str, first: str = BEGIN, last: str = END) -> str:
    """Return the text with new content between two comments."""
    before, begin, rest = text.partition(first)
    _, end, after = rest.partition(last)
    if not (begin and end):
        raise ValueError(f"the text must have the lines {first} and {last}")
    return f"{before}{first}\n{content}{last}{after}"


def table(result: dict[str, Any]) -> str:
    """Return a Markdown table of all cases with peers, without the sweeps, and its explanation."""
    if result["settings"]["quick"]:
        raise ValueError("a quick run's times mean nothing; pass the result of a full run")
    lines = [*HEAD]
    for case in result["cases"].values():
        if not case["sweep"]:
            for point in case["points"]:
                if len(point["results"]) > 1:
                    lines += rows(point)
    lines += [
        "",
        f"The times are medians of runs side by side, with {on_machine(result)}. A time with ~ was "
        "measured on fewer columns and scaled linearly. The ratio is that time divided by the time "
        'of lcodec_ext. An answer counts as "same" if it has the same columns in the same order '
        "(among the columns that were timed), the same coefficient to four digits, equally near "
        "neighbours, or a vector that agrees as closely as float32 allows.",
    ]
    return "\n".join(lines) + "\n"


HEAD = (
    "| task | lcodec_ext | compared with | time | ratio | its answer |",
    "|---|--:|---|--:|--:|---|",
)


def on_machine(result: dict[str, Any]) -> str:
    machine, threads = result["machine"], result["settings"]["threads"]
    return (
        f"{threads} threads each on {machine['cores']} cores ({machine['cpu']}, {machine['simd']})"
    )


def curvature_table(result: dict[str, Any]) -> str:
    """Return Markdown tables of masked and full products, and of solves; empty without them."""
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
    """Return times, then counted operations; a ratio is all parameters (torch.func) over ours."""
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
    """Return Markdown tables of a deletion by phase, and of the single requests."""
    if result["settings"]["quick"]:
        raise ValueError("a quick run's times mean nothing; pass the result of a full run")
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
            f"takes {duration(phases['total'])}: {duration(phases['curvature'])} for the gradients "
            f"of these samples along the step, and {duration(phases['monitoring'])} for losses and "
            f"gradient norms of {again['n_monitored']} of them before and after"
        )
    else:
        took = "is refused, because the curvature along the step is not positive there"
    lines += [
        "",
        f"The first table shows the mean of {len(found['requests'])} requests of one sample, the "
        f"second one each request. Setting: {size['perturbations']} perturbations, "
        f"{size['candidates']} units, {result['settings']['threads']} threads on "
        f"{machine['cores']} cores ({machine['cpu']}, {machine['simd']}). Times with ~ are scaled. "
        f"With the {size['n'] - 1} retained samples instead of statistics, the first request "
        f"{took}.",
    ]
    return "\n".join(lines) + "\n"


def rows(point: dict[str, Any]) -> list[str]:
    """Return one line for each peer; the first one also names the task and our own time."""
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
    """Write two digits, or all digits before the point if there are more."""
    return f"{value:.0f}" if value >= 10 else f"{value:.1f}" if value >= 1 else f"{value:.2f}"


if __name__ == "__main__":
    sys.exit(main())

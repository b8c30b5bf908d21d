"""Reports on deletions: what was deleted, what it left, and how near to retraining that is."""

import csv
import io
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from lcodec_ext._build import __version__
from lcodec_ext._checks import check_bool, first_few
from lcodec_ext._files import json_ready, write_all_atomically
from lcodec_ext.evaluation.evaluate import method_rows
from lcodec_ext.evaluation.methods import NO_OP, RETRAINED
from lcodec_ext.evaluation.records import (
    CombinedMethod,
    ReportEntry,
    Stat,
    as_number,
    combine,
    curve,
    pending,
    read_evaluations,
    read_ledgers,
    standing,
    stats,
    watched,
)

_FORMAT = 2
_LISTED = 10  # names in a sentence
_TABLE_ROWS = 30  # requests in the table of report.md
_FIGURES = {
    "figure_removals.png": (
        "The model after each removal. Of the requests that stand; of several ledgers their mean "
        "and range, as far as all of them go."
    ),
    "figure_losses.png": (
        "Losses of single samples. A deletion succeeds where the filled histogram lies on the "
        "dashed one. At most 12 methods are shown."
    ),
    "figure_units.png": (
        "Selected units per layer: of methods that change some units and not others their share, "
        "of requests how many different units they have changed so far."
    ),
    "figure_time.png": "Where the time went, of methods and requests whose time was split.",
}
_FILES = {"report.json", "report.md", "methods.csv", "requests.csv", *_FIGURES}
_FORMER_FIGURES = {  # of earlier versions, whose reports are replaced, too
    f"figure_{name}.png" for name in ("gap", "methods", "request_units", "request_time")
}
_OF_METHODS = """\
*JS* is the Jensen-Shannon distance of a model's outputs to those of retrained models. The row
"retrained" is what a deletion should reach, and *floor* what retrained models differ by among
themselves. A *closed gap* of 0% is the original model, 100% a retrained one, beyond the floor;
negative leads away. *MIA AUC* is the attack that tells deleted samples from unseen ones. ± is a
standard deviation, over evaluations or, of "retrained" in a single one, over models; - was not
measured. An evaluation measures what it looks at. It is evidence, not a guarantee."""
_OF_REQUESTS = """\
Losses and gradient norms (of the retained objective; 0 for a model trained to the end without the
samples) are of the model before and after. The ledger was not verified for this report;
`verify_ledger` does that."""


@dataclass(frozen=True)
class Report:
    """What `write_report` wrote.

    Attributes
    ----------
    directory : Path
    files : dict of str to Path
        By name, in the order of the report: "report.md", "report.json", ...
    summary : tuple of str
        The findings, one a line, as "Guarantee: none, ...".
    """

    directory: Path
    files: dict[str, Path]
    summary: tuple[str, ...]

    def __str__(self) -> str:
        lines = [f"- {sentence}" for sentence in self.summary]
        return "\n".join([*lines, f"Written: {', '.join(self.files)} in {self.directory}"])


def write_report(
    directory: str | os.PathLike[str],
    *,
    evaluation: Any = None,
    ledger: Any = None,
    title: str = "Unlearning report",
    figures: bool = True,
) -> Report:
    """Write a report on deletions: findings, tables, figures, and all numbers.

    ==================  =========================================================================
    ``report.md``       findings, tables and figures, for people
    ``report.json``     all of it: findings, combined numbers, evaluations and ledgers as given
    ``methods.csv``     a row for each evaluation and method
    ``requests.csv``    a row for each ledger and entry
    ``figure_*.png``    removals, losses, units, time
    ==================  =========================================================================

    Parameters
    ----------
    directory : str or path
        Made if it does not exist. Files of these names are replaced, each at once, so that none
        is ever half written; figures of a former report that this one lacks are deleted. Nothing
        else in it is touched.
    evaluation : Evaluation, dict, path, or list of them, optional
        What `evaluate` returned, its `to_dict`, or a file with that as JSON. Several, which
        differ in seed or forget set, are combined by the names of the methods: means and standard
        deviations.
    ledger : Unlearner, path, sequence of entries, or list of them, optional
        An `Unlearner`, its directory, or the entries of its ledger. Several are drawn as one line
        with a band. The report does not verify it; `verify_ledger` does.
    title : str, default "Unlearning report"
    figures : bool, default True
        Draw the figures for which there are data; needs matplotlib.

    Returns
    -------
    Report

    Raises
    ------
    ValueError
        Without evaluation and ledger, or if one of them is not of the right kind.
    FileNotFoundError
        If a path leads to nothing.
    ImportError
        With figures=True and no matplotlib. Then nothing was written.

    Notes
    -----
    What a ledger says of a guarantee is repeated, never strengthened: without a certified
    release, the report calls the deletion heuristic. Metrics that are NaN or infinite are left out
    of means, named in the summary, and null in the JSON.

    Examples
    --------
    >>> import tempfile
    >>> metrics = {"accuracy_test": 0.95, "js_forget": 0.4}
    >>> evaluation = {
    ...     "format": 1,
    ...     "n_forget": 10,
    ...     "n_retain": 90,
    ...     "methods": [{"name": "no-op", "seconds": 0.0, "metrics": metrics}],
    ... }
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     report = write_report(directory, evaluation=evaluation, figures=False)
    >>> list(report.files)
    ['report.md', 'report.json', 'methods.csv']
    """
    if evaluation is None and ledger is None:
        raise ValueError("evaluation or ledger must be given; got neither")
    if not isinstance(title, str) or not title.strip():
        raise ValueError(f"title must be a string with text in it; got {title!r}")
    check_bool(figures, "figures")
    folder = Path(directory)
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"directory must be a folder; {folder} is a file")
    evaluations, ledgers = read_evaluations(evaluation), read_ledgers(ledger)
    methods = combine(evaluations)
    floor = stats([one.get("floor") or {} for one in evaluations])
    images = _draw(methods, ledgers) if figures else {}
    tables = {
        "methods.csv": [
            {"evaluation": k} | row for k, one in enumerate(evaluations) for row in method_rows(one)
        ],
        "requests.csv": [
            {"ledger": k} | _request_row(entry) for k, one in enumerate(ledgers) for entry in one
        ],
    }
    sheets = {name: _csv(rows) for name, rows in tables.items() if rows}
    names = ["report.md", "report.json", *sheets, *images]
    summary = [
        f"{f'Ledger {k}. ' * (len(ledgers) > 1)}{what}: {found}"
        for k, requests in enumerate(ledgers)
        for what, found in _findings(requests).items()
    ]
    summary += _on_evaluations(evaluations, methods, floor)
    content = {
        "format": _FORMAT,
        "title": title,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "version": __version__,
        "summary": summary,
        "files": names,
        "methods": [{k: v for k, v in vars(m).items() if k != "losses"} for m in methods],
        "floor": floor,
        "evaluations": evaluations,
        "ledgers": [[request.entry for request in requests] for requests in ledgers],
    }
    parts = [["## Methods", _method_table(methods, floor), _OF_METHODS]] * bool(methods)
    parts += [_request_part(ledgers)] * bool(ledgers) + [_figure_part(images)]
    text = _markdown(content, parts)
    folder.mkdir(parents=True, exist_ok=True)
    former = _former_files(folder)
    written = images | sheets | {"report.json": _json(content) + "\n", "report.md": text}
    write_all_atomically({folder / name: part for name, part in written.items()})
    for name in former - written.keys():
        (folder / name).unlink(missing_ok=True)
    return Report(folder, {name: folder / name for name in names}, tuple(summary))


def _draw(
    methods: Sequence[CombinedMethod], ledgers: Sequence[Sequence[ReportEntry]]
) -> dict[str, bytes]:
    try:
        from lcodec_ext.evaluation.figures import draw_all
    except ImportError as error:
        raise ImportError(
            "the figures of a report need matplotlib: pip install 'lcodec_ext[plot]', or pass "
            "figures=False"
        ) from error
    return draw_all(methods, ledgers)


def _former_files(folder: Path) -> set[str]:
    """The files that an earlier report in this folder names as its own."""
    try:
        content = json.loads((folder / "report.json").read_text(encoding="utf-8"))
        return set(content["files"]) & (_FILES | _FORMER_FIGURES)
    except (OSError, ValueError, KeyError, TypeError):
        return set()


def _json(content: Any) -> str:
    return json.dumps(json_ready(content), indent=1, allow_nan=False, default=str)


def _csv(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """The rows under all columns that any of them has; what is missing or null is empty."""
    text = io.StringIO()
    columns = list(dict.fromkeys(key for row in rows for key in row))
    writer = csv.DictWriter(text, columns, lineterminator="\n", restval="")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def _request_row(request: ReportEntry) -> dict[str, Any]:
    row = {
        "number": request.number,
        "kind": request.kind,
        "time": request.time,
        "n_ids": len(request.ids),
        "ids": " ".join(map(str, request.ids)),
        "skipped": " ".join(map(str, request.skipped)),
        "n_removed": request.n_removed,
        "n_pending": request.n_pending,
        "n_retained": request.n_retained,
        "rolled_back_to": request.record.get("to"),
    }
    for name in ("loss_forget", "loss_retain", "gradient_norm", "guard"):
        row[f"{name}_before"], row[f"{name}_after"] = request.change(name)
    result, guarantee = request.result, request.guarantee
    row |= {
        "units": None if request.units is None else sum(map(len, request.units.values())),
        "units_of": result.get("n_units"),
        "parameters": result.get("n_parameters"),
    }
    solve = ("attempts", "damping", "solve_method", "solve_iterations", "solve_residual")
    row |= {name: result.get(name) for name in solve}
    calibration = result.get("calibration") or {}
    row |= {f"calibration_{name}": calibration.get(name) for name in CALIBRATED}
    row |= {
        "guarantee": guarantee.get("kind"),
        **{name: guarantee.get(name) for name in ("epsilon", "delta", "sigma")},
        "note": request.record.get("note"),
        "seconds": request.seconds,
    }
    return row | {f"seconds_{phase}": value for phase, value in request.phases.items()}


# ---------------------------------------------------------------------------------------------
# Numbers as text


def _cell(stat: Stat | None, form: Callable[[float], str]) -> str:
    if stat is None:
        return "-"
    return form(stat.mean) + (f" ± {form(stat.sd)}" if stat.sd is not None else "")


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e6 else f"{value:.3g}"


def _percent(share: float) -> str:
    return f"{share:.0%}" if abs(share) >= 0.0995 else f"{100 * share:.2g}%"


def _duration(seconds: float) -> str:
    for most, unit, size in ((0.0995, "ms", 1e-3), (99.5, "s", 1), (5940, "min", 60)):
        if seconds < most:
            return f"{seconds / size:.2g} {unit}"
    return f"{seconds / 3600:.3g} h"


def _count(n: int, noun: str) -> str:
    return f"{n} {noun}{'' if n == 1 else 's'}"


# ---------------------------------------------------------------------------------------------
# Findings, one a line

#: Of a calibration, in the table of requests.
CALIBRATED = (
    "stopped_by",
    "control",
    "spread",
    "validation_before",
    "validation_after",
    "finish",
)


def _is_calibrated(request: ReportEntry) -> bool:
    return isinstance(request.result.get("calibration"), Mapping)


def _findings(requests: Sequence[ReportEntry]) -> dict[str, str]:
    """What a ledger says, by what it is about."""
    path, last = standing(requests), requests[-1]
    total = "" if last.n_retained is None else f" of {last.n_retained + last.n_removed}"
    n_kept = sum(request.kind == "remove" for request in path)
    n_back = sum(request.kind == "rollback" for request in requests)
    found = {"Removed": f"{last.n_removed}{total} training samples, by {_count(n_kept, 'request')}"}
    if n_back:
        found["Rolled back"] = f"{_count(n_back, 'time')}; what only those requests removed is back"
    skipped = [str(request.number) for request in path if request.skipped]
    if skipped:
        waiting = [str(sample) for sample in pending(requests)]
        found["SKIPPED by the guard, at least in part"] = f"entries {first_few(skipped, _LISTED)}"
        found["Still in the model"] = (
            first_few(waiting, _LISTED) or "none, removed by later requests"
        )
    calibrated = [request.result["calibration"] for request in path if _is_calibrated(request)]
    if calibrated:
        control, spread, unseen = (
            _number(as_number(calibrated[-1].get(name)))
            for name in ("control", "spread", "validation_before")
        )
        found["Strength found with control groups"] = (
            f"in {_count(len(calibrated), 'request')}; in the last one retained samples that were "
            f"deleted on trial then lost {control} ± {spread}, samples never seen {unseen}"
        )
    found |= _on_privacy([request for request in requests if request.kind == "release"])
    names = {"Gradient norm of the retained objective": "gradient_norm"}
    if seen := watched([requests]):
        names[f"Guard ({seen[0]} on {seen[1]} samples)"] = "watched"
    for what, name in names.items():
        values = list(curve(requests, name).values())
        if len(values) > 1:
            found[what] = f"{_number(values[0])} -> {_number(values[-1])}"
    residuals = [as_number(r.result.get("solve_residual")) for r in path if r.kind == "remove"]
    bad = [residual for residual in residuals if residual is not None and residual > 0.1]
    if bad:
        most = (requests[0].record.get("settings") or {}).get("max_iterations")
        found["WARNING, far from the Newton step"] = (
            f"relative residuals up to {_number(max(bad))} in {_count(len(bad), 'request')}"
            + f" (max_iterations={most})" * (most is not None)
        )
    times = [r.seconds for r in requests if r.asks and r.seconds is not None]
    if times:
        found["Time"] = f"{_duration(sum(times))} for {_count(len(times), 'request')}"
    return found


def _on_privacy(releases: Sequence[ReportEntry]) -> dict[str, str]:
    if not releases:
        return {"Guarantee": "none, the deletion is heuristic; no model was released with noise"}
    guarantees = [request.guarantee for request in releases]
    others = [one for one in guarantees if one.get("kind") != "certified"]
    newest, budget = guarantees[-1], releases[-1].record.get("budget") or {}
    n = _count(len(releases), "release")
    if others:
        found = {"Guarantee": f"heuristic: no theorem stands behind {len(others)} of {n}"}
    else:
        found = {"Guarantee": f"certified, {n}, if the assumptions hold; it is of the released"}
        found["Guarantee"] += " copies, not of the model that the unlearner keeps"
    if newest.get("assumptions"):
        found["Assumptions of the newest release"] = json.dumps(json_ready(newest["assumptions"]))
    terms = [name for name in ("epsilon", "delta") if as_number(newest.get(name)) is not None]
    if terms:
        found["Noise of the newest release"] = ", ".join(f"{k} {newest[k]:.3g}" for k in terms)
    reasons = dict.fromkeys(str(reason) for one in others for reason in one.get("reasons") or ())
    if reasons:
        found["Heuristic because"] = first_few(list(reasons), 4, "; ")
    if as_number(budget.get("epsilon_sum")) is not None:
        found["Privacy budget"] = ", ".join(
            f"{k} {budget[f'{k}_sum']:.3g} of {budget[k]:.3g}" for k in ("epsilon", "delta")
        )
    return found


def _on_evaluations(
    evaluations: Sequence[Mapping[str, Any]],
    methods: Sequence[CombinedMethod],
    floor: Mapping[str, Stat],
) -> list[str]:
    lines = []
    counts = {
        f"{one.get('n_forget')} samples deleted, {one.get('n_retain')} retained, "
        f"{one.get('n_retrained')} retrained models"
        for one in evaluations
    }
    if evaluations:
        n = _count(len(evaluations), "evaluation")
        lines.append(f"Compared: {first_few(sorted(counts), 3, '; ')}; {n}")
    for method in methods:
        lines += [f"FAILED: {method.name}: {error}" for error in method.errors]
        if method.n_skipped:
            often = f"{method.n_skipped} of {_count(method.n_evaluations, 'evaluation')}"
            lines.append(
                f"SKIPPED: {method.name}, in {often}: the guard took its step back, and the "
                "samples are still in the model"
            )
        if method.not_finite:
            lines.append(
                f"NOT FINITE, left out of means: {method.name} ({', '.join(method.not_finite)})"
            )
    methods = [method for method in methods if method.name not in (NO_OP, RETRAINED)]
    for metric in ("js_forget", "loss_forget"):
        closed = [(m.gap_closed[metric], m.name) for m in methods if metric in m.gap_closed]
        closed.sort(key=lambda pair: -pair[0].mean)
        if closed:
            parts = [f"{name} {_cell(stat, _percent)}" for stat, name in closed]
            lines.append(f"Gap closed, {metric}: {first_few(parts, _LISTED)}")
    raw = [(m.metrics["js_forget"], m.name) for m in methods if "js_forget" in m.metrics]
    if raw and "js_forget" in floor and not any("js_forget" in m.gap_closed for m in methods):
        parts = [f"{name} {_cell(stat, '{:.3f}'.format)}" for stat, name in raw]
        level = _cell(floor["js_forget"], "{:.3f}".format)
        lines.append(
            f"No gap to close, js_forget, with a floor of {level}: {first_few(parts, _LISTED)}"
        )
    return lines


# ---------------------------------------------------------------------------------------------
# Markdown


def _markdown(content: Mapping[str, Any], parts: Sequence[Sequence[str]]) -> str:
    head = [
        f"# {_escape(content['title'])}",
        f"Written {content['created']} by lcodec_ext {__version__}. Numbers and settings are in "
        "report.json.",
        "## In short",
        "\n".join(f"- {_escape(line)}" for line in content["summary"]),
    ]
    return "\n\n".join([*head, *(paragraph for part in parts for paragraph in part)]) + "\n"


def _figure_part(images: Mapping[str, bytes]) -> list[str]:
    shown = {name: caption for name, caption in _FIGURES.items() if name in images}
    parts = [f"![{text.partition('.')[0]}]({name})\n\n{text}" for name, text in shown.items()]
    return ["## Figures", *parts] if parts else []


_COLUMNS: tuple[tuple[str, str, Callable[[float], str]], ...] = (
    ("accuracy forget", "metrics.accuracy_forget", "{:.1%}".format),
    ("accuracy retain", "metrics.accuracy_retain", "{:.1%}".format),
    ("accuracy test", "metrics.accuracy_test", "{:.1%}".format),
    ("loss forget", "metrics.loss_forget", _number),
    ("loss retain", "metrics.loss_retain", _number),
    ("loss test", "metrics.loss_test", _number),
    ("MIA AUC", "metrics.mia_auc", "{:.3f}".format),
    ("MIA TPR at 1% FPR", "metrics.mia_tpr", "{:.1%}".format),
    ("ToW", "metrics.tow", "{:.3f}".format),
    ("JS forget", "metrics.js_forget", "{:.3f}".format),
    ("JS test", "metrics.js_test", "{:.3f}".format),
    ("closed, JS forget", "gap_closed.js_forget", _percent),
    ("closed, loss forget", "gap_closed.loss_forget", _percent),
    ("gradient norm", "metrics.gradient_norm", _number),
    ("relearn steps", "metrics.relearn_steps", _number),
    ("time", "seconds", _duration),
    ("of retraining", "share_of_retraining", _percent),
)


def _method_table(methods: Sequence[CombinedMethod], floor: Mapping[str, Stat]) -> str:
    def stat(method: CombinedMethod, key: str) -> Stat | None:
        part, _, metric = key.partition(".")
        found: Any = getattr(method, part)
        return found.get(metric) if metric else found

    columns = [c for c in _COLUMNS if any(stat(method, c[1]) for method in methods)]
    rows = []
    for method in methods:
        note = " (skipped)" if method.n_skipped else " (failed)" if method.errors else ""
        cells = [_cell(stat(method, key), form) for _, key, form in columns]
        rows.append([_escape(method.name) + note, *cells])
    if floor:
        found = [(floor.get(key.removeprefix("metrics.")), form) for _, key, form in columns]
        rows.append(["floor", *(_cell(one, form) for one, form in found)])
    return _table(["method", *(name for name, _, _ in columns)], rows)


def _request_part(ledgers: Sequence[Sequence[ReportEntry]]) -> list[str]:
    parts = ["## Requests"]
    for k, requests in enumerate(ledgers):
        parts += [f"Ledger {k}:"] * (len(ledgers) > 1) + _request_table(requests)
    return [*parts, _OF_REQUESTS]


def _request_table(requests: Sequence[ReportEntry]) -> list[str]:
    parts = []
    shown = list(requests)
    if len(shown) > _TABLE_ROWS:
        shown = [*shown[: _TABLE_ROWS // 3], *shown[-2 * _TABLE_ROWS // 3 :]]
        parts.append(
            f"The first and last of {len(requests)} entries; all of them are in requests.csv."
        )
    stands = {request.number for request in standing(requests)}
    head = ["entry", "kind", "time", "samples", "removed", "pending", "loss forget"]
    head += ["loss retain", "gradient norm", "units", "took"]
    rows = []
    for request in shown:
        kind = "SKIPPED" if request.kind == "skip" else request.kind
        if request.kind == "rollback":
            kind = f"rollback to {request.record['to']}"
        elif request.kind == "remove" and request.skipped:
            kind += f", {len(request.skipped)} SKIPPED"
        row = _request_row(request)
        rows.append(
            [
                str(request.number),
                kind + " (rolled back)" * (request.number not in stands),
                (request.time or "-")[:19].replace("T", " "),
                first_few(row["ids"].split(), 3) or "-",
                *(str(row[name]) for name in ("n_removed", "n_pending")),
                *(
                    _change(request, name)
                    for name in ("loss_forget", "loss_retain", "gradient_norm")
                ),
                _number(row["units"]),
                "-" if request.seconds is None else _duration(request.seconds),
            ]
        )
    return [*parts, _table(head, rows)]


def _change(request: ReportEntry, name: str) -> str:
    pair = request.change(name)
    return "-" if pair == (None, None) else " → ".join(map(_number, pair))


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table, its first column to the left and the others to the right."""
    rule = [":--", *["--:"] * (len(head) - 1)]
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, rule, *rows))


def _escape(text: str) -> str:
    """Text that Markdown shows as it is, on one line."""
    text = " ".join(text.split())
    for sign in ("\\", "`", "*", "_", "|", "<", "[", "#"):
        text = text.replace(sign, f"\\{sign}")
    return text

"""Reports on deletions: what was deleted, on what evidence, and how near to retraining that is."""

import csv
import io
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from lcodec_ext._build import __version__
from lcodec_ext._checks import check_bool, counted, first_few
from lcodec_ext._files import json_ready, write_all_atomically
from lcodec_ext.evaluation.evaluate import FOR_A_GAP, few_retrained, method_rows
from lcodec_ext.evaluation.methods import NO_OP, RETRAINED
from lcodec_ext.evaluation.records import (
    CombinedMethod,
    ReportEntry,
    ReportLedger,
    Stat,
    as_number,
    combine,
    delivered_of,
    pending,
    read_evaluations,
    read_ledgers,
    standing,
    stats,
)

_FORMAT = 2
_TABLE_ROWS = 30  # requests in the table of report.md
_FIGURES = {
    "figure_losses.png": (
        "Losses of single samples. A deletion succeeds where the filled histogram lies on the "
        "dashed one. Of control groups the mean losses are shown, and that of validation samples."
    ),
    "figure_removals.png": (
        "The model after each removal. Of the requests that stand; of several ledgers a line each."
    ),
}
_FILES = {"report.json", "report.md", "methods.csv", "requests.csv", *_FIGURES}
_FORMER_FIGURES = {  # of earlier versions, whose reports are replaced, too
    f"figure_{name}.png"
    for name in ("gap", "methods", "request_units", "request_time", "units", "time")
}
_HEURISTIC = "There is no mathematical guarantee that nothing of them is left in the model"
_CERTIFIED = (
    "Released copies carry a mathematical guarantee, if the assumptions below hold; the model "
    "without noise, which stays here, carries none"
)
_VERIFIED = (
    "Verification computes all hashes again: it shows that neither the ledger nor the stored "
    "weights were changed since they were written. It says nothing about traces of the samples in "
    "the model. Whoever can write the folder could replace all of it: compare the head with a copy "
    "that is kept elsewhere."
)
_HASHES = """\
A *SHA-256* is a fingerprint: data that differ in a single bit have another one. The *ledger* is a
file in which every request has a line, sealed by the hash of the line before. Its *head* is the
hash of the last line."""
_YARDSTICK = {  # by the columns of the table that a sentence is about; "" for all tables
    "retrained": """\
The yardstick is {n} trained from scratch without the deleted samples.""",
    "": """\
*Loss* is what training makes small: a model that remembers a sample has a low loss on it. *Test*
samples were never used.""",
    "JS": """\
*JS* is the Jensen-Shannon distance, from 0 (same) to 1, of the outputs on the deleted samples to
those of retrained models; these have it to each other.""",
    "closed": """\
*Closed* is the share of the gap to them: 0% is the model before, 100% a retrained one, and negative
leads away.""",
    "attack": """\
*Attack* tells deleted samples from unseen ones by their losses: AUC is the chance that of two such
samples the deleted one has the lower loss, "at 1%" how many it finds while it accuses 1% of the
unseen ones.""",
    "attack retrained": "Compare both with retraining.",
    "±": "± is a standard deviation.",
    "evidence": """\
An evaluation measures what it looks at: it is evidence, not
a guarantee.""",
}
_COMPARED = {
    "": '"no-op" is the model before.',
    "retrained": '"retrained" is what a deletion should reach.',
    "floor": '"floor" is what retrained models differ by among themselves.',
    "closed": """\
*Closed* is the share of a gap beyond the floor: 0% is the model before, 100% a retrained one.""",
    "±": """\
± is a standard deviation, over evaluations or, of "retrained" in a single one, over models.""",
    "evidence": """\
- was not measured, or there is no gap. methods.csv has all numbers. It is evidence, not a
guarantee.""",
}
_STRENGTH = """\
How far the weights must move depends on the network, so it was found by trial. *Control groups*
({n} of {size} retained samples, {whose}) were deleted by the same step, measured, and put back. The
right strength is the one after which their loss is that of *validation samples*, which the model
was never trained on: deleted samples then look like unseen ones. {stopped} ± is a standard error
over groups."""
_WHOSE = {
    "users": "each of other users",
    "samples": "with the labels of the request where it has labels",
    "classes": "of other classes",
}
_OUTLIERS = """\
The deleted samples were unlike all others: in {unlike:.0%} of pairs one had a higher loss than a
retained sample, as samples with wrong labels have. No group of retained samples tells how strong a
step they need. In its place the model was trained on with the retained samples, for as long as
*validation samples*, which it was never trained on, allowed."""
_ALONE = """\
No step was needed: the model was trained on with the retained samples, for as long as *validation
samples*, which it was never trained on, allowed. The deleted samples then lost much as those."""
_STOPPED = {
    "control": "That point was reached.",
    "validation": "The search ended before, where validation samples began to lose more.",
    "retained": "The search ended before, where retained samples began to lose more.",
    "accuracy": "The search ended before, where fewer validation samples were told right.",
    "request": "The search ended before, where the deleted samples began to lose far more than "
    "groups did.",
    "residual": "The search ended before, where the equations of the step could not be solved.",
    "curvature": "The search ended before, where the curvature allowed no stronger step.",
    "range": "The strongest step of the range did not get there.",
}
_FINISH = "A *finish* of {} iterations followed: {}."
_REQUESTS = """\
Losses are means before → after, "deleted" on the samples of the request, "retained" on a draw of
those that stay. requests.csv has every entry with the numbers of all its samples."""


@dataclass(frozen=True)
class Report:
    """What `write_report` wrote."""

    directory: Path
    files: dict[str, Path]  # by name: "report.md", "report.json", ...
    summary: tuple[str, ...]  # the findings, one a line, as "Guarantee: There is no ..."
    delivered: str | None = None  # the method of the evaluation whose model is the delivered one

    def __str__(self) -> str:
        lines = [f"- {sentence}" for sentence in self.summary]
        return "\n".join([*lines, f"Written: {', '.join(self.files)} in {self.directory}"])


def write_report(
    directory: str | os.PathLike[str],
    *,
    evaluation: Any = None,
    ledger: Any = None,
    delivered: str | None = None,
    title: str = "Unlearning report",
    figures: bool = True,
) -> Report:
    """Write a report on deletions, for those who asked for them and for those who made them.

    "report.md" says who asked, what was deleted and when, what is guaranteed, how near to
    retraining the delivered model is, how its strength was found, and what was warned of.
    "report.json" has all of it, evaluations and ledgers as given; "methods.csv" a row for each
    evaluation and method; "requests.csv" a row for each ledger and entry, with the numbers of all
    samples. The figures are of losses and, of several removals, the model after each.

    Parameters
    ----------
    directory : str or path
        Made if it does not exist. A former report is replaced, each file at once, so that none is
        ever half written. Nothing else in it is touched.
    evaluation : Evaluation, dict, path, or list of them, optional
        What `evaluate` returned, its `to_dict`, or a file with that as JSON. Several are combined
        by the names of the methods: means and standard deviations.
    ledger : Unlearner, path, sequence of entries, or list of them, optional
        An `Unlearner`, its directory, or the entries of its ledger. One with a directory is
        verified by `verify_ledger`, without the training data.
    delivered : str, optional
        The method of the evaluation whose model was delivered. By default it is found by its
        hash, which is that of the ledger's last entry or release.
    title : str, default "Unlearning report"
    figures : bool, default True
        Draw the figures for which there are data; needs matplotlib.

    Returns
    -------
    Report

    Raises
    ------
    ValueError
        Without evaluation and ledger, if one of them is not of the right kind, or if `delivered`
        names no method, or one whose weights are others than the ledger's.
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
    >>> methods = [{"name": "no-op", "metrics": {"accuracy_test": 0.95}}]
    >>> found = {"format": 1, "n_forget": 10, "n_retain": 90, "methods": methods}
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     report = write_report(directory, evaluation=found, figures=False)
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
    delivered = delivered_of(evaluations, ledgers, delivered)
    methods = combine(evaluations)
    floor = stats([one.get("floor") or {} for one in evaluations])
    images = _draw(methods, ledgers, delivered) if figures else {}
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
    facts = [
        _facts(one, delivered is not None or any(r.calibration for r in one)) for one in ledgers
    ]
    found = _on_evaluations(evaluations, methods, delivered)
    summary = [
        f"{f'Ledger {k}. ' * (len(ledgers) > 1)}{what}: {text}"
        for k, one in enumerate(facts)
        for what, text in one.items()
    ]
    content = {
        "format": _FORMAT,
        "title": title,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "version": __version__,
        "summary": [*summary, *found],
        "delivered": delivered,
        "files": names,
        "methods": [{k: v for k, v in vars(m).items() if k != "losses"} for m in methods],
        "floor": floor,
        "evaluations": evaluations,
        "ledgers": [[request.entry for request in requests] for requests in ledgers],
    }
    parts = [f"# {_escape(title)}", *_summary_part(facts, found)]
    parts += _near_part(evaluations, methods, floor, delivered, ledgers)
    parts += [*_strength_part(ledgers), *_image("figure_losses.png", images)]
    parts += _warning_part(ledgers)
    parts += [*_request_part(ledgers), *_image("figure_removals.png", images)]
    parts += _environment_part(ledgers, evaluations)
    parts.append(f"Written {content['created']} by lcodec_ext {__version__}.")
    folder.mkdir(parents=True, exist_ok=True)
    former = _former_files(folder)
    written = images | sheets
    written |= {"report.json": _json(content), "report.md": ("\n\n".join(parts) + "\n").encode()}
    write_all_atomically({folder / name: part for name, part in written.items()})
    for name in former - written.keys():
        (folder / name).unlink(missing_ok=True)
    files = {name: folder / name for name in names}
    return Report(folder, files, (*summary, *found), delivered)


def _draw(
    methods: Sequence[CombinedMethod], ledgers: Sequence[ReportLedger], delivered: str | None
) -> dict[str, bytes]:
    try:
        from lcodec_ext.evaluation.figures import draw_all
    except ImportError as error:
        raise ImportError(
            "the figures of a report need matplotlib: pip install 'lcodec_ext[plot]', or pass "
            "figures=False"
        ) from error
    return draw_all(methods, ledgers, delivered)


def _former_files(folder: Path) -> set[str]:
    """The files that an earlier report in this folder names as its own."""
    try:
        content = json.loads((folder / "report.json").read_text(encoding="utf-8"))
        return set(content["files"]) & (_FILES | _FORMER_FIGURES)
    except (OSError, ValueError, KeyError, TypeError):
        return set()


def _json(content: Any) -> bytes:
    text = json.dumps(json_ready(content), indent=1, allow_nan=False, default=str)
    return text.encode() + b"\n"


def _csv(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """The rows under all columns that any of them has; what is missing or null is empty."""
    text = io.StringIO()
    columns = list(dict.fromkeys(key for row in rows for key in row))
    writer = csv.DictWriter(text, columns, lineterminator="\n", restval="")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def _request_row(request: ReportEntry) -> dict[str, Any]:
    result, guarantee = request.result, request.guarantee
    row: dict[str, Any] = {
        name: getattr(request, name) for name in ("number", "kind", "time", "weights", "seconds")
    }
    row |= {"note": request.record.get("note"), "n_ids": len(request.ids)}
    row |= {name: " ".join(map(str, getattr(request, name))) for name in ("ids", "skipped")}
    row |= {"groups": "; ".join(request.groups), "warnings": " | ".join(request.warnings or ())}
    row |= {name: getattr(request, name) for name in ("n_removed", "n_pending", "n_retained")}
    row["rolled_back_to"] = request.record.get("to")
    for name in ("loss_forget", "loss_retain", "gradient_norm", "guard"):
        row[f"{name}_before"], row[f"{name}_after"] = request.change(name)
    row["units"] = None if request.units is None else sum(map(len, request.units.values()))
    row["units_of"] = None if request.units is None else result.get("n_units")
    row["parameters"] = result.get("n_parameters")
    solve = ("attempts", "damping", "solve_method", "solve_iterations", "solve_residual")
    row |= {name: result.get(name) for name in solve}
    found = ("stopped_by", "control", "spread", "validation_before", "validation_after", "finish")
    row |= {f"calibration_{name}": request.calibration.get(name) for name in found}
    row["guarantee"] = guarantee.get("kind")
    row |= {name: guarantee.get(name) for name in ("epsilon", "delta", "sigma")}
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


def _change(pair: Sequence[Any]) -> str:
    before, after = map(as_number, pair)
    return "-" if before is None and after is None else f"{_number(before)} → {_number(after)}"


def _moment(time: str | None) -> str:
    return "-" if time is None else f"{time[:19].replace('T', ' ')} UTC"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], numbers: bool = True) -> str:
    """A table; numbers are to the right, but for those of the first column."""
    rule = [":--", *["--:" if numbers else ":--"] * (len(head) - 1)]
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, rule, *rows))


def _escape(text: str) -> str:
    """Text that Markdown shows as it is, on one line."""
    text = " ".join(text.split())
    for sign in ("\\", "`", "*", "_", "|", "<", "[", "#"):
        text = text.replace(sign, f"\\{sign}")
    return text


def _image(name: str, images: Mapping[str, bytes]) -> list[str]:
    caption = _FIGURES[name]
    return [f"![{caption.partition('.')[0]}]({name})\n\n{caption}"] if name in images else []


def _named(ledgers: Sequence[object], k: int) -> list[str]:
    return [f"### Ledger {k}"] * (len(ledgers) > 1)


# ---------------------------------------------------------------------------------------------
# Summary


def _facts(requests: ReportLedger, measured: bool) -> dict[str, str]:
    """What a ledger says, by what it is about; the first one says the whole of it."""
    path, last, waiting = standing(requests), requests[-1], pending(requests)
    asked = [request for request in path if request.asks]
    releases = [request for request in requests if request.kind == "release"]
    privacy, verified = _on_privacy(releases, measured), requests.verification
    total = "" if last.n_retained is None else f" of {last.n_retained + last.n_removed:,}"
    were = "was" if last.n_removed == 1 else "were"
    done = f"{last.n_removed:,}{total} training samples {were} deleted, by "
    done += counted(sum(request.kind == "remove" for request in path), "request")
    if waiting:
        done += f". {len(waiting):,} that were asked for, too, REMAIN in the model"
    if last.n_removed:
        done += ". " + privacy["Guarantee"].partition(". ")[0]
    if verified is None:
        checked = "no: the report was given entries, and not the folder of their ledger"
    else:
        checked = "yes, when this report was written. " if verified.ok else "NO. "
        checked += "".join(f"{each}. " for each in verified.problems[:3]) + _VERIFIED
        done = done if verified.ok else f"THE LEDGER DOES NOT VERIFY: do not rely on it. {done}"
    notes = [f"{r.record['note']} (entry {r.number})" for r in asked if r.record.get("note")]
    ids = [str(i) for request in path for i in request.ids if i not in set(request.skipped)]
    times = [_moment(request.time) for request in asked if request.time]
    spent = [r.seconds for r in requests if r.asks and r.seconds is not None]
    back = sum(request.kind == "rollback" for request in requests)
    found = {
        "In short": done,
        "Asked for by": first_few(notes, 5, "; ") or "not recorded: no request has a note",
        "Groups": first_few([group for r in asked for group in r.groups], 10),
        "Samples": f"numbers {first_few(ids, 10)}" if ids else "none",
        "Still in the model": first_few(list(map(str, waiting)), 10),
        "Rolled back": f"{counted(back, 'time')}; what only those requests deleted is back"
        * (back > 0),
        "When": " to ".join(dict.fromkeys([*times[:1], *times[-1:]])) or "not recorded",
        "Time taken": f"{_duration(sum(spent))} for {counted(len(spent), 'request')}"
        if spent
        else "",
        "Model before": f"weights with SHA-256 {requests[0].weights or 'not recorded'}",
        "Model after": f"weights with SHA-256 {last.weights or 'not recorded'}",
        "Released copies": first_few([f"SHA-256 {r.released}" for r in releases], 3, "; "),
        "Ledger": f"entries 0 to {last.number}, head {last.entry.get('hash')}",
        "Verified": checked,
    }
    if len(ids) > 10:
        found["Samples"] += "; requests.csv beside this report has all of them, in the column ids"
    if waiting:
        found["Still in the model"] += "; deleting these did harm and was taken back: train again"
    return {what: text for what, text in found.items() if text} | privacy


def _on_privacy(releases: Sequence[ReportEntry], measured: bool) -> dict[str, str]:
    """What is guaranteed; the first sentence of it is a part of the summary's first line."""
    guarantees = [request.guarantee for request in releases]
    others = [one for one in guarantees if one.get("kind") != "certified"]
    n = counted(len(releases), "release")
    if releases and not others:
        found = {"Guarantee": f"{_CERTIFIED}. This holds for {n}"}
    else:
        evidence = "evidence below" if measured else "this report has no evidence either"
        why = f", no theorem stands behind {len(others)} of {n}" * bool(others)
        found = {"Guarantee": f"{_HEURISTIC}: the deletion is heuristic{why}; {evidence}"}
    newest = guarantees[-1] if guarantees else {}
    if newest.get("assumptions") and not others:
        found["Assumptions"] = json.dumps(json_ready(newest["assumptions"]))
    terms = [name for name in ("epsilon", "delta") if as_number(newest.get(name)) is not None]
    if terms:
        found["Noise of the newest release"] = ", ".join(f"{k} {newest[k]:.3g}" for k in terms)
    reasons = dict.fromkeys(str(reason) for one in others for reason in one.get("reasons") or ())
    if reasons:
        found["Heuristic because"] = first_few(list(reasons), 4, "; ")
    budget = (releases[-1].record.get("budget") or {}) if releases else {}
    if as_number(budget.get("epsilon_sum")) is not None:
        found["Privacy budget"] = ", ".join(
            f"{k} {budget[f'{k}_sum']:.3g} of {budget[k]:.3g}" for k in ("epsilon", "delta")
        )
    return found


def _on_evaluations(
    evaluations: Sequence[Mapping[str, Any]],
    methods: Sequence[CombinedMethod],
    delivered: str | None,
) -> list[str]:
    counts = {
        f"{counted(one.get('n_forget') or 0, 'sample')} deleted, {one.get('n_retain')} retained, "
        f"{counted(one.get('n_retrained') or 0, 'retrained model')}"
        for one in evaluations
    }
    n = counted(len(evaluations), "evaluation")
    lines = [f"Measured: {first_few(sorted(counts), 3, '; ')}; {n}"] if evaluations else []
    losses = {method.name: method.metrics.get("loss_forget") for method in methods}
    own, aim = losses.get(delivered or ""), losses.get(RETRAINED)
    if own and aim and aim.mean > 0:
        ratio, verdict = own.mean / aim.mean, "That is within a factor of 2"
        if ratio < 0.5:
            verdict = "It still knows them better than a model that was trained without them"
        elif ratio > 2:
            verdict = "It was moved further from them than a training without them moves it"
        lines.append(
            f"Mean loss on the deleted samples: {_cell(losses.get(NO_OP), _number)} before, "
            f"{_cell(aim, _number)} after a training without them, {_cell(own, _number)} in the "
            f"delivered model{f', {ratio:.2g} times that' * (f'{ratio:.2g}' != '1')}. {verdict}"
        )
    for method in methods:
        lines += [f"FAILED: {method.name}: {error}" for error in method.errors]
        if method.n_skipped:
            often = f"{method.n_skipped} of {counted(method.n_evaluations, 'evaluation')}"
            lines.append(
                f"SKIPPED: {method.name}, in {often}: the guard took its step back, and the "
                "samples are still in the model"
            )
        if method.not_finite:
            lines.append(
                f"NOT FINITE, left out of means: {method.name} ({', '.join(method.not_finite)})"
            )
    return lines


def _summary_part(facts: Sequence[Mapping[str, str]], found: Sequence[str]) -> list[str]:
    parts = ["## Summary"]
    for k, one in enumerate(facts):
        (_, first), *rest = one.items()
        parts += [*_named(facts, k), f"**{_escape(first)}.**"]
        parts.append(_table(["", ""], [[what, _escape(text)] for what, text in rest], False))
    parts += [_HASHES] * bool(facts)
    return [*parts, "\n".join(f"- {_escape(line)}" for line in found)] if found else parts


# ---------------------------------------------------------------------------------------------
# How near to retraining


_COLUMNS: tuple[tuple[str, str, Callable[[float], str]], ...] = (
    ("loss, deleted", "metrics.loss_forget", _number),
    ("loss, retained", "metrics.loss_retain", _number),
    ("loss, test", "metrics.loss_test", _number),
    ("accuracy, deleted", "metrics.accuracy_forget", "{:.1%}".format),
    ("accuracy, retained", "metrics.accuracy_retain", "{:.1%}".format),
    ("accuracy, test", "metrics.accuracy_test", "{:.1%}".format),
    ("tokens right, deleted", "metrics.token_accuracy_forget", "{:.1%}".format),
    ("tokens right, retained", "metrics.token_accuracy_retain", "{:.1%}".format),
    ("tokens right, test", "metrics.token_accuracy_test", "{:.1%}".format),
    ("JS", "metrics.js_forget", "{:.3f}".format),
    ("closed, JS", "gap_closed.js_forget", _percent),
    ("closed, loss", "gap_closed.loss_forget", _percent),
    ("attack, AUC", "metrics.mia_auc", "{:.3f}".format),
    ("attack, at 1%", "metrics.mia_tpr", "{:.1%}".format),
    ("time", "seconds", _duration),
    ("of retraining", "share_of_retraining", _percent),
)


def _near_part(
    evaluations: Sequence[Mapping[str, Any]],
    methods: Sequence[CombinedMethod],
    floor: Mapping[str, Stat],
    delivered: str | None,
    ledgers: Sequence[ReportLedger],
) -> list[str]:
    """The delivered model next to the one before and retrained ones; then other methods."""
    head, rows = _measured(methods, floor)
    parts = ["## How near to retraining the delivered model is"] * (
        bool(ledgers) or bool(delivered)
    )
    if delivered is not None:
        names = {"before": NO_OP, "delivered": delivered, "retrained": RETRAINED}
        mine = {title: rows[name] for title, name in names.items() if name in rows}
        lines = [line for line in zip(head, *mine.values(), strict=True) if {*line[1:]} != {"-"}]
        how = "it has the weights of the ledger" if ledgers else "as the report was told"
        n = sum(one.get("n_retrained") or 0 for one in evaluations)
        part = [str(one.get("n_forget")) for one in evaluations]
        every = [str(one[-1].n_removed) for one in ledgers] or part
        how += f". It was measured on {', '.join(part)} of the {', '.join(every)} deleted samples"
        parts.append(f'The delivered model is "{_escape(delivered)}" of the evaluation: {how}.')
        told = _told(_YARDSTICK, lines, [*mine]).format(n=counted(n, "model"))
        parts += [_table(["", *mine], lines), told, *_few(evaluations)]
    elif ledgers:
        what = "no model of the evaluation has its weights" if evaluations else "give an evaluation"
        parts.append(f"This was not measured for the delivered model: {what}.")
    if methods:
        marks = {
            m.name: " (skipped)" * bool(m.n_skipped) + " (failed)" * bool(m.errors) for m in methods
        }
        if delivered is not None:
            marks[delivered] += " (delivered)"
        lines = [(_escape(name) + marks.get(name, ""), *row) for name, row in rows.items()]
        parts.append("## Other methods, for comparison" if delivered else "## Methods")
        told = _told(_COMPARED, [["method", *head], *lines], [*rows])
        parts += [_table(["method", *head], lines), told]
        parts += _few(evaluations) if delivered is None else []
    return parts


def _told(sentences: Mapping[str, str], table: Sequence[Sequence[str]], names: list[str]) -> str:
    """The sentences about what a table has."""
    cells = " ".join(cell for line in table for cell in line) + " " + " ".join(names) + " evidence"
    return " ".join(
        text for words, text in sentences.items() if all(word in cells for word in words.split())
    )


def _few(evaluations: Sequence[Mapping[str, Any]]) -> list[str]:
    """What too few retrained models leave open."""
    counts = {one.get("n_retrained") for one in evaluations}
    return [few_retrained(n) for n in range(FOR_A_GAP) if n in counts]


def _measured(
    methods: Sequence[CombinedMethod], floor: Mapping[str, Stat]
) -> tuple[list[str], dict[str, list[str]]]:
    """The head of a table, and its cells by method."""

    def stat(method: CombinedMethod, key: str) -> Stat | None:
        part, _, metric = key.partition(".")
        found: Any = getattr(method, part)
        return found.get(metric) if metric else found

    columns = [c for c in _COLUMNS if any(stat(method, c[1]) for method in methods)]
    rows = {m.name: [_cell(stat(m, key), form) for _, key, form in columns] for m in methods}
    if floor:
        found = [(floor.get(key.removeprefix("metrics.")), form) for _, key, form in columns]
        rows["floor"] = [_cell(one, form) for one, form in found]
    return [name for name, _, _ in columns], rows


# ---------------------------------------------------------------------------------------------
# Strength, warnings, requests, environment


def _strength_part(ledgers: Sequence[ReportLedger]) -> list[str]:
    parts = ["## How the strength was found"] if ledgers else []
    for k, requests in enumerate(ledgers):
        removals = [r for r in standing(requests) if r.kind == "remove"]
        calibrated = [r for r in removals if r.calibration]
        parts += _named(ledgers, k)
        if without := [str(r.number) for r in removals if not r.calibration]:
            parts.append(
                f"The strength of entries {first_few(without, 10)} was not calibrated: it comes "
                "from constants, which fit some networks and not others."
            )
        for request in calibrated[-1:]:
            parts += _calibration(request)
            if len(calibrated) > 1:
                parts.append(f"This is of entry {request.number}; requests.csv has the others.")
    return parts


def _calibration(request: ReportEntry) -> Iterator[str]:
    """What control groups of a request have shown."""
    found = request.calibration
    reason = str(found.get("stopped_by"))
    if reason == "finish":
        yield _ALONE
    elif reason == "outliers":
        yield _OUTLIERS.format(unlike=as_number(found.get("unlike")) or 1.0)
    else:
        yield _STRENGTH.format(
            n=len(found.get("control_after") or ()),
            size=found.get("group_size"),
            whose=_WHOSE.get(str(found.get("groups_of")), "drawn at random"),
            stopped=_STOPPED.get(reason, f"The search was stopped by: {reason}."),
        )
    if found.get("finish"):
        by = found.get("finish_by") or "training on the retained samples"
        yield _FINISH.format(found["finish"], _escape(str(by)))
    elif found.get("finish_by"):
        yield f"A *finish*, training on the retained samples, was {_escape(found['finish_by'])}."
    seen = [as_number(found.get(f"validation_{when}")) for when in ("before", "after")]
    rows = [
        [f"{name} samples", *map(_number, pair)]
        for name, pair in (("validation", seen), ("deleted", request.change("loss_forget")))
    ]
    if reason not in ("outliers", "finish"):
        control = [_number(as_number(found.get(name))) for name in ("control", "spread")]
        rows.insert(
            0, ["control groups", _number(as_number(found.get("trained"))), " ± ".join(control)]
        )
    yield _table(["mean loss", "before", "after"], rows)


def _warning_part(ledgers: Sequence[ReportLedger]) -> list[str]:
    lines = []
    for k, requests in enumerate(ledgers):
        for r in requests:
            texts = list(r.warnings or ())
            if r.asks and r.warnings is None:
                texts.append("a version made it that did not record warnings")
            residual = as_number(r.result.get("solve_residual"))
            if r.kind == "remove" and residual is not None and residual > 0.1:
                texts.append(f"far from the Newton step, with a residual of {_number(residual)}")
            where = f"ledger {k}, " * (len(ledgers) > 1) + f"entry {r.number}"
            lines += [f"- {where}: {_escape(text)}" for text in texts]
    return ["## Warnings", "\n".join(lines) or "None."] if ledgers else []


def _request_part(ledgers: Sequence[ReportLedger]) -> list[str]:
    parts = ["## Requests"] if ledgers else []
    for k, requests in enumerate(ledgers):
        parts += _named(ledgers, k)
        shown = list(requests)
        if len(shown) > _TABLE_ROWS:
            shown = [*shown[: _TABLE_ROWS // 3], *shown[-2 * _TABLE_ROWS // 3 :]]
            parts.append(
                f"The first and last of {len(requests)} entries; all of them are in requests.csv."
            )
        stands = {request.number for request in standing(requests)}
        head = ["entry", "kind", "time", "samples", "loss deleted", "loss retained", "took"]
        parts.append(_table(head, [_request_line(r, r.number in stands) for r in shown]))
    return [*parts, *[_REQUESTS] * bool(ledgers)]


def _request_line(request: ReportEntry, stands: bool) -> list[str]:
    kind = "SKIPPED" if request.kind == "skip" else request.kind
    if request.kind == "rollback":
        kind = f"rollback to {request.record['to']}"
    elif request.kind == "remove" and request.skipped:
        kind += f", {len(request.skipped)} SKIPPED"
    return [
        str(request.number),
        kind + " (rolled back)" * (not stands),
        _moment(request.time),
        first_few(list(map(str, request.ids)), 3) or "-",
        *(_change(request.change(name)) for name in ("loss_forget", "loss_retain")),
        "-" if request.seconds is None else _duration(request.seconds),
    ]


def _environment_part(
    ledgers: Sequence[ReportLedger], evaluations: Sequence[Mapping[str, Any]]
) -> list[str]:
    """Versions, and what the training and the deletion went by; report.json has the rest."""
    parts = [one.get("settings") or {} for one in evaluations]
    parts = [part.get("versions") or {} for part in parts]
    for requests in ledgers:
        known = {**requests[0].record, **(requests[0].record.get("settings") or {})}
        parts.append({k: known.get(k) for k in ("model", "loss_fn", "weight_decay", "seed")})
        parts += [(r.entry.get("environment") or {}).get("versions") or {} for r in requests]
    found: dict[str, dict[str, None]] = {}
    for name, value in ((k, v) for part in parts for k, v in part.items() if v is not None):
        found.setdefault(_escape(name), {})[_escape(str(value))] = None
    rows = [[name, ", ".join(values)] for name, values in found.items()]
    text = "report.json has all settings and numbers."
    return ["## Environment", *[_table(["", ""], rows, False)] * bool(rows), text]

"""Reports on deletions: what was deleted, what it left, and how near to retraining that is."""

import csv
import io
import json
import os
import secrets
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from lcodec_ext._build import __version__
from lcodec_ext._checks import check_bool
from lcodec_ext.evaluation.report_data import (
    MINUS_LOSS,
    NO_OP,
    RETRAINED,
    Comparison,
    Method,
    Request,
    Stat,
    as_json,
    as_number,
    combine,
    curve,
    guarded,
    pending,
    read_evaluations,
    read_ledgers,
    share_of_retraining,
    standing,
)
from lcodec_ext.evaluation.report_text import duration, listed, number, percent, sentence_case

_FORMAT = 1
_TABLE_ROWS = 30  # requests in the table of report.md
_REASONS = 4  # why a guarantee is heuristic, in the summary
_POINT = 0.01  # of accuracy, from which a method is said to have lost some
_GAPS = {  # what is told of nearness to retraining, if it was measured
    "js_forget": "Outputs on the deleted samples (Jensen-Shannon distance to retrained models)",
    "loss_forget": "Loss on the deleted samples",
    "js_test": "Outputs on test samples (Jensen-Shannon distance to retrained models)",
}
_METHOD_FIGURES = {
    "figure_gap.png": (
        "Closed gap against time",
        "How much of the gap between the original model and retrained ones is closed, beyond what "
        "these differ by among themselves, and the time it took. Bars: standard deviation.",
    ),
    "figure_methods.png": (
        "Methods beside retraining",
        "Dashed lines: retrained models; of distances, how far one of them is from another. Pale "
        "bars: standard deviation.",
    ),
    "figure_losses.png": (
        "Losses of single samples",
        "A deletion succeeds where the filled histogram lies on the dashed one. At most 12 "
        "methods are shown.",
    ),
    "figure_units.png": (
        "Selected units per layer",
        "Methods that change all units are not shown.",
    ),
    "figure_time.png": ("Where the time went", "Of methods whose time was split."),
}
_IN_GAPS = ("js_forget", "loss_forget", "mia_auc", "js_test")  # of which figure_gap shows two
_REQUEST_FIGURES = {
    "figure_removals.png": (
        "The model after each removal",
        "Of the requests that stand; of several ledgers, as far as all of them go. Dashed: "
        "requests that were rolled back since.",
    ),
    "figure_request_units.png": (
        "Selected units per layer, over all requests",
        "Units that were changed by at least one request.",
    ),
    "figure_request_time.png": ("Where the time of the requests went", "Skipped ones included."),
}
_FILES = (
    "report.json",
    "report.md",
    "methods.csv",
    "requests.csv",
    *_METHOD_FIGURES,
    *_REQUEST_FIGURES,
)


@dataclass(frozen=True)
class Report:
    """What `write_report` wrote.

    Attributes
    ----------
    directory : Path
    files : dict of str to Path
        By name, in the order of the report: "report.md", "report.json", ...
    summary : tuple of str
        The findings, in sentences that follow from the numbers.
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
    """Write a report on deletions: numbers, tables, figures, and what they say in plain words.

    ==================  =========================================================================
    ``report.md``       summary, tables and figures, for people
    ``report.json``     all of it: summary, combined numbers, evaluations and ledgers as given
    ``methods.csv``     a row for each evaluation and method
    ``requests.csv``    a row for each ledger and entry
    ``figure_*.png``    gap, methods, losses, units, time; removals, request_units, request_time
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
    comparison = combine(evaluations) if evaluations else None

    images: dict[str, bytes] = {}
    if figures:
        try:
            from lcodec_ext.evaluation.figures import draw_all
        except ImportError as error:
            raise ImportError(
                "the figures of a report need matplotlib: pip install 'lcodec_ext[plot]', or pass "
                "figures=False"
            ) from error
        images = draw_all(comparison, ledgers)

    summary = [
        *(_say_requests(ledgers) if ledgers else ()),
        *(_say_comparison(comparison) if comparison is not None else ()),
    ]
    names = ["report.md", "report.json"]
    names += ["methods.csv"] * bool(evaluations) + ["requests.csv"] * bool(ledgers) + list(images)
    created = datetime.now(UTC).isoformat(timespec="seconds")
    content = {
        "format": _FORMAT,
        "title": title,
        "created": created,
        "version": __version__,
        "summary": summary,
        "files": names,
        "methods": [_method_record(m) for m in comparison.methods] if comparison else [],
        "floor": {k: s._asdict() for k, s in comparison.floor.items()} if comparison else {},
        "evaluations": evaluations,
        "ledgers": [[request.entry for request in requests] for requests in ledgers],
    }
    files: dict[str, bytes] = {
        "report.md": _markdown(title, created, summary, comparison, evaluations, ledgers, images),
        "report.json": (json.dumps(as_json(content), indent=1, allow_nan=False) + "\n").encode(),
    }
    if evaluations:
        files["methods.csv"] = _csv(_method_rows(evaluations))
    if ledgers:
        files["requests.csv"] = _csv(_request_rows(ledgers))
    files |= images

    folder.mkdir(parents=True, exist_ok=True)
    former = _former_files(folder)
    _replace_all(folder, files)
    for name in former - files.keys():
        (folder / name).unlink(missing_ok=True)
    return Report(folder, {name: folder / name for name in names}, tuple(summary))


def _former_files(folder: Path) -> set[str]:
    """The files that the report which is there says are its own."""
    try:
        content = json.loads((folder / "report.json").read_text(encoding="utf-8"))
        return set(content["files"]) & set(_FILES)
    except (OSError, ValueError, KeyError, TypeError):
        return set()


def _replace_all(folder: Path, files: dict[str, bytes]) -> None:
    """Write files, and when all are written put them in their places, each at once."""
    token = secrets.token_hex(4)
    written: dict[str, Path] = {}
    try:
        for name, content in files.items():
            written[name] = folder / f".{name}.{token}"
            with open(written[name], "xb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        for name in reversed(files):  # those that name others come last
            os.replace(written[name], folder / name)
            del written[name]
    finally:
        for path in written.values():
            path.unlink(missing_ok=True)


# --- rows for the CSV and records for the JSON -------------------------------------------------


def _csv(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """The rows under all columns that any of them has; what is missing or null is empty."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n", restval="")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def _method_rows(evaluations: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    rows = []
    for k, evaluation in enumerate(evaluations):
        for method in evaluation["methods"]:
            units = method.get("units_per_layer")
            row = {
                "evaluation": k,
                "method": method["name"],
                "skipped": bool(method.get("skipped")),
                "error": method.get("error"),
                "seconds": method.get("seconds"),
                "share_of_retraining": share_of_retraining(method, evaluation),
                "units": units and sum(chosen for chosen, _ in units.values()),
                "units_of": units and sum(of for _, of in units.values()),
            }
            for prefix, field in (
                ("", "metrics"),
                ("gap_closed_", "gap_closed"),
                ("spread_", "spread"),
                ("seconds_", "phases"),
            ):
                row |= {f"{prefix}{key}": v for key, v in (method.get(field) or {}).items()}
            rows.append(row)
    return rows


def _request_rows(ledgers: Sequence[Sequence[Request]]) -> list[dict[str, Any]]:
    rows = []
    for k, requests in enumerate(ledgers):
        for request in requests:
            units, result = request.units, request.result
            guarantee = request.record.get("guarantee") or result.get("guarantee") or {}
            row = {
                "ledger": k,
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
            row |= {
                "units": None if units is None else sum(map(len, units.values())),
                "units_of": result.get("n_units"),
                "parameters": result.get("n_parameters"),
                "attempts": result.get("attempts"),
                "damping": result.get("damping"),
                "solve_method": result.get("solve_method"),
                "solve_iterations": result.get("solve_iterations"),
                "solve_residual": result.get("solve_residual"),
                "guarantee": guarantee.get("kind"),
                "epsilon": guarantee.get("epsilon"),
                "delta": guarantee.get("delta"),
                "sigma": guarantee.get("sigma"),
                "note": request.record.get("note"),
                "seconds": request.seconds,
            }
            row |= {f"seconds_{phase}": value for phase, value in request.phases.items()}
            rows.append(row)
    return rows


def _method_record(method: Method) -> dict[str, Any]:
    def record(stat: Stat | None) -> dict[str, Any] | None:
        return None if stat is None else stat._asdict()

    return {
        "name": method.name,
        "n_evaluations": method.n_evaluations,
        "n_skipped": method.n_skipped,
        "errors": method.errors,
        "seconds": record(method.seconds),
        "share_of_retraining": record(method.share),
        "metrics": {key: record(stat) for key, stat in method.metrics.items()},
        "gap_closed": {key: record(stat) for key, stat in method.gap_closed.items()},
        "units_per_layer": method.units or None,
        "phases": method.phases or None,
    }


# --- what the numbers say ----------------------------------------------------------------------


def _say_requests(ledgers: Sequence[Sequence[Request]]) -> list[str]:
    """Sentences on the first ledger, and how many more there are."""
    requests = ledgers[0]
    said = []
    if len(ledgers) > 1:
        said.append(
            f"{len(ledgers)} ledgers were given. What is said of requests is of the first; the "
            "figures are of all."
        )
    path, last = standing(requests), requests[-1]
    kept = sum(request.kind == "remove" for request in path)
    n = None if last.n_retained is None else last.n_retained + last.n_removed
    sentence = (
        f"{last.n_removed}{f' of {n}' if n is not None else ''} training samples "
        f"{'is' if last.n_removed == 1 else 'are'} removed from the model, by "
        f"{_count(kept, 'request')}."
    )
    rolled_back = sum(request.kind == "rollback" for request in requests)
    if rolled_back:
        sentence += (
            f" {_count(rolled_back, 'rollback')} took earlier requests back: samples removed only "
            "in those are in the model again."
        )
    said.append(sentence)
    skipped = [request for request in path if request.skipped]
    if skipped:
        one = len(skipped) == 1
        which = listed([str(request.number) for request in skipped])
        kinds = {request.kind for request in skipped}  # a removal may be taken back in part
        if kinds == {"skip"}:
            them = "it" if one else "them"
        elif kinds == {"remove"}:
            them = "a part of it" if one else "a part of each"
        else:
            them = "them or parts of them"
        sentence = (
            f"FAILED: {_count(len(skipped), 'request')} ({'entry' if one else 'entries'} {which} "
            f"of the ledger) did too much harm, and the guard took {them} back."
        )
        waiting = pending(requests)
        if waiting:
            one = len(waiting) == 1
            sentence += (
                f" {_count(len(waiting), 'sample')} whose removal was asked for "
                f"{'is' if one else 'are'} still in the model: {listed([str(k) for k in waiting])}."
                f" Retrain without {'it' if one else 'them'}, or ask again."
            )
        else:
            sentence += " The samples were removed by later requests."
        said.append(sentence)
    said.append(_say_guarantee(requests))
    norms = list(curve(requests, "gradient_norm").values())
    if len(norms) > 1:
        said.append(
            "The gradient norm of the retained objective, 0 for a model trained to the end without "
            f"the samples, went from {number(norms[0])} to {number(norms[-1])}."
        )
    watched, guard = guarded([requests]), list(curve(requests, "guard").values())
    if watched is not None and len(guard) > 1:
        on = "validation" if requests[0].record.get("validation") else "retained"
        if watched == "accuracy":
            went = f"The accuracy on {on} samples went from {guard[0]:.1%} to {guard[-1]:.1%}."
        elif watched == MINUS_LOSS:
            went = (
                f"The mean loss on {on} samples went from {number(-guard[0])} to "
                f"{number(-guard[-1])}."
            )
        else:
            went = (
                f"{sentence_case(watched)} on {on} samples went from {number(guard[0])} to "
                f"{number(guard[-1])}."
            )
        said.append(went)
    times = [r.seconds for r in requests if r.asks and r.seconds is not None]
    if times:
        phases: dict[str, float] = {}
        for request in requests:
            for phase, seconds in request.phases.items() if request.asks else ():
                phases[phase] = phases.get(phase, 0.0) + seconds
        sentence = f"The requests took {duration(sum(times))}"
        if len(times) > 1:
            sentence += f", {duration(statistics.median(times))} each (median)"
        if phases and sum(phases.values()) > 0:
            longest = max(phases, key=lambda phase: phases[phase])
            sentence += (
                f"; {percent(phases[longest] / sum(phases.values()))} of it went into {longest}"
            )
        said.append(sentence + ".")
    return said + _say_solves(requests, path)


def _say_solves(requests: Sequence[Request], path: Sequence[Request]) -> list[str]:
    """Sentences on linear systems that were not solved to the end: as set, or without intent."""
    most = (requests[0].record.get("settings") or {}).get("max_iterations")
    as_set: list[float] = []
    bad: list[float] = []
    for request in path:
        residual = as_number(request.result.get("solve_residual"))
        if request.kind == "remove" and residual is not None and residual > 0.1:
            early = most is not None and request.result.get("solve_method", "cg") == "cg"
            (as_set if early else bad).append(residual)
    said = []
    if most is not None and as_set:
        said.append(
            f"In {_count(len(as_set), 'request')} conjugate gradients ended after "
            f"{_count(most, 'iteration')}, as set by max_iterations, at a relative residual of up "
            f"to {number(max(as_set))}."
        )
    if bad:
        said.append(
            f"The linear systems of {_count(len(bad), 'request')} were solved to no better than a "
            f"residual of {number(max(bad))} (relative): those steps are far from the Newton step."
        )
    return said


def _say_guarantee(requests: Sequence[Request]) -> str:
    releases = [request for request in requests if request.kind == "release"]
    if not releases:
        return (
            "Guarantee: none, the deletion is heuristic. No model was released with noise, and the "
            "numbers here are measurements, not proofs."
        )
    found = [request.record.get("guarantee") or {} for request in releases]
    certified = [one for one in found if one.get("kind") == "certified"]
    budget = releases[-1].record.get("budget") or {}
    spent = ""
    if as_number(budget.get("epsilon_sum")) is not None:
        spent = (
            f" The releases add up to at most epsilon {number(budget['epsilon_sum'])}, delta "
            f"{number(budget['delta_sum'])}; the budget is epsilon {number(budget['epsilon'])}, "
            f"delta {number(budget['delta'])}."
        )
    newest = found[-1]
    terms = ", ".join(
        f"{name} {number(newest[name])}"
        for name in ("epsilon", "delta")
        if as_number(newest.get(name)) is not None
    )
    if len(certified) == len(found):
        text = (
            f"Guarantee: certified, {_count(len(found), 'release')}; the newest with {terms}, if "
            "its assumptions hold (see below). It is of the released copies, not of the model that "
            "the unlearner keeps, which has no noise."
        )
    else:
        some = f"{len(found) - len(certified)} of {len(found)} releases"
        text = (
            "Guarantee: heuristic. No theorem stands behind the noise of "
            f"{'the release' if len(found) == 1 else some}"
        )
        reasons = list(
            dict.fromkeys(
                str(reason)
                for one in found
                if one.get("kind") != "certified"
                for reason in one.get("reasons") or ()
            )
        )
        shown = reasons[:_REASONS]
        if len(reasons) > _REASONS:
            shown.append(f"and {len(reasons) - _REASONS} more reasons, in report.json")
        text += f": {'; '.join(shown)}." if shown else "."
        if terms:
            text += f" The newest had the noise for {terms}."
    return text + spent


def _say_comparison(comparison: Comparison) -> list[str]:
    said = [_say_setting(comparison)]
    no_op, retrained = comparison.find(NO_OP), comparison.find(RETRAINED)
    methods = comparison.candidates()
    failed = [method for method in methods if method.errors]
    for method in failed:
        said.append(f"FAILED: {_named(method)}: {'; '.join(method.errors).rstrip(': ')}.")
    for method in methods:
        if method.n_skipped:
            often = (
                f" in {method.n_skipped} of {_count(method.n_evaluations, 'evaluation')}"
                if method.n_evaluations > 1
                else ""
            )
            said.append(
                f"FAILED: {_named(method)} was skipped{often}: its step did too much harm, was "
                "taken back, and the samples are still in that model."
            )
    broken = [m for m in comparison.methods if m.not_finite]
    if broken:
        said.append(
            "Not finite, and left out of the means: "
            + "; ".join(f"{_named(m)} ({', '.join(m.not_finite)})" for m in broken)
            + "."
        )
    told = [metric for metric in _GAPS if no_op is not None and metric in no_op.metrics]
    for metric in told[:2]:
        said.extend(_say_gap(comparison, metric))
    said.extend(_say_chance(methods, told))
    reference = retrained.metrics.get("accuracy_test") if retrained else None
    measured = [m for m in methods if "accuracy_test" in m.metrics]
    if reference is not None and measured:
        worse = sorted(
            (m for m in measured if m.metrics["accuracy_test"].mean < reference.mean - _POINT),
            key=lambda m: m.metrics["accuracy_test"].mean,
        )
        sentence = f"Test accuracy: retrained models {reference.mean:.1%}. "
        if worse:
            sentence += "More than a point below: " + ", ".join(
                f"{_named(m)} ({m.metrics['accuracy_test'].mean:.1%})" for m in worse
            )
            sentence += "."
        else:
            sentence += "No method is more than a point below."
        said.append(sentence)
    auc = retrained.metrics.get("mia_auc") if retrained else None
    tested = [m for m in methods if "mia_auc" in m.metrics]
    if auc is not None and tested:
        near = min(tested, key=lambda m: abs(m.metrics["mia_auc"].mean - auc.mean))
        before = no_op.metrics.get("mia_auc") if no_op else None
        said.append(
            f"Membership inference (AUC): retrained models {auc.mean:.3f}"
            + (f", original model {before.mean:.3f}" if before is not None else "")
            + f"; nearest to retraining {_named(near)} with {near.metrics['mia_auc'].mean:.3f}."
        )
    said.append("An evaluation measures what it looks at. It is evidence, not a guarantee.")
    return said


def _say_setting(comparison: Comparison) -> str:
    counts = comparison.counts
    sentence = "Compared with retraining"
    if "n_forget" in counts and "n_retain" in counts:
        totals = [a + b for a, b in zip(counts["n_forget"], counts["n_retain"], strict=False)]
        sentence = f"{_range(counts['n_forget'])} of {_range(totals)} training samples are deleted"
    if comparison.n_evaluations > 1:
        sentence += f", in each of {comparison.n_evaluations} evaluations"
    if "n_retrained" in counts:
        models = counts["n_retrained"]
        sentence += f"; {_range(models)} models retrained without them are the yardstick"
        if max(models) < 3:
            sentence += ", too few to say how much these differ"
    return sentence + "."


def _say_gap(comparison: Comparison, metric: str) -> list[str]:
    no_op, retrained = comparison.find(NO_OP), comparison.find(RETRAINED)
    assert no_op is not None
    sentence = f"{_GAPS[metric]}: {number(no_op.metrics[metric].mean)} without any deletion"
    if not metric.startswith("js") and retrained is not None and metric in retrained.metrics:
        sentence += f", {number(retrained.metrics[metric].mean)} retrained"
    if metric in comparison.floor:
        floor = number(comparison.floor[metric].mean)
        sentence += f"; retrained models differ by {floor} among themselves (the floor)"
    methods = sorted(
        (m for m in comparison.candidates() if metric in m.gap_closed),
        key=lambda m: -m.gap_closed[metric].mean,
    )
    if not methods:
        if comparison.candidates():
            sentence += ". This measure cannot tell here whether anything was deleted"
        return [sentence + "."]

    def told(method: Method) -> str:
        text = _closed(method, metric)
        if method.share is not None:
            text += f" in {percent(method.share.mean)} of the time of retraining"
        return text

    best = methods[0]
    if best.gap_closed[metric].mean <= 0:
        said = [f"{sentence}. No method closes any of the gap beyond the floor."]
    else:
        said = [
            f"{sentence}. Of the gap beyond the floor, {_named(best)} closes most: {told(best)}."
        ]
        quicker = [best]  # each nearer to retraining than all that are quicker still
        for method in methods[1:]:
            share, least = method.share, quicker[-1].share
            if share is not None and least is not None and share.mean < least.mean:
                quicker.append(method)
        quicker = [m for m in quicker[1:] if m.gap_closed[metric].mean > 0]
        if quicker:
            said.append(
                "Quicker, and less near: "
                + "; ".join(f"{_named(m)}, {told(m)}" for m in quicker)
                + "."
            )
    away = [m for m in methods if m.gap_closed[metric].mean < 0]
    if away:
        said.append(
            "Farther from retraining than no deletion at all: "
            + ", ".join(f"{_named(m)} ({_closed(m, metric)})" for m in away)
            + "."
        )
    return said


def _say_chance(methods: Sequence[Method], metrics: Sequence[str]) -> list[str]:
    """How methods that select units do beside those that draw them at random."""
    for metric in metrics:
        masked = [m for m in methods if m.is_masked and metric in m.gap_closed]
        chance = [m for m in masked if "random" in m.name.lower()]
        chosen = [m for m in masked if m not in chance]
        if chance and chosen:

            def told(method: Method, metric: str = metric) -> str:
                parts = [part for part, _ in method.units.values()]
                share = sum(parts) / sum(of for _, of in method.units.values())
                return (
                    f"{_named(method)} {_closed(method, metric)} with {percent(share)} of all units"
                )

            return [
                f"Selection beside chance ({_GAPS[metric].split(' (')[0].lower()}, closed gap): "
                f"units at random, {'; '.join(map(told, chance))}; selected units, "
                f"{'; '.join(map(told, chosen))}."
            ]
    return []


def _named(method: Method) -> str:
    return f'"{method.name}"'


def _closed(method: Method, metric: str) -> str:
    stat = method.gap_closed[metric]
    return percent(stat.mean) + (f" (sd {percent(stat.sd)})" if stat.sd is not None else "")


def _count(n: int, noun: str) -> str:
    return f"{n} {noun}{'' if n == 1 else 's'}"


def _range(values: Sequence[int]) -> str:
    low, high = min(values), max(values)
    return f"{low}" if low == high else f"{low} to {high}"


# --- Markdown ----------------------------------------------------------------------------------


def _markdown(
    title: str,
    created: str,
    summary: Sequence[str],
    comparison: Comparison | None,
    evaluations: Sequence[Mapping[str, Any]],
    ledgers: Sequence[Sequence[Request]],
    images: Mapping[str, bytes],
) -> bytes:
    parts = [
        f"# {_escape(title)}",
        f"Written {created} by lcodec_ext {__version__}. All numbers: report.json.",
        "## In short",
        "\n".join(f"- {_escape(sentence)}" for sentence in summary),
    ]
    if comparison is not None:
        parts += ["## Methods", *_method_tables(comparison)]
        parts += _images(images, _METHOD_FIGURES, _notes(comparison))
    if ledgers:
        parts += ["## Requests", *_request_tables(ledgers)]
        parts += _images(images, _REQUEST_FIGURES)
    settings = [requests[0].record.get("settings") or {} for requests in ledgers]
    for evaluation in evaluations:  # those of the methods are long, and in report.json
        given = evaluation.get("settings") or {}
        settings.append({key: given[key] for key in given if key != "methods"})
    if any(settings):
        parts += ["## Settings", *(_code(one) for one in settings if one)]
    return ("\n\n".join(parts) + "\n").encode()


def _escape(text: str) -> str:
    """Text that Markdown shows as it is, on one line."""
    text = " ".join(text.split())
    for sign in ("\\", "`", "*", "_", "|", "<", "[", "#"):
        text = text.replace(sign, f"\\{sign}")
    return text


def _code(settings: Mapping[str, Any]) -> str:
    return f"```json\n{json.dumps(as_json(settings), indent=1)}\n```"


def _images(
    images: Mapping[str, bytes],
    captions: Mapping[str, tuple[str, str]],
    notes: Mapping[str, str] | None = None,
) -> list[str]:
    parts = []
    for name, (heading, caption) in captions.items():
        if name in images:
            parts += [f"### {heading}", f"![{heading}]({name})", caption]
            if notes and name in notes:
                parts.append(notes[name])
    return parts


def _notes(comparison: Comparison) -> dict[str, str]:
    """Which methods a figure leaves out, and why."""
    reasons: dict[str, list[str]] = {}
    for method in comparison.candidates():
        timed = method.share is not None and method.share.mean > 0
        if timed and any(metric in method.gap_closed for metric in _IN_GAPS):
            continue
        if method.errors:
            reason = "failed"
        elif method.seconds is None:
            reason = "no time on record, as of a model that was given"
        elif not timed:
            reason = "took no time, as a share of retraining"
        else:
            reason = "no closed gap on record"
        reasons.setdefault(reason, []).append(method.name)
    if not reasons:
        return {}
    without = "; ".join(f"{_escape(listed(names))} ({why})" for why, names in reasons.items())
    return {"figure_gap.png": f"Not in this figure: {without}."}


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table, its first column to the left and the others to the right."""
    lines = [head, *rows]
    widths = [max(3, *(len(line[k]) for line in lines)) for k in range(len(head))]

    def laid_out(line: Sequence[str]) -> str:
        cells = [line[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True)]
        return f"| {' | '.join(cells)} |"

    rule = [":" + "-" * (widths[0] - 1), *("-" * (width - 1) + ":" for width in widths[1:])]
    return "\n".join([laid_out(head), f"| {' | '.join(rule)} |", *map(laid_out, rows)])


_Get = Callable[[Method], Stat | None]


def _method_tables(comparison: Comparison) -> list[str]:
    def metric(name: str) -> _Get:
        return lambda method: method.metrics.get(name)

    def closed(name: str) -> _Get:
        return lambda method: method.gap_closed.get(name) if method.name != RETRAINED else None

    tables: list[tuple[str, list[tuple[str, _Get, Callable[[float], str]]]]] = [
        (
            "Accuracy, loss, and membership inference:",
            [
                (f"{what} {on}", metric(f"{key}_{on}"), form)
                for key, what, form in (
                    ("accuracy", "accuracy", lambda x: f"{x:.1%}"),
                    ("loss", "loss", number),
                )
                for on in ("forget", "retain", "test")
            ]
            + [("MIA AUC", metric("mia_auc"), lambda x: f"{x:.3f}")],
        ),
        (
            "Nearness to retraining (distances: lower is nearer; closed gap: 0% is the original "
            "model, 100% a retrained one, and random differences of retrained models are taken "
            "off), and time:",
            [
                ("JS forget", metric("js_forget"), lambda x: f"{x:.3f}"),
                ("JS test", metric("js_test"), lambda x: f"{x:.3f}"),
                ("closed, JS forget", closed("js_forget"), percent),
                ("closed, loss forget", closed("loss_forget"), percent),
                ("gradient norm", metric("gradient_norm"), number),
                ("relearn steps", metric("relearn_steps"), number),
                ("time", lambda method: method.seconds, duration),
                ("of retraining", lambda method: method.share, percent),
            ],
        ),
    ]
    parts = []
    for heading, columns in tables:
        columns = [
            column
            for column in columns
            if any(column[1](m) is not None for m in comparison.methods)
        ]
        if not columns:
            continue
        rows = []
        for method in comparison.methods:
            note = " (skipped)" if method.n_skipped else " (failed)" if method.errors else ""
            rows.append(
                [_escape(method.name) + note, *(_cell(g(method), f) for _, g, f in columns)]
            )
        floor = [comparison.floor.get(name.lower().replace(" ", "_")) for name, _, _ in columns]
        if heading.startswith("Nearness") and any(floor):
            rows.append(
                ["floor", *(_cell(s, f) for s, (_, _, f) in zip(floor, columns, strict=True))]
            )
        parts += [heading, _table(["method", *(name for name, _, _ in columns)], rows)]
    if comparison.n_evaluations > 1:
        parts.append(f"Means ± standard deviations of {comparison.n_evaluations} evaluations.")
    elif any(s.sd is not None for m in comparison.methods for s in m.metrics.values()):
        parts.append("±: standard deviation over the retrained models.")
    return parts


def _cell(stat: Stat | None, form: Callable[[float], str]) -> str:
    if stat is None:
        return "-"
    return form(stat.mean) + (f" ± {form(stat.sd)}" if stat.sd is not None else "")


def _request_tables(ledgers: Sequence[Sequence[Request]]) -> list[str]:
    parts = []
    for k, requests in enumerate(ledgers):
        if len(ledgers) > 1:
            parts.append(f"Ledger {k}:")
        shown = list(requests)
        if len(shown) > _TABLE_ROWS:
            shown = [*shown[: _TABLE_ROWS // 3], *shown[-2 * _TABLE_ROWS // 3 :]]
            parts.append(
                f"The first and last of {len(requests)} entries; all of them are in requests.csv."
            )
        stands = {request.number for request in standing(requests)}
        rows = [_request_row(request, request.number in stands) for request in shown]
        head = ["entry", "kind", "time", "samples", "removed", "pending", "loss forget"]
        head += ["loss retain", "gradient norm", "units", "took"]
        parts.append(_table(head, rows))
        newest = next((r for r in reversed(requests) if r.kind == "release"), None)
        assumptions = (newest.record.get("guarantee") or {}).get("assumptions") if newest else None
        if assumptions:
            parts += ["The newest release rests on:", _code(assumptions)]
    parts.append(
        "Losses and gradient norms are of the model before and after. The ledger was not verified "
        "for this report; `verify_ledger` does that."
    )
    return parts


def _request_row(request: Request, stands: bool) -> list[str]:
    def change(name: str) -> str:
        before, after = request.change(name)
        if before is None and after is None:
            return "-"
        return " → ".join("-" if x is None else number(x) for x in (before, after))

    kind = request.kind
    if kind == "remove" and request.skipped:
        kind += f", {len(request.skipped)} SKIPPED"
    if not stands:
        kind += " (rolled back)"
    if request.kind == "rollback":
        kind = f"rollback to {request.record['to']}"
    units = request.units
    ids = [str(sample) for sample in request.ids]
    return [
        str(request.number),
        kind.replace("skip", "SKIPPED"),
        (request.time or "-")[:19].replace("T", " "),
        listed(ids, 3) if ids else "-",
        str(request.n_removed),
        str(request.n_pending),
        change("loss_forget"),
        change("loss_retain"),
        change("gradient_norm"),
        "-" if units is None else str(sum(map(len, units.values()))),
        "-" if request.seconds is None else duration(request.seconds),
    ]

"""What a report is made from: evaluations and ledgers, read, checked, and combined over seeds."""

import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lcodec_ext._checks import first_few
from lcodec_ext._files import numbers_of
from lcodec_ext.curvature.parameters import is_parameters
from lcodec_ext.evaluation.evaluate import FORMAT, share_of_retraining
from lcodec_ext.evaluation.methods import NO_OP, RETRAINED
from lcodec_ext.unlearning.stream.ledger import LEDGER_FILE
from lcodec_ext.unlearning.stream.verify import Verification, verify_ledger

_MINUS_LOSS = "minus the mean loss"  # what a guard watches where there is no accuracy

# ---------------------------------------------------------------------------------------------
# Evaluations


@dataclass(frozen=True)
class Stat:
    """Mean and standard deviation of a quantity; a single value has none."""

    mean: float
    sd: float | None
    n: int


@dataclass(frozen=True)
class CombinedMethod:
    """A method, its numbers combined over evaluations; what is not finite is left out.

    `share_of_retraining` refers to time; `units_per_layer` has (selected, of); `not_finite` names
    what was infinite or NaN somewhere.
    """

    name: str
    n_evaluations: int
    n_skipped: int
    errors: list[str]
    not_finite: list[str]
    seconds: Stat | None
    share_of_retraining: Stat | None
    metrics: dict[str, Stat]
    gap_closed: dict[str, Stat]
    units_per_layer: dict[str, tuple[float, float]]
    phases: dict[str, float]
    losses: dict[str, list[float]]


def as_number(value: object) -> float | None:
    """The value as a float if it is a number, infinite ones and NaN included."""
    if isinstance(value, bool) or value is None:
        return None
    try:
        return float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return None


def finite_of(values: Iterable[object] | None) -> list[float]:
    """Those of the values that are finite numbers."""
    numbers = [as_number(value) for value in values or ()]
    return [value for value in numbers if value is not None and math.isfinite(value)]


def _stat(values: Iterable[object], sd: object = None) -> Stat | None:
    """Statistics of the finite values; a single value keeps its `sd`."""
    found = finite_of(values)
    if not found:
        return None
    spread = statistics.stdev(found) if len(found) > 1 else as_number(sd)
    return Stat(statistics.fmean(found), spread, len(found))


def stats(
    parts: Sequence[Mapping[str, Any]], spread: Mapping[str, Any] | None = None
) -> dict[str, Stat]:
    """Statistics of each quantity that at least one of the parts has."""
    keys = dict.fromkeys(key for part in parts for key in part)
    found = {key: _stat((p.get(key) for p in parts), (spread or {}).get(key)) for key in keys}
    return {key: stat for key, stat in found.items() if stat is not None}


def combine(evaluations: Sequence[Mapping[str, Any]]) -> list[CombinedMethod]:
    """The methods of evaluations that differ in seed or forget set, "retrained" last."""
    named: dict[str, list[tuple[Mapping[str, Any], Mapping[str, Any]]]] = {}
    for evaluation in evaluations:
        for method in evaluation["methods"]:
            named.setdefault(method["name"], []).append((method, evaluation))
    order = sorted(named, key=lambda name: (name == RETRAINED) - (name == NO_OP))
    return [_combine_method(name, named[name]) for name in order]


def _combine_method(
    name: str, pairs: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]]
) -> CombinedMethod:
    methods = [method for method, _ in pairs]

    def parts(field: str) -> list[Mapping[str, Any]]:
        return [method.get(field) or {} for method in methods]

    layers: dict[str, list[Sequence[float]]] = {}
    for part in parts("units_per_layer"):
        for layer, pair in part.items():
            layers.setdefault(layer, []).append(pair)
    losses: dict[str, list[float]] = {}
    not_finite = set()
    for part in parts("losses"):
        for key, values in part.items():
            losses.setdefault(key, []).extend(finite_of(values))
            if len(finite_of(values)) < len(values):
                not_finite.add(f"losses of {key} samples")
    for part in parts("metrics"):
        numbers = {key: as_number(value) for key, value in part.items()}
        not_finite |= {k for k, v in numbers.items() if v is not None and not math.isfinite(v)}
    phases = {key: stat.mean for key, stat in stats(parts("phases")).items()}
    return CombinedMethod(
        name=name,
        n_evaluations=len(methods),
        n_skipped=sum(bool(method.get("skipped")) for method in methods),
        errors=list(dict.fromkeys(str(m["error"]) for m in methods if m.get("error"))),
        not_finite=sorted(not_finite),
        seconds=_stat(method.get("seconds") for method in methods),
        share_of_retraining=_stat(share_of_retraining(*pair) for pair in pairs),
        metrics=stats(parts("metrics"), methods[0].get("spread")),
        gap_closed=stats(parts("gap_closed")),
        units_per_layer={
            layer: (statistics.fmean(c for c, _ in found), statistics.fmean(of for _, of in found))
            for layer, found in layers.items()
        },
        phases=without_total(phases),
        losses=losses,
    )


def without_total(phases: Mapping[str, Any]) -> dict[str, float]:
    """The phases of a time split; what "total" has beyond their sum is "other"."""
    split = {key: found[0] for key, value in phases.items() if (found := finite_of([value]))}
    total = split.pop("total", 0.0)
    rest = total - sum(split.values())
    if rest > 0.01 * total:
        split["other"] = split.get("other", 0.0) + rest
    return split


def read_evaluations(value: object) -> list[dict[str, Any]]:
    """One evaluation or several, each an `Evaluation`, its dict, or a file with its JSON."""
    if value is None:
        return []
    if isinstance(value, (list, tuple)):
        if not value:
            raise ValueError("evaluation must have at least one evaluation; got an empty sequence")
        return [_read_evaluation(item, f"evaluation[{k}]") for k, item in enumerate(value)]
    return [_read_evaluation(value, "evaluation")]


def _read_evaluation(value: Any, name: str) -> dict[str, Any]:
    if isinstance(value, (str, Path)):
        path = Path(value)
        if not path.is_file():
            raise FileNotFoundError(
                f"{name} must be the path of a JSON file; there is none at {path}"
            )
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{name}: {path} is not JSON: {error}") from None
    elif hasattr(value, "to_dict"):
        value = value.to_dict()
    if not isinstance(value, Mapping) or "methods" not in value:
        raise ValueError(
            f"{name} must be an Evaluation, its to_dict(), which has 'methods', or the path of its "
            f"JSON; got {type(value).__name__}"
        )
    if value.get("format") != FORMAT:
        raise ValueError(
            f"{name} has format {value.get('format')!r}; this version reads format {FORMAT}"
        )
    methods = value["methods"]
    try:
        names = [method["name"] for method in methods]
    except (TypeError, KeyError):
        names = []
    if not names or not all(isinstance(each, str) for each in names):
        raise ValueError(f"{name}['methods'] must be a list of dicts, each with a 'name'")
    if len(set(names)) < len(names):
        twice = sorted({each for each in names if names.count(each) > 1})
        raise ValueError(f"the methods of {name} must have different names; twice: {twice}")
    return dict(value)


# ---------------------------------------------------------------------------------------------
# Ledgers


class ReportEntry:
    """An entry of a ledger, with what a report needs of it; None for what it does not have."""

    def __init__(self, entry: Mapping[str, Any]) -> None:
        self.entry = entry
        self.number: int = entry["number"]
        self.kind: str = entry["kind"]
        self.record: Mapping[str, Any] = entry["record"]
        self.result: Mapping[str, Any] = self.record.get("result") or {}
        environment = entry.get("environment") or {}
        self.time: str | None = environment.get("time")
        self.released: str | None = environment.get("released")
        heard = environment.get("warnings")
        self.warnings: list[str] | None = None if heard is None else list(map(str, heard))
        self.weights: str | None = (self.record.get("checkpoint") or {}).get("sha256")
        self.calibration: Mapping[str, Any] = self.result.get("calibration") or {}
        self.ids: list[int] = list(self.record.get("ids") or ())
        named = self.record.get("groups") or () if self.asks else ()
        self.groups = [str(group["id"]) for group in named]
        self.skipped = list(self.record.get("skipped", self.ids if self.kind == "skip" else ()))
        self.n_removed: int = self.record.get("n_removed", 0)
        self.n_pending: int = self.record.get("n_pending", 0)
        self.n_retained: int | None = self.record.get("n_retained")
        seconds = environment.get("seconds") or {}
        self.phases = without_total(seconds)
        total = as_number(seconds.get("total"))
        self.seconds = total if total is not None else sum(self.phases.values()) or None
        selection = self.record.get("selection")
        self.units: dict[str, set[int]] | None = None
        if selection is not None and not is_parameters(selection):
            self.units = {layer: _numbers(ranges) for layer, ranges in selection.items()}

    @property
    def asks(self) -> bool:
        """Whether it is a request to remove samples, granted or not."""
        return self.kind in ("remove", "skip")

    @property
    def guarantee(self) -> Mapping[str, Any]:
        """What a release, or the result, says of its guarantee."""
        return self.record.get("guarantee") or self.result.get("guarantee") or {}

    def change(self, name: str) -> tuple[float | None, float | None]:
        """What the result has under this name, before and after.

        "watched" is what the guard watched; on record is the negative of a loss.
        """
        pair = self.result.get("guard" if name == "watched" else name)
        if not isinstance(pair, Sequence) or isinstance(pair, str) or len(pair) != 2:
            return None, None
        before, after = map(as_number, pair)
        if name == "watched" and self.result.get("watched") == _MINUS_LOSS:
            before, after = (value if value is None else -value for value in (before, after))
        return before, after


class ReportLedger(list[ReportEntry]):
    """The entries of a ledger, and what `verify_ledger` said where its folder is known."""

    verification: Verification | None = None


def _numbers(ranges: str | Iterable[int]) -> set[int]:
    """The numbers that "0-15,17" stands for."""
    if not isinstance(ranges, str):
        return set(ranges)
    return set(map(int, numbers_of(ranges))) if ranges else set()


def read_ledgers(value: object) -> list[ReportLedger]:
    """One ledger or several, each its entries, an `Unlearner`, its folder, or the file in it."""
    if value is None:
        return []
    if isinstance(value, (list, tuple)):
        if not value:
            raise ValueError("ledger must have at least one entry; got an empty sequence")
        if _fields(value[0]) is None:
            return [_read_ledger(item, f"ledger[{k}]") for k, item in enumerate(value)]
    return [_read_ledger(value, "ledger")]


def _fields(entry: object) -> Mapping[str, Any] | None:
    """An entry, or its dict, as a dict; None if it is something else."""
    if not isinstance(entry, Mapping):
        entry = getattr(entry, "__dict__", {})
    return entry if {"number", "kind", "record"} <= entry.keys() else None


def _read_ledger(value: Any, name: str) -> ReportLedger:
    entries = getattr(value, "ledger", value)
    file = getattr(entries, "path", None)
    if isinstance(entries, (str, Path)):
        file = Path(entries) / LEDGER_FILE if Path(entries).is_dir() else Path(entries)
        entries = _read_lines(file, name)
    listed = isinstance(entries, Iterable) and not isinstance(entries, Mapping)
    fields = [_fields(entry) for entry in entries] if listed else [None]
    if not fields:
        raise ValueError(f"{name} must have at least one entry; it has none")
    requests = ReportLedger()
    for number, found in enumerate(fields):
        if found is None:
            raise ValueError(
                f"{name} must be an Unlearner, its folder, or the entries of its ledger; got "
                f"{type(value).__name__}"
            )
        if found["number"] != number:
            raise ValueError(
                f"{name} must be a whole ledger, with entries 0, 1, 2, ...; entry {number} has "
                f"the number {found['number']!r}"
            )
        requests.append(ReportEntry(found))
    if file is not None and file.name == LEDGER_FILE:
        requests.verification = verify_ledger(file.parent)
    return requests


def _read_lines(file: Path, name: str) -> list[Any]:
    if not file.is_file():
        raise FileNotFoundError(
            f"{name} must be the folder of an Unlearner, with {LEDGER_FILE}; there is none at "
            f"{file}"
        )
    entries = []
    # What is behind the last newline was cut short: the process was killed in writing it.
    for number, line in enumerate(file.read_text(encoding="utf-8").split("\n")[:-1], start=1):
        try:
            entries.append(json.loads(line))
        except ValueError as error:
            raise ValueError(f"{name}: line {number} of {file} is not JSON: {error}") from None
    return entries


def delivered_of(
    evaluations: Sequence[Mapping[str, Any]],
    ledgers: Sequence[ReportLedger],
    name: str | None,
) -> str | None:
    """The method whose model was delivered: by its weights, or by name where they are not known."""
    known = {m["name"]: m.get("sha256") for one in evaluations for m in one["methods"]}
    if name is not None and (name not in known or name in (NO_OP, RETRAINED)):
        raise ValueError(
            f"delivered must be a method of the evaluation; got {name!r}, and there are "
            f"{first_few(sorted(known.keys() - {NO_OP, RETRAINED}), 10) or 'none'}"
        )
    last = {sha for one in ledgers for sha in (one[-1].weights, one[-1].released) if sha}
    found = [
        {m["name"] for m in one["methods"] if m.get("sha256") in last and m["name"] != NO_OP}
        for one in evaluations
    ]
    same = set.intersection(*found) if found else set()
    if name is None:
        return min(same) if same else None
    if last and name not in same:
        raise ValueError(
            f"delivered={name!r} must have the weights of the ledger's last entry, "
            f"{first_few(sorted(last), 2)}; the evaluation has {known[name]}"
        )
    return name


def standing(requests: Sequence[ReportEntry]) -> list[ReportEntry]:
    """The entries that led to the present weights: without those that were rolled back."""
    path = []
    number = len(requests) - 1
    while number >= 0:
        request = requests[number]
        path.append(request)
        number = int(request.record["to"]) if request.kind == "rollback" else number - 1
    return path[::-1]


def pending(requests: Sequence[ReportEntry]) -> list[int]:
    """Samples whose removal was asked for and taken back by the guard, and not granted since."""
    waiting: dict[int, None] = {}
    for request in standing(requests):
        skipped = set(request.skipped)
        for sample in request.ids:
            if sample in skipped:
                waiting[sample] = None
            else:
                waiting.pop(sample, None)
    return list(waiting)


def watched(ledgers: Sequence[Sequence[ReportEntry]]) -> tuple[str, str] | None:
    """What the guards watched, and on which samples; None if not all watched the same."""
    what = {
        str(request.result["watched"])
        for requests in ledgers
        for request in requests
        if request.result.get("watched") and request.change("guard") != (None, None)
    }
    where = {
        "validation" if requests[0].record.get("validation") else "retained" for requests in ledgers
    }
    if len(what) != 1:
        return None
    return what.pop().replace(_MINUS_LOSS, "mean loss"), " or ".join(sorted(where))


def curve(requests: Sequence[ReportEntry], name: str) -> dict[int, float]:
    """A quantity of the model, by the number of samples that were removed from it.

    It is of the entries that stand; skipped requests left the model as it was.
    """
    points: dict[int, float] = {}
    removed = 0
    for request in standing(requests):
        if request.kind == "remove":
            before, after = request.change(name)
            if finite_of([before]):
                points.setdefault(removed, before)  # type: ignore[arg-type]
            if finite_of([after]):
                points[request.n_removed] = after  # type: ignore[assignment]
        removed = request.n_removed
    return points

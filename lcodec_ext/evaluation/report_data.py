"""Evaluations and ledgers as a report needs them: read, checked, and combined over seeds."""

import json
import math
import statistics
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

NO_OP, RETRAINED = "no-op", "retrained"
MINUS_LOSS = "minus the mean loss"  # what a guard watches where there is no accuracy
LEDGER_FILE = "ledger.jsonl"
_FORMAT = 1


class Request:
    """An entry of a ledger, with what a report needs of it; None for what it does not have."""

    def __init__(self, entry: Mapping[str, Any]) -> None:
        self.entry = entry
        self.number: int = entry["number"]
        self.kind: str = entry["kind"]
        self.record: Mapping[str, Any] = entry["record"]
        self.result: Mapping[str, Any] = self.record.get("result") or {}
        environment = entry.get("environment") or {}
        self.time: str | None = environment.get("time")
        self.ids: list[int] = list(self.record.get("ids") or ())
        skipped = self.record.get("skipped", self.ids if self.kind == "skip" else ())
        self.skipped: list[int] = list(skipped)
        self.n_removed: int = self.record.get("n_removed", 0)
        self.n_pending: int = self.record.get("n_pending", 0)
        self.n_retained: int | None = self.record.get("n_retained")
        seconds = environment.get("seconds") or {}
        self.phases = without_total(seconds)
        total = as_number(seconds.get("total"))
        self.seconds = total if total is not None else sum(self.phases.values()) or None

    @property
    def asks(self) -> bool:
        """Whether it is a request to remove samples, granted or not."""
        return self.kind in ("remove", "skip")

    @property
    def units(self) -> dict[str, set[int]] | None:
        """The selected units of each layer."""
        selection = self.record.get("selection")
        if selection is None:
            return None
        return {layer: _numbers(ranges) for layer, ranges in selection.items()}

    def change(self, name: str) -> tuple[float | None, float | None]:
        """What the result has under this name, before and after."""
        pair = self.result.get(name)
        if isinstance(pair, Sequence) and not isinstance(pair, str) and len(pair) == 2:
            return as_number(pair[0]), as_number(pair[1])
        return None, None


def _numbers(ranges: str | Iterable[int]) -> set[int]:
    """The numbers that "0-15,17" stands for."""
    if not isinstance(ranges, str):
        return set(ranges)
    numbers: set[int] = set()
    for part in filter(None, ranges.split(",")):
        first, _, last = part.partition("-")
        numbers.update(range(int(first), int(last or first) + 1))
    return numbers


class Stat(NamedTuple):
    """Mean and standard deviation of a quantity; no deviation of a single value."""

    mean: float
    sd: float | None
    n: int


class Band(NamedTuple):
    """Mean, lowest and highest of several curves at each number of removed samples."""

    removed: list[int]
    mean: list[float]
    low: list[float]
    high: list[float]


@dataclass(frozen=True)
class Method:
    """A method, its numbers combined over evaluations.

    `share` is the time as a share of retraining; `units` has (selected, of) for each layer.
    `not_finite` names metrics that were infinite or NaN somewhere; they are left out of the means.
    `errors` says why it failed, where it did.
    """

    name: str
    n_evaluations: int
    n_skipped: int
    seconds: Stat | None
    share: Stat | None
    metrics: dict[str, Stat]
    gap_closed: dict[str, Stat]
    units: dict[str, tuple[float, float]]
    phases: dict[str, float]
    losses: dict[str, list[float]]
    not_finite: tuple[str, ...]
    errors: tuple[str, ...]

    @property
    def is_masked(self) -> bool:
        """Whether it changes some units and not others."""
        return bool(self.units) and any(chosen < of for chosen, of in self.units.values())


@dataclass(frozen=True)
class Comparison:
    """Evaluations of the same methods, combined by the methods' names; "retrained" comes last."""

    n_evaluations: int
    counts: dict[str, list[int]]
    floor: dict[str, Stat]
    methods: list[Method]

    def find(self, name: str) -> Method | None:
        """The method of this name."""
        return next((method for method in self.methods if method.name == name), None)

    def candidates(self) -> list[Method]:
        """The methods that delete: neither the no-op nor retraining."""
        return [method for method in self.methods if method.name not in (NO_OP, RETRAINED)]


def read_evaluations(value: object) -> list[dict[str, Any]]:
    """One evaluation or several, each an `Evaluation`, its dict, or a file with its JSON."""
    if value is None:
        return []
    if isinstance(value, (list, tuple)):
        if not value:
            raise ValueError("evaluation must have at least one evaluation; got an empty sequence")
        return [_read_evaluation(item, f"evaluation[{k}]") for k, item in enumerate(value)]
    return [_read_evaluation(value, "evaluation")]


def _read_evaluation(value: object, name: str) -> dict[str, Any]:
    if isinstance(value, (str, Path)):
        content = _read_json(Path(value), name)
    elif isinstance(value, Mapping):
        content = value
    elif hasattr(value, "to_dict"):
        content = value.to_dict()
    else:
        raise ValueError(
            f"{name} must be an Evaluation, its dict, or the path of its JSON; got "
            f"{type(value).__name__}"
        )
    if not isinstance(content, Mapping) or "methods" not in content:
        raise ValueError(f"{name} must be what Evaluation.to_dict() returns; it has no 'methods'")
    if content.get("format") != _FORMAT:
        raise ValueError(
            f"{name} has format {content.get('format')!r}; this version reads format {_FORMAT}"
        )
    methods = content["methods"]
    well_formed = isinstance(methods, Sequence) and all(
        isinstance(method, Mapping) and isinstance(method.get("name"), str) for method in methods
    )
    if not well_formed or not methods:
        raise ValueError(f"{name}['methods'] must be a list of dicts, each with a 'name'")
    names = [method["name"] for method in methods]
    twice = sorted({method for method in names if names.count(method) > 1})
    if twice:
        raise ValueError(f"the methods of {name} must have different names; twice: {twice}")
    return dict(content)


def _read_json(path: Path, name: str) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f"{name} must be the path of a JSON file; there is none at {path}")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{name}: {path} is not JSON: {error}") from None


def read_ledgers(value: object) -> list[list[Request]]:
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


def _read_ledger(value: object, name: str) -> list[Request]:
    entries = getattr(value, "ledger", value)
    if isinstance(entries, (str, Path)):
        entries = _read_lines(Path(entries), name)
    elif isinstance(entries, Mapping) or not isinstance(entries, Iterable):
        entries = [None]
    requests = []
    for number, entry in enumerate(entries):
        fields = _fields(entry)
        if fields is None:
            raise ValueError(
                f"{name} must be an Unlearner, its folder, or the entries of its ledger; got "
                f"{type(value).__name__}"
            )
        if fields["number"] != number:
            raise ValueError(
                f"{name} must be a whole ledger, with entries 0, 1, 2, ...; entry {number} has "
                f"the number {fields['number']!r}"
            )
        requests.append(Request(fields))
    if not requests:
        raise ValueError(f"{name} must have at least one entry; it has none")
    return requests


def _read_lines(path: Path, name: str) -> list[Any]:
    file = path / LEDGER_FILE if path.is_dir() else path
    if not file.is_file():
        raise FileNotFoundError(
            f"{name} must be the folder of an Unlearner, with {LEDGER_FILE}; there is none at "
            f"{file}"
        )
    entries = []
    lines = file.read_text(encoding="utf-8").split("\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            entries.append(json.loads(line))
        except ValueError as error:
            if number == len(lines):  # without its newline: the process was killed in writing it
                break
            raise ValueError(f"{name}: line {number} of {file} is not JSON: {error}") from None
    return entries


def as_number(value: object) -> float | None:
    """The value as a float if it is a number, infinite or NaN ones included."""
    if isinstance(value, bool) or value is None:
        return None
    try:
        return float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return None


def summarise(values: Iterable[float | None], sd: float | None = None) -> Stat | None:
    """Mean and deviation of the finite values; `sd` is what a single value already has."""
    finite = [value for value in values if value is not None and math.isfinite(value)]
    if not finite:
        return None
    if len(finite) > 1:
        sd = statistics.stdev(finite)
    return Stat(statistics.fmean(finite), sd, len(finite))


def combine(evaluations: Sequence[Mapping[str, Any]]) -> Comparison:
    """Combine evaluations, which differ in their seed or their forget set, by method."""
    names = dict.fromkeys(m["name"] for evaluation in evaluations for m in evaluation["methods"])
    floors = [evaluation.get("floor") or {} for evaluation in evaluations]
    floor = {}
    for metric in dict.fromkeys(key for one in floors for key in one):
        stat = summarise(as_number(one.get(metric)) for one in floors)
        if stat is not None:
            floor[metric] = stat
    counts: dict[str, list[int]] = {}
    for key in ("n_forget", "n_retain", "n_test", "n_retrained"):
        values = [evaluation[key] for evaluation in evaluations if evaluation.get(key) is not None]
        if values:
            counts[key] = values
    return Comparison(
        n_evaluations=len(evaluations),
        counts=counts,
        floor=floor,
        methods=[
            _combine_method(name, evaluations)
            for name in sorted(names, key=lambda name: (name == RETRAINED) - (name == NO_OP))
        ],
    )


def retraining_seconds(evaluation: Mapping[str, Any]) -> float | None:
    """The time of retraining, if it was taken and is not zero."""
    for method in evaluation["methods"]:
        if method["name"] == RETRAINED:
            seconds = as_number(method.get("seconds"))
            return seconds if seconds and math.isfinite(seconds) else None
    return None


def share_of_retraining(method: Mapping[str, Any], evaluation: Mapping[str, Any]) -> float | None:
    """The method's time as a share of the time of retraining in the same evaluation."""
    seconds, whole = as_number(method.get("seconds")), retraining_seconds(evaluation)
    return None if seconds is None or whole is None else seconds / whole


def _combine_method(name: str, evaluations: Sequence[Mapping[str, Any]]) -> Method:
    pairs = [
        (evaluation, method)
        for evaluation in evaluations
        for method in evaluation["methods"]
        if method["name"] == name
    ]
    methods = [method for _, method in pairs]

    def stats(field: str) -> dict[str, Stat]:
        parts = [method.get(field) or {} for method in methods]
        spread = (methods[0].get("spread") or {}) if field == "metrics" else {}
        result = {}
        for key in dict.fromkeys(key for part in parts for key in part):
            stat = summarise(
                (as_number(part.get(key)) for part in parts), as_number(spread.get(key))
            )
            if stat is not None:
                result[key] = stat
        return result

    def means(field: str) -> dict[str, float]:
        parts = [method.get(field) or {} for method in methods]
        keys = dict.fromkeys(key for part in parts for key in part)
        found = {key: summarise(as_number(part.get(key)) for part in parts) for key in keys}
        return {key: stat.mean for key, stat in found.items() if stat is not None}

    layers: dict[str, list[tuple[float, float]]] = {}
    losses: dict[str, list[float]] = {}
    not_finite = set()
    for method in methods:
        for layer, (chosen, of) in (method.get("units_per_layer") or {}).items():
            layers.setdefault(layer, []).append((float(chosen), float(of)))
        for key, values in (method.get("losses") or {}).items():
            numbers = [as_number(value) for value in values]
            finite = [v for v in numbers if v is not None and math.isfinite(v)]
            losses.setdefault(key, []).extend(finite)
            if len(finite) < len(numbers):
                not_finite.add(f"losses of {key} samples")
        for key, value in (method.get("metrics") or {}).items():
            number = as_number(value)
            if number is not None and not math.isfinite(number):
                not_finite.add(key)
    return Method(
        name=name,
        n_evaluations=len(methods),
        n_skipped=sum(bool(method.get("skipped")) for method in methods),
        seconds=summarise(as_number(method.get("seconds")) for method in methods),
        share=summarise(share_of_retraining(method, evaluation) for evaluation, method in pairs),
        metrics=stats("metrics"),
        gap_closed=stats("gap_closed"),
        units={
            layer: (
                statistics.fmean(chosen for chosen, _ in found),
                statistics.fmean(of for _, of in found),
            )
            for layer, found in layers.items()
        },
        phases=without_total(means("phases")),
        losses=losses,
        not_finite=tuple(sorted(not_finite)),
        errors=tuple(dict.fromkeys(str(m["error"]) for m in methods if m.get("error"))),
    )


def without_total(phases: Mapping[str, Any]) -> dict[str, float]:
    """The phases of a time split; what "total" has beyond their sum is "other"."""
    numbers = {key: as_number(value) for key, value in phases.items()}
    split = {
        key: value
        for key, value in numbers.items()
        if key != "total" and value is not None and math.isfinite(value)
    }
    total = numbers.get("total")
    if total is not None and math.isfinite(total):
        rest = total - sum(split.values())
        if rest > 0.01 * total:
            split["other"] = split.get("other", 0.0) + rest
    return split


def standing(requests: Sequence[Request]) -> list[Request]:
    """The entries that led to the present weights: without those that were rolled back."""
    path = []
    number = len(requests) - 1
    while number >= 0:
        request = requests[number]
        path.append(request)
        number = int(request.record["to"]) if request.kind == "rollback" else number - 1
    return path[::-1]


def pending(requests: Sequence[Request]) -> list[int]:
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


def curve(requests: Sequence[Request], name: str) -> dict[int, float]:
    """A quantity of the model, by the number of samples that were removed from it.

    It is of the entries that stand; skipped requests left the model as it was.
    """
    points: dict[int, float] = {}
    removed = 0
    for request in standing(requests):
        if request.kind == "remove":
            before, after = request.change(name)
            if before is not None and math.isfinite(before):
                points.setdefault(removed, before)
            if after is not None and math.isfinite(after):
                points[request.n_removed] = after
        removed = request.n_removed
    return points


def detours(requests: Sequence[Request], name: str) -> list[list[tuple[int, float]]]:
    """What `curve` leaves out: of each request that was rolled back, the points around it."""
    stands = {request.number for request in standing(requests)}
    found = []
    for number, request in enumerate(requests):
        if request.kind == "remove" and request.number not in stands:
            before, after = request.change(name)
            pairs = [(requests[number - 1].n_removed, before), (request.n_removed, after)]
            found.append([(m, y) for m, y in pairs if y is not None and math.isfinite(y)])
    return [points for points in found if points]


def guarded(ledgers: Sequence[Sequence[Request]]) -> str | None:
    """What the guard watched, in the words of `UnlearnResult.watched`; None if not one thing.

    What is on record of MINUS_LOSS is the negative of the loss.
    """
    watched = {
        str(request.result["watched"])
        for requests in ledgers
        for request in requests
        if request.result.get("watched") and request.change("guard") != (None, None)
    }
    return watched.pop() if len(watched) == 1 else None


def band(curves: Sequence[Mapping[int, float]]) -> Band:
    """Combine curves where all have values; between its points a curve keeps its last value."""
    result = Band([], [], [], [])
    curves = [points for points in curves if points]
    known = [sorted(points) for points in curves]
    first, last = max((at[0] for at in known), default=0), min((at[-1] for at in known), default=0)
    for m in sorted({m for points in curves for m in points if first <= m <= last}):
        values = [
            points[at[bisect_right(at, m) - 1]] for points, at in zip(curves, known, strict=True)
        ]
        result.removed.append(m)
        result.mean.append(statistics.fmean(values))
        result.low.append(min(values))
        result.high.append(max(values))
    return result


def as_json(value: Any) -> Any:
    """A copy of plain JSON values; numbers that are not finite become null."""
    if isinstance(value, Mapping):
        return {str(key): as_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [as_json(item) for item in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if hasattr(value, "tolist"):  # arrays and scalars of NumPy, tensors
        return as_json(value.tolist())
    return str(value)

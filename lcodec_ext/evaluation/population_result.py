"""What a comparison of populations of models found: its numbers and its table."""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lcodec_ext._checks import check_bool, counted
from lcodec_ext._files import json_ready
from lcodec_ext.evaluation.methods import find_method
from lcodec_ext.evaluation.metrics import Number

FORMAT = 1


@dataclass(frozen=True)
class PopulationMethod:
    """One method in a `PopulationEvaluation`.

    Attributes
    ----------
    name : str
    seconds : float or None
        Mean time of a deletion; of "retrained", of a training.
    scores : dict of str to float or None
        See `evaluate_population`. Of "retrained": what a second population of retrained models
        would score, which is what a deletion can reach.
    spread : dict of str to float or None
        Of the scores of "retrained" that compare populations: their standard deviation.
    examples : dict of str to list
        Of each removed sample: "number", "auc", "tpr", "klom", "epsilon".
    error : str or None
        Why there is nothing to score.
    """

    name: str
    seconds: Number
    scores: dict[str, Number]
    spread: dict[str, Number] = dataclasses.field(default_factory=dict)
    examples: dict[str, list[Any]] = dataclasses.field(default_factory=dict)
    error: str | None = None


_COLUMNS = (
    ("U-LiRA", "AUC", "ulira_auc", ".3f"),
    ("TPR at", "1% FPR", "ulira_tpr", ".1%"),
    ("KLoM", "forget", "klom_forget", ".2f"),
    ("", "retain", "klom_retain", ".2f"),
    ("", "test", "klom_test", ".2f"),
    ("epsilon", "(median)", "epsilon", ".2f"),
    ("forgetting", "quality", "forgetting_quality", ".3f"),
    ("challenge", "score", "challenge_score", ".3f"),
    ("accuracy", "forget", "accuracy_forget", ".1%"),
    ("", "retain", "accuracy_retain", ".1%"),
    ("", "test", "accuracy_test", ".1%"),
)


@dataclass(frozen=True, repr=False)
class PopulationEvaluation:
    """What `evaluate_population` found; its repr is a table.

    Attributes
    ----------
    methods : tuple of PopulationMethod
        "no-op", "retrained", and the methods in their order. ``evaluation["mine"]`` is one.
    n_models : int
        Of each population.
    n_forget, n_retain, n_test : int
        Samples that were removed, and those of the others that were measured.
    settings : dict
    """

    methods: tuple[PopulationMethod, ...]
    n_models: int
    n_forget: int
    n_retain: int
    n_test: int
    settings: dict[str, Any]

    def __getitem__(self, name: str) -> PopulationMethod:
        return find_method(self.methods, name)

    def to_dict(self) -> dict[str, Any]:
        """Everything as numbers, strings, lists and dicts, for JSON; infinity is None."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {"format": FORMAT, **json_ready(values)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "PopulationEvaluation":
        """The evaluation that `to_dict` wrote.

        Raises
        ------
        ValueError
            If data have another format.
        """
        if data.get("format") != FORMAT:
            raise ValueError(
                f"data must be a population evaluation of format {FORMAT}; got format "
                f"{data.get('format')!r}"
            )
        methods = []
        for entry in data["methods"]:
            found = {**entry, "scores": dict(entry["scores"]), "examples": dict(entry["examples"])}
            if "epsilon" in found["scores"] and found["scores"]["epsilon"] is None:
                found["scores"]["epsilon"] = math.inf
            if found["examples"]:
                values = found["examples"]["epsilon"]
                found["examples"]["epsilon"] = [math.inf if e is None else e for e in values]
            methods.append(PopulationMethod(**found))
        rest = {f.name: data[f.name] for f in dataclasses.fields(cls) if f.name != "methods"}
        return cls(methods=tuple(methods), **rest)

    def to_frame(self, *, examples: bool = False) -> Any:
        """A pandas DataFrame with a row for each method.

        Columns are the scores; "spread_" stands before their standard deviations.

        Parameters
        ----------
        examples : bool, default False
            A row for each method and removed sample instead, with its scores.

        Raises
        ------
        ImportError
            Without pandas, which the extra ``lcodec_ext[evaluation]`` installs.
        """
        check_bool(examples, "examples")
        try:
            import pandas
        except ImportError as error:
            raise ImportError(
                "PopulationEvaluation.to_frame needs pandas: pip install 'lcodec_ext[evaluation]'"
            ) from error
        if examples:
            parts = [pandas.DataFrame(m.examples).assign(method=m.name) for m in self.methods]
            return pandas.concat(parts).set_index(["method", "number"])
        rows = [
            {"method": m.name, "seconds": m.seconds, "error": m.error, **m.scores}
            | {f"spread_{name}": value for name, value in m.spread.items()}
            for m in self.methods
        ]
        return pandas.DataFrame(rows).set_index("method")

    def __repr__(self) -> str:
        rows = [["", *(c[line] for c in _COLUMNS), ""] for line in (0, 1)]
        for method in self.methods:
            cells = []
            for _, _, key, form in _COLUMNS:
                value = method.scores.get(key)
                cells.append("-" if value is None else format(value, form))
            note = method.error or ""
            rows.append([method.name, *cells, note if len(note) <= 60 else note[:57] + "..."])
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join(
            [
                f"Population of {self.n_models} models: {counted(self.n_forget, 'sample')} "
                f"removed; measured on them, on {self.n_retain} retained and {self.n_test} test "
                "samples",
                *(
                    "  ".join(
                        [
                            f"{row[0]:{widths[0]}}",
                            *(f"{c:>{w}}" for c, w in zip(row[1:-1], widths[1:-1], strict=True)),
                            row[-1],
                        ]
                    ).rstrip()
                    for row in rows
                ),
                'Row "retrained": what as many more retrained models would score.',
            ]
        )

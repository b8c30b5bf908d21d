"""Judge a deletion: measures against retraining, baselines, and a report."""

from lcodec_ext.evaluation.evaluate import Evaluation, MethodEvaluation, evaluate
from lcodec_ext.evaluation.methods import BASELINES, LITERATURE, Baseline
from lcodec_ext.evaluation.population import evaluate_population
from lcodec_ext.evaluation.population_result import PopulationEvaluation, PopulationMethod
from lcodec_ext.evaluation.report import Report, write_report
from lcodec_ext.evaluation.tune import GRIDS, Trial, Tuned, tune

__all__ = [
    "BASELINES",
    "GRIDS",
    "LITERATURE",
    "Baseline",
    "Evaluation",
    "MethodEvaluation",
    "PopulationEvaluation",
    "PopulationMethod",
    "Report",
    "Trial",
    "Tuned",
    "evaluate",
    "evaluate_population",
    "tune",
    "write_report",
]

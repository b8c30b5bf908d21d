"""Judge a deletion: measures against retraining, baselines, and a report."""

from lcodec_ext.evaluation.evaluate import Evaluation, MethodEvaluation, evaluate
from lcodec_ext.evaluation.methods import BASELINES, Baseline
from lcodec_ext.evaluation.report import Report, write_report

__all__ = [
    "BASELINES",
    "Baseline",
    "Evaluation",
    "MethodEvaluation",
    "Report",
    "evaluate",
    "write_report",
]

"""How good predictions are: accuracy, and what GLUE takes for its tasks."""

import numpy as np
from scipy import stats
from sklearn import metrics

from moe_atlas.errors import AtlasError

METRICS = ("accuracy", "accuracy-f1", "matthews", "pearson-spearman")


def chance(metric: str, labels: np.ndarray, classes: int) -> float:
    """The metric of the best answer that is the same for all texts with labels (n,); 0 of correlations."""
    if metric in ("matthews", "pearson-spearman"):
        return 0.0
    answers = np.eye(classes)
    return max(score(metric, np.tile(answer, (len(labels), 1)), labels) for answer in answers)


def score(metric: str, outputs: np.ndarray, labels: np.ndarray) -> float:
    """The metric of outputs (n, classes), or (n, 1) of a regression, against labels (n,): 1 is perfect.

    accuracy: share that is right. accuracy-f1: mean of it and of F1 of class 1, as GLUE has it for MRPC and QQP.
    matthews: correlation of Matthews, for CoLA. pearson-spearman: mean of the two correlations, for STS-B; 0 where all
    are equal.
    """
    if metric == "pearson-spearman":
        values = outputs[:, 0]
        if np.ptp(values) == 0 or np.ptp(labels) == 0:
            return 0.0
        return float((stats.pearsonr(values, labels).statistic + stats.spearmanr(values, labels).statistic) / 2)
    predicted = outputs.argmax(1)
    if metric == "matthews":
        return float(metrics.matthews_corrcoef(labels, predicted))
    accuracy = float((predicted == labels).mean())
    if metric == "accuracy":
        return accuracy
    if metric == "accuracy-f1":
        return (accuracy + float(metrics.f1_score(labels, predicted, zero_division=0))) / 2
    raise AtlasError(f"{metric}: there is no such metric; choose one of {', '.join(METRICS)}.")

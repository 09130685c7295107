"""How good a binary classifier's scores are, on one set of rows."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from sklearn.metrics import log_loss, roc_auc_score

from secagg.errors import LocalProtocolError


@dataclass(frozen=True)
class Metrics:
    """What a model's scores are worth on some rows.

    Attributes:
        accuracy: Share of rows whose class is right when a score above 0.5 means class 1.
        auc: Area under the ROC curve; None where the rows hold one class only, for which it is not defined.
        log_loss: Mean negative log-likelihood in nats; scikit-learn keeps it finite for a score of exactly 0 or 1.
        rows: How many rows were scored.
    """

    accuracy: float
    auc: float | None
    log_loss: float
    rows: int


def evaluate_scores(y: ArrayLike, p: ArrayLike) -> Metrics:
    """Compares scores with the truth.

    Args:
        y: True classes, 0 or 1, shape [n].
        p: Predicted probabilities of class 1, in [0, 1], shape [n].

    Returns:
        The metrics over the n rows.

    Raises:
        LocalProtocolError: The shapes differ, there is no row, a class is neither 0 nor 1, or a score is not a
            probability (a diverged model gives NaN).

    Example:
        >>> evaluate_scores([0, 0, 1, 1], [0.25, 0.75, 0.5, 0.9]).auc
        0.75
        >>> evaluate_scores([1, 1], [0.25, 0.75]).auc is None
        True
    """
    truth = np.asarray(y, dtype=np.float64)
    scores = np.asarray(p, dtype=np.float64)
    if truth.ndim != 1 or truth.shape != scores.shape or truth.size == 0:
        raise LocalProtocolError(
            f"expected classes and scores of one same shape [n] with n >= 1, got {truth.shape} and {scores.shape}"
        )
    if not np.isin(truth, (0.0, 1.0)).all():
        row = int(np.flatnonzero(~np.isin(truth, (0.0, 1.0)))[0])
        raise LocalProtocolError(f"expected classes 0 and 1, got {truth[row]} in row {row}")
    # A NaN fails both comparisons, so it counts as outside.
    outside = ~((scores >= 0.0) & (scores <= 1.0))
    if outside.any():
        row = int(np.flatnonzero(outside)[0])
        raise LocalProtocolError(
            f"expected scores in [0, 1], got {scores[row]} in row {row} ({int(outside.sum())} of {scores.size} rows): "
            "if they are NaN the model has diverged, so lower the learning rate; else pass probabilities, not logits"
        )
    both_classes = 0.0 < truth.mean() < 1.0
    return Metrics(
        accuracy=float(np.mean((scores > 0.5) == (truth > 0.5))),
        auc=float(roc_auc_score(truth, scores)) if both_classes else None,
        log_loss=float(log_loss(truth, scores, labels=[0.0, 1.0])),
        rows=int(truth.size),
    )

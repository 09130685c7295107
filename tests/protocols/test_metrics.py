import math

import numpy as np
import pytest

from protocols.metrics import Metrics, evaluate_scores
from secagg.errors import LocalProtocolError


def test_metrics_by_hand():
    got = evaluate_scores([0, 0, 1, 1], [0.1, 0.6, 0.5, 0.8])
    loss = -(math.log(0.9) + math.log(0.4) + math.log(0.5) + math.log(0.8)) / 4
    assert got == Metrics(accuracy=0.5, auc=0.75, log_loss=pytest.approx(loss), rows=4)


def test_one_class_has_no_auc_and_no_warning():
    assert evaluate_scores(np.ones(3), [0.9, 0.2, 0.7]) == Metrics(2 / 3, None, pytest.approx(0.6902, abs=1e-3), 3)
    assert evaluate_scores(np.zeros(2, np.float32), [0.9, 0.2]).auc is None


def test_certain_and_wrong_is_finite():
    got = evaluate_scores(np.array([0, 1], np.float32), np.array([1, 0], np.float32))
    assert got.accuracy == 0.0
    assert math.isfinite(got.log_loss)


@pytest.mark.parametrize(
    ("y", "p", "says"),
    [
        ([0, 1], [0.5], "one same shape"),
        ([], [], "n >= 1"),
        ([[0, 1]], [[0.5, 0.5]], "one same shape"),
        ([0, 2], [0.5, 0.5], "got 2.0 in row 1"),
        ([0, math.nan], [0.5, 0.5], "got nan in row 1"),
        ([0, 1], [0.5, math.nan], r"got nan in row 1 .*diverged"),
        ([0, 1], [-0.1, 0.5], "got -0.1 in row 0"),
        ([0, 1], [0.5, 1.5], "got 1.5 in row 1"),
    ],
)
def test_what_is_not_scores_is_refused(y, p, says):
    with pytest.raises(LocalProtocolError, match=says):
        evaluate_scores(y, p)

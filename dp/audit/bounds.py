"""How much privacy an attack's success rules out: lower bounds on epsilon, each with a stated false-alarm rate.

An account says that a release costs at most so much. An attacker who guesses better than that allows contradicts it.
The bounds say how much better than chance is too good, and they err on one side only: where the account is true, a
bound exceeds it in at most a share `significance` of all audits. In the other direction they say nothing. A bound of 0
is what a weak attack on a mechanism without any noise gives as well.

In one run, m canaries are each in or out of the training set by a fair coin of their own, and the attacker guesses r of
the coins and leaves out the rest. In several runs, one canary is in or out of each. How many canaries, guesses,
thresholds and runs there are has to be settled before the outcome is seen.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from dp_accounting import pld
from scipy.special import log_ndtr, ndtr, ndtri
from scipy.stats import beta as beta_distribution
from scipy.stats import binom

from dp.accounting import spent
from dp.errors import ParameterError
from dp.mechanisms import PoissonSampledGaussian, Relation, check_count, check_positive

Curve = Callable[[float], float]
"""A trade-off function f (Dong, Roth and Su 2022): whoever tells two neighbours apart with a false-positive rate of a
has a false-negative rate of at least f(a). Convex, decreasing, at most 1 - a, and its own inverse."""

_PRECISION = 1e-9
_LARGEST_EPSILON = 100.0  # no audit of fewer than e^100 canaries shows more
_LARGEST_MU = 64.0
_CURVE_GRID = 1e-4  # that of the reported epsilon, so that the curve goes through it
_CURVE_POINTS = 300


def one_run_p_value(canaries: int, guesses: int, right: int, epsilon: float, delta: float) -> float:
    """How likely so many right guesses are at most, if the release is (epsilon, delta)-private.

    Steinke, Nasr and Jagielski 2023, "Privacy auditing with one (1) training run", Theorem 5.2 and Appendix D. With
    q = 1 / (1 + exp(-epsilon)) it is beta + 2 m delta alpha, where beta = P[Bin(r, q) >= v] and
    alpha = max_i P[v - i <= Bin(r, q) < v] / i.

    Args:
        canaries: m, coins tossed.
        guesses: r, how many of them were guessed, fixed beforehand.
        right: v, how many of the guesses were right.
        epsilon: At least 0.
        delta: At least 0 and less than 1.

    Returns:
        The probability, at most 1.

    Raises:
        ParameterError: The counts do not fit together, or a number is out of its range.
    """
    _check_counts(canaries, guesses, right)
    _check_delta(delta)
    if not epsilon >= 0.0:
        raise ParameterError(f"epsilon should be at least 0, is {epsilon!r}")
    q = 1.0 / (1.0 + math.exp(-epsilon))
    beta = float(binom.sf(right - 1, guesses, q))
    alpha = 0.0
    if delta > 0.0 and right:
        below = np.cumsum(binom.pmf(np.arange(right - 1, -1, -1), guesses, q))
        alpha = float((below / np.arange(1, right + 1)).max())
    return min(1.0, beta + 2.0 * canaries * delta * alpha)


def one_run_epsilon(canaries: int, guesses: int, right: int, delta: float, significance: float = 0.05) -> float:
    """Bounds epsilon from below by one run: the largest that `one_run_p_value` rules out.

    Args:
        canaries: m, coins tossed.
        guesses: r, how many of them were guessed, fixed beforehand.
        right: v, how many of the guesses were right.
        delta: Of the account, at least 0 and less than 1.
        significance: Share of audits of a true account in which the bound may exceed it.

    Returns:
        The bound, 0 where nothing is ruled out.

    Raises:
        ParameterError: The counts do not fit together, or a number is out of its range.

    >>> round(one_run_epsilon(1000, 100, 100, 1e-5), 6)
    3.465376
    """
    _check_significance(significance)
    return _largest(
        lambda epsilon: one_run_p_value(canaries, guesses, right, epsilon, delta) < significance, _LARGEST_EPSILON
    )


def rules_out(canaries: int, guesses: int, right: int, curve: Curve, significance: float = 0.05) -> bool:
    """Tests by one run whether the release can have a trade-off function.

    Mahloujifar, Melis and Chaudhuri 2024, "Auditing f-differential privacy in one run", Algorithm 3. It needs the whole
    function to be claimed and not just one (epsilon, delta) of it, and rules out more in return.

    Args:
        canaries: m, coins tossed.
        guesses: r, how many of them were guessed, fixed beforehand.
        right: v, how many of the guesses were right.
        curve: The function claimed.
        significance: Chance of ruling out a function that is true.

    Returns:
        Whether it is ruled out.

    Raises:
        ParameterError: The counts do not fit together, or the significance is out of its range.
    """
    _check_counts(canaries, guesses, right)
    _check_significance(significance)
    # Names of the paper: of the guesses' probability, so much is right (r there) and so much is wrong (h).
    rho, h = significance * right / canaries, significance * (guesses - right) / canaries
    for i in range(right - 1, -1, -1):
        before, h = h, max(h, curve(1.0 - rho))
        rho = min(rho + i / (guesses - i) * (h - before), 1.0)
    return rho + h > guesses / canaries


def gaussian_curve(mu: float) -> Curve:
    """Gives the trade-off function of mu-Gaussian differential privacy (Dong, Roth and Su 2022, Definition 2.6)."""
    return lambda a: float(ndtr(-ndtri(a) - mu))


def account_curve(mechanism: PoissonSampledGaussian, relation: Relation = Relation.ADD_OR_REMOVE_ONE) -> Curve:
    """Gives the trade-off function that the account claims for all steps of a release together, per record.

    It is the upper envelope of the lines that the account's (epsilon, delta) stand for (Wasserman and Zhou 2010; Dong,
    Roth and Su 2022, Proposition 2.5), over a grid of epsilons and from the same privacy loss distributions as
    `dp.accounting.spent`. Fewer lines claim less, so whoever rules it out rules out the account.

    Args:
        mechanism: What is released.
        relation: Which data sets are neighbours.

    Returns:
        The function; 0 everywhere, which claims nothing, for an account above epsilon 100 at delta 1e-6.
    """
    if not mechanism.steps:
        return lambda a: 1.0 - a
    if not spent([mechanism], 1e-6, relation).epsilon <= _LARGEST_EPSILON:
        return lambda a: 0.0
    accountant = pld.PLDAccountant(relation.neighboring_relation(), _CURVE_GRID)
    accountant.compose(mechanism.event())
    epsilons = np.linspace(0.0, accountant.get_epsilon(1e-12), _CURVE_POINTS)
    # A list goes through in one pass; the signature names a single epsilon only.
    deltas = np.asarray(accountant.get_delta(epsilons.tolist()), dtype=np.float64)
    steep, flat = np.exp(epsilons), np.exp(-epsilons)

    def curve(a: float) -> float:
        return max(0.0, float((1.0 - deltas - steep * a).max()), float((flat * (1.0 - deltas - a)).max()))

    return curve


def one_run_mu(canaries: int, guesses: int, right: int, significance: float = 0.05) -> float:
    """Bounds mu of Gaussian differential privacy from below by one run, with `rules_out`.

    Args:
        canaries: m, coins tossed.
        guesses: r, how many of them were guessed, fixed beforehand.
        right: v, how many of the guesses were right.
        significance: Share of audits in which the bound may exceed a true mu.

    Returns:
        The bound, 0 where nothing is ruled out. `gaussian_epsilon` gives the epsilon that it stands for.

    Raises:
        ParameterError: The counts do not fit together, or the significance is out of its range.

    >>> round(gaussian_epsilon(one_run_mu(1000, 100, 100), 1e-5), 6)
    5.549028
    """
    return _largest(
        lambda mu: rules_out(canaries, guesses, right, gaussian_curve(mu), significance),
        _LARGEST_MU,
    )


def gaussian_epsilon(mu: float, delta: float) -> float:
    """Gives the epsilon of mu-Gaussian differential privacy at a delta (Dong, Roth and Su 2022, Corollary 2.13).

    Args:
        mu: At least 0.
        delta: More than 0 and less than 1.

    Returns:
        The least epsilon at that delta.

    Raises:
        ParameterError: A number is out of its range.
    """
    if not 0.0 <= mu < math.inf:
        raise ParameterError(f"mu should be a finite number of at least 0, is {mu!r}")
    _check_delta(delta)
    check_positive("delta", delta)
    if mu == 0.0:
        return 0.0

    def above(epsilon: float) -> bool:
        log_second = epsilon + float(log_ndtr(-epsilon / mu - mu / 2))
        return float(ndtr(-epsilon / mu + mu / 2)) - math.exp(log_second) > delta

    # Beyond this the first term alone, which is an upper bound, is delta.
    return _largest(above, mu * (mu / 2 - float(ndtri(delta))) + 1.0)


def several_runs_epsilon(
    false_positives: int,
    runs_without: int,
    false_negatives: int,
    runs_with: int,
    delta: float,
    significance: float = 0.05,
) -> float:
    """Bounds epsilon from below by several runs, each of which had one and the same canary or had it not.

    With each error rate at its upper Clopper-Pearson bound of half the significance, ln((1 - FNR - delta) / FPR) or the
    same with both exchanged, whichever is larger (Jagielski, Ullman and Oprea 2020, Theorem 1; Nasr et al. 2021).

    Args:
        false_positives: Runs without the canary that were taken for one with it.
        runs_without: Runs without it, at least 1.
        false_negatives: Runs with the canary that were taken for one without it.
        runs_with: Runs with it, at least 1.
        delta: Of the account, at least 0 and less than 1.
        significance: Share of audits of a true account in which the bound may exceed it.

    Returns:
        The bound, at least 0.

    Raises:
        ParameterError: More errors than runs, or a number is out of its range.
    """
    _check_significance(significance)
    _check_delta(delta)
    fpr = _upper_rate("false_positives", false_positives, runs_without, significance / 2)
    fnr = _upper_rate("false_negatives", false_negatives, runs_with, significance / 2)
    ratios = [(1.0 - one - delta) / other for one, other in ((fnr, fpr), (fpr, fnr))]
    return max(0.0, *(math.log(ratio) for ratio in ratios if ratio > 0.0), 0.0)


def several_runs_mu(
    errors: Sequence[tuple[int, int]], runs_without: int, runs_with: int, significance: float = 0.05
) -> float:
    """Bounds mu of Gaussian differential privacy from below by several runs.

    At each threshold, the error rates at their upper Clopper-Pearson bounds give mu >= Phi^-1(1 - FPR) - Phi^-1(FNR)
    (Nasr et al. 2023, "Tight auditing of differentially private machine learning", Section 4). All thresholds share the
    significance among them (Bonferroni). A guess worse than chance bounds nothing, so the result is clamped at 0;
    its absolute value is no bound.

    Args:
        errors: False positives and false negatives at every threshold that was tried, good ones and bad ones.
        runs_without: Runs without the canary, at least 1.
        runs_with: Runs with it, at least 1.
        significance: Share of audits in which the bound may exceed a true mu.

    Returns:
        The bound, at least 0.

    Raises:
        ParameterError: No threshold, more errors than runs, or a number is out of its range.
    """
    _check_significance(significance)
    if not errors:
        raise ParameterError("errors should hold the counts at one threshold at least, and is empty")
    share = significance / (2 * len(errors))
    best = 0.0
    for false_positives, false_negatives in errors:
        fpr = _upper_rate("false_positives", false_positives, runs_without, share)
        fnr = _upper_rate("false_negatives", false_negatives, runs_with, share)
        best = max(best, float(ndtri(1.0 - fpr) - ndtri(fnr)))  # a rate of 1 gives minus infinity
    return best


def _upper_rate(name: str, errors: int, runs: int, significance: float) -> float:
    check_count(name, errors)
    check_count("runs", runs)
    if not errors <= runs or not runs:
        raise ParameterError(f"{name} should be at most the number of runs, and that at least 1: {errors} of {runs}")
    return float(beta_distribution.ppf(1.0 - significance, errors + 1, runs - errors)) if errors < runs else 1.0


def _largest(ruled_out: Callable[[float], bool], limit: float) -> float:
    """Finds where a decreasing condition ends, from below: 0 if it never holds, `limit` if it always does."""
    if not ruled_out(0.0):
        return 0.0
    low, high = 0.0, limit
    while high - low > _PRECISION:
        middle = (low + high) / 2
        low, high = (middle, high) if ruled_out(middle) else (low, middle)
    return low


def _check_counts(canaries: int, guesses: int, right: int) -> None:
    for name, count in (("canaries", canaries), ("guesses", guesses), ("right", right)):
        check_count(name, count)
    if not 1 <= guesses <= canaries or right > guesses:
        raise ParameterError(
            f"of {canaries} canaries 1 to {canaries} should be guessed, and no more of them right than guessed: "
            f"{guesses} guesses, {right} right"
        )


def _check_delta(delta: float) -> None:
    if isinstance(delta, bool) or not isinstance(delta, int | float) or not 0.0 <= delta < 1.0:
        raise ParameterError(f"delta should be at least 0 and less than 1, is {delta!r}")


def _check_significance(significance: float) -> None:
    check_positive("significance", significance)
    if significance >= 1.0:
        raise ParameterError(f"significance should be more than 0 and less than 1, is {significance!r}")

"""What a sequence of releases costs, and how much noise a wanted cost needs.

The epsilon reported comes from privacy loss distributions (PLD: Koskela, Jälkö and Honkela 2020; Doroshenko et al.
2022) on a grid of 1e-4 that rounds against us, so it is an upper bound. Beside it stands the looser one from Rényi
divergences (RDP: Mironov 2017), computed by other code: two accountants that disagree the wrong way round mean a
mistake. The approximation by a central limit theorem, which under-reports, is not used. Where a mechanism has no
distribution of privacy losses that anyone has proved to dominate it, RDP gives the epsilon of the whole.

Always account all releases together. Five rounds of training cost far less than five times one round, and far more than
one round, which is what an accountant that is made anew each round reports.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Literal, TypeVar

import dp_accounting
import msgspec
import numpy as np
from dp_accounting import pld, rdp
from numpy.typing import NDArray

from dp.errors import BudgetExceeded, ParameterError
from dp.mechanisms import Mechanism, PoissonSampledGaussian, Relation, Unit, check_positive

_GRID = 1e-4  # of the privacy loss distribution; every reported epsilon is computed on it
_COARSE_GRID = 1e-3  # while searching for a noise multiplier: ten times as fast, and a looser upper bound
_TOLERANCE = 1e-3  # how far below its target, relatively, a calibrated epsilon may stay
_SIGMA_RANGE = (0.01, 1e6)
_PLD_CEILING = 300.0
_FEW_ORDERS = (2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
# Whole orders, at which noise in whole numbers can be accounted, and tenths between them where that matters.
_WHOLE_ORDERS = (*range(2, 129), *range(144, 257, 16), *range(288, 513, 32))
_TENTHS = tuple(k / 10 for k in range(11, 100) if k % 10)

AnyMechanism = TypeVar("AnyMechanism", bound=Mechanism)


class Spent(msgspec.Struct, frozen=True, kw_only=True):
    """What a set of releases has cost, per unit.

    Attributes:
        epsilon: The reported one, by the accountant that `accountant` names.
        epsilon_rdp: The cross-check by RDP; never smaller than `epsilon` but for the grid.
        delta: At which both hold.
        relation: Under which both hold.
        accountant: PLD where it is proved for every release; RDP where it is not, where RDP is the lower of the two,
            and where epsilon is above 300, which protects nothing in either case.
        unit: Whose presence they hide: participants where all releases do, else records. (Who hides a participant
            hides every record of it, and at the same price.)
    """

    epsilon: float
    epsilon_rdp: float
    delta: float
    relation: Relation
    accountant: Literal["pld", "rdp"] = "pld"
    unit: Unit = Unit.RECORD


def coalesce(mechanisms: Iterable[AnyMechanism]) -> tuple[AnyMechanism, ...]:
    """Merges mechanisms that differ in nothing but their steps, in the order of first appearance.

    Composition does not care for the order, so the cost is the same; the account is faster by two orders of magnitude.

    Args:
        mechanisms: Any number, in any order.

    Returns:
        One mechanism for each kind and each set of fields other than the steps, which are added up.

    >>> once = PoissonSampledGaussian(sampling_rate=0.1, noise_multiplier=1.0, steps=5, l2_clip_norm=1.0)
    >>> [merged.steps for merged in coalesce([once, once, once])]
    [15]
    """
    steps: dict[AnyMechanism, int] = {}
    for m in mechanisms:
        kind = msgspec.structs.replace(m, steps=0)
        steps[kind] = steps.get(kind, 0) + m.steps
    return tuple(msgspec.structs.replace(kind, steps=count) for kind, count in steps.items())


def spent(mechanisms: Iterable[Mechanism], delta: float, relation: Relation = Relation.ADD_OR_REMOVE_ONE) -> Spent:
    """Accounts all releases together. The privacy unit is the one that `Spent.unit` names.

    PLD composes the events of all mechanisms, and adds what their `log_ratio` says: each release may be that far from a
    post-processing of its event. With K the sum over all steps of all of them, (e, d) becomes (e + 2K, exp(K) d). RDP
    adds up what `renyi` gives at whole orders. Between whole orders (a-1) times the divergence is convex in a (van
    Erven and Harremoës 2014, Corollary 2), and at a = 1 it is 0, so that a straight line bounds it.

    Under replace-one a record with vector u takes the place of one with vector v, both of norm at most C = 1, and PLD
    accounts the pair P = (1-q) N(0, s^2) + q N(1, s^2), Q = (1-q) N(0, s^2) + q N(-1, s^2). This pair is the worst.
    Hockey-stick divergences are jointly convex, so take the draw of all others as given. For g >= 1 the divergence is
    the largest value of q N_u(A) - (g-1)(1-q) N_0(A) - g q N_v(A) over sets A, where N_w stands for N(w, s^2 I). Let H
    be the half-line with N_1(H) = N_u(A). By the Neyman-Pearson lemma N_0(H) <= N_0(A), since u is within 1 of 0, and
    N_-1(H) <= N_v(A), since u is within 2 of v: on the line, H does no worse than A. The case g < 1 is the same with P
    and Q exchanged. Domination carries over to adaptive composition (Zhu, Dong and Wang 2022, Theorem 10).

    This also holds for the events of whole-number sums, whose neighbours are neighbours of the event as well.

    RDP of Poisson sampling under replace-one is not known tightly. The cross-check there is group privacy: removing one
    record and adding another are two steps of add-or-remove-one, so that (e, d) of RDP gives (2e, (1 + exp(e)) d).
    Where whole-number sums are among the releases and everyone is in every step, it is RDP at twice the sensitivity.

    Args:
        mechanisms: All releases from the same records, in any order.
        delta: More than 0 and less than 1; well below one over the number of records.
        relation: Which data sets are neighbours.

    Returns:
        The cost. No steps cost 0.

    Raises:
        ParameterError: Delta is out of its range, or the relation is none of ours.

    >>> once = PoissonSampledGaussian(sampling_rate=0.01, noise_multiplier=1.0, steps=1000, l2_clip_norm=1.0)
    >>> print(f"{spent([once], 1e-5).epsilon:.3f}")
    1.828
    """
    mechanisms = tuple(mechanisms)
    _check(delta, relation)
    epsilon, accountant = _epsilon(mechanisms, delta, relation, _GRID)
    participants = bool(mechanisms) and all(_unit(m) is Unit.PARTICIPANT for m in mechanisms)
    return Spent(
        epsilon=epsilon,
        epsilon_rdp=_epsilon_rdp(_distinct(mechanisms), delta, relation),
        delta=delta,
        relation=relation,
        accountant=accountant,
        unit=Unit.PARTICIPANT if participants else Unit.RECORD,
    )


class Budget(msgspec.Struct, frozen=True, kw_only=True):
    """The most that all releases from one set of records may cost together.

    Attributes:
        epsilon: The largest epsilon, positive.
        delta: At which it is meant, more than 0 and less than 1.
        relation: Under which it is meant. The privacy unit is that of the releases.

    Raises:
        ParameterError: A field is out of its range.
    """

    epsilon: float
    delta: float
    relation: Relation = Relation.ADD_OR_REMOVE_ONE

    def __post_init__(self) -> None:
        check_positive("epsilon", self.epsilon)
        _check(self.delta, self.relation)

    def check(self, mechanisms_so_far: Iterable[Mechanism], next_mechanism: Mechanism) -> Spent:
        """Asks, before a release is made, whether it may be.

        Args:
            mechanisms_so_far: Everything released or begun from these records; a round that crashed counts.
            next_mechanism: The release to be made; a secure sum with its threshold as survivors.

        Returns:
            What will be spent after it.

        Raises:
            BudgetExceeded: It would bring the cost above the budget.
        """
        so_far = tuple(mechanisms_so_far)
        after = spent((*so_far, next_mechanism), self.delta, self.relation)
        if not after.epsilon <= self.epsilon:
            before, _ = _epsilon(so_far, self.delta, self.relation, _GRID)
            raise BudgetExceeded(spent=before, next=after.epsilon, budget=self.epsilon)
        return after

    def require(self, mechanisms_so_far: Iterable[Mechanism], next_mechanism: Mechanism) -> None:
        """Asks the same as `check`, and not what it costs: where the looser RDP bound is within budget, PLD is too.

        Args:
            mechanisms_so_far: As in `check`.
            next_mechanism: As in `check`.

        Raises:
            BudgetExceeded: The release would bring the cost above the budget.
        """
        so_far = tuple(mechanisms_so_far)
        if not _epsilon_rdp(_distinct((*so_far, next_mechanism)), self.delta, self.relation) <= self.epsilon:
            self.check(so_far, next_mechanism)


def calibrate_noise_multiplier(
    target_epsilon: float,
    delta: float,
    sampling_rate: float,
    steps: int,
    relation: Relation = Relation.ADD_OR_REMOVE_ONE,
    already: Sequence[Mechanism] = (),
) -> float:
    """Finds the least noise with which planned DP-SGD keeps to an epsilon. The privacy unit is one record.

    Args:
        target_epsilon: What `already` and the planned release together may cost, positive.
        delta: More than 0 and less than 1.
        sampling_rate: Of the planned release, more than 0 and at most 1.
        steps: Of the planned release, at least 1.
        relation: Which data sets are neighbours.
        already: What has been released before. It has to be fixed beforehand: noise chosen by looking at earlier
            outputs is outside what plain composition proves.

    Returns:
        A noise multiplier whose epsilon, as `spent` reports it, is at most the target and at most 0.1 % below it.

    Raises:
        BudgetExceeded: `already` alone costs as much as the target.
        ParameterError: A number is out of its range, or no noise multiplier from 0.01 to 10^6 reaches the target.
    """
    if steps < 1:
        raise ParameterError(f"steps should be at least 1 to calibrate noise for them, is {steps}")

    def planned(sigma: float) -> PoissonSampledGaussian:
        return PoissonSampledGaussian(
            sampling_rate=sampling_rate, noise_multiplier=sigma, steps=steps, l2_clip_norm=1.0
        )

    return calibrate(planned, target_epsilon, delta, relation, already)


def calibrate(
    planned: Callable[[float], Mechanism],
    target_epsilon: float,
    delta: float,
    relation: Relation = Relation.ADD_OR_REMOVE_ONE,
    already: Sequence[Mechanism] = (),
) -> float:
    """Finds the least noise with which any planned release keeps to an epsilon.

    Args:
        planned: Gives the planned release, of at least one step, for a noise multiplier: the deviation of all noise
            that counts, over the sensitivity. It may raise `ParameterError` where that is too small for it.
        target_epsilon: What `already` and the planned release together may cost, positive.
        delta: More than 0 and less than 1.
        relation: Which data sets are neighbours.
        already: What has been released before; fixed beforehand, as for `calibrate_noise_multiplier`.

    Returns:
        A noise multiplier whose epsilon, as `spent` reports it, is at most the target; and at most 0.1 % below it, or
        the least that `planned` takes.

    Raises:
        BudgetExceeded: `already` alone costs as much as the target.
        ParameterError: A number is out of its range, or no noise multiplier from 0.01 to 10^6 reaches the target.
    """
    check_positive("target_epsilon", target_epsilon)
    _check(delta, relation)
    before, _ = _epsilon(already, delta, relation, _GRID)
    if before >= target_epsilon:
        raise BudgetExceeded(spent=before, next=before, budget=target_epsilon)

    def epsilon_on(grid: float) -> Callable[[float], float]:
        def epsilon(sigma: float) -> float:
            try:
                release = planned(sigma)
            except ParameterError:
                return math.inf
            return _epsilon((*already, release), delta, relation, grid)[0]

        return epsilon

    # Where noise is large, epsilon is near q sqrt(2 T ln(1/delta)) / sigma. It only says where to begin. What is wrong
    # with a plan whatever the noise is raised here.
    example = planned(1e3)
    start = example.sampling_rate * math.sqrt(2 * example.steps * math.log(1 / delta)) / target_epsilon
    start = max(0.5, start)
    # On the coarse grid `already` may seem to have spent everything, where on the fine one it has not.
    if _epsilon(already, delta, relation, _COARSE_GRID)[0] < target_epsilon * (1 - _TOLERANCE):
        start = _solve(epsilon_on(_COARSE_GRID), target_epsilon, start, stride=1.3)
    return _solve(epsilon_on(_GRID), target_epsilon, start, stride=1.01)


def _solve(epsilon: Callable[[float], float], target: float, start: float, stride: float) -> float:
    """Finds a noise multiplier with target (1 - tolerance) <= epsilon <= target, epsilon being decreasing."""
    too_little = too_much = 0.0  # noise multipliers on either side, and their epsilons
    above = below = math.nan
    sigma = start
    for attempt in range(80):
        if not _SIGMA_RANGE[0] <= sigma <= _SIGMA_RANGE[1]:
            break
        came = epsilon(sigma)
        if target * (1 - _TOLERANCE) <= came <= target:
            return sigma
        if came > target:
            too_little, above = sigma, came
        else:
            too_much, below = sigma, came
        if not too_little or not too_much:
            sigma = sigma * stride if came > target else sigma / stride
            stride *= stride  # from a good start one step is enough, from a bad one a few are
        elif attempt % 3 == 2 or below <= 0.0 or math.isinf(above):
            sigma = math.sqrt(too_little * too_much)
        else:  # log epsilon is nearly linear in log sigma; aim at the middle of the tolerance
            share = math.log(above / (target * (1 - _TOLERANCE / 2))) / math.log(above / below)
            sigma = too_little * (too_much / too_little) ** share
    if too_much and math.isinf(above):  # with any less noise there is no such plan
        return too_much
    low, high = _SIGMA_RANGE
    raise ParameterError(f"no noise multiplier from {low:g} to {high:g} gives epsilon {target:g}")


def _check(delta: float, relation: Relation) -> None:
    check_positive("delta", delta)
    if delta >= 1.0:
        raise ParameterError(f"delta should be less than 1, is {delta!r}")
    if not isinstance(relation, Relation):
        known = ", ".join(repr(r.value) for r in Relation)
        raise ParameterError(f"relation should be one of {known} as a dp.Relation, is {relation!r}")


def _unit(mechanism: Mechanism) -> Unit:
    return Unit.RECORD if isinstance(mechanism, PoissonSampledGaussian) else mechanism.unit


def _distinct(mechanisms: Iterable[Mechanism]) -> tuple[Mechanism, ...]:
    # The clip norm does not enter: mechanisms that differ only in it are one event to the accountants.
    alike = (msgspec.structs.replace(m, l2_clip_norm=1.0) for m in mechanisms)
    return tuple(m for m in coalesce(alike) if m.steps)


def _event(mechanisms: Iterable[Mechanism]) -> dp_accounting.DpEvent:
    return dp_accounting.ComposedDpEvent([m.event() for m in mechanisms])


def _epsilon(
    mechanisms: Iterable[Mechanism], delta: float, relation: Relation, grid: float
) -> tuple[float, Literal["pld", "rdp"]]:
    """Gives the reported epsilon, and who computed it."""
    distinct = _distinct(mechanisms)
    by_pld, accountant = _cached_epsilon_pld(distinct, delta, relation, grid)
    if all(isinstance(m, PoissonSampledGaussian) for m in distinct):
        return by_pld, accountant
    by_rdp = _epsilon_rdp(distinct, delta, relation)
    return (by_rdp, "rdp") if by_rdp < by_pld else (by_pld, accountant)


# A budget is asked before and after each round, often by several sites with the same history.
@lru_cache(maxsize=1024)
def _cached_epsilon_pld(
    mechanisms: tuple[Mechanism, ...], delta: float, relation: Relation, grid: float
) -> tuple[float, Literal["pld", "rdp"]]:
    if not mechanisms:
        return 0.0, "pld"
    ratio = sum(m.steps * m.log_ratio() for m in mechanisms)
    # Beyond one, exp(ratio) makes more of delta than PLD saves.
    if ratio > 1.0:
        return math.inf, "pld"
    delta *= math.exp(-ratio)
    event = _event(mechanisms)
    # The distribution's support is as wide as epsilon. Where RDP says that nothing is protected anyway, its bound will
    # do, and gigabytes are saved.
    rough = _rdp_bound(event, delta, relation, _FEW_ORDERS)
    if rough > _PLD_CEILING:
        return rough + 2 * ratio, "rdp"
    accountant = pld.PLDAccountant(relation.neighboring_relation(), grid)
    accountant.compose(event)
    return float(accountant.get_epsilon(delta)) + 2 * ratio, "pld"


@lru_cache(maxsize=1024)
def _epsilon_rdp(mechanisms: tuple[Mechanism, ...], delta: float, relation: Relation) -> float:
    if all(isinstance(m, PoissonSampledGaussian) for m in mechanisms):
        return _rdp_bound(_event(mechanisms), delta, relation, None) if mechanisms else 0.0
    replaced = relation is Relation.REPLACE_ONE
    everyone = all(m.sampling_rate == 1.0 for m in mechanisms)
    orders, divergences = _divergences(mechanisms, 2 if replaced and everyone else 1)

    def epsilon(at: float) -> float:
        return float(rdp.compute_epsilon(orders, divergences, at)[0])

    return _of_two(epsilon, delta) if replaced and not everyone else epsilon(delta)


def _divergences(mechanisms: Iterable[Mechanism], times: int) -> tuple[list[float], NDArray[np.float64]]:
    """Gives orders, and what all mechanisms' divergences add up to at each; see `spent` for those between."""
    whole = np.sum([m.steps * m.renyi(_WHOLE_ORDERS, times) for m in mechanisms], axis=0)
    moments = np.concatenate([[0.0], (np.array(_WHOLE_ORDERS) - 1) * whole])
    between = np.interp(_TENTHS, (1, *_WHOLE_ORDERS), moments) / (np.array(_TENTHS) - 1)
    return [*_WHOLE_ORDERS, *_TENTHS], np.concatenate([whole, between])


def _rdp_bound(event: dp_accounting.DpEvent, delta: float, relation: Relation, orders: Sequence[int] | None) -> float:
    accountant = rdp.RdpAccountant(orders)
    with _without_noise_about_orders():
        accountant.compose(event)
    if relation is Relation.ADD_OR_REMOVE_ONE:
        return float(accountant.get_epsilon(delta))
    return _of_two(lambda at: float(accountant.get_epsilon(at)), delta)


def _of_two(epsilon: Callable[[float], float], delta: float) -> float:
    """Group privacy, k = 2: the largest d with (1 + exp(e(d))) d <= delta, from above.

    Shrinking d makes e grow, but slower than ln(1/d), so this ends.
    """
    log_d = math.log(delta / 2)
    for _ in range(200):
        half = epsilon(math.exp(log_d))
        log_cost = log_d + math.log1p(math.exp(-half)) + half
        if log_cost <= math.log(delta):
            return 2 * half
        log_d -= max(1e-3, log_cost - math.log(delta))
        if log_d < -700.0:
            break
    return math.inf


@contextmanager
def _without_noise_about_orders() -> Iterator[None]:
    """Keeps dp-accounting from warning, once per order, that it left out a low order: the bound holds without it."""

    def keep(record: logging.LogRecord) -> bool:
        return "failed to converge" not in record.getMessage()

    logger = logging.getLogger("absl")
    logger.addFilter(keep)
    try:
        yield
    finally:
        logger.removeFilter(keep)

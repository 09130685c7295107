"""Mechanisms as values: everything that the account needs to know about a release, and nothing else.

A ledger stores these and not epsilons. Epsilons of several releases do not add up to anything useful, while mechanisms
compose, and can be accounted again by someone else with a better method.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Sequence
from functools import lru_cache
from typing import TypeAlias

import dp_accounting
import msgspec
import numpy as np
from numpy.typing import NDArray
from scipy.special import gammaln, logsumexp

from dp.errors import ParameterError

_SMOOTHING_SLACK = 1e-6  # epsilon that the passage from whole numbers to the Gaussian may cost over all steps
_NARROWEST = 0.5  # deviation of a discrete Gaussian from which on Kairouz, Liu and Steinke bound sums of them
_LARGEST_SQUARE = 2.0**62  # of a whole vector's norm: such norms are checked in int64


class Relation(enum.StrEnum):
    """Which two data sets count as neighbours. An epsilon means nothing without it.

    Attributes:
        ADD_OR_REMOVE_ONE: One has one record more than the other.
        REPLACE_ONE: Equal in size, with one record different. The same mechanism costs 1.6 to 2 times as much.
    """

    ADD_OR_REMOVE_ONE = "add-or-remove-one"
    REPLACE_ONE = "replace-one"

    def neighboring_relation(self) -> dp_accounting.NeighboringRelation:
        """Gives the relation under dp-accounting's name."""
        return dp_accounting.NeighboringRelation[self.name]


class Unit(enum.StrEnum):
    """Whose presence an epsilon hides.

    Attributes:
        RECORD: One record of one site.
        PARTICIPANT: All that one participant of the secure sum holds, and so every record in it as well.
    """

    RECORD = "record"
    PARTICIPANT = "participant"


class PoissonSampledGaussian(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Repeated sums of clipped vectors over random subsets, with Gaussian noise: what DP-SGD releases.

    In each of `steps` steps every record joins the sum independently with probability `sampling_rate`; its vector is
    clipped to l2 norm C = `l2_clip_norm`; noise N(0, (noise_multiplier C)^2 I) is added to the sum; and only that sum
    is seen (not who was drawn, nor how many). Under add-or-remove-one the joint release of all steps, each of which may
    depend on those before, is dominated by the `steps`-fold composition of the pair
    (N(0, s^2), (1-q) N(0, s^2) + q N(1, s^2)), taken in both orders, with q the sampling rate and s the noise
    multiplier (Abadi et al. 2016; Mironov, Talwar and Zhang 2019; Zhu, Dong and Wang 2022, Theorem 11). Under
    replace-one, see `dp.accounting.spent`. The privacy unit is one record: where a patient has k records, the guarantee
    for the patient is that of a group of k.

    Attributes:
        sampling_rate: q, more than 0 and at most 1.
        noise_multiplier: Standard deviation of the noise over the clip norm, positive.
        steps: How many sums are released, at least 0. A step whose draw was empty counts as well.
        l2_clip_norm: C, positive. Kept for the record; epsilon does not depend on it.

    Raises:
        ParameterError: A field is out of its range.
    """

    sampling_rate: float
    noise_multiplier: float
    steps: int
    l2_clip_norm: float

    def __post_init__(self) -> None:
        check_positive("sampling_rate", self.sampling_rate, at_most=1.0)
        check_positive("noise_multiplier", self.noise_multiplier)
        check_count("steps", self.steps)
        check_positive("l2_clip_norm", self.l2_clip_norm)

    def event(self) -> dp_accounting.DpEvent:
        """Gives the release as dp-accounting sees it."""
        once = dp_accounting.PoissonSampledDpEvent(
            self.sampling_rate, dp_accounting.GaussianDpEvent(self.noise_multiplier)
        )
        return dp_accounting.SelfComposedDpEvent(once, self.steps)

    def log_ratio(self) -> float:
        """Gives how far a step may be from what `event` says, as the largest log-ratio of probabilities: not at all."""
        return 0.0

    def renyi(self, orders: Sequence[int], times: int = 1) -> NDArray[np.float64]:
        """Bounds the Rényi divergence of one step, in either direction, at each order. See `poisson_sampled`.

        Args:
            orders: Whole numbers, each at least 2.
            times: 2 for a sensitivity twice as large, as replace-one has it where everyone is drawn.

        Returns:
            Nats, one for each order.
        """
        curve = np.arange(max(orders) + 1) * (times / self.noise_multiplier) ** 2 / 2
        return poisson_sampled(self.sampling_rate, curve, orders)


class _NoiseShares(msgspec.Struct, frozen=True, kw_only=True):
    """What both sums of noise shares have in common; their docstrings describe the fields."""

    unit: Unit
    sampling_rate: float
    steps: int
    l2_sensitivity: float
    dimension: int
    l2_clip_norm: float
    scale: float
    shares: int
    threshold: int
    colluders: int
    survivors: int

    def __post_init__(self) -> None:
        check_positive("sampling_rate", self.sampling_rate, at_most=1.0)
        check_count("steps", self.steps)
        check_positive("l2_sensitivity", self.l2_sensitivity, at_most=math.sqrt(_LARGEST_SQUARE))
        check_count("dimension", self.dimension, at_least=1)
        check_positive("l2_clip_norm", self.l2_clip_norm)
        check_positive("scale", self.scale)
        check_shares(self.shares, self.threshold, self.colluders)
        check_count("survivors", self.survivors)
        if not self.threshold <= self.survivors <= self.shares:
            raise ParameterError(
                f"survivors should be from the threshold {self.threshold} to all {self.shares} shares, "
                f"are {self.survivors}"
            )

    @property
    def counted(self) -> int:
        """How many shares of noise hide anything: of those in the sum, the ones that no colluder can subtract."""
        return self.survivors - self.colluders

    @property
    def l1_sensitivity(self) -> float:
        """Largest l1 norm of one unit's vector: at most sqrt(d) of the l2 norm, and, in whole numbers, its square."""
        return self.l2_sensitivity * min(math.sqrt(self.dimension), self.l2_sensitivity)


class DiscreteGaussianSum(_NoiseShares, frozen=True, kw_only=True, tag=True):
    """Repeated secure sums of whole-number vectors, into which every participant has put a share of noise.

    In each of `steps` steps, the secure sum opens the sum of all units' vectors, each of whole numbers with l2 norm at
    most Delta = `l2_sensitivity`, plus `survivors` independent shares of noise; each share is discrete Gaussian of
    parameter sigma = `share_sigma` in every one of d = `dimension` coordinates. Where the unit is a record, it joins
    a step independently with probability q = `sampling_rate`, and who joined, and how many, stays secret. Where it is
    a participant, the same holds; usually q is 1. Two neighbours differ in a unit's vectors (it has them, or zeros, or
    under replace-one others); the shares of noise stay. `colluders` may subtract their own shares, so that m =
    `counted` = survivors - colluders hide the rest. Who drops out must not hang on earlier outputs; whoever cannot
    exclude that accounts with `survivors` = `threshold`, which holds whatever happens above it.

    The guarantee, by two independent routes, both for adaptive steps:

    **By Rényi divergences.** With D = Delta / (sqrt(m) sigma), D1 the same for l1, and t = 10 sum_{k=1}^{m-1}
    exp(-2 pi^2 sigma^2 k / (k+1)), the divergence of order a is, without sampling, at most
    min{a D^2 / 2 + t d, (a/2) (D^2 + 2 D1 t + t^2 d)} (Kairouz, Liu and Steinke 2021, Proposition 14; its third bound,
    (a/2) (D + sqrt(d) t)^2, is never below the second, since D1 <= sqrt(d) D). `poisson_sampled` takes this through the
    sampling, at whole orders.

    **By the Gaussian that it imitates** (for PLD). Draw X from N(c, s^2) for a whole number c, and then Z from the
    discrete Gaussian of deviation r centred at X: P[Z=z] = exp(-(z-X)^2 / 2r^2) / R(X). By Poisson's summation formula
    R(X) is within a factor 1 ± e of r sqrt(2 pi), with e = 2 sum_{j>=1} exp(-2 pi^2 r^2 j^2). Integrating X out, P[Z=z]
    is within the factors 1/(1+e) and 1/(1-e) of the normal density of variance s^2 + r^2 at z - c, and so is within
    exp(2 artanh e) of the discrete Gaussian of that variance around c, either way, where r <= s (compare Peikert 2010,
    "An efficient and parallel Gaussian sampler for lattices", Theorem 3.1). The sum of m shares is within exp(t/2) of
    one discrete Gaussian of variance m sigma^2, either way (Kairouz, Liu and Steinke 2021, Theorem 9, by induction).
    So, in d coordinates, each step's output has for every data set, sampled or not, a probability within exp(k) of that
    of a post-processing, the same for all data sets, of Gaussian noise of variance m sigma^2 - r^2 on the same sum; k
    is `log_ratio()`, d (t/2 + 2 artanh e). `event` describes the latter. If the latter is (epsilon, delta) over all
    steps, the sum is (epsilon + 2 K, exp(K) delta), K being the sum of all steps' k: P(A) <= exp(K) P'(A) <= exp(K)
    (exp(epsilon) Q'(A) + delta) <= exp(2 K + epsilon) Q(A) + exp(K) delta. Any r will do; here r^2 is about 1 to 2,
    such that the part of e in 2 K is 1e-6. Where m sigma^2 is below 2 r^2, or shares are narrow and t is large, this
    route gives nothing worth having, and the first one is left.

    The sampler's own distance from the distribution (`dp.samplers`) adds below 2^-107 (1 + exp(epsilon)) to delta for
    each number drawn: 2e-17 for 10^12 numbers at epsilon 8. That is not counted.

    Attributes:
        unit: Whose vector `l2_sensitivity` bounds.
        sampling_rate: q, more than 0 and at most 1.
        steps: How many sums are opened, at least 0.
        l2_sensitivity: Delta, in the whole numbers' unit. For records it is the grid.
        dimension: d, at least 1.
        l2_clip_norm: Largest l2 norm of one unit's vector before it is made whole numbers.
        scale: By how much it is multiplied for that: for records the grid over `l2_clip_norm`.
        shares: How many participants were planned.
        threshold: The fewest with whom a sum is opened.
        colluders: How many of those in the sum may work against the others, less than `threshold`.
        survivors: How many were in the sum. Beforehand, put in the threshold.
        share_sigma: sigma of one share, in the whole numbers' unit, at least 1/2; exactly the rational it stands for.

    Raises:
        ParameterError: A field is out of its range.
    """

    share_sigma: float

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("share_sigma", self.share_sigma)
        if self.share_sigma < _NARROWEST:
            raise ParameterError(
                f"share_sigma should be at least {_NARROWEST}, is {self.share_sigma!r}: of sums of narrower discrete "
                "Gaussians nothing is proved; use a finer grid or a larger scale"
            )

    @property
    def tau(self) -> float:
        """What the class's docstring calls t: 0 for a single share, and negligible from `share_sigma` 3 on."""
        return tau(self.counted, self.share_sigma)

    def event(self) -> dp_accounting.DpEvent:
        """Gives the Gaussian mechanism that the release imitates, or UnsupportedDpEvent where there is none."""
        variance = self.counted * self.share_sigma**2
        if not math.isfinite(self.log_ratio()):
            return dp_accounting.UnsupportedDpEvent()
        noise_multiplier = math.sqrt(variance - self._smoothing()) / self.l2_sensitivity
        once = dp_accounting.PoissonSampledDpEvent(self.sampling_rate, dp_accounting.GaussianDpEvent(noise_multiplier))
        return dp_accounting.SelfComposedDpEvent(once, self.steps)

    def log_ratio(self) -> float:
        """Gives how far a step may be from `event`'s post-processing, as the largest log-ratio of probabilities."""
        r_squared = self._smoothing()
        if self.counted * self.share_sigma**2 < 2 * r_squared:
            return math.inf
        # What the terms after the first add is far less than a 1e-9 of it, as it is 1e-6 or less.
        e = 2.0 * math.exp(-2 * math.pi**2 * r_squared) * (1 + 1e-9)
        return self.dimension * (self.tau / 2 + 2 * math.atanh(e))

    def _smoothing(self) -> float:
        """r^2, such that steps * dimension * 2 * 2 artanh e comes to the slack."""
        return math.log(8 * max(1, self.steps) * self.dimension / _SMOOTHING_SLACK) / (2 * math.pi**2)

    def renyi(self, orders: Sequence[int], times: int = 1) -> NDArray[np.float64]:
        """Bounds the Rényi divergence of one step, in either direction, at each order. See the class's docstring.

        Args:
            orders: Whole numbers, each at least 2.
            times: 2 for a sensitivity twice as large, as replace-one has it where everyone is drawn.

        Returns:
            Nats, one for each order.
        """
        deviation = math.sqrt(self.counted) * self.share_sigma
        d2, d1 = times * self.l2_sensitivity / deviation, times * self.l1_sensitivity / deviation
        t, d, order = self.tau, self.dimension, np.arange(max(orders) + 1)
        curve = np.minimum(order * d2**2 / 2 + t * d, order / 2 * (d2**2 + 2 * d1 * t + t**2 * d))
        return poisson_sampled(self.sampling_rate, curve, orders)


class SkellamSum(_NoiseShares, frozen=True, kw_only=True, tag=True):
    """Repeated secure sums of whole-number vectors, into which every participant has put a share of Skellam noise.

    The same as `DiscreteGaussianSum`, whose docstring says what is released, which units there are and what neighbours
    are, except that a share is Skellam of variance `share_variance` in every coordinate. A sum of m such shares is
    exactly Skellam, of variance mu = m `share_variance`. Without sampling, the divergence of whole order a is at most
    a D^2 / (2 mu) + min{((2a-1) D^2 + 6 D1) / (4 mu^2), 3 D1 / (2 mu)}, with D the l2 and D1 the l1 sensitivity
    (Agarwal, Kairouz and Liu 2021, Theorem 3.5). `poisson_sampled` takes this through the sampling. The account is by
    RDP alone: nobody has shown a pair of distributions that dominates vectors with this noise.

    Attributes:
        unit: Whose vector `l2_sensitivity` bounds.
        sampling_rate: q, more than 0 and at most 1.
        steps: How many sums are opened, at least 0.
        l2_sensitivity: D, in the whole numbers' unit. For records it is the grid.
        dimension: d, at least 1.
        l2_clip_norm: Largest l2 norm of one unit's vector before it is made whole numbers.
        scale: By how much it is multiplied for that.
        shares: How many participants were planned.
        threshold: The fewest with whom a sum is opened.
        colluders: How many of those in the sum may work against the others, less than `threshold`.
        survivors: How many were in the sum. Beforehand, put in the threshold.
        share_variance: Of one share, in the whole numbers' unit squared, positive.

    Raises:
        ParameterError: A field is out of its range.
    """

    share_variance: float

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("share_variance", self.share_variance)

    def event(self) -> dp_accounting.DpEvent:
        """Gives UnsupportedDpEvent: dp-accounting knows no Skellam noise. `renyi` is all there is."""
        return dp_accounting.UnsupportedDpEvent()

    def log_ratio(self) -> float:
        """Gives infinity: there is no Gaussian that this is shown to be close to."""
        return math.inf

    def renyi(self, orders: Sequence[int], times: int = 1) -> NDArray[np.float64]:
        """Bounds the Rényi divergence of one step, in either direction, at each order. See the class's docstring.

        Args:
            orders: Whole numbers, each at least 2.
            times: 2 for a sensitivity twice as large, as replace-one has it where everyone is drawn.

        Returns:
            Nats, one for each order.
        """
        mu, d2, d1 = self.counted * self.share_variance, times * self.l2_sensitivity, times * self.l1_sensitivity
        order = np.arange(max(orders) + 1)
        correction = np.minimum(((2 * order - 1) * d2**2 + 6 * d1) / (4 * mu**2), 3 * d1 / (2 * mu))
        return poisson_sampled(self.sampling_rate, order * d2**2 / (2 * mu) + correction, orders)


Mechanism: TypeAlias = PoissonSampledGaussian | DiscreteGaussianSum | SkellamSum
"""Anything that the account takes; `msgspec` decodes it by its tag, the name of its class."""


def poisson_sampled(rate: float, curve: NDArray[np.float64], orders: Sequence[int]) -> NDArray[np.float64]:
    """Takes a curve of Rényi divergences through Poisson sampling, exactly, for noise that is symmetric around 0.

    Under add-or-remove-one, for one unit of vector v, let M0 be the noise around the sum of the others, M1 the noise
    around v more, and Mq = (1-q) M0 + q M1; the others' draws are taken as given, which joint quasi-convexity allows.
    For a whole order a, the binomial theorem gives E_M0[(Mq/M0)^a] = sum_l C(a,l) (1-q)^(a-l) q^l
    exp((l-1) D_l(M1 || M0)), the factor being 1 for l = 0 and 1. (General noise needs a factor 3 in places: Zhu and
    Wang 2019, "Poisson subsampled Rényi differential privacy", Theorem 5.)

    The other direction, D_a(M0 || Mq), is never larger (Mironov, Talwar and Zhang 2019, Theorem 5), since M0 and M1 are
    each other's reflection at v/2, on the whole numbers too. Pair every x with its reflection. With z = M1(x)/M0(x)
    >= 1 of the two, u = 1 - q + q z and w = 1 - q + q/z, the difference of the moments at the pair is M0(x) (f(u) +
    z f(w)), where f(t) = t^a - t^(1-a) = 2 sqrt(t) sinh((a - 1/2) ln t). Here u w >= 1, so ln u >= ln 1/w >= 0, hence
    sinh(b ln u) / sinh(b ln 1/w) grows with b; at b = 1/2, a = 1, the two terms cancel; so the difference is not
    negative for a >= 1.

    Args:
        rate: q, more than 0 and at most 1.
        curve: Divergences of the noise from its shift by one unit's vector: `curve[l]` at order l, up to the largest
            order. Those at 0 and 1 are not used.
        orders: Whole numbers, each at least 2.

    Returns:
        The divergence of one sampled step, in either direction, at each order.

    Raises:
        ParameterError: An order is not a whole number of at least 2.
    """
    if any(not isinstance(order, int) or order < 2 for order in orders):
        raise ParameterError(f"orders should be whole numbers of at least 2, are {tuple(orders)}")
    if rate == 1.0:
        return np.asarray(curve[list(orders)], np.float64)
    drawn = np.arange(len(curve))
    moments = (drawn - 1) * curve + drawn * math.log(rate)
    moments[:2] = 0.0, math.log(rate)
    out = []
    for order in orders:
        terms = moments[: order + 1] + _log_binomials(order) + (order - drawn[: order + 1]) * math.log1p(-rate)
        out.append(max(0.0, float(logsumexp(terms))) / (order - 1))
    return np.array(out)


@lru_cache(maxsize=1024)
def _log_binomials(n: int) -> NDArray[np.float64]:
    k = np.arange(n + 1)
    return np.asarray(gammaln(n + 1) - gammaln(k + 1) - gammaln(n - k + 1), np.float64)


def tau(shares: int, share_sigma: float) -> float:
    """Bounds how far a sum of discrete Gaussians is from one of the same variance.

    For every x, the logarithm of the ratio of their probabilities is at most tau / 2 in absolute value (Kairouz, Liu
    and Steinke 2021, "The distributed discrete Gaussian mechanism for federated learning with secure aggregation",
    Theorem 9 and Corollary 12).

    Args:
        shares: How many are summed, at least 1.
        share_sigma: sigma of each, at least 1/2.

    Returns:
        10 sum_{k=1}^{shares-1} exp(-2 pi^2 sigma^2 k / (k+1)).

    >>> print(f"{tau(10, 1.0):.5g}")
    0.00054352
    """
    k = np.arange(1, shares)
    return 10.0 * float(np.exp(-2 * math.pi**2 * share_sigma**2 * (k / (k + 1))).sum())


def rounded_l2(norm: float, dimension: int, beta: float) -> float:
    """Gives the l2 norm that stochastic rounding of a vector to whole numbers exceeds with probability beta at most.

    It is min{s + sqrt(d), sqrt(s^2 + d/4 + sqrt(2 ln 1/beta) (s + sqrt(d)/2))} (Kairouz, Liu and Steinke 2021,
    Proposition 22).

    Args:
        norm: s, of the vector before rounding; positive.
        dimension: d, at least 1.
        beta: At least 0 and less than 1; 0 leaves the first bound only, which is never exceeded.

    Returns:
        The bound.

    Raises:
        ParameterError: A number is out of its range.

    >>> rounded_l2(100.0, 1024, 0.0)
    132.0
    """
    check_positive("norm", norm)
    check_count("dimension", dimension, at_least=1)
    always = norm + math.sqrt(dimension)
    if beta == 0.0:
        return always
    check_positive("beta", beta)
    if beta >= 1.0:
        raise ParameterError(f"beta should be less than 1, is {beta!r}")
    spread = math.sqrt(2 * math.log(1 / beta)) * (norm + math.sqrt(dimension) / 2)
    return min(always, math.sqrt(norm**2 + dimension / 4 + spread))


def check_shares(shares: int, threshold: int, colluders: int) -> None:
    """Refuses a plan of noise shares that leaves none to hide anything.

    Args:
        shares: How many participants are planned, at least 1.
        threshold: The fewest with whom a sum is opened, from 1 to `shares`.
        colluders: How many of them may subtract their own share, from 0 to less than `threshold`.

    Raises:
        ParameterError: A number is out of its range.
    """
    check_count("shares", shares, at_least=1)
    check_count("threshold", threshold, at_least=1)
    check_count("colluders", colluders)
    if threshold > shares:
        raise ParameterError(f"threshold should be at most the {shares} shares planned, is {threshold}")
    if colluders >= threshold:
        raise ParameterError(
            f"colluders should be fewer than the threshold {threshold}, are {colluders}: no noise would be left that "
            "they do not know"
        )


def check_positive(name: str, value: float, at_most: float = math.inf) -> None:
    """Refuses what is not a positive finite number.

    Args:
        name: What the number is called, for the message.
        value: The number.
        at_most: The largest allowed.

    Raises:
        ParameterError: It is not a number, not finite, not positive, or too large.
    """
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or not 0.0 < value <= at_most:
        limit = "" if at_most == math.inf else f" of at most {at_most:g}"
        raise ParameterError(f"{name} should be a positive finite number{limit}, is {value!r}")


def check_count(name: str, value: int, at_least: int = 0) -> None:
    """Refuses what is not a whole number, or too small a one.

    Args:
        name: What the number is called, for the message.
        value: The number.
        at_least: The smallest allowed.

    Raises:
        ParameterError: It is anything else.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < at_least:
        raise ParameterError(f"{name} should be a whole number of at least {at_least}, is {value!r}")

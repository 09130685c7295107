"""Mechanisms as values: everything that the account needs to know about a release, and nothing else.

A ledger stores these and not epsilons. Epsilons of several releases do not add up to anything useful, while mechanisms
compose, and can be accounted again by someone else with a better method.
"""

from __future__ import annotations

import enum
import math

import dp_accounting
import msgspec

from dp.errors import ParameterError


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


def check_count(name: str, value: int) -> None:
    """Refuses what is not a whole number of at least 0.

    Args:
        name: What the number is called, for the message.
        value: The number.

    Raises:
        ParameterError: It is anything else.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ParameterError(f"{name} should be a whole number of at least 0, is {value!r}")

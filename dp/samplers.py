"""Whole numbers of noise, drawn so exactly that no one can tell: the discrete Gaussian and the Skellam distribution.

Noise inside a secure sum has to be whole numbers, and noise that privacy rests on has to be the distribution that the
proof is about. A float64 Gaussian, rounded, is not: its grid and its tail give data away (Mironov 2012). Here every
probability is a multiple of 2^-128, worked out with more digits than that, and drawn with Walker's alias method in
integers alone: a word of 64 bits picks a column and settles which of its two values it is, and where 64 bits cannot
settle it, 64 more do.

No deviation is rounded: a float stands for the rational number that it is.
"""

from __future__ import annotations

import math
from fractions import Fraction
from functools import lru_cache

import mpmath
import numpy as np
from numpy.typing import NDArray

from dp.csprng import Csprng
from dp.errors import ParameterError

_UNIT = 1 << 128  # every table's probabilities are multiples of its inverse
_GUARD = 320  # bits to which they are worked out: 128, 135 more down to the tail, and the rest for accumulated rounding
_TAIL = 13.4  # standard deviations; a Gaussian exceeds it with probability 2^-133
_TABLE_SIGMA = 4096  # a wider discrete Gaussian is put together from two draws; its table would leave the cache
_MAX_SIGMA = 2**40
_MAX_SKELLAM_SIGMA = 20_000
_SMOOTH = 3  # deviations of the fine draw over the step of the coarse one
_BLOCK = 1 << 16  # values at a time, so that the intermediates stay in the cache
_LOW = np.uint64(2**64 - 1)


class DiscreteGaussian:
    """Noise on the whole numbers with P[x] proportional to exp(-x^2 / (2 sigma^2)).

    Canonne, Kamath and Steinke 2020, "The discrete Gaussian for differential privacy", Definition 1.

    One draw is within 2^-110 of this distribution in total variation, up to a sigma of 4096: each of fewer than 2^16
    probabilities is off by at most 2^-127, and the tail beyond 13.4 sigma, which is left out, has mass below 2^-132.

    Above, it is X + k Y with k = ceil(sigma / 4096), X of deviation 3 k and Y of variance sigma^2 / k^2 - 9. For every
    z, P[X + k Y = z] is a constant times exp(-z^2 / (2 sigma^2)) times a sum over y of exp(-(y - c)^2 / (2 w^2)), c
    depending on z, and w^2 = 9 v / (9 + v) > 8.9 where v is Y's variance. By Poisson's summation formula that last sum
    is the same for all c up to a factor in 1 ± 3 exp(-2 pi^2 w^2), hence within 2^-250. So the distance is that of the
    draws together. They are two up to a sigma of five million, and never more than four: it stays below 2^-107.

    Args:
        sigma: Positive, at most 2^40. It is nearly the deviation: to seven digits from 1 on.

    Raises:
        ParameterError: sigma is out of its range.
    """

    __slots__ = ("sigma",)

    def __init__(self, sigma: Fraction | float) -> None:
        self.sigma = _rational("sigma", sigma, _MAX_SIGMA)

    def draw(self, generator: Csprng, n: int) -> NDArray[np.int64]:
        """Draws n independent values.

        Args:
            generator: Where the randomness comes from; used up as far as needed.
            n: How many, at least 0.

        Returns:
            Array (n,), int64.
        """
        return _gaussian(self.sigma**2, generator, n)


class Skellam:
    """Noise on the whole numbers: the difference of two Poisson variables, each of mean `variance` / 2.

    Skellam 1946; Agarwal, Kairouz and Liu 2021, "The Skellam mechanism for differentially private federated learning".
    Sums of independent ones are Skellam again, with the variances added up, which is exact.

    One draw is within 2^-108 of this distribution in total variation: each of fewer than 2^19 probabilities is off by
    at most 2^-127, and the tail that is left out has mass below 2^-132.

    Args:
        variance: Positive, at most 20000^2.

    Raises:
        ParameterError: The variance is out of its range.
    """

    __slots__ = ("variance",)

    def __init__(self, variance: Fraction | float) -> None:
        self.variance = _rational("variance", variance, _MAX_SKELLAM_SIGMA**2)

    def draw(self, generator: Csprng, n: int) -> NDArray[np.int64]:
        """Draws n independent values.

        Args:
            generator: Where the randomness comes from; used up as far as needed.
            n: How many, at least 0.

        Returns:
            Array (n,), int64.
        """
        return _skellam_table(self.variance).draw(generator, n)


class _Table:
    """Walker's alias table of a distribution symmetric around 0 (Walker 1977; Vose 1991, both in whole numbers).

    Column c of 2^m columns holds the value c below its threshold and the value `other[c]` from there on. A threshold
    is a whole number of at most 2^(128-m), kept as the word that is compared first and the word that settles a tie.
    """

    __slots__ = ("high", "low", "other", "shift")

    def __init__(self, halves: list[int]) -> None:
        """Takes weights of 0, 1, 2, ... on one side: `halves[k]` is proportional to P[k], for k < 2^m."""
        weights = _scaled([halves[0], *(2 * h for h in halves[1:])])
        m = max(1, (len(weights) - 1).bit_length())
        columns, capacity = 1 << m, _UNIT >> m
        weights += [0] * (columns - len(weights))
        threshold, other = [capacity] * columns, list(range(columns))
        small = [c for c, w in enumerate(weights) if w < capacity]
        large = [c for c, w in enumerate(weights) if w >= capacity]
        while small:
            # The weights left add up to the capacity left, so as long as a column lacks some, another has too much.
            lacking, giving = small.pop(), large[-1]
            threshold[lacking], other[lacking] = weights[lacking], giving
            weights[giving] -= capacity - weights[lacking]
            if weights[giving] < capacity:
                small.append(large.pop())
        # As a fraction of the column, in 128 bits. A full column is its own alias, so 2^128 may be cut to fit.
        fractions = [min(t << m, _UNIT - 1) for t in threshold]
        self.high = np.array([f >> 64 for f in fractions], np.uint64)
        self.low = np.array([f & (2**64 - 1) for f in fractions], np.uint64)
        self.other = np.array(other, np.int32)
        self.shift = m

    def draw(self, generator: Csprng, n: int) -> NDArray[np.int64]:
        """Draws (n,) values with random signs; the sign of 0 changes nothing, so 0 keeps its probability."""
        out = np.empty(n, np.int64)
        for start in range(0, n, _BLOCK):
            out[start : start + _BLOCK] = self._magnitudes(generator, min(_BLOCK, n - start))
        # In two's complement -x is ~x + 1, which is (x ^ -1) - (-1).
        signs = np.unpackbits(generator.uint64(-(-n // 64)).view(np.uint8), count=n).view(np.int8)
        np.negative(signs, out=signs)
        np.bitwise_xor(out, signs, out=out)
        return np.subtract(out, signs, out=out)

    def _magnitudes(self, generator: Csprng, n: int) -> NDArray[np.int32]:
        words = generator.uint64(n)
        columns = (words >> np.uint64(64 - self.shift)).view(np.int64)
        within = words << np.uint64(self.shift)  # the first 64 bits of the place in the column, m of them still unknown
        bounds = self.high.take(columns)
        # The unknown bits are the lowest m of `within`. They matter where all others agree.
        tied = np.flatnonzero((within ^ bounds) >> np.uint64(self.shift) == 0)
        own = within < bounds
        if tied.size:
            own[tied] = self._settle(generator, within[tied], columns[tied])
        return np.where(own, columns.astype(np.int32), self.other.take(columns))

    def _settle(self, generator: Csprng, within: NDArray[np.uint64], columns: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Compares all 128 bits, in whole numbers; 64 more are drawn, and after the column's m they are the rest."""
        return np.array(
            [
                # Here a column is 2^(128-m) wide, as in the constructor.
                (int(known) << 64 >> self.shift) + int(more)
                < (int(self.high[c]) << 64 | int(self.low[c])) >> self.shift
                for known, more, c in zip(within, generator.uint64(len(columns)), columns, strict=True)
            ],
            np.bool_,
        )


def _gaussian(variance: Fraction, generator: Csprng, n: int) -> NDArray[np.int64]:
    if variance <= _TABLE_SIGMA**2:
        return _gaussian_table(variance).draw(generator, n)
    k = math.isqrt(math.ceil(variance) - 1) // _TABLE_SIGMA + 1
    fine = _gaussian(Fraction((_SMOOTH * k) ** 2), generator, n)
    coarse = _gaussian(variance / k**2 - _SMOOTH**2, generator, n)
    return fine + k * coarse


@lru_cache(maxsize=32)
def _gaussian_table(variance: Fraction) -> _Table:
    return _Table(_gaussian_weights(variance))


@lru_cache(maxsize=4)
def _skellam_table(variance: Fraction) -> _Table:
    return _Table(_skellam_weights(variance))


def _gaussian_weights(variance: Fraction) -> list[int]:
    """Gives P[k] / P[0] in units of 2^-320, for k from 0 to 13.4 sigma.

    P[k+1] / P[k] = exp(-(2k+1) / (2 sigma^2)), which itself shrinks by exp(-1 / sigma^2) from each k to the next.
    """
    with mpmath.workprec(_GUARD + 32):
        exponent = mpmath.mpf(variance.denominator) / variance.numerator
        ratio, shrink = (int(mpmath.floor(mpmath.exp(-e) * (1 << _GUARD))) for e in (exponent / 2, exponent))
    value, weights = 1 << _GUARD, []
    for _ in range(math.ceil(_TAIL * math.sqrt(variance)) + 1):
        weights.append(value)
        value, ratio = value * ratio >> _GUARD, ratio * shrink >> _GUARD
    return weights


def _skellam_weights(variance: Fraction) -> list[int]:
    """Gives numbers proportional to P[k], for k from 0 until the rest has a mass below 2^-135.

    P[k] is exp(-mu) I_k(mu), where mu is the variance. From a k far out, where I_k is taken for 1 and I_{k+1} for 0,
    I_{k-1} = I_{k+1} + (2k / mu) I_k leads down to true proportions (Miller's algorithm, DLMF 3.6(iii)): started where
    I has fallen by 2^-270, it is off by 2^-270 relatively where I has fallen by 2^-135.
    """
    mu = float(variance)
    last, start = (_chernoff(mu, bits * math.log(2)) for bits in (135, 280))
    weights = [0] * (last + 1)
    above, value = 0, 1 << _GUARD
    for k in range(start, 0, -1):
        above, value = value, above + 2 * k * variance.denominator * value // variance.numerator
        if k <= last + 1:
            weights[k - 1] = value
    return weights


def _chernoff(mu: float, nats: float) -> int:
    """Finds a k with P[|Skellam| >= k] <= 2 exp(-nats), by Chernoff's bound, and at most twice the least such."""

    def exponent(k: float) -> float:
        return k * math.asinh(k / mu) - k * (k / mu) / (math.hypot(k / mu, 1.0) + 1.0)

    low, high = 0.0, 1.0
    while exponent(high) < nats:
        low, high = high, 2 * high
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (middle, high) if exponent(middle) < nats else (low, middle)
    return math.ceil(high) + 1


def _scaled(weights: list[int]) -> list[int]:
    """Scales to a total of 2^128. What rounding leaves over, at most one for each value, goes to the largest."""
    total = sum(weights)
    scaled = [w * _UNIT // total for w in weights]
    scaled[scaled.index(max(scaled))] += _UNIT - sum(scaled)
    return scaled


def _rational(name: str, value: Fraction | float, at_most: int) -> Fraction:
    number = isinstance(value, int | float | Fraction) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or not 0 < value <= at_most:
        raise ParameterError(f"{name} should be a positive number of at most {at_most}, is {value!r}")
    return Fraction(value)

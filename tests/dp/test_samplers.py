"""Samples are compared with the distributions on fixed entropy, so that nothing here can flake.

LEVEL is the chance of a false alarm of one test, were the entropy changed. The tables are compared without any chance.
"""

import math
from fractions import Fraction

import mpmath
import numpy as np
import pytest
from scipy import stats

import dp.samplers
from dp import Csprng, DiscreteGaussian, ParameterError, Skellam
from dp.samplers import _gaussian_table, _skellam_table
from tests.dp.entropy import fixed_entropy

LEVEL = 1e-6


def gaussian_pmf(sigma):
    k = np.arange(-math.ceil(14 * sigma) - 1, math.ceil(14 * sigma) + 2)
    p = np.exp(-(k**2) / (2 * sigma**2))
    return k, p / p.sum()


def skellam_pmf(variance):
    k = np.arange(-math.ceil(14 * math.sqrt(variance)) - 20, math.ceil(14 * math.sqrt(variance)) + 21)
    return k, stats.skellam.pmf(k, variance / 2, variance / 2)


def surprise(sample, pmf):
    """P-value of Pearson's test, values pooled outwards until ten are expected in each class."""
    k, p = pmf
    expected = p * len(sample)
    counts = np.bincount((sample - k[0]).clip(0, len(k) - 1), minlength=len(k))
    inside = np.flatnonzero(expected >= 10)
    low, high = inside[0], inside[-1]
    pooled = [np.concatenate([[v[:low].sum()], v[low : high + 1], [v[high + 1 :].sum()]]) for v in (counts, expected)]
    kept = pooled[1] > 1
    return stats.chisquare(pooled[0][kept], pooled[1][kept] * pooled[0][kept].sum() / pooled[1][kept].sum()).pvalue


def draw(sampler, label, n=300_000):
    return sampler.draw(Csprng(fixed_entropy(label)), n)


@pytest.mark.parametrize("sigma", [0.3, 0.5, 1.0, 2.5, math.pi, 29.7, Fraction(1, 3), 5])
def test_discrete_gaussians(sigma):
    sample = draw(DiscreteGaussian(sigma), f"gauss {sigma}")
    assert sample.dtype == np.int64
    assert surprise(sample, gaussian_pmf(float(sigma))) > LEVEL


@pytest.mark.parametrize("variance", [0.01, 0.5, 1.0, 7.3, 900.0])
def test_skellams(variance):
    sample = draw(Skellam(variance), f"skellam {variance}")
    assert sample.dtype == np.int64
    assert surprise(sample, skellam_pmf(variance)) > LEVEL


def rounded_up(label):
    return draw(DiscreteGaussian(math.ceil(2.5)), label)


def zero_at_half(label):
    """As when a sign is drawn, and minus 0 is drawn again although 0 was given single weight."""
    sample = draw(DiscreteGaussian(2.5), label, 400_000)
    kept = (sample != 0) | (np.arange(len(sample)) % 2 == 0)
    return sample[kept][:300_000]


def zero_twice(label):
    """As when 0 gets the weight of two signs like every other magnitude."""
    sample = draw(DiscreteGaussian(2.5), label)
    zeros = int((sample == 0).sum())
    return np.concatenate([sample[zeros:], np.zeros(zeros, np.int64)])


def truncated(label):
    sample = draw(DiscreteGaussian(2.5), label)
    return sample[np.abs(sample) <= 3.4 * 2.5]


def slightly_off(label):
    return draw(DiscreteGaussian(2.55), label)


def without_signs(label):
    return np.abs(draw(DiscreteGaussian(2.5), label))


@pytest.mark.parametrize("wrong", [rounded_up, zero_at_half, zero_twice, truncated, slightly_off, without_signs])
def test_the_test_sees_what_is_wrong(wrong):
    assert surprise(wrong("wrong"), gaussian_pmf(2.5)) < LEVEL


@pytest.mark.parametrize(
    "wrong", [lambda v: Skellam(2 * v), lambda v: DiscreteGaussian(math.sqrt(v)), lambda v: Skellam(math.ceil(v))]
)
def test_the_test_tells_a_skellam_from_others(wrong):
    assert surprise(draw(wrong(7.3), "wrong"), skellam_pmf(7.3)) < LEVEL


def weights(table):
    """What every magnitude has, in units of 2^-128, out of the table's columns."""
    m = table.shift
    total = [0] * (1 << m)
    for column, (high, low, other) in enumerate(zip(table.high, table.low, table.other, strict=True)):
        threshold = (int(high) << 64 | int(low)) >> m
        if other == column:
            threshold = 1 << (128 - m)
        total[column] += threshold
        total[other] += (1 << (128 - m)) - threshold
    return total


@pytest.mark.parametrize(
    "sigma", [Fraction(1, 5), Fraction(1), Fraction(17, 7), Fraction(math.sqrt(3) * 20), Fraction(300)]
)
def test_tables_of_discrete_gaussians_are_exact(sigma):
    table = weights(_gaussian_table(sigma**2))
    assert sum(table) == 2**128
    with mpmath.workprec(400):
        s = mpmath.mpf(sigma.numerator) / sigma.denominator
        p = [mpmath.exp(-(k**2) / (2 * s**2)) for k in range(math.ceil(20 * sigma) + 2)]
        whole = p[0] + 2 * sum(p[1:])
        distance = [abs(w - (2 if k else 1) * p[k] / whole * 2**128) for k, w in enumerate(table) if k < len(p)]
        # What rounding left over is with the most likely value.
        assert sorted(distance)[-2] < 2
        assert sum(distance) / 2**129 < mpmath.mpf(2) ** -110
    # The tail is there as far as 2^-128 reaches.
    assert max(k for k, w in enumerate(table) if w) >= 12.8 * sigma - 1


@pytest.mark.parametrize("variance", [Fraction(1, 100), Fraction(1), Fraction(73, 10), Fraction(5000)])
def test_tables_of_skellams_are_exact(variance):
    table = weights(_skellam_table(variance))
    assert sum(table) == 2**128
    with mpmath.workprec(400):
        mu = mpmath.mpf(variance.numerator) / variance.denominator
        ks = sorted({*range(min(40, len(table))), *range(0, len(table), 97)})
        for k in ks:
            exact = (2 if k else 1) * mpmath.besseli(k, mu) * mpmath.exp(-mu) * 2**128
            assert abs(table[k] - exact) < (len(table) if table[k] == max(table) else 2)


class Words:
    """A generator that gives chosen words."""

    def __init__(self, *words):
        self.words = [np.array(w, np.uint64) for w in words]

    def uint64(self, n):
        assert len(self.words[0]) == n
        return self.words.pop(0)


def test_a_tie_is_settled_by_the_next_64_bits():
    table = _gaussian_table(Fraction(9))
    m = table.shift
    column = next(c for c in range(1 << m) if table.other[c] != c and int(table.low[c]) and int(table.high[c]))
    other = int(table.other[column])
    threshold = (int(table.high[column]) << 64 | int(table.low[column])) >> m
    word = column << (64 - m) | threshold >> 64
    rest = threshold & (2**64 - 1)
    assert 0 < rest < 2**64 - 1
    generator = Words([word] * 4, [rest - 1, rest, 0, 2**64 - 1], [0])
    assert table.draw(generator, 4).tolist() == [column, other, column, other]
    assert not generator.words
    # One step to either side needs no second word.
    generator = Words([word - 1, word + 1], [0])
    assert table.draw(generator, 2).tolist() == [column, other]


def test_signs_leave_zero_alone():
    table = _gaussian_table(Fraction(9))
    zero, one = 0, 1 << (64 - table.shift)
    generator = Words([zero, zero, one, one], [0b1010_0000])
    assert table.draw(generator, 4).tolist() == [0, 0, -1, 1]


def test_a_full_column_is_its_own():
    table = _gaussian_table(Fraction(9))
    full = next(c for c in range(1 << table.shift) if table.other[c] == c)
    word = (full + 1 << (64 - table.shift)) - 1
    for last in (0, 2**64 - 1):
        assert abs(int(table.draw(Words([word], [last], [0]), 1)[0])) == full


def test_wide_ones_are_put_together_of_two(monkeypatch):
    """The same construction as above 4096, small enough for every value to be counted."""
    monkeypatch.setattr(dp.samplers, "_TABLE_SIGMA", 30)
    for sigma in (31.0, 60.0, 95.3):
        assert surprise(draw(DiscreteGaussian(sigma), f"wide {sigma}"), gaussian_pmf(sigma)) > LEVEL
    monkeypatch.setattr(dp.samplers, "_SMOOTH", Fraction(1, 4))  # too little: the coarse steps show
    assert surprise(draw(DiscreteGaussian(95.3), "rough"), gaussian_pmf(95.3)) < LEVEL


def test_two_together_are_one_to_250_bits():
    """The factor that the docstring bounds, for the smallest w that occurs."""
    with mpmath.workprec(600):
        w = mpmath.sqrt(mpmath.mpf("8.9"))
        sums = [
            mpmath.fsum(mpmath.exp(-((y - mpmath.mpf(c) / 8) ** 2) / (2 * w**2)) for y in range(-120, 121))
            for c in range(5)
        ]
        assert max(sums) / min(sums) - 1 < mpmath.mpf(2) ** -250
    smallest = Fraction(4097, 2) ** 2 - 9
    assert 9 * smallest / (9 + smallest) > Fraction(89, 10)


@pytest.mark.parametrize("sigma", [4096, 4096.5, 20_000, 1e6, 1e7, 2.0**40])
def test_any_width(sigma):
    sample = draw(DiscreteGaussian(sigma), f"width {sigma}", 200_000)
    assert stats.kstest(sample / sigma, "norm").pvalue > LEVEL
    k = 1 + math.isqrt(math.ceil(sigma**2) - 1) // 4096
    if k > 1:
        k = min(k, 1000)
        assert stats.chisquare(np.bincount(sample % k, minlength=k)).pvalue > LEVEL


def test_the_widest_skellam():
    sample = draw(Skellam(20_000**2), "widest", 200_000)
    assert stats.kstest(sample / 20_000, "norm").pvalue > LEVEL


def test_shares_of_skellams_add_up():
    total = sum(draw(Skellam(Fraction(73, 30)), f"share {i}") for i in range(3))
    assert surprise(total, skellam_pmf(7.3)) > LEVEL


def test_equal_entropy_gives_equal_noise_and_other_entropy_does_not():
    a, b, c = (draw(DiscreteGaussian(50), label, 1000) for label in ("a", "a", "c"))
    assert (a == b).all()
    assert abs(np.corrcoef(a, c)[0, 1]) < 5 / math.sqrt(1000)


def test_neighbouring_draws_are_independent():
    sample = draw(DiscreteGaussian(20_000), "pairs").astype(float)
    assert abs(np.corrcoef(sample[:-1], sample[1:])[0, 1]) < 5 / math.sqrt(len(sample))
    assert abs(np.corrcoef(np.abs(sample[:-1]), np.abs(sample[1:]))[0, 1]) < 5 / math.sqrt(len(sample))


@pytest.mark.parametrize("n", [0, 1, 63, 64, 65, 65_536, 65_537])
def test_sizes(n):
    assert draw(DiscreteGaussian(3.5), "n", n).shape == (n,)
    assert draw(Skellam(3.5), "n", n).shape == (n,)


def test_a_float_is_the_rational_that_it_is():
    assert DiscreteGaussian(0.1).sigma == Fraction(0.1) != Fraction(1, 10)
    assert Skellam(0.1).variance == Fraction(0.1)


@pytest.mark.parametrize("wrong", [0, -1.0, math.nan, math.inf, 2.0**41, "1", True, None])
@pytest.mark.parametrize("sampler", [DiscreteGaussian, Skellam])
def test_what_makes_no_sense_is_refused(sampler, wrong):
    with pytest.raises(ParameterError, match="positive number of at most"):
        sampler(wrong)


def test_a_skellam_has_its_own_limit():
    with pytest.raises(ParameterError, match="variance"):
        Skellam(4e8 + 1)

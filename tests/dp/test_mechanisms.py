import itertools
import math

import dp_accounting
import msgspec
import numpy as np
import pytest
from dp_accounting import rdp
from scipy import integrate, stats
from scipy.special import logsumexp

from dp import DiscreteGaussianSum, Mechanism, ParameterError, PoissonSampledGaussian, Relation, SkellamSum, Unit, spent
from dp.mechanisms import poisson_sampled, rounded_l2, tau

GOOD = {"sampling_rate": 0.1, "noise_multiplier": 1.0, "steps": 10, "l2_clip_norm": 2.0}


def test_event():
    once = dp_accounting.PoissonSampledDpEvent(0.1, dp_accounting.GaussianDpEvent(1.0))
    assert PoissonSampledGaussian(**GOOD).event() == dp_accounting.SelfComposedDpEvent(once, 10)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        (f, v)
        for f in ("sampling_rate", "noise_multiplier", "l2_clip_norm")
        for v in (0.0, -1.0, math.nan, math.inf, "1")
    ]
    + [("sampling_rate", 1.0001), ("noise_multiplier", True), ("steps", -1), ("steps", 1.5), ("steps", True)],
)
def test_what_makes_no_sense_is_refused(field, value):
    with pytest.raises(ParameterError, match=field):
        PoissonSampledGaussian(**{**GOOD, field: value})


def test_edges_are_allowed():
    PoissonSampledGaussian(**{**GOOD, "sampling_rate": 1.0, "steps": 0})


def test_it_survives_encoding_and_is_checked_on_the_way_back():
    mechanism = PoissonSampledGaussian(**GOOD)
    for codec in (msgspec.json, msgspec.msgpack):
        assert codec.decode(codec.encode(mechanism), type=PoissonSampledGaussian) == mechanism
    with pytest.raises(ParameterError, match="noise_multiplier"):
        msgspec.json.decode(msgspec.json.encode({**GOOD, "noise_multiplier": 0.0}), type=PoissonSampledGaussian)


def test_relations_map_to_dp_accountings():
    names = dp_accounting.NeighboringRelation
    assert Relation("add-or-remove-one").neighboring_relation() is names.ADD_OR_REMOVE_ONE
    assert Relation("replace-one").neighboring_relation() is names.REPLACE_ONE


# Sums of noise shares

COMMON = {
    "unit": Unit.RECORD,
    "sampling_rate": 0.1,
    "steps": 10,
    "l2_sensitivity": 64.0,
    "dimension": 20,
    "l2_clip_norm": 2.0,
    "scale": 32.0,
    "shares": 5,
    "threshold": 3,
    "colluders": 1,
    "survivors": 4,
}


def gaussians(**changes):
    return DiscreteGaussianSum(**{**COMMON, "share_sigma": 40.0, **changes})


def skellams(**changes):
    return SkellamSum(**{**COMMON, "share_variance": 1600.0, **changes})


def alone(**changes):
    """One share, one coordinate, one step."""
    single = {"shares": 1, "threshold": 1, "colluders": 0, "survivors": 1, "dimension": 1, "steps": 1}
    return {**single, **changes}


@pytest.mark.parametrize("make", [gaussians, skellams])
@pytest.mark.parametrize(
    ("changes", "says"),
    [
        *[
            ({f: v}, f)
            for f in ("sampling_rate", "l2_sensitivity", "l2_clip_norm", "scale")
            for v in (0.0, math.nan, -1)
        ],
        *[
            ({f: v}, f)
            for f in ("steps", "dimension", "shares", "threshold", "colluders", "survivors")
            for v in (-1, 1.5)
        ],
        *[({f: 0}, f) for f in ("dimension", "shares", "threshold", "survivors")],
        ({"sampling_rate": 1.1}, "sampling_rate"),
        ({"l2_sensitivity": 2.0**32}, "l2_sensitivity"),
        ({"threshold": 6}, "threshold should be at most the 5 shares"),
        ({"colluders": 3}, "no noise would be left"),
        ({"survivors": 2}, "from the threshold 3 to all 5"),
        ({"survivors": 6}, "from the threshold 3 to all 5"),
        ({"share_sigma": 0.0, "share_variance": 0.0}, "share_"),
        ({"share_sigma": math.inf, "share_variance": math.inf}, "share_"),
    ],
)
def test_sums_that_make_no_sense_are_refused(make, changes, says):
    own = "share_variance" if make is gaussians else "share_sigma"
    changes = {k: v for k, v in changes.items() if k != own}
    with pytest.raises(ParameterError, match=says):
        make(**changes)


def test_shares_too_narrow_for_any_proof():
    gaussians(share_sigma=0.5)
    with pytest.raises(ParameterError, match="narrower discrete Gaussians"):
        gaussians(share_sigma=0.499)


def test_all_mechanisms_survive_encoding_side_by_side():
    for mechanism in (PoissonSampledGaussian(**GOOD), gaussians(share_sigma=0.1 + 0.2 + 8), skellams()):
        for codec in (msgspec.json, msgspec.msgpack):
            assert codec.decode(codec.encode(mechanism), type=Mechanism) == mechanism
    with pytest.raises(ParameterError, match="survivors"):
        msgspec.json.decode(
            msgspec.json.encode(gaussians()).replace(b'"survivors":4', b'"survivors":9'), type=Mechanism
        )
    with pytest.raises(msgspec.ValidationError):
        msgspec.json.decode(msgspec.json.encode(gaussians()).replace(b'"record"', b'"patient"'), type=Mechanism)


def test_what_colluders_know_hides_nothing():
    assert gaussians().counted == 3
    for make in (gaussians, skellams):
        one, two = make(colluders=2, survivors=4), make(colluders=0, threshold=2, survivors=2)
        assert (one.renyi((2, 9)) == two.renyi((2, 9))).all()
        assert (make(survivors=5).renyi((2, 9)) < make().renyi((2, 9))).all()
    assert gaussians(colluders=2).event() == gaussians(colluders=0, threshold=2, survivors=2).event()


@pytest.mark.parametrize(
    ("shares", "sigma", "expected"), [(10, 0.5, 2.34533), (10, 1.0, 5.4352e-4), (100, 0.8, 0.0264593), (1, 0.5, 0.0)]
)
def test_tau(shares, sigma, expected):
    assert tau(shares, sigma) == pytest.approx(expected, rel=1e-5)
    mechanism = gaussians(shares=shares, threshold=shares, survivors=shares, colluders=0, share_sigma=sigma)
    assert mechanism.tau == tau(shares, sigma)


def test_rounded_l2():
    assert rounded_l2(100.0, 1024, math.exp(-0.5)) == pytest.approx(101.84301645, abs=1e-8)
    assert rounded_l2(100.0, 1024, 0.0) == 132.0
    assert rounded_l2(1.0, 4, 1e-300) == 3.0  # the first bound is the smaller one
    for wrong in ((0.0, 4, 0.1), (1.0, 0, 0.1), (1.0, 4, 1.0), (1.0, 4, -0.1), (1.0, 4, math.nan)):
        with pytest.raises(ParameterError):
            rounded_l2(*wrong)


def pmf(sigma, reach):
    p = np.exp(-(np.arange(-reach, reach + 1) ** 2) / (2 * sigma**2))
    return p / p.sum()


def summed(sigma, shares, reach):
    """Probabilities of a sum of discrete Gaussians from -reach to reach."""
    total = np.ones(1)
    for _ in range(shares):
        total = np.convolve(total, pmf(sigma, reach))
    middle = len(total) // 2
    return total[middle - reach : middle + reach + 1]


@pytest.mark.parametrize(("shares", "sigma"), [(2, 0.5), (3, 0.5), (10, 0.5), (10, 0.6), (30, 0.7)])
def test_half_of_tau_bounds_the_distance_of_a_sum(shares, sigma):
    reach = 12
    one, many = pmf(math.sqrt(shares) * sigma, 60)[60 - reach : 60 + reach + 1], summed(sigma, shares, 60)
    assert np.abs(np.log(many[60 - reach : 60 + reach + 1] / one)).max() <= tau(shares, sigma) / 2


@pytest.mark.parametrize(("s2", "r2"), [(0.5, 0.15), (0.4, 0.3), (2.0, 0.3)])
def test_a_discrete_gaussian_imitates_a_gaussian(s2, r2):
    """The first half of the proof for PLD, by integration."""
    e = 2 * sum(math.exp(-2 * math.pi**2 * r2 * j**2) for j in range(1, 9))
    whole = np.arange(-30, 31)

    def centred_at(x, z):
        weights = np.exp(-((whole - x) ** 2) / (2 * r2))
        return math.exp(-((z - x) ** 2) / (2 * r2)) / weights.sum()

    exact = pmf(math.sqrt(s2 + r2), 30)
    for z in range(4):
        imitated = integrate.quad(
            lambda x, z=z: stats.norm.pdf(x, 0, math.sqrt(s2)) * centred_at(x, z), -9, 9, limit=300, epsabs=1e-14
        )[0]
        assert abs(math.log(imitated / exact[30 + z])) <= 2 * math.atanh(e)


def test_the_gaussian_that_is_imitated():
    mechanism = gaussians(steps=1000)
    once = mechanism.event().event
    assert (mechanism.event().count, once.sampling_probability) == (1000, 0.1)
    r2 = 3 * 40.0**2 - (once.event.noise_multiplier * 64) ** 2
    assert 1.0 < r2 < 2.0
    e = 2 * math.exp(-2 * math.pi**2 * r2)
    assert mechanism.log_ratio() >= 20 * 2 * e
    assert 2 * 1000 * mechanism.log_ratio() == pytest.approx(1e-6, rel=0.01)
    narrow = gaussians(share_sigma=0.9, survivors=5, colluders=0)
    assert narrow.log_ratio() > 20 * narrow.tau / 2 > 0.01


def test_where_no_gaussian_is_near():
    assert isinstance(gaussians(**alone(), share_sigma=0.9).event(), dp_accounting.UnsupportedDpEvent)
    assert gaussians(**alone(), share_sigma=0.9).log_ratio() == math.inf
    assert isinstance(skellams().event(), dp_accounting.UnsupportedDpEvent)
    assert skellams().log_ratio() == math.inf


ORDERS = (2, 3, 5, 8, 20, 64)


@pytest.mark.parametrize(("q", "sigma"), [(0.01, 1.0), (0.3, 0.8), (1.0, 2.0)])
def test_gaussian_divergences_are_those_of_dp_accounting(q, sigma):
    mechanism = PoissonSampledGaussian(sampling_rate=q, noise_multiplier=sigma, steps=1, l2_clip_norm=1.0)
    accountant = rdp.RdpAccountant(list(ORDERS))
    accountant.compose(mechanism.event())
    assert mechanism.log_ratio() == 0.0
    assert mechanism.renyi(ORDERS) == pytest.approx(accountant._rdp, rel=1e-9)
    doubled = msgspec.structs.replace(mechanism, noise_multiplier=sigma / 2)
    assert mechanism.renyi(ORDERS, 2) == pytest.approx(doubled.renyi(ORDERS))


def divergence(p, q, order):
    kept = (p > 1e-250) & (q > 1e-250)
    return logsumexp(order * np.log(p[kept]) + (1 - order) * np.log(q[kept])) / (order - 1)


def shifted(noise, v):
    return np.roll(noise, v)  # the noise is negligible where it comes round


NOISES = {
    "wide": (pmf(6.0, 300), gaussians(**alone(sampling_rate=0.3, l2_sensitivity=4.0), share_sigma=6.0)),
    "narrow": (pmf(0.5, 40), gaussians(**alone(sampling_rate=0.3, l2_sensitivity=1.0), share_sigma=0.5)),
    "narrow sum": (
        summed(0.6, 4, 60),
        gaussians(**alone(sampling_rate=0.3, l2_sensitivity=2.0, shares=4, threshold=4, survivors=4), share_sigma=0.6),
    ),
    "skellam": (
        stats.skellam.pmf(np.arange(-150, 151), 8.0, 8.0),
        skellams(**alone(sampling_rate=0.3, l2_sensitivity=2.0), share_variance=16.0),
    ),
    "skellam, narrow": (
        stats.skellam.pmf(np.arange(-60, 61), 0.5, 0.5),
        skellams(**alone(sampling_rate=0.3, l2_sensitivity=1.0), share_variance=1.0),
    ),
}


@pytest.mark.parametrize("name", NOISES)
@pytest.mark.parametrize("q", [0.01, 0.3, 1.0])
def test_divergences_bound_the_exact_ones_in_both_directions(name, q):
    """In one dimension every probability can be written down."""
    noise, mechanism = NOISES[name]
    mechanism = msgspec.structs.replace(mechanism, sampling_rate=q)
    orders = (2, 3, 4) if "skellam" in name else (2, 3, 5, 8)
    for v in range(1, int(mechanism.l2_sensitivity) + 1):
        mixture = (1 - q) * noise + q * shifted(noise, v)
        for order, bound in zip(orders, mechanism.renyi(orders), strict=True):
            assert divergence(mixture, noise, order) <= bound * (1 + 1e-9)
            assert divergence(noise, mixture, order) <= bound * (1 + 1e-9)
    if name == "wide":  # and for this one it is not a bound but the divergence itself
        assert divergence(mixture, noise, 3) == pytest.approx(mechanism.renyi((3,))[0], rel=1e-9)


@pytest.mark.parametrize("name", NOISES)
def test_replacing_doubles_the_sensitivity(name):
    noise, mechanism = NOISES[name]
    mechanism = msgspec.structs.replace(mechanism, sampling_rate=1.0)
    v = int(mechanism.l2_sensitivity)
    assert divergence(shifted(noise, v), shifted(noise, -v), 3) <= mechanism.renyi((3,), 2)[0] * (1 + 1e-9)
    if "narrow" not in name:  # where bounds are close
        assert divergence(shifted(noise, v), shifted(noise, -v), 3) > mechanism.renyi((3,))[0]


@pytest.mark.parametrize("name", NOISES)
@pytest.mark.parametrize("relation", list(Relation))
@pytest.mark.parametrize("delta", [1e-2, 1e-4])
def test_the_epsilon_reported_holds_by_the_definition(name, relation, delta):
    noise, mechanism = NOISES[name]
    q, reach = mechanism.sampling_rate, int(mechanism.l2_sensitivity)
    epsilon = spent([mechanism], delta, relation).epsilon
    others = [0] if relation is Relation.ADD_OR_REMOVE_ONE else range(-reach, reach + 1)
    for u, v in itertools.product(range(-reach, reach + 1), others):
        p, r = ((1 - q) * noise + q * shifted(noise, w) for w in (u, v))
        for one, other in ((p, r), (r, p)):
            assert np.maximum(one - math.exp(epsilon) * other, 0).sum() <= delta
    if name == "wide" and relation is Relation.ADD_OR_REMOVE_ONE:  # and not a bound without any worth
        p = (1 - q) * noise + q * shifted(noise, reach)
        assert np.maximum(p - math.exp(0.85 * epsilon) * noise, 0).sum() > delta


def test_the_epsilon_reported_holds_in_two_dimensions_for_every_vector():
    q, grid, sigma, delta = 0.3, 3, 3.0, 1e-3
    mechanism = gaussians(**alone(sampling_rate=q, l2_sensitivity=float(grid), dimension=2), share_sigma=sigma)
    came = spent([mechanism], delta)
    assert came.accountant == "pld"
    line = pmf(sigma, 60)
    noise = np.outer(line, line)
    worst = 0.0
    for a, b in itertools.product(range(-grid, grid + 1), repeat=2):
        if a * a + b * b <= grid * grid:
            mixture = (1 - q) * noise + q * np.roll(noise, (a, b), (0, 1))
            for one, other in ((mixture, noise), (noise, mixture)):
                worst = max(worst, np.maximum(one - math.exp(came.epsilon) * other, 0).sum())
    assert 0.2 * delta < worst <= delta


def test_each_bound_of_the_sum_is_used_where_it_is_the_least():
    few = {"sampling_rate": 1.0, "colluders": 0, "survivors": 5, "l2_sensitivity": 10.0}
    orders = np.array([2, 10])
    for changes, which in (
        ({"dimension": 1, "share_sigma": 0.5}, 0),
        ({"dimension": 20, "share_sigma": 0.8, "l2_sensitivity": 1.0}, 1),
        ({"dimension": 10**6, "share_sigma": 0.7}, 1),
    ):
        m = gaussians(**{**few, **changes})
        t, d, deviation = m.tau, m.dimension, math.sqrt(5) * m.share_sigma
        d2 = m.l2_sensitivity / deviation
        d1 = d2 * min(math.sqrt(d), m.l2_sensitivity)
        bounds = np.array(
            [
                orders * d2**2 / 2 + t * d,
                orders / 2 * (d2**2 + 2 * d1 * t + t**2 * d),
                orders / 2 * (d2 + math.sqrt(d) * t) ** 2,
            ]
        )
        assert m.renyi((2, 10)) == pytest.approx(bounds.min(axis=0))
        assert (bounds[:2].argmin(axis=0) == which).all()


def test_skellam_by_hand():
    m = skellams(sampling_rate=1.0, colluders=0, survivors=3, share_variance=700.0)
    mu, d2, d1 = 2100.0, 64.0, 64.0 * math.sqrt(20)
    by_hand = [
        a * d2**2 / (2 * mu) + min(((2 * a - 1) * d2**2 + 6 * d1) / (4 * mu**2), 3 * d1 / (2 * mu)) for a in (2, 9)
    ]
    assert m.renyi((2, 9)) == pytest.approx(by_hand)
    sparse = skellams(sampling_rate=1.0, l2_sensitivity=3.0, dimension=10**6)
    assert sparse.l1_sensitivity == 9.0


@pytest.mark.parametrize("orders", [(1,), (2, 1.5), (0,), (-3, 4)])
def test_orders_are_whole(orders):
    with pytest.raises(ParameterError, match="whole numbers of at least 2"):
        poisson_sampled(0.5, np.zeros(9), orders)

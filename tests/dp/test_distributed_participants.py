"""Statistical tests run on fixed entropy and cannot flake; LEVEL is how surprising a failure would be with another."""

import math

import numpy as np
import pytest
from scipy import linalg, stats

from dp import (
    DiscreteGaussian,
    DiscreteGaussianSum,
    DpError,
    ParameterError,
    ParticipantPlan,
    Relation,
    Skellam,
    SkellamSum,
    Unit,
    decode_participants,
    participant_contribution,
    solve_participant_plan,
    spent,
)
from dp.distributed import participant
from dp.distributed.rotation import hadamard
from tests.dp.entropy import fixed_entropy

LEVEL = 1e-6
SEED = bytes(range(32))


# Participants


def person_plan(**changes):
    fields = {
        "dimension": 50,
        "l2_clip_norm": 10.0,
        "ring_bits": 20,
        "scale": 40.0,
        "share_sigma": 30.0,
        "shares": 6,
        "threshold": 5,
        "colluders": 1,
    }
    return ParticipantPlan(**{**fields, **changes})


@pytest.fixture
def silence(monkeypatch):
    for sampler in (DiscreteGaussian, Skellam):
        monkeypatch.setattr(sampler, "draw", lambda _self, _generator, n: np.zeros(n, np.int64))


def test_the_rotation_is_walsh_hadamard_and_its_own_inverse():
    for k in range(8):
        x = np.random.default_rng(k).normal(size=1 << k)
        came = hadamard(x)
        reversed_bits = [int(f"{i:0{k}b}"[::-1], 2) if k else 0 for i in range(1 << k)]
        assert came == pytest.approx((linalg.hadamard(1 << k) @ x / math.sqrt(1 << k))[reversed_bits])
        assert hadamard(came) == pytest.approx(x)


def test_a_spike_is_spread(silence):
    spike = np.zeros(64)
    spike[17] = 10.0
    plan = person_plan(dimension=64)
    whole = participant_contribution(spike, plan, SEED, fixed_entropy("spike"))
    assert np.abs(np.abs(whole) - 10 * 40 / 8).max() <= 1
    flat = np.full(64, 10.0 / 8)  # what the transform alone would make a spike of
    assert np.abs(participant_contribution(flat, plan, SEED, fixed_entropy("flat"))).max() < 4 * 50


@pytest.mark.parametrize("noise", ["discrete-gaussian", "skellam"])
@pytest.mark.parametrize("dimension", [1, 50, 64])
def test_sums_come_back(noise, dimension):
    plan = person_plan(dimension=dimension, noise=noise, scale=1000.0, share_sigma=20.0, ring_bits=24)
    rng = np.random.default_rng(dimension)
    vectors = rng.normal(size=(6, dimension)) * 0.5
    total = sum(participant_contribution(v, plan, SEED, fixed_entropy(i)) for i, v in enumerate(vectors))
    for opened in (total, total % (1 << 24), (total % (1 << 24)).astype(np.uint32)):
        came = decode_participants(opened, plan, SEED)
        assert came.shape == (dimension,)
        assert np.abs(came - vectors.sum(axis=0)).max() < 6 * math.sqrt(6) * 20 / 1000
    wrong = decode_participants(total, plan, bytes(32))
    assert dimension == 1 or np.abs(wrong - vectors.sum(axis=0)).max() > 0.5


@pytest.mark.parametrize(("noise", "sampler"), [("discrete-gaussian", "normal"), ("skellam", "normal")])
def test_the_share_of_noise(noise, sampler):
    plan = person_plan(dimension=1 << 15, noise=noise, share_sigma=200.0, ring_bits=30)
    came = participant_contribution(np.zeros(1 << 15), plan, SEED, fixed_entropy(noise))
    assert stats.kstest(came / 200, "norm").pvalue > LEVEL
    if noise == "skellam":
        assert plan.mechanism().share_variance == 200.0**2
    else:
        assert plan.mechanism().share_sigma == 200.0


def test_whole_numbers_are_never_longer_than_the_account_says(silence, monkeypatch):
    rng = np.random.default_rng(5)
    for scale in (0.05, 0.3, 2.0, 40.0):
        plan = person_plan(scale=scale, share_sigma=3.0, ring_bits=30)
        for i in range(60):
            vector = rng.normal(size=50) * 10.0 ** rng.integers(-2, 3)
            whole = participant_contribution(vector, plan, SEED, fixed_entropy(i))
            assert math.sqrt((whole**2).sum()) <= plan.l2_sensitivity
    monkeypatch.setattr(participant, "rounded_l2", lambda norm, *_: norm)  # what rounding exceeds half of the time
    tight = person_plan(scale=2.0)
    for i in range(60):
        whole = participant_contribution(rng.normal(size=50) * 9, tight, SEED, fixed_entropy(i))
        assert math.sqrt((whole**2).sum()) <= 20.0


def test_rounding_is_tried_again_and_given_up_at_last(silence):
    draws = []

    class Counting:
        def uniform(self, n):
            draws.append(n)
            return np.full(n, 0.25 if len(draws) < 5 else 0.75)

    values = np.array([0.5, -0.5, 1.5, 2.0])
    assert participant._round_within(values, 2.5, Counting()).tolist() == [0, -1, 1, 2]
    assert len(draws) == 5
    draws.clear()
    assert participant._round_within(values, 2.3, Counting()).tolist() == [0, 0, 1, 2]
    assert len(draws) == participant._TRIES == 64


def test_the_limit_is_met_exactly():
    class Up:
        def uniform(self, n):
            return np.zeros(n)

    assert participant._round_within(np.array([2.5, 3.5]), 5.0, Up()).tolist() == [2, 3]
    assert participant._round_within(np.array([2.5, 3.5]), 5.0 + 1e-9, Up()).tolist() == [3, 4]


def test_rounding_has_no_bias(silence):
    plan = person_plan(dimension=64, scale=0.7, beta=0.0, ring_bits=30, share_sigma=3.0)
    vector = np.random.default_rng(1).normal(size=64)
    mean = np.mean(
        [
            decode_participants(participant_contribution(vector, plan, SEED, fixed_entropy(i)), plan, SEED)
            for i in range(2000)
        ],
        axis=0,
    )
    assert np.abs(mean - vector).max() < 5.5 * 0.5 / 0.7 / math.sqrt(2000)


def test_long_vectors_are_shortened_and_short_ones_are_not(silence):
    plan = person_plan(scale=1000.0, ring_bits=30)
    for length, kept in ((3.0, 3.0), (10.0, 10.0), (11.0, 10.0), (1e6, 10.0), (1e300, 10.0)):
        vector = np.zeros(50)
        vector[:2] = length * 0.6, -length * 0.8
        came = decode_participants(participant_contribution(vector, plan, SEED, fixed_entropy("long")), plan, SEED)
        assert came[:2] == pytest.approx([kept * 0.6, -kept * 0.8], abs=0.01)
        assert np.abs(came[2:]).max() < 0.01


def test_what_wraps_has_wrapped():
    plan = person_plan(ring_bits=4, share_sigma=100.0)
    whole = participant_contribution(np.zeros(50), plan, SEED, fixed_entropy("wrap"))
    assert (whole.min(), whole.max()) == (-8, 7)
    assert whole.shape == (64,)


def test_what_makes_no_sense_for_participants():
    plan = person_plan()
    with pytest.raises(ParameterError, match=r"shape \(50,\)"):
        participant_contribution(np.zeros(49), plan, SEED, fixed_entropy("x"))
    for bad in (math.nan, math.inf):
        with pytest.raises(DpError, match="not finite"):
            participant_contribution(np.full(50, bad), plan, SEED, fixed_entropy("x"))
    for seed in (b"", bytes(31), "x" * 32):
        with pytest.raises(ParameterError, match="rotation_seed"):
            participant_contribution(np.zeros(50), plan, seed, fixed_entropy("x"))
    with pytest.raises(ParameterError, match=r"shape \(64,\)"):
        decode_participants(np.zeros(50, np.int64), plan, SEED)
    with pytest.raises(ParameterError, match=r"whole numbers"):
        decode_participants(np.zeros(64), plan, SEED)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"dimension": 0}, "dimension"),
        ({"l2_clip_norm": 0.0}, "l2_clip_norm"),
        ({"ring_bits": 0}, "ring_bits"),
        ({"ring_bits": 63}, "ring_bits"),
        ({"scale": math.inf}, "scale"),
        ({"share_sigma": 0.4}, "share_sigma"),
        ({"share_sigma": -1.0}, "share_sigma"),
        ({"threshold": 7}, "threshold"),
        ({"colluders": 5}, "colluders"),
        ({"noise": "laplace"}, "noise"),
        ({"beta": 1.0}, "beta"),
        ({"noise": "skellam", "share_sigma": 3e4}, "variance"),
    ],
)
def test_participants_plans_are_checked(changes, says):
    with pytest.raises(ParameterError, match=says):
        participant_contribution(np.zeros(50), person_plan(**changes), SEED, fixed_entropy("x"))


# Participants: the solver


def solve(**changes):
    fields = {"ring_bits": 14, "shares": 50, "dimension": 250, "l2_clip_norm": 10.0, "epsilon": 3.0, "delta": 1e-5}
    return solve_participant_plan(**{**fields, **changes})


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"noise": "skellam"},
        {"threshold": 40, "colluders": 5},
        {"steps": 7, "epsilon": 8.0},
        {"relation": Relation.REPLACE_ONE},
        {"beta": 0.0},
    ],
)
def test_a_solved_plan_costs_what_it_may(changes):
    plan = solve(**changes)
    relation = changes.get("relation", Relation.ADD_OR_REMOVE_ONE)
    epsilon = changes.get("epsilon", 3.0)
    mechanism = plan.mechanism(changes.get("steps", 1))
    assert 0.999 * epsilon <= spent([mechanism], 1e-5, relation).epsilon <= epsilon
    assert spent([mechanism], 1e-5).unit is Unit.PARTICIPANT
    assert isinstance(mechanism, SkellamSum if "noise" in changes else DiscreteGaussianSum)
    assert (plan.threshold, plan.colluders) == (changes.get("threshold", 50), changes.get("colluders", 0))
    assert mechanism.survivors == plan.threshold
    k = math.sqrt(2) * 2.7510639057  # erfcinv(1e-4)
    sigma = plan.share_sigma / plan.scale
    formula = math.sqrt(2.0**28 - 50 * k**2) / (2 * k * math.sqrt(100 * 50**2 / 256 + 50 * sigma**2))
    assert plan.scale == pytest.approx(formula)


def test_fewer_honest_shares_are_each_larger():
    all_honest, some = solve(), solve(threshold=40, colluders=15)
    assert some.share_sigma / some.scale == pytest.approx(
        math.sqrt(2) * all_honest.share_sigma / all_honest.scale, rel=0.01
    )


def test_more_bits_are_finer_and_cost_less_noise():
    plans = [solve(ring_bits=bits) for bits in (9, 12, 16)]
    assert [p.scale for p in plans] == sorted(p.scale for p in plans)
    noise = [p.share_sigma / p.scale for p in plans]
    assert noise == sorted(noise, reverse=True)
    assert solve(ring_bits=9, alignment=1 / 50).scale > plans[0].scale


def test_rings_too_small_for_participants():
    for changes in ({"ring_bits": 3}, {"ring_bits": 5}, {"ring_bits": 6, "epsilon": 0.1}):
        with pytest.raises(ParameterError, match="too small for 50 shares"):
            solve(**changes)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"epsilon": 0.0}, "epsilon should"),
        ({"delta": 1.0}, "delta"),
        ({"steps": 0}, "steps"),
        ({"wrap_probability": 1.0}, "wrap_probability"),
        ({"alignment": 0.0}, "alignment"),
        ({"threshold": 51}, "threshold"),
        ({"dimension": 0}, "dimension"),
        ({"ring_bits": 0}, "ring_bits"),
        ({"l2_clip_norm": math.nan}, "l2_clip_norm"),
        ({"ring_bits": 70}, "ring_bits"),
    ],
)
def test_the_solver_checks_what_it_is_given(changes, says):
    with pytest.raises(ParameterError, match=says):
        solve(**changes)

import logging
import math
import re
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate, stats

import dp
from dp import (
    Budget,
    BudgetExceeded,
    ParameterError,
    PoissonSampledGaussian,
    Relation,
    calibrate_noise_multiplier,
    coalesce,
    spent,
)


def gaussian(sigma, q, steps, clip=1.0):
    return PoissonSampledGaussian(sampling_rate=q, noise_multiplier=sigma, steps=steps, l2_clip_norm=clip)


@pytest.mark.parametrize(
    ("sigma", "q", "steps", "delta", "by_rdp", "by_pld"),
    [
        (1.1, 256 / 60000, 14100, 1e-5, 2.60034, 2.38521),
        (1.3, 250 / 60000, 3600, 1e-5, 0.94220, 0.85303),
        (4, 0.01, 10000, 1e-5, 1.03549, 0.94700),
        (1, 0.01, 1000, 1e-5, 2.10137, 1.82824),
        (1, 1 / 16, 160, 1e-6, 6.90758, 6.22416),
        (10, 1, 100, 1e-5, 4.72851, 4.37718),
    ],
)
def test_known_answers(sigma, q, steps, delta, by_rdp, by_pld):
    """Computed apart from this package; the first two are settings of well-known tutorials."""
    came = spent([gaussian(sigma, q, steps)], delta)
    assert came.epsilon == pytest.approx(by_pld, abs=5e-5)
    assert came.epsilon_rdp == pytest.approx(by_rdp, abs=5e-5)
    assert (came.delta, came.relation) == (delta, Relation.ADD_OR_REMOVE_ONE)


def test_nothing_costs_nothing():
    for relation in Relation:
        for nothing in ([], [gaussian(1.0, 0.5, 0)]):
            came = spent(nothing, 1e-5, relation)
            assert (came.epsilon, came.epsilon_rdp) == (0.0, 0.0)


def test_rounds_compose():
    """Five rounds together are one run of five times the steps: neither one round's cost nor five times it."""
    rounds = [gaussian(2.0, 0.1, 20)] * 5
    together = spent(rounds, 1e-5).epsilon
    one = spent(rounds[:1], 1e-5).epsilon
    assert together == pytest.approx(spent([gaussian(2.0, 0.1, 100)], 1e-5).epsilon, abs=1e-9)
    assert 1.2 * one < together < 4 * one


def test_different_mechanisms_compose():
    a, b = gaussian(3.0, 0.1, 20), gaussian(6.0, 0.2, 30)
    both = spent([a, b], 1e-5)
    assert both.epsilon == pytest.approx(spent([b, a], 1e-5).epsilon, abs=1e-9)
    parts = [spent([m], 1e-5) for m in (a, b)]
    assert max(p.epsilon for p in parts) < both.epsilon < sum(p.epsilon for p in parts)
    assert max(p.epsilon_rdp for p in parts) < both.epsilon_rdp < sum(p.epsilon_rdp for p in parts)


def test_many_equal_rounds_are_fast():
    begin = time.process_time()
    many = spent([gaussian(1.0, 0.01, 5, clip=1.0 + i) for i in range(200)], 1e-5)
    assert time.process_time() - begin < 5.0  # 200 separate compositions take a minute
    assert many.epsilon == pytest.approx(1.82824, abs=5e-5)


mechanisms = st.builds(
    gaussian,
    sigma=st.sampled_from([2.0, 3.0, 5.0]),
    q=st.sampled_from([0.01, 0.3, 1.0]),
    steps=st.integers(0, 5),
    clip=st.sampled_from([1.0, 2.0]),
)


@given(st.lists(mechanisms, max_size=12))
def test_coalescing_keeps_every_step(many):
    merged = coalesce(many)
    assert coalesce(merged) == merged
    keys = [(m.sampling_rate, m.noise_multiplier, m.l2_clip_norm) for m in merged]
    assert len(set(keys)) == len(keys)
    for key, m in zip(keys, merged, strict=True):
        same = [o for o in many if (o.sampling_rate, o.noise_multiplier, o.l2_clip_norm) == key]
        assert m.steps == sum(o.steps for o in same)
    assert sum(m.steps for m in merged) == sum(m.steps for m in many)


@settings(max_examples=5, deadline=None)
@given(st.lists(mechanisms, max_size=6), st.sampled_from(list(Relation)))
def test_coalescing_keeps_the_cost_and_rdp_is_above_pld(many, relation):
    cost = spent(many, 1e-5, relation)
    merged = spent(coalesce(many), 1e-5, relation)
    assert merged.epsilon == pytest.approx(cost.epsilon, abs=1e-9)
    assert merged.epsilon_rdp == pytest.approx(cost.epsilon_rdp, abs=1e-9)
    assert cost.epsilon <= cost.epsilon_rdp + 1e-3


def test_replace_one_without_sampling_is_twice_the_sensitivity():
    replaced = spent([gaussian(10.0, 1.0, 100)], 1e-5, Relation.REPLACE_ONE)
    assert replaced.relation is Relation.REPLACE_ONE
    assert replaced.epsilon == pytest.approx(spent([gaussian(5.0, 1.0, 100)], 1e-5).epsilon, abs=1e-3)


def hockey_stick(p, q, epsilon):
    return integrate.quad(lambda t: max(0.0, p(t) - math.exp(epsilon) * q(t)), -30, 30, limit=500, points=[-1, 0, 1])[0]


@pytest.mark.parametrize("relation", list(Relation))
def test_one_step_against_the_integral(relation):
    """The definition of (epsilon, delta), integrated numerically for the worst pair."""
    rate, sigma, delta = 0.3, 0.9, 1e-3

    def mixture(shift):
        return lambda t: (1 - rate) * stats.norm.pdf(t, 0, sigma) + rate * stats.norm.pdf(t, shift, sigma)

    pair = (mixture(1), mixture(-1)) if relation is Relation.REPLACE_ONE else (mixture(1), mixture(0))
    epsilon = spent([gaussian(sigma, rate, 1)], delta, relation).epsilon
    assert hockey_stick(*pair, epsilon) == pytest.approx(delta, rel=2e-3)


def test_the_worst_replacement_is_the_opposite_one():
    """What `spent` proves, tried out: no two vectors in the disc cost more than two opposite ones of full length."""
    rate, sigma = 0.3, 0.7
    axis = np.linspace(-6, 6, 241)
    grid = np.stack(np.meshgrid(axis, axis), axis=-1)

    def density(w):
        def normal(mean):
            return np.exp(-((grid - mean) ** 2).sum(-1) / (2 * sigma**2)) / (2 * math.pi * sigma**2)

        return (1 - rate) * normal(np.zeros(2)) + rate * normal(np.array(w))

    def delta(u, v, g):
        return np.maximum(density(u) - g * density(v), 0).sum() * (axis[1] - axis[0]) ** 2

    rng = np.random.default_rng(1)
    for g in (0.5, 1.0, 1.7, 4.0):
        worst = delta((1, 0), (-1, 0), g)
        for _ in range(20):
            angles, lengths = rng.uniform(0, 2 * math.pi, 2), rng.uniform(0, 1, 2) ** 0.3
            u, v = (length * np.array([math.cos(a), math.sin(a)]) for a, length in zip(angles, lengths, strict=True))
            assert delta(u, v, g) <= worst + 1e-6


def test_replace_one_costs_more_and_stays_below_group_privacy():
    one = gaussian(2.0, 0.01, 1000)
    removed, replaced = spent([one], 1e-5), spent([one], 1e-5, Relation.REPLACE_ONE)
    assert 1.4 * removed.epsilon < replaced.epsilon < 2.5 * removed.epsilon
    assert replaced.epsilon < replaced.epsilon_rdp < math.inf
    # (e, d) under add-or-remove-one is (2e, (1 + exp(e)) d) under replace-one.
    half = replaced.epsilon_rdp / 2
    assert spent([one], 1e-5 / (1 + math.exp(half)) * 1.01).epsilon_rdp <= half * 1.001


@pytest.mark.parametrize("delta", [0.0, 1.0, -1e-5, math.nan, "small"])
def test_delta_is_checked(delta):
    for call in (
        lambda: spent([], delta),
        lambda: Budget(epsilon=1.0, delta=delta),
        lambda: calibrate_noise_multiplier(1.0, delta, 0.1, 10),
    ):
        with pytest.raises(ParameterError, match="delta"):
            call()


@pytest.mark.parametrize("relation", ["replace-one", None, "special"])
def test_an_unknown_relation_is_never_guessed(relation):
    with pytest.raises(ParameterError, match=r"'add-or-remove-one', 'replace-one' as a dp\.Relation"):
        spent([gaussian(1.0, 0.1, 1)], 1e-5, relation)


def test_no_noise_worth_the_name_is_reported_without_exhausting_memory():
    begin = time.process_time()
    for relation in Relation:
        for sigma in (0.02, 1e-9):
            came = spent([gaussian(sigma, 1.0, 10_000)], 1e-5, relation)
            assert came.epsilon > 300
            assert came.epsilon >= 0.999 * came.epsilon_rdp
    assert time.process_time() - begin < 2.0


def test_low_orders_are_left_out_in_silence(caplog):
    with caplog.at_level(logging.DEBUG):
        spent([gaussian(2.0, 0.25, 60)], 1e-5)
    assert not caplog.records
    assert not logging.getLogger("absl").filters


@pytest.mark.parametrize("target", [0.5, 3.0, 10.0])
def test_calibration_meets_its_target(target):
    begin = time.process_time()
    sigma = calibrate_noise_multiplier(target, 1e-5, 0.25, 60)
    assert time.process_time() - begin < 6.0  # a third of it is usual
    assert target * 0.999 <= spent([gaussian(sigma, 0.25, 60)], 1e-5).epsilon <= target


@pytest.mark.parametrize(
    ("target", "delta", "q", "steps", "relation"),
    [
        (1.0, 1e-6, 1.0, 1, Relation.ADD_OR_REMOVE_ONE),
        (0.05, 1e-6, 0.001, 100_000, Relation.ADD_OR_REMOVE_ONE),
        (2.0, 1e-5, 0.1, 50, Relation.REPLACE_ONE),
    ],
)
def test_calibration_elsewhere(target, delta, q, steps, relation):
    sigma = calibrate_noise_multiplier(target, delta, q, steps, relation)
    assert target * 0.999 <= spent([gaussian(sigma, q, steps)], delta, relation).epsilon <= target


@pytest.mark.parametrize("share", [0.5, 0.97])
def test_calibration_counts_what_was_spent_before(share):
    before = [gaussian(6.0, 0.25, 30), gaussian(6.0, 0.1, 30)]
    target = spent(before, 1e-5).epsilon / share
    sigma = calibrate_noise_multiplier(target, 1e-5, 0.25, 30, already=before)
    assert target * 0.999 <= spent([*before, gaussian(sigma, 0.25, 30)], 1e-5).epsilon <= target


def test_calibration_refuses_the_impossible():
    before = [gaussian(6.0, 0.25, 30)]
    with pytest.raises(BudgetExceeded):
        calibrate_noise_multiplier(spent(before, 1e-5).epsilon, 1e-5, 0.25, 30, already=before)
    for target in (1e-9, 1e9):
        with pytest.raises(ParameterError, match="no noise multiplier"):
            calibrate_noise_multiplier(target, 1e-5, 0.25, 30)
    with pytest.raises(ParameterError, match="steps"):
        calibrate_noise_multiplier(1.0, 1e-5, 0.25, 0)
    for target in (0.0, -1.0, math.nan):
        with pytest.raises(ParameterError, match="target_epsilon"):
            calibrate_noise_multiplier(target, 1e-5, 0.25, 30)


def test_a_budget_refuses_before_it_is_broken():
    one = gaussian(5.0, 0.25, 12)
    costs = [spent([one] * k, 1e-5).epsilon for k in range(1, 5)]
    budget = Budget(epsilon=(costs[2] + costs[3]) / 2, delta=1e-5)
    for done in range(3):
        after = budget.check([one] * done, one)
        assert after.epsilon == pytest.approx(costs[done], abs=1e-9)
    with pytest.raises(BudgetExceeded) as refusal:
        budget.check([one] * 3, one)
    assert refusal.value.spent == pytest.approx(costs[2])
    assert refusal.value.next == pytest.approx(costs[3])
    assert refusal.value.budget == budget.epsilon
    assert f"{costs[3]:.4f}" in str(refusal.value)


def test_a_budget_holds_its_relation():
    one = gaussian(5.0, 0.25, 12)
    epsilon = 1.1 * spent([one], 1e-5).epsilon
    Budget(epsilon=epsilon, delta=1e-5).check([], one)
    with pytest.raises(BudgetExceeded):
        Budget(epsilon=epsilon, delta=1e-5, relation=Relation.REPLACE_ONE).check([], one)


@pytest.mark.parametrize("epsilon", [0.0, -1.0, math.nan, math.inf])
def test_a_budget_is_positive_and_finite(epsilon):
    with pytest.raises(ParameterError, match="epsilon"):
        Budget(epsilon=epsilon, delta=1e-5)


def test_no_accountant_that_under_reports():
    source = "\n".join(path.read_text() for path in Path(dp.__file__).parent.rglob("*.py")).lower()
    assert not re.search(r"\bgdp\b|opacus\.accountants|privacyengine|compute_mu", source)

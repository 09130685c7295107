import logging
import math
import re
import time
from pathlib import Path

import dp_accounting
import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate, stats

import dp
from dp import (
    Budget,
    BudgetExceeded,
    DiscreteGaussianSum,
    ParameterError,
    PoissonSampledGaussian,
    Relation,
    SkellamSum,
    Unit,
    calibrate,
    calibrate_noise_multiplier,
    coalesce,
    spent,
)
from dp.mechanisms import rounded_l2


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


# Several kinds of mechanisms


def shares(sigma, q, steps, survivors=4, **changes):
    """A sum of four shares that together have the noise multiplier `sigma`, of which some may drop out."""
    fields = {
        "unit": Unit.RECORD,
        "sampling_rate": q,
        "steps": steps,
        "l2_sensitivity": 1000.0,
        "dimension": 30,
        "l2_clip_norm": 1.0,
        "scale": 1000.0,
        "shares": 4,
        "threshold": 1,
        "colluders": 0,
        "survivors": survivors,
        "share_sigma": sigma * 1000.0 / math.sqrt(4),
    }
    return DiscreteGaussianSum(**{**fields, **changes})


def skellams(sigma, q, steps, **changes):
    fields = msgspec.structs.asdict(shares(sigma, q, steps))
    fields["share_variance"] = fields.pop("share_sigma") ** 2
    return SkellamSum(**{**fields, **changes})


@pytest.mark.parametrize(("q", "sigma", "steps"), [(0.1, 1.5, 60), (1.0, 8.0, 50), (0.01, 1.0, 1000)])
@pytest.mark.parametrize("relation", list(Relation))
def test_a_sum_of_shares_costs_what_one_gaussian_costs(q, sigma, steps, relation):
    ours, central = (spent([make(sigma, q, steps)], 1e-5, relation) for make in (shares, gaussian))
    assert ours.accountant == "pld"
    assert central.epsilon < ours.epsilon < central.epsilon + 1e-4
    assert ours.epsilon < ours.epsilon_rdp < 1.06 * central.epsilon_rdp


def test_dropouts_thin_the_noise():
    """Known answers: noise multiplier 3 from ten shares, fifty steps with everyone, after so many have survived."""
    known = {10: 12.26, 9: 13.10, 8: 14.12, 7: 15.38, 5: 19.13}
    for survivors, epsilon in known.items():
        ten = {"shares": 10, "survivors": survivors, "share_sigma": 3 * 1000.0 / math.sqrt(10)}
        assert spent([shares(3, 1.0, 50, **ten)], 1e-5).epsilon == pytest.approx(epsilon, abs=6e-3)
        if survivors < 10:
            with_colluders = {**ten, "survivors": 10, "colluders": 10 - survivors, "threshold": 10}
            assert spent([shares(3, 1.0, 50, **with_colluders)], 1e-5).epsilon == pytest.approx(epsilon, abs=6e-3)


def test_skellam_known_answer():
    """epsilon 6 at delta .01, of 150 sums of 16 shares of deviation 11.435854, scale 350, clip 3, dimension 2^24."""
    m = SkellamSum(
        unit=Unit.PARTICIPANT,
        sampling_rate=1.0,
        steps=150,
        l2_sensitivity=rounded_l2(3 * 350.0, 2**24, math.exp(-0.5)),
        dimension=2**24,
        l2_clip_norm=3.0,
        scale=350.0,
        shares=16,
        threshold=16,
        colluders=0,
        survivors=16,
        share_variance=(350 * 11.435854) ** 2,
    )
    came = spent([m], 0.01)
    assert came.epsilon == came.epsilon_rdp == pytest.approx(6.0, abs=1e-6)
    assert (came.accountant, came.unit) == ("rdp", Unit.PARTICIPANT)


def test_a_mix_is_accounted_by_what_is_proved_for_all():
    local, summed, noisy = gaussian(4.0, 0.1, 30), shares(3.0, 0.1, 30), skellams(6.0, 0.2, 10)
    by_pld, by_rdp = spent([local, summed], 1e-5), spent([local, summed, noisy], 1e-5)
    assert (by_pld.accountant, by_rdp.accountant) == ("pld", "rdp")
    assert by_rdp.epsilon == by_rdp.epsilon_rdp
    assert by_pld.epsilon == pytest.approx(spent([local, gaussian(3.0, 0.1, 30)], 1e-5).epsilon, abs=1e-4)
    parts = [spent([m], 1e-5).epsilon_rdp for m in (local, summed, noisy)]
    assert max(parts) < by_rdp.epsilon < sum(parts)
    assert by_rdp.epsilon == pytest.approx(spent([noisy, local, summed], 1e-5).epsilon, abs=1e-9)


def test_rdp_gives_epsilon_where_it_is_the_lower_one():
    """Narrow shares are far from the Gaussian that they imitate, if they imitate one at all."""
    for narrow in ({"l2_sensitivity": 2.0, "share_sigma": 0.7}, {"l2_sensitivity": 2.0, "share_sigma": 0.9}):
        came = spent([shares(0, 1.0, 5, **narrow)], 1e-5)
        assert came.accountant == "rdp"
        assert came.epsilon == came.epsilon_rdp < math.inf


def test_the_distance_from_the_gaussian_is_charged(monkeypatch):
    """(e, d) becomes (e + 2K, exp(K) d)."""
    one = shares(1.5, 0.1, 60)
    free = spent([one], 1e-5).epsilon
    monkeypatch.setattr(DiscreteGaussianSum, "log_ratio", lambda _: 0.3 / 60)
    dp.accounting._cached_epsilon_pld.cache_clear()
    charged = dp.accounting._cached_epsilon_pld((one,), 1e-5, Relation.ADD_OR_REMOVE_ONE, 1e-4)[0]
    monkeypatch.setattr(DiscreteGaussianSum, "log_ratio", lambda _: 0.0)
    at_less = dp.accounting._cached_epsilon_pld((one,), 1e-5 * math.exp(-0.3), Relation.ADD_OR_REMOVE_ONE, 1e-4)[0]
    dp.accounting._cached_epsilon_pld.cache_clear()
    assert charged == pytest.approx(at_less + 0.6, abs=1e-9)
    assert charged > free + 0.6


def test_whole_orders_and_tenths_agree_with_dp_accountings():
    """Between whole orders the bound is a straight line, which is no lower than the curve and close to it."""
    fractions, ours = dp.accounting._divergences([gaussian(1.0, 1.0, 7)], 1)
    exact = 7 * np.array(fractions) / 2
    assert (ours >= exact * (1 - 1e-12)).all()
    assert ours[: len(dp.accounting._WHOLE_ORDERS)] == pytest.approx(exact[: len(dp.accounting._WHOLE_ORDERS)])
    accountant = dp_accounting.rdp.RdpAccountant(fractions)
    accountant.compose(gaussian(1.1, 0.2, 7).event())
    ours = dp.accounting._divergences([gaussian(1.1, 0.2, 7)], 1)[1]
    known = np.isfinite(accountant._rdp)  # dp-accounting gives low orders up where its series converges slowly
    assert known.sum() > len(known) - 10
    assert (ours >= accountant._rdp * (1 - 1e-6))[known].all()


def test_replaced_records_under_rdp():
    everyone = spent([skellams(8.0, 1.0, 5)], 1e-5, Relation.REPLACE_ONE)
    assert everyone.epsilon == pytest.approx(spent([skellams(4.0, 1.0, 5)], 1e-5).epsilon, rel=1e-4)
    some = spent([skellams(8.0, 0.5, 5)], 1e-5, Relation.REPLACE_ONE)
    half = some.epsilon / 2
    assert spent([skellams(8.0, 0.5, 5)], 1e-5 / (1 + math.exp(half)) * 1.01).epsilon <= half * 1.001
    mixed = spent([skellams(8.0, 1.0, 5), skellams(8.0, 0.5, 5)], 1e-5, Relation.REPLACE_ONE)
    assert mixed.epsilon > max(everyone.epsilon, some.epsilon)


def test_whom_an_epsilon_hides():
    person = {"unit": Unit.PARTICIPANT}
    assert spent([shares(8.0, 1.0, 1, **person)], 1e-5).unit is Unit.PARTICIPANT
    assert spent([shares(8.0, 1.0, 1, **person), gaussian(8.0, 1.0, 1)], 1e-5).unit is Unit.RECORD
    assert spent([shares(8.0, 1.0, 1, **person), shares(8.0, 1.0, 1)], 1e-5).unit is Unit.RECORD
    assert spent([], 1e-5).unit is Unit.RECORD


def test_no_noise_worth_the_name_in_shares():
    for make in (shares, skellams):
        came = spent([make(0.01, 1.0, 1000)], 1e-5)
        assert came.accountant == "rdp"
        assert came.epsilon > 300


def test_kinds_are_merged_apart():
    a, b, c = gaussian(2.0, 0.1, 3), shares(2.0, 0.1, 3), skellams(2.0, 0.1, 3)
    thinned = shares(2.0, 0.1, 3, survivors=3)
    merged = coalesce([a, b, c, thinned, b, a, c, c, gaussian(2.0, 0.1, 4, clip=3.0)])
    assert [type(m) for m in merged] == [type(m) for m in (a, b, c, thinned, a)]
    assert [m.steps for m in merged] == [6, 6, 9, 3, 4]
    assert coalesce(merged) == merged


def test_a_budget_refuses_sums_too():
    promise, actual = shares(5.0, 0.25, 12, survivors=3), shares(5.0, 0.25, 12)
    costs = [spent(done, 1e-5).epsilon for done in ([promise], [actual], [actual, promise])]
    assert costs[1] < costs[0] < costs[2]
    budget = Budget(epsilon=(costs[0] + costs[2]) / 2, delta=1e-5)
    assert budget.check([], promise).epsilon == pytest.approx(costs[0])
    with pytest.raises(BudgetExceeded) as refusal:
        budget.check([actual], promise)
    assert refusal.value.next == pytest.approx(costs[2])
    with pytest.raises(BudgetExceeded):
        Budget(epsilon=0.5, delta=1e-5).check([], skellams(5.0, 0.25, 12))


@pytest.mark.parametrize("make", [shares, skellams])
def test_calibrating_shares(make):
    already = [gaussian(6.0, 0.25, 30)]
    sigma = calibrate(lambda z: make(z, 0.25, 30), 3.0, 1e-5, already=already)
    assert 3.0 * 0.999 <= spent([*already, make(sigma, 0.25, 30)], 1e-5).epsilon <= 3.0
    if make is shares:
        assert sigma == pytest.approx(calibrate_noise_multiplier(3.0, 1e-5, 0.25, 30, already=already), rel=1e-3)


def test_calibrating_where_too_little_noise_is_no_plan_at_all():
    def planned(z):
        return shares(z, 1.0, 1, l2_sensitivity=1.0, dimension=1, share_sigma=z / 2)

    sigma = calibrate(planned, 8.0, 1e-5)  # it begins at 0.6, where a share is narrower than 1/2
    assert planned(sigma).share_sigma == pytest.approx(0.5, abs=1e-9)
    assert spent([planned(sigma)], 1e-5).epsilon < 8.0
    assert 4.0 * 0.999 <= spent([planned(calibrate(planned, 4.0, 1e-5))], 1e-5).epsilon <= 4.0
    with pytest.raises(ParameterError, match="sampling_rate"):
        calibrate(lambda z: shares(z, 2.0, 1), 8.0, 1e-5)


@pytest.mark.parametrize("above", [-1e-6, 1e-6])
def test_what_is_required_is_what_is_checked_though_rdp_may_be_enough_to_tell(above):
    """Between the two accountants' epsilons PLD decides; above both nothing more is asked."""
    so_far, following = (gaussian(1.0, 0.01, 100),), gaussian(1.0, 0.01, 50)
    cost = spent((*so_far, following), 1e-5)
    assert cost.epsilon < cost.epsilon_rdp
    tight = Budget(epsilon=cost.epsilon - above, delta=1e-5)
    if above > 0:
        with pytest.raises(BudgetExceeded) as required:
            tight.require(so_far, following)
        with pytest.raises(BudgetExceeded) as checked:
            tight.check(so_far, following)
        assert str(required.value) == str(checked.value)
    else:
        tight.require(so_far, following)
        tight.check(so_far, following)
    Budget(epsilon=cost.epsilon_rdp + 1e-6, delta=1e-5).require(so_far, following)

"""Attacks as audit: the bounds against published numbers and by exact probabilities, the canaries against faults."""

import hashlib
import itertools
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from scipy.stats import binom
from torch import nn
from torch.nn import functional

import dp.sgd
from dp import Csprng, DpSgdPlan, ParameterError, PoissonSampledGaussian, Relation, calibrate_noise_multiplier, train
from dp.audit import (
    CanaryRun,
    Judge,
    account_curve,
    gaussian_curve,
    gaussian_epsilon,
    guess,
    one_run_epsilon,
    one_run_mu,
    one_run_p_value,
    rules_out,
    several_runs_epsilon,
    several_runs_mu,
)
from tests.dp.entropy import fixed_entropy

SILENT = 1e-12


def fresh_entropy(label):
    """Other bytes at every call, the same in every test run."""
    calls = itertools.count()
    return lambda n: hashlib.shake_256(f"audit tests: {label} {next(calls)}".encode()).digest(n)


# Bounds from one run


@pytest.mark.parametrize(
    ("counts", "delta", "one_run", "f_dp"),
    [
        ((1000, 100, 100), 1e-5, 3.465376, 5.549028),
        ((1000, 100, 90), 1e-5, 1.626144, 2.456405),
        ((10000, 500, 480), 1e-5, 2.770387, 3.790361),
        ((1000, 100, 100), 0.0, 3.492965, None),
    ],
)
def test_known_answers(counts, delta, one_run, f_dp):
    assert one_run_epsilon(*counts, delta) == pytest.approx(one_run, abs=1e-6)
    if f_dp is not None:
        assert gaussian_epsilon(one_run_mu(*counts), delta) == pytest.approx(f_dp, abs=1e-6)


@pytest.mark.parametrize("delta", [0.0, 1e-5, 1e-3, 0.1])
@pytest.mark.parametrize("counts", [(1000, 100, 90), (10000, 100, 97), (10000, 2000, 1700)])
def test_what_is_not_ruled_out_at_one_epsilon_is_not_at_a_larger_one(counts, delta):
    """Otherwise a search for where ruling out ends could end in the wrong place."""
    ruled_out = [one_run_p_value(*counts, epsilon, delta) < 0.05 for epsilon in np.linspace(0.0, 10.0, 101)]
    assert ruled_out == sorted(ruled_out, reverse=True)


def share_above(epsilon, m, probabilities, delta, significance):
    """The exact chance that the one-run bound exceeds epsilon, where v has these probabilities."""
    p_values = [one_run_p_value(m, m, v, epsilon, delta) for v in range(m + 1)]
    return sum(p for p, p_value in zip(probabilities, p_values, strict=True) if p_value < significance)


@pytest.mark.parametrize("epsilon", [0.0, 0.5, 1.0, 4.0])
@pytest.mark.parametrize("significance", [0.01, 0.05, 0.2])
def test_the_bound_is_sound_for_randomized_response(epsilon, significance):
    """Exactly, and not far too large either: randomized response is what the proof is tight for."""
    m = 300
    right = binom.pmf(np.arange(m + 1), m, 1 / (1 + math.exp(-epsilon)))
    share = share_above(epsilon, m, right, 0.0, significance)
    assert significance / 5 <= share <= significance
    bounds = [one_run_epsilon(m, m, v, 0.0, significance) for v in range(m + 1)]
    assert sum(p for p, bound in zip(right, bounds, strict=True) if bound > epsilon) == pytest.approx(share, abs=1e-12)


@pytest.mark.parametrize("delta", [0.002, 0.02])
def test_the_bound_is_sound_where_delta_is_used_up(delta):
    """Randomized response that tells a coin with chance delta: each on its own, or all of them at once."""
    m, epsilon = 300, 1.0
    q = 1 / (1 + math.exp(-epsilon))
    each = binom.pmf(np.arange(m + 1), m, delta + (1 - delta) * q)
    at_once = (1 - delta) * binom.pmf(np.arange(m + 1), m, q) + delta * (np.arange(m + 1) == m)
    for probabilities in (each, at_once):
        assert share_above(epsilon, m, probabilities, delta, 0.05) <= 0.05


@pytest.mark.parametrize("epsilon", [0.5, 1.0, 4.0])
def test_the_f_dp_test_is_sound_for_randomized_response(epsilon):
    m = 300

    def curve(a):
        return max(0.0, 1 - math.exp(epsilon) * a, math.exp(-epsilon) * (1 - a))

    right = binom.pmf(np.arange(m + 1), m, 1 / (1 + math.exp(-epsilon)))
    assert sum(p for v, p in enumerate(right) if rules_out(m, m, v, curve)) <= 0.05


def right_guesses(m, r, mu, runs, seed):
    """Ideal audits of a Gaussian mechanism: how many guesses are right in each."""
    generator, counts = np.random.default_rng(seed), []
    for _ in range(runs):
        coins = generator.random(m) < 0.5
        scores = generator.standard_normal(m) + mu * coins
        counts.append(int(np.count_nonzero(guess(scores, r) == np.where(coins, 1, -1))))
    return counts


@pytest.mark.parametrize("r", [50, 200])
def test_bounds_are_sound_for_a_gaussian_mechanism(r):
    """400 ideal audits, seed 1: a true share of 0.05 would give more than 34 with a chance of 1e-3."""
    m, mu, delta = 500, 1.0, 1e-3
    counts = right_guesses(m, r, mu, 400, seed=1)
    assert sum(rules_out(m, r, v, gaussian_curve(mu)) for v in counts) <= 34
    assert sum(one_run_p_value(m, r, v, gaussian_epsilon(mu, delta), delta) < 0.05 for v in counts) <= 34
    gaussian = PoissonSampledGaussian(sampling_rate=1.0, noise_multiplier=1 / mu, steps=1, l2_clip_norm=1.0)
    curve = account_curve(gaussian)
    assert sum(rules_out(m, r, v, curve) for v in set(counts) for _ in range(counts.count(v))) <= 34


@pytest.mark.parametrize(("m", "one_run", "f_dp"), [(1000, 1.54, 2.32), (10_000, 1.86, 2.58)])
def test_what_an_ideal_audit_shows_of_epsilon_4(m, one_run, f_dp):
    """Medians for a Gaussian mechanism of epsilon 4 at delta 1e-5, a tenth of the coins guessed: far below 4."""
    delta = 1e-5
    mu = 0.9249309
    assert gaussian_epsilon(mu, delta) == pytest.approx(4.0, abs=1e-5)
    v = int(np.median(right_guesses(m, m // 10, mu, 101, seed=2)))
    assert one_run_epsilon(m, m // 10, v, delta) == pytest.approx(one_run, abs=0.12)
    assert gaussian_epsilon(one_run_mu(m, m // 10, v), delta) == pytest.approx(f_dp, abs=0.2)


def test_chance_shows_nothing():
    assert one_run_epsilon(1000, 100, 50, 1e-5) == 0.0
    assert one_run_mu(1000, 100, 50) == 0.0
    assert one_run_epsilon(1000, 100, 0, 1e-5) == one_run_mu(1000, 100, 0) == 0.0
    assert one_run_p_value(10, 5, 0, 1.0, 0.1) == 1.0


# Trade-off functions


def test_gaussian_epsilon_is_what_the_accountant_says():
    assert gaussian_epsilon(1.0, 1e-5) == pytest.approx(4.37718, abs=2e-4)
    assert gaussian_epsilon(0.0, 1e-5) == gaussian_epsilon(0.1, 0.5) == 0.0
    assert 0.0 < gaussian_epsilon(30.0, 1e-300) < math.inf


@pytest.mark.parametrize("relation", list(Relation))
def test_the_accounts_curve_of_a_gaussian_is_the_gaussian_one(relation):
    mu = 1.0 if relation is Relation.ADD_OR_REMOVE_ONE else 2.0
    gaussian = PoissonSampledGaussian(sampling_rate=1.0, noise_multiplier=2.0, steps=4, l2_clip_norm=1.0)
    curve, expected = account_curve(gaussian, relation), gaussian_curve(mu)
    for a in np.linspace(0.0, 1.0, 41):
        assert expected(a) - 5e-3 <= curve(a) <= expected(a) + 1e-9


def test_the_accounts_curve_is_a_trade_off_function():
    sampled = PoissonSampledGaussian(sampling_rate=0.2, noise_multiplier=1.0, steps=10, l2_clip_norm=1.0)
    curve, grid = account_curve(sampled), np.linspace(0.0, 1.0, 101)
    values = np.array([curve(a) for a in grid])
    assert (np.diff(values) <= 0).all()
    assert (np.diff(values, 2) >= -1e-9).all()
    assert (values <= 1 - grid + 1e-9).all()
    for a in (0.01, 0.1, 0.3):
        assert curve(curve(a)) == pytest.approx(a, abs=5e-3)


def test_the_curves_of_nothing_and_of_everything():
    def of(**fields):
        usual = {"sampling_rate": 1.0, "noise_multiplier": 1.0, "steps": 1, "l2_clip_norm": 1.0}
        return account_curve(PoissonSampledGaussian(**{**usual, **fields}))

    assert of(steps=0)(0.25) == 0.75
    assert of(noise_multiplier=0.01)(0.0) == 0.0
    assert rules_out(1000, 200, 150, of(steps=0))
    assert not rules_out(1000, 1000, 1000, of(noise_multiplier=0.01))


# Bounds from several runs


def test_several_runs_by_hand():
    upper = 1 - 0.025 ** (1 / 1000)  # Clopper-Pearson, no error in 1000 runs
    assert several_runs_epsilon(0, 1000, 0, 1000, 1e-5) == pytest.approx(math.log((1 - upper - 1e-5) / upper))
    # The better of both orders: few false negatives and many false positives still tell a lot.
    assert several_runs_epsilon(500, 1000, 0, 1000, 0.0) == several_runs_epsilon(0, 1000, 500, 1000, 0.0) > 4.0
    assert several_runs_epsilon(1000, 1000, 1000, 1000, 0.0) == several_runs_epsilon(9, 10, 9, 10, 0.0) == 0.0


def test_several_runs_of_a_gaussian():
    upper = 1 - 0.025 ** (1 / 1000)
    expected = 2 * 2.6802  # Phi^-1(1 - upper)
    assert several_runs_mu([(0, 0)], 1000, 1000) == pytest.approx(expected, abs=2e-3)
    assert upper == pytest.approx(0.00368, abs=1e-5)
    several = several_runs_mu([(0, 1000), (0, 0), (1000, 0)], 1000, 1000)
    assert 0.0 < several < several_runs_mu([(0, 0)], 1000, 1000)  # who tries three thresholds pays for them


@pytest.mark.parametrize("errors", [(1000, 1000), (900, 900), (500, 500)])
def test_guesses_worse_than_chance_bound_nothing(errors):
    assert several_runs_mu([errors], 1000, 1000) == 0.0
    assert several_runs_epsilon(errors[0], 1000, errors[1], 1000, 0.0) == 0.0


def test_bounds_from_several_runs_are_sound():
    """1000 audits of 200 runs each, seed 3: a true share of 0.05 would give more than 72 with a chance of 1e-3."""
    generator, epsilon, mu, n = np.random.default_rng(3), 1.0, 1.0, 100
    rate = 1 / (1 + math.exp(epsilon))
    fp, fn = generator.binomial(n, rate, (2, 1000))
    assert sum(several_runs_epsilon(int(a), n, int(b), n, 0.0) > epsilon for a, b in zip(fp, fn, strict=True)) <= 72
    above = 0
    for _ in range(1000):
        without, with_it = generator.standard_normal(n), mu + generator.standard_normal(n)
        thresholds = (0.0, 0.5, 1.0)
        errors = [(int((without > t).sum()), int((with_it <= t).sum())) for t in thresholds]
        above += several_runs_mu(errors, n, n) > mu
    assert above <= 72


# Bad input


@pytest.mark.parametrize(
    ("counts", "match"),
    [
        ((0, 0, 0), "guesses"),
        ((10, 0, 0), "guesses"),
        ((10, 11, 0), "guesses"),
        ((10, 5, 6), "right"),
        ((10, 5, -1), "right"),
        ((10, 5.0, 1), "guesses"),
        ((True, 1, 1), "canaries"),
    ],
)
def test_counts_that_cannot_be(counts, match):
    for call in (
        lambda: one_run_p_value(*counts, 1.0, 0.0),
        lambda: one_run_epsilon(*counts, 0.0),
        lambda: one_run_mu(*counts),
        lambda: rules_out(*counts, gaussian_curve(1.0)),
    ):
        with pytest.raises(ParameterError, match=match):
            call()


@pytest.mark.parametrize("significance", [0.0, 1.0, -0.1, math.nan, "0.05"])
def test_significances_that_cannot_be(significance):
    gaussian = PoissonSampledGaussian(sampling_rate=1.0, noise_multiplier=1.0, steps=1, l2_clip_norm=1.0)
    for call in (
        lambda: one_run_epsilon(10, 5, 5, 0.0, significance),
        lambda: one_run_mu(10, 5, 5, significance),
        lambda: several_runs_epsilon(0, 9, 0, 9, 0.0, significance),
        lambda: several_runs_mu([(0, 0)], 9, 9, significance),
        lambda: Judge(gaussian, 1e-5, 10, 5, significance),
    ):
        with pytest.raises(ParameterError, match="significance"):
            call()


def test_other_input_that_cannot_be():
    for delta in (-0.1, 1.0, math.nan, "0"):
        with pytest.raises(ParameterError, match="delta"):
            one_run_epsilon(10, 5, 5, delta)
        with pytest.raises(ParameterError, match="delta"):
            several_runs_epsilon(0, 9, 0, 9, delta)
    with pytest.raises(ParameterError, match="delta"):
        gaussian_epsilon(1.0, 0.0)
    for epsilon in (-1.0, math.nan):
        with pytest.raises(ParameterError, match="epsilon"):
            one_run_p_value(10, 5, 5, epsilon, 0.0)
    for mu in (-1.0, math.inf, math.nan):
        with pytest.raises(ParameterError, match="mu"):
            gaussian_epsilon(mu, 0.1)
    for errors in ((3, 2), (0, 0), (-1, 5)):
        with pytest.raises(ParameterError, match="false_positives"):
            several_runs_epsilon(*errors, 0, 5, 0.0)
    with pytest.raises(ParameterError, match="errors"):
        several_runs_mu([], 5, 5)


def test_bounds_need_no_torch():
    code = "import sys, dp.audit; assert 'torch' not in sys.modules; dp.audit.nothing"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "AttributeError: module 'dp.audit' has no attribute 'nothing'" in done.stderr


# Guesses


def test_guesses_are_the_extremes():
    scores = np.array([5.0, -3.0, 0.1, 0.2, -4.0, 9.0])
    assert guess(scores, 3).tolist() == [1, 0, 0, 0, -1, 1]
    assert guess(scores, 1).tolist() == [0, 0, 0, 0, 0, 1]
    assert np.count_nonzero(guess(np.zeros(7), 7)) == 7
    for count in (0, 7, 2.0):
        with pytest.raises(ParameterError, match="guess"):
            guess(scores, count)
    with pytest.raises(ParameterError, match="number"):
        guess(np.array([0.0, math.nan]), 1)


# Canaries in training


def records(n=20, features=3):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, features, generator=generator)
    return x, (x[:, 0] > 0).float()


def model(features=3):
    torch.manual_seed(1)
    return nn.Linear(features, 1)


def loss(output, target):
    return functional.binary_cross_entropy_with_logits(output.reshape(-1), target, reduction="none")


def plan(**changes):
    usual = {"sampling_rate": 0.25, "steps": 20, "noise_multiplier": 1.4, "l2_clip_norm": 0.5, "learning_rate": 0.5}
    return DpSgdPlan(**{**usual, **changes})


def canary_run(m, label="coins", relation=Relation.ADD_OR_REMOVE_ONE, network=None):
    return CanaryRun(network or model(), *records(), loss, m, fresh_entropy(label), relation)


def coins_of(m, label="coins"):
    return Csprng(fresh_entropy(label)).bernoulli(m, 0.5)


@pytest.mark.parametrize("relation", list(Relation))
def test_a_canary_moves_the_sum_by_exactly_the_clip_norm(relation):
    run, m = canary_run(30, relation=relation), 30
    run.train(plan(sampling_rate=1.0, steps=3, noise_multiplier=SILENT), fresh_entropy("training"))
    away = 0.0 if relation is Relation.ADD_OR_REMOVE_ONE else -1.0
    step = 0.5 * 0.5 / 20  # learning rate, clip norm, over the expected draw of the records
    assert run.scores() == pytest.approx(3 * step * np.where(coins_of(m), 1.0, away), abs=1e-6)


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_the_model_trains_as_without_canaries(kind):
    def network():
        torch.manual_seed(1)
        return nn.Linear(3, 1) if kind == "linear" else nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 1))

    alone, beside = network(), network()
    silent = plan(sampling_rate=1.0, noise_multiplier=SILENT, momentum=0.5)
    train(alone, *records(), loss, silent, fixed_entropy("alone"))
    report = canary_run(30, network=beside).train(silent, fresh_entropy("beside"))
    assert report.mechanism == silent.mechanism()
    for a, b, start in zip(alone.parameters(), beside.parameters(), network().parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-6)
        assert not torch.equal(b, start)


def test_rounds_add_up():
    once, twice = canary_run(10), canary_run(10)
    silent = plan(sampling_rate=1.0, noise_multiplier=SILENT)
    once.train(silent, fresh_entropy("a"))
    for label in "ab":
        twice.train(silent, fresh_entropy(label))
    assert twice.scores() == pytest.approx(2 * once.scores(), abs=1e-5)


def test_the_noise_on_a_canary_is_the_plans():
    """Of 4000 canaries' scores those that are out are noise alone; 5 deviations of the estimate are allowed for."""
    run, m = canary_run(4000), 4000
    run.train(plan(steps=4), fresh_entropy("noise"))
    out = run.scores()[~coins_of(m)] * (20 * 0.25) / (0.5 * 0.5)  # in units of the clip norm
    assert out.std() == pytest.approx(1.4 * 2, rel=5 / math.sqrt(2 * len(out)))
    assert abs(out.mean()) < 5 * 1.4 * 2 / math.sqrt(len(out))


def test_records_of_any_shape_and_whole_numbers():
    torch.manual_seed(0)
    words = torch.randint(0, 7, (12, 5))
    network = nn.Sequential(nn.Embedding(7, 2), nn.Flatten(), nn.Linear(10, 1))
    run = CanaryRun(network, words, torch.zeros(12), loss, 9, fresh_entropy("coins"))
    run.train(plan(steps=2), fresh_entropy("words"))
    assert np.isfinite(run.scores()).all()


def test_only_right_tells_of_the_coins():
    run, m = canary_run(200), 200
    assert not [name for name in vars(run) if not name.startswith("_")]
    run.train(plan(), fresh_entropy("training"))
    before = guess(run.scores(), 40)
    run._coins = ~run._coins  # a scorer that looked at them would guess otherwise now
    assert (guess(run.scores(), 40) == before).all()
    with pytest.raises(ParameterError, match="guesses"):
        run.right(np.full(m, 2, dtype=np.int8))
    with pytest.raises(ParameterError, match="guesses"):
        run.right(before[:-1])


def test_canaries_that_cannot_be():
    x, y = records()
    for canaries in (0, -1, 2.5):
        with pytest.raises(ParameterError, match="canar"):
            CanaryRun(model(), x, y, loss, canaries, fresh_entropy("coins"))
    with pytest.raises(ParameterError, match="targets"):
        CanaryRun(model(), x, y[:-1], loss, 5, fresh_entropy("coins"))
    with pytest.raises(ParameterError, match="cannot number"):
        CanaryRun(nn.Flatten(), x.half(), y, loss, 5000, fresh_entropy("coins"))


# The verdict

M, R = 1500, 300


@pytest.fixture(scope="module")
def judges():
    return {relation: Judge(plan().mechanism(), 1e-4, M, R, relation=relation) for relation in Relation}


def audit(judges, label, relation=Relation.ADD_OR_REMOVE_ONE, run_plan=None):
    run = canary_run(M, f"coins {label}", relation)
    run.train(run_plan or plan(), fresh_entropy(label))
    return judges[relation].judge(run.right(guess(run.scores(), R)))


@pytest.mark.parametrize("relation", list(Relation))
def test_an_honest_run_is_consistent_with_its_account(judges, relation):
    """And shows as much as an ideal audit: the canaries miss nothing."""
    came, ideal = audit(judges, "honest", relation), judges[relation].ideal()
    assert not came.contradicts
    assert not ideal.contradicts
    assert 0.0 < came.one_run < came.account.epsilon
    spread = math.sqrt(R * 0.25)
    assert abs(came.right - ideal.right) < 4 * spread


def test_a_tenth_of_the_noise_contradicts_the_account(judges, monkeypatch):
    honest = dp.sgd._noise
    monkeypatch.setattr(dp.sgd, "_noise", lambda generator, n, deviation: honest(generator, n, deviation / 10))
    came = audit(judges, "little noise")
    assert came.curve_ruled_out
    assert came.contradicts


def test_a_claim_of_ten_times_the_noise_contradicts_the_account(judges):
    assert audit(judges, "claim", run_plan=plan(noise_multiplier=0.14)).contradicts


def test_records_that_are_always_drawn_contradict_the_account(judges, monkeypatch):
    honest = Csprng.bernoulli
    # The coins have p = 1/2 and stay fair.
    monkeypatch.setattr(Csprng, "bernoulli", lambda self, n, p: honest(self, n, p if p == 0.5 else 1.0))
    assert audit(judges, "no sampling").contradicts


def test_gradients_that_are_not_clipped_contradict_the_account(judges, monkeypatch):
    honest = dp.sgd._clipped_sum
    monkeypatch.setattr(dp.sgd, "_clipped_sum", lambda *arguments: honest(*arguments[:-1], 1e9))
    assert audit(judges, "no clipping").contradicts


def test_whoever_knows_the_coins_contradicts_any_account_worth_having(judges):
    judge = judges[Relation.ADD_OR_REMOVE_ONE]
    assert judge.judge(R).contradicts
    assert not judge.judge(0).contradicts
    with pytest.raises(ParameterError, match="right"):
        judge.judge(R + 1)
    for canaries, guesses in ((0, 0), (10, 11), (10, 0)):
        with pytest.raises(ParameterError, match="guess"):
            Judge(plan().mechanism(), 1e-4, canaries, guesses)


def test_without_canaries_the_guesses_are_chance(judges):
    """Coins that training never saw: the null of the whole procedure."""
    run = canary_run(M, "never trained")
    came = judges[Relation.ADD_OR_REMOVE_ONE].judge(run.right(guess(np.random.default_rng(4).standard_normal(M), R)))
    assert not came.contradicts
    assert came.one_run == came.f_dp == 0.0


@pytest.mark.slow
def test_honest_runs_are_seldom_contradicted(judges):
    """60 audits: a true share of 0.05 would give more than 9 with a chance of 1e-3."""
    assert sum(audit(judges, f"honest {i}").contradicts for i in range(60)) <= 9


@pytest.mark.slow
def test_how_much_noise_may_be_missing_unseen():
    """An ideal attack of the command's default size on an account of epsilon 5 at delta 1e-4 (docs/audit.md)."""
    noise = calibrate_noise_multiplier(5.0, 1e-4, 0.25, 60)
    claimed = plan(noise_multiplier=noise, steps=60).mechanism()
    judge, generator, seen = Judge(claimed, 1e-4, 5000, 1000), np.random.default_rng(0), {}
    for share in (1.0, 0.7, 0.5, 0.1):
        seen[share] = 0
        for _ in range(20):
            coins = generator.random(5000) < 0.5
            drawn = coins * generator.binomial(60, 0.25, 5000)
            scores = drawn + share * noise * math.sqrt(60) * generator.standard_normal(5000)
            right = np.count_nonzero(guess(scores, 1000) == np.where(coins, 1, -1))
            seen[share] += judge.judge(int(right)).contradicts
    assert (seen[1.0], seen[0.1]) == (0, 20)
    assert seen[0.7] <= 2
    assert seen[0.5] >= 16

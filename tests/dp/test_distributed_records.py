"""Statistical tests run on fixed entropy and cannot flake; LEVEL is how surprising a failure would be with another."""

import copy
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import nn
from torch.nn import functional

from dp import (
    Csprng,
    DiscreteGaussian,
    DiscreteGaussianSum,
    DistributedSgdPlan,
    DpError,
    DpSgdPlan,
    ParameterError,
    Unit,
    UnsupportedModel,
    decode_gradient,
    sgd_contribution,
    spent,
    train,
)
from dp.distributed import record
from dp.distributed.record import round_clipped
from tests.dp.entropy import fixed_entropy

LEVEL = 1e-6
SEED = bytes(range(32))


# Records: the plan


def sgd_plan(**changes):
    fields = {
        "sampling_rate": 0.5,
        "noise_multiplier": 2.0,
        "l2_clip_norm": 0.8,
        "grid": 1000,
        "dimension": 8,
        "shares": 4,
        "threshold": 3,
        "colluders": 1,
    }
    return DistributedSgdPlan(**{**fields, **changes})


@given(st.floats(0.01, 100.0), st.integers(1 << 6, 1 << 28), st.integers(1, 40), st.integers(0, 39))
def test_the_threshold_less_the_colluders_have_all_the_noise(sigma, grid, threshold, colluders):
    colluders = min(colluders, threshold - 1)
    if sigma * grid < 4:
        return
    plan = sgd_plan(noise_multiplier=sigma, grid=grid, shares=40, threshold=threshold, colluders=colluders)
    wanted = (Fraction(sigma) * grid) ** 2
    assert (threshold - colluders) * Fraction(plan.share_sigma) ** 2 >= wanted
    assert (threshold - colluders) * Fraction(plan.share_sigma * (1 - 1e-15)) ** 2 < wanted
    assert plan.mechanism().counted == threshold - colluders


def test_what_is_promised_and_what_was():
    plan = sgd_plan()
    promise = plan.mechanism(20)
    assert promise == DiscreteGaussianSum(
        unit=Unit.RECORD,
        sampling_rate=0.5,
        steps=20,
        l2_sensitivity=1000.0,
        dimension=8,
        l2_clip_norm=0.8,
        scale=1250.0,
        shares=4,
        threshold=3,
        colluders=1,
        survivors=3,
        share_sigma=plan.share_sigma,
    )
    assert plan.mechanism(20, survivors=4).survivors == 4
    assert plan.mechanism().steps == 1
    costs = [spent([plan.mechanism(20, survivors=k)], 1e-5).epsilon for k in (3, 4)]
    assert costs[1] < costs[0]
    with pytest.raises(ParameterError, match="survivors"):
        plan.mechanism(20, survivors=2)


def test_room_for_rounding():
    assert sgd_plan().clip_to == pytest.approx(0.8 * (1 - math.sqrt(8) / 2000))
    plan = sgd_plan(dimension=10**6, grid=1 << 24)
    assert plan.clip_to == pytest.approx(0.8 * (1 - 3e-5), rel=1e-6)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"sampling_rate": 0.0}, "sampling_rate"),
        ({"sampling_rate": 1.1}, "sampling_rate"),
        ({"noise_multiplier": 0.0}, "noise_multiplier"),
        ({"noise_multiplier": math.nan}, "noise_multiplier"),
        ({"l2_clip_norm": -1.0}, "l2_clip_norm"),
        ({"grid": 0}, "grid"),
        ({"grid": 10.5}, "grid"),
        ({"grid": (1 << 28) + 1}, "2\\^28"),
        ({"dimension": 0}, "dimension"),
        ({"grid": 50, "dimension": 10_000}, "too coarse for 10000 numbers.*50.0 steps"),
        ({"threshold": 5}, "threshold"),
        ({"colluders": 3}, "colluders"),
        ({"grid_sample_mode": "x"}, "grad_sample_mode"),
        ({"noise_multiplier": 1e-4}, "share_sigma"),
    ],
)
def test_plans_are_checked(changes, says):
    if "grid_sample_mode" in changes:
        changes = {"grad_sample_mode": "ghost"}
    with pytest.raises(ParameterError, match=says):
        sgd_plan(**changes)


def test_the_coarsest_grid_that_leaves_something():
    plan = sgd_plan(grid=50, dimension=9999)
    assert 0 < plan.clip_to < 1e-4


# Records: the ring


def test_the_ring_has_room_for_records_and_noise():
    plan = sgd_plan(sampling_rate=1.0)
    for records in (1, 100, 10**5):
        bits = plan.ring_bits(records)
        largest = records * plan.grid
        noise = math.sqrt(2 * 4 * plan.share_sigma**2 * math.log(4 * 8 * 2**40))
        assert largest + noise < 2 ** (bits - 1) <= 2 * (largest + noise) + 2
    assert plan.ring_bits(100) > math.log2(100 * plan.grid) + 1
    assert plan.ring_bits(1, steps=10**9) >= plan.ring_bits(1)
    assert sgd_plan(noise_multiplier=5000.0).ring_bits(1) > plan.ring_bits(1) + 10


def test_the_ring_counts_on_few_records_where_few_are_drawn():
    plan = sgd_plan(sampling_rate=0.01)
    drawn = (2 ** (plan.ring_bits(10**5) - 1)) / plan.grid
    assert stats.binom.sf(drawn - 20, 10**5, 0.01) < 2**-40
    assert plan.ring_bits(10**5) < sgd_plan(sampling_rate=1.0).ring_bits(10**5) - 5


def test_rings_too_small():
    plan = sgd_plan()
    plan.check_ring(plan.ring_bits(500), 500)
    with pytest.raises(ParameterError, match="too small for the records and the noise"):
        plan.check_ring(plan.ring_bits(500) - 1, 500)
    with pytest.raises(ParameterError, match="62 is the most"):
        sgd_plan(grid=1 << 28, noise_multiplier=1e12).ring_bits(10**9)
    for records, steps, failure in ((0, 1, 0.1), (10, 0, 0.1), (10, 1, 0.0), (10, 1, 2.0), (1.5, 1, 0.1)):
        with pytest.raises(ParameterError):
            plan.ring_bits(records, steps, failure)


# Records: rounding


@settings(max_examples=60)
@given(st.integers(0, 10**6), st.sampled_from([(1, 1), (3, 1), (8, 2), (50, 4), (50, 1000), (400, 12), (999, 16)]))
def test_no_record_is_longer_than_the_grid(seed, size):
    """Directions that rounding lengthens most are among those tried: equal coordinates near a half."""
    d, grid = size
    plan = sgd_plan(dimension=d, grid=grid, noise_multiplier=50.0)
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(20, d)) * rng.exponential(size=(20, d)) ** 3
    rows[:5] = rng.choice([-1.0, 1.0], size=(5, d))
    rows[5:10] = rng.choice([0.0, 1.0], size=(5, d), p=[0.3, 0.7]) + 1e-12
    rows *= plan.clip_to / np.linalg.norm(rows, axis=1, keepdims=True)
    whole = round_clipped(rows, plan)
    assert whole.dtype == np.int64
    assert ((whole**2).sum(axis=1) <= grid**2).all()
    assert np.abs(whole - rows * grid / plan.l2_clip_norm).max() <= 0.5 + 1e-9


def test_a_row_that_rounding_would_lengthen_is_rounded_to_zero_instead():
    plan = sgd_plan(dimension=40, grid=10, l2_clip_norm=10.0, noise_multiplier=5.0)
    rows = np.full((2, 40), 1.55)  # length 9.8, and 12.6 if rounded to 2
    rows[1] = 0.2
    assert round_clipped(rows, plan).tolist() == [[1] * 40, [0] * 40]


@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e300, 0.9])
def test_rows_that_were_not_clipped(bad):
    row = np.zeros((1, 8))
    row[0, 3] = bad
    with pytest.raises(DpError, match="longer than its clip norm"):
        round_clipped(row, sgd_plan())
    just_too_long = np.full((1, 8), 0.8 * 1.004 / math.sqrt(8))
    with pytest.raises(DpError, match="longer than its clip norm"):
        round_clipped(just_too_long, sgd_plan())


# Records: contributions


def data(n=30):
    torch.manual_seed(3)
    x = torch.randn(n, 3) * 3
    return x, (torch.rand(n) < 0.5).long()


def model():
    torch.manual_seed(4)
    return nn.Linear(3, 2)


@pytest.fixture
def silent(monkeypatch):
    monkeypatch.setattr(DiscreteGaussian, "draw", lambda _self, _generator, n: np.zeros(n, np.int64))


def by_hand(net, x, y, plan):
    """One row for each record, by autograd alone."""
    rows = []
    for i in range(len(x)):
        net.zero_grad()
        functional.cross_entropy(net(x[i : i + 1]), y[i : i + 1]).backward()
        row = np.concatenate([p.grad.numpy().ravel() for p in net.parameters()]).astype(np.float64)
        row *= min(1.0, plan.clip_to / np.linalg.norm(row))
        rows.append(np.rint(row * plan.grid / plan.l2_clip_norm))
    return np.array(rows)


@pytest.mark.parametrize("mode", ["hooks", "functorch"])
def test_a_contribution_is_the_sum_of_its_rounded_records(silent, mode):
    (x, y), plan = data(), sgd_plan(grad_sample_mode=mode)
    came = sgd_contribution(model(), x, y, nn.CrossEntropyLoss(), plan, fixed_entropy("site"))
    assert came.dtype == np.int64
    drawn = Csprng(fixed_entropy("site")).bernoulli(30, 0.5)
    assert 5 < drawn.sum() < 25
    expected = by_hand(model(), x, y, plan)[drawn].sum(axis=0)
    assert np.abs(came - expected).max() <= 2  # float32 may round a number or two the other way
    assert np.abs(expected).max() > 1000


def test_one_record_moves_the_sum_by_the_grid_at_most(silent):
    plan = sgd_plan(sampling_rate=1.0)
    x, y = data()
    x[7] *= 1e6
    whole = sgd_contribution(model(), x, y, nn.CrossEntropyLoss(), plan, fixed_entropy("all"))
    lengths = []
    for i in range(30):
        keep = [j for j in range(30) if j != i]
        less = sgd_contribution(model(), x[keep], y[keep], nn.CrossEntropyLoss(), plan, fixed_entropy("all"))
        lengths.append(math.sqrt(((whole - less) ** 2).sum()))
    assert max(lengths) <= 1000
    assert lengths[7] > 990


def test_chunks_make_no_difference(silent, monkeypatch):
    (x, y), plan = data(), sgd_plan()
    whole, split = (
        (
            monkeypatch.setattr("dp.sgd._GRADIENT_FLOATS", floats),
            sgd_contribution(model(), x, y, nn.CrossEntropyLoss(), plan, fixed_entropy("chunks")),
        )[1]
        for floats in (1 << 22, 17)
    )
    assert np.abs(whole - split).max() <= 2


def test_a_site_without_records_adds_its_noise():
    plan = sgd_plan(dimension=20_000, grid=1000)
    noise = sgd_contribution(
        nn.Linear(20_000, 1, bias=False),
        torch.zeros(0, 20_000),
        torch.zeros(0, 1),
        nn.MSELoss(),
        plan,
        fixed_entropy("bare"),
    )
    assert stats.kstest(noise / plan.share_sigma, "norm").pvalue > LEVEL
    assert plan.share_sigma == pytest.approx(2.0 * 1000 / math.sqrt(2))


def test_noise_is_added_to_records_and_differs_between_sites(monkeypatch):
    (x, y), plan = data(), sgd_plan()
    noisy = [sgd_contribution(model(), x, y, nn.CrossEntropyLoss(), plan, fixed_entropy(s)) for s in ("a", "a", "b")]
    drawn = []
    monkeypatch.setattr(
        DiscreteGaussian, "draw", lambda self, _, n: drawn.append((self.sigma, n)) or np.zeros(n, np.int64)
    )
    quiet = sgd_contribution(model(), x, y, nn.CrossEntropyLoss(), plan, fixed_entropy("a"))
    assert drawn == [(Fraction(plan.share_sigma), 8)]
    assert (noisy[0] == noisy[1]).all()
    assert (noisy[0] != noisy[2]).all()
    assert 0 < np.abs(noisy[0] - quiet).max() < 6 * plan.share_sigma


def test_sites_together_are_one_trusted_server():
    """Four sites' opened sum modulo 2^b is a central DP-SGD step's mean gradient up to its noise."""
    x, y = data(400)
    plan = sgd_plan(noise_multiplier=0.5, sampling_rate=1.0, colluders=0, threshold=4, grid=1 << 14)
    bits = plan.ring_bits(400)
    ring = 0
    for site in range(4):
        part = slice(100 * site, 100 * site + 100)
        ring = ring + sgd_contribution(
            model(), x[part], y[part], nn.CrossEntropyLoss(), plan, fixed_entropy(f"together {site}")
        ) % (1 << bits)
    opened = ring % (1 << bits)
    signed = opened - (opened >= 1 << (bits - 1)) * (1 << bits)
    gradient = decode_gradient(signed, plan, 400)
    central = model()
    before = torch.cat([p.detach().flatten() for p in central.parameters()])
    train(
        central,
        x,
        y,
        nn.CrossEntropyLoss(),
        DpSgdPlan(sampling_rate=1.0, steps=1, noise_multiplier=1e-9, l2_clip_norm=0.8, learning_rate=1.0),
        fixed_entropy("central"),
    )
    exact = (before - torch.cat([p.detach().flatten() for p in central.parameters()])).numpy()
    noise = 0.5 * 0.8 / 400
    assert np.abs(gradient - exact).max() < 6 * noise
    assert np.abs(gradient - exact).max() > 0.1 * noise
    assert np.abs(exact).max() > 20 * noise


def test_decoding():
    plan = sgd_plan(sampling_rate=0.25)
    total = np.arange(-4, 4)
    assert decode_gradient(total, plan, 40) == pytest.approx(total * 0.8 / 1000 / 10)
    for wrong in (total[:7], total.reshape(2, 4), total / 2):
        with pytest.raises(ParameterError, match=r"whole numbers of shape \(8,\)"):
            decode_gradient(wrong, plan, 40)
    with pytest.raises(ParameterError, match="records"):
        decode_gradient(total, plan, 0)


def test_the_model_stays_as_it_was_even_after_an_error():
    x, y = data()
    for bad, error in ((1.0, None), (math.nan, DpError)):
        x[5, 0] = bad
        net = model()
        state, attributes = copy.deepcopy(net.state_dict()), {k: v for k, v in net.__dict__.items() if k != "training"}
        net.eval()
        if error is None:
            sgd_contribution(net, x, y, nn.CrossEntropyLoss(), sgd_plan(), fixed_entropy("left"))
        else:
            with pytest.raises(error, match="not finite") as kept:
                sgd_contribution(net, x, y, nn.CrossEntropyLoss(), sgd_plan(sampling_rate=1.0), fixed_entropy("left"))
            assert kept.tb is not None  # the traceback holds on to every frame
        assert all(torch.equal(v, net.state_dict()[k]) for k, v in state.items())
        assert not net.training
        assert attributes.keys() == {k for k in net.__dict__ if k != "training"}
        assert not net._forward_hooks
        assert not net._backward_hooks
        assert all(p.grad is None and not hasattr(p, "grad_sample") for p in net.parameters())


def test_hooks_are_off_as_soon_as_rounding_fails(monkeypatch):
    def fail(*_):
        raise KeyError("stop")

    monkeypatch.setattr(record, "round_clipped", fail)
    net, (x, y) = model(), data()
    with pytest.raises(KeyError) as kept:
        sgd_contribution(net, x, y, nn.CrossEntropyLoss(), sgd_plan(), fixed_entropy("stop"))
    assert kept.tb is not None
    assert not net._forward_hooks


def test_what_does_not_fit():
    x, y = data()
    with pytest.raises(ParameterError, match="12 trainable numbers; this one has 8"):
        sgd_contribution(model(), x, y, nn.CrossEntropyLoss(), sgd_plan(dimension=12), fixed_entropy("fit"))
    with pytest.raises(ParameterError, match="equally many"):
        sgd_contribution(model(), x, y[:-1], nn.CrossEntropyLoss(), sgd_plan(), fixed_entropy("fit"))
    net = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    with pytest.raises(UnsupportedModel, match="BatchNorm"):
        sgd_contribution(net, x, y, nn.CrossEntropyLoss(), sgd_plan(dimension=12), fixed_entropy("fit"))

    def centred(output, target):
        losses = functional.cross_entropy(output, target, reduction="none")
        return losses - losses.mean()

    with pytest.raises(UnsupportedModel, match="other records"):
        sgd_contribution(model(), x, y, centred, sgd_plan(), fixed_entropy("fit"))

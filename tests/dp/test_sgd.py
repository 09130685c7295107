import copy
import logging
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import nn
from torch.nn import functional

import dp.sgd
from dp import Csprng, DpError, DpSgdPlan, ParameterError, UnsupportedModel, train
from tests.dp.entropy import fixed_entropy

MODES = ["hooks", "functorch"]
SILENT = 1e-12  # a noise multiplier too small to see


def plan(**changes):
    usual = {"sampling_rate": 0.25, "steps": 4, "noise_multiplier": 1.0, "l2_clip_norm": 1.0, "learning_rate": 0.5}
    return DpSgdPlan(**{**usual, **changes})


def data(n=40, features=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, features, generator=generator)
    return x, (x[:, 0] > 0).long()


def mlp(features=6):
    torch.manual_seed(7)
    return nn.Sequential(nn.Linear(features, 8), nn.Tanh(), nn.LayerNorm(8), nn.Linear(8, 2))


def flat(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()]).double()


def change(model, *args, **kwargs):
    """What training adds to the parameters."""
    trained = copy.deepcopy(model)
    train(trained, *args, **kwargs)
    return flat(trained) - flat(model)


# What one record can do


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
def test_clipping_bounds_the_influence_of_one_record(mode, scale):
    """Noise off, every record drawn: the sums with and without one record are no further apart than the clip norm."""
    clip, size = 0.5, 40
    x, y = data(size)
    x = torch.cat([x[:-1], x[-1:] * scale])
    p = plan(
        sampling_rate=1.0, steps=1, noise_multiplier=SILENT, l2_clip_norm=clip, learning_rate=1.0, grad_sample_mode=mode
    )
    args = (nn.CrossEntropyLoss(), p, fixed_entropy("influence"))
    with_it = change(mlp(), x, y, *args, public_size=size) * size
    without = change(mlp(), x[:-1], y[:-1], *args, public_size=size) * size
    influence = float((with_it - without).norm())
    rounding = 1e-5 * size  # the parameters are float32
    assert influence <= clip + rounding
    if scale == 1e4:
        assert influence >= clip - rounding


@pytest.mark.parametrize("mode", MODES)
def test_the_sum_is_that_of_clipped_gradients(mode):
    """Against gradients taken one record at a time by autograd, and clipped by hand."""
    x, y = data(12)
    model, clip = mlp(), 0.3
    expected = torch.zeros(len(flat(model)), dtype=torch.float64)
    for i in range(len(x)):
        gradients = torch.autograd.grad(functional.cross_entropy(model(x[i : i + 1]), y[i : i + 1]), model.parameters())
        g = torch.cat([g.flatten() for g in gradients]).double()
        expected += g * min(1.0, clip / float(g.norm()))
    p = plan(
        sampling_rate=1.0, steps=1, noise_multiplier=SILENT, l2_clip_norm=clip, learning_rate=1.0, grad_sample_mode=mode
    )
    came = change(model, x, y, nn.CrossEntropyLoss(), p, fixed_entropy("sum"))
    assert torch.allclose(came, -expected / len(x), atol=1e-6)


@settings(max_examples=20, deadline=None)
@given(
    clip=st.floats(0.01, 5.0),
    scales=st.lists(st.sampled_from([0.0, 1e-6, 1.0, 1e6]), min_size=1, max_size=6),
)
def test_the_sum_is_never_longer_than_the_clips(clip, scales):
    x, y = data(len(scales))
    x = x * torch.tensor(scales)[:, None]
    model = nn.Linear(6, 2)
    p = plan(sampling_rate=1.0, steps=1, noise_multiplier=SILENT, l2_clip_norm=clip, learning_rate=1.0)
    moved = change(model, x, y, nn.CrossEntropyLoss(), p, fixed_entropy("many"), public_size=1)
    assert float(moved.norm()) <= clip * len(scales) + 1e-4


def test_large_draws_are_summed_in_pieces(monkeypatch):
    x, y = data()
    args = (x, y, nn.CrossEntropyLoss(), plan(), fixed_entropy("pieces"))
    whole = change(mlp(), *args)
    monkeypatch.setattr(dp.sgd, "_GRADIENT_FLOATS", 3 * len(flat(mlp())))
    assert torch.allclose(whole, change(mlp(), *args), atol=1e-6)


# Noise


class Zero(nn.Module):
    """A loss without a gradient, so that all that is left is noise."""

    def forward(self, output, target):
        return 0.0 * output.sum(1) + 0.0 * target


def test_noise_has_its_standard_deviation():
    q, sigma, clip, n = 0.2, 1.7, 0.6, 50
    x, y = data(n, features=2000)
    p = plan(sampling_rate=q, steps=1, noise_multiplier=sigma, l2_clip_norm=clip, learning_rate=1.0)
    noise = change(nn.Linear(2000, 10, bias=False), x, y, Zero(), p, fixed_entropy("deviation"))
    expected = sigma * clip / (q * n)
    # 20000 draws: the deviation is within 2.5 % but for one entropy in 10^6; the same level for the shape.
    assert float(noise.std()) == pytest.approx(expected, rel=0.025)
    assert abs(float(noise.mean())) < 5 * expected / math.sqrt(len(noise))
    assert stats.kstest(noise.numpy() / expected, "norm").pvalue > 1e-6


def test_noise_of_several_steps_is_independent():
    x, y = data(50, features=2000)
    one, four = (
        change(nn.Linear(2000, 10), x, y, Zero(), plan(steps=s), fixed_entropy("independent")).std() for s in (1, 4)
    )
    assert float(four / one) == pytest.approx(2.0, rel=0.05)


def test_noise_is_summed_from_four_gaussians(monkeypatch):
    drawn = []
    original = Csprng.gaussian

    def spy(self, n):
        drawn.append(original(self, n))
        return drawn[-1]

    monkeypatch.setattr(Csprng, "gaussian", spy)
    noise = dp.sgd._noise(Csprng(fixed_entropy("four")), 5, 3.0)
    assert len(drawn) == 4
    assert np.allclose(noise, 1.5 * np.sum(drawn, axis=0))
    assert len({tuple(d) for d in drawn}) == 4


def test_two_sites_with_torchs_seed_in_common_have_different_noise():
    x, y = data()
    updates = []
    for site in ("a", "b"):
        torch.manual_seed(1)
        np.random.seed(1)
        updates.append(change(mlp(), x, y, Zero(), plan(steps=1), fixed_entropy(site)))
    difference = (updates[0] - updates[1]).std()
    assert float(difference) > float(updates[0].std())  # sqrt(2) times, where they are independent


def test_equal_entropy_gives_equal_bits_whatever_torchs_seed():
    x, y = data()
    updates = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        updates.append(change(mlp(), x, y, nn.CrossEntropyLoss(), plan(momentum=0.9), fixed_entropy("same")))
    assert torch.equal(*updates)


def test_torchs_generator_is_left_alone():
    x, y = data()
    before = torch.random.get_rng_state()
    model = mlp()
    torch.random.set_rng_state(before)
    train(model, x, y, nn.CrossEntropyLoss(), plan(), fixed_entropy("state"))
    assert torch.equal(before, torch.random.get_rng_state())


# Draws and steps


def test_draws_are_poisson():
    """Sizes vary, as they must; the divisor does not."""
    sizes = []

    def loss(output, target):
        sizes.append(len(output))
        return functional.cross_entropy(output, target, reduction="none")

    x, y = data(100)
    train(mlp(), x, y, loss, plan(sampling_rate=0.3, steps=200), fixed_entropy("draws"))
    sizes = sizes[1 + dp.sgd._PROBED :]
    assert len(sizes) == 200
    # Dispersion of binomial sizes: chi-square with 200 degrees, false alarm for one entropy in 10^6.
    statistic = sum((s - 30) ** 2 for s in sizes) / (100 * 0.3 * 0.7)
    low, high = stats.chi2.ppf([5e-7, 1 - 5e-7], 200)
    assert low < statistic < high


def test_the_divisor_is_the_expected_size():
    """A draw that is twice the usual one makes a step that is twice as long."""
    x = torch.ones(8, 3)
    y = torch.zeros(8)
    model = nn.Linear(3, 1, bias=False)
    p = plan(sampling_rate=0.5, steps=1, noise_multiplier=SILENT, l2_clip_norm=1e-3, learning_rate=1.0)
    lengths = {}
    for label in range(30):
        drawn = int(Csprng(fixed_entropy(label)).bernoulli(8, 0.5).sum())
        lengths[drawn] = float(change(model, x, y, lambda o, _: o.sum(1), p, fixed_entropy(label)).norm())
    assert len(lengths) > 3
    for drawn, length in lengths.items():
        assert length == pytest.approx(drawn * 1e-3 / 4, abs=1e-6)


def test_empty_draws_add_noise_and_count():
    x, y = data(3)
    p = plan(sampling_rate=1e-9, steps=5)
    model = mlp()
    before = flat(model)
    report = train(model, x, y, nn.CrossEntropyLoss(), p, fixed_entropy("empty"))
    assert report.steps == report.mechanism.steps == 5
    assert report.mechanism == p.mechanism()
    assert bool((flat(model) != before).all())


def test_no_steps_change_nothing():
    x, y = data()
    assert not change(mlp(), x, y, nn.CrossEntropyLoss(), plan(steps=0), fixed_entropy("none")).any()


def test_it_learns():
    x, y = data(200, 15)
    model = nn.Linear(15, 2)
    train(model, x, y, nn.CrossEntropyLoss(), plan(steps=60), fixed_entropy("learn"))
    assert float((model(x).argmax(1) == y).double().mean()) > 0.85


def test_momentum():
    """With one constant gradient g and momentum m, two steps go g + (g + m g)."""
    x, y = torch.ones(4, 3), torch.zeros(4)
    model = nn.Linear(3, 1, bias=False)
    steps = [
        change(
            model,
            x,
            y,
            lambda o, _: o.sum(1),
            plan(sampling_rate=1.0, noise_multiplier=SILENT, learning_rate=0.1, steps=s, momentum=0.5),
            fixed_entropy("momentum"),
        )
        for s in (1, 2)
    ]
    assert torch.allclose(steps[1], 2.5 * steps[0], atol=1e-6)


# The model afterwards


def traces(model):
    """Everything that hooks could leave on a model."""
    modules = {name: sorted(m.__dict__.items(), key=lambda i: i[0]) for name, m in model.named_modules()}
    hooks = [len(m._forward_hooks) + len(m._backward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    parameters = [(name, sorted(p.__dict__), p.grad, p.requires_grad) for name, p in model.named_parameters()]
    return (
        {
            name: [(k, v) for k, v in items if not k.startswith("_") or k == "_is_full_backward_hook"]
            for name, items in modules.items()
        },
        hooks,
        parameters,
        list(model.state_dict()),
    )


@pytest.mark.parametrize("mode", MODES)
def test_one_model_over_many_rounds(mode):
    x, y = data()
    model = mlp()
    model[0].eval()
    before = traces(model)
    for r in range(3):
        train(model, x, y, nn.CrossEntropyLoss(), plan(grad_sample_mode=mode), fixed_entropy(r))
        assert traces(model) == before
    assert not any(key.startswith("_module.") for key in model.state_dict())
    assert [m.training for m in model] == [False, True, True, True]
    functional.cross_entropy(model(x), y).backward()  # ordinary use works again
    assert not any(hasattr(p, "grad_sample") for p in model.parameters())


def test_a_failed_run_gives_the_old_model_back():
    x, y = data()
    calls = []

    def loss(output, target):
        calls.append(1)
        if len(calls) > dp.sgd._PROBED + 3:
            raise KeyError("stop")
        return functional.cross_entropy(output, target, reduction="none")

    model = mlp()
    before, parameters = traces(model), flat(model)
    with pytest.raises(KeyError):
        train(model, x, y, loss, plan(sampling_rate=1.0), fixed_entropy("failed"))
    assert traces(model) == before
    assert torch.equal(flat(model), parameters)
    train(model, x, y, nn.CrossEntropyLoss(), plan(), fixed_entropy("failed"))


class Remembering(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 2)

    def forward(self, x):
        self.seen = x
        return self.linear(x)


def test_a_model_does_not_carry_records_out():
    x, y = data()
    model = Remembering()
    train(model, x, y, nn.CrossEntropyLoss(), plan(), fixed_entropy("seen"))
    assert not hasattr(model, "seen")


@pytest.mark.parametrize("mode", MODES)
def test_frozen_parameters_stay(mode):
    x, y = data()
    model = mlp()
    model[0].requires_grad_(False)
    model[3].bias.requires_grad_(False)
    old = copy.deepcopy(model.state_dict())
    train(model, x, y, nn.CrossEntropyLoss(), plan(grad_sample_mode=mode), fixed_entropy("frozen"))
    moved = {key for key, value in model.state_dict().items() if not torch.equal(value, old[key])}
    assert moved == {"2.weight", "2.bias", "3.weight"}


# What is refused


class BatchMean(nn.Module):
    """Mixes records without a layer that anyone could know by name."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 2)

    def forward(self, x):
        return self.linear(x - x.mean(0))


class Functional(nn.Module):
    """Uses a layer's weight behind the layer's back."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 2)

    def forward(self, x):
        return functional.linear(x, self.linear.weight, self.linear.bias)


class Folding(nn.Module):
    """Shows a layer more rows than there are records."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 2)

    def forward(self, x):
        return self.linear(x.reshape(-1, 3)).reshape(len(x), -1)[:, :2]


class Buffered(nn.Linear):
    def __init__(self):
        super().__init__(6, 2)
        self.register_buffer("seen", torch.zeros(1))


class MyBatchNorm(nn.BatchNorm1d):
    pass


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("model", "says"),
    [
        (lambda: nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)), r"1 \(BatchNorm1d\).*GroupNorm"),
        (
            lambda: nn.Sequential(nn.BatchNorm1d(6, affine=False, track_running_stats=False), nn.Linear(6, 2)),
            r"0 \(BatchNorm1d\).*GroupNorm",
        ),
        (lambda: nn.Sequential(MyBatchNorm(6, track_running_stats=False), nn.Linear(6, 2)), r"0 \(MyBatchNorm\)"),
        (Buffered, r"the model \(Buffered\) has buffers \['seen'\]"),
        (lambda: nn.Sequential(nn.Linear(6, 2), nn.LSTM(2, 2)), r"1 \(LSTM\).*DPLSTM"),
        (BatchMean, "changes with the other records"),
        (Functional, "no gradient per record"),
        (Folding, "no gradient per record"),
        (lambda: nn.Linear(6, 2).double(), "weight should be float32"),
        (lambda: nn.Linear(6, 2).requires_grad_(False), "no parameter that requires a gradient"),
    ],
)
def test_models_that_clipping_cannot_bound(mode, model, says):
    x, y = data()
    model = model()
    before = traces(model)
    with pytest.raises(UnsupportedModel, match=says):
        train(model, x, y, nn.CrossEntropyLoss(), plan(grad_sample_mode=mode), fixed_entropy("refused"))
    assert traces(model) == before


def test_what_opacus_cannot_do_is_our_error():
    model = nn.Sequential(nn.EmbeddingBag(5, 2))
    with pytest.raises(UnsupportedModel, match="Opacus cannot"):
        train(
            model,
            torch.zeros(4, 3, dtype=torch.long),
            torch.zeros(4, dtype=torch.long),
            nn.CrossEntropyLoss(),
            plan(grad_sample_mode="functorch"),
            fixed_entropy("bag"),
        )


def test_hooks_of_another():
    from opacus.grad_sample import GradSampleModule

    x, y = data()
    with pytest.raises(UnsupportedModel, match="already carries Opacus hooks"):
        train(GradSampleModule(mlp()), x, y, nn.CrossEntropyLoss(), plan(), fixed_entropy("twice"))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite(bad):
    x, y = data()
    x[3, 2] = bad
    model = mlp()
    before = flat(model)
    what = "loss" if math.isnan(bad) else "gradient"  # tanh makes an infinity finite, and its slope makes it NaN
    with pytest.raises(DpError, match=f"{what} of a record is not finite"):
        train(model, x, y, nn.CrossEntropyLoss(), plan(sampling_rate=1.0), fixed_entropy("nan"))
    assert torch.equal(flat(model), before)


def test_a_gradient_that_is_not_finite():
    """The root has a loss of 0 at 0, and a slope without end."""
    x, y = torch.zeros(4, 3), torch.zeros(4)
    model = nn.Linear(3, 1, bias=True)
    nn.init.zeros_(model.bias)
    with pytest.raises(DpError, match="gradient of a record is not finite"):
        train(model, x, y, lambda o, _: o.abs().sqrt().sum(1), plan(sampling_rate=1.0), fixed_entropy("slope"))


# Losses


@pytest.mark.parametrize(
    "loss",
    [
        nn.CrossEntropyLoss(),
        nn.CrossEntropyLoss(reduction="sum"),
        functional.cross_entropy,
        lambda output, target: functional.cross_entropy(output, target, reduction="none"),
    ],
)
def test_the_reduction_of_the_loss_does_not_matter(loss):
    x, y = data()
    reference = change(mlp(), x, y, nn.CrossEntropyLoss(reduction="none"), plan(), fixed_entropy("reduction"))
    reduction = getattr(loss, "reduction", None)
    assert torch.equal(change(mlp(), x, y, loss, plan(), fixed_entropy("reduction")), reference)
    assert getattr(loss, "reduction", None) == reduction


def test_a_records_loss_is_the_mean_over_its_axes():
    x, _ = data()
    y = torch.randn(40, 2)
    by_hand = change(mlp(), x, y, lambda o, t: ((o - t) ** 2).mean(1), plan(), fixed_entropy("axes"))
    assert torch.allclose(change(mlp(), x, y, nn.MSELoss(), plan(), fixed_entropy("axes")), by_hand, atol=1e-7)


@pytest.mark.parametrize(
    ("loss", "says"),
    [
        (lambda o, t: functional.cross_entropy(o, t), "one value per record"),
        (lambda o, t: functional.cross_entropy(o, t, reduction="none")[:1], "one value per record"),
    ],
)
def test_a_loss_without_one_value_per_record(loss, says):
    x, y = data()
    with pytest.raises(ParameterError, match=says):
        train(mlp(), x, y, loss, plan(), fixed_entropy("shape"))


def test_a_target_that_broadcasts_is_refused():
    """(n, 1) against (n,) pairs every record with every target; equal targets would hide it from the probe."""
    x, _ = data()
    with pytest.raises(ParameterError, match="the same shape"):
        train(nn.Linear(6, 1), x, torch.zeros(40), nn.MSELoss(), plan(), fixed_entropy("broadcast"))


def test_a_loss_that_mixes_records():
    x, y = data()

    def centred(output, target):
        losses = functional.cross_entropy(output, target, reduction="none")
        return losses - losses.mean()

    with pytest.raises(UnsupportedModel, match="changes with the other records"):
        train(mlp(), x, y, centred, plan(), fixed_entropy("centred"))


# Parameters


@pytest.mark.parametrize(
    "changes",
    [
        {"sampling_rate": 0.0},
        {"sampling_rate": 1.5},
        {"steps": -1},
        {"noise_multiplier": 0.0},
        {"l2_clip_norm": math.inf},
        {"learning_rate": 0.0},
        {"momentum": 1.0},
        {"momentum": -0.1},
        {"grad_sample_mode": "ghost"},
    ],
)
def test_plans_are_checked(changes):
    with pytest.raises(ParameterError, match=next(iter(changes))):
        plan(**changes)


@pytest.mark.parametrize(
    ("n_x", "n_y", "public_size"), [(4, 3, None), (0, 0, None), (4, 4, 0), (4, 4, -2), (4, 4, 2.5)]
)
def test_sizes_are_checked(n_x, n_y, public_size):
    x, y = torch.zeros(n_x, 6), torch.zeros(n_y, dtype=torch.long)
    with pytest.raises(ParameterError):
        train(mlp(), x, y, nn.CrossEntropyLoss(), plan(), fixed_entropy("sizes"), public_size=public_size)


def test_a_site_without_records_adds_noise_like_any_other():
    x, y = torch.zeros(0, 6), torch.zeros(0, dtype=torch.long)
    assert change(mlp(), x, y, nn.CrossEntropyLoss(), plan(), fixed_entropy("bare"), public_size=10).all()


# Imports


def test_the_account_needs_no_torch_and_training_leaves_logging_alone():
    code = (
        "import sys, logging, dp; assert 'torch' not in sys.modules and 'opacus' not in sys.modules\n"
        "dp.sgd if False else dp.train; import torch\n"
        "plan = dp.DpSgdPlan(sampling_rate=1.0, steps=1, noise_multiplier=1.0, l2_clip_norm=1.0, learning_rate=1.0)\n"
        "dp.train(torch.nn.Linear(2, 1), torch.ones(2, 2), torch.ones(2, 1), torch.nn.MSELoss(), plan, bytes)\n"
        "assert not logging.root.handlers"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert logging.root.level == logging.WARNING


def test_unknown_names():
    with pytest.raises(AttributeError, match="nonsense"):
        dp.nonsense  # noqa: B018
    assert all(getattr(dp, name) for name in dp.__all__)

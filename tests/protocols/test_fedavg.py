"""What a site computes in a round, and how the server steps: against plain torch on the rows put together."""

import itertools
import math

import msgspec
import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from protocols import site as site_module
from protocols.errors import StudyError
from protocols.fedavg import (
    ServerOptimizer,
    build_model,
    entry_count,
    evaluate,
    flatten,
    gradient_update,
    load_model_bytes,
    local_plan,
    local_update,
    model_bytes,
    parameter_count,
    private_update,
    training_device,
)
from protocols.study import Server, Training
from secagg.errors import DecodeError, LocalProtocolError
from secagg.prg import deterministic_entropy
from tests.protocols.hospitals import (
    FEATURES,
    PRIVATE,
    SITES,
    World,
    fedsgd,
    hospital,
    parameters,
    pooled_gradient,
    study,
)

CPU = torch.device("cpu")
NORMED = {"kind": "factory", "factory": "tests.protocols.hospitals:normed"}
# Four sites round once each to 2^-16, and the sum is divided by their 50 rows; the rest is float32.
ACCURACY = 4 * 2.0**-16 / 50 + 1e-6


def local_sgd(model, data, *, steps, lr, momentum=0.0):
    """Full-batch SGD, written once more."""
    x, y = torch.tensor(data.train_x), torch.tensor(data.train_y)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=momentum)
    for _ in range(steps):
        optimizer.zero_grad()
        torch.nn.functional.binary_cross_entropy_with_logits(model(x).reshape(-1), y).backward()
        optimizer.step()
    return model


# --- FedSGD


@pytest.mark.parametrize("alpha", [0.1, 1.0])
def test_fedsgd_steps_along_the_gradient_of_all_rows_together(alpha):
    world = World(fedsgd(rounds=3, learning_rate=alpha, model={"kind": "mlp", "hidden": [4]}))
    reference = build_model(world.study, len(FEATURES))
    for _ in range(3):
        step = alpha * pooled_gradient(reference, world.data.values())
        torch.nn.utils.vector_to_parameters(torch.tensor(parameters(reference) - step).float(), reference.parameters())
    world.run()
    moved = parameters(world.model)
    assert np.abs(moved - parameters(build_model(world.study, len(FEATURES)))).max() > 100 * ACCURACY
    np.testing.assert_allclose(moved, parameters(reference), rtol=0, atol=3 * ACCURACY)


def test_fedsgd_pooled_is_the_gradient_of_the_concatenated_rows():
    world = World(fedsgd())
    x = torch.tensor(np.concatenate([d.train_x for d in world.data.values()]))
    y = torch.tensor(np.concatenate([d.train_y for d in world.data.values()]))
    model = build_model(world.study, len(FEATURES))
    torch.nn.functional.binary_cross_entropy_with_logits(model(x).reshape(-1), y).backward()
    direct = torch.cat([p.grad.reshape(-1) for p in model.parameters()]).numpy()
    before = parameters(world.model)
    world.run()
    np.testing.assert_allclose(parameters(world.model), before - 0.5 * direct, rtol=0, atol=ACCURACY)


def test_uniform_weighting_counts_every_site_once():
    world = World(fedsgd(training={"weighting": "uniform"}))
    before = parameters(world.model)
    step = 0.5 * pooled_gradient(world.model, world.data.values(), dict.fromkeys(SITES, 1))
    unequal = 0.5 * pooled_gradient(world.model, world.data.values())
    world.run()
    assert world.rounds[0].weight == 4
    np.testing.assert_allclose(parameters(world.model), before - step, rtol=0, atol=2.0**-16)
    assert np.abs(parameters(world.model) - (before - unequal)).max() > 1e-3


# --- FedAvg


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_fedavg_at_rate_one_is_the_weighted_mean_of_the_locally_trained_models(momentum):
    world = World(study(training={"local_steps": 3, "batch_size": 100, "learning_rate": 0.5, "momentum": momentum}))
    trained = [
        (data.train_rows, parameters(local_sgd(build_model(world.study, 3), data, steps=3, lr=0.5, momentum=momentum)))
        for data in world.data.values()
    ]
    expected = sum(rows * values for rows, values in trained) / sum(rows for rows, _ in trained)
    world.run()
    assert world.rounds[0].weight == sum(rows for rows, _ in trained)
    np.testing.assert_allclose(parameters(world.model), expected, rtol=0, atol=ACCURACY)


def test_an_epoch_is_as_many_steps_as_cover_every_row():
    data = hospital("ash", rows=10)
    training = Training(local_epochs=3, batch_size=4, learning_rate=0.1)
    update = local_update(build_model(study(), 3), data, training, CPU, seed=(0,), steps_done=0)
    assert update.steps == 3 * math.ceil(10 / 4)
    assert update.weight == 10


def test_two_rounds_of_mini_batches_are_one_of_twice_as_many():
    data, start = hospital("ash", rows=10), build_model(study(), 3)
    for k in (1, 2, 5, 7):  # three steps are an epoch: within one, across one, over several
        training = Training(local_steps=k, batch_size=4, learning_rate=0.3)
        twice, once = build_model(study(), 3), build_model(study(), 3)
        for done in (0, k):
            local_update(twice, data, training, CPU, seed=(7, 1), steps_done=done)
        whole = msgspec.structs.replace(training, local_steps=2 * k)
        update = local_update(once, data, whole, CPU, seed=(7, 1), steps_done=0)
        assert flatten(once).tobytes() == flatten(twice).tobytes()
        np.testing.assert_array_equal(update.values, flatten(once) - flatten(start))


def test_every_epoch_meets_every_row_once_and_shuffles_anew():
    met = []

    class Recorder(torch.nn.Linear):
        def forward(self, x):
            met.append(x[:, 0].tolist())
            return super().forward(x)

    data = hospital("ash", rows=10)
    local_update(Recorder(3, 1), data, Training(local_epochs=2, batch_size=4), CPU, seed=(0,), steps_done=0)
    epochs = [list(itertools.chain(*part)) for part in (met[:3], met[3:])]
    for epoch in epochs:
        assert sorted(epoch) == sorted(data.train_x[:, 0].tolist())
    assert epochs[0] != epochs[1]
    assert [len(batch) for batch in met] == [4, 4, 2] * 2


def test_the_order_of_mini_batches_goes_on_over_rounds_and_differs_between_sites(monkeypatch):
    calls = []

    def spy(model, data, training, device, *, seed, steps_done):
        calls.append((data.site, seed, steps_done))
        return local_update(model, data, training, device, seed=seed, steps_done=steps_done)

    monkeypatch.setattr(site_module, "local_update", spy)
    World(study(rounds=3, seed=5)).run()
    assert [done for name, _, done in calls if name == "birch"] == [0, 2, 4]
    assert len({seed for _, seed, _ in calls}) == len(SITES)
    assert all(seed[0] == 5 for _, seed, _ in calls)


# --- the server's optimiser


@pytest.mark.parametrize(
    ("name", "options"),
    [("SGD", {}), ("SGD", {"momentum": 0.9}), ("Adam", {"betas": (0.8, 0.9), "eps": 0.01}), ("Adagrad", {})],
)
def test_the_server_steps_as_torchs_optimiser_on_the_negative_mean_and_keeps_its_state(name, options):
    model, reference = torch.nn.Linear(3, 1), torch.nn.Linear(3, 1)
    reference.load_state_dict(model.state_dict())
    server = ServerOptimizer(model, Server(optimizer=name, learning_rate=0.2, options=options))
    theirs = getattr(torch.optim, name)(reference.parameters(), lr=0.2, **options)
    rng = np.random.default_rng(1)
    for _ in range(4):
        mean = rng.normal(size=4)
        server.step(mean)
        reference.weight.grad = -torch.tensor(mean[:3]).float().reshape(1, 3)
        reference.bias.grad = -torch.tensor(mean[3:]).float()
        theirs.step()
        assert flatten(model).tobytes() == flatten(reference).tobytes()


@pytest.mark.parametrize(("name", "options"), [("SGD", {"momentum": 0.9}), ("Adam", {"betas": [0.5, 0.9], "eps": 0.1})])
def test_the_servers_optimiser_keeps_its_state_through_a_study(name, options):
    server = {"optimizer": name, "options": options}
    world = World(fedsgd(rounds=3, learning_rate=0.2, server={"learning_rate": 0.2, **server}))
    reference = build_model(world.study, 3)
    theirs = getattr(torch.optim, name)(reference.parameters(), lr=0.2, **options)
    for _ in range(3):
        gradient = torch.tensor(pooled_gradient(reference, world.data.values())).float()
        reference.weight.grad, reference.bias.grad = gradient[:3].reshape(1, 3), gradient[3:]
        theirs.step()
    world.run()
    np.testing.assert_allclose(parameters(world.model), parameters(reference), rtol=0, atol=20 * ACCURACY)


def test_a_lost_round_leaves_the_servers_optimiser_as_it_was():
    model = torch.nn.Linear(3, 1)
    server = ServerOptimizer(model, Server(optimizer="SGD", learning_rate=1.0, options={"momentum": 0.9}))
    server.step(np.ones(4))
    before = flatten(model)
    for wrong in (np.ones(3), np.ones(5), np.ones((4, 1)), np.array([1, np.nan, 0, 0]), np.array([0, 0, 0, np.inf])):
        with pytest.raises(LocalProtocolError, match="finite mean update of shape"):
            server.step(wrong)
        np.testing.assert_array_equal(flatten(model), before)
    server.step(np.zeros(4))
    np.testing.assert_allclose(flatten(model) - before, 0.9, atol=1e-6)


@pytest.mark.parametrize("name", ["Adm", "Optimizer", "LBFGS", "lr_scheduler", "__doc__"])
def test_an_optimiser_that_torch_does_not_have_is_named(name):
    with pytest.raises(StudyError, match=r"^server\.optimizer: expected .* got '" + name) as caught:
        ServerOptimizer(torch.nn.Linear(1, 1), Server(optimizer=name))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("options", [{"beta": 0.5}, {"betas": (2.0, 0.9)}])
def test_options_that_the_optimiser_does_not_take_are_named(options):
    with pytest.raises(StudyError, match=r"^server\.options: Adam does not take"):
        ServerOptimizer(torch.nn.Linear(1, 1), Server(optimizer="Adam", options=options))


@pytest.mark.parametrize("name", ["SparseAdam", "Muon"])
def test_an_optimiser_that_cannot_step_this_model_is_refused_before_any_training(name):
    try:
        server = ServerOptimizer(torch.nn.Linear(2, 1), Server(optimizer=name))
    except StudyError:
        return
    server.step(np.ones(3))


# --- models


def test_the_initial_model_depends_on_the_studys_seed_and_on_nothing_else():
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    first = flatten(build_model(study(seed=3), 3))
    assert torch.rand(3).tolist() == expected.tolist()  # torch's own generator was left alone
    torch.manual_seed(2)
    np.testing.assert_array_equal(flatten(build_model(study(seed=3), 3)), first)
    assert (flatten(build_model(study(seed=4), 3)) != first).any()


def test_building_models_leaves_no_calls_behind_for_devices_that_are_not_up():
    if torch.cuda.is_initialized():
        pytest.skip("calls wait only while CUDA is not up")
    before = len(torch.cuda._queued_calls)
    build_model(study(), 3)
    assert len(torch.cuda._queued_calls) == before


def test_entries_are_counted_as_they_are_laid_out():
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 1))
    model[0].bias.requires_grad_(False)
    assert entry_count(model) == flatten(model).size == 12 + 4 + 4 + 4 + 4 + 4 + 1


def test_an_mlp_is_as_wide_as_told():
    model = build_model(study(model={"kind": "mlp", "hidden": [5, 2]}), 3)
    assert [tuple(p.shape) for p in model.parameters()] == [(5, 3), (5,), (2, 5), (2,), (1, 2), (1,)]


@pytest.mark.parametrize(
    ("factory", "says"),
    [
        ("no.such.module:make", "cannot be imported"),
        ("tests.protocols.hospitals:missing", "cannot be imported"),
        ("builtins:str", "expected a torch.nn.Module from builtins:str, got str"),
    ],
)
def test_a_factory_that_gives_no_model_is_named_in_one_line(factory, says):
    with pytest.raises(StudyError, match=says) as caught:
        build_model(study(model={"kind": "factory", "factory": factory}), 3)
    assert str(caught.value).startswith("model.factory: ")
    assert "\n" not in str(caught.value)


def test_a_factory_that_takes_other_arguments_is_named():
    with pytest.raises(StudyError, match=r"^model\.factory"):
        build_model(study(model={"kind": "factory", "factory": "tests.protocols.hospitals:pooled_gradient"}), 3)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_cuda_where_there_is_none_is_refused():
    with pytest.raises(StudyError, match=r'^device: expected "cpu" or "auto".*got "cuda"'):
        training_device("cuda")
    assert training_device("auto") == training_device("cpu") == CPU


def test_a_model_comes_back_from_its_bytes():
    model, other = build_model(study(seed=1), 3), build_model(study(seed=2), 3)
    load_model_bytes(other, model_bytes(model))
    assert model_bytes(other) == model_bytes(model)


def test_a_model_of_other_names_shapes_or_dtypes_is_refused_and_changes_nothing():
    model = build_model(study(), 3)
    before, state = model_bytes(model), model.state_dict()
    wrong = [
        {"weight": state["weight"]},
        {**state, "extra": torch.zeros(1)},
        {**state, "bias": torch.zeros(2)},
        {**state, "bias": state["bias"].double()},
    ]
    for tensors in wrong:
        with pytest.raises(DecodeError, match=r"tensor (bias|extra) of the model: expected"):
            load_model_bytes(model, safetensors.torch.save(tensors))
        assert model_bytes(model) == before


def header(text, tail=b""):
    return len(text).to_bytes(8, "little") + text + tail


@settings(max_examples=60, deadline=None)
@given(st.one_of(st.binary(max_size=60), st.text(max_size=40).map(lambda text: header(text.encode()))))
def test_whatever_bytes_come_as_a_model_the_error_is_one_of_ours(data):
    with pytest.raises(DecodeError):
        load_model_bytes(torch.nn.Linear(3, 1), data)


@pytest.mark.parametrize(
    "dtype", ["F16", "BF16", "F64", "BOOL", "I64", "U16", "C64", "F8_E4M3", "F8_E8M0", "F4", "F6_E2M3"]
)
def test_a_model_in_a_format_that_torch_may_not_know_is_refused_as_one_of_ours(dtype):
    for shape in ("[1,3]", "[3]", "[4]", "[0]", "[]", "[16]"):
        for size in range(65):
            text = f'{{"weight":{{"dtype":"{dtype}","shape":{shape},"data_offsets":[0,{size}]}}}}'
            with pytest.raises(DecodeError):
                load_model_bytes(torch.nn.Linear(3, 1), header(text.encode(), bytes(size)))


def test_evaluation_judges_probabilities_on_the_test_rows():
    data = hospital("ash")
    model = torch.nn.Linear(3, 1)
    torch.nn.init.zeros_(model.weight)
    torch.nn.init.constant_(model.bias, 1.0)
    metrics = evaluate(model, data, CPU)
    assert metrics.rows == data.test_rows
    assert metrics.accuracy == pytest.approx(data.test_y.mean())
    assert metrics.log_loss == pytest.approx(
        np.mean([math.log1p(math.exp(-1.0)) + (1.0 - y) for y in data.test_y]), abs=1e-6
    )


# --- buffers


def test_a_model_with_buffers_is_refused_by_default():
    with pytest.raises(StudyError, match=r"^model\.buffers: .*1\.running_mean.*GroupNorm") as caught:
        build_model(study(model=NORMED), 3)
    assert "\n" not in str(caught.value)


def test_a_model_with_buffers_is_refused_under_differential_privacy_even_where_asked_to_average():
    with pytest.raises(StudyError, match=r"^model\.buffers: expected \"refuse\""):
        study(model={**NORMED, "buffers": "average"}, privacy=PRIVATE)
    with pytest.raises(StudyError, match=r"^model\.buffers"):
        World(study(model=NORMED, privacy=PRIVATE))


def test_averaged_buffers_are_the_weighted_mean_of_the_sites():
    averaging = study(
        model={**NORMED, "buffers": "average"}, training={"local_steps": 2, "batch_size": 100, "learning_rate": 0.1}
    )
    world = World(averaging)
    trained = [
        (data.train_rows, local_sgd(build_model(averaging, 3).train(), data, steps=2, lr=0.1))
        for data in world.data.values()
    ]
    total = sum(rows for rows, _ in trained)
    world.run()
    assert parameter_count(world.model) == 8 + 4 + 3
    assert flatten(world.model).size == parameter_count(world.model) + 4
    for name in ("running_mean", "running_var"):
        expected = sum(rows * getattr(model[1], name) for rows, model in trained) / total
        ours = getattr(world.model[1], name)
        assert (ours - getattr(build_model(averaging, 3)[1], name)).abs().max() > 0.01
        np.testing.assert_allclose(ours.numpy(), expected.numpy(), rtol=0, atol=ACCURACY)
    expected = sum(rows * parameters(model) for rows, model in trained) / total
    np.testing.assert_allclose(parameters(world.model), expected, rtol=0, atol=ACCURACY)


def test_fedsgd_leaves_buffers_alone():
    model = build_model(study(model={**NORMED, "buffers": "average"}), 3)
    update = gradient_update(model, hospital("ash"), CPU)
    assert update.values.size == flatten(model).size
    assert not update.values[parameter_count(model) :].any()
    assert update.values[: parameter_count(model)].any()


# --- differential privacy


def test_private_fedsgd_with_wide_clipping_and_hardly_any_noise_is_fedsgd():
    privacy = {**PRIVATE, "sampling_rate": 1.0, "noise_multiplier": 1e-9, "l2_clip_norm": 100.0}
    private, plain = fedsgd(privacy=privacy), fedsgd()
    data, entropy = hospital("ash"), deterministic_entropy(b"noise")
    update = private_update(build_model(private, 3), data, private, local_plan(private), entropy)
    expected = gradient_update(build_model(plain, 3), data, CPU)
    np.testing.assert_allclose(update.values, expected.values, rtol=0, atol=1e-6)
    assert (update.weight, update.steps) == (expected.weight, 1)


def test_the_private_plan_is_the_studys():
    plan = local_plan(
        study(
            privacy={**PRIVATE, "l2_clip_norm": 0.7, "sampling_rate": 0.2, "noise_multiplier": 2.5},
            training={"local_steps": 5, "learning_rate": 0.3, "momentum": 0.1},
        )
    )
    assert (plan.sampling_rate, plan.steps, plan.noise_multiplier, plan.l2_clip_norm) == (0.2, 5, 2.5, 0.7)
    assert (plan.learning_rate, plan.momentum) == (0.3, 0.1)


def test_a_private_update_is_noisy_from_the_sites_own_entropy():
    made = study(privacy=PRIVATE)
    updates = [
        private_update(
            build_model(made, 3), hospital("ash"), made, local_plan(made), deterministic_entropy(seed)
        ).values
        for seed in (b"one", b"one", b"two")
    ]
    np.testing.assert_array_equal(updates[0], updates[1])
    assert (updates[0] != updates[2]).all()

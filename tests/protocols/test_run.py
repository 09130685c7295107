"""A whole study on one machine: repeatable to the bit, with its baselines, and with its drop-outs."""

import struct
import warnings

import msgspec
import numpy as np
import pytest

from dp import Spent
from protocols.aggregation import Unprotected
from protocols.datasets import SiteData
from protocols.engines.faulty import Fault
from protocols.errors import DataError, StudyError
from protocols.fedavg import build_model, model_bytes
from protocols.run import load_data, run_study
from secagg.errors import SecAggError
from secagg.prg import deterministic_entropy
from tests.protocols.hospitals import (
    FEATURES,
    PRIVATE,
    SITES,
    STAGES,
    fedsgd,
    hospital,
    hospitals,
    parameters,
    pooled_gradient,
    study,
    write_csv,
)


def outcome(run):
    """All of a run that is no time, as bytes to compare."""
    rounds = [msgspec.to_builtins(record) for record in run.rounds]
    for record in rounds:
        for stage in record["stages"]:
            del stage["seconds"]
    return model_bytes(run.model), msgspec.json.encode((rounds, run.per_round, run.sites, run.stopped))


# --- the same bits


@pytest.mark.parametrize(
    "changes",
    [{}, {"task": {"standardize": "global"}}, {"privacy": PRIVATE}, {"protocol": {"mode": "semi-honest"}}],
    ids=["masked", "standardised", "private", "semi-honest"],
)
def test_a_run_with_the_same_entropy_is_the_same_to_the_bit(changes):
    made = study(rounds=2, **changes)
    fault = (Fault("birch", "MaskedInput", 1),)
    one, two, other = (
        run_study(made, hospitals(), faults=fault, entropy=deterministic_entropy(seed)) for seed in (b"a", b"a", b"b")
    )
    assert outcome(one) == outcome(two)
    assert one.roster == two.roster
    assert model_bytes(other.model) != model_bytes(one.model)
    assert other.roster != one.roster


def test_without_a_seed_every_run_has_keys_of_its_own():
    assert run_study(fedsgd(), hospitals()).roster != run_study(fedsgd(), hospitals()).roster


def test_masked_and_plain_differ_by_rounding_only():
    masked = run_study(fedsgd(rounds=2), hospitals())
    with pytest.warns(Unprotected):
        plain = run_study(fedsgd(rounds=2, protocol={"aggregation": "plain"}), hospitals())
    np.testing.assert_allclose(parameters(masked.model), parameters(plain.model), rtol=0, atol=2 * 4 * 2.0**-16 / 50)


def test_updates_on_the_grid_make_masked_and_plain_equal_to_the_bit():
    """Without anything to round, the masks leave no trace at all."""
    data = {}
    for name in SITES:
        x = np.array([[1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 1]], np.float32)
        data[name] = SiteData(name, FEATURES, x, [0, 1, 0, 1], x, [0, 1, 0, 1])
    zero = {"kind": "factory", "factory": "tests.protocols.test_run:zeros"}
    masked = run_study(fedsgd(model=zero), data)
    with pytest.warns(Unprotected):
        plain = run_study(fedsgd(model=zero, protocol={"aggregation": "plain"}), data)
    assert model_bytes(masked.model) == model_bytes(plain.model)
    assert parameters(masked.model).any()


def zeros(features):
    """A factory: at zero, gradients of these rows are multiples of an eighth."""
    model = build_model(study(), features)
    for p in model.parameters():
        p.data.zero_()
    return model


# --- what a run says


def test_a_run_tells_what_happened_at_every_site():
    seen = []
    run = run_study(fedsgd(rounds=2), hospitals(), listener=lambda c: seen.append((c.stage, len(c.rounds))))
    assert [s.stage for record in run.rounds for s in record.stages] == [*STAGES, *STAGES[2:], "Finish"]
    assert len(seen) == 9
    assert run.features == FEATURES
    assert set(run.sites) == set(SITES)
    assert set(run.per_round) == {0, 1}
    for name, result in run.sites.items():
        assert (result.train_rows, result.test_rows) == (hospitals()[name].train_rows, 6)
        assert result.federated.rows == 6
        assert (result.spent, result.local, result.pooled, result.without_privacy) == (None,) * 4
        assert result.log == ()
    assert run.stopped is None
    assert run.seconds > 0
    assert run.cpu_seconds > 0


def test_the_metrics_of_a_round_are_those_of_the_model_it_started_from():
    run = run_study(fedsgd(rounds=2), hospitals())
    first = run_study(fedsgd(rounds=1), hospitals())
    for name in SITES:
        assert run.per_round[0][name] == first.per_round[0][name]
        assert run.per_round[1][name].log_loss == pytest.approx(first.sites[name].federated.log_loss, abs=1e-4)
        assert run.per_round[1][name].log_loss != run.per_round[0][name].log_loss


def test_a_private_run_tells_what_each_site_has_spent():
    run = run_study(study(privacy=PRIVATE), hospitals(), faults=(Fault("birch", "AdvertiseKeys"),))
    assert all(isinstance(result.spent, Spent) for result in run.sites.values())
    assert run.sites["birch"].spent.epsilon == 0.0
    assert run.sites["ash"].spent.epsilon > 0.0


def test_a_site_without_an_answer_to_the_finish_still_has_its_figures():
    run = run_study(fedsgd(), hospitals(), faults=(Fault("birch", "Finish"),))
    assert run.sites["birch"].federated is None
    assert run.sites["ash"].federated is not None


# --- baselines


def test_baselines_are_the_local_and_the_pooled_model():
    data = hospitals()
    run = run_study(fedsgd(), data, baselines=True)
    start = build_model(fedsgd(), 3)
    pooled = parameters(start) - 0.5 * pooled_gradient(start, data.values())
    for name, result in run.sites.items():
        alone = parameters(start) - 0.5 * pooled_gradient(start, [data[name]])
        assert result.pooled.log_loss == pytest.approx(loss(pooled, data[name]), abs=1e-5)
        assert result.local.log_loss == pytest.approx(loss(alone, data[name]), abs=1e-5)
        assert result.without_privacy is None
        assert result.federated.log_loss == pytest.approx(result.pooled.log_loss, abs=1e-4)


def loss(theta, data):
    logits = data.test_x @ theta[:3] + theta[3]
    return np.mean(np.logaddexp(0.0, logits) - data.test_y * logits)


def test_a_private_study_is_compared_with_itself_without_noise():
    run = run_study(study(privacy=PRIVATE), hospitals(), baselines=True)
    for result in run.sites.values():
        assert result.without_privacy is not None
        assert result.local is not None


def test_baselines_train_as_long_as_the_study(monkeypatch):
    from protocols import run as run_module

    steps = []
    real = run_module.local_update

    def spy(model, data, training, *args, **kwargs):
        steps.append((data.site, training.local_steps))
        return real(model, data, training, *args, **kwargs)

    monkeypatch.setattr(run_module, "local_update", spy)
    run_study(study(rounds=3), hospitals(), baselines=True)
    assert sorted(steps) == sorted([(name, 6) for name in SITES] + [("pooled", 6)])


@pytest.mark.parametrize("stages", [["AdvertiseKeys", "Finish"], ["MaskedInput", "Finish"]])
def test_a_site_that_the_standard_never_reached_does_not_cost_the_others_their_run(stages):
    made = study(task={"standardize": "global"})
    run = run_study(made, hospitals(), faults=tuple(Fault("birch", s) for s in stages), baselines=True)
    assert run.sites["ash"].federated is not None


def test_a_study_that_was_stopped_trains_no_baselines():
    made = study(protocol={"max_failed_rounds": 1})
    run = run_study(made, hospitals(), faults=tuple(Fault(n, "ShareKeys") for n in SITES), baselines=True)
    assert run.stopped is not None
    assert run.sites["ash"].local is None


def test_baselines_that_diverge_do_not_cost_the_study_its_model():
    """The private model is held by clipping; the same rate without it runs away."""
    model = {"kind": "factory", "factory": "tests.protocols.test_run:quartic"}
    made = study(
        rounds=1,
        model=model,
        privacy={**PRIVATE, "l2_clip_norm": 1e-3, "noise_multiplier": 1e-3},
        training={"local_steps": 3, "learning_rate": 50.0},
    )
    data = {name: hospital(name, scale=30.0) for name in SITES}
    assert run_study(made, data).rounds[0].outcome == "opened"
    run = run_study(made, data, baselines=True)
    assert run.sites["ash"].federated is not None


def quartic(features):
    """A factory: a model that runs away at a large rate."""
    import torch

    class Quartic(torch.nn.Linear):
        def forward(self, x):
            return super().forward(x) ** 4

    return Quartic(features, 1)


# --- what cannot be run


def test_a_drop_out_of_nobody_is_refused():
    with pytest.raises(StudyError, match=r"'elm'.*ash, birch, cedar, dogwood"):
        run_study(fedsgd(), hospitals(), faults=(Fault("elm", "ShareKeys"),))


@pytest.mark.parametrize("fault", [Fault("ash", "Unmsk"), Fault("ash", "Submit")])
def test_a_drop_out_that_can_never_happen_is_refused(fault):
    with pytest.raises(StudyError):
        run_study(fedsgd(), hospitals(), faults=(fault,))


def test_sites_with_different_columns_are_refused():
    data = hospitals()
    one = data["birch"]
    data["birch"] = SiteData("birch", ("age", "dose", "weight"), one.train_x, one.train_y, one.test_x, one.test_y)
    with pytest.raises(DataError, match="columns differ"):
        run_study(fedsgd(), data)


@pytest.mark.parametrize("missing", [["birch"], list(SITES)])
def test_a_site_without_data_is_named(missing):
    data = {name: one for name, one in hospitals().items() if name not in missing}
    with pytest.raises(SecAggError, match=missing[0]):
        run_study(fedsgd(), data)


def test_a_site_without_a_path_is_named_by_its_place_in_the_file():
    with pytest.raises(StudyError, match=r"^sites\[0\]\.data: expected the path of ash's file"):
        load_data(study())


def test_a_small_model_trains_on_one_thread_and_torchs_threads_are_given_back():
    import torch

    before, during = torch.get_num_threads(), []
    torch.set_num_threads(2)
    try:
        run_study(fedsgd(), hospitals(), listener=lambda _: during.append(torch.get_num_threads()))
        assert torch.get_num_threads() == 2
        with pytest.raises(DataError):
            run_study(fedsgd(protocol={"max_weight": 1}), hospitals())
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert set(during) == {1}


# --- files, end to end


def test_a_study_of_csv_files_with_drop_outs_end_to_end(tmp_path):
    for name in SITES:
        write_csv(tmp_path / f"{name}.csv", hospital(name, rows=30))
    entries = [{"name": name, "data": f"{name}.csv"} for name in SITES]
    made = study(entries, rounds=7, task={"standardize": "global", "test_fraction": 0.25})
    data = load_data(made, tmp_path)
    assert {name: (d.train_rows, d.test_rows) for name, d in data.items()} == dict.fromkeys(SITES, (27, 9))
    assert list(data) == list(made.site_names)
    faults = (
        Fault("birch", "MaskedInput", 1),
        Fault("cedar", "ShareKeys", 4, "lost-reply"),
        Fault("ash", "Unmask", 5),
        Fault("dogwood", "Unmask", 5),
        Fault("ash", "ShareKeys", 7),
        Fault("dogwood", "ShareKeys", 7),
    )
    run = run_study(made, data, faults=faults, baselines=True)
    told = [
        (r.number, r.purpose, r.outcome, [name for name in SITES if name not in r.contributors]) for r in run.rounds
    ]
    assert told == [
        (0, "standardize", "opened", []),
        (1, "train", "opened", ["birch"]),
        (2, "train", "opened", ["birch"]),  # it has no keys for this one
        (3, "train", "opened", []),  # cedar does not confirm it, and its keys for the next are lost
        (4, "train", "opened", ["cedar"]),
        (5, "train", "failed", list(SITES)),
        (6, "train", "failed", list(SITES)),  # keys for the next were lost with two confirmations of this one
        (8, "train", "opened", []),
        (9, "finish", "opened", list(SITES)),
    ]
    assert all(site.federated.rows == 9 and site.local and site.pooled for site in run.sites.values())


def test_a_float_is_what_it_was_in_the_file(tmp_path):
    data = hospital("ash", rows=10)
    write_csv(tmp_path / "ash.csv", data)
    read = load_data(
        study([{"name": n, "data": "ash.csv"} for n in SITES]),
        tmp_path,
    )["cedar"]
    assert read.site == "cedar"
    rows = {struct.pack("<3f", *row) for row in np.concatenate([read.train_x, read.test_x])}
    assert rows == {
        struct.pack("<3f", *(float(f"{v:.6f}") for v in row)) for row in np.concatenate([data.train_x, data.test_x])
    }


def test_a_masked_run_warns_of_nothing():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run_study(fedsgd(), hospitals())
    assert caught == []

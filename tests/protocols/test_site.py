"""A hospital against the coordinator: what it answers, what it refuses, what it charges and what it gives away."""

import hashlib
import logging
import os

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dp import BudgetExceeded, DpError
from protocols import site as site_module
from protocols.datasets import SiteData
from protocols.errors import DataError, StudyError
from protocols.fedavg import build_model, model_bytes
from protocols.memory import Memory
from protocols.messages import Answer, FinishRequest, KeysRequest, Refusal, Reply, Request, SumRequest, Work
from protocols.participant import reason_of
from protocols.site import Site
from secagg.errors import DecodeError, LocalProtocolError
from secagg.keys import Identity
from secagg.masking.transcript import NO_RECORD
from secagg.prg import deterministic_entropy
from secagg.wire import decode, encode
from tests.protocols.hospitals import (
    FEATURES,
    PRIVATE,
    SITES,
    STAGES,
    World,
    changed,
    fedsgd,
    hospital,
    hospitals,
    part_at,
    study,
    with_work,
)

REASONS = ("budget", "data", "policy", "protocol")


def refused(reason, part="sum"):
    """A reply whose only part is a refusal."""
    return encode(Reply(**{part: Refusal(reason)}))


def finish(work):
    return encode(Request(finish=FinishRequest(work, NO_RECORD)))


def memory(world, name="birch"):
    state = world.states[name]
    return decode(state, Memory) if state else Memory()


def told(reply):
    """The parts of a reply that are there."""
    message = decode(reply, Reply)
    return [part for part in (message.sum, message.keys, message.finish) if part is not None]


def answered(reply):
    return bool(told(reply)) and all(isinstance(part, Answer) for part in told(reply))


def early(world, stage, number=0, body=b""):
    """A request for a stage of the sum, as if the keys for it were agreed."""
    work = world.coordinator._work
    digest = hashlib.sha256(work).digest()
    return encode(Request(sum=SumRequest(number, "train", stage, digest, NO_RECORD, body, work)))


# --- retries, order and replay


@pytest.mark.parametrize("stage", STAGES)
def test_a_retry_of_the_identical_request_gives_identical_bytes_and_changes_nothing(stage):
    world = World(study())
    request = world.until(stage)["birch"]
    reply = world.ask("birch", request)
    state = world.states["birch"]
    assert answered(reply)
    for _ in range(2):
        assert world.ask("birch", request) == reply
        assert world.states["birch"] == state


def test_a_retry_after_the_process_was_lost_gives_identical_bytes():
    world = World(study())
    request = world.until("MaskedInput")["birch"]
    reply = world.ask("birch", request)
    world.restart("birch")
    assert world.ask("birch", request) == reply


def test_a_retry_trains_once_evaluates_once_and_charges_once():
    world = World(study(privacy=PRIVATE))
    request = world.until("MaskedInput")["birch"]
    for _ in range(3):
        world.ask("birch", request)
    assert len(world.sites["birch"].evaluations) == 1
    assert [m.steps for m in memory(world).mechanisms] == [2]
    assert memory(world).steps == 2


@pytest.mark.parametrize("stage", STAGES)
def test_a_second_different_request_for_a_stage_is_refused(stage):
    world, part = World(study()), part_at(stage)
    request = world.until(stage)["birch"]
    assert answered(world.ask("birch", request))
    body = getattr(decode(request, Request), part).body
    again = changed(request, part, body=body + b"\0")
    assert world.ask("birch", again) == refused("protocol", part)
    if stage == "ShareKeys":
        assert "stage ShareKeys came where the sum was due" in world.sites["birch"].log[-1]
    assert world.ask("birch", request) == refused("protocol", part)  # the site is out of this round for good


def test_after_the_last_stage_no_stage_of_the_round_is_answered_again():
    world = World(study(rounds=2))
    requests = {}
    for stage in STAGES:
        requests[stage] = world.until(stage)["birch"]
    world.stage()
    for stage in STAGES:
        reply = world.ask("birch", changed(requests[stage], part_at(stage), body=b"x"))
        assert told(reply)
        assert all(part == Refusal("protocol") for part in told(reply))


@pytest.mark.parametrize("stage", STAGES[1:])
def test_a_stage_before_its_turn_is_refused_and_begins_nothing(stage):
    world, part = World(study()), part_at(stage)
    first = world.until("AdvertiseKeys")["birch"]
    request = changed(first, "keys", stage=stage) if part == "keys" else early(world, stage)
    assert world.ask("birch", request) == refused("protocol", part)
    assert answered(world.ask("birch", first))  # nothing was begun: the round can still begin
    assert world.ask("birch", request) == refused("protocol", part)
    assert world.sites["birch"].evaluations == []


def test_a_skipped_stage_is_refused():
    world = World(study())
    request = world.until("ShareKeys")["birch"]
    assert world.ask("birch", early(world, "MaskedInput")) == refused("protocol")
    assert "round 0 begins, and no keys were agreed for it" in world.sites["birch"].log[-1]
    assert world.sites["birch"].evaluations == []
    assert answered(world.ask("birch", request))  # what was due was not skipped
    request = world.until("MaskedInput")["birch"]
    assert answered(world.ask("birch", request))
    assert world.ask("birch", early(world, "Unmask")) == refused("protocol")
    assert "stage Unmask came where ConsistencyCheck was due" in world.sites["birch"].log[-1]


def test_an_unknown_stage_is_refused():
    world = World(study())
    request = world.until("AdvertiseKeys")["birch"]
    assert world.ask("birch", changed(request, "keys", stage="Open")) == refused("protocol", "keys")
    assert world.ask("birch", early(world, "Open")) == refused("protocol")
    request = world.until("MaskedInput")["birch"]
    assert world.ask("birch", changed(request, "sum", stage="Open")) == refused("protocol")


def test_a_round_that_was_begun_is_not_begun_again():
    world = World(study(rounds=3))
    first = world.until("AdvertiseKeys")["birch"]
    world.until("ShareKeys")
    assert world.ask("birch", changed(first, "keys", body=b"x")) == refused("protocol", "keys")
    assert "round 0 comes after round 0" in world.sites["birch"].log[-1]


def test_an_older_round_is_refused_even_with_the_bytes_it_once_had():
    world = World(study(rounds=3))
    first = world.until("AdvertiseKeys")["birch"]
    world.until("AdvertiseKeys", number=2)
    world.until("ShareKeys", number=2)
    assert world.ask("birch", first) == refused("protocol", "keys")
    assert "round 0 comes after round 2" in world.sites["birch"].log[-1]


@pytest.mark.parametrize("stage", STAGES[3:])
@pytest.mark.parametrize(
    "changes", [{"round": 1}, {"purpose": "standardize"}, {"work_digest": bytes(32)}, {"previous": bytes(31) + b"x"}]
)
def test_a_round_that_goes_on_under_another_name_is_refused(stage, changes):
    world = World(study())
    request = world.until(stage)["birch"]
    assert world.ask("birch", changed(request, "sum", **changes)) == refused("protocol")
    assert "another number, purpose, model or past" in world.sites["birch"].log[-1]
    assert world.ask("birch", request) == refused("protocol")


def test_keys_that_go_on_under_another_number_are_refused():
    world = World(study())
    request = world.until("ShareKeys")["birch"]
    assert world.ask("birch", changed(request, "keys", round=1)) == refused("protocol", "keys")
    assert "keys of round 1 follow on those of round 0" in world.sites["birch"].log[-1]
    assert world.ask("birch", request) == refused("protocol", "keys")


OTHER = encode(Work(model_bytes(build_model(study(seed=9), 3))))


@pytest.mark.parametrize("work", [OTHER, None, b""])
def test_a_model_that_is_not_the_one_that_the_sum_is_said_to_be_about_is_refused(work):
    world = World(study())
    request = world.until("MaskedInput")["birch"]
    assert world.ask("birch", changed(request, "sum", work=work)) == refused("protocol")
    assert "not the one that the sum is said to be about" in world.sites["birch"].log[-1]
    assert world.sites["birch"].evaluations == []


def test_a_vector_for_another_model_than_the_others_got_says_so_and_is_in_no_sum():
    world = World(study())
    requests = world.until("MaskedInput")
    requests["birch"] = with_work(requests["birch"], OTHER)
    for name, reply in world.engine.exchange(requests):
        assert answered(reply)
        world.coordinator.receive(name, reply)
    record = world.rounds[0]
    assert record.dropped == {"birch": "sent a wrong message at MaskedInput"}
    theirs, ours = (hashlib.sha256(work).hexdigest()[:16] for work in (OTHER, world.coordinator._work))
    assert record.faults == [f"birch: birch did not sum what was asked for: model {theirs} where {ours} was expected"]
    world.coordinator.close_stage()
    assert world.run().rounds[0].contributors == ("ash", "cedar", "dogwood")


def test_a_study_without_global_standardisation_never_sums_moments():
    """The server may ask for anything; the site's study says that this was not agreed."""
    world = World(study())
    world.coordinator._purposes[0] = "standardize"
    world.coordinator.rounds.clear()
    world.coordinator._begin()
    assert world.ask("birch", world.until("MaskedInput")["birch"]) == refused("protocol")
    assert "sums of raw features, which the study does not have" in world.sites["birch"].log[-1]


def test_a_study_sums_no_metrics():
    """What an app of somebody else's may be asked, a study is not."""
    world = World(study())
    requests = world.until("MaskedInput")
    asked = decode(requests["birch"], Request)
    other = msgspec.structs.replace(asked, sum=msgspec.structs.replace(asked.sum, purpose="evaluate"))
    told = decode(world.ask("birch", encode(other)), Reply)
    assert told.sum == Refusal("protocol")
    assert world.sites["birch"].log[-1].endswith("sums of metrics, which a study does not have")


def test_a_private_site_gives_no_sum_that_it_does_not_charge():
    """Means of the raw features would leave without noise and outside the account."""
    world = World(study(privacy=PRIVATE))
    world.coordinator._purposes[0] = "standardize"
    world.coordinator.rounds.clear()
    world.coordinator._begin()
    world.run()
    opened = [record.purpose for record in world.rounds if record.outcome == "opened" and record.contributors]
    assert all(memory(world, name).mechanisms for name in SITES) or opened == []


@pytest.mark.parametrize("changes", [{}, {"privacy": PRIVATE}], ids=["open", "private"])
def test_a_site_trains_in_no_more_rounds_than_the_study_has(changes):
    world = World(study(rounds=1, **changes))
    world.coordinator._purposes[:0] = ["train", "train", "train"]
    world.run()
    assert memory(world).steps <= 1 * 2
    assert sum(m.steps for m in memory(world).mechanisms) <= 1 * 2


def test_raw_features_are_not_summed_once_training_has_begun():
    world = World(study(rounds=3, task={"standardize": "global"}))
    world.coordinator._purposes[2:2] = ["standardize"]
    world.run()
    assert [(r.purpose, r.outcome) for r in world.rounds][:3] == [
        ("standardize", "opened"),
        ("train", "opened"),
        ("standardize", "failed"),
    ]


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=80))
def test_garbage_is_refused_whatever_it_is(data):
    site = SHARED.sites["birch"]
    reply, state = site.handle(data, b"")
    assert reply == refused("protocol")
    assert site.handle(data, state) == (reply, state)


BODIES = st.binary(max_size=20)
DIGESTS = st.binary(min_size=32, max_size=32)
WORKS = st.binary(max_size=40) | st.builds(Work, st.binary(max_size=30)).map(encode)
NAMED = st.sampled_from([*STAGES, "Finish", "Submit", ""])
PURPOSES = st.sampled_from(["standardize", "train"])
NUMBERS = st.integers(0, 3)


@settings(max_examples=100, deadline=None)
@given(
    st.builds(
        Request,
        st.none() | st.builds(SumRequest, NUMBERS, PURPOSES, NAMED, DIGESTS, DIGESTS, BODIES, st.none() | WORKS),
        st.none() | st.builds(KeysRequest, NUMBERS, NAMED, BODIES),
        st.none() | st.builds(FinishRequest, WORKS, DIGESTS),
    )
)
def test_whatever_request_comes_each_part_of_it_gets_an_answer_or_a_refusal(request):
    for begun in (b"", BEGUN):
        reply, state = SHARED.sites["birch"].handle(encode(request), begun)
        message = decode(reply, Reply)
        for part in ("sum", "keys", "finish"):
            assert (getattr(request, part) is None) == (getattr(message, part) is None)
        decode(state, Memory)


SHARED = World(study())
BEGUN = SHARED.sites["birch"].handle(SHARED.coordinator.requests()["birch"], b"")[1]


@pytest.mark.parametrize("work", [b"", b"junk", encode(Work(b"")), encode(Work(b"junk"))])
def test_a_finish_without_a_model_is_refused(work):
    world = World(study())
    assert world.ask("birch", finish(work)) == refused("protocol", "finish")
    assert not memory(world).finished


def test_a_model_in_a_format_that_torch_does_not_know_is_refused():
    text = b'{"weight":{"dtype":"F8_E8M0","shape":[3],"data_offsets":[0,3]}}'
    work = encode(Work(len(text).to_bytes(8, "little") + text + bytes(3)))
    world = World(study())
    assert world.ask("birch", finish(work)) == refused("protocol", "finish")


def test_a_finish_in_the_middle_of_a_round_ends_the_round_too():
    world = World(study())
    request = world.until("ConsistencyCheck")["birch"]
    assert answered(world.ask("birch", finish(world.coordinator._work)))
    assert world.ask("birch", request) == refused("protocol")
    assert "the study is finished" in world.sites["birch"].log[-1]


# --- what is remembered


@pytest.mark.parametrize("stage", STAGES)
def test_the_state_is_bytes_from_which_the_round_goes_on_and_whose_repr_shows_nothing(stage):
    world = World(study(privacy=PRIVATE))
    request = world.until(stage)["birch"]
    remembered = memory(world)
    assert encode(remembered) == (world.states["birch"] or encode(Memory()))
    assert repr(remembered) == "Memory(...)"
    assert "Memory(...)" in repr([remembered])
    for name in SITES:
        world.restart(name)
    assert answered(world.ask("birch", request))


def test_a_state_that_is_not_a_state_raises_and_is_no_refusal():
    world = World(study(privacy=PRIVATE))
    request = world.coordinator.requests()["birch"]
    for state in (b"\x01", b"junk", b"\x01\x90", encode(Refusal("data"))):
        with pytest.raises(DecodeError):
            world.sites["birch"].handle(request, state)
        with pytest.raises(DecodeError):
            world.sites["birch"].spent(state)


@pytest.mark.parametrize("stage", [*STAGES, "Finish"])
def test_a_state_of_another_study_is_refused_whatever_it_is_asked(stage):
    """Else a study with a new budget would begin, or go on, with keys and charges that are another's."""
    world, other = World(study(privacy=PRIVATE)), World(study(privacy=PRIVATE, seed=1))
    while other.coordinator.stage != stage:
        other.stage()
    other.stage()
    request, state = world.coordinator.requests()["birch"], other.states["birch"]
    with pytest.raises(DecodeError, match="the state of birch is of another study") as caught:
        world.sites["birch"].handle(request, state)
    for made in (world.study, other.study):
        assert made.digest.hex()[:16] in str(caught.value)


def test_a_study_begins_on_a_state_that_has_not_been_used_and_on_no_other():
    world = World(study())
    world.sites["birch"].refuse_used(b"")
    world.sites["birch"].refuse_used(encode(Memory()))
    world.ask("birch", b"junk")
    world.sites["birch"].refuse_used(world.states["birch"])  # nothing was begun by that
    world.stage()
    for _ in range(2):
        with pytest.raises(
            StudyError, match=r"^the state of birch is of a study that has begun .*\(keys for round 0\)"
        ):
            world.sites["birch"].refuse_used(world.states["birch"])
        world.run()


def test_a_state_with_an_impossible_charge_is_no_state():
    good = World(study(privacy=PRIVATE))
    good.until("ConsistencyCheck")
    state = good.states["birch"]
    wrong = state.replace(msgspec.msgpack.encode(0.5), msgspec.msgpack.encode(2.0))
    assert wrong != state
    with pytest.raises(DecodeError):
        good.sites["birch"].spent(wrong)


def test_a_refusal_is_one_word_and_nothing_of_the_site_is_in_it():
    for reason in REASONS:
        assert len(encode(Refusal(reason))) < 24
    assert {field.name for field in msgspec.structs.fields(Refusal)} == {"reason"}


# --- the budget


def spend(rounds, epsilon, **privacy):
    return World(study(rounds=rounds, privacy={**PRIVATE, "epsilon": epsilon, **privacy}))


def test_a_round_is_charged_where_the_site_contributes_and_not_before():
    world = World(study(privacy=PRIVATE))
    request = world.until("MaskedInput")["birch"]
    assert memory(world).mechanisms == ()
    assert world.sites["birch"].spent(world.states["birch"]).epsilon == 0.0
    world.ask("birch", request)
    (charged,) = memory(world).mechanisms
    assert (charged.steps, charged.noise_multiplier, charged.sampling_rate) == (2, 1.0, 0.5)
    assert world.sites["birch"].spent(world.states["birch"]).epsilon > 0.0


def test_a_round_is_charged_before_training_even_if_training_then_fails(monkeypatch):
    def failing(*_):
        raise DpError("the loss of a record is not finite")

    monkeypatch.setattr(site_module, "private_update", failing)
    world = World(study(privacy=PRIVATE))
    request = world.until("MaskedInput")["birch"]
    assert world.ask("birch", request) == refused("data")
    assert [m.steps for m in memory(world).mechanisms] == [2]
    assert world.ask("birch", request) == refused("data")
    assert [m.steps for m in memory(world).mechanisms] == [2]


def test_charges_add_up_over_rounds_lost_ones_included():
    world = World(study(privacy=PRIVATE, rounds=3))
    world.until("MaskedInput", number=1)
    world.stage(lost=SITES)  # everyone has contributed, nothing arrived
    world.run()
    assert [record.outcome for record in world.rounds] == ["opened", "failed", "opened", "opened"]
    assert [m.steps for m in memory(world).mechanisms] == [6]


def test_a_round_that_the_site_never_contributed_to_costs_nothing():
    world = World(study(privacy=PRIVATE, rounds=2))
    for stage in STAGES[:2]:
        world.until(stage)
        world.stage(lost=SITES if stage == "ShareKeys" else ())
    assert memory(world).mechanisms == ()


def test_the_budget_stops_before_the_round_that_would_exceed_it():
    free = World(study(rounds=3, privacy=PRIVATE)).run()
    costs = [free.sites["birch"].spent(encode(Memory(mechanisms=(charge(2 * k),)))).epsilon for k in (1, 2, 3)]
    world = spend(3, (costs[1] + costs[2]) / 2).run()
    assert [r.outcome for r in world.rounds] == ["opened", "opened", "failed", "opened"]
    assert world.rounds[2].dropped == dict.fromkeys(SITES, "refused (budget) at AdvertiseKeys")
    for name in SITES:
        assert [m.steps for m in memory(world, name).mechanisms] == [4]  # nothing for the refused round
        assert world.sites[name].spent(world.states[name]).epsilon == pytest.approx(costs[1])
        assert any(f"{name}: the budget is epsilon" in line for line in world.sites[name].log)
    assert world.coordinator.stopped.startswith("the privacy budget of ash, birch, cedar, dogwood is spent")


def charge(steps):
    plan = World(study(privacy=PRIVATE)).sites["ash"]._plan
    return msgspec.structs.replace(plan.mechanism(), steps=steps)


def test_the_budget_is_checked_again_where_the_site_contributes():
    """A state from before the check, or a budget that was spent in between, does not slip through."""
    world = spend(2, 100.0)
    request = world.until("MaskedInput")["birch"]
    world.states["birch"] = encode(msgspec.structs.replace(memory(world), mechanisms=(charge(100_000),)))
    for part in told(world.ask("birch", request)):
        assert part == Refusal("budget")
    assert [m.steps for m in memory(world).mechanisms] == [100_000]
    assert world.sites["birch"].evaluations == []


def test_one_site_whose_budget_is_spent_leaves_and_the_others_go_on():
    world = spend(2, 100.0)
    world.states["birch"] = encode(Memory(mechanisms=(charge(100_000),)))
    world.run()
    assert [r.outcome for r in world.rounds] == ["opened"] * 3
    assert world.rounds[0].contributors == ("ash", "cedar", "dogwood")
    assert world.rounds[0].dropped == {"birch": "refused (budget) at AdvertiseKeys"}
    assert world.coordinator.stopped is None


def test_the_noise_that_is_calibrated_reaches_the_budget_in_the_studys_rounds():
    world = spend(2, 2.0, noise_multiplier=None).run()
    assert [r.outcome for r in world.rounds] == ["opened"] * 3
    cost = world.sites["birch"].spent(world.states["birch"])
    assert 1.9 < cost.epsilon <= 2.0
    assert (cost.delta, str(cost.relation)) == (1e-3, "add-or-remove-one")


def test_a_study_without_differential_privacy_has_no_account():
    world = World(study()).run()
    assert world.sites["birch"].spent(world.states["birch"]) is None


def test_a_plain_study_is_charged_and_stopped_as_well():
    world = World(study(privacy={**PRIVATE, "epsilon": 0.01}, protocol={"aggregation": "plain"})).run()
    assert memory(world).mechanisms == ()
    assert world.rounds[0].dropped == dict.fromkeys(SITES, "refused (budget) at Submit")


def test_a_spent_budget_is_told_by_its_error():
    assert issubclass(BudgetExceeded, DpError)
    assert reason_of(BudgetExceeded(1.0, 2.0, 1.5)) == "budget"


# --- its data


EXPLOSIVE = {"kind": "factory", "factory": "tests.protocols.hospitals:explosive"}


def test_an_update_that_is_nan_is_refused_for_its_data_and_only_the_log_says_where():
    world = World(study(model=EXPLOSIVE))
    request = world.until("MaskedInput")["birch"]
    assert world.ask("birch", request) == refused("data")
    (line,) = world.sites["birch"].log
    assert line.startswith("birch: ")
    assert "entry 0" in line
    assert "nan" in line


def test_a_model_that_diverges_at_the_site_is_refused_for_its_data():
    world = World(
        study(
            training={"local_steps": 10, "learning_rate": 3e38, "batch_size": 3, "momentum": 0.9},
            protocol={"max_update": 1.0},
        )
    )
    request = world.until("MaskedInput")["birch"]
    assert world.ask("birch", request) == refused("data")
    assert "birch" in world.sites["birch"].log[-1]
    assert "entry" in world.sites["birch"].log[-1]


def test_a_nan_under_differential_privacy_is_refused_and_charged():
    world = World(study(model=EXPLOSIVE, privacy=PRIVATE))
    request = world.until("MaskedInput")["birch"]
    assert world.ask("birch", request) == refused("data")
    assert [m.steps for m in memory(world).mechanisms] == [2]


def test_a_global_model_that_is_nan_is_refused():
    world = World(study())
    with_nan = build_model(study(), 3)
    with_nan.bias.data[:] = float("nan")
    work = encode(Work(model_bytes(with_nan)))
    assert world.ask("birch", finish(work)) == refused("data", "finish")
    assert "diverged" in world.sites["birch"].log[-1]


def test_an_error_of_torch_in_training_is_a_refusal_and_no_crash():
    world = World(study(model={"kind": "factory", "factory": "tests.protocols.hospitals:breaking"}))
    request = world.until("MaskedInput")["birch"]
    assert world.ask("birch", request) == refused("data")


def test_clipping_is_logged_with_the_site_and_how_much():
    world = World(fedsgd(protocol={"max_update": 0.001}))
    world.ask("birch", world.until("MaskedInput")["birch"])
    (line,) = world.sites["birch"].log
    assert line.startswith("birch: round 0: ")
    assert "4 of 4 entries were larger than 0.001 and were clipped" in line


def test_an_update_within_bounds_logs_nothing():
    world = World(fedsgd())
    world.ask("birch", world.until("MaskedInput")["birch"])
    assert world.sites["birch"].log == []


def test_more_rows_than_the_largest_weight_are_refused_at_once():
    exact = World(study(protocol={"max_weight": 17}))  # the largest site has 17
    assert exact.data["dogwood"].train_rows == 17
    with pytest.raises(DataError, match=r"^site dogwood: 17 training rows .* protocol\.max_weight = 16"):
        World(study(protocol={"max_weight": 16}))


@pytest.mark.parametrize("only", [0.0, 1.0])
def test_a_site_of_one_class_is_refused_at_once(only):
    data = hospitals()
    one = data["birch"]
    data["birch"] = SiteData(
        "birch", FEATURES, one.train_x, np.full_like(one.train_y, only), one.test_x, np.full_like(one.test_y, only)
    )
    with pytest.raises(DataError, match=f"^site birch: .*all 17 rows have class {int(only)}"):
        World(study(), data)


def test_one_class_in_the_training_rows_is_enough_where_the_test_rows_have_the_other():
    data = hospitals()
    one = data["birch"]
    data["birch"] = SiteData("birch", FEATURES, one.train_x, np.zeros_like(one.train_y), one.test_x, one.test_y)
    assert World(study(), data).run().rounds[0].contributors == SITES


def test_an_identity_or_a_name_that_is_not_on_the_roster_is_refused():
    world = World(study())
    with pytest.raises(LocalProtocolError, match="'elm' is not on the roster"):
        Site(world.study, "elm", world.identities["ash"], world.roster, world.data["ash"])
    stranger = Site(world.study, "ash", Identity.generate(deterministic_entropy(b"x")), world.roster, world.data["ash"])
    assert stranger.handle(world.coordinator.requests()["ash"], b"")[0] == refused("data", "keys")
    with pytest.raises(StudyError, match="the study has"):
        world.site("ash", study(SITES[:3]))


# --- standardisation


def badly_scaled():
    """Sites whose features differ much in place and spread, from the same roster."""
    data = {}
    for i, name in enumerate(SITES):
        one = hospital(name, rows=20 + i)
        place, spread = np.array([60.0 + i, -3.0, 1000.0]), np.array([12.0, 0.5, 250.0])
        data[name] = SiteData(
            name, FEATURES, place + spread * one.train_x, one.train_y, place + spread * one.test_x, one.test_y
        )
    return data


def test_the_global_standard_is_numpys_mean_and_deviation_of_all_rows_together():
    world = World(study(task={"standardize": "global"}, training={"learning_rate": 0.01}), badly_scaled()).run()
    rows = np.concatenate([data.train_x for data in world.data.values()]).astype(np.float64)
    assert world.rounds[0].purpose == "standardize"
    assert world.rounds[0].weight == len(rows)
    np.testing.assert_allclose(world.coordinator._mean, rows.mean(axis=0), rtol=0, atol=1e-5)
    np.testing.assert_allclose(world.coordinator._std, rows.std(axis=0, ddof=1), rtol=1e-4)
    together = np.concatenate([site.data.train_x for site in world.sites.values()])
    np.testing.assert_allclose(together.mean(axis=0), 0.0, atol=1e-4)
    np.testing.assert_allclose(together.std(axis=0, ddof=1), 1.0, rtol=1e-4)


def test_the_global_standard_leaves_out_a_site_that_dropped_out_and_serves_it_all_the_same():
    world = World(study(task={"standardize": "global"}, training={"learning_rate": 0.01}), badly_scaled())
    world.until("MaskedInput")
    world.stage(lost=("birch",))
    world.run()
    rows = np.concatenate([world.data[name].train_x for name in SITES if name != "birch"]).astype(np.float64)
    np.testing.assert_allclose(world.coordinator._mean, rows.mean(axis=0), rtol=0, atol=1e-5)
    expected = (world.data["birch"].train_x - rows.mean(axis=0)) / rows.std(axis=0, ddof=1)
    np.testing.assert_allclose(world.sites["birch"].data.train_x, expected, atol=1e-3)


@pytest.mark.parametrize(("place", "spread"), [(0.0, 1e-4), (4000.0, 0.1), (0.0, 1e-9), (0.0, 1e9), (1e6, 1.0)])
def test_the_global_standard_holds_for_features_in_any_unit(place, spread):
    data = {}
    for name in SITES:
        one = hospital(name, rows=20)
        data[name] = SiteData(
            name, FEATURES, place + spread * one.train_x, one.train_y, place + spread * one.test_x, one.test_y
        )
    world = World(study(task={"standardize": "global"}), data)
    world.until("MaskedInput", number=1)
    rows = np.concatenate([one.train_x for one in data.values()]).astype(np.float64)
    np.testing.assert_allclose(world.coordinator._std, rows.std(axis=0, ddof=1), rtol=1e-6)
    np.testing.assert_allclose(world.coordinator._mean, rows.mean(axis=0), rtol=1e-9, atol=1e-12 * spread)


@pytest.mark.parametrize("rows", [0.5, -60.0, -39.0, -38.0, 1e9])
def test_rows_that_no_honest_sites_can_have_make_no_standard(rows):
    """One site claims as many; together they are a fraction, less than two, or more than all may have."""
    world = World(study(task={"standardize": "global"}, protocol={"max_failed_rounds": 1}))
    honest = world.sites["birch"]._moments
    world.sites["birch"]._moments = lambda: [rows, *honest()[1:]]
    world.run()
    assert world.rounds[0].outcome == "failed"
    assert "rows add up to" in world.rounds[0].faults[0]
    assert world.coordinator._mean == world.coordinator._std == ()
    assert world.coordinator.stopped is not None


def test_a_feature_too_large_to_be_summed_is_refused_by_name_at_the_site_only():
    data = hospitals()
    one = data["birch"]
    x = np.array(one.train_x)
    x[3, 1] = 1e18
    data["birch"] = SiteData("birch", FEATURES, x, one.train_y, one.test_x, one.test_y)
    world = World(study(task={"standardize": "global"}), data)
    on_sum, on_keys = told(world.ask("birch", world.until("MaskedInput")["birch"]))
    assert on_sum == Refusal("data")
    assert isinstance(on_keys, Answer)  # for the sum to come there may be nothing wrong with them
    (line,) = world.sites["birch"].log
    assert line.startswith("birch: ")
    assert "'dose'" in line


def test_a_constant_feature_becomes_zero_and_not_nan():
    data = {}
    for name in SITES:
        one = hospital(name)
        x, test_x = np.array(one.train_x), np.array(one.test_x)
        x[:, 0] = test_x[:, 0] = 3.0
        data[name] = SiteData(name, FEATURES, x, one.train_y, test_x, one.test_y)
    world = World(study(task={"standardize": "global"}), data).run()
    assert abs(world.sites["ash"].data.train_x[:, 0]).max() < 0.01
    assert world.rounds[-1].outcome == "opened"


def test_before_the_global_standard_has_come_there_are_no_standardised_rows():
    world = World(study(task={"standardize": "global"}))
    with pytest.raises(LocalProtocolError, match="have not come yet"):
        _ = world.sites["ash"].data


def test_a_site_standardises_by_its_own_rows_where_the_study_says_so():
    world = World(study(task={"standardize": "site"}), badly_scaled())
    x = world.sites["birch"].data.train_x
    np.testing.assert_allclose(x.mean(axis=0), 0.0, atol=1e-5)
    np.testing.assert_allclose(x.std(axis=0, ddof=1), 1.0, rtol=1e-5)


def test_without_standardisation_rows_stay_as_they_are():
    world = World(study(), badly_scaled())
    np.testing.assert_array_equal(world.sites["birch"].data.train_x, world.data["birch"].train_x)


def test_a_training_site_leaves_the_applications_logging_alone():
    before = list(logging.root.handlers)
    World(study(privacy=PRIVATE)).run()
    assert logging.root.handlers == before


@pytest.mark.parametrize("changes", [{}, {"privacy": PRIVATE}])
@pytest.mark.parametrize("stage", ["ShareKeys", "MaskedInput", "ConsistencyCheck", "Unmask"])
def test_a_site_that_lost_its_last_state_answers_the_same_again(stage, changes):
    """It answered, and went down before it kept its state. Other randomness would show a difference or spoil a sum."""
    world = World(study(**changes))
    world.sites["birch"]._entropy = os.urandom
    request = world.until(stage)["birch"]
    kept = world.states["birch"]
    first = world.ask("birch", request)
    world.engine.states["birch"] = kept
    assert world.ask("birch", request) == first
    world.coordinator.receive("birch", first)


def test_a_state_with_more_stages_than_there_are_is_none_of_the_sites():
    world = World(study())
    for odd in (Memory(stages_done=99), Memory(stages_done=3), Memory(keys_done=3)):
        with pytest.raises(DecodeError, match="more stages"):
            world.sites["birch"].handle(b"", encode(odd))


def test_a_state_forgets_what_its_answers_were_drawn_from():
    """The seed moves on with every answer; a later state holds none of the earlier ones."""
    world, seeds = World(study(rounds=2)), []
    while not world.coordinator.finished:
        seeds.append(memory(world).seed)
        for seed in seeds[1:-1]:
            assert seed not in world.states["birch"]
        world.stage()
    assert seeds[0] == b""
    assert len(set(seeds)) == 9  # before each of nine messages another
    assert not memory(world).keys_state + memory(world).sum_state

    refusing = World(study(model=EXPLOSIVE))
    request, seed = refusing.until("MaskedInput")["birch"], memory(refusing).seed
    assert refusing.ask("birch", request) == refused("data")
    assert seed not in refusing.states["birch"]
    assert not memory(refusing).keys_state + memory(refusing).sum_state

"""The coordinator against sites that vanish, lie, repeat themselves and disagree."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocols.aggregation import Unprotected
from protocols.coordinator import Coordinator
from protocols.engines.faulty import Fault
from protocols.errors import StudyError
from protocols.fedavg import build_model, model_bytes
from protocols.messages import Answer, Refusal, Reply, Request
from secagg.masking.messages import MaskedInput
from secagg.wire import decode, encode
from tests.protocols.hospitals import (
    PRIVATE,
    SITES,
    STAGES,
    Tampering,
    World,
    fedsgd,
    hospital,
    hospitals,
    parameters,
    part_at,
    pooled_gradient,
    spoilt,
    study,
)

# Four sites round once each to 2^-16; at least three sites, of 33 rows or more together, share that.
ACCURACY = 4 * 2.0**-16 / 33 + 1e-6


def expected(world, survivors):
    """The model after one round of FedSGD with these sites."""
    start = build_model(world.study, 3)
    return parameters(start) - 0.5 * pooled_gradient(start, [world.data[name] for name in survivors])


def unchanged(world, before):
    return model_bytes(world.model) == before


def flip(world, site, stage):
    """Flip the last bit of what a site sends for a stage of round 0."""

    def change(name, request, reply):
        part = getattr(request, part_at(stage))
        hit = name == site and part is not None and (part.stage, part.round) == (stage, 0)
        return spoilt(reply, part_at(stage)) if hit else reply

    world.engine = Tampering(world.engine, change)
    return world


# --- who drops out, and where


@pytest.mark.parametrize("mode", ["active", "semi-honest"])
@pytest.mark.parametrize("kind", ["lost-request", "lost-reply", "corrupt", "flipped"])
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("site", SITES)
def test_whoever_drops_out_the_model_is_that_of_the_survivors_or_as_it_was(site, stage, kind, mode):
    if mode == "semi-honest" and stage == "ConsistencyCheck":
        return
    world = World(fedsgd(protocol={"mode": mode, "max_failed_rounds": 1}))
    before = model_bytes(world.model)
    if kind == "flipped":
        flip(world, site, stage).run()
    else:
        world.run(Fault(site, stage, 0, kind))
    record, others = world.rounds[0], tuple(name for name in SITES if name != site)
    if kind == "corrupt":
        assert record.dropped == {site: f"sent a wrong message at {stage}"}
    elif kind != "flipped":
        assert record.outcome == "opened"
        assert record.contributors == (others if stage in STAGES[:3] else SITES)
        assert record.dropped == {site: f"no answer at {stage}"}
        assert record.faults == []
    if record.outcome == "opened":
        np.testing.assert_allclose(parameters(world.model), expected(world, record.contributors), rtol=0, atol=ACCURACY)
        assert record.weight == sum(world.data[name].train_rows for name in record.contributors)
    else:
        assert unchanged(world, before)
        assert record.faults


@pytest.mark.parametrize("stage", ["AdvertiseKeys", "ShareKeys", "ConsistencyCheck"])
def test_a_signature_with_one_bit_flipped_drops_its_site_and_names_it(stage):
    record = flip(World(fedsgd()), "birch", stage).run().rounds[0]
    assert record.outcome == "opened"
    assert record.dropped == {"birch": f"sent a wrong message at {stage}"}
    assert len(record.faults) == 1
    assert record.faults[0].startswith("birch: ")


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("kind", ["lost-request", "lost-reply"])
def test_two_of_four_gone_lose_the_round_and_the_model_stays_bit_for_bit(stage, kind):
    world = World(fedsgd())
    before = model_bytes(world.model)
    world.run(Fault("ash", stage, 0, kind), Fault("dogwood", stage, 0, kind))
    record = world.rounds[0]
    assert record.outcome == "failed"
    assert record.contributors == ()
    assert record.faults == [f"{stage}: 2 participants left, 3 needed; the round is lost, nothing is revealed"]
    assert unchanged(world, before)
    assert record.stages[-1].stage == stage


def test_two_gone_at_different_stages_lose_the_round_only_where_the_second_was_needed():
    world = World(fedsgd()).run(Fault("ash", "MaskedInput", 0), Fault("birch", "Unmask", 0))
    assert world.rounds[0].outcome == "failed"
    assert world.rounds[0].dropped == {"ash": "no answer at MaskedInput", "birch": "no answer at Unmask"}
    assert "Unmask: 2 participants left" in world.rounds[0].faults[0]


def test_a_site_that_dropped_out_is_back_once_keys_are_agreed_with_it_again():
    world = World(fedsgd(rounds=3)).run(Fault("birch", "MaskedInput", 0))
    others = "ash", "cedar", "dogwood"
    assert [record.contributors for record in world.rounds] == [others, others, SITES, ()]


def test_a_lost_round_counts_as_a_round_and_the_next_goes_on_from_the_same_model():
    world = World(fedsgd(rounds=2))
    world.run(*(Fault(name, "ShareKeys", 0) for name in SITES))
    assert [(r.purpose, r.outcome) for r in world.rounds] == [
        ("train", "failed"),
        ("train", "opened"),
        ("finish", "opened"),
    ]
    np.testing.assert_allclose(parameters(world.model), expected(world, SITES), rtol=0, atol=ACCURACY)
    assert world.coordinator.stopped is None


def test_a_site_gone_at_the_finish_does_not_undo_the_study():
    world = World(fedsgd()).run(Fault("birch", "Finish"))
    assert world.rounds[-1].outcome == "opened"
    assert world.rounds[-1].dropped == {"birch": "no answer at Finish"}
    assert world.coordinator.stopped is None


def test_sites_lost_at_one_stage_are_recorded_in_the_order_of_the_roster():
    """And not in that of a set, which differs from process to process."""
    world = World(fedsgd()).run(*(Fault(name, "ShareKeys", 0) for name in SITES))
    assert tuple(world.rounds[0].dropped) == SITES


def test_a_higher_threshold_loses_the_round_that_a_lower_one_survives():
    world = World(fedsgd(protocol={"threshold": 4})).run(Fault("birch", "MaskedInput", 0))
    assert world.rounds[0].outcome == "failed"


@pytest.mark.parametrize(("threshold", "outcome"), [(None, "opened"), (2, "opened"), (3, "failed")])
def test_a_plain_sum_keeps_to_its_threshold_too(threshold, outcome):
    world = World(fedsgd(protocol={"aggregation": "plain", "threshold": threshold}))
    before = model_bytes(world.model)
    world.run(Fault("ash", "Submit", 0), Fault("birch", "Submit", 0))
    assert world.rounds[0].outcome == outcome
    assert unchanged(world, before) == (outcome == "failed")


# --- giving up


def test_lost_rounds_in_a_row_end_the_study_with_the_reason():
    world = World(fedsgd(rounds=9, protocol={"max_failed_rounds": 2}))
    before = model_bytes(world.model)
    world.run(*(Fault(name, "MaskedInput") for name in SITES[:2]))
    assert [(r.purpose, r.outcome) for r in world.rounds] == [
        ("train", "failed"),
        ("train", "failed"),
        ("finish", "opened"),
    ]
    assert world.coordinator.stopped.startswith("2 rounds in a row were lost, the last with: MaskedInput: 2 part")
    assert world.coordinator.finished
    assert unchanged(world, before)


def test_a_round_that_succeeds_starts_the_count_of_lost_rounds_anew():
    lost = [Fault(name, "Unmask", number) for number in (0, 2, 4) for name in SITES[:2]]
    world = World(fedsgd(rounds=5, protocol={"max_failed_rounds": 2})).run(*lost)
    assert [r.outcome for r in world.rounds] == ["failed", "opened", "failed", "opened", "failed", "opened"]
    assert world.coordinator.stopped is None


def test_a_standardisation_that_was_lost_is_tried_again_before_any_training():
    world = World(study(task={"standardize": "global"}))
    world.run(*(Fault(name, "MaskedInput", 0) for name in SITES[:2]))
    assert [(r.purpose, r.outcome) for r in world.rounds] == [
        ("standardize", "failed"),
        ("standardize", "opened"),
        ("train", "opened"),
        ("finish", "opened"),
    ]


def test_a_standardisation_that_is_always_lost_ends_the_study():
    world = World(study(task={"standardize": "global"}, protocol={"max_failed_rounds": 2}))
    world.run(*(Fault(name, "MaskedInput") for name in SITES[:2]))
    assert [(r.purpose, r.outcome) for r in world.rounds][:2] == [("standardize", "failed")] * 2
    assert world.coordinator.stopped.startswith("2 rounds in a row")


def test_a_budget_that_is_spent_ends_the_study_at_once():
    world = World(study(rounds=5, privacy={**PRIVATE, "epsilon": 1e-3}))
    before = model_bytes(world.model)
    world.run()
    assert [r.purpose for r in world.rounds] == ["train", "finish"]
    assert world.coordinator.stopped.startswith("the privacy budget of ash, birch, cedar, dogwood is spent: Advert")
    assert unchanged(world, before)


def test_a_lost_round_without_a_spent_budget_does_not_speak_of_budgets():
    world = World(study(protocol={"max_failed_rounds": 1})).run(*(Fault(name, "ShareKeys") for name in SITES))
    assert "budget" not in world.coordinator.stopped


# --- wrong messages


def test_answers_that_are_unasked_late_or_twice_are_ignored_and_recorded():
    clean, world = World(fedsgd()).run(), World(fedsgd())
    early = {}
    for stage in STAGES:
        requests = world.until(stage)
        replies = dict(world.engine.exchange(requests))
        for name, reply in replies.items():
            world.coordinator.receive(name, reply)
            world.coordinator.receive(name, reply)  # twice
        world.coordinator.receive("mallory", replies["ash"])  # unasked
        assert len(world.rounds[0].faults) == 5 * (STAGES.index(stage) + 1)
        early[stage] = replies
        world.coordinator.close_stage()
    assert world.rounds[0].outcome == "opened"
    assert world.rounds[0].dropped == {}
    assert all(line.endswith("answered unasked, late or twice; ignored") for line in world.rounds[0].faults)
    world.run()
    assert model_bytes(world.model) == model_bytes(clean.model)


def test_an_answer_that_comes_after_its_stage_changes_nothing():
    world = World(fedsgd())
    requests = world.until("MaskedInput")
    late = world.ask("birch", requests.pop("birch"))
    for name, reply in world.engine.exchange(requests):
        world.coordinator.receive(name, reply)
    world.coordinator.close_stage()
    world.coordinator.receive("birch", late)  # before the next stage is asked
    world.coordinator.requests()
    world.coordinator.receive("birch", late)  # and after
    world.run()
    assert world.rounds[0].contributors == ("ash", "cedar", "dogwood")
    assert world.rounds[0].faults == ["birch: answered unasked, late or twice; ignored"] * 2
    np.testing.assert_allclose(
        parameters(world.model), expected(world, ("ash", "cedar", "dogwood")), rtol=0, atol=ACCURACY
    )


def test_after_a_wrong_message_a_right_one_of_the_same_site_is_ignored():
    world = World(fedsgd())
    replies = dict(world.engine.exchange(world.until("MaskedInput")))
    world.coordinator.receive("birch", b"\x01junk")
    for name, reply in replies.items():
        world.coordinator.receive(name, reply)
    world.coordinator.close_stage()
    world.run()
    assert world.rounds[0].contributors == ("ash", "cedar", "dogwood")


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(
    "reply", [b"", b"\x01", b"\xff" * 40, encode(Answer(b"")), encode(Reply()), encode(Reply(*[Answer(b"junk")] * 3))]
)
def test_garbage_drops_its_sender_and_nobody_else(stage, reply):
    world = World(fedsgd())
    for name, honest in world.engine.exchange(world.until(stage)):
        world.coordinator.receive(name, reply if name == "birch" else honest)
    world.coordinator.close_stage()
    world.run()
    record = world.rounds[0]
    assert record.outcome == "opened"
    assert record.dropped == {"birch": f"sent a wrong message at {stage}"}
    assert record.faults[0].startswith("birch: ")


BODIES = st.binary(max_size=60)


@settings(max_examples=50, deadline=None)
@given(BODIES | BODIES.map(lambda body: encode(Reply(keys=Answer(body)))) | BODIES.map(lambda b: encode(Answer(b))))
def test_whatever_a_site_answers_the_coordinator_goes_on(reply):
    coordinator = SHARED.another_coordinator()
    for name in coordinator.requests():
        coordinator.receive(name, reply if name == "birch" else HONEST[name])
    coordinator.close_stage()
    assert set(coordinator.requests()) == {"ash", "cedar", "dogwood"}


SHARED = World(fedsgd())
HONEST = dict(SHARED.engine.exchange(SHARED.coordinator.requests()))


@pytest.mark.parametrize("stage", STAGES)
def test_a_site_that_answers_for_another_is_found_out_and_the_other_still_counts(stage):
    """The transport says who sent it; the message is the other's. Only a masked vector says nothing of its owner."""
    world = World(fedsgd())
    replies = dict(world.engine.exchange(world.until(stage)))
    world.coordinator.receive("birch", replies["ash"])
    for name in ("ash", "cedar", "dogwood"):
        world.coordinator.receive(name, replies[name])
    before = model_bytes(world.model)
    world.coordinator.close_stage()
    world.run()
    record = world.rounds[0]
    if stage == "MaskedInput":
        # Twice ash's masked vector, none of birch's: the masks do not cancel, and the sum is noise that is refused.
        assert record.outcome == "failed"
        assert unchanged(world, before)
    else:
        assert "ash" in record.contributors
        assert "ash" not in record.dropped
        assert record.outcome == "opened"
        np.testing.assert_allclose(parameters(world.model), expected(world, record.contributors), rtol=0, atol=ACCURACY)
        if stage != "Unmask":
            assert record.dropped == {"birch": f"sent a wrong message at {stage}"}


def test_a_refusal_drops_its_sender_with_its_one_word():
    for reason in ("budget", "data", "policy", "protocol"):
        world = World(fedsgd())
        for name, honest in world.engine.exchange(world.until("ShareKeys")):
            world.coordinator.receive(name, encode(Reply(keys=Refusal(reason))) if name == "birch" else honest)
        world.coordinator.close_stage()
        world.run()
        assert world.rounds[0].dropped == {"birch": f"refused ({reason}) at ShareKeys"}
        assert world.coordinator.stopped is None


def test_a_vector_outside_its_bounds_never_moves_the_model():
    """A site that speaks the protocol but sends a weight that nobody agreed to."""
    world = World(fedsgd())
    before = model_bytes(world.model)
    monstrous = world.sites["birch"]

    def contribute(message, memory, entropy):
        fixed = world.study.fixed_point
        vector = fixed.ring.zeros(1 + 4)
        vector[0] = 4 * 10_000 + 1
        return vector, 1

    monstrous._contribute = contribute
    world.run()
    assert world.rounds[0].outcome == "failed"
    assert "outside its bounds" in world.rounds[0].faults[0]
    assert unchanged(world, before)


@pytest.mark.parametrize("aggregation", ["masked", "plain"])
def test_weights_that_add_up_to_zero_lose_the_round_and_leave_the_model(aggregation):
    world = World(fedsgd(protocol={"aggregation": aggregation, "max_failed_rounds": 1}))
    before = model_bytes(world.model)
    for site in world.sites.values():
        site._contribute = lambda *_: (world.study.fixed_point.ring.zeros(5), 1)
    world.run()
    assert world.rounds[0].outcome == "failed"
    assert "add up to 0" in world.rounds[0].faults[0]
    assert unchanged(world, before)


def test_a_wrong_share_is_blamed_on_its_sender_and_the_sum_is_right_all_the_same():
    world = World(fedsgd())
    for name, reply in world.engine.exchange(world.until("Unmask")):
        body = bytearray(decode(reply, Reply).sum.body)
        if name == "birch":
            body[-20] ^= 1  # in the last share
        world.coordinator.receive(name, encode(Reply(sum=Answer(body))))
    world.coordinator.close_stage()
    record = world.rounds[0]
    assert record.outcome == "opened"
    (fault,) = record.faults
    assert fault.startswith("birch: its shares of another's secret do not fit")
    np.testing.assert_allclose(parameters(world.model), expected(world, SITES), rtol=0, atol=ACCURACY)


# --- disagreement


@pytest.mark.parametrize("mode", ["active", "semi-honest"])
@pytest.mark.parametrize(
    "disagreeing",
    [
        {"rounds": 2},
        {"seed": 1},
        {"server": {"learning_rate": 0.25}},
        {"protocol": {"max_update": 2.0}},
        {"protocol": {"threshold": 4}},
        {"protocol": {"ring_bits": 40}},
        {"task": {"test_fraction": 0.5}},
    ],
)
def test_a_site_with_another_study_is_never_in_a_sum(mode, disagreeing):
    base = {"protocol": {"mode": mode, "max_failed_rounds": 1}}
    merged = {
        key: {**base.get(key, {}), **value} if isinstance(value, dict) else value
        for key, value in {**base, **disagreeing}.items()
    }
    world = World(fedsgd(**base), own_study={"birch": fedsgd(**merged)}).run(Fault("birch", "Finish"))
    for record in world.rounds:
        assert "birch" not in record.contributors
    # What its keys are for shows at once who disagrees and on what, and the others go on.
    record = world.rounds[0]
    assert record.outcome == "opened"
    assert record.dropped == {"birch": "sent a wrong message at AdvertiseKeys"}
    theirs, ours = (made.digest.hex()[:16] for made in (fedsgd(**merged), world.study))
    (fault,) = record.faults
    assert fault.startswith("birch: ")
    assert f"study configuration {theirs} where {ours} was expected" in fault
    others = [name for name in SITES if name != "birch"]
    np.testing.assert_allclose(parameters(world.model), expected(world, others), rtol=0, atol=ACCURACY)
    # The site itself learns of it no later than the others would need its vector.
    assert world.sites["birch"].evaluations == []


@pytest.mark.parametrize("disagreeing", [{"seed": 1}, {"rounds": 2}, {"server": {"learning_rate": 0.25}}])
def test_a_site_with_another_study_is_in_no_plain_sum_either(disagreeing):
    plain = {"protocol": {"aggregation": "plain"}}
    other = fedsgd(**plain, **disagreeing)
    world = World(fedsgd(**plain), own_study={"birch": other}).run()
    assert world.rounds[0].contributors == ("ash", "cedar", "dogwood")
    assert world.rounds[0].dropped == {"birch": "sent a wrong message at Submit"}
    (fault,) = world.rounds[0].faults
    assert f"{other.digest.hex()[:16]} where {world.study.digest.hex()[:16]} was expected" in fault


@pytest.mark.parametrize("mode", ["active", "semi-honest"])
@pytest.mark.parametrize("split", [1, 2])
def test_a_server_that_gives_different_models_to_different_sites_opens_nothing_of_both(mode, split):
    """Two coordinators of one study and one number, with different models, that share every answer they get."""
    world = World(fedsgd(protocol={"mode": mode, "max_failed_rounds": 1}))
    one = world.coordinator
    other = Coordinator(world.study, world.roster, build_model(study(seed=9), 3), 3)
    befores = model_bytes(one.model), model_bytes(other.model)
    while one.requests() and other.requests() and one.purpose == other.purpose == "train":
        first, second = one.requests(), other.requests()
        mixed = {name: first.get(name) if i < split else second.get(name) for i, name in enumerate(SITES)}
        replies = list(world.engine.exchange({name: request for name, request in mixed.items() if request}))
        for coordinator in (one, other):
            for name, reply in replies:
                coordinator.receive(name, reply)
            coordinator.close_stage()
    for coordinator, before, own in ((one, befores[0], SITES[:split]), (other, befores[1], SITES[split:])):
        record = coordinator.rounds[0]
        assert set(record.contributors) <= set(own)
        if len(own) < world.study.threshold:
            assert record.outcome == "failed"
            assert model_bytes(coordinator.model) == before


def test_a_coordinator_of_another_roster_or_model_is_refused():
    world = World(fedsgd())
    with pytest.raises(StudyError, match="sites: the study has"):
        Coordinator(fedsgd(SITES[:3]), world.roster, build_model(world.study, 3), 3)
    with pytest.raises(StudyError, match=r"server\.optimizer"):
        Coordinator(fedsgd(server={"optimizer": "Nope"}), world.roster, build_model(world.study, 3), 3)


# --- plain and masked


def test_plain_sums_warn_and_give_the_same_model_as_masked_ones_up_to_rounding():
    plain, masked = fedsgd(rounds=3, protocol={"aggregation": "plain"}), fedsgd(rounds=3)
    world = World(plain)
    with pytest.warns(Unprotected, match="protects nothing"):
        Coordinator(plain, world.roster, build_model(plain, 3), 3)
    ours, theirs = parameters(World(masked).run().model), parameters(world.run().model)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=3 * 2 * ACCURACY)
    assert np.abs(ours - parameters(build_model(masked, 3))).max() > 1e-3


def test_masked_sums_do_not_warn():
    world = World(fedsgd())
    Coordinator(world.study, world.roster, build_model(world.study, 3), 3)


def test_plain_vectors_are_what_the_warning_says():
    world = World(fedsgd(protocol={"aggregation": "plain"}))
    (_, reply), *_ = world.engine.exchange(world.coordinator.requests())
    fixed = world.study.fixed_point
    vector = fixed.ring.unpack(decode(decode(reply, Reply).sum.body, MaskedInput).packed, 5)
    weight, mean = fixed.decode(vector)
    assert weight == world.data["ash"].train_rows
    gradient = pooled_gradient(build_model(world.study, 3), [world.data["ash"]])
    np.testing.assert_allclose(mean, -gradient, rtol=0, atol=2.0**-16)


# --- what it asks and what it records


def test_the_model_is_sent_once_a_round_where_the_site_contributes():
    world = World(fedsgd(rounds=2))
    for stages, number in ((STAGES, 0), (STAGES[2:], 1)):
        for stage in stages:
            for request in world.until(stage, number).values():
                message = decode(request, Request)
                part = getattr(message, part_at(stage))
                assert (part.round, part.stage) == (number, stage)
                if message.sum is not None:
                    assert message.sum.purpose == "train"
                assert (b"weight" in request) == (stage == "MaskedInput")  # a name in the model
                assert request.count(world.coordinator._work) == (stage == "MaskedInput")


def test_records_count_who_was_asked_and_every_byte():
    world = World(fedsgd())
    for stage in STAGES:
        requests = world.until(stage)
        replies = {}
        for name, reply in world.engine.exchange(requests):
            replies[name] = reply
            if (name, stage) != ("birch", "ShareKeys"):
                world.coordinator.receive(name, reply)
        world.coordinator.close_stage(0.25)
        record = world.rounds[0].stages[-1]
        assert (record.stage, record.asked, record.seconds) == (stage, len(requests), 0.25)
        lost = ("birch",) if stage == "ShareKeys" else ()
        assert record.answered == len(requests) - len(lost)
        assert record.bytes_down == sum(map(len, requests.values()))
        assert record.bytes_up == sum(len(reply) for name, reply in replies.items() if name not in lost)
    assert [stage.asked for stage in world.rounds[0].stages] == [4, 4, 3, 3, 3]


def test_after_the_end_there_is_nothing_to_ask():
    world = World(fedsgd()).run()
    assert world.coordinator.requests() == {}
    assert world.coordinator.finished
    assert world.coordinator.purpose is None
    world.coordinator.receive("ash", b"late")
    assert world.rounds[-1].faults == ["ash: answered unasked, late or twice; ignored"]


def test_every_round_has_a_number_of_its_own_lost_ones_included():
    world = World(study(rounds=3, task={"standardize": "global"}))
    world.run(*(Fault(name, "ShareKeys", number) for name in SITES for number in (0, 2)))
    # All messages with which keys for number 2 were to be agreed are lost, and with them round 1: 2 is passed over.
    assert [record.number for record in world.rounds] == [0, 1, 3, 4, 5, 6, 7]
    assert [record.outcome for record in world.rounds] == ["failed", "failed", *["opened"] * 5]


def test_asking_again_in_a_stage_neither_drops_nor_blames_those_who_had_answered():
    """A driver that sends a stage's requests again: sites answer with identical bytes."""
    world = World(fedsgd())
    requests = world.until("MaskedInput")
    world.coordinator.receive("ash", world.ask("ash", requests["ash"]))
    for name, reply in world.engine.exchange(world.coordinator.requests()):
        world.coordinator.receive(name, reply)
    world.coordinator.close_stage()
    world.run()
    assert world.rounds[0].contributors == SITES
    assert world.rounds[0].dropped == {}


def test_a_step_that_would_make_the_model_infinite_is_a_lost_round():
    data = {name: hospital(name, scale=20.0) for name in SITES}
    world = World(fedsgd(rounds=2, learning_rate=3e38), data).run()
    assert np.isfinite(parameters(world.model)).all()


# --- faults themselves


@pytest.mark.parametrize("text", ["va", "va:", ":Unmask", "va:Unmask:x", "va:Unmask:-1", "va:Unmask:1:2", ""])
def test_a_drop_out_in_another_form_is_refused(text):
    with pytest.raises(StudyError, match="SITE:STAGE"):
        Fault.parse(text)


def test_a_drop_out_without_a_round_is_in_every_round():
    world = World(fedsgd(rounds=2)).run(Fault.parse("birch:ShareKeys"))
    assert [record.contributors for record in world.rounds[:2]] == [("ash", "cedar", "dogwood")] * 2
    assert Fault.parse("birch:ShareKeys:1") == Fault("birch", "ShareKeys", 1)


def test_a_fault_is_about_its_site_its_stage_and_its_round_only():
    world = World(fedsgd(rounds=3)).run(Fault("birch", "Unmask", 1))
    assert [set(record.dropped) for record in world.rounds] == [set(), {"birch"}, set(), set()]


def test_a_fault_where_keys_are_agreed_ahead_hits_the_sum_that_they_travel_with():
    world = World(fedsgd(rounds=3)).run(Fault("birch", "ShareKeys", 1))
    assert [record.dropped.get("birch") for record in world.rounds] == [
        "no answer at ConsistencyCheck",
        "no answer at ShareKeys",
        None,
        None,
    ]


def test_the_sites_data_differ_so_that_a_missing_one_shows():
    data = hospitals()
    world = World(fedsgd(), data)
    every = expected(world, SITES)
    for name in SITES:
        without = expected(world, [other for other in SITES if other != name])
        assert np.abs(every - without).max() > 10 * ACCURACY

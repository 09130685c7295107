"""Rounds in a row, the keys of the next agreed while one is under way: what is lost with what, and what a server gains
by asking twice, out of turn, or different sites for different things."""

import hashlib
import itertools
import os

import msgspec
import numpy as np
import pytest
import torch

from protocols.engines.faulty import Fault, Faulty
from protocols.fedavg import build_model, model_bytes
from protocols.memory import Memory
from protocols.messages import Answer, FinishRequest, Refusal, Reply, Request, Work
from protocols.policy import Policy
from protocols.server_view import FALSE_ALARM, _chances_of_uniform
from secagg.masking import client, server
from secagg.masking.messages import (
    Advertisement,
    Confirmation,
    ConfirmationSet,
    MaskedInput,
    ShareInbox,
    UnmaskShares,
)
from secagg.masking.transcript import NO_RECORD, examine, verify_head, write
from secagg.prg import add_keystream
from secagg.shamir import recover
from secagg.wire import decode, encode
from tests.protocols.hospitals import (
    PRIVATE,
    SITES,
    STAGES,
    Tampering,
    World,
    asked,
    changed,
    fedsgd,
    other_part,
    parameters,
    part_at,
    pooled_gradient,
    spoilt,
    study,
    with_work,
)

OTHERS = "ash", "cedar", "dogwood"
MODES = {"active": STAGES, "semi-honest": tuple(stage for stage in STAGES if stage != "ConsistencyCheck")}
# Four sites round once each to 2^-16 and share that among 33 rows or more; the rest is float32.
ACCURACY = 4 * 2.0**-16 / 33 + 1e-6
OTHER = encode(Work(model_bytes(build_model(study(seed=9), 3))))
REFUSED = Refusal("protocol")


def follow(world, engine=None):
    """Run a study, and check the model after every sum against the gradients of exactly its contributors."""
    engine, reference, done = engine or world.engine, build_model(world.study, 3), 0
    while requests := world.coordinator.requests():
        for name, reply in engine.exchange(requests):
            world.coordinator.receive(name, reply)
        world.coordinator.close_stage()
        for record in world.rounds[done:]:
            if record.outcome == "running":
                break
            done += 1
            if record.contributors:
                data = [world.data[name] for name in record.contributors]
                step = 0.5 * pooled_gradient(reference, data)
                torch.nn.utils.vector_to_parameters(
                    torch.tensor(parameters(reference) - step).float(), reference.parameters()
                )
                assert record.weight == sum(one.train_rows for one in data)
            np.testing.assert_allclose(parameters(world.model), parameters(reference), rtol=0, atol=done * ACCURACY)
    return world


def contributors(world):
    return [record.contributors for record in world.rounds if record.purpose == "train"]


def stages(world):
    return [[stage.stage for stage in record.stages] for record in world.rounds]


def memory(world, name="birch"):
    return decode(world.states[name], Memory) if world.states[name] else Memory()


def reply_of(world, request, name="birch"):
    return decode(world.ask(name, request), Reply)


def every(part_stage, number, change):
    """A change of replies, for `Tampering`, where a request asks for that stage under that number."""

    def tamper(name, request, reply):
        part = getattr(request, part_at(part_stage))
        hit = part is not None and (part.stage, part.round) == (part_stage, number)
        return change(name, reply) if hit else reply

    return tamper


# --- a steady state


@pytest.mark.parametrize(("mode", "first", "steady"), [("active", 5, 3), ("semi-honest", 4, 2)])
def test_a_round_after_the_first_takes_only_the_trips_of_its_sum(mode, first, steady):
    world = World(fedsgd(rounds=4, protocol={"mode": mode}))
    trips, seen = 0, []
    while requests := world.coordinator.requests():
        trips += 1
        seen.append({frozenset(asked(request)) for request in requests.values()})
        world.stage()
    assert trips == first + 3 * steady + 1
    assert stages(world) == [list(MODES[mode]), *[list(MODES[mode][2:])] * 3, ["Finish"]]
    assert contributors(world) == [SITES] * 4
    ahead = dict(zip(MODES[mode][2:], STAGES[:2], strict=False))
    for number, of_round in enumerate(zip(*[iter(seen[2:-1])] * steady, strict=True)):
        for stage, parts in zip(MODES[mode][2:], of_round, strict=True):
            keys = {(ahead[stage], number + 1)} if stage in ahead and number < 3 else set()
            assert parts == {frozenset({(stage, number)} | keys)}


def test_the_keys_of_the_first_training_are_agreed_while_the_features_are_standardized():
    world = World(study(rounds=2, task={"standardize": "global"})).run()
    assert [record.purpose for record in world.rounds] == ["standardize", "train", "train", "finish"]
    assert stages(world) == [list(STAGES), list(STAGES[2:]), list(STAGES[2:]), ["Finish"]]


def test_a_plain_study_takes_one_trip_a_round():
    world = follow(World(fedsgd(rounds=3, protocol={"aggregation": "plain"})))
    assert stages(world) == [["Submit"]] * 3 + [["Finish"]]
    assert [record.number for record in world.rounds] == [0, 1, 2, 3]


def test_the_record_of_a_stage_counts_the_bytes_of_the_keys_that_travel_with_it():
    world = World(fedsgd(rounds=2))
    requests = world.until("AdvertiseKeys", 1)
    replies = dict(world.engine.exchange(requests))
    for name, reply in replies.items():
        world.coordinator.receive(name, reply)
    world.coordinator.close_stage()
    (record,) = world.rounds[0].stages[2:]
    assert (record.stage, record.asked, record.answered) == ("MaskedInput", 4, 4)
    assert record.bytes_down == sum(map(len, requests.values()))
    assert record.bytes_up == sum(map(len, replies.values()))
    keys = [decode(reply, Reply).keys.body for reply in replies.values()]
    assert min(map(len, keys)) > 128  # two keys and a signature
    assert record.bytes_up > sum(map(len, keys)) + 4 * 5 * 4


@pytest.mark.parametrize("order", [list, lambda items: list(reversed(items))])
def test_the_order_in_which_answers_arrive_changes_nothing(order):
    clean, world = World(fedsgd(rounds=3)).run(), World(fedsgd(rounds=3))
    while requests := world.coordinator.requests():
        for name, reply in order(list(world.engine.exchange(requests))):
            world.coordinator.receive(name, reply)
        world.coordinator.close_stage()
    assert model_bytes(world.model) == model_bytes(clean.model)
    assert write(world.coordinator.transcript) == write(clean.coordinator.transcript)


# --- who drops out, and when it is back


@pytest.mark.parametrize("kind", ["lost-request", "lost-reply", "corrupt"])
@pytest.mark.parametrize(
    ("mode", "stage", "out"),
    [
        ("active", "MaskedInput", {1, 2}),  # its vector, and its keys for the next
        ("active", "ConsistencyCheck", {2}),  # its vector is in already; its shares for the next are lost
        ("active", "Unmask", set()),  # the others' shares are enough
        ("semi-honest", "MaskedInput", {1, 2}),
        ("semi-honest", "Unmask", {2}),
    ],
)
def test_a_site_that_misses_a_message_is_out_of_what_was_in_it_and_back_by_itself(mode, stage, out, kind):
    world = World(fedsgd(rounds=4, protocol={"mode": mode}))
    follow(world, Faulty(world.engine, (Fault("birch", stage, 1, kind),)))
    assert contributors(world) == [OTHERS if number in out else SITES for number in range(4)]
    assert [record.number for record in world.rounds] == list(range(5))
    assert all(record.outcome == "opened" for record in world.rounds)
    why = "sent a wrong message" if kind == "corrupt" else "no answer"
    keys = {"MaskedInput": "AdvertiseKeys"}.get(stage, "ShareKeys")
    assert [record.dropped for record in world.rounds[1:4]] == [
        {"birch": f"{why} at {stage}"},
        {"birch": f"{why} at {keys}"} if 2 in out else {},
        {},
    ]
    assert world.coordinator.stopped is None


JUNK = Answer(memoryview(b"junk"))


@pytest.mark.parametrize(
    ("mode", "stage", "instead"),
    [
        *[("active", stage, instead) for stage in STAGES[2:] for instead in (REFUSED, JUNK)],
        ("active", "MaskedInput", None),
        ("semi-honest", "MaskedInput", REFUSED),
        ("semi-honest", "Unmask", JUNK),
    ],
)
def test_a_wrong_part_for_the_sum_does_not_cost_the_keys_of_the_next(mode, stage, instead):
    world = World(fedsgd(rounds=3, protocol={"mode": mode}))

    def change(name, reply):
        return msgspec.structs.replace(reply, sum=instead) if name == "birch" else reply

    follow(world, Tampering(world.engine, every(stage, 1, change)))
    assert contributors(world) == [SITES, OTHERS if stage == "MaskedInput" else SITES, SITES]
    assert set(world.rounds[1].dropped) == {"birch"}
    assert world.rounds[2].dropped == {}


@pytest.mark.parametrize(
    ("mode", "instead"),
    [*(("active", instead) for instead in (None, REFUSED, JUNK, "flipped")), ("semi-honest", JUNK)],
)
@pytest.mark.parametrize("stage", ["AdvertiseKeys", "ShareKeys"])
def test_a_wrong_part_for_the_keys_of_the_next_does_not_cost_the_sum(stage, mode, instead):
    world = World(fedsgd(rounds=4, protocol={"mode": mode}))

    def change(name, reply):
        if name != "birch":
            return reply
        return spoilt(reply, "keys") if instead == "flipped" else msgspec.structs.replace(reply, keys=instead)

    follow(world, Tampering(world.engine, every(stage, 2, change)))
    assert contributors(world) == [SITES, SITES, OTHERS, SITES]
    assert world.rounds[1].dropped == {}
    why = "refused (protocol)" if instead is REFUSED else "sent a wrong message"
    assert world.rounds[2].dropped == {"birch": f"{why} at {stage}"}


def test_a_vector_with_one_bit_flipped_loses_its_round_only():
    world = World(fedsgd(rounds=4))

    def change(name, reply):
        return spoilt(reply, "sum") if name == "birch" else reply

    follow(world, Tampering(world.engine, every("MaskedInput", 1, change)))
    assert contributors(world) == [SITES, (), SITES, SITES]
    assert stages(world)[2] == list(STAGES[2:])


def test_sites_that_take_turns_in_dropping_out_cost_only_their_own_vectors():
    world = World(fedsgd(rounds=6))
    follow(world, Faulty(world.engine, (Fault("ash", "MaskedInput", 1), Fault("birch", "MaskedInput", 3))))
    out = {1: "ash", 2: "ash", 3: "birch", 4: "birch"}
    assert contributors(world) == [tuple(name for name in SITES if name != out.get(r)) for r in range(6)]


def test_a_site_that_is_out_again_is_out_for_its_new_reason():
    world = World(fedsgd(rounds=6)).run(Fault("birch", "MaskedInput", 1), Fault("birch", "ConsistencyCheck", 3))
    assert [record.dropped.get("birch") for record in world.rounds] == [
        None,
        "no answer at MaskedInput",
        "no answer at AdvertiseKeys",
        "no answer at ConsistencyCheck",
        "no answer at ShareKeys",
        None,
        None,
    ]


# --- rounds that are lost, and the keys that were agreed on meanwhile


def few(part, *names):
    """These sites refuse that part."""

    def change(name, reply):
        return msgspec.structs.replace(reply, **{part: REFUSED}) if name in names else reply

    return change


@pytest.mark.parametrize("stage", ["AdvertiseKeys", "ShareKeys"])
@pytest.mark.parametrize("mode", ["active", "semi-honest"])
def test_where_too_few_keys_are_agreed_ahead_the_next_round_begins_with_them_under_a_new_number(mode, stage):
    world = World(fedsgd(rounds=4, protocol={"mode": mode}))
    follow(world, Tampering(world.engine, every(stage, 2, few("keys", "ash", "birch", "cedar"))))
    assert [record.number for record in world.rounds] == [0, 1, 3, 4, 5]
    assert contributors(world) == [SITES] * 4
    assert stages(world)[2] == list(MODES[mode])
    assert stages(world)[3] == list(MODES[mode][2:])
    assert examine_own(world) == (() if mode == "active" else None)


def examine_own(world):
    transcript = world.coordinator.transcript
    return examine(write(transcript), world.roster).problems if transcript else None


def test_a_key_agreement_that_goes_on_by_itself_goes_on_where_it_was():
    world = World(fedsgd(rounds=3))
    follow(world, Tampering(world.engine, every("MaskedInput", 1, few("sum", "ash", "birch"))))
    assert [(record.number, record.outcome) for record in world.rounds] == [
        (0, "opened"),
        (1, "failed"),
        (2, "opened"),
        (3, "opened"),
    ]
    assert stages(world) == [list(STAGES), ["MaskedInput"], list(STAGES[1:]), ["Finish"]]
    assert contributors(world) == [SITES, (), SITES]
    assert examine_own(world) == ()


@pytest.mark.parametrize("mode", ["active", "semi-honest"])
def test_a_round_that_is_lost_at_its_end_leaves_the_keys_of_the_next(mode):
    world = World(fedsgd(rounds=3, protocol={"mode": mode}))
    follow(world, Tampering(world.engine, every("Unmask", 1, few("sum", "ash", "birch"))))
    assert contributors(world) == [SITES, (), SITES]
    assert [record.number for record in world.rounds] == [0, 1, 2, 3]
    assert stages(world)[2] == list(MODES[mode][2:])


@pytest.mark.parametrize("stage", ["MaskedInput", "ConsistencyCheck"])
def test_a_sum_and_the_keys_of_the_next_that_are_lost_together_begin_anew(stage):
    world = World(fedsgd(rounds=3))
    lost = Fault("ash", stage, 1), Fault("birch", stage, 1)
    follow(world, Faulty(world.engine, lost))
    assert contributors(world) == [SITES, (), SITES]
    assert [record.number for record in world.rounds] == [0, 1, 3, 4]
    assert stages(world)[2] == list(STAGES)
    assert world.rounds[1].dropped == {"ash": f"no answer at {stage}", "birch": f"no answer at {stage}"}
    assert world.rounds[2].dropped == {}


def test_keys_that_cannot_be_agreed_on_by_themselves_either_lose_the_round():
    world = World(fedsgd(rounds=4))
    lost = [Fault(name, "ShareKeys", number) for name in ("ash", "birch") for number in (0, 1)]
    follow(world, Faulty(world.engine, tuple(lost)))
    assert [(record.number, record.outcome) for record in world.rounds] == [
        (0, "failed"),
        (1, "failed"),
        (2, "opened"),
        (3, "opened"),
        (4, "opened"),
    ]
    assert world.rounds[0].dropped == dict.fromkeys(("ash", "birch"), "no answer at ShareKeys")


def test_the_last_round_agrees_on_no_keys_and_a_study_that_stops_neither():
    world = World(fedsgd(rounds=6, protocol={"max_failed_rounds": 2}))
    world.run(*(Fault(name, "Unmask") for name in ("ash", "birch")))
    assert stages(world) == [list(STAGES), list(STAGES[2:]), ["Finish"]]
    assert all(memory(world, name).keys_state == b"" for name in SITES)
    assert world.coordinator.stopped.startswith("2 rounds in a row were lost")


def test_after_the_end_a_stage_is_not_closed_again():
    world = World(fedsgd()).run()
    before = write(world.coordinator.transcript), stages(world)
    world.coordinator.close_stage()
    assert (write(world.coordinator.transcript), stages(world)) == before


# --- processes that end between two messages


@pytest.mark.parametrize("changes", [{}, {"privacy": PRIVATE}, {"protocol": {"mode": "semi-honest"}}])
def test_sites_that_restart_between_any_two_messages_come_to_the_same_model(changes):
    steady, world = World(study(rounds=3, **changes)).run(), World(study(rounds=3, **changes))
    while not world.coordinator.finished:
        for name in SITES:
            world.restart(name)
        world.stage()
    assert model_bytes(world.model) == model_bytes(steady.model)
    assert world.states == steady.states


@pytest.mark.parametrize("changes", [{}, {"privacy": PRIVATE}], ids=["open", "private"])
@pytest.mark.parametrize("stage", STAGES[2:])
def test_a_site_that_lost_its_last_state_gives_both_parts_again_to_the_bit(stage, changes):
    world = World(study(rounds=3, **changes))
    world.entropy["birch"] = os.urandom
    world.restart("birch")
    requests = world.until(stage, 1)
    old = world.states["birch"]
    first = world.ask("birch", requests["birch"])
    parts = decode(first, Reply)
    assert isinstance(parts.sum, Answer)
    assert isinstance(parts.keys, Answer) == (stage != "Unmask")
    world.restart("birch")
    world.states["birch"] = old
    assert world.ask("birch", requests["birch"]) == first
    charged = [m.steps for m in memory(world).mechanisms]
    assert charged == ([4] if changes else [])
    for name, request in requests.items():
        world.coordinator.receive(name, first if name == "birch" else world.ask(name, request))
    world.coordinator.close_stage()
    world.run()
    assert contributors(world) == [SITES] * 3


WIDE = {"kind": "mlp", "hidden": [500]}


def masked(world, request, name="birch"):
    """The masked vector in a site's answer."""
    packed = decode(reply_of(world, request, name).sum.body, MaskedInput).packed
    return world.study.fixed_point.ring.unpack(packed, 1 + 2501)


def uniform(world, vector):
    return min(_chances_of_uniform(world.study.fixed_point.ring, vector)) > FALSE_ALARM


@pytest.mark.parametrize("changes", [{}, {"privacy": PRIVATE}], ids=["open", "private"])
def test_an_old_state_and_another_model_or_past_give_a_vector_under_masks_of_its_own(changes):
    """A site that is put back and asked again for something else: the difference of its two answers is noise."""
    world = World(study(rounds=3, model=WIDE, **changes))
    request, old = world.until("MaskedInput", 1)["birch"], world.states["birch"]
    another = encode(Work(model_bytes(build_model(study(seed=9, model=WIDE), 3))))
    ring = world.study.fixed_point.ring
    vectors = []
    for asked_for in (request, with_work(request, another), changed(request, "sum", previous=bytes(32)), request):
        world.states["birch"] = old
        vectors.append(masked(world, asked_for))
    np.testing.assert_array_equal(vectors[0], vectors[3])
    for i in range(3):
        assert uniform(world, vectors[i])
        for j in range(i):
            assert uniform(world, ring.reduce(vectors[i] - vectors[j]))


def read_by_smaller_inboxes(world):
    """A site's state is put back, and it is asked again for its vector of the same sum, each time with one box less.

    The server takes all differences for pairwise masks, waits for the end of the sum, and takes the own mask off too.

    Returns:
        The differences, what the server has then, and the vector that it is after.
    """
    requests, ring, me = world.until("MaskedInput"), world.study.fixed_point.ring, SITES.index("birch")
    old, boxes = world.states["birch"], decode(decode(requests["birch"], Request).sum.body, ShareInbox).boxes
    vectors, real = [], world.sites["birch"]._contribute

    def contribute(*given):
        vector, remembered = real(*given)
        vectors.append(vector.copy())
        return vector, remembered

    def masked_with(shown):
        world.states["birch"] = old
        inbox = encode(ShareInbox({v: boxes[v] for v in sorted(shown)}))
        return masked(world, changed(requests["birch"], "sum", body=inbox)).copy()

    world.sites["birch"]._contribute = contribute
    everything = masked_with(boxes)
    differences = [ring.reduce(everything - masked_with(boxes.keys() - {v})) for v in boxes]
    world.states["birch"] = old
    said = decode(reply_of(world, requests["birch"]).sum.body, MaskedInput)
    assert all((vector == vectors[0]).all() for vector in vectors)
    world.states["birch"] = old
    answers = {name: reply_of(world, request, name) for name, request in world.until("Unmask").items()}
    shares = {
        SITES.index(name): decode(reply.sum.body, UnmaskShares).of_self_mask_seed[me] for name, reply in answers.items()
    }
    seed, _ = recover(shares, world.study.threshold, lambda found: True)
    bound = client.mask_id(said.subject.sum_id(said.terms.session_id), range(len(SITES)))
    bare = ring.reduce(everything - sum(differences))
    add_keystream(bare, client.self_mask_key(seed, bound, me), -1)
    return differences, ring.reduce(bare), vectors[0]


@pytest.mark.parametrize("mode", MODES)
def test_an_old_state_and_smaller_inboxes_give_no_vector_away(mode):
    """Masks depend on who shared: what is left out of one inbox is not the mask that is in the other."""
    world = World(study(rounds=2, model=WIDE, protocol={"mode": mode}))
    differences, left, vector = read_by_smaller_inboxes(world)
    assert len(differences) == 3
    assert all(uniform(world, noise) for noise in (*differences, left))
    assert uniform(world, world.study.fixed_point.ring.reduce(left - vector))


@pytest.mark.parametrize("mode", MODES)
def test_they_would_if_masks_did_not_depend_on_the_inbox(mode, monkeypatch):
    for module in (client, server):
        monkeypatch.setattr(module, "mask_id", lambda sum_id, shared: sum_id)
    world = World(study(rounds=2, model=WIDE, protocol={"mode": mode}))
    _, left, vector = read_by_smaller_inboxes(world)
    np.testing.assert_array_equal(left, world.study.fixed_point.ring.reduce(vector))


def test_an_old_state_draws_for_another_model_afresh():
    """Else the difference of two private updates would be without noise."""
    world, drawn = World(study(rounds=3, privacy=PRIVATE)), []
    request, old = world.until("MaskedInput", 1)["birch"], world.states["birch"]
    real = world.sites["birch"]._contribute

    def contribute(message, remembered, entropy):
        drawn.append(entropy(32))
        return real(message, remembered, entropy)

    world.sites["birch"]._contribute = contribute
    for asked_for in (request, with_work(request, OTHER), request):
        world.states["birch"] = old
        assert isinstance(reply_of(world, asked_for).sum, Answer)
    assert drawn[0] == drawn[2] != drawn[1]


def test_an_old_state_gives_one_pair_of_keys_for_a_number_and_another_for_another():
    world = World(study(rounds=3))
    request, old = world.until("MaskedInput", 1)["birch"], world.states["birch"]
    given = []
    for asked_for in (request, with_work(request, OTHER), changed(request, "keys", round=3)):
        world.states["birch"] = old
        given.append(decode(reply_of(world, asked_for).keys.body, Advertisement))
    assert given[0] == given[1]
    assert len({key for ad in given for key in (ad.channel_key, ad.mask_key)}) == 4


def test_what_comes_after_an_old_state_is_drawn_anew_each_time():
    """Whoever reads an old copy of the state cannot tell what later ones draw."""
    world = World(study(rounds=3))
    world.entropy["birch"] = os.urandom
    world.restart("birch")
    request, old = world.until("MaskedInput", 1)["birch"], world.states["birch"]
    seeds = set()
    for _ in range(3):
        world.states["birch"] = old
        world.ask("birch", request)
        seeds.add(memory(world).seed)
    assert len(seeds) == 3


# --- a server that asks out of turn


def test_a_vector_is_not_given_again_under_the_keys_of_its_round():
    world = World(study(rounds=3, privacy=PRIVATE))
    request = world.until("MaskedInput", 1)["birch"]
    first = reply_of(world, request)
    assert isinstance(first.sum, Answer)
    charged, evaluated = memory(world).mechanisms, len(world.sites["birch"].evaluations)
    for again in (with_work(request, OTHER), changed(request, "sum", previous=bytes(32)), request):
        assert reply_of(world, again) == Reply(sum=REFUSED, keys=REFUSED)
        assert "round 1 comes after round 1: each comes once" in " ".join(world.sites["birch"].log)
    assert memory(world).mechanisms == charged
    assert len(world.sites["birch"].evaluations) == evaluated


def test_keys_serve_one_sum_only_whatever_its_number():
    world = World(study(rounds=3))
    request = changed(world.until("MaskedInput")["birch"], "sum")
    alone = encode(msgspec.structs.replace(decode(request, Request), keys=None))
    assert isinstance(reply_of(world, alone).sum, Answer)
    assert reply_of(world, changed(alone, "sum", round=1)).sum == REFUSED
    assert "round 1 begins, and no keys were agreed for it" in world.sites["birch"].log[-1]
    assert memory(world).keys_state == b""


@pytest.mark.parametrize("number", [0, 1, 2, 3])
@pytest.mark.parametrize("reached", ["AdvertiseKeys", "ShareKeys", "MaskedInput"])
def test_a_sum_without_keys_agreed_for_exactly_it_is_refused_and_costs_nothing(reached, number):
    """The keys of round 1 are not asked for yet, half agreed, or agreed."""
    world = World(study(rounds=4, privacy=PRIVATE))
    contributing = world.until("MaskedInput")["birch"]
    world.until(reached, 1)
    charged, evaluated = memory(world).mechanisms, len(world.sites["birch"].evaluations)
    alone = encode(msgspec.structs.replace(decode(changed(contributing, "sum", round=number), Request), keys=None))
    if (reached, number) == ("AdvertiseKeys", 0) or (reached, number) == ("MaskedInput", 1):
        return  # this is the sum that was due
    assert reply_of(world, alone) == Reply(sum=REFUSED)
    assert memory(world).mechanisms == charged
    assert len(world.sites["birch"].evaluations) == evaluated


def test_keys_for_more_sums_than_the_study_has_are_not_given():
    world = World(study(rounds=1))
    advertise = world.until("AdvertiseKeys")["birch"]
    world.until("ConsistencyCheck")
    assert reply_of(world, changed(advertise, "keys", round=1)).keys == REFUSED
    assert world.sites["birch"].log == ["birch: the study has 1 rounds of training, and all are done"]
    assert memory(world).advertised == 0


def test_keys_of_an_older_number_are_refused_after_a_gap_too():
    world = World(study(rounds=4))
    advertise = world.until("AdvertiseKeys", 1)["birch"]
    late = changed(encode(msgspec.structs.replace(decode(advertise, Request), sum=None)), "keys", round=7)
    assert isinstance(reply_of(world, late).keys, Answer)
    for number in (0, 3, 7):
        assert reply_of(world, changed(late, "keys", round=number, body=b"x")).keys == REFUSED
        assert f"round {number} comes after round 7" in world.sites["birch"].log[-1]
    assert isinstance(reply_of(world, changed(late, "keys", round=8)).keys, Answer)


@pytest.mark.parametrize("stage", STAGES[2:])
@pytest.mark.parametrize("instead", STAGES[2:])
def test_a_part_of_the_sum_out_of_turn_is_refused_costs_nothing_and_leaves_the_keys(stage, instead):
    if stage == instead:
        return
    world = World(study(rounds=3, privacy=PRIVATE))
    requests = {one: world.until(one, 1)["birch"] for one in STAGES[2:] if STAGES.index(one) <= STAGES.index(stage)}
    charged = memory(world).mechanisms
    reply = reply_of(world, changed(requests[stage], "sum", stage=instead))
    assert reply.sum == REFUSED
    assert memory(world).mechanisms == charged
    if stage == "Unmask":
        assert reply.keys is None
    else:
        assert isinstance(reply.keys, Answer)


@pytest.mark.parametrize("stage", ["AdvertiseKeys", "ShareKeys"])
def test_a_refused_part_of_the_keys_leaves_the_sum(stage):
    world = World(study(rounds=3))
    request = world.until(stage, 1)["birch"]
    reply = reply_of(world, changed(request, "keys", round=0))
    assert reply.keys == REFUSED
    assert isinstance(reply.sum, Answer)
    assert memory(world).keys_state == b""
    assert memory(world).sum_state != b""


@pytest.mark.parametrize("stage", STAGES)
def test_an_undecodable_request_is_refused_and_loses_nothing_of_what_is_under_way(stage):
    world = World(study(rounds=3))
    number = 0 if stage in STAGES[:2] else 1
    request = world.until(stage, number)["birch"]
    for garbage in (b"", b"\x01", request[:-1], request + b"\0", b"\x02" + request[1:]):
        assert reply_of(world, garbage) == Reply(sum=REFUSED)
    reply = reply_of(world, request)
    assert REFUSED not in (reply.sum, reply.keys)


# --- a server that gives different models to different sites


class Liar:
    """Gives birch another model than the others, and covers it up: its subject in what it sends is made the others'.

    What everyone signed at the check is shown to all, since nobody unmasks for fewer signatures than the threshold.
    """

    def __init__(self, engine, number):
        self.engine, self.number, self.signed, self.unmasked = engine, number, {}, {}

    def exchange(self, requests):
        requests = {name: decode(request, Request) for name, request in requests.items()}
        running = [r.sum for r in requests.values() if r.sum is not None and r.sum.round == self.number]
        if running and running[0].stage == "Unmask":
            requests = {name: Request(sum=running[0]) for name in SITES}  # birch too, whom the coordinator has dropped
        sent = {name: encode(self.lie(name, request)) for name, request in requests.items()}
        for name, reply in self.engine.exchange(sent):
            yield name, encode(self.cover(name, requests[name], decode(reply, Reply)))

    def lie(self, name, request):
        if request.sum is None or request.sum.round != self.number:
            return request
        if request.sum.stage == "Unmask" and self.signed:
            request = other_part(request, "sum", body=encode(ConfirmationSet(dict(sorted(self.signed.items())))))
        if name != "birch":
            return request
        work = None if request.sum.work is None else OTHER
        return other_part(request, "sum", work=work, work_digest=hashlib.sha256(OTHER).digest())

    def cover(self, name, request, reply):
        if request.sum is None or request.sum.round != self.number:
            return reply
        if request.sum.stage == "ConsistencyCheck":
            self.signed[SITES.index(name)] = decode(reply.sum.body, Confirmation)
        if request.sum.stage == "Unmask":
            self.unmasked[name] = reply.sum
        if name == "birch" and request.sum.stage == "MaskedInput":
            sent = decode(reply.sum.body, MaskedInput)
            subject = msgspec.structs.replace(sent.subject, model_digest=request.sum.work_digest)
            body = memoryview(encode(msgspec.structs.replace(sent, subject=subject)))
            return msgspec.structs.replace(reply, sum=Answer(body))
        return reply


@pytest.mark.parametrize("number", [0, 1])
def test_no_sum_over_different_models_is_opened_and_every_site_sees_which_they_were(number):
    world = World(fedsgd(rounds=3))
    liar = Liar(world.engine, number)
    follow(world, liar)
    assert contributors(world) == [() if r == number else SITES for r in range(3)]
    assert liar.unmasked == dict.fromkeys(SITES, REFUSED)
    digests = [s.subject.model_digest.hex()[:16] for s in liar.signed.values()]
    mine, theirs = digests[1], digests[0]
    assert (digests.count(theirs), mine) == (3, hashlib.sha256(OTHER).hexdigest()[:16])
    for name in OTHERS:
        (line,) = world.sites[name].log
        assert line == f"{name}: birch did not sum what we summed: model {mine} where {theirs} was expected"
    (line,) = world.sites["birch"].log
    assert line == f"birch: ash did not sum what we summed: model {theirs} where {mine} was expected"


def test_a_semi_honest_sum_over_different_models_is_noise():
    world = World(fedsgd(rounds=2, protocol={"mode": "semi-honest"}))
    follow(world, Liar(world.engine, 1))
    assert contributors(world) == [SITES, ()]
    assert "bounds" in world.rounds[1].faults[0]


def test_a_site_that_was_shown_another_past_sums_under_other_masks_and_is_named():
    """The digest of the record before is in the sum's subject: a server cannot keep two transcripts of one study."""
    world = World(fedsgd(rounds=3))
    requests = world.until("MaskedInput", 1)
    requests["birch"] = changed(requests["birch"], "sum", previous=NO_RECORD)
    for name, request in requests.items():
        world.coordinator.receive(name, world.ask(name, request))
    head = world.coordinator.transcript[0].digest.hex()[:16]
    assert world.rounds[1].dropped == {"birch": "sent a wrong message at MaskedInput"}
    (fault,) = world.rounds[1].faults
    assert f"record of the sum before {NO_RECORD.hex()[:16]} where {head} was expected" in fault


# --- a site's policy


STRICT = Policy(smallest_cohort=3, smallest_others=3, semi_honest=True)


@pytest.mark.parametrize("mode", ["active", "semi-honest"])
def test_a_sum_over_fewer_sites_than_a_policy_wants_is_not_confirmed(mode):
    world = World(fedsgd(rounds=5, protocol={"mode": mode}), policy=STRICT)
    follow(world, Faulty(world.engine, (Fault("birch", "MaskedInput", 1),)))
    assert contributors(world) == [SITES, (), (), SITES, SITES]
    shown = MODES[mode][3]
    for record in world.rounds[1:3]:
        assert {record.dropped[name] for name in OTHERS} == {f"refused (policy) at {shown}"}
    for name in OTHERS:
        assert len(world.sites[name].log) == 2
        assert "a sum over 3 sites (ash, cedar, dogwood)" in world.sites[name].log[0]
        assert "for 3 beside this one" in world.sites[name].log[0]


def test_one_site_with_a_stricter_policy_leaves_and_the_others_go_on():
    world = World(fedsgd(rounds=2))
    strict = world.site("birch", policy=Policy(smallest_cohort=3, smallest_others=3))
    world.sites["birch"] = world.engine.sites["birch"] = strict
    follow(world, Faulty(world.engine, (Fault("ash", "MaskedInput", 0),)))
    assert [record.outcome for record in world.rounds[:2]] == ["failed", "failed"]  # three of four must stay
    assert world.rounds[0].dropped["birch"] == "refused (policy) at ConsistencyCheck"
    assert world.sites["cedar"].log == []


HOUR = Policy(longest_session=3600.0)


@pytest.mark.parametrize("later", [3601.0, -61.0])
@pytest.mark.parametrize("stage", STAGES[1:])
def test_a_round_that_is_too_old_is_not_answered_and_its_secrets_are_forgotten(stage, later):
    """By the site's own clock, from its keys on; a clock that was set back says nothing."""
    world = World(study(privacy=PRIVATE), policy=HOUR)
    request = world.until(stage)["birch"]
    charged = memory(world).mechanisms
    assert memory(world).keys_state + memory(world).sum_state != b""
    world.now += later
    reply = reply_of(world, request)
    assert getattr(reply, part_at(stage)) == Refusal("policy")
    assert f"given {later:.0f} seconds ago: the policy allows 0 to 3600" in world.sites["birch"].log[-1]
    assert memory(world).keys_state + memory(world).sum_state == b""
    assert memory(world).mechanisms == charged
    world.now -= later
    assert getattr(reply_of(world, request + b""), part_at(stage)) == Refusal("policy")  # the retry of that request


@pytest.mark.parametrize("later", [3600.0, -60.0])
def test_a_round_just_as_old_as_the_policy_allows_is_answered(later):
    """And a clock that was set right by up to a minute costs no round."""
    world = World(fedsgd(), policy=HOUR)
    world.until("ShareKeys")
    world.now += later
    assert world.run().rounds[0].contributors == SITES


def test_keys_age_while_they_wait_for_their_sum_and_new_ones_are_made_in_the_same_message():
    world = World(fedsgd(rounds=4), policy=HOUR)
    world.until("MaskedInput", 1)
    world.now += 3601.0
    record = world.run().rounds[1]
    assert record.outcome == "failed"
    assert record.dropped == dict.fromkeys(SITES, "refused (policy) at MaskedInput")
    assert contributors(world) == [SITES, (), SITES, SITES]
    assert stages(world)[2] == list(STAGES[1:])


def test_two_sums_over_one_model_that_differ_by_one_site_are_not_both_confirmed():
    world = World(fedsgd(rounds=4), policy=Policy())
    lost = [Fault("ash", "Unmask", 1), Fault("cedar", "Unmask", 1), Fault("birch", "MaskedInput", 2)]
    follow(world, Faulty(world.engine, tuple(lost)))
    assert [record.outcome for record in world.rounds[:4]] == ["opened", "failed", "failed", "failed"]
    assert {world.rounds[2].dropped[name] for name in OTHERS} == {"refused (policy) at ConsistencyCheck"}
    for name in OTHERS:
        assert "differ by birch only" in world.sites[name].log[0]
    assert len({cohort for _, cohort in memory(world, "ash").cohorts}) == 1


# --- the end


def finish(world, head=NO_RECORD):
    return encode(Request(finish=FinishRequest(world.coordinator._work, head)))


def test_everyone_who_is_there_at_the_end_signs_the_last_record():
    world = World(fedsgd(rounds=3)).run(Fault("birch", "Finish"))
    *records, closing = world.coordinator.transcript
    assert [record.round for record in records] == [0, 1, 2]
    assert closing.head == records[-1].digest
    assert set(closing.signatures) == {0, 2, 3}
    assert examine_own(world) == ()
    for earlier, later in itertools.pairwise(records):
        assert later.subject.previous == earlier.digest


@pytest.mark.parametrize("spoil", [lambda body: b"", lambda body: bytes(64), lambda body: bytes(body)[:-1]])
def test_a_site_that_does_not_sign_the_end_is_named_and_not_in_it(spoil):
    world = World(fedsgd())

    def change(name, request, reply):
        if name != "birch" or request.finish is None:
            return reply
        return msgspec.structs.replace(reply, finish=Answer(memoryview(spoil(reply.finish.body))))

    world.engine = Tampering(world.engine, change)
    world.run()
    assert world.rounds[-1].dropped == {"birch": "sent a wrong message at Finish"}
    assert world.rounds[-1].faults == ["birch: did not sign the end of the transcript"]
    assert set(world.coordinator.transcript[-1].signatures) == {0, 2, 3}


@pytest.mark.parametrize("protocol", [{"mode": "semi-honest"}, {"aggregation": "plain"}])
def test_nothing_is_signed_at_the_end_of_a_semi_honest_or_plain_study(protocol):
    world = World(fedsgd(protocol=protocol))
    while world.coordinator.stage != "Finish":
        world.stage()
    for name, request in world.coordinator.requests().items():
        assert reply_of(world, request, name).finish.body == b""
    assert world.run().coordinator.transcript == []


@pytest.mark.parametrize("stage", STAGES)
def test_after_the_finish_a_site_takes_part_in_nothing_and_holds_no_secret(stage):
    world = World(study(rounds=3, privacy=PRIVATE))
    request = world.until(stage, 0 if stage in STAGES[:2] else 1)["birch"]
    head = world.coordinator._head
    signature = reply_of(world, finish(world, head)).finish.body
    assert verify_head(world.identities["birch"].public, signature, world.study.digest, head)
    assert memory(world).keys_state + memory(world).sum_state == b""
    charged, evaluated = memory(world).mechanisms, len(world.sites["birch"].evaluations)
    world.restart("birch")
    reply, message = reply_of(world, request), decode(request, Request)
    assert (reply.sum, reply.keys) == (message.sum and REFUSED, message.keys and REFUSED)
    assert all("the study is finished" in line for line in world.sites["birch"].log)
    assert memory(world).mechanisms == charged
    assert len(world.sites["birch"].evaluations) == 0 < evaluated


def test_a_site_signs_one_end_only():
    """Else a server could leave out the last records for one reader, and show them to another."""
    world = World(fedsgd(rounds=2)).run()
    heads = [record.digest for record in world.coordinator.transcript[:2]]
    again = reply_of(world, finish(world, heads[1])).finish
    assert again == REFUSED or verify_head(
        world.identities["birch"].public, bytes(again.body), world.study.digest, heads[1]
    )
    assert reply_of(world, finish(world, heads[0])).finish == REFUSED


# --- the budget, a round ahead


def budget_for(rounds):
    """An epsilon between the costs of so many rounds and of one more."""
    world = World(study(rounds=rounds + 1, privacy=PRIVATE))
    plan = world.sites["ash"]._plan.mechanism()
    costs = []
    for k in (rounds, rounds + 1):
        mechanisms = (msgspec.structs.replace(plan, steps=plan.steps * k),)
        costs.append(world.sites["ash"].spent(encode(Memory(mechanisms=mechanisms))).epsilon)
    return sum(costs) / 2


def test_a_budget_for_two_rounds_refuses_the_keys_of_a_third_before_anything_is_trained():
    world = World(study(rounds=5, privacy={**PRIVATE, "epsilon": budget_for(2)}))
    requests = world.until("AdvertiseKeys", 2)
    assert [asked(requests["birch"])] == [[("MaskedInput", 1), ("AdvertiseKeys", 2)]]
    reply = reply_of(world, requests["birch"])
    assert isinstance(reply.sum, Answer)  # the round that is paid for
    assert reply.keys == Refusal("budget")
    assert "birch: the budget is epsilon" in world.sites["birch"].log[-1]
    world.run()
    assert [(record.number, record.outcome) for record in world.rounds] == [
        (0, "opened"),
        (1, "opened"),
        (3, "failed"),
        (4, "opened"),
    ]
    assert stages(world)[2] == ["AdvertiseKeys"]
    assert world.coordinator.stopped.startswith("the privacy budget of ash, birch, cedar, dogwood is spent: Advertise")
    for name in SITES:
        assert [e.round for e in world.sites[name].evaluations] == [0, 1, None]
        assert [m.steps for m in memory(world, name).mechanisms] == [4]
    assert examine_own(world) == ()


def test_a_round_is_spent_once_its_state_is_kept_even_if_its_answer_never_leaves():
    world = World(study(rounds=3, privacy={**PRIVATE, "epsilon": budget_for(2)}))
    world.until("MaskedInput", 1)
    world.stage(lost=SITES)
    for name in SITES:
        world.restart(name)
    world.run()
    assert [record.outcome for record in world.rounds] == ["opened", "failed", "failed", "opened"]
    assert [m.steps for m in memory(world).mechanisms] == [4]
    assert world.coordinator.stopped.startswith("the privacy budget of")


def test_refused_parts_cost_nothing():
    world = World(study(rounds=3, privacy=PRIVATE))
    request = world.until("MaskedInput", 1)["birch"]
    charged = memory(world).mechanisms
    for wrong in (
        changed(request, "sum", round=2),
        changed(request, "sum", purpose="standardize"),
        changed(request, "sum", work=OTHER),
        changed(request, "sum", stage="Unmask"),
    ):
        assert reply_of(world, wrong).sum == REFUSED
        assert memory(world).mechanisms == charged
        assert memory(world).trained == 1


def test_a_vector_that_cannot_be_masked_is_charged_all_the_same():
    """The site has trained by then: whoever sees that it refuses has learnt something."""
    world = World(study(rounds=3, privacy=PRIVATE))
    request = world.until("MaskedInput", 1)["birch"]
    for body in (b"", encode(ShareInbox({}))):
        fresh = World(study(rounds=3, privacy=PRIVATE))
        request = fresh.until("MaskedInput", 1)["birch"]
        assert reply_of(fresh, changed(request, "sum", body=body)).sum == REFUSED
        assert [m.steps for m in memory(fresh).mechanisms] == [4]
        assert memory(fresh).sum_state == b""

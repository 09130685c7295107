"""Lies about who is there and who has answered. The honest refuse and send nothing."""

import msgspec
import numpy as np
import pytest

from secagg import BelowThreshold, LocalProtocolError, RemoteProtocolError, wire
from secagg.masking import client, server
from secagg.masking.messages import (
    Confirmation,
    ConfirmationSet,
    KeyDirectory,
    ShareInbox,
    SurvivorSet,
)
from secagg.prg import Label, add_keystream
from tests.secagg.simulation import STAGES, Party, Round, assert_uniform, changed, oracle, refuses

MODES = ("active", "semi-honest")


def only(mapping, keep):
    return {v: mapping[v] for v in keep}


def signed(party, u, survivors, *, label=Label.SIGN_SURVIVORS, bound_to=None):
    """What participant u would say if it signed these survivors."""
    payload = client.survivors_payload(tuple(survivors))
    return Confirmation(party.subject, party.identity[u].sign(label, bound_to or party.sum_id, payload))


# --- too few ---


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("stage", STAGES)
def test_the_server_opens_a_set_of_t_and_no_smaller_one(stage, mode):
    if (stage, mode) == ("ConsistencyCheck", "semi-honest"):
        return
    party = Party(6, mode=mode)
    t = party.session.params.threshold
    for present in (t - 1, t):
        game = Round(party).play(stage)
        for u in range(present):
            game.receive(u, game.answer(u))
        if present < t:
            with pytest.raises(BelowThreshold) as caught:
                game.close()
            assert (caught.value.stage, caught.value.present, caught.value.needed) == (stage, t - 1, t)
        else:
            game.close()
            game.play()
            assert (game.server.total == oracle(party, game.vectors, game.server.survivors)).all()


@pytest.mark.parametrize("mode", MODES)
def test_a_participant_goes_along_with_a_set_of_t_and_no_smaller_one(mode):
    party = Party(6, mode=mode)
    t = party.session.params.threshold

    game = Round(party).play("ShareKeys")
    listed = game.outbox[0].advertisements
    caught = refuses(game, 0, KeyDirectory(only(listed, range(t - 1))), BelowThreshold)
    assert (caught.stage, caught.present, caught.needed) == ("AdvertiseKeys", t - 1, t)
    game.answer(0, KeyDirectory(only(listed, range(t))))

    game = Round(party).play("MaskedInput")
    boxes = game.outbox[0].boxes
    caught = refuses(game, 0, ShareInbox(only(boxes, range(1, t - 1))), BelowThreshold)
    assert (caught.stage, caught.present, caught.needed) == ("ShareKeys", t - 1, t)
    game.answer(0, ShareInbox(only(boxes, range(1, t))))

    game = Round(party).play("ConsistencyCheck" if mode == "active" else "Unmask")
    caught = refuses(game, 0, SurvivorSet(tuple(range(t - 1))), BelowThreshold)
    assert (caught.stage, caught.present, caught.needed) == ("MaskedInput", t - 1, t)
    game.answer(0, SurvivorSet(tuple(range(t))))

    if mode == "active":
        game = Round(party).play("Unmask")
        confirmations = game.outbox[0].confirmations
        caught = refuses(game, 0, ConfirmationSet(only(confirmations, range(t - 1))), BelowThreshold)
        assert (caught.stage, caught.present, caught.needed) == ("ConsistencyCheck", t - 1, t)
        game.answer(0, ConfirmationSet(only(confirmations, range(t))))


# --- sets that are no subset, repeat someone, or leave oneself out ---


@pytest.mark.parametrize("mode", MODES)
def test_someone_off_the_roster_in_the_directory(mode):
    game = Round(Party(4, mode=mode)).play("ShareKeys")
    stranger = Round(Party(5, mode=mode)).play("ShareKeys").outbox[0].advertisements[4]
    fresh = msgspec.structs.replace(stranger, channel_key=b"\x09" + bytes(31), mask_key=b"\x0a" + bytes(31))
    refuses(game, 0, KeyDirectory({**game.outbox[0].advertisements, 4: fresh}), match="4 is not on the roster of 4")


def test_oneself_left_out_of_the_directory():
    game = Round(Party(5, threshold=4)).play("ShareKeys")
    refuses(game, 0, KeyDirectory(only(game.outbox[0].advertisements, range(1, 5))), match="or none")


@pytest.mark.parametrize("mode", MODES)
def test_shares_from_someone_who_did_not_advertise(mode):
    party = Party(5, mode=mode, threshold=4)
    game = Round(party).play("MaskedInput", {4: "AdvertiseKeys"})
    boxes = game.outbox[0].boxes
    refuses(game, 0, ShareInbox({**boxes, 4: boxes[1]}), match="site004, who did not advertise")
    refuses(game, 0, ShareInbox({**boxes, 77: boxes[1]}), match="#77, who did not advertise")


def test_ones_own_box_in_the_inbox():
    game = Round(Party(4)).play("MaskedInput")
    refuses(game, 0, ShareInbox({0: game.outbox[1].boxes[0], **game.outbox[0].boxes}), match="did not advertise")


def after_masking(mode):
    """Five participants, the last gone before ShareKeys; the next message is the set of survivors."""
    party = Party(5, mode=mode, threshold=3 if mode == "semi-honest" else 4)
    return Round(party).play("ConsistencyCheck" if mode == "active" else "Unmask", {4: "ShareKeys"})


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("shown", "says"),
    [
        ((0, 1, 2, 3, 4), "site004, who never shared with us"),
        ((0, 1, 2, 3, 9), "#9, who never shared with us"),
        ((1, 2, 3), "left us out"),
        ((0, 1, 2, 3, 3), "names someone twice"),
        ((3, 2, 1, 0), "not in ascending order"),
        ((0, 0, 1, 2), "names someone twice"),
    ],
)
def test_a_set_of_survivors_that_cannot_be(shown, says, mode):
    refuses(after_masking(mode), 0, SurvivorSet(shown), match=says)


def test_repeating_someone_does_not_make_up_for_too_few():
    game = after_masking("semi-honest")
    refuses(game, 0, SurvivorSet((0, 1, 1, 1)), match="twice")


def test_confirmations_from_outside_the_survivors():
    party = Party(5, threshold=4)
    game = Round(party).play("Unmask", {4: "MaskedInput"})
    strangers = {4: signed(party, 4, range(4))}
    refuses(game, 0, ConfirmationSet(game.outbox[0].confirmations | strangers), match="site004, who are not among")


# --- one peer asked for as alive and as dropped ---


@pytest.mark.parametrize("restarted", [False, True], ids=["running", "restarted"])
def test_two_different_sets_of_survivors_to_two_halves_unmask_for_neither(restarted):
    """The server tells half of the participants that the victim dropped, the others that it is there: with t answers
    of either kind it would have both the victim's masks. Each half's signatures are too few, and the others' do not
    fit. Everything also holds when the participants' processes end in between."""
    victim = 5
    game = Round(Party(6)).play("ConsistencyCheck")
    with_it, without = SurvivorSet(tuple(range(6))), SurvivorSet(tuple(range(5)))
    said = {u: game.answer(u, with_it if u < 3 or u == victim else without) for u in range(6)}
    game.stage = "Unmask"
    for u in range(5):
        if restarted:
            game.states[u] = client.decode_state(wire.encode(game.states[u]))
        theirs = {v: c for v, c in said.items() if (v in (0, 1, 2, victim)) == (u < 3)}
        refuses(game, u, ConfirmationSet(theirs), BelowThreshold)
        others = only(said, range(5))
        refuses(game, u, ConfirmationSet(others), match="may have shown it others")


def test_the_answer_holds_one_kind_of_share_for_each_peer_whatever_is_asked():
    party = Party(6)
    game = Round(party).play("Unmask", {2: "MaskedInput"})
    confirmed = game.outbox[0]
    state = wire.encode(game.states[0])
    first = game.answer(0)
    assert set(first.of_self_mask_seed) == {0, 1, 3, 4, 5}
    assert set(first.of_mask_secret) == {2}
    game.states[0] = client.decode_state(state)  # asked again: the same answer
    assert game.answer(0, ConfirmationSet(only(confirmed.confirmations, [0, 1, 3, 4, 5]))) == first


def test_a_participant_that_signed_one_set_does_not_unmask_for_another_that_all_the_others_signed():
    """All other participants collude with the server and sign the set without the victim."""
    party = Party(6)
    game = Round(party).play("ConsistencyCheck")
    game.answer(0)
    own, lied = signed(party, 0, range(6)), {u: signed(party, u, range(5)) for u in range(1, 5)}
    game.stage = "Unmask"
    refuses(game, 0, ConfirmationSet({0: own, **lied}), match="site001 did not sign the survivors that we were shown")


def test_signatures_for_another_purpose_do_not_confirm():
    party = Party(3)
    game = Round(party).play("Unmask")
    for label in (Label.SIGN_KEYS, Label.SIGN_COMMITMENT):
        wrong = {u: signed(party, u, range(3), label=label) for u in range(3)}
        refuses(game, 0, ConfirmationSet(wrong), match="did not sign the survivors")


def test_signatures_that_are_bound_to_the_session_and_not_to_the_sum_do_not_confirm():
    party = Party(3)
    game = Round(party).play("Unmask")
    wrong = {u: signed(party, u, range(3), bound_to=party.session.id) for u in range(3)}
    refuses(game, 0, ConfirmationSet(wrong), match="did not sign the survivors")


def test_signatures_of_an_earlier_round_do_not_confirm():
    old = Round(Party(4, number=1)).play("Unmask").outbox[0]
    game = Round(Party(4, number=2)).play("Unmask")
    refuses(game, 0, old, match="did not sign the survivors")


def test_an_active_session_does_not_unmask_without_its_consistency_check():
    game = Round(Party(4)).play("ConsistencyCheck")
    with pytest.raises(LocalProtocolError, match="only after its consistency check"):
        client.unmask_semi_honest(game.states[0], game.outbox[0])


def test_a_semi_honest_session_signs_no_survivors():
    party = Party(4, mode="semi-honest")
    game = Round(party).play("Unmask")
    with pytest.raises(LocalProtocolError, match="no consistency check"):
        client.confirm(game.states[0], game.outbox[0], party.identity[0])


# --- the server's side: early, late, twice, from a stranger ---


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("stage", STAGES)
def test_a_second_answer_is_refused_and_the_first_stands(stage, mode):
    if (stage, mode) == ("ConsistencyCheck", "semi-honest"):
        return
    party = Party(4, mode=mode)
    game = Round(party).play(stage)
    replies = {u: game.answer(u) for u in game.outbox}
    for u, reply in replies.items():
        game.receive(u, reply)
    with pytest.raises(RemoteProtocolError, match=r"site001 answered twice") as caught:
        game.receive(1, replies[1])
    assert caught.value.culprits == {"site001"}
    game.close()
    game.play()
    assert (game.server.total == oracle(party, game.vectors, game.server.survivors)).all()


@pytest.mark.parametrize("stage", STAGES[1:])
def test_an_answer_of_someone_who_was_not_asked_is_refused(stage):
    """Whoever is gone from a stage does not come back, and a made-up number is nobody."""
    party = Party(5, threshold=4)
    everyone = Round(party).play(stage)
    late = everyone.answer(4)
    before = STAGES[STAGES.index(stage) - 1]
    game = Round(party).play(stage, {4: before})
    game.stage = stage
    for u, culprit in ((4, "site004"), (9, "#9")):
        with pytest.raises(RemoteProtocolError, match=f"{culprit} answered a request that it was not sent") as caught:
            game.receive(u, late)
        assert caught.value.culprits == {culprit}


def test_keys_from_someone_off_the_roster_are_refused():
    game = Round(Party(4))
    with pytest.raises(RemoteProtocolError, match="#7 answered a request") as caught:
        game.receive(7, game.answer(0))
    assert caught.value.culprits == {"#7"}


def test_a_late_vector_cannot_be_added_to_a_later_stage():
    game = Round(Party(5, threshold=4)).play("MaskedInput")
    late = game.answer(4)
    for u in range(4):
        game.receive(u, game.answer(u))
    game.close()
    before = game.server.total.copy()
    with pytest.raises(LocalProtocolError):
        server.receive_vector(game.server, 4, late)
    assert (game.server.total == before).all()


@pytest.mark.parametrize(
    "spoil", [lambda p: b"", lambda p: p[:-1], lambda p: p + b"\0", lambda p: p[:-1] + b"\xff"], ids=range(4)
)
def test_a_vector_of_another_length_or_form_is_refused_and_leaves_the_sum_alone(spoil):
    party = Party(4)
    game = Round(party).play("MaskedInput")
    replies = {u: game.answer(u) for u in range(4)}
    with pytest.raises(RemoteProtocolError, match="site002 sent no vector of this sum") as caught:
        game.receive(2, changed(replies[2], packed=spoil(replies[2].packed)))
    assert caught.value.culprits == {"site002"}
    for u, reply in replies.items():
        game.receive(u, reply)
    game.close()
    game.play()
    assert (game.server.total == oracle(party, game.vectors, frozenset(range(4)))).all()


def test_a_survivor_that_signs_another_set_is_refused_by_name():
    party = Party(4)
    game = Round(party).play("ConsistencyCheck")
    with pytest.raises(RemoteProtocolError, match="site001 did not sign the survivors") as caught:
        game.receive(1, signed(party, 1, range(3)))
    assert caught.value.culprits == {"site001"}


def test_a_retry_sends_the_identical_vector():
    """Otherwise the difference of two vectors under the same masks would be the difference of the data."""
    game = Round(Party(4)).play("MaskedInput")
    stored = wire.encode(game.states[0])
    first = game.answer(0)
    game.states[0] = client.decode_state(stored)
    assert game.answer(0) == first


def test_sharing_twice_uses_fresh_polynomials_and_a_fresh_seed():
    party = Party(4)
    game = Round(party).play("ShareKeys")
    advertised = game.states[0]
    seeds = set()
    for _ in range(2):
        game.states[0] = advertised
        game.answer(0)
        seeds |= {game.states[0].self_mask_seed, *game.states[0].own_shares}
    assert len(seeds) == 6


def asked_with_every_inbox(party):
    """Participant 0's state is put back and asked again for the same sum, each time with the shares of one less.

    Returns:
        What it sent with everyone's shares; by who was left out, the difference to what it sent then; its vector, and
        the secrets of its state.
    """
    game, ring, d = Round(party).play("MaskedInput"), party.subject.ring, party.subject.dimension
    state, boxes = game.states[0], game.outbox[0].boxes

    def sent(shown):
        game.states[0] = state
        return ring.unpack(game.answer(0, ShareInbox(only(boxes, shown))).packed, d).copy()

    everything = sent(boxes)
    return everything, {v: ring.reduce(everything - sent(boxes.keys() - {v})) for v in boxes}, game.vectors[0], state


def mask(ring, d, key, sign=1):
    """A keystream on zeros."""
    masked = ring.zeros(d)
    add_keystream(masked, key, sign)
    return ring.reduce(masked)


@pytest.mark.parametrize("mode", MODES)
def test_a_state_that_is_asked_twice_with_different_inboxes_gives_no_mask_away(mode):
    """All masks depend on U2: with one member less none of them is the same, and the difference is uniform."""
    d = 1 << 14
    party = Party(6, mode=mode, dimension=d)
    ring, everyone = party.subject.ring, set(range(6))
    everything, differences, vector, state = asked_with_every_inbox(party)
    for v, difference in differences.items():
        left = [difference]
        for bound in (party.sum_id, party.mask_id(), party.mask_id(everyone - {v})):
            key = client.pairwise_key(state.pairwise_secrets[v], bound, 0, v)
            left.append(ring.reduce(difference - mask(ring, d, key, client.mask_sign(0, v))))
        for noise in left:
            assert_uniform(noise >> np.uint32(16), 16)
            assert_uniform(noise & np.uint32(15), 16)
    own = client.self_mask_key(state.self_mask_seed, party.mask_id(), 0)  # as after unmasking
    bare = ring.reduce(everything - sum(differences.values()) - mask(ring, d, own))
    assert_uniform(ring.reduce(bare - vector) >> np.uint32(16), 16)


@pytest.mark.parametrize("mode", MODES)
def test_it_would_give_away_every_mask_and_its_vector_if_they_did_not_depend_on_the_inbox(mode, monkeypatch):
    """The same attack, on masks that know their sum only."""
    monkeypatch.setattr(client, "mask_id", lambda sum_id, shared: sum_id)
    d = 1 << 14
    party = Party(6, mode=mode, dimension=d)
    ring = party.subject.ring
    everything, differences, vector, state = asked_with_every_inbox(party)
    for v, difference in differences.items():
        key = client.pairwise_key(state.pairwise_secrets[v], party.sum_id, 0, v)
        assert (difference == mask(ring, d, key, client.mask_sign(0, v))).all()
    own = client.self_mask_key(state.self_mask_seed, party.sum_id, 0)
    assert (ring.reduce(everything - sum(differences.values()) - mask(ring, d, own)) == vector).all()


# --- what is learnt ---


def test_a_sum_that_did_not_open_stays_masked():
    """Below the threshold at the last step the server holds t - 1 answers; nothing it can compute is the sum."""
    party = Party(4)
    game = Round(party).play("Unmask")
    for u in range(2):
        game.receive(u, game.answer(u))
    with pytest.raises(BelowThreshold):
        game.close()
    left = party.subject.ring.reduce(game.server.total.copy())
    assert (left != oracle(party, game.vectors, frozenset(range(4)))).all()


def test_colluders_and_the_server_see_only_the_sum_of_two_honest_participants():
    """Two of four collude with the server and take off everything they know. What is left of each honest vector is
    uniform over the ring; only the two together give their sum."""
    d = 1 << 14
    party = Party(4, dimension=d, bits=20)
    ring, bound = party.subject.ring, party.mask_id()
    vectors = {u: np.full(d, 1000 * (u + 1), np.uint32) for u in range(4)}
    game = Round(party, vectors).play("MaskedInput")
    seeds = {u: game.states[u].self_mask_seed for u in (0, 1)}
    colluders = {w: game.states[w].pairwise_secrets for w in (2, 3)}
    bare = {}
    for u in (0, 1):
        bare[u] = ring.unpack(game.answer(u).packed, d)
        add_keystream(bare[u], client.self_mask_key(seeds[u], bound, u), -1)  # as after unmasking
        for w, secrets in colluders.items():
            add_keystream(bare[u], client.pairwise_key(secrets[u], bound, u, w), -client.mask_sign(u, w))
        assert_uniform(ring.reduce(bare[u]) >> np.uint32(16), 16)
        assert_uniform(bare[u] & np.uint32(15), 16)
    assert (ring.reduce(bare[0] + bare[1]) == 3000).all()

"""The whole round: the opened sum is the survivors' sum bit for bit, or nothing at all."""

import random
from itertools import combinations

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from secagg import (
    BelowThreshold,
    LocalProtocolError,
    Params,
    RemoteProtocolError,
    Session,
    Subject,
    least_threshold,
    wire,
)
from secagg.keys import AgreementKey
from secagg.masking import client, server
from secagg.masking.params import MAX_DIMENSION, Terms, differences
from secagg.prg import add_keystream
from tests.secagg.simulation import STAGES, Party, Round, assert_uniform, changed, every_drop_out, oracle, run

MODES = ("active", "semi-honest")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("n", [3, 4, 5, 6])
def test_every_combination_of_drop_outs_gives_the_exact_sum_or_below_threshold(n, mode):
    """All (stages + 1)^n assignments of "drops at this stage, or never" to participants; clients are bytes between
    steps. A round that ends at a stage stands for everything that might have happened after it."""
    party = Party(n, mode=mode, dimension=3)
    vectors, threshold = party.vectors(), party.session.params.threshold
    stages = [s for s in STAGES if mode == "active" or s != "ConsistencyCheck"]
    covered = 0
    for game, answered, error in every_drop_out(Round(party, vectors)):
        if error is None:
            covered += 1
            assert len(answered) >= threshold
            assert isinstance(game.server, server.Opened)
            assert game.server.suspects == frozenset()
            assert (game.server.total == oracle(party, vectors, game.server.survivors)).all()
        else:
            covered += (len(stages) - stages.index(game.stage)) ** len(answered)
            assert len(answered) < threshold
            assert (error.stage, error.present, error.needed) == (game.stage, len(answered), threshold)
            assert str(threshold) in str(error)
    assert covered == (len(stages) + 1) ** n


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_survivors_are_those_who_sent_a_vector_and_their_sum_is_exact(data):
    mode = data.draw(st.sampled_from(MODES))
    n = data.draw(st.integers(3, 9))
    threshold = data.draw(st.integers(least_threshold(n, mode), n))
    party = Party(n, mode=mode, threshold=threshold, dimension=data.draw(st.integers(1, 9)))
    vectors = party.vectors(data.draw(st.integers(0, 2**32)))
    gone = data.draw(st.sets(st.integers(0, n - 1), max_size=3))
    drop = {u: data.draw(st.sampled_from(STAGES)) for u in gone}
    alive = {s: n - sum(STAGES.index(d) <= STAGES.index(s) for d in drop.values()) for s in STAGES}
    if alive["Unmask"] < threshold:
        with pytest.raises(BelowThreshold):
            run(party, vectors, drop)
        return
    opened = run(party, vectors, drop)
    assert opened.survivors == {u for u in range(n) if STAGES.index(drop.get(u, "Unmask")) > 2}
    assert (opened.total == oracle(party, vectors, opened.survivors)).all()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("bits", [1, 20, 26, 32, 36, 63, 64])
def test_the_sum_is_exact_in_every_ring(bits, mode):
    party = Party(5, mode=mode, bits=bits, dimension=257, threshold=4)
    vectors = party.vectors(bits)
    opened = run(party, vectors, {1: "MaskedInput"})
    assert opened.total.dtype == party.subject.ring.dtype
    assert (opened.total == oracle(party, vectors, frozenset({0, 2, 3, 4}))).all()


def test_a_vector_longer_than_one_block_of_keystream_sums_exactly():
    party = Party(3, threshold=3, dimension=150_001, bits=32)
    vectors = party.vectors()
    assert (run(party, vectors).total == sum(vectors.values())).all()


@pytest.mark.parametrize("mode", MODES)
def test_the_order_of_arrival_changes_nothing(mode):
    party = Party(6, mode=mode, threshold=5)
    vectors = party.vectors()
    outcomes = []
    for seed in range(4):
        for u in party.identity:  # the same randomness each time
            party.entropy[u] = Party(6).entropy[u]
        game, said = Round(party, vectors), []
        while game.stage is not None:
            replies = {u: game.answer(u) for u in game.outbox if not (u == 2 and game.stage == "MaskedInput")}
            for u in random.Random(seed).sample(sorted(replies), len(replies)):
                game.receive(u, replies[u])
            game.close()
            said.append([(u, wire.encode(message)) for u, message in game.outbox.items()])
        outcomes.append((said, game.server.total.tolist(), game.server.survivors))
    assert all(outcome == outcomes[0] for outcome in outcomes)


@pytest.mark.parametrize("bits", [4, 20, 36])
def test_a_masked_vector_alone_is_uniform_over_the_whole_ring(bits):
    party = Party(3, dimension=1 << 15, bits=bits)
    game = Round(party, {u: party.subject.ring.zeros(1 << 15) for u in range(3)}).play("MaskedInput")
    y = party.subject.ring.unpack(game.answer(0).packed, 1 << 15)
    assert_uniform(y & y.dtype.type(15), 16)
    assert_uniform(y >> y.dtype.type(bits - 4), 16)


def test_the_servers_total_before_unmasking_is_not_the_sum():
    party = Party(4, dimension=1 << 15, bits=20)
    game = Round(party).play("Unmask")
    total = party.subject.ring.reduce(game.server.total.copy())
    error = (total - oracle(party, game.vectors, frozenset(range(4))).astype(np.uint32)) & np.uint32(2**20 - 1)
    assert_uniform(error >> 16, 16)


@pytest.mark.parametrize(("u", "v"), [(0, 1), (0, 2), (1, 2)])
def test_pairwise_masks_cancel_and_self_masks_are_what_is_left(u, v):
    """The sign: the larger number adds, the smaller subtracts."""
    assert client.mask_sign(u, v) == -1
    assert client.mask_sign(v, u) == 1


def test_without_its_self_mask_a_vector_is_still_hidden_by_the_pairwise_ones_and_without_those_by_its_self_mask():
    party = Party(3, dimension=1 << 14, bits=32)
    game = Round(party, {u: party.subject.ring.zeros(1 << 14) for u in range(3)}).play("MaskedInput")
    state, y = game.states[0], party.subject.ring.unpack(game.answer(0).packed, 1 << 14)
    bare = y.copy()
    add_keystream(bare, client.self_mask_key(state.self_mask_seed, party.mask_id(), 0), -1)
    assert_uniform(bare >> 28, 16)
    bare = y.copy()
    for v, secret in state.pairwise_secrets.items():
        add_keystream(bare, client.pairwise_key(secret, party.mask_id(), 0, v), -client.mask_sign(0, v))
    assert_uniform(bare >> 28, 16)


def test_a_pairwise_secret_and_its_key_are_the_same_for_both_and_others_for_every_pair_session_and_subject():
    own, other, session = AgreementKey(b"\1" * 32), AgreementKey(b"\2" * 32), bytes(32)
    secret = client.pairwise_secret(own, other.public, session, 1, 2)
    assert secret == client.pairwise_secret(other, own.public, session, 2, 1)
    for of_session, u, v in ((session, 1, 3), (session, 0, 2), (b"\1" * 32, 1, 2)):
        assert secret != client.pairwise_secret(own, other.public, of_session, u, v)
    key = client.pairwise_key(secret, session, 1, 2)
    assert key == client.pairwise_key(secret, session, 2, 1)
    assert key != secret
    for of_sum, u, v in ((session, 1, 3), (session, 0, 2), (b"\1" * 32, 1, 2)):
        assert key != client.pairwise_key(secret, of_sum, u, v)


def test_a_commitment_is_for_one_seed_session_and_participant():
    made = [
        (bytes(32), bytes(32), 0),
        (b"\1" * 32, bytes(32), 0),
        (bytes(32), b"\1" * 32, 0),
        (bytes(32), bytes(32), 1),
    ]
    assert len({client.commitment(*each) for each in made}) == 4


def test_what_is_signed_about_survivors_does_not_depend_on_their_order():
    assert client.survivors_payload((2, 300, 1)) == client.survivors_payload((1, 2, 300))
    assert client.survivors_payload((1, 2)) != client.survivors_payload((1, 2, 300))


def test_masking_leaves_the_callers_vector_alone():
    party = Party(3)
    game = Round(party).play("MaskedInput")
    before = {u: v.copy() for u, v in game.vectors.items()}
    game.play()
    assert all((game.vectors[u] == before[u]).all() for u in before)


@pytest.mark.parametrize(
    "vector",
    [
        np.zeros(4, np.uint32),
        np.zeros(5, np.uint64),
        np.zeros(5, np.int32),
        np.zeros(5, np.float32),
        np.zeros((5, 1), np.uint32),
        np.zeros(10, np.uint32)[::2],
        [0] * 5,
    ],
    ids=["short", "wider", "signed", "float", "matrix", "strided", "list"],
)
def test_a_vector_of_another_shape_or_type_is_refused_before_anything_is_masked(vector):
    game = Round(Party(3)).play("MaskedInput")
    with pytest.raises(LocalProtocolError, match="expected"):
        client.mask_input(game.states[0], game.outbox[0], game.subject, vector)


def test_a_state_drops_the_secrets_that_are_spent():
    game = Round(Party(4)).play("ShareKeys")
    spent = {0: [game.states[0].channel_secret, game.states[0].mask_secret]}
    game.play("MaskedInput")
    state = game.states[0]
    assert not any(secret in msgspec.msgpack.encode(state) for secret in spent[0])
    spent[0] += [state.self_mask_seed, *state.pairwise_secrets.values(), *state.inbound_keys.values()]
    game.play("ConsistencyCheck")
    assert not any(secret in msgspec.msgpack.encode(game.states[0]) for secret in spent[0])
    spent[0] += [share for pair in game.states[0].held.values() for share in pair]
    game.play()
    assert isinstance(game.states[0], client.Finished)
    assert not any(secret in msgspec.msgpack.encode(game.states[0]) for secret in spent[0])


@pytest.mark.parametrize(
    ("n", "mode", "least"),
    [
        (3, "active", 3),
        (4, "active", 3),
        (6, "active", 5),
        (100, "active", 67),
        (3, "semi-honest", 2),
        (6, "semi-honest", 4),
    ],
)
def test_the_threshold_is_at_least_what_the_mode_needs(n, mode, least):
    roster = Party(n, mode=mode).session.params.roster
    assert least_threshold(n, mode) == least
    for threshold in (least, n):
        assert Params(roster, threshold, mode).threshold == threshold
    for threshold in (0, 1, least - 1, n + 1):
        with pytest.raises(LocalProtocolError, match=f"must be {least} to {n}, got {threshold}"):
            Params(roster, threshold, mode)


def test_another_suite_is_refused():
    with pytest.raises(LocalProtocolError, match="suite"):
        Params(Party(3).session.params.roster, 3, "active", "NULL")


def test_a_mode_that_is_neither_is_refused():
    with pytest.raises(LocalProtocolError, match="mode"):
        Params(Party(4).session.params.roster, 3, "Active")


@pytest.mark.parametrize(
    "change",
    [{"round": -1}, {"round": 1 << 62}, {"context": bytes(31)}, {"context": bytes(33)}],
    ids=str,
)
def test_a_session_that_makes_no_sense_is_refused(change):
    with pytest.raises(LocalProtocolError):
        changed(Party(3).session, **change)


@pytest.mark.parametrize(
    "change",
    [
        {"dimension": 0},
        {"dimension": MAX_DIMENSION + 1},
        {"ring_bits": 0},
        {"ring_bits": 65},
        {"model_digest": bytes(31)},
        {"model_digest": bytes(33)},
        {"previous": b""},
    ],
    ids=str,
)
def test_a_subject_that_makes_no_sense_is_refused(change):
    with pytest.raises(LocalProtocolError):
        changed(Party(3).subject, **change)


@pytest.mark.parametrize(
    "change",
    [
        {"round": 2},
        {"context": b"\1" * 32},
        {"params": Party(4, threshold=4).session.params},
        {"params": Party(4, mode="semi-honest").session.params},
        {"params": Party(5, threshold=4).session.params},
    ],
    ids=["round", "context", "threshold", "mode", "roster"],
)
def test_whatever_differs_makes_another_session_id_and_another_sum_id(change):
    party = Party(4)
    other = changed(party.session, **change)
    assert other.id != party.session.id
    assert party.subject.sum_id(other.id) != party.sum_id
    assert (Party(4).session.id, Party(4).sum_id) == (party.session.id, party.sum_id)


@pytest.mark.parametrize(
    "change",
    [
        {"purpose": "standardize"},
        {"model_digest": b"\1" * 32},
        {"previous": b"\1" * 32},
        {"dimension": 6},
        {"ring_bits": 21},
    ],
    ids=str,
)
def test_whatever_differs_makes_another_sum_id(change):
    party = Party(4)
    assert changed(party.subject, **change).sum_id(party.session.id) != party.sum_id


def test_masks_are_bound_to_the_sum_and_to_the_set_of_those_who_shared():
    party = Party(6)
    other = changed(party.subject, purpose="standardize").sum_id(party.session.id)
    sets = [shared for size in range(7) for shared in combinations(range(6), size)]
    ids = {client.mask_id(sum_id, shared) for sum_id in (party.sum_id, other) for shared in sets}
    assert len(ids) == 2 * len(sets)
    assert not ids & {party.sum_id, other}
    for shared in sets:
        assert client.mask_id(party.sum_id, reversed(shared)) == party.mask_id(shared)
        assert client.mask_id(party.sum_id, dict.fromkeys(shared)) == party.mask_id(shared)


def test_every_field_of_a_session_and_of_a_subject_is_in_the_tests_above():
    """A field that someone adds is to be in the digests too."""
    assert Session.__struct_fields__ == ("params", "context", "round")
    assert Terms.__struct_fields__ == ("params", "context", "round")
    assert Subject.__struct_fields__ == ("purpose", "model_digest", "previous", "dimension", "ring_bits")


def test_model_and_past_do_not_stand_for_each_other():
    """Two digests side by side: exchanged, they are another subject."""
    party = Party(4)
    one, other = (
        changed(party.subject, model_digest=a * 32, previous=b * 32) for a, b in ((b"\1", b"\2"), (b"\2", b"\1"))
    )
    assert one.sum_id(party.session.id) != other.sum_id(party.session.id)


def test_a_session_has_the_id_of_its_terms():
    session = Party(4).session
    assert session.terms == Terms(session.params.digest, session.context, session.round)
    assert session.id == session.terms.session_id


def test_what_differs_is_told_with_both_digests_and_what_does_not_is_not():
    party = Party(4)
    ours, theirs = party.subject, changed(party.subject, model_digest=b"\xab" * 32, dimension=7)
    assert differences(ours, ours) == ""
    told = "model abababababababab where 0000000000000000 was expected, dimension 7 where 5 was expected"
    assert differences(theirs, ours) == told
    terms = party.session.terms
    other = changed(terms, params=b"\1" * 32, context=b"\2" * 32, round=8)
    assert differences(other, terms) == (
        f"roster, threshold or mode 0101010101010101 where {terms.params.hex()[:16]} was expected, "
        "study configuration 0202020202020202 where 0000000000000000 was expected, round 8 where 1 was expected"
    )


@pytest.mark.parametrize("bad", [-1, 3])
def test_a_participant_off_the_roster_cannot_begin(bad):
    party = Party(3)
    with pytest.raises(LocalProtocolError, match="not on a roster"):
        client.advertise(party.session, bad, party.identity[0], party.entropy[0])


def test_a_participant_with_another_identity_than_the_rosters_cannot_begin():
    party = Party(3)
    with pytest.raises(LocalProtocolError, match="another key"):
        client.advertise(party.session, 0, party.identity[1], party.entropy[0])


def test_opening_leaves_the_state_as_it_was_when_it_fails():
    party = Party(5, threshold=4)
    game = Round(party).play("Unmask")
    answers = {u: game.answer(u) for u in game.outbox}
    spoiled = msgspec.structs.replace(answers[0], of_self_mask_seed={**answers[0].of_self_mask_seed, 3: bytes(33)})
    for u, answer in {**answers, 0: spoiled}.items():
        if u != 4:
            game.receive(u, answer)
    with pytest.raises(RemoteProtocolError, match="do not lead to the secret"):
        game.close()
    game.receive(4, answers[4])
    game.close()
    assert game.server.suspects == {0}
    assert (game.server.total == oracle(party, game.vectors, frozenset(range(5)))).all()

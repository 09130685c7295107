"""Another model, past, purpose, configuration or set of rules at some of the participants than at the others.

The digests of all of it are in the keys of the masks: vectors of different models never add up to anything that opens.
Whoever is honest says which digests differ, and a server that looks away gains nothing.
"""

import msgspec
import numpy as np
import pytest

from secagg import BelowThreshold, RemoteProtocolError, Subject
from secagg.masking import client, server
from secagg.masking.messages import Confirmation, ConfirmationSet, KeyDirectory
from secagg.prg import add_keystream
from tests.secagg.simulation import Party, Round, assert_uniform, changed, oracle, refuses

MODES = ("active", "semi-honest")


# --- another study, roster, threshold or round: the keys are for another session ---


def other_sessions(mode):
    party = Party(4, mode=mode)
    return {
        "study configuration": changed(party.session, context=b"\1" * 32),
        "round": changed(party.session, round=2),
        "threshold": Party(4, mode=mode, threshold=4).session,
        "roster": Party(5, mode=mode, threshold=4).session,
        "mode": Party(4, mode="semi-honest" if mode == "active" else "active", threshold=3).session,
    }


def told(what, theirs, ours):
    """What a message says that differs, with both digests."""
    if what == "round":
        return f"another session: round {theirs.round} where {ours.round} was expected$"
    digests = (theirs.context, ours.context)
    if what != "study configuration":
        what, digests = "roster, threshold or mode", (theirs.params.digest, ours.params.digest)
    theirs, ours = (digest.hex()[:16] for digest in digests)
    return f"another session: {what} {theirs} where {ours} was expected$"


every_other_session = pytest.mark.parametrize("what", other_sessions("active"))


@pytest.mark.parametrize("mode", MODES)
@every_other_session
def test_a_participant_with_another_session_is_found_at_its_keys(what, mode):
    party, other = Party(4, mode=mode), other_sessions(mode)[what]
    game = Round(party)
    message = game.answer(1, session=other)
    says = f"site001 sent a message of {told(what, other, party.session)}"
    with pytest.raises(RemoteProtocolError, match=says) as caught:
        game.receive(1, message)
    assert caught.value.culprits == {"site001"}
    assert game.server.advertisements == {}


@pytest.mark.parametrize("mode", MODES)
@every_other_session
def test_a_server_that_gives_one_participant_another_session_is_found_by_all(what, mode):
    """The server keeps quiet about the session that does not fit: the participants do not."""
    party, other = Party(4, mode=mode), other_sessions(mode)[what]
    game = Round(party)
    said = {u: game.answer(u, session=other if u == 1 else None) for u in range(4)}
    game.stage = "ShareKeys"
    by_the_others, by_the_one = told(what, other, party.session), told(what, party.session, other)
    if what == "mode":  # signatures where there are none, or none where there are: that is found first
        by_the_others, by_the_one = ("signed", "signed")
    for u in (0, 2, 3):
        refuses(game, u, KeyDirectory(said), match=f"site001 are .*{by_the_others}")
    refuses(game, 1, KeyDirectory(said), match=f"site000 are .*{by_the_one}")


@every_other_session
def test_a_server_that_makes_another_session_look_right_is_found_by_the_signatures(what):
    """It writes into each copy of the keys the session that the reader expects."""
    party, other = Party(4), other_sessions("active")[what]
    game = Round(party)
    said = {u: game.answer(u, session=other if u == 1 else None) for u in range(4)}
    game.stage = "ShareKeys"
    for u in range(4):
        terms = said[u].terms
        dressed_up = KeyDirectory({v: changed(ad, terms=terms) for v, ad in said.items()})
        name = "site000" if u == 1 else "site001"
        refuses(game, u, dressed_up, match=f"{name} are (not signed by it|signed, and a semi-honest)")


@pytest.mark.parametrize("what", ["study configuration", "round", "threshold", "roster"])
def test_without_signatures_another_session_that_is_made_to_look_right_is_found_at_the_shares(what):
    party = Party(4, mode="semi-honest")
    game, other = Round(party), other_sessions("semi-honest")[what]
    said = {u: game.answer(u, session=other if u == 1 else None) for u in range(4)}
    for u, message in said.items():
        game.receive(u, changed(message, terms=party.session.terms))
    game.close()
    for u in range(4):
        terms = (other if u == 1 else party.session).terms
        dressed_up = KeyDirectory({v: changed(ad, terms=terms) for v, ad in said.items()})
        game.receive(u, changed(game.answer(u, dressed_up), terms=party.session.terms))
    game.close()
    for u in range(4):
        refuses(game, u, None, match="do not open")


# --- another model, past, purpose or shape: the keys are for one session, the vectors of different subjects ---

OTHERS = {
    "model": {"model_digest": b"\xab" * 32},
    "record of the sum before": {"previous": b"\xcd" * 32},
    "purpose": {"purpose": "standardize"},
    "dimension": {"dimension": 6},
    "bits of the ring": {"ring_bits": 21},
}
SAYS = {
    "model": ("model abababababababab where 0000000000000000", "model 0000000000000000 where abababababababab"),
    "record of the sum before": (
        "record of the sum before cdcdcdcdcdcdcdcd where 0000000000000000",
        "record of the sum before 0000000000000000 where cdcdcdcdcdcdcdcd",
    ),
    "purpose": ("purpose 'standardize' where 'train'", "purpose 'train' where 'standardize'"),
    "dimension": ("dimension 6 where 5", "dimension 5 where 6"),
    "bits of the ring": ("bits of the ring 21 where 20", "bits of the ring 20 where 21"),
}
every_other_subject = pytest.mark.parametrize("what", OTHERS)
every_minority = pytest.mark.parametrize("misled", [{2}, {1, 4}, {0, 1, 2}], ids=["one", "a minority", "half"])


def misled_round(party, misled, other):
    """A round whose masked vectors are due, and what everyone answers: the misled of another subject."""
    game = Round(party).play("MaskedInput")
    theirs = party.at(party.session.round)
    theirs.subject = other
    game.vectors = {u: (theirs.vectors() if u in misled else game.vectors)[u] for u in game.vectors}
    return game, {u: game.answer(u, subject=other if u in misled else None) for u in game.outbox}


@pytest.mark.parametrize("mode", MODES)
@every_minority
@every_other_subject
def test_an_honest_server_refuses_vectors_of_another_subject_by_name_and_sums_the_others(what, misled, mode):
    party = Party(6, mode=mode)
    game, said = misled_round(party, misled, changed(party.subject, **OTHERS[what]))
    for u, message in said.items():
        if u in misled:
            before = game.server.total.copy()
            says = f"site00{u} did not sum what was asked for: {SAYS[what][0]} was expected$"
            with pytest.raises(RemoteProtocolError, match=says) as caught:
                game.receive(u, message)
            assert caught.value.culprits == {f"site00{u}"}
            assert (game.server.total == before).all()
        else:
            game.receive(u, message)
    if 6 - len(misled) < party.session.params.threshold:
        with pytest.raises(BelowThreshold):
            game.close()
        return
    game.close()
    game.play()
    assert game.server.survivors == set(range(6)) - misled
    assert (game.server.total == oracle(party, game.vectors, game.server.survivors)).all()


def take_anyway(game, u, message):
    """What a server does that adds a vector whatever it is of, as far as it fits."""
    theirs = message.subject
    vector = theirs.ring.unpack(message.packed, theirs.dimension)[: game.subject.dimension]
    game.server.total[: len(vector)] += vector
    game.server = msgspec.structs.replace(game.server, survivors=game.server.survivors | {u})


def a_round_of_two_subjects(party, misled, other):
    """A round in which the server has added up vectors of two subjects and had the survivors signed by everyone."""
    game, said = misled_round(party, misled, other)
    for u, message in said.items():
        take_anyway(game, u, message)
    game.close()
    confirmed = {u: game.answer(u) for u in game.outbox}
    game.stage = "Unmask"
    return game, confirmed


@every_minority
@every_other_subject
def test_a_server_that_adds_them_up_anyway_is_refused_by_everyone_on_either_side(what, misled):
    party = Party(6)
    game, confirmed = a_round_of_two_subjects(party, misled, changed(party.subject, **OTHERS[what]))
    for u in range(6):
        says = SAYS[what][u in misled]
        first = min(v for v in range(6) if (v in misled) != (u in misled))
        refuses(
            game, u, ConfirmationSet(confirmed), match=f"site00{first} did not sum what we summed: {says} was expected$"
        )


@every_minority
def test_a_server_that_makes_the_other_subject_look_right_is_refused_too(misled):
    """It writes into each confirmation the subject that the reader expects; the signature is over the other."""
    party = Party(6)
    game, confirmed = a_round_of_two_subjects(party, misled, changed(party.subject, **OTHERS["model"]))
    for u in range(6):
        dressed_up = {v: Confirmation(confirmed[u].subject, c.signature) for v, c in confirmed.items()}
        first = min(v for v in range(6) if (v in misled) != (u in misled))
        refuses(game, u, ConfirmationSet(dressed_up), match=f"site00{first} did not sign the survivors")


@every_minority
def test_a_server_that_keeps_the_other_sides_confirmations_back_has_too_few_or_opens_noise(misled):
    """Where the misled are fewer than n - t, those on one side alone are t, and each of them is honest with the server:
    it gets all self-mask seeds, opens, and has the masks between the two sides left over."""
    d = 1 << 14
    party = Party(6, dimension=d)
    game, confirmed = a_round_of_two_subjects(party, misled, changed(party.subject, **OTHERS["model"]))
    t, honest = party.session.params.threshold, set(range(6)) - misled
    for side in (honest, misled):
        shown = ConfirmationSet({u: confirmed[u] for u in sorted(side)})
        for u in side:
            if len(side) < t:
                refuses(game, u, shown, BelowThreshold)
    if len(honest) < t:
        return
    game.stage = "ConsistencyCheck"
    for u in honest:
        game.receive(u, confirmed[u])
    game.close()
    game.play()
    assert game.server.survivors == set(range(6))
    assert_is_noise(game.server.total, party)
    assert (game.server.total != oracle(party, game.vectors, game.server.survivors)).mean() > 0.99


def assert_is_noise(vector, party):
    ring = party.subject.ring
    values = ring.reduce(vector.copy())
    assert_uniform(values >> np.uint32(ring.bits - 4), 16)
    assert_uniform(values & np.uint32(15), 16)


def opened_with_every_seed(party, misled, other):
    """What is left of sums over two subjects for someone who has every self-mask seed: of all, of either side."""
    d, ring = party.subject.dimension, party.subject.ring
    game = Round(party, {u: np.full(d, 100 + u, ring.dtype) for u in party.identity}).play("MaskedInput")
    seeds = {u: state.self_mask_seed for u, state in game.states.items()}
    bare = {}
    for u in game.outbox:
        message = game.answer(u, subject=other if u in misled else None)
        bare[u] = ring.unpack(message.packed, d)
        bound = client.mask_id(message.subject.sum_id(party.session.id), game.states)
        add_keystream(bare[u], client.self_mask_key(seeds[u], bound, u), -1)
    everyone = set(bare)
    return {
        side: (ring.reduce(sum(bare[u] for u in members)), sum(100 + u for u in members))
        for side, members in {"all": everyone, "honest": everyone - misled, "misled": misled}.items()
    }


@every_minority
def test_with_every_self_mask_seed_a_sum_over_two_models_does_not_open(misled):
    party = Party(6, dimension=1 << 14)
    left = opened_with_every_seed(party, misled, changed(party.subject, **OTHERS["model"]))
    for vector, wanted in left.values():
        assert_is_noise(vector, party)
        assert (vector != wanted).mean() > 0.99


@every_minority
def test_it_would_open_if_the_masks_did_not_depend_on_the_model(misled, monkeypatch):
    """The same attack, on masks that know their session only."""
    monkeypatch.setattr(Subject, "sum_id", lambda self, session_id: session_id)
    party = Party(6, dimension=1 << 14)
    left = opened_with_every_seed(party, misled, changed(party.subject, **OTHERS["model"]))
    total, wanted = left["all"]
    assert (total == wanted).all()


LINES = {
    "x\n\x1b[31msite000 is a liar": r"'x\n\x1b[31msite000 is a liar'",
    "\u202eniart\u2028\x00": r"'\u202eniart\u2028\x00'",
    "x' where 'y": "\"x' where 'y\"",
}


@pytest.mark.parametrize("purpose", LINES, ids=ascii)
def test_a_participant_cannot_write_lines_of_its_own_into_the_servers_log(purpose):
    """The purpose comes from the other side: it stands in the text in quotes, without what is not printable."""
    party = Party(4)
    game = Round(party).play("MaskedInput")
    says = f"purpose {LINES[purpose]} where 'train' was expected"
    with pytest.raises(RemoteProtocolError) as caught:
        game.receive(1, game.answer(1, subject=changed(party.subject, purpose=purpose)))
    assert str(caught.value) == f"site001 did not sum what was asked for: {says}"
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("purpose", LINES, ids=ascii)
def test_nor_into_the_log_of_another_participant(purpose):
    party = Party(4)
    game, confirmed = a_round_of_two_subjects(party, {1}, changed(party.subject, purpose=purpose))
    told = refuses(game, 0, ConfirmationSet(confirmed))
    assert str(told) == f"site001 did not sum what we summed: purpose {LINES[purpose]} where 'train' was expected"


# --- one set of keys used for two sums ---


def test_vectors_of_one_participant_under_two_subjects_have_independent_masks():
    """A site is not to mask twice under the same keys. Where it is made to by a server that begins two sums, the
    difference of the two vectors says nothing about the difference of the data."""
    d = 1 << 14
    party = Party(4, dimension=d)
    game = Round(party).play("MaskedInput")
    ring, state, inbox = party.subject.ring, game.states[0], game.outbox[0]
    x = [np.full(d, value, ring.dtype) for value in (7, 9)]

    def masked(subject, vector):
        return client.mask_input(state, inbox, subject, vector)[1].packed

    same = [ring.unpack(masked(party.subject, vector), d) for vector in x]
    assert (ring.reduce(same[1] - same[0]) == 2).all(), "under one subject the masks are the same"
    assert masked(party.subject, x[0]) == masked(party.subject, x[0])
    for what in ("model", "record of the sum before", "purpose"):
        other = changed(party.subject, **OTHERS[what])
        for vector in x:
            assert_is_noise(ring.unpack(masked(other, vector), d) - same[0], party)


@pytest.mark.parametrize("dimensions", [(1 << 14, 1 << 15)], ids=str)
def test_a_longer_vector_does_not_begin_with_the_masks_of_a_shorter_one(dimensions):
    short, long = dimensions
    party = Party(4, dimension=short)
    game = Round(party).play("MaskedInput")
    ring, state, inbox = party.subject.ring, game.states[0], game.outbox[0]
    other = changed(party.subject, dimension=long)
    packed = [
        client.mask_input(state, inbox, subject, ring.zeros(subject.dimension))[1].packed
        for subject in (party.subject, other)
    ]
    assert_is_noise(ring.unpack(packed[1], long)[:short] - ring.unpack(packed[0], short), party)


def test_two_sums_begun_with_the_same_keys_do_not_take_each_others_vectors():
    party = Party(4)
    game = Round(party).play("MaskedInput")
    other = changed(party.subject, **OTHERS["model"])
    second = game.fork()
    second.begin(other)
    one, two = {u: game.answer(u) for u in range(4)}, {u: second.answer(u) for u in range(4)}
    for answers, into in ((one, second), (two, game)):
        for u, message in answers.items():
            with pytest.raises(RemoteProtocolError, match="did not sum what was asked for: model"):
                into.receive(u, message)
        assert not into.server.total.any()
    for u in range(4):
        game.receive(u, one[u])
    assert not second.server.total.any(), "each sum has an accumulator of its own"


def test_a_confirmation_of_another_subject_is_refused_by_name():
    party = Party(4)
    game = Round(party).play("ConsistencyCheck")
    other = changed(party.subject, **OTHERS["model"])
    honest = game.answer(1)
    with pytest.raises(RemoteProtocolError, match="site001 confirms another sum: model abababababababab") as caught:
        game.receive(1, changed(honest, subject=other))
    assert caught.value.culprits == {"site001"}
    assert isinstance(game.server, server.CollectingConfirmations)
    assert game.server.confirmations == {}

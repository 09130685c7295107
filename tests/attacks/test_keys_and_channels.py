"""Lies about keys, and boxes that are changed, moved, reflected or replayed on their way through the server."""

import os
import subprocess
import sys
from itertools import combinations, permutations
from pathlib import Path

import msgspec
import pytest

from secagg import LocalProtocolError, RemoteProtocolError, wire
from secagg.keys import AgreementKey
from secagg.masking import client
from secagg.masking.messages import Advertisement, KeyDirectory, ShareInbox
from secagg.prg import Label
from secagg.sealed import channel_key, seal
from secagg.shamir import PRIME
from tests.secagg.simulation import Party, Round, changed, refuses, replace_entry
from tests.secagg.test_keys import LOW_ORDER

MODES = ("active", "semi-honest")
SERVERS = AgreementKey(b"\x77" * 32)


def directory_of(game, u=0):
    return game.outbox[u]


# --- the server changes keys ---


@pytest.mark.parametrize("field", ["channel_key", "mask_key"])
def test_a_key_that_the_server_put_in_place_of_anothers(field):
    game = Round(Party(4)).play("ShareKeys")
    refuses(
        game,
        0,
        replace_entry(directory_of(game), 2, **{field: SERVERS.public}),
        match="keys listed for site002 are not signed by it",
    )


def test_the_two_keys_of_a_participant_exchanged():
    game = Round(Party(4)).play("ShareKeys")
    entry = directory_of(game).advertisements[2]
    swapped = replace_entry(directory_of(game), 2, channel_key=entry.mask_key, mask_key=entry.channel_key)
    refuses(game, 0, swapped, match="site002 are not signed")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("field", ["channel_key", "mask_key"])
def test_ones_own_keys_changed(field, mode):
    game = Round(Party(4, mode=mode)).play("ShareKeys")
    refuses(game, 0, replace_entry(directory_of(game), 0, **{field: SERVERS.public}), match="other keys for us")


@pytest.mark.parametrize("mode", MODES)
def test_a_key_listed_for_two_participants(mode):
    game = Round(Party(4, mode=mode)).play("ShareKeys")
    entries = directory_of(game).advertisements
    for changes in (
        {"mask_key": entries[1].mask_key},
        {"channel_key": entries[1].channel_key},
        {"channel_key": entries[1].mask_key},
        {"mask_key": entries[0].mask_key},
        {"mask_key": entries[2].channel_key},
    ):
        refuses(game, 0, replace_entry(directory_of(game), 2, **changes), match="comes twice")


def test_two_participants_entries_exchanged():
    game = Round(Party(4)).play("ShareKeys")
    entries = directory_of(game).advertisements
    refuses(game, 0, KeyDirectory({**entries, 1: entries[2], 2: entries[1]}), match="site001 are not signed")


@pytest.mark.parametrize("signature", [b"", bytes(64)], ids=["none", "zeros"])
def test_a_signature_stripped(signature):
    game = Round(Party(4)).play("ShareKeys")
    refuses(game, 0, replace_entry(directory_of(game), 3, signature=signature), match="site003 are not signed")


def test_keys_signed_by_someone_who_is_not_on_the_roster():
    stranger = Party(5).identity[4]
    party = Party(4)
    game = Round(party).play("ShareKeys")
    own = AgreementKey(b"\x66" * 32)
    payload = client.keys_payload(2, own.public, SERVERS.public)
    forged = stranger.sign(Label.SIGN_KEYS, party.session.id, payload)
    entry = replace_entry(directory_of(game), 2, channel_key=own.public, mask_key=SERVERS.public, signature=forged)
    refuses(game, 0, entry, match="site002 are not signed")


def test_keys_of_an_earlier_round_replayed():
    old = Round(Party(4, number=1)).play("ShareKeys").outbox[0].advertisements[2]
    game = Round(Party(4, number=2)).play("ShareKeys")
    listed = directory_of(game).advertisements
    refuses(game, 0, KeyDirectory({**listed, 2: old}), match="site002 are for another session: round 1 where 2")
    dressed_up = changed(old, terms=listed[2].terms)
    refuses(game, 0, KeyDirectory({**listed, 2: dressed_up}), match="site002 are not signed by it")


def test_a_signature_moved_to_another_participant_who_repeats_the_keys():
    """The signature names its signer's number, not only the keys."""
    party = Party(4)
    game = Round(party).play("ShareKeys")
    entry = directory_of(game).advertisements[2]
    payload = client.keys_payload(3, entry.channel_key, entry.mask_key)
    assert payload != client.keys_payload(2, entry.channel_key, entry.mask_key)
    moved = party.identity[2].sign(Label.SIGN_KEYS, party.session.id, payload)
    refuses(game, 0, replace_entry(directory_of(game), 2, signature=moved), match="site002 are not signed")


# --- a participant lies about its keys ---


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("point", LOW_ORDER)
@pytest.mark.parametrize("which", ["channel", "mask"])
def test_a_point_of_low_order_is_refused_by_the_server_and_by_everyone(which, point, mode):
    """With it the agreed secret is zero for everyone to know. The participant signs it, so only the check helps."""
    party = Party(4, mode=mode)
    game = Round(party)
    bad, good = bytes.fromhex(point), SERVERS.public
    keys = (bad, good) if which == "channel" else (good, bad)
    signed = party.identity[2].sign(Label.SIGN_KEYS, party.session.id, client.keys_payload(2, *keys))
    message = Advertisement(party.session.terms, *keys, signed if mode == "active" else b"")
    with pytest.raises(RemoteProtocolError, match="site002 sent a useless key") as caught:
        game.receive(2, message)
    assert caught.value.culprits == {"site002"}
    said = {u: game.answer(u) for u in range(4)}
    game.stage = "ShareKeys"
    refuses(game, 0, KeyDirectory({**said, 2: message}), match="site002: .*low order")


@pytest.mark.parametrize("mode", MODES)
def test_a_participant_that_copies_anothers_key_is_refused_by_name(mode):
    party = Party(4, mode=mode)
    for copied in (lambda ad: (ad.channel_key, SERVERS.public), lambda ad: (SERVERS.public, ad.channel_key)):
        game = Round(party)
        first = game.answer(0)
        game.receive(0, first)
        keys = copied(first)
        signed = party.identity[1].sign(Label.SIGN_KEYS, party.session.id, client.keys_payload(1, *keys))
        with pytest.raises(RemoteProtocolError, match="site001 sent a public key that is already in use") as caught:
            game.receive(1, Advertisement(party.session.terms, *keys, signed))
        assert caught.value.culprits == {"site001"}


def test_a_participant_that_uses_one_key_for_both_purposes_is_refused_by_name():
    party = Party(4)
    keys = SERVERS.public, SERVERS.public
    signed = party.identity[1].sign(Label.SIGN_KEYS, party.session.id, client.keys_payload(1, *keys))
    with pytest.raises(RemoteProtocolError, match="already in use") as caught:
        Round(party).receive(1, Advertisement(party.session.terms, *keys, signed))
    assert caught.value.culprits == {"site001"}


def test_a_participant_that_sends_anothers_signed_keys_is_refused_by_name():
    """The transport says who it is."""
    game = Round(Party(4))
    with pytest.raises(RemoteProtocolError, match="site001 did not sign its keys") as caught:
        game.receive(1, game.answer(0))
    assert caught.value.culprits == {"site001"}


def test_an_unsigned_commitment_is_refused_by_name():
    game = Round(Party(4)).play("ShareKeys")
    honest = game.answer(1)
    for changes in ({"signature": b""}, {"digest": bytes(32)}):
        spoiled = changed(honest.commitment, **changes)
        with pytest.raises(RemoteProtocolError, match="site001 did not sign its commitment") as caught:
            game.receive(1, changed(honest, commitment=spoiled))
        assert caught.value.culprits == {"site001"}


@pytest.mark.parametrize("mode", MODES)
def test_boxes_for_others_than_those_that_were_listed_are_refused_by_name(mode):
    game = Round(Party(4, mode=mode)).play("ShareKeys")
    honest = game.answer(1)
    box = honest.boxes[0]
    for boxes in ({0: box, 2: box}, {**honest.boxes, 1: box}, {**honest.boxes, 9: box}, {}):
        with pytest.raises(RemoteProtocolError, match="site001 sealed shares for") as caught:
            game.receive(1, changed(honest, boxes=boxes))
        assert caught.value.culprits == {"site001"}


# --- the server changes, moves, reflects or replays boxes; the vector is not masked ---


@pytest.mark.parametrize("mode", MODES)
def test_a_box_reflected_to_its_sender(mode):
    """u's own box for v comes back as v's box for u."""
    party = Party(4, mode=mode)
    game = Round(party).play("ShareKeys")
    said = {u: game.answer(u) for u in range(4)}
    for u, message in said.items():
        game.receive(u, message)
    game.close()
    refuses(game, 0, ShareInbox({**game.outbox[0].boxes, 2: said[0].boxes[2]}), match="2 to 0 do not open.*reflected")


@pytest.mark.parametrize("mode", MODES)
def test_a_box_moved_to_another_receiver_or_sender(mode):
    game = Round(Party(4, mode=mode)).play("MaskedInput")
    boxes = game.outbox[0].boxes
    refuses(game, 0, ShareInbox({**boxes, 2: game.outbox[1].boxes[2]}), match="do not open")
    refuses(game, 0, ShareInbox({**boxes, 2: boxes[3], 3: boxes[2]}), match="do not open")


def test_a_box_of_an_earlier_round_replayed():
    """Even where a participant's keys were the same as then: the session is in the key and in the sealed data."""
    boxes = [Round(Party(4, number=number)).play("MaskedInput").outbox[0].boxes for number in (1, 2)]
    advertised = [Round(Party(4, number=number)).play("ShareKeys").outbox[0].advertisements for number in (1, 2)]
    assert advertised[0][1].channel_key == advertised[1][1].channel_key, "the deterministic entropy repeats itself"
    game = Round(Party(4, number=2)).play("MaskedInput")
    assert game.outbox[0].boxes == boxes[1]
    refuses(game, 0, ShareInbox({**boxes[1], 2: boxes[0][2]}), match="do not open")


@pytest.mark.parametrize("at", [0, 7, 8, 40, 73, 74, 89])
def test_a_box_with_a_byte_changed(at):
    game = Round(Party(4)).play("MaskedInput")
    boxes = game.outbox[0].boxes
    spoiled = bytearray(boxes[3])
    spoiled[at] ^= 1
    refuses(game, 0, ShareInbox({**boxes, 3: bytes(spoiled)}), match="3 to 0 do not open")


@pytest.mark.parametrize("mode", MODES)
def test_a_key_swapped_in_a_semi_honest_session_is_noticed_before_a_vector_is_masked(mode):
    """Key confirmation: whoever does not share the channel key cannot have sealed the shares."""
    party = Party(4, mode=mode)
    game = Round(party).play("ShareKeys")
    if mode == "active":
        return  # refused one step earlier, by the signature
    entries = directory_of(game).advertisements
    game.answer(0, replace_entry(KeyDirectory(entries), 2, channel_key=SERVERS.public))
    for u in (1, 2, 3):
        game.receive(u, game.answer(u))
    inbox = ShareInbox({u: game.server.received[u].boxes[0] for u in (1, 2, 3)})
    game.stage = "MaskedInput"
    refuses(game, 0, inbox, match="2 to 0 do not open")


def sealed_by_2_for_0(game, text):
    """A box that participant 2 sealed as the protocol says, with any text in it."""
    session = game.party.session.id
    return seal(game.lied_key, session, 2, 0, text)


def a_round_with_a_lying_sealer():
    """Participant 2 keeps the key of its channel to 0, so that it can seal anything."""
    party = Party(4)
    game = Round(party).play("ShareKeys")
    own = AgreementKey(game.states[2].channel_secret)
    shared = own.agree(directory_of(game).advertisements[0].channel_key)
    game.lied_key = channel_key(shared, party.session.id, 2, 0)
    return game.play("MaskedInput")


def numbers(*values):
    return b"".join(v.to_bytes(4, "big") for v in values)


HONEST_PAIR = (5).to_bytes(33, "big") + (6).to_bytes(33, "big")


def test_a_box_that_a_participant_sealed_itself_opens():
    """That the lies below are refused for what they say, and not because they do not open."""
    game = a_round_with_a_lying_sealer()
    game.answer(0, ShareInbox({**game.outbox[0].boxes, 2: sealed_by_2_for_0(game, numbers(2, 0) + HONEST_PAIR)}))


@pytest.mark.parametrize("named", [(0, 2), (2, 1), (3, 0), (0, 0), (2, 2)])
def test_other_names_inside_a_box_than_on_it(named):
    game = a_round_with_a_lying_sealer()
    box = sealed_by_2_for_0(game, numbers(*named) + HONEST_PAIR)
    refuses(game, 0, ShareInbox({**game.outbox[0].boxes, 2: box}), match=f"name {named[0]} and {named[1]} inside")


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("value", [PRIME, PRIME + 1, 2**264 - 1])
def test_a_share_that_is_no_field_element_is_refused_before_the_vector_leaves(value, which):
    game = a_round_with_a_lying_sealer()
    pair = [(5).to_bytes(33, "big")] * 2
    pair[which] = value.to_bytes(33, "big")
    box = sealed_by_2_for_0(game, numbers(2, 0) + b"".join(pair))
    refuses(game, 0, ShareInbox({**game.outbox[0].boxes, 2: box}), match="no field elements")


@pytest.mark.parametrize(
    "text", [b"", numbers(2, 0), numbers(2, 0) + HONEST_PAIR[:-1], numbers(2, 0) + HONEST_PAIR + b"\0"]
)
def test_shares_of_another_length_inside_a_box(text):
    """The wire allows one length of box only; the participant does not rely on it."""
    game = a_round_with_a_lying_sealer()
    inbox = ShareInbox({**game.outbox[0].boxes, 2: sealed_by_2_for_0(game, text)})
    with pytest.raises(RemoteProtocolError):
        client.mask_input(game.states[0], inbox, game.subject, game.vectors[0])
    with pytest.raises(wire.DecodeError):
        wire.decode(wire.encode(inbox), ShareInbox)


# --- what keys are made of ---


def test_no_key_of_a_round_is_used_twice_and_none_is_the_agreed_secret_itself():
    """Self masks, pairwise masks and the channels in both directions; so a constant nonce or counter is never met
    twice under one key."""
    n = 5
    party = Party(n)
    game = Round(party).play("ShareKeys")
    secrets = {u: (AgreementKey(s.channel_secret), AgreementKey(s.mask_secret)) for u, s in game.states.items()}
    game.play("MaskedInput")
    bound, states = party.mask_id(), game.states
    selves = [client.self_mask_key(states[u].self_mask_seed, bound, u) for u in range(n)]
    inbound = [states[v].inbound_keys[u] for u, v in permutations(range(n), 2)]
    kept = [states[u].pairwise_secrets[v] for u, v in combinations(range(n), 2)]
    pairwise = [client.pairwise_key(states[u].pairwise_secrets[v], bound, u, v) for u, v in combinations(range(n), 2)]
    keys = [*selves, *inbound, *kept, *pairwise]
    assert len(set(keys)) == len(keys) == n + n * (n - 1) + 2 * (n * (n - 1) // 2)
    raw = {a.agree(b.public) for i, j in permutations(range(n), 2) for a in secrets[i] for b in secrets[j]}
    assert not any(key in (secret[:16], secret[16:]) for key in keys for secret in raw)
    for u, v in permutations(range(n), 2):
        assert states[u].pairwise_secrets[v] == states[v].pairwise_secrets[u]


def test_another_session_gives_other_keys_from_the_same_secrets():
    states = [Round(Party(4, number=number)).play("MaskedInput").states[0] for number in (1, 2)]
    assert states[0].self_mask_seed == states[1].self_mask_seed, "the deterministic entropy repeats itself"
    ids = [Party(4, number=number).mask_id() for number in (1, 2)]
    masks = {client.self_mask_key(states[0].self_mask_seed, bound, 0) for bound in ids}
    assert len(masks) == 2
    for v in (1, 2, 3):
        assert states[0].pairwise_secrets[v] != states[1].pairwise_secrets[v]
        assert states[0].inbound_keys[v] != states[1].inbound_keys[v]


def test_a_session_of_another_identity_is_refused_before_anything_is_sent():
    party = Party(4)
    with pytest.raises(LocalProtocolError, match="another key for site001"):
        client.advertise(party.session, 1, party.identity[2], party.entropy[1])


def test_a_semi_honest_session_takes_no_signatures():
    """What nobody checks must not be there: it could carry anything."""
    game = Round(Party(4, mode="semi-honest"))
    keys = game.answer(0)
    with pytest.raises(RemoteProtocolError, match="site000 signed its keys, and a semi-honest") as caught:
        game.receive(0, msgspec.structs.replace(keys, signature=b"junk"))
    assert caught.value.culprits == {"site000"}

    game = Round(Party(4, mode="semi-honest")).play("ShareKeys")
    listed = game.outbox[0].advertisements
    junk = {**listed, 2: msgspec.structs.replace(listed[2], signature=b"junk")}
    refuses(game, 0, KeyDirectory(junk), match="site002 are signed, and a semi-honest")


FORKING = """
import os
from secagg.masking import client
from tests.secagg.simulation import Party
party = Party(3)
def keys():
    state, _ = client.advertise(party.session, 0, party.identity[0], os.urandom)
    return state.channel_secret + state.mask_secret
keys()
child = os.fork()
os.write(1, (("child " if child == 0 else "parent ") + keys().hex() + "\\n").encode())  # a line in one piece
if child == 0:
    os._exit(0)
os.waitpid(child, 0)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no process forks here")
def test_a_process_that_forks_does_not_draw_the_same_keys_twice():
    """Servers fork their workers after the library was loaded and used: nothing random is left over from before."""
    root = Path(__file__).resolve().parents[2]
    command = [sys.executable, "-W", "ignore", "-c", FORKING]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    drawn = dict(line.split() for line in done.stdout.splitlines())
    assert drawn.keys() == {"parent", "child"}
    secrets = [drawn[who][at : at + 64] for who in drawn for at in (0, 64)]
    assert len(set(secrets)) == 4

"""Attacks on a sum under CKKS: on its keys, on what is opened, on who can read what, and on the key through the sum."""

import gc
import hashlib
import itertools

import msgspec
import numpy as np
import pytest
import tenseal as ts
import tenseal.sealapi as seal_api

from secagg import wire
from secagg.ckks import client, holder, joint_key, polynomials, server
from secagg.ckks.joint_key import secret_key, upload_digest, uploads_payload
from secagg.ckks.messages import (
    Aggregate,
    ChannelDirectory,
    EncryptedInput,
    HalfUpload,
    HeldAggregate,
    HeldUploads,
    KeyShares,
    Missing,
    SeedInbox,
    UploadDigest,
    UploadDirectory,
    Uploads,
    UploadsConfirmations,
)
from secagg.ckks.polynomials import arithmetic, encryptions_of_zero
from secagg.errors import BelowThreshold, DecodeError, LocalProtocolError, RemoteProtocolError, SecAggError
from secagg.keys import AgreementKey, Identity
from secagg.prg import Label
from secagg.ring import Ring
from secagg.sealed import channel_key, seal
from secagg.shamir import PRIME
from tests.secagg.ckks_simulation import (
    HOLDER,
    KEYS,
    MODES,
    Play,
    identities,
    refuses,
    rejects,
    replaced,
    session_of,
    sum_of,
    vectors_of,
)
from tests.secagg.test_keys import LOW_ORDER

SERVERS = AgreementKey(b"\x77" * 32)
STRANGER = Identity(b"\x55" * 32)
modes = pytest.mark.parametrize("mode", MODES)


def name(game, u):
    return game.session.params.roster.name(u)


def only(mapping, keep):
    return {v: mapping[v] for v in keep}


def with_entry(directory, field, u, **changes):
    """The directory with some fields of one participant's entry changed."""
    entries = getattr(directory, field)
    return type(directory)(**{
        f: {**entries, u: msgspec.structs.replace(entries[u], **changes)} if f == field else getattr(directory, f)
        for f in directory.__struct_fields__
    })  # fmt: skip


def unpacked(game, packed):
    layout, shape = game.server.layout, game.server.second.shape
    return layout.ring.unpack(packed, np.prod(shape, dtype=int)).astype(np.uint64).reshape(shape)


def packed(game, residues):
    return memoryview(game.server.layout.ring.pack(np.ascontiguousarray(residues).reshape(-1)))


# --- channel keys ---


def test_a_channel_key_that_the_server_put_in_place_of_anothers():
    game = Play(4).play("ShareKeys")
    swapped = with_entry(game.outbox[0], "keys", 2, channel_key=SERVERS.public)
    refuses(game, 0, swapped, match=f"the key listed for {name(game, 2)} is not signed by it")
    refuses(game, 0, with_entry(game.outbox[0], "keys", 2, signature=b""), match="is not signed")
    listed = game.outbox[0].keys
    refuses(game, 0, ChannelDirectory({**listed, 1: listed[2], 2: listed[1]}), match="is not signed")


def test_a_signature_in_a_session_that_has_none():
    game = Play(4, "semi-honest").play("ShareKeys")
    refuses(game, 0, with_entry(game.outbox[0], "keys", 2, signature=bytes(64)), match="is not signed")


@modes
def test_ones_own_channel_key_changed_or_left_out(mode):
    game = Play(5, mode).play("ShareKeys")
    changed = with_entry(game.outbox[0], "keys", 0, channel_key=SERVERS.public)
    refuses(game, 0, changed, match="another key for us than the one that we advertised, or none")
    refuses(game, 0, ChannelDirectory(only(game.outbox[0].keys, range(1, 5))), match="another key for us")


@modes
def test_a_channel_key_listed_twice(mode):
    game = Play(4, mode).play("ShareKeys")
    key = game.outbox[0].keys[1].channel_key
    refuses(game, 0, with_entry(game.outbox[0], "keys", 2, channel_key=key), match="comes twice")


@modes
def test_someone_off_the_roster_in_the_directory(mode):
    game = Play(4, mode).play("ShareKeys")
    fresh = msgspec.structs.replace(game.outbox[0].keys[3], channel_key=SERVERS.public)
    refuses(game, 0, ChannelDirectory({**game.outbox[0].keys, 4: fresh}), match="4 is not on the roster of 4")


@pytest.mark.parametrize("key", LOW_ORDER)
def test_a_channel_key_of_low_order(key):
    key = bytes.fromhex(key)
    game = Play(3, "semi-honest")
    rejects(game, 1, replaced(game.answer(1), channel_key=key), match="useless key")
    game = Play(3, "semi-honest").play("ShareKeys")
    refuses(game, 0, with_entry(game.outbox[0], "keys", 1, channel_key=key), match=name(game, 1))


@modes
def test_a_directory_of_less_than_t(mode):
    game = Play(5, mode).play("ShareKeys")
    t = game.session.params.threshold
    caught = refuses(game, 0, ChannelDirectory(only(game.outbox[0].keys, range(t - 1))), BelowThreshold)
    assert (caught.stage, caught.present, caught.needed) == ("AdvertiseKeys", t - 1, t)
    game.answer(0, ChannelDirectory(only(game.outbox[0].keys, range(t))))


@modes
def test_the_server_takes_a_channel_key_once_from_each_and_of_no_other(mode):
    game = Play(3, mode)
    one, two = game.answer(0), game.answer(1)
    game.receive(0, one)
    rejects(game, 0, one, match="answered twice|already in use")
    rejects(game, 1, replaced(two, channel_key=one.channel_key), match="already in use")
    with pytest.raises(RemoteProtocolError, match="not sent"):
        game.receive(3, two)
    if mode == "active":
        rejects(game, 2, two, match="did not sign its key")
        rejects(game, 1, replaced(two, signature=b""), match="did not sign its key")
    else:
        rejects(game, 1, replaced(two, signature=bytes(64)), match="no signatures")


# --- sealed seeds and commitments ---


def test_another_directory_shown_to_one_participant():
    """Its common polynomial is another, and so is what its commitment is signed over."""
    game = Play(5).play("ShareKeys")
    listed = game.outbox[0].keys
    odd = game.answer(0, ChannelDirectory(only(listed, range(4))))
    sent = {0: odd} | {u: game.answer(u) for u in range(1, 5)}
    rejects(game, 0, replaced(odd, boxes={**odd.boxes, 4: odd.boxes[1]}), match="did not sign its commitment")
    game.stage = "RevealKey"
    commitments = {u: sent[u].commitment for u in range(4)}
    for u, other in ((1, 0), (0, 1)):
        boxes = {v: sent[v].boxes[u] for v in range(4) if v != u}
        told = f"{name(game, other)} did not sign its commitment for the keys that we were shown"
        refuses(game, u, SeedInbox(boxes, commitments), match=told)


def test_a_commitment_changed_or_unsigned():
    game = Play(4).play("RevealKey")
    for field in ("seed", "share"):
        for u in (0, 2):
            changed = with_entry(game.outbox[0], "commitments", u, **{field: bytes(32)})
            refuses(game, 0, changed, match="did not sign its commitment")
    refuses(game, 0, with_entry(game.outbox[0], "commitments", 2, signature=b""), match="did not sign")


def test_ones_own_commitment_changed_where_nothing_is_signed():
    game = Play(4, "semi-honest").play("RevealKey")
    changed = with_entry(game.outbox[0], "commitments", 0, share=bytes(32))
    refuses(game, 0, changed, match="another commitment for us")
    refuses(game, 0, with_entry(game.outbox[0], "commitments", 2, signature=bytes(64)), match="did not sign")


@modes
def test_shares_of_others_than_commit(mode):
    game = Play(5, mode).play("RevealKey")
    inbox, told = game.outbox[0], "sealed shares of other participants than commitments"
    refuses(game, 0, SeedInbox(only(inbox.boxes, (1, 2, 3)), inbox.commitments), match=told)
    refuses(game, 0, SeedInbox(inbox.boxes, only(inbox.commitments, range(4))), match=told)
    refuses(game, 0, SeedInbox(inbox.boxes, only(inbox.commitments, range(1, 5))), match=told)
    refuses(game, 0, SeedInbox({**inbox.boxes, 0: inbox.boxes[1]}, inbox.commitments), match=told)


@modes
def test_a_share_from_someone_who_did_not_advertise(mode):
    game = Play(5, mode).play("RevealKey", {4: "AdvertiseKeys"})
    inbox = game.outbox[0]
    more = SeedInbox({**inbox.boxes, 4: inbox.boxes[1]}, {**inbox.commitments, 4: inbox.commitments[1]})
    refuses(game, 0, more, match=f"{name(game, 4)}, who did not advertise keys to us")


@modes
def test_commitments_of_less_than_t(mode):
    game = Play(5, mode).play("RevealKey")
    inbox, t = game.outbox[0], game.session.params.threshold
    few = SeedInbox(only(inbox.boxes, range(1, t - 1)), only(inbox.commitments, range(t - 1)))
    caught = refuses(game, 0, few, BelowThreshold)
    assert (caught.stage, caught.present, caught.needed) == ("ShareKeys", t - 1, t)


@modes
def test_a_box_changed_moved_or_reflected(mode):
    game = Play(4, mode).play("RevealKey")
    inbox, others = game.outbox[0], game.outbox[1]
    broken = bytes(a ^ 1 for a in inbox.boxes[1])
    for box in (broken, inbox.boxes[2], others.boxes[0], others.boxes[2], bytes(len(broken))):
        refuses(game, 0, replaced(inbox, boxes={**inbox.boxes, 1: box}))
    rerun = Play(4, mode, number=1).play("RevealKey")
    refuses(game, 0, replaced(inbox, boxes={**inbox.boxes, 1: rerun.outbox[0].boxes[1]}))


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ((1).to_bytes(4, "big") + (2).to_bytes(4, "big") + bytes(33), "names 1 and 2 inside"),
        ((2).to_bytes(4, "big") + (0).to_bytes(4, "big") + bytes(33), "names 2 and 0 inside"),
        ((1).to_bytes(4, "big") + (0).to_bytes(4, "big") + PRIME.to_bytes(33, "big"), "no field element"),
        ((1).to_bytes(4, "big") + (0).to_bytes(4, "big") + b"\xff" * 33, "no field element"),
    ],
)
def test_a_participant_seals_nonsense(text, told):
    game = Play(4).play("ShareKeys")
    agreed = AgreementKey(game.states[1].channel_secret).agree(game.outbox[0].keys[0].channel_key)
    game.play("RevealKey")
    sid, inbox = game.session.id, game.outbox[0]
    box = seal(channel_key(agreed, sid, 1, 0), sid, 1, 0, text)
    refuses(game, 0, replaced(inbox, boxes={**inbox.boxes, 1: box}), match=told)


@pytest.mark.parametrize("size", [0, 32, 34])
def test_a_share_of_another_length_inside_a_box(size):
    """Called from Python: over the wire such a box does not decode."""
    game = Play(4).play("ShareKeys")
    agreed = AgreementKey(game.states[1].channel_secret).agree(game.outbox[0].keys[0].channel_key)
    game.play("RevealKey")
    sid, inbox = game.session.id, game.outbox[0]
    text = (1).to_bytes(4, "big") + (0).to_bytes(4, "big") + bytes(size)
    box = seal(channel_key(agreed, sid, 1, 0), sid, 1, 0, text)
    with pytest.raises(RemoteProtocolError, match="no field element"):
        client.reveal(game.states[0], replaced(inbox, boxes={**inbox.boxes, 1: box}), game.setting)


@modes
def test_the_server_takes_boxes_for_all_others_and_a_signed_commitment(mode):
    game = Play(4, mode).play("ShareKeys")
    sent = game.answer(0)
    rejects(game, 0, replaced(sent, boxes=only(sent.boxes, (1, 2))), match="sealed shares for .*, expected 3")
    rejects(game, 0, replaced(sent, boxes={**sent.boxes, 0: sent.boxes[1]}), match="sealed shares for")
    changed = replaced(sent.commitment, seed=bytes(32), signature=b"" if mode == "active" else bytes(64))
    rejects(game, 0, replaced(sent, commitment=changed), match="sign its commitment|signed its commitment")
    game.receive(0, sent)
    rejects(game, 0, sent, match="answered twice")
    with pytest.raises(RemoteProtocolError, match="not sent"):
        game.receive(4, sent)


# --- shares of the joint key ---


def rogue_share(game, attacker):
    """The attacker's own share less all others': what makes the joint key its own, whatever the others gave."""
    chain, drawn = game.setting.chain, game.states[attacker].uniform
    shares = {u: game.fork().answer(u).packed for u in game.outbox}
    at, out = Ring(chain.bits).packed_size(chain.degree), b""
    for part, bits, modulus in (
        (slice(at), chain.bits, chain.modulus),
        (slice(at, None), chain.special_bits, chain.special),
    ):
        total = np.zeros(chain.degree, object)
        for u, share in shares.items():
            values = Ring(bits).unpack(share[part], chain.degree).astype(object)
            total += values if u == attacker else -values
        out += Ring(bits).pack((total % modulus).astype(Ring(bits).dtype))
    taken = joint_key.joined(chain, game.session, drawn, {**shares, attacker: out})
    alone = joint_key.joined(chain, game.session, drawn, {attacker: shares[attacker]})
    assert all((one == other).all() for one, other in zip(taken.public[0], alone.public[0], strict=True))
    return out


@modes
def test_a_share_made_out_of_the_others_is_refused_through_its_commitment(mode):
    """Without the commitment the joint key would be the attacker's alone: see `rogue_share`."""
    game = Play(4, mode).play("RevealKey")
    rogue = rogue_share(game, 2)
    rejects(
        game,
        2,
        replaced(game.fork().answer(2), packed=rogue),
        match="another share of the joint key than it committed to",
    )
    game.play("CommitInput" if mode == "active" else "EncryptedInput")
    shown = game.outbox[0].shares
    refuses(game, 0, KeyShares({**shown, 2: rogue}), match=f"{name(game, 2)} is not the one it committed to")
    refuses(game, 0, KeyShares({**shown, 1: shown[2], 2: shown[1]}), match="is not the one it committed to")


@modes
def test_shares_of_the_key_of_others_or_of_too_few(mode):
    game = Play(5, mode).play("CommitInput" if mode == "active" else "EncryptedInput", {4: "RevealKey"})
    shown, t = game.outbox[0].shares, game.session.params.threshold
    refuses(game, 0, KeyShares(only(shown, (1, 2, 3))), match="left our share out of the joint key")
    caught = refuses(game, 0, KeyShares(only(shown, range(t - 1))), BelowThreshold)
    assert (caught.stage, caught.present, caught.needed) == ("RevealKey", t - 1, t)
    game = Play(5, mode).play("CommitInput" if mode == "active" else "EncryptedInput", {4: "ShareKeys"})
    shown = game.outbox[0].shares
    refuses(game, 0, KeyShares({**shown, 4: shown[1]}), match=f"{name(game, 4)}, who never committed to one")


def committing_to(game, u, share):
    """The game at RevealKey, where u committed to `share` in place of its own."""
    game.play("ShareKeys")
    for v in game.outbox:
        sent = game.answer(v)
        if v == u:
            sid, drawn = game.session.id, game.states[u].uniform
            digests = sent.commitment.seed, joint_key.share_digest(share, sid, u)
            payload = joint_key.commitment_payload(u, drawn, *digests)
            signature = b""
            if game.session.params.active:
                signature = game.identities[u].sign(Label.SIGN_CKKS_COMMITMENT, sid, payload)
            sent = replaced(sent, commitment=type(sent.commitment)(*digests, signature))
        game.receive(v, sent)
    game.close()
    return game


@modes
@pytest.mark.parametrize(
    "share",
    [
        b"",
        bytes(100),
        bytes(9216 + 3584),
        b"\xff" * (9216 + 3584),
        bytes(9216) + b"\xff" * 3584,
        b"\xff" * 9216 + bytes(3584),
        bytes(9216 + 3585),
    ],
    ids=["none", "short", "zeros", "ones", "ones below p", "ones below q", "long"],
)
def test_a_share_of_the_key_that_is_none(share, mode):
    """36 and 14 bits; committed to as it is."""
    game = committing_to(Play(3, mode), 1, share)
    sent = replaced(game.answer(0), packed=share)
    if share == bytes(9216 + 3584):
        game.receive(1, sent)
        return
    with pytest.raises(RemoteProtocolError, match=f"{name(game, 1)} gave no share of a key"):
        game.receive(1, sent)
    own = game.states[0]
    shares = {0: game.fork().answer(2).packed, 1: share, 2: game.fork().answer(2).packed}
    committed = {v: joint_key.share_digest(each, game.session.id, v) for v, each in shares.items()}
    with pytest.raises(RemoteProtocolError, match=f"{name(game, 1)} gave no share of a key"):
        client.joint_key(msgspec.structs.replace(own, committed=committed), KeyShares(shares), game.setting)


@modes
def test_the_server_takes_a_share_of_the_key_once_and_from_those_who_committed(mode):
    game = Play(4, mode, threshold=3).play("RevealKey", {3: "ShareKeys"})
    sent = game.fork().answer(0)
    game.receive(0, sent)
    rejects(game, 0, sent, match="answered twice")
    rejects(game, 3, sent, match="not sent")
    rejects(game, 1, sent, match="another share")


# --- what everyone is going to upload ---


def test_two_joint_keys_shown_to_two_participants():
    """The server says to one that the fifth is in U3, and to the others that it is not."""
    game = Play(5).play("CommitInput")
    shown = game.outbox[0].shares
    sent = {0: game.answer(0, KeyShares(shown))}
    sent |= {u: game.answer(u, KeyShares(only(shown, range(4)))) for u in range(1, 4)}
    rejects(game, 1, sent[1], match="encrypted to another joint key than this sum's")
    game.stage = "ConsistencyCheck"
    for u, other in ((0, 1), (1, 0)):
        told = f"{name(game, other)} encrypted to another joint key than we did: the server showed two"
        refuses(game, u, UploadDirectory(sent), match=told)


def test_an_upload_listed_that_is_not_signed_by_its_owner():
    game = Play(4).play("ConsistencyCheck")
    shown = game.outbox[0]
    told = f"the upload listed for {name(game, 2)} is not signed by it"
    refuses(game, 0, with_entry(shown, "uploads", 2, digest=bytes(32)), match=told)
    refuses(game, 0, with_entry(shown, "uploads", 2, key=bytes(32)), match=told)
    refuses(game, 0, with_entry(shown, "uploads", 2, signature=b""), match=told)
    other = replaced(game.subject, purpose="other")
    refuses(game, 0, with_entry(shown, "uploads", 2, subject=other), match=told)
    refuses(game, 0, UploadDirectory({**shown.uploads, 2: shown.uploads[1]}), match=told)


def listed_by(game, u, subject=None, key=None):
    """What u would sign of another sum, or under another key."""
    honest = game.outbox[0].uploads[u]
    subject, key = subject or honest.subject, key or honest.key
    signature = game.identities[u].sign(Label.SIGN_CKKS_UPLOAD, subject.sum_id(game.session.id), key + honest.digest)
    return UploadDigest(subject, key, honest.digest, signature)


def test_an_upload_listed_for_another_sum_or_under_another_key():
    game = Play(4).play("ConsistencyCheck")
    uploads = game.outbox[0].uploads
    other = listed_by(game, 2, subject=replaced(game.subject, purpose="other"))
    refuses(game, 0, UploadDirectory({**uploads, 2: other}), match=f"{name(game, 2)} does not sum what we sum: purpose")
    other = listed_by(game, 2, key=bytes(32))
    refuses(game, 0, UploadDirectory({**uploads, 2: other}), match="another joint key than we did")


def test_a_list_of_uploads_without_or_with_another_of_ones_own():
    game = Play(5).play("ConsistencyCheck")
    uploads, told = game.outbox[0].uploads, "another upload for us than the one that we committed to, or none"
    refuses(game, 0, UploadDirectory(only(uploads, range(1, 5))), match=told)
    earlier = game.fork()
    earlier.stage = "CommitInput"
    earlier.states[0] = Play(5).play("CommitInput").states[0]
    other = earlier.answer(0, KeyShares(game.agreed.announcement.shares))
    refuses(game, 0, UploadDirectory({**uploads, 0: other}), match=told)


def test_a_list_of_uploads_of_strangers_or_too_few():
    game = Play(5).play("ConsistencyCheck", {4: "RevealKey"})
    uploads, t = game.outbox[0].uploads, game.session.params.threshold
    told = f"{name(game, 4)}, who have no part in the joint key"
    refuses(game, 0, UploadDirectory({**uploads, 4: uploads[1]}), match=told)
    caught = refuses(game, 0, UploadDirectory(only(uploads, range(t - 1))), BelowThreshold)
    assert (caught.stage, caught.present, caught.needed) == ("CommitInput", t - 1, t)


def test_the_server_takes_signed_digests_of_this_sum_only():
    game = Play(4, threshold=3).play("CommitInput", {3: "RevealKey"})
    sent = game.fork().answer(0)
    for lie, told in (
        ({"digest": bytes(32)}, "did not sign its upload"),
        ({"signature": b""}, "did not sign its upload"),
        ({"key": bytes(32)}, "another joint key"),
        ({"subject": replaced(game.subject, dimension=51)}, "did not sum what was asked for: dimension 51"),
    ):
        rejects(game, 0, replaced(sent, **lie), match=told)
    game.receive(0, sent)
    rejects(game, 0, sent, match="answered twice")
    rejects(game, 1, sent, match="did not sign its upload")
    rejects(game, 3, sent, match="not sent")


def test_the_server_takes_signatures_over_this_list_only():
    game = Play(5).play("ConsistencyCheck", {4: "CommitInput"})
    sent = game.answer(0)
    rejects(game, 1, sent, match="did not sign the uploads")
    rejects(game, 4, sent, match="not sent")
    game.receive(0, sent)
    rejects(game, 0, sent, match="answered twice")


def test_two_lists_of_uploads_shown_to_two_groups():
    """Each is signed by fewer than t, so nobody uploads."""
    game = Play(5).play("ConsistencyCheck")
    uploads = game.outbox[0].uploads
    lists = {u: UploadDirectory(only(uploads, range(4))) if u < 2 else game.outbox[u] for u in range(4)}
    signatures = {u: game.answer(u, lists[u]).signature for u in range(4)}
    game.stage = "EncryptedInput"
    for u in range(4):
        refuses(game, u, UploadsConfirmations(signatures), match="did not sign the uploads that we were shown")
    caught = refuses(game, 0, UploadsConfirmations(only(signatures, (0, 1))), BelowThreshold)
    assert (caught.stage, caught.present, caught.needed) == ("ConsistencyCheck", 2, 4)


def test_signatures_of_strangers_or_over_anything_else():
    game = Play(5).play("EncryptedInput", {4: "CommitInput"})
    signatures = game.outbox[0].signatures
    refuses(
        game, 0, UploadsConfirmations({**signatures, 4: signatures[1]}), match=f"{name(game, 4)}, who upload nothing"
    )
    refuses(game, 0, UploadsConfirmations({**signatures, 2: signatures[1]}), match=f"{name(game, 2)} did not sign")
    refuses(game, 0, UploadsConfirmations({**signatures, 2: b""}), match=f"{name(game, 2)} did not sign")
    sum_id, digests = game.subject.sum_id(game.session.id), game.states[0].digests
    for label, bound, payload in (
        (Label.SIGN_CKKS_UPLOAD, sum_id, uploads_payload(game.agreed.key, digests)),
        (Label.SIGN_CKKS_UPLOADS, bytes(32), uploads_payload(game.agreed.key, digests)),
        (Label.SIGN_CKKS_UPLOADS, sum_id, uploads_payload(bytes(32), digests)),
        (Label.SIGN_CKKS_UPLOADS, sum_id, uploads_payload(game.agreed.key, only(digests, (0, 1, 2)))),
    ):
        signed = game.identities[2].sign(label, bound, payload)
        refuses(game, 0, UploadsConfirmations({**signatures, 2: signed}), match=f"{name(game, 2)} did not sign")


# --- what is decrypted ---


def test_a_single_upload_shown_as_the_sum():
    game = Play(5).play("Decrypt")
    uploads = game.outbox[0].uploads
    for few in ((0,), (0, 1), (0, 1, 2)):
        caught = refuses(game, 0, Uploads(only(uploads, few)), BelowThreshold)
        assert (caught.stage, caught.present, caught.needed) == ("EncryptedInput", len(few), 4)
    refuses(game, 0, Uploads(only(uploads, range(1, 5))), match="left our upload out of the sum")
    game.answer(0, Uploads(only(uploads, range(4))))


def test_a_single_upload_shown_in_the_place_of_everyones():
    """The server shows the victim's, and encryptions of zero for the others."""
    game = Play(4).play("Decrypt")
    uploads = game.outbox[0].uploads
    zeros = packed(game, np.zeros_like(game.server.second))
    alone = {0: uploads[0]} | {u: HalfUpload(bytes(32), zeros) for u in (1, 2, 3)}
    refuses(game, 0, Uploads(alone), match="is not the one that it committed to")
    copied = {0: uploads[0]} | dict.fromkeys((1, 2, 3), uploads[0])
    refuses(game, 0, Uploads(copied), match="is not the one that it committed to")


@pytest.mark.parametrize("field", ["first", "second"])
@pytest.mark.parametrize("u", [0, 2])
def test_half_of_an_upload_changed(u, field):
    game = Play(4).play("Decrypt")
    uploads = game.outbox[0].uploads
    for value in (getattr(uploads[1], field), b"\1" * len(uploads[1].first) if field == "first" else memoryview(b"")):
        changed = with_entry(game.outbox[0], "uploads", u, **{field: value})
        refuses(game, 0, changed, match=f"the upload shown for {name(game, u)} is not the one that it committed to")


def test_an_upload_of_someone_who_committed_to_none():
    game = Play(5).play("Decrypt", {4: "CommitInput"})
    uploads = game.outbox[0].uploads
    refuses(game, 0, Uploads({**uploads, 4: uploads[1]}), match=f"{name(game, 4)}, who committed to none")


def test_the_opposite_of_a_victims_upload_made_once_it_is_seen():
    """In the sum it would take the victim's vector out, or show it alone."""
    game = Play(4).play("EncryptedInput")
    modulus, ring = game.setting.chain.modulus, game.server.layout.ring
    victim, own = game.fork().answer(0), game.fork().answer(2)
    minus = {}
    for half in ("first", "second"):
        mine, theirs = (ring.unpack(getattr(each, half), game.server.first.size) for each in (own, victim))
        difference = (mine.astype(object) - theirs.astype(object)) % modulus
        minus[half] = memoryview(ring.pack(difference.astype(np.uint64)))
    rejects(game, 2, replaced(own, **minus), match="uploads something else than it committed to")
    game.play("Decrypt")
    first = hashlib.sha256(minus["first"]).digest()
    changed = with_entry(game.outbox[0], "uploads", 2, first=first, second=minus["second"])
    refuses(game, 0, changed, match=f"shown for {name(game, 2)} is not the one that it committed to")


def test_in_semi_honest_mode_the_list_of_contributors_is_checked():
    game = Play(5, "semi-honest").play("Decrypt", {4: "RevealKey"})
    second = game.outbox[0].second
    for shown, told in (
        ((1, 2, 3), "left our upload out of the sum"),
        ((0, 2, 1), "not ascending, or names someone twice"),
        ((0, 1, 1, 2), "not ascending, or names someone twice"),
        ((0, 1, 2, 4), f"{name(game, 4)}, who have no part in this sum"),
        ((0, 1, 2, 77), "#77, who have no part"),
    ):
        refuses(game, 0, Aggregate(shown, second), match=told)
    caught = refuses(game, 0, Aggregate((0, 1), second), BelowThreshold)
    assert (caught.stage, caught.present, caught.needed) == ("EncryptedInput", 2, 3)


def bad_halves(game):
    """Of a ciphertext: a number that is no residue, and other lengths."""
    good, layout = np.zeros(game.server.second.size, np.uint64), game.server.layout
    for at in (0, -1):
        for value in (layout.chain.modulus, layout.ring.modulus - 1):
            bad = good.copy()
            bad[at] = value
            yield memoryview(layout.ring.pack(bad))
    whole = layout.ring.pack(good)
    yield from map(memoryview, (b"", whole[:-1], whole + b"\0", whole + whole))


@modes
def test_what_is_no_ciphertext_is_refused_by_name(mode):
    game = Play(3, mode).play("EncryptedInput")
    honest = game.fork().answer(1)
    for half in ("first", "second"):
        for bad in bad_halves(game):
            branch, sent = game.fork(), replaced(honest, **{half: bad})
            if mode == "active":  # it committed to that
                first = hashlib.sha256(sent.first).digest()
                digest = upload_digest(game.subject.sum_id(game.session.id), 1, game.agreed.key, first, sent.second)
                branch.server = msgspec.structs.replace(branch.server, digests={**branch.server.digests, 1: digest})
            rejects(branch, 1, sent, match="sent no ciphertexts of this sum")
            assert not branch.server.first.any()
            assert not branch.server.second.any()


@modes
def test_a_participant_decrypts_nothing_that_is_no_ciphertext(mode):
    game = Play(3, mode).play("Decrypt")
    for bad in bad_halves(game):
        if mode == "semi-honest":
            shown = Aggregate((0, 1, 2), bad)
        else:
            first = game.outbox[0].uploads[1].first
            digest = upload_digest(game.subject.sum_id(game.session.id), 1, game.agreed.key, first, bad)
            state = game.states[0]
            game.states[0] = msgspec.structs.replace(state, digests={**state.digests, 1: digest})
            shown = with_entry(game.outbox[0], "uploads", 1, second=bad)
        refuses(game, 0, shown, DecodeError)


@modes
def test_the_server_takes_an_upload_of_this_sum_under_this_key_once(mode):
    game = Play(4, mode, threshold=3).play("EncryptedInput", {3: "RevealKey"})
    sent = game.fork().answer(0)
    rejects(game, 0, replaced(sent, key=bytes(32)), match="another joint key than this sum's")
    other = replaced(game.subject, model_digest=b"\1" * 32)
    rejects(game, 0, replaced(sent, subject=other), match="did not sum what was asked for: model")
    rejects(game, 3, sent, match="not sent")
    if mode == "active":
        rejects(game, 1, sent, match="uploads something else")
    game.receive(0, sent)
    rejects(game, 0, sent, match="answered twice")


def test_an_upload_under_another_joint_key_is_refused_by_name():
    """Not added to those under this one, which would give garbage."""
    other = Play(3, "semi-honest", seed=b"other").play("EncryptedInput")
    game = Play(3, "semi-honest").play("EncryptedInput")
    rejects(game, 0, other.answer(0), match="another joint key")


# --- partial decryptions ---


@modes
def test_a_partial_decryption_of_another_ciphertext_is_refused_by_name(mode):
    game = Play(3, mode).play("Decrypt")
    honest = game.fork().answer(1)
    rejects(game, 1, replaced(honest, digest=bytes(32)), match="decrypted another ciphertext than the sum")
    other = Play(3, mode, seed=b"x").play("Decrypt").answer(1)
    rejects(game, 1, other, match="decrypted another ciphertext than the sum")
    game.receive(1, honest)
    rejects(game, 1, honest, match="answered twice")
    assert game.play().exact()


def test_what_is_no_partial_decryption_is_refused_by_name():
    game = Play(3).play("Decrypt")
    honest = game.fork().answer(1)
    before = game.server.first.copy()
    for bad in bad_halves(game):
        rejects(game, 1, replaced(honest, packed=bad), match="sent no partial decryption")
        assert (game.server.first == before).all()
    assert game.play().exact()


@pytest.mark.parametrize("keys", ["threshold", "shared", "holder"])
def test_a_wrong_partial_decryption_never_opens(keys):
    """Random, over 200 seeds; and none, the opposite, twice as much, one of another secret."""
    game = Play(3, keys=keys).play("Decrypt")
    sender = game.number if keys == "holder" else 0
    honest = {u: game.answer(u) for u in game.outbox}
    modulus, rng = game.setting.chain.modulus, np.random.default_rng(0)
    right = unpacked(game, honest[sender].packed)
    wrong = [rng.integers(0, modulus, right.shape, np.uint64) for _ in range(200)]
    wrong += [right * 0, (np.uint64(modulus) - right) % np.uint64(modulus), (2 * right) % np.uint64(modulus)]
    wrong += [np.roll(right, 1, axis=1), unpacked(game, honest[list(honest)[-1]].packed)] if keys == "threshold" else []
    for residues in wrong:
        branch = game.fork()
        with pytest.raises(RemoteProtocolError, match="the sum does not open") as caught:
            branch.finish({**honest, sender: replaced(honest[sender], packed=packed(game, residues))})
        assert caught.value.culprits == frozenset()
    assert (game.fork().finish(honest).total == sum_of(game.vectors, range(3))).all()


def test_a_missing_partial_decryption_is_counted():
    game = Play(4).play("Decrypt")
    for u in (0, 1):
        game.receive(u, game.answer(u))
    with pytest.raises(BelowThreshold) as caught:
        game.close()
    assert (caught.value.stage, caught.value.present, caught.value.needed) == ("Decrypt", 2, 3)


@pytest.mark.parametrize("keys", ["holder", "shared"])
@modes
def test_who_decrypts_alone_and_does_not_answer_loses_the_sum(mode, keys):
    game = Play(4, mode, keys).play("Decrypt")
    assert list(game.outbox) == [4 if keys == "holder" else 0]
    with pytest.raises(BelowThreshold, match="Decrypt") as caught:
        game.close()
    assert (caught.value.present, caught.value.needed) == (0, 1)


@pytest.mark.parametrize("keys", ["holder", "shared"])
def test_who_was_not_asked_to_decrypt_is_refused(keys):
    game = Play(4, keys=keys).play("Decrypt")
    honest = game.answer(next(iter(game.outbox)))
    rejects(game, 1, honest, match="not sent")


@modes
def test_after_an_answer_there_is_no_seed_to_answer_with_again(mode):
    game = Play(4, mode).play("Decrypt")
    seed, flood = game.states[0].seed, game.states[0].flood
    game.answer(0)
    assert isinstance(game.states[0], client.Answered)
    assert not {"seed", "flood"} & set(client.Answered.__struct_fields__)
    for secret in (seed, flood):
        assert secret not in wire.encode(game.states[0])


# --- standing in for those who left ---


def at_recovery(n, mode, threshold=None, gone=1):
    leaves = {n - 1 - i: "Decrypt" for i in range(gone)}
    return Play(n, mode, threshold=threshold).play("Recover", leaves)


WRONG = [bytes(33), (12345).to_bytes(33, "big"), PRIME.to_bytes(33, "big"), b"\xff" * 33, b"", bytes(34)]


@pytest.mark.parametrize("wrong", WRONG, ids=["zero", "other", "p", "most", "none", "long"])
def test_a_wrong_share_of_a_seed_names_its_sender_and_the_sum_is_right(wrong):
    game = at_recovery(5, "semi-honest")
    honest = game.fork().answer(1)
    opened = game.finish({1: replaced(honest, shares={4: wrong})})
    assert opened.suspects == {1}
    assert opened.contributors == frozenset(range(5))
    assert game.exact()


@pytest.mark.parametrize("liars", [1, 2, 3])
def test_too_many_wrong_shares_of_a_seed_never_give_a_wrong_sum(liars):
    """Without a surplus: whose share is wrong cannot be told."""
    game = at_recovery(4, "active")
    lies = {u: replaced(game.fork().answer(u), shares={3: (u + 7).to_bytes(33, "big")}) for u in range(liars)}
    told = f"the seed of {name(game, 3)}: .*do not lead to the secret"
    with pytest.raises(RemoteProtocolError, match=told) as caught:
        game.finish(lies)
    assert caught.value.culprits == frozenset()


def test_shares_of_two_seeds_exchanged():
    game = at_recovery(6, "semi-honest", 4, gone=2)
    honest = game.fork().answer(1).shares
    with pytest.raises(RemoteProtocolError, match="do not lead to the secret"):
        game.finish({1: replaced(game.fork().answer(1), shares={4: honest[5], 5: honest[4]})})
    game = at_recovery(7, "semi-honest", 4, gone=2)
    honest = game.fork().answer(1).shares
    opened = game.finish({1: replaced(game.fork().answer(1), shares={5: honest[6], 6: honest[5]})})
    assert opened.suspects == {1}
    assert game.exact()


@modes
def test_an_answer_with_shares_of_other_seeds_than_asked_for(mode):
    game = at_recovery(4, mode)
    honest = game.fork().answer(0)
    share = honest.shares[3]
    for shares in ({}, {3: share, 1: share}, {1: share}, {77: share}):
        rejects(game, 0, replaced(honest, shares=shares), match="shares of other seeds than it was asked for")
    rejects(game, 3, honest, match="not sent")
    game.receive(0, honest)
    rejects(game, 0, honest, match="answered twice")


def test_a_seed_that_does_not_lead_to_the_share_of_the_key():
    """Its owner committed to one, and to the share that follows from another: the sum does not open."""
    game = Play(4).play("RevealKey")
    for u in game.outbox:
        game.receive(u, game.answer(u))
    game.states[3] = msgspec.structs.replace(game.states[3], seed=b"\1" * 32)
    game.close()
    game.play("Decrypt")
    with pytest.raises(RemoteProtocolError, match="does not open"):
        game.finish()


@modes
@pytest.mark.parametrize(
    ("missing", "told"),
    [
        ((), "empty, not ascending, or names one twice"),
        ((3, 2), "empty, not ascending, or names one twice"),
        ((3, 3), "empty, not ascending, or names one twice"),
        ((0,), "calls us missing although we answered"),
        ((0, 3), "calls us missing although we answered"),
        ((4,), "have no part in the joint key"),
        ((3, 77), "#77 have no part in the joint key"),
    ],
    ids=str,
)
def test_a_list_of_the_missing_that_makes_no_sense(missing, told, mode):
    game = Play(5, mode).play("Recover", {4: "RevealKey", 3: "Decrypt"} if mode == "semi-honest" else {4: "RevealKey"})
    if game.stage is None:  # nobody is missing: the server asks all the same
        game = Play(5, mode).play("Decrypt", {4: "RevealKey"})
        game.answer(0)
        game.stage = "Recover"
    refuses(game, 0, Missing(missing), match=told)


@modes
def test_so_many_called_missing_that_fewer_than_t_have_answered(mode):
    game = Play(5, mode).play("Decrypt")
    for u in game.outbox:
        game.answer(u)
    game.stage, t = "Recover", game.session.params.threshold
    caught = refuses(game, 0, Missing(tuple(range(t - 1, 5))), BelowThreshold)
    assert (caught.stage, caught.present, caught.needed) == ("Decrypt", t - 1, t)
    game.answer(0, Missing(tuple(range(t, 5))))


def test_with_shared_keys_nobody_gives_a_seed_to_the_server():
    game = Play(4, keys="shared").play("Decrypt")
    seeds = {u: game.states[u].seed for u in range(4)}
    shown = next(iter(game.outbox.values()))
    for u in range(4):
        game.answer(u, shown)
    game.stage, given = "Recover", b""
    for u in range(4):
        try:
            given += wire.encode(game.answer(u, Missing(((u + 1) % 4,))))
        except SecAggError:
            continue
    assert not any(seed in given for seed in seeds.values())


# --- replays, and messages of the other mode ---


@modes
@pytest.mark.parametrize("keys", KEYS)
def test_no_answer_of_another_round_is_taken(mode, keys):
    game, before = Play(3, mode, keys, threshold=3), Play(3, mode, keys, threshold=3, number=7)
    while game.stage is not None:
        for u in game.outbox:
            old = before.answer(u)
            with pytest.raises(RemoteProtocolError, match=r"another session|did not sign|not signed|another joint key"):
                game.fork().receive(u, old)
            game.receive(u, game.answer(u))
            before.receive(u, old)
        game.close()
        before.close()
    assert game.exact()


@modes
@pytest.mark.parametrize("keys", KEYS)
def test_no_request_of_another_round_is_answered(mode, keys):
    game, before = Play(4, mode, keys), Play(4, mode, keys, number=7)
    while game.stage is not None:
        for u in game.outbox:
            old = before.outbox[u]
            if old is not None and not isinstance(old, Missing | Aggregate | HeldAggregate):
                with pytest.raises(RemoteProtocolError):
                    game.fork().answer(u, old)
            game.receive(u, game.answer(u))
            before.receive(u, before.answer(u))
        game.close()
        before.close()


@pytest.mark.parametrize("stage", ["AdvertiseKeys", "ShareKeys", "RevealKey", "EncryptedInput", "Decrypt", "Recover"])
def test_the_terms_of_an_answer_are_checked_at_every_stage(stage):
    """In semi-honest mode, where no signature shows it."""
    game = Play(5, "semi-honest").play(stage, {4: "Decrypt"})
    other = session_of(5, "semi-honest", number=1).terms
    told = "sent a message of another session: round 1 where 0 was expected"
    rejects(game, 0, replaced(game.answer(0), terms=other), match=told)


def test_a_directory_of_another_session_says_what_differs():
    game = Play(4, "semi-honest").play("ShareKeys")
    other = session_of(4, "semi-honest", number=9).terms
    told = f"the key listed for {name(game, 1)} is for another session: round 9 where 0 was expected"
    refuses(game, 0, with_entry(game.outbox[0], "keys", 1, terms=other), match=told)


def test_semi_honest_steps_are_refused_in_an_active_session():
    game = Play(3).play("ConsistencyCheck")
    with pytest.raises(LocalProtocolError, match="only after its consistency check"):
        client.upload_semi_honest(game.states[0])
    game.play("Decrypt")
    second = packed(game, game.server.second)
    refuses(game, 0, Aggregate((0, 1, 2), second), match="active mode does not have")


@modes
def test_a_site_decrypts_nothing_where_a_holder_has_the_key(mode):
    game = Play(3, mode, keys="holder").play("Decrypt")
    shown = next(iter(game.outbox.values()))
    shown = shown.aggregate if mode == "semi-honest" else Uploads(shown.uploads)
    with pytest.raises(LocalProtocolError, match="only the holder decrypts"):
        client.decrypt(game.states[0], shown, game.setting)


def test_active_steps_are_refused_in_a_semi_honest_session():
    game = Play(3, "semi-honest").play("EncryptedInput")
    encrypted = game.encrypt(0, game.outbox[0])
    with pytest.raises(LocalProtocolError, match="commits to no uploads"):
        client.commit(encrypted, game.identities[0])
    game.play("Decrypt")
    half = HalfUpload(bytes(32), packed(game, game.server.second))
    refuses(game, 0, Uploads(dict.fromkeys(range(3), half)), match="semi-honest mode does not have")


# --- the holder of the keys ---


def test_only_the_holder_makes_the_key():
    game = Play(3, keys="holder")
    for identity in (*identities(3), STRANGER):
        with pytest.raises(LocalProtocolError, match="not the identity of who holds the keys"):
            holder.hold_key(game.session, game.setting, identity, bytes)
    with pytest.raises(LocalProtocolError, match="not the identity"):
        holder.hold_key(game.session, Play(3).setting, HOLDER, bytes)


@modes
def test_a_holders_key_is_signed_in_any_mode(mode):
    game = Play(3, mode, "holder")
    honest = game.answer(3)
    other = Play(3, mode, "holder", number=1).answer(3)
    lies = [
        replaced(honest, seed=bytes(32)),
        replaced(honest, packed=honest.packed[::-1]),
        replaced(honest, packed=b""),
        replaced(honest, signature=b""),
        replaced(honest, signature=other.signature),
        replaced(other, terms=honest.terms),
    ]
    sid = game.session.id
    payload = joint_key.holder_payload(honest.seed, honest.packed)
    lies += [replaced(honest, signature=each.sign(Label.SIGN_CKKS_HOLDER, sid, payload)) for each in identities(3)]
    for lie in lies:
        for taken in (
            lambda lie=lie: game.receive(3, lie),
            lambda lie=lie: holder.holders_key(game.session, lie, game.setting),
        ):
            with pytest.raises(RemoteProtocolError, match="not signed by trustee, who holds it") as caught:
                taken()
            assert caught.value.culprits == {"trustee"}
    for taken in (lambda: game.receive(3, other), lambda: holder.holders_key(game.session, other, game.setting)):
        with pytest.raises(RemoteProtocolError, match="trustee is for another session: round 1") as caught:
            taken()
        assert caught.value.culprits == {"trustee"}
    with pytest.raises(LocalProtocolError, match="nobody holds the keys"):
        holder.holders_key(game.session, honest, Play(3).setting)
    game.receive(3, honest)
    assert game.play().exact()


@modes
def test_a_holders_key_that_is_none(mode):
    game = Play(3, mode, "holder")
    honest = game.answer(3)
    for share in (b"", honest.packed[:-1], b"\xff" * len(honest.packed)):
        payload = joint_key.holder_payload(honest.seed, share)
        signed = HOLDER.sign(Label.SIGN_CKKS_HOLDER, game.session.id, payload)
        with pytest.raises(RemoteProtocolError, match="gave no share of a key"):
            game.receive(3, replaced(honest, packed=share, signature=signed))


def test_the_server_takes_the_holders_key_once_and_from_the_holder():
    game = Play(3, keys="holder")
    honest = game.answer(3)
    for sender in (0, 4):
        with pytest.raises(RemoteProtocolError, match="not sent, or twice"):
            game.receive(sender, honest)
    with pytest.raises(BelowThreshold, match="keys' holder"):
        game.fork().close()
    game.receive(3, honest)
    with pytest.raises(RemoteProtocolError, match="not sent, or twice"):
        game.receive(3, honest)
    missing = server.start(game.session, Play(3).setting)
    with pytest.raises(RemoteProtocolError, match="not sent, or twice"):
        server.receive_holder_key(server.CollectingHolder(game.session, missing.setting), 3, honest)


def held(game, message, error=RemoteProtocolError, match=None):
    """The holder refuses it and still has its key."""
    before = game.states[game.number]
    with pytest.raises(error, match=match) as caught:
        game.answer(game.number, message)
    assert game.states[game.number] is before
    return caught.value


def test_the_holder_decrypts_only_what_t_participants_signed():
    game = Play(5, keys="holder").play("Decrypt", {4: "CommitInput"})
    shown = game.outbox[5]
    assert isinstance(shown, HeldUploads)
    signatures, digests, uploads = shown.signatures, shown.digests, shown.uploads
    few = replaced(shown, signatures=only(signatures, range(3)))
    caught = held(game, few, BelowThreshold)
    assert (caught.stage, caught.present, caught.needed) == ("ConsistencyCheck", 3, 4)
    caught = held(game, replaced(shown, uploads=only(uploads, range(3))), BelowThreshold)
    assert (caught.stage, caught.present, caught.needed) == ("EncryptedInput", 3, 4)
    held(game, replaced(shown, signatures={**signatures, 1: b""}), match=f"{name(game, 1)} did not sign the uploads")
    held(game, replaced(shown, signatures={**signatures, 1: signatures[2]}), match="did not sign the uploads")
    held(game, replaced(shown, digests={**digests, 1: bytes(32)}), match="did not sign the uploads")
    held(game, replaced(shown, digests=only(digests, range(3)), signatures=only(signatures, range(3))), BelowThreshold)
    held(
        game, replaced(shown, signatures={**signatures, 4: signatures[1]}), match=f"{name(game, 4)}, who upload nothing"
    )
    held(game, replaced(shown, uploads={**uploads, 4: uploads[1]}), match=f"{name(game, 4)}, who committed to none")
    for u in (5, 77):
        more = replaced(shown, digests={**digests, u: digests[1]}, signatures={**signatures, u: signatures[1]})
        held(game, more, match=f"#{u}, who are not on the roster")
    other = replaced(game.subject, purpose="other")
    held(game, replaced(shown, subject=other), match="did not sign the uploads")
    held(game, replaced(shown, uploads={**uploads, 1: uploads[2]}), match="is not the one that it committed to")
    assert game.play().exact()


def test_the_holder_decrypts_only_what_is_encrypted_to_its_key():
    """The key is in what the participants signed."""
    other = Play(3, keys="holder", seed=b"other").play("Decrypt").outbox[3]
    game = Play(3, keys="holder").play("Decrypt")
    held(game, other, match="did not sign the uploads")


def test_in_semi_honest_mode_the_holder_checks_the_list_of_contributors():
    game = Play(4, "semi-honest", "holder").play("Decrypt")
    shown = game.outbox[4]
    second = shown.aggregate.second
    for listed, told in (((0, 2, 1), "ascending"), ((0, 1, 1), "twice"), ((0, 1, 2, 4), "#4, who have no part")):
        held(game, HeldAggregate(game.subject, Aggregate(listed, second)), match=told)
    held(game, HeldAggregate(game.subject, Aggregate((0, 1), second)), BelowThreshold)
    for bad in bad_halves(game):
        held(game, HeldAggregate(game.subject, Aggregate((0, 1, 2), bad)), DecodeError)


def test_the_holder_refuses_the_other_modes_message():
    active, semi = (Play(3, mode, "holder").play("Decrypt") for mode in MODES)
    held(active, semi.outbox[3], match="active mode does not have")
    held(semi, active.outbox[3], match="semi-honest mode does not have")


def test_the_holder_decrypts_once():
    game = Play(3, keys="holder").play("Decrypt")
    state = game.states[3]
    game.answer(3)
    assert type(game.states[3]) is client.Finished
    for secret in (state.seed, state.flood):
        assert secret not in wire.encode(game.states[3])


# --- who can read what ---


def secrets_of(game, u):
    """All that a participant has when it decrypts: seeds, shares taken for seeds, and itself."""
    state = game.states[u]
    found = {state.seed, state.flood, bytes(32)}
    for share in state.held.values():
        found |= {share[-32:], share[:32]}
    return found


def readings(game, tries, upload):
    """What opens of an upload with a secret key made of seeds, for each of `tries` where anything does."""
    chain = game.setting.chain
    field = arithmetic(chain.degree, chain.modulus)
    for seeds in tries:
        phase = field.products(unpacked(game, upload.second), secret_key(chain, game.session.id, seeds))
        field.add(phase, unpacked(game, upload.first))
        try:
            yield game.server.layout.decode(phase)
        except RemoteProtocolError:
            continue


def uploaded_by(game, u):
    """An upload as the server got it."""
    data = next(data for stage, sender, data in game.heard if (stage, sender) == ("EncryptedInput", u))
    return wire.decode(data, EncryptedInput)


@modes
def test_a_site_that_is_given_anothers_upload_cannot_read_it(mode):
    """With its own secret, with what it holds of others', and with all of t - 1 colluders together."""
    game = Play(5, mode).play("Decrypt")
    victim = uploaded_by(game, 0)
    colluders = range(1, game.session.params.threshold)
    own = {u: game.states[u].seed for u in colluders}
    tries = [{u: seed} for u, seed in own.items()] + [own]
    for u in colluders:
        for candidate in secrets_of(game, u):
            tries += [{0: candidate}, {**own, 0: candidate}, dict.fromkeys(range(5), candidate)]
            tries += [{**own, v: candidate} for v in range(5) if v not in own]
    # All of the key but the victim's share: what the colluders would have if everyone but the victim were one of them.
    tries.append({u: game.states[u].seed for u in range(1, 5)})
    assert list(readings(game, tries, victim)) == []
    # And it is the key that is lacking: with the victim's seed too it opens.
    everyone = {u: game.states[u].seed for u in range(5)}
    assert (next(readings(game, [everyone], victim)) == game.vectors[0]).all()


@modes
def test_a_site_that_is_given_anothers_upload_reads_it_where_keys_are_shared(mode):
    game = Play(4, mode, "shared").play("Decrypt")
    state = game.states[2]
    seeds = {v: share[-32:] for v, share in state.held.items()}
    assert (next(readings(game, [seeds], uploaded_by(game, 0))) == game.vectors[0]).all()


def test_a_site_cannot_read_anothers_upload_where_a_holder_has_the_key():
    game = Play(4, keys="holder").play("Decrypt")
    tries = [{4: each} for u in range(4) for each in secrets_of(game, u)]
    assert list(readings(game, tries, uploaded_by(game, 0))) == []
    assert (next(readings(game, [{4: game.states[4].seed}], uploaded_by(game, 0))) == game.vectors[0]).all()


def test_fewer_than_t_shares_of_a_seed_are_no_seed():
    """Through every polynomial of the degree below: the secret is not where t - 1 shares would put it."""
    game = Play(5, "semi-honest").play("Decrypt")
    seed = int.from_bytes(game.states[0].seed, "big")
    shares = {u: int.from_bytes(game.states[u].held[0], "big") for u in range(1, 5)}

    def at_zero(xs):
        total = 0
        for x in xs:
            term = shares[x]
            for y in xs:
                if y != x:
                    term = term * (y + 1) * pow(y - x, -1, PRIME) % PRIME
            total += term
        return total % PRIME

    assert all(at_zero(xs) == seed for xs in itertools.combinations(shares, 3))
    assert all(at_zero(xs) != seed for size in (1, 2) for xs in itertools.combinations(shares, size))


def everything_in(value):
    """Bytes of all that can be reached from an object: its fields, arrays, and containers."""
    seen, todo, found = set(), [value], []
    while todo:
        each = todo.pop()
        if id(each) in seen:
            continue
        seen.add(id(each))
        if isinstance(each, bytes | bytearray | memoryview):
            found.append(bytes(each))
        elif isinstance(each, np.ndarray):
            found.append(each.tobytes())
        elif isinstance(each, str | int | float | type) or each is None or callable(each):
            continue
        elif isinstance(each, msgspec.Struct):
            todo += [getattr(each, field) for field in each.__struct_fields__]
        elif isinstance(each, dict):
            todo += [*each.keys(), *each.values()]
        elif isinstance(each, list | tuple | set | frozenset):
            todo += each
        else:
            todo += gc.get_referents(each)
    return b"\0".join(found)


@modes
@pytest.mark.parametrize("keys", KEYS)
def test_the_server_holds_no_secret_key(mode, keys):
    """In nothing that it received and in none of its states is a seed or what follows from one, in any form."""
    game, has, secrets = Play(4, mode, keys), [], set()
    people = [4] if keys == "holder" else range(4)
    while game.stage is not None:
        for u in game.outbox:
            game.receive(u, game.answer(u))
            has.append(everything_in(game.server))
            secrets |= {
                getattr(game.states[u], f) for f in ("channel_secret", "seed", "flood") if hasattr(game.states[u], f)
            }
        game.close()
        has.append(everything_in(game.server) + everything_in(game.outbox))
    has += [data for _, _, data in game.heard]
    secrets.discard(bytes(32))  # of those who have no part in a holder's key
    assert len(secrets) == {"holder": 2}.get(keys, 12)
    chain, seeds = game.setting.chain, [s for s in secrets if len(s) == 32]
    for u, seed in itertools.product(people, seeds):
        secret = joint_key._secret_and_error(chain, game.session.id, u, seed)[0]
        field = arithmetic(chain.degree, chain.modulus)
        forms = [secret, secret.astype(np.int8), field.embed(secret), field.transformed(field.embed(secret)[None])]
        forms.append(Ring(chain.bits).pack(field.embed(secret)))
        secrets |= {form if isinstance(form, bytes) else form.tobytes() for form in forms}
    everything = b"\0".join(has)
    assert len(everything) > 100_000
    assert not any(secret[:64] in everything for secret in secrets if len(secret) >= 32)


# --- the key from the sum (Li and Micciancio 2021) ---


def raw_tenseal_sum(n=4096, bits=(48, 30), scale=2.0**40, sites=4):
    """A sum that nobody floods: the context with the key, what the server sees of the sum, and what is published."""
    context = ts.context(ts.SCHEME_TYPE.CKKS, n, coeff_mod_bit_sizes=list(bits))
    context.global_scale = scale
    rng = np.random.default_rng(5)
    total = None
    for _ in range(sites):
        upload = [ts.ckks_vector(context, rng.uniform(-1, 1, n // 2)) for _ in range(2)]
        total = upload if total is None else [a + b for a, b in zip(total, upload, strict=True)]
    published = [np.array(each.decrypt()) for each in total]
    return context, [each.ciphertext()[0] for each in total], published


def attacked(n, bits, scale, ciphertexts, published):
    """The key's residues modulo the first prime, from ciphertexts and what was published; everything else is public.

    TenSEAL's decoder drops imaginary parts, so it takes two ciphertexts: encode(2 m) - c0[i] - c0[N-1-i] is
    c1[i] s[i] + c1[N-1-i] s[N-1-i].
    """
    parameters = seal_api.EncryptionParameters(seal_api.SCHEME_TYPE.CKKS)
    parameters.set_poly_modulus_degree(n)
    primes = seal_api.CoeffModulus.Create(n, list(bits))
    parameters.set_coeff_modulus(primes)
    context = seal_api.SEALContext(parameters, True, seal_api.SEC_LEVEL_TYPE.TC128)
    encoder, q = seal_api.CKKSEncoder(context), primes[0].value()
    messages = []
    for each in published:
        plain = seal_api.Plaintext()
        encoder.encode((2 * each).tolist(), context.first_parms_id(), scale, plain)
        messages.append([plain[i] for i in range(n)])
    (a, b), (ma, mb) = [[c[i] for i in range(2 * n)] for c in ciphertexts], messages
    found = [0] * n
    for i in range(n // 2):
        j = n - 1 - i
        x, y = (ma[i] - a[i] - a[j]) % q, (mb[i] - b[i] - b[j]) % q
        a0, a1, b0, b1 = a[n + i], a[n + j], b[n + i], b[n + j]
        inverse = pow(a0 * b1 - a1 * b0, -1, q)
        found[i], found[j] = (x * b1 - y * a1) * inverse % q, (a0 * y - b0 * x) * inverse % q
    return found


def test_the_key_is_recovered_from_an_unflooded_sum_of_raw_tenseal():
    n, bits, scale = 4096, (48, 30), 2.0**40
    context, ciphertexts, published = raw_tenseal_sum(n, bits, scale)
    key = context.secret_key().data
    found = attacked(n, bits, scale, ciphertexts, published)
    assert found == [key.data()[i] for i in range(n)]


def seen_by_the_server(game):
    """Sums of first and second halves, and the phase that the server opens."""
    game.play("Decrypt")
    secret = secret_key(
        game.setting.chain,
        game.session.id,
        {u: game.states[u].seed for u in ([game.number] if game.setting.keys == "holder" else range(game.number))},
    )
    first, second = game.server.first.copy(), game.server.second.copy()
    for u in game.outbox:
        game.receive(u, game.answer(u))
    return first, second, game.server.first.copy(), secret


def solved(game, first, second, phase):
    """The s of phase = c0 + c1 s, transformed, by division at every place of the first ciphertext."""
    chain = game.setting.chain
    field, modulus = arithmetic(chain.degree, chain.modulus), chain.modulus
    difference = field.transformed(((phase.astype(object) - first.astype(object)) % modulus).astype(np.uint64))[0]
    divisor = field.transformed(second)[0]
    found = [int(x) * pow(int(y), -1, modulus) % modulus if y else 0 for x, y in zip(difference, divisor, strict=True)]
    return np.array(found, np.uint64)


@pytest.fixture
def unflooded(monkeypatch):
    monkeypatch.setattr(polynomials, "gaussian", lambda stream, deviation, size: np.zeros(size, np.int64))


@pytest.mark.usefixtures("unflooded")
@pytest.mark.parametrize("keys", KEYS)
def test_without_flooding_the_key_is_recovered_from_our_sum(keys):
    """So the attack below is one on our format."""
    game = Play(3, keys=keys)
    first, second, phase, secret = seen_by_the_server(game)
    assert (solved(game, first, second, phase) == secret).all()


@pytest.mark.parametrize("keys", ["threshold", "holder"])
def test_with_flooding_no_key_is_recovered_over_50_runs(keys):
    """Not a residue more than by chance, which is 2^-36 each; nor is anything small found, as a secret is."""
    hits = small = 0
    for run in range(50):
        game = Play(3, "semi-honest", keys, seed=b"run %d" % run)
        first, second, phase, secret = seen_by_the_server(game)
        found = solved(game, first, second, phase)
        hits += int((found == secret).sum())
        chain = game.setting.chain
        field = arithmetic(chain.degree, chain.modulus)
        guess = field.centred(inverse(field, found))
        small += int((np.abs(guess) <= 3).sum())
        game.close()
        assert game.exact()
    assert hits + small <= 1


def inverse(field, transformed):
    """The polynomial of a transform: its product with one."""
    one = np.zeros((1, field.degree), np.uint64)
    one[0, 0] = 1
    return field.products(one, transformed)[0]


def test_the_published_sum_says_nothing_of_the_noise():
    """An exact sum is the same whatever was drawn: nothing but the noise and the key differ between these runs."""
    totals = {Play(3, "semi-honest", seed=b"%d" % run).play().server.total.tobytes() for run in range(5)}
    assert len(totals) == 1


def test_the_answers_of_one_participant_do_not_give_its_secret():
    """One participant's partial decryption, divided by the sum, is not its secret; without noise it is."""
    game = Play(3).play("Decrypt")
    state = game.states[0]
    chain = game.setting.chain
    secret = secret_key(chain, game.session.id, {0: state.seed})
    partial = unpacked(game, game.answer(0).packed)
    found = solved(game, np.zeros_like(partial), game.server.second, partial)
    assert int((found == secret).sum()) <= 1


def test_an_encryption_of_zero_is_what_every_upload_has_in_it():
    """Two uploads of the same vector share no residue beyond chance."""
    game = Play(3, "semi-honest", vectors=[vectors_of(3)[0]] * 3).play("Decrypt")
    a, b = uploaded_by(game, 0), uploaded_by(game, 1)
    for half in ("first", "second"):
        assert int((unpacked(game, getattr(a, half)) == unpacked(game, getattr(b, half))).sum()) <= 1
    chain = game.setting.chain
    key = joint_key.joined(chain, game.session, bytes(32), game.agreed.announcement.shares)
    assert len({c.tobytes() for c in encryptions_of_zero(chain, key.public, 3)}) == 3

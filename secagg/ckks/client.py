"""A participant's side of a sum under CKKS with a joint key, stage by stage.

The joint secret key is the sum of one of each participant, and nobody learns it: every participant multiplies the sum's
ciphertext by its own and adds noise (`decrypt`). Its own is drawn from a seed, and the seed is shared among all: where
someone has left, any t of the others give what it takes to stand in for it (`recover`). Keys serve for one sum.

In active mode a participant opens only what it has summed itself, out of uploads that everyone committed to before
anyone's was sent, and that t participants have signed. Otherwise a server could have a single upload decrypted in the
sum's place, or a participant that helps it could upload the opposite of another's.

Source: Mouchet, Troncoso-Pastoriza, Bossuat, Hubaux, "Multiparty homomorphic encryption from
ring-learning-with-errors", PoPETs 2021, protocols CKG and CKS; the seeds' shares and the stages after Bonawitz et al.
2017.
"""

from __future__ import annotations

import hashlib
from typing import cast

import numpy as np

from secagg.ckks.decryption import (
    add_confirmed,
    add_packed,
    check_confirmations,
    check_contributors,
    is_signed,
    partial_decryption,
    uploaders,
    zeros,
)
from secagg.ckks.joint_key import (
    JointKey,
    channel_payload,
    commitment_payload,
    joined,
    key_share,
    seed_digest,
    share_digest,
    uniform_id,
    upload_digest,
    uploads_payload,
)
from secagg.ckks.messages import (
    Aggregate,
    ChannelDirectory,
    ChannelKey,
    Commitment,
    EncryptedInput,
    KeyShare,
    KeyShares,
    Missing,
    PartialDecryption,
    SealedSeeds,
    SeedInbox,
    SeedShares,
    UploadDigest,
    UploadDirectory,
    Uploads,
    UploadsConfirmation,
    UploadsConfirmations,
)
from secagg.ckks.params import Packing, Setting
from secagg.ckks.polynomials import (
    Residues,
    arithmetic,
    encryptions_of_zero,
)
from secagg.errors import LocalProtocolError, RemoteProtocolError
from secagg.keys import AgreementKey, Identity
from secagg.masking.params import Session, Subject, Terms, differences
from secagg.prg import Entropy, Label
from secagg.ring import RingVector
from secagg.sealed import channel_key, seal, unseal
from secagg.shamir import PRIME, SHARE_BYTES, split
from secagg.stages import check_identity, in_order, require
from secagg.wire import SecretState, decode_any


class Advertised(SecretState, frozen=True, tag=True):
    """After AdvertiseKeys."""

    me: int
    session: Session
    channel_secret: bytes


class Shared(SecretState, frozen=True, tag=True):
    """After ShareKeys.

    Attributes:
        uniform: What the common polynomial is drawn from.
        seed: What this participant's share of the joint key is drawn from.
        flood: What the noise of its partial decryption is drawn from.
        inbound_keys: Key of the channel from every other member of U1.
        own_share: Its share of its own seed.
    """

    me: int
    session: Session
    uniform: bytes
    seed: bytes
    flood: bytes
    inbound_keys: dict[int, bytes]
    own_share: bytes


class Revealed(SecretState, frozen=True, tag=True):
    """After RevealKey. `held` is U2 to the share of its seed, `committed` U2 to the digest of its share of the key."""

    me: int
    session: Session
    uniform: bytes
    seed: bytes
    flood: bytes
    held: dict[int, bytes]
    committed: dict[int, bytes]


class Encrypted(SecretState, frozen=True, tag=True):
    """After CommitInput: the vector is encrypted, and stays here until t have signed what everyone is going to upload.

    Attributes:
        key: Stands for the joint key.
        holders: U3, whose shares the key is the sum of.
        first: The first halves of the upload's ciphertexts, packed.
        second: The second halves.
    """

    me: int
    session: Session
    subject: Subject
    key: bytes
    holders: tuple[int, ...]
    seed: bytes
    flood: bytes
    held: dict[int, bytes]
    first: bytes
    second: bytes


class Confirmed(SecretState, frozen=True, tag=True):
    """After ConsistencyCheck: bound to one directory of uploads, `digests`."""

    encrypted: Encrypted
    digests: dict[int, bytes]


class Uploaded(SecretState, frozen=True, tag=True):
    """After EncryptedInput. In semi-honest mode `digests` is empty."""

    me: int
    session: Session
    subject: Subject
    key: bytes
    holders: tuple[int, ...]
    seed: bytes
    flood: bytes
    held: dict[int, bytes]
    digests: dict[int, bytes]


class Answered(SecretState, frozen=True, tag=True):
    """After Decrypt: the own seed is forgotten."""

    me: int
    session: Session
    holders: tuple[int, ...]
    held: dict[int, bytes]


class Finished(SecretState, frozen=True, tag=True):
    """After Recover: everything is given out and forgotten."""

    session: Session


ClientState = Advertised | Shared | Revealed | Encrypted | Confirmed | Uploaded | Answered | Finished


def decode_state(data: bytes) -> ClientState:
    """A state from the bytes that `secagg.wire.encode` made of it.

    Raises:
        DecodeError: Not the bytes of a state.
    """
    return cast(ClientState, decode_any(data, ClientState))


def advertise(session: Session, me: int, identity: Identity, entropy: Entropy) -> tuple[Advertised, ChannelKey]:
    """AdvertiseKeys: a fresh key of the channel, signed for this session.

    Raises:
        LocalProtocolError: The identity is not the roster's.
    """
    check_identity(session, me, identity)
    channel = AgreementKey(entropy(32))
    terms, signature = session.terms, b""
    if session.params.active:
        signature = identity.sign(Label.SIGN_CKKS_CHANNEL, terms.session_id, channel_payload(me, channel.public))
    return Advertised(me, session, channel.secret), ChannelKey(terms, channel.public, signature)


def share_seed(
    state: Advertised, directory: ChannelDirectory, setting: Setting, identity: Identity, entropy: Entropy
) -> tuple[Shared, SealedSeeds]:
    """ShareKeys: draw a seed, share it among all, and commit to the share of the joint key that follows from it.

    The common polynomial is a hash of the directory, to which everyone has contributed a fresh key: whoever speaks last
    can choose among uniform polynomials and no more. Commitments come before any share of the key is shown, so that
    nobody can make its own out of the others'.

    Where this may be called again from the same state, `entropy` must give the same bytes again.

    Raises:
        BelowThreshold: U1 is smaller than the threshold.
        RemoteProtocolError: Someone off the roster, a key that is not signed or for another session, a repeated or
            low-order key, or this participant's own entry missing or changed.
    """
    me, session = state.me, state.session
    terms = session.terms
    sid = terms.session_id
    channel, listed = AgreementKey(state.channel_secret), directory.keys
    _check_directory(session, terms, me, listed, channel.public)
    seed, flood, drawn = entropy(32), entropy(32), uniform_id(directory, sid)
    if setting.keys == "shared":
        shares = dict.fromkeys(listed, bytes(SHARE_BYTES - len(seed)) + seed)
    else:
        shares = split(seed, session.params.threshold, listed, entropy)
    inbound, boxes = {}, {}
    for v, theirs in listed.items():
        if v == me:
            continue
        try:
            agreed = channel.agree(theirs.channel_key)
        except RemoteProtocolError as error:
            raise RemoteProtocolError(f"{session.params.roster.name(v)}: {error}") from error
        inbound[v] = channel_key(agreed, sid, v, me)
        text = me.to_bytes(4, "big") + v.to_bytes(4, "big") + shares[v]
        boxes[v] = seal(channel_key(agreed, sid, me, v), sid, me, v, text)
    digests = seed_digest(seed, sid, me), share_digest(key_share(setting.chain, sid, me, seed, drawn), sid, me)
    signature = b""
    if session.params.active:
        signature = identity.sign(Label.SIGN_CKKS_COMMITMENT, sid, commitment_payload(me, drawn, *digests))
    shared = Shared(me, session, drawn, seed, flood, inbound, shares[me])
    return shared, SealedSeeds(terms, boxes, Commitment(*digests, signature))


def reveal(state: Shared, inbox: SeedInbox, setting: Setting) -> tuple[Revealed, KeyShare]:
    """RevealKey: open the shares of the others' seeds, and show the own share of the joint key.

    Raises:
        BelowThreshold: U2 is smaller than the threshold.
        RemoteProtocolError: Boxes and commitments of other participants, or of ones outside U1; a box that does not
            open; a commitment that is not signed, or was made for another directory.
    """
    me, session = state.me, state.session
    sid = session.id
    committed = inbox.commitments
    if inbox.boxes.keys() != committed.keys() - {me} or me not in committed:
        raise RemoteProtocolError("the server sent sealed shares of other participants than commitments")
    if strangers := inbox.boxes.keys() - state.inbound_keys.keys():
        raise RemoteProtocolError(f"shares from {session.names(strangers)}, who did not advertise keys to us")
    require(session, "ShareKeys", len(committed))
    for v, theirs in committed.items():
        payload = commitment_payload(v, state.uniform, theirs.seed, theirs.share)
        if not is_signed(session, v, theirs.signature, Label.SIGN_CKKS_COMMITMENT, sid, payload):
            raise RemoteProtocolError(
                f"{session.params.roster.name(v)} did not sign its commitment for the keys that we were shown: it was "
                "changed, or the server showed others"
            )
    own = key_share(setting.chain, sid, me, state.seed, state.uniform)
    if committed[me].share != share_digest(own, sid, me):
        raise RemoteProtocolError("the server lists another commitment for us than the one that we made")
    held = {me: state.own_share}
    for v, box in inbox.boxes.items():
        held[v] = _open_share(state.inbound_keys[v], sid, v, me, box)
    digests = {v: theirs.share for v, theirs in committed.items()}
    revealed = Revealed(me, session, state.uniform, state.seed, state.flood, in_order(held), in_order(digests))
    return revealed, KeyShare(session.terms, own)


def joint_key(state: Revealed, shown: KeyShares, setting: Setting) -> JointKey:
    """The joint public key, out of shares that are what their owners committed to.

    Raises:
        BelowThreshold: U3 is smaller than the threshold.
        RemoteProtocolError: A share from outside U2, or another than was committed to, or none of this participant.
    """
    session, sid = state.session, state.session.id
    if strangers := shown.shares.keys() - state.committed.keys():
        raise RemoteProtocolError(f"shares of the key from {session.names(strangers)}, who never committed to one")
    if state.me not in shown.shares:
        raise RemoteProtocolError("the server left our share out of the joint key although we gave it")
    require(session, "RevealKey", len(shown.shares))
    for v, packed in shown.shares.items():
        if share_digest(packed, sid, v) != state.committed[v]:
            raise RemoteProtocolError(f"the share of {session.params.roster.name(v)} is not the one it committed to")
    return joined(setting.chain, session, state.uniform, shown.shares)


def encrypt(state: Revealed, key: JointKey, setting: Setting, subject: Subject, vector: RingVector) -> Encrypted:
    """Encrypt the vector to the joint key; it leaves with `commit` and `upload`, or with `upload_semi_honest`.

    Args:
        state: After RevealKey. With a holder, `outside` makes one.
        key: From `joint_key` or `holders_key`.
        setting: As the study has it.
        subject: What is summed, as this participant knows it.
        vector: Shape [dimension] of the subject's ring. Not changed.

    Raises:
        LocalProtocolError: A vector of another shape or dtype.
        HeadroomError: The sum does not fit the study's parameters.
    """
    subject.ring.check(vector, subject.dimension)
    layout, chain = setting.packing(state.session, subject), setting.chain
    field, message = arithmetic(chain.degree, chain.modulus), layout.encode(vector)
    first, second = np.empty((2, layout.ciphertexts, chain.degree), np.uint64)
    for i, zero in enumerate(encryptions_of_zero(chain, key.public, layout.ciphertexts)):
        first[i], second[i] = zero
    field.add_signed(first, message)
    return Encrypted(
        state.me,
        state.session,
        subject,
        key.id,
        key.holders,
        state.seed,
        state.flood,
        state.held,
        layout.ring.pack(first.reshape(-1)),
        layout.ring.pack(second.reshape(-1)),
    )


def outside(session: Session, me: int) -> Revealed:
    """The state of a participant that has no part in the key, because a holder has all of it."""
    return Revealed(me, session, bytes(32), bytes(32), bytes(32), {}, {})


def commit(state: Encrypted, identity: Identity) -> UploadDigest:
    """CommitInput: sign what is going to be uploaded.

    Raises:
        LocalProtocolError: The session is semi-honest and has no such stage.
    """
    session, sum_id = state.session, state.subject.sum_id(state.session.id)
    if not session.params.active:
        raise LocalProtocolError("a semi-honest session commits to no uploads")
    digest = upload_digest(sum_id, state.me, state.key, hashlib.sha256(state.first).digest(), state.second)
    return UploadDigest(
        state.subject, state.key, digest, identity.sign(Label.SIGN_CKKS_UPLOAD, sum_id, state.key + digest)
    )


def confirm(state: Encrypted, shown: UploadDirectory, identity: Identity) -> tuple[Confirmed, UploadsConfirmation]:
    """ConsistencyCheck: sign what everyone is going to upload, so that the server can show only one such list.

    Raises:
        BelowThreshold: Fewer than t uploads.
        RemoteProtocolError: An upload from outside U3, under another key, of another sum, or not signed; or this
            participant's own missing or changed.
    """
    session, uploads = state.session, shown.uploads
    sum_id = state.subject.sum_id(session.id)
    if strangers := uploads.keys() - uploaders(session, state.holders):
        raise RemoteProtocolError(f"uploads of {session.names(strangers)}, who have no part in the joint key")
    own = upload_digest(sum_id, state.me, state.key, hashlib.sha256(state.first).digest(), state.second)
    if state.me not in uploads or uploads[state.me].digest != own:
        raise RemoteProtocolError("the server lists another upload for us than the one that we committed to, or none")
    require(session, "CommitInput", len(uploads))
    for v, theirs in uploads.items():
        name = session.params.roster.name(v)
        bound, payload = theirs.subject.sum_id(session.id), theirs.key + theirs.digest
        if not is_signed(session, v, theirs.signature, Label.SIGN_CKKS_UPLOAD, bound, payload):
            raise RemoteProtocolError(f"the upload listed for {name} is not signed by it")
        if theirs.subject != state.subject:
            raise RemoteProtocolError(f"{name} does not sum what we sum: {differences(theirs.subject, state.subject)}")
        if theirs.key != state.key:
            raise RemoteProtocolError(f"{name} encrypted to another joint key than we did: the server showed two")
    digests = in_order({v: theirs.digest for v, theirs in uploads.items()})
    signature = identity.sign(Label.SIGN_CKKS_UPLOADS, sum_id, uploads_payload(state.key, digests))
    return Confirmed(state, digests), UploadsConfirmation(signature)


def upload(state: Confirmed, confirmed: UploadsConfirmations) -> tuple[Uploaded, EncryptedInput]:
    """EncryptedInput: send the ciphertexts, for the one directory that t participants signed.

    Raises:
        BelowThreshold: Fewer than t signatures.
        RemoteProtocolError: A signature from outside the directory, or over another one.
    """
    encrypted = state.encrypted
    check_confirmations(encrypted.session, encrypted.subject, encrypted.key, state.digests, confirmed.signatures)
    return _sent(encrypted, state.digests)


def upload_semi_honest(state: Encrypted) -> tuple[Uploaded, EncryptedInput]:
    """EncryptedInput without what comes before it in active mode.

    Raises:
        LocalProtocolError: The session is active.
    """
    if state.session.params.active:
        raise LocalProtocolError("an active session uploads only after its consistency check")
    return _sent(state, {})


def decrypt(state: Uploaded, shown: Uploads | Aggregate, setting: Setting) -> tuple[Answered, PartialDecryption]:
    """Decrypt: multiply the sum by the own share of the joint secret, and add noise.

    In active mode the sum is made here, of the uploads that were confirmed; in semi-honest mode the server's word is
    taken for it. Once for each key: two answers of one participant over different sums would open both.

    Raises:
        BelowThreshold: Fewer than t uploads.
        RemoteProtocolError: An upload that is not what its owner committed to, this participant's own missing, or
            another mode's message.
        DecodeError: An upload that is none.
        LocalProtocolError: Another party holds the key.
    """
    session, layout = state.session, setting.packing(state.session, state.subject)
    if setting.keys == "holder":
        raise LocalProtocolError("with a holder's key only the holder decrypts")
    if isinstance(shown, Aggregate) == session.params.active:
        raise RemoteProtocolError(f"the server sent what a session in {session.params.mode} mode does not have")
    if state.me not in (shown.contributors if isinstance(shown, Aggregate) else shown.uploads):
        raise RemoteProtocolError("the server left our upload out of the sum although we sent it")
    total = zeros(layout)
    if isinstance(shown, Aggregate):
        check_contributors(session, shown.contributors, uploaders(session, state.holders))
        add_packed(total, shown.second, layout)
    else:
        add_confirmed(total, session, state.subject, state.key, state.digests, shown.uploads, layout)
    return _answer(state, total, setting, layout)


def recover(state: Answered, shown: Missing) -> tuple[Finished, SeedShares]:
    """Recover: give the shares of the seeds of those who gave no partial decryption.

    A server that calls others missing than it should learns no more: whatever it shows to whom, the share of the joint
    secret of one honest participant at least stays unknown while less than 2 t - n of n help it.

    Raises:
        RemoteProtocolError: Nobody is missing, or someone who has no part in the key, or this participant.
        BelowThreshold: So many are missing that fewer than t can have answered.
    """
    session, missing = state.session, set(shown.missing)
    if not missing or list(shown.missing) != sorted(missing):
        raise RemoteProtocolError(
            "the server's list of those who are missing is empty, not ascending, or names one twice"
        )
    if not missing <= set(state.holders):
        raise RemoteProtocolError(f"{session.names(missing - set(state.holders))} have no part in the joint key")
    if state.me in missing:
        raise RemoteProtocolError("the server calls us missing although we answered")
    require(session, "Decrypt", len(state.holders) - len(missing))
    shares = {v: state.held[v] for v in sorted(missing)}
    return Finished(session), SeedShares(session.terms, shares)


def _sent(state: Encrypted, digests: dict[int, bytes]) -> tuple[Uploaded, EncryptedInput]:
    uploaded = Uploaded(
        state.me,
        state.session,
        state.subject,
        state.key,
        state.holders,
        state.seed,
        state.flood,
        state.held,
        digests,
    )
    first, second = memoryview(state.first), memoryview(state.second)
    return uploaded, EncryptedInput(state.session.terms, state.subject, state.key, first, second)


def _answer(state: Uploaded, total: Residues, setting: Setting, layout: Packing) -> tuple[Answered, PartialDecryption]:
    seeds, answered = {state.me: state.seed}, Answered(state.me, state.session, state.holders, state.held)
    if setting.keys == "shared":
        # Everyone has all of them, and nobody gives one away: there is nothing to recover.
        seeds = {v: state.held[v][-len(state.seed) :] for v in state.holders}
        answered = Answered(state.me, state.session, (), {})
    partial = partial_decryption(state.session, seeds, state.flood, total, setting, layout)
    return answered, partial


def _check_directory(session: Session, terms: Terms, me: int, listed: dict[int, ChannelKey], own: bytes) -> None:
    roster = session.params.roster
    require(session, "AdvertiseKeys", len(listed))
    if me not in listed or listed[me].channel_key != own:
        raise RemoteProtocolError("the server lists another key for us than the one that we advertised, or none")
    if len({theirs.channel_key for theirs in listed.values()}) != len(listed):
        raise RemoteProtocolError("a public key comes twice in the directory: someone copied another's key")
    for v, theirs in listed.items():
        if v >= len(roster):
            raise RemoteProtocolError(f"participant {v} is not on the roster of {len(roster)}")
        payload, bound = channel_payload(v, theirs.channel_key), theirs.terms.session_id
        if not is_signed(session, v, theirs.signature, Label.SIGN_CKKS_CHANNEL, bound, payload):
            raise RemoteProtocolError(f"the key listed for {roster.name(v)} is not signed by it")
        if theirs.terms != terms:
            told = differences(theirs.terms, terms)
            raise RemoteProtocolError(f"the key listed for {roster.name(v)} is for another session: {told}")


def _open_share(key: bytes, sid: bytes, sender: int, me: int, box: bytes) -> bytes:
    text = unseal(key, sid, sender, me, box)
    named, share = (int.from_bytes(text[:4], "big"), int.from_bytes(text[4:8], "big")), text[8:]
    if named != (sender, me):
        raise RemoteProtocolError(f"a share from participant {sender} to {me} names {named[0]} and {named[1]} inside")
    if len(share) != SHARE_BYTES or int.from_bytes(share, "big") >= PRIME:
        raise RemoteProtocolError(f"the share from participant {sender} is no field element")
    return share

"""A participant's side of pairwise-masked secure aggregation, round by round.

Each function consumes a state and the server's message and gives the next state and the answer. States are frozen,
hold no more than the next step needs, and become bytes with `secagg.wire`, because the process may end between two
messages. Nothing here reads a clock, a socket or a random device.

Source: Bonawitz et al., "Practical secure aggregation for privacy-preserving machine learning", CCS 2017, figure 4.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import cast

from msgspec import msgpack

from secagg.errors import LocalProtocolError, RemoteProtocolError
from secagg.keys import AgreementKey, Identity, verify
from secagg.masking.messages import (
    Advertisement,
    Commitment,
    Confirmation,
    ConfirmationSet,
    EncryptedShares,
    KeyDirectory,
    MaskedInput,
    ShareInbox,
    SurvivorSet,
    UnmaskShares,
)
from secagg.masking.params import Session, Subject, Terms, differences
from secagg.prg import Entropy, Label, add_keystreams, derive, domain
from secagg.ring import RingVector
from secagg.sealed import channel_key, seal, unseal
from secagg.shamir import PRIME, SHARE_BYTES, split
from secagg.stages import check_identity, require
from secagg.wire import SecretState, decode_any


class Advertised(SecretState, frozen=True, tag=True):
    """After round 0: the keys of this round, not yet shared."""

    me: int
    session: Session
    channel_secret: bytes
    mask_secret: bytes


class Shared(SecretState, frozen=True, tag=True):
    """After round 1: everything agreed. The secrets s_u and c_u are gone; what they derive to is kept.

    Attributes:
        self_mask_seed: b_u.
        pairwise_secrets: With every other member of U1; a mask's key comes from it once the sum's subject is known.
        inbound_keys: Key of the channel from every other member of U1.
        own_shares: The two shares that u keeps of its own secrets (of s_u, of b_u).
    """

    me: int
    session: Session
    self_mask_seed: bytes
    pairwise_secrets: dict[int, bytes]
    inbound_keys: dict[int, bytes]
    own_shares: tuple[bytes, bytes]


class Masked(SecretState, frozen=True, tag=True):
    """After round 2: the vector is sent; only the others' shares are left. `held` is U2 to (share of s_v, of b_v)."""

    me: int
    session: Session
    subject: Subject
    held: dict[int, tuple[bytes, bytes]]


class Confirmed(SecretState, frozen=True, tag=True):
    """After round 3: bound to one set of survivors."""

    me: int
    session: Session
    subject: Subject
    held: dict[int, tuple[bytes, bytes]]
    survivors: tuple[int, ...]


class Finished(SecretState, frozen=True, tag=True):
    """After round 4: shares are given out and forgotten."""

    me: int
    session: Session


ClientState = Advertised | Shared | Masked | Confirmed | Finished


def decode_state(data: bytes) -> ClientState:
    """A state from the bytes that `secagg.wire.encode` made of it.

    Raises:
        DecodeError: Not the bytes of a state.
    """
    return cast(ClientState, decode_any(data, ClientState))


def advertise(session: Session, me: int, identity: Identity, entropy: Entropy) -> tuple[Advertised, Advertisement]:
    """Round 0, AdvertiseKeys: fresh key pairs for the channel (c_u) and the masks (s_u), signed for this session.

    Args:
        session: What this participant pinned itself. It must never advertise twice for the same one.
        me: Its own number.
        identity: Its long-term key; must be the one that the roster names.
        entropy: Source of the two 32-byte secrets.

    Raises:
        LocalProtocolError: The identity is not the roster's.
    """
    check_identity(session, me, identity)
    channel, mask = AgreementKey(entropy(32)), AgreementKey(entropy(32))
    terms, signature = session.terms, b""
    if session.params.active:
        payload = keys_payload(me, channel.public, mask.public)
        signature = identity.sign(Label.SIGN_KEYS, terms.session_id, payload)
    return (
        Advertised(me, session, channel.secret, mask.secret),
        Advertisement(terms, channel.public, mask.public, signature),
    )


def share_keys(
    state: Advertised, directory: KeyDirectory, identity: Identity, entropy: Entropy
) -> tuple[Shared, EncryptedShares]:
    """Round 1, ShareKeys: check everyone's keys, agree with each, and share s_u and a fresh b_u among them.

    Where this may be called again from the same state, because the process ended before it kept the next one, `entropy`
    must give the same bytes again. With others the server would hold shares of one b_u while another masks the vector,
    and the channels' keys would seal two texts.

    Raises:
        BelowThreshold: U1 is smaller than the threshold.
        RemoteProtocolError: Someone off the roster, keys that are not signed or for another session, a repeated or
            low-order key, or this participant's own entry missing or changed.
    """
    me, session, roster = state.me, state.session, state.session.params.roster
    terms = session.terms
    sid = terms.session_id
    channel, mask = AgreementKey(state.channel_secret), AgreementKey(state.mask_secret)
    listed = directory.advertisements
    _check_directory(session, terms, me, listed, channel.public, mask.public)
    seed = entropy(32)
    shares_of_secret = split(state.mask_secret, session.params.threshold, listed, entropy)
    shares_of_seed = split(seed, session.params.threshold, listed, entropy)
    pairwise, inbound, boxes = {}, {}, {}
    for v, ad in listed.items():
        if v == me:
            continue
        try:
            shared = channel.agree(ad.channel_key)
            pairwise[v] = pairwise_secret(mask, ad.mask_key, sid, me, v)
        except RemoteProtocolError as error:
            raise RemoteProtocolError(f"{roster.name(v)}: {error}") from error
        inbound[v] = channel_key(shared, sid, v, me)
        text = me.to_bytes(4, "big") + v.to_bytes(4, "big") + shares_of_secret[v] + shares_of_seed[v]
        boxes[v] = seal(channel_key(shared, sid, me, v), sid, me, v, text)
    committed = commitment(seed, sid, me)
    signature = identity.sign(Label.SIGN_COMMITMENT, sid, committed) if session.params.active else b""
    own = shares_of_secret[me], shares_of_seed[me]
    return Shared(me, session, seed, pairwise, inbound, own), EncryptedShares(
        terms, boxes, Commitment(committed, signature)
    )


def mask_input(state: Shared, inbox: ShareInbox, subject: Subject, vector: RingVector) -> tuple[Masked, MaskedInput]:
    """Round 2, MaskedInput: y_u = x_u + PRG(b_u) + sum over v in U2 of +-PRG(s_uv), modulo 2^b.

    Every received share is decrypted and checked before the vector leaves: a share that turned out bad later would
    come too late to keep y_u back. The mask shared with v is added by the larger number, subtracted by the smaller.
    The masks' keys depend on the subject and on U2: vectors of different subjects do not unmask, and a participant that
    was put back to an earlier state and shown fewer shares does not give a single mask away.

    Args:
        state: After round 1.
        inbox: Shares from every other member of U2.
        subject: What is summed, as this participant knows it.
        vector: x_u, shape [dimension] of the subject's ring. Not changed.

    Raises:
        BelowThreshold: U2 is smaller than the threshold.
        RemoteProtocolError: Shares from outside U1, or that do not open or are not for this participant.
        LocalProtocolError: A vector of another shape or dtype.
    """
    me, session = state.me, state.session
    subject.ring.check(vector, subject.dimension)
    terms, strangers = session.terms, inbox.boxes.keys() - state.inbound_keys.keys()
    sid = terms.session_id
    if strangers:
        raise RemoteProtocolError(f"shares from {session.names(strangers)}, who did not advertise keys to us")
    require(session, "ShareKeys", len(inbox.boxes) + 1)
    held = {me: state.own_shares}
    for v, box in inbox.boxes.items():
        held[v] = _open_shares(state.inbound_keys[v], sid, v, me, box)
    masked, bound = vector.copy(), mask_id(subject.sum_id(sid), held)
    masks = [(self_mask_key(state.self_mask_seed, bound, me), +1)]
    masks += [(pairwise_key(state.pairwise_secrets[v], bound, me, v), mask_sign(me, v)) for v in inbox.boxes]
    add_keystreams(masked, masks)
    sent = MaskedInput(terms, subject, subject.ring.pack(masked))
    return Masked(me, session, subject, dict(sorted(held.items()))), sent


def confirm(state: Masked, shown: SurvivorSet, identity: Identity) -> tuple[Confirmed, Confirmation]:
    """Round 3, ConsistencyCheck: sign the set of survivors and what was summed, so that the server can show only one.

    Raises:
        BelowThreshold: U3 is smaller than the threshold.
        RemoteProtocolError: U3 is no subset of U2, repeats somebody, or leaves this participant out.
        LocalProtocolError: The session is semi-honest and has no such round.
    """
    if not state.session.params.active:
        raise LocalProtocolError("a semi-honest session has no consistency check")
    survivors = _check_survivors(state, shown)
    sum_id = state.subject.sum_id(state.session.id)
    signature = identity.sign(Label.SIGN_SURVIVORS, sum_id, survivors_payload(survivors))
    confirmed = Confirmed(state.me, state.session, state.subject, state.held, survivors)
    return confirmed, Confirmation(state.subject, signature)


def unmask(state: Confirmed, confirmed: ConfirmationSet) -> tuple[Finished, UnmaskShares]:
    """Round 4, Unmask: give out one kind of share for each peer, for the set that t participants signed.

    Raises:
        BelowThreshold: Fewer than t signatures.
        RemoteProtocolError: A signature from outside U3, or over another set than the one shown here, or over another
            subject than this participant has summed.
    """
    session, subject = state.session, state.subject
    strangers = confirmed.confirmations.keys() - set(state.survivors)
    if strangers:
        raise RemoteProtocolError(f"confirmations from {session.names(strangers)}, who are not among the survivors")
    require(session, "ConsistencyCheck", len(confirmed.confirmations))
    sid, payload = session.id, survivors_payload(state.survivors)
    for v, theirs in confirmed.confirmations.items():
        name, identity = session.params.roster.name(v), session.params.roster.members[v].identity
        if not verify(identity, theirs.signature, Label.SIGN_SURVIVORS, theirs.subject.sum_id(sid), payload):
            raise RemoteProtocolError(
                f"{name} did not sign the survivors that we were shown ({session.names(set(state.survivors))}): "
                "the server may have shown it others"
            )
        if theirs.subject != subject:
            raise RemoteProtocolError(f"{name} did not sum what we summed: {differences(theirs.subject, subject)}")
    return _give_shares(state.me, session, state.held, state.survivors)


def unmask_semi_honest(state: Masked, shown: SurvivorSet) -> tuple[Finished, UnmaskShares]:
    """Round 4 without round 3, for a session whose parameters say semi-honest.

    Raises:
        LocalProtocolError: The session is active.
        BelowThreshold, RemoteProtocolError: As in `confirm`.
    """
    if state.session.params.active:
        raise LocalProtocolError("an active session unmasks only after its consistency check")
    return _give_shares(state.me, state.session, state.held, _check_survivors(state, shown))


def keys_payload(participant: int, channel_key: bytes, mask_key: bytes) -> bytes:
    """What is signed in round 0."""
    return participant.to_bytes(8, "big") + channel_key + mask_key


def survivors_payload(survivors: tuple[int, ...]) -> bytes:
    """What is signed in round 3: the sorted numbers of U3."""
    return msgpack.encode(sorted(survivors))


def commitment(seed: bytes, session_id: bytes, participant: int) -> bytes:
    """Hash of b_u. It hides because b_u has 256 random bits, and binds by SHA-256."""
    return hashlib.sha256(domain(Label.COMMIT_SELF_MASK, session_id, participant) + seed).digest()


def mask_id(sum_id: bytes, shared: Iterable[int]) -> bytes:
    """32 bytes for a sum and U2 together: what the masks' keys are bound to."""
    return hashlib.sha256(domain(Label.MASKS, sum_id) + msgpack.encode(sorted(shared))).digest()


def self_mask_key(seed: bytes, bound_to: bytes, participant: int) -> bytes:
    """Keystream key of PRG(b_u); `bound_to` is a `mask_id`."""
    return derive(seed, Label.SELF_MASK, bound_to, participant)


def pairwise_secret(own: AgreementKey, public: bytes, session_id: bytes, u: int, v: int) -> bytes:
    """What u and v share, the same for both, before they know what is summed."""
    return derive(own.agree(public), Label.PAIRWISE_SECRET, session_id, min(u, v), max(u, v))


def pairwise_key(secret: bytes, bound_to: bytes, u: int, v: int) -> bytes:
    """Keystream key of PRG(s_uv), the same for both; `bound_to` is a `mask_id`."""
    return derive(secret, Label.PAIRWISE_MASK, bound_to, min(u, v), max(u, v))


def mask_sign(u: int, v: int) -> int:
    """Sign with which u adds the mask that it shares with v."""
    return 1 if u > v else -1


def _check_directory(
    session: Session, terms: Terms, me: int, listed: dict[int, Advertisement], channel_key: bytes, mask_key: bytes
) -> None:
    roster = session.params.roster
    require(session, "AdvertiseKeys", len(listed))
    own = listed.get(me)
    if own is None or own.channel_key != channel_key or own.mask_key != mask_key:
        raise RemoteProtocolError("the server lists other keys for us than those that we advertised, or none")
    keys = [key for ad in listed.values() for key in (ad.channel_key, ad.mask_key)]
    if len(set(keys)) != len(keys):
        raise RemoteProtocolError("a public key comes twice in the directory: someone copied another's key")
    for v, ad in listed.items():
        if v >= len(roster):
            raise RemoteProtocolError(f"participant {v} is not on the roster of {len(roster)}")
        if not session.params.active and ad.signature:
            raise RemoteProtocolError(
                f"the keys of {roster.name(v)} are signed, and a semi-honest session has no signatures"
            )
        payload, theirs = keys_payload(v, ad.channel_key, ad.mask_key), ad.terms.session_id
        if session.params.active and not verify(
            roster.members[v].identity, ad.signature, Label.SIGN_KEYS, theirs, payload
        ):
            raise RemoteProtocolError(
                f"the keys listed for {roster.name(v)} are not signed by it: they were changed, or it has another key "
                "than our roster says"
            )
        if ad.terms != terms:
            raise RemoteProtocolError(
                f"the keys listed for {roster.name(v)} are for another session: {differences(ad.terms, terms)}"
            )


def _open_shares(key: bytes, sid: bytes, sender: int, me: int, box: bytes) -> tuple[bytes, bytes]:
    text = unseal(key, sid, sender, me, box)
    named = int.from_bytes(text[:4], "big"), int.from_bytes(text[4:8], "big")
    shares = text[8 : 8 + SHARE_BYTES], text[8 + SHARE_BYTES :]
    if named != (sender, me):
        raise RemoteProtocolError(f"shares from participant {sender} to {me} name {named[0]} and {named[1]} inside")
    if any(len(share) != SHARE_BYTES or int.from_bytes(share, "big") >= PRIME for share in shares):
        raise RemoteProtocolError(f"the shares from participant {sender} are no field elements")
    return shares


def _check_survivors(state: Masked, shown: SurvivorSet) -> tuple[int, ...]:
    session, survivors = state.session, set(shown.survivors)
    if len(survivors) != len(shown.survivors):
        raise RemoteProtocolError("the server's list of survivors names someone twice")
    if list(shown.survivors) != sorted(survivors):
        raise RemoteProtocolError("the server's list of survivors is not in ascending order")
    if not survivors <= state.held.keys():
        raise RemoteProtocolError(
            f"the server claims vectors from {session.names(survivors - state.held.keys())}, who never shared with us"
        )
    if state.me not in survivors:
        raise RemoteProtocolError("the server left us out of the survivors although we answered")
    require(session, "MaskedInput", len(survivors))
    return tuple(sorted(survivors))


def _give_shares(
    me: int, session: Session, held: dict[int, tuple[bytes, bytes]], survivors: tuple[int, ...]
) -> tuple[Finished, UnmaskShares]:
    alive = set(survivors)
    shares = UnmaskShares(
        session.terms,
        of_self_mask_seed={v: of_seed for v, (_, of_seed) in held.items() if v in alive},
        of_mask_secret={v: of_secret for v, (of_secret, _) in held.items() if v not in alive},
    )
    return Finished(me, session), shares

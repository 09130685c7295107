"""A participant's side of pairwise-masked secure aggregation, round by round.

Each function consumes a state and the server's message and gives the next state and the answer. States are frozen,
hold no more than the next step needs, and become bytes with `secagg.wire`, because the process may end between two
messages. Nothing here reads a clock, a socket or a random device.

Source: Bonawitz et al., "Practical secure aggregation for privacy-preserving machine learning", CCS 2017, figure 4.
"""

from __future__ import annotations

import hashlib
from typing import cast

from msgspec import msgpack

from secagg.errors import BelowThreshold, LocalProtocolError, RemoteProtocolError
from secagg.keys import AgreementKey, Identity, verify
from secagg.masking.messages import (
    Advertisement,
    Confirmation,
    ConfirmationSet,
    EncryptedShares,
    KeyDirectory,
    MaskedInput,
    ShareInbox,
    SurvivorSet,
    UnmaskShares,
)
from secagg.masking.params import Session
from secagg.prg import Entropy, Label, add_keystreams, derive, domain
from secagg.ring import RingVector
from secagg.sealed import channel_key, seal, unseal
from secagg.shamir import PRIME, SHARE_BYTES, split
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
        pairwise_keys: Mask key with every other member of U1.
        inbound_keys: Key of the channel from every other member of U1.
        own_shares: The two shares that u keeps of its own secrets (of s_u, of b_u).
    """

    me: int
    session: Session
    self_mask_seed: bytes
    pairwise_keys: dict[int, bytes]
    inbound_keys: dict[int, bytes]
    own_shares: tuple[bytes, bytes]


class Masked(SecretState, frozen=True, tag=True):
    """After round 2: the vector is sent; only the others' shares are left. `held` is U2 to (share of s_v, of b_v)."""

    me: int
    session: Session
    held: dict[int, tuple[bytes, bytes]]


class Confirmed(SecretState, frozen=True, tag=True):
    """After round 3: bound to one set of survivors."""

    me: int
    session: Session
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
        session: What this participant pinned itself.
        me: Its own number.
        identity: Its long-term key; must be the one that the roster names.
        entropy: Source of the two 32-byte secrets.

    Raises:
        LocalProtocolError: The identity is not the roster's.
    """
    if not 0 <= me < len(session.params.roster):
        raise LocalProtocolError(f"participant {me} is not on a roster of {len(session.params.roster)}")
    if session.params.roster.members[me].identity != identity.public:
        raise LocalProtocolError(f"the roster has another key for {session.params.roster.name(me)} than its identity")
    channel, mask = AgreementKey(entropy(32)), AgreementKey(entropy(32))
    signature = b""
    if session.params.active:
        payload = keys_payload(me, channel.public, mask.public)
        signature = identity.sign(Label.SIGN_KEYS, session.id, payload)
    return (
        Advertised(me, session, channel.secret, mask.secret),
        Advertisement(channel.public, mask.public, signature),
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
        RemoteProtocolError: Someone off the roster, a bad signature, a repeated or low-order key, or this participant's
            own entry missing or changed.
    """
    me, session = state.me, state.session
    sid, roster = session.id, session.params.roster
    channel, mask = AgreementKey(state.channel_secret), AgreementKey(state.mask_secret)
    listed = directory.advertisements
    _check_directory(session, sid, me, listed, channel.public, mask.public)
    seed = entropy(32)
    shares_of_secret = split(state.mask_secret, session.params.threshold, listed, entropy)
    shares_of_seed = split(seed, session.params.threshold, listed, entropy)
    pairwise, inbound, boxes = {}, {}, {}
    for v, ad in listed.items():
        if v == me:
            continue
        try:
            shared = channel.agree(ad.channel_key)
            pairwise[v] = pairwise_key(mask, ad.mask_key, sid, me, v)
        except RemoteProtocolError as error:
            raise RemoteProtocolError(f"{roster.name(v)}: {error}") from error
        inbound[v] = channel_key(shared, sid, v, me)
        text = me.to_bytes(4, "big") + v.to_bytes(4, "big") + shares_of_secret[v] + shares_of_seed[v]
        boxes[v] = seal(channel_key(shared, sid, me, v), sid, me, v, text)
    committed = commitment(seed, sid, me)
    signature = identity.sign(Label.SIGN_COMMITMENT, sid, committed) if session.params.active else b""
    own = shares_of_secret[me], shares_of_seed[me]
    return Shared(me, session, seed, pairwise, inbound, own), EncryptedShares(boxes, committed, signature)


def mask_input(state: Shared, inbox: ShareInbox, vector: RingVector) -> tuple[Masked, MaskedInput]:
    """Round 2, MaskedInput: y_u = x_u + PRG(b_u) + sum over v in U2 of +-PRG(s_uv), modulo 2^b.

    Every received share is decrypted and checked before the vector leaves: a share that turned out bad later would
    come too late to keep y_u back. The mask shared with v is added by the larger number, subtracted by the smaller.

    Args:
        state: After round 1.
        inbox: Shares from every other member of U2.
        vector: x_u, shape [dimension] of the session's ring. Not changed.

    Raises:
        BelowThreshold: U2 is smaller than the threshold.
        RemoteProtocolError: Shares from outside U1, or that do not open or are not for this participant.
        LocalProtocolError: A vector of another shape or dtype.
    """
    me, session = state.me, state.session
    session.ring.check(vector, session.dimension)
    sid, strangers = session.id, inbox.boxes.keys() - state.inbound_keys.keys()
    if strangers:
        raise RemoteProtocolError(f"shares from {session.names(strangers)}, who did not advertise keys to us")
    _require(session, "ShareKeys", len(inbox.boxes) + 1)
    held = {me: state.own_shares}
    for v, box in inbox.boxes.items():
        held[v] = _open_shares(state.inbound_keys[v], sid, v, me, box)
    masked = vector.copy()
    own = self_mask_key(state.self_mask_seed, sid, me), +1
    add_keystreams(masked, [own, *((state.pairwise_keys[v], mask_sign(me, v)) for v in inbox.boxes)])
    return Masked(me, session, dict(sorted(held.items()))), MaskedInput(session.ring.pack(masked))


def confirm(state: Masked, shown: SurvivorSet, identity: Identity) -> tuple[Confirmed, Confirmation]:
    """Round 3, ConsistencyCheck: sign the set of survivors, so that the server can show only one.

    Raises:
        BelowThreshold: U3 is smaller than the threshold.
        RemoteProtocolError: U3 is no subset of U2, repeats somebody, or leaves this participant out.
        LocalProtocolError: The session is semi-honest and has no such round.
    """
    if not state.session.params.active:
        raise LocalProtocolError("a semi-honest session has no consistency check")
    survivors = _check_survivors(state, shown)
    signature = identity.sign(Label.SIGN_SURVIVORS, state.session.id, survivors_payload(survivors))
    return Confirmed(state.me, state.session, state.held, survivors), Confirmation(signature)


def unmask(state: Confirmed, confirmed: ConfirmationSet) -> tuple[Finished, UnmaskShares]:
    """Round 4, Unmask: give out one kind of share for each peer, for the set that t participants signed.

    Raises:
        BelowThreshold: Fewer than t signatures.
        RemoteProtocolError: A signature from outside U3, or over another set than the one shown here.
    """
    session = state.session
    strangers = confirmed.signatures.keys() - set(state.survivors)
    if strangers:
        raise RemoteProtocolError(f"confirmations from {session.names(strangers)}, who are not among the survivors")
    _require(session, "ConsistencyCheck", len(confirmed.signatures))
    sid, payload = session.id, survivors_payload(state.survivors)
    for v, signature in confirmed.signatures.items():
        if not verify(session.params.roster.members[v].identity, signature, Label.SIGN_SURVIVORS, sid, payload):
            raise RemoteProtocolError(
                f"{session.params.roster.name(v)} did not sign the survivors that we were shown "
                f"({session.names(set(state.survivors))}): the server may have shown it others"
            )
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


def self_mask_key(seed: bytes, session_id: bytes, participant: int) -> bytes:
    """Keystream key of PRG(b_u)."""
    return derive(seed, Label.SELF_MASK, session_id, participant)


def pairwise_key(own: AgreementKey, public: bytes, session_id: bytes, u: int, v: int) -> bytes:
    """Keystream key of PRG(s_uv), the same for both."""
    return derive(own.agree(public), Label.PAIRWISE_MASK, session_id, min(u, v), max(u, v))


def mask_sign(u: int, v: int) -> int:
    """Sign with which u adds the mask that it shares with v."""
    return 1 if u > v else -1


def _check_directory(
    session: Session, sid: bytes, me: int, listed: dict[int, Advertisement], channel_key: bytes, mask_key: bytes
) -> None:
    roster = session.params.roster
    _require(session, "AdvertiseKeys", len(listed))
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
        payload = keys_payload(v, ad.channel_key, ad.mask_key)
        if session.params.active and not verify(
            roster.members[v].identity, ad.signature, Label.SIGN_KEYS, sid, payload
        ):
            raise RemoteProtocolError(
                f"the keys listed for {roster.name(v)} are not signed by it for this session: they were changed, or it "
                "was given another model, configuration or roster than we were"
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
    _require(session, "MaskedInput", len(survivors))
    return tuple(sorted(survivors))


def _give_shares(
    me: int, session: Session, held: dict[int, tuple[bytes, bytes]], survivors: tuple[int, ...]
) -> tuple[Finished, UnmaskShares]:
    alive = set(survivors)
    shares = UnmaskShares(
        of_self_mask_seed={v: of_seed for v, (_, of_seed) in held.items() if v in alive},
        of_mask_secret={v: of_secret for v, (of_secret, _) in held.items() if v not in alive},
    )
    return Finished(me, session), shares


def _require(session: Session, stage: str, present: int) -> None:
    if present < session.params.threshold:
        raise BelowThreshold(stage, present, session.params.threshold)

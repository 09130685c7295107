"""The server's side of pairwise-masked secure aggregation.

The server relays keys and sealed shares, adds masked vectors into one accumulator as they arrive, and takes off the
masks that are left. It learns the sum, who took part, and nothing else that the participants keep to themselves.

`receive_*` takes one participant's message (who sent it comes from the transport) and raises `RemoteProtocolError`
with the culprit on anything wrong, leaving the state as it was; `close_*` ends a stage with whoever answered. States
are consumed: the accumulator is added to in place.

Source: Bonawitz et al. 2017, figure 4.
"""

from __future__ import annotations

import hmac
from collections.abc import Callable
from functools import partial

import msgspec
from msgspec import Struct

from secagg.errors import DecodeError, LocalProtocolError, RemoteProtocolError
from secagg.keys import AgreementKey, agreement_public, refuse_low_order
from secagg.masking.client import (
    commitment,
    keys_payload,
    mask_id,
    mask_sign,
    pairwise_key,
    pairwise_secret,
    self_mask_key,
    survivors_payload,
)
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
from secagg.masking.params import Session, Subject, differences
from secagg.prg import Label, add_keystreams
from secagg.ring import RingVector
from secagg.shamir import recover
from secagg.stages import check_signature, check_terms, expect, fault, in_order, require


class CollectingKeys(Struct, frozen=True):
    """Stage AdvertiseKeys: who has advertised so far."""

    session: Session
    advertisements: dict[int, Advertisement] = {}


class CollectingShares(Struct, frozen=True):
    """Stage ShareKeys: U1 is fixed; whose sealed shares have come."""

    session: Session
    directory: dict[int, Advertisement]
    received: dict[int, EncryptedShares] = {}


class Agreed(Struct, frozen=True):
    """U2 is fixed, and its keys can be used for one sum. `inboxes` holds the sealed shares for each member."""

    session: Session
    directory: dict[int, Advertisement]
    commitments: dict[int, Commitment]
    inboxes: dict[int, ShareInbox]


class CollectingVectors(Struct, frozen=True):
    """Stage MaskedInput: what is summed is fixed. `total` is the sum of the masked vectors of `survivors`."""

    session: Session
    subject: Subject
    directory: dict[int, Advertisement]
    commitments: dict[int, Commitment]
    total: RingVector
    survivors: frozenset[int] = frozenset()


class CollectingConfirmations(Struct, frozen=True):
    """Stage ConsistencyCheck: U3 is fixed; who has signed it."""

    session: Session
    subject: Subject
    directory: dict[int, Advertisement]
    commitments: dict[int, Commitment]
    total: RingVector
    survivors: frozenset[int]
    confirmations: dict[int, Confirmation] = {}


class CollectingUnmask(Struct, frozen=True):
    """Stage Unmask: shares that open the masks of the survivors and the keys of the dropped.

    `asked` is who may answer: U4, or U3 in a semi-honest session.
    """

    session: Session
    subject: Subject
    directory: dict[int, Advertisement]
    commitments: dict[int, Commitment]
    total: RingVector
    survivors: frozenset[int]
    confirmations: dict[int, Confirmation]
    asked: frozenset[int]
    answers: dict[int, UnmaskShares] = {}

    @property
    def dropped(self) -> frozenset[int]:
        """U2 minus U3."""
        return frozenset(self.commitments) - self.survivors


class Opened(Struct, frozen=True):
    """The end: the sum of the survivors' vectors, reduced to the ring, and what was signed on the way.

    Attributes:
        directory: U1, and the keys that it signed.
        commitments: U2, and what it committed to.
        confirmations: U4, and the survivors that it signed; empty in a semi-honest session.
        total: Shape [dimension].
        survivors: Whose vectors it sums.
        suspects: Participants whose shares did not fit the others'. Either they lied, or somebody gave them such
            shares; the sum is right in any case.
    """

    session: Session
    subject: Subject
    directory: dict[int, Advertisement]
    commitments: dict[int, Commitment]
    confirmations: dict[int, Confirmation]
    total: RingVector
    survivors: frozenset[int]
    suspects: frozenset[int]


def start(session: Session) -> CollectingKeys:
    """Begin to agree on the keys of a round."""
    return CollectingKeys(session)


def receive_keys(state: CollectingKeys, sender: int, message: Advertisement) -> CollectingKeys:
    """Round 0: check and keep a participant's public keys."""
    session = state.session
    expect(session, sender, frozenset(range(len(session.params.roster))), state.advertisements)
    known = {key for ad in state.advertisements.values() for key in (ad.channel_key, ad.mask_key)}
    if {message.channel_key, message.mask_key} & known or message.channel_key == message.mask_key:
        raise fault(session, sender, "sent a public key that is already in use")
    try:
        refuse_low_order(message.channel_key)
        refuse_low_order(message.mask_key)
    except RemoteProtocolError as error:
        raise fault(session, sender, f"sent a useless key: {error}") from error
    check_terms(session, sender, message.terms)
    payload = keys_payload(sender, message.channel_key, message.mask_key)
    check_signature(session, sender, message.signature, Label.SIGN_KEYS, session.id, payload, "its keys")
    return msgspec.structs.replace(state, advertisements={**state.advertisements, sender: message})


def close_keys(state: CollectingKeys) -> tuple[CollectingShares, dict[int, KeyDirectory]]:
    """Fix U1 and send everyone's keys to everyone."""
    require(state.session, "AdvertiseKeys", len(state.advertisements))
    directory = in_order(state.advertisements)
    return CollectingShares(state.session, directory), dict.fromkeys(directory, KeyDirectory(directory))


def receive_shares(state: CollectingShares, sender: int, message: EncryptedShares) -> CollectingShares:
    """Round 1: keep a participant's sealed shares, one for every other member of U1."""
    session = state.session
    expect(session, sender, frozenset(state.directory), state.received)
    check_terms(session, sender, message.terms)
    expected = state.directory.keys() - {sender}
    if message.boxes.keys() != expected:
        raise fault(session, sender, f"sealed shares for {session.names(set(message.boxes))}, expected {len(expected)}")
    committed, signature = message.commitment.digest, message.commitment.signature
    check_signature(session, sender, signature, Label.SIGN_COMMITMENT, session.id, committed, "its commitment")
    return msgspec.structs.replace(state, received={**state.received, sender: message})


def close_shares(state: CollectingShares) -> Agreed:
    """Fix U2. Its keys wait for something to be summed: nothing is sent yet."""
    require(state.session, "ShareKeys", len(state.received))
    received = in_order(state.received)
    inboxes = {u: ShareInbox({v: message.boxes[u] for v, message in received.items() if v != u}) for u in received}
    commitments = {u: message.commitment for u, message in received.items()}
    return Agreed(state.session, state.directory, commitments, inboxes)


def begin_sum(state: Agreed, subject: Subject) -> tuple[CollectingVectors, dict[int, ShareInbox]]:
    """Use the agreed keys for one sum: give each member of U2 the boxes that are for it. Keys serve only once."""
    total = subject.ring.zeros(subject.dimension)
    return CollectingVectors(state.session, subject, state.directory, state.commitments, total), state.inboxes


def receive_vector(state: CollectingVectors, sender: int, message: MaskedInput) -> CollectingVectors:
    """Round 2: add a masked vector to the sum and let it go."""
    session = state.session
    if not isinstance(state, CollectingVectors):  # the sum is added to in place, so this must not slip through
        raise LocalProtocolError(f"a vector is taken at stage MaskedInput only, not by {type(state).__name__}")
    expect(session, sender, frozenset(state.commitments), state.survivors)
    check_terms(session, sender, message.terms)
    if message.subject != state.subject:
        raise fault(session, sender, f"did not sum what was asked for: {differences(message.subject, state.subject)}")
    try:
        state.subject.ring.add_packed(state.total, message.packed)
    except DecodeError as error:
        raise fault(session, sender, f"sent no vector of this sum: {error}") from error
    return msgspec.structs.replace(state, survivors=state.survivors | {sender})


def close_vectors(
    state: CollectingVectors,
) -> tuple[CollectingConfirmations | CollectingUnmask, dict[int, SurvivorSet]]:
    """Fix U3 and show it to its members. A semi-honest session goes straight to unmasking."""
    require(state.session, "MaskedInput", len(state.survivors))
    shown = SurvivorSet(tuple(sorted(state.survivors)))
    so_far = state.session, state.subject, state.directory, state.commitments, state.total, state.survivors
    next_state: CollectingConfirmations | CollectingUnmask
    if state.session.params.active:
        next_state = CollectingConfirmations(*so_far)
    else:
        next_state = CollectingUnmask(*so_far, confirmations={}, asked=state.survivors)
    return next_state, dict.fromkeys(shown.survivors, shown)


def receive_confirmation(state: CollectingConfirmations, sender: int, message: Confirmation) -> CollectingConfirmations:
    """Round 3: keep a participant's signature over U3."""
    session = state.session
    expect(session, sender, state.survivors, state.confirmations)
    if message.subject != state.subject:
        raise fault(session, sender, f"confirms another sum: {differences(message.subject, state.subject)}")
    sum_id, payload = state.subject.sum_id(session.id), survivors_payload(tuple(state.survivors))
    check_signature(session, sender, message.signature, Label.SIGN_SURVIVORS, sum_id, payload, "the survivors")
    return msgspec.structs.replace(state, confirmations={**state.confirmations, sender: message})


def close_confirmations(state: CollectingConfirmations) -> tuple[CollectingUnmask, dict[int, ConfirmationSet]]:
    """Fix U4 and send its signatures to its members."""
    require(state.session, "ConsistencyCheck", len(state.confirmations))
    signed = in_order(state.confirmations)
    next_state = CollectingUnmask(
        state.session,
        state.subject,
        state.directory,
        state.commitments,
        state.total,
        state.survivors,
        confirmations=signed,
        asked=frozenset(signed),
    )
    return next_state, dict.fromkeys(signed, ConfirmationSet(signed))


def receive_unmask(state: CollectingUnmask, sender: int, message: UnmaskShares) -> CollectingUnmask:
    """Round 4: keep a participant's shares, of b_v for each survivor and of s_v for each that dropped."""
    expect(state.session, sender, state.asked, state.answers)
    check_terms(state.session, sender, message.terms)
    if message.of_self_mask_seed.keys() != state.survivors or message.of_mask_secret.keys() != state.dropped:
        raise fault(state.session, sender, "answered with shares of other participants than it was asked for")
    return msgspec.structs.replace(state, answers={**state.answers, sender: message})


def close_unmask(state: CollectingUnmask) -> Opened:
    """Reconstruct, check against keys and commitments, and take off the masks.

    sum of y_u over U3, less PRG(b_u) for u in U3, less the masks that u in U3 shares with v in U2 minus U3.

    Raises:
        BelowThreshold: Fewer than t answers.
        RemoteProtocolError: The shares of a secret do not lead to it. Never a wrong sum.
    """
    session = state.session
    require(session, "Unmask", len(state.answers))
    sid, suspects = session.id, set[int]()
    bound = mask_id(state.subject.sum_id(sid), state.commitments)
    masks: list[tuple[bytes, int]] = []  # taken off only once all of them are known
    for u in sorted(state.survivors):
        shares = {v: answer.of_self_mask_seed[u] for v, answer in state.answers.items()}
        seed, misfits = _recover(session, u, shares, partial(_is_committed, sid, u, state.commitments[u].digest))
        suspects |= misfits
        masks.append((self_mask_key(seed, bound, u), -1))
    for v in sorted(state.dropped):
        shares = {w: answer.of_mask_secret[v] for w, answer in state.answers.items()}
        secret, misfits = _recover(session, v, shares, partial(_is_secret_of, state.directory[v].mask_key))
        suspects |= misfits
        key = AgreementKey(secret)
        for u in sorted(state.survivors):
            shared = pairwise_secret(key, state.directory[u].mask_key, sid, u, v)
            masks.append((pairwise_key(shared, bound, u, v), -mask_sign(u, v)))
    add_keystreams(state.total, masks)
    return Opened(
        session,
        state.subject,
        state.directory,
        state.commitments,
        state.confirmations,
        state.subject.ring.reduce(state.total),
        state.survivors,
        frozenset(suspects),
    )


def _is_committed(sid: bytes, participant: int, expected: bytes, seed: bytes) -> bool:
    return hmac.compare_digest(commitment(seed, sid, participant), expected)


def _is_secret_of(public: bytes, secret: bytes) -> bool:
    return hmac.compare_digest(agreement_public(secret), public)


def _recover(
    session: Session, owner: int, shares: dict[int, bytes], is_secret: Callable[[bytes], bool]
) -> tuple[bytes, frozenset[int]]:
    try:
        return recover(shares, session.params.threshold, is_secret)
    except RemoteProtocolError as error:
        raise RemoteProtocolError(f"the secret of {session.params.roster.name(owner)}: {error}") from error

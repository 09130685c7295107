"""The server's side of a sum under CKKS with a joint key.

The server relays keys and sealed shares, adds ciphertexts as they arrive, and adds up partial decryptions. It learns
the sum and noise, and who took part. In active mode it keeps the second halves of all uploads, because every
participant checks and sums them itself; first halves, and in semi-honest mode both, are added and let go.

`receive_*` takes one participant's message (who sent it comes from the transport) and raises `RemoteProtocolError`
with the culprit on anything wrong, leaving the state as it was; `close_*` ends a stage with whoever answered. States
are consumed: accumulators are added to in place.

Source: as `secagg.ckks.client`.
"""

from __future__ import annotations

import hashlib
import hmac
from functools import partial

import msgspec
import numpy as np
from msgspec import Struct

from secagg.ckks.decryption import add_packed, sum_digest, uploaders
from secagg.ckks.joint_key import (
    channel_payload,
    check_holder_key,
    commitment_payload,
    holder_number,
    joined,
    secret_key,
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
    HalfUpload,
    HeldAggregate,
    HeldUploads,
    HolderKey,
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
from secagg.ckks.polynomials import Residues, arithmetic
from secagg.errors import BelowThreshold, DecodeError, RemoteProtocolError
from secagg.keys import refuse_low_order
from secagg.masking.params import Session, Subject, differences
from secagg.prg import Label
from secagg.ring import RingVector
from secagg.shamir import recover
from secagg.stages import check_signature, check_terms, expect, fault, in_order, require


class CollectingKeys(Struct, frozen=True):
    """Stage AdvertiseKeys: who has advertised so far."""

    session: Session
    setting: Setting
    keys: dict[int, ChannelKey] = {}


class CollectingSeeds(Struct, frozen=True):
    """Stage ShareKeys: U1 is fixed; whose sealed shares and commitments have come."""

    session: Session
    setting: Setting
    directory: ChannelDirectory
    received: dict[int, SealedSeeds] = {}


class CollectingShares(Struct, frozen=True):
    """Stage RevealKey: U2 is fixed; whose shares of the joint key have come."""

    session: Session
    setting: Setting
    uniform: bytes
    commitments: dict[int, Commitment]
    shares: dict[int, bytes] = {}


class CollectingHolder(Struct, frozen=True):
    """Stage AdvertiseKeys where a holder has the key: waits for it."""

    session: Session
    setting: Setting
    key: HolderKey | None = None


class Agreed(Struct, frozen=True):
    """A public key, for one sum.

    Attributes:
        announcement: What participants need to know of it.
        key: Stands for it.
        commitments: Of those whose shares it is the sum of: U3; empty with a holder.
    """

    session: Session
    setting: Setting
    announcement: KeyShares | HolderKey
    key: bytes
    holders: tuple[int, ...]
    commitments: dict[int, Commitment]


class CollectingDigests(Struct, frozen=True):
    """Stage CommitInput, in active mode: who has said what it is going to upload."""

    agreed: Agreed
    subject: Subject
    uploads: dict[int, UploadDigest] = {}


class CollectingConfirmations(Struct, frozen=True):
    """Stage ConsistencyCheck: the uploads are fixed; who has signed them all."""

    agreed: Agreed
    subject: Subject
    uploads: dict[int, UploadDigest]
    signatures: dict[int, bytes] = {}


class CollectingUploads(Struct, frozen=True):
    """Stage EncryptedInput. `first` and `second` are the sums of the halves of those in `halves`.

    Attributes:
        digests: What was confirmed, in active mode; else empty.
        signatures: By whom.
        halves: Who has uploaded, and in active mode what has to be shown of it.
    """

    agreed: Agreed
    subject: Subject
    layout: Packing
    digests: dict[int, bytes]
    signatures: dict[int, bytes]
    first: Residues
    second: Residues
    halves: dict[int, HalfUpload | None] = {}


class CollectingPartials(Struct, frozen=True):
    """Stage Decrypt. `first` is the sum's first halves and the partial decryptions of those in `answered`."""

    agreed: Agreed
    subject: Subject
    layout: Packing
    first: Residues
    second: Residues
    digest: bytes
    contributors: frozenset[int]
    asked: frozenset[int]
    answered: frozenset[int] = frozenset()


class CollectingSeedShares(Struct, frozen=True):
    """Stage Recover: shares of the seeds of `missing`."""

    partials: CollectingPartials
    missing: tuple[int, ...]
    answers: dict[int, SeedShares] = {}


class Opened(Struct, frozen=True):
    """The end.

    Attributes:
        total: The sum, shape [dimension] over the subject's ring.
        contributors: Whose vectors it sums.
        suspects: Participants whose shares of a seed did not fit the others'. Either they lied, or somebody gave them
            such shares.
    """

    session: Session
    subject: Subject
    total: RingVector
    contributors: frozenset[int]
    suspects: frozenset[int]


def start(session: Session, setting: Setting) -> CollectingKeys | CollectingHolder:
    """Begin to agree on a key."""
    return (CollectingHolder if setting.keys == "holder" else CollectingKeys)(session, setting)


def receive_channel_key(state: CollectingKeys, sender: int, message: ChannelKey) -> CollectingKeys:
    """AdvertiseKeys: check and keep a participant's key."""
    session = state.session
    expect(session, sender, frozenset(range(len(session.params.roster))), state.keys)
    if message.channel_key in {theirs.channel_key for theirs in state.keys.values()}:
        raise fault(session, sender, "sent a public key that is already in use")
    try:
        refuse_low_order(message.channel_key)
    except RemoteProtocolError as error:
        raise fault(session, sender, f"sent a useless key: {error}") from error
    check_terms(session, sender, message.terms)
    payload = channel_payload(sender, message.channel_key)
    check_signature(session, sender, message.signature, Label.SIGN_CKKS_CHANNEL, session.id, payload, "its key")
    return msgspec.structs.replace(state, keys={**state.keys, sender: message})


def close_channel_keys(state: CollectingKeys) -> tuple[CollectingSeeds, dict[int, ChannelDirectory]]:
    """Fix U1 and send everyone's keys to everyone."""
    require(state.session, "AdvertiseKeys", len(state.keys))
    directory = ChannelDirectory(in_order(state.keys))
    return CollectingSeeds(state.session, state.setting, directory), dict.fromkeys(directory.keys, directory)


def receive_seeds(state: CollectingSeeds, sender: int, message: SealedSeeds) -> CollectingSeeds:
    """ShareKeys: keep a participant's sealed shares, one for every other member of U1, and its commitments."""
    session, members = state.session, state.directory.keys
    expect(session, sender, frozenset(members), state.received)
    check_terms(session, sender, message.terms)
    if message.boxes.keys() != members.keys() - {sender}:
        told = session.names(set(message.boxes))
        raise fault(session, sender, f"sealed shares for {told}, expected {len(members) - 1}")
    theirs, sid = message.commitment, session.id
    payload = commitment_payload(sender, uniform_id(state.directory, sid), theirs.seed, theirs.share)
    check_signature(session, sender, theirs.signature, Label.SIGN_CKKS_COMMITMENT, sid, payload, "its commitment")
    return msgspec.structs.replace(state, received={**state.received, sender: message})


def close_seeds(state: CollectingSeeds) -> tuple[CollectingShares, dict[int, SeedInbox]]:
    """Fix U2, and give each member the boxes for it and everyone's commitments."""
    require(state.session, "ShareKeys", len(state.received))
    received = in_order(state.received)
    commitments = {u: message.commitment for u, message in received.items()}
    inboxes = {
        u: SeedInbox({v: message.boxes[u] for v, message in received.items() if v != u}, commitments) for u in received
    }
    uniform = uniform_id(state.directory, state.session.id)
    return CollectingShares(state.session, state.setting, uniform, commitments), inboxes


def receive_key_share(state: CollectingShares, sender: int, message: KeyShare) -> CollectingShares:
    """RevealKey: keep a participant's share of the joint key, if it is the one that it committed to."""
    session = state.session
    expect(session, sender, frozenset(state.commitments), state.shares)
    check_terms(session, sender, message.terms)
    if share_digest(message.packed, session.id, sender) != state.commitments[sender].share:
        raise fault(session, sender, "shows another share of the joint key than it committed to")
    joined(state.setting.chain, session, state.uniform, {sender: message.packed})  # refuses what is no share
    return msgspec.structs.replace(state, shares={**state.shares, sender: message.packed})


def close_key_shares(state: CollectingShares) -> Agreed:
    """Fix U3, whose shares are the joint key."""
    session = state.session
    require(session, "RevealKey", len(state.shares))
    shares = in_order(state.shares)
    key = joined(state.setting.chain, session, state.uniform, shares)
    commitments = {u: state.commitments[u] for u in shares}
    return Agreed(session, state.setting, KeyShares(shares), key.id, key.holders, commitments)


def receive_holder_key(state: CollectingHolder, sender: int, message: HolderKey) -> CollectingHolder:
    """AdvertiseKeys: check and keep the holder's public key."""
    session, holder = state.session, state.setting.holder
    if holder is None or sender != holder_number(session) or state.key is not None:
        raise fault(session, sender, "answered a request that it was not sent, or twice")
    check_holder_key(session, message, holder)
    joined(state.setting.chain, session, message.seed, {sender: message.packed})
    return msgspec.structs.replace(state, key=message)


def close_holder_key(state: CollectingHolder) -> Agreed:
    """The holder's key is there, or there is no sum.

    Raises:
        BelowThreshold: The holder did not answer.
    """
    if state.key is None:
        raise BelowThreshold("AdvertiseKeys (of the keys' holder)", 0, 1)
    session = state.session
    key = joined(state.setting.chain, session, state.key.seed, {holder_number(session): state.key.packed})
    return Agreed(session, state.setting, state.key, key.id, key.holders, {})


def begin_sum(
    state: Agreed, subject: Subject
) -> tuple[CollectingDigests | CollectingUploads, dict[int, KeyShares | HolderKey]]:
    """Use the key for one sum: tell it to all who may give a vector.

    Raises:
        HeadroomError: The sum does not fit the study's parameters.
    """
    layout = state.setting.packing(state.session, subject)
    asked = dict.fromkeys(sorted(uploaders(state.session, state.holders)), state.announcement)
    if state.session.params.active:
        return CollectingDigests(state, subject), asked
    return _collecting_uploads(state, subject, layout, {}, {}), asked


def receive_digest(state: CollectingDigests, sender: int, message: UploadDigest) -> CollectingDigests:
    """CommitInput: keep what a participant is going to upload."""
    session, agreed = state.agreed.session, state.agreed
    expect(session, sender, uploaders(session, agreed.holders), state.uploads)
    _check_sum(agreed, state.subject, sender, message.subject, message.key)
    payload, bound = message.key + message.digest, state.subject.sum_id(session.id)
    check_signature(session, sender, message.signature, Label.SIGN_CKKS_UPLOAD, bound, payload, "its upload")
    return msgspec.structs.replace(state, uploads={**state.uploads, sender: message})


def close_digests(state: CollectingDigests) -> tuple[CollectingConfirmations, dict[int, UploadDirectory]]:
    """Fix the uploads, and show them to those who make them."""
    require(state.agreed.session, "CommitInput", len(state.uploads))
    uploads = in_order(state.uploads)
    shown = dict.fromkeys(uploads, UploadDirectory(uploads))
    return CollectingConfirmations(state.agreed, state.subject, uploads), shown


def receive_confirmation(
    state: CollectingConfirmations, sender: int, message: UploadsConfirmation
) -> CollectingConfirmations:
    """ConsistencyCheck: keep a participant's signature over all uploads."""
    session = state.agreed.session
    expect(session, sender, frozenset(state.uploads), state.signatures)
    payload, bound = uploads_payload(state.agreed.key, _digests(state)), state.subject.sum_id(session.id)
    check_signature(session, sender, message.signature, Label.SIGN_CKKS_UPLOADS, bound, payload, "the uploads")
    return msgspec.structs.replace(state, signatures={**state.signatures, sender: message.signature})


def close_confirmations(
    state: CollectingConfirmations,
) -> tuple[CollectingUploads, dict[int, UploadsConfirmations]]:
    """Send the signatures to those who gave them: nobody else uploads."""
    session = state.agreed.session
    require(session, "ConsistencyCheck", len(state.signatures))
    signed = in_order(state.signatures)
    layout = state.agreed.setting.packing(session, state.subject)
    uploading = _collecting_uploads(state.agreed, state.subject, layout, _digests(state), signed)
    return uploading, dict.fromkeys(signed, UploadsConfirmations(signed))


def receive_upload(state: CollectingUploads, sender: int, message: EncryptedInput) -> CollectingUploads:
    """EncryptedInput: add a participant's ciphertexts to the sum."""
    session, agreed = state.agreed.session, state.agreed
    active = session.params.active
    expect(session, sender, state.signatures if active else uploaders(session, agreed.holders), state.halves)
    check_terms(session, sender, message.terms)
    _check_sum(agreed, state.subject, sender, message.subject, message.key)
    half = None
    if active:
        first, bound = hashlib.sha256(message.first).digest(), state.subject.sum_id(session.id)
        if upload_digest(bound, sender, agreed.key, first, message.second) != state.digests[sender]:
            raise fault(session, sender, "uploads something else than it committed to")
        half = HalfUpload(first, memoryview(bytes(message.second)))
    field, sums = arithmetic(state.layout.chain.degree, state.layout.chain.modulus), []
    try:
        for packed in (message.first, message.second):
            sums.append(np.zeros_like(state.first))
            add_packed(sums[-1], packed, state.layout)
    except DecodeError as error:
        raise fault(session, sender, f"sent no ciphertexts of this sum: {error}") from error
    for total, summand in zip((state.first, state.second), sums, strict=True):
        field.add(total, summand)
    return msgspec.structs.replace(state, halves={**state.halves, sender: half})


def close_uploads(
    state: CollectingUploads,
) -> tuple[CollectingPartials, dict[int, Uploads | Aggregate | HeldUploads | HeldAggregate]]:
    """Fix whose vectors are summed, and ask for the sum's decryption."""
    agreed, session, setting = state.agreed, state.agreed.session, state.agreed.setting
    require(session, "EncryptedInput", len(state.halves))
    contributors = tuple(sorted(state.halves))
    packed = state.layout.ring.pack(state.second.reshape(-1))
    asked = {"holder": agreed.holders, "shared": contributors[:1]}.get(setting.keys, contributors)
    shown: Uploads | Aggregate | HeldUploads | HeldAggregate
    if session.params.active:
        halves = {u: half for u in contributors if (half := state.halves[u]) is not None}
        shown = Uploads(halves)
        if setting.keys == "holder":
            shown = HeldUploads(state.subject, state.digests, state.signatures, halves)
    else:
        shown = Aggregate(contributors, memoryview(packed))
        if setting.keys == "holder":
            shown = HeldAggregate(state.subject, shown)
    next_state = CollectingPartials(
        agreed,
        state.subject,
        state.layout,
        state.first,
        state.second,
        sum_digest(state.second),
        frozenset(contributors),
        frozenset(asked),
    )
    return next_state, dict.fromkeys(asked, shown)


def receive_partial(state: CollectingPartials, sender: int, message: PartialDecryption) -> CollectingPartials:
    """Decrypt: add a partial decryption, if it is one of this sum."""
    session = state.agreed.session
    expect(session, sender, state.asked, state.answered)
    check_terms(session, sender, message.terms)
    if message.digest != state.digest:
        raise fault(session, sender, "decrypted another ciphertext than the sum")
    try:
        add_packed(state.first, message.packed, state.layout)
    except DecodeError as error:
        raise fault(session, sender, f"sent no partial decryption: {error}") from error
    return msgspec.structs.replace(state, answered=state.answered | {sender})


def close_partials(state: CollectingPartials) -> tuple[CollectingSeedShares | Opened, dict[int, Missing]]:
    """Open the sum, or ask for what it takes to stand in for those who have not answered.

    Raises:
        BelowThreshold: Too few are left; with a holder or shared keys, the one that was asked has not answered.
        RemoteProtocolError: A partial decryption was wrong.
    """
    session, setting = state.agreed.session, state.agreed.setting
    if setting.keys != "threshold":
        if not state.answered:
            raise BelowThreshold("Decrypt", 0, 1)
        return _open(state, frozenset()), {}
    require(session, "Decrypt", len(state.answered))
    missing = tuple(u for u in state.agreed.holders if u not in state.answered)
    if not missing:
        return _open(state, frozenset()), {}
    return CollectingSeedShares(state, missing), dict.fromkeys(sorted(state.answered), Missing(missing))


def receive_seed_shares(state: CollectingSeedShares, sender: int, message: SeedShares) -> CollectingSeedShares:
    """Recover: keep a participant's shares of the seeds of those who are missing."""
    session = state.partials.agreed.session
    expect(session, sender, state.partials.answered, state.answers)
    check_terms(session, sender, message.terms)
    if message.shares.keys() != set(state.missing):
        raise fault(session, sender, "answered with shares of other seeds than it was asked for")
    return msgspec.structs.replace(state, answers={**state.answers, sender: message})


def close_seed_shares(state: CollectingSeedShares) -> Opened:
    """Reconstruct the missing seeds, check them against their commitments, and decrypt in their owners' place.

    Raises:
        BelowThreshold: Fewer than t answers.
        RemoteProtocolError: The shares of a seed do not lead to it, or a partial decryption was wrong.
    """
    partials = state.partials
    session, chain = partials.agreed.session, partials.layout.chain
    require(session, "Recover", len(state.answers))
    seeds, suspects = dict[int, bytes](), set[int]()
    for u in state.missing:
        shares = {v: answer.shares[u] for v, answer in state.answers.items()}
        committed = partial(_is_committed, session.id, u, partials.agreed.commitments[u].seed)
        try:
            seeds[u], misfits = recover(shares, session.params.threshold, committed)
        except RemoteProtocolError as error:
            raise RemoteProtocolError(f"the seed of {session.params.roster.name(u)}: {error}") from error
        suspects |= misfits
    field = arithmetic(chain.degree, chain.modulus)
    field.add(partials.first, field.products(partials.second, secret_key(chain, session.id, seeds)))
    return _open(partials, frozenset(suspects))


def _collecting_uploads(
    agreed: Agreed, subject: Subject, layout: Packing, digests: dict[int, bytes], signatures: dict[int, bytes]
) -> CollectingUploads:
    first, second = np.zeros((2, layout.ciphertexts, layout.chain.degree), np.uint64)
    return CollectingUploads(agreed, subject, layout, digests, signatures, first, second)


def _digests(state: CollectingConfirmations) -> dict[int, bytes]:
    return {u: theirs.digest for u, theirs in state.uploads.items()}


def _check_sum(agreed: Agreed, subject: Subject, sender: int, theirs: Subject, key: bytes) -> None:
    if theirs != subject:
        raise fault(agreed.session, sender, f"did not sum what was asked for: {differences(theirs, subject)}")
    if key != agreed.key:
        raise fault(agreed.session, sender, "encrypted to another joint key than this sum's")


def _is_committed(session_id: bytes, participant: int, expected: bytes, seed: bytes) -> bool:
    return hmac.compare_digest(seed_digest(seed, session_id, participant), expected)


def _open(state: CollectingPartials, suspects: frozenset[int]) -> Opened:
    total = state.layout.decode(state.first)
    return Opened(state.agreed.session, state.subject, total, state.contributors, suspects)

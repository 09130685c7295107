"""One struct for each arrow of the protocol. Participants are numbers; who sent a message comes from the transport."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

from secagg.masking.messages import Share
from secagg.masking.params import Subject, Terms
from secagg.sealed import TAG_BYTES
from secagg.shamir import SHARE_BYTES
from secagg.wire import Digest, Key, Message, Number, Signature

# A box holds (sender, receiver, share of the seed): 4 + 4 + 33 bytes and the tag.
SEED_BYTES = 8 + SHARE_BYTES
Box = Annotated[bytes, Meta(min_length=SEED_BYTES + TAG_BYTES, max_length=SEED_BYTES + TAG_BYTES)]
# b of degree 4096 modulo q and p, packed.
KeyPart = Annotated[bytes, Meta(max_length=1 << 16)]


class ChannelKey(Message, frozen=True):
    """AdvertiseKeys, participant to server: a fresh X25519 key, signed (not in semi-honest mode)."""

    terms: Terms
    channel_key: Key
    signature: Signature


class ChannelDirectory(Message, frozen=True):
    """AdvertiseKeys, server to participants: what everyone in U1 advertised. The common polynomial is drawn from it."""

    keys: dict[Number, ChannelKey]


class Commitment(Message, frozen=True):
    """Hashes of a participant's seed and of its share of the joint key, signed over the directory that it was shown."""

    seed: Digest
    share: Digest
    signature: Signature


class SealedSeeds(Message, frozen=True):
    """ShareKeys, participant to server: a sealed share of its seed for every other member of U1, and commitments."""

    terms: Terms
    boxes: dict[Number, Box]
    commitment: Commitment


class SeedInbox(Message, frozen=True):
    """ShareKeys, server to participant v: the boxes for v from every other member of U2, and U2's commitments."""

    boxes: dict[Number, Box]
    commitments: dict[Number, Commitment]


class KeyShare(Message, frozen=True):
    """RevealKey, participant to server: its share b of the joint key, packed, modulo q and modulo p."""

    terms: Terms
    packed: KeyPart


class KeyShares(Message, frozen=True):
    """RevealKey, server to participants: the shares of everyone in U3, which add up to the joint public key."""

    shares: dict[Number, KeyPart]


class HolderKey(Message, frozen=True):
    """AdvertiseKeys with a holder of the key, holder to server to sites: the whole public key, signed in any mode."""

    terms: Terms
    seed: Digest
    packed: KeyPart
    signature: Signature


class UploadDigest(Message, frozen=True):
    """CommitInput, participant to server (active mode): what it is going to upload, signed, before anyone does.

    `key` stands for the joint key that it encrypted to.
    """

    subject: Subject
    key: Digest
    digest: Digest
    signature: Signature


class UploadDirectory(Message, frozen=True):
    """CommitInput, server to participants: what everyone is going to upload."""

    uploads: dict[Number, UploadDigest]


class UploadsConfirmation(Message, frozen=True):
    """ConsistencyCheck, participant to server: a signature over the directory that it was shown."""

    signature: Signature


class UploadsConfirmations(Message, frozen=True):
    """ConsistencyCheck, server to participants: who has signed the directory."""

    signatures: dict[Number, Signature]


class EncryptedInput(Message, frozen=True):
    """EncryptedInput, participant to server: its vector under the joint key, both halves of all ciphertexts packed."""

    terms: Terms
    subject: Subject
    key: Digest
    first: memoryview
    second: memoryview


class HalfUpload(Message, frozen=True):
    """SHA-256 of the first halves of an upload's ciphertexts, and the second halves themselves."""

    first: Digest
    second: memoryview


class Uploads(Message, frozen=True):
    """EncryptedInput, server to participants (active mode): all uploads of the sum, to add up and to check."""

    uploads: dict[Number, HalfUpload]


class Aggregate(Message, frozen=True):
    """EncryptedInput, server to participants (semi-honest mode): whose sum it is, and its second halves."""

    contributors: Annotated[tuple[Number, ...], Meta(max_length=1 << 16)]
    second: memoryview


class HeldUploads(Message, frozen=True):
    """EncryptedInput, server to the holder (active mode): all uploads, and what t participants signed of them."""

    subject: Subject
    digests: dict[Number, Digest]
    signatures: dict[Number, Signature]
    uploads: dict[Number, HalfUpload]


class HeldAggregate(Message, frozen=True):
    """EncryptedInput, server to the holder (semi-honest mode)."""

    subject: Subject
    aggregate: Aggregate


class PartialDecryption(Message, frozen=True):
    """Decrypt, participant to server: c1 s_u and noise, packed. `digest` is of the c1 that it decrypted."""

    terms: Terms
    digest: Digest
    packed: memoryview


class Missing(Message, frozen=True):
    """Decrypt, server to participants: members of U3 that gave no partial decryption, in ascending order."""

    missing: Annotated[tuple[Number, ...], Meta(max_length=1 << 16)]


class SeedShares(Message, frozen=True):
    """Recover, participant to server: its shares of the seeds of those who are missing."""

    terms: Terms
    shares: dict[Number, Share]

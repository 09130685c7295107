"""One struct for each arrow of the protocol (Bonawitz et al. 2017, figure 4).

A message never says who sent it: that comes from the transport. Participants are numbers, their places in the roster.
"""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

from secagg.masking.params import Subject, Terms
from secagg.sealed import TAG_BYTES
from secagg.shamir import SHARE_BYTES
from secagg.wire import Digest, Key, Message, Number, Signature

# A box holds (sender, receiver, share of s_u, share of b_u): 4 + 4 + 33 + 33 bytes and the tag.
PAIR_BYTES = 8 + 2 * SHARE_BYTES
Box = Annotated[bytes, Meta(min_length=PAIR_BYTES + TAG_BYTES, max_length=PAIR_BYTES + TAG_BYTES)]
Share = Annotated[bytes, Meta(min_length=SHARE_BYTES, max_length=SHARE_BYTES)]


class Advertisement(Message, frozen=True):
    """Round 0, participant to server: c_u and s_u public keys, signed (empty signature in semi-honest mode).

    `terms` is what they were made and signed for: where participants disagree, it tells on what.
    """

    terms: Terms
    channel_key: Key
    mask_key: Key
    signature: Signature


class KeyDirectory(Message, frozen=True):
    """Round 0, server to participants: what everyone in U1 advertised."""

    advertisements: dict[Number, Advertisement]


class Commitment(Message, frozen=True):
    """A hash of b_u, signed, against which the server checks what it reconstructs."""

    digest: Digest
    signature: Signature


class EncryptedShares(Message, frozen=True):
    """Round 1, participant to server: a sealed pair of shares for every other member of U1, and what b_u will be."""

    terms: Terms
    boxes: dict[Number, Box]
    commitment: Commitment


class ShareInbox(Message, frozen=True):
    """Round 1, server to participant v: the boxes for v from every other member of U2."""

    boxes: dict[Number, Box]


class MaskedInput(Message, frozen=True):
    """Round 2, participant to server: y_u, packed to b bits a value, and what it is a summand of."""

    terms: Terms
    subject: Subject
    packed: bytes


class SurvivorSet(Message, frozen=True):
    """Round 2, server to participants: U3, everyone whose masked vector is in the sum; in ascending order."""

    survivors: Annotated[tuple[Number, ...], Meta(max_length=1 << 16)]


class Confirmation(Message, frozen=True):
    """Round 3, participant to server: a signature over the U3 that it was shown, and over what it summed."""

    subject: Subject
    signature: Signature


class ConfirmationSet(Message, frozen=True):
    """Round 3, server to participants: what U4 signed."""

    confirmations: dict[Number, Confirmation]


class UnmaskShares(Message, frozen=True):
    """Round 4, participant to server: for each member of U2 exactly one kind of share.

    The share of b_v for v in U3 (alive), the share of s_v for v in U2 minus U3 (dropped). Never both of one.
    """

    terms: Terms
    of_self_mask_seed: dict[Number, Share]
    of_mask_secret: dict[Number, Share]

"""What participants and holders do to a sum before they decrypt it, and how."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import numpy as np

from secagg.ckks.joint_key import secret_key, upload_digest, uploads_payload
from secagg.ckks.messages import HalfUpload, PartialDecryption
from secagg.ckks.params import Packing, Setting
from secagg.ckks.polynomials import Residues, arithmetic
from secagg.errors import DecodeError, RemoteProtocolError
from secagg.keys import verify
from secagg.masking.params import Session, Subject
from secagg.prg import Label, Stream, derive
from secagg.stages import require


def uploaders(session: Session, holders: tuple[int, ...]) -> frozenset[int]:
    """Who may upload under a key: whose key it is, or where it is another's, all others."""
    everyone = frozenset(range(len(session.params.roster)))
    return frozenset(holders) if len(holders) > 1 else everyone - set(holders)


def check_contributors(session: Session, shown: tuple[int, ...], allowed: frozenset[int]) -> None:
    """Refuse a list of contributors that is none, or too short."""
    if list(shown) != sorted(set(shown)):
        raise RemoteProtocolError("the server's list of contributors is not ascending, or names someone twice")
    if not set(shown) <= allowed:
        raise RemoteProtocolError(
            f"contributions of {session.names(set(shown) - allowed)}, who have no part in this sum"
        )
    require(session, "EncryptedInput", len(shown))


def check_confirmations(
    session: Session, subject: Subject, key: bytes, digests: Mapping[int, bytes], signatures: Mapping[int, bytes]
) -> None:
    """Refuse a directory of uploads that fewer than t of those in it have signed."""
    if strangers := signatures.keys() - digests.keys():
        raise RemoteProtocolError(f"confirmations from {session.names(set(strangers))}, who upload nothing")
    require(session, "ConsistencyCheck", len(signatures))
    sum_id, payload = subject.sum_id(session.id), uploads_payload(key, digests)
    for v, signature in signatures.items():
        if not is_signed(session, v, signature, Label.SIGN_CKKS_UPLOADS, sum_id, payload):
            raise RemoteProtocolError(
                f"{session.params.roster.name(v)} did not sign the uploads that we were shown: the server may have "
                "shown it others"
            )


def add_confirmed(
    total: Residues,
    session: Session,
    subject: Subject,
    key: bytes,
    digests: Mapping[int, bytes],
    uploads: Mapping[int, HalfUpload],
    layout: Packing,
) -> None:
    """Add at least t uploads, each the one that stands in the directory."""
    if strangers := uploads.keys() - digests.keys():
        raise RemoteProtocolError(f"uploads of {session.names(set(strangers))}, who committed to none")
    require(session, "EncryptedInput", len(uploads))
    sum_id = subject.sum_id(session.id)
    for v, half in uploads.items():
        if upload_digest(sum_id, v, key, half.first, half.second) != digests[v]:
            raise RemoteProtocolError(
                f"the upload shown for {session.params.roster.name(v)} is not the one that it committed to"
            )
        add_packed(total, half.second, layout)


def add_packed(total: Residues, packed: bytes | memoryview, layout: Packing) -> None:
    """Add packed residues of one half of all ciphertexts, in place.

    Raises:
        DecodeError: Another length, or numbers that are no residues; `total` is as it was.
    """
    values = layout.ring.unpack(packed, total.size).astype(np.uint64, copy=False)
    if int(values.max()) >= layout.chain.modulus:
        raise DecodeError(f"a number of {values.max()} is no residue modulo {layout.chain.modulus}")
    arithmetic(layout.chain.degree, layout.chain.modulus).add(total, values.reshape(total.shape))


def sum_digest(second: Residues) -> bytes:
    """What stands for the second halves of a sum: what a partial decryption is of."""
    return hashlib.sha256(np.ascontiguousarray(second, "<u8").data).digest()


def zeros(layout: Packing) -> Residues:
    """One half of all ciphertexts of a vector, to add into."""
    return np.zeros((layout.ciphertexts, layout.chain.degree), np.uint64)


def partial_decryption(
    session: Session, seeds: Mapping[int, bytes], flood: bytes, total: Residues, setting: Setting, layout: Packing
) -> PartialDecryption:
    """c1 s and noise (protocol CKS). The noise depends on c1: another sum never gets the same."""
    digest = sum_digest(total)
    field = arithmetic(setting.chain.degree, setting.chain.modulus)
    partial = field.products(total, secret_key(setting.chain, session.id, seeds))
    field.flood(partial, Stream(derive(flood, Label.CKKS_FLOOD, digest, 0)), layout.deviation)
    return PartialDecryption(session.terms, digest, memoryview(layout.ring.pack(partial.reshape(-1))))


def is_signed(session: Session, v: int, signature: bytes, label: Label, bound_to: bytes, payload: bytes) -> bool:
    """Whether v signed this; in a semi-honest session, whether it did not."""
    if not session.params.active:
        return not signature
    return verify(session.params.roster.members[v].identity, signature, label, bound_to, payload)

"""The joint key: what it is made of, and everything that is hashed or signed on the way to a sum under it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import cast

import numpy as np
import numpy.typing as npt
from msgspec import Struct, msgpack

from secagg.ckks.messages import ChannelDirectory, HolderKey
from secagg.ckks.polynomials import Chain, Residues, arithmetic, small_error, ternary, uniform
from secagg.errors import DecodeError, RemoteProtocolError
from secagg.keys import Member, verify
from secagg.masking.params import Session, differences
from secagg.prg import Label, Stream, derive, domain
from secagg.ring import Ring
from secagg.wire import encode


class JointKey(Struct, frozen=True):
    """A public key, checked. `holders` is whose shares it is the sum of; `id` stands for it."""

    id: bytes
    public: tuple[Residues, Residues]
    holders: tuple[int, ...]


def channel_payload(participant: int, public: bytes) -> bytes:
    """What is signed in AdvertiseKeys."""
    return participant.to_bytes(8, "big") + public


def commitment_payload(participant: int, uniform: bytes, seed: bytes, share: bytes) -> bytes:
    """What is signed in ShareKeys: both commitments, and the directory that the common polynomial is drawn from."""
    return participant.to_bytes(8, "big") + uniform + seed + share


def holder_payload(uniform: bytes, packed: bytes) -> bytes:
    """What a holder signs."""
    return uniform + hashlib.sha256(packed).digest()


def uploads_payload(key: bytes, digests: Mapping[int, bytes]) -> bytes:
    """What is signed in ConsistencyCheck: all uploads of the sum, and the key that they are encrypted to."""
    return key + hashlib.sha256(domain(Label.CKKS_UPLOADS, key) + msgpack.encode(sorted(digests.items()))).digest()


def uniform_id(directory: ChannelDirectory, session_id: bytes) -> bytes:
    """32 bytes from which the common polynomial is drawn."""
    return hashlib.sha256(domain(Label.CKKS_UNIFORM, session_id) + encode(directory)).digest()


def seed_digest(seed: bytes, session_id: bytes, participant: int) -> bytes:
    """Hash of a seed. It hides because a seed has 256 random bits, and binds by SHA-256."""
    return hashlib.sha256(domain(Label.COMMIT_CKKS_SEED, session_id, participant) + seed).digest()


def share_digest(packed: bytes, session_id: bytes, participant: int) -> bytes:
    """Hash of a share of the joint key."""
    return hashlib.sha256(domain(Label.COMMIT_CKKS_SHARE, session_id, participant) + packed).digest()


def upload_digest(sum_id: bytes, participant: int, key: bytes, first: bytes, second: bytes | memoryview) -> bytes:
    """What stands for an upload: `first` is the digest of its first halves, `second` the packed second ones."""
    halves = first + hashlib.sha256(second).digest()
    return hashlib.sha256(domain(Label.CKKS_UPLOAD, sum_id, participant) + key + halves).digest()


def holder_number(session: Session) -> int:
    """The holder's number: the first behind the roster."""
    return len(session.params.roster)


def key_id(session_id: bytes, uniform: bytes, shares: Mapping[int, bytes]) -> bytes:
    """32 bytes that stand for a joint key: in every upload, so that none is added to those under another key."""
    listed = sorted((v, hashlib.sha256(packed).digest()) for v, packed in shares.items())
    return hashlib.sha256(domain(Label.CKKS_KEY, session_id) + uniform + msgpack.encode(listed)).digest()


def key_share(chain: Chain, session_id: bytes, participant: int, seed: bytes, uniform: bytes) -> bytes:
    """The share b = -(a s) + e of one participant, transformed, modulo q and modulo p, packed (protocol CKG)."""
    secret, error = _secret_and_error(chain, session_id, participant, seed)
    packed = b""
    for a, bits, modulus in _common(chain, session_id, uniform):
        field = arithmetic(chain.degree, modulus)
        transformed = field.transformed(np.stack([field.embed(-secret), field.embed(error)]))
        share = field.scaled(a[None], transformed[0])
        field.add(share, transformed[1:])
        packed += Ring(bits).pack(share[0].astype(Ring(bits).dtype))
    return packed


def secret_key(chain: Chain, session_id: bytes, seeds: Mapping[int, bytes]) -> Residues:
    """The sum of the secrets that follow from the participants' seeds, transformed, modulo q, shape [N]."""
    field = arithmetic(chain.degree, chain.modulus)
    total = np.zeros(chain.degree, np.int64)
    for participant, seed in seeds.items():
        total += _secret_and_error(chain, session_id, participant, seed)[0]
    return cast(Residues, field.transformed(field.embed(total)[None])[0])


def joined(chain: Chain, session: Session, uniform_seed: bytes, shares: Mapping[int, bytes]) -> JointKey:
    """The sum of the shares, beside the common polynomial."""
    sid = session.id
    sums, common = [], _common(chain, sid, uniform_seed)
    ends = Ring(chain.bits).packed_size(chain.degree)
    for i, (_, bits, modulus) in enumerate(common):
        field, total = arithmetic(chain.degree, modulus), np.zeros(chain.degree, np.uint64)
        for v, packed in shares.items():
            part = packed[:ends] if i == 0 else packed[ends:]
            try:
                values = Ring(bits).unpack(part, chain.degree).astype(np.uint64)
            except DecodeError as error:
                raise RemoteProtocolError(f"{session.params.roster.name(v)} gave no share of a key: {error}") from error
            if int(values.max()) >= modulus:
                raise RemoteProtocolError(
                    f"{session.params.roster.name(v)} gave no share of a key: not below the prime"
                )
            field.add(total, values)
        sums.append(total)
    public = np.stack(sums), np.stack([a for a, _, _ in common])
    return JointKey(key_id(sid, uniform_seed, shares), public, tuple(sorted(shares)))


def check_holder_key(session: Session, shown: HolderKey, holder: Member) -> None:
    """Refuse a key that the holder has not signed for this session; see `holders_key`."""
    bound, payload = shown.terms.session_id, holder_payload(shown.seed, shown.packed)
    if not verify(holder.identity, shown.signature, Label.SIGN_CKKS_HOLDER, bound, payload):
        raise RemoteProtocolError(f"the key is not signed by {holder.name}, who holds it in this study", [holder.name])
    if shown.terms != (ours := session.terms):
        told = differences(shown.terms, ours)
        raise RemoteProtocolError(f"the key of {holder.name} is for another session: {told}", [holder.name])


def _common(chain: Chain, session_id: bytes, uniform_seed: bytes) -> list[tuple[Residues, int, int]]:
    """The common polynomial, transformed, with the width and value of each prime."""
    primes = (chain.bits, chain.modulus), (chain.special_bits, chain.special)
    return [
        (uniform(Stream(derive(uniform_seed, Label.CKKS_UNIFORM, session_id, i)), chain.degree, modulus), bits, modulus)
        for i, (bits, modulus) in enumerate(primes)
    ]


def _secret_and_error(
    chain: Chain, session_id: bytes, participant: int, seed: bytes
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    stream = Stream(derive(seed, Label.CKKS_SECRET, session_id, participant))
    return ternary(stream, chain.degree), small_error(stream, chain.degree)

"""A second implementation of the masked sum, to check the test vectors with.

    python tests/vectors/verify.py [FILES]      default: all of tests/vectors/masking

It shares no code and no dependency but PyCryptodome with the library: SHA-256 and integers are the standard library's,
the rest is PyCryptodome. From a round's inputs and randomness it recomputes every field and every byte said, opens the
sum from the messages as the server does, and compares. Of a refusal it checks that the message is the round's but for
the one change, and that the check which the file names fails, where the round's own message passes.

One line is printed for each file; the first mismatch is named and ends it with exit status 1.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from Crypto.Cipher import AES
from Crypto.Hash import SHA256
from Crypto.Protocol.DH import import_x25519_private_key, import_x25519_public_key, key_agreement
from Crypto.Protocol.KDF import HKDF
from Crypto.PublicKey import ECC
from Crypto.Signature import eddsa

PRIME = 2**256 + 297
STAGES = ("AdvertiseKeys", "ShareKeys", "MaskedInput", "ConsistencyCheck", "Unmask")
SUITE = "X25519-Ed25519-HKDFSHA256-AES128CTR-AES128GCM"


class Mismatch(Exception):
    """A file says something else than what comes out here."""


class Refused(Exception):
    """A message is not acceptable; the text is the check that failed, as in a refusal's `check`."""


def require(condition: bool, check: str) -> None:
    """Refuse unless the condition holds."""
    if not condition:
        raise Refused(check)


# ---- MessagePack: the part of it that is used, in its shortest form, maps by ascending key ----


def pack(value: Any) -> bytes:
    """A value as MessagePack."""
    match value:
        case int() if value < 1 << 7:
            return bytes([value])
        case int():
            size = next(size for size in (1, 2, 4, 8) if value < 1 << 8 * size)
            return bytes([0xCB + size.bit_length()]) + value.to_bytes(size, "big")
        case bytes():
            return _head(len(value), None, 0, 0xC4) + value
        case str():
            text = value.encode()
            return _head(len(text), 0xA0, 32, 0xD9) + text
        case list():
            return _head(len(value), 0x90, 16, 0xDB) + b"".join(map(pack, value))
        case dict():
            return _head(len(value), 0x80, 16, 0xDD) + b"".join(pack(k) + pack(value[k]) for k in sorted(value))
    raise TypeError(type(value).__name__)


def _head(length: int, short: int | None, below: int, code: int) -> bytes:
    """Type and length; `code` is the type's 8-bit form (arrays and maps have none and start at 16 bits)."""
    if short is not None and length < below:
        return bytes([short + length])
    if length < 1 << 8 and code not in (0xDB, 0xDD):
        return bytes([code, length])
    return bytes([code + 1]) + length.to_bytes(2, "big") if length < 1 << 16 else _long(length, code)


def _long(length: int, code: int) -> bytes:
    return bytes([code + 2]) + length.to_bytes(4, "big")


def unpack(data: bytes) -> Any:
    """The one value in `data`, in whatever form: wider numbers than needed and maps in any order are read too."""
    value, end = _read(data, 0)
    require(end == len(data), "left over")
    return value


def _read(data: bytes, at: int) -> tuple[Any, int]:
    code, at = _number(data, at, 1)
    if code < 0x80:
        return code, at
    if 0xCC <= code <= 0xCF:
        return _number(data, at, 1 << code - 0xCC)
    sizes = {0xC4: 1, 0xC5: 2, 0xC6: 4, 0xD9: 1, 0xDA: 2, 0xDB: 4, 0xDC: 2, 0xDD: 4, 0xDE: 2, 0xDF: 4}
    if code in sizes:
        length, at = _number(data, at, sizes[code])
    else:
        length = code & (0x1F if 0xA0 <= code < 0xC0 else 0x0F)
    if code < 0x90 or code in (0xDE, 0xDF):
        entries = {}
        for _ in range(length):
            key, at = _read(data, at)
            entries[key], at = _read(data, at)
        return entries, at
    if code < 0xA0 or code in (0xDC, 0xDD):
        items = []
        for _ in range(length):
            item, at = _read(data, at)
            items.append(item)
        return items, at
    require(code < 0xC0 or code in sizes, "type")
    require(at + length <= len(data), "cut short")
    raw = data[at : at + length]
    return (raw if code in (0xC4, 0xC5, 0xC6) else raw.decode()), at + length


def _number(data: bytes, at: int, size: int) -> tuple[int, int]:
    require(at + size <= len(data), "cut short")
    return int.from_bytes(data[at : at + size], "big"), at + size


# ---- messages: fields in order; a type is an int, a length of bytes, a range of lengths, a map or a list ----

SIGNATURE = range(65)
ADVERTISEMENT = {"channel_key": 32, "mask_key": 32, "signature": SIGNATURE}
MESSAGES: dict[str, dict[str, Any]] = {
    "Advertisement": ADVERTISEMENT,
    "KeyDirectory": {"advertisements": {int: ADVERTISEMENT}},
    "EncryptedShares": {"boxes": {int: 90}, "commitment": 32, "signature": SIGNATURE},
    "ShareInbox": {"boxes": {int: 90}},
    "MaskedInput": {"packed": range(1 << 30)},
    "SurvivorSet": {"survivors": [int]},
    "Confirmation": {"signature": SIGNATURE},
    "ConfirmationSet": {"signatures": {int: SIGNATURE}},
    "UnmaskShares": {"of_self_mask_seed": {int: 33}, "of_mask_secret": {int: 33}},
}
ANSWERS = dict(
    zip(STAGES, ("Advertisement", "EncryptedShares", "MaskedInput", "Confirmation", "UnmaskShares"), strict=True)
)
REQUESTS = dict(zip(STAGES[1:], ("KeyDirectory", "ShareInbox", "SurvivorSet", "ConfirmationSet"), strict=True))


def encode(kind: str, message: Mapping[str, Any]) -> bytes:
    """A message's bytes: the version, then its fields as an array."""
    return b"\x01" + pack(_bare(message, MESSAGES[kind]))


def _bare(value: Any, shape: Any) -> Any:
    if isinstance(shape, dict) and int in shape:
        return {key: _bare(entry, shape[int]) for key, entry in value.items()}
    return [_bare(value[name], part) for name, part in shape.items()] if isinstance(shape, dict) else value


def decode(kind: str, data: bytes, *, strict: bool = True) -> dict[str, Any]:
    """A message from its bytes; refused unless it is the one form. `strict=False` lets version and form pass."""
    require(not strict or data[:1] == b"\x01", "version")
    value = unpack(data[1:])
    require(not strict or pack(value) == data[1:], "canonical form")
    return _named(value, MESSAGES[kind])


def _named(value: Any, shape: Any) -> Any:
    if isinstance(shape, dict) and int in shape:
        require(isinstance(value, dict), "type")
        return {_named(key, int): _named(entry, shape[int]) for key, entry in value.items()}
    if isinstance(shape, dict):
        require(isinstance(value, list) and len(value) == len(shape), "type")
        return {name: _named(part, shape[name]) for name, part in zip(shape, value, strict=True)}
    if shape is int:
        require(isinstance(value, int) and value < 1 << 16, "type")
    elif isinstance(shape, list):
        require(isinstance(value, list) and all(isinstance(item, int) for item in value), "type")
    else:
        require(isinstance(value, bytes) and len(value) in (shape if isinstance(shape, range) else [shape]), "type")
    return value


# ---- primitives ----


def domain(label: str, session_id: bytes, *numbers: int) -> bytes:
    """Prefix of all that is hashed, signed or derived: length, "secagg-1/" and label, session id, 8 bytes a number."""
    tag = b"secagg-1/" + label.encode()
    return bytes([len(tag)]) + tag + session_id + b"".join(number.to_bytes(8, "big") for number in numbers)


def derive(secret: bytes, label: str, session_id: bytes, *numbers: int) -> bytes:
    """HKDF-SHA256 to 16 bytes: the session id is the salt, `domain` the info."""
    return HKDF(secret, 16, session_id, SHA256, context=domain(label, session_id, *numbers))


def keystream(key: bytes, count: int) -> bytes:
    """AES-128-CTR from a counter block of zeros."""
    return AES.new(key, AES.MODE_CTR, nonce=b"", initial_value=bytes(16)).encrypt(bytes(count))


def box_cipher(key: bytes, session_id: bytes, sender: int, receiver: int) -> Any:
    """AES-128-GCM for a box: twelve zero bytes as nonce, `domain` as associated data."""
    cipher = AES.new(key, AES.MODE_GCM, nonce=bytes(12))
    cipher.update(domain("channel", session_id, sender, receiver))
    return cipher


@cache
def exchange_public(secret: bytes) -> bytes:
    """X25519 public key."""
    return bytes(import_x25519_private_key(secret).public_key().export_key(format="raw"))


@cache
def agree(secret: bytes, public: bytes) -> bytes:
    """X25519 shared secret; refused for a point of low order."""
    try:
        own, other = import_x25519_private_key(secret), import_x25519_public_key(public)
        return bytes(key_agreement(static_priv=own, static_pub=other, kdf=bytes))
    except ValueError:
        raise Refused("low order") from None


@cache
def sign(secret: bytes, data: bytes) -> bytes:
    """Ed25519."""
    return bytes(eddsa.new(ECC.construct(curve="Ed25519", seed=secret), "rfc8032").sign(data))


def check_signature(public: bytes, signature: bytes, data: bytes) -> None:
    """Refuse a signature that is not `public`'s."""
    try:
        eddsa.new(eddsa.import_public_key(public), "rfc8032").verify(data, signature)
    except ValueError:
        raise Refused("signature") from None


def share(coefficients: Sequence[int], holder: int) -> bytes:
    """The polynomial's value at holder + 1."""
    return (sum(c * pow(holder + 1, k, PRIME) for k, c in enumerate(coefficients)) % PRIME).to_bytes(33, "big")


def interpolate(shares: Mapping[int, bytes]) -> int:
    """The polynomial's value at 0, by Lagrange."""
    total = 0
    for u, y in shares.items():
        top = bottom = 1
        for v in shares:
            if v != u:
                top, bottom = top * (v + 1) % PRIME, bottom * (v - u) % PRIME
        total += int.from_bytes(y, "big") * top * pow(bottom, -1, PRIME)
    return total % PRIME


# ---- a round ----


class Round:
    """A round from its inputs and randomness.

    Attributes:
        document: What the file must say, all of it.
        said: (stage, sender) to the participant's message, as fields.
        asked: (stage, receiver) to the server's message that the participant answers to.
    """

    def __init__(self, given: Mapping[str, Any]):
        fields, parts = given["session"], given["participants"]
        self.active, self.threshold = fields["mode"] == "active", fields["threshold"]
        self.bits, self.dimension = fields["ring_bits"], fields["dimension"]
        self.identity_secrets = [bytes.fromhex(member["identity_secret"]) for member in fields["roster"]]
        self.identities = [
            bytes(ECC.construct(curve="Ed25519", seed=secret).public_key().export_key(format="raw"))
            for secret in self.identity_secrets
        ]
        self.names = names = [member["name"] for member in fields["roster"]]
        n = len(names)
        if n < 3 or names != sorted(set(names)) or [part["number"] for part in parts] != list(range(n)):
            raise Mismatch("session.roster: expected three names or more in order, and a participant for each")
        least = 2 * n // 3 + 1 if self.active else n // 2 + 1
        if not least <= self.threshold <= n:
            raise Mismatch(f"session.threshold: expected {least} to {n}, the file says {self.threshold}")
        members = [[name, key] for name, key in zip(names, self.identities, strict=True)]
        encoding = pack(
            [
                [[members], self.threshold, fields["mode"], SUITE],
                bytes.fromhex(fields["context"]),
                fields["purpose"],
                fields["round"],
                bytes.fromhex(fields["model_digest"]),
                self.dimension,
                self.bits,
            ]
        )
        self.id = hashlib.sha256(domain("session", b"") + encoding).digest()
        self.vectors = [part["vector"] for part in parts]
        self.quits = {part["number"]: part["drops_out_at"] for part in parts if part["drops_out_at"]}
        self.entropy = [[bytes.fromhex(call) for call in part["entropy"]] for part in parts]
        self.stages = [stage for stage in STAGES if self.active or stage != "ConsistencyCheck"]
        self.there: dict[str, list[int]] = {}
        there = list(range(n))
        for stage in self.stages:
            there = [u for u in there if self.quits.get(u) != stage]
            self.there[stage] = there
        self.said: dict[tuple[str, int], dict[str, Any]] = {}
        self.asked: dict[tuple[str, int], dict[str, Any]] = {}
        self._keys()
        self._shares()
        self._vectors()
        if self.active:
            self._confirmations()
        self._unmask()
        total = self.open({u: self.said["Unmask", u] for u in self.there["Unmask"]})
        plain = [sum(self.vectors[u][i] for u in self.there["MaskedInput"]) for i in range(self.dimension)]
        if total != [value % (1 << self.bits) for value in plain]:
            raise Mismatch("sum: what the messages open to is not the sum of the vectors")
        self.document = {
            "kind": "round",
            "description": given["description"],
            "session": {
                **{name: fields[name] for name in ("threshold", "mode", "context", "purpose", "round", "model_digest")},
                "roster": [
                    {"name": name, "identity_secret": secret.hex(), "identity": key.hex()}
                    for name, secret, key in zip(names, self.identity_secrets, self.identities, strict=True)
                ],
                "suite": SUITE,
                "dimension": self.dimension,
                "ring_bits": self.bits,
                "encoding": encoding.hex(),
                "id": self.id.hex(),
            },
            "participants": [self._participant(u) for u in range(n)],
            "pairs": [self._pair(u, v) for u in range(n) for v in range(u + 1, n)],
            "stages": [self._stage(stage) for stage in self.stages],
            "sum": total,
        }

    def signature(self, u: int, purpose: str, payload: bytes) -> bytes:
        """A participant's signature; empty in semi-honest mode."""
        return (
            sign(self.identity_secrets[u], domain(f"signature: {purpose}", self.id) + payload) if self.active else b""
        )

    def check(self, u: int, signature: bytes, purpose: str, payload: bytes) -> None:
        """Refuse a signature that is not u's."""
        if self.active:
            check_signature(self.identities[u], signature, domain(f"signature: {purpose}", self.id) + payload)

    def channel_key(self, sender: int, receiver: int) -> bytes:
        """Key of the box from sender to receiver."""
        shared = agree(self.channel_secrets[sender], exchange_public(self.channel_secrets[receiver]))
        return derive(shared, "channel", self.id, sender, receiver)

    def pairwise_key(self, u: int, v: int) -> bytes:
        """Key of the mask that u and v share."""
        shared = agree(self.mask_secrets[u], exchange_public(self.mask_secrets[v]))
        return derive(shared, "mask: pairwise", self.id, min(u, v), max(u, v))

    def words(self, key: bytes) -> list[int]:
        """A mask: little-endian words of 32 bits for a ring of up to 32, else of 64."""
        size = 4 if self.bits <= 32 else 8
        stream = keystream(key, size * self.dimension)
        return [int.from_bytes(stream[i : i + size], "little") for i in range(0, len(stream), size)]

    def commitment(self, u: int, seed: bytes) -> bytes:
        """The hash of b_u that u signs."""
        return hashlib.sha256(domain("commitment: own mask seed", self.id, u) + seed).digest()

    def packed(self, values: Sequence[int]) -> bytes:
        """Values of b bits one after another from the lowest bit on."""
        whole = sum(value << self.bits * i for i, value in enumerate(values))
        return whole.to_bytes(-(-self.bits * self.dimension // 8), "little")

    def unpacked(self, data: bytes) -> list[int]:
        """The values; refused for another length or a padding bit that is set."""
        require(len(data) == -(-self.bits * self.dimension // 8), "length")
        whole = int.from_bytes(data, "little")
        require(whole >> self.bits * self.dimension == 0, "padding")
        return [whole >> self.bits * i & (1 << self.bits) - 1 for i in range(self.dimension)]

    def _keys(self) -> None:
        members = self.there["AdvertiseKeys"]
        self.channel_secrets = {u: self.entropy[u][0] for u in members}
        self.mask_secrets = {u: self.entropy[u][1] for u in members}
        for u in members:
            keys = exchange_public(self.channel_secrets[u]), exchange_public(self.mask_secrets[u])
            signature = self.signature(u, "keys", u.to_bytes(8, "big") + keys[0] + keys[1])
            self.said["AdvertiseKeys", u] = {"channel_key": keys[0], "mask_key": keys[1], "signature": signature}
        directory = {"advertisements": {u: self.said["AdvertiseKeys", u] for u in members}}
        self.asked |= {("ShareKeys", u): directory for u in members}

    def _shares(self) -> None:
        holders, members, t = self.there["AdvertiseKeys"], self.there["ShareKeys"], self.threshold
        self.seeds, self.of_secret, self.of_seed = {}, {}, {}
        for u in members:
            seed, calls = self.entropy[u][2], [int.from_bytes(call, "big") % PRIME for call in self.entropy[u][3:]]
            if [len(call) for call in self.entropy[u]] != 3 * [32] + 2 * (t - 1) * [40]:
                raise Mismatch(f"participants.{u}.entropy: expected 3 calls for 32 bytes and {2 * t - 2} for 40")
            secret = int.from_bytes(self.mask_secrets[u], "big")
            self.seeds[u] = seed
            self.of_secret[u] = {v: share([secret, *calls[: t - 1]], v) for v in holders}
            self.of_seed[u] = {v: share([int.from_bytes(seed, "big"), *calls[t - 1 :]], v) for v in holders}
            boxes = {}
            for v in holders:
                if v != u:
                    text = u.to_bytes(4, "big") + v.to_bytes(4, "big") + self.of_secret[u][v] + self.of_seed[u][v]
                    sealed, tag = box_cipher(self.channel_key(u, v), self.id, u, v).encrypt_and_digest(text)
                    boxes[v] = sealed + tag
            committed = self.commitment(u, seed)
            signature = self.signature(u, "commitment", committed)
            self.said["ShareKeys", u] = {"boxes": boxes, "commitment": committed, "signature": signature}
        for u in members:
            boxes = {v: self.said["ShareKeys", v]["boxes"][u] for v in members if v != u}
            self.asked["MaskedInput", u] = {"boxes": boxes}

    def _vectors(self) -> None:
        sharing, survivors = self.there["ShareKeys"], self.there["MaskedInput"]
        for u in survivors:
            masked = list(self.vectors[u])
            masks = [(1, derive(self.seeds[u], "mask: own", self.id, u))]
            masks += [(1 if u > v else -1, self.pairwise_key(u, v)) for v in sharing if v != u]
            for sign_, key in masks:
                masked = [(x + sign_ * m) % (1 << self.bits) for x, m in zip(masked, self.words(key), strict=True)]
            self.said["MaskedInput", u] = {"packed": self.packed(masked)}
        following = "ConsistencyCheck" if self.active else "Unmask"
        self.asked |= {(following, u): {"survivors": survivors} for u in survivors}

    def _confirmations(self) -> None:
        payload, members = pack(self.there["MaskedInput"]), self.there["ConsistencyCheck"]
        for u in members:
            self.said["ConsistencyCheck", u] = {"signature": self.signature(u, "survivors", payload)}
        signatures = {u: self.said["ConsistencyCheck", u]["signature"] for u in members}
        self.asked |= {("Unmask", u): {"signatures": signatures} for u in members}

    def _unmask(self) -> None:
        survivors = self.there["MaskedInput"]
        dropped = [v for v in self.there["ShareKeys"] if v not in survivors]
        for u in self.there["Unmask"]:
            self.said["Unmask", u] = {
                "of_self_mask_seed": {v: self.of_seed[v][u] for v in survivors},
                "of_mask_secret": {v: self.of_secret[v][u] for v in dropped},
            }

    def open(self, answers: Mapping[int, Mapping[str, Any]]) -> list[int]:
        """The sum from what was said alone, as the server gets it; refused where a secret does not fit."""
        require(len(answers) >= self.threshold, "threshold")
        survivors = self.there["MaskedInput"]
        dropped = [v for v in self.there["ShareKeys"] if v not in survivors]
        total = [0] * self.dimension

        def add(values: Sequence[int], sign_: int) -> None:
            total[:] = [(x + sign_ * y) % (1 << self.bits) for x, y in zip(total, values, strict=True)]

        def secret(kind: str, owner: int, check: str) -> bytes:
            first = sorted(answers)[: self.threshold]
            value = interpolate({u: answers[u][kind][owner] for u in first})
            require(value < 1 << 256, check)
            return value.to_bytes(32, "big")

        for u in survivors:
            add(self.unpacked(self.said["MaskedInput", u]["packed"]), 1)
            seed = secret("of_self_mask_seed", u, "commitment")
            require(self.commitment(u, seed) == self.said["ShareKeys", u]["commitment"], "commitment")
            add(self.words(derive(seed, "mask: own", self.id, u)), -1)
        for v in dropped:
            own = secret("of_mask_secret", v, "public key")
            require(exchange_public(own) == self.said["AdvertiseKeys", v]["mask_key"], "public key")
            for u in survivors:
                shared = agree(own, self.said["AdvertiseKeys", u]["mask_key"])
                key = derive(shared, "mask: pairwise", self.id, min(u, v), max(u, v))
                add(self.words(key), -1 if u > v else 1)
        return total

    def _participant(self, u: int) -> dict[str, Any]:
        ad, signatures = self.said["AdvertiseKeys", u], {}
        signatures["keys"] = ad["signature"].hex()
        part = {
            "number": u,
            "drops_out_at": self.quits.get(u),
            "vector": self.vectors[u],
            "entropy": [call.hex() for call in self.entropy[u]],
            "channel_secret": self.channel_secrets[u].hex(),
            "channel_key": ad["channel_key"].hex(),
            "mask_secret": self.mask_secrets[u].hex(),
            "mask_key": ad["mask_key"].hex(),
        }
        if u in self.seeds:
            key = derive(self.seeds[u], "mask: own", self.id, u)
            signatures["commitment"] = self.said["ShareKeys", u]["signature"].hex()
            part |= {
                "self_mask_seed": self.seeds[u].hex(),
                "commitment": self.said["ShareKeys", u]["commitment"].hex(),
                "self_mask_key": key.hex(),
                "self_mask_keystream": keystream(key, 16).hex(),
                "shares_of_mask_secret": {str(v): value.hex() for v, value in self.of_secret[u].items()},
                "shares_of_self_mask_seed": {str(v): value.hex() for v, value in self.of_seed[u].items()},
            }
        if ("ConsistencyCheck", u) in self.said:
            signatures["survivors"] = self.said["ConsistencyCheck", u]["signature"].hex()
        return {**part, "signatures": signatures} if self.active else part

    def _pair(self, u: int, v: int) -> dict[str, Any]:
        key = self.pairwise_key(u, v)
        return {
            "low": u,
            "high": v,
            "channel_agreement": agree(self.channel_secrets[v], exchange_public(self.channel_secrets[u])).hex(),
            "channel_key_low_to_high": self.channel_key(u, v).hex(),
            "channel_key_high_to_low": self.channel_key(v, u).hex(),
            "mask_agreement": agree(self.mask_secrets[v], exchange_public(self.mask_secrets[u])).hex(),
            "pairwise_key": key.hex(),
            "pairwise_keystream": keystream(key, 16).hex(),
        }

    def _stage(self, stage: str) -> dict[str, Any]:
        following = [*self.stages, ""][self.stages.index(stage) + 1]
        sent = {u: message for (at, u), message in self.asked.items() if at == following}
        return {
            "stage": stage,
            "participant_to_server": {
                str(u): encode(ANSWERS[stage], self.said[stage, u]).hex() for u in self.there[stage]
            },
            "server_to_participant": {
                str(u): encode(self.request(following), message).hex() for u, message in sent.items()
            },
        }

    def request(self, stage: str) -> str:
        """Type of the message that asks a participant for its answer at a stage."""
        return "SurvivorSet" if stage == "Unmask" and not self.active else REQUESTS[stage]

    # ---- what each party checks of a message, each in the order in which it says so ----

    def share_keys(self, me: int, message: Mapping[str, Any]) -> None:
        """A participant's checks of the directory."""
        listed, own = message["advertisements"], self.said["AdvertiseKeys", me]
        require(len(listed) >= self.threshold, "threshold")
        same = me in listed and all(listed[me][name] == own[name] for name in ("channel_key", "mask_key"))
        require(same, "own keys")
        keys = [ad[name] for ad in listed.values() for name in ("channel_key", "mask_key")]
        require(len(set(keys)) == len(keys), "repeated key")
        for v, ad in listed.items():
            require(v < len(self.identities), "roster")
            self.check(v, ad["signature"], "keys", v.to_bytes(8, "big") + ad["channel_key"] + ad["mask_key"])
        for v, ad in listed.items():
            if v != me:
                agree(self.channel_secrets[me], ad["channel_key"])
                agree(self.mask_secrets[me], ad["mask_key"])

    def mask_input(self, me: int, message: Mapping[str, Any]) -> None:
        """A participant's checks of the boxes for it."""
        boxes = message["boxes"]
        require(boxes.keys() <= set(self.there["AdvertiseKeys"]) - {me}, "subset")
        require(len(boxes) + 1 >= self.threshold, "threshold")
        for v, box in boxes.items():
            try:
                text = box_cipher(self.channel_key(v, me), self.id, v, me).decrypt_and_verify(box[:-16], box[-16:])
            except ValueError:
                raise Refused("tag") from None
            require(text[:8] == v.to_bytes(4, "big") + me.to_bytes(4, "big"), "numbers inside")
            require(all(int.from_bytes(part, "big") < PRIME for part in (text[8:41], text[41:])), "field element")

    def confirm(self, me: int, message: Mapping[str, Any]) -> None:
        """A participant's checks of the survivors."""
        survivors = message["survivors"]
        require(len(set(survivors)) == len(survivors), "named twice")
        require(set(survivors) <= set(self.there["ShareKeys"]), "subset")
        require(me in survivors, "own number")
        require(len(survivors) >= self.threshold, "threshold")

    unmask_semi_honest = confirm

    def unmask(self, me: int, message: Mapping[str, Any]) -> None:
        """A participant's checks of the signatures over the survivors that it was shown."""
        signatures, survivors = message["signatures"], self.there["MaskedInput"]
        require(me in survivors and signatures.keys() <= set(survivors), "subset")
        require(len(signatures) >= self.threshold, "threshold")
        for v, signature in signatures.items():
            self.check(v, signature, "survivors", pack(survivors))

    def receive_keys(self, sender: int, message: Mapping[str, Any]) -> None:
        """The server's checks of a participant's keys."""
        known = [self.said["AdvertiseKeys", u] for u in self.there["AdvertiseKeys"] if u < sender]
        keys = [ad[name] for ad in (*known, message) for name in ("channel_key", "mask_key")]
        require(len(set(keys)) == len(keys), "repeated key")
        for key in keys[-2:]:
            agree(bytes(31) + b"\x40", key)
        self.check(sender, message["signature"], "keys", sender.to_bytes(8, "big") + keys[-2] + keys[-1])

    def receive_shares(self, sender: int, message: Mapping[str, Any]) -> None:
        """The server's checks of a participant's boxes and commitment."""
        require(message["boxes"].keys() == set(self.there["AdvertiseKeys"]) - {sender}, "asked for")
        self.check(sender, message["signature"], "commitment", message["commitment"])

    def receive_vector(self, sender: int, message: Mapping[str, Any]) -> None:
        """The server's checks of a masked vector."""
        require(sender in self.there["ShareKeys"], "asked for")
        self.unpacked(message["packed"])

    def receive_confirmation(self, sender: int, message: Mapping[str, Any]) -> None:
        """The server's check of a signature over the survivors."""
        self.check(sender, message["signature"], "survivors", pack(self.there["MaskedInput"]))

    def receive_unmask(self, sender: int, message: Mapping[str, Any]) -> None:
        """The server's check that it got what it asked for."""
        survivors = set(self.there["MaskedInput"])
        require(sender in survivors and message["of_self_mask_seed"].keys() == survivors, "asked for")
        require(message["of_mask_secret"].keys() == set(self.there["ShareKeys"]) - survivors, "asked for")

    def close_unmask(self, sender: int, message: Mapping[str, Any]) -> None:
        """The server's checks of what it reconstructs; with exactly t answers, so that every share counts."""
        self.receive_unmask(sender, message)
        self.open({u: message if u == sender else self.said["Unmask", u] for u in self.there["Unmask"]})


# ---- files ----

STEPS = {
    "client.share_keys": "ShareKeys",
    "client.mask_input": "MaskedInput",
    "client.confirm": "ConsistencyCheck",
    "client.unmask": "Unmask",
    "client.unmask_semi_honest": "Unmask",
    "server.receive_keys": "AdvertiseKeys",
    "server.receive_shares": "ShareKeys",
    "server.receive_vector": "MaskedInput",
    "server.receive_confirmation": "ConsistencyCheck",
    "server.receive_unmask": "Unmask",
    "server.close_unmask": "Unmask",
}
ERRORS = {
    **dict.fromkeys(("version", "canonical form", "left over", "cut short", "type"), "DecodeError"),
    "threshold": "BelowThreshold",
}


def compare(path: str, here: Any, file: Any) -> None:
    """Raise at the first difference, naming the field."""
    if isinstance(here, dict) and isinstance(file, dict):
        for key in [*file, *(key for key in here if key not in file)]:
            where = f"{path}.{key}" if path else key
            if key not in here or key not in file:
                raise Mismatch(f"{where}: {'not expected' if key in file else 'missing'}")
            compare(where, here[key], file[key])
    elif isinstance(here, list) and isinstance(file, list) and len(here) == len(file):
        for i, (one, other) in enumerate(zip(here, file, strict=True)):
            compare(f"{path}.{i}", one, other)
    elif type(here) is not type(file) or here != file:
        raise Mismatch(f"{path}: the file says {file}, here it is {here}")


def flat(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """All leaves of a message with their paths; a list of numbers is a leaf."""
    if isinstance(value, dict):
        for key, entry in value.items():
            yield from flat(entry, f"{path}.{key}" if path else str(key))
    else:
        yield path, value


def changed_fields(kind: str, original: Mapping[str, Any], data: bytes) -> set[str]:
    """Paths at which a message differs from the original."""
    before, after = dict(flat(original)), dict(flat(decode(kind, data, strict=False)))
    return {path for path in before.keys() | after.keys() if before.get(path) != after.get(path)}


def verify_round(given: Mapping[str, Any]) -> Round:
    """Recompute a round and compare it with its file."""
    for stage in given["stages"]:
        for side in ("participant_to_server", "server_to_participant"):
            for u, message in stage[side].items():
                if message != message.lower():
                    raise Mismatch(f"stages.{stage['stage']}.{side}.{u}: not in lower case")
    computed = Round(given)
    compare("", computed.document, dict(given))
    for (stage, u), message in [*computed.said.items(), *computed.asked.items()]:
        kind = ANSWERS[stage] if message is computed.said.get((stage, u)) else computed.request(stage)
        if decode(kind, encode(kind, message)) != message:
            raise Mismatch(f"stages.{stage}: the message of {u} does not read as it was written")
    return computed


def verify_refusal(given: Mapping[str, Any], base: Round) -> None:
    """Check that a message is the round's but for what the file says, and that it fails the check that is named."""
    function, party, sender = given["function"], given["party"], given["sender"]
    stage, data = STEPS[function], bytes.fromhex(given["message"])
    to_server = function.startswith("server.")
    if to_server != (party == "server") or to_server != isinstance(sender, int):
        raise Mismatch(f"party: {party} and sender: {sender} do not go with {function}")
    who = sender if to_server else party
    kind = ANSWERS[stage] if to_server else base.request(stage)
    compare("message_type", kind, given["message_type"])
    original = base.said[stage, who] if to_server else base.asked[stage, who]
    step: Callable[[int, Mapping[str, Any]], None] = getattr(base, function.partition(".")[2])

    def refusal(message: bytes) -> str | None:
        try:
            step(who, decode(kind, message))
        except Refused as refused:
            return str(refused)
        return None

    if refusal(encode(kind, original)) is not None:
        raise Mismatch("round: its own message is refused")
    compare("check", refusal(data) or "nothing", given["check"])
    compare("error", ERRORS.get(given["check"], "RemoteProtocolError"), given["error"])
    known = to_server and given["error"] == "RemoteProtocolError" and function != "server.close_unmask"
    compare("culprits", [base.names[who]] if known else [], given["culprits"])
    right, only = encode(kind, original), "message: there is more than one change"
    by_bytes = {
        "version": data[:1] != right[:1] and data[1:] == right[1:],
        "left over": len(data) == len(right) + 1 and data[:-1] == right,
        "cut short": data == right[:-1],
    }
    if given["check"] in by_bytes:
        if given["changed"] or not by_bytes[given["check"]]:
            raise Mismatch(only)
    elif given["check"] == "canonical form":
        if given["changed"] or data == right or changed_fields(kind, original, data):
            raise Mismatch(only)
    else:
        found = changed_fields(kind, original, data)
        if encode(kind, decode(kind, data)) != data:
            raise Mismatch(only)
        for path in given["changed"]:
            inside = {one for one in found if one == path or one.startswith(f"{path}.")}
            if not inside:
                raise Mismatch(f"changed: {path} is as it was")
            found -= inside
        if found:
            raise Mismatch(f"message: {', '.join(sorted(found))} changed too")


REFUSAL_FIELDS = {
    *("kind", "description", "round", "function", "message_type", "party", "sender", "changed", "message", "check"),
    *("error", "error_contains", "culprits"),
}


def verify(path: Path) -> str:
    """Check a file; what to say of it.

    Raises:
        Mismatch: The file is wrong; says in which field.
    """
    given = json.loads(path.read_text(encoding="utf-8"))
    try:
        if given["kind"] == "round":
            computed = verify_round(given)
            return f"round of {len(given['participants'])}, sum of {len(computed.there['MaskedInput'])} vectors"
        if given["kind"] != "refusal" or given.keys() != REFUSAL_FIELDS:
            raise Mismatch("kind: neither a round nor a refusal with its fields")
        base = Round(json.loads((path.parent / given["round"]).read_text(encoding="utf-8")))
        verify_refusal(given, base)
    except Refused as refused:
        raise Mismatch(f"the round itself is refused: {refused}") from refused
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise Mismatch(f"cannot be read: {type(error).__name__}: {error}") from error
    return f"refused: {given['check']}"


def main(arguments: Sequence[str]) -> int:
    """Check files, all of them by default."""
    paths = [Path(name) for name in arguments] or sorted((Path(__file__).parent / "masking").glob("*.json"))
    if not paths:
        print("no files")
        return 1
    for path in paths:
        try:
            print(f"{path.name}: {verify(path)}")
        except (OSError, Mismatch) as error:
            print(f"{path.name}: {error}")
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

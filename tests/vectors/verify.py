"""A second implementation of the masked sum, to check the test vectors with.

    python tests/vectors/verify.py [FILES]      default: all of tests/vectors/masking

It shares no code and no dependency but PyCryptodome with the library: SHA-256 and integers are the standard library's,
the rest is PyCryptodome. From a round's inputs and randomness it recomputes every field and every byte said, opens the
sum from the messages as the server does, and compares. Rounds in sequence it plays in their order, with one source of
randomness for each participant: keys are agreed while the later subject does not exist yet. Of a refusal it recomputes
the message, and checks that it is the round's but for the one change, and that the check which the file names fails,
where the round's own message passes.

One line is printed for each file; the first mismatch is named and ends it with exit status 1.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

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


# MessagePack: the part of it that is used, in its shortest form, maps by ascending key.


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


class Count(NamedTuple):
    """A whole number, and where its range ends."""

    least: int
    end: int


class Text(NamedTuple):
    """A string, and how many characters it has at most."""

    longest: int


# A field's shape is `int` for a participant's number, a length of bytes or a range of lengths, one of the two above, a
# map from numbers, a list of numbers, or the fields of a struct.
SIGNATURE = range(65)
TERMS = {"params": 32, "context": 32, "round": Count(0, 1 << 62)}
SUBJECT = {
    "purpose": Text(32),
    "model_digest": 32,
    "previous": 32,
    "dimension": Count(1, (1 << 27) + 1),
    "ring_bits": Count(1, 65),
}
ADVERTISEMENT = {"terms": TERMS, "channel_key": 32, "mask_key": 32, "signature": SIGNATURE}
COMMITMENT = {"digest": 32, "signature": SIGNATURE}
CONFIRMATION = {"subject": SUBJECT, "signature": SIGNATURE}
MESSAGES: dict[str, dict[str, Any]] = {
    "Advertisement": ADVERTISEMENT,
    "KeyDirectory": {"advertisements": {int: ADVERTISEMENT}},
    "EncryptedShares": {"terms": TERMS, "boxes": {int: 90}, "commitment": COMMITMENT},
    "ShareInbox": {"boxes": {int: 90}},
    "MaskedInput": {"terms": TERMS, "subject": SUBJECT, "packed": range((1 << 30) + 1)},
    "SurvivorSet": {"survivors": [int]},
    "Confirmation": CONFIRMATION,
    "ConfirmationSet": {"confirmations": {int: CONFIRMATION}},
    "UnmaskShares": {"terms": TERMS, "of_self_mask_seed": {int: 33}, "of_mask_secret": {int: 33}},
}
ANSWERS = dict(
    zip(STAGES, ("Advertisement", "EncryptedShares", "MaskedInput", "Confirmation", "UnmaskShares"), strict=True)
)
REQUESTS = dict(zip(STAGES[1:], ("KeyDirectory", "ShareInbox", "SurvivorSet", "ConfirmationSet"), strict=True))


def encode(kind: str, message: Mapping[str, Any]) -> bytes:
    """A message's bytes: the version, then its fields as an array."""
    return b"\x01" + pack(bare(message, MESSAGES[kind]))


def bare(value: Any, shape: Any) -> Any:
    """A struct's fields as a list, in order, and so within it."""
    if isinstance(shape, dict) and int in shape:
        return {key: bare(entry, shape[int]) for key, entry in value.items()}
    return [bare(value[name], part) for name, part in shape.items()] if isinstance(shape, dict) else value


def decode(kind: str, data: bytes) -> dict[str, Any]:
    """A message from its bytes; refused unless it is the one form."""
    require(data[:1] == b"\x01", "version")
    value = unpack(data[1:])
    require(pack(value) == data[1:], "canonical form")
    message: dict[str, Any] = named(value, MESSAGES[kind])
    fit(message, MESSAGES[kind])
    return message


def named(value: Any, shape: Any) -> Any:
    """A list as a struct's fields, and so within it; refused for another number of fields."""
    if isinstance(shape, dict):
        if int in shape:
            require(isinstance(value, dict), "type")
            return {key: named(entry, shape[int]) for key, entry in value.items()}
        require(isinstance(value, list) and len(value) == len(shape), "type")
        return {name: named(part, shape[name]) for name, part in zip(shape, value, strict=True)}
    return value


def fit(value: Any, shape: Any) -> None:
    """Refuse a type, length or range that is not the field's."""
    if isinstance(shape, dict):
        for key, entry in value.items():
            if int in shape:
                fit(key, int)
            fit(entry, shape[int if int in shape else key])
    elif shape is int:
        fit(value, Count(0, 1 << 16))
    elif isinstance(shape, Count):
        require(isinstance(value, int) and shape.least <= value < shape.end, "type")
    elif isinstance(shape, Text):
        require(isinstance(value, str) and len(value) <= shape.longest, "type")
    elif isinstance(shape, list):
        require(isinstance(value, list), "type")
        for item in value:
            fit(item, shape[0])
    else:
        require(isinstance(value, bytes) and len(value) in (shape if isinstance(shape, range) else [shape]), "type")


def domain(label: str, bound_to: bytes, *numbers: int) -> bytes:
    """Prefix of all that is hashed, signed or derived: length, "secagg-1/" and label, an id, 8 bytes for a number."""
    tag = b"secagg-1/" + label.encode()
    return bytes([len(tag)]) + tag + bound_to + b"".join(number.to_bytes(8, "big") for number in numbers)


def derive(secret: bytes, label: str, bound_to: bytes, *numbers: int) -> bytes:
    """HKDF-SHA256 to 16 bytes: the id of a session or sum is the salt, `domain` the info."""
    return HKDF(secret, 16, bound_to, SHA256, context=domain(label, bound_to, *numbers))


def digest(label: str, bound_to: bytes, data: bytes, *numbers: int) -> bytes:
    """SHA-256 over `domain` and data."""
    return hashlib.sha256(domain(label, bound_to, *numbers) + data).digest()


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


def words(key: bytes, bits: int, count: int) -> list[int]:
    """A mask: little-endian words of 32 bits for a ring of up to 32, else of 64."""
    size = 4 if bits <= 32 else 8
    stream = keystream(key, size * count)
    return [int.from_bytes(stream[i : i + size], "little") for i in range(0, len(stream), size)]


def packed(values: Sequence[int], bits: int) -> bytes:
    """Values of b bits one after another from the lowest bit on."""
    whole = sum(value << bits * i for i, value in enumerate(values))
    return whole.to_bytes(-(-bits * len(values) // 8), "little")


def unpacked(data: bytes, bits: int, count: int) -> list[int]:
    """The values; refused for another length or a padding bit that is set."""
    require(len(data) == -(-bits * count // 8), "length")
    whole = int.from_bytes(data, "little")
    require(whole >> bits * count == 0, "padding")
    return [whole >> bits * i & (1 << bits) - 1 for i in range(count)]


def unhex(shape: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a struct from a file, bytes from hexadecimal."""
    return {name: bytes.fromhex(given[name]) if part == 32 else given[name] for name, part in shape.items()}


def session_id(terms: Mapping[str, Any]) -> bytes:
    """What keys are agreed for: the hash over the terms."""
    return digest("session", b"", pack(bare(terms, TERMS)))


def sum_id(session: bytes, subject: Mapping[str, Any]) -> bytes:
    """What survivors are signed for: the hash over session and subject."""
    return digest("subject of a sum", session, pack(bare(subject, SUBJECT)))


def mask_id(sum_: bytes, shared: Sequence[int]) -> bytes:
    """What masks are made for: the hash over the sum's id and U2."""
    return digest("masks of a sum", sum_, pack(sorted(shared)))


class Round:
    """A round from its inputs and randomness; it knows what is summed only once it is begun.

    Attributes:
        said: (stage, sender) to the participant's message, as fields.
        asked: (stage, receiver) to the server's message that the participant answers to.
    """

    def __init__(self, given: Mapping[str, Any]):
        fields, parts = given["session"], given["participants"]
        self.given = given
        self.active, self.threshold = fields["mode"] == "active", fields["threshold"]
        self.identity_secrets = [bytes.fromhex(member["identity_secret"]) for member in fields["roster"]]
        self.identities = [
            bytes(ECC.construct(curve="Ed25519", seed=secret).public_key().export_key(format="raw"))
            for secret in self.identity_secrets
        ]
        self.names = names = [member["name"] for member in fields["roster"]]
        n = len(names)
        if n < 3 or names != sorted(set(names)) or [part["number"] for part in parts] != list(range(n)):
            raise Mismatch("session.roster: expected three names or more in order, and a participant for each")
        if fields["mode"] not in ("active", "semi-honest"):
            raise Mismatch(f"session.mode: expected active or semi-honest, the file says {fields['mode']}")
        least = 2 * n // 3 + 1 if self.active else n // 2 + 1
        if not least <= self.threshold <= n:
            raise Mismatch(f"session.threshold: expected {least} to {n}, the file says {self.threshold}")
        self.params = self.params_of(self.threshold)
        self.terms = {
            "params": digest("parameters", b"", self.params),
            "context": bytes.fromhex(fields["context"]),
            "round": fields["round"],
        }
        fit(self.terms, TERMS)
        self.id = session_id(self.terms)
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
        self.total: list[int] = []

    def params_of(self, threshold: int) -> bytes:
        """The encoding of the parameters with a threshold."""
        members = [[name, key] for name, key in zip(self.names, self.identities, strict=True)]
        return pack([[members], threshold, "active" if self.active else "semi-honest", SUITE])

    def begin(self, subject: Mapping[str, Any], vectors: Sequence[Sequence[int]]) -> None:
        """Say what is summed."""
        fit(subject, SUBJECT)
        self.subject, self.vectors = dict(subject), [list(vector) for vector in vectors]
        self.bits, self.dimension = subject["ring_bits"], subject["dimension"]
        self.sum_id = sum_id(self.id, subject)
        self.mask_id = mask_id(self.sum_id, self.there["ShareKeys"])

    def play(self, stage: str) -> None:
        """All that is said at a stage."""
        if stage == "MaskedInput":
            given = self.given
            self.begin(unhex(SUBJECT, given["subject"]), [part["vector"] for part in given["participants"]])
        plays = (self._keys, self._shares, self._vectors, self._confirmations, self._unmask)
        dict(zip(STAGES, plays, strict=True))[stage]()

    def document(self) -> dict[str, Any]:
        """What the file must say, all of it."""
        fields, n = self.given["session"], len(self.names)
        return {
            "kind": "round",
            "description": self.given["description"],
            "session": {
                **{name: fields[name] for name in ("threshold", "mode")},
                "roster": [
                    {"name": name, "identity_secret": secret.hex(), "identity": key.hex()}
                    for name, secret, key in zip(self.names, self.identity_secrets, self.identities, strict=True)
                ],
                "suite": SUITE,
                "params_encoding": self.params.hex(),
                "params_digest": self.terms["params"].hex(),
                "context": self.terms["context"].hex(),
                "round": self.terms["round"],
                "encoding": pack(bare(self.terms, TERMS)).hex(),
                "id": self.id.hex(),
            },
            "subject": {
                **{name: value.hex() if isinstance(value, bytes) else value for name, value in self.subject.items()},
                "encoding": pack(bare(self.subject, SUBJECT)).hex(),
                "sum_id": self.sum_id.hex(),
            },
            "mask_id": self.mask_id.hex(),
            "participants": [self._participant(u) for u in range(n)],
            "pairs": [self._pair(u, v) for u in range(n) for v in range(u + 1, n)],
            "stages": [self._stage(stage) for stage in self.stages],
            "sum": self.total,
        }

    def signature(self, u: int, purpose: str, bound_to: bytes, payload: bytes) -> bytes:
        """A participant's signature; empty in semi-honest mode."""
        data = domain(f"signature: {purpose}", bound_to) + payload
        return sign(self.identity_secrets[u], data) if self.active else b""

    def check(self, u: int, signature: bytes, purpose: str, bound_to: bytes, payload: bytes) -> None:
        """Refuse a signature that is not u's, and any in semi-honest mode."""
        if self.active:
            check_signature(self.identities[u], signature, domain(f"signature: {purpose}", bound_to) + payload)
        require(self.active or not signature, "signature")

    def channel_key(self, sender: int, receiver: int) -> bytes:
        """Key of the box from sender to receiver."""
        shared = agree(self.channel_secrets[sender], exchange_public(self.channel_secrets[receiver]))
        return derive(shared, "channel", self.id, sender, receiver)

    def pairwise_secret(self, u: int, v: int) -> bytes:
        """What u and v share before they know what is summed."""
        shared = agree(self.mask_secrets[u], exchange_public(self.mask_secrets[v]))
        return derive(shared, "pairwise secret", self.id, min(u, v), max(u, v))

    def pairwise_key(self, u: int, v: int, bound_to: bytes) -> bytes:
        """Key of the mask that u and v share in one sum."""
        return derive(self.pairwise_secret(u, v), "mask: pairwise", bound_to, min(u, v), max(u, v))

    def commitment(self, u: int, seed: bytes) -> bytes:
        """The hash of b_u that u signs."""
        return digest("commitment: own mask seed", self.id, seed, u)

    def masked(self, u: int, subject: Mapping[str, Any]) -> bytes:
        """The packed vector of u, masked for a subject."""
        bits, bound_to = subject["ring_bits"], mask_id(sum_id(self.id, subject), self.there["ShareKeys"])
        masked = list(self.vectors[u])
        masks = [(1, derive(self.seeds[u], "mask: own", bound_to, u))]
        masks += [(1 if u > v else -1, self.pairwise_key(u, v, bound_to)) for v in self.there["ShareKeys"] if v != u]
        for sign_, key in masks:
            mask = words(key, bits, len(masked))
            masked = [(x + sign_ * m) % (1 << bits) for x, m in zip(masked, mask, strict=True)]
        return packed(masked, bits)

    def _keys(self) -> None:
        members = self.there["AdvertiseKeys"]
        self.channel_secrets = {u: self.entropy[u][0] for u in members}
        self.mask_secrets = {u: self.entropy[u][1] for u in members}
        for u in members:
            keys = exchange_public(self.channel_secrets[u]), exchange_public(self.mask_secrets[u])
            signature = self.signature(u, "keys", self.id, u.to_bytes(8, "big") + keys[0] + keys[1])
            ad = {"terms": self.terms, "channel_key": keys[0], "mask_key": keys[1], "signature": signature}
            self.said["AdvertiseKeys", u] = ad
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
            signature = self.signature(u, "commitment", self.id, committed)
            commitment = {"digest": committed, "signature": signature}
            self.said["ShareKeys", u] = {"terms": self.terms, "boxes": boxes, "commitment": commitment}
        for u in members:
            boxes = {v: self.said["ShareKeys", v]["boxes"][u] for v in members if v != u}
            self.asked["MaskedInput", u] = {"boxes": boxes}

    def _vectors(self) -> None:
        survivors = self.there["MaskedInput"]
        if any(len(vector) != self.dimension for vector in self.vectors):
            raise Mismatch(f"participants: expected vectors of {self.dimension} entries")
        for u in survivors:
            masked = self.masked(u, self.subject)
            self.said["MaskedInput", u] = {"terms": self.terms, "subject": self.subject, "packed": masked}
        following = "ConsistencyCheck" if self.active else "Unmask"
        self.asked |= {(following, u): {"survivors": survivors} for u in survivors}

    def _confirmations(self) -> None:
        payload, members = pack(self.there["MaskedInput"]), self.there["ConsistencyCheck"]
        for u in members:
            signature = self.signature(u, "survivors", self.sum_id, payload)
            self.said["ConsistencyCheck", u] = {"subject": self.subject, "signature": signature}
        confirmed = {"confirmations": {u: self.said["ConsistencyCheck", u] for u in members}}
        self.asked |= {("Unmask", u): confirmed for u in members}

    def _unmask(self) -> None:
        survivors = self.there["MaskedInput"]
        dropped = [v for v in self.there["ShareKeys"] if v not in survivors]
        for u in self.there["Unmask"]:
            self.said["Unmask", u] = {
                "terms": self.terms,
                "of_self_mask_seed": {v: self.of_seed[v][u] for v in survivors},
                "of_mask_secret": {v: self.of_secret[v][u] for v in dropped},
            }
        self.total = self.open({u: self.said["Unmask", u] for u in self.there["Unmask"]})
        plain = [sum(self.vectors[u][i] for u in survivors) for i in range(self.dimension)]
        if self.total != [value % (1 << self.bits) for value in plain]:
            raise Mismatch("sum: what the messages open to is not the sum of the vectors")

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
            add(unpacked(self.said["MaskedInput", u]["packed"], self.bits, self.dimension), 1)
            seed = secret("of_self_mask_seed", u, "commitment")
            require(self.commitment(u, seed) == self.said["ShareKeys", u]["commitment"]["digest"], "commitment")
            add(words(derive(seed, "mask: own", self.mask_id, u), self.bits, self.dimension), -1)
        for v in dropped:
            own = secret("of_mask_secret", v, "public key")
            require(exchange_public(own) == self.said["AdvertiseKeys", v]["mask_key"], "public key")
            for u in survivors:
                shared = agree(own, self.said["AdvertiseKeys", u]["mask_key"])
                pair = derive(shared, "pairwise secret", self.id, min(u, v), max(u, v))
                key = derive(pair, "mask: pairwise", self.mask_id, min(u, v), max(u, v))
                add(words(key, self.bits, self.dimension), -1 if u > v else 1)
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
            key, committed = (
                derive(self.seeds[u], "mask: own", self.mask_id, u),
                self.said["ShareKeys", u]["commitment"],
            )
            signatures["commitment"] = committed["signature"].hex()
            part |= {
                "self_mask_seed": self.seeds[u].hex(),
                "commitment": committed["digest"].hex(),
                "self_mask_key": key.hex(),
                "self_mask_keystream": keystream(key, 16).hex(),
                "shares_of_mask_secret": {str(v): value.hex() for v, value in self.of_secret[u].items()},
                "shares_of_self_mask_seed": {str(v): value.hex() for v, value in self.of_seed[u].items()},
            }
        if ("ConsistencyCheck", u) in self.said:
            signatures["survivors"] = self.said["ConsistencyCheck", u]["signature"].hex()
        return {**part, "signatures": signatures} if self.active else part

    def _pair(self, u: int, v: int) -> dict[str, Any]:
        key = self.pairwise_key(u, v, self.mask_id)
        return {
            "low": u,
            "high": v,
            "channel_agreement": agree(self.channel_secrets[v], exchange_public(self.channel_secrets[u])).hex(),
            "channel_key_low_to_high": self.channel_key(u, v).hex(),
            "channel_key_high_to_low": self.channel_key(v, u).hex(),
            "mask_agreement": agree(self.mask_secrets[v], exchange_public(self.mask_secrets[u])).hex(),
            "pairwise_secret": self.pairwise_secret(u, v).hex(),
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

    def sum_digest(self) -> bytes:
        """SHA-256 of the packed sum."""
        return hashlib.sha256(packed(self.total, self.bits)).digest()

    def record(self) -> bytes:
        """What is left of the round for others to check."""

        def of(stage: str, shape: Mapping[str, Any], field: str = "") -> dict[int, Any]:
            said = {u: self.said[stage, u] for u in self.there[stage]}
            return {u: bare(message[field] if field else message, shape) for u, message in said.items()}

        fields = [
            *("Record", self.threshold, self.given["session"]["mode"], SUITE, self.terms["context"]),
            *(self.terms["round"], bare(self.subject, SUBJECT)),
            *(of("AdvertiseKeys", ADVERTISEMENT), of("ShareKeys", COMMITMENT, "commitment")),
            *(self.there["MaskedInput"], of("ConsistencyCheck", CONFIRMATION), self.sum_digest()),
        ]
        return b"\x01" + pack(fields)

    def request(self, stage: str) -> str:
        """Type of the message that asks a participant for its answer at a stage."""
        return "SurvivorSet" if stage == "Unmask" and not self.active else REQUESTS[stage]

    # What each party checks of a message, each in the order in which it says so.

    def check_keys(self, u: int, ad: Mapping[str, Any]) -> None:
        """Refuse keys that u did not sign for the terms beside them."""
        payload = u.to_bytes(8, "big") + ad["channel_key"] + ad["mask_key"]
        self.check(u, ad["signature"], "keys", session_id(ad["terms"]), payload)

    def check_confirmation(self, u: int, message: Mapping[str, Any]) -> None:
        """Refuse a confirmation that u did not sign for the survivors and the subject beside it."""
        bound_to, payload = sum_id(self.id, message["subject"]), pack(self.there["MaskedInput"])
        self.check(u, message["signature"], "survivors", bound_to, payload)

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
            self.check_keys(v, ad)
            require(ad["terms"] == self.terms, "terms")
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
        require(survivors == sorted(survivors), "order")
        require(set(survivors) <= set(self.there["ShareKeys"]), "subset")
        require(me in survivors, "own number")
        require(len(survivors) >= self.threshold, "threshold")

    unmask_semi_honest = confirm

    def unmask(self, me: int, message: Mapping[str, Any]) -> None:
        """A participant's checks of the signatures over the survivors that it was shown."""
        confirmations, survivors = message["confirmations"], self.there["MaskedInput"]
        require(me in survivors and confirmations.keys() <= set(survivors), "subset")
        require(len(confirmations) >= self.threshold, "threshold")
        for v, confirmation in confirmations.items():
            self.check_confirmation(v, confirmation)
            require(confirmation["subject"] == self.subject, "subject")

    def receive_keys(self, sender: int, message: Mapping[str, Any]) -> None:
        """The server's checks of a participant's keys."""
        known = [self.said["AdvertiseKeys", u] for u in self.there["AdvertiseKeys"] if u < sender]
        keys = [ad[name] for ad in (*known, message) for name in ("channel_key", "mask_key")]
        require(len(set(keys)) == len(keys), "repeated key")
        for key in keys[-2:]:
            agree(bytes(31) + b"\x40", key)
        require(message["terms"] == self.terms, "terms")
        self.check_keys(sender, message)

    def receive_shares(self, sender: int, message: Mapping[str, Any]) -> None:
        """The server's checks of a participant's boxes and commitment."""
        require(message["terms"] == self.terms, "terms")
        require(message["boxes"].keys() == set(self.there["AdvertiseKeys"]) - {sender}, "asked for")
        commitment = message["commitment"]
        self.check(sender, commitment["signature"], "commitment", self.id, commitment["digest"])

    def receive_vector(self, sender: int, message: Mapping[str, Any]) -> None:
        """The server's checks of a masked vector."""
        require(sender in self.there["ShareKeys"], "asked for")
        require(message["terms"] == self.terms, "terms")
        require(message["subject"] == self.subject, "subject")
        unpacked(message["packed"], self.bits, self.dimension)

    def receive_confirmation(self, sender: int, message: Mapping[str, Any]) -> None:
        """The server's check of a signature over the survivors."""
        require(message["subject"] == self.subject, "subject")
        self.check_confirmation(sender, message)

    def receive_unmask(self, sender: int, message: Mapping[str, Any]) -> None:
        """The server's check that it got what it asked for."""
        survivors = set(self.there["MaskedInput"])
        require(sender in survivors, "asked for")
        require(message["terms"] == self.terms, "terms")
        require(message["of_self_mask_seed"].keys() == survivors, "asked for")
        require(message["of_mask_secret"].keys() == set(self.there["ShareKeys"]) - survivors, "asked for")

    def close_unmask(self, sender: int, message: Mapping[str, Any]) -> None:
        """The server's checks of what it reconstructs; with exactly t answers, so that every share counts."""
        self.receive_unmask(sender, message)
        self.open({u: message if u == sender else self.said["Unmask", u] for u in self.there["Unmask"]})


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
    before, after = dict(flat(original)), dict(flat(named(unpack(data[1:]), MESSAGES[kind])))
    return {path for path in before.keys() | after.keys() if before.get(path) != after.get(path)}


def played(given: Mapping[str, Any]) -> Round:
    """A round, played to the end."""
    computed = Round(given)
    for stage in computed.stages:
        computed.play(stage)
    return computed


def verify_round(given: Mapping[str, Any]) -> Round:
    """Recompute a round and compare it with its file."""
    for stage in given["stages"]:
        for side in ("participant_to_server", "server_to_participant"):
            for u, message in stage[side].items():
                if message != message.lower():
                    raise Mismatch(f"stages.{stage['stage']}.{side}.{u}: not in lower case")
    computed = played(given)
    compare("", computed.document(), dict(given))
    for (stage, u), message in [*computed.said.items(), *computed.asked.items()]:
        kind = ANSWERS[stage] if message is computed.said.get((stage, u)) else computed.request(stage)
        if decode(kind, encode(kind, message)) != message:
            raise Mismatch(f"stages.{stage}: the message of {u} does not read as it was written")
    return computed


def wrong_message(name: str, kind: str, base: Round, right: Mapping[str, Any], ahead: Callable[[int], Round]) -> bytes:
    """The message that the refusal of a name is about, from the round and its own message."""
    data = encode(kind, right)
    match name:
        case "bad_trailing_byte":
            return data + b"\x00"
        case "bad_cut_short":
            return data[:-1]
        case "bad_version_byte":
            return b"\x02" + data[1:]
        case "bad_wide_number":
            return data[:-1] + b"\xcc" + data[-1:]
        case "bad_map_order":
            entries = [pack(u) + pack(bare(ad, ADVERTISEMENT)) for u, ad in right["advertisements"].items()]
            return data[:3] + b"".join(reversed(entries))
    return encode(kind, changed_at(right, wrong_fields(name, base, right, ahead)))


def changed_at(message: Any, changes: Mapping[str, Any]) -> Any:
    """A message with other values at some paths."""
    if "" in changes:
        return changes[""]
    if not isinstance(message, dict):
        return message
    inner: dict[str, dict[str, Any]] = {}
    for path, value in changes.items():
        head, _, rest = path.partition(".")
        inner.setdefault(head, {})[rest] = value
    keys = {str(key): key for key in message} | {head: int(head) for head in inner if head.isdigit()}
    return {key: changed_at(message.get(key), inner.get(head, {})) for head, key in keys.items()}


def wrong_fields(name: str, base: Round, right: Mapping[str, Any], ahead: Callable[[int], Round]) -> dict[str, Any]:
    """What is wrong in the refusal of a name: path to value."""
    subject, terms, said = base.subject, base.terms, base.said
    model = {**subject, "model_digest": bytes([subject["model_digest"][0] ^ 1]) + subject["model_digest"][1:]}

    def flipped(data: bytes) -> bytes:
        return data[:-1] + bytes([data[-1] ^ 1])

    def signed_keys(channel: bytes, mask: bytes, bound_to: bytes) -> bytes:
        data = domain("signature: keys", bound_to) + bytes(8) + channel + mask
        return sign(base.identity_secrets[0], data)

    def signed_for(**changes: Any) -> dict[str, Any]:
        """Terms of participant 0 that are not ours, and its signature for them."""
        keys, other = said["AdvertiseKeys", 0], {**terms, **changes}
        signature = signed_keys(keys["channel_key"], keys["mask_key"], session_id(other))
        return {"terms": other, "signature": signature}

    def sealed(receiver: int, first: bytes, second: bytes) -> bytes:
        text = bytes(4) + receiver.to_bytes(4, "big") + first + second
        box, tag = box_cipher(base.channel_key(0, 1), base.id, 0, 1).encrypt_and_digest(text)
        return bytes(box + tag)

    def masked(other: Mapping[str, Any]) -> dict[str, Any]:
        return {"subject": other, "packed": base.masked(0, other)}

    def confirmed(u: int, other: Mapping[str, Any]) -> dict[str, Any]:
        payload = pack(base.there["MaskedInput"])
        return {"subject": other, "signature": base.signature(u, "survivors", sum_id(base.id, other), payload)}

    def listed(entry: Mapping[str, Any]) -> dict[str, Any]:
        return {f"advertisements.0.{field}": value for field, value in entry.items()}

    next_round = session_id({**terms, "round": terms["round"] + 1})
    match name:
        case "bad_signature_of_another_session":
            own = right["advertisements"][0]
            return listed({"signature": signed_keys(own["channel_key"], own["mask_key"], next_round)})
        case "bad_signature_of_another_session_to_server":
            return {"signature": signed_keys(right["channel_key"], right["mask_key"], next_round)}
        case "bad_directory_swapped_keys":
            own = right["advertisements"][0]
            return listed({"channel_key": own["mask_key"], "mask_key": own["channel_key"]})
        case "bad_directory_repeated_key":
            return {"advertisements.2": right["advertisements"][0]}
        case "bad_directory_own_keys_changed":
            return {"advertisements.1.mask_key": right["advertisements"][1]["channel_key"]}
        case "bad_low_order_key":
            return {"mask_key": bytes(32), "signature": signed_keys(right["channel_key"], bytes(32), base.id)}
        case "bad_signature_in_semi_honest_mode":
            return {"signature": signed_keys(right["channel_key"], right["mask_key"], base.id)}
        case "bad_other_configuration":
            return signed_for(context=flipped(terms["context"]))
        case "bad_other_configuration_listed":
            return listed(signed_for(context=flipped(terms["context"])))
        case "bad_other_threshold":
            return signed_for(params=digest("parameters", b"", base.params_of(base.threshold + 1)))
        case "bad_other_round":
            return signed_for(round=terms["round"] + 1)
        case "bad_keys_of_the_next_round":
            return listed(ahead(1).said["AdvertiseKeys", 0])
        case "bad_box_of_the_next_round":
            return {"boxes.0": ahead(1).said["ShareKeys", 0]["boxes"][1]}
        case "bad_boxes_of_the_round_before":
            return ahead(0).said["ShareKeys", 0]
        case "bad_vector_of_the_round_before":
            return {"terms": ahead(0).terms, "packed": ahead(0).masked(0, subject)}
        case "bad_unmask_of_the_round_before":
            before = ahead(0)
            return {
                "terms": before.terms,
                "of_self_mask_seed": {v: before.of_seed[v][0] for v in right["of_self_mask_seed"]},
                "of_mask_secret": {v: before.of_secret[v][0] for v in right["of_mask_secret"]},
            }
        case "bad_reflected_box":
            return {"boxes.0": said["ShareKeys", 1]["boxes"][0]}
        case "bad_moved_box":
            return {"boxes.0": said["ShareKeys", 0]["boxes"][2]}
        case "bad_moved_share":
            return {"boxes.0": sealed(2, base.of_secret[0][2], base.of_seed[0][2])}
        case "bad_share_no_field_element":
            return {"boxes.0": sealed(1, base.of_secret[0][1], PRIME.to_bytes(33, "big"))}
        case "bad_commitment_changed":
            return {"commitment.digest": flipped(right["commitment"]["digest"])}
        case "bad_other_model":
            return masked(model)
        case "bad_other_subject":
            return masked({**subject, "purpose": "standardize", "previous": bytes(32)})
        case "bad_other_ring":
            return masked({**subject, "ring_bits": subject["ring_bits"] + 1})
        case "bad_subject_of_no_ring":
            return {"subject.ring_bits": 65}
        case "bad_padding_bits":
            return {"packed": right["packed"][:-1] + bytes([right["packed"][-1] | 0x80])}
        case "bad_vector_length":
            return {"packed": right["packed"][:-1]}
        case "bad_survivors_not_a_subset":
            return {"survivors": [0, 1, 2, 3, 4]}
        case "bad_survivors_without_receiver":
            return {"survivors": [1, 2]}
        case "bad_survivors_below_threshold":
            return {"survivors": [0, 1]}
        case "bad_survivors_out_of_order":
            return {"survivors": [1, 0, 3]}
        case "bad_other_model_confirmed":
            return confirmed(0, model)
        case "bad_confirmation_of_another_set":
            return {"confirmations.3.signature": base.signature(3, "survivors", base.sum_id, pack([0, 1, 2, 3]))}
        case "bad_confirmation_of_another_subject":
            return {"confirmations.3": confirmed(3, model)}
        case "bad_confirmation_with_another_subject":
            return {"confirmations.3.subject": model}
        case "bad_share_of_self_mask_seed":
            return {"of_self_mask_seed.1": flipped(right["of_self_mask_seed"][1])}
        case "bad_share_of_mask_secret":
            return {"of_mask_secret.2": flipped(right["of_mask_secret"][2])}
        case "bad_unmask_both_kinds":
            return {"of_mask_secret.1": right["of_self_mask_seed"][1]}
    raise Mismatch("no refusal of this name is known here")


def verify_sequence(given: Mapping[str, Any], documents: Sequence[Mapping[str, Any]]) -> list[Round]:
    """Play rounds in the order of a file, each participant with one source of randomness, and compare them with theirs.

    A round's subject is looked at when its first vector is sent; its model is the packed sum of the one before. All of
    them leave a transcript, which those sign who answered last.
    """
    if given.keys() != SEQUENCE_FIELDS or len(documents) != 2:
        raise Mismatch("kind: no two rounds in sequence with their fields")
    rounds = [Round({**document, "subject": None}) for document in documents]
    halves = [[computed.stages[:2] for computed in rounds], [computed.stages[2:] for computed in rounds]]
    compare("order", [[of, stage] for half in halves for of in (0, 1) for stage in half[of]], given["order"])
    entries: list[bytes] = []
    head, model = bytes(32), b""
    drawn: list[list[str]] = [[] for _ in given["entropy"]]
    for of, stage in given["order"]:
        computed, document = rounds[of], documents[of]
        if stage == "MaskedInput":
            computed.given = document
        computed.play(stage)
        if stage == "MaskedInput":
            compare(f"rounds.{of}.subject.previous", head.hex(), document["subject"]["previous"])
            if of:
                compare(f"rounds.{of}.subject.model_digest", model.hex(), document["subject"]["model_digest"])
        if stage == "Unmask":
            entries.append(computed.record())
            head, model = digest("record of a sum", b"", entries[-1]), computed.sum_digest()
        if stage in STAGES[:2]:
            for u, calls in enumerate(computed.entropy):
                drawn[u] += [call.hex() for call in (calls[:2] if stage == "AdvertiseKeys" else calls[2:])]
    compare("entropy", drawn, given["entropy"])
    last, context = rounds[-1], rounds[-1].terms["context"]
    signed = {u: last.signature(u, "transcript", context, head) for u in last.there["Unmask"]}
    entries.append(b"\x01" + pack(["Closing", context, head, signed]))
    written = b"".join(len(entry).to_bytes(4, "big") + entry for entry in entries)
    compare("transcript", written.hex(), given["transcript"])
    for of, (computed, document) in enumerate(zip(rounds, documents, strict=True)):
        compare(f"rounds.{of}", computed.document(), dict(document))
        compare(f"rounds.{of}.round", {**rounds[0].terms, "round": rounds[0].terms["round"] + of}, computed.terms)
    return rounds


def verify_refusal(name: str, given: Mapping[str, Any], base: Round, ahead: Callable[[int], Round]) -> None:
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
    compare("message", wrong_message(name, kind, base, original, ahead).hex(), given["message"])
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
        if b"\x01" + pack(unpack(data[1:])) != data:
            raise Mismatch(only)
        for path in given["changed"]:
            inside = {one for one in found if one == path or one.startswith(f"{path}.")}
            if not inside:
                raise Mismatch(f"changed: {path} is as it was")
            found -= inside
        if found:
            raise Mismatch(f"message: {', '.join(sorted(found))} changed too")


SEQUENCE = "keys_agreed_ahead"
SEQUENCE_FIELDS = {"kind", "description", "rounds", "order", "entropy", "transcript"}
REFUSAL_FIELDS = {
    *("kind", "description", "round", "function", "message_type", "party", "sender", "changed", "message", "check"),
    *("error", "error_contains", "culprits"),
}


def load(path: Path) -> dict[str, Any]:
    """What a file says."""
    document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return document


def verify(path: Path) -> str:
    """Check a file; what to say of it.

    Raises:
        Mismatch: The file is wrong; says in which field.
    """
    given = load(path)
    try:
        if given["kind"] == "round":
            computed = verify_round(given)
            return f"round of {len(given['participants'])}, sum of {len(computed.there['MaskedInput'])} vectors"
        if given["kind"] == "sequence":
            rounds = verify_sequence(given, [load(path.parent / name) for name in given["rounds"]])
            return f"{len(rounds)} rounds, keys agreed ahead"
        if given["kind"] != "refusal" or given.keys() != REFUSAL_FIELDS:
            raise Mismatch("kind: neither a round, nor rounds in sequence, nor a refusal with its fields")
        base = played(load(path.parent / given["round"]))
        verify_refusal(path.stem, given, base, lambda of: played(load(path.parent / f"{SEQUENCE}_{of}.json")))
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

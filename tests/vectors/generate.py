"""Write the test vectors of the masked sum from `secagg` itself.

    python tests/vectors/generate.py            write tests/vectors/masking/*.json
    python tests/vectors/generate.py --check    exit 1 if the files are not what would be written

Everything is deterministic. That the vectors are right, and not merely what the library does, is what `verify.py` says.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np

from secagg import Entropy, Identity, Params, Roster, SecAggError, Session, Stream, deterministic_entropy, wire
from secagg.keys import AgreementKey
from secagg.masking import client, messages, server
from secagg.prg import Label
from secagg.sealed import channel_key, seal
from secagg.shamir import PRIME, SHARE_BYTES, split

FOLDER = Path(__file__).parent / "masking"
STAGES = ("AdvertiseKeys", "ShareKeys", "MaskedInput", "ConsistencyCheck", "Unmask")
KEYSTREAM_BYTES = 16

RECEIVE: dict[str, Any] = {
    "AdvertiseKeys": server.receive_keys,
    "ShareKeys": server.receive_shares,
    "MaskedInput": server.receive_vector,
    "ConsistencyCheck": server.receive_confirmation,
    "Unmask": server.receive_unmask,
}
CLOSE: dict[str, Any] = {
    "AdvertiseKeys": server.close_keys,
    "ShareKeys": server.close_shares,
    "MaskedInput": server.close_vectors,
    "ConsistencyCheck": server.close_confirmations,
    "Unmask": lambda state: (server.close_unmask(state), {}),
}
# Step that a message is for: stage at which it is taken, and its type.
FUNCTIONS: dict[str, tuple[str, Any]] = {
    "client.share_keys": ("ShareKeys", messages.KeyDirectory),
    "client.mask_input": ("MaskedInput", messages.ShareInbox),
    "client.confirm": ("ConsistencyCheck", messages.SurvivorSet),
    "client.unmask": ("Unmask", messages.ConfirmationSet),
    "client.unmask_semi_honest": ("Unmask", messages.SurvivorSet),
    "server.receive_keys": ("AdvertiseKeys", messages.Advertisement),
    "server.receive_shares": ("ShareKeys", messages.EncryptedShares),
    "server.receive_vector": ("MaskedInput", messages.MaskedInput),
    "server.receive_confirmation": ("ConsistencyCheck", messages.Confirmation),
    "server.receive_unmask": ("Unmask", messages.UnmaskShares),
    "server.close_unmask": ("Unmask", messages.UnmaskShares),
}


class Case(NamedTuple):
    """One whole round; participant u is silent from the stage `drops[u]` on."""

    name: str
    description: str
    n: int
    threshold: int
    bits: int
    dimension: int
    mode: str = "active"
    drops: Mapping[int, str] = {}


CASES = [
    Case("active_n3", "Three participants, nobody drops out.", 3, 3, 16, 4),
    Case(
        "active_n4_drop_at_masked_input",
        "Participant 2 shares its keys and then sends no vector: its masks are taken off with the shares of s_2.",
        n=4,
        threshold=3,
        bits=24,
        dimension=4,
        drops={2: "MaskedInput"},
    ),
    Case(
        "active_n4_drop_at_consistency_check",
        "Participant 0 is silent after its vector: the vector is in the sum, its signature and shares are missing.",
        n=4,
        threshold=3,
        bits=32,
        dimension=3,
        drops={0: "ConsistencyCheck"},
    ),
    Case(
        "active_n5_t4_drop_before_share_keys",
        "Participant 1 advertises keys and shares nothing: it is in U1 and not in U2, and nobody masks with it.",
        n=5,
        threshold=4,
        bits=32,
        dimension=2,
        drops={1: "ShareKeys"},
    ),
    Case(
        "semi_honest_n4_one_drop",
        "No signatures and no consistency check. Participant 3 sends no vector.",
        n=4,
        threshold=3,
        bits=20,
        dimension=8,
        mode="semi-honest",
        drops={3: "MaskedInput"},
    ),
    Case("ring_36_bits", "A ring of more than 32 bits: keystream is read as words of 64 bits.", 3, 3, 36, 5),
    Case("partial_group", "7 values of 20 bits, where 8 fill whole words: 140 bits in 18 bytes.", 3, 3, 20, 7),
]


class Recorder:
    """Entropy that notes what it gave."""

    def __init__(self, entropy: Entropy):
        self.entropy = entropy
        self.calls: list[bytes] = []

    def __call__(self, count: int) -> bytes:
        self.calls.append(self.entropy(count))
        return self.calls[-1]


class Recorded:
    """Entropy that gives what was noted, to exactly the same calls."""

    def __init__(self, calls: Sequence[bytes]):
        self.left = list(calls)

    def __call__(self, count: int) -> bytes:
        if not self.left or len(self.left[0]) != count:
            raise ValueError(f"a call for {count} bytes was not recorded here")
        return self.left.pop(0)


class Game:
    """A round played to the end, with all that was said and every state on the way.

    Attributes:
        asked: What the server sent for a participant's answer at a stage, (stage, number) to bytes.
        answers: What the participant answered, (stage, number) to bytes.
        clients: A participant's state before it answered.
        servers: The server's state before it took the answer.
        sets: Who answered at each stage: U1 to U5 of the paper.
        opened: The end.
    """

    def __init__(
        self,
        session: Session,
        identities: Sequence[Identity],
        vectors: Sequence[Sequence[int]],
        entropies: Sequence[Entropy],
        drops: Mapping[int, str],
    ):
        self.session, self.identities = session, identities
        self.vectors = [np.array(vector, session.ring.dtype) for vector in vectors]
        self.asked: dict[tuple[str, int], bytes] = {}
        self.answers: dict[tuple[str, int], bytes] = {}
        self.clients: dict[tuple[str, int], Any] = {}
        self.servers: dict[tuple[str, int], Any] = {}
        self.sets: dict[str, list[int]] = {}
        stages = [stage for stage in STAGES if session.params.active or stage != "ConsistencyCheck"]
        state: Any = server.start(session)
        outbox: dict[int, Any] = dict.fromkeys(range(len(identities)))
        states: dict[int, Any] = {}
        for stage in stages:
            for u, message in outbox.items():
                if message is not None:
                    self.asked[stage, u] = wire.encode(message)
                if STAGES.index(stage) >= STAGES.index(drops.get(u, "Unmask")) and u in drops:
                    continue
                self.clients[stage, u], self.servers[stage, u] = states.get(u), fork(state)
                kept, reply = self.step(stage, u, states.get(u), message, entropies[u])
                states[u] = client.decode_state(wire.encode(kept))
                self.answers[stage, u] = wire.encode(reply)
                state = RECEIVE[stage](state, u, reply)
            self.sets[stage] = [u for u in outbox if (stage, u) in self.answers]
            state, outbox = CLOSE[stage](state)
        self.opened: server.Opened = state

    def step(self, stage: str, u: int, state: Any, message: Any, entropy: Entropy) -> tuple[Any, Any]:
        """What participant u does at a stage."""
        identity = self.identities[u]
        match stage:
            case "AdvertiseKeys":
                return client.advertise(self.session, u, identity, entropy)
            case "ShareKeys":
                return client.share_keys(state, message, identity, entropy)
            case "MaskedInput":
                return client.mask_input(state, message, self.vectors[u])
            case "ConsistencyCheck":
                return client.confirm(state, message, identity)
            case "Unmask" if self.session.params.active:
                return client.unmask(state, message)
            case _:
                return client.unmask_semi_honest(state, message)

    def feed(self, function: str, party: int | str, sender: int | None, data: bytes) -> None:
        """Give `data` to a party in place of what it got at this step, and play the step as it would."""
        stage, kind = FUNCTIONS[function]
        message = wire.decode(data, kind)
        if isinstance(party, int):
            state = self.clients[stage, party]
            self.step(stage, party, state, message, deterministic_entropy(b"not what the round used"))
            return
        state = RECEIVE[stage](fork(self.servers[stage, sender]), sender, message)
        if function.startswith("server.close"):
            for u in self.sets[stage]:
                if u > sender:
                    state = RECEIVE[stage](state, u, wire.decode(self.answers[stage, u], kind))
            CLOSE[stage](state)

    def original(self, function: str, party: int | str, sender: int | None) -> Any:
        """The message that the step was given in this round."""
        stage, kind = FUNCTIONS[function]
        return wire.decode(self.asked[stage, party] if isinstance(party, int) else self.answers[stage, sender], kind)


def fork(state: Any) -> Any:
    """A copy of the server's state that does not share the sum."""
    return msgspec.structs.replace(state, total=state.total.copy()) if hasattr(state, "total") else state


def play(case: Case) -> tuple[Game, dict[str, Any]]:
    """A case and its document."""

    def source(what: str) -> Entropy:
        return deterministic_entropy(f"{case.name}: {what}".encode())

    secrets = [source(f"identity {u}")(32) for u in range(case.n)]
    identities = [Identity(secret) for secret in secrets]
    roster = Roster.of({f"site-{u}": identity.public for u, identity in enumerate(identities)})
    params = Params(roster, case.threshold, case.mode)
    context, model = source("context")(32), source("model")(32)
    session = Session(params, context, "train", CASES.index(case), model, case.dimension, case.bits)
    modulus = session.ring.modulus
    numbers = source("vectors")
    vectors = [[int.from_bytes(numbers(8), "big") % modulus for _ in range(case.dimension)] for _ in range(case.n)]
    for u in range(case.n):  # the first entry wraps as often as it can, the last does not
        vectors[u][0], vectors[u][-1] = modulus - 1, u + 1
    entropies = [Recorder(source(f"participant {u}")) for u in range(case.n)]
    game = Game(session, identities, vectors, entropies, case.drops)
    parts = [_participant(case, game, u, vectors[u], entropies[u].calls) for u in range(case.n)]
    return game, {
        "kind": "round",
        "description": case.description,
        "session": {
            "roster": [
                {"name": member.name, "identity_secret": secret.hex(), "identity": member.identity.hex()}
                for member, secret in zip(roster.members, secrets, strict=True)
            ],
            "threshold": case.threshold,
            "mode": case.mode,
            "suite": params.suite,
            "context": context.hex(),
            "purpose": session.purpose,
            "round": session.round,
            "model_digest": model.hex(),
            "dimension": case.dimension,
            "ring_bits": case.bits,
            "encoding": msgspec.msgpack.encode(session).hex(),
            "id": session.id.hex(),
        },
        "participants": parts,
        "pairs": [_pair(session, parts[u], parts[v]) for u, v in combinations(range(case.n), 2)],
        "stages": [_stage(game, stage) for stage in game.sets],
        "sum": game.opened.total.tolist(),
    }


def _participant(case: Case, game: Game, u: int, vector: Sequence[int], calls: Sequence[bytes]) -> dict[str, Any]:
    session, sid, identity = game.session, game.session.id, game.identities[u]
    replay = Recorded(calls)
    channel, mask = AgreementKey(replay(32)), AgreementKey(replay(32))
    part: dict[str, Any] = {
        "number": u,
        "drops_out_at": case.drops.get(u),
        "vector": list(vector),
        "entropy": [call.hex() for call in calls],
        "channel_secret": channel.secret.hex(),
        "channel_key": channel.public.hex(),
        "mask_secret": mask.secret.hex(),
        "mask_key": mask.public.hex(),
    }
    signatures = {"keys": (Label.SIGN_KEYS, client.keys_payload(u, channel.public, mask.public))}
    if u in game.sets["ShareKeys"]:
        seed, holders = replay(32), game.sets["AdvertiseKeys"]
        key, committed = client.self_mask_key(seed, sid, u), client.commitment(seed, sid, u)
        signatures["commitment"] = Label.SIGN_COMMITMENT, committed
        of_secret = split(mask.secret, case.threshold, holders, replay)
        of_seed = split(seed, case.threshold, holders, replay)
        part |= {
            "self_mask_seed": seed.hex(),
            "commitment": committed.hex(),
            "self_mask_key": key.hex(),
            "self_mask_keystream": Stream(key).read(KEYSTREAM_BYTES).hex(),
            "shares_of_mask_secret": {str(v): share.hex() for v, share in of_secret.items()},
            "shares_of_self_mask_seed": {str(v): share.hex() for v, share in of_seed.items()},
        }
    if u in game.sets.get("ConsistencyCheck", []):
        signatures["survivors"] = Label.SIGN_SURVIVORS, client.survivors_payload(tuple(game.sets["MaskedInput"]))
    if session.params.active:
        part["signatures"] = {
            what: identity.sign(label, sid, payload).hex() for what, (label, payload) in signatures.items()
        }
    return part


def _pair(session: Session, low: Mapping[str, Any], high: Mapping[str, Any]) -> dict[str, Any]:
    sid, u, v = session.id, low["number"], high["number"]
    channel, mask = (AgreementKey(bytes.fromhex(low[secret])) for secret in ("channel_secret", "mask_secret"))
    shared = channel.agree(bytes.fromhex(high["channel_key"]))
    key = client.pairwise_key(mask, bytes.fromhex(high["mask_key"]), sid, u, v)
    return {
        "low": u,
        "high": v,
        "channel_agreement": shared.hex(),
        "channel_key_low_to_high": channel_key(shared, sid, u, v).hex(),
        "channel_key_high_to_low": channel_key(shared, sid, v, u).hex(),
        "mask_agreement": mask.agree(bytes.fromhex(high["mask_key"])).hex(),
        "pairwise_key": key.hex(),
        "pairwise_keystream": Stream(key).read(KEYSTREAM_BYTES).hex(),
    }


def _stage(game: Game, stage: str) -> dict[str, Any]:
    following = list(game.sets)[list(game.sets).index(stage) + 1 :]
    sent = {u: data for (at, u), data in game.asked.items() if following and at == following[0]}
    return {
        "stage": stage,
        "participant_to_server": {str(u): game.answers[stage, u].hex() for u in game.sets[stage]},
        "server_to_participant": {str(u): data.hex() for u, data in sent.items()},
    }


class At(NamedTuple):
    """A step of a round: what is called, by whom, and with whose message if the server's."""

    round: str
    function: str
    party: int | str = "server"
    sender: int | None = None


class Fails(NamedTuple):
    """What fails, in the words of `verify.py` and of the error."""

    check: str
    contains: str
    culprits: tuple[str, ...] = ()
    error: str = "RemoteProtocolError"


class Refusal(NamedTuple):
    """A message that a party must refuse, and the fields that are not as in the round's own."""

    name: str
    description: str
    at: At
    changed: tuple[str, ...]
    data: bytes
    fails: Fails

    def document(self) -> dict[str, Any]:
        """As it is written."""
        return {
            "kind": "refusal",
            "description": self.description,
            "round": f"{self.at.round}.json",
            "function": self.at.function,
            "message_type": FUNCTIONS[self.at.function][1].__name__,
            "party": self.at.party,
            "sender": self.at.sender,
            "changed": list(self.changed),
            "message": self.data.hex(),
            "check": self.fails.check,
            "error": self.fails.error,
            "error_contains": self.fails.contains,
            "culprits": list(self.fails.culprits),
        }

    def prove(self, game: Game) -> None:
        """Raise `ValueError` unless the message is refused for the reason given."""
        try:
            game.feed(self.at.function, self.at.party, self.at.sender, self.data)
        except SecAggError as error:
            found = type(error).__name__, getattr(error, "culprits", frozenset())
            if found != (self.fails.error, frozenset(self.fails.culprits)) or self.fails.contains not in str(error):
                raise ValueError(f"{self.name} is refused for another reason: {error!r}") from error
        else:
            raise ValueError(f"{self.name} is not refused")


def refusals(games: Mapping[str, Game], documents: Mapping[str, Mapping[str, Any]]) -> list[Refusal]:
    """All deliberate failures; each is one change to a message of one of the rounds."""
    return [
        *_refused_keys(games["active_n4_drop_at_masked_input"]),
        *_refused_boxes(games["active_n3"], documents["active_n3"]),
        *_refused_sets(games),
        *_refused_answers(games),
        *_refused_bytes(games),
    ]


def _refused_keys(game: Game) -> list[Refusal]:
    base = "active_n4_drop_at_masked_input"
    directory = game.original("client.share_keys", 1, None).advertisements
    other = msgspec.structs.replace(game.session, round=game.session.round + 1).id

    def listing(u: int, **changes: bytes) -> bytes:
        entry = msgspec.structs.replace(directory[u], **changes)
        return wire.encode(messages.KeyDirectory({**directory, u: entry}))

    def signed(u: int, session_id: bytes, channel: bytes, mask: bytes) -> bytes:
        return game.identities[u].sign(Label.SIGN_KEYS, session_id, client.keys_payload(u, channel, mask))

    channel, mask = directory[0].channel_key, directory[0].mask_key
    stale, zero = signed(0, other, channel, mask), bytes(32)
    useless = messages.Advertisement(channel, zero, signed(0, game.session.id, channel, zero))
    to_client = At(base, "client.share_keys", 1)
    to_server = At(base, "server.receive_keys", sender=0)
    not_signed = Fails("signature", "are not signed by it for this session")
    return [
        Refusal(
            "bad_signature_of_another_session",
            "The keys of participant 0 with its signature for the next round, as the server lists them.",
            to_client,
            ("advertisements.0.signature",),
            listing(0, signature=stale),
            not_signed,
        ),
        Refusal(
            "bad_signature_of_another_session_to_server",
            "Participant 0 signs its keys for the next round.",
            to_server,
            ("signature",),
            wire.encode(messages.Advertisement(channel, mask, stale)),
            Fails("signature", "did not sign its keys for this session", ("site-0",)),
        ),
        Refusal(
            "bad_directory_swapped_keys",
            "The server lists the channel key of participant 0 as its mask key and the reverse.",
            to_client,
            ("advertisements.0.channel_key", "advertisements.0.mask_key"),
            listing(0, channel_key=mask, mask_key=channel),
            not_signed,
        ),
        Refusal(
            "bad_directory_repeated_key",
            "The server lists the keys and signature of participant 0 for participant 2 as well.",
            to_client,
            ("advertisements.2",),
            listing(2, **msgspec.structs.asdict(directory[0])),
            Fails("repeated key", "comes twice in the directory"),
        ),
        Refusal(
            "bad_directory_own_keys_changed",
            "The server lists for participant 1 its channel key twice.",
            to_client,
            ("advertisements.1.mask_key",),
            listing(1, mask_key=directory[1].channel_key),
            Fails("own keys", "other keys for us than those that we advertised"),
        ),
        Refusal(
            "bad_low_order_key",
            "Participant 0 advertises, rightly signed, the point 0, with which every agreement gives 0.",
            to_server,
            ("mask_key", "signature"),
            wire.encode(useless),
            Fails("low order", "sent a useless key", ("site-0",)),
        ),
    ]


def _refused_boxes(game: Game, document: Mapping[str, Any]) -> list[Refusal]:
    sid, boxes = game.session.id, game.original("client.mask_input", 1, None).boxes
    sealed = {u: game.original("server.receive_shares", "server", u).boxes for u in range(3)}
    key = bytes.fromhex(
        next(p for p in document["pairs"] if (p["low"], p["high"]) == (0, 1))["channel_key_low_to_high"]
    )
    of_secret, of_seed = (
        {int(v): bytes.fromhex(share) for v, share in document["participants"][0][f"shares_of_{what}"].items()}
        for what in ("mask_secret", "self_mask_seed")
    )

    def box(receiver: int, first: bytes, second: bytes) -> bytes:
        return seal(key, sid, 0, 1, bytes(4) + receiver.to_bytes(4, "big") + first + second)

    def refusal(name: str, description: str, replacement: bytes, check: str, contains: str) -> Refusal:
        data = messages.ShareInbox({**boxes, 0: replacement})
        at, fails = At("active_n3", "client.mask_input", 1), Fails(check, contains)
        return Refusal(name, description, at, ("boxes.0",), wire.encode(data), fails)

    too_large = PRIME.to_bytes(SHARE_BYTES, "big")
    return [
        refusal(
            "bad_reflected_box",
            "Participant 1 gets the box that it sealed for participant 0 as the one from participant 0.",
            sealed[1][0],
            "tag",
            "do not open: altered, reflected or replayed",
        ),
        refusal(
            "bad_moved_box",
            "Participant 1 gets the box that participant 0 sealed for participant 2.",
            sealed[0][2],
            "tag",
            "do not open: altered, reflected or replayed",
        ),
        refusal(
            "bad_moved_share",
            "Participant 0 seals for participant 1 the shares of participant 2, with its number.",
            box(2, of_secret[2], of_seed[2]),
            "numbers inside",
            "to 1 name 0 and 2 inside",
        ),
        refusal(
            "bad_share_no_field_element",
            "Participant 0 seals the prime itself as the share of b_0.",
            box(1, of_secret[1], too_large),
            "field element",
            "are no field elements",
        ),
    ]


def _refused_sets(games: Mapping[str, Game]) -> list[Refusal]:
    early, late, honest = (
        "active_n5_t4_drop_before_share_keys",
        "active_n4_drop_at_masked_input",
        "semi_honest_n4_one_drop",
    )
    game = games[late]
    signatures = game.original("client.unmask", 1, None).signatures
    payload = client.survivors_payload((0, 1, 2, 3))
    other = game.identities[3].sign(Label.SIGN_SURVIVORS, game.session.id, payload)
    return [
        Refusal(
            "bad_survivors_not_a_subset",
            "The server counts participant 1, who shared no keys, among the survivors.",
            At(early, "client.confirm", 0),
            ("survivors",),
            wire.encode(messages.SurvivorSet((0, 1, 2, 3, 4))),
            Fails("subset", "who never shared with us"),
        ),
        Refusal(
            "bad_survivors_without_receiver",
            "The server leaves the one that it asks out of the survivors.",
            At(honest, "client.unmask_semi_honest", 0),
            ("survivors",),
            wire.encode(messages.SurvivorSet((1, 2))),
            Fails("own number", "left us out of the survivors"),
        ),
        Refusal(
            "bad_survivors_below_threshold",
            "The server shows two survivors, where three shares open a secret.",
            At(late, "client.confirm", 0),
            ("survivors",),
            wire.encode(messages.SurvivorSet((0, 1))),
            Fails("threshold", "MaskedInput: 2 participants left, 3 needed", error="BelowThreshold"),
        ),
        Refusal(
            "bad_confirmation_of_another_set",
            "Participant 3 signed a set with participant 2 in it, which participant 1 was not shown.",
            At(late, "client.unmask", 1),
            ("signatures.3",),
            wire.encode(messages.ConfirmationSet({**signatures, 3: other})),
            Fails("signature", "did not sign the survivors that we were shown"),
        ),
    ]


def _refused_answers(games: Mapping[str, Game]) -> list[Refusal]:
    base, partial = "active_n4_drop_at_masked_input", "partial_group"
    shares = games[base].original("server.close_unmask", "server", 0)
    sealed = games[base].original("server.receive_shares", "server", 0)
    packed = games[partial].original("server.receive_vector", "server", 2).packed
    of_seed, of_secret = shares.of_self_mask_seed, shares.of_mask_secret
    wrong_seed = {**of_seed, 1: flipped(of_seed[1])}
    wrong_secret = {2: flipped(of_secret[2])}
    to_close = At(base, "server.close_unmask", sender=0)
    return [
        Refusal(
            "bad_commitment_changed",
            "Participant 0 sends another commitment than it signed.",
            At(base, "server.receive_shares", sender=0),
            ("commitment",),
            wire.encode(msgspec.structs.replace(sealed, commitment=flipped(sealed.commitment))),
            Fails("signature", "did not sign its commitment for this session", ("site-0",)),
        ),
        Refusal(
            "bad_padding_bits",
            "The unused four bits after the last value are not zero.",
            At(partial, "server.receive_vector", sender=2),
            ("packed",),
            wire.encode(messages.MaskedInput(packed[:-1] + bytes([packed[-1] | 0x80]))),
            Fails("padding", "the last 4 bits of a packed vector are unused and must be zero", ("site-2",)),
        ),
        Refusal(
            "bad_vector_length",
            "A byte is missing from the packed vector.",
            At(partial, "server.receive_vector", sender=2),
            ("packed",),
            wire.encode(messages.MaskedInput(packed[:-1])),
            Fails("length", "7 values of 20 bits take 18 bytes, got 17 bytes", ("site-2",)),
        ),
        Refusal(
            "bad_share_of_self_mask_seed",
            "Participant 0 gives out a wrong share of b_1; there is no share to spare that would tell whose is wrong.",
            to_close,
            ("of_self_mask_seed.1",),
            wire.encode(messages.UnmaskShares(wrong_seed, of_secret)),
            Fails("commitment", "the secret of site-1: 3 shares of threshold 3 do not lead to the secret"),
        ),
        Refusal(
            "bad_share_of_mask_secret",
            "Participant 0 gives out a wrong share of s_2, who dropped out.",
            to_close,
            ("of_mask_secret.2",),
            wire.encode(messages.UnmaskShares(of_seed, wrong_secret)),
            Fails("public key", "the secret of site-2: 3 shares of threshold 3 do not lead to the secret"),
        ),
        Refusal(
            "bad_unmask_both_kinds",
            "Participant 0 gives out, beside what it was asked for, a share of s_1, who survived.",
            At(base, "server.receive_unmask", sender=0),
            ("of_mask_secret.1",),
            wire.encode(messages.UnmaskShares(of_seed, {1: of_seed[1], **of_secret})),
            Fails("asked for", "shares of other participants than it was asked for", ("site-0",)),
        ),
    ]


def _refused_bytes(games: Mapping[str, Game]) -> list[Refusal]:
    base, canonical = "active_n3", "in its one canonical form"
    vector, confirmation = games[base].answers["MaskedInput", 0], games[base].answers["ConsistencyCheck", 0]
    directory = games[base].original("client.share_keys", 1, None).advertisements
    backwards = wire.encode(messages.KeyDirectory(dict(reversed(directory.items()))))
    survivors = games[base].asked["ConsistencyCheck", 1]
    to_server = At(base, "server.receive_vector", sender=0)
    to_client = At(base, "client.confirm", 1)
    return [
        Refusal(
            "bad_trailing_byte",
            "A zero byte follows a confirmation.",
            At(base, "server.receive_confirmation", sender=0),
            (),
            confirmation + b"\x00",
            Fails("left over", "not a Confirmation", error="DecodeError"),
        ),
        Refusal(
            "bad_version_byte",
            "A masked vector says that it is of version 2.",
            to_server,
            (),
            b"\x02" + vector[1:],
            Fails("version", "expected message version 1, got 2", error="DecodeError"),
        ),
        Refusal(
            "bad_map_order",
            "The entries of the directory come in descending order.",
            At(base, "client.share_keys", 1),
            (),
            backwards,
            Fails("canonical form", canonical, error="DecodeError"),
        ),
        Refusal(
            "bad_wide_number",
            "The last survivor's number takes two bytes (uint 8) where one is enough.",
            to_client,
            (),
            survivors[:-1] + b"\xcc" + survivors[-1:],
            Fails("canonical form", canonical, error="DecodeError"),
        ),
        Refusal(
            "bad_cut_short",
            "The last byte of a masked vector is missing.",
            to_server,
            (),
            vector[:-1],
            Fails("cut short", "not a MaskedInput", error="DecodeError"),
        ),
    ]


def flipped(data: bytes) -> bytes:
    """With the lowest bit of the last byte the other way."""
    return data[:-1] + bytes([data[-1] ^ 1])


def replay(document: Mapping[str, Any]) -> Game:
    """The round of a document, played from its inputs and its recorded randomness alone."""
    fields, parts = document["session"], document["participants"]
    identities = [Identity(bytes.fromhex(member["identity_secret"])) for member in fields["roster"]]
    names = [member["name"] for member in fields["roster"]]
    roster = Roster.of({name: identity.public for name, identity in zip(names, identities, strict=True)})
    session = Session(
        Params(roster, fields["threshold"], fields["mode"], fields["suite"]),
        bytes.fromhex(fields["context"]),
        fields["purpose"],
        fields["round"],
        bytes.fromhex(fields["model_digest"]),
        fields["dimension"],
        fields["ring_bits"],
    )
    entropies = [Recorded([bytes.fromhex(call) for call in part["entropy"]]) for part in parts]
    drops = {part["number"]: part["drops_out_at"] for part in parts if part["drops_out_at"]}
    game = Game(session, identities, [part["vector"] for part in parts], entropies, drops)
    if any(entropy.left for entropy in entropies):
        raise ValueError("the round did not use all the randomness that was recorded")
    return game


def files() -> dict[str, str]:
    """Every file of vectors by its name, as text."""
    played = {case.name: play(case) for case in CASES}
    games = {name: game for name, (game, _) in played.items()}
    documents = {name: document for name, (_, document) in played.items()}
    for refusal in refusals(games, documents):
        refusal.prove(games[refusal.at.round])
        documents[refusal.name] = refusal.document()
    return {f"{name}.json": json.dumps(document, indent=2) + "\n" for name, document in documents.items()}


def differences(folder: Path) -> list[str]:
    """Names of the files in `folder` that are missing, changed or too many."""
    wanted, found = files(), {path.name: path.read_text(encoding="utf-8") for path in folder.glob("*.json")}
    return sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))


def main(arguments: Sequence[str] | None = None) -> int:
    """Write or check the files."""
    parser = argparse.ArgumentParser(description="Write the test vectors of the masked sum.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if the files would change")
    if parser.parse_args(arguments).check:
        changed = differences(FOLDER)
        for name in changed:
            print(f"{name}: not what generate.py writes")
        return 1 if changed else 0
    FOLDER.mkdir(exist_ok=True)
    wanted = files()
    for path in FOLDER.glob("*.json"):
        if path.name not in wanted:
            path.unlink()
    for name, text in wanted.items():
        (FOLDER / name).write_text(text, encoding="utf-8")
    print(f"{len(wanted)} files in {FOLDER}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

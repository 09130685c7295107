"""Write the test vectors of the masked sum from `secagg` itself.

    python tests/vectors/generate.py            write tests/vectors/masking/*.json
    python tests/vectors/generate.py --check    exit 1 if the files are not what would be written

Everything is deterministic. That the vectors are right, and not merely what the library does, is what `verify.py` says.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np

from secagg import (
    Entropy,
    Identity,
    Params,
    Roster,
    SecAggError,
    Session,
    Stream,
    Subject,
    deterministic_entropy,
    wire,
)
from secagg.keys import AgreementKey
from secagg.masking import client, messages, server, transcript
from secagg.masking.params import differences
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
    "ShareKeys": lambda state: (server.close_shares(state), {}),
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
SEQUENCE = "keys_agreed_ahead"
AHEAD = [
    Case(
        "keys_agreed_ahead_0",
        "The first of two rounds. Participant 2 sends no vector; it has shared its keys for both.",
        n=4,
        threshold=3,
        bits=28,
        dimension=4,
        drops={2: "MaskedInput"},
    ),
    Case(
        "keys_agreed_ahead_1",
        "The second of two rounds: its model is the packed sum of the first. Participant 2 is back, 3 sends no vector.",
        n=4,
        threshold=3,
        bits=28,
        dimension=4,
        drops={3: "MaskedInput"},
    ),
]
ORDER = [
    *((of, stage) for of in (0, 1) for stage in STAGES[:2]),
    *((of, stage) for of in (0, 1) for stage in STAGES[2:]),
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
    """A round as it is played, with all that was said and every state on the way.

    Attributes:
        asked: What the server sent for a participant's answer at a stage, (stage, number) to bytes.
        answers: What the participant answered, (stage, number) to bytes.
        clients: A participant's state before it answered.
        servers: The server's state before it took the answer.
        sets: Who answered at each stage: U1 to U5 of the paper.
        state: The server's state now.
        subject: What is summed, from `begin` on.
    """

    subject: Subject

    def __init__(
        self,
        session: Session,
        identities: Sequence[Identity],
        entropies: Sequence[Entropy],
        drops: Mapping[int, str],
    ):
        self.session, self.identities, self.entropies, self.drops = session, identities, entropies, drops
        self.asked: dict[tuple[str, int], bytes] = {}
        self.answers: dict[tuple[str, int], bytes] = {}
        self.clients: dict[tuple[str, int], Any] = {}
        self.servers: dict[tuple[str, int], Any] = {}
        self.sets: dict[str, list[int]] = {}
        self.state: Any = server.start(session)
        self.outbox: dict[int, Any] = dict.fromkeys(range(len(identities)))
        self.states: dict[int, Any] = {}

    @property
    def stages(self) -> list[str]:
        """Stages that the mode has."""
        return [stage for stage in STAGES if self.session.params.active or stage != "ConsistencyCheck"]

    @property
    def opened(self) -> server.Opened:
        """The end."""
        return self.state

    def begin(self, subject: Subject, vectors: Sequence[Sequence[int]]) -> None:
        """Say what is summed; the keys are agreed."""
        self.subject, self.vectors = subject, [np.array(vector, subject.ring.dtype) for vector in vectors]
        self.state, self.outbox = server.begin_sum(self.state, subject)

    def play(self, stage: str) -> None:
        """One stage, from the server's requests to its end."""
        for u, message in self.outbox.items():
            if message is not None:
                self.asked[stage, u] = wire.encode(message)
            if u in self.drops and STAGES.index(stage) >= STAGES.index(self.drops[u]):
                continue
            self.clients[stage, u], self.servers[stage, u] = self.states.get(u), fork(self.state)
            kept, reply = self.step(stage, u, self.states.get(u), message, self.entropies[u])
            self.states[u] = client.decode_state(wire.encode(kept))
            self.answers[stage, u] = wire.encode(reply)
            self.state = RECEIVE[stage](self.state, u, reply)
        self.sets[stage] = [u for u in self.outbox if (stage, u) in self.answers]
        self.state, self.outbox = CLOSE[stage](self.state)

    def play_all(self, subject: Subject, vectors: Sequence[Sequence[int]]) -> None:
        """All stages."""
        for stage in self.stages:
            if stage == "MaskedInput":
                self.begin(subject, vectors)
            self.play(stage)

    def step(self, stage: str, u: int, state: Any, message: Any, entropy: Entropy) -> tuple[Any, Any]:
        """What participant u does at a stage."""
        identity = self.identities[u]
        match stage:
            case "AdvertiseKeys":
                return client.advertise(self.session, u, identity, entropy)
            case "ShareKeys":
                return client.share_keys(state, message, identity, entropy)
            case "MaskedInput":
                return client.mask_input(state, message, self.subject, self.vectors[u])
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


class Study:
    """Who takes part in the rounds of a study, and where everything random in them comes from."""

    def __init__(self, name: str, case: Case):
        self.name, self.n = name, case.n
        self.secrets = [self.source(f"identity {u}")(32) for u in range(case.n)]
        self.identities = [Identity(secret) for secret in self.secrets]
        roster = Roster.of({f"site-{u}": identity.public for u, identity in enumerate(self.identities)})
        self.params, self.context = Params(roster, case.threshold, case.mode), self.source("context")(32)
        self.entropies = [self.source(f"participant {u}") for u in range(case.n)]

    def source(self, what: str) -> Entropy:
        """A stream of randomness of its own for each use."""
        return deterministic_entropy(f"{self.name}: {what}".encode())

    def game(self, number: int, drops: Mapping[int, str]) -> Game:
        """A round of it, at the beginning."""
        entropies = [Recorder(entropy) for entropy in self.entropies]
        return Game(Session(self.params, self.context, number), self.identities, entropies, drops)

    def vectors(self, subject: Subject, what: str) -> list[list[int]]:
        """Vectors of a subject: the first entry wraps as often as it can, the last does not."""
        modulus, numbers = subject.ring.modulus, self.source(what)
        drawn = [[int.from_bytes(numbers(8), "big") % modulus for _ in range(subject.dimension)] for _ in range(self.n)]
        return [[modulus - 1, *vector[1:-1], u + 1] for u, vector in enumerate(drawn)]


def play(case: Case) -> tuple[Game, dict[str, Any]]:
    """A case and its document."""
    study, number = Study(case.name, case), CASES.index(case)
    previous = study.source("previous")(32) if number else bytes(32)
    subject = Subject("train", study.source("model")(32), previous, case.dimension, case.bits)
    game = study.game(number, case.drops)
    game.play_all(subject, study.vectors(subject, "vectors"))
    return game, document_of(case, study, game)


def play_ahead() -> tuple[list[Game], dict[str, dict[str, Any]]]:
    """Two rounds of one study: the keys of the second are agreed before there is a vector in the first."""
    study = Study(SEQUENCE, AHEAD[0])
    games = [study.game(number, case.drops) for number, case in enumerate(AHEAD)]
    model, previous = study.source("model")(32), transcript.NO_RECORD
    entries: list[Any] = []
    for of, stage in ORDER:
        game, case = games[of], AHEAD[of]
        if stage == "MaskedInput":
            subject = Subject("train", model, previous, case.dimension, case.bits)
            game.begin(subject, study.vectors(subject, f"vectors {of}"))
        game.play(stage)
        if stage == "Unmask":
            entries.append(transcript.record(game.opened))
            model, previous = packed_sum_digest(game), entries[-1].digest
    last = games[-1].sets["Unmask"]
    signatures = {u: transcript.sign_head(study.identities[u], study.context, previous) for u in last}
    entries.append(transcript.Closing(study.context, previous, signatures))
    documents = {case.name: document_of(case, study, game) for case, game in zip(AHEAD, games, strict=True)}
    parts = [document["participants"] for document in documents.values()]
    documents[SEQUENCE] = {
        "kind": "sequence",
        "description": "Two rounds of one study. The keys of the second are agreed before the first has a sum.",
        "rounds": [f"{case.name}.json" for case in AHEAD],
        "order": [[of, stage] for of, stage in ORDER],
        "entropy": [[call for part in parts for call in part[u]["entropy"]] for u in range(study.n)],
        "transcript": transcript.write(entries).hex(),
    }
    return games, documents


def packed_sum_digest(game: Game) -> bytes:
    """SHA-256 of a round's packed sum, which stands for the next model."""
    return hashlib.sha256(game.subject.ring.pack(game.opened.total)).digest()


def document_of(case: Case, study: Study, game: Game) -> dict[str, Any]:
    """The document of a round that was played to the end."""
    session, subject, params = game.session, game.subject, study.params
    parts = [_participant(case, game, u) for u in range(case.n)]
    return {
        "kind": "round",
        "description": case.description,
        "session": {
            "roster": [
                {"name": member.name, "identity_secret": secret.hex(), "identity": member.identity.hex()}
                for member, secret in zip(params.roster.members, study.secrets, strict=True)
            ],
            "threshold": case.threshold,
            "mode": case.mode,
            "suite": params.suite,
            "params_encoding": msgspec.msgpack.encode(params).hex(),
            "params_digest": params.digest.hex(),
            "context": session.context.hex(),
            "round": session.round,
            "encoding": msgspec.msgpack.encode(session.terms).hex(),
            "id": session.id.hex(),
        },
        "subject": {
            "purpose": subject.purpose,
            "model_digest": subject.model_digest.hex(),
            "previous": subject.previous.hex(),
            "dimension": subject.dimension,
            "ring_bits": subject.ring_bits,
            "encoding": msgspec.msgpack.encode(subject).hex(),
            "sum_id": subject.sum_id(session.id).hex(),
        },
        "mask_id": _mask_id(game).hex(),
        "participants": parts,
        "pairs": [_pair(game, parts[u], parts[v]) for u, v in combinations(range(case.n), 2)],
        "stages": [_stage(game, stage) for stage in game.sets],
        "sum": game.opened.total.tolist(),
    }


def _mask_id(game: Game) -> bytes:
    return client.mask_id(game.subject.sum_id(game.session.id), game.sets["ShareKeys"])


def _participant(case: Case, game: Game, u: int) -> dict[str, Any]:
    session, sid, identity, calls = game.session, game.session.id, game.identities[u], game.entropies[u].calls
    sum_id, replay = game.subject.sum_id(sid), Recorded(calls)
    channel, mask = AgreementKey(replay(32)), AgreementKey(replay(32))
    part: dict[str, Any] = {
        "number": u,
        "drops_out_at": case.drops.get(u),
        "vector": game.vectors[u].tolist(),
        "entropy": [call.hex() for call in calls],
        "channel_secret": channel.secret.hex(),
        "channel_key": channel.public.hex(),
        "mask_secret": mask.secret.hex(),
        "mask_key": mask.public.hex(),
    }
    signatures = {"keys": (Label.SIGN_KEYS, sid, client.keys_payload(u, channel.public, mask.public))}
    if u in game.sets["ShareKeys"]:
        seed, holders = replay(32), game.sets["AdvertiseKeys"]
        key, committed = client.self_mask_key(seed, _mask_id(game), u), client.commitment(seed, sid, u)
        signatures["commitment"] = Label.SIGN_COMMITMENT, sid, committed
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
        payload = client.survivors_payload(tuple(game.sets["MaskedInput"]))
        signatures["survivors"] = Label.SIGN_SURVIVORS, sum_id, payload
    if session.params.active:
        part["signatures"] = {
            what: identity.sign(label, bound_to, payload).hex()
            for what, (label, bound_to, payload) in signatures.items()
        }
    return part


def _pair(game: Game, low: Mapping[str, Any], high: Mapping[str, Any]) -> dict[str, Any]:
    sid, u, v = game.session.id, low["number"], high["number"]
    channel, mask = (AgreementKey(bytes.fromhex(low[secret])) for secret in ("channel_secret", "mask_secret"))
    shared = channel.agree(bytes.fromhex(high["channel_key"]))
    secret = client.pairwise_secret(mask, bytes.fromhex(high["mask_key"]), sid, u, v)
    key = client.pairwise_key(secret, _mask_id(game), u, v)
    return {
        "low": u,
        "high": v,
        "channel_agreement": shared.hex(),
        "channel_key_low_to_high": channel_key(shared, sid, u, v).hex(),
        "channel_key_high_to_low": channel_key(shared, sid, v, u).hex(),
        "mask_agreement": mask.agree(bytes.fromhex(high["mask_key"])).hex(),
        "pairwise_secret": secret.hex(),
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
        *_refused_terms(games["active_n4_drop_at_masked_input"]),
        *_refused_subjects(games["active_n4_drop_at_masked_input"]),
        *_refused_ahead(games),
        *_refused_late(games),
        *_refused_boxes(games["active_n3"], documents["active_n3"]),
        *_refused_sets(games),
        *_refused_answers(games),
        *_refused_bytes(games),
    ]


def _refused_keys(game: Game) -> list[Refusal]:
    base = "active_n4_drop_at_masked_input"
    directory = game.original("client.share_keys", 1, None).advertisements
    other = msgspec.structs.replace(game.session, round=game.session.round + 1).id

    def listing(u: int, **changes: Any) -> bytes:
        entry = msgspec.structs.replace(directory[u], **changes)
        return wire.encode(messages.KeyDirectory({**directory, u: entry}))

    def signed(u: int, session_id: bytes, channel: bytes, mask: bytes) -> bytes:
        return game.identities[u].sign(Label.SIGN_KEYS, session_id, client.keys_payload(u, channel, mask))

    channel, mask = directory[0].channel_key, directory[0].mask_key
    stale, zero = signed(0, other, channel, mask), bytes(32)
    terms = directory[0].terms
    useless = messages.Advertisement(terms, channel, zero, signed(0, game.session.id, channel, zero))
    to_client = At(base, "client.share_keys", 1)
    to_server = At(base, "server.receive_keys", sender=0)
    not_signed = Fails("signature", "are not signed by it")
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
            wire.encode(messages.Advertisement(terms, channel, mask, stale)),
            Fails("signature", "did not sign its keys", ("site-0",)),
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


def _refused_terms(game: Game) -> list[Refusal]:
    base, session, params = "active_n4_drop_at_masked_input", game.session, game.session.params
    directory = game.original("client.share_keys", 1, None).advertisements

    def made_for(other: Session) -> tuple[messages.Advertisement, str]:
        """The same keys, rightly signed for another session, and what is said of the difference."""
        secrets = Recorded(game.entropies[0].calls[:2])
        _, advertisement = client.advertise(other, 0, game.identities[0], secrets)
        return advertisement, differences(advertisement.terms, session.terms)

    def replaced(**changes: Any) -> Session:
        return msgspec.structs.replace(session, **changes)

    configuration, told = made_for(replaced(context=flipped(session.context)))
    parameters, told_threshold = made_for(replaced(params=msgspec.structs.replace(params, threshold=4)))
    later, told_round = made_for(replaced(round=session.round + 1))
    to_server = At(base, "server.receive_keys", sender=0)
    words = "site-0 sent a message of another session: "
    return [
        Refusal(
            "bad_other_configuration",
            "Participant 0 has another configuration of the study, and signs its keys for that.",
            to_server,
            ("terms.context", "signature"),
            wire.encode(configuration),
            Fails("terms", f"{words}{told}", ("site-0",)),
        ),
        Refusal(
            "bad_other_threshold",
            "Participant 0 has another threshold in its parameters, and signs its keys for those.",
            to_server,
            ("terms.params", "signature"),
            wire.encode(parameters),
            Fails("terms", f"{words}{told_threshold}", ("site-0",)),
        ),
        Refusal(
            "bad_other_round",
            "Participant 0 is a round further than the server, and signs its keys for that.",
            to_server,
            ("terms.round", "signature"),
            wire.encode(later),
            Fails("terms", f"{words}{told_round}", ("site-0",)),
        ),
        Refusal(
            "bad_other_configuration_listed",
            "The server lists keys that participant 0 made and signed for another configuration of the study.",
            At(base, "client.share_keys", 1),
            ("advertisements.0.terms.context", "advertisements.0.signature"),
            wire.encode(messages.KeyDirectory({**directory, 0: configuration})),
            Fails("terms", f"the keys listed for site-0 are for another session: {told}"),
        ),
    ]


def _refused_subjects(game: Game) -> list[Refusal]:
    base, subject = "active_n4_drop_at_masked_input", game.subject
    inbox = game.original("client.mask_input", 0, None)
    shown, confirmed = (game.original(step, 1, None) for step in ("client.confirm", "client.unmask"))

    def replaced(**changes: Any) -> tuple[Subject, str]:
        """Another subject, and what is said of the difference."""
        other = msgspec.structs.replace(subject, **changes)
        return other, differences(other, subject)

    def masked(other: Subject) -> bytes:
        _, message = client.mask_input(game.clients["MaskedInput", 0], inbox, other, game.vectors[0])
        return wire.encode(message)

    def confirmation(u: int, other: Subject) -> messages.Confirmation:
        state = msgspec.structs.replace(game.clients["ConsistencyCheck", u], subject=other)
        return client.confirm(state, shown, game.identities[u])[1]

    model, told = replaced(model_digest=flipped(subject.model_digest[::-1])[::-1])
    wider, told_bits = replaced(ring_bits=subject.ring_bits + 1)
    standardize, told_purpose = replaced(purpose="standardize", previous=bytes(32))
    encoding = msgspec.msgpack.encode(subject)
    impossible = game.answers["MaskedInput", 0].replace(encoding, encoding[:-1] + b"\x41")
    misattributed = {**confirmed.confirmations, 3: msgspec.structs.replace(confirmed.confirmations[3], subject=model)}
    to_server = At(base, "server.receive_vector", sender=0)
    words = "site-0 did not sum what was asked for: "
    return [
        Refusal(
            "bad_other_model",
            "Participant 0 worked on another model, and its vector is masked for that.",
            to_server,
            ("subject.model_digest", "packed"),
            masked(model),
            Fails("subject", f"{words}{told}", ("site-0",)),
        ),
        Refusal(
            "bad_other_subject",
            "Participant 0 sends what it masked for another purpose after another past.",
            to_server,
            ("subject.purpose", "subject.previous", "packed"),
            masked(standardize),
            Fails("subject", f"{words}{told_purpose}", ("site-0",)),
        ),
        Refusal(
            "bad_other_ring",
            "Participant 0 sums in a ring of one more bit, so that its vector is longer too.",
            to_server,
            ("subject.ring_bits", "packed"),
            masked(wider),
            Fails("subject", f"{words}{told_bits}", ("site-0",)),
        ),
        Refusal(
            "bad_subject_of_no_ring",
            "A masked vector says that it is of a ring of 65 bits.",
            to_server,
            ("subject.ring_bits",),
            impossible,
            Fails("type", "a ring has 1 to 64 bits, not 65", error="DecodeError"),
        ),
        Refusal(
            "bad_other_model_confirmed",
            "Participant 0 confirms the survivors for another model, rightly signed for that.",
            At(base, "server.receive_confirmation", sender=0),
            ("subject.model_digest", "signature"),
            wire.encode(confirmation(0, model)),
            Fails("subject", f"site-0 confirms another sum: {told}", ("site-0",)),
        ),
        Refusal(
            "bad_confirmation_of_another_subject",
            "The server forwards what participant 3 rightly signed for another model than participant 1 worked on.",
            At(base, "client.unmask", 1),
            ("confirmations.3.subject.model_digest", "confirmations.3.signature"),
            wire.encode(messages.ConfirmationSet({**confirmed.confirmations, 3: confirmation(3, model)})),
            Fails("subject", f"site-3 did not sum what we summed: {told}"),
        ),
        Refusal(
            "bad_confirmation_with_another_subject",
            "The server forwards the signature of participant 3 with another model than it is for.",
            At(base, "client.unmask", 1),
            ("confirmations.3.subject.model_digest",),
            wire.encode(messages.ConfirmationSet(misattributed)),
            Fails("signature", "did not sign the survivors that we were shown"),
        ),
    ]


def _refused_ahead(games: Mapping[str, Game]) -> list[Refusal]:
    """What is said in one of two rounds that are under way at once, put into the other."""
    (base, game), (_, following) = ((case.name, games[case.name]) for case in AHEAD)
    directory = game.original("client.share_keys", 1, None).advertisements
    later = following.original("client.share_keys", 1, None).advertisements
    boxes = game.original("client.mask_input", 1, None).boxes
    told = differences(later[0].terms, game.session.terms)
    sealed = following.original("server.receive_shares", "server", 0).boxes[1]
    changed = ("terms.round", "channel_key", "mask_key", "signature")
    return [
        Refusal(
            "bad_keys_of_the_next_round",
            "The server lists in the first of two rounds the keys that participant 0 advertised for the second.",
            At(base, "client.share_keys", 1),
            tuple(f"advertisements.0.{field}" for field in changed),
            wire.encode(messages.KeyDirectory({**directory, 0: later[0]})),
            Fails("terms", f"the keys listed for site-0 are for another session: {told}"),
        ),
        Refusal(
            "bad_box_of_the_next_round",
            "Participant 1 gets in the first of two rounds the box that participant 0 sealed for it in the second.",
            At(base, "client.mask_input", 1),
            ("boxes.0",),
            wire.encode(messages.ShareInbox({**boxes, 0: sealed})),
            Fails("tag", "do not open: altered, reflected or replayed"),
        ),
    ]


def _refused_late(games: Mapping[str, Game]) -> list[Refusal]:
    """What participant 0 has left from the first of two rounds, sent in the second."""
    (_, before), (base, game) = ((case.name, games[case.name]) for case in AHEAD)
    state, inbox = before.clients["MaskedInput", 0], before.original("client.mask_input", 0, None)
    kept, vector = client.mask_input(state, inbox, game.subject, before.vectors[0])
    asked = game.original("server.receive_unmask", "server", 0)
    shares = messages.UnmaskShares(
        before.session.terms,
        {v: kept.held[v][1] for v in asked.of_self_mask_seed},
        {v: kept.held[v][0] for v in asked.of_mask_secret},
    )
    told = differences(before.session.terms, game.session.terms)
    fails = Fails("terms", f"site-0 sent a message of another session: {told}", ("site-0",))
    return [
        Refusal(
            "bad_boxes_of_the_round_before",
            "Participant 0 sends late what it sealed and committed to in the round before.",
            At(base, "server.receive_shares", sender=0),
            ("terms.round", "boxes", "commitment"),
            before.answers["ShareKeys", 0],
            fails,
        ),
        Refusal(
            "bad_vector_of_the_round_before",
            "Participant 0 sends late a vector that it masked in the round before, for the same subject.",
            At(base, "server.receive_vector", sender=0),
            ("terms.round", "packed"),
            wire.encode(vector),
            fails,
        ),
        Refusal(
            "bad_unmask_of_the_round_before",
            "Participant 0 sends late its shares of the round before, of the same participants.",
            At(base, "server.receive_unmask", sender=0),
            ("terms.round", "of_self_mask_seed", "of_mask_secret"),
            wire.encode(shares),
            fails,
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
    confirmations = game.original("client.unmask", 1, None).confirmations
    payload = client.survivors_payload((0, 1, 2, 3))
    other = game.identities[3].sign(Label.SIGN_SURVIVORS, game.subject.sum_id(game.session.id), payload)
    unsigned = games[honest].original("server.receive_keys", "server", 0)
    payload = client.keys_payload(0, unsigned.channel_key, unsigned.mask_key)
    signature = games[honest].identities[0].sign(Label.SIGN_KEYS, games[honest].session.id, payload)
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
            ("confirmations.3.signature",),
            wire.encode(messages.ConfirmationSet({**confirmations, 3: messages.Confirmation(game.subject, other)})),
            Fails("signature", "did not sign the survivors that we were shown"),
        ),
        Refusal(
            "bad_survivors_out_of_order",
            "The server shows the survivors in another than ascending order.",
            At(late, "client.confirm", 0),
            ("survivors",),
            wire.encode(messages.SurvivorSet((1, 0, 3))),
            Fails("order", "not in ascending order"),
        ),
        Refusal(
            "bad_signature_in_semi_honest_mode",
            "Participant 0 signs its keys, where nobody signs.",
            At(honest, "server.receive_keys", sender=0),
            ("signature",),
            wire.encode(msgspec.structs.replace(unsigned, signature=signature)),
            Fails("signature", "a semi-honest session has no signatures", ("site-0",)),
        ),
    ]


def _refused_answers(games: Mapping[str, Game]) -> list[Refusal]:
    base, partial = "active_n4_drop_at_masked_input", "partial_group"
    shares = games[base].original("server.close_unmask", "server", 0)
    sealed = games[base].original("server.receive_shares", "server", 0)
    commitment = sealed.commitment
    changed = messages.Commitment(flipped(commitment.digest), commitment.signature)
    vector = games[partial].original("server.receive_vector", "server", 2)
    padded = vector.packed[:-1] + bytes([vector.packed[-1] | 0x80])
    of_seed, of_secret = shares.of_self_mask_seed, shares.of_mask_secret
    wrong_seed = {**of_seed, 1: flipped(of_seed[1])}
    wrong_secret = {2: flipped(of_secret[2])}
    to_close = At(base, "server.close_unmask", sender=0)
    return [
        Refusal(
            "bad_commitment_changed",
            "Participant 0 sends another commitment than it signed.",
            At(base, "server.receive_shares", sender=0),
            ("commitment.digest",),
            wire.encode(msgspec.structs.replace(sealed, commitment=changed)),
            Fails("signature", "did not sign its commitment", ("site-0",)),
        ),
        Refusal(
            "bad_padding_bits",
            "The unused four bits after the last value are not zero.",
            At(partial, "server.receive_vector", sender=2),
            ("packed",),
            wire.encode(msgspec.structs.replace(vector, packed=padded)),
            Fails("padding", "the last 4 bits of a packed vector are unused and must be zero", ("site-2",)),
        ),
        Refusal(
            "bad_vector_length",
            "A byte is missing from the packed vector.",
            At(partial, "server.receive_vector", sender=2),
            ("packed",),
            wire.encode(msgspec.structs.replace(vector, packed=vector.packed[:-1])),
            Fails("length", "7 values of 20 bits take 18 bytes, got 17 bytes", ("site-2",)),
        ),
        Refusal(
            "bad_share_of_self_mask_seed",
            "Participant 0 gives out a wrong share of b_1; there is no share to spare that would tell whose is wrong.",
            to_close,
            ("of_self_mask_seed.1",),
            wire.encode(msgspec.structs.replace(shares, of_self_mask_seed=wrong_seed)),
            Fails("commitment", "the secret of site-1: 3 shares of threshold 3 do not lead to the secret"),
        ),
        Refusal(
            "bad_share_of_mask_secret",
            "Participant 0 gives out a wrong share of s_2, who dropped out.",
            to_close,
            ("of_mask_secret.2",),
            wire.encode(msgspec.structs.replace(shares, of_mask_secret=wrong_secret)),
            Fails("public key", "the secret of site-2: 3 shares of threshold 3 do not lead to the secret"),
        ),
        Refusal(
            "bad_unmask_both_kinds",
            "Participant 0 gives out, beside what it was asked for, a share of s_1, who survived.",
            At(base, "server.receive_unmask", sender=0),
            ("of_mask_secret.1",),
            wire.encode(msgspec.structs.replace(shares, of_mask_secret={1: of_seed[1], **of_secret})),
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


def subject_of(document: Mapping[str, Any]) -> Subject:
    """What the round of a document sums."""
    fields = document["subject"]
    digests = (bytes.fromhex(fields[name]) for name in ("model_digest", "previous"))
    return Subject(fields["purpose"], *digests, fields["dimension"], fields["ring_bits"])


def unplayed(document: Mapping[str, Any], entropies: Sequence[Entropy]) -> Game:
    """The round of a document at its beginning."""
    fields, parts = document["session"], document["participants"]
    identities = [Identity(bytes.fromhex(member["identity_secret"])) for member in fields["roster"]]
    names = [member["name"] for member in fields["roster"]]
    roster = Roster.of({name: identity.public for name, identity in zip(names, identities, strict=True)})
    params = Params(roster, fields["threshold"], fields["mode"], fields["suite"])
    session = Session(params, bytes.fromhex(fields["context"]), fields["round"])
    drops = {part["number"]: part["drops_out_at"] for part in parts if part["drops_out_at"]}
    return Game(session, identities, entropies, drops)


def replay(document: Mapping[str, Any]) -> Game:
    """The round of a document, played from its inputs and its recorded randomness alone."""
    parts = document["participants"]
    entropies = [Recorded([bytes.fromhex(call) for call in part["entropy"]]) for part in parts]
    game = unplayed(document, entropies)
    game.play_all(subject_of(document), [part["vector"] for part in parts])
    if any(entropy.left for entropy in entropies):
        raise ValueError("the round did not use all the randomness that was recorded")
    return game


def files() -> dict[str, str]:
    """Every file of vectors by its name, as text."""
    played = {case.name: play(case) for case in CASES}
    games = {name: game for name, (game, _) in played.items()}
    documents = {name: document for name, (_, document) in played.items()}
    ahead, more = play_ahead()
    games |= {case.name: game for case, game in zip(AHEAD, ahead, strict=True)}
    documents |= more
    for refusal in refusals(games, documents):
        refusal.prove(games[refusal.at.round])
        documents[refusal.name] = refusal.document()
    return {f"{name}.json": json.dumps(document, indent=2) + "\n" for name, document in documents.items()}


def out_of_date(folder: Path) -> list[str]:
    """Names of the files in `folder` that are missing, changed or too many."""
    wanted, found = files(), {path.name: path.read_text(encoding="utf-8") for path in folder.glob("*.json")}
    return sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))


def main(arguments: Sequence[str] | None = None) -> int:
    """Write or check the files."""
    parser = argparse.ArgumentParser(description="Write the test vectors of the masked sum.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if the files would change")
    if parser.parse_args(arguments).check:
        changed = out_of_date(FOLDER)
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

"""A round played stage by stage, so that a test can stop anywhere, drop anyone and tell any lie."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from itertools import combinations
from typing import Any

import msgspec
import numpy as np
import pytest
from scipy.stats import chi2

from secagg import (
    BelowThreshold,
    Identity,
    Params,
    RemoteProtocolError,
    Roster,
    Session,
    Subject,
    deterministic_entropy,
    least_threshold,
    wire,
)
from secagg.masking import client, server
from secagg.masking.messages import KeyDirectory

STAGES = ("AdvertiseKeys", "ShareKeys", "MaskedInput", "ConsistencyCheck", "Unmask")

RECEIVE: dict[str, Any] = {
    "AdvertiseKeys": server.receive_keys,
    "ShareKeys": server.receive_shares,
    "MaskedInput": server.receive_vector,
    "ConsistencyCheck": server.receive_confirmation,
    "Unmask": server.receive_unmask,
}
CLOSE: dict[str, Any] = {
    "AdvertiseKeys": server.close_keys,
    "ShareKeys": server.close_shares,  # and `begin_sum`
    "MaskedInput": server.close_vectors,
    "ConsistencyCheck": server.close_confirmations,
    "Unmask": lambda state: (server.close_unmask(state), {}),
}


class Party:
    """A roster of n participants with their identities and entropies, and one round for them to play."""

    def __init__(
        self,
        n: int,
        *,
        threshold: int | None = None,
        mode: str = "active",
        dimension: int = 5,
        bits: int = 20,
        number: int = 1,
    ):
        self.entropy = {u: deterministic_entropy(b"participant %d" % u) for u in range(n)}
        self.identity = {u: Identity.generate(self.entropy[u]) for u in range(n)}
        roster = Roster.of({f"site{u:03d}": self.identity[u].public for u in range(n)})
        params = Params(roster, threshold or least_threshold(n, mode), mode)
        self.session = Session(params, bytes(32), number)
        self.subject = Subject("train", bytes(32), bytes(32), dimension, bits)

    @property
    def sum_id(self) -> bytes:
        return self.subject.sum_id(self.session.id)

    def mask_id(self, shared: Iterable[int] | None = None) -> bytes:
        """What the masks are bound to where `shared` are U2; by default everybody is."""
        return client.mask_id(self.sum_id, self.identity if shared is None else shared)

    def at(self, number: int) -> Party:
        """The same participants, whose entropies run on, in another round."""
        other = copy.copy(self)
        other.session = msgspec.structs.replace(self.session, round=number)
        return other

    def vectors(self, seed: int = 0) -> dict[int, np.ndarray]:
        rng = np.random.default_rng(seed)
        ring = self.subject.ring
        top = np.uint64(ring.modulus - 1)
        return {
            u: rng.integers(0, top, self.subject.dimension, dtype=np.uint64, endpoint=True).astype(ring.dtype)
            for u in self.identity
        }


def oracle(party: Party, vectors: Mapping[int, np.ndarray], survivors: frozenset[int]) -> np.ndarray:
    """The sum in Python integers."""
    modulus, dimension = party.subject.ring.modulus, party.subject.dimension
    return np.array([sum(int(vectors[u][i]) for u in survivors) % modulus for i in range(dimension)], dtype=object)


class Round:
    """One round. Everything said, and every state of a participant, goes through bytes.

    Attributes:
        stage: The stage that is open.
        outbox: What the server sent to begin it; who is in it is expected to answer.
        states: Each participant's state after its last answer.
        server: The server's state; `Opened` at the end.
        agreed: The server's state between the keys and the sum, once it was there.
        subject: What is summed. By default the party's; where it is None, the round stands still once its keys are
            agreed, until `begin` says what they are for.
    """

    agreed: server.Agreed

    def __init__(self, party: Party, vectors: Mapping[int, np.ndarray] | None = None):
        self.party = party
        self.vectors = vectors if vectors is not None else party.vectors()
        self.stage: str | None = STAGES[0]
        self.outbox: dict[int, Any] = dict.fromkeys(party.identity)
        self.states: dict[int, Any] = {}
        self.server: Any = server.start(party.session)
        self.subject: Subject | None = party.subject

    def answer(
        self, u: int, message: Any = None, *, session: Session | None = None, subject: Subject | None = None
    ) -> Any:
        """What participant u answers to `message` (by default what the server sent it); its state moves on."""
        message = self.outbox.get(u) if message is None else message
        if message is not None:
            message = wire.decode(wire.encode(message), type(message))
        identity, entropy, state = self.party.identity[u], self.party.entropy[u], self.states.get(u)
        match self.stage:
            case "AdvertiseKeys":
                state, reply = client.advertise(session or self.party.session, u, identity, entropy)
            case "ShareKeys":
                state, reply = client.share_keys(state, message, identity, entropy)
            case "MaskedInput":
                state, reply = client.mask_input(state, message, subject or self.subject, self.vectors[u])
            case "ConsistencyCheck":
                state, reply = client.confirm(state, message, identity)
            case "Unmask" if self.party.session.params.active:
                state, reply = client.unmask(state, message)
            case _:
                state, reply = client.unmask_semi_honest(state, message)
        self.states[u] = client.decode_state(wire.encode(state))
        return wire.decode(wire.encode(reply), type(reply))

    def receive(self, u: int, reply: Any) -> None:
        """The server gets an answer of participant u."""
        self.server = RECEIVE[self.stage](self.server, u, reply)

    def close(self) -> None:
        """The server ends the stage with whoever answered."""
        closed = CLOSE[self.stage](self.server)
        if isinstance(closed, server.Agreed):
            self.server, self.outbox, self.agreed = closed, {}, closed
            if self.subject is not None:
                self.begin(self.subject)
        else:
            self.server, self.outbox = closed
        at = STAGES.index(self.stage) + 1
        if at == 3 and not self.party.session.params.active:
            at += 1
        self.stage = STAGES[at] if at < len(STAGES) else None

    def begin(self, subject: Subject) -> None:
        """The server uses the keys that were agreed."""
        self.subject = subject
        self.server, self.outbox = server.begin_sum(self.agreed, subject)

    def play(self, until: str | None = None, drop: Mapping[int, str] | None = None) -> Round:
        """Everyone follows the protocol until a stage is open; participant u is gone from the stage `drop[u]` on."""
        drop = drop or {}
        while self.stage is not None and self.stage != until:
            for u in self.outbox:
                if u not in drop or STAGES.index(self.stage) < STAGES.index(drop[u]):
                    self.receive(u, self.answer(u))
            self.close()
        return self

    def fork(self) -> Round:
        """A copy that goes its own way from here on."""
        other = copy.copy(self)
        other.states = dict(self.states)
        if hasattr(self.server, "total"):
            other.server = msgspec.structs.replace(self.server, total=self.server.total.copy())
        return other


def run(party: Party, vectors: Mapping[int, np.ndarray], drop: Mapping[int, str] | None = None) -> server.Opened:
    """A whole round in which everyone is honest; participant u is gone from the stage `drop[u]` on."""
    opened = Round(party, vectors).play(drop=drop).server
    assert isinstance(opened, server.Opened)
    return opened


def every_drop_out(game: Round) -> Iterator[tuple[Round, frozenset[int], BelowThreshold | None]]:
    """Every way in which participants can drop out from here to the end, each shared beginning played once.

    Yields:
        The round, who answered at its last stage, and the error that ended it if one did. Where a round ends early,
        it stands for all the ways in which those still there might have dropped out later.
    """
    assert game.stage is not None
    asked = tuple(game.outbox)
    replies = {u: game.answer(u) for u in asked}
    for size in range(len(asked) + 1):
        for answering in combinations(asked, size):
            branch = game.fork()
            for u in answering:
                branch.receive(u, replies[u])
            try:
                branch.close()
            except BelowThreshold as error:
                yield branch, frozenset(answering), error
                continue
            if branch.stage is None:
                yield branch, frozenset(answering), None
            else:
                yield from every_drop_out(branch)


def changed(value: Any, **changes: Any) -> Any:
    """A struct with some fields changed, made anew: so what it checks of itself is checked."""
    return type(value)(**{f: getattr(value, f) for f in value.__struct_fields__} | changes)


def replace_entry(directory: KeyDirectory, u: int, **changes: Any) -> KeyDirectory:
    """The directory with some fields of one participant's entry changed."""
    entry = msgspec.structs.replace(directory.advertisements[u], **changes)
    return KeyDirectory({**directory.advertisements, u: entry})


def refuses(game, u, message, error=RemoteProtocolError, match=None):
    """Participant u answers `message` with an error that blames nobody, and is where it was: nothing left it."""
    before = wire.encode(game.states[u])
    with pytest.raises(error, match=match) as caught:
        game.answer(u, message)
    assert wire.encode(game.states[u]) == before
    if error is RemoteProtocolError:
        assert caught.value.culprits == frozenset(), "the server could have forged this"
    return caught.value


def assert_uniform(values, cells, *, alarm=1e-6):
    """Chi-square over `cells` equal cells; a right implementation fails for one key in 1/alarm, and keys are fixed."""
    counts = np.bincount(np.asarray(values, dtype=np.int64), minlength=cells)
    assert len(counts) == cells
    expected = len(values) / cells
    assert expected > 20
    assert ((counts - expected) ** 2 / expected).sum() < chi2.isf(alarm, cells - 1)

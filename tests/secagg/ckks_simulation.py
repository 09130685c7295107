"""A sum under CKKS, played stage by stage, so that a test can stop anywhere, let anyone leave and tell any lie."""

from __future__ import annotations

import copy
from functools import lru_cache
from itertools import combinations

import msgspec
import numpy as np
import pytest

from secagg import wire
from secagg.ckks import client, holder, server
from secagg.ckks.params import Need, Setting, choose
from secagg.errors import BelowThreshold, RemoteProtocolError
from secagg.keys import Identity, Member, Roster
from secagg.masking.params import Params, Session, Subject, least_threshold
from secagg.prg import deterministic_entropy
from secagg.ring import Ring

KEY_STAGES = ("AdvertiseKeys", "ShareKeys", "RevealKey")
CONFIRMING = ("CommitInput", "ConsistencyCheck")
ALL_STAGES = (*KEY_STAGES, *CONFIRMING, "EncryptedInput", "Decrypt", "Recover")
NAMES = ("east", "north", "south", "west", "zenith", "abbey", "borough")
RING, DIMENSION = Ring(20), 50
HOLDER = Identity(bytes([99]) * 32)
MODES = ("active", "semi-honest")
KEYS = ("threshold", "holder", "shared")

RECEIVE = {
    "AdvertiseKeys": server.receive_channel_key,
    "ShareKeys": server.receive_seeds,
    "RevealKey": server.receive_key_share,
    "CommitInput": server.receive_digest,
    "ConsistencyCheck": server.receive_confirmation,
    "EncryptedInput": server.receive_upload,
    "Decrypt": server.receive_partial,
    "Recover": server.receive_seed_shares,
}
CLOSE = {
    "AdvertiseKeys": server.close_channel_keys,
    "ShareKeys": server.close_seeds,
    "RevealKey": server.close_key_shares,
    "CommitInput": server.close_digests,
    "ConsistencyCheck": server.close_confirmations,
    "EncryptedInput": server.close_uploads,
    "Decrypt": server.close_partials,
    "Recover": server.close_seed_shares,
}


def identities(n):
    return [Identity(bytes([number + 1]) * 32) for number in range(n)]


def session_of(n, mode="active", threshold=None, number=0):
    roster = Roster.of(dict(zip(sorted(NAMES[:n]), (identity.public for identity in identities(n)), strict=True)))
    return Session(Params(roster, threshold or least_threshold(n, mode), mode), bytes(32), number)


@lru_cache(maxsize=32)
def setting_of(n, keys="threshold", error=0.0, bits=RING.bits, dimension=DIMENSION):
    chain = choose(n, [Need(dimension, bits, error)])
    return Setting(chain, keys, holder=Member("trustee", HOLDER.public) if keys == "holder" else None, error=error)


def subject_of(dimension=DIMENSION, ring=RING):
    return Subject("train", bytes(32), bytes(32), dimension, ring.bits)


def vectors_of(n, dimension=DIMENSION, ring=RING, seed=0):
    rng = np.random.default_rng(seed)
    most = (1 << (ring.bits - 1)) // n - 1
    return [ring.embed(rng.integers(-most, most, dimension)) for _ in range(n)]


def sum_of(vectors, contributors, ring=RING):
    """In Python integers."""
    totals = [sum(int(vectors[u][i]) for u in contributors) % ring.modulus for i in range(vectors[0].size)]
    return np.array(totals, dtype=ring.dtype)


def through(message):
    """What arrives of a message: the same, by way of its bytes, with the entries of maps in order."""
    fields = (getattr(message, field) for field in message.__struct_fields__)
    ordered = type(message)(*(dict(sorted(each.items())) if isinstance(each, dict) else each for each in fields))
    return wire.decode(wire.encode(ordered), type(message))


def kept(state):
    """What is left of a state of a participant whose process ended."""
    return client.decode_state(wire.encode(state))


class Play:
    """One sum. Everything said, and every state of a participant, goes through bytes.

    Attributes:
        stage: The stage that is open; None at the end.
        outbox: What the server sent to begin it; who is in it is expected to answer.
        states: Each participant's state after its last answer.
        server: The server's state; `Opened` at the end.
        agreed: The server's state between the keys and the sum, once it was there.
        heard: (stage, sender, bytes) of all that the server received.
        number: The holder's, where there is one.
    """

    def __init__(self, n, mode="active", keys="threshold", **changes):
        self.session = changes.get("session") or session_of(n, mode, changes.get("threshold"), changes.get("number", 0))
        self.setting = changes.get("setting") or setting_of(n, keys)
        self.subject = changes.get("subject") or subject_of()
        self.vectors = changes.get("vectors") or vectors_of(n, self.subject.dimension, self.subject.ring)
        self.ring, self.identities = self.subject.ring, identities(n)
        seed = changes.get("seed", b"play")
        self.entropy = [deterministic_entropy(seed + bytes([u])) for u in range(n + 1)]
        self.states, self.heard, self.number = {}, [], n
        self.server = server.start(self.session, self.setting)
        held = self.setting.keys == "holder"
        confirming = CONFIRMING if self.session.params.active else ()
        self.stages = (*KEY_STAGES[: 1 if held else 3], *confirming, "EncryptedInput", "Decrypt", "Recover")
        self.stage = "AdvertiseKeys"
        self.outbox = dict.fromkeys([n] if held else range(n))
        if held:
            self.states = {u: client.outside(self.session, u) for u in range(n)}

    def answer(self, u, message=None):
        """What participant u answers to `message` (by default what the server sent it); its state moves on."""
        message = self.outbox.get(u) if message is None else message
        if message is not None:
            message = through(message)
        setting, identity = self.setting, self.identities[u] if u < self.number else HOLDER
        state = self.states.get(u)
        if u == self.number and self.stage == "AdvertiseKeys":
            state, reply = holder.hold_key(self.session, setting, identity, self.entropy[u])
        elif u == self.number:
            state, reply = holder.decrypt_held(state, message, setting)
        elif self.stage == "AdvertiseKeys":
            state, reply = client.advertise(self.session, u, identity, self.entropy[u])
        elif self.stage == "ShareKeys":
            state, reply = client.share_seed(state, message, setting, identity, self.entropy[u])
        elif self.stage == "RevealKey":
            state, reply = client.reveal(state, message, setting)
        elif self.stage == "CommitInput":
            state = self.encrypt(u, message)
            reply = client.commit(state, identity)
        elif self.stage == "ConsistencyCheck":
            state, reply = client.confirm(state, message, identity)
        elif self.stage == "EncryptedInput" and self.session.params.active:
            state, reply = client.upload(state, message)
        elif self.stage == "EncryptedInput":
            state, reply = client.upload_semi_honest(self.encrypt(u, message))
        elif self.stage == "Decrypt":
            state, reply = client.decrypt(state, message, setting)
        else:
            state, reply = client.recover(state, message)
        self.states[u] = state if u == self.number else kept(state)
        return through(reply)

    def encrypt(self, u, announcement):
        if self.setting.keys == "holder":
            key = holder.holders_key(self.session, announcement, self.setting)
        else:
            key = client.joint_key(self.states[u], announcement, self.setting)
        return client.encrypt(self.states[u], key, self.setting, self.subject, self.vectors[u])

    def receive(self, u, reply):
        """The server gets an answer of participant u."""
        held = self.stage == "AdvertiseKeys" and self.setting.keys == "holder"
        self.server = (server.receive_holder_key if held else RECEIVE[self.stage])(self.server, u, reply)
        self.heard.append((self.stage, u, wire.encode(reply)))

    def answered(self, u):
        return (self.stage, u) in [each[:2] for each in self.heard]

    def close(self):
        """The server ends the stage with whoever answered."""
        if self.stage == "AdvertiseKeys" and self.setting.keys == "holder":
            closed = server.close_holder_key(self.server)
        else:
            closed = CLOSE[self.stage](self.server)
        if isinstance(closed, server.Agreed):
            self.agreed = closed
            closed = server.begin_sum(closed, self.subject)
        self.server, self.outbox = closed if isinstance(closed, tuple) else (closed, {})
        at = self.stages.index(self.stage) + 1
        self.stage = None if isinstance(self.server, server.Opened) else self.stages[at]

    def play(self, until=None, leaves=None):
        """Everyone follows the protocol until a stage is open; participant u is gone from the stage `leaves[u]` on."""
        leaves = leaves or {}
        while self.stage is not None and self.stage != until:
            for u in self.outbox:
                stays = u not in leaves or ALL_STAGES.index(self.stage) < ALL_STAGES.index(leaves[u])
                if stays and not self.answered(u):
                    self.receive(u, self.answer(u))
            self.close()
        return self

    def finish(self, answers=None):
        """Everyone answers, or says what `answers` has for it, to the end; the opened sum."""
        for u in list(self.outbox):
            self.receive(u, (answers or {}).get(u) or self.answer(u))
        self.close()
        return self.play().server

    def fork(self):
        """A copy that goes its own way from here on."""
        other = copy.copy(self)
        other.states, other.heard = dict(self.states), list(self.heard)
        other.server = _copied(self.server)
        return other

    def exact(self):
        """Whether the opened sum is its contributors'."""
        return (self.server.total == sum_of(self.vectors, self.server.contributors, self.ring)).all()


def _copied(state):
    if isinstance(state, server.CollectingUploads | server.CollectingPartials):
        return msgspec.structs.replace(state, first=state.first.copy(), second=state.second.copy())
    if isinstance(state, server.CollectingSeedShares):
        return msgspec.structs.replace(state, partials=_copied(state.partials))
    return state


def every_departure(game):
    """Every way in which participants can leave from here to the end, each shared beginning played once.

    Yields:
        The sum, who answered at its last stage, and the error that ended it if one did. Where it ends early, it stands
        for all the ways in which those still there might have left later.
    """
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
                yield from every_departure(branch)


def replaced(value, **changes):
    """A struct with some fields changed, made anew: so what it checks of itself is checked."""
    return type(value)(**{f: getattr(value, f) for f in value.__struct_fields__} | changes)


def refuses(game, u, message, error=RemoteProtocolError, match=None):
    """Participant u answers `message` with an error that blames nobody, and is where it was: nothing left it."""
    before = wire.encode(game.states[u])
    with pytest.raises(error, match=match) as caught:
        game.answer(u, message)
    assert wire.encode(game.states[u]) == before
    if error is RemoteProtocolError:
        assert caught.value.culprits == frozenset(), "the server could have forged this"
    return caught.value


def rejects(game, u, message, match):
    """The server refuses `message` of participant u by name, and is where it was."""
    before = wire.encode(_copied(game.server)) if game.stage in KEY_STAGES else None
    with pytest.raises(RemoteProtocolError, match=match) as caught:
        game.receive(u, through(message))
    assert caught.value.culprits == {game.session.params.roster.name(u)}
    assert before is None or wire.encode(game.server) == before

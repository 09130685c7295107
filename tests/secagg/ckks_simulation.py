"""Whole sums under CKKS with every party in this process, over bytes, with participants that leave at any stage."""

from functools import lru_cache

import numpy as np

from secagg.ckks import client, holder, server
from secagg.ckks.joint_key import JointKey
from secagg.ckks.messages import HeldAggregate, HeldUploads
from secagg.ckks.params import Need, Setting, choose
from secagg.keys import Identity, Member, Roster
from secagg.masking.params import Params, Session, Subject, least_threshold
from secagg.prg import deterministic_entropy
from secagg.ring import Ring
from secagg.wire import decode, encode

KEY_STAGES = ("AdvertiseKeys", "ShareKeys", "RevealKey")
ACTIVE = (*KEY_STAGES, "CommitInput", "ConsistencyCheck", "EncryptedInput", "Decrypt", "Recover")
SEMI_HONEST = (*KEY_STAGES, "EncryptedInput", "Decrypt", "Recover")
NAMES = ("east", "north", "south", "west", "zenith")
RING, DIMENSION = Ring(20), 50
HOLDER = Identity(bytes([99]) * 32)


def identities(n):
    return [Identity(bytes([number + 1]) * 32) for number in range(n)]


def session_of(n, mode="active", threshold=None, number=0):
    roster = Roster.of({NAMES[u]: identity.public for u, identity in enumerate(identities(n))})
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


def through(message):
    """What arrives of a message: the same, by way of its bytes."""
    return decode(encode(message), type(message))


def kept(state):
    """What is left of a state of a participant whose process ended."""
    return client.decode_state(encode(state))


class Play:
    """One sum. `leaves` says at which stage a participant stops answering; `tamper` may change what arrives.

    Attributes:
        states: Participant to its state.
        messages: (direction, stage, participant) to what went that way.
    """

    def __init__(self, session, setting, vectors, leaves=(), subject=None, tamper=None, seed=b"play"):
        self.session, self.setting, self.vectors = session, setting, vectors
        self.leaves, self.subject = dict(leaves), subject or subject_of(vectors[0].size)
        self.tamper = tamper or (lambda direction, stage, u, message: message)
        self.identities = identities(len(vectors))
        self.entropy = [deterministic_entropy(seed + bytes([u])) for u in range(len(vectors))]
        self.states, self.messages, self.keys = {}, {}, {}
        self.stages = ACTIVE if session.params.active else SEMI_HONEST

    def here(self, u, stage):
        return u not in self.leaves or self.stages.index(stage) < self.stages.index(self.leaves[u])

    def down(self, stage, u, message):
        self.messages["down", stage, u] = message
        return through(self.tamper("down", stage, u, message))

    def up(self, stage, u, message):
        message = self.tamper("up", stage, u, message)
        self.messages["up", stage, u] = message
        return through(message)

    def agree(self):
        """The joint key, as the server has it."""
        if self.setting.keys == "holder":
            self.holding, key = holder.hold_key(self.session, self.setting, HOLDER, deterministic_entropy(b"holder"))
            collecting = server.start(self.session, self.setting)
            number = len(self.vectors)
            collecting = server.receive_holder_key(collecting, number, self.up("AdvertiseKeys", number, key))
            self.states = {u: client.outside(self.session, u) for u in range(number)}
            return server.close_holder_key(collecting)
        state = server.start(self.session, self.setting)
        for u, identity in enumerate(self.identities):
            if self.here(u, "AdvertiseKeys"):
                self.states[u], key = client.advertise(self.session, u, identity, self.entropy[u])
                state = server.receive_channel_key(state, u, self.up("AdvertiseKeys", u, key))
        state, shown = server.close_channel_keys(state)
        for u, directory in shown.items():
            if self.here(u, "ShareKeys"):
                self.states[u], seeds = client.share_seed(
                    kept(self.states[u]),
                    self.down("ShareKeys", u, directory),
                    self.setting,
                    self.identities[u],
                    self.entropy[u],
                )
                state = server.receive_seeds(state, u, self.up("ShareKeys", u, seeds))
        state, shown = server.close_seeds(state)
        for u, inbox in shown.items():
            if self.here(u, "RevealKey"):
                self.states[u], share = client.reveal(
                    kept(self.states[u]), self.down("RevealKey", u, inbox), self.setting
                )
                state = server.receive_key_share(state, u, self.up("RevealKey", u, share))
        return server.close_key_shares(state)

    def encrypt(self, u, announcement) -> JointKey:
        if self.setting.keys == "holder":
            self.keys[u] = holder.holders_key(self.session, announcement, self.setting)
        else:
            self.keys[u] = client.joint_key(kept(self.states[u]), announcement, self.setting)
        self.states[u] = client.encrypt(kept(self.states[u]), self.keys[u], self.setting, self.subject, self.vectors[u])

    def upload(self, agreed):
        """The server's state after the uploads, and what it asks to have decrypted."""
        state, shown = server.begin_sum(agreed, self.subject)
        if not self.session.params.active:
            for u, announcement in shown.items():
                if self.here(u, "EncryptedInput"):
                    self.encrypt(u, self.down("EncryptedInput", u, announcement))
                    self.states[u], sent = client.upload_semi_honest(kept(self.states[u]))
                    state = server.receive_upload(state, u, self.up("EncryptedInput", u, sent))
            return server.close_uploads(state)
        for u, announcement in shown.items():
            if self.here(u, "CommitInput"):
                self.encrypt(u, self.down("CommitInput", u, announcement))
                sent = client.commit(self.states[u], self.identities[u])
                state = server.receive_digest(state, u, self.up("CommitInput", u, sent))
        state, shown = server.close_digests(state)
        for u, directory in shown.items():
            if self.here(u, "ConsistencyCheck"):
                self.states[u], sent = client.confirm(
                    kept(self.states[u]), self.down("ConsistencyCheck", u, directory), self.identities[u]
                )
                state = server.receive_confirmation(state, u, self.up("ConsistencyCheck", u, sent))
        state, shown = server.close_confirmations(state)
        for u, signatures in shown.items():
            if self.here(u, "EncryptedInput"):
                self.states[u], sent = client.upload(kept(self.states[u]), self.down("EncryptedInput", u, signatures))
                state = server.receive_upload(state, u, self.up("EncryptedInput", u, sent))
        return server.close_uploads(state)

    def decrypt(self, state, shown):
        for u, request in shown.items():
            if not self.here(u, "Decrypt"):
                continue
            request = self.down("Decrypt", u, request)
            if isinstance(request, HeldUploads | HeldAggregate):
                self.holding, sent = holder.decrypt_held(self.holding, request, self.setting)
            else:
                step = client.decrypt if self.session.params.active else client.decrypt_semi_honest
                self.states[u], sent = step(kept(self.states[u]), request, self.setting)
            state = server.receive_partial(state, u, self.up("Decrypt", u, sent))
        state, shown = server.close_partials(state)
        if isinstance(state, server.Opened):
            return state
        for u, missing in shown.items():
            if self.here(u, "Recover"):
                self.states[u], sent = client.recover(kept(self.states[u]), self.down("Recover", u, missing))
                state = server.receive_seed_shares(state, u, self.up("Recover", u, sent))
        return server.close_seed_shares(state)

    def run(self):
        return self.decrypt(*self.upload(self.agree()))


def sum_of(vectors, contributors, ring=RING):
    total = ring.zeros(vectors[0].size)
    for u in contributors:
        total += vectors[u]
    return ring.reduce(total)

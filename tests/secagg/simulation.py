"""A whole round in one loop, with anyone dropping out after any stage: what an engine does, without bytes."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from secagg import Identity, Params, Roster, Session, deterministic_entropy, least_threshold
from secagg.masking import client, server

STAGES = ("AdvertiseKeys", "ShareKeys", "MaskedInput", "ConsistencyCheck", "Unmask")


class Party:
    """A roster of n participants with their identities and entropies."""

    def __init__(
        self, n: int, *, threshold: int | None = None, mode: str = "active", dimension: int = 5, bits: int = 20
    ):
        self.entropy = {u: deterministic_entropy(b"participant %d" % u) for u in range(n)}
        self.identity = {u: Identity.generate(self.entropy[u]) for u in range(n)}
        roster = Roster.of({f"site{u:03d}": self.identity[u].public for u in range(n)})
        params = Params(roster, threshold or least_threshold(n, mode), mode)
        self.session = Session(params, bytes(32), "train", 1, bytes(32), dimension, bits)

    def vectors(self, seed: int = 0) -> dict[int, np.ndarray]:
        rng = np.random.default_rng(seed)
        ring = self.session.ring
        return {
            u: rng.integers(0, ring.modulus, self.session.dimension, dtype=ring.dtype, endpoint=False)
            if ring.bits < 64
            else rng.integers(0, 2**64, self.session.dimension, dtype=np.uint64)
            for u in self.identity
        }


def oracle(party: Party, vectors: Mapping[int, np.ndarray], survivors: frozenset[int]) -> np.ndarray:
    """The sum in Python integers."""
    modulus, dimension = party.session.ring.modulus, party.session.dimension
    return np.array([sum(int(vectors[u][i]) for u in survivors) % modulus for i in range(dimension)], dtype=object)


def run(party: Party, vectors: Mapping[int, np.ndarray], drop: Mapping[int, str] | None = None) -> server.Opened:
    """Everyone follows the protocol; participant u is gone from the stage `drop[u]` on."""
    drop = drop or {}

    def present(u: int, stage: str) -> bool:
        return u not in drop or STAGES.index(stage) < STAGES.index(drop[u])

    session = party.session
    states: dict[int, object] = {}
    keys = server.start(session)
    for u in vectors:
        if present(u, "AdvertiseKeys"):
            states[u], message = client.advertise(session, u, party.identity[u], party.entropy[u])
            keys = server.receive_keys(keys, u, message)
    shares, directories = server.close_keys(keys)
    for u, directory in directories.items():
        if present(u, "ShareKeys"):
            states[u], boxes = client.share_keys(states[u], directory, party.identity[u], party.entropy[u])
            shares = server.receive_shares(shares, u, boxes)
    collecting, inboxes = server.close_shares(shares)
    for u, inbox in inboxes.items():
        if present(u, "MaskedInput"):
            states[u], masked = client.mask_input(states[u], inbox, vectors[u])
            collecting = server.receive_vector(collecting, u, masked)
    confirming, shown = server.close_vectors(collecting)
    if session.params.active:
        for u, survivors in shown.items():
            if present(u, "ConsistencyCheck"):
                states[u], confirmation = client.confirm(states[u], survivors, party.identity[u])
                confirming = server.receive_confirmation(confirming, u, confirmation)
        unmasking, signatures = server.close_confirmations(confirming)
        for u, confirmed in signatures.items():
            if present(u, "Unmask"):
                states[u], answer = client.unmask(states[u], confirmed)
                unmasking = server.receive_unmask(unmasking, u, answer)
    else:
        unmasking = confirming
        for u, survivors in shown.items():
            if present(u, "Unmask"):
                states[u], answer = client.unmask_semi_honest(states[u], survivors)
                unmasking = server.receive_unmask(unmasking, u, answer)
    return server.close_unmask(unmasking)

"""The one interface to a secure sum, and the schemes behind it: masked and plain.

A scheme has a server, which asks for one stage's messages after the other, and a client step, which answers. Both are
bytes in and bytes out, so that the coordinator, the sites and the engines do not know which scheme they carry.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import ClassVar, Protocol

import numpy as np
import numpy.typing as npt
from msgspec import Struct

from secagg.errors import BelowThreshold, DecodeError, LocalProtocolError, RemoteProtocolError, SecAggError
from secagg.fixed_point import Floats, plan
from secagg.keys import Identity, Roster
from secagg.masking import client, server
from secagg.masking.messages import (
    Advertisement,
    Confirmation,
    ConfirmationSet,
    EncryptedShares,
    KeyDirectory,
    MaskedInput,
    ShareInbox,
    SurvivorSet,
    UnmaskShares,
)
from secagg.masking.params import Mode, Params, Session, least_threshold
from secagg.prg import Entropy, Stream
from secagg.ring import RingVector
from secagg.wire import Message, decode, encode


class Unprotected(UserWarning):
    """A sum that protects nothing."""


class Sum(Struct, frozen=True):
    """An opened sum.

    Attributes:
        total: Shape [dimension] over the session's ring.
        contributors: Numbers of the participants whose vectors it sums.
        suspects: Participants whose shares of others' secrets did not fit.
    """

    total: RingVector
    contributors: frozenset[int]
    suspects: frozenset[int] = frozenset()


class SumServer(Protocol):
    """The server's side of one sum. Stage by stage: `requests`, `receive` each answer, `close`."""

    @property
    def stage(self) -> str:
        """Name of the current stage."""

    @property
    def result(self) -> Sum | None:
        """The sum, once the last stage is closed."""

    def requests(self) -> dict[int, bytes]:
        """What to send to whom in this stage."""

    def receive(self, sender: int, answer: bytes) -> None:
        """Take one participant's answer; raises `SecAggError` and stays as it was if it is wrong."""

    def close(self) -> None:
        """End the stage with those who answered; raises `BelowThreshold` if they are too few."""


class Scheme(Protocol):
    """A way to sum: the names of its stages, and a participant's step in each."""

    name: ClassVar[str]
    stages: tuple[str, ...]
    contributes_at: str

    def server(self, session: Session) -> SumServer:
        """The server of one sum."""

    def cohort(self, stage: str, request: bytes) -> frozenset[int] | None:
        """Whose sum a participant is about to confirm, or None where the stage does not say."""

    def begin(
        self, session: Session, me: int, identity: Identity, entropy: Entropy, vector: RingVector | None
    ) -> tuple[bytes, bytes]:
        """First stage at a participant: (answer, state)."""

    def step(
        self, stage: str, state: bytes, request: bytes, identity: Identity, entropy: Entropy, vector: RingVector | None
    ) -> tuple[bytes, bytes]:
        """A later stage at a participant: (answer, state). `vector` is given at `contributes_at` only."""


class Masked:
    """Pairwise masks (`secagg.masking`): the server sees no vector but the sum."""

    name: ClassVar[str] = "masked"

    def __init__(self, mode: Mode) -> None:
        check = ("ConsistencyCheck",) if mode == "active" else ()
        self.stages: tuple[str, ...] = ("AdvertiseKeys", "ShareKeys", "MaskedInput", *check, "Unmask")
        self.contributes_at = "MaskedInput"

    def server(self, session: Session) -> SumServer:
        """The server of one sum."""
        return _MaskedServer(session)

    def cohort(self, stage: str, request: bytes) -> frozenset[int] | None:
        """The survivors, at the stage that shows them.

        Raises:
            DecodeError: The request is no message of the stage.
        """
        shown_at = "ConsistencyCheck" if "ConsistencyCheck" in self.stages else "Unmask"
        return frozenset(decode(request, SurvivorSet).survivors) if stage == shown_at else None

    def begin(
        self, session: Session, me: int, identity: Identity, entropy: Entropy, vector: RingVector | None = None
    ) -> tuple[bytes, bytes]:
        """Stage AdvertiseKeys."""
        state, message = client.advertise(session, me, identity, entropy)
        return encode(message), encode(state)

    def step(
        self,
        stage: str,
        state: bytes,
        request: bytes,
        identity: Identity,
        entropy: Entropy,
        vector: RingVector | None = None,
    ) -> tuple[bytes, bytes]:
        """The stages after AdvertiseKeys.

        Raises:
            RemoteProtocolError: The stage does not follow on the state, or the server lied.
            DecodeError: The request is no message of the stage.
        """
        message: Message
        next_state: client.ClientState
        match stage, client.decode_state(state):
            case "ShareKeys", client.Advertised() as advertised:
                directory = decode(request, KeyDirectory)
                next_state, message = client.share_keys(advertised, directory, identity, entropy)
            case "MaskedInput", client.Shared() as shared:
                if vector is None:
                    raise LocalProtocolError("the stage MaskedInput needs the participant's vector")
                next_state, message = client.mask_input(shared, decode(request, ShareInbox), vector)
            case "ConsistencyCheck", client.Masked() as masked:
                next_state, message = client.confirm(masked, decode(request, SurvivorSet), identity)
            case "Unmask", client.Confirmed() as confirmed:
                next_state, message = client.unmask(confirmed, decode(request, ConfirmationSet))
            case "Unmask", client.Masked() as masked:
                next_state, message = client.unmask_semi_honest(masked, decode(request, SurvivorSet))
            case _, other:
                raise RemoteProtocolError(f"stage {stage} cannot follow on {type(other).__name__}: early or repeated")
        return encode(message), encode(next_state)


class _MaskedServer:
    """The states of `secagg.masking.server`, driven by bytes."""

    def __init__(self, session: Session) -> None:
        self._state: (
            server.CollectingKeys
            | server.CollectingShares
            | server.CollectingVectors
            | server.CollectingConfirmations
            | server.CollectingUnmask
            | server.Opened
        ) = server.start(session)
        self._outgoing: Mapping[int, Message | None] = dict.fromkeys(range(len(session.params.roster)))
        self._roster = session.params.roster

    @property
    def stage(self) -> str:
        names = {
            server.CollectingKeys: "AdvertiseKeys",
            server.CollectingShares: "ShareKeys",
            server.CollectingVectors: "MaskedInput",
            server.CollectingConfirmations: "ConsistencyCheck",
            server.CollectingUnmask: "Unmask",
            server.Opened: "done",
        }
        return names[type(self._state)]

    @property
    def result(self) -> Sum | None:
        state = self._state
        return Sum(state.total, state.survivors, state.suspects) if isinstance(state, server.Opened) else None

    def requests(self) -> dict[int, bytes]:
        # The same directory goes to everyone: encode it once.
        encoded: dict[int, bytes] = {}
        return {
            u: b"" if message is None else encoded.setdefault(id(message), encode(message))
            for u, message in self._outgoing.items()
        }

    def receive(self, sender: int, answer: bytes) -> None:
        try:
            match self._state:
                case server.CollectingKeys() as keys:
                    self._state = server.receive_keys(keys, sender, decode(answer, Advertisement))
                case server.CollectingShares() as shares:
                    self._state = server.receive_shares(shares, sender, decode(answer, EncryptedShares))
                case server.CollectingVectors() as vectors:
                    self._state = server.receive_vector(vectors, sender, decode(answer, MaskedInput))
                case server.CollectingConfirmations() as confirmations:
                    self._state = server.receive_confirmation(confirmations, sender, decode(answer, Confirmation))
                case server.CollectingUnmask() as unmask:
                    self._state = server.receive_unmask(unmask, sender, decode(answer, UnmaskShares))
                case server.Opened():
                    raise LocalProtocolError("the sum is open; nothing more is expected")
        except DecodeError as error:
            name = self._roster.name(sender)
            raise RemoteProtocolError(f"{name} sent no message of stage {self.stage}: {error}", [name]) from error

    def close(self) -> None:
        match self._state:
            case server.CollectingKeys() as keys:
                self._state, self._outgoing = server.close_keys(keys)
            case server.CollectingShares() as shares:
                self._state, self._outgoing = server.close_shares(shares)
            case server.CollectingVectors() as vectors:
                self._state, self._outgoing = server.close_vectors(vectors)
            case server.CollectingConfirmations() as confirmations:
                self._state, self._outgoing = server.close_confirmations(confirmations)
            case server.CollectingUnmask() as unmask:
                self._state, self._outgoing = server.close_unmask(unmask), {}
            case server.Opened():
                raise LocalProtocolError("the sum is open; there is no stage to close")


class Plain:
    """No protection: the server sees every vector. For comparison; a coordinator that uses it warns."""

    name: ClassVar[str] = "plain"
    stages: tuple[str, ...] = ("Submit",)
    contributes_at = "Submit"

    def __init__(self, threshold: int) -> None:
        self._threshold = threshold

    def server(self, session: Session) -> SumServer:
        """The server of one sum."""
        return _PlainServer(session, self._threshold)

    def cohort(self, stage: str, request: bytes) -> frozenset[int] | None:
        """Nobody is told who is in a plain sum."""
        return None

    def begin(
        self, session: Session, me: int, identity: Identity, entropy: Entropy, vector: RingVector | None = None
    ) -> tuple[bytes, bytes]:
        """The only stage: hand the vector over."""
        if vector is None:
            raise LocalProtocolError("the stage Submit needs the participant's vector")
        session.ring.check(vector, session.dimension)
        return encode(MaskedInput(session.ring.pack(vector))), b""

    def step(
        self,
        stage: str,
        state: bytes,
        request: bytes,
        identity: Identity,
        entropy: Entropy,
        vector: RingVector | None = None,
    ) -> tuple[bytes, bytes]:
        """There is no second stage."""
        raise RemoteProtocolError(f"a plain sum has no stage {stage}")


class _PlainServer:
    stage = "Submit"

    def __init__(self, session: Session, threshold: int) -> None:
        self._session, self._threshold = session, threshold
        self._total = session.ring.zeros(session.dimension)
        self._contributors: frozenset[int] = frozenset()
        self.result: Sum | None = None

    def requests(self) -> dict[int, bytes]:
        return dict.fromkeys(range(len(self._session.params.roster)), b"")

    def receive(self, sender: int, answer: bytes) -> None:
        name = self._session.params.roster.name(sender)
        if sender in self._contributors:
            raise RemoteProtocolError(f"{name} answered twice; the first answer stands", [name])
        try:
            packed = decode(answer, MaskedInput).packed
            self._total += self._session.ring.unpack(packed, self._session.dimension)
        except DecodeError as error:
            raise RemoteProtocolError(f"{name} sent no vector of this session: {error}", [name]) from error
        self._contributors |= {sender}

    def close(self) -> None:
        if len(self._contributors) < self._threshold:
            raise BelowThreshold("Submit", len(self._contributors), self._threshold)
        self.result = Sum(self._session.ring.reduce(self._total), self._contributors)


def secure_mean(
    values: Mapping[str, Floats],
    weights: Mapping[str, int],
    *,
    max_value: float,
    max_weight: int | None = None,
    fraction_bits: int = 16,
    threshold: int | None = None,
    entropy: Entropy = os.urandom,
) -> tuple[int, npt.NDArray[np.float64]]:
    """The weighted mean of several participants' vectors through the whole masked protocol, in this process.

    For trying out and for tests: every party's secrets are in one process here.

    Args:
        values: Participant's name to a float vector of shape [d]; at least three participants.
        weights: Participant's name to its weight, an integer from 0.
        max_value: Largest absolute value of an entry; larger ones are clipped.
        max_weight: Largest weight; by default the largest that came.
        fraction_bits: f: weighted values are rounded, without bias, to multiples of 2^-f.
        threshold: How many must stay; by default the least that the active mode allows.
        entropy: Source of all keys, masks and rounding.

    Returns:
        The sum of the weights and the weighted mean, float64 of shape [d].

    Raises:
        SecAggError: Fewer than three participants, shapes that differ, NaN or infinity, a weight out of range, or
            weights that are all zero; the message names the participant.

    >>> import numpy as np
    >>> gradients = {"a": np.array([1.0, 1.0]), "b": np.array([-1.0, -1.0]), "c": np.zeros(2)}
    >>> secure_mean(gradients, {"a": 1, "b": 1, "c": 0}, max_value=1.0)
    (2, array([0., 0.]))
    """
    if values.keys() != weights.keys():
        raise LocalProtocolError(f"values of {sorted(values)} but weights of {sorted(weights)}")
    names = sorted(values)
    for name in names:
        weight = weights[name]
        if isinstance(weight, bool) or not isinstance(weight, int) or weight < 0:
            raise LocalProtocolError(f"{name}: expected a weight that is a whole number from 0, got {weight!r}")
    identities = {name: Identity.generate(entropy) for name in names}
    roster = Roster.of({name: identities[name].public for name in names})
    params = Params(roster, threshold or least_threshold(len(names), "active"))
    fixed = plan(len(names), max_value, max_weight or max(1, *weights.values()), fraction_bits=fraction_bits)
    size = np.size(values[names[0]])
    session = Session(params, bytes(32), "mean", 0, bytes(32), 1 + size, fixed.ring_bits)
    vectors: list[RingVector] = []
    for name in names:
        try:
            if np.shape(values[name]) != (size,):
                raise LocalProtocolError(f"expected shape ({size},) as {names[0]} has, got {np.shape(values[name])}")
            vectors.append(fixed.encode(values[name], weights[name], Stream(entropy(16))).vector)
        except SecAggError as error:
            raise type(error)(f"{name}: {error}") from error
    scheme = Masked("active")
    sums, states = scheme.server(session), [b""] * len(names)
    while sums.result is None:
        stage = sums.stage
        for u, request in sums.requests().items():
            identity = identities[names[u]]
            if stage == scheme.stages[0]:
                answer, states[u] = scheme.begin(session, u, identity, entropy)
            else:
                vector = vectors[u] if stage == scheme.contributes_at else None
                answer, states[u] = scheme.step(stage, states[u], request, identity, entropy, vector)
            sums.receive(u, answer)
        sums.close()
    return fixed.decode(sums.result.total)

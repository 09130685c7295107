"""The one interface to a secure sum, and two schemes behind it: masked and plain. The third is in `homomorphic`.

A scheme has a server and a participant's step for each of its stages, bytes in and bytes out, so that the coordinator,
the sites and the engines do not know which scheme they carry. First keys are agreed (`setup`), then one vector of each
is summed under them (`stages`). The keys of the next sum are agreed while one is under way: `ahead` says which stage of
the key agreement travels with which stage of the sum.
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
from secagg.masking.params import Mode, Params, Session, Subject, differences, least_threshold
from secagg.masking.transcript import Record, record
from secagg.prg import Entropy, Stream
from secagg.ring import RingVector
from secagg.wire import Message, decode, encode

Bytes = bytes | memoryview


class Unprotected(UserWarning):
    """A sum that protects nothing."""


class Sum(Struct, frozen=True):
    """An opened sum.

    Attributes:
        total: Shape [dimension] over the subject's ring.
        contributors: Numbers of the participants whose vectors it sums.
        suspects: Participants whose shares of others' secrets did not fit.
        record: What was signed on the way, where anything was.
    """

    total: RingVector
    contributors: frozenset[int]
    suspects: frozenset[int] = frozenset()
    record: Record | None = None


class Staged(Protocol):
    """A server's side, stage by stage: `requests`, `receive` each answer, `close`."""

    @property
    def stage(self) -> str:
        """Name of the current stage."""

    def requests(self) -> dict[int, bytes]:
        """What to send to whom in this stage."""

    def receive(self, sender: int, answer: Bytes) -> None:
        """Take one participant's answer; raises `SecAggError` and stays as it was if it is wrong."""

    def close(self) -> None:
        """End the stage with those who answered; raises `BelowThreshold` if they are too few."""


class SumServer(Staged, Protocol):
    """The server's side of one sum."""

    @property
    def result(self) -> Sum | None:
        """The sum, once the last stage is closed."""


class KeyServer(Staged, Protocol):
    """The server's side of agreeing on the keys of one sum."""

    @property
    def members(self) -> frozenset[int] | None:
        """Who has agreed, once the last stage is closed."""

    def begin(self, subject: Subject) -> SumServer:
        """Use the keys for a sum, once."""


class Scheme(Protocol):
    """A way to sum: the names of its stages, and a participant's step in each.

    `last` is the last stage of `stages` that every sum has.
    """

    name: ClassVar[str]
    last: str
    setup: tuple[str, ...]
    stages: tuple[str, ...]
    ahead: Mapping[str, str]

    def keys(self, session: Session) -> KeyServer:
        """The server that agrees on the keys of one sum."""

    def cohort(self, stage: str, request: Bytes) -> frozenset[int] | None:
        """Whose sum a participant is about to confirm, or None where the stage does not say."""

    def agree(
        self, stage: str, session: Session, me: int, state: bytes, request: Bytes, identity: Identity, entropy: Entropy
    ) -> tuple[bytes, bytes]:
        """A stage of `setup` at a participant: (answer, state)."""

    def contribute(
        self,
        session: Session,
        me: int,
        state: bytes,
        request: Bytes,
        subject: Subject,
        vector: RingVector,
        identity: Identity,
    ) -> tuple[bytes, bytes]:
        """The first stage of `stages` at a participant, from the state after `setup`: (answer, state)."""

    def step(self, stage: str, state: bytes, request: Bytes, identity: Identity) -> tuple[bytes, bytes]:
        """A later stage at a participant: (answer, state)."""


class Masked:
    """Pairwise masks (`secagg.masking`): the server sees no vector but the sum."""

    name: ClassVar[str] = "masked"
    last: str = "Unmask"
    setup: tuple[str, ...] = ("AdvertiseKeys", "ShareKeys")

    def __init__(self, mode: Mode) -> None:
        check = ("ConsistencyCheck",) if mode == "active" else ()
        self.stages: tuple[str, ...] = ("MaskedInput", *check, "Unmask")
        self.ahead: Mapping[str, str] = dict(zip(self.stages, self.setup, strict=False))

    def keys(self, session: Session) -> KeyServer:
        """The server that agrees on the keys of one sum."""
        return _MaskedKeys(session)

    def cohort(self, stage: str, request: Bytes) -> frozenset[int] | None:
        """The survivors, at the stage that shows them.

        Raises:
            DecodeError: The request is no message of the stage.
        """
        return frozenset(decode(request, SurvivorSet).survivors) if stage == self.stages[1] else None

    def agree(
        self, stage: str, session: Session, me: int, state: bytes, request: Bytes, identity: Identity, entropy: Entropy
    ) -> tuple[bytes, bytes]:
        """The stages AdvertiseKeys, for which `state` is not looked at, and ShareKeys.

        Raises:
            RemoteProtocolError: The stage does not follow on the state, or the server lied.
            DecodeError: The request is no message of the stage.
        """
        next_state: client.ClientState
        message: Message
        if stage == "AdvertiseKeys":
            next_state, message = client.advertise(session, me, identity, entropy)
            return encode(message), encode(next_state)
        match stage, _state(state):
            case "ShareKeys", client.Advertised() as advertised:
                next_state, message = client.share_keys(advertised, decode(request, KeyDirectory), identity, entropy)
            case _, other:
                raise out_of_turn(stage, other)
        return encode(message), encode(next_state)

    def contribute(
        self,
        session: Session,
        me: int,
        state: bytes,
        request: Bytes,
        subject: Subject,
        vector: RingVector,
        identity: Identity,
    ) -> tuple[bytes, bytes]:
        """The stage MaskedInput.

        Raises:
            RemoteProtocolError, DecodeError: As in `agree`.
        """
        match _state(state):
            case client.Shared() as shared:
                next_state, message = client.mask_input(shared, decode(request, ShareInbox), subject, vector)
            case other:
                raise out_of_turn("MaskedInput", other)
        return encode(message), encode(next_state)

    def step(self, stage: str, state: bytes, request: Bytes, identity: Identity) -> tuple[bytes, bytes]:
        """The stages after MaskedInput.

        Raises:
            RemoteProtocolError, DecodeError: As in `agree`.
        """
        message: Message
        next_state: client.ClientState
        match stage, _state(state):
            case "ConsistencyCheck", client.Masked() as masked:
                next_state, message = client.confirm(masked, decode(request, SurvivorSet), identity)
            case "Unmask", client.Confirmed() as confirmed:
                next_state, message = client.unmask(confirmed, decode(request, ConfirmationSet))
            case "Unmask", client.Masked() as masked:
                next_state, message = client.unmask_semi_honest(masked, decode(request, SurvivorSet))
            case _, other:
                raise out_of_turn(stage, other)
        return encode(message), encode(next_state)


def _state(state: bytes) -> client.ClientState | None:
    return client.decode_state(state) if state else None


def out_of_turn(stage: str, state: object) -> RemoteProtocolError:
    """The error for a stage that does not follow on a participant's state, or on None where there is no state yet."""
    before = "nothing" if state is None else type(state).__name__
    return RemoteProtocolError(f"stage {stage} cannot follow on {before}: early or repeated")


class _MaskedKeys:
    """The first states of `secagg.masking.server`, driven by bytes."""

    def __init__(self, session: Session) -> None:
        self._state: server.CollectingKeys | server.CollectingShares | server.Agreed = server.start(session)
        self._outgoing: Mapping[int, Message | None] = dict.fromkeys(range(len(session.params.roster)))
        self._used = False
        self._roster = session.params.roster

    @property
    def stage(self) -> str:
        names = {server.CollectingKeys: "AdvertiseKeys", server.CollectingShares: "ShareKeys", server.Agreed: "done"}
        return names[type(self._state)]

    @property
    def members(self) -> frozenset[int] | None:
        return frozenset(self._state.commitments) if isinstance(self._state, server.Agreed) else None

    def requests(self) -> dict[int, bytes]:
        return encoded(self._outgoing)

    def receive(self, sender: int, answer: Bytes) -> None:
        try:
            match self._state:
                case server.CollectingKeys() as keys:
                    self._state = server.receive_keys(keys, sender, decode(answer, Advertisement))
                case server.CollectingShares() as shares:
                    self._state = server.receive_shares(shares, sender, decode(answer, EncryptedShares))
                case server.Agreed():
                    raise LocalProtocolError("the keys are agreed; nothing more is expected")
        except DecodeError as error:
            raise no_message(self._roster.name(sender), self.stage, error) from error

    def close(self) -> None:
        match self._state:
            case server.CollectingKeys() as keys:
                self._state, self._outgoing = server.close_keys(keys)
            case server.CollectingShares() as shares:
                self._state, self._outgoing = server.close_shares(shares), {}
            case server.Agreed():
                raise LocalProtocolError("the keys are agreed; there is no stage to close")

    def begin(self, subject: Subject) -> SumServer:
        if not isinstance(self._state, server.Agreed):
            raise LocalProtocolError(f"the keys are at {self.stage} still: there is nothing to sum under")
        if self._used:
            raise LocalProtocolError("the keys have served for a sum, and serve only once")
        self._used = True
        return _MaskedSum(self._state, subject)


class _MaskedSum:
    """The later states of `secagg.masking.server`, driven by bytes."""

    def __init__(self, agreed: server.Agreed, subject: Subject) -> None:
        self._state: server.CollectingVectors | server.CollectingConfirmations | server.CollectingUnmask | server.Opened
        self._outgoing: Mapping[int, Message]
        self._state, self._outgoing = server.begin_sum(agreed, subject)
        self._roster = agreed.session.params.roster
        self.result: Sum | None = None

    @property
    def stage(self) -> str:
        names = {
            server.CollectingVectors: "MaskedInput",
            server.CollectingConfirmations: "ConsistencyCheck",
            server.CollectingUnmask: "Unmask",
            server.Opened: "done",
        }
        return names[type(self._state)]

    def requests(self) -> dict[int, bytes]:
        return encoded(self._outgoing)

    def receive(self, sender: int, answer: Bytes) -> None:
        try:
            match self._state:
                case server.CollectingVectors() as vectors:
                    self._state = server.receive_vector(vectors, sender, decode(answer, MaskedInput))
                case server.CollectingConfirmations() as confirmations:
                    self._state = server.receive_confirmation(confirmations, sender, decode(answer, Confirmation))
                case server.CollectingUnmask() as unmask:
                    self._state = server.receive_unmask(unmask, sender, decode(answer, UnmaskShares))
                case server.Opened():
                    raise LocalProtocolError("the sum is open; nothing more is expected")
        except DecodeError as error:
            raise no_message(self._roster.name(sender), self.stage, error) from error

    def close(self) -> None:
        match self._state:
            case server.CollectingVectors() as vectors:
                self._state, self._outgoing = server.close_vectors(vectors)
            case server.CollectingConfirmations() as confirmations:
                self._state, self._outgoing = server.close_confirmations(confirmations)
            case server.CollectingUnmask() as unmask:
                opened = server.close_unmask(unmask)
                signed = record(opened) if opened.session.params.active else None
                self.result = Sum(opened.total, opened.survivors, opened.suspects, signed)
                self._state, self._outgoing = opened, {}
            case server.Opened():
                raise LocalProtocolError("the sum is open; there is no stage to close")


def encoded(outgoing: Mapping[int, Message | None]) -> dict[int, bytes]:
    """Everyone's message in bytes. What goes to everyone alike is encoded once."""
    encoded: dict[int, bytes] = {}
    return {
        u: b"" if message is None else encoded.setdefault(id(message), encode(message))
        for u, message in outgoing.items()
    }


def no_message(name: str, stage: str, error: DecodeError) -> RemoteProtocolError:
    """The error for bytes that are no message of the stage."""
    return RemoteProtocolError(f"{name} sent no message of stage {stage}: {error}", [name])


class Plain:
    """No protection: the server sees every vector. For comparison; a coordinator that uses it warns."""

    name: ClassVar[str] = "plain"
    last: str = "Submit"
    setup: tuple[str, ...] = ()
    stages: tuple[str, ...] = ("Submit",)
    ahead: Mapping[str, str] = {}

    def __init__(self, threshold: int) -> None:
        self._threshold = threshold

    def keys(self, session: Session) -> KeyServer:
        """There are none to agree on."""
        return _PlainKeys(session, self._threshold)

    def cohort(self, stage: str, request: Bytes) -> frozenset[int] | None:
        """Nobody is told who is in a plain sum."""
        return None

    def agree(
        self, stage: str, session: Session, me: int, state: bytes, request: Bytes, identity: Identity, entropy: Entropy
    ) -> tuple[bytes, bytes]:
        """There is no such stage."""
        raise RemoteProtocolError(f"a plain sum has no stage {stage}")

    def contribute(
        self,
        session: Session,
        me: int,
        state: bytes,
        request: Bytes,
        subject: Subject,
        vector: RingVector,
        identity: Identity,
    ) -> tuple[bytes, bytes]:
        """The only stage: hand the vector over."""
        subject.ring.check(vector, subject.dimension)
        return encode(MaskedInput(session.terms, subject, subject.ring.pack(vector))), b""

    def step(self, stage: str, state: bytes, request: Bytes, identity: Identity) -> tuple[bytes, bytes]:
        """There is no second stage."""
        raise RemoteProtocolError(f"a plain sum has no stage {stage}")


class _PlainKeys:
    stage = "done"

    def __init__(self, session: Session, threshold: int) -> None:
        self._session, self._threshold = session, threshold
        self.members: frozenset[int] | None = frozenset(range(len(session.params.roster)))

    def requests(self) -> dict[int, bytes]:
        return {}

    def receive(self, sender: int, answer: Bytes) -> None:
        raise LocalProtocolError("a plain sum has no keys to agree on")

    def close(self) -> None:
        raise LocalProtocolError("a plain sum has no keys to agree on")

    def begin(self, subject: Subject) -> SumServer:
        return _PlainSum(self._session, subject, self._threshold)


class _PlainSum:
    stage = "Submit"

    def __init__(self, session: Session, subject: Subject, threshold: int) -> None:
        self._session, self._subject, self._threshold = session, subject, threshold
        self._total = subject.ring.zeros(subject.dimension)
        self._contributors: frozenset[int] = frozenset()
        self.result: Sum | None = None

    def requests(self) -> dict[int, bytes]:
        return dict.fromkeys(range(len(self._session.params.roster)), b"")

    def receive(self, sender: int, answer: Bytes) -> None:
        name = self._session.params.roster.name(sender)
        if sender in self._contributors:
            raise RemoteProtocolError(f"{name} answered twice; the first answer stands", [name])
        try:
            message = decode(answer, MaskedInput)
            told = differences(message.terms, self._session.terms) or differences(message.subject, self._subject)
            if told:
                raise RemoteProtocolError(f"{name} did not sum what was asked for: {told}", [name])
            self._subject.ring.add_packed(self._total, message.packed)
        except DecodeError as error:
            raise RemoteProtocolError(f"{name} sent no vector of this sum: {error}", [name]) from error
        self._contributors |= {sender}

    def close(self) -> None:
        if len(self._contributors) < self._threshold:
            raise BelowThreshold("Submit", len(self._contributors), self._threshold)
        self.result = Sum(self._subject.ring.reduce(self._total), self._contributors)


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
    session = Session(params, bytes(32), 0)
    subject = Subject("mean", bytes(32), bytes(32), 1 + size, fixed.ring_bits)
    vectors: list[RingVector] = []
    for name in names:
        try:
            if np.shape(values[name]) != (size,):
                raise LocalProtocolError(f"expected shape ({size},) as {names[0]} has, got {np.shape(values[name])}")
            vectors.append(fixed.encode(values[name], weights[name], Stream(entropy(16))).vector)
        except SecAggError as error:
            raise type(error)(f"{name}: {error}") from error
    scheme, states = Masked("active"), [b""] * len(names)
    keys = scheme.keys(session)
    while keys.members is None:
        for u, request in keys.requests().items():
            identity = identities[names[u]]
            answer, states[u] = scheme.agree(keys.stage, session, u, states[u], request, identity, entropy)
            keys.receive(u, answer)
        keys.close()
    sums = keys.begin(subject)
    while sums.result is None:
        for u, request in sums.requests().items():
            if sums.stage == scheme.stages[0]:
                answer, states[u] = scheme.contribute(
                    session, u, states[u], request, subject, vectors[u], identities[names[u]]
                )
            else:
                answer, states[u] = scheme.step(sums.stage, states[u], request, identities[names[u]])
            sums.receive(u, answer)
        sums.close()
    return fixed.decode(sums.result.total)

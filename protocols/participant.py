"""A site's side of one secure sum after the other: bytes in, bytes out, and what is summed is its subclass's affair.

Keys agreed ahead, stages in turn, identical answers to retries, the policy's cohorts and ages: what is the same for a
study (`protocols.site`) and for the app of somebody else (`protocols.app_site`).
"""

from __future__ import annotations

import hashlib
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar

import msgspec

from dp import BudgetExceeded, DpError
from protocols.aggregation import Scheme
from protocols.errors import DataError, PolicyRefusal
from protocols.memory import Memory, remember
from protocols.messages import (
    Answer,
    FinishRequest,
    KeysRequest,
    Part,
    Reason,
    Refusal,
    Reply,
    Request,
    SumRequest,
)
from protocols.policy import Policy
from secagg.errors import DecodeError, LocalProtocolError, RemoteProtocolError, SecAggError
from secagg.keys import Identity, Roster
from secagg.masking.params import Session, Subject
from secagg.prg import Entropy, Label, Stream, derive
from secagg.ring import RingVector
from secagg.wire import decode, encode


class Participant(ABC):
    """One site in a series of secure sums.

    Args:
        name: Its name on the roster.
        identity: Its long-term key.
        roster: All participants' keys, as compared by fingerprint.
        scheme: How vectors are summed.
        digest: Of what all sites have agreed on; every sum is bound to it.
        policy: What the site agrees to, whatever the others say.
        entropy: Source of keys, masks, rounding and privacy noise.
        clock: Gives the time in seconds, against the policy's longest session.

    Attributes:
        log: Why it refused, in full. For the site's own eyes.

    Raises:
        LocalProtocolError: Nobody of that name is on the roster.
    """

    what: ClassVar[str] = "study"
    """What all sites have agreed on, for messages."""

    def __init__(
        self,
        name: str,
        identity: Identity,
        roster: Roster,
        scheme: Scheme,
        digest: bytes,
        *,
        policy: Policy,
        entropy: Entropy = os.urandom,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.name = name
        self.log: list[str] = []
        self._identity, self._roster, self._scheme, self._digest = identity, roster, scheme, digest
        self._policy, self._entropy, self._clock = policy, entropy, clock
        self._me = roster.number(name)

    @abstractmethod
    def _session(self, number: int) -> Session:
        """What the keys of one sum are agreed for."""

    @abstractmethod
    def _subject(self, message: SumRequest) -> Subject:
        """What one sum is of, asked for when its vector is there."""

    @abstractmethod
    def _compared(self, message: SumRequest) -> bytes:
        """What the sum depends on: the cohorts of two sums with the same are compared."""

    @abstractmethod
    def _check_agreed(self, message: SumRequest, memory: Memory) -> None:
        """Refuse sums that were not agreed: whatever the server asks for, a site gives no more than that."""

    @abstractmethod
    def _check_more(self, memory: Memory) -> None:
        """Refuse to agree on keys where no sum is left to give."""

    @abstractmethod
    def _charge(self, message: SumRequest, memory: Memory, seed: bytes) -> Memory:
        """Charge a sum before anything is computed for it."""

    @abstractmethod
    def _contribute(self, message: SumRequest, memory: Memory, entropy: Entropy) -> tuple[RingVector, int]:
        """The site's vector for a sum, over the ring, and how many local steps it took."""

    def _contributed(self, message: SumRequest, memory: Memory) -> None:  # noqa: B027 - not every site keeps a ledger
        """The vector is masked, and leaves."""

    def _confirmed(self, memory: Memory, shown: frozenset[int]) -> Memory:
        """The cohort is fixed, and fits the policy."""
        return memory

    def _on_receipts(self, receipts: tuple[bytes, ...]) -> None:  # noqa: B027 - likewise
        """Look at the ends of the others' ledgers."""

    def _receipt(self, memory: Memory) -> tuple[bytes, Memory]:
        """The end of the site's own ledger, where it has one."""
        return b"", memory

    def _finish(self, message: FinishRequest, memory: Memory) -> tuple[bytes, Memory]:
        """Sign that nothing comes after, where there is an end."""
        raise RemoteProtocolError(f"the {self.what} has no end that is signed")

    def handle(self, request: bytes, state: bytes) -> tuple[bytes, bytes]:
        """Answer one request.

        What goes wrong does not raise: the site refuses that part of the request, says why in one word to the
        coordinator and in full to its own `log`, and is out of that sum. A retry of the last request gets the identical
        bytes back, because a second vector under the same masks would show the difference of the two.

        Args:
            request: An encoded `Request`.
            state: What the last call gave; empty at the start.

        Returns:
            The encoded reply and the next state.

        Raises:
            DecodeError: The state is not this site's.
        """
        memory = remember(state)
        if memory.stages_done >= len(self._scheme.stages) or memory.keys_done > len(self._scheme.setup):
            raise DecodeError(f"not a state of this site: it has done more stages than its {self.what}'s sums have")
        if memory.study not in (b"", self._digest):
            raise DecodeError(
                f"the state of {self.name} is of another {self.what} (digest {memory.study.hex()[:16]}, this one has "
                f"{self._digest.hex()[:16]}): each {self.what} has a state of its own"
            )
        digest = hashlib.sha256(request).digest()
        if digest == memory.last_request:
            return memory.last_reply, state
        reply, memory = self._answer(request, memory)
        encoded = encode(reply)
        return encoded, encode(msgspec.structs.replace(memory, last_request=digest, last_reply=encoded))

    def _answer(self, request: bytes, memory: Memory) -> tuple[Reply, Memory]:
        try:
            message = decode(request, Request)
        except DecodeError as error:
            return Reply(sum=self._refuse(error)), memory
        # What is drawn now depends on the seed kept before alone, so that it comes out the same if asked again. What is
        # drawn later cannot be told from it, nor the other way round: the next seed is a one-way and a fresh one.
        seed = memory.seed or self._entropy(32)
        fresh = derive(seed + self._entropy(32), Label.STAGE, bytes(32), 0)
        memory = msgspec.structs.replace(memory, study=self._digest, seed=fresh)
        on_sum = on_keys = on_finish = None
        if message.sum is not None:
            on_sum, memory = self._on_sum(message.sum, memory, seed)
        if message.keys is not None:
            on_keys, memory = self._on_keys(message.keys, memory, seed)
        if message.finish is not None:
            on_finish, memory = self._on_finish(message.finish, memory)
        receipt = b""
        if isinstance(on_sum, Answer):
            receipt, memory = self._receipt(memory)
        return Reply(on_sum, on_keys, on_finish, receipt), memory

    def _refuse(self, error: Exception) -> Refusal:
        self.log.append(f"{self.name}: {error}")
        return Refusal(reason_of(error))

    def _on_keys(self, message: KeysRequest, memory: Memory, seed: bytes) -> tuple[Part, Memory]:
        scheme = self._scheme
        try:
            memory = self._admit_keys(message, memory)
            session = self._session(message.round)
            entropy = Stream(derive(seed, Label.STAGE, session.id, 1)).read
            body, keys_state = scheme.agree(
                message.stage, session, self._me, memory.keys_state, message.body, self._identity, entropy
            )
        except (SecAggError, DpError) as error:
            return self._refuse(error), memory.without_keys()
        memory = msgspec.structs.replace(memory, keys_done=memory.keys_done + 1, keys_state=keys_state)
        return Answer(memoryview(body)), memory

    def _admit_keys(self, message: KeysRequest, memory: Memory) -> Memory:
        """Check that the message follows on the last one.

        Raises:
            RemoteProtocolError: It does not follow, or there are no more sums.
            BudgetExceeded: The sum would cost too much.
        """
        setup = self._scheme.setup
        self._check_open(memory)
        if setup and message.stage == setup[0]:
            if message.round <= memory.advertised:
                raise RemoteProtocolError(
                    f"round {message.round} comes after round {memory.advertised}: each comes once"
                )
            self._check_more(memory)
            memory = msgspec.structs.replace(memory.without_keys(), advertised=message.round, keys_began=self._clock())
        elif message.round != memory.advertised:
            raise RemoteProtocolError(f"keys of round {message.round} follow on those of round {memory.advertised}")
        due = setup[memory.keys_done] if memory.keys_done < len(setup) else "the sum"
        if message.stage != due:
            raise RemoteProtocolError(f"stage {message.stage} came where {due} was due")
        self._policy.check_age(self._clock() - memory.keys_began)
        return memory

    def _on_sum(self, message: SumRequest, memory: Memory, seed: bytes) -> tuple[Part, Memory]:
        scheme, steps = self._scheme, 0
        try:
            memory = self._admit_sum(message, memory, seed)
            # From here on the round is charged, whatever comes of it.
            self._on_receipts(message.receipts)
            if message.stage == scheme.stages[0]:
                entropy = Stream(derive(seed, Label.STAGE, message.work_digest, 2)).read
                vector, steps = self._contribute(message, memory, entropy)
                session, subject = self._session(message.round), self._subject(message)
                body, sum_state = scheme.contribute(
                    session, self._me, memory.sum_state, message.body, subject, vector, self._identity
                )
                self._contributed(message, memory)
            else:
                body, sum_state = scheme.step(message.stage, memory.sum_state, message.body, self._identity)
        except (SecAggError, DpError) as error:
            memory = memory.without_sum()
            waiting = memory.advertised if memory.keys_done == len(scheme.setup) else None
            if message.stage == scheme.stages[0] and message.round == waiting:
                memory = memory.without_keys()  # no second try under them
            return self._refuse(error), memory
        memory = msgspec.structs.replace(
            memory, stages_done=memory.stages_done + 1, sum_state=sum_state, steps=memory.steps + steps
        )
        if memory.stages_done == len(scheme.stages):
            memory = memory.without_sum()
        return Answer(memoryview(body)), memory

    def _admit_sum(self, message: SumRequest, memory: Memory, seed: bytes) -> Memory:
        """Check that the message follows on the last one, and charge the round if it is the one to contribute at.

        Raises:
            RemoteProtocolError: It does not follow, or asks for less than the policy's conditions.
            BudgetExceeded: The round would cost too much; nothing is charged.
        """
        stages = self._scheme.stages
        self._check_open(memory)
        if message.stage == stages[0]:
            memory = self._begin_sum(message, memory)
        ours = memory.round, memory.purpose, memory.work_digest, memory.previous
        if (message.round, message.purpose, message.work_digest, message.previous) != ours:
            raise RemoteProtocolError(f"round {memory.round} goes on with another number, purpose, model or past")
        if message.stage != stages[memory.stages_done]:
            raise RemoteProtocolError(f"stage {message.stage} came where {stages[memory.stages_done]} was due")
        self._policy.check_age(self._clock() - memory.sum_began)
        if (shown := self._scheme.cohort(message.stage, message.body)) is not None:
            memory = self._confirm_cohort(memory, shown)
        return self._charge(message, memory, seed) if message.stage == stages[0] else memory

    def _begin_sum(self, message: SumRequest, memory: Memory) -> Memory:
        """Move the keys that wait for this sum to their use."""
        setup = self._scheme.setup
        if message.round <= memory.round:
            raise RemoteProtocolError(f"round {message.round} comes after round {memory.round}: each comes once")
        if setup and (message.round != memory.advertised or memory.keys_done != len(setup)):
            raise RemoteProtocolError(f"round {message.round} begins, and no keys were agreed for it")
        self._check_agreed(message, memory)
        if hashlib.sha256(message.work or b"").digest() != message.work_digest:
            raise RemoteProtocolError("the model that came is not the one that the sum is said to be about")
        return msgspec.structs.replace(
            memory.without_keys(),
            round=message.round,
            purpose=message.purpose,
            work_digest=message.work_digest,
            previous=message.previous,
            stages_done=0,
            sum_state=memory.keys_state,
            sum_began=memory.keys_began if setup else self._clock(),
            compared=self._compared(message),
        )

    def _on_finish(self, message: FinishRequest, memory: Memory) -> tuple[Part, Memory]:
        try:
            self._check_open(memory)
            signature, memory = self._finish(message, memory)
        except (SecAggError, DpError) as error:
            return self._refuse(error), memory
        memory = msgspec.structs.replace(memory.without_keys().without_sum(), finished=True)
        return Answer(memoryview(signature)), memory

    def _confirm_cohort(self, memory: Memory, shown: frozenset[int]) -> Memory:
        earlier = (frozenset(cohort) for compared, cohort in memory.cohorts if compared == memory.compared)
        self._policy.check_cohort(earlier, shown, self._roster.name, self._me)
        memory = self._confirmed(memory, shown)
        return msgspec.structs.replace(memory, cohorts=(*memory.cohorts, (memory.compared, tuple(sorted(shown)))))

    def _check_open(self, memory: Memory) -> None:
        if memory.finished:
            raise RemoteProtocolError(f"the {self.what} is finished: its end is signed, and nothing comes after it")


def reason_of(error: Exception) -> Reason:
    """The one word that the server is told."""
    if isinstance(error, BudgetExceeded):
        return "budget"
    if isinstance(error, PolicyRefusal):
        return "policy"
    return "data" if isinstance(error, LocalProtocolError | DataError | DpError) else "protocol"

"""A hospital under an app of somebody else's: it runs the app's function for secure sums, and for nothing else.

All that must survive between two messages is in the state bytes, as with `protocols.site.Site`. What the app's function
draws at random is no part of it: a site that went down before its state was kept runs the function again, and none of
what it gave the first time has left.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import ClassVar

import msgspec

from protocols.aggregation import Masked
from protocols.agreement import Agreement
from protocols.app_work import AppVectors, AppWork, Returned
from protocols.memory import Memory
from protocols.messages import SumRequest
from protocols.participant import Participant
from protocols.policy import Policy
from secagg.errors import RemoteProtocolError
from secagg.keys import Identity, Roster
from secagg.masking.params import Session, Subject
from secagg.prg import Entropy, Stream
from secagg.ring import RingVector
from secagg.wire import decode

Run = Callable[[AppWork], Returned]


class AppSite(Participant):
    """One participant of an agreement.

    Args:
        agreement: The site's own copy; what the server says about it is not asked for.
        name: Its name in agreement and roster.
        identity: Its long-term key.
        roster: All participants' keys, as compared by fingerprint.
        run: Runs the app's function on what was sent, once for each sum; what it refuses, it raises as a `SecAggError`.
        policy: What the site agrees to, whatever the agreement says.
        ledger: Whether it keeps a budget ledger.
        entropy: Source of keys, masks and rounding.
        clock: Gives the time in seconds, against the policy's longest session.

    Raises:
        StudyError: Agreement, roster and name do not belong together, or the policy refuses the agreement: what an app
            releases has no differential privacy that could be accounted for, so that a site with a cap on epsilon or
            a ledger takes part in none.
        LocalProtocolError: Nobody of that name is on the roster.
    """

    what: ClassVar[str] = "agreement"

    def __init__(
        self,
        agreement: Agreement,
        name: str,
        identity: Identity,
        roster: Roster,
        run: Run,
        *,
        policy: Policy | None = None,
        ledger: bool = False,
        entropy: Entropy = os.urandom,
        clock: Callable[[], float] = time.time,
    ) -> None:
        policy = policy or Policy()
        policy.check_study(name, agreement, what=self.what)
        policy.check_cost(name, None, ledger=ledger, what=self.what)
        self._agreement, self._run = agreement, run
        self._params = agreement.params(roster)
        super().__init__(
            name,
            identity,
            roster,
            Masked(agreement.protocol.mode),
            agreement.digest,
            policy=policy,
            entropy=entropy,
            clock=clock,
        )

    def _session(self, number: int) -> Session:
        return self._agreement.session(self._params, number)

    def _subject(self, message: SumRequest) -> Subject:
        vectors = AppVectors(self._agreement, decode(message.work or b"", AppWork))
        return subject_of(vectors, message.purpose, message.work_digest, message.previous)

    def _compared(self, message: SumRequest) -> bytes:
        return decode(message.work or b"", AppWork).compared

    def _check_agreed(self, message: SumRequest, memory: Memory) -> None:
        work = decode(message.work or b"", AppWork)
        if message.purpose != work.kind:
            raise RemoteProtocolError(f"the server asks to {message.purpose}, and what came with it is for {work.kind}")
        self._check_more(memory)

    def _check_more(self, memory: Memory) -> None:
        if memory.trained >= self._agreement.most_sums:
            raise RemoteProtocolError(f"the agreement has {self._agreement.most_sums} sums, and all are done")

    def _charge(self, message: SumRequest, memory: Memory, seed: bytes) -> Memory:
        return msgspec.structs.replace(memory, trained=memory.trained + 1)

    def _contribute(self, message: SumRequest, memory: Memory, entropy: Entropy) -> tuple[RingVector, int]:
        work = decode(message.work or b"", AppWork)
        vectors = AppVectors(self._agreement, work)
        values, weight = vectors.values(self._run(work))
        encoded = vectors.fixed.encode(values, weight, Stream(entropy(16)))
        if encoded.clipped:
            self.log.append(
                f"{self.name}: round {message.round}: {encoded.clipped} of {values.size} entries were larger than "
                f"{vectors.fixed.max_value} and were clipped; raise protocol.max_update if that is not meant"
            )
        return encoded.vector, 0


def subject_of(vectors: AppVectors, purpose: str, work_digest: bytes, previous: bytes) -> Subject:
    """What a sum of replies is of: the same at the server and at every site."""
    return Subject(purpose, work_digest, previous, vectors.dimension, vectors.fixed.ring_bits)

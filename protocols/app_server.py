"""The server of secure sums under an app of somebody else's: one work after the other, and what replies average to."""

from __future__ import annotations

import hashlib

from msgspec import Struct

from protocols.aggregation import Masked, Sum
from protocols.agreement import Agreement, Kind
from protocols.app_site import subject_of
from protocols.app_work import AppVectors, AppWork, NDArray
from protocols.messages import Purpose
from protocols.rounds import RoundRecord, Rounds
from protocols.sessions import Participants
from secagg.errors import BelowThreshold, LocalProtocolError, SecAggError
from secagg.keys import Roster
from secagg.masking.params import Subject
from secagg.wire import encode


class Average(Struct, frozen=True):
    """What a weighted average over the contributors' replies gives.

    Attributes:
        arrays: As sent, moved by the mean change; empty of evaluation.
        metrics: Weighted means, without the weight.
        weight: Sum of the contributors' weights.
        contributors: Their names.
    """

    arrays: dict[str, NDArray]
    metrics: dict[str, float]
    weight: int
    contributors: tuple[str, ...]


class AppSums(Rounds):
    """The server's side of a series of sums under one agreement. `begin` each, then drive it until it is `finished`.

    Args:
        agreement: The server's copy.
        roster: The sites and their keys.
        first: Number of the first sum, above all that sites were asked for before: each site takes a number once,
            over all runs. Milliseconds since 1970 serve.

    Attributes:
        rounds: What has happened so far, of every sum.
        average: What the last sum gave; None where it was lost, and `rounds[-1].faults` says why.

    Raises:
        StudyError: The roster is of other sites.
    """

    def __init__(self, agreement: Agreement, roster: Roster, *, first: int) -> None:
        self._agreement, params = agreement, agreement.params(roster)
        super().__init__(
            Masked(agreement.protocol.mode),
            Participants(roster),
            lambda number: agreement.session(params, number),
            first=first,
        )
        self.average: Average | None = None
        self._kind: Kind = "train"
        self._vectors = AppVectors(agreement, AppWork.of("train", "", {}, {}))  # until the first sum begins
        self._begun = 0
        self._finished = True

    def begin(self, work: AppWork, among: frozenset[str]) -> None:
        """Begin a sum.

        Args:
            work: What the sites are to do.
            among: Names of the sites that are asked for a vector; at least the threshold. For keys all are asked.

        Raises:
            LocalProtocolError: Another is under way, a name that is no site's, or work that cannot be summed.
            BelowThreshold: Too few.
        """
        if not self._finished:
            raise LocalProtocolError("a sum is under way; one begins when the one before is over")
        numbers = frozenset(self.participants.number(name) for name in among)
        if len(numbers) < self._agreement.threshold:
            raise BelowThreshold("asked", len(numbers), self._agreement.threshold)
        self._vectors = AppVectors(self._agreement, work)
        self._kind, self._work, self._among, self.average = work.kind, encode(work), numbers, None
        self._begun += 1
        self._finished = False
        self._begin()

    def _due(self) -> Purpose:
        return self._kind

    def _subject(self, purpose: Purpose) -> Subject:
        return subject_of(self._vectors, purpose, hashlib.sha256(self._work).digest(), self._head)

    def _begin(self) -> None:
        if self._finished:
            return
        self._begin_sum(self._kind, more=self._begun < self._agreement.most_sums)

    def _apply(self, record: RoundRecord, result: Sum) -> None:
        weight, mean = self._vectors.fixed.decode(result.total)
        arrays, metrics = self._vectors.opened(mean)
        self._tell(record, result, weight)
        self.average = Average(arrays, metrics, weight, record.contributors)

    def _opened(self, record: RoundRecord) -> None:
        self._finished = True

    def _fail(self, record: RoundRecord, error: SecAggError) -> None:
        self._lose(record, error)
        self._finished = True

"""From a study to the parameters of each of its secure sums: the same at the coordinator and at every site."""

from __future__ import annotations

from dp import DpError
from dp.distributed import ParticipantPlan
from protocols.aggregation import Masked, Plain, Scheme
from protocols.errors import StudyError
from protocols.fedavg import distributed_plan
from protocols.messages import Purpose
from protocols.study import Study
from secagg.errors import LocalProtocolError
from secagg.fixed_point import ExactSum, FixedPoint
from secagg.keys import Roster
from secagg.masking.params import Params, Session, Subject
from secagg.ring import Ring


class Sums:
    """Everything that a study fixes about its sums.

    Args:
        study: As pinned by whoever asks.
        roster: As pinned by whoever asks; its names must be the study's sites.
        features: Columns of a row.
        entries: Entries of a model's update.

    Attributes:
        scheme: How vectors are summed.
        roster: Names and keys.
        distributed: How one round's vectors get their shares of the noise where it is added inside the sum, else None.

    Raises:
        StudyError: The roster is of other sites, or too small.
    """

    def __init__(self, study: Study, roster: Roster, features: int, entries: int) -> None:
        names = tuple(member.name for member in roster.members)
        if names != study.site_names:
            raise StudyError(f"sites: the study has {list(study.site_names)}, the roster {list(names)}")
        protocol = study.protocol
        self.roster = roster
        self.scheme: Scheme = Plain(study.threshold)
        if protocol.aggregation == "masked":
            self.scheme = Masked(protocol.mode)
        # A plain sum needs no parameters of a protocol; it borrows those that any roster can have.
        threshold = study.threshold if protocol.aggregation == "masked" else len(roster)
        try:
            self._params = Params(roster, threshold, protocol.mode)
        except LocalProtocolError as error:
            raise StudyError(f"protocol: {error}") from error
        self._study, self._features, self._entries = study, features, entries
        self.distributed = distributed_plan(study, entries)
        if self.distributed is not None:
            _ = self.noisy_ring  # refused here, before anything is sent

    @property
    def signed(self) -> bool:
        """Whether participants sign what they sum, so that there is a transcript."""
        return self._study.protocol.aggregation == "masked" and self._params.active

    @property
    def fixed_point(self) -> FixedPoint:
        """How updates become ring elements, in a sum for training."""
        return self._study.fixed_point

    @property
    def noisy_ring(self) -> Ring:
        """What clipped gradients or updates and their noise are summed in, where noise is added inside the sum.

        Raises:
            StudyError: No ring is wide enough, or there is no such noise.
        """
        plan, given = self.distributed, self._study.protocol.ring_bits
        if plan is None:
            raise StudyError("privacy.mechanism: no noise is added inside this study's sums")
        if isinstance(plan, ParticipantPlan):
            return Ring(plan.ring_bits)
        sums = self._study.privacy.records or 1, self._study.rounds
        try:
            if given is None:
                return Ring(plan.ring_bits(*sums))
            plan.check_ring(given, *sums)
            return Ring(given)
        except (DpError, LocalProtocolError) as error:
            where = "privacy.grid" if given is None else "protocol.ring_bits"
            raise StudyError(f"{where}: {error}") from error

    @property
    def exact(self) -> ExactSum:
        """How rows, features and their squares become ring elements, in the sum for standardising."""
        return ExactSum(len(self.roster))

    def session(self, number: int) -> Session:
        """What the keys of one sum are agreed for."""
        return Session(self._params, self._study.digest, number)

    def subject(self, purpose: Purpose, work_digest: bytes, previous: bytes) -> Subject:
        """What one sum is of."""
        if purpose == "standardize":
            dimension, ring = self.exact.dimension(1 + 2 * self._features), self.exact.ring
        elif self.distributed is not None:
            padded = self.distributed.padded if isinstance(self.distributed, ParticipantPlan) else self._entries
            dimension, ring = padded, self.noisy_ring
        else:
            dimension, ring = 1 + self._entries, self.fixed_point.ring
        return Subject(purpose, work_digest, previous, dimension, ring.bits)

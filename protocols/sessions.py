"""From a study to the parameters of each of its secure sums: the same at the coordinator and at every site."""

from __future__ import annotations

from msgspec import Struct

from dp import DpError
from dp.distributed import ParticipantPlan
from protocols.aggregation import Masked, Plain, Scheme
from protocols.errors import StudyError
from protocols.fedavg import distributed_plan
from protocols.homomorphic import Ckks
from protocols.messages import Purpose
from protocols.study import Study
from secagg.ckks.params import Need, Setting, choose
from secagg.errors import HeadroomError, LocalProtocolError
from secagg.fixed_point import ExactSum, FixedPoint
from secagg.keys import Member, Roster
from secagg.masking.params import Params, Session, Subject
from secagg.ring import Ring


class Participants(Struct, frozen=True):
    """Names and numbers of all that a coordinator talks to: the sites on the roster, and behind them a holder."""

    roster: Roster
    holder: str | None = None

    @property
    def everyone(self) -> range:
        """All numbers."""
        return range(len(self.roster) + (self.holder is not None))

    def name(self, number: int) -> str:
        """The name behind a number."""
        return self.holder if self.holder is not None and number == len(self.roster) else self.roster.name(number)

    def number(self, name: str) -> int:
        """The number behind a name.

        Raises:
            LocalProtocolError: Nobody of that name.
        """
        return len(self.roster) if name == self.holder else self.roster.number(name)


class Sums:
    """Everything that a study fixes about its sums.

    Args:
        study: As pinned by whoever asks.
        roster: As pinned by whoever asks; its names must be the study's sites, and the holder's of its keys if one has
            them.
        features: Columns of a row.
        entries: Entries of a model's update.

    Attributes:
        scheme: How vectors are summed.
        roster: Names and keys of the sites.
        participants: All that the coordinator talks to: the sites, and the holder of the keys if there is one.
        params: Participants, threshold and mode of every sum.
        setting: What CKKS sums have beside; None for other sums.
        distributed: How one round's vectors get their shares of the noise where it is added inside the sum, else None.

    Raises:
        StudyError: The roster is of other sites, or too small.
    """

    def __init__(self, study: Study, roster: Roster, features: int, entries: int) -> None:
        protocol = study.protocol
        names, expected = [member.name for member in roster.members], [*study.site_names]
        if protocol.holder is not None:
            expected = sorted([*expected, protocol.holder])
        if names != expected:
            raise StudyError(f"sites: the study has {expected}, the roster {names}")
        holder = next((member for member in roster.members if member.name == protocol.holder), None)
        self.roster = Roster(tuple(member for member in roster.members if member != holder))
        self.participants = Participants(self.roster, protocol.holder)
        # A plain sum needs no parameters of a protocol; it borrows those that any roster can have.
        threshold = len(self.roster) if protocol.aggregation == "plain" else study.threshold
        try:
            self.params = Params(self.roster, threshold, protocol.mode)
        except LocalProtocolError as error:
            raise StudyError(f"protocol: {error}") from error
        self._study, self._features, self._entries = study, features, entries
        self.distributed = distributed_plan(study, entries)
        if self.distributed is not None:
            _ = self.noisy_ring  # refused here, before anything is sent
        self.setting = self._setting(holder) if protocol.aggregation == "ckks" else None
        self.scheme: Scheme = Plain(study.threshold)
        if self.setting is not None:
            self.scheme = Ckks(self.setting, protocol.mode)
        elif protocol.aggregation == "masked":
            self.scheme = Masked(protocol.mode)

    @property
    def signed(self) -> bool:
        """Whether participants sign what they sum, so that there is a transcript."""
        return self._study.protocol.aggregation == "masked" and self.params.active

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

    def _setting(self, holder: Member | None) -> Setting:
        """The parameters of CKKS with which all sums of the study together take the fewest bytes."""
        study, protocol = self._study, self._study.protocol
        nothing = bytes(32)  # of models and pasts, on which no size depends
        subjects = [self.subject("train", nothing, nothing)]
        if study.task.standardize == "global":
            subjects.append(self.subject("standardize", nothing, nothing))
        error = 0.0 if self.distributed is not None else protocol.sum_error
        needs = [Need(s.dimension, s.ring_bits, error if s.purpose == "train" else 0.0) for s in subjects]
        try:
            chain = choose(len(self.roster), needs, protocol.statistical_security)
            return Setting(chain, protocol.keys, protocol.statistical_security, holder, error)
        except (HeadroomError, LocalProtocolError) as error_found:
            raise StudyError(f"protocol: {error_found}") from error_found

    @property
    def exact(self) -> ExactSum:
        """How rows, features and their squares become ring elements, in the sum for standardising."""
        return ExactSum(len(self.roster))

    def session(self, number: int) -> Session:
        """What the keys of one sum are agreed for."""
        return Session(self.params, self._study.digest, number)

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

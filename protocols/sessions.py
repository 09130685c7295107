"""From a study to the parameters of each of its secure sums: the same at the coordinator and at every site."""

from __future__ import annotations

from protocols.aggregation import Masked, Plain, Scheme
from protocols.errors import StudyError
from protocols.messages import Purpose
from protocols.study import Study
from secagg.errors import LocalProtocolError
from secagg.fixed_point import FixedPoint
from secagg.keys import Roster
from secagg.masking.params import Params, Session


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

    def fixed_point(self, purpose: Purpose) -> FixedPoint:
        """How floats become ring elements in a sum of this purpose."""
        return self._study.moments_fixed_point if purpose == "standardize" else self._study.fixed_point

    def session(self, number: int, purpose: Purpose, work_digest: bytes) -> Session:
        """The session of one sum."""
        values = 2 * self._features if purpose == "standardize" else self._entries
        return Session(
            params=self._params,
            context=self._study.digest,
            purpose=purpose,
            round=number,
            model_digest=work_digest,
            dimension=1 + values,
            ring_bits=self.fixed_point(purpose).ring_bits,
        )

"""What a site agrees to, whatever the study or the server says.

A policy is the site's own. It is checked when the site takes up a study, and the log of cohorts in every round.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Literal

from msgspec import Struct

from protocols.errors import StudyError
from protocols.study import Study
from secagg.errors import RemoteProtocolError


class Policy(Struct, frozen=True, kw_only=True):
    """A site's conditions. The default is strict; a server cannot lower any of them.

    Attributes:
        smallest_cohort: Fewest sites in a sum, this one included. The study's threshold must be at least that.
        schemes: Ways to sum that the site takes part in.
        semi_honest: Whether a server that is merely trusted to follow the protocol is enough.
        smallest_difference: Fewest sites by which the cohorts of two sums over the same model may differ, if they
            differ. By less, the difference of the two sums would show the contribution of so few.
    """

    smallest_cohort: int = 3
    schemes: tuple[Literal["masked", "plain"], ...] = ("masked",)
    semi_honest: bool = False
    smallest_difference: int = 2

    def check_study(self, site: str, study: Study) -> None:
        """Refuse a study that asks for less than the policy's conditions.

        Raises:
            StudyError: The message names the site, the condition and what the study has.
        """
        protocol = study.protocol
        if protocol.aggregation not in self.schemes:
            raise StudyError(
                f"protocol.aggregation: the policy of {site} allows {', '.join(self.schemes)}, the study has "
                f'"{protocol.aggregation}"'
            )
        if protocol.aggregation == "masked" and protocol.mode == "semi-honest" and not self.semi_honest:
            raise StudyError(f'protocol.mode: the policy of {site} asks for "active", the study has "semi-honest"')
        if study.threshold < self.smallest_cohort:
            raise StudyError(
                f"protocol.threshold: the policy of {site} asks for sums over at least {self.smallest_cohort} sites, "
                f"and the study's threshold is {study.threshold}"
            )

    def check_cohort(
        self, earlier: Iterable[frozenset[int]], shown: frozenset[int], name_of: Callable[[int], str]
    ) -> None:
        """Refuse a cohort that differs too little from one that the site has confirmed for the same model.

        Args:
            earlier: Cohorts confirmed before, for the same model and purpose.
            shown: The cohort that the server shows now.
            name_of: Names a participant by its number, for the message.

        Raises:
            RemoteProtocolError: The two sums' difference would be over too few sites.
        """
        for cohort in earlier:
            apart = cohort ^ shown
            if 0 < len(apart) < self.smallest_difference:
                who = ", ".join(map(name_of, sorted(apart)))
                raise RemoteProtocolError(
                    f"this cohort and an earlier one over the same model differ by {who} only: the difference of the "
                    "two sums would show that contribution"
                )


PERMISSIVE = Policy(smallest_cohort=1, schemes=("masked", "plain"), semi_honest=True)
"""For research where all sites are on one machine and whoever runs the study owns them all."""

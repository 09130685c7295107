"""What a site agrees to, whatever the study or the server says.

A policy is the site's own. It is checked when the site takes up a study, and in every round against those who are in
the sum and against the time that has passed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Literal, Protocol, get_args

from msgspec import Struct

from dp import Budget, BudgetExceeded, Mechanism, ParameterError, Relation
from protocols.errors import PolicyRefusal, StudyError
from protocols.study import Protocol as ProtocolTable
from secagg.masking.params import SUITE

Scheme = Literal["masked", "ckks", "ckks-holder", "ckks-shared", "plain"]
_DAY = 86_400
# A clock that is set right during a round may step back by so much, in seconds.
_CLOCK_STEP = 60
# A participant's number has 16 bits.
_MOST_SITES = 1 << 16


class Agreed(Protocol):
    """What a policy looks at in a study, or in what else sites have agreed on."""

    @property
    def protocol(self) -> ProtocolTable:
        """How vectors are summed."""

    @property
    def threshold(self) -> int:
        """How many sites must stay."""

    @property
    def site_names(self) -> tuple[str, ...]:
        """All sites."""


class Policy(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A site's conditions. The default is strict; a server cannot lower any of them.

    Attributes:
        smallest_cohort: Fewest sites in a sum, this one included. The study's threshold must be at least that.
        smallest_others: Fewest sites in a sum beside this one, counted in every round. With one other only, the sum
            shows each of the two the other's contribution.
        schemes: Ways to sum that the site takes part in: "masked", "ckks", "ckks-holder" (another party could decrypt
            the site's update), "ckks-shared" (every other site could), "plain" (the server sees it).
        suites: Sets of primitives that a masked sum may be made with.
        semi_honest: Whether a server that is merely trusted to follow the protocol is enough.
        smallest_difference: Fewest sites by which the cohorts of two sums over the same model may differ, if they
            differ. By less, the difference of the two sums would show the contribution of so few.
        longest_session: Seconds from the site's keys for a round to its last answer under them. What is older is not
            answered: a round that a server keeps open for days keeps the site's secrets on disk as long.
        epsilon: The most that one study may cost a record here, and all studies together where the site has a ledger.
            With one, a study without differential privacy is refused.
        delta: At which `epsilon` is meant; given with it.
        relation: Under which it is meant.

    Raises:
        StudyError: A condition that makes no sense; the message names the key.
    """

    smallest_cohort: int = 3
    smallest_others: int = 2
    schemes: tuple[Scheme, ...] = ("masked", "ckks")
    suites: tuple[str, ...] = (SUITE,)
    semi_honest: bool = False
    smallest_difference: int = 2
    longest_session: float = _DAY
    epsilon: float | None = None
    delta: float | None = None
    relation: Relation = Relation.ADD_OR_REMOVE_ONE

    def __post_init__(self) -> None:
        for key, least in (("smallest_cohort", 1), ("smallest_others", 0), ("smallest_difference", 0)):
            if not least <= getattr(self, key) <= _MOST_SITES:
                _refuse(key, f"{least} to {_MOST_SITES} sites", getattr(self, key))
        for key, known in (("schemes", get_args(Scheme)), ("suites", (SUITE,))):
            listed: tuple[str, ...] = getattr(self, key)
            if not listed or len(set(listed)) < len(listed) or not set(listed) <= set(known):
                _refuse(key, f"a list of {' or '.join(known)}, each at most once and one at least", list(listed))
        if not 1 <= self.longest_session <= 30 * _DAY:
            _refuse("longest_session", "1 second to 30 days, in seconds", self.longest_session)
        if (self.epsilon is None) != (self.delta is None):
            _refuse("epsilon", "an epsilon and a delta, or neither", [self.epsilon, self.delta])
        try:
            _ = self.budget
        except ParameterError as error:
            raise StudyError(f"policy: {error}") from error

    @property
    def budget(self) -> Budget | None:
        """The most that may be spent on a record, or None where the policy does not say."""
        if self.epsilon is None or self.delta is None:
            return None
        return Budget(epsilon=self.epsilon, delta=self.delta, relation=self.relation)

    def check_study(self, site: str, study: Agreed, suite: str = SUITE, *, what: str = "study") -> None:
        """Refuse a study that asks for less than the policy's conditions.

        Args:
            site: The site's name, for the message.
            study: The site's copy.
            suite: Primitives of its masked sums.
            what: What it is, for the message.

        Raises:
            StudyError: The message names the site, the condition and what the study has.
        """
        protocol = study.protocol
        scheme = protocol.aggregation + ("" if protocol.keys == "threshold" else f"-{protocol.keys}")
        if scheme not in self.schemes:
            raise StudyError(
                f"protocol.aggregation: the policy of {site} allows {', '.join(self.schemes)}, the {what} has "
                f'"{scheme}"'
            )
        if protocol.aggregation == "masked" and suite not in self.suites:
            raise StudyError(f"protocol: the policy of {site} allows {', '.join(self.suites)}, the {what} has {suite}")
        if protocol.aggregation != "plain" and protocol.mode == "semi-honest" and not self.semi_honest:
            raise StudyError(f'protocol.mode: the policy of {site} asks for "active", the {what} has "semi-honest"')
        if study.threshold < self.smallest_cohort:
            raise StudyError(
                f"protocol.threshold: the policy of {site} asks for sums over at least {self.smallest_cohort} sites, "
                f"and the {what}'s threshold is {study.threshold}"
            )
        others = len(study.site_names) - 1
        if others < self.smallest_others:
            raise StudyError(
                f"sites: the policy of {site} asks for at least {self.smallest_others} other sites in every sum, and "
                f"the {what} has {others}"
            )

    def check_cost(self, site: str, planned: Mechanism | None, *, ledger: bool, what: str = "study") -> None:
        """Refuse a study that would cost more than the policy allows, or so much that no ledger can hold it.

        What counts is not what the study says of itself but what all of its rounds come to, under the policy's delta
        and relation.

        Args:
            site: The site's name, for the message.
            planned: What the whole study releases at its worst; None without differential privacy.
            ledger: Whether the site keeps a budget ledger.
            what: What would cost so much, for the message.

        Raises:
            StudyError: The message names the site, the most that is allowed and what the study would cost.
        """
        budget = self.budget
        if planned is None:
            if budget is not None:
                raise StudyError(
                    f"privacy.mechanism: the policy of {site} allows epsilon {budget.epsilon:g} at delta "
                    f"{budget.delta:g}, and the {what} has no differential privacy: what it releases has no bound"
                )
            if ledger:
                raise StudyError(
                    f"privacy.mechanism: {site} keeps a budget ledger, and the {what} has no differential privacy: "
                    "what it releases has no bound, and is above every cap"
                )
        elif budget is not None:
            try:
                budget.require((), planned)
            except BudgetExceeded as error:
                raise StudyError(
                    f"privacy: the policy of {site} allows epsilon {budget.epsilon:g} at delta {budget.delta:g} "
                    f"({budget.relation}), and the study would come to {error.next:.4f}"
                ) from error

    def check_cohort(
        self,
        earlier: Iterable[frozenset[int]],
        shown: frozenset[int],
        name_of: Callable[[int], str],
        me: int,
    ) -> None:
        """Refuse a cohort that is too small, or differs too little from an earlier one for the same model.

        Args:
            earlier: Cohorts confirmed before, for the same model and purpose.
            shown: The cohort that the server shows now: those whose contributions are in the sum.
            name_of: Names a participant by its number, for the message.
            me: The site's own number.

        Raises:
            PolicyRefusal: The sum would be over too few sites, or the difference of two sums would.
        """
        others = len(shown - {me})
        if len(shown) < self.smallest_cohort or others < self.smallest_others:
            raise PolicyRefusal(
                f"the server shows a sum over {len(shown)} sites ({', '.join(map(name_of, sorted(shown))) or 'none'}): "
                f"the policy asks for at least {self.smallest_cohort}, and for {self.smallest_others} beside this one"
            )
        for cohort in earlier:
            apart = cohort ^ shown
            if 0 < len(apart) < self.smallest_difference:
                who = ", ".join(map(name_of, sorted(apart)))
                raise PolicyRefusal(
                    f"this cohort and an earlier one over the same model differ by {who} only: the difference of the "
                    "two sums would show that contribution"
                )

    def check_age(self, seconds: float) -> None:
        """Refuse to go on with a round that was begun too long ago.

        Args:
            seconds: Since this site gave its keys for the round.

        Raises:
            PolicyRefusal: Too long ago, or no time to go by: the clock was set back since.
        """
        if not -_CLOCK_STEP <= seconds <= self.longest_session:
            raise PolicyRefusal(
                f"the keys of this round were given {seconds:.0f} seconds ago: the policy allows 0 to "
                f"{self.longest_session:.0f}"
            )


def _refuse(key: str, expected: str, came: object) -> None:
    raise StudyError(f"policy.{key}: expected {expected}, got {came!r}")


PERMISSIVE = Policy(
    smallest_cohort=1,
    smallest_others=0,
    schemes=get_args(Scheme),
    semi_honest=True,
    longest_session=30 * _DAY,
)
"""For research where all sites are on one machine and whoever runs the study owns them all."""

"""Whether a budget ledger holds, and what it adds up to: for an auditor, offline, without trusting who wrote it.

Pure functions over the rows as they were stored. Everything that is wrong is a finding that names the row and what was
done to it, as far as that shows; nothing is raised.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeAlias, TypeVar

import msgspec
from msgspec import Struct

from dp.accounting import Spent, spent
from dp.errors import LedgerError
from dp.ledger import costs_more, spent_on
from dp.ledger_rows import Account, Charge, Receipt, Row, Verify, check_row, mechanisms_of
from dp.ledger_store import Stored, missing_at_the_end
from dp.mechanisms import Mechanism, Relation

_A = TypeVar("_A")
_B = TypeVar("_B")
Accountant: TypeAlias = Callable[[Iterable[Mechanism], float, Relation], Spent]

_DISAGREEMENT = 0.02  # by how much the tight accountant may exceed the loose one before one of them is wrong
_WOBBLE = 1e-3  # of the accountants' grids, from one point of time to the next
_POINTS = 8  # of time at which the account is made anew
NO_COHORT = ""
"""No cohort's name: stands for records of which nothing is known, so that everything may be about them."""


class Cost(Struct, frozen=True, kw_only=True):
    """What one study has cost one cohort, and what is left for that cohort.

    Attributes:
        study: Name.
        study_digest: Of its configuration.
        cohort: Name.
        releases: How many for training, statistics and tuning, in this order.
        open: How many of them are reserved and not committed; they count at their worst.
        alone: This study's releases from this cohort by themselves.
        together: Everything that may have met the same record of this cohort, by any study.
        left: The cap less that; not below 0.
    """

    study: str
    study_digest: str
    cohort: str
    releases: tuple[int, int, int]
    open: int
    alone: Spent
    together: Spent
    left: float


class Verdict(Struct, frozen=True, kw_only=True):
    """What the check of a ledger found.

    Attributes:
        site: Whose ledger it says it is.
        rows: How many.
        findings: What is wrong; empty when everything holds.
        witnessed: Number of the last row that another site's receipt stands for; 0 when there is none.
        total: The cost to the worst-hit record, or None where the rows do not hold and nothing can be recomputed.
    """

    site: str
    rows: int
    findings: tuple[str, ...]
    witnessed: int
    total: Spent | None


def replay(rows: Iterable[Row]) -> Account:
    """What rows add up to.

    Raises:
        LedgerError: A row cannot follow on those before it.
    """
    account = Account()
    for row in rows:
        account.apply(row)
    return account


def examine(
    stored: Stored,
    verify: Verify,
    *,
    site: str | None = None,
    others: Mapping[str, Stored] | None = None,
    accountant: Accountant = spent,
) -> Verdict:
    """Check a ledger: chain, signatures, clock, other sites' receipts, and the account by two accountants.

    Args:
        stored: The ledger, as `dp.ledger_store.read_rows` gives it.
        verify: Checks signatures; from a roster that the auditor trusts.
        site: Whose ledger it should be, or None for whoever it names.
        others: Other sites' ledgers, each under a name to tell it by.
        accountant: Makes the account, by both methods.

    Returns:
        What was found.
    """
    others = {} if others is None else others
    rows = stored.rows
    owner = rows[0].site if rows else ""
    findings = _chain(stored, verify)
    if site is not None and owner != site:
        findings.append(f"is the ledger of {owner!r}, expected that of {site!r}")
    for name, other in others.items():
        findings += [f"{name}: {finding}" for finding in _chain(other, verify)]
    pasts = {owner: stored, **{other.rows[0].site: other for other in others.values() if other.rows}}
    if len(pasts) != 1 + len(others):
        findings.append("two of the ledgers given are of the same site: give one for each other site")
    witnessed = 0
    for keeper, other in [("this ledger", stored), *others.items()]:
        for number, receipt in _receipts(other):
            said = f"{keeper}: row {number}: the receipt for row {receipt.sequence} of {receipt.site!r}"
            if not receipt.signed_by(verify):
                findings.append(f"{said} is not signed by {receipt.site!r}")
            elif receipt.site in pasts and (contradiction := _contradicted(pasts[receipt.site], receipt)):
                findings.append(f"{said} contradicts its ledger: {contradiction}")
            elif receipt.site == owner and other is not stored:
                witnessed = max(witnessed, receipt.sequence)
    total = None
    if not findings:
        account = replay(rows)
        findings = [*_account(rows, accountant), *_commitments(account)]
        total = spent_on(account, NO_COHORT)
    return Verdict(site=owner, rows=len(rows), findings=tuple(findings), witnessed=witnessed, total=total)


def costs(account: Account) -> tuple[Cost, ...]:
    """What each study has cost each cohort, in the order in which they came."""
    charges: dict[tuple[str, str], list[Charge]] = {}
    for charge in account.charges.values():
        charges.setdefault((charge.reserved.study_digest, charge.reserved.cohort), []).append(charge)
    cap = account.cap
    told = []
    for (digest, cohort), group in charges.items():
        kinds = [charge.reserved.release for charge in group]
        together = spent_on(account, cohort)
        told.append(
            Cost(
                study=group[-1].reserved.study,
                study_digest=digest,
                cohort=cohort,
                releases=(kinds.count("training"), kinds.count("statistic"), kinds.count("tuning")),
                open=sum(charge.actual is None for charge in group),
                alone=spent(mechanisms_of(group), cap.delta, cap.relation),
                together=together,
                left=max(0.0, cap.epsilon - together.epsilon),
            )
        )
    return tuple(told)


def timeline(
    rows: Sequence[Row], chosen: Callable[[Charge], bool], points: int = _POINTS
) -> tuple[tuple[float, float], ...]:
    """How the cost of some releases grew: (Unix seconds, epsilon) at some points, the last one included.

    A release counts from when it was reserved, and from when it was committed as what it was.

    Args:
        rows: Of a ledger that holds.
        chosen: Which releases to account.
        points: At most how many, evenly over the rows that change the account.
    """
    account, sets = Account(), []
    for row in rows:
        account.apply(row)
        if row.kind in ("reserve", "commit") and chosen(account.charges[row.refers or row.sequence]):
            sets.append((row.time, mechanisms_of(filter(chosen, account.charges.values()))))
    return tuple(
        (time, spent(mechanisms, account.cap.delta, account.cap.relation).epsilon)
        for time, mechanisms in _some(sets, points)
    )


def _chain(stored: Stored, verify: Verify) -> list[str]:
    """What is wrong with the rows themselves."""
    findings = list(stored.problems)
    account, before = Account(), None
    for row in stored.rows:
        # What follows on a wrong row is held against it as it stands, so that each wrong is told once.
        wrong = _refusal(check_row, row, before, verify)
        cannot = _refusal(account.apply, row)
        findings += wrong or cannot
        before = row
    if before is None:
        findings.append("holds no rows: its rows were deleted")
    elif stored.highest > before.sequence:
        findings.append(missing_at_the_end(before.sequence, stored.highest))
    return findings


def _refusal(check: Callable[..., None], *arguments: object) -> list[str]:
    try:
        check(*arguments)
    except LedgerError as error:
        return [str(error)]
    return []


def _receipts(stored: Stored) -> Iterable[tuple[int, Receipt]]:
    """The receipts in a ledger with the numbers of their rows, whatever else may be wrong with it."""
    for row in stored.rows:
        if row.kind == "receipt":
            try:
                yield row.sequence, msgspec.json.decode(row.detail, type=Receipt)
            except msgspec.MsgspecError:
                continue  # told by the check of the chain


def _contradicted(past: Stored, receipt: Receipt) -> str:
    """Why a ledger cannot be the one that a signed receipt is of; empty if it can."""
    last = past.rows[-1]
    if last.ledger != receipt.ledger:
        return "it was replaced by another one, begun anew"
    if receipt.sequence > last.sequence:
        return f"it ends at row {last.sequence}: an older copy was put back, or rows at its end were deleted"
    found = next((row for row in past.rows if row.sequence == receipt.sequence), None)
    if found is None or found.digest != receipt.digest:
        return "it has another row there: an older copy was put back and went on differently, or it was written anew"
    return ""


def _account(rows: Sequence[Row], accountant: Accountant) -> list[str]:
    """What is wrong with the account that the rows give, made anew."""
    account = Account()
    committed: list[tuple[int, list[tuple[Mechanism, ...]]]] = []
    for row in rows:
        account.apply(row)
        if row.kind == "commit":
            groups = account.together(NO_COHORT, account.cap.relation)
            done = [tuple(c.actual for c in group if c.actual is not None) for group in groups]
            committed.append((row.sequence, done))
    findings = _above_cap(rows, accountant)
    cap = account.cap
    highest, where = 0.0, 0
    for number, sets in _some(committed, _POINTS):
        epsilon = max(accountant(mechanisms, cap.delta, cap.relation).epsilon for mechanisms in sets)
        if not epsilon >= highest - _WOBBLE:
            findings.append(
                f"row {number}: what was spent falls from epsilon {highest:.4f} at row {where} to {epsilon:.4f}: the "
                "accountant is wrong, because releases cannot be taken back"
            )
        highest, where = max(highest, epsilon), number
    for group in account.together(NO_COHORT, cap.relation):
        findings += _disagreement("all releases", accountant(mechanisms_of(group), cap.delta, cap.relation))
    return findings + _promises(account, accountant)


def _above_cap(rows: Sequence[Row], accountant: Accountant) -> list[str]:
    """The first reservation under each cap that went above it."""
    findings = []
    starts = [i for i, row in enumerate(rows) if row.kind in ("open", "cap")]
    for start, end in zip(starts, [*starts[1:], len(rows)], strict=True):
        account = replay(rows[:end])
        cap = account.cap
        if not any(number > rows[start].sequence for number in account.charges):
            continue  # the cap may well be below what was spent before it
        # At no time was more charged than if everything counted as it was reserved, at the end.
        most = [[c.planned for c in group] for group in account.together(NO_COHORT, cap.relation)]
        if all(accountant(planned, cap.delta, cap.relation).epsilon <= cap.epsilon for planned in most):
            continue
        account = replay(rows[: start + 1])
        for row in rows[start + 1 : end]:
            account.apply(row)
            if row.kind != "reserve":
                continue
            groups = account.together(row.cohort, cap.relation)
            epsilon = max(accountant(mechanisms_of(group), cap.delta, cap.relation).epsilon for group in groups)
            if not epsilon <= cap.epsilon:
                findings.append(
                    f"row {row.sequence}: reserves up to epsilon {epsilon:.4f}, above the cap {cap.epsilon:g}"
                )
                break
    return findings


def _promises(account: Account, accountant: Accountant) -> list[str]:
    """Studies that have cost more than they promised, and accountants that disagree over one."""
    findings = []
    studies: dict[str, list[Charge]] = {}
    for charge in account.charges.values():
        studies.setdefault(charge.reserved.study_digest, []).append(charge)
    for digest, charges in studies.items():
        last = charges[-1].reserved
        if last.delta is None:
            continue
        relation = Relation(last.relation)
        for group in account.together(NO_COHORT, relation):
            own = [charge for charge in group if charge.reserved.study_digest == digest]
            cost = accountant(mechanisms_of(own), last.delta, relation)
            findings += _disagreement(f"study {last.study!r}", cost)
            if last.epsilon is not None and not cost.epsilon <= last.epsilon:
                findings.append(
                    f"study {last.study!r}: promised epsilon {last.epsilon:g}, and has cost {cost.epsilon:.4f}"
                )
    return findings


def _disagreement(what: str, cost: Spent) -> list[str]:
    if cost.epsilon <= cost.epsilon_rdp + _DISAGREEMENT:
        return []
    return [
        f"{what}: the two accountants disagree: epsilon {cost.epsilon:.4f} by {cost.accountant.upper()} should not "
        f"exceed the {cost.epsilon_rdp:.4f} by RDP; one of them is wrong"
    ]


def _commitments(account: Account) -> list[str]:
    """Releases that came out dearer than what was reserved for them."""
    return [
        f"row {number}: the release cost more than this row had reserved for it"
        for number, charge in account.charges.items()
        if charge.actual is not None and costs_more(charge, charge.actual, account.cap)
    ]


def _some(items: Sequence[tuple[_A, _B]], at_most: int) -> list[tuple[_A, _B]]:
    """At most so many of the items, evenly, the last one included."""
    if len(items) <= at_most:
        return list(items)
    return [items[(k + 1) * len(items) // at_most - 1] for k in range(at_most)]

"""What any scheme checks at any stage, and a server at a stage's end."""

from __future__ import annotations

from collections.abc import Collection
from typing import TypeVar

from secagg.errors import BelowThreshold, LocalProtocolError, RemoteProtocolError
from secagg.keys import Identity, verify
from secagg.masking.params import Session, Terms, differences
from secagg.prg import Label

T = TypeVar("T")


def check_identity(session: Session, me: int, identity: Identity) -> None:
    """Refuse to take part under a number or an identity that the roster does not have."""
    if not 0 <= me < len(session.params.roster):
        raise LocalProtocolError(f"participant {me} is not on a roster of {len(session.params.roster)}")
    if session.params.roster.members[me].identity != identity.public:
        raise LocalProtocolError(f"the roster has another key for {session.params.roster.name(me)} than its identity")


def expect(session: Session, sender: int, allowed: Collection[int], answered: Collection[int]) -> None:
    """Refuse an answer from someone who was not asked, and a second one."""
    if sender not in allowed:
        raise fault(session, sender, "answered a request that it was not sent")
    if sender in answered:
        raise fault(session, sender, "answered twice; the first answer stands")


def check_terms(session: Session, sender: int, theirs: Terms) -> None:
    """Refuse a message that was made for another session."""
    if theirs != (ours := session.terms):
        raise fault(session, sender, f"sent a message of another session: {differences(theirs, ours)}")


def check_signature(
    session: Session, sender: int, signature: bytes, label: Label, bound_to: bytes, payload: bytes, what: str
) -> None:
    """Refuse what the sender did not sign, and in a semi-honest session what it did."""
    if not session.params.active:
        if signature:
            raise fault(session, sender, f"signed {what}, and a semi-honest session has no signatures")
        return
    if not verify(session.params.roster.members[sender].identity, signature, label, bound_to, payload):
        raise fault(session, sender, f"did not sign {what}: its key is not the roster's, or the message was changed")


def fault(session: Session, sender: int, what: str) -> RemoteProtocolError:
    """The error for something that a participant did wrong."""
    name = session.params.roster.name(sender)
    return RemoteProtocolError(f"{name} {what}", [name])


def require(session: Session, stage: str, present: int) -> None:
    """Refuse to go on with fewer participants than the threshold."""
    if present < session.params.threshold:
        raise BelowThreshold(stage, present, session.params.threshold)


def in_order(by_sender: dict[int, T]) -> dict[int, T]:
    """By number, not by arrival: what the server sends does not depend on who was fastest."""
    return {u: by_sender[u] for u in sorted(by_sender)}

"""A site's budget ledger, signed with the site's long-term key and checked against the roster."""

from __future__ import annotations

from pathlib import Path

from dp.ledger import Ledger
from dp.ledger_rows import Cap, Partition, Sign, Verify
from protocols.rosters import member
from secagg.keys import Identity, Roster, verify
from secagg.prg import Label

_NO_SESSION = b""  # a ledger outlives every study; which one it is stands in what is signed


def signer(identity: Identity) -> Sign:
    """Signs rows with a site's key."""
    return lambda payload: identity.sign(Label.SIGN_LEDGER, _NO_SESSION, payload)


def verifier(roster: Roster) -> Verify:
    """Checks rows and receipts against the keys on a roster; what a site that is not on it signs, does not hold."""

    def check(site: str, payload: bytes, signature: bytes) -> bool:
        found = member(roster, site)
        return found is not None and verify(found.identity, signature, Label.SIGN_LEDGER, _NO_SESSION, payload)

    return check


def create_ledger(
    path: str | Path, *, site: str, identity: Identity, cap: Cap, time: float, partition: Partition | None = None
) -> None:
    """Make a site's ledger, once; see `dp.ledger.Ledger.create`.

    Raises:
        LedgerError: There is something of that name, or it could not be written.
    """
    Ledger.create(path, site=site, sign=signer(identity), cap=cap, time=time, partition=partition)


def open_ledger(path: str | Path, *, site: str, identity: Identity, roster: Roster, patience: float = 60.0) -> Ledger:
    """Open a site's ledger, and check all of it; see `dp.ledger.Ledger.open`. To be used with `with`.

    Raises:
        LedgerError: It is missing, damaged, edited, or another site's.
        LedgerLocked: Another process holds it for longer than `patience` seconds.
    """
    return Ledger.open(path, site=site, sign=signer(identity), verify=verifier(roster), patience=patience)

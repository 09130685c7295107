"""A site's own file: `site.toml`. Where its key, its state and its rows are, what it agrees to, and whom it trusts.

Nothing in it comes from the server, and nothing of it leaves the site. The fingerprints in it pin the roster: a roster
file that someone has swapped is refused.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import msgspec
from msgspec import Struct

from protocols.errors import KeyFileError, SiteFileError, StateError
from protocols.policy import Policy
from protocols.rosters import check_name, load_identity, load_roster, member
from protocols.state_file import StateFile
from protocols.toml_file import Section, parse, read_text
from secagg.keys import Identity, Roster, fingerprint


class _Table(Section, frozen=True):
    """What the file holds, as it stands there."""

    name: str
    identity: str
    roster: str
    state: str
    fingerprints: dict[str, str]
    counter: str | None = None
    data: str | None = None
    ledger: str | None = None
    policy: Policy = msgspec.field(default_factory=Policy)

    def __post_init__(self) -> None:
        try:
            check_name(self.name)
        except KeyFileError as error:
            raise SiteFileError(f"name: {error}") from error
        for key in ("identity", "roster", "state", "counter", "data", "ledger"):
            path = getattr(self, key)
            if path is not None and (not path or "\0" in path):
                raise SiteFileError(f"{key}: expected a path, got {path!r}")


class SiteFile(Struct, frozen=True, kw_only=True):
    """A site's file, read and checked. All paths are whole ones.

    Attributes:
        name: The site's, in the study and on the roster.
        identity: Path of its secret key.
        roster: All sites' public keys, each with the fingerprint that is pinned.
        state: Path of its state in the study.
        counter: Path of the number of the last save of the state, or None for the one beside it.
        data: Path of its rows, or None where the study file says it.
        ledger: Path of its budget ledger, or None. A ledger that is named must be there.
        policy: What it agrees to.
    """

    name: str
    identity: Path
    roster: Roster
    state: Path
    counter: Path | None
    data: Path | None
    ledger: Path | None
    policy: Policy

    def load_identity(self, passphrase: str | None = None) -> Identity:
        """The site's secret key, if it is the one that the roster has for it.

        Raises:
            KeyFileError: As `protocols.rosters.load_identity`, or it is another site's key.
        """
        identity = load_identity(self.identity, passphrase)
        ours = self.roster.members[self.roster.number(self.name)].identity
        if identity.public != ours:
            raise KeyFileError(
                f"{self.identity}: has the fingerprint {fingerprint(identity.public)}, and the roster has "
                f"{fingerprint(ours)} for {self.name}: this is another site's key, or the roster is older than the key"
            )
        return identity

    def state_file(self) -> StateFile:
        """The site's state on disk, to be opened with `with`."""
        return StateFile(self.state, self.counter)


def load_site(path: str | Path) -> SiteFile:
    """Read a site's file and the roster that it names.

    Raises:
        SiteFileError: The file is missing, is no TOML, or says what cannot be; or the roster is not the one that its
            fingerprints pin.
        KeyFileError: The roster cannot be read, or is none.
    """
    table = parse(read_text(path, SiteFileError), _Table, name=str(path), error_type=SiteFileError)
    folder = Path(path).absolute().parent
    paths = {
        key: folder / given
        for key in ("identity", "roster", "state", "counter", "data", "ledger")
        if (given := getattr(table, key)) is not None
    }
    _refuse_overwritten(str(path), paths)
    roster = load_roster(paths["roster"])
    _refuse_unpinned(str(path), table, roster)
    return SiteFile(
        name=table.name,
        identity=paths["identity"],
        roster=roster,
        state=paths["state"],
        counter=paths.get("counter"),
        data=paths.get("data"),
        ledger=paths.get("ledger"),
        policy=table.policy,
    )


def _refuse_overwritten(where: str, paths: dict[str, Path]) -> None:
    """Refuse a state or counter whose saves would take another file's place, the secret key's for example."""
    try:
        written = StateFile(paths["state"], paths.get("counter")).files
    except StateError as error:
        raise SiteFileError(f"{where}: counter: {error}") from error
    for key, path in {"the site file": Path(where), **paths}.items():
        if key not in ("state", "counter") and Path(os.path.realpath(path)) in written:
            raise SiteFileError(
                f"{where}: state: expected files of its own, but a save would write over {key} ({path})"
            )


def _refuse_unpinned(where: str, table: _Table, roster: Roster) -> None:
    """Refuse a roster that is not, member for member, the one that the fingerprints are of."""
    if member(roster, table.name) is None:
        names = ", ".join(m.name for m in roster.members)
        raise SiteFileError(f"{where}: name: {table.name!r} is not on the roster, which has {names}")
    for name, pinned in table.fingerprints.items():
        digits = "".join(pinned.split()).lower()
        if not re.fullmatch(r"[0-9a-f]{32}", digits):
            raise SiteFileError(
                f"{where}: fingerprints.{name}: expected 32 hexadecimal digits as `secagg keys show` prints them, got "
                f"{pinned!r}"
            )
        if (found := member(roster, name)) is None:
            raise SiteFileError(
                f"{where}: fingerprints.{name}: nobody of that name is on the roster {table.roster}: it is not the "
                "roster that you agreed on"
            )
        if digits != fingerprint(found.identity).replace(" ", ""):
            raise SiteFileError(
                f"{where}: fingerprints.{name}: the roster {table.roster} has a key of {name} with the fingerprint "
                f"{fingerprint(found.identity)}, and you pinned {pinned}: ask {name} over the telephone which is theirs"
            )
    if missing := [m for m in roster.members if m.name not in table.fingerprints]:
        raise SiteFileError(
            f"{where}: fingerprints.{missing[0].name}: expected the fingerprint that {missing[0].name} told you, got "
            f"none; the roster {table.roster} has {fingerprint(missing[0].identity)}"
        )

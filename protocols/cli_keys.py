"""The commands `secagg keys`: a site's keys, and the roster of all."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

if TYPE_CHECKING:
    from secagg.errors import SecAggError

keys_app = typer.Typer(
    name="keys",
    help="Make a site's keys, put the public ones together, and show fingerprints.",
    no_args_is_help=True,
    add_completion=False,
)

PassphraseFile = Annotated[
    Path | None,
    typer.Option("--passphrase-file", metavar="FILE", help="Take the passphrase from a file of mode 0600."),
]


@keys_app.command("new-site")
def new_site(
    name: Annotated[str, typer.Argument(metavar="NAME", help="The site's name in the study.", show_default=False)],
    out: Annotated[Path, typer.Option("--out", help="Folder for the two files.")] = Path(),
    passphrase_file: PassphraseFile = None,
    no_passphrase: Annotated[
        bool, typer.Option("--no-passphrase", help="Do not encrypt the key; the file's mode is all that keeps it.")
    ] = False,
) -> None:
    """Make a site's long-term key: NAME.key, which never leaves the site, and NAME.pub for the roster."""
    from protocols.errors import KeyFileError
    from protocols.rosters import PublicKey, check_name, new_identity, write_public_key
    from secagg.errors import SecAggError

    secret, public = out / f"{name}.key", out / f"{name}.pub"
    try:
        check_name(name)
        if no_passphrase and passphrase_file is not None:
            raise KeyFileError("--no-passphrase and --passphrase-file contradict each other; give one of them")
        for path in (secret, public):
            if os.path.lexists(path):
                raise KeyFileError(f"{path} exists already; a key is never overwritten: name another folder with --out")
        passphrase = None if no_passphrase else _passphrase(passphrase_file, twice=True)
        identity = new_identity(secret, passphrase, os.urandom)
        try:
            made = PublicKey(name, identity.public)
            write_public_key(public, made)
        except BaseException:
            secret.unlink(missing_ok=True)  # nobody has seen the key yet, and half of a pair is in the way
            raise
    except SecAggError as error:
        _refuse(error)
    typer.echo(f"{secret}  the secret key: never leaves this site")
    typer.echo(f"{public}  the public key: for the roster")
    typer.echo(f"Fingerprint of {name}, to be read to the others over the telephone:\n{made.fingerprint}")


@keys_app.command("roster")
def roster(
    public_keys: Annotated[list[Path], typer.Argument(metavar="NAME.PUB...", help="The sites' public keys.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The roster's file.")] = Path("roster.toml"),
) -> None:
    """Put the public keys of all sites together into one roster file, the same for everyone."""
    from protocols.rosters import load_public_key, roster_of, write_roster
    from secagg.errors import SecAggError

    try:
        made = roster_of([load_public_key(path) for path in public_keys])
        write_roster(out, made)
    except SecAggError as error:
        _refuse(error)
    typer.echo(f"{out}  {len(made)} sites; compare each fingerprint with the site over the telephone:")
    _show([(member.name, member.identity) for member in made.members])


@keys_app.command("show")
def show(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A .pub, a .key or a roster.toml.", show_default=False)],
    passphrase_file: PassphraseFile = None,
) -> None:
    """Show the names and fingerprints in a key file or a roster."""
    from protocols.errors import KeyFileError
    from protocols.rosters import load_identity, load_public_key, load_roster, needs_passphrase
    from protocols.toml_file import read_text
    from secagg.errors import SecAggError

    try:
        if read_text(file, KeyFileError).startswith("-----BEGIN"):
            passphrase = _passphrase(passphrase_file) if needs_passphrase(file) else None
            shown = [(file.stem, load_identity(file, passphrase).public)]
        elif file.suffix == ".pub":
            public = load_public_key(file)
            shown = [(public.name, public.key)]
        else:
            shown = [(member.name, member.identity) for member in load_roster(file).members]
    except SecAggError as error:
        _refuse(error)
    _show(shown)


def _show(keys: list[tuple[str, bytes]]) -> None:
    from secagg.keys import fingerprint

    width = max(len(name) for name, _ in keys)
    for name, key in keys:
        typer.echo(f"{name:{width}}  {fingerprint(key)}")


def _passphrase(file: Path | None, *, twice: bool = False) -> str:
    """From the file, or typed on the terminal."""
    from protocols.errors import KeyFileError
    from protocols.rosters import read_passphrase

    if file is not None:
        return read_passphrase(file)
    if not sys.stdin.isatty():
        raise KeyFileError("a passphrase is typed on a terminal, and this is none; give --passphrase-file")
    return str(typer.prompt("Passphrase", hide_input=True, confirmation_prompt=twice))


def _refuse(error: SecAggError) -> NoReturn:
    from protocols.cli import Exit, fail

    fail(error, Exit.BAD_INPUT)

"""A mod that puts a hospital's secure sums under a Flower app that is there already.

    app = ClientApp(mods=[SecAggMod()])

It answers the messages of `SecAggGrid` and refuses all others, so that the app's functions for training and evaluation
run for sums that are bound to what was sent, and what they give leaves in such a sum only.
"""

from __future__ import annotations

import copy
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

from flwr.app import Context, Error, Message
from flwr.clientapp.typing import ClientAppCallable

from protocols.agreement import Agreement, load_agreement
from protocols.app_site import AppSite
from protocols.app_work import AppWork, Returned
from protocols.engines.flower.bodies import packed, unpacked
from protocols.engines.flower.contents import content_of, returned_of
from protocols.errors import DataError, LinkError, SiteFileError
from protocols.hello import Hello
from protocols.rosters import read_passphrase, roster_digest
from protocols.site_file import SiteFile, load_site
from protocols.state_file import answer
from secagg.errors import RemoteProtocolError, SecAggError
from secagg.wire import encode

SITE, AGREEMENT, PASSPHRASE = "site-config", "agreement", "passphrase-file"
# "A precondition of a mod is not met", in Flower's numbers.
_PRECONDITION = 6
_WHOLE = "this site answers secure sums only: run the strategy over SecAggGrid"

PathOf = str | Path | Callable[[Context], str | Path]


class SecAggMod:
    """Answers for a hospital; to be the first of an app's mods.

    Where the hospital's files are, the configuration of its node says (`flower-supernode --node-config`):
    `site-config` its own file (docs/site.md), `agreement` its copy of the agreement, by default `agreement.toml` beside
    that, and `passphrase-file` its key's passphrase, where that is encrypted. None of it comes from the server.

    Args:
        site: Path of the site's file in place of the configuration's, or what gives it for a node's context: for
            trials on one machine.
        agreement: Likewise of its copy of the agreement.
    """

    def __init__(self, site: PathOf | None = None, agreement: PathOf | None = None) -> None:
        self._site, self._agreement = site, agreement

    def __call__(self, message: Message, context: Context, call_next: ClientAppCallable) -> Message:
        """Answer a message of `SecAggGrid`; Flower calls it.

        What goes wrong does not raise. Why is in the node's log on standard error, in full; the server learns that the
        site does not answer, or one word in the reply.
        """
        try:
            body = unpacked(message)
        except LinkError:
            body = None
        if body is None:
            kind = message.metadata.message_type
            print(f"refused a message of type {kind!r} that is no part of a secure sum", file=sys.stderr, flush=True)
            return Message(Error(_PRECONDITION, _WHOLE), reply_to=message)
        try:
            reply: bytes | None = self._answer(body, message, context, call_next)
        except SecAggError as error:
            print(error, file=sys.stderr, flush=True)
            reply = None
        return Message(packed(reply), reply_to=message)

    def _answer(self, body: bytes, message: Message, context: Context, call_next: ClientAppCallable) -> bytes:
        file, agreement = self._files(context)
        passphrase = context.node_config.get(PASSPHRASE)

        def run(work: AppWork) -> Returned:
            return _run(work, message, context, call_next)

        site = AppSite(
            agreement,
            file.name,
            file.load_identity(read_passphrase(Path(str(passphrase))) if passphrase is not None else None),
            file.roster,
            run,
            policy=file.policy,
            ledger=file.ledger is not None,
        )
        if not body:
            return encode(Hello(file.name, agreement.digest, roster_digest(file.roster)))
        with file.state_file() as store:
            reply = answer(site, store, body)
        for line in site.log:
            print(line, file=sys.stderr, flush=True)
        return reply

    def _files(self, context: Context) -> tuple[SiteFile, Agreement]:
        path = _path(self._site, SITE, context)
        if path is None:
            raise SiteFileError(
                f"node-config: expected {SITE}='PATH' of this site's site.toml, got none; give it to flower-supernode "
                "with --node-config"
            )
        agreement = _path(self._agreement, AGREEMENT, context)
        return load_site(path), load_agreement(agreement or path.absolute().parent / "agreement.toml")


def _path(given: PathOf | None, key: str, context: Context) -> Path | None:
    if callable(given):
        given = given(context)
    if given is None:
        found = context.node_config.get(key)
        given = str(found) if found is not None else None
    return Path(given) if given is not None else None


def _run(work: AppWork, message: Message, context: Context, call_next: ClientAppCallable) -> Returned:
    """Run the app's function on what the strategy sent."""
    kind = message.metadata.message_type
    if work.message_type != kind:
        raise RemoteProtocolError(f"work for {work.message_type!r} came in a message of type {kind!r}")
    asked = copy.copy(message)
    asked.content = content_of(work)
    try:
        reply = call_next(asked, context)
    except Exception as error:
        # An app may raise anything, and Flower would tell the server its text.
        traceback.print_exc()
        raise DataError(f"the app's function for {kind} raised {type(error).__name__}: {error}") from error
    return returned_of(reply, work.kind)

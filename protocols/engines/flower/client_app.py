"""What runs at a hospital's SuperNode: it hands each message over to the hospital's own process, and its answer back.

The SuperLink ships an app that does no more than to name this module, so that what runs is the package installed at the
hospital. Keys, rows, state, ledger, policy and the study file are at `secagg site serve`, which may run under another
account; where its socket is, the node's own configuration says.
"""

from __future__ import annotations

import sys

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from protocols import site_socket
from protocols.engines.flower.bodies import packed, unpacked
from protocols.errors import ServiceError

app = ClientApp()


@app.query("hello")
def hello(message: Message, context: Context) -> Message:
    """Say who this site is."""
    return _passed_on(message, context, site_socket.HELLO)


@app.query("secagg")
def answer(message: Message, context: Context) -> Message:
    """Answer a request of the coordinator."""
    return _passed_on(message, context, site_socket.MESSAGE)


def _passed_on(message: Message, context: Context, kind: site_socket.Kind) -> Message:
    path = context.node_config.get("site-socket")
    try:
        reply: bytes | None = site_socket.ask(path, kind, unpacked(message) or b"")
    except ServiceError as error:
        # Why is for the site's own log; the server learns that there is no answer.
        print(error, file=sys.stderr, flush=True)
        reply = None
    return Message(packed(reply), reply_to=message)

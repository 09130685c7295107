"""Questions to a hospital's own process over a socket on the same machine, for whoever carries the messages.

A socket carries one question and one answer: a byte that says what kind it is, the length in eight bytes, the body.
Nothing heavy is imported here: Flower starts a process for every message.
"""

from __future__ import annotations

import socket
import struct
from pathlib import Path
from typing import Literal

from protocols.errors import ServiceError
from secagg.wire import LIMIT_BYTES

Kind = Literal[b"h", b"m"]
HELLO: Literal[b"h"] = b"h"
MESSAGE: Literal[b"m"] = b"m"
ANSWER, FAILED = b"a", b"f"
_HEADER = struct.Struct(">cQ")


def ask(path: object, kind: Kind, body: bytes = b"", patience: float | None = None) -> bytes:
    """Ask the site behind a socket.

    Args:
        path: Of the socket, as the configuration of a node has it.
        kind: `HELLO` or `MESSAGE`.
        body: An encoded `Request` with `MESSAGE`.
        patience: Seconds to wait for the answer, or None for as long as it takes: a site may train for hours.

    Raises:
        ServiceError: Nobody answers there, or the site could not answer; its own log says why.
    """
    if not isinstance(path, str | Path):
        raise ServiceError(
            f"node-config: expected site-socket='PATH' of this site's own process, got {path!r}; give it to "
            "flower-supernode with --node-config"
        )
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.settimeout(patience)
            connection.connect(str(path))
            send(connection, kind, body)
            answered, reply = receive(connection)
    except OSError as error:
        raise ServiceError(
            f"{path}: no site answers there: {error.strerror or error}; start it with `secagg site serve`"
        ) from error
    if answered != ANSWER:
        raise ServiceError(f"{path}: the site could not answer; its own log says why")
    return reply


def send(connection: socket.socket, kind: bytes, body: bytes) -> None:
    """Send one question or answer."""
    connection.sendall(_HEADER.pack(kind, len(body)))
    if body:  # whoever has read all there is may have answered and closed by now
        connection.sendall(body)


def receive(connection: socket.socket) -> tuple[bytes, bytes]:
    """Receive one question or answer: its kind and its body.

    Raises:
        ServiceError: It ends early, or is too long.
    """
    kind, length = _HEADER.unpack(_exactly(connection, _HEADER.size))
    if length > LIMIT_BYTES:
        raise ServiceError(f"expected a message of at most {LIMIT_BYTES} bytes, got one of {length}")
    return kind, _exactly(connection, length)


def _exactly(connection: socket.socket, length: int) -> bytes:
    received = bytearray()
    while len(received) < length:
        piece = connection.recv(min(length - len(received), 1 << 20))
        if not piece:
            raise ServiceError(f"the connection ended after {len(received)} of {length} bytes")
        received += piece
    return bytes(received)

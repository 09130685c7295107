"""Bytes in Flower's messages and out of them."""

from __future__ import annotations

from flwr.app import ConfigRecord, Message, RecordDict

from protocols.errors import LinkError

HELLO, MESSAGE = "query.hello", "query.secagg"
_RECORD, _BODY = "secagg", "body"


def packed(body: bytes | None) -> RecordDict:
    """The content of a message: a body as raw bytes, or none where a site could not answer."""
    return RecordDict({_RECORD: ConfigRecord({} if body is None else {_BODY: body})})


def unpacked(message: Message) -> bytes | None:
    """The body of a message, or None where its sender could not answer.

    Raises:
        LinkError: It has another content.
    """
    record = message.content.get(_RECORD) if message.has_content() else None
    if not isinstance(record, ConfigRecord):
        raise LinkError("expected a message with a record 'secagg', got another: is this app of another version?")
    body = record.get(_BODY)
    if body is not None and not isinstance(body, bytes):
        raise LinkError(f"expected a body of bytes, got {type(body).__name__}")
    return body

"""Messages to bytes and back.

A message is one version byte and a MessagePack array, decoded strictly into a frozen struct: right types, right
lengths, no unknown field, nothing left over, the entries of a map in the order of their keys, and exactly the bytes
that encoding the result gives. So one message has one form, and a key cannot come twice. Whatever the bytes, the
outcome is a message or a `DecodeError`.
"""

from __future__ import annotations

from collections.abc import Hashable
from functools import lru_cache
from typing import Annotated, Any, TypeVar, cast

import msgspec
from msgspec import Meta, Struct

from secagg.errors import DecodeError, LocalProtocolError, SecAggError

VERSION = 1
# The largest message: a masked vector of 2**27 values of 64 bits, and what stands around it.
LIMIT_BYTES = (1 << 30) + (1 << 16)

Key = Annotated[bytes, Meta(min_length=32, max_length=32)]
Digest = Annotated[bytes, Meta(min_length=32, max_length=32)]
Signature = Annotated[bytes, Meta(max_length=64)]
Number = Annotated[int, Meta(ge=0, lt=1 << 16)]

_encoder = msgspec.msgpack.Encoder()
T = TypeVar("T", bound=Struct)


class Message(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Base of everything that goes over the wire."""


class SecretState(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Base of a participant's state between two messages: holds secrets, so it neither shows nor pickles them."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}(...)"

    def __rich_repr__(self) -> list[tuple[str, Any]]:
        return []

    def __reduce__(self) -> str:
        raise LocalProtocolError("a protocol state holds secrets: encode it with secagg.wire, do not pickle it")


def encode(message: Struct) -> bytes:
    """The bytes of a message or state."""
    return bytes([VERSION]) + _encoder.encode(message)


def decode(data: bytes, kind: type[T], *, limit: int = LIMIT_BYTES) -> T:
    """The message of type `kind` in `data`; see `decode_any`."""
    return cast(T, decode_any(data, kind, limit=limit))


def decode_any(data: bytes, kind: Hashable, *, limit: int = LIMIT_BYTES) -> Struct:
    """The message in `data`, of a type or of one of a union of tagged types.

    Args:
        data: Bytes from the wire or from disk.
        kind: A struct type, or a union of tagged ones.
        limit: Longest message accepted, bytes; checked before anything is parsed.

    Raises:
        DecodeError: Anything but exactly such a message.
    """
    if not data:
        raise DecodeError("expected a message, got no bytes")
    if len(data) > limit:
        raise DecodeError(f"a message of {len(data)} bytes is over the limit of {limit}")
    if data[0] != VERSION:
        raise DecodeError(f"expected message version {VERSION}, got {data[0]}")
    try:
        message: Struct = _decoder(kind).decode(memoryview(data)[1:])
    except (msgspec.MsgspecError, ValueError, OverflowError, RecursionError, SecAggError) as error:
        raise DecodeError(f"not a {getattr(kind, '__name__', 'message')}: {error}") from error
    maps = (value for name in message.__struct_fields__ if isinstance(value := getattr(message, name), dict))
    if _encoder.encode(message) != memoryview(data)[1:] or any(list(entries) != sorted(entries) for entries in maps):
        raise DecodeError(f"not a {getattr(kind, '__name__', 'message')} in its one canonical form")
    return message


@lru_cache(maxsize=64)
def _decoder(kind: Hashable) -> msgspec.msgpack.Decoder[Any]:
    return msgspec.msgpack.Decoder(kind)

"""Messages to bytes and back.

A message is one version byte and a MessagePack array, decoded strictly into a frozen struct: right types, right
lengths, no unknown field, nothing left over, the entries of a map in the order of their keys, and exactly the bytes
that encoding the result gives. So one message has one form, and a key cannot come twice. Whatever the bytes, the
outcome is a message or a `DecodeError`.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
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
Counter = Annotated[int, Meta(ge=0, lt=1 << 62)]

# MessagePack's header of an array: of up to 15 fields, to which their number is added, and of more, which their number
# in two bytes follows. And of bytes that are at least so long, which their length in four bytes follows.
_SHORT_ARRAY, _MOST_SHORT, _ARRAY = 0x90, 15, b"\xdc"
_LONG_BYTES, _LONG = b"\xc6", 1 << 16

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


def decode(data: bytes | memoryview, kind: type[T], *, limit: int = LIMIT_BYTES) -> T:
    """The message of type `kind` in `data`; see `decode_any`."""
    return cast(T, decode_any(data, kind, limit=limit))


def decode_any(data: bytes | memoryview, kind: Hashable, *, limit: int = LIMIT_BYTES) -> Struct:
    """The message in `data`, of a type or of one of a union of tagged types.

    Args:
        data: Bytes from the wire or from disk. A field of type `memoryview` is a view of them, all others are copies.
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
    body = memoryview(data)[1:]
    try:
        message: Struct = _decoder(kind).decode(body)
    except (msgspec.MsgspecError, ValueError, OverflowError, RecursionError, SecAggError) as error:
        raise DecodeError(f"not a {getattr(kind, '__name__', 'message')}: {error}") from error
    if not _is_canonical(message, body):
        raise DecodeError(f"not a {getattr(kind, '__name__', 'message')} in its one canonical form")
    return message


def _is_canonical(message: Struct, body: memoryview) -> bool:
    """Whether `body`, from which `message` was decoded, is the message's one form."""
    at = 0
    for encoded, content in _pieces(message):
        if body[at : at + len(encoded)] != encoded:
            return False
        at += len(encoded) + content
    return at == len(body)


def _pieces(value: object) -> Iterator[tuple[bytes, int]]:
    """The one form of a value, without another copy of the long bytes in it.

    Each piece is followed by so many bytes of content, which need no comparison: if all pieces so far are what stands
    in a message, the decoder took the content from right there.
    """
    if isinstance(value, Struct) and value.__struct_config__.array_like:
        tag = value.__struct_config__.tag
        fields = [*([] if tag is None else [tag]), *(getattr(value, name) for name in value.__struct_fields__)]
        short = len(fields) <= _MOST_SHORT
        yield bytes([_SHORT_ARRAY + len(fields)]) if short else _ARRAY + len(fields).to_bytes(2, "big"), 0
        for field in fields:
            yield from _pieces(field)
    elif isinstance(value, bytes | memoryview) and len(value) >= _LONG:
        yield _LONG_BYTES + len(value).to_bytes(4, "big"), len(value)
    else:
        yield _encoder.encode(dict(sorted(value.items())) if isinstance(value, dict) else value), 0


@lru_cache(maxsize=64)
def _decoder(kind: Hashable) -> msgspec.msgpack.Decoder[Any]:
    return msgspec.msgpack.Decoder(kind)

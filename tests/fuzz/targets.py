"""What is fuzzed: everything that makes sense of bytes from another party or from disk.

A target takes any bytes and returns: they decode, and encode to themselves again, or `DecodeError` is what comes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable

import msgspec
import torch

from protocols.app_work import AppWork
from protocols.fedavg import load_model_bytes
from protocols.memory import remember
from protocols.messages import Reply, Request, Work
from secagg.errors import DecodeError, LocalProtocolError
from secagg.keys import Identity, Roster
from secagg.masking import messages, transcript
from secagg.masking.client import decode_state
from secagg.ring import Ring
from secagg.wire import Message, decode, encode

Target = Callable[[bytes], None]


def _of(reader: Callable[[bytes], msgspec.Struct]) -> Target:
    def target(data: bytes) -> None:
        try:
            value = reader(data)
        except DecodeError:
            return
        assert encode(value) == data

    return target


def _of_kind(kind: type[Message]) -> Target:
    return _of(lambda data: decode(data, kind))


def _app_work(data: bytes) -> None:
    """Whatever decodes is looked at as a site does before it runs the app."""
    try:
        work = decode(data, AppWork)
    except DecodeError:
        return
    assert encode(work) == data
    try:
        arrays = work.sent()
        settings = [setting.value for _, entries in work.configs for setting in entries]
        _ = work.compared
    except LocalProtocolError:
        return
    assert sum(array.nbytes for array in arrays.values()) == len(work.data)
    assert len(settings) == sum(len(entries) for _, entries in work.configs)


def _memory(data: bytes) -> None:
    if data:  # no bytes are the memory of a site that has done nothing yet
        _of(remember)(data)


def _ring(data: bytes) -> None:
    """The first byte is the ring's width, the second how many values are expected."""
    if len(data) < 2:
        return
    ring, size, packed = Ring(1 + data[0] % 64), data[1], data[2:]
    try:
        vector = ring.unpack(packed, size)
    except DecodeError:
        return
    assert vector.shape == (size,)
    assert vector.dtype == ring.dtype
    assert ring.pack(vector) == packed


def example_roster() -> Roster:
    """Whose signatures are in the transcript that is a seed."""
    return Roster.of({f"site{u}": Identity(bytes([1 + u]) * 32).public for u in range(4)})


_roster = example_roster()


def _transcript(data: bytes) -> None:
    """It is read by somebody who trusts nobody: whatever decodes is examined as well."""
    try:
        entries = transcript.read(data)
    except DecodeError:
        return
    assert transcript.write(entries) == data
    transcript.examine(data, _roster)


def small_model() -> torch.nn.Module:
    """Parameters and buffers of three number formats and four shapes."""
    return torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2), torch.nn.Linear(2, 1).double())


_model = small_model()


def _load_model(data: bytes) -> None:
    try:
        load_model_bytes(_model, data)
    except DecodeError:
        return


DTYPES = ["F32", "F64", "I64", "F16", "BF16", "BOOL", "U8", "U16", "U64", "C64", "F8_E4M3", "F8_E8M0", "F4"]
_BITS = [32, 64, 64, 16, 16, 8, 8, 16, 64, 64, 8, 8, 4]
DIMS = [0, 1, 2, 3, 4, 16, (1 << 31) - 1, 1 << 32, 1 << 62, (1 << 63) - 1, 1 << 63, (1 << 64) - 1]


def _load_model_header(data: bytes) -> None:
    """Well-formed headers of the model's own names.

    For each tensor: number format, number of dimensions, the dimensions, and how far its size is off.
    """
    choices, at, header = iter(data), 0, {}
    for name in _model.state_dict():
        dtype = next(choices, 0) % len(DTYPES)
        shape = [DIMS[next(choices, 0) % len(DIMS)] for _ in range(next(choices, 0) % 5)]
        size = math.prod(shape) * _BITS[dtype] // 8
        until = at + max(0, (size if size < 4096 else 0) + next(choices, 0))
        header[name] = {"dtype": DTYPES[dtype], "shape": shape, "data_offsets": [at, until]}
        at = until
    text = json.dumps(header).encode()
    _load_model(len(text).to_bytes(8, "little") + text + bytes(at))


MESSAGE_KINDS: dict[str, type[Message]] = {
    name: kind
    for name, kind in vars(messages).items()
    if isinstance(kind, type) and issubclass(kind, Message) and kind is not Message
} | {"Request": Request, "Reply": Reply, "Work": Work}

TARGETS: dict[str, Target] = {name: _of_kind(kind) for name, kind in MESSAGE_KINDS.items()} | {
    "ClientState": _of(decode_state),
    "AppWork": _app_work,
    "Memory": _memory,
    "Transcript": _transcript,
    "Ring": _ring,
    "load_model": _load_model,
    "load_model_header": _load_model_header,
}

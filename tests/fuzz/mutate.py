"""A small mutator for where there is no coverage-guided one: the same inputs for the same seed, on every machine."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence

# Where lengths, types and numbers turn over: MessagePack's headers, and the ends of the integers.
HEADERS = [bytes([b]) for b in (*range(0xC0, 0xE0), 0x00, 0x7F, 0x80, 0x8F, 0x90, 0x9F, 0xA0, 0xBF, 0xE0, 0xFF)]
ENDS = [
    value.to_bytes(size, order)
    for size in (2, 4, 8)
    for order in ("big", "little")
    for value in (0, 1, 1 << (8 * size - 1), (1 << (8 * size - 1)) - 1, (1 << (8 * size)) - 1)
]
LENGTHS = [head + size for head in (b"\xc6", b"\xc9", b"\xdb", b"\xdd", b"\xdf") for size in ENDS if len(size) == 4]
# For the JSON header of safetensors.
WORDS = [
    b'"F16"', b'"F64"', b'"I8"', b'"U64"', b'"F4"', b'"F8_E8M0"', b"[0,", b"[]", b"{}", b"null", b"-1", b"0", b"1e9",
    b"1.5", b"9223372036854775807", b"9223372036854775808", b"18446744073709551615", b"4294967296", b'"__metadata__"',
]  # fmt: skip
NUMBERS = [word for word in WORDS if word.isdigit()] + [b"1", b"2", b"3", b"4", b"8", b"12", b"16", b"24", b"56"]
_NUMBER, _WORD = re.compile(rb"\d+"), re.compile(rb'"\w*"|\[[^][]*\]')
INTERESTING = HEADERS + ENDS + LENGTHS + WORDS


def mutants(seeds: Sequence[bytes], seed: int, *, longest: int = 4096) -> Iterator[bytes]:
    """An endless stream of changed seeds, none longer than `longest` bytes."""
    rng = random.Random(seed)
    while True:
        out = bytearray(rng.choice(seeds))
        for _ in range(rng.choice((1, 1, 1, 2, 3, 8))):
            _change(rng, out, seeds)
        yield bytes(out[:longest])


def _change(rng: random.Random, out: bytearray, seeds: Sequence[bytes]) -> None:
    # Headers stand near the beginning more often than elsewhere.
    at = min(rng.randrange(len(out) + 1), rng.randrange(len(out) + 1))
    until = min(len(out), at + rng.choice((1, 1, 2, 4, 8, rng.randrange(1 + len(out)))))
    match rng.randrange(10):
        case 0:
            if at < len(out):
                out[at] ^= 1 << rng.randrange(8)
        case 1:
            if at < len(out):
                out[at] = rng.randrange(256)
        case 2:
            if at < len(out):
                out[at] = (out[at] + rng.choice((-1, 1))) % 256
        case 3:
            out[at:at] = rng.choice(INTERESTING)
        case 4:
            value = rng.choice(INTERESTING)
            out[at : at + len(value)] = value
        case 5:
            del out[at:until]
        case 6:
            out[at:at] = out[at:until] * rng.choice((1, 1, 1, 30))
        case 7:
            other = rng.choice(seeds)
            start = rng.randrange(len(other) + 1)
            out[at:until] = other[start : start + rng.randrange(1, 40)]
        case 8:
            _swap(rng, out, _NUMBER, NUMBERS)
        case _:
            _swap(rng, out, _WORD, WORDS)


def _swap(rng: random.Random, out: bytearray, kind: re.Pattern[bytes], others: Sequence[bytes]) -> None:
    """Put another number or word in the place of one, as JSON has them."""
    if places := list(kind.finditer(out)):
        place = rng.choice(places)
        out[place.start() : place.end()] = rng.choice(others)

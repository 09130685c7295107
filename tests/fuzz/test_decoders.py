"""Whatever the bytes, a decoder gives a value or a `DecodeError`, and allocates no more than the bytes can hold."""

import subprocess
import sys
import tracemalloc
from pathlib import Path

import pytest

from protocols.messages import Work
from secagg.wire import encode
from tests.fuzz.fuzz import built_in
from tests.fuzz.make_seeds import all_seeds, read_seeds
from tests.fuzz.targets import MESSAGE_KINDS, TARGETS
from tests.secagg.simulation import Party

FUZZ = Path(__file__).with_name("fuzz.py")
every_target = pytest.mark.parametrize("name", TARGETS)
# Inputs of the everyday run; for each target; a few seconds over all of them.
INPUTS = dict.fromkeys(TARGETS, 20_000) | {"load_model_header": 4_000, "Transcript": 2_000}
SUBJECT = encode(Party(3).subject)[1:]


def peak(target, data):
    """Bytes that Python's allocators held at most while the target ran, over what they held before."""
    tracemalloc.start()
    try:
        target(data)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_the_seeds_are_what_is_really_said():
    fresh = all_seeds()
    on_disk = {f"{path.parent.name}/{path.stem}": path.read_bytes() for path in FUZZ.with_name("seeds").glob("*/*.bin")}
    assert on_disk.keys() == fresh.keys()
    # Training is in floats, which other machines may round otherwise; all else is the same to the byte.
    same_anywhere = [name for name in fresh if name.partition("/")[0] not in ("Request", "Reply", "Work", "Memory")]
    assert [name for name in same_anywhere if on_disk[name] != fresh[name]] == []


@every_target
def test_every_seed_decodes(name, monkeypatch):
    """With nothing for a target to forgive."""
    seeds = read_seeds(name)
    assert seeds
    monkeypatch.setattr("tests.fuzz.targets.DecodeError", type("Never", (Exception,), {}))
    for data in seeds:
        TARGETS[name](data)


@every_target
def test_changed_seeds_decode_or_are_refused(name):
    built_in(TARGETS[name], read_seeds(name), inputs=INPUTS[name])


MESSAGEPACK = sorted(set(TARGETS) - {"Ring", "Transcript", "load_model", "load_model_header"})
# Headers that claim 2^32 - 1 entries or bytes, and the lengths in between at which an allocation might still succeed.
CLAIMS = [
    head + size.to_bytes(4, "big")
    for head in (b"\xdd", b"\xdf", b"\xc6", b"\xdb", b"\xc9")
    for size in ((1 << 32) - 1, 1 << 31, 1 << 27, 1 << 22)
]


@pytest.mark.parametrize("name", MESSAGEPACK)
def test_no_length_is_believed_before_it_is_checked(name):
    """Each claim in the place of each byte of each seed, with what follows in the seed and cut off there."""
    worst = 0
    for seed in read_seeds(name)[:4]:
        for at in range(1, min(len(seed), 40) + 1):
            for claim in CLAIMS[:: 1 if at < 12 else 4]:
                for data in (seed[:at] + claim, seed[:at] + claim + seed[at:]):
                    worst = max(worst, peak(TARGETS[name], data) - 64 * len(data))
    assert worst < 1 << 17


@pytest.mark.parametrize(
    ("name", "start", "entry"),
    [
        ("SurvivorSet", b"\x91\xdd", b"\x01"),
        ("SurvivorSet", b"\x91\xdd", b"\xcd\xff\xf0"),
        ("Work", b"\x93\xc4\0\xdd", b"\x01"),
        ("Work", b"\x93\xc4\0\xdd", b"\xcb" + bytes(8)),
        ("ShareInbox", b"\x91\xdf", b"\x01\xc4\x5a" + bytes(90)),
        ("ConfirmationSet", b"\x91\xdf", b"\x01\x92" + SUBJECT + b"\xc4\0"),
    ],
    ids=["numbers", "wide numbers", "integers for floats", "floats", "boxes", "confirmations"],
)
def test_memory_grows_no_faster_than_what_came(name, start, entry):
    """Claims that are true: at most 64 bytes for each that came."""
    for count in (1 << 10, min(1 << 18, (1 << 22) // len(entry))):
        data = b"\1" + start + count.to_bytes(4, "big") + entry * count + b"\x90"
        assert peak(TARGETS[name], data) < 64 * len(data)


@pytest.mark.parametrize("name", MESSAGEPACK)
@pytest.mark.parametrize("opening", [b"\x91", b"\x81", b"\xdd\0\0\0\1", b"\xdc\0\1", b"\x81\xa0", b"\x81\0"])
def test_deep_nesting_is_refused(name, opening):
    """Alone, and in the first field of a message of each number of fields, tagged or not."""
    deep = opening * 100_000
    for start in (
        b"",
        *(bytes([0x90 + n]) for n in range(1, 12)),
        b"\x92\xa6Answer",
        b"\x94\xa6Shared\0",
        b"\x93\xc4\0",
    ):
        for end in (b"", b"\0"):
            data = b"\1" + start + deep + end
            assert peak(TARGETS[name], data) < 1 << 22


@pytest.mark.parametrize(
    "claimed", [0, 1, 2, 1 << 20, 99_999_999, 100_000_001, 1 << 31, 1 << 32, 1 << 63, (1 << 64) - 1]
)
def test_a_safetensors_header_of_any_claimed_length_is_refused(claimed):
    for rest in (b"", b"{}", b"{" * 50_000, b'{"a":' * 50_000, b"[" * 50_000):
        assert peak(TARGETS["load_model"], claimed.to_bytes(8, "little") + rest) < 1 << 20
        assert peak(TARGETS["load_model"], len(rest).to_bytes(8, "little") + rest) < 1 << 20


SHAPES = [
    "[0,9223372036854775807]",
    "[0,9223372036854775808]",
    "[0,18446744073709551615]",
    "[0,18446744073709551616]",
    "[0,4611686018427387904,4]",
    "[4294967296,4294967296,0]",
    "[0" + ",1" * 100_000 + "]",
    "[18446744073709551615]",
    "[-1]",
    "[1.0]",
    "[1e3]",
    "null",
]


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape[:30])
@pytest.mark.parametrize("dtype", ["F32", "F64", "I64", "BOOL", "C64", "F8_E4M3", "F4"])
def test_a_tensor_of_an_impossible_shape_is_refused(shape, dtype):
    text = f'{{"weight":{{"dtype":"{dtype}","shape":{shape},"data_offsets":[0,0]}}}}'.encode()
    TARGETS["load_model"](len(text).to_bytes(8, "little") + text)


def test_every_message_has_a_target():
    """A message that someone adds is fuzzed from then on; this only says that finding them works."""
    assert {"Advertisement", "UnmaskShares", "Request"} <= MESSAGE_KINDS.keys()
    assert MESSAGE_KINDS["Work"] is Work
    assert len(MESSAGE_KINDS) >= 11


@pytest.mark.slow
@every_target
def test_a_minute_of_it(name, tmp_path):
    """With atheris where it is installed; a process of its own, whose memory is limited."""
    command = [sys.executable, str(FUZZ), name, "--seconds", "60", "--crashes", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    assert list(tmp_path.iterdir()) == []

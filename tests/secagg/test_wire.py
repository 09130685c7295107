"""Bytes become a message or a `DecodeError`, nothing else; a state shows nobody its secrets."""

import copy
import pickle
import traceback
import tracemalloc

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.pretty import pretty_repr

from secagg import DecodeError, LocalProtocolError, Ring, Session, Subject, wire
from secagg.masking import messages as m
from secagg.masking import transcript
from secagg.masking.client import Advertised, ClientState, Confirmed, Masked, Shared, decode_state
from secagg.masking.params import MAX_DIMENSION
from tests.secagg.simulation import STAGES, Party, Round, changed

KINDS = [
    m.Advertisement,
    m.KeyDirectory,
    m.EncryptedShares,
    m.ShareInbox,
    m.MaskedInput,
    m.SurvivorSet,
    m.Confirmation,
    m.ConfirmationSet,
    m.UnmaskShares,
]


def a_whole_round():
    """One message of each kind and one state after each step, of a round of four with a drop-out."""
    said, states = {}, {}
    game = Round(Party(4))
    while game.stage is not None:
        for u in [u for u in game.outbox if u != 3 or STAGES.index(game.stage) < 2]:
            reply = game.answer(u)
            game.receive(u, reply)
            for message in (game.outbox[u], reply):
                said[type(message)] = message
            states[type(game.states[u]).__name__] = game.states[u]
        game.close()
    return said, states


SAID, STATES = a_whole_round()
MESSAGES = [SAID[kind] for kind in KINDS]
SUBJECT = Party(4).subject
# As they stand in a message, in hexadecimal.
SUBJECT_HEX = f"95a5747261696e c420{'00' * 32} c420{'00' * 32} 0514"
TERMS_HEX = f"93 c420{Party(4).session.params.digest.hex()} c420{'00' * 32} 01"
BOX_HEX, OTHER_BOX_HEX = (f"c45a{byte * 90}" for byte in ("61", "62"))
TERMS = Party(4).session.terms
RECORD = msgspec.msgpack.decode(wire.encode(transcript.record(Round(Party(4)).play().server))[1:])
CONFIRMED = m.ConfirmationSet({2: m.Confirmation(SUBJECT, b"a"), 5: m.Confirmation(SUBJECT, b"b")})
every_message = pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)
every_state = pytest.mark.parametrize("state", STATES.values(), ids=STATES.keys())


def secrets_of(state):
    """Every byte string of a state that is not in its session or its subject."""
    found = []

    def walk(value):
        if isinstance(value, bytes):
            found.append(value)
        elif isinstance(value, tuple):
            for each in value:
                walk(each)
        elif isinstance(value, dict):
            for each in value.values():
                walk(each)

    for field in state.__struct_fields__:
        walk(getattr(state, field))
    return found


def shows(text, secret):
    return any(form in text for form in (secret.hex(), repr(secret)[2:-1], str(int.from_bytes(secret, "big"))))


def assert_a_message_or_a_decode_error(data, kind):
    try:
        message = wire.decode_any(data, kind)
    except DecodeError:
        return
    assert wire.encode(message) == data


@every_message
def test_a_message_comes_back_as_it_was(message):
    assert wire.decode(wire.encode(message), type(message)) == message


@every_state
def test_a_state_comes_back_as_it_was(state):
    again = decode_state(wire.encode(state))
    assert type(again) is type(state)
    assert again == state


def test_every_state_of_a_participant_was_tried():
    assert list(STATES) == ["Advertised", "Shared", "Masked", "Confirmed", "Finished"]
    assert all(secrets_of(STATES[name]) for name in list(STATES)[:4])
    assert secrets_of(STATES["Finished"]) == []


@every_message
def test_every_truncation_and_every_single_changed_byte_is_a_message_or_a_decode_error(message):
    data = wire.encode(message)
    for end in range(len(data)):
        with pytest.raises(DecodeError):
            wire.decode(data[:end], type(message))
    for at in range(len(data)):
        for flip in (1, 2, 0x10, 0x20, 0x40, 0x80, 0xFF):
            spoiled = bytearray(data)
            spoiled[at] ^= flip
            assert_a_message_or_a_decode_error(bytes(spoiled), type(message))


@every_state
def test_every_truncation_and_every_changed_byte_of_a_state_is_a_state_or_a_decode_error(state):
    data = wire.encode(state)
    for end in range(len(data)):
        with pytest.raises(DecodeError):
            decode_state(data[:end])
    for at in range(len(data)):
        for flip in (1, 0x40, 0x80):
            spoiled = bytearray(data)
            spoiled[at] ^= flip
            assert_a_message_or_a_decode_error(bytes(spoiled), ClientState)


@settings(deadline=None, max_examples=200)
@given(st.binary(max_size=80), st.sampled_from([*KINDS, ClientState]))
def test_any_bytes_at_all_are_a_message_or_a_decode_error(data, kind):
    assert_a_message_or_a_decode_error(data, kind)
    assert_a_message_or_a_decode_error(bytes([wire.VERSION]) + data, kind)


@every_message
def test_trailing_bytes_are_refused(message):
    for extra in (b"\0", b"\xc0", wire.encode(message)):
        with pytest.raises(DecodeError):
            wire.decode(wire.encode(message) + extra, type(message))


@every_message
def test_another_version_is_refused(message):
    data = wire.encode(message)
    for version in (0, 2, 255):
        with pytest.raises(DecodeError, match=f"version 1, got {version}"):
            wire.decode(bytes([version]) + data[1:], type(message))


@every_message
def test_a_field_too_many_or_too_few_is_refused(message):
    fields = list(msgspec.structs.astuple(message))
    for wrong in (fields[:-1], [*fields, 0]):
        with pytest.raises(DecodeError):
            wire.decode(bytes([wire.VERSION]) + msgspec.msgpack.encode(wrong), type(message))


def test_no_bytes_are_refused():
    with pytest.raises(DecodeError, match="no bytes"):
        wire.decode(b"", m.SurvivorSet)


def test_a_message_over_the_limit_is_refused_before_it_is_parsed():
    data = wire.encode(m.MaskedInput(TERMS, SUBJECT, bytes(100)))
    assert wire.decode(data, m.MaskedInput, limit=len(data)).packed == bytes(100)
    with pytest.raises(DecodeError, match=f"{len(data)} bytes is over the limit of {len(data) - 1}"):
        wire.decode(data, m.MaskedInput, limit=len(data) - 1)
    with pytest.raises(DecodeError, match="over the limit of 10"):
        wire.decode(b"\xff" * 11, m.MaskedInput, limit=10)


def test_a_length_that_promises_more_than_comes_is_refused_at_once():
    """Four thousand million entries announced in a few bytes."""
    for head in (b"\x91\xdd", b"\x91\xdf", b"\x91\xc6", b"\xdd", b"\xdf", b"\xc6"):
        for kind in (m.SurvivorSet, m.ShareInbox, m.MaskedInput):
            with pytest.raises(DecodeError):
                wire.decode(b"\x01" + head + b"\xff\xff\xff\xff" + bytes(8), kind)


def test_deep_nesting_is_refused():
    with pytest.raises(DecodeError):
        wire.decode(b"\x01" + b"\x91" * 200_000, m.SurvivorSet)


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        (f"9182 05{BOX_HEX} 05{OTHER_BOX_HEX}", m.ShareInbox),
        (f"9182 05{BOX_HEX} 05{BOX_HEX}", m.ShareInbox),
        ("9191 cc05", m.SurvivorSet),
        ("9191 cd0005", m.SurvivorSet),
        ("91dc0001 05", m.SurvivorSet),
        (f"93{TERMS_HEX}{SUBJECT_HEX} c5000161", m.MaskedInput),
        ("dc000191 05", m.SurvivorSet),
        (f"91de0001 05{BOX_HEX}", m.ShareInbox),
        (f"93{TERMS_HEX}{SUBJECT_HEX} a161", m.MaskedInput),
        ("9191d005", m.SurvivorSet),
    ],
    ids=[
        "duplicate key",
        "duplicate key and value",
        "wide integer",
        "wider integer",
        "wide array",
        "wide bytes",
        "wide message",
        "wide map",
        "text for bytes",
        "signed integer",
    ],
)
def test_a_second_way_to_write_a_message_is_refused(body, kind):
    with pytest.raises(DecodeError):
        wire.decode(b"\x01" + bytes.fromhex(body), kind)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (f"9182 02{BOX_HEX} 05{OTHER_BOX_HEX}", m.ShareInbox({2: b"a" * 90, 5: b"b" * 90})),
        (f"9182 02 92{SUBJECT_HEX} c40161 05 92{SUBJECT_HEX} c40162", CONFIRMED),
        ("919105", m.SurvivorSet((5,))),
        (f"93{TERMS_HEX}{SUBJECT_HEX} c40161", m.MaskedInput(TERMS, SUBJECT, b"a")),
        (
            f"93{TERMS_HEX} 8105{BOX_HEX} 92 c420{'07' * 32} c40162",
            m.EncryptedShares(TERMS, {5: b"a" * 90}, m.Commitment(b"\7" * 32, b"b")),
        ),
        (
            f"93{TERMS_HEX} 8105c421{'61' * 33} 8106c421{'62' * 33}",
            m.UnmaskShares(TERMS, {5: b"a" * 33}, {6: b"b" * 33}),
        ),
    ],
)
def test_the_one_way_to_write_a_message_is_fixed(body, message):
    data = b"\x01" + bytes.fromhex(body)
    assert wire.encode(message) == data
    assert wire.decode(data, type(message)) == message


class Part(wire.Message, frozen=True, tag=True):
    content: memoryview
    after: float


class Whole(wire.Message, frozen=True):
    """Long bytes at several places and depths, with fields behind them."""

    before: dict[int, bytes]
    part: Part
    copied: bytes
    last: int


def array(*fields):
    return bytes([0x90 + len(fields)]) + b"".join(fields)


def in_bytes(length, header=None):
    """A byte string in MessagePack, with the shortest header or another."""
    header = header or min(size for size in (1, 2, 4) if length < 1 << 8 * size)
    return {1: b"\xc4", 2: b"\xc5", 4: b"\xc6"}[header] + length.to_bytes(header, "big") + b"x" * length


@pytest.mark.parametrize("length", [0, 1, 255, 256, 65535, 65536, 65537, 200_000])
def test_long_bytes_have_one_form_too_and_so_has_what_stands_around_them(length):
    pack = msgspec.msgpack.encode
    good = [pack({1: b"a", 2: b"b"}), pack("Part"), in_bytes(length), pack(0.5), in_bytes(length), pack(7)]

    def decoded(places, end=b""):
        before, tag, content, after, copied, last = (places.get(i, field) for i, field in enumerate(good))
        return wire.decode(b"\1" + array(before, array(tag, content, after), copied, last) + end, Whole)

    message = decoded({})
    assert (message.part.content, message.copied, message.last) == (b"x" * length, b"x" * length, 7)
    headers = [header for header in (2, 4) if length < 1 << 8 * header and in_bytes(length, header) != good[2]]
    wide = [{at: in_bytes(length, header)} for at in (2, 4) for header in headers]
    others = [
        {0: b"\x82\x02\xc4\1b\x01\xc4\1a"},
        {0: b"\x82\x01\xc4\1b\x01\xc4\1a"},
        {0: b"\x82\xcc\x01\xc4\1a\x02\xc4\1b"},
        {1: b"\xd9\4Part"},
        {3: pack(0)},
        {3: b"\xca\x3f\0\0\0"},
        {5: b"\xcc\x07"},
        {5: b"\xd0\x07"},
    ]
    for wrong in wide + others:
        with pytest.raises(DecodeError, match="one canonical form"):
            decoded(wrong)
    for end in (b"\0", b"x" * length + b"\0"):
        with pytest.raises(DecodeError):
            decoded({}, end)
    for header, claimed in ((b"\xdc", 4), (b"\xdd", 4)):
        data = header + claimed.to_bytes(2 if header == b"\xdc" else 4, "big")
        with pytest.raises(DecodeError):
            wire.decode(b"\1" + data + wire.encode(message)[2:], Whole)


def test_a_long_field_that_is_a_view_is_decoded_without_a_copy():
    data = wire.encode(Part(memoryview(bytes(1 << 22)), 0.5)) + b"more"
    tracemalloc.start()
    message = wire.decode(memoryview(data)[:-4], Part)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 16
    assert message.content.obj is data
    assert message.content.readonly


def test_long_bytes_are_copied_once():
    data = wire.encode(Whole({}, Part(memoryview(b""), 0.5), bytes(1 << 22), 0))
    tracemalloc.start()
    message = wire.decode(data, Whole)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < (1 << 22) + (1 << 16)
    assert message.copied == bytes(1 << 22)


def test_the_entries_of_a_map_come_in_one_order():
    with pytest.raises(DecodeError):
        wire.decode(bytes.fromhex(f"019182 05{BOX_HEX} 02{OTHER_BOX_HEX}"), m.ShareInbox)
    out_of_order = f"019182 05 92{SUBJECT_HEX} c40161 02 92{SUBJECT_HEX} c40162"
    with pytest.raises(DecodeError):
        wire.decode(bytes.fromhex(out_of_order), m.ConfirmationSet)


OTHER_TERMS = [
    [bytes(31), bytes(32), 1],
    [bytes(32), bytes(33), 1],
    [bytes(32), bytes(32), -1],
    [bytes(32), bytes(32), 1 << 62],
    [bytes(32), bytes(32)],
]


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        (m.Advertisement, [TERMS, bytes(31), bytes(32), b""]),
        (m.Advertisement, [TERMS, bytes(32), bytes(33), b""]),
        (m.Advertisement, [TERMS, bytes(32), bytes(32), bytes(65)]),
        *((m.Advertisement, [terms, bytes(32), bytes(32), b""]) for terms in OTHER_TERMS),
        (m.EncryptedShares, [TERMS, {1: bytes(89)}, [bytes(32), b""]]),
        (m.EncryptedShares, [TERMS, {1: bytes(91)}, [bytes(32), b""]]),
        (m.EncryptedShares, [TERMS, {}, [bytes(31), b""]]),
        (m.EncryptedShares, [TERMS, {}, [bytes(32), bytes(65)]]),
        (m.MaskedInput, [TERMS, ["train" * 7, bytes(32), bytes(32), 5, 20], b""]),
        (m.MaskedInput, [TERMS, ["train", bytes(31), bytes(32), 5, 20], b""]),
        (m.MaskedInput, [TERMS, ["train", bytes(32), bytes(33), 5, 20], b""]),
        (m.MaskedInput, [TERMS, ["train", bytes(32), bytes(32), 0, 20], b""]),
        (m.MaskedInput, [TERMS, ["train", bytes(32), bytes(32), MAX_DIMENSION + 1, 20], b""]),
        (m.MaskedInput, [TERMS, ["train", bytes(32), bytes(32), 5, 65], b""]),
        *((m.EncryptedShares, [terms, {}, [bytes(32), b""]]) for terms in OTHER_TERMS),
        *((m.MaskedInput, [terms, SUBJECT, b""]) for terms in OTHER_TERMS),
        *((m.UnmaskShares, [terms, {}, {}]) for terms in OTHER_TERMS),
        (m.ShareInbox, [{1: b""}]),
        (m.SurvivorSet, [[-1]]),
        (m.SurvivorSet, [[65536]]),
        (m.SurvivorSet, [[1.0]]),
        (m.SurvivorSet, [[True]]),
        (m.SurvivorSet, [["1"]]),
        (m.ConfirmationSet, [{-1: [SUBJECT, b""]}]),
        (m.ConfirmationSet, [{"1": [SUBJECT, b""]}]),
        (m.ConfirmationSet, [{1: [SUBJECT, bytes(65)]}]),
        (m.UnmaskShares, [TERMS, {1: bytes(32)}, {}]),
        (m.UnmaskShares, [TERMS, {}, {1: bytes(34)}]),
        (m.UnmaskShares, [TERMS, {1: None}, {}]),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else None,
)
def test_another_length_type_or_number_is_refused(kind, fields):
    with pytest.raises(DecodeError):
        wire.decode(b"\x01" + msgspec.msgpack.encode(fields), kind)


@pytest.mark.parametrize("count", [0, 1 << 16, (1 << 16) + 1])
def test_no_more_survivors_than_there_are_numbers(count):
    """Longer lists are refused whatever is in them."""
    everybody = [0] * count
    for kind, fields in ((m.SurvivorSet, [everybody]), (transcript.Record, [*RECORD[:9], everybody, *RECORD[10:]])):
        data = b"\x01" + msgspec.msgpack.encode(fields)
        if count > 1 << 16:
            with pytest.raises(DecodeError, match="length <= 65536"):
                wire.decode(data, kind)
        else:
            assert len(wire.decode(data, kind).survivors) == count


def test_a_purpose_has_at_most_32_characters():
    """Characters, not bytes; made here it is our mistake, from the wire another's."""
    longest = changed(SUBJECT, purpose="\u00e9" * 32)
    assert wire.decode(wire.encode(longest), Subject) == longest
    with pytest.raises(LocalProtocolError, match="a purpose has at most 32 characters, got 33"):
        changed(SUBJECT, purpose="x" * 33)
    data = wire.encode(changed(SUBJECT, purpose="x" * 32))
    assert data[2:4] == b"\xd9\x20"
    longer = data[:3] + b"\x21x" + data[4:]
    for kind, message in (
        (Subject, longer),
        (m.Confirmation, b"\x01\x92" + longer[1:] + b"\xc4\0"),
        (m.MaskedInput, b"\x01\x93" + wire.encode(TERMS)[1:] + longer[1:] + b"\xc4\0"),
    ):
        with pytest.raises(DecodeError, match="length <= 32"):
            wire.decode(message, kind)


def test_a_state_with_a_session_that_makes_no_sense_is_a_decode_error():
    data = wire.encode(STATES["Finished"])
    tree = msgspec.msgpack.decode(data[1:])
    number = Session.__struct_fields__.index("round")
    assert tree[2][number] == 1
    tree[2][number] = -1
    with pytest.raises(DecodeError, match="a round has a number from 0"):
        decode_state(data[:1] + msgspec.msgpack.encode(tree))
    tree[2][number] = 1
    tree[2][0][2] = "Active"
    with pytest.raises(DecodeError):
        decode_state(data[:1] + msgspec.msgpack.encode(tree))


@pytest.mark.parametrize("name", ["Masked", "Confirmed"])
def test_a_state_with_a_subject_that_makes_no_sense_is_a_decode_error(name):
    data = wire.encode(STATES[name])
    tree = msgspec.msgpack.decode(data[1:])
    at = 1 + STATES[name].__struct_fields__.index("subject")
    assert tree[at][3] == 5
    tree[at][3] = 0
    with pytest.raises(DecodeError, match="entries"):
        decode_state(data[:1] + msgspec.msgpack.encode(tree))


def test_a_message_is_no_state_and_one_state_is_no_other():
    for message in MESSAGES:
        with pytest.raises(DecodeError):
            decode_state(wire.encode(message))
    for name, state in STATES.items():
        for kind in (Advertised, Shared, Masked, Confirmed):
            if kind.__name__ != name:
                with pytest.raises(DecodeError):
                    wire.decode(wire.encode(state), kind)


def test_the_largest_vector_fits_the_limit():
    farthest = changed(TERMS, round=(1 << 62) - 1)
    widest = Subject("x" * 32, bytes(32), bytes(32), MAX_DIMENSION, 64)
    around = len(wire.encode(m.MaskedInput(farthest, widest, bytes(1 << 16)))) - (1 << 16)
    assert Ring(64).packed_size(MAX_DIMENSION) + around <= wire.LIMIT_BYTES


@every_state
def test_a_state_shows_no_secret(state):
    for shown in (repr(state), str(state), f"{state}", repr({"nested": [state]}), pretty_repr(state)):
        assert type(state).__name__ in shown
        assert not any(shows(shown, secret) for secret in secrets_of(state))


@every_state
def test_a_state_does_not_pickle(state):
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        with pytest.raises(LocalProtocolError, match="do not pickle"):
            pickle.dumps([state], protocol)
    with pytest.raises(LocalProtocolError):
        copy.deepcopy(state)


@every_state
def test_an_error_about_a_states_bytes_holds_no_secret(state):
    data = wire.encode(state)
    for at in range(len(data)):
        spoiled = bytearray(data)
        spoiled[at] ^= 0x80
        try:
            decode_state(bytes(spoiled))
        except DecodeError as error:
            text = "".join(traceback.format_exception(error))
            assert not any(shows(text, secret) for secret in secrets_of(state))

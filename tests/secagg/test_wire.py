"""Bytes become a message or a `DecodeError`, nothing else; a state shows nobody its secrets."""

import copy
import pickle
import traceback

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.pretty import pretty_repr

from secagg import DecodeError, LocalProtocolError, Ring, Session, wire
from secagg.masking import messages as m
from secagg.masking.client import Advertised, ClientState, Confirmed, Masked, Shared, decode_state
from secagg.masking.params import MAX_DIMENSION
from tests.secagg.simulation import STAGES, Party, Round

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
every_message = pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)
every_state = pytest.mark.parametrize("state", STATES.values(), ids=STATES.keys())


def secrets_of(state):
    """Every byte string of a state that is not in its session."""
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
    data = wire.encode(m.MaskedInput(bytes(100)))
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
        ("9182 05c40161 05c40162", m.ConfirmationSet),
        ("9182 05c40161 05c40161", m.ConfirmationSet),
        ("9191 cc05", m.SurvivorSet),
        ("9191 cd0005", m.SurvivorSet),
        ("91dc0001 05", m.SurvivorSet),
        ("91c5000161", m.MaskedInput),
        ("dc000191 05", m.SurvivorSet),
        ("91de0001 05c40161", m.ConfirmationSet),
        ("91a161", m.MaskedInput),
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
        ("9182 02c40161 05c40162", m.ConfirmationSet({2: b"a", 5: b"b"})),
        ("919105", m.SurvivorSet((5,))),
        ("91c40161", m.MaskedInput(b"a")),
    ],
)
def test_the_one_way_to_write_a_message_is_fixed(body, message):
    data = b"\x01" + bytes.fromhex(body)
    assert wire.encode(message) == data
    assert wire.decode(data, type(message)) == message


def test_the_entries_of_a_map_come_in_one_order():
    with pytest.raises(DecodeError):
        wire.decode(bytes.fromhex("019182 05c40161 02c40162"), m.ConfirmationSet)


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        (m.Advertisement, [bytes(31), bytes(32), b""]),
        (m.Advertisement, [bytes(32), bytes(33), b""]),
        (m.Advertisement, [bytes(32), bytes(32), bytes(65)]),
        (m.EncryptedShares, [{1: bytes(89)}, bytes(32), b""]),
        (m.EncryptedShares, [{1: bytes(91)}, bytes(32), b""]),
        (m.EncryptedShares, [{}, bytes(31), b""]),
        (m.ShareInbox, [{1: b""}]),
        (m.SurvivorSet, [[-1]]),
        (m.SurvivorSet, [[65536]]),
        (m.SurvivorSet, [[1.0]]),
        (m.SurvivorSet, [[True]]),
        (m.SurvivorSet, [["1"]]),
        (m.ConfirmationSet, [{-1: b""}]),
        (m.ConfirmationSet, [{"1": b""}]),
        (m.ConfirmationSet, [{1: bytes(65)}]),
        (m.UnmaskShares, [{1: bytes(32)}, {}]),
        (m.UnmaskShares, [{}, {1: bytes(34)}]),
        (m.UnmaskShares, [{1: None}, {}]),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else None,
)
def test_another_length_type_or_number_is_refused(kind, fields):
    with pytest.raises(DecodeError):
        wire.decode(b"\x01" + msgspec.msgpack.encode(fields), kind)


def test_a_state_with_a_session_that_makes_no_sense_is_a_decode_error():
    data = wire.encode(STATES["Finished"])
    tree = msgspec.msgpack.decode(data[1:])
    dimension = len(Session.__struct_fields__) - 2
    assert tree[2][dimension] == 5
    tree[2][dimension] = 0
    with pytest.raises(DecodeError, match="entries"):
        decode_state(data[:1] + msgspec.msgpack.encode(tree))
    tree[2][dimension] = 5
    tree[2][0][2] = "Active"
    with pytest.raises(DecodeError):
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
    around = len(wire.encode(m.MaskedInput(bytes(1 << 16)))) - (1 << 16)
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

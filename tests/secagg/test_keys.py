"""Identities, the roster and key agreement."""

import pickle

import pytest
from Crypto.PublicKey import ECC
from Crypto.Signature import eddsa

from secagg import Identity, LocalProtocolError, Member, RemoteProtocolError, Roster, fingerprint
from secagg.keys import AgreementKey, agreement_public, refuse_low_order, verify
from secagg.prg import Label, domain

SESSION = bytes(range(32))
IDENTITIES = [Identity(bytes([i]) * 32) for i in range(1, 5)]
# The u-coordinates of small order and their unreduced forms.
LOW_ORDER = [
    "0000000000000000000000000000000000000000000000000000000000000000",
    "0100000000000000000000000000000000000000000000000000000000000000",
    "e0eb7a7c3b41b8ae1656e3faf19fc46ada098deb9c32b1fd866205165f49b800",
    "5f9c95bca3508c24b1d0b1559c83ef5b04445cc4581c8e86d8224eddd09f1157",
    "ecffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
    "edffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
    "eeffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
]


def roster(**keys):
    return Roster.of({name: IDENTITIES[i].public for name, i in keys.items()})


def test_key_agreement_gives_the_published_secret():
    """RFC 7748, section 6.1."""
    alice = AgreementKey(bytes.fromhex("77076d0a7318a57d3c16c17251b26645df4c2f87ebc0992ab177fba51db92c2a"))
    bob = AgreementKey(bytes.fromhex("5dab087e624a8a4b79e17f8b83800ee66f3bb1292618b6fd1c2f8b27ff88e0eb"))
    assert alice.public.hex() == "8520f0098930a754748b7ddcb43ef75a0dbf3a0d26381af4eba4a98eaa9b4e6a"
    shared = "4a5d9d5ba4ce2de1728e3bf480350f25e07e21c947d19e3376f09b3c1e161742"
    assert alice.agree(bob.public).hex() == bob.agree(alice.public).hex() == shared
    assert agreement_public(alice.secret) == alice.public


@pytest.mark.parametrize("point", LOW_ORDER)
@pytest.mark.parametrize("high_bit", [0, 0x80])
def test_a_point_of_low_order_is_refused(point, high_bit):
    public = bytearray.fromhex(point)
    public[31] |= high_bit
    with pytest.raises(RemoteProtocolError, match="low order"):
        AgreementKey(b"\x55" * 32).agree(bytes(public))
    with pytest.raises(RemoteProtocolError, match="low order"):
        refuse_low_order(bytes(public))


@pytest.mark.parametrize("public", [b"", bytes(31), b"\x09" * 33], ids=len)
def test_an_agreement_key_of_another_length_is_refused(public):
    with pytest.raises(RemoteProtocolError, match="malformed"):
        AgreementKey(b"\x55" * 32).agree(public)


def test_an_honest_key_is_not_refused():
    refuse_low_order(AgreementKey(b"\x55" * 32).public)


def test_a_signature_holds_for_its_signer_purpose_session_and_payload_only():
    signer, other = IDENTITIES[:2]
    signature = signer.sign(Label.SIGN_KEYS, SESSION, b"payload")
    assert verify(signer.public, signature, Label.SIGN_KEYS, SESSION, b"payload") is True
    for wrong in (
        (other.public, signature, Label.SIGN_KEYS, SESSION, b"payload"),
        (signer.public, signature, Label.SIGN_SURVIVORS, SESSION, b"payload"),
        (signer.public, signature, Label.SIGN_KEYS, bytes(32), b"payload"),
        (signer.public, signature, Label.SIGN_KEYS, SESSION, b"payloaD"),
        (signer.public, signature, Label.SIGN_KEYS, SESSION, b""),
        (signer.public, signature[:-1], Label.SIGN_KEYS, SESSION, b"payload"),
        (signer.public, b"", Label.SIGN_KEYS, SESSION, b"payload"),
        (signer.public, bytes(64), Label.SIGN_KEYS, SESSION, b"payload"),
        (signer.public[:-1], signature, Label.SIGN_KEYS, SESSION, b"payload"),
        (b"\xff" * 32, signature, Label.SIGN_KEYS, SESSION, b"payload"),
    ):
        assert verify(*wrong) is False


def test_a_signature_with_any_bit_changed_does_not_verify():
    signature = IDENTITIES[0].sign(Label.SIGN_KEYS, SESSION, b"payload")
    for bit in range(8 * len(signature)):
        spoiled = bytearray(signature)
        spoiled[bit // 8] ^= 1 << bit % 8
        assert not verify(IDENTITIES[0].public, bytes(spoiled), Label.SIGN_KEYS, SESSION, b"payload")


def test_signatures_are_ed25519_by_another_library_too():
    secret = bytes(range(32))
    key = ECC.construct(curve="Ed25519", seed=secret)
    assert Identity(secret).public == key.public_key().export_key(format="raw")
    text = domain(Label.SIGN_COMMITMENT, SESSION) + b"payload"
    assert Identity(secret).sign(Label.SIGN_COMMITMENT, SESSION, b"payload") == eddsa.new(key, "rfc8032").sign(text)


def test_an_identity_takes_32_bytes_of_entropy():
    asked = []
    identity = Identity.generate(lambda count: asked.append(count) or bytes(count))
    assert asked == [32]
    assert identity.public == Identity(bytes(32)).public
    for wrong in (b"", bytes(31), bytes(33)):
        with pytest.raises(LocalProtocolError, match=f"32 bytes, got {len(wrong)}"):
            Identity(wrong)


@pytest.mark.parametrize("key", [Identity(b"\x5a" * 32), AgreementKey(b"\x5a" * 32)], ids=["identity", "agreement"])
def test_a_key_shows_no_secret_and_does_not_pickle(key):
    for shown in (repr(key), str(key), f"{key}"):
        assert "5a5a" not in shown.replace(" ", "")
        assert "ZZ" not in shown
    with pytest.raises(LocalProtocolError):
        pickle.dumps(key)
    with pytest.raises(LocalProtocolError):
        pickle.dumps({"nested": [key]})


def test_a_fingerprint_is_for_people_and_fixed():
    shown = fingerprint(Identity(bytes(32)).public)
    assert shown == "3816 0c65 d59e bf67 0b12 0e85 e08c 9ed5"
    assert len({fingerprint(i.public) for i in IDENTITIES}) == 4
    assert fingerprint(IDENTITIES[0].public) in repr(IDENTITIES[0])


def test_a_roster_is_in_the_order_of_names_whatever_order_they_come_in():
    assert [m.name for m in roster(c=0, a=1, b=2).members] == ["a", "b", "c"]
    assert roster(c=0, a=1, b=2) == roster(b=2, c=0, a=1)


def test_names_and_numbers_go_both_ways():
    members = roster(a=0, b=1, c=2)
    assert len(members) == 3
    assert [members.number(members.name(u)) for u in range(3)] == [0, 1, 2]
    assert members.name(3) == "#3"
    assert members.name(-1) == "#-1"
    with pytest.raises(LocalProtocolError, match="'d' is not on the roster"):
        members.number("d")


@pytest.mark.parametrize("names", [[], ["a"], ["a", "b"]], ids=len)
def test_fewer_than_three_are_refused_because_the_sum_would_show_the_other(names):
    with pytest.raises(LocalProtocolError, match="at least 3"):
        roster(**{name: i for i, name in enumerate(names)})


@pytest.mark.parametrize(
    ("members", "says"),
    [
        ([("a", 0), ("a", 1), ("b", 2)], "distinct"),
        ([("b", 0), ("a", 1), ("c", 2)], "in order"),
        ([("a", 0), ("b", 0), ("c", 1)], "same public key"),
    ],
)
def test_a_roster_that_names_or_keys_someone_twice_is_refused(members, says):
    with pytest.raises(LocalProtocolError, match=says):
        Roster(tuple(Member(name, IDENTITIES[i].public) for name, i in members))


@pytest.mark.parametrize("key", [b"", bytes(31), bytes(33)], ids=len)
def test_a_roster_key_of_another_length_is_refused(key):
    with pytest.raises(LocalProtocolError, match=f"key of c has {len(key)} bytes"):
        Roster.of({"a": IDENTITIES[0].public, "b": IDENTITIES[1].public, "c": key})

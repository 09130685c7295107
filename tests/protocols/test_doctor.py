import os
import re
import tomllib
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import msgspec
import numpy as np
import pytest
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from protocols import doctor
from secagg.errors import BelowThreshold

KNOWN = (Path(doctor.__file__).parent / "data" / "known_answers.json").read_bytes()
VECTORS = msgspec.json.decode(KNOWN, type=list[doctor.Vector])
OTHER = next(vector.expected for vector in VECTORS if vector.primitive == "Ed25519 public key")


def _by_name(checks):
    assert len({check.name for check in checks}) == len(checks)
    return {check.name: check for check in checks}


def _wrong(checks):
    return {check.name for check in checks if not check.ok}


def test_this_machine_passes():
    checks = _by_name(doctor.run_checks())
    assert _wrong(checks.values()) == set()
    assert all(check.detail and "\n" not in check.detail for check in checks.values())
    assert {f"version {name}" for name in doctor.REQUIRED} <= checks.keys()
    assert {f"second opinion {name}" for name in doctor.PRIMITIVES} <= checks.keys()
    assert sum(name.startswith("known answer ") for name in checks) == len(VECTORS)
    assert {"aes-128-ctr speed", "known answers", "refusal Ed25519", "refusal AES-128-GCM"} <= checks.keys()


def test_a_mask_that_is_no_keystream_is_noticed(monkeypatch):
    monkeypatch.setattr(doctor, "add_keystreams", lambda vector, masks: vector.fill(7))
    assert _wrong(doctor.own_checks()) == {"own masks"}


@pytest.mark.parametrize("answer", [(4, [2.0, -4.0, 8.5]), (5, [2.0, -4.0, 8.0])])
def test_a_masked_mean_that_is_wrong_is_noticed(monkeypatch, answer):
    monkeypatch.setattr(doctor, "secure_mean", lambda *_, **__: (answer[0], np.array(answer[1])))
    assert _wrong(doctor.own_checks()) == {"own masked mean"}


def test_a_masked_mean_that_fails_is_noticed(monkeypatch):
    def fail(*_, **__):
        raise BelowThreshold("Unmask", 1, 3)

    monkeypatch.setattr(doctor, "secure_mean", fail)
    (mean,) = [check for check in doctor.own_checks() if not check.ok]
    assert "Unmask" in mean.detail


def test_sources_are_the_documents_asked_for():
    sources = {(vector.primitive, vector.source) for vector in VECTORS}
    assert len(sources) == len(VECTORS)
    assert {source for name, source in sources if name == "HKDF-SHA256"} == {f"RFC 5869 A.{i}" for i in (1, 2, 3)}
    for name in ("Ed25519", "Ed25519 public key"):
        assert {s for n, s in sources if n == name} == {f"RFC 8032 section 7.1, test {i}" for i in (1, 2, 3)}
    assert {s for n, s in sources if n == "X25519"} == {
        "RFC 7748 section 5.2, 1",
        "RFC 7748 section 5.2, 2",
        "RFC 7748 section 6.1, Alice",
        "RFC 7748 section 6.1, Bob",
    }


@pytest.mark.parametrize("vector", VECTORS, ids=lambda vector: f"{vector.primitive}, {vector.source}")
def test_vectors_hold_in_both_libraries(vector):
    primitive, inputs = doctor.PRIMITIVES[vector.primitive], [bytes.fromhex(value) for value in vector.inputs]
    assert primitive.run(*inputs).hex() == primitive.second(*inputs).hex() == vector.expected


# --- versions


def test_bounds_are_those_of_the_project_file():
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    declared = {"python": project["requires-python"]}
    for line in project["dependencies"]:
        name = line.split(">=")[0]
        declared[name] = line.removeprefix(name)
    for name, (least, below) in doctor.REQUIRED.items():
        if name != "secagg":
            assert declared[name] == f">={least}" + (f",<{below}" if below else "")


@pytest.mark.parametrize(
    ("found", "ok"),
    [
        ("2.13.0+cpu", True), ("2.6", True), ("2.6.0", True), ("2.6.0rc1", True), ("2.5.9", False), ("2.10", True),
        ("3", False), ("3.0.0", False), ("10.0", False), ("unknown", False),
    ],
)  # fmt: skip
def test_version_bounds(monkeypatch, found, ok):
    monkeypatch.setattr(doctor.metadata, "version", lambda name: found)
    check = _by_name(doctor.version_checks())["version torch"]
    assert check.ok is ok
    assert found in check.detail
    assert ok or ">= 2.6 and < 3" in check.detail


def test_old_python_and_absent_package(monkeypatch):
    def version(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(doctor.platform, "python_version", lambda: "3.10.12")
    monkeypatch.setattr(doctor.metadata, "version", version)
    checks = _by_name(doctor.version_checks())
    assert _wrong(checks.values()) == checks.keys()
    assert checks["version python"].detail.startswith("expected >= 3.11, found 3.10.12")
    assert "not installed: `pip install opacus`" in checks["version opacus"].detail


# --- speed


def _clock(monkeypatch, seconds_per_call):
    ticks = iter(range(10**6))
    monkeypatch.setattr(doctor.time, "perf_counter", lambda: next(ticks) * seconds_per_call)


def test_speed_is_told_and_never_fails(monkeypatch):
    # One buffer of 262,144 bytes per tick.
    _clock(monkeypatch, 0.02)
    slow = doctor.aes_speed_check()
    assert (slow.name, slow.ok) == ("aes-128-ctr speed", True)
    assert slow.detail.startswith("0.01 GB/s")
    assert "AES instructions seem to be missing" in slow.detail
    _clock(monkeypatch, 0.0005)
    fast = doctor.aes_speed_check()
    assert fast.detail == "0.52 GB/s of keystream on one core"


# --- known answers


@pytest.mark.parametrize("i", range(len(VECTORS)))
def test_a_changed_answer_is_found(i):
    bad = [*VECTORS]
    flipped = bytes([bytes.fromhex(bad[i].expected)[0] ^ 1]).hex() + bad[i].expected[2:]
    bad[i] = msgspec.structs.replace(bad[i], expected=flipped)
    checks = _by_name(doctor.known_answer_checks(msgspec.json.encode(bad)))
    name = f"known answer {bad[i].primitive}, {bad[i].source}"
    assert _wrong(checks.values()) == {name}
    assert flipped in checks[name].detail
    assert VECTORS[i].expected in checks[name].detail


@pytest.mark.parametrize("name", doctor.PRIMITIVES)
def test_a_wrong_primitive_is_found(monkeypatch, name):
    right = doctor.PRIMITIVES[name]

    def wrong(*inputs):
        got = right.run(*inputs)
        return got[:-1] + bytes([got[-1] ^ 0x80]) if got else b"\0"

    monkeypatch.setitem(doctor.PRIMITIVES, name, replace(right, run=wrong))
    named = {f"known answer {name}, {vector.source}" for vector in VECTORS if vector.primitive == name}
    checks = doctor.run_checks()
    assert _wrong(checks) == named | {f"second opinion {name}"}
    second = _by_name(checks)[f"second opinion {name}"]
    assert "cryptography and pycryptodome differ on inputs" in second.detail


@pytest.mark.parametrize(
    ("vectors", "says"),
    [
        (b"", "reinstall"),
        (b"[{}]", "reinstall"),
        (KNOWN.replace(b'"expected"', b'"answer"', 1), "reinstall"),
        (KNOWN.replace(b'"source"', b'"page": 1, "source"', 1), "reinstall"),
        (b"[]", "missing or unknown is .*X25519"),
        (KNOWN.replace(b'"SHA-256"', b'"MD5"'), r"missing or unknown is \['MD5', 'SHA-256'\]"),
    ],
)
def test_a_damaged_list_of_answers_is_found(vectors, says):
    (check,) = doctor.known_answer_checks(vectors)
    assert (check.name, check.ok) == ("known answers", False)
    assert re.search(says, check.detail)


def test_an_absent_list_of_answers_is_found(monkeypatch, tmp_path):
    monkeypatch.setattr(doctor, "files", lambda package: tmp_path)
    (check,) = doctor.known_answer_checks()
    assert not check.ok
    assert "known_answers.json" in check.detail


def test_hex_that_is_none_is_found():
    vectors = [msgspec.structs.replace(VECTORS[0], expected="zz"), *VECTORS[1:]]
    checks = doctor.known_answer_checks(msgspec.json.encode(vectors))
    assert _wrong(checks) == {f"known answer {VECTORS[0].primitive}, {VECTORS[0].source}"}


# --- refusals


def test_an_accepted_forgery_is_found(monkeypatch):
    class Trusting:
        @staticmethod
        def from_public_bytes(data):
            return Trusting()

        def verify(self, signature, message):
            return None

    monkeypatch.setattr(doctor, "Ed25519PublicKey", Trusting)
    checks = _by_name(doctor.refusal_checks())
    assert _wrong(checks.values()) == {"refusal Ed25519"}
    assert "it was accepted" in checks["refusal Ed25519"].detail


@pytest.mark.parametrize("position", [0, 79])
def test_an_accepted_change_of_a_sealed_message_is_found(monkeypatch, position):
    class Trusting:
        """Does not look at the byte at `position`."""

        def __init__(self, key):
            self.cipher, self.sealed = AESGCM(key), b""

        def encrypt(self, nonce, data, label):
            self.sealed = self.cipher.encrypt(nonce, data, label)
            return self.sealed

        def decrypt(self, nonce, data, label):
            mended = data[:position] + self.sealed[position : position + 1] + data[position + 1 :]
            return self.cipher.decrypt(nonce, mended, label)

    monkeypatch.setattr(doctor, "AESGCM", Trusting)
    checks = _by_name(doctor.refusal_checks())
    assert _wrong(checks.values()) == {"refusal AES-128-GCM"}
    assert f"byte {position} " in checks["refusal AES-128-GCM"].detail


def test_a_refused_honest_signature_is_found(monkeypatch):
    class Foreign:
        @staticmethod
        def from_public_bytes(data):
            return Ed25519PublicKey.from_public_bytes(bytes.fromhex(OTHER))

    monkeypatch.setattr(doctor, "Ed25519PublicKey", Foreign)
    check = _by_name(doctor.refusal_checks())["refusal Ed25519"]
    assert not check.ok
    assert check.detail.startswith("InvalidSignature")


# --- second opinions


@pytest.mark.parametrize(
    "error",
    [UnsupportedAlgorithm("no"), ValueError("no"), TypeError("no"), OSError("no"), ImportError("no")],
    ids=lambda error: type(error).__name__,
)
def test_what_a_library_raises_is_a_finding(monkeypatch, error):
    def fails(*inputs):
        raise error

    monkeypatch.setitem(doctor.PRIMITIVES, "SHA-256", replace(doctor.PRIMITIVES["SHA-256"], second=fails))
    checks = _by_name(doctor.second_opinion_checks())
    assert _wrong(checks.values()) == {"second opinion SHA-256"}
    assert checks["second opinion SHA-256"].detail.startswith(f"{type(error).__name__}: no")


def test_our_own_mistake_is_not_hidden(monkeypatch):
    monkeypatch.setattr(doctor, "_aes_speed", lambda: {}["absent"])
    with pytest.raises(KeyError):
        doctor.aes_speed_check()


def test_a_pycryptodome_without_x25519_is_told(monkeypatch):
    from Crypto.Protocol import DH

    monkeypatch.delattr(DH, "import_x25519_private_key")
    checks = _by_name(doctor.second_opinion_checks())
    assert _wrong(checks.values()) == set()
    for name in ("X25519", "X25519 public key"):
        assert checks[f"second opinion {name}"].detail.startswith("none: pycryptodome")


def test_random_inputs_are_random_and_of_every_length():
    for name, primitive in doctor.PRIMITIVES.items():
        assert primitive.random_inputs(64) != primitive.random_inputs(64)
        if name in ("Ed25519", "AES-128-CTR", "AES-128-GCM", "SHA-256"):
            assert 4096 in map(len, primitive.random_inputs(4096))
    for _ in range(50):
        # Unlike the keys of the self-check, half of these points have their top bit set.
        inputs = os.urandom(32), os.urandom(32)
        assert doctor.PRIMITIVES["X25519"].run(*inputs) == doctor.PRIMITIVES["X25519"].second(*inputs)

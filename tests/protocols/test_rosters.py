"""Key files and rosters: what they hold, who may read them, and the file that someone has changed."""

import errno
import os
import re
import stat
import subprocess
import tomllib

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from protocols.errors import KeyFileError
from protocols.rosters import (
    PublicKey,
    load_identity,
    load_public_key,
    load_roster,
    new_identity,
    read_passphrase,
    roster_of,
    roster_text,
    write_public_key,
    write_roster,
)
from secagg.keys import Identity, Roster, fingerprint
from secagg.prg import Label, deterministic_entropy

PASSPHRASE = "six random words do well enough"
SITES = ("north", "south", "west")


def publics(sites=SITES, seed=b"rosters"):
    entropy = deterministic_entropy(seed)
    return [PublicKey(name, Identity.generate(entropy).public) for name in sites]


def roster(sites=SITES):
    return roster_of(publics(sites))


def refused(says, call, *arguments):
    with pytest.raises(KeyFileError, match=says) as caught:
        call(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- the secret key


@pytest.mark.parametrize("passphrase", [None, PASSPHRASE, "sechzehn Zeichen äöü €"])
def test_a_key_comes_back_from_its_file(tmp_path, passphrase):
    made = new_identity(tmp_path / "north.key", passphrase, os.urandom)
    again = load_identity(tmp_path / "north.key", passphrase)
    assert again.public == made.public
    payload = Label.SIGN_KEYS, bytes(32), b"payload"
    assert again.sign(*payload) == made.sign(*payload)


def test_the_key_is_what_the_entropy_gave(tmp_path):
    made = new_identity(tmp_path / "north.key", None, lambda count: bytes(range(count)))
    assert made.public == Identity(bytes(range(32))).public


def test_the_key_is_for_its_owner_only_from_the_start_and_encrypted_where_it_was_asked_for(tmp_path, monkeypatch):
    modes, write = set(), os.write

    def looking(descriptor, content):
        modes.add(stat.S_IMODE(os.fstat(descriptor).st_mode))
        return write(descriptor, content)

    monkeypatch.setattr(os, "write", looking)
    before = os.umask(0)
    try:
        new_identity(tmp_path / "plain.key", None, os.urandom)
        new_identity(tmp_path / "closed.key", PASSPHRASE, os.urandom)
    finally:
        os.umask(before)
    assert modes == {0o600}
    assert {stat.S_IMODE(p.stat().st_mode) for p in tmp_path.iterdir()} == {0o600}
    assert (tmp_path / "plain.key").read_text().startswith("-----BEGIN PRIVATE KEY-----")
    assert (tmp_path / "closed.key").read_text().startswith("-----BEGIN ENCRYPTED PRIVATE KEY-----")


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o644, 0o620, 0o777])
def test_a_key_that_others_may_open_is_refused_with_what_to_do(tmp_path, mode):
    path = tmp_path / "north.key"
    new_identity(path, None, os.urandom)
    path.chmod(mode)
    assert f"chmod 600 {path}" in refused(f"mode {mode:04o}", load_identity, path)


def test_a_key_is_never_overwritten(tmp_path):
    path = tmp_path / "north.key"
    for taken in ("file", "link", "folder"):
        if taken == "file":
            path.write_text("precious")
        elif taken == "link":
            path.symlink_to(tmp_path / "nowhere")
        else:
            path.mkdir()
        before = list(tmp_path.iterdir())
        refused("exists already, and is not overwritten", new_identity, path, None, os.urandom)
        assert list(tmp_path.iterdir()) == before
        if taken == "file":
            assert path.read_text() == "precious"
        path.rmdir() if taken == "folder" else path.unlink()


def test_of_two_who_write_at_once_one_is_refused(tmp_path, monkeypatch):
    path, link = tmp_path / "north.key", os.link

    def late(source, target):
        if not path.exists():
            path.write_bytes(b"the other one")
        link(source, target)

    monkeypatch.setattr(os, "link", late)
    refused("exists already", new_identity, path, None, os.urandom)
    assert path.read_bytes() == b"the other one"


@pytest.mark.parametrize("step", ["open", "write", "fsync", "link"])
def test_a_full_disk_leaves_no_half_of_a_key(tmp_path, monkeypatch, step):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, step, full)
        refused("could not be written: No space left", new_identity, tmp_path / "north.key", None, os.urandom)
    assert not list(tmp_path.iterdir())


def test_a_key_is_durable_when_it_is_made(tmp_path, monkeypatch):
    synced, fsync = [], os.fsync

    def looking(descriptor):
        synced.append("folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file")
        assert (tmp_path / "north.key").exists() == (synced[-1] == "folder")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", looking)
    new_identity(tmp_path / "north.key", None, os.urandom)
    assert synced == ["file", "folder"]


@pytest.mark.parametrize("passphrase", ["", "fifteen letters", "x" * 1024, "ä" * 600, "\udc80" * 20])
def test_a_passphrase_that_is_too_short_too_long_or_no_text_is_refused(tmp_path, passphrase):
    line = refused("expected a passphrase of", new_identity, tmp_path / "north.key", passphrase, os.urandom)
    assert not passphrase or passphrase not in line
    assert not list(tmp_path.iterdir())


def test_the_shortest_and_the_longest_passphrase_do(tmp_path):
    for passphrase in ("x" * 16, "x" * 1023):
        made = new_identity(tmp_path / f"{len(passphrase)}.key", passphrase, os.urandom)
        assert load_identity(tmp_path / f"{len(passphrase)}.key", passphrase).public == made.public


def test_passphrase_and_key_must_belong_together(tmp_path):
    closed, plain = tmp_path / "closed.key", tmp_path / "plain.key"
    new_identity(closed, PASSPHRASE, os.urandom)
    new_identity(plain, None, os.urandom)
    refused("is encrypted: give its passphrase", load_identity, closed)
    line = refused("or the passphrase is wrong", load_identity, closed, PASSPHRASE + "!")
    assert PASSPHRASE not in line
    refused("is not encrypted: give no passphrase", load_identity, plain, PASSPHRASE)


def test_a_key_that_another_tool_has_encrypted_is_read(tmp_path):
    plain, closed = tmp_path / "plain.key", tmp_path / "closed.key"
    made = new_identity(plain, None, os.urandom)
    command = ["openssl", "pkcs8", "-topk8", "-scrypt", "-in", plain, "-out", closed, "-passout", "pass:short"]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("no openssl here")
    closed.chmod(0o600)
    assert load_identity(closed, "short").public == made.public


def pem(key, public=False):
    if public:
        return key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "expected a secret key in PEM"),
        (b"\xff" * 99, "expected a secret key in PEM"),
        (pem(ed25519.Ed25519PrivateKey.generate())[:70], "expected a secret key in PEM"),
        (pem(ed25519.Ed25519PrivateKey.generate(), public=True), "expected a secret key in PEM"),
        (pem(ec.generate_private_key(ec.SECP256R1())), "expected an Ed25519 key, got another kind"),
        (b"-----BEGIN PRIVATE KEY-----\nMC4=\n-----END PRIVATE KEY-----\n", "expected a secret key in PEM"),
    ],
)
def test_what_is_no_ed25519_key_is_refused(tmp_path, content, says):
    path = tmp_path / "north.key"
    path.write_bytes(content)
    path.chmod(0o600)
    refused(says, load_identity, path)


def test_a_key_that_is_not_there_or_no_file_is_refused(tmp_path):
    refused("cannot be read: No such file", load_identity, tmp_path / "north.key")
    refused("expected a plain file|cannot be read", load_identity, tmp_path)
    os.mkfifo(tmp_path / "pipe", 0o600)
    refused("expected a plain file", load_identity, tmp_path / "pipe")


# --- a passphrase in a file


@pytest.mark.parametrize("ending", ["", "\n", "\r\n"])
def test_a_passphrase_is_one_line_of_a_file(tmp_path, ending):
    path = tmp_path / "passphrase"
    path.write_bytes((PASSPHRASE + ending).encode())
    path.chmod(0o600)
    assert read_passphrase(path) == PASSPHRASE
    path.chmod(0o644)
    refused("chmod 600", read_passphrase, path)


@pytest.mark.parametrize("content", [b"", b"\n", b"two\nlines", b"caf\xe9", b"nul\0"])
def test_what_is_no_line_of_text_is_no_passphrase(tmp_path, content):
    path = tmp_path / "passphrase"
    path.write_bytes(content)
    path.chmod(0o600)
    line = refused("expected a passphrase in", read_passphrase, path)
    assert "lines" not in line
    assert "nul" not in line


# --- the public key and the roster


def test_a_public_key_comes_back_from_its_file(tmp_path):
    public = publics()[0]
    write_public_key(tmp_path / "north.pub", public)
    assert load_public_key(tmp_path / "north.pub") == public
    assert tomllib.loads((tmp_path / "north.pub").read_text()) == {
        "name": "north",
        "key": public.key.hex(),
        "fingerprint": fingerprint(public.key),
    }
    refused("exists already", write_public_key, tmp_path / "north.pub", public)


def test_a_roster_comes_back_from_its_file_whatever_the_order_in_it(tmp_path):
    made = roster(("west", "a.b-c_D", "north", "south"))
    write_roster(tmp_path / "roster.toml", made)
    assert load_roster(tmp_path / "roster.toml") == made
    head, *entries = (tmp_path / "roster.toml").read_text().split("[[member]]")
    (tmp_path / "turned.toml").write_text("[[member]]".join([head, *(f"{entry}\n" for entry in entries[::-1])]))
    assert load_roster(tmp_path / "turned.toml") == made
    for member in made.members:
        assert fingerprint(member.identity) in roster_text(made)


def test_what_is_for_everybody_can_be_read_by_everybody(tmp_path):
    before = os.umask(0)
    try:
        write_roster(tmp_path / "roster.toml", roster())
        write_public_key(tmp_path / "north.pub", publics()[0])
    finally:
        os.umask(before)
    assert {stat.S_IMODE(p.stat().st_mode) for p in tmp_path.iterdir()} == {0o644}


def test_a_roster_is_not_overwritten_and_not_half_written(tmp_path, monkeypatch):
    path = tmp_path / "roster.toml"
    path.write_text("the one that was agreed on")
    refused("exists already", write_roster, path, roster())
    assert path.read_text() == "the one that was agreed on"
    path.unlink()
    monkeypatch.setattr(os, "write", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left")))
    refused("No space left", write_roster, path, roster())
    assert not list(tmp_path.iterdir())


def test_a_name_that_would_break_the_file_is_not_written(tmp_path):
    for name in ('a"\nkey = "', "a b", "", "x" * 65, "ä", "a/b", "north\n"):
        refused("expected a name of", write_public_key, tmp_path / "x.pub", PublicKey(name, bytes(32)))
        bad = Roster.of({name: bytes(32), "north": b"n" * 32, "south": b"s" * 32})
        refused("expected a name of", write_roster, tmp_path / "roster.toml", bad)
    assert not list(tmp_path.iterdir())


def edited(tmp_path, edit):
    path = tmp_path / "roster.toml"
    path.write_text(edit(roster_text(roster())))
    return path


OTHER = publics(seed=b"other")[0]
SOUTH = publics()[1]


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (lambda t: t.replace(SOUTH.key.hex(), OTHER.key.hex()), r"member\[1\]: the key of south has the fingerprint"),
        (lambda t: t.replace(SOUTH.fingerprint, OTHER.fingerprint), "the key of south has the fingerprint"),
        (lambda t: t.replace(SOUTH.fingerprint, SOUTH.fingerprint.upper()), "the key of south has the fingerprint"),
        (lambda t: t.replace(SOUTH.key.hex(), SOUTH.key.hex()[:-2]), r"key of south as 64 hexadecimal digits"),
        (lambda t: t.replace(SOUTH.key.hex(), SOUTH.key.hex() + "00"), r"key of south as 64 hexadecimal digits"),
        (lambda t: t.replace(SOUTH.key.hex(), "g" * 64), r"key of south as 64 hexadecimal digits"),
        (lambda t: t.replace(SOUTH.key.hex(), "é" * 64), r"key of south as 64 hexadecimal digits"),
        (lambda t: t.replace('"south"', '"so uth"'), r"member\[1\]: expected a name of .* got 'so uth'"),
        (lambda t: t.replace('"south"', '"so\\nuth"'), r"member\[1\]: expected a name of .* got 'so\\nuth'"),
        (lambda t: t.replace('"south"', '"north"'), "each name once, got north more than once"),
        (lambda t: re.sub(r'key = "\w+"\nfingerprint.*', PAIR, t), "have the same public key"),
        (lambda t: t.rpartition("[[member]]")[0], "at least 3 participants, got 2"),
        (lambda t: t.replace("[[member]]", "[[members]]"), r"roster\.toml: members: unknown key; did you mean member"),
        (lambda t: t + 'role = "admin"\n', r"member\[2\]\.role: unknown key"),
        (lambda t: re.sub("fingerprint = .*", "", t), r"member\[0\]\.fingerprint: expected a value, got none"),
        (lambda t: "", r"member: expected a value, got none"),
        (lambda t: "member = 3", r"member: expected a list, got a whole number \(3\)"),
        (lambda t: "member = []", "at least 3 participants, got 0"),
        (lambda t: t[:-5], "no valid TOML"),
        (lambda t: "a = " + "[" * 100_000, "no valid TOML"),
    ],
)
def test_a_roster_that_was_changed_or_makes_no_sense_is_refused(tmp_path, edit, says):
    line = refused(says, load_roster, edited(tmp_path, edit))
    assert line.startswith(f"{tmp_path / 'roster.toml'}: ")


PAIR = f'key = "{OTHER.key.hex()}"\nfingerprint = "{OTHER.fingerprint}"'


def test_a_public_key_that_was_changed_is_refused_and_both_fingerprints_are_named(tmp_path):
    path = tmp_path / "south.pub"
    write_public_key(path, SOUTH)
    path.write_text(path.read_text().replace(SOUTH.key.hex(), OTHER.key.hex()))
    line = refused("the file was damaged or changed", load_public_key, path)
    assert SOUTH.fingerprint in line
    assert OTHER.fingerprint in line


def test_a_file_that_is_missing_or_no_text_is_refused(tmp_path):
    for load in (load_roster, load_public_key):
        refused("cannot be read: No such file", load, tmp_path / "missing")
        refused("cannot be read", load, tmp_path)
        (tmp_path / "latin").write_bytes(b"caf\xe9")
        refused("expected a text file in UTF-8", load, tmp_path / "latin")


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text(max_size=80) | st.binary(max_size=80), st.integers(0, 700))
def test_whatever_is_in_a_file_the_outcome_is_our_error(tmp_path, garbage, at):
    text = roster_text(roster()).encode()
    garbage = garbage.encode("utf-8", "replace") if isinstance(garbage, str) else garbage
    (tmp_path / "file").write_bytes(text[:at] + garbage + text[at:])
    (tmp_path / "file").chmod(0o600)
    for load in (load_roster, load_public_key, load_identity):
        told = ""
        try:
            # A name may be another, which is for the site's own pins to notice; a key may not.
            assert {m.identity for m in load(tmp_path / "file").members} == {m.identity for m in roster().members}
        except KeyFileError as error:
            told = str(error)
        assert "\n" not in told


def test_two_sites_of_one_name_or_key_are_not_put_together():
    north, south, west = publics()
    refused("each name once, got north", roster_of, [north, south, west, PublicKey("north", OTHER.key)])
    refused("have the same public key", roster_of, [north, south, PublicKey("west", north.key)])
    refused("at least 3", roster_of, [north, south])
    assert roster_of([west, north, south]) == roster()

"""The commands `secagg keys`: what they write, what they print, and what they refuse to overwrite."""

import errno
import os
import re
import stat
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path

import pytest

from protocols import rosters
from protocols.rosters import load_identity, load_public_key, load_roster
from secagg.keys import fingerprint
from tests.protocols.hospitals import command as secagg
from tests.protocols.hospitals import succeeded

SITES = ("north", "south", "west")
PASSPHRASE = "six random words do well enough"
DOCUMENT = Path(__file__).parents[2] / "docs" / "site.md"


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


keys = partial(secagg, "keys")
done = partial(succeeded, "keys")


def refused(says, *arguments):
    result = keys(*arguments)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert re.search(says, line), line
    assert line.startswith("Error: ")
    return line


@pytest.fixture
def sites(here):
    for name in SITES:
        done("new-site", name, "--no-passphrase")
    return here


def printed(folder=Path(), names=SITES):
    return [f"{name:5}  {fingerprint(load_public_key(folder / f'{name}.pub').key)}" for name in names]


def test_a_new_site_has_a_closed_key_an_open_one_and_a_fingerprint(here):
    output = done("new-site", "north", "--no-passphrase")
    public = load_public_key(here / "north.pub")
    assert {p.name for p in here.iterdir()} == {"north.key", "north.pub"}
    assert stat.S_IMODE((here / "north.key").stat().st_mode) == 0o600
    assert load_identity(here / "north.key").public == public.key
    assert public.name == "north"
    assert output.splitlines()[-1] == public.fingerprint
    secret = (here / "north.key").read_text().splitlines()[1]
    assert secret not in output + (here / "north.pub").read_text()


def test_two_sites_have_different_keys(here):
    for out in ("a", "b"):
        (here / out).mkdir()
        done("new-site", "north", "--no-passphrase", "--out", out)
    assert load_public_key(here / "a/north.pub").key != load_public_key(here / "b/north.pub").key


def test_a_passphrase_from_a_file_encrypts_the_key(here):
    (here / "passphrase").write_text(PASSPHRASE + "\n")
    refused("chmod 600 passphrase", "new-site", "north", "--passphrase-file", "passphrase")
    (here / "passphrase").chmod(0o600)
    done("new-site", "north", "--passphrase-file", "passphrase")
    assert load_identity(here / "north.key", PASSPHRASE).public == load_public_key(here / "north.pub").key
    assert done("show", "north.key", "--passphrase-file", "passphrase").splitlines() == printed(names=["north"])
    refused("passphrase is typed on a terminal", "show", "north.key")
    (here / "passphrase").write_text("fifteen letters")
    refused("at least 16 characters", "new-site", "south", "--passphrase-file", "passphrase")
    refused("passphrase is wrong", "show", "north.key", "--passphrase-file", "passphrase")


def test_a_key_is_not_left_open_because_nobody_could_be_asked(here):
    refused("passphrase is typed on a terminal, and this is none; give --passphrase-file", "new-site", "north")
    refused("contradict", "new-site", "north", "--no-passphrase", "--passphrase-file", "x")
    assert not list(here.iterdir())


@pytest.mark.parametrize("typed", [(PASSPHRASE, PASSPHRASE), (PASSPHRASE, "another", PASSPHRASE, PASSPHRASE)])
def test_a_passphrase_is_asked_for_twice_on_a_terminal_and_not_shown(here, typed):
    ours, theirs = os.openpty()
    command = [sys.executable, "-c", "from protocols.cli import main; main()", "keys", "new-site", "north"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    with subprocess.Popen(
        command, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True, env=environment
    ) as process:
        os.close(theirs)
        watchdog = threading.Timer(60, process.kill)
        watchdog.start()
        shown, answers = b"", list(typed)
        while True:
            try:
                shown += os.read(ours, 1024)
            except OSError:  # the other end is closed
                break
            # The space comes when typing is hidden; what was typed before is thrown away.
            if shown.endswith(b": ") and answers:
                os.write(ours, answers.pop(0).encode() + b"\n")
        watchdog.cancel()
    os.close(ours)
    assert process.returncode == 0, shown
    assert not answers
    assert PASSPHRASE.encode() not in shown
    assert load_identity(here / "north.key", PASSPHRASE).public == load_public_key(here / "north.pub").key


@pytest.mark.parametrize("taken", ["north.key", "north.pub"])
def test_neither_half_of_a_key_is_overwritten(here, taken):
    (here / taken).write_text("precious")
    refused(f"{taken} exists already", "new-site", "north", "--no-passphrase")
    refused(f"{taken} exists already", "new-site", "north")  # before a passphrase is asked for
    assert {p.name: p.read_text() for p in here.iterdir()} == {taken: "precious"}


@pytest.mark.parametrize("fails", ["north.key", "north.pub"])
def test_a_full_disk_leaves_no_half_of_a_pair(here, monkeypatch, fails):
    write_new = rosters.write_new

    def full(path, content, mode):
        if path.name == fails:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write_new(path, content, mode)

    monkeypatch.setattr(rosters, "write_new", full)
    refused(f"{fails}: could not be written: No space left", "new-site", "north", "--no-passphrase")
    assert not list(here.iterdir())


@pytest.mark.parametrize("name", ["a/b", "../north", "", "nor th", "x" * 65, "nörd"])
def test_a_name_that_no_study_takes_is_refused(here, name):
    refused("expected a name of 1 to 64 letters", "new-site", name, "--no-passphrase")
    assert not list(here.iterdir())


def test_a_folder_that_is_not_there_is_told(here):
    refused("no/north.key: could not be written: No such file", "new-site", "north", "--no-passphrase", "--out", "no")


# --- the roster


def test_the_public_keys_of_all_make_a_roster(sites):
    output = done("roster", "west.pub", "north.pub", "south.pub", "-o", "made.toml")
    assert {m.name: m.identity for m in load_roster(sites / "made.toml").members} == {
        name: load_public_key(sites / f"{name}.pub").key for name in SITES
    }
    assert output.splitlines()[1:] == printed()


def test_a_roster_is_refused_where_it_makes_no_sense_and_nothing_is_written(sites):
    before = {p.name: p.read_bytes() for p in sites.iterdir()}
    refused("at least 3 participants, got 2", "roster", "north.pub", "south.pub")
    refused("each name once, got north", "roster", "north.pub", "south.pub", "west.pub", "north.pub")
    refused("missing.pub: cannot be read", "roster", "north.pub", "south.pub", "missing.pub")
    refused("north.key: no valid TOML", "roster", "north.key", "south.pub", "west.pub")
    assert {p.name: p.read_bytes() for p in sites.iterdir()} == before


def test_a_roster_is_not_overwritten(sites):
    done("roster", *(f"{name}.pub" for name in SITES))
    before = (sites / "roster.toml").read_bytes()
    refused("roster.toml exists already", "roster", *(f"{name}.pub" for name in SITES))
    assert (sites / "roster.toml").read_bytes() == before


# --- show


def test_show_tells_names_and_fingerprints_of_every_kind_of_file(sites):
    done("roster", *(f"{name}.pub" for name in SITES))
    assert done("show", "roster.toml").splitlines() == printed()
    assert done("show", "south.pub").splitlines() == printed(names=["south"])
    assert done("show", "south.key").splitlines() == printed(names=["south"])
    (sites / "south.key").rename(sites / "identity")
    assert done("show", "identity").split(maxsplit=1)[1] == printed(names=["south"])[0].split(maxsplit=1)[1] + "\n"


def test_show_refuses_what_is_none_of_them(sites):
    refused("cannot be read: No such file", "show", "missing")
    (sites / "south.key").chmod(0o644)
    refused("chmod 600 south.key", "show", "south.key")
    (sites / "x.toml").write_text("x = 1")
    refused("x: unknown key", "show", "x.toml")
    (sites / "south.pub").write_text((sites / "south.pub").read_text().replace("south", "north\x1b[31m"))
    assert "\x1b" not in refused("south.pub: ", "show", "south.pub")


# --- the document


def blank(text):
    return re.sub(r"\b([0-9a-f]{4} ){7}[0-9a-f]{4}\b", "FINGERPRINT", text)


def test_the_commands_in_the_document_print_what_it_shows(here):
    transcript = "".join(re.findall(r"```console\n(.*?)```", DOCUMENT.read_text(), re.DOTALL))
    commands = re.findall(r"^\$ secagg keys (.*)\n((?:(?!\$ ).*\n)*)", transcript, re.MULTILINE)
    assert len(commands) == 3
    (here / "passphrase.txt").write_text(PASSPHRASE)
    (here / "passphrase.txt").chmod(0o600)
    for name in ("south", "west"):
        done("new-site", name, "--no-passphrase")
    for command, output in commands:
        assert blank(done(*command.split())) == blank(output), command


def test_the_keys_are_made_without_torch():
    code = (
        "import sys\nfrom typer.testing import CliRunner\nfrom protocols.cli import app\n"
        "CliRunner().invoke(app, ['keys', 'show', 'missing'])\nsys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], check=False).returncode == 0

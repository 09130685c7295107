"""The command `secagg verify`: what it tells an auditor, what it tells the shell, and what no forger makes it do."""

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
from typer.testing import CliRunner

from protocols import cli_verify
from protocols.cli import Exit, app
from protocols.output import write_run
from protocols.rosters import load_roster, write_roster
from protocols.run import run_study
from protocols.study import load_study
from secagg.keys import Identity, Roster
from secagg.masking.transcript import Closing, read, write
from secagg.wire import encode
from tests.protocols.hospitals import hospital, table, write_csv
from tests.secagg.simulation import changed

SITES = ("ash", "birch", "cedar", "dogwood")
STUDY = """
name = "four hospitals"
rounds = 4
sites = [
    { name = "ash", data = "ash.csv" },
    { name = "birch", data = "birch.csv" },
    { name = "cedar", data = "cedar.csv" },
    { name = "dogwood", data = "dogwood.csv" },
]

[task]
data = "csv"
features = ["age", "dose", "pulse"]
target = "ill"

[training]
local_steps = 1
"""
DROPS = (
    "--drop=cedar:MaskedInput:3",  # the others' sum is recovered
    *("--drop=ash:MaskedInput:1", "--drop=birch:MaskedInput:1"),  # too many: the round is lost
)


def secagg(*arguments):
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


@pytest.fixture(scope="module")
def study_run(tmp_path_factory):
    """The folder of a study that the command ran."""
    folder = tmp_path_factory.mktemp("study")
    for name in SITES:
        write_csv(folder / f"{name}.csv", hospital(name, rows=14))
    (folder / "study.toml").write_text(STUDY)
    result = secagg("run", folder / "study.toml", "--no-baselines", "--quiet", "--out", folder / "out", *DROPS)
    assert result.exit_code == 0, result.output
    return folder


@pytest.fixture
def here(study_run, tmp_path, monkeypatch):
    """Copies of the study file and of what the run left for auditors; the command runs there."""
    for source in (study_run / "study.toml", study_run / "out" / "transcript.bin", study_run / "out" / "roster.toml"):
        (tmp_path / source.name).write_bytes(source.read_bytes())
    monkeypatch.chdir(tmp_path)
    return tmp_path


def verify(*options, transcript="transcript.bin", roster="roster.toml"):
    return secagg("verify", transcript, "--roster", roster, *options)


def words(text):
    return " ".join(text.split())


def refused(result, code):
    """The last line of standard error, without its head."""
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.stderr
    *_, last = result.stderr.splitlines()
    assert last.startswith("Error: ")
    return last.removeprefix("Error: ")


def change(tamper):
    entries = read(Path("transcript.bin").read_bytes())
    Path("transcript.bin").write_bytes(write(tamper(entries)))


def test_a_study_that_was_run_holds(here):
    result = verify()
    assert (result.exit_code, result.stderr) == (0, "")
    records = read(Path("transcript.bin").read_bytes())[:-1]
    for record in records:
        assert record.sum_digest.hex()[:12] in result.stdout
        assert record.subject.model_digest.hex()[:12] in result.stdout
    told = words(result.stdout)
    digest = load_study(Path("study.toml")).digest.hex()[:16]
    assert f"{len(records)} sums over study {digest} (threshold 3 of 4)" in told
    assert "the end is signed by ash, birch, cedar, dogwood. Everything holds." in told
    assert "ash, birch, dogwood" in told  # the survivors of round 3
    assert "3 of 4" in told


def test_it_says_what_it_shows_and_what_not(here):
    told = verify().stdout
    shows, shows_not = told.index("What this shows"), told.index("What this does not show")
    assert shows < told.index("signed that they used this study configuration") < shows_not
    for claim in cli_verify._SHOWS + cli_verify._SHOWS_NOT:
        assert f"- {claim}" in told
    assert shows_not < told.index("is the right sum of the vectors")


def test_rounds_that_are_not_on_record_are_told(here):
    assert "Numbers of rounds not on record: 1 to 2. Ask the sites if they gave their parts there." in words(
        verify().stdout
    )


def test_under_its_study_file_it_holds_and_tells_how_many_rounds_there_are(here):
    result = verify("--study", "study.toml")
    assert result.exit_code == 0
    assert "Of the 4 rounds of training in the study file, 3 are on record." in words(result.stdout)


def test_under_another_study_file_it_does_not_hold(here):
    Path("other.toml").write_text(STUDY.replace("rounds = 4", "rounds = 5"))
    result = verify("--study", "other.toml")
    assert refused(result, Exit.UNPROVEN) == ("transcript.bin does not hold under roster.toml: 1 problem, listed above")
    digests = [load_study(Path(name)).digest.hex()[:16] for name in ("study.toml", "other.toml")]
    assert f"digest {digests[0]}, and that of other.toml is {digests[1]}" in result.stderr
    assert "Everything holds" not in result.stdout
    assert "What this shows" not in result.stdout


def test_json_is_all_of_it_and_nothing_else(here):
    result = verify("--json")
    assert (result.exit_code, result.stderr) == (0, "")
    told = json.loads(result.stdout)
    assert (told["holds"], told["problems"]) == (True, [])
    assert [r["round"] for r in told["rounds"]] == [0, 3, 4]
    assert told["rounds_not_on_record"] == [[1, 2]]
    record = read(Path("transcript.bin").read_bytes())[1]
    assert told["rounds"][1] == {
        "round": 3,
        "purpose": "train",
        "threshold": 3,
        "suite": record.suite,
        "study_digest": load_study(Path("study.toml")).digest.hex(),
        "model_digest": record.subject.model_digest.hex(),
        "dimension": record.subject.dimension,
        "ring_bits": record.subject.ring_bits,
        "sum_digest": record.sum_digest.hex(),
        "advertised": list(SITES),
        "shared": list(SITES),
        "survivors": ["ash", "birch", "dogwood"],
        "confirmed": ["ash", "birch", "dogwood"],
    }
    assert told["end"]["signed"] == list(SITES)
    assert told["shows"] == list(cli_verify._SHOWS)
    assert told["does_not_show"] == list(cli_verify._SHOWS_NOT)


def test_a_change_is_named_and_told_the_shell(here):
    change(lambda entries: [entries[0], changed(entries[1], survivors=(0, 1, 2)), *entries[2:]])
    result = verify()
    assert "does not hold under roster.toml" in refused(result, Exit.UNPROVEN)
    assert "  round 3: nobody's signature fits the survivors ash, birch, cedar" in result.stderr
    assert result.stdout.startswith("What the file says, which does not hold:")
    assert "Everything holds" not in result.stdout


def test_json_of_one_that_does_not_hold_says_so(here):
    change(lambda entries: entries[1:])
    result = verify("--json")
    assert refused(result, Exit.UNPROVEN)
    told = json.loads(result.stdout)
    assert told["holds"] is False
    assert told["shows"] == []
    assert told["problems"][0].startswith("round 3: its participants were shown a record before it, and here it is the")
    assert result.stderr.count("\n") == 1


def test_a_missing_end_is_named(here):
    change(lambda entries: entries[:-1])
    result = verify("--json")
    assert refused(result, Exit.UNPROVEN)
    told = json.loads(result.stdout)
    assert told["end"] is None
    assert told["problems"] == [
        "the end: it is missing: the transcript was cut short, or its study never came to an end"
    ]


def test_another_key_on_the_roster_is_named(here):
    keys = {m.name: m.identity for m in load_roster(Path("roster.toml")).members}
    write_roster(Path("other.toml"), Roster.of(keys | {"birch": Identity(b"\x05" * 32).public}))
    result = verify(roster="other.toml")
    assert refused(result, Exit.UNPROVEN)
    assert "round 0: the keys of birch are not signed under this roster" in result.stderr
    assert "the end: the signature of birch does not fit" in result.stderr


def test_an_empty_transcript_proves_nothing(here):
    Path("transcript.bin").write_bytes(b"")
    result = verify()
    assert refused(result, Exit.UNPROVEN)
    assert "the transcript is empty" in result.stderr
    assert result.stdout == ""


def test_a_study_without_signatures_leaves_no_transcript_and_it_is_said_why(here):
    for name in SITES:
        write_csv(here / f"{name}.csv", hospital(name, rows=14))
    Path("study.toml").write_text(STUDY + '[protocol]\nmode = "semi-honest"\n')
    assert secagg("run", "study.toml", "--no-baselines", "--quiet", "--out", "out").exit_code == 0
    told = refused(verify(transcript="out/transcript.bin", roster="out/roster.toml"), Exit.BAD_INPUT)
    assert told.startswith("out/transcript.bin: there is no such file; plain and semi-honest studies leave none")


def test_a_run_that_was_written_as_the_library_does_holds(tmp_path):
    study = msgspec.convert(table(SITES, rounds=2), load_study.__globals__["Study"])
    run = run_study(study, {name: hospital(name) for name in SITES})
    assert "transcript.bin" in write_run(run, tmp_path / "out")
    result = verify(transcript=tmp_path / "out/transcript.bin", roster=tmp_path / "out/roster.toml")
    assert result.exit_code == 0, result.stderr


# --- bad input


def test_what_is_no_transcript_is_refused_in_one_line(here):
    for content in (b"garbage", bytes(1000), Path("study.toml").read_bytes(), b"\x80\x04\x95" + bytes(50)):
        Path("other.bin").write_bytes(content)
        result = verify(transcript="other.bin")
        assert refused(result, Exit.BAD_INPUT).startswith("other.bin: entry 0 of the transcript, at byte 0: ")
        assert result.stderr.count("\n") == 1
        assert result.stdout == ""


def test_a_transcript_that_is_cut_off_is_refused(here):
    whole = Path("transcript.bin").read_bytes()
    Path("transcript.bin").write_bytes(whole[: len(whole) // 2])
    assert "cut off" in refused(verify(), Exit.BAD_INPUT)


def test_what_cannot_be_read_is_refused(here):
    assert refused(verify(transcript="."), Exit.BAD_INPUT) == ".: cannot be read: Is a directory"
    assert refused(verify(roster="none.toml"), Exit.BAD_INPUT).startswith("none.toml: cannot be read: No such file")
    told = refused(verify("--study", "none.toml"), Exit.BAD_INPUT)
    assert told.startswith("none.toml: ")


def test_a_roster_that_is_none_is_refused_before_the_transcript_is_read(here):
    told = refused(verify(roster="study.toml", transcript="none.bin"), Exit.BAD_INPUT)
    assert told.startswith("study.toml: ")


def test_a_name_with_markup_cannot_be_on_a_roster(here):
    text = Path("roster.toml").read_text()
    for name in ("[/bold]", "a[red]b", "a\\nb", "\\u001b[2J"):
        Path("roster.toml").write_text(text.replace('name = "birch"', f'name = "{name}"'))
        result = verify()
        assert "expected a name of 1 to 64 letters" in refused(result, Exit.BAD_INPUT)
        assert result.stderr.count("\n") == 1


@pytest.mark.parametrize("purpose", ["[/bold]", "[red]train[/red]", "\x1b[2J\x1b[H", "a\nHolds", "\u202e"])
def test_what_a_forger_writes_neither_breaks_nor_styles_the_output(here, purpose):
    def tamper(entries):
        subject = changed(entries[0].subject, purpose=purpose)
        confirmations = {u: changed(c, subject=subject) for u, c in entries[0].confirmations.items()}
        return [changed(entries[0], subject=subject, confirmations=confirmations), *entries[1:]]

    change(tamper)
    result = verify()
    assert refused(result, Exit.UNPROVEN)
    for mark in ("\x1b", "\u202e", "\nHolds"):
        assert mark not in result.output
    shown = purpose if purpose.isprintable() else purpose.encode("unicode_escape").decode()
    assert shown in result.stdout
    change(lambda entries: [changed(entries[0], subject=changed(entries[0].subject, purpose="x")), *entries[1:]])
    for told in verify().stderr.splitlines():
        assert told.isprintable()


def test_a_problem_with_a_strangers_words_is_one_printable_line(here):
    change(lambda entries: [changed(entries[0], suite="\x1b[31m\nError: none"), *entries[1:]])
    result = verify()
    assert refused(result, Exit.UNPROVEN)
    assert all(line.isprintable() for line in result.stderr.splitlines())
    assert "Error: none" not in result.stderr.splitlines()


def test_a_message_with_a_strangers_words_is_short_and_printable(here):
    body = b"\x01" + msgspec.msgpack.encode(["\x1b[31m\n[/bold]" + "A" * 100_000])
    Path("transcript.bin").write_bytes(len(body).to_bytes(4, "big") + body)
    result = verify()
    told = refused(result, Exit.BAD_INPUT)
    assert told.isprintable()
    assert len(told) < 1200
    assert result.stderr.count("\n") == 1


def test_more_than_the_limit_is_not_read(here, monkeypatch):
    monkeypatch.setattr(cli_verify, "_LARGEST_BYTES", Path("transcript.bin").stat().st_size)
    assert verify().exit_code == 0
    with Path("transcript.bin").open("ab") as file:
        file.write(b"\0")
    assert "expected a transcript of at most" in refused(verify(), Exit.BAD_INPUT)


def forgeries():
    """Large files that are quick to make."""
    end = encode(Closing(bytes(32), bytes(32), {}))
    yield b"\xff" * 4 + bytes(60 << 20)
    yield (60 << 20).to_bytes(4, "big") + b"\x01" + b"\xdc" * (60 << 20)
    yield (len(end).to_bytes(4, "big") + end) * 500_000
    yield bytes(40 << 20)


def test_a_large_forgery_takes_neither_long_nor_much_memory(here):
    """In processes of their own, that may not hold much more than the file and the program."""
    command = [Path(sys.executable).with_name("secagg"), "verify", "forged.bin", "--roster", "roster.toml"]

    def limited():
        resource.setrlimit(resource.RLIMIT_DATA, (600 << 20, 600 << 20))

    for data in forgeries():
        Path("forged.bin").write_bytes(data)
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=60, preexec_fn=limited, env=dict(os.environ)
        )
        assert done.returncode in (Exit.BAD_INPUT, Exit.UNPROVEN), done.stderr
        assert done.stderr.splitlines()[-1].startswith("Error: forged.bin")
        assert len(done.stdout + done.stderr) < 10_000


def test_a_device_without_end_is_not_read_to_its_end(here, monkeypatch):
    monkeypatch.setattr(cli_verify, "_LARGEST_BYTES", 1 << 20)
    assert "at most 1048576 bytes" in refused(verify(transcript="/dev/zero"), Exit.BAD_INPUT)

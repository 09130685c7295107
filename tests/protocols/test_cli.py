"""The command `secagg`: what it prints where, and what it tells the shell."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
import safetensors.torch
from typer.testing import CliRunner

from protocols import cli, output
from protocols.cli import Exit, app
from protocols.errors import OutputError
from tests.protocols.hospitals import STAGES, hospital, write_csv

HOSPITALS = ("ash", "birch", "cedar")
STUDY = """
name = "three hospitals"
rounds = 2
sites = [
    { name = "ash", data = "data/ash.csv" },
    { name = "birch", data = "data/birch.csv" },
    { name = "cedar", data = "data/cedar.csv" },
]

[task]
data = "csv"
features = ["age", "dose", "pulse"]
target = "ill"

[training]
local_steps = 2
"""
FILES = {"model.safetensors", "run.json", "roster.toml", "transcript.bin"}
PRIVACY = """
[privacy]
mechanism = "local-sgd"
delta = 1e-3
noise_multiplier = 1.0
sampling_rate = 0.5
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with a study and its sites' files; the command runs in it."""
    (tmp_path / "data").mkdir()
    for name in HOSPITALS:
        write_csv(tmp_path / "data" / f"{name}.csv", hospital(name, rows=14))
    (tmp_path / "study.toml").write_text(STUDY)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def secagg(*arguments):
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def run(*arguments, study="study.toml"):
    return secagg("run", study, "--no-baselines", *arguments)


def error_line(result):
    """The one line that a failure is told in."""
    lines = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    assert len(lines) == 1, result.stderr
    assert result.stderr.endswith(lines[0] + "\n"), result.stderr
    assert "Traceback" not in result.stderr
    return lines[0].removeprefix("Error: ")


def failed_line(result, code):
    assert result.exit_code == code, result.output
    return error_line(result)


def edit(old, new):
    text = Path("study.toml").read_text()
    assert old in text
    Path("study.toml").write_text(text.replace(old, new))


# --- a run


def test_a_study_of_three_files_runs_and_is_written(here):
    result = run("--out", "out")
    assert result.exit_code == 0
    assert {p.name for p in (here / "out").iterdir()} == FILES
    assert set(safetensors.torch.load_file("out/model.safetensors")) == {"weight", "bias"}
    written = json.loads(Path("out/run.json").read_text())
    assert [r["outcome"] for r in written["rounds"]] == ["opened"] * 3
    for name in HOSPITALS:
        assert name in result.stdout
    for stage in STAGES:
        assert stage in result.stdout
    assert "There is no differential privacy" in result.stdout
    assert "Written to out" in result.stdout
    assert "threshold 3" in result.stderr


def test_the_sites_files_are_looked_for_beside_the_study(here, monkeypatch):
    (here / "elsewhere").mkdir()
    monkeypatch.chdir(here / "elsewhere")
    assert run("--out", "out", study="../study.toml").exit_code == 0
    assert (here / "elsewhere" / "out" / "run.json").exists()


def test_without_a_name_the_folder_is_named_after_the_study_and_the_time(here):
    assert run().exit_code == 0
    (folder,) = (here / "runs").iterdir()
    assert re.fullmatch(r"three-hospitals-\d{8}-\d{6}", folder.name)


def test_baselines_are_trained_unless_told_not_to(here):
    secagg("run", "study.toml", "--out", "with")
    run("--out", "without")
    sites = {name: json.loads(Path(name, "run.json").read_text())["sites"]["ash"] for name in ("with", "without")}
    assert sites["with"]["pooled"] is not None
    assert sites["without"]["pooled"] is None


@pytest.mark.parametrize("baselines", ["--baselines", "--no-baselines"])
def test_json_prints_the_run_as_json_and_nothing_else(here, baselines):
    result = secagg("run", "study.toml", "--json", "--out", "out", baselines)
    assert result.exit_code == 0
    printed = json.loads(result.stdout)
    assert printed["study"]["name"] == "three hospitals"
    assert result.stderr == ""
    assert {p.name for p in (here / "out").iterdir()} == FILES
    assert json.loads(Path("out/run.json").read_text())["rounds"] == printed["rounds"]


def test_json_stays_json_where_a_plain_sum_warns(here):
    result = run("--json", "--out", "out", "--aggregation", "plain")
    assert result.exit_code == 0
    assert json.loads(result.stdout)["study"]["protocol"]["aggregation"] == "plain"


def test_quiet_prints_the_folder_and_nothing_else(here):
    result = run("--quiet", "--out", "out")
    assert (result.exit_code, result.stdout, result.stderr) == (0, "out\n", "")


def test_a_plain_sum_is_warned_of(here):
    result = run("--out", "out", "--aggregation", "plain")
    assert result.exit_code == 0
    assert "protects nothing" in " ".join(result.stderr.split())
    assert "aggregation was plain" in " ".join(result.stdout.split())


def test_a_drop_out_is_told(here):
    edit("[training]", '[protocol]\nmode = "semi-honest"\n\n[training]')
    edit("rounds = 2", "rounds = 3")
    result = run("--out", "out", "--drop", "birch:MaskedInput:2", "--drop", "cedar:MaskedInput:0")
    assert result.exit_code == 0
    text = " ".join(result.stdout.split())
    assert "Round 0: cedar: no answer at MaskedInput; the sum of the others was recovered." in text
    assert "Round 1: cedar: no answer at AdvertiseKeys; the sum of the others was recovered." in text
    assert "Round 2: birch: no answer at MaskedInput; the sum of the others was recovered." in text


def test_a_private_study_prints_what_was_spent(here):
    edit("[training]", PRIVACY + "\n[training]")
    result = run("--out", "out")
    assert result.exit_code == 0
    epsilon = json.loads(Path("out/run.json").read_text())["sites"]["ash"]["spent"]["epsilon"]
    assert f"{epsilon:.3f}" in result.stdout
    assert "noise 1, delta 0.001" in " ".join(result.stderr.split())


# --- what it tells the shell


def test_exit_1_too_many_rounds_were_lost(here):
    edit("[training]", "[protocol]\nmax_failed_rounds = 2\n\n[training]")
    line = failed_line(run("--out", "out", "--drop", "birch:ShareKeys"), Exit.LOST)
    assert line.startswith("the study ended early: 2 rounds in a row were lost, the last with: ShareKeys")
    assert Path("out/run.json").exists()  # what there is is kept


def test_exit_2_bad_input(here):
    edit("rounds = 2", "rounds = 0")
    assert failed_line(run(), Exit.BAD_INPUT) == "study.toml: rounds: expected at least 1, got 0"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--engine", "flower"), "expected --link LINK.TOML"),
        (("--engine", "flower", "--link", "none.toml"), "none.toml"),
        (("--engine", "flower", "--link", "link.toml", "--drop", "north:Unmask"), "--drop: has no meaning"),
        (("--engine", "flower", "--link", "link.toml", "--aggregation", "plain"), "--aggregation: has no meaning"),
        (("--link", "link.toml"), "go with --engine flower"),
        (("--resume",), "go with --engine flower"),
    ],
)
def test_what_does_not_go_together_over_a_link_is_refused_before_anything_is_sent(here, arguments, says):
    assert says in failed_line(run(*arguments, "--out", "out"), 2)
    assert not (here / "out").exists()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('root_certificates = "ca.crt"\nroster = "r"', "address"),
        ('address = "a:1"\nroot_certificates = "c"\nroster = "r"\n[patience]\nstage = 0', "stage"),
        ('address = "a:1"\nroot_certificates = "c"\nroster = "r"\nport = 1', "port"),
        ('address = "a:1"\nroot_certificates = "c"\nroster = "none.toml"', "none.toml"),
    ],
)
def test_a_link_file_that_cannot_be_used_is_told_with_its_place(here, text, says):
    (here / "link.toml").write_text(text)
    assert says in failed_line(run("--engine", "flower", "--link", "link.toml", "--out", "out"), 2)


def test_exit_3_the_run_could_not_be_written(here, monkeypatch):
    def cannot(*_):
        raise OutputError("out: could not be written: No space left on device; the run is kept in spare instead")

    monkeypatch.setattr(output, "write_run", cannot)
    for options in ([], ["--json"], ["--quiet"]):
        result = run("--out", "out", *options)
        assert "No space left" in failed_line(result, Exit.NOT_WRITTEN)
        if options == ["--json"]:
            assert json.loads(result.stdout)["format"] == 1  # the run itself is not lost
        if options == ["--quiet"]:
            assert result.stdout == ""


@pytest.mark.parametrize("options", [[], ["--json"], ["--quiet"]])
def test_exit_4_the_privacy_budget_stopped_the_study(here, options):
    edit("[training]", PRIVACY.replace("noise_multiplier", "epsilon = 1e-3\nnoise_multiplier") + "\n[training]")
    result = run("--out", "out", *options)
    line = failed_line(result, Exit.BUDGET)
    assert line.startswith("the study ended early: the privacy budget of ash, birch, cedar is spent")
    assert json.loads(Path("out/run.json").read_text())["stopped"] is not None
    if options == ["--json"]:
        assert json.loads(result.stdout)["stopped"] in line


def test_a_site_called_budget_is_no_spent_budget(here):
    """The exit code comes from what happened and not from the words of a message."""
    Path("data/birch.csv").rename("data/budget.csv")
    edit('name = "birch", data = "data/birch.csv"', 'name = "budget", data = "data/budget.csv"')
    edit("[training]", "[protocol]\nmax_failed_rounds = 1\n\n[training]")
    assert run("--out", "out", "--drop", "budget:ShareKeys").exit_code == Exit.LOST


def test_the_codes_are_those_of_the_help():
    help_text = " ".join(secagg("--help").stdout.replace("│", " ").split())
    assert "Exit codes: 0 done; 1 too many rounds were lost; 2 bad input; 3 the run could not be written;" in help_text
    assert "4 the privacy budget stopped the study early; 5 a transcript or a ledger does not hold." in help_text
    assert [int(code) for code in Exit] == [1, 2, 3, 4, 5]


# --- what is refused


def test_an_existing_folder_is_refused_before_training(here, monkeypatch):
    from protocols import run as run_module

    def trained(*_, **__):
        raise AssertionError("trained before it looked at the folder")

    monkeypatch.setattr(run_module, "run_study", trained)
    (here / "out").mkdir()
    assert "exists already" in failed_line(run("--out", "out"), Exit.NOT_WRITTEN)
    assert list((here / "out").iterdir()) == []


def test_a_study_that_is_not_there_is_named(here):
    assert failed_line(run(study="mine.toml"), Exit.BAD_INPUT).startswith("mine.toml: cannot be read: No such file")


def test_a_missing_file_is_named_with_its_site(here):
    (here / "data" / "birch.csv").unlink()
    line = failed_line(run(), Exit.BAD_INPUT)
    assert "site birch" in line
    assert "data/birch.csv" in line
    assert "no such file" in line


def test_a_missing_column_is_named_with_its_site(here):
    edit('"pulse"', '"weight"')
    line = failed_line(run(), Exit.BAD_INPUT)
    assert "site ash" in line
    assert "weight" in line


def test_a_missing_path_is_named_with_its_place(here):
    edit(', data = "data/birch.csv"', "")
    assert failed_line(run(), Exit.BAD_INPUT).startswith("sites[1].data: expected the path of birch's file")


def test_bad_input_leaves_nothing_behind(here):
    edit('"pulse"', '"weight"')
    before = sorted(here.rglob("*"))
    run()
    assert sorted(here.rglob("*")) == before


def test_a_value_that_is_no_number_is_named_with_its_site_and_line(here):
    path = here / "data" / "cedar.csv"
    lines = path.read_text().splitlines()
    lines[4] = "abc" + lines[4][lines[4].index(",") :]
    path.write_text("\n".join(lines))
    line = failed_line(run(), Exit.BAD_INPUT)
    for word in ("site cedar", "line 5", "'age'", "abc"):
        assert word in line


@pytest.mark.parametrize("column", ["chol [mg/dl]", "dose [/day]", "[red]", "a\\[b]"])
def test_a_column_with_brackets_is_told_as_it_is_spelt(here, column):
    """Units in brackets are no markup."""
    edit('"pulse"', json.dumps(column))
    assert column in failed_line(run(), Exit.BAD_INPUT).replace("\\\\", "\\")


@pytest.mark.parametrize("name", ["study[old].toml", "study[/bold].toml"])
def test_a_study_with_brackets_in_its_name_is_told_as_it_is_spelt(here, name):
    assert name in failed_line(run(study=name), Exit.BAD_INPUT)


def test_a_folder_with_brackets_in_its_name_is_told_as_it_is_spelt(here):
    result = run("--out", "out [new]")
    assert result.exit_code == 0
    assert "Written to out [new]" in result.stdout


def test_a_sites_log_with_brackets_is_told_as_it_is_and_costs_no_run(here, monkeypatch):
    from protocols import run as run_module

    real = run_module.run_study

    def with_log(*args, **kwargs):
        made = real(*args, **kwargs)
        site = msgspec.structs.replace(made.sites["ash"], log=("ash: pulse [/min] is odd",))
        return msgspec.structs.replace(made, sites={**made.sites, "ash": site})

    monkeypatch.setattr(run_module, "run_study", with_log)
    result = run("--out", "out")
    assert "ash: pulse [/min] is odd" in result.stdout
    assert Path("out/run.json").exists()


def test_a_report_that_cannot_be_printed_does_not_cost_the_run(here, monkeypatch):
    """As where the output is piped into a command that has ended: the model is on disk before anything is said."""

    def closed(*_):
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr(cli, "_report", closed)
    CliRunner().invoke(app, ["run", "study.toml", "--no-baselines", "--out", "out"])
    assert Path("out/model.safetensors").exists()


@pytest.mark.parametrize("drop", ["birch", "birch:", "elm:ShareKeys", "birch:Sharekeys"])
def test_a_drop_out_that_cannot_be_is_refused(here, drop):
    failed_line(run("--drop", drop, "--out", "out"), Exit.BAD_INPUT)
    assert not (here / "out").exists()


def test_a_plain_study_of_two_cannot_be_run_masked(here):
    shutil.copy("study.toml", "two.toml")
    text = Path("two.toml").read_text().replace('    { name = "cedar", data = "data/cedar.csv" },\n', "")
    Path("two.toml").write_text(text + '\n[protocol]\naggregation = "plain"\n')
    line = failed_line(run("--aggregation", "masked", "--out", "out", study="two.toml"), Exit.BAD_INPUT)
    assert "sites: expected at least 3" in line


def test_an_unknown_aggregation_is_refused(here):
    result = run("--aggregation", "secret")
    assert result.exit_code == Exit.BAD_INPUT
    assert "masked" in result.stderr


# --- the other commands


def test_without_a_command_the_help_is_shown():
    text = secagg().output
    for command in ("demo", "run", "doctor"):
        assert command in text


@pytest.mark.parametrize("command", ["demo", "run"])
def test_help_names_every_option(command):
    text = secagg(command, "--help").stdout
    for option in ("--out", "--aggregation", "--drop", "--json", "--quiet"):
        assert option in text
    assert ("--baselines" in text) == (command == "run")


def test_the_demos_study_is_printed_as_a_file_that_runs(here):
    result = secagg("demo", "--show-study")
    assert result.exit_code == 0
    Path("mine.toml").write_text(result.stdout)
    from protocols.study import demo_study, load_study

    assert load_study("mine.toml") == demo_study()
    assert not (here / "runs").exists()


def test_the_demo_runs_as_it_is_shipped_but_shorter(here, monkeypatch):
    from protocols import study as study_module

    demo = study_module.demo_study()
    privacy = msgspec.structs.replace(demo.privacy, epsilon=None, noise_multiplier=1.0)
    short = msgspec.structs.replace(demo, rounds=2, privacy=privacy)
    monkeypatch.setattr(study_module, "demo_study", lambda: short)
    result = secagg("demo", "--out", "out", "--drop", "va:MaskedInput:1")
    assert result.exit_code == 0
    for name in demo.site_names:
        assert name in result.stdout
    written = json.loads(Path("out/run.json").read_text())
    assert written["rounds"][1]["dropped"] == {"va": "no answer at MaskedInput"}
    assert "differential privacy" in written["statement"]


def test_the_demo_loses_va_in_round_7_unless_told_otherwise(here, monkeypatch):
    asked = []
    monkeypatch.setattr(cli, "_run", lambda *args, **kwargs: asked.append(args[4]))
    for options in ([], ["--aggregation", "plain"], ["--drop", "cleveland:Unmask"]):
        secagg("demo", *options)
    assert asked == [["va:MaskedInput:7"], ["va:Submit:7"], ["cleveland:Unmask"]]


def test_the_installed_command_runs_in_a_process_of_its_own(here):
    command = Path(sys.executable).with_name("secagg")
    arguments = ["run", "study.toml", "--out", "out", "--no-baselines"]
    done = subprocess.run([command, *arguments, "--json"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["stopped"] is None
    assert done.stderr == ""
    again = subprocess.run([command, *arguments], capture_output=True, text=True, check=False)
    assert again.returncode == 3
    assert again.stderr.count("\n") == 1
    assert again.stderr.startswith("Error: out exists already")
    assert again.stdout == ""

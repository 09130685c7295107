"""The attack on a study's account, and the command that runs it."""

import functools
import hashlib
import itertools
import json

import msgspec
import pytest
import typer
from torch import nn
from typer.testing import CliRunner

import dp.sgd
import protocols.attack
from dp import ParameterError, Relation
from protocols.attack import attack_study
from protocols.cli_attack import attack
from protocols.datasets import heart_disease
from protocols.errors import DataError, StudyError
from protocols.study import DEMO_TEXT, Privacy, demo_study
from tests.protocols.test_cli import error_line

SIZE = {"canaries": 1000, "guesses": 200}


def fresh_entropy(label):
    """Other bytes at every call, the same in every test run."""
    calls = itertools.count()
    return lambda n: hashlib.shake_256(f"attack tests: {label} {next(calls)}".encode()).digest(n)


def study(**privacy):
    """The demo's, of four rounds, with noise that costs about 3.7 at delta 1e-4."""
    demo = demo_study()
    own = {"epsilon": None, "noise_multiplier": 1.3, **privacy}
    return msgspec.structs.replace(demo, rounds=4, privacy=msgspec.structs.replace(demo.privacy, **own))


@pytest.fixture(scope="module")
def hospitals():
    return heart_disease("full")


@pytest.fixture
def little_noise(monkeypatch):
    """Training adds a tenth of the noise that it says it adds."""
    honest = dp.sgd._noise
    monkeypatch.setattr(dp.sgd, "_noise", lambda generator, n, deviation: honest(generator, n, deviation / 10))


# The attack


def test_an_honest_study_is_consistent_with_its_account(hospitals):
    found = attack_study(study(), hospitals, site="va", **SIZE, entropy=fresh_entropy("honest"))
    assert (found.site, found.train_rows, found.rounds, found.steps) == ("va", hospitals["va"].train_rows, 4, 16)
    assert not found.audit.contradicts
    assert found.best.contradicts
    assert 0.0 < found.audit.one_run < found.audit.account.epsilon
    assert abs(found.audit.right - found.ideal.right) < 30
    assert found.audit.account == found.ideal.account
    assert found.best.right == 200


def test_a_tenth_of_the_noise_contradicts_the_account(hospitals, little_noise):
    found = attack_study(study(), hospitals, **SIZE, entropy=fresh_entropy("little noise"))
    assert found.site == "cleveland"
    assert found.audit.contradicts


def test_a_plan_that_claims_ten_times_its_noise_contradicts_the_account(hospitals, monkeypatch):
    class Liar(dp.sgd.DpSgdPlan, frozen=True, kw_only=True):
        def mechanism(self):
            return msgspec.structs.replace(super().mechanism(), noise_multiplier=10 * self.noise_multiplier)

    honest = protocols.attack.local_plan
    monkeypatch.setattr(
        protocols.attack,
        "local_plan",
        lambda study: Liar(**{**msgspec.structs.asdict(honest(study)), "noise_multiplier": 0.13}),
    )
    assert attack_study(study(), hospitals, **SIZE, entropy=fresh_entropy("liar")).audit.contradicts


def test_replace_one_is_attacked_as_replace_one(hospitals):
    """Its account is larger, and so is what an honest run shows: a canary gives place to its opposite."""
    noisy = {"noise_multiplier": 3.0}
    added = attack_study(study(**noisy), hospitals, **SIZE, entropy=fresh_entropy("add"))
    replaced = attack_study(
        study(relation=Relation.REPLACE_ONE, **noisy), hospitals, **SIZE, entropy=fresh_entropy("replace")
    )
    assert replaced.audit.account.epsilon > 1.4 * added.audit.account.epsilon
    assert replaced.audit.right > added.audit.right + 10
    assert not replaced.audit.contradicts


def test_the_account_is_of_the_rounds_that_the_budget_allows(hospitals):
    three = study(epsilon=3.4)
    found = attack_study(three, hospitals, canaries=20, entropy=fresh_entropy("budget"))
    assert 0 < found.rounds < 4
    assert found.audit.account.epsilon <= 3.4
    assert found.audit.guesses == 4
    assert not found.best.contradicts
    with pytest.raises(StudyError, match=r"privacy\.epsilon: expected a budget for one round"):
        attack_study(study(epsilon=0.1), hospitals, canaries=20)


def test_what_cannot_be_attacked(hospitals):
    with pytest.raises(StudyError, match="expected one of the sites cleveland, hungarian, switzerland, va, got 'x'"):
        attack_study(study(), hospitals, site="x")
    plain = msgspec.structs.replace(demo_study(), privacy=Privacy())
    with pytest.raises(StudyError, match=r'privacy\.mechanism: expected "local-sgd".*got .none.'):
        attack_study(plain, hospitals)


@pytest.mark.parametrize(
    "wrong",
    [{"canaries": 0}, {"canaries": 10, "guesses": 11}, {"guesses": 0}, {"significance": 1.0}, {"significance": 0.0}],
)
def test_numbers_that_cannot_be_are_refused_before_training(hospitals, monkeypatch, wrong):
    monkeypatch.setattr(protocols.attack, "_with_canaries", None)
    with pytest.raises(ParameterError):
        attack_study(study(), hospitals, **wrong)


def broken(features):
    return nn.Linear(features + 1, 1)


def test_a_model_that_does_not_take_the_rows(hospitals):
    factory = msgspec.structs.replace(demo_study().model, kind="factory", factory="tests.protocols.test_attack:broken")
    with pytest.raises(DataError, match="the model Linear raised RuntimeError"):
        attack_study(msgspec.structs.replace(study(), model=factory), hospitals, canaries=20)


# The command


@pytest.fixture
def here(tmp_path, monkeypatch):
    text = DEMO_TEXT.replace("rounds = 15", "rounds = 4").replace("epsilon = 5.0", "noise_multiplier = 1.3")
    (tmp_path / "study.toml").write_text(text)
    monkeypatch.chdir(tmp_path)
    seeded = functools.partial(attack_study, entropy=fresh_entropy("command"))
    monkeypatch.setattr(protocols.attack, "attack_study", seeded)
    return tmp_path


def command(*arguments):
    app = typer.Typer()
    app.command()(attack)
    result = CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "120"})
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def test_the_command_says_consistent_with_and_never_verified(here):
    result = command("study.toml", "--canaries", 1000, "--site", "hungarian")
    assert result.exit_code == 0, result.output
    for part in (
        "site hungarian: 1000 canaries",
        "of 200 guesses were right",
        "at least, by one run",
        "at least, by f-DP",
        "account (add-or-remove-one)",
        "The attack is consistent with the account.",
        "A low bound does not show that the account is true",
    ):
        assert part in result.stdout
    assert "verif" not in result.stdout.lower()
    assert "could not have contradicted" not in result.stdout


def test_the_command_says_contradicts_and_exits_with_5(here, little_noise):
    result = command("study.toml", "--canaries", 1000, "--guesses", 200)
    assert result.exit_code == 5
    assert "The attack contradicts the account." in result.stdout
    assert "consistent" not in result.stdout
    assert error_line(result) == "the attack on cleveland contradicts the account of study.toml"


def test_an_attack_too_small_to_contradict_says_so(here):
    result = command("study.toml", "--canaries", 20)
    assert result.exit_code == 0
    assert "could not have contradicted the account even with every guess right" in result.stdout


def test_json(here):
    result = command("study.toml", "--canaries", 300, "--guesses", 30, "--significance", 0.1, "--json")
    assert result.exit_code == 0
    told = json.loads(result.stdout)
    assert told["verdict"] == "consistent with"
    assert told["could_contradict"] is False
    audit = told["audit"]
    assert (audit["canaries"], audit["guesses"], audit["significance"]) == (300, 30, 0.1)
    assert audit["account"]["relation"] == "add-or-remove-one"
    assert {"one_run", "f_dp", "mu", "right", "curve_ruled_out"} <= set(audit)
    assert told["ideal"]["right"] <= 30


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["missing.toml"], "missing.toml"),
        (["study.toml", "--site", "x"], "expected one of the sites"),
        (["study.toml", "--canaries", "5", "--guesses", "9"], "of 5 canaries 1 to 5 should be guessed, not 9"),
        (["study.toml", "--significance", "2"], "significance"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(here, arguments, line):
    result = command(*arguments)
    assert result.exit_code == 2
    assert line in error_line(result)


def test_a_study_without_privacy_is_bad_input(here):
    (here / "plain.toml").write_text(DEMO_TEXT.split("[privacy]")[0])
    result = command("plain.toml")
    assert result.exit_code == 2
    assert error_line(result).startswith('privacy.mechanism: expected "local-sgd"')

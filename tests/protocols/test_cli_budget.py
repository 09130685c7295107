"""The commands `secagg budget`: what they print, what they refuse, what they name in a ledger that does not hold."""

import csv
import io
import json
import re
import shutil
import sqlite3
import subprocess
import sys
from functools import partial
from pathlib import Path

import msgspec
import pytest

from dp.accounting import spent
from dp.ledger_rows import Cap, decode_mechanism
from dp.ledger_store import read_rows
from dp.mechanisms import PoissonSampledGaussian, Relation, Unit
from protocols import ledger_report
from protocols.ledger_file import create_ledger, open_ledger
from protocols.rosters import PublicKey, load_public_key, load_roster, roster_of, write_roster
from secagg.keys import Identity, fingerprint
from tests.protocols.hospitals import command as secagg
from tests.protocols.hospitals import succeeded

SITES = ("north", "south", "west")
IDENTITIES = {name: Identity(bytes([number]) * 32) for number, name in enumerate(SITES, 1)}
DOCUMENT = Path(__file__).parents[2] / "docs" / "budget.md"
DAY = 86_400.0
START = 1_790_000_000.0


budget = partial(secagg, "budget")
done = partial(succeeded, "budget")


def refused(code, says, *arguments):
    result = budget(*arguments)
    assert result.exit_code == code, result.output
    assert re.search(says, result.stderr), result.stderr
    assert "Traceback" not in result.stderr
    return result.stderr


def gaussian(steps, noise=2.0):
    return PoissonSampledGaussian(sampling_rate=1.0, noise_multiplier=noise, steps=steps, l2_clip_norm=1.0)


def release(ledger, planned, actual=None, *, study="heart", time=START + DAY, **how):
    fields = {"cohort": "all", "release": "training", "relation": Relation.ADD_OR_REMOVE_ONE, "delta": 1e-5}
    reservation = ledger.reserve(planned, study=study, study_digest=study.encode(), time=time, **{**fields, **how})
    if actual is not None:
        ledger.commit(reservation, actual, time=time + 60)


@pytest.fixture
def ledgers(tmp_path, monkeypatch):
    """The ledgers of north and west, who have exchanged receipts, and the roster; in the working folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")
    roster = roster_of([ledger_key(name) for name in SITES])
    write_roster(tmp_path / "roster.toml", roster)
    cap = Cap(epsilon=8.0, delta=1e-5, relation=Relation.ADD_OR_REMOVE_ONE, unit=Unit.RECORD, records=5000)
    for name in ("north", "west"):
        create_ledger(f"{name}.ledger", site=name, identity=IDENTITIES[name], cap=cap, time=START)
    with opened("north", roster) as ledger:
        release(ledger, gaussian(3), gaussian(2))
        release(ledger, gaussian(1), gaussian(1), time=START + 2 * DAY, release="statistic")
        release(ledger, gaussian(2), study="kidney", time=START + 3 * DAY, epsilon=6.0, release="tuning")
        receipt = ledger.head()
    with opened("west", roster) as ledger:
        ledger.record_receipts([receipt], time=START + 4 * DAY)
    return tmp_path


def ledger_key(name):

    return PublicKey(name, IDENTITIES[name].public)


def opened(name, roster=None):

    roster = load_roster(Path("roster.toml")) if roster is None else roster
    return open_ledger(f"{name}.ledger", site=name, identity=IDENTITIES[name], roster=roster)


def of(steps):
    return spent([gaussian(steps)], 1e-5).epsilon


# --- show


def test_show_has_a_line_for_each_study_and_cohort_with_what_is_spent_and_left(ledgers):
    lines = done("show", "north.ledger").splitlines()
    heart, kidney = lines[1].split(), lines[2].split()
    assert heart[:7] == ["heart", "all", "2", "0", f"{of(3):.3f}", f"{of(5):.3f}", f"{8 - of(5):.3f}"]
    assert kidney[:7] == ["kidney", "all", "1", "1", f"{of(2):.3f}", f"{of(5):.3f}", f"{8 - of(5):.3f}"]
    assert set(heart[7]) <= set("▁▂▃▄▅▆▇█")
    assert len(heart[7]) == 4
    assert f"north: epsilon {of(5):.3f} of 8 is spent by the worst-hit record" in lines[4]
    assert lines[-1] == "Nothing was checked: see secagg budget verify."


def test_show_as_json_is_json_only(ledgers):
    told = json.loads(done("show", "north.ledger", "--json"))
    assert told["spent"]["epsilon"] == of(5)
    assert [cost["study"] for cost in told["costs"]] == ["heart", "kidney"]
    assert told["costs"][0]["over_time"][-1]["epsilon"] == of(3)


@pytest.mark.parametrize("ending", ["svg", "png", "pdf"])
def test_show_draws(ledgers, ending):
    done("show", "north.ledger", "--plot", f"out.{ending}")
    content = (ledgers / f"out.{ending}").read_bytes()
    assert len(content) > 1000
    assert content.startswith({"svg": b"<?xml", "png": b"\x89PNG", "pdf": b"%PDF"}[ending])


def test_a_picture_that_cannot_be_written_is_told(ledgers):
    refused(3, "could not be written", "show", "north.ledger", "--plot", "nowhere/out.svg")
    refused(3, "could not be written", "show", "north.ledger", "--plot", "out.nonsense")


def test_no_command_but_the_one_that_draws_loads_matplotlib_and_the_help_loads_no_accountant():
    code = "import sys, protocols.cli; sys.exit('matplotlib' in sys.modules or 'dp_accounting' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_sparkline_is_a_full_block_at_the_cap_and_above():
    line = [(0.0, 0.0), (1.0, 4.0), (2.0, 7.99), (3.0, 8.0), (4.0, 80.0)]
    assert ledger_report.sparkline(line, 8.0) == "▁▅███"


# --- verify


def test_verify_says_what_it_shows_and_what_it_does_not(ledgers):
    output = done("verify", "north.ledger", "--roster", "roster.toml", "--receipts", "west.ledger", "--site", "north")
    assert "6 rows; other sites hold receipts up to row 6" in output
    assert f"Epsilon {of(5):.4f} by PLD" in output
    assert "Everything holds." in output
    assert "What this does not show:" in output
    alone = done("verify", "north.ledger", "--roster", "roster.toml")
    assert "no receipt of another site was given, so that an older copy would not show" in alone


def test_verify_as_json(ledgers):
    told = json.loads(done("verify", "north.ledger", "--roster", "roster.toml", "--json"))
    assert (told["holds"], told["findings"], told["site"], told["rows"]) == (True, [], "north", 6)
    edit(ledgers / "north.ledger", "UPDATE row SET study = 'x' WHERE sequence = 2")
    result = budget("verify", "north.ledger", "--roster", "roster.toml", "--json")
    assert result.exit_code == 5
    assert json.loads(result.stdout)["findings"][0].startswith("row 2: edited")


def edit(path, *statements):
    database = sqlite3.connect(path, isolation_level=None)
    kept = database.execute("SELECT name, sql FROM sqlite_schema WHERE type = 'trigger'").fetchall()
    for name, _ in kept:
        database.execute(f"DROP TRIGGER {name}")
    for statement in statements:
        database.execute(statement)
    for _, sql in kept:
        database.execute(sql)
    database.close()


TAMPERED = {
    "a row edited": (("UPDATE row SET cohort = 'x' WHERE sequence = 2",), "row 2: edited"),
    "the last row deleted": (("DELETE FROM row WHERE sequence = 6",), "row 6 was written and then deleted"),
    "a middle row deleted": (("DELETE FROM row WHERE sequence = 3",), "row 3 is missing"),
    "two rows swapped": (
        [f"UPDATE row SET sequence = {b} WHERE sequence = {a}" for a, b in ((4, 99), (5, 4), (99, 5))],
        "row 4: moved or renumbered: it was row 5",
    ),
    "a signature changed": (
        ("UPDATE row SET signature = (SELECT signature FROM row WHERE sequence = 2) WHERE sequence = 3",),
        "row 3: not signed with the key of 'north'",
    ),
    "the cap changed": (("UPDATE row SET epsilon = 99.0 WHERE sequence = 1",), "row 1: edited"),
    "the mechanism changed": (
        ("UPDATE row SET mechanism = replace(mechanism, '2.0', '9.0') WHERE sequence = 3",),
        "row 3: edited",
    ),
    "the clock changed": (("UPDATE row SET time = 5.0 WHERE sequence = 4",), "row 4: edited"),
    "a row inserted": (
        (
            "CREATE TEMP TABLE t AS SELECT * FROM row WHERE sequence = 3",
            "UPDATE t SET sequence = 7",
            "INSERT INTO row SELECT * FROM t",
        ),
        "row 7: moved or renumbered: it was row 3",
    ),
    "the site renamed": (("UPDATE row SET site = 'west'",), "row 1: edited"),
    "all rows deleted": (("DELETE FROM row",), "holds no rows"),
}


@pytest.mark.parametrize("how", TAMPERED)
def test_verify_names_what_was_done_to_a_ledger(ledgers, how):
    statements, says = TAMPERED[how]
    edit(ledgers / "north.ledger", *statements)
    refused(5, re.escape(says), "verify", "north.ledger", "--roster", "roster.toml")


def test_verify_names_a_truncated_file_and_one_that_is_no_ledger(ledgers):
    content = Path("north.ledger").read_bytes()
    for cut in (content[:-3000], content[:100], b"", b"something else"):
        Path("north.ledger").write_bytes(cut)
        refused(5, "put the newest copy back", "verify", "north.ledger", "--roster", "roster.toml")


def test_verify_names_an_older_copy_by_another_sites_receipt(ledgers):
    shutil.copy("north.ledger", "backup")
    with opened("north") as ledger:
        release(ledger, gaussian(1), time=START + 5 * DAY)
        receipt = ledger.head()
    with opened("west") as ledger:
        ledger.record_receipts([receipt], time=START + 5 * DAY)
    shutil.copy("backup", "north.ledger")
    done("verify", "north.ledger", "--roster", "roster.toml")
    line = refused(5, "older copy", "verify", "north.ledger", "--roster", "roster.toml", "--receipts", "west.ledger")
    assert "west.ledger: row 3: the receipt for row 7 of 'north' contradicts its ledger: it ends at row 6" in line


def test_verify_names_another_sites_ledger_and_an_unknown_key(ledgers):
    refused(5, "ledger of 'west', expected", "verify", "west.ledger", "--roster", "roster.toml", "--site", "north")
    others = {**IDENTITIES, "north": Identity(b"x" * 32)}
    publics = [msgspec.structs.replace(ledger_key(name), key=others[name].public) for name in SITES]
    write_roster(ledgers / "wrong.toml", roster_of(publics))
    refused(5, "row 1: not signed with the key of 'north'", "verify", "north.ledger", "--roster", "wrong.toml")


def test_many_findings_are_cut_and_counted(ledgers):
    with opened("north") as ledger:
        for _ in range(30):
            release(ledger, gaussian(0), time=START + 9 * DAY)
    edit(ledgers / "north.ledger", "UPDATE row SET cohort = 'x' WHERE kind = 'reserve'")
    lines = refused(5, "35 findings", "verify", "north.ledger", "--roster", "roster.toml").splitlines()
    assert "  and 15 more; --json has all" in lines


@pytest.mark.parametrize("command", ["show", "export", "verify"])
def test_a_missing_ledger_is_bad_input(ledgers, command):
    roster = ["--roster", "roster.toml"] if command == "verify" else []
    refused(2, "there is no ledger", command, "none.ledger", *roster)
    refused(2, "cannot be read", command, ledgers, *roster)


def test_a_missing_roster_is_bad_input(ledgers):
    for command in ("verify", "export"):
        refused(2, "none.toml", command, "north.ledger", "--roster", "none.toml")


def test_show_and_export_of_a_ledger_that_makes_no_sense_do_not_hold(ledgers):
    edit(ledgers / "north.ledger", "UPDATE row SET delta = 0.5 WHERE sequence = 2")
    for command in ("show", "export"):
        refused(5, "row 2: says what cannot be", command, "north.ledger")


# --- plan


def test_plan_tells_epsilon_for_every_combination(ledgers):
    told = json.loads(
        done("plan", "--rounds", 10, "--rounds", 20, "--rate", 1, "--noise", 4, "--noise", 8, "--delta", 1e-5, "--json")
    )
    assert [(p["rounds"], p["noise"]) for p in told["plans"]] == [(10, 4.0), (10, 8.0), (20, 4.0), (20, 8.0)]
    assert told["plans"][0]["epsilon"] == spent([gaussian(10, 4.0)], 1e-5).epsilon
    lines = done("plan", "--rounds", 5, "--steps", 2, "--rate", 1, "--noise", 4, "--delta", 1e-5).splitlines()
    assert lines[1].split()[:5] == ["5", "2", "1", "4.0000", f"{told['plans'][0]['epsilon']:.4f}"]


def test_plan_tells_noise_that_keeps_to_an_epsilon_as_printed(ledgers):
    for relation in ("add-or-remove-one", "replace-one"):
        options = "--rounds", 10, "--rate", 1, "--epsilon", 2, "--delta", 1e-5, "--relation", relation
        (plan,) = json.loads(done("plan", *options, "--json"))["plans"]
        assert 1.99 < plan["epsilon"] <= 2.0
        assert plan["noise"] == round(plan["noise"], 4)
        assert plan["epsilon"] == spent([gaussian(10, plan["noise"])], 1e-5, Relation(relation)).epsilon


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--rounds", "1", "--rate", "1", "--delta", "1e-5"], "--noise or --epsilon"),
        (["--rounds", "1", "--rate", "1", "--delta", "1e-5", "--noise", "1", "--epsilon", "1"], "not both"),
        (["--rounds", "0", "--rate", "1", "--delta", "1e-5", "--noise", "1"], "at least one round"),
        (["--rounds", "1", "--rate", "1", "--delta", "1e-5", "--noise", "1", "--steps", "0"], "one step"),
        (["--rounds", "1", "--rate", "1.5", "--delta", "1e-5", "--noise", "1"], "sampling_rate"),
        (["--rounds", "1", "--rate", "1", "--delta", "2", "--noise", "1"], "delta"),
        (["--rounds", "1", "--rate", "1", "--delta", "1e-5", "--epsilon", "-1"], "epsilon"),
        (["--rounds", "1", "--rate", "1", "--delta", "1e-5", *["--noise", "1"] * 101], "at most 100 plans"),
    ],
)
def test_a_plan_that_makes_no_sense_is_refused(ledgers, options, says):
    refused(2, says, "plan", *options)


# --- export

ORDER = [
    "Setting",
    "Unit",
    "Relation",
    "Accesses covered",
    "Outputs",
    "Accountant",
    "Sampling",
    "Epsilon",
    "Delta",
    "Reproducibility",
]


def test_the_statement_has_its_sections_in_order_and_never_calls_anything_compliant(ledgers):
    text = done("export", "north.ledger")
    assert re.findall(r"^## (.*)$", text, re.MULTILINE) == [*ORDER, "By study and cohort"]
    assert f"{of(5):.4f} by PLD" in text
    assert "1 of them were never committed" in text
    assert "signatures were not checked" in text
    told = json.loads(done("export", "north.ledger", "--format", "json", "--roster", "roster.toml"))
    assert list(told["statement"]) == [heading.lower().replace(" ", "_") for heading in ORDER]
    assert "checked against the roster roster.toml" in told["statement"]["reproducibility"]
    for written in (text, json.dumps(told), done("export", "north.ledger", "--format", "csv")):
        assert not re.search("complian|hipaa|gdpr", written, re.IGNORECASE)


def test_the_sampling_assumption_is_told_where_there_is_one(ledgers):
    assert "None is assumed" in done("export", "north.ledger")
    with opened("north") as ledger:
        release(ledger, msgspec.structs.replace(gaussian(1), sampling_rate=0.25), time=START + 9 * DAY)
    text = done("export", "north.ledger")
    assert "Poisson sampling is assumed, at rates 0.25" in text
    assert "cannot see the draw" in text


def test_the_table_has_every_release_and_nothing_that_a_spreadsheet_would_run(ledgers):
    with opened("north") as ledger:
        release(ledger, gaussian(1), study="=cmd|' /C calc'!A0", time=START + 9 * DAY, reference="@SUM(1)")
    lines = list(csv.DictReader(io.StringIO(done("export", "north.ledger", "--format", "csv"))))
    assert [line["study"] for line in lines] == ["heart", "heart", "kidney", "'=cmd|' /C calc'!A0"]
    assert lines[3]["reference"] == "'@SUM(1)"
    assert [line["status"].split(",")[0] for line in lines] == ["committed", "committed", "reserved", "reserved"]
    assert json.loads(lines[0]["counted_mechanism"])["steps"] == 2
    assert json.loads(lines[0]["reserved_mechanism"])["steps"] == 3


def test_names_in_the_statement_make_no_markup_of_their_own(ledgers):
    with opened("north") as ledger:
        release(ledger, gaussian(1), study="a|b<script>`*", time=START + 9 * DAY)
    assert "a\\|b\\<script\\>\\`\\*" in done("export", "north.ledger")
    assert "a|b<script>" in done("show", "north.ledger")


def test_export_of_a_ledger_that_does_not_hold_against_its_roster_ends_with_the_finding(ledgers):
    edit(ledgers / "north.ledger", "UPDATE row SET cohort = 'x' WHERE sequence = 4")
    refused(5, "row 4: edited", "export", "north.ledger", "--roster", "roster.toml")


# --- new


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A site's own file, with its key and roster."""
    monkeypatch.chdir(tmp_path)
    for name in SITES:
        result = secagg("keys", "new-site", name, "--no-passphrase")
        assert result.exit_code == 0
    secagg("keys", "roster", *(f"{name}.pub" for name in SITES))

    pinned = "\n".join(f'{m.name} = "{fingerprint(m.identity)}"' for m in load_roster(Path("roster.toml")).members)
    Path("site.toml").write_text(
        'name = "north"\nidentity = "north.key"\nroster = "roster.toml"\nstate = "north.state"\n'
        f"[fingerprints]\n{pinned}\n"
    )
    return tmp_path


NEW = ("new", "north.ledger", "--site-file", "site.toml", "--epsilon", "8", "--delta", "1e-5", "--records", "5000")


def test_a_new_ledger_holds_and_is_not_made_twice(site):
    assert "the budget of north: epsilon 8 at delta 1e-05" in done(*NEW)
    assert "1 row;" in done("verify", "north.ledger", "--roster", "roster.toml")
    refused(2, "exists already", *NEW)


def test_a_new_ledger_with_disjoint_cohorts(site):
    done(*NEW, "--column", "born", "--part", "old=1940,1950", "--part", "young=1990")
    assert "old, young: each takes other values of the column 'born'" in done("export", "north.ledger")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--part", "old=1940"], "name the column"),
        (["--column", "born"], "at least 2 parts"),
        (["--column", "born", "--part", "old", "--part", "young=1"], "COHORT=VALUE"),
        (["--column", "born", "--part", "old=1,", "--part", "young=2"], "COHORT=VALUE"),
        (["--column", "born", "--part", "old=1", "--part", "old=2"], "each cohort once"),
        (["--column", "born", "--part", "old=1", "--part", "young=1"], "'1' is in 'old' and 'young'"),
        (["--records", "1000000"], "delta should be at most 1/1000000"),
        (["--epsilon", "0"], "epsilon"),
        (["--site-file", "none.toml"], "none.toml"),
    ],
)
def test_a_ledger_that_makes_no_sense_is_not_made(site, options, says):
    refused(2, says, *NEW, *options)
    assert not Path("north.ledger").exists()


def test_a_new_ledger_with_an_encrypted_key_asks_for_its_passphrase(site):
    Path("words").write_text("six random words do well enough\n")
    Path("words").chmod(0o600)
    for ending in ("key", "pub"):
        Path(f"north.{ending}").unlink()
    secagg("keys", "new-site", "north", "--passphrase-file", "words")
    Path("roster.toml").unlink()
    secagg("keys", "roster", *(f"{name}.pub" for name in SITES))

    text = Path("site.toml").read_text()
    mine = fingerprint(load_public_key(Path("north.pub")).key)
    Path("site.toml").write_text(re.sub(r'^north = ".*"$', f'north = "{mine}"', text, flags=re.MULTILINE))
    refused(2, "give --passphrase-file", *NEW)
    done(*NEW, "--passphrase-file", "words")


# --- charge

CHARGE = ("charge", "north.ledger", "--site-file", "site.toml", "--study", "census", "--noise", "2")


def rows_of(path="north.ledger"):
    return read_rows(path).rows


def test_a_release_outside_of_a_study_is_charged_as_it_is_described(site):
    done(*NEW)
    assert f"row 2: charged, and may be released now. Epsilon {of(1):.4f} of 8 is spent" in done(*CHARGE)
    options = ("--rate", "0.5", "--steps", "3", "--sensitivity", "40", "--release", "tuning", "--cohort", "ward")
    done(*CHARGE, *options)
    one, other = [row for row in rows_of() if row.kind == "commit"]
    assert decode_mechanism(one.mechanism) == gaussian(1)
    assert decode_mechanism(other.mechanism) == PoissonSampledGaussian(
        sampling_rate=0.5, noise_multiplier=2.0, steps=3, l2_clip_norm=40.0
    )
    assert [(row.study, row.release, row.cohort) for row in (one, other)] == [
        ("census", "statistic", "all"),
        ("census", "tuning", "ward"),
    ]
    assert (one.delta, one.relation, one.epsilon) == (1e-5, "add-or-remove-one", None)
    assert "Everything holds" in done("verify", "north.ledger", "--roster", "roster.toml")
    (census,) = json.loads(done("show", "north.ledger", "--json"))["costs"][:1]
    assert census["releases"] == [0, 1, 0]


def test_the_same_release_made_again_is_charged_again(site):
    done(*NEW)
    done(*CHARGE)
    assert f"Epsilon {of(2):.4f} of 8" in done(*CHARGE)


def test_a_release_above_the_cap_is_refused_and_nothing_is_written(site):
    done(*NEW)
    refused(4, "not charged, and not to be released: the budget is epsilon 8", *CHARGE, "--steps", "50")
    assert len(rows_of()) == 1
    text = Path("site.toml").read_text()
    Path("site.toml").write_text(
        text.replace("[fingerprints]", "[policy]\nepsilon = 1.0\ndelta = 1e-5\n[fingerprints]")
    )
    refused(4, "not to be released: the budget is epsilon 1", *CHARGE)
    assert len(rows_of()) == 1


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--noise", "0"], "noise_multiplier"),
        (["--steps", "0"], "--steps should be at least 1"),
        (["--rate", "1.5"], "sampling_rate"),
        (["--sensitivity", "-1"], "l2_clip_norm"),
        (["--study", ""], "study should be 1 to 200"),
        (["--cohort", ""], "cohort should be 1 to 200"),
        (["--release", "other"], "--release"),
        (["--site-file", "none.toml"], "none.toml"),
    ],
)
def test_a_charge_that_makes_no_sense_is_not_made(site, options, says):
    done(*NEW)
    refused(2, says, *CHARGE, *options)
    assert len(rows_of()) == 1


def test_a_charge_to_a_ledger_that_is_missing_or_for_participants_is_refused(site):
    refused(2, "there is no ledger", *CHARGE)
    done(*NEW, "--unit", "participant")
    refused(2, "a mechanism that hides a record says nothing", *CHARGE)


# --- the document


def documented():
    """Each command of the document with the output that it shows."""
    text = DOCUMENT.read_text(encoding="utf-8")
    blocks = re.findall(r"```console\n(.*?)```", text, re.DOTALL)
    return dict(re.match(r"\$ secagg budget (.*?)\n(.*)", block, re.DOTALL).groups() for block in blocks)


def masked(text):
    return re.sub(r"\b[0-9a-f]{32,64}\b|[0-9.]+[0-9]", "#", text)


@pytest.mark.parametrize("command", list(documented()) if DOCUMENT.exists() else [])
def test_what_the_document_shows_is_what_happens(ledgers, command):
    result = budget(*command.split())
    assert [masked(line.rstrip()) for line in result.output.splitlines()] == [
        masked(line.rstrip()) for line in documented()[command].splitlines()
    ]

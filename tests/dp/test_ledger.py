"""The budget ledger: what is charged, what is refused, and what the sites keep of each other."""

import shutil
import sqlite3
import stat
from pathlib import Path

import msgspec
import pytest

from dp import ledger_check, ledger_store
from dp.errors import BudgetExceeded, LedgerError, LedgerLocked, ParameterError
from dp.ledger import Ledger, Partition
from dp.ledger_check import examine, replay
from dp.ledger_rows import decode_mechanism, encode_mechanism
from dp.ledger_store import read_rows
from dp.mechanisms import PoissonSampledGaussian, Unit
from tests.dp.ledgers import (
    REPLACE,
    cap,
    epsilon_of,
    gaussian,
    holds,
    made,
    named,
    noise_shares,
    of,
    opened,
    reserve,
    signer,
    verify,
)

# --- reserve, run, commit


def test_a_reservation_counts_at_its_worst_until_it_is_committed_as_what_it_was(path):
    with opened(path) as ledger:
        assert ledger.spent("all").epsilon == 0.0
        reservation = reserve(ledger, noise_shares(3))
        assert ledger.spent("all").epsilon == of(noise_shares(3))
        ledger.commit(reservation, noise_shares(5), time=3.0)
        assert ledger.spent("all").epsilon == of(noise_shares(5)) < of(noise_shares(3))
    assert epsilon_of(path) == of(noise_shares(5))
    assert holds(path).total.epsilon == of(noise_shares(5))


def test_a_process_that_ends_after_reserving_has_spent_it(path):
    with opened(path) as ledger:
        reserve(ledger, gaussian(4))
    assert epsilon_of(path) == of(gaussian(4))


def test_a_later_process_commits_by_the_number_of_the_row(path):
    with opened(path) as ledger:
        number = reserve(ledger, gaussian(4)).sequence
    with opened(path) as ledger:
        ledger.commit(number, gaussian(2), time=3.0)
    assert epsilon_of(path) == of(gaussian(2))


def test_releases_of_all_studies_and_kinds_compose(path):
    with opened(path) as ledger:
        for study, kind in (("a", "training"), ("b", "statistic"), ("b", "tuning")):
            reserve(ledger, study=study, study_digest=study.encode(), release=kind)
        assert ledger.spent("all").epsilon == of(gaussian(3))
    rows = read_rows(path).rows
    assert [c.releases for c in ledger_check.costs(replay(rows))] == [(1, 0, 0), (0, 1, 1)]


def test_what_would_exceed_the_cap_is_refused_and_nothing_is_written(tmp_path):
    limit = of(gaussian(3))
    path = made(tmp_path, cap=cap(limit))
    with opened(path) as ledger:
        for _ in range(3):
            reserve(ledger)
        before = ledger.head()
        with pytest.raises(BudgetExceeded) as caught:
            reserve(ledger)
        assert (caught.value.spent, caught.value.next, caught.value.budget) == (limit, of(gaussian(4)), limit)
        assert ledger.head() == before
    assert len(read_rows(path).rows) == 4


def test_what_a_commit_gives_back_can_be_spent(tmp_path):
    path = made(tmp_path, cap=cap(of(gaussian(3))))
    with opened(path) as ledger:
        reservation = reserve(ledger, gaussian(3))
        with pytest.raises(BudgetExceeded):
            reserve(ledger)
        ledger.commit(reservation, gaussian(0), time=3.0)
        reserve(ledger, gaussian(3), time=3.0)


def test_a_study_keeps_to_its_own_epsilon_under_its_own_relation(path):
    promise = {"epsilon": of(gaussian(2), relation=REPLACE), "relation": REPLACE, "delta": 1e-4}
    promise["epsilon"] = of(gaussian(2), relation=REPLACE, delta=1e-4)
    with opened(path) as ledger:
        reserve(ledger, **promise)
        reserve(ledger, study_digest=b"another", study="another")
        reserve(ledger, **promise)
        with pytest.raises(BudgetExceeded) as caught:
            reserve(ledger, **promise)
        assert caught.value.budget == promise["epsilon"]
    holds(path)


def test_a_release_dearer_than_its_reservation_is_recorded_counted_and_told(path):
    with opened(path) as ledger:
        reservation = reserve(ledger, noise_shares(5))
        with pytest.raises(LedgerError, match="row 3: the release cost more than row 2 had reserved"):
            ledger.commit(reservation, noise_shares(3), time=3.0)
        assert ledger.spent("all").epsilon == of(noise_shares(3))
    assert epsilon_of(path) == of(noise_shares(3))
    named(path, "row 2: the release cost more than this row had reserved for it")


def test_committing_again_changes_nothing_and_as_something_else_is_refused(path):
    with opened(path) as ledger:
        reservation = reserve(ledger, gaussian(3))
        ledger.commit(reservation, gaussian(2), time=3.0)
        head = ledger.head()
        ledger.commit(reservation, gaussian(2), time=4.0)
        assert ledger.head() == head
        with pytest.raises(LedgerError, match="row 2 was committed as"):
            ledger.commit(reservation, gaussian(1), time=4.0)
        for number in (1, 3, 99):
            with pytest.raises(LedgerError, match=f"row {number} is no reservation"):
                ledger.commit(number, gaussian(1), time=4.0)
        with pytest.raises(LedgerError, match="hides another unit"):
            ledger.commit(reserve(ledger, time=4.0), noise_shares(3, unit=Unit.PARTICIPANT), time=4.0)
        assert ledger.spent("all").epsilon == of(gaussian(3))


def test_without_a_reference_every_reservation_is_charged_and_with_one_the_same_is_found_again(path):
    with opened(path) as ledger:
        assert reserve(ledger).sequence != reserve(ledger).sequence
        first = reserve(ledger, reference="round 1")
        assert reserve(ledger, reference="round 1", time=5.0) == first
        assert reserve(ledger, reference="round 2").sequence > first.sequence
        assert reserve(ledger, reference="round 1", study_digest=b"x").sequence > first.sequence
        assert reserve(ledger, reference="round 1", cohort="x").sequence > first.sequence
    with opened(path) as ledger:
        assert reserve(ledger, reference="round 1") == first
        ledger.commit(first, gaussian(), time=6.0)
        assert reserve(ledger, reference="round 1", time=7.0) == first
        for another in ({"mechanism": gaussian(2)}, {"release": "tuning"}, {"epsilon": 9.0}, {"delta": 1e-6}):
            with pytest.raises(LedgerError, match="for another release"):
                reserve(ledger, reference="round 1", time=7.0, **another)
        assert ledger.spent("all").epsilon == of(gaussian(6))


def test_whole_numbers_given_for_floats_do_not_break_the_chain(tmp_path):
    path = made(tmp_path, cap=cap(9, records=100), time=1)
    whole = PoissonSampledGaussian(sampling_rate=1, noise_multiplier=2, steps=1, l2_clip_norm=1)
    with opened(path) as ledger:
        ledger.commit(reserve(ledger, whole, time=2, epsilon=8), whole, time=3)
        ledger.set_cap(8, time=4)
    holds(path)


# --- cohorts


PARTS = Partition(column="born", parts={"old": ("1940", "1950"), "young": ("1990",)})


def test_cohorts_overlap_whatever_they_are_called(path):
    with opened(path) as ledger:
        reserve(ledger, cohort="men")
        reserve(ledger, cohort="women")
        assert ledger.spent("men").epsilon == ledger.spent("anything").epsilon == of(gaussian(2))


def test_parts_of_the_declared_partition_compose_in_parallel(tmp_path):
    path = made(tmp_path, partition=PARTS, cap=cap(of(gaussian(3))))
    with opened(path) as ledger:
        reserve(ledger, gaussian(3), cohort="old")
        reserve(ledger, gaussian(2), cohort="young")
        assert ledger.spent("old").epsilon == ledger.spent("all").epsilon == of(gaussian(3))
        assert ledger.spent("young").epsilon == of(gaussian(2))
        for cohort in ("old", "all"):
            with pytest.raises(BudgetExceeded):
                reserve(ledger, cohort=cohort)
        reserve(ledger, cohort="young")
        with pytest.raises(BudgetExceeded):
            reserve(ledger, cohort="undeclared")
    assert holds(path).total.epsilon == of(gaussian(3))


def test_a_cohort_that_is_no_part_is_charged_to_every_part(tmp_path):
    path = made(tmp_path, partition=PARTS)
    with opened(path) as ledger:
        reserve(ledger, cohort="all")
        reserve(ledger, cohort="old")
        assert ledger.spent("old").epsilon == of(gaussian(2))
        assert ledger.spent("young").epsilon == of(gaussian(1))


def test_under_replace_one_even_parts_overlap_because_a_record_may_move_from_one_to_the_other(tmp_path):
    path = made(tmp_path, partition=PARTS, cap=cap(50.0, relation=REPLACE))
    with opened(path) as ledger:
        reserve(ledger, cohort="old")
        reserve(ledger, cohort="young")
        assert ledger.spent("old").epsilon == of(gaussian(2), relation=REPLACE)


@pytest.mark.parametrize(
    ("parts", "says"),
    [
        ({"old": ("1940",)}, "at least 2 parts"),
        ({"old": ("1940",), "young": ("1940", "1990")}, "'1940' is in 'old' and 'young'"),
        ({"old": ("1940", "1940"), "young": ("1990",)}, "'1940' is in 'old' and 'old'"),
        ({"old": ("1940",), "young": ()}, "at least one value"),
        ({"": ("1940",), "young": ("1990",)}, "cohort should be"),
    ],
)
def test_what_is_no_partition_is_refused(parts, says):
    with pytest.raises(ParameterError, match=says):
        Partition(column="born", parts=parts)


def test_a_ledger_for_participants_takes_no_release_that_hides_a_record_and_the_other_way_round_it_does(tmp_path):
    with opened(made(tmp_path, cap=cap(unit=Unit.PARTICIPANT))) as ledger:
        with pytest.raises(ParameterError, match="hides a record"):
            reserve(ledger)
        reserve(ledger, noise_shares(3, unit=Unit.PARTICIPANT))
    with opened(made(tmp_path, "west"), "west") as ledger:
        reserve(ledger, noise_shares(3, unit=Unit.PARTICIPANT))


# --- bad input


@pytest.mark.parametrize(
    "bad",
    [
        {"epsilon": 0.0},
        {"epsilon": -1.0},
        {"epsilon": float("nan")},
        {"epsilon": float("inf")},
        {"delta": 0.0},
        {"delta": 1.0},
        {"delta": float("nan")},
        {"delta": 0.00101},
        {"records": -1},
        {"relation": "add"},
        {"unit": "patient"},
    ],
)
def test_a_cap_out_of_range_is_refused(bad):
    with pytest.raises(ParameterError):
        cap(**bad)


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        ({"epsilon": 0.0}, "epsilon"),
        ({"epsilon": float("nan")}, "epsilon"),
        ({"delta": 0.0}, "delta"),
        ({"delta": 1.0}, "delta"),
        ({"delta": 0.00101}, "delta should be at most 1/1000"),
        ({"relation": "add-or-remove-one"}, "relation"),
        ({"release": "leak"}, "release"),
        ({"study": ""}, "study"),
        ({"study": "\x1b[2J"}, "study"),
        ({"cohort": ""}, "cohort"),
        ({"cohort": "x" * 201}, "cohort"),
        ({"reference": "a\nb"}, "reference"),
        ({"mechanism": "gaussian"}, "mechanism"),
        ({"time": float("inf")}, "time"),
    ],
)
def test_a_reservation_out_of_range_is_refused_before_anything_is_written(path, bad, says):
    with opened(path) as ledger:
        with pytest.raises(ParameterError, match=says):
            reserve(ledger, **bad)
        assert ledger.head().sequence == 1
        reserve(ledger)
    holds(path)


@pytest.mark.parametrize("when", [1.9, -1.0, float("nan")])
def test_a_clock_that_ran_backwards_stops_everything(path, when):
    with opened(path) as ledger:
        reservation = reserve(ledger)
        receipt = other_receipt(path.parent)
        for act in (
            lambda: reserve(ledger, time=when),
            lambda: ledger.commit(reservation, gaussian(), time=when),
            lambda: ledger.set_cap(3.0, time=when),
            lambda: ledger.record_receipts([receipt], time=when),
        ):
            with pytest.raises(LedgerError, match="the clock ran backwards"):
                act()
        assert ledger.head().sequence == 2
        reserve(ledger, time=2.0)


def test_a_missing_ledger_is_told_and_none_is_made(tmp_path):
    with pytest.raises(LedgerError, match=r"there is no ledger\. Put it back"):
        opened(tmp_path / "none")
    with pytest.raises(LedgerError, match="there is no ledger"):
        read_rows(tmp_path / "none")
    assert list(tmp_path.iterdir()) == []


def test_another_sites_ledger_and_another_sites_key_are_refused(path, tmp_path):
    with pytest.raises(LedgerError, match="is the ledger of 'north', expected that of 'west'"):
        opened(path, "west")
    with (
        Ledger.open(path, site="north", sign=signer("west"), verify=verify) as ledger,
        pytest.raises(LedgerError, match="the key at hand is not that of 'north'"),
    ):
        reserve(ledger)
    holds(path)
    named(path, "is the ledger of 'north', expected that of 'west'", site="west")


@pytest.mark.parametrize("content", [b"", b"no ledger", b"SQLite format 3\x00" + bytes(4080)])
def test_a_file_that_is_no_ledger_is_told(tmp_path, content):
    path = tmp_path / "north.ledger"
    path.write_bytes(content)
    for look in (opened, read_rows):
        with pytest.raises(LedgerError, match="no ledger"):
            look(path)


def test_a_ledger_is_never_overwritten_and_made_whole_or_not_at_all(path, tmp_path, monkeypatch):
    content = path.read_bytes()
    with pytest.raises(LedgerError, match="exists already"):
        made(tmp_path)
    assert path.read_bytes() == content
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    with pytest.raises(LedgerError, match="could not be made"):
        made(tmp_path / "nowhere")
    monkeypatch.setattr(ledger_store, "insert", lambda *_: (_ for _ in ()).throw(sqlite3.OperationalError("full")))
    with pytest.raises(LedgerError, match="could not be made"):
        made(tmp_path, "west")
    assert [p.name for p in tmp_path.iterdir()] == ["north.ledger"]


def test_the_file_syncs_in_full_and_is_in_wal_mode(path):
    with opened(path) as ledger:
        assert ledger._database.execute("PRAGMA synchronous").fetchone()[0] == 2
        assert ledger._database.execute("PRAGMA journal_mode").fetchone()[0] == "wal"


def test_rows_cannot_be_changed_or_deleted_without_dropping_the_triggers(path):
    with opened(path) as ledger:
        reserve(ledger)
    database = sqlite3.connect(path)
    for statement in (
        "UPDATE row SET delta = 0.5",
        "DELETE FROM row",
        "UPDATE row SET sequence = 9 WHERE sequence = 2",
    ):
        with pytest.raises(sqlite3.IntegrityError, match="never changed or deleted"):
            database.execute(statement)
    database.close()
    holds(path)


def test_a_ledger_that_another_process_has_locked_is_told_and_nothing_is_written(path):
    holder = sqlite3.connect(path, isolation_level=None)
    holder.execute("BEGIN IMMEDIATE")
    with opened(path, patience=0.05) as ledger:
        with pytest.raises(LedgerLocked, match="locked by another process"):
            reserve(ledger)
        holder.execute("ROLLBACK")
        assert ledger.head().sequence == 1
        reserve(ledger)
    holder.close()
    assert holds(path).rows == 2


def test_a_full_disk_is_told_nothing_is_charged_and_it_goes_on_when_there_is_room(path):
    with opened(path) as ledger:
        reservation = reserve(ledger, gaussian(3))
        pages = ledger._database.execute("PRAGMA page_count").fetchone()[0]
        ledger._database.execute(f"PRAGMA max_page_count = {pages}")

        def fill():
            for number in range(1000):
                reserve(ledger, gaussian(0), study=f"{number:0200}")

        with pytest.raises(LedgerError, match="the disk is full"):
            fill()
        before, cost = ledger.head(), ledger.spent("all").epsilon
        with pytest.raises(LedgerError, match="the disk is full"):
            ledger.commit(reservation, gaussian(1), time=5.0)
        assert (ledger.head(), ledger.spent("all").epsilon) == (before, cost)
        ledger._database.execute("PRAGMA max_page_count = 1000000")
        ledger.commit(reservation, gaussian(1), time=5.0)
        assert ledger.spent("all").epsilon < cost
    holds(path)


def test_a_disk_that_only_reads_is_told(path, monkeypatch):
    with opened(path) as ledger:
        ledger._database.execute("PRAGMA query_only = ON")
        with pytest.raises(LedgerError, match="cannot be read or written"):
            reserve(ledger)


def test_a_change_of_the_cap_is_a_row_and_an_equal_one_is_none(path):
    with opened(path) as ledger:
        ledger.set_cap(10.0, time=2.0)
        assert ledger.head().sequence == 1
        reserve(ledger, gaussian(4))
        ledger.set_cap(0.5, time=3.0)
        assert ledger.cap == cap(0.5)
        with pytest.raises(BudgetExceeded):
            reserve(ledger, time=3.0)
        for bad in (0.0, -1.0, float("inf"), float("nan")):
            with pytest.raises(ParameterError):
                ledger.set_cap(bad, time=4.0)
        ledger.set_cap(20.0, time=4.0)
        reserve(ledger, time=4.0)
    assert [row.kind for row in read_rows(path).rows] == ["open", "reserve", "cap", "cap", "reserve"]
    holds(path)


def test_every_kind_of_mechanism_comes_back_as_it_was():
    for mechanism in (gaussian(), noise_shares(4), noise_shares(3, unit=Unit.PARTICIPANT)):
        assert decode_mechanism(encode_mechanism(mechanism)) == mechanism
    with pytest.raises(ParameterError, match="expected a mechanism"):
        encode_mechanism(msgspec.to_builtins(gaussian()))
    text = encode_mechanism(gaussian())
    for bad in ("", "{}", text.replace("Poisson", "Fish"), text.replace('"steps":1', '"steps":-1'), text + " "):
        with pytest.raises(ParameterError):
            decode_mechanism(bad)
    with pytest.raises(ParameterError, match="no others"):
        decode_mechanism(text.replace("{", '{"a":1,', 1))


# --- receipts


def other_receipt(folder, rows=1, site="west"):
    path = Path(folder) / f"{site}.ledger"
    if not path.exists():
        made(folder, site)
    with opened(path, site) as ledger:
        while ledger.head().sequence < rows:
            reserve(ledger)
        return ledger.head()


def test_receipts_of_others_are_kept_once_and_the_newest_only(path, tmp_path):
    old, new = other_receipt(tmp_path), other_receipt(tmp_path, 3)
    with opened(path) as ledger:
        ledger.record_receipts([new], time=2.0)
        head = ledger.head()
        ledger.record_receipts([new, old], time=3.0)
        assert ledger.head() == head
        newer = other_receipt(tmp_path, 4)
        ledger.record_receipts([newer, new, old], time=3.0)
        assert ledger.head().sequence == head.sequence + 1
    holds(path, others={"west": read_rows(tmp_path / "west.ledger")})
    verdict = examine(read_rows(tmp_path / "west.ledger"), verify, others={"north": read_rows(path)})
    assert verdict.findings == ()
    assert verdict.witnessed == 4


def test_receipts_that_are_not_signed_by_their_site_or_are_ones_own_are_not_kept(path, tmp_path):
    receipt = other_receipt(tmp_path)
    forged = [
        msgspec.structs.replace(receipt, sequence=9),
        msgspec.structs.replace(receipt, digest="0" * 64),
        msgspec.structs.replace(receipt, ledger="0" * 32),
        msgspec.structs.replace(receipt, site="north"),
        msgspec.structs.replace(receipt, site="nobody"),
        msgspec.structs.replace(receipt, signature=""),
        msgspec.structs.replace(receipt, signature="no digits"),
    ]
    with opened(path) as ledger:
        for bad in (*forged, ledger.head()):
            with pytest.raises(LedgerError):
                ledger.record_receipts([receipt, bad], time=2.0)
        assert ledger.head().sequence == 1


def test_two_pasts_of_one_ledger_show_and_both_receipts_are_kept(path, tmp_path):
    other = tmp_path / "west.ledger"
    other_receipt(tmp_path)
    shutil.copy(other, tmp_path / "backup")
    one = other_receipt(tmp_path, 2)
    shutil.copy(tmp_path / "backup", other)
    with opened(other, "west") as ledger:
        reserve(ledger, study="another past")
        two = ledger.head()
    with opened(path) as ledger:
        ledger.record_receipts([one], time=2.0)
        with pytest.raises(LedgerError, match="two different receipts are signed for row 2 of 'west'"):
            ledger.record_receipts([two], time=2.0)
        assert ledger.head().sequence == 3
    named(other, "contradicts its ledger: it has another row there", others=[path])


def test_a_site_refuses_to_go_on_with_an_older_copy_when_it_is_shown_its_own_receipt(path, tmp_path):
    with opened(path) as ledger:
        ledger.require(ledger.head())
        shutil.copy(path, tmp_path / "backup")
        reserve(ledger)
        receipt = ledger.head()
        ledger.require(receipt)
    shutil.copy(tmp_path / "backup", path)
    with opened(path) as ledger:
        with pytest.raises(LedgerError, match="ends at row 1 or has another row there: an older copy was put back"):
            ledger.require(receipt)
        with pytest.raises(LedgerError, match="not signed by 'north'"):
            ledger.require(msgspec.structs.replace(receipt, sequence=1))
        reserve(ledger, study="another past")
        with pytest.raises(LedgerError, match="another row there"):
            ledger.require(receipt)

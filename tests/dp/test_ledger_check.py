"""The check of a ledger names whatever was done to it, and makes the account anew."""

import json
import math
import re
import sqlite3

import msgspec
import pytest

from dp import ledger_rows, ledger_store
from dp.accounting import Spent, spent
from dp.errors import DpError, LedgerError, LedgerLocked
from dp.ledger import Receipt
from dp.ledger_check import examine, timeline
from dp.ledger_rows import Account, Row, encode_mechanism
from dp.ledger_store import read_rows
from dp.mechanisms import Unit
from tests.dp.ledgers import gaussian, holds, made, named, noise_shares, of, opened, reserve, signer, verify

# --- tampered ledgers, each named


@pytest.fixture
def spent_ledger(tmp_path):
    """Rows 1 open, 2 reserve, 3 commit, 4 cap, 5 reserve, 6 commit, 7 reserve; west holds a receipt for row 7."""
    path = made(tmp_path)
    with opened(path) as ledger:
        ledger.commit(reserve(ledger, gaussian(3), time=10.0), gaussian(2), time=11.0)
        ledger.set_cap(9.0, time=12.0)
        ledger.commit(reserve(ledger, gaussian(3), time=13.0), gaussian(2), time=14.0)
        reserve(ledger, gaussian(1), time=15.0)
        receipt = ledger.head()
    made(tmp_path, "west")
    with opened(tmp_path / "west.ledger", "west") as other:
        other.record_receipts([receipt], time=20.0)
    holds(path, others={"west": read_rows(tmp_path / "west.ledger")})
    return path


TRIGGERS = ("no_update", "no_delete")


def tamper(path, *statements, restore=True):
    """Do to a ledger what its triggers forbid, and put the triggers back as if nothing had been."""
    database = sqlite3.connect(path, isolation_level=None)
    for name in TRIGGERS:
        database.execute(f"DROP TRIGGER {name}")
    for statement in statements:
        database.execute(*statement) if isinstance(statement, tuple) else database.execute(statement)
    if restore:
        for name in TRIGGERS:
            database.execute(ledger_store._SCHEMA[name])
    database.close()


def put(path, row):
    """Write a row in the place of the one with its number, or at a place of its own."""
    tamper(path, ("DELETE FROM row WHERE sequence = ?", (row.sequence,)))
    database = sqlite3.connect(path, isolation_level=None)
    ledger_store.insert(database, row)
    database.close()


def refused(path, says, site="north"):
    """The site does not open it either."""
    with pytest.raises(LedgerError, match=says):
        opened(path, site)


def test_1_an_edited_row(spent_ledger):
    tamper(spent_ledger, "UPDATE row SET study = 'kidney' WHERE sequence = 5")
    named(spent_ledger, "row 5: edited: its content is not the one that its digest was taken of")
    refused(spent_ledger, "row 5: edited")


def test_2_the_last_row_deleted(spent_ledger, tmp_path):
    tamper(spent_ledger, "DELETE FROM row WHERE sequence = 7")
    findings = named(
        spent_ledger,
        "row 7 was written and then deleted: the ledger ends at row 6",
        "the receipt for row 7 of 'north' contradicts its ledger: it ends at row 6",
        others=[tmp_path / "west.ledger"],
    )
    assert len(findings) == 2
    refused(spent_ledger, "row 7 was written and then deleted")


def test_2_the_last_row_deleted_with_all_traces_shows_by_the_receipt(spent_ledger, tmp_path):
    tamper(spent_ledger, "DELETE FROM row WHERE sequence = 7", "UPDATE sqlite_sequence SET seq = 6")
    holds(spent_ledger)
    named(spent_ledger, "it ends at row 6: an older copy was put back", others=[tmp_path / "west.ledger"])


def test_3_a_middle_row_deleted(spent_ledger):
    tamper(spent_ledger, "DELETE FROM row WHERE sequence = 4")
    named(spent_ledger, "row 4 is missing: row 5 comes after row 3")
    refused(spent_ledger, "row 4 is missing")
    tamper(spent_ledger, "DELETE FROM row WHERE sequence = 5")
    named(spent_ledger, "rows 4 to 5 are missing")


def test_3_a_middle_row_deleted_and_the_rest_renumbered(spent_ledger):
    tamper(
        spent_ledger,
        "DELETE FROM row WHERE sequence = 4",
        *(f"UPDATE row SET sequence = {n - 1} WHERE sequence = {n}" for n in (5, 6, 7)),
    )
    named(spent_ledger, "row 4: moved or renumbered: it was row 5", "row 7 was written and then deleted")


def test_4_two_rows_swapped(spent_ledger):
    tamper(
        spent_ledger, *(f"UPDATE row SET sequence = {b} WHERE sequence = {a}" for a, b in ((5, 99), (6, 5), (99, 6)))
    )
    named(spent_ledger, "row 5: moved or renumbered: it was row 6", "row 6: moved or renumbered: it was row 5")
    refused(spent_ledger, "row 5: moved")


def test_5_signed_anew_with_another_key(spent_ledger):
    row = read_rows(spent_ledger).rows[6]
    put(spent_ledger, msgspec.structs.replace(row, mechanism=encode_mechanism(gaussian(0))).signed(signer("west")))
    assert named(spent_ledger, "row 7: not signed with the key of 'north'") == (
        "row 7: not signed with the key of 'north': edited, inserted or another's",
    )
    refused(spent_ledger, "row 7: not signed")


def test_6_the_cap_changed(spent_ledger):
    tamper(spent_ledger, "UPDATE row SET epsilon = 99.0 WHERE sequence = 4")
    named(spent_ledger, "row 4: edited")
    tamper(spent_ledger, "UPDATE row SET epsilon = 99.0 WHERE sequence = 1")
    named(spent_ledger, "row 1: edited", "row 4: edited")


def test_7_the_mechanism_changed(spent_ledger):
    weaker = encode_mechanism(gaussian(2, noise=20.0))
    tamper(spent_ledger, ("UPDATE row SET mechanism = ? WHERE sequence = 6", (weaker,)))
    named(spent_ledger, "row 6: edited")
    row = read_rows(spent_ledger).rows[5]
    digest = row.computed_digest()
    tamper(spent_ledger, ("UPDATE row SET digest = ? WHERE sequence = 6", (digest,)))
    named(spent_ledger, "row 6: not signed", "row 7: does not follow on row 6")


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9])
def test_8_the_file_truncated(spent_ledger, share):
    content = spent_ledger.read_bytes()
    spent_ledger.write_bytes(content[: int(len(content) * share)])
    for look in (read_rows, opened):
        with pytest.raises(LedgerError, match="put the newest copy back"):
            look(spent_ledger)


def test_9_an_older_copy_put_back_shows_by_another_sites_receipt(tmp_path):
    path = made(tmp_path)
    with opened(path) as ledger:
        reserve(ledger)
    backup = path.read_bytes()
    with opened(path) as ledger:
        reserve(ledger)
        receipt = ledger.head()
    made(tmp_path, "west")
    with opened(tmp_path / "west.ledger", "west") as other:
        other.record_receipts([receipt], time=20.0)
    path.write_bytes(backup)
    assert holds(path).witnessed == 0
    named(path, "row 2: the receipt for row 3 of 'north' contradicts", others=[tmp_path / "west.ledger"])
    with opened(path) as ledger:
        for _ in range(3):
            reserve(ledger, study="goes on")
    named(path, "it has another row there: an older copy was put back", others=[tmp_path / "west.ledger"])
    path.unlink()
    made(tmp_path)
    named(path, "it was replaced by another one, begun anew", others=[tmp_path / "west.ledger"])


def test_10_a_row_inserted(spent_ledger):
    rows = read_rows(spent_ledger).rows
    false = msgspec.structs.replace(rows[6], sequence=8, previous=rows[6].digest, kind="commit", refers=7)
    put(spent_ledger, msgspec.structs.replace(false, digest=false.computed_digest()))
    named(spent_ledger, "row 8: not signed with the key of 'north'")
    refused(spent_ledger, "row 8: not signed")


def test_10_an_old_row_inserted_again(spent_ledger):
    row = read_rows(spent_ledger).rows[5]
    database = sqlite3.connect(spent_ledger, isolation_level=None)
    ledger_store.insert(database, msgspec.structs.replace(row, sequence=8))
    database.close()
    named(spent_ledger, "row 8: moved or renumbered: it was row 6")


def test_11_another_sites_ledger_under_the_sites_name(spent_ledger, tmp_path):
    path = tmp_path / "west.ledger"
    tamper(path, "UPDATE row SET site = 'north'")
    named(path, "row 1: edited")
    for row in read_rows(path).rows:
        put(path, row.signed(signer("west")))
    named(path, "row 1: not signed with the key of 'north'")
    refused(path, "row 1: not signed")


def test_11_rows_of_two_ledgers_of_one_site_mixed(spent_ledger, tmp_path):
    (tmp_path / "again").mkdir()
    twin = made(tmp_path / "again")
    with opened(twin) as ledger:
        for _ in range(6):
            reserve(ledger, gaussian(0))
    put(spent_ledger, read_rows(twin).rows[6])
    named(spent_ledger, "row 7: does not follow on row 6")


def test_12_the_clock_changed(spent_ledger):
    tamper(spent_ledger, "UPDATE row SET time = 1.5 WHERE sequence = 5")
    named(spent_ledger, "row 5: edited")


def chained(path, rows):
    """Rows written anew from there on, by the holder of the key."""
    before = rows[0]
    for row in rows[1:]:
        # Each by whom it names: a site may have the help of another.
        before = msgspec.structs.replace(row, previous=before.digest).signed(signer(row.site))
        put(path, before)


def parted(column, cohort):
    parts = f'{{"{cohort}":["1"],"young":["2"]}}'
    return f'{{"records":1000,"partition":{{"column":"{column}","parts":{parts}}}}}'


def receipt_of(site, **more):
    return json.dumps({"site": site, "ledger": "0", "sequence": 1, "digest": "0", "signature": "0", **more})


def of_participants():
    return noise_shares(3, unit=Unit.PARTICIPANT)


@pytest.mark.parametrize(
    ("number", "changed", "says"),
    [
        (5, {"time": 1.5}, "row 5: the clock ran backwards, by 10.500 seconds since row 4"),
        (7, {"delta": 0.5}, "row 7: says what cannot be: delta should be at most 1/1000"),
        (7, {"delta": None}, "row 7: says what cannot be"),
        (7, {"unit": "participant"}, "row 7: says what cannot be: unit should be 'record'"),
        (7, {"relation": "none"}, "row 7: says what cannot be: relation"),
        (7, {"study": "\x1b[31m"}, "row 7: says what cannot be: study"),
        (7, {"mechanism": "{}"}, "row 7: says what cannot be: not a mechanism"),
        (7, {"site": "west"}, "row 7: is of another ledger"),
        (7, {"ledger": "0" * 32}, "row 7: is of another ledger"),
        (7, {"kind": "open"}, "row 7: a second first row"),
        (7, {"kind": "commit", "refers": 2}, "row 7: commits row 2 a second time"),
        (7, {"kind": "commit", "refers": 4}, "row 7: commits row 4, which is no reservation"),
        (6, {"cohort": "other"}, "row 6: has another cohort than row 5"),
        (6, {"mechanism": encode_mechanism(gaussian(4))}, "row 5: the release cost more than this row had reserved"),
        (4, {"epsilon": 0.1}, "row 5: reserves up to epsilon"),
        (7, {"epsilon": 0.1}, "study 'heart': promised epsilon 0.1, and has cost"),
        (4, {"epsilon": None}, "row 4: says what cannot be"),
        (4, {"kind": "receipt", "detail": "{}"}, "row 4: says what cannot be"),
        (1, {"detail": '{"records":1,"partition":{"column":"x","parts":{}}}'}, "row 1: says what cannot be"),
        (
            1,
            {"detail": '{"records":1,"partition":null,"more":1}'},
            "row 1: says what cannot be: .*unknown field `more`",
        ),
        (1, {"detail": "{"}, "row 1: says what cannot be: Input data was truncated"),
        (1, {"detail": parted("\\u001b", "old")}, "row 1: says what cannot be: the partition's column should"),
        (1, {"detail": parted("born", "\\u001b")}, "row 1: says what cannot be: a part's cohort should"),
        (1, {"kind": "cap"}, "row 1: expected a first row of kind open, got cap"),
        (1, {"relation": "none"}, "row 1: says what cannot be: relation should be one of"),
        (1, {"unit": "none"}, "row 1: says what cannot be: unit should be one of"),
        (1, {"epsilon": -1.0}, "row 1: says what cannot be: epsilon should be a positive"),
        (4, {"kind": "receipt", "detail": receipt_of("\x1b")}, "row 4: says what cannot be: the receipt's site should"),
        (4, {"kind": "receipt", "detail": receipt_of("west", more=1)}, "row 4: .* unknown field `more`"),
        (7, {"time": math.inf}, "row 7: says what cannot be: time should be a finite number"),
        (7, {"study": ""}, "row 7: says what cannot be: study should be 1 to 200"),
        (7, {"cohort": ""}, "row 7: says what cannot be: cohort should be 1 to 200"),
        (7, {"reference": "x" * 201}, "row 7: says what cannot be: reference should be 0 to 200"),
        (7, {"reference": "\x1b"}, "row 7: says what cannot be: reference should be 0 to 200"),
        (7, {"release": "other"}, "row 7: says what cannot be: release should be training, statistic or tuning"),
        (7, {"epsilon": -1.0}, "row 7: says what cannot be: epsilon should be a positive"),
        (6, {"mechanism": encode_mechanism(of_participants())}, "row 6: commits a release that hides another unit"),
    ],
)
def test_what_the_holder_of_the_key_writes_must_still_make_sense(spent_ledger, number, changed, says):
    rows = list(read_rows(spent_ledger).rows)
    rows[number - 1] = msgspec.structs.replace(rows[number - 1], **changed)
    first = rows[0].signed(signer("north"))
    put(spent_ledger, first)
    chained(spent_ledger, [first, *rows[1:]])
    findings = named(spent_ledger)
    assert any(re.match(says, finding) for finding in findings), findings


def test_a_reference_comes_once(spent_ledger):
    rows = [
        msgspec.structs.replace(row, reference="round 1" if row.kind in ("reserve", "commit") else "")
        for row in read_rows(spent_ledger).rows
    ]
    chained(spent_ledger, rows)
    named(spent_ledger, "row 5: reserves 'round 1' a second time")


def test_a_site_is_named_in_printable_text(spent_ledger):
    """Nobody signs for such a name, so that the chain tells first; whoever replays rows alone is told as well."""
    first = msgspec.structs.replace(read_rows(spent_ledger).rows[0], site="\x1b[31m")
    with pytest.raises(LedgerError, match=r"^row 1: says what cannot be: site should be 1 to 200 printable"):
        Account().apply(first)


def test_there_is_no_cap_before_the_first_row():
    with pytest.raises(LedgerError, match="without a first row has no cap"):
        _ = Account().cap


def test_a_ledger_written_anew_by_the_holder_of_the_key_shows_by_the_receipt_only(spent_ledger, tmp_path):
    rows = list(read_rows(spent_ledger).rows)
    rows[5] = msgspec.structs.replace(rows[5], mechanism=encode_mechanism(gaussian(0)))
    chained(spent_ledger, rows)
    holds(spent_ledger)
    named(spent_ledger, "contradicts its ledger: it has another row there", others=[tmp_path / "west.ledger"])


def test_dropped_triggers_and_added_views_are_named(spent_ledger):
    tamper(spent_ledger, restore=False)
    named(spent_ledger, "the trigger 'no_update' is gone", "the trigger 'no_delete' is gone")
    refused(spent_ledger, "the trigger 'no_update' is gone")
    database = sqlite3.connect(spent_ledger)
    database.execute("CREATE VIEW more AS SELECT * FROM row")
    database.close()
    named(spent_ledger, "holds 'more', which this software never made")


def test_a_view_in_the_place_of_the_table_is_no_ledger(spent_ledger):
    tamper(spent_ledger, "ALTER TABLE row RENAME TO old", "CREATE VIEW row AS SELECT * FROM old", restore=False)
    with pytest.raises(LedgerError, match="holds no table of rows as this version makes it"):
        read_rows(spent_ledger)


def test_all_rows_deleted_and_values_of_other_types_are_told(spent_ledger):
    tamper(spent_ledger, "UPDATE row SET study = X'00ff' WHERE sequence = 5")
    for look in (read_rows, opened):
        with pytest.raises(LedgerError, match="row 5: damaged or edited"):
            look(spent_ledger)
    tamper(spent_ledger, "DELETE FROM row")
    named(spent_ledger, "holds no rows")
    refused(spent_ledger, "holds no row")


def test_a_row_changed_while_the_ledger_is_open_stops_the_site(spent_ledger):
    with opened(spent_ledger) as ledger:
        tamper(spent_ledger, "UPDATE row SET digest = 'x' WHERE sequence = 7")
        with pytest.raises(LedgerError, match="row 7 was changed since it was read"):
            reserve(ledger, time=30.0)


def test_receipts_in_other_ledgers_are_held_against_their_signatures(spent_ledger, tmp_path):
    other = tmp_path / "west.ledger"
    rows = list(read_rows(other).rows)
    receipt = msgspec.json.decode(rows[1].detail, type=Receipt)
    lie = msgspec.json.encode(msgspec.structs.replace(receipt, sequence=99)).decode()
    chained(other, [rows[0], msgspec.structs.replace(rows[1], detail=lie)])
    named(spent_ledger, "row 2: the receipt for row 99 of 'north' is not signed by 'north'", others=[other])


def test_two_ledgers_of_one_site_are_no_witnesses(spent_ledger, tmp_path):
    named(spent_ledger, "are of the same site", others=[spent_ledger])


def test_a_tampered_witness_is_named_and_its_signed_receipts_count_all_the_same(spent_ledger, tmp_path):
    other = tmp_path / "west.ledger"
    tamper(other, "UPDATE row SET time = 99.0 WHERE sequence = 2")
    tamper(spent_ledger, "DELETE FROM row WHERE sequence = 7", "UPDATE sqlite_sequence SET seq = 6")
    named(spent_ledger, f"{other}: row 2: edited", "it ends at row 6", others=[other])


# --- the account made anew


def test_accountants_that_disagree_are_a_finding(spent_ledger):
    def wrong(mechanisms, delta, relation):
        cost = spent(mechanisms, delta, relation)
        return msgspec.structs.replace(cost, epsilon_rdp=max(0.0, cost.epsilon - 0.03))

    findings = named(spent_ledger, "all releases: the two accountants disagree", accountant=wrong)
    assert any("study 'heart'" in finding for finding in findings)

    def nearly(mechanisms, delta, relation):
        cost = spent(mechanisms, delta, relation)
        return msgspec.structs.replace(cost, epsilon_rdp=max(0.0, cost.epsilon - 0.015))

    assert examine(read_rows(spent_ledger), verify, accountant=nearly).findings == ()


def test_spending_that_falls_is_a_finding(spent_ledger):
    def forgetful(mechanisms, delta, relation):
        mechanisms = list(mechanisms)
        return spent(mechanisms[-1:], delta, relation) if len(mechanisms) < 2 else spent([gaussian(1)], delta, relation)

    named(spent_ledger, "row 6: what was spent falls from epsilon", accountant=forgetful)


def test_the_line_over_time_ends_at_what_is_spent(spent_ledger):
    rows = read_rows(spent_ledger).rows
    line = timeline(rows, lambda _: True)
    assert [moment for moment, _ in line] == [10.0, 11.0, 13.0, 14.0, 15.0]
    assert line[-1][1] == of(gaussian(5))
    assert line[0][1] == of(gaussian(3))
    assert timeline(rows, lambda _: True, points=2) == (line[1], line[4])
    assert timeline(rows, lambda _: False) == ()


def test_every_error_is_ours():
    assert issubclass(LedgerLocked, LedgerError)
    assert issubclass(LedgerError, DpError)
    assert isinstance(Row.__struct_fields__, tuple)
    assert isinstance(spent([], 0.5), Spent)
    assert ledger_rows.COLUMNS[0] == "sequence"

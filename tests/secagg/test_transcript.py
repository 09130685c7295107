"""The signed transcript: an honest one holds, and whatever is changed in it afterwards is named."""

import contextlib
import hashlib
import re

import msgspec
import pytest

from secagg import DecodeError, Identity, Roster, Subject
from secagg.masking import transcript
from secagg.masking.client import keys_payload, survivors_payload
from secagg.masking.messages import Confirmation
from secagg.masking.transcript import NO_RECORD, Closing, examine, read, record, sign_head, write
from secagg.prg import Label
from tests.secagg.simulation import Party, Round, changed

# Rounds 1 and 4 were lost. What drops out where is in every set at least once.
ROUNDS = {0: {}, 2: {3: "ShareKeys"}, 3: {1: "MaskedInput"}, 5: {0: "ConsistencyCheck"}, 6: {}}
EVERYONE = ("site000", "site001", "site002", "site003")
OTHER = b"\x07" * 32


class History:
    """A study that was played honestly, and what is left of it."""

    def __init__(self, rounds=ROUNDS, *, n=4, threshold=3, mode="active", context=bytes(32), dimension=5):
        self.party = Party(n, threshold=threshold, mode=mode, dimension=dimension)
        self.party.session = msgspec.structs.replace(self.party.session, context=context)
        self.context, self.roster, self.records = context, self.party.session.params.roster, []
        for number, drop in rounds.items():
            self.records.append(self.sum(number, drop))
        self.end = self.signed_end(self.head)

    @property
    def head(self):
        return self.records[-1].digest if self.records else NO_RECORD

    @property
    def entries(self):
        return [*self.records, self.end]

    def sum(self, number, drop=None, previous=None):
        party = self.party.at(number)
        model = hashlib.sha256(b"model %d" % number).digest()
        previous = self.head if previous is None else previous
        party.subject = Subject("train", model, previous, party.subject.dimension, 20)
        return record(Round(party).play(drop=drop).server)

    def signed_end(self, head, signers=None):
        signers = self.party.identity if signers is None else signers
        return Closing(self.context, head, {u: self.sign_end(u, head) for u in signers})

    def sign_end(self, u, head):
        return sign_head(self.party.identity[u], self.context, head)


@pytest.fixture(scope="module")
def history():
    return History()


@pytest.fixture(scope="module")
def other():
    """Another study of the same sites."""
    return History(context=b"\x01" * 32)


def problems(entries, roster):
    return examine(write(entries), roster).problems


def replaced(entries, i, **changes):
    """The entries with some fields of one changed."""
    return [*entries[:i], changed(entries[i], **changes), *entries[i + 1 :]]


def without(by_number, u):
    return {v: each for v, each in by_number.items() if v != u}


def in_order(by_number):
    return dict(sorted(by_number.items()))


def swapped(by_number, u, v):
    return by_number | {u: by_number[v], v: by_number[u]}


def test_an_honest_transcript_holds(history):
    data = write(history.entries)
    found = examine(data, history.roster)
    assert found.problems == ()
    assert list(found.records) == history.records
    assert found.closing == history.end
    assert write(read(data)) == data


def test_a_record_has_what_was_signed_and_the_digest_of_the_sum():
    history = History({4: {3: "ShareKeys"}}, n=5, threshold=4)
    (made,) = history.records
    assert (made.threshold, made.mode, made.context, made.round) == (4, "active", bytes(32), 4)
    assert (set(made.directory), set(made.commitments)) == (set(range(5)), {0, 1, 2, 4})
    assert (made.survivors, set(made.confirmations)) == ((0, 1, 2, 4), {0, 1, 2, 4})
    game = Round(History({}, n=5, threshold=4).party)
    total = sum(game.vectors[u].astype(object) for u in made.survivors) % 2**20
    packed = made.subject.ring.pack(total.astype(made.subject.ring.dtype))
    assert made.sum_digest == hashlib.sha256(packed).digest()


def test_it_holds_with_as_few_signatures_as_the_threshold(history):
    end = history.signed_end(history.head, (0, 2, 3))
    assert problems([*history.records, end], history.roster) == ()


# --- what is changed is named


def edit(i, **changes):
    return lambda history, other: replaced(history.entries, i, **changes)


def edit_subject(i, **changes):
    return lambda history, other: replaced(history.entries, i, subject=changed(history.records[i].subject, **changes))


def edit_entry(i, field, u, **changes):
    """One participant's part of a record's field changed."""

    def tampering(history, other):
        parts = getattr(history.records[i], field)
        return replaced(history.entries, i, **{field: {**parts, u: changed(parts[u], **changes)}})

    return tampering


def swap(i, field, u, v):
    return lambda h, _: replaced(h.entries, i, **{field: swapped(getattr(h.entries[i], field), u, v)})


def leave_out(i, field, u):
    return lambda h, _: replaced(h.entries, i, **{field: without(getattr(h.entries[i], field), u)})


def reorder(*order):
    """The entries of the places given."""
    return lambda history, other: [history.entries[i] for i in order]


def another_subject_everywhere(history, other):
    made = history.records[1]
    subject = changed(made.subject, model_digest=OTHER)
    confirmations = {u: changed(c, subject=subject) for u, c in made.confirmations.items()}
    return replaced(history.entries, 1, subject=subject, confirmations=confirmations)


def a_number_twice_in_the_survivors(history, other):
    return replaced(history.entries, 0, survivors=(0, 1, 2, 3, 3))


def an_advertiser_off_the_roster(history, other):
    made = history.records[0]
    return replaced(history.entries, 0, directory={**made.directory, 9: other.records[0].directory[0]})


def an_advertiser_of_another_study(history, other):
    """The entry of one that had advertised and not shared: nothing but the chain says how it was."""
    made = history.records[1]
    return replaced(history.entries, 1, directory={**made.directory, 3: other.records[1].directory[3]})


def one_who_confirmed_and_is_no_survivor(history, other):
    made, another = history.records[2], history.records[0]
    return replaced(history.entries, 2, confirmations=in_order(made.confirmations | {1: another.confirmations[1]}))


def one_who_shared_and_advertised_nothing(history, other):
    made = history.records[0]
    return replaced(history.entries, 0, directory=without(made.directory, 2))


def a_survivor_who_shared_nothing(history, other):
    return replaced(history.entries, 1, survivors=(0, 1, 2, 3))


def a_record_of_another_study(history, other):
    return [*history.records[:2], other.records[2], *history.entries[3:]]


def a_record_more_at_the_end(history, other):
    """With all signatures: of a round that was played, and that was not on record when the end was signed."""
    return [*history.records, history.sum(7), history.end]


def a_record_more_on_the_way(history, other):
    return [*history.records[:1], history.sum(1, previous=history.records[0].digest), *history.entries[1:]]


def an_unsigned_record_at_the_end(history, other):
    made = changed(history.records[-1], round=7, directory={}, commitments={}, confirmations={})
    subject = changed(made.subject, previous=history.head)
    return [*history.records, changed(made, subject=subject), history.end]


def the_first_record_of_a_study_in_the_middle(history, other):
    return [*history.records, history.sum(7, previous=NO_RECORD), history.end]


def the_end_of_another_study(history, other):
    return [*history.records, other.end]


def an_end_for_the_records_of_two_studies(history, other):
    """As a server and all sites could make it together: that the records are of two studies is told all the same."""
    added = other.sum(7, previous=history.head)
    return [*history.records, added, history.signed_end(added.digest)]


def an_end_with_a_signature_off_the_roster(history, other):
    return replaced(history.entries, 5, signatures={**history.end.signatures, 4: history.end.signatures[3]})


def an_end_signed_by_a_stranger(history, other):
    signature = sign_head(Identity(b"\x55" * 32), history.context, history.head)
    return replaced(history.entries, 5, signatures={**history.end.signatures, 2: signature})


def an_end_signed_by_two(history, other):
    return [*history.records, history.signed_end(history.head, (0, 1))]


def a_second_end(history, other):
    return [*history.entries, history.signed_end(history.records[-2].digest)]


TAMPERINGS = {
    "the sum's digest, in the middle": (
        edit(1, sum_digest=OTHER),
        "round 3: its participants were shown another record before it than those in this transcript: that of round 2 "
        "was changed, or records behind it left out",
    ),
    "the sum's digest, in the last record": (
        edit(4, sum_digest=OTHER),
        "the end: the record of round 6 is not the one whose digest was signed: it was changed, or records behind it",
    ),
    "a survivor less": (
        edit(0, survivors=(0, 1, 2)),
        "round 0: nobody's signature fits the survivors site000, site001, site002 and what was summed: other survivors "
        "were signed, or something else",
    ),
    "a survivor more": (a_survivor_who_shared_nothing, "round 2: site003 among the survivors but not in those who sh"),
    "survivors out of order": (edit(0, survivors=(1, 0, 2, 3)), "round 0: the survivors are not in ascending order"),
    "a survivor twice": (a_number_twice_in_the_survivors, "round 0: the survivors are not in ascending order, or one"),
    "a higher threshold": (edit(0, threshold=4), f"round 0: {', '.join(EVERYONE)} made keys for threshold 3, the reco"),
    "a higher threshold, seen from the next record": (
        edit(0, threshold=4),
        "round 2: has threshold 3, and round 0 before it 4",
    ),
    "a lower threshold": (
        edit(0, threshold=2),
        "round 0: the parameters are none that this roster can have had: the threshold of 4 participants in active "
        "mode must be 3 to 4, got 2",
    ),
    "the mode": (edit(3, mode="semi-honest"), "round 5: it says semi-honest, where nothing is signed, and holds sign"),
    "the suite": (edit(0, suite="ROT13"), "round 0: the parameters are none that this roster can have had: expected s"),
    "the study": (
        edit(1, context=OTHER),
        "round 2: site000, site001, site002, site003 made keys for study 0000000000000000, the record has 0707",
    ),
    "the study, against the record before": (
        edit(1, context=OTHER),
        "round 2: belongs to another study than round 0 before it: this to study 0707070707070707, that to 00000000000",
    ),
    "the number of the round": (edit(1, round=1), "round 1: site000, site001, site002, site003 made keys for round 2,"),
    "the purpose": (
        edit_subject(0, purpose="standardize"),
        "round 0: site000, site001, site002, site003 confirmed something else: the record has purpose ",
    ),
    "the model": (edit_subject(1, model_digest=OTHER), "confirmed something else: the record has model 0707070707070"),
    "the dimension": (edit_subject(0, dimension=6), "the record has dimension 6 where 5 was expected"),
    "the ring": (edit_subject(0, ring_bits=21), "the record has bits of the ring 21 where 20 was expected"),
    "the record before": (edit_subject(2, previous=OTHER), "the record has record of the sum before 0707070707070707"),
    "the model, also where the sites say it": (another_subject_everywhere, "round 2: nobody's signature fits the surv"),
    "the model, where one site says it": (
        lambda h, _: edit_entry(0, "confirmations", 2, subject=changed(h.records[0].subject, model_digest=OTHER))(h, _),
        "round 0: site002 did not sign these survivors and this subject",
    ),
    "a channel key": (
        edit_entry(0, "directory", 1, channel_key=OTHER),
        "round 0: the keys of site001 are not signed under this roster",
    ),
    "a mask key": (
        edit_entry(0, "directory", 1, mask_key=OTHER),
        "round 0: the keys of site001 are not signed under this roster",
    ),
    "two sites' keys swapped": (swap(0, "directory", 1, 2), "round 0: the keys of site001, site002 are not signed und"),
    "a commitment": (
        edit_entry(2, "commitments", 3, digest=OTHER),
        "round 3: the commitments of site003 are not signed by them for this session",
    ),
    "two commitments swapped": (swap(0, "commitments", 0, 3), "round 0: the commitments of site000, site003 are not"),
    "two confirmations swapped": (swap(0, "confirmations", 0, 1), "round 0: site000, site001 did not sign these surv"),
    "keys left out": (one_who_shared_and_advertised_nothing, "round 0: site002 among those who shared them but not in"),
    "keys of one who shared none left out": (
        leave_out(1, "directory", 3),
        "round 3: its participants were shown another record before it than those in this transcript: that of round 2",
    ),
    "keys of one who shared none, of another study": (
        an_advertiser_of_another_study,
        "round 2: site003 made keys for study 0101010101010101, the record has 0000000000000000",
    ),
    "keys off the roster": (an_advertiser_off_the_roster, "round 0: #9 among those who advertised keys but not in the"),
    "a confirmation left out": (
        leave_out(0, "confirmations", 3),
        "round 2: its participants were shown another record before it than those in this transcript: that of round 0",
    ),
    "confirmations left out below the threshold": (
        leave_out(1, "confirmations", 2),
        "round 2: those who confirmed are 2, and the threshold is 3",
    ),
    "a confirmation of another round": (
        one_who_confirmed_and_is_no_survivor,
        "round 3: site001 among those who confirmed but not in the survivors",
    ),
    "the first record left out": (
        reorder(1, 2, 3, 4, 5),
        "round 2: its participants were shown a record before it, and here it is the first: records before it we",
    ),
    "a record left out": (
        reorder(0, 2, 3, 4, 5),
        "round 3: its participants were shown another record before it than those in this transcript: that of round 0 "
        "was changed, or records behind it left out",
    ),
    "the last record left out": (
        reorder(0, 1, 2, 3, 5),
        "the end: the record of round 5 is not the one whose digest was signed: it was changed, or records behind it",
    ),
    "two records swapped": (reorder(0, 2, 1, 3, 4, 5), "round 2: comes after round 3: it was moved, or comes twice"),
    "a record twice": (
        reorder(0, 1, 1, 2, 3, 4, 5),
        "round 2: its participants were shown the record of round 0 before it, and here round 2 is: records were "
        "moved, or that of round 2 added",
    ),
    "a record twice, by its number": (
        reorder(0, 1, 1, 2, 3, 4, 5),
        "round 2: comes after round 2: it was moved, or comes twice",
    ),
    "a record of another study": (
        a_record_of_another_study,
        "round 3: belongs to another study than round 2 before it: this to study 0101010101010101, that to 00000000000",
    ),
    "a record added on the way": (
        a_record_more_on_the_way,
        "round 2: its participants were shown the record of round 0 before it, and here round 1 is: records were "
        "moved, or that of round 1 added",
    ),
    "a record added at the end": (
        a_record_more_at_the_end,
        "the end: it was signed behind the record of round 6, and stands behind that of round 7",
    ),
    "an unsigned record added": (
        an_unsigned_record_at_the_end,
        "round 7: those who advertised keys are 0, and the threshold is 3",
    ),
    "the beginning of another run": (
        the_first_record_of_a_study_in_the_middle,
        "round 7: its participants were shown no record before it, and here round 6 is: records before it were added",
    ),
    "the end left out": (
        reorder(0, 1, 2, 3, 4),
        "the end: it is missing: the transcript was cut short, or its study never came to an end",
    ),
    "the end moved": (reorder(0, 1, 2, 5, 3, 4), "the end: the record of round 5 follows behind it, and nothing may"),
    "a second end": (a_second_end, "the end: another end follows behind it, and nothing may"),
    "nothing but an end": (reorder(5), "the end: there is no record before it"),
    "the end of another study": (
        the_end_of_another_study,
        "the end: it belongs to another study than the records: it to study 0101010101010101, they to 0000000000000000",
    ),
    "records of two studies": (an_end_for_the_records_of_two_studies, "round 7: belongs to another study than round "),
    "the head that was signed": (edit(5, head=OTHER), "the end: the signature of site001 does not fit"),
    "two signatures at the end swapped": (swap(5, "signatures", 0, 2), "the end: the signature of site000 does not f"),
    "a stranger's signature at the end": (an_end_signed_by_a_stranger, "the end: the signature of site002 does not f"),
    "a signature off the roster": (an_end_with_a_signature_off_the_roster, "the end: #4 is not on the roster"),
    "too few signatures at the end": (an_end_signed_by_two, "the end: 2 participants signed it, and the threshold is"),
}


@pytest.mark.parametrize("name", TAMPERINGS)
def test_a_tampering_is_named(history, other, name):
    tamper, says = TAMPERINGS[name]
    told = problems(tamper(history, other), history.roster)
    assert any(says in problem for problem in told), told


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("a higher threshold", 3),
        ("the number of the round", 2),
        ("the study", 4),
        ("the sum's digest, in the middle", 1),
        ("the suite", 2),
        ("two sites' keys swapped", 2),
        ("a record left out", 1),
        ("a record added on the way", 1),
        ("the end moved", 2),
    ],
)
def test_a_tampering_is_not_told_of_everything_that_hangs_on_it(history, other, name, count):
    """A sentence for the change and one for each place it shows at, and not one for each signature."""
    told = problems(TAMPERINGS[name][0](history, other), history.roster)
    assert len(told) == count, told


def test_every_changed_byte_is_noticed(monkeypatch):
    assert_flips_are_noticed(monkeypatch, [1])


@pytest.mark.slow
def test_every_changed_bit_is_noticed(monkeypatch):
    assert_flips_are_noticed(monkeypatch, [1 << bit for bit in range(8)])


def assert_flips_are_noticed(monkeypatch, masks):
    history = History({0: {}, 1: {3: "ShareKeys"}})
    data, known, real = write(history.entries), {}, transcript.verify
    monkeypatch.setattr(
        transcript, "verify", lambda *args: known[args] if args in known else known.setdefault(args, real(*args))
    )
    assert examine(data, history.roster).problems == ()
    for at in range(len(data)):
        for mask in masks:
            flipped = data[:at] + bytes([data[at] ^ mask]) + data[at + 1 :]
            with contextlib.suppress(DecodeError):
                assert examine(flipped, history.roster).problems, (at, mask)


def test_wherever_it_is_cut_off_that_is_noticed():
    history = History({0: {}})
    data = write(history.entries)
    borders = {len(write(history.entries[:i])) for i in range(len(history.entries))}
    for length in range(len(data)):
        if length in borders:
            assert any("the end: it is missing" in p for p in examine(data[:length], history.roster).problems)
        else:
            with pytest.raises(DecodeError, match=r"^entry \d of the transcript, at byte \d+: cut off: "):
                read(data[:length])


def test_an_empty_transcript_says_so(history):
    found = examine(b"", history.roster)
    assert found == transcript.Findings((), None, found.problems)
    assert found.problems[0] == "the transcript is empty"
    assert found.problems[1].startswith("the end: it is missing")


def test_a_semi_honest_session_has_nothing_to_check():
    history = History({0: {}}, mode="semi-honest")
    (told,) = problems(history.entries, history.roster)
    assert told == "round 0: the session was semi-honest: nothing in it is signed, so there is nothing to check"


def test_a_record_that_says_semi_honest_may_hold_no_signature_at_all():
    made = History({0: {}}).records[0]
    unsigned = {u: changed(ad, signature=b"") for u, ad in made.directory.items()}
    for changes in ({"confirmations": {}}, {"directory": unsigned}):
        (told, _, *_) = problems([changed(made, mode="semi-honest", **changes)], Party(4).session.params.roster)
        assert told.endswith("and holds signatures: the mode was changed")


def test_what_is_wrong_without_an_end_is_told_as_well(history):
    told = problems(history.records[1:], history.roster)
    assert [each.partition(":")[0] for each in told] == ["round 2", "the end"]


@pytest.mark.parametrize(
    "changes",
    [{"suite": "A" * 65}, {"survivors": (0,) * 65537}, {"survivors": (1 << 16,)}],
    ids=["suite", "many", "big"],
)
def test_what_no_record_can_have_is_no_record(history, changes):
    with pytest.raises(DecodeError, match="entry 0 of the transcript"):
        read(write([changed(history.records[0], **changes)]))


def test_bytes_behind_the_end_are_noticed(history):
    with pytest.raises(DecodeError, match="entry 6 of the transcript"):
        examine(write(history.entries) + b"\0", history.roster)


# --- under another roster


def roster_of(history, **changes):
    members = {m.name: m.identity for m in history.roster.members} | changes
    return Roster.of({name: key for name, key in members.items() if key is not None})


STRANGER = Identity(b"\x55" * 32).public


def test_a_site_with_another_key_is_named(history):
    told = problems(history.entries, roster_of(history, site002=STRANGER))
    assert told[0].startswith(
        "round 0: the keys of site002 are not signed under this roster: they were changed, or the"
    )
    others = "site000, site001, site003 made keys for another roster than this one: it has another name or key"
    assert told[1] == f"round 0: {others}"
    assert "round 0: the commitments of site002 are not signed by them for this session" in told
    assert "round 0: site002 did not sign these survivors and this subject" in told
    assert told[-1] == "the end: the signature of site002 does not fit"


def test_a_site_of_another_name_is_noticed(history):
    key = history.roster.members[3].identity
    told = problems(history.entries, roster_of(history, site003=None, site009=key))
    assert len(told) == len(ROUNDS)  # and nothing else: the keys and their order are the same
    assert all("made keys for another roster than this one: it has another name or key" in each for each in told)


def test_a_site_more_or_less_on_the_roster_is_noticed(history):
    fewer = problems(history.entries, roster_of(history, site003=None))
    assert "round 0: #3 among those who advertised keys but not in the roster" in fewer
    more = problems(history.entries, roster_of(history, site004=STRANGER))
    assert more[0].startswith("round 0: the parameters are none that this roster can have had: the threshold of 5")


# --- what sites that help the server sign


def colluding(history, **changes):
    """The last record with these fields, and an end to it that all sites have signed."""
    made = changed(history.records[-1], **changes)
    return [*history.records[:-1], made, history.signed_end(made.digest)]


def keys_of(history, u, terms=None, **keys):
    """The last record's keys of a site, changed, with the site's true signature."""
    ad = changed(history.records[-1].directory[u], **keys)
    terms = terms or ad.terms
    payload = keys_payload(u, ad.channel_key, ad.mask_key)
    signature = history.party.identity[u].sign(Label.SIGN_KEYS, terms.session_id, payload)
    return {**history.records[-1].directory, u: changed(ad, terms=terms, signature=signature)}


def test_a_copied_key_is_named(history):
    theirs = history.records[-1].directory[0].mask_key
    told = problems(colluding(history, directory=keys_of(history, 2, channel_key=theirs)), history.roster)
    assert told == ("round 6: a public key comes twice, at site000, site002",)


def test_one_key_for_both_uses_is_named(history):
    theirs = history.records[-1].directory[1].mask_key
    told = problems(colluding(history, directory=keys_of(history, 1, channel_key=theirs)), history.roster)
    assert told == ("round 6: a public key comes twice, at site001",)


def test_keys_that_were_signed_for_something_else_are_named_one_by_one(history):
    terms = history.records[-1].directory[3].terms
    for changes, says in (
        ({"round": 5}, "round 5, the record has 6"),
        ({"context": OTHER}, "study 0707070707070707, the record has 0000000000000000"),
        ({"params": OTHER}, "another roster than this one: it has another name or key"),
        (
            {"round": 5, "context": OTHER},
            "study 0707070707070707, the record has 0000000000000000; for round 5, the re",
        ),
    ):
        made = colluding(history, directory=keys_of(history, 3, changed(terms, **changes)))
        (told,) = problems(made, history.roster)
        assert told.startswith(f"round 6: site003 made keys for {says}")


def test_a_confirmation_of_something_else_is_named(history):
    made = history.records[-1]
    subject = changed(made.subject, model_digest=OTHER)
    sid = made.directory[0].terms.session_id
    payload = survivors_payload(made.survivors)
    signature = history.party.identity[3].sign(Label.SIGN_SURVIVORS, subject.sum_id(sid), payload)
    confirmations = {**made.confirmations, 3: Confirmation(subject, signature)}
    (told,) = problems(colluding(history, confirmations=confirmations), history.roster)
    assert re.fullmatch(
        r"round 6: site003 confirmed something else: the record has model [0-9a-f]{16} where (07){8} was expected",
        told,
    )


def test_another_signature_of_one_site_under_the_same_keys_shows_in_the_next_record(history):
    """The keys of a site that helps are replaced after the round; everything in the record fits."""
    made = history.records[0]
    ad = changed(made.directory[2], mask_key=OTHER)
    payload = keys_payload(2, ad.channel_key, ad.mask_key)
    signature = history.party.identity[2].sign(Label.SIGN_KEYS, ad.terms.session_id, payload)
    directory = {**made.directory, 2: changed(ad, signature=signature)}
    (told,) = problems(replaced(history.entries, 0, directory=directory), history.roster)
    assert told.startswith("round 2: its participants were shown another record before it")


# --- what it cannot show, as the module says


def test_signatures_that_the_end_does_not_need_can_be_left_out(history):
    assert problems([*history.records, history.signed_end(history.head, (0, 1, 2))], history.roster) == ()


def test_an_end_that_the_sites_were_shown_too_early_holds(history):
    shown = history.records[2].digest
    assert problems([*history.records[:3], history.signed_end(shown)], history.roster) == ()


def test_the_digest_of_the_sum_is_the_servers_word():
    history = History({0: {}, 1: {}})
    history.records[-1] = changed(history.records[-1], sum_digest=OTHER)
    history.records.append(history.sum(2))
    history.end = history.signed_end(history.head)
    assert problems(history.entries, history.roster) == ()


# --- bounds


def test_a_forgery_of_many_records_is_not_examined_to_its_end(history):
    made = changed(history.records[0], directory={}, commitments={}, survivors=(), confirmations={})
    found = examine(write([made] * 1000), history.roster)
    assert len(found.problems) < 110
    assert found.problems[-1] == "round 0: so much is wrong up to here that nothing behind it was examined"
    assert len(found.records) < 30


def test_what_follows_on_the_end_is_not_examined(history):
    found = examine(write([*history.entries, *[history.end] * 1000]), history.roster)
    assert found.problems == ("the end: another end follows behind it, and nothing may",)


def test_numbers_that_no_roster_can_have_are_not_all_told(history):
    ad = history.records[0].directory[0]
    made = changed(history.records[0], directory=dict.fromkeys(range(5000), ad))
    told = problems([made], history.roster)
    assert "round 0: #4, #5, #6, #7 and 4992 more among those who advertised keys but not in the roster" in told
    assert max(map(len, told)) < 300


def test_garbage_is_no_transcript(history):
    for data in (b"\0", b"garbage", bytes(100), b"\xff" * 100, b"PK\x03\x04" + bytes(100), b"\0\0\0\1\1"):
        with pytest.raises(DecodeError, match=r"^entry 0 of the transcript, at byte 0: "):
            examine(data, history.roster)

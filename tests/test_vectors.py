"""The test vectors: as the library writes them, as a second implementation computes them, and as parties take them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import secagg
from secagg import Session, keys, wire
from secagg.masking import client, messages, transcript
from secagg.prg import Label
from secagg.wire import decode
from tests.vectors import generate, verify

FOLDER = Path(__file__).parent / "vectors" / "masking"
DOCUMENTS = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(FOLDER.glob("*.json"))}
ROUNDS = [name for name, document in DOCUMENTS.items() if document["kind"] == "round"]
SEQUENCES = [name for name, document in DOCUMENTS.items() if document["kind"] == "sequence"]
REFUSALS = [name for name, document in DOCUMENTS.items() if document["kind"] == "refusal"]
LATE, AHEAD = "active_n4_drop_at_masked_input", "keys_agreed_ahead"
# Of the refusals, those for another model, and the digest that is not ours.
OTHER_MODELS = ("bad_other_model", "bad_other_model_confirmed", "bad_confirmation_of_another_subject")
LATE_MESSAGES = [name for name in REFUSALS if name.endswith("_of_the_round_before")]

# Runs a script with some imports made impossible: the script's path, the names, its arguments.
WITHOUT = """
import runpy, sys
from importlib.abc import MetaPathFinder

class Blocker(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in blocked:
            raise ImportError(f"{name} must not be imported here")

script, blocked, sys.argv = sys.argv[1], sys.argv[2].split(","), sys.argv[1:2] + sys.argv[3:]
assert not set(blocked) & sys.modules.keys()
sys.meta_path.insert(0, Blocker())
runpy.run_path(script, run_name="__main__")
"""


def run_without(blocked: str, script: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-I", "-c", WITHOUT, str(script), blocked, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def edit(document, path, change):
    """Apply `change` to the value at a path such as `pairs.0.low`."""
    *parents, last = [int(key) if key.isdigit() else key for key in path.split(".")]
    for key in parents:
        document = document[key if isinstance(document, list) else str(key)]
    key = last if isinstance(document, list) else str(last)
    document[key] = change(document[key])


def flip(text: str) -> str:
    """The hexadecimal digit in the middle with one bit changed."""
    at = len(text) // 2
    return f"{text[:at]}{int(text[at], 16) ^ 1:x}{text[at + 1 :]}"


def written(folder: Path, name: str, path: str, change) -> Path:
    """A copy of the vectors in which one value is changed; where the changed file is."""
    for other, document in DOCUMENTS.items():
        (folder / f"{other}.json").write_text(json.dumps(document), encoding="utf-8")
    document = json.loads(json.dumps(DOCUMENTS[name]))
    edit(document, path, change)
    assert document != DOCUMENTS[name]
    (folder / f"{name}.json").write_text(json.dumps(document), encoding="utf-8")
    return folder / f"{name}.json"


@pytest.fixture(scope="module")
def games():
    return {name: generate.replay(DOCUMENTS[name]) for name in ROUNDS}


def test_the_files_are_what_the_generator_writes(capsys):
    assert generate.main(["--check"]) == 0
    assert capsys.readouterr().out == ""


def test_the_generator_names_files_that_would_change(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(generate, "FOLDER", tmp_path)
    assert generate.main([]) == 0
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {
        path.name: path.read_bytes() for path in FOLDER.iterdir()
    }
    capsys.readouterr()
    (tmp_path / "active_n3.json").write_text("{}\n", encoding="utf-8")
    (tmp_path / "bad_map_order.json").unlink()
    (tmp_path / "of_old.json").write_text("{}\n", encoding="utf-8")
    assert generate.main(["--check"]) == 1
    assert [line.partition(":")[0] for line in capsys.readouterr().out.splitlines()] == [
        "active_n3.json",
        "bad_map_order.json",
        "of_old.json",
    ]
    assert generate.main([]) == 0
    assert generate.main(["--check"]) == 0


def test_a_second_implementation_agrees_without_the_library():
    result = run_without("secagg,dp,protocols,tests,numpy,msgspec,cryptography", Path(verify.__file__))
    assert (result.returncode, result.stderr) == (0, "")
    assert [line.partition(":")[0] for line in result.stdout.splitlines()] == [f"{name}.json" for name in DOCUMENTS]


@pytest.mark.parametrize("blocked", ["secagg", "numpy", "msgspec", "cryptography"])
def test_the_import_blocker_blocks(blocked):
    result = run_without(blocked, Path(generate.__file__), "--check")
    assert result.returncode == 1
    assert "must not be imported here" in result.stderr


def test_the_verifier_stops_at_the_first_mismatch_and_says_where(tmp_path):
    changed = written(tmp_path, LATE, "pairs.2.pairwise_key", flip)
    files = [str(tmp_path / "active_n3.json"), str(changed), str(tmp_path / "ring_36_bits.json")]
    result = subprocess.run([sys.executable, verify.__file__, *files], capture_output=True, text=True, check=False)
    first, second = result.stdout.splitlines()
    assert result.returncode == 1
    assert first == "active_n3.json: round of 3, sum of 3 vectors"
    assert second.startswith(f"{LATE}.json: pairs.2.pairwise_key: the file says ")


@pytest.mark.parametrize("name", ROUNDS)
def test_the_library_says_every_byte_again_from_the_recorded_randomness(name, games):
    game, document = games[name], DOCUMENTS[name]
    said = {
        (stage["stage"], int(u)): bytes.fromhex(message)
        for stage in document["stages"]
        for u, message in stage["participant_to_server"].items()
    }
    stages = [stage["stage"] for stage in document["stages"]]
    asked = {
        (following, int(u)): bytes.fromhex(message)
        for stage, following in zip(document["stages"], [*stages[1:], None], strict=True)
        for u, message in stage["server_to_participant"].items()
    }
    assert game.answers == said
    assert game.asked == asked
    assert game.opened.total.tolist() == document["sum"]
    assert sorted(game.opened.survivors) == game.sets["MaskedInput"]
    assert game.opened.suspects == frozenset()
    assert game.session.id.hex() == document["session"]["id"]
    assert game.session.params.digest.hex() == document["session"]["params_digest"]
    assert game.subject.sum_id(game.session.id).hex() == document["subject"]["sum_id"]
    shared = [int(u) for u in document["stages"][1]["participant_to_server"]]
    assert client.mask_id(game.subject.sum_id(game.session.id), shared).hex() == document["mask_id"]


@pytest.mark.parametrize("name", SEQUENCES)
def test_keys_are_agreed_ahead_from_one_source_of_randomness(name):
    document = DOCUMENTS[name]
    rounds = [DOCUMENTS[file.removesuffix(".json")] for file in document["rounds"]]
    shared = [generate.Recorded([bytes.fromhex(call) for call in calls]) for calls in document["entropy"]]
    games = [generate.unplayed(of, shared) for of in rounds]
    for of, stage in document["order"]:
        if stage == "MaskedInput":
            # Until here the later round was played without its subject.
            assert not hasattr(games[of], "subject")
            games[of].begin(generate.subject_of(rounds[of]), [part["vector"] for part in rounds[of]["participants"]])
        games[of].play(stage)
    assert not any(entropy.left for entropy in shared)
    for game, of in zip(games, rounds, strict=True):
        assert game.opened.total.tolist() == of["sum"]
        assert game.answers == generate.replay(of).answers
    findings = transcript.examine(bytes.fromhex(document["transcript"]), games[0].session.params.roster)
    assert findings.problems == ()
    assert [entry.subject for entry in findings.records] == [game.subject for game in games]
    assert findings.records[0].digest == games[1].subject.previous
    digest = generate.packed_sum_digest(games[0])
    assert digest == games[1].subject.model_digest
    assert [game.session.round for game in games] == [0, 1]
    assert document["order"].index([1, "ShareKeys"]) < document["order"].index([0, "MaskedInput"])


@pytest.mark.parametrize("name", ROUNDS)
def test_the_sum_is_that_of_the_vectors_that_arrived(name):
    document = DOCUMENTS[name]
    arrived = next(s for s in document["stages"] if s["stage"] == "MaskedInput")["participant_to_server"]
    columns = zip(*(document["participants"][int(u)]["vector"] for u in arrived), strict=True)
    sums, modulus = [sum(column) for column in columns], 1 << document["subject"]["ring_bits"]
    assert document["sum"] == [value % modulus for value in sums]
    assert sums[0] > modulus, "nothing wraps"


@pytest.mark.parametrize("name", REFUSALS)
def test_the_named_party_refuses(name, games):
    document = DOCUMENTS[name]
    game = games[document["round"].removesuffix(".json")]
    function, party, sender = document["function"], document["party"], document["sender"]
    assert generate.FUNCTIONS[function][1].__name__ == document["message_type"]
    with pytest.raises(getattr(secagg, document["error"])) as caught:
        game.feed(function, party, sender, bytes.fromhex(document["message"]))
    assert type(caught.value).__name__ == document["error"]
    assert document["error_contains"] in str(caught.value)
    assert getattr(caught.value, "culprits", frozenset()) == frozenset(document["culprits"])


@pytest.mark.parametrize("name", REFUSALS)
def test_the_named_party_takes_the_round_s_own_message(name, games):
    document = DOCUMENTS[name]
    game = games[document["round"].removesuffix(".json")]
    function, party, sender = document["function"], document["party"], document["sender"]
    stage, _ = generate.FUNCTIONS[function]
    original = game.answers[stage, sender] if party == "server" else game.asked[stage, party]
    assert original.hex() != document["message"]
    game.feed(function, party, sender, original)


def test_the_signature_of_another_session_is_one(games):
    document = DOCUMENTS["bad_signature_of_another_session"]
    game = games[document["round"].removesuffix(".json")]
    other = Session(game.session.params, game.session.context, game.session.round + 1)
    entry = decode(bytes.fromhex(document["message"]), messages.KeyDirectory).advertisements[0]
    payload = client.keys_payload(0, entry.channel_key, entry.mask_key)
    assert keys.verify(game.identities[0].public, entry.signature, Label.SIGN_KEYS, other.id, payload)


@pytest.mark.parametrize("name", OTHER_MODELS)
def test_a_refusal_for_another_model_names_both_digests(name, games):
    document = DOCUMENTS[name]
    game = games[document["round"].removesuffix(".json")]
    message = decode(bytes.fromhex(document["message"]), generate.FUNCTIONS[document["function"]][1])
    theirs = message.confirmations[3].subject if hasattr(message, "confirmations") else message.subject
    ours = game.subject.model_digest.hex()[:16]
    assert f"model {theirs.model_digest.hex()[:16]} where {ours} was expected" in document["error_contains"]


def test_a_confirmation_of_another_subject_is_rightly_signed_for_that(games):
    document = DOCUMENTS["bad_confirmation_of_another_subject"]
    game = games[document["round"].removesuffix(".json")]
    theirs = decode(bytes.fromhex(document["message"]), messages.ConfirmationSet).confirmations[3]
    payload = client.survivors_payload(tuple(game.sets["MaskedInput"]))
    public, label, sid = game.identities[3].public, Label.SIGN_SURVIVORS, game.session.id
    assert keys.verify(public, theirs.signature, label, theirs.subject.sum_id(sid), payload)
    assert not keys.verify(public, theirs.signature, label, game.subject.sum_id(sid), payload)


@pytest.mark.parametrize("name", LATE_MESSAGES)
def test_a_late_message_has_nothing_wrong_but_its_round(name, games):
    document = DOCUMENTS[name]
    before, game = games[f"{AHEAD}_0"], games[document["round"].removesuffix(".json")]
    stage, kind = generate.FUNCTIONS[document["function"]]
    late, right = (decode(data, kind) for data in (bytes.fromhex(document["message"]), game.answers[stage, 0]))
    assert (late.terms, right.terms) == (before.session.terms, game.session.terms)
    assert late.terms != right.terms
    told = f"round {before.session.round} where {game.session.round} was expected"
    assert document["error_contains"] == f"site-0 sent a message of another session: {told}"
    match late:
        case messages.MaskedInput():
            assert late.subject == game.subject
            assert len(late.packed) == len(right.packed)
        case messages.UnmaskShares():
            assert late.of_self_mask_seed.keys() == right.of_self_mask_seed.keys()
            assert late.of_mask_secret.keys() == right.of_mask_secret.keys()
        case _:
            assert wire.encode(late) == before.answers[stage, 0]


def test_recorded_randomness_answers_the_recorded_calls_only():
    with pytest.raises(ValueError, match="a call for 16 bytes was not recorded"):
        generate.Recorded([bytes(32)])(16)
    document = json.loads(json.dumps(DOCUMENTS["active_n3"]))
    document["participants"][0]["entropy"].append("00" * 32)
    with pytest.raises(ValueError, match="did not use all"):
        generate.replay(document)


PARTICIPANT = (
    "channel_secret",
    "channel_key",
    "mask_secret",
    "mask_key",
    "self_mask_seed",
    "commitment",
    "self_mask_key",
    "self_mask_keystream",
    "shares_of_mask_secret.2",
    "shares_of_self_mask_seed.0",
    "signatures.keys",
    "signatures.commitment",
    "signatures.survivors",
)
PAIR = (
    "channel_agreement",
    "channel_key_low_to_high",
    "channel_key_high_to_low",
    "mask_agreement",
    "pairwise_secret",
    "pairwise_key",
    "pairwise_keystream",
)
COMPUTED = [
    *(f"session.{field}" for field in ("roster.1.identity", "suite", "params_encoding", "params_digest")),
    *("session.encoding", "session.id", "subject.encoding", "subject.sum_id", "mask_id"),
    *(f"participants.1.{field}" for field in PARTICIPANT),
    *(f"pairs.{pair}.{field}" for pair in (0, 5) for field in PAIR),
    *(f"stages.{stage}.participant_to_server.1" for stage in range(5)),
    *(f"stages.{stage}.server_to_participant.3" for stage in range(4)),
]
INPUTS = [
    *("session.roster.0.identity_secret", "session.context", "subject.model_digest", "subject.previous"),
    *(f"participants.{u}.entropy.{call}" for u in (0, 2) for call in range(7)),
]


@pytest.mark.parametrize("path", COMPUTED)
def test_the_verifier_names_a_digit_that_is_wrong(path, tmp_path):
    change = (lambda suite: suite.lower()) if path == "session.suite" else flip
    with pytest.raises(verify.Mismatch, match=rf"^{path}: the file says "):
        verify.verify(written(tmp_path, LATE, path, change))


@pytest.mark.parametrize("path", INPUTS)
def test_the_verifier_notices_another_input(path, tmp_path):
    with pytest.raises(verify.Mismatch):
        verify.verify(written(tmp_path, LATE, path, flip))


@pytest.mark.parametrize(
    "path", ["participants.0.entropy.4", "stages.2.participant_to_server.0", "pairs.2.pairwise_key"]
)
@pytest.mark.parametrize("name", ROUNDS)
def test_the_verifier_notices_a_wrong_digit_in_every_round(name, path, tmp_path):
    with pytest.raises(verify.Mismatch):
        verify.verify(written(tmp_path, name, path, flip))


@pytest.mark.parametrize(
    ("path", "change"),
    [
        ("sum.0", lambda value: value + 1),
        ("participants.0.vector.1", lambda value: value ^ 1),
        ("participants.2.drops_out_at", lambda _: None),
        ("participants.2.drops_out_at", lambda _: "Unmask"),
        ("pairs.1.high", lambda value: value + 1),
        ("session.threshold", lambda value: value + 1),
        ("session.threshold", lambda value: value - 1),
        ("session.round", lambda value: value + 1),
        ("subject.purpose", lambda value: value + "s"),
        ("session.mode", lambda _: "semi-honest"),
        ("session.mode", lambda _: "passive"),
        ("subject.dimension", lambda value: value - 1),
        ("subject.ring_bits", lambda value: value - 1),
        ("session.roster.3.name", lambda value: value + "x"),
        ("session.id", lambda value: value.upper()),
        ("stages.0.participant_to_server.0", lambda value: value.upper()),
        ("stages.0.server_to_participant", lambda sent: {u: sent[u] for u in "012"}),
        ("participants.0", lambda part: {**part, "note": ""}),
        ("participants", lambda parts: parts[:3]),
    ],
)
def test_the_verifier_notices_other_changes_to_a_round(path, change, tmp_path):
    with pytest.raises(verify.Mismatch):
        verify.verify(written(tmp_path, LATE, path, change))


@pytest.mark.parametrize(
    ("name", "path", "change"),
    [
        *((AHEAD, f"entropy.{u}.{call}", flip) for u in (0, 3) for call in range(14)),
        (AHEAD, "transcript", flip),
        (AHEAD, "transcript", lambda text: flip(text[:40]) + text[40:]),
        (AHEAD, "transcript", lambda text: text[:-40] + flip(text[-40:])),
        (AHEAD, "entropy.1", lambda calls: calls[:-1]),
        (AHEAD, "entropy", lambda calls: calls[:3]),
        (AHEAD, "order", lambda order: [*order[:2], *order[4:7], *order[2:4], *order[7:]]),
        (AHEAD, "order", lambda order: order[:-1]),
        (AHEAD, "order", lambda order: [order[2], order[1], order[0], *order[3:]]),
        (AHEAD, "rounds", lambda names: names[::-1]),
        (AHEAD, "rounds", lambda names: names[:1]),
        (AHEAD, "rounds", lambda names: [names[0], "active_n4_drop_at_masked_input.json"]),
        (f"{AHEAD}_0", "sum.1", lambda value: value ^ 1),
        (f"{AHEAD}_0", "subject.previous", flip),
        (f"{AHEAD}_1", "subject.model_digest", flip),
        (f"{AHEAD}_1", "subject.previous", flip),
        (f"{AHEAD}_1", "session.round", lambda value: value + 1),
        (f"{AHEAD}_1", "participants.2.entropy.0", flip),
        (f"{AHEAD}_0", "stages.4.participant_to_server.1", flip),
    ],
)
def test_the_verifier_notices_changes_to_rounds_in_sequence(name, path, change, tmp_path):
    written(tmp_path, name, path, change)
    with pytest.raises(verify.Mismatch):
        verify.verify(tmp_path / f"{AHEAD}.json")


@pytest.mark.parametrize(
    ("name", "path", "change"),
    [
        ("bad_reflected_box", "check", lambda _: "numbers inside"),
        ("bad_reflected_box", "error", lambda _: "DecodeError"),
        ("bad_reflected_box", "changed.0", lambda _: "boxes.2"),
        ("bad_reflected_box", "message_type", lambda _: "KeyDirectory"),
        ("bad_reflected_box", "party", lambda _: 2),
        ("bad_reflected_box", "party", lambda _: "server"),
        ("bad_reflected_box", "round", lambda _: "ring_36_bits.json"),
        ("bad_reflected_box", "round", lambda _: "nowhere.json"),
        ("bad_moved_share", "message", flip),
        ("bad_moved_box", "message", lambda text: text[:-2] + f"{int(text[-2], 16) ^ 1:x}" + text[-1]),
        ("bad_signature_of_another_session_to_server", "message", lambda text: text[:8] + flip(text[8:24]) + text[24:]),
        ("bad_signature_of_another_session_to_server", "culprits", lambda _: []),
        ("bad_directory_swapped_keys", "changed", lambda fields: fields[:1]),
        ("bad_low_order_key", "message", flip),
        ("bad_survivors_not_a_subset", "message", lambda text: text[:-2] + "01"),
        ("bad_padding_bits", "message", lambda text: text[:-2] + "0" + text[-1]),
        ("bad_vector_length", "message", lambda text: text[:-2]),
        ("bad_version_byte", "message", flip),
        ("bad_version_byte", "message", lambda text: "01" + text[2:]),
        ("bad_trailing_byte", "message", flip),
        ("bad_trailing_byte", "message", lambda text: text[:-2]),
        ("bad_cut_short", "message", flip),
        ("bad_map_order", "message", flip),
        ("bad_wide_number", "message", lambda text: text[:-2] + "01"),
        ("bad_share_of_self_mask_seed", "changed", lambda _: ["of_mask_secret.2"]),
        ("bad_unmask_both_kinds", "kind", lambda _: "round"),
        ("bad_unmask_both_kinds", "kind", lambda _: "other"),
        ("bad_unmask_both_kinds", "kind", lambda _: "sequence"),
        ("bad_other_model", "message", flip),
        ("bad_other_model", "message", lambda text: text[:164] + flip(text[164:180]) + text[180:]),
        ("bad_other_model", "changed", lambda fields: fields[:1]),
        ("bad_other_ring", "message", lambda text: text[:-2] + f"{int(text[-2], 16) ^ 1:x}" + text[-1]),
        ("bad_other_model_confirmed", "message", lambda text: text[:-1] + f"{int(text[-1], 16) ^ 1:x}"),
        ("bad_other_configuration", "message", lambda text: text[:-1] + f"{int(text[-1], 16) ^ 1:x}"),
        ("bad_confirmation_of_another_subject", "check", lambda _: "signature"),
        ("bad_confirmation_of_another_subject", "message", flip),
        ("bad_subject_of_no_ring", "error", lambda _: "RemoteProtocolError"),
        ("bad_keys_of_the_next_round", "message", flip),
        ("bad_boxes_of_the_round_before", "message", flip),
        ("bad_boxes_of_the_round_before", "changed", lambda fields: fields[1:]),
        ("bad_vector_of_the_round_before", "message", flip),
        ("bad_vector_of_the_round_before", "changed", lambda fields: fields[:1]),
        ("bad_vector_of_the_round_before", "check", lambda _: "subject"),
        ("bad_vector_of_the_round_before", "round", lambda _: f"{AHEAD}_0.json"),
        ("bad_unmask_of_the_round_before", "message", flip),
        ("bad_unmask_of_the_round_before", "culprits", lambda _: []),
        ("bad_unmask_of_the_round_before", "changed", lambda fields: fields[:2]),
    ],
)
def test_the_verifier_notices_changes_to_a_refusal(name, path, change, tmp_path):
    changed = written(tmp_path, name, path, change)
    with pytest.raises((verify.Mismatch, FileNotFoundError)):
        verify.verify(changed)
    assert verify.main([str(changed)]) == 1


@pytest.mark.parametrize("part", [0, 0.2, 0.5, 0.8, 1])
@pytest.mark.parametrize("name", REFUSALS)
def test_the_verifier_notices_a_wrong_digit_in_every_refused_message(name, part, tmp_path):
    def change(text):
        at = round(part * (len(text) - 1))
        return f"{text[:at]}{int(text[at], 16) ^ 1:x}{text[at + 1 :]}"

    with pytest.raises(verify.Mismatch):
        verify.verify(written(tmp_path, name, "message", change))


def test_the_verifier_does_not_take_a_refusal_that_it_does_not_know(tmp_path):
    (tmp_path / "active_n3.json").write_text(json.dumps(DOCUMENTS["active_n3"]), encoding="utf-8")
    unknown = tmp_path / "bad_something.json"
    unknown.write_text(json.dumps(DOCUMENTS["bad_moved_box"]), encoding="utf-8")
    with pytest.raises(verify.Mismatch, match="no refusal of this name"):
        verify.verify(unknown)

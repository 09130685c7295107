"""The test of the server's view sees through masks that hide too little, and finds nothing behind real ones."""

from __future__ import annotations

import hashlib
import json
from functools import cache

import msgspec
import numpy as np
import pytest
from typer.testing import CliRunner

from protocols import server_view
from protocols.cli import app
from protocols.messages import Answer, Refusal
from protocols.server_view import examine, record, viewing_study
from secagg.masking import client
from secagg.prg import Stream, deterministic_entropy
from tests.protocols.hospitals import STAGES

NAMES = {
    "messages": "server view: nothing but the protocol's messages",
    "uniform": "server view: masked vectors are uniform over the ring",
    "correlation": "server view: no correlation with the true update",
    "repeated": "server view: no mask comes twice",
    "weights": "server view: no weight in the clear",
}


def failed(view):
    checks = {check.name: check for check in examine(view)}
    assert set(checks) == set(NAMES.values())
    return {short for short, name in NAMES.items() if not checks[name].ok}


@cache
def honest():
    return record(viewing_study(), deterministic_entropy(b"view"))


def masked_by(mask, monkeypatch):
    """A view in which all masks of a participant are replaced by one, `mask(key, size, dtype)`. No sum opens then."""

    def add_keystreams(vector, masks):
        vector += mask(masks[0][0], vector.size, vector.dtype)

    monkeypatch.setattr(client, "add_keystreams", add_keystreams)
    return record(viewing_study(), deterministic_entropy(b"view"))


def words(key, size, dtype):
    out = np.zeros(2 * size, np.uint32)
    Stream(key).fill(out)
    return out.view(np.uint64).astype(dtype)


def test_real_masks_leave_no_trace():
    view = honest()
    assert len(view.vectors) == 4 * 3
    assert view.vectors[0].received.size > 3000
    assert failed(view) == set()


def test_one_scalar_for_each_client_is_seen_through(monkeypatch):
    def scalar(key, size, dtype):
        return np.full(size, words(key, 1, dtype)[0], dtype)

    assert failed(masked_by(scalar, monkeypatch)) >= {"uniform", "correlation", "repeated"}


def test_a_16_bit_seed_used_again_is_seen_through(monkeypatch):
    """Each vector by itself looks uniform; two under one seed do not."""

    def again(key, size, dtype):
        return words(hashlib.sha256((12345).to_bytes(2, "big")).digest()[:16], size, dtype)

    assert failed(masked_by(again, monkeypatch)) == {"repeated"}


def test_no_mask_at_all_is_seen_through(monkeypatch):
    assert failed(masked_by(lambda _, size, dtype: np.zeros(size, dtype), monkeypatch)) == {
        "uniform",
        "correlation",
        "repeated",
        "weights",
    }


def test_plain_sums_are_seen_through():
    study = viewing_study()
    plain = msgspec.structs.replace(study, protocol=msgspec.structs.replace(study.protocol, aggregation="plain"))
    assert failed(record(plain, deterministic_entropy(b"view"))) == set(NAMES)


def test_a_count_beside_the_masked_vector_is_noticed():
    view = honest()
    seen = next(reply.body for stage, reply in view.replies if stage == "MaskedInput")
    chatty = Answer(memoryview(bytes(seen) + b"\x07"))
    assert failed(msgspec.structs.replace(view, replies=[*view.replies, ("MaskedInput", chatty)])) == {"messages"}


@pytest.mark.parametrize("reply", [Refusal("data"), None, Answer(b"")])
@pytest.mark.parametrize("stage", ["AdvertiseKeys", "MaskedInput", "Submit", ""])
def test_a_part_without_a_message_of_its_stage_is_noticed(stage, reply):
    view = honest()
    assert failed(msgspec.structs.replace(view, replies=[*view.replies, (stage, reply)])) == {"messages"}


def test_the_view_holds_every_part_of_every_message():
    """Three rounds: keys and sum of each, and a signature of each site at the end."""
    stages = [stage for stage, _ in honest().replies]
    assert {stage: stages.count(stage) for stage in set(stages)} == dict.fromkeys(STAGES, 12) | {"Finish": 4}


def test_a_view_without_vectors_passes_no_test():
    assert failed(msgspec.structs.replace(honest(), vectors=[])) >= {"uniform", "correlation", "repeated"}


@pytest.mark.parametrize("seed", range(20))
def test_uniform_values_raise_no_alarm_and_their_chances_are_spread(seed):
    rng = np.random.default_rng(seed)
    ring = honest().ring
    vector = rng.integers(0, ring.modulus, 4000, dtype=np.uint64)
    assert min(server_view._chances_of_uniform(ring, vector)) > server_view.FALSE_ALARM


def test_the_command_runs_it():
    result = CliRunner().invoke(app, ["doctor", "--server-view", "--json"])
    assert result.exit_code == 0
    found = {check["name"]: check for check in json.loads(result.stdout)}
    assert all(found[name]["ok"] for name in NAMES.values())

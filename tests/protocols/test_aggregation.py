"""The one interface to a secure sum: the document's worked example, and what every scheme must refuse."""

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocols.aggregation import Masked, Plain, Sum, secure_mean
from secagg.errors import (
    BelowThreshold,
    EmptySum,
    LocalProtocolError,
    RemoteProtocolError,
    SecAggError,
)
from secagg.keys import Identity, Roster
from secagg.masking.messages import MaskedInput, SurvivorSet
from secagg.masking.params import Params, Session, Subject, least_threshold
from secagg.prg import deterministic_entropy
from secagg.wire import encode

ENTROPY = deterministic_entropy(b"aggregation")
IDENTITIES = {name: Identity.generate(ENTROPY) for name in ("ash", "birch", "cedar", "dogwood")}
ROSTER = Roster.of({name: identity.public for name, identity in IDENTITIES.items()})


SUBJECT = Subject("train", bytes(32), bytes(32), 3, 32)


def session(mode="active", number=0):
    return Session(Params(ROSTER, least_threshold(4, mode), mode), bytes(32), number)


def vectors():
    return [np.array([u, 10 * u, 2**32 - u - 1], np.uint32) for u in range(4)]


class Play:
    """A sum under way: its server and its participants. Whoever is in `gone` is gone from that stage on."""

    def __init__(self, scheme, mode="active", gone=None):
        self.scheme, self.session, self.gone = scheme, session(mode), gone or {}
        self.stages = (*scheme.setup, *scheme.stages)
        self.states, self.answers = dict.fromkeys(range(4), b""), {}
        self.keys, self.sum = scheme.keys(self.session), None
        self.begin()

    @property
    def server(self):
        return self.sum or self.keys

    def begin(self):
        if self.sum is None and self.keys.members is not None:
            self.sum = self.keys.begin(SUBJECT)

    def answer(self, u, stage, request):
        identity, state = IDENTITIES[ROSTER.name(u)], self.states[u]
        if stage in self.scheme.setup:
            return self.scheme.agree(stage, self.session, u, state, request, identity, ENTROPY)
        if stage == self.scheme.stages[0]:
            return self.scheme.contribute(self.session, u, state, request, SUBJECT, vectors()[u], identity)
        return self.scheme.step(stage, state, request, identity)

    def stage(self):
        """Carry one stage."""
        stage, self.answers = self.server.stage, {}
        for u, request in self.server.requests().items():
            if u in self.gone and self.stages.index(self.gone[u]) <= self.stages.index(stage):
                continue
            self.answers[u], self.states[u] = self.answer(u, stage, request)
            self.server.receive(u, self.answers[u])
        self.server.close()
        self.begin()

    def until(self, stage):
        while self.server.stage != stage:
            self.stage()
        return self

    def result(self):
        while self.sum is None or self.sum.result is None:
            self.stage()
        return self.sum.result


def play(scheme, mode="active", gone=None):
    return Play(scheme, mode, gone).result()


# --- the document's example: gradients [1, 1] and [-1, -1] from theta = [0, 0]


def test_opposite_gradients_of_two_clients_average_to_zero():
    weight, mean = secure_mean(
        {"one": np.array([1.0, 1.0]), "two": np.array([-1.0, -1.0]), "observer": np.array([0.7, -0.3])},
        {"one": 1, "two": 1, "observer": 0},
        max_value=1.0,
    )
    assert weight == 2
    np.testing.assert_array_equal(mean, [0.0, 0.0])


def test_with_opposite_gradients_every_model_stays_at_zero_round_after_round():
    gradients = {"one": np.array([1.0, 1.0]), "two": np.array([-1.0, -1.0]), "observer": np.zeros(2)}
    thetas = {"one": np.zeros(2), "two": np.zeros(2)}
    for _ in range(3):
        _, mean = secure_mean(gradients, {"one": 1, "two": 1, "observer": 0}, max_value=1.0)
        thetas = {name: theta - 0.1 * mean for name, theta in thetas.items()}
        for theta in thetas.values():
            np.testing.assert_array_equal(theta, [0.0, 0.0])


def test_gradients_that_are_not_opposite_move_the_model_by_their_mean():
    gradients = {"one": np.array([1.0, 0.5]), "two": np.array([-1.0, 0.5]), "observer": np.ones(2)}
    theta = np.zeros(2)
    for _ in range(3):
        theta -= 0.5 * secure_mean(gradients, {"one": 1, "two": 1, "observer": 0}, max_value=1.0)[1]
    np.testing.assert_allclose(theta, [0.0, -0.75], atol=3 * 2.0**-16)


# --- secure_mean


@settings(max_examples=15, deadline=None)
@given(st.data())
def test_secure_mean_is_numpys_weighted_average(data):
    n = data.draw(st.integers(3, 5))
    finite = st.floats(-4.0, 4.0)
    size = data.draw(st.integers(1, 6))
    values = {f"site{i}": np.array(data.draw(st.lists(finite, min_size=size, max_size=size))) for i in range(n)}
    weights = {name: data.draw(st.integers(0, 1000)) for name in values}
    weights["site0"] += 1
    total, mean = secure_mean(values, weights, max_value=4.0)
    expected = np.average(list(values.values()), axis=0, weights=list(weights.values()))
    assert total == sum(weights.values())
    np.testing.assert_allclose(mean, expected, rtol=0, atol=n * 2.0**-16 / total + 1e-12)


def test_secure_mean_clips_what_is_larger_than_agreed():
    _, mean = secure_mean({name: np.array([9.0]) for name in "abc"}, dict.fromkeys("abc", 1), max_value=2.0)
    np.testing.assert_array_equal(mean, [2.0])


@pytest.mark.parametrize(
    ("values", "weights", "says"),
    [
        ({"a": np.ones(2), "b": np.ones(2)}, {"a": 1, "b": 1}, "at least 3"),
        ({"a": np.ones(2), "b": np.ones(3), "c": np.ones(2)}, {"a": 1, "b": 1, "c": 1}, r"b: .*\(2,\).*\(3,\)"),
        ({"a": np.ones(2), "b": np.array([1, np.nan]), "c": np.ones(2)}, {"a": 1, "b": 1, "c": 1}, "b: entry 1"),
        ({"a": np.ones(2), "b": np.ones(2), "c": np.array([np.inf, 1])}, {"a": 1, "b": 1, "c": 1}, "c: entry 0"),
        ({"a": np.ones(2), "b": np.ones(2), "c": np.ones(2)}, {"a": 1, "b": -1, "c": 1}, "b: .*weight"),
        ({"a": np.ones(2), "b": np.ones(2), "c": np.ones(2)}, {"a": 1, "b": 1.5, "c": 1}, "b: .*weight"),
        ({"a": np.ones(2), "b": np.ones(2), "c": np.ones(2)}, {"a": 1, "b": 1}, "weights of"),
        ({"a": [1.0], "b": [1.0], "c": [1.0]}, {"a": 1, "b": 1, "c": 1}, "a: expected a vector of float"),
    ],
)
def test_secure_mean_says_whose_vector_is_wrong(values, weights, says):
    with pytest.raises(SecAggError, match=says):
        secure_mean(values, weights, max_value=1.0)


def test_secure_mean_of_weights_that_are_all_zero_is_no_mean():
    with pytest.raises(EmptySum):
        secure_mean({name: np.ones(2) for name in "abc"}, dict.fromkeys("abc", 0), max_value=1.0)


def test_secure_mean_refuses_a_weight_above_the_agreed_one():
    with pytest.raises(LocalProtocolError, match=r"b: .*weight"):
        secure_mean({name: np.ones(2) for name in "abc"}, {"a": 1, "b": 6, "c": 1}, max_value=1.0, max_weight=5)


def test_secure_mean_refuses_a_threshold_below_the_modes_least():
    with pytest.raises(LocalProtocolError, match="threshold"):
        secure_mean({name: np.ones(2) for name in "abcd"}, dict.fromkeys("abcd", 1), max_value=1.0, threshold=2)


def test_secure_mean_repeats_itself_with_equal_entropy():
    values = {name: np.array([0.123456789]) for name in "abc"}
    first, second = (
        secure_mean(values, dict.fromkeys("abc", 1), max_value=1.0, entropy=deterministic_entropy(b"x"))
        for _ in range(2)
    )
    assert first[1].tobytes() == second[1].tobytes()


# --- the schemes


@pytest.mark.parametrize("mode", ["active", "semi-honest"])
def test_masked_sum_opens_to_the_survivors_sum_modulo_the_ring(mode):
    opened = play(Masked(mode), mode, gone={1: "MaskedInput"})
    assert opened.contributors == {0, 2, 3}
    expected = sum(vectors()[u].astype(np.uint64) for u in (0, 2, 3)) % 2**32
    np.testing.assert_array_equal(opened.total, expected)


def test_only_the_active_mode_has_a_consistency_check():
    assert "ConsistencyCheck" in Masked("active").stages
    assert "ConsistencyCheck" not in Masked("semi-honest").stages


def test_the_keys_of_the_next_sum_travel_with_every_stage_of_a_sum_that_follows_no_other():
    """All of the agreement is done when the sum is open, and no message of it goes with the last of an active one."""
    assert Masked("active").ahead == {"MaskedInput": "AdvertiseKeys", "ConsistencyCheck": "ShareKeys"}
    assert Masked("semi-honest").ahead == {"MaskedInput": "AdvertiseKeys", "Unmask": "ShareKeys"}
    assert Plain(1).ahead == {}


def test_a_masked_vector_on_the_wire_is_not_the_vector():
    playing = Play(Masked("active")).until("MaskedInput")
    playing.stage()
    for u, vector in enumerate(vectors()):
        assert SUBJECT.ring.pack(vector) not in playing.answers[u]


def test_a_masked_sum_below_the_threshold_is_lost():
    with pytest.raises(BelowThreshold, match="MaskedInput: 2 participants left, 3 needed"):
        play(Masked("active"), gone={0: "MaskedInput", 1: "MaskedInput"})


@pytest.mark.parametrize("stage", ["AdvertiseKeys", "ShareKeys"])
def test_keys_below_the_threshold_are_lost(stage):
    with pytest.raises(BelowThreshold, match=f"{stage}: 2 participants left, 3 needed"):
        play(Masked("active"), gone={0: stage, 1: stage})


def test_a_sum_begins_only_once_its_keys_are_agreed():
    playing = Play(Masked("active"))
    for stage in ("AdvertiseKeys", "ShareKeys"):
        assert playing.keys.members is None
        with pytest.raises(LocalProtocolError, match=f"the keys are at {stage} still"):
            playing.keys.begin(SUBJECT)
        playing.stage()
    assert playing.keys.members == {0, 1, 2, 3}
    assert playing.keys.requests() == {}
    for late in (lambda: playing.keys.receive(0, b"\x01"), playing.keys.close):
        with pytest.raises(LocalProtocolError, match="the keys are agreed"):
            late()


def test_a_sum_may_be_begun_long_after_its_keys_and_others_in_between():
    early = Play(Masked("active")).until("ShareKeys")
    between = play(Masked("semi-honest"), "semi-honest")
    np.testing.assert_array_equal(early.result().total, between.total)


@pytest.mark.parametrize(
    ("stage", "reached", "before"),
    [
        ("ShareKeys", "AdvertiseKeys", "nothing"),
        ("Unmask", "ShareKeys", "Advertised"),
        ("MaskedInput", "ShareKeys", "Advertised"),
        ("ShareKeys", "MaskedInput", "Shared"),
        ("Unmask", "ConsistencyCheck", "Masked"),
        ("ConsistencyCheck", "MaskedInput", "Shared"),
        ("MaskedInput", "Unmask", "Confirmed"),
        ("ConsistencyCheck", "Unmask", "Confirmed"),
        ("Unmask", "done", "Finished"),
    ],
)
def test_a_stage_that_does_not_follow_on_the_state_is_refused(stage, reached, before):
    playing = Play(Masked("active")).until(reached)
    # At Unmask a state before the check is what the semi-honest mode goes on from; this session is an active one.
    says = "unmasks only after" if (stage, before) == ("Unmask", "Masked") else f"{stage} cannot follow on {before}"
    request = encode(SurvivorSet((0, 1, 2, 3))) if stage == "Unmask" else b""
    with pytest.raises((RemoteProtocolError, LocalProtocolError), match=says):
        playing.answer(0, stage, request)


def test_the_stage_that_contributes_needs_a_vector_of_the_sums_shape():
    playing = Play(Masked("active")).until("MaskedInput")
    request, state = playing.server.requests()[0], playing.states[0]
    for wrong in (np.zeros(2, np.uint32), np.zeros(3, np.uint64), np.zeros((3, 1), np.uint32)):
        with pytest.raises(LocalProtocolError):
            playing.scheme.contribute(playing.session, 0, state, request, SUBJECT, wrong, IDENTITIES[ROSTER.name(0)])


def test_a_masked_server_blames_the_sender_of_garbage_and_goes_on():
    playing = Play(Masked("active"))
    for stage in playing.stages:
        with pytest.raises(RemoteProtocolError, match=f"birch sent no message of stage {stage}") as caught:
            playing.until(stage).server.receive(1, b"\x01garbage")
        assert caught.value.culprits == {"birch"}
    assert playing.result().contributors == {0, 1, 2, 3}


def test_after_the_sum_is_open_nothing_more_is_taken():
    playing = Play(Masked("semi-honest"), "semi-honest")
    assert isinstance(playing.result(), Sum)
    assert playing.server.stage == "done"
    assert playing.server.requests() == {}
    for late in (lambda: playing.server.receive(0, b"\x01"), playing.server.close):
        with pytest.raises(LocalProtocolError, match="the sum is open"):
            late()


def test_only_an_active_sum_has_a_record_and_it_is_of_this_sum():
    assert play(Masked("semi-honest"), "semi-honest").record is None
    for stage, survivors in (("MaskedInput", (0, 2, 3)), ("ConsistencyCheck", (0, 1, 2, 3))):
        signed = play(Masked("active"), gone={1: stage}).record
        assert (signed.round, signed.subject, signed.survivors) == (0, SUBJECT, survivors)
        assert set(signed.commitments) == {0, 1, 2, 3}
        assert set(signed.confirmations) == {0, 2, 3}


def test_a_plain_sum_is_the_same_sum():
    opened = play(Plain(1))
    np.testing.assert_array_equal(opened.total, sum(v.astype(np.uint64) for v in vectors()) % 2**32)
    assert opened.contributors == {0, 1, 2, 3}
    assert opened.record is None


def plain_server(threshold):
    keys = Plain(threshold).keys(session())
    assert keys.members == {0, 1, 2, 3}
    return keys.begin(SUBJECT)


def plain_answer(u=1, subject=SUBJECT, number=0, packed=None):
    packed = subject.ring.pack(vectors()[u]) if packed is None else packed
    return encode(MaskedInput(session(number=number).terms, subject, packed))


def test_a_plain_server_refuses_garbage_another_length_another_sum_and_a_second_vector():
    server = plain_server(1)
    wrong = [
        b"",
        b"\x01",
        plain_answer(packed=SUBJECT.ring.pack(np.zeros(2, np.uint32))),
        plain_answer(packed=b""),
        plain_answer(subject=msgspec.structs.replace(SUBJECT, model_digest=b"m" * 32)),
        plain_answer(number=1),
    ]
    for answer in wrong:
        with pytest.raises(RemoteProtocolError, match="birch") as caught:
            server.receive(1, answer)
        assert caught.value.culprits == {"birch"}
    server.receive(1, plain_answer())
    with pytest.raises(RemoteProtocolError, match="twice"):
        server.receive(1, plain_answer())
    server.close()
    np.testing.assert_array_equal(server.result.total, vectors()[1])


@pytest.mark.parametrize("threshold", [1, 2, 4])
def test_a_plain_sum_of_fewer_than_the_threshold_is_lost(threshold):
    server = plain_server(threshold)
    for u in range(threshold - 1):
        server.receive(u, plain_answer(u))
    with pytest.raises(BelowThreshold, match=f"{threshold - 1} participants left, {threshold} needed"):
        server.close()
    assert server.result is None


def test_a_plain_participant_refuses_another_shape_keys_or_a_second_stage():
    with pytest.raises(LocalProtocolError):
        Plain(1).contribute(session(), 0, b"", b"", SUBJECT, np.zeros(2, np.uint32), IDENTITIES[ROSTER.name(0)])
    with pytest.raises(RemoteProtocolError, match="no stage Unmask"):
        Plain(1).step("Unmask", b"", b"", IDENTITIES["ash"])
    with pytest.raises(RemoteProtocolError, match="no stage AdvertiseKeys"):
        Plain(1).agree("AdvertiseKeys", session(), 0, b"", b"", IDENTITIES["ash"], ENTROPY)


def test_a_plain_sum_has_no_keys_to_agree_on():
    keys = Plain(1).keys(session())
    assert keys.requests() == {}
    for late in (lambda: keys.receive(0, b"\x01"), keys.close):
        with pytest.raises(LocalProtocolError, match="no keys to agree on"):
            late()

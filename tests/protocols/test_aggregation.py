"""The one interface to a secure sum: the document's worked example, and what every scheme must refuse."""

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
from secagg.masking.messages import MaskedInput
from secagg.masking.params import Params, Session, least_threshold
from secagg.prg import deterministic_entropy
from secagg.wire import encode

ENTROPY = deterministic_entropy(b"aggregation")
IDENTITIES = {name: Identity.generate(ENTROPY) for name in ("ash", "birch", "cedar", "dogwood")}
ROSTER = Roster.of({name: identity.public for name, identity in IDENTITIES.items()})


def session(mode="active", number=0):
    return Session(Params(ROSTER, least_threshold(4, mode), mode), bytes(32), "train", number, bytes(32), 3, 32)


def vectors():
    return [np.array([u, 10 * u, 2**32 - u - 1], np.uint32) for u in range(4)]


def play(scheme, mode="active", gone=None):
    """A whole sum in which participant `u` is gone from stage `gone[u]` on."""
    gone, states, server = gone or {}, {}, scheme.server(session(mode))
    while server.result is None:
        stage = server.stage
        for u, request in server.requests().items():
            if u in gone and scheme.stages.index(gone[u]) <= scheme.stages.index(stage):
                continue
            identity = IDENTITIES[ROSTER.name(u)]
            vector = vectors()[u] if stage == scheme.contributes_at else None
            if stage == scheme.stages[0]:
                answer, states[u] = scheme.begin(session(mode), u, identity, ENTROPY, vector)
            else:
                answer, states[u] = scheme.step(stage, states[u], request, identity, ENTROPY, vector)
            server.receive(u, answer)
        server.close()
    return server.result


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


def test_a_masked_vector_on_the_wire_is_not_the_vector():
    scheme, sent = Masked("active"), {}
    server, states = scheme.server(session()), {}
    while server.stage != "ConsistencyCheck":
        for u, request in server.requests().items():
            identity = IDENTITIES[ROSTER.name(u)]
            if server.stage == "AdvertiseKeys":
                sent[u], states[u] = scheme.begin(session(), u, identity, ENTROPY)
            else:
                sent[u], states[u] = scheme.step(server.stage, states[u], request, identity, ENTROPY, vectors()[u])
            server.receive(u, sent[u])
        server.close()
    for u, vector in enumerate(vectors()):
        assert session().ring.pack(vector) not in sent[u]


def test_a_masked_sum_below_the_threshold_is_lost():
    with pytest.raises(BelowThreshold, match="MaskedInput: 2 participants left, 3 needed"):
        play(Masked("active"), gone={0: "MaskedInput", 1: "MaskedInput"})


def test_a_stage_that_does_not_follow_on_the_state_is_refused():
    scheme = Masked("active")
    _, state = scheme.begin(session(), 0, IDENTITIES["ash"], ENTROPY)
    with pytest.raises(RemoteProtocolError, match="Unmask cannot follow on Advertised"):
        scheme.step("Unmask", state, b"", IDENTITIES["ash"], ENTROPY, None)


def test_the_stage_that_contributes_needs_a_vector():
    scheme = Masked("active")
    server, states = scheme.server(session()), {}
    for u in server.requests():
        answer, states[u] = scheme.begin(session(), u, IDENTITIES[ROSTER.name(u)], ENTROPY)
        server.receive(u, answer)
    server.close()
    for u, request in server.requests().items():
        answer, states[u] = scheme.step("ShareKeys", states[u], request, IDENTITIES[ROSTER.name(u)], ENTROPY, None)
        server.receive(u, answer)
    server.close()
    with pytest.raises(LocalProtocolError, match="needs the participant's vector"):
        scheme.step("MaskedInput", states[0], server.requests()[0], IDENTITIES["ash"], ENTROPY, None)


def test_a_masked_server_blames_the_sender_of_garbage_and_goes_on():
    server = Masked("active").server(session())
    with pytest.raises(RemoteProtocolError, match="birch sent no message of stage AdvertiseKeys") as caught:
        server.receive(1, b"\x01garbage")
    assert caught.value.culprits == {"birch"}
    answer, _ = Masked("active").begin(session(), 1, IDENTITIES["birch"], ENTROPY)
    server.receive(1, answer)


def test_after_the_sum_is_open_nothing_more_is_taken():
    scheme, states = Masked("semi-honest"), {}
    server = scheme.server(session("semi-honest"))
    while server.result is None:
        for u, request in server.requests().items():
            identity = IDENTITIES[ROSTER.name(u)]
            if server.stage == "AdvertiseKeys":
                answer, states[u] = scheme.begin(session("semi-honest"), u, identity, ENTROPY)
            else:
                answer, states[u] = scheme.step(server.stage, states[u], request, identity, ENTROPY, vectors()[u])
            server.receive(u, answer)
        server.close()
    assert isinstance(server.result, Sum)
    assert server.stage == "done"
    assert server.requests() == {}
    for late in (lambda: server.receive(0, b"\x01"), server.close):
        with pytest.raises(LocalProtocolError, match="the sum is open"):
            late()


def test_a_plain_sum_is_the_same_sum():
    opened = play(Plain(1))
    np.testing.assert_array_equal(opened.total, sum(v.astype(np.uint64) for v in vectors()) % 2**32)
    assert opened.contributors == {0, 1, 2, 3}


def test_a_plain_server_refuses_garbage_another_length_and_a_second_vector():
    server, ring = Plain(1).server(session()), session().ring
    wrong = [b"", b"\x01", encode(MaskedInput(ring.pack(np.zeros(2, np.uint32)))), encode(MaskedInput(b""))]
    for answer in wrong:
        with pytest.raises(RemoteProtocolError, match="birch") as caught:
            server.receive(1, answer)
        assert caught.value.culprits == {"birch"}
    good = encode(MaskedInput(ring.pack(vectors()[1])))
    server.receive(1, good)
    with pytest.raises(RemoteProtocolError, match="twice"):
        server.receive(1, good)
    server.close()
    np.testing.assert_array_equal(server.result.total, vectors()[1])


@pytest.mark.parametrize("threshold", [1, 2, 4])
def test_a_plain_sum_of_fewer_than_the_threshold_is_lost(threshold):
    server = Plain(threshold).server(session())
    for u in range(threshold - 1):
        server.receive(u, encode(MaskedInput(session().ring.pack(vectors()[u]))))
    with pytest.raises(BelowThreshold, match=f"{threshold - 1} participants left, {threshold} needed"):
        server.close()
    assert server.result is None


def test_a_plain_participant_refuses_to_send_nothing_another_shape_or_a_second_stage():
    with pytest.raises(LocalProtocolError, match="needs the participant's vector"):
        Plain(1).begin(session(), 0, IDENTITIES["ash"], ENTROPY, None)
    with pytest.raises(LocalProtocolError):
        Plain(1).begin(session(), 0, IDENTITIES["ash"], ENTROPY, np.zeros(2, np.uint32))
    with pytest.raises(RemoteProtocolError, match="no stage Unmask"):
        Plain(1).step("Unmask", b"", b"", IDENTITIES["ash"], ENTROPY, None)

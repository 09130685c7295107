"""Secret sharing: t recover, t - 1 learn nothing, and wrong shares are found or nothing is recovered."""

import os
import random
from collections import Counter
from itertools import combinations, product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from secagg import LocalProtocolError, RemoteProtocolError, deterministic_entropy, shamir
from secagg.shamir import PRIME, SECRET_BYTES, SHARE_BYTES, recover, split

SECRET = bytes(range(100, 132))


def shared(threshold, holders, secret=SECRET, seed=b"polynomial"):
    return split(secret, threshold, holders, deterministic_entropy(seed))


def is_secret(candidate):
    return candidate == SECRET


def spoil(shares, liars, seed=0):
    """Random other field elements, so that the liars agree on nothing."""
    rng = random.Random(seed)
    return {v: rng.randrange(PRIME).to_bytes(SHARE_BYTES, "big") if v in liars else s for v, s in shares.items()}


def test_the_prime_is_a_prime_above_every_secret():
    assert 2**256 < PRIME < 2**257
    assert PRIME.bit_length() <= 8 * SHARE_BYTES
    d, r = PRIME - 1, 0
    while d % 2 == 0:
        d, r = d // 2, r + 1
    for base in (2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37):  # Miller-Rabin
        x = pow(base, d, PRIME)
        assert x in (1, PRIME - 1) or any(pow(x, 2**i, PRIME) == PRIME - 1 for i in range(1, r))


@pytest.mark.parametrize("n", range(2, 7))
def test_every_subset_of_at_least_t_recovers(n):
    for threshold in range(2, n + 1):
        shares = shared(threshold, range(n))
        for size in range(threshold, n + 1):
            for subset in combinations(range(n), size):
                assert recover({v: shares[v] for v in subset}, threshold, is_secret) == (SECRET, frozenset())


@pytest.mark.parametrize("prime", [7, 11])
@pytest.mark.parametrize("threshold", [2, 3])
def test_fewer_than_t_shares_are_independent_of_the_secret(threshold, prime, monkeypatch):
    """Exhaustive over a small field: with all polynomials equally likely, any t - 1 shares take all values equally
    often, whatever the secret; and t shares do not."""
    monkeypatch.setattr(shamir, "PRIME", prime)
    holders = range(4)
    distributions = {size: set() for size in (threshold - 1, threshold)}
    for secret in range(prime):
        drawn = []
        for chosen in product(range(prime), repeat=threshold - 1):
            coefficients = iter(chosen)
            drawn.append(
                split(
                    secret.to_bytes(32, "big"), threshold, holders, lambda k, c=coefficients: next(c).to_bytes(k, "big")
                )
            )
        for size, seen in distributions.items():
            for subset in combinations(holders, size):
                counts = Counter(tuple(shares[v] for v in subset) for shares in drawn)
                seen.add((subset, frozenset(counts.items())))
                if size < threshold:
                    assert len(counts) == prime ** (threshold - 1)
                    assert set(counts.values()) == {1}
    assert len(distributions[threshold - 1]) == len(list(combinations(holders, threshold - 1)))
    assert len(distributions[threshold]) == prime * len(list(combinations(holders, threshold)))


def test_coefficients_have_enough_entropy_to_be_uniform():
    asked = []
    split(SECRET, 5, range(6), lambda count: asked.append(count) or os.urandom(count))
    assert len(asked) == 4
    assert all(8 * count >= PRIME.bit_length() + 60 for count in asked)


def test_shares_are_the_polynomial_at_one_past_the_holders_number():
    """So the secret itself, its value at 0, is nobody's share, and a share is bound to its holder."""
    shares = split(SECRET, 2, [0, 1, 7], lambda count: (5).to_bytes(count, "big"))
    value = int.from_bytes(SECRET, "big")
    assert {v: int.from_bytes(s, "big") for v, s in shares.items()} == {v: value + 5 * (v + 1) for v in (0, 1, 7)}
    assert all(len(s) == SHARE_BYTES for s in shares.values())


@pytest.mark.parametrize("secret", [bytes(32), b"\xff" * 32, bytes(31) + b"\1"])
def test_every_32_byte_secret_comes_back(secret):
    shares = shared(3, range(5), secret)
    assert recover(shares, 3, secret.__eq__) == (secret, frozenset())


@pytest.mark.parametrize("length", [0, 31, 33])
def test_a_secret_of_another_length_is_refused(length):
    with pytest.raises(LocalProtocolError, match=f"has 32 bytes, got {length}"):
        shared(2, range(3), bytes(length))
    assert SECRET_BYTES == 32


@pytest.mark.parametrize("threshold", [-1, 0, 1, 4])
def test_a_threshold_out_of_range_is_refused(threshold):
    with pytest.raises(LocalProtocolError, match=f"must be 2 to 3 .*, got {threshold}"):
        shared(threshold, range(3))


@pytest.mark.parametrize("holders", [[0, 1, 1], [-1, 0, 1]])
def test_holders_that_repeat_or_would_hold_the_secret_are_refused(holders):
    """Holder -1 would get the value at 0: the secret."""
    with pytest.raises(LocalProtocolError, match="distinct numbers from 0"):
        shared(2, holders)
    if len(set(holders)) == len(holders):
        with pytest.raises(LocalProtocolError, match="distinct numbers from 0"):
            recover(dict.fromkeys(holders, bytes(33)), 2, is_secret)


@pytest.mark.parametrize("count", range(4))
def test_too_few_shares_are_refused(count):
    shares = shared(4, range(6))
    with pytest.raises(LocalProtocolError, match=f"4 shares are needed, got {count}"):
        recover({v: shares[v] for v in range(count)}, 4, lambda _: True)


@pytest.mark.parametrize(
    ("threshold", "answers", "liars"),
    [(3, 4, 1), (3, 5, 1), (3, 6, 1), (4, 8, 2), (2, 8, 3), (7, 10, 1), (5, 12, 3), (67, 68, 1), (67, 100, 16)],
)
def test_with_enough_surplus_the_liars_are_named_and_the_secret_recovered(threshold, answers, liars):
    shares = shared(threshold, range(answers))
    for placed in (range(liars), range(answers - liars, answers), random.Random(1).sample(range(answers), liars)):
        assert recover(spoil(shares, placed), threshold, is_secret) == (SECRET, frozenset(placed))


@pytest.mark.parametrize("n", [4, 5, 6, 7])
def test_every_set_of_liars_is_named_or_nothing_is_recovered(n):
    for threshold in range(2, n):
        shares, surplus = shared(threshold, range(n)), n - threshold
        for size in range(1, n + 1):
            for liars in combinations(range(n), size):
                try:
                    outcome = recover(spoil(shares, liars), threshold, is_secret)
                except RemoteProtocolError:
                    assert size > surplus // 2, "these were few enough to tell"
                    assert not (surplus == size == 1)
                else:
                    assert outcome[0] == SECRET
                    few = size <= (surplus + 1) // 2
                    assert outcome[1] == frozenset(liars) if few else outcome[1] <= frozenset(liars)


@pytest.mark.parametrize("liars", [{0}, {5}, {0, 1, 2, 3, 4, 5}])
def test_without_surplus_a_wrong_share_recovers_nothing(liars):
    shares = spoil(shared(6, range(6)), liars)
    with pytest.raises(RemoteProtocolError, match="6 shares of threshold 6 do not lead to the secret") as caught:
        recover(shares, 6, is_secret)
    assert caught.value.culprits == frozenset()


@pytest.mark.parametrize(
    "bad",
    [
        b"",
        bytes(32),
        bytes(34),
        PRIME.to_bytes(33, "big"),
        (PRIME + 1).to_bytes(33, "big"),
        b"\xff" * 33,
    ],
    ids=["none", "short", "long", "p", "p + 1", "most"],
)
@pytest.mark.parametrize("at", [0, 2, 4])
def test_a_share_that_is_no_field_element_counts_as_a_lie(bad, at):
    shares = {**shared(3, range(5)), at: bad}
    assert recover(shares, 3, is_secret) == (SECRET, frozenset({at}))
    with pytest.raises(RemoteProtocolError):
        recover({v: shares[v] for v in {at, 1, 3}}, 3, is_secret)


@pytest.mark.parametrize("at", [0, 4])
def test_a_right_share_in_another_form_is_not_taken_for_the_share(at):
    """One share, one form: 33 bytes leave room for a value twice, and zeros may be left out or added."""
    shares = shared(3, range(5))
    value = int.from_bytes(shares[at], "big") + PRIME
    assert value < 2 ** (8 * SHARE_BYTES)
    for form in (value.to_bytes(SHARE_BYTES, "big"), b"\0" + shares[at], shares[at].lstrip(b"\0")):
        spoiled = {**shares, at: form}
        assert recover(spoiled, 3, is_secret) == (SECRET, frozenset({at}))
        with pytest.raises(RemoteProtocolError):
            recover({v: spoiled[v] for v in {at, 1, 3}}, 3, is_secret)


def test_two_holders_that_exchange_their_shares_are_both_found():
    shares = shared(3, range(7))
    shares[1], shares[4] = shares[4], shares[1]
    assert recover(shares, 3, is_secret) == (SECRET, frozenset({1, 4}))


def test_a_consistent_sharing_of_another_secret_is_never_taken():
    shares = shared(3, range(6), bytes(32))
    with pytest.raises(RemoteProtocolError):
        recover(shares, 3, is_secret)


def test_a_polynomial_whose_value_at_0_is_no_32_byte_secret_is_refused():
    values = {v: (2**256 + 5).to_bytes(SHARE_BYTES, "big") for v in range(4)}
    with pytest.raises(RemoteProtocolError):
        recover(values, 3, lambda _: True)


def test_the_order_in_which_shares_come_does_not_matter():
    shares = spoil(shared(3, range(7)), {2, 5})
    for seed in range(5):
        mixed = dict(random.Random(seed).sample(sorted(shares.items()), 7))
        assert recover(mixed, 3, is_secret) == (SECRET, frozenset({2, 5}))


@settings(deadline=None, max_examples=100)
@given(st.data())
def test_whatever_the_lies_the_outcome_is_the_secret_and_the_liars_or_an_error(data):
    n = data.draw(st.integers(3, 12))
    threshold = data.draw(st.integers(2, n))
    numbers = data.draw(st.lists(st.integers(0, 2**16 - 1), min_size=n, max_size=n, unique=True))
    liars = data.draw(st.sets(st.sampled_from(numbers), max_size=n))
    shares = spoil(shared(threshold, numbers), liars, data.draw(st.integers(0, 2**32)))
    surplus = n - threshold
    try:
        outcome = recover(shares, threshold, is_secret)
    except RemoteProtocolError:
        assert len(liars) > surplus // 2
    else:
        assert outcome[0] == SECRET
        few = len(liars) <= (surplus + 1) // 2
        assert outcome[1] == liars if few else outcome[1] <= liars

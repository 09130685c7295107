"""Parameters of a CKKS sum: what they hold is opened exactly, or within the stated error, and never with less noise."""

import math
from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from secagg.ckks import params
from secagg.ckks.params import Need, Setting, choose, ciphertext_deviation, packing
from secagg.ckks.polynomials import Chain, arithmetic
from secagg.errors import HeadroomError, LocalProtocolError, RemoteProtocolError
from secagg.keys import Identity, Member
from secagg.ring import Ring
from tests.secagg.ckks_simulation import session_of, subject_of

SMALL, LARGE = Chain(2048, 40, 14), Chain(4096, 60, 20)
MEMBER = Member("trustee", Identity(bytes(32)).public)


def signed_vectors(rng, n, ring, dimension):
    """Whole numbers of n participants, as large as a ring element, whose sum is one too."""
    half = 1 << (ring.bits - 1)
    total = [int(x) for x in rng.integers(-half, half - 1, dimension, np.int64, endpoint=True)]
    total[:2] = [-half, half - 1][: len(total)]
    rest, vectors = total, []
    for _ in range(n - 1):
        draw = [int(x) for x in rng.integers(-half, half - 1, dimension, np.int64, endpoint=True)]
        # Of the other sign than what is left, if that is needed to get there.
        draw = [x if -half <= left - x < half else left // 2 for x, left in zip(draw, rest, strict=True)]
        vectors.append(draw)
        rest = [left - x for left, x in zip(rest, draw, strict=True)]
    vectors.append(rest)
    return [ring.embed(np.array(v, np.int64)) for v in vectors], ring.embed(np.array(total, np.int64))


def opened(layout, vectors, noise):
    """What decoding makes of the sum of encoded vectors and noise, shape [ciphertexts, N], both modulo q."""
    field = arithmetic(layout.chain.degree, layout.chain.modulus)
    total = np.zeros((layout.ciphertexts, layout.chain.degree), np.uint64)
    for vector in vectors:
        field.add(total, field.embed(layout.encode(vector)))
    field.add(total, field.embed(noise))
    return layout.decode(total)


def worst_noises(rng, layout):
    """As much as the bound in either direction, everywhere, and at random."""
    shape, most = (layout.ciphertexts, layout.chain.degree), math.floor(layout.bound)
    yield np.full(shape, most)
    yield np.full(shape, -most)
    yield np.where(rng.integers(0, 2, shape) == 1, most, -most)


sums = st.tuples(
    st.integers(2, 30),
    st.integers(1, 64),
    st.sampled_from([1, 2, 3, 17, 700, 2044, 2045]),
    st.sampled_from([SMALL, Chain(2048, 36, 14), Chain(4096, 50, 20), LARGE]),
    st.integers(0, 2**32),
)


@settings(max_examples=120, deadline=None)
@given(sums)
def test_a_sum_with_the_worst_noise_is_exact(drawn):
    n, bits, dimension, chain, seed = drawn
    try:
        layout = packing(chain, n, Need(dimension, bits))
    except HeadroomError:
        assume(False)
    rng, ring = np.random.default_rng(seed), Ring(bits)
    vectors, total = signed_vectors(rng, n, ring, dimension)
    for noise in worst_noises(rng, layout):
        got = opened(layout, vectors, noise)
        assert got.dtype == ring.dtype
        assert (got == total).all()


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 30), st.integers(1, 64), st.integers(1, 64))
def test_every_number_of_digits_is_exact(n, bits, digits):
    """Also those that `packing` would not choose."""
    need = Need(5, bits)
    layout = params._packing(LARGE, n, need, 30, min(digits, bits))
    assume(layout is not None)
    rng, ring = np.random.default_rng(bits * digits), Ring(bits)
    vectors, total = signed_vectors(rng, n, ring, 5)
    for noise in worst_noises(rng, layout):
        assert (opened(layout, vectors, noise) == total).all()


@pytest.mark.parametrize("n", [2, 3, 10])
@pytest.mark.parametrize("bits", [1, 2, 3, 7, 20, 33, 63, 64])
def test_equal_extreme_vectors_sum_exactly(n, bits):
    """Every participant has the lowest number that the sum allows, and every one the highest."""
    layout, ring = packing(LARGE, n, Need(9, bits)), Ring(bits)
    half = 1 << (bits - 1)
    for value in (-(half // n), (half - 1) // n):
        vector = ring.embed(np.full(9, value))
        for noise in worst_noises(np.random.default_rng(0), layout):
            assert (opened(layout, [vector] * n, noise) == ring.embed(np.full(9, n * value))).all()


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 30), st.integers(12, 62), st.integers(0, 10), st.sampled_from([2, 300, 2045]))
def test_a_lossy_sum_is_within_its_error_and_its_first_entry_exact(n, bits, error_bits, dimension):
    error = float(2**error_bits)
    try:
        layout = packing(Chain(4096, 52, 20), n, Need(dimension, bits, error))
    except HeadroomError:
        assume(False)
    rng, ring = np.random.default_rng(bits), Ring(bits)
    vectors, total = signed_vectors(rng, n, ring, dimension)
    # No entry is so close to the ring's ends that its error would wrap.
    for noise in worst_noises(rng, layout):
        off = ring.signed(ring.reduce(opened(layout, vectors, noise) - total))
        assert off[0] == 0
        assert np.abs(off).max() <= error


@pytest.mark.parametrize("error", [0.3, 0.4, 1.0, 2.0, 7.0])
def test_a_small_error_holds(error):
    assert_within(error)


@pytest.mark.parametrize("error", [0.75, 1.5, 2.5, 3.9])
def test_an_error_that_is_no_whole_number_holds_too(error):
    assert_within(error)


def assert_within(error):
    layout, vectors = packing(Chain(4096, 52, 20), 3, Need(50, 20, error)), [Ring(20).zeros(50)]
    for noise in worst_noises(np.random.default_rng(0), layout):
        assert np.abs(Ring(20).signed(opened(layout, vectors, noise))).max() <= error


def test_a_lossy_sum_takes_fewer_bytes_and_its_noise_is_seen():
    chain = Chain(4096, 48, 20)
    exact, lossy = (packing(chain, 10, Need(30_000, 20, error)) for error in (0.0, 4096.0))
    assert lossy.digits == 1 < exact.digits
    assert lossy.upload_bytes < exact.upload_bytes
    assert lossy.head is not None
    assert exact.head is None
    zero = Ring(20).zeros(30_000)
    off = Ring(20).signed(opened(lossy, [zero], np.full((lossy.ciphertexts, 4096), math.floor(lossy.bound))))
    assert off[0] == 0
    assert off[1:].min() > 0


def test_an_opened_coefficient_above_the_bound_where_there_is_nothing_is_refused():
    layout = packing(SMALL, 3, Need(50, 20))
    vector, most = Ring(20).zeros(50), math.floor(layout.bound)
    for ciphertext in range(layout.ciphertexts):
        for at in range(2048 - 4, 2048):
            for sign in (1, -1):
                noise = np.zeros((layout.ciphertexts, 2048), np.int64)
                noise[ciphertext, at] = sign * most
                opened(layout, [vector], noise)
                noise[ciphertext, at] = sign * (most + 1)
                with pytest.raises(RemoteProtocolError, match="does not open") as caught:
                    opened(layout, [vector], noise)
                assert caught.value.culprits == frozenset()


def garbage_that_opens(bits, tries=4000):
    layout = packing(choose(3, [Need(50, bits)]), 3, Need(50, bits))
    rng, opens = np.random.default_rng(bits), 0
    for _ in range(tries):
        try:
            layout.decode(rng.integers(0, layout.chain.modulus, (layout.ciphertexts, layout.chain.degree), np.uint64))
            opens += 1
        except RemoteProtocolError:
            continue
    return opens


@pytest.mark.parametrize("bits", [20, 64])
def test_garbage_never_opens(bits):
    assert garbage_that_opens(bits, 500) == 0


@pytest.mark.parametrize("bits", [1, 2])
def test_garbage_never_opens_in_a_narrow_ring(bits):
    assert garbage_that_opens(bits) == 0


def test_what_is_packed_has_the_size_that_is_told():
    for dimension in (1, 100, 5000):
        layout = packing(SMALL, 3, Need(dimension, 20))
        message = layout.encode(Ring(20).zeros(dimension))
        assert message.shape == (layout.ciphertexts, 2048)
        assert layout.ciphertexts == -(-layout.digits * dimension // (2048 - layout.checked))
        assert len(layout.ring.pack(message.reshape(-1).view(np.uint64))) == layout.half_bytes
        assert layout.upload_bytes == 2 * layout.half_bytes
        assert (message[:, -layout.checked :] == 0).all()
        assert layout.chain.modulus < layout.ring.modulus


# --- noise ---


def divergence(shift, deviation):
    """Of a Gaussian from the same one, shifted: Kullback-Leibler."""
    return shift**2 / (2 * deviation**2)


@pytest.mark.parametrize("security", [20, 30, 40])
@pytest.mark.parametrize("dimension", [1, 50, 5000])
def test_the_flooding_is_what_the_theorem_asks_for(dimension, security):
    """Known value: N = 4096, three keys; the errors of all ciphertexts together tell 2^-s / 24 or less of the key.

    A coefficient's error is that of rounding three times, by 1/sqrt(12), before it is multiplied by the joint secret,
    and of a fresh encryption that is divided by p.
    """
    layout = packing(LARGE, 3, Need(dimension, 20), security)
    secret = 3 * 4096 * 2 / 3  # expected square of its length
    p = float(layout.chain.special)
    fresh = (4096 * 3 * 10.5 * 2 / 3 + 10.5 + 10.5 * secret) / p**2
    error = math.sqrt(3 * (1 / 12 + secret / 12 + fresh))
    assert ciphertext_deviation(layout.chain, 3) == pytest.approx(error, rel=1e-12)
    told = layout.ciphertexts * divergence(math.sqrt(4096) * error, layout.deviation)
    assert told <= 2.0**-security / 24
    assert told > 2.0**-security / 24 / 1.3, "no more noise than asked for"
    assert layout.deviation == pytest.approx(
        math.sqrt(12 * layout.ciphertexts) * 2 ** (security / 2) * 1.1 * math.sqrt(4096) * error, rel=1e-9
    )


def test_the_bound_is_exceeded_with_a_chance_below_the_stated_one():
    for n, dimension in ((3, 50), (10, 100_000)):
        layout = packing(LARGE, n, Need(dimension, 12))
        opened_deviation = math.hypot(math.sqrt(n) * layout.deviation, ciphertext_deviation(LARGE, n))
        chance = 2 * NormalDist().cdf(-layout.bound / opened_deviation) * layout.ciphertexts * 4096
        assert chance <= 2.0**-40


def test_more_security_more_ciphertexts_and_more_participants_take_more_noise():
    at = packing(LARGE, 3, Need(50, 20))
    assert packing(LARGE, 3, Need(50, 20), 40).deviation == pytest.approx(at.deviation * 2**5)
    assert packing(LARGE, 4, Need(50, 20)).deviation > at.deviation
    many = packing(LARGE, 3, Need(100_000, 20))
    assert many.deviation == pytest.approx(at.deviation * math.sqrt(many.ciphertexts))


# --- the choice ---


@pytest.mark.parametrize("n", [3, 10, 100])
@pytest.mark.parametrize("bits", [1, 12, 26, 64])
def test_what_is_chosen_is_128_bit_secure_and_holds_the_sum(n, bits):
    """The limits of the homomorphic encryption standard for ternary secrets."""
    need = Need(1000, bits)
    chain = choose(n, [need])
    assert chain.bits + chain.special_bits <= {2048: 54, 4096: 109}[chain.degree]
    assert (chain.modulus * chain.special).bit_length() <= {2048: 54, 4096: 109}[chain.degree]
    assert packing(chain, n, need).upload_bytes > 0


def test_what_is_chosen_takes_the_fewest_bytes_of_all():
    needs = [Need(3000, 20), Need(40, 26)]
    chosen = choose(4, needs)
    sizes = {}
    for degree, special in ((2048, 14), (4096, 20)):
        for bits in range(30, 61):
            try:
                chain = Chain(degree, bits, special)
                sizes[chain] = sum(packing(chain, 4, need).upload_bytes for need in needs)
            except (LocalProtocolError, HeadroomError):
                continue
    assert sizes[chosen] == min(sizes.values())
    assert len(sizes) > 20


@pytest.mark.parametrize(
    ("degree", "bits", "special"),
    [(2048, 41, 14), (4096, 60, 50), (2048, 19, 14), (4096, 61, 20), (3000, 40, 14), (0, 40, 14), (512, 30, 14)],
)
def test_a_chain_beyond_the_limits_is_refused(degree, bits, special):
    with pytest.raises(LocalProtocolError, match="128-bit secure"):
        Chain(degree, bits, special)


@pytest.mark.parametrize("special", [0, 1, 5, -3])
def test_a_chain_without_such_a_second_prime_is_refused(special):
    with pytest.raises(LocalProtocolError, match="no such primes"):
        Chain(2048, 30, special)


def test_primes_are_distinct_allow_the_transform_and_have_their_bits():
    for chain in (SMALL, LARGE, Chain(4096, 40, 40)):
        assert chain.modulus != chain.special
        for prime, bits in ((chain.modulus, chain.bits), (chain.special, chain.special_bits)):
            assert prime.bit_length() == bits
            assert prime % (2 * chain.degree) == 1
            assert pow(3, prime - 1, prime) == 1


def test_a_sum_that_does_not_fit_is_refused_with_what_does_not_fit():
    told = "a sum of 100 vectors of 50 entries of 20 bits does not fit a modulus of 32 bits of degree 2048"
    with pytest.raises(HeadroomError, match=told):
        packing(Chain(2048, 32, 14), 100, Need(50, 20))
    with pytest.raises(HeadroomError, match="does not fit"):
        packing(Chain(2048, 36, 14), 100, Need(50, 60, 1024.0))


def test_a_choice_that_does_not_exist_is_refused_with_what_to_do():
    with pytest.raises(HeadroomError, match="statistical security 64: lower that, or use masks"):
        choose(1000, [Need(10, 20), Need(1 << 20, 20)], 64)
    with pytest.raises(HeadroomError, match="sums of 1000 vectors of 1048576 entries"):
        choose(1000, [Need(10, 20), Need(1 << 20, 20)], 64)


@pytest.mark.parametrize("security", [0, 19, 65, -1])
def test_a_statistical_security_that_is_none_is_refused(security):
    with pytest.raises(LocalProtocolError, match=f"20 to 64 bits, got {security}"):
        choose(3, [Need(10, 20)], security)
    choose(3, [Need(10, 20)], 20)


@pytest.mark.parametrize("error", [-1.0, -1e-9, math.inf, -math.inf, math.nan])
def test_an_error_that_is_none_is_refused(error):
    with pytest.raises(LocalProtocolError, match="finite error"):
        Need(10, 20, error)


def test_a_sum_that_is_none_is_refused():
    for dimension in (0, -1):
        with pytest.raises(LocalProtocolError, match=f"expected at least 1 entry, got {dimension}"):
            Need(dimension, 20)
    for bits in (0, 65):
        with pytest.raises(LocalProtocolError, match=f"1 to 64 bits, not {bits}"):
            Need(10, bits)
    with pytest.raises(LocalProtocolError, match="the sums that the parameters must hold, got none"):
        choose(3, [])


@pytest.mark.parametrize(("keys", "holder"), [("holder", None), ("threshold", MEMBER), ("shared", MEMBER)])
def test_a_holder_goes_with_holders_keys_and_with_no_others(keys, holder):
    with pytest.raises(LocalProtocolError, match=f"got {'none' if holder is None else 'trustee'}"):
        Setting(SMALL, keys, holder=holder)


def test_only_sums_of_the_lossy_purpose_are_lossy():
    session, setting = session_of(3), Setting(LARGE, error=64.0, lossy="train", security=33)
    train, other = subject_of(), subject_of()
    other = type(other)("standardize", *(getattr(other, f) for f in other.__struct_fields__[1:]))
    assert setting.packing(session, train) == packing(LARGE, 3, Need(50, 20, 64.0), 33)
    assert setting.packing(session, other) == packing(LARGE, 3, Need(50, 20, 0.0), 33)

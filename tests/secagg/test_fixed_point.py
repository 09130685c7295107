"""Floats in a ring: no bias, nothing over its bound, no sum that wraps, and every refusal says what was wrong."""

import tracemalloc
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from secagg import EmptySum, FixedPoint, HeadroomError, LocalProtocolError, RemoteProtocolError, Stream, plan
from secagg.fixed_point import _BLOCK, _FLOAT32_EXACT, ExactSum

FLOATS = [np.float32, np.float64]


def stream(seed=0):
    return Stream(seed.to_bytes(16, "big"))


def added(encoded, ring):
    total = ring.zeros(len(encoded[0].vector))
    for each in encoded:
        total += each.vector
    return ring.reduce(total)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    ("value", "weight"), [(0.25, 1), (-0.25, 1), (0.9, 1), (-0.999, 3), (1e-3, 1), (-3.14159, 7), (100.7, 1)]
)
def test_rounding_has_no_bias(value, weight, dtype):
    """The mean of 2^18 roundings lies within 5.5 standard errors: a right implementation fails for one key in
    2.6e7 (normal tail, two-sided), and the key is fixed."""
    size, value = 1 << 18, dtype(value)
    fixed = plan(1, 128.0, 8, fraction_bits=1)
    exact = float(value) * weight * 2
    units = fixed.ring.signed(fixed.encode(np.full(size, value), weight, stream(3)).vector[1:])
    assert set(units.tolist()) == {np.floor(exact), np.floor(exact) + 1}
    up = exact - np.floor(exact)
    assert abs(units.mean() - exact) < 5.5 * np.sqrt(up * (1 - up) / size)


@pytest.mark.parametrize("dtype", FLOATS)
def test_values_on_the_grid_are_kept_exactly(dtype):
    fixed = plan(1, 4.0, fraction_bits=6)
    values = (np.arange(-256, 257) / 64).astype(dtype)
    for seed in range(5):
        weight, mean = fixed.decode(fixed.encode(values, 1, stream(seed)).vector)
        assert weight == 1
        assert mean.dtype == np.float64
        assert (mean == values).all()


def test_each_entry_is_rounded_by_its_own_bits():
    fixed = plan(1, 1.0, fraction_bits=0)
    units = fixed.encode(np.full(3 * _BLOCK, 0.5, np.float32), 1, stream()).vector[1:].reshape(3, -1)
    assert not (units[0] == units[1]).all()
    assert not (units[1] == units[2]).all()
    other = fixed.encode(np.full(3 * _BLOCK, 0.5, np.float32), 1, stream(1)).vector[1:].reshape(3, -1)
    assert not (units == other).all()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("word", "rounded"), [(0, [1, 2, -1, 0]), (2**32 - 1, [1, 1, -1, -1])])
def test_the_least_and_the_greatest_random_word_round_as_they_should(word, rounded, dtype):
    """Up with probability exactly the fraction: a whole number never, whatever the bits."""

    class Fixed:
        def fill(self, words):
            words[:] = word

    fixed = plan(1, 4.0, fraction_bits=0)
    vector = fixed.encode(np.array([1.0, 1.0 + 2**-20, -1.0, -(2**-20)], dtype), 1, Fixed()).vector
    assert fixed.ring.signed(vector[1:]).tolist() == rounded


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("weight", [1, 5])
def test_values_over_the_bound_are_clipped_and_counted(dtype, weight):
    fixed = plan(2, 1.5, 5, fraction_bits=8)
    values = np.array([1.5, -1.5, 1.6, -2.0, 1e30, 0.0], dtype)
    encoded = fixed.encode(values, weight, stream())
    assert encoded.clipped == 3
    assert fixed.decode(encoded.vector)[1].tolist() == [1.5, -1.5, 1.5, -1.5, 1.5, 0.0]


def test_values_are_clipped_to_the_bound_itself_and_not_to_the_unit_above_it():
    """The mean of 2^18 roundings of 0.3, within 5.5 standard errors (false alarm 4e-8, and the key is fixed)."""
    fixed = plan(1, 0.3, fraction_bits=0)
    units = fixed.encode(np.full(1 << 18, 3e38, np.float32), 1, stream()).vector[1:]
    assert abs(units.mean() - 0.3) < 5.5 * np.sqrt(0.3 * 0.7 / len(units))


def test_clipped_values_are_counted_over_blocks():
    values = np.zeros(3 * _BLOCK, np.float32)
    values[[0, _BLOCK, _BLOCK + 1, 3 * _BLOCK - 1]] = -9.0
    assert plan(1, 1.0).encode(values, 1, stream()).clipped == 4


@pytest.mark.parametrize("bits", [20, 40])
def test_an_encoded_vector_lies_in_the_ring(bits):
    vector = plan(3, 1.0, fraction_bits=4, ring_bits=bits).encode(np.full(9, -1.0), 1, stream()).vector
    assert (vector[1:] == 2**bits - 16).all()


def test_the_clip_comes_after_the_rounding():
    """float32(0.1) lies above 0.1, so clipping to it in float32 and rounding up would pass the bound of 0.1."""
    fixed = plan(3, 0.1, fraction_bits=30)
    assert float(np.float32(0.1)) * 2**30 > fixed.unit_limit
    for sign in (1, -1):
        vector = fixed.encode(np.full(100, sign * 0.1, np.float32), 1, stream()).vector
        assert set(fixed.ring.signed(vector[1:]).tolist()) == {sign * fixed.unit_limit}


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("at", [0, 7, _BLOCK, 2 * _BLOCK + 3])
def test_a_value_that_is_no_number_is_refused_and_its_index_named(bad, at, dtype):
    values = np.zeros(2 * _BLOCK + 10, dtype)
    values[at] = bad
    with pytest.raises(LocalProtocolError, match=f"entry {at} of the vector is {bad}; nothing was sent"):
        plan(3, 1.0).encode(values, 1, stream())


@pytest.mark.parametrize(
    "values",
    [
        np.zeros(3, np.int64),
        np.zeros(3, np.float16),
        np.zeros(3, np.longdouble),
        np.zeros(3, bool),
        np.zeros(3, complex),
        np.zeros((3, 1), np.float32),
        np.float32(1.0),
        [1.0, 2.0],
        None,
    ],
    ids=["int", "half", "long double", "bool", "complex", "matrix", "scalar", "list", "none"],
)
def test_what_is_no_vector_of_floats_is_refused(values):
    with pytest.raises(LocalProtocolError, match="expected a vector of float32 or float64, got"):
        plan(3, 1.0).encode(values, 1, stream())


@pytest.mark.parametrize("weight", [-1, 11, 2**70])
def test_a_weight_out_of_range_is_refused(weight):
    with pytest.raises(LocalProtocolError, match=f"must be 0 to 10, got {weight}"):
        plan(3, 1.0, 10).encode(np.zeros(3), weight, stream())


@pytest.mark.parametrize("weight", [True, 1.0, "1", None, np.float32(1), np.True_])
def test_a_weight_that_is_no_integer_is_refused(weight):
    with pytest.raises(LocalProtocolError, match="expected an integer weight"):
        plan(3, 1.0, 10).encode(np.zeros(3), weight, stream())


def test_a_numpy_integer_is_a_weight():
    fixed = plan(3, 1.0, 10)
    assert fixed.decode(fixed.encode(np.ones(2), np.int16(10), stream()).vector) == (10, pytest.approx([1.0, 1.0]))


def test_the_weight_is_the_first_entry_and_weight_zero_adds_nothing():
    fixed = plan(3, 1.0, 10, fraction_bits=4)
    vectors = [fixed.encode(np.full(3, x), w, stream()) for x, w in ((1.0, 0), (0.5, 3))]
    assert vectors[0].vector.tolist() == [0, 0, 0, 0]
    assert fixed.decode(added(vectors, fixed.ring)) == (3, pytest.approx([0.5] * 3))


def test_an_empty_vector_carries_its_weight():
    fixed = plan(3, 1.0, 10)
    for dtype in FLOATS:
        encoded = fixed.encode(np.zeros(0, dtype), 4, stream())
        weight, mean = fixed.decode(encoded.vector)
        assert (weight, mean.shape, encoded.clipped) == (4, (0,), 0)


def test_the_callers_values_are_not_changed():
    values = np.array([5.0, 0.3], np.float64)
    plan(3, 1.0).encode(values, 1, stream())
    assert values.tolist() == [5.0, 0.3]


def test_a_strided_vector_is_encoded_like_its_copy():
    fixed, values = plan(3, 1.0), np.linspace(-1, 1, 10)
    strided, copied = (fixed.encode(v, 1, stream()).vector for v in (values[::2], values[::2].copy()))
    assert (strided == copied).all()


@pytest.mark.parametrize("fraction_bits", [22, 23, 24, 30])
def test_float32_values_beyond_24_bits_are_rounded_in_float64(fraction_bits):
    """On both sides of what float32 holds exactly."""
    fixed = plan(1, 1.0, fraction_bits=fraction_bits)
    assert (fixed.unit_limit >= _FLOAT32_EXACT) == (fraction_bits >= 23)
    values = np.array([1.0, -1.0, 1 - 2**-20, 2**-22, -(2**-22)], np.float32)
    assert (fixed.decode(fixed.encode(values, 1, stream()).vector)[1] == values).all()


@pytest.mark.parametrize("dtype", FLOATS)
def test_the_weighting_of_a_float32_loses_no_more_than_float32_does(dtype):
    fixed = plan(1, 1.0, 100, fraction_bits=16)
    values = np.linspace(-1, 1, 1001).astype(dtype)
    mean = fixed.decode(fixed.encode(values, 99, stream()).vector)[1]
    assert np.abs(mean - values).max() <= 2**-16 / 99 + 2**-24


worst = {
    "clients": st.integers(1, 300),
    "units": st.integers(1, 2**30),
    "max_weight": st.integers(1, 1000),
    "fraction_bits": st.integers(0, 20),
}


@settings(deadline=None, max_examples=200)
@given(**worst, sign=st.sampled_from([1, -1]), dtype=st.sampled_from(FLOATS))
def test_the_planned_ring_holds_the_worst_case_and_one_bit_less_is_refused(
    clients, units, max_weight, fraction_bits, sign, dtype
):
    """All participants at the largest value and weight, of one sign."""
    max_value = units / 2**fraction_bits
    assume((clients * units * max_weight).bit_length() < 64)
    assume(units * max_weight <= 2**53)
    fixed = plan(clients, max_value, max_weight, fraction_bits=fraction_bits)
    assert fixed.unit_limit == units
    vector = fixed.encode(np.full(2, sign * max_value, dtype), max_weight, stream()).vector
    total = fixed.ring.reduce(vector * vector.dtype.type(clients))
    weight, mean = fixed.decode(total)
    assert weight == clients * max_weight
    assert (mean == sign * min(max_value, float(dtype(max_value)))).all()  # float32 may have no such value
    with pytest.raises(HeadroomError) as refused:
        plan(clients, max_value, max_weight, fraction_bits=fraction_bits, ring_bits=fixed.ring_bits - 1)
    for number in (clients, max_value, max_weight, fraction_bits, fixed.ring_bits, fixed.ring_bits - 1):
        assert str(number) in str(refused.value)


@settings(deadline=None, max_examples=200)
@given(**worst)
def test_the_planned_ring_is_the_smallest(clients, units, max_weight, fraction_bits):
    assume((clients * units * max_weight).bit_length() < 64)
    assume(units * max_weight <= 2**53)
    fixed = plan(clients, units / 2**fraction_bits, max_weight, fraction_bits=fraction_bits)
    half = 1 << (fixed.ring_bits - 1)
    largest = clients * max_weight * units
    assert largest <= half - 1
    assert largest > half // 2 - 1


@pytest.mark.parametrize(
    ("clients", "max_value", "max_weight", "fraction_bits", "bits"),
    [(100, 4.0, 1000, 16, 36), (1, 1.0, 1, 0, 2), (3, 1.0, 1, 0, 3), (4, 1.0, 1, 0, 4), (512, 2.0**53, 1, 0, 64)],
)
def test_planned_widths(clients, max_value, max_weight, fraction_bits, bits):
    assert plan(clients, max_value, max_weight, fraction_bits=fraction_bits).ring_bits == bits


def test_a_tiny_value_still_leaves_room_for_the_weights():
    fixed = plan(100, 2.0**-40, 10, fraction_bits=0)
    vector = fixed.encode(np.full(1, 2.0**-40), 10, stream()).vector
    assert fixed.decode(fixed.ring.reduce(vector * vector.dtype.type(100)))[0] == 1000


def test_a_sum_beyond_64_bits_is_refused_with_the_numbers():
    with pytest.raises(HeadroomError, match=r"10 clients x largest value 1024.0 x weight 7 x 2\^50.*68 bits, and 64"):
        plan(10, 1024.0, 7, fraction_bits=50)


def test_a_wider_ring_than_needed_may_be_asked_for_up_to_64_bits():
    assert plan(3, 1.0, ring_bits=64).ring_bits == 64
    with pytest.raises(LocalProtocolError):
        plan(3, 1.0, ring_bits=65)


def test_a_hand_made_plan_is_checked_too():
    with pytest.raises(HeadroomError, match="needs a ring of 19 bits, got 18"):
        FixedPoint(3, 1.0, 1, 16, 18)


@pytest.mark.parametrize(
    ("clients", "max_value", "max_weight", "fraction_bits"),
    [
        (0, 1.0, 1, 16),
        (3, 0.0, 1, 16),
        (3, -1.0, 1, 16),
        (3, float("nan"), 1, 16),
        (3, float("inf"), 1, 16),
        (3, 1.0, 0, 16),
        (3, 1.0, 1, -1),
        (3.0, 1.0, 1, 16),
        (True, 1.0, 1, 16),
        (3, 1.0, 1.5, 16),
        (3, 1.0, True, 16),
        (3, 1.0, 1, 16.0),
        (3, 1.0, 1, False),
    ],
)
def test_parameters_that_make_no_sense_are_refused(clients, max_value, max_weight, fraction_bits):
    with pytest.raises(LocalProtocolError, match="expected whole numbers of clients >= 1"):
        plan(clients, max_value, max_weight, fraction_bits=fraction_bits)


@pytest.mark.parametrize("bits", [None, 40, 64])
def test_weights_that_add_up_to_zero_are_an_error(bits):
    fixed = plan(3, 1.0, 10, ring_bits=bits)
    total = added([fixed.encode(np.ones(4), 0, stream(i)) for i in range(3)], fixed.ring)
    with pytest.raises(EmptySum):
        fixed.decode(total)


@pytest.mark.parametrize(
    ("weight", "entry"),
    [(31, 0), (2**20 - 1, 0), (30, 30 * 16 + 1), (30, -30 * 16 - 1), (1, 17), (1, -17), (1, 2**19 - 1), (1, -(2**19))],
)
@pytest.mark.parametrize("bits", [20, 32, 36, 64])
def test_a_sum_that_honest_participants_cannot_make_is_refused(weight, entry, bits):
    fixed = plan(3, 1.0, 10, fraction_bits=4, ring_bits=bits)
    scale = 1 if weight < 2**20 - 1 and abs(entry) < 2**18 else 2 ** (bits - 20)
    total = np.array(
        [v % 2**bits for v in (weight * (scale if weight > 31 else 1), 0, entry * scale)], fixed.ring.dtype
    )
    with pytest.raises(RemoteProtocolError, match="outside its bounds") as caught:
        fixed.decode(total)
    assert caught.value.culprits == frozenset()


@pytest.mark.parametrize("at", [0, _BLOCK - 1, _BLOCK, 2 * _BLOCK + 9])
@pytest.mark.parametrize("bits", [20, 36])
def test_a_long_sum_is_decoded_and_checked_to_its_end(at, bits):
    fixed = plan(3, 1.0, 10, fraction_bits=4, ring_bits=bits)
    sums = np.random.default_rng(0).integers(-480, 481, 2 * _BLOCK + 10)
    total = np.concatenate([[30], sums % fixed.ring.modulus]).astype(fixed.ring.dtype)
    weight, mean = fixed.decode(total)
    assert (weight, mean.dtype, mean.shape) == (30, np.float64, sums.shape)
    assert (mean == sums / 480).all()
    for beyond in (481, fixed.ring.modulus - 481):
        total[1 + at] = beyond
        with pytest.raises(RemoteProtocolError, match="outside its bounds"):
            fixed.decode(total)


def test_decoding_takes_no_memory_of_a_sums_size_but_for_the_mean():
    fixed = plan(3, 1.0, 10, fraction_bits=4)
    total = fixed.ring.zeros(1 + (1 << 21))
    total[0] = 30
    tracemalloc.start()
    mean = fixed.decode(total)[1]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < mean.nbytes + (1 << 22)


@pytest.mark.parametrize("entry", [30 * 16, -30 * 16])
def test_a_sum_just_at_its_bound_is_accepted(entry):
    fixed = plan(3, 1.0, 10, fraction_bits=4)
    total = np.array([30, entry % fixed.ring.modulus], fixed.ring.dtype)
    assert fixed.decode(total) == (30, [entry / (30 * 16)])


@settings(deadline=None, max_examples=60)
@given(
    st.lists(
        st.tuples(st.lists(st.floats(-8, 8, width=32), min_size=3, max_size=3), st.integers(0, 50)),
        min_size=1,
        max_size=8,
    ),
    st.integers(0, 30),
    st.sampled_from(FLOATS),
    st.booleans(),
)
def test_the_mean_is_the_weighted_mean_to_one_unit_a_participant(contributions, fraction_bits, dtype, wide):
    """Each participant's rounding is off by less than one unit, and weighting in float32 by its last bit."""
    total_weight = sum(weight for _, weight in contributions)
    assume(total_weight > 0)
    fixed = plan(len(contributions), 8.0, 50, fraction_bits=fraction_bits, ring_bits=64 if wide else None)
    encoded = [
        fixed.encode(np.array(values, dtype), weight, stream(i)) for i, (values, weight) in enumerate(contributions)
    ]
    weight, mean = fixed.decode(added(encoded, fixed.ring))
    exact = sum(np.array(values, np.float64) * w for values, w in contributions) / total_weight
    assert weight == total_weight
    last_bit = 8 * 2.0**-24 if dtype == np.float32 else 1e-12
    assert np.abs(mean - exact).max() <= len(contributions) * 2.0**-fraction_bits / total_weight + last_bit


@pytest.mark.parametrize(("clients", "units", "weight"), [(2, 2**53 - 3, 1), (1, 2**53, 1), (4, 2**26, 2**27)])
def test_the_largest_value_of_a_wide_ring_is_exact(clients, units, weight):
    fixed = plan(clients, float(units), weight, fraction_bits=0)
    assert fixed.decode(fixed.encode(np.array([fixed.max_value]), weight, stream()).vector)[1] == [units]


@pytest.mark.parametrize(("units", "weight"), [(2**53 - 1, 3), (2**54, 1), (2**27, 2**27)])
def test_what_float64_cannot_round_is_a_headroom_error(units, weight):
    with pytest.raises(HeadroomError, match=r"2\^53"):
        plan(1, float(units), weight, fraction_bits=0)


@pytest.mark.parametrize(("max_value", "fraction_bits"), [(1.0, 2000), (1e308, 16), (2.0**-100, 101)])
def test_a_scale_beyond_any_float_is_a_headroom_error(max_value, fraction_bits):
    with pytest.raises(HeadroomError):
        plan(3, max_value, fraction_bits=fraction_bits)


@pytest.mark.parametrize("fraction_bits", [0, 16, 100])
def test_a_fine_unit_for_tiny_values_is_exact(fraction_bits):
    fixed = plan(1, 2.0**-fraction_bits, fraction_bits=fraction_bits)
    values = np.array([2.0**-fraction_bits, 0.0], np.float32)
    assert (fixed.decode(fixed.encode(values, 1, stream()).vector)[1] == values).all()


units = st.floats(-(2.0**76), 2.0**76, allow_subnormal=False) | st.floats(-1e-6, 1e-6, allow_subnormal=False)


@settings(deadline=None)
@given(st.lists(st.tuples(units, units), min_size=1, max_size=5))
def test_an_exact_sum_is_exact_in_any_unit(contributions):
    exact = ExactSum(len(contributions))
    total = exact.ring.zeros(exact.dimension(2))
    for numbers in contributions:
        total += exact.encode(numbers)
    for sums, numbers in zip(exact.decode(exact.ring.reduce(total)), zip(*contributions, strict=True), strict=True):
        assert abs(sums - sum(map(Fraction, numbers))) <= Fraction(len(numbers), 2**81)


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf"), 2.0**79 / 3])
def test_an_exact_sum_refuses_what_it_cannot_hold(number):
    with pytest.raises(LocalProtocolError, match="number 1 is"):
        ExactSum(3).encode([0.0, number])


def test_the_limbs_of_an_exact_sum_never_wrap():
    exact = ExactSum(1000)
    assert exact.ring.modulus > 1000 * (2**32 - 1)
    total = sum((exact.encode([-(2.0**-80)]) for _ in range(1000)), exact.ring.zeros(5))
    assert exact.decode(total) == [Fraction(-1000, 2**80)]

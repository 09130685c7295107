"""Sums under CKKS: polynomials against whole numbers, ciphertexts against SEAL's own."""

import copy
import math
import os
import pickle
import random
from typing import get_args

import numpy as np
import pytest
import tenseal.sealapi as seal
from hypothesis import given, settings
from hypothesis import strategies as st

from secagg import wire
from secagg.ckks import client, decryption, joint_key, messages, server
from secagg.ckks.params import Need, Setting, choose, ciphertext_deviation
from secagg.ckks.polynomials import (
    ERROR_VARIANCE,
    TERNARY_VARIANCE,
    Chain,
    _context,
    _File,
    arithmetic,
    encryptions_of_zero,
    gaussian,
    small_error,
    ternary,
    uniform,
)
from secagg.errors import BelowThreshold, DecodeError, LocalProtocolError
from secagg.keys import Member
from secagg.masking.params import least_threshold
from secagg.prg import Stream
from secagg.ring import Ring
from tests.fuzz.fuzz import built_in
from tests.secagg.ckks_simulation import (
    ALL_STAGES,
    HOLDER,
    KEYS,
    MODES,
    Play,
    every_departure,
    kept,
    replaced,
    session_of,
    setting_of,
    subject_of,
    through,
    vectors_of,
)
from tests.secagg.simulation import assert_uniform

CHAINS = [Chain(2048, 34, 14), Chain(2048, 40, 14), Chain(4096, 60, 20)]
FIELDS = sorted({(c.degree, m) for c in CHAINS for m in (c.modulus, c.special)})
fields = pytest.mark.parametrize(("degree", "modulus"), FIELDS, ids=str)
SID = bytes(32)


def stream(number=0):
    return Stream(number.to_bytes(16, "big"))


def residues(count, degree, modulus, seed=0):
    return np.random.default_rng(seed).integers(0, modulus, (count, degree), np.uint64)


def negacyclic(a, b, modulus):
    """The product modulo x^N + 1 and the prime. Python multiplies whole numbers whose digits the coefficients are."""
    degree, width = len(a), 20
    a, b = (int.from_bytes(b"".join(int(x).to_bytes(width, "little") for x in each), "little") for each in (a, b))
    raw = (a * b).to_bytes(2 * width * degree, "little")
    full = [int.from_bytes(raw[i : i + width], "little") for i in range(0, len(raw), width)]
    return [(full[i] - full[i + degree]) % modulus for i in range(degree)]


# --- polynomials ---


@fields
@pytest.mark.parametrize("count", [1, 2, 3, 17])
def test_products_are_those_of_whole_numbers(degree, modulus, count):
    field = arithmetic(degree, modulus)
    polynomials, factor = residues(count, degree, modulus), residues(1, degree, modulus, 1)
    before = polynomials.copy()
    got = field.products(polynomials, field.transformed(factor)[0])
    assert (polynomials == before).all()
    assert got.max() < modulus
    for i in {0, count // 2, count - 1}:
        assert got[i].tolist() == negacyclic(polynomials[i], factor[0], modulus)


@fields
def test_the_highest_residues_multiply_too(degree, modulus):
    field, most = arithmetic(degree, modulus), np.full((2, degree), modulus - 1, np.uint64)
    assert field.products(most, field.transformed(most)[0])[1].tolist() == negacyclic(most[1], most[0], modulus)


def test_x_to_the_n_is_minus_one():
    field = arithmetic(2048, FIELDS[0][1])
    x = np.zeros((1, 2048), np.uint64)
    x[0, 1] = 1
    last = np.zeros((1, 2048), np.uint64)
    last[0, -1] = 5
    got = field.products(last, field.transformed(x)[0])[0]
    assert field.centred(got).tolist() == [-5] + [0] * 2047


@fields
def test_a_product_of_transforms_is_the_transform_of_the_product(degree, modulus):
    field = arithmetic(degree, modulus)
    polynomials, factor = residues(3, degree, modulus), residues(1, degree, modulus, 1)
    transformed = field.transformed(factor)[0]
    pointwise = field.scaled(field.transformed(polynomials), transformed)
    assert (pointwise == field.transformed(field.products(polynomials, transformed))).all()
    a, b = field.transformed(polynomials)[0], transformed
    assert pointwise[0].tolist() == [int(x) * int(y) % modulus for x, y in zip(a, b, strict=True)]


@fields
def test_zero_rows_stay_zero_and_change_no_others(degree, modulus):
    field = arithmetic(degree, modulus)
    factor = field.transformed(residues(1, degree, modulus, 1))[0]
    for zero in ([0], [1, 3], range(40)):
        polynomials = residues(40, degree, modulus)
        expected = field.products(polynomials, factor)
        polynomials[list(zero)] = 0
        expected[list(zero)] = 0
        assert (field.products(polynomials, factor) == expected).all()
        assert (field.transformed(polynomials)[list(zero)] == 0).all()
    assert field.products(np.zeros((0, degree), np.uint64), factor).shape == (0, degree)


@fields
def test_signed_numbers_are_embedded_and_come_back(degree, modulus):
    half = modulus // 2
    field, values = arithmetic(degree, modulus), np.array([0, 1, -1, half, -half, half - 1, 1 - half])
    embedded = field.embed(values)
    assert embedded.tolist() == [int(v) % modulus for v in values]
    assert field.centred(embedded).tolist() == values.tolist()


@fields
def test_addition_is_modulo_the_prime(degree, modulus):
    field, (a, b) = arithmetic(degree, modulus), residues(2, degree, modulus)
    a[:4], b[:4] = [0, modulus - 1, modulus - 1, 1], [0, modulus - 1, 1, modulus - 1]
    total = a.copy()
    field.add(total, b)
    assert total.tolist() == [(int(x) + int(y)) % modulus for x, y in zip(a, b, strict=True)]


@fields
def test_uniform_polynomials_are_below_the_prime_and_uniform(degree, modulus):
    drawn = np.concatenate([uniform(stream(i), degree, modulus) for i in range(8)])
    assert drawn.shape == (8 * degree,)
    assert drawn.max() < modulus
    assert_uniform(drawn.astype(float) * 16 // modulus, 16)
    assert_uniform(drawn & np.uint64(15), 16)
    assert (uniform(stream(), degree, modulus) == drawn[:degree]).all()


def test_secrets_are_ternary_with_equal_chances():
    drawn = ternary(stream(), 1 << 16)
    assert set(drawn.tolist()) == {-1, 0, 1}
    assert_uniform(drawn + 1, 3)
    assert_uniform((drawn[::2] + 1) * 3 + drawn[1::2] + 1, 9)
    assert np.square(drawn).mean() == pytest.approx(TERNARY_VARIANCE, rel=0.02)


def test_small_errors_are_centred_binomial():
    size = 1 << 16
    drawn = small_error(stream(1), size)
    assert np.abs(drawn).max() <= 21
    # 5 standard errors of the mean, the variance and the fourth moment.
    assert abs(drawn.mean()) < 5 * math.sqrt(ERROR_VARIANCE / size)
    assert drawn.var() == pytest.approx(ERROR_VARIANCE, rel=5 * math.sqrt(2 / size))
    counts = np.bincount(drawn + 21, minlength=43)
    expected = [size * math.comb(42, k) / 2**42 for k in range(43)]
    assert sum((c - e) ** 2 / e for c, e in zip(counts, expected, strict=True) if e > 20) < 60


@pytest.mark.parametrize("deviation", [50.0, 2.0**20, 2.0**45])
@pytest.mark.parametrize("size", [1 << 16, (1 << 16) - 1])
def test_flooding_is_gaussian(deviation, size):
    """Keys are fixed; a right implementation fails for one in a million."""
    drawn = gaussian(stream(2), deviation, size)
    assert drawn.shape == (size,)
    scaled = drawn / deviation
    assert abs(scaled.mean()) < 5 / math.sqrt(size)
    assert scaled.var() == pytest.approx(1, rel=5 * math.sqrt(2 / size))
    assert (scaled**4).mean() == pytest.approx(3, abs=5 * math.sqrt(96 / size))
    normal = np.vectorize(lambda x: math.erfc(-x / math.sqrt(2)) / 2)
    if deviation > 1000:  # or else whole numbers are seen to be such
        assert_uniform(np.floor(normal(scaled) * 16).clip(0, 15), 16)
    half = size // 2
    assert abs(np.corrcoef(scaled[:half], scaled[-half:])[0, 1]) < 5 / math.sqrt(half)
    assert abs(np.corrcoef(scaled[:half] ** 2, scaled[-half:] ** 2)[0, 1]) < 5 / math.sqrt(half)


# --- encryption ---


class Keys:
    """Secrets of some participants, and their joint key, as coefficients and in the protocol's form."""

    def __init__(self, chain, n):
        self.chain, self.session = chain, session_of(max(3, n), "semi-honest")
        self.sid, self.seeds = self.session.id, {u: bytes([u + 1]) * 32 for u in range(n)}
        shares = {u: joint_key.key_share(chain, self.sid, u, seed, SID) for u, seed in self.seeds.items()}
        self.joint = joint_key.joined(chain, self.session, SID, shares)
        self.secret = sum(joint_key._secret_and_error(chain, self.sid, u, seed)[0] for u, seed in self.seeds.items())

    def phase(self, ciphertext):
        field = arithmetic(self.chain.degree, self.chain.modulus)
        phase = field.products(ciphertext[1:], field.transformed(field.embed(self.secret)[None])[0])
        field.add(phase, ciphertext[:1])
        return field.centred(phase[0])


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("chain", CHAINS, ids=str)
def test_the_noise_of_encryptions_is_as_predicted(chain, n):
    """Of n of them, added. SEAL draws anew each time: 16 sums are off by 10% once in 10^9."""
    keys, field = Keys(chain, n), arithmetic(chain.degree, chain.modulus)
    fresh, phases = encryptions_of_zero(chain, keys.joint.public, 16 * n), []
    for _ in range(16):
        total = np.zeros((2, chain.degree), np.uint64)
        for _ in range(n):
            field.add(total, next(fresh))
        phases.append(keys.phase(total))
    noise = np.concatenate(phases)
    assert noise.std() == pytest.approx(ciphertext_deviation(chain, n), rel=0.1)
    assert abs(noise.mean()) < 6 * noise.std() / math.sqrt(noise.size)
    # The length that the flooding is computed from.
    lengths = [np.linalg.norm(phase.astype(float)) for phase in phases]
    assert max(lengths) < 1.1 * math.sqrt(chain.degree) * ciphertext_deviation(chain, n)


def test_no_encryption_is_another():
    chain = CHAINS[0]
    keys = Keys(chain, 1)
    drawn = list(encryptions_of_zero(chain, keys.joint.public, 20))
    assert len({each.tobytes() for each in drawn}) == 20
    assert_uniform((np.stack(drawn)[:, 1] * 16.0 // chain.modulus).reshape(-1), 16)


def test_a_key_share_is_minus_a_times_the_secret_and_the_error():
    chain, seed = CHAINS[0], b"\7" * 32
    packed = joint_key.key_share(chain, SID, 2, seed, b"\3" * 32)
    secret, error = joint_key._secret_and_error(chain, SID, 2, seed)
    at = Ring(chain.bits).packed_size(2048)
    for part, (a, bits, modulus) in zip(
        (packed[:at], packed[at:]), joint_key._common(chain, SID, b"\3" * 32), strict=True
    ):
        field, b = arithmetic(2048, modulus), Ring(bits).unpack(part, 2048).astype(np.uint64)
        transformed = field.transformed(np.stack([field.embed(secret), field.embed(error)]))
        for i in range(0, 2048, 97):
            assert int(b[i]) == (int(transformed[1][i]) - int(a[i]) * int(transformed[0][i])) % modulus
    assert np.abs(error).max() <= 21


def seal_ckks(chain):
    parameters = seal.EncryptionParameters(seal.SCHEME_TYPE.CKKS)
    parameters.set_poly_modulus_degree(chain.degree)
    parameters.set_coeff_modulus([seal.Modulus(chain.modulus), seal.Modulus(chain.special)])
    return seal.SEALContext(parameters, True, seal.SEC_LEVEL_TYPE.TC128)


@pytest.mark.parametrize("chain", [Chain(2048, 38, 14), *CHAINS[1:]], ids=str)
def test_seals_own_ckks_decrypts_our_ciphertexts(chain):
    """Its Decryptor, with its SecretKey that holds our secret, in a context of the CKKS scheme with our primes."""
    degree, keys, context = chain.degree, Keys(chain, 1), seal_ckks(chain)
    setting, subject = Setting(chain, "threshold"), subject_of(60, Ring(8))
    layout, vector = setting.packing(keys.session, subject), vectors_of(1, 60, Ring(8), 3)[0]
    ours = client.encrypt(client.outside(keys.session, 0), keys.joint, setting, subject, vector)
    ciphertext = np.stack(
        [layout.ring.unpack(half, degree).astype(np.uint64).reshape(degree) for half in (ours.first, ours.second)]
    )
    generator, public = seal.KeyGenerator(context), seal.PublicKey()
    generator.create_public_key(public)
    both = [arithmetic(degree, modulus) for modulus in (chain.modulus, chain.special)]
    with _File() as file:
        secret, loaded = generator.secret_key(), seal.SecretKey()
        prefix, _ = file.read(secret, 2 * degree)
        file.load(loaded, context, prefix, np.stack([f.transformed(f.embed(keys.secret)[None])[0] for f in both]))
        template, taken, plain = seal.Ciphertext(context), seal.Ciphertext(), seal.Plaintext()
        seal.Encryptor(context, public).encrypt_zero(template)
        prefix, _ = file.read(template, 2 * degree)
        file.load(taken, context, prefix, both[0].transformed(ciphertext))
        seal.Decryptor(context, loaded).decrypt(taken, plain)
        assert taken.size() == 2
        phase = file.read(plain, degree)[1]
    assert (phase == both[0].transformed(both[0].embed(keys.phase(ciphertext))[None])[0]).all()
    scale_times_message = layout.encode(vector)[0]
    assert np.abs(keys.phase(ciphertext) - scale_times_message).max() < 8 * ciphertext_deviation(chain, 1)
    assert (layout.decode(both[0].embed(keys.phase(ciphertext))[None]) == vector).all()


def test_a_context_that_seal_refuses_is_refused():
    with pytest.raises(LocalProtocolError, match="SEAL refuses these parameters"):
        _context(2048, [seal.Modulus(12289 * 5 + 2)])


class Saved:
    """What a build of SEAL that compresses in another way would write."""

    def save(self, path):
        with open(path, "wb") as file:
            file.write(b"\x5e\xa1\x10\4\3\1\0\0" + (32).to_bytes(8, "little") + bytes(16))


def test_an_unknown_compression_is_refused():
    with _File() as file, pytest.raises(LocalProtocolError, match="compresses in a way that is not known here: 1"):
        file.read(Saved(), 2)


def test_a_file_in_memory_that_is_cut_short_is_not_read(monkeypatch):
    field = arithmetic(2048, CHAINS[0].modulus)
    monkeypatch.setattr(os, "pwritev", lambda *_: 100)
    with pytest.raises(LocalProtocolError, match=r"wrote 100 of .* bytes to a file in memory: is memory short"):
        field.transformed(residues(2, 2048, CHAINS[0].modulus))


# --- whole sums ---


@pytest.mark.parametrize("keys", KEYS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("n", [3, 4, 5])
def test_nobody_leaves(n, mode, keys):
    opened = Play(n, mode, keys).play()
    assert opened.exact()
    assert opened.server.contributors == frozenset(range(n))
    assert opened.server.suspects == frozenset()


def departures(n, mode, keys):
    """Every assignment of "leaves at this stage, or never" to those who take part."""
    first = Play(n, mode, keys)
    least = least_threshold(n, mode)
    stages, people = first.stages, n + (keys == "holder")
    opened = covered = 0
    for game, answered, error in every_departure(first):
        if keys != "threshold" and game.stage == "Decrypt":
            needed = 1  # of those asked, of whom there is one
        elif keys == "holder" and game.stage == "AdvertiseKeys":
            needed = 1
        else:
            needed = least
        if error is None:
            opened += 1
            assert game.exact()
            assert len(game.server.contributors) >= least
            assert game.server.suspects == frozenset()
        else:
            assert len(answered) < needed
            assert (error.present, error.needed) == (len(answered), needed)
            assert error.stage.startswith(game.stage)
        if keys == "threshold":
            # Who answered here may leave at any later stage or never. Where none is missing, none is asked to Recover.
            at = len(stages) - 1 if game.stage is None else stages.index(game.stage)
            came = answered if game.stage is not None or at == len(stages) - 1 else frozenset(range(people))
            if error is not None:
                covered += (len(stages) - at) ** len(came)
            elif game.heard[-1][0] == "Decrypt":
                covered += 2 ** len(answered)
            else:
                covered += 1
    assert opened >= 1
    if keys == "threshold":
        assert covered == (len(stages) + 1) ** n


EVERYDAY = [(3, m, k) for m in MODES for k in KEYS] + [(4, m, k) for m in MODES for k in KEYS]
EVERYDAY += [(5, "active", "holder"), (5, "semi-honest", "holder"), (5, "active", "threshold")]
LONG = [(5, m, k) for m in MODES for k in KEYS if (5, m, k) not in EVERYDAY]


@pytest.mark.parametrize(("n", "mode", "keys"), EVERYDAY)
def test_every_combination_of_departures_gives_the_exact_sum_or_below_threshold(n, mode, keys):
    departures(n, mode, keys)


@pytest.mark.slow
@pytest.mark.parametrize(("n", "mode", "keys"), LONG)
def test_every_combination_of_five_departures_gives_the_exact_sum_or_below_threshold(n, mode, keys):
    departures(n, mode, keys)


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_contributors_are_those_who_uploaded_and_their_sum_is_exact(data):
    mode, n = data.draw(st.sampled_from(MODES)), data.draw(st.integers(3, 7))
    threshold = data.draw(st.integers(least_threshold(n, mode), n))
    game = Play(n, mode, threshold=threshold, seed=data.draw(st.binary(min_size=4, max_size=4)))
    gone = data.draw(st.sets(st.integers(0, n - 1), max_size=3))
    leaves = {u: data.draw(st.sampled_from(game.stages)) for u in gone}
    last = (
        "Recover"
        if any(stage not in ("AdvertiseKeys", "ShareKeys", "RevealKey", "Recover") for stage in leaves.values())
        else "Decrypt"
    )
    staying = n - sum(ALL_STAGES.index(stage) <= ALL_STAGES.index(last) for stage in leaves.values())
    if staying < threshold:
        with pytest.raises(BelowThreshold):
            game.play(leaves=leaves)
        return
    assert game.play(leaves=leaves).exact()
    sent = ALL_STAGES.index("EncryptedInput")
    assert game.server.contributors == {u for u in range(n) if u not in leaves or ALL_STAGES.index(leaves[u]) > sent}


def play_in(bits, dimension=50, n=3, error=0.0, keys="threshold", mode="semi-honest"):
    ring = Ring(bits)
    return Play(
        n,
        mode,
        keys,
        setting=setting_of(n, keys, error, bits, dimension),
        subject=subject_of(dimension, ring),
        vectors=vectors_of(n, dimension, ring),
    )


@pytest.mark.parametrize("bits", [4, 20, 26, 32, 33, 48, 63, 64])
def test_the_sum_is_exact_in_every_ring(bits):
    opened = play_in(bits).play()
    assert opened.exact()
    assert opened.server.total.dtype == Ring(bits).dtype


@pytest.mark.parametrize("keys", KEYS)
def test_a_vector_of_many_ciphertexts_sums_exactly(keys):
    game = play_in(26, 9001, keys=keys, mode="active").play()
    assert game.exact()


@pytest.mark.parametrize("n", [3, 5])
def test_a_lossy_sum_is_within_its_error(n):
    game = play_in(26, 5000, n, error=4096.0).play()
    ring, total = game.ring, sum(v.astype(np.int64) for v in game.vectors)
    off = ring.signed(ring.reduce(game.server.total - total.astype(ring.dtype)))
    assert off[0] == 0
    assert 0 < np.abs(off).max() <= 4096


def at_the_phase(game):
    """Opened but not decoded: the noise of every coefficient, shape [ciphertexts, N]."""
    game.play("Decrypt")
    for u in game.outbox:
        game.receive(u, game.answer(u))
    layout = game.server.layout
    phase = arithmetic(layout.chain.degree, layout.chain.modulus).centred(game.server.first)
    total = layout.encode(sum(game.vectors).astype(game.ring.dtype))
    if layout.digits > 1:
        total = sum(layout.encode(v) for v in game.vectors)
    return phase - total, layout


@pytest.mark.parametrize("keys", KEYS)
@pytest.mark.parametrize("n", [3, 5])
def test_a_sum_is_opened_with_the_noise_that_was_promised(n, keys):
    """As deep as computed and never beyond the bound; at least 3 ciphertexts: off by 8% once in 10^9."""
    noise, layout = at_the_phase(play_in(26, 9001, n, keys=keys))
    floods = n if keys == "threshold" else 1
    assert noise.size >= 3 * 2048
    assert noise.std() == pytest.approx(math.sqrt(floods) * layout.deviation, rel=0.08)
    assert noise.std(axis=1).min() > 0.85 * math.sqrt(floods) * layout.deviation
    assert np.abs(noise).max() < layout.bound
    assert np.abs(noise).max() > 2.5 * layout.deviation


def noise_of(game, second, packed, seed):
    """In the partial decryption of `second` with the secret of participant 0."""
    layout = game.server.layout
    field, modulus = arithmetic(layout.chain.degree, layout.chain.modulus), layout.chain.modulus
    partial = layout.ring.unpack(packed, second.size).astype(object).reshape(second.shape)
    exact = field.products(second, joint_key.secret_key(layout.chain, game.session.id, {0: seed}))
    return field.centred(((partial - exact.astype(object)) % modulus).astype(np.uint64)).astype(float).reshape(-1)


def test_one_participants_noise_is_as_deep_as_the_whole_flooding():
    """So that it protects its key whatever the others add."""
    game = Play(3).play("Decrypt")
    seed = game.states[0].seed
    noise = noise_of(game, game.server.second, game.answer(0).packed, seed)
    assert noise.std() == pytest.approx(game.server.layout.deviation, rel=0.1)


def test_the_order_of_arrival_changes_nothing():
    for mode in MODES:
        game = Play(5, mode)
        while game.stage is not None:
            replies = {u: game.answer(u) for u in game.outbox if not (u == 2 and game.stage == "Decrypt")}
            for u in random.Random(7).sample(sorted(replies), len(replies)):
                game.receive(u, replies[u])
            game.close()
            for message in list(game.outbox.values())[:1]:
                for field in message.__struct_fields__:
                    if isinstance(listed := getattr(message, field), dict):
                        assert list(listed) == sorted(listed)
        assert game.exact()


@pytest.mark.parametrize(
    "vector",
    [
        np.zeros(49, np.uint32),
        np.zeros(50, np.uint64),
        np.zeros(50, np.int32),
        np.zeros((50, 1), np.uint32),
        np.zeros(100, np.uint32)[::2],
        [0] * 50,
    ],
    ids=["short", "wider", "signed", "matrix", "strided", "list"],
)
def test_a_vector_of_another_shape_or_type_is_refused(vector):
    game = Play(3).play("CommitInput")
    game.vectors = [vector] * 3
    with pytest.raises(LocalProtocolError, match="expected"):
        game.answer(0)


def test_a_callers_vector_is_left_alone():
    game = Play(3)
    before = copy.deepcopy(game.vectors)
    game.play()
    assert all((a == b).all() for a, b in zip(before, game.vectors, strict=True))


@pytest.mark.parametrize("keys", KEYS)
def test_a_sum_that_does_not_fit_the_parameters_is_not_begun(keys):
    game = Play(3, keys=keys).play("CommitInput")
    with pytest.raises(Exception, match="does not fit"):
        server.begin_sum(game.agreed, subject_of(1 << 20, Ring(64)))


# --- answering again ---


@pytest.mark.parametrize("mode", MODES)
def test_what_is_answered_again_from_the_same_state_is_the_same(mode):
    """All but the encryption itself, which is made once and kept until the sum is over."""
    game = Play(3, mode)
    while game.stage is not None:
        if game.stage not in ("AdvertiseKeys", "ShareKeys", "CommitInput") and not (
            game.stage == "EncryptedInput" and mode == "semi-honest"
        ):
            for u in game.outbox:
                assert wire.encode(game.fork().answer(u)) == wire.encode(game.fork().answer(u))
        for u in game.outbox:
            if not (u == 1 and game.stage == "Decrypt" and mode == "semi-honest"):
                game.receive(u, game.answer(u))
        game.close()
    assert game.exact()


def test_another_sum_is_decrypted_with_other_noise():
    """From the same state: the difference of two answers is not c1 - c1' times the secret."""
    game = Play(4, "semi-honest").play("Decrypt")
    shown, seed, layout = game.outbox[0], game.states[0].seed, game.server.layout

    def noise(second):
        request = replaced(shown, second=memoryview(layout.ring.pack(second.reshape(-1))))
        return noise_of(game, second, game.fork().answer(0, request).packed, seed)

    second = game.server.second
    other = second.copy()
    other[0, 0] = (int(other[0, 0]) + 1) % layout.chain.modulus
    one, again, two = noise(second), noise(second), noise(other)
    assert (one == again).all()
    assert one.std() == pytest.approx(layout.deviation, rel=0.1)
    assert (one - two).std() == pytest.approx(math.sqrt(2) * layout.deviation, rel=0.1)
    assert abs(np.corrcoef(one, two)[0, 1]) < 0.12


# --- what is hashed and signed ---


def test_what_is_hashed_differs_with_everything_that_goes_in():
    a, b = bytes(32), b"\1" * 32
    digests = [
        *(joint_key.seed_digest(*each) for each in ((a, a, 0), (b, a, 0), (a, b, 0), (a, a, 1))),
        *(joint_key.share_digest(*each) for each in ((a, a, 0), (b, a, 0), (a, b, 0), (a, a, 1))),
        *(
            joint_key.upload_digest(*each)
            for each in (
                (a, 0, a, a, a),
                (b, 0, a, a, a),
                (a, 1, a, a, a),
                (a, 0, b, a, a),
                (a, 0, a, b, a),
                (a, 0, a, a, b),
            )
        ),
        *(
            joint_key.key_id(*each)
            for each in (
                (a, a, {0: a}),
                (b, a, {0: a}),
                (a, b, {0: a}),
                (a, a, {1: a}),
                (a, a, {0: b}),
                (a, a, {0: a, 1: a}),
            )
        ),
        *(joint_key.uploads_payload(*each) for each in ((a, {0: a}), (b, {0: a}), (a, {1: a}), (a, {0: b}))),
    ]
    assert len(set(digests)) == len(digests)
    assert joint_key.key_id(a, a, {0: a, 1: b}) == joint_key.key_id(a, a, {1: b, 0: a})
    assert joint_key.uploads_payload(a, {0: a, 1: b}) == joint_key.uploads_payload(a, {1: b, 0: a})


def test_secrets_are_bound_to_session_participant_and_seed():
    chain, a, b = CHAINS[0], bytes(32), b"\1" * 32
    drawn = [
        joint_key._secret_and_error(chain, *each)[0].tobytes() for each in ((a, 0, a), (b, 0, a), (a, 1, a), (a, 0, b))
    ]
    assert len(set(drawn)) == 4


def test_common_polynomials_are_bound_to_the_directory_and_the_session():
    chain = CHAINS[0]
    drawn = [
        [part.tobytes() for part, _, _ in joint_key._common(chain, *each)]
        for each in ((SID, SID), (b"\1" * 32, SID), (SID, b"\1" * 32))
    ]
    assert len({first for first, _ in drawn}) == len({second for _, second in drawn}) == 3
    directory = Play(3).play("ShareKeys").outbox[0]
    other = replaced(directory, keys={v: directory.keys[v] for v in (0, 1)})
    ids = {joint_key.uniform_id(d, sid) for d in (directory, other) for sid in (SID, b"\1" * 32)}
    assert len(ids) == 4


# --- decoding ---


def everything_said():
    """Kind to the bytes of some messages of that kind, and of states."""
    said = {}
    for keys in KEYS:
        for mode in MODES:
            game = Play(4, mode, keys)
            while game.stage is not None:
                for u in list(game.outbox):
                    if u == 3 and game.stage == "Decrypt":
                        continue
                    answer, request = game.answer(u), game.outbox[u]
                    game.receive(u, answer)
                    for each in (answer, request, game.states[u]):
                        if each is not None:
                            said.setdefault(type(each), {})[wire.encode(each)] = None
                game.close()
    return {kind: list(found)[:6] for kind, found in said.items()}


def test_changed_messages_and_states_decode_or_are_refused():
    """Whatever the bytes: a message that encodes to them, or a `DecodeError`."""
    said = everything_said()
    top = {kind for kind in vars(messages).values() if isinstance(kind, type) and kind.__module__ == messages.__name__}
    assert top - said.keys() == {messages.Commitment, messages.HalfUpload}  # which are only in others
    for kind, seeds in said.items():

        def target(data, kind=kind):
            try:
                value = kept_or_held(data, kind)
            except DecodeError:
                return
            assert wire.encode(value) == data

        for seed in seeds:
            kept_or_held(seed, kind)
        built_in(target, seeds, inputs=300)


@pytest.mark.parametrize("size", [0, 56, 58])
def test_a_box_of_another_length_is_refused(size):
    sent = Play(3).play("ShareKeys").answer(0)
    inbox = Play(3).play("RevealKey").outbox[0]
    for message in (sent, inbox):
        assert {len(box) for box in message.boxes.values()} == {57}
        with pytest.raises(DecodeError, match="length"):
            through(replaced(message, boxes={**message.boxes, 1: bytes(size)}))


def test_lists_and_shares_of_a_key_are_no_longer_than_they_can_be():
    terms, most = session_of(3).terms, 1 << 16
    for make in (
        lambda size: messages.KeyShare(terms, bytes(size)),
        lambda size: messages.KeyShares({0: bytes(size)}),
        lambda size: messages.HolderKey(terms, bytes(32), bytes(size), b""),
        lambda size: messages.Missing((1,) * size),
        lambda size: messages.Aggregate((1,) * size, memoryview(b"")),
    ):
        assert through(make(most)) == make(most)
        with pytest.raises(DecodeError, match="length"):
            through(make(most + 1))


def kept_or_held(data, kind):
    return client.decode_state(data) if kind in get_args(client.ClientState) else wire.decode(data, kind)


# --- states ---


def all_states():
    """One of each, of a participant and of the holder, with the secrets in it."""
    found = {}
    for keys in KEYS:
        for mode in MODES:
            game = Play(4, mode, keys)
            while game.stage is not None:
                for u in list(game.outbox):
                    if u == 3 and game.stage == "Decrypt" and keys == "threshold":
                        continue
                    game.receive(u, game.answer(u))
                    found[keys, mode, type(game.states[u]).__name__] = game.states[u]
                game.close()
    return found


def test_states_encode_decode_and_hide_what_they_hold():
    states = all_states()
    kinds = {name for _, _, name in states}
    assert kinds == {
        "Advertised", "Shared", "Revealed", "Encrypted", "Confirmed", "Uploaded", "Answered", "Finished", "Holding"
    }  # fmt: skip
    for (_, _, name), state in states.items():
        assert repr(state) == str(state) == f"{name}(...)"
        assert state.__rich_repr__() == []
        for dump in (pickle.dumps, copy.deepcopy):
            with pytest.raises(LocalProtocolError, match="do not pickle"):
                dump(state)
        if name == "Holding":
            assert through(state) == state
            with pytest.raises(DecodeError):
                kept(state)
        else:
            assert kept(state) == state


def test_no_other_bytes_are_a_state():
    state = wire.encode(Play(3).play("ShareKeys").states[0])
    for data in (b"", state[:-1], state + b"\0", b"\2" + state[1:], wire.encode(subject_of())):
        with pytest.raises(DecodeError):
            client.decode_state(data)


@pytest.mark.parametrize("mode", MODES)
def test_a_state_drops_the_secrets_that_are_spent(mode):
    game = Play(4, mode).play("ShareKeys")
    spent = [game.states[0].channel_secret]
    game.play("RevealKey")
    assert not any(secret in wire.encode(game.states[0]) for secret in spent)
    spent += game.states[0].inbound_keys.values()
    game.play("Decrypt")
    assert not any(secret in wire.encode(game.states[0]) for secret in spent)
    spent += [game.states[0].seed, game.states[0].flood]
    game.play("Recover", {3: "Decrypt"})
    assert isinstance(game.states[0], client.Answered)
    assert not any(secret in wire.encode(game.states[0]) for secret in spent)
    spent += game.states[0].held.values()
    game.play()
    assert isinstance(game.states[0], client.Finished)
    assert not any(secret in wire.encode(game.states[0]) for secret in spent)


def test_an_upload_is_gone_from_the_state_that_sent_it():
    game = Play(3, vectors=vectors_of(3)).play("EncryptedInput")
    second = game.states[0].encrypted.second
    assert second in wire.encode(game.states[0])
    game.play("Decrypt")
    assert second not in wire.encode(game.states[0])


@pytest.mark.parametrize("bad", [-1, 3])
def test_a_participant_off_the_roster_cannot_begin(bad):
    with pytest.raises(LocalProtocolError, match="not on a roster"):
        client.advertise(session_of(3), bad, HOLDER, bytes)


def test_a_participant_with_another_identity_than_the_rosters_cannot_begin():
    with pytest.raises(LocalProtocolError, match="another key"):
        client.advertise(session_of(3), 0, HOLDER, bytes)


def test_an_answer_is_bound_to_what_was_decrypted():
    game = Play(3).play("Decrypt")
    shown = game.outbox[0]
    assert game.fork().answer(0).digest == game.server.digest
    other = Play(3, seed=b"other").play("Decrypt")
    assert other.server.digest != game.server.digest
    game = Play(4, "semi-honest").play("Decrypt")
    shown = game.outbox[0]
    one = game.server.layout.ring.pack((game.server.second ^ np.uint64(1)).reshape(-1))
    assert game.fork().answer(0, replaced(shown, second=memoryview(one))).digest != game.server.digest


def test_who_may_upload():
    session = session_of(4)
    assert decryption.uploaders(session, (0, 2, 3)) == {0, 2, 3}
    assert decryption.uploaders(session, (4,)) == {0, 1, 2, 3}


def test_choose_and_play_agree_for_a_holder_of_another_name():
    setting = Setting(choose(3, [Need(50, 20)]), "holder", holder=Member("someone", HOLDER.public))
    assert Play(3, keys="holder", setting=setting).play().exact()

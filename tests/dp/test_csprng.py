"""Every statistical test here runs on fixed entropy, so it cannot flake.

Its level says how surprising a failure would be if the entropy were changed.
"""

import copy
import pickle

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from dp import Csprng, ParameterError
from tests.dp.entropy import fixed_entropy

LEVEL = 1e-6  # chance of a false alarm per test, over the choice of the entropy


def test_stream_is_aes256_ctr_of_the_entropy():
    key = fixed_entropy("vector")(32)
    expected = Cipher(algorithms.AES256(key), modes.CTR(bytes(16))).encryptor().update(bytes(80))
    generator = Csprng(lambda n: key[:n])
    came = np.concatenate([generator.uint64(3), generator.uint64(0), generator.uint64(7)])
    assert came.dtype == np.uint64
    assert came.astype("<u8").tobytes() == expected


def test_fips_197_block():
    """FIPS 197, appendix C.3, with the counter block as plaintext."""
    key = bytes(range(32))
    encryptor = Cipher(algorithms.AES256(key), modes.CTR(bytes.fromhex("00112233445566778899aabbccddeeff"))).encryptor()
    assert encryptor.update(bytes(16)).hex() == "8ea2b7ca516745bfeafc49904b496089"


@pytest.mark.parametrize("wrong", [b"", bytes(31), bytes(33), "x" * 32, None])
def test_short_entropy_is_refused(wrong):
    with pytest.raises(ParameterError, match="should give 32 bytes"):
        Csprng(lambda _: wrong)


def test_it_never_shows_or_copies_its_secret():
    generator = Csprng(fixed_entropy("secret"))
    assert repr(generator) == "Csprng(<secret>)"
    for duplicate in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(ParameterError, match="neither pickled nor copied"):
            duplicate(generator)


def test_negative_count():
    with pytest.raises(ParameterError, match="at least 0"):
        Csprng(fixed_entropy("n")).uint64(-1)


def test_bytes_are_uniform():
    words = Csprng(fixed_entropy("bytes")).uint64(200_000)
    counts = np.bincount(words.view(np.uint8), minlength=256)
    assert stats.chisquare(counts).pvalue > LEVEL


def test_uniform_is_uniform_and_open():
    u = Csprng(fixed_entropy("uniform")).uniform(200_000)
    assert u.dtype == np.float64
    assert stats.kstest(u, "uniform").pvalue > LEVEL


@pytest.mark.parametrize(("word", "value"), [(0, 2.0**-53), (2**64 - 1, 1 - 2.0**-53), (2**63, 0.5 + 2.0**-53)])
def test_uniform_never_reaches_its_ends(monkeypatch, word, value):
    monkeypatch.setattr(Csprng, "uint64", lambda _self, n: np.full(n, word, dtype=np.uint64))
    generator = Csprng(fixed_entropy("ends"))
    assert generator.uniform(1)[0] == value
    assert np.isfinite(generator.gaussian(1)[0])


def test_gaussian_is_normal():
    z = Csprng(fixed_entropy("gaussian")).gaussian(200_001)
    assert z.dtype == np.float64
    assert stats.kstest(z, "norm").pvalue > LEVEL
    # Kolmogorov-Smirnov is blind in the tails.
    beyond = int((np.abs(z) > 3.5).sum())
    assert stats.binomtest(beyond, len(z), 2 * stats.norm.sf(3.5)).pvalue > LEVEL
    assert abs(np.corrcoef(z[:-1], z[1:])[0, 1]) < 5 / np.sqrt(len(z))


@given(p=st.sampled_from([0.001, 0.25, 1 / 3, 0.5, 0.999]), label=st.integers(0, 50))
def test_bernoulli_has_its_rate(p, label):
    heads = int(Csprng(fixed_entropy(f"coin {label}")).bernoulli(20_000, p).sum())
    assert stats.binomtest(heads, 20_000, p).pvalue > LEVEL / 250


def test_bernoulli_is_exact(monkeypatch):
    p = 3 * 2.0**-53
    words = (np.arange(5, dtype=np.uint64) << np.uint64(11)) + np.uint64(2**11 - 1)
    monkeypatch.setattr(Csprng, "uint64", lambda _self, n: words[:n])
    generator = Csprng(fixed_entropy("exact"))
    assert generator.bernoulli(5, p).tolist() == [True, True, True, False, False]
    assert not generator.bernoulli(5, 0.0).any()
    monkeypatch.setattr(Csprng, "uint64", lambda _self, n: np.full(n, 2**64 - 1, dtype=np.uint64))
    assert generator.bernoulli(5, 1.0).all()


@pytest.mark.parametrize("p", [-0.1, 1.1, float("nan")])
def test_bernoulli_wants_a_probability(p):
    with pytest.raises(ParameterError, match="from 0 to 1"):
        Csprng(fixed_entropy("p")).bernoulli(1, p)

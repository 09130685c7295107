"""Ledgers to test with: keys of two sites, mechanisms, and what opens, reserves and checks."""

import hashlib
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from dp.accounting import spent
from dp.ledger import Cap, Ledger
from dp.ledger_check import examine
from dp.ledger_store import read_rows
from dp.mechanisms import DiscreteGaussianSum, PoissonSampledGaussian, Relation, Unit

ADD, REPLACE = Relation.ADD_OR_REMOVE_ONE, Relation.REPLACE_ONE
KEYS = {
    name: Ed25519PrivateKey.from_private_bytes(hashlib.sha256(name.encode()).digest()) for name in ("north", "west")
}
PUBLIC = {name: key.public_key().public_bytes_raw() for name, key in KEYS.items()}


def signer(site):
    return KEYS[site].sign


def verify(site, payload, signature):
    try:
        Ed25519PublicKey.from_public_bytes(PUBLIC[site]).verify(signature, payload)
    except Exception:
        return False
    return True


def gaussian(steps=1, noise=2.0, rate=1.0):
    """Without sampling and with few steps, the account is quick."""
    return PoissonSampledGaussian(sampling_rate=rate, noise_multiplier=noise, steps=steps, l2_clip_norm=1.0)


def noise_shares(survivors, **changed):
    fields = {
        "unit": Unit.RECORD,
        "sampling_rate": 1.0,
        "steps": 1,
        "l2_sensitivity": 64.0,
        "dimension": 10,
        "l2_clip_norm": 1.0,
        "scale": 64.0,
        "shares": 5,
        "threshold": 3,
        "colluders": 0,
        "survivors": survivors,
        "share_sigma": 100.0,
    }
    return DiscreteGaussianSum(**{**fields, **changed})


def cap(epsilon=10.0, **changed):
    fields = {"delta": 1e-5, "relation": ADD, "unit": Unit.RECORD, "records": 1000}
    return Cap(epsilon=epsilon, **{**fields, **changed})


def made(folder, site="north", **how):
    path = Path(folder) / f"{site}.ledger"
    Ledger.create(path, site=site, sign=signer(site), cap=how.pop("cap", cap()), time=how.pop("time", 1.0), **how)
    return path


def opened(path, site="north", **how):
    return Ledger.open(path, site=site, sign=signer(site), verify=verify, **how)


def reserve(ledger, mechanism=None, **how):
    """Reserve with what a test does not care for filled in; the clock is the one of the ledger."""
    fields = {
        "study": "heart",
        "study_digest": b"heart",
        "cohort": "all",
        "release": "training",
        "relation": ADD,
        "delta": 1e-5,
        "time": 2.0,
    }
    return ledger.reserve(gaussian() if mechanism is None else mechanism, **{**fields, **how})


def epsilon_of(path, cohort="all", site="north"):
    with opened(path, site) as ledger:
        return ledger.spent(cohort).epsilon


def of(*mechanisms, delta=1e-5, relation=ADD):
    return spent(mechanisms, delta, relation).epsilon


def holds(path, **how):
    verdict = examine(read_rows(path), verify, **how)
    assert verdict.findings == ()
    return verdict


def named(path, *says, others=None, **how):
    """The check of a ledger names what is wrong, in lines that have these words."""
    others = {str(other): read_rows(other) for other in others or []}
    findings = examine(read_rows(path), verify, others=others, **how).findings
    assert findings
    for words in says:
        assert any(words in finding for finding in findings), findings
    assert all("\n" not in finding for finding in findings)
    return findings

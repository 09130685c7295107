"""CKKS sums under a joint key cost no more than NVFlare's way, in which every site holds the one secret key.

Theirs is raw TenSEAL at NVFlare's default ([60, 40, 40], degree 8192, scale 2^40, one key for all, symmetric
encryption) on a million values. Ours are the steps of `secagg.ckks` for ten participants in semi-honest mode, as theirs
trusts its server as well, with noise that hides the key in every decryption (30 bits; theirs has none): an exact sum of
values of 16 fraction bits, and one that is good to 2^-16. Active mode adds what each participant downloads to check.
"""

from __future__ import annotations

import os
import sys
from functools import partial

import numpy as np
from _harness import Figure, arguments, in_turns, report

from secagg import Identity, Params, Roster, Session, Stream, Subject, plan
from secagg.ckks import client, server
from secagg.ckks.decryption import add_packed
from secagg.ckks.params import Need, Setting, choose
from secagg.masking.params import least_threshold

SITES = 10
FRACTION_BITS = 16


class Silence:
    """TenSEAL tells on standard output, from C++, that it splits long vectors."""

    def __enter__(self) -> None:
        sys.stdout.flush()
        self._kept, null = os.dup(1), os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.close(null)

    def __exit__(self, *_: object) -> None:
        os.dup2(self._kept, 1)
        os.close(self._kept)


def theirs(values: list[float]) -> tuple[dict[str, object], dict[str, float]]:
    """The steps of NVFlare's filters with raw TenSEAL."""
    import tenseal as ts

    context = ts.context(
        ts.SCHEME_TYPE.CKKS, 8192, coeff_mod_bit_sizes=[60, 40, 40], encryption_type=ts.ENCRYPTION_TYPE.SYMMETRIC
    )
    context.global_scale = 2.0**40
    with Silence():
        upload = ts.ckks_vector(context, values).serialize()
        total = ts.ckks_vector_from(context, upload)
        summand = ts.ckks_vector_from(context, upload)

    def silent(call: object) -> None:
        with Silence():
            call()  # type: ignore[operator]

    calls = {
        "NVFlare's: encrypt": partial(silent, lambda: ts.ckks_vector(context, values).serialize()),
        "NVFlare's: sum, from bytes": partial(silent, lambda: total.add_(ts.ckks_vector_from(context, upload))),
        "NVFlare's: sum, in memory": partial(silent, lambda: total.add_(summand)),
        "NVFlare's: decrypt": partial(silent, total.decrypt),
    }
    return calls, {"NVFlare's: upload": len(upload) / len(values)}


class Ours:
    """A whole sum, of which single steps are timed."""

    def __init__(self, dimension: int, error: float, keys: str) -> None:
        identities = [Identity.generate(os.urandom) for _ in range(SITES)]
        roster = Roster.of({f"site{u}": identity.public for u, identity in enumerate(identities)})
        self.session = Session(Params(roster, least_threshold(SITES, "semi-honest"), "semi-honest"), bytes(32), 0)
        self.fixed = plan(SITES, 1.0, fraction_bits=FRACTION_BITS)
        self.subject = Subject("train", bytes(32), bytes(32), 1 + dimension, self.fixed.ring_bits)
        chain = choose(SITES, [Need(self.subject.dimension, self.subject.ring_bits, error)])
        self.setting = Setting(chain, keys, error=error)
        self.layout = self.setting.packing(self.session, self.subject)
        rng = np.random.default_rng(0)
        self.values = [rng.uniform(-1, 1, dimension) for _ in range(SITES)]
        self.vectors = [self.fixed.encode(values, 1, Stream(bytes(16))).vector for values in self.values]
        self.states: list[object] = []
        collecting = server.start(self.session, self.setting)
        for u, identity in enumerate(identities):
            state, message = client.advertise(self.session, u, identity, os.urandom)
            self.states.append(state)
            collecting = server.receive_channel_key(collecting, u, message)
        seeds, shown = server.close_channel_keys(collecting)
        for u, identity in enumerate(identities):
            self.states[u], message = client.share_seed(self.states[u], shown[u], self.setting, identity, os.urandom)
            seeds = server.receive_seeds(seeds, u, message)
        shares, shown = server.close_seeds(seeds)
        for u in range(SITES):
            self.states[u], message = client.reveal(self.states[u], shown[u], self.setting)
            shares = server.receive_key_share(shares, u, message)
        self.agreed = server.close_key_shares(shares)

    def encrypt(self, u: int = 0) -> tuple[object, object]:
        """What a participant does from its floats to the bytes that it sends."""
        vector = self.fixed.encode(self.values[u], 1, Stream(bytes(16))).vector
        key = client.joint_key(self.states[u], self.agreed.announcement, self.setting)
        return client.upload_semi_honest(client.encrypt(self.states[u], key, self.setting, self.subject, vector))

    def prepare(self) -> None:
        """Everything up to the decryptions."""
        self.uploaded = [self.encrypt(u) for u in range(SITES)]
        uploads, _ = server.begin_sum(self.agreed, self.subject)
        for u, (_, message) in enumerate(self.uploaded):
            uploads = server.receive_upload(uploads, u, message)
        self.before = uploads.first.copy()
        self.halves = uploads.first.copy(), uploads.second.copy()
        self.partials, self.shown = server.close_uploads(uploads)

    def add(self) -> None:
        """What the server does with an upload."""
        message = self.uploaded[0][1]
        for packed, total in zip((message.first, message.second), self.halves, strict=True):
            add_packed(total, packed, self.layout)

    def partial(self, u: int = 0) -> object:
        """One participant's decryption."""
        return client.decrypt(self.uploaded[u][0], next(iter(self.shown.values())), self.setting)[1]

    def decrypt(self) -> server.Opened:
        """All partial decryptions, and their fusion at the server."""
        self.partials.first[:] = self.before
        state = self.partials
        for u in self.shown:
            state = server.receive_partial(state, u, self.partial(u))
        opened, _ = server.close_partials(state)
        return opened


def ours(name: str, dimension: int, error: float, keys: str) -> tuple[dict[str, object], dict[str, float]]:
    run = Ours(dimension, error, keys)
    run.prepare()
    opened = run.decrypt()
    ring = run.subject.ring
    apart = ring.reduce(opened.total - np.sum(run.vectors, axis=0, dtype=ring.dtype))
    worst = int(np.abs(ring.signed(apart)).max())
    calls = {f"{name}: encrypt": run.encrypt, f"{name}: sum, from bytes": run.add, f"{name}: partial": run.partial}
    calls[f"{name}: all {len(run.shown)} decryptions and fusion"] = run.decrypt
    sizes = {
        f"{name}: upload": run.layout.upload_bytes / dimension,
        f"{name}: download to decrypt": run.layout.half_bytes / dimension,
        f"{name}: download to decrypt, active": SITES * run.layout.half_bytes / dimension,
        f"{name}: partial decryption": run.layout.half_bytes / dimension,
        f"{name}: largest error of the sum, units of 2^-16": worst,
    }
    return calls, sizes


def main() -> None:
    options = arguments(__doc__.splitlines()[0])
    dimension, turns = (1 << 16, 3) if options.quick else (1 << 20, 7)
    values = np.random.default_rng(0).uniform(-1, 1, dimension).tolist()
    calls, sizes = theirs(values)
    for name, error, keys in (
        ("threshold, exact", 0.0, "threshold"),
        ("threshold, to 2^-16", 1.0, "threshold"),
        ("shared, exact", 0.0, "shared"),
    ):
        more, size = ours(name, dimension, error, keys)
        calls |= more
        sizes |= size
    times = in_turns(calls, turns)
    figures = [Figure.of(name, [size], "" if "units" in name else "bytes/value") for name, size in sizes.items()]
    figures += [Figure.cpu_seconds(name, samples) for name, samples in times.items()]
    for name in ("threshold, exact", "threshold, to 2^-16", "shared, exact"):
        pairs = {
            f"{name}: encrypt / NVFlare's": (f"{name}: encrypt", "NVFlare's: encrypt"),
            f"{name}: sum / NVFlare's, from bytes": (f"{name}: sum, from bytes", "NVFlare's: sum, from bytes"),
            f"{name}: one partial / NVFlare's decrypt": (f"{name}: partial", "NVFlare's: decrypt"),
        }
        whole = next(key for key in times if key.startswith(f"{name}: all"))
        pairs[f"{name}: all decryptions and fusion / NVFlare's decrypt"] = (whole, "NVFlare's: decrypt")
        figures += [Figure.ratio(figure, times[over], times[under]) for figure, (over, under) in pairs.items()]
    report("ckks", figures, options, ["tenseal", "numpy", "cryptography"])


if __name__ == "__main__":
    main()

"""A mask costs little more than its keystream, quantisation a few masks, and the server's sum a few vectors of memory.

A participant of n adds n masks to its vector at once, so a mask's cost is measured as a twentieth of twenty.

The physical limit, bare AES-128-CTR of as many bytes through the same buffer, runs in the same process, in turn.

The server's memory is measured above the bare process, in accumulators: an accumulator is one word for each value.
"""

from __future__ import annotations

import numpy as np
from _harness import Figure, arguments, in_turns, report
from _server_memory import measure
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from secagg import (
    Identity,
    Params,
    Ring,
    Roster,
    Session,
    Stream,
    Subject,
    deterministic_entropy,
    least_threshold,
    plan,
    shamir,
)
from secagg.masking import client, server
from secagg.prg import _BLOCK_BYTES, _ZEROS, add_keystreams

MILLION = 1_000_000
MASKS = 20
KEY = bytes(range(16))


def bare_keystream(count: int) -> None:
    """As many bytes of AES-128-CTR as one mask takes, in the same steps, and nothing done with them."""
    encryptor = Cipher(algorithms.AES(KEY), modes.CTR(bytes(16))).encryptor()
    buffer = bytearray(_BLOCK_BYTES)
    for _ in range(0, count, _BLOCK_BYTES):
        encryptor.update_into(_ZEROS, buffer)


def masks(turns: int) -> list[Figure]:
    narrow, wide = np.zeros(MILLION, np.uint32), np.zeros(MILLION, np.uint64)
    values = np.random.default_rng(0).normal(size=MILLION).astype(np.float32)
    twenty = [(bytes([i]) * 16, 1 if i % 2 else -1) for i in range(MASKS)]
    fixed = plan(clients=100, max_value=8.0, fraction_bits=12)
    ring, total = Ring(26), np.zeros(MILLION, np.uint32)
    vector = ring.reduce(np.random.default_rng(0).integers(0, 2**32, MILLION, np.uint32))
    packed = ring.pack(vector)
    times = in_turns(
        {
            "bare": lambda: bare_keystream(narrow.nbytes),
            "one mask": lambda: add_keystreams(narrow, twenty[:1]),
            "mask": lambda: add_keystreams(narrow, twenty),
            "bare wide": lambda: bare_keystream(wide.nbytes),
            "mask wide": lambda: add_keystreams(wide, twenty),
            "quantise": lambda: fixed.encode(values, 1, Stream(KEY)),
            "pack": lambda: ring.pack(vector),
            "unpack": lambda: ring.unpack(packed, MILLION),
            "add packed": lambda: ring.add_packed(total, packed),
        },
        turns,
    )
    for name in ("mask", "mask wide"):
        times[name] = times[name].each_of(MASKS)
    return [
        Figure.cpu_seconds("bare keystream, 1M uint32", times["bare"]),
        Figure.cpu_seconds("mask, 1M uint32, by itself", times["one mask"]),
        Figure.cpu_seconds("mask, 1M uint32", times["mask"]),
        Figure.ratio("mask uint32 / bare keystream", times["mask"], times["bare"]),
        Figure.cpu_seconds("mask, 1M uint64", times["mask wide"]),
        Figure.ratio("mask uint64 / bare keystream", times["mask wide"], times["bare wide"]),
        Figure.cpu_seconds("quantise, 1M float32", times["quantise"]),
        Figure.ratio("quantise 1M float32 / mask uint32", times["quantise"], times["mask"]),
        Figure.cpu_seconds("pack, 1M values of 26 bits", times["pack"]),
        Figure.cpu_seconds("unpack, 1M values of 26 bits", times["unpack"]),
        Figure.cpu_seconds("add packed, 1M values of 26 bits", times["add packed"]),
    ]


def sharing(turns: int) -> list[Figure]:
    entropy, secret = deterministic_entropy(b"sharing"), bytes(range(32))
    shares = shamir.split(secret, 67, range(100), entropy)
    enough = {v: shares[v] for v in range(67)}

    def recover_first() -> None:
        shamir._lagrange_basis.cache_clear()
        shamir.recover(enough, 67, secret.__eq__)

    times = in_turns(
        {
            "split": lambda: shamir.split(secret, 67, range(100), entropy),
            "recover first": recover_first,
            "recover": lambda: shamir.recover(enough, 67, secret.__eq__),
            "recover from all": lambda: shamir.recover(shares, 67, secret.__eq__),
        },
        turns,
    )
    return [
        Figure.cpu_seconds("split 67 of 100", times["split"]),
        Figure.cpu_seconds("recover 67 of 100, first secret", times["recover first"]),
        Figure.cpu_seconds("recover 67 of 100, each further", times["recover"]),
        Figure.cpu_seconds("recover 67 of 100, all answered", times["recover from all"]),
    ]


def whole_round(n: int, d: int, turns: int) -> list[Figure]:
    """From floats to their mean: every participant and the server in one process, the last lost after sharing."""
    entropy = {u: deterministic_entropy(b"participant %d" % u) for u in range(n)}
    identity = {u: Identity.generate(entropy[u]) for u in range(n)}
    roster = Roster.of({f"site{u:03d}": identity[u].public for u in range(n)})
    fixed = plan(clients=n, max_value=8.0, fraction_bits=12)
    params = Params(roster, least_threshold(n, "active"))
    session, subject = Session(params, bytes(32), 0), Subject("train", bytes(32), bytes(32), d + 1, fixed.ring_bits)
    values = {u: np.random.default_rng(u).normal(size=d).astype(np.float32) for u in range(n)}
    kept = range(n - 1)

    def play() -> np.ndarray:
        advertised, keys = {}, server.start(session)
        for u in range(n):
            advertised[u], said = client.advertise(session, u, identity[u], entropy[u])
            keys = server.receive_keys(keys, u, said)
        sharing, directories = server.close_keys(keys)
        shared = {}
        for u in range(n):
            shared[u], boxes = client.share_keys(advertised[u], directories[u], identity[u], entropy[u])
            sharing = server.receive_shares(sharing, u, boxes)
        summing, inboxes = server.begin_sum(server.close_shares(sharing), subject)
        masked = {}
        for u in kept:
            encoded = fixed.encode(values[u], 1, Stream(entropy[u](16)))
            masked[u], y = client.mask_input(shared[u], inboxes[u], subject, encoded.vector)
            summing = server.receive_vector(summing, u, y)
        confirming, shown = server.close_vectors(summing)
        confirmed = {}
        for u in kept:
            confirmed[u], signature = client.confirm(masked[u], shown[u], identity[u])
            confirming = server.receive_confirmation(confirming, u, signature)
        unmasking, signatures = server.close_confirmations(confirming)
        for u in kept:
            _, answer = client.unmask(confirmed[u], signatures[u])
            unmasking = server.receive_unmask(unmasking, u, answer)
        return fixed.decode(server.close_unmask(unmasking).total)[1]

    exact = np.mean([values[u].astype(np.float64) for u in kept], axis=0)
    if np.abs(play() - exact).max() > 2.0**-fixed.fraction_bits:
        raise SystemExit("the round gave a wrong mean")
    times = in_turns({"round": play}, turns)["round"]
    return [Figure.cpu_seconds(f"whole round, n={n}, d={short(d)}, one drop-out", times)]


def server_memory(n: int, d: int) -> list[Figure]:
    """The most that the server of a sum holds at once: until the sum is open, and with its mean in floats as well."""
    opened, mean = (peak / np.zeros(d, np.uint32).nbytes for peak in measure(n, d))
    return [
        Figure.of(f"server memory, sum open, n={n}, d={short(d)} / accumulator", [opened]),
        Figure.of(f"server memory, n={n}, d={short(d)} / accumulator", [mean]),
    ]


def short(d: int) -> str:
    return f"{d // MILLION}M" if d >= MILLION else f"{d // 1000}k"


def setup(n: int, turns: int) -> list[Figure]:
    """One participant's AdvertiseKeys and ShareKeys among n, active mode."""
    entropy = {u: deterministic_entropy(b"participant %d" % u) for u in range(n)}
    identity = {u: Identity.generate(entropy[u]) for u in range(n)}
    roster = Roster.of({f"site{u:03d}": identity[u].public for u in range(n)})
    session = Session(Params(roster, least_threshold(n, "active")), bytes(32), 0)
    keys = server.start(session)
    for u in range(n):
        state, said = client.advertise(session, u, identity[u], entropy[u])
        keys = server.receive_keys(keys, u, said)
    directory = server.close_keys(keys)[1][n - 1]  # the last one's, whose state is at hand

    def both() -> None:
        client.advertise(session, 0, identity[0], entropy[0])
        client.share_keys(state, directory, identity[n - 1], entropy[n - 1])

    return [Figure.cpu_seconds(f"setup stages at a participant, n={n}", in_turns({"both": both}, turns)["both"])]


def main() -> None:
    options = arguments(__doc__ or "")
    figures = masks(7 if options.quick else 31) + sharing(3 if options.quick else 15)
    figures += setup(10, 2) if options.quick else setup(100, 15)
    figures += whole_round(5, 100_000, 2) if options.quick else whole_round(20, MILLION, 7)
    figures += server_memory(10, MILLION) if options.quick else server_memory(100, 10 * MILLION)
    report("masking", figures, options, ["numpy", "cryptography"])


if __name__ == "__main__":
    main()

"""How much memory the server of one secure sum takes above the bare process, in a fresh process of its own.

`measure` plays all participants and sends their replies through a pipe, one at a time, to the server, which is this
file run as a script. Both sides do what they do in a study, from a reply's bytes to the mean in floats: every
participant masks with all its peers, and the last one is lost after its keys are agreed. Only the vector that each
contributes is the same for all, so that the mean is known.

A peak is the resident memory that the kernel saw, with what the allocator holds on to. Linux only.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import BinaryIO

import numpy as np

from protocols.aggregation import Masked, Staged, Sum
from protocols.messages import Answer, Reply
from secagg import Identity, Params, Roster, Session, Stream, Subject, deterministic_entropy, least_threshold, plan
from secagg.ring import RingVector
from secagg.wire import decode, encode


class Setting:
    """A sum of n participants with d values each, the same in both processes, and a participant's part in it."""

    def __init__(self, n: int, d: int) -> None:
        self.scheme, self.lost = Masked("active"), n - 1
        self.fixed = plan(clients=n, max_value=8.0, fraction_bits=12, ring_bits=26)
        self._identities = [Identity.generate(deterministic_entropy(b"participant %d" % u)) for u in range(n)]
        roster = Roster.of({f"site{u:03d}": identity.public for u, identity in enumerate(self._identities)})
        self.session = Session(Params(roster, least_threshold(n, "active")), bytes(32), 0)
        self.subject = Subject("train", bytes(32), bytes(32), d + 1, self.fixed.ring_bits)
        self._states = [b""] * n

    def reply(self, stage: str, vector: RingVector, u: int, request: bytes) -> bytes:
        """What participant u answers."""
        scheme, state, identity = self.scheme, self._states[u], self._identities[u]
        if stage in scheme.setup:
            body, state = scheme.agree(stage, self.session, u, state, request, identity, os.urandom)
        elif stage == scheme.stages[0]:
            body, state = scheme.contribute(self.session, u, state, request, self.subject, vector, identity)
        else:
            body, state = scheme.step(stage, state, request, identity)
        self._states[u] = state
        return encode(Reply(sum=Answer(memoryview(body))))

    def serve(self) -> Sum:
        """The server's side, driven by standard input and output as the coordinator is by an engine."""
        keys = self.scheme.keys(self.session)
        for _ in self.scheme.setup:
            self._serve_stage(keys)
        sums = keys.begin(self.subject)
        for _ in self.scheme.stages:
            self._serve_stage(sums)
        return sums.result

    @staticmethod
    def _serve_stage(server: Staged) -> None:
        send(sys.stdout.buffer, server.requests().items())
        for u, reply in receive(sys.stdin.buffer):
            server.receive(u, decode(reply, Reply).sum.body)
        server.close()


def measure(n: int, d: int) -> tuple[int, int]:
    """Peaks in bytes above the bare process: until the sum was open, and until its mean was there in floats as well."""
    setting = Setting(n, d)
    values = np.random.default_rng(0).normal(size=d).astype(np.float32)
    vector = setting.fixed.encode(values, 1, Stream(bytes(16))).vector
    server = subprocess.Popen([sys.executable, __file__, str(n), str(d)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    with server, ThreadPoolExecutor(os.cpu_count()) as pool:
        for stage in (*setting.scheme.setup, *setting.scheme.stages):
            requests = dict(receive(server.stdout))
            if stage not in setting.scheme.setup:
                requests.pop(setting.lost, None)
            replies = pool.map(partial(setting.reply, stage, vector), requests.keys(), requests.values())
            send(server.stdin, zip(requests, replies, strict=True))
        told = json.load(server.stdout)
    if told["mean"] != fingerprint(setting.fixed.decode(vector)[1]):
        raise SystemExit("the round gave a wrong mean")
    return told["opened_bytes"], told["mean_bytes"]


def serve(n: int, d: int) -> None:
    """The process that is measured."""
    bare = resident("VmRSS")
    setting = Setting(n, d)
    total = setting.serve().total
    opened = resident("VmHWM") - bare
    mean = setting.fixed.decode(total)[1]
    told = {"opened_bytes": opened, "mean_bytes": resident("VmHWM") - bare, "mean": fingerprint(mean)}
    print(json.dumps(told), flush=True)


def send(stream: BinaryIO, messages: Iterable[tuple[int, bytes]]) -> None:
    """Number, length and bytes of each message; a length below 0 ends the stage."""
    for u, message in messages:
        stream.write(u.to_bytes(8, "big") + len(message).to_bytes(8, "big", signed=True))
        stream.write(message)
    stream.write(bytes(8) + (-1).to_bytes(8, "big", signed=True))
    stream.flush()


def receive(stream: BinaryIO) -> Iterator[tuple[int, bytes]]:
    while True:
        head = stream.read(16)
        if len(head) < 16:
            raise SystemExit("the other side has ended")
        size = int.from_bytes(head[8:], "big", signed=True)
        if size < 0:
            return
        yield int.from_bytes(head[:8], "big"), stream.read(size)


def fingerprint(mean: np.ndarray) -> str:
    return hashlib.sha256(mean.data).hexdigest()


def resident(what: str) -> int:
    """Bytes: VmRSS now, VmHWM at most so far. Unlike ru_maxrss, neither counts the process that started this one."""
    return 1024 * int(re.search(rf"{what}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])


if __name__ == "__main__":
    serve(*map(int, sys.argv[1:]))

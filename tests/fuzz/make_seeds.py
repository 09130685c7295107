"""Write the seeds: what is really said and kept in one small study and one bare round, a file each.

    python tests/fuzz/make_seeds.py

The same files come out each time. They hold nobody's secrets: all keys are made from fixed bytes.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import safetensors.torch
import torch

if not __package__:  # run as a script
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from protocols.aggregation import Masked, Staged
from protocols.fedavg import model_bytes
from protocols.messages import Refusal, Reply, Request
from secagg import Identity, Params, Ring, Session
from secagg.masking import transcript
from secagg.masking.messages import EncryptedShares
from secagg.wire import decode, encode
from tests.fuzz.targets import DIMS, DTYPES, TARGETS, example_roster, small_model
from tests.protocols.apps import evaluate_work, train_work
from tests.protocols.hospitals import PRIVATE, World, study
from tests.secagg.simulation import Party, Round, changed

SEEDS = Path(__file__).parent / "seeds"
ANSWERS = {
    "AdvertiseKeys": "Advertisement",
    "ShareKeys": "EncryptedShares",
    "MaskedInput": "MaskedInput",
    "ConsistencyCheck": "Confirmation",
    "Unmask": "UnmaskShares",
}
REQUESTS = {
    "ShareKeys": "KeyDirectory",
    "MaskedInput": "ShareInbox",
    "ConsistencyCheck": "SurvivorSet",
    "Unmask": "ConfirmationSet",
}


def a_round(mode: str) -> dict[str, bytes]:
    """Each message and state of a round of four in which the last drops out with its vector."""
    party = Party(4, mode=mode, threshold=3)
    scheme, vectors = Masked(mode), party.vectors()
    seeds = {f"Terms/{mode}": encode(party.session.terms), f"Subject/{mode}": encode(party.subject)}
    states: dict[int, bytes] = dict.fromkeys(range(4), b"")
    keys = scheme.keys(party.session)
    server: Staged = keys
    for stage in (*scheme.setup, *scheme.stages):
        if stage == scheme.stages[0]:
            server = keys.begin(party.subject)
        for u, request in server.requests().items():
            if u == 3 and stage == "MaskedInput":
                continue
            identity, entropy = party.identity[u], party.entropy[u]
            if stage in scheme.setup:
                answer, states[u] = scheme.agree(stage, party.session, u, states[u], request, identity, entropy)
            elif stage == "MaskedInput":
                answer, states[u] = scheme.contribute(
                    party.session, u, states[u], request, party.subject, vectors[u], identity
                )
            else:
                answer, states[u] = scheme.step(stage, states[u], request, identity)
            if stage != "AdvertiseKeys":
                named = "SurvivorSet" if (stage, mode) == ("Unmask", "semi-honest") else REQUESTS[stage]
                seeds[f"{named}/{mode}"] = request
            if stage == "ShareKeys":
                seeds[f"Commitment/{mode}"] = encode(decode(answer, EncryptedShares).commitment)
            seeds[f"{ANSWERS[stage]}/{mode}"] = answer
            seeds[f"ClientState/{mode}-{stage}"] = states[u]
            server.receive(u, answer)
        server.close()
    return seeds


def a_study() -> dict[str, bytes]:
    """What the first site hears, says and remembers, with standardising over all sites and with private training."""
    seeds: dict[str, bytes] = {"Reply/refusal": encode(Reply(sum=Refusal("budget"), keys=Refusal("protocol")))}
    for kind, changes in (
        ("global", {"task": {"standardize": "global"}}),
        ("private", {"privacy": PRIVATE, "task": {"standardize": "none"}}),
    ):
        world = World(study(**changes))
        while requests := world.coordinator.requests():
            label = f"{kind}-{world.rounds[-1].number}-{world.coordinator.stage}"
            for name, request in requests.items():
                reply = world.ask(name, request)
                world.coordinator.receive(name, reply)
                if name == world.study.site_names[0]:
                    said = decode(request, Request)
                    seeds |= {f"Request/{label}": request, f"Reply/{label}": reply}
                    seeds[f"Memory/{label}"] = world.states[name]
                    if said.sum is not None and said.sum.work is not None:
                        seeds[f"Work/{label}"] = said.sum.work
            world.coordinator.close_stage()
    return seeds


def a_transcript() -> dict[str, bytes]:
    """Two sums of the participants of `example_roster`, with and without an end."""
    identity = [Identity(bytes([1 + u]) * 32) for u in range(4)]
    params, records = Params(example_roster(), 3), list[transcript.Record]()
    for number in range(2):
        session = Session(params, bytes(32), number)
        head = records[-1].digest if records else transcript.NO_RECORD
        party = Party(4, threshold=3)
        party.identity, party.session = dict(enumerate(identity)), session
        party.subject = changed(party.subject, previous=head)
        records.append(transcript.record(Round(party).play(drop={3 - number: "MaskedInput"}).server))
    head = records[-1].digest
    end = transcript.Closing(bytes(32), head, {u: transcript.sign_head(identity[u], bytes(32), head) for u in range(4)})
    return {
        "Transcript/whole": transcript.write([*records, end]),
        "Transcript/one": transcript.write(records[:1]),
        "Transcript/end": transcript.write([end]),
    }


def vectors() -> dict[str, bytes]:
    """Packed vectors of several rings, after their width and size."""
    rng = np.random.default_rng(0)
    seeds = {}
    for bits, size in ((1, 9), (13, 5), (26, 16), (32, 3), (33, 7), (64, 2)):
        ring = Ring(bits)
        vector = ring.reduce(rng.integers(0, 2**bits - 1, size, np.uint64, endpoint=True).astype(ring.dtype))
        seeds[f"Ring/{bits}"] = bytes([bits - 1, size]) + ring.pack(vector)
    return seeds


def app_works() -> dict[str, bytes]:
    """What a Flower app's strategy asks."""
    settings = {"config": {"lr": 0.1, "server-round": 1, "name": "a", "on": True, "raw": b"x", "list": (1, 2)}}
    return {
        "AppWork/train": encode(train_work(configs=settings)),
        "AppWork/evaluate": encode(evaluate_work()),
        "AppWork/empty": encode(evaluate_work({})),
    }


def all_seeds() -> dict[str, bytes]:
    """`target/name` to bytes."""
    torch.manual_seed(0)
    model = small_model()
    models = {
        "load_model/plain": model_bytes(model),
        "load_model/metadata": safetensors.torch.save(model.state_dict(), {"format": "pt"}),
    }
    names = {torch.float32: "F32", torch.float64: "F64", torch.int64: "I64"}
    choices: list[int] = []
    for tensor in model.state_dict().values():
        choices += [DTYPES.index(names[tensor.dtype]), tensor.dim(), *map(DIMS.index, tensor.shape), 0]
    models["load_model_header/plain"] = bytes(choices)
    return a_round("active") | a_round("semi-honest") | a_study() | a_transcript() | app_works() | vectors() | models


def read_seeds(target: str) -> list[bytes]:
    """The seeds of a target as they lie on disk."""
    return [path.read_bytes() for path in sorted((SEEDS / target).glob("*.bin"))]


def main() -> None:
    """Write every seed, and say how many there are."""
    total = 0
    for name, data in all_seeds().items():
        path = SEEDS / f"{name}.bin"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        total += len(data)
    missing = [target for target in TARGETS if not read_seeds(target)]
    print(f"{len(all_seeds())} seeds, {total} bytes; targets without: {missing or 'none'}")


if __name__ == "__main__":
    main()

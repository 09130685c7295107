"""The heart study over a real SuperLink with TLS and node authentication and four SuperNodes, all on loopback."""

import os
import re
import signal

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from protocols.output import load_run
from protocols.study import load_study
from tests.flower.deployment import SITES, Deployment, free_ports


def test_a_study_over_a_link_survives_a_killed_node_and_a_killed_server():
    with Deployment(rounds=3, more='task = { standardize = "public" }') as trial:
        # A node whose key the link does not know is refused.
        stranger = trial.base / "stranger.key"
        make_key(stranger)
        start = trial.commands("va")[2].replace(str(trial.folder / "va" / "node.key"), str(stranger))
        trial.start("stranger", re.sub(r"--port \d+", f"--port {free_ports(1)}", start))
        trial.wait_for("stranger", "Failed to activate SuperNode")
        trial.end("stranger")

        name, out = trial.run()
        trial.wait_for(name, r"round 0, train, ShareKeys: 4 of 4", 150)
        trial.kill("va-node")  # as MaskedInput begins
        trial.start_node("va")
        trial.wait_for(name, r"round 0, train, Unmask: \d of \d", 240)
        os.kill(trial.server_app(), signal.SIGKILL)
        assert trial.ended(name) == 2
        assert "did not come to its end" in trial.told(name)
        assert not out.exists()

        again, _ = trial.run("--resume", out=out)
        assert trial.ended(again, 420) == 0, trial.told(again)
        run = load_run(out, load_study(trial.study))
        training = [record for record in run.rounds if record.purpose == "train"]
        assert training[0].outcome == "opened"
        assert training[-1].outcome == "opened"
        assert training[-1].contributors == SITES
        assert [r.outcome for r in training].count("failed") <= 1
        assert run.stopped is None


@pytest.mark.slow
@pytest.mark.parametrize(
    ("before", "stage"),
    [("MaskedInput", "ConsistencyCheck"), ("ConsistencyCheck", "Unmask")],
    ids=["uploaded", "unmask"],
)
def test_a_node_that_is_killed_after_its_sites_vector_has_left_takes_nothing_from_the_sum(before, stage):
    with Deployment(rounds=1, more='task = { standardize = "public" }') as trial:
        name, out = trial.run()
        trial.wait_for(name, f"round 0, train, {before}: 4 of 4", 300)
        trial.kill("va-node")
        assert trial.ended(name, 420) == 0, trial.told(name)
        run = load_run(out, load_study(trial.study))
    first = run.rounds[0]
    assert first.outcome == "opened"
    assert first.contributors == SITES
    assert first.dropped == {"va": f"no answer at {stage}"}
    assert run.rounds[-1].dropped == {"va": "no answer at Finish"}


def make_key(path):
    """An EC key that nobody registered."""
    key = ec.generate_private_key(ec.SECP384R1())
    path.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()))
    path.chmod(0o600)

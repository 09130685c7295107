"""Whatever happens to the messages, a round ends in the exact sum of its survivors or in one of our errors.

A random round through the bytes that an engine carries: replies are lost, doubled, late, reordered and changed,
requests come to the wrong participant or to one that has moved on, participants restart, stages close early. In a
semi-honest session nothing is changed on the way down: there the server, and the way from it, are trusted not to.
"""

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from protocols.aggregation import Masked
from secagg import (
    BelowThreshold,
    Identity,
    Params,
    RemoteProtocolError,
    Roster,
    SecAggError,
    Session,
    deterministic_entropy,
    least_threshold,
)
from secagg.masking.messages import MaskedInput, UnmaskShares
from secagg.wire import decode

# Who is meant, or left out, among at most seven: a number or a set of bits, taken modulo what there is.
pick = st.integers(0, 1 << 12)
some = st.integers(0, (1 << 7) - 1)
# Most rounds are to survive: a fault that would leave too few is only now and then let through.
ruthless = st.sampled_from([False] * 7 + [True])
# Mostly a few bits, which leave a message that decodes; else anything.
flips = st.tuples(st.just("flip"), pick, st.integers(0, 7))
edits = st.one_of(
    st.lists(flips, min_size=1, max_size=2),
    st.lists(flips, min_size=1, max_size=2),
    st.lists(
        st.tuples(st.sampled_from(["set", "insert", "delete", "cut"]), pick, st.integers(0, 255)),
        min_size=1,
        max_size=3,
    ),
)


def edited(data, changes):
    out = bytearray(data)
    for kind, where, value in changes:
        at = where % max(1, len(out))
        if kind == "flip" and out:
            out[at] ^= 1 << value % 8
        elif kind == "set" and out:
            out[at] = value
        elif kind == "insert":
            out.insert(at, value)
        elif kind == "delete":
            del out[at : at + 1]
        elif kind == "cut":
            del out[at:]
    return bytes(out)


class RoundUnderFire(RuleBasedStateMachine):
    """One round; the server and the participants are real, and everything between them goes wrong.

    A participant's entropy is the same each time that it answers at a stage, so that a retry is to be identical. With
    fresh entropy a retry of ShareKeys is another answer, which nobody here claims to survive.
    """

    @initialize(
        n=st.sampled_from([7, 6, 5, 4, 7, 6, 5, 3]),
        mode=st.sampled_from(["active", "semi-honest"]),
        more=st.sampled_from([0, 0, 0, 1, 2, 3]),
        bits=st.integers(1, 64),
        dimension=st.integers(1, 40),
        seed=st.integers(0, 2**32 - 1),
        clean=st.integers(0, 4),
    )
    def begin(self, n, mode, more, bits, dimension, seed, clean):
        """The round, of which the first `clean` stages go well: later faults would be rare otherwise."""
        self.identity = [Identity.generate(deterministic_entropy(b"identity %d" % u)) for u in range(n)]
        roster = Roster.of({f"site{u}": identity.public for u, identity in enumerate(self.identity)})
        least = least_threshold(n, mode)
        params = Params(roster, least + more % (n - least + 1), mode)
        self.session = Session(params, bytes(32), "train", 1, bytes(32), dimension, bits)
        self.scheme = Masked(mode)
        self.server = self.scheme.server(self.session)
        ring, rng = self.session.ring, np.random.default_rng(seed)
        top = np.uint64(ring.modulus - 1)
        self.vectors = [rng.integers(0, top, dimension, np.uint64, endpoint=True).astype(ring.dtype) for _ in range(n)]
        self.states = [[b""] for _ in range(n)]  # every state that a participant has had; the last is its own now
        self.last = {}  # participant -> (state before, stage, request) of its last answer
        self.said = {}  # (participant, stage) -> all that it ever answered
        self.rolled_back = set()
        self.flight = []  # (participant, stage, answer): sent, and not at the server yet
        self.past = []  # every answer ever sent
        self.asked = []  # (stage, request): every request ever sent
        self.answered = set()  # whose answer the server took at this stage
        self.arrived = {}  # participant -> its vector as the server took it
        self.lost = None  # the error that ended the round
        self.requests = self.server.requests()
        self.asked += [(self.server.stage, request) for request in self.requests.values()]
        for _ in range(min(clean, len(self.scheme.stages) - 1)):
            self.play_a_stage(0)

    # --- the participants ---

    def let_answer(self, u, stage, request, *, state=None):
        """Participant u handles a request. It moves on and its answer is on its way, or it says why not and stays."""
        state = self.states[u][-1] if state is None else state
        entropy = deterministic_entropy(b"%d at %s" % (u, stage.encode()))
        try:
            if stage == "AdvertiseKeys":
                answer, after = self.scheme.begin(self.session, u, self.identity[u], entropy)
            else:
                vector = self.vectors[u] if stage == "MaskedInput" else None
                answer, after = self.scheme.step(stage, state, request, self.identity[u], entropy, vector)
        except SecAggError:
            return None
        answers = self.said.setdefault((u, stage), [])
        if answer not in answers:
            answers.append(answer)
        self.last[u] = state, stage, request
        self.states[u].append(after)
        self.flight.append((u, stage, answer))
        self.past.append((u, stage, answer))
        return answer

    def due(self):
        """Who is asked at this stage and has said nothing yet."""
        return [u for u in self.requests if (u, self.server.stage) not in self.said]

    def spare(self):
        """How many can still fail at this stage without losing the round."""
        here = self.answered | set(self.due()) | {u for u, stage, _ in self.flight if stage == self.server.stage}
        return len(here & self.requests.keys()) - self.session.params.threshold

    @rule(without=some, order=pick, ruthless=ruthless)
    def ask(self, without, order, ruthless):
        left_out = [u for u in self.due() if without >> u & 1]
        if not ruthless:
            left_out = left_out[: max(0, self.spare())]
        due = [u for u in self.due() if u not in left_out]
        for u in np.random.default_rng(order).permutation(due).tolist():
            self.let_answer(u, self.server.stage, self.requests[u])

    @rule(who=pick, changes=edits, ruthless=ruthless)
    def ask_with_a_changed_request(self, who, changes, ruthless):
        if (due := self.due()) and self.session.params.active and (ruthless or self.spare() > 0):
            u = due[who % len(due)]
            self.let_answer(u, self.server.stage, edited(self.requests[u], changes))

    @rule(who=pick, which=pick, of_now=st.booleans())
    def ask_with_an_older_or_anothers_request(self, who, which, of_now):
        everybody, now = range(len(self.states)), len(self.requests) or 1
        unasked = [u for u in everybody if u not in self.requests]
        among = unasked if of_now and unasked else everybody
        u = among[who % len(among)]
        stage, request = self.asked[-1 - which % (now if of_now else len(self.asked))]
        if stage != "AdvertiseKeys":  # a round that was begun is not begun again: that is kept above this layer
            self.let_answer(u, stage, request)

    @rule(who=pick)
    def retry_from_the_state_before(self, who):
        if self.last:
            u = sorted(self.last)[who % len(self.last)]
            state, stage, request = self.last[u]
            before = self.said[u, stage][-1], self.states[u][-1]
            answer = self.let_answer(u, stage, request, state=state)
            assert (answer, self.states[u][-1]) == before or u in self.rolled_back

    @rule(who=pick, which=pick)
    def restore_an_older_state(self, who, which):
        u = who % len(self.states)
        if len(self.states[u]) > 2:
            self.states[u].append(self.states[u][1 + which % (len(self.states[u]) - 1)])
            self.rolled_back.add(u)
            self.last.pop(u, None)

    # --- the way up ---

    def deliver(self, u, stage, answer, genuine=None):
        """An answer reaches the server, which takes it or refuses it, and blames nobody else."""
        at, refused = self.server.stage, None
        try:
            self.server.receive(u, answer)
        except SecAggError as error:
            refused = error
        if at == "done":
            assert refused is not None
            return
        if refused is not None:
            assert isinstance(refused, RemoteProtocolError)
            assert refused.culprits == {self.session.params.roster.name(u)}
            return
        assert u in self.requests
        assert u not in self.answered
        assert at == stage
        self.answered.add(u)
        if at == "MaskedInput":
            ring, size = self.session.ring, self.session.dimension
            self.arrived[u] = ring.unpack(decode(answer, MaskedInput).packed, size).astype(object)
            self.arrived[u] -= ring.unpack(decode(genuine or answer, MaskedInput).packed, size).astype(object)

    @rule(without=some, order=pick)
    def deliver_what_is_on_its_way(self, without, order):
        gone = [entry for entry in self.flight if not without >> entry[0] & 1]
        self.flight = [entry for entry in self.flight if without >> entry[0] & 1]
        for i in np.random.default_rng(order).permutation(len(gone)).tolist():
            self.deliver(*gone[i])

    def under_way(self, which):
        """Whether an answer is on its way; if need be, somebody is asked for one first."""
        if not self.flight and (due := self.due()):
            u = due[which % len(due)]
            self.let_answer(u, self.server.stage, self.requests[u])
        return bool(self.flight)

    @rule(which=pick, ruthless=ruthless)
    def lose_one(self, which, ruthless):
        if self.under_way(which) and (ruthless or self.spare() > 0):
            del self.flight[which % len(self.flight)]

    @rule(which=pick)
    def deliver_one_again_or_late(self, which):
        if self.past:
            self.deliver(*self.past[which % len(self.past)])

    @rule(which=pick, changes=edits, ruthless=ruthless)
    def deliver_one_changed(self, which, changes, ruthless):
        # A changed vector or share may be taken; anything else is refused, and its sender is out.
        if self.under_way(which) and (ruthless or self.spare() > 0 or self.server.stage in ("MaskedInput", "Unmask")):
            u, stage, answer = self.flight.pop(which % len(self.flight))
            self.deliver(u, stage, edited(answer, changes), answer)

    # --- the stages ---

    def enough(self):
        return len(self.answered) >= self.session.params.threshold

    @precondition(lambda self: self.server.stage != "done" and self.enough())
    @rule()
    def close(self):
        try:
            self.server.close()
        except SecAggError as error:
            # Only opening can fail with enough answers, and only if some of them were changed on their way.
            assert self.server.stage == "Unmask"
            self.lost = error
            return
        self.requests, self.answered = self.server.requests(), set()
        self.asked += [(self.server.stage, request) for request in self.requests.values()]

    @precondition(lambda self: self.server.stage != "done" and not self.enough())
    @rule()
    def close_with_too_few(self):
        stage = self.server.stage
        with pytest.raises(BelowThreshold):
            self.server.close()
        assert self.server.stage == stage

    @precondition(lambda self: self.server.stage != "done")
    @rule(without=some)
    def play_a_stage(self, without):
        """The stage to its end, less those that the round can spare."""
        self.ask(without, 0, False)
        self.deliver_what_is_on_its_way(0, 0)
        if self.enough():
            self.close()

    # --- what holds at any time ---

    @invariant()
    def nobody_masks_twice(self):
        for (u, stage), answers in self.said.items():
            if stage == "MaskedInput" or u not in self.rolled_back:
                assert len(answers) == 1, f"{u} gave {len(answers)} answers at {stage}"

    @invariant()
    def one_kind_of_share_of_anyone(self):
        """Over all that was ever sent, whether it arrived or not; so for each participant's answers too."""
        alive, dropped = set(), set()
        for (_, stage), answers in self.said.items():
            if stage == "Unmask":
                for answer in answers:
                    shares = decode(answer, UnmaskShares)
                    alive |= shares.of_self_mask_seed.keys()
                    dropped |= shares.of_mask_secret.keys()
        assert not alive & dropped

    @invariant()
    def the_sum_is_exact(self):
        result = self.server.result
        if result is None:
            return
        assert self.server.stage == "done"
        assert result.contributors == self.arrived.keys()
        assert len(result.contributors) >= self.session.params.threshold
        # A vector is not signed: one that was changed on its way counts as it came.
        expected = sum(self.vectors[u].astype(object) + self.arrived[u] for u in result.contributors)
        assert (result.total == expected % self.session.ring.modulus).all()

    def teardown(self):
        """Nothing goes wrong any more: the round opens, or is lost for a reason."""
        if not hasattr(self, "server"):
            return
        for _ in self.scheme.stages:
            if self.server.stage != "done":
                self.play_a_stage(0)
        self.nobody_masks_twice()
        self.one_kind_of_share_of_anyone()
        self.the_sum_is_exact()
        assert self.server.result is not None or self.lost is not None or not self.enough()


common = {"deadline": None, "suppress_health_check": list(HealthCheck)}


class TestARoundUnderFire(RoundUnderFire.TestCase):
    settings = settings(max_examples=300, stateful_step_count=30, derandomize=True, **common)


@pytest.mark.slow
class TestManyRoundsUnderFire(RoundUnderFire.TestCase):
    settings = settings(max_examples=3000, stateful_step_count=50, **common)

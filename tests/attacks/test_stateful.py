"""Whatever happens to the messages, each round ends in the exact sum of its survivors or in one of our errors.

Random rounds through the bytes that an engine carries, the keys of the next agreed while one is summed: replies are
lost, doubled, late, reordered, changed and delivered into another round, requests come to the wrong participant or to
one that has moved on, participants restart, stay away from one round and are there in the next, stages close early. In
a semi-honest session nothing is changed on the way down: there the server, and the way from it, are trusted not to.
"""

from collections import defaultdict

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
    Ring,
    Roster,
    SecAggError,
    Session,
    Subject,
    deterministic_entropy,
    least_threshold,
)
from secagg.masking.messages import MaskedInput, UnmaskShares
from secagg.wire import decode

ROUNDS = 3
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


class Lane:
    """A key agreement or a sum of one round, at its server."""

    def __init__(self, number, server):
        self.number, self.server = number, server
        self.answered = set()  # whose answer the server took at this stage
        self.changed = set()  # whose answer was another than the one that it sent
        self.arrived = {}  # participant -> how the vector that the server took differs from the one it sent
        self.lost = None  # the error that ended it
        self.requests = server.requests()

    @property
    def open(self):
        return self.server.stage != "done" and self.lost is None


class RoundsUnderFire(RuleBasedStateMachine):
    """Three rounds; the server and the participants are real, and everything between them goes wrong.

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
        clean=st.integers(0, 8),
        one_subject=st.booleans(),
    )
    def begin(self, n, mode, more, bits, dimension, seed, clean, one_subject):
        """The rounds, of which the first `clean` stages go well: later faults would be rare otherwise.

        With `one_subject` all of them are tries at the same sum, each with other vectors.
        """
        self.identity = [Identity.generate(deterministic_entropy(b"identity %d" % u)) for u in range(n)]
        roster = Roster.of({f"site{u}": identity.public for u, identity in enumerate(self.identity)})
        least = least_threshold(n, mode)
        self.params = Params(roster, least + more % (n - least + 1), mode)
        self.scheme, self.ring, self.shape = Masked(mode), Ring(bits), (dimension, bits)
        self.one_subject = one_subject
        self.rng = np.random.default_rng(seed)
        self.subjects, self.vectors = {}, {}  # by the number of the round
        self.states = defaultdict(lambda: [b""])  # (participant, round) -> all its states; the last is its own
        self.last = {}  # (participant, round) -> (state before, stage, request) of its last answer
        self.said = {}  # (participant, round, stage) -> all that it ever answered
        self.rolled_back = set()  # (participant, round)
        self.flight = []  # (participant, round, stage, answer): sent, and not at the server yet
        self.past = []  # every answer ever sent
        self.asked = []  # (round, stage, request): every request ever sent
        self.sums = []
        self.keys = Lane(1, self.scheme.keys(self.session(1)))
        self.note_requests(self.keys)
        for _ in range(clean):
            self.play_a_stage(0)

    def session(self, number):
        return Session(self.params, bytes(32), number)

    def lanes(self):
        """What is under way: the last sum, and the keys of the next."""
        return [lane for lane in (*self.sums[-1:], self.keys) if lane.open]

    def note_requests(self, lane):
        lane.requests, lane.answered = lane.server.requests(), set()
        self.asked += [(lane.number, lane.server.stage, request) for request in lane.requests.values()]

    def go_on(self):
        """Where the last sum is over and the next keys are agreed, they are used, and others agreed behind them."""
        if self.keys.lost is None and not self.keys.open and not (self.sums and self.sums[-1].open):
            number, opened = self.keys.number, [lane.server.result for lane in self.sums if lane.server.result]
            if number in self.subjects:
                return
            model, before = bytes([number]) * 32, bytes(32)
            if self.one_subject:
                model = bytes(32)
            elif opened and self.params.active:
                before = opened[-1].record.digest
            self.subjects[number] = Subject("train", model, before, *self.shape)
            top = np.uint64(self.ring.modulus - 1)
            drawn = self.rng.integers(0, top, (len(self.identity), self.shape[0]), np.uint64, endpoint=True)
            self.vectors[number] = drawn.astype(self.ring.dtype)
            self.sums.append(Lane(number, self.keys.server.begin(self.subjects[number])))
            self.note_requests(self.sums[-1])
        if not self.keys.open and (self.keys.lost or self.keys.number in self.subjects) and self.keys.number < ROUNDS:
            number = self.keys.number + 1
            self.keys = Lane(number, self.scheme.keys(self.session(number)))
            self.note_requests(self.keys)

    # --- the participants ---

    def let_answer(self, u, number, stage, request, *, state=None):
        """Participant u handles a request. It moves on and its answer is on its way, or it says why not and stays."""
        states = self.states[u, number]
        state = states[-1] if state is None else state
        entropy = deterministic_entropy(b"%d at %s of %d" % (u, stage.encode(), number))
        try:
            if stage in self.scheme.setup:
                session, identity = self.session(number), self.identity[u]
                answer, after = self.scheme.agree(stage, session, u, state, request, identity, entropy)
            elif stage == "MaskedInput":
                if number not in self.subjects:  # it has not been told what is summed
                    return None
                session, subject, vector = self.session(number), self.subjects[number], self.vectors[number][u]
                answer, after = self.scheme.contribute(session, u, state, request, subject, vector, self.identity[u])
            else:
                answer, after = self.scheme.step(stage, state, request, self.identity[u])
        except SecAggError:
            return None
        answers = self.said.setdefault((u, number, stage), [])
        if answer not in answers:
            answers.append(answer)
        self.last[u, number] = state, stage, request
        states.append(after)
        self.flight.append((u, number, stage, answer))
        self.past.append((u, number, stage, answer))
        return answer

    def due(self, lane):
        """Who is asked at this stage and has said nothing yet."""
        return [u for u in lane.requests if (u, lane.number, lane.server.stage) not in self.said]

    def all_due(self):
        return [(lane, u) for lane in self.lanes() for u in self.due(lane)]

    def spare(self, lane):
        """How many can still fail at this stage without losing the round."""
        place = lane.number, lane.server.stage
        here = lane.answered | set(self.due(lane)) | {u for u, *at, _ in self.flight if tuple(at) == place}
        return len(here & lane.requests.keys()) - self.params.threshold

    @rule(without=some, order=pick, ruthless=ruthless)
    def ask(self, without, order, ruthless):
        for lane in self.lanes():
            left_out = [u for u in self.due(lane) if without >> u & 1]
            if not ruthless:
                left_out = left_out[: max(0, self.spare(lane))]
            due = [u for u in self.due(lane) if u not in left_out]
            for u in np.random.default_rng(order).permutation(due).tolist():
                self.let_answer(u, lane.number, lane.server.stage, lane.requests[u])

    @rule(who=pick, changes=edits, ruthless=ruthless)
    def ask_with_a_changed_request(self, who, changes, ruthless):
        if (due := self.all_due()) and self.params.active:
            lane, u = due[who % len(due)]
            if ruthless or self.spare(lane) > 0:
                self.let_answer(u, lane.number, lane.server.stage, edited(lane.requests[u], changes))

    @rule(who=pick, which=pick, of_now=st.booleans(), astray=ruthless)
    def ask_with_an_older_or_anothers_request(self, who, which, of_now, astray):
        everybody, lanes = range(len(self.identity)), self.lanes()
        lane = lanes[which % len(lanes)] if lanes else None
        if of_now and lane is not None:
            unasked = [u for u in everybody if u not in lane.requests] or everybody
            u, number, stage = unasked[who % len(unasked)], lane.number, lane.server.stage
            request = list(lane.requests.values())[which % len(lane.requests)]
        else:
            u, (number, stage, request) = who % len(everybody), self.asked[which % len(self.asked)]
        if astray and self.params.active:  # into another round
            number = 1 + (number + who) % ROUNDS
        if stage != "AdvertiseKeys":  # a round that was begun is not begun again: that is kept above this layer
            self.let_answer(u, number, stage, request)

    @rule(who=pick)
    def retry_from_the_state_before(self, who):
        if self.last:
            u, number = sorted(self.last)[who % len(self.last)]
            state, stage, request = self.last[u, number]
            before = self.said[u, number, stage][-1], self.states[u, number][-1]
            answer = self.let_answer(u, number, stage, request, state=state)
            assert (answer, self.states[u, number][-1]) == before or (u, number) in self.rolled_back

    @rule(who=pick, which=pick)
    def restore_an_older_state(self, who, which):
        if several := sorted(at for at, states in self.states.items() if len(states) > 2):
            at = several[who % len(several)]
            self.states[at].append(self.states[at][1 + which % (len(self.states[at]) - 1)])
            self.rolled_back.add(at)
            self.last.pop(at, None)

    # --- the way up ---

    def deliver(self, u, number, stage, answer, genuine=None, *, astray=False):
        """An answer reaches the server, which takes it or refuses it, and blames nobody else."""
        to_keys = (stage in self.scheme.setup) != astray
        if not to_keys and not self.sums:
            return
        lane = self.keys if to_keys else self.sums[-1]
        at, refused = lane.server.stage, None
        try:
            lane.server.receive(u, answer)
        except SecAggError as error:
            refused = error
        if at == "done":
            assert refused is not None
            return
        if refused is not None:
            assert isinstance(refused, RemoteProtocolError)
            assert refused.culprits == {self.params.roster.name(u)}
            return
        assert u in lane.requests
        assert u not in lane.answered
        assert at == stage
        # Nothing is taken into another round, unless it was changed to say so and is not signed.
        signed = self.params.active and stage not in ("MaskedInput", "Unmask")
        assert number == lane.number or (genuine is not None and not signed)
        lane.answered.add(u)
        if genuine is not None:
            lane.changed.add(u)
        if at == "MaskedInput":
            size = self.shape[0]
            lane.arrived[u] = self.ring.unpack(decode(answer, MaskedInput).packed, size).astype(object)
            lane.arrived[u] -= self.ring.unpack(decode(genuine or answer, MaskedInput).packed, size).astype(object)

    @rule(without=some, order=pick)
    def deliver_what_is_on_its_way(self, without, order):
        gone = [entry for entry in self.flight if not without >> entry[0] & 1]
        self.flight = [entry for entry in self.flight if without >> entry[0] & 1]
        for i in np.random.default_rng(order).permutation(len(gone)).tolist():
            self.deliver(*gone[i])

    def under_way(self, which):
        """Whether an answer is on its way; if need be, somebody is asked for one first."""
        if not self.flight and (due := self.all_due()):
            lane, u = due[which % len(due)]
            self.let_answer(u, lane.number, lane.server.stage, lane.requests[u])
        return bool(self.flight)

    def can_spare(self, number, stage):
        """Whether an answer of this round and stage may be lost without losing the round."""
        return all(self.spare(lane) > 0 for lane in self.lanes() if (lane.number, lane.server.stage) == (number, stage))

    @rule(which=pick, ruthless=ruthless)
    def lose_one(self, which, ruthless):
        if self.under_way(which):
            _, number, stage, _ = self.flight[which % len(self.flight)]
            if ruthless or self.can_spare(number, stage):
                del self.flight[which % len(self.flight)]

    @rule(which=pick, astray=ruthless)
    def deliver_one_again_or_late(self, which, astray):
        if self.past:
            self.deliver(*self.past[which % len(self.past)], astray=astray)

    @rule(which=pick)
    def deliver_one_of_another_round(self, which):
        """To a server that waits for the same participant's answer at the same stage of its own round."""
        for lane in self.lanes():
            waiting = lane.requests.keys() - lane.answered
            late = [
                entry
                for entry in self.past
                if entry[0] in waiting and entry[1] != lane.number and entry[2] == lane.server.stage
            ]
            if late:
                self.deliver(*late[which % len(late)])

    @rule(which=pick, changes=edits, ruthless=ruthless)
    def deliver_one_changed(self, which, changes, ruthless):
        if self.under_way(which):
            u, number, stage, answer = self.flight[which % len(self.flight)]
            # A changed vector or share may be taken; anything else is refused, and its sender is out.
            if ruthless or stage in ("MaskedInput", "Unmask") or self.can_spare(number, stage):
                del self.flight[which % len(self.flight)]
                changed = edited(answer, changes)
                # A vector that is said to be of another round than it was masked for adds noise: nothing to compare.
                if stage != "MaskedInput" or not self.relabelled(answer, changed):
                    self.deliver(u, number, stage, changed, answer)

    def relabelled(self, answer, changed):
        try:
            return decode(answer, MaskedInput).terms != decode(changed, MaskedInput).terms
        except SecAggError:
            return False

    # --- the stages ---

    def enough(self, lane):
        return len(lane.answered) >= self.params.threshold

    def ready(self):
        return [lane for lane in self.lanes() if self.enough(lane)]

    def short(self):
        return [lane for lane in self.lanes() if not self.enough(lane)]

    def close_lane(self, lane):
        try:
            lane.server.close()
        except SecAggError as error:
            # Only opening can fail with enough answers, and only if some of them were changed on their way.
            assert lane.server.stage == "Unmask"
            lane.lost = error
        else:
            self.note_requests(lane)
        self.go_on()

    @precondition(lambda self: self.ready())
    @rule(which=pick)
    def close(self, which):
        self.close_lane(self.ready()[which % len(self.ready())])

    @precondition(lambda self: self.short())
    @rule(which=pick, ruthless=ruthless)
    def close_with_too_few(self, which, ruthless):
        """The stage stays open, unless nobody is left to wait for."""
        lane = self.short()[which % len(self.short())]
        stage = lane.server.stage
        with pytest.raises(BelowThreshold) as caught:
            lane.server.close()
        assert lane.server.stage == stage
        if ruthless or not self.due(lane):
            lane.lost = caught.value
            self.go_on()

    @precondition(lambda self: self.lanes())
    @rule(without=some)
    def play_a_stage(self, without):
        """A stage of the sum, and one of the next keys with it, to their ends, less those that can be spared."""
        self.ask(without, 0, False)
        self.deliver_what_is_on_its_way(0, 0)
        for lane in self.ready():
            self.close_lane(lane)

    # --- what holds at any time ---

    @invariant()
    def nobody_masks_twice(self):
        for (u, number, stage), answers in self.said.items():
            if stage == "MaskedInput" or (u, number) not in self.rolled_back:
                assert len(answers) == 1, f"{u} gave {len(answers)} answers at {stage} of round {number}"

    @invariant()
    def one_kind_of_share_of_anyone(self):
        """Within a round; over all that was ever sent, whether it arrived or not, so for each participant's answers."""
        alive, dropped = set(), set()
        for (_, number, stage), answers in self.said.items():
            if stage == "Unmask":
                for answer in answers:
                    shares = decode(answer, UnmaskShares)
                    alive |= {(number, v) for v in shares.of_self_mask_seed}
                    dropped |= {(number, v) for v in shares.of_mask_secret}
        assert not alive & dropped

    @invariant()
    def sums_are_exact(self):
        for lane in self.sums:
            result = lane.server.result
            if result is None:
                continue
            assert lane.server.stage == "done"
            assert result.contributors == lane.arrived.keys()
            assert len(result.contributors) >= self.params.threshold
            assert result.suspects <= lane.changed, "nobody is a suspect for being late, or back from an older state"
            # A vector is not signed: one that was changed on its way counts as it came.
            sent = self.vectors[lane.number]
            expected = sum(sent[u].astype(object) + lane.arrived[u] for u in result.contributors)
            assert (result.total == expected % self.ring.modulus).all()

    def teardown(self):
        """Nothing goes wrong any more: each round opens, or is lost for a reason."""
        if not hasattr(self, "keys"):
            return
        while at := [(lane, lane.server.stage) for lane in self.lanes()]:
            self.play_a_stage(0)
            for lane, stage in at:
                if lane.open and lane.server.stage == stage:
                    self.close_with_too_few(self.short().index(lane), True)
        self.nobody_masks_twice()
        self.one_kind_of_share_of_anyone()
        self.sums_are_exact()
        assert self.keys.number == ROUNDS
        assert all(lane.server.result is not None or lane.lost is not None for lane in self.sums)


common = {"deadline": None, "suppress_health_check": list(HealthCheck)}


class TestRoundsUnderFire(RoundsUnderFire.TestCase):
    settings = settings(max_examples=150, stateful_step_count=30, derandomize=True, **common)


@pytest.mark.slow
class TestManyRoundsUnderFire(RoundsUnderFire.TestCase):
    settings = settings(max_examples=3000, stateful_step_count=50, **common)

"""Attacks over several rounds: what belongs to one round used in another, and secrets of one round to open another.

Rounds are played as they overlap in a study: the keys of the next are agreed before the sum of this one is known.
"""

import hashlib
from functools import cached_property
from itertools import combinations, product

import numpy as np
import pytest

from secagg import BelowThreshold, RemoteProtocolError, deterministic_entropy
from secagg.keys import AgreementKey, agreement_public
from secagg.masking import client, server
from secagg.masking.messages import KeyDirectory, ShareInbox
from secagg.prg import add_keystream
from secagg.shamir import recover
from tests.secagg.simulation import STAGES, Party, Round, changed, oracle, refuses

MODES = ("active", "semi-honest")
both_ways = pytest.mark.parametrize(
    ("here", "there"), [(1, 2), (2, 1)], ids=["later into earlier", "earlier into later"]
)


def two_rounds(until, mode="active"):
    """Two rounds of the same four participants, played side by side; what they sum is another model."""
    party = Party(4, mode=mode, threshold=3)
    games = {number: Round(party.at(number)) for number in (1, 2)}
    for number, game in games.items():
        game.subject = game.party.subject = changed(party.subject, model_digest=bytes([number]) * 32)
    for stage in STAGES[1 : STAGES.index(until) + 1]:
        for game in games.values():
            if stage != "ConsistencyCheck" or mode == "active":
                game.play(stage)
    return games


def of_another_session(games, here, there, said):
    """The server of one round refuses what participant 1 says in another, by name, and is where it was."""
    game = games[here]
    before, total = game.server, getattr(game.server, "total", np.zeros(0)).copy()
    says = f"site001 sent a message of another session: round {there} where {here} was expected$"
    with pytest.raises(RemoteProtocolError, match=says) as caught:
        game.receive(1, said)
    assert caught.value.culprits == {"site001"}
    assert game.server is before
    assert (getattr(before, "total", np.zeros(0)) == total).all()


def test_rounds_whose_keys_are_agreed_side_by_side_open_to_their_own_sums():
    games = two_rounds("MaskedInput")
    for game in games.values():
        game.play()
        assert (game.server.total == oracle(game.party, game.vectors, frozenset(range(4)))).all()


def test_keys_that_are_agreed_wait_until_it_is_known_what_they_are_for():
    """The model of the next round is the sum of this one: it cannot be known when the next keys are agreed."""
    party = Party(4)
    this, following = Round(party.at(1)).play("ConsistencyCheck"), Round(party.at(2))
    following.subject = None
    following.play("MaskedInput")
    assert isinstance(following.server, server.Agreed)
    assert following.outbox == {}
    this.play(drop={3: "Unmask"})
    digest = hashlib.sha256(this.server.total.tobytes()).digest()
    following.party.subject = changed(party.subject, model_digest=digest)
    following.begin(following.party.subject)
    following.play(drop={3: "MaskedInput"})
    assert (following.server.total == oracle(party, following.vectors, frozenset(range(3)))).all()


@pytest.mark.parametrize("mode", MODES)
@both_ways
def test_keys_of_another_round_are_refused_by_the_server_in_the_name_of_their_sender(here, there, mode):
    games = two_rounds("AdvertiseKeys", mode)
    said = games[there].answer(1)
    of_another_session(games, here, there, said)
    if mode == "active":
        with pytest.raises(RemoteProtocolError, match="site001 did not sign its keys"):
            games[here].receive(1, changed(said, terms=games[here].party.session.terms))
    assert games[here].server.advertisements == {}


@pytest.mark.parametrize("mode", MODES)
@both_ways
def test_a_directory_of_another_round_is_refused(here, there, mode):
    games = two_rounds("ShareKeys", mode)
    listed, others = games[here].outbox[0].advertisements, games[there].outbox[0].advertisements
    refuses(games[here], 0, KeyDirectory(others), match="other keys for us")
    says = f"another session: round {there} where {here} was expected"
    for v in (1, 2, 3):
        refuses(games[here], 0, KeyDirectory({**listed, v: others[v]}), match=f"site00{v} are for {says}")
    refuses(games[here], 0, KeyDirectory({**others, 0: listed[0]}), match=f"site001 are for {says}")


@pytest.mark.parametrize("mode", MODES)
@both_ways
def test_shares_and_commitments_of_another_round_are_refused_in_the_name_of_their_sender(here, there, mode):
    games = two_rounds("ShareKeys", mode)
    own, other = games[here].answer(1), games[there].answer(1)
    of_another_session(games, here, there, other)
    if mode == "active":
        for message in (changed(other, terms=own.terms), changed(own, commitment=other.commitment)):
            with pytest.raises(RemoteProtocolError, match="site001 did not sign its commitment") as caught:
                games[here].receive(1, message)
            assert caught.value.culprits == {"site001"}
    assert games[here].server.received == {}


@both_ways
def test_without_signatures_shares_that_are_said_to_be_of_this_round_do_not_open(here, there):
    games = two_rounds("ShareKeys", "semi-honest")
    game, other = games[here], games[there].answer(1)
    for u in range(4):
        own = game.answer(u)
        game.receive(u, changed(other, terms=own.terms) if u == 1 else own)
    game.close()
    for u in (0, 2, 3):
        refuses(game, u, None, match=f"1 to {u} do not open")


@pytest.mark.parametrize("mode", MODES)
@both_ways
def test_boxes_of_another_round_are_refused_by_whom_they_reach(here, there, mode):
    games = two_rounds("MaskedInput", mode)
    boxes, others = games[here].outbox[0].boxes, games[there].outbox[0].boxes
    refuses(games[here], 0, ShareInbox(others), match="1 to 0 do not open")
    for v in (1, 2, 3):
        refuses(games[here], 0, ShareInbox({**boxes, v: others[v]}), match=f"{v} to 0 do not open")


@pytest.mark.parametrize("mode", MODES)
@both_ways
def test_a_vector_of_another_round_is_refused_in_the_name_of_its_sender(here, there, mode):
    games = two_rounds("MaskedInput", mode)
    said = games[there].answer(1)
    of_another_session(games, here, there, said)
    says = f"site001 did not sum what was asked for: model 0{there}0{there}.* where 0{here}0{here}"
    with pytest.raises(RemoteProtocolError, match=says) as caught:
        games[here].receive(1, changed(said, terms=games[here].party.session.terms))
    assert caught.value.culprits == {"site001"}
    assert not games[here].server.total.any()


@pytest.mark.parametrize("mode", MODES)
@both_ways
def test_a_vector_of_another_round_over_the_same_subject_is_refused_in_the_name_of_its_sender(here, there, mode):
    """A round that was lost is played again with the same model; then a vector of the first try arrives."""
    party = Party(4, mode=mode, threshold=3)
    games = {number: Round(party.at(number)).play("MaskedInput") for number in (1, 2)}
    of_another_session(games, here, there, games[there].answer(1))
    assert games[here].server.survivors == frozenset()
    assert not games[here].server.total.any()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("stage", ["AdvertiseKeys", "ShareKeys", "MaskedInput", "Unmask"])
@pytest.mark.parametrize("gone", [{}, {3: "MaskedInput"}], ids=["all there", "one gone"])
@both_ways
def test_who_is_late_with_an_answer_of_a_lost_round_is_still_in_the_next(here, there, gone, stage, mode):
    """Over the same subject: nothing but the number of the round tells the two tries apart."""
    party = Party(4, mode=mode, threshold=3)
    games = {number: Round(party.at(number)).play(stage, gone) for number in (1, 2)}
    of_another_session(games, here, there, games[there].answer(1))
    game = games[here].play(drop=gone)
    assert game.server.survivors == set(range(4)) - gone.keys()
    assert game.server.suspects == frozenset()
    assert (game.server.total == oracle(party, game.vectors, game.server.survivors)).all()


@pytest.mark.parametrize("mode", MODES)
@both_ways
def test_who_is_late_with_its_shares_and_sends_no_others_is_no_suspect(here, there, mode):
    party = Party(4, mode=mode, threshold=3)
    games = {number: Round(party.at(number)).play("Unmask") for number in (1, 2)}
    game = games[here]
    of_another_session(games, here, there, games[there].answer(1))
    game.play(drop={1: "Unmask"})
    assert game.server.survivors == set(range(4))
    assert game.server.suspects == frozenset()
    assert (game.server.total == oracle(party, game.vectors, frozenset(range(4)))).all()


@pytest.mark.parametrize("mode", MODES)
@both_ways
def test_shares_that_all_come_from_a_lost_round_leave_too_few(here, there, mode):
    party = Party(4, mode=mode, threshold=3)
    games = {number: Round(party.at(number)).play("Unmask") for number in (1, 2)}
    for u in range(4):
        says = f"site00{u} sent a message of another session: round {there} where {here} was expected$"
        with pytest.raises(RemoteProtocolError, match=says) as caught:
            games[here].receive(u, games[there].answer(u))
        assert caught.value.culprits == {f"site00{u}"}
    with pytest.raises(BelowThreshold) as caught:
        games[here].close()
    assert (caught.value.stage, caught.value.present) == ("Unmask", 0)


@both_ways
def test_confirmations_of_another_round_are_refused_by_the_server_and_by_everyone(here, there):
    games = two_rounds("ConsistencyCheck")
    said = games[there].answer(1)
    with pytest.raises(RemoteProtocolError, match="site001 confirms another sum: model") as caught:
        games[here].receive(1, said)
    assert caught.value.culprits == {"site001"}
    with pytest.raises(RemoteProtocolError, match="site001 did not sign the survivors") as caught:
        games[here].receive(1, changed(said, subject=games[here].subject))
    assert caught.value.culprits == {"site001"}
    games = two_rounds("Unmask")
    refuses(games[here], 0, games[there].outbox[0], match="site000 did not sign the survivors")


@both_ways
def test_a_confirmation_of_another_round_over_the_same_subject_is_refused(here, there):
    """A round that was lost is played again with the same model: what is signed is bound to its number as well."""
    party = Party(4, threshold=3)
    games = {number: Round(party.at(number)).play("ConsistencyCheck") for number in (1, 2)}
    with pytest.raises(RemoteProtocolError, match="site001 did not sign the survivors") as caught:
        games[here].receive(1, games[there].answer(1))
    assert caught.value.culprits == {"site001"}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("gone", [{}, {3: "MaskedInput"}], ids=["all there", "one gone"])
@both_ways
def test_shares_of_another_round_that_are_said_to_be_of_this_open_nothing_or_name_their_sender(here, there, gone, mode):
    """Whoever writes the terms of this round over shares of another lies."""
    games = two_rounds("MaskedInput", mode)
    for game in games.values():
        game.play("Unmask", gone)
    others = {u: games[there].answer(u) for u in games[there].outbox}
    of_another_session(games, here, there, others[1])
    others = {u: changed(said, terms=games[here].party.session.terms) for u, said in others.items()}
    one, all_of_them = games[here].fork(), games[here]
    for u in one.outbox:
        one.receive(u, others[u] if u == 1 else one.answer(u))
    for u in all_of_them.outbox:
        all_of_them.receive(u, others[u])
    with pytest.raises(RemoteProtocolError, match="do not lead to the secret"):
        all_of_them.close()
    if gone:
        with pytest.raises(RemoteProtocolError, match="do not lead to the secret"):
            one.close()
        return
    one.close()
    assert one.server.suspects == {1}
    assert (one.server.total == oracle(one.party, one.vectors, frozenset(range(4)))).all()


# --- secrets that come out do not open other rounds ---

SMALL = 1 << 10
PAIRS = list(combinations(range(4), 2))


class Eavesdropper:
    """A server that keeps all it has ever been sent and all it has ever reconstructed, over every round.

    Attributes:
        secrets: X25519 secrets to try: the s_v of the dropped; later, whatever else fell into its hands.
        seeds: b_u of the survivors.
    """

    def __init__(self):
        self.rounds = {}
        self.secrets = set()
        self.seeds = set()

    def watch(self, game, vectors):
        """A round up to its end, as the server has seen it."""
        session, answers = game.party.session, game.server.answers
        bound_to = game.party.mask_id(game.server.commitments)
        self.rounds[session.round] = session.id, bound_to, game.server, vectors
        for u in game.server.survivors:
            shares = {v: answer.of_self_mask_seed[u] for v, answer in answers.items()}
            digest = game.server.commitments[u].digest
            self.seeds.add(
                self.recovered(game, shares, lambda b, u=u, c=digest: client.commitment(b, session.id, u) == c)
            )
        for v in game.server.dropped:
            shares = {u: answer.of_mask_secret[v] for u, answer in answers.items()}
            public = game.server.directory[v].mask_key
            self.secrets.add(self.recovered(game, shares, lambda s, public=public: agreement_public(s) == public))

    def recovered(self, game, shares, is_secret):
        return recover(shares, game.party.session.params.threshold, is_secret)[0]

    @cached_property
    def pairwise_keys(self):
        """For each pair, all keys that can be made for the mask between them: (secret, whose public key it was agreed
        with, of which round, session, sum) to key. Every secret with every public key of either, under every session
        and every sum."""
        pairs = {pair: {} for pair in PAIRS}
        for (u, v), secret, number in product(PAIRS, self.secrets, self.rounds):
            directory = self.rounds[number][2].directory
            for of, session in product((u, v), self.rounds):
                own = AgreementKey(secret)
                shared = client.pairwise_secret(own, directory[of].mask_key, self.rounds[session][0], u, v)
                for target in self.rounds:
                    key = client.pairwise_key(shared, self.rounds[target][1], u, v)
                    pairs[u, v][secret, of, number, session, target] = key
        return pairs

    def open(self, number, u):
        """Participant u's vector of a round, or None. It is recognised by its values: they are small.

        It takes off every self mask that it can make, and all masks with others that it can make out of one secret.
        """
        state, vectors = self.rounds[number][2:]
        ring, size = state.subject.ring, state.subject.dimension
        without = [ring.unpack(vectors[u], size)]
        for seed, entry in product(self.seeds, self.rounds.values()):
            without.append(without[0].copy())
            add_keystream(without[-1], client.self_mask_key(seed, entry[1], u), -1)
        masks = {}
        for v in state.commitments.keys() - {u}:
            for (secret, of, *where), key in self.pairwise_keys[min(u, v), max(u, v)].items():
                mask = masks.setdefault((secret, of == u, *where), ring.zeros(size))
                add_keystream(mask, key, client.mask_sign(u, v))
        for mask in masks.values():
            for vector in ring.reduce(np.array(without) - mask):
                if (vector < SMALL).all():
                    return vector
        return None


def overlapping_rounds(gone, *, reused=False):
    """A study of four participants, a round for each entry of `gone`, which says who is lost after sharing its keys.

    The keys of a round are agreed before the sum of the round before is confirmed. Vectors are small numbers.

    Args:
        gone: Number of a round to the participants that drop out of it.
        reused: The mistake to attack: every participant makes its keys from the same entropy in each round.

    Returns:
        The server's memory; the vectors; what each pair of participants shared, by round; the identities' secrets.
    """
    party = Party(4, threshold=3, dimension=32, bits=32)
    identity_secrets = [deterministic_entropy(b"participant %d" % u)(32) for u in range(4)]
    spy, vectors, shared = Eavesdropper(), {}, {}

    def agree(number):
        game = Round(party.at(number))
        game.subject = game.party.subject = changed(party.subject, model_digest=bytes([number]) * 32)
        game.vectors = vectors[number] = {
            u: np.random.default_rng([number, u]).integers(0, SMALL, 32, np.uint32) for u in range(4)
        }
        if reused:
            for u in range(4):
                party.entropy[u] = deterministic_entropy(b"keys of %d" % u)
        game.play("ShareKeys")
        if reused:
            for u in range(4):
                party.entropy[u] = deterministic_entropy(b"seed of %d in %d" % (u, number))
        game.play("MaskedInput")
        shared[number] = {u: state.pairwise_secrets for u, state in game.states.items()}
        return game

    following = agree(min(gone))
    for number, dropped in gone.items():
        game = following
        said = {}
        for u in game.outbox:
            if u not in dropped:
                said[u] = game.answer(u)
                game.receive(u, said[u])
        game.close()
        if number + 1 in gone:
            following = agree(number + 1)
        game.play("Unmask")
        for u in game.outbox:
            game.receive(u, game.answer(u))
        spy.watch(game, {u: message.packed for u, message in said.items()})
        game.close()
        assert (game.server.total == oracle(game.party, game.vectors, game.server.survivors)).all()
    return spy, vectors, shared, identity_secrets


GONE = {1: set(), 2: {0}, 3: {3}}
TARGETS = [(number, u) for number, dropped in GONE.items() for u in range(4) if u not in dropped]


def test_a_secret_that_came_out_opens_no_vector_of_any_round():
    """Two participants dropped out, each in one round, and were in all others. The attacker has all that the server was
    ever sent, all that it reconstructed, and after the study the long-term keys of everyone; it tries each of them, a
    self-mask seed too, as an agreement key with every public key, under every session and sum."""
    spy, _, shared, identities = overlapping_rounds(GONE)
    assert (len(spy.secrets), len(spy.seeds)) == (2, len(TARGETS))
    spy.secrets |= set(identities) | {hashlib.sha512(secret).digest()[:32] for secret in identities} | spy.seeds
    for number, u in TARGETS:
        assert spy.open(number, u) is None
    # And with no regard to how masks might be put together: the only keys that it can make are those with whoever was
    # lost in that very round, which is what the secret was reconstructed for.
    for number, (u, v) in product(GONE, PAIRS):
        made = set(spy.pairwise_keys[u, v].values())
        real = client.pairwise_key(shared[number][u][v], spy.rounds[number][1], u, v)
        assert (real in made) == bool({u, v} & GONE[number])


def test_the_same_attack_opens_the_vectors_of_participants_that_reuse_their_keys():
    """What it is for that keys are fresh: whoever drops out once has then shown its vectors of all other rounds."""
    spy, vectors, shared, _ = overlapping_rounds(GONE, reused=True)
    for number, u in TARGETS:
        opened = spy.open(number, u)
        if u in (0, 3):
            assert (opened == vectors[number][u]).all()
        else:
            assert opened is None
    for number, (u, v) in product(GONE, PAIRS):
        made = set(spy.pairwise_keys[u, v].values())
        real = client.pairwise_key(shared[number][u][v], spy.rounds[number][1], u, v)
        assert (real in made) == bool({u, v} & {0, 3})

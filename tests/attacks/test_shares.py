"""Wrong shares: the liar is named where the others suffice, and a sum is right or there is none."""

import msgspec
import pytest

from secagg import LocalProtocolError, Params, RemoteProtocolError
from secagg.keys import AgreementKey
from secagg.masking import client, server
from secagg.masking.messages import Commitment
from secagg.prg import Label
from secagg.sealed import channel_key, seal
from secagg.shamir import PRIME, recover, split
from tests.secagg.simulation import Party, Round, changed, oracle

MODES = ("active", "semi-honest")
WRONG = (12345).to_bytes(33, "big")


def at_unmasking(n, threshold, *, mode="active", gone=()):
    """A round whose last stage is open, the `gone` lost after they shared their keys."""
    game = Round(Party(n, threshold=threshold, mode=mode))
    return game.play("Unmask", dict.fromkeys(gone, "MaskedInput"))


def finish(game, lies):
    """Everyone answers, the liars what `lies` makes of the honest answer; the opened sum."""
    for u in list(game.outbox):
        honest = game.answer(u)
        game.receive(u, lies[u](honest) if u in lies else honest)
    game.close()
    return game.server


def with_share(of, field, value=WRONG):
    """The lie: another share of one participant's secret."""

    def lie(honest):
        return msgspec.structs.replace(honest, **{field: {**getattr(honest, field), of: value}})

    return lie


def assert_exact(game, opened):
    assert (opened.total == oracle(game.party, game.vectors, opened.survivors)).all()


BAD_SHARES = [WRONG, bytes(33), PRIME.to_bytes(33, "big"), b"\xff" * 33, b"", bytes(32), bytes(34)]
bad_shares = pytest.mark.parametrize("value", BAD_SHARES, ids=["other", "zero", "p", "most", "none", "short", "long"])


@pytest.mark.parametrize("mode", MODES)
@bad_shares
def test_a_wrong_share_of_a_self_mask_names_its_sender_and_the_sum_is_right(value, mode):
    game = at_unmasking(6, 5, mode=mode)
    opened = finish(game, {2: with_share(4, "of_self_mask_seed", value)})
    assert opened.suspects == {2}
    assert_exact(game, opened)


@pytest.mark.parametrize("mode", MODES)
@bad_shares
def test_a_wrong_share_of_a_dropped_participants_key_names_its_sender_and_the_sum_is_right(value, mode):
    game = at_unmasking(7, 5, mode=mode, gone=[6])
    opened = finish(game, {0: with_share(6, "of_mask_secret", value)})
    assert opened.suspects == {0}
    assert opened.survivors == set(range(6))
    assert_exact(game, opened)


def test_liars_about_different_secrets_are_all_named():
    game = at_unmasking(7, 5, gone=[6])
    lies = {0: with_share(6, "of_mask_secret"), 1: with_share(3, "of_self_mask_seed")}
    opened = finish(game, lies)
    assert opened.suspects == {0, 1}
    assert_exact(game, opened)


@pytest.mark.parametrize("field", ["of_self_mask_seed", "of_mask_secret"])
@pytest.mark.parametrize("liars", [1, 2, 3, 5])
def test_too_many_wrong_shares_lose_the_round_and_never_give_a_wrong_sum(liars, field):
    """No surplus: six participants, threshold five, one of them gone."""
    game = at_unmasking(6, 5, gone=[5])
    owner = 5 if field == "of_mask_secret" else 4
    lies = {u: with_share(owner, field, (u + 99).to_bytes(33, "big")) for u in range(liars)}
    with pytest.raises(
        RemoteProtocolError, match=f"the secret of site00{owner}: .*do not lead to the secret"
    ) as caught:
        finish(game, lies)
    assert caught.value.culprits == frozenset(), "without a surplus nobody can tell whose share is wrong"


def test_a_share_under_another_owners_name():
    """A participant exchanges what it holds of two others."""

    def exchange(honest):
        held = dict(honest.of_self_mask_seed)
        held[3], held[4] = held[4], held[3]
        return changed(honest, of_self_mask_seed=held)

    game = at_unmasking(6, 5)
    opened = finish(game, {1: exchange})
    assert opened.suspects == {1}
    assert_exact(game, opened)


def test_a_share_copied_from_another_holder():
    """The place at which a share counts is its sender's number, which it cannot choose."""
    game = at_unmasking(6, 5)
    copied = game.fork().answer(0).of_self_mask_seed[4]
    opened = finish(game, {1: with_share(4, "of_self_mask_seed", copied)})
    assert opened.suspects == {1}
    assert_exact(game, opened)


def test_two_participants_that_send_each_others_answers_are_both_named():
    game = at_unmasking(9, 5, mode="semi-honest")
    answers = {u: game.answer(u) for u in game.outbox}
    answers[2], answers[5] = answers[5], answers[2]
    for u, answer in answers.items():
        game.receive(u, answer)
    game.close()
    assert game.server.suspects == {2, 5}
    assert_exact(game, game.server)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "lie",
    [
        lambda a: {"of_self_mask_seed": {v: s for v, s in a.of_self_mask_seed.items() if v != 1}},
        lambda a: {"of_self_mask_seed": {**a.of_self_mask_seed, 5: WRONG}},
        lambda a: {"of_mask_secret": {**a.of_mask_secret, 1: WRONG}},
        lambda a: {"of_mask_secret": {}},
        lambda a: {"of_self_mask_seed": {}, "of_mask_secret": {**a.of_mask_secret, **a.of_self_mask_seed}},
        lambda a: {"of_self_mask_seed": {**a.of_self_mask_seed, 99: WRONG}},
    ],
    ids=[
        "one missing",
        "both of the dropped",
        "both of the alive",
        "none of the dropped",
        "all as dropped",
        "a stranger",
    ],
)
def test_an_answer_with_other_shares_than_asked_for_is_refused_by_name(lie, mode):
    game = at_unmasking(6, 5, mode=mode, gone=[5])
    with pytest.raises(RemoteProtocolError, match="site003 answered with shares of other participants") as caught:
        game.receive(3, changed(honest := game.answer(3), **lie(honest)))
    assert caught.value.culprits == {"site003"}


def test_the_servers_answers_hold_the_self_mask_of_the_alive_and_the_key_of_the_dropped_only():
    """So that it can reconstruct s_v for nobody in U3, and b_v for nobody outside."""
    game = at_unmasking(7, 5, gone=[2])
    for u in list(game.outbox):
        game.receive(u, game.answer(u))
    for answer in game.server.answers.values():
        assert set(answer.of_self_mask_seed) == {0, 1, 3, 4, 5, 6}
        assert set(answer.of_mask_secret) == {2}


def a_dealer_that_lies(n, threshold, *, seed=None, secret=None, commit=None, tamper=None):
    """A round up to MaskedInput in which participant 1 shares, or commits to, something else than it should.

    Args:
        n: Participants.
        threshold: t.
        seed: What it shares as its self-mask seed; by default the one it masks with.
        secret: What it shares as its mask key; by default its own.
        commit: What it commits to; by default the seed it masks with.
        tamper: Receivers to a change of the share of the seed.
    """
    party = Party(n, threshold=threshold)
    game = Round(party).play("ShareKeys")
    sid, listed, advertised = party.session.id, game.outbox[1].advertisements, game.states[1]
    for u in range(n):
        if u != 1:
            game.receive(u, game.answer(u))
    honest = game.answer(1)
    state = game.states[1]
    of_secret = split(secret or advertised.mask_secret, threshold, listed, party.entropy[1])
    of_seed = split(seed or state.self_mask_seed, threshold, listed, party.entropy[1])
    of_seed = {v: tamper[v] if tamper and v in tamper else share for v, share in of_seed.items()}
    channel = AgreementKey(advertised.channel_secret)
    boxes = {}
    for v in honest.boxes:
        key = channel_key(channel.agree(listed[v].channel_key), sid, 1, v)
        text = (1).to_bytes(4, "big") + v.to_bytes(4, "big") + of_secret[v] + of_seed[v]
        boxes[v] = seal(key, sid, 1, v, text)
    game.states[1] = msgspec.structs.replace(state, own_shares=(of_secret[1], of_seed[1]))
    committed = client.commitment(commit or state.self_mask_seed, sid, 1)
    signature = party.identity[1].sign(Label.SIGN_COMMITMENT, sid, committed)
    game.receive(1, changed(honest, boxes=boxes, commitment=Commitment(committed, signature)))
    game.close()
    return game


def test_the_lying_dealer_of_these_tests_is_honest_when_it_tells_no_lie():
    game = a_dealer_that_lies(6, 5).play()
    assert_exact(game, game.server)


@pytest.mark.parametrize("lie", ["seed", "commit"])
def test_a_participant_that_shares_another_self_mask_than_it_committed_to_loses_the_round_in_its_name(lie):
    game = a_dealer_that_lies(6, 5, **{lie: b"\x42" * 32})
    with pytest.raises(RemoteProtocolError, match="the secret of site001"):
        game.play()


def test_a_participant_that_masks_with_another_seed_than_it_shares_and_commits_to_is_not_found():
    """It only spoils its own contribution, which it could choose anyway: the sum is off by a vector of its choice."""
    game = a_dealer_that_lies(6, 5, seed=b"\x42" * 32, commit=b"\x42" * 32).play()
    others = frozenset(range(6)) - {1}
    ring = game.subject.ring
    difference = game.server.total - oracle(game.party, game.vectors, others).astype(ring.dtype)
    assert ring.reduce(difference).any()
    assert game.server.suspects == frozenset()


def test_a_participant_that_shares_another_mask_key_and_drops_out_loses_the_round_in_its_name():
    game = a_dealer_that_lies(6, 5, secret=b"\x42" * 32)
    with pytest.raises(RemoteProtocolError, match="the secret of site001"):
        game.play(drop={1: "MaskedInput"})


def test_a_participant_that_shares_another_mask_key_and_stays_harms_nobody():
    game = a_dealer_that_lies(6, 5, secret=b"\x42" * 32).play()
    assert_exact(game, game.server)


def test_a_dealer_that_gives_one_participant_a_wrong_share_does_not_spoil_the_sum():
    game = a_dealer_that_lies(6, 5, tamper={4: WRONG}).play()
    assert_exact(game, game.server)


def test_a_dealer_that_gives_one_participant_a_wrong_share_makes_it_a_suspect_and_no_more():
    """Nobody can tell a wrong share that its holder made up from one that was dealt to it."""
    game = a_dealer_that_lies(6, 5, tamper={4: WRONG}).play()
    assert game.server.suspects == {4}


def test_two_liars_that_keep_the_secret_do_not_have_the_honest_named_in_their_place():
    """They change their shares by multiples of each other's Lagrange coefficient: the value at 0 stays, the
    polynomial does not. Of ten shares eight lie on the right one, and two liars are few enough to be told."""
    secret, t = bytes(range(32)), 7
    shares = split(secret, t, range(10), Party(3).entropy[0])
    xs = range(1, t + 1)

    def at_zero(i):
        value = 1
        for j in xs:
            if j != i:
                value = value * j * pow(j - i, -1, PRIME) % PRIME
        return value

    for liar, change in ((1, at_zero(2)), (2, -at_zero(1))):
        shares[liar - 1] = ((int.from_bytes(shares[liar - 1], "big") + change) % PRIME).to_bytes(33, "big")
    recovered, liars = recover(shares, t, secret.__eq__)
    assert recovered == secret
    assert liars <= {0, 1}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("threshold", [0, 1, 2, 7, 100])
def test_a_threshold_that_anyone_asks_for_out_of_range_makes_no_session(threshold, mode):
    """t = 1, more than n, or fewer than the mode needs; there is no way for a server to give a smaller one."""
    with pytest.raises(LocalProtocolError, match=f"got {threshold}"):
        Params(Party(6, mode=mode).session.params.roster, threshold, mode)


def test_t_minus_1_colluding_participants_and_the_server_do_not_have_the_key_of_an_honest_one():
    """The t - 1 shares they hold lead to any other secret as well: they fit a polynomial through every value at 0."""
    party = Party(6)
    game = Round(party).play("MaskedInput")
    seed = game.states[0].self_mask_seed
    game.play("ConsistencyCheck")
    held = {u: game.states[u].held[0][1] for u in range(1, 5)}
    assert len(held) == party.session.params.threshold - 1
    with pytest.raises(LocalProtocolError, match="5 shares are needed, got 4"):
        recover(held, party.session.params.threshold, seed.__eq__)
    with pytest.raises(RemoteProtocolError):
        recover({**held, 5: WRONG}, party.session.params.threshold, seed.__eq__)
    assert recover({**held, 5: game.states[5].held[0][1]}, 5, seed.__eq__) == (seed, frozenset())


@pytest.mark.parametrize("what", ["self-mask seeds", "mask keys"])
def test_what_is_reconstructed_is_compared_in_constant_time(what, monkeypatch):
    """Every comparison goes through the one function: where that says no, nothing opens."""
    game = at_unmasking(6, 5, gone=[5])
    checked = game.server.commitments[0].digest if what == "self-mask seeds" else game.server.directory[5].mask_key
    real = server.hmac.compare_digest
    monkeypatch.setattr(server.hmac, "compare_digest", lambda a, b: real(a, b) and checked not in (a, b))
    with pytest.raises(RemoteProtocolError, match="do not lead to the secret"):
        finish(game, {})

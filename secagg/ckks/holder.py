"""The side of a party that holds the keys of a study by itself: neither the server nor a participant.

It makes a key pair for every sum, decrypts that sum and nothing else, and adds noise before it lets go of it.
"""

from __future__ import annotations

from secagg.ckks.client import Finished
from secagg.ckks.decryption import (
    add_confirmed,
    add_packed,
    check_confirmations,
    check_contributors,
    partial_decryption,
    uploaders,
    zeros,
)
from secagg.ckks.joint_key import (
    JointKey,
    check_holder_key,
    holder_number,
    holder_payload,
    joined,
    key_id,
    key_share,
)
from secagg.ckks.messages import HeldAggregate, HeldUploads, HolderKey, PartialDecryption
from secagg.ckks.params import Setting
from secagg.errors import LocalProtocolError, RemoteProtocolError
from secagg.keys import Identity
from secagg.masking.params import Session
from secagg.prg import Entropy, Label
from secagg.wire import SecretState


class Holding(SecretState, frozen=True, tag=True):
    """The holder's, after it has advertised the key, for which `key` stands."""

    session: Session
    key: bytes
    seed: bytes
    flood: bytes


def hold_key(session: Session, setting: Setting, identity: Identity, entropy: Entropy) -> tuple[Holding, HolderKey]:
    """AdvertiseKeys at the holder: a fresh key pair for one sum, signed in any mode.

    Raises:
        LocalProtocolError: This is not the holder of the study's keys.
    """
    if setting.holder is None or setting.holder.identity != identity.public:
        raise LocalProtocolError("this is not the identity of who holds the keys in this study")
    terms, seed, flood, drawn = session.terms, entropy(32), entropy(32), entropy(32)
    sid, me = terms.session_id, holder_number(session)
    packed = key_share(setting.chain, sid, me, seed, drawn)
    signature = identity.sign(Label.SIGN_CKKS_HOLDER, sid, holder_payload(drawn, packed))
    return Holding(session, key_id(sid, drawn, {me: packed}), seed, flood), HolderKey(terms, drawn, packed, signature)


def holders_key(session: Session, shown: HolderKey, setting: Setting) -> JointKey:
    """The holder's public key.

    Raises:
        RemoteProtocolError: The holder did not sign it, or for another session.
        LocalProtocolError: The study has no holder.
    """
    if (holder := setting.holder) is None:
        raise LocalProtocolError("nobody holds the keys in this study")
    check_holder_key(session, shown, holder)
    return joined(setting.chain, session, shown.seed, {holder_number(session): shown.packed})


def decrypt_held(
    state: Holding, shown: HeldUploads | HeldAggregate, setting: Setting
) -> tuple[Finished, PartialDecryption]:
    """Decrypt at the holder: the sum of at least t uploads, once.

    Raises:
        BelowThreshold: Fewer than t uploads, or fewer than t who signed them.
        RemoteProtocolError: An upload that was not signed, or another mode's message.
        DecodeError: An upload that is none.
    """
    session = state.session
    layout = setting.packing(session, shown.subject)
    total, everyone = zeros(layout), uploaders(session, (holder_number(session),))
    if isinstance(shown, HeldAggregate) == session.params.active:
        raise RemoteProtocolError(f"the server sent what a session in {session.params.mode} mode does not have")
    if isinstance(shown, HeldAggregate):
        check_contributors(session, shown.aggregate.contributors, everyone)
        add_packed(total, shown.aggregate.second, layout)
    else:
        if strangers := (shown.digests.keys() | shown.signatures.keys()) - everyone:
            raise RemoteProtocolError(f"uploads of {session.names(strangers)}, who are not on the roster")
        check_confirmations(session, shown.subject, state.key, shown.digests, shown.signatures)
        add_confirmed(total, session, shown.subject, state.key, shown.digests, shown.uploads, layout)
    seeds = {holder_number(session): state.seed}
    return Finished(session), partial_decryption(session, seeds, state.flood, total, setting, layout)

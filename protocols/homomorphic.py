"""CKKS sums (`secagg.ckks`) behind the interface of `protocols.aggregation`, and the party that may hold their keys."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from typing import ClassVar

import msgspec

from protocols.aggregation import Bytes, KeyServer, Sum, SumServer, encoded, no_message, out_of_turn
from protocols.errors import StudyError
from protocols.messages import Answer, KeysRequest, Part, Refusal, Reply, Request, SumRequest
from secagg.ckks import client, holder, server
from secagg.ckks.decryption import uploaders
from secagg.ckks.joint_key import holder_number
from secagg.ckks.messages import (
    Aggregate,
    ChannelDirectory,
    ChannelKey,
    EncryptedInput,
    HeldAggregate,
    HeldUploads,
    HolderKey,
    KeyShare,
    KeyShares,
    Missing,
    PartialDecryption,
    SealedSeeds,
    SeedInbox,
    SeedShares,
    UploadDigest,
    UploadDirectory,
    Uploads,
    UploadsConfirmation,
    UploadsConfirmations,
)
from secagg.ckks.params import Setting
from secagg.errors import DecodeError, LocalProtocolError, RemoteProtocolError, SecAggError
from secagg.keys import Identity
from secagg.masking.params import Mode, Params, Session, Subject
from secagg.prg import Entropy
from secagg.ring import RingVector
from secagg.wire import Message, SecretState, decode, encode


class Ckks:
    """CKKS under a joint key that nobody holds, or under a holder's, or, for comparison, under one that all sites have.

    Args:
        setting: What the study fixes about these sums.
        mode: The sessions'.
    """

    name: ClassVar[str] = "ckks"
    last: str = "Decrypt"

    def __init__(self, setting: Setting, mode: Mode) -> None:
        self._setting, self._active = setting, mode == "active"
        check = ("CommitInput", "ConsistencyCheck") if self._active else ()
        agreement = ("AdvertiseKeys", "ShareKeys", "RevealKey")
        self.stages: tuple[str, ...] = (*check, "EncryptedInput", "Decrypt", "Recover")
        self.setup: tuple[str, ...] = () if setting.keys == "holder" else agreement
        self.ahead: Mapping[str, str] = dict(zip(self.stages, self.setup or agreement[:1], strict=False))

    def keys(self, session: Session) -> KeyServer:
        """The server that agrees on the key of one sum."""
        return _CkksKeys(session, self._setting)

    def cohort(self, stage: str, request: Bytes) -> frozenset[int] | None:
        """Whose uploads are summed, at the stage that shows them to all. With a holder, or shared keys, none does.

        Raises:
            DecodeError: The request is no message of the stage.
        """
        if stage != "Decrypt" or self._setting.keys != "threshold":
            return None
        if self._active:
            return frozenset(decode(request, Uploads).uploads)
        return frozenset(decode(request, Aggregate).contributors)

    def agree(
        self, stage: str, session: Session, me: int, state: bytes, request: Bytes, identity: Identity, entropy: Entropy
    ) -> tuple[bytes, bytes]:
        """A stage of the key agreement.

        Raises:
            RemoteProtocolError: The stage does not follow on the state, or the server lied.
            DecodeError: The request is no message of the stage.
        """
        next_state: client.ClientState
        message: Message
        if stage == "AdvertiseKeys":
            next_state, message = client.advertise(session, me, identity, entropy)
            return encode(message), encode(next_state)
        match stage, _state(state):
            case "ShareKeys", client.Advertised() as advertised:
                directory = decode(request, ChannelDirectory)
                next_state, message = client.share_seed(advertised, directory, self._setting, identity, entropy)
            case "RevealKey", client.Shared() as shared:
                next_state, message = client.reveal(shared, decode(request, SeedInbox), self._setting)
            case _, other:
                raise out_of_turn(stage, other)
        return encode(message), encode(next_state)

    def contribute(
        self,
        session: Session,
        me: int,
        state: bytes,
        request: Bytes,
        subject: Subject,
        vector: RingVector,
        identity: Identity,
    ) -> tuple[bytes, bytes]:
        """The first stage of a sum: encrypt, and in active mode say only what is going to be uploaded.

        Raises:
            RemoteProtocolError, DecodeError: As in `agree`.
        """
        setting = self._setting
        if setting.keys == "holder":
            key = holder.holders_key(session, decode(request, HolderKey), setting)
            revealed = client.outside(session, me)
        else:
            match _state(state):
                case client.Revealed() as revealed:
                    key = client.joint_key(revealed, decode(request, KeyShares), setting)
                case other:
                    raise out_of_turn(self.stages[0], other)
        encrypted = client.encrypt(revealed, key, setting, subject, vector)
        if self._active:
            return encode(client.commit(encrypted, identity)), encode(encrypted)
        uploaded, message = client.upload_semi_honest(encrypted)
        return encode(message), encode(uploaded)

    def step(self, stage: str, state: bytes, request: Bytes, identity: Identity) -> tuple[bytes, bytes]:
        """A later stage of a sum.

        Raises:
            RemoteProtocolError, DecodeError: As in `agree`.
        """
        next_state: client.ClientState
        message: Message
        match stage, _state(state):
            case "ConsistencyCheck", client.Encrypted() as encrypted:
                next_state, message = client.confirm(encrypted, decode(request, UploadDirectory), identity)
            case "EncryptedInput", client.Confirmed() as confirmed:
                next_state, message = client.upload(confirmed, decode(request, UploadsConfirmations))
            case "Decrypt", client.Uploaded() as uploaded if self._setting.keys != "holder":
                shown = decode(request, Uploads) if self._active else decode(request, Aggregate)
                next_state, message = client.decrypt(uploaded, shown, self._setting)
            case "Recover", client.Answered() as answered if self._setting.keys == "threshold":
                next_state, message = client.recover(answered, decode(request, Missing))
            case _, other:
                raise out_of_turn(stage, other)
        return encode(message), encode(next_state)


def _state(state: bytes) -> client.ClientState | None:
    return client.decode_state(state) if state else None


class _CkksKeys:
    """The first states of `secagg.ckks.server`, driven by bytes."""

    _names: ClassVar[dict[type, str]] = {
        server.CollectingKeys: "AdvertiseKeys",
        server.CollectingHolder: "AdvertiseKeys",
        server.CollectingSeeds: "ShareKeys",
        server.CollectingShares: "RevealKey",
        server.Agreed: "done",
    }

    def __init__(self, session: Session, setting: Setting) -> None:
        self._state: (
            server.CollectingKeys
            | server.CollectingHolder
            | server.CollectingSeeds
            | server.CollectingShares
            | server.Agreed
        ) = server.start(session, setting)
        everyone = [holder_number(session)] if setting.keys == "holder" else range(len(session.params.roster))
        self._outgoing: Mapping[int, Message | None] = dict.fromkeys(everyone)
        self._used = False
        self._session = session

    @property
    def stage(self) -> str:
        return self._names[type(self._state)]

    @property
    def members(self) -> frozenset[int] | None:
        if not isinstance(self._state, server.Agreed):
            return None
        return uploaders(self._session, self._state.holders)

    def requests(self) -> dict[int, bytes]:
        return encoded(self._outgoing)

    def receive(self, sender: int, answer: Bytes) -> None:
        try:
            match self._state:
                case server.CollectingKeys() as keys:
                    self._state = server.receive_channel_key(keys, sender, decode(answer, ChannelKey))
                case server.CollectingHolder() as waiting:
                    self._state = server.receive_holder_key(waiting, sender, decode(answer, HolderKey))
                case server.CollectingSeeds() as seeds:
                    self._state = server.receive_seeds(seeds, sender, decode(answer, SealedSeeds))
                case server.CollectingShares() as shares:
                    self._state = server.receive_key_share(shares, sender, decode(answer, KeyShare))
                case server.Agreed():
                    raise LocalProtocolError("the key is agreed; nothing more is expected")
        except DecodeError as error:
            raise no_message(self._session.params.roster.name(sender), self.stage, error) from error

    def close(self) -> None:
        match self._state:
            case server.CollectingKeys() as keys:
                self._state, self._outgoing = server.close_channel_keys(keys)
            case server.CollectingHolder() as waiting:
                self._state, self._outgoing = server.close_holder_key(waiting), {}
            case server.CollectingSeeds() as seeds:
                self._state, self._outgoing = server.close_seeds(seeds)
            case server.CollectingShares() as shares:
                self._state, self._outgoing = server.close_key_shares(shares), {}
            case server.Agreed():
                raise LocalProtocolError("the key is agreed; there is no stage to close")

    def begin(self, subject: Subject) -> SumServer:
        if not isinstance(self._state, server.Agreed):
            raise LocalProtocolError(f"the key is at {self.stage} still: there is nothing to encrypt to")
        if self._used:
            raise LocalProtocolError("the key has served for a sum, and serves only once")
        self._used = True
        return _CkksSum(self._state, subject)


class _CkksSum:
    """The later states of `secagg.ckks.server`, driven by bytes."""

    _names: ClassVar[dict[type, str]] = {
        server.CollectingDigests: "CommitInput",
        server.CollectingConfirmations: "ConsistencyCheck",
        server.CollectingUploads: "EncryptedInput",
        server.CollectingPartials: "Decrypt",
        server.CollectingSeedShares: "Recover",
        server.Opened: "done",
    }

    def __init__(self, agreed: server.Agreed, subject: Subject) -> None:
        self._state: (
            server.CollectingDigests
            | server.CollectingConfirmations
            | server.CollectingUploads
            | server.CollectingPartials
            | server.CollectingSeedShares
            | server.Opened
        )
        self._outgoing: Mapping[int, Message]
        self._state, self._outgoing = server.begin_sum(agreed, subject)
        self._roster = agreed.session.params.roster
        self.result: Sum | None = None

    @property
    def stage(self) -> str:
        return self._names[type(self._state)]

    def requests(self) -> dict[int, bytes]:
        return encoded(self._outgoing)

    def receive(self, sender: int, answer: Bytes) -> None:
        try:
            match self._state:
                case server.CollectingDigests() as digests:
                    self._state = server.receive_digest(digests, sender, decode(answer, UploadDigest))
                case server.CollectingConfirmations() as signing:
                    self._state = server.receive_confirmation(signing, sender, decode(answer, UploadsConfirmation))
                case server.CollectingUploads() as uploads:
                    self._state = server.receive_upload(uploads, sender, decode(answer, EncryptedInput))
                case server.CollectingPartials() as partials:
                    self._state = server.receive_partial(partials, sender, decode(answer, PartialDecryption))
                case server.CollectingSeedShares() as shares:
                    self._state = server.receive_seed_shares(shares, sender, decode(answer, SeedShares))
                case server.Opened():
                    raise LocalProtocolError("the sum is open; nothing more is expected")
        except DecodeError as error:
            raise no_message(self._roster.name(sender), self.stage, error) from error

    def close(self) -> None:
        match self._state:
            case server.CollectingDigests() as digests:
                self._state, self._outgoing = server.close_digests(digests)
            case server.CollectingConfirmations() as signing:
                self._state, self._outgoing = server.close_confirmations(signing)
            case server.CollectingUploads() as uploads:
                self._state, self._outgoing = server.close_uploads(uploads)
            case server.CollectingPartials() as partials:
                self._state, self._outgoing = server.close_partials(partials)
            case server.CollectingSeedShares() as shares:
                self._state, self._outgoing = server.close_seed_shares(shares), {}
            case server.Opened():
                raise LocalProtocolError("the sum is open; there is no stage to close")
        if isinstance(self._state, server.Opened):
            self.result = Sum(self._state.total, self._state.contributors, self._state.suspects)


class _Memory(SecretState, frozen=True):
    """What the holder remembers: the last round that it made a key for, the keys that wait, and its last answer."""

    advertised: int = -1
    waiting: dict[int, bytes] = msgspec.field(default_factory=dict)
    last_request: bytes = b""
    last_reply: bytes = b""


class Holder:
    """The party that holds the keys of a study with `keys = "holder"`, and gives no data. Bytes in, bytes out.

    Args:
        params: Of the study's sums, from its own copy of study and roster.
        setting: Likewise.
        context: Digest of the study.
        identity: Its long-term key.
        entropy: Source of keys and noise.

    Attributes:
        name: Its name in the study.
        log: Why it refused, in full. For its own eyes.

    Raises:
        StudyError: The study has no holder, or another.
    """

    def __init__(
        self, params: Params, setting: Setting, context: bytes, identity: Identity, entropy: Entropy = os.urandom
    ) -> None:
        if setting.holder is None or setting.holder.identity != identity.public:
            raise StudyError("protocol.holder: this is not the key of who holds the keys of the study")
        self._params, self._setting, self._context = params, setting, context
        self._identity, self._entropy = identity, entropy
        self.name = setting.holder.name
        self.log: list[str] = []

    def handle(self, request: bytes, state: bytes) -> tuple[bytes, bytes]:
        """Answer one request of the coordinator; as `protocols.site.Site.handle`."""
        memory = decode(state, _Memory) if state else _Memory()
        digest = hashlib.sha256(request).digest()
        if digest == memory.last_request:
            return memory.last_reply, state
        on_keys: Part | None = None
        on_sum: Part | None = None
        try:
            message = decode(request, Request)
        except DecodeError as error:
            message, on_sum = Request(), self._refuse(error)
        if message.sum is not None:
            on_sum, memory = self._decrypt(message.sum, memory)
        if message.keys is not None:
            on_keys, memory = self._advertise(message.keys, memory)
        reply = encode(Reply(on_sum, on_keys, Answer(memoryview(b"")) if message.finish is not None else None))
        return reply, encode(msgspec.structs.replace(memory, last_request=digest, last_reply=reply))

    def _advertise(self, message: KeysRequest, memory: _Memory) -> tuple[Part, _Memory]:
        try:
            if message.round <= memory.advertised:
                raise RemoteProtocolError(f"a key for round {message.round} after one for round {memory.advertised}")
            session = Session(self._params, self._context, message.round)
            holding, key = holder.hold_key(session, self._setting, self._identity, self._entropy)
        except SecAggError as error:
            return self._refuse(error), memory
        # The round before may be running still; keys of earlier ones are forgotten.
        waiting = {number: kept for number, kept in memory.waiting.items() if number == memory.advertised}
        waiting[message.round] = encode(holding)
        return Answer(memoryview(encode(key))), _Memory(message.round, waiting)

    def _decrypt(self, message: SumRequest, memory: _Memory) -> tuple[Part, _Memory]:
        waiting = dict(memory.waiting)
        kept = waiting.pop(message.round, None)  # once, whatever comes of it
        memory = msgspec.structs.replace(memory, waiting=waiting)
        try:
            if kept is None:
                raise RemoteProtocolError(f"there is no key for round {message.round} (any more): each opens one sum")
            active = self._params.active
            shown = decode(message.body, HeldUploads) if active else decode(message.body, HeldAggregate)
            _, partial = holder.decrypt_held(decode(kept, holder.Holding), shown, self._setting)
        except SecAggError as error:
            return self._refuse(error), memory
        return Answer(memoryview(encode(partial))), memory

    def _refuse(self, error: Exception) -> Refusal:
        self.log.append(f"{self.name}: {error}")
        return Refusal("protocol")

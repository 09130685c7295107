"""A grid without a network: the client app runs here, and asks the sites' own processes."""

import contextlib
import ctypes
import os
import signal
import sys
import threading
import time
import traceback
import uuid
from pathlib import Path

from flwr.app import Context, Error, Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity

from protocols.engines.flower import client_app
from protocols.engines.flower.bodies import MESSAGE, packed, unpacked
from protocols.site_service import open_site, serve
from protocols.study import load_study
from secagg.prg import deterministic_entropy


class LocalGrid(Grid):
    """Nodes by number, each with the configuration that its operator gave it.

    `on_message(node, message)` sees every message on its way to a node and may give what arrives there, None for
    nothing; `on_reply(node, message, reply)` likewise on the way back.
    """

    def __init__(self, configurations, app=client_app.app):
        self.configurations, self.app = dict(configurations), app
        self.offline = set()
        self.on_message = lambda node, message: message
        self.on_reply = lambda node, message, reply: reply
        self.sent = []
        self._replies, self._void, self._lock = {}, {}, threading.Lock()
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1
        self._turns = {node: threading.Lock() for node in self.configurations}

    def add(self, node, configuration):
        self.configurations[node] = configuration
        self._turns[node] = threading.Lock()

    def set_run(self, run):
        pass

    @property
    def run(self):
        raise NotImplementedError

    def create_message(self, content, message_type, dst_node_id, group_id, ttl=None):
        raise NotImplementedError

    def get_node_ids(self):
        return [node for node in self.configurations if node not in self.offline]

    def push_messages(self, messages):
        identifiers = []
        for message in messages:
            identifier = uuid.uuid4().hex
            message.metadata.__dict__["_message_id"] = identifier
            self.sent.append((message.metadata.dst_node_id, message.metadata.message_type))
            self._void[identifier] = message, time.monotonic() + message.metadata.ttl
            threading.Thread(target=self._deliver, args=(message,), daemon=True).start()
            identifiers.append(identifier)
        return identifiers

    def _deliver(self, message):
        node = message.metadata.dst_node_id
        arriving = self.on_message(node, message)
        if arriving is None or node in self.offline:
            return
        with self._turns[node]:  # a node takes one message at a time
            context = Context(
                run_id=1, node_id=node, node_config=self.configurations[node], state=RecordDict(), run_config={}
            )
            try:
                reply = self.app(arriving, context)
            except Exception as error:  # as Flower's runtime does
                reply = Message(Error(code=2, reason=f"{type(error)}:<'{error}'>"), reply_to=arriving)
        if (reply := self.on_reply(node, message, reply)) is not None:
            with self._lock:
                self._replies[message.metadata.message_id] = reply

    def pull_messages(self, message_ids):
        now, pulled = time.monotonic(), []
        for identifier in message_ids:
            message, ends = self._void[identifier]
            with self._lock:
                reply = self._replies.pop(identifier, None)
            if now > ends or message.metadata.dst_node_id in self.offline:
                pulled.append(Message(Error(code=3, reason="void or away"), reply_to=message))
            elif reply is not None:
                pulled.append(reply)
        return pulled

    def send_and_receive(self, messages, *, timeout=None):
        waiting, replies = list(self.push_messages(messages)), []
        while waiting:
            for reply in self.pull_messages(waiting):
                waiting.remove(reply.metadata.reply_to_message_id)
                replies.append(reply)
            time.sleep(0.01)
        return replies


class Hospital:
    """A site's own process, forked so that it starts at once; ended by its id."""

    def __init__(self, folder, seed=None, limit=None):
        self.folder, self.seed, self.limit, self.pid = Path(folder), seed, limit, None
        self._log, self._told = os.pipe(), ""
        os.set_blocking(self._log[0], False)

    @property
    def socket(self):
        return self.folder / "site.sock"

    def start(self):
        assert self.pid is None
        from_main = threading.current_thread() is threading.main_thread()
        self.pid = os.fork()
        if self.pid == 0:
            code = 1
            try:
                if from_main:  # the signal comes at the end of the thread that forked
                    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # ends with the tests, however they end
                os.dup2(self._log[1], 2)
                sys.stderr = os.fdopen(2, "w")  # and not pytest's file, which could be too large
                entropy = deterministic_entropy(self.seed) if self.seed is not None else os.urandom
                if self.limit is not None:
                    self.limit()
                with open_site(
                    self.folder / "site.toml", load_study(self.folder / "study.toml"), entropy=entropy
                ) as host:
                    serve(host, self.socket)
                code = 0
            except BaseException:
                os.write(2, traceback.format_exc().encode())
            finally:
                os._exit(code)
        ends = time.monotonic() + 30
        while not self.socket.exists():
            done, _ = os.waitpid(self.pid, os.WNOHANG)
            if done:
                self.pid = None
                raise AssertionError(f"the site ended: {self.told()}")
            assert time.monotonic() < ends
            time.sleep(0.01)
        return self

    def kill(self):
        if self.pid is not None:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
            self.pid = None
            self.socket.unlink(missing_ok=True)

    def close(self):
        self.kill()
        for end in self._log:
            os.close(end)

    def restart(self):
        self.kill()
        return self.start()

    def told(self):
        with contextlib.suppress(BlockingIOError):
            while piece := os.read(self._log[0], 1 << 16):
                self._told += piece.decode()
        return self._told


def is_request(message):
    return message.metadata.message_type == MESSAGE


def body_of(message):
    return unpacked(message)


def with_body(message, body):
    """The same message with another body."""
    message.content = packed(body)
    return message


__all__ = ["Hospital", "LocalGrid", "body_of", "is_request", "with_body"]

"""Requests on their way at a time, where a machine cannot take all of them."""

from flwr.app import Message
from flwr.supercore.task_identity import TaskIdentity

from protocols.engines.flower.bodies import HELLO, packed
from protocols.engines.flower.engine import FlowerEngine, Patience
from protocols.hello import Hello
from secagg.wire import encode
from tests.flower.local_grid import body_of

SITES = tuple(f"site{number}" for number in range(10))
DIGEST = bytes(32)


class SlowGrid:
    """Nodes of which one answers whenever replies are asked for."""

    def __init__(self):
        self.waiting, self.most = {}, 0
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1

    def get_node_ids(self):
        return list(range(1, 1 + len(SITES)))

    def push_messages(self, messages):
        for message in messages:
            identifier = f"{len(self.waiting)}-{message.metadata.dst_node_id}-{message.metadata.message_type}"
            message.metadata.__dict__["_message_id"] = identifier
            self.waiting[identifier] = message
            if message.metadata.message_type != HELLO:
                self.most = max(self.most, len(self.waiting))
            yield identifier

    def pull_messages(self, identifiers):
        message = self.waiting.pop(next(name for name in self.waiting if name in identifiers))
        body = body_of(message)
        if message.metadata.message_type == HELLO:
            body = encode(Hello(SITES[message.metadata.dst_node_id - 1], DIGEST, DIGEST))
        return [Message(packed(body), reply_to=message)]


def most_on_their_way(at_once):
    grid = SlowGrid()
    patience = Patience(poll=0.001)
    engine = FlowerEngine(grid, SITES, study=DIGEST, roster=DIGEST, patience=patience, at_once=at_once)
    engine.gather(len(SITES))
    requests = {site: site.encode() for site in SITES}
    assert dict(engine.exchange(requests)) == requests
    return grid.most


def test_no_more_requests_than_told_are_on_their_way_and_all_are_answered():
    assert most_on_their_way(3) == 3


def test_all_requests_are_on_their_way_together_where_nothing_is_told():
    assert most_on_their_way(None) == len(SITES)

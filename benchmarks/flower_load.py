"""Flower's part of `benchmarks.server_cost`: an app whose ServerApp averages updates, and the nodes that send them.

Runs in an environment of its own, without this project's packages. It imports flwr and numpy only. The nodes use the
connection of Flower's SuperNode, all of them in one process:

    python flower_load.py ADDRESS NODES ROUNDS VALUES
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from flwr.supercore.inflatable.inflatable_utils import pull_objects, push_object_contents_from_iterable
from flwr.supernode.fleet_http_connection import http_request_response

POLL_SECONDS = 3.0  # of a SuperNode, if there is no message

server = ServerApp()
client = ClientApp()


@server.main()  # type: ignore[untyped-decorator]
def serve(grid: Grid, context: Context) -> None:
    config = context.run_config
    nodes, values = int(config["nodes"]), int(config["values"])
    strategy = FedAvg(fraction_train=1.0, fraction_evaluate=0.0, min_train_nodes=nodes, min_available_nodes=nodes)
    strategy.start(grid, ArrayRecord([np.zeros(values, np.float32)]), num_rounds=int(config["rounds"]))


class Node:
    """A node without training. `answered`: the number of its updates."""

    def __init__(self, connection: Any, number: int) -> None:
        _, self._receive, self._send, _, _, self._pull, self._push, self._confirm = connection
        self._number = number
        self.answered = 0

    def answer(self, values: int, begin: Any) -> bool:
        """Whether there was a message. It answers with an update of 8-bit `values`. Calls `begin` with the index of
        the round before it answers."""
        received = self._receive()
        if received is None:
            return False
        message, tree = received
        begin(self.answered)
        run = message.metadata.run_id
        pull_objects(list(dict.fromkeys(_ids(tree))), pull_object_fn=lambda name: self._pull(run, name))
        self._confirm(run, message.metadata.message_id)
        update = np.random.default_rng([self._number, self.answered]).integers(-127, 128, values, dtype=np.int8)
        content = RecordDict({"arrays": ArrayRecord([update]), "metrics": MetricRecord({"num-examples": 50})})
        reply = Message(content=content, reply_to=message)
        reply.metadata.__dict__["_message_id"] = reply.object_id
        objects = {name: each.deflate() for name, each in get_all_nested_objects(reply).items()}
        wanted, session = self._send(reply, get_object_tree(reply), 0.1)
        contents = ((name, each) for name, each in objects.items() if name in wanted)
        push_object_contents_from_iterable(
            contents, push_object_fn=lambda name, each: self._push(run, session, name, each)
        )
        self.answered += 1
        return True


def _ids(tree: Any) -> Iterator[str]:
    yield tree.object_id
    for child in tree.children:
        yield from _ids(child)


def main(address: str, count: int, rounds: int, values: int) -> None:
    """Prints "registered" when all nodes are, and "round I" when round I, from 0, has begun."""
    begun: set[int] = set()

    def begin(index: int) -> None:
        if index not in begun:
            begun.add(index)
            print(f"round {index}", flush=True)

    with ExitStack() as stack:
        nodes = [Node(stack.enter_context(http_request_response(address, True)), number) for number in range(count)]
        print("registered", flush=True)
        while any(node.answered < rounds for node in nodes):
            least = min(node.answered for node in nodes)
            waiting = [node for node in nodes if node.answered == least]
            if not sum(node.answer(values, begin) for node in waiting):
                time.sleep(POLL_SECONDS)


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))

"""A grid's stream that is pulled in a thread, so that a test can see what comes when."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from typing import Any

from flwr.app import Message

from common.transport.sealed import read_sealed
from tests.helpers.plane import BOUND


class Streaming:
    """A stream that is pulled in a thread, so that a test can see what comes when."""

    def __init__(self, replies: Iterator[Message]) -> None:
        self.heard: queue.SimpleQueue[Message | BaseException | None] = queue.SimpleQueue()
        self._replies = replies
        self.thread = threading.Thread(target=self._pull, daemon=True)
        self.thread.start()

    def _pull(self) -> None:
        try:
            for reply in self._replies:
                self.heard.put(reply if reply.has_error() else read_now(reply))
            self.heard.put(None)
        except Exception as e:  # noqa: BLE001 - the test looks at it
            self.heard.put(e)

    def next(self) -> Any:
        return self.heard.get(timeout=BOUND)


def read_now(reply: Message) -> Any:
    """Site's node, envelope and bytes of a sealed reply: its file is gone when the next one is asked for."""
    envelope, blob = read_sealed(reply.content)
    with blob.open() as file:
        return reply.metadata.src_node_id, envelope, file.read()

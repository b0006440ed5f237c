"""Flower's own grid to a SuperLink, as the coordinator needs it: only pinned sites, and replies one at a time."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from itertools import count
from typing import Final

import structlog
from flwr.app import Message
from flwr.serverapp import Grid

from common.errors import FailureCode
from common.flower import NodeInfo, answering, failure_reply
from common.flower_runtime import Packer
from server.grids.base import WrappingGrid

log = structlog.get_logger()

POLL_SECONDS: Final = 0.25
"""Between two questions whether a reply is there; Flower's own grid waits 3 seconds."""


_AT_ONCE: Final = 8
"""Of how many messages replies are asked for in one call: so many are in memory at most."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Pushed:
    """A message that was sent, to which site, until when its answer counts, and whether the SuperLink refused it."""

    message: Message
    site: str
    end: float | None
    lost: bool


class SuperLinkGrid(WrappingGrid):
    """A grid over a SuperLink, whose nodes are those that were registered under a site's name.

    Guarantee: it carries only sealed messages. Replies come in the order of the messages, each is fetched when it is
    asked for, and the SuperLink keeps the others: one reply is in memory. A name is no proof of anything: whoever
    reaches the SuperLink can register a node under any. What a node can read, and what counts as its word, is decided
    by the site's keys, in `SealedGrid`.
    """

    def __init__(
        self,
        inner: Grid,
        sites: Collection[str],
        *,
        refuses: Callable[[str], bool] = lambda _: False,
        poll_seconds: float = POLL_SECONDS,
    ) -> None:
        """Wrap Flower's grid.

        Args:
            inner: Flower's.
            sites: Who takes part, by name.
            refuses: Whether a site is shut out; asked again at every round.
            poll_seconds: Between two questions for a reply.
        """
        super().__init__(inner)
        self._sites = frozenset(sites)
        self._refuses = refuses
        self._poll_seconds = poll_seconds
        self._pushed: dict[str, _Pushed] = {}
        self._here: dict[str, Message] = {}
        self._numbers = count(1)

    def get_nodes(self) -> list[NodeInfo]:
        """The sites' nodes that are online now."""
        return [node for node in self._inner.get_nodes() if node.name in self._sites and not self._refuses(node.name)]

    def get_node_ids(self) -> list[int]:
        """Their ids."""
        return [node.node_id for node in self.get_nodes()]

    def wait_for_sites(self, *, seconds: float) -> set[str]:
        """Wait until every site has a node online, or so long; the names of those that have."""
        end = time.monotonic() + seconds
        while True:
            online = {node.name for node in self.get_nodes()}
            missing = {name for name in self._sites - online if not self._refuses(name)}
            if not missing or time.monotonic() >= end:
                break
            time.sleep(self._poll_seconds)
        if missing:
            log.warning("sites_are_not_online", sites=sorted(missing))
        return online

    def stream(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterator[Message]:
        """Replies in the order of the messages; one that has not come after `timeout` seconds is a failure.

        Raises:
            RefusedError: A message is not sealed. Nothing was sent.
        """
        packer = Packer()
        messages = [packer.pack(message) for message in messages]
        del packer
        end = None if timeout is None else time.monotonic() + timeout
        ids = list(self._inner.push_messages(messages))
        ids += [""] * (len(messages) - len(ids))  # a SuperLink that refuses the size of a request takes none of it
        for message, message_id in zip(messages, ids, strict=True):
            yield self._reply(message, message_id, end)

    def push_messages(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[str]:
        """Send messages; see `OutstandingGrid`.

        Raises:
            RefusedError: A message is not sealed. Nothing was sent.
        """
        packer = Packer()
        packed = [packer.pack(message) for message in messages]
        del packer
        end = None if timeout is None else time.monotonic() + timeout
        sent = list(self._inner.push_messages(packed)) if packed else []
        sent += [""] * (len(packed) - len(sent))
        ids = [message_id or f"unsent-{next(self._numbers)}" for message_id in sent]
        names = {node.node_id: node.name for node in self._inner.get_nodes()}
        for message, message_id, was_sent in zip(packed, ids, sent, strict=True):
            site = names.get(message.metadata.dst_node_id, "")
            self._pushed[message_id] = _Pushed(message=message, site=site, end=end, lost=not was_sent)
        return ids

    def pull_messages(self, message_ids: Iterable[str], *, needed: int | None = None) -> list[Message]:  # noqa: ARG002
        """The next reply, or the failure that stands for it. Waits a little where there is none; a few are in memory.

        A site that was shut out meanwhile is lost, whatever it has sent. A reply that a cancelled message still gets
        stays at the SuperLink, which cannot be told.
        """
        wanted = {message_id: self._pushed[message_id] for message_id in message_ids if message_id in self._pushed}
        lost = next((i for i, pushed in wanted.items() if pushed.lost or self._refuses(pushed.site)), None)
        if lost is not None:
            self._here.pop(lost, None)
            return [self._failed(lost, FailureCode.CLIENT_LOST)]
        if not any(message_id in self._here for message_id in wanted):
            self._look(list(wanted))
        for message_id, pushed in wanted.items():
            if message_id in self._here:
                reply = self._here.pop(message_id)
                if reply.metadata.src_node_id != pushed.message.metadata.dst_node_id:
                    return [self._failed(message_id, FailureCode.CLIENT_LOST)]
                del self._pushed[message_id]
                return [reply]
            if pushed.end is not None and time.monotonic() >= pushed.end:
                return [self._failed(message_id, FailureCode.DEADLINE_EXCEEDED)]
        if wanted:
            time.sleep(self._poll_seconds)
        return []

    def cancel_messages(self, message_ids: Iterable[str]) -> None:
        """Wait no more for these."""
        for message_id in message_ids:
            self._pushed.pop(message_id, None)
            self._here.pop(message_id, None)

    def _look(self, message_ids: list[str]) -> None:
        """Ask for a few replies at a time, until there is one."""
        for start in range(0, len(message_ids), _AT_ONCE):
            for reply in self._inner.pull_messages(message_ids[start : start + _AT_ONCE]):
                self._here[reply.metadata.reply_to_message_id] = reply
            if self._here:
                return

    def _failed(self, message_id: str, failure: FailureCode) -> Message:
        message = self._pushed.pop(message_id).message
        return answering(failure_reply(message, failure), message_id)

    def _reply(self, message: Message, message_id: str | None, end: float | None) -> Message:
        """The answer to one message, or why there is none."""
        if not message_id:
            return failure_reply(message, FailureCode.CLIENT_LOST)
        while True:
            for reply in self._inner.pull_messages([message_id]):
                if reply.metadata.src_node_id != message.metadata.dst_node_id:  # the SuperLink speaks for a lost node
                    return failure_reply(message, FailureCode.CLIENT_LOST)
                return reply
            if end is not None and time.monotonic() >= end:
                return failure_reply(message, FailureCode.DEADLINE_EXCEEDED)
            time.sleep(self._poll_seconds)

"""A SuperLink as the coordinator sees it: pinned sites only, ciphertext only, one reply at a time, every message
answered.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, Error, Message

from common.errors import FailureCode, RefusedError
from common.flower import NodeInfo, failure_of, prepare_process, stamp
from common.transport.sealed import BLOB, Blob, read_sealed, sealed_content
from server.grids.superlink import SuperLinkGrid
from tests.helpers.grids import ScriptedGrid, train_messages

SITES = ("delta", "echo")


def sealed_messages(nodes: Sequence[int]) -> list[Message]:
    """One message for each node: envelopes of their own, one ciphertext for all."""
    prepare_process()
    blob = Blob.of_bytes(b"ciphertext")
    return [Message(sealed_content(b"to %d" % node, blob), node, "train") for node in nodes]


def answered_by(reply: Message) -> bytes:
    return read_sealed(reply.content)[0]


class SlowSuperLink(ScriptedGrid):
    """Has each reply only at the second question, and keeps the order of all questions."""

    def __init__(
        self, nodes: Sequence[tuple[int, str]], *, silent: Sequence[int] = (), lost: Sequence[int] = ()
    ) -> None:
        super().__init__(lambda messages: [], [node for node, _ in nodes])
        self.named = list(nodes)
        self.silent, self.lost = set(silent), set(lost)
        self.messages: dict[str, Message] = {}
        self.questions: list[str] = []
        self.looks = 0

    def get_nodes(self) -> Iterable[NodeInfo]:
        self.looks += 1
        return [NodeInfo(node_id=node, name=name) for node, name in self.named]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        for message in messages:
            self.messages[f"id-{message.metadata.dst_node_id}"] = message
        return list(self.messages)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        return [reply for asked in list(message_ids) for reply in self._reply(asked)]

    def _reply(self, asked: str) -> list[Message]:
        self.questions.append(asked)
        message = self.messages[asked]
        node = message.metadata.dst_node_id
        if node in self.silent or self.questions.count(asked) < 2:
            return []
        if node in self.lost:
            error = Message(Error(code=5, reason="gone"), reply_to=stamp(message, message_id=asked))
            error.metadata.__dict__["_src_node_id"] = 1  # as Flower's SuperLink answers for a node that is gone
            return [error]
        content = sealed_content(b"from %d" % node, Blob.of_bytes(b""))
        return [Message(content, reply_to=stamp(message, message_id=asked))]


def grid_to(superlink: SlowSuperLink) -> SuperLinkGrid:
    return SuperLinkGrid(superlink, SITES, poll_seconds=0)


class TestNodes:
    def test_only_pinned_sites_are_nodes(self) -> None:
        """A node that somebody registered under another name, or none, is not seen."""
        grid = grid_to(SlowSuperLink([(7, "delta"), (8, "mallory"), (9, "")]))
        assert [node.name for node in grid.get_nodes()] == ["delta"]
        assert grid.get_node_ids() == [7]

    def test_site_that_is_shut_out_is_gone_at_the_next_look(self) -> None:
        """The deny list is asked each time, and nobody waits for who stands in it."""
        denied: set[str] = set()
        superlink = SlowSuperLink([(7, "delta"), (8, "echo")])
        grid = SuperLinkGrid(superlink, SITES, refuses=denied.__contains__, poll_seconds=0)
        assert len(grid.get_nodes()) == 2
        denied.add("echo")
        assert grid.get_node_ids() == [7]
        assert grid.wait_for_sites(seconds=60) == {"delta"}

    def test_waits_until_all_sites_are_there(self) -> None:
        """The run begins with its last site, not before."""
        superlink = SlowSuperLink([(7, "delta")])

        def look() -> Iterable[NodeInfo]:
            nodes = SlowSuperLink.get_nodes(superlink)
            if superlink.looks == 3:
                superlink.named.append((8, "echo"))
            return nodes

        superlink.get_nodes = look  # type: ignore[method-assign]
        assert grid_to(superlink).wait_for_sites(seconds=60) == {"delta", "echo"}
        assert superlink.looks == 4

    def test_goes_on_without_a_site_that_stays_away(self) -> None:
        """After the time is up the run begins with those that are there."""
        assert grid_to(SlowSuperLink([(7, "delta")])).wait_for_sites(seconds=0) == {"delta"}


class TestMessages:
    def test_go_out_as_flowers_own_objects_encoded_once(self) -> None:
        """A SuperLink knows only Flower's classes, and stores once what all recipients share."""
        superlink = SlowSuperLink([(7, "delta"), (8, "echo")])
        list(grid_to(superlink).stream(sealed_messages([7, 8])))
        records = [message.content[BLOB] for message in superlink.messages.values()]
        arrays = [record[BLOB] for record in records if isinstance(record, ArrayRecord)]
        assert [type(array) for array in arrays] == [Array, Array]
        assert arrays[0] is arrays[1]
        assert arrays[0].numpy().tobytes() == b"ciphertext"
        envelopes = [read_sealed(message.content)[0] for message in superlink.messages.values()]
        assert envelopes == [b"to 7", b"to 8"]

    def test_that_are_not_sealed_never_leave(self) -> None:
        """Weights in clear are refused before anything is sent."""
        superlink = SlowSuperLink([(7, "delta")])
        with pytest.raises(RefusedError):
            list(grid_to(superlink).stream(train_messages({"w": np.zeros(2, np.float32)}, [7])))
        assert not superlink.messages


class TestReplies:
    def test_replies_are_fetched_in_order_and_only_when_asked_for(self) -> None:
        """Nothing of the second reply is in memory while the first is being used."""
        superlink = SlowSuperLink([(7, "delta"), (8, "echo")])
        replies = grid_to(superlink).stream(sealed_messages([8, 7]))
        first = next(replies)
        assert answered_by(first) == b"from 8"
        assert set(superlink.questions) == {"id-8"}
        assert [answered_by(reply) for reply in replies] == [b"from 7"]

    def test_a_site_that_is_late_is_a_failure_and_others_are_still_heard(self) -> None:
        """One silent site costs nobody else's update."""
        superlink = SlowSuperLink([(7, "delta"), (8, "echo")], silent=[7])
        superlink.questions.append("id-8")  # its reply is there already
        late, heard = grid_to(superlink).stream(sealed_messages([7, 8]), timeout=0)
        assert failure_of(late) is FailureCode.DEADLINE_EXCEEDED
        assert late.metadata.src_node_id == 7
        assert not heard.has_error()

    def test_a_node_that_is_gone_is_a_lost_client(self) -> None:
        """What the SuperLink says in a node's place counts as that node's failure."""
        (reply,) = grid_to(SlowSuperLink([(7, "delta")], lost=[7])).stream(sealed_messages([7]))
        assert (failure_of(reply), reply.metadata.src_node_id) == (FailureCode.CLIENT_LOST, 7)

    @pytest.mark.parametrize("ids", [[], [None]])
    def test_a_message_that_is_not_taken_is_a_lost_client(self, ids: list[str]) -> None:
        """A SuperLink that refuses a message does not make the coordinator wait for its answer."""
        superlink = SlowSuperLink([(7, "delta")])
        superlink.push_messages = lambda messages: ids  # type: ignore[method-assign]
        (reply,) = grid_to(superlink).stream(sealed_messages([7]))
        assert failure_of(reply) is FailureCode.CLIENT_LOST


class TestOutstandingMessages:
    """What stays open between two questions, as in an asynchronous run."""

    def test_come_whoever_is_first(self) -> None:
        """A site that is slow holds up nobody; each reply is taken once, and says what it answers."""
        superlink = SlowSuperLink([(7, "delta"), (8, "echo")])
        superlink.questions.append("id-8")  # its reply is there already
        grid = grid_to(superlink)
        ids = grid.push_messages(sealed_messages([7, 8]))
        (first,) = grid.pull_messages(ids, needed=2)
        assert (answered_by(first), first.metadata.reply_to_message_id) == (b"from 8", ids[1])
        (second,) = grid.pull_messages(ids, needed=1)
        assert answered_by(second) == b"from 7"
        assert grid.pull_messages(ids) == []

    def test_a_question_that_brings_nothing_waits_a_little(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """As long as between two questions of a synchronous round; nothing to ask for waits for nothing."""
        slept: list[float] = []
        monkeypatch.setattr("server.grids.superlink.time.sleep", slept.append)
        grid = SuperLinkGrid(SlowSuperLink([(7, "delta")], silent=[7]), SITES, poll_seconds=0.25)
        ids = grid.push_messages(sealed_messages([7]))
        assert grid.pull_messages(ids) == []
        assert grid.pull_messages(["unknown"]) == []
        assert slept == [0.25]

    def test_late_lost_and_refused_ones_are_failures(self) -> None:
        """Each for its own reason; what came in time counts."""
        superlink = SlowSuperLink([(7, "delta"), (8, "echo")], silent=[7], lost=[8])
        grid = grid_to(superlink)
        ids = grid.push_messages(sealed_messages([7, 8]), timeout=0)
        assert failure_of(grid.pull_messages(ids[:1])[0]) is FailureCode.DEADLINE_EXCEEDED
        superlink.questions.append("id-8")
        (gone,) = grid.pull_messages(ids[1:])
        assert (failure_of(gone), gone.metadata.reply_to_message_id) == (FailureCode.CLIENT_LOST, ids[1])
        superlink.push_messages = lambda messages: [None]  # type: ignore[assignment,list-item,method-assign]
        (refused,) = grid.push_messages(sealed_messages([7]))
        (reply,) = grid.pull_messages([refused])
        assert (failure_of(reply), reply.metadata.reply_to_message_id) == (FailureCode.CLIENT_LOST, refused)

    def test_of_a_site_that_was_shut_out_meanwhile_are_lost(self) -> None:
        """Whatever it has sent: its update counts in no step after it was denied."""
        denied: set[str] = set()
        superlink = SlowSuperLink([(7, "delta"), (8, "echo")])
        grid = SuperLinkGrid(superlink, SITES, refuses=denied.__contains__, poll_seconds=0)
        ids = grid.push_messages(sealed_messages([7, 8]))
        denied.add("delta")
        (lost,) = grid.pull_messages(ids)
        assert (failure_of(lost), lost.metadata.reply_to_message_id) == (FailureCode.CLIENT_LOST, ids[0])
        (heard,) = [reply for _ in range(3) for reply in grid.pull_messages(ids)]
        assert answered_by(heard) == b"from 8"

    def test_cancelled_ones_are_not_asked_for_any_more(self) -> None:
        """A SuperLink cannot be told; what it still gets is left there."""
        superlink = SlowSuperLink([(7, "delta"), (8, "echo")])
        grid = grid_to(superlink)
        ids = grid.push_messages(sealed_messages([7, 8]))
        grid.cancel_messages(ids[:1])
        while not (replies := grid.pull_messages(ids)):
            pass
        assert answered_by(replies[0]) == b"from 8"
        assert set(superlink.questions) == {"id-8"}

    def test_few_replies_are_in_memory_however_many_are_there(self) -> None:
        """They are asked for some at a time, until there is one."""
        nodes = list(range(2, 42))
        superlink = SlowSuperLink([(node, "delta") for node in nodes])
        superlink.questions += [f"id-{node}" for node in nodes]
        grid = grid_to(superlink)
        ids = grid.push_messages(sealed_messages(nodes))
        grid.pull_messages(ids)
        assert len(superlink.questions) - len(nodes) <= 8

    def test_that_are_not_sealed_never_leave(self) -> None:
        """Weights in clear are refused before anything is sent."""
        superlink = SlowSuperLink([(7, "delta")])
        with pytest.raises(RefusedError):
            grid_to(superlink).push_messages(train_messages({"w": np.zeros(2, np.float32)}, [7]))
        assert not superlink.messages

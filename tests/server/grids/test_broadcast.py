"""One message to many nodes."""

from __future__ import annotations

from flwr.app import ConfigRecord, Message, MessageType, RecordDict

from common.flower import CONFIG, prepare_process
from server.grids.broadcast import Broadcast


def template() -> Message:
    prepare_process()
    content = RecordDict({CONFIG: ConfigRecord({"round": 3})})
    return Message(content, 5, MessageType.TRAIN, group_id="3", ttl=60.0)


def test_each_node_gets_the_template_s_content_which_is_not_copied():
    """Messages are made where somebody looks, in the order of the nodes."""
    first = template()
    sent = list(Broadcast(first, [7, 5, 9]))
    assert [message.metadata.dst_node_id for message in sent] == [7, 5, 9]
    assert all(message.content is first.content for message in sent)
    assert {(m.metadata.message_type, m.metadata.group_id, m.metadata.ttl) for m in sent} == {("train", "3", 60.0)}


def test_it_is_a_sequence_of_messages():
    """Length, places, slices."""
    broadcast = Broadcast(template(), [7, 5, 9])
    assert len(broadcast) == 3
    assert broadcast[-1].metadata.dst_node_id == 9
    assert [message.metadata.dst_node_id for message in broadcast[1:]] == [5, 9]
    assert broadcast.to([2]).nodes == [2]

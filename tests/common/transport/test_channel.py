"""What both ends of the plane share."""

from __future__ import annotations

from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common import crypto
from common.errors import RefusedError
from common.transport import channel, wire, wire_pb2

KINDS = [
    wire_pb2.ClientEvent, wire_pb2.ServerEvent, wire_pb2.FetchRequest, wire_pb2.UploadStart, wire_pb2.UploadStatus,
    wire_pb2.UploadStateRequest, wire_pb2.CertificateRequest, wire_pb2.CertificateAnswer, wire_pb2.SubmitRequest,
    wire_pb2.Question, wire_pb2.Document,
]  # fmt: skip


def test_both_packages_name_the_coordinator_alike():
    """They cannot import each other; a difference would keep every client out."""
    assert channel.COORDINATOR_DNS == crypto.COORDINATOR_DNS


def test_a_control_message_is_read_back():
    """Bytes to message to bytes."""
    hello = wire_pb2.Hello(protocol=1, version="1.0", held=[b"h" * 16], instance=b"i" * 16)
    event = wire_pb2.ClientEvent(hello=hello)
    assert wire.parse(wire_pb2.ClientEvent, event.SerializeToString()) == event


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.binary(max_size=200))
def test_no_bytes_crash_the_reader_of_a_control_message(kind, data: bytes):
    """A message, or a refusal."""
    with suppress(RefusedError):
        assert isinstance(wire.parse(kind, data), kind)


def test_a_text_that_is_not_unicode_is_refused():
    """Protobuf's strings are UTF-8."""
    with pytest.raises(RefusedError):
        wire.parse(wire_pb2.Document, b"\x0a\x01\xff")


def test_a_control_message_has_room_for_a_configuration_and_no_more():
    """Both ends refuse longer ones unread."""
    for options in (channel.CLIENT_OPTIONS, channel.SERVER_OPTIONS):
        assert dict(options)["grpc.max_receive_message_length"] == 4 << 20
        assert wire.FRAME_BYTES < 4 << 20


def test_refusals_are_short_fixed_words():
    """They are all that a peer learns."""
    assert all(refusal.value == refusal.name.lower().replace("_", "-") for refusal in wire.Refusal)

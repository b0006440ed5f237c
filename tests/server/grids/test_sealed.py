"""Only ciphertext goes down, and only what the right site sealed for this very order comes up."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Message, RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st

from common.crypto import KINDS
from common.errors import FailureCode, RefusedError, RunError
from common.flower import ARRAYS, CONFIG, arrays_of, failure_of, failure_reply, metrics_of
from common.transport.sealed import Blob, order_id, read_sealed, sealed_content
from tests.helpers.grids import update
from tests.helpers.runs import as_bytes
from tests.helpers.sealing import (
    CONFIGURATION,
    MODEL,
    NORTH,
    RUN_ID,
    SITES,
    SOUTH,
    Nodes,
    answer,
    everything,
    messages,
    opened,
    reply,
    request,
    sealed_grid,
    sealed_up,
)


def honest(orders: list[Message]) -> Iterator[Message]:
    for order, keys in zip(orders, SITES, strict=False):
        yield answer(order, keys)


def failures(script: Any, *, sites: int = 1, content: RecordDict | None = None) -> list[FailureCode | None]:
    """What becomes of a round's replies, north's first."""
    grid = sealed_grid(Nodes(script))
    replies = sorted(grid.stream(messages(content, sites=sites)), key=lambda r: r.metadata.src_node_id)
    return [failure_of(r) for r in replies]


REFUSED = [FailureCode.INVALID_REPLY]


class TestRound:
    def test_carries_the_model_down_and_updates_up(self) -> None:
        """Sites read exactly what was asked, and the strategy sees exactly what they answered."""
        seen = []

        def script(orders: list[Message]) -> Iterator[Message]:
            seen.extend(opened(order, keys) for order, keys in zip(orders, SITES, strict=True))
            yield from honest(orders)

        replies = list(sealed_grid(Nodes(script)).stream(messages()))
        for header, content in seen:
            assert as_bytes(arrays_of(content)) == as_bytes(MODEL)
            assert dict(content[CONFIG]) == dict(request()[CONFIG])
            assert (header.run_id, header.server_round, header.kind) == (RUN_ID, 1, KINDS["train"])
        for got in replies:
            assert as_bytes(arrays_of(got.content)) == as_bytes({name: v + 1 for name, v in MODEL.items()})
            assert metrics_of(got.content)["train_loss"] == 0.5

    def test_no_byte_of_model_or_configuration_crosses_in_clear(self) -> None:
        """What the transport carries, in both directions, holds neither weights nor the run's configuration."""
        carried: list[RecordDict] = []

        def script(orders: list[Message]) -> Iterator[Message]:
            carried.extend(order.content for order in orders)
            for got in honest(orders):
                carried.append(got.content)
                yield got

        list(sealed_grid(Nodes(script)).stream(messages()))
        assert len(carried) == 4
        secret = [MODEL["w"].tobytes()[at : at + 16] for at in range(0, 2400, 160)]
        secret += [(MODEL["w"] + 1).tobytes()[at : at + 16] for at in range(0, 2400, 160)]
        for content in carried:
            assert set(content) == {"sealed", "blob"}
            data = everything(content)
            assert not any(part in data for part in [*secret, b"train_loss", CONFIGURATION.name.encode() * 2, b'"run"'])

    def test_one_ciphertext_serves_all(self) -> None:
        """Messages that share a content share its ciphertext; each order has an envelope and a name of its own."""
        grid = Nodes(honest)
        list(sealed_grid(grid).stream(messages()))
        (first, one), (second, other) = (read_sealed(order.content) for order in grid.sent)
        assert one is other
        assert order_id(first) != order_id(second)

    def test_messages_with_different_models_stay_apart(self) -> None:
        """Each site reads the model in its own message."""
        other = request(arrays={name: values * 2 for name, values in MODEL.items()})
        seen = []

        def script(orders: list[Message]) -> Iterator[Message]:
            seen.extend(arrays_of(opened(order, keys)[1])["b"][0] for order, keys in zip(orders, SITES, strict=True))
            yield from honest(orders)

        list(sealed_grid(Nodes(script)).stream([messages()[0], messages(other)[1]]))
        assert seen == [1.0, 2.0]

    def test_asking_again_is_another_message(self) -> None:
        """A second call seals afresh: another key, another message id, the next attempt."""
        headers = []

        def script(orders: list[Message]) -> Iterator[Message]:
            headers.append(opened(orders[0], NORTH)[0])
            yield from honest(orders)

        grid = sealed_grid(Nodes(script))
        for _ in range(2):
            list(grid.stream(messages(sites=1)))
        assert headers[0].message_id != headers[1].message_id
        assert [header.attempt for header in headers] == [0, 1]

    def test_a_reply_is_opened_when_it_is_asked_for(self) -> None:
        """Of replies that wait below, none is pulled before the one above it was taken."""
        pulled = 0

        def script(orders: list[Message]) -> Iterator[Message]:
            nonlocal pulled
            for got in honest(orders):
                pulled += 1
                yield got

        stream = sealed_grid(Nodes(script)).stream(messages())
        for expected in (1, 2):
            next(stream)
            assert pulled == expected

    def test_failures_pass(self) -> None:
        """A site's failure is a fixed code, needs no sealing, and keeps its reason."""
        script = lambda orders: [failure_reply(order, FailureCode.BUDGET_EXHAUSTED) for order in orders]  # noqa: E731
        assert failures(script, sites=2) == [FailureCode.BUDGET_EXHAUSTED] * 2

    def test_a_node_without_pinned_keys_is_not_asked(self) -> None:
        """Nothing can be sealed for a site that nobody pinned: it fails, and the transport carries nothing to it."""
        inner = Nodes(honest, ["north", "stranger"])
        got = {r.metadata.src_node_id: failure_of(r) for r in sealed_grid(inner).stream(messages())}
        assert got == {2: None, 3: FailureCode.CLIENT_LOST}
        assert [order.metadata.dst_node_id for order in inner.sent] == [2]

    def test_other_kinds_of_messages_are_not_sent(self) -> None:
        """A type of message that has no place in the container is refused before anything goes out."""
        inner = Nodes(honest)
        with pytest.raises(RefusedError, match="not sealed"):
            list(sealed_grid(inner).stream([Message(request(), 2, "train.default")]))
        assert inner.sent == []


class TestFiles:
    def test_ciphertext_lies_under_its_digest_while_it_is_needed(self, tmp_path: Path) -> None:
        """The folder holds one file, named by what is signed; it is gone when the round ends, or is given up."""
        held: list[list[str]] = []

        def script(orders: list[Message]) -> Iterator[Message]:
            held.append([path.name for path in tmp_path.iterdir()])
            _, blob = read_sealed(orders[0].content)
            assert blob.path is not None
            assert blob.path.stat().st_size == blob.size
            yield from honest(orders)

        grid = sealed_grid(Nodes(script), tmp_path)
        assert [failure_of(r) for r in grid.stream(messages())] == [None, None]
        assert list(tmp_path.iterdir()) == []
        given_up = grid.stream(messages())
        next(given_up)
        given_up.close()
        assert list(tmp_path.iterdir()) == []
        assert [len(names) for names in held] == [1, 1]
        assert len(bytes.fromhex(held[0][0])) == 32

    def test_a_folder_that_takes_nothing_is_said(self, tmp_path: Path) -> None:
        """Where ciphertext cannot be written the round ends with an error that says where; nothing was sent."""
        inner = Nodes(honest)
        with pytest.raises(RunError, match="missing"):
            list(sealed_grid(inner, tmp_path / "missing").stream(messages()))
        assert inner.sent == []


class TestAttacks:
    """Every reply here is refused with one and the same code; other sites' replies still count."""

    def test_a_reply_in_clear(self) -> None:
        """Weights that were not sealed are not taken, however well they fit."""
        plain = update(MODEL, train_loss=0.5)
        assert failures(lambda orders: [Message(plain, reply_to=orders[0])]) == REFUSED

    def test_a_sealed_reply_with_something_beside_it(self) -> None:
        """Nothing in clear is carried along with a sealed reply."""

        def script(orders: list[Message]) -> Iterator[Message]:
            got = answer(orders[0], NORTH)
            got.content[ARRAYS] = request()[ARRAYS]
            yield got

        assert failures(script) == REFUSED

    def test_a_site_that_poses_as_another(self) -> None:
        """South's keys cannot answer north's order, whatever its header says; north's own reply counts."""

        def script(orders: list[Message]) -> Iterator[Message]:
            north, south = orders
            envelope, ciphertext = sealed_up(south, SOUTH, reply_to=order_id(read_sealed(north.content)[0]))
            yield reply(north, envelope, ciphertext)
            yield answer(south, SOUTH)

        assert failures(script, sites=2) == [FailureCode.INVALID_REPLY, None]

    def test_replies_that_are_exchanged(self) -> None:
        """A transport that hands one site's reply over as another's gets neither accepted."""

        def script(orders: list[Message]) -> Iterator[Message]:
            one, other = (sealed_up(order, keys) for order, keys in zip(orders, SITES, strict=True))
            yield reply(orders[0], *other)
            yield reply(orders[1], *one)

        assert failures(script, sites=2) == REFUSED * 2

    def test_a_reply_of_an_earlier_round(self) -> None:
        """What answered an order answers no other, not even the same round asked again."""
        kept: list[tuple[bytes, bytes]] = []

        def script(orders: list[Message]) -> Iterator[Message]:
            if not kept:
                kept.append(sealed_up(orders[0], NORTH))
            yield reply(orders[0], *kept[0])

        grid = sealed_grid(Nodes(script))
        assert [failure_of(r) for r in grid.stream(messages(sites=1))] == [None]
        assert [failure_of(r) for r in grid.stream(messages(sites=1))] == REFUSED

    @pytest.mark.parametrize(
        "changes",
        [
            {"run_id": bytes(16)},
            {"server_round": 2},
            {"attempt": 1},
            {"kind": KINDS["query"]},
            {"reply_to": bytes(16)},
            {"config_digest": bytes(32)},
            {"cohort_digest": b"c" * 32},
            {"base_digest": bytes(32)},
            {"manifest": bytes(32)},
            {"broadcast": True},
        ],
        ids=lambda changes: next(iter(changes)),
    )
    def test_a_header_that_does_not_fit_the_order(self, changes: dict[str, Any]) -> None:
        """Each field that says what a reply belongs to has to be right, though the site itself signed it."""
        assert failures(lambda orders: [answer(orders[0], NORTH, **changes)]) == REFUSED

    def test_more_plaintext_than_four_requests(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A reply that would take more memory than any honest one is refused by its header; no byte of it is read."""
        large = update({"w": np.zeros(1_100_000, np.uint8)})

        def script(orders: list[Message]) -> Iterator[Message]:
            got = answer(orders[0], NORTH, large)
            monkeypatch.setattr(Blob, "open", lambda _: pytest.fail("read"))
            yield got

        assert failures(script) == REFUSED

    def test_as_much_plaintext_as_float64_and_metrics_take(self) -> None:
        """The limit leaves room for an update in double precision, and for a megabyte beside it."""
        wide = update({name: values.astype(np.float64) for name, values in MODEL.items()}, train_loss=1.0)
        assert failures(lambda orders: [answer(orders[0], NORTH, wide)]) == [None]

    @pytest.mark.parametrize("size", [0, 1])
    def test_plaintext_that_is_no_record(self, size: int) -> None:
        """A well-sealed nothing is as unsound as anything else that does not decode."""
        nothing = [b"x" * size]

        def script(orders: list[Message]) -> Iterator[Message]:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("tests.helpers.sealing.encode_records", lambda _: nothing)
                got = answer(orders[0], NORTH)
            yield got

        assert failures(script) == REFUSED

    def test_a_blob_of_another_length(self) -> None:
        """Ciphertext that is shorter or longer than the envelope says is refused before memory is taken for it."""
        for change in (lambda c: c[:-1], lambda c: c + b"\0"):
            script = lambda orders, change=change: [  # noqa: E731
                reply(orders[0], (sealed := sealed_up(orders[0], NORTH))[0], change(sealed[1]))
            ]
            assert failures(script) == REFUSED

    def test_a_file_that_is_not_there(self, tmp_path: Path) -> None:
        """A blob whose file is gone fails that reply and nothing else."""

        def script(orders: list[Message]) -> Iterator[Message]:
            envelope, ciphertext = sealed_up(orders[0], NORTH)
            blob = Blob.of_file(tmp_path / "gone", len(ciphertext))
            yield Message(sealed_content(envelope, blob), reply_to=orders[0])

        assert failures(script) == REFUSED

    @settings(max_examples=150, deadline=None)
    @given(st.integers(0), st.integers(1, 255), st.booleans())
    def test_any_byte_that_was_changed(self, place: int, change: int, in_envelope: bool) -> None:
        """There is no byte of envelope or ciphertext that can be another one."""

        def script(orders: list[Message]) -> Iterator[Message]:
            parts = [bytearray(part) for part in sealed_up(orders[0], NORTH)]
            part = parts[0 if in_envelope else 1]
            part[place % len(part)] ^= change
            yield reply(orders[0], bytes(parts[0]), bytes(parts[1]))

        assert failures(script) == REFUSED

    def test_a_reply_from_somebody_who_was_not_asked(self) -> None:
        """A node that has no order cannot add one."""

        def script(orders: list[Message]) -> Iterator[Message]:
            got = answer(orders[0], NORTH)
            got.metadata.__dict__["_src_node_id"] = 77
            yield got

        assert failures(script) == []

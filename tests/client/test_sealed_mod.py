"""A site takes nothing that the coordinator did not seal for it, for this run and round, and nothing twice."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from flwr.app import Context, Message, RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st

from client.mods import ReplayGuard, guard_mod, sealed_mod
from common.crypto import PartyKeys
from common.crypto.envelope import Envelope
from common.crypto.schedule import derive, wrap_info
from common.errors import FailureCode, PeerError
from common.flower import COHORT, ROUND, RUN, RUN_HEX, arrays_of, client_context, failure_of, failure_reply
from common.transport.records import encode_records
from common.transport.sealed import Blob, order_id, read_sealed, sealed_content
from tests.helpers import sealing
from tests.helpers.grids import update
from tests.helpers.runs import as_bytes, configuration
from tests.helpers.sealing import (
    COORDINATOR,
    MODEL,
    NORTH,
    RUN_ID,
    SOUTH,
    Nodes,
    messages,
    order_for,
    request,
    sealed_down,
    sealed_grid,
)

UPDATE = {name: values - 1 for name, values in MODEL.items()}


class Site:
    """North, behind its sealed mod."""

    def __init__(self, *, work: Callable[[Message], Message] | None = None, **options: Any) -> None:
        self.seen: list[RecordDict] = []
        self._work = work or (lambda message: Message(update(UPDATE, train_loss=0.25), reply_to=message))
        self._mod = sealed_mod(lambda _: NORTH, COORDINATOR.record, **options)

    def take(self, message: Message) -> Message:
        return self._mod(message, client_context(node_id=2, partition=0), self._train)

    def failure(self, message: Message) -> FailureCode | None:
        """What the coordinator learns."""
        context = client_context(node_id=2, partition=0)
        return failure_of(guard_mod(message, context, lambda m, c: self._mod(m, c, self._train)))

    def _train(self, message: Message, context: Context) -> Message:
        self.seen.append(message.content)
        return self._work(message)


def refused(message: Message) -> bool:
    """Whether an order is refused before anything is done."""
    site = Site(seen=None)
    return site.failure(message) is FailureCode.INVALID_REQUEST and not site.seen


class TestHonestOrder:
    def test_reaches_the_app_in_clear_and_is_answered_sealed(self) -> None:
        """The app sees what the coordinator sent; what leaves is for the coordinator alone and names its order."""
        site, order = Site(), order_for(NORTH)
        reply = site.take(order)
        assert as_bytes(arrays_of(site.seen[0])) == as_bytes(MODEL)
        envelope, _ = read_sealed(reply.content)
        fields = Envelope.from_bytes(envelope, NORTH.record)
        assert fields.recipient == COORDINATOR.record.key_id
        assert fields.header.reply_to == order_id(read_sealed(order.content)[0])
        assert fields.header.base_digest == Envelope.from_bytes(read_sealed(order.content)[0]).blob_digest
        carried = b"".join(bytes(part) for part in encode_records(reply.content))
        assert UPDATE["w"].tobytes()[:64] not in carried
        assert b"train_loss" not in carried

    def test_a_failure_is_not_sealed(self) -> None:
        """A failure is a fixed code that says nothing of the data: it passes as it is."""
        site = Site(work=lambda message: failure_reply(message, FailureCode.BUDGET_EXHAUSTED))
        assert failure_of(site.take(order_for(NORTH))) is FailureCode.BUDGET_EXHAUSTED

    def test_the_answer_can_lie_in_a_file(self, tmp_path: Path) -> None:
        """With a folder the sealed answer is one file in it, of exactly the ciphertext's length."""
        reply = Site(folder=tmp_path / "out").take(order_for(NORTH))
        _, blob = read_sealed(reply.content)
        (file,) = (tmp_path / "out").iterdir()
        assert (blob.path, blob.size) == (file, file.stat().st_size)

    def test_a_file_that_cannot_be_written_leaves_none(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """A disk that fills up while an answer is sealed costs the answer, and leaves no half of it."""

        def full(*_: Any, **__: Any) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("client.mods.sealed.seal", full)
        site = Site(folder=tmp_path)
        assert site.failure(order_for(NORTH)) is FailureCode.CLIENT_FAILED
        assert list(tmp_path.iterdir()) == []

    def test_fits_what_it_says_of_run_and_cohort(self) -> None:
        """Where the request names its run and its cohort, the header has to say the same."""
        names = ["south", "north"]
        content = request(**{RUN_HEX: RUN_ID.hex(), COHORT: json.dumps(names)})
        digest = hashlib.sha256(b"north\nsouth").digest()
        site = Site()
        assert site.take(order_for(NORTH, content, cohort_digest=digest)).has_content()
        assert refused(order_for(NORTH, content, cohort_digest=bytes(32)))
        assert refused(order_for(NORTH, request(), cohort_digest=digest))


class TestRefusals:
    def test_a_message_in_clear(self) -> None:
        """An order that nobody sealed is not looked at."""
        assert refused(Message(request(), 2, "train"))

    def test_an_order_for_another_site(self) -> None:
        """South's envelope does not open at north."""
        assert refused(order_for(SOUTH))

    def test_somebody_who_poses_as_the_coordinator(self) -> None:
        """Keys of the right name and role are not the keys that were pinned."""
        assert refused(order_for(NORTH, by=PartyKeys.generate("coordinator", "coordinator")))

    def test_an_order_of_another_kind(self) -> None:
        """What was sealed as a question cannot be delivered as training, nor the other way round."""
        assert refused(order_for(NORTH, kind="query"))
        assert refused(order_for(NORTH, kind="train.default"))
        assert refused(order_for(NORTH, server_round=2))

    @pytest.mark.parametrize(
        "said",
        [
            {RUN: configuration(rounds=9).canonical_json()},
            {RUN: None},
            {RUN: 5},
            {ROUND: 2},
            {ROUND: None},
            {RUN_HEX: "00" * 16},
            {RUN_HEX: 3},
            {COHORT: "not json"},
            {COHORT: json.dumps({"north": 1})},
            {COHORT: 7},
        ],
        ids=str,
    )
    def test_content_that_its_header_does_not_name(self, said: dict[str, Any]) -> None:
        """Run, round and cohort in the request are those of the signed header, or nothing is done."""
        assert refused(order_for(NORTH, request(**said)))

    def test_content_of_another_shape(self) -> None:
        """The manifest in the header is of what was sealed."""
        assert refused(order_for(NORTH, manifest=bytes(32)))

    def test_a_message_longer_than_the_site_opens(self) -> None:
        """The limit is the site's own, and is looked at before memory is taken."""
        site = Site(most_bytes=1000)
        assert site.failure(order_for(NORTH)) is FailureCode.INVALID_REQUEST
        assert site.seen == []

    def test_a_broadcast_that_another_recipient_forged(self) -> None:
        """Recipients share the content key, so one can encrypt another model under it; the digest is signed, though.

        The forgery is a sound one: it differs from the coordinator's in nothing but the ciphertext's digest.
        """
        content = request()
        sealed, ciphertext = sealed_down(content)
        fields = Envelope.from_bytes(sealed.envelope_for(SOUTH.record))
        key = SOUTH.unwrap(fields.wrapped, wrap_info(fields.header.digest, fields.recipient))
        schedule = derive(key, fields.header.digest)
        poisoned = request(arrays={name: values * 1000 for name, values in MODEL.items()})
        plain = b"".join(bytes(part) for part in encode_records(poisoned))
        assert len(plain) == fields.header.plaintext_bytes < 1 << 20
        forged = bytearray(len(plain) + 16)
        schedule.cipher.encrypt_into(schedule.nonce(0, last=True), plain, None, forged)
        assert isinstance(schedule.cipher, AESGCM)
        assert len(forged) == len(ciphertext)
        envelope = sealed.envelope_for(NORTH.record)
        assert not refused(Message(sealed_content(envelope, Blob.of_bytes(ciphertext)), 2, "train"))
        assert refused(Message(sealed_content(envelope, Blob.of_bytes(bytes(forged))), 2, "train"))

    def test_an_order_without_the_digest_of_its_ciphertext(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """What comes down is a broadcast: one whose ciphertext is not signed for is not accepted instead."""
        honest = sealing.seal
        monkeypatch.setattr(sealing, "seal", lambda *args, **options: honest(*args, **options | {"broadcast": False}))
        assert refused(order_for(NORTH))

    @settings(max_examples=150, deadline=None)
    @given(st.integers(0), st.integers(1, 255), st.booleans())
    def test_any_byte_that_was_changed(self, place: int, change: int, in_envelope: bool) -> None:
        """There is no byte of an order that can be another one."""
        envelope, blob = read_sealed(order_for(NORTH).content)
        parts = [bytearray(envelope), bytearray(blob.numpy().tobytes())]
        part = parts[0 if in_envelope else 1]
        part[place % len(part)] ^= change
        assert refused(Message(sealed_content(bytes(parts[0]), Blob.of_bytes(bytes(parts[1]))), 2, "train"))

    @settings(max_examples=50, deadline=None)
    @given(st.binary(max_size=3000), st.binary(max_size=100))
    def test_any_bytes_at_all(self, envelope: bytes, blob: bytes) -> None:
        """Whatever comes in place of an order is refused, and nothing crashes."""
        assert refused(Message(sealed_content(envelope, Blob.of_bytes(blob)), 2, "train"))


class TestReplay:
    def test_an_order_is_taken_once(self, tmp_path: Path) -> None:
        """The same sealed order again is refused, in the same process and after a restart."""
        order = order_for(NORTH)
        site = Site(seen=ReplayGuard(tmp_path))
        assert site.failure(order) is None
        assert site.failure(order) is FailureCode.INVALID_REQUEST
        assert len(site.seen) == 1
        restarted = Site(seen=ReplayGuard(tmp_path))
        assert restarted.failure(order) is FailureCode.INVALID_REQUEST
        assert restarted.seen == []
        assert restarted.failure(order_for(NORTH)) is None

    def test_an_order_that_failed_was_answered_too(self, tmp_path: Path) -> None:
        """A failure is an answer: asking for it again in the coordinator's name costs the site nothing."""

        def fail(_: Message) -> Message:
            raise ValueError

        order = order_for(NORTH)
        for _ in range(2):
            site = Site(work=fail, seen=ReplayGuard(tmp_path))
            failure = site.failure(order)
        assert (failure, site.seen) == (FailureCode.INVALID_REQUEST, [])

    def test_an_order_that_a_killed_process_left_is_taken_again_but_not_for_ever(self, tmp_path: Path) -> None:
        """Work that nobody answered can be begun anew after a restart, three times in all."""

        def killed(_: Message) -> Message:
            raise KeyboardInterrupt

        order = order_for(NORTH)
        for _ in range(2):
            with pytest.raises(KeyboardInterrupt):
                Site(work=killed, seen=ReplayGuard(tmp_path)).take(order)
        assert Site(seen=ReplayGuard(tmp_path)).failure(order) is None
        other = order_for(NORTH)
        for _ in range(3):
            with pytest.raises(KeyboardInterrupt):
                Site(work=killed, seen=ReplayGuard(tmp_path)).take(other)
        assert Site(seen=ReplayGuard(tmp_path)).failure(other) is FailureCode.INVALID_REQUEST

    def test_an_order_that_cannot_be_written_down_is_not_taken(self, tmp_path: Path) -> None:
        """Where the record of orders cannot be kept, nothing is done."""
        (tmp_path / "file").write_bytes(b"")
        site = Site(seen=ReplayGuard(tmp_path / "file"))
        assert site.failure(order_for(NORTH)) is FailureCode.CLIENT_FAILED
        assert site.seen == []

    def test_an_order_that_is_refused_leaves_no_trace(self, tmp_path: Path) -> None:
        """Only what the coordinator signed and what arrived whole is remembered: others cannot use an order up."""
        order = order_for(NORTH)
        envelope, blob = read_sealed(order.content)
        site = Site(seen=ReplayGuard(tmp_path))
        damaged = bytearray(blob.numpy().tobytes())
        damaged[7] ^= 1
        message = Message(sealed_content(envelope, Blob.of_bytes(bytes(damaged))), 2, "train")
        assert site.failure(message) is FailureCode.INVALID_REQUEST
        assert list(tmp_path.iterdir()) == []
        assert site.failure(order) is None

    @pytest.mark.parametrize("cut", range(1, 17))
    def test_a_torn_entry_is_dropped_and_the_next_stands_whole(self, tmp_path: Path, cut: int) -> None:
        """A process that was killed while it wrote leaves a part of an entry: those before and after it count."""
        first, second, third = (bytes([i]) * 16 for i in (1, 2, 3))
        guard = ReplayGuard(tmp_path)
        for message_id in (first, second):
            guard.begin(RUN_ID, message_id)
            guard.answered(RUN_ID, message_id)
        (file,) = tmp_path.iterdir()
        file.write_bytes(file.read_bytes()[:-cut])
        ReplayGuard(tmp_path).begin(RUN_ID, third)
        with pytest.raises(PeerError):
            ReplayGuard(tmp_path).begin(RUN_ID, first)
        for _ in range(2):
            ReplayGuard(tmp_path).begin(RUN_ID, third)  # begun once, never answered: twice more
        with pytest.raises(PeerError):
            ReplayGuard(tmp_path).begin(RUN_ID, third)
        assert file.stat().st_size % 17 == 0

    def test_runs_are_apart(self, tmp_path: Path) -> None:
        """Each run has its own file, named after it."""
        guard = ReplayGuard(tmp_path)
        guard.begin(RUN_ID, bytes(16))
        guard.begin(bytes(16), b"\1" * 16)
        assert {path.name for path in tmp_path.iterdir()} == {f"{RUN_ID.hex()}.seen", f"{'00' * 16}.seen"}


def test_both_ends_fit(tmp_path: Path) -> None:
    """What the coordinator's grid asks, the site's mod takes, and its answer is what the grid hands on."""
    site = Site(folder=tmp_path / "up", seen=ReplayGuard(tmp_path / "seen"))
    (tmp_path / "down").mkdir()
    grid = sealed_grid(Nodes(lambda orders: [site.take(order) for order in orders]), tmp_path / "down")
    (reply,) = grid.stream(messages(sites=1))
    assert as_bytes(arrays_of(reply.content)) == as_bytes(UPDATE)
    assert as_bytes(arrays_of(site.seen[0])) == as_bytes(MODEL)

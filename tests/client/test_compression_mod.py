"""A client sends its update in the run's encoding, after everything that protects it, and the same bytes on a retry."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from flwr.app import ConfigRecord, Context, Message, RecordDict

from client.mods import compression_mod, guard_mod
from common.errors import FailureCode
from common.flower import (
    ARRAYS,
    CONFIG,
    ROUND,
    RUN,
    WEIGHT,
    arrays_of,
    client_context,
    failure_of,
    failure_reply,
    metrics_of,
    prepare_process,
    stamp,
    to_record,
    update_reply,
)
from common.transport.compression import Compression, decode_update
from common.transport.records import decode_records, encode_records
from tests.helpers.runs import as_bytes, configuration

prepare_process()

START = {"w": np.linspace(-1, 1, 50, dtype=np.float32), "n": np.array(3)}
STEP = {"w": np.linspace(0, 1, 50, dtype=np.float32) ** 3, "n": np.array(1)}


class Client:
    """One client behind its compression mod; it trains by adding a step."""

    def __init__(self, name: str = "north") -> None:
        self.name = name
        self.context = client_context(node_id=2, partition=0)
        self.step = dict(STEP)
        self.rounds: list[int] = []
        self._mod = compression_mod(lambda _request, _context: self.name)

    def ask(self, compression: str, server_round: int = 1, start: Any = None, **settings: Any) -> Message:
        config = configuration(transport={"compression": compression, **settings})
        said = ConfigRecord({RUN: config.canonical_json(), ROUND: server_round})
        content = RecordDict({ARRAYS: to_record(start or START), CONFIG: said})
        message = stamp(Message(content, 2, "train"), message_id="m")
        return guard_mod(message, self.context, lambda m, c: self._mod(m, c, self._train))

    def _train(self, message: Message, _: Context) -> Message:
        self.rounds.append(1)
        arrays = {name: (v + self.step[name]).astype(v.dtype) for name, v in arrays_of(message.content).items()}
        return update_reply(message, arrays, {WEIGHT: 4.0, "train_loss": 0.5})


def bytes_of(reply: Message) -> dict[str, tuple[str, bytes]]:
    return as_bytes(arrays_of(reply.content))


def decoded(reply: Message, codec: Any, **settings: Any) -> dict[str, np.ndarray]:
    return decode_update(START, arrays_of(reply.content), Compression(codec=codec, **settings))


class TestEveryCodec:
    @pytest.mark.parametrize("codec", ["bf16", "int8", "top-k"])
    def test_sends_the_update_and_the_metrics(self, codec: str) -> None:
        """What the coordinator restores is the model that was trained, nearly; metrics pass as they are."""
        settings = {"top_k_fraction": 1.0}
        reply = Client().ask(codec, **settings)
        restored = decoded(reply, codec, **settings)
        np.testing.assert_allclose(restored["w"], START["w"] + STEP["w"], atol=0.01)
        assert restored["n"] == 4
        assert dict(metrics_of(reply.content)) == {WEIGHT: 4.0, "train_loss": 0.5}

    def test_none_leaves_everything_as_it_is(self) -> None:
        """Without compression the reply is the trained model itself, and nothing is kept."""
        client = Client()
        reply = client.ask("none")
        assert bytes_of(reply) == as_bytes({name: (v + STEP[name]).astype(v.dtype) for name, v in START.items()})
        assert not client.context.state

    @pytest.mark.parametrize("codec", ["bf16", "int8", "top-k"])
    def test_a_retry_gives_the_same_bytes(self, codec: str) -> None:
        """The same round over the same model is answered with the same bytes, at the same client or a new process."""
        client = Client()
        first = bytes_of(client.ask(codec))
        assert bytes_of(client.ask(codec)) == first
        assert bytes_of(Client().ask(codec)) == first

    @pytest.mark.parametrize("codec", ["bf16", "int8", "top-k"])
    @pytest.mark.parametrize("bad", [np.nan, np.inf])
    def test_an_update_that_is_not_finite_is_not_sent(self, codec: str, bad: float) -> None:
        """No scale or selection can be made of it: the coordinator learns that it was not finite."""
        client = Client()
        client.step["w"] = np.full(50, bad, np.float32)
        assert failure_of(client.ask(codec)) is FailureCode.NON_FINITE_UPDATE
        assert not client.context.state

    def test_failures_pass(self) -> None:
        """What is no update is not touched."""
        client = Client()
        client._train = lambda m, _: failure_reply(m, FailureCode.BUDGET_EXHAUSTED)  # type: ignore[method-assign]
        assert failure_of(client.ask("int8")) is FailureCode.BUDGET_EXHAUSTED


class TestInt8:
    def test_each_round_and_client_rounds_otherwise(self) -> None:
        """Equal updates of two clients, or of two rounds, are not rounded alike: errors do not add up."""
        replies = [Client().ask("int8"), Client("south").ask("int8"), Client().ask("int8", 2)]
        assert len({str(bytes_of(reply)) for reply in replies}) == 3


class TestErrorFeedback:
    def test_what_is_left_out_comes_later(self) -> None:
        """Over rounds in which nothing new is learnt, everything that the first one left out arrives."""
        client, total = Client(), np.zeros(50, np.float32)
        for server_round in (1, 2, 3):
            reply = client.ask("top-k", server_round, top_k_fraction=0.4)
            total += decoded(reply, "top-k", top_k_fraction=0.4)["w"] - START["w"]
            client.step["w"] = np.zeros(50, np.float32)
        np.testing.assert_allclose(total, STEP["w"], atol=1e-6)

    def test_a_retry_counts_once(self) -> None:
        """Asking twice for a round changes nothing in the next one."""
        once, twice = Client(), Client()
        for server_round in (1, 2, 3):
            expected = bytes_of(once.ask("top-k", server_round, top_k_fraction=0.2))
            for _ in range(server_round):
                assert bytes_of(twice.ask("top-k", server_round, top_k_fraction=0.2)) == expected

    def test_a_round_with_another_model_is_answered_anew(self) -> None:
        """A coordinator that lost a round asks it over another model: what was sent for the first one is no answer."""
        client, other = Client(), {**START, "w": START["w"][::-1].copy()}
        client.step["w"] = STEP["w"][::-1].copy()
        first = bytes_of(client.ask("top-k", top_k_fraction=0.4))
        client.step["w"] = STEP["w"]
        again = bytes_of(client.ask("top-k", start=other, top_k_fraction=0.4))
        assert again != first
        assert again == bytes_of(Client().ask("top-k", start=other, top_k_fraction=0.4))

    def test_another_run_starts_from_nothing(self) -> None:
        """What one run left out is no part of another one's update."""
        client = Client()
        client.ask("top-k", top_k_fraction=0.1)
        assert bytes_of(client.ask("top-k", 2, top_k_fraction=0.2)) == bytes_of(
            Client().ask("top-k", 2, top_k_fraction=0.2)
        )

    def test_state_survives_a_process(self) -> None:
        """The state is plain records: written down and read again, it goes on where it was."""
        client = Client()
        client.ask("top-k")
        revived = Client()
        state = decode_records(b"".join(bytes(part) for part in encode_records(client.context.state)))
        revived.context = client_context(node_id=2, partition=0, state=state)
        assert bytes_of(revived.ask("top-k")) == bytes_of(client.ask("top-k"))
        assert bytes_of(revived.ask("top-k", 2)) == bytes_of(client.ask("top-k", 2))

"""The folded mean is what the strategy would have computed, in the memory of one model."""

from __future__ import annotations

import tracemalloc
import weakref
from collections.abc import Iterable, Iterator
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Message
from flwr.serverapp.strategy import FedAvg
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from common.errors import FailureCode
from common.flower import METRICS, WEIGHT, arrays_of, failure_reply, prepare_process
from server.grids import FoldingGrid
from server.strategies import cast_like
from tests.helpers.grids import ScriptedGrid, train_messages, update
from tests.helpers.runs import as_bytes

prepare_process()

MODEL = {"w": np.zeros((2, 2), np.float32), "b": np.zeros(3, np.float32)}


def fold(replies: list[Message], messages: list[Message]) -> list[Message]:
    return list(FoldingGrid(ScriptedGrid(lambda _: replies)).send_and_receive(messages=messages, timeout=None))


def replies_to(messages: list[Message], clients: list[tuple[dict[str, NDArray[Any]], float]]) -> list[Message]:
    return [
        Message(update(arrays, weight, train_loss=float(i)), reply_to=message)
        for i, (message, (arrays, weight)) in enumerate(zip(messages, clients, strict=True))
    ]


floats = st.floats(-1e4, 1e4, width=32)
clients = st.lists(
    st.tuples(
        st.fixed_dictionaries({name: hnp.arrays(np.float32, v.shape, elements=floats) for name, v in MODEL.items()}),
        st.floats(1e-3, 1e6) | st.integers(1, 10**6),
    ),
    min_size=1,
    max_size=6,
)


class TestMean:
    @settings(max_examples=60)
    @given(clients)
    def test_equals_what_fedavg_computes_from_all_replies(self, clients: list[Any]) -> None:
        """FedAvg over the one folded reply gives what FedAvg gives over all, up to float32 rounding; losses too."""
        messages = train_messages(MODEL, range(2, 2 + len(clients)))
        strategy = FedAvg()
        expected, metrics = strategy.aggregate_train(1, replies_to(messages, clients))
        folded, folded_metrics = strategy.aggregate_train(1, fold(replies_to(messages, clients), messages))
        assert expected is not None
        assert folded is not None
        for name in MODEL:
            largest = max(float(np.abs(arrays[name]).max()) for arrays, _ in clients)
            np.testing.assert_allclose(
                folded[name].numpy(), expected[name].numpy(), rtol=1e-5, atol=1e-6 * len(clients) * largest
            )
            assert folded[name].dtype == "float32"
        assert metrics is not None
        assert folded_metrics is not None
        assert folded_metrics["train_loss"] == pytest.approx(metrics["train_loss"])

    def test_order_of_arrival_changes_no_bit(self) -> None:
        """All 24 orders in which four clients can answer give the same bytes, also where one of them fails.

        In double precision: rounding to single would hide most differences.
        """
        generator = np.random.default_rng(5)
        messages = train_messages(MODEL, [9, 4, 7, 2])
        some = [({"w": generator.normal(size=500)}, weight) for weight in (3.0, 0.7, 1e5, 11)]
        replies = replies_to(messages, some)
        replies[2] = failure_reply(messages[2], FailureCode.CLIENT_FAILED)
        results = set()
        for order in permutations(replies):
            folded = fold(list(order), messages)[-1]
            results.add(str((as_bytes(arrays_of(folded.content)), dict(folded.content[METRICS]))))
        assert len(results) == 1

    def test_large_arrays_are_summed_in_blocks_to_the_same_bit(self) -> None:
        """The mean is that of the plain formula, whole arrays at a time, for arrays of any size, dtype and layout."""
        generator = np.random.default_rng(8)
        for dtype in (np.float32, np.float64, np.float16, np.int64):
            for shape in ((65_536,), (65_537,), (3, 70_000), (400, 500)):
                some = [(generator.normal(size=shape) * 100).astype(dtype) for _ in range(3)]
                some[1] = np.asfortranarray(some[1])
                weights = [0.3, 7.0, 1e4]
                messages = train_messages({"w": some[0]}, [2, 3, 4])
                replies = replies_to(messages, [({"w": v}, w) for v, w in zip(some, weights, strict=True)])
                total = some[0] * np.float64(weights[0])
                for values, weight in zip(some[1:], weights[1:], strict=True):
                    total += values * np.float64(weight)
                mean = total / (0.3 + 7.0 + 1e4)
                expected = (np.rint(mean) if dtype is np.int64 else mean).astype(dtype)
                (folded,) = fold(replies, messages)
                assert as_bytes(arrays_of(folded.content)) == as_bytes({"w": expected})

    def test_weight_is_the_sum(self) -> None:
        """The folded reply counts as much as all its parts."""
        messages = train_messages(MODEL, [2, 3])
        (reply,) = fold(replies_to(messages, [(MODEL, 1.5), (MODEL, 2.0)]), messages)
        assert reply.content[METRICS][WEIGHT] == 3.5

    def test_mean_of_integers_is_rounded(self) -> None:
        """A counter that all clients agree on is kept, though its mean is formed in floating point."""
        model = {"n": np.array(9, np.int64)}
        messages = train_messages(model, range(2, 13))
        for weights in np.random.default_rng(3).random((50, len(messages))):
            folded = fold(replies_to(messages, [(model, float(weight)) for weight in weights]), messages)
            assert arrays_of(folded[0].content)["n"] == 9
            assert arrays_of(folded[0].content)["n"].dtype == np.int64
        aggregate, _ = FedAvg().aggregate_train(1, folded)
        assert aggregate is not None
        record = messages[0].content.array_records["arrays"]
        assert cast_like(aggregate, record)["n"].numpy() == 9

    def test_replies_are_not_written_to(self) -> None:
        """What clients sent is read only: in process it can be their own model."""
        messages = train_messages(MODEL, [2, 3])
        arrays = {name: np.ones_like(values) for name, values in MODEL.items()}
        before = as_bytes(arrays)
        fold(replies_to(messages, [(arrays, 1.0), (arrays, 5.0)]), messages)
        assert as_bytes(arrays) == before


class TestFailures:
    def test_pass_as_they_arrive(self) -> None:
        """Failures are handed on at once and keep their reasons; the mean is of the others."""
        messages = train_messages(MODEL, [2, 3, 4])
        failed = failure_reply(messages[0], FailureCode.DEADLINE_EXCEEDED)
        arrays = {name: values + 3 for name, values in MODEL.items()}
        sound = replies_to(messages[1:], [(arrays, 1.0), (arrays, 1.0)])

        def answer(_: list[Message]) -> Iterator[Message]:
            yield sound[1]
            yield failed
            yield sound[0]

        stream = FoldingGrid(ScriptedGrid(answer)).stream(messages)
        assert next(stream) is failed
        mean = next(stream)
        assert (arrays_of(mean.content)["w"] == 3).all()
        assert list(stream) == []

    def test_nothing_but_failures_gives_no_mean(self) -> None:
        """Where everybody failed there is no reply that a strategy could take for an update."""
        messages = train_messages(MODEL, [2, 3])
        replies = [failure_reply(message, FailureCode.CLIENT_LOST) for message in messages]
        assert fold(replies, messages) == replies
        assert fold([], []) == []


class TestMemory:
    def test_early_replies_wait_on_disk_beyond_the_limit(self, tmp_path: Path) -> None:
        """While the first client is awaited, the others' replies take no memory; the mean is the same to the bit."""
        generator = np.random.default_rng(6)
        messages = train_messages({"w": np.zeros(1000)}, range(2, 8))
        arrays = [generator.normal(size=1000) for _ in messages]
        alive = [weakref.ref(values) for values in arrays]
        waiting: list[int] = []

        def answer(messages: list[Message]) -> Iterator[Message]:
            for i in reversed(range(len(messages))):
                yield Message(update({"w": arrays.pop()}, 1.0 + i), reply_to=messages[i])
                waiting.append(sum(ref() is not None for ref in alive[i:]))

        def fold_with(in_memory: int) -> tuple[list[Message], list[int]]:
            waiting.clear()
            grid = FoldingGrid(ScriptedGrid(answer), folder=tmp_path, in_memory=in_memory)
            return list(grid.stream(messages)), list(waiting)

        kept = [values.copy() for values in arrays]
        (on_disk,), held = fold_with(in_memory=16_000)
        assert held[:4] == [1, 2, 2, 2]
        arrays[:] = kept
        (in_memory,), _ = fold_with(in_memory=1 << 20)
        assert as_bytes(arrays_of(on_disk.content)) == as_bytes(arrays_of(in_memory.content))
        assert list(tmp_path.iterdir()) == []

    def test_a_round_can_be_given_up(self, tmp_path: Path) -> None:
        """Closing the stream closes the transport's and leaves no file; the next round starts from nothing."""
        closed = []

        def answer(messages: list[Message]) -> Iterator[Message]:
            try:
                for message in reversed(messages[1:]):
                    yield Message(update({"w": np.ones(1000)}), reply_to=message)
                yield failure_reply(messages[0], FailureCode.CLIENT_LOST)
                yield failure_reply(messages[0], FailureCode.CLIENT_LOST)
            finally:
                closed.append(True)

        messages = train_messages({"w": np.zeros(1000)}, [2, 3, 4])
        grid = FoldingGrid(ScriptedGrid(answer), folder=tmp_path, in_memory=0)
        stream = grid.stream(messages)
        assert next(stream).has_error()
        stream.close()  # type: ignore[attr-defined]
        assert closed == [True]
        assert list(tmp_path.iterdir()) == []

    def test_products_never_take_the_memory_of_a_model(self) -> None:
        """Beside the sum in float64 and the reply itself, adding a reply of 8 MB takes less than a megabyte."""
        size = 2_000_000
        messages = train_messages({"w": np.zeros(1, np.float32)}, [2, 3, 4])
        peaks = []

        def answer(messages: list[Message]) -> Iterator[Message]:
            for message in messages:
                reply = Message(update({"w": np.ones(size, np.float32)}), reply_to=message)
                before, _ = tracemalloc.get_traced_memory()
                tracemalloc.reset_peak()
                yield reply
                peaks.append(tracemalloc.get_traced_memory()[1] - before)
                del reply

        tracemalloc.start()
        try:
            list(FoldingGrid(ScriptedGrid(answer)).stream(messages))
        finally:
            tracemalloc.stop()
        assert peaks[0] < 8 * size + 2**20
        assert all(peak < 2**20 for peak in peaks[1:])

    def test_holds_a_few_models_however_many_clients(self) -> None:
        """Of 200 replies that arrive in order, at most three are alive at any time."""
        alive: list[weakref.ref[NDArray[Any]]] = []
        most = 0

        def answer(messages: list[Message]) -> Iterable[Message]:
            nonlocal most
            for message in messages:
                values = np.ones(100, np.float32)
                alive.append(weakref.ref(values))
                reply = Message(update({"w": values}), reply_to=message)
                del values
                yield reply
                del reply
                most = max(most, sum(ref() is not None for ref in alive))

        messages = train_messages({"w": np.ones(100, np.float32)}, range(2, 202))
        (mean,) = FoldingGrid(ScriptedGrid(answer)).send_and_receive(messages=messages)
        assert (arrays_of(mean.content)["w"] == 1).all()
        assert most <= 3

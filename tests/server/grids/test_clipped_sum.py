"""One client moves the sum by at most the clipping norm, whatever it sends; a strategy sees what was released only."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import permutations
from typing import Any

import numpy as np
import pytest
from flwr.app import Message
from flwr.serverapp.strategy import FedAvg
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from common.errors import FailureCode, PrivacyError
from common.flower import METRICS, WEIGHT, WITHIN, arrays_of, failure_reply, prepare_process
from server.grids import CheckedGrid, ClippedSum, ClippedSumGrid
from server.grids.clipped_sum import HEADROOM, check_rounding
from tests.helpers.grids import ScriptedGrid, train_messages, update
from tests.helpers.releasing import DIMENSIONS, TRAINABLE, flat, start

prepare_process()

NORM = 2.0
MODEL = start()


class Releasing:
    """Keeps each sum, and releases a mean that a test chose."""

    def __init__(self, mean: NDArray[np.float64] | None = None) -> None:
        self.sums: list[ClippedSum] = []
        self.mean = np.zeros(DIMENSIONS) if mean is None else mean

    def __call__(self, total: ClippedSum) -> NDArray[np.float64]:
        self.sums.append(total)
        return self.mean


def moved(by: Any, **others: Any) -> dict[str, NDArray[Any]]:
    """The model with all that is trained moved, and other arrays replaced."""
    arrays = {name: values + np.float32(by) if name in TRAINABLE else values for name, values in MODEL.items()}
    return {**arrays, **others}


def answers(
    replies: Iterable[Message], messages: list[Message], releasing: Releasing, *, adaptive: bool = False
) -> list[Message]:
    """What a strategy gets, with the checked grid below as in a run."""
    checked = CheckedGrid(
        ScriptedGrid(lambda _: list(replies)),
        template=MODEL,
        equal_weights=True,
        metrics=[WITHIN] if adaptive else [],
        largest=2.0**100,
        on_reply=lambda message, failure: None,
    )
    grid = ClippedSumGrid(checked, model=MODEL, trainable=TRAINABLE, clipping_norm=NORM, release=releasing)
    return list(grid.send_and_receive(messages=messages, timeout=None))


def summed(*updates: Any, adaptive: bool = False, **metrics: float) -> ClippedSum:
    """The sum over clients that move everything by so much."""
    messages = train_messages(MODEL, range(2, 2 + len(updates)))
    releasing = Releasing()
    replies = [Message(update(moved(u), 1.0, **metrics), reply_to=m) for m, u in zip(messages, updates, strict=True)]
    answers(replies, messages, releasing, adaptive=adaptive)
    (total,) = releasing.sums
    return total


class TestOneClient:
    @settings(max_examples=60, deadline=None)
    @given(
        st.lists(st.floats(-(2.0**99), 2.0**99, width=32), min_size=1, max_size=4),
        st.floats(-(2.0**99), 2.0**99, width=32),
    )
    def test_moves_the_sum_by_no_more_than_the_norm(self, others: list[float], hostile: float) -> None:
        """With or without a client that did not clip, sums of all others differ by at most the clipping norm."""
        alone, joined = summed(*others), summed(*others, hostile)
        assert np.linalg.norm(joined.update - alone.update) <= NORM * (1 - HEADROOM / 2)

    @pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 3e38])
    def test_moves_nothing_with_what_is_no_number(self, value: float) -> None:
        """NaN, infinity and what is too large fail below and add zero, also to the count."""
        assert np.array_equal(summed(0.1, value).update, summed(0.1).update)
        assert summed(0.1, value, adaptive=True, within=1.0).within == 0.5

    def test_moves_nothing_with_infinities_that_nobody_checked(self) -> None:
        """The sum stays finite even over a grid that lets everything pass."""
        releasing = Releasing()
        messages = train_messages(MODEL, [2, 3])
        replies = [Message(update(moved(by), 1.0), reply_to=m) for m, by in zip(messages, (np.nan, 0.1), strict=True)]
        grid = ClippedSumGrid(
            ScriptedGrid(lambda _: replies), model=MODEL, trainable=TRAINABLE, clipping_norm=NORM, release=releasing
        )
        grid.send_and_receive(messages)
        assert np.array_equal(releasing.sums[0].update, summed(0.1).update)

    @pytest.mark.parametrize("claimed", [0.0, 0.3, 0.9, 1.0, 5.0, 1e300, 2**60])
    def test_moves_the_count_by_half(self, claimed: float) -> None:
        """Whatever it claims about its norm, it counts as 1/2 or -1/2."""
        assert summed(0.1, adaptive=True, within=claimed).within == (0.5 if claimed == 1 else -0.5)

    def test_is_added_as_it_is_when_it_is_small(self) -> None:
        """An update within the norm is what the reply holds over the model, in double precision."""
        assert np.array_equal(summed(0.1).update, flat(moved(0.1)) - flat(MODEL))

    def test_keeps_its_direction_when_it_is_large(self) -> None:
        """Clipping shortens the whole update, all arrays together."""
        direction = summed(50).update
        np.testing.assert_allclose(direction / np.linalg.norm(direction), np.full(8, 8**-0.5))
        assert np.linalg.norm(direction) == pytest.approx(NORM, rel=2 * HEADROOM)

    def test_does_not_count_twice(self) -> None:
        """A second answer is not added, with no checks below either."""
        (message,) = train_messages(MODEL, [2])
        reply, releasing = Message(update(moved(0.1), 1.0), reply_to=message), Releasing()
        grid = ClippedSumGrid(
            ScriptedGrid(lambda _: [reply, reply]),
            model=MODEL,
            trainable=TRAINABLE,
            clipping_norm=NORM,
            release=releasing,
        )
        grid.send_and_receive([message])
        assert np.array_equal(releasing.sums[0].update, summed(0.1).update)


class TestAnswer:
    def test_is_the_model_plus_the_release(self) -> None:
        """FedAvg over the answer gives exactly that, whatever clients sent."""
        releasing = Releasing(np.arange(8) / 8)
        messages = train_messages(MODEL, [2, 3])
        replies = [Message(update(moved(9), 1.0), reply_to=message) for message in messages]
        (answer,) = answers(replies, messages, releasing)
        assert dict(answer.content[METRICS]) == {WEIGHT: 1.0}
        aggregate, metrics = FedAvg().aggregate_train(1, [answer])
        assert aggregate is not None
        assert metrics == {}
        result = {name: array.numpy() for name, array in aggregate.items()}
        np.testing.assert_array_equal(flat(result), flat(MODEL) + np.arange(8) / 8)

    def test_leaves_alone_what_is_not_trained(self) -> None:
        """Frozen parameters, running statistics and counters are the coordinator's own: neither clients' values nor
        noise get into them.
        """
        (message,) = train_messages(MODEL, [2])
        others = {"frozen": MODEL["frozen"] + 1, "mean": MODEL["mean"] - 3, "count": MODEL["count"] + 5}
        releasing = Releasing(np.ones(8))
        (answer,) = answers([Message(update(moved(0.1, **others), 1.0), reply_to=message)], [message], releasing)
        arrays = arrays_of(answer.content)
        assert list(arrays) == list(MODEL)
        for name in others:
            assert arrays[name] is MODEL[name]
        assert np.array_equal(releasing.sums[0].update, summed(0.1).update), "nor into the update's norm"
        assert {name: values.dtype for name, values in arrays.items()} == {n: v.dtype for n, v in MODEL.items()}

    def test_comes_where_nobody_answered(self) -> None:
        """Failures pass with their reasons; the sum of nobody is zero and is released like any other."""
        messages = train_messages(MODEL, [2, 3])
        failed = [failure_reply(message, FailureCode.CLIENT_LOST) for message in messages]
        releasing = Releasing(np.ones(8))
        *passed, answer = answers(failed, messages, releasing)
        assert [reply.error.code for reply in passed] == [FailureCode.CLIENT_LOST] * 2
        assert not releasing.sums[0].update.any()
        assert (releasing.sums[0].within, releasing.sums[0].asked) == (0, 2)
        np.testing.assert_array_equal(flat(arrays_of(answer.content)), flat(MODEL) + 1)

    def test_comes_where_nobody_was_asked(self) -> None:
        """An empty cohort is a round like any other: one release of nothing but noise."""
        releasing = Releasing(np.ones(8))
        (answer,) = answers([], [], releasing)
        assert releasing.sums[0].asked == 0
        np.testing.assert_array_equal(flat(arrays_of(answer.content)), flat(MODEL) + 1)
        aggregate, _ = FedAvg().aggregate_train(1, [answer])
        assert aggregate is not None

    def test_cannot_be_passed_by(self) -> None:
        """Flower's other way of asking, which would show single replies, is refused."""
        messages = train_messages(MODEL, [2])
        inner = ScriptedGrid(lambda asked: [Message(update(moved(1), 1.0), reply_to=m) for m in asked])
        grid = ClippedSumGrid(inner, model=MODEL, trainable=TRAINABLE, clipping_norm=NORM, release=Releasing())
        with pytest.raises(PrivacyError, match="single replies"):
            grid.push_messages(messages)
        with pytest.raises(PrivacyError, match="single replies"):
            grid.pull_messages(inner.push_messages(messages))

    def test_does_not_write_to_the_model(self) -> None:
        """What the round began with stays as it was: clients in the same process are shown it."""
        before = flat(MODEL)
        summed(0.1, 50)
        np.testing.assert_array_equal(flat(MODEL), before)


class TestOrder:
    def test_of_arrival_changes_no_bit(self) -> None:
        """All orders in which four clients can answer give the same sum to the bit."""
        messages = train_messages(MODEL, [9, 4, 7, 2])
        replies = [
            Message(update(moved(by), 1.0), reply_to=m) for m, by in zip(messages, (0.3, 1 / 3, -40, 1e-3), strict=True)
        ]
        replies[2] = failure_reply(messages[2], FailureCode.CLIENT_FAILED)
        sums = set()
        for order in permutations(replies):
            releasing = Releasing()
            answers(order, messages, releasing)
            sums.add(releasing.sums[0].update.tobytes())
        assert len(sums) == 1

    def test_failures_pass_as_they_arrive(self) -> None:
        """A failure is handed on before the others have answered."""
        messages = train_messages(MODEL, [2, 3])
        failed = failure_reply(messages[1], FailureCode.CLIENT_FAILED)

        def answer(_: list[Message]) -> Iterator[Message]:
            yield failed
            pytest.fail("the failure was held back")

        grid = ClippedSumGrid(
            ScriptedGrid(answer), model=MODEL, trainable=TRAINABLE, clipping_norm=NORM, release=Releasing()
        )
        assert next(grid.stream(messages)) is failed


class TestRounding:
    @pytest.mark.parametrize(("coefficients", "asked"), [((1.0,), 200_000), ((1.0, 0.5, 0.375), 10_000)])
    def test_leaves_room_for_every_cohort_that_can_be_asked(self, coefficients: Any, asked: int) -> None:
        """Errors of sums over that many clients lie within the headroom."""
        check_rounding(coefficients, rounds=1000, asked=asked)
        check_rounding(coefficients, rounds=1000, asked=0)

    def test_refuses_more_clients_than_it_can_add_exactly_enough(self) -> None:
        """Beyond that the sum is refused before any noise is drawn."""
        with pytest.raises(PrivacyError, match="cannot be formed exactly enough"):
            check_rounding((1.0,), rounds=1, asked=1_000_000)

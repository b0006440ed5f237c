"""A strategy steps as Flower wrote it; where its step changes nothing, it is not taken."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from flwr.app import Message
from flwr.serverapp.strategy import FedAdam, FedAvg, FedAvgM, FedProx, Strategy
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from common.errors import FailureCode
from common.flower import arrays_of, failure_reply, from_record, to_record
from server.aggregation import aggregate, all_finite, make_writable
from server.strategies import cast_like
from tests.helpers.grids import train_messages, update
from tests.helpers.runs import as_bytes

MODEL = {"w": np.zeros((2, 3), np.float32), "half": np.zeros(2, np.float16), "wide": np.zeros(2)}
MODEL |= {"count": np.array(0), "mask": np.zeros(3, np.bool_)}
(MESSAGE,) = train_messages(MODEL, [2])


def like(values: np.ndarray) -> st.SearchStrategy[Any]:
    """Any values that a reply can hold: finite, integers as far as float64 is exact."""
    if values.dtype.kind == "f":
        elements: Any = st.floats(allow_nan=False, allow_infinity=False, width=values.dtype.itemsize * 8)
    else:
        elements = st.booleans() if values.dtype.kind == "b" else st.integers(-(2**53), 2**53)
    return hnp.arrays(values.dtype, values.shape, elements=elements)


class TestOneReply:
    @settings(max_examples=150)
    @given(
        st.fixed_dictionaries({name: like(values) for name, values in MODEL.items()}),
        st.floats(5e-324, 2**53) | st.integers(1, 2**53),
        st.floats(0, 1e300) | st.integers(0, 2**60),
        st.sampled_from([FedAvg, FedProx]),
    )
    def test_is_the_mean_to_the_bit(self, arrays: Any, weight: float, loss: float, kind: type[Strategy]) -> None:
        """What Flower computes from one reply is that reply: every bit of it, zeros' signs and subnormals too."""
        reply = Message(update(arrays, weight, train_loss=loss), reply_to=MESSAGE)
        expected, told = kind().aggregate_train(1, [reply])
        found, metrics = aggregate(kind(), 1, [reply])
        assert expected is not None
        assert found is not None
        start = to_record(MODEL)
        assert as_bytes(from_record(cast_like(found, start))) == as_bytes(from_record(cast_like(expected, start)))
        assert dict(metrics or {}) == dict(told or {})
        assert {type(value) for value in (metrics or {}).values()} == {float}

    def test_is_not_copied(self) -> None:
        """The aggregate holds the reply's own arrays, whatever failures stand beside it."""
        reply = Message(update(MODEL, train_loss=1.0), reply_to=MESSAGE)
        found, _ = aggregate(FedAvg(), 1, [failure_reply(MESSAGE, FailureCode.CLIENT_LOST), reply])
        assert found is not None
        assert all(found[name].numpy() is values for name, values in MODEL.items())

    @pytest.mark.parametrize("kind", ["fedavgm", "fedadam", "subclass", "own metrics", "other weight", "two", "none"])
    def test_every_other_step_is_flowers(self, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """Strategies that do more than take the mean, subclasses, and rounds of several replies go to Flower."""
        asked = []
        honest = FedAvg.aggregate_train

        def counted(self: FedAvg, *args: Any) -> Any:
            asked.append(1)
            return honest(self, *args)

        monkeypatch.setattr(FedAvg, "aggregate_train", counted)

        class Own(FedAvg):
            pass

        strategies: dict[str, FedAvg] = {
            "fedavgm": FedAvgM(server_momentum=0.5),
            "fedadam": FedAdam(),
            "subclass": Own(),
            "own metrics": FedAvg(train_metrics_aggr_fn=lambda *_: None),  # type: ignore[arg-type, return-value]
            "other weight": FedAvg(weighted_by_key="train_loss"),
        }
        strategy = strategies.get(kind, FedAvg())
        floats = {"w": np.ones((2, 3), np.float32)}
        if isinstance(strategy, FedAvgM):
            strategy.current_arrays = to_record(floats)
        elif isinstance(strategy, FedAdam):
            strategy.current_arrays = floats
        reply = Message(update(floats, train_loss=1.0), reply_to=MESSAGE)
        aggregate(strategy, 1, [reply] * {"two": 2, "none": 0}.get(kind, 1))
        assert asked == [1]


class TestFinite:
    @pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
    @pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
    def test_one_value_is_enough(self, bad: float, dtype: type) -> None:
        """One value that is not finite is found wherever it stands."""
        for place in (0, 499, 999):
            values = np.ones(1000, dtype)
            values[place] = bad
            assert not all_finite({"a": np.zeros(3), "w": values.reshape(10, 100)})

    def test_the_largest_values_are_finite(self) -> None:
        """Extremes of a type, nothing at all, and what is no floating-point number pass."""
        largest = np.array([np.finfo(np.float32).max, -np.finfo(np.float32).max], np.float32)
        assert all_finite({"w": largest, "empty": np.zeros((0, 3)), "n": np.array([2**62]), "scalar": np.array(1.0)})
        assert all_finite({})


def test_a_reply_that_cannot_be_written_is_copied() -> None:
    """Strategies that compute in place get arrays of their own where a worker's reply is a view."""
    values = np.ones(3)
    values.setflags(write=False)
    reply = Message(update({"w": values}), reply_to=MESSAGE)
    make_writable(reply)
    arrays_of(reply.content)["w"][0] = 5
    assert values[0] == 1

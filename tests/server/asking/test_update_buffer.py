"""The mean of updates that began with different models."""

from __future__ import annotations

import numpy as np
import pytest

from server.asking.update_buffer import UpdateBuffer, staleness_factor

MODEL = {"w": np.array([[1.0, 2.0], [3.0, 4.0]], np.float32), "n": np.array([7]), "s": np.array(2.0, np.float64)}
OLD = {"w": np.zeros((2, 2), np.float32), "n": np.array([1]), "s": np.array(1.0)}


def plus(base: dict[str, np.ndarray], change: float) -> dict[str, np.ndarray]:
    return {name: (values + change).astype(values.dtype) for name, values in base.items()}


def test_staleness_of_none_counts_fully_and_more_never_counts_more() -> None:
    """The factor is 1 for a present model, and 1 / sqrt(1 + s) with the paper's exponent."""
    assert staleness_factor(0, exponent=0.5) == 1.0
    assert staleness_factor(3, exponent=0.5) == 0.5
    assert [staleness_factor(s, exponent=0) for s in range(5)] == [1.0] * 5
    factors = [staleness_factor(s, exponent=0.7) for s in range(30)]
    assert factors == sorted(factors, reverse=True)


def test_moves_the_model_by_the_mean_update_not_to_the_mean_of_replies() -> None:
    """Each reply counts by how far it is from the model that it began with."""
    buffer = UpdateBuffer(MODEL)
    buffer.add(plus(MODEL, 3.0), MODEL, weight=1.0, factor=1.0, metrics={})
    buffer.add(plus(OLD, 1.0), OLD, weight=1.0, factor=1.0, metrics={})
    moved = buffer.moved(MODEL)
    np.testing.assert_array_equal(moved["w"], MODEL["w"] + 2)
    assert (moved["n"], moved["s"]) == (9, 4.0)
    assert [values.dtype for values in moved.values()] == [values.dtype for values in MODEL.values()]
    assert list(moved) == list(MODEL)


def test_factors_are_not_in_the_divisor() -> None:
    """A buffer of stale updates makes a smaller step, as in the paper; weights are in the divisor."""
    buffer = UpdateBuffer(MODEL)
    buffer.add(plus(OLD, 4.0), OLD, weight=3.0, factor=0.5, metrics={"train_loss": 1.0})
    buffer.add(plus(OLD, 8.0), OLD, weight=1.0, factor=0.25, metrics={"train_loss": 5.0})
    np.testing.assert_array_equal(buffer.moved(MODEL)["w"], MODEL["w"] + (3 * 0.5 * 4 + 0.25 * 8) / 4)
    assert (buffer.count, buffer.weight, buffer.metrics()) == (2, 4.0, {"train_loss": 2.0})


def test_integers_are_rounded_to_the_nearest() -> None:
    """A batch counter that moved by 2.6 on average has moved by 3."""
    buffer = UpdateBuffer(MODEL)
    for change, weight in ((2.0, 2.0), (3.0, 3.0)):
        buffer.add(plus(OLD, change), OLD, weight=weight, factor=1.0, metrics={})
    assert buffer.moved(MODEL)["n"] == 10


def test_overflow_is_left_to_be_found() -> None:
    """A step beyond float32 is infinite, and warns of nothing."""
    large = {"w": np.full(2, 3e38, np.float32)}
    buffer = UpdateBuffer(large)
    buffer.add(large, {"w": -large["w"]}, weight=1.0, factor=1.0, metrics={})
    assert np.isinf(buffer.moved(large)["w"]).all()


@pytest.mark.parametrize("updates", [1, 4])
@pytest.mark.parametrize("blocks", [0, 1, 3])
def test_arrays_longer_than_a_block_are_summed_alike(blocks: int, updates: int) -> None:
    """Summing block by block is what a plain sum is."""
    generator = np.random.default_rng(blocks * 10 + updates)
    size = blocks * (1 << 16) + 5
    model = {"w": generator.normal(size=size).astype(np.float32)}
    buffer, expected, weights = UpdateBuffer(model), np.zeros(size), 0.0
    for i in range(updates):
        base, reply = (generator.normal(size=size).astype(np.float32) for _ in range(2))
        buffer.add({"w": reply}, {"w": base}, weight=i + 1.0, factor=0.5, metrics={})
        expected += (i + 1.0) * 0.5 * (reply.astype(np.float64) - base.astype(np.float64))
        weights += i + 1.0
    moved = buffer.moved(model)["w"]
    np.testing.assert_allclose(moved, (model["w"] + expected / weights).astype(np.float32), rtol=1e-6)


def test_metrics_of_nothing_are_none() -> None:
    buffer = UpdateBuffer(MODEL)
    buffer.add(MODEL, MODEL, weight=1.0, factor=1.0, metrics={})
    assert buffer.metrics() == {}
    assert buffer.moved(MODEL)["s"] == pytest.approx(2.0)

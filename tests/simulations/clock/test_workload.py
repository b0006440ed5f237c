"""What a round asks of a device."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn

from client.trainer import train_plain
from common.config import RunConfig
from common.config.load import parse_config
from common.schema import Examples
from simulations.clock import Workload, steps_that_fit
from simulations.clock.workload import examples_after
from tests.helpers.plans import example_plan


class Counting(nn.Module):
    """A linear model that counts what it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.seen = nn.Linear(1, 2), 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen += len(x)
        return self.linear(x)  # type: ignore[no-any-return]


def config(**tables: dict[str, object]) -> RunConfig:
    return RunConfig.model_validate(tables)


class TestStepsThatFit:
    """How far a device gets."""

    @settings(deadline=None)
    @given(
        st.floats(0, 1e6) | st.integers(1, 10**6).map(lambda n: math.nextafter(n, 0)),
        st.integers(1, 500),
        st.integers(1, 100),
    )
    @example(math.nextafter(3.0, 0), 3, 2)
    @example(math.nextafter(999_999.0, 0), 3, 7)
    def test_they_fit_and_one_more_does_not(self, examples: float, count: int, batch_size: int) -> None:
        """The most steps that do not process more than the device has time for."""
        steps = steps_that_fit(examples, count=count, batch_size=batch_size)
        assert examples_after(steps, count=count, batch_size=batch_size) <= examples
        assert examples_after(steps + 1, count=count, batch_size=batch_size) > examples

    @settings(deadline=None)
    @given(st.integers(0, 200), st.integers(1, 300), st.integers(1, 50))
    def test_exactly_enough_is_enough(self, steps: int, count: int, batch_size: int) -> None:
        """Time for so many steps is time for so many steps."""
        examples = examples_after(steps, count=count, batch_size=batch_size)
        assert steps_that_fit(float(examples), count=count, batch_size=batch_size) == steps

    def test_without_examples_there_are_no_steps(self):
        """However much time there is."""
        assert steps_that_fit(1e9, count=0, batch_size=10) == 0
        assert examples_after(5, count=0, batch_size=10) == 0


class TestExamples:
    """How many examples a client processes."""

    @pytest.mark.parametrize("count", [1, 7, 20, 33])
    @pytest.mark.parametrize("how", [{"local_epochs": 3}, {"local_steps": 1}, {"local_steps": 9}])
    def test_as_many_as_training_really_sees(self, count: int, how: dict[str, int]) -> None:
        """Whole epochs, or steps that go round as often as needed."""
        run = config(training={"batch_size": 8, **how})
        model = Counting()
        examples = Examples(inputs=torch.zeros(count, 1), targets=torch.zeros(count, dtype=torch.int64))
        train_plain(model, examples, run.training, learning_rate=0.1)
        work = Workload.of(run, model, None)
        assert work.examples(count) == model.seen
        most = max(1, work.steps(count) - 1)
        model.seen = 0
        train_plain(model, examples, run.training, learning_rate=0.1, most_steps=most)
        assert model.seen == examples_after(most, count=count, batch_size=8)

    def test_sampled_ones_count_as_expected(self):
        """Under example-level privacy a step holds the sampling rate's share of the client's examples, on average."""
        plan = example_plan(noise_multiplier=1.0, sampling_rate=0.2, local_steps=3, denominator=4, dimensions=4)
        work = Workload.of(config(), nn.Linear(1, 2), plan)
        assert work.examples(50) == pytest.approx(30)


class TestBytes:
    """What travels."""

    MODEL = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5))
    """40 floats (20 + 20) and a counter of 8 bytes."""

    def test_the_model_both_ways(self):
        """All arrays of the model, as they are."""
        work = Workload.of(config(), self.MODEL, None)
        assert work.download_bytes == work.upload_bytes == 40 * 4 + 8

    @pytest.mark.parametrize(
        ("compression", "size"),
        [
            ("bf16", 40 * 2 + 8),
            ("int8", 40 + 6 * 4 + 8),
            ("top-k", 8 * sum(math.ceil(n / 10) for n in (15, *[5] * 5)) + 8),
        ],
    )
    def test_an_update_as_it_is_compressed(self, compression: str, size: int) -> None:
        """The model comes down whole, and the update goes up as it is encoded."""
        work = Workload.of(config(transport={"compression": compression, "top_k_fraction": 0.1}), self.MODEL, None)
        assert (work.download_bytes, work.upload_bytes) == (40 * 4 + 8, size)

    def test_a_masked_update_takes_the_bits_of_its_ring(self):
        """Under secure aggregation each value has `secagg.bits`."""
        run = parse_config(
            '{"privacy": {"secure_aggregation": true}, "secagg": {"bits": 20}, "data": {"clients": 10},'
            ' "cohort": {"min_survivors": 4}}'
        )
        assert Workload.of(run, self.MODEL, None).upload_bytes == np.ceil(41 * 20 / 8)

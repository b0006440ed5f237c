"""Secure aggregation over real clients, on every way to reach them that needs no network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.config import RunConfig
from server.coordinator import Outcome
from simulations.run import execute
from tests.helpers.coordinating import StoppedError, Stopping
from tests.helpers.runs import STRATEGIES, Log, as_bytes, configuration, prepared, run


def masked(**changes: Any) -> RunConfig:
    privacy = {"secure_aggregation": True, **changes.pop("privacy", {})}
    return configuration(**{"data": {"clients": 5}, "privacy": privacy, **changes})


def plain(config: RunConfig) -> RunConfig:
    return config.model_copy(update={"privacy": config.privacy.model_copy(update={"secure_aggregation": False})})


def largest_difference(one: Outcome, other: Outcome) -> float:
    return max(float(np.abs(values - other.arrays[name]).max()) for name, values in one.arrays.items())


class TestOutcome:
    @pytest.mark.parametrize("name", ["fedavg", "fedprox", "fedavgm", "fedadam", "fedyogi", "fedadagrad"])
    def test_is_that_of_the_plain_run(self, name: str, tmp_path: Path) -> None:
        """Real training under every strategy of the mean ends where it ends without masks, but for the rounding."""
        config = masked(strategy={"name": name, "weighting": "equal", **STRATEGIES[name]})
        outcome, log = run(tmp_path / "masked", config)
        expected, _ = run(tmp_path / "plain", plain(config))
        assert log.failures == [{}] * 3
        assert largest_difference(outcome, expected) < (1e-5 if name in {"fedavg", "fedprox", "fedavgm"} else 2e-3)

    def test_weighs_clients_by_their_examples(self, tmp_path: Path) -> None:
        """Counts travel inside the masked vector, and the mean is the weighted one; so is the loss that is told."""
        config = masked(secagg={"most_weight": 1000}, evaluation={"every": 0})
        outcome, log = run(tmp_path / "masked", config)
        expected, plain_log = run(tmp_path / "plain", plain(config))
        assert largest_difference(outcome, expected) < 1e-3
        losses = [(a.train_loss, b.train_loss) for a, b in zip(log.records, plain_log.records, strict=True)]
        assert np.allclose(*zip(*losses, strict=True), atol=1e-3)

    @pytest.mark.parametrize("bits", [16, 20, 24])
    def test_small_rings_round_more(self, bits: int, tmp_path: Path) -> None:
        """Fewer bits a value travel, and the mean is less exact by what the ring says."""
        config = masked(strategy={"weighting": "equal"}, secagg={"bits": bits, "clipping_norm": 4.0}, rounds=1)
        outcome, _ = run(tmp_path / "masked", config)
        expected, _ = run(tmp_path / "plain", plain(config))
        assert largest_difference(outcome, expected) < 2 * 4.0 * 5 / 2 ** (bits - 1)


class TestTransports:
    def test_bytes_do_not_depend_on_the_way(self, tmp_path: Path) -> None:
        """In this process, over workers and sealed, the same run ends with the same bytes."""
        config = masked(rounds=2)
        results = []
        for i, options in enumerate(({}, {"workers": 2}, {"sealed": True})):
            log = Log()
            outcome = execute(prepared(tmp_path / str(i), config), observer=log, **options)  # type: ignore[arg-type]
            assert log.failures == [{}] * 2
            results.append(as_bytes(outcome.arrays))
        assert results[1] == results[0]
        assert results[2] == results[0]

    def test_resumes_to_the_same_bytes(self, tmp_path: Path) -> None:
        """A simulation that stops between two rounds and is resumed ends with the bytes of one that never stopped."""
        config = masked(rounds=4)
        expected, _ = run(tmp_path / "whole", config)
        with pytest.raises(StoppedError):
            run(tmp_path / "run", config, observer=Stopping("started", 3))
        outcome, _ = run(tmp_path / "run", config)
        assert as_bytes(outcome.arrays) == as_bytes(expected.arrays)


class TestWithPrivacy:
    def test_by_example(self, tmp_path: Path) -> None:
        """Example-level privacy goes on underneath: its noise is the client's, its ledger too."""
        privacy = {"unit": "example", "noise_multiplier": 1.0, "expected_batch_size": 4, "sampling_rate": 0.3}
        outcome, log = run(tmp_path, masked(training={"local_steps": 1}, privacy=privacy))
        assert log.failures == [{}] * 3
        assert outcome.rounds == 3

    def test_by_client(self, tmp_path: Path) -> None:
        """With client-level privacy each client adds its share of the noise, and the coordinator none."""
        privacy = {"unit": "client", "noise_multiplier": 1.0, "clipping_norm": 0.5}
        outcome, log = run(tmp_path, masked(privacy=privacy, secagg={"honest": 3}))
        assert log.failures == [{}] * 3
        assert all(np.isfinite(values).all() for values in outcome.arrays.values())
        assert all(record.clipping_norm is None for record in log.records)

"""Robust and private together: strategies that compare see the means of random groups, each a sum of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from common.config import RunConfig
from common.secagg.parameters import largest_group
from simulations.run import execute, prepare
from tests.helpers.runs import Log

LIARS, CLIENTS = 2, 21


def config(strategy: str, *, liars: int, group_size: int = 3, **changes: Any) -> RunConfig:
    """As `test_robustness`, with more clients, and nobody's update in sight."""
    return RunConfig.model_validate(
        {
            "name": "groups",
            "rounds": 12,
            "model": {"name": "linear"},
            "data": {"name": "digits", "partition": "iid", "clients": CLIENTS},
            "training": {"local_epochs": 2, "batch_size": 20, "learning_rate": 0.1, "device": "cpu"},
            "strategy": {"name": strategy, "trim_fraction": 0.3, "malicious_clients": LIARS, "weighting": "equal"},
            "evaluation": {"every": 0},
            "privacy": {"secure_aggregation": True},
            "secagg": {"group_size": group_size, **changes},
            "simulation": {"byzantine_clients": liars, "byzantine_scale": -10.0},
        }
    )


def accuracy(folder: Path, *words: Any, observer: Log | None = None, **changes: Any) -> float:
    evaluation = execute(prepare(config(*words, **changes), folder=folder), observer=observer).evaluation
    assert evaluation is not None
    return evaluation.accuracy


@pytest.fixture(scope="module")
def honest(tmp_path_factory: pytest.TempPathFactory) -> float:
    """The mean of sums when nobody lies."""
    return accuracy(tmp_path_factory.mktemp("honest"), "fedavg", liars=0)


def test_the_groups_are_as_large_as_may_be() -> None:
    """So that what follows shows what the tool promises, at its limit."""
    assert largest_group(CLIENTS, LIARS, strategy="krum") == 3


def test_honest_clients_learn(honest: float) -> None:
    """The figure that the others are held against."""
    assert honest >= 0.88


def test_two_liars_break_the_mean_of_sums(tmp_path: Path, honest: float) -> None:
    """Masks hide liars as well as anybody; clipping alone does not hold them."""
    assert accuracy(tmp_path, "fedavg", liars=LIARS) <= honest - 0.2


@pytest.mark.parametrize("strategy", ["krum", "multikrum", "fedmedian", "fedtrimmedavg"])
def test_strategies_over_group_means_hold(tmp_path: Path, honest: float, strategy: str) -> None:
    """Two liars spoil two of seven groups at most; the others outvote these, and no update was seen."""
    log = Log()
    assert accuracy(tmp_path, strategy, liars=LIARS, observer=log) >= honest - 0.06
    sums = [group for record in log.records if record.aggregation for group in record.aggregation.groups]
    assert len(sums) == 7 * 12
    assert {group.survivors for group in sums} == {3}


def test_groups_of_an_epoch_stay_and_of_another_differ(tmp_path: Path) -> None:
    """Members are drawn anew each epoch only, by all of them together."""
    log = Log()
    accuracy(tmp_path, "fedmedian", liars=0, observer=log, epoch_rounds=6)
    epochs = [record.aggregation.epoch for record in log.records if record.aggregation]
    assert epochs == [1] * 6 + [2] * 6

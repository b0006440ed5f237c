"""Two of ten clients send their update times -10: the plain mean breaks, robust strategies hold."""

from __future__ import annotations

from pathlib import Path

import pytest

from common.config import RunConfig
from simulations.run import execute, prepare

LIARS = 2


def accuracy(folder: Path, *, strategy: str = "fedavg", liars: int = LIARS) -> float:
    """Accuracy of the last model on 359 held-out digits; ten clients train, with 143 or 144 each.

    Every seed is fixed and there is no privacy noise: equal settings give equal runs.
    """
    config = RunConfig.model_validate(
        {
            "name": "robustness",
            "rounds": 20,
            "model": {"name": "linear"},
            "data": {"name": "digits", "partition": "iid", "clients": 10},
            "training": {"local_epochs": 1, "batch_size": 20, "learning_rate": 0.1, "device": "cpu"},
            "strategy": {"name": strategy, "trim_fraction": 0.2, "malicious_clients": LIARS},
            "evaluation": {"every": 0},
            "simulation": {"byzantine_clients": liars, "byzantine_scale": -10.0},
        }
    )
    evaluation = execute(prepare(config, folder=folder)).evaluation
    assert evaluation is not None
    return evaluation.accuracy


@pytest.fixture(scope="module")
def honest(tmp_path_factory: pytest.TempPathFactory) -> float:
    """FedAvg when nobody lies."""
    return accuracy(tmp_path_factory.mktemp("honest"), liars=0)


def test_honest_clients_learn_with_the_plain_mean(honest: float) -> None:
    """The figure that the others are held against is that of a working federation."""
    assert honest >= 0.9


def test_two_liars_break_the_plain_mean(tmp_path: Path, honest: float) -> None:
    """FedAvg has no defence: a fifth of the clients decides where the model goes."""
    assert accuracy(tmp_path) <= min(0.5, honest - 0.2)


@pytest.mark.parametrize("strategy", ["krum", "fedmedian", "fedtrimmedavg"])
def test_robust_strategies_hold_against_two_liars(tmp_path: Path, honest: float, strategy: str) -> None:
    """The model stays within 0.05 of the one that honest clients reach."""
    assert accuracy(tmp_path, strategy=strategy) >= honest - 0.05

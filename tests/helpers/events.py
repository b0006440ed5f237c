"""Privacy events for tests: sensible values, each of which can be changed."""

from __future__ import annotations

from typing import Any

from common.privacy.events import MatrixGaussian, NonPrivate, SampledGaussian

_COMMON: dict[str, Any] = {"unit": "example", "trust": "nobody", "clipping_norm": 1.0, "sensitivity": 1.0}


def sampled(
    server_round: int = 1, *, noise: float = 2.0, rate: float = 1.0, steps: int = 1, **fields: Any
) -> SampledGaussian:
    """Steps with noise `noise` over a sensitivity of 1, exactly drawn."""
    values = {"noise_stddev": noise, "count_noise_stddev": None, "sampling_rate": rate, "steps": steps, "distance": 0.0}
    return SampledGaussian(**_COMMON | values | {"run": "r", "server_round": server_round} | fields)


def matrix(*, noise: float = 2.0, **fields: Any) -> MatrixGaussian:
    """A whole run of ten rounds with noise `noise` over a sensitivity of 1."""
    values = {"noise_stddev": noise, "rounds": 10, "participations": 2, "min_separation": 5, "distance": 0.0}
    return MatrixGaussian(**_COMMON | values | {"run": "r", "server_round": 1} | fields)


def non_private(server_round: int = 1, run: str = "r") -> NonPrivate:
    """A release without noise."""
    return NonPrivate(run=run, server_round=server_round)

"""Privacy events for tests: sensible values, each of which can be changed."""

from __future__ import annotations

import math
from typing import Any

from common.privacy.events import DistributedNoise, MatrixGaussian, NonPrivate, SampledGaussian

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


def shared(server_round: int = 1, *, noise: float = 2.0, steps: int = 1, **fields: Any) -> DistributedNoise:
    """Sums with noise of two sites, `noise` over the sensitivity or a little more, on a grid of a thousandth."""
    l2_squared = fields.get("l2_squared", 1_000_000)
    dimensions = fields.get("dimensions", 64)
    values: dict[str, Any] = {
        "mechanism": "skellam",
        "clipping_norm": 1.0,
        "granularity": 1 / math.sqrt(l2_squared),
        "l2_squared": l2_squared,
        "l1": min(l2_squared, math.isqrt(dimensions * l2_squared)),
        "variance": math.ceil(noise**2 * l2_squared),
        "shares": 2,
        "colluding": 1,
        "dimensions": dimensions,
        "steps": steps,
        "distance": 0.0,
    }
    place = {"unit": "client", "trust": "cohort", "run": "r", "server_round": server_round}
    return DistributedNoise(**values | place | fields)


def non_private(server_round: int = 1, run: str = "r") -> NonPrivate:
    """A release without noise."""
    return NonPrivate(run=run, server_round=server_round)

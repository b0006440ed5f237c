"""Privacy loss distributions, by Google's dp-accounting: the tight figure that stands in reports beside the gate's."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any

from common.privacy.accounting.renyi import ORDERS, epsilon_at, renyi_divergence
from common.privacy.accounting.tally import Segment

Curve = Callable[[float], float]
"""From delta to epsilon."""

_GRID_POINTS = 10_000
_FINEST, _COARSEST = 1e-6, 10.0
_TYPICAL_DELTA = 1e-6
_FFT_ERROR = 1e-15
"""Absolute error of a probability for each step that is composed: double precision, with room."""


@lru_cache(maxsize=256)
def privacy_loss_curve(segments: tuple[Segment, ...], *, replace_one: bool) -> Curve:
    """Epsilon of a composition of Poisson-sampled Gaussians as a function of delta.

    Steps without sampling are composed exactly: they are one Gaussian. For replace-one, neighbours are q N(1) + (1-q)
    N(0) against q N(-1) + (1-q) N(0), and N(1) against N(-1) without sampling.

    Guarantee: Rounded up (`pessimistic_estimate`), to a grid of about a ten-thousandth of epsilon.

    Source:
        Meiser, Mohammadi 2018; Doroshenko et al. 2022 ("connect the dots"), as in dp-accounting 0.6.
    """
    grid = _grid(segments)
    unsampled = math.fsum(count / noise**2 for noise, rate, count in segments if rate == 1)
    composed = None
    if unsampled:
        composed = _gaussian(unsampled**-0.5 / (2 if replace_one else 1), 1.0, grid, replace_one=False)
    for noise, rate, count in segments:
        if rate < 1:
            one = _gaussian(noise, rate, grid, replace_one=replace_one).self_compose(count)
            composed = one if composed is None else composed.compose(one)
    error = _FFT_ERROR * sum(count for _, _, count in segments)

    def curve(delta: float) -> float:
        if composed is None or not delta > error:
            return math.inf
        return float(composed.get_epsilon_for_delta(delta - error))

    return curve


def _gaussian(noise_multiplier: float, rate: float, grid: float, *, replace_one: bool) -> Any:
    """One step's privacy loss distribution."""
    from dp_accounting import NeighboringRelation
    from dp_accounting.pld import privacy_loss_distribution

    logging.getLogger("absl").setLevel(logging.ERROR)
    relation = NeighboringRelation.REPLACE_ONE if replace_one else NeighboringRelation.ADD_OR_REMOVE_ONE
    return privacy_loss_distribution.from_gaussian_mechanism(
        noise_multiplier,
        pessimistic_estimate=True,
        value_discretization_interval=grid,
        sampling_prob=rate,
        neighboring_relation=relation,
    )


def _grid(segments: tuple[Segment, ...]) -> float:
    """Distance of privacy losses that are told apart: fine beside epsilon, so that memory stays bounded."""
    epsilon = min(
        epsilon_at(
            a, math.fsum(count * renyi_divergence(noise, rate, a) for noise, rate, count in segments), _TYPICAL_DELTA
        )
        for a in ORDERS
    )
    return min(max(epsilon / _GRID_POINTS, _FINEST), _COARSEST)

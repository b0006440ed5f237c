"""How much each example may move a step's sum: flat, per layer, or by a norm that follows a quantile.

A clipper turns squared gradient norms into factors. It sees upper bounds of the norms and computes in float64, so that
no factor is too large; a gradient that is not finite gets the factor zero, and so contributes nothing.
"""

from __future__ import annotations

import math
from typing import Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from common.privacy.noise import NoiseSource, noised

LARGEST_NORM, SMALLEST_NORM = 1e6, 1e-6
"""Where an adapting norm stops: far outside of what gradients have."""


class Clipper(Protocol):
    """Bounds contributions. One is made for each participation of a client."""

    @property
    def norm(self) -> float:
        """The present L2 bound on one example's contribution over all parameters."""

    def factors(self, squared_norms: Tensor) -> Tensor:
        """What each example's gradient is multiplied by.

        Args:
            squared_norms: float64[parameters, examples], upper bounds.

        Returns:
            float64[examples], or float64[parameters, examples] where parameters are bounded each by itself; in [0, 1].
        """

    def step_finished(self, source: NoiseSource) -> None:
        """A step's sum is about to be released: adapt, from what the noised count says."""


class FlatClipper:
    """One bound on the whole gradient (Abadi et al. 2016, algorithm 1).

    Guarantee: factor * norm <= `norm`, up to the rounding of float64.
    """

    def __init__(self, norm: float) -> None:
        self.norm = norm

    def factors(self, squared_norms: Tensor) -> Tensor:
        """float64[examples]; see `Clipper`."""
        return _bounded(squared_norms.sum(0), self.norm)

    def step_finished(self, source: NoiseSource) -> None:
        """Nothing adapts."""


class PerLayerClipper:
    """Each parameter's gradient bounded by norm / sqrt(parameters), so that the whole is bounded by `norm`.

    Source: McMahan et al. 2018 (arXiv 1710.06963), section 3.2, with equal shares.
    """

    def __init__(self, norm: float) -> None:
        self.norm = norm

    def factors(self, squared_norms: Tensor) -> Tensor:
        """float64[parameters, examples]; see `Clipper`. An example that is not finite anywhere counts nowhere."""
        factors = _bounded(squared_norms, self.norm / math.sqrt(max(1, len(squared_norms))))
        return torch.where(squared_norms.isfinite().all(0), factors, 0.0)

    def step_finished(self, source: NoiseSource) -> None:
        """Nothing adapts."""


class AdaptiveClipper:
    """A flat bound that follows a quantile of the norms.

    The count of examples within the bound is released with noise, as a sum of b - 1/2 with b in {0, 1}: its
    sensitivity is 1/2. It is divided by the public denominator, never by the size of the sample. Sum and count are one
    joint release, which the plan's noise accounts for.

    Source: Andrew, Thakkar, McMahan, Ramaswamy 2021 (arXiv 1905.03871), section 2. Departure: a step over a Poisson
    sample estimates the quantile as 1/2 + noised sum / denominator.
    """

    def __init__(
        self,
        norm: float,
        *,
        denominator: float,
        target_quantile: float,
        learning_rate: float,
        count_noise_stddev: float,
    ) -> None:
        self.norm = norm
        self._denominator = denominator
        self._target = target_quantile
        self._rate = learning_rate
        self._stddev = count_noise_stddev
        self._sum = 0.0

    def factors(self, squared_norms: Tensor) -> Tensor:
        """float64[examples]; see `Clipper`. What is not finite lies outside every bound."""
        squares = squared_norms.sum(0)
        within = (squares <= self.norm**2).sum().item()
        self._sum += within - 0.5 * len(squares)
        return _bounded(squares, self.norm)

    def step_finished(self, source: NoiseSource) -> None:
        """Move the norm towards the quantile; the step that ends used the old one throughout."""
        released = float(noised(np.array([self._sum]), noise_stddev=self._stddev, source=source)[0])
        self._sum = 0.0
        self.norm = adapted(
            self.norm,
            share_within=released / self._denominator + 0.5,
            target_quantile=self._target,
            learning_rate=self._rate,
        )


def adapted(norm: float, *, share_within: float, target_quantile: float, learning_rate: float) -> float:
    """The next clipping norm, from a noised share of contributions within the present one (Andrew et al., eq. 3)."""
    exponent = max(-1.0, min(1.0, learning_rate * (share_within - target_quantile)))  # a tiny cohort's noise is large
    return min(LARGEST_NORM, max(SMALLEST_NORM, norm * math.exp(-exponent)))


def make_clipper(
    kind: Literal["flat", "per-layer", "adaptive"],
    *,
    norm: float,
    denominator: float,
    target_quantile: float,
    learning_rate: float,
    count_noise_stddev: float | None,
) -> Clipper:
    """The clipper of a plan."""
    if kind == "adaptive":
        if count_noise_stddev is None:
            raise ValueError("adaptive clipping releases a count, which needs noise")
        return AdaptiveClipper(
            norm,
            denominator=denominator,
            target_quantile=target_quantile,
            learning_rate=learning_rate,
            count_noise_stddev=count_noise_stddev,
        )
    return FlatClipper(norm) if kind == "flat" else PerLayerClipper(norm)


def _bounded(squares: Tensor, norm: float) -> Tensor:
    """min(1, norm / sqrt(squares)), and 0 where squares are not finite; no square is ever negative."""
    factors = (norm / squares.clamp(min=norm * norm).sqrt()).clamp(max=1.0)
    return torch.where(squares.isfinite(), factors, 0.0)

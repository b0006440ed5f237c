"""From events to spent budget, and from a target back to the noise that keeps it.

Renyi accounting (Mironov 2017; Poisson-subsampled Gaussian: Mironov, Talwar, Zhang 2019) by Google's dp-accounting,
under the add/remove relation. Calibration and the gate before each round use the same accountant with the same
orders: noise calibrated by a tighter one would be stopped by the gate before its last round.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Iterable
from functools import lru_cache

import numpy as np

from common.errors import PrivacyError
from common.privacy.events import NonPrivate, PrivacyEvent

ORDERS = (*(float(a) for a in range(2, 65)), 80.0, 96.0, 128.0, 192.0, 256.0, 512.0, 1024.0)
"""Whole orders only: fractional ones need a series that does not always converge."""

_MAX_NOISE_MULTIPLIER = 1e6
_CALIBRATION_STEPS = 60

Segment = tuple[float, float, int]
"""Noise multiplier, sampling rate, number of steps."""


def spent_epsilon(events: Iterable[PrivacyEvent], *, delta: float) -> float:
    """Epsilon spent by all events together, at `delta`, add/remove relation.

    Guarantee: Never below the true epsilon of the composition, up to floating point. More events never lower it.
    Edge cases: no events give 0; a non-private event gives infinity.
    """
    steps: Counter[tuple[float, float]] = Counter()
    for event in events:
        if isinstance(event, NonPrivate):
            return math.inf
        steps[event.noise_multiplier, event.sampling_rate] += event.steps
    return _composed_epsilon(tuple(sorted((noise, rate, count) for (noise, rate), count in steps.items())), delta)


@lru_cache(maxsize=4096)
def _composed_epsilon(segments: tuple[Segment, ...], delta: float) -> float:
    if not segments:
        return 0.0
    for noise_multiplier, rate, _ in segments:
        if not (0 < noise_multiplier < math.inf and 0 < rate <= 1):  # dp-accounting takes NaN for a number
            raise PrivacyError(
                f"noise {noise_multiplier} at sampling rate {rate} cannot be counted", hint="both must be positive"
            )
    import dp_accounting
    from dp_accounting.rdp import RdpAccountant

    logging.getLogger("absl").setLevel(logging.ERROR)
    accountant = RdpAccountant(ORDERS)
    try:
        with np.errstate(divide="ignore", over="ignore", invalid="raise"):  # infinity is an answer, NaN is none
            for noise_multiplier, rate, count in segments:
                event = dp_accounting.PoissonSampledDpEvent(rate, dp_accounting.GaussianDpEvent(noise_multiplier))
                accountant.compose(event, count)
            epsilon = float(accountant.get_epsilon(delta))
    except ArithmeticError:  # the square of a value near the ends of float64
        epsilon = math.nan
    if math.isnan(epsilon):
        raise PrivacyError("the spent budget cannot be computed", hint="report the settings of this run as a bug")
    return epsilon


def calibrate_noise(*, target_epsilon: float, target_delta: float, sampling_rate: float, steps: int) -> float:
    """The smallest noise multiplier (to 1e-4 relative) with which `steps` steps cost at most `target_epsilon`.

    Guarantee: The returned value never overspends: `spent_epsilon` of it is at most the target.

    Raises:
        PrivacyError: No noise multiplier up to 1e6 reaches the target.
    """

    def cost(noise_multiplier: float) -> float:
        return _composed_epsilon(((noise_multiplier, sampling_rate, steps),), target_delta)

    low, high = 0.0, 1.0
    while cost(high) > target_epsilon:
        low, high = high, high * 2
        if high > _MAX_NOISE_MULTIPLIER:
            raise PrivacyError(
                f"no noise reaches epsilon {target_epsilon} at delta {target_delta}",
                hint="raise privacy.target_epsilon or privacy.target_delta, or lower rounds",
            )
    for _ in range(_CALIBRATION_STEPS):
        if high - low <= 1e-4 * high:
            break
        middle = (low + high) / 2
        low, high = (low, middle) if cost(middle) <= target_epsilon else (middle, high)
    return high

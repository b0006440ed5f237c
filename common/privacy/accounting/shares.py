"""Renyi divergence of a sum to which its clients added shares of noise."""

from __future__ import annotations

from functools import lru_cache

from common.privacy.accounting.renyi import incomputable
from common.privacy.accounting.tally import NoisedSum
from common.privacy.distributed.rdp import rdp_distributed_discrete_gaussian, rdp_skellam


@lru_cache(maxsize=65536)
def divergence_of_sum(noised: NoisedSum, order: int) -> float:
    """Renyi divergence, at a whole order, of one sum from a neighbouring one.

    Guarantee: Never below the true divergence, in either direction; also where more noise is in the sum.

    Raises:
        PrivacyError: The result is not a number, or no bound is known for so little noise.
    """
    values = {"l2_squared": noised.l2_squared, "l1": noised.l1, "variance": noised.variance}
    try:
        if noised.mechanism == "skellam":
            divergence = rdp_skellam(order, **values)
        else:
            divergence = rdp_distributed_discrete_gaussian(
                order, **values, shares=noised.shares, dimensions=noised.dimensions
            )
    except (ArithmeticError, ValueError) as e:
        raise incomputable() from e
    if not divergence > 0:  # no divergence is zero, and NaN compares as false
        raise incomputable()
    return divergence

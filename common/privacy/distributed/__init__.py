"""Noise that the clients of a sum add themselves, each its share, so that nobody has to be trusted with the sum.

`rotation` spreads an update evenly over its coordinates, `mechanism` chooses the grid and how much noise there is on
it, `sampler` draws that noise, `codec` does all of it to an update, and `rdp` says what a sum then tells.
"""

from common.privacy.distributed.codec import DistributedSum
from common.privacy.distributed.mechanism import Mechanism, mechanism_of
from common.privacy.distributed.rdp import rdp_distributed_discrete_gaussian, rdp_skellam

__all__ = ["DistributedSum", "Mechanism", "mechanism_of", "rdp_distributed_discrete_gaussian", "rdp_skellam"]

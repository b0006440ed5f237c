"""Grids wrapped around a transport's grid; each adds one thing and passes everything else through.

From the transport outwards: `sealed` lets nothing but ciphertext reach the transport; `decompressed` restores weights;
`checked` lets only sound replies pass; then `folding` turns them into their mean, `clipped_sum` into what a release
makes of their clipped sum, or `spooling` keeps them all for a strategy that looks at each. Under secure aggregation
`secagg` stands around the transport (sealed or not), and gives a mean for each group. Beside whole cohorts every
transport also takes single messages whose replies come later: `outstanding` says what that promises.
"""

from server.grids.base import WrappingGrid, stream_replies
from server.grids.checked import CheckedGrid
from server.grids.clipped_sum import ClippedSum, ClippedSumGrid, trainable_names
from server.grids.decompressed import DecompressingGrid
from server.grids.folding import FoldingGrid
from server.grids.mean_reply import mean_reply
from server.grids.sealed import SealedGrid
from server.grids.spooling import SpoolingGrid

__all__ = [
    "CheckedGrid",
    "ClippedSum",
    "ClippedSumGrid",
    "DecompressingGrid",
    "FoldingGrid",
    "SealedGrid",
    "SpoolingGrid",
    "WrappingGrid",
    "mean_reply",
    "stream_replies",
    "trainable_names",
]

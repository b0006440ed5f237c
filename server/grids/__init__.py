"""Grids wrapped around a transport's grid; each adds one thing and passes everything else through.

From the transport outwards: `checked` lets only sound replies pass; then `folding` turns them into their mean, or
`clipped_sum` into what a release makes of their clipped sum.
"""

from server.grids.base import WrappingGrid, stream_replies
from server.grids.checked import CheckedGrid
from server.grids.clipped_sum import ClippedSum, ClippedSumGrid, noised_reply, trainable_names
from server.grids.folding import FoldingGrid

__all__ = [
    "CheckedGrid",
    "ClippedSum",
    "ClippedSumGrid",
    "FoldingGrid",
    "WrappingGrid",
    "noised_reply",
    "stream_replies",
    "trainable_names",
]

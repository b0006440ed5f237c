"""Grids wrapped around a transport's grid; each adds one thing and passes everything else through.

From the transport outwards: `checked` lets only sound replies pass, `folding` turns them into their mean.
"""

from server.grids.base import WrappingGrid, stream_replies
from server.grids.checked import CheckedGrid
from server.grids.folding import FoldingGrid

__all__ = ["CheckedGrid", "FoldingGrid", "WrappingGrid", "stream_replies"]

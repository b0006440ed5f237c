"""Many clients trained as one computation: what one after the other would give, in a fraction of the time.

`Stack` trains the members of a chunk and returns weighted sums; `why_not` says which models and configurations it
leaves to training one by one; `chunk_size` says how many clients make a chunk. Pure torch, without messages or Flower;
`simulations.cohort` is what calls it.

Inside: `suitability` (what can be stacked), `batches` (which examples each step takes), `dense` (chains of dense layers
by hand), `mapped` (any other model, by `torch.func.vmap`), `updates` (optimizers over stacked parameters), `private`
(DP-SGD for chains of dense layers), `verdict` (which members' results are sound).
"""

from simulations.stacking.chunks import chunk_size
from simulations.stacking.stack import Folded, Member, Stack
from simulations.stacking.suitability import why_not

__all__ = ["Folded", "Member", "Stack", "chunk_size", "why_not"]

"""`nn.Embedding`: gradients that are zero but for the rows that an example names."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - torch's own name for it

from common.privacy.bookkeeping.call import Call
from common.privacy.bookkeeping.product import Adding
from common.privacy.bookkeeping.rounding import ROUND_UP, gamma, sizes_above, squares_above, widen


class EmbeddingCall(Call):
    """int64[n, ...] ids to [n, ..., width]."""

    layer: nn.Embedding

    @property
    def rows(self) -> int:
        """Examples."""
        return len(self.inputs) if self.inputs.dim() else 1

    def forward(self, inputs: Tensor) -> Tensor:
        """As in `nn.Embedding`; a table that scales or limits its vectors was refused."""
        return F.embedding(inputs, self.layer.weight.detach())

    def squared_norms(self) -> list[Tensor]:
        """Sum the gradients of equal ids of one example; square those sums."""
        n, size, width = self.rows, self.layer.num_embeddings, self.layer.embedding_dim
        ids = self.inputs.detach().reshape(n, -1).long()
        gradient = self.gradient.to(self.dtype).reshape(n, ids.shape[1], width)
        if self.layer.padding_idx is not None:  # the padding's vector is not trained
            gradient = gradient.masked_fill((ids == self.layer.padding_idx).unsqueeze(2), 0.0)
        names = ids + torch.arange(n, device=ids.device).unsqueeze(1) * size
        different, position = torch.unique(names, return_inverse=True)
        sums = gradient.new_zeros(len(different), width)
        sums.index_add_(0, position.flatten(), gradient.flatten(0, 1))
        self.example, self.id, self.sums = different // size, different % size, sums
        squares = squares_above(sums)
        total = squares.new_zeros(n).index_add_(0, self.example, squares).mul_(ROUND_UP)
        # each sum is off by gamma times its terms' norms: together at most gamma root t |G|_F
        t = ids.shape[1]
        return [widen(total, sizes_above(gradient).mul_(t**0.5 * gamma(t, self.dtype)))]

    def weighted_sums(self, factors: list[Tensor], *, how: Adding) -> list[Tensor]:
        """Add up the rows that were named."""
        factor = factors[0][self.example].unsqueeze(1)
        rows = self.sums.to(torch.float64, copy=True)
        if how == "masked":
            rows.masked_fill_(factor == 0, 0.0)
        rows.mul_(factor)
        total = rows.new_zeros(self.layer.num_embeddings, self.layer.embedding_dim)
        return [total.index_add_(0, self.id, rows)]

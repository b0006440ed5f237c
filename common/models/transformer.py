"""`transformer`: classifies a sequence of tokens, or predicts each next token.

Attention is made of `nn.Linear` and `scaled_dot_product_attention`. Torch's own encoder layer would have to be
exchanged for Opacus's, which with batch_first computes another function (Opacus 1.6.0).
"""

from __future__ import annotations

import math
from typing import Annotated

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

from common.errors import ModelError
from common.models.layers import MAX_DEPTH, MAX_WIDTH, Dropout, vocabulary
from common.models.options import Option
from common.schema import DataSchema


def sinusoidal_positions(length: int, width: int, *, like: Tensor) -> Tensor:
    """float32[length, width]: sines and cosines of wavelengths from 2 pi to 20,000 pi, on the device of `like`.

    Computed at every call. A registered buffer would be averaged, clipped and noised as if it had been learnt.

    **Source.** Vaswani et al., arXiv 1706.03762, section 3.5; all sines stand before all cosines, which only renames
    dimensions.
    """
    half = (width + 1) // 2
    wave = torch.exp(torch.arange(half, device=like.device) * (-math.log(10_000.0) / half))
    angles = torch.arange(length, device=like.device).unsqueeze(1) * wave
    return torch.cat([angles.sin(), angles.cos()], dim=1)[:, :width].to(like.dtype)


class Attention(nn.Module):
    """Multi-head self-attention over float32[n, length, width]; `causal`: no position sees a later one."""

    def __init__(self, width: int, heads: int, *, causal: bool, dropout: float) -> None:
        super().__init__()
        self.heads, self.causal, self.rate = heads, causal, dropout
        self.query_key_value = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Attend."""
        n, length, width = x.shape
        split = self.query_key_value(x).view(n, length, 3, self.heads, width // self.heads)
        query, key, value = split.permute(2, 0, 3, 1, 4)  # each [n, heads, length, width / heads]
        rate = self.rate if self.training else 0.0
        mixed = scaled_dot_product_attention(query, key, value, dropout_p=rate, is_causal=self.causal)
        joined: Tensor = self.out(mixed.transpose(1, 2).reshape(n, length, width))
        return joined


class Block(nn.Module):
    """Pre-norm block: attention, then feed-forward, each added to its input."""

    def __init__(self, width: int, heads: int, feed_forward: int, *, causal: bool, dropout: float) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width)
        self.attention = Attention(width, heads, causal=causal, dropout=dropout)
        self.feed_forward_norm = nn.LayerNorm(width)
        self.feed_forward = nn.Sequential(nn.Linear(width, feed_forward), nn.GELU(), nn.Linear(feed_forward, width))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """float32[n, length, width] to the same shape."""
        x = x + self.dropout(self.attention(self.attention_norm(x)))
        y: Tensor = x + self.dropout(self.feed_forward(self.feed_forward_norm(x)))
        return y


class TokenTransformer(nn.Module):
    """int64[n, length] token ids to float32[n, classes] (mean over positions), or per position and causal."""

    def __init__(
        self, schema: DataSchema, *, width: int, heads: int, layers: int, feed_forward: int, dropout: float, save: bool
    ) -> None:
        super().__init__()
        self.per_position, self.checkpointing = schema.per_position, save
        self.embedding = nn.Embedding(vocabulary(schema, model="transformer"), width)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(
            Block(width, heads, feed_forward, causal=schema.per_position, dropout=dropout) for _ in range(layers)
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, schema.num_classes)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits."""
        x = self.embedding(tokens)
        x = self.dropout(x + sinusoidal_positions(x.shape[1], x.shape[2], like=x))
        recompute = self._recomputes()
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if recompute else block(x)
        x = self.norm(x)
        logits: Tensor = self.head(x if self.per_position else x.mean(dim=1))
        return logits

    def _recomputes(self) -> bool:
        """Whether blocks forget their activations until the backward pass.

        Never under Opacus's hooks (they mark parameters with `grad_sample`): the hooks keep every layer's input anyway,
        and would count the second forward pass as a second use of the layer.
        """
        if not (self.checkpointing and self.training and torch.is_grad_enabled()):
            return False
        return not any(hasattr(p, "grad_sample") for p in self.parameters())


def build_transformer(
    schema: DataSchema,
    *,
    width: Annotated[int, Option(help="Size of a token's vector throughout.", low=2, high=MAX_WIDTH)] = 128,
    heads: Annotated[int, Option(help="Attention heads; must divide the width.", low=1, high=1024)] = 4,
    layers: Annotated[int, Option(help="Number of blocks.", low=1, high=MAX_DEPTH)] = 2,
    feed_forward: Annotated[
        int,
        Option(help="Units inside a block's feed-forward part; 0: four times the width.", low=0, high=4 * MAX_WIDTH),
    ] = 0,
    dropout: Dropout = 0.0,
    checkpointing: Annotated[
        bool, Option(help="Recompute blocks in the backward pass to save memory; no effect with example-level privacy.")
    ] = False,
) -> nn.Module:
    """Embedding, sinusoidal positions, pre-norm blocks, and a linear head."""
    if width % heads:
        raise ModelError(
            f"option `heads` of model `transformer` is {heads}, which does not divide the width {width}",
            hint=f"set model.options.heads = {math.gcd(width, heads)}, or another width",
        )
    return TokenTransformer(
        schema, width=width, heads=heads, layers=layers, feed_forward=feed_forward or 4 * width, dropout=dropout,
        save=checkpointing,
    )  # fmt: skip

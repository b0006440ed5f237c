"""`lstm`: classifies a sequence of tokens, or predicts each next token."""

from __future__ import annotations

from typing import Annotated

from torch import Tensor, nn

from common.errors import ModelError
from common.models.layers import MAX_WIDTH, vocabulary
from common.models.options import Option
from common.schema import DataSchema


class TokenLSTM(nn.Module):
    """int64[n, length] token ids to float32[n, classes], or float32[n, length, classes] where `per_position`.

    A sequence is classified from the mean of the output over all its positions, padding included: data declares no
    padding id, and the mean, unlike the last state, still holds what came before a long padding.
    """

    def __init__(
        self, schema: DataSchema, *, embedding: int, hidden: int, layers: int, dropout: float, both: bool
    ) -> None:
        super().__init__()
        self.per_position = schema.per_position
        self.embedding = nn.Embedding(vocabulary(schema, model="lstm"), embedding)
        self.lstm = nn.LSTM(embedding, hidden, num_layers=layers, batch_first=True, bidirectional=both)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(hidden * (2 if both else 1), schema.num_classes)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits."""
        outputs, _ = self.lstm(self.embedding(tokens))
        logits: Tensor = self.head(self.dropout(outputs if self.per_position else outputs.mean(dim=1)))
        return logits


def build_lstm(
    schema: DataSchema,
    *,
    embedding: Annotated[int, Option(help="Size of a token's vector.", low=1, high=MAX_WIDTH)] = 32,
    hidden: Annotated[int, Option(help="Size of the hidden state.", low=1, high=MAX_WIDTH)] = 128,
    layers: Annotated[int, Option(help="Stacked LSTM layers.", low=1, high=16)] = 1,
    dropout: Annotated[float, Option(help="Share of the last layer's output dropped.", low=0, high=0.99)] = 0.0,
    bidirectional: Annotated[bool, Option(help="Also read backwards; not for next-token data.")] = False,
) -> nn.Module:
    """Embedding, LSTM, dropout and a linear head."""
    if bidirectional and schema.per_position:
        raise ModelError(
            "a bidirectional `lstm` would read the tokens that it is to predict",
            hint="remove model.options.bidirectional",
        )
    return TokenLSTM(schema, embedding=embedding, hidden=hidden, layers=layers, dropout=dropout, both=bidirectional)

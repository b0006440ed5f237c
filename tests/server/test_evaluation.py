"""What the coordinator measures is what one would compute by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from common.schema import Examples
from server.evaluation import evaluate, majority_accuracy, probabilities


class Fixed(nn.Module):
    """Answers with its inputs as logits."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(1))
        self.dropout = nn.Dropout(0.5)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.dropout(inputs)


LOGITS = torch.tensor([[2.0, 1.0, 0.0], [0.0, 3.0, 0.0], [0.0, 0.0, 1.0], [5.0, 0.0, 0.0]])
TARGETS = torch.tensor([0, 1, 0, 2])


@pytest.mark.parametrize("batch_size", [1, 2, 3, 4, 100])
class TestEvaluate:
    def test_accuracy_and_loss(self, batch_size: int) -> None:
        """Accuracy is the share of right answers, loss the mean cross-entropy, whatever the batch size."""
        result = evaluate(Fixed(), Examples(inputs=LOGITS, targets=TARGETS), batch_size=batch_size)
        expected = -LOGITS.log_softmax(1)[torch.arange(4), TARGETS].mean()
        assert (result.accuracy, result.count) == (0.5, 4)
        assert result.loss == pytest.approx(float(expected), rel=1e-6)

    def test_next_token_targets_count_each_position(self, batch_size: int) -> None:
        """For running text every position is a prediction."""
        inputs, targets = LOGITS.reshape(2, 2, 3), TARGETS.reshape(2, 2)
        flat = evaluate(Fixed(), Examples(inputs=LOGITS, targets=TARGETS), batch_size=batch_size)
        result = evaluate(Fixed(), Examples(inputs=inputs, targets=targets), batch_size=batch_size)
        assert (result.accuracy, result.count) == (flat.accuracy, 4)
        assert result.loss == pytest.approx(flat.loss, rel=1e-6)

    def test_probabilities_sum_to_one(self, batch_size: int) -> None:
        """Every row is a distribution over classes, the likeliest class that of the highest logit."""
        table = probabilities(Fixed(), Examples(inputs=LOGITS, targets=TARGETS), batch_size=batch_size)
        assert table.shape == (4, 3)
        torch.testing.assert_close(table.sum(1), torch.ones(4))
        assert table.argmax(1).tolist() == [0, 1, 2, 0]


class TestEdges:
    def test_no_examples(self) -> None:
        """Nothing to judge gives count 0."""
        empty = Examples(inputs=LOGITS[:0], targets=TARGETS[:0])
        result = evaluate(Fixed(), empty, batch_size=8)
        assert (result.accuracy, result.loss, result.count) == (0.0, 0.0, 0)

    def test_leaves_gradients_alone(self) -> None:
        """Measuring builds no graph, and dropout is off."""
        model = Fixed()
        evaluate(model, Examples(inputs=LOGITS, targets=TARGETS), batch_size=2)
        assert model.unused.grad is None
        assert not probabilities(model, Examples(inputs=LOGITS, targets=TARGETS), batch_size=2).requires_grad

    def test_majority(self) -> None:
        """The baseline is the share of the most common class; 0 without examples."""
        assert majority_accuracy(TARGETS) == 0.5
        assert majority_accuracy(torch.tensor([[1, 1], [1, 0]])) == 0.75
        assert majority_accuracy(TARGETS[:0]) == 0.0

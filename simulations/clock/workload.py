"""What a round asks of a device: bytes to receive, examples to train on, bytes to send."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Self

from torch import nn

from common.config import RunConfig
from common.models.weights import ModelWeights
from common.privacy import PrivacyPlan
from common.secagg.packing import packed_bytes
from common.transport.compression import Compression


def steps_that_fit(examples: float, *, count: int, batch_size: int) -> int:
    """How many whole steps a device takes that can train on so many examples.

    Args:
        examples: As many as it has time for; not negative.
        count: How many it holds: each pass over them ends with a batch that may be smaller.
        batch_size: Examples in a step.

    Guarantee: `examples_after` so many steps is at most `examples`, and after one more step it is more.
    """
    if count == 0:
        return 0
    epochs = math.floor(examples / count)  # or one more, where rounding makes it whole: what is left then is negative
    return epochs * -(-count // batch_size) + math.floor((examples - epochs * count) / batch_size)


def examples_after(steps: int, *, count: int, batch_size: int) -> int:
    """How many examples so many steps process, going round as often as needed."""
    if count == 0:
        return 0
    epochs, rest = divmod(steps, -(-count // batch_size))
    return epochs * count + min(rest * batch_size, count)


@dataclass(frozen=True, kw_only=True, slots=True)
class Workload:
    """What every client of a run is asked for, but for the number of its examples.

    Attributes:
        download_bytes: The model.
        upload_bytes: An update as it is encoded. What surrounds either (envelopes, signatures, steps of secure
            aggregation) is not counted.
        batch_size: Examples in a step.
        local_steps: Steps of a round; 0 where it is `local_epochs` passes over the client's examples.
        local_epochs: As the run says.
        sampling_rate: Expected share of the client's examples in a step under example-level privacy; 0 elsewhere.
    """

    download_bytes: int
    upload_bytes: int
    batch_size: int
    local_steps: int
    local_epochs: int
    sampling_rate: float = 0.0

    @classmethod
    def of(cls, config: RunConfig, model: nn.Module, plan: PrivacyPlan | None) -> Self:
        """That of a run."""
        arrays, training = ModelWeights(model).shared(), config.training
        if config.privacy.secure_aggregation:
            upload = packed_bytes(sum(values.size for values in arrays.values()), config.secagg.bits)
        else:
            how = Compression.of(config.transport)
            upload = sum(how.encoded_bytes(values) for values in arrays.values())
        by_example = plan is not None and plan.unit == "example"
        return cls(
            download_bytes=sum(values.nbytes for values in arrays.values()),
            upload_bytes=upload,
            batch_size=training.batch_size,
            local_steps=plan.local_steps if plan is not None and by_example else training.local_steps,
            local_epochs=training.local_epochs,
            sampling_rate=plan.sampling_rate if plan is not None and by_example else 0.0,
        )

    def steps(self, count: int) -> int:
        """Steps of a client with so many examples."""
        return self.local_steps or self.local_epochs * -(-count // self.batch_size)

    def examples(self, count: int) -> float:
        """How many examples it processes in a round; on average, where they are sampled."""
        if self.sampling_rate:
            return self.local_steps * self.sampling_rate * count
        return float(examples_after(self.steps(count), count=count, batch_size=self.batch_size))

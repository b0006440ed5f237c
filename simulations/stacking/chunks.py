"""How many clients make a chunk, and how many of a chunk are computed at a time."""

from __future__ import annotations

import torch

_CHUNK_VALUES = 1 << 23
_SMALLEST, _LARGEST = 4, 512

_CACHE_VALUES = 1 << 22
"""Values of float32 that are computed at a time on a CPU: 16 MiB. Fewer take more calls, more leave every cache."""

_DEVICE_VALUES = 1 << 30
"""As many as a small accelerator has room for; a larger stack is halved until it fits."""


def chunk_size(parameters: int, examples: int) -> int:
    """Clients that are trained by one call of `Stack.train`, and counted out to workers together.

    Large enough that what a chunk costs by itself (a message, its sums) counts for little, small enough that several
    workers share a cohort evenly.

    Guarantee: Depends on nothing but the model and the data, so that results do not depend on machine or workers.

    Args:
        parameters: Trainable values of the model.
        examples: Training examples of a client of mean size.
    """
    work = max(1, parameters) * max(1, examples)
    return max(_SMALLEST, min(_LARGEST, 16 * _CHUNK_VALUES // work))


def block_size(values: int, device: torch.device) -> int:
    """Members that are computed at a time.

    Args:
        values: What one of them takes: parameters, inputs, activations.
        device: A cache is small and near, an accelerator wants large products.
    """
    room = _CACHE_VALUES if device.type == "cpu" else _DEVICE_VALUES
    return max(1, room // max(1, values))

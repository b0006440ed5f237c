"""Masks against their cipher alone and against the masks of Flower's legacy SecAgg+, in turn, on one core.

All figures are process CPU time; a ratio is the median of the ratios of repetitions.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from statistics import median
from time import process_time

import numpy as np
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from flwr.common.secure_aggregation.ndarrays_arithmetic import parameters_addition, parameters_mod
from flwr.common.secure_aggregation.secaggplus_utils import pseudo_rand_gen

from common.secagg.masks import MaskKey, apply_masks

CLIENTS = 100
MILLION = 1_000_000
_BLOCK, _TAG = 1 << 18, 16
_RING = 1 << 32


def figures(*, repeats: int, values: int = MILLION) -> dict[str, float]:
    """A client's masks with 99 others and its own, over a vector of `values` entries and over ten times as many."""
    keys = [MaskKey(os.urandom(32), 1 if i % 2 else -1) for i in range(CLIENTS)]
    short, long = np.zeros(values, np.uint32), np.zeros(10 * values, np.uint32)
    masked, streamed, large, theirs = [], [], [], []
    apply_masks(short, keys)
    for _ in range(repeats):
        streamed.append(seconds(lambda: stream(keys, 4 * values)))
        masked.append(seconds(lambda: apply_masks(short, keys)))
        large.append(seconds(lambda: apply_masks(long, keys)))
        theirs.append(seconds(lambda: flower_masks(keys[: CLIENTS // 10], values)) * 10)
    return {
        "mask_100x1m_seconds": median(masked),
        "mask_100x10m_seconds": median(large),
        "mask_gb_per_second": CLIENTS * 4 * values / 1e9 / median(masked),
        "mask_over_cipher": median(alone / ours for alone, ours in zip(streamed, masked, strict=True)),
        "flower_mask_100x1m_seconds": median(theirs),
    }


def seconds(work: Callable[[], object]) -> float:
    """CPU time of a piece of work."""
    begin = process_time()
    work()
    return process_time() - begin


def stream(keys: list[MaskKey], size: int) -> None:
    """As much ciphertext as the masks take, and nothing done with it: the cipher's own speed."""
    zeros, out = memoryview(bytes(_BLOCK)), memoryview(bytearray(_BLOCK + _TAG))
    ciphers = [AESGCM(key) for key, _ in keys]
    for number, start in enumerate(range(0, size, _BLOCK)):
        nonce, length = number.to_bytes(12, "big"), min(_BLOCK, size - start)
        for cipher in ciphers:
            cipher.encrypt_into(nonce, zeros[:length], None, out[: length + _TAG])


def flower_masks(keys: list[MaskKey], size: int) -> None:
    """The same with Flower's own functions, as its client calls them."""
    vector = [np.zeros(size, np.int64)]
    for key, _ in keys:
        vector = parameters_addition(vector, pseudo_rand_gen(key, _RING, [(size,)]))
    parameters_mod(vector, _RING)

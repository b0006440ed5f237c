"""How text becomes token ids, by public rules only: no vocabulary is ever learned from private text.

Id 0 is the unknown token, and the padding to the right of a short text.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable

import numpy as np

from common.data.collection import Integers

CHARACTERS = "\n" + "".join(chr(code) for code in range(0x20, 0x7F))
"""The fixed alphabet: line feed and printable ASCII, ids 1 to 96."""

CHARACTER_VOCABULARY = 1 + len(CHARACTERS)

HASHED_VOCABULARY = 8192
"""Ids of hashed words: 0 and 8,191 buckets. Small enough to train an embedding, large enough that few words meet."""

WORD = re.compile(r"[^\W_]+(?:['\u2019][^\W_]+)*|[^\w\s]")
"""A word with inner apostrophes, or one mark of punctuation."""

_UNKNOWN = 0
_IDS = np.zeros(128, np.int64)
_IDS[[ord(c) for c in CHARACTERS]] = np.arange(1, CHARACTER_VOCABULARY)

Encoder = Callable[[str], Integers]
"""Turns a text into int64[tokens]."""


def character_ids(text: str) -> Integers:
    """int64[len(text)]: one id a character, 0 for those outside `CHARACTERS`."""
    codes = np.frombuffer(text.encode("utf-32-le", "replace"), "<u4")
    return np.where(codes < 128, _IDS[np.minimum(codes, 127)], _UNKNOWN).astype(np.int64)


def hashed_word_ids(text: str) -> Integers:
    """int64[words]: each lower-cased word hashed into buckets 1..8191 (BLAKE2b, the same on every machine)."""
    return np.array([_bucket(word) for word in WORD.findall(text.lower())], dtype=np.int64)


def listed_word_ids(words: Iterable[str]) -> Encoder:
    """An encoder by a public list of words: ids from 1 in its order, 0 for any other word."""
    ids: dict[str, int] = {}
    for i, word in enumerate(words):
        ids.setdefault(word.lower(), i + 1)
    return lambda text: np.array([ids.get(word, _UNKNOWN) for word in WORD.findall(text.lower())], dtype=np.int64)


def padded(ids: Integers, length: int) -> Integers:
    """int64[length]: the first `length` tokens, filled up with 0."""
    row = np.zeros(length, np.int64)
    row[: min(len(ids), length)] = ids[:length]
    return row


def windows(ids: Integers, length: int) -> tuple[Integers, Integers]:
    """Inputs and targets (int64[k, length]) of next-token prediction: consecutive windows that do not overlap.

    Each token but the first is a target at most once. The rest that fills no window is left out; k can be 0.
    """
    count = max(len(ids) - 1, 0) // length
    inputs = ids[: count * length].reshape(count, length)
    targets = ids[1 : count * length + 1].reshape(count, length) if count else inputs
    return inputs, targets


def _bucket(word: str) -> int:
    """Bucket 1..8191 of a word."""
    digest = hashlib.blake2b(word.encode("utf-8", "replace"), digest_size=8).digest()
    return 1 + int.from_bytes(digest, "big") % (HASHED_VOCABULARY - 1)

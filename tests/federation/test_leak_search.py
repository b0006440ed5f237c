"""The search for weights in clear finds them wherever they are: without that the other tests would show nothing."""

from __future__ import annotations

import numpy as np
import pytest
from flwr.app import Array
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers.leaks import WINDOW, Plaintext

_WEIGHTS = np.random.default_rng(7).standard_normal((16, 8)).astype(np.float32)
_BYTES = _WEIGHTS.tobytes()
_SEARCH = Plaintext([np.zeros(64, np.float32), _WEIGHTS])


@given(before=st.binary(max_size=40), start=st.integers(0, len(_BYTES) - WINDOW), after=st.binary(max_size=40))
def test_any_64_bytes_in_a_row_are_found_at_any_place(before: bytes, start: int, after: bytes) -> None:
    """Wherever a stretch of the weights begins, and whatever is around it."""
    assert _SEARCH.found_in(before + _BYTES[start : start + WINDOW] + after)


def test_weights_that_flower_stores_in_clear_are_found() -> None:
    """The form in which Flower keeps an array that nobody sealed."""
    assert _SEARCH.found_in(Array(_WEIGHTS).data)


@given(data=st.binary(max_size=300))
def test_other_bytes_are_not_found(data: bytes) -> None:
    """Neither other bytes nor rows of zeros are taken for weights."""
    assert not _SEARCH.found_in(data + bytes(200))


def test_nothing_to_look_for_is_an_error() -> None:
    """A search that could not find anything must not pass for one that did not."""
    with pytest.raises(AssertionError, match="nothing to look for"):
        Plaintext([np.zeros(100)])

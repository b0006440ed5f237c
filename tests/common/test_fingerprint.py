"""The digest that names a model: equal for equal arrays, and for nothing else."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays_of

from common.fingerprint import model_digest

MODEL = {"weight": np.arange(6, dtype=np.float32).reshape(2, 3), "count": np.array(7, dtype=np.int64)}

CHANGES = {
    "value": {**MODEL, "count": np.array(8, dtype=np.int64)},
    "shape": {**MODEL, "weight": MODEL["weight"].reshape(3, 2)},
    "dtype": {**MODEL, "weight": MODEL["weight"].view(np.int32)},
    "name": {"weights": MODEL["weight"], "count": MODEL["count"]},
    "order": {"count": MODEL["count"], "weight": MODEL["weight"]},
    "one more": {**MODEL, "more": np.zeros(0, np.float32)},
    "one less": {"weight": MODEL["weight"]},
}


def test_it_names_what_the_arrays_hold_and_not_where_they_lie():
    """Memory order, byte order and read-only views are no part of a model."""
    again = {"weight": np.asfortranarray(MODEL["weight"]), "count": MODEL["count"].astype(">i8")}
    again["weight"].setflags(write=False)
    assert model_digest(again) == model_digest(MODEL)
    assert len(model_digest(MODEL)) == 32


@pytest.mark.parametrize("change", CHANGES)
def test_any_change_gives_another(change):
    """Of a value, a shape, a type, a name, or their order."""
    assert model_digest(CHANGES[change]) != model_digest(MODEL)


def test_zeros_of_two_signs_are_two_values():
    """Bytes count, not what compares as equal."""
    assert model_digest({"w": np.array([0.0])}) != model_digest({"w": np.array([-0.0])})


@settings(deadline=None)
@given(
    st.dictionaries(st.text(max_size=3), arrays_of.arrays(np.uint8, st.integers(0, 3)), max_size=3),
    st.dictionaries(st.text(max_size=3), arrays_of.arrays(np.uint8, st.integers(0, 3)), max_size=3),
)
def test_two_models_never_share_one(one, other):
    """However names and bytes could be cut."""
    same = list(one) == list(other) and all(
        one[name].shape == other[name].shape and one[name].tobytes() == other[name].tobytes() for name in one
    )
    assert (model_digest(one) == model_digest(other)) is same

"""Names in order, listed or only numbered."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.names import ListedNames, NumberedNames, SortedNames, sorted_names

texts = st.text("abc-019", min_size=1, max_size=4)
kinds = st.one_of(
    st.builds(ListedNames, st.lists(texts, unique=True, max_size=12)),
    st.builds(NumberedNames, st.integers(0, 1200)),
    st.builds(NumberedNames, st.integers(0, 30), word=st.sampled_from(["site", "a-b", "x-0"])),
)


class TestContract:
    """What all kinds of sorted names do: as a sorted tuple of them does."""

    @given(kinds, st.integers(-1300, 1300), st.slices(1200), texts)
    def test_they_are_what_a_sorted_tuple_is(self, names: SortedNames, place: int, part: slice, other: str) -> None:
        """Length, places, slices, membership, index and count."""
        plain = tuple(names)
        assert list(plain) == sorted(set(plain))
        assert len(names) == len(plain)
        assert tuple(names[part]) == plain[part]
        assert [names.index(name) for name in plain[:5]] == list(range(len(plain)))[:5]
        assert (other in names, names.count(other)) == (other in plain, plain.count(other))
        if -len(plain) <= place < len(plain):
            assert names[place] == plain[place]
            assert names.place(plain[place]) == place % len(plain)
        else:
            with pytest.raises(IndexError):
                names[place]

    @given(kinds)
    def test_what_is_no_name_has_no_place(self, names: SortedNames) -> None:
        """Neither other text nor what is no text."""
        for other in ("", "client-", "client-1", "client-0000", "client-²²²", "client-+01", "nobody", 3, None):
            if other not in tuple(names):
                assert names.place(other) is None
                assert other not in names
        with pytest.raises(ValueError, match="nobody"):
            names.index("nobody")


@pytest.mark.parametrize(
    ("count", "first", "last"),
    [(1, "client-000", "client-000"), (1000, "client-000", "client-999"), (1001, "client-0000", "client-1000")],
)
def test_numbers_are_as_wide_as_the_last_one(count: int, first: str, last: str) -> None:
    """So that they sort as their numbers do."""
    assert (NumberedNames(count)[0], NumberedNames(count)[-1]) == (first, last)


def test_ten_million_names_take_no_memory() -> None:
    """A name is made when somebody asks for it."""
    names = NumberedNames(10_000_000)
    assert (len(names), names[9_876_543], names.place("client-1234567")) == (10_000_000, "client-9876543", 1_234_567)


def test_names_that_are_sorted_already_stay_the_same_object() -> None:
    """Nobody sorts a million names twice."""
    names = NumberedNames(5)
    assert sorted_names(names) is names
    assert tuple(sorted_names(["b", "a"])) == ("a", "b")


def test_a_name_that_occurs_twice_is_refused() -> None:
    """Names are what clients are told apart by."""
    with pytest.raises(ValueError, match="twice"):
        sorted_names(["a", "b", "a"])

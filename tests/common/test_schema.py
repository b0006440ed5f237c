"""Examples, and that nothing done to them loses whose they are."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from common.schema import DataSchema, Examples, read_schema

OWNERS = torch.tensor([7, 7, 3, 0])


def examples(n: int = 4, entities: Tensor | None = None) -> Examples:
    return Examples(inputs=torch.arange(2.0 * n).view(n, 2), targets=torch.arange(n), entities=entities)


class TestParts:
    """Taking, slicing and moving."""

    def test_take_carries_entities(self) -> None:
        """Each example taken keeps its entity."""
        found = examples(entities=OWNERS).take(torch.tensor([3, 0]))
        assert (found.targets.tolist(), found.entities.tolist()) == ([3, 0], [0, 7])

    def test_part_carries_entities_and_copies_nothing(self) -> None:
        """A part shows the same memory; one that reaches beyond the end is shorter."""
        whole = examples(entities=OWNERS)
        found = whole.part(2, 9)
        assert (found.targets.tolist(), found.entities.tolist()) == ([2, 3], [3, 0])
        assert found.inputs.data_ptr() == whole.inputs[2:].data_ptr()

    def test_moving_carries_entities(self) -> None:
        """All three tensors go to the device; examples that are there already are the same object."""
        whole = examples(entities=OWNERS)
        assert whole.to(torch.device("cpu")) is whole
        moved = whole.to(torch.device("meta"))
        assert {t.device.type for t in (moved.inputs, moved.targets, moved.entities)} == {"meta"}

    @pytest.mark.parametrize("change", [lambda e: e.take(torch.tensor([1])), lambda e: e.part(0, 2)])
    def test_examples_that_stand_alone_go_on_doing_so(self, change) -> None:
        """Without entities nothing gains any."""
        assert change(examples()).entities is None


class TestJoined:
    """Several parts as one."""

    def test_equal_numbers_stay_one_entity(self) -> None:
        """Numbers are the same in all parts of a federation, so none is changed."""
        found = Examples.joined([examples(entities=OWNERS), examples(2, torch.tensor([3, 9]))])
        assert found.entities.tolist() == [7, 7, 3, 0, 3, 9]
        assert found.targets.tolist() == [0, 1, 2, 3, 0, 1]
        assert found.inputs[4].tolist() == [0, 1]

    def test_examples_that_stand_alone_become_entities_of_their_own(self) -> None:
        """They take numbers that nobody has."""
        found = Examples.joined([examples(2), examples(entities=OWNERS), examples(1)])
        assert found.entities.tolist() == [8, 9, 7, 7, 3, 0, 10]

    def test_nobody_has_entities(self) -> None:
        """Parts without entities make a whole without."""
        assert Examples.joined([examples(), examples(0)]).entities is None

    @pytest.mark.parametrize("nothing", [examples(0), examples(0, torch.empty(0, dtype=torch.int64))])
    def test_empty_parts_change_nothing(self, nothing: Examples) -> None:
        """Whether or not they have entities; nothing but empty parts is an empty part."""
        found = Examples.joined([nothing, examples(entities=OWNERS), nothing])
        assert torch.equal(found.entities, OWNERS)
        assert Examples.joined([nothing, nothing]).inputs.shape == (0, 2)


NAMES = st.lists(st.text(max_size=20), max_size=5).map(tuple)
SCHEMAS = st.builds(
    DataSchema,
    kind=st.sampled_from(["image", "tabular", "tokens"]),
    input_shape=st.lists(st.integers(1, 64), min_size=1, max_size=3).map(tuple),
    num_classes=st.integers(1, 1000),
    vocabulary_size=st.integers(0, 1000),
    per_position=st.booleans(),
    class_names=NAMES,
    feature_names=NAMES,
)


class TestTravelling:
    """What a site says of its data, to a coordinator that does not know it."""

    @given(SCHEMAS)
    def test_a_schema_comes_back_as_it_went(self, schema: DataSchema) -> None:
        """Equal schemas give equal text, and the text gives the schema."""
        assert read_schema(schema.to_text()) == schema

    @given(st.text() | st.recursive(st.none() | st.integers() | st.text(), st.lists).map(json.dumps))
    def test_no_text_does_more_than_be_refused(self, text: str) -> None:
        """A site may send anything."""
        with pytest.raises(ValueError):  # noqa: PT011 - any of them: the text is a site's own
            read_schema(text)

    @pytest.mark.parametrize(
        "change",
        [
            {"num_classes": 10**12},
            {"num_classes": 0},
            {"num_classes": True},
            {"num_classes": 2.0},
            {"vocabulary_size": 10**9},
            {"input_shape": []},
            {"input_shape": [4096, 4096, 4096]},
            {"input_shape": [1, 2, 3, 4]},
            {"input_shape": [-1]},
            {"kind": "python:evil.py"},
            {"per_position": 1},
            {"class_names": ["x" * 201]},
            {"class_names": "ab"},
            {"class_names": [1]},
            {"unknown": 1},
        ],
    )
    def test_what_would_cost_memory_or_means_nothing_is_refused(self, change: dict[str, object]) -> None:
        """The coordinator builds a model for what is said here."""
        sound = DataSchema(kind="tabular", input_shape=(3,), num_classes=2)
        with pytest.raises(ValueError, match="it"):
            read_schema(json.dumps({**json.loads(sound.to_text()), **change}))

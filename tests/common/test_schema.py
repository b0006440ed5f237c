"""Examples, and that nothing done to them loses whose they are."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from common.schema import Examples

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

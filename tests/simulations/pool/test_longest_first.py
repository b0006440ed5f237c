"""Messages are given to workers in the order of how long they will take, as far as anybody knows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import pytest
from flwr.app import ConfigRecord, Message, RecordDict

from common.config import DataSettings
from common.data import load_federation
from common.data.population import Population
from common.flower import ARRAYS, CONFIG, prepare_process, to_record
from common.schema import DataSchema, Federation
from common.site import Site
from server.grids.base import FIRST_NODE
from simulations.chunks import chunk_message
from simulations.inline import InlineGrid
from simulations.pool import longest_first as module
from simulations.pool.longest_first import LongestFirst, examples_of
from simulations.pool.pool import WorkerPool
from tests.helpers.pools import NAMES, counting_app, queries
from tests.simulations.pool.test_shared_data import examples, own

SIZES = [10, 40, 20, 40, 5]


def messages(count: int = len(SIZES), *, values: int = 1) -> list[Message]:
    prepare_process()
    arrays = to_record({"w": np.zeros(values, np.float32)})
    return [Message(RecordDict({ARRAYS: arrays}), FIRST_NODE + i, "train") for i in range(count)]


def chunks(*members: Sequence[int]) -> list[Message]:
    prepare_process()
    template = Message(
        RecordDict({ARRAYS: to_record({"w": np.zeros(1, np.float32)}), CONFIG: ConfigRecord()}), 2, "train"
    )
    return [chunk_message(template, [FIRST_NODE + i for i in part], largest=1.0) for part in members]


def order(longest: LongestFirst, asked: Sequence[Message], *, workers: int = 2) -> list[int]:
    """The places of clients, in the order in which they are given out."""
    return [message.metadata.dst_node_id - FIRST_NODE for message in longest.arrange(asked, workers=workers)]


def test_who_has_most_examples_comes_first() -> None:
    """Before anything was measured; ties in the order of the cohort."""
    assert order(LongestFirst(SIZES.__getitem__), messages()) == [1, 3, 2, 0, 4]


def test_where_nothing_is_known_the_order_stays() -> None:
    """Populations that make their clients one by one do not say how large they are."""
    assert order(LongestFirst(), messages()) == [0, 1, 2, 3, 4]


def test_who_took_longest_comes_first() -> None:
    """What was measured counts, not the examples."""
    longest, asked = LongestFirst(SIZES.__getitem__), messages()
    for message, seconds in zip(asked, [5.0, 1.0, 4.0, 2.0, 3.0], strict=True):
        longest.took(message, seconds)
    assert order(longest, asked) == [0, 2, 4, 3, 1]


def test_the_last_time_counts() -> None:
    """A client that has become quick is quick."""
    longest, asked = LongestFirst(SIZES.__getitem__), messages()
    for message in asked:
        longest.took(message, 2.0)
    longest.took(asked[0], 1.0)
    longest.took(asked[4], 3.0)
    assert order(longest, asked) == [4, 1, 2, 3, 0]


def test_a_client_that_was_never_measured_takes_what_its_examples_would_take_others() -> None:
    """0.1 seconds an example: 40 examples fall between 3 and 5 seconds."""
    longest, asked = LongestFirst(SIZES.__getitem__), messages()
    longest.took(asked[0], 3.0)
    longest.took(asked[2], 0.5)
    longest.took(asked[4], 0.0)
    assert order(longest, asked) == [1, 3, 0, 2, 4]


def test_of_unknown_size_it_takes_what_others_take() -> None:
    """The mean: between a quick one and a slow one."""
    longest, asked = LongestFirst(), messages(3)
    longest.took(asked[0], 1.0)
    longest.took(asked[2], 3.0)
    assert order(longest, asked) == [2, 1, 0]


def test_a_chunk_takes_what_its_members_take() -> None:
    """Its members share its seconds by their examples, whichever chunk they are in the next time."""
    longest = LongestFirst(SIZES.__getitem__)
    asked = chunks([0, 4], [1, 2], [3])
    assert order(longest, asked) == [1, 3, 0]
    longest.took(asked[0], 15.0)  # a second an example
    longest.took(asked[1], 0.6)
    longest.took(asked[2], 0.4)
    again = chunks([1, 3], [0], [2, 4])
    assert order(longest, again) == [0, 2, 1]


def test_one_worker_takes_clients_as_they_come() -> None:
    """Its round takes as long in any order, and no reply waits for its turn to be added."""
    assert order(LongestFirst(SIZES.__getitem__), messages(), workers=1) == [0, 1, 2, 3, 4]


def test_large_replies_do_not_pile_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """No more messages change places than have replies that fit in memory; at least four a worker do."""
    monkeypatch.setattr(module, "IN_MEMORY_BYTES", 10 * 4000)
    longest = LongestFirst(lambda partition: partition)
    assert order(longest, messages(25, values=1000)) == [*range(9, -1, -1), *range(19, 9, -1), *range(24, 19, -1)]
    monkeypatch.setattr(module, "IN_MEMORY_BYTES", 4000)
    assert order(longest, messages(18, values=1000)) == [*range(7, -1, -1), *range(15, 7, -1), 17, 16]


def test_memory_does_not_grow_with_the_population(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seconds of those who trained last are kept."""
    monkeypatch.setattr(module, "MOST_REMEMBERED", 3)
    longest, asked = LongestFirst(), messages()
    for place, message in enumerate([*asked, asked[2]]):
        longest.took(message, place)
    assert list(longest._seconds.items()) == [(3, 3.0), (4, 4.0), (2, 5.0)]


class TestExamples:
    def test_are_counted_without_making_a_client(self) -> None:
        """Of stored populations, and of a user's clients that are there."""
        federation = load_federation(DataSettings(name="digits", partition="size", clients=9), seed=1, site=Site())
        for known in (federation, own(examples(5), examples(0), examples(7))):
            size = examples_of(known)
            assert [size(i) for i in range(len(known.clients))] == [len(client.train) for client in known.clients]

    def test_are_not_known_of_clients_that_a_user_makes(self) -> None:
        """To ask would be to make them."""

        def make(index: int) -> object:
            raise AssertionError(index)

        schema = DataSchema(kind="tabular", input_shape=(3,), num_classes=2)
        lazy = Federation(schema=schema, clients=Population(["a"], make), test=examples(1))  # type: ignore[arg-type]
        assert examples_of(lazy)(0) == 0


@pytest.fixture
def pool() -> Iterator[WorkerPool]:
    made = WorkerPool(counting_app, 2, examples=[1, 2, 4, 3].__getitem__)
    yield made
    made.close()


def test_a_pool_gives_out_messages_longest_first(pool: WorkerPool, monkeypatch: pytest.MonkeyPatch) -> None:
    """By examples in the first round, by what workers report in those after it."""
    given: list[int] = []
    send = pool._send

    def watched(worker: object, message: Message) -> None:
        given.append(message.metadata.dst_node_id - FIRST_NODE)
        send(worker, message)  # type: ignore[arg-type]

    monkeypatch.setattr(pool, "_send", watched)
    grid = InlineGrid(pool, NAMES)
    grid.send_and_receive(queries(grid))
    assert given == [2, 3, 1, 0]
    assert pool._order._seconds.keys() == {0, 1, 2, 3}
    pool._order._seconds.update({0: 9.0, 1: 7.0, 2: 6.0, 3: 8.0})
    given.clear()
    grid.send_and_receive(queries(grid))
    assert given == [0, 3, 1, 2]

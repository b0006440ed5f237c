"""A grid on which time passes: whole rounds, cohorts that are trained as one, and clients that are asked one by one."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from flwr.app import Message, RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st

from common.config.simulated import DeviceSettings
from common.errors import FailureCode
from common.flower import arrays_of, failure_of, prepare_process
from server.grids.base import WrappingGrid
from server.grids.broadcast import CohortGrid, Fate
from server.grids.outstanding import OutstandingGrid
from server.job import ClockRecord
from simulations.clock import DrawnDevices, Timing, VirtualClock
from simulations.clock.presence import Recorded
from tests.simulations.clock.scenes import WORK, Clients, Folding, Scene, device, messages, timing

prepare_process()

LOST, LATE, FAILED = FailureCode.CLIENT_LOST, FailureCode.DEADLINE_EXCEEDED, FailureCode.CLIENT_FAILED
SHORT = Recorded(((0.0, 3.0),), period=1000.0)


def fates(replies: Sequence[Message | Fate]) -> dict[int, FailureCode | None]:
    """What became of each node."""
    told = {r.node_id: r.failure for r in replies if isinstance(r, Fate)}
    return told | {r.metadata.src_node_id: failure_of(r) for r in replies if isinstance(r, Message) and not told}


def random_devices(seed: int, **fields: Any) -> Timing:
    settings = DeviceSettings(**{
        "examples_per_second": 1, "speed_spread": 1, "dropout": 0.3, "availability": 0.6, "availability_seconds": 50,
    } | fields)  # fmt: skip
    return Timing(devices=DrawnDevices(settings=settings, seed=seed), workload=WORK, seed=seed, deadline_seconds=40)


class TestRounds:
    """`stream`: a cohort, and everybody's answer."""

    def test_a_round_takes_as_long_as_its_slowest_client(self):
        """The clock is at its end, and everybody's work counts."""
        scene = Scene(timing(device(1), device(2), device(10)), [10, 10, 10])
        assert fates(scene.round()) == {2: None, 3: None, 4: None}
        assert scene.clock.lap() == ClockRecord(at_seconds=10, work_seconds=16, wasted_seconds=0)

    def test_who_is_late_or_gone_is_never_asked(self):
        """They fail with the reason, and what they did until then is wasted."""
        rules = timing(device(10), device(1), device(2, presence=SHORT), deadline_seconds=5)
        scene = Scene(rules, [10, 10, 10])
        assert fates(scene.round()) == {2: None, 3: LATE, 4: LOST}
        assert scene.inner.asked == [[2]]
        assert scene.clock.lap() == ClockRecord(at_seconds=5, work_seconds=1 + 5 + 3, wasted_seconds=5 + 3)

    def test_where_nobody_answers_nobody_is_asked(self):
        """The round takes its time all the same."""
        scene = Scene(timing(device(1), deadline_seconds=5), [10])
        assert fates(scene.round()) == {2: LATE}
        assert scene.inner.asked == []
        assert scene.clock.now == 5

    def test_work_of_a_client_that_failed_is_wasted(self):
        """It was done, and came to nothing."""
        scene = Scene(timing(device(1), device(2)), [10, 10], inner=Clients(2, {3: FAILED}))
        assert fates(scene.round()) == {2: None, 3: FAILED}
        assert scene.clock.lap() == ClockRecord(at_seconds=10, work_seconds=15, wasted_seconds=5)

    def test_enough_answers_end_a_round(self):
        """Those who would come later are not asked."""
        scene = Scene(timing(device(1), device(2), device(5)), [10, 10, 10], enough=2)
        assert fates(scene.round()) == {2: LATE, 3: None, 4: None}
        assert scene.inner.asked == [[3, 4]]
        assert scene.clock.lap() == ClockRecord(at_seconds=5, work_seconds=12, wasted_seconds=5)

    def test_rounds_follow_each_other(self):
        """A client is asked at the moment that it is: one that was there in the first round may be away in the next."""
        scene = Scene(timing(device(10, presence=SHORT), device(1)), [10, 10])
        assert fates(scene.round()) == {2: None, 3: None}
        assert fates(scene.round(server_round=2)) == {2: LOST, 3: None}
        assert scene.clock.now == 20

    def test_a_deadline_is_virtual(self):
        """The grid inside is never given one."""
        scene = Scene(timing(device(1), deadline_seconds=50), [10])
        list(scene.grid.stream(messages(scene.nodes), timeout=50))
        assert scene.inner.timeouts == [None]

    def test_other_messages_take_no_time(self):
        """Queries, and steps of secure aggregation: also clients that are away answer."""
        scene = Scene(timing(device(1, presence=Recorded(((5.0, 6.0),), period=9.0))), [10])
        asked = [Message(RecordDict(), 2, "query.which")]
        assert fates(list(scene.grid.stream(asked, timeout=1))) == {2: None}
        assert scene.clock.lap() == ClockRecord(at_seconds=0, work_seconds=0, wasted_seconds=0)
        assert list(scene.grid.stream([])) == []

    def test_nodes_with_other_numbers_are_known_by_their_names(self):
        """As Flower's simulation runtime numbers them."""

        class Renumbered(Clients):
            def get_node_ids(self) -> list[int]:
                return [90, 70]

            def get_nodes(self) -> Any:
                nodes = list(super().get_nodes())
                for node, number in zip(nodes, (90, 70), strict=True):
                    node.node_id = number
                return nodes

        scene = Scene(timing(device(1), device(5)), [10, 10], inner=Renumbered(2))
        scene.round([70])
        assert scene.clock.now == 2

    @settings(deadline=None, max_examples=50)
    @given(st.permutations(range(2, 10)), st.integers(0, 50))
    def test_the_order_of_a_cohort_decides_nothing(self, order: list[int], seed: int) -> None:
        """Fates, time, work and waste are the same."""
        found = []
        for nodes in (order, sorted(order)):
            scene = Scene(random_devices(seed), range(1, 9))
            told = fates(scene.round(nodes))
            record = scene.clock.lap()
            found.append((told, record))
        assert found[0] == found[1]

    @settings(deadline=None, max_examples=50)
    @given(st.integers(0, 1000), st.lists(st.sets(st.integers(2, 9)), max_size=6), st.integers(1, 8) | st.none())
    def test_time_never_goes_back_and_waste_is_never_more_than_work(
        self, seed: int, cohorts: list[set[int]], enough: int | None
    ) -> None:
        """Whoever is asked, however many are enough."""
        scene, before = Scene(random_devices(seed), range(1, 9), enough=enough), 0.0
        for number, cohort in enumerate(cohorts, 1):
            if cohort:
                scene.round(sorted(cohort), server_round=number)
            record = scene.clock.lap()
            assert record.at_seconds >= before
            assert 0 <= record.wasted_seconds <= record.work_seconds + 1e-9
            assert record.work_seconds <= len(cohort) * (record.at_seconds - before) + 1e-6
            before = record.at_seconds

    @settings(deadline=None, max_examples=50)
    @given(st.integers(0, 200), st.integers(0, 4))
    def test_a_run_that_was_left_goes_on_as_if_it_had_not_been(self, seed: int, stop: int) -> None:
        """The clock's state, through JSON, is all that another process needs."""

        def rounds(scene: Scene, numbers: range) -> list[Any]:
            return [(fates(scene.round(server_round=n)), scene.clock.lap()) for n in numbers]

        whole = rounds(Scene(random_devices(seed), range(1, 9)), range(1, 6))
        first, second = (Scene(random_devices(seed), range(1, 9)) for _ in range(2))
        begun = rounds(first, range(1, stop + 1))
        second.clock.restore(json.loads(json.dumps(first.clock.state())))
        assert begun + rounds(second, range(stop + 1, 6)) == whole


class TestCohorts:
    """`fold`: a cohort that is trained as a whole."""

    def fold(self, scene: Scene) -> list[Fate | Message] | None:
        told = scene.grid.fold(messages(scene.nodes), largest=7.0, timeout=9.0)
        return None if told is None else list(told)

    def test_only_those_who_answer_are_trained(self):
        """Everybody's fate is told, and the mean is that of the others."""
        rules = timing(device(10), device(1), device(5), device(2, presence=SHORT), deadline_seconds=5)
        scene = Scene(rules, [10] * 4, inner=Folding(4))
        told = self.fold(scene)
        assert told is not None
        *rest, reply = told
        assert fates(rest) == {2: None, 3: LATE, 4: None, 5: LOST}
        assert isinstance(reply, Message)
        assert arrays_of(reply.content)["w"].tolist() == [3, 3]
        assert reply.content["metrics"]["largest"] == 7
        assert (scene.inner.asked, scene.inner.timeouts) == ([[2, 4]], [None])
        assert scene.clock.lap() == ClockRecord(at_seconds=5, work_seconds=11, wasted_seconds=8)

    @settings(deadline=None, max_examples=50)
    @given(st.integers(0, 300), st.integers(1, 8) | st.none(), st.sets(st.integers(2, 9)))
    def test_time_passes_as_if_they_were_asked_one_by_one(
        self, seed: int, enough: int | None, failing: set[int]
    ) -> None:
        """So that it does not depend on how clients are trained."""
        inner = [kind(8, dict.fromkeys(failing, FAILED)) for kind in (Folding, Clients)]
        one, other = (Scene(random_devices(seed), range(1, 9), inner=grid, enough=enough) for grid in inner)
        told = self.fold(one)
        assert told is not None
        assert fates([t for t in told if isinstance(t, Fate)]) == fates(other.round())
        assert one.clock.lap() == other.clock.lap()

    def test_where_nobody_answers_nobody_is_trained(self):
        """And there is no mean."""
        scene = Scene(timing(device(1), deadline_seconds=5), [10], inner=Folding(1))
        assert self.fold(scene) == [Fate(node_id=2, failure=LATE)]
        assert scene.inner.asked == []
        assert scene.clock.now == 5

    def test_where_the_grid_inside_declines_nothing_has_happened(self):
        """The same cohort can then be asked one by one."""
        scene = Scene(timing(device(1), device(2)), [10, 10], inner=Folding(2))
        scene.inner.declines = True  # type: ignore[attr-defined]
        before = scene.clock.state()
        assert self.fold(scene) is None
        assert scene.clock.state() == before
        assert scene.clock.lap().work_seconds == 0

    def test_where_the_grid_inside_cannot_it_is_declined(self):
        """A sealed grid, for example."""
        scene = Scene(timing(device(1)), [10])
        assert self.fold(scene) is None
        assert isinstance(scene.grid, CohortGrid)


class TestOneByOne:
    """`push_messages` and `pull_messages`: asynchronous rounds."""

    def pull(self, scene: Scene, ids: Sequence[str], *, needed: int = 1) -> tuple[int, FailureCode | None, float]:
        (reply,) = scene.grid.pull_messages(ids, needed=needed)
        assert reply.metadata.reply_to_message_id in ids
        return reply.metadata.src_node_id, failure_of(reply), scene.clock.now

    def test_replies_come_in_the_order_of_their_arrival(self):
        """Each pull moves the clock to the next one; failures arrive too, when they happen."""
        rules = timing(device(1), device(5), device(2), device(2, presence=SHORT), deadline_seconds=8)
        scene = Scene(rules, [10] * 4)
        ids = scene.grid.push_messages(messages(scene.nodes))
        assert scene.clock.now == 0
        assert [self.pull(scene, ids) for _ in ids] == [(3, None, 2), (5, LOST, 3), (4, None, 5), (2, LATE, 8)]
        assert scene.grid.pull_messages(ids, needed=1) == []
        assert scene.clock.lap() == ClockRecord(at_seconds=8, work_seconds=18, wasted_seconds=11)
        assert scene.clock.launches == {}

    def test_of_the_same_moment_who_was_asked_first_comes_first(self):
        """Whatever the numbers of the nodes."""
        scene = Scene(timing(*[device(1)] * 4), [10] * 4)
        ids = scene.grid.push_messages(messages([4, 2, 5, 3]))
        assert [self.pull(scene, ids)[0] for _ in ids] == [4, 2, 5, 3]
        assert scene.clock.now == 10

    def test_a_client_begins_when_it_is_asked(self):
        """Later ones arrive later, and may overtake."""
        scene = Scene(timing(device(1), device(5), device(10)), [10] * 3)
        ids = scene.grid.push_messages(messages([2, 3]))
        assert self.pull(scene, ids) == (3, None, 2)
        ids += scene.grid.push_messages(messages([4], server_round=2))
        assert [self.pull(scene, ids) for _ in range(2)] == [(4, None, 3), (2, None, 10)]

    def test_only_those_are_waited_for_that_are_asked_for(self):
        """What has arrived before comes at once then, and the clock stays."""
        scene = Scene(timing(device(1), device(5)), [10, 10])
        first, second = scene.grid.push_messages(messages([2, 3]))
        assert self.pull(scene, [first]) == (2, None, 10)
        assert self.pull(scene, [second]) == (3, None, 10)
        assert scene.clock.lap().work_seconds == 12

    def test_without_a_number_all_come(self):
        """In the order of arrival, as Flower's own loop asks."""
        scene = Scene(timing(device(1), device(5), device(2)), [10] * 3)
        ids = scene.grid.push_messages(messages(scene.nodes))
        assert [reply.metadata.src_node_id for reply in scene.grid.pull_messages(ids)] == [3, 4, 2]
        assert scene.clock.now == 10

    def test_so_many_as_are_needed_are_computed_side_by_side_and_never_more(self):
        """The next to arrive; failures among them count, and are not computed."""
        rules = timing(device(1), device(5), device(2), device(2, presence=SHORT), device(0.5))
        scene = Scene(rules, [10] * 5)
        ids = scene.grid.push_messages(messages(scene.nodes))
        assert scene.inner.asked == []
        self.pull(scene, ids, needed=3)
        assert scene.inner.asked == [[3, 4]]
        self.pull(scene, ids, needed=2)
        self.pull(scene, ids, needed=1)
        assert scene.inner.asked == [[3, 4]]
        self.pull(scene, ids, needed=1)
        assert scene.inner.asked == [[3, 4], [2]]

    def test_who_is_waited_for_no_more_worked_in_vain(self):
        """Until now, or until it had arrived; it is never answered."""
        scene = Scene(timing(device(1), device(5)), [10, 10])
        first, second = scene.grid.push_messages(messages([2, 3]))
        scene.clock.advance(4)
        scene.grid.cancel_messages([first, second])
        assert scene.clock.lap() == ClockRecord(at_seconds=4, work_seconds=4 + 2, wasted_seconds=6)
        assert scene.grid.pull_messages([first, second], needed=1) == []
        assert scene.clock.launches == {}
        scene.grid.cancel_messages([first])

    def test_what_was_computed_for_a_cancelled_one_is_dropped(self):
        """And the others' replies still come."""
        scene = Scene(timing(device(5), device(2), device(1)), [10] * 3)
        ids = scene.grid.push_messages(messages(scene.nodes))
        assert self.pull(scene, ids, needed=3) == (2, None, 2)
        scene.grid.cancel_messages([ids[1]])
        assert self.pull(scene, ids, needed=1) == (4, None, 10)
        assert scene.inner.asked == [[2, 3, 4]]

    def test_replies_are_of_the_nodes_that_were_asked(self):
        """Each has its own content, whatever was computed together."""
        scene = Scene(timing(device(1), device(2), device(5)), [10] * 3)
        ids = scene.grid.push_messages(messages(scene.nodes))
        replies = [scene.grid.pull_messages(ids, needed=3)[0] for _ in ids]
        assert [arrays_of(r.content)["w"][0] for r in replies] == [4, 3, 2]
        assert [r.metadata.reply_to_message_id for r in replies] == ids[::-1]

    def test_other_messages_pass(self):
        """They take no time."""
        scene = Scene(timing(device(1)), [10])
        ids = scene.grid.push_messages([Message(RecordDict(), 2, "query.which")])
        assert [r.metadata.src_node_id for r in scene.grid.pull_messages(ids)] == [2]
        assert scene.clock.now == 0

    def test_it_is_what_others_expect(self):
        """The protocol of grids with outstanding messages."""
        scene = Scene(timing(device(1)), [10])
        assert isinstance(scene.grid, OutstandingGrid)
        assert isinstance(scene.grid, WrappingGrid)

    @settings(deadline=None, max_examples=50)
    @given(st.integers(0, 300), st.integers(1, 4), st.integers(0, 12))
    def test_a_run_that_was_left_goes_on_as_if_it_had_not_been(self, seed: int, buffer: int, stop: int) -> None:
        """Who was at work is asked again and arrives when it would have, whatever was computed before."""

        def steps(scene: Scene, ids: dict[str, tuple[int, int]], numbers: range, told: list[Any]) -> None:
            for number in numbers:
                idle = [node for node in scene.nodes if node not in {node for node, _ in ids.values()}]
                pushed = scene.grid.push_messages(messages(idle, server_round=number)) if idle else []
                ids |= {message_id: (node, number) for message_id, node in zip(pushed, idle, strict=True)}
                for left in range(buffer, 0, -1):
                    (reply,) = scene.grid.pull_messages(ids, needed=left)
                    node, asked = ids.pop(reply.metadata.reply_to_message_id)
                    told.append((number, node, asked, failure_of(reply), scene.clock.now))
                told.append(scene.clock.lap())

        rules = random_devices(seed)
        whole: list[Any] = []
        steps(Scene(rules, range(1, 9)), {}, range(1, 13), whole)
        told: list[Any] = []
        first, second = Scene(rules, range(1, 9)), Scene(rules, range(1, 9))
        ids: dict[str, tuple[int, int]] = {}
        steps(first, ids, range(1, stop + 1), told)
        second.clock.restore(json.loads(json.dumps(first.clock.state())))
        again = {
            second.grid.push_messages(messages([node], server_round=asked))[0]: (node, asked)
            for node, asked in ids.values()
        }
        steps(second, again, range(stop + 1, 13), told)
        assert told == whole
        moments = [entry[-1] for entry in whole if isinstance(entry, tuple)]
        assert moments == sorted(moments)

    @settings(deadline=None, max_examples=50)
    @given(st.integers(0, 300), st.integers(1, 9))
    def test_how_much_is_computed_together_decides_nothing(self, seed: int, needed: int) -> None:
        """Arrivals are the same."""
        found = []
        for together in (1, needed):
            scene = Scene(random_devices(seed), range(1, 9))
            ids = scene.grid.push_messages(messages(scene.nodes))
            found.append(([self.pull(scene, ids, needed=together) for _ in ids], scene.clock.lap()))
        assert found[0] == found[1]


def test_a_clock_can_be_shared_by_grids_one_after_the_other():
    """A grid keeps no time of its own."""
    clock = VirtualClock()
    for _ in range(2):
        scene = Scene(timing(device(1)), [10])
        scene.grid._clock = clock
        scene.round()
    assert clock.now == 20

"""Asynchronous rounds: who is at work, what a step is made of, and what is left of it after a crash."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from flwr.app import Message, RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import ConfigError, FailureCode, RunError
from common.flower import ARRAYS, answering, arrays_of, update_reply
from common.transport.compression import Compression, encode_update, update_of
from server.job import Observer
from tests.helpers.asynchronous import (
    START,
    Arrays,
    Arriving,
    Steps,
    as_bytes,
    asynchronous,
    contracting,
    equally,
    fedbuff,
    names_of,
)

SLOW = "c0"


def last(waiting: list[tuple[str, int]]) -> int:
    return len(waiting) - 1


def slow(waiting: list[tuple[str, int]]) -> int:
    """The oldest, but `SLOW` only when nobody else is there."""
    return next((i for i, (name, _) in enumerate(waiting) if name != SLOW), 0)


def steps(count: int = 6, *, size: int = 4, grid: dict[str, Any] | None = None, **changes: Any) -> tuple[Steps, Any]:
    """A run of `count` clients over a grid of one's own."""
    arriving = Arriving(names_of(count), **(grid or {}))
    return Steps(asynchronous(size=size, **changes), arriving), arriving


class TestStep:
    @pytest.mark.parametrize(("weighting", "exponent"), [("examples", 0.5), ("equal", 0.5), ("equal", 0.0)])
    @pytest.mark.parametrize("first", [lambda waiting: 0, last, slow])
    def test_is_that_of_the_papers_algorithm(
        self, weighting: str, exponent: float, first: Callable[[list[tuple[str, int]]], int]
    ) -> None:
        """Twelve steps end where plain numpy after the paper's pseudo-code ends, whoever answers first."""
        run, grid = steps(
            grid={"first": first, "client": contracting if weighting == "examples" else equally},
            strategy={"weighting": weighting},
            asynchronous={"buffer_size": 3, "staleness_exponent": exponent, "max_staleness": 100},
        )
        models = []
        for _ in range(12):
            run.step()
            models.append({name: values.copy() for name, values in run.model.items()})
        expected = fedbuff(
            START, grid.asked, grid.arrived, buffer_size=3, exponent=exponent, by_examples=weighting == "examples"
        )
        assert len(expected) == 12
        for model, wanted in zip(models, expected, strict=True):
            np.testing.assert_allclose(model["w"], wanted["w"], rtol=1e-6)
            assert model["count"] == wanted["count"]

    def test_does_not_wait_for_who_is_slow(self) -> None:
        """Others make six steps while one client is at work; then its update counts, as stale as it is."""
        run, grid = steps(grid={"first": slow})
        for _ in range(6):
            assert SLOW not in run.step().staleness
        grid.first = lambda waiting: next((i for i, (name, _) in enumerate(waiting) if name == SLOW), 0)
        began = next(server_round for name, server_round in grid.asked if name == SLOW)
        answers = run.step()
        assert answers.staleness[SLOW] == 7 - began > 0
        assert all(age <= 7 for age in answers.staleness.values())

    def test_of_present_updates_alone_is_plain_averaging(self) -> None:
        """Where everybody is waited for, the model becomes the weighted mean of the replies."""
        run, _ = steps(4, size=0, asynchronous={"buffer_size": 4})
        replies = [contracting(name, START, 1) for name in names_of(4)]
        weights = [metrics["num-examples"] for _, metrics in replies]
        answers = run.step()
        mean = np.average([arrays["w"] for arrays, _ in replies], axis=0, weights=weights)
        np.testing.assert_allclose(run.model["w"], mean, rtol=1e-6)
        assert answers.staleness == dict.fromkeys(names_of(4), 0)
        assert run.metrics[0]["train_loss"] == pytest.approx(np.average([0.1, 0.2, 0.3, 0.4], weights=weights))
        assert run.metrics[0]["num-examples"] == sum(weights)

    def test_ends_when_nobody_is_at_work(self) -> None:
        """Fewer updates than the buffer holds make a step, where min_survivors allows; their number divides."""
        failing = {"c0": FailureCode.CLIENT_FAILED, "c1": FailureCode.BUDGET_EXHAUSTED}
        run, _ = steps(
            3, size=0, grid={"client": lambda n, m, r: failing.get(n) or contracting(n, m, r)},
            asynchronous={"buffer_size": 3},
        )  # fmt: skip
        assert run.step().enough
        np.testing.assert_allclose(run.model["w"], contracting("c2", START, 1)[0]["w"], rtol=1e-6)
        assert run.calls[0].fates == {**failing, "c2": None}

    def test_without_enough_updates_leaves_the_model_as_it_is(self) -> None:
        """min_survivors counts the updates of a step."""
        run, _ = steps(
            3, size=0, grid={"client": lambda n, m, r: FailureCode.CLIENT_FAILED if n < "c2" else contracting(n, m, r)},
            cohort={"min_survivors": 2},
        )  # fmt: skip
        assert not run.step().enough
        np.testing.assert_array_equal(run.model["w"], START["w"])

    def test_of_an_empty_cohort_is_none(self) -> None:
        """Where nobody is there to be asked, nothing is sent and nothing happens."""
        run, grid = steps(3)
        answers = run.step([])
        assert (answers.replies, answers.enough, grid.asked) == ([], False, [])


class TestCohort:
    @settings(deadline=None, max_examples=50)
    @given(st.integers(1, 7), st.integers(1, 7), st.lists(st.integers(0, 10), max_size=40), st.integers(0, 4))
    def test_at_most_so_many_work_at_a_time_each_on_one_order(
        self, size: int, buffer_size: int, choices: list[int], most: int
    ) -> None:
        """At most `cohort.size` are at work, nobody twice, each once a round; few models are kept."""
        order = iter(choices)
        run, grid = steps(
            7, size=size, grid={"first": lambda waiting: next(order, 0) % len(waiting)},
            asynchronous={"buffer_size": min(size, buffer_size), "max_staleness": most},
        )  # fmt: skip
        for _ in range(8):
            run.step()
            at_work = [grid.key(message)[0] for message in grid.waiting.values()]
            assert len(at_work) == len(set(at_work)) <= size - min(size, buffer_size)
            assert sorted(at_work) == sorted(set(run.cohorts[-1]) - set(run.calls[-1].fates))
            bases = {name.partition("/")[0] for name in run.asking.state()} - {"at-work.json"}
            assert len(bases) <= most + 1
        assert max(Counter(grid.asked).values()) == 1
        assert all(len(cohort) <= 2 * size for cohort in run.cohorts)

    def test_is_filled_up_with_who_is_idle(self) -> None:
        """Those at work stay; of the others as many are asked as there is room for, by the cohorts' seed alone."""
        run, grid = steps(40, size=10, asynchronous={"buffer_size": 4})
        run.step()
        at_work = {grid.key(message)[0] for message in grid.waiting.values()}
        run.step()
        asked = [name for name, server_round in grid.asked if server_round == 2]
        assert (len(at_work), len(asked)) == (6, 4)
        assert at_work.isdisjoint(asked)
        again, other = steps(40, size=10, asynchronous={"buffer_size": 4})
        again.step()
        again.step()
        assert other.asked == grid.asked
        third, other = steps(40, size=10, asynchronous={"buffer_size": 4}, seeds={"cohort": 1})
        third.step()
        assert other.asked != grid.asked[:10]

    def test_of_all_asks_everybody_who_is_idle(self) -> None:
        """cohort.size = 0: whoever has answered begins again with the next step."""
        run, grid = steps(5, size=0)
        run.step()
        run.step()
        assert Counter(server_round for _, server_round in grid.asked) == {1: 5, 2: 2}

    def test_is_asked_in_an_order_drawn_by_lot(self) -> None:
        """Where replies come in the order of the orders, a client's name does not decide whether it comes in time."""
        run, grid = steps(
            60, size=0, grid={"first": lambda waiting: 0}, asynchronous={"buffer_size": 4, "max_staleness": 3}
        )
        for _ in range(20):
            run.step()
        assert len({name for name, _ in grid.arrived} & set(sorted(names_of(60))[30:])) >= 10

    def test_is_told_as_everybody_at_work(self) -> None:
        """What sites read as the cohort: those with whom they are at work, themselves among them."""
        grid = Arriving(names_of(6))
        run = Steps(asynchronous(size=4), grid, told=True)
        run.step()
        run.step()
        for (name, server_round), (config, _) in grid.requests.items():
            assert f'"{name}"' in config["cohort"]
            assert config["server-round"] == server_round
            assert config["cohort"].count("c") == 4

    def test_smaller_than_the_buffer_is_refused(self) -> None:
        """A buffer that all clients together cannot fill is an error before anybody is asked."""
        run, grid = steps(3, size=0, asynchronous={"buffer_size": 4})
        with pytest.raises(ConfigError, match="only 3 clients"):
            run.step()
        assert grid.asked == []


class TestStaleness:
    def test_beyond_the_most_is_dropped(self) -> None:
        """Who is at work for longer is told to stop, and failed; it can be asked again in the next round."""
        run, grid = steps(4, size=0, grid={"first": slow}, asynchronous={"max_staleness": 3})
        for _ in range(4):
            run.step()
        assert grid.cancelled == []
        run.step()
        assert grid.cancelled == [SLOW]
        assert run.calls[-1].fates[SLOW] is FailureCode.STALE_UPDATE
        assert SLOW in run.cohorts[-1]
        assert (SLOW, 5) not in grid.asked
        run.step()
        assert (SLOW, 6) in grid.asked

    def test_of_zero_uses_present_updates_only(self) -> None:
        """max_staleness = 0: whoever has not answered when the step is made began in vain."""
        run, grid = steps(4, size=0, asynchronous={"max_staleness": 0})
        for _ in range(3):
            assert set(run.step().staleness.values()) == {0}
        assert sorted(grid.cancelled) == ["c2", "c3"]

    def test_is_counted_here(self) -> None:
        """Nothing that a client says changes how old its update is."""
        run, grid = steps(grid={"first": last})
        for _ in range(5):
            answers = run.step()
            asked = dict(grid.arrived[-2:])
            assert answers.staleness == {name: run.done - began for name, began in sorted(asked.items())}


class TestSoundness:
    @pytest.mark.parametrize(
        ("answer", "fate"),
        [
            (lambda m: ({"w": m["w"]}, {"num-examples": 1.0, "train_loss": 0.0}), FailureCode.INVALID_REPLY),
            (lambda m: (m, {"num-examples": 1.0}), FailureCode.INVALID_REPLY),
            (lambda m: (m, {"num-examples": -1.0, "train_loss": 0.0}), FailureCode.INVALID_REPLY),
            (lambda m: ({**m, "w": m["w"] * np.nan}, {"num-examples": 1.0, "train_loss": 0.0}),
             FailureCode.NON_FINITE_UPDATE),
            (lambda m: ({**m, "w": m["w"] + np.float32(1e38)}, {"num-examples": 1.0, "train_loss": 0.0}),
             FailureCode.NON_FINITE_UPDATE),
            (lambda m: RecordDict(), FailureCode.INVALID_REPLY),
            (lambda m: FailureCode.POLICY_REFUSED, FailureCode.POLICY_REFUSED),
        ],
    )  # fmt: skip
    def test_only_sound_updates_count(self, answer: Callable[[Arrays], Any], fate: FailureCode) -> None:
        """What would not count in a synchronous round does not here; the client can be asked again."""
        run, grid = steps(
            3, size=0, grid={"client": lambda n, m, r: answer(m) if n == "c1" and r == 1 else contracting(n, m, r)}
        )
        answers = run.step()
        assert run.calls[0].fates == {"c0": None, "c1": fate, "c2": None}
        assert set(answers.staleness) == {"c0", "c2"}
        assert run.step().enough
        assert ("c1", 2) in grid.asked

    def test_an_answer_to_no_order_counts_for_nothing(self) -> None:
        """Neither a second answer to an order, nor one of another node, nor one to an order that never was."""

        class Malicious(Arriving):
            def pull_messages(self, message_ids: Any, *, needed: int | None = None) -> list[Message]:
                (message_id,) = list(message_ids)[:1]
                message = self.waiting.pop(message_id)
                others = [other for other in self.names if other != message.metadata.dst_node_id]
                foreign = Message(RecordDict(), others[0], "train")
                posed = update_reply(foreign, *contracting("c9", arrays_of(message.content), 1))
                if self.key(message)[0] == "c0":
                    return [answering(posed, message_id)]
                reply = answering(self.answer(message), message_id)
                return [reply, reply, answering(self.answer(message), "never-sent")]

        grid = Malicious(names_of(3))
        run = Steps(asynchronous(size=0), grid)
        run.step()
        assert run.calls[0].fates == {"c0": FailureCode.INVALID_REPLY, "c1": None, "c2": None}
        expected = fedbuff(
            START, grid.asked, [("c1", 1), ("c2", 1)], buffer_size=2, exponent=0.5, by_examples=True
        )  # fmt: skip
        np.testing.assert_allclose(run.model["w"], expected[0]["w"], rtol=1e-6)

    def test_replies_that_come_together_are_kept_for_the_next_step(self) -> None:
        """A grid of Flower's gives all that is there: what is not needed counts in the next step, and is older then."""

        class AllAtOnce(Arriving):
            def pull_messages(self, message_ids: Any, *, needed: int | None = None) -> list[Message]:
                ids = sorted(message_id for message_id in message_ids if message_id in self.waiting)
                return [super(AllAtOnce, self).pull_messages([message_id])[0] for message_id in ids]

        run = Steps(asynchronous(size=0), AllAtOnce(names_of(5)))
        assert run.step().staleness == {"c0": 0, "c1": 0}
        assert run.step().staleness == {"c2": 1, "c3": 1}
        assert run.step().staleness == {"c0": 1, "c4": 2}

    def test_shortened_updates_are_put_to_their_own_model(self) -> None:
        """With compression a late update is decoded against the model that it began with."""
        how = Compression.of(asynchronous(transport={"compression": "bf16"}).transport)

        def short(name: str, model: Arrays, server_round: int) -> tuple[Arrays, dict[str, float]]:
            trained, metrics = contracting(name, model, server_round)
            return encode_update(update_of(model, trained), trained, how, seed=b""), metrics

        runs = [
            steps(grid={"first": slow, "client": client}, transport={"compression": codec})[0]
            for client, codec in ((short, "bf16"), (contracting, "none"))
        ]
        for _ in range(5):
            for run in runs:
                run.step()
        np.testing.assert_allclose(runs[0].model["w"], runs[1].model["w"], rtol=0.02)
        assert [call.fates for call in runs[0].calls] == [call.fates for call in runs[1].calls]

    def test_an_encoded_update_of_another_length_is_refused(self) -> None:
        """As in a synchronous round."""
        run, _ = steps(
            3, size=0, transport={"compression": "int8"}, asynchronous={"buffer_size": 1},
            grid={"client": lambda n, m, r: ({"w": np.zeros(1, np.uint8)}, {"num-examples": 1.0})},
        )  # fmt: skip
        assert not run.step().enough
        assert set(run.calls[0].fates.values()) == {FailureCode.INVALID_REPLY}


class TestEnd:
    def test_cancels_what_is_open(self) -> None:
        """However a run ends, nobody goes on working for it."""
        run, grid = steps(4, size=0)
        run.step()
        run.asking.close()
        assert sorted(grid.cancelled) == ["c2", "c3"]
        run.asking.close()
        assert len(grid.cancelled) == 2

    def test_before_anything_has_begun_is_nothing(self) -> None:
        """Nobody is there to be told."""
        run, grid = steps(4)
        run.asking.close()
        assert not grid.cancelled

    def test_by_an_observer_leaves_nothing_half_counted(self) -> None:
        """What an observer raises ends the run: all that is still outstanding is cancelled."""

        class Stopping(Observer):
            def reply_received(self, client: str, failure: FailureCode | None) -> None:
                raise KeyboardInterrupt

        run, grid = steps(4, size=0)
        call_observer = Stopping()
        original = Observer.reply_received
        try:
            Observer.reply_received = call_observer.reply_received  # type: ignore[method-assign]
            with pytest.raises(KeyboardInterrupt):
                run.step()
        finally:
            Observer.reply_received = original  # type: ignore[method-assign]
        run.asking.close()
        assert len(grid.cancelled) == 3

    def test_deadline_is_passed_on(self) -> None:
        """cohort.deadline_seconds bounds each client's own time."""
        run, grid = steps(4, size=0, cohort={"deadline_seconds": 7.5})
        run.step()
        assert set(grid.timeouts) == {7.5}


class TestResume:
    @pytest.mark.parametrize("done", range(1, 7))
    def test_goes_on_as_if_nothing_had_happened(self, done: int) -> None:
        """Who was at work gets the same request again, first and in the same order; the same bytes come of it."""
        undisturbed, _ = steps(6, grid={"first": slow}, asynchronous={"max_staleness": 4})
        for _ in range(10):
            undisturbed.step()
        run, before = steps(6, grid={"first": slow}, asynchronous={"max_staleness": 4})
        for _ in range(done):
            run.step()
        left = [before.key(message) for message in before.waiting.values()]
        after = Arriving(names_of(6), first=slow)
        resumed = run.resumed(after)
        for _ in range(10 - done):
            resumed.step()
        assert as_bytes(resumed.model) == as_bytes(undisturbed.model)
        again = [key for key in left if key in after.requests]
        assert after.asked[: len(again)] == again
        for key in again:
            assert after.requests[key][0] == before.requests[key][0]
            assert as_bytes(after.requests[key][1]) == as_bytes(before.requests[key][1])
        assert [call.fates for call in resumed.calls] == [call.fates for call in undisturbed.calls[done:]]
        assert [a.staleness for a in resumed.answers] == [a.staleness for a in undisturbed.answers[done:]]

    def test_tells_the_same_cohort_again(self) -> None:
        """A request that is made again says word for word what it said."""
        grid = Arriving(names_of(6))
        run = Steps(asynchronous(size=4), grid, told=True)
        run.step()
        other = Arriving(names_of(6))
        run.resumed(other).step()
        for key in set(grid.requests) & set(other.requests):
            assert other.requests[key][0] == grid.requests[key][0]

    def test_a_client_that_is_gone_is_lost(self) -> None:
        """Who was at work and is no more among the run's clients has failed."""
        run, _ = steps(4, size=0)
        run.step()
        resumed = run.resumed(Arriving(names_of(3)))
        resumed.step()
        assert resumed.calls[0].fates["c3"] is FailureCode.CLIENT_LOST

    def test_state_holds_each_model_once(self) -> None:
        """However many clients began with it; and none that nobody is at work on."""
        run, _ = steps(20, size=16, asynchronous={"buffer_size": 4})
        run.step()
        assert sorted(run.asking.state()) == ["1/count", "1/w", "at-work.json"]
        for _ in range(8):
            run.step()
        rounds = {name.partition("/")[0] for name in run.asking.state()} - {"at-work.json"}
        assert rounds == {"7", "8", "9"}

    def test_damaged_state_is_refused(self) -> None:
        """A state that lacks a model, or is of another kind of run, starts nothing."""
        run, _ = steps(4, size=0)
        run.step()
        state = dict(run.asking.state())
        for wrong in ({}, {key: state[key] for key in list(state)[:1]}, {**state, "at-work.json": state["1/w"]}):
            with pytest.raises(RunError, match="who was at work"):
                steps(4)[0].asking.restore(wrong, server_round=1)


def test_the_models_that_clients_began_with_do_not_follow_the_present_one() -> None:
    """The coordinator's model changes in place; an order's model must not, also where it is sent only later."""
    run, grid = steps(4, size=0)
    run.step()
    first = {grid.key(message): arrays_of(message.content)["w"].copy() for message in grid.waiting.values()}
    run.step()
    run.step()
    for message in grid.waiting.values():
        if grid.key(message) in first:
            np.testing.assert_array_equal(arrays_of(message.content)["w"], START["w"])
    assert ARRAYS in next(iter(grid.waiting.values())).content

"""Asynchronous simulations: the same bytes every time, however they are computed, and where they were stopped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.config import RunConfig
from common.errors import ConfigError
from common.privacy.ledger.simulated import STORE, read_store
from server.store import RunFolder
from simulations.run import execute, prepare
from tests.helpers.coordinating import StoppedError, Stopping
from tests.helpers.runs import SITE, Log, as_bytes, configuration, private, run

ASYNCHRONOUS: dict[str, Any] = {
    "rounds": 8,
    "data": {"clients": 7},
    "cohort": {"size": 5},
    "asynchronous": {"buffer_size": 2},
}


def started(path: Path, config: RunConfig | None = None, **how: Any) -> tuple[dict[str, tuple[str, bytes]], Log]:
    """A run's model as bytes, and what its observer was told."""
    outcome, log = run(path, config or configuration(**ASYNCHRONOUS), **how)
    return as_bytes(outcome.arrays), log


class TestRun:
    def test_is_the_same_for_any_number_of_workers(self, tmp_path: Path) -> None:
        """Replies count in the order of the orders: time decides nothing where there is no virtual time."""
        one, log = started(tmp_path / "one")
        three, other = started(tmp_path / "three", workers=3)
        assert one == three
        assert [(r.survivors, r.staleness, r.train_loss) for r in log.records] == [
            (r.survivors, r.staleness, r.train_loss) for r in other.records
        ]
        assert max(max((r.staleness or {}).values()) for r in log.records) > 0
        assert all(len(r.survivors) == 2 and len(r.cohort) == 5 for r in log.records)

    def test_is_the_same_sealed(self, tmp_path: Path) -> None:
        """Sealing changes no byte of the model, whichever model an update began with."""
        config = configuration(**ASYNCHRONOUS)
        possible = prepare(config, folder=tmp_path, site_file=SITE)
        outcomes = [execute(possible, sealed=sealed) for sealed in (False, True)]
        assert as_bytes(outcomes[0].arrays) == as_bytes(outcomes[1].arrays)

    @pytest.mark.parametrize("name", ["fedavg", "fedprox", "fedavgm", "fedadam", "fedyogi", "fedadagrad"])
    def test_takes_any_strategy_of_the_mean_for_its_optimizer(self, name: str, tmp_path: Path) -> None:
        """Where the buffer holds everybody, a step is what a synchronous round is."""
        changes = {"strategy": {"name": name}, "data": {"clients": 4}, "rounds": 3}
        whole, _ = run(tmp_path / "whole", **changes)
        buffered, log = run(tmp_path / "buffered", **changes, asynchronous={"buffer_size": 4})
        for key in whole.arrays:
            np.testing.assert_allclose(buffered.arrays[key], whole.arrays[key], rtol=1e-4, atol=1e-5)
        assert {age for record in log.records for age in (record.staleness or {}).values()} == {0}

    def test_learns(self, tmp_path: Path) -> None:
        """With updates of several ages the model still gets better."""
        _, log = run(tmp_path, **ASYNCHRONOUS | {"rounds": 25})
        assert log.records[-1].loss is not None
        assert log.records[0].loss is not None
        assert log.records[-1].loss < 0.6 * log.records[0].loss

    def test_goes_on_with_clients_in_trouble(self, tmp_path: Path) -> None:
        """A client that always fails never counts, and others do."""
        changes = ASYNCHRONOUS | {
            "data": {"name": "one-in-trouble", "clients": 4},
            "model": {"options": {"trouble": "raise"}},
            "cohort": {"size": 3},
        }
        _, log = run(tmp_path, **changes)
        failures = [failure for record in log.records for failure in record.failures.values()]
        assert set(failures) == {"client-failed"}
        assert all(len(record.survivors) == 2 for record in log.records)

    def test_drops_what_is_too_stale(self, tmp_path: Path) -> None:
        """With more clients at work than steps can use, the last ones are dropped and asked again."""
        changes = ASYNCHRONOUS | {"asynchronous": {"buffer_size": 1, "max_staleness": 2}, "rounds": 6}
        _, log = run(tmp_path, **changes)
        dropped = [name for record in log.records for name, why in record.failures.items() if why == "stale-update"]
        assert dropped
        assert max(max((record.staleness or {}).values()) for record in log.records) <= 2

    @pytest.mark.parametrize(
        ("changes", "said"),
        [
            ({"cohort": {"size": 8}}, "cohort.size is 8, but there are only 7 clients"),
            ({"cohort": {"size": 0}, "asynchronous": {"buffer_size": 8}}, "only 7 clients"),
        ],
    )
    def test_with_more_at_work_than_there_are_is_refused(
        self, changes: dict[str, Any], said: str, tmp_path: Path
    ) -> None:
        """Concurrency or buffer beyond the population is an error that says so."""
        with pytest.raises(ConfigError, match=said):
            run(tmp_path, **ASYNCHRONOUS | changes)

    def test_with_a_buffer_beyond_the_cohort_is_refused(self) -> None:
        """It could never be filled by those at work at a time without staler ones among them."""
        with pytest.raises(ValueError, match=r"asynchronous\.buffer_size"):
            configuration(**ASYNCHRONOUS | {"asynchronous": {"buffer_size": 6}})


class TestResume:
    @pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
    @pytest.mark.parametrize(("place", "at"), [("started", 1), ("started", 4), ("reply", 5), ("recorded", 7)])
    def test_ends_with_the_same_bytes(self, place: str, at: int, workers: int, tmp_path: Path) -> None:
        """Stopped anywhere, a run goes on as if it had not been: the same clients are at work on the same models."""
        undisturbed, log = started(tmp_path / "undisturbed")
        with pytest.raises(StoppedError):
            started(tmp_path / "stopped", workers=workers, observer=Stopping(place, at))
        resumed, other = started(tmp_path / "stopped", workers=workers)
        assert resumed == undisturbed
        assert [r.staleness for r in other.records] == [r.staleness for r in log.records][-len(other.records) :]

    def test_with_privacy_pays_for_nothing_twice(self, tmp_path: Path) -> None:
        """Updates that were paid for are sent again with the same noise, also of clients that were asked long ago."""
        config = private(**ASYNCHRONOUS)
        undisturbed, _ = started(tmp_path / "undisturbed", config, insecure_seed=5)
        with pytest.raises(StoppedError):
            started(tmp_path / "stopped", config, insecure_seed=5, observer=Stopping("reply", 6))
        resumed, _ = started(tmp_path / "stopped", config, insecure_seed=5)
        assert resumed == undisturbed
        assert events(tmp_path / "stopped") == events(tmp_path / "undisturbed")


def events(path: Path) -> dict[str, list[int]]:
    """The rounds in each client's ledger, in their order."""
    return {
        name: [event.server_round for event in replay.standing.events]
        for name, replay in read_store(path / STORE).items()
    }


class TestPrivacy:
    @pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
    def test_each_participation_is_an_event_of_its_own_round(self, workers: int, tmp_path: Path) -> None:
        """A client's ledger has one event for each update that it made: no more, no less, none twice, all planned."""
        config = private(**ASYNCHRONOUS)
        possible = prepare(config, folder=tmp_path / "run", site_file=SITE, insecure_seed=3)
        log = Log()
        with RunFolder.create(config, tmp_path / "run") as folder:
            log.folder = folder
            execute(possible, folder=folder, observer=log, workers=workers)
        made: dict[str, list[int]] = {}
        for record in log.records:
            for name, age in (record.staleness or {}).items():
                made.setdefault(name, []).append(record.server_round - age)
        assert events(tmp_path / "run") == dict(sorted(made.items()))
        assert possible.plan is not None
        spent = possible.spent()
        for name, rounds in made.items():
            assert rounds == sorted(set(rounds))
            assert 0 < spent[name] <= 5.0
            assert len(rounds) <= possible.plan.participations

    def test_an_update_of_a_step_that_was_never_made_stays_paid_for(self, tmp_path: Path) -> None:
        """A run that is stopped within a step has spent what its clients have made, used or not."""
        with pytest.raises(StoppedError):
            started(tmp_path / "run", private(**ASYNCHRONOUS), observer=Stopping("reply", 3))
        assert len(RunFolder.open(tmp_path / "run").rounds()) == 2
        assert sum(map(len, events(tmp_path / "run").values())) == 2 * 2 + 1


DEVICES: dict[str, Any] = {
    "examples_per_second": 10.0,
    "speed_spread": 1.0,
    "stragglers": 0.3,
    "straggler_slowdown": 30.0,
}
VIRTUAL = ASYNCHRONOUS | {"simulation": {"devices": DEVICES}, "rounds": 12}


class TestVirtualTime:
    @pytest.mark.parametrize("how", [{"workers": 3}, {"workers": 1}])
    def test_is_the_same_every_time(self, how: dict[str, Any], tmp_path: Path) -> None:
        """Who comes first is decided by the devices, whatever computes them."""
        one, log = started(tmp_path / "one", configuration(**VIRTUAL))
        other, again = started(tmp_path / "other", configuration(**VIRTUAL), **how)
        assert one == other
        assert [(r.clock, r.staleness) for r in log.records] == [(r.clock, r.staleness) for r in again.records]

    def test_steps_do_not_wait_for_stragglers(self, tmp_path: Path) -> None:
        """As many updates take a fraction of the time of whole cohorts, because the slow come when they come."""
        whole = {key: value for key, value in VIRTUAL.items() if key != "asynchronous"} | {"rounds": 5}
        _, waiting = run(tmp_path / "whole", configuration(**whole))
        _, going_on = run(tmp_path / "buffered", configuration(**VIRTUAL))
        times = {}
        for name, log in (("whole", waiting), ("buffered", going_on)):
            last = log.records[-1].clock
            assert last is not None
            times[name] = last.at_seconds / sum(len(record.survivors) for record in log.records)
        assert times["buffered"] < 0.5 * times["whole"]
        ages = [age for record in going_on.records for age in (record.staleness or {}).values()]
        assert max(ages) > 0

    @pytest.mark.parametrize(("place", "at"), [("reply", 3), ("recorded", 6), ("started", 9)])
    def test_a_resumed_run_ends_with_the_same_bytes(self, place: str, at: int, tmp_path: Path) -> None:
        """Clients that were at work arrive when they would have arrived."""
        undisturbed, log = started(tmp_path / "undisturbed", configuration(**VIRTUAL))
        with pytest.raises(StoppedError):
            started(tmp_path / "stopped", configuration(**VIRTUAL), observer=Stopping(place, at))
        resumed, other = started(tmp_path / "stopped", configuration(**VIRTUAL))
        assert resumed == undisturbed
        assert [(r.clock, r.staleness) for r in other.records] == [
            (r.clock, r.staleness) for r in log.records[-len(other.records) :]
        ]

    def test_a_deadline_bounds_each_clients_own_time(self, tmp_path: Path) -> None:
        """Who takes longer has failed, and is idle again; others go on."""
        config = configuration(**VIRTUAL | {"cohort": {"size": 5, "deadline_seconds": 4.0}})
        _, log = run(tmp_path, config)
        failures = {failure for record in log.records for failure in record.failures.values()}
        assert failures == {"deadline-exceeded"}
        assert all(record.survivors for record in log.records)

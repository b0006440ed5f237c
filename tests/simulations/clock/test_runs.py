"""Whole runs in virtual time: the same apps, strategies and grids as without it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from common.config import RunConfig
from common.errors import ConfigError, RunError
from server.coordinator import Outcome, RoundRecord
from server.store import RunFolder
from simulations.clock import AvailableSampler, VirtualTime, make_timing, trace_digest
from simulations.run import execute, prepare
from tests.helpers.runs import SITE, Log, as_bytes, configuration, prepared

DEVICES = {
    "examples_per_second": 10, "speed_spread": 1.0, "download_mbit": 0.01, "upload_mbit": 0.01, "bandwidth_spread": 0.5,
    "availability": 0.7, "availability_seconds": 60, "dropout": 0.2, "stragglers": 0.3,
}  # fmt: skip


def virtual(devices: dict[str, Any] | None = None, **changes: Any) -> RunConfig:
    """Twenty clients, cohorts of eight, six rounds."""
    base: dict[str, Any] = {
        "rounds": 6,
        "data": {"partition": "iid", "clients": 20},
        "cohort": {"size": 8, "deadline_seconds": 30},
        "simulation": {"devices": DEVICES if devices is None else devices},
    }
    return configuration(**{key: {**base.get(key, {}), **v} if isinstance(v, dict) else v for key, v in changes.items()}
                         | {key: v for key, v in base.items() if key not in changes})  # fmt: skip


def carried_out(path: Path, config: RunConfig, **how: Any) -> tuple[Outcome, list[RoundRecord]]:
    log = Log()
    outcome = execute(prepared(path, config), observer=log, **how)
    return outcome, log.records


def course(records: list[RoundRecord]) -> list[Any]:
    """All of a run that does not measure this machine."""
    return [(r.server_round, r.cohort, r.survivors, r.failures, r.train_loss, r.clock, r.staleness) for r in records]


class TestRounds:
    """Synchronous rounds."""

    def test_rounds_take_virtual_time_and_some_clients_fail(self, tmp_path: Path) -> None:
        """The clock goes on, cohorts answer in part, and the run trains with those who do."""
        outcome, records = carried_out(tmp_path, virtual())
        clocks = [record.clock for record in records if record.clock is not None]
        assert len(clocks) == outcome.rounds == 6
        moments = [clock.at_seconds for clock in clocks]
        assert moments == sorted(moments)
        assert moments[0] > 0
        assert all(0 <= clock.wasted_seconds <= clock.work_seconds for clock in clocks)
        reasons = {reason for record in records for reason in record.failures.values()}
        assert reasons == {"client-lost", "deadline-exceeded"}
        assert all(set(r.survivors) | r.failures.keys() == set(r.cohort) for r in records)

    def test_without_devices_there_is_no_clock(self, tmp_path: Path) -> None:
        """Nothing is recorded."""
        assert all(r.clock is None for r in carried_out(tmp_path, virtual({}, cohort={"deadline_seconds": 0}))[1])

    @pytest.mark.parametrize(
        "how", [{"workers": 2}, {"sealed": True}, {"workers": 3, "sealed": True}], ids=["workers", "sealed", "both"]
    )
    def test_the_engine_changes_nothing(self, tmp_path: Path, how: dict[str, Any]) -> None:
        """Course and model are the same to the bit for any number of workers, sealed or not; also with partial work."""
        config = virtual({**DEVICES, "partial_work": True}, cohort={"deadline_seconds": 8})
        (one, first), (other, second) = carried_out(tmp_path, config), carried_out(tmp_path, config, **how)
        assert course(first) == course(second)
        assert as_bytes(one.arrays) == as_bytes(other.arrays)

    @pytest.mark.parametrize("partial", [False, True])
    def test_stacked_clients_take_the_same_time_and_steps(self, tmp_path: Path, partial: bool) -> None:
        """Also those that send what they have trained by the deadline; models agree to 1e-5."""
        training = {"local_epochs": 4, "batch_size": 4}
        config = virtual({**DEVICES, "partial_work": partial}, model={"name": "mlp"}, training=training)
        (one, first), (other, second) = (carried_out(tmp_path, config, batching=batching) for batching in ("off", "on"))
        assert [c[:4] + c[5:] for c in course(first)] == [c[:4] + c[5:] for c in course(second)]
        for name, values in one.arrays.items():
            np.testing.assert_allclose(other.arrays[name], values, rtol=1e-5, atol=1e-6)

    def test_partial_work_lets_more_updates_count(self, tmp_path: Path) -> None:
        """Whoever has time for a step is in time; the model is another one."""
        found = [
            carried_out(tmp_path, virtual({**DEVICES, "partial_work": partial}, cohort={"deadline_seconds": 8}))
            for partial in (False, True)
        ]
        late = [sum(list(r.failures.values()).count("deadline-exceeded") for r in records) for _, records in found]
        assert late[1] < late[0]
        assert as_bytes(found[0][0].arrays) != as_bytes(found[1][0].arrays)

    def test_over_sampling_ends_a_round_with_the_first_updates(self, tmp_path: Path) -> None:
        """Time goes by faster, more work is wasted, and never more than `size` updates count."""
        plain, over = (
            carried_out(tmp_path, virtual({**DEVICES, "dropout": 0}, cohort={"size": 6, "over_sampling": share}))[1]
            for share in (0.0, 0.5)
        )
        assert all(len(r.survivors) <= 6 for r in over)
        assert over[-1].clock is not None
        assert plain[-1].clock is not None
        assert over[-1].clock.at_seconds < plain[-1].clock.at_seconds

    def test_a_deadline_needs_no_processes_of_its_own(self, tmp_path: Path) -> None:
        """It is virtual: an hour of it is over in a moment."""
        slow = {"examples_per_second": 1e-6}
        with pytest.raises(RunError, match="no client sent an update"):
            carried_out(tmp_path, virtual(slow, cohort={"deadline_seconds": 3600}))

    @pytest.mark.parametrize("stop", [1, 4])
    def test_a_run_that_was_interrupted_ends_as_if_it_had_not_been(self, tmp_path: Path, stop: int) -> None:
        """Course, clock and model are the same to the bit."""
        whole, records = carried_out(tmp_path / "whole", virtual())

        class Stopping(Log):
            def round_started(self, server_round: int, cohort: list[str]) -> None:
                if server_round == stop + 1:
                    raise KeyboardInterrupt

        path = tmp_path / "run"
        first, second = Stopping(), Log()
        config = virtual()
        possible = prepare(config, folder=path, site_file=SITE)
        with RunFolder.create(config, path) as folder, pytest.raises(KeyboardInterrupt):
            execute(possible, folder=folder, observer=first)
        with RunFolder.resume(path) as folder:
            again = execute(prepare(config, folder=path, site_file=SITE), folder=folder, observer=second)
        assert course([*first.records, *second.records]) == course(records)
        assert as_bytes(again.arrays) == as_bytes(whole.arrays)

    def test_a_seed_changes_who_is_there(self, tmp_path: Path) -> None:
        """`seeds.devices`, and nothing else does."""
        one, other = (carried_out(tmp_path, virtual(seeds={"devices": seed}))[1] for seed in (0, 1))
        assert [r.cohort for r in one] != [r.cohort for r in other]


class TestAsynchronous:
    """FedBuff on the clock."""

    CONFIG: ClassVar[dict[str, Any]] = {"asynchronous": {"buffer_size": 3}, "rounds": 12}

    def test_steps_come_as_soon_as_the_buffer_is_full(self, tmp_path: Path) -> None:
        """Updates are stale at times, time goes on, and faster than in rounds that wait for all."""
        _, records = carried_out(tmp_path, virtual(**self.CONFIG))
        moments = [r.clock.at_seconds for r in records if r.clock is not None]
        assert moments == sorted(moments)
        assert max(s for r in records for s in (r.staleness or {}).values()) > 0

    @pytest.mark.parametrize("how", [{"workers": 3}, {"sealed": True}], ids=["workers", "sealed"])
    def test_the_engine_changes_nothing(self, tmp_path: Path, how: dict[str, Any]) -> None:
        """Arrivals are virtual: course and model are the same to the bit."""
        config = virtual(**self.CONFIG)
        (one, first), (other, second) = carried_out(tmp_path, config), carried_out(tmp_path, config, **how)
        assert course(first) == course(second)
        assert as_bytes(one.arrays) == as_bytes(other.arrays)

    @pytest.mark.parametrize("stop", [1, 5, 9])
    @pytest.mark.parametrize("stale", [0, 1, 20])
    def test_a_run_that_was_interrupted_ends_as_if_it_had_not_been(self, tmp_path: Path, stop: int, stale: int) -> None:
        """Who was at work goes on at work, arrives when it would have, or is given up as too stale."""
        asynchronous = {**self.CONFIG["asynchronous"], "max_staleness": stale}
        config = virtual(**{**self.CONFIG, "asynchronous": asynchronous})
        whole, records = carried_out(tmp_path / "whole", config)

        class Stopping(Log):
            def round_started(self, server_round: int, cohort: list[str]) -> None:
                if server_round == stop + 1:
                    raise KeyboardInterrupt

        path = tmp_path / "run"
        first, second = Stopping(), Log()
        with RunFolder.create(config, path) as folder, pytest.raises(KeyboardInterrupt):
            execute(prepare(config, folder=path, site_file=SITE), folder=folder, observer=first)
        with RunFolder.resume(path) as folder:
            again = execute(prepare(config, folder=path, site_file=SITE), folder=folder, observer=second)
        assert course([*first.records, *second.records]) == course(records)
        assert as_bytes(again.arrays) == as_bytes(whole.arrays)


class TestPrivate:
    """Runs with privacy: time changes who answers, not what is promised."""

    def test_a_late_client_spends_nothing(self, tmp_path: Path) -> None:
        """It is never asked, so nothing of it is released; others spend what they would."""
        privacy = {"unit": "example", "target_epsilon": 5.0, "expected_batch_size": 4, "sampling_rate": 0.3}
        config = virtual(training={"local_steps": 1}, privacy=privacy)
        possible = prepared(tmp_path, config)
        log = Log()
        execute(possible, observer=log)
        answered = {name for record in log.records for name in record.survivors}
        taken = possible.rounds_taken()
        assert {name for name, rounds in taken.items() if rounds} == answered
        assert all(taken[n] == sum(n in r.survivors for r in log.records) for n in answered)

    def test_clients_under_client_level_privacy_may_be_away(self, tmp_path: Path) -> None:
        """Its uniform cohorts promise nothing about who is asked."""
        privacy = {"unit": "client", "target_epsilon": 8.0, "clipping_norm": 1.0}
        _, records = carried_out(tmp_path, virtual(training={"local_steps": 1}, privacy=privacy))
        assert any(record.failures for record in records)

    def test_sums_are_opened_without_those_who_went_away(self, tmp_path: Path) -> None:
        """Secure aggregation survives them as it survives others."""
        config = virtual(
            {**DEVICES, "dropout": 0.1, "speed_spread": 0.2, "stragglers": 0},
            privacy={"secure_aggregation": True},
            cohort={"size": 0, "deadline_seconds": 60, "min_survivors": 6},
            data={"clients": 10},
        )
        _, records = carried_out(tmp_path, config)
        assert any(record.failures and record.survivors for record in records)
        assert all(record.clock is not None for record in records)


class TestPreparing:
    """What is refused before a run begins."""

    def trace(self, path: Path, *lines: dict[str, Any]) -> Path:
        path.write_text("".join(json.dumps({"examples_per_second": 5.0, **line}) + "\n" for line in lines))
        return path

    def config(self, trace: Path) -> RunConfig:
        return virtual({"trace": trace_digest(trace)}, cohort={"deadline_seconds": 0})

    def test_devices_come_from_the_trace(self, tmp_path: Path) -> None:
        """Lines are dealt to clients in turn; the slowest decides how long a round takes."""
        trace = self.trace(tmp_path / "t", {}, {"examples_per_second": 0.5})
        possible = prepare(self.config(trace), folder=tmp_path, site_file=SITE, trace=trace)
        log = Log()
        execute(possible, observer=log)
        examples = max(len(client.train) for client in possible.federation.clients)
        assert log.records[0].clock is not None
        assert log.records[0].clock.at_seconds == pytest.approx(examples / 0.5, rel=0.3)

    @pytest.mark.parametrize("fault", ["missing", "another", "damaged", "nobody", "for a run without"])
    def test_a_trace_that_does_not_fit(self, tmp_path: Path, fault: str) -> None:
        """Each is an error that says what to do."""
        trace = self.trace(tmp_path / "t", {"client": "x"} if fault == "nobody" else {"dropout": 0.1})
        config, given = self.config(trace), trace
        expected = "which is not there"
        if fault == "missing":
            given = None  # type: ignore[assignment]
        elif fault == "another":
            self.trace(trace, {})
            expected = "another trace"
        elif fault == "damaged":
            trace.write_text("{}\n")
            config, expected = self.config(trace), "line 1"
        elif fault == "nobody":
            expected = "no device for client"
        else:
            config, expected = virtual(), "not the trace of this run"
        with pytest.raises(ConfigError, match=expected) as error:
            prepare(config, folder=tmp_path, site_file=SITE, trace=given)
        assert error.value.hint

    def test_partial_work_is_refused_with_privacy_wherever_settings_come_from(self, tmp_path: Path) -> None:
        """The number of steps is part of what is promised."""
        privacy = {"unit": "example", "target_epsilon": 5.0, "expected_batch_size": 4, "sampling_rate": 0.3}
        config = virtual(training={"local_steps": 1}, privacy=privacy)
        devices = config.simulation.devices.model_copy(update={"partial_work": True})
        forced = config.model_copy(update={"simulation": config.simulation.model_copy(update={"devices": devices})})
        possible = prepared(tmp_path, config)
        with pytest.raises(ConfigError, match="partial_work"):
            make_timing(forced, possible.model, possible.plan, names=possible.federation.names, trace=None)

    def test_who_is_there_is_asked_only_where_devices_are_ever_away(self, tmp_path: Path) -> None:
        """Else the run's own sampler draws, of every kind."""
        for availability in (1.0, 0.5):
            possible = prepared(tmp_path, virtual({**DEVICES, "availability": availability}))
            timing = possible.sites.timing
            assert timing is not None
            sampler = VirtualTime(possible.config, timing, possible.federation).sampler
            assert isinstance(sampler, AvailableSampler) == (availability < 1)

"""How a run's clients train is asked for or found out, written down before it matters, and kept to."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from common.config import RunConfig
from common.errors import ConfigError, RunError
from server.store import RunFolder
from simulations.batching import BATCHING, PROBES, Choice, Probe, make_choice, read_record, why_one_by_one
from tests.helpers.runs import configuration, private

LINEAR = nn.Linear(3, 3)
WHY = "the model has an LSTM"


def trained(choice: Choice, rounds: int, *, stacked: float, one_by_one: float) -> list[bool]:
    """Which rounds were stacked, where an example costs so many CPU seconds either way."""
    ways = []
    for server_round in range(1, rounds + 1):
        ways.append(choice.begin(server_round))
        if choice.probing(server_round):
            seconds = 10 * (stacked if ways[-1] else one_by_one)
            choice.measured(Probe(server_round=server_round, stacked=ways[-1], cpu_seconds=seconds, weight=10.0))
    return ways


class TestAuto:
    @pytest.mark.parametrize(("stacked", "then"), [(0.5, True), (2.0, False)])
    def test_tries_both_ways_twice_and_keeps_the_quicker(self, stacked: float, then: bool) -> None:
        """Rounds 1 and 3 are one by one, 2 and 4 stacked; from then on whatever cost less for an example."""
        choice = make_choice("auto", None, cohort=100)
        assert trained(choice, 7, stacked=stacked, one_by_one=1.0) == [False, True, False, True, then, then, then]

    def test_counts_by_example(self) -> None:
        """A round with more examples may cost more."""
        choice = make_choice("auto", None, cohort=100)
        for server_round, weight in enumerate((1.0, 100.0, 1.0, 100.0), 1):
            way = choice.begin(server_round)
            choice.measured(Probe(server_round=server_round, stacked=way, cpu_seconds=1.0 + way, weight=weight))
        assert choice.begin(PROBES + 1)

    def test_forgives_a_cold_start(self) -> None:
        """The first round of each kind also pays for what is done once: the cheaper of the two counts."""
        choice = make_choice("auto", None, cohort=100)
        for server_round, seconds in enumerate((1.0, 50.0, 1.0, 0.5), 1):
            way = choice.begin(server_round)
            choice.measured(Probe(server_round=server_round, stacked=way, cpu_seconds=seconds, weight=1.0))
        assert choice.begin(PROBES + 1)

    def test_without_a_measurement_of_both_ways_trains_one_by_one(self) -> None:
        """Rounds in which nobody answered tell nothing."""
        choice = make_choice("auto", None, cohort=100)
        choice.measured(Probe(server_round=2, stacked=True, cpu_seconds=1.0, weight=5.0))
        choice.measured(Probe(server_round=1, stacked=False, cpu_seconds=1.0, weight=0.0))
        assert not choice.begin(PROBES + 1)

    def test_says_why_it_never_stacks(self) -> None:
        """What cannot be stacked, and a cohort of a few, trains one by one from the first round on."""
        for why, cohort, said in ((WHY, 100, WHY), (None, 15, "fewer than 16 clients")):
            choice = make_choice("auto", why, cohort=cohort)
            assert trained(choice, 6, stacked=0.1, one_by_one=1.0) == [False] * 6
            assert said in choice.record()["why"]


class TestForced:
    @pytest.mark.parametrize(("batching", "way"), [("on", True), ("off", False)])
    def test_is_followed_in_every_round(self, batching: Any, way: bool) -> None:
        """Whatever is quicker, and however small the cohort is."""
        assert trained(make_choice(batching, None, cohort=2), 6, stacked=9.0, one_by_one=9.0) == [way] * 6

    def test_on_is_refused_with_the_reason(self) -> None:
        """What cannot be stacked is a mistake in the command, and the message says what it is about."""
        with pytest.raises(ConfigError, match=WHY) as refused:
            make_choice("on", WHY, cohort=100)
        assert "auto" in refused.value.hint

    def test_off_needs_no_reason(self) -> None:
        """One by one is always possible."""
        assert make_choice("off", WHY, cohort=100).record()["stacked"] is False


@pytest.mark.parametrize(
    ("config", "options", "reason"),
    [
        (configuration(), {}, None),
        (private(), {}, None),
        (configuration(strategy={"name": "fedavgm"}), {}, None),
        (configuration(strategy={"name": "krum"}, data={"clients": 7}), {}, "krum needs each update"),
        (configuration(transport={"compression": "int8"}), {}, "compresses"),
        (configuration(simulation={"byzantine_clients": 1}), {}, "lie"),
        (configuration(cohort={"deadline_seconds": 5.0}), {}, "late"),
        (configuration(asynchronous={"buffer_size": 2}), {}, "asynchronous"),
        (configuration(privacy={"unit": "client", "target_epsilon": 5.0}), {}, "whole update"),
        (configuration(privacy={"secure_aggregation": True}), {}, "masks"),
        (configuration(), {"sealed": True}, "seals"),
        (configuration(), {"engine": "ray"}, "Ray"),
        (configuration(), {"own_app": True}, "app of their own"),
    ],
)
def test_reasons_beside_the_model(config: RunConfig, options: dict[str, Any], reason: str | None) -> None:
    """Strategies of the mean over plain messages can be stacked; whatever concerns a single update cannot."""
    found = why_one_by_one(config, LINEAR, **options)
    assert (found is None) if reason is None else (reason in (found or ""))


def test_model_has_its_own_reasons() -> None:
    """An LSTM cannot be stacked, nor can a model that drops units."""
    assert "LSTM" in (why_one_by_one(configuration(), nn.LSTM(3, 3)) or "")
    assert "drops units" in (why_one_by_one(configuration(), nn.Sequential(LINEAR, nn.Dropout(0.5))) or "")


class TestRecord:
    def test_is_written_before_each_round_that_it_decides(self, tmp_path: Path) -> None:
        """Whenever a round begins, the folder says how it trains, and what is known by then."""
        with RunFolder.create(configuration(rounds=9), tmp_path / "run") as folder:
            choice = make_choice("auto", None, cohort=100, folder=folder)
            for server_round in range(1, 7):
                way = choice.begin(server_round)
                said: Mapping[str, Any] = read_record(folder.path) or {}
                assert len(said["probes"]) == min(server_round - 1, PROBES)
                assert said["stacked"] is (None if server_round <= PROBES else way)
                if choice.probing(server_round):
                    cost = 1.0 if way else 3.0
                    choice.measured(Probe(server_round=server_round, stacked=way, cpu_seconds=cost, weight=1.0))

    @pytest.mark.parametrize("stopped", range(1, 7))
    def test_is_followed_by_a_resumed_run(self, stopped: int, tmp_path: Path) -> None:
        """A run that stopped in any round repeats that round the way it was trained, whatever is quicker by now."""
        config = configuration(rounds=9)
        whole = trained(make_choice("auto", None, cohort=100), 8, stacked=0.5, one_by_one=1.0)
        with RunFolder.create(config, tmp_path / "run") as folder:
            trained(make_choice("auto", None, cohort=100, folder=folder), stopped, stacked=0.5, one_by_one=1.0)
        with RunFolder.resume(tmp_path / "run") as folder:
            again = make_choice("off", None, cohort=100, folder=folder)
            for server_round in range(stopped, 9):
                assert again.begin(server_round) is whole[server_round - 1]
                if again.probing(server_round):
                    cost = 0.5 if again.begin(server_round) else 1.0
                    again.measured(
                        Probe(server_round=server_round, stacked=whole[server_round - 1], cpu_seconds=cost, weight=1.0)
                    )

    def test_is_followed_where_a_run_is_repeated(self, tmp_path: Path) -> None:
        """Another folder's record decides, and is written down again."""
        first = make_choice("auto", None, cohort=100)
        ways = trained(first, 7, stacked=0.5, one_by_one=1.0)
        with RunFolder.create(configuration(rounds=9), tmp_path / "run") as folder:
            again = make_choice("auto", None, cohort=100, folder=folder, record=first.record())
            assert trained(again, 7, stacked=5.0, one_by_one=1.0) == ways
            assert (read_record(folder.path) or {})["stacked"] is True

    def test_of_stacked_rounds_is_refused_where_nothing_can_be_stacked(self) -> None:
        """A run whose clients were stacked cannot be repeated sealed, for instance; one by one it can."""
        stacked = make_choice("on", None, cohort=100).record()
        with pytest.raises(ConfigError, match="each client seals"):
            make_choice("auto", "each client seals its own messages", cohort=100, record=stacked)
        single = make_choice("off", None, cohort=100).record()
        assert not make_choice("auto", WHY, cohort=100, record=single).begin(1)

    @pytest.mark.parametrize("text", [b"", b"{", b"[]", b"{}", b'{"batching": "auto"}', b'{"probes": [{"a": 1}]}'])
    def test_that_is_damaged_is_an_error(self, text: bytes, tmp_path: Path) -> None:
        """No guess is made at how a run was trained."""
        with RunFolder.create(configuration(), tmp_path / "run") as folder:
            folder.write(BATCHING, text)
            with pytest.raises(RunError, match="damaged"):
                make_choice("auto", None, cohort=100, folder=folder)

    def test_says_nothing_where_there_is_none(self, tmp_path: Path) -> None:
        """A folder of a run that has not begun."""
        assert read_record(tmp_path) is None

    def test_is_json(self) -> None:
        """It goes into reports as it is."""
        choice = make_choice("auto", None, cohort=100)
        trained(choice, 5, stacked=0.5, one_by_one=1.0)
        assert Choice.from_record(json.loads(json.dumps(choice.record()))) == choice

"""Secure aggregation between processes: the model of a simulation, sums at the coordinator, kills at every step."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file

from common.config import RunConfig, load_config
from server.service.audit import AUDIT, read_lines
from server.store import RunFolder
from simulations import federation
from simulations.federation import PLAIN, SECURE, compare
from simulations.loopback import SITES, LocalFederation, Party
from simulations.run import execute, prepare
from tests.helpers.leaks import WINDOW, Plaintext
from tests.helpers.processes import wait_until
from tests.helpers.sums import listening
from tests.simulations.test_secagg import furthest


def test_separate_processes_add_up_what_a_simulation_adds_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As close to it, and to a run without masks, as 32 bits are; and no update in any file of the coordinator.

    Not byte for byte: a site's rounding is its own secret. In the first round the clients of the simulation learn what
    those of the federation learn, to the bit, and later nearly so: their updates are what is looked for.
    """
    with listening(monkeypatch) as learnt:
        found = compare(tmp_path, overrides=[SECURE, "rounds=2"])
    assert found["agrees"]
    assert max(found["secure_aggregation"].values()) <= 1e-6
    state = tmp_path / "kits" / "server" / "state"
    (run,) = (state / "runs").iterdir()
    assert [row["aggregation"]["groups"][0]["survivors"] for row in RunFolder.open(run).rounds()] == [4, 4]
    assert len(learnt.updates) == 2 * len(SITES)
    plaintext = Plaintext(learnt.forms)
    files = [path for path in tmp_path.rglob("*") if path.is_file() and path.stat().st_size >= WINDOW]
    at_coordinator = [path for path in files if state in path.parents or path.name == "server.log"]
    assert at_coordinator
    assert not [path for path in at_coordinator if plaintext.found_in(path.read_bytes())]


@pytest.mark.slow
def test_make_federation_also_runs_with_sums(capsys: pytest.CaptureFixture[str]) -> None:
    """All twenty rounds, over two set-ups of keys."""
    assert federation.main(["--secagg", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["agrees"]
    assert found["rounds"] == 20
    assert found["secure_aggregation"]["largest_difference"] <= 1e-5


STEPS = ("set-up", "train", "agree", "unmask")


@dataclass
class Course:
    """Where a run is, by its audit log: the round, and the step that was asked last."""

    path: Path
    server_round: int = 0
    step: str = ""
    ended: bool = False
    _seen: int = 0
    _blobs: set[str] = field(default_factory=set)
    _trained: bool = False

    def moments(self) -> Iterator[tuple[int, str, str]]:
        """Round, step and event of each line that is new."""
        lines = list(read_lines(self.path))
        fresh, self._seen = lines[self._seen :], len(lines)
        for line in fresh:
            self._follow(line)
            yield self.server_round, self.step, str(line["event"])

    def _follow(self, line: dict[str, Any]) -> None:
        self.ended |= line["event"] == "run-ended"
        if line["event"] == "round-started":
            self.server_round, self.step, self._trained = int(str(line["round"])), "set-up", False
            self._blobs = set()
        elif line["event"] == "asked" and line["kind"] == "train":
            self.step, self._trained, self._blobs = "train", True, set()
        elif line["event"] == "asked" and self._trained:
            self._blobs.add(str(line["blob"]))
            self.step = STEPS[1 + min(2, len(self._blobs))]


def kills() -> Iterator[tuple[int, str, str, str]]:
    """Round, step, event and victim: two sites and the coordinator at each step, asked and answered, rounds apart."""
    server_round = 2
    for i, (step, event) in enumerate(itertools.product(STEPS[1:], ("asked", "received"))):
        for victim in (SITES[i % len(SITES)], SITES[(i + 1) % len(SITES)], "server"):
            yield server_round, step, event, victim
            server_round += 2


def with_kills(folder: Path, config: RunConfig) -> tuple[Path, list[str]]:
    """Train while one after the other is killed and started again; the run's folder, and who was killed when."""
    done: list[str] = []
    with LocalFederation(folder) as parties:
        parties.start()
        parties.wait_until_answered()
        with parties.operator() as coordinator:
            run = coordinator.submit(config)["run"]
        course = Course(parties.state / AUDIT)
        for server_round, step, event, name in kills():
            victim: Party = parties.server if name == "server" else parties.clients[name]

            def reached(at: int = server_round, step: str = step, event: str = event) -> bool:
                moments = list(course.moments())
                hit = any(now >= at and (s, e) == (step, event) for now, s, e in moments)
                return hit or course.ended

            wait_until(reached)
            assert not course.ended
            victim.kill()
            victim.start()
            done.append(f"{name} in round {course.server_round} at {step}")
        parties.wait_until_answered()
        with parties.operator() as coordinator:
            for status in coordinator.follow("status", run):
                ended = status
            assert ended["status"] == "completed", ended
            fetched = folder / "fetched"
            coordinator.fetch(run, fetched)
    return parties.state / "runs" / run, done


class Recorded:
    """Asks in a simulation those whose updates were in the sums of a federation."""

    def __init__(self, survivors: Sequence[Sequence[str]]) -> None:
        self._survivors = survivors

    def sample(self, server_round: int, clients: Sequence[str]) -> list[str]:
        return list(self._survivors[server_round - 1])

    def state(self) -> dict[str, Any]:
        return {}

    def restore(self, state: object) -> None:
        """Nothing is kept."""


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_kills_at_every_step_cost_rounds_and_nothing_else(tmp_path: Path) -> None:
    """Whoever is killed, wherever: the run ends, every sum is exact, and none is smaller than the sites allow.

    Exact: a simulation without masks, in which each round asks those whose updates were in that round's sum, ends with
    the same model up to rounding. A round that was given up changed nothing.
    """
    loaded = load_config("heart", [*PLAIN, "privacy.unit=none", SECURE, "rounds=48"])
    run, done = with_kills(tmp_path, loaded.config)
    assert len(done) == 18
    folder = RunFolder.open(run)
    rows = folder.rounds()
    assert [row["server_round"] for row in rows] == list(range(1, 49))
    survivors = [row["survivors"] for row in rows]
    assert all(len(names) in {0, 3, 4} for names in survivors)
    assert sum(len(names) == 4 for names in survivors) >= 10, "those who come back join again"
    for row in rows:
        (group,) = row["aggregation"]["groups"] or [{"survivors": 0, "refused": "none was begun"}]
        assert group["survivors"] == len(row["survivors"])
        assert bool(group["refused"]) == (group["survivors"] == 0)
    replayed = execute(prepare(loaded.plain, folder=tmp_path), sampler=Recorded(survivors))
    assert furthest(dict(replayed.arrays), load_file(run / "model.safetensors")) <= 1e-4

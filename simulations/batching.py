"""Whether the clients of a cohort train stacked, as one computation, or one by one: asked for, or found out and kept.

Both ways end with the same weights up to rounding, and with other bytes. So a run's choice is written down before the
round that follows it begins: a resumed run, and a repeated one, trains each round the way it was trained.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final, Literal, Self, get_args

from torch import nn

from common.config import RunConfig
from common.disk import disk_errors
from common.errors import ConfigError, RunError
from server.store import RunFolder
from server.strategies import replies_needed
from simulations import stacking

Batching = Literal["auto", "on", "off"]

BATCHING: Final = "batching.json"
"""Name in a run's folder."""

SMALLEST_COHORT: Final = 16
"""`auto` trains fewer clients a round one by one: there is little to gain, and small runs stay equal to the byte."""

PROBES: Final = 4
"""`auto` trains so many rounds to compare: odd ones one by one, even ones stacked. Two of each, because the first of a
kind also pays for what is done once."""


def why_one_by_one(
    config: RunConfig, model: nn.Module, *, sealed: bool = False, engine: str = "inline", own_app: bool = False
) -> str | None:
    """Why a run's clients cannot be stacked, as half a sentence; None: they can.

    Args:
        config: The run.
        model: Its model.
        sealed: Whether messages are sealed.
        engine: What calls the clients.
        own_app: Whether they are another ClientApp than Coterie's.
    """
    privacy, cohort, simulation = config.privacy, config.cohort, config.simulation
    reasons = {
        "each client of the Ray engine answers by itself": engine != "inline",
        "the clients are an app of their own": own_app,
        "each client seals its own messages": sealed,
        "each client masks its own update": privacy.secure_aggregation,
        "each client's whole update is clipped": privacy.unit == "client",
        f"the strategy {config.strategy.name} needs each update": replies_needed(config.strategy.name) != "mean",
        "asynchronous aggregation needs each update": config.asynchronous.buffer_size > 0,
        "each client compresses its own update": config.transport.compression != "none",
        "some clients lie": simulation.byzantine_clients > 0,
        "a late client is ended by itself": cohort.deadline_seconds > 0 and not simulation.virtual,
    }
    for reason, applies in reasons.items():
        if applies:
            return reason
    return stacking.why_not(model, config)


@dataclass(frozen=True, kw_only=True, slots=True)
class Probe:
    """What one round cost: CPU seconds of all processes, and the weight of its updates (examples, or clients)."""

    server_round: int
    stacked: bool
    cpu_seconds: float
    weight: float


@dataclass(kw_only=True)
class Choice:
    """How each round of one run was, or is, trained.

    Attributes:
        batching: What was asked for.
        why: Why clients train one by one whatever is quicker; empty where they can be stacked.
        probes: What `auto` has measured.
        stacked: How all rounds that are no probes train; None as long as `auto` does not know.
        keep: Given the record whenever it changed; None keeps nothing.
    """

    batching: Batching
    why: str = ""
    probes: list[Probe] = field(default_factory=list)
    stacked: bool | None = None
    keep: Callable[[Mapping[str, Any]], None] | None = None

    def begin(self, server_round: int) -> bool:
        """Whether a round's cohort trains stacked; on record when this returns."""
        if self.probing(server_round):
            self._keep()  # what earlier rounds have cost
            return server_round % 2 == 0
        if self.stacked is None:
            self.stacked = self._quicker()
            self._keep()
        return self.stacked

    def probing(self, server_round: int) -> bool:
        """Whether a round's cost counts."""
        return self.batching == "auto" and not self.why and server_round <= PROBES

    def measured(self, probe: Probe) -> None:
        """Take note of what a round cost; one that was trained again counts anew."""
        self.probes = [known for known in self.probes if known.server_round != probe.server_round] + [probe]

    def record(self) -> dict[str, Any]:
        """All of it as JSON values."""
        return {
            "batching": self.batching,
            "why": self.why,
            "stacked": self.stacked,
            "probes": [asdict(probe) for probe in self.probes],
        }

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Self:
        """The choice that `record` was called on.

        Raises:
            ValueError: It is no such record.
        """
        try:
            probes = [Probe(**probe) for probe in record["probes"]]
            found = cls(batching=record["batching"], why=record["why"], stacked=record["stacked"], probes=probes)
        except (KeyError, TypeError) as e:
            raise ValueError("not a record of a choice") from e
        if found.batching not in get_args(Batching) or found.stacked not in {None, True, False}:
            raise ValueError("not a record of a choice")
        return found

    def _quicker(self) -> bool:
        """Whether stacking cost less for the same work; the cheaper round of each kind counts, the other began cold."""
        cost = {
            way: [p.cpu_seconds / p.weight for p in self.probes if p.stacked is way and p.weight > 0]
            for way in (True, False)
        }
        return bool(cost[True] and cost[False]) and min(cost[True]) < min(cost[False])

    def _keep(self) -> None:
        if self.keep is not None:
            self.keep(self.record())


def make_choice(
    batching: Batching,
    why: str | None,
    *,
    cohort: int,
    folder: RunFolder | None = None,
    record: Mapping[str, Any] | None = None,
) -> Choice:
    """How a run's rounds are trained.

    Args:
        batching: What was asked for.
        why: What `why_one_by_one` says of the run.
        cohort: How many clients are asked each round.
        folder: The run's folder; what an interrupted run has written there counts, not `batching`.
        record: What another run's `Choice.record` says, where that run is repeated.

    Raises:
        ConfigError: Clients shall be stacked, or were, and cannot be.
        RunError: The folder's record cannot be read or written.
    """
    if record is None and folder is not None:
        record = read_record(folder.path)
    try:
        choice = _fresh(batching, why, cohort) if record is None else Choice.from_record(record)
    except ValueError as e:
        raise RunError("the record of how a run was trained is damaged", hint="start a new run") from e
    if why is not None and not choice.why and (choice.stacked is not False):
        raise ConfigError(
            f"the clients of this run were trained stacked, and cannot be here: {why}",
            hint="carry it out as it was begun",
        )
    if folder is not None:
        choice.keep = lambda said: folder.write(BATCHING, json.dumps(said, indent=2).encode() + b"\n")
        choice._keep()  # noqa: SLF001 - its own maker
    return choice


def read_record(folder: Path) -> dict[str, Any] | None:
    """What a run folder says of how its rounds were trained; None where it says nothing.

    Raises:
        RunError: It cannot be read.
    """
    path = folder / BATCHING
    with disk_errors(path, "read"):
        if not path.is_file():
            return None
        text = path.read_bytes()
    try:
        document = json.loads(text)
    except ValueError:
        document = None
    if not isinstance(document, dict):
        raise RunError(f"{path} is damaged", hint="start a new run")
    return document


def _fresh(batching: Batching, why: str | None, cohort: int) -> Choice:
    if batching == "on" and why is not None:
        raise ConfigError(f"--batching on: the clients cannot be stacked: {why}", hint="use --batching auto")
    if batching == "off":
        return Choice(batching="off", stacked=False)
    if batching == "on":
        return Choice(batching="on", stacked=True)
    if why is None and cohort < SMALLEST_COHORT:
        why = f"a cohort of fewer than {SMALLEST_COHORT} clients gains little"
    return Choice(batching="auto", why=why or "", stacked=None if why is None else False)

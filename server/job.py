"""What the coordinator is given, what it tells while it works, and what it hands back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from numpy.typing import NDArray
from torch import nn

from common.config import RunConfig
from common.crypto import PartyRecord
from common.errors import FailureCode
from common.privacy import Ledger, PrivacyPlan
from common.schema import Examples
from server.cohort import NoiseByRound, Sampler
from server.evaluation import Evaluation
from server.store import RunFolder

Arrays = dict[str, "NDArray[Any]"]


@dataclass(frozen=True, kw_only=True, slots=True)
class SumRecord:
    """One group's sum under secure aggregation: all that anybody learned of its members' updates."""

    members: int
    """How many the group has."""
    asked: int
    survivors: int
    """How many updates are in the sum; 0 if it was not opened."""
    threshold: int
    """So many of a member's neighbours can take off a mask."""
    refused: str = ""
    """Why it was not opened, in a word."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Aggregation:
    """A round under secure aggregation."""

    epoch: int
    """Counts the set-ups of keys."""
    index: int
    """The round's number within its epoch; 0 where none was begun."""
    setup: bool
    """Whether keys were set up for this round, before it."""
    groups: list[SumRecord]


@dataclass(frozen=True, kw_only=True, slots=True)
class ClockRecord:
    """A round on a simulation's clock, in virtual seconds."""

    at_seconds: float
    """When the round ended; the run began at 0."""
    work_seconds: float
    """How long devices were at work for it, all together."""
    wasted_seconds: float
    """The part of it that came to nothing: of devices that went away, or were too late."""


class Clock(Protocol):
    """Virtual time: what would pass where clients are only simulated."""

    def lap(self) -> ClockRecord:
        """What the round took that has just been answered."""

    def state(self) -> dict[str, Any]:
        """What a checkpoint has to keep, as JSON values."""

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take up a checkpoint's state."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RoundRecord:
    """What happened in one round; `None` where nothing was measured."""

    server_round: int
    cohort: list[str]
    survivors: list[str]
    failures: dict[str, str]
    train_loss: float | None
    accuracy: float | None
    loss: float | None
    aggregate_refused: bool
    """Whether the survivors' aggregate was not finite, so that the model stayed as it was."""
    seconds: dict[str, float]
    """Wall seconds of `train`, `aggregate`, `evaluate`, and of the `checkpoint` before this round."""
    clipping_norm: float | None = None
    """What updates were clipped to, under client-level privacy; released."""
    within: float | None = None
    """Noised share of updates within the norm, where it adapts; released, and can lie outside of 0 to 1."""
    aggregation: Aggregation | None = None
    """What was added up, under secure aggregation."""
    staleness: dict[str, int] | None = None
    """How many steps ago each survivor's update began, where aggregation is asynchronous."""
    clock: ClockRecord | None = None
    """What the round took in virtual time, where there is such."""


class Observer:
    """Told of everything as it happens; does nothing unless a method is overridden."""

    def round_started(self, server_round: int, cohort: list[str]) -> None:
        """A cohort was sampled and is about to be asked."""

    def update_received(self, client: str) -> None:
        """A client's masked update is here; what became of it is told once its sum was opened, or given up."""

    def reply_received(self, client: str, failure: FailureCode | None) -> None:
        """A client answered, or failed to."""

    def round_finished(self, record: RoundRecord) -> None:
        """A round is complete; its checkpoint is written next."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """A run to be coordinated.

    Attributes:
        config: The run's configuration.
        model: A model with the starting weights; it becomes the trained one.
        held_out: The coordinator's own examples, or None.
        plan: The privacy plan, or None without privacy.
        folder: Where rounds and checkpoints are kept, or None to keep nothing.
        sampler: Who is asked; None makes one from the configuration.
        observer: Told of everything.
        ledger: The coordinator's own record of what it releases; needed under client-level privacy.
        noise: Where the coordinator's noise and Poisson cohorts come from; None takes fresh secure sources.
        run_id: Names the run to sites that ask for its authorization; 32 hexadecimal digits, or empty in a simulation.
        authorization: What an operator signed for this run; sites that have a policy read it.
        sites: Pinned records of the sites by name; needed under secure aggregation.
        clock: Virtual time, where clients are simulated and have devices.
    """

    config: RunConfig
    model: nn.Module
    held_out: Examples | None = None
    plan: PrivacyPlan | None = None
    folder: RunFolder | None = None
    sampler: Sampler | None = None
    observer: Observer = field(default_factory=Observer)
    ledger: Ledger | None = None
    noise: NoiseByRound | None = None
    run_id: str = ""
    authorization: str = ""
    sites: Mapping[str, PartyRecord] = field(default_factory=dict)
    clock: Clock | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """A finished run: the chosen round's weights and what is known of them."""

    arrays: Arrays
    rounds: int
    selected_round: int
    evaluation: Evaluation | None
    stopped_early: bool

"""What all ways of asking share: the question of one round, and the answers as a strategy sees them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from flwr.app import ConfigRecord, Message
from flwr.serverapp import Grid
from numpy.typing import NDArray

from common.config import RunConfig
from common.errors import FailureCode
from common.flower import TRAIN_LOSS
from server.job import Aggregation, Arrays, Observer
from server.strategies import minimum_replies


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Call:
    """One round, as it is put to its cohort.

    Attributes:
        server_round: The round.
        cohort: Who is asked, by name.
        nodes: Node ids of the run's clients, by name.
        grid: Reaches them.
        record: What every request of the round says of its run.
        timeout: Seconds for every answer, or None.
        observer: Told of every client's fate.
        names: The cohort's names by node id, in the cohort's order; of those that are there.
        fates: Why a client's update does not count, or None where it does; filled while answers come.
    """

    server_round: int
    cohort: Sequence[str]
    nodes: Mapping[str, int]
    grid: Grid
    record: ConfigRecord
    timeout: float | None
    observer: Observer
    names: dict[int, str] = field(init=False)
    fates: dict[str, FailureCode | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        names = {node: name for name in self.cohort if (node := self.nodes.get(name)) is not None}
        object.__setattr__(self, "names", names)

    def tell(self, name: str, fate: FailureCode | None) -> None:
        """Note what became of a client's update."""
        self.fates[name] = fate
        self.observer.reply_received(name, fate)

    def tell_of(self, message: Message, fate: FailureCode | None) -> None:
        """The same, of the client that a message went to."""
        self.tell(self.names[message.metadata.dst_node_id], fate)

    @property
    def survivors(self) -> list[str]:
        """Those whose updates count, in the cohort's order."""
        return [name for name in self.cohort if name in self.fates and self.fates[name] is None]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Answers:
    """What a strategy sees of a round.

    Attributes:
        replies: In any order; failed ones may be among them.
        enough: Whether the strategy may step.
        clipping_norm: What updates were clipped to, where that is released.
        within: Noised share of updates within it, where that is.
        aggregation: What secure aggregation added up.
        staleness: How many steps ago each update began, where they began at different ones.
    """

    replies: list[Message]
    enough: bool
    clipping_norm: float | None = None
    within: float | None = None
    aggregation: Aggregation | None = None
    staleness: dict[str, int] | None = None


class Asking(Protocol):
    """Asks cohorts, round by round."""

    tells_cohort: bool
    """Whether clients are told who else is asked."""

    def describe(self, record: ConfigRecord) -> None:
        """Add to a round's request what only this way of asking says."""

    def cohort(self, server_round: int, drawn: list[str]) -> list[str]:
        """Whom a round is about: those who were drawn, unless it took place before this process began."""

    def prepare(self, call: Call, model: Arrays) -> Arrays:
        """The model that the round begins with: that which is there, but where clients could not train from it."""

    def ask(self, call: Call, messages: Sequence[Message], model: Arrays) -> Answers:
        """Put the strategy's messages to the cohort; every client's fate is told once."""

    def state(self) -> dict[str, NDArray[Any]]:
        """What a checkpoint has to keep; secret."""

    def restore(self, state: Mapping[str, NDArray[Any]], *, server_round: int) -> None:
        """Continue after a checkpoint of that round.

        Raises:
            RunError: It is not of this run.
        """

    def close(self) -> None:
        """The run ends, however it does: nobody is waited for any more."""


class Stateless:
    """What an `Asking` does that keeps nothing from round to round."""

    tells_cohort = True

    def describe(self, record: ConfigRecord) -> None:
        """Nothing more."""

    def cohort(self, server_round: int, drawn: list[str]) -> list[str]:  # noqa: ARG002 - see `Asking`
        """Those who were drawn."""
        return drawn

    def prepare(self, call: Call, model: Arrays) -> Arrays:  # noqa: ARG002 - see `Asking`
        """The model as it is."""
        return model

    def state(self) -> dict[str, NDArray[Any]]:
        """Nothing."""
        return {}

    def restore(self, state: Mapping[str, NDArray[Any]], *, server_round: int) -> None:
        """Nothing to do."""

    def close(self) -> None:
        """Nobody is waited for."""


def fewest_replies(config: RunConfig) -> int:
    """With fewer updates a round leaves the model as it is."""
    return max(config.cohort.min_survivors, minimum_replies(config.strategy))


def told_metrics(config: RunConfig) -> tuple[str, ...]:
    """What a reply holds beside weights and weight: nothing that was not paid for."""
    return () if config.private else (TRAIN_LOSS,)

"""Replies as they are: each that is sound counts, in their mean or by itself."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from flwr.app import Message

from common.config import RunConfig
from common.transport.compression import Compression
from server.asking.base import Answers, Call, Stateless, fewest_replies, told_metrics
from server.grids import CheckedGrid, DecompressingGrid, FoldingGrid, SpoolingGrid
from server.grids.broadcast import Broadcast, CohortGrid, Fate
from server.job import Arrays, Job
from server.strategies import largest_value, replies_needed


class PlainAsking(Stateless):
    """Without noise of the coordinator's and without masks."""

    def __init__(self, job: Job) -> None:
        self._job = job

    def ask(self, call: Call, messages: Sequence[Message], model: Arrays) -> Answers:
        """Ask the cohort; a strategy that needs only the mean gets one reply that holds it."""
        config = self._job.config
        whole = _as_a_whole(call, messages, largest=largest_value(config.strategy))
        replies = self._one_by_one(call, messages, model) if whole is None else list(whole)
        return Answers(replies=replies, enough=len(call.survivors) >= fewest_replies(config))

    def _one_by_one(self, call: Call, messages: Sequence[Message], model: Arrays) -> list[Message]:
        """A reply from each client, checked and, if the strategy needs only the mean, folded into one."""
        config, folder = self._job.config, self._job.folder
        checked = checked_grid(call, config, model, metrics=told_metrics(config))
        kind = FoldingGrid if replies_needed(config.strategy.name) == "mean" else SpoolingGrid
        asking = kind(checked, folder=folder.path if folder else None)
        return list(asking.send_and_receive(messages, timeout=call.timeout))


def _as_a_whole(call: Call, messages: Sequence[Message], *, largest: float) -> Iterator[Message] | None:
    """The cohort's one reply, where the grid can train it as a whole and chooses to; None asks single clients."""
    if not isinstance(messages, Broadcast) or not isinstance(call.grid, CohortGrid):
        return None
    answers = call.grid.fold(messages, largest=largest, timeout=call.timeout)
    return None if answers is None else _told(call, answers)


def _told(call: Call, answers: Iterable[Fate | Message]) -> Iterator[Message]:
    """The replies among the answers; each client's fate is told on the way."""
    for answer in answers:
        if isinstance(answer, Fate):
            call.tell(call.names[answer.node_id], answer.failure)
        else:
            yield answer


def checked_grid(call: Call, config: RunConfig, model: Arrays, *, metrics: Iterable[str]) -> CheckedGrid:
    """The call's grid, from which only sound replies come, with whole weights."""
    how = Compression.of(config.transport)
    return CheckedGrid(
        call.grid if how.codec == "none" else DecompressingGrid(call.grid, template=model, how=how),
        template=model,
        equal_weights=config.private or config.strategy.weighting == "equal",
        metrics=metrics,
        largest=largest_value(config.strategy),
        on_reply=call.tell_of,
    )

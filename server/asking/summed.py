"""Secure aggregation: the strategy sees the mean of each group's sum, which is stored before anybody sees it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Final

import numpy as np
import structlog
from flwr.app import Message
from flwr.serverapp import Grid

from common.aggregation import add_update, codec_for, covered, rules_for
from common.errors import ConfigError, RunError
from common.fingerprint import model_digest
from common.secagg.fixed_point import Codec, Decoded
from server.asking.base import Answers, Call, Stateless
from server.grids import FoldingGrid, SpoolingGrid, WrappingGrid, trainable_names
from server.grids.mean_reply import one_reply, parts
from server.grids.secagg import SecAggGrid
from server.job import Aggregation, Arrays, Job, SumRecord
from server.secagg.session import Beginning, Session
from server.stored import StoredRound, StoredRounds
from server.strategies import minimum_replies, replies_needed

log = structlog.get_logger()

FOLDER: Final = "opened"
"""Of the stored sums, inside the folder of checkpoints."""
_RUN_ID_BYTES: Final = 16


class SummedAsking(Stateless):
    """Asks cohorts for masked updates; a round whose sums were opened before this process began asks nobody."""

    def __init__(self, job: Job) -> None:
        """Prepare a run.

        Raises:
            ConfigError: The sites' records are not there: nobody could tell whose keys are whose.
            RunError: The run's folder is damaged.
        """
        if not job.sites:
            raise ConfigError("secure aggregation needs the sites' pinned records", hint="give the job its sites")
        config, digest = job.config, bytes.fromhex(job.config.digest())
        run_id = bytes.fromhex(job.run_id) if job.run_id else hashlib.sha256(digest).digest()[:_RUN_ID_BYTES]
        self._job = job
        self._session = Session(
            rules_for(config, run_id),
            records=job.sites,
            folder=job.folder.path if job.folder else None,
            rounds=config.rounds,
            fixed_cohort=not config.cohort.size,
        )
        self._trainable = set(trainable_names(job.model)) if config.distributed else None
        self._store = StoredRounds(job.folder.checkpoints / FOLDER if job.folder else None, run=config.digest())
        self._stored: StoredRound | None = None
        self._base, self._moves = b"", 0

    def cohort(self, server_round: int, drawn: list[str]) -> list[str]:
        """Those who were drawn, or the cohort of sums that are on the disk.

        Raises:
            RunError: These are damaged, or of another configuration.
        """
        self._stored = self._store.find(server_round)
        return drawn if self._stored is None else self._stored.cohort

    def prepare(self, call: Call, model: Arrays) -> Arrays:
        """The model; moved by the smallest step, where clients may refuse to train from it a second time.

        That is so where a round from the same model was agreed on and then lost: it can be neither opened any more nor
        burnt. Without a step the run would have to end there.
        """
        if self._stored is not None:
            self._moves = int(self._stored.facts["moves"])
            for _ in range(self._moves):
                model = moved(model)
            return model
        self._base, self._moves = model_digest(model), 0
        while self._session.lost(call, self._base):
            log.warning("model_moved_by_one_unit", server_round=call.server_round)
            model = moved(model)
            self._base, self._moves = model_digest(model), self._moves + 1
        return model

    def ask(self, call: Call, messages: Sequence[Message], model: Arrays) -> Answers:
        """Ask the cohort, or take what was opened.

        Raises:
            RunError: The disk is full or cannot be written. No sum was shown to anybody.
        """
        stored, self._stored = self._stored, None
        asked = {call.names[message.metadata.dst_node_id]: message for message in messages}
        replies, aggregation = self._again(stored, call, asked, model) if stored else self._anew(call, asked, model)
        fewest = self._job.config.cohort.min_survivors
        sums = sum(reply.has_content() for reply in replies)
        return Answers(
            replies=replies,
            enough=sums >= minimum_replies(self._job.config.strategy) and len(call.survivors) >= fewest,
            aggregation=aggregation,
        )

    def _anew(self, call: Call, messages: Mapping[str, Message], model: Arrays) -> tuple[list[Message], Aggregation]:
        """Ask."""
        beginning = self._session.begin(call, base=self._base, codec=lambda clients: self._codec(call, model, clients))
        for name, failure in beginning.out.items():
            call.tell(name, failure)
        asking = SecAggGrid(
            call.grid,
            sums=beginning.sums,
            nodes=call.nodes,
            record=call.record,
            tell=call.tell,
            keep=lambda: self._keep(call, beginning),
            reply=lambda decoded, message: self._reply(model, decoded, message),
            riding=beginning.riding,
            arrived=call.observer.update_received,
        )
        asked = [message for name, message in messages.items() if name not in beginning.out]
        replies = self._gathered(asking, asked, call.timeout) if asked else []
        self._session.end(beginning.sums)
        return replies, _aggregation(beginning)

    def _again(
        self, stored: StoredRound, call: Call, messages: Mapping[str, Message], model: Arrays
    ) -> tuple[list[Message], Aggregation]:
        """What a round came to whose sums were stored; the strategy gets it in the same order, to the same messages."""
        for name, fate in stored.fates.items():
            call.tell(name, fate)
        facts = stored.facts["aggregation"]
        aggregation = Aggregation(**{**facts, "groups": [SumRecord(**group) for group in facts["groups"]]})
        opened = [group for group in aggregation.groups if group.survivors]
        replies = []
        for i, (group, first) in enumerate(zip(opened, stored.facts["first"], strict=True)):
            codec = self._codec(call, model, group.asked)
            decoded = codec.decode(np.asarray(stored.arrays[str(i)]), group.survivors)
            if decoded.weight > 0:
                replies.append(self._reply(model, decoded, messages[first]))
        return self._gathered(_Ready(call.grid, replies), list(messages.values()), call.timeout), aggregation

    def _codec(self, call: Call, model: Arrays, clients: int) -> Codec:
        job = self._job
        return codec_for(job.config, model, participants=clients, plan=job.plan, server_round=call.server_round)

    def _gathered(self, grid: Grid, messages: list[Message], timeout: float | None) -> list[Message]:
        """What the strategy is shown of the sums: its one mean, or each group's."""
        config, folder = self._job.config, self._job.folder
        if config.secagg.group_size:
            kind = FoldingGrid if replies_needed(config.strategy.name) == "mean" else SpoolingGrid
            grid = kind(grid, folder=folder.path if folder else None)
        return list(grid.send_and_receive(messages, timeout=timeout))

    def _keep(self, call: Call, beginning: Beginning) -> None:
        """Store what was opened, before anybody sees it."""
        opened = [each for each in beginning.sums if each.total is not None]
        self._store.keep(
            call.server_round,
            arrays={str(i): each.total for i, each in enumerate(opened) if each.total is not None},
            facts={
                "aggregation": asdict(_aggregation(beginning)),
                "first": [min(each.round.survivors) for each in opened],
                "moves": self._moves,
            },
            cohort=call.cohort,
            fates=call.fates,
        )

    def _reply(self, model: Arrays, decoded: Decoded, to: Message | None) -> Message:
        """What a strategy is shown of a sum."""
        template, update = covered(model), decoded.update
        if self._trainable is not None:  # every entry has noise: of running statistics nothing else would be left
            for name, part in parts(model, list(template), update):
                if name not in self._trainable:
                    part[:] = 0
        arrays = add_update(model, update)
        return one_reply(arrays, to=to, weight=decoded.weight, metrics=decoded.metrics)


class _Ready(WrappingGrid):
    """Answers that are there already, in the order of the messages that they belong to."""

    def __init__(self, inner: Grid, replies: Sequence[Message]) -> None:
        super().__init__(inner)
        self._replies = replies

    def stream(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterator[Message]:  # noqa: ARG002
        """Nobody is asked."""
        yield from self._replies


def _aggregation(beginning: Beginning) -> Aggregation:
    """For the round's record."""
    return Aggregation(
        epoch=beginning.epoch,
        index=max((each.round.index for each in beginning.sums), default=0),
        setup=beginning.setup,
        groups=[each.record() for each in beginning.sums],
    )


def moved(model: Arrays) -> Arrays:
    """The same model with one weight moved by one unit in the last place.

    Raises:
        RunError: It has no weight that can be moved.
    """
    for name, values in model.items():
        if values.dtype.kind == "f" and values.size:
            changed = values.copy()
            changed.flat[0] = np.nextafter(values.flat[0], np.array(np.inf, values.dtype))
            return {**model, name: changed}
    raise RunError("the round was lost, and clients train from the same model only once", hint="start the run again")

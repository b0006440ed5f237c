"""Runs under secure aggregation over members that are real and clients that only pretend to train.

A test says by leg what becomes of a client: it can vanish, lose its memory, or send something else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, Message, RecordDict
from numpy.typing import NDArray

from common.aggregation import codec_for, covered, flatten, rules_for
from common.config import RunConfig
from common.errors import FailureCode
from common.fingerprint import model_digest
from common.flower import (
    ARRAYS,
    MASKED,
    ROUND,
    ROUND_STEP,
    SECAGG,
    SETUP_STEP,
    TRAIN_LOSS,
    NodeInfo,
    arrays_of,
    config_of,
    failure_reply,
    from_record,
    to_record,
)
from common.privacy import PrivacyPlan
from common.secagg import Member, SecAggError, kind_of
from common.secagg.messages import Train
from common.secagg.packing import pack
from server.coordinator import Coordinator, Job, Outcome
from server.store import RunFolder
from tests.helpers.grids import ScriptedGrid
from tests.helpers.releasing import Net
from tests.helpers.runs import Log, configuration
from tests.helpers.secagg import MemoryJournal, site

FIRST = 2
RUN_ID = bytes(range(16))

VANISH = "vanish"
"""No answer, ever, to this message."""
FORGET = "forget"
"""A new process takes the message: of the member, only the journal is left."""

Fault = str | FailureCode | Callable[[Message, Message], Message]
Faults = Callable[[str, str, int], Fault | None]
"""What becomes of a client, by its name, the leg (the kind of the step) and the round; None lets it answer."""


def masked(**changes: Any) -> RunConfig:
    """Four rounds under secure aggregation; changes of `privacy` and `secagg` extend their tables."""
    privacy = {"secure_aggregation": True, **changes.pop("privacy", {})}
    strategy = {"weighting": "equal", **changes.pop("strategy", {})}
    return configuration(**{"rounds": 4, "privacy": privacy, "strategy": strategy, **changes})


class Members(ScriptedGrid):
    """Clients of one run: each has an identity, a member and a journal that outlives the member.

    Attributes:
        change: What a client's training adds to every value, by name and round.
        weight: How many examples a client has.
        faults: See `Faults`.
        plan: How much noise each adds to its update, or None.
        trained: Names and rounds of all trainings.
        kinds: Kind of every step that was sent, with the round and the name.
        updates: Each client's last update, float64[d].
    """

    def __init__(
        self,
        config: RunConfig,
        clients: int = 5,
        *,
        change: Callable[[str, int], Any] = lambda name, server_round: 0.01 * int(name[-2:]) + 0.1 * server_round,
        weight: Callable[[str], float] = lambda _name: 1.0,
        faults: Faults = lambda *_: None,
        plan: PrivacyPlan | None = None,
    ) -> None:
        super().__init__(self._answer, range(FIRST, FIRST + clients))
        self.config, self.change, self.weight, self.faults = config, change, weight, faults
        self.plan = plan
        self.names = [f"site-{i:02d}" for i in range(clients)]
        self.records = {name: site(name).record for name in self.names}
        self.journals = {name: MemoryJournal() for name in self.names}
        self.members: dict[str, Member] = {}
        self.trained: list[tuple[str, int]] = []
        self.kinds: list[tuple[str, int, str]] = []
        self.updates: dict[str, NDArray[np.float64]] = {}

    def get_nodes(self) -> Iterable[NodeInfo]:
        return [NodeInfo(node_id=FIRST + i, name=name) for i, name in enumerate(self.names)]

    def restart(self, name: str) -> None:
        """Forget a client's memory, not its journal."""
        self.members.pop(name, None)

    def member(self, name: str) -> Member:
        if name not in self.members:
            rules = rules_for(self.config, RUN_ID)
            self.members[name] = Member(
                name, signer=site(name), peers=self.records, rules=rules, journal=self.journals[name]
            )
        return self.members[name]

    def _answer(self, messages: list[Message]) -> Iterator[Message]:
        for message in messages:
            name = self.names[message.metadata.dst_node_id - FIRST]
            server_round = int(str(config_of(message.content)[ROUND]))
            steps = {key: values.tobytes() for key, values in from_record(message.content[SECAGG]).items()}  # type: ignore[arg-type]
            kinds = [kind_of(steps[key]) for key in (ROUND_STEP, SETUP_STEP) if key in steps]
            self.kinds += [(kind, server_round, name) for kind in kinds]
            fault = next((f for kind in kinds if (f := self.faults(name, kind, server_round)) is not None), None)
            if fault == VANISH:
                continue
            if fault == FORGET:
                self.restart(name)
            if isinstance(fault, FailureCode):
                yield failure_reply(message, fault)
                continue
            reply = self._reply(name, message, steps, server_round)
            yield fault(message, reply) if callable(fault) else reply

    def _reply(self, name: str, message: Message, steps: dict[str, bytes], server_round: int) -> Message:
        member, answers, content = self.member(name), {}, RecordDict()
        try:
            if SETUP_STEP in steps:
                answers[SETUP_STEP] = member.answer(steps[SETUP_STEP])
            if ARRAYS in message.content:
                content[ARRAYS] = to_record({MASKED: self._masked(name, message, steps[ROUND_STEP], server_round)})
            elif ROUND_STEP in steps:
                answers[ROUND_STEP] = member.answer(steps[ROUND_STEP])
        except SecAggError as e:
            code = FailureCode.NOT_IN_EPOCH if e.reason == "epoch" else FailureCode.AGGREGATION_REFUSED
            return failure_reply(message, code)
        if answers:
            content[SECAGG] = to_record({key: np.frombuffer(data, np.uint8) for key, data in answers.items()})
        return Message(content, reply_to=message)

    def _masked(self, name: str, message: Message, step: bytes, server_round: int) -> NDArray[np.uint8]:
        start = arrays_of(message.content)
        codec = codec_for(
            self.config,
            start,
            participants=len(Train.from_bytes(step).participants),
            plan=self.plan,
            server_round=server_round,
        )
        mask = self.member(name).begin(step, server_round=server_round, base=model_digest(start), codec=codec.digest)
        self.trained.append((name, server_round))
        change = self.change(name, server_round)
        trained = {key: values + np.asarray(change, values.dtype) for key, values in start.items()}
        self.updates[name] = flatten(covered(start), start, trained)
        vector = codec.encode(
            self.updates[name],
            weight=self.weight(name),
            metrics={TRAIN_LOSS: 0.5},
            seed=f"{name}/{server_round}".encode().ljust(32),
        )
        mask.apply(vector)
        return pack(vector, codec.bits)


def coordinate(
    config: RunConfig, grid: Members, *, folder: RunFolder | None = None, observer: Log | None = None, **job: Any
) -> Outcome:
    """A run of `Net` over these members."""
    observer = observer or Log()
    observer.folder = folder
    return Coordinator(
        Job(
            config=config,
            model=Net(),
            folder=folder,
            observer=observer,
            run_id=RUN_ID.hex(),
            sites=grid.records,
            **job,
        )
    ).run(grid)


def answering(**arrays: NDArray[Any]) -> Callable[[Message, Message], Message]:
    """A client that sends these arrays instead of its masked update."""

    def answer(message: Message, reply: Message) -> Message:
        return Message(RecordDict({**reply.content, ARRAYS: to_record(arrays)}), reply_to=message)

    return answer


def stepping(data: bytes, key: str = ROUND_STEP) -> Callable[[Message, Message], Message]:
    """A client that sends these bytes instead of its step."""

    def answer(message: Message, reply: Message) -> Message:
        step = to_record({key: np.frombuffer(data, np.uint8)})
        return Message(RecordDict({**reply.content, SECAGG: step}), reply_to=message)

    return answer


def garbled(message: Message, reply: Message) -> Message:
    """A client whose arrays are no arrays."""
    del reply
    record = ArrayRecord({MASKED: Array(dtype="uint8", shape=(3,), stype="numpy.ndarray", data=b"nonsense")})
    return Message(RecordDict({ARRAYS: record}), reply_to=message)

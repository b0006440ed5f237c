"""A coordinator that adds up what real clients' apps answer: every message of the protocol as Flower carries it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from flwr.app import ConfigRecord, Message, RecordDict
from numpy.typing import NDArray

from common.aggregation import codec_for, rules_for
from common.config import RunConfig
from common.crypto import PartyRecord
from common.fingerprint import model_digest
from common.flower import (
    ARRAYS,
    CONFIG,
    MASKED,
    ROUND_STEP,
    SECAGG,
    SECAGG_TYPE,
    SETUP_STEP,
    arrays_of,
    failure_of,
    from_record,
    stamp,
    to_record,
)
from common.secagg import Group, Round, Setup

Arrays = Mapping[str, NDArray[Any]]
App = Callable[[Message], Message]


class Summing:
    """Asks apps by name, and keeps to the protocol but where a test says otherwise.

    Attributes:
        apps: How each client is asked. One that a test removes does not answer.
        fields: What every request says of its run.
        replies: The last answers, by name.
    """

    def __init__(
        self, config: RunConfig, apps: Mapping[str, App], records: Mapping[str, PartyRecord], **fields: Any
    ) -> None:
        self.config, self.apps, self.records = config, dict(apps), dict(records)
        self.fields = {"run": config.canonical_json(), "server-round": 1} | fields
        named = hashlib.sha256(bytes.fromhex(config.digest())).hexdigest()[:32]
        self.run_id = bytes.fromhex(str(self.fields.get("run-id", named)))
        self.replies: dict[str, Message] = {}

    def step(self, kind: str, data: bytes, **changes: Any) -> Message:
        """A message with nothing but one step."""
        content = RecordDict({CONFIG: ConfigRecord(self.fields | changes), SECAGG: steps(**{kind: data})})
        return stamp(Message(content, 2, SECAGG_TYPE), message_id="m")

    def ask(self, kind: str, requests: Mapping[str, bytes]) -> dict[str, bytes]:
        """The answers to steps, of those who answer."""
        self.replies = {
            name: self.apps[name](self.step(kind, data)) for name, data in requests.items() if name in self.apps
        }
        return {name: step_of(reply, kind) for name, reply in self.replies.items() if reply.has_content()}

    def set_up(self) -> Group:
        """An epoch of everybody."""
        setup = Setup(rules_for(self.config, self.run_id), records=self.records, names=sorted(self.records))
        while setup.leg is not None:
            for name, answer in self.ask(SETUP_STEP, setup.requests()).items():
                setup.receive(name, answer)
            setup.advance()
        (group,) = setup.groups()
        return group

    def begin(self, group: Group, model: Arrays, *, burnt: Sequence[bytes] = (), server_round: int = 1) -> Round:
        """The next round, of which nobody has heard yet."""
        codec = codec_for(self.config, model, participants=len(group.live), plan=None, server_round=server_round)
        return group.begin(
            server_round=server_round,
            base=model_digest(model),
            codec=codec.digest,
            size=codec.size,
            participants=tuple(group.live),
            burnt=burnt,
        )

    def training(self, request: bytes, model: Arrays, *, server_round: int = 1, **more: bytes) -> Message:
        """The message of a round to one client."""
        record = ConfigRecord(self.fields | {"server-round": server_round})
        content = RecordDict({ARRAYS: to_record(model), CONFIG: record, SECAGG: steps(**{ROUND_STEP: request, **more})})
        return stamp(Message(content, 2, "train"), message_id="m")

    def train(self, round_: Round, model: Arrays, *, server_round: int = 1) -> dict[str, Message]:
        """Ask everybody who takes part for a masked update, and add up what comes."""
        self.replies = {
            name: self.apps[name](self.training(request, model, server_round=server_round))
            for name, request in round_.requests().items()
            if name in self.apps
        }
        for name, reply in self.replies.items():
            if reply.has_content():
                round_.add(name, arrays_of(reply.content)[MASKED])
        return self.replies

    def open(self, round_: Round) -> NDArray[np.uint32]:
        """Have the survivors agree, and take the masks off the sum."""
        agree = round_.agree()
        for name, answer in self.ask(ROUND_STEP, dict.fromkeys(round_.survivors, agree)).items():
            round_.stated(name, answer)
        unmask = round_.unmask()
        for name, answer in self.ask(ROUND_STEP, dict.fromkeys(round_.signers, unmask)).items():
            round_.shares(name, answer)
        return round_.result()

    def burn(self, round_: Round) -> bytes:
        """The certificate that a round is given up."""
        burning = round_.burning()
        for name, answer in self.ask(ROUND_STEP, dict.fromkeys(burning.participants, burning.request())).items():
            burning.stated(name, answer)
        return burning.certificate()

    @property
    def failures(self) -> set[str]:
        """Why clients did not answer what they were asked last."""
        return {failure.slug for failure in map(failure_of, self.replies.values()) if failure is not None}


def steps(**data: bytes) -> Any:
    """The record of steps."""
    return to_record({key: np.frombuffer(value, np.uint8) for key, value in data.items()})


def step_of(reply: Message, kind: str) -> bytes:
    """A step in an answer."""
    record: Any = reply.content[SECAGG]
    return from_record(record)[kind].tobytes()

"""A chunk: several clients asked by one message, trained as one computation, answered as weighted sums.

What each client is owed stays: its own data, noise source and ledger, written ahead of the first noisy step, and a
failure of its own.
"""

from __future__ import annotations

import gc
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Final

import numpy as np
import structlog
from flwr.app import ConfigRecord, Context, Message, RecordDict
from numpy.typing import NDArray

from client.request import TrainRequest, parse_request, read_arrays
from client.spool import Release, Spool
from client.trainer import learning_rate_at, resolve_device
from common.errors import BudgetExhaustedError, CoterieError, FailureCode, PeerError
from common.fingerprint import model_digest
from common.flower import ARRAYS, CONFIG, TRAIN_LOSS, WEIGHT, client_context, failure_of, update_reply
from common.models import build_model
from common.privacy import NoiseSource
from common.schema import ClientData
from common.transport.records import decode_records, encode_records
from server.grids.base import FIRST_NODE
from server.grids.broadcast import Fate
from simulations.insecure import FixedNoise
from simulations.sites import SPOOL, SimulatedSites
from simulations.stacking import Member, Stack

log = structlog.get_logger()

COHORT_TYPE: Final = "train.cohort"
"""Type of the messages that ask for a whole chunk."""

CHUNK: Final = "chunk"
"""Record of a chunk's message: `PARTITIONS` (int64[n] as bytes) and `LARGEST`; of its reply: `FAILURES`."""
PARTITIONS, LARGEST, FAILURES = "partitions", "largest", "failures"

_SOUND: Final = 0
"""In `FAILURES` (int16[n] as bytes) of a member whose update is in the sums; else its `FailureCode`."""


_OBJECTS: Final = 10_000
"""So many new ones before a chunk looks for garbage; a stack's steps make a few hundred each."""


def chunk_message(template: Message, nodes: Sequence[int], *, largest: float) -> Message:
    """What asks for a chunk: as `template` asks one client, addressed to the first of `nodes`.

    Args:
        template: With the model and the request, which are not copied.
        nodes: The members, in their order.
        largest: What a value may be; see `server.grids.broadcast`.
    """
    partitions = np.asarray(nodes, dtype=np.int64) - FIRST_NODE
    content = RecordDict({ARRAYS: template.content[ARRAYS], CONFIG: template.content[CONFIG]})
    content[CHUNK] = ConfigRecord({PARTITIONS: partitions.tobytes(), LARGEST: largest})
    return Message(content, nodes[0], COHORT_TYPE, ttl=template.metadata.ttl)


def fates(nodes: Sequence[int], reply: Message) -> Iterator[Fate]:
    """What became of a chunk's members: of all the same where the chunk has failed."""
    if (failure := failure_of(reply)) is not None:
        for node in nodes:
            yield Fate(node_id=node, failure=failure)
        return
    codes = np.frombuffer(reply.content[CHUNK][FAILURES], np.int16)  # type: ignore[arg-type]
    for node, code in zip(nodes, codes.tolist(), strict=True):
        yield Fate(node_id=node, failure=FailureCode(code) if code else None)


class ChunkTrainer:
    """The client end: trains a chunk's members and answers with their weighted sums.

    Guarantee: with privacy, what a chunk releases is in its members' ledgers before the first noisy step, in one
    transaction; a chunk that was answered before is answered with the same bytes, never with fresh noise.
    """

    def __init__(self, sites: SimulatedSites) -> None:
        self._sites = sites
        self._stack: Stack | None = None

    def __call__(self, message: Message, context: Context) -> Message:  # noqa: ARG002 - a chunk has many contexts
        """Answer a message of type `train.cohort`."""
        sites, request = self._sites, parse_request(message)
        sites.policy.check(request.config)
        if request.plan is not None:
            sites.policy.check_plan(request.plan)
        partitions, largest = self._asked(message, request)
        start = read_arrays(message)
        if request.plan is None:
            with _few_collections():
                return self._train(message, start, request, partitions, largest)
        spool = Spool(sites.folder / SPOOL, owner=f"@chunk-{partitions[0]}")
        release = Release(run=request.digest, server_round=request.server_round, base=_base(start, partitions))
        if (stored := spool.load(release)) is not None:
            return Message(decode_records(stored), reply_to=message)
        with _few_collections():
            reply = self._train(message, start, request, partitions, largest)
        spool.drop_before(request.digest, request.server_round, others=request.server_round)
        spool.save(release, b"".join(encode_records(reply.content)))
        return reply

    def _asked(self, message: Message, request: TrainRequest) -> tuple[list[int], float]:
        """Which clients, and how large a value may be."""
        try:
            said = message.content[CHUNK]
            partitions, largest = np.frombuffer(said[PARTITIONS], np.int64), said[LARGEST]  # type: ignore[arg-type]
        except (KeyError, TypeError, ValueError) as e:
            raise PeerError(FailureCode.INVALID_REQUEST) from e
        known = len(self._sites.federation.clients)
        if (
            request.digest != self._sites.digest
            or not isinstance(largest, float)
            or not partitions.size
            or not 0 <= partitions.min() <= partitions.max() < known
            or len(np.unique(partitions)) < len(partitions)
        ):
            raise PeerError(FailureCode.INVALID_REQUEST)
        return partitions.tolist(), largest

    def _train(
        self,
        message: Message,
        start: Mapping[str, NDArray[Any]],
        request: TrainRequest,
        partitions: Sequence[int],
        largest: float,
    ) -> Message:
        config, stack = request.config, self._stack or self._make_stack(request)
        self._stack = None  # a stack that failed half way is not used again
        failures: dict[int, FailureCode] = {}
        self._reserve(partitions, request, failures)
        able = self._clients(partitions, failures)
        folded = stack.train(
            start,
            self._members(able, request),
            server_round=request.server_round,
            rate=learning_rate_at(config.training, request.server_round, config.rounds),
            plan=request.plan,
            proximal_mu=request.proximal_mu,
            largest=largest,
        )
        self._stack = stack
        failures |= {p: failure for p, failure in zip(able, folded.failures, strict=True) if failure is not None}
        reply = update_reply(message, folded.sums, {WEIGHT: folded.weight, TRAIN_LOSS: folded.loss})
        codes = np.full(len(partitions), _SOUND, dtype=np.int16)
        for place, partition in enumerate(partitions if failures else ()):
            codes[place] = failures.get(partition, _SOUND)
        reply.content[CHUNK] = ConfigRecord({FAILURES: codes.tobytes()})
        return reply

    def _clients(self, partitions: Sequence[int], failures: dict[int, FailureCode]) -> dict[int, ClientData]:
        """The data of those who have not failed; what fails while it is made fails that client alone."""
        clients, population = {}, self._sites.federation.clients
        for partition in [p for p in partitions if p not in failures] if failures else partitions:
            try:
                clients[partition] = population[partition]
            except Exception as e:  # noqa: BLE001 - a user's own function makes it
                log.error("client_failed", error=type(e).__name__, where="data")  # noqa: TRY400 - it can quote data
                failures[partition] = FailureCode.CLIENT_FAILED
        return clients

    def _reserve(self, partitions: Sequence[int], request: TrainRequest, failures: dict[int, FailureCode]) -> None:
        """Write the round into all members' ledgers; those whose budget does not allow it fail."""
        ledgers, plan, names = self._sites.ledgers, request.plan, self._sites.names
        if ledgers is None or plan is None:
            return
        event = plan.event(request.server_round)
        refused = ledgers.reserve_many([names[p] for p in partitions], event, planned=plan.participations)
        for partition in partitions:
            if (error := refused[names[partition]]) is not None:
                failures[partition] = _failure(error)

    def _members(self, clients: Mapping[int, ClientData], request: TrainRequest) -> list[Member]:
        """Each with its own source of noise, and as many steps as its device has time for."""
        private = request.plan is not None
        by_time = request.config.simulation.devices.partial_work and not private
        return [
            Member(
                name=client.name,
                examples=client.train,
                source=partial(self._noise, client.name, request.server_round) if private else None,
                steps=self._steps(partition, request) if by_time else None,
            )
            for partition, client in clients.items()
        ]

    def _noise(self, name: str, server_round: int) -> NoiseSource:
        """As `SimulatedSites.noise`."""
        seed = self._sites.insecure_seed
        return self._sites.secure_noise if seed is None else FixedNoise(seed, f"{name}/{server_round}")

    def _steps(self, partition: int, request: TrainRequest) -> int | None:
        """Most steps that a client takes; None: all."""
        context = client_context(node_id=partition + FIRST_NODE, partition=partition)
        return self._sites.most_steps(request, context)

    def _make_stack(self, request: TrainRequest) -> Stack:
        config, sites = request.config, self._sites
        model = build_model(config.model, sites.federation.schema, site=sites.site)
        return Stack(model, config, device=resolve_device(config.training.device))


@contextmanager
def _few_collections() -> Iterator[None]:
    """Look for garbage seldom: a chunk makes thousands of small objects, all of which are let go of without that, and
    looking through them costs a sixth of a linear model's round.
    """
    before = gc.get_threshold()
    gc.set_threshold(max(before[0], _OBJECTS) if before[0] else 0, *before[1:])
    try:
        yield
    finally:
        gc.set_threshold(*before)


def _failure(error: CoterieError) -> FailureCode:
    """As the guard says it."""
    exhausted = isinstance(error, BudgetExhaustedError)
    return FailureCode.BUDGET_EXHAUSTED if exhausted else FailureCode.CLIENT_FAILED


def _base(start: Mapping[str, NDArray[Any]], partitions: Sequence[int]) -> str:
    """Names what a chunk was asked with: the model, and who its members are."""
    members = hashlib.sha256(np.asarray(partitions, dtype=np.int64).tobytes())
    return f"{model_digest(start).hex()}/{members.hexdigest()}"

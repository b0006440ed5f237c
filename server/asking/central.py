"""Client-level privacy where the coordinator adds the noise: the strategy sees what was released, and nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from flwr.app import ConfigRecord, Message
from numpy.typing import NDArray

from common.errors import PrivacyError
from common.flower import CLIPPING_NORM, WITHIN
from server.asking.base import Answers, Call, Stateless
from server.asking.plain import checked_grid
from server.grids import ClippedSum, ClippedSumGrid, mean_reply, trainable_names
from server.job import Arrays, Job
from server.release import Release, Releases


class CentralAsking(Stateless):
    """One release a round, made once: a round that was released before this process began asks nobody."""

    tells_cohort = False  # who takes part is not for others to know

    def __init__(self, job: Job) -> None:
        """Prepare a run.

        Raises:
            PrivacyError: There is no plan, or no ledger.
        """
        if job.plan is None:
            raise PrivacyError("the run is private but has no plan", hint="make one with `make_plan`")
        self._job = job
        self._trainable = trainable_names(job.model)
        state = job.model.state_dict()
        self._releases = Releases(
            job.plan,
            run=job.config.digest(),
            dimensions=sum(state[name].numel() for name in self._trainable),
            ledger=job.ledger,
            noise=job.noise,
            checkpoints=job.folder.checkpoints if job.folder else None,
        )
        self._stored: Release | None = None

    def describe(self, record: ConfigRecord) -> None:
        """The present clipping norm."""
        record[CLIPPING_NORM] = self._releases.clipping_norm

    def cohort(self, server_round: int, drawn: list[str]) -> list[str]:
        """Those who were drawn, or the cohort of a release that is on the disk.

        Raises:
            RunError: That release is damaged, or of another configuration.
        """
        self._stored = self._releases.stored(server_round)
        return drawn if self._stored is None else self._stored.cohort

    def ask(self, call: Call, messages: Sequence[Message], model: Arrays) -> Answers:
        """Ask the cohort and release the noised mean of its clipped updates, or take what was released.

        Raises:
            BudgetExhaustedError, LedgerError, PrivacyError, RunError: Nothing was released, nor may be.
        """
        release, self._stored = self._stored, None
        if release is not None:
            for name, fate in release.fates.items():
                call.tell(name, fate)
            replies = [mean_reply(model, self._trainable, release.mean, to=None)]
        else:
            release, replies = self._released(call, messages, model)
        return Answers(
            replies=replies,
            enough=True,  # what was released is used, whoever answered
            clipping_norm=release.clipping_norm,
            within=release.within,
        )

    def _released(self, call: Call, messages: Sequence[Message], model: Arrays) -> tuple[Release, list[Message]]:
        """The round's release, and the answers that are made of it."""
        released: list[Release] = []

        def release(total: ClippedSum) -> NDArray[np.float64]:
            made = self._releases.release(call.server_round, total, cohort=call.cohort, fates=call.fates)
            released.append(made)
            return made.mean

        folder, adaptive = self._job.folder, self._releases.adaptive
        asking = ClippedSumGrid(
            checked_grid(call, self._job.config, model, metrics=(WITHIN,) if adaptive else ()),
            model=model,
            trainable=self._trainable,
            clipping_norm=self._releases.clipping_norm,
            release=release,
            folder=folder.path if folder else None,
        )
        replies = list(asking.send_and_receive(messages, timeout=call.timeout))
        return released[0], replies

    def state(self) -> dict[str, NDArray[Any]]:
        """What later noise depends on."""
        return self._releases.state()

    def restore(self, state: Mapping[str, NDArray[Any]], *, server_round: int) -> None:
        """Continue with the noise that was drawn before.

        Raises:
            RunError: It is not this run's.
        """
        self._releases.restore(state, server_round=server_round)

"""What a round came to, on disk before anybody sees it: a process that stops leaves it to the next one, which makes the
round from it and asks nobody again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from common.errors import FailureCode
from server.checkpoint import Checkpoint, load_round, save_checkpoint

Arrays = Mapping[str, NDArray[Any]]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class StoredRound:
    """What was kept of one round.

    Attributes:
        server_round: The round.
        arrays: What came of it.
        noise: Arrays that are secret.
        facts: Small and JSON-able.
        cohort: Who was asked.
        fates: Why a client's update does not count, or None where it does; clients that were asked.
    """

    server_round: int
    arrays: Arrays
    noise: Arrays
    facts: Mapping[str, Any]
    cohort: list[str]
    fates: dict[str, FailureCode | None]


class StoredRounds:
    """The last rounds of one run, one file each.

    Guarantee: what `find` returns is what `keep` was given for that round, to the bit; another round's, or another
    configuration's, is never taken for it.
    """

    def __init__(self, folder: Path | None, *, run: str) -> None:
        """Prepare.

        Args:
            folder: Where the files are; None keeps nothing.
            run: Digest of the run's configuration.
        """
        self._folder, self._run = folder, run

    def keep(
        self,
        server_round: int,
        *,
        arrays: Arrays,
        facts: Mapping[str, Any],
        cohort: Sequence[str],
        fates: Mapping[str, FailureCode | None],
        noise: Arrays | None = None,
    ) -> None:
        """Write a round.

        Raises:
            RunError: The disk is full or cannot be written. Nothing of the round may be shown.
        """
        if self._folder is None:
            return
        progress = {
            **facts,
            "cohort": list(cohort),
            "fates": {name: fate and int(fate) for name, fate in fates.items()},
        }
        checkpoint = Checkpoint(
            server_round=server_round, config_digest=self._run, arrays=arrays, noise=noise or {}, progress=progress
        )
        save_checkpoint(self._folder, checkpoint)

    def find(self, server_round: int) -> StoredRound | None:
        """A round that was written, or None.

        Raises:
            RunError: It is damaged, or of another configuration.
        """
        if self._folder is None or (found := load_round(self._folder, server_round, self._run)) is None:
            return None
        facts = dict(found.progress)
        cohort, fates = facts.pop("cohort"), facts.pop("fates")
        return StoredRound(
            server_round=server_round,
            arrays=found.arrays,
            noise=found.noise,
            facts=facts,
            cohort=list(cohort),
            fates={name: code and FailureCode(code) for name, code in fates.items()},
        )

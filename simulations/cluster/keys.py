"""The keys of simulated clients on a cluster: a file each in the run's folder, read where the client trains."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Final

from flwr.app import Context

from common.crypto import PartyKeys, PartyRecord
from common.disk import atomic_file, disk_errors
from common.errors import FailureCode, KitError, PeerError, RefusedError, RunError
from simulations.sealing import SimulatedKeys

PARTITION_KEYS: Final = "keys"
"""Folder in a run's folder: in it one for each partition, and the public records of all."""
_RECORDS: Final = "records.json"


@dataclass(frozen=True, kw_only=True)
class PartitionKeys(SimulatedKeys):
    """What the clients of a run on a cluster hold, by partition: a folder, not the keys. No key is in a message of Ray.

    Attributes:
        folder: Holds `0`, `1`, ..., each with the keys of one partition that only their owner can read.
    """

    folder: Path
    sites: tuple[PartyKeys, ...] = ()

    @cached_property
    def records(self) -> dict[str, PartyRecord]:
        """The clients' public records, by name.

        Raises:
            RunError: They are missing or damaged.
        """
        path = self.folder / _RECORDS
        with disk_errors(path, "read"):
            data = path.read_bytes()
        try:
            records = [PartyRecord.from_document(document) for document in json.loads(data)]
        except (ValueError, TypeError, RefusedError) as e:
            raise RunError(f"{path} is damaged", hint="start a new run") from e
        return {record.name: record for record in records}

    def of(self, context: Context) -> PartyKeys:
        """The keys of the client that a context stands for.

        Raises:
            PeerError: It stands for none, or its keys are not there.
        """
        partition = context.node_config.get("partition-id")
        if not isinstance(partition, int) or partition < 0:
            raise PeerError(FailureCode.INVALID_REQUEST)
        try:
            return _loaded(self.folder / str(partition))
        except KitError as e:
            raise PeerError(FailureCode.INVALID_REQUEST) from e


@lru_cache(maxsize=256)
def _loaded(folder: Path) -> PartyKeys:
    return PartyKeys.load(folder)


def write_keys(run: Path, keys: Sequence[PartyKeys], coordinator: PartyRecord) -> PartitionKeys:
    """Put each partition's keys into the run's folder; those of a run that is resumed are there already.

    Args:
        run: The run's folder.
        keys: In the order of the partitions.
        coordinator: The coordinator's record.

    Raises:
        RunError: The folder cannot be written, or holds the keys of another run.
    """
    folder = run / PARTITION_KEYS
    with disk_errors(folder):
        folder.mkdir(mode=0o700, exist_ok=True)
        folder.chmod(0o700)
        for partition, own in enumerate(keys):
            _write(folder / str(partition), own)
        with atomic_file(folder / _RECORDS) as temporary:
            temporary.write_text(json.dumps([own.record.to_document() for own in keys]), encoding="utf-8")
    return PartitionKeys(coordinator=coordinator, folder=folder.absolute())


def _write(folder: Path, keys: PartyKeys) -> None:
    """One partition's folder, whole or not at all."""
    try:
        if folder.exists():
            if PartyKeys.load(folder).record != keys.record:
                raise RunError(f"{folder} holds the keys of another run", hint="start a new run")
            return
        new = folder.with_name(f".{folder.name}.new")
        shutil.rmtree(new, ignore_errors=True)  # of a process that was killed
        keys.save(new)
        new.rename(folder)
    except KitError as e:
        raise RunError(str(e), hint=e.hint) from e

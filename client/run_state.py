"""What a client keeps of a run between its rounds: what compression left out, a clipping norm that adapts.

It stays in memory and on the disk, so that a process that was killed goes on where it was. It never leaves the site.
"""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import Final

import structlog
from flwr.app import RecordDict

from common.disk import atomic_file, disk_errors
from common.errors import RefusedError
from common.transport.records import decode_records, encode_records

log = structlog.get_logger()

_RUNS_KEPT: Final = 4


class RunStates:
    """States by run id, those of the last few runs.

    Guarantee: after a crash a state is one that was put, whole, or empty.
    """

    def __init__(self, folder: Path) -> None:
        """Open; what a former process left is there.

        Raises:
            RunError: The folder cannot be written.
        """
        self._folder = folder
        self._states: OrderedDict[bytes, RecordDict] = OrderedDict()
        with disk_errors(folder):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)

    def take(self, run_id: bytes) -> RecordDict:
        """The state of a run, to be changed and put back."""
        if run_id not in self._states:
            self._states[run_id] = self._read(run_id)
        self._states.move_to_end(run_id)
        return self._states[run_id]

    def put(self, run_id: bytes, state: RecordDict) -> None:
        """Keep a state.

        Raises:
            RunError: The disk is full or cannot be written; in memory it is kept.
        """
        self._states[run_id] = state
        self._states.move_to_end(run_id)
        while len(self._states) > _RUNS_KEPT:
            self._states.popitem(last=False)
        if not state:
            return
        with atomic_file(self._path(run_id)) as temporary, temporary.open("wb") as file:
            file.writelines(encode_records(state))
        kept = sorted(self._folder.glob("*.state"), key=lambda path: path.stat().st_mtime)
        for path in kept[:-_RUNS_KEPT]:
            path.unlink(missing_ok=True)

    def _read(self, run_id: bytes) -> RecordDict:
        try:
            return decode_records(self._path(run_id).read_bytes())
        except OSError:
            return RecordDict()
        except RefusedError:
            log.warning("run_state_damaged", run_id=run_id.hex())
            return RecordDict()

    def _path(self, run_id: bytes) -> Path:
        return self._folder / f"{run_id.hex()}.state"

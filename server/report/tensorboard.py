"""The rounds as TensorBoard events, in `events` of the run folder."""

from __future__ import annotations

import importlib.util
import math
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from common.errors import RunError

EVENTS = "events"


class EventWriter:
    """Writes one set of scalars a round; to be closed, or used as a context.

    Without TensorBoard an `optional` writer does nothing, so that a run never fails over its own curves.
    """

    def __init__(self, folder: Path, *, optional: bool = False) -> None:
        """Open `folder`/events.

        Raises:
            RunError: TensorBoard is not installed and the writer is not `optional`.
        """
        self._writer: Any = None
        if importlib.util.find_spec("tensorboard") is None:
            if optional:
                return
            raise RunError("TensorBoard is not installed", hint="pip install 'coterie[server]'")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of TensorBoard's own imports
            from torch.utils.tensorboard import SummaryWriter
        self._writer = SummaryWriter(str(folder / EVENTS))

    def write_round(self, row: Mapping[str, Any]) -> None:
        """Add the scalars of one line of `rounds.jsonl`; what is missing or not finite is left out."""
        if self._writer is None:
            return
        scalars = {
            "accuracy": row.get("accuracy"),
            "loss": row.get("loss"),
            "train_loss": row.get("train_loss"),
            "epsilon_max": max((row.get("epsilon") or {}).values(), default=None),
            "survivors": len(row.get("survivors") or ()),
            **{f"seconds/{kind}": seconds for kind, seconds in (row.get("seconds") or {}).items()},
        }
        for name, value in scalars.items():
            if value is not None and math.isfinite(value):
                self._writer.add_scalar(name, value, row["server_round"])

    def close(self) -> None:
        """Write what is pending to disk."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

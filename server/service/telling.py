"""What operators may be told of a run: under client-level privacy, not who was asked, nor what gives it away."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, Final

from common.config.load import parse_config
from common.errors import ConfigError
from server.service.audit import Line
from server.service.state import Run

_NAMING: Final = frozenset({"asked", "received", "failed", "late", "cancelled"})
"""Lines of the audit log that say who takes part."""
_ROUNDS: Final = frozenset({"round-started", "round-ended"})


class Teller:
    """Tells the lines of one run's log, in their order.

    Where nobody is named, lines have numbers of their own, and those of rounds no time: gaps between the log's numbers
    would say how many were asked, and short rounds that it was nobody.
    """

    def __init__(self, run: Run) -> None:
        self._names = tells_names(run)
        self._number = 0

    def told(self, line: Line) -> Line | None:
        """A line as operators see it; None for one that they do not."""
        shown = {key: value for key, value in line.items() if key not in {"previous", "run"}}
        if self._names:
            return shown
        if line["event"] in _NAMING:
            return None
        hidden = {"cohort", "survivors", "failures", *(["at"] if line["event"] in _ROUNDS else [])}
        shown = {key: value for key, value in shown.items() if key not in hidden} | {"number": self._number}
        self._number += 1
        return shown


def told_round(run: Run, last: dict[str, Any]) -> dict[str, Any]:
    """The figures of a round."""
    hidden = () if tells_names(run) else ("survivors", "asked", "seconds")
    return {key: value for key, value in last.items() if key not in hidden}


def tells_names(run: Run) -> bool:
    """Whether a run may say who takes part."""
    return _unit(run.config) in {"none", "example"}


@lru_cache(maxsize=256)
def _unit(config: str) -> str:
    try:
        return parse_config(config).privacy.unit
    except ConfigError:
        return ""

"""What a run's rounds say of its secure aggregation, as `result.json` holds it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from common.config import RunConfig


def describe_sums(config: RunConfig, rounds: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """How many sums were opened, and of how few updates; None for a run without secure aggregation.

    `privacy_set` is the fewest honest clients that any opened sum had, if as many colluded as were assumed to: among so
    many an update is hidden.
    """
    if not config.privacy.secure_aggregation:
        return None
    rows = [row["aggregation"] for row in rounds if row.get("aggregation")]
    groups = [group for row in rows for group in row["groups"]]
    opened = [group["survivors"] for group in groups if group["survivors"]]
    colluding = config.secagg.colluding
    return {
        "experimental": True,
        "claim": "a coordinator sees no update, even if it departs from the protocol and has the help of "
        f"{colluding} of a sum's clients, where the clients pinned one another's keys",
        "colluding": colluding,
        "group_size": config.secagg.group_size,
        "epochs": len({row["epoch"] for row in rows}),
        "sums": len(groups),
        "opened": len(opened),
        "groups": max((len(row["groups"]) for row in rows), default=0),
        "threshold": min((group["threshold"] for group in groups), default=None),
        "smallest_sum": min(opened, default=None),
        "privacy_set": min(opened) - colluding if opened else None,
    }

"""What a privacy guarantee compares, and whom it holds against: the same words wherever an epsilon is shown."""

from __future__ import annotations

from typing import Final

ADDED_OR_REMOVED: Final = "add/remove"
"""Neighbouring data sets differ by one unit added or removed."""

UPDATE_REPLACED: Final = "one client's update replaced by zero, survivors the same"
"""Neighbours of noise that clients add themselves. Who is in a sum is public, and each of them adds its share."""


def against(trust: str, colluding: int | None = None) -> str:
    """Whom a guarantee holds against.

    Args:
        trust: As an event says it.
        colluding: For trust `cohort`: most clients of a sum that may help whoever looks.
    """
    if trust == "coordinator":
        return "against everybody but the coordinator"
    if trust == "cohort":
        return f"against everybody, the coordinator too, {while_few(colluding)}"
    return "against everybody"


def while_few(colluding: int | None) -> str:
    """The condition of distributed noise: a client knows its own share of it, and can tell."""
    who = {0: "none", None: "no more than were assumed"}.get(colluding, f"at most {colluding}")
    return f"while {who} of the clients in a sum help whoever looks"

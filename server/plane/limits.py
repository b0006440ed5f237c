"""What one peer, and all of them together, may take of the coordinator."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """Bounds of the plane; the defaults suit hundreds of sites on a small machine.

    Attributes:
        uploads: Updates that are taken in at once; others wait, unread, which holds their senders back.
        calls_each: Calls that one party may have open at once.
        idle_seconds: An upload must bring a megabyte, and a new stream its first message, within this time.
        watch_seconds: How often the deny list and the certificates of open streams are looked at.
        threads: Threads that read and write files.
        desk_threads: Operators' questions that are answered at once.
        followers: Operators that follow runs at once; each takes a thread while it waits.
    """

    uploads: int = 8
    calls_each: int = 8
    idle_seconds: float = 30.0
    watch_seconds: float = 1.0
    threads: int = 4
    desk_threads: int = 4
    followers: int = 16

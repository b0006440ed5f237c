"""Which orders a site has taken, written down at the instants that matter to a process that can be killed."""

from __future__ import annotations

from client.mods.sealed import ReplayGuard


class Replays(ReplayGuard):
    """A ReplayGuard for a process that stores its answers.

    Guarantee: an order counts as answered only once its answer is on the disk. A process that is killed between sealing
    an answer and storing it may answer the order again: nothing has left, and the coordinator still waits.
    """

    def answered(self, run_id: bytes, message_id: bytes) -> None:
        """An answer exists in memory: in this process the order is not taken again, which `begin` sees to."""

    def stored(self, run_id: bytes, message_id: bytes) -> None:
        """The answer is on the disk: never take this order again."""
        super().answered(run_id, message_id)

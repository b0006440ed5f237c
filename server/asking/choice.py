"""Which way of asking a run's configuration names."""

from __future__ import annotations

from server.asking.base import Asking
from server.asking.central import CentralAsking
from server.asking.plain import PlainAsking
from server.job import Job


def asking_for(job: Job) -> Asking:
    """The one way.

    Raises:
        PrivacyError, ConfigError: Something that it needs is not there.
    """
    if job.config.privacy.secure_aggregation:
        from server.asking.summed import SummedAsking

        return SummedAsking(job)
    if job.config.asynchronous.buffer_size:
        from server.asking.buffered import BufferedAsking

        return BufferedAsking(job)
    return CentralAsking(job) if job.config.central else PlainAsking(job)

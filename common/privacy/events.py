"""What was released, as frozen records. They say what happened; only `accountant` says what it costs."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from common.errors import LedgerError


@dataclass(frozen=True, kw_only=True, slots=True)
class PoissonGaussian:
    """`steps` noised sums of clipped per-example gradients, each over a Poisson sample of the data set.

    Attributes:
        noise_multiplier: Noise standard deviation over the L2 sensitivity of the sum; no unit.
        sampling_rate: Probability with which each example entered each sum; public.
        steps: Number of sums.
        run: Digest of the run's configuration.
        server_round: The round, from 1.
    """

    KIND: ClassVar[str] = "poisson-gaussian"
    noise_multiplier: float
    sampling_rate: float
    steps: int
    run: str
    server_round: int


@dataclass(frozen=True, kw_only=True, slots=True)
class NonPrivate:
    """A release without noise: from here on the spent epsilon is infinite."""

    KIND: ClassVar[str] = "non-private"
    run: str
    server_round: int


PrivacyEvent = PoissonGaussian | NonPrivate
_KINDS: dict[str, type[PoissonGaussian | NonPrivate]] = {c.KIND: c for c in (PoissonGaussian, NonPrivate)}
VERSION = 1


def event_to_dict(event: PrivacyEvent) -> dict[str, Any]:
    """The event as JSON values, with its kind and version."""
    return {"version": VERSION, "kind": event.KIND, **asdict(event)}


def event_from_dict(record: dict[str, Any]) -> PrivacyEvent:
    """The event that `event_to_dict` wrote.

    Raises:
        LedgerError: Unknown version, kind or field, or a value out of range. An event that is not understood cannot be
            counted, so it is never skipped.
    """
    fields = dict(record)
    version, kind = fields.pop("version", None), fields.pop("kind", None)
    if version != VERSION or kind not in _KINDS:
        raise LedgerError(
            f"unknown privacy event {kind!r} of version {version!r}", hint="this ledger was written by a newer Coterie"
        )
    try:
        event = _KINDS[kind](**fields)
    except TypeError as e:
        raise LedgerError(f"a {kind} event has wrong fields", hint="the ledger was edited or damaged") from e
    if isinstance(event, PoissonGaussian):
        check_event(event)
    return event


def check_event(event: PoissonGaussian) -> None:
    """Refuse an event that cannot be counted.

    Raises:
        LedgerError: A value is out of its range or not a number.
    """
    if not (
        type(event.steps) is int
        and event.steps >= 1
        and all(type(value) in (int, float) for value in (event.sampling_rate, event.noise_multiplier))
        and 0 < event.sampling_rate <= 1
        and 0 < event.noise_multiplier < float("inf")
    ):
        raise LedgerError("a privacy event has impossible values", hint="the ledger was edited or damaged")

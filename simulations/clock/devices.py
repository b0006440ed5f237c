"""What a simulated client trains on. A device is a function of its client, made whenever somebody looks at it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

from common.config.simulated import DeviceSettings
from simulations.clock.draws import log_normal, uniforms
from simulations.clock.presence import Always, Drawn, Presence

_BITS_OF_MBIT: Final = 1e6


@dataclass(frozen=True, kw_only=True, slots=True)
class Device:
    """One device.

    Attributes:
        examples_per_second: How many examples it trains on in a virtual second.
        download_mbit, upload_mbit: Bandwidth in Mbit/s; infinite where transfers take no time.
        dropout: Probability that it goes away before it has answered, each time that it is asked.
        presence: When it is there.
    """

    examples_per_second: float
    download_mbit: float
    upload_mbit: float
    dropout: float
    presence: Presence

    def download_seconds(self, size_bytes: int) -> float:
        """How long so many bytes take to arrive."""
        return size_bytes * 8 / _BITS_OF_MBIT / self.download_mbit

    def upload_seconds(self, size_bytes: int) -> float:
        """How long so many bytes take to be sent."""
        return size_bytes * 8 / _BITS_OF_MBIT / self.upload_mbit


class Devices(Protocol):
    """What device each client is."""

    @property
    def away_at_times(self) -> bool:
        """Whether any device can be away."""

    def of(self, place: int, name: str) -> Device:
        """The device of the client with this place in the population, and this name."""

    def presence(self, place: int, name: str) -> Presence:
        """When that device is there: its `presence`, where nothing else of it matters."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DrawnDevices:
    """Devices that are drawn from the distributions of a run's settings, each from nothing but seed and name.

    Attributes:
        settings: Medians and spreads.
        seed: `seeds.devices`.
    """

    settings: DeviceSettings
    seed: int

    @property
    def away_at_times(self) -> bool:
        """See `Devices`."""
        return self.settings.availability < 1

    def of(self, place: int, name: str) -> Device:
        """See `Devices`."""
        s = self.settings
        fast, slow = uniforms(self.seed, "speed", name)
        down, up = uniforms(self.seed, "bandwidth", name)
        speed = s.examples_per_second * log_normal(s.speed_spread, fast)
        return Device(
            examples_per_second=speed / (s.straggler_slowdown if slow < s.stragglers else 1.0),
            download_mbit=(s.download_mbit or float("inf")) * log_normal(s.bandwidth_spread, down),
            upload_mbit=(s.upload_mbit or float("inf")) * log_normal(s.bandwidth_spread, up),
            dropout=s.dropout,
            presence=self.presence(place, name),
        )

    def presence(self, place: int, name: str) -> Presence:  # noqa: ARG002 - see `Devices`
        """See `Devices`."""
        s = self.settings
        if not self.away_at_times:
            return Always()
        return Drawn(seed=self.seed, name=name, share=s.availability, mean_seconds=s.availability_seconds)


@dataclass(frozen=True, kw_only=True, slots=True)
class TracedDevices:
    """Devices of a trace: each client's own where the trace names clients, else one after the other, round and round.

    Attributes:
        lines: All devices, in the order of the trace.
        named: Their places in `lines` by client; empty where the trace names nobody.
    """

    lines: Sequence[Device]
    named: Mapping[str, int]

    @property
    def away_at_times(self) -> bool:
        """See `Devices`."""
        return any(not isinstance(device.presence, Always) for device in self.lines)

    def of(self, place: int, name: str) -> Device:
        """See `Devices`."""
        return self.lines[self.named[name] if self.named else place % len(self.lines)]

    def presence(self, place: int, name: str) -> Presence:
        """See `Devices`."""
        return self.of(place, name).presence

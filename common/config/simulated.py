"""Settings of what exists only in simulations: clients that lie, devices, virtual time. Sites ignore them."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from common.config.base import NonNegativeFloat, PositiveFloat, Settings


class DeviceSettings(Settings):
    """What simulated clients train on: gives a simulation virtual time. Figures are those of the median device."""

    examples_per_second: NonNegativeFloat = Field(
        0.0,
        description="Examples that a device trains on in a virtual second; 0 (and no trace): there is no virtual time.",
    )
    speed_spread: Annotated[float, Field(ge=0, le=5)] = Field(
        0.0, description="Spread of speeds: standard deviation of their logarithm (log-normal)."
    )
    download_mbit: NonNegativeFloat = Field(
        0.0,
        description="Bandwidth towards the device; 0: transfers take no time.",
        json_schema_extra={"unit": "Mbit/s"},
    )
    upload_mbit: NonNegativeFloat = Field(
        0.0, description="Bandwidth from the device; 0: transfers take no time.", json_schema_extra={"unit": "Mbit/s"}
    )
    bandwidth_spread: Annotated[float, Field(ge=0, le=5)] = Field(
        0.0, description="Spread of bandwidths: standard deviation of their logarithm (log-normal)."
    )
    availability: Annotated[float, Field(gt=0, le=1)] = Field(
        1.0, description="Share of the time that a device is there, and can be asked."
    )
    availability_seconds: PositiveFloat = Field(
        3600.0,
        description="Mean length of a spell of being there.",
        json_schema_extra={"unit": "seconds"},
    )
    dropout: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.0, description="Probability that a device which was asked goes away before it has answered."
    )
    stragglers: Annotated[float, Field(ge=0, le=1)] = Field(
        0.0, description="Share of devices that are slower by straggler_slowdown."
    )
    straggler_slowdown: Annotated[float, Field(ge=1, le=1e6)] = Field(10.0, description="How much slower they are.")
    partial_work: bool = Field(
        False,
        description="Whether a device that cannot finish before the deadline sends what it has trained by then.",
    )
    trace: Annotated[str, Field(pattern=r"^[0-9a-f]{0,64}$")] = Field(
        "",
        description="SHA-256 of the file that devices are read from, in place of the figures above; "
        "`coterie simulate --trace FILE` sets it.",
    )


class SimulationSettings(Settings):
    """What exists only in simulations; sites ignore it."""

    byzantine_clients: int = Field(0, ge=0, description="Clients (the first ones) that send a scaled update.")
    byzantine_scale: Annotated[float, Field(allow_inf_nan=False)] = Field(
        -10.0, description="What byzantine clients multiply their update by."
    )
    devices: DeviceSettings = DeviceSettings()

    @property
    def virtual(self) -> bool:
        """Whether there is virtual time."""
        return self.devices.examples_per_second > 0 or bool(self.devices.trace)

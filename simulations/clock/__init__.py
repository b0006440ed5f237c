"""Virtual time: what would pass where the clients of a simulation are devices of different speed that come and go.

`make_timing` says how long each client takes, and is all that worker processes need; `VirtualTime` is a run's clock,
with the sampler that looks at it and the grid that moves it. Only `simulations.run`, `simulations.sites` and the
command line use this package, and only what is named here.
"""

from simulations.clock.devices import Device, Devices, DrawnDevices, TracedDevices
from simulations.clock.grid import ClockedGrid
from simulations.clock.sampler import AvailableSampler
from simulations.clock.setup import VirtualTime, make_timing
from simulations.clock.timing import Timing, Visit, settle
from simulations.clock.trace import check_clients, read_trace, trace_digest
from simulations.clock.virtual import VirtualClock
from simulations.clock.workload import Workload, steps_that_fit

__all__ = [
    "AvailableSampler",
    "ClockedGrid",
    "Device",
    "Devices",
    "DrawnDevices",
    "Timing",
    "TracedDevices",
    "VirtualClock",
    "VirtualTime",
    "Visit",
    "Workload",
    "check_clients",
    "make_timing",
    "read_trace",
    "settle",
    "steps_that_fit",
    "trace_digest",
]

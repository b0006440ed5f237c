"""How long a client takes for a round, and whether it gets to its end: a function of client, round and moment alone.

The coordinator's side looks up who answers when; a client's own side, perhaps in another process, how many steps it
takes. Both ask here, so that they agree.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from common.errors import FailureCode
from simulations.clock.devices import Device, Devices
from simulations.clock.draws import uniforms
from simulations.clock.workload import Workload, examples_after, steps_that_fit


@dataclass(frozen=True, kw_only=True, slots=True)
class Visit:
    """What became of a client that was asked.

    Attributes:
        seconds: How long it was at work, until it had answered, went away, or nobody waited any more.
        failure: `CLIENT_LOST` or `DEADLINE_EXCEEDED`; None: it answers.
    """

    seconds: float
    failure: FailureCode | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Timing:
    """What decides about time in one run.

    Attributes:
        devices: What device each client is.
        workload: What a round asks of each.
        seed: `seeds.devices`; decides who drops out.
        deadline_seconds: A client that has not answered by then is late; infinity where nobody is.
        partial_work: Whether a device that cannot finish in time sends what it has trained by then.
    """

    devices: Devices
    workload: Workload
    seed: int
    deadline_seconds: float = math.inf
    partial_work: bool = False

    def visit(self, place: int, name: str, *, examples: int, server_round: int, at: float) -> Visit:
        """What becomes of a client.

        Args:
            place: Its place in the population.
            name: Its name.
            examples: How many it trains on.
            server_round: The round that it is asked for; each is another chance to drop out.
            at: When it is asked.
        """
        device = self.devices.of(place, name)
        away = device.presence.ends(at)
        if away is None:
            return Visit(seconds=0.0, failure=FailureCode.CLIENT_LOST)
        seconds, _ = self._course(device, examples)
        drops, when = uniforms(self.seed, "dropout", name, server_round)
        lost = min(away - at, when * seconds if drops < device.dropout else math.inf)
        if seconds <= min(lost, self.deadline_seconds):
            return Visit(seconds=seconds, failure=None)
        if lost < self.deadline_seconds:
            return Visit(seconds=lost, failure=FailureCode.CLIENT_LOST)
        return Visit(seconds=self.deadline_seconds, failure=FailureCode.DEADLINE_EXCEEDED)

    def most_steps(self, place: int, name: str, *, examples: int) -> int | None:
        """How many steps a client can take that shall answer in time; None where it can take all.

        It is 0 only for clients that are late whatever they do.
        """
        return self._course(self.devices.of(place, name), examples)[1]

    def _course(self, device: Device, count: int) -> tuple[float, int | None]:
        """Seconds from being asked to having answered, and steps where these are fewer than all."""
        work, speed = self.workload, device.examples_per_second
        transfer = device.download_seconds(work.download_bytes) + device.upload_seconds(work.upload_bytes)
        seconds = transfer + work.examples(count) / speed
        if seconds <= self.deadline_seconds or not self.partial_work:
            return seconds, None
        fitting = max(0.0, (self.deadline_seconds - transfer) * speed)
        steps = min(steps_that_fit(fitting, count=count, batch_size=work.batch_size), work.steps(count))
        if steps == 0:
            return seconds, 0
        done = examples_after(steps, count=count, batch_size=work.batch_size)
        return min(transfer + done / speed, self.deadline_seconds), steps


def settle(visits: Sequence[Visit], enough: int | None) -> tuple[list[Visit], float]:
    """How a round's visits end, and how many seconds after its beginning the round does.

    Args:
        visits: Of all who were asked, at the same moment.
        enough: So many answers end the round: nobody waits for the others. Of two that come at the same moment the
            first in `visits` counts. None waits for everybody.
    """
    places = range(len(visits))
    answers = sorted((place for place in places if visits[place].failure is None), key=lambda p: (visits[p].seconds, p))
    if enough is None or len(answers) < enough:
        return list(visits), max((visit.seconds for visit in visits), default=0.0)
    end = visits[answers[enough - 1]].seconds
    late = {place for place in places if visits[place].seconds > end} | set(answers[enough:])
    given_up = Visit(seconds=end, failure=FailureCode.DEADLINE_EXCEEDED)
    return [given_up if place in late else replace(visits[place]) for place in places], end
